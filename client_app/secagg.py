"""The hospital's transport of secure aggregation: messages in, messages out, state at the node.

Between two stages a round's secrets lie in Flower's ``Context.state``, which stays on the
hospital's node. They are wiped at the end of the round, after any error, and when another round
begins. A node may run two messages at a time, each from the last state that was stored, so the
state alone cannot hold "each stage once": a marker on the hospital's disk does, made before a
stage is answered. The protocol itself is :mod:`common.secagg`.
"""

from __future__ import annotations

import logging
import secrets
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, Context

from client_app.agreements import Agreements
from client_app.cohorts import Cohorts
from client_app.hospital import Hospital
from client_app.identity import identity_of, peers_of
from client_app.opaque import one_code
from common.aggregation import TRAIN, VALIDATE, layout_for, params_for
from common.config import config_digest
from common.errors import ConfigError
from common.files import read_json, write_json
from common.messages import RAW, entry
from common.secagg import HospitalRound, Refusal, RoundBinding, RoundTerms, encode

log = logging.getLogger("consilium.hospital")

SHARE, MASKED, CONSISTENCY, UNMASK = STAGES = ("share", "masked", "consistency", "unmask")

_FLOWER_RUNS = 32
"""Of which marks are kept."""

_STATE = "secagg-state"
_INPUT = "secagg-input"
_WARNED: set[str] = set()
"""Runs for which this process has said that they are unauthenticated."""


def wipe(context: Context) -> None:
    """Forget the round at hand: keys, shares, and the vector that was to be masked."""
    for name in (_STATE, _INPUT):
        if name in context.state:
            del context.state[name]


class Once:
    """Marks on the hospital's disk: which round is at hand, which of its stages were answered.

    Kept by Flower's run, not by the name that the ServerApp gives to its run: a coordinator who
    starts a new Flower run, from the same seed perhaps, starts a new count.
    """

    def __init__(self, hospital: Hospital) -> None:
        self._folder = hospital.home / "secagg" / str(hospital.flower_run)

    def begin(self) -> str:
        """A new round: its token. Stages of every earlier one are refused from now on."""
        token = secrets.token_hex(16)
        self._folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        for old in self._folder.glob("round-*"):
            shutil.rmtree(old, ignore_errors=True)
        (self._folder / f"round-{token}").mkdir(mode=0o700)
        self._prune()
        return token

    def _prune(self) -> None:
        """Forget the oldest Flower runs: a server starts as many as it likes.

        What must not be forgotten, over whom a vector was summed, is elsewhere
        (:mod:`client_app.agreements`).
        """
        runs = [f for f in self._folder.parent.iterdir() if f.is_dir() and f.name.isdigit()]
        for old in sorted(runs, key=lambda f: -f.stat().st_mtime)[_FLOWER_RUNS:]:
            if old != self._folder:
                shutil.rmtree(old, ignore_errors=True)

    def take(self, token: str, stage: str) -> None:
        """Claim ``stage`` of the round ``token``; Refusal if it was claimed, or the round is over.

        Atomic between processes: of two that ask for one stage, one is refused.
        """
        try:
            (self._folder / f"round-{token}" / stage).open("x").close()
        except FileExistsError:
            raise _refuse("stage-repeated", "This stage of the round was answered before") from None
        except OSError:
            raise _refuse("no-round", "This round is over, or another one has begun") from None

    def masked(self) -> dict[str, list[Any]]:
        """Purpose and model hash → [run, round] of the last vector that left, masked."""
        path = self._folder / "masked.json"
        return dict(read_json(path)) if path.exists() else {}

    def mark_masked(self, binding: RoundBinding) -> None:
        """Written before the vector leaves."""
        entry = {_what(binding.purpose, binding.model_hash): [binding.run, binding.round]}
        write_json(self._folder / "masked.json", self.masked() | entry, mode=0o600)


def _what(purpose: str, model_hash: bytes) -> str:
    return f"{purpose} {model_hash.hex()}"


def validated_before(hospital: Hospital, model_hash: bytes) -> bool:
    """Whether this model's validation figures have left, in a sum, already.

    They depend on the model alone: two sums over different cohorts would show one hospital's.
    """
    masked = Once(hospital).masked()
    return any(_what(purpose, model_hash) in masked for purpose in (TRAIN, VALIDATE))


