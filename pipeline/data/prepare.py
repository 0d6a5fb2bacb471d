"""A corpus to a complete dataset: plan, units, commit. Safe to kill at any moment, safe to run again.

In: a `Request`. Out: a folder whose `manifest.json` is written last. Files under final names are whole;
what the ledger records is kept by the next run of the same command, everything else is made again.
"""

from __future__ import annotations

import errno
import heapq
import os
import shlex
import shutil
import signal
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import ExitStack, contextmanager
from itertools import islice
from multiprocessing import get_context, parent_process
from pathlib import Path
from threading import Thread
from typing import Any

import xxhash
from rich.console import Console

from pipeline.data.corpus import Corpus, check_text_key, find_corpus, read_texts, read_unit
from pipeline.data.finish import manifest_of, no_documents, refuse_bad, refuse_empty_split, write_quarantine
from pipeline.data.formats import Rejected
from pipeline.data.ledger import Ledger, LedgerHeader
from pipeline.data.manifest import MANIFEST_NAME, TOKENIZER_NAME, Manifest, digest_of, write_manifest
from pipeline.data.plan import Unit, plan_units
from pipeline.data.progress import UnitProgress
from pipeline.data.request import Request, complete_manifest, refuse_foreign, sizes_agree
from pipeline.data.tokenizer import TextTokenizer, load_tokenizer, needs_corpus
from pipeline.data.unit import SplitRule, UnitReport, UnitSettings, prepare_unit
from pipeline.errors import StoppedEarly, UserError
from pipeline.files import fsync_folder
from pipeline.locks import locked

FEW_DOCUMENTS = 100
"""Below this, holding out whole documents by hash would leave the size of the validation split to chance."""
DEFAULT_FRACTION, DEFAULT_TAIL_FRACTION = 0.005, 0.1
TRAINING_SAMPLE_BYTES = 100 * 10**6


def prepare(request: Request, *, console: Console) -> Manifest:
    """Prepare the dataset, or finish what an earlier run of the same request began.

    Raises `UserError` for whatever the user can mend, `StoppedEarly` on Ctrl-C; committed units are kept.
    """
    request.check()
    corpus = find_corpus(request.inputs, exclude=request.exclude, output=request.output.resolve())
    for note in corpus.notes:
        console.print(f"note: {note}", markup=False)
    identity = request.identity(corpus)
    with _disk_errors(request.output), ExitStack() as stack:
        request.output.mkdir(parents=True, exist_ok=True)
        stack.enter_context(locked(request.output, ask_of_other_hosts=True))
        refuse_foreign(request.output, identity)
        complete = complete_manifest(request.output, corpus)
        if complete:
            console.print(f"already complete: {request.output}", markup=False)
            return complete
        return _build(request, corpus, identity, console)


def _build(request: Request, corpus: Corpus, identity: dict[str, Any], console: Console) -> Manifest:
    """Plan, tokenizer, units, verdict, manifest."""
    output, ledger = request.output, Ledger(request.output)
    check_text_key(corpus.sources, request.rules.key)
    units = plan_units(corpus.sources, request.rules)
    split = _split_rule(request, corpus, units, console)
    header, reports = ledger.read()
    inputs_digest = digest_of([[source.name, source.fingerprint] for source in corpus.sources])
    tokenizer = _tokenizer(request, units, header if header and header.inputs_digest == inputs_digest else None)
    settings = UnitSettings(
        output=output,
        rules=request.rules,
        split=split,
        tokenizer_fingerprint=tokenizer.fingerprint,
        vocab_size=tokenizer.vocab_size,
        eos_id=tokenizer.eos_id,
    )
    kept = _keep(output, reports, units, settings, console)
    header = LedgerHeader(settings=identity, inputs_digest=inputs_digest, tokenizer_fingerprint=tokenizer.fingerprint)
    (output / MANIFEST_NAME).unlink(missing_ok=True)  # inputs changed: what it vouches for is about to
    ledger.write(header, kept.values())
    tokenizer.save(output / TOKENIZER_NAME)
    fsync_folder(output)
    done = _run(units, settings, kept=kept, workers=request.workers, ledger=ledger, console=console)
    ordered = [done[unit.number] for unit in units]
    ledger.write(header, ordered)  # in order, whatever order they were finished in
    refuse_bad(ordered, corpus, max_bad=request.max_bad)
    refuse_empty_split(ordered, settings)
    write_quarantine(output, ordered, corpus)
    manifest = manifest_of(ordered, settings, corpus, identity=identity)
    write_manifest(output, manifest)
    return manifest


def _split_rule(request: Request, corpus: Corpus, units: Sequence[Unit], console: Console) -> SplitRule:
    """Whole documents by hash, or the tail of each when there are too few to choose among."""
    few = sum(1 for _ in islice(read_texts(units, request.rules), FEW_DOCUMENTS))
    if not few:
        records = (record for unit in units for record in read_unit(unit, request.rules))
        raise no_documents([record for record in records if isinstance(record, Rejected)], corpus)
    if request.val_fraction == 0:
        return SplitRule("none", 0.0, request.seed)
    if few >= FEW_DOCUMENTS:
        return SplitRule("hash", request.val_fraction or DEFAULT_FRACTION, request.seed)
    rule = SplitRule("tail", request.val_fraction or DEFAULT_TAIL_FRACTION, request.seed)
    console.print(f"note: fewer than {FEW_DOCUMENTS} documents ({few}): {rule.describe()}", markup=False)
    return rule


