"""One line of the ledger, and the hash that chains it to the one before."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from typing import Any

from common.privacy.ledger.schema import fields_of

_canonical = json.JSONEncoder(
    sort_keys=True, separators=(",", ":"), ensure_ascii=False, check_circular=False
).encode


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One line of the ledger, as it is hashed. Fields that do not apply are empty or None."""

    kind: str
    """``dataset``, ``plan``, ``reserve``, ``settle``, ``lapse`` or ``close``."""
    run: str = ""
    round: int | None = None
    dataset: str = ""
    """Fingerprint of the data set."""
    part: str = ""
    """``train`` or ``val``: whose images the mechanism reads; ``all``: both."""
    mechanism: str = ""
    unit: str = ""
    sampling_rate: float | None = None
    noise_multiplier: float | None = None
    steps: int | None = None
    pure_epsilon: float | None = None
    model: str = ""
    """Hash of the model that was trained or validated."""
    refers: int | None = None
    """The entry that this one settles or closes."""
    note: str = ""
    """More, as JSON."""
    seq: int = 0
    time: str = ""
    previous: str = ""
    hash: str = ""
    schema: int = 1
    """The version of the schema under which it was written (:mod:`common.privacy.ledger.schema`).
    Fields that came later have their defaults."""

    def content(self) -> dict[str, Any]:
        """The fields that its schema has, in their order; ValueError if there is no such schema."""
        return {name: getattr(self, name) for name in fields_of(self.schema)}

    def digest(self) -> str:
        """SHA-256 of every other field that its schema has, as canonical JSON.

        TypeError or ValueError for a field that is no number and no Unicode text, or a schema that
        there is not.
        """
        content = self.content()
        del content["hash"]
        return hashlib.sha256(_canonical(content).encode()).hexdigest()

    def is_of_its_schema(self) -> bool:
        """Whether each field that its schema lacks, and its hash leaves out, has its default."""
        known = fields_of(self.schema)
        return all(
            name in known or _same(value, DEFAULTS[name]) for name, value in vars(self).items()
        )

    def notes(self) -> dict[str, Any]:
        """:attr:`note` as a dictionary."""
        return dict(json.loads(self.note)) if self.note else {}


DEFAULTS = {name: field.default for name, field in Entry.__dataclass_fields__.items()}
"""Every field of every schema, and what an entry has in it whose schema lacks it."""

COLUMNS = tuple(DEFAULTS)
"""The fields' names, in the order in which the rows of the ledger are read."""


def _same(value: object, default: object) -> bool:
    return type(value) is type(default) and value == default
