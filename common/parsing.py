"""JSON and TOML from elsewhere: parsers that end in a ValueError, whatever they are fed.

Those of the standard library stop at a mistake, but not always with the error that they document:
nesting ends in a RecursionError. (Tensors: :mod:`common.tensors`.)
"""

from __future__ import annotations

import json
import tomllib
from collections.abc import Callable, Sequence
from typing import Any

Pairs = Callable[[list[tuple[str, Any]]], Any]


def parse_json(data: bytes | str, *, object_pairs_hook: Pairs | None = None) -> Any:
    """What a JSON text says; ValueError for whatever is none. Bytes are UTF-8 and nothing else."""
    text = data.decode() if isinstance(data, bytes) else data
    return _parsed(lambda: json.loads(text, object_pairs_hook=object_pairs_hook))


def parse_toml(data: bytes | str) -> dict[str, Any]:
    """What a TOML text says; ValueError for whatever is none."""
    text = data.decode() if isinstance(data, bytes) else data
    return dict(_parsed(lambda: tomllib.loads(text)))


def _parsed(parse: Callable[[], Any]) -> Any:
    try:
        return parse()
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    except (AttributeError, IndexError, KeyError, OverflowError, TypeError) as error:
        # None is documented, and none is known; a parser's own fault is not the user's.
        raise ValueError(f"it cannot be parsed ({type(error).__name__})") from None


def unique_pairs(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object in which no field stands twice; ValueError otherwise.

    Parsers disagree on which of two equal keys counts.
    """
    if len({key for key, _ in pairs}) != len(pairs):
        raise ValueError("a field stands twice")
    return dict(pairs)
