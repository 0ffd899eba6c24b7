"""Time of a model stage by stage, next to the least that this machine allows.

python -m benchmarks.speed stages
"""

import argparse
import dataclasses
import functools
import itertools
import statistics
from collections.abc import Callable, Sequence
from typing import Any

from benchmarks.speed import implementations, machine_rates, output
from benchmarks.speed.alternating_runs import WorkerError
from benchmarks.speed.cases import Progress
from benchmarks.speed.implementations import TITLES, Case
from benchmarks.speed.report import Table
from benchmarks.speed.work import ITEM_SIZES, parts
from keras_convnext.variants import VARIANTS, Variant

WHOLE = "whole model"
SHARE = 0.2  # of --seconds for a turn of a stage; there are some twelve
FOOTER = (
    "floor = FLOPs / matmul rate + bytes / copy bandwidth",
    "matmul rate: {matmul}; copy bandwidth: {copy}",
    "bytes: maps that a fused block reads and writes, and weights, once; above 100 %, maps were in a cache",
    "depthwise: of the time, that convolution; one block's by itself, times the number of blocks",
)


@dataclasses.dataclass(frozen=True)
class StageTime:
    """The time of one part of a model.

    Attributes:
        implementation: backend.
        stage: "stem", "stage 1" .. "stage 4", "head" or "whole model".
        seconds: median over the rounds.
        depthwise_seconds: of this, the depthwise convolutions of all blocks; None where there are none.
        floor_seconds: the least it could be, see `machine_rates.Rates.floor`; its two terms are
        product_seconds: FLOPs / matmul rate, and
        copy_seconds: bytes / copy bandwidth.
        gflop: 1e9 floating-point operations.
        megabytes: 1e6 bytes that must move.
    """

    implementation: str
    stage: str
    seconds: float
    depthwise_seconds: float | None
    floor_seconds: float
    product_seconds: float
    copy_seconds: float
    gflop: float
    megabytes: float

    @property
    def fraction(self) -> float:
        """Floor by time: 1 is as fast as the machine."""
        return self.floor_seconds / self.seconds


@dataclasses.dataclass(frozen=True)
class Stages:
    """The times of all stages on every backend, and the rates that the floors are made of.

    Attributes:
        case: what was run.
        rates: what the machine reaches.
        rows: by backend, in the order of the forward pass, the whole model last.
        problems: backend -> why it could not run.
    """

    case: Case
    rates: machine_rates.Rates
    rows: tuple[StageTime, ...]
    problems: dict[str, str]

    @property
    def footer(self) -> list[str]:
        """Lines that define the floor, with the rates that were measured."""
        device = "gpu" if any(rate.device == "gpu" for rate in self.rates.products) else "cpu"
        product, copy = self.rates.matmul_rate(device), self.rates.copy_bandwidth(device)
        shape = " x ".join(str(size) for size in product.shape)
        values = {
            "matmul": f"{product.per_second / 1e9:,.0f} GFLOP/s ({product.way}, {shape})",
            "copy": f"{copy.per_second / 1e9:,.1f} GB/s ({copy.way}, read and write)",
        }
        return [line.format(**values) for line in FOOTER]


def table(
    case: Case,
    backends: Sequence[str],
    rates: machine_rates.Rates,
    rounds: int = 5,
    seconds: float = 0.2,
    threads: int | None = None,
    on_progress: Callable[[str, int, int], None] | None = None,
) -> Stages:
    """Times every stage of a model as a model of its own, on each backend in a process of its own.

    A stage takes a map that is on the device already, and its result comes back as a NumPy array, as
    `predict_on_batch` gives it. The whole model takes NumPy images.

    Args:
        case: what to run, inference in "float32", "bfloat16" or "float16".
        backends: names of backends of Keras.
        rates: what `machine_rates.measure_rates` returns for the case's dtype.
        rounds: turns of each stage; all of them have one before any has its second.
        seconds: about how long a turn lasts; it has three calls at least.
        threads: cores to use, None for all.
        on_progress: called with what is done now, the number of things done and of all.

    Raises:
        ValueError: training, or another dtype.
    """
    _check(case)
    counted = parts(VARIANTS[case.model], case.image_size, case.batch)
    rows: list[StageTime] = []
    problems: dict[str, str] = {}
    for number, backend in enumerate(backends):
        if on_progress is not None:
            on_progress(backend, number, len(backends))
        try:
            implementations.check_offered(backend, case)
            measured = machine_rates.call_in_process(
                "benchmarks.speed.stages",
                "stage_seconds",
                dataclasses.asdict(case),
                rounds,
                seconds,
                backend=backend,
                threads=threads,
            )
        except (WorkerError, implementations.NotOfferedError) as error:
            problems[backend] = str(error)
            continue
        for stage, taken in measured["seconds"].items():
            chosen = [part for part in counted if stage in (part.stage, WHOLE)]
            device = measured["device"]
            flops = sum(part.flops for part in chosen)
            num_bytes = sum(part.num_bytes(case.dtype) for part in chosen)
            rows.append(
                StageTime(
                    backend,
                    stage,
                    taken,
                    measured["depthwise"].get(stage),
                    rates.floor(chosen, device),
                    flops / rates.matmul_rate(device).per_second,
                    num_bytes / rates.copy_bandwidth(device).per_second,
                    flops / 1e9,
                    num_bytes / 1e6,
                )
            )
    if on_progress is not None:
        on_progress("done", len(backends), len(backends))
    return Stages(case, rates, tuple(rows), problems)


