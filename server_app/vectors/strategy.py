"""Task vectors whenever a hospital has one, as the algorithm reads: no rounds, nobody waits.

Every hospital that is there is offered the current base, and fine-tunes it when it suits it. Each
vector that comes is checked and stored; once enough have come, what they make together is judged
(``judged-by``) and published as the next base. The registry is the only state: a run that is
resumed goes on with it, and a vector that comes twice counts once.
"""

from __future__ import annotations

import math
import time
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass

from common.config import RunConfig
from common.errors import ConsiliumError, RoundError
from common.messages import Delivery
from common.vectors import Rule, SignedVector, VectorError, Withdrawal
from server_app.directory import Directory
from server_app.registry import GateRefusal, Log, Registry
from server_app.vectors.acceptance import check_privacy, outliers
from server_app.vectors.federated import Bench, CandidateWaits, FederatedJudge
from server_app.vectors.judging import Judging
from server_app.vectors.keys import Keys
from server_app.vectors.letters import Letters
from server_app.vectors.post import Answer, Post
from server_app.vectors.public import Judge
from server_app.vectors.record import Journal
from server_app.vectors.standing import Standing

LOOK = 5.0
"""Seconds between two looks for hospitals that came or went, and for what a person did."""


@dataclass
class Vectors:
    """One run: whom it asks, where vectors are kept, by what candidates are judged."""

    config: RunConfig
    run_id: str
    hospitals: int
    """How many are expected."""
    directory: Directory
    post: Post
    registry: Registry
    keys: Keys
    judge: Judge | None
    journal: Journal
    skewed: bool
    """Whether hospitals may have different mixes of classes."""
    panel: FederatedJudge | None = None
    """The hospitals that judge candidates, where ``judged-by`` says so."""

    def __post_init__(self) -> None:
        self.rule = Rule.from_text(self.config.merge_rule)
        half = max(1, math.ceil(self.hospitals / 2))
        self.every = self.config.publish_every or half
        self.current = self.registry.current()
        self.judging = Judging(self.config, self.registry, self.judge, self.panel, self.skewed)
        self._standing: dict[str, Standing] = defaultdict(Standing)
        self.letters = Letters(
            self.config, self.run_id, self.directory, self.post, self.journal, self._standing,
            current=lambda: self.current,
        )  # fmt: skip
        self._began = self._look_again = time.monotonic()
        self._changed = True
        self._met = False
        """Whether any hospital was ever there."""
        log = self.registry.log()
        for row in log.vectors:  # a resumed run: who has delivered already
            standing = self._standing[row.hospital]
            standing.done = max(standing.done, self._delivered(log, row.base))

    def run(self) -> None:
        """Until enough bases are published or the time is over.

        RoundError if nobody comes within ``connect-timeout``, if every hospital has delivered
        or refused, and what came makes no base, or if the time is over, and there is no base
        because what came is not to be merged. What became of the vectors is told even so.

        A run that is resumed first asks every hospital that is connected what it takes back:
        until they have said so, or :data:`~server_app.vectors.letters.HEARING` is over, it makes
        and concludes nothing.
        """
        try:
            self._look_around()
            if self.config.resume:
                self.letters.hear_out(self._open)
            self._go_on()
        except RoundError:
            self.letters.farewell(self._open)
            raise
        self.letters.farewell(self._open)
        refused = self.judging.unmerged(self.current)
        if refused and not self.judging.allowed(refused) and not self.registry.log().points:
            raise self._no_base("the time is over", refused.what)

    def _go_on(self) -> None:
        while not self._over():
            if time.monotonic() >= self._look_again:
                self._look_around()
            self.letters.ask()
            answers = self.post.collect()
            for answer in answers:
                self._open(answer)
            self._publish()
            if not answers:
                self.post.rest()

    def _over(self) -> bool:
        published = len(self.registry.log().points)
        enough = self.config.versions and published >= self.config.versions
        late = self.config.duration and time.monotonic() - self._began >= self.config.duration
        return bool(enough or late)

    def _look_around(self) -> None:
        """Who is there, and whether somebody changed the line of bases meanwhile.

        A new node that does not tell its name costs its greeting's time-out; the next look is
        then the later, so that the others' vectors do not wait.
        """
        started = time.monotonic()
        for absence in self.directory.refresh():
            self.journal.trouble(absence.hospital, absence.reason)
        there, _ = self.directory.reach(self.directory.names)
        for name, node in there.items():
            self.post.forget(name, node)
        self._met |= bool(there)
        if not self._met and time.monotonic() - self._began > self.config.connect_timeout:
            raise RoundError(
                f"no hospital was there within {self.config.connect_timeout:g} s",
                "start the hospitals' nodes and read their logs",
            )
        self._follow("changed by hand")
        now = time.monotonic()
        self._look_again = now + max(LOOK, 5 * (now - started))

    def _follow(self, why: str) -> None:
        base = self.registry.current()
        if base.id != self.current.id or base.version != self.current.version:
            # Taken back, or made anew where those judge who trained from it: all are asked again.
            if base.version < self.current.version or self.panel is not None:
                for standing in self._standing.values():
                    standing.done = -1
            self.current, self._changed = base, True
            self.journal.base(base, why)

    # What comes

    def _open(self, answer: Answer) -> None:
        name, kind = answer.letter.hospital, answer.letter.kind
        standing = self._standing[name]
        standing.heard = time.monotonic()
        if answer.problem or answer.record is None:
            self.journal.trouble(name, answer.problem)
            return
        if kind == "receipt":  # it was read, whatever the answer
            standing.heard_receipt()
        if answer.refusal is not None:
            code = answer.refusal.code
            self.journal.refusal(name, code, answer.refusal.correlation_id)
            if kind == "offer":
                self._no_more(name, answer.letter.version, code)
            return
        try:
            delivery = Delivery.from_record(answer.record, run=self.run_id)
            key = self.keys.of(name, delivery.hospital, delivery.key)
        except ConsiliumError as error:
            self.journal.trouble(name, error.what)
            if kind == "offer":
                self._no_more(name, answer.letter.version, error.code)
            return
        for withdrawal in delivery.withdrawals:
            self._withdraw(name, withdrawal, key)
        if delivery.vector:
            self._take(name, delivery.vector, key, answer.letter.version)
        elif kind == "offer":
            self._no_more(name, answer.letter.version, "empty")

    def _no_more(self, name: str, version: int, code: str) -> None:
        """Ask this hospital again at the next base only."""
        standing = self._standing[name]
        standing.done, standing.refusal = max(standing.done, version), code
        self._changed = True

    def _take(self, name: str, envelope: bytes, key: Mapping[str, bytes], version: int) -> None:
        """A vector has come: check it, store it, say so."""
        standing, vector = self._standing[name], None
        try:
            limit = self.registry.limits.max_bytes
            vector = SignedVector.from_bytes(envelope, limit=limit).vector
            check_privacy(self.config, vector)
            accepted = self.registry.accept(envelope, key)
        except VectorError as error:
            if self._at_fault(name, error):
                return
            self.journal.refused(name, vector, error)
            if vector is not None:
                standing.refused[vector.serial] = error.code
            if vector is None or vector.base == self.current.id:
                self._no_more(name, version, error.code)
            else:  # it was for another base: it is told so, then the current one is offered again
                self.post.failed(name)
            return
        standing.accepted.append(accepted.serial)
        log = self.registry.log()
        delivered = self._delivered(log, vector.base)
        if delivered >= 0:
            standing.done, standing.refusal = max(standing.done, delivered), ""
        self._changed = True
        if accepted.duplicate:
            if delivered != self.current.version:
                self.post.failed(name)
            return
        row = next(v for v in log.vectors if v.serial == accepted.serial)
        validation = None
        if self.judge is not None and not accepted.superseded:
            validation = self.judge(self.registry.candidate(self.rule).weights)
        self.journal.arrival(row, accepted, validation)

    def _at_fault(self, name: str, error: VectorError) -> bool:
        """Whether the registry failed, and not what came: the hospital is asked for it again.

        Were it told of a refusal, it would not deliver this again, and its ε would be lost.
        """
        if not error.code.startswith("registry-"):
            return False
        self.journal.trouble(name, f"what it sent could not be kept: {error.what}")
        self.post.failed(name)
        return True

    def _delivered(self, log: Log, base: str) -> int:
        """The version for which a vector of ``base`` is what its hospital was asked for; or −1.

        One for what the current base was before it was made anew counts as for the current one.
        But its hospital may not judge candidates for this one: where hospitals judge, it is asked
        for another vector.
        """
        version = log.version_of(base)
        if version is None:
            return -1
        if version == self.current.version and base != self.current.id and self.panel is not None:
            return version - 1
        return version

    def _withdraw(self, name: str, withdrawal: bytes, key: Mapping[str, bytes]) -> None:
        try:
            self.registry.withdraw(withdrawal, key)
        except VectorError as error:
            if not self._at_fault(name, error):
                self.journal.refused(name, None, error)
            return
        taken = Withdrawal.from_bytes(withdrawal).serial
        self._standing[name].withdrawn.append(taken)
        self.journal.withdrawal(name, taken)
        self._changed = True
        self._follow(f"made anew without a vector that {name} took back")

    # Publishing

    def _publish(self) -> None:
        """The next base, if enough vectors have come, or no more will for this one."""
        self._changed |= self.panel is not None and self.panel.due()
        if not self._changed:
            return
        self._changed = False
        self._exclude_outliers()
        pending = self.registry.log().pending()
        fresh = sum(i.staleness == 0 for i in pending)
        hospitals = {i.row.hospital for i in pending}
        settled = self._settled()
        every = self.every  # as many again after each candidate that the hospitals found worse
        if self.panel is not None:
            every *= 1 + self.panel.refusals(self.current.id)
        if len(hospitals) < self.config.publish_quorum or not (fresh >= every or settled):
            if settled:
                self._stuck(f"{len(hospitals)} hospitals' vectors wait, and the quorum is "
                            f"{self.config.publish_quorum}")  # fmt: skip
            return
        proposal = self.registry.candidate(self.rule)
        influence = None
        try:
            self.judging.refuse(proposal)
            verdict = self.judging.verdict(proposal, lambda: self._bench(settled))
            influence = self.judging.influence(proposal)
            base = self.registry.adopt(proposal, verdict)
        except CandidateWaits as waits:
            if waits.news:
                self.journal.held(self.current.version, waits, None, None)
            return
        except VectorError as error:
            if error.code == "registry-moved":
                self._changed = True
                return
            result = error.result if isinstance(error, GateRefusal) else None
            influence = self.judging.influence(proposal) if influence is None else influence
            self.journal.held(self.current.version, error, result, influence)
            if settled:
                self._stuck(error.what)
            return
        self.current, self._changed = base, True
        self.journal.base(base, "published", influence=influence)

    def _bench(self, settled: bool) -> Bench:
        """Who can judge: a hospital that trains is not asked, and would not answer in time."""
        gave = {v.hospital for v in self.registry.log().vectors if v.base == self.current.id}
        there, _ = self.directory.reach(sorted(gave))
        owing = set(self.post.open())
        able = {name: node for name, node in there.items() if name not in owing}
        return Bench(able, len(able) < len(there), frozenset(gave) if settled else None)

    def _exclude_outliers(self) -> None:
        for row, reason in outliers(self.registry.log(), self.registry.limits):
            self.registry.exclude(row.serial, reason)
            self._standing[row.hospital].refused[row.serial] = "vector-norm"
            self.journal.excluded(row, reason)

    def _settled(self) -> bool:
        """Whether every hospital expected has delivered for the current base, or refused."""
        names = self.directory.names
        done = all(self._standing[name].done >= self.current.version for name in names)
        return done and len(names) >= self.hospitals and not self.post.open("offer")

    def _stuck(self, what: str) -> None:
        """Nothing more will come for this base: the end, unless the run only waits for its time."""
        refusals = [f"{n}: {s.refusal}" for n, s in sorted(self._standing.items()) if s.refusal]
        said = f" (refused by {'; '.join(refusals)})" if refusals else ""
        if not self.config.versions:
            self.journal.trouble("", f"every hospital has answered, and {what}{said}")
            return
        raise self._no_base("every hospital has answered", f"{what}{said}")

    def _no_base(self, when: str, what: str) -> RoundError:
        refused = self.judging.unmerged(self.current)
        left = "" if refused is None else (
            f"{refused.remedy}: `consilium vectors ensemble {self.run_id}`. Or "
        )  # fmt: skip
        return RoundError(
            f"{when}, and there is no base {self.current.version + 1}: {what}",
            f"{left}see `consilium vectors list {self.run_id}`, exclude what harms or let the "
            f"hospitals mend what they name, then go on with resume={self.run_id}",
        )
