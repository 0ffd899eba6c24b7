"""The calls that a functional or sequential model makes, and whose output each takes."""

import dataclasses
import functools
import re
from typing import Any

import keras
from keras import tree

_TRAINING_ONLY = (
    keras.layers.ActivityRegularization,
    keras.layers.AlphaDropout,
    keras.layers.Dropout,  # SpatialDropout2D is one
    keras.layers.GaussianDropout,
    keras.layers.GaussianNoise,
)
_AUGMENTATION = re.compile(r"Rand(?!omCrop$)\w+|MixUp|CutMix|AugMix")  # RandomCrop cuts outside training too


@dataclasses.dataclass(eq=False)
class Value:
    """An input of a model, or an output of one call of a layer, whose arguments are such values too."""

    shape: tuple
    layer: Any  # of an input its InputLayer
    path: str = ""  # name of the layer behind those of the models that it is in, as in "inner/layer"
    args: tuple = ()
    kwargs: dict[str, Any] = dataclasses.field(default_factory=dict)
    index: int = 0  # of several outputs

    def arguments(self) -> list["Value"]:
        return [each for each in tree.flatten((self.args, self.kwargs)) if isinstance(each, Value)]


class Graph:
    """The calls of a model; with `opened` those of the models inside, which are else called like layers.

    Attributes:
        inputs, outputs: values of the model.
        calls: the outputs of each call, in the order of the forward pass.
        models: the models whose calls these are by what is in front of their layers' names: "", "inner/".
    """

    def __init__(self, model: keras.Model, opened: bool) -> None:
        self.opened = opened
        self.calls: list[list[Value]] = []
        self.models: dict[str, keras.Model] = {}
        self.inputs = [Value(each.shape, each._keras_history.operation) for each in model.inputs]
        self.outputs = self._run(model, self.inputs, "")

    def _run(self, model, values, prefix) -> list[Value]:
        self.models[prefix] = model
        outputs = functional(model)._run_through_graph(
            values, lambda layer: functools.partial(self._call, layer, prefix)
        )
        return tree.flatten(outputs)

    def _call(self, layer, prefix, *args, **kwargs) -> list[Value]:
        path = prefix + layer.name
        if self.opened and functional(layer) is not None:
            return self._run(layer, tree.flatten(args or kwargs["inputs"]), f"{path}/")
        outputs = enumerate(layer._inbound_nodes[0].outputs)
        self.calls.append([Value(each.shape, layer, path, args, kwargs, index) for index, each in outputs])
        return self.calls[-1]


def functional(operation: Any) -> Any:
    """The functional model that a model is or, as a sequential one, has; None for any other operation."""
    model = getattr(operation, "_functional", operation)
    return model if isinstance(model, keras.Model) and hasattr(model, "operations") else None


def is_training_only(layer: Any, or_subclass: bool = False) -> bool:
    """Whether a layer of Keras gives back its input outside training; the code of a subclass may not."""
    kind = type(layer)
    is_known = isinstance(layer, _TRAINING_ONLY) or _AUGMENTATION.fullmatch(kind.__name__)
    return bool(is_known) and (or_subclass or kind.__module__.startswith("keras."))
