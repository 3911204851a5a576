"""The command: ``python -m benchmarks.audit``."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.table import Table

from benchmarks.audit.cells import Effort, Row, cells, run
from benchmarks.audit.figure import draw
from common.datasets import Dataset, load_npz, make_synthetic
from common.errors import ConfigError, ConsiliumError
from common.files import read_json, write_json

RESULTS = Path(__file__).resolve().parents[1] / "results" / "audit.json"

cli = typer.Typer(pretty_exceptions_enable=False)


@cli.command()
def benchmark(
    data: Annotated[Path | None, typer.Option(help="Images, npz; else synthetic cells.")] = None,
    out: Annotated[Path, typer.Option(help="Results; what is there is not run again.")] = RESULTS,
    only: Annotated[str, typer.Option(help="Cells whose name has this in it.")] = "",
    runs: Annotated[int, typer.Option(min=20, help="With and without the canary, each.")] = 4000,
    bug_runs: Annotated[int, typer.Option(min=20, help="The same for planted bugs.")] = 1200,
    canaries: Annotated[int, typer.Option(min=10, help="Of an audit in one run.")] = 400,
    guesses: Annotated[int, typer.Option(min=2, help="Coins guessed in one run.")] = 80,
    models: Annotated[int, typer.Option(min=8, help="Shadow models.")] = 40,
    pool: Annotated[int, typer.Option(min=20, help="Images of membership attacks.")] = 400,
    epochs: Annotated[int, typer.Option(min=1, help="Of the model without privacy.")] = 30,
    seed: Annotated[int, typer.Option(help="Of data, canaries and start; never of noise.")] = 0,
    fresh: Annotated[bool, typer.Option(help="Start anew.")] = False,
) -> None:
    """Audit the private trainer, planted bugs beside it, and attack models' members."""
    torch.set_num_threads(1)
    console = Console()
    if not console.is_terminal:
        console = Console(width=120)
    images = make_synthetic(seed=seed) if data is None else load_npz(data)
    if len(images.train) < max(pool, 17) or images.channels != 3:
        raise ConfigError(
            f"{images.source} has {len(images.train)} training images of {images.channels} "
            f"channel(s); the audit needs {max(pool, 17)} in colour",
            "give a smaller --pool, or other images",
        )
    effort = Effort(
        runs=runs, bug_runs=bug_runs, canaries=canaries, guesses=guesses, models=models,
        pool=pool, epochs=epochs,
    )  # fmt: skip
    rows = _kept(out, images, seed, fresh)
    for cell in cells(images, effort, seed):
        if only in cell.name and cell.name not in {row["cell"] for row in rows}:
            made = run(cell, images, seed)
            rows += made
            write_json(out, rows)
            console.print(f"{cell.name}: {made[0]['wall_s']} s")
    draw(rows, out.with_suffix(".png"))
    show(rows, console)


def _kept(out: Path, images: Dataset, seed: int, fresh: bool) -> list[Row]:
    rows: list[Row] = read_json(out) if out.exists() and not fresh else []
    if any((row["source_sha256"], row["seed"]) != (images.sha256, seed) for row in rows):
        raise ConfigError(
            f"{out} holds rows of other images or another seed",
            "give another --out, or --fresh to start anew",
        )
    return rows


def show(rows: list[Row], console: Console) -> None:
    """Two tables: bounds on ε, and membership."""
    table = Table(title="Claimed ε, and what the audit proves at least")
    for name in ("cell", "method", "claimed", "at least", "refuted"):
        table.add_column(name)
    for row in rows:
        if row["audited_lower_bound"] is not None:
            table.add_row(
                row["cell"], row["method"], f"{row['claimed_epsilon']:.2f}",
                f"{row['audited_lower_bound']:.2f}", "yes" if row["refuted"] else "no",
            )  # fmt: skip
    console.print(table)
    table = Table(title="Membership")
    for name in ("cell", "method", "advantage", "95 %", "AUC", "TPR at 1 % FPR", "accuracy"):
        table.add_column(name)
    for row in rows:
        if row["mia_advantage"] is not None:
            low, high = row["mia_advantage_interval"]
            table.add_row(
                row["cell"], row["method"].partition(", ")[2], f"{row['mia_advantage']:.3f}",
                f"{low:.3f} to {high:.3f}", f"{row['mia_auc']:.3f}",
                f"{row['mia_tpr_at_1_fpr']:.3f}", f"{row['test_accuracy']:.3f}",
            )  # fmt: skip
    console.print(table)


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
