"""The durable store of bases and task vectors: what was published, from what, and by whom.

:mod:`history` says what follows from the rows (pure), :mod:`store` is the folder (SQLite and
safetensors), :mod:`opened` what every operation is made of; :mod:`line` publishes bases and takes
them back, :mod:`registry` accepts vectors, excludes and withdraws them. No Flower, no torch: an
evaluation is a function given from outside.
"""

from server_app.registry.history import BaseRow, Ingredient, Log, PublicationRow, VectorRow
from server_app.registry.line import GateRefusal, Proposal
from server_app.registry.registry import Accepted, Entry, Registry

__all__ = [
    "Accepted",
    "BaseRow",
    "Entry",
    "GateRefusal",
    "Ingredient",
    "Log",
    "Proposal",
    "PublicationRow",
    "Registry",
    "VectorRow",
]
