"""Tokenizers shaped like published ones, with small vocabularies, and the Hugging Face folders they come in."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)

TEXTS = [
    "the cat sat on the mat, and it's the dog's turn: 12345 words",
    "a dog and the cat\nran\n\n  over there </s> café 日本語 naïve",
    "DON'T PANIC! the answer is 42; </s> or <eos>, he said",
] * 4
BYTES = [f"<0x{value:02X}>" for value in range(256)]
UNKNOWN = "<unk>"
LLAMA3_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
BEGINS = {"llama2": "<s>", "llama3": "<|begin_of_text|>", "mistral": "<s>", "gemma": "<bos>", "bert": "[CLS]"}
"""What a default encoding puts before a text."""
ENDS = {
    "llama2": "</s>",
    "llama3": "<|end_of_text|>",
    "mistral": "</s>",
    "gemma": "<eos>",
    "qwen": "<|im_end|>",
    "t5": "</s>",
    "bert": "[SEP]",
    "gpt2": "<|endoftext|>",
    "kimi": "[EOS]",
}
"""What the folder names as the end of a text."""
SHAPES = tuple(ENDS)


@cache
def definition(shape: str) -> str:
    """The `tokenizer.json` of a shape."""
    return _MAKERS[shape]()


def tokenizer(shape: str) -> Tokenizer:
    """The library's tokenizer of a shape, as its file makes it."""
    return Tokenizer.from_str(definition(shape))


def write_folder(folder: Path, shape: str, **changes: Any) -> Path:
    """A folder with `tokenizer.json` and the files beside it; `changes` are keys of `tokenizer_config.json`."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tokenizer.json").write_text(definition(shape))
    config: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": ENDS[shape]}
    if shape in BEGINS and shape != "bert":
        config["bos_token"] = {"content": BEGINS[shape], "lstrip": False, "special": True, "__type": "AddedToken"}
    if shape == "bert":
        config |= {"cls_token": "[CLS]", "sep_token": "[SEP]", "pad_token": "[PAD]", "mask_token": "[MASK]"}
    (folder / "tokenizer_config.json").write_text(json.dumps({**config, **changes}))
    return folder


def _learned(pre: Any, normalizer: Any, *, size: int = 120) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """Vocabulary and merges of a small BPE."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre
    if normalizer is not None:
        bpe.normalizer = normalizer
    bpe.train_from_iterator(TEXTS, trainers.BpeTrainer(vocab_size=size, show_progress=False))
    model = json.loads(bpe.to_str())["model"]
    return model["vocab"], [tuple(merge) for merge in model["merges"]]


def _sentencepiece(specials: list[str], *, prepend: bool) -> Tokenizer:
    """A BPE over text with ▁ for spaces, whose unknown characters are bytes."""
    steps = [normalizers.Prepend("▁")] if prepend else []
    normalizer = normalizers.Sequence([*steps, normalizers.Replace(" ", "▁")])
    learned, merges = _learned(pre_tokenizers.Split(Regex("▁[^▁]*"), "isolated"), normalizer)
    words = [word for word in learned if word.isascii() or "▁" in word]  # other characters are bytes
    merges = [pair for pair in merges if "".join(pair) in words and set(pair) <= set(words)]
    vocabulary = {token: number for number, token in enumerate([*specials, *BYTES, *words])}
    made = Tokenizer(models.BPE(vocab=vocabulary, merges=merges, unk_token=UNKNOWN, fuse_unk=True, byte_fallback=True))
    made.normalizer = normalizer
    tail = [decoders.Strip(" ", 1, 0)] if prepend else []
    made.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), *tail])
    made.add_special_tokens(specials)
    return made


def _begins_with(made: Tokenizer, token: str, *, first: Any = None) -> None:
    template = processors.TemplateProcessing(single=f"{token} $A", special_tokens=[(token, made.token_to_id(token))])
    made.post_processor = template if first is None else processors.Sequence([first, template])


def _llama2() -> str:
    made = _sentencepiece([UNKNOWN, "<s>", "</s>"], prepend=True)
    _begins_with(made, "<s>")
    return made.to_str()


