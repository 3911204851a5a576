"""Candidates judged by the hospitals: two counts, in one secured sum over all of those who answer.

Each hospital counts the validation images that only the candidate gets right (gained) and those
that only the current base does (lost). The sums decide by themselves (McNemar 1947): with no real
difference between two models, gained − lost strays from 0 by about √(gained + lost).

An exchange takes ``stage-timeout`` at most, all stages together, and arrivals wait for no longer.
If nothing could be opened, the candidate waits. The hospitals judge one base over one set of
hospitals only (:mod:`client_app.cohorts`): ``judging.json`` remembers which, and what was counted,
so that a resumed run asks the same ones, and nobody twice for the same.
"""

from __future__ import annotations

import math
import re
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from flwr.serverapp import Grid

from common.aggregation import (
    GAINED,
    JUDGE,
    LOST,
    MOST_CANDIDATES,
    layout_for,
    params_for,
    terms_for,
)
from common.config import RunConfig
from common.errors import ConfigError, RoundError
from common.files import read_json, write_json
from common.messages import Comparison
from common.messages.evaluation import comparison_hash
from common.secagg import RoundBinding
from common.vectors import Base, GateResult, VectorError, base_id
from server_app.registry import GateRefusal, Proposal
from server_app.secure_round import Question, SecureSum, secure_sum

LOOK = 5.0
"""Seconds until it is looked again whether enough hospitals can judge."""
GRACE = 10.0
"""Seconds for which a hospital that still owes another answer is waited for."""
FIRST_PAUSE, LONGEST_PAUSE = 5.0, 300.0
"""Seconds until an exchange that failed is tried again, at first and at most."""


@dataclass(frozen=True)
class HospitalsVerdict(GateResult):
    """What the hospitals say: no accuracies, which nobody learns; ``margin`` is in images."""

    gained: int = 0
    lost: int = 0
    hospitals: tuple[str, ...] = ()

    @classmethod
    def of(
        cls, gained: int, lost: int, hospitals: Sequence[str], *, errors: float
    ) -> HospitalsVerdict:
        """Adopts unless ``lost`` exceeds ``gained`` by more than ``errors`` standard errors."""
        allowed = errors * math.sqrt(gained + lost)
        adopt = lost - gained <= allowed
        return cls(adopt, None, None, allowed, gained, lost, tuple(hospitals))


class WorseAtHospitals(GateRefusal):
    """The candidate is worse on the hospitals' images (``registry-gate``)."""

    def __init__(self, result: HospitalsVerdict) -> None:
        VectorError.__init__(
            self,
            "registry-gate",
            f"on the hospitals' images the candidate loses {result.lost} that the current base "
            f"gets right, and gains {result.gained}; the margin is {result.margin:.1f} images",
            "see whose vector harms (exclude it and see what the hospitals say), or wait for more",
        )
        self.result = result


class CandidateWaits(VectorError):
    """Nothing was opened (``judging-waits``); ``news``: whether this was not said before."""

    def __init__(self, what: str, *, news: bool) -> None:
        super().__init__(
            "judging-waits",
            f"the candidate waits to be judged: {what}",
            "nothing: it is tried again; see that the hospitals' nodes run, and their policies",
        )
        self.news = news


@dataclass(frozen=True)
class Bench:
    """Who can judge a candidate: hospitals that have sent a vector for the current base.

    ``able``: name → node of those who are there and owe nothing; ``busy``: whether others are
    there who owe an answer; ``last``: everybody who ever will be, once that is known, else None.
    """

    able: Mapping[str, int]
    busy: bool
    last: frozenset[str] | None = None


@dataclass
class _OfBase:
    """What is known of one base: who judges, which candidates they saw, what they counted."""

    hospitals: list[str] = field(default_factory=list)
    tried: list[str] = field(default_factory=list)
    counts: dict[str, list[int]] = field(default_factory=dict)


def check_cohort(config: RunConfig, hospitals: int) -> None:
    """ConfigError if the hospitals judge, and those expected are too few for any sum."""
    if config.judged_by == "hospitals" and 0 < hospitals < config.min_cohort:
        raise ConfigError(
            f"judged-by is hospitals, {hospitals} are expected, and sums are over "
            f"{config.min_cohort} or more (min-cohort): no candidate could ever be judged",
            "expect more hospitals; lower min-cohort, reconstruction-threshold and num-shares "
            "together (3 is the floor), where you accept that less is hidden; or set "
            "judged-by=public or none",
        )