def _tokenizer(request: Request, units: Sequence[Unit], header: LedgerHeader | None) -> TextTokenizer:
    """The tokenizer asked for; the one of an earlier run, where `header` vouches for it, is not made twice."""
    path = request.output / TOKENIZER_NAME
    if header and path.exists():
        saved = TextTokenizer.from_file(path, eos=request.eos)
        if saved.fingerprint == header.tokenizer_fingerprint:
            return saved
    texts: Iterable[str] = ()
    if needs_corpus(request.tokenizer):
        texts = read_texts(units, request.rules)
        texts = texts if request.tokenizer == "chars" else training_sample(texts, TRAINING_SAMPLE_BYTES)
    return load_tokenizer(request.tokenizer, texts=texts, eos=request.eos)


def training_sample(texts: Iterable[str], limit: int) -> list[str]:
    """The texts of lowest hash, up to `limit` bytes, in order of hash: the same for any order of `texts`."""
    heap: list[tuple[int, str]] = []
    total = 0
    for text in texts:
        content = text.encode()
        heapq.heappush(heap, (-xxhash.xxh3_64_intdigest(content), text))
        total += len(content)
        while total > limit and len(heap) > 1:
            total -= len(heapq.heappop(heap)[1].encode())
    return [text for _, text in sorted(heap, reverse=True)]


def _keep(
    output: Path, reports: list[UnitReport], units: Sequence[Unit], settings: UnitSettings, console: Console
) -> dict[int, UnitReport]:
    """Reports of earlier runs that still hold; files of those that do not are removed."""
    keys = {unit.number: settings.key(unit) for unit in units}
    kept: dict[int, UnitReport] = {}
    stale: set[str] = set()
    for report in reports:
        sizes = {name: info.size for shard in report.shards.values() for name, info in shard.files.items()}
        if keys.get(report.unit) == report.key and sizes_agree(output, sizes):
            kept[report.unit] = report
        else:
            stale.update(report.files())
    for name in stale.difference(name for report in kept.values() for name in report.files()):
        (output / name).unlink(missing_ok=True)
    if reports:
        redone = len({report.unit for report in reports} - kept.keys())
        changed = f", {redone} made again because input or files changed" if redone else ""
        console.print(f"going on: {len(kept)} of {len(units)} units are done{changed}", markup=False)
    return kept


def _run(
    units: Sequence[Unit],
    settings: UnitSettings,
    *,
    kept: dict[int, UnitReport],
    workers: int,
    ledger: Ledger,
    console: Console,
) -> dict[int, UnitReport]:
    """Do the units that are not kept and record each in the ledger once its shards are durable."""
    done = dict(kept)
    todo = [unit for unit in units if unit.number not in kept]
    try:
        with UnitProgress(console, units, done) as progress:
            for report in _reports(todo, settings, workers=workers, on_batch=progress.on_batch):
                ledger.append(report)
                done[report.unit] = report
                progress.on_unit(report)
    except KeyboardInterrupt:
        command = shlex.join(["python", *sys.argv])
        raise StoppedEarly(f"stopped: {len(done)} of {len(units)} units are done; go on with: {command}") from None
    except BrokenProcessPool:
        raise UserError(
            f"a worker process was killed, perhaps for lack of memory; {len(done)} of {len(units)} units are done: "
            "run the same command with fewer --workers to go on"
        ) from None
    return done


def _reports(
    units: Sequence[Unit], settings: UnitSettings, *, workers: int, on_batch: Callable[[int, int], None]
) -> Iterator[UnitReport]:
    """Reports in the order of completion. One worker is this process."""
    if workers == 1 or len(units) < 2:
        for unit in units:
            yield prepare_unit(unit, settings, on_batch=on_batch)
        return
    pool = ProcessPoolExecutor(workers, mp_context=get_context("spawn"), initializer=_begin_worker)
    try:
        for future in as_completed([pool.submit(prepare_unit, unit, settings) for unit in units]):
            yield future.result()
    finally:
        pool.shutdown(cancel_futures=True)


def _begin_worker() -> None:
    """Set up a worker: one native thread, for the processes are the parallelism; it dies with its parent or Ctrl-C."""
    os.environ["RAYON_NUM_THREADS"] = "1"
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    Thread(target=_die_with_parent, daemon=True).start()


def _die_with_parent() -> None:
    """An orphan that went on writing would meet the next run in the same files."""
    parent = parent_process()
    assert parent is not None, "only workers have a parent"
    parent.join()
    os._exit(1)


@contextmanager
def _disk_errors(output: Path) -> Iterator[None]:
    """Turn what the file system refuses into a message; temporaries are gone by then, committed units stay."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            free = shutil.disk_usage(output).free
            raise UserError(
                f"the disk of {output} is full ({free:,} bytes free); finished units are kept: "
                "make room and run the same command again"
            ) from None
        if isinstance(error, PermissionError | FileExistsError | NotADirectoryError) or error.errno == errno.EROFS:
            raise UserError(f"cannot write to {output}: {error}; choose another --output") from None
        raise
