"""The engine of PyTorch: DistributedDataParallel, with a process for each device, as torchrun starts them."""

import contextlib
import dataclasses
import datetime
import os
import socket
from typing import Any

import torch
import torch.distributed as dist

from keras_convnext._environment import integer
from keras_convnext.distribution import watchdog
from keras_convnext.distribution.engine import Engine
from keras_convnext.layers import residual

_ADDRESS = ("MASTER_ADDR", "MASTER_PORT")  # of process 0, for torch's own store


def join() -> watchdog.Group:
    """Joins the processes that the environment names; before anything is computed."""
    is_first = not dist.is_initialized()
    if is_first:
        rank, world_size = _place()
        if world_size == 1:
            return watchdog.alone()
        if _is_on_gpu():
            _take_own_gpu()
        _meet(rank, world_size)
    group = watchdog.join(dist.get_rank(), dist.get_world_size(), _tell)
    if is_first and "OMP_NUM_THREADS" not in os.environ:  # torchrun sets it to 1
        hosts = group.gathered(socket.gethostname())
        torch.set_num_threads(max(1, torch.get_num_threads() // hosts.count(socket.gethostname())))
    return group


def _place() -> tuple[int, int]:
    """Returns the rank of this process, and the number of all."""
    count = integer("WORLD_SIZE") if os.environ.get("WORLD_SIZE") else 1
    if count == 1:
        return 0, 1
    names = ("RANK", *_ADDRESS, *(["LOCAL_RANK"] if _is_on_gpu() else []))
    if missing := [name for name in names if not os.environ.get(name)]:
        raise ValueError(
            f"Expected {', '.join(names)} beside WORLD_SIZE={count}, received no {' and no '.join(missing)}. "
            "Start the processes with torchrun, which sets them."
        )
    number = integer("RANK")
    if not 0 <= number < count:
        raise ValueError(
            f"Expected RANK, the number of this process, from 0 to {count - 1} as WORLD_SIZE={count}, "
            f"received {number}."
        )
    return number, count


def _is_on_gpu() -> bool:
    return torch.cuda.is_available() and os.environ.get("KERAS_TORCH_DEVICE", "cuda").startswith("cuda")


def _take_own_gpu() -> None:
    """Makes Keras's device, "cuda", one of this process's own."""
    number, count = integer("LOCAL_RANK"), torch.cuda.device_count()
    if number >= count:
        raise ValueError(
            f"Expected a GPU for each process of a machine, received LOCAL_RANK={number} on one that has "
            f"{count}. Start {count} there: torchrun --nproc-per-node {count}."
        )
    torch.cuda.set_device(number)


def _meet(rank: int, world_size: int) -> None:
    try:
        seconds = datetime.timedelta(seconds=watchdog.JOIN_SECONDS)
        store, _, _ = next(dist.rendezvous("env://", timeout=seconds))
        # Without a timeout of its own: process 0 may write a checkpoint for minutes while the others wait.
        dist.init_process_group(
            "cpu:gloo,cuda:nccl" if _is_on_gpu() else "gloo", store=store, rank=rank, world_size=world_size
        )
    except dist.DistError as error:
        address = ":".join(os.environ[name] for name in _ADDRESS)
        reason = str(error).splitlines()[0].rstrip(".")
        raise ConnectionError(
            f"Expected {world_size} processes to meet at {address} ({':'.join(_ADDRESS)}) within "
            f"{watchdog.JOIN_SECONDS:.0f} s, but: {reason}. See what the others print, and allow "
            "connections between the machines on all ports."
        ) from None


def _tell(text: str) -> str:
    told = [text]
    dist.broadcast_object_list(told, src=0, device=torch.device("cpu"))
    return told[0]


def devices() -> tuple[str, ...]:
    kind = "cuda" if _is_on_gpu() else "cpu"
    count = dist.get_world_size() if dist.is_initialized() else 1
    return tuple(f"{kind}:{number}" for number in range(count))


def ddp(group: watchdog.Group) -> Engine:
    return TorchEngine("ddp", devices(), len(group), None, group)


@dataclasses.dataclass(frozen=True)
class TorchEngine(Engine):
    """An engine of processes that have all weights, and equal parts of each batch."""

    def scope(self) -> contextlib.AbstractContextManager[Any]:
        return residual.divided_batch(lambda: (self.num_parts, self.group.rank))

    def prepare(self, model: Any, batch: Any = None) -> None:
        if self.num_parts > 1:
            _Replica(model)


class _Replica:
    """The training step of a model in one process of many; takes the place of the model's own.

    `DistributedDataParallel` averages the gradients in the backward pass, before the optimizer accumulates,
    unscales or clips them. The sums of loss and metrics are averaged too: `fit` reports the whole batch.
    """

    def __init__(self, model: Any) -> None:
        self.model = model
        self.own_step, self.own_forward = model.train_step, model.forward
        self.parallel: Any = None
        self.is_in_step = False
        model.train_step, model.forward = self.train_step, self.forward

    def train_step(self, data: Any) -> dict[str, Any]:
        if self.parallel is None:  # not before: it compares shapes, and its message does not help
            self.parallel = torch.nn.parallel.DistributedDataParallel(
                _Pass(self.own_forward, self.model.trainable_variables), gradient_as_bucket_view=True
            )
        self.is_in_step = True
        try:
            logs = self.own_step(data)
        finally:
            self.is_in_step = False
        _average(self.model.metrics_variables)
        return {**logs, **self.model.get_metrics_result()}

    def forward(self, *arguments: Any, **named: Any) -> Any:
        return (self.parallel if self.is_in_step else self.own_forward)(*arguments, **named)


class _Pass(torch.nn.Module):
    """The forward pass of a model, as a module of the weights that it trains."""

    def __init__(self, forward: Any, variables: Any) -> None:
        super().__init__()
        self.weights = torch.nn.ParameterList(variable.value for variable in variables)
        self.of_model = forward

    def forward(self, *arguments: Any, **named: Any) -> Any:
        return self.of_model(*arguments, **named)


@torch.no_grad()
def _average(variables: Any) -> None:
    """Gives the variables their mean over the processes."""
    values = [variable.value for variable in variables]
    flat = torch.cat([value.reshape(-1) for value in values])
    dist.all_reduce(flat)
    flat /= dist.get_world_size()
    for value, mean in zip(values, flat.split([value.numel() for value in values]), strict=True):
        value.copy_(mean.reshape(value.shape))
