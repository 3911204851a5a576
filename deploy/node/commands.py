"""``consilium hospital start|health|service``."""

from __future__ import annotations

import getpass
from typing import Annotated

import typer

from deploy.provision.commands import HospitalDir


def start(
    dir: HospitalDir,
    server: Annotated[
        str,
        typer.Option(
            help="HOST:PORT, where this network has another way to the server.",
            envvar="CONSILIUM_SERVER",
        ),
    ] = "",
) -> None:
    """Run this hospital's node in the foreground until it is told to stop (SIGTERM, Ctrl-C)."""
    from client_app.hospital_file import HospitalFolder
    from common.federation_file import split_address
    from deploy.node.launch import start as launch

    if server:
        split_address(server)
    launch(HospitalFolder(dir.absolute()), server, lambda line: print(line, flush=True))


def health(dir: HospitalDir) -> None:
    """Exit 0 if the running node has heard of the server within 90 s, else 1."""
    from client_app.hospital_file import HospitalFolder
    from deploy.node.state import NodeState

    silent = NodeState.of(HospitalFolder(dir.absolute())).health()
    typer.echo(f"the server answered {silent:.0f} s ago")


def service(
    dir: HospitalDir,
    user: Annotated[str, typer.Option(help="Whose the folder is; default: you.")] = "",
) -> None:
    """Print a systemd unit that runs this hospital's node."""
    from client_app.hospital_file import HospitalFile, HospitalFolder
    from deploy.node.unit import unit

    folder = HospitalFolder(dir.absolute())
    typer.echo(unit(HospitalFile.load(folder.file), folder, user or getpass.getuser()), nl=False)
