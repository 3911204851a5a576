"""A hospital's side of task vectors: trained once, kept signed, delivered until it is received."""

from __future__ import annotations

import subprocess
import sys
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flwr.app import Message, RecordDict

from client_app import egress, tuning, work
from client_app.app import app
from client_app.outbox import Item, Outbox
from common.config import KEYS
from common.errors import ProtocolError
from common.files import consilium_home
from common.messages import Delivery, Offer, Receipt, Refusal, arrays_to_record, record_to_arrays
from common.model import ModelSpec, Weights, build, get_weights
from common.privacy.ledger import Ledger
from common.secagg import Identity
from common.simulation import LEDGER
from common.vectors import SignedVector, Withdrawal, base_id, norm_of
from common.vectors.vector import FIELDS
from deploy.inprocess import InProcessGrid

SPEC = ModelSpec(width=0.03125)
RUN = "run-1"
CONFIG: dict[str, Any] = {
    "mode": "vectors", "dataset": "synthetic", "synthetic-size": 240, "secagg": False,
    "privacy": "none", "partition": "iid", "partition-min-size": 5, "batch-size": 512,
    "model-width": 0.03125, "allow-random-base": True, "epsilon": 4.0, "delta": 1e-3,
}  # fmt: skip
HOME = Path("simulation") / "hospital-00"


@pytest.fixture(scope="module")
def weights() -> Weights:
    return get_weights(build(SPEC, seed=0))


def offer(weights: Weights, *, version: int = 0, run: str = RUN, moved: float = 0.0) -> Offer:
    made = {k: v + np.float32(moved) for k, v in weights.items()}
    return Offer(run=run, version=version, base=base_id(SPEC.digest(), made),
                 model_digest=SPEC.digest(), weights=made)  # fmt: skip


def send(kind: str, content: RecordDict, **config: Any) -> RecordDict:
    changed = {key.replace("_", "-"): value for key, value in config.items()}
    run_config = {key.name: key.default for key in KEYS} | CONFIG | changed
    grid = InProcessGrid(app, 4, run_config)
    return app(Message(content, 1000, f"query.{kind}"), grid.contexts[0]).content


def deliver(made: Offer, **config: Any) -> SignedVector | str:
    """The vector that is delivered, or the code of the refusal."""
    answer = send("offer", made.to_record(), **config)
    refusal = Refusal.in_record(answer)
    if refusal is not None:
        return refusal.code
    delivery = Delivery.from_record(answer, run=made.run)
    signed = SignedVector.from_bytes(delivery.vector)
    signed.verify(delivery.key)
    assert signed.vector.hospital == delivery.hospital == "hospital-00"
    return signed


def vector(made: Offer, **config: Any) -> SignedVector:
    found = deliver(made, **config)
    assert isinstance(found, SignedVector), found
    return found


def receive(run: str = RUN, **told: Any) -> Delivery:
    return Delivery.from_record(send("receipt", Receipt(run=run, **told).to_record()), run=run)


def policy(text: str) -> None:
    consilium_home().mkdir(parents=True, exist_ok=True)
    (consilium_home() / "policy.toml").write_text(
        f"version = 1\n[privacy]\nallow-non-private = true\ntotal-delta = 1e-3\n[vectors]\n{text}\n"
    )


def outbox(run: str = RUN) -> Outbox:
    """Of a simulated hospital without a policy."""
    return Outbox(consilium_home() / HOME / "runs" / run / "outbox")


