"""Times the ways to compute one operation of the network, in turns, to find the fastest here.

    python -m benchmarks.speed depthwise --backends jax,torch --batch 8 --output DIR

The operations are modules beside this one, `depthwise` and `pointwise`. Each backend has a process of its
own. There every candidate is first compared with an independent result, NumPy's in float64, then timed: the
operation by itself, and with the gradients of its input and its kernel. A candidate that computes something
else is marked and not timed. The star marks what the package uses.

An operation has `TITLE`; `shapes(batch, image_size)`; `inputs(shape)`, float32 arrays: map, kernel, bias and
gradient of the result; `further(shape)`, more arguments of its candidates; `expected(map, kernel, bias,
gradient, *further)`, float64: the result, the gradient of the map and that of the kernel;
`candidates_of(backend, device)`; and `chosen(backend, device, shape, mode)`, the name of the one that the
package uses, with mode "forward" or, with the gradients, "both".
"""

import csv
import dataclasses
import functools
import importlib
import importlib.util
import io
import json
import os
import pathlib
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from benchmarks.speed import implementations
from benchmarks.speed.alternating_runs import Worker, WorkerError
from benchmarks.speed.report import Table, check_output
from keras_convnext._environment import processor_text
from keras_convnext._files import replacing_file

# See `worker.COMMAND`.
COMMAND = (
    "import keras_convnext_main; from benchmarks.speed import candidates; raise SystemExit(candidates.main())"
)

MODES = ("forward", "both")  # without and with gradients

MINIMUM_SECONDS = 0.002  # of a turn: many short steps, or the clock's own time counts

# Largest difference from NumPy's float64 result, divided by its largest value. Float32 leaves room for the
# 10-bit products (TF32) that libraries use on a GPU. A tap in a wrong place gives 0.05 and more.
TOLERANCE = {"float32": 2e-3, "float16": 5e-3, "bfloat16": 2e-2}


@dataclasses.dataclass(frozen=True)
class Candidate:
    """One way to compute an operation.

    Attributes:
        name: what the table calls it.
        function: (x (N, H, W, C), kernel, bias, *further) -> (N, H, W, D), on the backend's tensors; with
            layout "NCHW" x and the result have the channels on the second axis.
        layout: how the maps lie in memory when the clock starts: a whole model would keep them so.
        compiler: "" for what the backend does anyway (`tf.function`, `jax.jit`, PyTorch's eager mode),
            "xla" or "torch.compile" for that around it.
        has_gradient: False for an operation of inference only.
    """

    name: str
    function: Callable
    layout: str = "NHWC"
    compiler: str = ""
    has_gradient: bool = True


@dataclasses.dataclass(frozen=True)
class Row:
    """Times and difference of one candidate at one shape.

    Attributes:
        backend: "tensorflow", "jax" or "torch".
        device: "cpu", "gpu" or "tpu".
        dtype: of the map, the kernel and the result.
        shape: what the operation names its size by.
        candidate: its name.
        chosen: for what the package uses it there: words of "forward both", by the names below.
        forward: milliseconds of the operation, the median of the rounds; None when it was not timed.
        both: milliseconds of the operation and both gradients; None when it was not timed.
        difference: from NumPy's result, over its largest value: the worst of result and gradients.
        note: why something is missing.
    """

    backend: str
    device: str
    dtype: str
    shape: tuple[int, ...]
    candidate: str
    chosen: str
    forward: float | None = None
    both: float | None = None
    difference: float | None = None
    note: str = ""


