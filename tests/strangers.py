"""What strangers do to an open port: bytes that no peer sends, many connections, slow and broken ones."""

from __future__ import annotations

import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

from pipeline.train.processes.ending import Ending

SECRET = "0" * 64  # as long as the real one
ENDING = Ending(1, "elsewhere", "stopped, saved", 1, 75).written()
BYTES = {
    "nothing": b"",
    "garbage": bytes(range(256)) * 16,
    "zeros": b"\0" * 64,
    "a bare rank": b"1\n",
    "8,000 digits": b"1" * 8000,
    "many lines": b"1\n" * 4000,
    "a rank that does not exist": f"{SECRET} 7\n".encode(),
    "rank 0": f"{SECRET} 0\n".encode(),
    "a wrong secret": f"{SECRET} 1\n".encode(),
    "a forged farewell": b"1\nfarewell\n",
    "a forged ending": f"1\n{ENDING}\n".encode(),
    "a forged ending with a wrong secret": f"{SECRET} 1\n{ENDING}\n".encode(),
    "another protocol": b"GET / HTTP/1.1\r\nHost: x\r\n\r\n",
}


def send(port: int, data: bytes, *, how: str = "close") -> socket.socket | None:
    """Connect and send; then close, reset, or return the connection (`hold`). A port that refuses is no fault."""
    with suppress(OSError):
        connection = socket.create_connection(("127.0.0.1", port), timeout=2)
        with suppress(OSError):
            connection.sendall(data)
        if how == "hold":
            return connection
        if how == "reset":
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        connection.close()
    return None


def attacks(*, many: int = 1000) -> dict[str, Callable[[int], list[socket.socket]]]:
    """By name: what attacks a port, and returns the connections that it leaves open. `many`: idle ones at once."""

    def sending(data: bytes) -> Callable[[int], list[socket.socket]]:
        def attack(port: int) -> list[socket.socket]:
            held = [send(port, data, how=how) for how in ("close", "reset", "hold", "hold")]  # a rank comes twice
            return [connection for connection in held if connection is not None]

        return attack

    return {
        **{what: sending(data) for what, data in BYTES.items()},
        "half a greeting": sending(SECRET[:30].encode()),
        f"{many:,} idle connections": lambda port: idle(port, many),
    }


def idle(port: int, count: int) -> list[socket.socket]:
    """That many connections which say nothing, as far as the other end takes them."""
    held = []
    for _ in range(count):
        connection = socket.socket()
        connection.settimeout(1)
        try:
            connection.connect(("127.0.0.1", port))
        except OSError:
            connection.close()
            break
        held.append(connection)
    return held


@contextmanager
def slow_writers(port: int, *, count: int = 20) -> Iterator[None]:
    """Connections that send a byte of a greeting ten times a second, as long as the context lasts."""
    done = threading.Event()
    held = idle(port, count)

    def write() -> None:
        for byte in f"{SECRET} 1".encode() * 100:
            for connection in held:
                with suppress(OSError):
                    connection.send(bytes([byte]))
            if done.wait(0.1):
                return

    thread = threading.Thread(target=write, daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join(5)
        close(held)


def close(connections: list[socket.socket]) -> None:
    for connection in connections:
        connection.close()


def wait_until(condition: Callable[[], bool], *, seconds: float, what: str) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, what
        time.sleep(0.05)
