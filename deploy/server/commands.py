"""``consilium federation serve|health|service`` and ``consilium run``."""

from __future__ import annotations

import getpass
import sys
from pathlib import Path
from typing import Annotated

import typer

Folder = Annotated[
    Path,
    typer.Argument(
        metavar="DIR", envvar="CONSILIUM_FEDERATION", help="The coordinator's folder.",
        readable=False,
    ),
]  # fmt: skip
Port = Annotated[
    int | None,
    typer.Option(
        envvar="CONSILIUM_PORT", min=1, max=65535, help="Default: that of the federation's address."
    ),
]


def serve(
    dir: Folder,
    host: Annotated[
        str, typer.Option(envvar="CONSILIUM_HOST", help="IP address to listen on.")
    ] = "0.0.0.0",
    port: Port = None,
) -> None:
    """Serve a federation until stopped: what hospitals connect to, and what runs are started on."""
    from deploy.server.serve import serve as run_server

    run_server(dir, host, port, _say)


def health(dir: Folder, port: Port = None) -> None:
    """Exit with 0 if the server on this machine answers as hospitals would see it, else with 1."""
    from deploy.provision.federation import FederationFolder
    from deploy.server.health import check_health

    check_health(FederationFolder(dir.resolve()), port)
    typer.echo("ok")


def service(
    dir: Folder,
    user: Annotated[str, typer.Option(help="Whose the folder is; default: you.")] = "",
) -> None:
    """Print a systemd unit that serves a federation."""
    from deploy.provision.federation import FederationFolder
    from deploy.runtime.systemd import unit

    root = dir.resolve()
    name = FederationFolder(root).load().name
    text = unit(
        name=f"{name}-server",
        what=f"server of the federation {name}",
        folder=root,
        user=user or getpass.getuser(),
        command=("federation", "serve"),
    )
    typer.echo(text, nl=False)


def run(
    federation: Annotated[
        str,
        typer.Option(
            envvar="CONSILIUM_FEDERATION",
            help="The coordinator's folder, or the federation's name.",
        ),
    ],
    set_: Annotated[
        list[str], typer.Option("--set", help="key=value of the run config; repeatable.")
    ] = [],  # noqa: B006 (typer's way to say: none given)
    resume: Annotated[str, typer.Option(help="Id of a run to go on with.")] = "",
    follow: Annotated[
        int | None, typer.Option(help="Show the log of a run that goes on, by Flower's id.")
    ] = None,
    stop: Annotated[int | None, typer.Option(help="Stop a run, by Flower's id.")] = None,
    verbose: Annotated[bool, typer.Option(help="Show Flower's own log lines too.")] = False,
) -> None:
    """Train with the hospitals of a federation that is served; exits non-zero if it failed."""
    from common.errors import ConfigError
    from deploy.cli import parse_assignments
    from deploy.server import run as runs

    if sum((bool(set_ or resume), follow is not None, stop is not None)) > 1:
        raise ConfigError(
            "--follow, --stop and a new run exclude each other", "give one of them only"
        )
    place = runs.Place.of(federation)
    if stop is not None:
        runs.stop(place, stop, _say)
        return
    if follow is not None:
        sys.exit(runs.follow(place, follow, verbose=verbose))
    values = runs.run_config(place, parse_assignments(set_), resume)
    sys.exit(runs.start(place, values, verbose=verbose))


def _say(line: str) -> None:
    typer.echo(line)
    sys.stdout.flush()
