"""Files that somebody else may have written, or that a disk has damaged: nothing in them is believed unchecked.

In: a path or the content of a file, and the schema that it has to fit. Out: checked values, or a `UserError` that names
the file and the first fault. A file is read at the size that it has, so no name makes a program read without end; JSON
and YAML are parsed with bounds on nesting, numbers and references.
"""

from __future__ import annotations

import stat
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Annotated, Any, TypeVar

import yaml
from pydantic import AfterValidator, Field, TypeAdapter, ValidationError
from pydantic_core import from_json

from pipeline.errors import UserError, sized

LARGEST_JSON = 2**30
"""Bytes of a JSON file; the largest that are made, manifests of a million inputs, take a fifth of it."""
LARGEST_YAML = 2**20
"""Bytes of a YAML file: people write them."""
_LONGEST_NAME = 255  # bytes of a file name that file systems take
_SHOWN = 80  # characters of a value in a message
_OBJECT = "expected an object"
_NO_OBJECT = ("model_type", "dataclass_type", "dict_type", "named_tuple_type")  # pydantic names our classes there
_NODES_DEEP = 50  # sections within sections; settings have three levels

T = TypeVar("T")
Object = dict[str, Any]


class DamagedFileError(UserError):
    """A file whose content is not what it has to be."""


class IrregularFileError(DamagedFileError):
    """A device, a pipe or a folder where a file is expected."""


def _plain(name: str) -> str:
    if name in ("", ".", "..") or "/" in name or not name.isprintable() or len(name.encode()) > _LONGEST_NAME:
        raise ValueError(f"expected the plain name of a file in the same folder, got {shown(name)}")
    return name


def _plain_parts(path: str) -> str:
    for part in path.split("/"):
        _plain(part)
    return path


FileName = Annotated[str, AfterValidator(_plain)]
"""A name that a file gives of another one: it lies beside it, and nowhere else."""
RelativePath = Annotated[str, AfterValidator(_plain_parts)]
"""The same for a file that may lie in a folder beside it."""
Natural = Annotated[int, Field(strict=True, ge=0, lt=2**63)]
"""A count or an offset, which fits 64 bits; no bool, no float and no text stands for one."""


def check_regular(path: Path) -> int:
    """Size of a file in bytes. Raises `IrregularFileError` for what is none, and OSError where there is nothing.

    A link counts as what it leads to. To be called before a file is opened: opening a pipe waits for its other end.
    """
    status = path.stat()
    if not stat.S_ISREG(status.st_mode):
        kind = {stat.S_IFDIR: "a folder", stat.S_IFIFO: "a pipe", stat.S_IFSOCK: "a socket"}
        found = kind.get(stat.S_IFMT(status.st_mode), "a device")
        raise IrregularFileError(f"{path} is {found}, expected a file; put the file there")
    return status.st_size


def read_regular(path: Path, *, limit: int) -> bytes:
    """The content of a file of at most `limit` bytes. Raises as `check_regular`, and `UserError` for a larger one."""
    size = check_regular(path)
    if size > limit:
        raise DamagedFileError(f"{path} has {sized(size)}, expected at most {sized(limit)}; is it the right file?")
    with path.open("rb") as file:
        return file.read(size)


def read_json(schema: type[T], path: Path, *, limit: int = LARGEST_JSON) -> T:
    """A JSON file as `schema` has it. Raises `DamagedFileError`, and OSError for a file that cannot be read."""
    return parse_json(schema, read_regular(path, limit=limit), origin=path)


def parse_json(schema: type[T], content: bytes, *, origin: object) -> T:
    """The JSON text `content` as `schema` has it; `origin` names it in the `DamagedFileError` of all else."""
    try:
        values = from_json(content, allow_inf_nan=False)  # bounds nesting and digits
    except ValueError as error:
        raise DamagedFileError(f"{origin} cannot be read: it is not JSON, {error}") from None
    return check(schema, values, origin=origin)


