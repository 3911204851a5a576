"""The primitives, each bound to its purpose: Ed25519, X25519 + HKDF-SHA256, ChaCha20-Poly1305.

All of them are `cryptography`'s. Private X25519 keys travel through this package as their 32
raw bytes, since the mask key is Shamir-shared.
"""

from __future__ import annotations

from collections.abc import Callable

from cryptography.exceptions import InvalidSignature, InvalidTag
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from common.secagg.binding import canonical
from common.secagg.errors import Refusal

Entropy = Callable[[int], bytes]
KEY_BYTES = 32
SIGNATURE_BYTES = 64
TAG_BYTES = 16
_NONCE = bytes(12)


class Identity:
    """A hospital's (or the coordinator's) long-term Ed25519 key. Its repr shows no secret."""

    __slots__ = ("_key", "public")

    def __init__(self, private: bytes) -> None:
        """``private``: 32 raw bytes."""
        self._key = Ed25519PrivateKey.from_private_bytes(private)
        self.public: bytes = self._key.public_key().public_bytes_raw()

    @classmethod
    def generate(cls) -> Identity:
        """A new identity from OS entropy."""
        return cls(Ed25519PrivateKey.generate().private_bytes_raw())

    def private_bytes(self) -> bytes:
        """The 32 raw private bytes, to be written where only the hospital reads."""
        return self._key.private_bytes_raw()

    def sign(self, message: bytes) -> bytes:
        """64-byte signature over ``message``."""
        return self._key.sign(message)

    def __repr__(self) -> str:
        """The public key only."""
        return f"Identity(public={self.public.hex()})"


def verify(public: bytes, signature: bytes, message: bytes) -> bool:
    """Whether ``signature`` is ``public``'s over ``message``; a bad key is False too."""
    try:
        Ed25519PublicKey.from_public_bytes(public).verify(signature, message)
    except (InvalidSignature, ValueError):
        return False
    return True


def new_secret(entropy: Entropy) -> bytes:
    """32 bytes of full entropy: a private X25519 key or a self-mask seed."""
    secret = entropy(KEY_BYTES)
    if len(secret) != KEY_BYTES:
        raise Refusal(
            "secagg-entropy",
            "The source of entropy gave too few bytes.",
            "Use the operating system's (os.urandom).",
        )
    return secret


def public_key(private: bytes) -> bytes:
    """The 32-byte X25519 public key of ``private``."""
    return X25519PrivateKey.from_private_bytes(private).public_key().public_bytes_raw()


def derive(secret: bytes, salt: bytes | None, label: str, *context: bytes | str | int) -> bytes:
    """HKDF-SHA256 to 32 bytes; ``label`` and ``context`` enter its info unambiguously."""
    info = canonical(label, *context)
    return HKDF(algorithm=SHA256(), length=KEY_BYTES, salt=salt, info=info).derive(secret)


def agree(
    private: bytes, public: bytes, salt: bytes | None, label: str, *context: bytes | str | int
) -> bytes:
    """X25519 then HKDF; refuses (``secagg-keys``) a public key of low order."""
    try:
        shared = X25519PrivateKey.from_private_bytes(private).exchange(
            X25519PublicKey.from_public_bytes(public)
        )
    except ValueError:
        raise Refusal(
            "secagg-keys",
            "A hospital's public key is not a point that a secret can be agreed with.",
            "Start a new round without that hospital.",
        ) from None
    return derive(shared, salt, label, *context)


def check_public(public: bytes) -> None:
    """Refuse (``secagg-keys``) a public key of low order: no secret can be agreed with it."""
    agree(bytes(KEY_BYTES), public, None, "check")


def pair_mask_key(private: bytes, mine: str, public: bytes, other: str, context: bytes) -> bytes:
    """The 32-byte mask key of two hospitals: the same from either side, one round only."""
    first, second = sorted((mine, other))
    return agree(private, public, None, "pairwise mask", context, first, second)


def self_mask_key(seed: bytes, owner: str, context: bytes) -> bytes:
    """The 32-byte cipher key of ``owner``'s self mask."""
    return derive(seed, None, "self mask", context, owner)


def seal(key: bytes, plaintext: bytes, associated: bytes) -> bytes:
    """ChaCha20-Poly1305 under a key that is used for this one message.

    The nonce is fixed because the key is fresh: it is derived for one pair, one direction
    and one round, and from a random salt, so that not even a stage that runs twice (a
    process that was restored from an older state) seals two messages under one key.
    """
    return ChaCha20Poly1305(key).encrypt(_NONCE, plaintext, associated)


def open_sealed(key: bytes, sealed: bytes, associated: bytes) -> bytes | None:
    """The plaintext, or None if ``sealed`` or ``associated`` was altered."""
    try:
        return ChaCha20Poly1305(key).decrypt(_NONCE, sealed, associated)
    except InvalidTag:
        return None
