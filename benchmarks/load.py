"""Reading speed beside two common ways, memory over a whole pass, and packing, on one core of this machine, in one run.

    python -m benchmarks.load [--tokens 200000000] [--documents 20000000] [--rounds 15]

Random uint16 tokens in files that the page cache holds, documents of log-normal length (median 400). The ways take
turns, so that a drift of the machine's speed meets all of them; each batch has about 131,072 tokens in micro-batches
of 8 rows, tokens and labels int64. Prints million tokens per second of processor time (median of the rounds).
"""

from __future__ import annotations

import argparse
import tempfile
from collections import deque
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import median
from time import process_time

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from pipeline.config import Config
from pipeline.data.dataset import TokenSplit
from pipeline.data.loading.loader import Loader, Shuffled
from pipeline.data.loading.rows import Concat, Pack
from pipeline.data.shards import DOCUMENT_DTYPE, DocumentInfo, Shard, ShardWriter

VOCABULARY, SHARDS, BATCH_TOKENS, MICRO_BATCH, MEDIAN = 50_257, 4, 2**17, 8, 400
DTYPE = np.dtype("<u2")


def main() -> None:
    """Speed, memory, packing."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=200_000_000)
    parser.add_argument("--documents", type=int, default=20_000_000)
    parser.add_argument("--rounds", type=int, default=15)
    given = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        split = make_split(Path(folder), tokens=given.tokens)
        print(f"{split.n_tokens:,} tokens in {split.n_documents:,} documents, {SHARDS} files")
        for context in (1024, 2048, 8192):
            compare(split, sorted(Path(folder).glob("*.bin"))[0], context=context, rounds=given.rounds)
        whole_pass(split, context=2048)
    for context in (1024, 2048, 8192):
        pack(given.documents, context=context)


def make_split(folder: Path, *, tokens: int) -> TokenSplit:
    """Shards of random ids, written by the project's writer."""
    generator = np.random.default_rng(1)
    shards = []
    for number in range(SHARDS):
        lengths = document_lengths(generator, int(tokens / SHARDS / (MEDIAN * np.exp(0.5))))
        with ShardWriter(folder, f"train-{number:05d}", vocab_size=VOCABULARY) as writer:
            ids = generator.integers(0, VOCABULARY, size=int(lengths.sum()), dtype=np.uint16)
            writer.append(ids, lengths=lengths, documents=np.zeros(len(lengths), DOCUMENT_DTYPE))
            info = writer.commit()
        assert info is not None, "a shard without documents"
        shards.append(Shard(folder, info, dtype=DTYPE, inputs=["random"]))
    return TokenSplit(shards, text_bytes=1, dtype=DTYPE, vocab_size=2**31)


def document_lengths(generator: np.random.Generator, documents: int) -> npt.NDArray[np.int32]:
    """Tokens of each document, as in web text."""
    return np.maximum(generator.lognormal(np.log(MEDIAN), 1.0, size=documents), 2).astype(np.int32)


def compare(split: TokenSplit, file: Path, *, context: int, rounds: int) -> None:
    """Batches of each way in turn. The others read one file, which only spares them work."""
    rows = BATCH_TOKENS // context
    ways = {
        "this project": ours(split, context=context, rows=rows),
        "with documents": ours(split, context=context, rows=rows, document_mask=True),
        "packed": ours(split, context=context, rows=rows, packed=True),
        "memmap and stack": stacked(file, context=context, rows=rows),
        "torch DataLoader": data_loader(file, context=context, rows=rows),
    }
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    ahead = {name: deque[object](maxlen=3) for name in ways}  # as a trainer keeps them; freed memory is used again
    for _ in range(rounds + 5):
        for name, read in ways.items():
            began = process_time()
            ahead[name].append(read())
            seconds[name].append(process_time() - began)
    rates = {name: BATCH_TOKENS / median(found[5:]) / 1e6 for name, found in seconds.items()}
    shown = ", ".join(f"{name} {rate:.0f}" for name, rate in rates.items())
    others = max(rates["memmap and stack"], rates["torch DataLoader"])
    print(f"T = {context}: {shown} M tokens/s; {rates['this project'] / others:.1f} times the faster of the others")


def ours(
    split: TokenSplit, *, context: int, rows: int, document_mask: bool = False, packed: bool = False
) -> Callable[[], object]:
    """The project's loader: shuffled rows without repetition, micro-batches that know their targets."""
    data = {"path": "random", "document_mask": document_mask}
    train = {"steps": 1, "batch_tokens": rows * context, "micro_batch": MICRO_BATCH}
    config = Config.model_validate({"data": data, "model": {"context_length": context}, "train": train})
    plan = Pack(split, context_length=context, key=1) if packed else Concat(split, context_length=context)
    source = Shuffled(plan, name="random", seed=1, data_digest="none")
    loader = Loader(source, config, rank=0, world_size=1)
    first = iter(range(0, 2**62, rows))
    return lambda: loader.batch(next(first), rows)


