"""Processes that find each other, and end together: each scenario is a job of its own, without a model."""

from __future__ import annotations

import errno
import os
import signal
import socket
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

from pipeline.errors import StoppedEarly, UserError
from pipeline.train.processes import ending as ending_module
from pipeline.train.processes import pulse as pulse_module
from pipeline.train.processes import roll as roll_module
from pipeline.train.processes.ending import Ending
from pipeline.train.processes.job import Job, _end_together, run_job
from pipeline.train.processes.launched import Launch
from pipeline.train.processes.pulse import Pulse, is_consequence
from tests.support import FORKS, _print_into

pytestmark = pytest.mark.slow

Main = Callable[[Job], None]
LIMIT = 2.0  # seconds without progress


@dataclass
class Ended:
    """Exit code of each rank, what each printed, and the seconds until the last had ended."""

    codes: list[int]
    printed: list[str]
    seconds: float

    @property
    def joined(self) -> str:
        return "".join(self.printed)


def play(main: Main, tmp_path: Path, *, ranks: int, missing: tuple[int, ...] = (), **environment: str) -> Ended:
    """Run `main` as that many ranks, each as if on a host of its own; rank 0 serves the store."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    began, processes = time.monotonic(), {}
    for rank in range(ranks):
        if rank not in missing:
            found = {"RANK": rank, "WORLD_SIZE": ranks, "LOCAL_RANK": 0, "LOCAL_WORLD_SIZE": 1}
            if ranks == 1:
                found = {}
            names = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, **found, **environment}
            told = {name: str(value) for name, value in names.items()}
            output = tmp_path / f"{rank}.txt"
            processes[rank] = FORKS.Process(target=_rank, args=(main, rank, told, str(output)))
            processes[rank].start()
    for process in processes.values():
        process.join(60)
    seconds = time.monotonic() - began
    codes = [process.exitcode for process in processes.values()]
    for process in processes.values():
        process.kill()
    return Ended(codes, [(tmp_path / f"{rank}.txt").read_text() for rank in processes], seconds)


def _rank(main: Main, rank: int, environment: dict[str, str], output: str) -> None:
    _print_into(output)
    os.environ.update(environment)
    socket.gethostname = lambda: f"host{rank}"
    run_job(main)


def together(job: Job, *, limit: float = 20.0) -> None:
    """Meet, and go on until all have."""
    job.pulse.limit = LIMIT
    if job.launch.world_size > 1:
        job.assemble(limit=limit)
        everybody(job, "met")
    job.steady()


def everybody(job: Job, what: str) -> None:
    job.store.set(f"{what}/{job.launch.rank}", "")
    job.store.wait([f"{what}/{rank}" for rank in range(job.launch.world_size)])


def waits(job: Job) -> None:
    """As in a collective operation whose other members do not come."""
    job.pulse.beat("waiting")
    job.store.get("never")


def parts(job: Job) -> None:
    together(job)
    time.sleep(1.0 if job.launch.rank == 1 else 0)


def test_all_part_in_any_order(tmp_path: Path) -> None:
    ended = play(parts, tmp_path, ranks=3)
    assert ended.codes == [0, 0, 0], ended.joined
    assert ended.joined == ""


def fails(job: Job) -> None:
    together(job)
    if job.launch.rank == 1:
        raise ValueError("the root cause")
    waits(job)


def test_an_exception_is_told_once_and_ends_all(tmp_path: Path) -> None:
    ended = play(fails, tmp_path, ranks=3)
    assert ended.codes == [124, 1, 124]
    assert ended.joined.count("Traceback") == 1
    assert "rank 1 on host1 failed:\nTraceback" in ended.printed[1]
    for rank in (0, 2):
        why = f"rank {rank} on host{rank} ends because rank 1 on host1 failed: ValueError: the root cause\n"
        assert ended.printed[rank] == why


def root_fails(job: Job) -> None:
    together(job)
    if job.launch.rank == 0:
        raise ValueError("the root cause")
    waits(job)


def test_rank_0_tells_the_others_before_its_store_is_gone(tmp_path: Path) -> None:
    ended = play(root_fails, tmp_path, ranks=3)
    assert ended.codes == [1, 124, 124]
    for printed in ended.printed[1:]:
        assert "because rank 0 on host0 failed: ValueError: the root cause\n" in printed


def consequence_first(job: Job) -> None:
    together(job)
    if job.launch.rank == 0:
        raise RuntimeError("[gloo/transport/tcp/pair.cc:534] Connection closed by peer [127.0.0.1]:1")
    if job.launch.rank == 1:
        time.sleep(1.0)
        raise ValueError("the root cause")
    waits(job)


def test_what_only_follows_from_another_ranks_end_waits_for_its_account(tmp_path: Path) -> None:
    ended = play(consequence_first, tmp_path, ranks=3)
    assert ended.codes == [124, 1, 124]
    assert ended.joined.count("Traceback") == 1
    assert "Connection closed" not in ended.joined


def consequence_alone(job: Job) -> None:
    together(job)
    if job.launch.rank == 0:
        raise RuntimeError("NCCL error: unhandled system error")
    waits(job)


def test_a_consequence_without_a_cause_is_told_itself(tmp_path: Path) -> None:
    ended = play(consequence_alone, tmp_path, ranks=2)
    assert ended.codes == [1, 124]
    assert ended.joined.count("Traceback") == 1
    assert "NCCL error" in ended.printed[0]


def alike(job: Job) -> None:
    together(job)
    raise UserError("nothing fits")


def test_a_mistake_that_all_ranks_find_is_told_once(tmp_path: Path) -> None:
    ended = play(alike, tmp_path, ranks=3)
    assert ended.codes == [2, 2, 2]
    assert ended.joined == "error: nothing fits\n"


def not_found_yet(job: Job) -> None:
    raise UserError("no such file")


def test_a_mistake_before_ranks_have_met_is_told_by_each_host(tmp_path: Path) -> None:
    ended = play(not_found_yet, tmp_path, ranks=2)
    assert ended.codes == [2, 2]
    assert ended.printed == ["error: no such file\n"] * 2
    ended = play(not_found_yet, tmp_path, ranks=2, LOCAL_RANK="1", LOCAL_WORLD_SIZE="2")
    assert ended.seconds > 3, "the others of a host wait for its first rank, which torchrun's reaction follows"


def killed(job: Job) -> None:
    together(job)
    if job.launch.rank == int(os.environ["VICTIM"]):
        os.kill(os.getpid(), signal.SIGKILL)
    waits(job)


@pytest.mark.parametrize("victim", [0, 2])
def test_a_killed_rank_is_noticed_by_all(victim: int, tmp_path: Path) -> None:
    ended = play(killed, tmp_path, ranks=3, VICTIM=str(victim))
    assert sorted(ended.codes) == [-signal.SIGKILL, 124, 124]
    assert ended.seconds < 20
    assert "Traceback" not in ended.joined
    why = f"ends because rank {victim} on host{victim} failed: it is gone without a word: killed from outside"
    if victim == 2:
        assert ended.joined.count("error: rank 2 on host2: it is gone without a word") == 1
        assert ended.printed[1].startswith(f"rank 1 on host1 {why}")
    else:  # rank 0 serves the store, so without it nobody can agree on who speaks: each says the same
        assert f"rank 1 on host1 {why}" in ended.printed[1]
        assert f"rank 2 on host2 {why}" in ended.printed[2]


def late(job: Job) -> None:
    together(job)
    job.pulse.stacks = Path(os.environ["STACKS"])
    for step in (1, 2, 3):
        job.pulse.beat(f"step {step}, data")
        if job.launch.rank == 1 and step == 2:
            dozing()
        job.pulse.beat(f"step {step}, forward")
        everybody(job, f"step {step}")


def dozing() -> None:
    time.sleep(100)


def test_the_late_rank_is_named_with_its_stack(tmp_path: Path) -> None:
    ended = play(late, tmp_path, ranks=3, STACKS=str(tmp_path / "stacks"))
    assert ended.codes == [124, 124, 124]
    assert LIMIT < ended.seconds < 20
    assert ended.joined.count("error: no progress for") == 1
    assert "late: 1\n    rank 1 on host1: step 2, data, in dozing (test_pulse.py:" in ended.joined
    assert "rank 0: step 2, forward, in " in ended.joined
    assert "rank 1 on host1 is in:\n" in ended.printed[1]
    assert "in dozing\n    time.sleep(100)" in ended.printed[1]
    assert "is in:" not in ended.printed[0] + ended.printed[2]
    files = sorted((tmp_path / "stacks").iterdir())
    assert [file.name for file in files] == ["rank-0.txt", "rank-1.txt", "rank-2.txt"]
    assert "in dozing" in files[1].read_text()
    assert "in everybody" in files[0].read_text()


def hangs_alone(job: Job) -> None:
    together(job)
    job.pulse.beat("step 7, forward")
    dozing()


def test_one_process_has_a_limit_too(tmp_path: Path) -> None:
    ended = play(hangs_alone, tmp_path, ranks=1)
    assert ended.codes == [124]
    assert "since: step 7, forward, in dozing" in ended.joined


def hurries_not(job: Job) -> None:
    together(job)
    with job.pulse.unhurried("saving"):
        time.sleep(2 * LIMIT)
    job.pulse.beat("step 2")
    time.sleep(LIMIT / 2)


def test_saving_may_take_longer(tmp_path: Path) -> None:
    ended = play(hurries_not, tmp_path, ranks=1)
    assert ended.codes == [0], ended.joined


def starts_slowly(job: Job) -> None:
    job.pulse.limit = LIMIT
    time.sleep(2 * LIMIT)


def test_start_up_may_take_longer(tmp_path: Path) -> None:
    assert play(starts_slowly, tmp_path, ranks=1).codes == [0]


def is_halted(job: Job) -> None:
    together(job)
    job.pulse.beat("step 1")
    if os.fork() == 0:
        time.sleep(3 * LIMIT)
        os.kill(os.getppid(), signal.SIGCONT)
        os._exit(0)
    os.kill(os.getpid(), signal.SIGSTOP)
    job.pulse.beat("step 2")


def test_a_process_that_was_halted_has_not_been_hanging(tmp_path: Path) -> None:
    ended = play(is_halted, tmp_path, ranks=1)
    assert (ended.codes, ended.joined) == ([0], "")
    assert ended.seconds > 3 * LIMIT


def stops_early(job: Job) -> None:
    together(job)
    raise StoppedEarly("stopped after step 3")


@pytest.mark.parametrize(("environment", "code"), [({}, 75), ({"TORCHELASTIC_RUN_ID": "x"}, 0)])
@pytest.mark.parametrize("ranks", [1, 2])
def test_a_stop_is_told_once_and_has_its_code(
    environment: dict[str, str], code: int, ranks: int, tmp_path: Path
) -> None:
    ended = play(stops_early, tmp_path, ranks=ranks, **environment)
    assert ended.codes == [code] * ranks
    assert ended.joined == "stopped after step 3\n"


def is_asked_to_stop(job: Job) -> None:
    job.pulse.limit = LIMIT
    if job.launch.world_size > 1:
        job.assemble(limit=20)
        everybody(job, "met")
    if job.launch.rank == job.launch.world_size - 1:
        os.kill(os.getpid(), signal.SIGTERM)
    dozing()


@pytest.mark.parametrize(("environment", "code"), [({}, 75), ({"TORCHELASTIC_RUN_ID": "x"}, 0)])
@pytest.mark.parametrize("ranks", [1, 2])
def test_a_signal_during_start_up_ends_all_at_once(
    environment: dict[str, str], code: int, ranks: int, tmp_path: Path
) -> None:
    ended = play(is_asked_to_stop, tmp_path, ranks=ranks, **environment)
    assert ended.codes == [code] * ranks, ended.joined
    assert ended.joined.count("stopped by SIGTERM before the first step was done, so nothing was lost") == 1
    assert ended.joined.count("\n") == 1


def echoed(job: Job) -> None:
    """A step longer than what is taken for an echo, in which a signal comes twice, as from srun and from torchrun."""
    together(job)
    job.pulse.limit = 60
    if job.launch.rank == 0:
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(0.2)
        os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(2.5)
    everybody(job, "step")
    if job.launch.rank == 0:
        assert job.stop(), "the signal was forgotten"
    raise StoppedEarly("saved")


def test_an_echo_is_no_second_signal(tmp_path: Path) -> None:
    ended = play(echoed, tmp_path, ranks=2)
    assert ended.codes == [75, 75], ended.joined
    assert ended.printed[0] == ("SIGTERM: stopping after this step; a second signal ends the process at once\nsaved\n")


def insists(job: Job) -> None:
    together(job)
    job.pulse.on_end = lambda code, text: print(code, text, flush=True)
    for _ in range(2):
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(1.2)


def test_a_second_signal_is_recorded(tmp_path: Path) -> None:
    ended = play(insists, tmp_path, ranks=1)
    assert ended.codes == [143]
    assert "143 SIGTERM for the second time: ending at once\n" in ended.joined


def without_a_reader() -> None:
    """stderr is a pipe to a `tee` that has died."""
    reader, writer = os.pipe()
    os.dup2(writer, 2)
    os.close(writer)
    os.close(reader)


def is_unheard(job: Job) -> None:
    together(job)
    if job.launch.rank == 0:
        without_a_reader()
    if job.launch.world_size > 1:
        everybody(job, "step")
        if job.launch.rank == 1:
            raise ValueError("the root cause")
        waits(job)
    dozing()


def test_a_dead_stderr_disables_no_watch(tmp_path: Path) -> None:
    ended = play(is_unheard, tmp_path, ranks=1)
    assert ended.codes == [124]
    ended = play(is_unheard, tmp_path, ranks=2)
    assert ended.codes == [124, 1], ended.joined
    assert ended.seconds < 20


def stops_unheard(job: Job) -> None:
    without_a_reader()
    raise StoppedEarly("saved")


def test_a_dead_stderr_changes_no_exit_code(tmp_path: Path) -> None:
    assert play(stops_unheard, tmp_path, ranks=1).codes == [75]


def has_a_broken_watch(job: Job) -> None:
    job.pulse._watch_self = lambda elapsed: 1 / 0  # type: ignore[assignment, method-assign, return-value]
    dozing()


def test_a_watch_that_fails_ends_the_process(tmp_path: Path) -> None:
    ended = play(has_a_broken_watch, tmp_path, ranks=1)
    assert ended.codes == [124]
    assert "this process ends because its watch failed:\nTraceback" in ended.joined


def hangs_in_a_stalled_folder(job: Job) -> None:
    ending_module.WRITING = pulse_module.WRITING = 1.0
    together(job)
    job.pulse.stacks = Path(os.environ["STACKS"])
    job.pulse.on_end = lambda code, text: dozing()
    if job.launch.rank == 1:
        dozing()
    waits(job)


def test_a_stalled_file_system_holds_up_no_watch(tmp_path: Path) -> None:
    (tmp_path / "stacks").mkdir()
    for rank in (0, 1):
        os.mkfifo(tmp_path / "stacks" / f"rank-{rank}.txt")  # to open one that nobody reads takes for ever
    ended = play(hangs_in_a_stalled_folder, tmp_path, ranks=2, STACKS=str(tmp_path / "stacks"))
    assert ended.codes == [124, 124], ended.joined
    assert ended.seconds < 25
    assert ended.joined.count("error: no progress for") == 1
    assert "in dozing\n    time.sleep(100)" in ended.printed[1]


def is_halted_with_the_store(job: Job) -> None:
    pulse_module.SILENCE = 3.0
    together(job)
    job.pulse.limit = 60
    everybody(job, "step")
    if job.launch.rank == 0:
        if os.fork() == 0:
            time.sleep(15)
            os.kill(os.getppid(), signal.SIGKILL)
            os._exit(0)
        os.kill(os.getpid(), signal.SIGSTOP)
    ended = time.monotonic() + 30
    while time.monotonic() < ended:
        job.pulse.beat("busy")
        time.sleep(0.1)


def test_a_store_that_does_not_answer_ends_those_who_ask_it(tmp_path: Path) -> None:
    """Its host is halted or without power: no connection ends, and a read from the store would wait for ever."""
    began = time.monotonic()
    ended = play(is_halted_with_the_store, tmp_path, ranks=2)
    assert ended.codes == [-signal.SIGKILL, 124], ended.joined
    assert "rank 1 on host1 ends because the store of the job at 127.0.0.1:" in ended.printed[1]
    assert "has not answered for" in ended.printed[1]
    assert time.monotonic() - began < 30


def ends_in_the_roll(job: Job) -> None:
    """Rank 1 ends when it has answered, while rank 2 is still to come; `HOW`: a signal's name, or an error."""
    if job.launch.rank == 2:
        time.sleep(3)
    if job.launch.rank == 1:
        number = getattr(signal, os.environ["HOW"])
        threading.Timer(1.0, os.kill, (os.getpid(), number)).start()
    together(job)


