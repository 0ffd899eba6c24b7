"""Devices: how one training step is divided among several. Nothing else in the package knows about them.

recipe's engine, devices that are there --choose--> Engine --scope--> model, optimizer and batches placed
compiled step --collectives--> what the devices send each other

An engine decides where a step is computed and never what: the batch of a recipe is the one of all devices
together, so its learning rate, its schedule and its random numbers hold for any number of them.
"""

import contextlib
import dataclasses
import difflib
import math
import re
from collections.abc import Iterator, Sequence
from typing import Any

import keras
import numpy as np

# Backend -> engines beside "auto" and "none"; the first is what "auto" takes for several devices.
ENGINES = {"jax": ("data_parallel", "model_parallel")}

# The widest weights of a block, over 90 % of all, divided along the hidden axis of 4 C: a device computes its
# share of the hidden channels, and one sum over the devices ends the block (Megatron-LM, arXiv:1909.08053,
# figure 3). GRN's statistics need a second sum, of one number a sample.
POINTWISE_LAYOUT = {
    r"(.*/)?pwconv1/kernel": (None, "model"),
    r"(.*/)?pwconv1/bias": ("model",),
    r"(.*/)?grn/(gamma|beta)": ("model",),
    r"(.*/)?pwconv2/kernel": ("model", None),
}


