"""What a request leaves open, decided from a look at the corpus: split, tokenizer, encoder. And a rehearsal of it all.

In: a `Request`. Out: the corpus that its inputs come to, and what is to be made of it how. Writes nothing.
"""

from __future__ import annotations

import math
import shutil
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console

from pipeline.data.preparing.encoder import Encoder, choose_encoder
from pipeline.data.preparing.estimate import estimate, raw_size
from pipeline.data.preparing.request import Request, existing, finished_units, look_at
from pipeline.data.preparing.split import SplitRule
from pipeline.data.preparing.survey import (
    FEW_DOCUMENTS,
    Survey,
    all_texts,
    refuse_small_disk,
    survey,
    training_texts,
)
from pipeline.data.preparing.unit import UnitSettings
from pipeline.data.reading.corpus import Corpus, check_text_key, find_corpus
from pipeline.data.reading.formats import TextRules
from pipeline.data.reading.plan import Unit, plan_units
from pipeline.data.tokenizer import TextTokenizer, load_tokenizer, needs_corpus
from pipeline.errors import counted, duration, printable, sized

LARGE_TEXT_BYTES = 10**6
DEFAULT_FRACTION, DEFAULT_TAIL_FRACTION = 0.005, 0.1
LEAST_HELD_OUT = 20
"""Documents that the default fraction holds out at least, on average."""
SMALL_CORPUS_BYTES = 2 * 2**20
"""Below this, `tokenizers` has done the work before another encoder is proven to do the same."""


def corpus_of(request: Request, console: Console) -> tuple[Corpus, dict[str, Any]]:
    """What the inputs come to, checked, and the identity of the dataset they make."""
    corpus = find_corpus(
        request.inputs, exclude=request.exclude, output=request.output.resolve(), held_out=request.val_inputs
    )
    for note in (*corpus.notes, *_large_texts(corpus, request.rules)):
        console.print(printable(f"note: {note}"), markup=False)
    check_text_key(corpus.sources, request.rules.key)
    return corpus, request.identity(corpus)


def _large_texts(corpus: Corpus, rules: TextRules) -> Iterator[str]:
    """A note on large plain texts: that each is one document is seldom meant, and nothing else says so."""
    sizes = {source.name: source.size for source in corpus.sources if source.kind == "text"}
    large = [name for name, size in sizes.items() if size > LARGE_TEXT_BYTES]
    if large and rules.separator is None:
        name = max(large, key=lambda name: sizes[name])
        files = counted(len(large), "plain text")
        cut = " (over 64 MB: about 1 MB)" if sizes[name] > rules.unit_bytes else ""
        yield (
            f"{files} of over 1 MB, such as {name} ({sized(sizes[name])}): a text file is one document{cut}; "
            r"--text-separator '\n\n' cuts it at empty lines"
        )


def split_rule(request: Request, seen: Survey, corpus: Corpus, console: Console) -> SplitRule:
    """Whole documents by hash, or the tail of each when there are too few to choose among."""
    if any(source.held_out for source in corpus.sources):
        return SplitRule("given", 0.0, request.seed)
    if request.val_fraction == 0:
        return SplitRule("none", 0.0, request.seed)
    if seen.documents >= FEW_DOCUMENTS:
        enough = math.ceil(1000 * LEAST_HELD_OUT / seen.expected) / 1000  # expected; none at all is then out of reach
        return SplitRule("hash", request.val_fraction or max(DEFAULT_FRACTION, enough), request.seed)
    rule = SplitRule("tail", request.val_fraction or DEFAULT_TAIL_FRACTION, request.seed)
    console.print(f"note: fewer than {FEW_DOCUMENTS} documents ({seen.documents}): {rule.describe()}", markup=False)
    return rule


