"""torchvision's ResNets into the first step of `keras_convnext.roadmap`, whose layers have the same names."""

import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from keras_convnext import _messages
from keras_convnext.architecture import LEAVES


def load_torchvision(model, state: Mapping[str, Any]) -> None:
    """Gives the model of step 0 or 1 the weights of torchvision's `resnet50`, by its `state_dict()`.

    `state` maps names to tensors or arrays; that of a ResNet with depths 3, 24, 36, 3 fits the regime "base".
    ValueError: names, shapes or values are not those of the model; it is unchanged then.
    """
    if not isinstance(state, Mapping):
        raise ValueError(
            "Expected a state dict, {name: tensor}, as torchvision.models.resnet50().state_dict() and "
            f"torch.load(path, weights_only=True) give. Received: {type(state).__name__}"
        )
    variables = {
        f"{layer.name.replace('_', '.')}.{LEAVES.get(variable.name, variable.name)}": variable
        for layer in model.layers
        for variable in (layer.weights if re.fullmatch(r"conv1|bn1|fc|layer\d_\d+_\w+", layer.name) else ())
    }
    if not {"conv1.weight", "layer1.0.conv3.weight", "fc.weight"} <= variables.keys():
        raise ValueError(
            f"Expected the ResNet of step 0 or 1 of the road. Received: {model.name!r}. Make it with "
            "keras_convnext.roadmap.build(0)."
        )
    given = {name: value for name, value in state.items() if not str(name).endswith("num_batches_tracked")}
    if wrong := sorted(variables.keys() ^ given.keys(), key=str):
        listed = _messages.listed(wrong, 5)
        raise ValueError(
            f"Expected the {len(variables)} arrays of {model.name!r} under torchvision's names, such as "
            f"conv1.weight. Received {len(given)}, such as {next(iter(given), 'none')}; on one side only: "
            f"{listed}. Step 0 takes those of torchvision.models.resnet50()."
        )
    values = {}
    for name, variable in variables.items():
        array, shape = _array(name, given[name]), tuple(variable.shape)
        # PyTorch's order of a convolution is (out, in, height, width), of a product (out, in).
        expected = (shape[3], shape[2], *shape[:2]) if len(shape) == 4 else shape[::-1]
        if array.shape != expected:
            raise ValueError(
                f"Expected {name} of shape {expected}, received {array.shape}. Build the model with the "
                "classes and channels that the weights are for."
            )
        values[name] = array.transpose(2, 3, 1, 0) if array.ndim == 4 else array.T
    for name, variable in variables.items():
        variable.assign(values[name])


def _array(name: str, value: Any) -> np.ndarray:
    """A tensor, of any float dtype and on any device, or an array as one of float32."""
    try:
        if hasattr(value, "detach"):
            value = value.detach().float().cpu()
        return np.asarray(value).astype("float32")
    except (TypeError, ValueError) as error:
        raise ValueError(f"Expected numbers in {name}, received {_messages.one_line(error)}.") from error
