"""What is checked of a request before an image is read: terms, policy, what was agreed before."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

import numpy as np
from flwr.app import Context

from client_app import secagg
from client_app.agreements import Agreements
from client_app.hospital import Hospital
from client_app.identity import peers_of
from common.config import lasting_digest
from common.secagg import RoundBinding


class Request(Protocol):
    """A request that is about a run, perhaps with an invitation to secure aggregation."""

    @property
    def run(self) -> str:
        """The run's id."""

    @property
    def round(self) -> int:
        """The round's number."""

    @property
    def invitation(self) -> bytes:
        """Of secure aggregation; empty: the answer is asked for in the clear."""


def admit(
    request: Request, hospital: Hospital, context: Context, *, purpose: str
) -> RoundBinding | None:
    """The round's binding, judged as far as it can be without the data; None: in the clear.

    Raises PolicyRefusal for a request in the clear that the policy does not allow, Refusal as
    :func:`client_app.secagg.check_terms` and :func:`client_app.identity.peers_of`, and what
    :func:`admit_run` raises.
    """
    binding = None
    if request.invitation:
        binding = secagg.check_terms(
            request.invitation,
            hospital,
            run=request.run,
            round=request.round,
            purpose=purpose,
            has_roster=peers_of(context, hospital.policy) is not None,
        )
    else:
        hospital.policy.check_plain(hospital.config.secagg)
    admit_run(request.run, hospital)
    return binding


def admit_run(run: str, hospital: Hospital) -> None:
    """Whether the hospital may take part in ``run``, or go on with it; nothing is noted yet.

    Raises PolicyRefusal for a run that asks for more computing than the policy allows, and
    AgreementRefusal for another config than the one with which the hospital took part before, or
    one new run too many today.
    """
    limits = hospital.policy.compute
    limits.check(hospital.config)
    Agreements(hospital).check(run, lasting_digest(hospital.config), limits.max_runs_a_day)


def take_part(run: str, hospital: Hospital) -> None:
    """Note the run's config, which it keeps from now on: the ledger has let it in.

    To be called before anything is computed on the hospital's images. Raises as :func:`admit_run`.
    """
    most = hospital.policy.compute.max_runs_a_day
    Agreements(hospital).admit(run, lasting_digest(hospital.config), most)


def check_size(hospital: Hospital, *models: Mapping[str, np.ndarray]) -> None:
    """PolicyRefusal for models that are larger, in bytes, than the policy allows."""
    hospital.policy.compute.check_bytes(sum(a.nbytes for model in models for a in model.values()))
