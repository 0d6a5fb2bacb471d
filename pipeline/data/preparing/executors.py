"""Where units are done: in this process, in workers of this machine, or on a Dask cluster.

In: units, and what to do with one. Out: what became of each, in the order of completion. Every place is a
`concurrent.futures.Executor`; at most two units a worker are under way, and a worker that dies costs its unit one
more try. The one door to `distributed`.
"""

from __future__ import annotations

import gc
import os
import re
import signal
from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import CancelledError, Executor, Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from multiprocessing import parent_process
from multiprocessing.context import SpawnContext, SpawnProcess
from queue import SimpleQueue
from threading import Thread
from typing import Any

from pipeline.data.preparing.parts import DamagedInputError
from pipeline.data.preparing.unit import UnitReport
from pipeline.data.reading.plan import Unit
from pipeline.errors import UserError

DASK = "dask://"
DASK_TIMEOUT = "20s"

WORKER_ENVIRONMENT = {
    "OPENBLAS_NUM_THREADS": "1",  # numpy's threads idle, but not before they have spun for 0.1 s
    # large pages for the cache of words, where Linux gives them to those who ask (glibc 2.35 on): 4 % faster
    "GLIBC_TUNABLES": "glibc.malloc.hugetlb=1",
}
"""What workers find in their environment, unless the user has set it otherwise."""


class InThisProcess(Executor):
    """An executor that is done when `submit` returns."""

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        """Call at once."""
        future: Future[Any] = Future()
        try:
            future.set_result(fn(*args, **kwargs))
        except Exception as error:
            future.set_exception(error)
        return future


@dataclass(frozen=True)
class Place:
    """Where work is done: `workers` processes of this machine (1: this process), or the cluster at `address`."""

    workers: int
    address: str | None = None
    _begun: list[Executor] = field(default_factory=list, compare=False)

    @property
    def at_once(self) -> int:
        """Units to keep under way."""
        return 2 * self.workers if self.workers > 1 or self.address else 1

    @contextmanager
    def open(self, *, workers: int | None = None) -> Iterator[Executor]:
        """An executor; what was not begun is dropped at the end of the block."""
        workers = workers or self.workers
        if self.address:
            with _dask_client(self.address) as client:
                yield client.get_executor(pure=False)
        elif self.workers == 1:
            gc.freeze()  # see `_begin_worker`
            try:
                yield InThisProcess()
            finally:
                gc.unfreeze()
        else:
            pool = self._begun.pop() if self._begun else _pool(workers)
            try:
                yield pool
            finally:
                pool.shutdown(cancel_futures=True)

    @contextmanager
    def begun(self) -> Iterator[None]:
        """Within the block `warm` starts processes of this machine before there is work; the first `open` has them."""
        if self.workers > 1 and not self.address:
            self._begun.append(_pool(self.workers))
        try:
            yield
        finally:
            while self._begun:
                self._begun.pop().shutdown(cancel_futures=True)

    def warm(self, task: Callable[..., None], *args: Any, workers: int) -> None:
        """Start so many workers, if they are begun, with a task ahead of their work. What fails in it is not told."""
        with suppress(BrokenProcessPool):  # the work will meet it too, and deals with it
            for pool in self._begun:
                for _ in range(min(workers, self.workers)):
                    pool.submit(task, *args)


class _WorkerProcess(SpawnProcess):
    """A process with `WORKER_ENVIRONMENT`; other processes that this one starts do not inherit it."""

    def start(self) -> None:
        added = {name: value for name, value in WORKER_ENVIRONMENT.items() if name not in os.environ}
        os.environ.update(added)
        try:
            super().start()
        finally:
            for name in added:
                del os.environ[name]


class _WorkerContext(SpawnContext):
    Process = _WorkerProcess


def _pool(workers: int) -> ProcessPoolExecutor:
    return ProcessPoolExecutor(workers, mp_context=_WorkerContext(), initializer=_begin_worker)


def open_place(executor: str | None, workers: int) -> Place:
    """The place that `--executor` and `--workers` ask for. Raises `UserError` for an address that does not answer."""
    if executor is None:
        return Place(workers)
    host, _, port = executor.removeprefix(DASK).rpartition(":")
    is_host = re.fullmatch(r"[\w.-]+|\[[0-9A-Fa-f:.]+(?:%\w+)?\]", host)
    if not (
        executor.startswith(DASK) and is_host and port.isascii() and port.isdecimal() and 0 < int(port[:6]) < 2**16
    ):
        raise UserError(f"--executor wants {DASK}HOST:PORT, got {executor!r}; a port is a number from 1 to 65535")
    address = f"tcp://{host}:{port}"
    with _dask_client(address) as client:
        threads = list(client.nthreads().values())
    remedy = f"start some with `dask worker {address} --nworkers N --nthreads 1`"
    if not threads:
        raise UserError(f"the Dask scheduler at {address} has no workers; {remedy}")
    if max(threads) > 1:  # encoders are not made for several threads, nor would Python gain by them
        raise UserError(f"a Dask worker at {address} has {max(threads)} threads, wanted 1 a process; {remedy}")
    return Place(len(threads), address)


