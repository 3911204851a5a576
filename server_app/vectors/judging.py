"""Whether a candidate base may be published, and what each hospital does to it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from common.config import RunConfig
from common.vectors import (
    Base,
    Gate,
    GateResult,
    InfluenceTable,
    VectorError,
    evaluation_gate,
    leave_one_out,
    margin,
    merge_refusal,
    no_gate,
)
from server_app.registry import Proposal, Registry
from server_app.vectors.federated import Bench, FederatedJudge
from server_app.vectors.public import Judge

MOST_INFLUENCES = 20
"""Hospitals up to which the influence of each is measured: an evaluation for every one."""


@dataclass(frozen=True)
class Judging:
    """By what a run's candidates are judged."""

    config: RunConfig
    registry: Registry
    judge: Judge | None
    """Public images; None: there are none."""
    panel: FederatedJudge | None
    """The hospitals, where ``judged-by`` says so."""
    skewed: bool
    """Whether hospitals may have different mixes of classes."""

    def refuse(self, proposal: Proposal) -> None:
        """VectorError (``merge-base``, ``merge-few``) where vectors had better not be merged."""
        refusal = self.registry.refusal(proposal, skewed=self.skewed)
        if refusal is not None and not self.allowed(refusal):
            raise refusal

    def allowed(self, refusal: VectorError) -> bool:
        """Whether the run's configuration goes on in spite of ``refusal``."""
        return self.config.allow_random_base and refusal.code == "merge-base"

    def verdict(self, proposal: Proposal, bench: Callable[[], Bench]) -> GateResult:
        """What ``judged-by`` says of a candidate; VectorErrors as those of FederatedJudge.

        ``bench``: who can judge now; asked only where hospitals do.
        """
        if self.panel is not None:
            return self.panel.verdict(proposal, bench())
        gate: Gate = no_gate
        if self.judge is not None and self.config.judged_by == "public":
            gate = evaluation_gate(
                self.judge, count=self.judge.count, errors=self.config.publish_margin
            )
        return gate(proposal.base.weights, proposal.weights)

    def unmerged(self, current: Base) -> VectorError | None:
        """Why what waits for the ``current`` base had better not be merged, and was not.

        ``merge-base`` or ``merge-few``: the ensemble is left then
        (:mod:`server_app.vectors.ensemble`). None: nothing is against it, or nothing waits.
        """
        log = self.registry.log()
        if not any(i.staleness == 0 for i in log.pending()):
            return None
        hospitals = {row.hospital for row in log.counting()}
        refused = merge_refusal(
            pretrained=current.pretrained, hospitals=len(hospitals), skewed=self.skewed
        )
        merged = refused is not None and self.allowed(refused) and bool(log.points)
        return None if merged else refused

    def influence(self, proposal: Proposal | None) -> InfluenceTable | None:
        """Each hospital's effect on the candidate (None: on the current base); None: not measured.

        It takes public images, and at most :data:`MOST_INFLUENCES` hospitals.
        """
        log = self.registry.log()
        among = log.counting() if proposal else [
            v for v in log.vectors if v.serial in log.published_in
        ]  # fmt: skip
        hospitals = {row.hospital for row in among}
        if self.judge is None or not 0 < len(hospitals) <= MOST_INFLUENCES:
            return None
        rule = proposal.rule if proposal else None
        weights = proposal.weights if proposal else self.registry.current().weights
        count = self.judge.count
        return leave_one_out(
            hospitals,
            lambda name: weights if name is None else self.registry.weights_without(name, rule),
            self.judge,
            margin=margin(self.judge(weights), count, errors=2.0),
        )
