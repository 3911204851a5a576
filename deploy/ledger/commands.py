"""``consilium ledger show|verify|export|close``.

``show`` says what was spent and what is left, ``verify`` that nothing was changed, ``export``
writes it down for an audit, ``close`` gives back what an unfinished run holds. All but ``close``
only read: they make no ledger and change none (where a crash left a transaction half done, SQLite
undoes it at the first reading, as the node itself would).

The JSON of ``show`` is described in :mod:`deploy.ledger.view`, that of ``export``, and how it is
verified without the ledger, in :mod:`deploy.ledger.export`. ``verify --json`` prints ``ledger``
(``path``, or ``export``; and ``id``), ``entries``, ``head`` (hash of the last entry),
``head_noted`` (whether the head's file lies beside the ledger; null for an export) and
``noted_entry`` (number of the entry that ``--head`` names, else null).
"""

from __future__ import annotations

import math
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from common.errors import ConfigError
from deploy.ledger.choice import (
    HomeOption,
    HospitalOption,
    PolicyOption,
    RunOption,
    choose,
    listed,
    policy_for,
)

if TYPE_CHECKING:  # torch, Opacus and SciPy are loaded when a command needs them
    from common.privacy.ledger import Ledger
    from common.privacy.limits import PrivacyLimits

WIDTH = 100
"""Columns of a table where no terminal says how many it has."""

commands = typer.Typer(
    no_args_is_help=True,
    help="What this hospital's images were used for: show, verify, export, close.",
)

JsonOption = Annotated[bool, typer.Option("--json", help="One JSON document instead of text.")]


@commands.command()
def show(
    home: HomeOption = None,
    hospital: HospitalOption = None,
    run: RunOption = None,
    policy: PolicyOption = None,
    entries: Annotated[bool, typer.Option("--entries", help="List every entry, too.")] = False,
    json: JsonOption = False,
) -> None:
    """What every data set has spent, holds and has left, and what each run used of its promise."""
    from deploy.ledger.opening import opened
    from deploy.ledger.text import render
    from deploy.ledger.view import as_json, describe

    place = choose(home, hospital, run)
    rules = policy_for(place, policy)
    with opened(place.path) as ledger:
        _check_run(ledger, run)
        document = describe(ledger, place, rules, datetime.now(UTC), run=run, entries=entries)
    if json:
        typer.echo(as_json(document))
    else:
        render(document, width=None if sys.stdout.isatty() else WIDTH)


@commands.command()
def verify(
    home: HomeOption = None,
    hospital: HospitalOption = None,
    run: RunOption = None,
    head: Annotated[
        str | None, typer.Option("--head", help="A head that was noted earlier: must be in it.")
    ] = None,
    export: Annotated[
        Path | None,
        typer.Option(
            "--export", help="Verify this JSON export instead; no ledger is needed.", readable=False
        ),
    ] = None,
    json: JsonOption = False,
) -> None:
    """Check the whole ledger: exit code 1 if an entry or image was changed, removed or added."""
    from common.privacy.ledger import LedgerError
    from common.privacy.ledger.chain import GENESIS
    from deploy.ledger.export import verify_export
    from deploy.ledger.opening import opened
    from deploy.ledger.view import as_json

    noted = None if head is None else _hash(head)
    path = export or choose(home, hospital, run).path
    head_noted = None
    if export:
        name, entries = verify_export(path)
    else:
        with opened(path) as ledger:
            name, entries = ledger.chain.meta("id").decode(), ledger.chain.entries()
        head_noted = path.with_suffix(".head").exists()
    hashes = [GENESIS, *(entry.hash for entry in entries)]
    if noted is not None and noted not in hashes:
        raise LedgerError(
            f"{path} does not hold the head {noted}: entries were removed or rewritten",
            "make sure that it is the same hospital's ledger; then find out who changed it",
        )
    position = None if noted is None else hashes.index(noted)
    kind, count, last = "export" if export else "path", len(entries), hashes[-1]
    if json:
        document = {"ledger": {kind: str(path), "id": name}, "entries": count, "head": last,
                    "head_noted": head_noted, "noted_entry": position}  # fmt: skip
        typer.echo(as_json(document))
        return
    typer.echo(f"the {'export' if export else 'ledger'} {path} is whole: {count} entries")
    if position is not None:
        typer.echo(f"the head that you noted is entry {position} of {count}")
    if export:
        typer.echo(
            f"its head: {last}\n"
            "compare it with the head that was noted at the hospital (--head): the chain\n"
            "proves no more than that. The first entry's predecessor is taken as given; the\n"
            "summary is not in the chain."
        )
        return
    typer.echo(
        f"note it down: {last}\n"
        "later, `consilium ledger verify --head` with it shows that nothing before is gone"
    )
    if not head_noted and count:
        typer.echo(
            "warning: no head lies beside the ledger; entries cut off at its end show only\n"
            "against a head that you noted."
        )


