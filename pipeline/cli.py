"""From the command line of pretrain.py to a checked `Config`.

In: `configs/NAME.yaml --section.key VALUE ...`. Out: a `Config`, or a `UserError` that lists every fault of the file
and the flags together. Nothing else is read: no environment, no other files.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from pipeline.config import Config
from pipeline.errors import UserError, nearest
from pipeline.flags import checked, flags_of, placed, print_help, read_words
from pipeline.untrusted import LARGEST_YAML, parse_yaml, read_regular

Mode = Literal["train", "dry-run", "evaluate"]
MODES: dict[str, Mode] = {"--dry-run": "dry-run", "--eval-only": "evaluate"}
CONFIGS = Path(__file__).parent.parent / "configs"
USAGE = "configs/NAME.yaml [--section.key VALUE ...]"

_MODES = (
    "--dry-run says what the run would take (parameters, memory, disk, time) and writes nothing; "
    "--eval-only evaluates the newest checkpoint of the run and writes nothing."
)
_LISTS = "Lists of sections are given as YAML; --data.sources.0.weight 0.5 changes one of those that the file lists."


def read_command(arguments: Sequence[str]) -> tuple[Config, Mode]:
    """pretrain.py's command line: the config it names under its flags, and what to do."""
    modes = [flag for flag in arguments if flag in MODES]
    if len(set(modes)) > 1:
        raise UserError(f"{' and '.join(sorted(set(modes)))} exclude each other; give one of them")
    rest = [argument for argument in arguments if argument not in MODES]
    if not rest or rest[0].startswith("-"):
        raise no_config()
    return load_config(rest), MODES[modes[0]] if modes else "train"


def answer_at_once() -> None:
    """Answer `--help` and a command without arguments, and exit: neither needs the imports of training."""
    arguments = sys.argv[1:]
    if {"-h", "--help"} & set(arguments):
        file = next((word for word in arguments if word.endswith((".yaml", ".yml"))), None)
        default = load_config([file]) if file else Config()
        print_help(
            Config,
            default,
            program="pretrain.py",
            description=f"{Config.__doc__} Usage: pretrain.py {USAGE}. {_LISTS} {_MODES}",
        )
        raise SystemExit(0)
    if not arguments:
        raise no_config()


def no_config() -> UserError:
    """The mistake of naming no config; it lists those that come along, each with the first line of its comment."""
    lines = [f"no config is named: python pretrain.py {USAGE}; --help documents every key. Configs:"]
    for path in sorted(CONFIGS.glob("*.yaml")):
        comment = next(line for line in path.read_text(encoding="utf-8").splitlines() if not line.startswith("# yaml"))
        lines.append(f"  configs/{path.name:<23}{comment.removeprefix('# ')}")
    return UserError("\n".join(lines))


def load_config(arguments: Sequence[str]) -> Config:
    """Read the config file named first (if any), apply the flags after it, check the whole.

    `run_dir` defaults to `runs/<name of the config file>`. Raises `UserError` that lists every fault of both.
    """
    path = Path(arguments[0]) if arguments and not arguments[0].startswith("-") else None
    words = list(arguments if path is None else arguments[1:])
    values = Config().model_dump()
    if path:
        values |= {"run_dir": f"runs/{path.stem}", **read_yaml(path)}
    flags = flags_of(Config, values)
    line = read_words(words, flags, Config)
    extra = [f"{word}: not expected here; a flag comes before its values" for word in line.rest]
    names = {flag.path: name for name, flag in flags.items() if flag.path in line.given}
    origin = " and ".join([*([str(path)] if path else []), *(["the flags"] if words else [])]) or "the defaults"
    return checked(Config, placed(values, line.given), origin=origin, names=names, faults=[*line.faults, *extra])


def config_from_values(values: dict[str, Any], *, origin: str) -> Config:
    """Check plain nested values, for example those of a checkpoint; `origin` names them in errors."""
    return checked(Config, values, origin=origin)


def read_yaml(path: Path) -> dict[str, Any]:
    """Parse a YAML mapping; a missing, unreadable or malformed file is a `UserError`."""
    try:
        content = read_regular(path, limit=LARGEST_YAML)
    except FileNotFoundError:
        folder = path.parent
        names = sorted(str(p) for p in folder.glob("*.yaml")) if folder.is_dir() else []
        raise UserError(f"no config file {path}{nearest(str(path), names)}") from None
    except OSError as error:
        raise UserError(f"cannot read config file {path}: {error}") from None
    return parse_yaml(content, origin=path)
