"""How a federation stands: hospitals, certificates, and what somebody should see to.

``consilium federation status --json`` prints this document (``version`` 1):

* ``federation``: ``name``, ``address``, ``hosts``, ``classes``, ``image_size``, ``channels``
* ``coordinator``: ``key`` (base64), ``fingerprint``
* ``certificates``: ``authority`` and ``server``, each ``expires`` (UTC), ``days_left``,
  ``sha256``; the server's also ``hosts``
* ``issued``: when the newest kits were made (UTC), or null
* ``hospitals``, in the order of names: ``name``, ``state`` (``admitted``, ``expiring``,
  ``expired``, ``revoked``), ``days_left`` (null once revoked), ``admitted``, ``valid_from``,
  ``expires``, ``max_images`` (the most images that it may claim, or null), ``identity`` (base64),
  ``node`` (OpenSSH), ``request_fingerprint``, ``revoked`` (null, or ``time`` and ``reason``)
* ``revoked_keys``: how many pairs of keys are never admitted again
* ``warnings``: sentences

It reads public files only: the private keys are looked at for their permissions, not opened.
"""

from __future__ import annotations

import base64
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from common.errors import ConsiliumError
from common.federation_file import FederationFile, read_limited
from common.secagg import Roster
from deploy.provision import certificates
from deploy.provision.federation import FederationFolder, Settings
from deploy.provision.files import is_open
from deploy.provision.keys import coordinator_fingerprint
from deploy.provision.kit import SIGNED
from deploy.provision.members import Member, members, records, revocation_of, revocations

SOON = 30
"""Days before an end from which it is said."""

Document = dict[str, Any]
_REFRESH = "`consilium federation refresh` writes them anew"


def describe(folder: FederationFolder, now: datetime) -> Document:
    """The document above; ConsiliumError for a folder that cannot be read at all."""
    settings, key = folder.load(), folder.public_key()
    authority, server = (_certificate(path, now) for path in (folder.authority, folder.server))
    hosts = certificates.hosts_of(certificates.load_certificate(folder.server))
    gone = revocations(folder)
    rows = []
    for member in records(folder):
        revoked = revocation_of(member.request, gone)
        left = member.days_left(now)
        state = "expired" if left < 0 else "expiring" if left <= SOON else "admitted"
        rows.append(
            {
                "name": member.name,
                "state": "revoked" if revoked else state,
                "days_left": None if revoked else left,
                "admitted": member.admitted,
                "valid_from": member.valid_from,
                "expires": member.expires,
                "max_images": member.max_images,
                "identity": base64.b64encode(member.request.identity).decode(),
                "node": member.request.node,
                "request_fingerprint": member.request.fingerprint,
                "revoked": revoked and {"time": revoked.time, "reason": revoked.reason},
            }
        )
    document: Document = {
        "version": 1,
        "federation": {
            "name": settings.name,
            "address": settings.address,
            "hosts": list(settings.hosts),
            "classes": list(settings.classes),
            "image_size": settings.image_size,
            "channels": settings.channels,
        },
        "coordinator": {
            "key": base64.b64encode(key).decode(),
            "fingerprint": coordinator_fingerprint(key),
        },
        "certificates": {"authority": authority, "server": server | {"hosts": hosts}},
        "issued": None,
        "hospitals": rows,
        "revoked_keys": len(gone),
    }
    told = _told(folder, key)
    document["issued"] = told and told.issued
    document["warnings"] = [*_endings(document), *_unfinished(folder, settings, told, key),
                            *_exposed(folder)]  # fmt: skip
    return document


def _certificate(path: Path, now: datetime) -> Document:
    certificate = certificates.load_certificate(path)
    return {
        "expires": certificate.not_valid_after_utc.strftime("%Y-%m-%dT%H:%M:%SZ"),
        "days_left": certificates.days_left(certificate, now),
        "sha256": certificates.digest(certificate).hex(),
    }


def _told(folder: FederationFolder, key: bytes) -> FederationFile | None:
    try:
        return FederationFile.load(read_limited(folder.description), key)
    except ConsiliumError:
        return None


