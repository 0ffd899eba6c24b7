"""A table and a picture of exported files: size, agreement with the model, time."""

import dataclasses
import os
import pathlib
from collections.abc import Sequence
from typing import Any

from keras_convnext._environment import require
from keras_convnext._files import PNG_MARK, prepare_folder, replace_file, replacing_file
from keras_convnext._terminal import csv_text, markdown_table

COLUMNS = ("file", "format", "precision", "MB", "difference", "same top-1", "ms/image", "x Keras model")
ALIGNMENTS = "<<<>>>>>"
# The files of a report, and what shows that `write_report` wrote one, which it may then replace.
MARKS = {"exports.csv": b"path,format,precision,", "table.md": b"\n| file", "exports.png": PNG_MARK}


def rows(results: Sequence[Any]) -> list[tuple[str, ...]]:
    """Formats `export.ExportResult`s, in the order of `COLUMNS`.

    "difference" is the largest of an output, relative to the model's largest output; "x Keras model" how many
    times as fast the file is as the model, measured in turns.
    """
    return [
        (
            result.path.name,
            result.format,
            result.precision,
            f"{result.num_bytes / 1e6:.2f}",
            f"{result.relative_difference:.1e}",
            f"{result.agreement:.1%}",
            f"{result.milliseconds:.2f}",
            f"{result.model_milliseconds / result.milliseconds:.2f}",
        )
        for result in results
    ]


def measured_on(results: Sequence[Any]) -> str:
    """Says on which images the files were compared with the model."""
    images = dict.fromkeys(f"{result.num_images} {result.images}" for result in results)
    return f"difference, same top-1: on {'; '.join(images)}"


def write_report(
    results: Sequence[Any], folder: str | os.PathLike[str], heading: str, savings: str = ""
) -> list[pathlib.Path]:
    """Writes exports.csv, table.md and exports.png of some `export.ExportResult`s, and returns their paths.

    `heading` is a line above the table and the picture, such as the model and the machine; `savings` the text
    of `deploy.savings`, for the end of table.md.
    """
    prepare_folder(folder, MARKS)
    paths = [pathlib.Path(folder) / name for name in MARKS]
    names = [field.name for field in dataclasses.fields(results[0])]
    lines = [heading, "", *markdown_table(COLUMNS, ALIGNMENTS, rows(results)), "", measured_on(results)]
    if savings:
        lines += ["", "What was folded, in the model -> in the files:", "", "```", savings, "```"]
    replace_file(paths[0], csv_text([names, *map(dataclasses.astuple, results)]).encode())
    replace_file(paths[1], ("\n".join(lines) + "\n").encode())
    _draw(results, paths[2], heading)
    return paths


def _draw(results, path, heading):
    require("matplotlib", "The picture of the report")
    from matplotlib import figure

    picture = figure.Figure(figsize=(8, 5), dpi=130, layout="constrained")
    axes = picture.add_subplot()
    for marker, format in zip("osD^v", dict.fromkeys(result.format for result in results), strict=False):
        chosen = [result for result in results if result.format == format]
        points = axes.scatter(
            [result.num_bytes / 1e6 for result in chosen],
            [result.milliseconds for result in chosen],
            c=[100 * result.agreement for result in chosen],
            cmap="RdYlGn",
            vmin=0,
            vmax=100,
            s=90,
            marker=marker,
            edgecolors="black",
            linewidths=0.6,
            label=format,
        )
    largest = max(result.num_bytes for result in results)
    for result in results:
        is_right = result.num_bytes > largest / 2
        axes.annotate(
            f"{result.precision}, {result.agreement:.0%}",
            (result.num_bytes / 1e6, result.milliseconds),
            textcoords="offset points",
            xytext=(-8 if is_right else 8, -3),
            ha="right" if is_right else "left",
            fontsize=7,
        )
    axes.set_title(heading, fontsize=10)
    axes.margins(0.15)
    axes.set(xlabel="size, MB", ylabel="milliseconds an image", xlim=(0, None), ylim=(0, None))
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    picture.colorbar(points, label="images with the model's top-1, %")
    with replacing_file(path) as file:
        picture.savefig(file, format="png", metadata={"Software": "keras_convnext"})
