"""Measurements as tables in text and Markdown, a CSV file and a plot."""

import csv
import dataclasses
import io
import os
import pathlib
import tempfile
from collections.abc import Sequence

from benchmarks.speed.alternating_runs import Measurement, ratio
from benchmarks.speed.implementations import AGAINST, TITLES, is_ours
from keras_convnext._environment import require
from keras_convnext._files import replacing_file, replacing_path
from keras_convnext._terminal import markdown_table, table_lines

CSV_FILE, TABLE_FILE, PLOT_FILE = "bench.csv", "table.md", "bench.png"
PLOT_COLUMNS_FROM = 4  # cases, from which on the plot has two columns
_OUR_COLOUR, _PEER_COLOUR = "#1f77b4", "#b5b5b5"


@dataclasses.dataclass(frozen=True)
class Table:
    """A table to print, and to write as Markdown.

    Attributes:
        title: of the table.
        titles: of the columns.
        alignments: one of "<" and ">" for each column.
        rows: cells, as text.
        notes: lines below it.
    """

    title: str
    titles: tuple[str, ...]
    alignments: str
    rows: Sequence[tuple[str, ...]]
    notes: tuple[str, ...] = ()

    def text(self) -> str:
        """For a terminal."""
        lines = [self.title, *(f"  {line}" for line in table_lines(self.titles, self.alignments, self.rows))]
        return "\n".join([*lines, *(f"  {note}" for note in self.notes)])

    def markdown(self) -> str:
        """For a page."""
        lines = [f"### {self.title}", "", *markdown_table(self.titles, self.alignments, self.rows)]
        return "\n".join([*lines, *(f"\n{note}" for note in self.notes)])


def case_table(measurements: Sequence[Measurement]) -> Table:
    """Times of the implementations of one case, and how many times as fast as each peer ours are."""
    peers = peer_labels(measurements)
    case = measurements[0].case
    rows, notes = [], []
    for found in measurements:
        if found.problem:
            notes.append(f"{TITLES[found.implementation]}: {found.problem}")
            continue
        ratios = ratios_of(found, measurements)
        rows.append(
            (
                TITLES[found.implementation],
                f"{milliseconds(found):.2f}",
                f"{1000 / milliseconds(found):.2f}",
                f"{_per_image(found, min):.2f}..{_per_image(found, max):.2f}",
                f"{found.peak_bytes / 2**20:,.0f}",
                f"{found.first:.1f}",
                *(f"{ratios[peer]:.2f}" if peer in ratios else "" for peer in peers),
            )
        )
    return Table(
        case.title,
        (
            "implementation",
            "ms/image",
            "images/s",
            "min..max",
            "peak MiB",
            "first s",
            *(f"x {p}" for p in peers),
        ),
        "<" + ">" * (5 + len(peers)),
        rows,
        tuple(notes),
    )


def milliseconds(found: Measurement) -> float:
    """Milliseconds an image, median over the rounds."""
    return 1000 * found.median / found.case.batch


def _per_image(found: Measurement, function) -> float:
    return 1000 * function(found.seconds) / found.case.batch


def label(implementation: str) -> str:
    """Returns the name of a peer in columns and for --against: without its backend."""
    return "openvino" if implementation == "openvino-timm" else implementation.partition(":")[0]


def peer_labels(measurements: Sequence[Measurement]) -> list[str]:
    """The peers that ran, each once, in their order."""
    return list(dict.fromkeys(label(m.implementation) for m in measurements if _is_peer(m) and m.seconds))


def ratios_of(ours: Measurement, measurements: Sequence[Measurement]) -> dict[str, float]:
    """Returns how many times as fast as each peer ours is; keras.applications on the same backend only."""
    ratios = {}
    for peer in measurements:
        backend = peer.implementation.partition(":")[2]
        fits = peer.case == ours.case and backend in ("", ours.implementation)
        if is_ours(ours.implementation) and _is_peer(peer) and fits and ours.seconds and peer.seconds:
            ratios[label(peer.implementation)] = ratio(ours, peer)
    return ratios


def _is_peer(found: Measurement) -> bool:
    return not is_ours(found.implementation)


def facts(found: Measurement, measurements: Sequence[Measurement]) -> dict:
    """All that was measured of an implementation, for JSON."""
    return {
        "implementation": found.implementation,
        **dataclasses.asdict(found.case),
        "ms_per_image": milliseconds(found) if found.seconds else None,
        "images_per_second": 1000 / milliseconds(found) if found.seconds else None,
        "min_ms_per_image": _per_image(found, min) if found.seconds else None,
        "max_ms_per_image": _per_image(found, max) if found.seconds else None,
        "seconds": list(found.seconds),
        "first_seconds": found.first if found.seconds else None,
        "peak_bytes": found.peak_bytes,
        "ratios": ratios_of(found, measurements),
        "device": found.device,
        "versions": found.versions,
        "problem": found.problem,
    }


