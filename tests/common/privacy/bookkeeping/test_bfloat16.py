"""In bfloat16, too, no unit adds more than the clipping norm: measured on what is summed."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from common.errors import PrivacyError
from common.model import ModelSpec, build, get_weights
from common.privacy.batches import PoissonBatches
from common.privacy.bookkeeping.factors import Factors, dense
from common.privacy.bookkeeping.module import BookKeeping
from common.privacy.clipped_sum import clipped_sum
from common.privacy.clipping import AUTOMATIC, FLAT, add_clipped
from common.privacy.engine import make_private
from common.privacy.randomness import SecureRandom
from tests.common.privacy.bookkeeping.compared import trained

MODELS = {
    "dpresnet": ModelSpec(width=0.0625),
    "dpresnet, options": ModelSpec(width=0.0625, residual_norm=True, weight_standardisation=True),
    "dpresnet, wide": ModelSpec(width=0.5),
    "resnet18": ModelSpec(model="resnet18", width=0.0625),
}


def booked(books: BookKeeping, x: Tensor, y: Tensor) -> None:
    books.zero_grad()
    with torch.autocast("cpu", torch.bfloat16):
        logits = books(x)
    F.cross_entropy(logits.float(), y, reduction="sum").backward()


def alone(gradients: list, i: int, clip: float, rule: str) -> Tensor:  # type: ignore[type-arg]
    """What unit i adds to the sum, and nothing else in it."""
    chosen = []
    for g in gradients:
        if isinstance(g, Tensor):
            chosen.append(g[i : i + 1])
        else:
            chosen.append(type(g)(g.left[i : i + 1], g.right[i : i + 1], g.shape))
    sums = [torch.zeros(dense(g).shape[1:], dtype=torch.float64) for g in chosen]
    add_clipped(sums, chosen, clip, rule)
    return torch.cat([s.flatten() for s in sums])


@pytest.mark.parametrize("units", [False, True])
@pytest.mark.parametrize("rule", [FLAT, AUTOMATIC])
@pytest.mark.parametrize("name", MODELS)
def test_no_unit_adds_more_than_the_clipping_norm(name: str, rule: str, units: bool) -> None:
    """Float64 norms of the very numbers that are summed; and what is clipped adds nearly C."""
    torch.manual_seed(0)
    net = build(MODELS[name], seed=1).train()
    books, seen = BookKeeping(net), set()
    for batch in range(3):
        x = 10.0 ** (batch - 1) * torch.randn(6, 3, 14, 14)
        y = torch.randint(8, (6,))
        of = torch.tensor([0, 1, 1, 2, 2, 2]) if units else None
        books.expect(of)
        booked(books, x, y)
        gradients = [p.grad_sample for p in trained(net)]
        seen |= {g.dtype if isinstance(g, Tensor) else Factors for g in gradients}
        count = 3 if units else 6
        for clip in (1e-3, 0.37, 1e4):
            adds = [alone(gradients, i, clip, rule) for i in range(count)]
            for i, added in enumerate(adds):
                assert float(added.norm()) <= clip
                if clip == 1e-3:
                    assert float(added.norm()) > (1 - 2.0**-6) * clip
                exact = torch.cat([dense(g)[i].double().flatten() for g in gradients])
                cosine = float(exact @ added / exact.norm() / added.norm())
                assert cosine == pytest.approx(1.0, abs=1e-5)
            sums = [torch.zeros(p.shape, dtype=torch.float64) for p in trained(net)]
            add_clipped(sums, gradients, clip, rule)
            whole = torch.cat([s.flatten() for s in sums])
            torch.testing.assert_close(whole, torch.stack(adds).sum(0), rtol=1e-9, atol=1e-12)
    # Sums over a unit's images and standardised convolutions are in float32.
    assert (torch.bfloat16 in seen) == (not units and name != "dpresnet, options")
    assert (Factors in seen) == (not units and name == "dpresnet, wide")


def test_the_gradients_are_those_of_float32_but_for_rounding() -> None:
    torch.manual_seed(0)
    net = build(ModelSpec(width=0.25), seed=1).train()
    x, y = torch.randn(8, 3, 28, 28), torch.arange(8)
    books = BookKeeping(net)
    booked(books, x, y)
    found = [dense(p.grad_sample).float().clone() for p in trained(net)]
    books.zero_grad()
    F.cross_entropy(books(x), y, reduction="sum").backward()
    expected = [dense(p.grad_sample) for p in trained(net)]
    one, other = (torch.cat([g.flatten(1) for g in gs], 1) for gs in (found, expected))
    assert bool(((one - other).norm(dim=1) < 0.05 * other.norm(dim=1)).all())
    assert bool(((one - other).norm(dim=1) > 1e-4 * other.norm(dim=1)).all())  # it was bfloat16


@pytest.mark.parametrize("spec", [ModelSpec(width=0.25), ModelSpec(width=0.0625)])
def test_an_image_s_gradient_is_the_same_to_the_bit_whatever_others_go_with_it(
    spec: ModelSpec,
) -> None:
    """Else, when one image goes, those of all others would move, and with them the sum."""
    torch.manual_seed(0)
    net = build(spec, seed=1).train()
    books = BookKeeping(net)
    books.together = 16
    x, y = torch.randn(16, 3, 28, 28), torch.arange(16) % 8

    def gradients(rows: Tensor) -> Tensor:
        booked(books, x[rows], y[rows])
        return torch.cat([dense(p.grad_sample).float().flatten(1) for p in trained(net)], 1)

    everyone = gradients(torch.arange(16))
    assert bool(torch.isfinite(everyone).all())
    for rows in (torch.arange(15), torch.arange(1, 16), torch.arange(3), torch.tensor([7]),
                 torch.randperm(16)):  # fmt: skip
        found = gradients(rows)
        assert found.shape[0] == len(rows)
        assert torch.equal(found, everyone[rows])


def test_removing_a_patient_moves_the_sum_by_at_most_the_clipping_norm() -> None:
    torch.manual_seed(0)
    spec, clip = ModelSpec(width=0.0625), 0.05
    start = get_weights(build(spec, seed=0))
    x, y, units = torch.randn(40, 3, 28, 28), torch.arange(40) % 8, torch.arange(40) // 4

    def released(kept: Tensor) -> Tensor:
        return clipped_sum(
            build(spec), start, x[kept], y[kept], sampling_rate=1.0, clipping_norm=clip,
            random=SecureRandom(), units=units[kept], precision="bfloat16",
        )  # fmt: skip

    whole = released(units >= 0)
    for patient in (0, 4, 9):
        moved = float((whole - released(units != patient)).norm())
        assert 0.9 * clip < moved <= clip


@pytest.mark.parametrize(("announced", "expected"), [(50.0, [16, 16, 16, 2]), (64.0, [32, 18])])
def test_all_parts_have_one_shape_and_a_larger_one_is_refused(
    announced: float, expected: list[int]
) -> None:
    net = build(ModelSpec(width=0.0625), seed=1).train()
    shapes: set[torch.Size] = set()
    x, y = torch.randn(50, 3, 14, 14), torch.arange(50) % 8
    batches = PoissonBatches(
        x, y, sampling_rate=1.0, steps=1, expected_batch_size=announced, random=SecureRandom()
    )
    wrapped, optimizer, _ = make_private(
        net, torch.optim.SGD(net.parameters(), lr=0.1), batches, noise_multiplier=1.0,
        clipping_norm=1.0, precision="bfloat16",
    )  # fmt: skip
    net.register_forward_pre_hook(lambda _, inputs: shapes.add(inputs[0].shape))
    sizes = []
    for part in batches:
        optimizer.zero_grad()
        optimizer.expect(part)
        logits = wrapped(part.images)
        assert len(logits) == len(part.labels)
        sizes.append(len(logits))
        F.cross_entropy(logits, part.labels, reduction="sum").backward()
        optimizer.step()
    assert sizes == expected
    assert shapes == {torch.Size((expected[0], 3, 14, 14))}
    with pytest.raises(PrivacyError, match="33 images at once"):
        wrapped(x[:33])


def test_a_model_that_book_keeping_does_not_know_is_refused() -> None:
    net = nn.Sequential(nn.Flatten(), nn.LayerNorm(12), nn.Linear(12, 3))
    batches = PoissonBatches(
        torch.randn(4, 3, 2, 2), torch.arange(4) % 3, sampling_rate=1.0, steps=1,
        expected_batch_size=4.0, random=SecureRandom(),
    )  # fmt: skip
    with pytest.raises(PrivacyError, match="bfloat16 through Opacus' hooks"):
        make_private(net, torch.optim.SGD(net.parameters(), lr=0.1), batches, noise_multiplier=1.0,
                     clipping_norm=1.0, precision="bfloat16")  # fmt: skip
