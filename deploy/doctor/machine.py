"""The machine: versions, room on the disk and in memory, proxies."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path
from urllib.request import getproxies_environment, proxy_bypass

from deploy.doctor.case import Case
from deploy.doctor.result import Finding, fail, good, warn

MB, GB = 10**6, 10**9

REQUIRED = {"flwr": "1.41.0", "torch": "2.13", "opacus": "1.6"}
"""Distribution → the release, or its first two numbers: what pyproject.toml asks for."""
PYTHON = ((3, 11), (3, 13))
"""From (included) and to (not included)."""


def versions(case: Case) -> Finding:
    """Python and the three libraries on which results and promises hang."""
    found: dict[str, str] = {}
    for name in REQUIRED:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = ""
    return judge_versions(sys.version_info[:3], found)


def judge_versions(python: tuple[int, ...], found: Mapping[str, str]) -> Finding:
    """FAIL for what is missing or another release; ``found`` has "" for what is missing."""
    running = ".".join(map(str, python))
    told = ", ".join(f"{name} {version or 'missing'}" for name, version in found.items())
    text = f"{told}, Python {running}"
    wrong = [n for n, v in REQUIRED.items() if not _is(found.get(n, ""), v)]
    if wrong:
        asked = ", ".join(f"{name} {REQUIRED[name]}" for name in wrong)
        return fail(text, f"install consilium anew in a virtual environment of its own: {asked}")
    if not PYTHON[0] <= python[:2] < PYTHON[1]:
        return fail(text, "use Python 3.11 or 3.12")
    return good(text)


def _is(version: str, asked: str) -> bool:
    public = version.partition("+")[0]  # 2.13.0+cpu
    return public == asked or (asked.count(".") == 1 and public.startswith(f"{asked}."))


def disk(case: Case) -> Finding:
    """Room where the hospital keeps its state: ledger, egress log, the last update."""
    return judge_disk(shutil.disk_usage(case.folder.root).free, case.folder.root)


def judge_disk(free: int, where: Path) -> Finding:
    """WARN below 2 GB of ``free`` bytes, FAIL below 200 MB."""
    found = f"{_size(free)} free at {where}"
    remedy = "make room; a hospital whose ledger or egress log cannot be written sends nothing"
    if free < 200 * MB:
        return fail(found, remedy)
    return warn(found, remedy) if free < 2 * GB else good(found)


def memory(case: Case) -> Finding:
    """Memory that is available, within the container's limit where there is one."""
    return judge_memory(available_memory())


def judge_memory(available: int | None) -> Finding:
    """WARN below 2 GB of ``available`` bytes, and where it is not known (None)."""
    if available is None:
        return warn("this system does not say", "see to it that 2 GB are available for training")
    found = f"{_size(available)} available"
    if available < 2 * GB:
        return warn(found, "end other programs, or raise the container's limit, to 2 GB or more")
    return good(found)


def available_memory() -> int | None:
    """Bytes: the system's, or what is left of the control group's limit; None if unknown."""
    figures = []
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                figures.append(int(line.split()[1]) * 1024)
    except (OSError, ValueError):
        pass
    group = Path("/sys/fs/cgroup")
    try:
        limit = int((group / "memory.max").read_text())
        figures.append(limit - int((group / "memory.current").read_text()))
    except (OSError, ValueError):  # no control groups of version 2, or "max": no limit
        pass
    return max(0, min(figures)) if figures else None


def gpu(case: Case) -> Finding:
    """What training computes on."""
    from common.devices import device_name, device_of  # torch, which takes seconds

    device = device_of("auto")
    fitted = [p.name for p in Path("/dev").glob("nvidia[0-9]*")]
    return judge_gpu(device_name(device) if device.type == "cuda" else "", fitted)


def judge_gpu(used: str, fitted: Sequence[str]) -> Finding:
    """WARN for a GPU in the machine (``fitted``) that torch does not see; none is needed.

    ``used``: the name of the one that torch sees.
    """
    if used:
        return good(f"training computes on {used}")
    if fitted:
        return warn(
            f"there is a GPU ({', '.join(fitted)}), and torch does not see it: training computes "
            "on the processor",
            "install a CUDA build of torch and its driver, and let the node at the device "
            "(systemd: take out PrivateDevices); or leave it: it is only slower",
        )
    return good("none: training computes on the processor")


def shared_memory(case: Case) -> Finding:
    """``/dev/shm``: a container may have next to none."""
    try:
        status = os.statvfs("/dev/shm")
    except OSError:
        return warn("there is no /dev/shm", "mount one of 64 MB or more (docker: --shm-size)")
    size = status.f_frsize * status.f_blocks
    found = f"/dev/shm has {_size(size)}"
    if size < 60 * MB:
        return warn(found, "give it 64 MB or more (docker: --shm-size=256m)")
    return good(found)


def proxies(case: Case) -> Finding:
    """Proxies in the environment that Flower's client (httpx) would go through."""
    return judge_proxies(getproxies_environment(), case.address[0])


def judge_proxies(found: Mapping[str, str], host: str) -> Finding:
    """WARN if a connection to ``https://host`` would go through a proxy.

    ``found``: by scheme, as ``urllib.request.getproxies_environment`` reads them. Their values may
    hold a password and are not repeated.
    """
    used = [name for name in ("https", "all") if found.get(name)]
    if not used:
        plain = "; HTTP_PROXY is set, and not used for https" if found.get("http") else ""
        return good(f"none for this connection{plain}")
    names = " and ".join(f"{name.upper()}_PROXY" for name in used)
    if proxy_bypass(host, dict(found)):
        return good(f"{names} set, but NO_PROXY names {host}")
    return warn(
        f"{names} set: Flower's client goes to {host} through it, and this check went directly",
        f"if the node needs no proxy, start it with NO_PROXY={host}; if it does, see to it that "
        "the proxy lets CONNECT through and leaves the TLS inside as it is",
    )


def _size(count: int) -> str:
    return f"{count / GB:.1f} GB" if count >= GB else f"{count / MB:.0f} MB"
