"""`export`: writes a model as a file for another runtime, and checks the file in that runtime."""

import dataclasses
import json
import os
import pathlib
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from typing import Any

import keras
import numpy as np

from keras_convnext import _environment
from keras_convnext._files import check_target
from keras_convnext._terminal import silenced
from keras_convnext.data.preprocessing import Preprocessing
from keras_convnext.data.segmentation.labels import Labels
from keras_convnext.exporting import deploy, metadata, runtimes, writers
from keras_convnext.exporting.formats import DEFAULT_SIZE, FORMATS
from keras_convnext.weights import arrays

# Largest difference from the model, relative to its largest output, that a file may have. With random
# weights float32 is at 1e-6, float16 at 1e-3, dynamic_int8 at 0.02 to 0.04, int8 at 0.04 to 0.12
# (benchmarks/exports).
TOLERANCES = {"float32": 1e-4, "float16": 1e-2, "dynamic_int8": 0.15, "int8": 0.3}
# How far 16 bits may take a model from its deployed form in float32: times what they change in that form.
_ROUNDING_MARGIN = 8
_MOST_NUMBERS = 1 << 27  # of all maps together that a file is compared with: 3 of 512 x 512 x 150
_SAVED_MODEL_FILES = (
    r"saved_model\.pb|fingerprint\.pb|keras_metadata\.pb|assets\.extra/metadata\.json|"
    r"variables/variables\.(index|data-\d{5}-of-\d{5})"
)
_STATE = (
    "Does a layer of your own keep something that neither its weights nor get_config() hold? Give it "
    "save_own_variables() and load_own_variables()."
)


class ExportError(ValueError):
    """A file could not be written, or is not what the model is."""


@dataclasses.dataclass(frozen=True)
class ExportResult:
    """What was written, and how it compares with the model as passed; without a check no images, and NaN."""

    path: pathlib.Path  # the file, or the folder of a SavedModel
    format: str
    precision: str  # of weights or arithmetic
    num_bytes: int  # of all files together
    num_images: int = 0  # that were compared
    images: str = ""  # what these are, such as "crops of three photographs"
    max_difference: float = float("nan")  # of an output from the model's
    relative_difference: float = float("nan")  # the same relative to the model's largest output
    # Share of the images, or of the pixels of maps, with the same largest output, in [0, 1].
    agreement: float = float("nan")
    milliseconds: float = float("nan")  # for an image in the file's runtime, median
    model_milliseconds: float = float("nan")  # for an image in the Keras model, in turns with the file's
    seconds: float = float("nan")  # that writing and checking took


