"""A look at the corpus before the work: what the first documents of some units tell about all of them.

In: the plan. Out: a `Survey`, from which follow the split rule, the encoder, and the room that is needed.
"""

from __future__ import annotations

import heapq
import shutil
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path

import xxhash

from pipeline.data.preparing.encoder import Encoder
from pipeline.data.preparing.unit import EXAMPLES
from pipeline.data.reading.corpus import read_unit
from pipeline.data.reading.formats import Document, Rejected, TextRules
from pipeline.data.reading.plan import Unit
from pipeline.data.shards import DOCUMENT_DTYPE, token_dtype
from pipeline.errors import UserError, sized

FEW_DOCUMENTS = 100
"""Below this, holding out whole documents by hash would leave the size of the validation split to chance."""
MANY_DOCUMENTS, LOOKED_AT_BYTES = 4000, 32 * 2**20
"""Where counting documents ends: what follows is extrapolated."""
SAMPLED_UNITS = 8
SAMPLED_BYTES = 256 * 2**10
TRAINING_SAMPLE_BYTES = 100 * 10**6
TRAINING_POOL_BYTES = 10 * TRAINING_SAMPLE_BYTES
"""Text from which the training sample is drawn: a bound for the time, not the quality (huggingface/tokenizers#1681)."""


@dataclass(frozen=True)
class Survey:
    """What the beginning of the corpus shows.

    `documents` are those to train on, as many as were looked at, `expected` the number that follows for the whole
    corpus; `sample` is text from all over it; `drops` counts the bad records by reason, `examples` shows the first;
    `damaged`: some of what was looked at could not be read.
    """

    documents: int
    expected: int
    sample: tuple[bytes, ...]
    drops: Counter[str]
    examples: tuple[Rejected, ...]
    damaged: bool


def survey(units: Sequence[Unit], rules: TextRules) -> Survey:
    """Read the beginning of the corpus and of some units. What is damaged tells nothing; it is found out later."""
    documents, seen, damaged = 0, 0, list[str]()
    drops, examples = Counter[str](), list[Rejected]()
    records = ((unit, record) for unit in units for record in _readable(unit, rules, damaged))
    for unit, record in records:
        if isinstance(record, Rejected):
            drops[record.reason] += 1
            examples += [record] if len(examples) < EXAMPLES else []
        elif not _held_out(unit, record):
            documents += 1
            seen += len(record.content)
        if documents >= MANY_DOCUMENTS or (documents >= FEW_DOCUMENTS and seen >= LOOKED_AT_BYTES):
            # a compressed text may be longer than was expected of all
            share = min(seen / (sum(unit.size for unit in units) or seen), 1.0)
            break
    else:
        share = 1.0
    places = {len(units) * i // SAMPLED_UNITS for i in range(SAMPLED_UNITS)} if units else set()
    chosen = [units[number] for number in sorted(places)]
    sample: list[bytes] = []
    for unit in chosen:
        sample += _beginning(unit, rules, SAMPLED_BYTES // len(chosen))
    return Survey(documents, int(documents / share), tuple(sample), drops, tuple(examples), damaged=bool(damaged))


def holds_validation(units: Sequence[Unit], rules: TextRules) -> bool:
    """Whether the inputs given for validation hold a document. True, too, where that is not to be told soon."""
    damaged: list[str] = []
    pieces = (replace(unit, pieces=(piece,)) for unit in units for piece in unit.pieces if piece.source.held_out)
    records = (record for piece in pieces for record in _readable(piece, rules, damaged))
    for looked_at, record in enumerate(records):
        if isinstance(record, Document) or looked_at >= MANY_DOCUMENTS:
            return True
    return bool(damaged)


def _held_out(unit: Unit, document: Document) -> bool:
    return next(piece.source.held_out for piece in unit.pieces if piece.index == document.source)


def _readable(unit: Unit, rules: TextRules, damaged: list[str]) -> Iterator[Document | Rejected]:
    """The records of a unit but for those that cannot be read, of which `damaged` is told."""
    for piece in unit.pieces:
        try:
            yield from read_unit(replace(unit, pieces=(piece,)), rules)
        except UserError as error:
            damaged.append(str(error))


def _beginning(unit: Unit, rules: TextRules, limit: int) -> list[bytes]:
    """The first documents of a unit, up to `limit` bytes; of a first one that is longer, its beginning."""
    taken: list[bytes] = []
    left = limit
    for record in islice(_readable(unit, rules, []), 10_000):
        if isinstance(record, Document):
            content = record.content
            if len(content) > limit:
                content = content[:limit].decode(errors="ignore").encode()
            taken.append(content)
            left -= len(content)
        if left <= 0:
            break
    return taken


def disk_needed(sample: Sequence[bytes], text_bytes: int, *, encoder: Encoder, vocab_size: int) -> int:
    """Bytes of the dataset that `text_bytes` of text become, by encoding the sample."""
    sample = sample or (b"a",)
    ids, _ = encoder.encode(sample)
    item = token_dtype(vocab_size).itemsize
    per_document = DOCUMENT_DTYPE.itemsize + 4 + 8 + 8 + item  # its record, its place in the index, its EOS
    return (len(ids) * item + len(sample) * per_document) * text_bytes // sum(map(len, sample))


def refuse_small_disk(output: Path, needed: int) -> None:
    """Raise `UserError` when the disk of `output` will not hold `needed` bytes more."""
    free = shutil.disk_usage(output).free
    if free < needed:
        raise UserError(
            f"the disk of {output} has {sized(free)} free, the dataset needs about {sized(needed)} more; "
            "make room or choose another --output"
        )


def training_texts(units: Sequence[Unit], rules: TextRules) -> list[str]:
    """What a tokenizer is trained on: a bounded sample, the same for any order of work."""
    pool, size = [], 0
    for unit in sorted(units, key=lambda unit: xxhash.xxh3_64_intdigest(unit.name.encode())):
        if size >= TRAINING_POOL_BYTES:
            break
        pool.append(unit)
        size += unit.size
    contents = _up_to(_contents(pool, rules), TRAINING_POOL_BYTES)  # a compressed unit may be any size
    return [content.decode() for content in training_sample(contents, TRAINING_SAMPLE_BYTES)]


def all_texts(units: Sequence[Unit], rules: TextRules) -> Iterator[str]:
    """The text of every document that can be read."""
    return (content.decode() for content in _contents(units, rules))


def _contents(units: Iterable[Unit], rules: TextRules) -> Iterator[bytes]:
    for unit in units:
        for record in _readable(unit, rules, []):
            if isinstance(record, Document):
                yield record.content


def _up_to(contents: Iterable[bytes], limit: int) -> Iterator[bytes]:
    """The first documents, until they come to `limit` bytes."""
    read = 0
    for content in contents:
        yield content
        read += len(content)
        if read >= limit:
            return


def training_sample(contents: Iterable[bytes], limit: int) -> list[bytes]:
    """The documents of lowest hash, up to `limit` bytes, in order of hash: the same for any order of `contents`."""
    heap: list[tuple[int, bytes]] = []
    total = 0
    for content in contents:
        heapq.heappush(heap, (-xxhash.xxh3_64_intdigest(content), content))
        total += len(content)
        while total > limit and len(heap) > 1:
            total -= len(heapq.heappop(heap)[1])
    return [content for _, content in sorted(heap, reverse=True)]
