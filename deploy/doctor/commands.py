"""``consilium hospital check``."""

from __future__ import annotations

import json
import sys
from datetime import UTC, datetime
from typing import Annotated

import typer

from deploy.provision.commands import WIDTH, HospitalDir


def check(
    dir: HospitalDir,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON document.")] = False,
) -> None:
    """Look for what keeps this hospital from taking part, and say what to do; changes nothing."""
    from client_app.hospital_file import HospitalFolder
    from deploy.doctor.checkup import examine
    from deploy.doctor.text import render

    document = examine(HospitalFolder(dir), datetime.now(UTC).replace(microsecond=0))
    if as_json:
        typer.echo(json.dumps(document, indent=2, ensure_ascii=False))
    else:
        render(document, width=None if sys.stdout.isatty() else WIDTH)
    if document["status"] == "FAIL":
        raise typer.Exit(1)
