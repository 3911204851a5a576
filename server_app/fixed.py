"""Who holds the entries that rounds do not move, so that a message may leave them out."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from flwr.app import RecordDict

from common.messages import Job
from common.model import weights_digest


class FixedParts:
    """What hospitals were sent, and answered to, while this server's process runs.

    A hospital that gives no answer (it may have lost its copy, and refused) is sent everything
    the next time.
    """

    def __init__(self) -> None:
        self._holders: dict[str, str] = {}

    def messages(self, job: Job, cohort: Iterable[str]) -> Mapping[str, RecordDict]:
        """Hospital → ``job`` as it is sent to it: two records for all of them together."""
        if not job.fixed:
            return dict.fromkeys(cohort, job.to_record())
        digest = weights_digest(job.fixed)
        have = {name for name in cohort if self._holders.get(name) == digest}
        short = job.without_fixed(digest).to_record() if have else RecordDict()
        whole = job.to_record() if have != set(cohort) else RecordDict()
        return {name: short if name in have else whole for name in cohort}

    def answered(self, job: Job, cohort: Iterable[str], absent: Iterable[str]) -> None:
        """Note who of ``cohort`` answered ``job``."""
        if not job.fixed:
            return
        digest, gone = weights_digest(job.fixed), set(absent)
        for name in cohort:
            if name in gone:
                self._holders.pop(name, None)
            else:
                self._holders[name] = digest
