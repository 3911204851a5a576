"""Which hospitals are there: node id → name, asked once for each node that appears.

With a roster a name is proved, and never claimed: each node is sent a challenge of its own, and its
greeting is signed by the hospital's identity key over that challenge, the run, the node and the
name (:class:`~common.messages.Greeting`). Whoever greets first takes nobody's place, an old
greeting holds for no new challenge, and one that another hospital was made to sign holds for that
one's node alone. Where the server's registrar says which node is which hospital
(:func:`registered`), a name must be that one, too.

Without a roster nothing is proved, and a name belongs to a node as long as no other claims it: of
two that do, neither is a hospital until one of them is gone, and both are reported.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
from flwr.app import RecordDict
from flwr.serverapp import Grid

from common.errors import ConsiliumError, ProtocolError, RoundError
from common.files import read_json
from common.messages import WIRE, Challenge, Greeting, WireMismatch
from server_app.exchange import Absence, ask

LONGEST_PAUSE = 15.0
"""Most seconds between two looks for hospitals that are waited for."""

NODES = "CONSILIUM_NODES"
"""Environment variable: the file in which the server's registrar notes which node each is."""


class Directory:
    """The hospitals that have told, and where there is a roster proved, their name."""

    def __init__(
        self,
        grid: Grid,
        *,
        timeout: float = 600.0,
        members: Sequence[str] = (),
        roster: Mapping[str, bytes] | None = None,
        nodes: Callable[[], Mapping[int, str]] | None = None,
    ) -> None:
        """``members``: hospitals that are missed by name though they were never there.

        ``roster``: identity keys (Ed25519, 32 bytes) by name; None: names are believed. ``nodes``:
        node id → hospital as the registrar has it now (default: :func:`registered`).
        """
        self._grid = grid
        self._timeout = timeout
        self._roster = roster
        self._nodes = nodes or registered
        self._names: dict[int, str] = {}  # of the nodes that are connected
        self._known: set[str] = set(members)
        self.left_out: list[Absence] = []
        """The nodes that gave no name of theirs at the latest look, and why."""

    def refresh(self) -> list[Absence]:
        """Greet nodes that are new; returns those that gave no usable name (:attr:`left_out`).

        A hospital that returns with another node id takes its place again, once its former node
        is gone; hospitals that are gone stay known, so that they are missed by name.
        """
        nodes = sorted(self._grid.get_node_ids())
        self._names = {n: self._names[n] for n in nodes if n in self._names}
        new = {f"node {n}": (n, Challenge.new()) for n in nodes if n not in self._names}
        asked = {label: (n, challenge.to_record()) for label, (n, challenge) in new.items()}
        answers = ask(
            self._grid, asked, message_type="query.greet", stage="greet", timeout=self._timeout
        )
        absent = answers.absent
        known = self._nodes() if new else {}
        claims: dict[str, list[int]] = {}
        for label, record in sorted(answers.by_hospital.items()):
            try:
                name = self._name_of(*new[label], record, known)
            except ConsiliumError as error:
                absent.append(Absence(label, "greet", f"{error.what}: {error.remedy}"))
                continue
            claims.setdefault(name, []).append(new[label][0])
        for name, claimants in sorted(claims.items()):
            absent += self._settled(name, claimants)
        self._known |= set(self._names.values())
        self.left_out = absent
        return absent

    def _settled(self, name: str, claimants: list[int]) -> list[Absence]:
        """Give ``name`` to its only claimant; else those who do not get it, with the reason."""
        there = [node for node, taken in self._names.items() if taken == name]
        if len(claimants) == 1 and not there:
            self._names[claimants[0]] = name
            return []
        everybody = ", ".join(str(node) for node in sorted([*there, *claimants]))
        if self._roster is None:
            for node in there:  # it may as well be the other one that is wrong
                del self._names[node]
            claimants = sorted([*there, *claimants])
            reason = f"nodes {everybody} claim the name '{name}', and none of them is believed"
            return [Absence(f"node {n}", "greet", f"{reason}: end all but one") for n in claimants]
        reason = f"{name}'s identity key is in use at nodes {everybody}: end all but one of them"
        return [Absence(f"node {n}", "greet", reason) for n in claimants]

    def _name_of(
        self, node: int, challenge: Challenge, record: RecordDict, known: Mapping[int, str]
    ) -> str:
        """The name that a greeting tells, if it may; ProtocolError otherwise, in two parts."""
        greeting = Greeting.from_record(record)
        name, roster = greeting.hospital, self._roster
        proved = roster is not None and name in roster and greeting.proves(
            roster[name], challenge, run=self._grid.run.run_id, node=node
        )  # fmt: skip
        if not greeting.oldest <= WIRE.major <= greeting.wire.major:
            sure = proved or known.get(node) == name
            who = name if sure else f"node {node}, which says that it is {name},"
            raise WireMismatch.between(who, greeting.wire, "this server")
        if known.get(node, name) != name:
            raise ProtocolError(
                f"it greets as '{name}', and this node is {known[node]}'s",
                f"find out why {known[node]} takes another hospital's name",
            )
        if any(other == name and number != node for number, other in known.items()):
            raise ProtocolError(
                f"it greets as '{name}', which the registrar knows at another node",
                "find out whose node it is",
            )
        if roster is None or proved:
            return name
        if name not in roster:
            raise ProtocolError(
                f"it greets as '{name}', who is not on the roster, or not today",
                "admit that hospital, and start the run again",
            )
        if not greeting.proof:
            raise ProtocolError(
                f"it greets as '{name}' without that hospital's signature",
                "let its node have its identity key; if it has, somebody takes the name",
            )
        raise ProtocolError(
            f"its greeting as '{name}' is not signed with that hospital's key for this question",
            "somebody takes the name or repeats an old greeting; or the hospital has new keys, and "
            "must be admitted with them",
        )

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


def registered() -> Mapping[int, str]:
    """Node id → hospital as the server's registrar notes it; empty where there is none, or not yet.

    The file (``nodes.json``) is made anew at any time: what cannot be read says nothing, and then
    the signature alone decides.
    """
    path = os.environ.get(NODES)
    if not path:
        return {}
    try:
        rows = read_json(Path(path))["nodes"]
        return {int(row["node-id"]): str(name) for name, row in rows.items()}
    except (ConsiliumError, KeyError, TypeError, ValueError, AttributeError):
        return {}
