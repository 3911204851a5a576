"""What of a systemd unit is the same for a hospital's node and a federation's server.

A unit is a file of lines that root's systemd obeys: a path with a newline in it would be another
line, of anybody's. So paths and accounts are checked here, and quoted as systemd.syntax(7) has it.
"""

from __future__ import annotations

import os
import re
import sys
from pathlib import Path

from common.errors import ConfigError
from deploy.runtime.limits import WANTED

_ACCOUNT = re.compile(r"[A-Za-z_][A-Za-z0-9_.@-]{0,62}|[0-9]{1,10}")
_PLAIN = re.compile(r"[A-Za-z0-9/._+@:,=-]+")


def account(user: str) -> str:
    """``user`` if it can be an account's name or number; ConfigError otherwise."""
    if not _ACCOUNT.fullmatch(user):
        raise ConfigError(
            f"{user[:80]!a} is no name of an account",
            "give --user a name of letters, digits, and . _ - @, or a number",
        )
    return user


def path(given: str | os.PathLike[str]) -> str:
    """A path as systemd reads it in a list: quoted where it must be, percent signs doubled.

    ConfigError for one that is not absolute, or has characters that cannot be printed.
    """
    text = os.fspath(given)
    if not text.isprintable() or not text.startswith("/"):
        raise ConfigError(
            f"the path {text[:200]!a} cannot stand in a systemd unit: it is not absolute, or has a "
            "line break or another character that cannot be printed",
            "rename the folder, and print the unit again",
        )
    text = text.replace("%", "%%")  # everywhere in a unit
    if _PLAIN.fullmatch(text.replace("%%", "")):
        return text
    escaped = text.replace("\\", "\\\\").replace('"', '\\"')
    return f'"{escaped}"'


def word(given: str | os.PathLike[str]) -> str:
    """The same as a word of a command line, where a dollar sign would begin a variable."""
    return path(given).replace("$", "$$")


def unit(
    *,
    name: str,
    what: str,
    folder: Path,
    user: str,
    command: tuple[str, str],
    readable: Path | None = None,
) -> str:
    """A unit's text: ``consilium COMMAND folder`` as ``user``, shut in.

    ``name``: of the service, after ``consilium-``; ``what``: of the description; both of names that
    were checked. The process may write to ``folder``, read ``readable``, and do little else.
    ConfigError for a path or an account that a unit cannot have.
    """
    read_only = f"ReadOnlyPaths={path(readable)}\n" if readable is not None else ""
    return f"""\
# Save as /etc/systemd/system/consilium-{name}.service, then:
#   systemctl daemon-reload && systemctl enable --now consilium-{name}
[Unit]
Description=consilium {what}
Wants=network-online.target
After=network-online.target time-sync.target

[Service]
Type=exec
User={account(user)}
ExecStart={word(sys.executable)} -m deploy.cli {" ".join(command)} {word(folder)}
# It restarts its own processes; this is for when it fails itself.
Restart=always
RestartSec=30
TimeoutStopSec=20
KillMode=mixed
UMask=0077
LimitNOFILE={WANTED}
# Nothing of the system but what it needs.
NoNewPrivileges=yes
CapabilityBoundingSet=
ProtectSystem=strict
ReadWritePaths={path(folder)}
{read_only}PrivateTmp=yes
PrivateDevices=yes
ProtectKernelTunables=yes
ProtectKernelModules=yes
ProtectControlGroups=yes
ProtectClock=yes
ProtectHostname=yes
RestrictAddressFamilies=AF_INET AF_INET6 AF_UNIX
RestrictNamespaces=yes
RestrictSUIDSGID=yes
LockPersonality=yes

[Install]
WantedBy=multi-user.target
"""
