"""Gives every weight of a model its value (`filled`), and reads them back under official names."""

import collections
import dataclasses
import functools
import itertools
import re
from collections.abc import Iterator, Mapping
from typing import Any

import keras
import numpy as np

from keras_convnext._messages import listed
from keras_convnext.architecture import BOX_BINS, DETECTOR_PLACES, HEAD_PLACES, LEAVES, STATISTICS
from keras_convnext.weights import arrays, layouts
from keras_convnext.weights.graph import Graph, functional, is_training_only, package_of

# The official part of a layer's name; what stands in front is a prefix (`convnext.layer_name`).
_OFFICIAL = re.compile(
    r"(?:^|_)(stem|downsample_layers_\d_\d|stages_\d_\d+|blocks_\d+|norm_pre|norm[0-3]?|pre_logits|head|"
    rf"neck|rpn_head|roi_head_(?:bbox|mask)_head(?:_\d)?|{'|'.join(HEAD_PLACES)})$"
)
_FLATTENED = "shared_fcs_0/kernel"  # reads all values of a region, channel by channel in PyTorch

# Layers that may stand between two layers of ours, as those of training only may.
_HAND_ON = (keras.layers.Flatten, keras.layers.Identity)  # Flatten of pooled features (N, C)
_POOLINGS = {keras.layers.GlobalAveragePooling2D: "avg", keras.layers.GlobalMaxPooling2D: "max"}
_IN_STEM = re.compile(r"(?:^|_)stem_(padding_\d|activation)$")  # of `convnext.stem`, without weights
_IN_HEADS = re.compile(r"(?:^|_)(decode|auxiliary)_head_\w+$")  # of `segmentation.UPerNet`


def state_dict(model: keras.Model) -> layouts.StateDict:
    """The weights of a model under the names and in the shapes of the official PyTorch code.

    Args:
        model: made by a constructor of this package, or loaded from a file of one; or a functional or
            sequential model around one, in which a Dense layer of any name that reads the final norm of the
            averaged map (include_top=False, pooling="avg") is the classifier.

    Returns:
        {canonical name: array}, in the order of the forward pass. Of a segmenter or detector the names are
        those of Facebook's files: "backbone." and the official name, "decode_head.", "neck." and so on.

    Layers without weights are not in it, such as a Rescaling in front. LoRA is merged.

    Raises:
        ValueError: when the model is none of ours, has weights without a place in a ConvNeXt, or is
            quantised.
    """
    placed, others = places(model)
    if others:
        names = [f"{layer.name!r} ({type(layer).__name__})" for layer in others]
        bodies = [layer.name for layer in model.layers if hasattr(layer, "pyramid_outputs")]
        body = f"keras.Model(model.input, model.get_layer({[*placed.values()][-1].name!r}).output)"
        if bodies:
            body = f"model.get_layer({bodies[0]!r})"
        raise ValueError(
            f"Expected every weight of {model.name!r} to have a place in a ConvNeXt. Received layers without "
            f"one: {listed(names, 5)}. A classifier has one where it reads the norm of the averaged map: "
            "include_top=False, pooling='avg', then Dense. model.save('x.keras') keeps all; for the body "
            f"alone pass {body}."
        )
    return layouts.with_body_prefix(_arrays(model, placed))


def whole_state(model: keras.Model) -> layouts.StateDict:
    """`state_dict`, with the weights that have no place in a ConvNeXt under "layer/variable"."""
    placed, others = places(model)
    beside = {
        f"{layer.name}/{path}": keras.ops.convert_to_numpy(variable)
        for layer in others
        for path, variable in _variables(layer)
    }
    return layouts.with_body_prefix(_arrays(model, placed)) | beside


def places(model: keras.Model) -> tuple[dict[str, keras.Layer], list[keras.Layer]]:
    """Which layer is which of the official code, {"stages_1_0": layer}, and those that have weights beside.

    A layer of this package is known by its class and the official end of its name, a classifier by what it
    reads: the norm of the averaged map. ValueError where two layers have one place.
    """
    placed: dict[str, keras.Layer] = {}
    others: list[keras.Layer] = []
    reads: dict[int, keras.Layer | None] = {}  # id of a layer -> the one that it reads first
    for layer, sources in _connections(model):
        if id(layer) in reads:
            continue  # it is called in several places
        reads[id(layer)] = sources[0]
        if not isinstance(layer, keras.Layer) or isinstance(layer, keras.Model):
            continue
        name = _place(layer, reads) if layer.weights else None
        if name in placed:
            raise ValueError(
                f"Expected one ConvNeXt in {model.name!r}, received two: {placed[name].name!r} and "
                f"{layer.name!r} are both its {name!r}. Pass one of the models inside it."
            )
        if name is not None:
            placed[name] = layer
        elif layer.weights:
            others.append(layer)
    for layer in others:  # what is read by another network's layer is no classifier
        source = reads[id(layer)]
        while source is not None and source is not placed.get("head"):
            source = reads.get(id(source))
        if source is not None:
            others.insert(0, placed.pop("head"))
            break
    if not placed:
        raise ValueError(
            f"Expected a model made by keras_convnext. Received {model.name!r}, with layers "
            f"{', '.join(layer.name for layer in model.layers[:5])}, ..."
        )
    return placed, others


