"""Copies a data set into shuffled TFRecord shards that this package, and others, read fast.

The encoded images are copied byte for byte. TensorFlow is imported when the first shard is written.
"""

import concurrent.futures
import contextlib
import dataclasses
import errno
import functools
import json
import os
import pathlib
import re
import secrets
import shutil
import threading
import time
from collections.abc import Callable, Iterator, Sequence

import numpy as np

from keras_convnext import _files
from keras_convnext._environment import require
from keras_convnext._files import StrPath, replace_file, try_lock
from keras_convnext._terminal import Progress, say
from keras_convnext.data import index, sources
from keras_convnext.data.index import MANIFEST, Source, SourceError, write_index
from keras_convnext.data.records import checked_files, file_record, is_prepared, read_manifest
from keras_convnext.data.segmentation import sources as segmentation
from keras_convnext.data.segmentation.sources import SegmentationSource
from keras_convnext.data.shard_plan import Plan, changes_of, checked_map, head, make_plan
from keras_convnext.data.tfrecords import FOOTER_BYTES, HEADER_BYTES

# Of a shard, in journal and manifest.
_RECORD = {"name": str, "size": int, "sha256": str, "num_examples": int}


class PrepareError(SourceError):
    """A data set could not be written: where, why and what to do."""


@dataclasses.dataclass(frozen=True)
class Summary:
    """What `prepare` did."""

    output: str  # the folder
    images: dict[str, int]  # number of images of each split
    shards: dict[str, int]  # number of shards of each split
    num_bytes: int  # of all shards
    num_kept: int  # shards that an earlier run had finished
    seconds: float


