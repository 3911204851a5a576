"""``consilium hospital members``: whom of the roster this hospital shares sums with."""

from __future__ import annotations

import base64
import json
import sys
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Annotated

import typer

from common.errors import ConfigError
from deploy.provision.commands import WIDTH, HospitalDir, on_disk, right_now

if TYPE_CHECKING:
    from client_app.members import Standing


def members(
    dir: HospitalDir,
    accept: Annotated[
        list[str],
        typer.Option(
            metavar="NAME[=FINGERPRINT]",
            help="Let a member into sums with this hospital; with its fingerprint, as told by "
            "telephone, nothing is asked. Repeatable.",
        ),
    ] = [],  # noqa: B006 (typer's way to say: none given)
    refuse: Annotated[
        list[str],
        typer.Option(metavar="NAME", help="Keep a member out, accepted or not. Repeatable."),
    ] = [],  # noqa: B006
    accept_all: Annotated[
        bool, typer.Option("--accept-all", help="Accept everybody who waits.")
    ] = False,
    yes: Annotated[
        bool, typer.Option("--yes", help="Ask nothing: the fingerprints were compared.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON document.")] = False,
) -> None:
    """List the federation's hospitals, and decide who may be in a sum with this one.

    The coordinator says who belongs to the federation; this hospital's people say with whom it
    shares sums (accept-members in policy.toml). Compare the fingerprint with the hospital itself,
    by telephone: it sees its own in this list.
    """
    from client_app.hospital_file import HospitalFolder
    from client_app.members import check_known, waiting
    from client_app.policy import HospitalPolicy
    from deploy.provision import hospital

    folder = HospitalFolder(dir)
    rows = hospital.standings(folder)
    told = dict(map(_split, accept))
    if both := sorted(told.keys() & set(refuse)):
        raise ConfigError(f"{both[0]} is to be accepted and refused", "say one of them")
    chosen = {name: check_known(rows, name) for name in told}
    if accept_all:
        chosen |= {one.name: one for one in waiting(rows) if one.name not in refuse}
    refused = {name: check_known(rows, name).identity for name in refuse}
    for name, fingerprint in told.items():
        if fingerprint:
            _compare(chosen[name], fingerprint)
    asked = [one for one in chosen.values() if not told.get(one.name) and one.state != "accepted"]
    if asked and not yes:
        _ask(asked)
    with on_disk():
        if refused:
            rows = hospital.refuse(folder, refused, right_now())
        if chosen:
            keys = {name: one.identity for name, one in chosen.items()}
            rows = hospital.accept(folder, keys, right_now())
    if as_json:
        typer.echo(json.dumps(document(rows), indent=2, ensure_ascii=False))
        return
    show(rows)
    left = [one.name for one in waiting(rows)]
    if left and HospitalPolicy.load(folder.policy).secagg.accept_members == "ask":
        typer.echo(f"no sum is shared with {', '.join(left)} until accepted: --accept NAME")
    elif left:
        typer.echo(
            f"{', '.join(left)} may be in sums beside those who are accepted: accept-members = "
            '"auto" in the policy'
        )


def _split(given: str) -> tuple[str, str]:
    name, _, fingerprint = given.partition("=")
    return name, fingerprint


def _compare(one: Standing, told: str) -> None:
    from common.federation_file import EnrolmentError
    from deploy.provision.keys import member_fingerprint, same_fingerprint

    if not same_fingerprint(told, member_fingerprint(one.name, one.identity)):
        raise EnrolmentError(
            f"the fingerprint of {one.name} is not the one that was told; nothing was changed",
            f"ask {one.name} again; if it still differs, do not accept it, and tell the others",
        )


def _ask(asked: Sequence[Standing]) -> None:
    show(asked)
    names = ", ".join(one.name for one in asked)
    try:
        answer = typer.prompt(f"Compare with {names}, by telephone. The same? (yes)")
    except typer.Abort:
        answer = ""
    if answer.strip().lower() != "yes":
        raise ConfigError(
            f"nobody confirmed the fingerprint of {names}; nothing was changed",
            "repeat the command with --accept NAME=FINGERPRINT, or with --yes once they were "
            "compared",
        )


def document(rows: Sequence[Standing]) -> Mapping[str, object]:
    """``{"version": 1, "members": [{name, state, note, fingerprint, identity, max_images}]}``."""
    from deploy.provision.keys import member_fingerprint

    return {
        "version": 1,
        "members": [
            {
                "name": one.name,
                "state": one.state,
                "note": one.note,
                "fingerprint": member_fingerprint(one.name, one.identity),
                "identity": base64.b64encode(one.identity).decode(),
                "max_images": one.max_images,
            }
            for one in rows
        ],
    }


def show(rows: Sequence[Standing]) -> None:
    """Print the members as a table; nothing in it is read as markup."""
    from rich.console import Console
    from rich.table import Table

    from deploy.provision.keys import member_fingerprint

    width = None if sys.stdout.isatty() else WIDTH
    console = Console(width=width, highlight=False, markup=False, emoji=False, color_system=None)
    table = Table(header_style="")
    for column in ("hospital", "state", "images", "fingerprint"):
        table.add_column(column, overflow="fold", no_wrap=column == "fingerprint")
    for one in rows:
        state = f"{one.state}: {one.note}" if one.note else one.state
        table.add_row(one.name, state, str(one.max_images or "any"),
                      member_fingerprint(one.name, one.identity))  # fmt: skip
    console.print(table)
