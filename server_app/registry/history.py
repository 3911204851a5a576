"""What the registry's rows say, as pure functions of them: the line of bases and their recipes.

The line of bases is a function of the log: which vectors had arrived by each publication, less
those that are withdrawn or excluded today. So a withdrawal or an exclusion changes the recipes
of every publication since, just as if that vector had never come, and an inclusion changes them
back; no operation's effect depends on when it was done.

At a publication, of the vectors of one hospital for one base the newest counts (by what it
signed); if that one is excluded, none does. A vector is in one recipe at most, and a hospital is
in the recipes once for each base.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from functools import cached_property

from common.vectors import Place, newest

ACTIVE, RETIRED, REPLACED, TAKEN_BACK = "active", "retired", "replaced", "taken back"
ACCEPTED, SUPERSEDED, EXCLUDED, WITHDRAWN = "accepted", "superseded", "excluded", "withdrawn"


@dataclass(frozen=True)
class BaseRow:
    """A base, as it was at some time.

    ``state``: ``active`` (in the line, vectors for it are accepted), ``retired`` (in the line,
    but they are not), ``replaced`` (after a withdrawal or the like another base has taken its
    version; vectors for it count as for that one), ``taken back``. Files are kept of the first
    two.
    """

    version: int
    id: str
    parent: str | None
    model: str
    """Digest (hex) of the model's specification."""
    pretrained: bool
    state: str
    made: str


@dataclass(frozen=True)
class PublicationRow:
    """How a version came about.

    ``upto``: the last arrival before it. ``recipe``: JSON list of serials; ``rule``, ``gate``:
    JSON of :meth:`Rule.to_dict` and :meth:`GateResult.to_dict`. ``taken_back``: when, or empty.
    """

    version: int
    upto: int
    rule: str
    recipe: str
    gate: str
    published: str
    taken_back: str

    def serials(self) -> list[str]:
        """The recipe as it was stored last."""
        return list(json.loads(self.recipe))


@dataclass(frozen=True)
class VectorRow:
    """A vector; of a withdrawn one the figures are gone (0, None or empty).

    ``state`` in the table: ``accepted``, ``excluded`` or ``withdrawn``; :meth:`Log.state_of`
    tells ``superseded`` apart. ``digest``: SHA-256 (hex) of the envelope. ``metrics``: JSON.
    """

    seq: int
    serial: str
    hospital: str
    base: str
    bucket: int
    epsilon: float | None
    delta: float | None
    metrics: str
    norm: float
    digest: str
    created: str
    arrived: str
    state: str
    reason: str


@dataclass(frozen=True)
class Ingredient:
    """A vector in a recipe, and how many bases lay between its own and the recipe's."""

    row: VectorRow
    staleness: int


