"""The line of bases: what is published, taken back, made anew; and what would come next.

Each operation is one transaction: it has happened whole or not at all, and repeating it after a
kill changes nothing more. What is merged is a function of the rows
(:mod:`server_app.registry.history`).
"""

from __future__ import annotations

import json
from collections import deque
from dataclasses import dataclass, replace

from common.vectors import (
    Base,
    Contribution,
    Gate,
    GateResult,
    Rule,
    VectorError,
    candidate,
    merge_refusal,
    no_gate,
)
from common.vectors.tensors import Arrays
from common.vectors.vector import now
from server_app.registry.history import (
    ACTIVE,
    RETIRED,
    TAKEN_BACK,
    Ingredient,
    Log,
)
from server_app.registry.opened import OpenRegistry, after, serials, tip
from server_app.registry.store import damaged


@dataclass(frozen=True)
class Proposal:
    """The candidate for the next base: the current one, what goes into it, and the weights."""

    base: Base
    rule: Rule
    weights: Arrays
    ingredients: tuple[Ingredient, ...]
    upto: int
    """The last arrival that was looked at."""

    @property
    def hospitals(self) -> list[str]:
        """Whose vectors are in it."""
        return sorted({i.row.hospital for i in self.ingredients})


class GateRefusal(VectorError):
    """The candidate validates worse (``registry-gate``); ``result`` has the figures."""

    def __init__(self, result: GateResult) -> None:
        super().__init__(
            "registry-gate",
            f"the candidate's validation accuracy is {_percent(result.candidate)}, the current "
            f"base's {_percent(result.current)}; the margin is {_percent(result.margin)}",
            "see which hospital's vector harms (its influence) and exclude it, or wait for more",
        )
        self.result = result