def _check(case: Case) -> None:
    if case.mode != "inference" or case.dtype not in ITEM_SIZES:
        raise ValueError(
            f"Expected inference in {', '.join(ITEM_SIZES)} for the stages of a model, received "
            f"{case.mode} in {case.dtype}."
        )


def stage_seconds(case: dict, rounds: int, seconds: float) -> dict[str, Any]:
    """Times the stages on this process's backend.

    Returns:
        {"device": "cpu" or "gpu", "seconds": {stage: median}, "depthwise": {stage: median, all its blocks}}.
    """
    import keras

    described = Case(**case)
    variant = VARIANTS[described.model]
    model = implementations.our_model(described)
    images = implementations.pixels(described)
    calls: dict[tuple[str, str], Callable[[], Any]] = {}
    x = keras.ops.convert_to_tensor(images)
    for number, (stage, part) in enumerate(stage_models(model, variant).items()):
        calls["seconds", stage] = functools.partial(part.predict_on_batch, x)
        x = keras.ops.convert_to_tensor(calls["seconds", stage]())
        if stage.startswith("stage"):
            block = model.get_layer("blocks_0" if variant.isotropic else f"stages_{number - 1}_0")
            alone = keras.Input(batch_shape=x.shape, dtype=block.compute_dtype)
            convolution = keras.Model(alone, block.dwconv(alone))
            calls["depthwise", stage] = functools.partial(convolution.predict_on_batch, x)
    calls["seconds", WHOLE] = functools.partial(model.predict_on_batch, images)

    times: dict[tuple[str, str], list[float]] = {key: [] for key in calls}
    for _ in range(rounds):
        for key, call in calls.items():
            times[key].append(machine_rates.median_seconds(call, seconds))
    result: dict[str, Any] = {
        "device": "cpu" if implementations.device() == "cpu" else "gpu",
        "seconds": {},
        "depthwise": {},
    }
    for (kind, stage), values in times.items():
        blocks = 1 if kind == "seconds" else variant.depths[int(stage.removeprefix("stage ")) - 1]
        result[kind][stage] = blocks * statistics.median(values)
    return result


def stage_models(model: Any, variant: Variant) -> dict[str, Any]:
    """Cuts a model into one for each stage; each takes what the one before gives.

    They are of the model's class, so that they are called as the whole is.
    """
    first = model.get_layer("blocks_0" if variant.isotropic else "stages_0_0")
    tensors = [model.input, first.input, *model.pyramid_outputs.values(), model.output]
    names = ["stem", *(f"stage {number + 1}" for number in range(len(variant.depths))), "head"]
    ends = zip(names, tensors[:-1], tensors[1:], strict=True)
    return {name: type(model)(begin, end) for name, begin, end in ends}


def as_table(found: Stages) -> Table:
    """Makes the table of the stages."""
    rows = [
        (
            TITLES[row.implementation],
            row.stage,
            f"{row.gflop:.3g}",
            f"{row.megabytes:.1f}",
            f"{1000 * row.seconds:.2f}",
            "" if row.depthwise_seconds is None else f"{1000 * row.depthwise_seconds:.2f}",
            f"{1000 * row.floor_seconds:.2f}",
            f"{row.fraction:.0%}",
        )
        for row in found.rows
    ]
    problems = [f"{TITLES[backend]}: {reason}" for backend, reason in found.problems.items()]
    return Table(
        f"Stages of {found.case.title}",
        ("implementation", "part", "GFLOP", "MB", "ms", "depthwise ms", "floor ms", "of the floor"),
        "<<" + 6 * ">",
        rows,
        (*found.footer, *problems),
    )


def run(options: argparse.Namespace) -> int:
    """Runs `python -m benchmarks.speed stages`.

    Args:
        options: what `cases.resolve` returns.

    Returns:
        0, or 1 when no backend could run.
    """
    cases = [
        Case(model, mode, batch, image_size, dtype)
        for model, mode, dtype, image_size, batch in itertools.product(
            options.architectures, options.mode, options.dtype, options.image_size, options.batch
        )
    ]
    for case in cases:
        _check(case)
    where = output.begin(options)
    progress = Progress("stages")
    rates: dict[str, machine_rates.Rates] = {}
    tables, rows = [], []
    for case in cases:
        if case.dtype not in rates:
            progress.show("the machine", 0, 1)
            rates[case.dtype] = machine_rates.measure_rates(case.dtype, threads=options.threads)
        found = table(
            case,
            options.backends,
            rates[case.dtype],
            options.rounds,
            options.seconds * SHARE,
            options.threads,
            progress.show,
        )
        tables.append(as_table(found))
        rows += [
            dataclasses.asdict(case) | dataclasses.asdict(row) | {"fraction": row.fraction}
            for row in found.rows
        ]
    output.end(options, "stages", where, options.backends, tables, rows)
    return 0 if rows else 1
