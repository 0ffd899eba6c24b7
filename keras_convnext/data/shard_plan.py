"""Where each image of a data set will lie in its shards: all that is known before one is read.

The size of an Example and the places of the image and the label map in it follow from the sizes of these, so
the index needs no reading of the shards.
"""

import dataclasses
import hashlib
import json
import os
from typing import cast

import numpy as np

from keras_convnext._terminal import Progress
from keras_convnext.data import sources
from keras_convnext.data.index import Source, SourceError
from keras_convnext.data.segmentation import sources as segmentation
from keras_convnext.data.segmentation.sources import SegmentationSource
from keras_convnext.data.tfrecords import FOOTER_BYTES, HEADER_BYTES, example_head, image_entry

SHARD_BYTES = 150_000_000  # of the default number of shards


@dataclasses.dataclass(frozen=True)
class Plan:
    """All that follows from the source and the arguments before an image is read."""

    split: str
    source: Source  # in the order that is written
    settings: dict[str, object]  # what a later run must agree with
    written: Source  # where the images will lie: so the index needs no reading of the shards
    pairs: SegmentationSource | None  # the images of `source` with their label maps, in the same order
    written_maps: Source | None
    sizes: np.ndarray  # int64 (num_shards,), bytes of each shard

    def places(self, shard: int) -> np.ndarray:
        """Of the shard's images in `source`, int64."""
        return np.flatnonzero(self.written.file_numbers == shard)


def make_plan(
    split: str,
    folder: str,
    source: Source,
    num_shards: int | None,
    seed: int,
    pairs: SegmentationSource | None = None,
) -> Plan:
    """Plans the shards of a split; `pairs` are the images of `source` with their label maps."""
    count, lengths = len(source), _lengths(source)
    map_lengths = np.zeros(count, np.int64) if pairs is None else _lengths(pairs.maps)
    described: object = source.classes if pairs is None else dataclasses.asdict(pairs.labels)
    fingerprint = hashlib.sha256(json.dumps(described).encode("utf-8"))
    fingerprint.update(np.stack([lengths, source.labels]).astype("<i8").tobytes())
    if pairs is not None:
        fingerprint.update(map_lengths.astype("<i8").tobytes())
    head_sizes = np.empty(count, np.int64)
    with Progress(f"Planning {split}", count) as progress:
        for number, length in enumerate(lengths.tolist()):
            fingerprint.update(source.name(number).encode("utf-8", "surrogateescape") + b"\n")
            label_map = None if pairs is None else bytes(map_lengths[number])
            head_sizes[number] = len(head(source, number, length, label_map))
            progress.show(number + 1)
    if num_shards is None:
        num_shards = max(1, round(int((lengths + map_lengths).sum()) / SHARD_BYTES))
    if num_shards > count:
        raise ValueError(
            f"Expected at most one shard for each of the {count} images, received shards={num_shards}."
        )
    # RandomState, because its stream is the same in every version of NumPy.
    order = np.random.RandomState(seed).permutation(count)
    ends = np.cumsum([len(part) for part in np.array_split(order, num_shards)])  # of the shards
    record_ends = np.cumsum((HEADER_BYTES + head_sizes + lengths + FOOTER_BYTES)[order])
    starts = np.concatenate([[0], record_ends[ends[:-1] - 1]])
    file_numbers = np.repeat(np.arange(num_shards, dtype=np.int32), np.diff(ends, prepend=0))
    names = [f"{split}-{shard:05d}-of-{num_shards:05d}.tfrecord" for shard in range(num_shards)]
    shuffled = sources.take(source, order)
    written = dataclasses.replace(
        shuffled,
        path=folder,
        kind="prepared",
        files=[os.path.join(folder, name) for name in names],
        file_numbers=file_numbers,
        offsets=record_ends - FOOTER_BYTES - lengths[order] - starts[file_numbers],
        lengths=lengths[order],
    )
    written_maps = None
    if pairs is not None:  # a map ends where the entry of the image begins
        pairs = segmentation.take(pairs, order)
        entries = np.array([len(image_entry(int(length))) for length in written.lengths])
        offsets = written.offsets - entries - map_lengths[order]
        written_maps = dataclasses.replace(written, offsets=offsets, lengths=map_lengths[order])
    settings: dict[str, object] = {
        "source": fingerprint.hexdigest(),
        "num_examples": count,
        "num_shards": num_shards,
        "shuffle_seed": seed,
    }
    sizes = record_ends[ends - 1] - starts
    return Plan(split, shuffled, settings, written, pairs, written_maps, sizes)


def _lengths(source: Source | segmentation.Maps) -> np.ndarray:
    """Returns the bytes of each encoded image, int64; maps that are drawn are drawn for that."""
    if not isinstance(source, Source):
        with Progress("Drawing label maps", len(source)) as progress:
            sizes = []
            for number in range(len(source)):
                sizes.append(len(source.read(number)))
                progress.show(number + 1)
        return np.array(sizes, np.int64)
    if source.kind == "folder":
        return np.array([os.path.getsize(file) for file in source.files], np.int64)
    return source.lengths


def head(source: Source, number: int, length: int, label_map: bytes | None = None) -> bytes:
    """Returns the Example of an image of `length` bytes up to the image; a label map comes just before it."""
    if label_map is not None:
        name = source.name(number).encode("utf-8", "surrogateescape")
        return example_head(length, {"image/filename": name, "image/segmentation/class/encoded": label_map})
    label = int(source.labels[number])
    return example_head(
        length,
        {
            "image/class/label": label,
            "image/class/synset": source.classes[label].encode("utf-8", "surrogateescape"),
            "image/filename": source.name(number).encode("utf-8", "surrogateescape"),
        },
    )


def changes_of(plan: Plan) -> np.ndarray:
    """Returns when the file of each image, or that of its map, last changed: int64 (N,), nanoseconds."""

    def changed(files: list[str]) -> np.ndarray:
        states = map(os.stat, files)
        return np.array([max(state.st_mtime_ns, state.st_ctime_ns) for state in states], np.int64)

    of_images = changed(plan.source.files)[plan.source.file_numbers]
    if plan.pairs is None:
        return of_images
    maps = plan.pairs.maps
    of_maps = changed(maps.files)[maps.file_numbers] if isinstance(maps, Source) else changed([maps.path])
    return np.maximum(of_images, of_maps)


def checked_map(plan: Plan, place: int) -> bytes:
    """Returns the encoded label map at a place; SourceError where it does not fit image or classes."""
    pairs, written = cast(SegmentationSource, plan.pairs), cast(Source, plan.written_maps)
    pairs.check(place)
    content = pairs.maps.read(place)
    if len(content) != written.lengths[place]:
        raise SourceError(
            f"Expected {written.lengths[place]} bytes in '{pairs.maps.name(place)}', received {len(content)}"
            ": it changed while it was read. Run prepare again."
        )
    return content
