"""Named presets of run-config values, from ``recipes.toml`` beside this file."""

from __future__ import annotations

import tomllib
from pathlib import Path

from common.config.key import Value

RECIPES: dict[str, dict[str, Value]] = tomllib.loads(
    Path(__file__).with_name("recipes.toml").read_text()
)
"""Name → key → value; checked with all others by :meth:`common.config.RunConfig.parse`."""
