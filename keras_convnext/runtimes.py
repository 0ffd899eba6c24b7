"""Runs an exported file in the runtime that its users have: what `export` checks each file with."""

import dataclasses
import importlib
import os
import pathlib
import statistics
import time
from collections.abc import Callable
from typing import Any

import numpy as np

from keras_convnext import machine

# format -> the module that runs it, and the package that brings it
RUNTIMES = {
    "saved_model": ("tensorflow", "tensorflow"),
    "litert": ("ai_edge_litert", "ai-edge-litert"),
    "onnx": ("onnxruntime", "onnxruntime"),
    "openvino": ("openvino", "openvino"),
    "torch": ("torch", "torch"),
}


@dataclasses.dataclass(frozen=True)
class ExportedModel:
    """A file that is ready to run.

    Attributes:
        input_shape: (N, H, W, C), None for a size that is free.
        input_dtype: "uint8" or "float32"; pixels in 0..255 in both.
        call: uint8 or float32 (n, H, W, C) of the right n to float32 (n, ...).
    """

    input_shape: tuple[int | None, ...]
    input_dtype: str
    call: Callable[[np.ndarray], np.ndarray]

    def __call__(self, images: np.ndarray) -> np.ndarray:
        """Runs images, as many at a time as the file takes.

        Args:
            images: (n, H, W, C), pixels in 0..255.

        Returns:
            float32 (n, ...).

        Raises:
            ValueError: the images have another size than the file takes.
        """
        fits = len(images.shape) == 4 and all(
            own in (None, given) for own, given in zip(self.input_shape[1:], images.shape[1:], strict=True)
        )
        if not fits:
            sides = " x ".join("any" if side is None else str(side) for side in self.input_shape[1:])
            raise ValueError(
                f"Expected images of {sides} (height x width x channels), received an array of shape "
                f"{images.shape}. Resize them, or export with another image_size."
            )
        if self.input_dtype == "uint8" and images.dtype != np.uint8:
            images = np.clip(np.rint(images), 0, 255)
        images = images.astype(self.input_dtype)
        step = self.input_shape[0] or len(images)
        results = []
        for start in range(0, len(images), step):
            batch = images[start : start + step]
            lacking = step - len(batch)
            if lacking:
                batch = np.concatenate([batch, np.zeros((lacking, *batch.shape[1:]), batch.dtype)])
            results.append(self.call(batch)[: step - lacking])
        return np.concatenate(results)


def open_exported(
    path: str | os.PathLike[str], format: str | None = None, threads: int | None = None
) -> ExportedModel:
    """Loads a file that `export` wrote.

    Args:
        path: the file, or the folder of a SavedModel.
        format: "saved_model", "litert", "onnx", "openvino" or "torch"; default by the name.
        threads: cores to use, None for all. Without effect on a SavedModel and in PyTorch.

    Raises:
        ValueError: the format is not known.
        ImportError: the runtime is not installed; the message names its package.
        FileNotFoundError: there is no such file.
    """
    path = pathlib.Path(path)
    format = format or format_of(path)
    if format not in RUNTIMES:
        raise ValueError(f"Unknown format {format!r}. Known: {', '.join(RUNTIMES)}.")
    if not path.exists():
        raise FileNotFoundError(f"There is no '{path}'.")
    module, package = RUNTIMES[format]
    try:
        importlib.import_module(module)
    except ImportError as error:
        raise ImportError(
            f"Running a file in the format {format!r} needs {package}: pip install {package}"
        ) from error
    opener = {
        "saved_model": _open_saved_model,
        "litert": _open_litert,
        "onnx": _open_onnx,
        "openvino": _open_openvino,
        "torch": _open_torch,
    }[format]
    return opener(str(path), threads or machine.available_cores())


_SUFFIXES = {".tflite": "litert", ".onnx": "onnx", ".xml": "openvino", ".pt2": "torch"}


