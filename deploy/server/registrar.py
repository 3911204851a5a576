"""Keeps the nodes that the SuperLink lets in equal to the hospitals that are members.

A hospital that is admitted while the server runs is registered within seconds, under its name; one
that is revoked is unregistered, and Flower cuts it off at its next call.

**Unregistering cannot be undone**: Flower never takes the key again. So it is done only on the
coordinator's signed word: the roster, valid under its key, says exactly what the records of
``hospitals/`` say, and the node's key is not among them. A folder that is empty by a mishap, or
half restored, unregisters nobody. A hospital whose admission has *expired* stays registered, too:
its admission can be extended, and until then the roster keeps it out of every run.

What Flower says is what counts; ``nodes.json`` is made from it, for people and other commands:
``{"version": 1, "nodes": {hospital: {"node-id": text, "key": OpenSSH line}}}``. So it may be lost,
the database may be new, and the SuperLink may restart at any time.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

import httpx

from common.errors import ConsiliumError
from common.federation_file import read_limited
from common.files import read_json, write_json
from common.secagg import Roster
from deploy.provision.federation import FederationFolder
from deploy.provision.files import locked
from deploy.provision.members import Member, members
from deploy.server.control import Control, Node
from deploy.server.layout import ServerFolder
from deploy.server.stamp import stamp

PERIOD = 0.5
"""Seconds between two looks at the folder."""
AGAIN = 30.0
"""Seconds after which Flower's own list is looked at without a change: it may be a new database."""


@dataclass(frozen=True)
class Changes:
    """What there is to do, and what a person should see to."""

    register: tuple[Member, ...]
    unregister: tuple[Node, ...]
    warnings: tuple[str, ...]


def plan(current: list[Member], nodes: list[Node], *, signed: bool) -> Changes:
    """From members and Flower's nodes; ``signed``: whether the roster says the same as ``current``.

    Repeated after what it says was done, it says nothing more.
    """
    by_key = {node.key: node for node in nodes if node.key}
    register = tuple(m for m in current if m.request.node not in by_key)
    warnings = [
        f"{m.name} cannot connect: its node's key was unregistered before, and Flower takes no "
        "such key again. Revoke it, and have it make new keys (consilium hospital init)"
        for m in current
        if (node := by_key.get(m.request.node)) is not None and node.gone
    ]
    wanted = {m.request.node for m in current}
    strangers = tuple(node for node in nodes if not node.gone and node.key not in wanted)
    if strangers and not signed:
        warnings.append(
            f"{len(strangers)} registered nodes are no members', but roster.json is not what "
            "hospitals/ says, so they stay: consilium federation refresh"
        )
        strangers = ()
    return Changes(register, strangers, tuple(warnings))


class Registrar(threading.Thread):
    """The thread that does it, until :meth:`stop`."""

    def __init__(
        self,
        federation: FederationFolder,
        server: ServerFolder,
        connect: Callable[[], Control],
        say: Callable[[str], None],
    ) -> None:
        """``connect``: the control API. ``say``: one line for each change."""
        super().__init__(name="registrar", daemon=True)
        self._federation, self._server = federation, server
        self._connect, self._say = connect, say
        self._over = threading.Event()
        self._told: set[str] = set()
        self._names = _known(server)  # of those who left, too
        self._written: dict[str, dict[str, str]] | None = None
        self.first = threading.Event()
        """Set once all members are registered."""

    def stop(self) -> None:
        """End soon."""
        self._over.set()

    def run(self) -> None:
        """Look at the folder, and do what there is to do."""
        done: object = None
        last = 0.0
        while not self._over.is_set():
            now = stamp(self._federation)
            due = now != done or time.monotonic() - last > AGAIN
            if due and self._attempt():
                done, last = now, time.monotonic()
            self._over.wait(PERIOD)

    def _attempt(self) -> bool:
        try:
            self.synchronise()
        except httpx.HTTPStatusError as error:
            self._once(f"! the SuperLink refuses ({error.response.status_code}); tried again")
            return False
        except httpx.HTTPError:
            return False  # the SuperLink starts, or starts again
        except ConsiliumError as error:
            self._once(f"! hospitals are neither admitted nor revoked now: {error.what}. "
                       f"{error.remedy}")  # fmt: skip
            return False
        except Exception as error:  # the thread must not end
            self._once(f"! the registrar failed ({type(error).__name__}: {error})")
            return False
        self.first.set()
        return True

    def synchronise(self) -> None:
        """Once: make the nodes equal to the members. ``httpx.HTTPError`` while nobody answers."""
        with locked(self._federation.root):  # not in the middle of a command
            current = members(self._federation)
            signed = self._signed(current)
        with self._connect() as control:
            nodes = control.nodes()
            changes = plan(current, nodes, signed=signed)
            for member in changes.register:
                node = control.register(member.name, member.request.node)
                if node is not None:
                    self._say(f"{member.name} may connect (node {node})")
            for stranger in changes.unregister:
                control.unregister(stranger.id)
                name = self._names.get(str(stranger.id), "a node that is no member's")
                self._say(f"{name} may connect no more (node {stranger.id})")
            if changes.register or changes.unregister:
                nodes = control.nodes()
        for warning in changes.warnings:
            self._once(f"! {warning}")
        self._write(current, nodes)

    def _signed(self, current: list[Member]) -> bool:
        try:
            roster = Roster.load(
                read_limited(self._federation.roster), self._federation.public_key()
            )
        except ConsiliumError:
            return False
        entries = tuple(member.entry() for member in current)
        return (roster.federation, roster.entries) == (self._federation.load().name, entries)

    def _write(self, current: list[Member], nodes: list[Node]) -> None:
        by_key = {node.key: node for node in nodes if not node.gone}
        known = {m.name: by_key[m.request.node] for m in current if m.request.node in by_key}
        self._names |= {str(node.id): name for name, node in known.items()}
        rows = {name: {"node-id": str(node.id), "key": node.key} for name, node in known.items()}
        if rows != self._written or not self._server.nodes.exists():
            write_json(self._server.nodes, {"version": 1, "nodes": rows})
            self._written = rows

    def _once(self, line: str) -> None:
        if line not in self._told:
            self._told.add(line)
            self._say(line)


def _known(server: ServerFolder) -> dict[str, str]:
    """Node id → hospital as they were, if that can be read."""
    try:
        rows = read_json(server.nodes)["nodes"]
        return {row["node-id"]: name for name, row in rows.items()}
    except (ConsiliumError, KeyError, TypeError, AttributeError):
        return {}
