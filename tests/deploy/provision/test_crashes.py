"""A kill between any two writes leaves something that the same command completes."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from datetime import datetime, timedelta
from pathlib import Path

import pytest

from client_app.hospital_file import HospitalFolder
from deploy.provision import federation, hospital
from deploy.provision.federation import FederationFolder
from deploy.provision.requests import Request
from deploy.provision.status import describe
from tests.deploy.provision.conftest import NOW, World, settings, snapshot

LATER = NOW + timedelta(hours=1)


Kill = Callable[[int, Callable[[], object]], bool]


class Killed(BaseException):
    """Nothing catches it."""


@pytest.fixture
def killed(monkeypatch: pytest.MonkeyPatch) -> Kill:
    """Run something and kill it at its n-th write (even n: just before; odd: just after)."""
    real = os.replace

    def run(at: int, action: Callable[[], object]) -> bool:
        left = at // 2

        def replace(source: str, target: Path) -> None:
            nonlocal left
            left -= 1
            if left == -1 and at % 2 == 0:
                raise Killed
            real(source, target)
            if left == -1:
                raise Killed

        with monkeypatch.context() as patch:
            patch.setattr(os, "replace", replace)
            try:
                action()
            except Killed:
                return True
        return False

    return run


def test_making_a_federation(tmp_path: Path, killed: Kill) -> None:
    for at in range(200):
        folder = FederationFolder(tmp_path / f"fed-{at}")

        def make(folder: FederationFolder = folder, now: datetime = NOW) -> bool:
            return federation.init(folder, settings(), now, days=825)

        was_killed = killed(at, make)
        keys = snapshot(folder.private) if folder.private.exists() else {}
        make(now=LATER)
        assert snapshot(folder.private).items() >= keys.items(), "a key was replaced"
        assert describe(folder, LATER)["warnings"] == []
        if not was_killed:
            assert at >= 2 * 9
            return
    raise AssertionError("it never ended")


def test_making_a_hospital(tmp_path: Path, killed: Kill) -> None:
    for at in range(200):
        folder = HospitalFolder(tmp_path / f"h-{at}")

        def make(folder: HospitalFolder = folder, now: datetime = NOW) -> Request:
            return hospital.init(folder, "a", now)

        was_killed = killed(at, make)
        keys = snapshot(folder.private) if folder.private.exists() else {}
        request = make(now=LATER)
        assert snapshot(folder.private).items() >= keys.items(), "a key was replaced"
        assert request == make()
        if not was_killed:
            assert at >= 2 * 5
            return
    raise AssertionError("it never ended")


@pytest.mark.parametrize("command", ["admit", "revoke", "join"])
def test_admitting_revoking_and_joining(
    world: World, tmp_path_factory: pytest.TempPathFactory, killed: Kill, command: str
) -> None:
    for name in ("a", "b"):
        world.hospital(name)
    world.admit("a")
    if command != "admit":
        world.admit("b")
    for at in range(200):
        root = Path(shutil.copytree(world.root, tmp_path_factory.mktemp("copy") / "world"))
        copy = World(root, FederationFolder(root / "fed"), world.requests)
        was_killed = killed(at, lambda copy=copy: getattr(copy, command)("b"))
        getattr(copy, command)("b")
        assert describe(copy.coordinator, NOW)["warnings"] == []
        if command == "join":
            assert snapshot(root / "b" / "kit") == snapshot(copy.coordinator.kits / "b")
        listed = {entry.name for entry in copy.join("a").roster.entries}
        assert ("b" in listed) == (command != "revoke")
        assert (copy.coordinator.kits / "b").exists() == (command != "revoke")
        if not was_killed:
            assert at >= 2 * 5
            return
    raise AssertionError("it never ended")


def test_a_crash_is_told_until_it_is_mended(world: World, killed: Kill) -> None:
    world.hospital("a")
    assert killed(1, lambda: world.admit("a"))
    warnings = describe(world.coordinator, NOW)["warnings"]
    assert any("refresh" in warning for warning in warnings)
    world.admit("a")
    assert describe(world.coordinator, NOW)["warnings"] == []
