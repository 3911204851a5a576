"""Values as they may be, not as they should be: what is no number, text or object becomes none.

A report is made of files that a killed run, another version or a stranger may have written.
"""

from __future__ import annotations

import json
import math
import unicodedata
from typing import Any

from server_app.reporting.formats import MISSING

Json = dict[str, Any]


def number(value: object) -> float | None:
    """Return a finite number, or None for anything else."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return None
    try:
        return float(value) if math.isfinite(value) else None
    except OverflowError:
        return None


def count(value: object) -> int | None:
    """Return a sensible whole number that is not negative, or None."""
    found = number(value)
    return int(found) if found is not None and 0 <= found < 1e12 else None


def share(value: object) -> float | None:
    """Return a number from 0 to 1, such as an accuracy, or None."""
    found = number(value)
    return found if found is not None and 0 <= found <= 1 else None


def loss_of_privacy(value: object) -> float | None:
    """Return an ε: infinity is a meaningful answer here, a negative number is none."""
    if value == math.inf:
        return math.inf
    found = number(value)
    return found if found is not None and found >= 0 else None


def text(value: object) -> str:
    """Return readable text: no control or bidirectional marks, none that XML can't carry."""
    if value is None:
        return MISSING
    if isinstance(value, bool):
        return "yes" if value else "no"
    plain = value if isinstance(value, str) else json.dumps(value, default=str)
    bad = ("Cc", "Cf", "Cs", "Cn")
    line = " ".join(plain.split())
    return "".join("\ufffd" if unicodedata.category(c) in bad else c for c in line)


def mapping(value: object) -> Json:
    """Return the object, or an empty one."""
    return value if isinstance(value, dict) else {}


def objects(value: object) -> list[Json]:
    """Return the objects in a list."""
    return [item for item in value if isinstance(item, dict)] if isinstance(value, list) else []


def names(value: object) -> list[str]:
    """Return the items of a list as text."""
    return [text(item) for item in value] if isinstance(value, list) else []


def pairs(value: object) -> list[tuple[str, str]]:
    """Return an object's keys and values as text."""
    return [(text(key), text(item)) for key, item in mapping(value).items()]


def claims_privacy(declared: object) -> bool | None:
    """Whether a declaration of ``privacy`` claims any; None if nothing was declared."""
    if isinstance(declared, str):
        word = declared.strip().lower()
        return bool(word) and not word.startswith(("no", "off", "false", "disabled"))
    return declared if isinstance(declared, bool) else None
