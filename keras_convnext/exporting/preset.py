"""Writes a folder that keras-hub's `from_preset` opens, with a card, and puts such a folder on the Hub.

keras-hub is not needed for it: the JSON files are what its 0.32 writes for the classes of
`keras_convnext.hub`, and the weights are what Keras writes for a model of the same layers.
"""

import datetime
import json
import pathlib
import shutil
import tempfile
from typing import Any

import keras

from keras_convnext import models
from keras_convnext._environment import __version__, require
from keras_convnext._messages import one_line
from keras_convnext.data.preprocessing import Preprocessing
from keras_convnext.model_options import ModelOptions
from keras_convnext.variants import Variant
from keras_convnext.weights.locate import WeightsNotFoundError
from keras_convnext.weights.published import Checkpoint
from keras_convnext.weights.repositories import PRESET_HEAD, PRESET_WEIGHTS, REGISTERED, SCHEME
from keras_convnext.weights.resolve import Name, ResolvedWeights, resolve

CARD = "README.md"
NAMES = (
    "config.json",
    "metadata.json",
    PRESET_WEIGHTS,
    "task.json",
    PRESET_HEAD,
    "preprocessor.json",
    "image_converter.json",
    CARD,
)
_KERAS_HUB_VERSION = "0.32.0"  # whose form the folder has
_MARK = "keras-convnext preset"  # in the card, by which a folder of ours is known
_HUB_LICENCES = ("apache-2.0", "mit", "bsd-3-clause", "cc-by-nc-4.0")  # that the Hub has a name for


def write_preset(name: Name | ResolvedWeights, folder: Any, *, replace: bool = False) -> list[pathlib.Path]:
    """Writes weights as a preset folder of keras-hub; returns its files.

    Weights with a classifier give a task, `keras_hub.models.ImageClassifier.from_preset(folder)`, logits;
    those without a backbone with the preparation of its images. `keras_convnext.load(folder)` opens both.

    Args:
        name: tag, architecture (its ImageNet weights), weight file, or what `resolve` returned.
        folder: that is not there or empty; with `replace` also one that this function wrote, of which the
            files of a preset are replaced.

    Raises:
        ValueError: the weights are of a segmenter or detector, or of a model of other than 3 channels or
            without normaliser.
        FileExistsError: something is in the folder that this function may not replace.
    """
    folder = pathlib.Path(folder)
    check_folder(folder, replace)
    source = resolve(name)
    _check(source)
    classes = 0 if source.row is not None and source.row.is_projection else source.classes
    options = ModelOptions(include_top=classes > 0, input_shape=(None, None, 3), classifier_activation=None)
    model = models.build(source, options)
    last = list(model.pyramid_outputs.values())[-1]
    body = keras.Model(model.input, last)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".tmp-") as temporary:
        written = pathlib.Path(temporary)
        body.save_weights(written / PRESET_WEIGHTS)
        if classes:
            head = keras.Model(last, model.output)
            head.compile(keras.optimizers.Adam())  # keras-hub's tasks are compiled, and look for its state
            head.save_weights(written / PRESET_HEAD)
        contents = _configurations(source.variant, source.preprocessing, classes)
        contents["metadata.json"] = {
            "keras_version": keras.__version__,
            "keras_hub_version": _KERAS_HUB_VERSION,
            "parameter_count": body.count_params(),
            "date_saved": datetime.datetime.now().strftime("%Y-%m-%d@%H:%M:%S"),
            "tasks": ["ImageClassifier"],
            "keras_convnext_version": __version__,
        }
        for filename, content in contents.items():
            (written / filename).write_text(json.dumps(content, indent=4), encoding="utf-8")
        (written / CARD).write_text(card(source, classes, model.count_params()), encoding="utf-8")
        folder.mkdir(exist_ok=True)
        for filename in NAMES:
            (folder / filename).unlink(missing_ok=True)
        files = [path for filename in NAMES if (path := written / filename).exists()]
        return [pathlib.Path(shutil.move(path, folder / path.name)) for path in files]


