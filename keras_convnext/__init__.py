"""ConvNeXt V1, V2 and isotropic in Keras 3: every published weight file, on every backend.

>>> import keras_convnext
>>> model = keras_convnext.ConvNeXtTiny(weights=None)  # or "imagenet", or a tag of list_weights()
>>> probabilities = model.predict(images)  # (N, 224, 224, 3) pixels in 0..255 -> (N, 1000)
"""

import pathlib
import sys

__version__ = "0.1.0"


def _is_command_line():
    """Whether this is `keras-convnext` or `python -m keras_convnext`."""
    program = (sys.argv or [""])[0]
    if program == "-m":  # until Python has found what to run
        return sys.orig_argv[-len(sys.argv)] == "keras_convnext"
    return pathlib.PurePath(program).stem == "keras-convnext"


# The command line imports what its commands need, so that `list` and `--help` answer without Keras.
if not _is_command_line():
    from keras_convnext._environment import choose_backend

    choose_backend()  # before Keras is imported: Keras would try TensorFlow, installed or not

    from keras_convnext.checkpoints import find_checkpoint, list_weights
    from keras_convnext.convert import convert, save_weights
    from keras_convnext.convnext import ConvNeXtBlock, ConvNeXtV2Block
    from keras_convnext.deployment import deploy
    from keras_convnext.depthwise import DepthwiseConv2D
    from keras_convnext.export import export
    from keras_convnext.layers import (
        GlobalResponseNormalization,
        LayerNormalization,
        LayerScale,
        RMSNormalization,
        SimpleNormalization,
        StochasticDepth,
    )
    from keras_convnext.models import (
        ConvNeXt,
        ConvNeXtAtto,
        ConvNeXtAttoOls,
        ConvNeXtAttoRms,
        ConvNeXtBase,
        ConvNeXtFemto,
        ConvNeXtFemtoOls,
        ConvNeXtIsotropicBase,
        ConvNeXtIsotropicLarge,
        ConvNeXtIsotropicSmall,
        ConvNeXtLarge,
        ConvNeXtLargeMlp,
        ConvNeXtNano,
        ConvNeXtNanoOls,
        ConvNeXtPico,
        ConvNeXtPicoOls,
        ConvNeXtSmall,
        ConvNeXtTiny,
        ConvNeXtTinyHnf,
        ConvNeXtV2Atto,
        ConvNeXtV2Base,
        ConvNeXtV2Femto,
        ConvNeXtV2Huge,
        ConvNeXtV2Large,
        ConvNeXtV2Nano,
        ConvNeXtV2Pico,
        ConvNeXtV2Small,
        ConvNeXtV2Tiny,
        ConvNeXtXLarge,
        ConvNeXtXXLarge,
        ConvNeXtZeptoRms,
        ConvNeXtZeptoRmsOls,
        TestConvNeXt,
        TestConvNeXt2,
        TestConvNeXt3,
        load,
        state_dict,
    )
    from keras_convnext.training.optimizer import AdamW, WarmupCosine, ema_weights

__all__ = [
    "AdamW",
    "ConvNeXt",
    "ConvNeXtAtto",
    "ConvNeXtAttoOls",
    "ConvNeXtAttoRms",
    "ConvNeXtBase",
    "ConvNeXtBlock",
    "ConvNeXtFemto",
    "ConvNeXtFemtoOls",
    "ConvNeXtIsotropicBase",
    "ConvNeXtIsotropicLarge",
    "ConvNeXtIsotropicSmall",
    "ConvNeXtLarge",
    "ConvNeXtLargeMlp",
    "ConvNeXtNano",
    "ConvNeXtNanoOls",
    "ConvNeXtPico",
    "ConvNeXtPicoOls",
    "ConvNeXtSmall",
    "ConvNeXtTiny",
    "ConvNeXtTinyHnf",
    "ConvNeXtV2Atto",
    "ConvNeXtV2Base",
    "ConvNeXtV2Block",
    "ConvNeXtV2Femto",
    "ConvNeXtV2Huge",
    "ConvNeXtV2Large",
    "ConvNeXtV2Nano",
    "ConvNeXtV2Pico",
    "ConvNeXtV2Small",
    "ConvNeXtV2Tiny",
    "ConvNeXtXLarge",
    "ConvNeXtXXLarge",
    "ConvNeXtZeptoRms",
    "ConvNeXtZeptoRmsOls",
    "DepthwiseConv2D",
    "GlobalResponseNormalization",
    "LayerNormalization",
    "LayerScale",
    "RMSNormalization",
    "SimpleNormalization",
    "StochasticDepth",
    "TestConvNeXt",
    "TestConvNeXt2",
    "TestConvNeXt3",
    "WarmupCosine",
    "convert",
    "deploy",
    "ema_weights",
    "export",
    "find_checkpoint",
    "list_weights",
    "load",
    "save_weights",
    "state_dict",
]
