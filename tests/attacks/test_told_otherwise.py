"""A server that tells one hospital another run config than the others: nothing of it opens.

Before a round bound the whole config: with ``learning-rate=1e-30`` told to all others, the sum was
one hospital's own update (cosine 0.9999998); with a laxer ε told to all others, the sum held less
noise than that hospital's ledger counted on.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from client_app.agreements import Agreements
from client_app.hospital import Hospital
from common.aggregation import TRAIN, VALIDATE
from common.config import BY_NAME, KEYS, Key, RunConfig, config_digest
from common.errors import ConfigError
from common.messages import Job
from common.secagg import RoundBinding, RoundTerms
from tests.attacks.federation import SMALL, Federation, codes


def other_value(key: Key, now: Any) -> Any:
    """A value of ``key`` that is not ``now``, and is in its range."""
    if key.kind == "bool":
        return not now
    if key.choices:
        return next(c for c in key.choices if c != now)
    if key.kind == "str":
        return "other"
    for candidate in (now + 1, now / 2, now - 1, now + 0.5):
        value = int(candidate) if key.kind == "int" else float(candidate)
        try:
            if value != now:
                key.check(value)
                return value
        except ConfigError:
            continue
    raise AssertionError(f"no other value for {key.name}")


def test_a_hospital_that_was_told_another_value_of_any_key_takes_no_part() -> None:
    federation = Federation.of(4)
    weights, before = federation.weights(), dict(federation.grid.contexts[0].run_config)
    job = Job("run-1", 1, federation.spec.digest(), weights)
    refused: dict[str, str | None] = {}
    for key in KEYS:
        federation.tell(0, **{key.name: other_value(key, before[key.name])})
        for purpose in (TRAIN, VALIDATE):
            invited = replace(job, invitation=federation.invitation(weights, purpose))
            refused[f"{key.name} {purpose}"] = federation.ask(0, purpose, invited)
        federation.tell(0, **{key.name: before[key.name]})
    assert {
        key for key, code in refused.items() if code not in ("secagg-config", "config")
    } == set()
    # Most are good configs, of another run: it is the binding that tells them apart.
    assert sum(code == "secagg-config" for code in refused.values()) > 100
    # And none of it has cost the hospital its own round.
    good = replace(job, invitation=federation.invitation(weights, VALIDATE))
    assert federation.ask(0, VALIDATE, good) is None


@pytest.mark.parametrize("key", KEYS, ids=lambda key: key.name)
def test_every_key_is_in_the_digest(key: Key) -> None:
    values = SMALL | {key.name: other_value(key, SMALL[key.name])}
    try:
        other = RunConfig.parse(values)
    except ConfigError:  # needs others beside it: changed in the parsed config instead
        other = replace(
            RunConfig.parse(SMALL), **{key.attribute: other_value(key, SMALL[key.name])}
        )
    assert config_digest(other) != config_digest(RunConfig.parse(SMALL))


@pytest.mark.parametrize("liars", [(0,), (1, 2, 3, 4)])
def test_a_server_that_silences_all_others_by_their_learning_rate_opens_nothing(
    liars: tuple[int, ...],
) -> None:
    federation = Federation.of(5)
    for hospital in liars:
        federation.tell(hospital, learning_rate=1e-30)
    outcome = federation.round(federation.weights())
    assert codes(outcome) == {"secagg-config"}
    assert {a.hospital for a in outcome.absent if "secagg-config" in a.reason} == {
        f"hospital-0{i}" for i in liars
    }
    if len(liars) == 4:
        assert outcome.mean_update is None


SHARED = {
    "privacy": "distributed", "epsilon": 1.0, "delta": 1e-4, "rounds": 3, "sampling-rate": 0.5,
    "tolerated-colluders": 1,
}  # fmt: skip


def test_a_server_that_tells_the_others_a_laxer_epsilon_opens_nothing() -> None:
    """The victim's ledger counts on noise that the others would not have added."""
    lax = "shared-noise = true\ntotal-epsilon = 8.0\nrun-epsilon = 8.0"
    federation = Federation.of(5, SHARED, privacy=lax)
    for hospital in range(1, 5):
        federation.tell(hospital, epsilon=8.0)
    outcome = federation.round(federation.weights())
    assert outcome.total is None
    assert codes(outcome) == {"secagg-config"}


