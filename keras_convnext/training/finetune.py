"""Prepares a model for fine-tuning: scales a new head, and chooses which weights learn."""

import re

import keras
import numpy as np

from keras_convnext import convnext, models
from keras_convnext._messages import shortened
from keras_convnext.layers.initializers import RandomNormal
from keras_convnext.weights.assign import places
from keras_convnext.weights.graph import package_of

_PLACE = re.compile(r"(?:^|_)(?:(?:stages|downsample_layers)_(\d+)_\d+|stem|blocks_\d+)$")


def scale_head(model: keras.Model, factor: float) -> None:
    """Multiplies kernel and bias of the classifier by a factor, 0.001 when the papers fine-tune.

    Reference: facebookresearch/ConvNeXt models/convnext.py, `head_init_scale`; ConvNeXt-V2 main_finetune.py
    draws the kernel with a standard deviation of 2e-5, which is 0.001 times the usual 0.02.
    """
    for variable in places(model)[0]["head"].weights:
        variable.assign(keras.ops.convert_to_numpy(variable) * np.float32(factor))


def choose_trainable(model: keras.Model, trainable: str) -> None:
    """Decides which weights of a built model with a classifier learn, as a recipe's `trainable` says.

    "all"; "head" for the classifier alone; "lora:R" for the classifier and, in each block, an update of rank
    R of the pointwise kernels (Hu et al. 2021, arXiv:2106.09685; Keras's `Dense.enable_lora`), which is added
    to the kernels when the weights are saved.
    """
    kind, _, rank = trainable.partition(":")
    if kind == "all":
        return
    placed = places(model)[0]
    classifier = [placed.get("pre_logits"), placed.get("head")]
    for layer in model.layers:
        if layer in classifier:
            continue
        if kind == "head" or not hasattr(layer, "pwconv1"):
            layer.trainable = False  # which a saved model keeps, as it does not for single weights
        else:
            for variable in layer.trainable_variables:
                variable.trainable = False
            for dense in (layer.pwconv1, layer.pwconv2):
                # The standard deviation of PyTorch's nn.Linear, which LoRA's A starts with; B starts at 0.
                deviation = (3 * dense.kernel.shape[0]) ** -0.5
                dense.enable_lora(int(rank), a_initializer=RandomNormal(deviation))


def freeze_stages(model: keras.Model, stages: int) -> None:
    """Freezes the stem and the first stages of a ConvNeXt, and lets the rest of it learn. Compile afterwards.

    A stage begins with its downsampling. What follows in the ConvNeXt learns, whatever was frozen before;
    other layers stay as they are. Files that Keras loads, and copies, keep it.

    Args:
        model: of this package, or around one of it, as a layer or by its layers.
        stages: int, from 0, which frees the stem too, to 4, which leaves the final norm and a classifier of
            this package. An isotropic model has one stage.

    Raises:
        ValueError: there is no ConvNeXt of this package in the model, or it has fewer stages.

    Example:
        >>> model = keras_convnext.TestConvNeXt2(weights=None, input_shape=(32, 32, 3))
        >>> freeze_stages(model, 4)
        >>> [weight.path for weight in model.trainable_weights]
        ['convnext_norm/gamma', 'convnext_norm/beta', 'convnext_head/kernel', 'convnext_head/bias']
    """
    if not isinstance(model, keras.Model):
        raise ValueError(f"Expected a Keras model to freeze stages of. Received: {model!r}")
    owners = [each for each in model._flatten_layers() if isinstance(each, keras.Model) and _depth(each)]
    if not owners:
        names = shortened(", ".join(layer.name for layer in model.layers), 200)
        raise ValueError(
            f"Expected a ConvNeXt of this package in '{model.name}'. Received the layers {names}"
        )
    depth = _depth(model)
    if isinstance(stages, bool | float) or stages not in range(depth + 1):
        raise ValueError(f"Expected from 0 to {depth} stages of '{model.name}'. Received: stages={stages!r}")
    for owner in owners:
        owner._trainable = True  # of the model alone: its setter would free the other layers too
        for layer in owner.layers:
            stage = _stage(layer)
            is_ours = isinstance(owner, models.ConvNeXt) or package_of(layer) == "keras_convnext"
            if stage is not None and stage < stages:
                for part in layer._flatten_layers():
                    part.trainable = False
            elif is_ours and not layer.trainable:
                layer.trainable = True


def _depth(model):
    """How many stages a model has, those in it too."""
    blocks = [each for each in model._flatten_layers() if isinstance(each, convnext.Block)]
    return 1 + max((stage for stage in map(_stage, blocks) if stage is not None), default=-1)


def _stage(layer):
    """The stage of a layer of this package; None behind the stages and for other layers."""
    place = _PLACE.search(layer.name) if package_of(layer) == "keras_convnext" else None
    return None if place is None else int(place[1] or 0)
