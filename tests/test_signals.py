"""What asks a run to stop: signals and time."""

from __future__ import annotations

import hashlib
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from pipeline.train.processes.ending import tell
from pipeline.train.processes.signals import ECHO, StopSignal
from tests.support import FORKS, _print_into

Scenario = Callable[[StopSignal, list[str]], None]


def in_a_process(scenario: Scenario, tmp_path: Path) -> tuple[int, str]:
    """Handlers of signals belong to a process of their own; its exit code and what it printed."""
    output = tmp_path / "output.txt"
    process = FORKS.Process(target=_play, args=(scenario, str(output)))
    process.start()
    process.join(60)
    assert process.exitcode is not None
    return process.exitcode, output.read_text()


def _play(scenario: Scenario, output: str) -> None:
    _print_into(output)
    heard: list[str] = []
    stop = StopSignal(at_once=heard.append, answer=tell, end=lambda code, text: os._exit(code))
    scenario(stop, heard)


def send(number: int) -> None:
    os.kill(os.getpid(), number)
    time.sleep(0.1)  # for the thread


def before_the_first_step(stop: StopSignal, heard: list[str]) -> None:
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
        send(number)
    assert heard == ["SIGTERM", "SIGINT", "SIGUSR1"]
    assert not stop()


def remembered(stop: StopSignal, heard: list[str]) -> None:
    stop.arm()
    assert not stop()
    send(signal.SIGTERM)
    assert stop()
    assert (stop.reason, heard) == ("SIGTERM", [])
    send(signal.SIGTERM)  # an echo: a launcher and the cluster both sent it
    assert stop()


def second_ends(stop: StopSignal, heard: list[str]) -> None:
    stop.arm()
    send(signal.SIGINT)
    time.sleep(ECHO)
    send(signal.SIGTERM)
    time.sleep(5)
    raise AssertionError("still alive")


def polite(stop: StopSignal, heard: list[str]) -> None:
    stop.arm()
    send(signal.SIGUSR1)
    time.sleep(ECHO)
    send(signal.SIGUSR1)
    send(signal.SIGTERM)  # time is up: the save that the first one asked for is under way
    assert stop.reason == "SIGUSR1"


def while_in_c(stop: StopSignal, heard: list[str]) -> None:
    pid = os.getpid()
    began = time.monotonic()
    times: list[float] = []
    stop._at_once = lambda name: times.append(time.monotonic() - began)
    if os.fork() == 0:
        time.sleep(0.3)
        os.kill(pid, signal.SIGTERM)
        os._exit(0)
    while time.monotonic() - began < 1:  # one call in C that looks at no signals, until it has taken long enough
        called = time.monotonic()
        hashlib.pbkdf2_hmac("sha256", b"", b"", 3_000_000)
        assert time.monotonic() - called > 0.6, "not long enough to tell"
    assert len(times) == 1
    assert times[0] < 0.6


def forked_child(stop: StopSignal, heard: list[str]) -> None:
    stop.arm()
    child = os.fork()
    if child == 0:
        time.sleep(30)
        os._exit(0)
    time.sleep(0.2)
    os.kill(child, signal.SIGTERM)
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status)
    assert os.WTERMSIG(status) == signal.SIGTERM
    time.sleep(0.2)
    assert not stop()


def time_limit(stop: StopSignal, heard: list[str]) -> None:
    stop.within(0.3 / 60)
    assert not stop()
    time.sleep(0.4)
    assert stop()
    assert stop.reason == "train.max_minutes"


@pytest.mark.parametrize("scenario", [before_the_first_step, remembered, polite, while_in_c, forked_child, time_limit])
def test_stop_signal(scenario: Scenario, tmp_path: Path) -> None:
    code, printed = in_a_process(scenario, tmp_path)
    assert code == 0, printed


def test_the_first_signal_is_answered_once(tmp_path: Path) -> None:
    _, printed = in_a_process(remembered, tmp_path)
    assert printed == "SIGTERM: stopping after this step; a second signal ends the process at once\n"


def test_a_second_signal_ends_the_process_at_once(tmp_path: Path) -> None:
    code, printed = in_a_process(second_ends, tmp_path)
    assert code == 128 + signal.SIGTERM, printed
    assert "SIGTERM for the second time: ending at once" in printed
