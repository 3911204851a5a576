"""What limits a head on a prior's features: linear, kernel or hidden units, with and without noise.

    python -m benchmarks.prior.heads --data bloodmnist.npz --prior prior.safetensors

All pictures in one place; accuracy on a fifth of the *training* pictures that was held out, three
times over another fifth. ``val`` has an eighth of the pictures and tells such heads apart badly;
``test`` is not read. Noise is as in ``benchmarks.prior``: one share of it, from an ordinary
generator, so nothing here is a release.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from benchmarks.prior import sums
from benchmarks.prior.__main__ import Split, figures, one, without_privacy
from benchmarks.prior.recipe import DISTRIBUTED, HeadPlan, largest_mu
from benchmarks.tables import show_table, spread
from common.datasets import load_npz
from common.files import write_json
from common.prior.model import BIAS, HIDDEN_NORM
from common.prior.train import load_prior
from common.prior.whitening import unit, whitening
from common.privacy.plan import COUNT_EPSILON
from common.training import to_tensor

RESULTS = Path(__file__).parents[1] / "results" / "prior_heads.json"
FOLDS = 3
SMALL_STEPS = replace(DISTRIBUTED, clip=0.1, decay=0.0)
Head = Callable[[Split, Split, int], float]
"""(training pictures, those held out, seed) → accuracy."""


@dataclass(frozen=True)
class Hidden:
    """A rectified hidden layer trained with noise: full batches, each picture's gradient clipped.

    Settings are the best of some fifteen trials on these very folds.
    """

    units: int = 256
    rate: float = 100.0
    head_rate: float = 128.0
    plan: HeadPlan = SMALL_STEPS

    def accuracy(self, train: Split, held: Split, seed: int, mu: float) -> float:
        """On ``held``, after ``plan``'s mean, second moment and steps at ``mu`` in all."""
        generator = torch.Generator().manual_seed(seed)
        plan, (features, labels), count = self.plan, train, len(train[1])

        def noised(total: Tensor, deviation: float) -> Tensor:
            return total + deviation * torch.randn(total.shape, generator=generator)

        mean = noised(sums.feature_sum(features), plan.mean_noise) / count
        moment = noised(sums.moment_sum(unit(features - mean)), plan.moment_noise)
        mapped = whitening(mean, moment, count, ridge=plan.ridge, bias=plan.bias)
        x, deviation = mapped(features), plan.gradient_noise(mu) * plan.clip
        first = torch.randn(self.units, x.shape[1], generator=generator)
        weights = [first, torch.zeros(int(labels.max()) + 1, self.units)]
        momentum = [torch.zeros_like(w) for w in weights]
        averages, began = (
            [torch.zeros_like(w) for w in weights],
            int(plan.average_from * plan.steps),
        )
        for step in range(plan.steps):
            sums_ = self._gradient_sums(x, labels, weights)
            for w, m, g, rate in zip(
                weights, momentum, sums_, (self.rate, self.head_rate), strict=True
            ):
                m.mul_(plan.momentum).add_(noised(g, deviation) / count)
                w -= rate * m
            if step >= began:
                for average, w in zip(averages, weights, strict=True):
                    average += w / (plan.steps - began)
        return figures(self._logits(mapped(held[0]), averages)[1], held[1])["accuracy"]

    def _logits(self, x: Tensor, weights: list[Tensor]) -> tuple[Tensor, Tensor]:
        hidden = torch.relu(x @ weights[0].T) / math.sqrt(self.units)
        return hidden, hidden @ weights[1].T

    def _gradient_sums(self, x: Tensor, labels: Tensor, weights: list[Tensor]) -> list[Tensor]:
        """Of pictures' gradients, both layers' together clipped; none is built by itself."""
        hidden, logits = self._logits(x, weights)
        error = torch.softmax(logits, 1) - functional.one_hot(labels, logits.shape[1])
        back = (error @ weights[1]) * (hidden > 0) / math.sqrt(self.units)
        squares = error.square().sum(1) * hidden.square().sum(1)
        squares += back.square().sum(1) * x.square().sum(1)
        share = (self.plan.clip / squares.sqrt().clamp(min=1e-12)).clamp(max=1)[:, None]
        return [(share * back).T @ x, (share * error).T @ hidden]


