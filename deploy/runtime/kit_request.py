"""A hospital asks the server for its newest kit: what it signs, and how the server checks it.

``GET /v1/consilium/kit`` with three headers: ``consilium-hospital`` (its name),
``consilium-time`` (UNIX seconds) and ``consilium-signature`` (base64, Ed25519 by the hospital's
identity key over label, federation, hospital and time; RFC 8032). A kit is public; the signature
keeps the roster from whoever is not on it. Within the window a request may be repeated, to the
same end.
"""

from __future__ import annotations

import base64
from collections.abc import Mapping
from datetime import datetime

from common.errors import ConsiliumError
from common.federation_file import decoded
from common.secagg.binding import canonical
from common.secagg.keys import Identity
from common.secagg.keys import verify as verify_signature

PATH = "/v1/consilium/kit"
HOSPITAL, TIME, SIGNATURE = "consilium-hospital", "consilium-time", "consilium-signature"
WINDOW = 300
"""Seconds that a hospital's clock may differ from the server's."""
_LABEL = "consilium kit request"


class KitRefused(ConsiliumError):
    """Whoever asks is no member, or did not sign so; which of them is told to nobody."""

    code = "kit"


def headers_for(
    federation: str, hospital: str, identity: Identity, now: datetime
) -> dict[str, str]:
    """The headers of a request at ``now`` (aware), signed by the hospital's ``identity``."""
    seconds = str(int(now.timestamp()))
    signature = identity.sign(canonical(_LABEL, federation, hospital, seconds))
    return {
        HOSPITAL: hospital,
        TIME: seconds,
        SIGNATURE: base64.b64encode(signature).decode(),
    }


def verify(
    headers: Mapping[str, str], federation: str, members: Mapping[str, bytes], now: datetime
) -> str:
    """The name of the member that asks; :class:`KitRefused` otherwise, always in the same words.

    ``headers``: by lower-case name. ``members``: name → 32-byte identity key.
    """
    hospital, seconds = headers.get(HOSPITAL, ""), headers.get(TIME, "")
    try:
        # One spelling of a number only: what is signed is the text.
        known = str(int(seconds)) == seconds if len(seconds) <= 12 else False
        fresh = known and abs(int(seconds) - now.timestamp()) <= WINDOW
        signature = decoded(headers.get(SIGNATURE, ""), 64)
    except ValueError:
        fresh, signature = False, b""
    key = members.get(hospital)
    statement = canonical(_LABEL, federation, hospital, seconds)
    if not fresh or key is None or not verify_signature(key, signature, statement):
        raise KitRefused(
            "the server gives this hospital no kit",
            "compare this machine's clock with the server's; else ask the coordinator whether the "
            "hospital is admitted with the keys that it has",
        )
    return hospital
