"""Makes notebooks/roadmap.ipynb from the steps of `keras_convnext.roadmap`.

    python tools/make_roadmap.py

What a step changes, and why, is written from `STEPS`; pictures are drawn when the notebook runs.
"""

import json
import pathlib
import sys

from keras_convnext import roadmap

NOTEBOOK = pathlib.Path(__file__).resolve().parents[1] / "notebooks" / "roadmap.ipynb"

TITLE = """\
# From ResNet-50 to ConvNeXt, step by step

"A ConvNet for the 2020s" (Liu et al. 2022) changes a ResNet into ConvNeXt in 16 steps and trains each of
them. Here each step is a model: a row of `keras_convnext.roadmap.STEPS` says what it changes. This redraws
figure 2 of the paper from data, shows every change, draws the blocks, and adds what the paper does not
have: the time of each step.

It needs `pip install ".[data,torch]" jupyter` in a checkout; `tensorflow` or `jax` do as well as `torch`."""

START = """\
import csv
import os
import pathlib

import keras
import matplotlib.pyplot as plt
import numpy as np

from keras_convnext import roadmap

TIMES = pathlib.Path(os.environ.get("TIMES", "../benchmarks/runs/roadmap.csv"))  # by benchmarks/roadmap.py
steps = range(len(roadmap.STEPS))
costs = {regime: [roadmap.cost(step, regime) for step in steps] for regime in ("tiny", "base")}
names = [row.name if row.kept else f"({row.name})" for row in roadmap.STEPS]

print("Keras", keras.__version__, "on", keras.backend.backend())
for number, (row, cost) in enumerate(zip(roadmap.STEPS, costs["tiny"], strict=True)):
    counted = f"{cost.multiply_adds / 1e9:.3f} G  {cost.weights:>10,} weights"
    print(f"{number:2}  {row.name:22} {row.top1:.2f} %  {counted}")"""

FIGURE_TEXT = """\
## Figure 2 of the paper

Bars are the published accuracy: blue from ResNet-50, with the deviation over three seeds, grey from
ResNet-200, one run. Stars are multiply-adds as we count them, not as they are printed. Hatched steps were
tried and not kept."""

FIGURE = """\
figure, (left, right) = plt.subplots(
    1, 2, figsize=(11, 6.8), layout="constrained", width_ratios=(3, 1), sharey=True
)
places = np.arange(len(names))
deviations = [row.top1_std or 0 for row in roadmap.STEPS]
hatches = ["" if row.kept else "///" for row in roadmap.STEPS]
large = [row.top1_base for row in roadmap.STEPS]
left.barh(places + 0.2, large, 0.4, color="0.8", hatch=hatches, edgecolor="0.6")
left.barh(
    places - 0.2, [row.top1 for row in roadmap.STEPS], 0.4, xerr=deviations, color="#6baed6", hatch=hatches,
    edgecolor="#2171b5", capsize=2,
)  # fmt: skip
for place, row in enumerate(roadmap.STEPS):
    left.text(76.1, place - 0.2, f"{row.top1:.2f}", va="center", fontsize=8)
    left.text(76.1, place + 0.2, f"{row.top1_base:.2f}", va="center", fontsize=8)
left.set_xlim(76, 84)
left.set_xlabel("published top-1 accuracy on ImageNet-1k, % (axis begins at 76)")
left.set_yticks(places, names)
left.invert_yaxis()
flops = left.twiny()
for regime, offset, color in (("tiny", -0.2, "#08306b"), ("base", 0.2, "0.3")):
    counted = [cost.multiply_adds / 1e9 for cost in costs[regime]]
    flops.plot(counted, places + offset, "*-", color=color, linewidth=0.5, markersize=7)
flops.set_xlim(0, 40)
flops.set_xlabel("stars: multiply-adds of an image, 10^9")
right.barh(places + 0.2, [cost.weights / 1e6 for cost in costs["base"]], 0.4, color="0.8")
right.barh(places - 0.2, [cost.weights / 1e6 for cost in costs["tiny"]], 0.4, color="#6baed6")
right.set_xlabel("weights, millions")
plt.show()"""

MISFIT_TEXT = """\
### Two printed values that do not fit

Of the 34 printed GFLOP values 32 are what we count, to two decimals. In the table from ResNet-50 the last
two are not. "BN to LN" is printed with {first:.2f}, which is what the step after it has, as if the column
were shifted by a row; the exchange of a norm adds no multiply-add. "separate downsampling" is printed with
{last:.2f}, which no reading gives: other tables of the paper say 4.5 for the same network. In the table
from ResNet-200 both are as counted."""

