"""Times the ways to compute the depthwise convolution of the blocks, in turns, to find the fastest here.

    python -m benchmarks.speed depthwise --backends jax,torch --batch 8 --output DIR

Each backend has a process of its own. There every candidate is first compared with an independent result,
NumPy's in float64, then timed: the convolution by itself, and with the gradients of its input and its kernel.
A candidate that computes something else is marked and not timed. The star marks what the package uses.
"""

import csv
import dataclasses
import functools
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
from keras_convnext._environment import tensorflow_has_onednn
from keras_convnext._files import replacing_file
from keras_convnext.architecture import layers_of
from keras_convnext.variants import VARIANTS

# See `worker.COMMAND`.
COMMAND = (
    "import keras_convnext_main; from benchmarks.speed import depthwise; raise SystemExit(depthwise.main())"
)

KERNEL_SIZE = 7
ARCHITECTURE = "convnext_tiny"  # whose stages give the shapes
MINIMUM_SECONDS = 0.002  # of a turn: many short steps, or the clock's own time counts

# Largest difference from NumPy's float64 result, divided by its largest value. Float32 leaves room for the
# 10-bit products (TF32) that libraries use on a GPU. A tap in a wrong place gives 0.05 and more.
TOLERANCE = {"float32": 2e-3, "float16": 5e-3, "bfloat16": 2e-2}


@dataclasses.dataclass(frozen=True)
class Candidate:
    """One way to compute the convolution.

    Attributes:
        name: what the table calls it.
        function: (x (N, H, W, C), kernel (K, K, C, 1), bias (C,), dilation) -> (N, H, W, C), on the backend's
            tensors; with layout "NCHW" x and the result are (N, C, H, W).
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
        shape: (N, H, W, C).
        candidate: its name.
        chosen: whether the package uses it there.
        forward: milliseconds of the convolution, the median of the rounds; None when it was not timed.
        both: milliseconds of the convolution and both gradients; None when it was not timed.
        difference: from NumPy's result, over its largest value: the worst of result and gradients.
        note: why something is missing.
    """

    backend: str
    device: str
    dtype: str
    shape: tuple[int, int, int, int]
    candidate: str
    chosen: bool
    forward: float | None = None
    both: float | None = None
    difference: float | None = None
    note: str = ""


def run(options) -> int:
    """Runs `python -m benchmarks.speed depthwise`.

    Args:
        options: parsed words of the command line: `backends`, `batch`, `dtype`, `image_size` (lists),
            `rounds` (int), `seconds` (float, for each candidate, mode and shape, over all rounds), `threads`
            (int or None), `output` (folder or None), `json` (bool).

    Returns:
        The exit code: 0, or 1 when a backend gave no row.
    """
    output = None if options.output is None else pathlib.Path(options.output)
    if output is not None:
        check_output(output)
    shows_progress = sys.stderr.isatty()
    tables, complete = [], True
    for backend in options.backends:
        for dtype in options.dtype:
            for batch in options.batch:
                for image_size in options.image_size:
                    rows = table(
                        backend,
                        stage_shapes(batch, image_size),
                        dtype,
                        rounds=options.rounds,
                        seconds=options.seconds,
                        threads=options.threads,
                        on_shape=functools.partial(_show_progress, backend) if shows_progress else None,
                    )
                    complete &= any(row.forward is not None for row in rows)
                    tables.append(rows)
                    if not options.json:
                        print(f"{as_table(rows).text()}\n", flush=True)
    every = [row for rows in tables for row in rows]
    if options.json:
        print(json.dumps([dataclasses.asdict(row) for row in every], indent=2))
    if output is not None:
        write_csv(output / "depthwise.csv", every)
        with replacing_file(output / "depthwise.md") as file:
            file.write("\n\n".join(as_table(rows).markdown() for rows in tables).encode() + b"\n")
        print(f"Written: {output / 'depthwise.csv'}, {output / 'depthwise.md'}", file=sys.stderr)
    return 0 if complete else 1


def stage_shapes(batch: int, image_size: int = 224) -> list[tuple[int, int, int, int]]:
    """(N, H, W, C) of the four stages of `ARCHITECTURE` for square images of `image_size` pixels."""
    layers = layers_of(VARIANTS[ARCHITECTURE], image_size)
    firsts = [layer for layer in layers if layer.name.endswith(".0.dwconv")]
    if firsts[-1].side == 0:
        raise ValueError(f"Expected images of 32 pixels or more, which leave a map. Received: {image_size}")
    return [(batch, layer.side, layer.side, layer.outputs) for layer in firsts]