def check_terms(
    invitation: bytes, hospital: Hospital, *, run: str, round: int, purpose: str, has_roster: bool
) -> RoundBinding:
    """The round's binding, as far as it can be judged before any image is looked at.

    Raises Refusal for another run, round or purpose, for another run config than the one that this
    hospital was told (whatever key it is: one told otherwise than the others would be alone with
    its vector, or with its noise), for other parameters than the config's and weaker ones than the
    policy's, and where the policy asks for a roster and there is none.
    """
    binding = RoundBinding.from_bytes(invitation)
    if (binding.run, binding.round, binding.purpose) != (run, round, purpose):
        raise _refuse("invitation", "The invitation is of another run, round or purpose")
    if binding.terms.config != config_digest(hospital.config):
        raise _refuse(
            "config", "The run config that this hospital was told is not the one of the round"
        )
    try:
        expected = params_for(hospital.config, binding.params.max_cohort)
    except ConfigError as error:
        raise Refusal("secagg-parameters", error.what, error.remedy) from None
    if binding.params != expected:
        raise _refuse("parameters", "The parameters are not those of the run config")
    hospital.policy.secagg.check(binding.params, binding.layout)
    if hospital.policy.secagg.require_roster and not has_roster:
        raise _refuse("roster", "This hospital's policy asks for a signed roster, and it has none")
    return binding


def check_vector(
    binding: RoundBinding,
    hospital: Hospital,
    *,
    length: int,
    model_hash: bytes,
    terms: RoundTerms,
    grid: float = 0.0,
) -> None:
    """Whether the round's model, layout and noise are what this hospital works with.

    Called before training: an hour's work must not end in a refusal that was foreseeable. Raises
    Refusal for another model than the one that was received (``model_hash``), another layout or
    noise than the run config gives, and for a model from which this hospital has masked a vector
    within this Flower run (the difference of two sums would show it), unless a later round of the
    same run starts from the same model again because one has failed. Over whom it may be summed
    then, and in another Flower run, :mod:`client_app.agreements` decides.
    """
    if binding.model_hash != model_hash:
        raise _refuse("model", "The model that was received is not the one that the round names")
    if binding.layout != layout_for(binding.purpose, length, hospital.config, grid=grid):
        raise _refuse("layout", "The vector's layout is not the one of the run config")
    if not binding.terms.agree(terms):
        raise _refuse("noise", "The round's noise is not the one that this hospital counts on")
    before = Once(hospital).masked().get(_what(binding.purpose, binding.model_hash))
    if before is not None and (before[0] != binding.run or before[1] >= binding.round):
        raise _refuse("repeated", "This hospital has taken part in a sum from this model already")


def advertise(
    context: Context,
    hospital: Hospital,
    binding: RoundBinding,
    values: Mapping[str, np.ndarray],
    *,
    weight: int,
    model_hash: bytes,
    subjects: Sequence[str],
    base: str = "",
) -> bytes:
    """Encode the round's vector, keep it at the node, and return the signed keys.

    ``values``: an array for each segment but the weight. Values beyond their range are clipped;
    how many is this hospital's own business and goes to its own log. ``subjects``: what of the
    vector may come again, and then over which hospitals only (:mod:`client_app.agreements`).
    ``base``: the id of a base whose sums must all be over the same hospitals
    (:mod:`client_app.cohorts`).
    """
    wipe(context)
    with one_code():  # what does not fit, does not because of the data
        weight = min(max(weight, 1), binding.layout.max_weight)
        encoded = encode(binding.layout, binding.params, values, weight=weight)
    for segment, count in encoded.clipped.items():
        if count:
            log.warning(
                "round %d: %d values of '%s' were clipped to their range (raise update-range if "
                "this is often)",
                binding.round,
                count,
                segment,
            )
    machine, message = HospitalRound.advertise(
        hospital.name,
        binding,
        identity=identity_of(context),
        policy=hospital.policy.secagg,
        model_hash=model_hash,
    )
    vector = encoded.vector
    # As raw bytes: Flower's numpy form would copy a large vector twice.
    stored = Array(str(vector.dtype), vector.shape, RAW, vector.tobytes())
    context.state[_INPUT] = ArrayRecord({"vector": stored})
    _store(context, machine, binding, _Kept(Once(hospital).begin(), base, tuple(subjects)))
    return message


