"""Rank 0's port while ranks come: strangers are neither believed nor waited for, and ranks are missed when they die."""

from __future__ import annotations

import resource
import socket
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import pytest

from pipeline.train.processes import lifeline as lifeline_module
from pipeline.train.processes.launched import Launch
from pipeline.train.processes.lifeline import Lifelines
from tests.strangers import SECRET, attacks, close, idle, send, slow_writers, wait_until
from tests.support import FORKS

WORLD = 4
ONE_HOST = Launch(world_size=WORLD, local_world_size=WORLD, elastic=True)
EVERYWHERE = ("::", "0.0.0.0")  # noqa: S104 - what a server is bound to that listens at all addresses


@dataclass
class Root:
    """Rank 0, listening in a thread; `missed`: ranks that were lost, in this order."""

    lines: Lifelines
    endpoint: dict[str, Any]
    missed: list[int] = field(default_factory=list)
    longest: float = 0.0
    done: bool = False

    @property
    def port(self) -> int:
        return int(self.endpoint["port"])

    def listen(self) -> None:
        while not self.done:
            began = time.monotonic()
            self.missed += self.lines.lost(0.05)
            self.longest = max(self.longest, time.monotonic() - began)


@pytest.fixture
def root() -> Iterator[Root]:
    lines = Lifelines()
    found = Root(lines, dict(lines.serve(ONE_HOST)))
    thread = threading.Thread(target=found.listen)
    thread.start()
    yield found
    found.done = True
    thread.join()
    lines.part(wait=0.0)


def come(root: Root, rank: int, **changed: Any) -> Lifelines:
    """A rank that connects, as `roll` does."""
    lines = Lifelines()
    where = {**root.endpoint, **changed}
    lines.connect(where["address"], where["port"], rank=rank, secret=where["secret"])
    return lines


def is_here(root: Root, rank: int) -> None:
    wait_until(lambda: root.lines.has(rank), seconds=5, what=f"rank {rank} is not let in")


@pytest.mark.parametrize("what", attacks())
def test_a_stranger_is_not_believed(what: str, root: Root) -> None:
    first = come(root, 1)
    held = attacks()[what](root.port)
    second = come(root, 2)  # while they hold their connections
    is_here(root, 2)
    time.sleep(0.2)
    close(held)
    time.sleep(0.2)
    assert root.missed == []
    assert root.lines.words == {}
    assert [root.lines.has(rank) for rank in range(WORLD)] == [False, True, True, False]
    assert root.longest < 2, "it was busy with strangers alone"
    first.part(wait=0.0)
    second._close()  # as the kernel does when it is killed
    wait_until(lambda: root.missed == [2], seconds=5, what="the death of a rank is not noticed")


def test_slow_writers_are_let_go(root: Root, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lifeline_module, "_GREETING_SECONDS", 1.0)
    with slow_writers(root.port):
        wait_until(lambda: len(root.lines._strangers) == 20, seconds=5, what="they did not come")
        is_here(root, (come(root, 1), 1)[1])
        wait_until(lambda: not root.lines._strangers, seconds=5, what="they may write for ever")
    assert root.missed == []


def test_what_strangers_hold_is_bounded(root: Root) -> None:
    held = idle(root.port, 1000)
    assert len(held) == 1000
    is_here(root, (come(root, 1), 1)[1])
    assert len(root.lines._strangers) <= lifeline_module._STRANGERS
    send(root.port, b"x" * 10_000_000)
    assert all(len(heard) <= lifeline_module._LONGEST for _, heard in root.lines._strangers.values())
    close(held)


