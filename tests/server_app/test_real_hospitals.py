"""Hospitals with folders of their own: pictures, keys, policy, roster, as enrolment leaves them."""

from __future__ import annotations

import json
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from client_app import egress
from client_app.hospital_file import HospitalFolder
from common.errors import ConfigError, RoundError
from common.federation_file import read_key
from common.privacy.ledger import Ledger, data_sets
from common.simulation import LEDGER
from deploy.inprocess import InProcessGrid, run_in_process
from deploy.provision.demo import Demo, make
from tests.server_app import running

N = 5


@pytest.fixture(scope="module")
def federation(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return made(tmp_path_factory.mktemp("federation"))


def made(root: Path) -> Path:
    """Five hospitals in one folder; their ledgers remember what each test asks of them."""
    demo = Demo(
        hospitals=N, name="demo", address="localhost:9092", hosts=["localhost"], data=None,
        images=500, image_size=28,
    )  # fmt: skip
    make(root, demo, datetime.now(UTC))
    return root


def config(root: Path, **changes: Any) -> dict[str, Any]:
    import base64

    agreed = HospitalFolder(root / "hospital-00").load_federation().description
    coordinator = root / "coordinator"
    return {
        "dataset": "hospitals", "classes": ",".join(agreed.classes),
        "channels": agreed.channels, "image-size": agreed.image_size,
        "roster": str(coordinator / "roster.json"),
        "coordinator-key": base64.b64encode(read_key(coordinator / "coordinator.pub")).decode(),
        "rounds": 1, "batch-size": 16, "model-width": 0.03125, "update-range": 4.0,
        **{key.replace("_", "-"): value for key, value in changes.items()},
    }  # fmt: skip


def run(root: Path, **changes: Any) -> InProcessGrid:
    nodes = {i: {"hospital": str(root / f"hospital-{i:02d}")} for i in range(N)}
    return run_in_process(config(root, **changes), num_hospitals=N, node_configs=nodes)


def newest(name: str) -> Any:
    text = (running.newest() / name).read_text()
    return (
        json.loads(text) if name.endswith(".json") else [json.loads(x) for x in text.splitlines()]
    )


def test_hospitals_train_on_their_own_pictures_under_the_policies_that_enrolment_wrote(
    federation: Path,
) -> None:
    """Roster required, secure aggregation required, ε charged to each hospital's own ledger."""
    run(federation)
    record, summary = newest("metrics.jsonl")[1], newest("summary.json")
    assert record["contributed"] == [f"hospital-{i:02d}" for i in range(N)]
    assert record["validation"]["examples"] > 0
    assert summary["test_accuracy"] is None
    assert summary["epsilon"] == 6.0
    assert not (running.newest() / "partition.json").exists()
    for i in range(N):
        home = federation / f"hospital-{i:02d}"
        with Ledger(home / LEDGER, create=False) as ledger:
            (known,) = data_sets(ledger.chain)
            pictures = len(list((home / "data").rglob("*.png")))
            assert known.images == pictures
            state = ledger.state(summary["run"])
            assert state is not None and state.rounds == 1
        sent = list(egress.read(home / egress.FILE))
        assert {"update", "weight", "val-correct"} <= {line["field"] for line in sent}


@pytest.mark.parametrize("wrong", ["order", "size", "pooled"])
def test_a_run_on_anything_but_what_was_agreed_is_refused_before_training(
    federation: Path, wrong: str
) -> None:
    names = config(federation)["classes"].split(",")
    changes: dict[str, dict[str, Any]] = {
        "order": {"classes": ",".join(reversed(names))},
        "size": {"image_size": 32},
        "pooled": {"dataset": "synthetic", "classes": "", "synthetic_size": 400},
    }
    with pytest.raises(RoundError, match="0 hospitals are there"):
        run(federation, connect_timeout=0.1, **changes[wrong])


def test_a_hospital_that_is_away_is_missed_by_name_and_the_quorum_goes_on(
    tmp_path: Path,
) -> None:
    federation = made(tmp_path)
    nodes = {i: {"hospital": str(federation / f"hospital-{i:02d}")} for i in range(N - 1)}
    run_in_process(config(federation, connect_timeout=0.5), num_hospitals=N - 1, node_configs=nodes)
    record = newest("metrics.jsonl")[1]
    assert record["status"] == "ok"
    assert [d["hospital"] for d in record["dropped"]] == ["hospital-04"]


def test_a_folder_name_that_is_no_class_is_refused_and_a_mapped_one_is_not(
    federation: Path,
) -> None:
    from client_app.data import data_of
    from client_app.hospital import Hospital

    root = federation / "hospital-01"
    first = sorted((root / "data").iterdir())[0]
    renamed = first.with_name("what we call it")
    text = (root / "hospital.toml").read_text()

    def hospital() -> Hospital:
        from client_app.app import app
        from common.config import KEYS

        values = {key.name: key.default for key in KEYS} | config(federation)
        grid = InProcessGrid(app, 1, values, node_configs={0: {"hospital": str(root)}})
        return Hospital.from_context(grid.contexts[0])

    before = data_of(hospital())
    first.rename(renamed)
    try:
        with pytest.raises(Exception, match="what we call it"):
            data_of(hospital())
        mapped = text.replace("[classes]", f'[classes]\n"what we call it" = "{first.name}"')
        (root / "hospital.toml").write_text(mapped)
        after = data_of(hospital())
        assert sorted(after.train.labels.tolist()) == sorted(before.train.labels.tolist())
        (root / "hospital.toml").write_text(mapped.replace(first.name, "no such class"))
        with pytest.raises(ConfigError, match="no class of the federation"):
            hospital()
    finally:
        renamed.rename(first)
        (root / "hospital.toml").write_text(text)
