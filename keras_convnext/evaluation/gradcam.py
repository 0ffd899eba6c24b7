"""Grad-CAM: a heat map of where in an image a classifier sees a class."""

import collections
from collections.abc import Callable, Container, Mapping, Sequence
from typing import Any

import keras
import numpy as np
from keras import ops, tree

from keras_convnext import convnext
from keras_convnext._messages import near_names
from keras_convnext.predictor import finite
from keras_convnext.weights.graph import Graph, Value, functional

# From cold to hot, at equal distances; the cold end is transparent.
_COLORS = np.array([(255, 255, 90), (255, 190, 0), (255, 90, 0), (190, 0, 40)], "float32")


def grad_cam(
    model: keras.Model,
    images: Any,
    class_index: int | Sequence[int] | None = None,
    layer: str | None = None,
) -> np.ndarray:
    """Computes heat maps of where a class is seen.

    For a map A of K channels and the logit y of the class, `heat = relu(sum_k a_k A_k)` with `a_k = mean over
    positions of dy / dA_k`; then enlarged to the image (bilinear) and divided by its maximum. A softmax or
    any other activation of the last layer is left out, as in the paper: it would mix in the other classes.
    Reference: Selvaraju et al. 2017, "Grad-CAM: Visual Explanations from Deep Networks via Gradient-based
    Localization" (arXiv:1610.02391), equations 1 and 2.

    Args:
        model: functional or sequential model from images (N, H, W, C) to classes (N, K); channels-last. It
            may have models inside, and other inputs beside the images.
        images: (N, H, W, C), as the model takes them: pixels in 0..255, uint8 or float, for ours. Where it
            has several inputs, all of them, in a list or by name.
        class_index: one class for all images or one for each. Default: the most likely class of each image.
        layer: name of the layer whose output is the map A, or a level of `model.pyramid_outputs` such as
            "P4"; of a model inside, where two have the name, as "inside/name". Default: the last stage of a
            ConvNeXt, else the last layer with an output (N, h, w, K). Where one is called several times, or
            for several images, the last call counts, and its image.

    Returns float32 (N, H, W) in 0..1, the maximum of each map 1; all 0 where nothing speaks for the class.
    Raises a ValueError for what does not fit, such as a layer that is not on the only way from image to
    class, and a RuntimeError on a backend without gradients.

    Example:
        >>> model = TestConvNeXt2(weights=None, input_shape=(32, 32, 3))
        >>> grad_cam(model, np.zeros((2, 32, 32, 3), "uint8"), class_index=3).shape
        (2, 32, 32)
    """
    _check_model(model)
    graph = Graph(model, opened=True)
    features, logits_from = _split_head(model, graph.outputs[0])
    known = _maps(graph)
    name = _chosen_name(model, known, layer)
    target = known[name]
    before, beside = _needed(target), _needed(features, {target})
    image = next((each for each in graph.inputs if each in before and len(each.shape) == 4), None)
    if target not in beside or image is None or image in beside:
        raise ValueError(
            f"'{name}' is not on the only way from the image to the classes of '{model.name}': something "
            "passes it by, or it comes too late. Name a layer between two stages."
        )
    tensors = dict(zip(graph.inputs, _tensors(model, images), strict=True))
    count, *size = tensors[image].shape
    if len(size) != 3 or 0 in (count, *size):
        raise ValueError(f"Expected images (N, H, W, C), at least one. Received: {(count, *size)}")

    def logits_of(maps):
        return logits_from(_computed(graph, features, {**tensors, target: maps}))

    maps = ops.stop_gradient(_computed(graph, target, tensors))  # (N, h, w, K)
    chosen = _chosen_classes(class_index, model.output_shape[-1], count)
    if chosen is None:
        chosen = ops.argmax(ops.stop_gradient(logits_of(maps)), axis=-1)
    one_hot = ops.one_hot(chosen, model.output_shape[-1], dtype="float32")
    # The sum over images: no logit depends on another image.
    gradient = _gradient(lambda maps: ops.sum(logits_of(maps) * one_hot), maps)

    maps, gradient = ops.cast(maps, "float32"), ops.cast(gradient, "float32")
    weights = ops.mean(gradient, axis=(1, 2), keepdims=True)  # (N, 1, 1, K)
    heat = ops.relu(ops.sum(weights * maps, axis=-1, keepdims=True))  # (N, h, w, 1)
    heat = ops.image.resize(heat, size[:2], interpolation="bilinear", data_format="channels_last")
    heat = finite(ops.convert_to_numpy(heat)[..., 0], f"the gradients of '{model.name}'")
    highest = heat.max(axis=(1, 2), keepdims=True)
    return np.divide(heat, highest, out=np.zeros_like(heat), where=highest > 0)