MISFIT = """\
for regime in ("tiny", "base"):
    for row, cost in zip(roadmap.STEPS, costs[regime], strict=True):
        printed, counted = row.published(regime)[1], cost.multiply_adds / 1e9
        if round(counted, 2) != printed:
            print(f"{regime}, {row.name}: printed {printed:.2f}, counted {counted:.3f}")"""

STEPS_TEXT = "## The steps\n\nWhat the way to ConvNeXt-T changes; the accuracy is the published one.\n"

BLOCKS_TEXT = """\
## The blocks

Three functions of `keras_convnext/roadmap.py` are all blocks of the road. `roadmap.network` goes through a
design with a reader: one counts, one builds a Keras model, and this one notes what a block of the second
stage is made of. Boxes are as wide as their map has channels, and blue where a layer mixes positions."""

BLOCKS = """\
class Recorder(roadmap.Counter):
    \"\"\"Notes (text, channels, whether positions are mixed) of each layer of block 1 in stage 2.\"\"\"

    def __init__(self, design):
        super().__init__(design)
        self.design, self.notes, self.inside = design, [], False

    def note(self, text, x, mixes=False):
        if self.inside:
            self.notes.append((text, x[1], mixes))
        return x

    def conv(self, x, name, filters, kernel=1, stride=1, depthwise=False):
        self.inside = name.startswith("layer2_1_")
        x = super().conv(x, name, filters, kernel, stride, depthwise)
        return self.note(f"{'depthwise ' * depthwise}{kernel}x{kernel}, {x[1]}", x, kernel > 1)

    def norm(self, x, name):
        return self.note({"batch_norm": "BN", "layer_norm": "LN"}[self.design.norm], super().norm(x, name))

    def activation(self, x):
        return self.note({"relu": "ReLU", "gelu": "GELU"}[self.design.activation], x)

    def scale(self, x, name):
        return self.note("LayerScale", super().scale(x, name))

    def add(self, x, y, name):
        return self.note("+ input", y)


shown = ("ResNet", "increase width", "inverting dimensions", "kernel size 7", "fewer norms")
shown += ("separate downsampling",)
figure, axes = plt.subplots(1, len(shown), figsize=(12, 5), layout="constrained", sharey=True)
for axis, name in zip(axes, shown, strict=True):
    recorder = Recorder(design := roadmap.design(name))
    roadmap.network(recorder, (224, 3), design, 1000)
    for place, (text, channels, mixes) in enumerate(recorder.notes):
        color = "#6baed6" if mixes else "#fdd0a2" if "1x1" in text else "#eeeeee"
        axis.barh(place, channels, 0.8, left=-channels / 2, color=color, edgecolor="0.4")
        axis.text(0, place, text, ha="center", va="center", fontsize=8)
    axis.set_title(f"{roadmap.find(name)}  {name}", fontsize=9)
    axis.set_xlim(-420, 420)
    axis.axis("off")
axes[0].invert_yaxis()
plt.show()"""

TIMES_TEXT = """\
## Milliseconds an image

Multiply-adds are not time. A depthwise convolution has few of them and reads much memory; norms and
activations have none and take their time too. `python benchmarks/roadmap.py benchmarks/runs/roadmap.csv`
measures all steps in turns, on each backend, on a machine that does nothing else. The last step is there
twice: from the plain layers of the road, which is what to compare with the steps before, and as the model
of this package, with its fast paths."""

TIMES = """\
if not TIMES.exists():
    print(f"No times in {TIMES}: run python benchmarks/roadmap.py {TIMES}")
else:
    with open(TIMES, newline="") as file:
        rows = list(csv.DictReader(file))
    backends = list(dict.fromkeys(row["backend"] for row in rows))
    figure, axes = plt.subplots(
        1, len(backends), figsize=(12, 5.5), layout="constrained", sharey=True, squeeze=False
    )
    for axis, backend in zip(axes[0], backends, strict=True):
        own = [row for row in rows if row["backend"] == backend]
        labels = [f"{row['step']}  {row['name']}{', package' * (row['layers'] == 'package')}" for row in own]
        milliseconds = [float(row["milliseconds"]) for row in own]
        colors = ["#31a354" if row["layers"] == "package" else "#6baed6" for row in own]
        axis.barh(range(len(own)), milliseconds, color=colors)
        for place, value in enumerate(milliseconds):
            axis.text(value, place, f" {value:.1f}", va="center", fontsize=8)
        axis.set_yticks(range(len(own)), labels)
        axis.set_title(f"{backend} {own[0]['backend_version']}", fontsize=9)
        axis.set_xlabel("ms an image")
        axis.margins(x=0.15)
    axes[0][0].invert_yaxis()
    of = rows[0]
    print(f"{of['batch']} images of {of['image_size']} pixels a call; {of['cpu']}, {of['cores']} cores")
    plt.show()"""

