"""Rates of this machine: products of matrices and copies, measured with every installed library.

`Rates.floor` divides the work that `benchmarks.speed.work` counts by these rates.
"""

import concurrent.futures
import dataclasses
import functools
import importlib
import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from benchmarks.speed import implementations
from benchmarks.speed.alternating_runs import Worker, WorkerError
from benchmarks.speed.work import ITEM_SIZES, Part
from keras_convnext import _environment

# Rows, inner size and columns of what the pointwise layers of ConvNeXt-T multiply at 8 images of 224 pixels:
# 8 * 14 * 14 positions of 384 channels and 8 * 7 * 7 of 768, to four times as many and back.
MATRIX_SHAPES = ((1568, 384, 1536), (1568, 1536, 384), (392, 768, 3072), (392, 3072, 768))
LIBRARIES = ("torch", "tensorflow", "jax", "numpy")
COPIED_BYTES = 2**28  # 256 MiB, several times the largest cache of a processor


@dataclasses.dataclass(frozen=True)
class Rate:
    """Rate of one way to multiply matrices or to copy.

    Attributes:
        way: library and function, such as "torch mm".
        device: "cpu" or "gpu".
        per_second: FLOP/s, or bytes read and written in a second; by the median of the repeats.
        shape: (rows, inner, columns) of the matrices; empty for a copy.
    """

    way: str
    device: str
    per_second: float
    shape: tuple[int, ...] = ()


@dataclasses.dataclass(frozen=True)
class Rates:
    """Rates of the machine, by every way that is installed.

    Attributes:
        dtype: of the matrices.
        products: rates of matrix products in FLOP/s, the best first.
        copies: rates of copies in bytes/s, the best first.
        not_measured: library -> why it could not be measured.
    """

    dtype: str
    products: tuple[Rate, ...]
    copies: tuple[Rate, ...]
    not_measured: dict[str, str]

    def matmul_rate(self, device: str = "cpu") -> Rate:
        return _best(self.products, device)

    def copy_bandwidth(self, device: str = "cpu") -> Rate:
        return _best(self.copies, device)

    def floor(self, counted: Sequence[Part], device: str = "cpu") -> float:
        """Seconds that parts take at least: FLOPs / matmul rate + bytes / copy bandwidth.

        Products and copies are taken one after the other. A program that overlaps them, or whose maps stay
        in a cache from one layer to the next, can be faster.
        """
        flops = sum(part.flops for part in counted)
        moved = sum(part.num_bytes(self.dtype) for part in counted)
        return flops / self.matmul_rate(device).per_second + moved / self.copy_bandwidth(device).per_second


def _best(rates: Sequence[Rate], device: str) -> Rate:
    for rate in rates:
        if rate.device == device:
            return rate
    raise ValueError(
        f"Expected a rate measured on the {device}, received those of {sorted({r.device for r in rates})}. "
        "Measure with a library that uses it."
    )


def measure_rates(dtype: str = "float32", seconds: float = 0.3, threads: int | None = None) -> Rates:
    """Measures matrix products and copies with every library that is installed, each in a process of its own.

    Args:
        dtype: "float32", "bfloat16" or "float16".
        seconds: for each shape and way.
        threads: number of cores to use, default all.

    Raises:
        ValueError: for another dtype.
        OSError: no library can be measured.
    """
    if dtype not in ITEM_SIZES:
        raise ValueError(f"Expected a dtype among {', '.join(ITEM_SIZES)}, received {dtype!r}.")
    products: list[Rate] = []
    copies: list[Rate] = []
    not_measured: dict[str, str] = {}
    for library in LIBRARIES:
        if importlib.util.find_spec(library) is None:
            not_measured[library] = "not installed"
            continue
        try:
            found = call_in_process(
                "benchmarks.speed.machine_rates", "library_rates", library, dtype, seconds, threads=threads
            )
        except WorkerError as error:
            not_measured[library] = str(error)
            continue
        for rates, rows in ((products, found["products"]), (copies, found["copies"])):
            rates += [Rate(**row | {"shape": tuple(row["shape"])}) for row in rows]
    if not products or not copies:
        reasons = "; ".join(f"{library}: {reason}" for library, reason in not_measured.items())
        raise OSError(f"No library could be measured for {dtype}. {reasons}")
    products.sort(key=lambda rate: -rate.per_second)
    copies.sort(key=lambda rate: -rate.per_second)
    return Rates(dtype, tuple(products), tuple(copies), not_measured)


def library_rates(library: str, dtype: str, seconds: float) -> dict[str, list[dict]]:
    """Measures one library in this process: {"products": [...], "copies": [...]}, fields of `Rate`."""
    device, ways = {"torch": _torch, "tensorflow": _tensorflow, "jax": _jax, "numpy": _numpy}[library](dtype)
    products, copies = [], []
    for way, shape, run in ways:
        taken = median_seconds(run, seconds)
        if shape:
            rows, inner, columns = shape
            products.append(Rate(way, device, 2 * rows * inner * columns / taken, shape))
        else:
            copies.append(Rate(way, device, 2 * COPIED_BYTES / taken))
    return {
        "products": [dataclasses.asdict(rate) for rate in products],
        "copies": [dataclasses.asdict(rate) for rate in copies],
    }


