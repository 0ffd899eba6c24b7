"""Chooses the engine that places model, optimizer and batches on the devices that are there.

The batch of a recipe is the one of all devices together, so its learning rate, its schedule and its random
numbers hold for any number of them.
"""

import importlib
from collections.abc import Mapping
from typing import Any

import keras
import numpy as np

from keras_convnext._messages import differences, near_names
from keras_convnext.distribution import ENGINES, watchdog
from keras_convnext.distribution.engine import Engine


def choose(engine: str = "auto", model_devices: int = 2) -> Engine:
    """Joins the processes of a run, if it has several, and chooses how its devices share a step.

    - "none": one device, the backend's first.
    - "data_parallel" (JAX): a part of each batch to each device, weights on all, gradients summed.
    - "model_parallel" (JAX): the same with groups of `model_devices` in place of devices. A group divides
      the pointwise kernels and what belongs to them, see `jax_engine.POINTWISE_LAYOUT`.
    - "mirrored", "multi_worker_mirrored" and "tpu" (TensorFlow): as "data_parallel", for the devices of one
      process, those of the processes that TF_CONFIG names, and the cores of a TPU of one host.
    - "ddp" (PyTorch): as "data_parallel" for processes of one device each, their own GPU or the CPU.
    - "auto": the first of the backend's where there are several devices, else "none"; on TensorFlow
      "multi_worker_mirrored" where TF_CONFIG names processes, "tpu" where there is one.

    The processes are found in the environment, as the backend's own launchers set it. Nothing may have been
    computed before.

    Raises:
        ValueError: the engine is unknown or another backend's, the devices cannot be divided so, or the
            environment names some of what describes the processes.
        ConnectionError: the processes do not find each other.

    Example:
        engine = choose("data_parallel")
        with engine.scope():
            model = keras_convnext.ConvNeXtTiny(weights=None)
    """
    backend = keras.backend.backend()
    own = ENGINES.get(backend, ())
    known = ("auto", "none", *own)
    if engine not in known:
        hint = f".{near_names(engine, known) or ' Choose one of these.'}"
        for name, engines in ENGINES.items():
            if engine in engines:
                hint = f", which is an engine of {name}. Choose one of these, or set KERAS_BACKEND={name}."
        raise ValueError(
            f"Expected an engine of the {backend} backend, {', '.join(known)}, received {engine!r}{hint}"
        )
    if not own:
        return Engine("none", (backend,))
    module = _module()
    group = module.join()
    devices = module.devices()
    if engine == "auto":
        usual = own[0] if len(devices) > 1 else "none"
        engine = getattr(module, "automatic", lambda: usual)()
    if engine == "none":
        if len(group) > 1:
            group.close()
            raise ValueError(
                f"Expected an engine for {len(group)} processes, {' or '.join(own)}, received 'none', with "
                "which each would train a model of its own."
            )
        return Engine("none", devices[:1])
    try:
        if engine == "model_parallel":
            return module.model_parallel(group, model_devices)
        return getattr(module, engine)(group)
    except ValueError:
        group.close()  # all processes raise the same
        raise


def divided(images: np.ndarray) -> Any:
    """Places this process's rows of a batch, (n, ...), on the devices of this scope's engine, if any."""
    return _module().divided(images) if keras.backend.backend() in ("jax", "tensorflow") else images


def rows(outputs: Any) -> np.ndarray:
    """Returns this process's rows of what a compiled function made of `divided` images, float32."""
    if keras.backend.backend() in ("jax", "tensorflow"):
        return np.asarray(_module().rows(outputs), "float32")
    return np.asarray(keras.ops.convert_to_numpy(outputs), "float32")


def by_rows() -> Any:
    """Returns the sharding that a compiled function of JAX must give its outputs for `rows`; None for any."""
    return _module().by_rows()


def forward(model: Any) -> Any:
    """Returns TensorFlow's function from `divided` images to outputs for `rows`; None without an engine."""
    return _module().forward(model)


def _module() -> Any:
    return importlib.import_module(f"keras_convnext.distribution.{keras.backend.backend()}_engine")


def check_agreement(group: watchdog.Group, facts: Mapping[str, Any]) -> None:
    """Raises a ValueError in all processes when they differ in their facts, JSON values by name."""
    expected, *others = group.gathered(dict(facts))
    lines = []
    for name, received in zip(group.names[1:], others, strict=True):
        texts = [f"{key} {theirs!r}, not {ours!r}" for key, ours, theirs in differences(expected, received)]
        if texts:
            more = f" and {len(texts) - 8} more" if len(texts) > 8 else ""
            lines.append(f"{name} has {'; '.join(texts[:8])}{more}")
    if lines:
        group.close()
        raise ValueError(
            f"Expected the same run in all {len(group)} processes, but {'. '.join(lines)}. Give all the same "
            "command, code and data."
        )
