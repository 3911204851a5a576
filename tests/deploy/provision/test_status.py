"""``federation status`` says how it stands, and what to see to."""

from __future__ import annotations

import json
import re
import stat
from collections.abc import Callable
from datetime import timedelta

import pytest
from typer.testing import Result

from deploy.provision.status import describe, render
from tests.deploy.provision.conftest import NOW, World, settings, snapshot

SCHEMA = {
    "version": int,
    "federation": {
        "name": str, "address": str, "hosts": list, "classes": list, "image_size": int,
        "channels": int,
    },
    "coordinator": {"key": str, "fingerprint": str},
    "certificates": {
        "authority": {"expires": str, "days_left": int, "sha256": str},
        "server": {"expires": str, "days_left": int, "sha256": str, "hosts": list},
    },
    "issued": str,
    "hospitals": list,
    "revoked_keys": int,
    "warnings": list,
}  # fmt: skip
ROW = {
    "name": str, "state": str, "days_left": (int, type(None)), "admitted": str, "valid_from": str,
    "expires": str, "max_images": (int, type(None)), "identity": str, "node": str,
    "request_fingerprint": str,
    "revoked": (dict, type(None)),
}  # fmt: skip


def fits(value: object, schema: object) -> bool:
    if isinstance(schema, dict):
        return (
            isinstance(value, dict)
            and list(value) == list(schema)
            and all(fits(value[name], part) for name, part in schema.items())
        )
    return isinstance(value, schema)  # type: ignore[arg-type]


def test_the_json_has_exactly_its_schema(world: World, run: Callable[..., Result]) -> None:
    for name in ("a", "b"):
        world.hospital(name)
        world.admit(name)
    world.revoke("b")
    document = json.loads(run("federation", "status", world.coordinator.root, "--json").stdout)
    assert fits(document, SCHEMA)
    assert all(fits(row, ROW) for row in document["hospitals"])
    assert document["version"] == 1
    assert set(document["hospitals"][1]["revoked"]) == {"time", "reason"}
    assert re.fullmatch(r"([0-9a-f]{4}-){7}[0-9a-f]{4}", document["coordinator"]["fingerprint"])


def states(world: World, after: int) -> dict[str, str]:
    document = describe(world.coordinator, NOW + timedelta(days=after))
    return {row["name"]: row["state"] for row in document["hospitals"]}


def test_every_state_is_told(world: World) -> None:
    for name, days in (("long", 365), ("short", 40), ("gone", 365)):
        world.hospital(name)
        world.admit(name, days=days)
    world.revoke("gone")
    assert states(world, 0) == {"gone": "revoked", "long": "admitted", "short": "admitted"}
    assert states(world, 10)["short"] == "expiring"
    assert states(world, 40)["short"] == "expiring"
    assert states(world, 41)["short"] == "expired"
    soon = describe(world.coordinator, NOW + timedelta(days=39))
    assert any("short ends on 2026-04-10" in warning for warning in soon["warnings"])


def test_a_healthy_federation_has_no_warnings_and_reading_changes_nothing(world: World) -> None:
    world.hospital("a")
    world.admit("a")
    before = snapshot(world.root)
    assert describe(world.coordinator, NOW)["warnings"] == []
    assert snapshot(world.root) == before


def warned(world: World, after: int = 0) -> str:
    return "\n".join(describe(world.coordinator, NOW + timedelta(days=after))["warnings"])


def test_certificates_that_end_are_told_in_time(world: World) -> None:
    assert "renew" not in warned(world, 790)
    assert "the server's certificate ends on 2028-06-03" in warned(world, 800)
    assert "the authority's certificate ends" in warned(world, 3640)


def test_what_does_not_fit_together_is_told(world: World) -> None:
    fed = world.coordinator
    world.hospital("a")
    world.admit("a")
    (fed.kits / "a" / "roster.json").write_text("{}")
    assert "the kit of a is not up to date" in warned(world)
    fed.settings.write_text(settings(address="fl.example.org:1").to_toml())
    assert "not for fl.example.org" in warned(world)
    assert "federation.json is not what federation.toml says" in warned(world)
    (fed.hospitals / "a.json").unlink()
    assert "roster.json is not what hospitals/ says" in warned(world)
    fed.roster.write_text("")
    assert "roster.json is not" in warned(world)
    fed.server_key.chmod(stat.S_IRUSR | stat.S_IROTH)
    fed.authority_key.unlink()
    assert "others than its owner may read" in warned(world)
    assert "ca.key is missing" in warned(world)


def test_the_text_says_the_same(world: World, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("a", "b", "c"):
        world.hospital(name)
    world.admit("a", days=10)
    world.admit("b")
    render(describe(world.coordinator, NOW), width=120)
    text = capsys.readouterr().out
    assert "expires in 10 days" in text
    assert "admitted" in text
    assert world.requests["b"].fingerprint in text
    assert "! the admission of a ends" in text
