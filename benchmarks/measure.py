"""What benchmarks share: CPU time booked on accounts, and records that travel and are weighed."""

from __future__ import annotations

import os
import platform
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path

from flwr.app import RecordDict
from flwr.common.serde import recorddict_from_proto, recorddict_to_proto
from flwr.proto.recorddict_pb2 import RecordDict as ProtoRecordDict

Account = tuple[str, str]
"""Who (``server`` or a hospital's name) and in which phase."""


class OverTime(Exception):
    """A measurement took longer than it may."""


class CpuClock:
    """CPU seconds of this process, all its threads, booked on one account at a time.

    Inside ``on(b)`` within ``on(a)`` only ``b`` is charged; inside ``off()`` nobody is. What two
    parties do in one process is so told apart, and what the benchmark does itself costs nobody.
    """

    def __init__(self, limit: float = float("inf")) -> None:
        """``limit``: wall seconds after which the next ``on`` raises :class:`OverTime`."""
        self.seconds: defaultdict[Account, float] = defaultdict(float)
        self._deadline = time.monotonic() + limit
        self._account: Account | None = None
        self._since = 0.0

    @contextmanager
    def on(self, party: str, phase: str) -> Iterator[None]:
        """Charge ``party`` for what happens inside."""
        if time.monotonic() > self._deadline:
            raise OverTime
        before = self._switch((party, phase))
        try:
            yield
        finally:
            self._switch(before)

    @contextmanager
    def off(self) -> Iterator[None]:
        """Charge nobody for what happens inside."""
        before = self._switch(None)
        try:
            yield
        finally:
            self._switch(before)

    def _switch(self, account: Account | None) -> Account | None:
        now = time.process_time()
        before = self._account
        if before is not None:
            self.seconds[before] += now - self._since
        self._account, self._since = account, time.process_time()
        return before


def travel(record: RecordDict) -> tuple[RecordDict, int]:
    """What is left of a record after Flower serialised and read it, and its bytes."""
    data = recorddict_to_proto(record).SerializeToString()
    return recorddict_from_proto(ProtoRecordDict.FromString(data)), len(data)


def environment() -> dict[str, str | int]:
    """The machine and the versions that figures belong to."""
    return {
        "cpu": _cpu(),
        "cores": os.cpu_count() or 1,
        "python": platform.python_version(),
        **{name: version(name) for name in ("flwr", "numpy", "cryptography")},
    }


def _cpu() -> str:
    """The processor's name as Linux tells it, or whatever the platform knows."""
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
