"""Which run's registry is meant, and by what its candidates are judged."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common.config import RunConfig
from common.errors import ConfigError, ConsiliumError
from common.files import consilium_home, read_json
from common.messages import check_run_id
from common.vectors import (
    Gate,
    InfluenceTable,
    Rule,
    evaluation_gate,
    leave_one_out,
    margin,
)
from server_app.registry import Registry


@dataclass(frozen=True)
class Place:
    """A run of vectors on this machine."""

    directory: Path
    config: RunConfig

    @classmethod
    def of(cls, run: str, federation: str = "") -> Place:
        """By id (of ``federation``'s runs, by its folder or name) or directory; ConfigError."""
        directory = Path(run).expanduser()
        if not (directory / "registry").is_dir():
            runs = consilium_home() / "runs"
            if federation:
                from deploy.server.run import Place as Federation

                runs = Federation.of(federation).runs()
            directory = runs / check_run_id(run)
        if not (directory / "registry").is_dir():
            raise ConfigError(
                f"there is no run of vectors in {directory}",
                "give the run's id or its directory; --federation for a federation's runs",
            )
        values = dict(read_json(directory / "config.json")) | {"resume": ""}
        return cls(directory, RunConfig.parse(values))

    def open(self) -> Registry:
        """The run's registry; a server that runs meanwhile sees what is done."""
        from server_app.vectors.acceptance import limits_of

        return Registry(self.directory / "registry", limits_of(self.config), create=False)

    def current(self, registry: Registry) -> str:
        """Which base is current, and whether the run's files are still those of another one.

        Only the run's server writes them: at once while it runs, else when the run goes on.
        """
        base = registry.current()
        said = f"the current base is {base.version} ({base.id[:16]})"
        try:
            note = read_json(self.directory / "base.json")
            behind = (note["base-version"], note["base"]) != (base.version, base.id)
        except (ConsiliumError, KeyError, TypeError):
            behind = True
        if behind:
            said += (
                "; base, model and best.safetensors in the run's directory are still of another: "
                f"its server writes them anew, once the run goes on (resume={self.directory.name})"
            )
        return said

    def judge(self) -> Any:
        """Accuracy of weights on the run's public images; None if it has none. Needs torch."""
        from server_app.vectors.base import read_base
        from server_app.vectors.public import Judge, judging_images

        images = judging_images(self.config)
        _, note = read_base(self.directory / "base.safetensors")
        return None if images is None else Judge(note.spec, images, threads=self.config.threads)

    def gate(self, judge: Any) -> Gate:
        """The gate that the run itself would use with these public images (:meth:`judge`)."""
        return evaluation_gate(judge, count=judge.count, errors=self.config.publish_margin)

    def rule(self, text: str = "") -> Rule:
        """The given merge rule, or the run's."""
        return Rule.from_text(text or self.config.merge_rule)

    @property
    def skewed(self) -> bool:
        """As the run sees it."""
        return self.config.dataset == "hospitals" or self.config.partition == "dirichlet"

    def influence(self, registry: Registry, judge: Any) -> InfluenceTable:
        """Leave-one-out of what the next base would be; ConfigError without public images."""
        if judge is None:
            raise ConfigError(
                "the run has no public images to measure influence on",
                "set test-data to the coordinator's own npz file in the next run",
            )
        proposal = registry.candidate(self.rule())
        hospitals = {row.hospital for row in registry.log().counting()}
        return leave_one_out(
            hospitals,
            lambda name: proposal.weights if name is None
            else registry.weights_without(name, self.rule()),
            judge,
            margin=margin(judge(proposal.weights), judge.count, errors=2.0),
        )  # fmt: skip

    def last_influence(self) -> dict[str, Any]:
        """As the run's summary has it; empty if it has none."""
        path = self.directory / "summary.json"
        return dict(read_json(path).get("influence") or {}) if path.exists() else {}
