"""Engines of TensorFlow: its strategies for the devices of a machine, for many processes and for a TPU.

Each replica, a device with a part of the batch, has all weights, sums its gradients with the others at once,
and updates its own copy. Keras sums later, which allows no accumulation and no common clipping.
"""

import contextlib
import dataclasses
import json
import os
import re
import socket
import time
import weakref
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from keras_convnext.distribution import watchdog
from keras_convnext.distribution.engine import Engine
from keras_convnext.layers import residual

LOGICAL_DEVICES = "KERAS_CONVNEXT_LOGICAL_DEVICES"
_WORKERS = "multi_worker_mirrored"
_EXAMPLE = '{"cluster": {"worker": ["host0:2222", "host1:2222"]}, "task": {"type": "worker", "index": 0}}'

# By engine. A process makes each once: of a second one the sums would meet those of the first.
_strategies: dict[str, Any] = {}
_groups: list[watchdog.Group] = []  # the last one of the processes of TF_CONFIG, if any
_forwards: weakref.WeakKeyDictionary = weakref.WeakKeyDictionary()


def join() -> watchdog.Group:
    """Joins the processes that TF_CONFIG names; before anything is computed."""
    _divide_cpu()
    place = _place()
    if place is None:
        return watchdog.alone()
    process, addresses = place

    def tell(text: str) -> str:  # from the first training on TensorFlow's service has the address
        return _groups[-1].gathered(text)[0] if _groups else _tell(process, addresses, text)

    group = watchdog.join(process, len(addresses), tell)
    try:
        if _WORKERS not in _strategies:
            _strategies[_WORKERS] = tf.distribute.MultiWorkerMirroredStrategy()
    except (RuntimeError, tf.errors.OpError) as error:
        message = (
            "Expected to start TensorFlow's service for the processes of TF_CONFIG, before anything is "
            f"computed, but {_first_sentence(error)}. Call train, or distribution.choose.choose, first, "
            "and give each process an address of its own."
        )
        group.close(message)
        raise ValueError(message) from error
    _groups[:] = [group]
    return group


def _divide_cpu() -> None:
    """Makes several devices of the CPU where the environment asks for it: for tests and trials."""
    text = os.environ.get(LOGICAL_DEVICES, "")
    if not text:
        return
    if not text.isdecimal() or int(text) < 1:
        raise ValueError(f"Expected {LOGICAL_DEVICES} to be a number from 1 up, received {text!r}.")
    cpu = tf.config.list_physical_devices("CPU")[0]
    if len(tf.config.get_logical_device_configuration(cpu) or [None]) == int(text):
        return
    try:
        tf.config.set_logical_device_configuration(cpu, [tf.config.LogicalDeviceConfiguration()] * int(text))
    except RuntimeError as error:
        raise ValueError(
            f"Expected {LOGICAL_DEVICES}={text} before TensorFlow computes anything, but {error}. Call "
            "train, or distribution.choose.choose, first."
        ) from error


def _place() -> tuple[int, list[str]] | None:
    """Returns the rank of this process and the addresses of all, by TF_CONFIG; None for a single process."""
    text = os.environ.get("TF_CONFIG", "")
    if not text:
        return None
    try:
        config = json.loads(text)
        cluster = {kind: list(addresses) for kind, addresses in config.get("cluster", {}).items()}
        task = config.get("task", {})
        kind, index = task.get("type"), int(task.get("index", -1))
    except (AttributeError, TypeError, ValueError) as error:
        raise ValueError(
            f"Expected TF_CONFIG to be JSON such as {_EXAMPLE}, received {text!r}: {error}."
        ) from error
    # TensorFlow's order, in which the first one leads.
    addresses = [address for name in ("chief", "worker") for address in cluster.get(name, [])]
    others = sorted(cluster.keys() - {"chief", "worker"})
    if len(addresses) < 2 and not others:
        return None
    is_reachable = all(re.fullmatch(r".+:\d+", address) for address in addresses)
    if others or not is_reachable or kind not in cluster or not 0 <= index < len(cluster[kind]):
        raise ValueError(
            "Expected TF_CONFIG to name a cluster of workers, with a chief or without, each as host:port, "
            f"and one of them as the task, received task {kind} {index} of {json.dumps(cluster)}. Give each "
            "process its own type and index, from 0 on."
        )
    return index + (len(cluster.get("chief", [])) if kind == "worker" else 0), addresses