def table(
    backend: str,
    shapes: Sequence[tuple[int, int, int, int]],
    dtype: str = "float32",
    *,
    rounds: int = 5,
    seconds: float = 1.0,
    threads: int | None = None,
    kernels: str | os.PathLike[str] | None = None,
    on_shape: Callable[[tuple[int, int, int, int]], None] | None = None,
) -> list[Row]:
    """Measures all candidates of a backend, in a process of its own.

    Args:
        backend: "tensorflow", "jax" or "torch".
        shapes: (N, H, W, C) of each map.
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
        rows.append(Row(backend, device, dtype, shape, "(the process)", False, note=str(error)))
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
        candidates = candidates_of(backend, device)
        if task["kernels"] is not None:
            candidates += _load_kernels(task["kernels"], backend, device)
        shape = tuple(task["shape"])
        rows = measure_shape(
            backend, device, candidates, shape, task["dtype"], task["rounds"], task["seconds"]
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
    backend: str,
    device: str,
    candidates: Sequence[Candidate],
    shape: tuple[int, int, int, int],
    dtype: str,
    rounds: int,
    seconds: float,
) -> list[Row]:
    """Compares and times the candidates at one shape, in this process."""
    from keras_convnext.layers import depthwise

    chosen = depthwise.chosen_path(backend, device)
    inputs = _inputs(shape, dtype)
    expected = _expected(*inputs)
    rows: dict[str, Row] = {}
    steps: dict[tuple[str, str], Callable[[], Any]] = {}
    for candidate in candidates:
        name = candidate.name
        row = Row(backend, device, dtype, shape, name, name == chosen)
        try:
            forward, both, to_numpy = _STEPS[backend](candidate, *inputs, dtype)
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


def _inputs(shape: tuple[int, int, int, int], dtype: str) -> list[np.ndarray]:
    """Map, kernel, bias and gradient of the result, float32 arrays that `dtype` holds exactly.

    The gradient is 0 but for the last two images, which alone are compared.
    """
    draw = np.random.default_rng(0)
    channels = shape[3]
    shapes = (shape, (KERNEL_SIZE, KERNEL_SIZE, channels, 1), (channels,), shape)
    x, kernel, bias, gradient = (_round(draw.standard_normal(each, "float32"), dtype) for each in shapes)
    gradient[:-2] = 0
    return [x, kernel, bias, gradient]


def _round(array: np.ndarray, dtype: str) -> np.ndarray:
    if dtype == "bfloat16":
        import ml_dtypes

        return array.astype(ml_dtypes.bfloat16).astype("float32")
    return array.astype(dtype).astype("float32")


def _expected(x, kernel, bias, gradient) -> list[np.ndarray]:
    """Result and input gradient of the last two images, and the kernel's gradient, float64, by definition."""
    x, kernel, gradient = x[-2:].astype("float64"), kernel[..., 0].astype("float64"), gradient[-2:]
    size, (height, width) = len(kernel), x.shape[1:3]
    margin = size // 2
    border = ((0, 0), (margin, margin), (margin, margin), (0, 0))
    padded = np.pad(x, border)
    result, padded_gradient = np.zeros_like(x), np.zeros_like(padded)
    kernel_gradient = np.zeros_like(kernel)
    for row in range(size):
        for column in range(size):
            window = np.s_[:, row : row + height, column : column + width]
            result += padded[window] * kernel[row, column]
            padded_gradient[window] += gradient * kernel[row, column]
            kernel_gradient[row, column] = np.einsum("nhwc,nhwc->c", padded[window], gradient)
    x_gradient = padded_gradient[:, margin : margin + height, margin : margin + width]
    return [result + bias, x_gradient, kernel_gradient[..., None]]


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


# The candidates.


def candidates_of(backend: str, device: str) -> list[Candidate]:
    """The candidates of a backend on a device: those of the package first, then the others."""
    from keras_convnext.layers.depthwise import PATHS

    found = [Candidate(name, function) for name, function in PATHS[backend].items()]
    names = {candidate.name for candidate in found}
    return found + [candidate for candidate in _OTHERS[backend](device) if candidate.name not in names]


