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
from concurrent.futures import CancelledError, Executor, Future, ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from multiprocessing import parent_process
from multiprocessing.context import SpawnContext, SpawnProcess
from queue import SimpleQueue
from threading import Event, Semaphore, Thread
from typing import Any

from pipeline.data.preparing.unit import DamagedInputError, UnitReport
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
        raise UserError(f"--executor wants {DASK}HOST:PORT with a port from 1 to 65535, got {executor!r}")
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


@dataclass(frozen=True)
class CutEnd:
    """A stream unit was read to its end and cut into `parts`."""

    unit: Unit
    parts: int


@dataclass(frozen=True)
class _Cut:
    unit: Unit


Outcome = UnitReport | Failure | CutEnd


class UnitRun:
    """Does units on a place.

    `cut` turns a stream unit into the units of its parts; `skip` says which are done; `done_with` is told of parts
    that are no longer needed; `recover` finds the report of a unit that was finished but not heard of.
    """

    def __init__(
        self,
        place: Place,
        work: Callable[[Unit], UnitReport],
        *,
        cut: Callable[[Unit], Iterator[Unit]],
        skip: Callable[[Unit], bool],
        done_with: Callable[[Unit], None],
        recover: Callable[[Unit], UnitReport | None],
    ) -> None:
        self.place, self.work, self.cut, self.skip = place, work, cut, skip
        self.done_with, self.recover = done_with, recover
        self._waiting: deque[Unit] = deque()
        self._cutting = 0
        self._events: SimpleQueue[Any] = SimpleQueue()
        self._stopping = Event()
        self._room = Semaphore(place.at_once + 1)  # parts that are cut and not done yet lie on the disk

    def outcomes(self, units: Sequence[Unit]) -> Iterator[Outcome]:
        """What became of each unit. Raises what concerns all units."""
        self._waiting.extend(unit for unit in units if not unit.stream)
        streams = [unit for unit in units if unit.stream]
        self._cutting = len(streams)
        cutters = ThreadPoolExecutor(max(1, min(self.place.workers, len(streams))), thread_name_prefix="cutter")
        for unit in streams:
            cutters.submit(self._cut_up, unit)
        try:
            while self._waiting or self._cutting:
                with self.place.open() as executor:
                    suspects = yield from self._until_a_worker_dies(executor)
                for unit in suspects:  # its worker may have finished it before another one died
                    yield self._finished(unit, self.recover(unit) or self._alone(unit))
        finally:
            self._stopping.set()
            cutters.shutdown(cancel_futures=True)

    def _until_a_worker_dies(self, executor: Executor) -> Generator[Outcome, None, list[Unit]]:
        """Outcomes as they come; returns the units that were under way when the pool broke, none at the end."""
        running: dict[Future[UnitReport], Unit] = {}
        while self._waiting or self._cutting or running:
            while self._waiting and len(running) < self.place.at_once:
                self._submit(executor, self._waiting.popleft(), running)
            event = self._events.get()
            if isinstance(event, Exception):
                raise event
            if isinstance(event, _Cut):
                self._waiting.appendleft(event.unit)
            elif isinstance(event, Failure | CutEnd):
                self._cutting -= 1
                yield event
            elif event in running:
                unit = running.pop(event)
                outcome = self._outcome(unit, event)
                if outcome is None:
                    return [unit, *(yield from self._rescue(running))]
                yield self._finished(unit, outcome)
        return []

    def _rescue(self, running: dict[Future[UnitReport], Unit]) -> Generator[Outcome, None, list[Unit]]:
        """Of the futures of a broken pool, which all end at once: what was done before; returns the other units."""
        lost = []
        for future, unit in running.items():
            outcome = self._outcome(unit, future)
            if outcome is None:
                lost.append(unit)
            else:
                yield self._finished(unit, outcome)
        return lost

    def _submit(self, executor: Executor, unit: Unit, running: dict[Future[UnitReport], Unit]) -> None:
        try:
            future = executor.submit(self.work, unit)
        except BrokenProcessPool as error:  # a worker died while nothing was waited for
            future = Future()
            future.set_exception(error)
        running[future] = unit
        future.add_done_callback(self._events.put)

    def _outcome(self, unit: Unit, future: Future[UnitReport]) -> Outcome | None:
        """None: a worker died under it, or under another unit of the same pool."""
        try:
            return future.result()
        except (BrokenProcessPool, CancelledError):
            return None
        except DamagedInputError as error:
            return Failure(unit, str(error))
        except Exception as error:
            if type(error).__name__ == "KilledWorker":  # Dask's: it has tried on several workers by itself
                return Failure(unit, _KILLED)
            raise

    def _alone(self, unit: Unit) -> Outcome:
        """Once more with nothing beside it, to tell the unit that kills its worker from those that merely lay near."""
        with self.place.open(workers=1) as executor:
            return self._outcome(unit, executor.submit(self.work, unit)) or Failure(unit, _KILLED)

    def _finished(self, unit: Unit, outcome: Outcome) -> Outcome:
        if unit.part is not None:
            self.done_with(unit)
            self._room.release()
        return outcome

    def _cut_up(self, unit: Unit) -> None:
        """Runs in a thread: parts to the events as they are cut, then how it ended."""
        parts = 0
        try:
            for part in self.cut(unit):
                parts += 1
                if self.skip(part):
                    self.done_with(part)
                    continue
                while not self._room.acquire(timeout=0.1):
                    if self._stopping.is_set():
                        return
                self._events.put(_Cut(part))
                if self._stopping.is_set():
                    return
            self._events.put(CutEnd(unit, parts))
        except UserError as error:
            self._events.put(Failure(unit, str(error)))
        except Exception as error:  # a full disk, say: raised where the others are
            self._events.put(error)


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
