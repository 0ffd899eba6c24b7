"""Estimates memory, traffic, operations and time of a run on given devices, without running it.

recipe, "64xh100", engine --> images of a device --> memory, exchanges, operations --> seconds

Nothing is built and no backend is started: all is counted from the tables of the package.
"""

import dataclasses
import math
from dataclasses import dataclass
from typing import Any

from keras_convnext._environment import BACKENDS, wanted_backend
from keras_convnext._messages import size_text
from keras_convnext.analysis import memory
from keras_convnext.analysis.devices import DEVICES, FRACTION, USABLE_MEMORY, Device, parse_devices
from keras_convnext.architecture import layers_of
from keras_convnext.data import sources, unlabelled
from keras_convnext.training.derived import training_images
from keras_convnext.training.recipes.classification import ENGINES
from keras_convnext.training.recipes.files import AnyRecipe
from keras_convnext.training.recipes.pretraining import CELL, PretrainingRecipe
from keras_convnext.training.recipes.segmentation import SegmentationRecipe
from keras_convnext.variants import VARIANTS, Variant
from keras_convnext.weights import catalog

# What the titles of the recipes name -> (training images, classes).
# ImageNet-1k: Russakovsky et al. 2015 (arXiv:1409.0575), table 2. ImageNet-22k: the fall 2011 release.
KNOWN_DATA = {"ImageNet-1k": (1_281_167, 1000), "ImageNet-22k": (14_197_122, 21_841)}
CLASSES = 1000  # where they are unknown

# What `describe` calls the parts of a step's memory, in its order.
_PARTS = {
    "weights": "weights",
    "average (EMA)": "average",
    "optimizer slots": "slots",
    "gradient sums": "accumulated",
    "gradients, so far": "gradients",
    "activations": "activations",
    "working maps": "working",
    "input batch": "inputs",
}


@dataclass(frozen=True)
class Exchange:
    """Arrays that `num_devices` add up among each other, once in a micro-batch."""

    what: str  # "gradients", "maps" or "GRN"
    num_bytes: int  # of the arrays on one device
    num_devices: int
    times: int  # in an optimizer step

    @property
    def wire_bytes(self) -> int:
        """Bytes that one device sends in an optimizer step."""
        return self.times * ring_bytes(self.num_bytes, self.num_devices)


@dataclass(frozen=True)
class Plan:
    """The memory, exchanges, operations and time of a training step on the devices that were named."""

    device: str  # a key of `DEVICES`
    num_devices: int
    engine: str
    backend: str
    batch_size: int
    accumulation_steps: int  # that fit
    recipe_accumulation_steps: int
    images_per_device: int  # at once; those of a group in "model_parallel"
    images: int | None  # of the training data; None, as the steps, where it is unknown
    classes: int  # 1000 where they are unknown, 0 of pre-training
    steps_per_epoch: int | None
    total_steps: int | None
    rematerialize: bool
    memory: memory.Memory  # of one device
    other_memory: int  # total bytes with the other rematerialize
    memory_limit: float  # bytes of a device
    fits: bool  # memory is at most `USABLE_MEMORY` of that
    smallest_accumulation_steps: int | None  # the least that fits; None where none does
    exchanges: tuple[Exchange, ...]
    flops: int  # of an optimizer step on all devices
    seconds: dict[str, float]  # of an optimizer step: "products", "maps" and "exchanges"

    @property
    def step_seconds(self) -> float:
        return sum(self.seconds.values())

    @property
    def images_per_second(self) -> float:
        return self.batch_size / self.step_seconds