def _tell(process: int, addresses: Sequence[str], text: str) -> str:
    """Carries process 0's text to all, where TensorFlow's service, which waits for an hour, will be next."""
    host, _, port = addresses[0].rpartition(":")
    deadline = time.monotonic() + watchdog.JOIN_SECONDS
    if process == 0:
        _serve(int(port), text, set(range(1, len(addresses))), deadline)
        return text
    while time.monotonic() < deadline:
        with contextlib.suppress(OSError), socket.create_connection((host, int(port)), timeout=5) as call:
            call.sendall(f"{process}\n".encode())
            if answer := call.makefile().readline():
                return answer.rstrip("\n")
        time.sleep(0.2)
    raise ConnectionError(
        f"Expected process 0 of TF_CONFIG at {addresses[0]} within {watchdog.JOIN_SECONDS:.0f} s, but it "
        f"does not answer process {process}. See what it prints, and allow connections to its address."
    )


def _serve(port: int, text: str, missing: set[int], deadline: float) -> None:
    """Gives a text to each process that tells its rank."""
    try:
        server = socket.create_server(("", port))
    except OSError as error:
        raise ConnectionError(
            f"Expected port {port} to be free, which TF_CONFIG gives this process, but {error.strerror}. End "
            "what has it, or choose another one."
        ) from error
    with server:
        while missing:
            server.settimeout(max(deadline - time.monotonic(), 0.01))
            try:
                call, _ = server.accept()
            except TimeoutError:
                names = ", ".join(map(str, sorted(missing)))
                raise ConnectionError(
                    f"Expected {len(missing)} more processes of TF_CONFIG within "
                    f"{watchdog.JOIN_SECONDS:.0f} s, but {names} did not come. "
                    f"See what they print, and allow connections to port {port} of this machine."
                ) from None
            with contextlib.suppress(OSError, ValueError), call:
                call.settimeout(5)
                number = int(call.recv(20))  # not a line, which a stranger may never end
                if number in missing:
                    call.sendall(f"{text}\n".encode())
                    missing.discard(number)


def devices() -> tuple[str, ...]:
    """Lists the GPUs, else the CPUs, of all processes."""
    kind = "GPU" if tf.config.list_logical_devices("GPU") else "CPU"
    count = len(tf.config.list_logical_devices(kind))
    if _WORKERS in _strategies:
        count = _strategies[_WORKERS].num_replicas_in_sync
    return tuple(f"{kind.lower()}:{number}" for number in range(count))


def automatic() -> str:
    """Returns the engine of "auto": by the processes and devices that are there."""
    if _WORKERS in _strategies:
        return _WORKERS
    if os.environ.get("TPU_NAME") or tf.config.list_physical_devices("TPU"):
        return "tpu"
    return "mirrored" if len(devices()) > 1 else "none"


def mirrored(group: watchdog.Group) -> Engine:
    if len(group) > 1:
        raise ValueError(
            f"Expected one process, as engine 'mirrored' needs, but TF_CONFIG names {len(group)}, of which "
            "each would train a model of its own. Choose 'multi_worker_mirrored'."
        )
    names = devices()
    if "mirrored" not in _strategies:
        _strategies["mirrored"] = tf.distribute.MirroredStrategy([name.upper() for name in names])
    return TensorFlowEngine("mirrored", names, len(names), _strategies["mirrored"], group)


def multi_worker_mirrored(group: watchdog.Group) -> Engine:
    if len(group) == 1:
        raise ValueError(
            "Expected several processes, as engine 'multi_worker_mirrored' needs, but TF_CONFIG names none: "
            f"set it for each process, {_EXAMPLE}. Or choose 'mirrored', of one process."
        )
    names = devices()
    return TensorFlowEngine(_WORKERS, names, len(names), _strategies[_WORKERS], group)


def tpu(group: watchdog.Group) -> Engine:
    """Makes the engine of the TPU that TPU_NAME names, by default the machine's own."""
    name = os.environ.get("TPU_NAME") or "local"
    try:
        strategy = _tpu_strategy(tf.distribute.cluster_resolver.TPUClusterResolver(name))
    except (tf.errors.OpError, ValueError, RuntimeError, OSError) as error:
        raise ValueError(
            f"Expected a TPU named {name!r}, as engine 'tpu' needs, but {_first_sentence(error)}. Run on a "
            "Cloud TPU machine, or set TPU_NAME to the name of one."
        ) from error
    hosts = getattr(strategy.extended, "num_hosts", 1)
    if hosts > 1:
        raise ValueError(
            f"Expected a TPU of one host, received {name!r} with {hosts}. On a pod choose "
            "KERAS_BACKEND=jax, where each host reads its own images."
        )
    names = tuple(f"tpu:{number}" for number in range(strategy.num_replicas_in_sync))
    return TensorFlowEngine("tpu", names, len(names), strategy, group)


def _tpu_strategy(resolver: Any) -> Any:
    if "tpu" not in _strategies:
        tf.config.experimental_connect_to_cluster(resolver)
        tf.tpu.experimental.initialize_tpu_system(resolver)
        _strategies["tpu"] = tf.distribute.TPUStrategy(resolver)
    return _strategies["tpu"]


