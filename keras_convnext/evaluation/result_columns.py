"""The columns of a row of results that name the model, the data, the preprocessing and the machine."""

import collections
import hashlib
import importlib
import os
import pathlib
from typing import Any

import keras
import numpy as np
import PIL

from keras_convnext import _environment
from keras_convnext.evaluation.results import COLUMNS, fingerprint
from keras_convnext.exporting import runtimes
from keras_convnext.predictor import Predictor, SegmentationPredictor
from keras_convnext.weights.assign import plain_path


def settings_of(
    opened: Predictor | SegmentationPredictor,
    source: Any,
    split: str | None,
    batch_size: int,
    data_sha256: str = "",
) -> dict[str, str]:
    """Returns what scores of a model on data depend on; without a `data_sha256`, `fingerprint` makes it."""
    parts = pathlib.Path(os.path.abspath(source.path)).parts
    preprocessing = opened.preprocessing
    height, width = preprocessing.size
    return {
        **_model_settings(opened),
        **environment(),
        "data_kind": source.kind,
        # The folder of TensorFlow Datasets is named after the version, in one with the name of the set.
        "data": "/".join(parts[-2:] if source.kind in ("tfds", "array_record") else parts[-1:]),
        "split": split or "",
        "data_sha256": data_sha256 or fingerprint(source),
        "image_size": str(height) if height == width else f"{height}x{width}",
        "crop": f"{preprocessing.crop_fraction:.6g}",
        "resize_mode": preprocessing.stored()["resize_mode"],
        "resize_size": str(preprocessing.resize_size or ""),
        "interpolation": preprocessing.interpolation,
        "batch_size": str(batch_size),
    }


def _model_settings(opened: Predictor | SegmentationPredictor) -> dict[str, str]:
    """Returns name, architecture, weights, their hash and licence, and the dtype policy."""
    model, row, file = opened.model, opened.row, opened.file
    if isinstance(model, runtimes.ExportedModel):
        about = model.metadata
        architecture, licence, policy = (about.get(name) or "" for name in ("name", "licence", "precision"))
    else:
        architecture, licence, policy = model.name, "", model.dtype_policy.name
    name = architecture if file is None else file.name
    if row is not None:
        name, architecture, licence = row.tag, row.architecture, row.licence
    return {
        "model": name,
        "architecture": architecture,
        "weights": "" if file is None else file.name,
        "weights_sha256": digest_of_arrays(model) if file is None else _file_digest(file),
        "licence": licence,
        "dtype_policy": policy,
    }


def environment() -> dict[str, str]:
    """Returns versions, commit and hardware, as in the columns of `results.COLUMNS`."""
    facts = _environment.machine() | versions()
    return {name: facts[name] for name in COLUMNS if name in facts}


def versions() -> dict[str, str]:
    """Returns the backend, the versions of the libraries and the accelerators."""
    import tensorflow as tf

    backend = importlib.import_module(keras.backend.backend())
    return {
        "keras": keras.__version__,
        "backend": keras.backend.backend(),
        "backend_version": str(backend.__version__),
        "tensorflow": tf.__version__,
        "numpy": np.__version__,
        "pillow": PIL.__version__,
        "accelerators": _accelerators(backend),
    }


def digest_of_arrays(model: Any) -> str:
    """Returns the SHA-256 of the names, shapes and values of all weights."""
    digest = hashlib.sha256()
    for variable in model.weights:
        array = np.ascontiguousarray(keras.ops.convert_to_numpy(variable))
        digest.update(f"{plain_path(variable.path)} {array.dtype} {array.shape}\n".encode())
        digest.update(array.tobytes())
    return digest.hexdigest()


def _file_digest(path: pathlib.Path) -> str:
    """SHA-256 of a file, or of the names and contents of the files in a folder."""
    if path.is_dir():
        files = sorted(file for file in path.rglob("*") if file.is_file())
        lines = [f"{file.relative_to(path).as_posix()} {_file_digest(file)}\n" for file in files]
        return hashlib.sha256("".join(lines).encode()).hexdigest()
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _accelerators(backend: Any) -> str:
    """Returns the devices besides the CPU, such as "8 x NVIDIA A100-SXM4-40GB"."""
    names: list[str] = []
    if backend.__name__ == "jax":
        names = [device.device_kind for device in backend.local_devices() if device.platform != "cpu"]
    elif backend.__name__ == "torch":
        names = [backend.cuda.get_device_name(number) for number in range(backend.cuda.device_count())]
    elif backend.__name__ == "tensorflow":
        details = backend.config.experimental.get_device_details
        devices = [device for device in backend.config.get_visible_devices() if device.device_type != "CPU"]
        names = [details(device).get("device_name", device.name) for device in devices]
    return "; ".join(f"{count} x {name}" for name, count in collections.Counter(names).items())
