"""Every kept file of every version opens with the content that was written into it.

Where a form is canonical (signed, hashed or compared by others) it is written again byte for byte.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from client_app import egress
from client_app.hospital_file import HospitalFile
from client_app.outbox import Outbox
from client_app.policy import HospitalPolicy
from common.config import RunConfig
from common.federation_file import FederationFile, read_key
from common.privacy.ledger import Ledger, check_members, data_sets
from common.privacy.limits import PrivacyLimits
from common.roster import load_roster
from common.secagg import Roster
from common.vectors import Base, Rule, SignedVector, Withdrawal
from deploy.ledger.export import verify_export
from deploy.provision import members
from deploy.provision.federation import FederationFolder
from deploy.provision.kit import Kit
from deploy.provision.requests import Request
from server_app.registry import Registry
from server_app.run_store import RunStore
from server_app.vectors.base import read_base
from server_app.vectors.manifest import Manifest
from tests.golden import files, ledger_lines
from tests.golden.fixed import FOLDER, MOMENT, identity, node_key
from tests.golden.make import FORMATS
from tests.golden.records import BASE, FIXED, RUN, SERIALS, UPDATE, WEIGHTS, binding


def of(name: str) -> Path:
    """The first version's folder; later ones are opened by tests of their own."""
    return FOLDER / name / "1"


def copied(name: str, target: Path) -> Path:
    """A copy, for what is opened to be written."""
    return Path(shutil.copytree(of(name), target / name))


def equal(found: Any, expected: Any) -> bool:
    return set(found) == set(expected) and all(
        np.array_equal(found[k], expected[k]) and found[k].dtype == expected[k].dtype
        for k in expected
    )


def test_there_is_a_folder_of_every_format_and_no_other() -> None:
    folders = {p.name for p in FOLDER.iterdir() if p.is_dir() and not p.name.startswith("__")}
    assert folders == set(FORMATS)


@pytest.mark.parametrize("name", ["1-first", "1"])
def test_ledgers(name: str, tmp_path: Path) -> None:
    shutil.copytree(FOLDER / "ledger" / name, tmp_path, dirs_exist_ok=True)
    with Ledger(tmp_path / "ledger.sqlite", create=False) as ledger:
        assert ledger.chain.verify() == 19
        assert ledger.chain.meta("salt") == ledger_lines.SALT
        check_members(ledger.chain)
        assert [d.images for d in data_sets(ledger.chain)] == [10, 9, 3]
        state = ledger.state("run-a")
        assert state is not None and state.closed and state.plan == ledger_lines.plan()
        assert (state.rounds, state.validations) == (2, 1)
        assert [round(ledger.spent_by_run(run).value, 3) for run in ("run-a", "run-b")] == (
            [0.569, 0.569]
        )
        assert ledger.spent_by_run("run-c").value == float("inf")
        both = ledger.total(data_sets(ledger.chain)[0].fingerprint, ledger_lines.LIMITS)
        assert both.runs == ("run-a", "run-b")
        # It goes on: the reservation that was not settled is handed out again.
        kinds = [(e.kind, e.round) for e in ledger.chain.entries(run="run-b")]
        again = ledger.reserve_round("run-b", 2, "n" * 64)
        assert (again.kind, again.round, again.seq) == ("reserve", 2, 16)
        assert [(e.kind, e.round) for e in ledger.chain.entries(run="run-b")] == kinds


def test_exports_of_ledgers() -> None:
    name, entries = verify_export(of("ledger-export") / "ledger.json")
    assert name == ledger_lines.ID
    assert [e.seq for e in entries] == list(range(1, 20))


def test_bases() -> None:
    data = (of("base") / "base.safetensors").read_bytes()
    found = Base.from_bytes(data)
    assert found.id == BASE and equal(found.weights, WEIGHTS)
    assert found.to_bytes() == data
    base, note = read_base(of("base-note") / "base.safetensors")
    assert (note.run, note.version, dict(note.config)) == (RUN, 0, {"local-epochs": 2})
    assert equal(base.weights, WEIGHTS)


def test_vectors_and_withdrawals() -> None:
    data = (of("vector") / "vector.safetensors").read_bytes()
    found = SignedVector.from_bytes(data)
    found.verify(identity("st-mary").public)
    assert (found.vector.hospital, found.vector.epsilon, found.vector.bucket) == (
        "st-mary", 2.5, 16,
    )  # fmt: skip
    assert equal(found.vector.values, UPDATE) and found.to_bytes() == data
    data = (of("withdrawal") / "withdrawal.json").read_bytes()
    taken = Withdrawal.from_bytes(data)
    taken.verify(identity("st-mary").public)
    assert taken.serial == SERIALS[0] and taken.to_bytes() == data


def test_outboxes(tmp_path: Path) -> None:
    outbox = Outbox(copied("outbox", tmp_path))
    found = {item.serial: item for item in outbox.items()}
    assert [found[s].state for s in SERIALS] == (
        ["sent", "refused: vector-stale", "withdrawal waits"]
    )
    assert outbox.hand_over(found[SERIALS[0]], RUN) == files.vector().to_bytes()
    (waiting,) = outbox.withdrawals(RUN)
    assert Withdrawal.from_bytes(waiting).serial == SERIALS[2]