def overlay(image: Any, heat: Any, opacity: float = 0.7) -> np.ndarray:
    """Paints a heat map (H, W) in 0..1 over an image: nothing where it is 0, then yellow, orange and red.

    The image is (H, W, 3) or (H, W, 1), pixels in 0..255; the result uint8 (H, W, 3). `opacity`, 0..1, is
    that of the paint where the heat is 1.

    Example:
        >>> overlay(np.zeros((32, 32, 3), "uint8"), np.ones((32, 32)), opacity=1.0)[0, 0].tolist()
        [190, 0, 40]
    """
    image, heat = np.asarray(image, "float32"), np.asarray(heat, "float32")
    if image.ndim != 3 or image.shape[-1] not in (1, 3) or heat.shape != image.shape[:2]:
        raise ValueError(
            f"Expected an image (H, W, 3 or 1), a heat map (H, W). Received: {image.shape} and {heat.shape}"
        )
    places = np.linspace(0, 1, len(_COLORS))
    paint = np.stack([np.interp(heat, places, channel) for channel in _COLORS.T], axis=-1)
    share = opacity * np.clip(heat, 0, 1)[..., None]
    return np.clip(np.rint((1 - share) * image + share * paint), 0, 255).astype("uint8")


def _check_model(model: keras.Model) -> None:
    if functional(model) is None:
        raise ValueError(f"Expected a functional model, whose layers are known. Received: {model!r}")
    inputs, outputs = ([tuple(each.shape) for each in ends] for ends in (model.inputs, model.outputs))
    if not any(len(shape) == 4 for shape in inputs) or [len(shape) for shape in outputs] != [2]:
        raise ValueError(
            "Expected a model from images (N, H, W, C) to classes (N, K). Received: inputs "
            f"{inputs}, outputs {outputs}"
        )


def _tensors(model: keras.Model, images: Any) -> list[Any]:
    """One tensor for each input of the model."""
    names = [each.name for each in model.inputs]
    if isinstance(images, Mapping):
        images = [images[name] for name in names if name in images]
    elif len(names) == 1:
        images = [images]
    if not isinstance(images, list | tuple) or len(images) != len(names):
        received = f"{type(images).__name__} of {len(images)}"
        raise ValueError(f"Expected inputs in a list or by name: {', '.join(names)}. Received: {received}")
    pairs = zip(images, model.inputs, strict=True)
    return [ops.cast(ops.convert_to_tensor(image), each.dtype) for image, each in pairs]


def _maps(graph: Graph) -> dict[str, Value]:
    """The maps that the classes are computed from, by level ("P4") and by the path of their layer."""
    maps = {value.path: value for value, *others in graph.calls if not others and len(value.shape) == 4}
    levels = {
        prefix + level: maps[prefix + tensor._keras_history.operation.name]
        for prefix, model in graph.models.items()
        for level, tensor in getattr(model, "pyramid_outputs", {}).items()
    }
    reached = _needed(graph.outputs[0])
    return {name: value for name, value in (levels | maps).items() if value in reached}


def _needed(value: Value, given: Container[Value] = ()) -> set[Value]:
    """A value and all that it is computed from, where those of `given` are known."""
    found: set[Value] = set()
    waiting = [value]
    while waiting:
        value = waiting.pop()
        if value not in found:
            found.add(value)
            waiting += [] if value in given else value.arguments()
    return found