def prepare(
    source_path: str | os.PathLike[str],
    output: str | os.PathLike[str],
    split: str | None = None,
    *,
    labels: str | os.PathLike[str] | None = None,
    ignored_values: Sequence[int] | None = None,
    shards: int | None = None,
    workers: int | None = None,
    shuffle_seed: int = 0,
) -> Summary:
    """Writes a data set as TFRecord shards with an index.

    Each split becomes files such as "train-00012-of-00960.tfrecord" of tf.train.Example with

    - image/encoded: bytes, the encoded image as it was;
    - image/class/label: int64, class number from 0;
    - image/class/synset: bytes, name of the class;
    - image/filename: bytes, name of the example in the source,

    or, of photographs with label maps (see `segmentation.sources.open_source`), in place of class and synset

    - image/segmentation/class/encoded: bytes, the PNG of the label map as it was,

    in an order shuffled over all shards, so that reading shard after shard gives a good mix. Beside them are
    "<split>-index.npz", the byte ranges that `open_source` uses, and manifest.json, with size and SHA-256 of
    each file. The same source, seed and number of shards give the same bytes.

    The same call continues a run that was killed and repairs a finished folder: shards whose SHA-256 is that
    of the journal or the manifest are kept. Images are read in random order, so the source should lie on a
    disk without seek time.

    Args:
        source_path, split, labels: as for `open_source`; split None is all splits.
        ignored_values: of label maps, the values that stand for "not labelled".
        output: folder, made when it is not there. It may hold other splits that `prepare` wrote.
        shards: number of files a split. Default: as many as make files of about 150 MB.
        workers: threads that read and write. Default: number of processors, at most 16.
        shuffle_seed: 0 to 2**32 - 1, seed of the order.

    Raises:
        ValueError: a number is out of range.
        SourceError: as for `open_source`.
        PrepareError: the folder was prepared with other settings or is in use, or the disk is full.
        ImportError: TensorFlow is not installed.
    """
    for name, value, low, high in (
        ("shards", shards, 1, 99_999),
        ("workers", workers, 1, 1024),
        ("shuffle_seed", shuffle_seed, 0, 2**32 - 1),
    ):
        is_integer = isinstance(value, int | np.integer) and not isinstance(value, bool)
        is_default = value is None and name != "shuffle_seed"
        if not is_default and not (is_integer and low <= int(value or 0) <= high):
            raise ValueError(f"Expected {name} to be an integer from {low} to {high}, received {value!r}.")
    begin = time.monotonic()
    output = os.fspath(output)
    if os.path.exists(output) and os.path.exists(source_path) and os.path.samefile(source_path, output):
        raise ValueError(
            f"Expected output to be another folder than the source, received '{output}' for both."
        )
    sources.check_outside(source_path, output)
    require("tensorflow", "Writing shards")
    if os.path.isfile(output):
        raise PrepareError(f"Expected a folder to write to, received the file '{output}'. Pass another path.")
    has_maps = segmentation.is_segmentation(source_path)
    if not has_maps and ignored_values is not None:
        raise ValueError(
            f"Expected ignored_values=None for '{source_path}', which has no label maps, received "
            f"{ignored_values}."
        )
    list_splits = (
        segmentation.list_splits if has_maps else functools.partial(sources.list_splits, labels=labels)
    )
    found = list_splits(source_path) if split is None else [split]
    asked: list[str | None] = [*found] or [None]
    folder = sources.canonical_split(os.path.basename(os.path.abspath(source_path)), is_whole=True)
    names = [sources.canonical_split(name or "") or name or folder or "train" for name in asked]
    if len(set(names)) < len(names):  # "train1" and "train2"
        names = [str(name) for name in asked]
    # All are opened before one is written, so that trouble with the last one shows at once.
    splits: dict[str, Source] = {}
    pairs: dict[str, SegmentationSource] = {}
    if has_maps:
        pairs = _open_pairs(source_path, dict(zip(names, asked, strict=True)), labels, ignored_values, output)
        splits = {name: pair.images for name, pair in pairs.items()}
    else:
        opened = [sources.open_source(source_path, name, labels=labels) for name in asked]
        splits = _numbered_alike(dict(zip(names, opened, strict=True)), output)
    for name, source in splits.items():
        lines = segmentation.described(pairs[name], name) if pairs else index.described(source, name)
        say("\n".join(lines))
    os.makedirs(output, exist_ok=True)
    with _files.open_to_lock(os.path.join(output, "prepare.lock")) as lock:
        if not try_lock(lock):
            raise PrepareError(f"Another process prepares '{output}'. Wait for it, or pass another folder.")
        plans, num_kept = [], 0
        for name, source in splits.items():
            plans.append(make_plan(name, output, source, shards, int(shuffle_seed), pairs.get(name)))
            num_kept += _write_split(plans[-1], workers or min(os.cpu_count() or 1, 16))
    return Summary(
        output=output,
        images={plan.split: len(plan.source) for plan in plans},
        shards={plan.split: len(plan.sizes) for plan in plans},
        num_bytes=sum(int(plan.sizes.sum()) for plan in plans),
        num_kept=num_kept,
        seconds=time.monotonic() - begin,
    )


def _open_pairs(
    path: StrPath,
    splits: dict[str, str | None],
    labels: StrPath | None,
    ignored: Sequence[int] | None,
    output: str,
) -> dict[str, SegmentationSource]:
    """Opens the splits of a set with label maps, all with the labels of the one to train on.

    An earlier call may have written that one.
    """
    if labels is not None:
        raise ValueError(
            f"Expected labels=None for '{path}', which has label maps, received '{labels}'. Name the classes "
            "in a file classes.txt in that folder."
        )
    first = "train" if "train" in splits else next(iter(splits))
    written = read_manifest(output)["splits"] if is_prepared(output) else {}
    stored = written.get("train", {}).get("segmentation") if first != "train" else None
    trained = segmentation.open_source(
        path, splits[first], labels=stored and segmentation.stored_labels(stored), ignored_values=ignored
    )
    others = {
        name: segmentation.open_source(path, split, labels=trained.labels)
        for name, split in splits.items()
        if name != first
    }
    return {name: others.get(name, trained) for name in splits}


def _numbered_alike(splits: dict[str, Source], output: str) -> dict[str, Source]:
    """Gives folders the classes of the split to train on, which an earlier call may have written."""
    if "train" in splits:
        trained = splits["train"].classes
    else:
        written = read_manifest(output)["splits"] if is_prepared(output) else {}
        longest = max((source.classes for source in splits.values()), key=len)
        trained = written.get("train", {"classes": longest})["classes"]
    return {
        name: index.with_classes(source, trained) if source.kind == "folder" else source
        for name, source in splits.items()
    }


