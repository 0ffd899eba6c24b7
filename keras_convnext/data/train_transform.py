"""What training does to images, in this order: crop and flip, augment one by one, mix in pairs.

Each step has a plan, made for many examples at once from the random numbers of their places, and a method
that carries out the plan of one example or of one pair.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import tensorflow as tf

from keras_convnext.data import jpeg
from keras_convnext.data.augment import erase_and_mix, policies
from keras_convnext.data.blocks import Rows
from keras_convnext.data.preprocessing import INTERPOLATIONS, is_positive_integer
from keras_convnext.data.stream import Draws


class RandomCrop:
    """Decodes a random part of an image, resizes it, and exchanges left and right or not.

    The arguments are those of `batches.train_batches`.
    """

    def __init__(
        self,
        image_size: tuple[int, int],
        scale: tuple[float, float],
        ratio: tuple[float, float],
        interpolation: str,
        flip: float,
    ) -> None:
        check_choice("interpolation", interpolation, INTERPOLATIONS)
        check_share("flip", flip)
        for name, (low, high), limit in (("scale", scale, 1.0), ("ratio", ratio, np.inf)):
            if not 0 < low <= high <= limit:
                raise ValueError(
                    f"Expected {name} to be (smallest, largest), above 0 and at most {limit}, "
                    f"received {(low, high)!r}."
                )
        self.image_size, self.scale, self.ratio = image_size, scale, ratio
        self.interpolation, self.flip = interpolation, flip

    def plan(self, draws: Draws) -> Rows:
        return {
            "crop": jpeg.plan_crop(draws.uniforms(22), self.scale, self.ratio),
            "flip": draws.uniforms(1)[:, 0] < self.flip,
        }

    def from_bytes(self, content: Any, row: Rows) -> Any:
        """Crop an encoded image, with TensorFlow: scalar string to uint8 (height, width, 3)."""
        return jpeg.random_resized_crop(
            content,
            row["crop"],
            row["flip"],
            image_size=self.image_size,
            interpolation=self.interpolation,
            ratio=self.ratio,
        )

    def from_pixels(self, pixels: Any, row: Rows) -> Any:
        """Crop a decoded image: uint8 (H, W, 3) to uint8 (height, width, 3)."""
        top, left, height, width = jpeg.crop_box(tf.unstack(tf.shape(pixels)[:2]), row["crop"], self.ratio)
        pixels = pixels[top : top + height, left : left + width]
        return jpeg.resize(pixels, row["flip"], image_size=self.image_size, interpolation=self.interpolation)


class Augment:
    """Changes the pixels of one image: policy, colour jitter, erasing.

    The arguments are those of `batches.train_batches`.
    """

    def __init__(
        self,
        image_size: tuple[int, int],
        policy: str,
        interpolation: str,
        color_jitter: float,
        erase: float,
        mean: Sequence[float],
        std: Sequence[float],
        dtype: str,
        seed: int,
    ) -> None:
        check_choice("dtype", dtype, ("float32", "uint8"))
        check_share("erase", erase)
        check_not_negative("color_jitter", color_jitter)
        self.policy = policies.parse_policy(policy)
        # timm fills with the mean, torchvision with black.
        is_torchvisions = self.policy is not None and policy.startswith(("ta_wide", "imagenet"))
        self.fill = (0, 0, 0) if is_torchvisions else tuple(min(255, round(255 * value)) for value in mean)
        self.image_size, self.interpolation = image_size, interpolation
        self.color_jitter, self.erase = color_jitter, erase
        self.mean, self.std, self.dtype, self.seed = mean, std, dtype, seed

    def plan(self, draws: Draws) -> Rows:
        rows = {}
        if self.policy is not None:
            uniforms = draws.uniforms(policies.UNIFORMS_PER_OPERATION * self.policy.num_operations)
            rows["policy"] = policies.plan_augment(self.policy, uniforms, self.image_size)
        if self.color_jitter:
            uniforms = draws.uniforms(policies.NUM_JITTER_UNIFORMS)
            rows["jitter"] = policies.plan_jitter(uniforms, self.color_jitter)
        if self.erase:
            uniforms = draws.uniforms(erase_and_mix.NUM_ERASE_UNIFORMS)
            rows["erase"] = erase_and_mix.plan_erase(uniforms, self.erase, self.image_size)
        return rows

    def apply(self, image: Any, row: Rows) -> Any:
        """Change one image: uint8 (height, width, 3) to `dtype`, in levels 0 to 255."""
        if self.policy is not None:
            image = policies.apply_augment(image, row["policy"], self.interpolation, self.fill)
        if self.color_jitter:
            image = policies.apply_jitter(image, row["jitter"])
        image = tf.cast(image, self.dtype)
        if self.erase:
            key = tf.stack([tf.constant(self.seed, tf.int64), row["place"]])
            image = erase_and_mix.apply_erase(image, row["erase"], key, self.mean, self.std)
        return image


class Mix:
    """Mixes neighbours with each other by mixup or CutMix, and makes the targets.

    The arguments are those of `batches.train_batches`.

    Attributes:
        unit: neighbours that are made together: 2 where they are mixed, else 1.
    """

    def __init__(
        self,
        image_size: tuple[int, int],
        num_classes: int,
        batch_size: int,
        mix_group: int | None,
        mixup: float,
        cutmix: float,
        mix_probability: float,
        switch_probability: float,
        label_smoothing: float,
        seed: int,
    ) -> None:
        for name, share in (
            ("label_smoothing", label_smoothing),
            ("mix_probability", mix_probability),
            ("switch_probability", switch_probability),
        ):
            check_share(name, share)
        check_not_negative("mixup", mixup)
        check_not_negative("cutmix", cutmix)
        self.is_on = bool(mixup or cutmix)
        self.unit = 2 if self.is_on else 1
        mix_group = batch_size if mix_group is None else mix_group
        if not is_positive_integer(mix_group) or batch_size % mix_group or mix_group % self.unit:
            raise ValueError(
                f"Expected mix_group to divide the {batch_size} rows of a batch"
                f"{' and to be even' if self.is_on else ''}, received {mix_group!r}."
            )
        self.image_size, self.num_classes = image_size, num_classes
        self.batch_size, self.mix_group = batch_size, mix_group
        self.mixup, self.cutmix = mixup, cutmix
        self.mix_probability, self.switch_probability = mix_probability, switch_probability
        self.label_smoothing, self.seed = label_smoothing, seed

    def plan(self, places: Any) -> Rows:
        if not self.is_on:
            return {}
        # The groups of all hosts are drawn together, so that a group does not depend on whose it is.
        groups = erase_and_mix.plan_mix(
            tf.stack([tf.constant(self.seed, tf.int64), places[0] // self.batch_size]),
            self.batch_size // self.mix_group,
            self.image_size,
            self.mixup,
            self.cutmix,
            self.mix_probability,
            self.switch_probability,
        )
        group = places % self.batch_size // self.mix_group
        return {"mix": {name: tf.gather(values, group) for name, values in groups.items()}}

    def apply(self, images: list[Any], labels: list[Any], rows: Rows) -> tuple[Any, Any]:
        """Mix `unit` neighbours of one group: their images, and targets float32 (unit, num_classes)."""
        mixing = {name: values[:1] for name, values in rows["mix"].items()} if self.is_on else None
        return erase_and_mix.mix(
            tf.stack(images), tf.stack(labels), mixing, self.num_classes, self.label_smoothing
        )


def check_choice(name: str, value: object, known: tuple[str, ...]) -> None:
    if value not in known:
        raise ValueError(f"Unknown {name} {value!r}. Known: {', '.join(known)}.")


def check_share(name: str, value: float) -> None:
    if not 0 <= value <= 1:
        raise ValueError(f"Expected {name} in [0, 1], received {value!r}.")


def check_not_negative(name: str, value: float) -> None:
    if value < 0:
        raise ValueError(f"Expected {name} to be 0, for none, or more, received {value!r}.")
