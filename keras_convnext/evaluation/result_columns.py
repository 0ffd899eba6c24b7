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
from keras_convnext.data.index import Source
from keras_convnext.data.preprocessing import Preprocessing
from keras_convnext.evaluation.results import fingerprint
from keras_convnext.exporting import runtimes
from keras_convnext.predictor import Predictor
from keras_convnext.weights.assign import plain_path


def model_settings(classifier: Predictor) -> dict[str, str]:
    """Returns name, architecture, weights, their hash and licence, and the dtype policy."""
    row, file = classifier.row, classifier.file
    if isinstance(classifier.model, runtimes.ExportedModel) and file is not None:
        metadata = classifier.model.metadata
        return {
            "model": file.name,
            "architecture": metadata.get("name", ""),
            "weights": file.name,
            "weights_sha256": _file_digest(file),
            "licence": metadata.get("licence") or "",
            "dtype_policy": metadata.get("precision", ""),
        }
    if row is not None:
        name, architecture = row.tag, row.architecture
    else:
        architecture = classifier.model.name
        name = architecture if file is None else file.name
    return {
        "model": name,
        "architecture": architecture,
        "weights": file.name if file is not None else "",
        "weights_sha256": _file_digest(file) if file is not None else digest_of_arrays(classifier.model),
        "licence": row.licence if row is not None else "",
        "dtype_policy": classifier.model.dtype_policy.name,
    }


def environment() -> dict[str, str]:
    """Returns versions, commit and hardware, as in the columns of `results.COLUMNS`."""
    import tensorflow as tf

    backend = importlib.import_module(keras.backend.backend())
    machine = _environment.machine()
    del machine["load"]
    return machine | {
        "keras": keras.__version__,
        "backend": keras.backend.backend(),
        "backend_version": str(backend.__version__),
        "tensorflow": tf.__version__,
        "numpy": np.__version__,
        "pillow": PIL.__version__,
        "accelerators": _accelerators(backend),
    }


def data_settings(source: Source, split: str | None) -> dict[str, str]:
    """Returns kind, name, split and fingerprint of the data."""
    parts = pathlib.Path(os.path.abspath(source.path)).parts
    return {
        "data_kind": source.kind,
        # The folder of TensorFlow Datasets is named after the version, in one with the name of the set.
        "data": "/".join(parts[-2:] if source.kind == "tfds" else parts[-1:]),
        "split": split or "",
        "data_sha256": fingerprint(source),
    }


def preprocessing_settings(preprocessing: Preprocessing) -> dict[str, str]:
    """Returns how images were prepared."""
    height, width = preprocessing.size
    stored = preprocessing.stored()
    return {"image_size": str(height) if height == width else f"{height}x{width}"} | {
        name: "" if stored[name] is None else f"{stored[name]:.6g}" if name == "crop" else str(stored[name])
        for name in ("crop", "resize_mode", "resize_size", "interpolation")
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
        devices = [device for device in backend.config.get_visible_devices() if device.device_type != "CPU"]
        details = [backend.config.experimental.get_device_details(device) for device in devices]
        names = [
            detail.get("device_name", device.name) for detail, device in zip(details, devices, strict=True)
        ]
    return "; ".join(f"{count} x {name}" for name, count in collections.Counter(names).items())
