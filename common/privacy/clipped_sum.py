"""One Poisson batch's sum of clipped gradients: what a hospital adds its share of the noise to.

The sum itself is private and must not leave: :meth:`common.privacy.distributed.NoiseShares.release`
makes of it what may go into secure aggregation.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from common.devices import CPU, device_of
from common.model import set_weights
from common.privacy.batches import PoissonBatches
from common.privacy.clipping import FLAT
from common.privacy.engine import images_at_once, make_private
from common.privacy.guard import ContiguityWatch, Criterion, check_criterion, check_images
from common.privacy.randomness import SecureRandom


def clipped_sum(
    model: nn.Module,
    start: Mapping[str, np.ndarray],
    images: Tensor,
    labels: Tensor,
    *,
    sampling_rate: float,
    clipping_norm: float,
    random: SecureRandom,
    units: Tensor | None = None,
    criterion: Criterion = F.cross_entropy,
    views: int = 0,
    clipping: str = FLAT,
    precision: str = "float32",
    device: str = CPU,
    expected_batch_size: float = 1.0,
) -> Tensor:
    """Σ f(‖g_u‖) g_u over a fresh Poisson batch of privacy units u: (d,) float64.

    g_u is the gradient of the *sum* of the unit's losses at ``start``, f the factor of the
    ``clipping`` rule (:mod:`common.privacy.clipping`), by default min(1, C / ‖g_u‖); coordinates
    are those of ``model.parameters()`` that are trained, in their order. With ``views`` K ≥ 1 an
    image's loss is the mean over K random views of it (:mod:`common.privacy.views`). ``units`` as
    in :func:`common.training.train`. A unit whose gradient is not finite counts as none. With
    ``precision`` ``bfloat16`` gradients are computed in it; norms and sums are of what comes out.
    ``device`` is of :data:`common.devices.DEVICES`; the sum is on the CPU in any case.
    ``expected_batch_size``, announced and in units, is what parts are sized by.
    Raises PrivacyError for what would break the guarantee (:mod:`common.privacy.guard`, and
    bfloat16 for a model that book-keeping does not know).
    """
    where = device_of(device)
    set_weights(model, start)
    model.to(where).train()
    images, labels = images.to(where), labels.to(where)
    check_images(images)
    with torch.no_grad():
        num_classes = model(images[:1]).shape[1]
    check_criterion(criterion, num_classes)
    batches = PoissonBatches(
        images, labels, sampling_rate=sampling_rate, steps=1,
        expected_batch_size=expected_batch_size,
        random=random, units=units, most_images=images_at_once(model), views=views,
    )  # fmt: skip
    # Noise and step of this optimizer are never used: only what it clips and sums.
    wrapped, optimizer, _ = make_private(
        model, torch.optim.SGD(model.parameters(), lr=1.0), batches,
        noise_multiplier=1.0, clipping_norm=clipping_norm, clipping=clipping,
        precision=precision,
    )  # fmt: skip
    watch, half = ContiguityWatch(model), precision == "bfloat16"
    try:
        for part in batches:
            optimizer.zero_grad()
            optimizer.expect(part)
            if len(part.labels):
                with torch.autocast(where.type, torch.bfloat16, enabled=half):
                    logits = wrapped(part.images)
                optimizer.backward(logits.float(), part.labels, criterion)
            optimizer.clip_and_accumulate()
            optimizer._is_last_step_skipped = not part.last  # else the next part's begins anew
        return torch.cat([p.summed_grad.reshape(-1) for p in optimizer.params]).cpu()
    finally:
        watch.remove()
        wrapped.remove_hooks()  # type: ignore[operator]  # the caller's model is plain again
