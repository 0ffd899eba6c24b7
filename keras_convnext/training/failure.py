"""What ends a run early: signals, and numbers that are not finite."""

import contextlib
import math
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
import PIL.Image

from keras_convnext.data.faults import MAX_FAULT_SHARE, Faults
from keras_convnext.distribution.watchdog import Group
from keras_convnext.training.checkpoints import Checkpoints
from keras_convnext.training.optimizer import inner_optimizer
from keras_convnext.training.run_folder import RunFolder
from keras_convnext.training.run_state import FAULTS_FILE, non_finite_names

_SECONDS_TO_AGREE, _MAX_STEPS_TO_AGREE = 1.0, 1000
_MAX_DUMPED = 64  # images of a batch that gave NaN


class Interrupted(Exception):  # noqa: N818 - not an error: the run can be resumed
    """A signal, SIGTERM or SIGINT, asked the run to stop; a checkpoint of the last step is written."""

    def __init__(self, signal_number: int, message: str) -> None:
        super().__init__(message)
        self.signal_number = signal_number


class Signalled(Exception):  # noqa: N818 - not an error
    """A signal was received while the model was validated."""


class NonFiniteError(ValueError):
    """The loss or a weight is NaN or infinite: in which step, and where to look."""


class Signals:
    """SIGTERM and Ctrl-C, after which all processes of a run stop at the same step."""

    def __init__(self, group: Group) -> None:
        self.received = 0  # signal that this process received, 0 for none
        self._group = group
        self._ask_at = 0  # micro-batches after which the processes ask each other again
        self._asked = (0, time.monotonic())  # micro-batches and time of the last question

    @contextlib.contextmanager
    def noted(self) -> Iterator[None]:
        """Notes the signals of the block for the run to act on after its step; in the main thread only."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return

        def note(number, frame):
            if self.received == signal.SIGINT == number:  # Ctrl-C for the second time
                raise KeyboardInterrupt
            self.received = number

        before = {number: signal.signal(number, note) for number in (signal.SIGTERM, signal.SIGINT)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def after_step(self, done: int) -> int:
        """Returns the signal on which all stop, 0 for none; processes ask each other once a second."""
        return self.agreed(done) if done >= self._ask_at else 0

    def agreed(self, done: int) -> int:
        """Asks all processes in any case, and returns the same."""
        now, (asked, then) = time.monotonic(), self._asked
        pause = round((done - asked) * _SECONDS_TO_AGREE / max(now - then, 1e-3))
        noted = self._group.gathered([self.received, pause])
        self._asked = done, now
        if len(noted) > 1:
            self._ask_at = done + min(max(noted[0][1], 1), _MAX_STEPS_TO_AGREE)
        return max(received for received, _ in noted)

    def raise_if_received(self) -> None:
        """Ends a validation; of several processes none, as they would not stop at the same image."""
        if self.received and len(self._group) == 1:
            raise Signalled


def check_faults(faults: Mapping[str, Faults], split: str, folder: RunFolder | None) -> None:
    """Stops with a DataError when too many images of a split cannot be decoded, and lists them."""
    found = faults[split]
    if len(found) > MAX_FAULT_SHARE * len(found.source):
        write_faults(faults, folder)
        found.max_share = MAX_FAULT_SHARE
        found.check()


def write_faults(faults: Mapping[str, Faults], folder: RunFolder | None) -> None:
    reports = {split: found.report() for split, found in faults.items() if len(found)}
    if reports and folder:
        folder.write_json(FAULTS_FILE, reports)


def non_finite_error(what: str, checkpoints: Checkpoints, make_batches: Callable[[], Any]) -> NonFiniteError:
    """Writes the last batch and a report that help to find the cause, and returns the error to raise.

    `make_batches` returns a `tf.data.Dataset` from the last micro-batch on: images (N, H, W, 3) in 0..255,
    and targets, an array or a dict of arrays; or the pair of images and masks alone.
    """
    counts, folder = checkpoints.counts, checkpoints.folder
    step = (counts.done - 1) // counts.plan.accumulation_steps + 1
    if folder is None:
        return NonFiniteError(f"Expected finite numbers, received {what} in step {step}.")
    batch = next(make_batches().as_numpy_iterator())
    images, targets = batch if len(batch) == 2 else batch[0]
    named = targets if isinstance(targets, Mapping) else {"targets": targets}
    saved_step = max(checkpoints.saved, 0) // counts.plan.accumulation_steps
    report = {
        "step": step,
        "micro_batch": counts.done - 1,
        "what": what,
        "learning_rate": float(inner_optimizer(checkpoints.model.optimizer)._learning_rate(step - 1)),
        "last_checkpoint_step": saved_step,
        "images_finite": bool(np.isfinite(images).all()),
        "targets_finite": not non_finite_names(named),
        "arrays_not_finite": non_finite_names(checkpoints.arrays()),
    }
    dumped = {key: array[:_MAX_DUMPED] for key, array in {"images": images, **named}.items()}
    name = f"nonfinite-step-{step:08d}"
    folder.write_with(f"{name}/batch.npz", lambda path: np.savez(path, **dumped))
    folder.write_with(f"{name}/images.png", _contact_picture(dumped["images"]).save)
    folder.write_json(f"{name}/report.json", report)
    stands = f"step {saved_step}" if checkpoints.saved > 0 else "none was written yet"
    return NonFiniteError(
        f"Expected finite numbers, received {what} in step {step} of {counts.plan.total_steps}. Its images "
        f"and a report are in {folder.path / name}; the last checkpoint stands: {stands}. Lower "
        "learning_rate, set clip_norm = 1.0, or with float16 use mixed_bfloat16."
    )


def _contact_picture(images: np.ndarray) -> PIL.Image.Image:
    """Puts images side by side; what is not finite is black."""
    columns = math.ceil(math.sqrt(len(images)))
    height, width = images.shape[1:3]
    sheet = PIL.Image.new("RGB", (columns * width, math.ceil(len(images) / columns) * height))
    pixels = np.clip(np.nan_to_num(images, nan=0, posinf=0, neginf=0), 0, 255).astype(np.uint8)
    for number, image in enumerate(pixels):
        sheet.paste(PIL.Image.fromarray(image), (number % columns * width, number // columns * height))
    return sheet
