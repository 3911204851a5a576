"""``consilium run``: start, follow, stop and resume a run on a federation that is served."""

from __future__ import annotations

import base64
import os
import re
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx

from common.config import RunConfig, Value
from common.errors import ConfigError, ConsiliumError
from common.files import atomic_write, read_json
from common.messages import check_run_id
from deploy.provision.federation import FederationFolder
from deploy.provision.files import private_folder
from deploy.runtime.flower import environment, loopback_directly
from deploy.runtime.supervisor import python, with_our_code
from deploy.runtime.unix import NOWHERE
from deploy.server import launch
from deploy.server.control import Control, Status
from deploy.server.layout import Server, ServerFolder, find

CONNECTION = "federation"
DETACHED = 130
"""Exit code after Ctrl-C."""
_RUN = re.compile(r"run (\d{8}-\d{6}-[0-9a-f]{8})")


@dataclass(frozen=True)
class Place:
    """A federation, and what it was called by."""

    called: str
    federation: FederationFolder
    server: ServerFolder

    @classmethod
    def of(cls, called: str) -> Place:
        """By folder or name; ConfigError if there is none."""
        root = find(called)
        return cls(called, FederationFolder(root), ServerFolder(root))

    def connect(self) -> Control:
        """The running server's control API, as ``control.json`` says now; ConfigError if none."""
        return Control.of(Server.read(self.server.control))

    def runs(self) -> Path:
        """Where the runs are."""
        return self.server.home / "runs"


def run_config(place: Place, given: Mapping[str, Value], resume: str) -> dict[str, Value]:
    """All that a run on this federation needs: ``given`` and what the federation says.

    ``resume``: id of a run whose values come first; ``given`` is over them. ConfigError for what
    contradicts the federation, and for whatever RunConfig refuses.
    """
    values: dict[str, Value] = {}
    resume = resume or str(given.get("resume", ""))
    if resume:
        values = dict(read_json(place.runs() / check_run_id(resume) / "config.json"))
    values |= given
    if values.get("test-data"):
        values["test-data"] = str(_file(str(values["test-data"])))
    base = Path(str(values.get("base") or "")).expanduser()
    if values.get("base") and base.is_file():  # else it is a run's id
        values["base"] = str(base.resolve())
    for name, value in _fixed(place.federation).items():
        if values.get(name, value) != value and (name in given or resume):
            whose = "--set" if name in given else f"the run {resume}"
            raise ConfigError(
                f"{whose} has {name}={values[name]!r}, but the federation {value!r}",
                f"leave {name} out: it is the federation's" if name in given
                else "restore the federation's folder to what and where it was, or start a new run",
            )  # fmt: skip
        values[name] = value
    if resume:
        values["resume"] = resume
    _check(place.federation, RunConfig.parse(values))
    return values


def _check(folder: FederationFolder, config: RunConfig) -> None:
    """What the ServerApp would refuse only once it has started: who there is, and their shares."""
    from common.aggregation import params_for
    from common.roster import load_roster
    from server_app.directory import sample_size

    there = len(load_roster(folder.roster, config.coordinator_key))
    if not there:
        raise ConfigError(
            "no hospital is admitted today",
            f"consilium federation admit {folder.root} REQUEST; `consilium federation status` "
            "shows who was",
        )
    if config.secagg:
        params_for(config, sample_size(config.fraction, config.hospitals or there))


def _fixed(folder: FederationFolder) -> dict[str, Value]:
    settings = folder.load()
    if commas := [name for name in settings.classes if "," in name]:
        raise ConfigError(
            f"the class {commas[0]!r} has a comma in it, which parts classes in a run's "
            "configuration",
            f"rename it in {folder.settings}, then: consilium federation refresh {folder.root}",
        )
    return {
        "dataset": "hospitals",
        "classes": ",".join(settings.classes),
        "image-size": settings.image_size,
        "channels": settings.channels,
        "roster": str(folder.roster),
        "coordinator-key": base64.b64encode(folder.public_key()).decode(),
    }


def _file(given: str) -> Path:
    path = Path(given).expanduser().resolve()
    if not path.is_file():
        raise ConfigError(f"test-data {path} is no file", "give the path of an npz file")
    return path


