"""One line of the ledger, and the hash that chains it to the one before."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from typing import Any

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

    def digest(self) -> str:
        """SHA-256 of every other field, as canonical JSON.

        TypeError or ValueError for a field that is no number and no Unicode text.
        """
        content = {k: v for k, v in vars(self).items() if k != "hash"}
        return hashlib.sha256(_canonical(content).encode()).hexdigest()

    def notes(self) -> dict[str, Any]:
        """:attr:`note` as a dictionary."""
        return dict(json.loads(self.note)) if self.note else {}


COLUMNS = tuple(Entry.__dataclass_fields__)
"""The fields' names: the columns of the ledger's table of entries."""
