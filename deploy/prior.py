"""``consilium prior``: make the features that ``model=prior-head`` starts from; no data needed."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def prior(
    out: Annotated[Path, typer.Option(help="Where the prior goes (.safetensors).")],
    seed: Annotated[int, typer.Option(help="Public: the same seed draws the same cells.")] = 0,
    pictures: Annotated[
        int, typer.Option(help="Cells drawn for each of the two networks.", min=256)
    ] = 50_000,
    steps: Annotated[
        int, typer.Option(help="Training steps of each network, of 128 pictures.", min=1)
    ] = 3_000,
    device: Annotated[
        str, typer.Option(help="Where they are trained: auto, cpu or cuda; others round otherwise.")
    ] = "auto",
) -> None:
    """Train feature networks on drawn, stained-cell-like pictures: some minutes, no data needed."""
    from common.prior.features import PriorSpec
    from common.prior.train import PriorBudget, make_prior, save_prior

    whitening = min(pictures, PriorBudget.whitening)
    budget = PriorBudget(pictures=pictures, steps=steps, whitening=whitening)
    made = make_prior(PriorSpec(), seed=seed, budget=budget, report=typer.echo, device=device)
    command = f"consilium prior --seed {seed} --pictures {pictures} --steps {steps}"
    digest = save_prior(made, out, made_by=command)
    typer.echo(f"{out}: prior {digest[:16]}")
    typer.echo(f"use it: recipe=prior-local (or prior-distributed) base={out.resolve()}")
