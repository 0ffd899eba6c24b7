"""The keys of a dataclass as a flat TOML file holds them: types, values and their texts.

A field of a table, a dataclass in a dataclass, has the key "table.key".
"""

import dataclasses
import json
import math
import typing
from collections.abc import Mapping
from typing import Any


def field_types(cls: type) -> dict[str, Any]:
    """Returns the type of each key."""
    types, tables = typing.get_type_hints(cls), tables_of(cls)
    keys: dict[str, Any] = {}
    for field in dataclasses.fields(cls):
        if field.name in tables:
            keys |= {f"{field.name}.{key}": kind for key, kind in field_types(tables[field.name]).items()}
        else:
            keys[field.name] = types[field.name]
    return keys


def tables_of(cls: type) -> dict[str, type]:
    """Returns the fields of a dataclass that are dataclasses themselves, the tables of its file."""
    types = typing.get_type_hints(cls)
    names = [field.name for field in dataclasses.fields(cls)]
    return {name: types[name] for name in names if dataclasses.is_dataclass(types[name])}


def values_by_key(recipe: Any) -> dict[str, Any]:
    """Returns the values of a dataclass by key."""
    fields = {field.name: getattr(recipe, field.name) for field in dataclasses.fields(recipe)}
    return flat_fields(fields, type(recipe))


def flat_fields(values: Mapping[str, Any], cls: type) -> dict[str, Any]:
    """Flattens the values of a file: those of known tables get the key "table.key"."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if key in tables_of(cls) and dataclasses.is_dataclass(value):
            value = values_by_key(value)
        if key in tables_of(cls) and isinstance(value, Mapping):
            flat |= {f"{key}.{name}": inner for name, inner in value.items()}
        else:
            flat[key] = value
    return flat


def mistyped(values: Mapping[str, Any], cls: type) -> list[str]:
    """Lists the values whose type is not that of their key, one sentence each."""
    types = field_types(cls)
    return [
        f"{key}: expected {type_words(types[key])}, received {toml_value(value)}"
        for key, value in values.items()
        if not _is_of(value, types[key])
    ]


def type_words(kind: Any) -> str:
    """Names a type as a reader of TOML does."""
    names = {str: "text in quotes", int: "an integer", float: "a number", bool: "true or false"}
    if typing.get_origin(kind) is tuple:
        kinds = typing.get_args(kind)
        count = "a list" if Ellipsis in kinds else f"a list of {len(kinds)}"
        return f"{count}, each {names[kinds[0]]}"
    return names[kind]


def toml_value(value: Any) -> str:
    """Writes a value as TOML."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str):
        # JSON's escapes are TOML's, but for DEL, which TOML wants escaped.
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
    if isinstance(value, (list, tuple)):
        return f"[{', '.join(map(toml_value, value))}]"
    return repr(value)


def is_number(value: Any) -> bool:
    """Returns whether a value is an int or a float, which a bool is not."""
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _is_of(value: Any, kind: Any) -> bool:
    if kind is float:
        return is_number(value) and math.isfinite(value)
    if kind is int:
        return isinstance(value, int) and not isinstance(value, bool)
    if typing.get_origin(kind) is tuple:
        kinds = typing.get_args(kind)
        if not isinstance(value, tuple):
            return False
        is_long = len(value) > 0 if Ellipsis in kinds else len(value) == len(kinds)
        return is_long and all(_is_of(item, kinds[0]) for item in value)
    return isinstance(value, kind)
