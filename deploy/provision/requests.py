"""A hospital's request to be admitted: its name and public keys, signed by both keys.

The signatures prove that whoever made the request holds both private keys, and bind the keys to
each other and to the name: nobody can enrol a key of somebody else's, or one hospital's request
under another name. That it is the right hospital's only the fingerprint says, told by telephone.

``request.json`` (version ``consilium-request-1``) has exactly these fields, all text: ``version``,
``name``, ``identity`` (base64 of the 32-byte Ed25519 key), ``node`` (OpenSSH line of the P-384
key), ``nonce`` (base64, 16 bytes), ``time`` (UTC), ``identity-signature`` (base64, 64 bytes) and
``node-signature`` (base64 of ECDSA-SHA256, DER), both over the same statement of all the others.
Version ``consilium-request-2`` has ``max-images`` besides, a whole number: the most images that the
hospital proposes to be let claim. A request without a proposal is of version 1.
"""

from __future__ import annotations

import base64
import json
import os
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePrivateKey

from common.errors import ConfigError
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
from common.secagg.roster import MOST_IMAGES
from deploy.provision.keys import (
    fingerprint,
    node_line,
    read_node_line,
    sign_as_node,
    verify_node,
)

VERSION = "consilium-request-1"
BOUNDED = "consilium-request-2"
_FIELDS = ("version", "name", "identity", "node", "nonce", "time", "identity-signature",
           "node-signature")  # fmt: skip
_BOUND = "max-images"
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
    max_images: int | None = None
    """The hospital's proposal of the most images that it may claim; admission fixes the number."""

    @classmethod
    def make(
        cls,
        name: str,
        identity: Identity,
        node: EllipticCurvePrivateKey,
        now: datetime,
        max_images: int | None = None,
    ) -> Request:
        """A new request, signed by both keys; ConfigError for a ``max_images`` out of range."""
        check_max_images(max_images)
        line, nonce, time = node_line(node.public_key()), os.urandom(16), now.strftime(TIME)
        statement = _statement(name, identity.public, line, nonce, time, max_images)
        return cls(
            name,
            identity.public,
            line,
            nonce,
            time,
            identity.sign(statement),
            sign_as_node(node, statement),
            max_images,
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
            version = document.get("version")
            if version not in (VERSION, BOUNDED):
                raise ValueError(f"its version is neither {VERSION} nor {BOUNDED}")
            names = _FIELDS if version == VERSION else (*_FIELDS, _BOUND)
            if set(document) != set(names):
                raise ValueError(f"it does not have exactly the fields {', '.join(names)}")
            if not all(isinstance(document[name], str) for name in _FIELDS):
                raise ValueError("a field is not text")
            bound = document.get(_BOUND)
            if version == BOUNDED and not _in_range(bound):
                raise ValueError(f"{_BOUND} is no whole number from 1 to {MOST_IMAGES}")
            request = cls(
                valid_name(document["name"]),
                decoded(document["identity"], 32),
                document["node"],
                decoded(document["nonce"], 16),
                check_time(document["time"]),
                decoded(document["identity-signature"], 64),
                decoded(document["node-signature"]),
                bound,
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

    def document(self) -> dict[str, str | int]:
        """As JSON."""

        def text(data: bytes) -> str:
            return base64.b64encode(data).decode()

        version = VERSION if self.max_images is None else BOUNDED
        values = (version, self.name, text(self.identity), self.node, text(self.nonce), self.time,
                  text(self.identity_signature), text(self.node_signature))  # fmt: skip
        told: dict[str, str | int] = dict(zip(_FIELDS, values, strict=True))
        return told if self.max_images is None else told | {_BOUND: self.max_images}

    def to_bytes(self) -> bytes:
        """As a file."""
        return json.dumps(self.document(), indent=2).encode() + b"\n"

    def _statement(self) -> bytes:
        return _statement(
            self.name, self.identity, self.node, self.nonce, self.time, self.max_images
        )


def check_max_images(number: int | None) -> None:
    """ConfigError unless ``number`` is None or from 1 to MOST_IMAGES."""
    if number is not None and not _in_range(number):
        raise ConfigError(
            f"a hospital cannot be let claim {number} images",
            f"give a whole number from 1 to {MOST_IMAGES}",
        )


def _in_range(number: object) -> bool:
    return type(number) is int and 1 <= number <= MOST_IMAGES


def _statement(
    name: str, identity: bytes, node: str, nonce: bytes, time: str, max_images: int | None
) -> bytes:
    parts = (name, identity, node, nonce, time)
    if max_images is None:
        return canonical("enrolment request", VERSION, *parts)
    return canonical("enrolment request", BOUNDED, *parts, max_images)
