"""What one run-config key is: its type, default, range and meaning, and how a value is checked."""

from __future__ import annotations

import difflib
import math
from dataclasses import dataclass
from typing import Any

from common.errors import ConfigError

Value = bool | int | float | str


@dataclass(frozen=True, kw_only=True)
class Key:
    """One run-config key: its type is its default's type."""

    name: str
    default: Value
    meaning: str
    choices: tuple[str, ...] = ()
    low: float = -math.inf
    high: float = math.inf
    low_open: bool = False
    """Whether ``low`` itself is excluded."""
    high_open: bool = False

    @property
    def attribute(self) -> str:
        """The key's name as a Python attribute of :class:`RunConfig`."""
        return self.name.replace("-", "_")

    @property
    def kind(self) -> str:
        """``bool``, ``int``, ``float`` or ``str``."""
        return type(self.default).__name__

    @property
    def allowed(self) -> str:
        """The allowed values, for people."""
        if self.choices:
            shown = ", ".join(choice or "(none)" for choice in self.choices)
            return shown if len(self.choices) < 8 else "see meaning"
        if self.kind == "bool":
            return "true, false"
        if self.kind == "str":
            return "text"
        left = ">" if self.low_open else "≥"
        right = "<" if self.high_open else "≤"
        parts = []
        if self.low > -math.inf:
            parts.append(f"{left} {self.low:g}")
        if self.high < math.inf:
            parts.append(f"{right} {self.high:g}")
        return ", ".join(parts) or "any"

    def check(self, value: Any) -> Value:
        """Return ``value`` in this key's type; ConfigError if it is not of it or out of range.

        An int is accepted where a float is asked for (TOML writes ``6`` for ``6.0``); nothing
        else is converted, so that ``"true"`` never passes for ``true``.
        """
        if self.kind == "float" and isinstance(value, int) and not isinstance(value, bool):
            value = float(value)
        if type(value) is not type(self.default):
            raise ConfigError(
                f"run-config key '{self.name}' is {value!r} ({type(value).__name__}), "
                f"but must be of type {self.kind}",
                f"set {self.name} to a {self.kind}, for example {self.name}={self.as_toml()}",
            )
        if self.choices and value not in self.choices:
            close = difflib.get_close_matches(str(value), self.choices, n=1)
            hint = f"did you mean '{close[0]}'? " if close else ""
            raise ConfigError(
                f"run-config key '{self.name}' is {value!r}, which is not one of its values",
                f"{hint}use one of: {', '.join(self.choices)}",
            )
        if isinstance(value, int | float) and not isinstance(value, bool):
            below = value <= self.low if self.low_open else value < self.low
            above = value >= self.high if self.high_open else value > self.high
            if below or above or math.isnan(value):
                raise ConfigError(
                    f"run-config key '{self.name}' is {value}, out of its range",
                    f"set {self.name} to a value that is {self.allowed}",
                )
        return value

    def as_toml(self, value: Value | None = None) -> str:
        """``value`` (default: the key's default) as TOML, as ``--run-config`` wants it."""
        shown = self.default if value is None else value
        if isinstance(shown, bool):
            return str(shown).lower()
        return f'"{shown}"' if isinstance(shown, str) else repr(shown)