def flowers_own(folder: ServerFolder, server: Server) -> tuple[list[str], dict[str, str]]:
    """The words of Flower's own ``flwr`` by a server's socket, and the environment that it needs.

    In it the server is called :data:`CONNECTION`.
    """
    home = private_folder(folder.flower_home("flower-cli"))
    atomic_write(
        home / "config.toml",
        f'[superlink]\ndefault = "{CONNECTION}"\n\n[superlink.{CONNECTION}]\n'
        + launch.toml({"address": NOWHERE, "root-certificates": server.authority}),
    )
    words = [*python(), "-m", "deploy.server.flwr_command", server.socket]
    return words, with_our_code(environment(home))


def start(place: Place, values: Mapping[str, Value], *, verbose: bool) -> int:
    """Start a run and stay with it; 0 if it completed, 1 if not, :data:`DETACHED` after Ctrl-C."""
    launch.check_app()
    server = _answering(place)
    loopback_directly(os.environ)
    flwr, surroundings = flowers_own(place.server, server)
    try:
        run = launch.start(CONNECTION, values, surroundings, flwr=flwr)
    except launch.Detached as detached:
        return _detached(place, detached.run)
    print(f"started (Flower's id of it: {run}); Ctrl-C leaves it running", flush=True)
    return follow(place, run, verbose=verbose)


def follow(place: Place, run: int, *, verbose: bool) -> int:
    """Show a run's log from its start and stay to its end; exit code as :func:`start`."""
    names: list[str] = []

    def seen(line: str) -> None:
        if not names and (found := _RUN.fullmatch(line.strip())):
            names.append(found.group(1))

    loopback_directly(os.environ)
    _answering(place)
    try:
        status = launch.follow(place.connect, run, launch.Lines(verbose=verbose, seen=seen))
    except KeyboardInterrupt:
        return _detached(place, run)
    return _conclude(place, names[0] if names else None, status)


def stop(place: Place, run: int, say: Callable[[str], None]) -> None:
    """Stop a run; ConsiliumError if there is none, or it has ended already."""
    loopback_directly(os.environ)
    _answering(place)
    with place.connect() as control:
        status = control.status(run)
        if status is None or status.ended:
            how = "there is no such run" if status is None else status.text
            raise ConsiliumError(f"run {run} cannot be stopped: {how}", "check the number")
        control.stop(run)
    say(f"run {run} is stopped; what it has done can be resumed")


def _answering(place: Place) -> Server:
    """The running server; ConsiliumError if there is none, or it does not answer."""
    server = Server.read(place.server.control)
    try:
        with Control.of(server) as control:
            control.nodes()
    except httpx.HTTPError:
        raise ConsiliumError(
            f"the server of {place.federation.root} does not answer",
            "wait if it is just starting; else read the logs in "
            f"{place.server.logs}, or start it again: consilium federation serve",
        ) from None
    return server


def _detached(place: Place, run: int) -> int:
    again = f"consilium run --federation {place.called}"
    print(f"\nthe run goes on. To follow it: {again} --follow {run}\n"
          f"to stop it: {again} --stop {run}", flush=True)  # fmt: skip
    return DETACHED


def _conclude(place: Place, name: str | None, status: Status) -> int:
    directory = place.runs() / name if name else None
    if directory is not None and directory.is_dir():
        print(f"the run's directory: {directory}", flush=True)
    if status.text == "finished:completed":
        return 0
    print(f"the run failed ({status.text}): {_reason(directory, status)}", file=sys.stderr)
    if directory is not None and _resumable(directory):
        print(f"go on from its last complete round: consilium run --federation {place.called} "
              f"--resume {name}", file=sys.stderr)  # fmt: skip
    return 1


def _reason(directory: Path | None, status: Status) -> str:
    summary: Any = {}
    if directory is not None and (directory / "summary.json").exists():
        summary = read_json(directory / "summary.json")
    return str(summary.get("reason") or status.details or "its log above says why")


def _resumable(directory: Path) -> bool:
    metrics = directory / "metrics.jsonl"
    return metrics.exists() and metrics.stat().st_size > 0
