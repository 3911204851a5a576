"""A request is a hospital's own, whole and unchanged, or it is refused."""

from __future__ import annotations

import base64
import json
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric.ec import SECP256R1, SECP384R1, generate_private_key
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from hypothesis import example, given
from hypothesis import strategies as st

from common.errors import ConsiliumError
from common.federation_file import EnrolmentError
from common.secagg.keys import Identity
from deploy.provision import keys, members
from deploy.provision.requests import Request
from tests.deploy.provision.conftest import NOW, World, snapshot


def made(name: str = "st-mary") -> Request:
    return Request.make(name, Identity.generate(), generate_private_key(SECP384R1()), NOW)


def changed(request: Request, **fields: Any) -> bytes:
    document: dict[str, Any] = request.document()
    return json.dumps(document | {k.replace("_", "-"): v for k, v in fields.items()}).encode()


def text(data: bytes) -> str:
    return base64.b64encode(data).decode()


ONE, OTHER = made(), made("general")


def test_a_request_survives_its_file() -> None:
    assert Request.parse(ONE.to_bytes()) == ONE


@pytest.mark.parametrize(
    "tampered",
    [
        changed(ONE, name="general"),
        changed(ONE, identity=text(OTHER.identity)),
        changed(ONE, node=OTHER.node),
        changed(ONE, nonce=text(bytes(16))),
        changed(ONE, time="2026-03-01T12:00:01Z"),
        changed(ONE, identity_signature=text(OTHER.identity_signature)),
        changed(ONE, node_signature=text(OTHER.node_signature)),
        changed(ONE, identity=text(OTHER.identity),
                identity_signature=text(OTHER.identity_signature)),
        changed(ONE, node=OTHER.node, node_signature=text(OTHER.node_signature)),
    ],
)  # fmt: skip
def test_a_request_with_anything_changed_or_of_somebody_else_is_refused(tampered: bytes) -> None:
    with pytest.raises(EnrolmentError, match="is not signed by its own") as error:
        Request.parse(tampered)
    assert "do not admit" in error.value.remedy


@pytest.mark.parametrize("name", ["a/b", "../x", "", ".hidden", "a b", "x" * 65, "a\n", "ä"])
def test_a_name_that_is_no_name_is_refused_though_it_is_signed(name: str) -> None:
    with pytest.raises(EnrolmentError, match="malformed: the name"):
        Request.parse(made(name).to_bytes())


def other_keys() -> list[str]:
    def line(key: Any) -> str:
        return str(key.public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH).decode())

    return [
        line(generate_private_key(SECP256R1()).public_key()),
        line(Ed25519PrivateKey.generate().public_key()),
        ONE.node + " comment",
        ONE.node + "\n",
        "ecdsa-sha2-nistp384 AAAA",
        "",
        "ä",
    ]


@pytest.mark.parametrize(
    "node",
    other_keys(),
    ids=["p256", "ed25519", "comment", "newline", "short", "empty", "letter"],
)
def test_a_node_key_of_another_kind_or_spelling_is_refused(node: str) -> None:
    with pytest.raises(EnrolmentError, match="malformed"):
        Request.parse(changed(ONE, node=node))


@pytest.mark.parametrize(
    "data",
    [
        b"", b"{", b"[]", b"null", b"\xff", b"[" * 100_000, b" " * 2_000_000,
        b'{"version": "consilium-request-1", "version": "consilium-request-1"}',
        changed(ONE, extra="x"), changed(ONE, version="consilium-request-2"),
        changed(ONE, version=1), changed(ONE, name=None), changed(ONE, nonce="AA=="),
        changed(ONE, identity=text(ONE.identity) + "\n"), changed(ONE, identity_signature="ä"),
        changed(ONE, time="2026-03-01"), changed(ONE, node_signature=""),
        changed(ONE, time="2026-3-1T12:00:00Z"), changed(ONE, name="\ud800"),
    ],
)  # fmt: skip
def test_what_is_no_request_is_refused_in_two_parts(data: bytes) -> None:
    with pytest.raises(EnrolmentError, match="request") as error:
        Request.parse(data)
    assert error.value.remedy


