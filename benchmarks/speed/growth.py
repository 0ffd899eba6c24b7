"""Time against batch, resolution and variant, and whether it grows as the work does.

python -m benchmarks.speed growth
"""

import argparse
import dataclasses
import math
import pathlib
from collections.abc import Callable, Sequence
from typing import Any

from benchmarks.speed import output
from benchmarks.speed.alternating_runs import Measurement, measure
from benchmarks.speed.cases import Progress, entrants
from benchmarks.speed.implementations import TITLES, Case, is_ours
from benchmarks.speed.report import Table
from keras_convnext.analysis.plan import multiply_adds
from keras_convnext.variants import VARIANTS

MIDDLE = Case("convnext_tiny", batch=8, image_size=224)  # the values that stay when one thing grows
LIMIT = 1.5  # times the least time for the same work in a series
FASTER = "grows faster than its work"
SLOWER = "fixed costs show"  # on the side of less work
_COLOURS = {"tensorflow": "#d1660a", "jax": "#1b7f4d", "torch": "#1f77b4"}
_PEER_COLOUR = "#8a8a8a"
_PANELS = {"batch": "images in a batch", "image size": "image size, pixels", "variant": "GFLOP an image"}


@dataclasses.dataclass(frozen=True)
class Point:
    """Speed at one place of a series.

    Attributes:
        series: what grows: "batch", "image size" or "variant".
        implementation: backend or peer.
        case: what was run.
        gflop: 1e9 floating-point operations an image.
        seconds: of an image, median over the rounds; NaN when it could not run.
        mark: what is said of it when its time for the same work is more than `LIMIT` times the least of its
            series, else "".
        problem: why it could not run, else "".
    """

    series: str
    implementation: str
    case: Case
    gflop: float
    seconds: float
    mark: str = ""
    problem: str = ""

    @property
    def ms_per_gflop(self) -> float:
        """Milliseconds for 1e9 floating-point operations: the same everywhere if time grows as work."""
        return 1000 * self.seconds / self.gflop


def series_cases(
    models: Sequence[str], batches: Sequence[int], image_sizes: Sequence[int], **values: Any
) -> dict[str, list[Case]]:
    """Returns the cases of each series; where only one thing can vary, the others are those of `MIDDLE`.

    Args:
        models: architectures.
        batches: numbers of images.
        image_sizes: sides in pixels.
        values: other fields of a case, such as mode.
    """
    middle = dataclasses.replace(
        MIDDLE,
        model=_near(models, MIDDLE.model),
        batch=_near(batches, MIDDLE.batch),
        image_size=_near(image_sizes, MIDDLE.image_size),
        **values,
    )
    return {
        "batch": [dataclasses.replace(middle, batch=batch) for batch in sorted(batches)],
        "image size": [dataclasses.replace(middle, image_size=size) for size in sorted(image_sizes)],
        "variant": [
            dataclasses.replace(middle, model=model)
            for model in sorted(models, key=lambda name: multiply_adds(VARIANTS[name]))
        ],
    }


def _near(values: Sequence[Any], wanted: Any) -> Any:
    return wanted if wanted in values else values[0]


