"""Parts of messages: the names near a wrong one, a text cut to a width."""

import difflib
from collections.abc import Iterable


def unknown(kind: str, name: str, known: Iterable[str]) -> str:
    """Returns the message for a name that is not among the known ones: near names first, then all."""
    return f"Unknown {kind} {name!r}.{near_names(str(name), known)} Known: {', '.join(known)}"


def near_names(name: str, known: Iterable[str]) -> str:
    """Returns " Did you mean ...?" with at most three near names, or ""."""
    matches = difflib.get_close_matches(name, known, n=3)
    return f" Did you mean {' or '.join(repr(match) for match in matches)}?" if matches else ""


def shortened(text: str, width: int) -> str:
    return text if len(text) <= width else f"{text[: width - 3]}..."
