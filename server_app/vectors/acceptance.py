"""What a run accepts beyond what every registry does: its limits, its privacy, no late outlier."""

from __future__ import annotations

from statistics import median

from common.config import RunConfig
from common.vectors import Limits, TaskVector, VectorError
from common.vectors.checks import ENOUGH_NORMS
from server_app.registry import Log, VectorRow


def limits_of(config: RunConfig) -> Limits:
    """What the registry accepts in a run."""
    return Limits(max_staleness=config.max_staleness)


def check_privacy(config: RunConfig, vector: TaskVector) -> None:
    """VectorError (``vector-privacy``) for a vector that cost more than the run promises.

    The promise is what the run's model card says, so no vector may cost more.
    """
    if config.privacy == "none":
        return
    within = vector.epsilon is not None and vector.epsilon <= config.epsilon * (1 + 1e-9)
    if not within or vector.delta is None or vector.delta > config.delta * (1 + 1e-9):
        raise VectorError(
            "vector-privacy",
            f"{vector.hospital}'s vector cost ε={vector.epsilon}, δ={vector.delta}; the run "
            f"promises ε={config.epsilon:g}, δ={config.delta:g}",
            "fine-tune anew with the run's privacy",
        )


def outliers(log: Log, limits: Limits) -> list[tuple[VectorRow, str]]:
    """Vectors that wait and came before there was a median to compare their norms with; and why."""
    norms = [row.norm for row in log.counting()]
    if len(norms) < ENOUGH_NORMS:
        return []
    bound = limits.norm_factor * median(norms)
    return [
        (one.row, f"its norm {one.row.norm:.4g} is above {bound:.4g}")
        for one in log.pending()
        if one.row.norm > bound
    ]
