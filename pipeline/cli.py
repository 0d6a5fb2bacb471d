"""From a command line to a checked `Config`.

In: `configs/NAME.yaml --section.key VALUE ...`. Out: a `Config`, or a `UserError` that lists every
fault of the file and the flags together. Nothing else is read: no environment, no other files.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from functools import reduce
from operator import or_
from pathlib import Path
from types import GenericAlias, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import tyro
import yaml
from pydantic import BaseModel, Field, ValidationError, create_model

from pipeline.config import Config
from pipeline.errors import UserError, nearest
from pipeline.section import FIELDS_ONLY, Section

Mode = Literal["train", "dry-run", "evaluate"]
MODES: dict[str, Mode] = {"--dry-run": "dry-run", "--eval-only": "evaluate"}
QUICKSTART = Path(__file__).parent.parent / "configs" / "quickstart.yaml"

_BRANCHES = ("constrained-int", "literal['auto']")  # pydantic's names of what train.micro_batch can be
_YAML_WORDS = {"true": "True", "false": "False", "null": "None"}
_LISTS = (
    "Lists of sections are given in the file: data.sources, [{path: ..., weight: ...}, ...], "
    "and train.batch_ramp, [{steps: ..., batch_tokens: ...}, ...]; --data.sources.0.weight 0.5 changes one of them."
)
_MODES = (
    "--dry-run says what the run would take (parameters, memory, disk, time) and writes nothing; "
    "--eval-only evaluates the newest checkpoint of the run and writes nothing."
)


def read_command(arguments: Sequence[str]) -> tuple[Config, Mode]:
    """pretrain.py's command line: the config it names (none: the quickstart's) under its flags, and what to do."""
    modes = [flag for flag in arguments if flag in MODES]
    if len(set(modes)) > 1:
        raise UserError(f"{' and '.join(sorted(set(modes)))} exclude each other; give one of them")
    rest = [argument for argument in arguments if argument not in MODES]
    asks_for_help = {"-h", "--help"} & set(rest)
    if not asks_for_help and (not rest or rest[0].startswith("-")):
        print(f"no config is named: taking {QUICKSTART}", file=sys.stderr)
        rest.insert(0, str(QUICKSTART))
    return load_config(rest), MODES[modes[0]] if modes else "train"


def load_config(arguments: Sequence[str], *, program: str = "pretrain.py") -> Config:
    """Read the config file named first (if any), apply the flags after it, check the whole.

    Flags are generated from the schema by tyro; `--help` shows them with their documentation. `run_dir`
    defaults to `runs/<name of the config file>`.
    """
    path = Path(arguments[0]) if arguments and not arguments[0].startswith("-") else None
    flags = list(arguments if path is None else arguments[1:])
    values = read_yaml(path) if path else {}
    if path:
        values.setdefault("run_dir", f"runs/{path.stem}")
        _refuse(_field_faults(values), origin=str(path))  # contradictions may be mended by flags
    _refuse(_unknown_flags(flags), origin="settings")
    twin = _unchecked_twin(Config)
    usage = f"{program} configs/NAME.yaml [--section.key VALUE ...]"
    merged = tyro.cli(
        twin,
        args=[_YAML_WORDS.get(flag, flag) for flag in flags],
        default=_with_values(twin, values),
        prog=program,
        description=f"{Config.__doc__} Usage: {usage}. {_LISTS} {_MODES}",
        config=(tyro.conf.FlagConversionOff,),
    )
    return _check(merged.model_dump(), origin="settings" if flags or not path else str(path))


def config_from_values(values: dict[str, Any], *, origin: str) -> Config:
    """Check plain nested values, for example those of a checkpoint; `origin` names them in errors."""
    return _check(values, origin=origin)


def read_yaml(path: Path) -> dict[str, Any]:
    """Parse a YAML mapping; a missing, unreadable or malformed file is a `UserError`."""
    try:
        values = yaml.load(path.read_text(encoding="utf-8"), Loader=_StrictLoader)  # noqa: S506 - a SafeLoader
    except FileNotFoundError:
        folder = path.parent
        names = sorted(str(p) for p in folder.glob("*.yaml")) if folder.is_dir() else []
        raise UserError(f"no config file {path}{nearest(str(path), names)}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read config file {path}: {error}") from None
    except yaml.YAMLError as error:
        raise UserError(f"{path} is not valid YAML: {error}") from None
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise UserError(f"{path} must hold sections such as 'model:', got a {type(values).__name__}")
    return values


class _StrictLoader(yaml.SafeLoader):
    """YAML as it is, but a key given twice is an error and not the last one's silent victory."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """Refuse a mapping with a repeated key."""
        keys = [self.construct_object(key, deep=deep) for key, _ in node.value]
        repeated = next((key for place, key in enumerate(keys) if key in keys[:place]), None)
        if repeated is not None:
            raise yaml.YAMLError(f"key {repeated!r} is given twice, near line {node.start_mark.line + 1}")
        return super().construct_mapping(node, deep=deep)