def check(schema: type[T], values: Any, *, origin: object) -> T:
    """Parsed `values` as `schema` has them. Raises `DamagedFileError` that names `origin` and the first fault."""
    try:
        found: T = _adapter(schema).validate_python(values)
    except ValidationError as error:
        raise DamagedFileError(f"{origin} cannot be read: {fault_of(error)}") from None
    return found


_adapter: Callable[[Any], TypeAdapter[Any]] = cache(TypeAdapter)  # one a schema: lines are checked one by one


def fault_of(error: ValidationError) -> str:
    """The first fault that pydantic found: where, what was expected, what was found."""
    fault = error.errors(include_url=False)[0]
    where = ".".join(map(shown_key, fault["loc"]))
    found = "" if fault["type"] in ("missing", "value_error") else f", got {shown(fault['input'])}"
    wanted = _OBJECT if fault["type"] in _NO_OBJECT else fault["msg"].removeprefix("Value error, ")
    return f"{where + ': ' if where else ''}{wanted}{found}"


def shown_key(key: object) -> str:
    """A key in a message: as it is, where that can be read."""
    text = str(key)
    return text if text.isprintable() and len(text) <= _SHOWN else shown(text)


def shown(value: object) -> str:
    """A value in a message: quoted, without control characters, and cut where it is long."""
    if isinstance(value, (dict, list, tuple)) and len(value) > _SHOWN:
        return f"a {type(value).__name__} of {len(value):,}"
    if isinstance(value, (str, bytes)):
        value = value[: _SHOWN + 1]
    try:
        text = ascii(value) if isinstance(value, str) and not value.isprintable() else repr(value)
    except (RecursionError, ValueError):  # a number of thousands of digits
        return f"a {type(value).__name__}"
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}..."


def parse_yaml(content: bytes, *, origin: object) -> Object:
    """A YAML mapping with plain values. Raises `DamagedFileError` for all else."""
    values = parse_yaml_value(content, origin=origin)
    if values is None:
        return {}
    if not isinstance(values, dict) or not all(isinstance(key, str) for key in values):
        raise DamagedFileError(f"{origin} must hold sections such as 'model:', got {shown(values)}")
    return values


def parse_yaml_value(content: bytes | str, *, origin: object) -> Any:
    """Whatever plain value a YAML text stands for. Raises `DamagedFileError` for what is no such text.

    References are refused: a few lines of them can stand for more than fits the memory.
    """
    try:
        return yaml.load(content, Loader=_PlainLoader)  # noqa: S506 - a SafeLoader
    except Exception as error:  # what is no number, no date or no key raises whatever its conversion does
        reason = "it is nested too deeply" if isinstance(error, RecursionError) else error
        raise DamagedFileError(f"{origin} is not valid YAML: {reason}") from None


class _PlainLoader(yaml.SafeLoader):
    """YAML without references, explicit types and deep nesting, in which no key is given twice."""

    _depth = 0

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        """Refuse what stands for something else than is written there."""
        event = self.peek_event()  # type: ignore[no-untyped-call] # PyYAML's
        line = event.start_mark.line + 1
        if isinstance(event, yaml.AliasEvent) or getattr(event, "anchor", None) is not None:
            raise yaml.YAMLError(f"references (& and *) are not read, found one in line {line}; write the value out")
        if getattr(event, "tag", None) is not None:
            raise yaml.YAMLError(f"types (!) are not read, found {shown(event.tag)} in line {line}; leave it out")
        if isinstance(event, yaml.ScalarEvent) and "\0" in event.value:
            raise yaml.YAMLError(f"no setting holds a zero byte, found one in line {line}")
        self._depth += 1
        if self._depth > _NODES_DEEP:
            raise yaml.YAMLError(f"settings are nested at most {_NODES_DEEP} deep, found more in line {line}")
        node = super().compose_node(parent, index)
        self._depth -= 1
        return node

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """Refuse a mapping with a repeated key, where YAML lets the last one win."""
        seen: set[Any] = set()
        for key, _ in node.value:
            if (found := self.construct_object(key, deep=True)) in seen:
                raise yaml.YAMLError(f"key {found!r} is given twice, near line {node.start_mark.line + 1}")
            seen.add(found)
        return super().construct_mapping(node, deep=deep)