def median_seconds(run: Callable[[], Any], seconds: float, at_least: int = 3) -> float:
    """Calls a function once uncounted, then for about `seconds`, and returns the median time of a call."""
    run()
    times: list[float] = []
    while len(times) < at_least or sum(times) < seconds:
        begin = time.perf_counter()
        run()
        times.append(time.perf_counter() - begin)
    return statistics.median(times)


Way = tuple[str, tuple[int, ...], Callable[[], Any]]


def _matrices() -> Iterator[tuple[tuple[int, ...], np.ndarray, np.ndarray]]:
    generator = np.random.default_rng(0)
    for shape in MATRIX_SHAPES:
        rows, inner, columns = shape
        yield (
            shape,
            generator.standard_normal((rows, inner), np.float32),
            generator.standard_normal((inner, columns), np.float32),
        )


def _torch(dtype: str) -> tuple[str, list[Way]]:
    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"

    def finished(run):
        def call():
            run()
            if device == "cuda":
                torch.cuda.synchronize()

        return call

    ways: list[Way] = []
    for shape, left, right in _matrices():
        a = torch.from_numpy(left).to(device, getattr(torch, dtype))
        b = torch.from_numpy(right).to(a)
        ways.append(("torch mm", shape, finished(functools.partial(torch.mm, a, b))))
        # The same product as a convolution, which oneDNN and cuDNN may do faster.
        side = int((shape[0] // 8) ** 0.5)
        images = a.reshape(8, side, side, -1).permute(0, 3, 1, 2)  # channels last in memory
        kernel = b.T.reshape(shape[2], shape[1], 1, 1).contiguous(memory_format=torch.channels_last)
        ways.append(
            (
                "torch 1x1 convolution",
                shape,
                finished(functools.partial(torch.nn.functional.conv2d, images, kernel)),
            )
        )
    source = torch.ones(COPIED_BYTES // 4, device=device)
    target = torch.zeros_like(source)
    ways.append(("torch copy", (), finished(lambda: target.copy_(source))))
    return "gpu" if device == "cuda" else "cpu", ways


def _tensorflow(dtype: str) -> tuple[str, list[Way]]:
    import tensorflow as tf

    def multiply(a, b):
        tf.linalg.matmul(a, b)
        tf.test.experimental.sync_devices()

    ways: list[Way] = []
    for shape, left, right in _matrices():
        a, b = tf.cast(left, dtype), tf.cast(right, dtype)
        ways.append(("tensorflow matmul", shape, functools.partial(multiply, a, b)))
    return "gpu" if tf.config.list_physical_devices("GPU") else "cpu", ways


def _jax(dtype: str) -> tuple[str, list[Way]]:
    import jax
    import jax.numpy as jnp

    product = jax.jit(jnp.dot)

    def multiply(a, b):
        product(a, b).block_until_ready()

    ways: list[Way] = []
    for shape, left, right in _matrices():
        a, b = jnp.asarray(left, dtype), jnp.asarray(right, dtype)
        ways.append(("jax dot", shape, functools.partial(multiply, a, b)))
    device = jax.default_backend()
    if device != "cpu":
        source = jnp.ones(COPIED_BYTES // 4)
        ways.append(("jax copy", (), lambda: source.copy().block_until_ready()))
    return device, ways


def _numpy(dtype: str) -> tuple[str, list[Way]]:
    ways: list[Way] = []
    if dtype == "float32":  # NumPy has no fast product of other types
        for shape, left, right in _matrices():
            out = np.empty((shape[0], shape[2]), np.float32)
            ways.append(("numpy matmul", shape, functools.partial(np.matmul, left, right, out=out)))
    source = np.ones(COPIED_BYTES // 4, np.float32)
    target = np.zeros_like(source)
    threads = _environment.available_cores()
    pieces = list(zip(np.array_split(target, threads), np.array_split(source, threads), strict=True))
    pool = concurrent.futures.ThreadPoolExecutor(threads)
    ways.append(("numpy copy", (), lambda: list(pool.map(lambda piece: np.copyto(*piece), pieces))))
    return "cpu", ways


# See `worker.COMMAND`.
_COMMAND = (
    "import keras_convnext_main; from benchmarks.speed import machine_rates; machine_rates.answer_call()"
)


def call_in_process(
    module: str, function: str, *arguments: Any, backend: str = "", threads: int | None = None
) -> Any:
    """Calls a function in a new process.

    Args:
        module: its full name.
        function: its name; what it returns must be writable as JSON.
        arguments: writable as JSON.
        backend: KERAS_BACKEND of the process, default this one's.
        threads: number of cores it may use, default all.

    Returns:
        What the function returned, as JSON gives it back.

    Raises:
        alternating_runs.WorkerError: the process died; the message says what it said last.
    """
    worker = Worker(["-c", _COMMAND], implementations.environment(backend, threads))
    try:
        return worker.ask(module=module, function=function, arguments=arguments, threads=threads)["answer"]
    finally:
        worker.stop()


def answer_call() -> None:
    """Answers one call of `call_in_process`, in its new process."""
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # frameworks print
    call = json.loads(sys.stdin.readline())
    if call["threads"] is not None:
        implementations.limit_threads(call["threads"])
    function = getattr(importlib.import_module(call["module"]), call["function"])
    print(json.dumps({"answer": function(*call["arguments"])}), file=answers, flush=True)
