"""Every setting of a schema as a flag, and all faults of a command at once.

In: a `Section`, the values of a file (if any) and a command line. Out: a checked instance, or one `UserError` that
lists every fault: unknown flags and keys, bad values, contradictions. tyro writes `--help`; it does not read the
flags, because it stops at the first fault.
"""

from __future__ import annotations

import re
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from types import NoneType
from typing import Any, TypeVar, get_args, get_origin

from pydantic import BaseModel, ValidationError

from pipeline.errors import UserError
from pipeline.names import meant
from pipeline.section import FIELDS_ONLY, Clash, Section
from pipeline.untrusted import DamagedFileError, parse_yaml_value, shown, shown_key

Values = dict[str, Any]
Path = tuple[str, ...]
S = TypeVar("S", bound=Section)

_UNION_BRANCHES = ("constrained-int", "literal['auto']")  # parts of a pydantic location that are no keys
_NULL = ("null", "None")
_BOOLEANS = ("true", "True", "false", "False")
_FLAG = re.compile(r"--?[A-Za-z]")


@dataclass(frozen=True)
class Flag:
    """One flag: where its value belongs, and what kind of value that is."""

    path: Path
    annotation: Any

    @property
    def variadic(self) -> bool:
        """Whether it takes any number of values."""
        return any(part[1:] == (...,) for part in _tuples(self.annotation)) and not self.holds_sections

    @property
    def arity(self) -> int:
        """Number of values of a flag that is not variadic."""
        return max((len(part) for part in _tuples(self.annotation) if not self.holds_sections), default=1)

    @property
    def holds_sections(self) -> bool:
        """Whether the value is a list of sections, given as YAML."""
        return any(isinstance(part[0], type) and issubclass(part[0], BaseModel) for part in _tuples(self.annotation))

    @property
    def is_switch(self) -> bool:
        """Whether the flag alone means true."""
        return self.annotation is bool

    def take(self, tokens: deque[str]) -> list[str]:
        """Remove the values of this flag from the front of `tokens`."""
        if self.is_switch and not (tokens and tokens[0] in _BOOLEANS):
            return ["true"]
        limit = len(tokens) if self.variadic else self.arity
        taken: list[str] = []
        while tokens and len(taken) < limit and not _FLAG.match(tokens[0]) and tokens[0] != "--":
            taken.append(tokens.popleft())
        return taken

    def value(self, words: list[str]) -> Any:
        """The words as a value that pydantic can judge. Raises ValueError with what is missing."""
        if not words and not self.variadic:
            raise ValueError("a value is missing")
        if self.holds_sections:
            try:
                return parse_yaml_value(" ".join(words), origin="the value")
            except DamagedFileError as error:
                raise ValueError(str(error).splitlines()[0]) from None
        if words == ["null"] or (words == ["None"] and NoneType in _parts(self.annotation)):
            return None
        if _tuples(self.annotation):
            return [None if word in _NULL else word for word in words]
        return words[0]


def _parts(annotation: Any) -> list[Any]:
    """The annotation and all that it is made of."""
    return [annotation, *(inner for part in get_args(annotation) for inner in _parts(part))]


def _tuples(annotation: Any) -> list[tuple[Any, ...]]:
    """Element types of each tuple in the annotation."""
    return [get_args(part) for part in _parts(annotation) if get_origin(part) is tuple]


@dataclass
class CommandLine:
    """What a command line says: values by place, the names they were given by, other words, and faults."""

    given: dict[Path, Any] = field(default_factory=dict)
    rest: list[str] = field(default_factory=list)
    faults: list[str] = field(default_factory=list)


def flags_of(schema: type[BaseModel], values: Mapping[str, Any], *, prefixed: bool = True) -> dict[str, Flag]:
    """All flags by name; entries that `values` has in a list of sections have flags of their own (`--a.b.0.c`).

    Args:
        schema: the sections.
        values: nested values of a file.
        prefixed: name flags by section and key (`--optim.lr`), not by the key alone (`--lr`).
    """
    found: dict[str, Flag] = {}

    def walk(model: type[BaseModel], path: Path, there: Any) -> None:
        for key, info in model.model_fields.items():
            place, annotation = (*path, key), info.annotation
            inner = there.get(key) if isinstance(there, Mapping) else None
            if isinstance(annotation, type) and issubclass(annotation, BaseModel):
                walk(annotation, place, inner)
                continue
            flag = Flag(place, annotation)
            found[flag_name(place if prefixed else place[-1:])] = flag
            if flag.holds_sections and isinstance(inner, Sequence):
                (entry, *_), *_ = _tuples(annotation)
                for number, one in enumerate(inner):
                    walk(entry, (*place, str(number)), one)

    walk(schema, (), values)
    return found