def round_at_hand(context: Context) -> RoundBinding | None:
    """What the round at this node is about; None if there is none."""
    record = entry(context.state, _STATE, ConfigRecord)
    if record is None:
        return None
    return RoundBinding.from_bytes(bytes(record["binding"]))  # type: ignore[arg-type]


def answer(stage: str, message: bytes, context: Context, hospital: Hospital) -> bytes:
    """One of the stages after training: ``share``, ``masked``, ``consistency``, ``unmask``.

    Refuses when this node holds no round (it was restarted, or the round was wiped) and
    whatever the protocol refuses; the round is wiped then.
    """
    record = entry(context.state, _STATE, ConfigRecord)
    if record is None:
        raise _refuse("no-round", "This node is in no round: it was restarted, or has aborted")
    machine = HospitalRound.from_bytes(bytes(record["machine"]))  # type: ignore[arg-type]
    binding = RoundBinding.from_bytes(bytes(record["binding"]))  # type: ignore[arg-type]
    kept = _Kept.of(record)
    try:
        Once(hospital).take(kept.token, stage)
        reply = _stage(stage, machine, message, binding, context, hospital)
        if stage == CONSISTENCY:
            # The reply is a signature under these survivors: it leaves only after they are noted.
            if kept.base:
                cohorts = Cohorts(hospital, binding.run, kept.base)
                cohorts.agree(binding.model_hash, machine.survivors)
            agreements = Agreements(hospital)
            for subject in kept.subjects:
                agreements.sign(subject, machine.survivors, binding.params.min_cohort)
    except BaseException:
        machine.wipe()
        wipe(context)
        raise
    if stage == UNMASK:
        wipe(context)
    else:
        _store(context, machine, binding, kept)
    return reply


def _stage(
    stage: str,
    machine: HospitalRound,
    message: bytes,
    binding: RoundBinding,
    context: Context,
    hospital: Hospital,
) -> bytes:
    if stage == SHARE:
        peers = peers_of(context, hospital.policy)
        reply = machine.share(
            message,
            identity=identity_of(context),
            policy=hospital.policy.secagg,
            roster=peers.roster if peers else None,
            accepted=peers.accepted if peers else (),
        )
        if not machine.authenticated and binding.run not in _WARNED:
            _WARNED.add(binding.run)
            log.warning(
                "run %s is unauthenticated: without a roster the server could stand between "
                "the hospitals",
                binding.run,
            )
        return reply
    if stage == MASKED:
        Once(hospital).mark_masked(binding)  # before anything leaves
        kept = _known(entry(context.state, _INPUT, ArrayRecord))["vector"]
        vector = np.frombuffer(bytearray(kept.data), dtype=kept.dtype)  # a copy, to be masked
        del context.state[_INPUT]
        return machine.masked_input(message, vector)
    if stage == CONSISTENCY:
        now = peers_of(context, hospital.policy)  # read again: a revocation does not wait
        return machine.consistency(
            message,
            identity=identity_of(context),
            policy=hospital.policy.secagg,
            accepted=now.accepted if now else (),
        )
    if stage == UNMASK:
        return machine.unmask(message)
    raise _refuse("stage", "There is no such stage")


@dataclass(frozen=True)
class _Kept:
    """What the node keeps of a round beside the protocol's own state."""

    token: str
    base: str
    subjects: tuple[str, ...]

    @classmethod
    def of(cls, record: ConfigRecord) -> _Kept:
        """As :func:`_store` wrote it."""
        subjects = str(record["subjects"]).split("\n") if record["subjects"] else ()
        return cls(str(record["token"]), str(record["base"]), tuple(subjects))


def _store(context: Context, machine: HospitalRound, binding: RoundBinding, kept: _Kept) -> None:
    context.state[_STATE] = ConfigRecord(
        {
            "machine": machine.to_bytes(),
            "binding": binding.to_bytes(),
            "token": kept.token,
            "base": kept.base,
            "subjects": "\n".join(kept.subjects),
        }
    )


def _known(vector: ArrayRecord | None) -> ArrayRecord:
    if vector is None:
        raise _refuse("no-vector", "This node holds no vector for the round")
    return vector


def _refuse(code: str, what: str) -> Refusal:
    return Refusal(
        f"secagg-{code}", f"{what}.", "Start a new round; if it comes again, treat it as hostile."
    )
