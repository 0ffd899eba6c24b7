"""What training does to images, in this order: crop and flip, augment one by one, mix in pairs.

`Augmentation` has the values, as in a recipe. Each step has a plan, made for many examples at once from the
random numbers of their places, and a method that carries out the plan of one example or of one pair.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import AfterValidator

from keras_convnext._settings import (
    BelowOne,
    Count,
    NotNegative,
    Pair,
    Settings,
    Share,
    key,
    one_of,
)
from keras_convnext.data.preprocessing import INTERPOLATIONS, is_positive_integer

if TYPE_CHECKING:  # graphs, which TensorFlow makes; a recipe is checked without it
    from keras_convnext.data.blocks import Rows
    from keras_convnext.data.stream import Draws

Interpolation = Annotated[str, one_of(INTERPOLATIONS)]
POLICIES = ("none", "rand", "original", "originalr", "v0", "v0r", "imagenet", "ta_wide")


_KnownPolicy = one_of(
    POLICIES, f"a name that begins with one of {', '.join(POLICIES)}", lambda text: text.split("-")[0]
)


def _ordered(value: tuple[float, float]) -> tuple[float, float]:
    if not 0 < value[0] <= value[1]:
        raise ValueError("[smallest, largest], above 0")
    return value


def _shares(value: tuple[float, float]) -> tuple[float, float]:
    if not 0 < value[0] <= value[1] <= 1:
        raise ValueError("[smallest, largest], above 0 and at most 1")
    return value


class Augmentation(Settings):
    """What training does to images: the table [augmentation] of a recipe.

    The values in Python, where none are given, are those of ConvNeXt's ImageNet-1k training (Liu et al. 2022,
    table 5, and the official main.py). A new key is added here, with its use below: with a value that changes
    nothing and `optional=True`, the recipes that do not use it stay as they are.

    Example:
        Augmentation(policy="none", mixup=0, cutmix=0)
    """

    crop_scale: Annotated[Pair, AfterValidator(_shares)] = key(
        "smallest and largest area of the random crop, as shares of the image", (0.08, 1.0)
    )
    crop_ratio: Annotated[Pair, AfterValidator(_ordered)] = key(
        "smallest and largest width / height of the crop", (3 / 4, 4 / 3)
    )
    interpolation: Interpolation = key("of the crop and of the policy's geometric operations", "bicubic")
    flip: Share = key("probability of exchanging left and right", 0.5)
    policy: Annotated[str, _KnownPolicy] = key(
        "RandAugment, AutoAugment or TrivialAugment, as `augment.policies.parse_policy` reads it, or none",
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


class RandomCrop:
    """Decodes a random part of an image, resizes it to `image_size`, and exchanges left and right or not."""

    def __init__(self, image_size: tuple[int, int], augmentation: Augmentation) -> None:
        self.image_size, self.augmentation = image_size, augmentation

    def plan(self, draws: "Draws") -> "Rows":
        from keras_convnext.data import jpeg

        chosen = self.augmentation
        return {
            "crop": jpeg.plan_crop(draws.uniforms(22), chosen.crop_scale, chosen.crop_ratio),
            "flip": draws.uniforms(1)[:, 0] < chosen.flip,
        }

    def from_bytes(self, content: Any, row: "Rows") -> Any:
        """Crop an encoded image, with TensorFlow: scalar string to uint8 (height, width, 3)."""
        from keras_convnext.data import jpeg

        return jpeg.random_resized_crop(
            content,
            row["crop"],
            row["flip"],
            image_size=self.image_size,
            interpolation=self.augmentation.interpolation,
            ratio=self.augmentation.crop_ratio,
        )

    def from_pixels(self, pixels: Any, row: "Rows") -> Any:
        """Crop a decoded image: uint8 (H, W, 3) to uint8 (height, width, 3)."""
        import tensorflow as tf

        from keras_convnext.data import jpeg

        sizes = tf.unstack(tf.shape(pixels)[:2])
        top, left, height, width = jpeg.crop_box(sizes, row["crop"], self.augmentation.crop_ratio)
        return jpeg.resize(
            pixels[top : top + height, left : left + width],
            row["flip"],
            image_size=self.image_size,
            interpolation=self.augmentation.interpolation,
        )


class Augment:
    """Changes the pixels of one image: policy, colour jitter, erasing.

    Args:
        image_size: (height, width) of the images.
        augmentation: what to do.
        mean, std: of the normaliser that the model begins with; the noise of erasing is normal after it.
        dtype: "float32" or "uint8" of the result.
        seed: of the noise.
    """

    def __init__(
        self,
        image_size: tuple[int, int],
        augmentation: Augmentation,
        mean: Sequence[float],
        std: Sequence[float],
        dtype: str,
        seed: int,
    ) -> None:
        from keras_convnext.data.augment import policies

        check_choice("dtype", dtype, ("float32", "uint8"))
        self.policy = policies.parse_policy(augmentation.policy)
        # timm fills with the mean, torchvision with black.
        is_torchvisions = self.policy is not None and augmentation.policy.startswith(("ta_wide", "imagenet"))
        self.fill = (0, 0, 0) if is_torchvisions else tuple(min(255, round(255 * value)) for value in mean)
        self.image_size, self.augmentation = image_size, augmentation
        self.mean, self.std, self.dtype, self.seed = mean, std, dtype, seed

    def plan(self, draws: "Draws") -> "Rows":
        from keras_convnext.data.augment import erase_and_mix, policies

        chosen, rows = self.augmentation, {}
        if self.policy is not None:
            uniforms = draws.uniforms(policies.UNIFORMS_PER_OPERATION * self.policy.num_operations)
            rows["policy"] = policies.plan_augment(self.policy, uniforms, self.image_size)
        if chosen.color_jitter:
            uniforms = draws.uniforms(policies.NUM_JITTER_UNIFORMS)
            rows["jitter"] = policies.plan_jitter(uniforms, chosen.color_jitter)
        if chosen.erase:
            uniforms = draws.uniforms(erase_and_mix.NUM_ERASE_UNIFORMS)
            rows["erase"] = erase_and_mix.plan_erase(uniforms, chosen.erase, self.image_size)
        return rows

    def apply(self, image: Any, row: "Rows") -> Any:
        """Change one image: uint8 (height, width, 3) to `dtype`, in levels 0 to 255."""
        import tensorflow as tf

        from keras_convnext.data.augment import erase_and_mix, policies

        if self.policy is not None:
            image = policies.apply_augment(image, row["policy"], self.augmentation.interpolation, self.fill)
        if self.augmentation.color_jitter:
            image = policies.apply_jitter(image, row["jitter"])
        image = tf.cast(image, self.dtype)
        if self.augmentation.erase:
            key = tf.stack([tf.constant(self.seed, tf.int64), row["place"]])
            image = erase_and_mix.apply_erase(image, row["erase"], key, self.mean, self.std)
        return image


class Mix:
    """Mixes neighbours with each other by mixup or CutMix, and makes the targets.

    Args:
        image_size: (height, width) of the images.
        num_classes: length of the targets.
        batch_size: examples in a batch of all hosts.
        mix_group: examples that share one draw of mixing; None for all of a batch.
        augmentation: what to do.
        seed: of the draws.

    Attributes:
        unit: neighbours that are made together: 2 where they are mixed, else 1.
    """

    def __init__(
        self,
        image_size: tuple[int, int],
        num_classes: int,
        batch_size: int,
        mix_group: int | None,
        augmentation: Augmentation,
        seed: int,
    ) -> None:
        self.is_on = bool(augmentation.mixup or augmentation.cutmix)
        self.unit = 2 if self.is_on else 1
        mix_group = batch_size if mix_group is None else mix_group
        if not is_positive_integer(mix_group) or batch_size % mix_group or mix_group % self.unit:
            raise ValueError(
                f"Expected mix_group to divide the {batch_size} rows of a batch"
                f"{' and to be even' if self.is_on else ''}, received {mix_group!r}."
            )
        self.image_size, self.num_classes = image_size, num_classes
        self.batch_size, self.mix_group = batch_size, mix_group
        self.augmentation, self.seed = augmentation, seed

    def plan(self, places: Any) -> "Rows":
        if not self.is_on:
            return {}
        import tensorflow as tf

        from keras_convnext.data.augment import erase_and_mix

        # The groups of all hosts are drawn together, so that a group does not depend on whose it is.
        groups = erase_and_mix.plan_mix(
            tf.stack([tf.constant(self.seed, tf.int64), places[0] // self.batch_size]),
            self.batch_size // self.mix_group,
            self.image_size,
            self.augmentation.mixup,
            self.augmentation.cutmix,
            self.augmentation.mix_probability,
            self.augmentation.switch_probability,
        )
        group = places % self.batch_size // self.mix_group
        return {"mix": {name: tf.gather(values, group) for name, values in groups.items()}}

    def apply(self, images: list[Any], labels: list[Any], rows: "Rows") -> tuple[Any, Any]:
        """Mix `unit` neighbours of one group: their images, and targets float32 (unit, num_classes)."""
        import tensorflow as tf

        from keras_convnext.data.augment import erase_and_mix

        mixing = {name: values[:1] for name, values in rows["mix"].items()} if self.is_on else None
        return erase_and_mix.mix(
            tf.stack(images), tf.stack(labels), mixing, self.num_classes, self.augmentation.label_smoothing
        )


def check_choice(name: str, value: object, known: tuple[str, ...]) -> None:
    if value not in known:
        raise ValueError(f"Unknown {name} {value!r}. Known: {', '.join(known)}.")
