"""The way to the server, step by step: the first step that fails is the one to see to."""

from __future__ import annotations

import http.client
import ssl

from cryptography import x509

from deploy.doctor.case import Case
from deploy.doctor.connection import (
    TIMEOUT,
    Answer,
    Connection,
    connect,
    issuer_and_names,
    resolve,
)
from deploy.doctor.enrolment import SOON
from deploy.doctor.result import Finding, NotChecked, fail, good, warn

# OpenSSL's X509_V_ERR_*: what the ssl module gives as verify_code.
_NOT_YET, _EXPIRED, _WRONG_NAME = 9, 10, (62, 64)
_UNKNOWN = (2, 7, 18, 19, 20, 21, 30)
AHEAD, BEHIND = 5.0, 305.0
"""Seconds by which Flower 1.41 lets a node's clock be ahead of the server's, and behind it."""
TELL = 2.0
"""Seconds of difference from which it is said."""


def address(case: Case) -> Finding:
    """The server's name is known, and something there accepts a TCP connection."""
    host, port = case.address
    try:
        found = resolve(host, port)
    except OSError as error:
        return fail(
            f"not reachable: no address is known for the name {host} ({_reason(error)})",
            "check the address in the kit (or [server] in hospital.toml) and this machine's DNS",
        )
    where = f"{host}:{port} ({', '.join(found[:3])})"
    try:
        connect(host, port).close()
    except ConnectionRefusedError:
        return fail(
            f"not reachable: nothing listens at {where}",
            "ask the coordinator whether the server runs, and compare the port; a firewall may "
            "refuse, too",
        )
    except TimeoutError:
        return fail(
            f"not reachable: no answer from {where} within {TIMEOUT:g} s",
            "let outgoing TCP to that address and port through the firewall",
        )
    except OSError as error:
        return fail(
            f"not reachable: {where}: {_reason(error)}",
            "check this machine's network, and let outgoing TCP to that address through",
        )
    return good(f"{where} accepts connections")


def tls(case: Case) -> Finding:
    """The server proves, under the kit's authority, that it is the one that the kit names."""
    host, port = case.address
    try:
        case.connection = Connection(host, port, case.folder.authority.read_text(encoding="ascii"))
    except ssl.SSLCertVerificationError as error:
        return _refused(case, error)
    except ssl.SSLError as error:
        return fail(
            f"{host}:{port} does not speak TLS as it should ({error.reason or 'SSL error'})",
            "compare host and port with the coordinator; a device on the way may inspect TLS: "
            "have it leave this connection alone",
        )
    except OSError as error:
        return fail(
            f"the connection to {host}:{port} broke during the TLS handshake ({_reason(error)})",
            "ask the coordinator whether the server runs; a firewall on the way may cut TLS off",
        )
    return good(f"{case.connection.version()}, certificate under the kit's ca.crt, for {host}")


def _refused(case: Case, error: ssl.SSLCertVerificationError) -> Finding:
    host, port = case.address
    issuer, names = issuer_and_names(host, port)
    if error.verify_code == _EXPIRED:
        return fail(
            "expired: the server's certificate has ended",
            "ask the coordinator for `consilium federation renew` and a restart of the server; "
            "check this machine's date, too",
        )
    if error.verify_code == _NOT_YET:
        return fail(
            "not yet valid: the server's certificate begins later than this machine's clock",
            "set this machine's clock",
        )
    if error.verify_code in _WRONG_NAME:
        return fail(
            f"wrong name: the server's certificate is not for {host}, but for "
            f"{', '.join(names) or 'no name'}",
            f"use one of those names in hospital.toml ([server] address), or ask the coordinator "
            f"to add {host} to the hosts in federation.toml and to renew the certificate",
        )
    if error.verify_code in _UNKNOWN:
        return fail(
            f"wrong CA: the server's certificate is not of the kit's ca.crt"
            f"{f', but of {issuer!r}' if issuer else ''}",
            "if that is a device of your own house that inspects TLS, have it leave this "
            "connection alone; else compare the address with the coordinator: it may be another "
            "federation's server",
        )
    return fail(
        f"the server's certificate is refused: {error.verify_message}",
        "tell the coordinator",
    )


def certificate(case: Case) -> Finding:
    """The server's certificate will hold for some time."""
    shown = x509.load_der_x509_certificate(_connection(case).certificate())
    ends = shown.not_valid_after_utc
    left = (ends - case.now).days
    found = f"valid until {ends.date()} ({left} days)"
    if left < SOON:
        return warn(found, "ask the coordinator for `consilium federation renew`")
    return good(found)


def health(case: Case) -> Finding:
    """The server answers ``GET /health`` with 200."""
    try:
        case.answer = answer = _connection(case).health()
    except (OSError, http.client.HTTPException) as error:
        return fail(
            f"the server does not answer GET /health ({_reason(error)})",
            "tell the coordinator; a device on the way may let TLS through and nothing else",
        )
    if answer.status != 200:
        return warn(
            f"GET /health is answered with {answer.status}",
            "ask the coordinator whether the server is up; the node tries again by itself",
        )
    return good("GET /health is answered with 200")


def clock(case: Case) -> Finding:
    """This machine's clock and the server's agree: Flower's node authentication hangs on it."""
    if case.answer is None:
        raise NotChecked("server health")
    return judge_clock(case.answer)


def judge_clock(answer: Answer) -> Finding:
    """WARN above 2 s, FAIL where Flower refuses the node: over 5 s ahead, or 305 s behind."""
    if answer.ahead is None:
        return warn(
            "the server's answer has no time", "see to it that this machine's clock is set (NTP)"
        )
    side = "ahead of" if answer.ahead > 0 else "behind"
    found = f"this clock is {abs(answer.ahead):.1f} s {side} the server's (± {answer.margin:.1f} s)"
    remedy = (
        "set this machine's clock by NTP; if it is right, tell the coordinator. Flower refuses a "
        f"node that is more than {AHEAD:g} s ahead or {BEHIND:g} s behind"
    )
    if answer.ahead > AHEAD or answer.ahead < -BEHIND:
        return fail(found, remedy)
    return warn(found, remedy) if abs(answer.ahead) > TELL else good(found)


def _connection(case: Case) -> Connection:
    if case.connection is None:
        raise NotChecked("server TLS")
    return case.connection


def _reason(error: Exception) -> str:
    if isinstance(error, TimeoutError):
        return f"no answer within {TIMEOUT:g} s"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return type(error).__name__
