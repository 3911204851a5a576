"""The hospital that is being checked: what one check has read is there for the next."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime
from functools import cached_property
from typing import TYPE_CHECKING

from client_app.hospital_file import HospitalFile, HospitalFolder
from common.federation_file import FederationFile, read_limited, split_address

if TYPE_CHECKING:
    from client_app.policy import HospitalPolicy
    from common.datasets import ImageSet
    from common.secagg import Roster
    from deploy.doctor.connection import Answer, Connection
    from deploy.provision.requests import Request


@dataclass
class Case:
    """A hospital's folder at a moment (UTC); properties read a file once, or raise its error.

    The fields below the first two are what a check leaves for later ones. Which check must have
    passed before is said in :mod:`deploy.doctor.checkup`.
    """

    folder: HospitalFolder
    now: datetime
    connection: Connection | None = None
    """Of the check ``server TLS``."""
    answer: Answer | None = None
    """Of the check ``server health``."""
    images: ImageSet | None = None
    """Of the check ``pictures``: labels are indices into the federation's classes."""
    spent: list[tuple[str, float, float]] | None = None
    """Of the check ``ledger``: data set, ε spent, ε left; None where it was not opened."""

    @cached_property
    def file(self) -> HospitalFile:
        """``hospital.toml``."""
        return HospitalFile.load(self.folder.file)

    @cached_property
    def policy(self) -> HospitalPolicy:
        """``policy.toml``."""
        from client_app.policy import HospitalPolicy

        return HospitalPolicy.load(self.folder.policy)

    @cached_property
    def request(self) -> Request:
        """``request.json``, its signatures checked."""
        from deploy.provision.requests import Request

        return Request.parse(read_limited(self.folder.request, "restore it from a backup"))

    @cached_property
    def federation(self) -> FederationFile:
        """The federation's description, under the pinned key."""
        return self.folder.load_federation()

    @cached_property
    def roster(self) -> Roster:
        """The roster, under the pinned key."""
        from common.federation_file import read_key
        from common.secagg import Roster

        return Roster.load(read_limited(self.folder.roster), read_key(self.folder.coordinator))

    @property
    def address(self) -> tuple[str, int]:
        """Host and port of the server: the hospital's own entry, or else the kit's."""
        return split_address(self.file.address or self.federation.description.address)

    def close(self) -> None:
        """End the connection, if there is one."""
        if self.connection is not None:
            self.connection.close()