def check_folder(folder: pathlib.Path, replace: bool) -> None:
    """Refuses a folder in which something is that `write_preset` did not write, or may not replace."""
    if not folder.exists() and not folder.is_symlink():
        return
    if folder.is_symlink() or not folder.is_dir():
        raise FileExistsError(f"Expected a folder, or nothing, at '{folder}', where something else is.")
    names = {path.name for path in folder.iterdir()}
    if not names:
        return
    card_path = folder / CARD
    is_ours = card_path.is_file() and _MARK in card_path.read_text(encoding="utf-8", errors="replace")
    if not is_ours:
        raise FileExistsError(
            f"'{folder}' holds files that keras_convnext did not write. Name a folder that is not there."
        )
    if not replace:
        raise FileExistsError(f"'{folder}' is there already. Pass replace=True (--force) to write over it.")


def push(folder: Any, repository: str, *, dry_run: bool = False) -> list[tuple[str, int]]:
    """Uploads a preset folder to the Hub, as the user of `hf auth login` or HF_TOKEN.

    Makes the repository where it is not there; files of other names in it stay. Returns the files and their
    bytes. With `dry_run` nothing is sent.

    Raises:
        ValueError: the folder is no preset, or the name no "hf://user/name".
        WeightsNotFoundError: the Hub refuses it or cannot be reached.
    """
    folder, hub_id = pathlib.Path(folder), repository.removeprefix(SCHEME)
    if not repository.startswith(SCHEME) or len(hub_id.split("/")) != 2 or not all(hub_id.split("/")):
        raise ValueError(f"Expected {SCHEME}user/name, received {repository!r}.")
    files = [(name, (folder / name).stat().st_size) for name in NAMES if (folder / name).is_file()]
    if "config.json" not in dict(files):
        raise ValueError(f"Expected a folder of `keras-convnext preset`, found no config.json in '{folder}'.")
    if dry_run:
        return files
    require("huggingface_hub", "An upload to the Hugging Face Hub")
    import huggingface_hub

    try:
        huggingface_hub.create_repo(hub_id, exist_ok=True)
        huggingface_hub.upload_folder(
            repo_id=hub_id,
            folder_path=folder,
            allow_patterns=list(NAMES),
            commit_message=f"Preset of keras_convnext {__version__}",
        )
    except Exception as error:  # its HTTP client has error classes of its own
        raise WeightsNotFoundError(
            f"The Hugging Face Hub did not take {repository}: {one_line(error)}. Run `hf auth login` with a "
            "token that may write."
        ) from error
    return files


def card(source: ResolvedWeights, classes: int, parameters: int) -> str:
    """The text of the card: licence, source and scores of the weights, and how to open them."""
    row, preprocessing = source.row, source.preprocessing
    licence = row.licence if row is not None else getattr(source.repository, "licence", "")
    header = {"library_name": "keras-hub", "tags": ["convnext", "keras", "keras-convnext"]}
    if classes:
        header["pipeline_tag"] = "image-classification"
    if licence in _HUB_LICENCES:
        header["license"] = licence
    elif licence:
        header |= {"license": "other", "license_name": licence}
    name = row.tag if row is not None else source.variant.name
    height, width = preprocessing.size
    scale = "x".join(map(str, preprocessing.scale_size))
    facts = {
        "architecture": f"{source.variant.name}, {parameters:,} weights",
        "outputs": f"{classes} logits" if classes else "maps of features",
        "licence": licence or "not stated",
        "source": _source_text(source),
        "trained on": row.dataset if row is not None else None,
        "images": f"resized to {scale} ({preprocessing.crop_mode}, {preprocessing.interpolation}), of which "
        f"the central {height}x{width}; pixels 0..255, RGB",
        "top-1": _score_text(row, row.top1) if row is not None else None,
        "top-5": _score_text(row, row.top5) if row is not None else None,
    }
    lines = "\n".join(f"| {title} | {value} |" for title, value in facts.items() if value)
    call = "ImageClassifier" if classes else "Backbone"
    yaml = "\n".join(f"{key}: {json.dumps(value)}" for key, value in header.items())
    note = ""
    if row is not None and not row.commercial_use:
        note = "\n**Not for commercial use**: the licence of the weights forbids it.\n"
    return f"""---
{yaml}
---
# {name}
{note}
| | |
|---|---|
{lines}

```python
import keras_hub
import keras_convnext.hub

model = keras_hub.models.{call}.from_preset("hf://USER/NAME")  # or the path of this folder
```

Without keras-hub: `keras_convnext.load("hf://USER/NAME")`.

<!-- {_MARK}, version {__version__} -->
"""


