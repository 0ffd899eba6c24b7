"""Alternating runs: implementations are measured in turns, one process each, of which one works at a time.

Speeds are compared within a run only, as a machine is not equally fast at all times. Every implementation
has one turn a round, in the reversed order in every second round; a ratio is taken round by round.
"""

import contextlib
import dataclasses
import json
import math
import os
import selectors
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence

from benchmarks.speed import implementations, worker
from benchmarks.speed.implementations import Case

ANSWER_LIMIT = 1800.0  # seconds until a worker counts as hung; compiling a large model takes minutes
STDERR_LINES = 3  # of a worker that died, in its reason


@dataclasses.dataclass(frozen=True)
class Measurement:
    """Time and memory of an implementation for a case.

    Attributes:
        implementation: name, see `implementations.TITLES`.
        case: what was run.
        seconds: of a step, one number a round: the median of the steps of that turn. Empty when it could not
            run.
        first: seconds from the start of the process to the first result.
        peak_bytes: largest resident memory of the process; device memory on a GPU.
        versions: of its packages.
        device: "cpu" or the name of the accelerator.
        problem: why it could not run, else "".
    """

    implementation: str
    case: Case
    seconds: tuple[float, ...]
    first: float
    peak_bytes: int
    versions: dict[str, str]
    device: str
    problem: str = ""

    @property
    def median(self) -> float:
        """Seconds of a step, median over the rounds; NaN when it could not run."""
        return statistics.median(self.seconds) if self.seconds else math.nan


def measure(
    case: Case,
    implementations: Sequence[str],
    rounds: int = 5,
    seconds: float = 1.0,
    threads: int | None = None,
    on_progress: Callable[[str, int, int], None] | None = None,
) -> list[Measurement]:
    """Measures implementations on one case; see `measure_entries`."""
    return measure_entries([(name, case) for name in implementations], rounds, seconds, threads, on_progress)


def measure_entries(
    entries: Sequence[tuple[str, Case]],
    rounds: int = 5,
    seconds: float = 1.0,
    threads: int | None = None,
    on_progress: Callable[[str, int, int], None] | None = None,
    command: str | None = None,
) -> list[Measurement]:
    """Measures implementations in turns, each on a case of its own.

    Args:
        entries: (implementation, case), at most one process each at a time.
        rounds: turns of each.
        seconds: about how long a turn lasts; it has three steps at least, after one that is not counted.
        threads: cores of each, None for all.
        on_progress: called with what is done now, the number of things done and of all.
        command: the program of a process in Python, for implementations that are its own; default
            `worker.COMMAND`, for those of `implementations`.

    Returns:
        One for each entry, in their order. One that cannot run has a `problem`, and the others are measured.

    Raises:
        ValueError: an unknown implementation.

    Example:
        ours, timm = measure(Case("convnext_tiny"), ["torch", "timm"])
        print(f"{ratio(ours, timm):.2f} times timm's speed")
    """
    for name, _ in entries if command is None else ():
        implementations.check_implementation(name)
    total = len(entries) * (rounds + 1)
    with contextlib.ExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="keras_convnext_bench_"))
        turns = []
        for number, (name, case) in enumerate(entries):
            if on_progress is not None:
                on_progress(f"starting {name}", number, total)
            own = os.path.join(folder, str(number))
            os.mkdir(own)
            turn = _Turn(name, case, threads, own, command)
            stack.callback(turn.stop)
            turn.start()
            turns.append(turn)
        for number in range(rounds):
            for place, turn in enumerate(turns if number % 2 == 0 else reversed(turns)):
                if on_progress is not None:
                    on_progress(turn.name, len(entries) * (number + 1) + place, total)
                turn.run(seconds)
        for turn in turns:
            turn.finish()
        if on_progress is not None:
            on_progress("done", total, total)
        return [turn.measurement() for turn in turns]


def ratio(ours: Measurement, peer: Measurement) -> float:
    """Returns how many times as fast as the peer ours is: median over rounds; NaN where one did not run."""
    if not ours.seconds or not peer.seconds:
        return math.nan
    pairs = zip(peer.seconds, ours.seconds, strict=True)
    return statistics.median(theirs / own for theirs, own in pairs)


class WorkerError(Exception):
    """A worker gave no answer; the message says why."""


