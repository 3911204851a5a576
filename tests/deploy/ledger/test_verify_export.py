"""`consilium ledger verify --export`: an export is checked without the ledger."""

from __future__ import annotations

import hashlib
import json
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from common.errors import ConfigError
from common.privacy.ledger import LedgerError
from deploy.ledger.export import COLUMNS, verify_export
from tests.deploy.ledger.building import error, home, said, told, train

VALUES = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(allow_nan=False), st.text(max_size=8),
    st.sampled_from(["inf", "\ud800", "0" * 64]),
    st.lists(st.integers(), max_size=2),
    st.dictionaries(st.text(max_size=3), st.none(), max_size=2),
)  # fmt: skip


def test_an_export_is_verified_without_the_ledger_by_the_written_procedure(path: Path) -> None:
    train(path)
    said("export", path.parent / "export.json")
    document = json.loads((path.parent / "export.json").read_text())
    previous = document["entries"][0]["previous"]
    for number, entry in enumerate(document["entries"], start=1):
        claimed = entry.pop("hash")
        text = json.dumps(entry, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
        assert hashlib.sha256(text.encode("utf-8")).hexdigest() == claimed
        assert (entry["seq"], entry["previous"]) == (number, previous)
        previous = claimed
    assert document["ledger"]["head"] == previous


def test_verifying_an_export_needs_no_ledger(path: Path, tmp_path: Path) -> None:
    train(path, rounds=1)
    target = tmp_path / "export.json"
    said("export", target)
    head = told("verify")["head"]
    identity = told("verify")["ledger"]["id"]
    shutil.rmtree(home())
    assert told("verify", "--export", target, "--head", head) == {
        "ledger": {"export": str(target), "id": identity},
        "entries": 5,
        "head": head,
        "head_noted": None,
        "noted_entry": 5,
    }
    text = said("verify", "--export", target)
    assert f"its head: {head}" in text and "summary is not in the chain" in text
    assert "does not hold the head" in error("verify", "--export", target, "--head", "1" * 64).what


@pytest.fixture(scope="module")
def document(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """One export."""
    directory = tmp_path_factory.mktemp("export")
    train(directory / "ledger.sqlite", rounds=1)
    said("export", directory / "export.json", "--home", directory)
    return dict(json.loads((directory / "export.json").read_text()))


@given(data=st.data(), column=st.sampled_from(COLUMNS), value=VALUES)
def test_any_change_of_an_exported_entry_is_noticed(
    document: dict[str, Any], data: st.DataObject, column: str, value: object
) -> None:
    number = data.draw(st.integers(0, len(document["entries"]) - 1))
    entries = [dict(entry) for entry in document["entries"]]
    same = entries[number][column] == value and type(entries[number][column]) is type(value)
    entries[number][column] = value
    with tempfile.TemporaryDirectory() as directory:
        target = Path(directory) / "export.json"
        target.write_text(json.dumps(document | {"entries": entries}))
        if same:
            verify_export(target)
        else:
            with pytest.raises(LedgerError):
                verify_export(target)


@pytest.mark.parametrize(
    ("tamper", "complaint"),
    [
        (lambda d: d["entries"].pop(), "cut off"),
        (lambda d: d["entries"].pop(0), "entry 1 is missing"),
        (lambda d: d["entries"].pop(2), "entry 3 is missing"),
        (lambda d: d["entries"].insert(1, d["entries"][0]), "entry 2 is missing"),
        (lambda d: d["entries"].clear(), "cut off"),
        (lambda d: d["entries"][1].pop("note"), "entry 2 does not have"),
        (lambda d: d["entries"][1].update(more=1), "entry 2 does not have"),
        (lambda d: d["entries"].append("text"), "entry 6 does not have"),
        (lambda d: d["ledger"].update(head="0" * 64), "cut off"),
        (lambda d: d["ledger"].pop("id"), "missing"),
        (lambda d: d.pop("entries"), "missing"),
        (lambda d: d.update(version=2), "version 2"),
        (lambda d: d.update(format="other"), "is no export"),
    ],
)
def test_a_tampered_export_is_refused(
    document: dict[str, Any],
    tmp_path: Path,
    tamper: Callable[[dict[str, Any]], object],
    complaint: str,
) -> None:
    mine = json.loads(json.dumps(document))
    tamper(mine)
    target = tmp_path / "tampered.json"
    target.write_text(json.dumps(mine))
    assert complaint in error("verify", "--export", target).what


def test_an_entry_moved_over_from_another_ledger_does_not_follow(
    document: dict[str, Any], tmp_path: Path
) -> None:
    train(tmp_path / "other" / "ledger.sqlite", rounds=1)
    said("export", tmp_path / "other.json", "--home", tmp_path / "other")
    mixed = json.loads((tmp_path / "other.json").read_text())
    mixed["entries"][:3] = document["entries"][:3]
    (tmp_path / "mixed.json").write_text(json.dumps(mixed))
    refused = error("verify", "--export", tmp_path / "mixed.json")
    assert "entry 4 does not follow" in refused.what


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"\xff\xfe", b"[" * 100_000])
def test_what_is_no_export_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "file").write_bytes(content)
    for name in ("file", "nowhere", "."):
        refused = error("verify", "--export", tmp_path / name)
        assert isinstance(refused, ConfigError) and "export" in refused.remedy
