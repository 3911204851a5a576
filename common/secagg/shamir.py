"""Shamir's secret sharing of 32-byte secrets, on pycryptodome's 16-byte scheme.

A secret is split as two independent halves over GF(2**128); a share is 32 bytes, the two
halves' shares side by side. pycryptodome's ``ssss=False`` is the plain scheme (constant
term = secret), fixed here and by a test vector, since the other variant would reconstruct
to something else without an error. Neither variant notices a wrong share: whoever calls
:func:`reconstruct` checks shares and result against what their owner committed to.
"""

from __future__ import annotations

from collections.abc import Mapping

from Crypto.Protocol.SecretSharing import Shamir

from common.secagg.errors import Refusal

SECRET_BYTES = 32
SHARE_BYTES = 32
MAX_INDEX = 255
_HALF = 16


def split(secret: bytes, threshold: int, count: int) -> list[bytes]:
    """``count`` shares of 32 bytes, index 1 first; any ``threshold`` of them reconstruct.

    The polynomial's coefficients come from OS entropy (pycryptodome's ``get_random_bytes``).
    """
    if len(secret) != SECRET_BYTES or not 2 <= threshold <= count <= MAX_INDEX:
        raise ValueError("a secret of 32 bytes, and 2 <= threshold <= count <= 255")
    left = Shamir.split(threshold, count, secret[:_HALF], ssss=False)
    right = Shamir.split(threshold, count, secret[_HALF:], ssss=False)
    return [low[1] + high[1] for low, high in zip(left, right, strict=True)]


def reconstruct(shares: Mapping[int, bytes], threshold: int) -> bytes:
    """The secret from at least ``threshold`` shares, keyed by index.

    Raises :class:`Refusal` (``secagg-shares``) if they are too few or not shares at all.
    Exactly ``threshold`` of them are used, lowest index first.
    """
    if len(shares) < threshold:
        raise _refuse(f"{len(shares)} shares where {threshold} are needed")
    if any(not 1 <= index <= MAX_INDEX for index in shares):
        raise _refuse("the index of a share is out of range")
    if any(len(share) != SHARE_BYTES for share in shares.values()):
        raise _refuse("a share is not of 32 bytes")
    used = sorted(shares.items())[:threshold]
    left = Shamir.combine([(index, share[:_HALF]) for index, share in used], ssss=False)
    right = Shamir.combine([(index, share[_HALF:]) for index, share in used], ssss=False)
    return left + right


def _refuse(what: str) -> Refusal:
    return Refusal(
        "secagg-shares",
        f"A secret cannot be reconstructed: {what}.",
        "Start a new round; nothing was revealed.",
    )