def _write_split(plan: Plan, workers: int) -> int:
    """Writes what is missing of a split; returns the number of shards that were there."""
    folder, shards = plan.written.path, plan.written.files
    names = (f"{plan.split}-journal.jsonl", f"{plan.split}-index.npz", f"{plan.split}-maps.npz", MANIFEST)
    journal, index_path, maps_path, manifest_path = (os.path.join(folder, name) for name in names)
    manifest: dict = {"format": "keras_convnext", "version": index.INDEX_VERSION, "splits": {}}
    if os.path.exists(manifest_path):
        manifest = read_manifest(folder)
    entry = manifest["splits"].get(plan.split)
    lines = _journal_lines(journal)
    if entry is None and lines is None:
        for path in (journal, index_path, maps_path, *shards):
            if os.path.lexists(path):
                raise PrepareError(
                    f"Expected no {os.path.basename(path)} in '{folder}': prepare did not write it, so it is "
                    "not replaced. Move it, or pass another folder."
                )
    if entry is not None and not lines:
        lines = [entry["settings"], *entry["shards"]]
    kept = _finished_shards(plan, lines or [], workers)
    for name in os.listdir(folder):  # what a killed run was writing
        if re.fullmatch(rf"\.?({re.escape(plan.split)}-.*|{MANIFEST})\.([0-9a-f]{{16}}){{1,2}}\.tmp", name):
            os.remove(os.path.join(folder, name))
    missing = [shard for shard in range(len(shards)) if shard not in kept]
    needed, free = int(plan.sizes[missing].sum()), shutil.disk_usage(folder).free
    if needed > free:
        raise PrepareError(
            f"Expected {needed} bytes free in '{folder}' for the split {plan.split}, received {free}. "
            "Free some, or pass a folder on another disk."
        )
    with _writing(folder):
        begun = [plan.settings, *kept.values()]
        replace_file(journal, "".join(json.dumps(line) + "\n" for line in begun).encode())
    records = kept | _write_shards(plan, missing, journal, workers)
    with _writing(folder):
        write_index(index_path, plan.written)
        manifest["splits"][plan.split] = {
            "settings": plan.settings,
            "classes": plan.source.classes,
            "shards": [records[shard] for shard in range(len(shards))],
            "index": file_record(index_path),
        }
        if plan.pairs is not None and plan.written_maps is not None:
            write_index(maps_path, plan.written_maps)
            manifest["splits"][plan.split] |= {
                "classes": plan.pairs.classes,
                "segmentation": dataclasses.asdict(plan.pairs.labels),
                "maps": file_record(maps_path),
            }
        replace_file(manifest_path, f"{json.dumps(manifest, indent=1)}\n".encode())
        os.remove(journal)
    return len(kept)


def _finished_shards(plan: Plan, lines: list[dict], workers: int) -> dict[int, dict]:
    """Returns the records of a journal's lines whose shards have the same bytes and images as then."""
    # Without the settings it is not known what the records are of.
    settings, *records = lines if lines and "sha256" not in lines[0] else [{}]
    other = [name for name in settings if settings[name] != plan.settings.get(name)]
    if other:
        expected, received = (
            [f"{name}={of.get(name)}" for name in other] for of in (settings, plan.settings)
        )
        raise PrepareError(
            f"'{plan.written.path}' holds the split {plan.split} with {', '.join(expected)}: expected the "
            f"same, received {', '.join(received)} (source is a hash of names, sizes, labels and classes). "
            "Pass what was passed then, or another folder."
        )
    shards = {os.path.basename(path): shard for shard, path in enumerate(plan.written.files)}
    changes = changes_of(plan) if records else np.zeros(0)
    records = [one for one in records if {key: type(one.get(key)) for key in _RECORD} == _RECORD]
    records = [record for record in records if record["name"] in shards]
    kept = {}
    for record, is_intact in checked_files(f"Checking {plan.split}", plan.written.path, records, workers):
        shard = shards[record["name"]]
        changed = changes[plan.places(shard)].max()
        # An image that was changed later may have kept its size.
        if is_intact and changed <= os.stat(plan.written.files[shard]).st_mtime_ns:
            kept[shard] = record
    return kept


