"""The report at the end of real runs of vectors: finished, resumed, failed."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from common.errors import RoundError
from deploy.inprocess import run_in_process
from tests.server_app.test_report import Files, words
from tests.server_app.vectors.running import TINY, the_run


@pytest.fixture
def settings(base: str) -> Files:
    return {**TINY, "base": base, "publish-every": 3}


def test_a_run_ends_with_a_report_of_all_of_it_and_so_does_what_resumes_it(
    settings: Files, capsys: pytest.CaptureFixture[str]
) -> None:
    run_in_process(settings, num_hospitals=3)
    told = " ".join(capsys.readouterr().out.split())
    assert str(the_run() / "report.html") in told.replace(" ", "")
    assert "report:" in told
    first = (the_run() / "report.html").read_text("utf-8")
    run_in_process({**settings, "resume": the_run().name, "versions": 2}, num_hospitals=3)
    found = (the_run() / "report.html").read_text("utf-8")
    rows = [json.loads(line) for line in (the_run() / "metrics.jsonl").read_text().splitlines()]
    serials = [row["serial"] for row in rows if row["event"] == "arrival"]
    assert len(serials) == 6
    assert all(s in found for s in serials) and sum(s in first for s in serials) == 3
    seen = words(the_run())
    summary = json.loads((the_run() / "summary.json").read_text())
    assert "completed" in seen and "Bases published 2 Base 2 is current." in seen
    assert f"{100 * summary['test_accuracy']:.2f}%" in seen
    assert "Synthetic data." in seen and "not in order" not in seen


def test_a_run_that_fails_before_any_vector_has_a_report(settings: Files) -> None:
    home = Path(os.environ["CONSILIUM_HOME"])
    home.mkdir(parents=True, exist_ok=True)
    (home / "policy.toml").write_text("version = 1\n[privacy]\nallow-non-private = true\n")
    with pytest.raises(RoundError):
        run_in_process(settings, num_hospitals=3)
    seen = " ".join(words(the_run()).split())
    assert (the_run() / "report.html").exists()
    assert "This run failed." in seen and "No vector arrived." in seen
    assert "3 refusals by hospitals" in seen and "its policy lets no such vector leave" in seen


def test_a_report_that_cannot_be_written_does_not_undo_a_good_run(
    settings: Files, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: object) -> Path:
        raise ValueError("no such font")

    monkeypatch.setattr("server_app.vectors.run.write_report", fails)
    run_in_process(settings, num_hospitals=3)
    told = " ".join(capsys.readouterr().out.split())
    assert "the report could not be written: ValueError: no such font" in told
    assert json.loads((the_run() / "summary.json").read_text())["status"] == "completed"
    assert not (the_run() / "report.html").exists()
