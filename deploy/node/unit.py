"""A systemd unit for a hospital's node: started at boot, restarted, shut in."""

from __future__ import annotations

from client_app.hospital_file import HospitalFile, HospitalFolder
from deploy.runtime import systemd


def unit(file: HospitalFile, folder: HospitalFolder, user: str) -> str:
    """The unit's text: the node may write to its folder and read the pictures, and little else.

    Its connection to the server goes out; none comes in. ConfigError for a path or an account that
    a unit cannot have.
    """
    pictures = file.folder.absolute()
    return systemd.unit(
        name=file.name,
        what=f"node of {file.name}",
        folder=folder.root.absolute(),
        user=user,
        command=("hospital", "start"),
        readable=None if pictures.is_relative_to(folder.root) else pictures,
    )
