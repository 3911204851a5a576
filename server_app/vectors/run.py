"""A run of vectors from preparation to summary: data and base, the loop, what is left behind."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flwr.serverapp import Grid

from common.config import RunConfig
from common.devices import usable_cores
from common.errors import ConfigError, ConsiliumError
from common.files import read_json
from common.model import ModelSpec
from common.roster import load_roster
from common.vectors import Rule
from server_app.directory import Directory
from server_app.evaluation import Evaluator
from server_app.first_base import first_base
from server_app.progress import Progress
from server_app.registry import Registry
from server_app.report import write_report
from server_app.run_store import RunStore, versions
from server_app.setting import Setting
from server_app.vectors.acceptance import limits_of
from server_app.vectors.ensemble import FOLDER, forget_ensemble, write_ensemble
from server_app.vectors.federated import FederatedJudge, check_cohort
from server_app.vectors.keys import Keys
from server_app.vectors.post import Post
from server_app.vectors.public import Judge, judging_images
from server_app.vectors.record import Journal, influence_rows
from server_app.vectors.strategy import Vectors
from server_app.vectors.summary import by_hospital, summary_table

GREETING = 10.0
"""Seconds that a real node has to tell its name before the loop goes on without it.

Simulated ones share a few processes: greeted while others train, they would never be in time.
"""


@dataclass
class VectorsRun:
    """Everything that one run of vectors needs at the server."""

    config: RunConfig
    setting: Setting
    store: RunStore
    progress: Progress
    registry: Registry
    vectors: Vectors
    earlier: float
    """Seconds that earlier parts of a resumed run took."""

    @classmethod
    def prepare(cls, grid: Grid, config: RunConfig) -> VectorsRun:
        """Load the data and the base, open the run's directory; no hospital is asked anything."""
        progress = Progress(0)
        roster = load_roster(Path(config.roster), config.coordinator_key) if config.roster else None
        setting = Setting.of(config, len(list(grid.get_node_ids())), roster)
        _check_reachable(config, setting.hospitals)
        check_cohort(config, setting.hospitals)
        spec = ModelSpec.of(config, num_classes=len(setting.class_names), channels=setting.channels)
        base = None if config.resume else first_base(config, spec)
        images = judging_images(config)
        store, earlier = _open_store(config)
        cores = usable_cores()
        judge = None if images is None else Judge(spec, images, threads=cores)
        test = None
        if setting.test is not None:
            test = Evaluator(spec, setting.test, setting.class_names, threads=cores)
        progress.say(f"run {store.run}")
        progress.say(f"data: {setting.source}")
        if setting.table:
            store.save_partition(setting.table)
            progress.partition(setting.table)
        _say_what_is_doubtful(config, progress, judge, setting.hospitals, roster is not None)
        panel = None
        if config.judged_by == "hospitals":
            panel = FederatedJudge(
                grid, config, store.run, store.directory / "judging.json",
                hospitals=setting.hospitals, say=progress.say, roster=roster,
            )  # fmt: skip
            progress.say("new bases are judged by the hospitals: of their counts, sums only")
        registry = Registry(store.directory / "registry", limits_of(config))
        if base is not None:
            registry.add_base(base)
        journal = Journal(
            store, registry, spec, config.as_dict() | {"resume": ""}, progress.say, test, judge
        )
        vectors = Vectors(
            config=config,
            run_id=store.run,
            hospitals=setting.hospitals,
            directory=Directory(
                grid,
                timeout=GREETING if config.dataset == "hospitals" else config.connect_timeout,
                members=setting.members,
                roster=roster,
            ),
            post=Post(grid),
            registry=registry,
            keys=Keys(roster, store.directory / "identities.json"),
            judge=judge,
            journal=journal,
            skewed=config.dataset == "hospitals" or config.partition == "dirichlet",
            panel=panel,
        )
        return cls(config, setting, store, progress, registry, vectors, earlier)

    def train(self) -> None:
        """Collect and publish until the run is over."""
        self.vectors.run()

    def conclude(self, reason: str | None, seconds: float) -> dict[str, Any]:
        """Write summary and report, of a failed run too; returns the summary."""
        try:
            summary = self._summary(reason, seconds)
            self.vectors.journal.finish(summary)
        finally:
            self.registry.close()
        summary_table(summary, self.progress.console)
        self.progress.say(f"the run's directory: {self.store.directory}")
        try:
            self.progress.say(f"report: {write_report(self.store.directory)}")
        except Exception as error:
            # Bases and summary are safe: a report that fails must not undo a good run.
            self.progress.say(
                f"! the report could not be written: {type(error).__name__}: {error}; the figures "
                "are in summary.json and metrics.jsonl"
            )
        sys.stdout.flush()
        return summary

    def _summary(self, reason: str | None, seconds: float) -> dict[str, Any]:
        c, log = self.config, self.registry.log()
        best, row = self.vectors.journal.best()
        test = row.get("test") or {}
        private = c.privacy != "none"
        found = by_hospital(self.registry)
        return {
            "run": self.store.run,
            "mode": "vectors",
            "status": "completed" if reason is None else "failed",
            "reason": reason,
            "bases": len(log.points),
            "current_version": log.line[-1].version,
            "best_version": best.version,
            "hospitals": self.setting.hospitals,
            "validation": row.get("validation"),
            "test_accuracy": test.get("accuracy"),
            "test_macro_f1": test.get("macro_f1"),
            "test_macro_auc": test.get("macro_auc"),
            "privacy": c.privacy,
            "privacy_unit": c.privacy_unit if private else None,
            "epsilon": max((e for h in found.values() for e in h["epsilons"]), default=None),
            "delta": c.delta if private else None,
            "by_hospital": found,
            "influence": influence_rows(self.vectors.judging.influence(None)),
            "ensemble": self._ensemble(),
            "secagg": False,
            "source": self.setting.source,
            "source_sha256": self.setting.sha256,
            "versions": versions(),
            "wall_seconds": round(seconds + self.earlier, 3),
        }

    def _ensemble(self) -> dict[str, Any] | None:
        """What is left where merging is refused: written, measured, said; None where it is not.

        A failure is said and noted under ``error``: the summary must not be lost with it.
        """
        folder, cores = self.store.directory / FOLDER, usable_cores()
        try:
            forget_ensemble(self.registry, folder)
            refused = self.vectors.judging.unmerged(self.vectors.current)
            if refused is None:
                return None
            made = write_ensemble(
                self.registry, folder, run=self.store.run, spec=self.vectors.journal.spec,
                classes=self.setting.class_names,
            )  # fmt: skip
            val, test = (
                {} if images is None else made.figures(images, threads=cores)
                for images in (judging_images(self.config), self.setting.test)
            )
        except (ConsiliumError, OSError) as error:
            what = error.what if isinstance(error, ConsiliumError) else str(error)
            self.progress.say(f"! the ensemble could not be made: {what}")
            return {"error": what}
        told = {
            "why": refused.code,
            "base": made.manifest.base,
            "version": made.manifest.base_version,
            "vectors": len(made.manifest.members),
            "hospitals": made.hospitals,
            "validation": val.get("accuracy"),
            "test_accuracy": test.get("accuracy"),
            "test_macro_f1": test.get("macro_f1"),
            "test_macro_auc": test.get("macro_auc"),
        }
        self.vectors.journal.ensemble(told)
        return told


