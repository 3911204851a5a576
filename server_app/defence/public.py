"""The coordinator's own images as judge of a round's model (``adopted-by=public``)."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch

from common.config import RunConfig
from common.devices import usable_cores
from common.errors import ConfigError
from common.evaluation import evaluate
from common.model import ModelSpec, build
from common.prior.kept import head_alone
from common.training import to_tensor
from server_app.defence.defence import Judge
from server_app.defence.figures import Validated
from server_app.vectors.public import judging_images


def public_judge(config: RunConfig, spec: ModelSpec) -> Judge | None:
    """Figures of models on public images; None unless the run config asks for it.

    ConfigError where it does and the coordinator has none.
    """
    if config.adopted_by != "public" or not config.defence:
        return None
    found = judging_images(config)
    if found is None or not len(found.labels):
        raise ConfigError(
            "'adopted-by' is public, and the coordinator has no images of its own",
            "set test-data to a file with a val split, or adopted-by=hospitals",
        )
    images, labels = to_tensor(found.images), torch.from_numpy(found.labels)
    network = build(spec)

    def judged(weights: Mapping[str, np.ndarray]) -> Validated:
        model, entries, inputs = head_alone(network, weights, images)
        result = evaluate(
            model, entries, inputs, labels,
            threads=usable_cores(), precision=config.precision, device=config.device,
        )  # fmt: skip
        n = result.examples
        return Validated(result.correct / n, result.loss_sum / n, float(n))

    return judged
