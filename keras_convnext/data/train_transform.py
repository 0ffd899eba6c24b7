"""`Augmentation`: what training does to images, as values of a recipe. `augment` carries it out."""

from typing import Annotated

from pydantic import AfterValidator

from keras_convnext._settings import BelowOne, Count, NotNegative, Pair, Settings, Share, key, one_of
from keras_convnext.data.preprocessing import INTERPOLATIONS

Interpolation = Annotated[str, one_of(INTERPOLATIONS)]
POLICIES = ("none", "rand", "original", "originalr", "v0", "v0r", "imagenet", "ta_wide", "keras")

_KnownPolicy = one_of(
    POLICIES, f"a name that begins with one of {', '.join(POLICIES)}", lambda text: text.split("-")[0]
)


def check_ordered(value: tuple[float, float]) -> tuple[float, float]:
    if not 0 < value[0] <= value[1]:
        raise ValueError("[smallest, largest], above 0")
    return value


def check_shares(value: tuple[float, float]) -> tuple[float, float]:
    if not 0 < value[0] <= value[1] <= 1:
        raise ValueError("[smallest, largest], above 0 and at most 1")
    return value


class Augmentation(Settings):
    """What training does to images: the table [augmentation] of a recipe.

    The values in Python, where none are given, are those of ConvNeXt's ImageNet-1k training (Liu et al. 2022,
    table 5, and the official main.py). A new key is added here and used in `augment.transform`: with a value
    that changes nothing and `optional=True`, the recipes that do not use it stay as they are.

    Example:
        Augmentation(policy="none", mixup=0, cutmix=0)
    """

    crop_scale: Annotated[Pair, AfterValidator(check_shares)] = key(
        "smallest and largest area of the random crop, as shares of the image", (0.08, 1.0)
    )
    crop_ratio: Annotated[Pair, AfterValidator(check_ordered)] = key(
        "smallest and largest width / height of the crop", (3 / 4, 4 / 3)
    )
    interpolation: Interpolation = key("of the crop and of the policy's geometric operations", "bicubic")
    flip: Share = key("probability of exchanging left and right", 0.5)
    policy: Annotated[str, _KnownPolicy] = key(
        "RandAugment, AutoAugment or TrivialAugment, as `augment.policies.parse_policy` reads it; keras for "
        "Keras core's RandAugment, MixUp and CutMix in the place of ours; or none",
        "rand-m9-mstd0.5-inc1",
    )
    color_jitter: NotNegative = key("strength of brightness, contrast and saturation jitter, 0 for none", 0.0)
    erase: Share = key("probability of random erasing with normal noise in each pixel", 0.25)
    mixup: NotNegative = key("alpha of mixup's Beta distribution, 0 for none", 0.8)
    cutmix: NotNegative = key("alpha of cutmix's Beta distribution, 0 for none", 1.0)
    mix_probability: Share = key("of mixing a batch at all", 1.0)
    switch_probability: Share = key("of cutmix where both are on", 0.5)
    label_smoothing: BelowOne = key("share of the target that is divided among all classes", 0.1)
    repeats: Count = key(
        "times that an image stands in succession in the order, with different augmentation (repeated "
        "augmentation, Hoffer et al. 2020); the epoch keeps its length and sees fewer images",
        1,
    )
