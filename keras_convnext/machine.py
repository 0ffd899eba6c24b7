"""Where and with what something was measured, and what the processor can do."""

import contextlib
import datetime
import functools
import os
import pathlib
import platform
import subprocess

import keras_convnext

BUSY_LOAD = 0.5  # of other work, for each core

# Of these, as /proc/cpuinfo names them, oneDNN has bfloat16 kernels that add up in float32.
_FLAGS_FOR_BFLOAT16 = {"avx512f", "avx_ne_convert", "bf16"}
# Values of ONEDNN_MAX_CPU_ISA with which it has none.
_CAPS_BELOW_BFLOAT16 = {"SSE41", "AVX", "AVX2", "AVX2_VNNI"}


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
    return _in_cpuinfo("model name") or platform.processor() or platform.machine()


def cpu_flags() -> frozenset[str]:
    """Returns what the processor can do, as Linux names it ("avx2", "avx512_bf16"); nothing elsewhere."""
    return frozenset((_in_cpuinfo("flags") or _in_cpuinfo("Features")).split())  # the latter on Arm


def _in_cpuinfo(field: str) -> str:
    with contextlib.suppress(OSError), open("/proc/cpuinfo", encoding="utf-8") as file:
        for line in file:
            name, _, value = line.partition(":")
            if name.strip() == field:
                return value.strip()
    return ""


@functools.cache
def has_bfloat16(backend: str) -> bool:
    """Returns whether a backend on this processor multiplies bfloat16 and adds up in float32.

    oneDNN does so, from AVX-512 on; the kernels that PyTorch and TensorFlow have besides do not. The
    variables that limit oneDNN are heeded: ONEDNN_MAX_CPU_ISA=AVX2 shows on any processor what one without
    AVX-512 does, for TensorFlow TF_ENABLE_ONEDNN_OPTS=0 too. Set them before the framework is imported.

    Args:
        backend: "tensorflow", "jax" or "torch". For JAX it is always so: XLA computes in float32 where the
            processor lacks bfloat16.
    """
    if backend == "torch":
        import torch

        supported = getattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", None)
        return torch.backends.mkldnn.is_available() and supported is not None and supported()
    if backend == "tensorflow":
        cap = os.environ.get("ONEDNN_MAX_CPU_ISA", "").upper()
        flags = cpu_flags()
        known_not = bool(flags) and not flags & _FLAGS_FOR_BFLOAT16
        return tensorflow_has_onednn() and not known_not and cap not in _CAPS_BELOW_BFLOAT16
    return True


def tensorflow_has_onednn() -> bool:
    """Returns whether TensorFlow computes with oneDNN: by default from AVX-512 VNNI on."""
    try:
        # It has no public name. Without it bfloat16 is computed in float32, which is right everywhere.
        from tensorflow.python.util import _pywrap_util_port
    except ImportError:
        return False
    return _pywrap_util_port.IsMklEnabled()