def run(operation: str, options) -> int:
    """Runs `python -m benchmarks.speed depthwise`, or another operation.

    Args:
        operation: name of its module.
        options: parsed words of the command line: `backends`, `batch`, `dtype`, `image_size` (lists),
            `rounds` (int), `seconds` (float, for each candidate, mode and shape, over all rounds), `threads`
            (int or None), `output` (folder or None), `json` (bool).

    Returns:
        The exit code: 0, or 1 when a backend gave no row.
    """
    folder = None if options.output is None else pathlib.Path(options.output)
    if folder is not None:
        check_output(folder)
    shows_progress = sys.stderr.isatty()
    tables, complete = [], True
    for backend in options.backends:
        for dtype in options.dtype:
            for batch in options.batch:
                for image_size in options.image_size:
                    rows = table(
                        operation,
                        backend,
                        module_of(operation).shapes(batch, image_size),
                        dtype,
                        rounds=options.rounds,
                        seconds=options.seconds,
                        threads=options.threads,
                        on_shape=functools.partial(_show_progress, backend) if shows_progress else None,
                    )
                    complete &= any(row.forward is not None for row in rows)
                    tables.append(rows)
                    if not options.json:
                        print(f"{as_table(operation, rows).text()}\n", flush=True)
    every = [row for rows in tables for row in rows]
    if options.json:
        print(json.dumps([dataclasses.asdict(row) for row in every], indent=2))
    if folder is not None:
        write_csv(folder / f"{operation}.csv", every)
        with replacing_file(folder / f"{operation}.md") as file:
            threads = "" if options.threads is None else f", threads: {options.threads}"
            pages = [processor_text() + threads, *(as_table(operation, rows).markdown() for rows in tables)]
            file.write("\n\n".join(pages).encode() + b"\n")
        print(f"Written: {folder / operation}.csv and .md", file=sys.stderr)
    return 0 if complete else 1


def module_of(operation: str) -> Any:
    return importlib.import_module(f"benchmarks.speed.{operation}")


def table(
    operation: str,
    backend: str,
    shapes: Sequence[tuple[int, ...]],
    dtype: str = "float32",
    *,
    rounds: int = 5,
    seconds: float = 1.0,
    threads: int | None = None,
    kernels: str | os.PathLike[str] | None = None,
    on_shape: Callable[[tuple[int, ...]], None] | None = None,
) -> list[Row]:
    """Measures all candidates of a backend, in a process of its own.

    Args:
        operation: name of its module.
        backend: "tensorflow", "jax" or "torch".
        shapes: those that `shapes` of the operation gives, or others like them.
        dtype: "float32", "bfloat16" or "float16".
        rounds: turns that each candidate gets, in an order reversed every second round.
        seconds: of each candidate, mode and shape, shared among the rounds; at least one step a turn.
        threads: of the backend; None for its own choice.
        kernels: a Python file with `candidates(backend, device) -> list[Candidate]`, measured as well.
        on_shape: called with each shape before its turn.

    Returns:
        Rows, the candidates of the first shape first. When the process dies, a last row says how.

    Raises:
        ValueError: for an unknown backend or dtype.
    """
    if backend not in _STEPS:
        raise ValueError(f"Unknown backend {backend!r}. Known: {', '.join(_STEPS)}")
    if dtype not in TOLERANCE:
        raise ValueError(f"Unknown dtype {dtype!r} of the candidates. Known: {', '.join(TOLERANCE)}")
    task: dict[str, Any] = {
        "operation": operation,
        "backend": backend,
        "dtype": dtype,
        "rounds": rounds,
        "seconds": seconds,
        "threads": threads,
    }
    task["kernels"] = None if kernels is None else os.path.abspath(kernels)
    rows: list[Row] = []
    worker = Worker(["-c", COMMAND], implementations.environment(backend, threads))
    try:
        for shape in shapes:
            if on_shape is not None:
                on_shape(shape)
            answer = worker.ask(**task, shape=list(shape))
            rows += [Row(**row | {"shape": shape}) for row in answer["rows"]]
    except WorkerError as error:
        device = rows[-1].device if rows else "unknown"
        rows.append(Row(backend, device, dtype, shape, "(the process)", "", note=str(error)))
    finally:
        worker.stop()
    return rows


# The process of one backend.