def flag_name(path: Path) -> str:
    """`--optim.min-lr` for ("optim", "min_lr")."""
    return "--" + ".".join(path).replace("_", "-")


def read_words(arguments: Sequence[str], flags: Mapping[str, Flag], schema: type[BaseModel]) -> CommandLine:
    """Sort the words of a command line to their flags. `_` and `-` in names are the same; a list may be given twice."""
    line, tokens = CommandLine(), deque(arguments)
    while tokens:
        word = tokens.popleft()
        if word == "--":
            line.rest += tokens
            break
        if not _FLAG.match(word):
            line.rest.append(word)
            continue
        name, equals, value = word.partition("=")
        flag = flags.get(name.replace("_", "-"))
        if flag is None:
            line.faults.append(f"{name}: {_unknown_flag(name, flags, schema)}")
            while tokens and not _FLAG.match(tokens[0]):
                tokens.popleft()
            continue
        words = [value] if equals else flag.take(tokens)
        try:
            found = flag.value(words)
        except ValueError as error:
            line.faults.append(f"{name}: {error}")
            continue
        if flag.variadic and isinstance(line.given.get(flag.path), list) and isinstance(found, list):
            found = line.given[flag.path] + found
        line.given[flag.path] = found
    return line


def _unknown_flag(name: str, flags: Mapping[str, Flag], schema: type[BaseModel]) -> str:
    *section, key = name.lstrip("-").replace("-", "_").split(".")
    if section and section[0] in schema.model_fields:
        return _unknown_key(schema, section, key)
    known = [flag.removeprefix("--") for flag in flags]
    found, remark = meant(name.lstrip("-"), known, known, others=schema_names(schema))
    hint = f"; did you mean '--{found}'?{f' ({remark})' if remark else ''}" if found else ""
    return f"there is no such flag{hint}"


def schema_names(schema: type[BaseModel]) -> Mapping[str, str]:
    """What other tools call the keys of a schema."""
    return schema.other_names if issubclass(schema, Section) else {}


def placed(values: Mapping[str, Any], given: Mapping[Path, Any]) -> Values:
    """A copy of nested values with those of the flags put in their places."""
    result: Values = dict(values)
    for path, value in given.items():
        inner: Any = result
        for part in path[:-1]:
            if not _has_place(inner, part):
                break  # the file has a list where a section is expected: that is the fault to name
            key: Any = int(part) if isinstance(inner, list) else part
            there = inner[key] if isinstance(inner, list) else inner.get(key)
            if there is not None and not isinstance(there, (Mapping, list, tuple)):
                break  # likewise: it has no section there
            inner[key] = list(there) if isinstance(there, (list, tuple)) else dict(there or {})
            inner = inner[key]
        else:
            if _has_place(inner, path[-1]):
                inner[int(path[-1]) if isinstance(inner, list) else path[-1]] = value
    return result


def _has_place(inner: Values | list[Any], part: str) -> bool:
    """Whether a section has the key, or a list the number, that a flag names."""
    return not isinstance(inner, list) or (part.isdecimal() and int(part) < len(inner))


def checked(
    schema: type[S], values: Values, *, origin: str, names: Mapping[Path, str] | None = None, faults: Sequence[str] = ()
) -> S:
    """An instance of the schema. Raises `UserError` that lists `faults` and all that is wrong with `values`.

    Args:
        schema: what the values are checked against.
        values: nested plain values.
        origin: where the values come from, for the message.
        names: how keys are called in messages (default: `section.key`).
        faults: what is known to be wrong already.
    """
    names = names or {}
    bad = _bad_values(schema, values)
    faulty = {path[:2] for path in bad}
    found = [*faults, *(f"{names.get(path, '.'.join(map(shown_key, path)))}: {text}" for path, text in bad.items())]
    found += [clash.text for clash in _clashes(schema, _without(values, faulty)) if not faulty & _depends_on(clash)]
    if found:
        count = "1 fault" if len(found) == 1 else f"{len(found)} faults"
        raise UserError(f"{count} in {origin}:\n" + "\n".join(f"  {line}" for line in found))
    return schema.model_validate(values)


