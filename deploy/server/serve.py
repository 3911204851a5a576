"""``consilium federation serve``: everything of the coordinator's side, until told to stop."""

from __future__ import annotations

import os
import re
import secrets
import threading
from collections.abc import Callable
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path

from cryptography.hazmat.primitives.asymmetric.ec import SECP384R1, generate_private_key

from common.errors import ConsiliumError
from common.federation_file import split_address
from deploy.provision import certificates, keys
from deploy.provision.federation import FederationFolder, Settings
from deploy.provision.files import private_folder
from deploy.provision.members import members
from deploy.runtime import unix
from deploy.runtime.flower import environment, loopback_directly
from deploy.runtime.supervisor import Service, Supervisor
from deploy.server.control import Control
from deploy.server.health import healthy
from deploy.server.launch import check_app
from deploy.server.layout import (
    LOOPBACK,
    Server,
    ServerFolder,
    only_server,
    remember,
    write_private,
)
from deploy.server.preflight import check, check_free
from deploy.server.registrar import Registrar

_YEARS = 3650
"""Days of the socket's certificate: a server may run for long."""
SOCKET = "link.sock"


def serve(root: Path, host: str, port: int | None, say: Callable[[str], None]) -> None:
    """Serve the federation in ``root`` in the foreground until SIGTERM or SIGINT.

    ``port``: None for that of the federation's address. ``say``: one line for whoever watches.
    ConfigError before anything is started where it could not work, or a server runs already.
    """
    check_app()
    federation, folder = FederationFolder(root.resolve()), ServerFolder(root.resolve())
    settings = federation.load()
    warnings = check(federation, datetime.now(UTC))
    os.umask(0o077)  # of all that is written from here on
    private_folder(folder.state)
    private_folder(folder.home)
    listening = port or split_address(settings.address)[1]
    with only_server(folder), unix.place(folder.state, SOCKET) as socket:
        check_free(host, listening)
        for warning in warnings:
            say(f"! {warning}")
        loopback_directly(os.environ)
        _make_loopback(folder, datetime.now(UTC))
        server = Server(str(socket), str(folder.authority), host, listening, os.getpid())
        registrar = Registrar(federation, folder, lambda: Control.of(server), say)
        supervisor = Supervisor(_services(folder, server), folder.logs, _without_routine(say))
        over = threading.Event()
        watch = threading.Thread(
            target=_tell_ready, args=(federation, server, registrar, over, say), daemon=True
        )
        server.write(folder.control)
        with suppress(OSError):  # a convenience: the folder's path does as well
            remember(settings.name, folder.root)
        registrar.start()
        watch.start()
        try:
            supervisor.run()
        finally:
            over.set()
            registrar.stop()
            folder.control.unlink(missing_ok=True)
            registrar.join(2.0)
    say(f"the federation {settings.name} is served no more")


def _make_loopback(folder: ServerFolder, now: datetime) -> None:
    """Authority, certificate and secret for this one time; the authority's key is kept nowhere.

    TLS on a socket of one's own account guards nothing more; Flower's node authentication asks
    for it.
    """
    private_folder(folder.tls)
    signing = generate_private_key(SECP384R1())
    authority = certificates.make_authority("loopback", signing, now)
    write_private(folder.authority, authority)
    write_private(folder.key, keys.new_tls_key())
    certificate = certificates.make_server(
        "loopback",
        ["localhost", LOOPBACK],
        keys.load_tls_key(folder.key).public_key(),
        certificates.parse_certificate(authority, folder.authority),
        signing,
        now,
        _YEARS,
    )
    write_private(folder.certificate, certificate)
    write_private(folder.secret, secrets.token_hex(32) + "\n")


def _services(folder: ServerFolder, server: Server) -> list[Service]:
    root, inside = str(folder.root), server.socket
    base = {name: value for name, value in os.environ.items() if name != "CONSILIUM_RUN"}

    def surroundings(role: str) -> dict[str, str]:
        return environment(private_folder(folder.flower_home(role)), base)

    # Flower would look for news of the app at its hub.
    flower = surroundings("flower") | {"FLWR_SUPERGRID_API_URL": "http://127.0.0.1:9/"}
    apps = surroundings("flower-app") | {
        "CONSILIUM_HOME": str(folder.home), "CONSILIUM_NODES": str(folder.nodes)
    }  # fmt: skip
    return [
        Service("superlink", ["-m", "deploy.server.superlink", root, inside], flower, _explain),
        Service("gate", ["-m", "deploy.server.gate", root, server.gate_host,
                         str(server.gate_port), inside], dict(base), _explain),
        Service("runs", ["-m", "deploy.server.executor", root, inside], apps, _explain),
    ]  # fmt: skip


_ROUTINE = re.compile(r"superlink \| (\x1b\[\d+m)?(INFO|\S+Z INFO)")


def _without_routine(say: Callable[[str], None]) -> Callable[[str], None]:
    """What the SuperLink does all day is in its log, and not for whoever watches."""

    def chosen(line: str) -> None:
        if not _ROUTINE.match(line):
            say(line)

    return chosen


_MEANINGS = (
    ("address already in use", "another program has taken the port: stop it, or serve on another"),
    ("No space left on device", "the disk is full: make room, then it starts again"),
    ("database disk image is malformed", "Flower's database is damaged: stop the server, move "
     "state/superlink.db* away, and start it; hospitals are registered anew, runs can be resumed"),
)  # fmt: skip


def _explain(line: str) -> str | None:
    return next((meaning for sign, meaning in _MEANINGS if sign.lower() in line.lower()), None)


def _tell_ready(
    federation: FederationFolder,
    server: Server,
    registrar: Registrar,
    over: threading.Event,
    say: Callable[[str], None],
) -> None:
    """Once hospitals can connect, say so, and what to do next."""
    settings = federation.load()
    while not over.wait(0.2):
        if registrar.first.is_set() and healthy(federation, server):
            _welcome(federation, settings, server, say)
            return


def _welcome(
    federation: FederationFolder, settings: Settings, server: Server, say: Callable[[str], None]
) -> None:
    try:
        names = [member.name for member in members(federation)]
    except ConsiliumError:
        names = []
    say(f"ready: the federation {settings.name} is served at {settings.address} "
        f"(listening on {server.gate_host}, port {server.gate_port})")  # fmt: skip
    if names:
        say(f"{len(names)} hospitals are admitted: {', '.join(names)}")
        say(f"next: each hospital runs `consilium hospital start`; then `consilium run "
            f"--federation {settings.name}`")  # fmt: skip
    else:
        say(f"no hospital is admitted yet: consilium federation admit {federation.root} "
            "REQUEST (the server notices by itself)")  # fmt: skip
