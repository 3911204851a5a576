"""The kinds of keys in an enrolment, in the formats in which they are used, and fingerprints.

* Ed25519, 32 raw bytes (:class:`~common.secagg.keys.Identity`): the coordinator's signature under
  the roster, a hospital's identity in secure aggregation.
* ECDSA P-384 in OpenSSH's format: a node's key. Flower 1.41 reads nothing else:
  ``flower-supernode --auth-supernode-private-key`` and ``flwr supernode register``.
* ECDSA P-384 as PKCS #8 PEM: the certificate authority and the TLS server.

All of them come from the operating system's entropy, through `cryptography`.
"""

from __future__ import annotations

import hashlib
import re
from pathlib import Path

from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric.ec import (
    ECDSA,
    SECP384R1,
    EllipticCurvePrivateKey,
    EllipticCurvePublicKey,
    generate_private_key,
)
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
    load_pem_private_key,
    load_ssh_private_key,
    load_ssh_public_key,
)

from common.errors import ConfigError
from common.secagg.binding import canonical
from common.secagg.keys import Identity
from deploy.provision.files import read_private

_GROUPS, _DIGITS = 8, 4
_REMEDY = "restore it from a backup; nothing can stand in for it"


def new_identity() -> bytes:
    """32 raw bytes of a new Ed25519 private key."""
    return Identity.generate().private_bytes()


def load_identity(path: Path) -> Identity:
    """The Ed25519 key of a private file; ConfigError for anything but 32 bytes."""
    try:
        return Identity(read_private(path))
    except ValueError:
        raise ConfigError(f"the private key {path} is not 32 bytes", _REMEDY) from None


def new_node_key() -> bytes:
    """A new node key as ``ssh-keygen -t ecdsa -b 384`` would write it, without passphrase."""
    return _written(PrivateFormat.OpenSSH)


def load_node_key(path: Path) -> EllipticCurvePrivateKey:
    """The node key of a private file; ConfigError for anything else."""
    try:
        return _p384(load_ssh_private_key(read_private(path), None))
    except (ValueError, TypeError, NotImplementedError, UnsupportedAlgorithm):
        raise ConfigError(
            f"the private key {path} is no ECDSA P-384 key in OpenSSH's format", _REMEDY
        ) from None


def new_tls_key() -> bytes:
    """A new key of the authority or of the TLS server, PEM."""
    return _written(PrivateFormat.PKCS8)


def load_tls_key(path: Path) -> EllipticCurvePrivateKey:
    """The key of the authority or of the TLS server; ConfigError for anything else."""
    try:
        return _p384(load_pem_private_key(read_private(path), None))
    except (ValueError, TypeError, NotImplementedError, UnsupportedAlgorithm):
        raise ConfigError(f"the private key {path} is no ECDSA P-384 key in PEM", _REMEDY) from None


def _written(form: PrivateFormat) -> bytes:
    return generate_private_key(SECP384R1()).private_bytes(Encoding.PEM, form, NoEncryption())


def _p384(key: object) -> EllipticCurvePrivateKey:
    if not isinstance(key, EllipticCurvePrivateKey) or not isinstance(key.curve, SECP384R1):
        raise ValueError("not P-384")
    return key


def node_line(public: EllipticCurvePublicKey) -> str:
    """A node's public key as one line of OpenSSH, without comment."""
    return public.public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH).decode()


def read_node_line(line: str) -> EllipticCurvePublicKey:
    """The P-384 key of such a line; ValueError unless it is exactly what :func:`node_line` gives.

    One spelling only: two of one key would pass for two keys.
    """
    try:
        key = load_ssh_public_key(line.encode("ascii"))
    except (ValueError, UnsupportedAlgorithm, NotImplementedError):  # the last: a compressed point
        raise ValueError("the node's key is no OpenSSH public key") from None
    if not isinstance(key, EllipticCurvePublicKey) or not isinstance(key.curve, SECP384R1):
        raise ValueError("the node's key is not ECDSA P-384, which Flower asks for")
    if node_line(key) != line:
        raise ValueError("the node's key is not in its one proper spelling")
    return key


def sign_as_node(key: EllipticCurvePrivateKey, message: bytes) -> bytes:
    """ECDSA with SHA-256, DER."""
    return key.sign(message, ECDSA(SHA256()))


def verify_node(public: EllipticCurvePublicKey, signature: bytes, message: bytes) -> bool:
    """Whether ``signature`` is ``public``'s over ``message``."""
    try:
        public.verify(signature, message, ECDSA(SHA256()))
    except InvalidSignature:
        return False
    return True


def fingerprint(what: str, *parts: bytes | str | int) -> str:
    """128 bits to read out on the telephone: eight groups of four hexadecimal digits.

    Nobody finds a second input with the same one, which would cost 2^128 hashes. ``what`` keeps
    the fingerprints of requests and of keys apart.
    """
    digest = hashlib.sha256(canonical(f"fingerprint of a {what}", *parts)).hexdigest()
    return "-".join(digest[i * _DIGITS : (i + 1) * _DIGITS] for i in range(_GROUPS))


def coordinator_fingerprint(public: bytes) -> str:
    """Of the coordinator's 32-byte key."""
    return fingerprint("coordinator", public)


def member_fingerprint(name: str, identity: bytes) -> str:
    """Of a hospital's name and 32-byte identity key, as the others see them on the roster."""
    return fingerprint("member", name, identity)


def same_fingerprint(told: str, actual: str) -> bool:
    """Compare as people write them: capitals, blanks, colons and dashes make no difference."""
    return re.sub(r"[\s:-]", "", told).lower() == actual.replace("-", "")
