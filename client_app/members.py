"""Whom of the roster a hospital's people have accepted: ``members.json`` in its folder.

The coordinator's signature says who belongs to the federation, and a newer kit is installed by
itself. That must not be enough to be in a sum with this hospital: whoever holds the coordinator's
key, or the machine it lies on, can admit hospitals that do not exist. So each hospital keeps a list
of its own, and :mod:`common.secagg.trust` holds every cohort against it.

What is accepted is a name with a key. A hospital that comes with another key is a new one, and so
is a key under another name. One that left the roster is accepted no more, even if it comes back.

```json
{"version": "consilium-members-1",
 "members": [{"name": "st-mary", "identity": base64 of 32 bytes,
              "state": "accepted" | "refused" | "gone", "time": "2026-03-01T12:00:00Z"}]}
```

A hospital of the roster that is not in the file waits. A folder without the file, as an earlier
version left it, has accepted nobody.
"""

from __future__ import annotations

import base64
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Literal

from common.errors import ConfigError, ConsiliumError
from common.federation_file import (
    TIME,
    EnrolmentError,
    check_time,
    decoded,
    read_limited,
    strict_json,
)
from common.files import write_json
from common.secagg import Roster, RosterEntry, wire

VERSION = "consilium-members-1"
_REMEDY = (
    "restore it from a backup; or move it away, and accept the members anew: "
    "consilium hospital members"
)

Decided = Literal["accepted", "refused", "gone"]
State = Literal["this hospital", "accepted", "waiting", "refused", "gone"]


@dataclass(frozen=True)
class Decision:
    """What became of one name with one key, and when (UTC, TIME)."""

    name: str
    identity: bytes
    state: Decided
    time: str


@dataclass(frozen=True)
class Standing:
    """One hospital as ``consilium hospital members`` shows it."""

    name: str
    identity: bytes
    state: State
    note: str = ""
    """Why a member that was known waits again; "" otherwise."""
    max_images: int | None = None


@dataclass(frozen=True)
class Members:
    """The decisions of a hospital's people; a name with a key stands once."""

    decisions: tuple[Decision, ...] = ()

    @classmethod
    def load(cls, path: Path) -> Members:
        """Read the file; nobody where there is none. EnrolmentError if it is not exactly this."""
        if not path.exists():
            return cls()
        document = strict_json(read_limited(path, _REMEDY), str(path), _REMEDY)
        try:
            if set(document) != {"version", "members"} or document["version"] != VERSION:
                raise ValueError(f"it is not of version {VERSION}")
            rows = document["members"]
            if not isinstance(rows, list):
                raise ValueError("it has no list of members")
            decisions = tuple(map(_decision, rows))
            if len({(d.name, d.identity) for d in decisions}) != len(decisions):
                raise ValueError("a member stands twice")
        except ValueError as error:
            raise EnrolmentError(f"{path} is malformed: {error}", _REMEDY) from None
        return cls(decisions)

    def save(self, path: Path) -> None:
        """Write the file (0600), atomically; one that says the same stays as it is."""
        rows = [
            {
                "name": d.name,
                "identity": base64.b64encode(d.identity).decode(),
                "state": d.state,
                "time": d.time,
            }
            for d in self.decisions
        ]
        if not path.exists() or Members.load(path) != self:
            write_json(path, {"version": VERSION, "members": rows}, mode=0o600)

    def decide(self, entries: Collection[RosterEntry], state: Decided, now: datetime) -> Members:
        """With ``entries`` accepted or refused; an earlier decision on any of them is replaced."""
        time = now.astimezone(UTC).strftime(TIME)
        before = {(d.name, d.identity): d for d in self.decisions}
        for entry in entries:
            key = (entry.name, entry.identity)
            if key not in before or before[key].state != state:
                before[key] = Decision(entry.name, entry.identity, state, time)
        return Members(tuple(sorted(before.values(), key=lambda d: (d.name, d.identity))))

    def follow(self, roster: Roster, now: datetime) -> Members:
        """With everybody ``gone`` who was accepted and is not on ``roster``, under name and key."""
        time = now.astimezone(UTC).strftime(TIME)
        there = {(entry.name, entry.identity) for entry in roster.entries}
        return Members(
            tuple(
                replace(d, state="gone", time=time)
                if d.state == "accepted" and (d.name, d.identity) not in there
                else d
                for d in self.decisions
            )
        )

    def accepted(self, identities: Mapping[str, bytes]) -> frozenset[bytes]:
        """The keys in ``identities`` (by name, of a roster) that were accepted under that name."""
        return frozenset(
            d.identity
            for d in self.decisions
            if d.state == "accepted" and identities.get(d.name) == d.identity
        )

    def standings(self, roster: Roster, own: bytes) -> list[Standing]:
        """Everybody on ``roster``, then who has gone; ``own``: this hospital's identity key."""
        return [self._standing(entry, own) for entry in roster.entries] + [
            Standing(d.name, d.identity, "gone")
            for d in self.follow(roster, datetime.now(UTC)).decisions
            if d.state == "gone" and d.identity not in {e.identity for e in roster.entries}
        ]

    def _standing(self, entry: RosterEntry, own: bytes) -> Standing:
        made = Standing(entry.name, entry.identity, "waiting", max_images=entry.max_images)
        if entry.identity == own:
            return replace(made, state="this hospital")
        for d in self.decisions:
            if (d.name, d.identity) == (entry.name, entry.identity):
                if d.state == "gone":
                    return replace(made, note="left the roster, and has come back")
                return replace(made, state=d.state)
        for d in self.decisions:
            if d.identity == entry.identity:
                return replace(made, note=f"its key was known as that of {d.name}")
            if d.name == entry.name and d.state != "refused":
                return replace(made, note="its key has changed")
        return made


def waiting(standings: Collection[Standing]) -> list[Standing]:
    """Those who wait to be accepted or refused."""
    return [one for one in standings if one.state == "waiting"]


def _decision(row: object) -> Decision:
    fields = {"name", "identity", "state", "time"}
    if not isinstance(row, dict) or set(row) != fields:
        raise ValueError(f"a member does not have exactly the fields {', '.join(sorted(fields))}")
    if row["state"] not in ("accepted", "refused", "gone"):
        raise ValueError("a member's state is none that there is")
    try:
        name = wire.as_name(row["name"])  # as the roster's names are checked
    except ConsiliumError as error:
        raise ValueError(error.what) from None
    return Decision(name, decoded(row["identity"], 32), row["state"], check_time(row["time"]))


def check_known(standings: Collection[Standing], name: str) -> Standing:
    """The hospital ``name`` of the roster; ConfigError if there is none to decide on."""
    for one in standings:
        if one.name == name and one.state != "gone":
            if one.state == "this hospital":
                raise ConfigError(f"{name} is this hospital itself", "name another member")
            return one
    there = ", ".join(one.name for one in standings if one.state not in ("gone", "this hospital"))
    raise ConfigError(
        f"the roster has no hospital {name!r}", f"the others on it are: {there or 'nobody yet'}"
    )
