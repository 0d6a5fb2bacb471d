"""Tokenizers made elsewhere: a `tokenizer.json`, a tiktoken rank file, a model on the Hugging Face hub.

In: a path, or a name on the hub. Out: the content of a `tokenizer.json` that gives the same ids.
"""

from __future__ import annotations

import base64
import binascii
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from queue import Empty, SimpleQueue
from threading import Thread
from typing import Any

from pipeline.data.manifest import TOKENIZER_NAME
from pipeline.data.tokenizer_roles import BESIDE_NAMES, Beside, read_beside
from pipeline.data.tokenizer_schema import LARGEST_TOKENIZER
from pipeline.errors import UserError, nearest
from pipeline.untrusted import DamagedFileError, Object, read_json, read_regular

HUB_TIMEOUT = 8.0
"""Seconds to wait for the hub to answer once; its own client tries six times and takes half a minute to give up.
Names that are not resolved and addresses that do not answer are waited for one by one, so it is all of this."""

RANK_SUFFIX = ".tiktoken"

WITHOUT_NETWORK = (
    "use what needs no network: --tokenizer PATH/tokenizer.json, train:N (a BPE of N tokens, trained on this corpus), "
    "chars or bytes"
)


def read_definition(path: Path) -> dict[str, Any]:
    """Content of a `tokenizer.json`, of the one in a folder, or of what a rank file FILE.tiktoken amounts to.

    Raises `UserError` for a file that is missing, unreadable or something else.
    """
    path = path / TOKENIZER_NAME if path.is_dir() else path
    if not path.exists():
        names = sorted(p.name for p in path.parent.iterdir()) if path.parent.is_dir() else []
        raise UserError(f"no tokenizer file {path}{nearest(path.name, names)}")
    if path.suffix == RANK_SUFFIX:
        return tiktoken_definition(path)
    try:
        definition = read_json(Object, path, limit=LARGEST_TOKENIZER)
    except (OSError, DamagedFileError) as error:
        raise UserError(
            f"cannot read the tokenizer: {error}; wanted a tokenizer.json, or a tiktoken rank file named "
            f"ENCODING{RANK_SUFFIX} (a SentencePiece model must be converted to a tokenizer.json first)"
        ) from None
    if "model" not in definition:
        raise UserError(f"{path} is not a tokenizer.json: it has no 'model'")
    return definition


def placed(
    definition: dict[str, Any], finder: Callable[[], Callable[[str], int | None]], *, origin: str
) -> dict[str, Any]:
    """The definition with which the library gives each added token the id that the file says.

    `finder`: makes the function that gives the library's id of a token. The library counts added tokens on from the end
    of the vocabulary, so one behind a hole moves; in the vocabulary of the model itself, where no merge comes to it, it
    keeps its id. Raises `UserError` where that cannot be done: the vocabulary is a list (Unigram), or the id is another
    token's.
    """
    added = definition.get("added_tokens")
    if not added or _counts_on(definition):
        return definition
    id_of = finder()  # refuses what is no tokenizer.json
    said = {entry["content"]: int(entry["id"]) for entry in added}
    moved = {token: number for token, number in said.items() if id_of(token) != number}
    if not moved:
        return definition
    vocabulary = definition["model"]["vocab"]
    taken = {*range(len(vocabulary))} if isinstance(vocabulary, list) else {*vocabulary.values()}
    twice = len({*said.values()}) < len(said)
    if isinstance(vocabulary, list) or twice or not taken.isdisjoint(moved.values()) or vocabulary.keys() & moved:
        token, number = next(iter(moved.items()))
        raise UserError(
            f"{origin} gives the added token {token!r} the id {number}, but `tokenizers` puts it at {id_of(token)}: "
            "the id is another token's, the token has another id in the vocabulary, or a list of pieces has a gap "
            "before it; number added_tokens as the embedding of the model is, without a gap"
        )
    return {**definition, "model": {**definition["model"], "vocab": {**vocabulary, **said}}}


def _counts_on(definition: dict[str, Any]) -> bool:
    """Whether added tokens are plainly where the library puts them, which takes as long to find out as to load it."""
    try:
        vocabulary = definition["model"]["vocab"]
        if isinstance(vocabulary, list):
            vocabulary = {piece: number for number, (piece, _) in enumerate(vocabulary)}
        new = [entry for entry in definition["added_tokens"] if vocabulary.get(entry["content"]) != entry["id"]]
        words = {entry["content"] for entry in new}
        free = range(len(vocabulary), len(vocabulary) + len(words))
        return [entry["id"] for entry in new] == [*free] and words.isdisjoint(vocabulary)
    except (AttributeError, KeyError, TypeError, ValueError):  # not a tokenizer.json
        return False