@dataclass(frozen=True)
class Log:
    """All rows at one moment."""

    bases: Sequence[BaseRow]
    publications: Sequence[PublicationRow]
    vectors: Sequence[VectorRow]

    @cached_property
    def line(self) -> list[BaseRow]:
        """The bases that lead to the current one, oldest first."""
        found = [b for b in self.bases if b.state in (ACTIVE, RETIRED)]
        return sorted(found, key=lambda base: base.version)

    @cached_property
    def points(self) -> list[PublicationRow]:
        """The publications that stand, oldest first: of each base of the line but the first."""
        found = [p for p in self.publications if not p.taken_back]
        return sorted(found, key=lambda point: point.version)

    @property
    def last(self) -> int:
        """The number of the last arrival; 0 before the first."""
        return max((v.seq for v in self.vectors), default=0)

    @cached_property
    def _versions(self) -> dict[str, list[int]]:
        found: dict[str, list[int]] = {}
        for row in self.bases:
            if row.state != TAKEN_BACK:
                found.setdefault(row.id, []).append(row.version)
        return found

    def version_of(self, base: str, before: int | None = None) -> int | None:
        """The version that has, or had, the id ``base``; None if it is not of the line.

        Equal models have equal ids, so there may be several: the latest, below ``before``.
        """
        known = [v for v in self._versions.get(base, ()) if before is None or v < before]
        return max(known, default=None)

    def staleness(self, base: str, before: int | None = None) -> int | None:
        """How many bases were published after ``base`` (and below version ``before``)."""
        version = self.version_of(base, before)
        if version is None:
            return None
        later = [b for b in self.line if b.version > version]
        return sum(before is None or b.version < before for b in later)

    def late_at_arrival(self, row: VectorRow) -> int:
        """How many bases had been published after its own when ``row`` came; 0 if that is none.

        A publication for which it came a moment too late counts as one before it.
        """
        version = self.version_of(row.base)
        if version is None:
            return 0
        return sum(point.version > version and point.upto < row.seq for point in self.points)

    @cached_property
    def recipes(self) -> dict[int, list[Ingredient]]:
        """What each publication of the line is made of, by version."""
        return self.recipes_without(frozenset())

    def recipes_without(self, skip: Collection[str]) -> dict[int, list[Ingredient]]:
        """:attr:`recipes`, had the vectors with the serials ``skip`` never come."""
        used: set[str] = set()
        found = {}
        for point in self.points:
            found[point.version] = self._recipe(point.version, point.upto, used, skip)
            used |= {i.row.serial for i in found[point.version]}
        return found

    def pending(self, upto: int | None = None, skip: Collection[str] = ()) -> list[Ingredient]:
        """What a publication would be made of now, or of the first ``upto`` arrivals."""
        recipes = self.recipes_without(skip) if skip else self.recipes
        used = {i.row.serial for recipe in recipes.values() for i in recipe}
        return self._recipe(None, self.last if upto is None else upto, used, skip)

    def _recipe(
        self, version: int | None, upto: int, used: Collection[str], skip: Collection[str]
    ) -> list[Ingredient]:
        """By serial. ``version``: of the base to be made; None: the one after the current."""
        rows = [v for v in self.vectors if v.seq <= upto and v.serial not in skip]
        found = []
        for members in self._groups(rows, version).values():
            if any(row.serial in used for row in members):
                continue
            chosen = _newest(members)
            staleness = self.staleness(chosen.base, version)
            if chosen.state == ACCEPTED and staleness is not None:
                found.append(Ingredient(chosen, staleness))
        return sorted(found, key=lambda i: i.row.serial)

    def _groups(
        self, rows: Sequence[VectorRow], before: int | None = None
    ) -> dict[tuple[str, int], list[VectorRow]]:
        """The vectors of the line that are not withdrawn, by hospital and version of their base."""
        found: dict[tuple[str, int], list[VectorRow]] = {}
        for row in rows:
            version = self.version_of(row.base, before)
            if row.state != WITHDRAWN and version is not None:
                found.setdefault((row.hospital, version), []).append(row)
        return found

    def siblings(self, hospital: str, base: str) -> list[VectorRow]:
        """The vectors of ``hospital`` for the version of ``base`` that are not withdrawn."""
        version = self.version_of(base)
        return [] if version is None else self._groups(self.vectors).get((hospital, version), [])

    @cached_property
    def published_in(self) -> dict[str, int]:
        """Serial → the version in whose recipe it is."""
        return {i.row.serial: v for v, recipe in self.recipes.items() for i in recipe}

    @cached_property
    def states(self) -> dict[str, str]:
        """Serial → accepted, superseded, excluded or withdrawn."""
        found = {row.serial: row.state for row in self.vectors}
        for members in self._groups(self.vectors).values():
            used = [row.serial for row in members if row.serial in self.published_in]
            standing = used or [_newest(members).serial]
            for row in members:
                if row.state == ACCEPTED and row.serial not in standing:
                    found[row.serial] = SUPERSEDED
        return found

    def counting(self) -> list[VectorRow]:
        """The vectors that are in the current model, or would be in the next."""
        pending = {i.row.serial for i in self.pending()}
        return [v for v in self.vectors if v.serial in pending or v.serial in self.published_in]


def _newest(members: Sequence[VectorRow]) -> VectorRow:
    serial = newest(Place(row.serial, row.created) for row in members)
    return next(row for row in members if row.serial == serial)
