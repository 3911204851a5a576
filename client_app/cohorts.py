"""Over whom this hospital's counts may be summed: for one base, always over the same hospitals.

A comparison tells, in a sum, how many images only the candidate gets right, and how many only the
base. Two such sums over almost the same hospitals can be subtracted, and a server can send a
candidate twice, changed by a hair. So the first list of survivors that a hospital signs for a base
is the only one that it ever signs for that base. It is on the disk before the signature leaves.

A hospital that was left out of one sum does not see the list. Those that are in both do, and a sum
is opened only when ``reconstruction-threshold`` of each neighbourhood have signed its list.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from client_app.hospital import Hospital
from client_app.outbox import outbox_of
from common.aggregation import MOST_CANDIDATES
from common.errors import ConsiliumError
from common.files import read_json, write_json


class JudgingRefusal(ConsiliumError):
    """A comparison that this hospital takes no part in; ``code`` is what the server is told."""

    def __init__(self, code: str, what: str, remedy: str) -> None:
        """``code``: ``judging-base``, ``judging-many``, ``judging-cohort`` or ``judging-clear``."""
        super().__init__(what, remedy)
        self.code = code


class Cohorts:
    """What this hospital has signed for one base: over whom, and for which candidates.

    Kept beside the outbox, and as long: in a real hospital over all runs.
    """

    def __init__(self, hospital: Hospital, run: str, base: str) -> None:
        """``base``: a base's id (hexadecimal, checked by whoever read the message)."""
        self._outbox, self._run, self._base = outbox_of(hospital, run), run, base
        self._path: Path = self._outbox.folder.parent / "judged" / f"{base}.json"

    def check(self, models: bytes) -> None:
        """JudgingRefusal, before any work, for a base or a candidate that is not to be judged.

        The base must be one for which this hospital has delivered a vector to this run: a server
        cannot name another model as the one to compare with.
        """
        known = any(
            item.base == self._base and self._run in item.handed for item in self._outbox.items()
        )
        if not known:
            raise JudgingRefusal(
                "judging-base",
                f"base {self._base[:16]} is none for which this hospital delivered a vector to "
                f"run {self._run}",
                "nothing: only hospitals that were offered a base compare candidates with it",
            )
        _, candidates = self._read()
        self._may_be_judged(candidates, models)

    def agree(self, models: bytes, survivors: Sequence[str]) -> None:
        """Note ``survivors`` as the hospitals of this base's sums; JudgingRefusal for others.

        Must be called before the signature of ``survivors`` leaves.
        """
        with self._outbox.alone(f"judged-{self._base}"):
            hospitals, candidates = self._read()
            if hospitals and sorted(survivors) != hospitals:
                raise JudgingRefusal(
                    "judging-cohort",
                    f"base {self._base[:16]} was judged over {', '.join(hospitals)}, and is now to "
                    f"be judged over {', '.join(sorted(survivors))}: the difference of two sums "
                    "would tell of single hospitals",
                    "nothing, if hospitals came or went by themselves: the next base may be judged "
                    "by others",
                )
            self._may_be_judged(candidates, models)
            if models.hex() not in candidates:
                candidates.append(models.hex())
            self._path.parent.mkdir(exist_ok=True, mode=0o700)
            kept = {"hospitals": sorted(survivors), "candidates": candidates}
            write_json(self._path, kept, mode=0o600)

    def _read(self) -> tuple[list[str], list[str]]:
        kept = read_json(self._path) if self._path.exists() else {}
        return list(kept.get("hospitals", ())), list(kept.get("candidates", ()))

    def _may_be_judged(self, candidates: Sequence[str], models: bytes) -> None:
        if len(candidates) >= MOST_CANDIDATES and models.hex() not in candidates:
            raise JudgingRefusal(
                "judging-many",
                f"{len(candidates)} candidates were compared with base {self._base[:16]}",
                "exclude the vectors that harm, or go on from another base",
            )
