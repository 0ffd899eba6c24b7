"""ConvNeXt V1, V2 and isotropic in Keras 3: every published weight file, on every backend.

>>> import keras_convnext
>>> model = keras_convnext.ConvNeXtTiny(weights=None)  # or "imagenet", or a tag of list_weights()
>>> probabilities = model.predict(images)  # (N, 224, 224, 3) pixels in 0..255 -> (N, 1000)
"""

import importlib
import sys
from typing import TYPE_CHECKING, Any

from keras_convnext._environment import __version__, choose_backend

# fmt: off
# isort: off
if TYPE_CHECKING:  # Editors read this block; at run time `__getattr__` imports a name at its first use.
    from keras_convnext.conversion import convert, save_weights
    from keras_convnext.convnext import ConvNeXtBlock, ConvNeXtV2Block
    from keras_convnext.data.class_names import decode_predictions
    from keras_convnext.data.preprocessing import Preprocessing, preprocess_input
    from keras_convnext.exporting.deploy import deploy
    from keras_convnext.exporting.export import export
    from keras_convnext.layers.depthwise import DepthwiseConv2D
    from keras_convnext.layers.normalization import (
        GlobalResponseNormalization, LayerNormalization, RMSNormalization, SimpleNormalization,
    )
    from keras_convnext.layers.residual import LayerScale, StochasticDepth
    from keras_convnext.loading import load
    from keras_convnext.models import (
        ConvNeXt,
        ConvNeXtAtto, ConvNeXtFemto, ConvNeXtPico, ConvNeXtNano, ConvNeXtTiny, ConvNeXtSmall, ConvNeXtBase,
        ConvNeXtLarge, ConvNeXtXLarge, ConvNeXtXXLarge, ConvNeXtTinyHnf, ConvNeXtLargeMlp, ConvNeXtAttoOls,
        ConvNeXtFemtoOls, ConvNeXtPicoOls, ConvNeXtNanoOls, ConvNeXtAttoRms, ConvNeXtZeptoRms,
        ConvNeXtZeptoRmsOls, ConvNeXtIsotropicSmall, ConvNeXtIsotropicBase, ConvNeXtIsotropicLarge,
        ConvNeXtV2Atto, ConvNeXtV2Femto, ConvNeXtV2Pico, ConvNeXtV2Nano, ConvNeXtV2Tiny, ConvNeXtV2Small,
        ConvNeXtV2Base, ConvNeXtV2Large, ConvNeXtV2Huge, TestConvNeXt, TestConvNeXt2, TestConvNeXt3,
    )
    from keras_convnext.training.finetune import freeze_stages
    from keras_convnext.training.optimizer import AdamW, ema_weights
    from keras_convnext.training.schedule import WarmupCosine
    from keras_convnext.weights.assign import state_dict
    from keras_convnext.weights.catalog import find_checkpoint, list_weights
# isort: on
# fmt: on

_PLACES = {
    "conversion": "convert save_weights",
    "convnext": "ConvNeXtBlock ConvNeXtV2Block",
    "data.class_names": "decode_predictions",
    "data.preprocessing": "Preprocessing preprocess_input",
    "exporting.deploy": "deploy",
    "exporting.export": "export",
    "layers.depthwise": "DepthwiseConv2D",
    "layers.normalization": (
        "GlobalResponseNormalization LayerNormalization RMSNormalization SimpleNormalization"
    ),
    "layers.residual": "LayerScale StochasticDepth",
    "loading": "load",
    "models": """
        ConvNeXt
        ConvNeXtAtto ConvNeXtFemto ConvNeXtPico ConvNeXtNano ConvNeXtTiny ConvNeXtSmall ConvNeXtBase
        ConvNeXtLarge ConvNeXtXLarge ConvNeXtXXLarge ConvNeXtTinyHnf ConvNeXtLargeMlp ConvNeXtAttoOls
        ConvNeXtFemtoOls ConvNeXtPicoOls ConvNeXtNanoOls ConvNeXtAttoRms ConvNeXtZeptoRms
        ConvNeXtZeptoRmsOls ConvNeXtIsotropicSmall ConvNeXtIsotropicBase ConvNeXtIsotropicLarge
        ConvNeXtV2Atto ConvNeXtV2Femto ConvNeXtV2Pico ConvNeXtV2Nano ConvNeXtV2Tiny ConvNeXtV2Small
        ConvNeXtV2Base ConvNeXtV2Large ConvNeXtV2Huge TestConvNeXt TestConvNeXt2 TestConvNeXt3
    """,
    "training.finetune": "freeze_stages",
    "training.optimizer": "AdamW ema_weights",
    "training.schedule": "WarmupCosine",
    "weights.assign": "state_dict",
    "weights.catalog": "find_checkpoint list_weights",
}
_MODULE_OF = {name: module for module, names in _PLACES.items() for name in names.split()}
_MODULES = (
    "analysis", "conversion", "convnext", "data", "detection", "distribution", "evaluation", "exporting",
    "fcmae", "layers", "loading", "models", "predictor", "roadmap", "segmentation", "training", "variants",
    "weights",
)  # fmt: skip

__all__ = sorted(_MODULE_OF)


def __getattr__(name: str) -> Any:
    """Imports a public name, or a module of the package, when it is first used."""
    if name in _MODULES:
        return importlib.import_module(f"{__name__}.{name}")
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{_MODULE_OF[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*__all__, *_MODULES, *(name for name in globals() if name.startswith("__"))})


# Keras finds a class of a saved model only when it is registered, so the package registers all of them. The
# command does so when it needs a model: `keras-convnext list` answers without Keras.
if "keras_convnext_main" not in sys.modules:
    choose_backend()  # before Keras is imported: Keras would try TensorFlow, installed or not
    from keras_convnext import _registered
