"""The ClientApp: what one hospital answers to a server.

Importing this module does not import torch: Flower starts a process for each message, and
messages that need no training must not pay for it.
"""

from __future__ import annotations

import logging
from collections.abc import Callable

from flwr.app import Context, Message, RecordDict
from flwr.clientapp import ClientApp

from common.messages import Greeting, Job, Refusal

log = logging.getLogger("consilium.hospital")

app = ClientApp()


@app.query("greet")
def greet(message: Message, context: Context) -> Message:
    """Tell the hospital's name."""

    def answer() -> RecordDict:
        from client_app.hospital import Hospital

        return Greeting(Hospital.from_context(context).name).to_record()

    return _guarded(message, answer)


@app.train()
def train(message: Message, context: Context) -> Message:
    """Validate and train the model that was sent."""

    def answer() -> RecordDict:
        from client_app.hospital import Hospital
        from client_app.work import train_job

        hospital = Hospital.from_context(context)
        return train_job(Job.from_record(message.content), hospital).to_record()

    return _guarded(message, answer)


@app.evaluate()
def evaluate(message: Message, context: Context) -> Message:
    """Validate the model that was sent."""

    def answer() -> RecordDict:
        from client_app.hospital import Hospital
        from client_app.work import evaluate_job

        hospital = Hospital.from_context(context)
        return evaluate_job(Job.from_record(message.content), hospital).to_record()

    return _guarded(message, answer)


def _guarded(message: Message, answer: Callable[[], RecordDict]) -> Message:
    """``answer``'s record, or a refusal: the server learns a code, the details stay here."""
    try:
        return Message(answer(), reply_to=message)
    except Exception as error:
        refusal = Refusal.of(error)
        log.exception("refused (%s, id %s)", refusal.code, refusal.correlation_id)
        return Message(refusal.to_record(), reply_to=message)
