"""Killed at any instant, over and over, a run of several ranks ends as if nothing had happened.

    python -m tests.end_to_end.test_chaos 100

One rank, all ranks or torchrun itself are killed (SIGKILL) while stepping, evaluating, saving and while a checkpoint is
written beside training; each time the same command is given again. Weights, moments and record must be, bit by bit,
those of a run that was left alone.
"""

from __future__ import annotations

import os
import random
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from functools import partial, wraps
from pathlib import Path
from typing import Any

import psutil
import pytest

from pipeline.train.running.run import Run
from pipeline.train.saving.checkpoint import list_checkpoints, verify
from pipeline.train.saving.flush import Flush
from pipeline.train.step import Trainer
from tests.support import end_tree, make_dataset, record, run_ranks, start_ranks, tiny_settings, write_config

RANKS = 2
STEPS = 40
PHASES = ("step", "evaluation", "save", "flush")
VICTIMS = ("one rank", "all ranks", "torchrun")


def config_of(folder: Path, dataset: Path, name: str, strategy: str) -> Path:
    settings = tiny_settings(
        dataset,
        folder / name,
        model={"dropout": 0.1},
        train={"steps": STEPS, "micro_batch": 2},
        parallel={"strategy": strategy},
        checkpoint={"every": 2, "keep": 2},
        eval={"every": 3, "tokens": 256},
    )
    return write_config(folder / f"{name}.yaml", settings)


def say_phases(folder: Path) -> None:
    """In each rank: tell in a file what it does, for the killer to choose the moment."""
    places = (
        ("step", Trainer, "step"),
        ("evaluation", Run, "evaluate"),
        ("save", Run, "save"),
        ("flush", Flush, "run"),
    )
    file = folder / os.environ["RANK"]
    for phase, owner, method in places:
        setattr(owner, method, _telling(getattr(owner, method), phase, file))


def _telling(method: Callable[..., Any], phase: str, file: Path) -> Callable[..., Any]:
    @wraps(method)
    def told(*arguments: Any, **named: Any) -> Any:
        file.write_text(phase)
        return method(*arguments, **named)

    return told


def ranks_of(agent: int) -> list[psutil.Process]:
    """The processes of the ranks, in their order."""
    try:
        return sorted(psutil.Process(agent).children(), key=lambda child: child.pid)
    except psutil.NoSuchProcess:
        return []


class Killer:
    """Chooses who is killed when, and counts."""

    def __init__(self, seed: int, phases: Path) -> None:
        self.chance = random.Random(seed)
        self.phases = phases
        self.kills: Counter[tuple[str, str]] = Counter()

    def wait(self, agent: Any) -> str:
        """Until a phase drawn at random has come in one of the ranks, and a little longer; "" when the run ended."""
        wanted = self.chance.choice(PHASES)
        for file in self.phases.iterdir():
            file.unlink()
        skipped = self.chance.randrange(6)  # not always the first time
        until = time.monotonic() + 60
        while agent.is_alive() and time.monotonic() < until:
            now = [file.read_text() for file in sorted(self.phases.iterdir())]
            if wanted in now:
                if skipped == 0:
                    time.sleep(self.chance.choice((0, 0.001, 0.003, 0.01)))
                    return wanted
                skipped -= 1
                while agent.is_alive() and wanted in [f.read_text() for f in self.phases.iterdir()]:
                    time.sleep(0.0005)
            time.sleep(0.0005)
        return ""

    def strike(self, agent: Any, phase: str) -> None:
        """Kill, then see that all of the run's processes end."""
        ranks = ranks_of(agent.pid)
        if len(ranks) < RANKS:
            return
        who = self.chance.choice(VICTIMS)
        victims = {"one rank": [self.chance.choice(ranks)], "all ranks": ranks, "torchrun": [psutil.Process(agent.pid)]}
        for victim in victims[who]:
            try:
                victim.send_signal(signal.SIGKILL)
            except psutil.NoSuchProcess:
                return
        self.kills[who, phase] += 1
        _, left = psutil.wait_procs(ranks, timeout=30)
        assert not left, f"{who} killed in {phase}: 30 s later ranks still live"
        agent.join(30)
        assert not agent.is_alive(), f"{who} killed in {phase}: 30 s later torchrun still lives"


def chaos(folder: Path, *, kills: int, seed: int, strategy: str) -> Counter[tuple[str, str]]:
    """Runs killed until there were so many kills; how many of each kind."""
    dataset = make_dataset(folder / "words", documents=60)
    code, printed = run_ranks(RANKS, str(config_of(folder, dataset, "left-alone", strategy)), output=folder / "a.txt")
    assert code == 0, printed
    phases = folder / "phases"
    phases.mkdir()
    killer = Killer(seed, phases)
    runs = 0
    while killer.kills.total() < kills:
        runs += 1
        name, output = f"killed-{runs}", folder / f"killed-{runs}.txt"
        config = config_of(folder, dataset, name, strategy)
        while True:
            before = killer.kills.total()
            agent = start_ranks(RANKS, str(config), output=output, before=partial(say_phases, phases))
            try:
                if killer.kills.total() < kills and (phase := killer.wait(agent)):
                    killer.strike(agent, phase)
                agent.join(120)
            finally:
                end_tree(agent.pid)
            for checkpoint in list_checkpoints(folder / name / "checkpoints"):
                assert verify(checkpoint) == [], checkpoint
            if agent.exitcode == 0:
                break
            assert killer.kills.total() > before, output.read_text()[-3000:]
        assert_same(folder / name, folder / "left-alone", output)
    return killer.kills


def assert_same(found: Path, expected: Path, output: Path) -> None:
    """Record, weights and moments, bit by bit; nothing left over."""
    assert record(found) == record(expected), output.read_text()[-3000:]
    final = [list_checkpoints(run / "checkpoints")[-1] for run in (found, expected)]
    files = [sorted(str(path.relative_to(one)) for path in one.rglob("*.safetensors")) for one in final]
    assert files[0] == files[1]
    assert len(files[0]) == 2 * RANKS
    for file in files[0]:
        assert (final[0] / file).read_bytes() == (final[1] / file).read_bytes(), file
    assert list((found / "checkpoints").glob(".*")) == []


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_kills_leave_no_trace(tmp_path: Path, strategy: str) -> None:
    kills = chaos(tmp_path, kills=5, seed=3, strategy=strategy)
    assert kills.total() >= 5
    assert "resuming from" in "".join(path.read_text() for path in tmp_path.glob("killed-*.txt"))


if __name__ == "__main__":
    number = int(sys.argv[1]) if len(sys.argv) > 1 else 100
    began = time.monotonic()
    total: Counter[tuple[str, str]] = Counter()
    for which, one in enumerate(("ddp", "fsdp")):
        with tempfile.TemporaryDirectory() as place:
            total += chaos(Path(place), kills=number // 2, seed=which, strategy=one)
    for (who, phase), count in sorted(total.items()):
        print(f"{count:4} {who} killed while in {phase}")
    print(f"{total.total()} kills; each run ended with the same bits. {time.monotonic() - began:.0f} s")