def main() -> int:
    """Answers each line of stdin, a JSON object that says what to measure, with a JSON line of rows."""
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # frameworks print to stdout
    for line in sys.stdin:
        task = json.loads(line)
        backend = task["backend"]
        if task["threads"] is not None:
            implementations.limit_threads(task["threads"])
        device = device_kind(backend)
        operation = module_of(task["operation"])
        candidates = operation.candidates_of(backend, device)
        if task["kernels"] is not None:
            candidates += _load_kernels(task["kernels"], backend, device)
        shape = tuple(task["shape"])
        rows = measure_shape(
            operation, backend, device, candidates, shape, task["dtype"], task["rounds"], task["seconds"]
        )
        print(json.dumps({"rows": [dataclasses.asdict(row) for row in rows]}), file=answers, flush=True)
    return 0


def device_kind(backend: str) -> str:
    """ "gpu", "tpu" or "cpu": where the backend puts its work."""
    if backend == "tensorflow":
        import tensorflow as tf

        kinds = {device.device_type for device in tf.config.get_visible_devices()}
        return next((kind.lower() for kind in ("TPU", "GPU") if kind in kinds), "cpu")
    if backend == "jax":
        import jax

        return jax.default_backend()
    import torch

    return "gpu" if torch.cuda.is_available() else "cpu"


def measure_shape(
    operation: Any,
    backend: str,
    device: str,
    candidates: Sequence[Candidate],
    shape: tuple[int, ...],
    dtype: str,
    rounds: int,
    seconds: float,
) -> list[Row]:
    """Compares and times the candidates at one shape, in this process."""
    chosen = {mode: operation.chosen(backend, device, shape, mode) for mode in MODES}
    inputs = [_round(array, dtype) for array in operation.inputs(shape)]
    inputs[3][:-2] = 0  # the last two images alone are compared
    further = operation.further(shape)
    x, kernel, bias, gradient = (array.astype("float64") for array in inputs)
    expected = operation.expected(x[-2:], kernel, bias, gradient[-2:], *further)
    rows: dict[str, Row] = {}
    steps: dict[tuple[str, str], Callable[[], Any]] = {}
    for candidate in candidates:
        name = candidate.name
        taken_for = " ".join(mode for mode in chosen if name == chosen[mode])
        row = Row(backend, device, dtype, shape, name, taken_for)
        try:
            forward, both, to_numpy = _STEPS[backend](candidate, *inputs, further, dtype)
            results = [forward()] if both is None else [forward(), *both()[1:]]
            difference = _difference([to_numpy(result) for result in results], expected, candidate.layout)
        except Exception as error:  # a framework's own: what it cannot do is a fact of the table
            text = str(error).strip() or type(error).__name__
            rows[name] = dataclasses.replace(row, note=f"cannot run: {text.splitlines()[0][:120]}")
            continue
        rows[name] = dataclasses.replace(row, difference=difference)
        if not difference <= TOLERANCE[dtype]:  # NaN is wrong too
            rows[name] = dataclasses.replace(rows[name], note="differs too much: not timed")
            continue
        steps[name, "forward"] = forward
        if both is not None:
            steps[name, "both"] = both
    for (name, mode), value in time_in_turns(steps, rounds, seconds).items():
        milliseconds: dict[str, Any] = {mode: 1e3 * value}
        rows[name] = dataclasses.replace(rows[name], **milliseconds)
    return list(rows.values())


def time_in_turns(steps: Mapping[Any, Callable[[], Any]], rounds: int, seconds: float) -> dict[Any, float]:
    """Seconds of each step: the median over the rounds of a turn's mean.

    Every second round goes backwards, so that a machine that slows down or speeds up favours none.

    Args:
        steps: functions that return when their work is done; each has run once.
        rounds: turns that each gets.
        seconds: for each, shared among the rounds; a turn is one step at least.
    """
    turns: dict[Any, list[float]] = {key: [] for key in steps}
    share = max(seconds / rounds, MINIMUM_SECONDS)
    for number in range(rounds):
        for key in list(steps) if number % 2 == 0 else list(steps)[::-1]:
            step, count = steps[key], 0
            start = time.perf_counter()
            while (elapsed := time.perf_counter() - start) < share:
                step()
                count += 1
            turns[key].append(elapsed / count)
    return {key: statistics.median(values) for key, values in turns.items()}


