"""An adversary's search for weights at which one picture counts for more than its clipping norm.

    python -m benchmarks.audit.search --seconds 300

The server chooses a model's weights, and with them what rounding does to it: layers scaled by 1e10
or 1e-20, dead units, biases that saturate, filters orthogonal to the very pictures, so that logits
are rounding alone. Under differential privacy none of it may matter: of n and of n − 1 pictures
the clipped sums differ by at most C (1 + 1e-6), and the validation figures by at most their
sensitivity. The search draws such weights, keeps the worst that it has found for each case, and
changes that at random. ``make audit`` runs it for minutes, ``make test`` for seconds. Exits with 1
when a bound is broken, and prints the worst cases otherwise.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor, nn

from common.evaluation import evaluate
from common.model import ModelSpec, Weights, build, get_weights
from common.prior.model import Head
from common.privacy.clipped_sum import clipped_sum
from common.privacy.clipping import CLIPPINGS
from common.privacy.figures import NORM, exact_sums
from common.privacy.randomness import SecureRandom

SLACK = 1e-6
"""Of the bound, for floating point in the measuring itself."""
NORMS = (1e-6, 1e-3, 0.25, 7.0, 1e6)
"""Clipping norms: from the smallest that a config can hold to the largest."""
SUM, FIGURES = MEASURES = ("clipped sum", "validation figures")


def _hooked() -> nn.Module:
    """A network with a layer that book-keeping does not know: Opacus' hooks."""
    return nn.Sequential(nn.LayerNorm(35), nn.Linear(35, 13), nn.Tanh(), nn.Linear(13, 5))


NETWORKS = {
    "linear head": (lambda: Head(None, nn.Linear(301, 8, bias=False)), (301,), 8),
    "hidden layer": (
        lambda: Head(nn.Linear(301, 17), nn.Linear(17, 8, bias=False)), (301,), 8,
    ),
    "resnet9-gn": (lambda: build(ModelSpec(model="resnet9-gn", width=0.03125)), (3, 16, 16), 8),
    "dpresnet": (lambda: build(ModelSpec(width=0.03125)), (3, 16, 16), 8),
    "Opacus' hooks": (_hooked, (35,), 5),
}  # fmt: skip
"""Name → (what makes one, shape of a picture, classes)."""


@dataclass(frozen=True)
class Case:
    """What is measured, where."""

    network: str
    measure: str
    clipping_norm: float = 1.0
    clipping: str = "flat"
    precision: str = "float32"
    patients: bool = False
    device: str = "cpu"


