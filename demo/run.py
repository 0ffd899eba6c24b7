"""`make demo`: classifies, fine-tunes, looks inside, exports and measures, without a network.

    python -m demo.run --data photos/ --output out/photos

The output folder gets report.html, one page with all of it, findings.json, the model and its files. Exit
code 1 when a step did not work, 2 when nothing could be done, with a line that says why.
"""

import argparse
import contextlib
import dataclasses
import importlib.resources
import json
import logging
import os
import pathlib
import random
import shlex
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from importlib import metadata
from typing import Any

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

try:  # TensorFlow's start-up lines obey none of its settings
    _begin, _stderr = time.perf_counter(), os.dup(2)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
    import keras_convnext

    # isort: split
    import keras
finally:
    os.dup2(_stderr, 2)
import numpy as np
from PIL import Image

from demo import report
from demo.photos import PREPROCESSING, SIDE, PhotoSet, batches, read_photos
from keras_convnext import _environment, predictor
from keras_convnext._terminal import silenced
from keras_convnext.data import class_names, preprocess
from keras_convnext.data.preprocessing import Preprocessing
from keras_convnext.evaluation import gradcam
from keras_convnext.exporting import runtimes
from keras_convnext.exporting.export import ExportError, export
from keras_convnext.variants import VARIANTS
from keras_convnext.weights import catalog

MARKER = ".keras_convnext_demo"  # of a folder that a demo writes to
IMPORT_SECONDS = time.perf_counter() - _begin
WEIGHTS = "convnextv2_atto.tiny_imagenet200"  # come with the package
ARCHITECTURE = "convnextv2_atto"  # of weights="imagenet"
# Photographs of the package -> first words of the names that are right.
RIGHT_NAMES = {
    "cat.jpg": ("tabby", "tiger cat", "Egyptian cat", "Persian cat"),
    "coffee.jpg": ("espresso",),
    "rocket.jpg": ("projectile", "missile"),
}
TRAINING_BACKENDS = ("tensorflow", "jax", "torch")
BEST_CLASSES = 5
SHOWN_SIDE = 256  # pixels, the least of a photograph on the page
BATCH_SIZE = 16
PHOTOS_SEEN = 1_200  # in a training without --epochs
MOST_EPOCHS = 5
LIMIT = 1_000
LEARNING_RATE = 1e-3  # the peak of the cosine
WEIGHT_DECAY = 0.05
CALIBRATION_PHOTOS = 64
TIMED_CALLS = 40
MOST_LOOKS = 8  # photos with heat maps
HEAT_LEVEL = "P4"  # one value for 16 x 16 pixels; the last stage has but 3 x 3 of them at 96 pixels


@dataclasses.dataclass(frozen=True)
class Settings:
    """Settings of a demo.

    Attributes:
        output: folder to write to, made where it is not there.
        weights: tag or weight file to start from; "imagenet" for the published ones of `ARCHITECTURE`.
        data: folder of class folders to learn; None for the flowers of the repository.
        epochs: of each training; None for 5, fewer where there are more photos.
        seed: of the draw of photos, the new weights and the order.
        limit: most photos to learn from and to hold out, drawn by seed, the same number of each class.
    """

    output: pathlib.Path
    weights: str = WEIGHTS
    data: pathlib.Path | None = None
    epochs: int | None = None
    seed: int = 0
    limit: int = LIMIT


@dataclasses.dataclass(frozen=True)
class ClassifiedPhoto:
    """A photograph and what a model says of it.

    Attributes:
        name: of the file.
        picture: uint8 (H, W, 3), what the model is shown, of its size or larger.
        heat: uint8 (H, W, 3), the picture with the places that speak for the first class.
        best: (name of the class, probability) of the likeliest, in order.
        right: names of the right classes.
        is_right: whether the first class is right.
        photographer, address: whom to credit, "" where nobody need be.
    """

    name: str
    picture: np.ndarray
    heat: np.ndarray
    best: list[tuple[str, float]]
    right: list[str]
    is_right: bool
    photographer: str = ""
    address: str = ""


@dataclasses.dataclass(frozen=True)
class Training:
    """Accuracies and time of a training.

    Attributes:
        title: "pretrained" or "from scratch".
        learning_rate: the peak.
        accuracy, held_out_accuracy: of each epoch, in [0, 1]; the first of photos as they are shifted and
            mirrored, while the weights change.
        seconds: of all epochs.
    """

    title: str
    learning_rate: float
    accuracy: list[float]
    held_out_accuracy: list[float]
    seconds: float


