"""Who may hold a connection at the gate."""

from __future__ import annotations

import asyncio
import ipaddress
import socket
import ssl
from collections.abc import Iterator
from contextlib import suppress

import pytest
from hypothesis import given
from hypothesis import strategies as st

from deploy.server import door, gate
from deploy.server.door import Door, Guest, Guests, listen, neighbourhood

MOST, OF_ONE, OF_ONE_KEY = 12, 5, 3
steps = st.lists(st.tuples(st.sampled_from(["enter", "recognise", "leave"]), st.integers(0, 60)))


@given(st.lists(st.integers(0, 6), max_size=60), steps)
def test_newcomers_stay_few_and_never_cost_a_member_its_place(
    addresses: list[int], actions: list[tuple[str, int]]
) -> None:
    guests = Guests(MOST, OF_ONE, OF_ONE_KEY)
    there: list[Guest] = []
    gone: list[Guest] = []

    def enter(address: int) -> None:
        guest = Guest(str(address), lambda: gone.append(guest))
        guests.enter(guest)
        assert guest not in gone, "the newest is let in"
        there.append(guest)

    for address in addresses:
        enter(address)
    for action, number in actions:
        present = [guest for guest in there if guest not in gone]
        if action == "enter":
            enter(number % 7)
        elif present:
            guest = present[number % len(present)]
            if action == "leave":
                guests.leave(guest)
                gone.append(guest)
            else:
                guests.recognise(guest, f"key {number % 4}")
                assert guest not in gone
        present = [guest for guest in there if guest not in gone]
        new = [guest.address for guest in present if guest.key is None]
        known = [guest.key for guest in present if guest.key is not None]
        assert guests.newcomers == len(new) <= MOST
        assert all(new.count(address) <= OF_ONE for address in new)
        assert all(known.count(key) <= OF_ONE_KEY for key in known)


def entered(guests: Guests, address: str, gone: list[str], name: str) -> Guest:
    guest = Guest(address, lambda: gone.append(name))
    guests.enter(guest)
    return guest


def test_the_oldest_goes_of_the_address_that_holds_the_most() -> None:
    guests, gone = Guests(6, 4, 2), []  # type: tuple[Guests, list[str]]
    entered(guests, "hospital", gone, "h")
    for number in range(6):
        entered(guests, "outsider", gone, f"o{number}")
    assert gone == ["o0", "o1"]  # more than one address may hold
    for number in range(4):
        entered(guests, f"elsewhere {number}", gone, f"e{number}")
    assert gone == ["o0", "o1", "o2", "o3", "o4"]  # more than there is room for
    entered(guests, "last", gone, "l")
    assert "h" not in gone or gone.count("h") == 1


def test_a_member_holds_no_more_than_its_share_and_its_oldest_goes() -> None:
    guests, gone = Guests(100, 100, 2), []  # type: tuple[Guests, list[str]]
    for number in range(4):
        guests.recognise(entered(guests, "one", gone, str(number)), "key")
    assert gone == ["0", "1"] and guests.newcomers == 0


@pytest.mark.parametrize(
    ("address", "counts_as"),
    [
        ("192.0.2.7", "192.0.2.7"), ("::ffff:192.0.2.7", "192.0.2.7"),
        ("2001:db8:1:2:3:4:5:6", "2001:db8:1:2::/64"), ("2001:db8:1:2::", "2001:db8:1:2::/64"),
        ("fe80::1%eth0", "fe80::/64"), ("?", "?"),
    ],
)  # fmt: skip
def test_one_household_is_one_address(address: str, counts_as: str) -> None:
    assert neighbourhood(address) == counts_as


@given(st.ip_addresses())
def test_every_address_counts_as_something(
    address: ipaddress.IPv4Address | ipaddress.IPv6Address,
) -> None:
    assert neighbourhood(str(address))


@pytest.mark.parametrize("descriptors", [64, 256, 1024, 4096, 8192, 1 << 20])
def test_newcomers_leave_most_descriptors_to_members(descriptors: int) -> None:
    newcomers, of_one = gate.room(descriptors)
    assert of_one <= newcomers <= max(16, descriptors // 4)
    assert newcomers <= door.NEWCOMERS and of_one <= door.NEWCOMERS_OF_ONE


@pytest.fixture
def context() -> ssl.SSLContext:
    return ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)  # no certificate: no handshake comes to its end


class Speaks(asyncio.Protocol):
    pass


@pytest.fixture
def listener() -> Iterator[socket.socket]:
    with listen("127.0.0.1", 0) as made:
        yield made


def test_who_does_not_finish_a_handshake_is_cut_off_and_forgotten(
    listener: socket.socket, context: ssl.SSLContext, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(door, "HANDSHAKE_SECONDS", 0.2)
    guests = Guests()

    async def through() -> None:
        task = asyncio.create_task(Door(listener, context, guests, lambda guest: Speaks()).run())
        reader, writer = await asyncio.open_connection(*listener.getsockname())
        with suppress(ConnectionError):
            assert await asyncio.wait_for(reader.read(), 20) == b""
        writer.close()
        while guests.newcomers:
            await asyncio.sleep(0.01)
        task.cancel()

    asyncio.run(through())


def test_who_has_to_go_in_the_middle_of_a_handshake_is_cut_off(
    listener: socket.socket, context: ssl.SSLContext
) -> None:
    guests = Guests(2, 2)

    async def through() -> None:
        task = asyncio.create_task(Door(listener, context, guests, lambda guest: Speaks()).run())
        made = [await asyncio.open_connection(*listener.getsockname()) for _ in range(6)]
        for reader, _ in made[:4]:
            with suppress(ConnectionError):
                assert await asyncio.wait_for(reader.read(), 20) == b""
        assert guests.newcomers == 2
        for _, writer in made:
            writer.close()
        task.cancel()

    asyncio.run(through())


def test_all_addresses_of_ipv6_are_ipv4s_too() -> None:
    if not socket.has_dualstack_ipv6():
        pytest.skip("this machine has no IPv6")
    with listen("::", 0) as made, socket.create_connection(("127.0.0.1", made.getsockname()[1])):
        pass