def _journal_lines(journal: str) -> list[dict] | None:
    """Returns the whole lines of a journal, settings and records; None for none or another program's file."""
    content = _files.read_bytes(journal) if os.path.exists(journal) else b"none"
    lines = []
    for line in content.splitlines():
        with contextlib.suppress(ValueError, TypeError, RecursionError):
            found = dict(json.loads(line))
            lines += [found] if "shuffle_seed" in found or "sha256" in found else []
    return lines if lines or not content else None


def _write_shards(plan: Plan, shards: list[int], journal: str, workers: int) -> dict[int, dict]:
    """Writes shards in threads, and a line of the journal for each; returns their records."""
    stop, lock = threading.Event(), threading.Lock()
    num_bytes = num_images = 0

    def count(size: int) -> None:
        nonlocal num_bytes, num_images
        if stop.is_set():  # another thread failed
            raise concurrent.futures.CancelledError
        with lock:
            num_bytes, num_images = num_bytes + size, num_images + 1
            progress.show(num_bytes, lambda: f"{num_images} images, {progress.text()}")

    def write(shard: int) -> dict:
        record = _write_shard(plan, shard, count)
        with lock, _writing(plan.written.path), open(journal, "a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")
            file.flush()
            os.fsync(file.fileno())
        return record

    with (
        Progress(f"Writing {plan.split}", int(plan.sizes[shards].sum()), "MB") as progress,
        concurrent.futures.ThreadPoolExecutor(workers) as pool,
    ):
        futures = {pool.submit(write, shard): shard for shard in shards}
        try:
            for future in concurrent.futures.as_completed(futures):
                future.result()
        except BaseException:
            stop.set()
            pool.shutdown(cancel_futures=True)
            raise
    return {shard: future.result() for future, shard in futures.items()}


def _write_shard(plan: Plan, shard: int, count: Callable[[int], None]) -> dict:
    """Writes one shard in one step; returns its record for journal and manifest."""
    import tensorflow as tf  # for its checksums, which take too long in Python

    path, source = plan.written.files[shard], plan.source
    temporary, places = _temporary_name(path), plan.places(shard)
    try:
        with tf.io.TFRecordWriter(os.fsencode(temporary)) as writer:
            for place in places.tolist():
                image, length = source.read(place), int(plan.written.lengths[place])
                if len(image) != length:
                    raise SourceError(
                        f"Expected {length} bytes in '{source.name(place)}' of '{source.path}', received "
                        f"{len(image)}: it changed while it was read. Run prepare again."
                    )
                label_map = None if plan.pairs is None else checked_map(plan, place)
                example = head(source, place, length, label_map) + image
                writer.write(example)
                count(HEADER_BYTES + len(example) + FOOTER_BYTES)
        with _writing(plan.written.path):
            with open(temporary, "rb") as file:
                os.fsync(file.fileno())
            record = file_record(temporary)
            if record["size"] != plan.sizes[shard]:
                raise OSError(errno.EIO, f"{record['size']} of {plan.sizes[shard]} bytes arrived")
            os.replace(temporary, path)
            _files.sync_folder(pathlib.Path(plan.written.path))
    except tf.errors.OpError as error:
        is_full = isinstance(error, tf.errors.ResourceExhaustedError)
        with _writing(plan.written.path):
            raise OSError(errno.ENOSPC if is_full else errno.EIO, error.message) from error
    finally:
        if os.path.exists(temporary):
            os.remove(temporary)
    return record | {"name": os.path.basename(path), "num_examples": len(places)}


def _temporary_name(path: str) -> str:
    return f"{path}.{secrets.token_hex(8)}.tmp"


@contextlib.contextmanager
def _writing(folder: str) -> Iterator[None]:
    """Says in our words that a folder cannot be written."""
    kept = "run prepare again: what is finished is kept."
    try:
        yield
    except OSError as error:
        refused = f"Check the disk and the permissions, then {kept}"
        text = _files.disk_error_text(error, folder, f"Free some and {kept}", refused)
        raise PrepareError(text) from error