@dataclasses.dataclass(frozen=True)
class Runner:
    """The fine-tuned model in one of its forms.

    Attributes:
        title: what reports call it.
        num_bytes: of its file.
        accuracy: on the held-out photos, in [0, 1].
        agreement: share of these with the Keras model's first class, in [0, 1].
        milliseconds: for a photo, median.
    """

    title: str
    num_bytes: int
    accuracy: float
    agreement: float
    milliseconds: float


@dataclasses.dataclass
class Findings:
    """All that a demo found; what a step that failed would have given is empty.

    Attributes:
        weights: name of the weights that it started from.
        photos: the package's photographs.
        classes, num_training, num_held_out, data_title: of the photos that were learned.
        trainings: the pretrained model's and that from scratch.
        looks: held-out photos and what the fine-tuned model says of them.
        runners: the Keras model and its files.
        timed_calls: of each runner.
        problems: a line for each step that did not work.
        machine: versions and hardware.
        seconds: of each part, in order.
    """

    weights: str = ""
    photos: list[ClassifiedPhoto] = dataclasses.field(default_factory=list)
    classes: list[str] = dataclasses.field(default_factory=list)
    num_training: int = 0
    num_held_out: int = 0
    data_title: str = ""
    trainings: list[Training] = dataclasses.field(default_factory=list)
    looks: list[ClassifiedPhoto] = dataclasses.field(default_factory=list)
    runners: list[Runner] = dataclasses.field(default_factory=list)
    timed_calls: int = 0
    problems: list[str] = dataclasses.field(default_factory=list)
    machine: dict[str, str] = dataclasses.field(default_factory=dict)
    seconds: dict[str, float] = dataclasses.field(default_factory=dict)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the demo as the command line says and returns the exit code."""
    options = _parser().parse_args(arguments)
    logging.getLogger("tensorflow").setLevel(logging.ERROR)  # its advice is for whoever wrote the program
    settings = Settings(**vars(options))
    try:
        found = run(settings)
        page = report.write_page(found, settings.output / "report.html", _command(settings))
    except KeyboardInterrupt:
        return 130
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    _say(f"\nSeconds: {report.seconds_text(found.seconds)}")
    _say(f"Look at {page}")
    surest = surest_right_photo(found)
    if surest is None:
        _say("None of the photographs was classified rightly.")
    else:
        _say(f"{surest[0]}: {surest[1]}, {surest[2]:.1%}")
    return 1 if found.problems else 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m demo.run", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    output = pathlib.Path("out/demo")
    parser.add_argument(
        "--output", type=pathlib.Path, default=output, metavar="DIR", help=f"default {output}"
    )
    parser.add_argument(
        "--data", type=pathlib.Path, metavar="DIR", help="a folder of photos for each class, default flowers"
    )
    parser.add_argument(
        "--weights",
        default=WEIGHTS,
        metavar="TAG|FILE",
        help=f"to start from, default those in the package; imagenet: the published ones of {ARCHITECTURE}",
    )
    parser.add_argument(
        "--epochs", type=_positive, metavar="N", help=f"of each training, default {MOST_EPOCHS} or fewer"
    )
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of draw, weights and order")
    parser.add_argument(
        "--limit", type=_positive, default=LIMIT, metavar="N", help=f"most photos to use, default {LIMIT}"
    )
    return parser


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number from 1 up, received {text!r}")
    return int(text)


def _command(settings: Settings) -> str:
    """The command that was given, as it can be given again."""
    words = ["python", "-m", "demo.run"]
    for field in dataclasses.fields(settings):
        value = getattr(settings, field.name)
        if value != field.default:
            words += [f"--{field.name}", str(value)]
    return shlex.join(words)


def run(settings: Settings) -> Findings:
    """Runs all steps, says on standard output what each finds, and writes the files.

    In the output folder: model.keras and model.labels.txt (`keras-convnext predict --weights` takes them),
    model_float32.tflite, model_int8.tflite, and findings.json with every number.

    Args:
        settings: `Settings`.

    Returns:
        `Findings`; a step that lacks a package, or whose file is not what the model is, is in its `problems`.

    Raises:
        ValueError: unknown weights, unusable photos, a backend that cannot train; the message tells.
        OSError: the weights cannot be fetched, or a file cannot be written; the output folder holds what no
            demo wrote.

    Example:
        run(Settings(pathlib.Path("out/demo"), epochs=5)).trainings[0].held_out_accuracy[-1]
    """
    if keras.backend.backend() not in TRAINING_BACKENDS:
        raise ValueError(
            f"Expected a backend that trains: {', '.join(TRAINING_BACKENDS)}. Received: KERAS_BACKEND="
            f"{keras.backend.backend()}."
        )
    check_output(settings.output)
    photos = read_photos(settings.data, settings.limit, settings.seed)  # what is wrong with them comes first
    weights = catalog.IMAGENET[ARCHITECTURE] if settings.weights == "imagenet" else settings.weights
    seconds = {"start": IMPORT_SECONDS}
    with _timed(seconds, "photographs"):
        opened = open_weights(str(weights))
        classified = classify_photos(opened)
    found = Findings(
        weights=opened.row.tag if opened.row else pathlib.Path(str(weights)).name,
        photos=classified,
        classes=photos.classes,
        num_training=len(photos.training),
        num_held_out=len(photos.held_out),
        data_title=photos.title,
        timed_calls=TIMED_CALLS,
        machine=environment(),
        seconds=seconds,
    )

    _say(f"[1/4] {len(RIGHT_NAMES)} photographs, classified with {found.weights}")
    for photo in found.photos:
        _say_photo(photo)

    epochs = settings.epochs or min(max(round(PHOTOS_SEEN / len(photos.training)), 2), MOST_EPOCHS)
    _say(
        f"\n[2/4] {photos.title}: {len(photos.training):,} photos of {len(photos.classes)} kinds to learn, "
        f"{len(photos.held_out):,} held out; {epochs} epochs from the weights, then {epochs} from scratch"
    )
    with _timed(seconds, "trainings"):
        model, found.trainings = train(opened, photos, epochs, settings.seed)
    for each in found.trainings:
        _say(
            f"{each.title:13} {each.held_out_accuracy[-1]:6.1%} of {found.num_held_out} held-out photos "
            f"are right after {each.seconds:.0f} s"
        )
    model_file = save(model, photos.classes, settings.output)

    with _timed(seconds, "heat maps"):
        found.looks = look(model, photos)
    _say(f"\n[3/4] Grad-CAM of {len(found.photos) + len(found.looks)} photos, for the page")

    _say(f"\n[4/4] {model_file.name} as LiteRT files, run and compared (about half a minute)")
    with _timed(seconds, "LiteRT"):
        found.runners, found.problems = export_and_measure(model, model_file, photos, opened)
    for problem in found.problems:
        print(problem, file=sys.stderr, flush=True)
    for runner in found.runners:
        _say(
            f"{runner.title:16} {runner.num_bytes / 1e6:6.2f} MB {runner.accuracy:7.1%} right "
            f"{runner.milliseconds:8.2f} ms a photo"
        )
    (settings.output / "findings.json").write_text(json.dumps(facts(found), indent=1), encoding="utf-8")
    return found


def check_output(folder: pathlib.Path) -> None:
    """Makes the folder, and refuses one with files that no demo wrote, as it might replace them."""
    folder.mkdir(parents=True, exist_ok=True)
    marker = folder / MARKER
    found = sorted(path.name for path in folder.iterdir())
    if found and not marker.exists():
        raise FileExistsError(
            f"Expected an empty folder, or one that an earlier demo wrote, received '{folder}' with "
            f"{', '.join(found[:3])}{', ...' * (len(found) > 3)}. Remove it, or pass another as --output."
        )
    marker.touch()


@contextlib.contextmanager
def _timed(seconds: dict[str, float], part: str) -> Iterator[None]:
    """Puts the seconds of what is inside into `seconds`."""
    begin = time.perf_counter()
    yield
    seconds[part] = time.perf_counter() - begin


def facts(found: Findings) -> dict[str, Any]:
    """Everything in `Findings` but the pictures, as JSON takes it."""

    def without_pictures(items):
        return {key: value for key, value in items if not isinstance(value, np.ndarray)}

    return dataclasses.asdict(found, dict_factory=without_pictures)


def surest_right_photo(found: Findings) -> tuple[str, str, float] | None:
    """(file, class, probability) of the photograph of the package that is right with most certainty."""
    right = [(photo.name, *photo.best[0]) for photo in found.photos if photo.is_right]
    return max(right, key=lambda each: each[2], default=None)


# Step 1: the photographs that come with the package.


def open_weights(weights: str) -> predictor.Predictor:
    """Opens a classifier that can also be fine-tuned, with logits for outputs.

    Raises:
        ValueError: an unknown name, a file that does not fit or a whole Keras model.
    """
    if weights.endswith(".keras"):
        raise ValueError(
            f"Expected a tag or a weight file, from which a model of other classes can be made. Received: "
            f"'{weights}'. Write its weights first: keras-convnext convert {weights} weights.safetensors"
        )
    return predictor.open_predictor(weights, classifier_activation=None)


def classify_photos(opened: predictor.Predictor) -> list[ClassifiedPhoto]:
    """Classifies the photographs of the package."""
    names = known_class_names(opened)
    folder = importlib.resources.files("keras_convnext.data") / "photos"
    pictures, shown = [], []
    for file in RIGHT_NAMES:
        with importlib.resources.as_file(folder / file) as path:
            image = preprocess.read_image(path)
        pictures.append(preprocess.preprocess_image(image, opened.preprocessing))
        shown.append(_enlarged(image, opened.preprocessing))
    right = [
        {number for number, name in enumerate(names) if name.split(",")[0] in right_names}
        for right_names in RIGHT_NAMES.values()
    ]
    return _classified(opened.model, np.stack(pictures), shown, list(RIGHT_NAMES), names, right)


def _enlarged(image: np.ndarray, preprocessing: Preprocessing) -> np.ndarray:
    """The part of an image that a model is shown, with more pixels for the page."""
    side, resize_size = preprocessing.size[0], preprocessing.resize_size
    scale = max(SHOWN_SIDE / side, 1.0)
    changes: dict[str, Any] = {"image_size": round(scale * side)}
    changes["resize_size"] = resize_size and round(scale * resize_size)
    return preprocess.preprocess_image(image, dataclasses.replace(preprocessing, **changes))


def known_class_names(opened: predictor.Predictor) -> list[str]:
    """Names the classes of published weights and of the package's own, "class 7" of others."""
    if opened.class_list is not None:
        return class_names.class_names(opened.class_list)
    return [f"class {number}" for number in range(opened.model.output_shape[-1])]


