"""A hospital's request to be admitted: its name and public keys, signed by both keys.

The signatures prove that whoever made the request holds both private keys, and bind the keys to
each other and to the name: nobody can enrol a key of somebody else's, or one hospital's request
under another name. That it is the right hospital's only the fingerprint says, told by telephone.

``request.json`` (version ``consilium-request-1``) has exactly these fields, all text: ``version``,
``name``, ``identity`` (base64 of the 32-byte Ed25519 key), ``node`` (OpenSSH line of the P-384
key), ``nonce`` (base64, 16 bytes), ``time`` (UTC), ``identity-signature`` (base64, 64 bytes) and
``node-signature`` (base64 of ECDSA-SHA256, DER), both over the same statement of all the others.
"""

from __future__ import annotations

import base64
import json
import os
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePrivateKey

from common.federation_file import (
    TIME,
    EnrolmentError,
    check_time,
    decoded,
    strict_json,
    valid_name,
)
from common.secagg.binding import canonical
from common.secagg.keys import Identity, verify
from deploy.provision.keys import (
    fingerprint,
    node_line,
    read_node_line,
    sign_as_node,
    verify_node,
)

VERSION = "consilium-request-1"
_FIELDS = ("version", "name", "identity", "node", "nonce", "time", "identity-signature",
           "node-signature")  # fmt: skip
_REMEDY = "ask the hospital for its request.json again, as `consilium hospital init` made it"


@dataclass(frozen=True)
class Request:
    """A request whose signatures hold; :meth:`make` and :meth:`parse` yield no others."""

    name: str
    identity: bytes
    """Ed25519 public key, 32 bytes."""
    node: str
    """P-384 public key, one line of OpenSSH."""
    nonce: bytes
    time: str
    identity_signature: bytes
    node_signature: bytes

    @classmethod
    def make(
        cls, name: str, identity: Identity, node: EllipticCurvePrivateKey, now: datetime
    ) -> Request:
        """A new request, signed by both keys."""
        line, nonce, time = node_line(node.public_key()), os.urandom(16), now.strftime(TIME)
        statement = _statement(name, identity.public, line, nonce, time)
        return cls(
            name,
            identity.public,
            line,
            nonce,
            time,
            identity.sign(statement),
            sign_as_node(node, statement),
        )

    @classmethod
    def parse(cls, data: bytes) -> Request:
        """Read and verify a request file; EnrolmentError for anything that is not exactly one."""
        document = strict_json(data, "the request", _REMEDY)
        return cls.of(document)

    @classmethod
    def of(cls, document: dict[str, Any]) -> Request:
        """Verify a parsed request; EnrolmentError as for :meth:`parse`."""
        try:
            if set(document) != set(_FIELDS):
                raise ValueError(f"it does not have exactly the fields {', '.join(_FIELDS)}")
            if not all(isinstance(value, str) for value in document.values()):
                raise ValueError("a field is not text")
            if document["version"] != VERSION:
                raise ValueError(f"its version is not {VERSION}")
            request = cls(
                valid_name(document["name"]),
                decoded(document["identity"], 32),
                document["node"],
                decoded(document["nonce"], 16),
                check_time(document["time"]),
                decoded(document["identity-signature"], 64),
                decoded(document["node-signature"]),
            )
            node = read_node_line(request.node)
        except ValueError as error:
            raise EnrolmentError(f"the request is malformed: {error}", _REMEDY) from None
        statement = request._statement()
        for what, holds in (
            ("identity", verify(request.identity, request.identity_signature, statement)),
            ("node", verify_node(node, request.node_signature, statement)),
        ):
            if not holds:
                raise EnrolmentError(
                    f"the request of {request.name} is not signed by its own {what} key: it was "
                    "changed, or whoever made it does not hold that key",
                    _REMEDY + "; do not admit this one",
                )
        return request

    @property
    def fingerprint(self) -> str:
        """What the hospital reads out on the telephone."""
        return fingerprint("request", self._statement())

    def document(self) -> dict[str, str]:
        """As JSON."""

        def text(data: bytes) -> str:
            return base64.b64encode(data).decode()

        values = (VERSION, self.name, text(self.identity), self.node, text(self.nonce), self.time,
                  text(self.identity_signature), text(self.node_signature))  # fmt: skip
        return dict(zip(_FIELDS, values, strict=True))

    def to_bytes(self) -> bytes:
        """As a file."""
        return json.dumps(self.document(), indent=2).encode() + b"\n"

    def _statement(self) -> bytes:
        return _statement(self.name, self.identity, self.node, self.nonce, self.time)


def _statement(name: str, identity: bytes, node: str, nonce: bytes, time: str) -> bytes:
    return canonical("enrolment request", VERSION, name, identity, node, nonce, time)