def all_facts(groups: Sequence[Sequence[Measurement]]) -> list[list[dict]]:
    """`facts` of every measurement, by group."""
    return [[facts(found, group) for found in group] for group in groups]


def check_output(folder: str | os.PathLike[str]) -> None:
    """Makes the folder and checks that it can be written and the plot drawn, before minutes are spent.

    Raises:
        ImportError: matplotlib is not installed.
        OSError: the folder cannot be made, or nothing can be written to it.
    """
    require("matplotlib", "The plot")
    pathlib.Path(folder).mkdir(parents=True, exist_ok=True)
    try:
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise OSError(
            f"Expected a folder that can be written, received {folder}: {error.strerror}."
        ) from None


def write(
    folder: str | os.PathLike[str],
    heading: Sequence[str],
    machine: dict[str, str],
    groups: Sequence[Sequence[Measurement]],
    tables: Sequence[Table],
) -> None:
    """Writes bench.csv, table.md and bench.png, each whole or not at all.

    Args:
        folder: made when it is not there.
        heading: lines on machine, versions and rounds.
        machine: what `_environment.machine` returns, for the CSV file.
        groups: the measurements of each case.
        tables: what is printed.
    """
    check_output(folder)
    folder = pathlib.Path(folder)
    with replacing_file(folder / CSV_FILE) as file:
        file.write(_csv_text(machine, groups).encode("utf-8"))
    with replacing_file(folder / TABLE_FILE) as file:
        pieces = ["\n".join(f"- {line}" for line in heading), *(table.markdown() for table in tables)]
        file.write(("\n\n".join(pieces) + "\n").encode("utf-8"))
    plot(folder / PLOT_FILE, groups)


def _csv_text(machine: dict[str, str], groups: Sequence[Sequence[Measurement]]) -> str:
    rows = []
    for group in groups:
        for found in group:
            row = facts(found, group)
            ratios, versions = row.pop("ratios"), row.pop("versions")
            row["seconds"] = " ".join(f"{seconds:.6f}" for seconds in found.seconds)
            row |= {f"times_{peer}": ratios.get(peer) for peer in AGAINST}
            row["versions"] = " ".join(f"{name}=={version}" for name, version in versions.items())
            rows.append({name: _cell(value) for name, value in row.items()} | machine)
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]) if rows else [], lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def _cell(value) -> str:
    if value is None:
        return ""
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def plot(path: str | os.PathLike[str], groups: Sequence[Sequence[Measurement]]) -> None:
    """Draws milliseconds an image as bars, a panel for each case: ours coloured, peers grey.

    At the bars: the milliseconds, and for ours how many times as fast as each peer. Nothing is drawn of
    groups of several cases, and no file is written without any other.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    groups = [[found for found in group if found.seconds] for group in groups]
    groups = [group for group in groups if len({found.case for found in group}) == 1]
    if not groups:
        return
    columns = 2 if len(groups) >= PLOT_COLUMNS_FROM else 1
    panels = [groups[start : start + columns] for start in range(0, len(groups), columns)]
    heights = [0.9 + 0.3 * max(len(group) for group in row) for row in panels]
    figure = Figure(figsize=(9.5 * columns, sum(heights)), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(len(panels), columns, squeeze=False, gridspec_kw={"height_ratios": heights})
    for row, row_axes in zip(panels, axes, strict=True):
        for number, panel in enumerate(row_axes):
            if number < len(row):
                _draw_case(panel, row[number])
            else:
                panel.axis("off")
    with replacing_path(path) as temporary:
        figure.savefig(temporary, dpi=120, format="png")


def _draw_case(axes, group: Sequence[Measurement]) -> None:
    times = [milliseconds(found) for found in group]
    colours = [_OUR_COLOUR if is_ours(found.implementation) else _PEER_COLOUR for found in group]
    places = range(len(group))
    axes.barh(places, times, color=colours)
    axes.set_yticks(places, [TITLES[found.implementation] for found in group])
    axes.invert_yaxis()
    axes.set_xlim(0, 1.75 * max(times))  # room for the text next to the bars
    for place, found, time in zip(places, group, times, strict=True):
        ratios = ratios_of(found, group)
        text = ", ".join(f"{value:.2f} x {peer}" for peer, value in ratios.items())
        axes.annotate(
            f"{_rounded(time)} ms{'   ' * bool(text)}{text}",
            (time, place),
            xytext=(4, 0),
            textcoords="offset points",
            va="center",
            fontsize=8,
        )
    axes.set_title(group[0].case.title, fontsize=10, loc="left")
    axes.set_xlabel("milliseconds an image", fontsize=8)
    axes.tick_params(labelsize=8)
    axes.spines[["top", "right"]].set_visible(False)


def _rounded(number: float) -> str:
    return f"{number:,.0f}" if number >= 100 else f"{number:.3g}"
