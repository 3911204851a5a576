"""Which hospitals are there: node id → name, asked once for each node that appears."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence

import numpy as np
from flwr.app import RecordDict
from flwr.serverapp import Grid

from common.errors import ConsiliumError, RoundError
from common.messages import Greeting
from server_app.exchange import Absence, ask

LONGEST_PAUSE = 15.0
"""Most seconds between two looks for hospitals that are waited for."""


class Directory:
    """The hospitals that have told their name. A name belongs to the first node that claims it.

    Names are not yet authenticated here: in a real federation node keys and the roster do that.
    """

    def __init__(self, grid: Grid, *, timeout: float = 600.0, members: Sequence[str] = ()) -> None:
        """``members``: hospitals that are missed by name though they were never there."""
        self._grid = grid
        self._timeout = timeout
        self._names: dict[int, str] = {}  # of the nodes that are connected
        self._known: set[str] = set(members)

    def refresh(self) -> list[Absence]:
        """Greet nodes that are new; returns those that gave no usable name.

        A hospital that returns with another node id takes its place again, once its former node
        is gone; hospitals that are gone stay known, so that they are missed by name.
        """
        nodes = sorted(self._grid.get_node_ids())
        self._names = {n: self._names[n] for n in nodes if n in self._names}
        new = {f"node {n}": (n, RecordDict()) for n in nodes if n not in self._names}
        answers = ask(
            self._grid, new, message_type="query.greet", stage="greet", timeout=self._timeout
        )
        absent = answers.absent
        for label, record in sorted(answers.by_hospital.items()):
            try:
                name = Greeting.from_record(record).hospital
            except ConsiliumError as error:
                absent.append(Absence(label, "greet", error.what))
                continue
            if name in self._names.values():
                absent.append(Absence(label, "greet", f"claims the name '{name}', which is taken"))
            else:
                self._names[new[label][0]] = name
        self._known |= set(self._names.values())
        return absent

    def wait_for(
        self,
        hospitals: int,
        *,
        timeout: float,
        least: int | None = None,
        pause: float = 1.0,
        say: Callable[[str], None] = lambda line: None,
    ) -> int:
        """Refresh until ``hospitals`` are there, or ``least`` at the end; returns how many are.

        ``pause``: seconds between two looks, longer while nothing changes. ``say`` is told whom
        it is waited for whenever that changes. RoundError says how many were, and who was not.
        """
        least = hospitals if least is None else least
        deadline = time.monotonic() + timeout
        told: object = None
        while True:
            absent = self.refresh()
            if len(self._names) >= hospitals:
                return len(self._names)
            # Without a refusal's id, which is another one each time.
            reasons = {(a.hospital, a.reason.partition(" (id ")[0]) for a in absent}
            state = (set(self._names.values()), reasons)
            if state != told:
                wait, told = pause, state
                self._tell(hospitals, absent, say)
            if time.monotonic() >= deadline:
                if len(self._names) >= least:
                    return len(self._names)
                who = (
                    "; ".join(f"{a.hospital}: {a.reason}" for a in absent) or "no others connected"
                )
                raise RoundError(
                    f"{len(self._names)} hospitals are there, {least} are needed ({who})",
                    "start the missing hospitals' nodes and read their logs",
                )
            time.sleep(min(wait, max(0.0, deadline - time.monotonic())))
            wait = min(wait * 1.2, LONGEST_PAUSE)

    def _tell(self, hospitals: int, absent: Sequence[Absence], say: Callable[[str], None]) -> None:
        missing = sorted(self._known - set(self._names.values()))
        whom = f" ({', '.join(missing)} not yet)" if missing else ""
        say(f"{len(self._names)} of {hospitals} hospitals are there{whom}")
        for one in absent:
            say(f"! {one.hospital}: {one.reason}")

    @property
    def names(self) -> list[str]:
        """Every hospital that was ever there, or is a member; sorted."""
        return sorted(self._known)

    def reach(self, names: Sequence[str]) -> tuple[dict[str, int], list[str]]:
        """(name → node of those connected, in the order of the names; the others)."""
        nodes = {name: node for node, name in self._names.items()}
        there = {name: nodes[name] for name in sorted(names) if name in nodes}
        return there, sorted(set(names) - set(there))

    def sample(self, fraction: float, *, seed: Sequence[int]) -> list[str]:
        """``fraction`` of the known hospitals, at least one, drawn by ``seed``; sorted names.

        By names, not by node ids, so that equal seeds draw the same hospitals in every run.
        """
        names = self.names
        count = sample_size(fraction, len(names))
        if count == len(names):
            return names
        rng = np.random.default_rng(list(seed))  # who is asked is no secret
        return sorted(rng.choice(names, size=count, replace=False).tolist())


def sample_size(fraction: float, hospitals: int) -> int:
    """How many of ``hospitals`` are asked in a round: rounded up, at least one of any."""
    return max(1, math.ceil(fraction * hospitals - 1e-9)) if hospitals else 0
