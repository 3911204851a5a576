"""`consilium ledger verify`: a ledger that was changed is refused, by every command."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest

from common.privacy.ledger import Ledger, LedgerError
from tests.deploy.ledger.building import LATER, RUN, error, said, spoil, told, train

CONSILIUM = str(Path(sys.executable).parent / "consilium")


def test_verify_prints_the_head_to_note_down(path: Path) -> None:
    train(path, rounds=1)
    with Ledger(path, create=False) as ledger:
        number, head = ledger.chain.head()
        identity = ledger.chain.meta("id").decode()
    assert f"is whole: {number} entries" in said("verify")
    assert f"note it down: {head}" in said("verify")
    assert told("verify") == {
        "ledger": {"path": str(path), "id": identity},
        "entries": number,
        "head": head,
        "head_noted": True,
        "noted_entry": None,
    }
    train(path, LATER, rounds=1)
    assert told("verify", "--head", f" {head.upper()} ")["noted_entry"] == number
    assert told("verify", "--head", "0" * 64)["noted_entry"] == 0
    assert "entries were removed" in error("verify", "--head", "1" * 64).what
    assert "is no head" in error("verify", "--head", head[:12]).what


def test_a_missing_head_is_told(path: Path) -> None:
    train(path, rounds=0)
    assert "warning" not in said("verify")
    path.with_suffix(".head").unlink()
    assert "warning: no head" in said("verify")
    assert told("verify")["head_noted"] is False


CHANGED = "UPDATE entries SET noise_multiplier = 99 WHERE mechanism = 'sampled-gaussian'"
STATEMENTS = {
    "entry changed": CHANGED,
    "entries cut off": "DELETE FROM entries WHERE seq = (SELECT max(seq) FROM entries)",
    "entry taken out": "DELETE FROM entries WHERE seq = 2",
    "entry of another type": "UPDATE entries SET note = x'ff' WHERE seq = 2",
    "image changed": "UPDATE members SET image = zeroblob(16) WHERE rowid = 3",
    "image of another type": "UPDATE members SET image = 0 WHERE rowid = 3",
    "image in another part": "UPDATE members SET part = 'test' WHERE rowid = 3",
    "images taken out": "DELETE FROM members",
    "table taken out": "DROP TABLE members",
}


def emptied(path: Path) -> None:
    path.write_bytes(b"")


def overwritten(path: Path) -> None:
    path.write_bytes(b"no database at all, but long enough for a header" * 40)


def half(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


DAMAGE: dict[str, Callable[[Path], None]] = {
    "gone": Path.unlink,
    "emptied": emptied,
    "overwritten": overwritten,
    "half": half,
} | {name: partial(spoil, statement=statement) for name, statement in STATEMENTS.items()}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_ledger_is_refused_by_every_command(
    path: Path, tmp_path: Path, damage: str
) -> None:
    train(path, rounds=1)
    DAMAGE[damage](path)
    out = tmp_path / "export.json"
    for arguments in (["show"], ["verify"], ["verify", "--json"], ["export", out],
                      ["close", RUN, "--yes"]):  # fmt: skip
        found = error(*arguments)
        assert isinstance(found, LedgerError), found
        assert str(path) in found.what and found.remedy
    assert not out.exists()


def test_errors_reach_the_shell_in_two_parts(path: Path) -> None:
    train(path, rounds=1)

    def shell(*arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [CONSILIUM, "ledger", *arguments], capture_output=True, text=True, check=False
        )

    whole = shell("verify")
    assert (whole.returncode, whole.stderr) == (0, "")
    assert "note it down: " in whole.stdout
    spoil(path, CHANGED)
    damaged = shell("verify", "--json")
    assert (damaged.returncode, damaged.stdout) == (1, "")
    assert "is damaged: entry 4 was changed" in damaged.stderr
    assert "what to do: restore it from a backup" in damaged.stderr
    assert "Traceback" not in damaged.stderr


def test_the_command_itself_loads_nothing_heavy() -> None:
    heavy = "{'torch', 'opacus', 'scipy', 'numpy', 'flwr', 'dp_accounting'}"
    code = f"import sys, deploy.cli; print(sorted({heavy} & set(sys.modules)))"
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert answer.stdout.strip() == "[]", answer.stderr
