"""The ServerApp: check the configuration, prepare the run, train, report."""

from __future__ import annotations

import time

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp

from common.config import RunConfig
from common.errors import ConsiliumError

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """One run. Raises what made it fail, so that Flower's status of the run is a failure too."""
    config = RunConfig.parse(context.run_config)  # before any hospital is asked
    # torch and the rest only now: a wrong configuration is told at once.
    from server_app.coordinator import Coordinator

    started = time.monotonic()
    coordinator = Coordinator.prepare(grid, config)
    reason: str | None = None
    try:
        coordinator.train()
    except ConsiliumError as error:
        reason = error.what
        raise
    except BaseException as error:
        reason = f"{type(error).__name__} (see the log)"
        raise
    finally:
        coordinator.conclude(reason, time.monotonic() - started)
