"""Units run on every place to the same end, whoever dies on the way."""

from __future__ import annotations

import multiprocessing
import os
import signal
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest

from pipeline.data.preparing.executors import Failure, Outcome, Place, UnitRun
from pipeline.data.preparing.parts import DamagedInputError
from pipeline.data.preparing.unit import UnitReport
from pipeline.data.reading.plan import Begun, Unit
from pipeline.errors import UserError

UNITS = [Unit(number, ()) for number in range(12)]


def report(unit: Unit) -> UnitReport:
    return UnitReport(
        unit=unit.number, part=0, last=True, key="", shards={}, first_sources={}, documents=1, text_bytes=1, rows={},
        drops={}, examples=(), noticed={}, quarantine=None, lowest_draw=0,
    )  # fmt: skip


def note(folder: Path, unit: Unit) -> int:
    """Record that a unit was begun; how often it was before."""
    path = folder / unit.name
    before = path.stat().st_size if path.exists() else 0
    with path.open("ab") as file:
        file.write(b"x")
    return before


def killed_once(unit: Unit, *, folder: Path) -> list[UnitReport]:
    if note(folder, unit) == 0 and unit.number == 5:
        os.kill(os.getpid(), signal.SIGKILL)
    return [report(unit)]


def killed_always(unit: Unit, *, folder: Path) -> list[UnitReport]:
    note(folder, unit)
    if unit.number == 5:
        os.kill(os.getpid(), signal.SIGKILL)
    return [report(unit)]


def damaged(unit: Unit, *, folder: Path) -> list[UnitReport]:
    note(folder, unit)
    if unit.number in (3, 4):
        raise DamagedInputError(f"unit {unit.number} is torn")
    return [report(unit)]


def hopeless(unit: Unit, *, folder: Path) -> list[UnitReport]:
    note(folder, unit)
    raise UserError("wrong for every unit")


def at_once(unit: Unit, *, folder: Path) -> list[UnitReport]:
    (folder / f"running-{unit.name}").touch()
    time.sleep(0.02)
    return [report(unit)]


def leave_pid(folder: Path) -> None:
    (folder / str(os.getpid())).touch()
    time.sleep(0.2)  # so that the other worker gets a task of its own


def die(unit: Unit | None = None) -> UnitReport:
    os.kill(os.getpid(), signal.SIGKILL)
    raise AssertionError("not reached")


def pid_of(_: int) -> int:
    return os.getpid()


def wait_for(folder: Path) -> None:
    deadline = time.monotonic() + 60
    while not list(folder.iterdir()):
        assert time.monotonic() < deadline, "no worker began"
        time.sleep(0.01)


def alive(pid: str) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def run(
    work: Callable[..., list[UnitReport]],
    folder: Path,
    *,
    workers: int,
    units: list[Unit] = UNITS,
    recover: Callable[[Unit], list[UnitReport]] = lambda unit: [],
    go_on: Callable[[Unit], Unit | None] = lambda unit: unit,
) -> list[Outcome]:
    return list(UnitRun(Place(workers), partial(work, folder=folder), recover=recover, go_on=go_on).outcomes(units))


def numbers(outcomes: list[Outcome]) -> list[int]:
    return sorted(outcome.unit for outcome in outcomes if isinstance(outcome, UnitReport))


def test_a_killed_worker_costs_its_unit_one_more_try(tmp_path: Path) -> None:
    assert numbers(run(killed_once, tmp_path, workers=2)) == list(range(12))
    tries = {path.name: path.stat().st_size for path in tmp_path.iterdir()}
    again = [name for name, count in tries.items() if count > 1]
    assert "00005" in again
    assert len(again) <= 2, "at most one unit a worker is done again"
    assert max(tries.values()) == 2


def test_a_unit_that_kills_its_worker_is_named_and_the_others_are_done(tmp_path: Path) -> None:
    outcomes = run(killed_always, tmp_path, workers=2)
    assert numbers(outcomes) == [number for number in range(12) if number != 5]
    (failure,) = (outcome for outcome in outcomes if isinstance(outcome, Failure))
    assert failure.unit.number == 5
    assert "killed twice" in failure.reason
    assert (tmp_path / "00005").stat().st_size == 2


