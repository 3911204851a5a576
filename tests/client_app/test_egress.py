"""The egress log: what leaves is listed before it leaves, and what is not listed does not leave."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flwr.app import ConfigRecord, Message, MetricRecord, RecordDict

from client_app import egress, work
from client_app.app import app
from client_app.egress import EgressError, Field, fields_of
from common.files import consilium_home
from common.messages import Envelope, Greeting, Refusal, Report
from deploy.inprocess import InProcessGrid, run_in_process

TINY: dict[str, Any] = {
    "dataset": "synthetic", "synthetic-size": 600, "rounds": 1, "batch-size": 32,
    "model-width": 0.03125, "partition-min-size": 5, "delta": 1e-3, "update-range": 4.0,
}  # fmt: skip


def lines(hospital: str = "hospital-00") -> list[dict[str, str]]:
    return list(egress.read(consilium_home() / "simulation" / hospital / egress.FILE))


def test_every_message_of_a_secure_private_round_is_listed_field_by_field() -> None:
    run_in_process(TINY, num_hospitals=5)
    found = lines()
    stages = list(dict.fromkeys(line["message"] for line in found))
    assert stages == ["greet", "train", "share", "masked", "consistency", "unmask", "evaluate"]
    inside = {x["field"]: x["protection"] for x in found if x["message"] == "masked"}
    assert set(inside) == {
        "masked", "update", "weight", "val-examples", "val-correct", "val-loss-sum"
    }  # fmt: skip
    for name in set(inside) - {"masked"}:
        assert "only the sum over 4 or more" in inside[name]
        assert "noise: ε=6, δ=0.001 per image" in inside[name]
    assert all(line["run"] and line["round"] for line in found if line["message"] != "greet")


def test_what_goes_in_the_clear_says_so_and_says_that_it_is_exact() -> None:
    run_in_process({**TINY, "secagg": False, "privacy": "none"}, num_hospitals=2)
    found = {x["field"]: x["protection"] for x in lines() if x["message"] == "train"}
    assert found["update"] == "in the clear; exact, no differential privacy"
    assert found["train-loss-sum"] == "in the clear; exact, no differential privacy"


def test_under_privacy_no_training_loss_leaves_and_nothing_else_is_exact() -> None:
    run_in_process({**TINY, "secagg": False}, num_hospitals=2)
    found = {x["field"]: x["protection"] for x in lines() if x["message"] == "train"}
    assert "train-loss-sum" not in found
    about_data = {k: v for k, v in found.items() if not k.startswith("report.")}
    assert set(about_data) == {"update", "examples", "val-examples", "val-correct", "val-loss-sum"}
    assert all("with noise: ε=6" in v for v in about_data.values())


@pytest.mark.parametrize("metrics", ["withheld", "exact"])
def test_figures_that_are_withheld_are_not_said_to_be_anything_else(metrics: str) -> None:
    """Exact figures may leave in a secured sum only; in the clear they are withheld, too."""
    consilium_home().mkdir(parents=True)
    (consilium_home() / "policy.toml").write_text(
        'version = 1\n[aggregation]\nsecagg = "optional"\n'
        f'[privacy]\ntotal-epsilon = inf\ntotal-delta = 1e-3\nmetrics = "{metrics}"\n'
    )
    run_in_process({**TINY, "secagg": False}, num_hospitals=2)
    found = {x["field"]: x["protection"] for x in lines() if x["message"] == "train"}
    for name in ("val-examples", "val-correct", "val-loss-sum"):
        assert found[name] == "in the clear; withheld: zero, whatever the images are"
    assert "with noise" in found["update"]


def test_the_figures_that_leave_under_privacy_are_not_the_true_ones(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    sent: list[dict[str, float]] = []
    true: list[Any] = []
    report, evaluate = Report.to_record, work.evaluate
    monkeypatch.setattr(
        Report, "to_record", lambda self: sent.append(dict(self.metrics)) or report(self)
    )
    monkeypatch.setattr(work, "evaluate", lambda *a, **k: true.append(r := evaluate(*a, **k)) or r)
    run_in_process({**TINY, "secagg": False}, num_hospitals=2)
    assert len(true) == len(sent) == 4
    for told, truth in zip(sent, true, strict=True):
        assert told["val-correct"] != truth.correct
        assert told["val-loss-sum"] != pytest.approx(truth.loss_sum, abs=1e-3)


@pytest.mark.parametrize(
    "record",
    [
        RecordDict({"diary": ConfigRecord({"x": 1})}),
        RecordDict({"greeting": ConfigRecord({"version": 1, "hospital": "h", "city": "x"})}),
        RecordDict({"metrics": MetricRecord({"age": 61.0})}),
        RecordDict({"metrics": MetricRecord({"val-examples": 1.0, "path": 2.0})}),
    ],
)
def test_a_field_that_the_log_does_not_know_does_not_leave(record: RecordDict) -> None:
    with pytest.raises(EgressError, match="does not know"):
        fields_of(record, "train", None, None)


def test_an_unknown_field_becomes_a_refusal_on_the_wire(monkeypatch: pytest.MonkeyPatch) -> None:
    leaky = RecordDict({"greeting": ConfigRecord({"version": 1, "hospital": "h", "pin": "1234"})})
    monkeypatch.setattr(Greeting, "to_record", lambda self: leaky)
    answer = greet()
    refusal = Refusal.in_record(answer)
    assert refusal is not None and refusal.code == "egress"
    assert "1234" not in repr(answer)
    assert [line["field"] for line in lines()] == ["refusal.code", "refusal.correlation-id"]


def greet() -> RecordDict:
    grid = InProcessGrid(app, 2, dict(TINY))
    return app(Message(RecordDict(), 1000, "query.greet"), grid.contexts[0]).content


def test_where_the_log_cannot_be_written_nothing_leaves() -> None:
    home = consilium_home() / "simulation" / "hospital-00"
    (home / egress.FILE).mkdir(parents=True)
    refusal = Refusal.in_record(greet())
    assert refusal is not None and refusal.code == "egress"


def test_a_masked_vector_of_an_unknown_round_does_not_leave() -> None:
    with pytest.raises(EgressError, match="contents are not known"):
        fields_of(Envelope(b"xy").to_record(), "masked", None, None)


def test_a_line_stays_a_line_whatever_the_server_put_into_it(tmp_path: Path) -> None:
    egress._append(tmp_path / "log", [("a\tb", "c\nd", *[""] * 5)])
    text = (tmp_path / "log").read_text().splitlines()
    assert len(text) == 2
    assert text[1].startswith("a?b\tc?d")
    assert (tmp_path / "log").stat().st_mode & 0o077 == 0


def test_the_update_is_counted_in_numbers() -> None:
    report = Report("run-1", 1, "h", {"examples": 3.0}, {"w": np.zeros((2, 3)), "b": np.zeros(4)})
    found = fields_of(report.to_record(), "train", None, None)
    assert Field("update", "10 numbers", "in the clear") in found


def ask_often(number: int, policy: str = "") -> Path:
    """One hospital, greeted so often; its directory."""
    consilium_home().mkdir(parents=True)
    (consilium_home() / "policy.toml").write_text(f"version = 1\n{policy}")
    grid = InProcessGrid(app, 2, dict(TINY))
    for _ in range(number):
        answer = app(Message(RecordDict(), 1000, "query.greet"), grid.contexts[0]).content
        assert Refusal.in_record(answer) is None
    return consilium_home() / "simulation" / "hospital-00"


def test_answers_that_carry_nothing_are_listed_to_a_number_and_then_counted() -> None:
    home = ask_often(9, "[egress]\nlisted-a-day = 5\n")
    of_one = len({line["field"] for line in lines()})
    assert [line["message"] for line in lines()] == ["greet"] * 5 * of_one
    for _ in range(7):  # a round that this node is not in
        grid = InProcessGrid(app, 2, dict(TINY))
        record = Envelope(b"x").to_record()
        app(Message(record, 1000, "query.masked"), grid.contexts[0])
    ((_, found),) = egress.counts(home / egress.FILE).items()
    assert found == {"greet": 9, "masked: refused, secagg-no-round": 7}
    assert sum(line["message"] == "masked" for line in lines()) == 2 * 5
    size = (home / egress.FILE).stat().st_size
    app(Message(RecordDict(), 1000, "query.greet"), grid.contexts[0])
    assert (home / egress.FILE).stat().st_size == size


def test_what_carries_something_is_always_listed(tmp_path: Path) -> None:
    report = Report("run-1", 1, "h", {"examples": 3.0}, {"w": np.zeros((2, 3))}).to_record()
    for _ in range(30):
        egress.note(tmp_path, report, stage="train", hospital=None)
    assert sum(line["field"] == "update" for line in egress.read(tmp_path / egress.FILE)) == 30
    assert not (tmp_path / egress.COUNTS).exists()


def test_a_full_log_is_compressed_and_nothing_of_it_is_lost(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / egress.FILE
    small = egress.Egress.model_construct(rotate_mb=0.0005, max_mb=1024, listed_a_day=10**6)
    monkeypatch.setattr(egress, "Egress", lambda: small)
    for number in range(40):
        head = ConfigRecord({"version": 1, "hospital": f"h{number}"})
        egress.note(tmp_path, RecordDict({"greeting": head}), stage="greet")
    found = [line["amount"] for line in egress.read(path)]
    assert found == [f"h{number}" for number in range(40)]
    assert len(egress.files(path)) > 3
    for file in tmp_path.iterdir():
        assert file.stat().st_mode & 0o077 == 0


def test_nothing_leaves_where_the_log_is_as_large_as_the_policy_allows(tmp_path: Path) -> None:
    (tmp_path / "egress-000001.tsv.gz").touch()
    with (tmp_path / "egress-000001.tsv.gz").open("r+b") as file:
        file.truncate(2_000_000_000)  # a hole: takes no room
    head = ConfigRecord({"version": 1, "hospital": "h"})
    with pytest.raises(EgressError, match="more than 1024 MB"):
        egress.note(tmp_path, RecordDict({"greeting": head}), stage="greet")
    assert not (tmp_path / egress.FILE).exists()


def test_days_long_ago_are_added_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(egress, "_DAYS", 5)
    path = tmp_path / egress.FILE
    days = [f"2025-01-{day:02d}" for day in range(1, 21)]
    for day in days:
        assert egress._count(path, "greet", day) == 1
    assert egress._count(path, "greet", days[-1]) == 2
    found = egress.counts(path)
    assert len(found) <= 5 + 2
    assert sum(of["greet"] for of in found.values()) == len(days) + 1