def export(
    model: keras.Model,
    path: str | os.PathLike[str],
    format: str | None = None,
    *,
    precision: str = "float32",
    batch_size: int | str | None = "default",
    image_size: int | tuple[int, int] | None = None,
    calibration: Any = None,
    labels: Sequence[str] | Labels | None = None,
    licence: str | None = None,
    preprocessing: Preprocessing | None = None,
    check: bool | float = True,
    replace: bool = False,
) -> ExportResult:
    """Writes a model for another runtime, runs what was written, and compares it with the model.

    The file holds the deployed model (`deploy`), in float32 whatever the model's policy: it takes pixels in
    0..255, in the order N, H, W, C, and gives what the model gives. It is compared with the model that is
    passed; with another image size, which that does not take, with its deployed form of that size, after that
    was compared with the model at the model's own. Where a format's converter needs another backend than the
    one in use, a child process with that backend writes it. When something fails, nothing stays at the path.

    Args:
        model: a built functional or sequential `keras.Model`, of this package or around it.
        path: what to write: .tflite, .onnx, .xml (OpenVINO, with a .bin beside it), .pt2 (PyTorch's exported
            program) or a folder (SavedModel). What an app needs to know of the model is stored inside a
            LiteRT file, in a SavedModel's folder `assets.extra`, else beside it as `<name>.metadata.json`.
        format: "litert", "onnx", "openvino", "torch" or "saved_model"; default by the path's suffix.
        precision: "float32"; "float16" (weights; LiteRT, OpenVINO); "dynamic_int8" (weights in int8,
            activations quantised as they come; LiteRT); "int8" (both, uint8 pixels in; LiteRT).
        batch_size: number of images, None for any. Default: any; 1 for LiteRT, whose delegates want one.
        image_size: side in pixels or (height, width); None for the model's own. A model that takes any size
            keeps it free, at 224 for LiteRT; one of maps, as a segmentation model, is at that of
            `preprocessing` for LiteRT and OpenVINO.
        calibration: images for the check, and for int8 the ranges: uint8 or float (n, H, W, C) of the right
            size, pixels in 0..255, or what `calibration_images` takes. Default: crops of photographs.
        labels, licence: names of the classes, in order, and licence of the weights, stored with the file. Of
            a segmentation model `Labels`, whose palette is stored too.
        preprocessing: how images are prepared: stored with every file, and done by the SavedModel's
            signature "jpeg" and with images of `calibration`. Default: the defaults of `Preprocessing`. For
            a model of maps its size alone counts: the whole image is squeezed into that.
        check: whether to run the file and compare, else nothing is measured; or as a number the largest
            allowed difference relative to the model's largest output. Default: `TOLERANCES[precision]`, and
            for a model that computes in 16 bits what these change.
        replace: whether to write over a file at the path, or over a folder that holds only a SavedModel.

    Raises:
        ExportError: the converter failed, the file differs from the model by more than `check` allows, or
            the model gives numbers that are not finite.
        ValueError: an unknown format or precision, a model that is not built, sizes that do not fit, images
            for the check with pixels in another range than 0..255.
        ImportError: a package that the format needs is missing; the message says what to install.
        OSError: the path cannot be written, something is there and `replace` is False, or it is a folder
            with other files or a link to a folder, which is never replaced.

    Example:
        export(ConvNeXtTiny(), "tiny.tflite", precision="dynamic_int8").agreement   # share of equal top-1
    """
    begin = time.perf_counter()
    path = pathlib.Path(path)
    format = runtimes.format_of(path, format)
    row = FORMATS[format]
    if row.suffix and path.suffix != row.suffix:
        raise ValueError(f"Expected a path that ends in {row.suffix} for {format!r}, received '{path}'.")
    if precision not in row.precisions:
        raise ValueError(f"Precisions of {format!r}: {', '.join(row.precisions)}. Received: {precision!r}.")
    if not isinstance(check, bool) and not 0 <= check < float("inf"):  # nan would allow everything
        raise ValueError(f"Expected check to be a bool or a number from 0 up. Received: {check!r}.")
    _check_target(path, format, replace)
    _check_model(model)
    names = labels.names if isinstance(labels, Labels) else labels
    if names is not None and len(names) != model.output_shape[-1]:
        raise ValueError(f"Expected {model.output_shape[-1]} labels, one a class. Received: {len(names)}.")
    is_checked = check is not False
    _check_packages(format, precision, is_checked)
    batch: Any = row.batch_size if batch_size == "default" else batch_size
    deploy.check_batch_size(batch)
    preprocessing = preprocessing or Preprocessing(DEFAULT_SIZE)
    size = _image_size(model, image_size, format, preprocessing)
    if metadata.gives_maps(model):
        preprocessing = dataclasses.replace(
            preprocessing, resize_size=None, crop_mode="squash", crop_fraction=1.0, interpolation="bilinear"
        )
    sides = zip(size or model.input_shape[1:3], preprocessing.size, strict=True)
    height, width = (side or own for side, own in sides)
    preprocessing = preprocessing.at((height, width))
    if is_checked or precision == "int8":
        images, said = _calibration_images(model, calibration, preprocessing)
    if is_checked:
        compared = images[: _count_of_maps(model, preprocessing.size)]
        references = _references(model, size, compared, precision, check)
    with tempfile.TemporaryDirectory(prefix=f".tmp-{path.name}-", dir=path.parent) as temporary:
        folder = pathlib.Path(temporary)
        written = folder / "written" / path.name
        written.parent.mkdir()
        calibrated = str(folder / "calibration.npy") if precision == "int8" else None
        if calibrated:
            np.save(calibrated, images)
        request = writers.Request(format, precision, str(written), batch, size, calibrated, preprocessing)
        _write(model, request, row, folder)
        comparison: dict[str, Any] = {}
        if is_checked:
            comparison = _compare(references, request, compared)
            comparison["images"] = said + ", which it was calibrated with" * (precision == "int8")
        metadata.store(model, request, labels, licence)
        num_bytes = sum(file.stat().st_size for file in written.parent.rglob("*") if file.is_file())
        _move(written.parent, path, folder / "replaced")
    seconds = time.perf_counter() - begin
    return ExportResult(path, format, precision, num_bytes, **comparison, seconds=seconds)


