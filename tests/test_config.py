from __future__ import annotations

import json
import re
from itertools import accumulate
from pathlib import Path
from typing import Literal, get_args, get_origin

import pytest
import torch
import yaml

from pipeline.cli import load_config, read_command
from pipeline.config import Config, ModelConfig, RampStage, resolved
from pipeline.config_data import SourceConfig
from pipeline.errors import UserError
from pipeline.flags import flags_of
from pipeline.model.hf import _family_of
from pipeline.model.transformer import build_model, count_parameters
from pipeline.names import CONFIG_NAMES, likeness
from pipeline.seeds import named_seed

ROOT = Path(__file__).parent.parent
CONFIGS = sorted((ROOT / "configs").glob("*.yaml"))

# Published parameter counts and vocabularies: GPT-2 as released by OpenAI, Llama 3.2 1B by Meta.
PUBLISHED = {
    "gpt_124m": (124_439_808, 50_257),
    "gpt_350m": (354_823_168, 50_257),
    "gpt_774m": (774_030_080, 50_257),
    "gpt_1558m": (1_557_611_200, 50_257),
    "llama_1b": (1_235_814_400, 128_256),
}


@pytest.mark.parametrize("text", ["train: [1]", "train: [[]]", "data: [{path: a}]", "data: {sources: [a]}", "data: 5"])
def test_flags_over_a_section_that_is_none_are_one_message(tmp_path: Path, text: str) -> None:
    """Whatever stands in the file where a flag expects sections or a list of them."""
    flags = ("--train.steps", "7", "--data.sources.0.weight", "2", "--data.sources.3.path", "b")
    assert text.split(":")[0] in faults_of(tmp_path, text, *flags)


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_config_loads(path: Path) -> None:
    config = load_config([str(path)])
    assert config.run_dir == f"runs/{path.stem}"
    assert config.total_steps > 0


@pytest.mark.parametrize("name", PUBLISHED)
def test_parameter_count_is_the_published_one(name: str) -> None:
    count, vocabulary = PUBLISHED[name]
    config = load_config([str(ROOT / "configs" / f"{name}.yaml")])
    exact = ModelConfig.model_validate({**config.model.model_dump(), "vocab_size": vocabulary})
    with torch.device("meta"):
        assert count_parameters(build_model(exact, n_tokens=vocabulary)) == count


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_large_config_is_worth_its_cost_and_says_it(name: str) -> None:
    """Its comment names steps, tokens, epochs and FLOPs as they are, and the run would not warn about itself."""
    path = ROOT / "configs" / f"{name}.yaml"
    config = load_config([str(path)])
    (said,) = re.findall(
        r"^# Budget: ([\d,]+) steps x ([\d,]+) tokens = ([\d.]+) B tokens, ([\d.]+) epochs of ([\d.]+) B; (\S+) FLOPs",
        path.read_text(),
        re.MULTILINE,
    )
    steps, batch, tokens, epochs, corpus, flops = (float(number.replace(",", "")) for number in said)
    assert (config.total_steps, config.train.batch_tokens) == (steps, batch)
    assert tokens == pytest.approx(steps * batch / 1e9, rel=0.01)
    assert epochs == pytest.approx(tokens / corpus, abs=0.05)
    assert flops == pytest.approx(6 * PUBLISHED[name][0] * tokens * 1e9, rel=0.02)
    assert config.data.max_epochs is not None
    assert epochs < config.data.max_epochs
    assert 8 <= tokens * 1e9 / PUBLISHED[name][0] <= 100, "tokens of a parameter: about 20 is best for the compute"


def test_the_quickstart_has_a_shape_of_hugging_face() -> None:
    config = load_config([str(ROOT / "configs" / "quickstart.yaml")])
    _, settings = _family_of(config.model)
    assert settings["model_type"] == "qwen3"


def test_shakespeare_has_the_size_of_the_baseline() -> None:
    config = load_config([str(ROOT / "configs" / "shakespeare_char.yaml")])
    model, train = config.model, config.train
    assert (model.n_layers, model.n_heads, model.d_model, model.context_length, model.dropout) == (4, 4, 128, 64, 0.0)
    assert (train.batch_tokens, config.rows_of_step(1), config.total_steps) == (768, (0, 12), 2000)


