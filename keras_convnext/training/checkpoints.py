"""How far a run is, and the checkpoints that hold it together with the arrays of its step."""

import dataclasses
import logging
import time
from collections.abc import Mapping
from typing import Any

import keras
import numpy as np

from keras_convnext import _environment
from keras_convnext.distribution.engine import Engine
from keras_convnext.evaluation import result_columns
from keras_convnext.training import run_folder
from keras_convnext.training.run_state import BEST_FILE, Plan, non_finite_names, state_variables

_logger = logging.getLogger("keras_convnext")


@dataclasses.dataclass
class Counts:
    """How far a run is."""

    plan: Plan
    done: int = 0  # micro-batches
    # Sums of loss and metrics: over the part of the epoch before an interruption, and over all of it so far.
    carried: dict[str, float] = dataclasses.field(default_factory=dict)
    sums: dict[str, float] = dataclasses.field(default_factory=dict)
    best: dict[str, float] = dataclasses.field(default_factory=dict)  # score by its name, and "epoch"
    epochs_logged: int = 0  # whose end is done too

    @property
    def step(self) -> int:
        """Optimizer steps that are done."""
        return self.done // self.plan.accumulation_steps

    @property
    def epoch(self) -> int:
        """Epochs that are done, with all of their micro-batches."""
        return self.done // self.plan.micro_batches_per_epoch

    @property
    def best_step(self) -> int | None:
        """The step of the best epoch."""
        return int(self.best["epoch"]) * self.plan.steps_per_epoch if self.best else None

    def add(self, in_fit: int, means: Mapping[str, float]) -> None:
        """Counts a micro-batch; `means` are over the `in_fit` micro-batches of this call of `fit`."""
        count = in_fit if self.carried else self.done % self.plan.micro_batches_per_epoch + 1
        self.done += 1
        self.sums = {name: self.carried.get(name, 0.0) + count * value for name, value in means.items()}

    def end_epoch(self) -> None:
        self.epochs_logged = self.epoch
        self.carried, self.sums = {}, {}


class Checkpoints:
    """Writes and reads the checkpoints of a run; `student` is the part of the model that is kept."""

    def __init__(
        self, folder: run_folder.RunFolder | None, engine: Engine, model: Any, student: Any, counts: Counts
    ) -> None:
        self.folder, self.engine, self.model, self.counts = folder, engine, model, counts
        self.variables = state_variables(model, student)
        self.machines = [_machine()] if folder else []  # that the run was on, this one last; of the writer
        self._metrics: list[Any] = []  # of the part of an epoch before an interruption
        self.saved = -1  # micro-batches that the last checkpoint is of
        self.saved_at = time.monotonic()

    def arrays(self) -> dict[str, np.ndarray]:
        if hasattr(self.model, "jax_state_sync"):  # within an epoch JAX keeps the values outside
            self.model.jax_state_sync()
        return {name: self.engine.read(variable) for name, variable in self.variables.items()}

    def save(self) -> list[str]:
        """Writes a checkpoint, unless an array is not finite: returns the names of those."""
        if self.folder is None:
            return []
        arrays, counts = self.arrays(), self.counts
        if broken := non_finite_names(arrays):
            return broken
        state = {
            "micro_batches": counts.done,
            "step": counts.step,
            "epochs_logged": counts.epochs_logged,
            "sums": counts.sums,
            "metrics": [self.engine.read(v).tolist() for v in self._metrics_variables()],
            "best": counts.best,
            "best_step": counts.best_step,
            "backend": keras.backend.backend(),
            "machines": self.machines,
        }
        self.folder.save(arrays, state)
        self._write_best()
        self.saved, self.saved_at = counts.done, time.monotonic()
        return []

    def restore(self) -> bool:
        """Takes up the newest checkpoint, in all processes; returns whether there is one.

        ValueError: it is of another model or optimizer. RunFolderError: there are some, and all are damaged.
        """
        arrays, state = (self.folder and self.folder.latest()) or ({}, None)
        state = self.engine.group.gathered(state)[0]
        arrays = self.engine.group.shared_arrays(arrays)
        if state is None:
            return False
        expected = {
            name: (tuple(v.shape), keras.backend.standardize_dtype(v.dtype))
            for name, v in self.variables.items()
        }
        machine = self.machines[-1:]
        before = state.get("machines", machine)
        if state["backend"] != keras.backend.backend():
            _logger.warning(
                "The run was begun on %s and resumes on %s: it will not end with the same digits.",
                state["backend"],
                keras.backend.backend(),
            )
            for name, (_, dtype) in expected.items():  # counters and random states have other integers there
                if "int" in dtype and name in arrays and np.issubdtype(arrays[name].dtype, np.integer):
                    arrays[name] = arrays[name].astype(dtype)
        elif self.folder and before[-1] != machine[0]:
            _logger.warning(
                "The run was on %s and resumes on %s: its last bits may differ from those of an "
                "uninterrupted run.",
                " and on ".join(before),
                machine[0],
            )
        self.machines = [each for each in before if each not in machine] + machine
        run_folder.check_arrays(arrays, expected, f"the checkpoint of step {state['step']}")
        for name, variable in self.variables.items():
            variable.assign(arrays[name])
        counts = self.counts
        counts.done = self.saved = state["micro_batches"]
        counts.carried, counts.sums = state["sums"], dict(state["sums"])
        counts.best, counts.epochs_logged = state["best"], state["epochs_logged"]
        if counts.done % counts.plan.micro_batches_per_epoch:
            self._metrics = state.get("metrics", [])
        self._write_best()  # a kill may have come before it, or a person removed the file
        if self.folder:
            self.folder.remove_old(state | {"best_step": counts.best_step})
        return True

    def _write_best(self) -> None:
        if self.folder and self.counts.best:
            value = next(value for name, value in self.counts.best.items() if name != "epoch")
            self.folder.write_json(BEST_FILE, {"step": self.counts.best_step, "value": float(value)})

    def _metrics_variables(self) -> list[Any]:
        """Returns what the means are made of; nothing where each device has its own."""
        is_alone = self.engine.strategy is None and len(self.engine.group) == 1
        return self.model.metrics_variables if is_alone else []

    def restore_metrics(self) -> bool:
        """Lets the means of an interrupted epoch, which `fit` has reset, go on; returns whether it did so."""
        variables, metrics = self._metrics_variables(), self._metrics
        if not metrics or len(metrics) != len(variables):
            return False
        self.counts.carried, self._metrics = {}, []
        for variable, value in zip(variables, metrics, strict=True):
            variable.assign_add(value)  # TensorFlow makes it in the first batch: it holds a sum
        return True

    def advice(self) -> str:
        """What is printed when another process of the run is lost."""
        step = self.saved // self.counts.plan.accumulation_steps
        stands = f"the checkpoint of step {step}" if self.saved > 0 else "the beginning"
        stands = f"{stands} in {self.folder.path}" if self.folder else "the last checkpoint"
        return f"This process ends too. The same command on all machines resumes from {stands}."


def _machine() -> str:
    """Returns what the last bits of a step depend on: processor and its limits, accelerators, versions."""
    facts = result_columns.versions()
    names = ("keras", "backend", "backend_version", "accelerators")
    found = (_environment.processor_text(), _environment.__version__, *(facts[name] for name in names))
    return ", ".join(filter(None, found))
