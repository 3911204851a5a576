"""Who may hold a connection at the gate: those whom nobody knows yet hold few, and not for long.

uvicorn counts a connection only once its TLS handshake is over, so here connections are accepted,
counted and, where there are too many, dropped from their first moment on. A connection is a
*newcomer's* until a call on it was signed by a member's node (:mod:`deploy.server.callers`). There
is room for :data:`NEWCOMERS` of them, of which :data:`NEWCOMERS_OF_ONE` may come from one address;
a further one is let in, and the oldest goes: of that address, or of the one that holds the most.
So whoever holds connections without a key holds them at their own cost: a node, which signs its
first call within a second of connecting, always gets in.

**Behind one address** (NAT) there is room for :data:`NEWCOMERS_OF_ONE` connections that are just
being opened; a node needs one or two, for less than a second, and none any more once it is known.
A flood of *new* connections from a hospital's own address, more than that within the time of a
handshake, is the one thing that still keeps that hospital out.
"""

from __future__ import annotations

import asyncio
import errno
import ipaddress
import socket
import ssl
from collections import OrderedDict
from collections.abc import Callable
from functools import partial

NEWCOMERS, NEWCOMERS_OF_ONE = 512, 128
"""Connections on which nobody has shown a member's key: in all, and of one address."""
CONNECTIONS_OF_ONE = 32
"""Of one member's key. A SuperNode holds about five."""
HANDSHAKE_SECONDS = 10.0
"""For all of a TLS handshake."""
BACKLOG = 2048
_FULL = frozenset({errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM})
_PAUSE = 0.05


class Guest:
    """Who is at the other end of one connection."""

    def __init__(self, address: str, end: Callable[[], None]) -> None:
        """``address``: see :func:`neighbourhood`. ``end()`` cuts the connection off."""
        self.address, self.end = address, end
        self.key: str | None = None
        """Of the member that it is; None for a newcomer."""


class Guests:
    """All that are connected."""

    def __init__(
        self,
        newcomers: int = NEWCOMERS,
        of_one: int = NEWCOMERS_OF_ONE,
        of_one_key: int = CONNECTIONS_OF_ONE,
    ) -> None:
        """The most newcomers, those of one address, and the most connections of one key."""
        self._most, self._of_one, self._of_one_key = newcomers, of_one, of_one_key
        # Each in the order in which they came.
        self._new: dict[str, OrderedDict[Guest, None]] = {}
        self._known: dict[str, OrderedDict[Guest, None]] = {}
        self._count = 0

    @property
    def newcomers(self) -> int:
        """How many there are now."""
        return self._count

    def enter(self, guest: Guest) -> None:
        """A newcomer comes; whoever has to go for it is cut off."""
        mine = self._new.setdefault(guest.address, OrderedDict())
        mine[guest] = None
        self._count += 1
        if len(mine) > self._of_one:
            self._send_away(mine)
        elif self._count > self._most:
            self._send_away(max(self._new.values(), key=len))

    def recognise(self, guest: Guest, key: str) -> None:
        """A guest has shown a member's key. Its oldest connection goes where it has too many."""
        if guest.key == key:
            return
        self.leave(guest)
        guest.key = key
        mine = self._known.setdefault(key, OrderedDict())
        mine[guest] = None
        if len(mine) > self._of_one_key:
            self._send_away(mine)

    def leave(self, guest: Guest) -> None:
        """The connection is over; nothing happens if that is known."""
        groups, name = (self._new, guest.address) if guest.key is None else (self._known, guest.key)
        mine = groups.get(name)
        if mine is None or guest not in mine:
            return
        del mine[guest]
        if guest.key is None:
            self._count -= 1
        if not mine:
            del groups[name]

    def make_room(self) -> None:
        """Send the oldest newcomer away of the address that holds the most, if there is any."""
        if self._new:
            self._send_away(max(self._new.values(), key=len))

    def _send_away(self, group: OrderedDict[Guest, None]) -> None:
        oldest = next(iter(group))
        self.leave(oldest)
        oldest.end()


def neighbourhood(address: str) -> str:
    """What counts as one address: of IPv6 a /64, which one household or machine has to itself."""
    try:
        found = ipaddress.ip_address(address.partition("%")[0])
    except ValueError:
        return address
    if isinstance(found, ipaddress.IPv6Address):
        if found.ipv4_mapped is not None:
            return str(found.ipv4_mapped)
        return str(ipaddress.ip_network((found, 64), strict=False))
    return str(found)


def _cancel(task: asyncio.Task[None]) -> None:
    task.cancel()


class Door:
    """Accepts connections, ends their TLS, and gives each to a protocol."""

    def __init__(
        self,
        listener: socket.socket,
        context: ssl.SSLContext,
        guests: Guests,
        protocol: Callable[[Guest], asyncio.Protocol],
    ) -> None:
        """``protocol(guest)`` makes what speaks on a connection; it must call ``guests.leave``."""
        self._listener, self._context = listener, context
        self._guests, self._protocol = guests, protocol
        self._greetings: set[asyncio.Task[None]] = set()

    async def run(self) -> None:
        """Until cancelled."""
        loop = asyncio.get_running_loop()
        self._listener.setblocking(False)
        while True:
            try:
                connection, address = await loop.sock_accept(self._listener)
            except OSError as error:
                if error.errno in _FULL:
                    self._guests.make_room()
                    await asyncio.sleep(_PAUSE)
                await asyncio.sleep(0)  # else whoever it was has gone again
                continue
            self._admit(connection, str(address[0]))

    def _admit(self, connection: socket.socket, address: str) -> None:
        guest = Guest(neighbourhood(address), connection.close)
        task = asyncio.get_running_loop().create_task(self._greet(connection, guest))
        guest.end = partial(_cancel, task)  # until there is a transport: see Impatient
        self._greetings.add(task)
        task.add_done_callback(self._greetings.discard)
        # Not before it has begun does a task that is cancelled close what it was given.
        task.add_done_callback(lambda done: connection.close() if done.cancelled() else None)
        self._guests.enter(guest)

    async def _greet(self, connection: socket.socket, guest: Guest) -> None:
        try:
            await asyncio.get_running_loop().connect_accepted_socket(
                lambda: self._protocol(guest),
                connection,
                ssl=self._context,
                ssl_handshake_timeout=HANDSHAKE_SECONDS,
            )
        except OSError:  # no TLS, or not in time: of an outsider, or of the network
            self._guests.leave(guest)
        except asyncio.CancelledError:
            self._guests.leave(guest)
            raise


def listen(host: str, port: int) -> socket.socket:
    """A listening TCP socket; ``::`` is all addresses, IPv4's too. OSError where it cannot be."""
    address = ipaddress.ip_address(host)
    v6 = address.version == 6
    return socket.create_server(
        (host, port),
        family=socket.AF_INET6 if v6 else socket.AF_INET,
        backlog=BACKLOG,
        dualstack_ipv6=v6 and address.is_unspecified and socket.has_dualstack_ipv6(),
    )
