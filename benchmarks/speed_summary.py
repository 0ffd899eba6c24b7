"""Draws the picture of README.md and prints its table, from speed/results/MACHINE/bench.csv.

ConvNeXt-Tiny with images of 224 pixels in float32: how many times as fast as a peer this package is, on each
backend and machine, the median over the rounds of a run. The peers are timm in eager PyTorch, and
keras.applications on the same backend. The number at a row is the least of all machines. Nothing is measured
here: `make bench RESULTS=benchmarks/speed/results/MACHINE` does that.

    python benchmarks/speed_summary.py
"""

import argparse
import csv
import pathlib
import sys

FOLDER = pathlib.Path(__file__).resolve().parent / "speed" / "results"
MODEL = {"model": "convnext_tiny", "image_size": "224", "dtype": "float32"}
CASES = (("inference", "1"), ("inference", "8"), ("training", "8"))  # mode, batch
BACKENDS = {"tensorflow": "TensorFlow", "jax": "JAX", "torch": "PyTorch"}
PEERS = {"timm": "timm, eager PyTorch", "keras.applications": "keras.applications, same backend"}
COLOURS = ("#2166ac", "#d6604d", "#4d9221", "#7b3294", "#8c6d31")

Ratios = dict[tuple[str, str, str, str], dict[str, float]]


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
        found = read(FOLDER)
    except (OSError, KeyError, ValueError) as error:
        print(f"speed_summary.py: error: {error}", file=sys.stderr)
        return 2
    draw(found, output)
    print(f"{table(found)}\n{output}")
    return 0


def read(folder: pathlib.Path) -> Ratios:
    """Reads (mode, batch, backend, peer) -> machine -> how many times as fast as the peer ours is.

    Raises:
        OSError: no such file.
        KeyError: a column is missing.
        ValueError: there is no table, or a machine lacks a case.
    """
    found: Ratios = {}
    for path in sorted(folder.glob("*/bench.csv")):
        with open(path, newline="", encoding="utf-8") as file:
            rows = [row for row in csv.DictReader(file) if all(row[key] == MODEL[key] for key in MODEL)]
        for row in rows:
            for peer in PEERS:
                case = (row["mode"], row["batch"], row["implementation"], peer)
                if case[:2] in CASES and case[2] in BACKENDS and row[f"times_{peer}"]:
                    # The first is that where the peers run too.
                    found.setdefault(case, {}).setdefault(path.parent.name, float(row[f"times_{peer}"]))
    for case in ((*case, backend, peer) for case in CASES for backend in BACKENDS for peer in PEERS):
        missing = set(machines(found)) - set(found.get(case, ()))
        if missing or not found:
            raise ValueError(
                f"Expected {case} in the bench.csv of each machine in {folder}, not in {missing}."
            )
    return found


def machines(found: Ratios) -> list[str]:
    return sorted({machine for ratios in found.values() for machine in ratios})


def table(found: Ratios) -> str:
    """Returns the least ratios to timm as Markdown."""
    lines = [f"| ConvNeXt-Tiny | {' | '.join(BACKENDS.values())} |", "|---|" + "--:|" * len(BACKENDS)]
    for mode, batch in CASES:
        least = [min(found[mode, batch, backend, "timm"].values()) for backend in BACKENDS]
        lines.append(f"| {mode}, batch {batch} | {' | '.join(f'{ratio:.2f}' for ratio in least)} |")
    return "\n".join(lines)


def draw(found: Ratios, path: pathlib.Path) -> None:
    """Writes the picture: a panel for each peer, a row for each case and backend, a dot for each machine."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    from keras_convnext._files import replacing_path

    colours = {name: COLOURS[place % len(COLOURS)] for place, name in enumerate(machines(found))}
    rows = [(mode, batch, backend) for mode, batch in CASES for backend in BACKENDS]
    places = [place + 0.6 * (place // len(BACKENDS)) for place in range(len(rows))]
    figure = Figure(figsize=(10, 3.6), layout="constrained")
    FigureCanvasAgg(figure)
    for axes, (peer, title) in zip(figure.subplots(1, len(PEERS), sharey=True), PEERS.items(), strict=True):
        axes.axvline(1, color="#595959", linewidth=1)
        for place, row in zip(places, rows, strict=True):
            ratios = found[(*row, peer)]
            for machine, ratio in ratios.items():
                axes.plot(ratio, place, "o", color=colours[machine], markersize=6)
            least = min(ratios.values())
            axes.annotate(
                f"{least:.2f}", (least, place), (-6, 0), textcoords="offset points",
                ha="right", va="center", fontsize=8,
            )  # fmt: skip
        axes.set_xscale("log", base=2)
        axes.margins(x=0.15)
        axes.xaxis.set_major_formatter("{x:g}")
        axes.set_yticks(places, [f"{mode}, batch {batch}, {BACKENDS[name]}" for mode, batch, name in rows])
        axes.tick_params(labelsize=8)
        axes.set_title(f"times as fast as {title}", fontsize=10, loc="left")
        axes.spines[["top", "right"]].set_visible(False)
    axes.invert_yaxis()
    for machine, colour in colours.items():
        axes.plot([], [], "o", color=colour, label=machine.replace("_", " "))
    figure.legend(loc="outside lower center", ncols=len(colours), frameon=False, fontsize=9)
    with replacing_path(path) as temporary:
        figure.savefig(temporary, dpi=120, format="png")


if __name__ == "__main__":
    sys.exit(main())
