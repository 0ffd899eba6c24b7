"""Settings as checked values: read from a TOML file, changed by key, written as TOML.

A `Settings` has fields, each with type, range and description, and tables, which are `Settings` themselves.
A field of a table has the key "table.field", and the short key "field" where no other table has such a one.
"""

import difflib
import functools
import itertools
import json
import tomllib
import typing
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, ClassVar, Self

import pydantic
from pydantic import AfterValidator, Strict
from pydantic.fields import FieldInfo

from keras_convnext._files import FileFormatError, read_bytes
from keras_convnext._messages import printable, short_repr, shortened


def up_to(largest: int) -> AfterValidator:
    """Allows integers up to one."""

    def check(value: int) -> int:
        if value > largest:
            raise ValueError(f"at most {largest:,}")
        return value

    return AfterValidator(check)


NotNegative = Annotated[float, pydantic.Field(ge=0)]
Positive = Annotated[float, pydantic.Field(gt=0)]
Share = Annotated[float, pydantic.Field(ge=0, le=1)]
BelowOne = Annotated[float, pydantic.Field(ge=0, lt=1)]
UpToOne = Annotated[float, pydantic.Field(gt=0, le=1)]
# Larger ones overflow further on: 32 bits hold a seed, and a step count is divided as a float.
Count = Annotated[int, pydantic.Field(ge=1), up_to(2**31 - 1)]
FromZero = Annotated[int, pydantic.Field(ge=0), up_to(2**31 - 1)]
InsideOne = Annotated[float, pydantic.Field(gt=0, lt=1)]
# TOML and JSON have lists for tuples; what is in them is strict.
Pair = Annotated[tuple[float, float], Strict(False)]


def key(description: str, default: Any = ..., *, optional: bool = False) -> Any:
    """Declares a field: what it means, its value in Python where none is given, may files leave it out."""
    return pydantic.Field(default, description=description, json_schema_extra={"optional": optional})


def one_of(
    known: Iterable[str], words: str | None = None, part: Callable[[str], str] = str
) -> AfterValidator:
    """Allows texts of which a part, by default all, is known; an error names near ones and all."""
    names = tuple(known)

    def check(value: str) -> str:
        if part(value) not in names:
            near = difflib.get_close_matches(part(value), names, 3)
            hint = f" (did you mean {' or '.join(map(repr, near))}?)" if near else ""
            listed = ", ".join(name or '""' for name in names)
            raise ValueError(f"{words or f'one of {listed}'}{hint}")
        return value

    return AfterValidator(check)


_MAX_FILE_BYTES = 1 << 16  # of TOML
_MAX_DOTS = 200  # in a line of it: the time of its parser is quadratic in the parts of a key
_MAX_NUMBER = 1 << 53  # beyond it numbers are no longer exact, nor of use
_MAX_SHOWN = 20  # problems


class SettingsError(ValueError):
    """Values that do not fit, with one sentence for each in `problems`."""

    def __init__(self, cls: type, problems: Iterable[str], received: str = "one") -> None:
        self.problems, self.received = list(dict.fromkeys(problems)), received
        count = "1 problem" if len(self.problems) == 1 else f"{len(self.problems)} problems"
        lines = "".join(f"\n  {problem}" for problem in self.problems[:_MAX_SHOWN])
        if len(self.problems) > _MAX_SHOWN:
            lines += f"\n  and {len(self.problems) - _MAX_SHOWN} more"
        expected = f"Expected values of {cls.__name__} that are known and fit"
        super().__init__(f"{expected}, received {received} with {count}:{lines}")


