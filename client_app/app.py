"""The ClientApp: what one hospital answers to a server.

Importing this module does not import torch: Flower starts a process for each message, and
messages that need no training must not pay for it.
"""

from __future__ import annotations

import logging
from collections.abc import Callable

from flwr.app import Context, Message, RecordDict
from flwr.clientapp import ClientApp

from common.messages import Envelope, Greeting, Job, Refusal

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
        from client_app import secagg
        from client_app.hospital import Hospital
        from client_app.work import train_job

        secagg.wipe(context)  # first of all: whatever was left of an earlier round

        hospital = Hospital.from_context(context)
        return train_job(Job.from_record(message.content), hospital, context)

    return _guarded(message, answer)


@app.evaluate()
def evaluate(message: Message, context: Context) -> Message:
    """Validate the model that was sent."""

    def answer() -> RecordDict:
        from client_app import secagg
        from client_app.hospital import Hospital
        from client_app.work import evaluate_job

        secagg.wipe(context)

        hospital = Hospital.from_context(context)
        return evaluate_job(Job.from_record(message.content), hospital, context)

    return _guarded(message, answer)


@app.query("share")
def share(message: Message, context: Context) -> Message:
    """Secure aggregation: share this round's secrets with the neighbours."""
    return _stage("share", message, context)


@app.query("masked")
def masked(message: Message, context: Context) -> Message:
    """Secure aggregation: hand over the vector, masked."""
    return _stage("masked", message, context)


@app.query("consistency")
def consistency(message: Message, context: Context) -> Message:
    """Secure aggregation: sign who survived."""
    return _stage("consistency", message, context)


@app.query("unmask")
def unmask(message: Message, context: Context) -> Message:
    """Secure aggregation: reveal one share for each neighbour, once."""
    return _stage("unmask", message, context)


def _stage(stage: str, message: Message, context: Context) -> Message:
    def reply() -> RecordDict:
        from client_app import secagg
        from client_app.hospital import Hospital

        try:
            payload = Envelope.from_record(message.content).payload
            hospital = Hospital.from_context(context)
            return Envelope(secagg.answer(stage, payload, context, hospital)).to_record()
        except BaseException:
            secagg.wipe(context)
            raise

    return _guarded(message, reply)


@app.query("close")
def close(message: Message, context: Context) -> Message:
    """The round is over for this hospital: forget what is left of it."""

    def reply() -> RecordDict:
        from client_app import secagg

        secagg.wipe(context)
        return Envelope(b"").to_record()

    return _guarded(message, reply)


def _guarded(message: Message, answer: Callable[[], RecordDict]) -> Message:
    """``answer``'s record, or a refusal: the server learns a code, the details stay here."""
    try:
        return Message(answer(), reply_to=message)
    except Exception as error:
        refusal = Refusal.of(error)
        log.exception("refused (%s, id %s)", refusal.code, refusal.correlation_id)
        return Message(refusal.to_record(), reply_to=message)
