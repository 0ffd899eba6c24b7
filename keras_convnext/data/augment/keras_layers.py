"""Keras core's RandAugment, MixUp and CutMix in the place of ours: the recipe value policy = "keras".

They are keras-cv's successors, and not the papers': RandAugment chooses two of 11 operations with a strength
up to 0.5, and each image of a pair gets a lambda of its own. All operations are computed and one is kept.
"""

from typing import Any

import tensorflow as tf

from keras_convnext.data.train_transform import Augmentation


class KerasLayers:
    """The layers, whose draws are functions of a key, where by themselves they would count calls."""

    def __init__(self, chosen: Augmentation, image_size: tuple[int, int]) -> None:
        import keras

        class Draws(keras.random.SeedGenerator):
            """Seeds that follow from a key, one after another."""

            def __init__(self, key: Any) -> None:
                self.key, self.count = key, 0

            def next(self, ordered: bool = True) -> Any:
                self.count += 1
                seeds = tf.random.experimental.stateless_fold_in(self.key, self.count)
                return tf.cast(seeds & 0x7FFFFFFF, tf.int32)

        settings: dict[str, Any] = {"dtype": "float32", "data_format": "channels_last"}
        self._draws = Draws
        self._augment = keras.layers.RandAugment(value_range=(0, 255), **settings)
        self._augment.build((1, *image_size, 3))
        self._mixup = keras.layers.MixUp(chosen.mixup or 1.0, **settings)
        self._cutmix = keras.layers.CutMix(chosen.cutmix or 1.0, **settings)
        both = chosen.mixup and chosen.cutmix
        self._cutmix_share = chosen.switch_probability if both else float(bool(chosen.cutmix))
        self._mix_probability = chosen.mix_probability

    def augmented(self, image: Any, key: Any) -> Any:
        """RandAugment of one image, uint8 (H, W, 3) to the same."""
        made, _ = self._transformed(self._augment, self._draws(key), tf.cast(image[None], tf.float32))
        made = tf.cast(tf.round(tf.clip_by_value(made[0], 0.0, 255.0)), tf.uint8)
        return tf.ensure_shape(made, image.shape)

    def mixed(self, images: Any, targets: Any, key: Any) -> tuple[Any, Any]:
        """MixUp or CutMix of a pair, `dtype` (2, H, W, 3), and its targets (2, classes), or neither."""
        draws = self._draws(key)
        whether, which = tf.unstack(tf.random.stateless_uniform([2], draws.next()))

        def apply(layer: Any) -> tuple[Any, Any]:
            pixels, values = self._transformed(layer, draws, tf.cast(images, tf.float32), targets)
            if images.dtype == tf.uint8:
                pixels = tf.round(pixels)
            return tf.ensure_shape(tf.cast(pixels, images.dtype), images.shape), values

        def mix() -> tuple[Any, Any]:
            is_cutmix = which < self._cutmix_share
            return tf.cond(is_cutmix, lambda: apply(self._cutmix), lambda: apply(self._mixup))

        return tf.cond(whether < self._mix_probability, mix, lambda: (images, tf.identity(targets)))

    def _transformed(self, layer: Any, draws: Any, images: Any, targets: Any = None) -> tuple[Any, Any]:
        """Runs a layer in a TensorFlow graph, on every backend."""
        layer._get_seed_generator = lambda backend=None: draws
        layer.backend.set_backend("tensorflow")
        plan = layer.get_random_transformation(images, training=True)
        if "permutation_order" in plan:
            plan["permutation_order"] = tf.constant(
                [1, 0]
            )  # the pair, which would be left alone half the time
        images = layer.transform_images(images, plan, training=True)
        if targets is not None:
            targets = tf.cast(layer.transform_labels(targets, plan, training=True), tf.float32)
        return images, targets
