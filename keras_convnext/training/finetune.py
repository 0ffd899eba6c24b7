"""Prepares a model for fine-tuning: scales a new head, and chooses which weights learn."""

import keras
import numpy as np

from keras_convnext.layers.initializers import RandomNormal
from keras_convnext.weights.assign import places


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