def _check(values: dict[str, Any], *, origin: str) -> Config:
    _refuse(_field_faults(values), origin=origin)
    _refuse(_contradictions(values), origin=origin)
    return Config.model_validate(values)


def _refuse(faults: list[str], *, origin: str) -> None:
    if faults:
        count = "1 fault" if len(faults) == 1 else f"{len(faults)} faults"
        raise UserError(f"{count} in {origin}:\n" + "\n".join(f"  {line}" for line in faults))


def _field_faults(values: dict[str, Any]) -> list[str]:
    """Unknown keys and values out of range, all of them."""
    try:
        Config.model_validate(values, context=FIELDS_ONLY)
    except ValidationError as error:
        wanted: dict[str, list[str]] = {}  # a number or "auto" is refused as both: that is one fault
        for fault in error.errors():
            wanted.setdefault(_key_of(fault), []).append(_wanted(fault))
        got = {_key_of(fault): _got(fault) for fault in error.errors()}
        return [f"{key}: {' or '.join(texts)}{got[key]}" for key, texts in wanted.items()]
    return []


def _contradictions(values: dict[str, Any]) -> list[str]:
    """Keys that contradict each other, within sections and between them, all of them."""
    config = Config.model_validate(values, context=FIELDS_ONLY)
    sections = {name: value for name, value in config if isinstance(value, Section)}
    inside = [f"{name}: {fault}" for name, section in sections.items() for fault in section.faults()]
    return inside + config.faults()


def _key_of(fault: Any) -> str:
    return ".".join(str(part) for part in fault["loc"] if part not in _BRANCHES)


def _wanted(fault: Any) -> str:
    """What was wrong; for an unknown key, what was meant."""
    if fault["type"] == "extra_forbidden":
        *section, name = map(str, fault["loc"])
        return _unknown(section, name)
    return f"{fault['msg'][0].lower()}{fault['msg'][1:]}"


def _unknown(section: list[str], name: str) -> str:
    keys = _keys_of(section)
    there = f"; known there: {', '.join(keys)}" if section and keys else ""
    return f"unknown key{nearest(name, keys) or there}"


def _unknown_flags(flags: Sequence[str]) -> list[str]:
    """Those for a section that has no such key; other unknown flags are left to tyro, which knows similar ones."""
    faults = []
    for flag in flags:
        name, _, _ = flag.removeprefix("--").partition("=")
        *section, key = name.replace("-", "_").split(".")
        if flag.startswith("--") and section and section[0] in Config.model_fields and key not in _keys_of(section):
            faults.append(f"--{name}: {_unknown(section, key)}")
    return faults


def _got(fault: Any) -> str:
    return "" if fault["type"] == "extra_forbidden" else f", got {fault['input']!r}"


def _keys_of(location: list[str]) -> list[str]:
    section: type[BaseModel] = Config
    for part in location:
        if part.isdigit():  # a place in a list of sections
            continue
        if part not in section.model_fields:
            return []
        annotation: Any = section.model_fields[part].annotation
        if get_origin(annotation) is tuple:
            annotation = get_args(annotation)[0]
        if not (isinstance(annotation, type) and issubclass(annotation, BaseModel)):
            return []
        section = annotation
    return list(section.model_fields)


def _unchecked_twin(schema: type[BaseModel]) -> type[BaseModel]:
    """The same fields without bounds or cross-checks, so that tyro parses every flag before we judge."""
    fields: dict[str, Any] = {}
    for name, field in schema.model_fields.items():
        annotation = _unbounded(field.annotation)
        default = field.get_default(call_default_factory=True)
        if isinstance(default, BaseModel):
            default = annotation.model_construct(**dict(default))
        fields[name] = (annotation, Field(default=default, description=field.description))
    return create_model(schema.__name__, __doc__=schema.__doc__, **fields)


def _unbounded(annotation: Any) -> Any:
    """The annotation without `Annotated` bounds, however deep; sections in a list become twins, too."""
    origin, inner = get_origin(annotation), get_args(annotation)
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return _unchecked_twin(annotation)
    if origin is Annotated:
        return _unbounded(inner[0])
    if origin in (Union, UnionType):
        return reduce(or_, (_unbounded(part) for part in inner))
    if origin is tuple:
        return GenericAlias(tuple, tuple(_unbounded(part) for part in inner))
    return annotation


def _with_values(twin: type[BaseModel], values: dict[str, Any]) -> BaseModel:
    """An instance of `twin` holding `values` where given and defaults elsewhere."""
    filled: dict[str, Any] = {}
    for name, field in twin.model_fields.items():
        default, given = field.default, values.get(name)
        if isinstance(default, BaseModel):
            filled[name] = _with_values(type(default), given) if given else default
        else:
            filled[name] = given if name in values else default
    return twin.model_validate(filled)