def _classified(
    model: keras.Model,
    pictures: np.ndarray,
    shown: Iterable[np.ndarray],
    files: Sequence[str],
    names: Sequence[str],
    right: Sequence[set[int]],
) -> list[ClassifiedPhoto]:
    """Classifies pictures and finds what speaks for the first class of each.

    Args:
        model: to logits.
        pictures: uint8 (N, H, W, 3).
        shown: N arrays uint8 (h, w, 3), the same with more pixels for the page.
        files: N names.
        names: of the classes.
        right: for each picture the numbers of the classes that are right.
    """
    logits = np.asarray(model.predict_on_batch(predictor.for_channels(pictures, model)), "float64")
    predictor.finite(logits, model.name)
    probabilities = np.exp(logits - logits.max(axis=-1, keepdims=True))
    probabilities /= probabilities.sum(axis=-1, keepdims=True)
    level = HEAT_LEVEL if HEAT_LEVEL in model.pyramid_outputs else None
    heat = gradcam.grad_cam(model, pictures, logits.argmax(axis=-1), level)
    photos = []
    for place, (file, picture, values) in enumerate(zip(files, shown, probabilities, strict=True)):
        best = np.argsort(-values, kind="stable")[:BEST_CLASSES].tolist()
        enlarged = Image.fromarray(heat[place]).resize(picture.shape[1::-1], Image.Resampling.BILINEAR)
        photos.append(
            ClassifiedPhoto(
                file,
                picture,
                gradcam.overlay(picture, np.asarray(enlarged)),
                [(names[number], float(values[number])) for number in best],
                [names[number] for number in sorted(right[place])],
                best[0] in right[place],
            )
        )
    return photos


