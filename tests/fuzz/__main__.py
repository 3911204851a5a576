"""``python -m tests.fuzz [--seconds 60] [--seed N] [TARGET ...]``: every parser, for a while.

Prints the seed, with which the same inputs come again (as far as the time goes), and keeps what
breaks a parser in ``tests/fuzz/crashes``, where the tests find it.
"""

from __future__ import annotations

import argparse
import random
import secrets
import sys

from tests.fuzz.running import fuzz, keep
from tests.fuzz.targets import targets

SLOW = 5.0
"""Seconds of the processor for one small input: no parser may take as long."""
LARGE = 600
"""MiB that no small input may make a parser's process grow by."""


def main() -> int:
    """0 if every target held."""
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz")
    parser.add_argument("--seconds", type=float, default=60.0, help="for each target")
    parser.add_argument("--seed", type=int, default=secrets.randbelow(2**32))
    parser.add_argument("targets", nargs="*", metavar="TARGET", help="all, if none is named")
    asked = parser.parse_args()
    known = targets()
    if unknown := [name for name in asked.targets if name not in known]:
        parser.error(f"there is no target {unknown[0]!r}; there are: {', '.join(known)}")
    print(f"seed {asked.seed}", flush=True)
    broken = False
    for name in asked.targets or known:
        rnd = random.Random(f"{asked.seed} {name}")
        found = fuzz(known[name], rnd, seconds=asked.seconds)
        print(
            f"{name:22} {found.tried:8} inputs, slowest {found.slowest:.2f} s, "
            f"grown {found.grown} MiB",
            flush=True,
        )
        for what, data in found.crashes.items():
            print(f"  BROKEN: {what}\n  kept: {keep(known[name], data)}", flush=True)
        if found.slowest > SLOW or found.grown > LARGE:
            print("  BROKEN: too slow, or too large", flush=True)
            broken = True
        broken = broken or bool(found.crashes)
    return int(broken)


if __name__ == "__main__":
    sys.exit(main())
