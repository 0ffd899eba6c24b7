"""Engines of JAX: Keras's DataParallel and ModelParallel, on the devices of one process or of many."""

import contextlib
import dataclasses
import os
import re
from collections.abc import Iterator
from typing import Any

import jax
import keras
import numpy as np

from keras_convnext._environment import integer
from keras_convnext.distribution import watchdog
from keras_convnext.distribution.engine import Engine

# The widest weights of a block, over 90 % of all, divided along the hidden axis of 4 C: a device computes its
# share of the hidden channels, and one sum over the devices ends the block (Megatron-LM, arXiv:1909.08053,
# figure 3). GRN's statistics need a second sum, of one number a sample.
POINTWISE_LAYOUT = {
    r"(.*/)?pwconv1/kernel": (None, "model"),
    r"(.*/)?pwconv1/bias": ("model",),
    r"(.*/)?grn/(gamma|beta)": ("model",),
    r"(.*/)?pwconv2/kernel": ("model", None),
}

# Variable that has the number of processes -> whether `jax.distributed.initialize` finds the rest itself.
_COUNTS = {
    "KERAS_DISTRIBUTION_NUM_PROCESSES": False,
    "JAX_NUM_PROCESSES": False,
    "SLURM_STEP_NUM_TASKS": True,
    "OMPI_COMM_WORLD_SIZE": True,
}


def join() -> watchdog.Group:
    """Joins the processes that the environment names; before anything is computed."""
    settings = _settings()
    if settings is not None or "xla_force_host_platform_device_count" in os.environ.get("XLA_FLAGS", ""):
        # Devices of one CPU share its threads: two programs at once could wait for each other for ever.
        jax.config.update("jax_cpu_enable_async_dispatch", False)
    if settings is None:
        return watchdog.alone()
    if not jax.distributed.is_initialized():
        jax.distributed.initialize(
            **settings,
            initialization_timeout=int(watchdog.JOIN_SECONDS),
            # A process that fails does not wait for the others, which the group ends.
            shutdown_timeout_seconds=10,
        )
    return watchdog.join(jax.process_index(), jax.process_count(), _tell)


def _settings() -> dict[str, Any] | None:
    """Arguments of `jax.distributed.initialize`, which finds what is left out; None for one process."""
    environment = os.environ
    if environment.get("KERAS_CONVNEXT_PROCESSES") == "auto":
        return {}  # Cloud TPU, Kubernetes: no variable has the count
    name = next((name for name in _COUNTS if environment.get(name) and integer(name) > 1), None)
    if name is None:
        return None
    if _COUNTS[name]:
        gpus = environment.get("SLURM_GPUS_ON_NODE", "")
        tasks = environment.get("SLURM_STEP_TASKS_PER_NODE", "")
        # JAX would give the only process of a node one GPU.
        is_only = gpus.isdecimal() and re.fullmatch(r"1(\(x\d+\))?", tasks)
        return {"local_device_ids": list(range(int(gpus)))} if is_only else {}
    prefix = name.removesuffix("NUM_PROCESSES")
    address = prefix + ("COORDINATOR_ADDRESS" if prefix == "JAX_" else "JOB_ADDRESSES")
    if missing := [key for key in (address, f"{prefix}PROCESS_ID") if not environment.get(key)]:
        raise ValueError(
            f"Expected {address} (host:port of process 0) and {prefix}PROCESS_ID beside {name}="
            f"{environment[name]}, received no {' and no '.join(missing)}. Set them for each process."
        )
    return {
        "coordinator_address": environment[address].split(",")[0],
        "num_processes": integer(name),
        "process_id": integer(f"{prefix}PROCESS_ID"),
    }


def _tell(text: str) -> str:
    from jax.experimental import multihost_utils

    padded = np.frombuffer(text.encode().ljust(480), np.uint8).astype(np.int32)
    return bytes(np.asarray(multihost_utils.broadcast_one_to_all(padded)).astype(np.uint8)).decode().rstrip()


def devices() -> tuple[str, ...]:
    return tuple(keras.distribution.list_devices())


def data_parallel(group: watchdog.Group) -> Engine:
    names = devices()
    strategy = keras.distribution.DataParallel(devices=list(names), auto_shard_dataset=False)
    return JaxEngine("data_parallel", names, len(names), strategy, group)


def model_parallel(group: watchdog.Group, model_devices: int) -> Engine:
    names = devices()
    own = len(names) // len(group)
    if model_devices > own or own % model_devices:
        divisors = ", ".join(str(n) for n in range(1, own + 1) if own % n == 0)
        whose = "devices" if len(group) == 1 else "devices of a process"
        raise ValueError(
            f"Expected distribution.model_devices to divide the {own} {whose}, received {model_devices}. "
            f"Choose one of {divisors}."
        )
    num_parts = len(names) // model_devices
    mesh = keras.distribution.DeviceMesh((num_parts, model_devices), ["batch", "model"], list(names))
    layout = keras.distribution.LayoutMap(mesh)
    layout.update(POINTWISE_LAYOUT)
    strategy = keras.distribution.ModelParallel(
        layout_map=layout, batch_dim_name="batch", auto_shard_dataset=False
    )
    return JaxEngine("model_parallel", names, num_parts, strategy, group)


@dataclasses.dataclass(frozen=True)
class JaxEngine(Engine):
    """An engine whose arrays may be on devices of other processes too."""

    @contextlib.contextmanager
    def whole(self, model: Any) -> Iterator[None]:
        if len(self.group) == 1:
            yield
            return
        placed = [(variable, variable.value) for variable in model.variables]
        try:
            for variable, value in placed:
                variable._value = jax.numpy.asarray(_local(value))  # not `assign`, which divides it again
            yield
        finally:
            for variable, value in placed:
                variable._value = value

    def read(self, variable: Any) -> np.ndarray:
        return _local(variable.value)


def divided(images: np.ndarray) -> Any:
    """`choose.divided`. In a run of one process, where n rows cannot be divided, every device gets all."""
    strategy = keras.distribution.distribution()
    if strategy is None or len(images) * jax.process_count() % strategy.num_model_replicas:
        return images
    layout = strategy.get_data_layout(images.shape).backend_layout
    return jax.make_array_from_process_local_data(layout, images)


def rows(array: Any) -> np.ndarray:
    """Returns this process's rows of an array divided along its first axis; a single process has all."""
    if not isinstance(array, jax.Array) or array.is_fully_addressable:
        return np.asarray(array)
    parts = {shard.index[0].start or 0: shard.data for shard in array.addressable_shards}
    return np.concatenate([np.asarray(parts[start]) for start in sorted(parts)])


def by_rows() -> Any:
    """Returns the sharding of outputs that `rows` can read; None where there is no choice to make."""
    strategy = keras.distribution.distribution()
    if strategy is None or jax.process_count() == 1:
        return None
    return strategy.get_data_layout((1,)).backend_layout


def _local(array: Any) -> np.ndarray:
    """Reads all of an array, of which every process has all parts."""
    if not isinstance(array, jax.Array) or array.is_fully_addressable or array.is_fully_replicated:
        return np.asarray(array)
    whole = np.empty(array.shape, array.dtype)
    for shard in array.addressable_shards:
        whole[shard.index] = np.asarray(shard.data)
    return whole
