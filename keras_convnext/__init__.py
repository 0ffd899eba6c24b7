"""ConvNeXt V1, V2 and isotropic in Keras 3: every published weight file, on every backend.

>>> import keras_convnext
>>> model = keras_convnext.ConvNeXtTiny(weights=None)  # or "imagenet", or a tag of list_weights()
>>> probabilities = model.predict(images)  # (N, 224, 224, 3) pixels in 0..255 -> (N, 1000)
"""

import importlib
import sys
from typing import TYPE_CHECKING, Any

from keras_convnext._environment import __version__, choose_backend

if TYPE_CHECKING:  # for editors; at run time `__getattr__` imports a name when it is first used
    from keras_convnext._environment import (
        choose_backend,
    )
    from keras_convnext.conversion import (
        convert,
        save_weights,
    )
    from keras_convnext.convnext import (
        ConvNeXtBlock,
        ConvNeXtV2Block,
    )
    from keras_convnext.exporting.deploy import (
        deploy,
    )
    from keras_convnext.exporting.export import (
        export,
    )
    from keras_convnext.layers.depthwise import (
        DepthwiseConv2D,
    )
    from keras_convnext.layers.normalization import (
        GlobalResponseNormalization,
        LayerNormalization,
        RMSNormalization,
        SimpleNormalization,
    )
    from keras_convnext.layers.residual import (
        LayerScale,
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
    )
    from keras_convnext.training.optimizer import (
        AdamW,
        ema_weights,
    )
    from keras_convnext.training.schedule import (
        WarmupCosine,
    )
    from keras_convnext.weights.assign import (
        state_dict,
    )
    from keras_convnext.weights.catalog import (
        find_checkpoint,
        list_weights,
    )

_PLACES = {
    "_environment": ("choose_backend",),
    "conversion": (
        "convert",
        "save_weights",
    ),
    "convnext": (
        "ConvNeXtBlock",
        "ConvNeXtV2Block",
    ),
    "exporting.deploy": ("deploy",),
    "exporting.export": ("export",),
    "layers.depthwise": ("DepthwiseConv2D",),
    "layers.normalization": (
        "GlobalResponseNormalization",
        "LayerNormalization",
        "RMSNormalization",
        "SimpleNormalization",
    ),
    "layers.residual": (
        "LayerScale",
        "StochasticDepth",
    ),
    "models": (
        "ConvNeXt",
        "ConvNeXtAtto",
        "ConvNeXtAttoOls",
        "ConvNeXtAttoRms",
        "ConvNeXtBase",
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
        "TestConvNeXt",
        "TestConvNeXt2",
        "TestConvNeXt3",
        "load",
    ),
    "training.optimizer": (
        "AdamW",
        "ema_weights",
    ),
    "training.schedule": ("WarmupCosine",),
    "weights.assign": ("state_dict",),
    "weights.catalog": (
        "find_checkpoint",
        "list_weights",
    ),
}
_MODULE_OF = {name: module for module, names in _PLACES.items() for name in names}
_ROOMS = ("analysis", "data", "distribution", "evaluation", "exporting", "layers", "training", "weights")

__all__ = sorted(_MODULE_OF)


def __getattr__(name: str) -> Any:
    """Imports a public name, or a folder of the package, when it is first used."""
    if name in _ROOMS:
        return importlib.import_module(f"{__name__}.{name}")
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_MODULE_OF[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__, *_ROOMS})


# Keras finds a layer of a saved model only when it is registered, so all are imported with the package. The
# command does that when it needs a model: `keras-convnext list` answers without Keras.
if "keras_convnext_main" not in sys.modules:
    choose_backend()  # before Keras is imported: Keras would try TensorFlow, installed or not
    from keras_convnext import _registered
