"""A coordinator and its hospitals, made by the same functions as real ones."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from client_app.hospital_file import HospitalFolder
from deploy.cli import cli
from deploy.provision import federation, hospital, members
from deploy.provision.federation import FederationFolder, Settings
from deploy.provision.hospital import Joined
from deploy.provision.kit import Kit
from deploy.provision.requests import Request

NOW = datetime(2026, 3, 1, 12, 0, 0, tzinfo=UTC)
CLASSES = ("neutrophil", "lymphocyte", "platelet")


def settings(**changes: object) -> Settings:
    document = {
        "name": "blood",
        "address": "localhost:9443",
        "hosts": ("127.0.0.1",),
        "classes": CLASSES,
        "image_size": 28,
        "channels": 3,
    }
    return federation.make_settings(**(document | changes))  # type: ignore[arg-type]


@dataclass
class World:
    """A folder with a coordinator, and hospitals beside it."""

    root: Path
    coordinator: FederationFolder
    requests: dict[str, Request] = field(default_factory=dict)

    def hospital(self, name: str, now: datetime = NOW) -> HospitalFolder:
        """A hospital with keys and request of its own."""
        folder = HospitalFolder(self.root / name)
        self.requests[name] = hospital.init(folder, name, now)
        return folder

    def admit(self, name: str, now: datetime = NOW, days: int = 365) -> list[str]:
        return members.admit(self.coordinator, self.requests[name], now, days)

    def revoke(self, name: str, now: datetime = NOW) -> list[str]:
        return members.revoke(self.coordinator, name, now, "")

    def kit(self, name: str) -> Kit:
        return Kit.read(self.coordinator.kits / name)

    def join(self, name: str, now: datetime = NOW) -> Joined:
        kit = self.kit(name)
        return hospital.join(HospitalFolder(self.root / name), kit, kit.coordinator, now)


@pytest.fixture
def world(tmp_path: Path) -> World:
    coordinator = FederationFolder(tmp_path / "fed")
    federation.init(coordinator, settings(), NOW, days=825)
    return World(tmp_path, coordinator)


@pytest.fixture
def run() -> Callable[..., Result]:
    """The command, in this process; its errors are raised."""

    def call(*arguments: object, typed: str | None = None, fails: bool = False) -> Result:
        words = [str(argument) for argument in arguments]
        result = CliRunner().invoke(cli, words, input=typed, catch_exceptions=fails)
        if not fails:
            assert result.exit_code == 0, result.output
        return result

    return call


def snapshot(root: Path) -> dict[str, bytes]:
    """Every file below ``root``."""
    return {
        str(path.relative_to(root)): path.read_bytes()
        for path in sorted(root.rglob("*"))
        if path.is_file() and path.name != ".lock"
    }