def make_plan(recipe: AnyRecipe, devices: str, fraction: float = FRACTION) -> Plan:
    """Plans the run of a recipe on devices such as "64xh100", a number and a key of `DEVICES`.

    Batch size and rate stay those of the recipe. So do its micro-batches, unless they cannot be divided among
    the devices or do not fit their memory: then the fewest that can and do. The recipe's data is opened where
    it is there. `fraction` of the peak figures, above 0 and at most 1, is reached.

    ValueError: the device is unknown, so many cannot share the batch, or the recipe is of segmentation.
    SourceError: the data is unusable.
    """
    if isinstance(recipe, SegmentationRecipe):
        raise ValueError(
            f"Expected a recipe of a classifier or of pre-training, received one of {recipe.task}, "
            f"{recipe.title!r}: the heads of UPerNet are not counted. Train some steps of it: log.csv has "
            "images_per_second."
        )
    pretrains = isinstance(recipe, PretrainingRecipe)
    if not 0 < fraction <= 1:
        raise ValueError(f"Expected a fraction above 0 and at most 1 of peak figures, received {fraction}.")
    model: Any = recipe.model
    augmentation: Any = recipe.augmentation
    batch_size = recipe.optimizer.batch_size
    num_devices, name = parse_devices(devices)
    engine, model_devices = _engine(recipe, num_devices)
    images, classes = _data_of(recipe)
    num_parts = num_devices // model_devices
    device = DEVICES[name]
    backend = ENGINES[engine] if ENGINES.get(engine) in BACKENDS else wanted_backend()
    if device.kind == "tpu" and backend == "torch":
        raise ValueError("Expected jax or tensorflow for TPUs, received 'torch'. Set KERAS_BACKEND=jax.")

    def step(accumulation_steps, rematerialize=model.rematerialize):
        scale = None if pretrains else model.layer_scale_init_value or None
        return memory.Step(
            dataclasses.replace(VARIANTS[model.architecture], layer_scale_init_value=scale),
            batch_size // accumulation_steps // num_parts,
            model.image_size,
            classes,
            model.precision,
            backend,
            device.kind,
            rematerialize=rematerialize,
            trainable="all" if pretrains else model.trainable,
            has_average=recipe.optimizer.ema_decay > 0,
            accumulates=accumulation_steps > 1,
            clips=recipe.optimizer.clip_norm > 0,
            num_devices=num_devices,
            model_devices=model_devices,
            **(_masked(recipe) if isinstance(recipe, PretrainingRecipe) else {}),
        )

    def total(chosen):
        return memory.estimate(chosen).total + teacher

    teacher = 0 if pretrains else _teacher_bytes(recipe)
    limit = device.memory * USABLE_MEMORY
    # A micro-batch divides into equal parts; mixing takes pairs of images.
    mixes = not pretrains and (augmentation.mixup or augmentation.cutmix)
    unit = math.lcm(num_parts, 2) if mixes else num_parts
    possible = [n for n in _divisors(batch_size) if batch_size // n % unit == 0]
    if not possible:
        lower = batch_size // unit * unit
        nearest = " and ".join(str(size) for size in (lower, lower + unit) if size)
        raise ValueError(
            f"Expected a batch_size that divides into {num_parts} equal parts, as engine {engine!r} needs on "
            f"{num_devices} devices, received {batch_size}. The nearest are {nearest}. Set batch_size, or "
            "name fewer devices."
        )
    smallest = next((n for n in possible if total(step(n)) <= limit), None)
    own = recipe.optimizer.accumulation_steps
    chosen = own if own in possible and total(step(own)) <= limit else smallest or possible[-1]
    used = step(chosen)
    found = memory.estimate(used)
    found = dataclasses.replace(found, weights=found.weights + teacher)
    exchanges = communication(used, chosen)
    if pretrains:
        flops = 2 * (4 if model.rematerialize else 3) * batch_size * pretraining_multiply_adds(used)
    else:
        flops = step_flops(used.variant, model.image_size, batch_size, classes, model.rematerialize)
    steps = None if images is None else images // batch_size
    return Plan(
        device=name,
        num_devices=num_devices,
        engine=engine,
        backend=backend,
        batch_size=batch_size,
        accumulation_steps=chosen,
        recipe_accumulation_steps=own,
        images_per_device=used.batch,
        images=images,
        classes=classes,
        steps_per_epoch=steps,
        total_steps=None if steps is None else steps * recipe.optimizer.epochs,
        rematerialize=model.rematerialize,
        memory=found,
        other_memory=total(step(chosen, not model.rematerialize)),
        memory_limit=device.memory,
        fits=found.total <= limit,
        smallest_accumulation_steps=smallest,
        exchanges=exchanges,
        flops=flops,
        seconds=step_seconds(used, chosen, flops, exchanges, device, fraction),
    )


def describe(plan: Plan, fraction: float = FRACTION) -> list[tuple[str, str]]:
    """Returns a plan as lines to print: (title, text)."""
    share = f"{plan.images_per_device} images through a device at once"
    if plan.engine == "model_parallel":
        groups = plan.batch_size // plan.accumulation_steps // plan.images_per_device
        share = f"{plan.images_per_device} images through each {plan.num_devices // groups} devices at once"
    micro_batches = f"{plan.accumulation_steps} micro-batch{'es' * (plan.accumulation_steps > 1)}"
    steps, few, run = "unknown without --data", "", ""
    if plan.classes:
        steps += f"; {plan.classes} classes assumed"
    if plan.steps_per_epoch is not None and plan.total_steps is not None:
        data = f"{plan.images:,} images" + (f" of {plan.classes:,} classes" if plan.classes else "")
        steps = f"{plan.steps_per_epoch:,} an epoch of {data}, {plan.total_steps:,} in all"
        minutes = plan.total_steps * plan.step_seconds / 60
        length = f"{minutes / 60:,.1f} hours" if minutes >= 60 else f"{minutes:,.1f} minutes"
        run = f"{length}, without evaluation"
        if not plan.steps_per_epoch:
            few = f"`train` refuses fewer images than a batch of {plan.batch_size}: set a smaller batch_size"
    total = f"{size_text(plan.memory.total)} of {size_text(plan.memory_limit)} a device"
    excess = "" if plan.fits else f": MORE than {USABLE_MEMORY:.0%} of it"
    other = "without" if plan.rematerialize else "with"
    parts = ((title, getattr(plan.memory, name)) for title, name in _PARTS.items())
    seconds = ", ".join(f"{name} {1000 * value:,.1f}" for name, value in plan.seconds.items() if value)
    lines = [
        ("devices", f"{plan.num_devices} x {plan.device}, engine {plan.engine}, backend {plan.backend}"),
        ("batch", f"{plan.batch_size} images a step, as in the recipe: {micro_batches}, {share}"),
        ("", _advice(plan)),
        ("steps", steps),
        ("", few),
        ("memory", f"{total}, at the peak of a step{excess}"),
        *((f"  {title}", size_text(num_bytes) if num_bytes else "") for title, num_bytes in parts),
        (f"  {other} rematerialize", f"{size_text(plan.other_memory)} in all"),
        *(("exchange", _exchange_text(exchange)) for exchange in plan.exchanges),
        ("operations", f"{plan.flops / 1e12:,.4g} TFLOP a step"),
        ("time", f"{1000 * plan.step_seconds:,.1f} ms a step ({seconds}), not measured"),
        ("speed", f"{plan.images_per_second:,.0f} images/s, at {fraction:g} of the peak figures"),
        ("run", run),
        ("figures", DEVICES[plan.device].source),
    ]
    return [(title, text) for title, text in lines if text]


def _exchange_text(exchange: Exchange) -> str:
    times = f"{exchange.times} times a step" if exchange.times > 1 else "once a step"
    arrays = f"{exchange.what}: {size_text(exchange.num_bytes)} among {exchange.num_devices} devices"
    return f"{arrays}, {times}; {size_text(exchange.wire_bytes)} sent by each"


def ring_bytes(num_bytes: int, num_devices: int) -> int:
    """Returns the bytes that each of n devices sends to add up arrays in a ring: 2 (n - 1) / n of their size.

    Each part of 1 / n goes round twice: to be added up, and as the sum. No way of adding up sends less.
    Reference: Patarasuk and Yuan 2009, "Bandwidth optimal all-reduce algorithms for clusters of
    workstations", section 3.
    """
    return 2 * (num_devices - 1) * num_bytes // num_devices


def communication(step: memory.Step, accumulation_steps: int) -> tuple[Exchange, ...]:
    """Lists what devices add up among each other in an optimizer step of so many micro-batches.

    Gradients, float32, among those that have different images: in each micro-batch, as XLA divides the
    program of one. Where devices share the pointwise kernels, each block adds up its result, and on the way
    back the gradient of its norm's result (arXiv:1909.08053, figure 3); GRN its mean over the channels, one
    number a sample, both ways. The few bytes of loss and metrics are not counted.
    """
    parts, group = step.num_devices // step.model_devices, step.model_devices
    found = []
    if parts > 1:
        gradients = memory.FLOAT32 * memory.count_weights(step)[1]
        found.append(Exchange("gradients", gradients, parts, accumulation_steps))
    if group > 1:
        layers = layers_of(step.variant, step.image_size)
        results = [layer.side**2 * layer.outputs for layer in layers if layer.name.endswith("pwconv2")]
        means = sum(layer.kind == "response_norm" for layer in layers)
        # XLA on a CPU computes with float32 whatever the precision.
        size = memory.FLOAT32 if step.device == "cpu" else step.item_size
        found.append(Exchange("maps", size * 2 * step.batch * sum(results), group, accumulation_steps))
        if means:
            found.append(Exchange("GRN", memory.FLOAT32 * 2 * step.batch * means, group, accumulation_steps))
    return tuple(found)


def multiply_adds(variant: Variant, image_size: int = 224, batch: int = 1, classes: int = CLASSES) -> int:
    """Counts those of convolutions and matrix products, 4.46e9 for ConvNeXt-T at 224 pixels."""
    return batch * sum(layer.multiply_adds for layer in layers_of(variant, image_size, classes))


def pretraining_multiply_adds(step: memory.Step) -> int:
    """Counts those of an image: seen cells in the encoder, but all of them in its depthwise convolutions."""
    total = 0.0
    for layer in memory.layers_in(step):
        is_whole = layer.stage == "decoder" or layer.groups > 1
        total += layer.multiply_adds * (1 if is_whole else step.seen)
    return round(total)


def step_flops(
    variant: Variant, image_size: int, batch_size: int, classes: int = CLASSES, rematerialize: bool = False
) -> int:
    """Counts the operations of an optimizer step: 2 a multiply-add, forward once and backward twice.

    The backward pass has two products for each of the forward pass, for the gradients of the map and of the
    kernel. Rematerialising computes the forward pass once more.
    """
    return 2 * multiply_adds(variant, image_size, batch_size, classes) * (4 if rematerialize else 3)


def step_seconds(
    step: memory.Step,
    accumulation_steps: int,
    flops: int,
    exchanges: tuple[Exchange, ...],
    device: Device,
    fraction: float,
) -> dict[str, float]:
    """Bounds the seconds of an optimizer step, its parts one after the other; this is no measurement.

    - "products": operations of a device / (fraction x peak FLOP/s).
    - "maps": bytes / (fraction x bandwidth): each map that is kept is written and read in the forward pass,
      read in the backward pass, and its gradient written and read; once a step the update reads weight,
      gradient and slots and writes weight and slots, and follows with the average.
    - "exchanges": `Exchange.wire_bytes` / (fraction x the slowest link on the way). Real programs overlap
      these with the backward pass.

    `step` is a micro-batch on one device, `flops` are of an optimizer step on all.
    """
    peak = device.float32 if step.item_size == memory.FLOAT32 else device.bfloat16
    kept = sum(layer.kept for layer in memory.layers(dataclasses.replace(step, rematerialize=False)))
    _, trained = memory.count_weights(step)
    passes = 7 + 3 * step.has_average
    moved = 5 * accumulation_steps * kept + passes * memory.FLOAT32 * trained
    seconds = {
        "products": flops / step.num_devices / (fraction * peak),
        "maps": moved / (fraction * device.bandwidth),
        "exchanges": 0.0,
    }
    for exchange in exchanges:
        # Groups that share kernels are neighbours.
        reach = exchange.num_devices if exchange.what != "gradients" else step.num_devices
        speed = device.link if reach <= device.host_devices else device.network
        seconds["exchanges"] += exchange.wire_bytes / (fraction * speed)
    return seconds


def _engine(recipe: AnyRecipe, num_devices: int) -> tuple[str, int]:
    """Returns the engine, and how many devices share the pointwise kernels."""
    engine = recipe.distribution.engine
    if engine == "auto":
        own = (name for name, backend in ENGINES.items() if backend == wanted_backend())
        engine = next(own, "data_parallel") if num_devices > 1 else "none"
    if engine == "none" and num_devices > 1:
        raise ValueError(f"Expected one device for engine 'none', received {num_devices}. Try data_parallel.")
    if engine != "model_parallel":
        return engine, 1
    shared = recipe.distribution.model_devices
    if num_devices % shared:
        divisors = ", ".join(map(str, _divisors(num_devices)))
        raise ValueError(
            f"Expected distribution.model_devices to divide the {num_devices} devices, received {shared}. "
            f"Choose one of {divisors}."
        )
    return engine, shared


def _divisors(number: int) -> list[int]:
    small = [n for n in range(1, math.isqrt(number) + 1) if number % n == 0]
    return sorted({*small, *(number // n for n in small)})


def _masked(recipe: PretrainingRecipe) -> dict[str, Any]:
    """What `memory.Step` has of the decoder and the masks."""
    cells = (recipe.model.image_size // CELL) ** 2
    seen = int(cells * (1 - recipe.model.mask_ratio)) / cells
    return {"decoder": (recipe.model.decoder_width, recipe.model.decoder_depth), "seen": seen}


def _data_of(recipe: AnyRecipe) -> tuple[int | None, int]:
    """Counts training images and classes: of the recipe's data, else of the set that its title names last."""
    pretrains = isinstance(recipe, PretrainingRecipe)
    if recipe.data.source:
        source = training_images(recipe.data, recipe.run.seed, unlabelled if pretrains else sources)
        return len(source), 0 if pretrains else len(source.classes)
    named = max(KNOWN_DATA, key=recipe.title.rfind)
    images, classes = KNOWN_DATA[named] if named in recipe.title else (None, CLASSES)
    return images, 0 if pretrains else classes


def _teacher_bytes(recipe: Any) -> int:
    """Counts the bytes of a teacher, which every device has; a file is not opened and counts 0."""
    try:
        row = catalog.find_checkpoint(recipe.distillation.teacher)
    except ValueError:
        return 0
    return memory.FLOAT32 * VARIANTS[row.architecture].parameters


def _advice(plan: Plan) -> str:
    own, least = plan.recipe_accumulation_steps, plan.smallest_accumulation_steps
    if least is None:
        other = "" if plan.rematerialize else "; try --set rematerialize=true, a lower precision"
        return f"no number of micro-batches fits the memory{other}, or larger devices"
    if plan.accumulation_steps != own:
        return f"the recipe's accumulation_steps={own} does not fit: --set accumulation_steps={least}"
    return f"fewer and larger micro-batches fit: --set accumulation_steps={least}" if least < own else ""
