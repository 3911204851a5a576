"""Named presets of run-config values, from ``recipes.toml`` beside this file."""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from pathlib import Path

from common.config.key import Value

RECIPES: dict[str, dict[str, Value]] = tomllib.loads(
    Path(__file__).with_name("recipes.toml").read_text()
)
"""Name → key → value; checked with all others by :meth:`common.config.RunConfig.parse`."""


def written_out(values: Mapping[str, Value], defaults: Mapping[str, Value]) -> dict[str, Value]:
    """``values``, meant as they are: where one is a default that its recipe has otherwise.

    A run config always holds every key, so that a recipe's value stands wherever a key is at its
    default (:meth:`common.config.RunConfig.parse`). Whoever asks for that default beside the recipe
    means it: then the recipe's values are written out, and no recipe is named.
    """
    recipe = RECIPES.get(str(values.get("recipe", "")), {})
    meant = (k for k, v in values.items() if k in recipe and v == defaults[k] != recipe[k])
    if next(meant, None) is None:
        return dict(values)
    return {**recipe, **{k: v for k, v in values.items() if k != "recipe"}}
