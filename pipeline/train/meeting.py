"""Whether the ranks of a job are one job: the same code, settings and data, each on a device of its own.

In: what each rank sees of itself. Out: a table of who is here, or one error on all ranks that names who differs and in
what. Ranks that agree on nothing but their number would otherwise train a model of nothing, or wait for ever. It takes
no more than the store of the job, and comes before the process group, in which different versions might wait for ever.
That they share the folder of checkpoints is looked at by `store.py`.
"""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from rich.table import Table

from pipeline.config import Config, resolved
from pipeline.errors import UserError
from pipeline.train.processes.ending import tell
from pipeline.train.processes.job import Job
from pipeline.train.processes.launched import Launch
from pipeline.train.processes.pulse import PATIENCE
from pipeline.train.runtime import SteadyConsole, device_of, git_commit

NOTICE = 60.0  # seconds after which a rank that has not spoken is named
SHOWN = 8  # differences in a message


def meet(job: Job, config: Config, *, datasets: Sequence[str]) -> None:
    """Compare all ranks with rank 0, which prints a table; alone there is nothing to compare. `datasets`: digests.

    Errors, the same on all ranks: other settings, data, code or PyTorch; two ranks on one GPU. One that does not come
    is named after `NOTICE`, and by the pulse at the end of its patience.
    """
    if job.launch.world_size == 1:
        return
    job.pulse.beat("the data is open")
    facts = {
        "torch": torch.__version__,
        "code": git_commit() or "unknown",
        "data": ", ".join(datasets),
        **_flat(config),
    }
    own = device_of(config.train, job.launch)
    device = {"device": _device_name(own), "uuid": _uuid(own)}
    limit = 2 * PATIENCE * max(job.pulse.limit, 60 * config.train.hang_minutes)
    present = confer(job.store, job.launch, facts=facts, device=device, limit=limit)
    if job.launch.rank == 0:
        SteadyConsole(highlight=False, soft_wrap=True).print(table(present, facts))


def confer(
    store: dist.Store, launch: Launch, *, facts: Mapping[str, str], device: Mapping[str, str], limit: float
) -> list[dict[str, Any]]:
    """Compare `facts` over ranks; in rank 0 what each rank says of itself, else nothing. Errors: see `meet`.

    All but rank 0 say only where they differ from it, so that its work and its memory stay small.
    """
    own = {"host": launch.host, **device}
    if launch.rank > 0:
        reference = json.loads(_wait(store, "meeting/reference", limit, who="rank 0", quietly=True))
        differs = {key: [facts.get(key), value] for key, value in reference.items() if facts.get(key) != value}
        store.set(f"meeting/rank/{launch.rank}", json.dumps({**own, "differs": differs}))
        verdict = _wait(store, "meeting/verdict", limit + 10, who="rank 0", quietly=True).decode()
        if verdict:
            raise UserError(verdict)
        return []
    store.set("meeting/reference", json.dumps(dict(facts)))
    present: list[dict[str, Any]] = [{**own, "differs": {}}]
    until = time.monotonic() + limit
    try:
        for rank in range(1, launch.world_size):
            left = max(until - time.monotonic(), 0.0)
            present.append(json.loads(_wait(store, f"meeting/rank/{rank}", left, who=f"rank {rank}")))
        faults = [*differences(present), *shared_devices(present)]
        verdict = "\n  ".join(["the ranks of this job do not fit together:", *faults]) if faults else ""
    except UserError as error:
        verdict = str(error)
    store.set("meeting/verdict", verdict)
    if verdict:
        raise UserError(verdict)
    return present


def differences(present: Sequence[Mapping[str, Any]]) -> list[str]:
    """One line for each fact and each other value of it: which ranks have it, and what rank 0 has."""
    ranks: dict[tuple[str, str, str], list[int]] = {}
    for rank, one in enumerate(present):
        for key, (theirs, reference) in one["differs"].items():
            ranks.setdefault((key, str(theirs), str(reference)), []).append(rank)
    lines = [
        f"{key}: {_ranges(who)} on {_hosts(present, who)}: {theirs}; rank 0 on {present[0]['host']}: {reference}"
        for (key, theirs, reference), who in ranks.items()
    ]
    rest = [f"and {len(lines) - SHOWN} more"] if len(lines) > SHOWN else []
    return lines[:SHOWN] + rest


def shared_devices(present: Sequence[Mapping[str, Any]]) -> list[str]:
    """One line for each GPU that several ranks are on."""
    users: dict[tuple[str, str], list[int]] = {}
    for rank, one in enumerate(present):
        if one["uuid"]:
            users.setdefault((one["host"], one["uuid"]), []).append(rank)
    return [
        f"{_ranges(who)} share one GPU of {host} ({uuid}); start one process per GPU"
        for (host, uuid), who in users.items()
        if len(who) > 1
    ]


def table(present: Sequence[Mapping[str, Any]], facts: Mapping[str, str]) -> Table:
    """Who is here, a line per host, under what they have in common."""
    common = f"torch {facts['torch']}, code {facts['code'][:12]}, data {facts['data'][:16]}"
    shown = Table(title=f"{len(present)} ranks, alike in settings; {common}", title_justify="left")
    for column in ("host", "ranks", "devices"):
        shown.add_column(column)
    for host in dict.fromkeys(one["host"] for one in present):
        ranks = [rank for rank, one in enumerate(present) if one["host"] == host]
        devices = Counter(present[rank]["device"] for rank in ranks)
        shown.add_row(host, _numbers(ranks), ", ".join(f"{count} x {name}" for name, count in devices.items()))
    return shown


def _wait(store: dist.Store, key: str, limit: float, *, who: str, quietly: bool = False) -> bytes:
    """The value of a key as soon as it is there."""
    began, told = time.monotonic(), quietly
    while not store.check([key]):
        waited = time.monotonic() - began
        if waited > limit:
            raise UserError(f"{who} did not speak within {limit:.0f} s of the start; look at what it was doing")
        if waited > NOTICE and not told:
            told = True
            tell(f"{who} has not spoken within {waited:.0f} s: it may still be opening its data")
        time.sleep(0.05)
    return bytes(store.get(key))


def _flat(config: Config) -> dict[str, str]:
    flat: dict[str, str] = {}
    for section, keys in resolved(config).items():
        values = keys.items() if isinstance(keys, dict) else [("", keys)]
        flat.update({f"{section}.{key}".rstrip("."): json.dumps(value) for key, value in values})
    return flat


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def _uuid(device: torch.device) -> str:
    return str(torch.cuda.get_device_properties(device).uuid) if device.type == "cuda" else ""


def _numbers(ranks: Sequence[int]) -> str:
    """[0, 1, 2, 5] is 0-2, 5."""
    parts: list[list[int]] = []
    for rank in ranks:
        if parts and parts[-1][-1] == rank - 1:
            parts[-1].append(rank)
        else:
            parts.append([rank])
    return ", ".join(str(part[0]) if len(part) == 1 else f"{part[0]}-{part[-1]}" for part in parts)


def _ranges(ranks: Sequence[int]) -> str:
    return f"rank {ranks[0]}" if len(ranks) == 1 else f"ranks {_numbers(ranks)}"


def _hosts(present: Sequence[Mapping[str, Any]], ranks: Sequence[int]) -> str:
    return ", ".join(list(dict.fromkeys(present[rank]["host"] for rank in ranks))[:SHOWN])
