"""Start-up: seconds from a new process to the first result, with weights in a local file.

python -m benchmarks.speed startup
"""

import argparse
import dataclasses
import itertools
import json
import math
import os
import pathlib
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence

from benchmarks.speed import cases, implementations, machine_rates, output
from benchmarks.speed.alternating_runs import Worker, WorkerError
from benchmarks.speed.implementations import TITLES, Case
from benchmarks.speed.report import Table
from keras_convnext.variants import VARIANTS

PEER = "timm"
INSTALLED, ALONE = "everything installed", "as with one framework installed"
BARS = {"torch": 1.0, "tensorflow": 1.3, "jax": 1.3}  # times timm's seconds, at most

# A whole program of a user; the names in braces are filled in. The parts begin at the marks.
_FRAME = """\
import time
marks = [time.perf_counter()]
import json, os, sys
answers = os.fdopen(os.dup(1), "w")
os.dup2(2, 1)
{limit}{hide}{imports}
marks.append(time.perf_counter())
{build}
marks.append(time.perf_counter())
{first}
marks.append(time.perf_counter())
peak = 0
if os.path.exists("/proc/self/status"):
    with open("/proc/self/status") as file:
        peak = [1024 * int(line.split()[1]) for line in file if line.startswith("VmHWM:")][0]
spans = [after - before for before, after in zip(marks[:-1], marks[1:])]
answer = {{"spans": spans, "shape": list(result.shape), "peak_bytes": peak}}
print(json.dumps(answer), file=answers, flush=True)
"""
_OURS = {
    "imports": "import numpy as np\nimport keras_convnext",
    "build": "model = keras_convnext.load({model!r}, weights={path!r}, input_shape=({size}, {size}, 3))",
    "first": """\
images = np.full((1, {size}, {size}, 3), 127.0, "float32")
result = model.predict_on_batch(images)""",
}
_TIMM = {
    "imports": """\
import numpy as np
import torch
{declare}import timm
from safetensors.torch import load_file""",
    "build": """\
model = timm.create_model({model!r})
model.load_state_dict(load_file({path!r}), strict=True)
model.eval()""",
    "first": """\
images = np.zeros((1, 3, {size}, {size}), "float32")
with torch.inference_mode():
    result = model(torch.from_numpy(images)).softmax(-1).numpy()""",
}
# `import keras` imports these where they are installed, needed or not; that takes up to four seconds.
_OPTIONAL = ("tensorflow", "jax", "torch", "scipy", "sklearn", "matplotlib", "IPython")
_NEEDED = {"torch": ("torch",), "jax": ("jax", "scipy"), "tensorflow": ("tensorflow",), PEER: ("torch",)}
_HIDE = """\
import importlib.machinery
find = importlib.machinery.PathFinder.find_spec
def find_others(name, path=None, target=None):
    return None if name.partition(".")[0] in {hidden!r} else find(name, path, target)
importlib.machinery.PathFinder.find_spec = find_others
"""
_LIMIT = "os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:{threads}])\n"
# implementations.py finds out by trying; here it is known before the clock runs.
_DECLARE = """\
library = torch.library.Library("torchvision", "DEF")
for name in ("nms", "qnms"):
    library.define(name + "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
"""


@dataclasses.dataclass(frozen=True)
class Start:
    """Times of an implementation from a new process to its first result; medians over the rounds, in seconds.

    Attributes:
        implementation: "timm" or a backend.
        model: architecture.
        seconds: of each round: from the start of the process until the first result was known outside it.
        interpreter: of this, until Python runs the program's first line, and until its last was heard.
        imports: importing the packages.
        build: building the model with the weights of the file.
        first: the first result.
        peak_bytes: largest resident memory of the process; 0 where the system does not tell.
        problem: why it could not run, else "".
        alone: whether packages that a plain installation lacks were hidden from it.
    """

    implementation: str
    model: str
    seconds: tuple[float, ...] = ()
    interpreter: float = math.nan
    imports: float = math.nan
    build: float = math.nan
    first: float = math.nan
    peak_bytes: int = 0
    problem: str = ""
    alone: bool = False

    @property
    def total(self) -> float:
        """Median of the seconds; NaN when it could not run."""
        return statistics.median(self.seconds) if self.seconds else math.nan


