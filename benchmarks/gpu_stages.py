"""What `benchmarks.gpu` measures: one function for each stage, from a `Place` to a dict of figures."""

from __future__ import annotations

import hashlib
import inspect
import itertools
import subprocess
import sys
import tempfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import DeviceType  # type: ignore[attr-defined] # documented, but not marked as exported

from benchmarks.gpu_runs import ROOT, TINY, Place, Training, middle, pretrain, short, succeed
from benchmarks.plain_gpt import Sizes, step_seconds
from pipeline.config import ModelConfig
from pipeline.data.tokenizer import load_tokenizer
from pipeline.generate.decode import Options, generate, to_bf16
from pipeline.model.hf import save_hf
from pipeline.model.transformer import build_model, initialise

Figures = dict[str, Any]
SEQUENCES = 480  # of 1,024 tokens in a global batch: whole micro-batches of 12 and of 40
AS_OTHERS = ["--train.micro_batch", "40", "--train.batch_tokens", str(SEQUENCES * 1024)]
GPT2 = Sizes(layers=12, heads=12, width=768, context=1024, vocabulary=50_304)
SMALL = Sizes(layers=2, heads=2, width=64, context=64, vocabulary=512)
PACKAGES = ("torch", "triton", "transformers", "accelerate", "tokenizers", "numpy", "pydantic")


def hardware(place: Place) -> Figures:
    """What the machine is, and its ceilings: matrix products at the model's shapes, and copies."""
    figures: Figures = {"python": sys.version.split()[0], **{name: _version(name) for name in PACKAGES}}
    if place.device.type == "cuda":
        properties = torch.cuda.get_device_properties(0)
        figures |= {
            "gpu": properties.name,
            "memory_gb": round(properties.total_memory / 1e9, 1),
            "cudnn": torch.backends.cudnn.version(),  # type: ignore[no-untyped-call]
            "nccl": str(torch.cuda.nccl.version()),  # type: ignore[no-untyped-call]
        }
    rows = 512 if place.smoke else 40 * 1024
    width = 64 if place.smoke else 768
    shapes = {
        "products 8192^3": (8192, 8192, 8192) if not place.smoke else (256, 256, 256),
        "products mlp": (rows, width, 4 * width),
        "products attention out": (rows, width, width),
        "products head": (rows, width, 50_304 if not place.smoke else 512),
    }
    for name, (m, k, n) in shapes.items():
        a = torch.randn(m, k, device=place.device, dtype=torch.bfloat16)
        b = torch.randn(k, n, device=place.device, dtype=torch.bfloat16)
        seconds = _timed(lambda a=a, b=b: a @ b, place)  # type: ignore[misc] # bound at once
        figures[f"{name} TFLOP/s"] = round(2 * m * k * n / seconds / 1e12, 1)
    source = torch.randn((1 << 20) if place.smoke else (1 << 30), device=place.device)
    target = torch.empty_like(source)
    seconds = _timed(lambda: target.copy_(source), place)
    figures["copy GB/s"] = round(2 * source.nbytes / seconds / 1e9)
    return figures