def _check_target(path, format, replace):
    others = [path.with_suffix(".bin")] if format == "openvino" else []
    if format not in ("saved_model", "litert"):
        others += [path.with_name(f"{path.name}{end}") for end in (".data", ".metadata.json")]
    for target in (path, *others):
        _check_replaceable(target, is_folder=format == "saved_model")
        if os.path.lexists(target) and not replace:
            raise FileExistsError(f"'{target}' is there already. Pass replace=True (--force) to replace it.")
        if os.path.lexists(target) and not path.exists():  # PyTorch has weights named .bin
            raise FileExistsError(
                f"'{target}' is there already, and is not of '{path}', which is not there. Name another path."
            )
    if not os.access(path.parent, os.W_OK):
        raise PermissionError(f"The folder '{path.parent}' may not be written to. Choose another.")


def _check_replaceable(target, is_folder):
    """Refuses to replace what `export` does not write: a folder but a bare SavedModel; see `check_target`."""
    if target.is_symlink() or not target.is_dir():
        check_target(target)
        if is_folder and target.exists():
            raise FileExistsError(
                f"'{target}' is there already: a file, which a folder does not replace. Name another path, "
                "or remove the file."
            )
        return
    foreign = _not_of_a_saved_model(target)
    if foreign or not (target / "saved_model.pb").is_file():
        shown = ", ".join([*foreign[:3], *["..."] * (len(foreign) > 3)])
        raise FileExistsError(
            f"'{target}' is there already: a folder, and only one that holds a SavedModel and nothing else "
            f"is replaced. It holds {len(foreign)} other files or folders{shown and ': '}{shown}. Name "
            f"another path, such as '{target / 'model.tflite'}' for a file in it, or remove it yourself."
        )


def _not_of_a_saved_model(folder):
    """Names of what lies in a folder and is not part of a SavedModel as TensorFlow and `export` write it."""
    graph = folder / "saved_model.pb"
    if graph.is_symlink() or not graph.is_file():
        return sorted(path.name for path in folder.iterdir())
    content = graph.read_bytes()

    def belongs(path):
        name = path.relative_to(folder).as_posix()
        if path.is_symlink():
            return False
        if path.is_dir():
            return name in ("assets", "assets.extra", "variables")
        if path.parent == folder / "assets":  # the graph names the files that it reads
            return path.name.encode() in content
        return re.fullmatch(_SAVED_MODEL_FILES, name) is not None

    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if not belongs(path))


def _check_model(model):
    deploy.check_built(model)
    shape = getattr(model, "input_shape", None)
    if not isinstance(shape, tuple) or len(shape) != 4:
        raise ValueError(
            f"Expected a model with one input of images (N, H, W, C). Received: {model.name}, inputs "
            f"{shape}. Keras exports others: deploy(model).export(path, format=...), unchecked."
        )
    if not isinstance(model.output_shape, tuple):
        raise ValueError(
            f"Expected a model with one output. Received: {model.name}, outputs {model.output_shape}. "
            "Export keras.Model(model.input, one_output)."
        )


def _check_packages(format, precision, is_checked):
    row = FORMATS[format]
    needed = row.converters + (row.quantizers if "int8" in precision else ())
    needed += (row.runtime,) if is_checked else ()
    missing = [name for name in dict.fromkeys(needed) if not _environment.is_installed(name)]
    if missing:
        raise ImportError(_environment.missing_text(f"The format {format!r}", *missing))


def _image_size(model, image_size, format, preprocessing):
    """(height, width), None for a free size."""
    if image_size is not None:
        return deploy.sides(image_size)
    own = model.input_shape[1:3]
    # Keras traces a graph of OpenVINO at one size, whose maps are then resized to constant sizes.
    is_free = FORMATS[format].free_size and not (metadata.gives_maps(model) and format == "openvino")
    default = preprocessing.size if metadata.gives_maps(model) else (DEFAULT_SIZE, DEFAULT_SIZE)
    if None in own and is_free:
        return None
    return tuple(side or other for side, other in zip(own, default, strict=True))


