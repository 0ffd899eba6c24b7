"""Gives every weight of a model its value (`filled`), and reads them back under official names."""

import functools

import keras
import numpy as np

from keras_convnext.weights import arrays, layouts

PYRAMID_NORMS = ("norm0", "norm1", "norm2", "norm3")


def state_dict(model: keras.Model) -> layouts.StateDict:
    """The weights of a model under the names and in the shapes of the official PyTorch code.

    Args:
        model: made by a constructor of this package, or loaded from a file of one.

    Returns:
        {canonical name: array}, in the order of the forward pass. Of a model on an `input_tensor` only the
        layers of this package are taken.

    Raises:
        ValueError: when the model is none of ours, or quantised. LoRA is merged.
    """
    state = {}
    adapted = {}  # path of a kernel -> layer whose LoRA is merged into it
    for layer in model._flatten_layers():
        if getattr(layer, "lora_enabled", False):
            adapted[layer._kernel.path] = layer
    for variable in model.weights:
        name = _canonical_name(variable.path)
        if name is None or "/lora_" in variable.path:
            continue
        if name.rsplit(".", 1)[-1] not in ("weight", "bias", "gamma", "beta") or "int" in variable.dtype:
            raise ValueError(
                f"{model.name!r} is quantised: {variable.path} has no counterpart in PyTorch's layouts. "
                "Take its weights before quantize()."
            )
        value = adapted[variable.path].kernel if variable.path in adapted else variable
        state[name] = _to_torch(keras.ops.convert_to_numpy(value), variable.path)
    if not state:
        raise ValueError(
            f"Expected a model made by keras_convnext. Received {model.name!r}, with layers "
            f"{', '.join(layer.name for layer in model.layers[:5])}, ..."
        )
    return state


def _canonical_name(path: str) -> str | None:
    """The official name of a variable: "stages_1_0/dwconv/kernel" -> "stages.1.0.dwconv.weight"."""
    layer, *inner, leaf = path.split("/")
    head, *numbers = layer.split("_")
    if layer.startswith("downsample_layers_"):
        layer = "downsample_layers." + ".".join(numbers[1:])
    elif head in ("stages", "blocks") and inner:
        layer = ".".join([head, *numbers])
    elif layer not in ("stem", "norm", "norm_pre", "pre_logits", "head", *PYRAMID_NORMS):
        return None
    if inner == ["layer_scale"]:
        return f"{layer}.gamma"
    if inner != ["grn"]:
        leaf = {"kernel": "weight", "gamma": "weight", "beta": "bias"}.get(leaf, leaf)
    return ".".join([layer, *inner, leaf])


def _to_keras(array, path):
    if path.endswith("dwconv/kernel"):
        return array.transpose(2, 3, 0, 1)  # (C, 1, H, W) -> (H, W, C, 1)
    if array.ndim == 4:
        return array.transpose(2, 3, 1, 0)  # (O, I, H, W) -> (H, W, I, O)
    return array.T if array.ndim == 2 else array


def _to_torch(array, path):
    if path.endswith("dwconv/kernel"):
        return array.transpose(2, 3, 0, 1)  # (H, W, C, 1) -> (C, 1, H, W)
    if array.ndim == 4:
        return array.transpose(3, 2, 0, 1)  # (H, W, I, O) -> (O, I, H, W)
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
    for variable in model.weights:
        name = _canonical_name(variable.path)
        if name in remaining:
            yield variable, _to_keras(remaining.pop(name), variable.path)
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