def test_a_request_has_one_spelling_only() -> None:
    """Or one request would have many files, of which some are not what they seem."""
    alphabet = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/"
    spelt = ONE.document()["identity"]
    other = spelt[:-2] + alphabet[alphabet.index(spelt[-2]) ^ 1] + "="
    assert base64.b64decode(other) == ONE.identity
    twice = ONE.to_bytes().replace(b"{", b'{"name": "st-mary",', 1)
    for data in (changed(ONE, identity=other), twice):
        with pytest.raises(EnrolmentError, match="malformed"):
            Request.parse(data)


@given(st.binary(max_size=300))
def test_no_bytes_do_anything_but_a_refusal(data: bytes) -> None:
    with pytest.raises(EnrolmentError):
        Request.parse(data)


@given(st.sampled_from(sorted(ONE.document())), st.integers(0, 200), st.integers(1, 127))
@example("node", 72, 1)  # a compressed point, which the library does not read
def test_no_single_character_can_be_changed(field: str, at: int, flip: int) -> None:
    value = ONE.document()[field]
    at %= len(value)
    other = value[:at] + chr(ord(value[at]) ^ flip) + value[at + 1 :]
    with pytest.raises(EnrolmentError):
        Request.parse(changed(ONE, **{field: other}))


def test_the_fingerprint_tells_any_two_requests_apart() -> None:
    identity, node = Identity.generate(), generate_private_key(SECP384R1())
    again = [Request.make("a", identity, node, NOW) for _ in range(2)]
    assert len({request.fingerprint for request in (ONE, OTHER, *again)}) == 4


@given(st.binary(min_size=32, max_size=32))
def test_a_fingerprint_is_recognised_as_people_write_it(key: bytes) -> None:
    told = keys.coordinator_fingerprint(key)
    for written in (told.upper(), told.replace("-", " "), f" {told.replace('-', ':')}\n"):
        assert keys.same_fingerprint(written, told)
    wrong = ("0" if told[0] != "0" else "1") + told[1:]
    assert not any(keys.same_fingerprint(w, told) for w in (wrong, told[:-1], told[:4], "", "yes"))


def test_two_hospitals_never_share_a_name_or_a_key(world: World) -> None:
    world.hospital("st-mary")
    world.admit("st-mary")
    first = world.requests["st-mary"]
    folder = world.root / "st-mary"
    identity, node = (
        keys.load_identity(folder / "private" / "identity.key"),
        keys.load_node_key(folder / "private" / "node.key"),
    )
    fresh = generate_private_key(SECP384R1())
    before = snapshot(world.coordinator.root)
    for request, told in (
        (made("st-mary"), "there is a hospital st-mary already"),
        (made("St-Mary"), "there is a hospital st-mary already"),
        (Request.make("general", identity, fresh, NOW), "key of this request is that of"),
        (Request.make("general", Identity.generate(), node, NOW), "key of this request is that of"),
        (Request.make("general", identity, node, NOW), "key of this request is that of"),
    ):
        with pytest.raises(EnrolmentError, match=told):
            members.admit(world.coordinator, request, NOW, 365)
    assert snapshot(world.coordinator.root) == before
    assert members.check_admissible(world.coordinator, first) is not None


def test_a_revoked_key_is_never_admitted_again_whatever_it_comes_with(world: World) -> None:
    folder = world.hospital("st-mary")
    world.admit("st-mary")
    world.revoke("st-mary")
    identity, node = keys.load_identity(folder.identity_key), keys.load_node_key(folder.node_key)
    fresh = generate_private_key(SECP384R1())
    for request in (
        world.requests["st-mary"],
        Request.make("st-mary", identity, node, NOW),
        Request.make("other", identity, fresh, NOW),
        Request.make("other", Identity.generate(), node, NOW),
    ):
        with pytest.raises(EnrolmentError, match="was revoked"):
            members.admit(world.coordinator, request, NOW, 365)
    assert members.admit(world.coordinator, made("st-mary"), NOW, 365) == ["st-mary"]


def test_a_record_that_was_changed_on_the_disk_is_never_signed_into_the_roster(
    world: World,
) -> None:
    world.hospital("st-mary")
    world.admit("st-mary")
    path = world.coordinator.hospitals / "st-mary.json"
    record = json.loads(path.read_text())
    record["request"]["identity"] = text(OTHER.identity)
    path.write_text(json.dumps(record))
    world.hospital("general")
    with pytest.raises(ConsiliumError, match=r"st-mary\.json"):
        world.admit("general")
