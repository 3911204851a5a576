"""The coordinator's folder: made once, its server's certificate renewed."""

from __future__ import annotations

import base64
import json
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Literal

from pydantic import field_validator

from common.errors import ConfigError
from common.federation_file import Description, check_host, split_address
from common.files import atomic_write
from common.parsing import parse_toml
from common.secagg.keys import Identity
from deploy.provision import certificates, keys
from deploy.provision.files import claim, keep_or_make, locked, private_folder, write_if_changed

SIGNED_PARTS = ("federation.toml", "tls.crt", "roster.json", "federation.json", "revoked.json",
                "hospitals/", "kits/")  # fmt: skip
"""What commands change in a coordinator's folder: all that a server needs from who has the keys."""


class Settings(Description):
    """``federation.toml``: what hospitals are told, and the names that the certificate is for."""

    version: Literal[1]
    hosts: tuple[str, ...]

    @field_validator("hosts", mode="before")
    @classmethod
    def _hosts(cls, hosts: object) -> object:
        if not isinstance(hosts, list | tuple) or not all(isinstance(host, str) for host in hosts):
            return hosts
        return tuple(dict.fromkeys(map(check_host, hosts)))

    def description(self) -> Description:
        """The part that hospitals are told."""
        told = {name: getattr(self, name) for name in Description.model_fields}
        return Description.model_validate({n.replace("_", "-"): v for n, v in told.items()})

    def names(self) -> list[str]:
        """All names for the certificate: the address's host first."""
        return list(dict.fromkeys((split_address(self.address)[0], *self.hosts)))

    def to_toml(self) -> str:
        """As the file, commented."""

        def text(value: object) -> str:
            return json.dumps(value, ensure_ascii=False)

        return f"""\
# What this federation is. After a change: `consilium federation refresh`, and for the address or
# the hosts `consilium federation renew` before it. Hospitals get the changes with their next kit.
version = 1
name = {text(self.name)}  # not to be changed once a hospital has joined
address = {text(self.address)}  # where hospitals reach the server
hosts = {text(self.hosts)}  # further names or IP addresses of it, for its certificate
classes = {text(self.classes)}  # their order is the labels'
image-size = {self.image_size}  # side in pixels
channels = {self.channels}  # 1: grey, 3: colour
"""


@dataclass(frozen=True)
class FederationFolder:
    """Where everything lies in a coordinator's folder; see :mod:`deploy.provision`."""

    root: Path

    @property
    def settings(self) -> Path:
        """``federation.toml``."""
        return self.root / "federation.toml"

    @property
    def private(self) -> Path:
        """The folder that nobody else may read."""
        return self.root / "private"

    @property
    def coordinator_key(self) -> Path:
        """Ed25519 private key, 32 raw bytes."""
        return self.private / "coordinator.key"

    @property
    def coordinator(self) -> Path:
        """The public one, base64."""
        return self.root / "coordinator.pub"

    @property
    def authority_key(self) -> Path:
        """The certificate authority's private key."""
        return self.private / "ca.key"

    @property
    def authority(self) -> Path:
        """The certificate authority."""
        return self.root / "ca.crt"

    @property
    def server_key(self) -> Path:
        """The TLS server's private key."""
        return self.private / "tls.key"

    @property
    def server(self) -> Path:
        """The TLS server's certificate."""
        return self.root / "tls.crt"

    @property
    def roster(self) -> Path:
        """The signed roster."""
        return self.root / "roster.json"

    @property
    def description(self) -> Path:
        """The signed description."""
        return self.root / "federation.json"

    @property
    def revoked(self) -> Path:
        """Keys that are never admitted again."""
        return self.root / "revoked.json"

    @property
    def hospitals(self) -> Path:
        """Who was admitted."""
        return self.root / "hospitals"

    @property
    def kits(self) -> Path:
        """What each hospital is sent."""
        return self.root / "kits"

    def load(self) -> Settings:
        """``federation.toml``; ConfigError if it is missing or wrong."""
        try:
            document = parse_toml(self.settings.read_bytes())
        except FileNotFoundError:
            raise ConfigError(
                f"{self.root} is no federation: it has no {self.settings.name}",
                "check the path, or make one: consilium federation init",
            ) from None
        except (OSError, ValueError) as error:
            raise ConfigError(
                f"{self.settings} cannot be read: {error}", "correct it, or restore it"
            ) from None
        return Settings.read(document, self.settings)

    def public_key(self) -> bytes:
        """The coordinator's 32-byte public key."""
        from common.federation_file import read_key

        return read_key(self.coordinator)

    @property
    def serves_only(self) -> bool:
        """Whether neither signing key is here: a server's copy, in which nothing can be signed."""
        return not (self.coordinator_key.exists() or self.authority_key.exists())

    def check_signs(self) -> None:
        """ConfigError in a folder that a server has without the signing keys."""
        if self.serves_only:
            raise ConfigError(
                f"the signing keys are not in {self.private}: this folder is served, and nothing "
                "in it can be signed",
                "run the command where the keys are kept, and copy what it has changed to here: "
                f'{", ".join(SIGNED_PARTS)} (deploy/README.md, "The keys elsewhere")',
            )

    def signer(self) -> Identity:
        """The coordinator's key, which must be the one that hospitals have pinned.

        ConfigError where it is not, or not here.
        """
        self.check_signs()
        identity = keys.load_identity(self.coordinator_key)
        if identity.public != self.public_key():
            raise ConfigError(
                f"{self.coordinator_key} is not the key of {self.coordinator}",
                "restore both from a backup",
            )
        return identity


