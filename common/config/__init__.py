"""Every run-config key, once: type, default, allowed range, meaning.

The table :data:`KEYS` (``keys.py``) is the only definition. ``[tool.flwr.app.config]`` in
``pyproject.toml``, the README's table and ``consilium config`` are generated from it, and a
test keeps them true. :meth:`RunConfig.parse` is called by the ServerApp before any hospital
is asked, and by each hospital on what a server sends it: an unknown key, a wrong type, a
value out of range or an impossible combination is a :class:`~common.errors.ConfigError`
with what is wrong and what to do.
"""

from common.config.agreement import (
    MAY_CHANGE_ON_RESUME,
    config_digest,
    lasting_digest,
    may_change_on_resume,
)
from common.config.key import Key, Value
from common.config.keys import BY_NAME, DATASETS, KEYS, MEDMNIST_2D, markdown_table, toml_table
from common.config.rules import LEAST_EPSILON
from common.config.run import RunConfig

__all__ = [
    "BY_NAME",
    "DATASETS",
    "KEYS",
    "LEAST_EPSILON",
    "MAY_CHANGE_ON_RESUME",
    "MEDMNIST_2D",
    "Key",
    "RunConfig",
    "Value",
    "config_digest",
    "lasting_digest",
    "markdown_table",
    "may_change_on_resume",
    "toml_table",
]
