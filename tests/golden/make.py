"""``python -m tests.golden.make [FORMAT …]``: make the golden files of the formats as they are now.

A file that is there already is never changed: what it holds was written by some version that
hospitals may still have. So a format that is changed gets a new version first (its own ``VERSION``,
or ``WIRE``), and then a new folder by this command. ``--check`` writes nothing, and says which
files the code of today would write otherwise.
"""

from __future__ import annotations

import argparse
import filecmp
import shutil
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from common.messages import WIRE
from common.privacy.ledger import schema
from common.secagg import wire as secagg
from tests.golden import files, records
from tests.golden.fixed import FOLDER


@dataclass(frozen=True)
class Format:
    """One format: the folder of today's version, and what makes its files."""

    version: str
    write: Callable[[Path], None]
    same: bool = True
    """Whether today's code must write these very bytes: a form that others compare, sign or parse.

    Not so for what holds random signatures, is a database, or a table whose entries have defaults.
    """


FORMATS = {
    "wire": Format(str(WIRE), records.write_wire),
    "secagg": Format(str(secagg.VERSION), records.write_secagg),
    "ledger": Format(str(schema.VERSION), files.write_ledger, same=False),
    "ledger-export": Format("1", files.write_export, same=False),
    "base": Format("1", files.write_base_file),
    "base-note": Format("1", files.write_base_note),
    "vector": Format("1", files.write_vector),
    "withdrawal": Format("1", files.write_withdrawal),
    "outbox": Format("1", files.write_outbox),
    "registry": Format("1", files.write_registry, same=False),
    "ensemble": Format("1", files.write_ensemble),
    "identities": Format("1", files.write_identities),
    "judging": Format("1", files.write_judging),
    "federation": Format("2", files.write_federation, same=False),
    "hospital": Format("1", files.write_hospital, same=False),
    "hospital-memory": Format("2", files.write_hospital_memory, same=False),
    "egress": Format("1", files.write_egress, same=False),
    "run": Format("1", files.write_run, same=False),
    "nodes": Format("1", files.write_nodes),
    "prior": Format("2", files.write_prior, same=False),
}
"""By the name of its folder."""


def latest(name: str) -> Path:
    """The folder of today's version of a format."""
    return FOLDER / name / FORMATS[name].version


def differing(name: str) -> list[str]:
    """The files of today's version that today's code would write otherwise, or lacks."""
    with tempfile.TemporaryDirectory() as place:
        FORMATS[name].write(Path(place))
        made = {p.relative_to(place): p for p in Path(place).rglob("*") if p.is_file()}
        there = {p.relative_to(latest(name)): p for p in latest(name).rglob("*") if p.is_file()}
        return sorted(
            str(path)
            for path in made.keys() | there.keys()
            if path not in made
            or path not in there
            or not filecmp.cmp(made[path], there[path], shallow=False)
        )


def main(arguments: list[str] | None = None) -> int:
    """Make what is not there; 1 where something is there and today's code writes it otherwise."""
    parser = argparse.ArgumentParser(prog="python -m tests.golden.make", description=__doc__)
    parser.add_argument("formats", nargs="*", metavar="FORMAT", help=", ".join(FORMATS))
    parser.add_argument("--check", action="store_true")
    given = parser.parse_args(arguments)
    wrong = 0
    for name in given.formats or FORMATS:
        folder = latest(name)
        if not folder.exists() and not given.check:
            with tempfile.TemporaryDirectory() as place:
                FORMATS[name].write(Path(place))
                shutil.copytree(place, folder)
            print(f"made {folder.relative_to(FOLDER)}")
        elif FORMATS[name].same and (found := differing(name)):
            wrong += 1
            print(f"{folder.relative_to(FOLDER)} is written otherwise today: {', '.join(found)}")
    if wrong:
        print("give each of these formats a new version, then run this again", file=sys.stderr)
    return int(wrong > 0)


if __name__ == "__main__":
    sys.exit(main())
