"""The hospital's own files: are they there, right, its own, and nobody else's?"""

from __future__ import annotations

import math
import os
import pwd
import stat
from pathlib import Path

from deploy.doctor.case import Case
from deploy.doctor.result import Finding, fail, good, warn

_OPEN = 0o077
"""Permission bits of everybody but the owner."""


def folder(case: Case) -> Finding:
    """The folder is one that ``consilium hospital init`` made."""
    root = case.folder.root
    if not root.is_dir():
        return fail(f"{root} is no folder", "name the folder of `consilium hospital init`")
    if not os.access(root, os.R_OK | os.X_OK, effective_ids=True):
        owner = _user(root.stat().st_uid)
        return fail(f"this user may not enter {root}: it is {owner}'s", f"check as user {owner}")
    if not os.path.lexists(case.folder.file):
        return fail(
            f"{root} has no hospital.toml: it is no hospital's folder",
            "name the folder of `consilium hospital init`, or restore hospital.toml from a backup",
        )
    return good(str(root.absolute()))


def hospital_toml(case: Case) -> Finding:
    """``hospital.toml`` can be read, and every entry is right."""
    where = f", server {case.file.address}" if case.file.address else ""
    return good(f"hospital {case.file.name}, pictures in {case.file.folder}{where}")


def policy_toml(case: Case) -> Finding:
    """``policy.toml`` can be read, and every entry is right."""
    p = case.policy.privacy
    total = "no limit on ε" if math.isinf(p.total_epsilon) else f"ε ≤ {p.total_epsilon:g}"
    secagg = "required" if case.policy.secagg_required else "optional"
    open_ = "; training without privacy is allowed" if p.allow_non_private else ""
    shared = "; noise may be shared among hospitals" if p.shared_noise else ""
    return good(
        f"{total} at δ = {p.total_delta:g} for each {p.unit}; secure aggregation {secagg}{open_}"
        f"{shared}"
    )


def permissions(case: Case) -> Finding:
    """Nobody but the owner may enter the folder or read what is private; one owner for all."""
    f = case.folder
    home = (
        f.root / name
        for name in (
            "ledger.sqlite",
            "ledger.head",
            "egress.tsv",
            "egress-counts.json",
            "runs",
            "locks",
        )
    )
    needed = (f.root, f.private, f.identity_key, f.node_key)
    missing = [path for path in needed if not path.exists()]
    if missing:
        return fail(
            f"{missing[0]} is missing",
            "restore it from a backup; without one, begin anew in another folder",
        )
    present = [*needed, *(path for path in home if path.exists())]
    if loose := [path for path in present if path.stat().st_mode & _OPEN]:
        told = ", ".join(f"{path} has mode {_mode(path)}" for path in loose)
        commands = "; ".join(f"chmod {'700' if p.is_dir() else '600'} {p}" for p in loose)
        keys = {f.identity_key, f.node_key} & set(loose)
        exposed = "; if somebody may have read a key, have it revoked and enrol anew"
        return fail(told, commands + (exposed if keys else ""))
    owner = f.root.stat().st_uid
    if foreign := [path for path in present if path.stat().st_uid != owner]:
        told = ", ".join(f"{path} belongs to {_user(path.stat().st_uid)}" for path in foreign)
        return fail(
            f"{told}, and the folder to {_user(owner)}",
            f"chown -R {_user(owner)} {f.root}",
        )
    if owner != os.geteuid():
        return warn(
            f"all belongs to {_user(owner)}; this check runs as {_user(os.geteuid())}",
            f"run the check, and the node, as {_user(owner)}: what may be read and written is "
            "that user's to see",
        )
    return good(f"folders 0700, files 0600, all of {_user(owner)}")


def request(case: Case) -> Finding:
    """``request.json`` is whole, signed, and of the hospital that ``hospital.toml`` names."""
    if case.request.name != case.file.name:
        return fail(
            f"request.json is of {case.request.name}, and hospital.toml says {case.file.name}",
            f'write name = "{case.request.name}" into {case.folder.file}',
        )
    return good(f"of {case.request.name}, made {case.request.time}")


def node_key(case: Case) -> Finding:
    """The node's key is P-384 in OpenSSH's form, and the one that the request was made with."""
    from deploy.provision.keys import load_node_key, node_line

    key = load_node_key(case.folder.node_key)
    if node_line(key.public_key()) != case.request.node:
        return _foreign(case.folder.node_key)
    return good("ECDSA P-384, OpenSSH, belongs to request.json")


def identity_key(case: Case) -> Finding:
    """The identity key is Ed25519, and the one that the request was made with."""
    from deploy.provision.keys import load_identity

    if load_identity(case.folder.identity_key).public != case.request.identity:
        return _foreign(case.folder.identity_key)
    return good("Ed25519, belongs to request.json")


def _foreign(path: Path) -> Finding:
    return fail(
        f"{path} is not the key that request.json was made with: the federation knows another",
        "restore private/ and request.json from the same backup; without one, enrol anew in "
        "another folder",
    )


def _mode(path: Path) -> str:
    return f"{stat.S_IMODE(path.stat().st_mode):04o}"


def _user(number: int) -> str:
    try:
        return pwd.getpwuid(number).pw_name
    except KeyError:
        return str(number)
