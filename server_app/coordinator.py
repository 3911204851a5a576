"""A run from preparation to report: data and model, the strategy, the summary."""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from flwr.serverapp import Grid

from common.aggregation import params_for
from common.config import RunConfig
from common.devices import usable_cores
from common.errors import ConsiliumError
from common.files import read_json
from common.model import ModelSpec
from common.roster import load_roster
from server_app.defence.agreed import agreed_images
from server_app.defence.defence import Defence
from server_app.defence.public import public_judge
from server_app.directory import Directory, sample_size
from server_app.evaluation import Evaluator
from server_app.fedavg import FedAvg
from server_app.first_base import first_base
from server_app.progress import Progress
from server_app.report import write_report
from server_app.run_store import RunStore, versions
from server_app.server_step import ServerStep
from server_app.setting import Setting


@dataclass
class Coordinator:
    """Everything that one run needs at the server."""

    config: RunConfig
    setting: Setting
    directory: Directory
    store: RunStore
    progress: Progress
    fedavg: FedAvg

    @classmethod
    def prepare(cls, grid: Grid, config: RunConfig) -> Coordinator:
        """Load the data, divide it, open the run's directory; nothing is asked of a hospital.

        See :class:`~server_app.setting.Setting` for what the coordinator reads.
        """
        progress = Progress(config.rounds)
        roster = load_roster(Path(config.roster), config.coordinator_key) if config.roster else None
        setting = Setting.of(config, len(list(grid.get_node_ids())), roster)
        if config.secagg:
            # Or refused here, now.
            params_for(config, sample_size(config.fraction, setting.hospitals))
        spec = ModelSpec.of(config, num_classes=len(setting.class_names), channels=setting.channels)
        start = {} if config.resume else first_base(config, spec).weights
        if config.resume:
            store = RunStore.resume(config.resume, config.as_dict())
        else:
            store = RunStore.create(config.as_dict())
        progress.say(f"run {store.run}")
        progress.say(f"data: {setting.source}")
        if setting.table:
            store.save_partition(setting.table)
            progress.partition(setting.table)
        evaluator = None
        if setting.test is not None:
            # Hospitals wait meanwhile, and no model depends on it: all cores.
            cores = usable_cores()
            evaluator = Evaluator(
                spec,
                setting.test,
                setting.class_names,
                threads=cores,
                views=config.test_views,
                precision=config.precision,
                device=config.device,
            )
        if config.secagg and roster is None:
            progress.say(
                "secure aggregation is UNAUTHENTICATED: without a roster a server that lies could "
                "stand between the hospitals"
            )
        directory = Directory(grid, members=setting.members, roster=roster)
        step = ServerStep.of(config, spec) if config.server_step else None
        agreed = agreed_images(config, setting.table)
        defence = Defence(config, agreed, public_judge(config, spec), say=progress.say)
        if config.defence and not agreed:
            progress.say(
                "no numbers of images were agreed on at admission: a hospital may claim up to "
                f"{config.max_examples}"
            )
        fedavg = FedAvg(
            grid, config, directory, spec, store, progress, start, evaluator, step, roster, defence
        )
        return cls(config, setting, directory, store, progress, fedavg)

    def train(self) -> None:
        """Wait for the hospitals, then all rounds.

        Of real hospitals a quorum is enough to begin: one may be away for days. So it is with a
        roster: a node that is not who it says must not stop the others.
        """
        all_of_them = self.setting.hospitals
        least = all_of_them
        if self.config.dataset == "hospitals" or self.config.roster:
            least = max(1, math.ceil(self.config.quorum * all_of_them - 1e-9))
        there = self.directory.wait_for(
            all_of_them, timeout=self.config.connect_timeout, least=least, say=self.progress.say
        )
        if there < all_of_them:
            self.progress.say(f"{there} of {all_of_them} hospitals are there: beginning with them")
        self.fedavg.run()

    def conclude(self, reason: str | None, seconds: float) -> dict[str, Any]:
        """Write summary and report, of a failed run too; returns the summary."""
        try:
            self._measure_what_was_not_due()
        except Exception as error:
            # Of a run that failed, the model may be what cannot be measured; what a run has spent
            # and kept must be told in any case.
            self.progress.say(f"a model could not be measured: {type(error).__name__}: {error}")
        summary = self._summary(reason, seconds)
        self.store.finish(summary)
        self.progress.summary(summary, self.store.directory)
        try:
            write_report(self.store.directory)
        except Exception as error:
            # The figures are safe in the summary: a report that fails must not undo a good run.
            self.progress.say(f"the report could not be written: {type(error).__name__}: {error}")
        sys.stdout.flush()
        return summary

    def _measure_what_was_not_due(self) -> None:
        """Central test figures of the best round and the last, which every run shows."""
        last, evaluate = self.store.last_round(), self.fedavg.evaluate
        if last is None or evaluate is None:
            return
        found = {r["round"]: r["test"] for r in self.store.records}
        for number in {self.store.best_round(), last}:
            if found[number] is None:
                self.store.set_test(number, evaluate(self.store.load_model(number)))

    def _summary(self, reason: str | None, seconds: float) -> dict[str, Any]:
        records = self.store.records
        best = self.store.best_round()
        test: Mapping[str, Any] = next(
            (r["test"] for r in records if r["round"] == best and r["test"]), {}
        )
        spent = self._spent()
        disagreeing = sorted(name for name, e in spent.items() if not e["agree"])
        if disagreeing:
            self.progress.say(
                f"WARNING: the accountants differ by more than 2 % for {', '.join(disagreeing)}: "
                "the larger figure is shown, and neither should be relied on"
            )
        before = self._earlier_seconds()
        return {
            "run": self.store.run,
            "status": "completed" if reason is None else "failed",
            "reason": reason,
            "rounds": self.store.last_round() or 0,
            "failed_rounds": [r["round"] for r in records if r["status"] == "failed"],
            "rolled_back_rounds": rolled_back_rounds(records),
            "defence": self.fedavg.guard.defence.summary() if self.config.defence else None,
            "best_round": best,
            "hospitals": self.setting.hospitals,
            "test_accuracy": test.get("accuracy"),
            "test_macro_f1": test.get("macro_f1"),
            "test_macro_auc": test.get("macro_auc"),
            "privacy": self.config.privacy,
            "privacy_unit": self.config.privacy_unit if self.config.privacy != "none" else None,
            "epsilon": self._epsilon(spent),
            "epsilon_by_hospital": spent,
            "epsilon_against": self._against(),
            "accountants_agree": not disagreeing if spent else None,
            "delta": self.config.delta if self.config.privacy != "none" else None,
            "secagg": self.config.secagg,
            "source": self.setting.source,
            "source_sha256": self.setting.sha256,
            "versions": versions(),
            "wall_seconds": round(seconds + before, 3),
        }

    def _epsilon(self, spent: Mapping[str, Mapping[str, Any]]) -> float | None:
        """What was spent; of real hospitals, who tell nobody, what they were promised at most."""
        if self.config.dataset == "hospitals" and self.config.privacy != "none":
            return self.config.epsilon
        return max((e["epsilon"] for e in spent.values()), default=None)

    def _against(self) -> dict[str, float] | None:
        """Against whom which ε holds, where the noise is shared; over the whole plan."""
        if self.config.privacy != "distributed":
            return None
        from common.privacy.against import against
        from common.privacy.plan import Promise

        return asdict(against(Promise.of(self.config)))

    def _spent(self) -> dict[str, dict[str, Any]]:
        """Each hospital's ε so far, from the latest round in which it reported one."""
        from common.privacy import Epsilon

        latest: dict[str, dict[str, Any]] = {}
        for record in self.store.records:
            for name, e in (record.get("epsilon_by_hospital") or {}).items():
                agree = Epsilon(e["prv"], e["pld"]).agree
                latest[name] = {**e, "agree": agree}
        return dict(sorted(latest.items()))

    def _earlier_seconds(self) -> float:
        """Wall time that earlier parts of a resumed run took."""
        if not self.config.resume:
            return 0.0
        try:
            return float(read_json(self.store.directory / "summary.json")["wall_seconds"])
        except (ConsiliumError, KeyError, TypeError):
            return 0.0


def rolled_back_rounds(records: Sequence[Mapping[str, Any]]) -> list[int]:
    """Rounds whose model was found to harm, and was undone or made smaller."""
    told = [r["defence"]["rolled_back"] for r in records if "rolled_back" in r.get("defence", {})]
    return sorted({int(one["round"]) for one in told})
