"""One file, or folder, of each kind that is kept between two versions of consilium."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from unittest.mock import patch

import numpy as np

from client_app import egress
from client_app.agreements import Agreements
from client_app.cohorts import Cohorts
from client_app.fixed import keep
from client_app.hospital import Hospital
from client_app.members import Members
from client_app.outbox import Outbox
from client_app.secagg import Once
from common.config import KEYS, RunConfig
from common.errors import DataError
from common.files import write_json
from common.messages import Receipt, Refusal, Report
from common.model import ModelSpec
from common.secagg import RosterEntry
from common.vectors import Base, Rule, SignedVector, TaskVector, Withdrawal
from deploy.provision import federation, members, samples
from deploy.provision.federation import FederationFolder, make_settings
from deploy.provision.requests import Request
from server_app.registry import Registry
from server_app.run_store import RunStore
from server_app.vectors.base import write_base
from server_app.vectors.federated import FederatedJudge, _OfBase
from server_app.vectors.keys import Keys
from server_app.vectors.manifest import Manifest, Member
from tests.golden.fixed import MOMENT, frozen, identity, node_key
from tests.golden.records import FIXED, MODEL, RUN, SERIALS, UPDATE, WEIGHTS, binding

CREATED = "2026-01-01T12:00:00Z"
CLASSES = ("basophil", "eosinophil")
HOSPITALS = ("st-anne", "st-mary", "st-paul")


def base() -> Base:
    """A first base of three entries."""
    return Base(version=0, parent=None, model_digest=MODEL, weights=WEIGHTS, pretrained=True)


def vector(number: int = 0, hospital: str = "st-mary", serial: str = SERIALS[0]) -> SignedVector:
    """A private one, with figures, signed."""
    values = {name: array * (number + 1) for name, array in UPDATE.items()}
    made = TaskVector(
        hospital=hospital, base=base().id, serial=serial, values=values, bucket=16,
        epsilon=2.5, delta=1e-5, metrics={"val-examples": 12.0, "val-correct": 8.0},
        created=CREATED,
    )  # fmt: skip
    return SignedVector.sign(made, identity(hospital))


def write_base_file(folder: Path) -> None:
    """A base as it is published."""
    base().save(folder / "base.safetensors")


def write_vector(folder: Path) -> None:
    """A task vector's envelope."""
    (folder / "vector.safetensors").write_bytes(vector().to_bytes())


def write_withdrawal(folder: Path) -> None:
    """A hospital takes a vector back."""
    with frozen("common.vectors.vector"):
        made = Withdrawal.sign("st-mary", SERIALS[0], identity("st-mary"))
    (folder / "withdrawal.json").write_bytes(made.to_bytes())


def write_outbox(folder: Path) -> None:
    """Three vectors: one sent, one refused, one withdrawn."""
    outbox = Outbox(folder)
    with frozen("common.vectors.vector"):
        for number, serial in enumerate(SERIALS):
            item = outbox.keep(vector(number, serial=serial), run=RUN, version=0)
            outbox.hand_over(item, RUN)
        outbox.take(Receipt(run=RUN, accepted=SERIALS[:1], refused={SERIALS[1]: "vector-stale"}))
        outbox.withdraw(SERIALS[2], "st-mary", identity("st-mary"))
    _without_locks(folder)


def write_registry(folder: Path) -> None:
    """Two vectors published as the second base, one excluded, one withdrawn."""
    names = (*HOSPITALS, "st-luke")
    keys = {name: identity(name).public for name in names}
    serials = [str(n) * 32 for n in range(1, 5)]
    with frozen("common.vectors.vector"), Registry(folder) as registry:
        registry.add_base(base())
        for number, (name, serial) in enumerate(zip(names, serials, strict=True)):
            registry.accept(vector(number, name, serial).to_bytes(), keys)
        registry.exclude(serials[2], "it harms")
        taken = Withdrawal.sign(names[3], serials[3], identity(names[3]))
        registry.withdraw(taken.to_bytes(), keys)
        registry.publish(Rule(), least=2, skewed=False)
    _without_locks(folder)


def write_base_note(folder: Path) -> None:
    """A base with what a hospital needs that fine-tunes it by itself, offline."""
    spec = _spec()
    made = Base(version=0, parent=None, model_digest=spec.digest(), weights=WEIGHTS,
                pretrained=True)  # fmt: skip
    write_base(folder / "base.safetensors", made, spec, run=RUN, config={"local-epochs": 2},
               made_from="a prior")  # fmt: skip