@dataclasses.dataclass(frozen=True)
class Engine:
    """How a step is divided among devices; made by `choose`.

    Attributes:
        name: "none", or a name of `ENGINES`.
        devices: names of the devices, such as "cpu:0".
        num_parts: parts that a batch is divided into. Devices may share a part, and divide its work.
        strategy: the backend's own object, None for "none".
    """

    name: str
    devices: tuple[str, ...]
    num_parts: int = 1
    strategy: Any = None

    @contextlib.contextmanager
    def scope(self) -> Iterator[None]:
        """Places what is made and computed inside: the model, the optimizer, `fit`."""
        with contextlib.nullcontext() if self.strategy is None else self.strategy.scope():
            yield

    def describe(self, batch_size: int) -> str:
        """One line for people: the devices, the engine, and what each device gets of a batch."""
        kinds = sorted({device.partition(":")[0] for device in self.devices})
        count = f"{len(self.devices)} device{'s' * (len(self.devices) > 1)} ({', '.join(kinds)})"
        if self.num_parts == 1 and self.strategy is None:
            return f"{count}: engine none"
        shared = len(self.devices) // self.num_parts
        owners = "each device" if shared == 1 else f"each {shared} devices, which share the pointwise kernels"
        return (
            f"{count}: engine {self.name}, {batch_size // self.num_parts} of {batch_size} images to {owners}"
        )

    def check_batch(self, batch_size: int, accumulation_steps: int = 1) -> None:
        """Refuses a batch that cannot be divided into equal parts.

        Args:
            batch_size: images of an optimizer step, on all devices together.
            accumulation_steps: micro-batches that it is made of.

        Raises:
            ValueError: it cannot; names the nearest sizes that can.
        """
        unit = self.num_parts * accumulation_steps
        if batch_size % unit == 0:
            return
        lower = batch_size // unit * unit
        nearest = " and ".join(str(size) for size in (lower, lower + unit) if size)
        steps = f", each in {accumulation_steps} micro-batches" if accumulation_steps > 1 else ""
        raise ValueError(
            f"Expected a batch_size that divides into {self.num_parts} equal parts{steps}, as engine "
            f"{self.name!r} needs on {len(self.devices)} devices, received {batch_size}. The nearest are "
            f'{nearest}. Or set distribution.engine = "none".'
        )

    def filled(self, batch_size: int) -> int:
        """The least size from `batch_size` up that can be divided; for batches that are padded."""
        return -(-batch_size // self.num_parts) * self.num_parts


def choose(engine: str = "auto", model_devices: int = 2) -> Engine:
    """Chooses how the devices of this machine share a step.

    - "none": one device, the backend's first.
    - "data_parallel" (JAX): a part of each batch to each device, weights on all, gradients summed.
    - "model_parallel" (JAX): devices in groups of `model_devices`, a part of each batch to each group. In a
      group the pointwise kernels, what follows them on the hidden axis, the optimizer's slots and the average
      of these are divided, see `POINTWISE_LAYOUT`; the others are on all.
    - "auto": the first of the backend's where there are several devices, else "none".

    Args:
        engine: one of these.
        model_devices: devices of a group in "model_parallel".

    Returns:
        `Engine`.

    Raises:
        ValueError: the engine is unknown or another backend's, or the devices cannot be divided so.

    Example:
        engine = choose("data_parallel")
        with engine.scope():
            model = keras_convnext.ConvNeXtTiny(weights=None)
    """
    backend = keras.backend.backend()
    own = ENGINES.get(backend, ())
    if engine not in ("auto", "none", *own):
        raise ValueError(_unknown_engine(engine, backend, own))
    devices = _devices(backend)
    if engine == "auto":
        engine = own[0] if own and len(devices) > 1 else "none"
    if engine == "none":
        return Engine("none", devices[:1])
    if engine == "data_parallel":
        return Engine(engine, devices, len(devices), keras.distribution.DataParallel(devices=list(devices)))
    if model_devices > len(devices) or len(devices) % model_devices:
        divisors = [str(n) for n in range(1, len(devices) + 1) if len(devices) % n == 0]
        raise ValueError(
            f"Expected distribution.model_devices to divide the {len(devices)} devices, received "
            f"{model_devices}. Choose one of {', '.join(divisors)}."
        )
    return Engine(engine, devices, len(devices) // model_devices, _model_parallel(devices, model_devices))


def _unknown_engine(engine: str, backend: str, own: Sequence[str]) -> str:
    owners = [name for name, engines in ENGINES.items() if engine in engines]
    known = ("auto", "none", *own)
    if owners:
        hint = f", which is an engine of {owners[0]}. Choose one of these, or set KERAS_BACKEND={owners[0]}"
    else:
        near = difflib.get_close_matches(engine, known, 3)
        hint = f". Did you mean {' or '.join(map(repr, near))}?" if near else ". Choose one of these"
    return f"Expected an engine of the {backend} backend, {', '.join(known)}, received {engine!r}{hint}."


def _devices(backend: str) -> tuple[str, ...]:
    if backend == "jax":
        return tuple(keras.distribution.list_devices())
    return (backend,)


def _model_parallel(devices: Sequence[str], model_devices: int) -> Any:
    mesh = keras.distribution.DeviceMesh(
        (len(devices) // model_devices, model_devices), ["batch", "model"], list(devices)
    )
    layout = keras.distribution.LayoutMap(mesh)
    for path, axes in POINTWISE_LAYOUT.items():
        layout[path] = axes
    return keras.distribution.ModelParallel(layout_map=layout, batch_dim_name="batch")


def divided(images: np.ndarray) -> Any:
    """A batch on the devices of the engine whose scope this is; as it is where there is none.

    Args:
        images: (N, ...). Where N cannot be divided every device gets all.

    Returns:
        The same values, for a compiled function of the model.
    """
    strategy = keras.distribution.distribution()
    if keras.backend.backend() != "jax" or strategy is None or len(images) % strategy.num_model_replicas:
        return images
    import jax

    layout = strategy.get_data_layout(images.shape).backend_layout
    return jax.make_array_from_process_local_data(layout, images)


# What devices send each other.

_COLLECTIVES = "all-reduce|all-gather|reduce-scatter|all-to-all|collective-permute|collective-broadcast"
_COLLECTIVE = re.compile(rf" = (\(.*?\)|\S+) ({_COLLECTIVES})(-start)?\((.*)")
_ARRAY = re.compile(r"\b(pred|bf16|[a-z]+(\d+)\w*)\[([\d,]*)\]")
_GROUPS = re.compile(r"replica_groups=(?:\{\{([\d,]*)\}|\[\d+,(\d+)\]|mesh\[(.*?)\].*?\{(.*?)\})")


@dataclasses.dataclass(frozen=True)
class Collective:
    """One operation of a compiled program in which devices exchange arrays.

    Attributes:
        kind: XLA's name, such as "all-reduce".
        num_bytes: of the arrays that it gives to one device.
        num_devices: that take part in it together; 0 where the program does not say.
    """

    kind: str
    num_bytes: int
    num_devices: int


def collectives(program: str) -> list[Collective]:
    """Lists the exchanges in the text of a program that XLA has compiled.

    An operation inside a loop is listed once.

    Args:
        program: what `jax.stages.Compiled.as_text()` returns.

    Returns:
        List of `Collective`, in the order of the text.
    """
    found = []
    for line in program.splitlines():
        match = _COLLECTIVE.search(line)
        if match is None:
            continue
        result, kind, is_start, rest = match.groups()
        sizes = [_array_bytes(*array.groups()) for array in _ARRAY.finditer(result)]
        if is_start and kind != "all-reduce":
            sizes = sizes[len(sizes) // 2 :]  # the operands stand before the results
        found.append(Collective(kind, sum(sizes), _group_size(rest)))
    return found


def _group_size(attributes: str) -> int:
    """Devices of a group; XLA has three ways to write the groups."""
    groups = _GROUPS.search(attributes)
    if groups is None:
        return 0
    listed, size, axes, names = groups.groups()
    if axes is None:
        return int(size or len(listed.split(",")))
    sizes = dict(axis.split("=") for axis in axes.split(","))
    return math.prod(int(sizes.get(name.strip(), 0)) for name in names.split(","))


def _array_bytes(kind: str, bits: str | None, shape: str) -> int:
    count = math.prod(int(size) for size in shape.split(",") if size)
    return count * (1 if kind == "pred" else 2 if kind == "bf16" else max(1, int(bits or 8) // 8))


def compiled_step(model: Any, images: np.ndarray, targets: np.ndarray) -> Any:
    """Compiles the training step that `fit` makes, for a look at its program and its memory; JAX.

    Args:
        model: compiled, its optimizer built, in the scope of an engine or not.
        images: (N, H, W, 3), a batch; only its shape and dtype count.
        targets: (N, K).

    Returns:
        `jax.stages.Compiled`: `as_text()` for `collectives`, `memory_analysis()`.

    Raises:
        ValueError: the backend is not JAX.
    """
    if keras.backend.backend() != "jax":
        raise ValueError(
            f"Expected the jax backend, whose step is one program, received {keras.backend.backend()!r}. "
            "Set KERAS_BACKEND=jax."
        )
    import jax

    arguments = step_arguments(model, images, targets)
    shardings = None
    if keras.distribution.distribution() is not None:
        shardings = (None, tuple([array.sharding for array in arrays] for arrays in arguments[0]))
    step = jax.jit(model.train_step, donate_argnums=0, out_shardings=shardings)
    return step.lower(*arguments).compile()


def step_arguments(model: Any, images: np.ndarray, targets: np.ndarray) -> tuple[Any, Any]:
    """What `compiled_step` takes: the state of a model, which it takes away, and a batch; JAX."""
    batch = divided(images), divided(targets)
    model._symbolic_build(data_batch=batch)
    kinds = ("trainable_variables", "non_trainable_variables")
    state = [[v.value for v in getattr(model, kind)] for kind in kinds]
    state += [[v.value for v in model.optimizer.variables], [v.value for v in model.metrics_variables]]
    return tuple(state), batch
