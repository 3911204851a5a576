"""The hospital's transport of secure aggregation: messages in, messages out, state at the node.

Between two stages a round's secrets lie in Flower's ``Context.state``, which stays on the
hospital's node. They are stored before the answer leaves, wiped at the end of the round, after
any error, and when another round begins. The protocol itself is :mod:`common.secagg`.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping

import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, Context

from client_app.hospital import Hospital
from client_app.identity import identity_of, roster_of
from common.aggregation import layout_for, params_for
from common.errors import ConfigError
from common.files import read_json, write_json
from common.secagg import HospitalRound, Refusal, RoundBinding, encode

log = logging.getLogger("consilium.hospital")

_STATE = "secagg-state"
_INPUT = "secagg-input"
_WARNED: set[str] = set()
"""Runs for which this process has said that they are unauthenticated."""


def wipe(context: Context) -> None:
    """Forget the round at hand: keys, shares, and the vector that was to be masked."""
    for name in (_STATE, _INPUT):
        if name in context.state:
            del context.state[name]


def check_invitation(
    invitation: bytes, hospital: Hospital, *, run: str, round: int, purpose: str, length: int
) -> RoundBinding:
    """The round's binding, if it is the one that the hospital's own run config gives.

    Called before training: an hour's work must not end in a refusal that was foreseeable.
    Raises Refusal for another run, round, purpose or layout, for parameters weaker than the
    hospital's policy, and for a round in which this hospital has masked a vector already
    (the difference of two sums would show its input).
    """
    binding = RoundBinding.from_bytes(invitation)
    if (binding.run, binding.round, binding.purpose) != (run, round, purpose):
        raise _refuse("invitation", "The invitation is of another run, round or purpose")
    if binding.layout != layout_for(purpose, length, hospital.config):
        raise _refuse("layout", "The vector's layout is not the one of the run config")
    try:
        expected = params_for(hospital.config, binding.params.max_cohort)
    except ConfigError as error:
        raise Refusal("secagg-parameters", error.what, error.remedy) from None
    if binding.params != expected:
        raise _refuse("parameters", "The parameters are not those of the run config")
    hospital.policy.secagg.check(binding.params, binding.layout)
    if _last_masked(hospital, run).get(purpose, -1) >= round:
        raise _refuse("repeated", "This hospital has taken part in this round's sum already")
    return binding


def advertise(
    context: Context,
    hospital: Hospital,
    binding: RoundBinding,
    values: Mapping[str, np.ndarray],
    *,
    weight: int,
    model_hash: bytes,
) -> bytes:
    """Encode the round's vector, keep it at the node, and return the signed keys.

    ``values``: an array for each segment but the weight. Values beyond their range are clipped;
    how many is this hospital's own business and goes to its own log.
    """
    wipe(context)
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
    context.state[_INPUT] = ArrayRecord({"vector": Array(encoded.vector)})
    _store(context, machine, binding)
    return message


def answer(stage: str, message: bytes, context: Context, hospital: Hospital) -> bytes:
    """One of the stages after training: ``share``, ``masked``, ``consistency``, ``unmask``.

    Refuses when this node holds no round (it was restarted, or the round was wiped) and
    whatever the protocol refuses; the round is wiped then.
    """
    record = context.state.config_records.get(_STATE)
    if record is None:
        raise _refuse("no-round", "This node is in no round: it was restarted, or has aborted")
    machine = HospitalRound.from_bytes(bytes(record["machine"]))  # type: ignore[arg-type]
    binding = RoundBinding.from_bytes(bytes(record["binding"]))  # type: ignore[arg-type]
    try:
        reply = _stage(stage, machine, message, binding, context, hospital)
    except BaseException:
        machine.wipe()
        wipe(context)
        raise
    if stage == "unmask":
        wipe(context)
    else:
        _store(context, machine, binding)
    return reply


def _stage(
    stage: str,
    machine: HospitalRound,
    message: bytes,
    binding: RoundBinding,
    context: Context,
    hospital: Hospital,
) -> bytes:
    if stage == "share":
        reply = machine.share(
            message,
            identity=identity_of(context),
            policy=hospital.policy.secagg,
            roster=roster_of(context),
        )
        if not machine.authenticated and binding.run not in _WARNED:
            _WARNED.add(binding.run)
            log.warning(
                "run %s is unauthenticated: without a roster the server could stand between "
                "the hospitals",
                binding.run,
            )
        return reply
    if stage == "masked":
        # Written before anything leaves: whatever happens next, this round is never masked again.
        masked = _last_masked(hospital, binding.run) | {binding.purpose: binding.round}
        write_json(hospital.run_directory(binding.run) / "masked.json", masked, mode=0o600)
        vector = context.state.array_records[_INPUT]["vector"].numpy()
        del context.state[_INPUT]
        return machine.masked_input(message, vector)
    if stage == "consistency":
        return machine.consistency(message, identity=identity_of(context))
    if stage == "unmask":
        return machine.unmask(message)
    raise _refuse("stage", "There is no such stage")


def _store(context: Context, machine: HospitalRound, binding: RoundBinding) -> None:
    context.state[_STATE] = ConfigRecord(
        {"machine": machine.to_bytes(), "binding": binding.to_bytes()}
    )


def _last_masked(hospital: Hospital, run: str) -> dict[str, int]:
    """Purpose → the last round whose vector left this hospital, masked."""
    path = hospital.run_directory(run) / "masked.json"
    return dict(read_json(path)) if path.exists() else {}


def _refuse(code: str, what: str) -> Refusal:
    return Refusal(
        f"secagg-{code}", f"{what}.", "Start a new round; if it comes again, treat it as hostile."
    )
