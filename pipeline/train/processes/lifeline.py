"""One connection from each rank to rank 0: the kernel closes it when a process dies, however it dies.

In: the session's secret, which ranks learn through the store. Out: those whose connection ended without a farewell. A
killed process cannot claim anything, and a heartbeat that stays away may only be late: a closed connection is sure, and
known at once. Anybody may connect while rank 0 listens, which it does until all ranks have come: who does not send the
secret is a stranger, holds a bounded number of connections for a bounded time, and is never believed.
"""

from __future__ import annotations

import ipaddress
import os
import re
import secrets
import selectors
import socket
import time
from contextlib import suppress

from pipeline.train.processes.launched import Launch

_FAREWELL = b"farewell\n"
_WELCOME = b"+"
_GREETING = re.compile(rb"([0-9a-f]{64}) ([1-9][0-9]{0,8})\n")  # the secret, and the rank that says it
_LONGEST = 75  # bytes of a greeting
_GREETING_SECONDS = 10.0  # in which a stranger has to greet, and rank 0 to welcome
_STRANGERS = 256  # connections at once that have not greeted; the oldest goes first
_WORDS = 1 << 20  # bytes that are kept of what a rank says: the last ones
_PAUSE = 0.05  # seconds
# A host that vanishes closes nothing: probed after 5 s of silence, given up after 3 more probes. macOS lacks the first.
_PROBES = (("TCP_KEEPIDLE", 5), ("TCP_KEEPINTVL", 5), ("TCP_KEEPCNT", 3))


class Lifelines:
    """Ends of the connections in this process: all of them in rank 0, one in every other rank."""

    def __init__(self) -> None:
        self._selector = selectors.DefaultSelector()
        self._server: socket.socket | None = None
        self._secret = ""
        self._strangers: dict[socket.socket, tuple[float, bytes]] = {}  # when they have to go, what they sent; by age
        self._ranks: dict[socket.socket, int] = {}  # who is at the other end
        self._heard: dict[int, bytes] = {}  # what each rank has said
        self.words: dict[int, bytes] = {}  # the last ones of ranks whose connections have ended, if they had any
        self._expected: set[int] = set()  # whose farewell is still to come
        if hasattr(os, "register_at_fork"):  # a copy in a forked child would keep the connection open
            os.register_at_fork(after_in_child=self._close)

    def serve(self, launch: Launch) -> dict[str, str | int]:
        """Listen for all others, in rank 0; what they need to `connect`: address, port, secret."""
        self._expected = set(range(1, launch.world_size))
        self._secret = secrets.token_hex(32)
        address = "127.0.0.1" if launch.one_host else launch.address
        self._server = _listen_at(address)
        self._server.setblocking(False)
        self._selector.register(self._server, selectors.EVENT_READ)
        return {"address": address, "port": self._server.getsockname()[1], "secret": self._secret}

    def connect(self, address: str, port: int, *, rank: int, secret: str) -> None:
        """Connect `rank` to rank 0, and to no earlier one any more.

        Raises OSError if rank 0 does not welcome it within `_GREETING_SECONDS`, for a firewall lies between.
        """
        for earlier in list(self._ranks):
            self._drop(earlier)
        until = time.monotonic() + _GREETING_SECONDS
        while not (connection := _greet(address, port, f"{secret} {rank}\n", seconds=until - time.monotonic())):
            time.sleep(_PAUSE)  # rank 0 closed it unread: too many strangers came at once
        self._adopt(connection, rank=0)

    def lost(self, seconds: float) -> list[int]:
        """Wait so long at most for news; the ranks whose connections have ended without a farewell."""
        found = []
        for key, _ in self._selector.select(seconds):
            connection = key.fileobj
            assert isinstance(connection, socket.socket), "nothing else is registered"
            if connection is self._server:
                self._let_in(connection)
            elif connection in self._ranks:
                rank = self._listen(connection)
                found += [] if rank is None else [rank]
            elif connection in self._strangers:
                self._ask(connection)
        now = time.monotonic()
        for stranger, (until, _) in list(self._strangers.items()):
            if until > now:
                break
            self._drop(stranger)
        return found

    def has(self, rank: int) -> bool:
        """Whether a rank is connected and has said who it is."""
        return rank in self._ranks.values()

    def say(self, words: str) -> None:
        """Tell all who are connected why this process ends, before the kernel closes its connections."""
        self._send(f"{words}\n".encode())

    def all_have_come(self) -> None:
        """Listen no longer."""
        if self._server is not None:
            for stranger in list(self._strangers):
                self._drop(stranger)
            self._selector.unregister(self._server)
            self._server.close()
            self._server = None

    def part(self, *, wait: float) -> None:
        """Say farewell, and wait so long at most for that of the others, whom a store in this process may serve."""
        self._send(_FAREWELL)
        end = time.monotonic() + wait
        while wait and self._expected and (left := end - time.monotonic()) > 0:
            self.lost(left)
        self._close()

    def _send(self, data: bytes) -> None:
        for connection in list(self._ranks):
            with suppress(OSError):
                connection.sendall(data)

    def _let_in(self, server: socket.socket) -> None:
        """Accept those who have connected, but no more at once than may wait: ranks must be heard meanwhile."""
        for _ in range(_STRANGERS):
            try:
                connection = server.accept()[0]
            except BlockingIOError:
                return
            except OSError:  # no descriptor is free, or the other end has gone: what strangers hold is let go
                for stranger in list(self._strangers):
                    self._drop(stranger)
                time.sleep(_PAUSE)
                return
            connection.setblocking(False)
            if len(self._strangers) >= _STRANGERS:
                self._drop(next(iter(self._strangers)))
            self._strangers[connection] = (time.monotonic() + _GREETING_SECONDS, b"")
            self._selector.register(connection, selectors.EVENT_READ)
            self._ask(connection)  # a rank has greeted by now, and waits no longer

    def _ask(self, stranger: socket.socket) -> None:
        """Read what a stranger says: a rank that is expected, not here yet and knows the secret is let in."""
        until, heard = self._strangers[stranger]
        try:
            chunk = stranger.recv(_LONGEST - len(heard))
        except BlockingIOError:
            return
        except OSError:
            chunk = b""
        heard += chunk
        self._strangers[stranger] = (until, heard)
        if chunk and b"\n" not in heard and len(heard) < _LONGEST:
            return
        rank = self._recognised(heard)
        if rank == 0:
            self._drop(stranger)
            return
        self._selector.unregister(stranger)
        del self._strangers[stranger]
        with suppress(OSError):  # gone again, which is heard next
            stranger.sendall(_WELCOME)
        self._adopt(stranger, rank=rank)

    def _recognised(self, greeting: bytes) -> int:
        """The rank that greets; 0 for none that may come."""
        found = _GREETING.fullmatch(greeting)
        if found is None or not secrets.compare_digest(found[1], self._secret.encode()):
            return 0
        rank = int(found[2])
        return rank if rank in self._expected and rank not in self._heard else 0

    def _adopt(self, connection: socket.socket, *, rank: int) -> None:
        connection.setblocking(False)
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for name, value in _PROBES:
            if hasattr(socket, name):
                connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
        self._ranks[connection], self._heard[rank] = rank, b""
        self._selector.register(connection, selectors.EVENT_READ)

    def _listen(self, connection: socket.socket) -> int | None:
        """Read what there is; the rank at the other end when it has gone without a farewell."""
        try:
            chunk = connection.recv(4096)
        except BlockingIOError:
            return None
        except OSError:
            chunk = b""
        rank = self._ranks[connection]
        heard = self._heard[rank] = (self._heard[rank] + chunk)[-_WORDS:]
        if chunk:
            return None
        self._drop(connection)
        self._expected.discard(rank)
        self.words[rank] = heard
        return None if heard.endswith(_FAREWELL) else rank

    def _drop(self, connection: socket.socket) -> None:
        self._selector.unregister(connection)
        self._strangers.pop(connection, None)
        self._ranks.pop(connection, None)
        connection.close()

    def _close(self) -> None:
        for connection in [*self._ranks, *self._strangers]:
            connection.close()
        self._ranks.clear()
        self._strangers.clear()
        if self._server is not None:
            self._server.close()
            self._server = None
        self._selector.close()


