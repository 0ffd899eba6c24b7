"""Where and with what something was measured."""

import contextlib
import datetime
import os
import pathlib
import platform
import subprocess

import keras_convnext

BUSY_LOAD = 0.5  # of other work, for each core


def machine() -> dict[str, str]:
    """Returns time, version, commit, Python, CPU, cores and load, without importing a framework."""
    return {
        "time": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "keras_convnext": keras_convnext.__version__,
        "commit": commit(),
        "python": platform.python_version(),
        "cpu": cpu_name(),
        "cores": str(available_cores()),
        "load": f"{_load():.2f}",
    }


def available_cores() -> int:
    """Returns the number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def busy_warning(facts: dict[str, str]) -> str:
    """Returns a line of warning when other work was running before the measurement, else ""."""
    if float(facts["load"]) <= BUSY_LOAD * int(facts["cores"]):
        return ""
    return (
        f"the machine is busy: load {facts['load']} on {facts['cores']} cores before the first turn. Ratios "
        "may hold, times do not; repeat when it is idle."
    )


def _load() -> float:
    return os.getloadavg()[0] if hasattr(os, "getloadavg") else 0.0


def commit() -> str:
    """Returns the commit of a checkout, with "-dirty" when files were changed; "" when installed."""
    folder = pathlib.Path(__file__).parents[1]
    if not (folder / ".git").exists():
        return ""
    command = ["git", "-C", str(folder), "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return ""


def cpu_name() -> str:
    with contextlib.suppress(OSError), open("/proc/cpuinfo", encoding="utf-8") as file:
        for line in file:
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
