"""Options, tables and error lines that several commands share."""

import argparse
import contextlib
import importlib
import json
import logging
import sys
import traceback
from collections.abc import Sequence

from keras_convnext import _environment, _terminal
from keras_convnext.weights import catalog
from keras_convnext.weights.published import NON_COMMERCIAL_LICENCES

DEFAULT_MODEL = "convnext_tiny.keras_applications"  # as ConvNeXtTiny(weights="imagenet")
PROGRESS_FROM_IMAGES = 20
MAX_FAULTS_SHOWN = 20
LICENCE_WIDTH = 15  # of the table; one identifier is longer than all others and is cut


def recipe_overrides(settings: Sequence[str]) -> dict[str, str]:
    """Returns the `--set key=value` words as a dict."""
    for setting in settings:
        if "=" not in setting:
            raise ValueError(f"Expected --set key=value, received {setting!r}.")
    return {key.strip(): value for key, _, value in (setting.partition("=") for setting in settings)}


def score_lines(row: dict[str, str], options: argparse.Namespace) -> list[tuple[str, object]]:
    lines: list[tuple[str, object]] = [
        ("top-1", f"{float(row['top1']):.2f} %{_published_text(row)}"),
        ("top-5", f"{float(row['top5']):.2f} %"),
    ]
    if row["real"]:
        lines.append(("ReaL", f"{float(row['real']):.2f} %"))
    resize = row["resize_size"] or f"crop {row['crop']}"
    lines += [
        ("images", f"{row['n']} ({row['skipped']} skipped), split {row['split'] or 'none'}"),
        ("outputs", row["outputs"]),
        ("prepared", f"{row['resize_mode']}, {row['interpolation']}, {resize}, {row['image_size']} pixels"),
        ("speed", f"{float(row['images_per_second']):,.1f} images/s, {float(row['seconds']):,.1f} s in all"),
        ("licence", licence_text(row["licence"])),
    ]
    if not options.no_results:
        lines.append(("row added to", options.results))
    if options.output is not None:
        lines.append(("files in", options.output))
    return lines


def _published_text(row: dict[str, str]) -> str:
    """Returns the published top-1 where the model, the images and their size are the same, else ""."""
    from keras_convnext.evaluation.results import IMAGENET_VALIDATION

    published = catalog.CHECKPOINTS.get(row["model"])
    if published is None or published.top1 is None or row["data_sha256"] != IMAGENET_VALIDATION:
        return ""
    return f", published {published.top1} %" if row["image_size"] == str(published.image_size) else ""


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


def positive_integer(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number from 1 up, received {text!r}")
    return int(text)


def positive_batch_size(text: str) -> int | str | None:
    return {"any": None, "default": text}[text] if text in ("any", "default") else positive_integer(text)


def joined(values) -> str:
    return ", ".join(str(value) for value in values)


def note(errors: list[str], error: Exception) -> None:
    errors.append(str(error))
    complain(f"error: {error}")


def print_table(titles: Sequence[str], alignments: str, rows: list[tuple]) -> None:
    texts = [tuple(titles), *(tuple(str(value) for value in row) for row in rows)]
    widths = [max(len(row[column]) for row in texts) for column in range(len(titles))]
    for row in texts:
        cells = zip(row, alignments, widths, strict=True)
        print("  ".join(f"{text:{alignment}{width}}" for text, alignment, width in cells).rstrip())


def print_lines(heading: str, lines: Sequence[tuple[str, object]]) -> None:
    print(heading)
    width = max(len(title) for title, _ in lines)
    for title, text in lines:
        print(f"  {title:<{width}}  {text}")


def print_footer(count: str, name: str) -> None:
    print(f"\n{count}. `keras-convnext info {name}` says more.")


def print_json(value) -> None:
    print(json.dumps(value, indent=2))


def complain(text: str) -> None:
    if _environment.is_set("KERAS_CONVNEXT_DEBUG"):
        traceback.print_exc()
    print(f"keras-convnext: {text}", file=sys.stderr)


def error_message(error: BaseException) -> str:
    if isinstance(error, OSError) and error.strerror and error.filename is not None:
        return f"{error.strerror}: {error.filename}"
    if isinstance(error, ModuleNotFoundError) and error.name in _environment.EXTRAS:
        remedy = _environment.install_command(error.name)
        return f"This command needs {error.name}, which is not installed. Run {remedy}."
    return str(error) or type(error).__name__
