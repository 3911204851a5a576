"""Flower's stock SecAgg+ (1.41.0) can be opened by its server; the same attacks fail on ours.

The stock hospitals below run Flower's own client code, :func:`secaggplus_mod` in a legacy
``ClientApp``; only the malicious server is ours. It lists one hospital as survivor *and* as
dropped, is given the shares of both of its secrets, and removes every mask of its update.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from itertools import product
from typing import Any

import numpy as np
import pytest
from flwr.app import ConfigRecord, Context, Message, RecordDict
from flwr.client import Client, NumPyClient
from flwr.client.mod import secaggplus_mod
from flwr.clientapp import ClientApp
from flwr.common import FitIns, bytes_to_ndarray, ndarrays_to_parameters
from flwr.common.secure_aggregation.crypto.shamir import combine_shares
from flwr.common.secure_aggregation.crypto.symmetric_encryption import generate_shared_key
from flwr.common.secure_aggregation.ndarrays_arithmetic import get_parameters_shape
from flwr.common.secure_aggregation.quantization import dequantize
from flwr.common.secure_aggregation.secaggplus_constants import RECORD_KEY_CONFIGS, Key, Stage
from flwr.common.secure_aggregation.secaggplus_utils import pseudo_rand_gen
from flwr.compat.common import recorddict_compat as compat
from flwr.supercore.primitives.asymmetric import bytes_to_private_key, bytes_to_public_key
from flwr.supercore.task_identity import TaskIdentity

from common.secagg import Identity, Refusal, shamir, wire
from common.secagg import messages as m
from common.secagg.encoding import unpack
from common.secagg.keys import pair_mask_key, self_mask_key
from common.secagg.masks import RingArray, add_mask
from common.secagg.statements import MASK_KEY, SEED, survivors_statement
from tests.common.secagg.driver import IDENTITIES, Drive, refused

STOCK = import_module("flwr.client.mod.secure_aggregation.secaggplus_mod")
"""The module; ``flwr.client.mod`` exports the function of the same name."""
NODES = (11, 12, 13, 14, 15)
CLIPPING, TARGET, MODULUS, MAX_WEIGHT = 8.0, 1 << 22, 1 << 32, 1000.0
EXAMPLES = {node: 100 + 37 * place for place, node in enumerate(NODES)}
UPDATES = {
    node: [np.random.default_rng(node).normal(size=shape) for shape in ((2, 3), (4,))]
    for node in NODES
}
Vector = list[np.ndarray]


class Trained(NumPyClient):
    """A hospital that has trained: the update, its number of images and its loss."""

    def __init__(self, node: int) -> None:
        self.node = node

    def fit(self, parameters: Any, config: Any) -> tuple[Vector, int, dict[str, Any]]:
        return UPDATES[self.node], EXAMPLES[self.node], {"loss": 0.5 + self.node}


def stock_client(context: Context) -> Client:
    return Trained(context.node_id).to_client()


class StockFederation:
    """Five stock hospitals, and a server that sends them whatever it likes."""

    def __init__(self, threshold: int = 4) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            self.app = ClientApp(client_fn=stock_client, mods=[secaggplus_mod])
        self.contexts = {
            node: Context(run_id=1, node_id=node, node_config={}, state=RecordDict(), run_config={})
            for node in NODES
        }
        self.threshold = threshold
        self.keys: dict[int, list[bytes]] = {}
        self.masked: dict[int, Vector] = {}

    def ask(self, node: int, stage: str, fields: Mapping[str, Any]) -> RecordDict:
        """One message to one hospital; the answer of Flower's own client code."""
        content = RecordDict()
        if stage == Stage.COLLECT_MASKED_VECTORS:
            content = compat.fitins_to_recorddict(FitIns(ndarrays_to_parameters([]), {}), True)
        content.config_records[RECORD_KEY_CONFIGS] = ConfigRecord({Key.STAGE: stage, **fields})
        return self.app(Message(content, node, "train"), self.contexts[node]).content

    def until_masked(self) -> dict[int, RecordDict]:
        """Play honestly up to the masked vectors; returns those answers."""
        setup = {
            Key.SAMPLE_NUMBER: len(NODES), Key.SHARE_NUMBER: len(NODES),
            Key.THRESHOLD: self.threshold, Key.CLIPPING_RANGE: CLIPPING,
            Key.TARGET_RANGE: TARGET, Key.MOD_RANGE: MODULUS, Key.MAX_WEIGHT: MAX_WEIGHT,
        }  # fmt: skip
        for node in NODES:
            answer = self.ask(node, Stage.SETUP, setup).config_records[RECORD_KEY_CONFIGS]
            self.keys[node] = [answer[Key.PUBLIC_KEY_1], answer[Key.PUBLIC_KEY_2]]  # type: ignore[list-item]
        boxes: dict[int, list[tuple[int, bytes]]] = {node: [] for node in NODES}
        for node in NODES:
            public = {str(other): keys for other, keys in self.keys.items()}
            answer = self.ask(node, Stage.SHARE_KEYS, public).config_records[RECORD_KEY_CONFIGS]
            pairs = zip(answer[Key.DESTINATION_LIST], answer[Key.CIPHERTEXT_LIST], strict=True)  # type: ignore[arg-type]
            for holder, box in pairs:
                boxes[holder].append((node, box))  # type: ignore[index,arg-type]
        answers = {}
        for node in NODES:
            relay = {
                Key.CIPHERTEXT_LIST: [box for _, box in boxes[node]],
                Key.SOURCE_LIST: [owner for owner, _ in boxes[node]],
            }
            answers[node] = self.ask(node, Stage.COLLECT_MASKED_VECTORS, relay)
            packed = answers[node].config_records[RECORD_KEY_CONFIGS][Key.MASKED_PARAMETERS]
            self.masked[node] = [bytes_to_ndarray(array) for array in packed]  # type: ignore[union-attr,arg-type]
        return answers

    def both_secrets(self, victim: int) -> tuple[bytes, bytes]:
        """The attack: ``victim`` stands in both lists. Returns its seed and its mask key."""
        seeds, keys = [], []
        lists = {Key.ACTIVE_NODE_ID_LIST: list(NODES), Key.DEAD_NODE_ID_LIST: [victim]}
        for node in NODES:
            answer = self.ask(node, Stage.UNMASK, lists).config_records[RECORD_KEY_CONFIGS]
            shares = list(zip(answer[Key.NODE_ID_LIST], answer[Key.SHARE_LIST], strict=True))  # type: ignore[arg-type]
            seeds.append(next(share for owner, share in shares[: len(NODES)] if owner == victim))
            keys.append(next(share for owner, share in shares[len(NODES) :] if owner == victim))
        return combine_shares(seeds), combine_shares(keys)  # type: ignore[arg-type]

    def opened(self, victim: int, seed: bytes, private: bytes) -> Vector:
        """``victim``'s quantised vector: its masked one without every mask."""
        vector = self.masked[victim]
        shapes = get_parameters_shape(vector)
        masks = [(seed, 1)]
        for other in set(NODES) - {victim}:
            public = bytes_to_public_key(self.keys[other][0])
            shared = generate_shared_key(bytes_to_private_key(private), public)
            masks.append((shared, 1 if victim > other else -1))
        for key, sign in masks:
            mask = pseudo_rand_gen(key, MODULUS, shapes)
            vector = [array - sign * part for array, part in zip(vector, mask, strict=True)]
        return [array & (MODULUS - 1) for array in vector]


