"""Draws the log of a run: loss, scores, learning rate and speed by epoch."""

import difflib
import importlib.util
import io
import math
import os
from collections.abc import Mapping, Sequence
from typing import Any

from keras_convnext._files import replace_file
from keras_convnext.training.logs import Value, read_csv

# Panel of the picture -> label by column.
_PANELS = {
    "Loss": {"loss": "training", "val_loss": "validation", "ema_val_loss": "validation, EMA"},
    "Top-1 accuracy, %": {"val_top1": "validation", "ema_val_top1": "validation, EMA"},
    "Learning rate": {"learning_rate": "last step of the epoch"},
    "Images per second": {"images_per_second": "training"},
}
_ORDER = ("training", "validation", "validation, EMA")  # of the colours
# Okabe and Ito's palette, which colour-blind readers can tell apart (https://jfly.uni-koeln.de/color/).
_COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
_MARKED_EPOCHS = 40  # up to here each epoch gets a dot

_NO_MATPLOTLIB = "Curves are drawn with matplotlib, which is not installed. Run pip install matplotlib."


def check_drawing() -> None:
    """Checks that curves can be drawn, before hours are spent on what they are of.

    Raises:
        ImportError: matplotlib is not installed.
    """
    if importlib.util.find_spec("matplotlib") is None:
        raise ImportError(_NO_MATPLOTLIB)


def draw_curves(rows: Sequence[Mapping[str, Value]], path: str | os.PathLike[str], title: str = "") -> None:
    """Draws the curves of a run: losses, top-1 accuracy, learning rate and images per second, by epoch.

    Args:
        rows: of `CsvLog` or `read_csv`; columns as at the top of this module, each of them may be missing.
        path: of the PNG, which appears whole or not at all.
        title: above the picture.

    Raises:
        ImportError: matplotlib is not installed.
        OSError: the file cannot be written.
    """
    figure = _figure(width=11.0, height=7.2, title=title)
    figure.subplots_adjust(left=0.07, right=0.98, top=0.9, bottom=0.07, hspace=0.32, wspace=0.2)
    for axes, (name, labels) in zip(figure.subplots(2, 2).flat, _PANELS.items(), strict=True):
        axes.set_title(name, fontsize=10, loc="left")
        for column, label in labels.items():
            epochs, values = _curve(rows, column)
            if epochs:
                color = _COLORS[_ORDER.index(label) if label in _ORDER else 0]
                _plot(axes, epochs, values, f"{label}{_note(column, epochs, values)}", color)
        _finish(axes)
        if name in ("Learning rate", "Images per second"):
            axes.set_ylim(0, 1.1 * axes.dataLim.y1 if axes.lines else 1)  # else noise of 1 % fills the panel
    _save_figure(figure, path)


def compare_curves(
    paths_by_name: Mapping[str, str | os.PathLike[str]],
    output: str | os.PathLike[str],
    *,
    columns: Sequence[str] = ("loss", "val_top1"),
    title: str = "",
) -> None:
    """Draws the curves of several runs over each other.

    Args:
        paths_by_name: CSV by the name of the run.
        output: path of the PNG, which appears whole or not at all.
        columns: one panel each, from left to right.
        title: above the picture.

    Raises:
        ImportError: matplotlib is not installed.
        ValueError: there is no run or no column, or a run lacks a column.
        OSError: a file cannot be read or written.
    """
    if not paths_by_name or not columns:
        raise ValueError(
            f"Expected runs and columns to draw, received {dict(paths_by_name)}, {list(columns)}."
        )
    runs = {name: read_csv(path) for name, path in paths_by_name.items()}
    for name, rows in runs.items():
        known = list(dict.fromkeys(column for row in rows for column in row))
        for column in columns:
            if column not in known:
                near = difflib.get_close_matches(column, known, n=1)
                hint = f" Did you mean '{near[0]}'?" if near else ""
                raise ValueError(
                    f"The run '{name}' ('{paths_by_name[name]}') has no column '{column}'.{hint} "
                    f"Known: {', '.join(known)}."
                )
    figure = _figure(width=5.5 * len(columns), height=4.4, title=title)
    figure.subplots_adjust(left=0.13 / len(columns), right=0.98, top=0.85, bottom=0.11, wspace=0.2)
    labels = {
        column: f"{panel}, {label}" for panel, group in _PANELS.items() for column, label in group.items()
    }
    for axes, column in zip(figure.subplots(1, len(columns), squeeze=False).flat, columns, strict=True):
        axes.set_title(labels.get(column, column), fontsize=10, loc="left", parse_math=False)
        for place, (name, rows) in enumerate(runs.items()):
            epochs, values = _curve(rows, column)
            label = f"{name}{_note(column, epochs, values)}"
            _plot(axes, epochs, values, label, _COLORS[place % len(_COLORS)])
        _finish(axes)
    _save_figure(figure, output)


def _curve(rows: Sequence[Mapping[str, Value]], column: str) -> tuple[list[int], list[float]]:
    """Returns the epochs and the values of a column, without what is missing or not finite."""
    points = [(int(row["epoch"]), row[column]) for row in rows if column in row]
    points = [point for point in points if isinstance(point[1], float | int) and math.isfinite(point[1])]
    return [epoch for epoch, _ in points], [float(value) for _, value in points]


def _note(column: str, epochs: list[int], values: list[float]) -> str:
    """Returns what the legend says of a curve: the best accuracy and its epoch, or the last value."""
    if not values:
        return ": no finite value"
    if column.endswith("top1"):
        best = max(range(len(values)), key=values.__getitem__)
        return f": best {values[best]:.2f} (epoch {epochs[best]}), last {values[-1]:.2f}"
    return f": last {values[-1]:.4g}"


def _figure(width: float, height: float, title: str) -> Any:
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError(_NO_MATPLOTLIB) from error
    figure = Figure(figsize=(width, height))
    FigureCanvasAgg(figure)
    figure.suptitle(title, fontsize=11, parse_math=False)
    return figure


def _plot(axes: Any, epochs: list[int], values: list[float], label: str, color: str) -> None:
    marker = "." if len(epochs) <= _MARKED_EPOCHS else ""
    axes.plot(epochs, values, color=color, linewidth=1.4, marker=marker, label=label)


def _finish(axes: Any) -> None:
    from matplotlib.ticker import MaxNLocator

    axes.set_xlabel("epoch", fontsize=8)
    axes.xaxis.set_major_locator(MaxNLocator(8, integer=True, min_n_ticks=1))
    axes.ticklabel_format(axis="y", scilimits=(-2, 5), useMathText=True)
    axes.yaxis.get_offset_text().set_fontsize(8)
    axes.tick_params(labelsize=8)
    axes.grid(alpha=0.3, linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)
    if axes.lines:
        for text in axes.legend(fontsize=8, framealpha=0.8).get_texts():
            text.set_parse_math(False)
    else:
        axes.text(0.5, 0.5, "not measured", transform=axes.transAxes, ha="center", fontsize=9, color="0.5")


def _save_figure(figure: Any, path: str | os.PathLike[str]) -> None:
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=100)
    replace_file(path, file.getvalue())
