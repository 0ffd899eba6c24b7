"""Batches of photographs and label maps for training, as `tf.data`.

What happens to the example at a place of the order is a function of the seed and of that place alone, as in
`data.batches`.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import tensorflow as tf

from keras_convnext.data import batches as photos
from keras_convnext.data import blocks
from keras_convnext.data.blocks import Rows
from keras_convnext.data.faults import Faults
from keras_convnext.data.preprocessing import IMAGENET_MEAN, Preprocessing
from keras_convnext.data.segmentation.augment import SegmentationTransform
from keras_convnext.data.segmentation.label_maps import LabelMapError
from keras_convnext.data.segmentation.sources import SegmentationSource
from keras_convnext.data.segmentation.train_transform import SegmentationAugmentation
from keras_convnext.data.stream import Draws, Part

_PUBLISHED, _WHOLE = SegmentationAugmentation(), Part()
_NEIGHBOURS = 8  # tried in place of an image that cannot be decoded


def train_batches(
    source: SegmentationSource,
    *,
    batch_size: int,
    crop_size: int | tuple[int, int] = 512,
    augmentation: SegmentationAugmentation = _PUBLISHED,
    mean: Sequence[float] = IMAGENET_MEAN,
    seed: int = 0,
    part: Part = _WHOLE,
    dtype: str = "float32",
    faults: Faults | None = None,
    workers: int | None = None,
) -> Any:
    """Make batches for training, without end: random resize, crop, flip and photometric distortion.

    An epoch has its own permutation of the examples, and what is left over of its batches is dropped. As no
    epoch repeats another, the stream has no end: `fit` needs `steps_per_epoch`. Several hosts together make
    the batches of one.

    An image that cannot be decoded is noted in `faults`, and the next example of the source that can be
    stands in for it. A label map that does not fit its image or the classes stops the stream.

    Args:
        source: what `sources.open_source` returns.
        batch_size: examples in a batch of all hosts together.
        crop_size: of the result in pixels, one side of a square or (height, width).
        augmentation: what is done to images and maps; default as for UPerNet on ADE20K.
        mean: that the model begins with subtracting, in 0..1; its colour is that of the padding.
        seed: of order and augmentation, an integer from 0 up.
        part: where the stream is entered and how it is shared among hosts; default all of it, from its start.
        dtype: "float32", or "uint8" for a quarter of the memory; the padding is rounded then.
        faults: collects images that cannot be decoded; the default is a new collection.
        workers: images in work at a time, the default is the number of CPU cores.

    Returns:
        `tf.data.Dataset` without end of (images, maps): `dtype` (n, height, width, 3), RGB, 0 to 255, and
        int32 (n, height, width), class numbers and 255 for ignored; n is batch_size / part.num_hosts. A loop
        over it raises `DataError` when `faults.check` does, and `LabelMapError`.

    Raises:
        ValueError: an argument is outside its range; the message has what is allowed.

    Example:
        batches = train_batches(open_source("camvid", "train"), batch_size=8, crop_size=192)
        model.fit(batches, steps_per_epoch=45, epochs=30)
    """
    if dtype not in ("float32", "uint8"):
        raise ValueError(f"Unknown dtype {dtype!r}. Known: float32, uint8.")
    order = photos.order_of(source, batch_size, part, seed)
    size = Preprocessing(crop_size).size
    colour = tuple(255 * value for value in mean)
    transform = SegmentationTransform(augmentation, size, colour, dtype)
    faults = Faults(source) if faults is None else faults
    load, load_or_next = _loaders(source, faults)
    blocks.leave_accelerators()

    def plan(rows: Any) -> Rows:
        places = order.places(rows)
        return {"number": order.numbers(places), **transform.plan(Draws(seed, places))}

    def made(rows: Rows, loader: Any) -> Rows:
        row = {name: values[0] for name, values in rows.items()}
        image, label_map = loader(row["number"])
        image, label_map = transform.make(image, label_map, row)
        return {"images": image[None], "maps": label_map[None]}

    def without_faults(batch: Rows) -> tuple[Any, Any]:
        return batch["images"], blocks.checked(batch["maps"], tf.reduce_any(batch["is_repaired"]), faults)

    batches = blocks.make_in_blocks(
        None,
        order.rows_a_batch,
        1,
        plan,
        lambda rows: made(rows, load),
        lambda rows: made(rows, load_or_next),
        workers,
    )
    endless = tf.data.experimental.assert_cardinality(tf.data.INFINITE_CARDINALITY)
    return blocks.finished(batches.map(without_faults).apply(endless), workers, faults)


def _loaders(source: SegmentationSource, faults: Faults) -> tuple[Any, Any]:
    """Return functions from an example's number to its image and map: the first raises, the second does not.

    Decoders work without Python's lock. The second takes the next example in place of a damaged one, and
    notes in `faults` what stops the stream.
    """

    def load(number: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        return source.load(int(number))

    def load_or_next(number: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        for candidate in range(int(number), int(number) + _NEIGHBOURS + 1):
            candidate %= len(source)
            try:
                return source.load(candidate)
            except LabelMapError as error:
                faults.refuse(error)
                break
            except (ValueError, OSError, MemoryError) as error:
                faults.add(candidate, str(error))
        return np.zeros((2, 2, 3), np.uint8), np.full((2, 2), 255, np.uint8)

    def in_graph(function: Any) -> Any:
        def loaded(number: Any) -> tuple[Any, Any]:
            image, label_map = tf.numpy_function(function, [number], (tf.uint8, tf.uint8), stateful=False)
            return tf.ensure_shape(image, (None, None, 3)), tf.ensure_shape(label_map, (None, None))

        return loaded

    return in_graph(load), in_graph(load_or_next)
