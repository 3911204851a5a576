"""What a hospital's privacy ledger says, as one JSON document: ``consilium ledger show --json``.

Its fields are stable; an infinite number is the string ``"inf"``, so that it is valid JSON; what
does not apply is null.

- ``format`` ``consilium-ledger``, ``version`` 1, ``time`` (UTC) of the reading, ``run``: the run
  that was asked for, else null.
- ``ledger``: ``path``, ``hospital`` (name; empty for a ledger in a hospital's own home), ``id``,
  ``entries`` (how many), ``head`` (hash of the last), ``head_noted`` (whether the head's file lies
  beside it), ``other_ledgers`` (the same hospital's others, relative to its home; they are not
  counted here).
- ``policy``: ``path`` (null: no policy, no limit) and the limits in force: ``total_epsilon``,
  ``total_delta`` (the δ of every figure under ``data_sets``; without a policy the smallest that a
  run of the ledger promises), ``run_epsilon``, ``min_noise_multiplier``, ``min_clipping_norm``,
  ``allow_non_private``, ``shared_noise``, ``unit``, ``metrics``, ``hold_days``.
- ``data_sets``, in the order in which they came, for all runs of the ledger: ``data_set``
  (fingerprint), ``images``, ``largest_patient`` (most images of one patient; 1: none is known),
  ``since``, ``overlaps`` (list of ``data_set``, ``images``: how many images an earlier data set
  has in common with it), ``unit`` and ``delta`` of the figures, ``spent`` and ``spent_and_held``
  (``epsilon`` of the worst-off image or patient, ``accountant``, ``runs``), ``held_epsilon`` (their
  difference; null where ε is infinite already), ``left_epsilon`` (of the policy's total),
  ``over`` (whether spent and held exceed the total: the policy was lowered).
- ``runs``, in order of appearance (only ``run`` where one was asked for): ``run``, ``data_sets``,
  ``unit``, ``state`` (``active``, ``complete``: every planned round is used, ``closed``,
  ``hold expired``: it may go on only if its rest still fits, ``not private``), ``promise``
  (``epsilon``, ``delta``, ``clipping_norm``, ``rounds``, ``local_epochs``, ``batch_size``; for
  rounds of server steps ``sampling_rate``, ``min_cohort``, ``colluders``, ``whitening``, else 0, 1,
  0, false),
  ``mechanism`` (``noise_multiplier``, ``sampling_rate``, ``steps_per_round``, ``train_count``,
  ``validation_noise_multiplier``, ``count_epsilon``), both null for a run that was not private;
  ``rounds_used``, ``rounds_planned``, ``validations_used``, ``validations_planned``, ``spent``
  (``epsilon``, ``prv``, ``pld``, ``accountant``, ``agree``: whether the two do to 2 %; at the
  promise's δ), ``last`` (time of the last entry), ``hold_until`` (null: holds nothing),
  ``unsettled`` (list of ``seq``, ``round``, ``mechanism``: reserved and counted, the result not
  noted as kept: a crash, or a round at work at this moment).
- ``entries``, only if asked for: every field of :class:`~common.privacy.ledger.Entry`, as it is
  hashed.
"""

from __future__ import annotations

import json
import math
from dataclasses import asdict, replace
from datetime import UTC, datetime, timedelta
from typing import Any

from common.privacy.ledger import DataSet, Ledger, RunState, Spending, data_sets
from common.privacy.ledger.runs import state_of
from common.privacy.limits import PATIENT, PrivacyLimits
from deploy.ledger.choice import Place, Policy

Document = dict[str, Any]

_MECHANISM = (
    "noise_multiplier", "sampling_rate", "steps_per_round", "train_count",
    "validation_noise_multiplier", "count_epsilon",
)  # fmt: skip


def describe(
    ledger: Ledger,
    place: Place,
    policy: Policy,
    now: datetime,
    *,
    run: str | None = None,
    entries: bool = False,
) -> Document:
    """The document that the module's text describes; all of it read at one moment.

    ``run``: only this one's row and entries; the data sets' figures are of all runs.
    """
    with ledger.chain.snapshot():
        everything = ledger.chain.entries()
        since = {e.dataset: e.time for e in everything if e.kind == "dataset"}
        limits = limits_of(ledger, policy)
        number, head = ledger.chain.head()
        document = {
            "format": "consilium-ledger",
            "version": 1,
            "time": iso(now),
            "run": run,
            "ledger": {
                "path": str(place.path),
                "hospital": place.hospital,
                "id": ledger.chain.meta("id").decode(),
                "entries": number,
                "head": head,
                "head_noted": place.path.with_suffix(".head").exists(),
                "other_ledgers": list(place.others),
            },
            "policy": {
                "path": None if policy.path is None else str(policy.path),
                **limits.as_dict(),
            },
            "data_sets": [
                _data_set(ledger, data, since[data.fingerprint], limits)
                for data in data_sets(ledger.chain)
            ],
            "runs": [
                _run(ledger, name, limits, now) for name in ledger.runs() if run in (None, name)
            ],
        }
    if entries:
        document["entries"] = [e.content() for e in everything if run in (None, e.run)]
    return dict(json_ready(document))