def make_tokenizer(request: Request, units: Sequence[Unit], console: Console) -> TextTokenizer:
    """The tokenizer asked for, made from the corpus where it has to be; says how far that is."""
    texts: Iterable[str] = ()
    if needs_corpus(request.tokenizer):
        of = all_texts if request.tokenizer == "chars" else training_texts
        texts = of(units, request.rules)
    report = partial(console.print, markup=False)
    made = load_tokenizer(request.tokenizer, texts=texts, eos=request.eos, report=report)
    return made.ending_documents(origin=request.tokenizer)


def describe_tokenizer(tokenizer: TextTokenizer, console: Console) -> None:
    """Print which token was taken to end documents, and what the tokenizer does by default but not here."""
    for note in filter(None, (tokenizer.choice, *tokenizer.notes)):
        console.print(printable(f"note: {note}"), markup=False)


def encoder_for(request: Request, tokenizer: TextTokenizer, seen: Survey, units: Sequence[Unit]) -> tuple[Encoder, str]:
    """What encodes, and why if that is worth saying. To prove gigatoken right takes a second."""
    if not is_worth_proof(request, units):
        return Encoder(tokenizer, backend="tokenizers"), ""
    return choose_encoder(tokenizer, seen.sample, asked=request.backend)


def is_worth_proof(request: Request, units: Sequence[Unit]) -> bool:
    """Whether there is enough text to ask which encoder is fit, or the user asks."""
    return request.backend != "auto" or sum(unit.size for unit in units) >= SMALL_CORPUS_BYTES


def rehearse(request: Request, *, console: Console) -> None:
    """`--dry-run`: plan, prepare a sample, and say what the preparation would come to. Writes nothing to the output."""
    began = time.perf_counter() - time.process_time()  # what was imported before counts
    corpus, identity = corpus_of(request, console)
    output, complete = look_at(request, corpus, identity)
    if complete:
        console.print(f"{output}\nnothing was written", markup=False)
        return
    units = plan_units(corpus.sources, request.rules)
    seen = survey(units, request.rules)
    rule = split_rule(request, seen, corpus, console)
    size = sum(map(raw_size, units))
    unmade = needs_corpus(request.tokenizer)  # to make it would be half of the work: bytes stand for its tokens
    tokenizer = make_tokenizer(replace(request, tokenizer="bytes") if unmade else request, units, console)
    describe_tokenizer(tokenizer, console)
    encoder, reason = encoder_for(request, tokenizer, seen, units)
    settings = UnitSettings(
        output=request.output,
        rules=request.rules,
        split=rule,
        tokenizer_fingerprint=tokenizer.fingerprint,
        vocab_size=tokenizer.vocab_size,
        eos_id=tokenizer.eos_id,
        backend=encoder.backend,
        strict=False,
        allow_failed=True,
        workers=request.workers,
    )
    start = time.perf_counter() - began  # the preparation begins with the same
    found = estimate(units, settings, encoder=encoder, at_once=request.workers)
    if unmade:
        outlook = f"tokens: at most {found.text_bytes:,}, known once {request.tokenizer} is made"
    else:
        outlook = (
            f"tokens: about {found.tokens:,}; disk: about {sized(found.disk_bytes)}; time: about "
            f"{duration(start + found.seconds)} from start to end with {counted(request.workers, 'worker')}"
        )
    plan = counted(len(units), "unit")
    for line in (
        f"{counted(len(corpus.sources), 'input')}, {plan}, about {sized(found.text_bytes)} of text",
        f"split: {rule.describe()}",
        f"encoder: {encoder.backend}" + (f" ({reason})" if reason else ""),
        outlook,
        f"free on the disk: {sized(free_bytes(request.output))}",
        output,
        "nothing was written",
    ):
        console.print(line, markup=False)
    done = finished_units(request.output)
    todo = sum(raw_size(unit) for unit in units if unit.number not in done) / max(size, 1)
    if not unmade:
        refuse_small_disk(existing(request.output), int(found.disk_bytes * todo))


def free_bytes(folder: Path) -> int:
    """Room on the disk of a folder that may not exist yet."""
    return shutil.disk_usage(existing(folder)).free