# Step 2: photos to learn.


def train(
    opened: predictor.Predictor, photos: PhotoSet, epochs: int, seed: int
) -> tuple[keras.Model, list[Training]]:
    """Trains a new classifier from the weights that are open, then the same one from scratch.

    Args:
        opened: the weights.
        photos: what to learn.
        epochs: passes over the training photos.
        seed: of the new weights and of the order.

    Returns:
        The fine-tuned model, (N, 96, 96, 3) pixels in 0..255 to logits, and how both trainings went.
    """
    starts = {}
    for title in ("from scratch", "pretrained"):
        # Keras draws the seeds of new weights from here; its own set_random_seed would load TensorFlow.
        random.seed(seed)
        model = _new_model(title, opened, len(photos.classes))
        starts[title] = model.get_weights()
    compile_model(model, photos, epochs)
    _say(f"{model.count_params():,} weights; the first step compiles, which takes longer")
    fine_tuning = fit("pretrained", model, starts["pretrained"], photos, epochs, seed)
    # Without the optimizer, which would make the file three times as large.
    trained = _new_model("pretrained", opened, len(photos.classes))
    trained.set_weights(model.get_weights())
    return trained, [
        fine_tuning,
        fit("from scratch", model, starts["from scratch"], photos, epochs, seed),
    ]


