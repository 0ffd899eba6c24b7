"""Which backends are installed, found without importing any, and the choice of one where Keras's is not."""

import importlib.util
import json
import os
import sys

EXTRAS = {"tensorflow": "tensorflow", "jax": "jax", "torch": "torch", "openvino": "export"}  # of this package
BACKENDS = ("tensorflow", "jax", "torch")  # in the order in which one is taken


def is_installed(package: str) -> bool:
    """Whether a top-level package can be imported; a folder without code, as pip may leave one, cannot."""
    spec = importlib.util.find_spec(package)
    return spec is not None and spec.origin is not None


def choose_backend() -> None:
    """Sets KERAS_BACKEND where the backend that Keras would take is not installed, and says so on stderr.

    Keras takes KERAS_BACKEND, else what keras.json names, else TensorFlow. "tensorflow" in keras.json is not
    taken for a person's choice, since Keras writes it there at its first import. Nothing happens where
    Keras's choice is installed, or Keras is imported already.

    Raises:
        ImportError: KERAS_BACKEND, or keras.json, names another backend that is not installed, or none is
            installed. The message tells what is, and how to install it.
    """
    if "keras" in sys.modules:
        return
    path = _settings_path()
    in_settings = _backend_in(path)
    asked = os.environ.get("KERAS_BACKEND")
    wanted = asked or in_settings or "tensorflow"
    if wanted not in EXTRAS or is_installed(wanted):
        return  # Keras knows its other backends and refuses what is none
    installed = [name for name in BACKENDS if is_installed(name)]
    is_chosen = bool(asked) or wanted != "tensorflow"
    if is_chosen:
        raise ImportError(
            f"Expected an installed backend, received {wanted!r} from {'KERAS_BACKEND' if asked else path}. "
            f"Installed: {', '.join(installed) or 'none'}. Run {install_command(wanted)}"
            + (f", or set KERAS_BACKEND={installed[0]}." if installed else ".")
        )
    if not installed:
        raise ImportError(
            f"Expected a backend, but none of {', '.join(BACKENDS)} is installed. "
            f"Run {install_command('tensorflow')}, or the same with jax or torch."
        )
    why = f"; tensorflow, which {path} names, is not" if in_settings else ""
    print(f"Backend: {installed[0]} (installed{why}; choose another with KERAS_BACKEND).", file=sys.stderr)
    os.environ["KERAS_BACKEND"] = installed[0]


def install_command(backend: str) -> str:
    """What a person runs to install a backend."""
    return f"pip install 'keras-convnext[{EXTRAS[backend]}]'"


def _settings_path() -> str:
    """Where Keras keeps its settings."""
    home = os.path.expanduser("~")
    folder = os.path.join(home if os.access(home, os.W_OK) else "/tmp", ".keras")
    return os.path.expanduser(os.path.join(os.environ.get("KERAS_HOME", folder), "keras.json"))


def _backend_in(path: str) -> str | None:
    try:
        with open(path, encoding="utf-8") as file:
            settings = json.load(file)
    except (OSError, ValueError):
        return None
    backend = settings.get("backend") if isinstance(settings, dict) else None
    return backend if isinstance(backend, str) else None
