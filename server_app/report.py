"""The report of one run: reads the files of its directory, writes one page.

The page is for a reader who wasn't there. What a file doesn't hold is shown as not recorded,
never guessed; where two files disagree, the page says so. A run that failed early, or is
still going, gets a report as well, and so does one that was resumed: its files hold all of it.
"""

from __future__ import annotations

from pathlib import Path

from common.errors import DataError
from common.files import atomic_write
from server_app import report_template
from server_app.reporting import fedavg
from server_app.reporting.files import INPUTS, VECTORS, read_run
from server_app.vectors import report as vectors
from server_app.vectors import report_template as vectors_template

__all__ = ["FILE_NAME", "INPUTS", "read_run", "write_report"]

FILE_NAME = "report.html"


def write_report(run_dir: Path) -> Path:
    """Write ``report.html`` into ``run_dir`` atomically and return its path; of either mode.

    DataError if ``run_dir`` is no directory; OSError if the page cannot be written. What was
    there before stays then.
    """
    if not run_dir.is_dir():
        raise DataError(f"{run_dir} is no run directory", "give the directory that the run wrote")
    run = read_run(run_dir)
    if run.mode == VECTORS:
        page = vectors_template.render(vectors.view(run))
    else:
        page = report_template.render(fedavg.view(run))
    target = run_dir / FILE_NAME
    atomic_write(target, page)
    return target
