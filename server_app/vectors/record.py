"""What a run of vectors leaves behind, and what a person sees of it while it goes on.

``metrics.jsonl`` has a line for each arrival, refusal, withdrawal and base; ``base.safetensors``
and ``base.json`` are the current base, for hospitals that work offline; ``model.safetensors`` its
weights alone, ``best.safetensors`` those of the base that validates best. The registry holds the
truth: lines that a kill has lost are made from it when the run goes on.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict
from datetime import UTC, datetime
from typing import Any

import numpy as np
from safetensors.numpy import save

from common.config import Value
from common.federation_file import TIME
from common.files import atomic_write
from common.model import ModelSpec
from common.vectors import Base, GateResult, InfluenceTable, TaskVector, VectorError
from server_app.progress import percent
from server_app.registry import Accepted, Registry, VectorRow
from server_app.registry.history import ACCEPTED, WITHDRAWN
from server_app.run_store import RunStore
from server_app.vectors.base import write_base
from server_app.vectors.ensemble import FOLDER, forget_ensemble

Test = Callable[[Mapping[str, np.ndarray]], dict[str, Any]]
Row = dict[str, Any]


class Journal:
    """Writes the run's lines and files, and says each in a sentence."""

    def __init__(
        self, store: RunStore, registry: Registry, spec: ModelSpec, config: Mapping[str, Value],
        say: Callable[[str], None], test: Test | None, judge: Callable[..., float] | None,
    ) -> None:  # fmt: skip
        self.store, self.registry, self.spec, self.config = store, registry, spec, config
        self.say, self._test, self._judge = say, test, judge
        self._troubles: dict[str, str] = {}
        self._open()

    @property
    def rows(self) -> list[Row]:
        """Every line so far."""
        return self.store.records

    def _open(self) -> None:
        """The first base's line; and what a kill has lost."""
        base = self.registry.current()
        if not any(r["event"] == "base" for r in self.rows):
            self.base(base, "first")
        known = {r["serial"] for r in self.rows if r["event"] == "arrival"}
        log = self.registry.log()
        for row in log.vectors:
            if row.digest and row.serial not in known:
                late = log.late_at_arrival(row)
                self._write(self._arrived(row, late, None) | {"time": row.arrived})
            if row.state == WITHDRAWN and not self._told(row.serial):
                self.withdrawal(row.hospital, row.serial)
        last = [r for r in self.rows if r["event"] == "base"][-1]
        if base.version > last["version"]:
            self.base(base, "published before the run was stopped")
        elif last["base"] != base.id or last["version"] != base.version:
            how = "made anew" if last["version"] == base.version else "current again, by hand,"
            self.base(base, f"{how} while the run was stopped")
        self._files(base)
        forget_ensemble(self.registry, self.store.directory / FOLDER)

    def arrival(self, row: VectorRow, accepted: Accepted, validation: float | None) -> None:
        """A vector was accepted; ``validation``: of the candidate with it."""
        self._write(self._arrived(row, accepted.staleness, validation)
                    | {"superseded": accepted.superseded})  # fmt: skip
        cost = "no privacy" if row.epsilon is None else f"ε {row.epsilon:.2f}"
        late = f", {accepted.staleness} bases late" if accepted.staleness else ""
        judged = "" if validation is None else f"; the candidate validates at {percent(validation)}"
        self.say(f"{row.hospital}: vector of norm {row.norm:.3g}, {row.bucket} images or more, "
                 f"{cost}{late}{judged}")  # fmt: skip
        self._troubles.pop(row.hospital, None)

    def refused(self, hospital: str, vector: TaskVector | None, error: VectorError) -> None:
        """What a hospital sent was refused."""
        row = {"event": "refused", "hospital": hospital, "code": error.code}
        self._write(row | {"serial": vector.serial if vector else None})
        self.say(f"! {hospital}: refused ({error.code}): {error.what}")

    def refusal(self, hospital: str, code: str, correlation_id: str) -> None:
        """A hospital refused."""
        self._write({"event": "refusal", "hospital": hospital, "code": code, "id": correlation_id})
        self.say(f"! {hospital} refused: {code} (id {correlation_id} in its log)")

    def excluded(self, row: VectorRow, reason: str) -> None:
        """A vector was excluded."""
        self._write({"event": "excluded", "hospital": row.hospital, "serial": row.serial,
                     "reason": reason})  # fmt: skip
        self.say(f"! {row.hospital}: its vector is excluded: {reason}")
        forget_ensemble(self.registry, self.store.directory / FOLDER)

    def withdrawal(self, hospital: str, serial: str) -> None:
        """A hospital took a vector back. Told twice (the receipt was lost), it has one line."""
        if self._told(serial):
            return
        self._write({"event": "withdrawal", "hospital": hospital, "serial": serial})
        self.say(f"{hospital} takes vector {serial} back")
        forget_ensemble(self.registry, self.store.directory / FOLDER)

    def _told(self, serial: str) -> bool:
        """Whether there is a line for the withdrawal of this vector."""
        return any(r["event"] == "withdrawal" and r["serial"] == serial for r in self.rows)

    def trouble(self, hospital: str, what: str) -> None:
        """Something went wrong on the way; said once while it stays the same."""
        plain = what.partition(" (id ")[0]
        if self._troubles.get(hospital) != plain:
            self._troubles[hospital] = plain
            self.say(f"! {hospital}: {what}" if hospital else f"! {what}")

    def held(
        self, version: int, error: VectorError, result: GateResult | None,
        influence: InfluenceTable | None,
    ) -> None:  # fmt: skip
        """A candidate was not published."""
        self._write({
            "event": "held", "version": version, "code": error.code,
            "gate": result.to_dict() if result else None, "influence": influence_rows(influence),
        })  # fmt: skip
        self.say(f"! no new base ({error.code}): {error.what}")
        self._say_harmful(influence)

    def base(
        self, base: Base, why: str, *, influence: InfluenceTable | None = None
    ) -> None:  # fmt: skip
        """Another base is current: its line, with what it is made of, and its files."""
        self._files(base)
        made_of, gate = self._recipe(base)
        hospitals = sorted({row.hospital for row in made_of})
        validation = self._judge(base.weights) if self._judge else None
        test = self._test(base.weights) if self._test else None
        self._write({
            "event": "base", "version": base.version, "base": base.id, "why": why,
            "hospitals": hospitals, "vectors": len(made_of), "gate": gate,
            "validation": validation, "test": test, "influence": influence_rows(influence),
        })  # fmt: skip
        what = f"base {base.version} ({why})"
        if base.version:
            what += f" of {len(made_of)} vectors, {len(hospitals)} hospitals"
        if validation is not None:
            what += f"; validation {percent(validation)}"
        if test is not None:
            what += f"; test accuracy {percent(test['accuracy'])}"
        self.say(what)
        self._say_harmful(influence)

    def _recipe(self, base: Base) -> tuple[list[VectorRow], Row | None]:
        """The vectors that ``base`` is made of today, and what its judges said when it came.

        Nothing of one that is not of the line (any more), or is its first.
        """
        log = self.registry.log()
        if (base.version, base.id) not in {(row.version, row.id) for row in log.line}:
            return [], None
        gates = {point.version: json.loads(point.gate) for point in log.points}
        return [i.row for i in log.recipes.get(base.version, ())], gates.get(base.version)

    def ensemble(self, told: Row) -> None:
        """Nothing is merged, and the ensemble of the hospitals' models was written instead."""
        self._write({"event": "ensemble"} | told)
        self.say(
            f"nothing is merged ({told['why']}); the softmax ensemble of {told['vectors']} "
            f"models, {len(told['hospitals'])} hospitals, is in the run's directory: test accuracy "
            f"{percent(told['test_accuracy'])}, validation {percent(told['validation'])}; "
            f"consilium vectors ensemble {self.store.run}"
        )

    def _say_harmful(self, influence: InfluenceTable | None) -> None:
        for row in influence.rows if influence else ():
            if row.harmful:
                self.say(f"! {row.hospital} harms: {percent(row.without)} without it, "
                         f"{percent(influence.accuracy if influence else None)} with it; "
                         "consilium vectors exclude")  # fmt: skip

    def _arrived(self, row: VectorRow, staleness: int, validation: float | None) -> Row:
        log = self.registry.log()
        return {
            "event": "arrival", "hospital": row.hospital, "serial": row.serial,
            "version": log.version_of(row.base), "staleness": staleness, "norm": row.norm,
            "bucket": row.bucket, "epsilon": row.epsilon, "delta": row.delta,
            "metrics": json.loads(row.metrics), "validation": validation,
        }  # fmt: skip

    def _write(self, row: Row) -> None:
        self.rows.append({"time": datetime.now(UTC).strftime(TIME)} | row)
        lines = "".join(json.dumps(r, ensure_ascii=False) + "\n" for r in self.rows)
        atomic_write(self.store.directory / "metrics.jsonl", lines)

    def _files(self, base: Base) -> None:
        folder = self.store.directory
        write_base(folder / "base.safetensors", base, self.spec, run=self.store.run,
                   config=self.config)  # fmt: skip
        atomic_write(folder / "model.safetensors", _plain(base))
        if (folder / "best.safetensors").exists():
            # Of an earlier part of the run: that base may have been made anew since.
            self._best_file()

    # The end

    def best(self) -> tuple[Base, Row]:
        """The base of the line that validates best, and its line here; else the current one.

        By public images; where there are none, by what hospitals said of it with their vectors.
        """
        line = {b.id: b.version for b in self.registry.log().line}
        rows = {r["base"]: r for r in self.rows if r["event"] == "base" and r["base"] in line}
        told = hospitals_validation(self.registry)
        scored = [
            (score, -line[id_], id_)
            for id_, r in rows.items()
            if (score := r["validation"] if r["validation"] is not None else told.get(id_))
            is not None
        ]
        current = self.registry.current()
        chosen = max(scored)[2] if scored else current.id
        return self.registry.base(line[chosen]), rows.get(chosen, {})

    def finish(self, summary: dict[str, Any]) -> None:
        """The best base under its name, and the summary."""
        self._best_file()
        atomic_write(self.store.directory / "summary.json",
                     json.dumps(summary, indent=2, ensure_ascii=False) + "\n")  # fmt: skip

    def _best_file(self) -> None:
        best, _ = self.best()
        atomic_write(self.store.directory / "best.safetensors", _plain(best))


def hospitals_validation(registry: Registry) -> dict[str, float]:
    """Base id → accuracy on the validation images of the hospitals that told it with vectors.

    Each once: of what was superseded, excluded or withdrawn nothing counts.
    """
    sums: dict[str, list[float]] = {}
    for row in (e.row for e in registry.vectors() if e.state == ACCEPTED):
        metrics = json.loads(row.metrics)
        if metrics.get("val-examples", 0.0) > 0 and "val-correct" in metrics:
            total = sums.setdefault(row.base, [0.0, 0.0])
            total[0] += metrics["val-correct"]
            total[1] += metrics["val-examples"]
    return {base: min(max(c / n, 0.0), 1.0) for base, (c, n) in sums.items()}


def influence_rows(table: InfluenceTable | None) -> dict[str, Any] | None:
    """An influence table as it is kept; None stays None."""
    return None if table is None else asdict(table)


def _plain(base: Base) -> bytes:
    return save({k: np.asarray(v, order="C") for k, v in base.weights.items()})
