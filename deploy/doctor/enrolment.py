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


def members(case: Case) -> Finding:
    """This hospital's people have decided on everybody who joined, and accepted enough."""
    from client_app.members import Members, waiting
    from deploy.provision.keys import load_identity

    own, limits = load_identity(case.folder.identity_key).public, case.policy.secagg
    rows = Members.load(case.folder.members).standings(case.roster, own)
    accepted = 1 + sum(one.state == "accepted" for one in rows)
    found = f"{accepted} accepted, this hospital included"
    if accepted < limits.min_trusted:
        found += f" (a sum needs {limits.min_trusted}: min-trusted)"
    left = waiting(rows)
    if not left:
        return good(found)
    if limits.accept_members == "auto" and accepted >= limits.min_trusted:
        return good(f"{found}; {len(left)} more may be in sums, unasked")
    names = ", ".join(one.name + (f" ({one.note})" if one.note else "") for one in left[:5])
    more = ", …" if len(left) > 5 else ""
    return warn(
        f"{found}; {len(left)} of the roster wait to be accepted: {names}{more}",
        "no sum is shared with them before: see who it is, and compare fingerprints by telephone: "
        f"consilium hospital members {case.folder.root}",
    )


def roster_age(case: Case) -> Finding:
    """The roster is not older than the policy allows."""
    from common.roster import check_age

    most = case.policy.roster_max_age_days
    check_age(case.roster, most, case.now)
    when = case.roster.issued or "a day that it does not say"
    return good(f"signed on {when}; {f'at most {most:g} days' if most else 'any age'} is allowed")


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
