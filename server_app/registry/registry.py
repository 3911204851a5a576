"""The registry: bases and vectors that survive every restart; counts no vector twice.

Exclusion, inclusion and withdrawal make the line of bases anew from the first publication that
they concern, bit for bit as if things had been so from the start.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass

from common.vectors import SignedVector, TaskVector, VectorError, Withdrawal, check_fit
from common.vectors.vector import now
from server_app.registry.history import (
    ACCEPTED,
    EXCLUDED,
    RETIRED,
    SUPERSEDED,
    WITHDRAWN,
    Log,
    VectorRow,
)
from server_app.registry.line import BaseLine


@dataclass(frozen=True)
class Accepted:
    """What became of an envelope. ``duplicate``: it was here before, and nothing was changed.

    ``superseded``: a newer vector of the same hospital and base counts instead.
    """

    serial: str
    hospital: str
    duplicate: bool
    superseded: bool
    staleness: int


@dataclass(frozen=True)
class Entry:
    """A vector as it is listed. ``staleness``: None if its base is not of the line (any more).

    ``published_in``: the version whose recipe it is in. ``state``: accepted, superseded,
    excluded or withdrawn.
    """

    row: VectorRow
    state: str
    staleness: int | None
    published_in: int | None


class Registry(BaseLine):
    """The registry in a folder. Safe among processes; not shared among threads.

    ``identities``, where asked for: the roster's Ed25519 public keys (32 bytes) by hospital.
    """

    def vectors(self) -> list[Entry]:
        """Every vector that ever came, in the order of arrival."""
        log = self.log()
        return [
            Entry(v, log.states[v.serial], log.staleness(v.base), log.published_in.get(v.serial))
            for v in log.vectors
        ]

    def accept(self, envelope: bytes, identities: Mapping[str, bytes]) -> Accepted:
        """Check and store a vector. The same envelope again changes nothing, and says so.

        VectorError with the codes of :mod:`common.vectors.checks`; nothing is stored then.
        """
        signed = SignedVector.from_bytes(envelope, limit=self.limits.max_bytes)
        vector = signed.vector
        signed.verify(_key(vector.hospital, identities))
        digest = hashlib.sha256(envelope).hexdigest()
        with self._store.alone():
            log = self._store.log()
            known = [v for v in log.vectors if v.serial == vector.serial]
            if not known:
                norm = self._check(log, vector)
                self._store.write_vector(vector.serial, envelope)
                self._insert(vector, norm, digest)
                log = self._store.log()
            elif known[0].state == WITHDRAWN:
                raise _withdrawn(vector.serial)
            elif known[0].digest != digest:
                raise VectorError(
                    "vector-serial",
                    f"another vector with the serial {vector.serial} is here",
                    "choose a new random serial for each vector",
                )
            return Accepted(
                vector.serial,
                vector.hospital,
                duplicate=bool(known),
                superseded=log.states[vector.serial] == SUPERSEDED,
                staleness=log.staleness(vector.base) or 0,
            )

    def exclude(self, serial: str, reason: str) -> None:
        """Let a vector count no more; the bases that it is in are made anew without it.

        Its hospital's older vector for the same base does not come back in its place.
        VectorError (``registry-vector``) for an unknown one, ``vector-withdrawn``.
        """
        self._set_state(serial, EXCLUDED, reason)

    def include(self, serial: str) -> None:
        """Let an excluded vector count again, as if it had never been excluded."""
        self._set_state(serial, ACCEPTED, "")

    def withdraw(self, withdrawal: bytes, identities: Mapping[str, bytes]) -> None:
        """A hospital takes its vector back: its file is deleted, its row stays as a tombstone.

        The bases that it is in are made anew without it, as if it had never come. Its serial is
        never accepted again, even if the vector was not here yet. Once more changes nothing.
        VectorError: ``vector-format``, ``vector-hospital``, ``vector-signature``,
        ``vector-serial`` if the vector is another hospital's.
        """
        asked = Withdrawal.from_bytes(withdrawal)
        asked.verify(_key(asked.hospital, identities))
        with self._store.alone():
            log = self._store.log()
            known = [v for v in log.vectors if v.serial == asked.serial]
            if known and known[0].hospital != asked.hospital:
                raise VectorError(
                    "vector-serial",
                    f"the vector {asked.serial} is not {asked.hospital}'s",
                    "withdraw one's own vectors only",
                )
            if not known or known[0].state != WITHDRAWN:
                tombstone = {
                    "serial": asked.serial, "hospital": asked.hospital, "base": "", "bucket": 0,
                    "epsilon": None, "delta": None, "metrics": "{}", "norm": 0.0, "digest": "",
                    "created": "", "arrived": now(), "state": WITHDRAWN, "reason": "",
                }  # fmt: skip
                if known:
                    kept = ("seq", "base", "epsilon", "delta", "arrived")
                    tombstone |= {name: getattr(known[0], name) for name in kept}
                self._store.insert("vectors", **tombstone)
                self._bring_in_line()
        self._store.sweep()

    def _check(self, log: Log, vector: TaskVector) -> float:
        version, staleness = log.version_of(vector.base), log.staleness(vector.base)
        if version is None or staleness is None:
            raise VectorError(
                "vector-base",
                f"{vector.hospital}'s vector is for base {vector.base[:16]}, which is not here",
                "fine-tune the current base",
            )
        row = next(base for base in log.line if base.version == version)
        oldest = self.limits.max_staleness
        if row.state == RETIRED or (oldest is not None and staleness > oldest):
            raise VectorError(
                "vector-stale",
                f"{vector.hospital}'s vector is for base {version}, which is too old by now",
                "fine-tune the current base",
            )
        siblings = log.siblings(vector.hospital, vector.base)
        if any(v.serial in log.published_in for v in siblings):
            raise VectorError(
                "vector-used",
                f"{vector.hospital}'s vector for base {version} is in a published base already",
                "fine-tune the current base",
            )
        if len(siblings) >= self.limits.max_replacements:
            raise VectorError(
                "vector-many",
                f"{vector.hospital} has sent {len(siblings)} vectors for base {version}",
                "withdraw one of them, or wait for the next base",
            )
        norms = [v.norm for v in log.counting()]
        return check_fit(vector, self._template(log), norms, self.limits)

    def _template(self, log: Log) -> Mapping[str, tuple[int, ...]]:
        """The same for every base of the line."""
        if self._shapes is None:
            self._shapes = self._store.load_base(log.line[0]).template()
        return self._shapes

    def _insert(self, vector: TaskVector, norm: float, digest: str) -> None:
        self._store.insert(
            "vectors",
            serial=vector.serial,
            hospital=vector.hospital,
            base=vector.base,
            bucket=vector.bucket,
            epsilon=vector.epsilon,
            delta=vector.delta,
            metrics=json.dumps(dict(vector.metrics), sort_keys=True),
            norm=norm,
            digest=digest,
            created=vector.created,
            arrived=now(),
            state=ACCEPTED,
            reason="",
        )

    def _set_state(self, serial: str, state: str, reason: str) -> None:
        with self._store.alone():
            known = [v for v in self._store.log().vectors if v.serial == serial]
            if not known:
                raise VectorError(
                    "registry-vector", f"there is no vector {serial}", "list the vectors"
                )
            if known[0].state == WITHDRAWN:
                raise _withdrawn(serial)
            self._store.execute(
                "UPDATE vectors SET state=?, reason=? WHERE serial=?", [state, reason, serial]
            )
            self._bring_in_line()
        self._store.sweep()


def _key(hospital: str, identities: Mapping[str, bytes]) -> bytes:
    if hospital not in identities:
        raise VectorError(
            "vector-hospital",
            f"the roster of today has no hospital {hospital}",
            "enrol it, or extend its time in the roster",
        )
    return identities[hospital]


def _withdrawn(serial: str) -> VectorError:
    return VectorError(
        "vector-withdrawn",
        f"the vector {serial} was withdrawn by its hospital",
        "nothing: it never counts again; a new vector needs a new serial",
    )