def test_flags_override_the_file_and_accept_dashes(tmp_path: Path) -> None:
    path = tmp_path / "a.yaml"
    path.write_text("model: {d_model: 64, n_heads: 4}\noptim: {lr: 3e-4}\ntrain: {steps: 10}\n")
    config = load_config(
        [str(path), "--model.n-layers", "3", "--model.n_heads", "8", "--model.windows", "16", "null",
         "--train.compile", "true", "--optim.betas", "0.8", "0.9", "--log.trackers", "wandb"]
    )  # fmt: skip
    assert (config.model.n_layers, config.model.n_heads, config.model.d_model) == (3, 8, 64)
    assert config.model.windows == (16, None)
    assert config.train.compile is True
    assert config.optim.betas == (0.8, 0.9)
    assert config.optim.lr == 3e-4  # YAML reads 3e-4 as a string
    assert config.log.trackers == ("wandb",)


def faults_of(folder: Path, text: str, *flags: str) -> str:
    """What is said of a config file and the flags after it."""
    path = folder / "a.yaml"
    path.write_text(text)
    with pytest.raises(UserError) as caught:
        load_config([str(path), *flags])
    return str(caught.value)


def test_all_faults_come_at_once_with_the_nearest_key(tmp_path: Path) -> None:
    text = "model: {n_layerz: 4, d_model: -3}\noptm: {lr: 1}\noptim: {betas: [0.9, 2], lr: fast}\n"
    message = faults_of(tmp_path, text)
    assert message.startswith("5 faults")
    for expected in ("n_layers", "'optim'", "got -3", "optim.betas.1", "got 'fast'"):
        assert expected in message


def test_a_value_of_neither_kind_is_one_fault(tmp_path: Path) -> None:
    message = faults_of(tmp_path, "train: {steps: 5, micro_batch: 0}\n")
    assert message.startswith("1 fault")
    assert "train.micro_batch: input should be greater than 0 or input should be 'auto', got 0" in message


def test_an_unknown_key_names_those_of_its_section(tmp_path: Path) -> None:
    keys = "unknown key; known there: " + ", ".join(Config.model_fields["optim"].annotation.model_fields)  # type: ignore[union-attr] # a section
    assert f"optim.zzz: {keys}" in faults_of(tmp_path, "data: {path: a}\noptim: {zzz: 1}\n")
    flags = ("--optim.zzz", "1", "--optim.lrr=2", "--optim.lr.x", "3", "--data.sources.0.wieght", "4")
    printed = faults_of(tmp_path, "data: {path: a}\n", *flags)
    assert f"--optim.zzz: {keys}\n" in printed
    for expected in ("--optim.lrr: unknown key; did you mean 'lr'?", "--optim.lr.x: unknown key", "'weight'?"):
        assert expected in printed


def test_names_of_other_tools_lead_to_ours() -> None:
    known = {".".join(flag.path) for flag in flags_of(Config, {}).values()}
    assert {key.partition(": ")[0] for key in CONFIG_NAMES.values()} <= known


@pytest.mark.parametrize(
    ("key", "meant"),
    [
        ("train.max_steps", "did you mean 'steps'"),
        ("train.number_of_steps", "did you mean 'steps'"),
        ("train.maximum_minutes", "did you mean 'max_minutes'"),
        ("train.batch_size", "did you mean 'batch_tokens'? (in tokens"),
        ("train.gradient_accumulation_steps", "did you mean 'batch_tokens'? (accumulation follows"),
        ("train.lr", "did you mean 'optim.lr'"),
        ("max_iters", "did you mean 'train.steps'"),
        ("block_size", "did you mean 'model.context_length'"),
        ("model.n_embd", "did you mean 'd_model'"),
        ("model.nlayers", "did you mean 'n_layers'"),
        ("model.norm_epsilon", "did you mean 'norm_eps'"),
        ("eval.interval", "did you mean 'every'"),
        ("optim.beta2", "did you mean 'betas'? (both"),
        ("model.experts", "known there: family"),
    ],
)
def test_the_key_that_was_meant_is_named(tmp_path: Path, key: str, meant: str) -> None:
    *section, name = key.split(".")
    text = f"{section[0]}: {{{name}: 3}}\n" if section else f"{name}: 3\n"
    assert f"{key}: unknown key; {meant}" in faults_of(tmp_path, text)
    if section:
        assert f"--{key}: unknown key; {meant}" in faults_of(tmp_path, "data: {path: a}\n", f"--{key}", "3")


def test_likeness_counts_words_by_their_letters() -> None:
    assert likeness("max_steps", "steps") > likeness("max_steps", "max_skips")
    assert likeness("steps", "steps") == 1.0
    assert likeness("steps", "lr") == 0.0


