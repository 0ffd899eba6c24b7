"""The interface of an engine, and the engine of a single device."""

import contextlib
import dataclasses
from typing import Any

import numpy as np

from keras_convnext.distribution import watchdog


@dataclasses.dataclass(frozen=True)
class Engine:
    """Divides a step among devices; `choose.choose` makes one. This base class does not divide it."""

    name: str  # "none", or a name of `ENGINES`
    devices: tuple[str, ...]  # of all processes, such as "cpu:0"
    num_parts: int = 1  # that a batch is divided into; devices may share a part, and divide its work
    strategy: Any = None  # the backend's own object, None where there is none
    group: watchdog.Group = dataclasses.field(default_factory=watchdog.alone)

    def scope(self) -> contextlib.AbstractContextManager[Any]:
        """Places what is made and computed inside: the model, the optimizer, `fit`."""
        return contextlib.nullcontext() if self.strategy is None else self.strategy.scope()

    def prepare(self, model: Any, batch: Any = None) -> None:
        """Makes the training step of a compiled model, whose optimizer is built, one of all devices.

        `batch` has symbolic tensors as `fit` is given; None for images and one-hot targets.
        """

    def for_fit(self, batches: Any) -> Any:
        """Returns this process's batches, a `tf.data.Dataset`, as `fit` needs them to use all devices."""
        return batches

    def whole(self, model: Any) -> contextlib.AbstractContextManager[Any]:
        """Lets the variables of a model be read to the last number, while it does not train."""
        return contextlib.nullcontext()

    def read(self, variable: Any) -> np.ndarray:
        """Reads the whole value of a variable, also where several devices hold parts of it."""
        import keras

        return keras.ops.convert_to_numpy(variable)

    def describe(self, batch_size: int) -> str:
        """Describes in one line the devices, the engine, and what each device gets of a batch."""
        kinds = sorted({device.partition(":")[0] for device in self.devices})
        count = f"{len(self.devices)} device{'s' * (len(self.devices) > 1)} ({', '.join(kinds)})"
        if len(self.group) > 1:
            count += f" of {len(self.group)} processes"
        if self.num_parts == 1 and self.strategy is None:
            return f"{count}: engine none"
        shared = len(self.devices) // self.num_parts
        owners = "each device" if shared == 1 else f"each {shared} devices, which share the pointwise kernels"
        return (
            f"{count}: engine {self.name}, {batch_size // self.num_parts} of {batch_size} images to {owners}"
        )

    def check_batch(self, batch_size: int, accumulation_steps: int = 1) -> None:
        """Refuses the batch of a step that cannot be divided into equal parts; names the nearest."""
        unit = self.num_parts * accumulation_steps
        lower = batch_size // unit * unit
        if lower == batch_size:
            return
        nearest = " and ".join(str(size) for size in (lower, lower + unit) if size)
        steps = f", each in {accumulation_steps} micro-batches" if accumulation_steps > 1 else ""
        hint = ' Or set distribution.engine = "none".' if len(self.group) == 1 else ""
        raise ValueError(
            f"Expected a batch_size that divides into {self.num_parts} equal parts{steps}, as engine "
            f"{self.name!r} needs on {len(self.devices)} devices, received {batch_size}. The nearest are "
            f"{nearest}.{hint}"
        )

    def filled(self, batch_size: int) -> int:
        """Returns the least size from `batch_size` up that can be divided; for batches that are padded."""
        return -(-batch_size // self.num_parts) * self.num_parts


def replicas() -> int:
    """Counts the replicas of TensorFlow whose losses are added up; `keras.losses` are divided by it."""
    import keras

    if keras.backend.backend() != "tensorflow":
        return 1
    import tensorflow as tf

    return tf.distribute.get_strategy().num_replicas_in_sync
