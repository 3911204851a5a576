"""Who holds the entries that rounds do not move, so that a message may leave them out."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

from flwr.app import RecordDict

from common.errors import FixedMissing
from common.fixed import groups_of
from common.messages import Job


class FixedParts:
    """What hospitals were sent, and answered to, while this server's process runs.

    A hospital that lost its copy says so, and is sent everything in the same exchange.
    """

    def __init__(self) -> None:
        self._holders: dict[str, frozenset[str]] = {}
        self._sent: frozenset[str] = frozenset()
        """Digests of the latest job's parts: hashing them takes longer than a head's step."""

    def messages(self, job: Job, cohort: Iterable[str]) -> Mapping[str, RecordDict]:
        """Hospital → ``job`` as it is sent to it: hospitals that lack the same share a record."""
        groups = groups_of(job.fixed)
        self._sent = frozenset(groups)
        made: dict[frozenset[str], RecordDict] = {}
        found = {}
        for name in cohort:
            has = frozenset(self._holders.get(name, frozenset()) & groups.keys())
            if has not in made:
                made[has] = job.without_fixed({d: groups[d] for d in sorted(has)}).to_record()
            found[name] = made[has]
        return found

    def again(self, job: Job) -> Callable[[str, str], RecordDict | None]:
        """(hospital, code of its refusal) → the whole message, if it is for want of a part."""
        return lambda name, code: job.to_record() if code == FixedMissing.code else None

    def answered(self, cohort: Iterable[str], absent: Iterable[str]) -> None:
        """Note who of ``cohort`` answered the latest job, and so has all of it."""
        gone = set(absent)
        for name in cohort:
            self._holders[name] = frozenset() if name in gone else self._sent
