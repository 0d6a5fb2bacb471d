"""One connection from each rank to rank 0: the kernel closes it when a process dies, however it dies.

In: ranks that have found each other. Out: those whose connection ended without a farewell. A killed process cannot
claim anything, and a heartbeat that stays away may only be late: a closed connection is sure, and known at once.
"""

from __future__ import annotations

import os
import selectors
import socket
import time
from contextlib import suppress

_FAREWELL = b"farewell\n"
# A host that vanishes closes nothing: probed after 5 s of silence, given up after 3 more probes. macOS lacks the first.
_PROBES = (("TCP_KEEPIDLE", 5), ("TCP_KEEPINTVL", 5), ("TCP_KEEPCNT", 3))


class Lifelines:
    """Ends of the connections in this process: all of them in rank 0, one in every other rank."""

    def __init__(self) -> None:
        self._selector = selectors.DefaultSelector()
        self._server: socket.socket | None = None
        self._heard: dict[socket.socket, bytes] = {}
        self._ranks: dict[socket.socket, int] = {}  # who is at the other end
        self.words: dict[int, bytes] = {}  # the last ones of ranks whose connections have ended, if they had any
        self._parting = False
        self._expected: set[int] = set()  # whose farewell is still to come
        if hasattr(os, "register_at_fork"):  # a copy in a forked child would keep the connection open
            os.register_at_fork(after_in_child=self._close)

    def serve(self, world_size: int) -> int:
        """Listen for all others, in rank 0; the port."""
        self._expected = set(range(1, world_size))
        if socket.has_dualstack_ipv6():
            self._server = socket.create_server(("", 0), family=socket.AF_INET6, dualstack_ipv6=True, backlog=4096)
        else:
            self._server = socket.create_server(("", 0), backlog=4096)
        self._server.setblocking(False)
        self._selector.register(self._server, selectors.EVENT_READ)
        return int(self._server.getsockname()[1])

    def connect(self, address: str, port: int, *, rank: int) -> None:
        """Connect `rank` to rank 0, and to no earlier one any more. Errors: OSError when a firewall lies between."""
        for earlier in list(self._heard):
            self._drop(earlier)
        connection = socket.create_connection((address, port), timeout=10)
        connection.sendall(f"{rank}\n".encode())
        self._adopt(connection, rank=0)

    def lost(self, seconds: float) -> list[int]:
        """Wait so long at most for news; the ranks whose connections have ended without a farewell."""
        found = []
        for key, _ in self._selector.select(seconds):
            connection = key.fileobj
            assert isinstance(connection, socket.socket), "nothing else is registered"
            if connection is self._server:
                self._let_in()
            elif (rank := self._listen(connection)) is not None:
                found.append(rank)
        return found

    def has(self, rank: int) -> bool:
        """Whether a rank is connected and has said who it is."""
        return rank in self._ranks.values()

    def say(self, words: str) -> None:
        """Tell all who are connected why this process ends, before the kernel closes its connections."""
        for connection in list(self._heard):
            with suppress(OSError):
                connection.sendall(f"{words}\n".encode())

    def part(self, *, wait: float) -> None:
        """Say farewell, and wait so long at most for that of the others, whom a store in this process may serve.

        Some may not even have been let in: they connect before this process looks.
        """
        self._parting = True
        self._let_in()
        for connection in self._heard:
            with suppress(OSError):
                connection.sendall(_FAREWELL)
        end = time.monotonic() + wait
        while wait and self._expected and (left := end - time.monotonic()) > 0:
            self.lost(left)
        self._close()

    def _let_in(self) -> None:
        """Accept all who have connected: in a short job the first look may be the last."""
        with suppress(BlockingIOError):
            while self._server is not None:
                self._adopt(self._server.accept()[0], rank=None)

    def _adopt(self, connection: socket.socket, *, rank: int | None) -> None:
        connection.setblocking(False)
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for name, value in _PROBES:
            if hasattr(socket, name):
                connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
        self._heard[connection] = b""
        if self._parting:
            with suppress(OSError):
                connection.sendall(_FAREWELL)
        if rank is not None:
            self._ranks[connection] = rank
        self._selector.register(connection, selectors.EVENT_READ)

    def _listen(self, connection: socket.socket) -> int | None:
        """Read what there is; the rank at the other end when it has gone without a farewell."""
        try:
            chunk = connection.recv(4096)
        except BlockingIOError:
            return None
        except OSError:
            chunk = b""
        self._heard[connection] += chunk
        heard = self._heard[connection]
        if connection not in self._ranks and b"\n" in heard:
            name, _, self._heard[connection] = heard.partition(b"\n")
            if not name.isdigit():  # a stranger, such as a scan of ports
                self._drop(connection)
                return None
            self._ranks[connection] = int(name)
        if chunk:
            return None
        rank, heard_last = self._ranks.get(connection), self._heard[connection]
        parted = heard_last.endswith(_FAREWELL)
        self._drop(connection)
        if rank is not None:
            self._expected.discard(rank)
            self.words[rank] = heard_last
        return None if parted else rank

    def _drop(self, connection: socket.socket) -> None:
        self._selector.unregister(connection)
        self._heard.pop(connection)
        self._ranks.pop(connection, None)
        connection.close()

    def _close(self) -> None:
        for connection in self._heard:
            connection.close()
        self._heard.clear()
        if self._server is not None:
            self._server.close()
            self._server = None
        self._selector.close()