def format_of(path: str | os.PathLike[str]) -> str:
    """The format that a name means: by its suffix, "saved_model" where there is none.

    Raises:
        ValueError: the suffix belongs to no format.
    """
    suffix = pathlib.Path(path).suffix
    if suffix in _SUFFIXES:
        return _SUFFIXES[suffix]
    if suffix:
        known = ", ".join(f"{suffix} ({name})" for suffix, name in _SUFFIXES.items())
        raise ValueError(
            f"Expected a path whose suffix tells the format: {known}, or none for a SavedModel. Received: "
            f"'{path}'. Pass format= as well to use another suffix."
        )
    return "saved_model"


def take_turns(first: Callable[[], Any], second: Callable[[], Any], seconds: float) -> tuple[float, float]:
    """Median seconds of a call of each, called alternately for about `seconds` altogether."""
    first(), second()
    times: tuple[list[float], list[float]] = ([], [])
    while len(times[0]) < 3 or sum(map(sum, times)) < seconds:
        for function, taken in zip((first, second), times, strict=True):
            begin = time.perf_counter()
            function()
            taken.append(time.perf_counter() - begin)
    return statistics.median(times[0]), statistics.median(times[1])


def _open_saved_model(path, threads):
    import tensorflow as tf

    loaded = tf.saved_model.load(path)
    (spec,) = loaded.signatures["serving_default"].structured_input_signature[1].values()

    def call(images):  # keeps `loaded`: a signature alone does not keep its variables
        (result,) = loaded.signatures["serving_default"](images=tf.constant(images)).values()
        return np.asarray(result, "float32")

    return ExportedModel(tuple(spec.shape), spec.dtype.name, call)


def _open_litert(path, threads):
    from ai_edge_litert.interpreter import Interpreter

    interpreter = Interpreter(path, num_threads=threads)
    (source,), (target,) = interpreter.get_input_details(), interpreter.get_output_details()
    shape = tuple(None if side == -1 else int(side) for side in source["shape_signature"])
    if None not in shape:
        interpreter.allocate_tensors()

    def call(images):
        if None in shape and tuple(interpreter.get_input_details()[0]["shape"]) != images.shape:
            interpreter.resize_tensor_input(source["index"], images.shape)
            interpreter.allocate_tensors()
        interpreter.set_tensor(source["index"], images)
        interpreter.invoke()
        result = interpreter.get_tensor(target["index"])
        if result.dtype != np.float32:
            scale, zero_point = target["quantization"]
            result = (result.astype("float32") - zero_point) * scale
        return result

    return ExportedModel(shape, np.dtype(source["dtype"]).name, call)


def _open_onnx(path, threads):
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    (source,) = session.get_inputs()
    shape = tuple(side if isinstance(side, int) else None for side in source.shape)
    return ExportedModel(shape, "float32", lambda images: session.run(None, {source.name: images})[0])


def _open_openvino(path, threads):
    import openvino

    core = openvino.Core()
    model = core.read_model(path)
    # Without the first hint OpenVINO computes in bfloat16 where the processor can.
    settings = {"INFERENCE_PRECISION_HINT": "f32", "PERFORMANCE_HINT": "LATENCY"}
    compiled = core.compile_model(model, "CPU", settings | {"INFERENCE_NUM_THREADS": str(threads)})
    request = compiled.create_infer_request()
    shape = tuple(side.get_length() if side.is_static else None for side in model.input().partial_shape)
    return ExportedModel(shape, "float32", lambda images: request.infer([images])[0].copy())


def _open_torch(path, threads):
    import torch

    program = torch.export.load(path)
    module = program.module()
    name = program.graph_signature.user_inputs[0]
    placeholder = next(node for node in program.graph.nodes if node.name == name)
    shape = tuple(side if isinstance(side, int) else None for side in placeholder.meta["val"].shape)

    def call(images):
        with torch.no_grad():
            return module(torch.from_numpy(images)).numpy()

    return ExportedModel(shape, "float32", call)
