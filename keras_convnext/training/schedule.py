"""The learning rate schedules of the papers: linear warmup, then a half cosine, or a straight line."""

import math
import numbers

import keras
from keras import ops

from keras_convnext.training.optimizer import check_numbers


@keras.saving.register_keras_serializable(package="keras_convnext")
class WarmupCosine(keras.optimizers.schedules.LearningRateSchedule):
    """A learning rate that rises in a straight line and falls along half a cosine, step by step.

    After the warmup the rate is `end + (peak - end) * (1 + cos(pi * i / n)) / 2`, where i counts the steps
    after the warmup and n is their number; from `total_steps` on it stays at `end`. The right digits survive
    float32 up to 2^24 steps, because i and n are integers and `1 + cos` is taken as a squared sine.
    Reference: Liu et al. 2022, table 5; V1's `cosine_scheduler`, V2's `adjust_learning_rate`.

    Args:
        peak: float, the highest rate. 4e-3 at a batch of 4096 in the paper.
        total_steps: int, optimizer steps of the whole training, warmup included.
        warmup_steps: int, steps of the warmup. Default 0.
        start: float, rate of step 0 when there is a warmup. Default 0.
        end: float, rate at `total_steps`. Default 1e-6, as in the official code.
        warmup_includes_peak: bool. True: the last step of the warmup has the peak, as in V1. False: the first
            step after it, as in V2.
        hold_steps: int, steps for which one rate holds: 1, or the steps of an epoch, as torchvision trains.

    Call arguments:
        step: int or integer tensor, number of optimizer steps taken so far.

    Returns:
        float32 scalar, the rate.

    Raises:
        TypeError: a number of steps is no integer, or a rate no number.
        ValueError: a rate is negative, or the warmup longer than the training.

    Example:
        >>> schedule = WarmupCosine(4e-3, total_steps=300, warmup_steps=20)
        >>> [f"{float(schedule(step)):.2e}" for step in (0, 19, 160, 300)]
        ['0.00e+00', '4.00e-03', '2.00e-03', '1.00e-06']
    """

    def __init__(
        self,
        peak,
        total_steps,
        warmup_steps=0,
        *,
        start=0.0,
        end=1e-6,
        warmup_includes_peak=True,
        hold_steps=1,
    ):
        super().__init__()
        check_numbers("WarmupCosine", peak=peak, start=start, end=end)
        _check_steps("WarmupCosine", total_steps, warmup_steps, hold_steps)
        self.peak, self.start, self.end = map(float, (peak, start, end))
        self.total_steps, self.warmup_steps = int(total_steps), int(warmup_steps)
        self.hold_steps = int(hold_steps)
        self.warmup_includes_peak = bool(warmup_includes_peak)

    def __call__(self, step):
        step = ops.cast(step, "int32")
        step = step - step % self.hold_steps
        cosine_steps = max(1, self.total_steps - self.warmup_steps)
        remaining = ops.cast(ops.clip(self.total_steps - step, 0, cosine_steps), "float32")
        # (1 + cos(pi * i / n)) / 2 = sin^2(pi / 2 * (n - i) / n), without the cancellation near the end
        height = ops.square(ops.sin(remaining / cosine_steps * (math.pi / 2)))
        rate = self.end + (self.peak - self.end) * height
        if self.warmup_steps == 0:
            return rate
        rises = max(1, self.warmup_steps - 1 if self.warmup_includes_peak else self.warmup_steps)
        done = ops.cast(ops.minimum(step, self.warmup_steps), "float32") / rises
        return ops.where(step < self.warmup_steps, self.start + (self.peak - self.start) * done, rate)

    def get_config(self):
        names = ("peak", "total_steps", "warmup_steps", "start", "end", "warmup_includes_peak", "hold_steps")
        return {name: getattr(self, name) for name in names}


@keras.saving.register_keras_serializable(package="keras_convnext")
class WarmupLinear(keras.optimizers.schedules.LearningRateSchedule):
    """A learning rate that falls in a straight line, and rises to that line from the first step.

    At step i of n the line is `end + (peak - end) * (1 - i / n)`; in the w steps of the warmup the rate is
    the line times `i / w + (1 - i / w) * start / peak`. Reference: mmcv 1.x, `PolyLrUpdaterHook` with
    power 1 and `get_warmup_lr` with warmup="linear", as ConvNeXt's configurations for ADE20K have them.

    Args:
        peak: float, where the line begins. 1e-4 at a batch of 16 in the paper.
        total_steps: int, optimizer steps of the whole training, warmup included.
        warmup_steps: int, steps of the warmup. Default 0.
        start: float, rate of step 0 when there is a warmup. Default 0.
        end: float, rate at `total_steps` and after. Default 0.

    Call arguments:
        step: int or integer tensor, number of optimizer steps taken so far.

    Returns:
        float32 scalar, the rate.

    Raises:
        TypeError, ValueError: as `WarmupCosine`.

    Example:
        >>> schedule = WarmupLinear(1e-4, total_steps=160_000, warmup_steps=1500, start=1e-10)
        >>> [f"{float(schedule(step)):.2e}" for step in (0, 1500, 80_000, 160_000)]
        ['1.00e-10', '9.91e-05', '5.00e-05', '0.00e+00']
    """

    def __init__(self, peak, total_steps, warmup_steps=0, *, start=0.0, end=0.0):
        super().__init__()
        check_numbers("WarmupLinear", peak=peak, start=start, end=end)
        _check_steps("WarmupLinear", total_steps, warmup_steps)
        self.peak, self.start, self.end = map(float, (peak, start, end))
        self.total_steps, self.warmup_steps = int(total_steps), int(warmup_steps)

    def __call__(self, step):
        step = ops.cast(step, "int32")
        left = ops.cast(ops.clip(self.total_steps - step, 0, self.total_steps), "float32")
        rate = self.end + (self.peak - self.end) * (left / self.total_steps)
        if self.warmup_steps == 0:
            return rate
        done = ops.cast(ops.minimum(step, self.warmup_steps), "float32") / self.warmup_steps
        return rate * (done + (1 - done) * (self.start / self.peak))

    def get_config(self):
        return {name: getattr(self, name) for name in ("peak", "total_steps", "warmup_steps", "start", "end")}


def _check_steps(owner, total_steps, warmup_steps, hold_steps=1):
    for name, steps, least in (
        ("total_steps", total_steps, 1),
        ("warmup_steps", warmup_steps, 0),
        ("hold_steps", hold_steps, 1),
    ):
        if isinstance(steps, bool) or not isinstance(steps, numbers.Integral):
            raise TypeError(f"{owner} needs an integer for {name}. Received: {name}={steps!r}")
        if steps < least:
            raise ValueError(f"{owner} needs {name} >= {least}. Received: {name}={steps}")
    if warmup_steps > total_steps:
        raise ValueError(
            f"{owner} needs warmup_steps <= total_steps, for the warmup is part of the training. "
            f"Received: warmup_steps={warmup_steps}, total_steps={total_steps}"
        )