@dataclass
class Search:
    """The worst weights so far for one case. ``worst``: how much was moved / what is promised."""

    case: Case
    random: np.random.Generator
    worst: float = 0.0
    how: str = ""
    tried: int = 0
    _best: Weights = field(default_factory=dict)

    def step(self) -> None:
        """Try one more set of weights, on pictures of its own."""
        make, shape, classes = NETWORKS[self.case.network]
        count = int(self.random.choice([2, 6, 12, 13, 14, 17, 33, 40]))
        pictures = self._pictures(count, shape)
        if self._best and self.random.random() < 0.4:
            weights, how = dict(self._best), "the worst, changed"
            name = str(self.random.choice(list(weights)))
            size = self.random.choice([1e-3, 0.5, 2.0, 1e3])
            weights[name] = np.float32(weights[name] * size)
        else:
            weights, how = self._crafted(get_weights(make()), pictures)
        labels = torch.from_numpy(self.random.integers(0, classes, count))
        if not all(np.isfinite(w).all() for w in weights.values()):
            return
        gone = int(self.random.integers(count))
        found = self._moved(make(), weights, pictures, labels, gone)
        self.tried += 1
        if not found <= self.worst:  # NaN is the worst of all
            self.worst, self.how, self._best = found, f"{how}, {count} pictures", weights

    def _pictures(self, count: int, shape: tuple[int, ...]) -> Tensor:
        x = torch.from_numpy(self.random.standard_normal((count, *shape)).astype(np.float32))
        return x / x.flatten(1).norm(dim=1).view(-1, *[1] * len(shape)) if len(shape) == 1 else x

    def _crafted(self, weights: Weights, pictures: Tensor) -> tuple[Weights, str]:
        """Weights by one of an adversary's recipes."""
        draw = self.random
        names = list(weights)
        for name, array in weights.items():
            fan_in = np.prod(array.shape[1:]) if array.ndim > 1 else 1
            weights[name] = (draw.standard_normal(array.shape) / np.sqrt(fan_in)).astype(np.float32)
        recipe = str(draw.choice(["scaled", "dead", "huge", "saturated", "orthogonal", "tiny"]))
        first = names[0]
        if recipe == "scaled":
            for name in names:
                weights[name] = np.float32(weights[name] * 10.0 ** draw.uniform(-12, 12))
        elif recipe == "dead":
            for name in names:
                weights[name] = weights[name] * (draw.random(weights[name].shape) < 0.2)
        elif recipe == "huge":
            weights[first] = np.float32(weights[first] * 10.0 ** draw.uniform(4, 18))
        elif recipe == "saturated":
            for name in names:
                if weights[name].ndim == 1:
                    weights[name] = np.float32(weights[name] * 10.0 ** draw.uniform(1, 5))
            weights[names[-1]] = np.float32(weights[names[-1]] * 10.0 ** draw.uniform(1, 5))
        elif recipe == "tiny":  # every label's probability 1, up to e^-50 or so
            weights[names[-1]] = np.float32(weights[names[-1]] * 10.0 ** draw.uniform(1, 3))
            weights[first] = np.float32(weights[first] * 10.0 ** draw.uniform(-30, -5))
        elif pictures.dim() == 2:
            flat = pictures.double().numpy()
            for name in names:
                if weights[name].ndim == 2 and weights[name].shape[1] == flat.shape[1]:
                    q, _ = np.linalg.qr(flat.T)
                    w = weights[name].astype(np.float64)
                    weights[name] = ((w - (w @ q) @ q.T) * 10.0 ** draw.uniform(8, 12)).astype(
                        np.float32
                    )
        else:  # the last layer amplifies what the others round
            weights[names[-2]] = np.float32(weights[names[-2]] * 10.0 ** draw.uniform(6, 10))
        return {k: np.asarray(v, np.float32) for k, v in weights.items()}, recipe

    def _moved(
        self, network: nn.Module, weights: Weights, pictures: Tensor, labels: Tensor, gone: int
    ) -> float:
        """What the unit of picture ``gone`` moves, in multiples of what is promised."""
        case, count = self.case, len(labels)
        units = torch.arange(count) // 3 if case.patients else torch.arange(count)
        kept = units != units[gone]
        if case.measure == FIGURES:
            if case.network == "linear head":  # labels that are right with all of them
                whole = evaluate(network, weights, pictures, labels, device=case.device)
                labels = torch.from_numpy(whole.probabilities.argmax(1))
            sums = []
            for rows in (torch.ones(count, dtype=torch.bool), kept):
                found = evaluate(
                    network, weights, pictures[rows], labels[rows], device=case.device
                ).probabilities
                of = np.unique(units[rows].numpy(), return_inverse=True)[1]
                some = len(labels[rows]) > 0
                sums.append(exact_sums(found, labels[rows].numpy(), of) if some else np.zeros(2))
            return float(np.linalg.norm(sums[0] - sums[1])) / NORM
        both = [
            clipped_sum(
                network, weights, pictures[rows], labels[rows], sampling_rate=1.0,
                clipping_norm=case.clipping_norm, clipping=case.clipping, random=SecureRandom(),
                units=units[rows] if case.patients else None, precision=case.precision,
                expected_batch_size=float(count), device=case.device,
            )
            for rows in (torch.ones(count, dtype=torch.bool), kept)
            if bool(rows.any())
        ]  # fmt: skip
        moved = both[0] - both[1] if len(both) == 2 else both[0]
        return float(moved.norm()) / case.clipping_norm


def cases() -> Iterator[Case]:
    """Every network, measure, clipping rule, number format and device that is here."""
    devices = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]
    for device in devices:
        for network in NETWORKS:
            yield Case(network, FIGURES, device=device)
            yield Case(network, FIGURES, device=device, patients=True)
            for clipping in CLIPPINGS:
                for norm in NORMS:
                    yield Case(network, SUM, norm, clipping, device=device)
            yield Case(network, SUM, 0.25, patients=True, device=device)
            if network != "Opacus' hooks":
                yield Case(network, SUM, 0.25, precision="bfloat16", device=device)
                yield Case(network, SUM, 0.25, precision="bfloat16", patients=True, device=device)


def search(
    *, seconds: float = 0.0, trials: int = 0, seed: int = 0, only: tuple[str, ...] = ()
) -> list[Search]:
    """Search all cases (of networks ``only``) in turn, for ``seconds`` or ``trials`` of each."""
    chosen = [c for c in cases() if not only or c.network in only]
    seeds = np.random.SeedSequence(seed).spawn(len(chosen))
    found = [Search(c, np.random.default_rng(s)) for c, s in zip(chosen, seeds, strict=True)]
    end, done = time.monotonic() + seconds, 0
    while done < trials or (not trials and time.monotonic() < end):
        for one in found:
            one.step()
        done += 1
    return found


def main() -> int:
    """Search, print, 1 if a bound is broken."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=300.0)
    parser.add_argument("--seed", type=int, default=None, help="default: another each time")
    args = parser.parse_args()
    seed = args.seed if args.seed is not None else int(time.time())
    torch.set_num_threads(1)
    found = search(seconds=args.seconds, seed=seed)
    for one in sorted(found, key=lambda s: -s.worst):
        print(f"{one.worst:12.9f}  {one.case}  ({one.how}; {one.tried} tried)")
    broken = [one for one in found if not one.worst <= 1 + SLACK]
    print(f"seed {seed}: {sum(s.tried for s in found)} weights, {len(broken)} bounds broken")
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main())
