"""What training does to images, in this order: crop and flip, augment one by one, mix in pairs."""

from collections.abc import Sequence
from typing import Any

import tensorflow as tf

from keras_convnext.data import jpeg
from keras_convnext.data.augment import erase_and_mix, policies
from keras_convnext.data.blocks import Rows
from keras_convnext.data.preprocessing import is_positive_integer
from keras_convnext.data.stream import Draws
from keras_convnext.data.train_transform import Augmentation


class TrainTransform:
    """The steps of an `Augmentation`.

    `plan` decides about many examples at once, from the random numbers of their places; the other methods
    carry out the plan of one example (`row`) or of `unit` neighbours (`rows`).

    Args:
        augmentation: what to do.
        image_size: (height, width) of the result.
        num_classes: length of the targets.
        batch_size: examples in a batch of all hosts.
        mix_group: examples that share one draw of mixing; None for all of a batch.
        normaliser: (mean, std) that the model begins with; the noise of erasing is normal after it.
        dtype: "float32" or "uint8" of the result.
        seed: of the noise and of mixing.

    Attributes:
        unit: neighbours that are made together: 2 where they are mixed, else 1.
    """

    def __init__(
        self,
        augmentation: Augmentation,
        image_size: tuple[int, int],
        num_classes: int,
        batch_size: int,
        mix_group: int | None,
        normaliser: tuple[Sequence[float], Sequence[float]],
        dtype: str,
        seed: int,
    ) -> None:
        if dtype not in ("float32", "uint8"):
            raise ValueError(f"Unknown dtype {dtype!r}. Known: float32, uint8.")
        self.policy = policies.parse_policy(augmentation.policy)
        # timm fills with the mean, torchvision with black.
        is_torchvisions = augmentation.policy.startswith(("ta_wide", "imagenet"))
        mean = tuple(min(255, round(255 * value)) for value in normaliser[0])
        self.fill = (0, 0, 0) if is_torchvisions else mean
        is_mixed = bool(augmentation.mixup or augmentation.cutmix)
        self.unit = 2 if is_mixed else 1
        mix_group = batch_size if mix_group is None else mix_group
        if not is_positive_integer(mix_group) or batch_size % mix_group or mix_group % self.unit:
            raise ValueError(
                f"Expected mix_group to divide the {batch_size} rows of a batch"
                f"{' and to be even' if is_mixed else ''}, received {mix_group!r}."
            )
        self.augmentation, self.image_size, self.num_classes = augmentation, image_size, num_classes
        self.batch_size, self.mix_group = batch_size, mix_group
        self.normaliser, self.dtype, self.seed = normaliser, dtype, seed

    def plan(self, draws: Draws, places: Any) -> Rows:
        chosen = self.augmentation
        rows = {
            "crop": jpeg.plan_crop(draws.uniforms(22), chosen.crop_scale, chosen.crop_ratio),
            "flip": draws.uniforms(1)[:, 0] < chosen.flip,
        }
        if self.policy is not None:
            uniforms = draws.uniforms(policies.UNIFORMS_PER_OPERATION * self.policy.num_operations)
            rows["policy"] = policies.plan_augment(self.policy, uniforms, self.image_size)
        if chosen.color_jitter:
            uniforms = draws.uniforms(policies.NUM_JITTER_UNIFORMS)
            rows["jitter"] = policies.plan_jitter(uniforms, chosen.color_jitter)
        if chosen.erase:
            uniforms = draws.uniforms(erase_and_mix.NUM_ERASE_UNIFORMS)
            rows["erase"] = erase_and_mix.plan_erase(uniforms, chosen.erase, self.image_size)
        if self.unit == 2:
            # The groups of all hosts are drawn together, so that a group does not depend on whose it is.
            groups = erase_and_mix.plan_mix(
                self._key(places[0] // self.batch_size),
                self.batch_size // self.mix_group,
                self.image_size,
                chosen.mixup,
                chosen.cutmix,
                chosen.mix_probability,
                chosen.switch_probability,
            )
            group = places % self.batch_size // self.mix_group
            rows["mix"] = {name: tf.gather(values, group) for name, values in groups.items()}
        return rows

    def crop_bytes(self, content: Any, row: Rows) -> Any:
        """Crop and flip an encoded image: scalar string to uint8 (height, width, 3)."""
        return jpeg.random_resized_crop(
            content,
            row["crop"],
            row["flip"],
            image_size=self.image_size,
            interpolation=self.augmentation.interpolation,
            ratio=self.augmentation.crop_ratio,
        )

    def crop_pixels(self, pixels: Any, row: Rows) -> Any:
        """Crop and flip a decoded image: uint8 (H, W, 3) to uint8 (height, width, 3)."""
        sizes = tf.unstack(tf.shape(pixels)[:2])
        top, left, height, width = jpeg.crop_box(sizes, row["crop"], self.augmentation.crop_ratio)
        return jpeg.resize(
            pixels[top : top + height, left : left + width],
            row["flip"],
            image_size=self.image_size,
            interpolation=self.augmentation.interpolation,
        )

    def augment(self, image: Any, row: Rows) -> Any:
        """Change one image: uint8 (height, width, 3) to `dtype`, in levels 0 to 255."""
        if self.policy is not None:
            image = policies.apply_augment(image, row["policy"], self.augmentation.interpolation, self.fill)
        if self.augmentation.color_jitter:
            image = policies.apply_jitter(image, row["jitter"])
        image = tf.cast(image, self.dtype)
        if self.augmentation.erase:
            image = erase_and_mix.apply_erase(image, row["erase"], self._key(row["place"]), *self.normaliser)
        return image

    def mix(self, images: list[Any], labels: list[Any], rows: Rows) -> tuple[Any, Any]:
        """Mix `unit` neighbours of one group: their images, and targets float32 (unit, num_classes)."""
        plan = {name: values[:1] for name, values in rows["mix"].items()} if self.unit == 2 else None
        smoothing = self.augmentation.label_smoothing
        return erase_and_mix.mix(tf.stack(images), tf.stack(labels), plan, self.num_classes, smoothing)

    def _key(self, place: Any) -> Any:
        return tf.stack([tf.constant(self.seed, tf.int64), place])
