"""One input, or many, for one target; and what becomes of an input that breaks it."""

from __future__ import annotations

import hashlib
import logging
import random
import resource
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from common.errors import ConsiliumError
from tests.fuzz.mutation import mutated
from tests.fuzz.targets import Target

CRASHES = Path(__file__).parent / "crashes"
"""Inputs that broke a parser once: ``TARGET/NAME.bin``. They are read in every run of the tests."""


def attempt(target: Target, data: bytes) -> BaseException | None:
    """What ``target`` raises for ``data`` but must not; None where all is as it should be."""
    try:
        target.parse(data)
    except ConsiliumError as error:
        whole = error.what.isprintable() and error.remedy.isprintable()
        return None if error.what and error.remedy and whole else error
    except Exception as error:
        return error
    return None


@contextmanager
def quiet() -> Iterator[None]:
    """Without what libraries log and warn of, on purpose, about broken input."""
    logging.disable(logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(logging.NOTSET)


@dataclass
class Found:
    """What a time of fuzzing came to."""

    tried: int = 0
    slowest: float = 0.0
    grown: int = 0
    """MiB that the process has grown by at most."""
    crashes: dict[str, bytes] = field(default_factory=dict)
    """Error and place → the shortest input."""


def fuzz(target: Target, rnd: random.Random, *, seconds: float = 0.0, inputs: int = 0) -> Found:
    """Mutate the target's seeds for so long, or so often."""
    found, others = Found(), tuple(target.seeds)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    end = time.monotonic() + seconds
    with quiet():
        while found.tried < inputs or time.monotonic() < end:
            data = mutated(rnd.choice(target.seeds), rnd, others)
            begun = time.process_time()
            error = attempt(target, data)
            found.slowest = max(found.slowest, time.process_time() - begun)
            found.tried += 1
            if error is not None:
                key = f"{type(error).__name__} in {_where(error)}: {str(error)[:100]!r}"
                if len(data) < len(found.crashes.get(key, data + b" ")):
                    found.crashes[key] = data
    found.grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024
    return found


def _where(error: BaseException) -> str:
    trace, place = error.__traceback__, "?"
    while trace is not None:
        code = trace.tb_frame.f_code
        if "site-packages" not in code.co_filename and "lib/python" not in code.co_filename:
            place = f"{Path(code.co_filename).name}:{code.co_name}"
        trace = trace.tb_next
    return place


def keep(target: Target, data: bytes) -> Path:
    """Keep an input that broke ``target`` beside the earlier ones."""
    folder = CRASHES / target.name
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{hashlib.sha256(data).hexdigest()[:12]}.bin"
    path.write_bytes(data)
    return path
