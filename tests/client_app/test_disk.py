"""Whoever asks a hospital under ever new names of runs fills neither its disk nor its ledger."""

from __future__ import annotations

import io
import logging
from pathlib import Path
from typing import Any

import numpy as np
from flwr.app import Message, RecordDict

from client_app import egress
from client_app.app import app
from common.config import KEYS, RunConfig
from common.files import consilium_home
from common.messages import Job, Refusal
from common.model import ModelSpec, build, get_weights
from common.privacy.ledger import Ledger
from deploy.inprocess import InProcessGrid

CONFIG: dict[str, Any] = {key.name: key.default for key in KEYS} | {
    "dataset": "synthetic", "synthetic-size": 200, "partition": "iid", "model-width": 0.03125,
    "privacy": "local", "epsilon": 3.0, "delta": 1e-5, "rounds": 1, "batch-size": 16,
    "local-epochs": 1, "secagg": False, "threads": 1, "partition-min-size": 5,
}  # fmt: skip
ASKED = 6


def files_of(home: Path) -> list[str]:
    """What is there, but for locks and the log."""
    found = (p for p in home.rglob("*") if p.is_file())
    names = (str(p.relative_to(home)) for p in found)
    return sorted(n for n in names if not n.startswith(("locks/", "egress", ".egress")))


def test_runs_that_are_refused_leave_nothing_of_their_own() -> None:
    """Twenty-five requests under new names left twenty-five folders."""
    consilium_home().mkdir(parents=True)
    (consilium_home() / "policy.toml").write_text(
        'version = 1\n[aggregation]\nsecagg = "optional"\n[egress]\nlisted-a-day = 4\n'
        "[privacy]\ntotal-epsilon = 3.5\ntotal-delta = 1e-4\nmin-noise-multiplier = 0.0\n"
    )
    grid = InProcessGrid(app, 2, CONFIG)
    config = RunConfig.parse(CONFIG)
    spec = ModelSpec.of(config, num_classes=8, channels=3)
    weights = get_weights(build(spec, 7))
    home = consilium_home() / "simulation" / "hospital-00"

    def asked(number: int) -> str | None:
        grid.contexts[0].run_id = 1000 + number
        job = Job(f"run-{number}", 1, spec.digest(), weights)
        answer = app(Message(job.to_record(), 1000, "evaluate"), grid.contexts[0]).content
        refusal = Refusal.in_record(answer)
        return None if refusal is None else refusal.code

    assert asked(0) is None
    before = files_of(home)
    assert "runs/run-0/validated.json" in before
    with Ledger(home / "ledger.sqlite") as ledger:
        entries = len(ledger.chain.entries())
    codes = {asked(number) for number in range(1, ASKED)}
    assert codes == {"privacy-budget"}
    assert files_of(home) == before
    assert [p.name for p in (home / "runs").iterdir()] == ["run-0"]
    with Ledger(home / "ledger.sqlite") as ledger:
        assert len(ledger.chain.entries()) == entries
    assert len(list((home / "locks").iterdir())) <= 64
    # And what is refused over and over is counted, not listed.
    refused = [x for x in egress.read(home / egress.FILE) if x["field"] == "refusal.code"]
    assert len(refused) == 4
    (day,) = egress.counts(home / egress.FILE).values()
    assert day == {"evaluate: refused, privacy-budget": ASKED - 1}


def test_a_folder_in_which_an_earlier_version_kept_nothing_goes() -> None:
    from client_app.hospital import Hospital

    home = consilium_home() / "hospital"
    hospital = Hospital("h", home, RunConfig.parse({}), 0, 1)
    for run, name in (("old", "lock"), ("kept", "update.safetensors")):
        (home / "runs" / run).mkdir(parents=True)
        (home / "runs" / run / name).write_bytes(b"")
    (home / "runs" / "kept" / "lock").touch()
    (home / "runs" / "empty").mkdir()  # another process may be about to write into it
    with hospital.alone_in("new") as directory:
        assert not directory.exists()
        assert hospital.made_directory("new") == directory
    assert {p.name for p in (home / "runs").iterdir()} == {"new", "kept", "empty"}
    assert np.all([p.stat().st_mode & 0o077 == 0 for p in (home / "locks").iterdir()])


def test_a_hospitals_log_has_no_line_and_no_command_of_a_servers() -> None:
    """Names of tensors and keys of the run config are the server's to choose."""
    hostile = "\x1b[2J\x1b[H aaa\nINFO consilium.apps: ready\nERROR forged\u202e"
    stream = io.StringIO()
    handler = logging.StreamHandler(stream)
    handler.setFormatter(logging.Formatter("%(levelname)s %(name)s: %(message)s"))
    logging.getLogger("consilium").addHandler(handler)
    try:
        grid = InProcessGrid(app, 2, CONFIG)
        weights = {"a": np.zeros(1, np.float32), hostile: np.zeros(1, np.float32)}
        job = Job("run-1", 1, bytes(32), {"a": weights["a"]}, fixed={hostile: weights["a"]})
        told = [app(Message(job.to_record(), 1000, "train"), grid.contexts[0]).content]
        grid.contexts[1].run_config[f"zz{hostile}"] = 1
        told.append(app(Message(RecordDict(), 1001, "query.greet"), grid.contexts[1]).content)
    finally:
        logging.getLogger("consilium").removeHandler(handler)
    codes = [Refusal.in_record(answer).code for answer in told]  # type: ignore[union-attr]
    assert codes == ["protocol", "config"]
    lines = stream.getvalue().splitlines()
    assert all(line.isprintable() for line in lines)
    assert not [x for x in lines if x.startswith(("INFO", "ERROR forged"))]
    assert sum(x.startswith("ERROR consilium.hospital: refused") for x in lines) == 2