def _first_sentence(error: BaseException) -> str:
    lines = (str(error) or type(error).__name__).strip().splitlines()
    return lines[0].partition(". ")[0].rstrip(".")


@dataclasses.dataclass(frozen=True)
class TensorFlowEngine(Engine):
    """An engine whose `strategy` is one of tf.distribute."""

    @contextlib.contextmanager
    def scope(self) -> Iterator[None]:
        with residual.divided_batch(_part), self.strategy.scope():
            yield

    def prepare(self, model: Any, batch: Any = None) -> None:
        optimizer = model.optimizer
        if hasattr(optimizer, "inner_optimizer"):  # what Keras puts around it for float16
            optimizer.check_finite = _everywhere(optimizer.check_finite)
            optimizer = optimizer.inner_optimizer
        optimizer.across = _summed
        # Keras would look at a batch for it, by a mean over devices that fails for many processes.
        if batch is None:
            shapes = (2, *(size or 64 for size in model.input_shape[1:])), (2, model.output_shape[-1])
            batch = tuple(keras.KerasTensor(shape, "float32") for shape in shapes)
        model._symbolic_build(data_batch=batch)
        model._maybe_symbolic_build = lambda iterator=None, data_batch=None: None
        step = _train_step(model, self.strategy)
        model.train_function = lambda iterator: step(next(iterator))

    def for_fit(self, batches: Any) -> Any:
        own = self.num_parts // len(self.group)
        rows = tf.nest.flatten(batches.element_spec)[0].shape[0]
        parts = batches if own == 1 else batches.rebatch(rows // own, drop_remainder=True)
        return self.strategy.distribute_datasets_from_function(lambda context: parts)


def _part() -> tuple[int, Any]:
    """Returns the number of parts of a batch, and which one this replica has."""
    context = tf.distribute.get_replica_context()
    if context is None:  # outside of the replicas, where there are whole batches
        return 1, 0
    return context.num_replicas_in_sync, context.replica_id_in_sync_group


def _summed(gradients: list[Any]) -> list[Any]:
    """Sums gradients over the replicas; Keras has divided the losses by their number."""
    return tf.distribute.get_replica_context().all_reduce(tf.distribute.ReduceOp.SUM, gradients)


def _everywhere(check: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """Makes a check that fails where any replica fails it; Keras asks the first one only."""

    def passed(gradients: Any) -> Any:
        context = tf.distribute.get_replica_context()
        failures = context.all_reduce(tf.distribute.ReduceOp.SUM, 1.0 - tf.cast(check(gradients), tf.float32))
        return tf.equal(failures, 0.0)

    return passed


def _train_step(model: Any, strategy: Any) -> Callable[[Any], dict[str, Any]]:
    """Makes a step of all replicas that returns their mean logs; Keras's own fails for many processes."""

    def replica(batch: Any) -> dict[str, Any]:
        logs = model.train_step(batch)
        means = tf.distribute.get_replica_context().all_reduce(
            tf.distribute.ReduceOp.MEAN, tf.stack([tf.cast(value, tf.float32) for value in logs.values()])
        )
        return dict(zip(logs, tf.unstack(means), strict=True))

    @tf.function(autograph=False, reduce_retracing=True)
    def step(batch: Any) -> dict[str, Any]:
        logs = strategy.run(replica, args=(batch,))
        return {name: strategy.experimental_local_results(value)[0] for name, value in logs.items()}

    return step


def divided(images: np.ndarray) -> Any:
    """`choose.divided`, for the function that `forward` returns."""
    if not tf.distribute.has_strategy():
        return images
    strategy = tf.distribute.get_strategy()
    parts = np.array_split(images, len(strategy.extended.worker_devices))
    return strategy.experimental_distribute_values_from_function(
        lambda context: tf.convert_to_tensor(parts[context.replica_id_in_sync_group % len(parts)])
    )


def rows(outputs: Any) -> np.ndarray:
    """Returns this process's rows of what a function of `forward` made."""
    if not tf.distribute.has_strategy():
        return np.asarray(outputs)
    parts = tf.distribute.get_strategy().experimental_local_results(outputs)
    return np.concatenate([part.numpy() for part in parts])


def forward(model: Any) -> Callable[[Any], Any] | None:
    """Returns the function from `divided` images to a model's outputs; None outside the scope of an engine.

    That of Keras would gather the rows of all processes, in another order.
    """
    if not tf.distribute.has_strategy():
        return None
    if model not in _forwards:
        strategy = tf.distribute.get_strategy()
        reference: Any = weakref.ref(model)  # the table must not keep the model

        @tf.function(autograph=False, reduce_retracing=True)
        def step(images: Any) -> Any:
            return strategy.run(lambda part: reference()(part, training=False), args=(images,))

        _forwards[model] = step
    return _forwards[model]
