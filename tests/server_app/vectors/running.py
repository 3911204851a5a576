"""Settings of small runs of vectors, what they leave, and how a server is killed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from client_app.outbox import Outbox
from common.files import consilium_home
from common.secagg import Identity
from server_app.registry import Registry
from tests.server_app.running import newest

TINY: dict[str, Any] = {
    "mode": "vectors", "dataset": "synthetic", "synthetic-size": 240, "partition": "iid",
    "batch-size": 16, "model-width": 0.03125, "privacy": "none", "partition-min-size": 5,
    "secagg": False, "versions": 1, "publish-margin": 100.0,
}  # fmt: skip
PRIVATE = {"privacy": "local", "epsilon": 4.0, "delta": 1e-3, "batch-size": 512}
"""One step a pass, whatever the noise on the counts: the noise is calibrated once for all tests."""


def is_offer(partition_id: int, version: str = "") -> Any:
    return lambda kind, i, group: (
        kind == "query.offer" and i == partition_id and version in ("", group)
    )


def the_run() -> Path:
    """The folder of the run that began last."""
    return newest()


def lines(event: str, directory: Path | None = None) -> list[dict[str, Any]]:
    """What the run noted of that event."""
    text = ((directory or the_run()) / "metrics.jsonl").read_text()
    return [row for row in map(json.loads, text.splitlines()) if row["event"] == event]


def summary() -> dict[str, Any]:
    return dict(json.loads((the_run() / "summary.json").read_text()))


def registry() -> Registry:
    return Registry(the_run() / "registry", create=False)


def outbox(number: int) -> Outbox:
    """Of that simulated hospital, in the run."""
    home = consilium_home() / "simulation" / f"hospital-{number:02d}"
    return Outbox(home / "runs" / the_run().name / "outbox")


def keys() -> dict[str, bytes]:
    """The public keys that the hospitals signed with."""
    text = (the_run() / "identities.json").read_text()
    return {name: bytes.fromhex(key) for name, key in json.loads(text).items()}


def withdrawn(number: int, version: int = 0) -> str:
    """The hospital takes back what it made from that base; its serial."""
    (item,) = [i for i in outbox(number).items() if i.version == version]
    home = consilium_home() / "simulation" / f"hospital-{number:02d}"
    identity = Identity((home / "identity.key").read_bytes())
    outbox(number).withdraw(item.serial, f"hospital-{number:02d}", identity)
    return item.serial


def states() -> dict[str, str]:
    """Each vector's state in the registry, by serial."""
    with registry() as kept:
        return {entry.row.serial: entry.state for entry in kept.vectors()}


class Killed(BaseException):
    """kill -9, as near as one process comes to it."""


def after(number: int, owner: Any, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The server dies once, right after the given call of a method has done its work."""
    method, calls = getattr(owner, name), []

    def dies(*args: Any, **kwargs: Any) -> Any:
        result = method(*args, **kwargs)
        calls.append(1)
        if len(calls) == number:
            raise Killed
        return result

    monkeypatch.setattr(owner, name, dies)
