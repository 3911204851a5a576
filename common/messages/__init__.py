"""The records on the wire: each built and read in one place, versioned.

Every message carries its version (:mod:`common.messages.wire`), the run and the round. A reader
refuses another major version or another run (:class:`~common.errors.ProtocolError`): nothing of an
old run is ever taken for an answer to a new one. No record holds an image, a file name or a path.
"""

from common.messages.answers import Challenge, Greeting, Refusal
from common.messages.evaluation import Comparison
from common.messages.rounds import Envelope, Job, Report
from common.messages.vectors import MAX_WITHDRAWALS, Delivery, Offer, Receipt
from common.messages.wire import (
    RAW,
    SMALL,
    VERSION,
    WIRE,
    Wire,
    WireMismatch,
    arrays_to_record,
    check_name,
    check_run_id,
    entry,
    record_to_arrays,
)

__all__ = [
    "MAX_WITHDRAWALS",
    "RAW",
    "SMALL",
    "VERSION",
    "WIRE",
    "Challenge",
    "Comparison",
    "Delivery",
    "Envelope",
    "Greeting",
    "Job",
    "Offer",
    "Receipt",
    "Refusal",
    "Report",
    "Wire",
    "WireMismatch",
    "arrays_to_record",
    "check_name",
    "check_run_id",
    "entry",
    "record_to_arrays",
]