@pytest.fixture
def quantised(monkeypatch: pytest.MonkeyPatch) -> list[Vector]:
    """What each stock hospital was about to mask, in the order of :data:`NODES`."""
    for name in ("_run_id", "_node_id", "_task_id"):  # whom Flower takes for the sender
        monkeypatch.setattr(TaskIdentity, name, 1)
    seen: list[Vector] = []
    combine: Callable[..., Vector] = STOCK.factor_combine

    def spy(factor: int, parameters: Vector) -> Vector:
        seen.append(combine(factor, parameters))
        return seen[-1]

    monkeypatch.setattr(STOCK, "factor_combine", spy)
    return seen


# On stock ------------------------------------------------------------------------------------


@pytest.mark.parametrize("victim", NODES)
def test_stock_hospital_named_survivor_and_dropped_is_opened_exactly(
    victim: int, quantised: list[Vector]
) -> None:
    stock = StockFederation()
    stock.until_masked()
    opened = stock.opened(victim, *stock.both_secrets(victim))
    true = quantised[NODES.index(victim)]
    assert all(np.array_equal(a, b) for a, b in zip(opened, true, strict=True))
    # The sample count and the update in floating point follow at once.
    ratio = opened[0][0] / TARGET
    assert round(ratio * MAX_WEIGHT) == EXAMPLES[victim]
    for array, update in zip(
        dequantize(opened[1:], CLIPPING, TARGET), UPDATES[victim], strict=True
    ):
        assert np.abs(array / ratio - update).max() <= 2 * CLIPPING / TARGET / ratio