def write_ensemble(folder: Path) -> None:
    """An ensemble's manifest."""
    rows = tuple(
        Member(serial, hospital, 16, 2.5, 1e-5, 1000, "c" * 64)
        for serial, hospital in zip(SERIALS, HOSPITALS, strict=True)
    )
    made = Manifest(RUN, base().id, 0, _spec(), CLASSES, rows)
    (folder / "ensemble.json").write_text(made.to_json())


def write_identities(folder: Path) -> None:
    """Which key each hospital showed first, in a run without a roster."""
    keys = Keys(None, folder / "identities.json")
    for name in HOSPITALS:
        keys.of(name, name, identity(name).public)


def write_judging(folder: Path) -> None:
    """What the server notes of candidates that hospitals compared."""
    kept = _OfBase(list(HOSPITALS), ["d" * 64], {"d" * 64: [3, 30]})
    judge = _judge(folder / "judging.json")
    judge._round, judge._bases = 4, {base().id: kept}
    judge._save()


def write_federation(folder: Path) -> None:
    """A coordinator's folder without its private keys: two members, and one that was revoked.

    Its roster, description, kits, records and requests are formats of their own.
    """
    with tempfile.TemporaryDirectory() as place:
        made = FederationFolder(Path(place) / "fed")
        settings = make_settings(
            name="blood", address="localhost:9092", hosts=["127.0.0.1"], classes=CLASSES,
            image_size=28, channels=3,
        )  # fmt: skip
        with patch("deploy.provision.keys.new_identity", identity("coordinator").private_bytes):
            federation.init(made, settings, MOMENT, 3650)
        for name in HOSPITALS:
            members.admit(made, request(name), MOMENT, 36500)
        members.revoke(made, HOSPITALS[2], MOMENT, "its key was lost")
        shutil.rmtree(made.private)
        shutil.copytree(made.root, folder, dirs_exist_ok=True)
    _without_locks(folder)


def request(name: str) -> Request:
    """A hospital's request to be admitted; its ECDSA signature is another one each time."""
    with patch("deploy.provision.requests.os.urandom", lambda size: bytes(range(size))):
        return Request.make(name, identity(name), node_key(name), MOMENT)


def write_hospital(folder: Path) -> None:
    """What a hospital edits: ``hospital.toml`` and ``policy.toml``, and what it sent."""
    (folder / "hospital.toml").write_text(samples.hospital_toml("st-mary", "pictures"))
    (folder / "policy.toml").write_text(samples.policy_toml())
    (folder / "request.json").write_bytes(request("st-mary").to_bytes())


def write_hospital_memory(folder: Path) -> None:
    """What a hospital keeps of runs, so that it answers the same again, or not again."""
    from safetensors.numpy import save

    home = folder / "home"
    outbox = Outbox(home / "outbox")
    with _at_home(home) as hospital:
        item = outbox.keep(vector(), run=RUN, version=0)
        outbox.hand_over(item, RUN)
        Cohorts(hospital, RUN, base().id).agree(bytes(32), HOSPITALS)
        keep(FIXED, hospital)
        Once(hospital).mark_masked(binding())
        agreements = Agreements(hospital)
        agreements.admit(RUN, bytes(range(32)), 50)
        agreements.sign("model " + "e" * 64, [f"hospital-{i}" for i in range(8)], 4)
    entries = [RosterEntry(n, identity(n).public, "2026-01-01", "2099-01-01") for n in HOSPITALS]
    Members().decide(entries, "accepted", MOMENT).save(home / "members.json")
    run = home / "runs" / RUN
    run.mkdir(parents=True)
    (run / "update.safetensors").write_bytes(save(UPDATE, {"question": f"3:{'e' * 64}"}))
    figures = {"examples": 12, "correct": 8.5, "loss_sum": 3.25}
    write_json(run / "validated.json", {"e" * 64: figures})
    _without_locks(folder)


def write_egress(folder: Path) -> None:
    """Three messages that left, line by line."""
    with frozen("client_app.egress"):
        report = Report(RUN, 3, "st-mary", {"val-examples": 5.0}, UPDATE)
        egress.note(folder, report.to_record(), stage="train")
        refusal = Refusal(DataError("", "").code, "0a1b2c3d")
        egress.note(folder, refusal.to_record(), stage="train")


