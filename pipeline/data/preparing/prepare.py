"""A corpus to a complete dataset: plan, units, commit. Safe to kill at any moment, safe to run again.

In: a `Request`. Out: a folder whose `manifest.json` is written last. Files under final names are whole;
what a ledger records is kept by the next run of the same command, everything else is made again.
"""

from __future__ import annotations

import re
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console

from pipeline.data.manifest import (
    MANIFEST_NAME,
    TOKENIZER_NAME,
    FailedUnit,
    Manifest,
    read_manifest,
    write_manifest,
)
from pipeline.data.preparing.decide import (
    corpus_of,
    describe_tokenizer,
    encoder_for,
    is_worth_proof,
    make_tokenizer,
    split_rule,
)
from pipeline.data.preparing.endings import FULL, disk_errors, disk_full, stopped
from pipeline.data.preparing.estimate import raw_size
from pipeline.data.preparing.executors import Failure, Place, UnitRun, open_place
from pipeline.data.preparing.finish import (
    Beginning,
    done_without,
    empty_inputs,
    manifest_of,
    no_documents,
    refuse_empty_split,
    too_many_bad,
    write_quarantine,
)
from pipeline.data.preparing.holding import held
from pipeline.data.preparing.ledger import Ledger, headers, ledgers, unrecorded
from pipeline.data.preparing.progress import UnitProgress
from pipeline.data.preparing.request import (
    Request,
    complete_manifest,
    header_of,
    input_changes,
    refuse_foreign,
    sizes_agree,
)
from pipeline.data.preparing.survey import disk_needed, holds_validation, refuse_small_disk, survey
from pipeline.data.preparing.unit import (
    UnitReport,
    UnitSettings,
    begin_worker,
    begun_by,
    keep_encoder,
    load_encoder,
    prepare_unit,
    report_path,
)
from pipeline.data.reading.corpus import Corpus, changed_since
from pipeline.data.reading.plan import Unit, plan_units
from pipeline.data.tokenizer import TextTokenizer
from pipeline.errors import Unfinished, UserError, counted, printable
from pipeline.files import expanded, fsync_folder

EARLY_VERDICT_RECORDS = 10_000
"""Records after which a corpus may be found too bad before its end."""


def prepare(request: Request, *, console: Console) -> Manifest | None:
    """Prepare the dataset, or finish what an earlier run of the same request began. None: a share of it is done.

    Raises `UserError` for whatever the user can mend, `Unfinished` when units failed, `StoppedEarly` on Ctrl-C;
    committed units are kept.
    """
    with disk_errors(request.output):
        corpus, identity = corpus_of(request, console)
        with held(request.output, share=request.share):
            refuse_foreign(request.output, identity, corpus)
            complete = complete_manifest(request.output, corpus)
            if complete:
                console.print(f"already complete: {request.output}", markup=False)
                return complete
            for change in input_changes(request.output, corpus):
                console.print(printable(f"inputs {change}"), markup=False)
            try:
                place = open_place(request.executor, request.workers)
                with place.begun():
                    return _Preparation(request, corpus, identity, place, console).run()
            except KeyboardInterrupt:
                raise stopped("units that are done are kept") from None