def shifted_products(x, kernel, bias, dilation, pad):
    """The convolution as the sum of K * K products of the shifted map with one row of weights.

    Args:
        x: (N, H, W, C).
        kernel: (K, K, C, 1).
        bias: (C,); its dtype is that of the sum when it is the wider one.
        dilation: int, distance between the taps.
        pad: function (x, margin) -> x with that many zeros around height and width.
    """
    size, (height, width) = kernel.shape[0], x.shape[1:3]
    source, total = pad(x, (size - 1) * dilation // 2), bias
    for row in range(0, size * dilation, dilation):
        for column in range(0, size * dilation, dilation):
            window = source[:, row : row + height, column : column + width]
            total = total + window * kernel[row // dilation, column // dilation, :, 0]
    return total


def _tensorflow_candidates(device: str) -> list[Candidate]:
    import tensorflow as tf

    def library(x, kernel, bias, dilation):
        return tf.nn.depthwise_conv2d(x, kernel, [1, 1, 1, 1], "SAME", dilations=[dilation, dilation]) + bias

    def grouped(x, kernel, bias, dilation):
        return tf.nn.conv2d(x, tf.transpose(kernel, [0, 1, 3, 2]), 1, "SAME", dilations=dilation) + bias

    def pad(x, margin):
        return tf.pad(x, [[0, 0], [margin, margin], [margin, margin], [0, 0]])

    shifted = functools.partial(shifted_products, pad=pad)
    functions: dict[str, Callable] = {
        "library": library,
        "grouped Conv2D": grouped,
        "shifted products": shifted,
    }
    found = [
        Candidate(f"{name}, XLA" if compiler else name, function, compiler=compiler)
        for name, function in functions.items()
        for compiler in ("", "xla")
    ]
    if device == "cpu" and not tensorflow_has_onednn():  # TensorFlow's own kernels lack that gradient
        found = [dataclasses.replace(each, has_gradient=each.name != "grouped Conv2D") for each in found]
    return found


def _jax_candidates(device: str) -> list[Candidate]:
    import jax
    import jax.numpy as jnp

    def pad(x, margin):
        return jnp.pad(x, ((0, 0), (margin, margin), (margin, margin), (0, 0)))

    def channels_first(x, kernel, bias, dilation):
        y = jax.lax.conv_general_dilated(
            x,
            kernel.transpose(2, 3, 0, 1),  # (C, 1, K, K)
            (1, 1),
            "SAME",
            rhs_dilation=(dilation, dilation),
            dimension_numbers=("NCHW", "OIHW", "NCHW"),
            feature_group_count=kernel.shape[2],
        )
        return y + bias[:, None, None]

    def widened(bias):
        return bias.astype(jnp.promote_types(bias.dtype, jnp.float32))

    def shifted(x, kernel, bias, dilation):
        return shifted_products(x, kernel, widened(bias), dilation, pad).astype(x.dtype)

    def row_loop(x, kernel, bias, dilation):
        size, (height, width) = kernel.shape[0], x.shape[1:3]
        source = pad(x, (size - 1) * dilation // 2)

        def add_row(total, row):
            rows = jax.lax.dynamic_slice_in_dim(source, row * dilation, height, axis=1)
            for column in range(size):
                left = column * dilation
                total = total + rows[:, :, left : left + width] * kernel[row, column, :, 0]
            return total, None

        start = jnp.broadcast_to(widened(bias), x.shape)
        return jax.lax.scan(add_row, start, jnp.arange(size))[0].astype(x.dtype)

    return [
        Candidate("library, NCHW", channels_first, layout="NCHW"),
        Candidate("shifted products, JAX's gradient", shifted),
        Candidate("loop over the kernel's rows", row_loop),
    ]


def _torch_candidates(device: str) -> list[Candidate]:
    import torch
    import torch.nn.functional as F

    def channels_first(x, kernel, bias, dilation):
        margin = (kernel.shape[0] - 1) * dilation // 2
        weight = kernel.permute(2, 3, 0, 1)  # (C, 1, K, K)
        return F.conv2d(x, weight, bias, padding=margin, dilation=dilation, groups=x.shape[1])

    def without_library(x, kernel, bias, dilation):
        with torch.backends.cudnn.flags(enabled=False), torch.backends.mkldnn.flags(enabled=False):
            # The permuted view is PyTorch's channels-last format: nothing is copied.
            return channels_first(x.permute(0, 3, 1, 2), kernel, bias, dilation).permute(0, 2, 3, 1)

    def one_dnn(x, kernel, bias, dilation):
        margin = (kernel.shape[0] - 1) * dilation // 2
        y = torch.ops.mkldnn._convolution_pointwise(
            x.permute(0, 3, 1, 2),
            kernel.permute(2, 3, 0, 1),
            bias,
            [margin, margin],
            [1, 1],
            [dilation, dilation],
            x.shape[3],
            "none",
            [],
            "",
        )
        return y.permute(0, 2, 3, 1)

    shifted = functools.partial(
        shifted_products, pad=lambda x, margin: F.pad(x, (0, 0, margin, margin, margin, margin))
    )
    found = [
        Candidate("library, channels-first", channels_first, layout="NCHW"),
        Candidate(f"{'cuDNN' if device == 'gpu' else 'oneDNN'} off", without_library),
        Candidate("shifted products", shifted),
        Candidate("shifted products, torch.compile", shifted, compiler="torch.compile"),
    ]
    if device == "cpu":
        found.append(Candidate("oneDNN, called directly", one_dnn, has_gradient=False))
    return found


_OTHERS = {"tensorflow": _tensorflow_candidates, "jax": _jax_candidates, "torch": _torch_candidates}


# One step of a candidate: (the convolution, the same and its gradients or None, result to NumPy).
# The first two return when the work is done.

_Steps = tuple[Callable[[], Any], Callable[[], Any] | None, Callable[[Any], np.ndarray]]


def _tensorflow_steps(candidate: Candidate, x, kernel, bias, gradient, dtype: str) -> _Steps:
    import tensorflow as tf

    x, kernel, bias, gradient = (tf.constant(array, dtype) for array in (x, kernel, bias, gradient))
    on_gpu = bool(tf.config.list_physical_devices("GPU"))
    compiled = functools.partial(tf.function, autograph=False, jit_compile=candidate.compiler == "xla")

    @compiled
    def forward(x, kernel, bias):
        return candidate.function(x, kernel, bias, 1)

    @compiled
    def both(x, kernel, bias, gradient):
        with tf.GradientTape() as tape:
            tape.watch((x, kernel))
            result = candidate.function(x, kernel, bias, 1)
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


def _jax_steps(candidate: Candidate, x, kernel, bias, gradient, dtype: str) -> _Steps:
    import jax
    import jax.numpy as jnp

    if candidate.layout == "NCHW":
        x, gradient = np.moveaxis(x, -1, 1), np.moveaxis(gradient, -1, 1)
    x, kernel, bias, gradient = (jnp.asarray(array, dtype) for array in (x, kernel, bias, gradient))

    @jax.jit
    def forward(x, kernel, bias):
        return candidate.function(x, kernel, bias, 1)

    @jax.jit
    def both(x, kernel, bias, gradient):
        result, back = jax.vjp(lambda x, kernel: candidate.function(x, kernel, bias, 1), x, kernel)
        return result, *back(gradient)

    return (
        lambda: jax.block_until_ready(forward(x, kernel, bias)),
        lambda: jax.block_until_ready(both(x, kernel, bias, gradient)),
        lambda result: np.asarray(result, dtype="float32"),
    )


def _torch_steps(candidate: Candidate, x, kernel, bias, gradient, dtype: str) -> _Steps:
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
            return finished(function(x, kernel, bias, 1))

    watched = [array.clone().requires_grad_() for array in (x, kernel)]

    def both():
        result = function(*watched, bias, 1)
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


def as_table(rows: Sequence[Row]) -> Table:
    """One row for each candidate: times at each shape and their sums, the difference, what is missing."""
    shapes = list(dict.fromkeys(row.shape for row in rows))
    cells = []
    for name in dict.fromkeys(row.candidate for row in rows):
        found = {row.shape: row for row in rows if row.candidate == name}
        times = [
            (found[shape].forward, found[shape].both) if shape in found else (None, None) for shape in shapes
        ]
        times.append((_sum([forward for forward, _ in times]), _sum([both for _, both in times])))
        differences = [row.difference for row in found.values() if row.difference is not None]
        cells.append(
            (
                f"{name} *" if any(row.chosen for row in found.values()) else name,
                *(f"{_number(forward)} / {_number(both)}" for forward, both in times),
                f"{max(differences):.0e}" if differences else "-",
                "; ".join(dict.fromkeys(row.note for row in found.values() if row.note)),
            )
        )
    return Table(
        f"Depthwise convolution, {rows[0].backend} on {rows[0].device}, {rows[0].dtype}: ms / with gradients",
        ("candidate", *("x".join(map(str, shape)) for shape in shapes), "all", "difference", "note"),
        "<" + ">" * (len(shapes) + 2) + "<",
        cells,
        ("* is what the package uses there.",),
    )


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
