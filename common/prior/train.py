"""Make a prior from a seed and a budget of drawn pictures and steps; keep it as safetensors."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from common.devices import CPU
from common.errors import ModelError
from common.files import atomic_write
from common.parsing import parse_json
from common.prior.drawing import draw_cells
from common.prior.features import PriorFeatures, PriorSpec
from common.prior.pretext import to_unit, train_network

_FORMAT = "consilium-prior-2"
_BLOCK = 256


@dataclass(frozen=True)
class PriorBudget:
    """How much is spent on a prior: pictures drawn for each network, its steps of 128 pictures,
    and drawn pictures that the whitening is fitted on; ``ridge`` of the whitening.
    """

    pictures: int = 50_000
    steps: int = 3_000
    whitening: int = 6_000
    ridge: float = 2.0


def make_prior(
    spec: PriorSpec,
    *,
    seed: int = 0,
    budget: PriorBudget | None = None,
    report: Callable[[str], None] | None = None,
    device: str = CPU,
) -> PriorFeatures:
    """Draw cells, train the networks on them, fit the whitening; no real picture is read.

    Each network has pictures of its own. The seed is public. ``report`` is told of progress.
    ``device``, of :data:`common.devices.DEVICES`, is where networks are trained.
    """
    budget = budget or PriorBudget()
    tell = report or (lambda _: None)
    prior = PriorFeatures(spec)
    for i, width in enumerate(spec.widths, start=1):
        tell(f"network {i} of {len(spec.widths)}: drawing {budget.pictures} cells")
        cells = draw_cells(budget.pictures, seed=seed * 1000 + i, size=spec.size)
        network = train_network(
            cells,
            width=width,
            steps=budget.steps,
            seed=seed * 1000 + i,
            device=device,
            report=lambda step, loss: tell(f"step {step} of {budget.steps}: loss {loss:.3f}"),
        )
        prior.networks[i - 1].load_state_dict(network.state_dict())
    tell("whitening")
    fit_whitening(prior, seed=seed, budget=budget)
    return prior.requires_grad_(False).eval()


def fit_whitening(prior: PriorFeatures, *, seed: int, budget: PriorBudget) -> None:
    """Fit ``prior``'s standardisation and whitening to freshly drawn cells."""
    cells = draw_cells(budget.whitening, seed=seed * 1000 + 999, size=prior.spec.size)
    blocks = [prior.raw(to_unit(block)) for block in torch.split(cells.pictures, _BLOCK)]
    prior.fit(torch.cat(blocks), ridge=budget.ridge)


def prior_digest(prior: PriorFeatures) -> str:
    """SHA-256 (hex) over the specification and each tensor's name, shape and bytes."""
    made = hashlib.sha256(_FORMAT.encode() + json.dumps(asdict(prior.spec)).encode())
    for name, tensor in sorted(prior.state_dict().items()):
        made.update(f"{name}{tuple(tensor.shape)}".encode())
        made.update(tensor.detach().contiguous().numpy().tobytes())
    return made.hexdigest()


def save_prior(prior: PriorFeatures, path: Path, *, made_by: str = "") -> str:
    """Write ``prior`` to ``path`` (safetensors, atomically) and return its digest.

    ``made_by`` is the command or the note that the file carries along.
    """
    digest = prior_digest(prior)
    metadata = {
        "format": _FORMAT,
        "spec": json.dumps(asdict(prior.spec)),
        "digest": digest,
        "made-by": made_by,
    }
    tensors = {k: v.detach().contiguous().clone() for k, v in prior.state_dict().items()}
    atomic_write(path, save(tensors, metadata))
    return digest


def load_prior(path: Path, *, digest: str = "") -> PriorFeatures:
    """Read what :func:`save_prior` wrote, and check its digest (and that it is ``digest``).

    Raises :class:`ModelError` for a missing or damaged file, or another prior than was asked for.
    """
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}
    except (OSError, SafetensorError) as error:
        raise ModelError(f"'{path}' cannot be read as a prior: {error}.", _REMAKE) from error
    if metadata.get("format") != _FORMAT:
        raise ModelError(f"'{path}' is no prior of format {_FORMAT}.", _REMAKE)
    try:
        told = parse_json(metadata["spec"])
        told |= {name: tuple(told[name]) for name in ("widths", "zooms")}
        prior = PriorFeatures(PriorSpec(**told))
        prior.load_state_dict(tensors)
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        raise ModelError(f"'{path}' holds a damaged prior.", _REMAKE) from error
    found = prior_digest(prior)
    if found != metadata.get("digest") or (digest and digest != found):
        raise ModelError(
            f"'{path}' holds the prior {found[:16]}…, not {(digest or 'the one it names')[:16]}….",
            "Use the file that the coordinator published.",
        )
    return prior.requires_grad_(False).eval()


_REMAKE = "Make it anew with make_prior, or fetch the published file again."


def is_prior(path: Path) -> bool:
    """Whether ``path`` is a file that says it is a prior, sound or not."""
    try:
        with safe_open(path, framework="pt") as file:
            return str((file.metadata() or {}).get("format", "")).startswith("consilium-prior")
    except (OSError, SafetensorError):
        return False
