"""`open_exported`: runs an exported file in the runtime of its users; `export` checks each file with it."""

import dataclasses
import importlib
import json
import os
import pathlib
import statistics
import time
import zipfile
from collections.abc import Callable
from typing import Any

import numpy as np

from keras_convnext import _environment
from keras_convnext._messages import unknown
from keras_convnext._terminal import silenced
from keras_convnext.data.preprocessing import Preprocessing

# format -> the module that runs it, and the package that brings it
RUNTIMES = {
    "saved_model": ("tensorflow", "tensorflow"),
    "litert": ("ai_edge_litert", "ai-edge-litert"),
    "onnx": ("onnxruntime", "onnxruntime"),
    "openvino": ("openvino", "openvino"),
    "torch": ("torch", "torch"),
}
_SUFFIXES = {".tflite": "litert", ".onnx": "onnx", ".xml": "openvino", ".pt2": "torch"}


@dataclasses.dataclass(frozen=True)
class ExportedModel:
    """A file that is ready to run."""

    input_shape: tuple[int | None, ...]  # (N, H, W, C), None for a size that is free
    input_dtype: str  # "uint8" or "float32"; pixels in 0..255 in both
    output_shape: tuple[int | None, ...]  # (N, ...), None for a size that is free
    call: Callable[[np.ndarray], np.ndarray]  # of `input_dtype`, (N, H, W, C), to float32 (N, ...)
    metadata: dict[str, Any] = dataclasses.field(default_factory=dict)  # `read_metadata`

    def __call__(self, images: np.ndarray) -> np.ndarray:
        """float32 (n, ...) of images (n, H, W, C), pixels in 0..255; as many at a time as the file takes."""
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
    """Loads a file that `export` wrote, or the folder of a SavedModel; its name tells the format by default.

    `threads` is the number of cores to use, None for all; without effect on a SavedModel and in PyTorch.
    Raises a ValueError where the format is not known or the runtime cannot open the file, an ImportError
    where the runtime is not installed, a FileNotFoundError where there is no such file.
    """
    path = pathlib.Path(path)
    format = format or format_of(path)
    if format not in RUNTIMES:
        raise ValueError(f"{unknown('format', format, RUNTIMES)}.")
    if not path.exists():
        raise FileNotFoundError(f"There is no '{path}'.")
    module, package = RUNTIMES[format]
    try:
        with silenced():
            importlib.import_module(module)
    except ImportError as error:
        what = f"Running a file in the format {format!r}"
        raise ImportError(_environment.missing_text(what, package)) from error
    opener = {
        "saved_model": _open_saved_model,
        "litert": _open_litert,
        "onnx": _open_onnx,
        "openvino": _open_openvino,
        "torch": _open_torch,
    }[format]
    try:
        with silenced():
            exported = opener(str(path), threads or _environment.available_cores())
    except Exception as error:  # runtimes raise of many classes
        raise ValueError(f"{package} cannot open '{path}': {error}") from error
    return dataclasses.replace(exported, metadata=read_metadata(path))


def read_metadata(path: str | os.PathLike[str]) -> dict[str, Any]:
    """What `export` stored with a file: name, input, output, precision, licence, labels; {} without."""
    path = pathlib.Path(path)
    try:
        if path.suffix == ".tflite":
            if not zipfile.is_zipfile(path):
                return {}
            with zipfile.ZipFile(path) as archive:
                is_stored = "metadata.json" in archive.namelist()
                return json.loads(archive.read("metadata.json")) if is_stored else {}
        file = metadata_file(path)
        return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    except (ValueError, zipfile.BadZipFile) as error:
        raise ValueError(
            f"The metadata of '{path}' cannot be read ({error}). Export the model again."
        ) from error


def stored_preprocessing(metadata: dict[str, Any]) -> Preprocessing | None:
    """How the metadata of an exported file say that its images are prepared; None where they do not."""
    about = metadata.get("input", {})
    if about.get("preprocessing"):
        return Preprocessing(**about["preprocessing"])
    older = about.get("preparation")  # the words of files that were exported before `Preprocessing`
    size = about.get("image_size")
    if not older or not (older.get("image_size") or size):
        return None
    return Preprocessing.from_stored(**{"image_size": size} | older)


