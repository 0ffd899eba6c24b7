"""Reads `.h5`, `.weights.h5` and `.keras` files: of this package, and of `keras.applications`."""

import contextlib
import json
import pathlib
import re
import warnings
import zipfile
from collections.abc import Iterator

import h5py
import numpy as np

from keras_convnext.weights.arrays import FileFormatError

# Layer of keras.applications -> canonical name; the part in front is the model's name, free to choose.
# Reference: keras/src/applications/convnext.py (Keras 3.15).
_LAYERS = (
    (r"_stem$", ("downsample_layers.0.0", "downsample_layers.0.1")),
    (r"_downsampling_block_(\d)$", ("downsample_layers.{next}.0", "downsample_layers.{next}.1")),
    (r"_stage_(\d)_block_(\d+)_depthwise_conv$", ("stages.{0}.{1}.dwconv",)),
    (r"_stage_(\d)_block_(\d+)_layernorm$", ("stages.{0}.{1}.norm",)),
    (r"_stage_(\d)_block_(\d+)_pointwise_conv_(\d)$", ("stages.{0}.{1}.pwconv{2}",)),
    (r"_stage_(\d)_block_(\d+)_layer_scale$", ("stages.{0}.{1}",)),
    (r"_head_layernorm$|^layer_normalization(_\d+)?$", ("norm",)),
    (r"_head_dense$", ("head",)),
)


def is_keras_applications(path) -> bool:
    """Whether a file holds a ConvNeXt of `keras.applications`; FileFormatError when it is damaged."""
    path = pathlib.Path(path)
    if path.suffix == ".keras":
        return "_stage_0_block_0_depthwise_conv" in _config(path)
    with _open(path) as file:
        names = _legacy_layer_names(file)
        if names:
            return any(re.search(r"_stage_0_block_0_depthwise_conv$", name) for name in names)
        return "layers/sequential/layers/conv2d/vars/0" in file and "layers/layer_scale" in file


def holds_model(path) -> bool:
    """Whether a file holds a whole model, as `model.save` writes it, `.h5` files too, not weights alone."""
    path = pathlib.Path(path)
    if path.suffix == ".keras":
        return True
    with _open(path) as file:
        return "model_config" in file.attrs


def read_model_input(path):
    """What the model of a file that holds one takes: ((height, width), normaliser).

    A side is None where any will do. The normaliser is (mean, standard deviation) of R, G and B, for pixels
    in 0..1, as `Preprocessing` has them; None for a model without one.
    """
    sides, normaliser = (None, None), None
    for kind, config in reversed([*_serialised(json.loads(_config(path)))]):  # the first of each counts
        if kind == "InputLayer" and len(config["batch_shape"]) == 4:
            sides = tuple(config["batch_shape"][1:3])
        elif kind == "Normalization" and config.get("mean") is not None:
            # Rounded: what the square root leaves behind is no part of the value that was saved.
            mean = np.round(np.ravel(config["mean"]) / 255, 9)
            std = np.round(np.sqrt(np.ravel(config["variance"])) / 255, 9)
            normaliser = tuple(tuple(np.resize(values, 3).tolist()) for values in (mean, std))
    return sides, normaliser


def read_sizes(path) -> tuple[int, int]:
    """(classes, channels) of the model of this package that an `.h5` file is of; 0 for no classifier."""
    with _open(path) as file:
        try:
            layers = file["layers"]
            dense = [
                name for name in layers if re.fullmatch(r"dense(_\d)?", name)
            ]  # pre_logits, then the head
            classes = layers[max(dense)]["vars/0"].shape[-1] if dense else 0
            return classes, layers["patch_conv2d/vars/0"].shape[2]
        except KeyError as error:
            raise FileFormatError(
                f"{path} has not the weights of a model of this package: {error}. Pass the file that "
                "model.save_weights() wrote."
            ) from None


def read_keras_applications(path) -> dict[str, np.ndarray]:
    """The canonical state dict of a `keras.applications` ConvNeXt.

    From a published `convnext_*.h5`, or what `model.save("x.h5")`, `model.save_weights("x.weights.h5")` and
    `model.save("x.keras")` write.
    """
    path = pathlib.Path(path)
    state: dict[str, np.ndarray] = {}
    try:
        with _open(path) as file:
            for name, arrays in _legacy_layers(file) if _legacy_layer_names(file) else _current_layers(file):
                for key, array in _canonical(name, arrays):
                    if key in state:
                        raise FileFormatError(f"{path} has two layers for {key}; the second is {name!r}.")
                    state[key] = array
    except (KeyError, IndexError) as error:
        raise FileFormatError(
            f"{path} is not a plain ConvNeXt of keras.applications ({error}). If it is part of a larger "
            "model, save it by itself."
        ) from None
    return state