@contextmanager
def _dask_client(address: str) -> Iterator[Any]:
    try:
        from distributed import Client  # an optional dependency
    except ImportError:
        raise UserError("--executor dask:// needs the package distributed: pip install distributed") from None
    try:
        client = Client(address, timeout=DASK_TIMEOUT, set_as_default=False)
    except (OSError, ValueError) as error:  # nobody there, or no address
        raise UserError(f"no Dask scheduler answers at {address}: {error}; start one with `dask scheduler`") from None
    try:
        yield client
    finally:
        client.close()


@dataclass(frozen=True)
class Failure:
    """A unit that could not be done, and why; the others go on."""

    unit: Unit
    reason: str


Outcome = UnitReport | Failure


class UnitRun:
    """Does units on a place.

    `work` does a unit and returns the reports of its parts; `recover` finds those of parts that were finished but not
    heard of; `go_on` says what is left of a unit when they are recorded, None if nothing is.
    """

    def __init__(
        self,
        place: Place,
        work: Callable[[Unit], Sequence[UnitReport]],
        *,
        recover: Callable[[Unit], Sequence[UnitReport]],
        go_on: Callable[[Unit], Unit | None],
    ) -> None:
        self.place, self.work, self.recover, self.go_on = place, work, recover, go_on
        self._waiting: deque[Unit] = deque()

    def outcomes(self, units: Sequence[Unit]) -> Iterator[Outcome]:
        """What became of each unit and of its parts. Raises what concerns all units."""
        self._waiting.extend(units)
        while self._waiting:
            with self.place.open() as executor:
                suspects = yield from self._until_a_worker_dies(executor)
            for unit in suspects:  # its worker may have finished it before another one died
                yield from self.recover(unit)
                if left := self.go_on(unit):
                    yield from self._alone(left)

    def _until_a_worker_dies(self, executor: Executor) -> Generator[Outcome, None, list[Unit]]:
        """Outcomes as they come; returns the units that were under way when the pool broke, none at the end."""
        running: dict[Future[Sequence[UnitReport]], Unit] = {}
        done: SimpleQueue[Future[Sequence[UnitReport]]] = SimpleQueue()
        while self._waiting or running:
            while self._waiting and len(running) < self.place.at_once:
                self._submit(executor, self._waiting.popleft(), running, done)
            future = done.get()
            unit = running.pop(future)
            outcomes = self._outcomes(unit, future)
            if outcomes is None:
                return [unit, *(yield from self._rescue(running))]
            yield from outcomes
        return []

    def _rescue(self, running: dict[Future[Sequence[UnitReport]], Unit]) -> Generator[Outcome, None, list[Unit]]:
        """Of the futures of a broken pool, which all end at once: what was done before; returns the other units."""
        lost = []
        for future, unit in running.items():
            outcomes = self._outcomes(unit, future)
            if outcomes is None:
                lost.append(unit)
            else:
                yield from outcomes
        return lost

    def _submit(
        self,
        executor: Executor,
        unit: Unit,
        running: dict[Future[Sequence[UnitReport]], Unit],
        done: SimpleQueue[Future[Sequence[UnitReport]]],
    ) -> None:
        try:
            future = executor.submit(self.work, unit)
        except BrokenProcessPool as error:  # a worker died while nothing was waited for
            future = Future()
            future.set_exception(error)
        running[future] = unit
        future.add_done_callback(done.put)

    def _outcomes(self, unit: Unit, future: Future[Sequence[UnitReport]]) -> Sequence[Outcome] | None:
        """None: a worker died under it, or under another unit of the same pool."""
        try:
            return future.result()
        except (BrokenProcessPool, CancelledError):
            return None
        except DamagedInputError as error:
            return [*self.recover(unit), Failure(unit, str(error))]
        except Exception as error:
            if type(error).__name__ == "KilledWorker":  # Dask's: it has tried on several workers by itself
                return [*self.recover(unit), Failure(unit, _KILLED)]
            raise

    def _alone(self, unit: Unit) -> Iterator[Outcome]:
        """Once more with nothing beside it, to tell the unit that kills its worker from those that merely lay near."""
        with self.place.open(workers=1) as executor:
            outcomes = self._outcomes(unit, executor.submit(self.work, unit))
        if outcomes is None:
            outcomes = [*self.recover(unit), Failure(unit, _KILLED)]
        yield from outcomes


_KILLED = "its worker process was killed twice, perhaps for lack of memory; try fewer --workers or --max-doc-bytes"


def _begin_worker() -> None:
    """Set up a worker: one native thread, for the processes are the parallelism; it dies with its parent or Ctrl-C."""
    os.environ["RAYON_NUM_THREADS"] = "1"
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    gc.freeze()  # modules stay: looking through them for garbage took 5 % of the time
    Thread(target=_die_with_parent, daemon=True).start()


def _die_with_parent() -> None:
    """An orphan that went on writing would meet the next run in the same files."""
    parent = parent_process()
    assert parent is not None, "only workers have a parent"
    parent.join()
    os._exit(1)
