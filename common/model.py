"""Models: what they are built from, their weights as numpy arrays, which parts are trained."""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache, partial

import numpy as np
import torch
from torch import nn

from common.config import RunConfig
from common.errors import ModelError
from common.networks import DPResNet, ResNet9, ResNet18


@dataclass(frozen=True, kw_only=True)
class ModelSpec:
    """What a model is built from; equal specs give the same parameter names and shapes."""

    model: str = "dpresnet"
    width: float = 1.0
    num_classes: int = 8
    channels: int = 3
    residual_norm: bool = False
    """One more norm after each residual addition (:mod:`common.networks`)."""
    weight_standardisation: bool = False
    """Convolutions by standardised filters (:mod:`common.networks`)."""
    hidden_units: int = 0
    """Of the layer between a prior's features and the head; 0: none (:mod:`common.prior.model`)."""

    @classmethod
    def of(cls, config: RunConfig, *, num_classes: int, channels: int) -> ModelSpec:
        """The model that a run trains on data of so many classes and channels."""
        return cls(
            model=config.model,
            width=config.model_width,
            num_classes=num_classes,
            channels=channels,
            residual_norm=config.residual_norm,
            weight_standardisation=config.weight_standardisation,
            hidden_units=config.hidden_units,
        )

    def digest(self) -> bytes:
        """SHA-256 of the specification: server and hospital compare it before training."""
        told = asdict(self)
        for option in ("residual_norm", "weight_standardisation", "hidden_units"):
            # Bases and runs from before there were these options refer to digests without them.
            if not told[option]:
                del told[option]
        return hashlib.sha256(json.dumps(told, sort_keys=True).encode()).digest()


def _prior_head(*, num_classes: int, channels: int, hidden_units: int, **_: object) -> nn.Module:
    from common.prior.model import PriorHead  # which most models have no need of

    return PriorHead(num_classes=num_classes, channels=channels, hidden_units=hidden_units)


def _network(kind: Callable[..., nn.Module]) -> Callable[..., nn.Module]:
    """``kind`` without what is of heads on priors alone."""
    return lambda *, hidden_units, **options: kind(**options)


_KINDS: Mapping[str, Callable[..., nn.Module]] = {
    "dpresnet": _network(DPResNet),
    "resnet9": _network(ResNet9),
    "resnet9-gn": _network(partial(ResNet9, group_norm=True)),
    "resnet18": _network(ResNet18),
    "prior-head": _prior_head,
}

MODELS = tuple(_KINDS)
"""What ``ModelSpec.model`` may be; all but ``resnet9`` (batch norm) can be trained under DP."""


def build(spec: ModelSpec, seed: int | None = None) -> nn.Module:
    """The model of ``spec``; with ``seed`` its initial weights depend on that seed alone.

    The seed is no secret: initial weights are public. Without a seed they are any, for callers
    that set all of them. The caller's random state is untouched, and the model is nobody else's.
    Raises :class:`~common.errors.ModelError` for an unknown name or no class to tell apart.
    """
    return _copied(_template(spec)) if seed is None else _made(spec, seed)


@lru_cache(maxsize=8)
def _template(spec: ModelSpec) -> nn.Module:
    """What unseeded models are copied from: drawing weights takes many times as long."""
    return _made(spec, None)


def _copied(module: nn.Module) -> nn.Module:
    """A module with tensors of its own; what is neither tensor nor module is shared.

    As :func:`copy.deepcopy`, for modules without hooks, in a tenth of the time: a simulation's
    hospitals each take several copies a round.
    """
    other = copy.copy(module)
    own = vars(other)
    for name, value in vars(module).items():
        if isinstance(value, dict):  # parameters, buffers, modules, and the hooks that come
            own[name] = type(value)(value)
    own["_parameters"] = {
        name: None if p is None else nn.Parameter(p.detach().clone(), p.requires_grad)
        for name, p in module._parameters.items()
    }
    own["_buffers"] = {n: None if b is None else b.clone() for n, b in module._buffers.items()}
    own["_modules"] = {n: None if m is None else _copied(m) for n, m in module._modules.items()}
    own["_non_persistent_buffers_set"] = set(module._non_persistent_buffers_set)
    return other


def _made(spec: ModelSpec, seed: int | None) -> nn.Module:
    if spec.model not in _KINDS:
        raise ModelError(f"unknown model '{spec.model}'", f"use one of: {', '.join(MODELS)}")
    if spec.num_classes < 2:
        raise ModelError(
            f"the data set has {spec.num_classes} class(es), too few to tell apart",
            "give a data set with at least 2 classes",
        )
    with torch.random.fork_rng(devices=[]):
        if seed is not None:
            torch.manual_seed(seed)
        return _KINDS[spec.model](
            width=spec.width,
            num_classes=spec.num_classes,
            channels=spec.channels,
            residual_norm=spec.residual_norm,
            weight_standardisation=spec.weight_standardisation,
            hidden_units=spec.hidden_units,
        )


@lru_cache(maxsize=8)
def state_names(spec: ModelSpec) -> tuple[str, ...]:
    """Names of the entries of the model's state, in its own order."""
    return tuple(_template(spec).state_dict())


@lru_cache(maxsize=8)
def state_dtypes(spec: ModelSpec) -> Mapping[str, np.dtype[np.generic]]:
    """Dtypes of the entries of the model's state, in its own order."""
    return {name: t.numpy().dtype for name, t in _template(spec).state_dict().items()}


@lru_cache(maxsize=8)
def state_shapes(spec: ModelSpec) -> Mapping[str, tuple[int, ...]]:
    """Shapes of the entries of the model's state, in its own order."""
    return {name: tuple(t.shape) for name, t in _template(spec).state_dict().items()}


