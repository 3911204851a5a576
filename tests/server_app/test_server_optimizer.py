"""The server's optimizer is the one that it is called, weight decay included."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from common.config import RunConfig
from common.errors import ConfigError
from server_app.server_step import ServerStep

SHAPES = {"hidden": (3, 4), "head": (2, 3)}
EXAMPLES, RATE = 50.0, 0.2


@pytest.mark.parametrize("decay", [0.0, 0.03])
@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
def test_steps_are_those_of_torchs_optimizers(optimizer: str, decay: float) -> None:
    config = RunConfig.parse(
        {"dataset": "synthetic", "privacy": "distributed", "rounds": 9, "sampling-rate": 0.5,
         "optimizer": optimizer, "learning-rate": RATE, "learning-rate-schedule": "constant",
         "weight-decay": decay}
    )  # fmt: skip
    generator = torch.Generator().manual_seed(0)
    theirs = {
        n: torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_()
        for n, shape in SHAPES.items()
    }
    ours = {n: p.detach().numpy().copy() for n, p in theirs.items()}
    ours["mean"] = np.ones(3)
    kinds = {
        "sgd": lambda p: torch.optim.SGD(p, RATE, momentum=0.9, weight_decay=decay),
        "adam": lambda p: torch.optim.AdamW(p, RATE, weight_decay=decay),
    }
    search = kinds[optimizer](list(theirs.values()))
    step = ServerStep(config, SHAPES, 0, 1.0, {})
    for number in range(1, 9):
        gradients = [torch.randn_like(p) for p in theirs.values()]
        for p, g in zip(theirs.values(), gradients, strict=True):
            p.grad = g
        search.step()
        total = torch.cat([g.flatten() for g in gradients]).numpy() * 0.5 * EXAMPLES
        ours = step.moved(ours, total, EXAMPLES, number)
    for name, p in theirs.items():
        np.testing.assert_allclose(ours[name], p.detach().numpy(), rtol=1e-6, atol=1e-7)
    np.testing.assert_array_equal(ours["mean"], np.ones(3))  # nobody's step


def test_weight_decay_where_the_server_takes_no_steps_is_refused() -> None:
    with pytest.raises(ConfigError, match="server's optimizer"):
        RunConfig.parse({"dataset": "synthetic", "weight-decay": 0.1})