def metadata_file(path: pathlib.Path) -> pathlib.Path:
    """Where the metadata of an exported file lies that has no room for it: next to it, or in a SavedModel."""
    if path.is_dir():
        return path / "assets.extra" / "metadata.json"
    return path.with_name(f"{path.name}.metadata.json")


def is_exported(path: str | os.PathLike[str]) -> bool:
    """Whether a name is that of a file for one of the runtimes, or of the folder of a SavedModel."""
    path = pathlib.Path(path)
    return path.suffix in _SUFFIXES or (path / "saved_model.pb").is_file()


def format_of(path: str | os.PathLike[str]) -> str:
    """The format that a name means: by its suffix, "saved_model" where there is none."""
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
    """Median seconds of a call of each, in turns for about `seconds` of timed calls altogether.

    In its turn each is called twice and the second call timed: threads of the other may still spin in the
    first, and its own may sleep.
    """
    times: tuple[list[float], list[float]] = ([], [])
    while len(times[0]) < 3 or sum(map(sum, times)) < seconds:
        for function, taken in zip((first, second), times, strict=True):
            function()
            begin = time.perf_counter()
            function()
            taken.append(time.perf_counter() - begin)
    return statistics.median(times[0]), statistics.median(times[1])


def _open_saved_model(path, threads):
    import tensorflow as tf

    loaded = tf.saved_model.load(path)
    (spec,) = loaded.signatures["serving_default"].structured_input_signature[1].values()
    (result_spec,) = loaded.signatures["serving_default"].structured_outputs.values()

    def call(images):  # keeps `loaded`: a signature alone does not keep its variables
        (result,) = loaded.signatures["serving_default"](images=tf.constant(images)).values()
        return np.asarray(result, "float32")

    return ExportedModel(tuple(spec.shape), spec.dtype.name, tuple(result_spec.shape), call)


def _open_litert(path, threads):
    from ai_edge_litert.interpreter import Interpreter

    interpreter = Interpreter(path, num_threads=threads)
    (source,), (target,) = interpreter.get_input_details(), interpreter.get_output_details()
    shape, output_shape = (
        tuple(None if side == -1 else int(side) for side in tensor["shape_signature"])
        for tensor in (source, target)
    )
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

    return ExportedModel(shape, np.dtype(source["dtype"]).name, output_shape, call)


def _open_onnx(path, threads):
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    (source,), (target,) = session.get_inputs(), session.get_outputs()
    shape, output_shape = (_sides(tensor.shape) for tensor in (source, target))
    return ExportedModel(
        shape, "float32", output_shape, lambda images: session.run(None, {source.name: images})[0]
    )


def _sides(shape):
    """A shape with None for the sides that are free."""
    return tuple(side if isinstance(side, int) else None for side in shape)


def _open_openvino(path, threads):
    import openvino

    core = openvino.Core()
    model = core.read_model(path)
    # Without the first hint OpenVINO computes in bfloat16 where the processor can.
    settings = {"INFERENCE_PRECISION_HINT": "f32", "PERFORMANCE_HINT": "LATENCY"}
    compiled = core.compile_model(model, "CPU", settings | {"INFERENCE_NUM_THREADS": str(threads)})
    request = compiled.create_infer_request()
    shape, output_shape = (
        tuple(side.get_length() if side.is_static else None for side in tensor.partial_shape)
        for tensor in (model.input(), model.output())
    )
    return ExportedModel(shape, "float32", output_shape, lambda images: request.infer([images])[0].copy())


def _open_torch(path, threads):
    import torch

    program = torch.export.load(path)
    module = program.module()
    names = program.graph_signature.user_inputs[0], program.graph_signature.user_outputs[0]
    values = {node.name: node.meta["val"] for node in program.graph.nodes if node.name in names}
    shape, output_shape = (_sides(values[name].shape) for name in names)

    def call(images):
        with torch.no_grad():
            return module(torch.from_numpy(images)).numpy()

    return ExportedModel(shape, "float32", output_shape, call)
