"""The way to the server: each thing that can be wrong with it is called by its name."""

from __future__ import annotations

import socket
import threading
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from cryptography import x509
from hypothesis import given
from hypothesis import strategies as st

from deploy.doctor.connection import Answer
from deploy.doctor.server import judge_clock
from deploy.provision import certificates, keys
from tests.deploy.doctor.conftest import Ward, row, skipped, wrong

NOW = datetime.now(UTC).replace(microsecond=0)
AFTER_TLS = {"server certificate": "server TLS", "server health": "server TLS",
             "clock": "server TLS"}  # fmt: skip


def server_certificate(
    ward: Ward,
    where: Path,
    *,
    host: str = "localhost",
    now: datetime = NOW,
    days: int = 100,
    own_authority: bool = True,
) -> Path:
    """A certificate for the coordinator's server key."""
    key = keys.load_tls_key(ward.coordinator.authority_key)
    authority = certificates.load_certificate(ward.coordinator.authority)
    if not own_authority:
        new = keys.new_tls_key()
        (where / "other.key").write_bytes(new)
        (where / "other.key").chmod(0o600)
        key = keys.load_tls_key(where / "other.key")
        authority = x509.load_pem_x509_certificate(
            certificates.make_authority("demo", key, NOW - timedelta(days=10))
        )
    server = keys.load_tls_key(ward.coordinator.server_key).public_key()
    path = where / "made.crt"
    path.write_bytes(certificates.make_server("demo", [host], server, authority, key, now, days))
    return path


def test_another_authority_is_called_wrong_ca(ward: Ward, tmp_path: Path) -> None:
    ward.serve(server_certificate(ward, tmp_path, own_authority=False))
    document = ward.check()
    assert wrong(document) == {"server TLS": "FAIL"}
    assert skipped(document) == AFTER_TLS
    assert row(document, "server TLS")["found"].startswith("wrong CA")
    assert "inspects TLS" in row(document, "server TLS")["remedy"]


def test_another_name_is_called_wrong_name_with_the_names_that_are_right(
    ward: Ward, tmp_path: Path
) -> None:
    ward.serve(server_certificate(ward, tmp_path, host="elsewhere.example"))
    document = ward.check()
    assert wrong(document) == {"server TLS": "FAIL"}
    found = row(document, "server TLS")
    assert found["found"] == (
        "wrong name: the server's certificate is not for localhost, but for elsewhere.example"
    )
    assert "add localhost to the hosts" in found["remedy"]


def test_an_address_that_the_certificate_has_not_is_a_wrong_name_too(
    ward: Ward, tmp_path: Path
) -> None:
    ward.serve(server_certificate(ward, tmp_path), host="127.0.0.1")
    document = ward.check()
    assert wrong(document) == {"server TLS": "FAIL"}
    assert row(document, "server TLS")["found"].startswith("wrong name")


def test_a_certificate_that_has_ended_is_called_expired(ward: Ward, tmp_path: Path) -> None:
    ward.serve(server_certificate(ward, tmp_path, now=NOW - timedelta(days=20), days=10))
    document = ward.check()
    assert wrong(document) == {"server TLS": "FAIL"}
    assert row(document, "server TLS")["found"].startswith("expired")
    assert "federation renew" in row(document, "server TLS")["remedy"]


def test_a_certificate_that_begins_later_is_called_not_yet_valid(
    ward: Ward, tmp_path: Path
) -> None:
    ward.serve(server_certificate(ward, tmp_path, now=NOW + timedelta(days=2)))
    document = ward.check()
    assert wrong(document) == {"server TLS": "FAIL"}
    assert row(document, "server TLS")["found"].startswith("not yet valid")


def test_a_certificate_that_ends_soon_is_a_warning(ward: Ward, tmp_path: Path) -> None:
    ward.serve(server_certificate(ward, tmp_path, days=12))
    document = ward.check()
    assert wrong(document) == {"server certificate": "WARN"}
    assert "federation renew" in row(document, "server certificate")["remedy"]


def test_nobody_listening_is_called_not_reachable(ward: Ward) -> None:
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))  # not listening, and nobody else's meanwhile
        ward.go_to(f"localhost:{held.getsockname()[1]}")
        document = ward.check()
    assert wrong(document) == {"server address": "FAIL"}
    assert row(document, "server address")["found"].startswith("not reachable: nothing listens")
    assert set(skipped(document)) == {"server TLS", *AFTER_TLS}
    assert set(skipped(document).values()) == {"server address"}


def test_an_unknown_name_is_called_not_reachable(ward: Ward) -> None:
    ward.go_to("nobody.invalid:9092")
    document = ward.check()
    assert wrong(document) == {"server address": "FAIL"}
    assert (
        "no address is known for the name nobody.invalid"
        in (row(document, "server address")["found"])
    )
    assert "DNS" in row(document, "server address")["remedy"]


def test_a_server_that_speaks_no_tls_is_told_from_a_wrong_certificate(ward: Ward) -> None:
    def chatter(listening: socket.socket) -> None:
        for _ in range(2):  # one connection to look, one for the handshake
            other, _ = listening.accept()
            other.sendall(b"HTTP/1.1 400 Bad Request\r\n\r\n")
            other.close()

    with socket.create_server(("127.0.0.1", 0)) as listening:
        thread = threading.Thread(target=chatter, args=(listening,), daemon=True)
        thread.start()
        ward.go_to(f"localhost:{listening.getsockname()[1]}")
        document = ward.check()
        thread.join()
    assert wrong(document) == {"server TLS": "FAIL"}
    assert "TLS" in row(document, "server TLS")["found"]


@pytest.mark.parametrize(
    ("ahead", "status"),
    [(0, None), (-3.5, "WARN"), (60, "WARN"), (-20, "FAIL"), (400, "FAIL")],
)
def test_a_wrong_clock_is_found_from_the_servers_answer(
    ward: Ward, ahead: float, status: str | None
) -> None:
    ward.serve(ahead=ahead)
    document = ward.check()
    assert wrong(document) == ({"clock": status} if status else {})
    if status:
        assert "NTP" in row(document, "clock")["remedy"]
        side = "ahead of" if ahead < 0 else "behind"
        assert side in row(document, "clock")["found"]


def test_an_answer_without_a_time_and_a_server_that_is_not_up_are_warnings(ward: Ward) -> None:
    ward.serve(status=503, dated=False)
    assert wrong(ward.check()) == {"server health": "WARN", "clock": "WARN"}


@given(st.floats(-1e6, 1e6))
def test_the_clock_fails_exactly_where_flower_refuses_the_node(ahead: float) -> None:
    finding = judge_clock(Answer(200, ahead, 0.5))
    # flwr: -5 < server's time - node's time < 305
    accepted = -5 <= -ahead <= 305
    assert (finding.status != "FAIL") == accepted
    assert (finding.status == "PASS") == (abs(ahead) <= 2)
