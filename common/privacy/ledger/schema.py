"""Which fields an entry of the ledger has, by the version of the schema that it was written under.

A ledger outlives many versions of consilium, and each of its entries is hashed for ever over the
fields that it had when it was written. So an entry is of one version of the schema, the ledger's
file of the newest that has written to it, and a version is never changed: a field that comes later
comes with a version of its own.

To add a field: give :class:`~common.privacy.ledger.entry.Entry` the field with its default, and
:data:`ADDED` the next number with the field's column. Nothing else: entries of earlier versions
have the default, are verified over the fields of their own version, and their file gets the column
with the first entry of the new one. A field is never renamed, retyped or taken away.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache

FIRST = (
    "kind", "run", "round", "dataset", "part", "mechanism", "unit", "sampling_rate",
    "noise_multiplier", "steps", "pure_epsilon", "model", "refers", "note", "seq", "time",
    "previous", "hash",
)  # fmt: skip
"""The fields of version 1."""

ADDED: Mapping[int, Mapping[str, str]] = {}
"""Version → the fields that came with it, and their columns in SQL (which need a default)."""

VERSION = max({1, *ADDED})
"""Under which this version of consilium writes entries."""

SCHEMA = "schema"
"""Where an entry that is not of version 1 says of which it is: hashed, too, so that it cannot be
passed off as one of another."""


@cache
def fields_of(version: int) -> tuple[str, ...]:
    """The fields of an entry of ``version``, its hash included; ValueError for no such version."""
    if type(version) is not int or not 1 <= version <= VERSION:
        raise ValueError(f"an entry is of schema {version!r}, and there is none")
    added = [name for number in range(2, version + 1) for name in ADDED[number]]
    return (*FIRST, SCHEMA, *added) if version > 1 else FIRST


def steps_to(version: int, *, since: int) -> list[str]:
    """SQL that gives the table of entries of a file of version ``since`` the columns it lacks."""
    columns = {SCHEMA: "INTEGER NOT NULL DEFAULT 1"} if since < 2 <= version else {}
    for number in range(since + 1, version + 1):
        columns |= ADDED[number]
    return [f"ALTER TABLE entries ADD COLUMN {name} {kind}" for name, kind in columns.items()]
