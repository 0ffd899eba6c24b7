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
    ValueError: names or shapes are not those of the model; it is unchanged then.
    """
    variables = {
        f"{layer.name.replace('_', '.')}.{LEAVES.get(variable.name, variable.name)}": variable
        for layer in model.layers
        for variable in (layer.weights if re.fullmatch(r"conv1|bn1|fc|layer\d_\d+_\w+", layer.name) else ())
    }
    given = {
        name: np.asarray(value) for name, value in state.items() if not name.endswith("num_batches_tracked")
    }
    if wrong := sorted(variables.keys() ^ given.keys()):
        listed = _messages.listed(wrong, 5)
        raise ValueError(
            f"Expected the {len(variables)} arrays of {model.name!r} under torchvision's names. Received "
            f"{len(given)}; on one side only: {listed}. Step 0 takes those of torchvision.models.resnet50()."
        )
    values = {}
    for name, variable in variables.items():
        array = given[name]
        values[name] = array.transpose(2, 3, 1, 0) if array.ndim == 4 else array.T
        if values[name].shape != tuple(variable.shape):
            raise ValueError(
                f"Expected {name} of shape {tuple(variable.shape)} in Keras's order. Received {array.shape} "
                "in PyTorch's. Build the model with as many classes as the file has."
            )
    for name, variable in variables.items():
        variable.assign(values[name])
