"""One connection to the server, as the node's would be: TCP, TLS under the kit's authority, HTTP.

Only standard sockets: what is told apart here (no name, no route, nobody there, another
authority, another name, an end date, a clock) are one and the same error in Flower's log.
"""

from __future__ import annotations

import http.client
import socket
import ssl
import threading
import time
from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime

TIMEOUT = 5.0
"""Seconds for each of: finding the address, connecting, the handshake, the answer."""


@dataclass(frozen=True)
class Answer:
    """What ``GET /health`` gave: the HTTP status, and how the clocks differ.

    ``ahead``: seconds by which this machine's clock is ahead of the server's, to ±``margin``;
    None where the answer has no readable Date.
    """

    status: int
    ahead: float | None
    margin: float


def resolve(host: str, port: int) -> list[str]:
    """The IP addresses of ``host``; OSError (``TimeoutError`` after :data:`TIMEOUT`) if none."""
    found: list[str] = []
    errors: list[OSError] = []

    def look() -> None:
        try:
            rows = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
            found.extend(dict.fromkeys(str(row[4][0]) for row in rows))
        except (OSError, UnicodeError) as error:
            errors.append(error if isinstance(error, OSError) else OSError(str(error)))

    # The system's resolver takes no time limit.
    thread = threading.Thread(target=look, daemon=True)
    thread.start()
    thread.join(TIMEOUT)
    if thread.is_alive():
        raise TimeoutError("the name server does not answer")
    if errors:
        raise errors[0]
    return found


def connect(host: str, port: int) -> socket.socket:
    """A TCP connection; OSError if there is none."""
    return socket.create_connection((host, port), TIMEOUT)


def issuer_and_names(host: str, port: int) -> tuple[str, list[str]]:
    """Whose certificate the server shows, and for what; nothing of it is verified.

    ("", []) where that cannot be told. To be said to a person, never to be trusted.
    """
    from cryptography import x509

    from deploy.provision.certificates import hosts_of

    try:
        shown = ssl.get_server_certificate((host, port), timeout=TIMEOUT)
        certificate = x509.load_pem_x509_certificate(shown.encode())
        return certificate.issuer.rfc4514_string()[:200], hosts_of(certificate)[:10]
    except (OSError, ValueError):
        return "", []


class Connection:
    """TLS to the server, its certificate verified; ssl.SSLError or OSError if it is not."""

    def __init__(self, host: str, port: int, authority: str) -> None:
        """Connect; ``authority``: the kit's certificate, PEM, and nobody else is trusted."""
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.load_verify_locations(cadata=authority)
        plain = connect(host, port)
        try:
            self._socket = context.wrap_socket(plain, server_hostname=host)
        except BaseException:
            plain.close()
            raise
        self._host = f"[{host}]" if ":" in host else host

    def certificate(self) -> bytes:
        """The server's, DER."""
        shown = self._socket.getpeercert(binary_form=True)
        assert shown is not None  # it was verified
        return shown

    def version(self) -> str:
        """Of the protocol, such as TLSv1.3."""
        return self._socket.version() or ""

    def health(self) -> Answer:
        """Ask for ``/health``; OSError or http.client.HTTPException if there is no answer."""
        asked = f"GET /health HTTP/1.1\r\nHost: {self._host}\r\nConnection: close\r\n\r\n"
        before = time.time()
        self._socket.sendall(asked.encode("ascii"))
        answer = http.client.HTTPResponse(self._socket, method="GET")
        try:
            answer.begin()
            after = time.time()
            told = answer.getheader("Date")
            status = answer.status
        finally:
            answer.close()
        return Answer(status, *_ahead(told, before, after))

    def close(self) -> None:
        """End it."""
        self._socket.close()


def _ahead(told: str | None, before: float, after: float) -> tuple[float | None, float]:
    """Difference and margin: the header has whole seconds, cut off, of some moment in between."""
    try:
        there = parsedate_to_datetime(told or "")
    except (TypeError, ValueError):
        return None, 0.0
    there = there if there.tzinfo else there.replace(tzinfo=UTC)
    middle = datetime.fromtimestamp((before + after) / 2, UTC)
    return (middle - there).total_seconds() - 0.5, (after - before) / 2 + 0.5