@commands.command()
def export(
    file: Annotated[
        Path, typer.Argument(help="The file to write; only you may read it.", readable=False)
    ],
    format: Annotated[
        str | None, typer.Option(help="json, or csv; else by the file's ending (json).")
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace an existing file.")] = False,
    home: HomeOption = None,
    hospital: HospitalOption = None,
    run: Annotated[
        str | None, typer.Option("--run", help="Picks the ledger where each run has one.")
    ] = None,
    policy: PolicyOption = None,
) -> None:
    """Write every entry with all its columns, and a summary, for an audit.

    It may leave the house: it holds no image, no file name and no image's or patient's hash. It
    does hold the exact number of images. The JSON form can be verified without the ledger
    (`consilium ledger verify --export FILE`). Beside a CSV form out.csv, the summary is a file of
    its own: out.summary.json.
    """
    from deploy.ledger.export import check_target, exported, targets_of, write
    from deploy.ledger.opening import opened

    targets = targets_of(file, format)
    place = choose(home, hospital, run)
    rules = policy_for(place, policy)
    for target in targets:
        check_target(target, place.path, force)
    with opened(place.path) as ledger:
        document = exported(ledger, place, rules, datetime.now(UTC))
    write(document, targets)
    for target in targets:
        typer.echo(f"wrote {target}")
    typer.echo(f"{document['ledger']['entries']} entries, head {document['ledger']['head']}")


@commands.command()
def close(
    run: Annotated[str, typer.Argument(help="The unfinished run.")],
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask.")] = False,
    home: HomeOption = None,
    hospital: HospitalOption = None,
    policy: PolicyOption = None,
) -> None:
    """Give back the ε that an unfinished run holds; the run cannot go on afterwards.

    What it has spent stays counted.
    """
    from deploy.ledger.opening import opened
    from deploy.ledger.view import limits_of

    place = choose(home, hospital, run)
    rules = policy_for(place, policy)
    with opened(place.path, write=True) as ledger:
        _check_run(ledger, run)
        state = ledger.state(run)
        if state is None:
            typer.echo(f"run {run} was not private: it holds nothing; nothing was changed")
            return
        if state.closed:
            typer.echo(f"run {run} is closed already; nothing was changed")
            return
        promise, spent = state.plan.promise, ledger.spent_by_run(run)
        typer.echo(
            f"run {run}: {state.rounds} of {promise.rounds} rounds used, ε={spent.value:.3f} of "
            f"{promise.epsilon:g} spent (δ={promise.delta:g}); that stays counted"
        )
        gains = _gains(ledger, run, limits_of(ledger, rules))
        for gain in gains or ["it holds nothing at the moment: closing gives no ε back"]:
            typer.echo(gain)
        typer.echo("the run cannot go on afterwards; a new one must be admitted")
        if not yes:
            typer.confirm("close the run?", abort=True)
        ledger.close_run(run)
        typer.echo(f"closed. The ledger's head, note it down: {ledger.chain.head()[1]}")


def _gains(ledger: Ledger, run: str, limits: PrivacyLimits) -> list[str]:
    """What closing ``run`` gives back: a line for each data set that it holds something of."""
    from common.privacy.ledger import data_sets
    from deploy.ledger.view import left

    lines = []
    with ledger.chain.snapshot():
        for data in data_sets(ledger.chain):
            now = ledger.total(data.fingerprint, limits, held=True)
            then = ledger.total(data.fingerprint, limits, held=True, skip=run)
            if then.epsilon < now.epsilon:
                gain, rest = now.epsilon - then.epsilon, left(then, limits)
                line = f"closing gives back ε={gain:.3f} to data set {data.fingerprint[:8]}"
                lines.append(line + (f": {rest:.3f} are left then" if math.isfinite(rest) else ""))
    return lines


def _check_run(ledger: Ledger, run: str | None) -> None:
    runs = ledger.runs()
    if run is not None and run not in runs:
        raise ConfigError(
            f"the ledger {ledger.chain.path} knows no run {run}",
            f"it knows: {listed(runs) or 'none'}; --home or --hospital choose another one",
        )


def _hash(text: str) -> str:
    """A head as a person copied it; ConfigError for what cannot be one."""
    found = text.strip().lower()
    if len(found) != 64 or set(found) - set("0123456789abcdef"):
        raise ConfigError(
            f"'{text}' is no head", "give the 64 hexadecimal digits that `verify` printed"
        )
    return found