MODEL_TEXT = """\
## A step is a Keras model

It takes pixels in 0..255 and can be trained, saved and exported as any other. "atto" is a small road of our
own for small machines. The first step takes torchvision's weights (`roadmap.load_torchvision`), the last is
ConvNeXt itself. `keras-convnext roadmap --train PHOTOS --out DIR --steps 1 7 16` trains some of them alike
and draws the ladder."""

MODEL = """\
keras.utils.set_random_seed(0)
generator = np.random.default_rng(0)
labels = generator.integers(0, 2, 64)  # dark and bright noise
images = generator.uniform(0, 120, (64, 32, 32, 3)) + 135.0 * labels[:, None, None, None]
for name in ("enhanced recipe", "kernel size 7", "separate downsampling"):
    model = roadmap.build(name, "atto", classes=2, input_shape=(32, 32, 3))
    model.compile(keras.optimizers.AdamW(1e-3), "sparse_categorical_crossentropy")
    losses = model.fit(images, labels, batch_size=16, epochs=4, verbose=0).history["loss"]
    weights = sum(int(np.prod(variable.shape)) for variable in model.trainable_variables)
    counted = roadmap.cost(name, "atto", classes=2).weights
    print(f"{name}: {weights:,} weights, {counted:,} counted, loss {losses[0]:.3f} to {losses[-1]:.3f}")"""


def step_text(number: int) -> str:
    """The chapter of a step: its diff, why, and what came of it."""
    row = roadmap.STEPS[number]
    kept = "" if row.kept else " (not kept)"
    heading = f"### {number}. {row.name}{kept}\n\n{row.why}\n\n"
    changed = roadmap.changes(number)
    if number == 0:
        lines = [f"  {field} = {value!r}" for field, value in changed.items()]
        return f"{heading}```diff\n" + "\n".join(lines) + f"\n```\n\n{row.top1:.2f} %"
    before = max(step for step in range(number) if roadmap.STEPS[step].kept)
    old = vars(roadmap.design(before))
    lines = [
        line
        for field in changed
        for line in (f"- {field} = {old[field]!r}", f"+ {field} = {changed[field]!r}")
    ]
    gain = row.top1 - roadmap.STEPS[before].top1
    result = f"{row.top1:.2f} %, {gain:+.2f}"
    return f"{heading}```diff\n" + "\n".join(lines) + f"\n```\n\n{result}"


def cells() -> list[tuple[str, str]]:
    misfits = {row.name: row.gflops for row in roadmap.STEPS if ("tiny", row.name) in roadmap.MISFITS}
    first, last = misfits["BN to LN"], misfits["separate downsampling"]
    chapters = "\n\n".join([STEPS_TEXT.rstrip(), *map(step_text, range(len(roadmap.STEPS)))])
    return [
        ("markdown", TITLE),
        ("code", START),
        ("markdown", FIGURE_TEXT),
        ("code", FIGURE),
        ("markdown", MISFIT_TEXT.format(first=first, last=last)),
        ("code", MISFIT),
        ("markdown", chapters),
        ("markdown", BLOCKS_TEXT),
        ("code", BLOCKS),
        ("markdown", TIMES_TEXT),
        ("code", TIMES),
        ("markdown", MODEL_TEXT),
        ("code", MODEL),
    ]


def notebook() -> str:
    made = []
    for number, (kind, text) in enumerate(cells()):
        short = {"markdown": "text", "code": "code"}[kind]
        cell: dict = {"cell_type": kind, "id": f"{short}-{number:02d}", "metadata": {}}
        if kind == "code":
            cell |= {"execution_count": None, "outputs": []}
        made.append(dict(sorted((cell | {"source": text.splitlines(keepends=True)}).items())))
    metadata = {
        "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
        "language_info": {"name": "python"},
    }
    content = {"cells": made, "metadata": metadata, "nbformat": 4, "nbformat_minor": 5}
    return json.dumps(content, indent=1, ensure_ascii=False) + "\n"


def main(path: pathlib.Path = NOTEBOOK) -> int:
    old, new = path.read_text() if path.exists() else "", notebook()
    if new != old:
        path.write_text(new)
    print(f"{path}: {'changed' if new != old else 'up to date'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
