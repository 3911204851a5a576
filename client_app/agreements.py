"""What this hospital has agreed to before, kept on its disk: runs' configs, whose sums it is in.

Two things that a server may not change its mind about:

* **a run's config**, from the moment when the hospital takes part in it (what a resumed run may
  change is left out: :mod:`common.config.agreement`);
* **over whom one vector is summed.** Two sums of the same vectors over cohorts that differ in one
  hospital show that hospital's vector. So before a hospital signs a list of survivors, it looks at
  every list that it signed for the same *subject* before (a model, or a vector that is kept): the
  lists may tell no group of hospitals apart that has fewer than ``min-cohort`` members. Hospitals
  are told apart where they are in different lists; every combination of the sums is then over
  whole groups (:func:`smallest_group`).

A hospital that was left out of a cohort does not see its list. Those that are in two of them see
both, and a sum opens only when ``reconstruction-threshold`` of each neighbourhood have signed it.
"""

from __future__ import annotations

import sqlite3
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import closing, contextmanager

from client_app.hospital import Hospital
from common.database import write_transaction
from common.errors import ConsiliumError
from common.privacy.limits import PrivacyLimits

_DAY = 86_400.0
_VERSION = 1
_SCHEMA = """
CREATE TABLE runs (run TEXT PRIMARY KEY, config BLOB NOT NULL, admitted REAL NOT NULL) STRICT;
CREATE TABLE cohorts (cohort INTEGER PRIMARY KEY, members TEXT UNIQUE NOT NULL) STRICT;
CREATE TABLE signed (subject TEXT, cohort INTEGER, PRIMARY KEY (subject, cohort))
  STRICT, WITHOUT ROWID;
"""


class AgreementRefusal(ConsiliumError):
    """Something that this hospital has agreed to otherwise before, or too often today."""

    def __init__(self, code: str, what: str, remedy: str) -> None:
        """``code``: ``config-changed``, ``runs-a-day`` or ``secagg-cohort-changed``."""
        super().__init__(what, remedy)
        self.code = code


class Agreements:
    """One hospital's, in ``agreements.sqlite``: for all runs of a real hospital.

    In a simulation without a policy there is nothing to protect, and the next experiment may begin
    with the same weights: each Flower run has agreements for itself.
    """

    def __init__(self, hospital: Hospital) -> None:
        """Nothing is read or written yet."""
        alone = hospital.own is None and hospital.policy.privacy == PrivacyLimits.none()
        folder = hospital.home / "secagg"
        self._path = (folder / str(hospital.flower_run) if alone else folder) / "agreements.sqlite"
        self._durable = not alone

    def check(self, run: str, config: bytes, most_a_day: int) -> None:
        """Whether the hospital may take part in ``run`` with this config; raises as :meth:`admit`.

        Notes nothing: a run that is refused afterwards, by the ledger perhaps, binds nobody.
        """
        with self._changing() as database:
            _known(database, run, config, most_a_day)

    def admit(self, run: str, config: bytes, most_a_day: int) -> None:
        """Take part in ``run``, whose lasting config has the digest ``config``; known or new.

        Raises AgreementRefusal for another config than before, and for a new run where
        ``most_a_day`` new ones were admitted in the last 24 hours.
        """
        with self._changing() as database:
            if not _known(database, run, config, most_a_day):
                database.execute("INSERT INTO runs VALUES (?, ?, ?)", (run, config, time.time()))

    def sign(self, subject: str, survivors: Sequence[str], min_cohort: int) -> None:
        """Note that the sum of ``subject`` is over ``survivors``; AgreementRefusal if it must not.

        Must return before the signature of ``survivors`` leaves.
        """
        members = "\n".join(sorted(survivors))
        with self._changing() as database:
            before = [
                set(row[0].split("\n"))
                for row in database.execute(
                    "SELECT members FROM signed JOIN cohorts USING (cohort) WHERE subject = ?",
                    (subject,),
                )
            ]
            if set(survivors) in before:
                return
            smallest = smallest_group([*before, set(survivors)])
            if len(smallest) < min_cohort and before:
                raise AgreementRefusal(
                    "secagg-cohort-changed",
                    "what is to be summed was in a sum over other hospitals: together the sums "
                    f"would show {', '.join(sorted(smallest))} alone (min-cohort {min_cohort})",
                    "ask the same hospitals again, or start from another model (another seed or "
                    "base); treat the server as hostile if no hospital was away",
                )
            database.execute("INSERT OR IGNORE INTO cohorts (members) VALUES (?)", (members,))
            database.execute(
                "INSERT INTO signed SELECT ?, cohort FROM cohorts WHERE members = ?",
                (subject, members),
            )

    def has_signed(self, subject: str) -> bool:
        """Whether ``subject`` is in a sum over hospitals whose list this one has signed."""
        with self._changing() as database:
            found = database.execute("SELECT 1 FROM signed WHERE subject = ?", (subject,))
            return found.fetchone() is not None

    @contextmanager
    def _changing(self) -> Iterator[sqlite3.Connection]:
        """Alone with the file, which is made where it is missing; durable when it returns."""
        self._path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        with closing(sqlite3.connect(self._path, timeout=60.0, isolation_level=None)) as database:
            self._path.chmod(0o600)
            database.execute(f"PRAGMA synchronous = {'FULL' if self._durable else 'OFF'}")
            with write_transaction(database):
                (version,) = database.execute("PRAGMA user_version").fetchone()
                if version == 0:
                    for statement in _SCHEMA.split(";")[:-1]:
                        database.execute(statement)
                    database.execute(f"PRAGMA user_version = {_VERSION}")
                elif version != _VERSION:
                    raise AgreementRefusal(
                        "config-changed",
                        f"{self._path.name} is of format {version}, which this version of "
                        "consilium does not read",
                        "install the version of consilium that wrote it, or a newer one",
                    )
                yield database


def _known(database: sqlite3.Connection, run: str, config: bytes, most_a_day: int) -> bool:
    """Whether the hospital takes part in ``run`` already; AgreementRefusal if it may not."""
    row = database.execute("SELECT config FROM runs WHERE run = ?", (run,)).fetchone()
    if row is not None and row[0] != config:
        raise AgreementRefusal(
            "config-changed",
            f"the config of run {run} is not the one with which this hospital has taken part in it",
            "start a new run; treat the server as hostile if nobody has changed a key",
        )
    if row is not None:
        return True
    since = time.time() - _DAY
    (count,) = database.execute("SELECT count(*) FROM runs WHERE admitted > ?", (since,)).fetchone()
    if count >= most_a_day:
        raise AgreementRefusal(
            "runs-a-day",
            f"this hospital has taken part in {count} new runs within a day, as many as its policy "
            "allows",
            "wait; or the hospital raises [compute] max-runs-a-day in its policy",
        )
    return False


def smallest_group(cohorts: Iterable[set[str]]) -> set[str]:
    """The smallest set of hospitals that ``cohorts`` tell apart from all others; empty without any.

    Two hospitals are in one group if they are in the same cohorts. Sums over the cohorts, added and
    subtracted in any way, are sums over whole groups.
    """
    lists = list(cohorts)
    groups: dict[tuple[bool, ...], set[str]] = {}
    for hospital in set().union(*lists):
        groups.setdefault(tuple(hospital in one for one in lists), set()).add(hospital)
    return min(groups.values(), key=lambda group: (len(group), sorted(group)), default=set())