def _source_text(source: ResolvedWeights) -> str:
    row = source.published
    if row is None:
        return source.repository.name if source.repository is not None else f"a file, {source.path.name}"
    place = f"https://huggingface.co/{row.hub_id}" if row.hub_id is not None else row.url
    return place or f"in the package keras_convnext {__version__}"


def _score_text(row: Checkpoint, score: float | None) -> str | None:
    return None if score is None else f"{score} % at {row.image_size} pixels: {row.score_source}"


def _check(source: ResolvedWeights) -> None:
    """Refuses what the classes of `keras_convnext.hub` do not express."""
    if source.heads is not None:
        raise ValueError(f"Expected weights of a classifier or its body, received a {source.kind}'s.")
    if source.channels != 3:
        raise ValueError(f"Expected weights for 3 channels, received some for {source.channels}.")
    if not source.is_normalised:
        raise ValueError(
            f"{source.path} has no normaliser, and a preset's backbone always has one. Save the weights with "
            "save_weights(model, 'x.safetensors', preprocessing=...), and take that file."
        )
    if source.is_bare:
        raise ValueError(f"Expected weights that say what they are of, received {source.path}.")


def _configurations(variant: Variant, preprocessing: Preprocessing, classes: int) -> dict[str, dict]:
    """The JSON of the objects of `keras_convnext.hub`, by file."""
    body = {
        "architecture": variant.name,
        "image_shape": [None, None, 3],
        "mean": list(preprocessing.mean),
        "std": list(preprocessing.std),
        "drop_path_rate": 0.0,
        "output_stride": 32,
    }
    backbone = _serialized("ConvNeXtBackbone", "conv_ne_xt_backbone", body)
    images = {
        "image_size": list(preprocessing.size),
        "scale": None,
        "offset": None,
        "interpolation": preprocessing.interpolation,
        "crop_to_aspect_ratio": True,
        "pad_to_aspect_ratio": False,
        "bounding_box_format": "yxyx",
        "crop_fraction": preprocessing.crop_fraction,
        "crop_mode": preprocessing.crop_mode,
        "resize_size": preprocessing.resize_size,
    }
    converter = _serialized("ConvNeXtImageConverter", "conv_ne_xt_image_converter", images)
    preprocessor = _serialized(
        "ConvNeXtImageClassifierPreprocessor",
        "conv_ne_xt_image_classifier_preprocessor",
        {"image_converter": converter, "config_file": "preprocessor.json"},
    )
    found = {
        "config.json": backbone,
        "image_converter.json": converter,
        "preprocessor.json": preprocessor,
    }
    if classes:
        found["task.json"] = _serialized("ConvNeXtImageClassifier", None, {}) | {
            "config": {
                "backbone": backbone,
                "preprocessor": preprocessor,
                "name": "conv_ne_xt_image_classifier",
                "num_classes": classes,
                "activation": "linear",
                "dropout": 0.0,
                "head_dtype": None,
            }
        }
    return found


def _serialized(class_name: str, name: str | None, config: dict[str, Any]) -> dict[str, Any]:
    """What `keras.saving.serialize_keras_object` gives for an object of `keras_convnext.hub`."""
    policy = {
        "module": "keras",
        "class_name": "DTypePolicy",
        "config": {"name": "float32"},
        "registered_name": None,
    }
    return {
        "module": "keras_convnext.hub",
        "class_name": class_name,
        "config": {"name": name, "trainable": True, "dtype": policy, **config},
        "registered_name": REGISTERED.replace("ConvNeXtBackbone", class_name),
    }
