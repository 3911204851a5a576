"""The networks: DPResNet as published, and ResNet-9 and ResNet-18 for comparison.

DPResNet (arXiv 2412.00687): ReLU, group norm with 32 groups, convolutions without bias, no
max pooling; 4,802,120 parameters at width 1 for 28×28×3 images and 8 classes. Group norm
normalises each image by itself, which per-image clipping needs; batch norm mixes the images
of a batch, so ResNet-9 with it is refused under differential privacy.

Two options that are reported to help under privacy, both off in what was published:

* ``residual_norm``: one more norm after each residual addition (Klause et al., *Differentially
  private training of residual networks with scale normalisation*, 2022);
* ``weight_standardisation``: :class:`StandardisedConv2d` for every convolution (De et al. 2022,
  *Unlocking High-Accuracy Differentially Private Image Classification through Scale*).

No module works in place: Opacus reads a layer's input after the layer has run.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

GROUPS = 32
"""Groups of every group norm at width 1; other widths keep the channels in a group."""

_LEAST = 1e-4
"""A filter whose squared norm is below this is not scaled up to norm 1, but by a fixed factor."""


class StandardisedConv2d(nn.Conv2d):
    """A convolution by filters of mean 0 and variance 1/fan-in, whatever ``weight`` holds.

    Weight standardisation (Qiao et al. 2019), with the scaling of De et al. (2022): each output
    channel's filter w is used as (w − mean w) / ‖w − mean w‖. There is no learned gain, since the
    norm that follows has one for each channel. ``weight`` keeps its name, shape and
    initialisation. Ungrouped and without bias: ValueError otherwise.

    Per-image gradients of it are made by :mod:`common.privacy.samplers`; Opacus, which goes by a
    layer's exact type, does not take it for the convolution that it knows.
    """

    def __init__(self, c_in: int, c_out: int, kernel: int, *, stride: int, padding: int) -> None:
        super().__init__(c_in, c_out, kernel, stride=stride, padding=padding, bias=False)

    def forward(self, input: Tensor) -> Tensor:
        """(N, c_in, H, W) → (N, c_out, H', W')."""
        filters = self.weight.flatten(1)
        centred = filters - filters.mean(1, keepdim=True)
        used = (centred * _scale(centred)).view_as(self.weight)
        y: Tensor = self._conv_forward(input, used, None)
        return y

    def pull_back(self, gradients: Tensor) -> Tensor:
        """Gradients by the standardised filters → gradients by ``weight``, both (n, *weight.shape).

        Each row by itself: with z a standardised filter and s its scale, g becomes
        s·(g − mean g − z⟨z, g⟩); without the last term where the scale is fixed.
        """
        with torch.no_grad():
            filters = self.weight.flatten(1)
            centred = filters - filters.mean(1, keepdim=True)
            scale = _scale(centred)
            fixed = centred.square().sum(1, keepdim=True) < _LEAST
            z = (centred * scale).masked_fill_(fixed, 0.0)
            rows = gradients.flatten(2)
            along = torch.einsum("nop,op->no", rows, z).unsqueeze(2)
            moved = (rows - rows.mean(2, keepdim=True) - along * z) * scale
            return moved.view_as(gradients)


def _scale(centred: Tensor) -> Tensor:
    """(filters, fan-in) of mean 0 → (filters, 1): 1 / norm."""
    scale: Tensor = centred.square().sum(1, keepdim=True).clamp_min(_LEAST).rsqrt()
    return scale


class _Kit:
    """The layers that a network is made of."""

    def __init__(self, norm: Callable[[int], nn.Module], residual_norm: bool, ws: bool) -> None:
        self.norm = norm
        self._residual_norm, self._standardised = residual_norm, ws

    def conv(self, c_in: int, c_out: int, stride: int = 1, kernel: int = 3) -> nn.Conv2d:
        """A convolution that keeps the picture's size at stride 1."""
        if self._standardised:
            return StandardisedConv2d(c_in, c_out, kernel, stride=stride, padding=kernel // 2)
        return nn.Conv2d(c_in, c_out, kernel, stride=stride, padding=kernel // 2, bias=False)

    def after_addition(self, channels: int) -> nn.Module:
        return self.norm(channels) if self._residual_norm else nn.Identity()

    def double(self, c_in: int, c_out: int, stride: int) -> nn.Sequential:
        """conv, norm, ReLU, conv, norm."""
        return nn.Sequential(
            self.conv(c_in, c_out, stride), self.norm(c_out), nn.ReLU(),
            self.conv(c_out, c_out), self.norm(c_out),
        )  # fmt: skip


def _grouped(width: float) -> tuple[Callable[[int], nn.Module], tuple[int, int, int, int]]:
    """(a group norm for so many channels, the channels of four stages) at ``width``.

    Channels are whole multiples of the groups (2, 4, 8 and 16 a group), so that group norm
    normalises over as many channels at every width as it does in the paper.
    """
    groups = max(1, round(GROUPS * width))
    return lambda channels: nn.GroupNorm(groups, channels), (
        2 * groups, 4 * groups, 8 * groups, 16 * groups,
    )  # fmt: skip


class _Double(nn.Module):
    """conv, GN, ReLU, conv, GN; with ``skip`` the input is added to the output."""

    def __init__(self, kit: _Kit, c_in: int, c_out: int, *, stride: int, skip: bool) -> None:
        super().__init__()
        self.body = kit.double(c_in, c_out, stride)
        self.skip = skip
        self.after = kit.after_addition(c_out) if skip else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.body(x)
        if self.skip:
            y = self.after(x + y)
        return y


class DPResNet(nn.Module):
    """Input (N, channels, H, W) float32 in [-1, 1]; output (N, num_classes) logits."""

    def __init__(
        self,
        *,
        width: float = 1.0,
        num_classes: int = 8,
        channels: int = 3,
        residual_norm: bool = False,
        weight_standardisation: bool = False,
    ) -> None:
        super().__init__()
        norm, (c1, c2, c3, c4) = _grouped(width)
        kit = _Kit(norm, residual_norm, weight_standardisation)
        self.stem = nn.Sequential(
            kit.conv(channels, c1), norm(c1), nn.ReLU(),
            kit.conv(c1, c2), norm(c2), nn.ReLU(),
        )  # fmt: skip
        self.block1 = _Double(kit, c2, c2, stride=1, skip=True)
        self.block2 = _Double(kit, c2, c3, stride=2, skip=False)
        self.block3 = _Double(kit, c3, c4, stride=2, skip=False)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.head = nn.Linear(c4, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """(N, channels, H, W) → (N, num_classes)."""
        y = self.block3(self.block2(self.block1(self.stem(x))))
        logits: Tensor = self.head(self.pool(y).flatten(1))
        return logits


class ResNet9(nn.Module):
    """The usual ResNet-9: max pooling, two residual blocks; batch norm (not for DP) or group."""

    def __init__(
        self,
        *,
        width: float = 1.0,
        num_classes: int = 8,
        channels: int = 3,
        residual_norm: bool = False,
        weight_standardisation: bool = False,
        group_norm: bool = False,
    ) -> None:
        super().__init__()
        norm, (c1, c2, c3, c4) = _grouped(width)
        if not group_norm:
            norm = nn.BatchNorm2d
            c1, c2, c3, c4 = (max(2, round(c * width)) for c in (64, 128, 256, 512))
        kit = _Kit(norm, residual_norm, weight_standardisation)

        def unit(c_in: int, c_out: int, pool: bool = False) -> list[nn.Module]:
            layers = [kit.conv(c_in, c_out), norm(c_out), nn.ReLU()]
            return [*layers, nn.MaxPool2d(2)] if pool else layers

        self.conv1 = nn.Sequential(*unit(channels, c1))
        self.conv2 = nn.Sequential(*unit(c1, c2, pool=True))
        self.res1 = nn.Sequential(*unit(c2, c2), *unit(c2, c2))
        self.after1 = kit.after_addition(c2)
        self.conv3 = nn.Sequential(*unit(c2, c3, pool=True))
        self.conv4 = nn.Sequential(*unit(c3, c4, pool=True))
        self.res2 = nn.Sequential(*unit(c4, c4), *unit(c4, c4))
        self.after2 = kit.after_addition(c4)
        self.pool = nn.AdaptiveMaxPool2d(1)
        self.head = nn.Linear(c4, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """(N, channels, H, W) → (N, num_classes)."""
        y = self.conv2(self.conv1(x))
        y = self.after1(y + self.res1(y))
        y = self.conv4(self.conv3(y))
        y = self.after2(y + self.res2(y))
        logits: Tensor = self.head(self.pool(y).flatten(1))
        return logits


class _Basic(nn.Module):
    """ResNet's basic block: conv, GN, ReLU, conv, GN, plus the (projected) input, ReLU."""

    def __init__(self, kit: _Kit, c_in: int, c_out: int, stride: int) -> None:
        super().__init__()
        self.body = kit.double(c_in, c_out, stride)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or c_in != c_out:
            self.shortcut = nn.Sequential(kit.conv(c_in, c_out, stride, 1), kit.norm(c_out))
        self.after = kit.after_addition(c_out)
        self.relu = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.relu(self.after(self.shortcut(x) + self.body(x)))
        return y


class ResNet18(nn.Module):
    """ResNet-18 (He et al. 2016) for small pictures, with group norm.

    As is usual for 28×28 and 32×32 images, the stem is one 3×3 convolution of stride 1 without
    max pooling: 11,172,936 parameters at width 1 for 3 channels and 8 classes.
    """

    def __init__(
        self,
        *,
        width: float = 1.0,
        num_classes: int = 8,
        channels: int = 3,
        residual_norm: bool = False,
        weight_standardisation: bool = False,
    ) -> None:
        super().__init__()
        norm, (c1, c2, c3, c4) = _grouped(width)
        kit = _Kit(norm, residual_norm, weight_standardisation)
        self.conv1 = nn.Sequential(kit.conv(channels, c1), norm(c1), nn.ReLU())
        self.layer1 = nn.Sequential(_Basic(kit, c1, c1, 1), _Basic(kit, c1, c1, 1))
        self.layer2 = nn.Sequential(_Basic(kit, c1, c2, 2), _Basic(kit, c2, c2, 1))
        self.layer3 = nn.Sequential(_Basic(kit, c2, c3, 2), _Basic(kit, c3, c3, 1))
        self.layer4 = nn.Sequential(_Basic(kit, c3, c4, 2), _Basic(kit, c4, c4, 1))
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.head = nn.Linear(c4, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """(N, channels, H, W) → (N, num_classes)."""
        y = self.layer4(self.layer3(self.layer2(self.layer1(self.conv1(x)))))
        logits: Tensor = self.head(self.pool(y).flatten(1))
        return logits
