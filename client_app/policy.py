"""A hospital's own limits, from its own TOML file. No run config reaches them.

```toml
version = 1

[aggregation]
secagg = "required"         # or "optional": then a server may ask for the update in the clear
min-cohort = 4              # fewest hospitals whose sum may be revealed
min-threshold = 4           # smallest reconstruction threshold
require-roster = true       # refuse rounds whose hospitals are not on a signed roster
```
"""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from common.errors import ConfigError, ConsiliumError
from common.secagg import SecAggPolicy

MAX_BOUND = 1e9
"""Largest range of a real segment: a sum of losses over max-examples images must fit."""

_AGGREGATION: Mapping[str, type] = {
    "secagg": str,
    "min-cohort": int,
    "min-threshold": int,
    "require-roster": bool,
}


class PolicyRefusal(ConsiliumError):
    """A server asked for less than this hospital's policy allows."""

    code = "policy"


@dataclass(frozen=True)
class HospitalPolicy:
    """What a hospital takes part in. Defaults are those of a policy file that is silent."""

    secagg_required: bool = True
    secagg: SecAggPolicy = field(
        default_factory=lambda: SecAggPolicy(require_roster=True, max_bound=MAX_BOUND)
    )

    @classmethod
    def for_simulation(cls) -> HospitalPolicy:
        """No limit beyond the protocol's floor: simulated hospitals hold nobody's data."""
        return cls(
            False,
            SecAggPolicy(
                min_cohort=3, min_threshold=3, min_shares=3, min_ring_bits=16, max_bound=MAX_BOUND
            ),
        )

    @classmethod
    def load(cls, path: Path) -> HospitalPolicy:
        """Read a policy file; ConfigError names the file and the entry that is wrong.

        An entry that is unknown is an error, not ignored: a limit that is misspelt must not
        silently not hold.
        """
        try:
            document = tomllib.loads(path.read_text())
        except (OSError, ValueError) as e:
            raise ConfigError(
                f"the policy {path} cannot be read: {e}",
                "restore it; nothing is trained without it",
            ) from None
        unknown = set(document) - {"version", "aggregation"}
        if unknown or document.get("version") != 1:
            raise _wrong(path, f"version {document.get('version')!r}, unknown {sorted(unknown)}")
        table = _checked(path, document.get("aggregation", {}))
        required = table.get("secagg", "required")
        if required not in ("required", "optional"):
            raise _wrong(path, f"secagg is {required!r}, not 'required' or 'optional'")
        default = SecAggPolicy()
        threshold = table.get("min-threshold", default.min_threshold)
        try:
            limits = SecAggPolicy(
                min_cohort=table.get("min-cohort", default.min_cohort),
                min_threshold=threshold,
                min_shares=min(threshold, default.min_shares),
                require_roster=table.get("require-roster", True),
                max_bound=MAX_BOUND,
            )
        except ConfigError as error:
            raise _wrong(path, error.what) from None
        return cls(required == "required", limits)

    def check_plain(self, config_says_secagg: bool) -> None:
        """Refuse a request that would bypass aggregation: by policy, or against the run config."""
        if self.secagg_required:
            raise PolicyRefusal(
                "the server asked for this hospital's update in the clear",
                "ask the coordinator for secagg=true; this hospital's policy requires it",
            )
        if config_says_secagg:
            raise PolicyRefusal(
                "the run config says secagg=true, and the server asked for the update in the clear",
                "treat the server as hostile until this is explained",
            )


def _checked(path: Path, table: Any) -> dict[str, Any]:
    if not isinstance(table, dict):
        raise _wrong(path, "[aggregation] is no table")
    for name, value in table.items():
        if name not in _AGGREGATION:
            raise _wrong(path, f"unknown entry '{name}' in [aggregation]")
        if type(value) is not _AGGREGATION[name]:
            raise _wrong(path, f"'{name}' is {value!r}, not a {_AGGREGATION[name].__name__}")
    return table


def _wrong(path: Path, what: str) -> ConfigError:
    return ConfigError(
        f"the policy {path} is wrong: {what}",
        "correct it; the entries are described in client_app/policy.py",
    )