@pytest.mark.parametrize(("how", "codes"), [("SIGKILL", [124, -9, 124]), ("SIGTERM", [75, 75, 75])])
def test_one_that_ends_before_all_have_met_ends_all(how: str, codes: list[int], tmp_path: Path) -> None:
    ended = play(ends_in_the_roll, tmp_path, ranks=3, HOW=how)
    assert ended.codes == codes, ended.joined
    assert ended.seconds < 15
    for rank in (0, 2):
        told = f"rank {rank} on host{rank} ends because rank 1 on host1 failed: it is gone without a word"
        assert (told in ended.printed[rank]) == (how == "SIGKILL")
    assert "Traceback" not in ended.joined


def root_ends_in_the_roll(job: Job) -> None:
    if job.launch.rank == 0:
        threading.Timer(1.0, os.kill, (os.getpid(), getattr(signal, os.environ["HOW"]))).start()
    together(job)


@pytest.mark.parametrize(("how", "code"), [("SIGKILL", 124), ("SIGTERM", 75)])
def test_rank_0_that_ends_before_all_have_met_ends_all(how: str, code: int, tmp_path: Path) -> None:
    ended = play(root_ends_in_the_roll, tmp_path, ranks=3, missing=(2,), HOW=how)
    assert ended.codes[1] == code, ended.joined
    assert ended.seconds < 15
    assert "Traceback" not in ended.joined


