"""Grad-CAM: a heat map of where in an image a classifier sees a class.

>>> heat = gradcam.grad_cam(model, images)  # doctest: +SKIP
>>> picture = gradcam.overlay(images[0], heat[0])  # doctest: +SKIP
"""

from collections.abc import Callable, Sequence
from typing import Any

import keras
import numpy as np
from keras import ops

from keras_convnext._messages import near_names
from keras_convnext.predictor import finite

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
        model: functional model from images (N, H, W, C) to classes (N, K); channels-last.
        images: (N, H, W, C), as the model takes them: pixels in 0..255, uint8 or float, for ours.
        class_index: one class for all images or one for each. Default: the most likely class of each image.
        layer: name of the layer whose output is the map A, or a level of `model.pyramid_outputs` such as
            "P4". Default: the last stage of a ConvNeXt, else the last layer with an output (N, h, w, K).

    Returns float32 (N, H, W) in 0..1, the maximum of each map 1; all 0 where nothing speaks for the class.
    Raises a ValueError for what does not fit, such as a layer that is not on the only way from image to
    class, and a RuntimeError on a backend without gradients.

    Example:
        >>> model = TestConvNeXt2(weights=None, input_shape=(32, 32, 3))
        >>> grad_cam(model, np.zeros((2, 32, 32, 3), "uint8"), class_index=3).shape
        (2, 32, 32)
    """
    _check_model(model)
    images = ops.convert_to_tensor(images)
    if len(images.shape) != 4 or 0 in images.shape:
        raise ValueError(f"Expected images (N, H, W, C), at least one. Received: {tuple(images.shape)}")
    map_tensor = _map_tensor(model, layer)
    features, logits_from = _split_head(model)
    try:
        front = keras.Model(model.inputs, map_tensor)
        back = keras.Model(map_tensor, features)
    except ValueError as error:
        raise ValueError(
            f"'{layer}' is not on the only way from the image to the classes of '{model.name}': something "
            "passes it by, or it comes too late. Name a layer between two stages."
        ) from error

    def logits_of(maps):
        return logits_from(back(maps, training=False))

    maps = ops.stop_gradient(front(images, training=False))  # (N, h, w, K)
    chosen = _chosen_classes(class_index, model.output_shape[-1], len(images))
    if chosen is None:
        chosen = ops.argmax(ops.stop_gradient(logits_of(maps)), axis=-1)
    one_hot = ops.one_hot(chosen, model.output_shape[-1], dtype="float32")
    # The sum over images: no logit depends on another image.
    gradient = _gradient(lambda maps: ops.sum(logits_of(maps) * one_hot), maps)

    maps, gradient = ops.cast(maps, "float32"), ops.cast(gradient, "float32")
    weights = ops.mean(gradient, axis=(1, 2), keepdims=True)  # (N, 1, 1, K)
    heat = ops.relu(ops.sum(weights * maps, axis=-1, keepdims=True))  # (N, h, w, 1)
    heat = ops.image.resize(heat, images.shape[1:3], interpolation="bilinear", data_format="channels_last")
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
            "Expected an image (H, W, 3) or (H, W, 1) and a heat map (H, W). "
            f"Received: {image.shape} and {heat.shape}"
        )
    places = np.linspace(0, 1, len(_COLORS))
    paint = np.stack([np.interp(heat, places, channel) for channel in _COLORS.T], axis=-1)
    share = opacity * np.clip(heat, 0, 1)[..., None]
    return np.clip(np.rint((1 - share) * image + share * paint), 0, 255).astype("uint8")


def _check_model(model: keras.Model) -> None:
    inputs, outputs = getattr(model, "inputs", None), getattr(model, "outputs", None)
    if not inputs or not outputs:
        raise ValueError(f"Expected a functional model, whose layers are known. Received: {model!r}")
    if len(inputs) != 1 or len(outputs) != 1 or len(outputs[0].shape) != 2:
        raise ValueError(
            "Expected a model from images (N, H, W, C) to classes (N, K). Received: inputs "
            f"{[tuple(each.shape) for each in inputs]}, outputs {[tuple(each.shape) for each in outputs]}"
        )


def _map_tensor(model: keras.Model, name: str | None) -> keras.KerasTensor:
    pyramid = getattr(model, "pyramid_outputs", {})
    if name is None and pyramid:
        return pyramid[max(pyramid)]
    by_name = {each.name: each.output for each in model.layers if isinstance(each.output, keras.KerasTensor)}
    known = {key: tensor for key, tensor in {**by_name, **pyramid}.items() if len(tensor.shape) == 4}
    if name is None:
        maps = [key for key in known if known[key] is not model.inputs[0]]
        if not maps:
            raise ValueError(f"Expected a model with maps (N, h, w, K); '{model.name}' has none.")
        name = maps[-1]
    if name not in known:
        raise ValueError(
            f"No layer {name!r} with maps in '{model.name}'.{near_names(name, known)} "
            f"Known: {', '.join(known)}"
        )
    return known[name]


def _split_head(model: keras.Model) -> tuple[keras.KerasTensor, Callable]:
    """Returns what the last layer takes, and a function that makes float32 logits of it."""
    last = model.get_layer(model.output_names[0])
    if isinstance(last, keras.layers.Softmax | keras.layers.Activation):
        return last.input, lambda logits: ops.cast(logits, "float32")
    if getattr(last, "activation", None) in (None, keras.activations.linear):
        return last.input, lambda x: ops.cast(last(x, training=False), "float32")
    if not isinstance(last, keras.layers.Dense) or last.quantization_mode is not None:
        raise ValueError(
            f"Expected a model that ends in a Dense layer that is not quantised, or in logits. "
            f"'{model.name}' ends in '{last.name}', a {type(last).__name__}. Use the model before it was "
            "quantised, or one with classifier_activation=None."
        )
    # By hand: with its activation off the layer would be another while the model may be in use elsewhere.
    kernel = ops.cast(last.kernel, "float32")
    bias = ops.cast(last.bias, "float32") if last.use_bias else 0.0
    return last.input, lambda x: ops.matmul(ops.cast(x, "float32"), kernel) + bias


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
    raise RuntimeError(
        "Grad-CAM needs a backend with gradients: tensorflow, jax or torch. "
        f"Received: KERAS_BACKEND={backend}"
    )