def _greet(address: str, port: int, greeting: str, *, seconds: float) -> socket.socket | None:
    """A connection that rank 0 has welcomed; None where it was closed before. Raises OSError, also if time is up."""
    if seconds <= 0:
        raise TimeoutError(f"{address}:{port} closes each connection before it has answered")
    connection = socket.create_connection((address, port), timeout=seconds)
    try:
        connection.sendall(greeting.encode())
        if connection.recv(len(_WELCOME)) == _WELCOME:
            return connection
    except TimeoutError:
        with suppress(OSError):
            connection.sendall(_FAREWELL)  # should rank 0 read the greeting yet, nobody is missed
        connection.close()
        raise
    except ConnectionError:  # reset
        pass
    connection.close()
    return None


def _listen_at(address: str) -> socket.socket:
    """A server at the address by which the other ranks know this host; at all of its addresses where that is not known.

    Many systems resolve their own name to a loopback address, which no other host reaches; and an address may be
    another machine's that forwards to this one.
    """
    with suppress(OSError, ValueError):
        for family, _, _, _, place in socket.getaddrinfo(address, 0, type=socket.SOCK_STREAM):
            own = ipaddress.ip_address(str(place[0]))
            if not own.is_loopback or address in ("localhost", str(own)):
                with suppress(OSError):
                    return socket.create_server((str(own), 0), family=family, backlog=4096)
    if socket.has_dualstack_ipv6():
        return socket.create_server(("", 0), family=socket.AF_INET6, dualstack_ipv6=True, backlog=4096)
    return socket.create_server(("", 0), backlog=4096)