def kernel(
    train: Split, held: Split, seed: int, *, gamma: float = 0.5, ridge: float = 0.01
) -> float:
    """Ridge regression on the classes with a Gaussian kernel; no seed is used."""
    classes = functional.one_hot(train[1]).float()
    mean = classes.mean(0)
    matrix = torch.exp(-gamma * torch.cdist(train[0], train[0]).square())
    matrix.diagonal().add_(ridge)
    found = torch.cholesky_solve(classes - mean, torch.linalg.cholesky(matrix))
    logits = torch.exp(-gamma * torch.cdist(held[0], train[0]).square()) @ found + mean
    return figures(logits, held[1])["accuracy"]


def hidden_units(train: Split, held: Split, seed: int, *, units: int = 512) -> float:
    """The head of ``hidden-units``, trained in one place: 40 passes, Adam 1e-3, cosine."""

    def seen(x: Tensor) -> Tensor:
        return HIDDEN_NORM * unit(torch.cat([x, torch.full((len(x), 1), BIAS)], 1))

    x, labels = seen(train[0]), train[1]
    generator = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        classes = int(labels.max()) + 1
        net = nn.Sequential(nn.Linear(x.shape[1], units), nn.ReLU(), nn.Linear(units, classes))
    passes, batch = 40, 160
    steps = passes * (len(x) // batch)
    search = torch.optim.Adam(net.parameters(), lr=1e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(search, steps)
    for _ in range(passes):
        order = torch.randperm(len(x), generator=generator)
        for chosen in torch.split(order[: len(x) // batch * batch], batch):
            loss = functional.cross_entropy(net(x[chosen]), labels[chosen])
            search.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            search.step()
            schedule.step()
    with torch.no_grad():
        return figures(net(seen(held[0])), held[1])["accuracy"]


def folds(train: Split) -> Iterator[tuple[Split, Split]]:
    """(trained on, held out): a fifth of ``train`` each time, of one fixed order."""
    count = len(train[1])
    order = torch.randperm(count, generator=torch.Generator().manual_seed(5))
    for fold in range(FOLDS):
        held = order[fold * count // 5 : (fold + 1) * count // 5]
        rest = torch.ones(count, dtype=torch.bool).index_fill_(0, held, False)
        yield (train[0][rest], train[1][rest]), (train[0][held], train[1][held])


def heads_at(epsilon: float, delta: float) -> dict[str, Head]:
    """Name → head; those with noise at (``epsilon``, ``delta``) in all."""
    mu = largest_mu(epsilon - COUNT_EPSILON, delta)

    def linear_with_noise(train: Split, held: Split, seed: int) -> float:
        return one(train, held, DISTRIBUTED, 1.0, mu, 1.0, seed)["accuracy"]

    return {
        "linear": lambda train, held, seed: without_privacy(train, held)["accuracy"],
        "Gaussian kernel": kernel,
        "512 hidden units": hidden_units,
        f"linear, ε = {epsilon:g}": linear_with_noise,
        f"256 hidden units, ε = {epsilon:g}": lambda train, held, seed: Hidden().accuracy(
            train, held, seed, mu
        ),
    }


def main() -> None:
    """Measure, keep, print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="an npz file in MedMNIST's form")
    parser.add_argument("--prior", type=Path, required=True, help="made by consilium prior")
    parser.add_argument("--epsilon", type=float, default=6.0)
    parser.add_argument("--delta", type=float, default=1.9e-4)
    parser.add_argument("--out", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    images, prior = load_npz(arguments.data).train, load_prior(arguments.prior)
    parts = torch.split(to_tensor(images.images), 256)
    train = torch.cat([prior(part) for part in parts]), torch.from_numpy(images.labels)
    rows: list[dict[str, Any]] = []
    lines = [["head", "accuracy %", "folds", "seconds"]]
    for name, head in heads_at(arguments.epsilon, arguments.delta).items():
        began = time.monotonic()
        found = [head(*split, seed) for seed, split in enumerate(folds(train))]
        seconds = time.monotonic() - began
        rows.append({"head": name, "delta": arguments.delta, "split": "folds of train",
                     "accuracy": found, "wall_s": round(seconds, 1)})  # fmt: skip
        lines.append([name, spread(found), str(len(found)), f"{seconds:.0f}"])
    write_json(arguments.out, rows)
    show_table(lines)


if __name__ == "__main__":
    main()