def test_stock_hospital_takes_part_with_threshold_one(quantised: list[Vector]) -> None:
    """Then one colluding neighbour would open everybody; the server alone did so above."""
    stock = StockFederation(threshold=1)
    assert set(stock.until_masked()) == set(NODES)


def test_stock_hospital_sends_its_sample_count_and_figures_in_the_clear(
    quantised: list[Vector],
) -> None:
    for node, answer in StockFederation().until_masked().items():
        result = compat.recorddict_to_fitres(answer, True)
        assert result.num_examples == EXAMPLES[node]
        assert result.metrics == {"loss": 0.5 + node}


# On ours -------------------------------------------------------------------------------------

VICTIM = "h00"
Held = dict[str, dict[int, bytes]]
"""What the malicious server was given of the victim: by kind of secret, shares by index."""


def masked_round() -> tuple[Drive, dict[str, bytes]]:
    """Five hospitals that have handed over their masked vectors, and those vectors."""
    drive = Drive.one_hot(5)
    relays = drive.run(until="masked")
    assert isinstance(relays, dict)
    return drive, {name: drive.masked(name, relays[name]) for name in drive.names}


def told(drive: Drive, name: str, survivors: Sequence[str]) -> None:
    """Tell ``name`` that these survived; it signs."""
    drive.consistency(name, m.build_survivors(drive.server._context, list(survivors)))


def signatures(drive: Drive, survivors: Sequence[str], signers: Sequence[str]) -> bytes:
    """The request to unmask: genuine signatures of ``signers`` over ``survivors``."""
    context = drive.server._context
    statement = survivors_statement(context, list(survivors))
    return m.build_signatures(context, [(n, IDENTITIES[n].sign(statement)) for n in signers])


def taken(drive: Drive, holder: str, answer: bytes, held: Held) -> None:
    """Add what ``holder`` revealed of the victim to what the server holds."""
    _, shares = m.read_revealed(drive.server._context, drive.binding.params, answer)
    kind, share = shares[VICTIM]
    held[kind][drive.server._graph.index(VICTIM, holder)] = share


def without_pair_masks(drive: Drive, sent: bytes, private: bytes) -> RingArray:
    """The victim's masked vector less the masks that its mask key gives."""
    context, members = drive.server._context, drive.server._members
    vector = unpack(m.read_masked(context, sent, 20)[1], 5, 32).copy()
    for other in drive.names[1:]:
        key = pair_mask_key(private, VICTIM, members[other].mask, other, context)
        add_mask(vector, key, -1 if other > VICTIM else 1)
    return vector


@pytest.mark.parametrize("views", list(product((False, True), repeat=4)))
def test_different_survivors_to_different_hospitals_never_give_both_secrets(
    views: tuple[bool, ...],
) -> None:
    """Every split of the other four into those told that the victim survived, and dropped."""
    drive, _ = masked_round()
    everybody, others = drive.names, drive.names[1:]
    alive = [VICTIM, *(name for name, view in zip(others, views, strict=True) if view)]
    sides = ((alive, everybody), ([name for name in others if name not in alive], others))
    for side, survivors in sides:
        for name in side:
            told(drive, name, survivors)
    held: Held = {SEED: {}, MASK_KEY: {}}
    for side, survivors in sides:
        request = signatures(drive, survivors, side)  # the most that the server can show
        for name in side:
            if len(side) >= 4:
                taken(drive, name, drive.unmask(name, request), held)
            else:
                code = "secagg-signers-few"
                refused(code, drive, name, lambda n=name, r=request: drive.unmask(n, r))
    assert not (held[SEED] and held[MASK_KEY])
    if 0 < sum(views) < 3:  # no side has four
        assert held == {SEED: {}, MASK_KEY: {}}


