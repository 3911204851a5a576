"""The ClientApp: what one hospital answers to a server.

Importing this module does not import torch: Flower starts a process for each message, and
messages that need no training must not pay for it.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import cached_property

from flwr.app import Context, Message, RecordDict
from flwr.clientapp import ClientApp

from client_app.hospital import Hospital, home_of
from common.messages import Comparison, Envelope, Job, Offer, Receipt, Refusal
from common.secagg import RoundBinding

log = logging.getLogger("consilium.hospital")

app = ClientApp()


class Desk:
    """What is at hand while one message is answered: the hospital, the job, the round."""

    def __init__(self, stage: str, context: Context) -> None:
        self.stage = stage
        self.context = context
        self.job: Job | Offer | Receipt | Comparison | None = None
        self.round: RoundBinding | None = None

    @cached_property
    def hospital(self) -> Hospital:
        """This node's hospital; ConfigError if node or run config are unusable."""
        return Hospital.from_context(self.context)

    def open_job(self, message: Message) -> Job:
        """The job in ``message``; first of all whatever was left of an earlier round is wiped."""
        from client_app import secagg

        secagg.wipe(self.context)
        self.job = job = Job.from_record(message.content)
        return job

    def note(self, record: RecordDict) -> None:
        """List ``record`` in the egress log; EgressError if it must not leave."""
        from client_app import egress

        egress.note(
            home_of(self.context),
            record,
            stage=self.stage,
            hospital=self.__dict__.get("hospital"),
            job=self.job or self.round,
            binding=self.round,
        )


@app.query("greet")
def greet(message: Message, context: Context) -> Message:
    """Tell the hospital's name, under its signature, and which versions it speaks."""

    def answer(desk: Desk) -> RecordDict:
        from client_app.identity import greeting

        return greeting(desk.hospital.name, message, context).to_record()

    return _guarded("greet", message, context, answer)


@app.train()
def train(message: Message, context: Context) -> Message:
    """Validate and train the model that was sent."""

    def answer(desk: Desk) -> RecordDict:
        from client_app.work import train_job

        return train_job(desk.open_job(message), desk.hospital, context)

    return _guarded("train", message, context, answer)


@app.evaluate()
def evaluate(message: Message, context: Context) -> Message:
    """Validate the model that was sent."""

    def answer(desk: Desk) -> RecordDict:
        from client_app.work import evaluate_job

        return evaluate_job(desk.open_job(message), desk.hospital, context)

    return _guarded("evaluate", message, context, answer)


@app.query("offer")
def offer(message: Message, context: Context) -> Message:
    """Task vectors: deliver what waits in the outbox, or fine-tune the base that was sent."""

    def answer(desk: Desk) -> RecordDict:
        from client_app.finetune import answer_offer

        desk.job = offered = Offer.from_record(message.content)
        return answer_offer(offered, desk.hospital, context)

    return _guarded("offer", message, context, answer)


@app.query("receipt")
def receipt(message: Message, context: Context) -> Message:
    """Task vectors: note what became of those that were delivered; tell which are taken back."""

    def answer(desk: Desk) -> RecordDict:
        from client_app.finetune import answer_receipt

        desk.job = given = Receipt.from_record(message.content)
        return answer_receipt(given, desk.hospital, context)

    return _guarded("receipt", message, context, answer)


@app.query("judge")
def judge(message: Message, context: Context) -> Message:
    """Task vectors: compare a candidate with the current base; two counts, told in a sum only."""

    def answer(desk: Desk) -> RecordDict:
        from client_app import secagg
        from client_app.judging import answer_comparison

        secagg.wipe(context)
        desk.job = asked = Comparison.from_record(message.content)
        return answer_comparison(asked, desk.hospital, context)

    return _guarded("judge", message, context, answer)


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
    def reply(desk: Desk) -> RecordDict:
        from client_app import secagg

        try:
            payload = Envelope.from_record(message.content).payload
            desk.round = secagg.round_at_hand(context)
            return Envelope(secagg.answer(stage, payload, context, desk.hospital)).to_record()
        except BaseException:
            secagg.wipe(context)
            raise

    return _guarded(stage, message, context, reply)


@app.query("close")
def close(message: Message, context: Context) -> Message:
    """The round is over for this hospital: forget what is left of it."""

    def reply(desk: Desk) -> RecordDict:
        from client_app import secagg

        secagg.wipe(context)
        return Envelope(b"").to_record()

    return _guarded("close", message, context, reply)


def _guarded(
    stage: str, message: Message, context: Context, answer: Callable[[Desk], RecordDict]
) -> Message:
    """``answer``'s record, or a refusal: the server learns a code, the details stay here.

    Either is listed in the hospital's egress log before it leaves.
    """
    desk = Desk(stage, context)
    try:
        record = answer(desk)
        desk.note(record)
        return Message(record, reply_to=message)
    except Exception as error:
        refusal = Refusal.of(error)
        log.exception("refused (%s, id %s)", refusal.code, refusal.correlation_id)
    record = refusal.to_record()
    try:
        desk.note(record)
    except Exception:
        # A refusal says nothing of the data; without it the server would only wait in vain.
        log.exception("the refusal %s is not in the egress log", refusal.correlation_id)
    return Message(record, reply_to=message)