class _Preparation:
    """One preparation: what is to be made of which units, and what of it is there."""

    def __init__(
        self, request: Request, corpus: Corpus, identity: dict[str, Any], place: Place, console: Console
    ) -> None:
        self.request, self.corpus, self.identity, self.place, self.console = request, corpus, identity, place, console
        self.output = request.output
        self.ledger = Ledger(self.output, share=request.share)
        self.units = plan_units(corpus.sources, request.rules)
        place.warm(begin_worker, workers=len(self.units))
        seen = survey(self.units, request.rules)
        given = any(source.held_out for source in corpus.sources)
        if not (seen.documents or seen.damaged):
            raise empty_inputs("train", kept=False) if given else no_documents(seen.drops, seen.examples, corpus)
        if given and not holds_validation(self.units, request.rules):
            raise empty_inputs("val", kept=False)
        rule = split_rule(request, seen, corpus, console)
        tokenizer = self._tokenizer()
        describe_tokenizer(tokenizer, console)
        if request.backend != "tokenizers" and is_worth_proof(request, self.units):
            known = (tokenizer.definition_json, tokenizer.eos_id, tokenizer.fingerprint, place.workers)
            place.warm(load_encoder, *known, workers=len(self.units))  # while it is proven here
        encoder, reason = encoder_for(request, tokenizer, seen, self.units)
        if encoder.backend == "tokenizers" and reason:
            console.print(f"note: encoding with `tokenizers`: {reason}", markup=False)
        self.settings = UnitSettings(
            output=self.output.resolve(),  # for workers elsewhere
            rules=request.rules,
            split=rule,
            tokenizer_fingerprint=tokenizer.fingerprint,
            vocab_size=tokenizer.vocab_size,
            eos_id=tokenizer.eos_id,
            backend=encoder.backend,
            strict=request.strict,
            allow_failed=request.allow_failed,
            workers=place.workers,
        )
        fingerprint, eos_id = tokenizer.fingerprint, tokenizer.eos_id
        self.header = header_of(identity, corpus, tokenizer_fingerprint=fingerprint, eos_id=eos_id)
        self.done: dict[tuple[int, int], UnitReport] = {}
        self.lost: list[UnitReport] = []
        self._keep()
        self.beginning = Beginning(self.units, self.done)
        size = sum(map(raw_size, self._todo()))
        needed = disk_needed(seen.sample, size, encoder=encoder, vocab_size=tokenizer.vocab_size)
        refuse_small_disk(self.output, needed)
        self.disk_bytes_per_byte = needed / max(size, 1)
        self._withdraw_manifest()
        self._write_ledger()
        tokenizer.save(self.output / TOKENIZER_NAME)
        fsync_folder(self.output)
        if self.place.at_once == 1:
            keep_encoder(encoder, tokenizer.fingerprint)

    def _withdraw_manifest(self) -> None:
        """Inputs or files changed, so what it vouches for is about to; deletions are no part of what is made again."""
        path = self.output / MANIFEST_NAME
        if not path.exists():
            return
        try:
            old = read_manifest(self.output)
        except UserError:  # damaged: it tells nothing
            old = None
        if old and (old.deduplication or old.contamination):
            self.console.print(
                "warning: documents that --dedup or --contamination deleted are part of the dataset again; "
                "run the same deletion once more when this is done",
                markup=False,
            )
        path.unlink()

    def run(self) -> Manifest | None:
        """Do what is left, judge it, and write the manifest; a share of the units has none to write."""
        try:
            failed = self._do_units()
        except OSError as error:
            if error.errno not in FULL:
                raise
            self._clean()  # before the room is measured
            needed = self.disk_bytes_per_byte * sum(map(raw_size, self._todo()))
            raise disk_full(self.output, needed=int(needed)) from None
        finally:
            self._clean()
        ordered = sorted([*self.done.values(), *self.lost], key=lambda report: report.place)
        failed += [FailedUnit(unit=report.name, reason=reason) for report in ordered for reason in report.failed]
        if failed and not self.request.allow_failed:
            raise Unfinished(
                f"{len(failed)} of {counted(len(self.units), 'unit')} failed, done and kept: {len(self.done)}"
                + "".join(f"\n  {unit.unit}: {unit.reason}" for unit in failed)
                + "\nmend these inputs and run the same command again, or do without them: --allow-failed"
            )
        self._write_ledger()
        if self.request.share:
            return None
        bad = too_many_bad(ordered, self.corpus, max_bad=self.request.max_bad)
        if bad:
            raise bad
        refuse_empty_split(ordered, self.settings)
        if changed := changed_since(self.corpus):
            raise UserError(
                f"{counted(len(changed), 'input')} changed during the preparation, such as {changed[0]}; once they "
                "stay as they are, run the same command again: only their units are made again"
            )
        write_quarantine(self.output, ordered, self.corpus)
        manifest = manifest_of(ordered, self.settings, self.corpus, identity=self.identity, failed=failed)
        write_manifest(self.output, manifest)
        for ledger in ledgers(self.output):
            if ledger.path != self.ledger.path:
                ledger.path.unlink()
        return manifest

    def _tokenizer(self) -> TextTokenizer:
        """The tokenizer asked for; the one of an earlier run, where a ledger vouches for it, is not made twice.

        A file is read again, for those beside it may say something else now.
        """
        given = expanded(self.request.tokenizer).exists()
        for header in headers(self.output):
            if given or header.eos_id is None:  # None: of an older version
                continue
            try:
                saved = TextTokenizer.from_file(self.output / TOKENIZER_NAME, eos=header.eos_id)
            except UserError:  # not there, or damaged
                continue
            fingerprint = saved.fingerprint
            now = header_of(self.identity, self.corpus, tokenizer_fingerprint=fingerprint, eos_id=header.eos_id)
            if (header.inputs_digest, header.tokenizer_fingerprint) == (now.inputs_digest, fingerprint):
                return saved
        return make_tokenizer(self.request, self.units, self.console)

    def _mine(self) -> list[Unit]:
        """The units of this share, or all."""
        part, parts = self.request.share or (0, 1)
        return [unit for unit in self.units if unit.number % parts == part]

    def _todo(self) -> list[Unit]:
        """What is left of the units of this share."""
        return [left for unit in self._mine() if (left := self._left_of(unit))]

    def _left_of(self, unit: Unit) -> Unit | None:
        """The unit from its first part on that is not done; None if all are."""
        done: list[UnitReport] = []
        while report := self.done.get((unit.number, len(done))):
            done.append(report)
        return None if done and done[-1].last else replace(unit, begun=begun_by(done))

    def _keep(self) -> None:
        """Take over the entries of earlier runs that still hold; files of those that do not are removed."""
        keys = {unit.number: self.settings.key(unit) for unit in self.units}
        reports = [entry for ledger in ledgers(self.output) for entry in ledger.read()[1]] + unrecorded(self.output)
        stale: set[str] = set()
        part, parts = self.request.share or (0, 1)
        for report in sorted(reports, key=lambda report: report.place):
            sizes = {name: info.size for shard in report.shards.values() for name, info in shard.files.items()}
            good = report.key == keys.get(report.unit) and (not report.failed or self.request.allow_failed)
            follows = report.part == 0 or (report.unit, report.part - 1) in self.done
            listed = report.quarantine is None or (self.output / report.quarantine).is_file()
            if good and follows and listed and sizes_agree(self.output, sizes):
                self.done[report.place] = report
            elif report.unit % parts == part:  # another share judges its own, and may be at it
                stale.update(report.files())
        for name in stale.difference(name for report in self.done.values() for name in report.files()):
            (self.output / name).unlink(missing_ok=True)
        if reports:
            redone = len({report.place for report in reports} - self.done.keys())
            changed = f", {redone} made again because input or files changed" if redone else ""
            count = self._count_done()
            self.console.print(f"going on: {count} of {counted(len(self.units), 'unit')} done{changed}", markup=False)
        self._clean()

    def _count_done(self) -> int:
        """Units that are done, of all."""
        return sum(report.last for report in self.done.values())

    def _do_units(self) -> list[FailedUnit]:
        """Do the units that are not kept and record each once its shards are durable; those that failed."""
        todo = self._todo()
        sizes = {unit.number: raw_size(unit) for unit in todo}
        failed: list[FailedUnit] = []
        try:
            with UnitProgress(self.console, total=sum(sizes.values())) as progress:
                work = partial(prepare_unit, settings=self.settings)
                if self.place.at_once == 1:
                    work = partial(work, on_batch=progress.on_batch)
                run = UnitRun(self.place, work, recover=self._recover, go_on=self._left_of)
                for outcome in run.outcomes(todo):
                    if isinstance(outcome, Failure):
                        left = self._left_of(outcome.unit) or outcome.unit
                        failure, stand_in = done_without(left, outcome.reason)
                        failed.append(failure)
                        self.lost.append(stand_in)
                        told = printable(f"warning: unit {failure.unit} failed: {failure.reason}")
                        self.console.print(told, markup=False)
                    else:
                        self._record(outcome)
                        progress.on_unit(outcome, size=sizes[outcome.unit] if outcome.last else 0)
                        self._early_verdict()
        except KeyboardInterrupt:
            raise stopped(f"{self._count_done()} of {counted(len(self.units), 'unit')} done") from None
        return sorted(failed, key=lambda unit: unit.unit)

    def _recover(self, unit: Unit) -> list[UnitReport]:
        """Reports of parts that were finished in this run but not heard of."""
        key = self.settings.key(unit)
        found = [report for report in unrecorded(self.output) if report.unit == unit.number and report.key == key]
        return sorted(found, key=lambda report: report.part)

    def _record(self, report: UnitReport) -> None:
        self.ledger.append(report)
        self.done[report.place] = report
        report_path(self.output, report.name).unlink()
        if report.mismatch:
            self.console.print(f"warning: {report.mismatch}; encoded with `tokenizers` instead", markup=False)

    def _early_verdict(self) -> None:
        """Stop as soon as the beginning of the corpus shows that there are too many bad records."""
        self.beginning.advance()
        if self.beginning.records < EARLY_VERDICT_RECORDS:
            return
        if bad := self.beginning.too_many_bad(self.corpus, max_bad=self.request.max_bad):
            raise bad

    def _write_ledger(self) -> None:
        """All that is kept, in order, whatever order it was done in; a share leaves those of others to them."""
        numbers = {unit.number for unit in self._mine()}
        self.ledger.write(self.header, [self.done[place] for place in sorted(self.done) if place[0] in numbers])
        for path in self.output.glob("report-*.json"):
            if unit_number(path) in numbers:
                path.unlink()

    def _clean(self) -> None:
        """Remove the temporary files that a kill left behind, of our own units only."""
        names = {unit.number for unit in self._mine()}
        for path in self.output.glob("*.tmp"):
            if not self.request.share or unit_number(path) in names:
                path.unlink(missing_ok=True)


def unit_number(path: Path) -> int | None:
    """Whose unit's a file is: `train-00012.bin`, `report-100001-0003.json`."""
    found = re.match(r"[a-z]+-(\d{5,})(?!\d)", path.name)
    return int(found[1]) if found else None
