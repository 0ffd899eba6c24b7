"""Reads the collectives of a compiled training step, and how many bytes they carry; JAX."""

import math
import re
from dataclasses import dataclass
from typing import Any

import keras
import numpy as np

from keras_convnext.distribution.choose import divided

_COLLECTIVES = "all-reduce|all-gather|reduce-scatter|all-to-all|collective-permute|collective-broadcast"
_COLLECTIVE = re.compile(rf" = (\(.*?\)|\S+) ({_COLLECTIVES})(-start)?\((.*)")
_ARRAY = re.compile(r"\b(pred|bf16|[a-z]+(\d+)\w*)\[([\d,]*)\]")
_GROUPS = re.compile(r"replica_groups=(?:\{\{([\d,]*)\}|\[\d+,(\d+)\]|mesh\[(.*?)\].*?\{(.*?)\})")


@dataclass(frozen=True)
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
    """Lists the exchanges in the text of a program that XLA has compiled (`jax.stages.Compiled.as_text()`).

    An operation inside a loop is listed once.
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


def compiled_step(model: Any, images: np.ndarray, targets: np.ndarray) -> Any:
    """Compiles the training step that `fit` makes, for a look at its program and its memory; JAX.

    The model is compiled, its optimizer built, in the scope of an engine or not. Of the batch, images (N, H,
    W, 3) and targets (N, K), only shapes and dtypes count. Returns `jax.stages.Compiled`: `as_text()` for
    `collectives`, `memory_analysis()`.
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
    """Returns the arguments of `compiled_step`: the state of a model, which it donates, and a batch; JAX."""
    batch = divided(images), divided(targets)
    model._symbolic_build(data_batch=batch)
    kinds = ("trainable_variables", "non_trainable_variables")
    state = [[v.value for v in getattr(model, kind)] for kind in kinds]
    state += [[v.value for v in model.optimizer.variables], [v.value for v in model.metrics_variables]]
    return tuple(state), batch


def _group_size(attributes: str) -> int:
    """Returns the devices of a group; XLA has three ways to write the groups."""
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