def _count_of_maps(model, size):
    """How many images of a size a file is compared with, None for all: maps of many classes are large."""
    if not metadata.gives_maps(model):
        return None
    return max(1, _MOST_NUMBERS // (size[0] * size[1] * model.output_shape[-1]))


def _step(model, images):
    """How many images go to a model at a time."""
    if not metadata.gives_maps(model):
        return 8
    return max(1, min(8, (_MOST_NUMBERS >> 2) // (images[0, ..., 0].size * model.output_shape[-1])))


def _calibration_images(model, calibration, preprocessing):
    """uint8 (n, H, W, C), and what they are, in words."""
    channels = model.input_shape[3]
    height, width = preprocessing.size
    if calibration is None or isinstance(calibration, (str, os.PathLike)):
        from keras_convnext.data.calibration import calibration_images  # not when the package is imported

        said = "crops of three photographs" if calibration is None else f"images of '{calibration}'"
        return calibration_images(calibration, preprocessing=preprocessing, channels=channels), said
    images = np.asarray(calibration)
    if images.ndim != 4 or len(images) == 0 or images.shape[1:] != (height, width, channels):
        raise ValueError(
            f"Expected calibration images (n, {height}, {width}, {channels}) with pixels in 0..255, received "
            f"an array of shape {images.shape}."
        )
    lowest, highest = (extreme(images, axis=(1, 2, 3)).astype("float64") for extreme in (np.min, np.max))
    # Fractions up to 1 were divided by 255; whole numbers up to 1 may be one dark picture of many.
    divided = (highest <= 1) & (highest > 0) & (images.dtype.kind == "f")
    if not (lowest.min() >= 0 and 1 < highest.max() <= 255) or divided.any():  # NaN fails too
        some = divided.any() and highest.max() > 1
        raise ValueError(
            f"Expected calibration images with pixels in 0..255, received {images.dtype} from "
            f"{lowest.min():g} to {highest.max():g}"
            + (f", and up to {highest[divided][0]:g} in image {divided.argmax()}" if some else "")
            + ". Pass them as read_image gives them; a model of other numbers needs a Rescaling in front."
        )
    return np.rint(images).astype("uint8"), "images of calibration="


def _write(model, request, row, folder):
    """Writes the file here, or in a process with the backend that can."""
    title = f"{request.format} in {request.precision}"
    if keras.backend.backend() == row.backend:
        try:
            with silenced(stdout=True):
                writers.write(model, request)
        except (ValueError, OSError, ImportError, TypeError):
            raise
        except Exception as error:  # converters raise of many classes
            raise ExportError(f"{title}: the converter failed: {error}") from error
        return
    try:
        with silenced():  # Keras looks for TensorFlow here
            model.save(folder / "model.keras")
    except Exception as error:
        raise ExportError(
            f"{title} needs Keras on {row.backend}, and the model could not be saved for it: {error}"
        ) from error
    request_path = folder / "request.json"
    request_path.write_text(json.dumps(dataclasses.asdict(request)))
    # Nothing of the working folder is imported: -P, and no empty part of PYTHONPATH, which means it.
    folders = [str(pathlib.Path(__file__).resolve().parents[2])]
    folders += filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))
    environment = os.environ | {
        "KERAS_BACKEND": row.backend,
        "TF_CPP_MIN_LOG_LEVEL": "3",
        "CUDA_VISIBLE_DEVICES": "-1",
        "PYTHONPATH": os.pathsep.join(folders),
    }
    code = "from keras_convnext.exporting.writers import main; main()"
    done = subprocess.run(
        [sys.executable, "-P", "-c", code, str(request_path)],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        check=False,
    )
    if done.returncode != 0 or not os.path.exists(request.path):
        lines = [line for line in done.stdout.splitlines() if line.strip()]
        errors = [line for line in lines if re.match(r"[\w.]*(Error|Exception)\b", line)]
        said = [f"exit status {done.returncode}", *lines[-1:], *errors[-1:]][-1]
        raise ExportError(f"{title}: the process with Keras on {row.backend} failed: {said}")


def _references(model, size, images, precision, check):
    """What the file must equal on the images: (model, its outputs, difference allowed), the last to report.

    Where the model does not compute in float32 and at `size`, as the file does, the first is its deployed
    form that does, which is compared with the model in its own size before.
    """
    limit = TOLERANCES[precision] if check is True else check
    is_exact = not deploy.dtypes_of_16_bits(model)
    own = model.input_shape[1:]
    fits = size is None or all(side in (None, wanted) for side, wanted in zip(own[:2], size, strict=True))
    if fits and is_exact:
        return [(model, _outputs(model, images), limit)]
    if fits:
        sample = images
    else:
        sides = [side or wanted for side, wanted in zip(own, (*size, None), strict=True)]
        sample = np.random.default_rng(0).integers(0, 256, (4, *sides), "uint8")
    copy = deploy.deploy_for_file(model)
    expected, copied = _outputs(model, sample), _outputs(copy, sample)
    allowed = TOLERANCES["float32"]
    if not is_exact:
        rounded = _difference(_outputs(deploy.deploy(model), sample), copied)
        allowed += max(2**-8, _ROUNDING_MARGIN * rounded)  # bfloat16 has 8 bits
    difference = _difference(copied, expected)
    if difference > (allowed if check is True else max(allowed, check)):
        raise ExportError(
            f"{model.name} cannot be written: its deployed form differs from it by {difference:.2g} of its "
            f"largest output; {allowed:.2g} is allowed. {_STATE}"
        )
    if fits:
        return [(copy, copied, limit), (model, expected, limit + allowed if check is True else check)]
    resized = deploy.deploy_for_file(model, image_size=size)
    return [(resized, _outputs(resized, images), limit)]


def _difference(received, expected):
    """The largest of an output, relative to the largest output."""
    return float(np.abs(received - expected).max()) / max(float(np.abs(expected).max()), 1e-30)


def _outputs(model, images):
    """What a model gives for uint8 images, float64, maps float32; ExportError where that is not finite."""
    pixels, step = images.astype("float32"), _step(model, images)
    parts = [model.predict_on_batch(pixels[i : i + step]) for i in range(0, len(pixels), step)]
    outputs = np.concatenate(parts).astype("float32" if metadata.gives_maps(model) else "float64")
    bad = arrays.not_finite(outputs)
    if bad.any():
        raise ExportError(
            f"{model.name} gives numbers that are not finite for {bad.sum()} of {len(images)} images, as "
            "after a training that diverged. Nothing was kept."
        )
    return outputs


def _compare(references, request, images):
    """Runs the file on the images of the references; the fields of `ExportResult` that come of it."""
    file = f"The {request.format} file"
    try:
        exported = runtimes.open_exported(request.path, request.format)
        step = _step(references[0][0], images) if references[0][1].ndim == 4 else len(images)
        received = np.concatenate([exported(images[i : i + step]) for i in range(0, len(images), step)])
    except ImportError:
        raise
    except Exception as error:  # runtimes raise of many classes
        raise ExportError(f"{file} does not run: {error}. It was not kept.") from error
    received = received.astype(references[0][1].dtype)
    for _, expected, tolerance in references:
        if received.shape != expected.shape:
            raise ExportError(
                f"{file} gives the shape {received.shape}, the model {expected.shape}. It was not kept."
            )
        relative = _difference(received, expected)
        agreement = float((received.argmax(-1) == expected.argmax(-1)).mean())
        if relative > tolerance:
            advice = "Calibrate it with images of your own, or choose another precision."
            raise ExportError(
                f"{file} differs from the model by {relative:.2g} of its largest output on {len(images)} "
                f"images (same top-1 on {agreement:.0%}); {tolerance:.2g} is allowed. It was not kept. "
                f"{advice if 'int8' in request.precision else _STATE} check= (--tolerance) allows more."
            )
    model = references[-1][0]
    count = exported.input_shape[0] or 1
    batch = np.resize(images, (count, *images.shape[1:]))  # some twice where they are too few
    batch, floats = batch.astype(exported.input_dtype), batch.astype("float32")
    taken = runtimes.take_turns(lambda: exported.call(batch), lambda: model.predict_on_batch(floats))
    milliseconds, model_milliseconds = (1000 * seconds / count for seconds in taken)
    return {
        "num_images": len(images),
        "max_difference": float(np.abs(received - expected).max()),
        "relative_difference": relative,
        "agreement": agreement,
        "milliseconds": milliseconds,
        "model_milliseconds": model_milliseconds,
    }


def _move(folder, path, replaced):
    """Moves the written files to the folder of the path; the file that the path names comes last."""
    for written in sorted(folder.iterdir(), key=lambda file: file.name == path.name):
        target = path.with_name(written.name)
        _check_replaceable(target, written.is_dir())  # once more, as writing takes minutes
        if target.is_dir():
            os.replace(target, replaced)
        try:
            os.replace(written, target)
        except OSError:
            if replaced.exists():
                os.replace(replaced, target)
            raise
        if replaced.exists():
            shutil.rmtree(replaced)