def test_faults_of_all_kinds_come_at_once(tmp_path: Path) -> None:
    """Unknown keys and flags, values of file and flags, flags without a value, contradictions within and between."""
    text = "model: {n_layerz: 4, d_model: 100, n_heads: 7, mlp: silu}\noptim: {min_lr: 1}\n"
    text += "train: {steps: fast, batch_tokens: 1000}\ndata: {sources: [{path: a, weight: 0}]}\n"
    message = faults_of(tmp_path, text, "--train.micro-batch", "x", "--optim.lrr=3", "--log.every", "--seed", "-1", "y")
    expected = (
        "--optim.lrr: unknown key",
        "--log.every: a value is missing",
        "model.n_layerz: unknown key",
        "model.mlp: input should be 'gelu'",
        "train.steps: input should be a valid integer",
        "--train.micro-batch: input should be a valid integer",
        "data.sources.0.weight: input should be greater than 0",
        "--seed: input should be greater than or equal to 0",
        "y: not expected here",
        "d_model 100 must be a multiple of n_heads 7",
        "min_lr 1 is above the peak",
        "train.batch_tokens 1000 must be a multiple of",
    )
    assert [line for line in expected if line not in message] == []
    assert message.startswith(f"{len(expected)} faults in {tmp_path / 'a.yaml'} and the flags:\n")


def test_a_contradiction_is_not_made_of_a_value_that_is_refused_itself(tmp_path: Path) -> None:
    """d_model and lr are refused, so their defaults must not be held against n_heads and min_lr."""
    message = faults_of(tmp_path, "model: {d_model: -3, n_heads: 5}\noptim: {lr: fast, min_lr: 1}\n")
    assert message.startswith("2 faults")


def test_a_list_of_sections_is_a_flag(tmp_path: Path) -> None:
    path = tmp_path / "a.yaml"
    path.write_text("train: {steps: 10}\n")
    blend = "[{path: a, weight: 0.7}, {path: b, tokenizer: gpt2}]"
    config = load_config([str(path), "--data.path", "null", "--data.sources", blend])
    assert [(source.path, source.weight) for source in config.data.all_sources] == [("a", 0.7), ("b", 1.0)]
    ramp = "[{steps: 2, batch_tokens: 1024}]"
    assert load_config([str(path), "--train.batch-ramp", ramp]).train.batch_ramp == (
        RampStage(steps=2, batch_tokens=1024),
    )
    for value, fault in (("[{path: a", "not valid YAML"), ("a", "valid tuple"), ("[{wieght: 2}]", "mean 'weight'")):
        with pytest.raises(UserError, match=fault):
            load_config([str(path), "--data.path", "null", "--data.sources", value])


def test_faults_of_flags_come_at_once(tmp_path: Path) -> None:
    flags = ("--train.steps", "-5", "--optim.lr", "0", "--model.n-heads", "0")
    assert faults_of(tmp_path, "train: {steps: 10}\n", *flags).startswith("3 faults")


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"train": {"steps": 10, "batch_tokens": 1000}}, "nearest: 1024"),
        ({"train": {"steps": 10, "tokens": 10}}, "exactly one of steps and tokens"),
        ({"train": {"steps": 10}, "optim": {"warmup_steps": 10}}, "warm-up of 10 steps"),
        ({"train": {"steps": 100}, "optim": {"horizon_steps": 50}}, "learning rate would be 0 for 51 of 100"),
        ({"optim": {"min_lr": 1.0}}, "above the peak"),
        ({"optim": {"schedule": "constant", "min_lr": 1e-5}}, "min_lr has no effect"),
        ({"optim": {"schedule": "inverse_sqrt", "horizon_steps": 50}}, "a horizon has no effect"),
        ({"optim": {"decay_fraction": 0.3}}, "decay_fraction has no effect"),
        ({"model": {"rope_theta": 500000}}, "rope_theta has no effect"),
        ({"optim": {"schedule": "wsd", "warmup_steps": 900}, "train": {"steps": 1000}}, "reaches into the decay"),
        ({"checkpoint": {"every": 1000, "keep_every": 1500}}, "must be a multiple of every 1000"),
        ({"model": {"n_heads": 12, "n_kv_heads": 5}}, "multiple of n_kv_heads"),
        ({"data": {"path": "a", "sources": [{"path": "b"}]}}, "path or sources, not both"),
        ({"data": {"plan": "pack"}}, "give path .* or sources"),
        ({"data": {"sources": [{"path": "a"}, {"path": "a"}]}}, "a is given 2 times: add up its weights"),
        ({"data": {"sources": [{"path": "a"}], "eos": "x", "tokenizer": "gpt2"}}, "tokenizer, eos: give it with each"),
        ({"data": {"path": "a", "dtype": "uint16"}}, "dtype of a: only for data of other tools"),
        (
            {"data": {"sources": [{"path": "a", "tokenizer": "t", "val": "b", "val_fraction": 0.1}]}},
            "a: give val or val_",
        ),
        ({"data": {"path": "a", "plan": "pack", "cross_document_targets": False}}, "never predicts across documents"),
        (
            {"train": {"steps": 9, "batch_ramp": [{"steps": 2, "batch_tokens": 3000}]}},
            "batch_ramp.0.batch_tokens 3000 must",
        ),
    ],
)
def test_contradictions_are_refused(tmp_path: Path, settings: dict[str, object], expected: str) -> None:
    path = tmp_path / "a.yaml"
    path.write_text(yaml.safe_dump(settings))
    with pytest.raises(UserError, match=expected):
        load_config([str(path)])