def build_for(config: RunConfig, spec: ModelSpec) -> nn.Module:
    """The model of ``spec`` with the parts frozen that ``config`` names; see :func:`freeze`."""
    model = build(spec)
    if config.frozen_parts:
        freeze(model, config.frozen_parts)
    return model


def freeze(model: nn.Module, prefixes: Sequence[str]) -> None:
    """Train no more the parameters whose names start with one of ``prefixes``.

    They get no gradient, take no part in a private gradient's norm and get no noise; an update
    holds exact zeros for them. ModelError, and nothing is changed, for a prefix that starts no
    parameter's name, and if no parameter were left to train.
    """
    named = dict(model.named_parameters())
    for prefix in prefixes:
        if not any(name.startswith(prefix) for name in named):
            first = sorted({name.split(".")[0] for name in named})
            raise ModelError(
                f"no parameter's name starts with '{prefix}', which is to be frozen",
                f"use prefixes of parameter names; the model's parts are: {', '.join(first)}",
            )
    frozen = {name for name in named if name.startswith(tuple(prefixes))}
    if frozen.issuperset(trainable_names(model)):
        raise ModelError(
            "every parameter would be frozen, so that nothing could be trained",
            "leave at least one part out of what is frozen, such as 'head.'",
        )
    for name in frozen:
        named[name].requires_grad_(False)


def trainable_names(model: nn.Module) -> tuple[str, ...]:
    """Names of the parameters that are trained, in the model's order."""
    return tuple(name for name, p in model.named_parameters() if p.requires_grad)


def moving_names(config: RunConfig, spec: ModelSpec) -> tuple[str, ...]:
    """Names of the entries that a round of training moves, in the model's own order.

    What is trained, and what a network counts while it trains (batch norm). All else is fixed: a
    prior's features and their whitening, and what ``config`` freezes.
    """
    return _moving(spec, config.frozen_parts)


@lru_cache(maxsize=8)
def _moving(spec: ModelSpec, frozen: tuple[str, ...]) -> tuple[str, ...]:
    model = build(spec)
    if frozen:
        freeze(model, frozen)
    counted = (
        f"{name}.{buffer}"
        for name, module in model.named_modules()
        if isinstance(module, nn.modules.batchnorm._BatchNorm)
        for buffer, _ in module.named_buffers(recurse=False)
    )
    moving = {*trainable_names(model), *counted}
    return tuple(name for name in state_names(spec) if name in moving)


Weights = dict[str, np.ndarray]
"""A model's state: parameter or buffer name → array, in the model's own order."""


def get_weights(model: nn.Module) -> Weights:
    """A copy of the model's state as numpy arrays, on the CPU."""
    return {k: v.detach().cpu().numpy().copy() for k, v in model.state_dict().items()}


def set_weights(model: nn.Module, weights: Mapping[str, np.ndarray]) -> None:
    """Load ``weights`` into ``model``; ModelError names the first entry that does not fit."""
    state = model.state_dict()
    check_weights({k: tuple(v.shape) for k, v in state.items()}, weights)
    with torch.no_grad():
        for name, tensor in state.items():
            tensor.copy_(torch.from_numpy(np.require(weights[name], requirements=["C", "W"])))


def check_weights(shapes: Mapping[str, tuple[int, ...]], weights: Mapping[str, np.ndarray]) -> None:
    """Names, shapes and finiteness of ``weights`` against ``shapes``; ModelError if they differ."""
    odd = sorted(set(shapes) ^ set(weights))
    if odd:
        side = "lacks" if odd[0] in shapes else "has an unexpected"
        raise ModelError(
            f"the weights file or message {side} entry '{odd[0]}'",
            "use weights of the same model, width, hidden units, classes and channels",
        )
    for name, shape in shapes.items():
        if tuple(weights[name].shape) != shape:
            raise ModelError(
                f"weights entry '{name}' has shape {tuple(weights[name].shape)}, not {shape}",
                "use weights of the same model, width, hidden units, classes and channels",
            )
        if not np.isfinite(weights[name]).all():
            raise ModelError(
                f"weights entry '{name}' holds NaN or infinity",
                "go back to the last good round's model; lower the learning rate",
            )


def check_dtypes(
    dtypes: Mapping[str, np.dtype[np.generic]], weights: Mapping[str, np.ndarray]
) -> None:
    """ModelError unless ``weights`` have exactly these dtypes: else one model had many digests."""
    for name, dtype in dtypes.items():
        if weights[name].dtype != dtype:
            raise ModelError(
                f"weights entry '{name}' is {weights[name].dtype}, not {dtype}",
                "send the weights as the model has them",
            )


def weights_digest(weights: Mapping[str, np.ndarray]) -> str:
    """SHA-256 (hex) over names, dtypes, shapes and values: the id of a model's state.

    Equal values have one digest, whatever their bytes: −0.0 counts as 0.0, all NaN as one, and the
    order of bytes and entries does not count.
    """
    h = hashlib.sha256()
    for name in sorted(weights):
        array = np.asarray(weights[name], order="C")
        array = array.astype(array.dtype.newbyteorder("<"), copy=False)
        if np.issubdtype(array.dtype, np.floating):
            # Both make a copy, and most models need neither.
            if np.signbit(array[array == 0]).any():
                array = array + array.dtype.type(0)
            if np.isnan(array).any():
                array = np.where(np.isnan(array), array.dtype.type(np.nan), array)
        h.update(f"{name}\0{array.dtype.str}\0{array.shape}\0".encode())
        h.update(array.data)
    return h.hexdigest()
