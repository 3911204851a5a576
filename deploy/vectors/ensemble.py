"""The ensemble of a run's fine-tuned models: written, and compared with base and merged model."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from rich.table import Table

from common.datasets import ImageSet, load_npz
from common.devices import usable_cores
from common.errors import ConfigError
from common.simulation import load_dataset
from deploy.vectors.place import Place
from server_app.evaluation import Evaluator
from server_app.progress import percent
from server_app.vectors.base import read_base
from server_app.vectors.ensemble import FOLDER, moved, write_ensemble
from server_app.vectors.public import judging_images

PUBLIC, TEST = "public", "test"


def ensemble(
    place: Place, out: Path | None, data: Path | None, say: Callable[[str], None]
) -> Table | None:
    """Write the ensemble into ``out`` (the run's directory); how it compares, if that is known.

    Rows: the current base, what the run's rule would make of all that waits, the ensemble.
    Columns: the public images by which the run judges, the test split of ``data``. ConfigError
    for images of another size; VectorError as :func:`server_app.vectors.ensemble.write_ensemble`.
    """
    _, note = read_base(place.directory / "base.safetensors")
    classes = _classes(place)
    images = _images(place, data, classes)  # before anything is written
    folder = out or place.directory / FOLDER
    rule, cores = place.rule(), usable_cores()
    with place.open() as registry:
        made = write_ensemble(
            registry, folder, run=place.directory.name, spec=note.spec, classes=classes
        )
        proposal = registry.candidate(rule)
        if proposal.base.id != made.manifest.base:
            raise moved()
        if refusal := registry.refusal(proposal, skewed=place.skewed):
            say(f"not to be merged: {refusal.what}")
    members = made.manifest.members
    say(f"{folder}: {len(members)} models of {len(made.hospitals)} hospitals, of base "
        f"{made.manifest.base_version}")  # fmt: skip
    if late := len(proposal.ingredients) - len(members):
        say(f"{late} vectors that wait are of older bases, and not in it")
    if not images:
        say("no public images: it cannot be measured; give test images with --data")
        return None
    found: dict[str, dict[str, dict[str, Any]]] = {}
    for name, some in images.items():
        alone = Evaluator(note.spec, some, classes, threads=cores)
        found[name] = {
            f"base {proposal.base.version}": alone(proposal.base.weights),
            f"merged ({rule.name}, not published)": alone(proposal.weights),
            f"ensemble of {len(members)}": made.figures(some, threads=cores),
        }
    return _table(found, {name: len(some) for name, some in images.items()})


def _classes(place: Place) -> tuple[str, ...]:
    if place.config.dataset == "hospitals":
        return place.config.class_names
    return load_dataset(place.config).class_names


def _images(place: Place, data: Path | None, classes: tuple[str, ...]) -> dict[str, ImageSet]:
    found = {}
    public = judging_images(place.config)
    if public is not None:
        found[PUBLIC] = public
    if data is not None:
        given = load_npz(data, class_names=classes)
        side = place.config.image_size
        shape = (side, side, place.config.channels)
        if place.config.dataset != "hospitals":
            shape = load_dataset(place.config).image_shape
        if given.image_shape != shape:
            raise ConfigError(
                f"the images of {data} are {given.image_shape}, those of the run {shape}",
                "give images like those that the hospitals trained on",
            )
        found[TEST] = given.test
    return found


def _table(found: dict[str, dict[str, dict[str, Any]]], counts: dict[str, int]) -> Table:
    on = " and ".join(f"{count} {name} images" for name, count in counts.items())
    table = Table(title=f"Measured on {on}", title_justify="left")
    table.add_column("model", no_wrap=True)
    for name in counts:
        table.add_column(f"{name}: accuracy", justify="right")
        table.add_column("macro-F1", justify="right")
    for model in next(iter(found.values())):
        figures = [percent(of[model][k]) for of in found.values() for k in ("accuracy", "macro_f1")]
        table.add_row(model, *figures)
    return table
