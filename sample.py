"""Continue text with a trained model.

    python sample.py runs/quickstart --prompt "Once upon a time" --temperature 0.8
    echo "Once upon a time" | python sample.py runs/quickstart/checkpoints/step-00001000 --num-samples 3 --json

In: a run folder, a checkpoint or a Hugging Face folder, and prompts. Out: text on standard output, as it is made
where there is one. Exit code 0: done; 2: a mistake to mend, told in one message.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path

from pipeline.errors import UserError, run_command
from pipeline.generate.arguments import Arguments, answer_at_once, read_arguments
from pipeline.train.processes.launched import prepare_allocator

if __name__ == "__main__":
    run_command(partial(answer_at_once, __doc__))
    prepare_allocator()

import torch

from pipeline.data.tokenizer import TextTokenizer, load_tokenizer
from pipeline.data.tokenizer_schema import LARGEST_TOKENIZER
from pipeline.generate.decode import to_bf16
from pipeline.generate.text import Piece, finished, write
from pipeline.model.hf import is_hf_folder, load_hf
from pipeline.model.transformer import Decoder
from pipeline.train.saving.checkpoint import load_model, read_state, resolve_checkpoint
from pipeline.train.saving.storage import read_bytes
from pipeline.untrusted import LARGEST_JSON, read_regular


def main() -> None:
    """Prompts, model, text: in the order of the flow."""
    arguments = read_arguments(__doc__)
    prompts = read_prompts(arguments)
    model, tokenizer, eos_ids = load(arguments.source, device=choose_device(arguments.device))
    if arguments.precision == "bf16":
        to_bf16(model)
    pieces = write(
        model,
        tokenizer,
        prompts,
        options=arguments.sampling,
        eos_ids=() if arguments.ignore_eos else eos_ids,
        stops=[text for texts in arguments.stop for text in texts],
    )
    if arguments.json:
        print_json(pieces, prompts, seed=arguments.sampling.seed)
    elif len(prompts) * arguments.sampling.num_samples == 1:
        print_as_it_comes(pieces, prompts[0])
    else:
        print_samples(pieces, prompts)


def read_prompts(arguments: Arguments) -> list[str]:
    """The texts to continue, in the order given. Errors: a file that cannot be read, text that is not UTF-8."""
    named = [text for texts in arguments.prompt for text in texts]
    if not named and arguments.prompt_file is None:
        named = [""] if sys.stdin.isatty() else ["-"]
    if named.count("-") > 1:
        raise UserError("standard input can be only one of the prompts: give - once")
    prompts = [decode_prompt(sys.stdin.buffer.read(), "standard input") if text == "-" else text for text in named]
    if arguments.prompt_file is not None:
        try:
            content = read_regular(arguments.prompt_file, limit=LARGEST_JSON)
            prompts.append(decode_prompt(content, str(arguments.prompt_file)))
        except OSError as error:
            raise UserError(f"cannot read the prompt file {arguments.prompt_file}: {error.strerror}") from None
    for prompt in prompts:
        if any("\ud800" <= character <= "\udfff" for character in prompt):  # how Python passes on undecodable arguments
            raise UserError(f"the prompt {prompt!r} is not valid UTF-8")
    return prompts


def decode_prompt(data: bytes, origin: str) -> str:
    """UTF-8 text without its last line break."""
    try:
        return data.decode("utf-8").removesuffix("\n").removesuffix("\r")
    except UnicodeDecodeError as error:
        raise UserError(f"{origin} is not valid UTF-8: byte {error.start} is 0x{data[error.start]:02x}") from None


def choose_device(name: str) -> torch.device:
    """The device asked for. Errors: CUDA where there is none."""
    if name == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda, but this PyTorch sees no CUDA device: use --device cpu")
    return torch.device("cuda" if name != "cpu" and torch.cuda.is_available() else "cpu")


def load(source: str, *, device: torch.device) -> tuple[Decoder, TextTokenizer, frozenset[int]]:
    """Model, tokenizer and the tokens that end a text. Errors: nothing to load, or a tokenizer that is not its own."""
    if is_hf_folder(folder := Path(source)):
        tokenizer = load_tokenizer(str(folder / "tokenizer.json"))
        return load_hf(folder).to(device), tokenizer, tokenizer.end_ids
    checkpoint = resolve_checkpoint(source)
    state = read_state(checkpoint)
    file = checkpoint / "tokenizer.json"
    content = read_bytes(file, limit=LARGEST_TOKENIZER)
    tokenizer = TextTokenizer.from_content(content, origin=file, eos=state.tokenizer_eos_id)
    if tokenizer.fingerprint != state.tokenizer_fingerprint:
        raise UserError(
            f"{checkpoint} was trained with the tokenizer {state.tokenizer_fingerprint[:12]}, but its tokenizer.json "
            f"is {tokenizer.fingerprint[:12]}: put the dataset's tokenizer.json back"
        )
    model, _ = load_model(checkpoint, device=device)
    return model, tokenizer, tokenizer.end_ids


def print_as_it_comes(pieces: Iterator[Piece], prompt: str) -> None:
    """The prompt and its text, each character as soon as it is certain."""
    print(prompt, end="", flush=True)
    for piece in pieces:
        print(piece.text, end="", flush=True)
    print(flush=True)


def print_samples(pieces: Iterator[Piece], prompts: list[str]) -> None:
    """Whole texts, each under a header."""
    for sample in finished(pieces):
        print(f"--- prompt {sample.prompt}, sample {sample.sample} ---")
        print(prompts[sample.prompt] + sample.text, flush=True)


def print_json(pieces: Iterator[Piece], prompts: list[str], *, seed: int) -> None:
    """One object per sample; `tokens` are all that were generated, those of a stop string too."""
    for sample in finished(pieces):
        record = {
            "prompt": prompts[sample.prompt],
            "text": sample.text,
            "tokens": sample.tokens,
            "finish_reason": sample.finish,
            "seed": seed,
        }
        print(json.dumps(record, ensure_ascii=False), flush=True)


if __name__ == "__main__":
    run_command(main)
