"""The roster's second version: when it was signed, what each may claim; old ones open."""

from __future__ import annotations

import base64
import json
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from common.roster import check_age, images_agreed
from common.secagg import Identity, Refusal, Roster, RosterEntry
from common.secagg.roster import MOST_IMAGES
from tests.common.secagg.driver import IDENTITIES
from tests.common.secagg.make_vectors import COORDINATOR

SIGNED = "2026-03-01T12:00:00Z"
NOW = datetime(2026, 3, 1, 12, 0, 0, tzinfo=UTC)


def entry(name: str, max_images: int | None = None) -> RosterEntry:
    return RosterEntry(name, IDENTITIES[name].public, "2026-01-01", "2026-12-31", max_images)


DATED = Roster("example", (entry("h00", 1200), entry("h01")), SIGNED)


def read(data: bytes) -> Roster:
    return Roster.load(data, COORDINATOR.public)


def test_date_and_bounds_are_read_back() -> None:
    roster = read(DATED.sign(COORDINATOR))
    assert roster == DATED
    assert (roster.max_images("h00"), roster.max_images("h01")) == (1200, None)
    with pytest.raises(Refusal, match="no hospital 'h09'"):
        roster.max_images("h09")
    assert read(Roster("example", (entry("h00", 5),)).sign(COORDINATOR)).max_images("h00") == 5


def test_a_roster_of_the_first_release_opens_and_says_neither_date_nor_bounds() -> None:
    vectors = json.loads((Path(__file__).parent / "vectors.json").read_text())
    data = vectors["good"]["roster"].encode()
    roster = read(data)
    assert (roster.issued, roster.max_images("h00")) == ("", None)
    assert roster.sign(COORDINATOR) == data  # and is written as it was


@pytest.mark.parametrize(
    ("old", "new"),
    [
        (b"1200", b"120000"), (b"1200", b"null"), (b"null", b"7"), (SIGNED.encode(),
        b"2026-03-02T12:00:00Z"), (SIGNED.encode(), b""),
    ],
)  # fmt: skip
def test_nobody_but_the_coordinator_changes_a_date_or_a_bound(old: bytes, new: bytes) -> None:
    signed = DATED.sign(COORDINATOR)
    assert old in signed
    with pytest.raises(Refusal, match="pinned"):
        read(signed.replace(old, new))


def test_a_signature_of_one_version_is_none_of_the_other() -> None:
    """Or whoever sits between could take date and bounds off."""
    document = json.loads(DATED.sign(COORDINATOR))
    document["version"] = "consilium-roster-1"
    del document["issued"]
    for row in document["hospitals"]:
        del row["max-images"]
    with pytest.raises(Refusal, match="pinned"):
        read(json.dumps(document).encode())


@pytest.mark.parametrize("bound", [0, -1, True, 1.5, "5", MOST_IMAGES + 1, [], 10**400])
def test_a_bound_that_is_none_is_refused(bound: object) -> None:
    document = json.loads(DATED.sign(COORDINATOR))
    document["hospitals"][0]["max-images"] = bound
    with pytest.raises(Refusal):
        read(json.dumps(document).encode())


@pytest.mark.parametrize("version", [None, 2, [], {}, "consilium-roster-3", "consilium-roster-2 "])
def test_another_version_is_refused(version: object) -> None:
    document = json.loads(DATED.sign(COORDINATOR)) | {"version": version}
    with pytest.raises(Refusal, match="version"):
        read(json.dumps(document).encode())


def test_a_roster_older_than_allowed_is_refused_and_so_is_one_without_a_date() -> None:
    check_age(DATED, 30, NOW + timedelta(days=30))
    check_age(DATED, 0, NOW + timedelta(days=3000))
    check_age(Roster("example", ()), 0, NOW)
    for roster, now in ((DATED, NOW + timedelta(days=31)), (Roster("example", ()), NOW)):
        with pytest.raises(Refusal) as caught:
            check_age(roster, 30, now)
        assert caught.value.code == "secagg-roster-age"
        assert "--reissue" in caught.value.remedy


def test_the_server_reads_the_images_that_were_agreed(tmp_path: Path) -> None:
    coordinator = Identity.generate()
    entries = tuple(
        RosterEntry(name, Identity.generate().public, "2026-01-01", "2099-01-01", most)
        for name, most in (("st-anne", 1200), ("st-mary", None))
    )
    path = tmp_path / "roster.json"
    path.write_bytes(Roster("fed", entries).sign(coordinator))
    key = base64.b64encode(coordinator.public).decode()
    assert images_agreed(path, key) == {"st-anne": 1200}
