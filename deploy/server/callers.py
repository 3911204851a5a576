"""Whether a call at the gate is a member's node's: its signature, before anything is spent on it.

A node sends three headers with every call: its public key, a time, and its signature over that time
(Flower 1.41, ``NodeAuthHttpInterceptor``). The SuperLink verifies them too, but only once it has
the whole body. Here the key must be one that the registrar has registered (``nodes.json``), so
that nobody else makes the gate read a body, hold a slot, or ask the SuperLink.
"""

from __future__ import annotations

import binascii
import hashlib
from base64 import b64decode
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ec import ECDSA, EllipticCurvePublicKey
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from flwr.common.constant import (
    SYSTEM_TIME_TOLERANCE,
    TIMESTAMP_HEADER,
    TIMESTAMP_TOLERANCE,
)
from flwr.supercore.constant import FLEET_HTTP_PUBLIC_KEY_HEADER, FLEET_HTTP_SIGNATURE_HEADER

from common.errors import ConsiliumError
from common.files import read_json
from deploy.provision.keys import read_node_line

_HEADERS = (FLEET_HTTP_PUBLIC_KEY_HEADER, FLEET_HTTP_SIGNATURE_HEADER, TIMESTAMP_HEADER)
_MOST_HEADER = 1024
"""Characters of one of the three headers; a P-384 key's takes about 300."""


class Unknown(Exception):
    """The call is not signed by a node that may connect."""


class NotReady(Exception):
    """Who may connect is not known yet."""


class Callers:
    """The nodes that may connect, as ``nodes.json`` has them now."""

    def __init__(self, table: Path) -> None:
        """``table``: the registrar's; it may come later, and change at any time."""
        self._table = table
        self._stamp: tuple[int, int, int] | None = None
        self._keys: dict[bytes, EllipticCurvePublicKey] | None = None

    def verify(self, headers: Mapping[str, str], now: datetime | None = None) -> str:
        """An id of the key that signed a call with these headers (names in lower case).

        :class:`Unknown` if none that may connect did, :class:`NotReady` while there is no table.
        ``now``: aware; None for this moment.
        """
        keys = self._current()
        given = [headers.get(name, "") for name in _HEADERS]
        if not all(given) or max(map(len, given)) > _MOST_HEADER:
            raise Unknown
        try:
            pem, signature = (b64decode(text, validate=True) for text in given[:2])
            signed_at = datetime.fromisoformat(given[2])
            age = ((now or datetime.now(UTC)) - signed_at).total_seconds()
            statement = given[2].encode("ascii")
        except (ValueError, TypeError, OverflowError, binascii.Error):
            raise Unknown from None
        # Flower's own window, so that what passes here is not refused there for its time.
        if not -SYSTEM_TIME_TOLERANCE < age < TIMESTAMP_TOLERANCE + SYSTEM_TIME_TOLERANCE:
            raise Unknown
        key = keys.get(pem)
        if key is None:
            raise Unknown
        try:
            key.verify(signature, statement, ECDSA(SHA256()))
        except InvalidSignature:
            raise Unknown from None
        return hashlib.sha256(pem).hexdigest()

    def _current(self) -> dict[bytes, EllipticCurvePublicKey]:
        try:
            stat = self._table.stat()
            stamp = stat.st_mtime_ns, stat.st_ino, stat.st_size
        except OSError:
            if self._keys is None:
                raise NotReady from None
            return self._keys  # it is being made anew
        if self._keys is None or stamp != self._stamp:
            try:
                rows = read_json(self._table)["nodes"].values()
                self._keys = {_pem(key): key for key in map(_key, rows)}
            except (ConsiliumError, KeyError, TypeError, AttributeError, ValueError):
                raise NotReady from None
            self._stamp = stamp
        return self._keys


def _key(row: Mapping[str, str]) -> EllipticCurvePublicKey:
    return read_node_line(row["key"])


def _pem(key: EllipticCurvePublicKey) -> bytes:
    return key.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
