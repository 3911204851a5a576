"""A systemd unit for a hospital's node: started at boot, restarted, shut in."""

from __future__ import annotations

import os
import sys

from client_app.hospital_file import HospitalFile, HospitalFolder


def unit(file: HospitalFile, folder: HospitalFolder, user: str) -> str:
    """The unit's text: the node may write to its folder and read the pictures, and little else."""
    pictures = file.folder.absolute()
    readable = "" if pictures.is_relative_to(folder.root) else f"ReadOnlyPaths={_path(pictures)}\n"
    return f"""\
# Save as /etc/systemd/system/consilium-{file.name}.service, then:
#   systemctl daemon-reload && systemctl enable --now consilium-{file.name}
[Unit]
Description=consilium node of {file.name}
Wants=network-online.target
After=network-online.target time-sync.target

[Service]
Type=exec
User={user}
ExecStart={_path(sys.executable)} -m deploy.cli hospital start {_path(folder.root)}
# It restarts its own processes; this is for when it fails itself.
Restart=always
RestartSec=30
TimeoutStopSec=20
KillMode=mixed
UMask=0077
# Nothing of the system but what it needs. The connection to the server goes out; none comes in.
NoNewPrivileges=yes
CapabilityBoundingSet=
ProtectSystem=strict
ReadWritePaths={_path(folder.root)}
{readable}PrivateTmp=yes
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


def _path(path: str | os.PathLike[str]) -> str:
    """A path as systemd reads it: quoted, percent signs doubled."""
    text = str(path).replace("%", "%%").replace("\\", "\\\\").replace('"', '\\"')
    return f'"{text}"' if " " in text else text