def _bad_values(schema: type[Section], values: Values) -> dict[Path, str]:
    """Unknown keys and values that no key may have, by their place."""
    try:
        schema.model_validate(values, context=FIELDS_ONLY)
    except ValidationError as error:
        wanted: dict[Path, list[str]] = {}  # a number or "auto" is refused as both: that is one fault
        got: dict[Path, str] = {}
        for fault in error.errors():
            path = tuple(str(part) for part in fault["loc"] if part not in _UNION_BRANCHES)
            unknown = fault["type"] == "extra_forbidden"
            text = _unknown_key(schema, path[:-1], path[-1]) if unknown else fault["msg"].removeprefix("Value error, ")
            wanted.setdefault(path, []).append(text if unknown else f"{text[0].lower()}{text[1:]}")
            silent = unknown or fault["type"] in ("missing", "value_error")
            got[path] = "" if silent else f", got {shown(fault['input'])}"
        return {path: " or ".join(texts) + got[path] for path, texts in wanted.items()}
    return {}


def _without(values: Values, paths: set[Path]) -> Values:
    """The values without those at `paths`, which have one or two parts."""
    kept = {key: value for key, value in values.items() if (key,) not in paths}
    for path in paths:
        section = kept.get(path[0])
        if len(path) == 2 and isinstance(section, Mapping):
            kept[path[0]] = {key: value for key, value in section.items() if key != path[1]}
    return kept


def _clashes(schema: type[Section], values: Values) -> list[Clash]:
    """Contradictions within sections and between them."""
    whole = schema.model_validate(values, context=FIELDS_ONLY)
    sections = {name: value for name, value in whole if isinstance(value, Section)}
    inside = [clash.within(name) for name, section in sections.items() for clash in section.clashes()]
    return inside + whole.clashes()


def _depends_on(clash: Clash) -> set[Path]:
    """Places of the keys that a contradiction is about, and of their sections."""
    paths = {tuple(key.split(".")) for key in clash.keys}
    return paths | {path[:1] for path in paths}


def _unknown_key(schema: type[BaseModel], section: Sequence[str], name: str) -> str:
    """What to say of an unknown key: the one that was meant, or all that its section has."""
    inside = section_of(schema, section)
    there = list(inside.model_fields) if inside else []
    prefix = ".".join([*section, ""])
    near = [prefix + key for key in there]
    everywhere = [".".join(flag.path) for flag in flags_of(schema, {}).values()]
    found, remark = meant(prefix + name, near, [*everywhere, *near], others=schema_names(schema))
    if not found:
        return "unknown key" + (f"; known there: {', '.join(there)}" if section and there else "")
    key = found.removeprefix(prefix) if found in near else found
    return f"unknown key; did you mean {key!r}?" + (f" ({remark})" if remark else "")


def section_of(schema: type[BaseModel], path: Sequence[str]) -> type[BaseModel] | None:
    """The section at a path; places in a list of sections are passed over. None: there is none."""
    for part in path:
        if part.isdigit():
            continue
        if part not in schema.model_fields:
            return None
        annotation: Any = schema.model_fields[part].annotation
        annotation = next((inner[0] for inner in _tuples(annotation)), annotation)
        if not (isinstance(annotation, type) and issubclass(annotation, BaseModel)):
            return None
        schema = annotation
    return schema


def print_help(schema: type[S], default: S, *, program: str, description: str, prefixed: bool = True) -> None:
    """Print all flags with their documentation and defaults. `prefixed`: see `flags_of`."""
    import tyro  # a quarter of a second, and only needed here

    rules = tyro.constructors.ConstructorRegistry()

    @rules.primitive_rule
    def _sections(info: Any) -> Any:
        """A list of sections is one flag, whose value is YAML."""
        flag = Flag((), info.type)
        if not flag.holds_sections:
            return None
        keys = list(_tuples(info.type)[0][0].model_fields)
        return tyro.constructors.PrimitiveConstructorSpec(
            nargs=1,
            metavar="'[{" + ", ".join(f"{key}: ..." for key in keys) + "}, ...]'",
            instance_from_str=lambda words: words[0],
            is_instance=lambda value: isinstance(value, tuple),
            str_from_instance=lambda value: [str(list(value))],
        )

    conf = tyro.conf
    markers: tuple[Any, ...] = (
        (conf.FlagConversionOff,) if prefixed else (conf.OmitArgPrefixes, conf.FlagCreatePairsOff)
    )
    tyro.cli(
        schema, args=["--help"], default=default, prog=program, description=description, config=markers, registry=rules
    )