def table(
    series: dict[str, list[Case]],
    implementations: Sequence[str],
    rounds: int = 5,
    seconds: float = 1.0,
    threads: int | None = None,
    on_progress: Callable[[str, int, int], None] | None = None,
) -> list[Point]:
    """Measures every case of every series once, the implementations of a case in turns.

    Where a process is killed, as when memory runs out, the images of that case are halved until none is; not
    where the batch is what grows.

    Args:
        series: what `series_cases` returns.
        implementations: names, see `implementations.TITLES`.
        rounds: turns of each.
        seconds: about how long a turn lasts; it has three steps at least.
        threads: cores of each, None for all.
        on_progress: called with what is done now, the number of cases done and of all.

    Returns:
        The points, by series and implementation.
    """
    distinct = list(dict.fromkeys(case for cases in series.values() for case in cases))
    measured: dict[Case, list[Measurement]] = {}
    for number, case in enumerate(distinct):
        if on_progress is not None:
            on_progress(case.title, number, len(distinct))
        found = measure(case, implementations, rounds, seconds, threads)
        smaller = case
        while case not in series["batch"] and smaller.batch > 1 and _was_killed(found):
            smaller = dataclasses.replace(smaller, batch=smaller.batch // 2)
            found = measure(smaller, implementations, rounds, seconds, threads)
        measured[case] = found
    if on_progress is not None:
        on_progress("done", len(distinct), len(distinct))
    points = []
    for name, cases in series.items():
        for place in range(len(implementations)):
            points += _marked([_point(name, measured[case][place]) for case in cases])
    return points


def _was_killed(found: Sequence[Measurement]) -> bool:
    return any("SIGKILL" in one.problem for one in found)


def _point(series: str, found: Measurement) -> Point:
    case = found.case
    # A training step: the gradients by maps and by weights cost as much as the forward pass each.
    passes = 3 if case.mode == "training" else 1
    flops = 2 * passes * multiply_adds(VARIANTS[case.model], case.image_size)
    seconds = found.median / case.batch
    return Point(series, found.implementation, case, flops / 1e9, seconds, problem=found.problem)


def _marked(points: Sequence[Point]) -> list[Point]:
    """Marks the points that are slow for their work."""
    ran = [point for point in points if not math.isnan(point.seconds)]
    if not ran:
        return list(points)
    best = min(ran, key=lambda point: point.ms_per_gflop)
    marked = []
    for point in points:
        mark = ""
        if point.ms_per_gflop > LIMIT * best.ms_per_gflop:  # False for NaN
            is_larger = point.gflop * point.case.batch > best.gflop * best.case.batch
            mark = FASTER if is_larger else SLOWER
        marked.append(dataclasses.replace(point, mark=mark))
    return marked


def as_tables(points: Sequence[Point]) -> list[Table]:
    """Makes a table for each series."""
    tables = []
    for series in dict.fromkeys(point.series for point in points):
        rows, notes = [], []
        for point in points:
            if point.series != series:
                continue
            case = point.case
            if point.problem:
                notes.append(f"{TITLES[point.implementation]}, {case.title}: {point.problem}")
                continue
            rows.append(
                (
                    TITLES[point.implementation],
                    case.model,
                    str(case.batch),
                    str(case.image_size),
                    f"{point.gflop:.3g}",
                    f"{1000 * point.seconds:.2f}",
                    f"{1 / point.seconds:.2f}",
                    f"{point.gflop / point.seconds:.1f}",
                    f"{point.ms_per_gflop:.2f}",
                    point.mark,
                )
            )
        notes.append(f"marked where ms/GFLOP is more than {LIMIT:g} times the least of its series")
        titles = ("implementation", "model", "batch", "pixels", "GFLOP", "ms/image", "images/s", "GFLOP/s")
        tables.append(
            Table(
                f"Growth with {series}; GFLOP an image",
                (*titles, "ms/GFLOP", ""),
                "<<" + 7 * ">" + "<",
                rows,
                tuple(notes),
            )
        )
    return tables


def plot(path: pathlib.Path, points: Sequence[Point]) -> None:
    """Draws milliseconds for the same work, a panel for each series: a flat line grows as its work does.

    Marked points are ringed.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(15, 4.8), layout="constrained")
    FigureCanvasAgg(figure)
    every_axes = figure.subplots(1, len(_PANELS), sharey=True)
    for axes, (series, label) in zip(every_axes, _PANELS.items(), strict=True):
        own = [point for point in points if point.series == series and not point.problem]
        for name in dict.fromkeys(point.implementation for point in own):
            line = [point for point in own if point.implementation == name]
            colour, style = _COLOURS.get(name, _PEER_COLOUR), "-" if is_ours(name) else "--"
            places, heights = [_place(point) for point in line], [point.ms_per_gflop for point in line]
            axes.plot(places, heights, style, color=colour, marker="o", markersize=4, label=TITLES[name])
            ringed = [point for point in line if point.mark]
            axes.plot(
                [_place(point) for point in ringed],
                [point.ms_per_gflop for point in ringed],
                "o",
                color=colour,
                fillstyle="none",
                markersize=11,
            )
        axes.set_xscale("log")
        ticks = {_place(point): _tick(point) for point in own}
        axes.set_xticks(list(ticks), list(ticks.values()), fontsize=8)
        axes.set_xticks([], minor=True)
        axes.set_xlabel(label, fontsize=9)
        axes.grid(alpha=0.3, linewidth=0.6)
        axes.spines[["top", "right"]].set_visible(False)
        if own:
            axes.set_title(_constant(series, own[0].case), fontsize=10, loc="left")
    every_axes[0].set_ylabel("milliseconds per GFLOP", fontsize=9)
    every_axes[0].set_ylim(bottom=0)
    if any(not point.problem for point in points):
        every_axes[0].legend(fontsize=8, loc="lower right")
        figure.suptitle(f"Flat: time grows as the work does. Ringed: more than {LIMIT:g} times the least.")
    figure.savefig(path, dpi=110, format="png")


def _place(point: Point) -> float:
    return {"batch": point.case.batch, "image size": point.case.image_size, "variant": point.gflop}[
        point.series
    ]


def _tick(point: Point) -> str:
    if point.series == "variant":
        return f"{point.case.model.partition('_')[2]}\n{point.gflop:.3g}"
    return f"{_place(point):g}"


def _constant(series: str, case: Case) -> str:
    """Names the values that do not grow in a series."""
    words = [
        case.model if series != "variant" else "",
        case.mode,
        f"batch {case.batch}" if series != "batch" else "",
        f"{case.image_size} pixels" if series != "image size" else "",
        case.dtype,
    ]
    return ", ".join(word for word in words if word)


def run(options: argparse.Namespace) -> int:
    """Runs `python -m benchmarks.speed growth`.

    Args:
        options: what `cases.resolve` returns; one mode and one dtype.

    Returns:
        0, or 1 when nothing could run.

    Raises:
        ValueError: more than one mode or dtype.
    """
    for name in ("mode", "dtype"):
        given = getattr(options, name)
        if len(given) > 1:
            raise ValueError(f"Expected one {name} for the growth, received {','.join(given)}.")
    where = output.begin(options)
    implementations = entrants(options.backends, options.against)
    (mode,), (dtype,) = options.mode, options.dtype
    series = series_cases(options.architectures, options.batch, options.image_size, mode=mode, dtype=dtype)
    progress = Progress("growth")
    points = table(series, implementations, options.rounds, options.seconds, options.threads, progress.show)
    rows = [
        {
            "series": point.series,
            "implementation": point.implementation,
            **dataclasses.asdict(point.case),
            "gflop_per_image": point.gflop,
            "ms_per_image": None if point.problem else 1000 * point.seconds,
            "gflop_per_second": None if point.problem else point.gflop / point.seconds,
            "ms_per_gflop": None if point.problem else point.ms_per_gflop,
            "mark": point.mark,
            "problem": point.problem,
        }
        for point in points
    ]
    tables = as_tables(points)
    output.end(options, "growth", where, implementations, tables, rows, lambda path: plot(path, points))
    return 0 if any(not point.problem for point in points) else 1
