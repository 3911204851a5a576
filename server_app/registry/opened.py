"""An open registry: what every operation on it is made of. Used by the modules beside it."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Self

from common.vectors import Base, Contribution, Limits, Rule, VectorError, candidate
from common.vectors.tensors import Arrays
from common.vectors.vector import now
from server_app.registry.history import REPLACED, BaseRow, Ingredient, Log
from server_app.registry.store import Store


class OpenRegistry:
    """The folder, its rows and its files, for :class:`~server_app.registry.registry.Registry`."""

    def __init__(self, folder: Path, limits: Limits | None = None, *, create: bool = True) -> None:
        """Open, or make; removes what a kill has left. VectorError (``registry-…``)."""
        self.folder = folder
        self.limits = limits or Limits()
        self._store = Store(folder, create=create)
        self._kept: Base | None = None
        self._shapes: Mapping[str, tuple[int, ...]] | None = None

    @classmethod
    def open(cls, folder: Path, limits: Limits | None = None, *, create: bool = True) -> Self:
        """The same as the constructor."""
        return cls(folder, limits, create=create)

    def close(self) -> None:
        """Close the files."""
        self._store.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # Reading

    def log(self) -> Log:
        """All rows, of one moment: bases, publications, vectors, and what follows from them."""
        with self._store.snapshot():
            return self._store.log()

    # Inside a transaction

    def _bring_in_line(self) -> None:
        """Make anew the bases from the first one on whose recipe is not what it was."""
        log = self._store.log()
        changed = [p for p in log.points if p.serials() != serials(log.recipes[p.version])]
        if not changed:
            return
        first = changed[0].version
        rows = {row.version: row for row in log.line}
        parent = self._store.load_base(rows[max(v for v in rows if v < first)])
        for made in self._replay(log, log.recipes, parent):
            if made.version < first:
                continue
            was = rows[made.version]
            self._store.execute(
                "UPDATE bases SET state=? WHERE version=?", [REPLACED, made.version]
            )
            self._keep(made, was.state)
            recipe = json.dumps(serials(log.recipes[made.version]))
            self._store.execute(
                "UPDATE publications SET recipe=? WHERE version=?", [recipe, made.version]
            )

    def _replay(
        self, log: Log, recipes: Mapping[int, Sequence[Ingredient]], start: Base | None = None
    ) -> Iterator[Base]:
        """``start`` (the first base) and the bases after it, made by ``recipes``, one by one."""
        made = start or self._store.load_base(log.line[0])
        yield made
        for point in log.points:
            if point.version > made.version:
                given = self._contributions(recipes[point.version])
                rule = Rule.from_dict(json.loads(point.rule))
                made = after(made, point.version, candidate(made.weights, given, rule))
                yield made

    def _contributions(self, ingredients: Sequence[Ingredient]) -> list[Contribution]:
        return [
            Contribution(
                i.row.serial,
                i.row.hospital,
                self._store.load_values(i.row),
                float(i.row.bucket),
                i.staleness,
            )
            for i in ingredients
        ]

    def _keep(self, base: Base, state: str) -> None:
        """The base's file, then its row."""
        self._store.write_base(base)
        self._store.insert(
            "bases",
            version=base.version,
            id=base.id,
            parent=base.parent,
            model=base.model_digest.hex(),
            pretrained=int(base.pretrained),
            state=state,
            made=now(),
        )

    def _load(self, row: BaseRow) -> Base:
        """The base, kept in memory until another one is asked for."""
        kept, asked = self._kept, (row.id, row.version, row.parent)
        if kept is None or (kept.id, kept.version, kept.parent) != asked:
            kept = self._kept = self._store.load_base(row)
        return kept


def after(parent: Base, version: int, weights: Arrays) -> Base:
    """The base of ``version`` that was made from ``parent``."""
    return replace(parent, version=version, parent=parent.id, weights=weights)


def tip(log: Log) -> BaseRow:
    """The current base's row; VectorError (``registry-empty``) if there is none."""
    if not log.line:
        raise VectorError(
            "registry-empty",
            "the registry has no base",
            "add a pre-trained base, or a fedavg run's model",
        )
    return log.line[-1]


def serials(ingredients: Sequence[Ingredient]) -> list[str]:
    """A recipe as it is stored."""
    return [i.row.serial for i in ingredients]
