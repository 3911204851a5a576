"""Which picture it is, and whose: digests that outlast file names, folders and data set versions.

A privacy ledger charges pictures and patients over years. So a digest depends on nothing that a
server may choose (image size, crop, number of channels) or that a hospital may change without
changing the picture (name, folder, format, metadata). The digests are pseudonyms, not anonymous:
who can guess a patient's id can compute its digest. They stay in the hospital's own files.

BLAKE2b (RFC 7693) with ``salt`` and ``person`` set: pictures, patients and splits can never
yield each other's digests.
"""

from __future__ import annotations

import hashlib
import struct
import unicodedata
from collections.abc import Hashable, Iterable, Sequence
from typing import TYPE_CHECKING

import numpy as np

from common.errors import DataError

if TYPE_CHECKING:  # base imports this module
    from common.datasets.base import IntArray, UInt8Array

DIGEST_BYTES = 16
_SALT = b"consilium"


def picture_digest(pixels: UInt8Array) -> bytes:
    """Return the 16-byte digest of one picture, uint8 (H, W, C) with C = 1 or 3.

    BLAKE2b-128 over height, width, channels (three 64-bit little-endian numbers) and the pixels,
    in one normal form: grey stored as three equal channels counts as one channel, and of the
    eight ways to turn and mirror the picture the one whose bytes come first is taken. A camera's
    orientation tag is metadata, which some tools apply to the pixels and others strip.
    """
    if pixels.shape[2] == 3 and _is_grey(pixels):
        pixels = pixels[..., :1]
    if pixels.shape[0] > pixels.shape[1]:
        pixels = pixels.swapaxes(0, 1)
    height, width, channels = pixels.shape
    views = [pixels, pixels[::-1], pixels[:, ::-1], pixels[::-1, ::-1]]
    if height == width:
        views += [view.swapaxes(0, 1) for view in views]
    # The first row decides nearly always, so that only one view is copied whole.
    rows = [view[0].tobytes() for view in views]
    least = min(rows)
    content = min(view.tobytes() for view, row in zip(views, rows, strict=True) if row == least)
    digest = hashlib.blake2b(digest_size=DIGEST_BYTES, salt=_SALT, person=b"picture")
    digest.update(struct.pack("<3Q", height, width, channels))
    digest.update(content)
    return digest.digest()


def _is_grey(pixels: UInt8Array) -> bool:
    # The first row spares most coloured pictures the whole comparison.
    return all(bool((part == part[..., :1]).all()) for part in (pixels[0], pixels))


def picture_digests(images: UInt8Array) -> UInt8Array:
    """Return uint8 (N, 16): the :func:`picture_digest` of each of ``images`` (N, H, W, C)."""
    return stack_digests([picture_digest(image) for image in images])


def patient_digest(patient: str) -> bytes:
    """Return the 16-byte digest of a patient's id, in whatever source it stands.

    Blanks around the id and the Unicode form (composed or not) make no difference; case and
    leading zeros do. Raises :class:`DataError` for an empty id.
    """
    text = unicodedata.normalize("NFC", patient.strip())
    if not text:
        raise DataError("A patient's id is empty.", "Give the patient an id, such as a number.")
    return hashlib.blake2b(
        text.encode("utf-8", "surrogateescape"),
        digest_size=DIGEST_BYTES,
        salt=_SALT,
        person=b"patient",
    ).digest()


def patient_digests(patients: Iterable[str]) -> UInt8Array:
    """Return uint8 (N, 16): the :func:`patient_digest` of each id, zeros where it is empty."""
    known: dict[str, bytes] = {"": bytes(DIGEST_BYTES)}
    rows = []
    for patient in patients:
        if patient not in known:
            known[patient] = patient_digest(patient)
        rows.append(known[patient])
    return stack_digests(rows)


def stack_digests(rows: Sequence[bytes]) -> UInt8Array:
    """Return 16-byte digests as uint8 (N, 16), writable."""
    return np.frombuffer(b"".join(rows), dtype=np.uint8).reshape(-1, DIGEST_BYTES).copy()


def digest_keys(digests: UInt8Array) -> list[bytes | None]:
    """Return each row of ``digests`` (N, 16) as bytes; None for zeros: nothing is known."""
    content, unknown = digests.tobytes(), bytes(DIGEST_BYTES)
    rows = [content[i : i + DIGEST_BYTES] for i in range(0, len(content), DIGEST_BYTES)]
    return [None if row == unknown else row for row in rows]


def link(*columns: Sequence[Hashable | None]) -> IntArray:
    """Number what hangs together: int64 (N,), 0…U−1 in order of first appearance.

    Two items share a number when any column holds the same key for both, or when a chain of
    such pairs joins them. None is no key.
    """
    parent = list(range(len(columns[0])))

    def root_of(i: int) -> int:
        while parent[i] != i:
            parent[i] = parent[parent[i]]
            i = parent[i]
        return i

    for column in columns:
        first: dict[Hashable, int] = {}
        for i, key in enumerate(column):
            if key is not None:
                a, b = root_of(first.setdefault(key, i)), root_of(i)
                parent[max(a, b)] = min(a, b)
    roots = np.array([root_of(i) for i in range(len(parent))], dtype=np.int64)
    return np.unique(roots, return_inverse=True)[1].astype(np.int64)


def split_keys(digests: UInt8Array, patients: UInt8Array, seed: int) -> list[bytes]:
    """Return a key for each image by which splits rank it: pseudorandom, and the same for ever.

    It depends on ``seed`` and on the patient, or on the picture where no patient is known: so a
    further picture of a patient does not change the rank of the patient's others.
    """
    key = (seed % 2**64).to_bytes(8, "little")
    pictures = digest_keys(digests)
    return [
        hashlib.blake2b(
            patient or picture or b"",
            digest_size=DIGEST_BYTES,
            key=key,
            salt=_SALT,
            person=b"split",
        ).digest()
        for patient, picture in zip(digest_keys(patients), pictures, strict=True)
    ]