def _round(array: np.ndarray, dtype: str) -> np.ndarray:
    if dtype == "bfloat16":
        import ml_dtypes

        return array.astype(ml_dtypes.bfloat16).astype("float32")
    return array.astype(dtype).astype("float32")


def _difference(results: Sequence[np.ndarray], expected: Sequence[np.ndarray], layout: str) -> float:
    """The worst of result, input gradient and kernel gradient, each over its largest expected value."""
    worst = 0.0
    for index, (result, value) in enumerate(zip(results, expected, strict=False)):
        if index < 2:
            result = (result if layout == "NHWC" else np.moveaxis(result, 1, -1))[-2:]
        if result.shape != value.shape:
            raise ValueError(f"gives the shape {result.shape} where {value.shape} is due")
        # max() of Python would pass over NaN.
        worst = float(np.maximum(worst, np.max(np.abs(result - value)) / np.max(np.abs(value))))
    return worst


def _load_kernels(path: str, backend: str, device: str) -> list[Candidate]:
    specification = importlib.util.spec_from_file_location(pathlib.Path(path).stem, path)
    if specification is None or specification.loader is None:
        raise ImportError(f"Expected a Python file with the function 'candidates'. Received: {path}")
    module = importlib.util.module_from_spec(specification)
    sys.modules[specification.name] = module
    specification.loader.exec_module(module)
    return module.candidates(backend, device)


# One step of a candidate: (the operation, the same and its gradients or None, result to NumPy).
# The first two return when the work is done.

_Steps = tuple[Callable[[], Any], Callable[[], Any] | None, Callable[[Any], np.ndarray]]


def _tensorflow_steps(candidate: Candidate, x, kernel, bias, gradient, further, dtype: str) -> _Steps:
    import tensorflow as tf

    x, kernel, bias, gradient = (tf.constant(array, dtype) for array in (x, kernel, bias, gradient))
    on_gpu = bool(tf.config.list_physical_devices("GPU"))
    compiled = functools.partial(tf.function, autograph=False, jit_compile=candidate.compiler == "xla")

    @compiled
    def forward(x, kernel, bias):
        return candidate.function(x, kernel, bias, *further)

    @compiled
    def both(x, kernel, bias, gradient):
        with tf.GradientTape() as tape:
            tape.watch((x, kernel))
            result = candidate.function(x, kernel, bias, *further)
        return result, *tape.gradient(result, (x, kernel), gradient)

    def finished(result):
        if on_gpu:  # on a CPU a function returns when it is done
            tf.test.experimental.sync_devices()
        return result

    return (
        lambda: finished(forward(x, kernel, bias)),
        (lambda: finished(both(x, kernel, bias, gradient))) if candidate.has_gradient else None,
        lambda result: tf.cast(result, "float32").numpy(),
    )


def _jax_steps(candidate: Candidate, x, kernel, bias, gradient, further, dtype: str) -> _Steps:
    import jax
    import jax.numpy as jnp

    if candidate.layout == "NCHW":
        x, gradient = np.moveaxis(x, -1, 1), np.moveaxis(gradient, -1, 1)
    x, kernel, bias, gradient = (jnp.asarray(array, dtype) for array in (x, kernel, bias, gradient))

    @jax.jit
    def forward(x, kernel, bias):
        return candidate.function(x, kernel, bias, *further)

    @jax.jit
    def both(x, kernel, bias, gradient):
        result, back = jax.vjp(lambda x, kernel: candidate.function(x, kernel, bias, *further), x, kernel)
        return result, *back(gradient)

    return (
        lambda: jax.block_until_ready(forward(x, kernel, bias)),
        lambda: jax.block_until_ready(both(x, kernel, bias, gradient)),
        lambda result: np.asarray(result, dtype="float32"),
    )