def test_signatures_of_the_other_side_do_not_help_a_split() -> None:
    drive, _ = masked_round()
    for name in drive.names[:3]:
        told(drive, name, drive.names)
    for name in drive.names[3:]:
        told(drive, name, drive.names[1:])
    context = drive.server._context
    mixed: dict[str, bytes] = {}
    for survivors, signers in ((drive.names, drive.names[:3]), (drive.names[1:], drive.names[3:])):
        message = signatures(drive, survivors, signers)
        mixed |= m.read_signatures(context, drive.binding.params, message)
    request = m.build_signatures(context, list(mixed.items()))
    for name in drive.names[:3]:
        refused("secagg-signature", drive, name, lambda n=name: drive.unmask(n, request))


def test_second_unmask_request_gives_nothing_after_the_first() -> None:
    drive, _ = masked_round()
    for name in drive.names:
        told(drive, name, drive.names)
    held: Held = {SEED: {}, MASK_KEY: {}}
    for name in drive.names:
        taken(drive, name, drive.unmask(name, signatures(drive, drive.names, drive.names)), held)
    assert (len(held[SEED]), len(held[MASK_KEY])) == (5, 0)
    others = drive.names[1:]
    for name in others:
        for again in (
            lambda n=name: drive.unmask(n, signatures(drive, others, others)),
            lambda n=name: told(drive, n, others),
        ):
            refused("secagg-stage", drive, name, again)


def test_forged_signatures_and_the_stock_request_are_refused() -> None:
    """Hospitals signed that all survived; the server claims that they signed otherwise."""
    drive, _ = masked_round()
    for name in drive.names:
        told(drive, name, drive.names)
    context, others = drive.server._context, drive.names[1:]
    own = Identity.generate().sign(survivors_statement(context, drive.names))
    names = wire.pack("signatures", context, drive.names, [VICTIM])  # both lists, as stock has them
    requests = {
        "secagg-signature": (
            signatures(drive, others, others),
            m.build_signatures(context, [(name, own) for name in drive.names]),
        ),
        "secagg-malformed": (names,),
    }
    for name in others:
        stored = drive.states[name]
        for code, forged in requests.items():
            for request in forged:
                drive.states[name] = stored
                refused(code, drive, name, lambda n=name, r=request: drive.unmask(n, r))


def test_survivors_are_one_list_in_which_a_name_stands_once() -> None:
    drive, _ = masked_round()
    message = m.build_survivors(drive.server._context, [VICTIM, *drive.names[:4]])
    refused("secagg-duplicate", drive, "h01", lambda: drive.consistency("h01", message))


def test_a_state_that_is_used_twice_gives_both_secrets_so_the_transport_must_never() -> None:
    """The attack of stock, in full, against hospitals whose stored state was rolled back.

    It shows that the refusals above are what protects them, and what the transport owes
    the protocol: that no two processes ever start from one stored state.
    """
    drive, sent = masked_round()
    stored = dict(drive.states)
    held: Held = {SEED: {}, MASK_KEY: {}}
    for survivors in (drive.names, drive.names[1:]):
        drive.states = dict(stored)
        for name in survivors:
            told(drive, name, survivors)
        for name in survivors:
            answer = drive.unmask(name, signatures(drive, survivors, survivors))
            taken(drive, name, answer, held)
    seed, private = (shamir.reconstruct(held[kind], 4) for kind in (SEED, MASK_KEY))
    vector = without_pair_masks(drive, sent[VICTIM], private)
    add_mask(vector, self_mask_key(seed, VICTIM, drive.server._context), -1)
    assert np.array_equal(vector, drive.vectors[VICTIM])


def test_one_secret_alone_leaves_the_vector_masked() -> None:
    """A hospital that was only late: its mask key comes out, its seed does not."""
    drive, sent = masked_round()
    held: Held = {SEED: {}, MASK_KEY: {}}
    others = drive.names[1:]
    for name in others:
        told(drive, name, others)
    for name in others:
        taken(drive, name, drive.unmask(name, signatures(drive, others, others)), held)
    assert (len(held[SEED]), len(held[MASK_KEY])) == (0, 4)
    with pytest.raises(Refusal):
        shamir.reconstruct(held[SEED], 4)
    private = shamir.reconstruct(held[MASK_KEY], 4)
    vector = without_pair_masks(drive, sent[VICTIM], private)
    difference = vector - drive.vectors[VICTIM]  # the self mask: five uniform elements
    assert np.all(difference > 2)
