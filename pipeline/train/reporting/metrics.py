"""The record of a run: metrics.jsonl, the console line, throughput and MFU.

In: what each step returned and how long it took. Out: one JSON object per logged step, at full precision, each
step once even after kills. Everything else (console, curves, trackers) is fed from it.
"""

from __future__ import annotations

import json
import math
import os
import re
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any, Required

import torch
from pydantic import TypeAdapter, ValidationError
from rich.console import Console
from rich.markup import escape
from rich.text import Text
from typing_extensions import TypedDict

from pipeline.config import Config
from pipeline.errors import UserError
from pipeline.files import naming, write_durably
from pipeline.model.transformer import Decoder, flops_per_token
from pipeline.ramp import Ramp
from pipeline.train.runtime import Runtime
from pipeline.untrusted import LARGEST_JSON, read_regular

# Dense bf16 (fp16) peak in TFLOP/s, from the vendors' data sheets; sparsity figures are twice these.
# A name counts where it stands as whole words; laptop chips and slices of a GPU (MIG) have other figures.
PEAK_TFLOPS = (
    ("GB300", 2500.0),
    ("GB200", 2500.0),
    ("B200", 2250.0),
    ("GH200", 989.0),
    ("H200", 989.0),
    ("H100 PCIe", 756.0),  # before the plain H100, which its name holds too
    ("H100 NVL", 835.0),
    ("H100", 989.0),
    ("H800", 989.0),
    ("H20", 148.0),
    ("A100", 312.0),
    ("A800", 312.0),
    ("L40S", 362.0),
    ("L40", 181.0),
    ("L4", 121.0),
    ("A40", 150.0),
    ("A30", 165.0),
    ("A10", 125.0),
    ("RTX 6000 Ada", 364.0),
    ("RTX A6000", 154.8),
    ("RTX 5090", 209.5),
    ("RTX 4090", 165.2),
    ("RTX 3090", 71.0),
    ("MI325X", 1307.0),
    ("MI300X", 1307.0),
    ("MI250X", 191.5),  # one of its two dies, which PyTorch sees as two devices
)

WAITED_TOO_LONG = 0.02  # share of the time
EACH_LOSS = "val_loss/"  # followed by the name of a dataset
COLUMNS = 80  # of the terminal on which a line of a step shall not wrap


def device_peak_flops(device: torch.device, precision: torch.dtype, *, override_tflops: float | None) -> float | None:
    """Peak FLOP/s of one device, or None where it is not known: then no MFU is shown instead of a wrong one."""
    if override_tflops is not None:
        return override_tflops * 1e12
    if device.type != "cuda" or precision == torch.float32:
        return None
    name = torch.cuda.get_device_name(device)
    if re.search(r"\b(Laptop|MIG)\b", name):
        return None
    return next((peak * 1e12 for part, peak in PEAK_TFLOPS if re.search(rf"\b{part}\b", name)), None)


@dataclass
class Meter:
    """Time and tokens of the steps since the last logged one; evaluation and saving are not in it.

    The first step of a process is left out: it compiles and warms caches.
    """

    flops_per_token: int
    peak_flops: float | None
    seconds: float = 0.0
    waited: float = 0.0
    tokens: int = 0
    steps: int = -1

    def count(self, *, tokens: int, seconds: float, waited: float) -> None:
        """Add one step: what it trained on, the seconds it computed and those it waited for data before that."""
        self.steps += 1
        if self.steps > 0:
            self.seconds += waited + seconds
            self.waited += waited
            self.tokens += tokens

    def take(self) -> dict[str, float]:
        """Rates since the last call: tokens per second over all ranks, seconds per step, MFU where known."""
        if self.steps <= 0 or self.seconds <= 0:
            return {}
        rate = self.tokens / self.seconds
        rates = {
            "tokens_per_second": rate,
            "step_seconds": self.seconds / self.steps,
            "data_wait_seconds": self.waited / self.steps,
        }
        if self.peak_flops is not None:
            rates["mfu"] = rate * self.flops_per_token / self.peak_flops
        self.seconds, self.waited, self.tokens, self.steps = 0.0, 0.0, 0, 0
        return rates