def _torch_steps(candidate: Candidate, x, kernel, bias, gradient, further, dtype: str) -> _Steps:
    import torch

    on_gpu = torch.cuda.is_available()
    if candidate.layout == "NCHW":
        x, gradient = np.moveaxis(x, -1, 1), np.moveaxis(gradient, -1, 1)
    x, kernel, bias, gradient = (
        torch.from_numpy(np.ascontiguousarray(array)).to("cuda" if on_gpu else "cpu", getattr(torch, dtype))
        for array in (x, kernel, bias, gradient)
    )
    function = candidate.function
    if candidate.compiler == "torch.compile":
        # One shape after the other would count as one of changing size.
        torch._dynamo.reset()
        function = torch.compile(function, dynamic=False)

    def finished(result):
        if on_gpu:
            torch.cuda.synchronize()
        return result

    def forward():
        with torch.inference_mode():
            return finished(function(x, kernel, bias, *further))

    watched = [array.clone().requires_grad_() for array in (x, kernel)]

    def both():
        result = function(*watched, bias, *further)
        return finished((result, *torch.autograd.grad(result, watched, gradient)))

    return (
        forward,
        both if candidate.has_gradient else None,
        lambda result: result.detach().float().cpu().numpy(),
    )


_STEPS: dict[str, Callable[..., _Steps]] = {
    "tensorflow": _tensorflow_steps,
    "jax": _jax_steps,
    "torch": _torch_steps,
}


# Tables and files.


def as_table(operation: str, rows: Sequence[Row]) -> Table:
    """One row for each candidate: times at each shape and their sums, the difference, what is missing."""
    shapes = list(dict.fromkeys(row.shape for row in rows))
    cells = []
    for name in dict.fromkeys(row.candidate for row in rows):
        found = {row.shape: row for row in rows if row.candidate == name}
        totals = [_sum([getattr(found.get(shape), mode, None) for shape in shapes]) for mode in MODES]
        differences = [row.difference for row in found.values() if row.difference is not None]
        cells.append(
            (
                name,
                *(_times(found[shape]) if shape in found else "- / -" for shape in shapes),
                " / ".join(_number(value) for value in totals),
                f"{max(differences):.0e}" if differences else "-",
                "; ".join(dict.fromkeys(row.note for row in found.values() if row.note)),
            )
        )
    title, first = module_of(operation).TITLE, rows[0]
    return Table(
        f"{title}, {first.backend} on {first.device}, {first.dtype}: ms / with gradients",
        ("candidate", *("x".join(map(str, shape)) for shape in shapes), "all", "difference", "note"),
        "<" + ">" * (len(shapes) + 2) + "<",
        cells,
        ("* is what the package uses there.",),
    )


def _times(row: Row) -> str:
    modes = row.chosen.split()
    return " / ".join(_number(getattr(row, mode)) + (" *" if mode in modes else "") for mode in MODES)


def _sum(values: Sequence[float | None]) -> float | None:
    numbers = [value for value in values if value is not None]
    return sum(numbers) if len(numbers) == len(values) else None


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3g}" if value < 100 else f"{value:.0f}"


def write_csv(path: str | os.PathLike[str], rows: Sequence[Row]) -> None:
    """Writes all rows, with every field."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow([field.name for field in dataclasses.fields(Row)])
    for row in rows:
        values = dataclasses.asdict(row) | {"shape": "x".join(map(str, row.shape))}
        writer.writerow(["" if value is None else value for value in values.values()])
    with replacing_file(path) as file:
        file.write(text.getvalue().encode())


def _show_progress(backend: str, shape: tuple[int, ...]) -> None:
    print(f"{backend}: {'x'.join(map(str, shape))}   ", end="\r", file=sys.stderr, flush=True)