def load_weights(model, path) -> None:
    """Loads weights that a model of this package wrote; ValueError when they are of another model."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what Keras warns of, it then raises
            model.load_weights(path)
    except (ValueError, KeyError, OSError) as error:
        raise ValueError(
            f"{path} does not fit {model.name!r}: {str(error).strip().splitlines()[0]} "
            "Build the model with the arguments it was saved with."
        ) from error


def _config(path) -> str:
    """The JSON text that a `.keras` file, or an `.h5` one of a whole model, has of its model."""
    if path.suffix != ".keras":
        with _open(path) as file:
            return _texts([file.attrs["model_config"]])[0]
    try:
        with zipfile.ZipFile(path) as archive:
            return archive.read("config.json").decode()
    except (zipfile.BadZipFile, KeyError) as error:
        raise FileFormatError(
            f"{path} is not a Keras model file: {error}. Expected an archive written by model.save()."
        ) from None


def _serialised(value):
    """Yields (class name, config) of each object in a serialised model, in their order."""
    if isinstance(value, dict) and isinstance(value.get("config"), dict) and "class_name" in value:
        yield value["class_name"], value["config"]
    for child in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
        yield from _serialised(child)


@contextlib.contextmanager
def _open(path) -> Iterator[h5py.File]:
    with contextlib.ExitStack() as stack:
        source = path
        if path.suffix == ".keras":
            archive = stack.enter_context(zipfile.ZipFile(path))
            source = stack.enter_context(archive.open("model.weights.h5"))
        try:
            file = stack.enter_context(h5py.File(source, "r"))
        except OSError as error:
            raise FileFormatError(
                f"{path} is not a readable HDF5 file ({error}). Is it whole? Copy or download it again."
            ) from None
        yield file


def _texts(names) -> list[str]:
    return [name.decode() if isinstance(name, bytes) else str(name) for name in names]


def _legacy_layer_names(file) -> list[str]:
    return _texts(file.get("model_weights", file).attrs.get("layer_names", []))


def _legacy_layers(file):
    """(layer name, its arrays in Keras's order) of the format of Keras 2, which Keras 3 still writes."""
    for name in _legacy_layer_names(file):
        group = file.get("model_weights", file)[name]
        names = _texts(group.attrs["weight_names"])
        if names:
            yield name, [group[weight][()] for weight in names]


def _current_layers(file):
    """The same of Keras 3's format, whose layers are numbered by class, in the order they were made."""
    layers = file["layers"]

    def arrays(group):
        variables = group["vars"]
        return [variables[str(index)][()] for index in range(len(variables))]

    def numbered(kind):
        index = 0
        while (name := kind if index == 0 else f"{kind}_{index}") in layers:
            yield layers[name]
            index += 1

    dims = []
    for stage, group in enumerate(numbered("sequential")):
        inner = group["layers"]
        convolution, norm = arrays(inner["conv2d"]), arrays(inner["layer_normalization"])
        dims.append(len(convolution[1]))
        if stage == 0:
            yield "_stem", convolution + norm
        else:
            yield f"_downsampling_block_{stage - 1}", norm + convolution
    depthwise = [arrays(group) for group in numbered("conv2d")]
    norms = [arrays(group) for group in numbered("layer_normalization")]
    dense = [arrays(group) for group in numbered("dense")]
    scales = [arrays(group) for group in numbered("layer_scale")]
    number = 0
    for stage, dim in enumerate(dims):
        for block in range(sum(len(bias) == dim for _, bias in depthwise)):
            prefix = f"_stage_{stage}_block_{block}"
            yield f"{prefix}_depthwise_conv", depthwise[number]
            yield f"{prefix}_layernorm", norms[number]
            yield f"{prefix}_pointwise_conv_1", dense[2 * number]
            yield f"{prefix}_pointwise_conv_2", dense[2 * number + 1]
            yield f"{prefix}_layer_scale", scales[number]
            number += 1
    yield "_head_layernorm", norms[number]
    if len(dense) > 2 * number:
        yield "_head_dense", dense[2 * number]


def _canonical(layer, arrays):
    """(canonical name, array in PyTorch's shape) of each weight of one layer."""
    for pattern, targets in _LAYERS:
        match = re.search(pattern, layer)
        if match is None:
            continue
        numbers = [group for group in match.groups() if group and group.isdigit()]
        following = int(numbers[0]) + 1 if numbers else 0
        names = [target.format(*numbers, next=following) for target in targets]
        if len(arrays) == 1:
            yield f"{names[0]}.gamma", arrays[0]
            return
        for name, weight, bias in zip(names, arrays[::2], arrays[1::2], strict=True):
            if weight.ndim == 4:
                # (H, W, I, O) -> (O, I, H, W); the grouped (7, 7, 1, C) becomes (C, 1, 7, 7) by the same.
                weight = weight.transpose(3, 2, 0, 1)
            elif weight.ndim == 2:
                weight = weight.T
            yield f"{name}.weight", weight
            yield f"{name}.bias", bias
        return
    raise FileFormatError(
        f"The layer {layer!r}, with weights of shape {[array.shape for array in arrays]}, is none of a "
        "ConvNeXt of keras.applications."
    )
