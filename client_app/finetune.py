"""Task vectors at a hospital: train from an offered base, keep the vector, deliver it.

The order is the guarantee (see :mod:`client_app.private`): reserve in the ledger, train, keep in
the outbox, signed, then let it leave. A vector costs its ε once: whatever is asked again, by a
server that lost the answer or by a resumed run, is delivered from the outbox.

Imports no torch: what lies in the outbox is delivered without it.
"""

from __future__ import annotations

import logging
from pathlib import Path

from flwr.app import Context, RecordDict

from client_app.admission import admit_run, check_size
from client_app.hospital import Hospital
from client_app.identity import identity_of
from client_app.outbox import Item, Outbox, outbox_of
from client_app.policy import VectorsRefusal
from common.errors import ConfigError
from common.files import atomic_write
from common.messages import Delivery, Offer, Receipt
from common.secagg import Identity
from common.vectors import SignedVector, TaskVector, bucket_of

log = logging.getLogger("consilium.hospital")


def answer_offer(offer: Offer, hospital: Hospital, context: Context) -> RecordDict:
    """The vector for ``offer``: from the outbox, or trained now.

    A vector for an older base that waits is delivered first; the server then offers again.
    VectorsRefusal where the policy does not allow it, before anything is trained; the ledger's
    refusals as in fedavg; ConfigError for a run that is not one of vectors.
    """
    if hospital.config.mode != "vectors":
        raise ConfigError(
            "the server asked for a task vector in a run that is not one of vectors",
            "ask the coordinator for mode=vectors",
        )
    private = hospital.config.privacy != "none"
    hospital.policy.vectors.check_send(private=private)
    admit_run(offer.run, hospital)
    check_size(hospital, offer.weights)
    outbox, identity = outbox_of(hospital, offer.run), vector_identity(hospital, context)
    with outbox.alone(offer.base):
        item = outbox.choose(offer, private=private)
        if item is None:
            _may_train(outbox, offer, hospital)
            item = fine_tune(offer, hospital, context)
        hospital.policy.vectors.check_send(private=item.private)
        return _delivery(outbox, hospital, identity, offer.run, item)


def answer_receipt(receipt: Receipt, hospital: Hospital, context: Context) -> RecordDict:
    """Note what became of what was sent; the answer has the withdrawals that wait."""
    outbox, identity = outbox_of(hospital, receipt.run), vector_identity(hospital, context)
    for item in outbox.take(receipt):
        log.info("vector %s: %s", item.serial, item.state)
    return _delivery(outbox, hospital, identity, receipt.run, None)


def fine_tune(offer: Offer, hospital: Hospital, context: Context) -> Item:
    """Train from the base of ``offer`` and put the signed vector into the outbox; needs torch.

    With privacy, it is a run of its own in the ledger (:func:`ledger_run`), of one round.
    """
    from client_app.tuning import tune

    outbox, identity = outbox_of(hospital, offer.run), vector_identity(hospital, context)
    name = ledger_run(offer, private=hospital.config.privacy != "none")
    tuned = tune(offer, name, hospital, context)
    vector = TaskVector(
        hospital=hospital.name,
        base=offer.base,
        values=tuned.values,
        bucket=bucket_of(tuned.images),
        epsilon=tuned.epsilon,
        delta=tuned.delta,
        metrics=tuned.metrics,
    )
    item = outbox.keep(SignedVector.sign(vector, identity), run=offer.run, version=offer.version)
    # From now on the outbox has it; two copies would only be one more to take back.
    (hospital.run_directory(name) / "update.safetensors").unlink(missing_ok=True)
    return item


def ledger_run(offer: Offer, *, private: bool) -> str:
    """The name under which one vector is charged: each vector is a run of its own.

    One without privacy has another name: it costs ε = ∞, which says nothing of the private one.
    """
    name = f"{offer.run[:32]}-v{offer.version}-{offer.base[:12]}"
    return name if private else f"{name}-plain"


def vector_identity(hospital: Hospital, context: Context) -> Identity:
    """The node's identity key; a simulated hospital's is made once, and kept in its directory.

    A vector is signed when it is made and may leave much later: the node's memory is no place
    for this key.
    """
    if "hospital" in context.node_config or "identity" in context.node_config:
        return identity_of(context)
    path: Path = hospital.home / "identity.key"
    if not path.exists():
        atomic_write(path, Identity.generate().private_bytes(), mode=0o600)
    return Identity(path.read_bytes())


def _may_train(outbox: Outbox, offer: Offer, hospital: Hospital) -> None:
    if outbox.withdrawn(offer):
        raise VectorsRefusal(
            f"the hospital took back its vector for base {offer.base[:16]}",
            "nothing: the next base may be trained again",
        )
    if not hospital.policy.vectors.retrain and outbox.retired(offer.run):
        raise VectorsRefusal(
            "the last vector's base was retired, and the policy says not to train again by itself",
            "consilium hospital finetune, or [vectors] retrain = true in the policy",
        )


def _delivery(
    outbox: Outbox, hospital: Hospital, identity: Identity, run: str, item: Item | None
) -> RecordDict:
    return Delivery(
        run=run,
        hospital=hospital.name,
        key=identity.public,
        vector=outbox.hand_over(item, run) if item is not None else b"",
        withdrawals=outbox.withdrawals(run),
    ).to_record()
