"""Real hospitals' folders: vectors online and offline, under policy, roster and ledger."""

from __future__ import annotations

import base64
import json
import shutil
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from safetensors.numpy import save_file

from client_app import egress
from client_app.hospital_file import HospitalFolder
from client_app.policy import VectorsRefusal
from common.errors import ConfigError, RoundError
from common.federation_file import read_key
from common.model import ModelSpec, build, get_weights
from common.privacy.ledger import Ledger
from common.simulation import LEDGER
from deploy.inprocess import InProcessGrid, run_in_process
from deploy.provision.demo import Demo, make
from server_app.registry import Registry
from tests.deploy.vectors.test_commands import consilium
from tests.server_app.vectors.running import the_run

N = 3
POLICY = "version = 1\n[privacy]\ntotal-epsilon = 8.0\ntotal-delta = 1e-3\n[vectors]\nsend = {}\n"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("made") / "federation"
    demo = Demo(
        hospitals=N, name="demo", address="localhost:9092", hosts=["localhost"], data=None,
        images=240, image_size=28,
    )  # fmt: skip
    make(root, demo, datetime.now(UTC))
    return root


@pytest.fixture
def federation(made: Path, tmp_path: Path) -> Path:
    root = tmp_path / "federation"
    shutil.copytree(made, root)
    for i in range(N):
        (root / f"hospital-{i:02d}" / "policy.toml").write_text(POLICY.format('"private"'))
    return root


def config(root: Path, **changes: Any) -> dict[str, Any]:
    agreed = HospitalFolder(root / "hospital-00").load_federation().description
    coordinator = root / "coordinator"
    base = root / "base.safetensors"
    if not base.exists():
        spec = ModelSpec(width=0.03125, num_classes=len(agreed.classes), channels=agreed.channels)
        save_file(get_weights(build(spec, seed=0)), base)
    return {
        "mode": "vectors", "dataset": "hospitals", "classes": ",".join(agreed.classes),
        "channels": agreed.channels, "image-size": agreed.image_size, "secagg": False,
        "roster": str(coordinator / "roster.json"),
        "coordinator-key": base64.b64encode(read_key(coordinator / "coordinator.pub")).decode(),
        "batch-size": 512, "model-width": 0.03125, "epsilon": 2.0, "delta": 1e-3,
        "base": str(base), "versions": 1, "publish-every": 3,
        **{key.replace("_", "-"): value for key, value in changes.items()},
    }  # fmt: skip


def run(root: Path, **changes: Any) -> InProcessGrid:
    nodes = {i: {"hospital": str(root / f"hospital-{i:02d}")} for i in range(N)}
    return run_in_process(config(root, **changes), num_hospitals=N, node_configs=nodes)


def test_a_vector_made_offline_is_delivered_later_and_can_be_taken_back(federation: Path) -> None:
    """Roster, policy and ledger hold, and nothing is charged twice."""
    run(federation)
    summary = json.loads((the_run() / "summary.json").read_text())
    assert summary["status"] == "completed"
    assert summary["test_accuracy"] is None  # nobody but the hospitals has images
    assert 0 < summary["epsilon"] <= 2.0
    home = federation / "hospital-01"
    sent = {line["field"] for line in egress.read(home / egress.FILE)}
    assert {"vector", "vector.bucket", "vector.epsilon", "vector.signature"} <= sent

    said = consilium(
        "hospital", "finetune", str(home), "--base", str(the_run() / "base.safetensors")
    )
    assert "is in the outbox" in said and "waiting" in said
    again = consilium(
        "hospital", "finetune", str(home), "--base", str(the_run() / "base.safetensors")
    )
    assert "nothing was trained" in again
    with Ledger(home / LEDGER, create=False) as ledger:
        assert len(ledger.runs()) == 2  # each vector is a run of its own
        entries = len(ledger.chain.entries())

    run(federation, resume=the_run().name, versions=2)
    with Ledger(home / LEDGER, create=False) as ledger:
        assert len(ledger.chain.entries()) == entries
    with Registry(the_run() / "registry", create=False) as registry:
        (mine,) = [
            e.row.serial for e in registry.vectors()
            if e.row.hospital == "hospital-01" and e.published_in == 2
        ]  # fmt: skip
    assert mine in said
    assert "sent" in consilium("hospital", "outbox", str(home))

    assert "withdrawal waits" in consilium("hospital", "withdraw", str(home), mine)
    with pytest.raises(ConfigError, match="taken back"):
        consilium("hospital", "finetune", str(home), "--base", _base_of(federation, 1))
    with pytest.raises(ConfigError, match="no vector"):
        consilium("hospital", "withdraw", str(home), "0" * 32)


def test_a_federation_of_which_nobody_comes_says_so_also_when_it_goes_on(
    federation: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The roster's names are known before anybody has come."""
    run(federation)
    made = InProcessGrid.__post_init__

    def away(self: InProcessGrid) -> None:
        made(self)
        self.offline |= set(range(N))

    monkeypatch.setattr(InProcessGrid, "__post_init__", away)
    short = {"connect_timeout": 0.5, "duration": 6.0, "versions": 2}
    for resume in ("", the_run().name):
        with pytest.raises(RoundError, match="no hospital was there"):
            run(federation, resume=resume, **short)


def test_without_public_images_what_is_published_by_hand_is_said_to_be_unjudged(
    federation: Path,
) -> None:
    run(federation)
    name = the_run().name
    consilium("vectors", "take-back", name, "1")
    with pytest.raises(ConfigError, match="no public images to judge by"):
        consilium("vectors", "publish", name, "--judged-by", "public")
    with Registry(the_run() / "registry", create=False) as registry:
        assert registry.current().version == 0
    said = consilium("vectors", "publish", name)
    assert "no public images: it is published WITHOUT being judged" in said
    assert "the current base is 2" in said


def _base_of(federation: Path, version: int) -> str:
    """A published base with its note, as the coordinator hands it out."""
    from server_app.vectors.base import read_base, write_base

    _, note = read_base(the_run() / "base.safetensors")
    with Registry(the_run() / "registry", create=False) as registry:
        base = registry.base(version)
    path = federation / "handed" / "base.safetensors"
    write_base(path, base, note.spec, run=note.run, config=note.config)
    return str(path)


def test_a_base_of_no_run_or_with_another_note_is_refused_and_so_is_any_by_a_silent_policy(
    federation: Path,
) -> None:
    run(federation)
    home = str(federation / "hospital-00")
    note = the_run() / "base.json"
    told = json.loads(note.read_text())
    note.write_text(json.dumps({**told, "base": "0" * 64}))
    with pytest.raises(ConfigError, match="not of the same base"):
        consilium("hospital", "finetune", home, "--base", str(the_run() / "base.safetensors"))
    note.write_text(json.dumps({**told, "run": "", "config": {}}))
    with pytest.raises(ConfigError, match="of no run"):
        consilium("hospital", "finetune", home, "--base", str(the_run() / "base.safetensors"))
    note.write_text(json.dumps(told))
    (federation / "hospital-00" / "policy.toml").write_text("version = 1\n")
    with pytest.raises(VectorsRefusal, match="a single vector"):
        consilium("hospital", "finetune", home, "--base", str(the_run() / "base.safetensors"))
