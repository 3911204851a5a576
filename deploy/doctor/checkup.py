"""All checks in their order, what each needs, and the document that they come to.

``consilium hospital check --json`` prints::

    {"hospital": name or null, "status": "PASS" | "WARN" | "FAIL" (the worst),
     "checks": [{"name", "status", "found", "remedy"}, ...]}

``remedy`` is "" where the status is PASS. A check that could not be made because another one
failed is WARN, "not checked".
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from client_app.hospital_file import HospitalFolder
from common.errors import ConsiliumError
from deploy.doctor import enrolment, house, machine, pictures, server, state
from deploy.doctor.case import Case
from deploy.doctor.result import WORST, Finding, NotChecked, Result


@dataclass(frozen=True)
class Check:
    """A check, and those that must not have failed before it makes sense."""

    name: str
    run: Callable[[Case], Finding]
    needs: tuple[str, ...] = ()


CHECKS = (
    Check("versions", machine.versions),
    Check("memory", machine.memory),
    Check("shared memory", machine.shared_memory),
    Check("GPU", machine.gpu),
    Check("folder", house.folder),
    Check("disk", machine.disk, ("folder",)),
    Check("hospital.toml", house.hospital_toml, ("folder",)),
    Check("policy.toml", house.policy_toml, ("folder",)),
    Check("permissions", house.permissions, ("folder",)),
    Check("request", house.request, ("hospital.toml",)),
    Check("node key", house.node_key, ("permissions", "request")),
    Check("identity key", house.identity_key, ("permissions", "request")),
    Check("kit", enrolment.kit, ("folder",)),
    Check("admission", enrolment.admission, ("hospital.toml", "kit", "identity key")),
    Check("members", enrolment.members, ("policy.toml", "admission")),
    Check("roster age", enrolment.roster_age, ("policy.toml", "kit")),
    Check("CA certificate", enrolment.authority, ("kit",)),
    Check("server address", server.address, ("hospital.toml", "kit")),
    Check("server TLS", server.tls, ("server address", "CA certificate")),
    Check("server certificate", server.certificate, ("server TLS",)),
    Check("server health", server.health, ("server TLS",)),
    Check("clock", server.clock, ("server health",)),
    Check("proxy", machine.proxies, ("hospital.toml", "kit")),
    Check("classes", pictures.classes, ("hospital.toml", "kit")),
    Check("pictures", pictures.pictures, ("classes",)),
    Check("split", pictures.split, ("pictures",)),
    Check("patients", pictures.patients, ("policy.toml", "pictures")),
    Check("delta", pictures.delta, ("policy.toml", "pictures")),
    Check("state", state.writable, ("folder",)),
    Check("egress log", state.egress, ("state",)),
    Check("ledger", state.ledger, ("policy.toml",)),
    Check("budget", state.budget, ("ledger",)),
)


def examine(
    folder: HospitalFolder, now: datetime, checks: Sequence[Check] = CHECKS
) -> dict[str, Any]:
    """The document above. Raises nothing: a check that crashes has failed."""
    case = Case(folder, now)
    results: dict[str, Result] = {}
    try:
        for check in checks:
            results[check.name] = _made(check, case, results)
    finally:
        case.close()
    hospital = results.get("hospital.toml")
    statuses = {result.status for result in results.values()}
    return {
        "hospital": case.file.name if hospital and hospital.status == "PASS" else None,
        "checks": [
            {"name": r.name, "status": r.status, "found": r.found, "remedy": r.remedy}
            for r in results.values()
        ],
        "status": next((status for status in WORST if status in statuses), "PASS"),
    }


def _made(check: Check, case: Case, before: dict[str, Result]) -> Result:
    for name in check.needs:
        if (needed := before.get(name)) and (needed.status == "FAIL" or needed.needed):
            return _not_checked(check.name, needed.needed or name)
    try:
        finding = check.run(case)
    except NotChecked as other:
        return _not_checked(check.name, other.needed)
    except ConsiliumError as error:
        return Result(check.name, "FAIL", error.what, error.remedy)
    except OSError as error:
        what = f"{error.filename}: " if error.filename else ""
        return Result(
            check.name,
            "FAIL",
            f"{what}{error.strerror or type(error).__name__}",
            "check that this user may read it, that the disk works, and check again",
        )
    except Exception as error:
        # Its text may hold anything; its kind does not.
        return Result(
            check.name,
            "FAIL",
            f"the check itself broke down ({type(error).__name__})",
            "report this, with the versions that stand above",
        )
    return Result(check.name, finding.status, finding.found, finding.remedy)


def _not_checked(name: str, needed: str) -> Result:
    return Result(
        name, "WARN", f"not checked: see {needed}", f"correct {needed}, then check again", needed
    )
