"""The ``consilium`` command. Each subcommand is a thin reading of its arguments."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from common.config import BY_NAME, KEYS, RunConfig, Value, markdown_table, toml_table
from common.config.recipes import written_out
from common.errors import ConfigError, ConsiliumError
from deploy.doctor.commands import check
from deploy.ledger import commands as ledger
from deploy.node.commands import health as hospital_health
from deploy.node.commands import service, start
from deploy.prior import prior
from deploy.provision.commands import federation, hospital
from deploy.provision.member_commands import members
from deploy.server.commands import health as federation_health
from deploy.server.commands import run, serve
from deploy.server.commands import service as federation_service
from deploy.vectors import commands as by_hand

cli = typer.Typer(
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Hospitals train one medical-image classifier together; images never leave a hospital.",
)
cli.add_typer(ledger.commands, name="ledger")
cli.add_typer(federation, name="federation")
federation.command("serve")(serve)
federation.command("health")(federation_health)
hospital.command("members")(members)
federation.command("service")(federation_service)
hospital.command("check")(check)
hospital.command("start")(start)
hospital.command("health")(hospital_health)
hospital.command("service")(service)
cli.add_typer(hospital, name="hospital")
hospital.command("finetune")(by_hand.finetune)
hospital.command("outbox")(by_hand.outbox)
hospital.command("withdraw")(by_hand.withdraw)
cli.command("run")(run)
cli.command("pretrain")(by_hand.pretrain)
cli.command("prior")(prior)
cli.add_typer(by_hand.vectors, name="vectors")


def main() -> None:
    """Entry point: a ConsiliumError becomes its two parts on stderr and exit code 1."""
    try:
        cli()
    except ConsiliumError as error:
        typer.secho(f"error: {error.what}", fg=typer.colors.RED, err=True)
        typer.echo(f"what to do: {error.remedy}", err=True)
        sys.exit(1)


@cli.callback()
def _root() -> None:
    pass


@cli.command()
def config(
    format: Annotated[
        str, typer.Option(help="table, markdown (the README's), toml (pyproject's) or json.")
    ] = "table",
) -> None:
    """Print every run-config key: type, default, allowed range, meaning."""
    if format == "markdown":
        typer.echo(markdown_table())
    elif format == "toml":
        typer.echo(toml_table(), nl=False)
    elif format == "json":
        rows = [
            {"key": k.name, "type": k.kind, "default": k.default, "allowed": k.allowed,
             "meaning": k.meaning}
            for k in KEYS
        ]  # fmt: skip
        typer.echo(json.dumps(rows, indent=2, ensure_ascii=False))
    elif format == "table":
        table = Table()
        table.add_column("key", no_wrap=True)
        for column in ("type", "default", "allowed", "meaning"):
            table.add_column(column)
        for k in KEYS:
            table.add_row(k.name, k.kind, k.as_toml(), k.allowed, k.meaning)
        Console().print(table)
    else:
        raise ConfigError(f"there is no format '{format}'", "use table, markdown, toml or json")


def parse_assignments(assignments: list[str]) -> dict[str, Value]:
    """``["rounds=5", "dataset=npz"]`` → typed values, checked for name, type and range.

    A recipe beside a key's default is written out (:func:`common.config.recipes.written_out`).
    """
    values: dict[str, Value] = {}
    for assignment in assignments:
        name, equals, text = assignment.partition("=")
        name = name.strip()
        if not equals:
            raise ConfigError(f"'{assignment}' is no key=value", "write for example rounds=5")
        key = BY_NAME.get(name)
        if key is None:
            RunConfig.parse({name: text})  # raises, with the closest name
            raise AssertionError(name)
        values[name] = key.check(_typed(text.strip(), key.default))
    return written_out(values, {name: key.default for name, key in BY_NAME.items()})


def _typed(text: str, like: Value) -> Any:
    """``text`` as the type of ``like`` where it can be; else as it is, for the key to refuse."""
    if isinstance(like, str):
        return text.strip("\"'")
    if isinstance(like, bool):
        return {"true": True, "false": False}.get(text.lower(), text)
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text


@cli.command()
def simulate(
    hospitals: Annotated[int, typer.Option(help="Simulated hospitals.", min=1)] = 10,
    set_: Annotated[
        list[str], typer.Option("--set", help="key=value of the run config; repeatable.")
    ] = [],  # noqa: B006 (typer's way to say: none given)
    verbose: Annotated[bool, typer.Option(help="Show Flower's own log lines too.")] = False,
) -> None:
    """Run a federation on this machine through `flwr run`; exits non-zero if the run failed."""
    from deploy.simulate import simulate as run

    values = parse_assignments(set_)
    if values.get("data-path"):
        values["data-path"] = str(Path(str(values["data-path"])).expanduser().resolve())
    base = Path(str(values.get("base", ""))).expanduser()
    if base.is_file():  # the run has another working directory
        values["base"] = str(base.resolve())
    RunConfig.parse(values)
    sys.exit(run(hospitals, values, verbose=verbose))


@cli.command()
def evaluate(
    model: Annotated[Path, typer.Option(help="A .safetensors file of a run.")],
    data: Annotated[Path, typer.Option(help="A .npz file in MedMNIST's form.")],
    split: Annotated[str, typer.Option(help="train, val or test.")] = "test",
) -> None:
    """Print accuracy, macro-F1, macro-AUC and per-class figures of a model as JSON."""
    from deploy.evaluate import evaluate_file

    typer.echo(json.dumps(evaluate_file(model, data, split), indent=2, ensure_ascii=False))


if __name__ == "__main__":
    main()