def test_workers_begun_ahead_do_the_work(tmp_path: Path) -> None:
    place = Place(2)
    with place.begun():
        place.warm(leave_pid, tmp_path, workers=2)
        with place.open() as executor:
            working = {str(pid) for pid in executor.map(pid_of, range(8))}
        begun = {path.name for path in tmp_path.iterdir()}
        assert len(begun) == 2
        assert working <= begun
        with place.open() as executor:  # after a worker died, say: others
            assert not {str(pid) for pid in executor.map(pid_of, range(8))} & begun
    assert not any(map(alive, begun))


def test_workers_begun_for_nothing_end(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no document"), Place(3).begun():
        raise UserError("no document")
    place = Place(3)
    with place.begun():
        place.warm(leave_pid, tmp_path, workers=1)
        wait_for(tmp_path)
    (pid,) = (path.name for path in tmp_path.iterdir())
    assert not alive(pid)


def test_workers_that_die_ahead_of_the_work_cost_a_try(tmp_path: Path) -> None:
    place = Place(2)
    with place.begun():
        place.warm(die, workers=2)
        outcomes = UnitRun(
            place, partial(at_once, folder=tmp_path), recover=lambda unit: [], go_on=lambda unit: unit,
        ).outcomes(UNITS)  # fmt: skip
        assert numbers(list(outcomes)) == list(range(12))


def test_one_process_and_clusters_begin_nothing() -> None:
    begun: list[int] = []
    before = multiprocessing.active_children()
    for place in (Place(1), Place(2, "tcp://nowhere:1")):
        with place.begun():
            place.warm(begun.append, 1, workers=2)
    assert begun == []
    assert multiprocessing.active_children() == before


@pytest.mark.parametrize("workers", [1, 2])
def test_damage_concerns_one_unit_other_errors_all(tmp_path: Path, workers: int) -> None:
    outcomes = run(damaged, tmp_path, workers=workers)
    failures = {outcome.unit.number: outcome.reason for outcome in outcomes if isinstance(outcome, Failure)}
    assert failures == {3: "unit 3 is torn", 4: "unit 4 is torn"}
    assert len(numbers(outcomes)) == 10
    (tmp_path / "other").mkdir()
    with pytest.raises(UserError, match="wrong for every unit"):
        run(hopeless, tmp_path / "other", workers=workers)
    assert len(list((tmp_path / "other").iterdir())) <= 2 * workers + 1, "the rest was not begun"


def test_what_was_finished_but_not_heard_of_is_not_done_again(tmp_path: Path) -> None:
    """The unit that killed its worker had one part done, and another one was done altogether."""
    left: list[int] = []

    def recover(unit: Unit) -> list[UnitReport]:
        return [report(unit).model_copy(update={"last": unit.number != 5})] if unit.number in (5, 6) else []

    def go_on(unit: Unit) -> Unit | None:
        left.append(unit.number)
        return None if unit.number == 6 else replace(unit, begun=Begun(parts=1))

    outcomes = run(killed_always, tmp_path, workers=2, recover=recover, go_on=go_on)
    (failure,) = (outcome for outcome in outcomes if isinstance(outcome, Failure))
    assert failure.unit == Unit(5, (), begun=Begun(parts=1))
    assert 5 in left
    sixth = tmp_path / "00006"
    assert not (6 in left and sixth.exists() and sixth.stat().st_size > 1)


def environment(names: tuple[str, ...]) -> list[str | None]:
    time.sleep(0.2)  # long enough for the other worker to take one, too
    return [os.environ.get(name) for name in names]


def test_workers_have_an_environment_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("GLIBC_TUNABLES", raising=False)
    monkeypatch.setenv("OPENBLAS_NUM_THREADS", "3")
    names = ("GLIBC_TUNABLES", "OPENBLAS_NUM_THREADS")
    with Place(2).open() as pool:
        seen = [future.result() for future in [pool.submit(environment, names) for _ in range(4)]]
    assert seen == [["glibc.malloc.hugetlb=1", "3"]] * 4
    assert environment(names) == [None, "3"]