def meter_of(config: Config, model: Decoder, runtime: Runtime) -> Meter:
    """Throughput of all ranks, held against their peak where it is known."""
    peak = device_peak_flops(runtime.device, runtime.precision, override_tflops=config.log.peak_tflops)
    flops = flops_per_token(model, context_length=config.model.context_length)
    return Meter(flops_per_token=flops, peak_flops=None if peak is None else peak * runtime.world_size)


class Line(TypedDict, total=False):
    """One line of metrics.jsonl; docs/run_folder.md says what each key means. Of a blend also val_loss/NAME."""

    step: Required[int]
    tokens: int
    time: str
    elapsed_seconds: float
    peak_memory_bytes: int
    lr: float
    loss: float
    grad_norm: float
    skipped: bool
    tokens_per_second: float
    step_seconds: float
    data_wait_seconds: float
    mfu: float
    val_loss: float
    val_bits_per_byte: float
    val_targets: int


_LINE = TypeAdapter(Line)


class Record:
    """metrics.jsonl: append-only, cut back to the step that a run resumes from."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def cut_after(self, step: int, *, evaluated: bool = True) -> None:
        """Drop the lines of later steps, a line that a kill tore, and an evaluation of `step` that is still due."""
        if self.path.exists():
            lines = [line for line in read_record(self.path) if line["step"] <= step]
            kept = [line for line in lines if evaluated or line["step"] < step or "val_loss" not in line]
            write_durably(self.path, "".join(json.dumps(line) + "\n" for line in kept).encode())

    def set_aside(self) -> Path:
        """Rename the record of a run whose checkpoints are gone, so that a new start does not erase it."""
        number = next(n for n in count(1) if not self.path.with_name(f"metrics.{n}.jsonl").exists())
        return self.path.rename(self.path.with_name(f"metrics.{number}.jsonl"))

    def write(self, line: dict[str, Any]) -> None:
        """Append one object."""
        with naming(self.path), self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")

    def sync(self) -> None:
        """Force the record to disk: before a checkpoint, which must not outlive its lines."""
        if self.path.exists():
            with naming(self.path), self.path.open("rb") as file:
                os.fsync(file.fileno())


def read_record(path: Path) -> list[dict[str, Any]]:
    """All lines of a metrics.jsonl, as dictionaries; a last line that a kill tore is left out.

    Raises `UserError` naming file and line for anything else that `Record.write` did not write.
    """
    content = read_regular(path, limit=LARGEST_JSON).removesuffix(b"\n")
    lines = content.split(b"\n") if content else []
    parsed = []
    for number, line in enumerate(lines, start=1):
        try:
            values = json.loads(line.decode())
        except (ValueError, RecursionError):
            if number == len(lines):
                break
            raise _bad_line(path, number, "is not JSON") from None
        try:
            _LINE.validate_python(values, strict=True)
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(map(str, first["loc"])) or type(values).__name__
            raise _bad_line(path, number, f"is no line of a record ({where}: {first['msg']})") from None
        wrong = [key for key, value in values.items() if key.startswith(EACH_LOSS) and type(value) is not float]
        if wrong:
            raise _bad_line(path, number, f"is no line of a record ({wrong[0]}: Input should be a valid number)")
        parsed.append(values)
    return parsed


def _bad_line(path: Path, number: int, what: str) -> UserError:
    return UserError(
        f"{path}, line {number} {what}; mend it, or move the file away: the run then goes on without its earlier lines"
    )


class ConsoleLine:
    """One line per logged step, for people."""

    def __init__(self, console: Console, *, total_steps: int, ramp: Ramp) -> None:
        self.console = console
        self.total_steps = total_steps
        self.ramp = ramp
        self._warned = False

    def show(self, line: dict[str, Any]) -> None:
        """Print a training or an evaluation line; once in a run, that it waits for its data."""
        place = f"[bold]step {line['step']:>{len(str(self.total_steps))}}/{self.total_steps}[/bold]"
        if "val_loss" in line:
            parts = [place, f"[green]validation loss {line['val_loss']:.4f}[/green]"]
            parts.append(f"{line['val_bits_per_byte']:.4f} bits per byte")
            each = [key for key in line if key.startswith(EACH_LOSS)]
            parts += [escape(f"{key.removeprefix(EACH_LOSS)} {line[key]:.4f}") for key in each]
        elif line.get("skipped"):
            parts = [place, "[yellow]skipped: loss or gradient norm was not finite[/yellow]"]
        else:
            rate = f"{line['lr']:.1e}".replace("e-0", "e-")
            parts = [place, f"loss {line['loss']:.4f}", f"lr {rate}", f"norm {_norm(line['grad_norm'])}"]
            parts += self._rates(line)
        wide = Text.from_markup("  ".join(parts))
        self.console.print(wide if len(wide) <= COLUMNS else Text.from_markup(" ".join(parts)))
        if _waiting(line) > WAITED_TOO_LONG and not self._warned:
            self._warned = True
            self.console.print(
                f"[yellow]warning: {_waiting(line):.0%} of the time was spent waiting for data (said once; see "
                "data_wait_seconds in the record): put the dataset on a local disk, or stop what else uses it[/yellow]"
            )

    def _rates(self, line: dict[str, Any]) -> list[str]:
        if "tokens_per_second" not in line:
            return []
        left = seconds_left(line, total_steps=self.total_steps, ramp=self.ramp)
        parts = [f"{shortened(line['tokens_per_second'])} tok/s"]
        if "mfu" in line:
            parts.append(f"MFU {line['mfu']:.0%}")
        parts.append(f"ETA {_roughly(left)}")
        if _waiting(line) > WAITED_TOO_LONG:
            parts.append(f"[yellow]wait {_waiting(line):.0%}[/yellow]")
        return parts


def seconds_left(line: dict[str, Any], *, total_steps: int, ramp: Ramp) -> float:
    """Seconds to the last step at the rate of a logged line; evaluations and checkpoints come on top."""
    tokens = ramp.before(total_steps + 1) - ramp.before(line["step"] + 1)
    return float(tokens / line["tokens_per_second"])


def shortened(number: float) -> str:
    """With three digits or more: `980`, `52.1k`, `1.23M`."""
    for power, unit in ((9, "G"), (6, "M"), (3, "k")):
        if number >= 0.9995 * 10**power:
            return f"{number / 10**power:.{max(0, 2 - int(math.log10(number / 10**power * 1.0005)))}f}{unit}"
    return f"{number:.0f}"


def _norm(norm: float) -> str:
    """In five characters: `0.51`, `12.34`, `123`, `3e-3`."""
    if norm < 0.01:
        return f"{norm:.0e}".replace("e-0", "e-")
    return f"{norm:.{2 if norm < 99.99 else 0}f}"


def _roughly(seconds: float) -> str:
    """Two units of time are enough: `3d04h`, `5h20m`, `12m05s`; `52d` from ten days on."""
    rest = round(seconds)
    if rest >= 864_000:
        return f"{rest // 86400}d"
    for size, unit, smaller, name in ((86400, "d", 3600, "h"), (3600, "h", 60, "m")):
        if rest >= size:
            return f"{rest // size}{unit}{rest % size // smaller:02d}{name}"
    return f"{rest // 60}m{rest % 60:02d}s"


def _waiting(line: dict[str, Any]) -> float:
    """Share of the time of a logged interval in which there was no data."""
    return float(line["data_wait_seconds"] / line["step_seconds"]) if "step_seconds" in line else 0.0
