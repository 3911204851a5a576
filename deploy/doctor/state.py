"""What the hospital keeps: can it be written, is the ledger sound, what is left of the budget?"""

from __future__ import annotations

import errno
import math
import os
from pathlib import Path

from common.simulation import LEDGER
from deploy.doctor.case import Case
from deploy.doctor.result import Finding, NotChecked, fail, good, warn

LOW = 0.1
"""Part of the total ε that is left, below which it is said."""
_WRITE = "correct owner and permissions; a file system that is read-only must be mounted writable"


def writable(case: Case) -> Finding:
    """The node may write in its folder: nothing leaves a hospital that cannot note it."""
    root = case.folder.root
    places = [p for p in (root, root / "runs") if p.exists()]
    for place in places:
        if reason := _cannot_make(place):
            return fail(f"no file can be made in {place} ({reason})", _WRITE)
    return good(f"files can be made in {root}")


def egress(case: Case) -> Finding:
    """The egress log can be written, where there is one."""
    path = case.folder.root / _egress_name()
    if not os.path.lexists(path):
        return good("none yet: nothing has left this hospital")
    try:
        # Opened as the node opens it, and closed: nothing is written, no time is changed.
        os.close(os.open(path, os.O_WRONLY | os.O_APPEND | os.O_NONBLOCK))
    except OSError as error:
        return fail(f"{path} cannot be written ({error.strerror})", _WRITE)
    return good(f"{path.name} can be written")


def ledger(case: Case) -> Finding:
    """The privacy ledger is whole, or there is none yet."""
    path = case.folder.root / LEDGER
    case.spent = []
    if not path.exists() and not path.with_suffix(".head").exists():
        return good("none yet: nothing was trained")
    case.spent = None
    journal = path.with_name(path.name + "-journal")
    if journal.exists():
        # Opening would undo what is half done, and so write here; the node may be at it, too.
        return warn(
            f"a change of the ledger is under way, or a crash left it half done ({journal.name})",
            "check again in a minute; if it stays, start the node once, which undoes it",
        )
    from common.privacy.ledger import data_sets
    from deploy.ledger.opening import opened
    from deploy.ledger.view import left

    limits = case.policy.privacy
    with opened(path) as book:
        spent = []
        for data in data_sets(book.chain):
            alone = book.total(data.fingerprint, limits)
            both = book.total(data.fingerprint, limits, held=True)
            spent.append((data.fingerprint, alone.epsilon, left(both, limits)))
        case.spent = spent
        number, head = book.chain.head()
        noted = path.with_suffix(".head").exists()
        found = f"sound: {number} entries, head {head[:16]}…, {len(book.runs())} run(s)"
    if not noted:
        return warn(
            f"{found}; its head is not noted beside it",
            "find out who removed ledger.head; compare `consilium ledger verify` with a head that "
            "was noted elsewhere",
        )
    return good(found)


def budget(case: Case) -> Finding:
    """What the worst-off picture of any data set has spent, and what is left of the policy's ε."""
    if case.spent is None:
        raise NotChecked("ledger")
    return judge_budget(case.spent, case.policy.privacy.total_epsilon, case.folder.policy)


def judge_budget(spent: list[tuple[str, float, float]], total: float, policy: Path) -> Finding:
    """WARN where less than a tenth of ``total`` ε is left; ``spent``: data set, spent, left."""
    if not spent:
        return good("nothing spent yet")
    name, most, rest = min(spent, key=lambda row: (row[2], -row[1]))
    used = "∞ (trained without privacy)" if math.isinf(most) else f"{most:.3g}"
    if math.isinf(total):
        return good(f"ε = {used} spent; the policy has no limit")
    found = f"ε = {used} spent, {rest:.3g} of {total:g} left (data set {name[:8]})"
    if rest < LOW * total:
        return warn(
            found,
            "see `consilium ledger show`: unfinished runs can be closed; more than that only the "
            f"data-protection officer may allow (total-epsilon in {policy})",
        )
    return good(found)


def _egress_name() -> str:
    from client_app.egress import FILE  # brings Flower along

    return FILE


def _cannot_make(place: Path) -> str:
    """Why no file can be made in ``place``, or "". Nothing is left behind, not even a new time."""
    try:
        # A file without a name: it is gone with its descriptor.
        os.close(os.open(place, os.O_TMPFILE | os.O_WRONLY, 0o600))
    except OSError as error:
        if error.errno not in (errno.EOPNOTSUPP, errno.EISDIR, errno.ENOENT, errno.EINVAL):
            return error.strerror or type(error).__name__
        if not os.access(
            place, os.W_OK | os.X_OK, effective_ids=True
        ):  # a file system that knows no such files
            return "permission denied"
    return ""
