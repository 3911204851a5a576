"""Text from the other side never commands a terminal, nor begins a line of a log."""

from __future__ import annotations

import io
import logging
import subprocess
import sys

import numpy as np
import pytest
from flwr.app import ConfigRecord, RecordDict
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from common.config import KEYS, RunConfig
from common.errors import ConfigError, ConsiliumError, ProtocolError
from common.messages import Greeting, Refusal
from common.messages.answers import UNREADABLE
from common.messages.wire import VERSION, arrays_to_record, record_to_arrays
from common.text import CONTINUED, LIMIT, printable, printable_lines
from server_app.progress import Progress
from server_app.reporting.values import text as in_report

HOSTILE = (
    "\x1b[2J\x1b[H aaa\nINFO consilium.apps: ready\r\x07\x9b31m\u202eyrtne\u2028\u0085\ud800\0"
)
ENDS = {"\n", "\r", "\x0b", "\x0c", "\x1c", "\x1d", "\x1e", "\x85", "\u2028", "\u2029"}


@given(st.text(st.characters(codec=None), max_size=60))
def test_what_is_printable_stays_and_all_else_is_escaped(text: str) -> None:
    shown = printable(text)
    assert shown.isprintable()
    assert len(shown.splitlines()) <= 1
    assert printable(shown) == shown
    if text.isprintable():
        assert shown == text
    shown.encode()  # no surrogate is left


def test_hostile_text_is_one_line_that_shows_what_was_there() -> None:
    assert printable(HOSTILE) == (
        r"\x1b[2J\x1b[H aaa\nINFO consilium.apps: ready\r\x07\x9b31m\u202eyrtne\u2028\x85\ud800\x00"
    )
    assert printable("Straße, naïve, 学校, ε ≤ 6 – 'ok'") == "Straße, naïve, 学校, ε ≤ 6 – 'ok'"
    assert printable("a" * 10, 4) == "aaaa… (10 characters)"
    assert printable_lines("one\ntwo\x1b") == f"one{CONTINUED}two\\x1b"


@pytest.mark.parametrize("name", ["consilium.hospital", "consilium.anything.else", "flwr"])
def test_every_line_of_our_logs_and_of_flowers_is_escaped_whatever_writes_it(name: str) -> None:
    """By a handler and a formatter that know nothing of it; tracebacks too."""
    stream = io.StringIO()
    handler = logging.StreamHandler(stream)
    handler.setFormatter(logging.Formatter("%(levelname)s %(name)s: %(message)s"))
    logger = logging.getLogger(name)
    logger.addHandler(handler)
    forged = f"x{HOSTILE}\nERROR forged"
    try:
        logger.warning("what came: %s", forged)
        logger.warning(forged)
        try:
            raise ValueError(forged)
        except ValueError:
            logger.exception("refused (%s)", forged)
    finally:
        logger.removeHandler(handler)
    lines = stream.getvalue().splitlines()
    assert lines
    for line in lines:
        assert line.isprintable()
        assert not line.startswith(("INFO", "ERROR forged"))


def test_other_loggers_are_left_as_they_are(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        logging.getLogger("another").warning("a\nb")
    assert caplog.records[-1].getMessage() == "a\nb"


def test_logs_are_guarded_in_every_process_of_ours() -> None:
    """Whatever of ours is imported first."""
    for module in ("client_app.app", "server_app.app", "deploy.runtime.supervisor"):
        code = (
            f"import logging, {module}\n"
            "print(type(logging.getLogger('consilium.x').makeRecord("
            "'consilium.x', 30, '', 0, 'a', (), None)).__name__)"
        )
        told = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, check=True
        )
        assert told.stdout.strip() == "GuardedRecord"


def test_both_parts_of_an_error_are_one_printable_line_each() -> None:
    error = ConsiliumError(f"no {HOSTILE}", f"do {HOSTILE}")
    assert error.what.isprintable() and error.remedy.isprintable()
    assert error.what.startswith(r"no \x1b[2J")
    assert len(ConsiliumError("x" * 10**6, "y").what) < LIMIT + 100


def test_keys_and_values_that_a_server_chose_are_escaped_in_what_is_said_of_them() -> None:
    plain = {key.name: key.default for key in KEYS}
    for bad in ({f"zz{HOSTILE}": 1}, {"dataset": HOSTILE}, {"rounds": HOSTILE}):
        with pytest.raises(ConfigError) as refused:
            RunConfig.parse(plain | bad)
        assert refused.value.what.isprintable()


def test_tensors_whose_names_cannot_be_printed_are_refused() -> None:
    for name in ("\x1b[2J", "a\nb", "\u202e"):
        record = RecordDict({"w": arrays_to_record({name: np.zeros(1)})})
        with pytest.raises(ProtocolError, match="not printable"):
            record_to_arrays(record, "w")


@pytest.mark.parametrize(
    ("code", "correlation"),
    [
        ("x\x1b[2J\x1b[31mAll hospitals ok\nround 2/6 ok", "1"),
        ("policy", "1\n2"),
        ("[red]ok", "a b"),
        ("", ""),
        ("a" * 65, "f" * 65),
        ("Policy", "\u202e1"),
    ],
)
def test_a_hospitals_refusal_is_a_word_and_an_id_or_unreadable(code: str, correlation: str) -> None:
    head = ConfigRecord({"version": VERSION, "code": code, "correlation-id": correlation})
    refusal = Refusal.in_record(RecordDict({"refusal": head}))
    assert refusal is not None
    for found, said in ((refusal.code, code), (refusal.correlation_id, correlation)):
        assert found in (said, UNREADABLE)
        assert found.isascii() and found.isprintable() and found and " " not in found
    assert UNREADABLE in (refusal.code, refusal.correlation_id)


def test_our_own_refusals_are_read_as_they_were_made() -> None:
    made = Refusal.of(ConfigError("a", "b"))
    assert Refusal.in_record(made.to_record()) == made
    codes = set()
    kinds = [ConsiliumError]
    while kinds:
        kind = kinds.pop()
        kinds += kind.__subclasses__()
        codes.add(kind.code)
    for code in codes:
        assert Refusal.in_record(Refusal(code, "0a").to_record()) == Refusal(code, "0a")


def test_a_line_of_progress_has_no_other_line_in_it_and_no_command() -> None:
    stream = io.StringIO()
    progress = Progress(3, Console(file=stream, force_terminal=False, width=200))
    progress.say(f"! hospital: refused: {HOSTILE} [red]x[/red] :smile:")
    shown = stream.getvalue()
    assert shown.count("\n") == 1 and shown[:-1].isprintable()
    assert "[red]x[/red] :smile:" in shown


def test_a_report_shows_no_command_and_no_other_order_of_letters() -> None:
    assert in_report("plain") == "plain"
    assert not set(in_report(HOSTILE)) & (ENDS | {"\x1b", "\u202e", "\ud800", "\0"})


def test_a_greeting_is_a_name_and_nothing_else() -> None:
    record = Greeting("st-mary").to_record()
    for name in (HOSTILE, "a b", "", "x" * 65):
        head = ConfigRecord({"version": VERSION, "hospital": name})
        with pytest.raises(ProtocolError):
            Greeting.from_record(RecordDict({"greeting": head}))
    assert Greeting.from_record(record).hospital == "st-mary"