class BaseLine(OpenRegistry):
    """The part of :class:`~server_app.registry.registry.Registry` that is about bases."""

    def current(self) -> Base:
        """The newest base of the line. VectorError (``registry-empty``) before the first."""
        with self._store.alone():
            return self._load(tip(self._store.log()))

    def base(self, version: int) -> Base:
        """A base of the line. VectorError (``registry-version``) if there is none."""
        with self._store.alone():
            log = self._store.log()
            rows = [row for row in log.line if row.version == version]
            if not rows:
                raise _no_version(version)
            return self._load(rows[0])

    def candidate(self, rule: Rule) -> Proposal:
        """What :meth:`publish` would publish: the current base itself if no vector waits."""
        with self._store.alone():
            return self._propose(self._store.log(), rule)

    def contributions(self) -> list[Contribution]:
        """The vectors that wait, as rules see them: for scales, ensembles and influences."""
        with self._store.alone():
            return self._contributions(self._store.log().pending())

    def weights_without(self, hospital: str | None, rule: Rule | None = None) -> Arrays:
        """The current base, had ``hospital`` (None: nobody) never sent a vector; nothing changes.

        With a ``rule``, the candidate that follows it. What
        :func:`common.vectors.leave_one_out` asks for.
        """
        with self._store.alone():
            log = self._store.log()
            skip = {v.serial for v in log.vectors if v.hospital == hospital}
            base = self._load(tip(log))
            if skip:
                base = deque(self._replay(log, log.recipes_without(skip)), maxlen=1)[0]
            if rule is None:
                return base.weights
            waiting = self._contributions(log.pending(skip=skip))
            return candidate(base.weights, waiting, rule)

    # Changing

    def add_base(self, base: Base) -> Base:
        """The first base of the line; it becomes version 0. The same once more changes nothing.

        VectorError (``registry-line``) if the registry has another first base.
        """
        made = replace(base, version=0, parent=None)
        with self._store.alone():
            log = self._store.log()
            if log.line and log.line[0].id != made.id:
                raise VectorError(
                    "registry-line",
                    f"the registry starts from another base, {log.line[0].id[:16]}",
                    "use a new folder for a new line of bases",
                )
            if not log.line:
                self._keep(made, ACTIVE)
        return made

    def publish(
        self, rule: Rule, *, gate: Gate = no_gate, least: int = 1, skewed: bool = True
    ) -> Base:
        """Make the candidate the next base, if it passes; the lock is not held while it is gated.

        :meth:`candidate`, :meth:`refusal`, ``gate`` and :meth:`adopt` in one; their VectorErrors.
        """
        proposal = self.candidate(rule)
        refusal = self.refusal(proposal, least=least, skewed=skewed)
        if refusal is not None:
            raise refusal
        return self.adopt(proposal, gate(proposal.base.weights, proposal.weights))

    def refusal(
        self, proposal: Proposal, *, least: int = 1, skewed: bool = True
    ) -> VectorError | None:
        """Why a candidate had better not be judged and published; None: nothing is against it.

        ``least``: the quorum, hospitals whose vectors wait (1 at least). ``skewed``: whether the
        hospitals' classes may be mixed differently (see :func:`common.vectors.merge_refusal`; all
        hospitals of the line count). Codes: ``registry-quorum``, ``merge-base``, ``merge-few``,
        ``registry-unchanged``.
        """
        least, found = max(1, least), len(proposal.hospitals)
        if found < least:
            return VectorError(
                "registry-quorum",
                f"vectors of {found} hospitals wait, and the quorum is {least}",
                "wait for more hospitals, or lower the quorum",
            )
        hospitals = {row.hospital for row in self.log().counting()}
        pretrained = proposal.base.pretrained
        refused = merge_refusal(pretrained=pretrained, hospitals=len(hospitals), skewed=skewed)
        if refused is None and after(proposal.base, 0, proposal.weights).id == proposal.base.id:
            return VectorError(
                "registry-unchanged",
                "the candidate is the current base to the last bit",
                "publish with a scale above 0, or wait for more vectors",
            )
        return refused

    def adopt(self, proposal: Proposal, result: GateResult) -> Base:
        """Publish a candidate that was judged, however long that took.

        Vectors that have come meanwhile wait for the next one. VectorError: ``registry-gate``
        (:class:`GateRefusal`) if the judgement was no, ``registry-moved`` if what the candidate
        was made of is not what it was: another base is current, a vector was excluded or
        withdrawn, or it was published already.
        """
        if not result.adopt:
            raise GateRefusal(result)
        given = serials(proposal.ingredients)
        with self._store.alone():
            log = self._store.log()
            same = tip(log).id == proposal.base.id
            if not given or not same or serials(log.pending(proposal.upto)) != given:
                raise VectorError(
                    "registry-moved",
                    "the current base or its vectors were changed while the candidate was judged",
                    "make a new candidate",
                )
            version = max(row.version for row in log.bases) + 1
            made = after(proposal.base, version, proposal.weights)
            self._keep(made, ACTIVE)
            self._store.insert(
                "publications",
                version=version,
                upto=proposal.upto,
                rule=json.dumps(proposal.rule.to_dict()),
                recipe=json.dumps(given),
                gate=json.dumps(result.to_dict()),
                published=now(),
                taken_back="",
            )
        return made

    def take_back(self, version: int) -> Base:
        """Undo the publication of ``version`` and of all after it; the base before is current.

        Their vectors wait again, save those that were trained on what is taken back: they count
        no more. Once more changes nothing. VectorError (``registry-version``) for the first base
        or an unknown one.
        """
        with self._store.alone():
            log = self._store.log()
            if not any(p.version == version for p in log.publications):
                raise _no_version(version)
            if any(p.version == version for p in log.points):
                self._store.execute(
                    "UPDATE publications SET taken_back=? WHERE version>=? AND taken_back=''",
                    [now(), version],
                )
                self._store.execute(
                    "UPDATE bases SET state=? WHERE version>=?", [TAKEN_BACK, version]
                )
                # Were the new current base retired, no vector could come any more.
                before = max(row.version for row in log.line if row.version < version)
                self._store.execute(
                    "UPDATE bases SET state=? WHERE version=? AND state=?",
                    [ACTIVE, before, RETIRED],
                )
        self._store.sweep()
        return self.current()

    def retire(self, version: int) -> None:
        """Accept no more vectors for the bases up to ``version``; what came before counts on.

        VectorError (``registry-version``) if the current base would be among them.
        """
        with self._store.alone():
            if version >= tip(self._store.log()).version:
                raise _no_version(version)
            self._store.execute(
                "UPDATE bases SET state=? WHERE version<=? AND state=?", [RETIRED, version, ACTIVE]
            )

    def rebuild(self) -> list[int]:
        """Make every base anew from the first one and compare; the versions whose file was mended.

        VectorError (``registry-damaged``) if a base comes out differently, to the last bit, or
        the file of a vector that counts is missing or changed.
        """
        with self._store.alone():
            log = self._store.log()
            tip(log)
            mended = []
            for waiting in log.pending():
                self._store.load_values(waiting.row)
            for row, made in zip(log.line, self._replay(log, log.recipes), strict=True):
                if made.id != row.id:
                    raise damaged(f"base {row.version} is not what its recipe makes")
                try:
                    self._store.load_base(row)
                except VectorError:
                    self._store.write_base(made)
                    mended.append(row.version)
        return mended

    def _propose(self, log: Log, rule: Rule) -> Proposal:
        base = self._load(tip(log))
        ingredients = log.pending()
        weights = candidate(base.weights, self._contributions(ingredients), rule)
        return Proposal(base, rule, weights, tuple(ingredients), log.last)


def _no_version(version: int) -> VectorError:
    return VectorError(
        "registry-version",
        f"the line of bases has no version {version} that this can be done with",
        "list the bases",
    )


def _percent(value: float | None) -> str:
    return "not known" if value is None else f"{100 * value:.2f} %"
