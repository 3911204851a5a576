"""The ServerApp: check the configuration, prepare the run, train, report."""

from __future__ import annotations

import time
from typing import Any, Protocol

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp

from common.config import RunConfig
from common.errors import ConsiliumError

app = ServerApp()


class Run(Protocol):
    """A run of either mode, prepared."""

    def train(self) -> None:
        """All of it."""

    def conclude(self, reason: str | None, seconds: float) -> dict[str, Any]:
        """Write and show what came of it; ``reason``: why it failed, or None."""


@app.main()
def main(grid: Grid, context: Context) -> None:
    """One run. Raises what made it fail, so that Flower's status of the run is a failure too."""
    config = RunConfig.parse(context.run_config)  # before any hospital is asked
    started = time.monotonic()
    run = _prepare(grid, config)
    reason: str | None = None
    try:
        run.train()
    except ConsiliumError as error:
        reason = error.what
        raise
    except BaseException as error:
        reason = f"{type(error).__name__} (see the log)"
        raise
    finally:
        run.conclude(reason, time.monotonic() - started)


def _prepare(grid: Grid, config: RunConfig) -> Run:
    # torch and the rest only now: a wrong configuration is told at once.
    if config.mode == "vectors":
        from server_app.vectors.run import VectorsRun

        return VectorsRun.prepare(grid, config)
    from server_app.coordinator import Coordinator

    return Coordinator.prepare(grid, config)
