"""Draws the picture of README.md, speed/results/summary.png, from the rows of speed/results/bench.csv.

ConvNeXt-Tiny with batches of 8 images of 224 pixels in float32: this package and keras.applications on each
backend, and timm in PyTorch. Bars are milliseconds an image; at those of the package stands how many times as
fast as keras.applications on the same backend it is, the median over the rounds. Nothing is measured here.

    python benchmarks/speed_summary.py
"""

import argparse
import csv
import pathlib
import sys

FOLDER = pathlib.Path(__file__).resolve().parent / "speed" / "results"
CASE = {"model": "convnext_tiny", "batch": "8", "image_size": "224", "dtype": "float32"}
MODES = ("inference", "training")
BACKENDS = {"tensorflow": "TensorFlow", "jax": "JAX", "torch": "PyTorch"}
OURS, APPLICATIONS, TIMM = "keras_convnext", "keras.applications", "timm, eager PyTorch"
COLOURS = {OURS: "#2166ac", APPLICATIONS: "#bdbdbd", TIMM: "#8c6d31"}


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--output",
        type=pathlib.Path,
        default=FOLDER / "summary.png",
        help="default benchmarks/speed/results/summary.png",
    )
    output = parser.parse_args(arguments).output
    try:
        found = read(FOLDER / "bench.csv")
    except (OSError, KeyError) as error:
        print(f"speed_summary.py: error: {error}", file=sys.stderr)
        return 2
    draw(found, output)
    print(output)
    return 0


def read(path: pathlib.Path) -> dict[str, dict[str, dict[str, str]]]:
    """Reads mode -> implementation -> its first row of the case, which is that where the peers run too.

    Raises:
        OSError: no such file.
        KeyError: an implementation was not measured.
    """
    found: dict[str, dict[str, dict[str, str]]] = {mode: {} for mode in MODES}
    with open(path, newline="", encoding="utf-8") as file:
        for row in csv.DictReader(file):
            if row["mode"] in MODES and all(row[name] == value for name, value in CASE.items()):
                found[row["mode"]].setdefault(row["implementation"], row)
    wanted = [*BACKENDS, *(f"keras.applications:{backend}" for backend in BACKENDS), "timm"]
    return {mode: {name: rows[name] for name in wanted} for mode, rows in found.items()}


def bars(found: dict[str, dict[str, str]]) -> list[tuple[str, str, float, str]]:
    """Returns the bars from the top: (label, whose, milliseconds, text at the bar)."""
    times = {name: float(row["ms_per_image"]) for name, row in found.items()}
    rows = []
    for backend, title in BACKENDS.items():
        ours, other = times[backend], times[f"keras.applications:{backend}"]
        ratio = float(found[backend]["times_keras.applications"])
        rows.append((title, OURS, ours, f"{ours:.0f} ms, {ratio:.1f} times as fast"))
        rows.append(("", APPLICATIONS, other, f"{other:.0f} ms"))
    rows.append(("", TIMM, times["timm"], f"{times['timm']:.0f} ms"))
    return rows


def draw(found: dict[str, dict[str, dict[str, str]]], path: pathlib.Path) -> None:
    """Writes the picture."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    from keras_convnext._files import replacing_path

    figure = Figure(figsize=(10, 3.2), layout="constrained")
    FigureCanvasAgg(figure)
    for axes, mode in zip(figure.subplots(1, len(MODES)), MODES, strict=True):
        rows = bars(found[mode])
        # Pairs stand closer together than their neighbours.
        places = [place + 0.35 * (place // 2) for place in range(len(rows))]
        axes.barh(places, [row[2] for row in rows], 0.85, color=[COLOURS[row[1]] for row in rows])
        labelled = [(place + 0.5, row[0]) for place, row in zip(places, rows, strict=True) if row[0]]
        axes.set_yticks(*zip(*labelled, strict=True))
        axes.tick_params(left=False, labelsize=9)
        axes.invert_yaxis()
        axes.set_xlim(0, 1.3 * max(row[2] for row in rows))
        for place, (_, whose, time, text) in zip(places, rows, strict=True):
            axes.annotate(
                text,
                (time, place),
                (4, 0),
                textcoords="offset points",
                va="center",
                fontsize=8,
                color="black" if whose == OURS else "#595959",
            )
        axes.set_title(f"ConvNeXt-Tiny, {mode}: milliseconds an image", fontsize=10, loc="left")
        axes.spines[["top", "right"]].set_visible(False)
    figure.legend(
        handles=[Patch(color=colour, label=name) for name, colour in COLOURS.items()],
        loc="outside lower center",
        ncols=len(COLOURS),
        frameon=False,
        fontsize=9,
    )
    with replacing_path(path) as temporary:
        figure.savefig(temporary, dpi=120, format="png")


if __name__ == "__main__":
    sys.exit(main())
