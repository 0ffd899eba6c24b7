"""`open_exported`: runs an exported file in the runtime of its users; `export` checks each file with it."""

import dataclasses
import os
import pathlib
import statistics
import time
import zipfile
from collections.abc import Callable
from typing import Any

import numpy as np

from keras_convnext import _environment, _files
from keras_convnext._messages import shortened, unknown
from keras_convnext._terminal import silenced
from keras_convnext.data.preprocessing import Preprocessing, is_positive_integer
from keras_convnext.exporting.formats import DEFAULT_SIZE, FORMATS

_FORMAT_OF = {row.suffix: name for name, row in FORMATS.items()}


@dataclasses.dataclass(frozen=True)
class ExportedModel:
    """A file that is ready to run."""

    input_shape: tuple[int | None, ...]  # (N, H, W, C), None for a size that is free
    input_dtype: str  # "uint8" or "float32"; pixels in 0..255 in both
    output_shape: tuple[int | None, ...]  # (N, ...), None for a size that is free
    call: Callable[[np.ndarray], np.ndarray]  # of `input_dtype`, (N, H, W, C), to float32 (N, ...)
    metadata: dict[str, Any] = dataclasses.field(default_factory=dict)  # `read_metadata`

    def __call__(self, images: np.ndarray) -> np.ndarray:
        """float32 (n, ...) of images (n, H, W, C), pixels in 0..255; as many at a time as the file takes.

        Raises a ValueError for images of another size, and where a number that comes out is not finite.
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
        step = self.input_shape[0] or len(images) or 1
        padding = np.zeros((-len(images) % step, *images.shape[1:]), images.dtype)
        padded = np.concatenate([images, padding])
        results = [self.call(padded[start : start + step]) for start in range(0, len(padded), step)]
        outputs = np.concatenate(results)[: len(images)]
        if not np.isfinite(outputs).all():
            raise ValueError(
                f"{self.metadata.get('name') or 'The file'} gives numbers that are not finite, as after a "
                "training that diverged. Export another model."
            )
        return outputs


def open_exported(
    path: str | os.PathLike[str], format: str | None = None, threads: int | None = None
) -> ExportedModel:
    """Loads a file that `export` wrote, or the folder of a SavedModel; its name tells the format by default.

    `threads` is the number of cores to use, None for all; without effect on a SavedModel and in PyTorch.
    Raises a ValueError where the format is not known or the runtime cannot open the file, an ImportError
    where the runtime is not installed, a FileNotFoundError where there is no such file.
    """
    path = pathlib.Path(path)
    format = format_of(path, format)
    if not path.exists():
        raise FileNotFoundError(f"There is no '{path}'.")
    runtime = FORMATS[format].runtime
    _environment.require(runtime, f"Running a file in the format {format!r}")
    try:
        with silenced():
            exported = _OPENERS[format](str(path), threads or _environment.available_cores())
    except Exception as error:  # runtimes raise of many classes
        raise ValueError(f"{runtime} cannot open '{path}': {error}") from error
    return dataclasses.replace(exported, metadata=read_metadata(path))


def read_metadata(path: str | os.PathLike[str]) -> dict[str, Any]:
    """What `export` stored with a file: name, input, output, precision, licence, labels; {} without.

    The output of a segmentation model has the "task" of that name and the colours of its classes, "palette".

    Raises a ValueError that names the file where a value is of another kind than `export` writes.
    """
    path = pathlib.Path(path)
    file = path if path.suffix == ".tflite" else metadata_file(path)
    if not file.is_file() or (file == path and not zipfile.is_zipfile(path)):
        return {}
    with _files.reading(file, "what `keras-convnext export` writes", "Export the model again."):
        if file != path:
            text = _files.read_bytes(file)
        else:
            with zipfile.ZipFile(path) as archive:
                if "metadata.json" not in archive.namelist():
                    return {}
                with archive.open("metadata.json") as member:
                    text = member.read(_files.MAX_TEXT_BYTES)  # what is cut off is no JSON
        metadata = _files.json_object(text, {"input": dict, "output": dict})
        values = metadata | metadata["output"]
        classes, labels = values.get("classes"), values.get("labels")
        are_texts = isinstance(labels, list) and all(isinstance(label, str) for label in labels)
        checks = {
            name: ("a text", isinstance(values.get(name), str | None))
            for name in ("name", "licence", "precision", "activation")
        }
        checks["classes"] = "a whole number above 0", is_positive_integer(classes)
        checks["labels"] = f"{classes} texts", labels is None or (are_texts and len(labels) == classes)
        palette = values.get("palette")
        are_colours = isinstance(palette, list) and all(_is_colour(colour) for colour in palette)
        checks["palette"] = (
            f"{classes} colours [R, G, B] of 0 to 255",
            palette is None or (are_colours and len(palette) == classes),
        )
        for name, (expected, fits) in checks.items():
            if not fits:
                received = shortened(repr(values.get(name)), 80)
                raise TypeError(f"expected {expected} as {name!r}, received {received}")
        preprocessing = stored_preprocessing(metadata) or Preprocessing(DEFAULT_SIZE)
        preprocessing.at(metadata["input"].get("image_size"))  # raises for sizes out of range
        return metadata


def _is_colour(value: object) -> bool:
    return isinstance(value, list) and len(value) == 3 and all(part in range(256) for part in value)


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
    has_suffix = path.suffix != "" and path.suffix in _FORMAT_OF
    return has_suffix or (path / "saved_model.pb").is_file()


def format_of(path: str | os.PathLike[str], format: str | None = None) -> str:
    """The format, or that which a name means: by its suffix, "saved_model" where there is none."""
    if format is not None:
        if format not in FORMATS:
            raise ValueError(f"{unknown('format', format, FORMATS)}.")
        return format
    suffix = pathlib.Path(path).suffix
    if suffix not in _FORMAT_OF:
        known = ", ".join(f"{suffix} ({name})" for suffix, name in _FORMAT_OF.items() if suffix)
        raise ValueError(
            f"Expected a path whose suffix tells the format: {known}, or none for a SavedModel. Received: "
            f"'{path}'. Pass format= as well to use another suffix."
        )
    return _FORMAT_OF[suffix]


def take_turns(first: Callable[[], Any], second: Callable[[], Any]) -> tuple[float, float]:
    """Median seconds of a call of each, in turns for about a second of timed calls altogether.

    Of two calls in a turn the second is timed: in the first, threads of the other may spin, its own sleep.
    """
    times: tuple[list[float], list[float]] = ([], [])
    while len(times[0]) < 3 or sum(map(sum, times)) < 1:
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
    shape, output_shape = (_sides(tensor["shape_signature"].tolist()) for tensor in (source, target))
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
    return ExportedModel(shape, "float32", output_shape, lambda x: session.run(None, {source.name: x})[0])


def _sides(shape):
    """A shape with None for the sides that are free: named, or -1."""
    return tuple(side if isinstance(side, int) and side >= 0 else None for side in shape)


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


_OPENERS = {
    "saved_model": _open_saved_model,
    "litert": _open_litert,
    "onnx": _open_onnx,
    "openvino": _open_openvino,
    "torch": _open_torch,
}
