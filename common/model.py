"""The classifiers: DPResNet as published, and a ResNet-9 with batch norm for comparison.

DPResNet (arXiv 2412.00687): ReLU, group norm with 32 groups, convolutions without bias, no
max pooling; 4,802,120 parameters at width 1 for 28×28×3 images and 8 classes. Group norm
normalises each image by itself, which per-image clipping needs; batch norm mixes the images
of a batch, so ResNet-9 is refused under differential privacy.

No module works in place: Opacus reads a layer's input after the layer has run.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass

import numpy as np
import torch
from torch import Tensor, nn

from common.errors import ModelError

GROUPS = 32
"""Groups of every group norm at width 1; other widths keep the channels in a group."""


@dataclass(frozen=True, kw_only=True)
class ModelSpec:
    """What a model is built from; equal specs give the same parameter names and shapes."""

    model: str = "dpresnet"
    width: float = 1.0
    num_classes: int = 8
    channels: int = 3

    def digest(self) -> bytes:
        """SHA-256 of the specification: server and hospital compare it before training."""
        return hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode()).digest()


def _conv(c_in: int, c_out: int, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(c_in, c_out, 3, stride=stride, padding=1, bias=False)


class _Double(nn.Module):
    """conv, GN, ReLU, conv, GN; with ``skip`` the input is added to the output."""

    def __init__(self, c_in: int, c_out: int, groups: int, *, stride: int, skip: bool) -> None:
        super().__init__()
        self.body = nn.Sequential(
            _conv(c_in, c_out, stride), nn.GroupNorm(groups, c_out), nn.ReLU(),
            _conv(c_out, c_out), nn.GroupNorm(groups, c_out),
        )  # fmt: skip
        self.skip = skip

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.body(x)
        return x + y if self.skip else y


class DPResNet(nn.Module):
    """Input (N, channels, H, W) float32 in [-1, 1]; output (N, num_classes) logits."""

    def __init__(self, *, width: float = 1.0, num_classes: int = 8, channels: int = 3) -> None:
        super().__init__()
        # Channels are whole multiples of the groups (2, 4, 8 and 16 a group), so that group norm
        # normalises over as many channels at every width as it does in the paper.
        groups = max(1, round(GROUPS * width))
        c1, c2, c3, c4 = (groups * m for m in (2, 4, 8, 16))
        self.stem = nn.Sequential(
            _conv(channels, c1), nn.GroupNorm(groups, c1), nn.ReLU(),
            _conv(c1, c2), nn.GroupNorm(groups, c2), nn.ReLU(),
        )  # fmt: skip
        self.block1 = _Double(c2, c2, groups, stride=1, skip=True)
        self.block2 = _Double(c2, c3, groups, stride=2, skip=False)
        self.block3 = _Double(c3, c4, groups, stride=2, skip=False)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.head = nn.Linear(c4, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """(N, channels, H, W) → (N, num_classes)."""
        y = self.block3(self.block2(self.block1(self.stem(x))))
        logits: Tensor = self.head(self.pool(y).flatten(1))
        return logits


class ResNet9(nn.Module):
    """The usual ResNet-9: batch norm, max pooling, two residual blocks. Not for DP."""

    def __init__(self, *, width: float = 1.0, num_classes: int = 8, channels: int = 3) -> None:
        super().__init__()

        def unit(c_in: int, c_out: int, pool: bool = False) -> list[nn.Module]:
            layers = [_conv(c_in, c_out), nn.BatchNorm2d(c_out), nn.ReLU()]
            return [*layers, nn.MaxPool2d(2)] if pool else layers

        c1, c2, c3, c4 = (max(2, round(c * width)) for c in (64, 128, 256, 512))
        self.conv1 = nn.Sequential(*unit(channels, c1))
        self.conv2 = nn.Sequential(*unit(c1, c2, pool=True))
        self.res1 = nn.Sequential(*unit(c2, c2), *unit(c2, c2))
        self.conv3 = nn.Sequential(*unit(c2, c3, pool=True))
        self.conv4 = nn.Sequential(*unit(c3, c4, pool=True))
        self.res2 = nn.Sequential(*unit(c4, c4), *unit(c4, c4))
        self.pool = nn.AdaptiveMaxPool2d(1)
        self.head = nn.Linear(c4, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """(N, channels, H, W) → (N, num_classes)."""
        y = self.conv2(self.conv1(x))
        y = y + self.res1(y)
        y = self.conv4(self.conv3(y))
        y = y + self.res2(y)
        logits: Tensor = self.head(self.pool(y).flatten(1))
        return logits


def build(spec: ModelSpec, seed: int | None = None) -> nn.Module:
    """The model of ``spec``; with ``seed`` its initial weights depend on that seed alone.

    The seed is no secret: initial weights are public. The caller's random state is untouched.
    Raises :class:`~common.errors.ModelError` for an unknown name or no class to tell apart.
    """
    kinds: Mapping[str, type[nn.Module]] = {"dpresnet": DPResNet, "resnet9": ResNet9}
    if spec.model not in kinds:
        raise ModelError(f"unknown model '{spec.model}'", f"use one of: {', '.join(kinds)}")
    if spec.num_classes < 2:
        raise ModelError(
            f"the data set has {spec.num_classes} class(es), too few to tell apart",
            "give a data set with at least 2 classes",
        )
    with torch.random.fork_rng(devices=[]):
        if seed is not None:
            torch.manual_seed(seed)
        return kinds[spec.model](
            width=spec.width, num_classes=spec.num_classes, channels=spec.channels
        )


Weights = dict[str, np.ndarray]
"""A model's state: parameter or buffer name → array, in the model's own order."""


def get_weights(model: nn.Module) -> Weights:
    """A copy of the model's state as numpy arrays, on the CPU."""
    return {k: v.detach().cpu().numpy().copy() for k, v in model.state_dict().items()}


def set_weights(model: nn.Module, weights: Mapping[str, np.ndarray]) -> None:
    """Load ``weights`` into ``model``; ModelError names the first entry that does not fit."""
    state = model.state_dict()
    check_weights({k: tuple(v.shape) for k, v in state.items()}, weights)
    model.load_state_dict(
        {k: torch.from_numpy(np.array(weights[k])).to(v.dtype) for k, v in state.items()}
    )


def check_weights(shapes: Mapping[str, tuple[int, ...]], weights: Mapping[str, np.ndarray]) -> None:
    """Names, shapes and finiteness of ``weights`` against ``shapes``; ModelError if they differ."""
    odd = sorted(set(shapes) ^ set(weights))
    if odd:
        side = "lacks" if odd[0] in shapes else "has an unexpected"
        raise ModelError(
            f"the weights file or message {side} entry '{odd[0]}'",
            "use weights of the same model, width, classes and channels",
        )
    for name, shape in shapes.items():
        if tuple(weights[name].shape) != shape:
            raise ModelError(
                f"weights entry '{name}' has shape {tuple(weights[name].shape)}, not {shape}",
                "use weights of the same model, width, classes and channels",
            )
        if not np.isfinite(weights[name]).all():
            raise ModelError(
                f"weights entry '{name}' holds NaN or infinity",
                "go back to the last good round's model; lower the learning rate",
            )


def weights_digest(weights: Mapping[str, np.ndarray]) -> str:
    """SHA-256 (hex) over names, dtypes, shapes and values: the id of a model's state."""
    h = hashlib.sha256()
    for name in sorted(weights):
        array = np.asarray(weights[name], order="C")
        h.update(f"{name}\0{array.dtype.str}\0{array.shape}\0".encode())
        h.update(array.tobytes())
    return h.hexdigest()
