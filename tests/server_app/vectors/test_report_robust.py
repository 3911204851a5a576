"""A report of vectors from files that are missing, torn, hostile or large."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from markupsafe import escape

from tests.server_app.running import HOSTILE
from tests.server_app.test_report import Files, page, words, write_files
from tests.server_app.vectors.report_sample import arrival, base, changed, make_sample_run, serial


def test_without_a_summary_the_test_images_choose_nothing(tmp_path: Path) -> None:
    files = make_sample_run(tmp_path)
    (tmp_path / "summary.json").unlink()
    flattered = [r | {"test": r["test"] | {"accuracy": 0.999}} if r.get("version") == 0
                 and r["event"] == "base" else r for r in files["metrics.jsonl"]]  # fmt: skip
    write_files(tmp_path, {"metrics.jsonl": flattered})
    seen = words(tmp_path)
    assert "unfinished" in seen and "Test accuracy 92.30% Base 2, the best by validation" in seen


def test_lines_that_a_resumed_run_made_anew_stand_where_they_belong(tmp_path: Path) -> None:
    """A kill loses a line; the registry gives it back at the end of the file, with its own time."""
    files = make_sample_run(tmp_path)
    before = page(tmp_path)
    lines = files["metrics.jsonl"]
    write_files(tmp_path, {"metrics.jsonl": [r for r in lines if r.get("serial") != serial(1)]
                           + [lines[1]]})  # fmt: skip
    after = page(tmp_path)
    mask = re.compile("[0-9a-f]{64}")  # the file itself is another
    assert mask.sub("", before) == mask.sub("", after)


@pytest.mark.parametrize("reason", ["no hospital was there within 5 s", None])
def test_a_failed_run_without_any_arrival_has_a_report(tmp_path: Path, reason: str | None) -> None:
    summary: Files = {"mode": "vectors", "status": "failed", "reason": reason, "bases": 0,
               "by_hospital": {}, "influence": None, "privacy": "none"}  # fmt: skip
    write_files(tmp_path, {"summary.json": summary, "metrics.jsonl": [base(0, 0, 0.9)]})
    seen = words(tmp_path)
    assert "This run failed." in seen and (reason or "No reason was recorded") in seen
    assert seen.count("No vector arrived.") == 2
    assert "Vectors 0 0 late" in seen


def test_the_mode_is_known_from_whichever_file_is_left(tmp_path: Path) -> None:
    files = make_sample_run(tmp_path)
    for kept in ("summary.json", "config.json", "metrics.jsonl"):
        folder = tmp_path / kept.partition(".")[0]
        write_files(folder, {kept: files[kept]})
        assert "Training by task vectors" in words(folder)


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_names_stay_text(tmp_path: Path, name: str) -> None:
    """Whoever names a hospital, a serial, a code, a reason, a class or a key writes no markup."""
    make_sample_run(tmp_path)
    for file in tmp_path.iterdir():
        content = file.read_text("utf-8")
        for old in ("Aachen", "Coimbra", serial(6), "vector-norm", "registry-gate", "c0ffee",
                    "its norm 9.1 is above 6.25", "published", "accepted", "bloodmnist", "flwr",
                    "publish-every", "basophil", "iid"):  # fmt: skip
            content = content.replace(json.dumps(old), json.dumps(name))
        file.write_text(content, "utf-8")
    found = page(tmp_path)
    assert "<script" not in found and "<img" not in found
    assert found.count("<svg") == found.count("</svg>") == 5
    assert found.count("</style>") == 1
    assert not re.search("[\x00-\x08\x0b-\x1f\ud800-\udfff]", found)
    visible = " ".join(re.sub("[\x00\x1b\ud800\ufffe]", "\ufffd", name).split())
    assert found.count(str(escape(visible))) > 8


@pytest.mark.parametrize("left_out", [*range(16)])
def test_any_subset_of_the_files_makes_a_report(tmp_path: Path, left_out: int) -> None:
    files = make_sample_run(tmp_path)
    for bit, name in enumerate(files):
        if left_out >> bit & 1:
            (tmp_path / name).unlink()
    seen = words(tmp_path)
    assert ("unfinished" in seen) == (not (tmp_path / "summary.json").exists())
    assert "Limits of these figures" in seen


@pytest.mark.parametrize(
    "value",
    [None, "x", -1, 1e308, float("nan"), {}, [[1, "x"]], {"rows": [{}], "x": {"states": 3}}],
)
def test_a_field_that_is_missing_or_wrong_never_stops_the_report(
    tmp_path: Path, value: object
) -> None:
    """Each field in its turn, and all of a line or a file at once."""
    good = make_sample_run(tmp_path)
    for name in ("summary.json", "config.json"):
        write_files(tmp_path, {name: dict.fromkeys(good[name], value) | {"mode": "vectors"}})
        assert "Training by task vectors" in words(tmp_path)
        write_files(tmp_path, {name: good[name]})
    spoiled = [dict.fromkeys(r, value) | {"event": r["event"]} for r in good["metrics.jsonl"]]
    write_files(tmp_path, {"metrics.jsonl": spoiled})
    assert "Training by task vectors" in words(tmp_path)
    one_by_one = [r | {k: value} for r in good["metrics.jsonl"] for k in r if k != "event"]
    write_files(tmp_path, {"metrics.jsonl": one_by_one})
    assert "Training by task vectors" in words(tmp_path)


def test_lines_that_are_torn_or_of_an_unknown_kind_are_reported(tmp_path: Path) -> None:
    make_sample_run(tmp_path)
    with (tmp_path / "metrics.jsonl").open("a") as stream:
        stream.write('{"event": "<b>new</b>", "time": 3}\n{"event": "arri')
    seen = words(tmp_path)
    assert "metrics.jsonl: 1 of 17 records unreadable and left out" in seen
    assert "lines that this version cannot show: 1 × <b>new</b>" in seen
    assert "Vectors 6 1 late" in seen


def test_files_that_disagree_are_pointed_out(tmp_path: Path) -> None:
    make_sample_run(tmp_path)
    assert "not in order" not in words(tmp_path)
    changed(tmp_path, "summary.json", test_accuracy=0.99, by_hospital={"A": {"vectors": 9}})
    seen = words(tmp_path)
    assert "disagree on accuracy: 0.99 and 0.923" in seen
    assert "summary.json counts 9 vectors that were not taken back, and metrics.jsonl 5" in seen


def test_a_run_of_months_stays_a_page_and_says_what_it_leaves_out(tmp_path: Path) -> None:
    files = make_sample_run(tmp_path)
    names = [f"site {i:02d}" for i in range(61)]
    many = [arrival(1 + i % 600, 100 + i, names[i % 61]) for i in range(2000)]
    write_files(tmp_path, {"metrics.jsonl": files["metrics.jsonl"][:1] + many})
    changed(tmp_path, "summary.json", by_hospital=None, influence=None)
    seen = words(tmp_path)
    assert "Vectors 2,000" in seen and "1,500 earlier ones are in metrics.jsonl" in seen
    assert "and 21 more, the largest 3.46" in seen
    assert "The drawing shows the first hospitals" in seen
    assert len(page(tmp_path)) < 3_000_000
