"""The process of one implementation: it builds its model and runs steps when it is told to.

It reads JSON lines from stdin and answers each with a line on what was stdout when it started; frameworks
that print go to stderr. First line: {"implementation", "case", "threads", "folder", "export"}; with "export"
true only the file of the implementation is written: {"exported": true}. Else the model is built and one step
is run: {"ready": versions, "device"}. Then {"run": seconds} -> {"seconds": [of each step]}, {"peak": true} ->
{"peak_bytes"}. Instead of any answer {"problem": why}, which is the last. The end of stdin ends it.
"""

import dataclasses
import json
import os
import re
import sys
import time
import traceback
from collections.abc import Callable

from benchmarks.speed import implementations

LEAST_STEPS = 3  # in a turn
LONGEST_MESSAGE = 300  # characters of an error

# The entry module comes first: without it the package would import Keras into the processes of the peers.
COMMAND = "import keras_convnext_main; from benchmarks.speed import worker; raise SystemExit(worker.main())"


def main(prepare: Callable[..., implementations.Step] | None = None) -> int:
    """Serves the commands; returns the exit code.

    `prepare(name, case, threads, folder)` builds what is measured; default `implementations.prepare`.
    """
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)

    def answer(**facts) -> None:
        print(json.dumps(facts), file=answers, flush=True)

    task = json.loads(sys.stdin.readline())
    name, case = task["implementation"], implementations.Case(**task["case"])
    if task["threads"] is not None:
        implementations.limit_threads(task["threads"])
    try:
        if task.get("export"):
            implementations.export(name, case, task["folder"])
            answer(exported=True)
            return 0
        step = (prepare or implementations.prepare)(name, case, task["threads"], task["folder"])
        step()
        answer(ready=implementations.versions(name), device=implementations.device())
        for line in sys.stdin:
            command = json.loads(line)
            if "run" in command:
                answer(seconds=_timed(step, command["run"]))
            else:
                answer(peak_bytes=implementations.peak_bytes())
    except implementations.NotOfferedError as error:
        answer(problem=str(error))
    except Exception as error:
        traceback.print_exc()
        answer(problem=_in_one_line(error))
    return 0


def _in_one_line(error: Exception) -> str:
    text = re.sub(r"\x1b\[[0-9;]*m", "", str(error)).strip()  # colours of Keras
    first = text.splitlines()[0] if text else ""
    return f"{type(error).__name__}: {first[:LONGEST_MESSAGE]}"


def _timed(step, seconds: float) -> list[float]:
    """Seconds of each step, for about `seconds` in all, after one that is not counted."""
    step()
    times: list[float] = []
    end = time.perf_counter() + seconds
    while len(times) < LEAST_STEPS or time.perf_counter() < end:
        begin = time.perf_counter()
        step()
        times.append(time.perf_counter() - begin)
    return times


def first_line(implementation: str, case, threads: int | None, folder: str, export: bool = False) -> dict:
    """The line that tells a worker who it is."""
    return {
        "implementation": implementation,
        "case": dataclasses.asdict(case),
        "threads": threads,
        "folder": folder,
        "export": export,
    }
