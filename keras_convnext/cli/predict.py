"""`predict` classifies images."""

import argparse
import dataclasses
import functools
import itertools
import os
import pathlib
import sys
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from keras_convnext._files import read_text
from keras_convnext._terminal import Progress
from keras_convnext.cli import shared
from keras_convnext.data import class_names, preprocess
from keras_convnext.weights.resolve import is_path

PREDICT_EXAMPLES = """examples:
  keras-convnext predict cat.jpg
  keras-convnext predict photographs/ --model convnext_tiny.fb_in22k_ft_in1k_384 --top 3 --json
  keras-convnext predict cat.jpg --weights convnext_tiny_in1k.safetensors
  keras-convnext predict leaf.jpg --weights my_leaves.keras --labels leaves.txt

Without --model, a file given by --weights says itself which architecture it is, and how images are resized
where it was written by training; else they are as for that architecture's ImageNet weights. A .keras file
brings its own image size; it must take pixels in 0..255. Without --labels the names of the
classes are looked for next to the file: my_leaves.labels.txt."""


def predict_options(option: Callable) -> None:
    option("images", "IMAGE_OR_FOLDER", "folders are searched for images", nargs="+")
    option("--model", "TAG", f"tag or architecture, default {shared.DEFAULT_MODEL} or what --weights holds")
    option("--weights", "FILE", "weight file, or a .keras model, to use instead")
    option("--top", "N", "classes an image, default 5", type=shared.positive, default=5)
    option("--batch-size", "N", "images, default 8", type=shared.positive, default=8)
    for name in ("--image-size", "--labels", "--json"):
        option(name)


def predict_command(options: argparse.Namespace) -> int:
    """Classifies images; those that cannot be read are reported and left out."""
    errors: list[str] = []
    paths: list[pathlib.Path] = []
    for image in options.images:
        try:
            paths += preprocess.find_images(image)
        except preprocess.ImageError as error:
            shared.note(errors, error)
    load = functools.cache(lambda: _load_classifier(options))
    results: list[dict] = []
    # On a terminal the results themselves are the progress.
    progress = Progress("predict", len(paths), is_wanted=options.json or not sys.stdout.isatty())
    with progress:
        images = _readable(paths, errors, load)
        while batch := list(itertools.islice(images, options.batch_size)):
            classifier = load()
            probabilities = classifier(np.stack([image for _, image in batch]))
            for (file, _), values in zip(batch, probabilities, strict=True):
                predictions = classifier.best(values, options.top)
                results.append({"file": str(file), "predictions": predictions})
                if not options.json:
                    print(file)
                    for best in predictions:
                        (name,) = class_names.to_lines([best["name"]]).splitlines()
                        print(f"  {100 * best['probability']:6.2f} %  {name}")
            sys.stdout.flush()
            progress.show(len(results) + len(errors))
    if options.json and results:
        shared.print_json(results)
    if not errors:
        return 0
    return 1 if results else 2


@dataclasses.dataclass(frozen=True)
class Classifier:
    """A model, how its images are prepared and what its classes are called."""

    predictor: Any
    names: list[str]  # of each class
    synsets: list[str]  # a WordNet id for each class; empty when it is not an ImageNet classifier
    gives_logits: bool  # whether a softmax is still to be taken

    def prepared(self, content: bytes, name: str) -> np.ndarray:
        """An encoded image to the pixels that the model takes; `name` is for errors."""
        return preprocess.decode_prepared(content, name, self.predictor.preprocessing)

    def __call__(self, images: np.ndarray) -> np.ndarray:
        """uint8 images (N, height, width, 3), prepared, to probabilities (N, classes)."""
        outputs = self.predictor.outputs(images)
        if self.gives_logits:
            outputs = np.exp(outputs - outputs.max(axis=-1, keepdims=True))
            outputs /= outputs.sum(axis=-1, keepdims=True)
        if outputs.min() < -1e-3 or outputs.max() > 1 + 1e-3:
            raise ValueError(
                f"Expected probabilities from {self.predictor.file}, received outputs from "
                f"{outputs.min():.4g} to {outputs.max():.4g}: it has no classifier, or one without softmax."
            )
        return outputs

    def best(self, probabilities: np.ndarray, count: int) -> list[dict]:
        """The `count` most probable classes, the best first."""
        return [
            {
                "class_index": index,
                **({"synset": self.synsets[index]} if self.synsets else {}),
                "name": self.names[index],
                "probability": float(probabilities[index]),
            }
            for index in np.argsort(-probabilities, kind="stable")[:count].tolist()
        ]


def _load_classifier(options: argparse.Namespace) -> Classifier:
    labels = read_labels(options.labels, options.weights or options.model)
    shared.import_quietly("keras_convnext.models")
    import keras

    from keras_convnext import predictor

    name = options.model or (shared.DEFAULT_MODEL if options.weights is None else None)
    opened = predictor.open_predictor(name, options.weights, image_size=options.image_size)
    classes = opened.model.output_shape[-1]
    names, synsets = labels or [f"class {index}" for index in range(classes)], []
    if len(names) != classes:
        raise ValueError(f"Expected a name for each of the {classes} classes. Received {len(names)} names.")
    if not labels and opened.class_list is not None:
        names = class_names.class_names(opened.class_list)
        synsets = class_names.synset_ids(opened.class_list)
    gives_logits = getattr(opened.model.layers[-1], "activation", None) is keras.activations.linear
    if gives_logits and classes == 1:
        raise ValueError(
            f"Expected probabilities from {opened.file}, received one number without an activation, whose "
            "meaning the file does not say. Save the model with a sigmoid, or with two classes."
        )
    return Classifier(opened, names, synsets, gives_logits)


def read_labels(path: str | None, name: str | None) -> list[str]:
    """The names of classes in a file, by default one that lies beside a model's file; [] for none."""
    if path is None and name is not None and is_path(name):
        path = class_names.labels_beside(os.path.expanduser(name))
    if path is None:
        return []
    return class_names.from_lines(read_text(path))


def _readable(
    paths: list[pathlib.Path], errors: list[str], load: Callable[[], Classifier]
) -> Iterator[tuple[pathlib.Path, np.ndarray]]:
    """Files and their pixels for the model, which may be a large download: it waits for a first image."""
    is_loaded = False
    for path in paths:
        try:
            content, name = preprocess.read_file(path), str(path)
            if not is_loaded:
                preprocess.decode_image(content, name, lambda image: np.empty(0))
                is_loaded = True
            yield path, load().prepared(content, name)
        except preprocess.ImageError as error:
            shared.note(errors, error)