def stacked(file: Path, *, context: int, rows: int) -> Callable[[], object]:
    """nanoGPT's way: windows at random places of a map that is opened for each batch, converted and stacked."""

    def batch(size: int) -> tuple[Tensor, Tensor]:
        ids = np.memmap(file, dtype=DTYPE, mode="r")
        starts = torch.randint(len(ids) - context, (size,)).tolist()
        inputs = torch.stack([torch.from_numpy(ids[i : i + context].astype(np.int64)) for i in starts])
        labels = torch.stack([torch.from_numpy(ids[i + 1 : i + 1 + context].astype(np.int64)) for i in starts])
        return inputs, labels

    return lambda: [batch(min(MICRO_BATCH, rows - done)) for done in range(0, rows, MICRO_BATCH)]


class Windows(torch.utils.data.Dataset[tuple[Tensor, Tensor]]):
    """Windows of a map as torch's `Dataset`."""

    def __init__(self, file: Path, context: int) -> None:
        self.ids = np.memmap(file, dtype=DTYPE, mode="r")
        self.context = context

    def __len__(self) -> int:
        """How many do not overlap but for one token."""
        return (len(self.ids) - 1) // self.context

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        """Inputs and labels of one window."""
        start = index * self.context
        window = torch.from_numpy(self.ids[start : start + self.context + 1].astype(np.int64))
        return window[:-1], window[1:]


def data_loader(file: Path, *, context: int, rows: int) -> Callable[[], object]:
    """torch's own loader in this process: shuffled, without repetition."""
    windows = Windows(file, context)

    def endless() -> Iterator[tuple[Tensor, Tensor]]:
        while True:
            yield from torch.utils.data.DataLoader(windows, batch_size=min(MICRO_BATCH, rows), shuffle=True)

    batches = endless()
    return lambda: [next(batches) for _ in range(0, rows, MICRO_BATCH)]


def whole_pass(split: TokenSplit, *, context: int) -> None:
    """One epoch, and this process's anonymous memory after each quarter."""
    rows = BATCH_TOKENS // context
    read = ours(split, context=context, rows=rows)
    read()
    batches = Concat(split, context_length=context).rows // rows
    memory, began = [anonymous_mib()], process_time()
    for number in range(1, batches + 1):
        read()
        if number % max(batches // 4, 1) == 0:
            memory.append(anonymous_mib())
    rate = batches * BATCH_TOKENS / (process_time() - began) / 1e6
    shown = ", ".join(f"{found:.0f}" for found in memory)
    print(
        f"one pass over {split.n_tokens * DTYPE.itemsize / 2**20:.0f} MiB: {rate:.0f} M tokens/s, {shown} MiB anonymous"
    )


def anonymous_mib() -> float:
    """Memory of this process that no file backs. Linux only."""
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return int(next(line for line in lines if line.startswith("RssAnon")).split()[1]) / 1024


class Lengths:
    """Documents without tokens: all that packing looks at."""

    keep = None

    path = Path("lengths.bin")

    def __init__(self, lengths: npt.NDArray[np.int32]) -> None:
        self.lengths, self.n_documents, self.n_tokens = lengths, len(lengths), int(lengths.sum(dtype=np.int64))
        self.tokens = np.zeros(0, DTYPE)

    def starts(self, first: int, stop: int) -> npt.NDArray[np.int64]:
        """First token of each document."""
        return (np.cumsum(self.lengths, dtype=np.int64) - self.lengths)[first:stop]

    def document_at(self, token: int) -> int:
        """The document of a token."""
        return int(np.searchsorted(np.cumsum(self.lengths, dtype=np.int64), token, side="right"))

    def describe(self, document: int) -> DocumentInfo:
        """It comes from nowhere."""
        return DocumentInfo(source="drawn", row=document, tokens=int(self.lengths[document]), text_bytes=0)


def pack(documents: int, *, context: int) -> None:
    """Time and fill of the plan; memory that it keeps."""
    lengths = document_lengths(np.random.default_rng(2), documents)
    split = TokenSplit([Lengths(lengths)], text_bytes=1, dtype=DTYPE, vocab_size=2**31)
    before, _ = anonymous_mib(), split.lengths  # a copy that belongs to the split
    began = process_time()
    plan = Pack(split, context_length=context, key=1)
    seconds, kept = process_time() - began, anonymous_mib() - before
    print(
        f"packing {documents:,} documents into rows of {context}: {seconds:.2f} s, {plan.rows:,} rows, "
        f"{plan.targets / (plan.rows * context):.2%} full, {kept * 2**20 / documents:.0f} bytes kept per document"
    )


if __name__ == "__main__":
    main()