def limits_of(ledger: Ledger, policy: Policy) -> PrivacyLimits:
    """The policy's limits; without one none, at the smallest δ that a run promises.

    Then the unit is ``patient`` only where every run promises it.
    """
    if policy.limits is not None:
        return policy.limits
    states = [state for state in map(ledger.state, ledger.runs()) if state is not None]
    promises = [state.plan.promise for state in states]
    none = PrivacyLimits.none()
    return replace(
        none,
        total_delta=min((p.delta for p in promises), default=PrivacyLimits.total_delta),
        unit=PATIENT if promises and all(p.unit == PATIENT for p in promises) else none.unit,
    )


def _data_set(ledger: Ledger, data: DataSet, since: str, limits: PrivacyLimits) -> Document:
    spent = ledger.total(data.fingerprint, limits)
    both = ledger.total(data.fingerprint, limits, held=True)
    infinite = math.isinf(spent.epsilon)  # then nobody can tell what is held: ∞ - ∞
    return {
        "data_set": data.fingerprint,
        "images": data.images,
        "largest_patient": data.largest_patient,
        "since": since,
        "overlaps": [{"data_set": k, "images": n} for k, n in data.overlaps.items()],
        "unit": limits.unit,
        "delta": limits.total_delta,
        "spent": _spending(spent),
        "spent_and_held": _spending(both),
        "held_epsilon": None if infinite else max(0.0, both.epsilon - spent.epsilon),
        "left_epsilon": left(both, limits),
        "over": both.epsilon > limits.total_epsilon,
    }


def left(spent_and_held: Spending, limits: PrivacyLimits) -> float:
    """What is left of the policy's total ε; infinite where there is no limit."""
    if math.isinf(limits.total_epsilon):
        return math.inf
    return max(0.0, limits.total_epsilon - spent_and_held.epsilon)


def _spending(spending: Spending) -> Document:
    return {
        "epsilon": spending.epsilon,
        "accountant": spending.accountant,
        "runs": list(spending.runs),
    }


def _run(ledger: Ledger, run: str, limits: PrivacyLimits, now: datetime) -> Document:
    entries = ledger.chain.entries(run=run)
    state = state_of(entries)
    spent = ledger.spent_by_run(run)
    settled = {e.refers for e in entries if e.kind == "settle"}
    document: Document = {
        "run": run,
        "data_sets": list(dict.fromkeys(e.dataset for e in entries)),
        "unit": entries[0].unit,
        "state": "not private",
        "promise": None,
        "mechanism": None,
        "rounds_used": None,
        "rounds_planned": None,
        "validations_used": None,
        "validations_planned": None,
        "spent": {
            "epsilon": spent.value,
            "prv": spent.prv,
            "pld": spent.pld,
            "accountant": "none" if spent.value in (0.0, math.inf) else spent.accountant,
            "agree": spent.prv == spent.pld or spent.agree,  # ∞ - ∞ is no number
        },
        "last": entries[-1].time,
        "hold_until": None,
        "unsettled": [
            {"seq": e.seq, "round": e.round, "mechanism": e.mechanism}
            for e in entries
            if e.kind == "reserve" and e.round is not None and e.seq not in settled
        ],
    }
    return document if state is None else document | _planned(state, limits, now)


def _planned(state: RunState, limits: PrivacyLimits, now: datetime) -> Document:
    plan = asdict(state.plan)
    promise = dict(plan["promise"])
    holds = state.holds(limits, now) and any(u.event and u.event.steps for u in state.rest())
    return {
        "unit": promise.pop("unit"),
        "state": _state(state, limits, now),
        "promise": promise,
        "mechanism": {name: plan[name] for name in _MECHANISM},
        "rounds_used": state.rounds,
        "rounds_planned": promise["rounds"],
        "validations_used": state.validations,
        "validations_planned": plan["validations"],
        "hold_until": iso(state.last + timedelta(days=limits.hold_days)) if holds else None,
    }


def _state(state: RunState, limits: PrivacyLimits, now: datetime) -> str:
    if state.closed:
        return "closed"
    if state.rounds >= state.plan.promise.rounds:
        return "complete"
    return "active" if state.holds(limits, now) else "hold expired"


def json_ready(value: Any) -> Any:
    """``value`` with infinite numbers as ``"inf"``."""
    if isinstance(value, dict):
        return {name: json_ready(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [json_ready(item) for item in value]
    return "inf" if value == math.inf else value


def as_json(document: Document) -> str:
    """Indented JSON, in which an infinite number would be an error."""
    return json.dumps(document, indent=2, ensure_ascii=False, allow_nan=False)


def iso(time: datetime) -> str:
    """UTC, to the millisecond, as the ledger's own entries have it."""
    return time.astimezone(UTC).isoformat(timespec="milliseconds")
