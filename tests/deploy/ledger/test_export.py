"""`consilium ledger export`: everything but the images, over nothing that was there."""

from __future__ import annotations

import csv
import stat
from pathlib import Path

from common.privacy.ledger import Ledger
from deploy.ledger.export import COLUMNS
from tests.deploy.ledger.building import (
    LATER,
    SECOND,
    error,
    policy,
    said,
    snapshot,
    strict,
    told,
    train,
)


def test_an_export_is_private_to_its_writer_and_holds_everything_but_the_images(
    path: Path, tmp_path: Path
) -> None:
    train(path, rounds=1, settled=0)
    train(path, LATER, parts=SECOND)
    policy()
    target = tmp_path / "export.json"
    said("export", target)
    assert stat.S_IMODE(target.stat().st_mode) == 0o600
    document = strict(target.read_text())
    shown = told("show", "--entries")
    assert list(document) == ["format", "version", "exported", "ledger", "summary", "entries"]
    assert (document["format"], document["version"]) == ("consilium-ledger-export", 1)
    assert document["ledger"] == {k: shown["ledger"][k] for k in ("id", "entries", "head")}
    assert document["entries"] == shown.pop("entries")
    assert (document["summary"]["runs"], document["summary"]["data_sets"]) == (
        shown["runs"],
        shown["data_sets"],
    )
    text = target.read_text()
    assert str(tmp_path) not in text
    with Ledger(path, create=False) as ledger:
        members = ledger.chain.members("1", [])
        assert ledger.chain.meta("salt").hex() not in text
    assert members
    assert not any(image.hex() in text for _, _, image, _ in members)


def test_the_csv_form_has_every_column_and_its_summary_beside_it(
    path: Path, tmp_path: Path
) -> None:
    train(path)
    target, summary = tmp_path / "out.csv", tmp_path / "out.summary.json"
    text = said("export", target)
    assert str(target) in text and str(summary) in text
    with target.open(newline="") as file:
        rows = list(csv.DictReader(file))
    with Ledger(path, create=False) as ledger:
        kept = ledger.chain.entries()
    assert [tuple(row) for row in rows] == [COLUMNS] * len(kept)
    for row, entry in zip(rows, kept, strict=True):
        for column in COLUMNS:
            value = getattr(entry, column)
            assert row[column] == ("" if value is None else str(value))
    beside = strict(summary.read_text())
    assert (beside["ledger"]["head"], "entries" in beside) == (kept[-1].hash, False)
    assert beside["summary"]["runs"] == told("show")["runs"]
    assert {stat.S_IMODE(p.stat().st_mode) for p in (target, summary)} == {0o600}


def test_the_format_is_the_one_asked_for_then_the_endings(path: Path, tmp_path: Path) -> None:
    train(path, rounds=0)
    said("export", tmp_path / "a", "--format", "csv")
    assert (tmp_path / "a").read_text().startswith(",".join(COLUMNS))
    said("export", tmp_path / "b.csv", "--format", "json")
    assert told("verify", "--export", tmp_path / "b.csv")["entries"] == 3
    assert "no format 'xml'" in error("export", tmp_path / "c", "--format", "xml").what
    assert not (tmp_path / "c").exists()


def test_nothing_is_overwritten_unless_forced(path: Path, tmp_path: Path) -> None:
    train(path, rounds=0)
    for name in ("out.json", "out.csv", "out.summary.json"):
        (tmp_path / name).write_text("mine")
    assert "exists already" in error("export", tmp_path / "out.json").what
    assert "out.csv exists already" in error("export", tmp_path / "out.csv").what
    (tmp_path / "out.csv").unlink()
    assert "out.summary.json exists" in error("export", tmp_path / "out.csv").what
    assert not (tmp_path / "out.csv").exists()
    assert (tmp_path / "out.json").read_text() == "mine"
    said("export", tmp_path / "out.json", "--force")
    assert told("verify", "--export", tmp_path / "out.json")["entries"] == 3


def test_not_even_force_writes_over_a_ledger(path: Path, tmp_path: Path) -> None:
    train(path, rounds=0)
    other = tmp_path / "other" / "ledger.sqlite"
    train(other, rounds=0)
    link = tmp_path / "link"
    link.symlink_to(path)
    before = snapshot(tmp_path)
    for target in (path, path.with_suffix(".head"), other, link, tmp_path, Path("/dev/null")):
        refused = error("export", target, "--force")
        assert "choose another name" in refused.remedy
    assert "no plain file" in error("export", ".", "--format", "csv").what
    assert snapshot(tmp_path) == before


def test_a_place_that_cannot_be_written_is_an_error_in_two_parts(
    path: Path, tmp_path: Path
) -> None:
    train(path, rounds=0)
    (tmp_path / "file").write_text("")
    assert "cannot be written" in error("export", tmp_path / "file" / "out.json").what