def compile_model(model: keras.Model, photos: PhotoSet, epochs: int) -> None:
    """Gives a model the optimizer, the loss and the metric of a training."""
    steps = epochs * (len(photos.training) // _batch_size(photos))
    rate = keras.optimizers.schedules.CosineDecay(
        0.0, steps - steps // 10, warmup_target=LEARNING_RATE, warmup_steps=steps // 10
    )
    model.compile(
        optimizer=keras.optimizers.AdamW(rate, weight_decay=WEIGHT_DECAY),
        loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        metrics=["accuracy"],
    )


def _batch_size(photos: PhotoSet) -> int:
    return min(BATCH_SIZE, len(photos.training))


def fit(
    title: str, model: keras.Model, start: list[np.ndarray], photos: PhotoSet, epochs: int, seed: int
) -> Training:
    """Trains a compiled model from given weights; a training before leaves only the compiled step."""
    model.set_weights(start)
    for variable in model.optimizer.variables:  # all begin with zeros
        variable.assign(np.zeros(variable.shape, variable.dtype))
    _say(f"{title}:")
    begin = time.perf_counter()
    # No early stop and no choice of an epoch: the held-out photos are only counted.
    history = model.fit(
        batches(photos.images[photos.training], photos.labels[photos.training], _batch_size(photos), seed),
        steps_per_epoch=len(photos.training) // _batch_size(photos),
        epochs=epochs,
        shuffle=False,  # the generator does
        verbose=1 if sys.stdout.isatty() else 2,  # a bar in a log file is thousands of characters
        validation_data=(photos.images[photos.held_out], photos.labels[photos.held_out]),
        validation_batch_size=BATCH_SIZE,
    ).history
    return Training(
        title,
        LEARNING_RATE,
        [float(value) for value in history["accuracy"]],
        [float(value) for value in history["val_accuracy"]],
        time.perf_counter() - begin,
    )


def _new_model(title: str, opened: predictor.Predictor, classes: int) -> keras.Model:
    architecture = opened.row.architecture if opened.row else opened.model.name
    settings: dict[str, Any] = {
        "input_shape": (SIDE, SIDE, 3),
        "classes": classes,
        "classifier_activation": None,
    }
    if title == "pretrained":
        # A tag sets the pixels' normaliser too.
        name, weights = (opened.row.tag,) * 2 if opened.row else (architecture, opened.file)
        return keras_convnext.load(name, weights=weights, new_head=True, **settings)
    if VARIANTS[architecture].version == 1:
        # With the published 1e-6 the blocks do next to nothing for the few hundred steps that this takes.
        settings["layer_scale_init_value"] = 0.1
    return keras_convnext.load(architecture, weights=None, **settings)


def save(model: keras.Model, classes: list[str], folder: pathlib.Path) -> pathlib.Path:
    """Writes model.keras, and the names of its classes where `keras-convnext predict` looks for them."""
    path = folder / "model.keras"
    with silenced():  # Keras looks for TensorFlow here
        model.save(path)
    path.with_suffix(".labels.txt").write_text(class_names.to_lines(classes), encoding="utf-8")
    return path


# Step 3: what the fine-tuned model looks at.


def look(model: keras.Model, photos: PhotoSet) -> list[ClassifiedPhoto]:
    """Classifies held-out photos, of each class the first by name, and finds where it sees the class."""
    chosen = []
    for label in range(min(len(photos.classes), MOST_LOOKS)):
        of_class = photos.held_out[photos.labels[photos.held_out] == label].tolist()
        chosen.append(min(of_class, key=photos.names.__getitem__))
    pictures = photos.images[chosen]
    right = [{int(photos.labels[place])} for place in chosen]
    looks = _classified(
        model, pictures, pictures, [photos.names[place] for place in chosen], photos.classes, right
    )
    credits = [photos.credits.get(each.name, {}) for each in looks]
    return [
        dataclasses.replace(
            each, photographer=credit.get("photographer", ""), address=credit.get("address", "")
        )
        for each, credit in zip(looks, credits, strict=True)
    ]


# Step 4: files for phones.


def export_and_measure(
    model: keras.Model, model_file: pathlib.Path, photos: PhotoSet, opened: predictor.Predictor
) -> tuple[list[Runner], list[str]]:
    """Writes LiteRT files next to the model's and measures them on the held-out photos.

    Returns:
        The model and its files, measured; and a line for each file that is left out, as a package is missing
        or it differs too much from the model. Nothing is measured where all are left out.
    """
    places = np.linspace(0, len(photos.training) - 1, min(CALIBRATION_PHOTOS, len(photos.training)))
    calibration = photos.images[photos.training[np.argsort(photos.labels[photos.training], kind="stable")]]
    held_out, labels = photos.images[photos.held_out], photos.labels[photos.held_out]
    one = held_out[:1]
    expected = np.asarray(model.predict(held_out, batch_size=BATCH_SIZE, verbose=0)).argmax(axis=-1)
    outputs = {"Keras": expected}
    paths = {"Keras": model_file}
    calls: dict[str, Callable[[], Any]] = {"Keras": lambda: model.predict_on_batch(one)}
    problems = []
    for precision in ("float32", "int8"):
        path = model_file.with_name(f"{model_file.stem}_{precision}.tflite")
        path.unlink(missing_ok=True)  # of an earlier model
        try:
            export(
                model,
                path,
                "litert",
                precision=precision,
                calibration=calibration[places.round().astype(int)],
                labels=photos.classes,
                licence=opened.row.licence if opened.row else None,
                preprocessing=PREPROCESSING,
            )
            exported = runtimes.open_exported(path)
        except (ImportError, ExportError) as error:
            problems.append(f"Left out, LiteRT {precision}: {error}")
            continue
        title = f"LiteRT {precision}"
        outputs[title] = exported(held_out).argmax(axis=-1)
        paths[title] = path
        pixels = one.astype(exported.input_dtype)
        calls[title] = lambda exported=exported, pixels=pixels: exported.call(pixels)  # type: ignore[misc]
    if len(paths) == 1:  # nothing to compare the model with
        return [], problems
    milliseconds = time_in_turns(list(calls.values()), TIMED_CALLS)
    runners = [
        Runner(
            title,
            paths[title].stat().st_size,
            float((outputs[title] == labels).mean()),
            float((outputs[title] == expected).mean()),
            taken,
        )
        for title, taken in zip(paths, milliseconds, strict=True)
    ]
    return runners, problems


def time_in_turns(functions: list[Callable[[], Any]], calls: int) -> list[float]:
    """Median milliseconds of a call of each, in turns, so that a machine that slows down slows all.

    In its turn each is called twice and the second call timed: threads of another may still spin in the
    first.
    """
    taken: list[list[float]] = [[] for _ in functions]
    for _ in range(calls):
        for function, times in zip(functions, taken, strict=True):
            function()
            begin = time.perf_counter()
            function()
            times.append(1000 * (time.perf_counter() - begin))
    return [statistics.median(times) for times in taken]


# Printing.


def environment() -> dict[str, str]:
    """Versions and hardware, for the foot of the page."""
    backend = keras.backend.backend()
    found = _environment.machine() | {"keras": keras.__version__, "backend": backend}
    for package in (backend, "numpy", "pillow", "ai-edge-litert"):
        for name in (package, f"{package}-cpu"):  # TensorFlow has another name without GPUs
            try:
                found.setdefault(package, metadata.version(name))
            except metadata.PackageNotFoundError:
                continue
    return found


def _say(text: str) -> None:
    print(text, flush=True)


def _say_photo(photo: ClassifiedPhoto) -> None:
    _say(f"{photo.name}: {'right' if photo.is_right else 'not right'}")
    for name, probability in photo.best:
        _say(f"  {probability:6.1%} {'█' * round(20 * probability):20} {name}")


if __name__ == "__main__":
    sys.exit(main())
