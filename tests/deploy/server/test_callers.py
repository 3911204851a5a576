"""Whose calls pass at the gate."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric.ec import (
    SECP384R1,
    EllipticCurvePrivateKey,
    generate_private_key,
)
from hypothesis import given
from hypothesis import strategies as st

from common.files import write_json
from deploy.provision.keys import node_line
from deploy.server.callers import Callers, NotReady, Unknown
from tests.deploy.server.conftest import signed

KEYS = [generate_private_key(SECP384R1()) for _ in range(3)]


def write(path: Path, keys: list[EllipticCurvePrivateKey]) -> None:
    rows = {f"h{i}": {"node-id": str(i), "key": node_line(key.public_key())}
            for i, key in enumerate(keys)}  # fmt: skip
    write_json(path, {"version": 1, "nodes": rows})


@pytest.fixture
def table(tmp_path: Path) -> Path:
    write(tmp_path / "nodes.json", KEYS[:2])
    return tmp_path / "nodes.json"


def test_who_may_connect_is_who_the_table_has_at_that_moment(table: Path) -> None:
    callers = Callers(table)
    names = {callers.verify(signed(key)) for key in KEYS[:2]}
    assert len(names) == 2
    with pytest.raises(Unknown):
        callers.verify(signed(KEYS[2]))
    write(table, KEYS[1:])
    callers.verify(signed(KEYS[2]))
    with pytest.raises(Unknown):
        callers.verify(signed(KEYS[0]))


def test_a_table_that_is_being_made_anew_is_the_one_before(table: Path) -> None:
    callers = Callers(table)
    callers.verify(signed(KEYS[0]))
    table.unlink()
    callers.verify(signed(KEYS[0]))
    with pytest.raises(NotReady):
        Callers(table).verify(signed(KEYS[0]))


@pytest.mark.parametrize("text", ["", "{}", "[]", '{"nodes": {"a": {"key": "x"}}}', '{"nodes": 1}'])
def test_a_damaged_table_lets_nobody_in_and_loses_no_node(table: Path, text: str) -> None:
    callers = Callers(table)
    callers.verify(signed(KEYS[0]))
    table.write_text(text)
    with pytest.raises(NotReady):  # 503: it tries again
        callers.verify(signed(KEYS[0]))


def test_a_signature_holds_for_flowers_five_minutes(table: Path) -> None:
    callers, at = Callers(table), datetime.now(UTC)
    headers = signed(KEYS[0], at)
    for seconds in (-4, 0, 304):
        callers.verify(headers, at + timedelta(seconds=seconds))
    for seconds in (-6, 306, 10**9):
        with pytest.raises(Unknown):
            callers.verify(headers, at + timedelta(seconds=seconds))


NAMES = ("flwr-public-key", "flwr-signature", "flwr-timestamp")


@pytest.fixture(scope="module")
def lasting(tmp_path_factory: pytest.TempPathFactory) -> Callers:
    path = tmp_path_factory.mktemp("callers") / "nodes.json"
    write(path, KEYS[:2])
    return Callers(path)


@given(changes=st.dictionaries(st.sampled_from(NAMES), st.text(), min_size=1), whole=st.booleans())
def test_whatever_stands_in_the_headers_is_refused_and_breaks_nothing(
    lasting: Callers, changes: dict[str, str], whole: bool
) -> None:
    with pytest.raises(Unknown):
        lasting.verify((signed(KEYS[0]) if whole else {}) | changes)