def _computed(graph: Graph, value: Value, tensors: dict[Value, Any]) -> Any:
    """The tensor of a value, from those of others; a map is kept until its last reader has it."""
    tensors = dict(tensors)
    needed = _needed(value, tensors).difference(tensors)
    calls = [each for outputs in graph.calls for each in outputs if each in needed]
    readers = collections.Counter(argument for each in calls for argument in each.arguments())

    def tensor_of(argument):
        if not isinstance(argument, Value):
            return argument
        readers[argument] -= 1
        return tensors[argument] if readers[argument] else tensors.pop(argument)

    for each in calls:
        args, kwargs = tree.map_structure(tensor_of, (each.args, each.kwargs))
        if isinstance(each.layer, keras.Layer):
            kwargs = {**kwargs, "training": False}
        tensors[each] = tree.flatten(each.layer(*args, **kwargs))[each.index]
    return tensors[value]


def _chosen_name(model: keras.Model, known: Mapping[str, Value], name: str | None) -> str:
    if not known:
        raise ValueError(f"Expected a model with maps (N, h, w, K); '{model.name}' has none.")
    if name is None:
        blocks = [key for key, value in known.items() if isinstance(value.layer, convnext.Block)]
        return (blocks or list(known))[-1]
    found = [name] if name in known else [key for key in known if key.endswith(f"/{name}")]
    if len(found) != 1:
        near = near_names(name, dict.fromkeys(key.rpartition("/")[2] for key in known))
        problem = "Several layers" if found else "No layer"
        raise ValueError(f"{problem} {name!r} with maps in '{model.name}'.{near} Known: {', '.join(known)}")
    return found[0]


def _split_head(model: keras.Model, result: Value) -> tuple[Value, Callable]:
    """Returns the last value in front of the classes, and a function that makes float32 logits of it."""
    last = result.layer
    is_activation = isinstance(last, keras.layers.Softmax | keras.layers.Activation)
    is_activation |= type(last).__name__ in ("Softmax", "Sigmoid")  # of keras.ops
    if is_activation:
        result = result.arguments()[0]
    if is_activation or getattr(last, "activation", None) in (None, keras.activations.linear):
        return result, lambda logits: ops.cast(logits, "float32")
    if not isinstance(last, keras.layers.Dense) or last.quantization_mode is not None:
        raise ValueError(
            f"Expected a model that ends in a Dense layer that is not quantised, or in logits. "
            f"'{model.name}' ends in '{last.name}', a {type(last).__name__}. Use the model before it was "
            "quantised, or one with classifier_activation=None."
        )
    # By hand: with its activation off the layer would be another while the model may be in use elsewhere.
    kernel = ops.cast(last.kernel, "float32")
    bias = ops.cast(last.bias, "float32") if last.use_bias else 0.0
    return result.arguments()[0], lambda x: ops.matmul(ops.cast(x, "float32"), kernel) + bias


def _chosen_classes(class_index: Any, classes: int, count: int) -> np.ndarray | None:
    if class_index is None:
        return None
    chosen = np.asarray(class_index)
    if chosen.shape not in ((), (count,)) or chosen.dtype.kind not in "iu":
        raise ValueError(
            f"Expected one class number, or one for each of {count} images. Received: {class_index!r}"
        )
    if chosen.min() < 0 or chosen.max() >= classes:
        raise ValueError(f"Expected class numbers from 0 to {classes - 1}. Received: {class_index!r}")
    return np.broadcast_to(chosen.astype("int32"), (count,))


def _gradient(function: Callable, x: Any) -> Any:
    """The gradient of a scalar function of a tensor."""
    backend = keras.backend.backend()
    if backend == "tensorflow":
        import tensorflow as tf

        with tf.GradientTape() as tape:
            tape.watch(x)
            y = function(x)
        return tape.gradient(y, x)
    if backend == "jax":
        import jax

        return jax.grad(function)(x)
    if backend == "torch":
        import torch

        x = x.detach().requires_grad_()
        return torch.autograd.grad(function(x), x)[0]
    raise RuntimeError(f"Grad-CAM needs tensorflow, jax or torch. Received: KERAS_BACKEND={backend}")
