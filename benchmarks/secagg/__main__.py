"""The command: ``python -m benchmarks.secagg``."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from benchmarks.secagg.case import PARAMETERS, Case
from benchmarks.secagg.cells import run_cells
from benchmarks.secagg.masks import measure_masks
from benchmarks.secagg.tables import show
from common.errors import ConfigError, ConsiliumError
from common.files import read_json, write_json

RESULTS = Path(__file__).resolve().parents[1] / "results" / "secagg.json"


def _numbers(text: str, option: str) -> list[int]:
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise ConfigError(f"{option} is {text!r}", f"give numbers, as in {option} 5,10") from None


cli = typer.Typer(pretty_exceptions_enable=False)


@cli.command()
def benchmark(
    hospitals: Annotated[str, typer.Option(help="Cohorts, comma-separated.")] = "5,10,20,50",
    dropouts: Annotated[str, typer.Option(help="Drop-outs, comma-separated.")] = "0,1",
    parameters: Annotated[int, typer.Option(min=1, help="Values in an update.")] = PARAMETERS,
    num_shares: Annotated[int, typer.Option(help="A hospital's neighbourhood, and itself.")] = 5,
    threshold: Annotated[int, typer.Option(help="Shares that reconstruct a secret.")] = 4,
    repeat: Annotated[int, typer.Option(min=1, help="Runs of a cell, where that is cheap.")] = 3,
    limit: Annotated[float, typer.Option(help="Wall seconds that a cell may take.")] = 360,
    out: Annotated[Path, typer.Option(help="Results; what is there is not run again.")] = RESULTS,
    masks: Annotated[bool, typer.Option(help="Also one mask by itself.")] = True,
    fresh: Annotated[bool, typer.Option(help="Start anew.")] = False,
) -> None:
    """Measure our secure aggregation beside Flower's stock SecAgg+."""
    console = Console()
    if not console.is_terminal:
        console = Console(width=100)
    cases = [
        Case(
            parameters=parameters,
            hospitals=count,
            dropouts=lost,
            num_shares=num_shares,
            threshold=threshold,
        )
        for count in _numbers(hospitals, "--hospitals")
        for lost in _numbers(dropouts, "--dropouts")
    ]
    for case in cases:
        if not num_shares <= case.hospitals or not 0 <= case.dropouts < case.hospitals:
            raise ConfigError(
                f"{case.hospitals} hospitals with {num_shares} shares and {case.dropouts} dropped",
                "give at least as many hospitals as shares, and fewer drop-outs than hospitals",
            )
    beside = out.with_name(f"{out.stem}_masks.json")
    single = None
    if masks:
        single = read_json(beside) if beside.exists() and not fresh else None
        if single is None or single["parameters"] != parameters:
            single = measure_masks(parameters)
            write_json(beside, single)
    rows = run_cells(cases, out, repeat=repeat, limit=limit, fresh=fresh, console=console)
    show(rows, single, console)


def main() -> None:
    """Entry point: a ConsiliumError becomes its two parts on stderr and exit code 1."""
    try:
        cli()
    except ConsiliumError as error:
        typer.secho(f"error: {error.what}", fg=typer.colors.RED, err=True)
        typer.echo(f"what to do: {error.remedy}", err=True)
        sys.exit(1)


if __name__ == "__main__":
    main()
