"""Where a run takes place: one process, Flower's simulation, or a server's and hospitals' own.

Each starts the product's own commands in processes that the probe is loaded into, in a home of
their own, and returns what was noted.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from benchmarks import deployment
from benchmarks.round import probe
from benchmarks.round.figures import Span, read_spans
from deploy.runtime.ports import free_port

ROOT = Path(__file__).resolve().parents[2]


class NotRun(Exception):
    """A run that ended with an error; its last lines."""


@contextmanager
def probed() -> Iterator[tuple[Path, dict[str, str]]]:
    """A folder for the run, and the environment in which processes load the probe."""
    folder = Path(tempfile.mkdtemp(prefix="consilium-"))
    site = folder / "site"
    site.mkdir()
    shutil.copyfile(str(probe.__file__), site / "sitecustomize.py")
    paths = [str(site), str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    try:
        yield (
            folder,
            {
                **os.environ,
                "CONSILIUM_HOME": str(folder / "home"),
                "PYTHONPATH": os.pathsep.join(paths),
                "OMP_NUM_THREADS": "1",
                probe.VARIABLE: str(folder / "spans.jsonl"),
            },
        )
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def in_process(
    values: Mapping[str, Any], hospitals: int, *, profile: bool, limit: float
) -> tuple[list[Span], dict[str, Any]]:
    """ServerApp and ClientApps in one process, one message at a time; its profile and memory."""
    asked = json.dumps({"values": dict(values), "hospitals": hospitals, "profile": profile})
    with probed() as (folder, environment):
        command = [sys.executable, "-m", "benchmarks.round.child", asked]
        told = _done(command, environment, limit)
        return read_spans(folder / "spans.jsonl"), json.loads(told.splitlines()[-1])


def simulation(
    values: Mapping[str, Any], hospitals: int, *, limit: float
) -> tuple[list[Span], dict[str, Any]]:
    """``consilium simulate``: Flower with Ray, as many hospitals at a time as there are cores."""
    with probed() as (folder, environment):
        command = [sys.executable, "-m", "deploy.cli", "simulate", "--hospitals", str(hospitals)]
        _done(command + _settings(values), environment, limit)
        return read_spans(folder / "spans.jsonl"), {}


def processes(
    values: Mapping[str, Any], hospitals: int, *, limit: float
) -> tuple[list[Span], dict[str, Any]]:
    """A server and hospitals as ``consilium federation serve`` and ``hospital start`` start them.

    The pictures are the demonstration's own: of ``values`` their number is taken, and what says
    where simulated hospitals get theirs is left out.
    """
    with probed() as (folder, environment):
        root, port = folder / "federation", free_port()
        arguments = ["federation", "demo", str(root), "--hospitals", str(hospitals)]
        arguments += ["--address", f"localhost:{port}"]
        if "data-path" in values:
            arguments += ["--data", str(values["data-path"])]
        else:
            arguments += ["--images", str(values["synthetic-size"])]
        _done([sys.executable, "-m", "deploy.cli", *arguments], environment, limit)
        own = {k: v for k, v in values.items() if k not in _OF_SIMULATION}
        settings = {k: str(v).lower() if isinstance(v, bool) else str(v) for k, v in own.items()}
        before = dict(os.environ)
        os.environ.update(environment)
        try:
            deployment.SETTINGS.update(settings)
            deployment.run_ours(root, port, int(values["rounds"]))
        except RuntimeError as error:
            raise NotRun(str(error)) from error
        finally:
            os.environ.clear()
            os.environ.update(before)
        return read_spans(folder / "spans.jsonl"), {}


_OF_SIMULATION = {"dataset", "data-path", "synthetic-size", "partition", "rounds"}


def _settings(values: Mapping[str, Any]) -> list[str]:
    told = []
    for name, value in values.items():
        told += ["--set", f"{name}={str(value).lower() if isinstance(value, bool) else value}"]
    return told


def _done(command: list[str], environment: Mapping[str, str], limit: float) -> str:
    """What the command printed; NotRun if it failed or took longer than ``limit`` seconds."""
    try:
        done = subprocess.run(
            command, env=dict(environment), cwd=ROOT, text=True, capture_output=True,
            timeout=limit, check=False,
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        raise NotRun(f"took over {limit:g} s") from None
    if done.returncode:
        raise NotRun((done.stderr or done.stdout)[-600:])
    return done.stdout