@pytest.fixture
def trained(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    train: Callable[..., Any] = work.Work.train
    count: list[int] = []
    monkeypatch.setattr(work.Work, "train", lambda *a: count.append(1) or train(*a))
    return count


def test_delivering_from_the_outbox_needs_no_torch() -> None:
    code = "import sys, client_app.finetune; print({'torch', 'opacus'} & set(sys.modules))"
    assert subprocess.check_output([sys.executable, "-c", code], text=True).strip() == "set()"


def test_a_vector_is_trained_once_and_delivered_as_often_as_it_is_asked_for(
    weights: Weights, trained: list[int]
) -> None:
    first = vector(offer(weights))
    assert first.vector.base == offer(weights).base
    assert first.vector.bucket == 32
    assert 0 < norm_of(first.vector.values) < 10
    assert first.vector.epsilon is None
    assert first.vector.metrics["val-examples"] > 0
    assert first.to_bytes() == vector(offer(weights)).to_bytes()
    assert len(trained) == 1
    files = [p for p in outbox().folder.iterdir() if not p.name.endswith(".lock")]
    assert len(files) == 2
    assert all(p.stat().st_mode & 0o077 == 0 for p in outbox().folder.iterdir())


def test_a_receipt_moves_the_vector_from_waiting_to_sent_or_says_why_it_was_refused(
    weights: Weights,
) -> None:
    serial = vector(offer(weights)).vector.serial
    assert [i.state for i in outbox().items()] == ["waiting"]
    receive(accepted=("0" * 32,))  # of a vector that is not here
    assert [i.state for i in outbox().items()] == ["waiting"]
    receive(refused={serial: "vector-norm"})
    assert [i.state for i in outbox().items()] == ["refused: vector-norm"]
    receive(accepted=(serial,))
    assert [i.state for i in outbox().items()] == ["sent"]


def test_a_vector_that_waits_is_delivered_before_another_base_is_trained(
    weights: Weights, trained: list[int]
) -> None:
    old = vector(offer(weights))
    newer = offer(weights, version=1, moved=0.01)
    assert vector(newer).vector.serial == old.vector.serial  # nobody has confirmed it yet
    receive(refused={old.vector.serial: "vector-stale"})
    made = vector(newer)
    assert made.vector.base == newer.base
    assert len(trained) == 2


@pytest.mark.parametrize("retrain", [True, False])
def test_a_hospital_trains_again_for_a_retired_base_only_if_its_policy_says_so(
    weights: Weights, retrain: bool, trained: list[int]
) -> None:
    policy(f'send = "any"\nretrain = {str(retrain).lower()}')
    old = vector(offer(weights))
    receive(refused={old.vector.serial: "vector-stale"})
    found = deliver(offer(weights, version=1, moved=0.01))
    assert isinstance(found, SignedVector) if retrain else found == "vectors-policy"
    assert len(trained) == 1 + retrain


def test_a_policy_decides_whether_single_vectors_leave(
    weights: Weights, trained: list[int]
) -> None:
    policy("")
    assert deliver(offer(weights)) == "vectors-policy"
    policy('send = "private"')
    assert deliver(offer(weights)) == "vectors-policy"
    assert not trained
    assert isinstance(deliver(offer(weights), privacy="local"), SignedVector)


def test_a_policy_that_has_changed_holds_back_what_waits(weights: Weights) -> None:
    policy('send = "any"')
    vector(offer(weights))
    policy('send = "never"')
    assert deliver(offer(weights)) == "vectors-policy"


def test_a_vector_without_privacy_answers_no_offer_that_asks_for_it(weights: Weights) -> None:
    plain = vector(offer(weights))
    private = vector(offer(weights), privacy="local")
    assert private.vector.serial != plain.vector.serial
    assert private.vector.epsilon is not None and 0 < private.vector.epsilon <= 4.0


def test_a_crash_between_training_and_keeping_is_charged_once_and_gives_one_vector(
    weights: Weights, monkeypatch: pytest.MonkeyPatch, trained: list[int]
) -> None:
    def killed(*_: Any, **__: Any) -> Any:
        raise OSError("no room")

    with monkeypatch.context() as context:
        context.setattr(Outbox, "keep", killed)
        assert deliver(offer(weights), privacy="local") == "internal"
    found = vector(offer(weights), privacy="local")
    assert len(trained) == 1  # what was trained had been kept
    (path,) = (consilium_home() / HOME).glob(f"runs/*/{LEDGER}")
    with Ledger(path, create=False) as ledger:
        state = ledger.state(path.parent.name)
        assert state is not None and state.rounds == 1
        spent = ledger.spent_by_run(path.parent.name).value
    assert found.vector.epsilon == spent
    vector(offer(weights), privacy="local")
    with Ledger(path, create=False) as ledger:
        assert ledger.spent_by_run(path.parent.name).value == spent


def test_a_vector_that_was_taken_back_never_leaves_again_and_the_server_is_told(
    weights: Weights,
) -> None:
    made = vector(offer(weights))
    identity = Identity((consilium_home() / HOME / "identity.key").read_bytes())
    item = outbox().withdraw(made.vector.serial, "hospital-00", identity)
    assert item.state == "withdrawal waits"
    assert not (outbox().folder / f"{item.serial}.safetensors").exists()
    assert deliver(offer(weights)) == "vectors-policy"
    (told,) = receive().withdrawals
    withdrawal = Withdrawal.from_bytes(told)
    withdrawal.verify(identity.public)
    assert withdrawal.serial == item.serial
    assert receive(run="run-2").withdrawals == ()  # whoever never had it is told nothing
    receive(withdrawn=(item.serial,))
    assert receive().withdrawals == ()
    assert outbox().items()[0].state == "withdrawn"


@pytest.mark.parametrize("busy", ["a receipt", "a delivery"])
def test_a_vector_that_is_taken_back_while_the_node_is_at_it_stays_taken_back(
    busy: str, weights: Weights, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The command and the node are two processes: neither may write over the other's word."""
    serial = vector(offer(weights)).vector.serial
    identity, write, commands = Identity.generate(), Outbox._write, []

    def slow(box: Outbox, item: Item) -> None:
        if not commands:  # the node has read the item, and is about to write it
            command = threading.Thread(
                target=Outbox(box.folder).withdraw, args=(serial, "hospital-00", identity)
            )
            commands.append(command)
            command.start()
            command.join(0.3)  # it is done by now, or waits for the node
        write(box, item)

    monkeypatch.setattr(Outbox, "_write", slow)
    if busy == "a receipt":
        outbox().take(Receipt(run=RUN, accepted=(serial,)))
    else:
        outbox().hand_over(outbox().items()[0], "run-2")
    commands[0].join(10)
    (item,) = outbox().items()
    assert item.withdrawn and outbox().withdrawals(RUN)
    assert item.receipts == ({RUN: "accepted"} if busy == "a receipt" else {})
    assert item.handed == ((RUN,) if busy == "a receipt" else (RUN, "run-2"))


def changed_weights(record: RecordDict) -> None:
    weights = record_to_arrays(record, "weights")
    name = next(iter(weights))
    record["weights"] = arrays_to_record(weights | {name: weights[name] + 1})


def other_field(record: RecordDict) -> None:
    record.config_records["offer"]["more"] = 1


def no_weights(record: RecordDict) -> None:
    del record["weights"]


def bad_run(record: RecordDict) -> None:
    record.config_records["offer"]["run"] = "../../etc"


def old_version(record: RecordDict) -> None:
    record.config_records["offer"]["version"] = 0


@pytest.mark.parametrize("edit", [changed_weights, other_field, no_weights, bad_run, old_version])
def test_a_garbled_offer_is_refused_and_nothing_is_trained(
    weights: Weights, edit: Callable[[RecordDict], None], trained: list[int]
) -> None:
    record = offer(weights).to_record()
    edit(record)
    refusal = Refusal.in_record(send("offer", record))
    assert refusal is not None
    assert refusal.code == ("wire-version" if edit is old_version else "protocol")
    assert not trained


def test_an_offer_of_another_model_or_in_another_mode_is_refused(
    weights: Weights, trained: list[int]
) -> None:
    wide = get_weights(build(ModelSpec(width=0.0625), seed=0))
    digest = ModelSpec(width=0.0625).digest()
    other = replace(offer(weights), weights=wide, model_digest=digest, base=base_id(digest, wide))
    assert deliver(other) == "config"
    assert deliver(offer(weights), mode="fedavg") == "config"
    assert not trained


def test_every_field_of_a_vector_is_in_the_egress_log(weights: Weights) -> None:
    made = vector(offer(weights), privacy="local").vector
    found = {
        line["field"]: line
        for line in egress.read(consilium_home() / HOME / egress.FILE)
        if line["message"] == "offer"
    }
    fields = {f"vector.{name}" for name in (*FIELDS, "signature", *made.metrics)}
    told = {"delivery.hospital", "delivery.key", "vector", *fields} - {"vector.metrics"}
    assert set(found) == told
    size = sum(v.size for v in made.values.values())
    assert found["vector"]["amount"] == f"{size} numbers"
    for name in ("vector", "vector.bucket", "vector.val-correct"):
        assert "with noise: ε=" in found[name]["protection"]
        assert "this vector" in found[name]["protection"]
    assert found["vector"]["run"] == RUN


def test_a_vector_with_a_figure_that_the_log_does_not_know_does_not_leave(
    weights: Weights, monkeypatch: pytest.MonkeyPatch
) -> None:
    tune = tuning.tune

    def leaky(*args: Any) -> Any:
        made = tune(*args)
        return replace(made, metrics={**made.metrics, "age": 61.0})

    monkeypatch.setattr(tuning, "tune", leaky)
    assert deliver(offer(weights)) == "egress"


@pytest.mark.parametrize(
    "change", [{"accepted": "zz"}, {"refused": "0=1"}, {"withdrawn": 1}, {"more": "x"}]
)
def test_a_garbled_receipt_is_refused(change: dict[str, Any]) -> None:
    record = Receipt(run=RUN).to_record()
    record.config_records["receipt"].update(change)
    with pytest.raises(ProtocolError):
        Receipt.from_record(record)
