"""Publishing by hand where the hospitals judge: not without saying aloud who does it instead."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from common.errors import ConfigError, RoundError
from deploy.inprocess import run_in_process
from server_app.registry import Registry
from tests.deploy.vectors.test_commands import consilium
from tests.server_app.test_report import words
from tests.server_app.vectors.judging import JUDGED, counted, gate, soon
from tests.server_app.vectors.running import registry, the_run

__all__ = ["soon"]  # fixtures


@pytest.fixture
def held(base: str, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """The settings of a run whose hospitals have found its candidate worse."""
    counted(monkeypatch, lambda asked, name: (0, 9))
    settings = {**JUDGED, "base": base, "publish-every": 5, "publish-margin": 1.0}
    with pytest.raises(RoundError, match="no base 1"):
        run_in_process(settings, num_hospitals=5)
    return settings


def current() -> int:
    with registry() as kept:
        return kept.current().version


def test_what_the_hospitals_are_to_judge_is_not_published_by_hand(held: dict[str, Any]) -> None:
    for rule in ((), ("--rule", "mean scale=0.5")):
        with pytest.raises(ConfigError, match="judged by its hospitals") as caught:
            consilium("vectors", "publish", the_run().name, *rule)
        for way in (f"resume={the_run().name}", "--judged-by public", "--judged-by none"):
            assert way in caught.value.remedy
    with pytest.raises(ConfigError, match="'hospitals' cannot judge"):
        consilium("vectors", "publish", the_run().name, "--judged-by", "hospitals")
    assert current() == 0


def test_public_images_judge_instead_if_that_is_said(held: dict[str, Any]) -> None:
    said = consilium("vectors", "publish", the_run().name, "--judged-by", "public")
    assert "judged on " in said and "public images" in said and "base is 1" in said
    assert gate(1)["candidate"] is not None


def test_nobody_judges_if_that_is_said_and_the_report_tells_it(held: dict[str, Any]) -> None:
    said = consilium("vectors", "publish", the_run().name, "--judged-by", "none")
    assert "published WITHOUT being judged" in said and "base is 1" in said
    run_in_process({**held, "resume": the_run().name}, num_hospitals=5)
    assert "New bases were published without being judged." in words(the_run())
    assert "it was published by hand" in words(the_run())


def test_it_is_said_when_the_runs_files_are_not_those_of_the_current_base(base: str) -> None:
    settings = {**JUDGED, "judged-by": "public", "base": base, "publish-every": 3}
    run_in_process(settings, num_hospitals=3)
    name = the_run().name
    with registry() as kept:
        serial = kept.vectors()[0].row.serial
    behind = f"still of another: its server writes them anew, once the run goes on (resume={name})"
    assert "base is 1" in (said := consilium("vectors", "include", name, serial))
    assert behind not in said
    assert behind in consilium("vectors", "exclude", name, serial)
    run_in_process({**settings, "resume": name}, num_hospitals=3)
    assert behind not in consilium("vectors", "exclude", name, serial)


def test_by_hand_it_is_judged_as_by_the_run_where_that_can_be(base: str) -> None:
    settings = {**JUDGED, "base": base, "publish-every": 3}
    for by, said in (("public", "public images"), ("none", "WITHOUT being judged")):
        run_in_process({**settings, "judged-by": by}, num_hospitals=3)
        run: Path = the_run()
        consilium("vectors", "take-back", run.name, "1")
        assert said in consilium("vectors", "publish", run.name)
        with Registry(run / "registry", create=False) as kept:
            (point,) = kept.log().points
        assert (json.loads(point.gate)["candidate"] is None) == (by == "none")
