"""Draws the log of a run: loss, scores, learning rate and speed by epoch."""

import math
import os
from collections.abc import Mapping, Sequence
from typing import Any

from keras_convnext._files import replacing_file
from keras_convnext._messages import printable
from keras_convnext.training.logs import Value

# Panel of the picture -> label by column; the scores of the task stand between them.
_LOSS = {"Loss": {"loss": "training", "val_loss": "validation", "ema_val_loss": "validation, EMA"}}
_SPEED = {
    "Learning rate": {"learning_rate": "last step of the epoch"},
    "Images per second": {"images_per_second": "training"},
}
# Okabe and Ito's palette, which colour-blind readers can tell apart (https://jfly.uni-koeln.de/color/).
_COLORS = {"training": "#0072B2", "validation": "#D55E00", "validation, EMA": "#009E73"}
_MARKED_EPOCHS = 40  # up to here each epoch gets a dot


def draw_curves(
    rows: Sequence[Mapping[str, Value]],
    path: str | os.PathLike[str],
    scores: Mapping[str, str],
    title: str = "",
) -> None:
    """Draws the rows of a `CsvLog` by epoch: losses, scores, learning rate and images per second.

    `scores` has the title of a panel by the name of its score, "top1" of "val_top1" and "ema_val_top1".
    """
    from matplotlib.figure import Figure

    of_scores = {
        panel: {f"val_{name}": "validation", f"ema_val_{name}": "validation, EMA"}
        for name, panel in scores.items()
    }
    panels = _LOSS | of_scores | _SPEED
    figure = Figure(figsize=(11.0, 7.2))
    figure.suptitle(printable(title), fontsize=11, parse_math=False)
    figure.subplots_adjust(left=0.07, right=0.98, top=0.9, bottom=0.07, hspace=0.32, wspace=0.2)
    places = figure.subplots(-(-len(panels) // 2), 2).flat
    for axes, (name, labels) in zip(places, panels.items(), strict=False):
        axes.set_title(name, fontsize=10, loc="left")
        for column, label in labels.items():
            if points := _points(rows, column):
                text = f"{label}: {_note(name in of_scores, points)}"
                color = _COLORS.get(label, _COLORS["training"])
                marker = "." if len(points) <= _MARKED_EPOCHS else ""
                axes.plot(*zip(*points, strict=True), color=color, linewidth=1.4, marker=marker, label=text)
        _finish(axes)
        if name in _SPEED:
            axes.set_ylim(0, 1.1 * axes.dataLim.y1 if axes.lines else 1)  # else noise of 1 % fills the panel
    with replacing_file(path) as file:
        figure.savefig(file, format="png", dpi=100)


def _points(rows: Sequence[Mapping[str, Value]], column: str) -> list[tuple[int, float]]:
    """Returns (epoch, value) of a column, without what is missing or not finite."""
    points = [(int(row["epoch"]), row.get(column)) for row in rows]
    return [
        (epoch, value) for epoch, value in points if isinstance(value, float | int) and math.isfinite(value)
    ]


def _note(is_score: bool, points: list[tuple[int, float]]) -> str:
    """Returns what the legend says of a curve: the best score and its epoch, or the last value."""
    last = points[-1][1]
    if not is_score:
        return f"last {last:.4g}"
    epoch, best = max(points, key=lambda point: point[1])
    return f"best {best:.2f} (epoch {epoch}), last {last:.2f}"


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