def write_run(folder: Path) -> None:
    """A run of two rounds, its weights, and what the server's optimizer remembers."""
    with patch.dict(os.environ, {"CONSILIUM_HOME": str(folder), "CONSILIUM_RUN": RUN}):
        values = {key.name: key.default for key in KEYS}
        changed = {"dataset": "synthetic", "privacy": "none", "rounds": 2,
                   "learning-rate-schedule": "constant", "server-momentum": 0.5}  # fmt: skip
        store = RunStore.create(RunConfig.parse(values | changed).as_dict())
        store.save_partition({"hospitals": [{"name": "hospital-00", "train": 8, "val": 2}]})
        for number in range(3):
            record = {
                "round": number, "status": "ok", "reason": None, "test": {"accuracy": 0.5},
                "train": None, "validation": None, "epsilon": None, "epsilon_by_hospital": {},
                "expected": ["hospital-00"], "contributed": ["hospital-00"], "dropped": [],
                "stage_seconds": {}, "seconds": 1.0,
            }  # fmt: skip
            weights = {name: array + array.dtype.type(number) for name, array in WEIGHTS.items()}
            store.save_round(record, weights, {"momentum": np.full(3, number, np.float32)})
        store.set_validation(1, {"accuracy": 0.75, "loss": 0.5, "examples": 12})
        store.finish({"run": RUN, "status": "completed", "rounds": 2})


def write_nodes(folder: Path) -> None:
    """Which node each hospital is, as the registrar notes it."""
    rows = {name: {"node-id": str(n), "key": f"ecdsa {name}"} for n, name in enumerate(HOSPITALS)}
    write_json(folder / "nodes.json", {"version": 1, "nodes": rows})


def write_ledger(folder: Path) -> None:
    """See :mod:`tests.golden.ledger_lines`."""
    from tests.golden import ledger_lines

    ledger_lines.write(folder / "ledger.sqlite")


def write_export(folder: Path) -> None:
    """The export of such a ledger."""
    from common.privacy.ledger import Ledger
    from deploy.ledger.choice import Place, Policy
    from deploy.ledger.export import exported, write
    from tests.golden import ledger_lines

    with tempfile.TemporaryDirectory() as place:
        path = Path(place) / "ledger.sqlite"
        ledger_lines.write(path)
        with Ledger(path) as ledger:
            document = exported(
                ledger, Place(Path(place), path), Policy(None, ledger_lines.LIMITS), MOMENT
            )
    write(document, [folder / "ledger.json"])


def write_prior(folder: Path) -> None:
    """A prior, smaller than any that is of use, and a hospital's kept features of pictures."""
    import torch

    from common.prior.features import PriorFeatures, PriorSpec
    from common.prior.kept import _keep
    from common.prior.train import save_prior

    torch.manual_seed(0)
    prior = PriorFeatures(PriorSpec(widths=(8,), dimension=4, size=12, zooms=(1.0,)))
    save_prior(prior, folder / "prior.safetensors", made_by="tests.golden.make")
    _keep(folder / "features" / f"{'f' * 64}.safetensors", torch.arange(8.0).reshape(2, 4))


def _judge(path: Path) -> FederatedJudge:
    """A server's judge that asks nobody."""
    config = RunConfig.parse({key.name: key.default for key in KEYS})
    return FederatedJudge(None, config, RUN, path, hospitals=3, say=print)  # type: ignore[arg-type]


def _spec() -> ModelSpec:
    config = RunConfig.parse({key.name: key.default for key in KEYS})
    return ModelSpec.of(config, num_classes=len(CLASSES), channels=3)


@contextmanager
def _at_home(home: Path) -> Iterator[Hospital]:
    from client_app.hospital import OwnPictures

    config = RunConfig.parse({key.name: key.default for key in KEYS})
    yield Hospital(
        "st-mary", home, config, 0, 1, own=OwnPictures(home / "data", None, 0, CLASSES, (0, 1))
    )


def _without_locks(folder: Path) -> None:
    """Locks, and what SQLite's write-ahead log has left, are no part of what is kept."""
    for path in list(folder.rglob("*")):
        if path.is_file() and (path.name.startswith(".") or path.name.endswith(("-shm", "-wal"))):
            path.unlink()