def hub_tokenizer(name: str) -> tuple[dict[str, Any], Beside]:
    """The `tokenizer.json` of a model on the Hugging Face hub: from the local cache, else asked for once.

    Also what the files beside it say.

    Raises `UserError`, within about `HUB_TIMEOUT` seconds, for a name that is unknown, private or unreachable.
    """
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    try:
        file = _hub_file(name)
        definition = read_json(Object, file, limit=LARGEST_TOKENIZER)
    except Exception as error:  # unknown name, no network, gated, damaged: many classes, two remedies
        if isinstance(error, EntryNotFoundError) and not isinstance(error, LocalEntryNotFoundError):
            raise UserError(
                f"{name!r} on the Hugging Face hub has no {TOKENIZER_NAME}; convert its tokenizer with transformers "
                "(AutoTokenizer.from_pretrained(NAME).save_pretrained(FOLDER)) and give --tokenizer FOLDER"
            ) from None
        reason = (str(error).strip() or repr(error)).splitlines()[0]
        raise UserError(
            f"cannot load the tokenizer {name!r} from the Hugging Face hub: {reason}\n"
            "  check the spelling and the network (private and gated names need `hf auth login`), or "
            f"{WITHOUT_NETWORK}"
        ) from None
    return definition, read_beside(file.parent)


def _hub_file(name: str) -> Path:
    """The `tokenizer.json` in the cache of the hub, and beside it what else the hub says of the tokenizer."""
    from huggingface_hub import get_hf_file_metadata, hf_hub_download, hf_hub_url, try_to_load_from_cache
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    cached = try_to_load_from_cache(name, TOKENIZER_NAME)  # unlike a download of local files only, sends nothing
    if isinstance(cached, str):
        return Path(cached)
    # one request without retries finds out whether the download, which retries, is worth starting
    url = hf_hub_url(name, TOKENIZER_NAME)
    for _ in waiting(lambda: get_hf_file_metadata(url, timeout=HUB_TIMEOUT), every=HUB_TIMEOUT):
        raise TimeoutError(f"the hub did not answer within {HUB_TIMEOUT:g} s")
    for beside in BESIDE_NAMES:
        try:
            hf_hub_download(name, beside, etag_timeout=HUB_TIMEOUT)
        except LocalEntryNotFoundError:  # no network any more
            raise
        except EntryNotFoundError:  # few have all
            continue
    return Path(hf_hub_download(name, TOKENIZER_NAME, etag_timeout=HUB_TIMEOUT))  # last: what is cached is whole


def waiting(work: Callable[[], object], *, every: float) -> Iterator[None]:
    """Run `work` in a thread of its own; yields whenever `every` seconds passed, raises what it raises.

    Signals are handled meanwhile. When the caller stops waiting, the thread is left alone; it ends with the program.
    """
    ended: SimpleQueue[BaseException | None] = SimpleQueue()

    def call() -> None:
        try:
            work()
        except BaseException as error:
            ended.put(error)
        else:
            ended.put(None)

    Thread(target=call, daemon=True).start()  # no pool: the end of the program would wait for its thread
    while True:
        try:
            error = ended.get(timeout=every)
        except Empty:
            yield
            continue
        if error is not None:
            raise error
        return


@dataclass(frozen=True)
class _Encoding:
    """What a rank file lacks. `pattern`: how text is cut into words, None for GPT-2's; `specials`: token to id."""

    specials: dict[str, int]
    pattern: str | None = None


# Patterns and special tokens as published in tiktoken's openai_public.py, in the regular expressions of `tokenizers`.
# There `$` ends a line, so \z; and {1,3}+ repeats a group, so possessive marks, which change no match, are left out.
CL100K = (
    r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|(?>\s+)\z|\s*[\r\n]|\s+(?!\S)|\s"
)
O200K = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_END = "<|endoftext|>"
ENCODINGS = {
    "gpt2": _Encoding({_END: 50256}),
    "r50k_base": _Encoding({_END: 50256}),
    "p50k_base": _Encoding({_END: 50256}),
    "cl100k_base": _Encoding(
        {
            _END: 100257,
            "<|fim_prefix|>": 100258,
            "<|fim_middle|>": 100259,
            "<|fim_suffix|>": 100260,
            "<|endofprompt|>": 100276,
        },
        CL100K,
    ),
    "o200k_base": _Encoding({_END: 199999, "<|endofprompt|>": 200018}, O200K),
}


