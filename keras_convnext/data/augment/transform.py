"""What training does to images, in this order: crop and flip, augment one by one, mix in pairs."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import tensorflow as tf

from keras_convnext.data import jpeg
from keras_convnext.data.augment import erase_and_mix, policies
from keras_convnext.data.blocks import Rows
from keras_convnext.data.preprocessing import is_positive_integer
from keras_convnext.data.stream import Draws
from keras_convnext.data.train_transform import Augmentation


@dataclasses.dataclass
class TrainTransform:
    """The steps of an `Augmentation`.

    `plan` decides about many examples at once, from the random numbers of their places; the other methods
    carry out the plan of one example (`row`) or of `unit` neighbours (`rows`), two where they are mixed.
    """

    augmentation: Augmentation
    image_size: tuple[int, int]  # (height, width) of the result
    num_classes: int  # length of the targets
    batch_size: int  # examples in a batch of all hosts
    mix_group: int  # examples that share one draw of mixing
    normaliser: tuple[Sequence[float], Sequence[float]]  # as for `batches.train_batches`
    dtype: str  # of the result, "float32" or "uint8"
    seed: int  # of the noise and of mixing

    def __post_init__(self) -> None:
        if self.dtype not in ("float32", "uint8"):
            raise ValueError(f"Unknown dtype {self.dtype!r}. Known: float32, uint8.")
        chosen = self.augmentation
        self.keras_layers = None
        if chosen.policy == "keras":
            from keras_convnext.data.augment.keras_layers import KerasLayers  # waits for Keras

            self.keras_layers = KerasLayers(chosen, self.image_size)
        self.policy = policies.parse_policy(chosen.policy)
        # timm fills with the mean, torchvision with black.
        is_torchvisions = chosen.policy.startswith(("ta_wide", "imagenet"))
        mean = tuple(min(255, round(255 * value)) for value in self.normaliser[0])
        self.fill = (0, 0, 0) if is_torchvisions else mean
        self._resized: dict[str, Any] = {"image_size": self.image_size, "interpolation": chosen.interpolation}
        is_mixed = bool(chosen.mixup or chosen.cutmix)
        self.unit = 2 if is_mixed else 1
        is_divisor = is_positive_integer(self.mix_group) and self.batch_size % self.mix_group == 0
        if not is_divisor or self.mix_group % self.unit:
            raise ValueError(
                f"Expected mix_group to divide the {self.batch_size} rows of a batch"
                f"{' and to be even' if is_mixed else ''}, received {self.mix_group!r}."
            )

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
            seed, num_groups = self._key(places[0] // self.batch_size), self.batch_size // self.mix_group
            settings = chosen.mixup, chosen.cutmix, chosen.mix_probability, chosen.switch_probability
            groups = erase_and_mix.plan_mix(seed, num_groups, self.image_size, *settings)
            group = places % self.batch_size // self.mix_group
            rows["mix"] = {name: tf.gather(values, group) for name, values in groups.items()}
        return rows

    def crop_bytes(self, content: Any, row: Rows) -> Any:
        """Crop and flip an encoded image: scalar string to uint8 (height, width, 3)."""
        ratio = self.augmentation.crop_ratio
        return jpeg.random_resized_crop(content, row["crop"], row["flip"], ratio=ratio, **self._resized)

    def crop_pixels(self, pixels: Any, row: Rows) -> Any:
        """Crop and flip a decoded image: uint8 (H, W, 3) to uint8 (height, width, 3)."""
        sizes = tf.unstack(tf.shape(pixels)[:2])
        top, left, height, width = jpeg.crop_box(sizes, row["crop"], self.augmentation.crop_ratio)
        return jpeg.resize(pixels[top : top + height, left : left + width], row["flip"], **self._resized)

    def make(self, rows: Rows, cropped: Callable[[Rows], tuple[Any, Any]]) -> Rows:
        """Make `unit` neighbours of one group: images, `dtype` in levels 0 to 255, and float32 targets.

        `cropped` gives the image of a row after its crop, and its label.
        """
        images, labels = [], []
        for index in range(self.unit):  # one by one and then mixed, while they are in the cache
            row = tf.nest.map_structure(lambda values, index=index: values[index], rows)
            image, label = cropped(row)
            images.append(self._augmented(image, row))
            labels.append(label)
        is_ours = self.unit == 2 and self.keras_layers is None
        plan = {name: values[:1] for name, values in rows["mix"].items()} if is_ours else None
        smoothing = self.augmentation.label_smoothing
        images, labels = tf.stack(images), tf.stack(labels)
        images, targets = erase_and_mix.mix(images, labels, plan, self.num_classes, smoothing)
        if self.unit == 2 and self.keras_layers is not None:
            images, targets = self.keras_layers.mixed(images, targets, self._key(rows["place"][0]))
        return {"images": images, "targets": targets}

    def _augmented(self, image: Any, row: Rows) -> Any:
        if self.keras_layers is not None:
            image = self.keras_layers.augmented(image, self._key(-1 - row["place"]))  # not the pair's key
        if self.policy is not None:
            image = policies.apply_augment(image, row["policy"], self.augmentation.interpolation, self.fill)
        if self.augmentation.color_jitter:
            image = policies.apply_jitter(image, row["jitter"])
        image = tf.cast(image, self.dtype)
        if self.augmentation.erase:
            image = erase_and_mix.apply_erase(image, row["erase"], self._key(row["place"]), *self.normaliser)
        return image

    def _key(self, place: Any) -> Any:
        return tf.stack([tf.constant(self.seed, tf.int64), place])
