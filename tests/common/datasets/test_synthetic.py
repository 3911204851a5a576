"""The built-in cells: deterministic, plausible in shape, not linear, and learnable."""

from __future__ import annotations

import time
import warnings
from typing import Any

import numpy as np
import pytest

from common.datasets import Dataset, make_images, make_synthetic
from common.datasets.synthetic import MIN_SIZE
from common.errors import DataError


@pytest.fixture(scope="module")
def full() -> Dataset:
    """Return the default set, which must be drawn in seconds."""
    start = time.process_time()
    data = make_synthetic()
    assert time.process_time() - start < 6
    return data


def test_shape_and_balance(full: Dataset) -> None:
    """6000 images in three splits, mildly imbalanced, no two alike."""
    assert (len(full.train), len(full.val), len(full.test)) == (4500, 500, 1000)
    assert full.image_shape == (28, 28, 3)
    assert full.num_classes == 8
    counts = full.train.class_counts(8)
    assert 1.3 < counts.max() / counts.min() < 2
    everything = np.concatenate([full.train.images, full.val.images, full.test.images])
    assert len(np.unique(everything.reshape(6000, -1), axis=0)) == 6000
    assert full.source == "built-in synthetic cells (no real image)"
    assert not np.all(np.diff(full.train.labels) >= 0)


def test_every_pair_of_cues_is_shared() -> None:
    """Nucleus, colour or texture left out: two classes look the same."""
    words = [name.split() for name in make_synthetic(MIN_SIZE).class_names]
    assert len({tuple(w) for w in words}) == 8
    for left_out in range(3):
        assert len({tuple(x for i, x in enumerate(w) if i != left_out) for w in words}) < 8


def test_deterministic_for_a_seed() -> None:
    """The same arguments, the same digest; another seed or size, another."""
    first = make_synthetic(200, seed=3)
    again = make_synthetic(200, seed=3)
    assert first.sha256 == again.sha256
    assert np.array_equal(first.test.images, again.test.images)
    assert (
        len({first.sha256, make_synthetic(200, seed=4).sha256, make_synthetic(201, seed=3).sha256})
        == 3
    )


@pytest.mark.parametrize("size", [MIN_SIZE, 97, 131, 1000])
def test_small_sizes_hold_every_class(size: int) -> None:
    """Each split of the smallest set still has all eight."""
    data = make_synthetic(size, seed=-1)
    assert len(data.train) + len(data.val) + len(data.test) == size
    for split in (data.train, data.val, data.test):
        assert (split.class_counts(8) >= 1).all()


def test_any_image_size() -> None:
    """Other sizes show the same kind of picture."""
    for size in (12, 33, 64):
        images = make_images(np.arange(8), image_size=size, rng=np.random.default_rng(0))
        assert images.shape == (8, size, size, 3)
        assert images.dtype == np.uint8
        assert images.std() > 20


def test_refusals() -> None:
    """Too few images, too few pixels, no such class."""
    with pytest.raises(DataError, match="synthetic-size is 95"):
        make_synthetic(MIN_SIZE - 1)
    with pytest.raises(DataError, match="image-size is 8"):
        make_synthetic(image_size=8)
    with pytest.raises(DataError, match="no synthetic class"):
        make_images(np.array([8]), rng=np.random.default_rng(0))


@pytest.mark.slow
@pytest.mark.timeout(240)
def test_a_small_network_beats_a_linear_model(full: Dataset) -> None:
    """Raw pixels weighed linearly stay 15 points or more below a CNN after four epochs."""
    torch = pytest.importorskip("torch")
    linear_model = pytest.importorskip("sklearn.linear_model")
    from torch import nn

    def flat(images: np.ndarray) -> np.ndarray:
        return images.reshape(len(images), -1).astype(np.float32) / 255 - 0.5

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # forty steps of the solver are enough to compare
        linear = linear_model.LogisticRegression(max_iter=40, C=0.01)
        linear.fit(flat(full.train.images), full.train.labels)
    linear_accuracy = linear.score(flat(full.test.images), full.test.labels)

    def tensor(images: np.ndarray) -> Any:
        return torch.from_numpy(images).permute(0, 3, 1, 2).float().contiguous() / 127.5 - 1

    def block(inputs: int, outputs: int, stride: int) -> list[nn.Module]:
        conv = nn.Conv2d(inputs, outputs, 3, stride=stride, padding=1, bias=False)
        return [conv, nn.GroupNorm(4, outputs), nn.ReLU()]

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            layers = [*block(3, 16, 1), *block(16, 32, 2), *block(32, 64, 2), *block(64, 64, 1)]
            head = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 8)]
            net = nn.Sequential(*layers, *head)
            x, y = tensor(full.train.images), torch.from_numpy(full.train.labels)
            batch, epochs = 64, 4
            steps = epochs * -(-len(x) // batch)
            optimizer = torch.optim.Adam(net.parameters(), 3e-3)
            schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 4e-3, total_steps=steps)
            for _ in range(epochs):
                for chosen in torch.randperm(len(x)).split(batch):
                    optimizer.zero_grad()
                    loss: Any = nn.functional.cross_entropy(net(x[chosen]), y[chosen])
                    loss.backward()
                    optimizer.step()
                    schedule.step()
            with torch.no_grad():
                guess = net(tensor(full.test.images)).argmax(1).numpy()
    finally:
        torch.set_num_threads(threads)
    cnn_accuracy = float((guess == full.test.labels).mean())
    print(f"linear {linear_accuracy:.3f}, CNN {cnn_accuracy:.3f}")
    assert cnn_accuracy >= 0.85
    assert linear_accuracy <= cnn_accuracy - 0.15