@dataclasses.dataclass(frozen=True)
class Around:
    """What stands around the weights of a model."""

    sides: tuple[int | None, int | None]  # height and width of its images, None where any will do
    normaliser: tuple[list[float], list[float]] | None  # mean and standard deviation by channel, pixels 0..1
    activation: Any  # of its classifier, a function; linear also without one
    pooling: str | None = None  # of a model without classifier: "avg" or "max"
    lost: tuple[str, ...] = ()  # what else changes values between image and result, with its class

    def check(self, name: str) -> None:
        """Refuses a model of which weights and these facts leave out a part."""
        if self.lost:
            raise ValueError(
                f"Expected nothing in {name!r} that its weights do not say. Received between its image and "
                f"its result: {listed(self.lost, 5)}. model.save('x.keras') keeps it; or take the weights of "
                "the ConvNeXt alone, and do the same in front of or behind it."
            )


def other_settings(model: keras.Model, wanted: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Names settings of layers that are not as `wanted` at their place: "epsilon of norm: 1, not 2"."""
    found: list[str] = []
    for place, layer in places(model)[0].items():
        config = layer.get_config()
        found += [
            f"{name} of {place}: {config[name]}, not {value}"
            for name, value in wanted.get(place, {}).items()
            if config.get(name, value) != value
        ]
    return found


def around(model: keras.Model) -> Around:
    """Reads what stands around the weights of a model, by its graph."""
    placed, others = places(model)
    connections = _connections(model)

    def with_all_in_front(layers):
        found = {id(layer): layer for layer in layers}
        for operation, sources in reversed(connections):
            if id(operation) in found:
                found |= {id(part): part for part in sources if part is not None}
        return found

    first = placed.get("stem") or placed.get("downsample_layers_0_0")
    channels = 3 if first is None else first.kernel.shape[2]
    in_front = with_all_in_front([first]).values()
    images = [part for part in in_front if isinstance(part, keras.layers.InputLayer)]
    normalisers = [part for part in in_front if type(part) is keras.layers.Normalization]
    parts = with_all_in_front(placed.values())
    calls = collections.Counter(id(operation) for operation, _ in connections)
    if "head" in placed or not others:  # else what follows is of another network, whose weights are named
        result = {id(layer) for layer in placed.values()}
        for operation, sources in connections:
            if any(id(source) in result for source in sources) and not getattr(operation, "weights", ()):
                result.add(id(operation))
                parts[id(operation)] = operation
    activation = getattr(placed.get("head"), "activation", keras.activations.linear)
    lost = [layer for layer in model._flatten_layers() if _has_own_code(layer)]
    lost += [layer for layer in placed.values() if calls[id(layer)] > 1]
    for part in (part for part in parts.values() if part not in placed.values()):
        if not _is_activation(part) or _IN_STEM.search(part.name):
            is_kept = _mean_and_std(part, channels) if part in normalisers[:1] else _hands_on(part)
            lost += [] if is_kept else [part]
        elif (own := getattr(part, "activation", keras.activations.softmax)) is not keras.activations.linear:
            lost += [] if activation is keras.activations.linear else [part]  # two, one on the other
            activation = own
    pooling = next((_POOLINGS[type(part)] for part in parts.values() if type(part) in _POOLINGS), None)
    names = [f"{part.name!r} ({type(part).__name__})" for part in lost]
    outputs = getattr(model, "outputs", ())
    if len(outputs) > 1 and "norm0" not in placed:
        names.append(f"{len(outputs)} outputs")
    shape = images[0].batch_shape if len(images) == 1 else ()
    return Around(
        sides=tuple(shape[1:3]) if len(shape) == 4 else (None, None),
        normaliser=_mean_and_std(normalisers[0], channels) if normalisers else None,
        activation=activation,
        pooling=None if "head" in placed else pooling,
        lost=tuple(names),
    )


def around_applications(model: keras.Model) -> Around:
    """The same of a ConvNeXt of `keras.applications`."""
    _, height, width, channels = model.input_shape
    normaliser = next((layer for layer in model.layers if type(layer) is keras.layers.Normalization), None)
    return Around(
        sides=(height, width),
        normaliser=None if normaliser is None else _mean_and_std(normaliser, channels),
        activation=getattr(model.layers[-1], "activation", keras.activations.linear),
    )


def _has_own_code(layer) -> bool:
    """Whether a layer is a model whose graph does not say what it computes."""
    is_kerass = type(layer).call.__module__.startswith("keras.")
    return isinstance(layer, keras.Model) and (functional(layer) is None or not is_kerass)


def _is_activation(part) -> bool:
    kind, axis = type(part), getattr(part, "axis", -1)
    is_softmax = package_of(part) == "keras" and kind.__name__ == "Softmax"  # of keras.ops too
    return kind is keras.layers.Activation or (is_softmax and axis in (-1, 1))


def _mean_and_std(layer, channels) -> tuple[list[float], list[float]] | None:
    """Those of a Normalization by channel, for pixels in 0..1; None for one that has others."""
    if layer.input_mean is None or layer.invert or np.size(layer.input_mean) not in (1, channels):
        return None
    # Rounded: what the square root leaves behind is no part of the value that was saved.
    with np.errstate(all="ignore"):  # `Preprocessing` refuses what is none
        mean, std = np.ravel(layer.input_mean), np.sqrt(np.ravel(layer.input_variance))
        return np.round(mean / 255, 9).tolist(), np.round(std / 255, 9).tolist()


def _place(layer, reads) -> str | None:
    """The official name of a layer, with "_" for "."; None for one of another network."""
    match = _OFFICIAL.search(layer.name)
    name = match[1] if match else None
    if name in HEAD_PLACES:
        return name if isinstance(layer, (keras.layers.Conv2D, keras.layers.BatchNormalization)) else None
    if package_of(layer) == "keras_convnext" or (name or "").startswith("downsample_layers"):
        return name if name not in ("head", "pre_logits") else None
    source = reads.get(id(layer))
    if type(layer) is not keras.layers.Dense or source is None:
        return None
    before = reads.get(id(source))
    average = keras.layers.GlobalAveragePooling2D
    if isinstance(source, keras.layers.Dense):  # behind the hidden layer of an "mlp" head
        is_last = source.name.endswith("pre_logits") and _place(source, reads) == "pre_logits"
    elif isinstance(source, average):
        is_last = before is not None and _place(before, reads) == "norm_pre"
    else:
        is_last = isinstance(before, average) and _place(source, reads) == "norm"
    return ("pre_logits" if name == "pre_logits" else "head") if is_last else None


def _hands_on(part) -> bool:
    """Whether a part of a graph hands on what it is given, or each model has it that is built for weights."""
    if getattr(part, "weights", ()) or package_of(part) == "keras_convnext":
        return True  # `places` has its place, or names it
    is_kept = isinstance(part, (*_HAND_ON, *_POOLINGS, keras.layers.InputLayer)) or is_training_only(part)
    is_named = _IN_STEM.search(part.name) or _IN_HEADS.search(part.name)
    return (package_of(part) == "keras" and is_kept) or bool(is_named)


def _connections(model: keras.Model) -> list[tuple[Any, list[Any]]]:
    """(operation, those that it reads) through nested models, in the order of the forward pass.

    A subclass stands there itself, in front of its layers, whose connections its own code makes.
    """
    if functional(model) is None:
        inside = (
            _connections(one) if isinstance(one, keras.Model) else [(one, [None])] for one in model.layers
        )
        return [(model, [None]), *itertools.chain.from_iterable(inside)]

    def sources(value) -> Iterator[Any]:
        """The operations that it is made from; those in front of one that hands on what it is given."""
        for each in value.arguments():
            layer = each.layer
            passes = (
                isinstance(layer, _HAND_ON) or is_training_only(layer, True) or _IN_STEM.search(layer.name)
            )
            yield from sources(each) if passes else [layer]

    found: list[tuple[Any, list[Any]]] = []
    for value, *_ in Graph(model, opened=True).calls:
        found.append((value.layer, [*sources(value)] or [None]))
        found += _connections(value.layer)[1:] if isinstance(value.layer, keras.Model) else []
    return found


def _variables(layer) -> Iterator[tuple[str, keras.Variable]]:
    """The path of each weight within its layer, such as "dwconv/kernel", and the weight."""
    for part in layer._layers:
        yield from ((f"{part.name}/{path}", variable) for path, variable in _variables(part))
    inner = {id(variable) for part in layer._layers for variable in part.weights}
    yield from ((variable.name, variable) for variable in layer.weights if id(variable) not in inner)


def _official(placed) -> Iterator[tuple[str, str, keras.Variable]]:
    """Canonical name, path ("stages_1_0/dwconv/kernel") and variable of each weight of the layers."""
    for place, layer in placed.items():
        for path, variable in _variables(layer):
            yield _canonical_name(f"{place}/{path}"), f"{place}/{path}", variable


def _arrays(model, placed) -> layouts.StateDict:
    state = {}
    layers = [part for layer in placed.values() for part in layer._flatten_layers()]
    adapted = {id(part._kernel): part for part in layers if getattr(part, "lora_enabled", False)}
    for name, path, variable in _official(placed):
        if "/lora_" in path:
            continue
        known = ("weight", "bias", "gamma", "beta", *STATISTICS)
        if name.rsplit(".", 1)[-1] not in known or "int" in variable.dtype:
            raise ValueError(
                f"{model.name!r} is quantised: {path} has no counterpart in PyTorch's layouts. "
                "Take its weights before quantize()."
            )
        value = adapted[id(variable)].kernel if id(variable) in adapted else variable
        state[name] = _to_torch(keras.ops.convert_to_numpy(value), path)
    if "head.weight" in state:  # Dense(use_bias=False) has none
        state.setdefault("head.bias", np.zeros(len(state["head.weight"]), state["head.weight"].dtype))
    return state


def _canonical_name(path: str) -> str:
    """The official name of a variable: "stages_1_0/dwconv/kernel" -> "stages.1.0.dwconv.weight"."""
    layer, *inner, leaf = plain_path(path).split("/")
    if place := DETECTOR_PLACES.get("_".join([layer, *inner])):
        return f"{place}.{LEAVES.get(leaf, leaf)}"
    layer = HEAD_PLACES.get(layer) or re.sub(r"_(?=\d)", ".", layer)
    if inner == ["layer_scale"]:
        return f"{layer}.gamma"
    if inner != ["grn"]:
        leaf = LEAVES.get(leaf, leaf)
    return ".".join([layer, *inner, leaf])


def plain_path(path: str) -> str:
    """The path of a variable as it is without the prefix of its layer, whatever the model is called."""
    layer, *rest = path.split("/")
    match = _OFFICIAL.search(layer)
    return "/".join([match[1] if match else layer, *rest])


def _to_keras(array, path):
    if path.endswith("dwconv/kernel"):
        return array.transpose(2, 3, 0, 1)  # (C, 1, H, W) -> (H, W, C, 1)
    if array.ndim == 4:
        return array.transpose(2, 3, 1, 0)  # (O, I, H, W) -> (H, W, I, O)
    if path.endswith(_FLATTENED):  # (O, C H W) -> (H W C, O)
        regions = array.reshape(len(array), -1, BOX_BINS**2)
        return regions.transpose(2, 1, 0).reshape(-1, len(array))
    return array.T if array.ndim == 2 else array


def _to_torch(array, path):
    if path.endswith("dwconv/kernel"):
        return array.transpose(2, 3, 0, 1)  # (H, W, C, 1) -> (C, 1, H, W)
    if array.ndim == 4:
        return array.transpose(3, 2, 0, 1)  # (H, W, I, O) -> (O, I, H, W)
    if path.endswith(_FLATTENED):  # (H W C, O) -> (O, C H W)
        outputs = array.shape[1]
        return array.reshape(BOX_BINS**2, -1, outputs).transpose(2, 1, 0).reshape(outputs, -1)
    return array.T if array.ndim == 2 else array


def filled(assemble, values_of):
    """The model that `assemble()` lays out, with every weight made from its value.

    `values_of(model)` gives pairs of a variable and its array. Inside the scope variables are declared but
    not made: no random numbers are drawn and nothing is compiled. When it closes, each is made from its
    initializer, which by then returns the value.
    """
    with keras.StatelessScope():
        model = assemble()
        for variable, array in values_of(model):
            # Keras has no public setter for the initializer of a declared variable; a test guards this line.
            variable._initializer = functools.partial(_cast, array)
    if keras.backend.backend() == "torch":
        list(model.parameters())  # registers with torch what the scope could not
    return model


def placed_values(model, values):
    """Yields each variable of a model that has a value in the file, and the value."""
    remaining = dict(values)
    for name, path, variable in _official(places(model)[0]):
        if name in remaining:
            yield variable, _to_keras(remaining.pop(name), path)
    if remaining:
        raise ValueError(f"Weights without a place in the model: {', '.join(remaining)}")


def _cast(array, shape, dtype):
    if tuple(array.shape) != tuple(shape):
        raise ValueError(f"Expected an array of shape {shape}. Received {array.shape}.")
    # Always a copy: a backend may keep the array itself, which must not hang on the file. (NumPy knows
    # "bfloat16" from ml_dtypes, which `arrays` imports.)
    value = np.array(array, dtype=dtype, order="C", copy=True)
    arrays.release_pages(array)
    if keras.backend.backend() == "jax":
        import jax

        return jax.device_put(value)  # jnp.asarray, Keras's way, compiles a program for each shape
    return value
