"""The privacy ledger: durable, per hospital, across runs; it refuses.

:mod:`chain` is the file (SQLite, append-only, hash-chained), :mod:`subjects` knows which images
and patients a data set holds, :mod:`runs` reads a run from its entries, :mod:`spending` says what
the worst-off image has cost, :mod:`budget` whether more fits, :mod:`ledger` admits, reserves,
settles and refuses.
"""

from common.privacy.ledger.chain import Chain, Entry, LedgerError
from common.privacy.ledger.ledger import Ledger
from common.privacy.ledger.runs import TRAINING, VALIDATION, RunState
from common.privacy.ledger.spending import Spending
from common.privacy.ledger.subjects import DataSet, Subjects, check_members, data_sets

__all__ = [
    "TRAINING",
    "VALIDATION",
    "Chain",
    "DataSet",
    "Entry",
    "Ledger",
    "LedgerError",
    "RunState",
    "Spending",
    "Subjects",
    "check_members",
    "data_sets",
]
