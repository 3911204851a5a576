"""Joined, and still admitted: the kit under the pinned key, the roster, the authority."""

from __future__ import annotations

from datetime import date, timedelta

from common.errors import ConfigError
from deploy.doctor.case import Case
from deploy.doctor.result import Finding, fail, good, warn

SOON = 30
"""Days before an end from which it is said."""


def kit(case: Case) -> Finding:
    """The kit is there, and all of it is signed under the key that this hospital pinned."""
    from deploy.provision import certificates
    from deploy.provision.hospital import pinned
    from deploy.provision.keys import coordinator_fingerprint
    from deploy.provision.kit import AUTHORITY, Kit

    key = pinned(case.folder)
    if key is None or not case.folder.kit.is_dir():
        return fail(
            "this hospital has not joined: there is no kit, or no pinned key of the coordinator",
            "send request.json to the coordinator; with the kit that comes back: consilium "
            f"hospital join {case.folder.root} KIT",
        )
    try:
        received = Kit.read(case.folder.kit)
    except ConfigError as error:
        return fail(error.what, f"join again: consilium hospital join {case.folder.root} KIT")
    authority = certificates.parse_certificate(received.contents[AUTHORITY], AUTHORITY)
    # Whether the authority is valid today is told by a check of its own, with its own remedy.
    last = authority.not_valid_after_utc - timedelta(seconds=1)
    told, _ = received.verify(key, min(max(case.now, authority.not_valid_before_utc), last))
    return good(
        f"federation {told.description.name}, issued {told.issued}, coordinator's key "
        f"{coordinator_fingerprint(key)}"
    )


def admission(case: Case) -> Finding:
    """The roster has this hospital, with its own key, for today and some time to come."""
    from deploy.provision.keys import load_identity

    name, today = case.file.name, case.now.date()
    entry = {e.name: e for e in case.roster.entries}.get(name)
    if entry is None:
        return fail(
            f"the roster has no hospital {name}",
            "send request.json to the coordinator, and join with the kit made after that",
        )
    if entry.identity != load_identity(case.folder.identity_key).public:
        return fail(
            f"the roster has another identity key for {name} than this hospital's own",
            "ask the coordinator which request was admitted, and compare its fingerprint",
        )
    if today.isoformat() < entry.valid_from:
        return fail(
            f"{name} is admitted from {entry.valid_from} only",
            "check this machine's date; else wait until then",
        )
    renew = "ask the coordinator to admit request.json again, and join with the new kit"
    left = (date.fromisoformat(entry.expires) - today).days
    if left < 0:
        return fail(f"the admission of {name} expired on {entry.expires}", renew)
    valid = sum(e.valid_from <= today.isoformat() <= e.expires for e in case.roster.entries)
    found = f"admitted until {entry.expires} ({left} days), with {valid - 1} other hospital(s)"
    return warn(found, renew) if left < SOON else good(found)


def authority(case: Case) -> Finding:
    """The certificate authority of the kit has not ended."""
    from deploy.provision import certificates

    certificate = certificates.load_certificate(case.folder.authority)
    ends = certificate.not_valid_after_utc
    renew = "ask the coordinator: after it the federation must be made anew, and joined anew"
    if case.now >= ends:
        return fail(f"ca.crt expired on {ends.date()}", renew)
    if case.now < certificate.not_valid_before_utc:
        return fail(
            f"ca.crt is valid from {certificate.not_valid_before_utc:%Y-%m-%d %H:%M} UTC only",
            "set this machine's clock",
        )
    left = certificates.days_left(certificate, case.now)
    found = f"valid until {ends.date()} ({left} days)"
    return warn(found, renew) if left < SOON else good(found)
