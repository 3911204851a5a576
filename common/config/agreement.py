"""One hash for a whole run config: what server and hospitals must be told alike.

:func:`config_digest` is in every round's binding: hospitals whose digests differ share no masks.
:func:`lasting_digest` leaves out what a run that is resumed may change; a hospital keeps it from
the moment of admission on.
"""

from __future__ import annotations

import hashlib
import json

from common.config.run import RunConfig

MAY_CHANGE_ON_RESUME = frozenset({
    # When to stop, how long to wait, what a machine computes on.
    "resume", "rounds", "connect-timeout", "round-timeout", "quorum", "threads", "device",
    "test-every",
    # Of a run of vectors: no vector and no published base depends on them.
    "versions", "duration", "vector-timeout", "publish-every", "publish-quorum", "publish-margin",
    "merge-rule", "max-staleness", "simulated-delay", "judged-by",
})  # fmt: skip
"""Keys that may differ between a run and the run that resumes it."""


def may_change_on_resume(key: str, config: RunConfig) -> bool:
    """Whether a resumed run may have another value of ``key``.

    The number of rounds only where neither the noise nor the learning rates were laid out for it.
    """
    if key == "rounds":
        return config.privacy == "none" and config.learning_rate_schedule == "constant"
    return key in MAY_CHANGE_ON_RESUME


def config_digest(config: RunConfig) -> bytes:
    """32 bytes over every key's effective value (a recipe's, a choice for 0), by key.

    Equal for two configs if and only if every value is equal.
    """
    return _digest("consilium run config", config, set())


def lasting_digest(config: RunConfig) -> bytes:
    """32 bytes over the values that stay as they are while a run lasts, resumed or not."""
    left_out = {key for key in config.as_dict() if may_change_on_resume(key, config)}
    return _digest("consilium lasting run config", config, left_out)


def _digest(label: str, config: RunConfig, left_out: set[str]) -> bytes:
    values = {key: value for key, value in config.as_dict().items() if key not in left_out}
    # JSON writes floats so that they read back exactly, and escapes what is not ASCII.
    text = json.dumps([label, values], sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).digest()