def test_contradictions_of_all_sections_come_at_once(tmp_path: Path) -> None:
    path = tmp_path / "a.yaml"
    path.write_text("optim: {min_lr: 1.0}\nmodel: {n_heads: 7}\ntrain: {steps: 10, batch_tokens: 1000}\n")
    with pytest.raises(UserError) as caught:
        load_config([str(path)])
    assert str(caught.value).startswith("3 faults")
    assert load_config([str(path), "--optim.min-lr", "0", "--model.n-heads", "8", "--train.batch-tokens", "1024"])


def test_a_key_given_twice_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "a.yaml"
    path.write_text("optim:\n  lr: 1e-3\n  lr: 5e-1\n")
    with pytest.raises(UserError, match="key 'lr' is given twice, near line 2"):
        load_config([str(path)])


def test_every_choice_can_be_given_as_a_flag() -> None:
    for section, field in Config.model_fields.items():
        for key, inner in getattr(field.annotation, "model_fields", {}).items():
            for choice in get_args(inner.annotation) if get_origin(inner.annotation) is Literal else ():
                flags = [f"--{section}.{key}", choice]
                assert getattr(getattr(load_config(flags), section), key) == choice


def test_lengths_in_tokens_become_steps(tmp_path: Path) -> None:
    path = tmp_path / "a.yaml"
    path.write_text("train: {tokens: 10001, batch_tokens: 1024}\noptim: {warmup_tokens: 2000, horizon_tokens: 8192}\n")
    config = load_config([str(path), "--optim.min-lr", "1e-5"])
    assert (config.total_steps, config.warmup, config.horizon) == (10, 2, 8)


def test_resolved_settings_load_again(tmp_path: Path) -> None:
    blend = tmp_path / "blend.yaml"
    blend.write_text(
        "data: {sources: [{path: a, weight: 7e-1}, {path: b, tokenizer: gpt2, dtype: uint16}], plan: pack}\n"
        "train: {steps: 10, batch_ramp: [{steps: 3, batch_tokens: 2048}]}\n"
    )
    for source in (ROOT / "configs" / "llama_1b.yaml", blend):
        config = load_config([str(source)])
        path = tmp_path / "again.yaml"
        path.write_text(yaml.safe_dump(resolved(config)))
        assert load_config([str(path)]) == config


@pytest.mark.parametrize("arguments", [[], ["--train.steps", "5"], ["--dry-run"]])
def test_a_command_without_a_config_lists_those_that_come_along(arguments: list[str]) -> None:
    with pytest.raises(UserError, match="no config is named") as caught:
        read_command(arguments)
    assert [path.name for path in CONFIGS if f"configs/{path.name} " not in str(caught.value)] == []


def test_a_command_says_what_to_do() -> None:
    config, mode = read_command(["--dry-run", str(ROOT / "configs" / "gpt_124m.yaml"), "--train.micro-batch", "4"])
    assert (config.run_dir, config.train.micro_batch, mode) == ("runs/gpt_124m", 4, "dry-run")
    assert read_command([str(ROOT / "configs" / "gpt_124m.yaml"), "--eval-only"])[1] == "evaluate"
    with pytest.raises(UserError, match="--dry-run and --eval-only exclude each other"):
        read_command(["--eval-only", "--dry-run"])


