"""Training: recipes as data, the papers' optimizer, runs that survive a kill.

>>> from keras_convnext.training import train
>>> result = train("smoke", "runs/smoke")  # doctest: +SKIP
"""

import importlib

_PLACES = {
    "AdamW": "optimizer",
    "SegmentationLoss": "segmentation_loss",
    "WarmupCosine": "schedule",
    "WarmupLinear": "schedule",
    "ema_weights": "optimizer",
    "PretrainingRecipe": "recipes.pretraining",
    "Recipe": "recipes.classification",
    "SegmentationRecipe": "recipes.segmentation",
    "known_recipes": "recipes.files",
    "load_recipe": "recipes.files",
    "Interrupted": "failure",
    "NonFiniteError": "failure",
    "TrainingResult": "run_state",
    "train": "trainer",
}

__all__ = sorted(_PLACES)


def __getattr__(name):
    """Imports a name when it is first used: the optimizer needs Keras alone, `train` TensorFlow too."""
    if name not in _PLACES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_PLACES[name]}"), name)
