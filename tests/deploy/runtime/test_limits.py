"""Limits of what others can make a process open or say."""

from __future__ import annotations

import logging
import subprocess
import sys
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from deploy.runtime import seldom
from deploy.runtime.seldom import Seldom, SeldomFilter

PROGRAM = """
import resource
from deploy.runtime.limits import raise_open_files
resource.setrlimit(resource.RLIMIT_NOFILE, ({soft}, {hard}))
print(raise_open_files(), *resource.getrlimit(resource.RLIMIT_NOFILE))
"""


@pytest.mark.parametrize(("soft", "hard", "after"), [(256, 1024, 1024), (1024, 1024, 1024)])
def test_as_many_files_may_be_open_as_the_system_allows(soft: int, hard: int, after: int) -> None:
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM.format(soft=soft, hard=hard)],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert [int(word) for word in done.stdout.split()] == [after, after, hard]


class Clock:
    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.now = 0.0
        patch.setattr(seldom.time, "monotonic", lambda: self.now)


@given(st.lists(st.tuples(st.sampled_from("abc"), st.floats(0, 4)), max_size=200))
def test_a_line_of_a_kind_comes_once_in_a_while_and_none_is_forgotten(
    lines: list[tuple[str, float]],
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        clock, said = Clock(patch), []
        say = Seldom(lambda line: said.append((clock.now, line)), quiet=10.0)
        came: dict[str, int] = {}
        for kind, pause in lines:
            clock.now += pause
            came[kind] = came.get(kind, 0) + 1
            say(kind)
        clock.now += 10.5
        for kind in came:
            say(kind)
            came[kind] += 1
    for kind, count in came.items():
        mine = [(at, line) for at, line in said if line[0] == kind]
        assert all(b[0] - a[0] >= 10.0 for a, b in pairwise(mine))
        more = sum(int(line.split("and ")[1].split()[0]) for _, line in mine if "and" in line)
        assert len(mine) + more == count


def test_kinds_that_others_make_up_fill_no_memory() -> None:
    say = Seldom(lambda line: None)
    for number in range(5000):
        say(f"line {number}")
    assert len(say._kinds) <= seldom._MOST_KINDS


def test_a_library_that_says_the_same_of_each_connection_is_heard_once() -> None:
    heard: list[str] = []

    class Handler(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            heard.append(record.getMessage())

    logger = logging.Logger("library")
    logger.addHandler(Handler())
    logger.addFilter(SeldomFilter())
    for port in range(100):
        logger.warning("Invalid HTTP request received from %d.", port)
    assert heard == ["Invalid HTTP request received from 0."]