def init(folder: FederationFolder, settings: Settings, now: datetime, days: int) -> bool:
    """Make the federation, or complete one that a crash left unfinished; whether any was made.

    ConfigError if the folder holds something else, or a federation with other settings.
    """
    from deploy.provision.kit import refresh

    claim(folder.root, folder.settings)
    with locked(folder.root):
        if not folder.settings.exists():
            # First: from now on the folder is this federation's, whatever happens.
            atomic_write(folder.settings, settings.to_toml())
        elif folder.load() != settings:
            raise ConfigError(
                f"{folder.root} is a federation already, with other settings",
                f"edit {folder.settings} and use `consilium federation refresh`, "
                "or name another folder",
            )
        complete = folder.description.exists()
        private_folder(folder.private)
        keep_or_make(folder.coordinator_key, keys.new_identity, dependent=folder.coordinator)
        if not folder.coordinator.exists():
            public = keys.load_identity(folder.coordinator_key).public
            atomic_write(folder.coordinator, base64.b64encode(public) + b"\n")
        _make_authority(folder, settings, now)
        keep_or_make(folder.server_key, keys.new_tls_key, dependent=folder.server)
        if not folder.server.exists():
            _make_server(folder, settings, now, days)
        refresh(folder, now)
    return not complete


def _make_authority(folder: FederationFolder, settings: Settings, now: datetime) -> None:
    keep_or_make(folder.authority_key, keys.new_tls_key, dependent=folder.authority)
    if not folder.authority.exists():
        key = keys.load_tls_key(folder.authority_key)
        atomic_write(folder.authority, certificates.make_authority(settings.name, key, now))


def _make_server(folder: FederationFolder, settings: Settings, now: datetime, days: int) -> None:
    folder.check_signs()
    key = keys.load_tls_key(folder.authority_key)
    authority = certificates.load_certificate(folder.authority)
    if not certificates.belongs_to(authority, key):
        raise ConfigError(
            f"{folder.authority_key} is not the key of {folder.authority}",
            "restore both from a backup",
        )
    public = keys.load_tls_key(folder.server_key).public_key()
    certificate = certificates.make_server(
        settings.name, settings.names(), public, authority, key, now, days
    )
    write_if_changed(folder.server, certificate)


def renew(folder: FederationFolder, now: datetime, days: int) -> None:
    """A new server certificate for the names in ``federation.toml``; same key, same authority."""
    settings = folder.load()
    with locked(folder.root):
        _make_server(folder, settings, now, days)


def make_settings(
    *,
    name: str,
    address: str,
    hosts: Sequence[str],
    classes: Sequence[str],
    image_size: int,
    channels: int,
) -> Settings:
    """Settings from a command's arguments; ConfigError naming the one that is wrong."""
    document = {"version": 1, "name": name, "address": address, "hosts": tuple(hosts),
                "classes": tuple(classes), "image-size": image_size,
                "channels": channels}  # fmt: skip
    return Settings.read(document, "what the federation should be")
