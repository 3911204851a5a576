"""Train a ring network on drawn cells: name the stage and the nucleus, measure the attributes."""

from __future__ import annotations

import math
import time
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional

from common.devices import CPU, device_of
from common.prior.drawing import ATTRIBUTES, STAGE_COUNT, Cells
from common.prior.kinds import FORMS
from common.prior.network import PretextHeads, RingNet
from common.prior.rings import dihedral_views

_BATCH = 128
_RATE = 4e-3
_DECAY = 0.02
_WARM_UP = 0.05


def to_unit(pictures: Tensor) -> Tensor:
    """Turn uint8 (n, 3, s, s) into float32 in [-1, 1]."""
    return pictures.float() / 127.5 - 1


def _turned(batch: Tensor, generator: torch.Generator) -> Tensor:
    """Turn and mirror a batch: each quarter of it by another of the eight views."""
    views = torch.randint(8, (4,), generator=generator).tolist()
    parts = batch.chunk(4)
    return torch.cat([dihedral_views(p)[v] for p, v in zip(parts, views, strict=False)])


def train_network(
    cells: Cells,
    *,
    width: int,
    steps: int,
    seed: int,
    report: Callable[[int, float], None] | None = None,
    seconds: float = math.inf,
    device: str = CPU,
) -> RingNet:
    """Train a network for ``steps`` steps, or as many as fit in ``seconds`` of wall time.

    Uses bfloat16 where the processor has it. ``report(step, loss)`` is called now and then.
    ``device`` is of :data:`common.devices.DEVICES`; the network is on the CPU in the end.
    """
    where = device_of(device)
    torch.manual_seed(seed % 2**63)
    generator = torch.Generator().manual_seed((seed + 1) % 2**63)
    size = cells.pictures.shape[-1]
    net = RingNet(width, size)
    net.to(where, memory_format=torch.channels_last)  # type: ignore[call-overload]
    heads = PretextHeads(net.features, STAGE_COUNT, len(FORMS), len(ATTRIBUTES)).to(where)
    cells = cells.to(where)
    mean, spread = cells.attributes.mean(0), cells.attributes.std(0).clamp(min=1e-3)
    weights = [*net.parameters(), *heads.parameters()]
    optimizer = torch.optim.AdamW(weights, lr=_RATE, weight_decay=_DECAY)
    started, progress, step = time.monotonic(), 0.0, 0
    order = torch.randperm(len(cells), generator=generator)
    at = 0
    while progress < 1:
        if at + _BATCH > len(cells):
            order, at = torch.randperm(len(cells), generator=generator), 0
        chosen = order[at : at + _BATCH].to(where)
        at += _BATCH
        rate = min(progress / _WARM_UP, 0.5 * (1 + math.cos(math.pi * progress)))
        for group in optimizer.param_groups:
            group["lr"] = _RATE * max(rate, 1e-3)
        batch = _turned(to_unit(cells.pictures[chosen]), generator)
        batch = batch.contiguous(memory_format=torch.channels_last)
        with torch.autocast(where.type, torch.bfloat16):
            features = net(batch)
        stage, form, attributes = heads(features.float())
        target = ((cells.attributes[chosen] - mean) / spread).clamp(-4, 4)
        loss = (
            functional.cross_entropy(stage, cells.stage[chosen], label_smoothing=0.05)
            + functional.cross_entropy(form, cells.form[chosen], label_smoothing=0.05)
            + functional.mse_loss(attributes, target)
        )
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(weights, 2.0)
        optimizer.step()
        step += 1
        progress = max(step / steps, (time.monotonic() - started) / seconds)
        if report is not None and step % 50 == 0:
            report(step, float(loss.detach()))
    return net.cpu().eval()