@pytest.mark.parametrize(
    ("term", "value"),
    [("noise_multiplier", 0.9), ("clipping_norm", 0.5), ("sampling_rate", 0.1)],
)
def test_a_round_with_other_noise_than_the_hospitals_plan_is_refused(
    term: str, value: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where a server computes other noise from the same config."""
    from server_app import secure_round as transport

    original = transport.terms_for

    def other(*args: Any, **kwargs: Any) -> RoundTerms:
        terms = original(*args, **kwargs)
        return replace(terms, **{term: getattr(terms, term) * value})

    monkeypatch.setattr(transport, "terms_for", other)
    federation = Federation.of(4, SHARED | {"num-shares": 4}, privacy="shared-noise = true")
    outcome = federation.round(federation.weights())
    assert codes(outcome) == {"secagg-noise"}
    assert outcome.total is None


def test_terms_agree_to_the_last_digits_of_another_library_and_no_further() -> None:
    own = RoundTerms(config=bytes(32), noise_multiplier=1.5, clipping_norm=7.0, sampling_rate=0.2)
    assert replace(own, noise_multiplier=1.5 * (1 + 1e-12)).agree(own)
    assert not replace(own, noise_multiplier=1.5 * (1 - 1e-5)).agree(own)
    assert not replace(own, clipping_norm=7.0 * (1 + 1e-12)).agree(own)
    assert not replace(own, config=bytes(31) + b"\1").agree(own)


def test_a_run_s_config_cannot_change_once_a_hospital_takes_part() -> None:
    federation = Federation.of(4)
    weights = federation.weights()
    assert len(federation.round(weights).contributed) == 4
    again = federation.another_flower_run()
    for hospital in range(4):
        again.tell(hospital, learning_rate=0.5)
    again.config = RunConfig.parse(again.grid.contexts[0].run_config)
    changed = again.round(weights, number=2)
    assert codes(changed) == {"config-changed"}
    assert changed.contributed == []
    for hospital in range(4):  # what a resumed run may change, it may
        again.tell(hospital, learning_rate=0.0, round_timeout=77.0, resume="run-1")
    again.config = RunConfig.parse(again.grid.contexts[0].run_config)
    assert len(again.round(weights, number=2).contributed) == 4


def test_a_policy_bounds_the_new_runs_of_a_day() -> None:
    federation = Federation.of(4)
    agreements = Agreements(Hospital.from_context(federation.grid.contexts[0]))
    for number in range(3):
        agreements.admit(f"run-{number}", bytes(32), 3)
    agreements.admit("run-1", bytes(32), 3)  # a known one goes on
    with pytest.raises(Exception, match="3 new runs within a day"):
        agreements.admit("run-3", bytes(32), 3)


def test_an_invitation_of_the_former_form_is_refused_with_what_to_do() -> None:
    federation = Federation.of(4)
    weights = federation.weights()
    import msgpack

    fields = msgpack.unpackb(federation.invitation(weights, VALIDATE))
    former = msgpack.packb([1, *fields[1:-1]], use_bin_type=True)
    with pytest.raises(Exception, match="version 2"):
        RoundBinding.from_bytes(former)
    job = Job("run-1", 1, federation.spec.digest(), weights, former)
    assert federation.ask(0, VALIDATE, job) == "secagg-version"


def test_the_table_of_keys_is_what_the_digest_is_made_of() -> None:
    assert set(RunConfig.parse(SMALL).as_dict()) == set(BY_NAME)