def _endings(document: Document) -> Iterator[str]:
    for what, remedy in (
        ("server", "`consilium federation renew` makes a new one"),
        ("authority", "after it a new federation must be made"),
    ):
        one = document["certificates"][what]
        if one["days_left"] <= SOON:
            yield f"the {what}'s certificate ends on {one['expires'][:10]}: {remedy}"
    for row in document["hospitals"]:
        if row["state"] in ("expiring", "expired"):
            verb = "ends" if row["state"] == "expiring" else "ended"
            yield (
                f"the admission of {row['name']} {verb} on {row['expires']}: admit its request "
                "again to extend it"
            )


def _unfinished(
    folder: FederationFolder, settings: Settings, told: FederationFile | None, key: bytes
) -> Iterator[str]:
    current = members(folder)
    server = certificates.load_certificate(folder.server)
    authority = certificates.load_certificate(folder.authority)
    if missing := sorted(set(settings.names()) - set(certificates.hosts_of(server))):
        yield (
            f"the server's certificate is not for {', '.join(missing)}: `consilium federation "
            "renew` makes one that is"
        )
    if not certificates.issued_by(server, authority):
        yield "tls.crt is not of the authority ca.crt: restore both from a backup"
    if told is None or told.description != settings.description():
        yield f"federation.json is not what federation.toml says: {_REFRESH}"
    if told is not None and certificates.digest(authority) != told.ca_sha256:
        yield "ca.crt is not the authority that hospitals were given: restore it from a backup"
    if not _roster_holds(folder, settings.name, current, key):
        yield f"roster.json is not what hospitals/ says: {_REFRESH}"
    for member in current:
        kit = folder.kits / member.name
        if not all(_same(folder.root / name, kit / name) for name in SIGNED):
            yield f"the kit of {member.name} is not up to date: {_REFRESH}"


def _roster_holds(
    folder: FederationFolder, federation: str, current: list[Member], key: bytes
) -> bool:
    try:
        found = Roster.load(read_limited(folder.roster), key)
    except ConsiliumError:
        return False
    entries = tuple(member.entry() for member in current)
    return (found.federation, found.entries) == (federation, entries)


def _same(one: Path, other: Path) -> bool:
    return one.is_file() and other.is_file() and one.read_bytes() == other.read_bytes()


def _exposed(folder: FederationFolder) -> Iterator[str]:
    for path in (folder.coordinator_key, folder.authority_key, folder.server_key):
        if not path.exists() and folder.serves_only and path != folder.server_key:
            continue  # kept elsewhere, as a server should have it
        if not path.exists():
            yield f"the private key {path} is missing: restore it from a backup"
        elif is_open(path):
            yield f"others than its owner may read {path}: chmod 600 {path}"


def render(document: Document, width: int | None) -> None:
    """Print the document as text; nothing is said by colour, nothing in it is read as markup."""
    console = Console(width=width, highlight=False, markup=False, emoji=False, color_system=None)
    federation, ends = document["federation"], document["certificates"]
    console.print(f"federation:  {federation['name']} at {federation['address']}")
    console.print(f"classes:     {', '.join(federation['classes'])}")
    console.print(f"coordinator: {document['coordinator']['fingerprint']}")
    for what in ("authority", "server"):
        one = ends[what]
        left = f"{one['days_left']} days" if one["days_left"] >= 0 else "over"
        console.print(f"{what + ':':<13}certificate until {one['expires'][:10]} ({left})")
    if not document["hospitals"]:
        console.print("no hospital was admitted yet")
    else:
        table = Table(title="Hospitals", title_justify="left", title_style="", header_style="")
        for column in ("name", "state", "from", "to", "images", "fingerprint of the request"):
            table.add_column(column, overflow="fold")
        for row in document["hospitals"]:
            bound = str(row["max_images"] or "any")
            cells = (row["name"], _state(row), row["valid_from"], row["expires"], bound)
            table.add_row(*cells, row["request_fingerprint"])
        console.print(table)
    for warning in document["warnings"]:
        console.print(f"! {warning}")


def _state(row: Document) -> str:
    if row["state"] == "revoked":
        reason = row["revoked"]["reason"]
        return f"revoked {row['revoked']['time'][:10]}" + (f": {reason}" if reason else "")
    if row["state"] == "expiring":
        return f"expires in {row['days_left']} days"
    return str(row["state"])