class FederatedJudge:
    """Asks hospitals to compare a candidate with the base that it would replace."""

    def __init__(
        self,
        grid: Grid,
        config: RunConfig,
        run: str,
        path: Path,
        *,
        hospitals: int,
        say: Callable[[str], None],
        roster: Mapping[str, bytes] | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """``hospitals``: how many are expected; ``path``: of ``judging.json``."""
        self._grid, self._config, self._run, self._path = grid, config, run, path
        self._expected, self._say, self._roster, self._clock = hospitals, say, roster, clock
        kept: Any = read_json(path) if path.exists() else {}
        self._round = int(kept.get("round", 0))
        self._bases = {name: _OfBase(**told) for name, told in kept.get("bases", {}).items()}
        self._declined: set[str] = set()
        self._pause, self._not_before = FIRST_PAUSE, 0.0
        self._look: float | None = None
        self._since: dict[str, float] = {}
        self._said = ""

    def due(self) -> bool:
        """Whether a candidate waits, and it is time to try again; True once."""
        if self._look is None or self._clock() < self._look:
            return False
        self._look = None
        return True

    def refusals(self, base: str) -> int:
        """How many candidates the hospitals have found worse than ``base``, by its id."""
        kept = self._bases.get(base, _OfBase())
        return sum(not self._verdict(kept, counts).adopt for counts in kept.counts.values())

    def verdict(self, proposal: Proposal, bench: Bench) -> HospitalsVerdict:
        """What the hospitals say of ``proposal``, where it may be adopted.

        Takes ``stage-timeout`` at most. Raises WorseAtHospitals; CandidateWaits if nothing could
        be opened; VectorError ``judging-few`` or ``judging-many`` if nothing ever will be.
        """
        base = proposal.base
        models = comparison_hash(base.id, base_id(base.model_digest, proposal.weights))
        kept = self._bases.setdefault(base.id, _OfBase())
        if models.hex() not in kept.counts:
            if len(kept.tried) >= MOST_CANDIDATES and models.hex() not in kept.tried:
                raise VectorError(
                    "judging-many",
                    f"the hospitals have judged {len(kept.tried)} candidates for base "
                    f"{base.version}, and judge no more",
                    "exclude the vectors that harm, or start a new run from another base",
                )
            cohort = self._cohort(base, kept, bench)
            kept.counts[models.hex()] = self._ask(proposal, models, kept, cohort)
            self._save()
        self._look, self._said = None, ""
        found = self._verdict(kept, kept.counts[models.hex()])
        if not found.adopt:
            raise WorseAtHospitals(found)
        return found

    def _verdict(self, kept: _OfBase, counts: Sequence[int]) -> HospitalsVerdict:
        errors = self._config.publish_margin
        return HospitalsVerdict.of(counts[0], counts[1], kept.hospitals, errors=errors)

    # Whom to ask

    def _cohort(self, base: Base, kept: _OfBase, bench: Bench) -> Mapping[str, int]:
        now, least = self._clock(), self._config.min_cohort
        if now < self._not_before:  # an exchange has failed a moment ago
            raise self._waits(self._said, self._not_before - now)
        able = {name: node for name, node in bench.able.items() if name not in self._declined}
        if kept.hospitals:
            self._may_judge(kept.hospitals)
            if missing := sorted(set(kept.hospitals) - set(able)):
                raise self._waits(
                    f"base {base.version} is judged by the same hospitals each time, and "
                    f"{', '.join(missing)} cannot answer now",
                    LOOK,
                )
            return {name: able[name] for name in kept.hospitals}
        left = self._expected - len(self._declined)
        if bench.last is not None:
            left = len(bench.last - self._declined)
        if left < least and (self._expected or bench.last is not None):
            why = f" ({', '.join(sorted(self._declined))}: policy)" if self._declined else ""
            raise VectorError(
                "judging-few",
                f"fewer than {least} hospitals (min-cohort) can judge a candidate for base "
                f"{base.version}, and no more will come{why}",
                "ask the hospitals for [vectors] evaluate = true in their policies, or start a run "
                "with judged-by=public or none",
            )
        if bench.busy and now - self._since.setdefault(base.id, now) < GRACE:
            raise self._waits(self._said, 0.5)
        if len(able) < least:
            raise self._waits(
                f"{len(able)} hospitals with a vector for base {base.version} can answer now, and "
                f"{least} are needed (min-cohort)",
                LOOK,
            )
        return able

    def _may_judge(self, hospitals: Sequence[str]) -> None:
        if declined := sorted(self._declined & set(hospitals)):
            raise VectorError(
                "judging-few",
                f"{', '.join(declined)} judged this base before and may not any more (policy); "
                "nobody may in its place: the difference of two sums would tell of it",
                "ask it for [vectors] evaluate = true in its policy, or start a run with "
                "judged-by=public or none",
            )

    def _waits(self, what: str, seconds: float) -> CandidateWaits:
        """``seconds`` until the next look."""
        news, self._said = bool(what) and what != self._said, what
        self._look = self._clock() + seconds
        return CandidateWaits(what, news=news)

    # Asking

    def _ask(
        self, proposal: Proposal, models: bytes, kept: _OfBase, cohort: Mapping[str, int]
    ) -> list[int]:
        """[gained, lost]; CandidateWaits if it failed closed."""
        c, base = self._config, proposal.base
        self._round += 1
        self._save()  # a number is used once, whatever happens
        binding = RoundBinding(
            run=self._run,
            round=self._round,
            purpose=JUDGE,
            params=params_for(c, max(len(cohort), c.num_shares, c.min_cohort)),
            layout=layout_for(JUDGE, 0, c),
            model_hash=models,
            terms=terms_for(c),
        )
        asked = Comparison(
            run=self._run, round=self._round, base=base.id, model_digest=base.model_digest,
            current=base.weights, candidate=proposal.weights, invitation=binding.to_bytes(),
        )  # fmt: skip
        began, fixed = self._clock(), bool(kept.hospitals)

        def survivors(names: list[str]) -> None:
            """Whoever signs for these signs for no others: on the disk before they do."""
            if fixed and names != kept.hospitals:
                gone = ", ".join(sorted(set(kept.hospitals) - set(names)))
                raise RoundError(f"{gone} did not answer in time.", "It is tried again.")
            kept.hospitals = names
            if models.hex() not in kept.tried:
                kept.tried.append(models.hex())
            self._save()

        message = asked.to_record()
        question = Question(
            lambda _: message,
            kind="query.judge",
            stage="judge",
            # Half of what is left for each stage: one silent hospital must not use it all up.
            timeout=c.stage_timeout / 2,
            stage_timeout=lambda: max(0.0, began + c.stage_timeout - self._clock()) / 2,
            on_survivors=survivors,
        )
        found = secure_sum(self._grid, cohort, binding, question, roster=self._roster)
        declined = {a.hospital for a in found.absent if a.reason.startswith("refused: vectors-")}
        self._declined |= declined
        if found.failure is None:
            self._pause = FIRST_PAUSE
            gained, lost = (round(float(found.values[name][0])) for name in (GAINED, LOST))
            self._say(
                f"{len(found.contributed)} hospitals judged (sums only): the candidate gains "
                f"{gained} images and loses {lost}"
            )
            return [gained, lost]
        if not fixed and _nobody_signed(found):
            kept.hospitals = []
            self._save()
        why = "nothing was opened: " + re.sub(r" \(id \w+ in its log\)", "", found.failure)
        if declined:  # whether enough are left is known at once
            raise self._waits(why, 0.0)
        self._not_before = self._clock() + self._pause
        failed = self._waits(why, self._pause)
        self._pause = min(2 * self._pause, LONGEST_PAUSE)
        raise failed

    def _save(self) -> None:
        bases = {name: asdict(kept) for name, kept in self._bases.items()}
        write_json(self._path, {"round": self._round, "bases": bases})


def _nobody_signed(found: SecureSum) -> bool:
    unsigned = {a.hospital for a in found.absent if a.stage == "consistency"}
    return set(found.survivors) <= unsigned