def test_lists_of_sections_are_checked_and_overridden_like_others(tmp_path: Path) -> None:
    path = tmp_path / "a.yaml"
    path.write_text("data: {sources: [{path: a, weight: 0}, {path: b, wieght: 2}, {path: c, weight: .inf}]}\n")
    with pytest.raises(UserError) as caught:
        load_config([str(path)])
    message = str(caught.value)
    assert message.startswith("3 faults")
    for expected in (
        "data.sources.0.weight",
        "data.sources.1.wieght: unknown key; did you mean 'weight'?",
        "sources.2",
    ):
        assert expected in message
    path.write_text("data: {sources: [{path: a}, {path: b, weight: 2}]}\n")
    config = load_config([str(path), "--data.sources.0.weight", "0.5", "--data.sources.1.path", "d"])
    assert [(source.path, source.weight) for source in config.data.all_sources] == [("a", 0.5), ("d", 2.0)]


def test_one_path_is_a_blend_of_one(tmp_path: Path) -> None:
    config = load_config(["--data.path", "x", "--data.tokenizer", "gpt2", "--data.val-fraction", "0.1"])
    (source,) = config.data.all_sources
    assert source == SourceConfig(path="x", weight=1.0, tokenizer="gpt2", val_fraction=0.1)


def test_a_ramp_is_counted_exactly() -> None:
    """Against a walk over the steps, for lengths at, below and above every edge."""
    stages = [{"steps": 3, "batch_tokens": 64}, {"steps": 1, "batch_tokens": 256}, {"steps": 2, "batch_tokens": 32}]
    train = {"batch_tokens": 128, "batch_ramp": stages}
    values = {"model": {"context_length": 32}, "optim": {"schedule": "constant"}}
    sizes = [64, 64, 64, 256, 32, 32, *[128] * 20]
    taken = list(accumulate(sizes, initial=0))
    for tokens in range(1, taken[-1]):
        optim = {"schedule": "constant", "warmup_tokens": tokens // 3}
        config = Config.model_validate({**values, "optim": optim, "train": {**train, "tokens": tokens}})
        wanted = [next(step for step, sum_ in enumerate(taken) if sum_ >= n) for n in (tokens, tokens // 3)]
        assert [config.total_steps, config.warmup] == wanted
    config = Config.model_validate({**values, "train": {**train, "steps": 20}})
    assert [config.rows_of_step(step) for step in range(1, 27)] == [
        (before // 32, size // 32) for before, size in zip(taken, sizes, strict=False)
    ]


def test_json_schema_is_current() -> None:
    assert json.loads((ROOT / "configs" / "schema.json").read_text()) == Config.model_json_schema()


def test_every_key_is_documented_and_read() -> None:
    """A key that nobody reads would be accepted and ignored."""
    files = [p for p in [*(ROOT / "pipeline").rglob("*.py"), *ROOT.glob("*.py")] if "config" not in p.name]
    read = " ".join(path.read_text(encoding="utf-8") for path in files)
    schema = sorted((ROOT / "pipeline").glob("config*.py"))
    own = "".join(path.read_text(encoding="utf-8") for path in schema)
    unread = []
    for section, field in Config.model_fields.items():
        for key in getattr(field.annotation, "model_fields", {}):
            # config.section.key anywhere, section.key or config.key where the section itself is handed on, or a
            # length or size that config.py resolves for all
            handed_on = section in ("data", "model", "objective", "optim", "train", "parallel")
            names = [section, "config"] if handed_on else [section]
            names += ["source"] if section == "data" else []
            used = any(re.search(rf"\b{name}\.{key}\b", read) for name in names)
            resolves = re.search(rf"self\.({section}\.)?{key}\b", own) and key not in ("every", "tokens")
            if not (used or resolves):
                unread.append(f"{section}.{key}")
    assert unread == []
    assert re.search(r"config\.seed\b", read)
    assert re.search(r"config\.run_dir\b", read)
    for name, listed in (("(source|settings)", SourceConfig), ("stage", RampStage)):
        assert [key for key in listed.model_fields if not re.search(rf"\b{name}\.{key}\b", read + own)] == []
    keys = [*SourceConfig.model_fields.items(), *RampStage.model_fields.items()]
    for name, field in Config.model_fields.items():
        section = field.annotation
        keys += list(section.model_fields.items()) if hasattr(section, "model_fields") else [(name, field)]
    undocumented = [name for name, field in keys if not field.description]
    assert undocumented == []


def test_named_seeds_differ_by_name_and_never_change() -> None:
    seeds = {named_seed(1, "a", 12), named_seed(1, "a1", 2), named_seed(1, "a", "12"), named_seed(2, "a", 12)}
    assert len(seeds) == 4
    assert named_seed(1337, "init", "embedding.tokens.weight") == 6447547851516101767