class Worker:
    """A process that answers JSON lines; see `worker.main`.

    Args:
        words: its command line after the interpreter.
        variables: of its environment, above those of this process.
    """

    def __init__(self, words: Sequence[str], variables: dict[str, str]) -> None:
        self.errors = tempfile.TemporaryFile()  # noqa: SIM115, closed by `stop`
        self.process = subprocess.Popen(
            [sys.executable, "-P", *words],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.errors,
            env=os.environ | variables,
            start_new_session=True,  # Ctrl-C is for the parent, which ends the workers and their children
        )
        if self.process.stdin is None or self.process.stdout is None:
            raise OSError(f"Expected pipes to process {self.process.pid}, received none.")
        self.stdin, self.stdout = self.process.stdin, self.process.stdout
        self.buffer = b""

    def ask(self, limit: float = ANSWER_LIMIT, **command) -> dict:
        """Sends a line and returns the answer.

        Raises:
            WorkerError: it died, or did not answer within `limit` seconds.
        """
        try:
            self.stdin.write(json.dumps(command).encode() + b"\n")
            self.stdin.flush()
        except BrokenPipeError:
            raise WorkerError(self.reason()) from None
        return json.loads(self._line(limit))

    def _line(self, limit: float) -> bytes:
        end = time.monotonic() + limit
        with selectors.DefaultSelector() as selector:
            selector.register(self.stdout, selectors.EVENT_READ)
            while b"\n" not in self.buffer:
                if not selector.select(max(end - time.monotonic(), 0.0)):
                    self.stop()
                    raise WorkerError(f"gave no answer within {limit:.0f} s")
                piece = os.read(self.stdout.fileno(), 1 << 16)
                if not piece:
                    raise WorkerError(self.reason())
                self.buffer += piece
        line, _, self.buffer = self.buffer.partition(b"\n")
        return line

    def reason(self) -> str:
        """Returns why the process died, as far as it says."""
        code = self.process.wait()
        if code == -signal.SIGKILL:
            return "was killed by SIGKILL: usually the system, when memory ran out"
        if code < 0:
            return f"was ended by {signal.Signals(-code).name}{self._last_words()}"
        return f"ended with exit code {code}{self._last_words()}"

    def _last_words(self) -> str:
        self.errors.seek(0)
        lines = self.errors.read().decode("utf-8", "replace").splitlines()
        lines = [line.strip() for line in lines if line.strip()][-STDERR_LINES:]
        return ": " + " | ".join(lines) if lines else ""

    def stop(self) -> None:
        """Ends the process and those that it started."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        for pipe in (self.stdin, self.stdout, self.errors):
            with contextlib.suppress(OSError):
                pipe.close()


class _Turn:
    """An implementation's process and what it has measured so far."""

    def __init__(self, name: str, case: Case, threads: int | None, folder: str, command: str | None) -> None:
        self.name, self.case, self.threads, self.folder = name, case, threads, folder
        self.command = command
        self.worker: Worker | None = None
        self.seconds: list[float] = []
        self.first, self.peak_bytes = math.nan, 0
        self.versions: dict[str, str] = {}
        self.device = self.problem = ""

    def start(self) -> None:
        """Builds the model and runs the first step."""
        try:
            if self.command is None:  # else its process says so
                implementations.check_offered(self.name, self.case)
        except implementations.NotOfferedError as error:
            self.problem = str(error)
            return
        if implementations.is_exported(self.name):
            self._ask_new(export=True)
            self.stop()
            if self.problem:
                return
        begin = time.perf_counter()
        ready = self._ask_new(export=False)
        if ready is not None:
            self.first = time.perf_counter() - begin
            self.versions, self.device = ready["ready"], ready["device"]

    def _ask_new(self, export: bool) -> dict | None:
        variables = implementations.environment(self.name, self.threads)
        self.worker = Worker(["-c", self.command or worker.COMMAND], variables)
        return self._ask(**worker.first_line(self.name, self.case, self.threads, self.folder, export))

    def _ask(self, **command) -> dict | None:
        if self.worker is None:
            return None
        try:
            answer = self.worker.ask(**command)
        except WorkerError as error:
            self.problem = str(error)
            return None
        if "problem" in answer:
            self.problem = answer["problem"]
            return None
        return answer

    def run(self, seconds: float) -> None:
        if not self.problem and (answer := self._ask(run=seconds)) is not None:
            self.seconds.append(statistics.median(answer["seconds"]))

    def finish(self) -> None:
        if not self.problem and (answer := self._ask(peak=True)) is not None:
            self.peak_bytes = answer["peak_bytes"]

    def stop(self) -> None:
        if self.worker is not None:
            self.worker.stop()
            self.worker = None

    def measurement(self) -> Measurement:
        return Measurement(
            self.name,
            self.case,
            () if self.problem else tuple(self.seconds),
            self.first,
            self.peak_bytes,
            self.versions,
            self.device,
            self.problem,
        )