class Settings(pydantic.BaseModel):
    """Values that never change and are checked when they are made: SettingsError lists what does not fit."""

    model_config = pydantic.ConfigDict(strict=True, frozen=True, extra="forbid", allow_inf_nan=False)

    aliases: ClassVar[Mapping[str, str]] = {}  # another short key -> "table.field"

    def __init__(self, **values: Any) -> None:
        try:
            super().__init__(**values)
        except pydantic.ValidationError as error:
            found = [_problems(type(self), one, values) for one in error.errors(include_url=False)]
            raise SettingsError(type(self), itertools.chain(*found)) from None

    @pydantic.field_validator("*", mode="before")
    @classmethod
    def _bounded(cls, value: Any) -> Any:
        numbers = value if isinstance(value, list | tuple) else (value,)
        if any(isinstance(number, int) and abs(number) > _MAX_NUMBER for number in numbers):
            raise ValueError(f"at most {_MAX_NUMBER:,}")
        return value

    @classmethod
    def fields(cls) -> dict[str, FieldInfo]:
        """Returns the fields, those of tables too, by full key."""
        found: dict[str, FieldInfo] = {}
        for name, field in cls.model_fields.items():
            table = _table(field)
            inner = {} if table is None else table.fields()
            found |= {f"{name}.{short}": one for short, one in inner.items()} or {name: field}
        return found

    @classmethod
    def read(cls, path: Path, changes: Mapping[str, Any] | None = None) -> Self:
        """Reads a TOML file, which has every key that is not optional, in its table or at the top.

        `changes` take the place of values by short or full key; a text among them is read by the type of its
        key: "3", "true", "0.08,1". ValueError: the file is missing or not TOML, with its line, or all keys
        that are unknown, missing or do not fit.
        """
        given, problems = cls.by_key(read_toml(path))
        changed, faults = cls.by_key(changes or {}, texts=True)
        problems += [f"{fault} (it was given as an override)" for fault in faults]
        given |= changed
        problems += [
            _missing(_short(name), field)
            for name, field in cls.fields().items()
            if name not in given and not is_optional(field)
        ]
        return cls._made(given, problems, f"'{path}'")

    def replaced(self, changes: Mapping[str, Any]) -> Self:
        """Returns settings with other values, by short or full key, or a whole table by its name."""
        values, problems = self.by_key(changes)
        return self._made(self.values() | values, problems)

    def values(self) -> dict[str, Any]:
        """Returns the values by full key."""
        return {name: functools.reduce(getattr, name.split("."), self) for name in self.fields()}

    def by_short_key(self) -> dict[str, Any]:
        """Returns the values by the names of the fields."""
        return {_short(name): value for name, value in self.values().items()}

    @classmethod
    def by_key(cls, given: Mapping[str, Any], texts: bool = False) -> tuple[dict[str, Any], list[str]]:
        """Returns values by full key and what is wrong with the keys; may read texts by their types."""
        values: dict[str, Any] = {}
        problems: list[str] = []
        for name, value in _flat(cls, given):
            full = cls.full_key(name)
            if full is None:
                near = len(problems) < _MAX_SHOWN  # to look for near names takes time
                problems.append(_unknown_key(cls, name, value) if near else shortened(name, 80))
            elif full in values:
                problems.append(f"{name}: given twice, remove one of them")
            else:
                values[full] = _from_text(value, cls.fields()[full].annotation) if texts else value
        return values, problems

    @classmethod
    def full_key(cls, name: str) -> str | None:
        """Returns the full key of a short or full one; None where it is unknown or not unique."""
        found = [full for full in cls.fields() if name in (full, _short(full))]
        return cls.aliases.get(name) or (found[0] if len(found) == 1 else None)

    @classmethod
    def _made(cls, values: Mapping[str, Any], problems: list[str], received: str = "one") -> Self:
        """Makes settings of values by full key; lists what does not fit behind the problems so far."""
        nested: dict[str, Any] = {name: {} for name, field in cls.model_fields.items() if _table(field)}
        for full, value in values.items():
            table, _, name = full.rpartition(".")
            (nested[table] if table else nested)[name] = value
        try:
            made = cls(**nested)
            if not problems:
                return made
        except SettingsError as error:
            problems = [*problems, *error.problems]
        raise SettingsError(cls, problems, received)

    def to_toml(self) -> str:
        """Returns the text of a TOML file that is read as equal settings: first keys, then tables."""
        lines, tables = [], []
        for name in type(self).model_fields:
            value = getattr(self, name)
            if isinstance(value, Settings):
                tables.append(f"\n[{name}]\n{value.to_toml()}")
            else:
                lines.append(f"{name} = {toml_value(value)}\n")
        return "".join([*lines, *tables])


def is_optional(field: FieldInfo) -> bool:
    """Returns whether files may leave a field out."""
    return typing.cast(dict, field.json_schema_extra)["optional"]


def read_toml(path: Path) -> dict[str, Any]:
    """Reads a TOML file; errors name it with the line."""
    try:
        text = read_bytes(path, _MAX_FILE_BYTES).decode("utf-8")
        if any(line.count(".") > _MAX_DOTS for line in text.splitlines()):
            raise ValueError(f"a line has more than {_MAX_DOTS} dots")
        return tomllib.loads(text)
    except UnicodeDecodeError as error:
        raise ValueError(
            f"Expected a TOML file in UTF-8, but byte {error.start} of '{path}' is not. Save it as UTF-8."
        ) from error
    except FileFormatError:
        raise
    except (ValueError, RecursionError) as error:
        raise ValueError(
            f"Expected a TOML file, but '{path}' is not one: {shortened(str(error), 200)}. Correct that line."
        ) from error
    except OSError as error:
        raise ValueError(f"Expected a readable recipe at '{path}': {error.strerror}. Check it.") from error


