"""What an app needs to know of an exported file, stored with it; `runtimes.read_metadata` reads it back."""

import dataclasses
import json
import pathlib
import zipfile

import keras

from keras_convnext.data import class_names
from keras_convnext.data.segmentation.labels import Labels
from keras_convnext.exporting import runtimes
from keras_convnext.segmentation import Segmenter


def store(model, request, labels, licence):
    """Stores what an app needs to know: in a LiteRT file, as a ZIP archive at its end; else next to it."""
    names = labels.names if isinstance(labels, Labels) else labels
    prepared = dataclasses.asdict(request.preprocessing)
    del prepared["mean"], prepared["std"]  # the file normalises by itself
    channels = model.input_shape[3]
    about = {
        "name": model.name,
        "input": {
            "order": "N, H, W, C",
            "colours": {1: "gray", 3: "RGB"}.get(channels, f"{channels} channels"),
            "range": [0, 255],
            "dtype": "uint8" if request.precision == "int8" else "float32",
            "image_size": request.image_size,
            "batch_size": request.batch_size,
            "preprocessing": prepared,
        },
        "output": {"classes": model.output_shape[-1], "activation": activation(model)},
        "precision": request.precision,
        "licence": licence,
        "labels": None if names is None else list(map(str, names)),
    }
    if gives_maps(model):
        palette = labels.palette if isinstance(labels, Labels) else None
        about["output"] |= {"order": "N, H, W, classes", "task": "segmentation", "palette": palette}
    # A name that is not UTF-8 is written with the escapes that JSON has.
    text = json.dumps(about, indent=1, ensure_ascii=False).encode("utf-8", "backslashreplace")
    if request.format == "litert":
        with zipfile.ZipFile(request.path, "a") as archive:
            archive.writestr("metadata.json", text)
            if names is not None:
                archive.writestr("labels.txt", class_names.to_lines(names))
    else:
        file = runtimes.metadata_file(pathlib.Path(request.path))
        file.parent.mkdir(exist_ok=True)
        file.write_bytes(text)


def activation(model):
    """The name of what makes the outputs: an activation, or another layer or operation."""
    if isinstance(model, Segmenter):
        return "linear"  # logits, which are resized last
    last = model.outputs[0]._keras_history.operation
    if isinstance(last, keras.Model):
        return activation(last)
    made_by = getattr(last, "activation", last)
    return getattr(made_by, "__name__", type(made_by).__name__.lower())


def gives_maps(model):
    """Whether a model gives (N, h, w, C), as one that classifies pixels."""
    return len(model.output_shape) == 4
