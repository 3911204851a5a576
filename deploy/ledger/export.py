"""The whole ledger but its members, for an audit, and how to check that without the ledger.

An export is ``format`` ``consilium-ledger-export``, ``version`` 1, ``exported`` (UTC), ``ledger``
(``id``, ``entries``, ``head``), ``entries``, and ``summary``: both as :mod:`deploy.ledger.view`
describes them, without paths. It is checked without the ledger (:func:`verify_export` does it):

1. ``seq`` of the entries counts 1, 2, 3, …;
2. the ``hash`` of each is the SHA-256, in hexadecimal, of the UTF-8 text of its other fields
   as JSON: keys sorted, ``,`` and ``:`` without spaces, nothing escaped that need not be. They are
   17, and more in an entry that has ``schema``, the version of the ledger's schema it is of;
3. its ``previous`` is the ``hash`` of the entry before. The first one's comes from the ledger's
   secret salt: it is taken as given;
4. ``ledger.entries`` and ``ledger.head`` are those of the last.

Anybody can compute such a chain, so it is worth what the head is: compare that with one that was
noted when the ledger itself was verified. The summary is not in the chain.
"""

from __future__ import annotations

import csv
import io
import math
import os
from collections.abc import Iterable
from datetime import datetime
from pathlib import Path

from common.errors import ConfigError
from common.files import atomic_write
from common.parsing import parse_json
from common.privacy.ledger import Entry, Ledger, LedgerError
from common.privacy.ledger.chain import GENESIS
from common.privacy.ledger.schema import SCHEMA, VERSION, fields_of
from deploy.ledger.choice import Place, Policy, readable
from deploy.ledger.view import Document, as_json, describe, iso

EXPORT = "consilium-ledger-export"
COLUMNS = fields_of(VERSION)
_NUMBERS = ("sampling_rate", "noise_multiplier", "pure_epsilon")


def exported(ledger: Ledger, place: Place, policy: Policy, now: datetime) -> Document:
    """The document that the module's text describes."""
    summary = describe(ledger, place, policy, now, entries=True)
    entries = summary.pop("entries")
    told = summary["ledger"]
    del told["path"], summary["policy"]["path"]
    return {
        "format": EXPORT,
        "version": 1,
        "exported": iso(now),
        "ledger": {name: told[name] for name in ("id", "entries", "head")},
        "summary": summary,
        "entries": entries,
    }


def as_csv(entries: Iterable[Document]) -> str:
    """One line an entry, after a line with the columns' names; nothing for what does not apply."""
    text = io.StringIO()
    writer = csv.DictWriter(text, COLUMNS)
    writer.writeheader()
    writer.writerows(entries)
    return text.getvalue()


def targets_of(file: Path, format: str | None) -> list[Path]:
    """The files of an export in ``format`` (``json``, ``csv``; None: by the file's ending)."""
    kind = format or ("csv" if file.suffix.lower() == ".csv" else "json")
    if kind not in ("json", "csv"):
        raise ConfigError(f"there is no format '{kind}'", "use json or csv")
    return [file] if kind == "json" else [file, file.parent / f"{file.stem}.summary.json"]


def check_target(target: Path, ledger: Path, force: bool) -> None:
    """Refuse to write over what exists; over a ledger, or what is no file, even by ``force``."""
    if not os.path.lexists(target):
        return
    with readable():
        if target.exists() and not target.is_file():
            raise ConfigError(f"{target} is no plain file", "choose another name")
        if not force:
            raise ConfigError(f"{target} exists already", "choose another name, or add --force")
        own = [p for p in (ledger, ledger.with_suffix(".head")) if p.exists()]
        if target.exists() and (any(p.samefile(target) for p in own) or _is_database(target)):
            raise ConfigError(f"{target} is a ledger's own file", "choose another name")


def _is_database(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(16) == b"SQLite format 3\0"


def write(document: Document, targets: list[Path]) -> None:
    """Write an export to :func:`targets_of`'s files, for their owner only; ConfigError if not."""
    if len(targets) == 1:
        contents = [as_json(document) + "\n"]
    else:
        rest = {name: value for name, value in document.items() if name != "entries"}
        contents = [as_csv(document["entries"]), as_json(rest) + "\n"]
    for target, content in zip(targets, contents, strict=True):
        try:
            atomic_write(target, content, mode=0o600)
        except OSError as error:
            raise ConfigError(
                f"{target} cannot be written: {error.strerror}", "choose another place"
            ) from None


def verify_export(path: Path) -> tuple[str, list[Entry]]:
    """The ledger's id and the entries of an export whose chain is whole.

    LedgerError naming the first entry that is wrong; ConfigError for a file that is no export.
    """
    document = _read(path)
    previous = GENESIS
    entries: list[Entry] = []
    for number, row in enumerate(document["entries"], start=1):
        if not isinstance(row, dict) or set(row) != set(_fields_of(row, path)):
            raise _tampered(path, f"entry {number} does not have an entry's fields")
        numbers = {name: math.inf for name in _NUMBERS if row[name] == "inf"}
        entry = Entry(**(row | numbers))
        if entry.seq != number:
            raise _tampered(path, f"entry {number} is missing")
        if not _is_own_hash(entry):
            raise _tampered(path, f"entry {number} was changed after it was written")
        if entries and entry.previous != previous:
            raise _tampered(path, f"entry {number} does not follow from the one before")
        previous = entry.hash
        entries.append(entry)
    told = document["ledger"]
    if (told["entries"], told["head"]) != (len(entries), previous):
        raise _tampered(path, "its last entry is not the one that it names: entries were cut off")
    return str(told["id"]), entries


def _fields_of(row: Document, path: Path) -> tuple[str, ...]:
    """The fields that an entry of the schema that ``row`` names has."""
    schema = row.get(SCHEMA, 1)
    if type(schema) is int and schema > VERSION:
        raise ConfigError(
            f"the export {path} has entries of schema {schema}; this version of consilium reads "
            f"schemas up to {VERSION}",
            "use the version of consilium that wrote it, or a later one",
        )
    try:
        return fields_of(schema)
    except (TypeError, ValueError):
        return ()


def _is_own_hash(entry: Entry) -> bool:
    try:
        return entry.hash == entry.digest()
    except ValueError:  # text that is no Unicode
        return False


def _read(path: Path) -> Document:
    remedy = "give a file of `consilium ledger export FILE --format json`"
    try:
        document = parse_json(path.read_bytes())
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror}", remedy) from None
    except ValueError:
        raise ConfigError(f"{path} is no JSON", remedy) from None
    if not isinstance(document, dict) or document.get("format") != EXPORT:
        raise ConfigError(f"{path} is no export of a privacy ledger", remedy)
    if document.get("version") != 1:
        raise ConfigError(
            f"the export {path} is of version {document.get('version')!r}, not 1",
            "use the version of consilium that wrote it, or a later one",
        )
    ledger = document.get("ledger")
    whole = isinstance(ledger, dict) and {"id", "entries", "head"} <= set(ledger)
    if not whole or not isinstance(document.get("entries"), list):
        raise _tampered(path, "its entries or what it says of the ledger is missing")
    return document


def _tampered(path: Path, what: str) -> LedgerError:
    return LedgerError(
        f"the export {path} is not as it was written: {what}",
        "ask the hospital for a fresh export, and find out who changed this one",
    )