def table(
    model: str,
    backends: Sequence[str],
    rounds: int = 5,
    image_size: int = 224,
    against_timm: bool = True,
    threads: int | None = None,
    on_progress: Callable[[str, int, int], None] | None = None,
    alone: bool = False,
) -> list[Start]:
    """Starts programs in turns: timm's, and ours on each backend, on the same file of random weights.

    A program imports, builds the model with the weights of a safetensors file, and classifies one image,
    float32 in memory, in the way its users do: timm eagerly, ours by `predict_on_batch`. The file has been
    read before, so it comes from memory for all.

    Args:
        model: architecture.
        backends: names of backends of Keras.
        rounds: starts of each; the order is reversed in every second round.
        image_size: side of the image in pixels.
        against_timm: whether timm takes part.
        threads: cores of each, None for all.
        on_progress: called with what is done now, the number of things done and of all.
        alone: whether to hide the other backends, scikit-learn and matplotlib, which Keras imports where they
            are installed: `pip install ".[torch]"` alone has none of them.

    Returns:
        timm first, then the backends.
    """
    names = [PEER] * against_timm + list(backends)
    case = Case(model, batch=1, image_size=image_size)
    problems: dict[str, str] = {}
    for name in names:
        try:
            implementations.check_offered(name, case)
        except implementations.NotOfferedError as error:
            problems[name] = str(error)
    found: dict[str, list[dict]] = {name: [] for name in names}
    total = rounds * len(names) + 1
    with tempfile.TemporaryDirectory(prefix="keras_convnext_bench_") as folder:
        path = str(pathlib.Path(folder) / f"{model}.safetensors")
        if on_progress is not None:
            on_progress("writing the weights", 0, total)
        machine_rates.call_in_process(
            "benchmarks.speed.startup", "write_weights", model, path, image_size, backend=backends[0]
        )
        values = {"path": path, "model": model, "size": image_size, "threads": threads, "alone": alone}
        values["declare"] = (
            _DECLARE if PEER in names and not problems.get(PEER) and _lacks_operators() else ""
        )
        for number in range(rounds):
            for place, name in enumerate(names if number % 2 == 0 else reversed(names)):
                if on_progress is not None:
                    on_progress(name, 1 + number * len(names) + place, total)
                if name in problems:
                    continue
                try:
                    found[name].append(_start(name, values))
                except WorkerError as error:
                    problems[name] = str(error)
    if on_progress is not None:
        on_progress("done", total, total)
    return [_summary(name, model, found[name], problems.get(name, ""), alone) for name in names]


def write_weights(model: str, path: str, image_size: int) -> None:
    """Writes random weights in the layout of timm, or of the official code where timm has no such model."""
    from keras_convnext.conversion import save_weights

    random = implementations.our_model(Case(model, batch=1, image_size=image_size))
    save_weights(random, path, "official" if VARIANTS[model].isotropic else "timm")


def program(name: str, values: dict) -> str:
    """The code of an implementation's process.

    Args:
        name: "timm" or a backend.
        values: path, model, size (pixels), threads (or None), declare (code for torchvision, or ""),
            alone (whether to hide what a plain installation lacks).
    """
    pieces = _TIMM if name == PEER else _OURS
    limit = "" if values["threads"] is None or not hasattr(os, "sched_setaffinity") else _LIMIT
    hide = _HIDE if values["alone"] else ""
    hidden = tuple(package for package in _OPTIONAL if package not in _NEEDED.get(name, _OPTIONAL))
    codes = pieces | {"limit": limit, "hide": hide}
    filled = {part: code.format(hidden=hidden, **values) for part, code in codes.items()}
    return _FRAME.format(**filled)


def _start(name: str, values: dict) -> dict:
    words = ["-W", "ignore", "-c", program(name, values)]
    variables = implementations.environment(name, values["threads"])
    begin = time.perf_counter()
    worker = Worker(words, variables)
    try:
        answer = worker.ask()
        total = time.perf_counter() - begin
    finally:
        worker.stop()
    if answer["shape"] != [1, 1000]:
        raise WorkerError(f"expected one row of 1000 numbers, received the shape {answer['shape']}")
    return answer | {"seconds": total}