def comes(job: Job) -> None:
    roll_module.NOTICE = 1.0
    together(job, limit=3.0)


def test_a_rank_that_does_not_come_is_named(tmp_path: Path) -> None:
    ended = play(comes, tmp_path, ranks=4, missing=(2,))
    assert ended.codes == [2, 2, 2]
    assert "1 of 4 ranks have not come within 1 s: 2; look at what the launcher says" in ended.printed[0]
    assert "error: 1 of 4 ranks have not come within 3 s: 2;" in ended.printed[0]


def test_rank_0_that_does_not_come_is_named(tmp_path: Path) -> None:
    ended = play(comes, tmp_path, ranks=2, missing=(0,))
    assert ended.codes == [2]
    assert "rank 1 waits for rank 0 at 127.0.0.1:" in ended.joined
    assert "error: rank 0 was not found at 127.0.0.1:" in ended.joined


def one_of_two_starts(job: Job) -> None:
    """Meet; then rank 0 says which start the others are of."""
    together(job)
    job.store.set(f"start/{job.launch.rank}", os.environ["START"])
    starts = {job.store.get(f"start/{rank}").decode() for rank in range(job.launch.world_size)}
    assert starts == {os.environ["START"]}, starts
    assert job.store.num_keys() > 0
    if os.environ["START"] == "1":
        os._exit(1)  # without a word to anybody


