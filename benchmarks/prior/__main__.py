"""A private linear head on a prior's features, all pictures in one place: to choose settings by.

    python -m benchmarks.prior --data bloodmnist.npz --prior prior.safetensors [--split val]

One share of noise in all (distributed) or √10 times as much (ten hospitals' local noise), from an
ordinary generator: nothing here is a release. The same settings through the real hospitals are
``benchmarks.paper_table``'s cells. Settings are chosen on ``--split val``; ``test`` is for the end.
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path
from typing import Any

import torch
from sklearn.metrics import f1_score
from torch import Tensor
from torch.nn import functional

from benchmarks.prior.recipe import DISTRIBUTED, LOCAL, HeadPlan, fit_head, largest_mu
from benchmarks.tables import show_table, spread
from common.datasets import ImageSet, load_npz
from common.files import read_json, write_json
from common.prior.train import load_prior
from common.privacy.plan import COUNT_EPSILON
from common.training import to_tensor

RESULTS = Path(__file__).parents[1] / "results" / "prior.json"
HOSPITALS = 10
TUNED_FOR = 6.0
"""ε at which settings were chosen."""
PLANS = {"distributed": (DISTRIBUTED, 1.0), "local": (LOCAL, math.sqrt(HOSPITALS))}
Split = tuple[Tensor, Tensor]


def main() -> None:
    """Measure, keep, print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="an npz file in MedMNIST's form")
    parser.add_argument("--prior", type=Path, required=True, help="made by consilium prior")
    parser.add_argument("--split", default="val", choices=("val", "test"))
    parser.add_argument("--epsilons", default="6")
    parser.add_argument("--share", type=float, default=1.0, help="of the training pictures")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--delta", type=float, default=1.9e-4)
    parser.add_argument("--out", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    dataset, prior = load_npz(arguments.data), load_prior(arguments.prior)

    def of(images: ImageSet) -> Split:
        parts = torch.split(to_tensor(images.images), 256)
        return torch.cat([prior(part) for part in parts]), torch.from_numpy(images.labels)

    train, measured = of(dataset.train), of(getattr(dataset, arguments.split))
    rows: list[dict[str, Any]] = read_json(arguments.out) if arguments.out.exists() else []
    for epsilon in map(float, arguments.epsilons.split(",")):
        mu = largest_mu(epsilon - COUNT_EPSILON, arguments.delta)
        tuned = largest_mu(TUNED_FOR - COUNT_EPSILON, arguments.delta)
        for name, (of_six, noise) in PLANS.items():
            plan = of_six.at(mu, tuned)
            rows += [
                {"privacy": name, "epsilon": epsilon, "delta": arguments.delta, "seed": seed,
                 "split": arguments.split, "share": arguments.share,
                 **one(train, measured, plan, noise, mu, arguments.share, seed)}
                for seed in range(arguments.seeds)
            ]  # fmt: skip
    rows.append({"privacy": "none", "epsilon": None, "delta": None, "seed": 0, "share": 1.0,
                 "split": arguments.split, **without_privacy(train, measured)})  # fmt: skip
    write_json(arguments.out, rows)
    show_table(table_of(rows))


def one(
    train: Split, measured: Split, plan: HeadPlan, noise: float, mu: float, share: float, seed: int
) -> dict[str, float]:
    """One head by one seed of the noise, on a random ``share`` of the pictures."""
    generator = torch.Generator().manual_seed(seed)
    chosen = torch.randperm(len(train[1]), generator=generator)[: round(share * len(train[1]))]

    def add_noise(total: Tensor, deviation: float) -> Tensor:
        return total + noise * deviation * torch.randn(total.shape, generator=generator)

    head = fit_head(
        train[0][chosen], train[1][chosen], classes=int(train[1].max()) + 1, plan=plan, mu=mu,
        count=len(chosen), add_noise=add_noise,
    )  # fmt: skip
    return figures(head.logits(measured[0]), measured[1])


def without_privacy(train: Split, measured: Split) -> dict[str, float]:
    """A logistic regression on the same features: what they allow."""
    mean, std = train[0].mean(0), train[0].std(0) + 1e-6

    def inputs(x: Tensor) -> Tensor:
        return torch.cat([(x - mean) / std, torch.ones(len(x), 1)], 1)

    x, y = inputs(train[0]), train[1]
    weights = torch.zeros(int(y.max()) + 1, x.shape[1], requires_grad=True)
    search = torch.optim.LBFGS([weights], max_iter=100, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        search.zero_grad()
        loss = functional.cross_entropy(x @ weights.T, y) + 1e-3 * weights.square().sum()
        loss.backward()  # type: ignore[no-untyped-call]
        return loss

    search.step(closure)  # type: ignore[no-untyped-call]
    return figures(inputs(measured[0]) @ weights.detach().T, measured[1])


def figures(logits: Tensor, labels: Tensor) -> dict[str, float]:
    """Accuracy and macro-F1."""
    found = logits.argmax(1)
    return {"accuracy": float((found == labels).float().mean()),
            "macro_f1": float(f1_score(labels, found, average="macro"))}  # fmt: skip


def table_of(rows: list[dict[str, Any]]) -> list[list[str]]:
    """A line for each setting."""
    lines = [["privacy", "ε", "split", "pictures", "accuracy %", "macro-F1 %", "n"]]
    keys = ("privacy", "epsilon", "split", "share")
    for key in dict.fromkeys(tuple(r[k] for k in keys) for r in rows):
        same = [r for r in rows if tuple(r[k] for k in keys) == key]
        lines.append([*(str(k) for k in key), spread([r["accuracy"] for r in same]),
                      spread([r["macro_f1"] for r in same]), str(len(same))])  # fmt: skip
    return lines


if __name__ == "__main__":
    main()
