"""Tells what this process runs on: version, switches of the environment, installed backends, processor."""

import contextlib
import datetime
import functools
import importlib.util
import json
import os
import pathlib
import platform
import subprocess
import sys

__version__ = "0.1.0"

BACKENDS = ("tensorflow", "jax", "torch")  # in the order in which one is taken

# The names in pip's registry of packages that are imported by another name.
_INSTALLED_AS = {
    "PIL": "pillow",
    "keras_hub": "keras-hub",
    "ai_edge_litert": "ai-edge-litert",
    "ai_edge_quantizer": "ai-edge-quantizer",
    "tensorflow_datasets": "tensorflow-datasets importlib_resources",
}

# Of these, as /proc/cpuinfo names them, oneDNN has bfloat16 kernels that add up in float32.
_FLAGS_FOR_BFLOAT16 = {"avx512f", "avx_ne_convert", "bf16"}
# Values of ONEDNN_MAX_CPU_ISA with which it has none.
_CAPS_BELOW_BFLOAT16 = {"SSE41", "AVX", "AVX2", "AVX2_VNNI"}

# What decides which code libraries run on a processor: what it has, and variables that limit them.
FEATURES = ("avx2", "avx512f", "avx512_bf16", "amx_bf16")
LIMITS = (
    "ONEDNN_MAX_CPU_ISA",
    "ATEN_CPU_CAPABILITY",
    "MKL_ENABLE_INSTRUCTIONS",
    "TF_ENABLE_ONEDNN_OPTS",
    "XLA_FLAGS",
)


def is_installed(package: str) -> bool:
    """Returns whether a package can be imported; a folder without code, as pip may leave one, cannot."""
    spec = importlib.util.find_spec(package)
    return spec is not None and spec.origin is not None


def require(package: str, what: str) -> None:
    """Raises an ImportError where a package is missing that `what`, which begins the message, needs."""
    if not is_installed(package):
        raise ImportError(missing_text(what, package))


def missing_text(what: str, *packages: str) -> str:
    """Returns the message that packages, by the names to import, are missing which `what` needs."""
    names = [_INSTALLED_AS.get(package, package) for package in packages]
    verb = "is" if len(names) == 1 else "are"
    return (
        f"{what} needs {' and '.join(names)}, which {verb} not installed. Run pip install {' '.join(names)}."
    )


def choose_backend() -> None:
    """Sets KERAS_BACKEND where the backend that Keras would take is not installed, and says so on stderr.

    It sets the variables of `library_settings` too: the libraries read them when they are imported.

    "tensorflow" in keras.json is not taken for a person's choice, since Keras writes it there at its first
    import. Nothing happens where Keras is imported already. Of another backend that is chosen and missing, or
    where none is installed, an ImportError tells how to install it.
    """
    if "keras" in sys.modules:
        return
    os.environ.update(library_settings())
    path, asked = _settings_path(), os.environ.get("KERAS_BACKEND")
    named = _backend_in(path)  # even if another is asked: Keras reads the file
    wanted = asked or named or "tensorflow"
    if wanted not in (*BACKENDS, "openvino") or is_installed(wanted):
        return  # Keras knows its other backends and refuses what is none
    installed = [name for name in BACKENDS if is_installed(name)]
    if asked or wanted != "tensorflow":
        raise ImportError(
            f"Expected an installed backend, received {wanted!r} from {'KERAS_BACKEND' if asked else path}. "
            f"Installed: {', '.join(installed) or 'none'}. Run pip install {wanted}"
            + (f", or set KERAS_BACKEND={installed[0]}." if installed else ".")
        )
    if not installed:
        raise ImportError(
            f"Expected a backend, but none of {', '.join(BACKENDS)} is installed. "
            "Run pip install tensorflow, or the same with jax or torch."
        )
    why = f"; tensorflow, which {path} names, is not" if named else ""
    with contextlib.suppress(OSError):  # nobody reads it
        print(
            f"Backend: {installed[0]} (installed{why}; choose another with KERAS_BACKEND).", file=sys.stderr
        )
    os.environ["KERAS_BACKEND"] = installed[0]


def library_settings() -> dict[str, str]:
    """Returns the variables that make the backends fast on this processor, without those that are set.

    GOMP_SPINCOUNT: PyTorch's threads wait for each other actively, for milliseconds, and beside another busy
    process a training step takes up to ten times as long. TF_ENABLE_ONEDNN_OPTS: by default TensorFlow uses
    oneDNN from AVX-512 on; with AVX2 it is faster too. benchmarks/README.md has the figures.
    """
    settings = {} if "OMP_WAIT_POLICY" in os.environ else {"GOMP_SPINCOUNT": "1000"}
    if "avx2" in cpu_flags():
        settings["TF_ENABLE_ONEDNN_OPTS"] = "1"
    return {name: value for name, value in settings.items() if name not in os.environ}