def test_a_store_that_outlives_a_start_does_not_confuse_the_next(tmp_path: Path) -> None:
    server = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    elastic = {"TORCHELASTIC_USE_AGENT_STORE": "True", "MASTER_PORT": str(server.port)}
    assert play(one_of_two_starts, tmp_path, ranks=3, START="1", **elastic).codes == [1, 1, 1]
    ended = play(one_of_two_starts, tmp_path, ranks=3, START="2", **elastic)
    assert ended.codes == [0, 0, 0], ended.joined


def store_goes(job: Job) -> None:
    together(job)
    job.pulse.limit = 60
    waits(job)


def test_without_its_store_the_job_ends(tmp_path: Path) -> None:
    server: Any = FORKS.Process(target=_serve, args=(str(tmp_path / "port"),))
    server.start()
    while not (tmp_path / "port").exists():
        time.sleep(0.05)
    port = (tmp_path / "port").read_text()
    ended = play(store_goes, tmp_path, ranks=2, TORCHELASTIC_USE_AGENT_STORE="True", MASTER_PORT=port)
    server.join(10)
    assert ended.codes == [124, 124]
    assert ended.seconds < 20
    for rank in (0, 1):
        assert f"rank {rank} on host{rank} ends because what served the store of the job" in ended.printed[rank]


