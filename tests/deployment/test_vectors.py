"""Task vectors between real processes: a server that is killed, a vector that is taken back."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from common.files import read_json
from tests.deployment.house import REAL, House, until

Make = Callable[..., House]
POLICY = """version = 1
[aggregation]
secagg = "optional"
[privacy]
total-epsilon = 30.0
[vectors]
send = "private"
"""
VECTORS: dict[str, object] = {
    "mode": "vectors", "secagg": "false", "model_width": 0.25, "epsilon": 4.0,
    "allow_random_base": "true", "publish_every": 3, "versions": 4,
}  # fmt: skip


def events(directory: Path, kind: str) -> list[dict[str, Any]]:
    path = directory / "metrics.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    return [row for row in rows if row["event"] == kind]


def listed(house: House, run: Path) -> list[dict[str, Any]]:
    told = house.call("vectors", "list", str(run), "--format", "json")
    found: list[dict[str, Any]] = json.loads(told)["vectors"]
    return found


def charged(house: House, name: str) -> int:
    """Vectors that a hospital's ledger has counted."""
    shown = json.loads(house.call("ledger", "show", "--home", str(house.root / name), "--json"))
    return sum(int(run["rounds_used"]) for run in shown["runs"])


def test_a_server_that_is_killed_counts_no_vector_twice_and_one_taken_back_is_gone(
    new_house: Make,
) -> None:
    house = new_house(real=REAL.exists())
    for name in house.names:
        (house.root / name / "policy.toml").write_text(POLICY)
    house.serve()
    house.open_all()
    house.run(**VECTORS)
    run = until(lambda: house.runs() and house.runs()[-1], "the run's directory")
    until(lambda: len(events(run, "arrival")) >= 4, f"four vectors\n{house.said('run')}", 400)
    house.kill(int(until(house.serverapp, "the ServerApp")))
    house.kill(int(until(lambda: house.process_of("deploy.server.superlink"), "the SuperLink")))
    assert house.started.pop("run").wait(300) == 1, house.said("run")
    before = {v["serial"] for v in listed(house, run)}
    assert len(before) >= 4

    until(house.is_up, "the server's return")
    house.run("resumed", resume=run.name)
    assert house.started.pop("resumed").wait(900) == 0, house.said("resumed")
    summary = read_json(run / "summary.json")
    assert (summary["status"], summary["bases"]) == ("completed", 4)
    vectors = listed(house, run)
    assert before <= {v["serial"] for v in vectors}
    each = Counter((v["hospital"], v["version"]) for v in vectors)
    assert max(each.values()) == 1, each
    made = Counter(v["hospital"] for v in vectors)
    for name in house.names:
        house.call("ledger", "verify", "--home", str(house.root / name))
        # One more at most: a vector that was under way when the run ended.
        assert made[name] <= charged(house, name) <= made[name] + 1, name
    assert "every base is what its vectors make" in house.call("vectors", "rebuild", str(run))

    taken = next(v for v in vectors if v["published_in"] is not None)
    house.call("hospital", "withdraw", str(house.root / taken["hospital"]), taken["serial"])
    house.run("again", resume=run.name, versions=5)
    assert house.started.pop("again").wait(900) == 0, house.said("again")
    (gone,) = [v for v in listed(house, run) if v["serial"] == taken["serial"]]
    assert gone["state"] == "withdrawn" and gone["published_in"] is None
    assert not list((run / "registry").rglob(f"*{taken['serial']}*"))
    assert "every base is what its vectors make" in house.call("vectors", "rebuild", str(run))