def test_registries_of_bases(tmp_path: Path) -> None:
    with Registry(copied("registry", tmp_path), create=False) as registry:
        log = registry.log()
        assert [row.version for row in log.line] == [0, 1]
        states = {e.row.serial[0]: e.state for e in registry.vectors()}
        assert states == {"1": "accepted", "2": "accepted", "3": "excluded", "4": "withdrawn"}
        assert registry.base(0).id == BASE
        merged = registry.base(1)
        assert merged.parent == BASE and merged.id == log.line[1].id
        # Made again from its vectors it is the same, to the last bit.
        again = registry.candidate(Rule())
        assert equal(again.base.weights, merged.weights)


def test_manifests_of_ensembles() -> None:
    path = of("ensemble") / "ensemble.json"
    found = Manifest.read(path)
    assert [m.serial for m in found.members] == list(SERIALS)
    assert found.to_json() == path.read_text()


def test_keys_that_were_seen_first(tmp_path: Path) -> None:
    from common.errors import ProtocolError
    from server_app.vectors.keys import Keys

    keys = Keys(None, copied("identities", tmp_path) / "identities.json")
    own, other = identity("st-mary").public, identity("st-paul").public
    assert keys.of("st-mary", "st-mary", own) == {"st-mary": own}
    with pytest.raises(ProtocolError, match="another identity key"):
        keys.of("st-mary", "st-mary", other)


def test_what_a_server_notes_of_comparisons(tmp_path: Path) -> None:
    judge = files._judge(copied("judging", tmp_path) / "judging.json")
    assert judge._round == 4
    kept = judge._bases[BASE]
    assert kept.hospitals == list(files.HOSPITALS) and kept.tried == ["d" * 64]
    assert judge.refusals(BASE) == 1  # it gained 3 images and lost 30


def test_federations_rosters_and_kits() -> None:
    folder = FederationFolder(of("federation"))
    settings = folder.load()
    assert (settings.name, settings.address, settings.classes) == (
        "blood", "localhost:9092", files.CLASSES,
    )  # fmt: skip
    coordinator = identity("coordinator").public
    assert folder.public_key() == coordinator
    assert [m.name for m in members.members(folder)] == ["st-anne", "st-mary"]
    assert [gone.name for gone in members.revocations(folder)] == ["st-paul"]
    data = folder.roster.read_bytes()
    roster = Roster.load(data, coordinator)
    assert roster.identities("2026-06-01") == {
        name: identity(name).public for name in ("st-anne", "st-mary")
    }
    assert roster.sign(identity("coordinator")) == data
    told = FederationFile.load(folder.description.read_bytes(), coordinator)
    assert told.sign(identity("coordinator")) == folder.description.read_bytes()
    assert told.description == settings.description()
    kit = Kit.read(folder.kits / "st-mary")
    assert kit.verify(coordinator, MOMENT) == (told, roster)
    assert read_key(folder.coordinator) == coordinator
    key = folder.coordinator.read_text().strip()
    assert set(load_roster(folder.roster, key)) == {"st-anne", "st-mary"}


def test_what_a_hospital_edits_and_sends() -> None:
    folder = of("hospital")
    assert HospitalFile.load(folder / "hospital.toml").name == "st-mary"
    policy = HospitalPolicy.load(folder / "policy.toml")
    # What a limit was when the file was written it is today.
    assert policy.secagg_required
    assert (policy.secagg.min_cohort, policy.secagg.min_threshold) == (4, 4)
    assert policy.secagg.require_roster
    limits = policy.privacy
    assert (limits.total_epsilon, limits.total_delta, limits.run_epsilon) == (8.0, 2e-4, 8.0)
    assert not limits.allow_non_private and not limits.shared_noise
    assert (limits.unit, limits.metrics, limits.hold_days) == ("image", "noised", 7.0)
    assert policy.vectors.send == "never" and not policy.vectors.evaluate
    data = (folder / "request.json").read_bytes()
    request = Request.parse(data)
    assert request.identity == identity("st-mary").public
    assert request.node == files.request("st-mary").node
    assert request.to_bytes() == data
    assert request.fingerprint == files.request("st-mary").fingerprint
    assert node_key("st-mary").curve.name == "secp384r1"


def test_a_policy_that_says_nothing_is_what_it_was(tmp_path: Path) -> None:
    (tmp_path / "policy.toml").write_text("version = 1\n")
    silent = HospitalPolicy.load(tmp_path / "policy.toml")
    written = HospitalPolicy.load(of("hospital") / "policy.toml")
    assert (silent.privacy, silent.secagg, silent.vectors) == (
        written.privacy, written.secagg, written.vectors,
    )  # fmt: skip
    assert silent.privacy == PrivacyLimits()


