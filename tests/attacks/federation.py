"""Hospitals with policies, identities and a roster, in one process; a server that may lie."""

from __future__ import annotations

import base64
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from flwr.app import Message, RecordDict

from client_app.app import app
from common.aggregation import flat_length, layout_for, params_for, terms_for
from common.config import KEYS, RunConfig
from common.files import consilium_home
from common.messages import Job, Refusal
from common.model import ModelSpec, Weights, build, get_weights, weights_digest
from common.secagg import Identity, Roster, RosterEntry, RoundBinding
from deploy.inprocess import InProcessGrid
from server_app.rounds import Outcome
from server_app.secure_round import secure_round
from server_app.server_step import ServerStep

SMALL: dict[str, Any] = {key.name: key.default for key in KEYS} | {
    "dataset": "synthetic", "synthetic-size": 300, "partition": "iid", "model-width": 0.03125,
    "partition-min-size": 5, "privacy": "none", "stage-timeout": 120.0, "round-timeout": 600.0,
}  # fmt: skip
NOT_PRIVATE = "allow-non-private = true"
_POLICY = """version = 1
[aggregation]
secagg = "required"
min-cohort = 4
min-threshold = 4
require-roster = true
[privacy]
{privacy}
"""


@dataclass
class Federation:
    """``count`` hospitals as real ones would be, but for their pictures, which are drawn."""

    grid: InProcessGrid
    config: RunConfig
    roster: Mapping[str, bytes]
    nodes: dict[int, dict[str, Any]]

    @classmethod
    def of(
        cls,
        count: int,
        values: Mapping[str, Any] | None = None,
        *,
        privacy: str = NOT_PRIVATE,
        agreed: int | None = None,
    ) -> Federation:
        """A run of SMALL with ``values``; ``privacy``: lines of the policies' table [privacy];
        ``agreed``: images that the roster lets each count for."""
        root = consilium_home()
        root.mkdir(parents=True, exist_ok=True)
        (root / "policy.toml").write_text(_POLICY.format(privacy=privacy))
        coordinator = Identity.generate()
        identities = {f"hospital-{i:02d}": Identity.generate() for i in range(count)}
        entries = tuple(
            RosterEntry(name, identity.public, "2020-01-01", "2099-01-01", agreed)
            for name, identity in identities.items()
        )
        (root / "roster.json").write_bytes(Roster("fed", entries).sign(coordinator))
        nodes = {}
        for i, identity in enumerate(identities.values()):
            (root / f"identity-{i}").write_bytes(identity.private_bytes())
            nodes[i] = {
                "policy": str(root / "policy.toml"), "identity": str(root / f"identity-{i}"),
                "roster": str(root / "roster.json"),
                "coordinator-key": base64.b64encode(coordinator.public).decode(),
            }  # fmt: skip
        told = SMALL | {"num-shares": min(5, count)} | dict(values or {})
        public = {name: identity.public for name, identity in identities.items()}
        grid = InProcessGrid(app, count, told, [], 1, nodes)
        return cls(grid, RunConfig.parse(told), public, nodes)

    def another_flower_run(self) -> Federation:
        """The same hospitals, started again: their nodes remember nothing but what is on disk."""
        grid = self.grid
        again = InProcessGrid(app, grid.num_hospitals, grid.run_config, [], 1, self.nodes)
        return Federation(again, self.config, self.roster, self.nodes)

    @property
    def spec(self) -> ModelSpec:
        """The run's model."""
        return ModelSpec.of(self.config, num_classes=8, channels=3)

    def weights(self, seed: int = 7) -> Weights:
        """Weights of the run's model."""
        return get_weights(build(self.spec, seed))

    def cohort(self, *hospitals: int) -> dict[str, int]:
        """Name → node of these hospitals; of all, where none is named."""
        chosen = hospitals or tuple(range(self.grid.num_hospitals))
        return {f"hospital-{i:02d}": 1000 + i for i in chosen}

    def round(
        self, weights: Weights, *hospitals: int, run: str = "run-1", number: int = 1,
        train: bool = True,
    ) -> Outcome:  # fmt: skip
        """One round of a server that follows the protocol's form."""
        step = ServerStep.of(self.config, self.spec) if self.config.server_step else None
        job = Job(run, number, self.spec.digest(), weights)
        return secure_round(
            self.grid, self.cohort(*hospitals), job, self.config,
            train=train, roster=self.roster, step=step if train else None,
        )  # fmt: skip

    def tell(self, hospital: int, **values: Any) -> None:
        """Tell one hospital another run config than the others."""
        told = {key.replace("_", "-"): value for key, value in values.items()}
        self.grid.contexts[hospital].run_config.update(told)

    def ask(self, hospital: int, purpose: str, job: Job) -> str | None:
        """The code with which one hospital refuses ``job``, sent to it alone; None: it answers."""
        kind = "train" if purpose == "train" else "evaluate"
        context = self.grid.contexts[hospital]
        answer: RecordDict = app(Message(job.to_record(), 1000, kind), context).content
        refusal = Refusal.in_record(answer)
        return None if refusal is None else refusal.code

    def invitation(
        self, weights: Weights, purpose: str, *, run: str = "run-1", number: int = 1,
        config: RunConfig | None = None,
    ) -> bytes:  # fmt: skip
        """To a round on ``weights``, of a server that tells everybody ``config``."""
        c = config or self.config
        length = flat_length(weights) if purpose == "train" else 0
        return RoundBinding(
            run=run, round=number, purpose=purpose, params=params_for(c, self.grid.num_hospitals),
            layout=layout_for(purpose, length, c), terms=terms_for(c),
            model_hash=bytes.fromhex(weights_digest(weights)),
        ).to_bytes()  # fmt: skip


def codes(outcome: Outcome) -> set[str]:
    """With which codes hospitals refused."""
    return {
        a.reason.removeprefix("refused: ").split(" (")[0]
        for a in outcome.absent
        if a.reason.startswith("refused: ")
    }


def flat(update: Mapping[str, np.ndarray]) -> np.ndarray:
    """All entries as one vector."""
    return np.concatenate([a.reshape(-1) for a in update.values()])
