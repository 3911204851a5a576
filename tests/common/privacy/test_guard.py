"""What would make a run look private and not be is refused before the first step."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from common.errors import PrivacyError
from common.model import DPResNet, ModelSpec, build, get_weights
from common.privacy.guard import check_criterion, check_images, check_model, check_units
from common.training import PrivateStep, TrainSettings, train

PRIVATE = TrainSettings(
    epochs=1, batch_size=4, learning_rate=1e-3, optimizer="adam",
    privacy=PrivateStep(
        noise_multiplier=1.0, clipping_norm=1.0, sampling_rate=1.0, steps=2, expected_batch_size=8.0
    ),
)  # fmt: skip


def test_the_published_network_passes() -> None:
    check_model(DPResNet(width=0.125))
    check_images(torch.zeros(2, 3, 8, 8))
    check_criterion(F.cross_entropy, 8)


def test_batch_norm_is_refused() -> None:
    with pytest.raises(PrivacyError, match="mixes the images"):
        check_model(build(ModelSpec(model="resnet9", width=0.1)))


def test_in_place_modules_are_refused() -> None:
    with pytest.raises(PrivacyError, match="in place"):
        check_model(nn.Sequential(nn.Linear(2, 2), nn.ReLU(inplace=True)))


def test_channels_last_weights_are_refused() -> None:
    with pytest.raises(PrivacyError, match="channels_last"):
        check_model(DPResNet(width=0.125).to(memory_format=torch.channels_last))


def test_channels_last_images_are_refused_by_the_trainer() -> None:
    model = DPResNet(width=0.125)
    images = torch.zeros(8, 3, 28, 28).to(memory_format=torch.channels_last)
    with pytest.raises(PrivacyError, match="channels_last"):
        train(model, get_weights(model), images, torch.zeros(8, dtype=torch.long), PRIVATE, seed=0)


def test_channels_last_activations_inside_the_network_are_refused() -> None:
    class Turns(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3)
            self.head = nn.Linear(4, 2)

        def forward(self, x: Tensor) -> Tensor:
            y = self.one(x).contiguous(memory_format=torch.channels_last)
            z: Tensor = self.head(self.two(y).mean((2, 3)))
            return z

    model = Turns()
    with pytest.raises(PrivacyError, match="not contiguous"):
        train(model, get_weights(model), torch.randn(8, 3, 8, 8),
              torch.zeros(8, dtype=torch.long), PRIVATE, seed=0)  # fmt: skip


def test_losses_that_couple_images_are_refused() -> None:
    weights = torch.tensor([1.0, 5.0, 1.0], dtype=torch.float64)

    def class_weighted(z: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(z, y, weight=weights)

    def contrastive(z: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(z @ z.T, y * 0)

    for coupled in (class_weighted, contrastive):
        with pytest.raises(PrivacyError, match="couples"):
            check_criterion(coupled, 3)


def test_losses_that_are_no_mean_are_refused() -> None:
    """Under a sum the trainer's factor n would scale all gradients when one image goes."""

    def total(z: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(z, y, reduction="sum")

    def mean_with_a_fixed_divisor(z: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(z, y, reduction="sum") / 6

    for other in (total, mean_with_a_fixed_divisor):
        with pytest.raises(PrivacyError, match="no mean"):
            check_criterion(other, 3)


def test_label_smoothing_is_accepted() -> None:
    check_criterion(nn.CrossEntropyLoss(label_smoothing=0.1), 8)


@pytest.mark.parametrize(
    "units",
    [torch.zeros(3, dtype=torch.int64), torch.zeros(4), torch.zeros(4, 1, dtype=torch.int64)],
)
def test_units_that_do_not_number_the_images_are_refused(units: Tensor) -> None:
    with pytest.raises(PrivacyError, match="for 4 images"):
        check_units(units, 4)


def test_images_with_nan_are_refused() -> None:
    images = torch.zeros(2, 3, 8, 8)
    images[0, 0, 0, 0] = float("nan")
    with pytest.raises(PrivacyError, match="NaN"):
        check_images(images)