def attention(place: Place) -> Figures:
    """Milliseconds of attention, forward and backward, at GPT-2's shape: which way is quick with which mask."""
    rows, heads, time, width = (2, 2, 64, 32) if place.smoke else (16, 12, 1024, 64)
    q, k, v = (
        torch.randn(rows, heads, time, width, device=place.device, dtype=torch.bfloat16, requires_grad=True)
        for _ in range(3)
    )
    documents = (torch.arange(time, device=place.device) // (time // 4)).expand(rows, time)
    causal = torch.ones(time, time, dtype=torch.bool, device=place.device).tril()
    mask = (causal & (documents[:, :, None] == documents[:, None, :])).unsqueeze(1)
    ways: dict[str, Callable[[], Tensor]] = {
        "causal": lambda: F.scaled_dot_product_attention(q, k, v, is_causal=True),
        "document mask": lambda: F.scaled_dot_product_attention(q, k, v, attn_mask=mask),
    }
    if place.device.type == "cuda":  # it has no backward pass on a CPU
        ways["document mask, FlexAttention"] = _flex(q, k, v, documents)
        ways["documents, varlen"] = _varlen(q, k, v, time // 4)
    figures: Figures = {}
    for name, way in ways.items():
        figures[f"{name} ms"] = round(1e3 * _timed(lambda way=way: _backward(way()), place), 3)  # type: ignore[misc]
        figures[f"{name} kernel"] = _kernel(way)
    return figures


def train_124m(place: Place) -> Figures:
    """`gpt_124m.yaml` with micro-batches of 40: 16 steps with a checkpoint, then 16 tokens of text."""
    flags = [] if place.smoke else AS_OTHERS
    run = succeed(pretrain(place, "gpt_124m", "gpt_124m", *short(16, save=8), *flags))
    began = perf_counter()
    sampled = subprocess.run(
        [sys.executable, "sample.py", str(run.folder), "--prompt", "def main", "--max-new-tokens", "16"],
        cwd=ROOT, capture_output=True, text=True, check=True,
    )  # fmt: skip
    steps = run.step_seconds()
    calm = [seconds for step, seconds in steps.items() if step not in (2, 9, 10)]
    return {
        **_speed(run, median(calm)),
        "stall of a save s": round(max(steps[9], steps[10]) - median(calm), 3),
        "sample s": round(perf_counter() - began, 1),
        "sample": sampled.stdout.strip()[:80],
    }


def train_124m_bf16(place: Place) -> Figures:
    """The same with the residual stream in bf16, killed after ten steps."""
    flags = ["--train.precision", "bf16", "--train.residual", "bf16"]
    if not place.smoke:
        flags += AS_OTHERS
    run = pretrain(place, "gpt_124m_bf16", "gpt_124m", *short(16), *flags, kill_after=10)
    return _speed(run, middle(list(run.step_seconds().values())))


def plain_12(place: Place) -> Figures:
    """A plain PyTorch GPT-2 at the same batch, by micro-batches of 12, as its users run it."""
    return _plain(place, micro_batch=2 if place.smoke else 12)


def plain_40(place: Place) -> Figures:
    """The same by micro-batches of 40, as ours."""
    return _plain(place, micro_batch=4 if place.smoke else 40)


def _plain(place: Place, *, micro_batch: int) -> Figures:
    sizes, sequences = (SMALL, 2 * micro_batch) if place.smoke else (GPT2, SEQUENCES)
    seconds = step_seconds(
        sizes,
        micro_batch=micro_batch,
        accumulation=sequences // micro_batch,
        steps=5 if place.smoke else 7,
        device=place.device,
        compiled=not place.smoke,
    )
    return {
        "tokens/s": round(sequences * sizes.context / middle(seconds)),
        "first step s": round(seconds[0], 1),
        "steps s": [round(one, 3) for one in seconds],
    }


def trainer(place: Place) -> Figures:
    """The Trainer of transformers with GPT-2 at the same batch: compiled, bf16, fused AdamW, no dropout."""
    import transformers

    size, accumulation, steps = (4, 2, 5) if place.smoke else (40, SEQUENCES // 40, 7)
    sizes = SMALL if place.smoke else GPT2
    model = transformers.GPT2LMHeadModel(
        transformers.GPT2Config(
            vocab_size=sizes.vocabulary, n_positions=sizes.context, n_embd=sizes.width, n_layer=sizes.layers,
            n_head=sizes.heads, resid_pdrop=0, embd_pdrop=0, attn_pdrop=0, use_cache=False,
        )
    )  # fmt: skip
    stamps = [0.0]

    class Clock(transformers.TrainerCallback):
        def on_step_begin(self, *_: Any, **__: Any) -> None:
            if stamps == [0.0]:
                stamps[0] = perf_counter()

        def on_step_end(self, *_: Any, **__: Any) -> None:
            if place.device.type == "cuda":
                torch.cuda.synchronize()
            stamps.append(perf_counter())

    rows = torch.randint(0, sizes.vocabulary, (size * accumulation * steps, sizes.context))
    with tempfile.TemporaryDirectory() as folder:
        arguments = transformers.TrainingArguments(
            output_dir=folder, max_steps=steps, per_device_train_batch_size=size,
            gradient_accumulation_steps=accumulation, bf16=True, torch_compile=not place.smoke,
            optim="adamw_torch_fused", learning_rate=6e-4, weight_decay=0.1, max_grad_norm=1.0, report_to=[],
            save_strategy="no", logging_strategy="no", disable_tqdm=True, use_cpu=place.smoke,
        )  # fmt: skip
        dataset = [{"input_ids": row, "labels": row} for row in rows]
        transformers.Trainer(model, arguments, train_dataset=dataset, callbacks=[Clock()]).train()
    seconds = [after - before for before, after in itertools.pairwise(stamps)]
    return {
        f"micro-batch {size} tokens/s": round(size * accumulation * sizes.context / middle(seconds)),
        "first step s": round(seconds[0], 1),
        "steps s": [round(one, 3) for one in seconds],
    }


def train_1558m(place: Place) -> Figures:
    """`gpt_1558m.yaml` with a micro-batch for a GPU of 141 GB and a smaller global batch; killed before it saves."""
    flags = [] if place.smoke else ["--train.micro_batch", _xl_micro_batch(), "--train.batch_tokens", "98304"]
    run = pretrain(place, "gpt_1558m", "gpt_1558m", *short(100), *flags, kill_after=9)
    return _speed(run, middle(list(run.step_seconds().values())))


def _xl_micro_batch() -> str:
    return "24" if torch.cuda.get_device_properties(0).total_memory > 100e9 else "12"


def generation(place: Place) -> Figures:
    """Tokens per second of a GPT-2 124M with random weights, greedy, bf16, beside `generate` of transformers."""
    import transformers

    prompt_tokens, new = (8, 16) if place.smoke else (16, 128)
    config = ModelConfig(mlp="gelu_tanh")
    if place.smoke:
        config = ModelConfig(mlp="gelu_tanh", n_layers=2, n_heads=2, d_model=64, context_length=64)
    vocabulary = 512 if place.smoke else 50_257
    ours = build_model(config, n_tokens=vocabulary)
    initialise(ours, seed=1)
    ours.eval()
    with tempfile.TemporaryDirectory() as folder:
        files = load_tokenizer("bytes").exported(context_length=config.context_length)
        save_hf(ours, Path(folder) / "hf", tokenizer_files=files, eos_id=256)
        theirs: Any = transformers.AutoModelForCausalLM.from_pretrained(Path(folder) / "hf", dtype=torch.bfloat16)
    theirs.train(False)
    theirs.to(place.device)
    ours = to_bf16(ours).to(place.device)
    figures: Figures = {}
    for rows in (1, 2) if place.smoke else (1, 32):
        prompts = torch.randint(0, vocabulary, (rows, prompt_tokens))

        def our_tokens(prompts: Tensor = prompts) -> None:
            for _ in generate(ours, prompts.tolist(), options=Options(max_new_tokens=new, temperature=0)):
                pass

        def their_tokens(prompts: Tensor = prompts) -> None:
            theirs.generate(
                prompts.to(place.device), max_new_tokens=new, min_new_tokens=new, do_sample=False, pad_token_id=0
            )

        for name, way in (("ours", our_tokens), ("transformers", their_tokens)):
            times = [_seconds(way, place) for _ in range(4)]
            figures[f"{name}, batch {rows}, first s"] = round(times[0], 2)
            figures[f"{name}, batch {rows} tokens/s"] = round(rows * new / median(times[1:]), 1)
        ratio = figures[f"ours, batch {rows} tokens/s"] / figures[f"transformers, batch {rows} tokens/s"]
        figures[f"ratio, batch {rows}"] = round(ratio, 2)
    return figures


def profile(place: Place) -> Figures:
    """Where a step of two micro-batches spends its time on the device; the longest kernels are printed."""
    import pretrain as script
    from pipeline.cli import load_config
    from pipeline.data.loading.blend import Phase
    from pipeline.data.loading.loader import Loader
    from pipeline.data.loading.sources import open_sources
    from pipeline.train.optim import build_optimizer
    from pipeline.train.runtime import Runtime
    from pipeline.train.step import Trainer

    sizes = TINY if place.smoke else ["--train.micro_batch", "40", "--train.batch_tokens", "81920"]
    flags = [*short(10), *sizes]
    config = load_config([str(ROOT / "configs/gpt_124m.yaml"), "--data.path", str(place.data), *flags])
    data = open_sources(config)
    runtime = Runtime.start(config)
    config, parallel = script.make_model(config, data, runtime)
    loader = Loader(data.blend([Phase(row=0, sources=data.described())]), config, rank=0, world_size=1)
    step = Trainer(
        parallel, build_optimizer(parallel.model, config.optim), loader=loader, runtime=runtime, config=config
    )
    batch = loader.batch(0, config.ramp_of_rows.full)
    for number in range(1, 4):
        step.step(batch, step=number, lr=1e-4)
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities[: 1 if place.smoke else 2]) as found:
        began = perf_counter()
        step.step(batch, step=4, lr=1e-4)
        wall = perf_counter() - began
    kernels = _kernels(found, on_device=not place.smoke)
    for name, (milliseconds, calls) in list(kernels.items())[:45]:
        print(f"{milliseconds:8.2f} ms {calls:5d} x  {name[:110]}")
    busy = sum(milliseconds for milliseconds, _ in kernels.values()) / 1e3
    runtime.stop()
    calls = sum(calls for _, calls in kernels.values())
    return {"step s": round(wall, 4), "kernels s": round(busy, 4), "kernels": calls}


def resume(place: Place) -> Figures:
    """Eight steps at once and as four, kill -9, four more: losses, norms and the last checkpoint, bit by bit."""
    flags = [*short(8, save=4), "--train.deterministic", "true"]
    if not place.smoke:
        flags += ["--train.micro_batch", "16", "--train.batch_tokens", "32768"]
    with ThreadPoolExecutor() as pool:
        at_once = pool.submit(pretrain, place, "whole", "gpt_124m", *flags)
        pretrain(place, "halves", "gpt_124m", *flags, kill_after=6)
        whole = succeed(at_once.result())
    halves = succeed(pretrain(place, "halves", "gpt_124m", *flags))
    keys = ("step", "loss", "grad_norm")
    same = [[line[key] for key in keys] for line in whole.record] == [[line[k] for k in keys] for line in halves.record]
    return {
        "losses and norms equal": same,
        "checkpoints equal": _digest(whole.folder) == _digest(halves.folder),
        "resumed from step": 9 - len(halves.stamps),
        "seconds": round(whole.seconds + halves.seconds, 1),
    }


def parity(place: Place) -> Figures:
    """A tiny model, 20 steps: the largest difference of a loss from that on the CPU in float32."""
    shape = [*short(20), *TINY]
    kinds = {"fp32": ("fp32", "false"), "fp32 compiled": ("fp32", "true"), "bf16": ("bf16", "false")}
    if not place.smoke:
        kinds["bf16 compiled"] = ("bf16", "true")

    def one(name: str, device: str, precision: str, compiled: str) -> Training:
        extra = ["--train.device", device, "--train.precision", precision, "--train.compile", compiled]
        return succeed(pretrain(place, f"parity-{name.replace(' ', '-')}", "gpt_124m", *shape, *extra))

    with ThreadPoolExecutor() as pool:
        expected = pool.submit(one, "cpu", "cpu", "fp32", "false")
        runs = {name: pool.submit(one, name, place.device.type, *kind) for name, kind in kinds.items()}
        right = expected.result().losses
        found = {name: run.result().losses for name, run in runs.items()}
    return {
        f"{name}, largest difference": max(abs(a - b) for a, b in zip(losses, right, strict=True))
        for name, losses in found.items()
    }


def torchrun(place: Place) -> Figures:
    """One rank under torchrun, single and fsdp, beside one process without it."""
    flags = short(4)
    if not place.smoke:
        flags += [*TINY, "--train.precision", "bf16", "--train.compile", "true"]
    with ThreadPoolExecutor() as pool:
        beside = pool.submit(pretrain, place, "alone", "gpt_124m", *flags)
        runs = {
            name: pool.submit(pretrain, place, name, "gpt_124m", *flags, "--parallel.strategy", name, torchrun=True)
            for name in ("single", "fsdp")
        }
    alone = succeed(beside.result())
    figures: Figures = {}
    for strategy, found in runs.items():
        run = succeed(found.result())
        differences = [abs(a - b) for a, b in zip(run.losses, alone.losses, strict=True)]
        figures[f"{strategy}, largest difference of a loss"] = max(differences)
    return figures


def tests(place: Place) -> Figures:
    """The tests that need a GPU; on a CPU they are skipped."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/test_cuda.py"]
    command += [] if place.smoke else ["-n", "4"]
    found = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    print(found.stdout, found.stderr)
    if found.returncode:
        raise RuntimeError(found.stdout.strip().splitlines()[-1])
    return {"summary": found.stdout.strip().splitlines()[-1]}


def _speed(run: Training, seconds: float) -> Figures:
    """Wall-clock tokens per second and MFU, and what the record says of itself."""
    last = run.record[-1]
    tokens = last["tokens"] / last["step"]
    return {
        "tokens/s": round(tokens / seconds),
        "MFU": round(tokens / seconds * last["mfu"] / last["tokens_per_second"], 4) if "mfu" in last else None,
        "record tokens/s": round(last["tokens_per_second"]),
        "peak memory GB": round(run.peak_bytes / 1e9, 1),
        "first step s": round(run.stamps[1], 1),
        "start to end s": round(run.seconds, 1),
        "steps s": [round(one, 3) for one in run.step_seconds().values()],
        "losses": [round(loss, 4) for loss in run.losses],
    }


def _digest(folder: Path) -> str:
    """Of all tensors of the newest checkpoint."""
    newest = sorted((folder / "checkpoints").glob("step-*"))[-1]
    found = hashlib.sha256()
    for file in sorted(newest.rglob("*.safetensors")):
        found.update(file.name.encode() + hashlib.sha256(file.read_bytes()).digest())
    return found.hexdigest()


def _flex(q: Tensor, k: Tensor, v: Tensor, documents: Tensor) -> Callable[[], Tensor]:
    """FlexAttention with a block mask of documents."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    def allowed(b: Tensor, _: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return (query >= key) & (documents[b, query] == documents[b, key])

    rows, _, time, _ = q.shape
    blocks = create_block_mask(allowed, rows, None, time, time, device=q.device)
    compiled: Any = torch.compile(flex_attention, dynamic=False)
    return lambda: compiled(q, k, v, block_mask=blocks)


def _varlen(q: Tensor, k: Tensor, v: Tensor, length: int) -> Callable[[], Tensor]:
    """Attention over documents laid end to end."""
    from torch.nn.attention import varlen

    rows, heads, time, width = q.shape
    starts = torch.arange(0, rows * time + 1, length, device=q.device, dtype=torch.int32)

    # before torch 2.12 causal attention was asked for by a flag, since then by a window
    flag = "is_causal" in inspect.signature(varlen.varlen_attn).parameters
    causal: dict[str, Any] = {"is_causal": True} if flag else {"window_size": (-1, 0)}
    attend: Any = varlen.varlen_attn

    def run() -> Tensor:
        flat = [x.transpose(1, 2).reshape(rows * time, heads, width) for x in (q, k, v)]
        out: Tensor = attend(*flat, starts, starts, length, length, **causal)
        return out

    return run


def _backward(out: Tensor) -> None:
    torch.autograd.backward(out, torch.ones_like(out))


def _kernel(way: Callable[[], Tensor]) -> str:
    """The kernel in which a way spends most of its forward pass."""
    if not torch.cuda.is_available():
        return "cpu"
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as found:
        way()
        torch.cuda.synchronize()
    longest = max(found.key_averages(), key=lambda event: event.self_device_time_total, default=None)
    return "" if longest is None else longest.key[:60]


def _kernels(found: torch.profiler.profile, *, on_device: bool) -> dict[str, tuple[float, int]]:
    """Milliseconds and calls of each kernel (on a CPU: of each operator), the longest first."""
    kind = DeviceType.CUDA if on_device else DeviceType.CPU
    totals: dict[str, tuple[float, int]] = {}
    for event in found.events() or []:  # type: ignore[no-untyped-call]
        if event.device_type == kind:
            spent, calls = totals.get(event.name, (0.0, 0))
            own = event.self_device_time_total if on_device else event.self_cpu_time_total
            totals[event.name] = spent + own / 1e3, calls + 1
    return dict(sorted(totals.items(), key=lambda item: -item[1][0]))


def _seconds(work: Callable[[], object], place: Place) -> float:
    """Wall seconds of one call, the device's work included."""
    began = perf_counter()
    work()
    if place.device.type == "cuda":
        torch.cuda.synchronize()
    return perf_counter() - began


def _timed(work: Callable[[], object], place: Place) -> float:
    """Median seconds of one call, after three to warm up."""
    for _ in range(3):
        work()
    calls = 3 if place.smoke else 10
    return median(_seconds(lambda: [work() for _ in range(calls)], place) / calls for _ in range(3))


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "missing"
