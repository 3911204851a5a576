"""A hospital's folder, and ``hospital.toml``: what its node needs to know of its own house.

```
DIR/                     0700
  hospital.toml          name, pictures, own class names: the hospital's, to edit
  policy.toml            its limits: see client_app/policy.py
  request.json           what it sent to the coordinator (public)
  coordinator.pub        the coordinator's key, pinned when it joined: base64 of 32 bytes
  members.json           0600: whom of the roster its people have accepted (client_app/members.py)
  private/               0700
    identity.key         0600: Ed25519, 32 raw bytes (secure aggregation)
    node.key             0600: ECDSA P-384, OpenSSH's format (Flower's node authentication)
  kit/                   what the coordinator gave it, verified (public)
    ca.crt  roster.json  federation.json  coordinator.pub  README.txt
```

```toml
version = 1
name = "st-mary"            # as on the roster

[data]
folder = "data"             # pictures; relative to this file, or absolute
manifest = ""               # table of file, label, patient; "": manifest.csv in the folder, if any
crop = 0                    # side in pixels of the centre that is cut out (0: the whole square)

[classes]                   # own folder or label = the federation's class; others are the same
"segmented neutrophils" = "neutrophil"

[server]
address = ""                # "": where the kit says
```

No torch here: a node reads it for every message.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from pydantic import Field, field_validator

from common.errors import ConfigError
from common.federation_file import (
    FederationFile,
    Table,
    read_key,
    read_limited,
    split_address,
    valid_name,
)
from common.parsing import parse_toml


class Data(Table):
    """The table ``[data]``."""

    folder: str = Field(min_length=1)
    manifest: str = ""
    crop: int = Field(0, ge=0, le=10_000)


class Server(Table):
    """The table ``[server]``."""

    address: str = ""

    @field_validator("address")
    @classmethod
    def _address(cls, address: str) -> str:
        if address:
            split_address(address)
        return address


class Document(Table):
    """The whole file."""

    version: Literal[1]
    name: str
    data: Data
    classes: dict[str, str] = Field(default_factory=dict)
    server: Server = Server()

    @field_validator("name")
    @classmethod
    def _name(cls, name: str) -> str:
        return valid_name(name)


def check_document(text: str, where: str | Path) -> Document:
    """The text of a ``hospital.toml``, checked; ConfigError names ``where`` and the entry."""
    try:
        document = parse_toml(text)
    except ValueError as error:
        raise ConfigError(f"{where} is no TOML: {error}", "correct what is said there") from None
    return Document.read(document, where)


@dataclass(frozen=True)
class HospitalFolder:
    """Where everything lies in a hospital's folder."""

    root: Path

    @property
    def file(self) -> Path:
        """``hospital.toml``."""
        return self.root / "hospital.toml"

    @property
    def policy(self) -> Path:
        """``policy.toml``."""
        return self.root / "policy.toml"

    @property
    def request(self) -> Path:
        """The request for enrolment that was sent."""
        return self.root / "request.json"

    @property
    def private(self) -> Path:
        """The folder that nobody else may read."""
        return self.root / "private"

    @property
    def identity_key(self) -> Path:
        """Ed25519 private key, 32 raw bytes."""
        return self.private / "identity.key"

    @property
    def node_key(self) -> Path:
        """ECDSA P-384 private key, as ``flower-supernode`` reads it."""
        return self.private / "node.key"

    @property
    def coordinator(self) -> Path:
        """The coordinator's public key, as this hospital pinned it."""
        return self.root / "coordinator.pub"

    @property
    def members(self) -> Path:
        """Whom of the roster this hospital's people have accepted, or refused."""
        return self.root / "members.json"

    @property
    def kit(self) -> Path:
        """What the coordinator gave it."""
        return self.root / "kit"

    @property
    def authority(self) -> Path:
        """The certificate that the server's is checked against."""
        return self.kit / "ca.crt"

    @property
    def roster(self) -> Path:
        """Who belongs to the federation."""
        return self.kit / "roster.json"

    @property
    def federation(self) -> Path:
        """What the federation is."""
        return self.kit / "federation.json"

    def load_federation(self) -> FederationFile:
        """The federation's description under the pinned key.

        ConfigError if the hospital has not joined, EnrolmentError if the file was tampered with.
        """
        key = read_key(self.coordinator)
        joining = "install the kit: consilium hospital join"
        return FederationFile.load(read_limited(self.federation, joining), key)


@dataclass(frozen=True)
class HospitalFile:
    """``hospital.toml``, checked; paths are absolute, or relative to where the process started."""

    name: str
    folder: Path
    """The hospital's pictures."""
    manifest: Path | None = None
    """A manifest that lies elsewhere than in the folder, or None."""
    crop: int = 0
    classes: Mapping[str, str] = field(default_factory=dict)
    """Own name → the federation's, where they differ."""
    address: str = ""
    """``HOST:PORT`` of the server; "": the kit's."""

    @classmethod
    def load(cls, path: Path) -> HospitalFile:
        """Read the file; ConfigError names it and the entry that is wrong."""
        try:
            text = path.read_text(encoding="utf-8")
        except (OSError, ValueError) as error:
            raise ConfigError(f"{path} cannot be read: {error}", "restore it") from None
        checked = check_document(text, path)
        data = checked.data
        return cls(
            name=checked.name,
            folder=path.parent / Path(data.folder).expanduser(),
            manifest=path.parent / Path(data.manifest).expanduser() if data.manifest else None,
            crop=data.crop,
            classes=checked.classes,
            address=checked.server.address,
        )

    def own_classes(self, classes: Sequence[str]) -> tuple[tuple[str, ...], tuple[int, ...]]:
        """The names that the hospital's folders may have, and which of ``classes`` each is.

        ``classes`` are the federation's, in its order; the numbers are indices into them. Own
        names that are mapped come first; then the federation's, for whoever uses them. Several
        own names may be one class. With them,
        ``images, _, notes = load_folder_as_one(file.folder, names, ...)`` reads the pictures, and
        ``np.array(numbers)[images.labels]`` are the federation's labels. ConfigError for a name
        that is mapped to no class.
        """
        names, numbers = [], []
        for own, theirs in self.classes.items():
            if theirs not in classes:
                raise ConfigError(
                    f"hospital.toml maps {own!r} to {theirs!r}, which is no class of the "
                    "federation",
                    f"choose one of: {', '.join(classes)}",
                )
            names.append(own)
            numbers.append(list(classes).index(theirs))
        for number, theirs in enumerate(classes):
            if theirs not in self.classes:
                names.append(theirs)
                numbers.append(number)
        return tuple(names), tuple(numbers)
