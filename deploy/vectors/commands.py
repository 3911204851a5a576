"""``consilium pretrain``, ``vectors …``, ``hospital finetune|outbox|withdraw``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from deploy.provision.commands import HospitalDir

vectors = typer.Typer(
    no_args_is_help=True,
    help="For the coordinator: a run's task vectors and bases (mode=vectors).",
)

# readable=False: what cannot be read is told in two parts, and not as a wrong option.
Run = Annotated[str, typer.Argument(metavar="RUN", help="The run's id, or its directory.")]
Federation = Annotated[
    str, typer.Option(help="Folder or name of the federation whose run it is; else this home's.")
]
Serial = Annotated[str, typer.Argument(metavar="SERIAL", help="The vector's serial, as listed.")]
RuleOption = Annotated[str, typer.Option("--rule", help="A merge rule; default: the run's.")]
WIDTH = 130
"""Columns of a table where no terminal says how many it has."""


def _console() -> Console:
    console = Console(highlight=False)
    return console if console.is_terminal else Console(highlight=False, width=WIDTH)


def pretrain(
    out: Annotated[Path, typer.Option(help="Where the base goes (.safetensors).")],
    data: Annotated[
        Path | None,
        typer.Option(help="An .npz file of public images; else the data set of --set.",
                     readable=False),
    ] = None,
    epochs: Annotated[int, typer.Option(help="Passes over the public images.", min=1)] = 30,
    set_: Annotated[
        list[str], typer.Option("--set", help="key=value of the run config; repeatable.")
    ] = [],  # noqa: B006 (typer's way to say: none given)
) -> None:  # fmt: skip
    """Train a first base on public images (the data's val split)."""
    from deploy.cli import parse_assignments
    from deploy.vectors.pretrain import pretrain as work

    values = parse_assignments(set_)
    if data is not None:
        path = str(data.expanduser().resolve())
        if values.get("dataset") == "hospitals":
            values["test-data"] = path
        else:
            values |= {"dataset": "npz", "data-path": path}
    done = work(values, out, epochs, typer.echo)
    typer.echo(f"{out}: base {done.base.id[:16]}, {100 * done.accuracy:.1f} % of "
               f"{done.held_out} images that it was not trained on")  # fmt: skip
    typer.echo(f"use it: base={out.resolve()}")


@vectors.command("list")
def list_(
    run: Run,
    federation: Federation = "",
    influence: Annotated[
        bool, typer.Option(help="Measure each hospital's influence now (an evaluation for each).")
    ] = False,
    format: Annotated[str, typer.Option(help="table or json.")] = "table",
) -> None:
    """Show a run's bases and vectors, and what each hospital does to the model."""
    from dataclasses import asdict

    from common.errors import ConfigError
    from deploy.vectors.place import Place
    from deploy.vectors.text import as_json, tables

    if format not in ("table", "json"):
        raise ConfigError(f"there is no format '{format}'", "use table or json")
    place = Place.of(run, federation)
    with place.open() as registry:
        told, moved = as_json(registry), place.last_influence()
        if influence:
            moved = asdict(place.influence(registry, place.judge()))
    if format == "json":
        typer.echo(json.dumps({**told, "influence": moved or None}, indent=2, ensure_ascii=False))
        return
    for table in tables(told, moved):
        _console().print(table)


@vectors.command()
def exclude(
    run: Run,
    serial: Serial,
    reason: Annotated[str, typer.Option(help="Why, for the list.")] = "by hand",
    federation: Federation = "",
) -> None:
    """Let a vector count no more; the bases that it is in are made anew without it."""
    from deploy.vectors.place import Place
    from server_app.vectors.ensemble import FOLDER, forget_ensemble

    place = Place.of(run, federation)
    with place.open() as registry:
        registry.exclude(serial, reason)
        typer.echo(place.current(registry))
        if forget_ensemble(registry, place.directory / FOLDER):
            typer.echo("the run's ensemble is removed; consilium vectors ensemble makes it anew")


@vectors.command()
def include(run: Run, serial: Serial, federation: Federation = "") -> None:
    """Let an excluded vector count again, as if it had never been excluded."""
    from deploy.vectors.place import Place

    place = Place.of(run, federation)
    with place.open() as registry:
        registry.include(serial)
        typer.echo(place.current(registry))


@vectors.command()
def merge(
    run: Run,
    rule: RuleOption = "",
    out: Annotated[Path | None, typer.Option(help="Where the model goes (.safetensors).")] = None,
    choose_scale: Annotated[
        bool, typer.Option(help="Try several scales on public images; it must beat the base.")
    ] = False,
    federation: Federation = "",
) -> None:
    """Merge what waits and say how good it is; nothing is published."""
    from deploy.vectors.merge import merge as work
    from deploy.vectors.place import Place

    work(Place.of(run, federation), rule, out, choose_scale, typer.echo)


@vectors.command()
def ensemble(
    run: Run,
    out: Annotated[
        Path | None, typer.Option(help="Folder for the models; default: in the run's directory.")
    ] = None,
    data: Annotated[
        Path | None,
        typer.Option(help="An .npz file whose test images measure it too.", readable=False),
    ] = None,
    federation: Federation = "",
) -> None:
    """Write the hospitals' own models, to be asked together, and say how good that is.

    What is left where merging is refused. Nothing is published. Keep the folder as the registry:
    it tells each hospital's vector.
    """
    from deploy.vectors.ensemble import ensemble as work
    from deploy.vectors.place import Place

    if table := work(Place.of(run, federation), out, data, typer.echo):
        _console().print(table)


@vectors.command()
def publish(
    run: Run,
    rule: RuleOption = "",
    judged_by: Annotated[
        str,
        typer.Option(
            help="public (images) or none; default: as the run's, which hospitals must not be: "
            "they can be asked by a running server only."
        ),
    ] = "",
    federation: Federation = "",
) -> None:
    """Make what waits the next base, now; a run that is going offers it to the hospitals."""
    from deploy.vectors.place import Place
    from deploy.vectors.publish import publish as work

    work(Place.of(run, federation), rule, judged_by, typer.echo)


@vectors.command("take-back")
def take_back(
    run: Run,
    version: Annotated[int, typer.Argument(help="The version; those after it go as well.", min=1)],
    federation: Federation = "",
) -> None:
    """Undo the publication of a base and of all after it."""
    from deploy.vectors.place import Place

    place = Place.of(run, federation)
    with place.open() as registry:
        registry.take_back(version)
        typer.echo(place.current(registry))


@vectors.command()
def rebuild(run: Run, federation: Federation = "") -> None:
    """Make every base anew from its vectors and compare, to the last bit; mend lost files."""
    from deploy.vectors.place import Place

    with Place.of(run, federation).open() as registry:
        mended = registry.rebuild()
        typer.echo(f"every base is what its vectors make; files mended: {mended or 'none'}")


def finetune(
    dir: HospitalDir,
    base: Annotated[
        Path,
        typer.Option(help="base.safetensors of a run, with base.json beside it.", readable=False),
    ],
) -> None:
    """Fine-tune a run's base with no server in reach; the vector waits in the outbox."""
    from client_app.hospital_file import HospitalFolder
    from deploy.vectors.offline import fine_tune_offline

    item, now = fine_tune_offline(HospitalFolder(dir.absolute()), base)
    cost = "no differential privacy" if item.epsilon is None else f"ε {item.epsilon:.2f}"
    done = "is in the outbox" if now else "was in the outbox already, and nothing was trained"
    typer.echo(f"vector {item.serial} for base {item.version} {done} ({cost}); {item.state}")


def outbox(dir: HospitalDir) -> None:
    """Show this hospital's task vectors and what became of them."""
    from client_app.hospital_file import HospitalFolder
    from deploy.vectors.offline import outbox as open_
    from deploy.vectors.text import outbox_table

    _console().print(outbox_table(open_(HospitalFolder(dir.absolute())).items()))


def withdraw(dir: HospitalDir, serial: Serial) -> None:
    """Take a vector back; every server that has it is told when the node is next asked."""
    from client_app.hospital_file import HospitalFolder
    from deploy.vectors.offline import withdraw as work

    item = work(HospitalFolder(dir.absolute()), serial)
    typer.echo(f"vector {item.serial}: {item.state}")
