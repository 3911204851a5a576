"""What a run is started with, and how its log is shown."""

from __future__ import annotations

import json
import tomllib
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from hypothesis import given
from hypothesis import strategies as st

from common.config import RunConfig, Value
from common.errors import ConfigError, ConsiliumError
from deploy.runtime.ports import free_port
from deploy.server import launch
from deploy.server.control import Control, Status
from deploy.server.run import Place, run_config, start
from tests.deploy.server.conftest import Federation


@pytest.fixture
def place(tmp_path: Path) -> Place:
    fed = Federation(tmp_path, free_port())
    for name in ("a", "b", "c", "d", "e"):
        fed.admit(name)
    return Place.of(str(fed.folder.root))


def test_a_run_knows_what_the_federation_agreed_on(place: Place) -> None:
    config = RunConfig.parse(run_config(place, {"rounds": 3}, ""))
    assert (config.dataset, config.class_names, config.rounds) == ("hospitals", ("a", "b"), 3)
    assert config.roster == str(place.federation.roster) and Path(config.roster).is_absolute()


@pytest.mark.parametrize(
    ("key", "value"),
    [("dataset", "synthetic"), ("classes", "a,c"), ("image-size", 64), ("channels", 1),
     ("roster", "/tmp/roster.json"), ("coordinator-key", "AAAA")],
)  # fmt: skip
def test_nothing_of_the_federations_can_be_set_otherwise(
    place: Place, key: str, value: Value
) -> None:
    with pytest.raises(ConfigError, match=f"--set has {key}="):
        run_config(place, {key: value}, "")


def test_setting_what_it_is_anyway_is_no_contradiction(place: Place) -> None:
    assert run_config(place, {"classes": "a,b"}, "") == run_config(place, {}, "")


def test_what_could_not_work_is_refused_before_it_is_started(place: Place) -> None:
    with pytest.raises(ConfigError, match="test-data"):
        run_config(place, {"test-data": "nowhere.npz"}, "")
    with pytest.raises(ConfigError, match="num-shares 7"):
        run_config(place, {"num-shares": 7, "reconstruction-threshold": 5, "min-cohort": 5}, "")
    with pytest.raises(ConfigError, match="no server runs"):
        start(place, run_config(place, {}, ""), verbose=False)


def test_test_data_is_found_from_wherever_the_server_works(
    place: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "own.npz").write_bytes(b"")
    monkeypatch.chdir(tmp_path)
    assert run_config(place, {"test-data": "own.npz"}, "")["test-data"] == str(tmp_path / "own.npz")


def test_a_resumed_run_has_the_values_it_had_and_what_is_set_over_them(place: Place) -> None:
    run = "20260301-120000-0123abcd"
    before = RunConfig.parse(run_config(place, {"rounds": 7, "seed": 5}, "")).as_dict()
    directory = place.runs() / run
    directory.mkdir(parents=True)
    (directory / "config.json").write_text(json.dumps(before))
    values = run_config(place, {"rounds": 9}, run)
    assert values == before | {"rounds": 9, "resume": run}
    assert values == run_config(place, {"rounds": 9, "resume": run}, "")
    (directory / "config.json").write_text(json.dumps(before | {"classes": "x,y"}))
    with pytest.raises(ConfigError, match=r"the run .* has classes="):
        run_config(place, {}, run)
    with pytest.raises(ConsiliumError):
        run_config(place, {}, "../../etc")


def test_a_class_with_a_comma_is_no_two_classes(place: Place) -> None:
    text = place.federation.settings.read_text()
    place.federation.settings.write_text(text.replace('"a"', '"a, b"'))
    with pytest.raises(ConfigError, match="comma"):
        run_config(place, {}, "")


values = st.one_of(
    st.booleans(), st.integers(-(2**31), 2**31), st.floats(allow_nan=False, allow_infinity=False),
    st.text(st.characters(exclude_categories=["Cs"])),
)  # fmt: skip


@given(st.dictionaries(st.from_regex(r"[a-z][a-z-]*", fullmatch=True), values))
def test_every_value_reaches_flower_as_it_is(config: dict[str, Value]) -> None:
    assert tomllib.loads(launch.toml(config)) == config


@given(st.lists(st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\r"))))
def test_lines_are_whole_however_the_log_is_cut(pieces: list[str]) -> None:
    seen: list[str] = []
    lines = launch.Lines(verbose=False, seen=seen.append)
    for piece in pieces:
        lines.add(piece)
    lines.end()
    whole = "".join(pieces)
    assert "\n".join(seen) == whole.removesuffix("\n")


class Breaking(Control):
    """A server that breaks off after each piece; the log is the server's, with its times."""

    def __init__(self, log: list[tuple[str, float]], breaks: Iterator[bool]) -> None:
        self._log, self._breaks, self._ended = log, breaks, False

    def __exit__(self, *error: object) -> None:
        pass

    def status(self, run: int) -> Status | None:
        return Status("finished:completed" if self._ended else "running", "") if run else None

    def log(self, run: int, after: float) -> Iterator[tuple[str, float]]:
        for text, time in self._log:
            if time > after:
                yield text, time
                if next(self._breaks, False):
                    raise httpx.ReadError("gone")
        self._ended = True


def test_a_log_that_breaks_off_goes_on_without_a_line_twice(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(launch, "AGAIN", 0.0)
    server = Breaking([(f"line {i}\n", float(i)) for i in range(1, 9)], iter([False, True] * 3))
    status = launch.follow(lambda: server, 1, launch.Lines(verbose=False))
    assert status.text == "finished:completed"
    shown = [line for line in capsys.readouterr().out.splitlines() if line.startswith("line")]
    assert shown == [f"line {i}" for i in range(1, 9)]


def test_a_run_that_is_not_there_and_a_server_that_stays_away_are_told(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(launch, "AGAIN", 0.01)
    with pytest.raises(ConsiliumError, match="knows no run"):
        launch.follow(lambda: Breaking([], iter([])), 0, launch.Lines(verbose=False))

    def away() -> Control:
        raise httpx.ConnectError("nobody")

    with pytest.raises(ConsiliumError, match="not answered"):
        launch.follow(away, 1, launch.Lines(verbose=False), patience=0.05)
