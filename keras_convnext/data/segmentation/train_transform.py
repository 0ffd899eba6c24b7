"""`SegmentationAugmentation`: what training does to photographs and their maps. `augment` carries it out."""

from typing import Annotated

from pydantic import AfterValidator, Strict

from keras_convnext._settings import Pair, Settings, Share, UpToOne, key


def _sides(value: tuple[int, int]) -> tuple[int, int]:
    if not 0 < min(value) <= max(value) < 1 << 16:
        raise ValueError("two sides in pixels, from 1 to 65,535")
    return value


def _ordered(value: tuple[float, float]) -> tuple[float, float]:
    if not 0 < value[0] <= value[1] <= 100:
        raise ValueError("[smallest, largest], above 0 and at most 100")
    return value


Sides = Annotated[tuple[int, int], Strict(False), AfterValidator(_sides)]


class SegmentationAugmentation(Settings):
    """What training does to photographs and their label maps: the table [augmentation] of a recipe.

    The values in Python, where none are given, are those of UPerNet's training on ADE20K with ConvNeXt at 512
    pixels (Liu et al. 2022, appendix A.3; the pipeline is that of BEiT and mmsegmentation).

    Example:
        SegmentationAugmentation(base_size=(480, 360), photometric=0)
    """

    base_size: Sides = key(
        "long and short side of the box that an image fits, its aspect kept, at a scale of 1",
        (2048, 512),
    )
    scale: Annotated[Pair, AfterValidator(_ordered)] = key(
        "smallest and largest factor of base_size, drawn uniformly", (0.5, 2.0)
    )
    max_class_share: UpToOne = key(
        "of one class among the labelled pixels of a crop; ten crops are tried, 1 to take the first", 0.75
    )
    flip: Share = key("probability of exchanging left and right", 0.5)
    photometric: Share = key(
        "probability of each change of brightness, contrast, saturation and hue, 0 for none", 0.5
    )
