from __future__ import annotations

import pytest
import torch

from common.errors import DataError
from common.prior.drawing import ATTRIBUTES, CHIMERA, draw_cells
from common.prior.kinds import FORMS, KINDS, STAGES
from common.prior.stains import blur, compressed


def test_the_same_seed_draws_the_same_cells_and_another_seed_draws_others() -> None:
    one, two, other = (draw_cells(70, seed=s) for s in (3, 3, 4))
    assert torch.equal(one.pictures, two.pictures)
    assert torch.equal(one.attributes, two.attributes)
    assert not torch.equal(one.pictures, other.pictures)


def test_cells_have_the_shapes_and_ranges_that_they_promise() -> None:
    cells = draw_cells(130, seed=0, size=20)
    assert cells.pictures.shape == (130, 3, 20, 20) and cells.pictures.dtype == torch.uint8
    assert cells.attributes.shape == (130, len(ATTRIBUTES))
    assert torch.isfinite(cells.attributes).all()
    assert int(cells.form.min()) >= 0 and int(cells.form.max()) < len(FORMS)
    # A chimera has a stage of its own and no kind; the others' kind is their stage's.
    for stage, kind in zip(cells.stage.tolist(), cells.kind.tolist(), strict=True):
        assert kind == (-1 if stage == CHIMERA else STAGES[stage].kind)


def test_every_kind_is_drawn_about_equally_often() -> None:
    cells = draw_cells(1600, seed=1, size=12, chimeras=0.0)
    counts = torch.bincount(cells.kind, minlength=len(KINDS))
    assert int(counts.min()) > 140 and int(counts.max()) < 260


def test_drawn_pictures_follow_what_the_books_say() -> None:
    """Platelets are small and pale, and the nucleus of a small lymphocyte fills its cell."""
    cells = draw_cells(300, seed=2, chimeras=0.0)
    middle = cells.pictures[:, 0, 8:20, 8:20].float().mean((1, 2))  # red light: dyes of nuclei
    names = [s.name for s in STAGES]
    lymphocyte = middle[cells.stage == names.index("small lymphocyte")].mean()
    platelet = middle[cells.stage == names.index("platelet")].mean()
    assert lymphocyte + 30 < platelet
    view = ATTRIBUTES.index("area in view")
    assert cells.attributes[cells.kind == 7, view].mean() < 0.2
    assert cells.attributes[cells.kind == 5, view].mean() > 0.25


@pytest.mark.parametrize(("count", "size"), [(0, 28), (5, 27), (5, 8)])
def test_impossible_requests_are_refused(count: int, size: int) -> None:
    with pytest.raises(DataError):
        draw_cells(count, seed=0, size=size)


def test_blur_keeps_an_even_picture_and_compression_with_a_tiny_step_keeps_any() -> None:
    even = torch.full((2, 3, 16, 16), 0.4)
    torch.testing.assert_close(blur(even, torch.tensor([0.5, 2.0])), even)
    noisy = torch.rand(2, 3, 16, 16)
    kept = compressed(noisy, torch.full((2,), 1e-4))
    torch.testing.assert_close(kept, noisy, atol=2e-3, rtol=0)
    coarse = compressed(noisy, torch.full((2,), 0.3))
    assert (coarse - noisy).abs().mean() > 0.05