def waits_for_torchruns_store(job: Job) -> None:
    roll_module.AGENT = 3.0
    together(job)


def test_a_store_of_torchrun_that_is_gone_is_not_waited_for(tmp_path: Path) -> None:
    """It is there before any rank is; a rank that finds nobody at its port has come too late."""
    assert roll_module.AGENT < 20, "all have to be gone within 30 s"
    ended = play(waits_for_torchruns_store, tmp_path, ranks=2, TORCHELASTIC_USE_AGENT_STORE="True")
    assert ended.codes == [124, 124], ended.joined
    assert ended.seconds < 15
    assert ended.printed[1].startswith("rank 1 on host1 ends because what served the store of the job at 127.0.0.1:")


def _serve(port_file: str) -> None:
    server = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    temporary = Path(port_file + ".tmp")
    temporary.write_text(str(server.port))
    temporary.rename(port_file)
    time.sleep(4)
    os._exit(0)


def test_an_ending_survives_its_journey() -> None:
    ending = Ending(3, "h", "why\nthat", 1, 2, late=(1, 2))
    assert Ending.read(ending.written().encode()) == ending
    assert [Ending(0, "", "", 0, code).asked_for for code in (0, 75, 1, 2, 124)] == [True, True, False, False, False]


def raised_from(error: Exception, cause: Exception) -> Exception:
    error.__cause__ = cause
    return error


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (RuntimeError("[../gloo/transport/tcp/pair.cc:534] Connection closed by peer"), True),
        (dist.DistBackendError("x"), True),
        (ConnectionResetError(104, "Connection reset by peer"), True),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), False),
        (UserError("gloo"), False),
        (ValueError("NCCL"), False),
        (raised_from(RuntimeError("not saved"), raised_from(OSError("x"), dist.DistBackendError("y"))), True),
        (raised_from(UserError("no such host"), ConnectionRefusedError(111, "Connection refused")), False),
        (raised_from(RuntimeError("not saved"), OSError("no space")), False),
    ],
)
def test_consequences_are_told_from_causes(error: BaseException, expected: bool) -> None:
    assert is_consequence(error) == expected


