"""A whole run in this process, with the profile of its last round: a JSON object on stdout.

Started by :mod:`benchmarks.round.places`, with the probe in place: ``python -m
benchmarks.round.child '{"values": {…}, "hospitals": 10, "profile": true}'``.
"""

from __future__ import annotations

import contextlib
import cProfile
import io
import json
import pstats
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from benchmarks.machine import peak_rss

ROOT = Path(__file__).resolve().parents[2]
OURS = ("common", "client_app", "server_app")
TOP = 10
_COMPUTING = (
    "common/training.py", "common/evaluation.py", "common/networks.py",
    "common/privacy/clipped_sum.py",
    "common/privacy/engine.py", "common/privacy/batches.py", "common/privacy/clipping.py",
    "common/privacy/bookkeeping/",
)  # fmt: skip
_WAITED = (
    "<built-in method time.sleep>",
    "<method 'acquire' of '_thread.lock' objects>",
)

Key = tuple[str, int, str]
Stats = Mapping[Key, tuple[int, int, float, float, Any]]
"""As :class:`pstats.Stats` has it: (file, line, name) → (calls …, own, cumulative seconds, …)."""


class RoundProfile:
    """cProfile of one round: the server's thread and the hospitals' thread together."""

    def __init__(self, number: int) -> None:
        self.number = number
        self._on = False
        self._server = cProfile.Profile()
        self._found: list[cProfile.Profile] = []
        self._began = 0.0
        self.cpu: list[float] = []
        """CPU seconds of this process in each round."""

    def install(self) -> None:
        """Wrap what begins and ends a round, and what handles a message."""
        from deploy.inprocess import InProcessGrid
        from server_app.progress import Progress

        starts, ends, handle = Progress.round_starts, Progress.round_ends, InProcessGrid._handle

        def round_starts(progress: Progress, number: int) -> None:
            starts(progress, number)
            self._began = time.process_time()
            if number == self.number:
                self._on = True
                self._server.enable()

        def round_ends(progress: Progress, record: Mapping[str, Any]) -> None:
            self.cpu.append(round(time.process_time() - self._began, 3))
            if self._on:
                self._server.disable()
                self._on = False
                self._found.append(self._server)
            ends(progress, record)

        def handled(*args: Any) -> Any:
            if not self._on:
                return handle(*args)
            profile = cProfile.Profile()
            try:
                return profile.runcall(handle, *args)
            finally:
                self._found.append(profile)

        _replace(Progress, round_starts=round_starts, round_ends=round_ends)
        _replace(InProcessGrid, _handle=handled)

    def stats(self) -> Stats:
        """Everything together; empty where the round never came."""
        if not self._found:
            return {}
        first, *others = self._found
        whole = pstats.Stats(first, stream=io.StringIO())
        for other in others:
            whole.add(other)
        return whole.stats  # type: ignore[attr-defined,no-any-return]


def _replace(owner: type, **functions: Callable[..., Any]) -> None:
    for name, function in functions.items():
        setattr(owner, name, function)


def top(stats: Stats, *, count: int = TOP) -> dict[str, list[dict[str, Any]]]:
    """The ``count`` costliest: of our functions by cumulative time, of all by their own time.

    Of ours those are left out that train, validate or wait, or call what does: the rest is what
    a round costs besides. Of all the waiting is left out.
    """
    busy = callers_of(stats, lambda key: key[2] in _WAITED or _is_training(key))
    ours: list[dict[str, Any]] = []
    own: list[dict[str, Any]] = []
    for key, (_, calls, own_s, cumulative, _callers) in stats.items():
        file, line, name = key
        place = _place(file)
        entry = {
            "function": f"{place}:{name}" if place else name,
            "calls": calls,
            "own_s": round(own_s, 4),
            "cumulative_s": round(cumulative, 4),
        }
        if place.split("/")[0] in OURS and not place.startswith(_COMPUTING) and key not in busy:
            ours.append(entry | {"line": line})
        if name not in _WAITED:
            own.append(entry)
    return {
        "ours_cumulative": sorted(ours, key=lambda e: -e["cumulative_s"])[:count],
        "own_time": sorted(own, key=lambda e: -e["own_s"])[:count],
    }


def callers_of(stats: Stats, wanted: Callable[[Key], bool]) -> set[Key]:
    """The functions for which ``wanted`` holds, and all that call them, however far up."""
    found = {key for key in stats if wanted(key)}
    waiting = list(found)
    while waiting:
        for caller in stats[waiting.pop()][4]:
            if caller not in found and caller in stats:
                found.add(caller)
                waiting.append(caller)
    return found


def _is_training(key: Key) -> bool:
    return _place(key[0]).startswith(_COMPUTING) and key[2] in ("train", "evaluate", "clipped_sum")


def _place(file: str) -> str:
    """A source file's name from the repository, or from where packages are installed."""
    path = Path(file)
    if path.is_relative_to(ROOT) and "site-packages" not in path.parts:
        return path.relative_to(ROOT).as_posix()
    parts = path.parts
    return "/".join(parts[-2:]) if len(parts) > 1 else ""


def main(argument: str) -> None:
    """Run it; what it prints itself goes to stderr."""
    asked = json.loads(argument)
    profile = RoundProfile(asked["values"]["rounds"] if asked["profile"] else 0)
    with contextlib.redirect_stdout(sys.stderr):
        from deploy.inprocess import run_in_process

        profile.install()
        run_in_process(asked["values"], num_hospitals=asked["hospitals"])
    told = {"peak_mb": round(peak_rss(), 1), "cpu_s_all": profile.cpu}
    print(json.dumps(told | ({"profile": top(profile.stats())} if asked["profile"] else {})))


if __name__ == "__main__":
    main(sys.argv[1])
