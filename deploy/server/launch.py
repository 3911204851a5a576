"""Starts a run by ``flwr run`` and stays with it to its end: for simulations and real ones.

``flwr run`` exits with 0 for a run that failed, and its stream breaks when the SuperLink restarts
while the run goes on. So it only starts the run here; log and status are asked for until the
run has ended.
"""

from __future__ import annotations

import json
import re
import subprocess
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import httpx

import deploy
from common.config import Value
from common.errors import ConfigError, ConsiliumError
from deploy.runtime.flower import command
from deploy.server.control import Control, Status

APP = Path(deploy.__file__).resolve().parent.parent
PATIENCE = 600.0
"""Seconds that nobody may answer before it is given up to follow a run."""
AGAIN = 1.0
"""Seconds between two attempts."""
_NOISE = re.compile(
    r"^(\d\d/\d\d/\d{4} [\d:]+:)?(\x1b\[\d+m)?(INFO|DEBUG|WARNING)|^\(ClientAppActor|^\(raylet"
    r"|Successfully (started|installed)|FutureWarning|UserWarning|warnings\.warn|loss\.backward"
)


def check_app() -> None:
    """ConfigError unless the Flower app is where ``flwr run`` can pack it."""
    if not (APP / "pyproject.toml").exists():
        raise ConfigError(
            "the Flower app's pyproject.toml is not beside the installed packages",
            "work in a clone of the repository, installed with `pip install -e .`",
        )


def start(
    connection: str,
    values: Mapping[str, Value],
    environment: Mapping[str, str],
    options: Sequence[str] = (),
    *,
    flwr: Sequence[str] = (),
) -> int:
    """Start a run with the run-config ``values``; Flower's id of it.

    ``connection``: its name in ``config.toml`` of the environment's ``FLWR_HOME``. ``options``:
    further ones of ``flwr run``. ``flwr``: the words of that command; this environment's if none.
    ConsiliumError, after what Flower printed, if it did not start.
    """
    with tempfile.NamedTemporaryFile("w", suffix=".toml", encoding="utf-8") as file:
        file.write(toml(values))
        file.flush()
        process = subprocess.Popen(
            [*(flwr or [command("flwr")]), "run", str(APP), connection, "--run-config", file.name,
             *options],
            env=dict(environment), text=True, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT, errors="replace",
            start_new_session=True,  # Ctrl-C is ours: once asked for, the run's id must be known
        )  # fmt: skip
        try:
            output, _ = process.communicate()
        except KeyboardInterrupt:
            output, _ = process.communicate()
            if found := _started(output):
                raise Detached(found) from None
            raise
    run = _started(output)
    if run is None:
        print(output, end="", flush=True)
        raise ConsiliumError("`flwr run` did not start the run", "read what it printed above")
    return run


class Detached(KeyboardInterrupt):
    """Ctrl-C while a run was being started; it goes on."""

    def __init__(self, run: int) -> None:
        super().__init__()
        self.run = run


def _started(output: str) -> int | None:
    found = re.search(r"Successfully started run (\d+)", output)
    return int(found.group(1)) if found else None


def toml(values: Mapping[str, Value]) -> str:
    """Run-config values as a TOML file, whatever characters are in a text."""
    # Of JSON's texts all are TOML's, but for DEL, which TOML wants escaped.
    shown = {k: json.dumps(v, ensure_ascii=False).replace("\x7f", "\\u007f")
             for k, v in values.items()}  # fmt: skip
    return "".join(f"{name} = {text}\n" for name, text in shown.items())


class Lines:
    """Puts pieces of a log together to lines, and shows those that are not Flower's own."""

    def __init__(self, *, verbose: bool, seen: Callable[[str], None] = lambda line: None) -> None:
        """``seen``: called with each line, shown or not."""
        self._verbose, self._seen = verbose, seen
        self._rest = ""

    def add(self, text: str) -> None:
        """The next piece."""
        *lines, self._rest = (self._rest + text).split("\n")
        for line in lines:
            self._show(line)

    def end(self) -> None:
        """What came without an end of line."""
        if self._rest:
            self._show(self._rest)
        self._rest = ""

    def _show(self, line: str) -> None:
        self._seen(line)
        if self._verbose or not _NOISE.search(line):
            print(line, flush=True)


def follow(
    connect: Callable[[], Control], run: int, lines: Lines, *, patience: float = PATIENCE
) -> Status:
    """Show a run's log until it has ended; how it ended.

    Where the connection breaks it is made again, by ``connect`` anew, and no line comes twice.
    ConsiliumError if there is no such run, or nobody answers for ``patience`` seconds.
    """
    after, answered, told = 0.0, time.monotonic(), False
    while True:
        try:
            with connect() as control:
                status = control.status(run)
                if status is None:
                    raise ConsiliumError(
                        f"the server knows no run {run}",
                        "a run started before its database was removed can be resumed",
                    )
                answered, told = time.monotonic(), False
                for text, latest in control.log(run, after):
                    lines.add(text)
                    after, answered = max(after, latest), time.monotonic()
                status = control.status(run)
                if status is not None and status.ended:
                    lines.end()
                    return status
        except (httpx.HTTPError, ConfigError) as error:
            if time.monotonic() - answered > patience:
                raise ConsiliumError(
                    f"the server has not answered for {patience:.0f} s",
                    "see whether it runs; the run may go on, or be resumed",
                ) from error
            if not told:
                print("(the server does not answer; waiting for it …)", flush=True)
                told = True
        time.sleep(AGAIN)
