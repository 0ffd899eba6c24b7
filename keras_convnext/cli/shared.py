"""Options, tables and error lines that several commands share."""

import argparse
import contextlib
import importlib
import json
import logging
import math
import sys
import traceback
from collections.abc import Iterable, Sequence
from typing import Any

from keras_convnext import _environment, _terminal
from keras_convnext.weights.published import NON_COMMERCIAL_LICENCES

DEFAULT_MODEL = "convnext_tiny.keras_applications"  # as ConvNeXtTiny(weights="imagenet")
MAX_FAULTS_SHOWN = 20
MAX_MESSAGE = 1800  # characters of an error: a screen has 24 lines of 80


def positive(text: str) -> int:
    if not text.isdecimal() or len(text) > 9 or int(text) < 1:
        raise argparse.ArgumentTypeError(
            f"expected a whole number from 1 up{', below 10**9' * (len(text) > 9)}, received {text!r}"
        )
    return int(text)


def values(text: str) -> tuple[int, ...]:
    """Reads values of label maps: "255" or "0,255"."""
    words = [word.strip() for word in text.split(",")]
    if not all(word.isdecimal() and len(word) < 6 for word in words):
        raise argparse.ArgumentTypeError(
            f"expected whole numbers with commas, such as 0,255, received {text!r}"
        )
    return tuple(map(int, words))


def not_negative(text: str) -> float:
    with contextlib.suppress(ValueError):
        if 0 <= float(text) < math.inf:
            return float(text)
    raise argparse.ArgumentTypeError(f"expected a number from 0 up, received {text!r}")


def positive_batch_size(text: str) -> int | str | None:
    return {"any": None, "default": text}[text] if text in ("any", "default") else positive(text)


# Several commands have these: metavar, help and settings of `add_argument`.
_SHARED_OPTIONS: dict[str, tuple[str | None, str, dict[str, Any]]] = {
    "--data": ("PATH", "images, in place of the recipe's", {}),
    "--image-size": ("N", "pixels, default the weights' own", {"type": positive}),
    "--json": (None, "print JSON", {}),
    "--labels": ("FILE", "text file with the name of a class in each line", {}),
    "--quiet": (None, "show no progress", {}),
    "--set": ("KEY=VALUE", "another value of the recipe; repeatable", {"action": "append", "default": []}),
}


def add_option(
    parser: argparse.ArgumentParser, name: str, metavar: str | None = None, text: str = "", **more: Any
) -> None:
    """Adds an option, an argument (no dashes), a switch (no metavar) or, by a name alone, a shared option.

    A short name stands in front of a long one: "-o, --output".
    """
    if not text:
        metavar, text, more = _SHARED_OPTIONS[name]
    settings = {"action": "store_true"} if metavar is None else {"metavar": metavar}
    parser.add_argument(*name.split(", "), help=text, **settings | more)


def recipe_overrides(settings: Sequence[str], **short: str | None) -> dict[str, str]:
    """Returns the `--set key=value` words as a dict, with the options that are `short` for some of them."""
    given: dict[str, str] = {}
    named = [f"{key}={value}" for key, value in short.items() if value is not None]
    for setting in (*settings, *named):
        key, separator, value = setting.partition("=")
        if not separator:
            raise ValueError(f"Expected --set key=value, received {setting!r}.")
        key = key.strip()
        if given.setdefault(key, value) != value:
            raise ValueError(f"Expected one value of {key!r}, received {given[key]!r} and {value!r}.")
    return given


def licence_text(licence: str) -> str:
    if licence in NON_COMMERCIAL_LICENCES:
        return f"{licence}: NOT for commercial use"
    return licence or "not known: weights of your own"


def import_quietly(*modules: str) -> None:
    """Imports modules without the start-up lines of TensorFlow, which none of its settings silences.

    Those of this package import Keras: its backend is chosen first, and all classes of the package are
    registered, since a .keras file may name any of them.
    """
    if any(module.startswith("keras_convnext.") for module in modules):
        _environment.choose_backend()
        modules = ("keras_convnext._registered", *modules)
    # Its advice on retracing is for whoever wrote the program.
    logging.getLogger("tensorflow").setLevel(logging.ERROR)
    with _terminal.silenced():
        for module in modules:
            with contextlib.suppress(ImportError):  # said by what needs it
                importlib.import_module(module)


def note(errors: list[str], error: Exception) -> None:
    errors.append(str(error))
    complain(f"error: {error}")


def print_table(titles: Sequence[str], alignments: str, rows: Sequence[Sequence[object]]) -> None:
    print("\n".join(_terminal.table_lines(titles, alignments, rows)))


def print_facts(heading: str, facts: Iterable[tuple[str, object]]) -> None:
    """Prints titles and values under a heading; not those whose value is None."""
    shown = [(title, value) for title, value in facts if value is not None]
    width = max(len(title) for title, _ in shown)
    print(heading)
    for title, value in shown:
        print(f"  {title:<{width}}  {value}")


def print_faults(faults: Sequence[str]) -> None:
    for fault in faults[:MAX_FAULTS_SHOWN]:
        complain(f"error: {fault}")
    if len(faults) > MAX_FAULTS_SHOWN:
        complain(f"error: {len(faults) - MAX_FAULTS_SHOWN} more images; --output or --json names them all")


def print_json(value) -> None:
    print(json.dumps(value, indent=2))


def complain(text: str) -> None:
    """Prints an error on stderr, where it can be written, without what would steer a terminal."""
    if _environment.is_set("KERAS_CONVNEXT_DEBUG"):
        traceback.print_exc()
    if len(text) > MAX_MESSAGE:  # the beginning says what it is, the end what to do
        text = f"{text[: MAX_MESSAGE // 2]} [...] {text[-MAX_MESSAGE // 2 :]}"
    shown = "".join(c if c.isprintable() or c == "\n" else ascii(c)[1:-1] for c in text)
    _terminal.print_line(f"keras-convnext: {shown}", sys.stderr)


def error_message(error: BaseException) -> str:
    if isinstance(error, FileNotFoundError) and error.errno and error.filename is None:
        return "The working folder is no longer there. Change to another one."  # os.getcwd names no file
    if isinstance(error, OSError) and error.strerror:
        return error.strerror if error.filename is None else f"{error.strerror}: {error.filename}"
    package = (getattr(error, "name", None) or "").partition(".")[0]
    if isinstance(error, ModuleNotFoundError) and package not in ("", "keras_convnext"):
        return _environment.missing_text("This command", package)
    return str(error) or type(error).__name__
