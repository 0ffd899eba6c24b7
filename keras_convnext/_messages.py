"""Parts of messages: the names near a wrong one, errors, sizes and nested values in one line."""

import difflib
from collections.abc import Iterable, Mapping
from typing import Any


def unknown(kind: str, name: object, known: Iterable[str]) -> str:
    """Returns the message for a name that is not among the known ones: near names first, then all."""
    return f"Unknown {kind} {short_repr(name)}.{near_names(str(name), known)} Known: {', '.join(known)}"


def near_names(name: str, known: Iterable[str], count: int = 3, cutoff: float = 0.6) -> str:
    """Returns " Did you mean ...?" with at most `count` names that are near but for their case, or ""."""
    by_text = {each.casefold(): each for each in known}
    matches = difflib.get_close_matches(name[:200].casefold(), by_text, count, cutoff)
    return f" Did you mean {' or '.join(repr(by_text[match]) for match in matches)}?" if matches else ""


def listed(names: Iterable[object], count: int = 10) -> str:
    """Returns at most `count` names, and how many more there are."""
    texts = [str(name) for name in names]
    more = f", and {len(texts) - count} more" if len(texts) > count else ""
    return f"{', '.join(texts[:count])}{more}"


def shortened(text: str, width: int) -> str:
    return text if len(text) <= width else f"{text[: width - 3]}..."


def short_repr(value: object, width: int = 80) -> str:
    """Returns a value as Python writes it, cut to a width; some are too long or too deep to be written."""
    try:
        return shortened(repr(value), width)
    except (ValueError, RecursionError, MemoryError):
        return f"a value of type {type(value).__name__} that is too long to show"


def printable(text: str) -> str:
    """Returns a text, such as a path, whose bytes that are not UTF-8 are shown as escapes."""
    return text.encode("utf-8", "backslashreplace").decode("utf-8")


def one_line(error: BaseException) -> str:
    """Returns type and text of an error, or of the error that it names as its reason."""
    reason = getattr(error, "reason", None)  # of a UnicodeError it is a text
    error = reason if isinstance(reason, BaseException) else error
    return " ".join(f"{type(error).__name__}: {error}".split()).removesuffix(":")


def size_text(num_bytes: float) -> str:
    for unit, name in ((10**9, "GB"), (10**6, "MB"), (10**3, "kB")):
        if num_bytes >= unit:
            return f"{num_bytes / unit:.1f} {name}"
    return f"{num_bytes} bytes"


def flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Returns nested values by their dotted names: {"model": {"depth": 3}} as {"model.depth": 3}."""
    found: dict[str, Any] = {}
    for name, value in values.items():
        if isinstance(value, Mapping) and value:
            found |= flat(value, f"{prefix}{name}.")
        else:
            found[f"{prefix}{name}"] = value
    return found


def differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[tuple[str, Any, Any]]:
    """Returns (dotted name, old, new) of each value in which two nestings differ; None where it is absent."""
    before, after = flat(old), flat(new)
    found = [(name, before.get(name), after.get(name)) for name in {**before, **after}]
    return [(name, one, other) for name, one, other in found if one != other]