def _summary(name: str, model: str, rounds: Sequence[dict], problem: str, alone: bool) -> Start:
    if problem or not rounds:
        return Start(name, model, problem=problem, alone=alone)
    imports, build, first = (statistics.median(row["spans"][place] for row in rounds) for place in range(3))
    return Start(
        name,
        model,
        tuple(row["seconds"] for row in rounds),
        statistics.median(row["seconds"] - sum(row["spans"]) for row in rounds),
        imports,
        build,
        first,
        max(row["peak_bytes"] for row in rounds),
        alone=alone,
    )


def _lacks_operators() -> bool:
    """Returns whether torchvision, which timm imports, cannot be imported as it is."""
    command = [sys.executable, "-P", "-c", "import torchvision"]
    return bool(subprocess.run(command, capture_output=True, check=False).returncode)


def ratio(ours: Start, peer: Start) -> float:
    """Ours relative to the peer's seconds: the median over the rounds; NaN where one did not run."""
    if not ours.seconds or not peer.seconds:
        return math.nan
    pairs = zip(ours.seconds, peer.seconds, strict=True)
    return statistics.median(own / theirs for own, theirs in pairs)


def as_table(found: Sequence[Start]) -> Table:
    """Makes the table: the time of each part, the total relative to timm's, the bar."""
    peer = next((start for start in found if start.implementation == PEER), None)
    rows, notes = [], []
    for start in found:
        if start.problem:
            notes.append(f"{TITLES[start.implementation]}: {start.problem}")
            continue
        times = math.nan if peer is None else ratio(start, peer)
        bar = BARS.get(start.implementation)
        cells = ("", "", "")
        if not math.isnan(times) and start.implementation != PEER:
            verdict = "" if bar is None else "met" if times <= bar else "MISSED"
            cells = (f"{times:.2f}", "" if bar is None else f"<= {bar:g}", verdict)
        parts = (start.interpreter, start.imports, start.build, start.first, start.total)
        memory = f"{start.peak_bytes / 2**20:,.0f}" if start.peak_bytes else "-"
        rows.append((TITLES[start.implementation], *(f"{part:.2f}" for part in parts), memory, *cells))
    return Table(
        f"{found[0].model}: seconds from a new process to the first image, weights in a local file, "
        + (ALONE if found[0].alone else INSTALLED),
        ("implementation", "Python", "import", "build", "first", "total", "peak MiB", "x timm", "bar", ""),
        "<" + 8 * ">" + "<",
        rows,
        tuple(notes),
    )


def run(options: argparse.Namespace) -> int:
    """Runs `python -m benchmarks.speed startup`.

    Args:
        options: what `cases.resolve` returns; batch, mode and dtype have no meaning here.

    Returns:
        0, or 1 when no backend could run.
    """
    where = output.begin(options)
    progress = cases.Progress("start-up")
    tables, rows = [], []
    for model, alone in itertools.product(options.architectures, (False, True)):
        found = table(
            model,
            options.backends,
            options.rounds,
            options.image_size[0],
            PEER in options.against,
            options.threads,
            progress.show,
            alone,
        )
        tables.append(as_table(found))
        peer = next((start for start in found if start.implementation == PEER), Start(PEER, model))
        for start in found:
            times = ratio(start, peer)
            each = json.dumps([round(seconds, 4) for seconds in start.seconds])
            totals = {"total": start.total, "times_timm": times}
            row = dataclasses.asdict(start) | {"seconds": each} | totals
            rows.append({key: _or_none(value) for key, value in row.items()})
    names = [*options.backends, *[PEER] * (PEER in options.against)]
    output.end(options, "startup", where, names, tables, rows)
    return 0 if any(row["implementation"] != PEER and not row["problem"] for row in rows) else 1


def _or_none(value: object) -> object:
    return None if isinstance(value, float) and math.isnan(value) else value