def _mistral() -> str:
    made = _sentencepiece([UNKNOWN, "<s>", "</s>"], prepend=True)
    made.normalizer = None
    made.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    _begins_with(made, "<s>")
    made.add_special_tokens(["[INST]", "[/INST]"])
    return made.to_str()


def _gemma() -> str:
    made = _sentencepiece(["<pad>", "<eos>", "<bos>", UNKNOWN, "<mask>"], prepend=False)
    made.add_tokens(["</s>", "<h1>"])  # ordinary tokens of HTML
    _begins_with(made, "<bos>")
    return made.to_str()


def _byte_level(words: str | None, *, size: int = 320) -> Tokenizer:
    pre: Any = pre_tokenizers.ByteLevel(add_prefix_space=False)
    if words is not None:
        whole = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        pre = pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(words), "isolated"), whole])
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    bpe.train_from_iterator(TEXTS, trainers.BpeTrainer(vocab_size=size, initial_alphabet=alphabet, show_progress=False))
    bpe.decoder = decoders.ByteLevel()
    bpe.post_processor = processors.ByteLevel(trim_offsets=False)
    return bpe


def _llama3() -> str:
    made = _byte_level(LLAMA3_WORDS)
    made.add_special_tokens(["<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|eot_id|>"])
    _begins_with(made, "<|begin_of_text|>", first=processors.ByteLevel(trim_offsets=False))
    return made.to_str()


def _qwen() -> str:
    made = _byte_level(LLAMA3_WORDS.replace("{1,3}", ""))
    made.normalizer = normalizers.NFC()
    made.add_special_tokens(["<|endoftext|>", "<|im_start|>", "<|im_end|>"])
    made.add_tokens([AddedToken("<tool_call>", normalized=False)])
    return made.to_str()


def _gpt2() -> str:
    made = _byte_level(None)
    made.add_special_tokens(["<|endoftext|>"])
    return made.to_str()


def _kimi() -> str:
    """Special tokens at the ids of the published ones: behind the vocabulary, with holes."""
    made = _byte_level(LLAMA3_WORDS)
    specials = ["[BOS]", "[EOS]", "<|im_end|>", "[UNK]", "[PAD]"]
    made.add_special_tokens(specials)
    content = json.loads(made.to_str())
    for entry, place in zip(content["added_tokens"], (0, 1, 2, 54, 55), strict=True):
        entry["id"] = len(content["model"]["vocab"]) + place
    return json.dumps(content)


def _t5() -> str:
    """A Unigram whose end is a piece of the model, too."""
    unigram = Tokenizer(models.Unigram())
    unigram.normalizer = normalizers.Sequence([normalizers.Nmt(), normalizers.NFKC()])
    unigram.pre_tokenizer = pre_tokenizers.Metaspace()
    specials = ["<pad>", "</s>", UNKNOWN]
    trainer = trainers.UnigramTrainer(vocab_size=100, special_tokens=specials, unk_token=UNKNOWN, show_progress=False)
    unigram.train_from_iterator(TEXTS, trainer)
    unigram.decoder = decoders.Metaspace()
    unigram.add_special_tokens([f"<extra_id_{number}>" for number in range(3)])
    unigram.post_processor = processors.TemplateProcessing(
        single="$A </s>", pair="$A </s> $B </s>", special_tokens=[("</s>", 1)]
    )
    return unigram.to_str()


def _bert() -> str:
    specials = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    made = Tokenizer(models.WordPiece(unk_token="[UNK]"))  # noqa: S106 - a token of text
    made.normalizer = normalizers.BertNormalizer()
    made.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    made.train_from_iterator(
        TEXTS, trainers.WordPieceTrainer(vocab_size=150, special_tokens=specials, show_progress=False)
    )
    made.decoder = decoders.WordPiece()
    made.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    return made.to_str()


_MAKERS = {
    "llama2": _llama2,
    "llama3": _llama3,
    "mistral": _mistral,
    "gemma": _gemma,
    "qwen": _qwen,
    "t5": _t5,
    "bert": _bert,
    "gpt2": _gpt2,
    "kimi": _kimi,
}