def toml_value(value: Any) -> str:
    """Writes a value as TOML."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str):
        # JSON's escapes are TOML's, but for DEL, which TOML wants escaped, and bytes that are not UTF-8.
        return json.dumps(printable(value), ensure_ascii=False).replace("\x7f", "\\u007f")
    if isinstance(value, (list, tuple)):
        return f"[{', '.join(map(toml_value, value))}]"
    return repr(value)


def _shown(value: Any) -> str:
    try:
        return shortened(toml_value(value), 80)
    except (RecursionError, ValueError):  # nested too deep, or of too many digits
        return short_repr(value)


def _short(full: str) -> str:
    return full.rpartition(".")[2]


def _table(field: FieldInfo) -> type[Settings] | None:
    kind = field.annotation
    return kind if isinstance(kind, type) and issubclass(kind, Settings) else None


def _flat(cls: type[Settings], given: Mapping[str, Any]) -> Iterable[tuple[str, Any]]:
    """Gives keys and values, those in tables by full key."""
    for name, value in given.items():
        table = cls.model_fields.get(name)
        inner = value.values() if isinstance(value, Settings) else value
        if table is not None and _table(table) and isinstance(inner, Mapping):
            yield from ((f"{name}.{short}", one) for short, one in inner.items())
        else:
            yield name, value


def _unknown_key(cls: type[Settings], name: str, value: Any) -> str:
    name = shortened(name, 80)
    known = list(cls.fields())
    if isinstance(value, Mapping):
        tables = dict.fromkeys(full.partition(".")[0] for full in known if "." in full)
        near = difflib.get_close_matches(name, tables, 1)
        return f"{name}: unknown table" + (f", did you mean [{near[0]}]?" if near else ", remove it")
    same = [full for full in known if _short(full) == _short(name)]
    if len(same) > 1:
        return f"{name}: there are several, name one of {', '.join(same)}"
    shorts = {_short(full): full for full in known}
    near = difflib.get_close_matches(_short(name), shorts, 1)
    if "." in name:
        near = [shorts[short] for short in near]
    return f"{name}: unknown key" + (f", did you mean {near[0]!r}?" if near else ", remove it")


def _from_text(value: Any, kind: Any) -> Any:
    """Reads a text as the type of its key; returns it as it is where it is not one."""
    if not isinstance(value, str) or kind is str:
        return value
    text = value.strip()
    if kind is bool:
        return {"true": True, "false": False}.get(text.lower(), value)
    if typing.get_origin(kind) is tuple:
        inner = FieldInfo.from_annotation(typing.get_args(kind)[0]).annotation
        return tuple(_from_text(item, inner) for item in text.strip("[]").split(",") if item.strip())
    try:
        return kind(text)
    except ValueError:
        return value


def _problems(cls: type[Settings], error: Any, values: Mapping[str, Any]) -> list[str]:
    """Tells an error of pydantic in the words of this package."""
    raised = error.get("ctx", {}).get("error")
    if isinstance(raised, SettingsError):
        return raised.problems
    name = str(error["loc"][0])
    if error["type"] == "extra_forbidden":
        return [_unknown_key(cls, name, error["input"])]
    field = cls.model_fields[name]
    if name not in values:
        return [_missing(name, field)]
    return [f"{name}: expected {raised or range_words(field)}, received {_shown(values[name])}"]


def _missing(name: str, field: FieldInfo) -> str:
    return f"{name}: missing, expected {range_words(field)}"


def range_words(field: FieldInfo) -> str:
    """Names the values that a field takes, as a reader of TOML does: "a number in [0, 1)"."""
    kind, bounds = field.annotation, field.metadata
    if _table(field) is not None:
        return "a table"
    if typing.get_origin(kind) is tuple:
        item, *rest = typing.get_args(kind)
        inner = FieldInfo.from_annotation(item)
        return f"a list{f' of {1 + len(rest)}' if Ellipsis not in rest else ''}, each {range_words(inner)}"
    names = {str: "text in quotes", int: "an integer", float: "a number", bool: "true or false"}
    name = names[typing.cast(type, kind)]
    found = {
        key: getattr(one, key) for one in bounds for key in ("gt", "ge", "lt", "le") if hasattr(one, key)
    }
    if not found:
        return name
    low, high = found.get("gt", found.get("ge")), found.get("lt", found.get("le"))
    if high is None:
        return f"{name} {'above' if 'gt' in found else 'of at least'} {low:g}"
    left, right = "(" if "gt" in found else "[", ")" if "lt" in found else "]"
    return f"{name} in {left}{low:g}, {high:g}{right}"