def full(code: int, text: str) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


def test_the_end_is_recorded_by_rank_0_with_the_code_of_the_cause(capsys: pytest.CaptureFixture[str]) -> None:
    heard: list[tuple[int, str]] = []
    for rank in (0, 1):
        pulse = Pulse(Launch(rank=rank, world_size=2))
        pulse.on_end = lambda code, text: heard.append((code, text))
        pulse.notify(2, "x")
        pulse.notify(0, "stopped under torchrun")
        pulse.on_end = full
        pulse.notify(2, "ends all the same")
    assert heard == [(2, "x"), (75, "stopped under torchrun")]
    assert "how the run ended was not recorded: OSError(28, 'No space left on device')" in capsys.readouterr().err


def test_an_error_that_follows_a_told_hang_is_no_cause_of_its_own(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The watch of this rank found the hang; another rank then ended, and broke the exchange that this one was in."""
    hang = Ending(0, "here", "no progress for 4 s", 0, late=(0, 1))
    job = Job(Launch(rank=0, world_size=2, host="here"), watched=False)
    followed: list[Ending] = []

    class Left(BaseException):
        """Instead of the end of this process."""

    def follow(cause: Ending) -> None:
        followed.append(cause)
        raise Left

    monkeypatch.setattr(job.pulse, "ends", lambda *, wait: True)
    monkeypatch.setattr(job.pulse, "fail", lambda *_, **__: hang)
    monkeypatch.setattr(job.pulse, "follow", follow)
    monkeypatch.setattr(job.pulse, "leave", lambda *_: pytest.fail("it told another cause"))
    monkeypatch.setattr("pipeline.train.processes.job.pulse_of_job.CONSEQUENCE", 0.0)
    with pytest.raises(Left):
        _end_together(job, RuntimeError("gloo: connection closed by peer"))
    assert followed == [hang]
    assert "Traceback" not in capsys.readouterr().err