def test_what_a_hospital_remembers_of_runs(tmp_path: Path) -> None:
    from client_app.cohorts import Cohorts, JudgingRefusal
    from client_app.fixed import folder_of
    from client_app.private import _kept_update
    from common.fixed import groups_of
    from common.messages import Job
    from common.model import weights_digest

    home = copied("hospital-memory", tmp_path) / "home"
    with files._at_home(home) as hospital:
        cohorts = Cohorts(hospital, RUN, BASE)
        cohorts.check(bytes(32))
        cohorts.agree(bytes(32), files.HOSPITALS)
        with pytest.raises(JudgingRefusal, match="was judged over"):
            cohorts.agree(bytes(32), files.HOSPITALS[:2])
        (digest,) = groups_of(FIXED)
        path = folder_of(hospital) / f"{digest}.safetensors"
        from safetensors.numpy import load

        assert weights_digest(load(path.read_bytes())) == digest
        assert Job(RUN, 1, b"", WEIGHTS, left_out=(digest,)).left_out == (digest,)
    run = home / "runs" / RUN
    kept = _kept_update(run / "update.safetensors", f"3:{'e' * 64}")
    assert kept is not None and equal(kept, UPDATE)
    assert _kept_update(run / "update.safetensors", f"4:{'e' * 64}") is None
    figures = json.loads((run / "validated.json").read_text())
    assert figures == {"e" * 64: {"examples": 12, "correct": 8.5, "loss_sum": 3.25}}


def test_what_a_hospital_remembers_of_masked_vectors(tmp_path: Path) -> None:
    """The model of which it has masked a vector before is still known."""
    from client_app.secagg import validated_before

    home = copied("hospital-memory", tmp_path) / "home"
    with files._at_home(home) as hospital:
        assert validated_before(hospital, binding().model_hash)
        assert not validated_before(hospital, bytes(32))


def test_whom_a_hospital_has_accepted_and_with_whom_it_was_summed(tmp_path: Path) -> None:
    from client_app.agreements import AgreementRefusal, Agreements
    from client_app.members import Members

    copy = shutil.copytree(FOLDER / "hospital-memory" / "2", tmp_path / "memory")
    roster = {name: identity(name).public for name in files.HOSPITALS}
    accepted = Members.load(copy / "home" / "members.json").accepted(roster)
    assert accepted == frozenset(roster.values())
    with files._at_home(copy / "home") as hospital:
        agreements = Agreements(hospital)
        agreements.admit(RUN, bytes(range(32)), 1)
        with pytest.raises(AgreementRefusal, match=RUN):
            agreements.admit(RUN, bytes(32), 50)
        assert agreements.has_signed("model " + "e" * 64)
        with pytest.raises(AgreementRefusal, match="hospital-7 alone"):
            agreements.sign("model " + "e" * 64, [f"hospital-{i}" for i in range(7)], 4)


def test_rosters_that_say_when_they_were_signed() -> None:
    folder = FederationFolder(FOLDER / "federation" / "2")
    coordinator = identity("coordinator").public
    data = folder.roster.read_bytes()
    roster = Roster.load(data, coordinator)
    assert roster.issued == "2026-01-01T12:00:04Z"  # the fifth that was signed at that moment
    assert roster.sign(identity("coordinator")) == data
    assert Kit.read(folder.kits / "st-mary").verify(coordinator, MOMENT)[1] == roster


def test_egress_logs() -> None:
    found = list(egress.read(of("egress") / egress.FILE))
    assert [line["field"] for line in found] == [
        "report.hospital", "val-examples", "update", "refusal.code", "refusal.correlation-id",
    ]  # fmt: skip
    assert found[0]["run"] == "" and found[2]["amount"] == "6 numbers"


def test_runs_are_resumed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Their configuration is understood, and every round's model is there."""
    monkeypatch.setenv("CONSILIUM_HOME", str(copied("run", tmp_path)))
    written = json.loads((of("run") / "runs" / RUN / "config.json").read_text())
    config = RunConfig.parse(written)
    assert (config.rounds, config.dataset, config.server_momentum) == (2, "synthetic", 0.5)
    store = RunStore.resume(RUN, config.as_dict())
    assert (store.last_round(), store.best_round()) == (2, 1)
    for number in range(3):
        expected = {k: np.asarray(v + number, v.dtype) for k, v in WEIGHTS.items()}
        assert equal(store.load_model(number), expected)
    assert equal(store.load_memory(2), {"momentum": np.full(3, 2, np.float32)})
    assert store.load_memory(0) == {}


def test_tables_of_nodes(monkeypatch: pytest.MonkeyPatch) -> None:
    from server_app.directory import NODES, registered

    monkeypatch.setenv(NODES, str(of("nodes") / "nodes.json"))
    assert registered() == dict(enumerate(files.HOSPITALS))


def test_priors_and_kept_features() -> None:
    from common.prior.features import PriorSpec
    from common.prior.kept import _read
    from common.prior.train import load_prior

    folder = FOLDER / "prior" / "2"
    prior = load_prior(folder / "prior.safetensors")
    assert prior.spec == PriorSpec(widths=(8,), dimension=4, size=12, zooms=(1.0,))
    kept = _read(folder / "features" / f"{'f' * 64}.safetensors", 2)
    assert kept is not None and kept.tolist() == [[0, 1, 2, 3], [4, 5, 6, 7]]