def wanted_backend() -> str:
    """Returns the backend that Keras would take: KERAS_BACKEND, what keras.json names, else TensorFlow."""
    return os.environ.get("KERAS_BACKEND") or _backend_in(_settings_path()) or "tensorflow"


def is_set(variable: str) -> bool:
    """Returns whether a switch is on: not unset, empty, "0", "false", "no" or "off", in any case."""
    return os.environ.get(variable, "").strip().lower() not in ("", "0", "false", "no", "off")


def integer(variable: str) -> int:
    """Returns the integer in a variable; ValueError names it where there is something else."""
    try:
        return int(os.environ[variable])
    except ValueError:
        raise ValueError(f"Expected an integer in {variable}, received {os.environ[variable]!r}.") from None


def machine() -> dict[str, str]:
    """Returns time, version, commit, Python, CPU, cores and load, without importing a framework."""
    return {
        "time": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "keras_convnext": __version__,
        "commit": commit(),
        "python": platform.python_version(),
        "cpu": cpu_name(),
        "cores": str(available_cores()),
        "load": f"{os.getloadavg()[0] if hasattr(os, 'getloadavg') else 0:.2f}",
    }


def available_cores() -> int:
    """Returns the number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


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
    """Returns the processor's name and, where Linux tells them, the numbers of its generation.

    A rented machine often says no more than "AMD EPYC". Of these, family 25 is Zen 3 with model 1 and Zen 4
    with 17, and family 26 Zen 5.
    """
    name = _in_cpuinfo("model name") or platform.processor() or platform.machine()
    numbers = [f"{what} {found}" for what in ("cpu family", "model") if (found := _in_cpuinfo(what))]
    return f"{name} ({', '.join(numbers)})" if numbers else name


def cpu_flags() -> frozenset[str]:
    """Returns what the processor can do, as Linux names it ("avx2", "avx512_bf16"); nothing elsewhere."""
    return frozenset((_in_cpuinfo("flags") or _in_cpuinfo("Features")).split())  # the latter on Arm


def processor_text() -> str:
    """Returns the processor, its cores, what it has of `FEATURES`, and the variables that limit libraries."""
    flags = cpu_flags()
    words = [name if name in flags else f"no {name}" for name in FEATURES] if flags else ["features unknown"]
    words += [f"{name}={os.environ[name]}" for name in LIMITS if name in os.environ]
    return f"{cpu_name()}, cores: {available_cores()}, {', '.join(words)}"


@functools.cache
def has_bfloat16(backend: str) -> bool:
    """Returns whether a backend on this processor multiplies bfloat16 and adds up in float32.

    oneDNN does so, from AVX-512 on; the kernels that PyTorch and TensorFlow have besides do not. On JAX it is
    always so: XLA computes in float32 where the processor lacks bfloat16. The variables that limit oneDNN are
    heeded: ONEDNN_MAX_CPU_ISA=AVX2 shows on any processor what one without AVX-512 does, for TensorFlow
    TF_ENABLE_ONEDNN_OPTS=0 too. Set them before the framework is imported.
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


def keras_home() -> str:
    """Returns the folder of Keras's settings and models, found as `keras.config` does."""
    home = os.path.expanduser("~")
    folder = os.path.join(home if os.access(home, os.W_OK) else "/tmp", ".keras")
    return os.path.expanduser(os.environ.get("KERAS_HOME", folder))


def _settings_path() -> str:
    return os.path.join(keras_home(), "keras.json")


def _backend_in(path: str) -> str | None:
    """Returns the backend that keras.json names; ImportError where Keras's own import would fail at it."""
    if not os.path.exists(path):
        return None
    settings: object = None
    try:
        if os.path.isfile(path):  # a pipe has no end
            with open(path, encoding="utf-8") as file:
                settings = json.load(file)
    except (OSError, ValueError):  # Keras takes its defaults, or says what it is
        return None
    except RecursionError:
        pass
    if not isinstance(settings, dict):
        raise ImportError(
            f"Expected Keras's settings, an object in JSON, in '{path}'. Remove it: Keras writes it anew."
        )
    backend = settings.get("backend")
    return backend if isinstance(backend, str) else None


def _in_cpuinfo(field: str) -> str:
    with contextlib.suppress(OSError), open("/proc/cpuinfo", encoding="utf-8") as file:
        for line in file:
            name, _, value = line.partition(":")
            if name.strip() == field:
                return value.strip()
    return ""
