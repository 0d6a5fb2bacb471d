"""Which key was meant: by the names that other tools use, and by likeness.

In: a key or flag that does not exist. Out: the one that was probably meant.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from difflib import SequenceMatcher

LIKENESS, FAR_LIKENESS = 0.5, 0.8
"""Least likeness (1: equal) of a name in the same section, and in another one."""
WORD_LIKENESS = 0.6
"""Least likeness at which two words count as the same word, misspelt."""

ACCUMULATION = "train.batch_tokens: accumulation follows from it, train.micro_batch and the number of ranks"
SEQUENCES = "train.batch_tokens: in tokens, which is sequences x model.context_length"
CONFIG_NAMES: Mapping[str, str] = {
    **dict.fromkeys(("max_steps", "max_iters", "num_steps", "total_steps", "train_steps", "train_iters", "n_steps",
                     "num_iterations", "training_steps", "max_train_steps", "iterations"), "train.steps"),
    **dict.fromkeys(("max_tokens", "train_tokens", "num_tokens", "total_tokens", "token_budget"), "train.tokens"),
    **dict.fromkeys(("epochs", "num_epochs", "num_train_epochs", "max_epochs"),
                    "train.tokens: epochs x tokens of the dataset"),
    **dict.fromkeys(("batch_size", "global_batch_size", "train_batch_size", "total_batch_size", "batch"), SEQUENCES),
    **dict.fromkeys(("micro_batch_size", "device_batch_size", "per_device_train_batch_size", "mbs",
                     "local_batch_size", "batch_per_device", "train_micro_batch_size_per_gpu"), "train.micro_batch"),
    **dict.fromkeys(("gradient_accumulation_steps", "grad_accum", "grad_accum_steps", "accumulate_grad_batches",
                     "gradient_accumulation", "accumulation_steps"), ACCUMULATION),
    **dict.fromkeys(("dtype", "mixed_precision", "bf16", "fp16", "amp", "param_dtype"), "train.precision"),
    **dict.fromkeys(("torch_compile", "use_compile"), "train.compile"),
    **dict.fromkeys(("gradient_checkpointing", "recompute", "remat", "recompute_granularity"),
                    "train.activation_checkpointing"),
    **dict.fromkeys(("learning_rate", "max_lr", "max_learning_rate", "peak_lr", "base_lr"), "optim.lr"),
    **dict.fromkeys(("min_learning_rate", "lr_min", "final_lr", "eta_min"), "optim.min_lr"),
    **dict.fromkeys(("optimizer", "optimizer_type", "optim"), "optim.kind"),
    **dict.fromkeys(("beta1", "beta2", "adam_beta1", "adam_beta2"), "optim.betas: both of them, as a list"),
    **dict.fromkeys(("epsilon", "adam_eps", "adam_epsilon"), "optim.eps"),
    **dict.fromkeys(("wd", "decay"), "optim.weight_decay"),
    **dict.fromkeys(("grad_clip", "max_grad_norm", "clip_grad", "gradient_clip_val", "grad_clip_norm", "clip",
                     "max_norm", "gradient_clipping"), "optim.clip_norm"),
    **dict.fromkeys(("warmup", "warmup_iters", "lr_warmup_iters", "lr_warmup_steps", "num_warmup_steps"),
                    "optim.warmup_steps"),
    **dict.fromkeys(("warmup_ratio", "warmup_fraction", "lr_warmup_fraction"), "optim.warmup_steps: in steps"),
    **dict.fromkeys(("lr_decay_iters", "lr_decay_steps", "decay_steps", "decay_iters"), "optim.horizon_steps"),
    **dict.fromkeys(("lr_scheduler_type", "lr_schedule", "lr_scheduler", "scheduler", "lr_decay_style", "decay_lr"),
                    "optim.schedule"),
    **dict.fromkeys(("block_size", "seq_len", "seq_length", "sequence_length", "max_seq_len", "max_seq_length", "n_ctx",
                     "n_positions", "max_position_embeddings", "context_len", "max_sequence_length", "ctx_len"),
                    "model.context_length"),
    **dict.fromkeys(("n_layer", "num_layers", "num_hidden_layers", "depth", "layers"), "model.n_layers"),
    **dict.fromkeys(("n_head", "num_heads", "num_attention_heads", "heads"), "model.n_heads"),
    **dict.fromkeys(("n_kv_head", "n_query_groups", "num_query_groups", "num_key_value_heads", "num_kv_heads"),
                    "model.n_kv_heads"),
    **dict.fromkeys(("n_embd", "n_embed", "hidden_size", "dim", "embed_dim", "embedding_dim", "d_embed", "width",
                     "model_dim", "emb_dim"), "model.d_model"),
    **dict.fromkeys(("intermediate_size", "ffn_dim", "ffn_hidden_size", "n_inner", "hidden_dim", "mlp_dim", "d_mlp"),
                    "model.d_ff"),
    **dict.fromkeys(("activation", "activation_function", "hidden_act", "act_fn", "activation_func"), "model.mlp"),
    **dict.fromkeys(("normalization", "norm_type", "norm_class"), "model.norm"),
    **dict.fromkeys(("rms_norm_eps", "layer_norm_eps", "layer_norm_epsilon", "layernorm_epsilon"), "model.norm_eps"),
    **dict.fromkeys(("position_embedding_type", "pos_emb", "pos_encoding", "positional_encoding"), "model.position"),
    **dict.fromkeys(("rope_base", "rotary_base", "theta"), "model.rope_theta"),
    **dict.fromkeys(("attn_dropout", "resid_dropout", "hidden_dropout", "attention_dropout", "attn_pdrop",
                     "resid_pdrop", "embd_pdrop", "dropout_rate"), "model.dropout"),
    **dict.fromkeys(("sliding_window", "window_size", "attention_window"), "model.windows"),
    **dict.fromkeys(("tie_word_embeddings", "weight_tying", "tie_weights", "tied_embeddings"), "model.tie_embeddings"),
    **dict.fromkeys(("initializer_range", "init_method_std"), "model.init_std"),
    **dict.fromkeys(("padded_vocab_size", "n_vocab"), "model.vocab_size"),
    **dict.fromkeys(("dataset", "dataset_path", "data_path", "data_dir", "train_data", "dataset_name"), "data.path"),
    **dict.fromkeys(("datasets", "data_mix", "mixture", "blend", "data_mixture"), "data.sources"),
    **dict.fromkeys(("eval_interval", "eval_steps", "eval_every", "val_check_interval", "val_every"), "eval.every"),
    **dict.fromkeys(("eval_iters", "eval_batches", "eval_tokens", "limit_val_batches"), "eval.tokens: in tokens"),
    **dict.fromkeys(("log_interval", "logging_steps", "log_every", "log_every_n_steps"), "log.every"),
    **dict.fromkeys(("report_to", "logger", "wandb", "wandb_log", "use_wandb"), "log.trackers"),
    **dict.fromkeys(("wandb_project", "project_name"), "log.project"),
    **dict.fromkeys(("save_interval", "save_steps", "save_every", "checkpoint_every", "ckpt_interval",
                     "checkpoint_interval"), "checkpoint.every"),
    **dict.fromkeys(("save_total_limit", "keep_last", "max_to_keep"), "checkpoint.keep"),
    **dict.fromkeys(("out_dir", "output_dir", "save_dir", "run_name", "exp_name", "checkpoint_dir"), "run_dir"),
    **dict.fromkeys(("fsdp", "ddp", "sharding_strategy", "data_parallel", "distributed_strategy"),
                    "parallel.strategy"),
}  # fmt: skip
"""Keys of nanoGPT, litgpt, torchtitan, Megatron, Hugging Face; what they are called here: `key`, `key: remark`."""

PREPARE_NAMES: Mapping[str, str] = {
    **dict.fromkeys(("num_proc", "num_workers", "n_workers", "processes", "jobs", "nproc", "threads"), "workers"),
    **dict.fromkeys(("out", "out_dir", "output_dir", "output_prefix", "output_path", "output_folder"), "output"),
    **dict.fromkeys(("tokenizer_type", "tokenizer_model", "tokenizer_path", "tokenizer_name", "encoding"), "tokenizer"),
    **dict.fromkeys(("vocab_size", "n_vocab"), "tokenizer: train:N trains one of N tokens"),
    **dict.fromkeys(("json_key", "json_keys", "text_column", "text_field", "column", "key"), "text-key"),
    **dict.fromkeys(("val_split", "val_ratio", "validation_fraction", "valid_fraction", "val_size", "test_size"),
                    "val-fraction"),
    **dict.fromkeys(("val", "val_data", "validation", "val_file"), "val-input"),
    **dict.fromkeys(("eod", "eos_token", "append_eod", "eot"), "eos"),
    **dict.fromkeys(("separator", "sep", "delimiter"), "text-separator"),
    **dict.fromkeys(("deduplicate", "near_dedup"), "dedup"),
    **dict.fromkeys(("dry", "estimate"), "dry-run"),
    **dict.fromkeys(("decontaminate",), "delete-contaminated"),
}  # fmt: skip
"""The same for flags of preparation tools."""


def meant(name: str, near: Iterable[str], far: Iterable[str], *, others: Mapping[str, str]) -> tuple[str, str]:
    """The key that an unknown one stands for, and a remark; both empty if there is none.

    Args:
        name: the unknown key, `section.key`.
        near: keys of the same section.
        far: all keys.
        others: what other tools call ours, by the last part of the name.
    """
    near, far = list(near), list(far)
    word, section = last(name), name.rpartition(".")[0]
    known, _, remark = (others.get(word) or others.get(f"{section}_{word}", "")).partition(": ")
    if known in far:
        return known, remark
    elsewhere = [key for key in far if last(key) == word]
    if len(elsewhere) == 1:
        return elsewhere[0], ""
    begun = [key for key in near if last(key).startswith(word)]
    if len(begun) == 1 and len(word) > 1:
        return begun[0], ""
    for keys, least in ((near, LIKENESS), (far, FAR_LIKENESS)):
        best = max(keys, key=lambda key: likeness(word, last(key)), default="")
        if best and likeness(word, last(best)) >= least:
            return best, ""
    return "", ""


def last(name: str) -> str:
    """The part after the last dot, in lower case, with underscores."""
    return name.rpartition(".")[2].lower().replace("-", "_")


def likeness(one: str, other: str) -> float:
    """How much of two names is the same words, from 0 to 1: `max_steps` is more like `steps` than like `max_skips`.

    Each word is paired with the most similar one of the other name, and counts by its letters.
    """
    words, others = re.findall(r"[a-z0-9]+", one.lower()), re.findall(r"[a-z0-9]+", other.lower())
    letters = sum(map(len, words + others))
    alike = 0.0
    for word in sorted(words, key=len, reverse=True):
        scores = [(_alike(word, candidate), candidate) for candidate in others]
        ratio, candidate = max(scores, default=(0.0, ""))
        if ratio >= WORD_LIKENESS:
            alike += ratio * (len(word) + len(candidate))
            others.remove(candidate)
    return alike / letters if letters else 0.0


def _alike(word: str, other: str) -> float:
    """How alike two words are; an abbreviation counts as nearly equal."""
    short, long = sorted((word, other), key=len)
    ratio = SequenceMatcher(None, word, other).ratio()
    return max(ratio, 0.9) if len(short) >= 3 and long.startswith(short) else ratio