@pytest.mark.parametrize(
    ("rank", "secret"), [(WORLD, None), (0, None), (1, None), (2, SECRET)], ids=["none such", "root", "twice", "secret"]
)
def test_who_knows_half_of_it_is_not_let_in(
    rank: int, secret: str | None, root: Root, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the right secret: a rank that does not exist, rank 0 itself, one that is here; and a right rank without."""
    monkeypatch.setattr(lifeline_module, "_GREETING_SECONDS", 0.5)
    first = come(root, 1)
    with pytest.raises(OSError, match="closes each connection before it has answered"):
        come(root, rank, **({} if secret is None else {"secret": secret}))
    assert root.missed == []
    assert root.lines.has(1)
    first.part(wait=0.0)
    with pytest.raises(OSError, match="closes each connection"):
        come(root, 1)  # it has been here: another start of it belongs to another session


def test_nobody_comes_any_more_when_all_have(root: Root) -> None:
    ranks = [come(root, rank) for rank in range(1, WORLD)]
    held = idle(root.port, 10)
    root.done = True  # `roll` calls this in the thread that listens
    time.sleep(0.2)
    root.lines.all_have_come()
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.1", root.port), timeout=2)
    assert all(root.lines.has(rank) for rank in range(1, WORLD))
    close(held)
    for lines in ranks:
        lines.part(wait=0.0)


def test_a_rank_that_is_pushed_out_unread_comes_again(root: Root) -> None:
    """Strangers come faster than they are read: what a rank sent goes with them."""
    done = threading.Event()

    def flood() -> None:
        while not done.is_set():
            close(idle(root.port, 300))

    threads = [threading.Thread(target=flood) for _ in range(3)]
    for thread in threads:
        thread.start()
    ranks = [come(root, rank) for rank in range(1, WORLD)]
    done.set()
    for thread in threads:
        thread.join()
    assert all(root.lines.has(rank) for rank in range(1, WORLD))
    assert root.missed == []
    del ranks


def short_of_descriptors(sender: Any, act: Callable[[Lifelines], None]) -> None:
    """Rank 0 in a process of its own that may open 40 files."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (40, hard))
    lines = Lifelines()
    sender.send(lines.serve(ONE_HOST))
    act(lines)


def serve_until_rank_1_dies(lines: Lifelines) -> None:
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline:
        if lines.lost(0.05) == [1]:
            raise SystemExit(7)


def test_a_shortage_of_descriptors_is_survived() -> None:
    receiver, sender = FORKS.Pipe(duplex=False)
    process = FORKS.Process(target=short_of_descriptors, args=(sender, serve_until_rank_1_dies))
    process.start()
    assert receiver.poll(60)
    root = Root(Lifelines(), receiver.recv())
    held = idle(root.port, 200)
    rank = come(root, 1)
    close(held)
    rank._close()
    process.join(30)
    assert process.exitcode == 7


@pytest.mark.parametrize(
    ("launch", "expected"),
    [
        (replace(ONE_HOST, address="no.such.name.invalid"), "127.0.0.1"),
        (replace(ONE_HOST, elastic=False, address="192.0.2.1"), "::"),  # it may not know how many are here
        (Launch(world_size=2, local_world_size=1, address="127.0.0.1"), "127.0.0.1"),
        (Launch(world_size=2, local_world_size=1, address="localhost"), "127.0.0.1"),
        (Launch(world_size=2, local_world_size=1, address="::1"), "::1"),
        (Launch(world_size=2, local_world_size=1, address="own.name"), "::"),  # loopback here, another one abroad
        (Launch(world_size=2, local_world_size=1, address="192.0.2.1"), "::"),  # forwarded to this machine
        (Launch(world_size=2, local_world_size=1, address="no.such.name.invalid"), "::"),
    ],
)
def test_rank_0_listens_where_ranks_look_for_it(launch: Launch, expected: str, monkeypatch: pytest.MonkeyPatch) -> None:
    resolve = socket.getaddrinfo

    def resolved(name: Any, *arguments: Any, **named: Any) -> Any:
        if str(name).endswith(".invalid"):
            raise socket.gaierror(-2, "Name or service not known")
        return resolve("127.0.1.1" if name == "own.name" else name, *arguments, **named)

    monkeypatch.setattr(socket, "getaddrinfo", resolved)
    lines = Lifelines()
    lines.serve(launch)
    assert lines._server is not None
    found = lines._server.getsockname()[0]
    lines.part(wait=0.0)
    if expected == "::1" and found == "::":
        pytest.skip("this machine has no IPv6 on its loopback interface")
    assert found in {"::1": ("::1",), "::": EVERYWHERE, "127.0.0.1": ("127.0.0.1",)}[expected] or (
        launch.address == "localhost" and found == "::1"
    )


def test_rank_0_listens_at_its_own_address_among_hosts() -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(("192.0.2.1", 9))  # sends nothing
        except OSError:
            pytest.skip("this machine has no address but the loopback one")
        own = probe.getsockname()[0]
    lines = Lifelines()
    endpoint = lines.serve(Launch(world_size=2, local_world_size=1, address=own))
    assert lines._server is not None
    assert lines._server.getsockname()[0] == own
    assert endpoint["address"] == own
    lines.part(wait=0.0)