def tiktoken_definition(path: Path) -> dict[str, Any]:
    """A `tokenizer.json` with the ids of tiktoken's `encode_ordinary` for a rank file.

    The file holds a base64 token and its rank a line; its name says which published encoding it is. Raises
    `UserError` for another name or another content.
    """
    encoding = ENCODINGS.get(path.stem)
    if encoding is None:
        raise UserError(
            f"{path.name} does not say how text is cut into words: a rank file holds no pattern, so its name must be "
            f"that of a published encoding, {', '.join(f'{name}{RANK_SUFFIX}' for name in ENCODINGS)}"
            f"{nearest(path.stem, ENCODINGS)}"
        )
    ranks = _read_ranks(path)
    taken = {rank: token for token, rank in ranks.items()}
    for special, number in encoding.specials.items():
        if number in taken:
            raise UserError(f"{path} is not {path.stem}: the rank {number}, kept for {special}, is {taken[number]!r}")
    symbols = list(byte_symbols())

    def spell(token: bytes) -> str:
        return "".join(symbols[byte] for byte in token)

    vocabulary = {spell(token): rank for token, rank in sorted(ranks.items(), key=lambda item: item[1])}
    merges = [[spell(left), spell(right)] for left, right in recover_merges(ranks)]
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    words: dict[str, Any] = byte_level
    if encoding.pattern is not None:
        split = {"type": "Split", "pattern": {"Regex": encoding.pattern}, "behavior": "Isolated", "invert": False}
        words = {"type": "Sequence", "pretokenizers": [split, {**byte_level, "use_regex": False}]}
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [{"id": number, "content": token, **flags} for token, number in encoding.specials.items()],
        "normalizer": None,
        "pre_tokenizer": words,
        "post_processor": None,
        "decoder": byte_level,
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": True,  # tiktoken takes a word that is a token as it is
            # here too, for an added token that the model lacks would be given the next free id, not its own
            "vocab": {**vocabulary, **encoding.specials},
            "merges": merges,
        },
    }


def recover_merges(ranks: dict[bytes, int]) -> Iterator[tuple[bytes, bytes]]:
    """The pair that makes each token of several bytes, in order of rank.

    tiktoken merges whichever neighbours spell the token of lowest rank, leftmost first. Merges inside a stretch of
    text that becomes one token never looked beyond it, so they went as they go for that token alone, and the last
    two parts are always the same pair: merging by these pairs gives the same ids. A token that merging cannot reach
    has none.
    """
    for token, _ in sorted(ranks.items(), key=lambda item: item[1]):
        parts = [token[i : i + 1] for i in range(len(token))]
        while len(parts) > 2:
            found = [ranks.get(left + right) for left, right in pairwise(parts)]
            known = [rank for rank in found if rank is not None]
            if not known:
                break
            at = found.index(min(known))
            parts[at : at + 2] = [parts[at] + parts[at + 1]]
        if len(parts) == 2:
            yield parts[0], parts[1]


def byte_symbols() -> Iterator[str]:
    """GPT-2's printable character of each byte 0..255 (openai/gpt-2 `encoder.py`, bytes_to_unicode)."""
    spare = 256
    for value in range(256):
        if 33 <= value <= 126 or 161 <= value <= 172 or 174 <= value <= 255:
            yield chr(value)
        else:
            yield chr(spare)
            spare += 1


def _read_ranks(path: Path) -> dict[bytes, int]:
    ranks: dict[bytes, int] = {}
    try:
        lines = read_regular(path, limit=LARGEST_TOKENIZER).splitlines()
    except OSError as error:
        raise UserError(f"cannot read the tokenizer {path}: {error.strerror or error}") from None
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            token, rank = line.split()
            ranks[base64.b64decode(token, validate=True)] = int(rank)
        except (ValueError, binascii.Error):
            raise UserError(
                f"{path}:{number} is not a line of a tiktoken rank file; wanted a base64 token and its rank, "
                f"got {line[:60]!r}"
            ) from None
    missing = [byte for byte in range(256) if bytes([byte]) not in ranks]
    if missing or len(set(ranks.values())) < len(ranks):
        fault = f"{len(missing)} of the 256 single bytes have no rank" if missing else "two tokens share a rank"
        raise UserError(f"{path} is no whole tiktoken rank file: {fault}; download it again")
    return ranks