def _open_store(config: RunConfig) -> tuple[RunStore, float]:
    """The run's directory, and the seconds that it has taken so far."""
    values = config.as_dict()
    if not config.resume:
        return RunStore.create(values), 0.0
    store = RunStore.resume(config.resume, values)
    try:
        return store, float(read_json(store.directory / "summary.json")["wall_seconds"])
    except (ConsiliumError, KeyError, TypeError):
        return store, 0.0


def _check_reachable(config: RunConfig, hospitals: int) -> None:
    """ConfigError where no base could ever be published by the hospitals that are expected."""
    for name, asked in (
        ("publish-every", config.publish_every), ("publish-quorum", config.publish_quorum),
    ):  # fmt: skip
        if hospitals and asked > hospitals:
            raise ConfigError(
                f"'{name}' is {asked}, and {hospitals} hospitals are expected: no base could ever "
                "be published",
                f"set {name} to at most {hospitals}",
            )


def _say_what_is_doubtful(
    config: RunConfig, progress: Progress, judge: Judge | None, hospitals: int, roster: bool
) -> None:
    if not roster:
        progress.say(
            "vectors are UNAUTHENTICATED: without a roster the first key that a hospital shows "
            "is believed"
        )
    progress.say("the server sees each hospital's vector by itself")
    if config.judged_by == "none" or (config.judged_by == "public" and judge is None):
        why = "judged-by=none" if judge is not None else "no public images"
        progress.say(f"{why}: new bases are published WITHOUT being judged")
    rule = Rule.from_text(config.merge_rule)
    if warning := rule.warning(max(hospitals, 1)):
        progress.say(f"WARNING: {warning}")
    if config.publish_every == 1 and config.publish_quorum == 1 and rule.scale > 0.5:
        progress.say(
            "WARNING: a full step for each arrival was measured to swing between 44 and 90 %; "
            "use merge-rule='mean scale=0.3', or publish-every of 3 or more"
        )
