"""Membership inference from a model's outputs: was this image in its training set?

Many models are trained on random halves of one pool of images. Each in turn is attacked, by

* the loss threshold (Yeom et al. 2018, §3.2): a member's loss is small;
* the likelihood ratio (Carlini et al. 2022, *LiRA*, §4 and figure 14: online, one variance for
  all images): what do the *other* models, with and without this image, say about it?

An attack is measured pooled over all models and images. Thresholds for one half of the images
are chosen on the other half. Intervals are from a bootstrap over images (percentiles): the
models are taken as given.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from scipy.stats import norm, rankdata
from torch import Tensor, nn

from benchmarks.audit.statistics import Floats
from common.evaluation import evaluate
from common.model import get_weights
from common.training import TrainSettings, train

Bools = npt.NDArray[np.bool_]
Interval = tuple[float, float]


def small_network(num_classes: int, size: int) -> nn.Module:
    """Two convolutions with group norm and a linear head on all positions: it can memorise."""
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, stride=2, padding=1), nn.GroupNorm(4, 16), nn.ReLU(),
        nn.Conv2d(16, 32, 3, stride=2, padding=1), nn.GroupNorm(4, 32), nn.ReLU(),
        nn.Flatten(), nn.Linear(32 * (-(-size // 4)) ** 2, num_classes),
    )  # fmt: skip


@dataclass(frozen=True)
class Shadows:
    """Models and what they say about the images of the pool; all (models, images)."""

    members: Bools
    """Whether the image was in the model's training set."""
    losses: Floats
    confidence: Floats
    """log p − log(1 − p) of the true class."""
    accuracy: float
    """Mean over the models, on images outside the pool."""


def train_shadows(
    build: Callable[[int], nn.Module],
    images: Tensor,
    labels: Tensor,
    outside: tuple[Tensor, Tensor],
    settings: TrainSettings,
    *,
    models: int,
    seed: int,
) -> Shadows:
    """Train ``models`` models, each on a random half (or so) of the pool, with the real trainer.

    ``build`` takes a seed for the initial weights. Each image is in exactly half of the models.
    """
    rng = np.random.default_rng(seed)
    order = np.argsort(rng.random((models, len(labels))), axis=0)
    members = order < models // 2
    losses, confidences, accuracy = [], [], 0.0
    for number in range(models):
        chosen = torch.from_numpy(members[number])
        model = build(seed * 1000 + number)
        start = get_weights(model)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            result = train(model, start, images[chosen], labels[chosen], settings, seed=number)
        weights = {k: start[k] + result.update[k] for k in start}
        p = evaluate(model, weights, images, labels).probabilities.astype(np.float64)
        true = p[np.arange(len(p)), labels.numpy()]
        tiny = 1e-30
        losses.append(-np.log(true + tiny))
        # 1 − p as the sum of the other classes: exact where p is almost 1.
        p[np.arange(len(p)), labels.numpy()] = 0.0
        others = p.sum(1)
        confidences.append(np.log(true + tiny) - np.log(others + tiny))
        held = evaluate(model, weights, *outside)
        accuracy += held.correct / held.examples / models
    return Shadows(members, np.array(losses), np.array(confidences), accuracy)


def loss_scores(shadows: Shadows) -> Floats:
    """Yeom's attack: minus the loss."""
    return -shadows.losses


def likelihood_ratio_scores(shadows: Shadows) -> Floats:
    """LiRA: log-likelihood ratio of each model's confidence, fitted on all other models."""
    inside, x = shadows.members, shadows.confidence
    scores = np.empty_like(x)
    for target in range(len(x)):
        rest = np.arange(len(x)) != target
        fits = [_fit(x[rest], inside[rest]), _fit(x[rest], ~inside[rest])]
        logs = [norm.logpdf(x[target], mean, deviation) for mean, deviation in fits]
        scores[target] = logs[0] - logs[1]
    return scores


def _fit(x: Floats, chosen: Bools) -> tuple[Floats, float]:
    """Each image's mean over its ``chosen`` models; one deviation for all images."""
    count = chosen.sum(0)
    mean = np.where(chosen, x, 0.0).sum(0) / count
    square = (np.where(chosen, x - mean, 0.0) ** 2).sum() / (count - 1).sum()
    return mean, float(np.sqrt(square)) + 1e-6


@dataclass(frozen=True)
class Measured:
    """How well an attack tells members from others, with 95 % intervals."""

    advantage: float
    """TPR − FPR, thresholds chosen on other images."""
    advantage_interval: Interval
    auc: float
    auc_interval: Interval
    tpr_at_1_fpr: float
    """TPR at the threshold that 1 % of the other half's non-members exceed."""
    tpr_interval: Interval
    roc: list[tuple[float, float]]
    """(FPR, TPR), thresholds as they come."""


def measure(
    scores: Floats, members: Bools, *, seed: int, resamples: int = 400, confidence: float = 0.95
) -> Measured:
    """Figures and intervals of an attack with ``scores`` (models, images), larger for members."""
    rng = np.random.default_rng(seed)
    halves = np.array_split(rng.permutation(scores.shape[1]), 2)
    figures = _figures(scores, members, halves)
    drawn = np.array(
        [
            _figures(scores, members, [rng.choice(half, len(half)) for half in halves])
            for _ in range(resamples)
        ]
    )
    edges = [(1 - confidence) / 2, (1 + confidence) / 2]
    low, high = np.quantile(drawn, edges, axis=0)
    intervals = [(float(a), float(b)) for a, b in zip(low, high, strict=True)]
    return Measured(
        figures[0], intervals[0], figures[1], intervals[1], figures[2], intervals[2],
        _roc(scores.ravel(), members.ravel()),
    )  # fmt: skip


def _figures(
    scores: Floats, members: Bools, halves: list[npt.NDArray[np.int64]]
) -> tuple[float, float, float]:
    """(advantage, AUC, TPR at 1 % FPR)."""
    sides = [(scores[:, half].ravel(), members[:, half].ravel()) for half in halves]
    rates = []
    for (s, m), (other, other_m) in (sides, sides[::-1]):
        best, strict = _thresholds(other, other_m)
        rates.append(((s[m] >= best).mean() - (s[~m] >= best).mean(), (s[m] > strict).mean()))
    advantage, tpr = np.mean(rates, axis=0)
    s = np.concatenate([side[0] for side in sides])
    m = np.concatenate([side[1] for side in sides])
    ranks = rankdata(s)
    auc = (ranks[m].sum() - m.sum() * (m.sum() + 1) / 2) / (m.sum() * (~m).sum())
    return float(advantage), float(auc), float(tpr)


def _thresholds(s: Floats, m: Bools) -> tuple[float, float]:
    """The one with the largest TPR − FPR; the one that 1 % of non-members exceed."""
    order = np.argsort(-s)
    gain = np.cumsum(np.where(m[order], 1.0 / m.sum(), -1.0 / (~m).sum()))
    return float(s[order[np.argmax(gain)]]), float(np.quantile(s[~m], 0.99))


def _roc(s: Floats, m: Bools, points: int = 60) -> list[tuple[float, float]]:
    false = np.sort(s[~m])[::-1]
    true = np.sort(s[m])
    at = np.unique(np.geomspace(1, len(false), points).astype(int))
    rates = [(k / len(false), float((true >= false[k - 1]).mean())) for k in at]
    return [(round(f, 6), round(t, 6)) for f, t in rates]
