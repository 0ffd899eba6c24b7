"""Copies a data set into shuffled TFRecord shards that this package, and others, read fast.

The encoded images are copied byte for byte. TensorFlow is imported when the first shard is written.
"""

import concurrent.futures
import contextlib
import dataclasses
import errno
import hashlib
import json
import os
import pathlib
import re
import secrets
import shutil
import threading
import time
from collections.abc import Callable, Iterator

import numpy as np

from keras_convnext._environment import require
from keras_convnext._files import (
    disk_error_text,
    open_to_lock,
    read_bytes,
    replace_file,
    sync_folder,
    try_lock,
)
from keras_convnext._terminal import Progress, say
from keras_convnext.data import sources
from keras_convnext.data.index import (
    INDEX_VERSION,
    MANIFEST,
    Source,
    SourceError,
    described,
    with_classes,
    write_index,
)
from keras_convnext.data.records import is_prepared, read_manifest
from keras_convnext.data.tfrecords import FOOTER_BYTES, HEADER_BYTES, example_head

SHARD_BYTES = 150_000_000  # of the default number of shards
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


@dataclasses.dataclass(frozen=True)
class _Plan:
    """All that follows from the source and the arguments before an image is read.

    The order of the examples is that of the shards. The place of every image follows from the sizes, so
    the index of shards of an earlier run needs no reading.
    """

    split: str
    folder: str
    source: Source
    settings: dict[str, object]  # what a later run must agree with
    lengths: np.ndarray  # int64 (N,), bytes of each image of the source
    order: np.ndarray  # int64 (N,), numbers of the examples in the order they are written
    ends: np.ndarray  # int64 (num_shards,), where each shard ends in `order`
    offsets: np.ndarray  # int64 (N,), first byte of each image in its shard, in the written order
    sizes: np.ndarray  # int64 (num_shards,), bytes of each shard

    def name(self, shard: int) -> str:
        return f"{self.split}-{shard:05d}-of-{len(self.ends):05d}.tfrecord"

    def examples(self, shard: int) -> list[int]:
        return self.order[self.ends[shard - 1] if shard else 0 : self.ends[shard]].tolist()


def prepare(
    source_path: str | os.PathLike[str],
    output: str | os.PathLike[str],
    split: str | None = None,
    *,
    labels: str | os.PathLike[str] | None = None,
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

    in an order shuffled over all shards, so that reading shard after shard gives a good mix. Beside them are
    "<split>-index.npz", the byte ranges that `open_source` uses, and manifest.json, with size and SHA-256 of
    each file. The same source, seed and number of shards give the same bytes.

    A run that was killed is continued by the same call: complete shards (their SHA-256 is in the journal) are
    kept. A finished folder is checked in the same way, and damaged shards are written again. Images are read
    in random order, so the source should lie on a disk without seek time.

    Args:
        source_path, split, labels: as for `open_source`; split None is all splits.
        output: folder, made when it is not there. It may hold other splits that `prepare` wrote.
        shards: number of files a split. Default: as many as make files of about 150 MB.
        workers: threads that read and write. Default: number of processors, at most 16.
        shuffle_seed: 0 to 2**32 - 1, seed of the order.

    Raises:
        ValueError: a number is out of range.
        SourceError: as for `open_source`.
        PrepareError: the folder was prepared with other settings or is in use, or the disk is full. The
            message tells which, and the bytes needed and free.
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
    workers = min(os.cpu_count() or 1, 16) if workers is None else workers
    if os.path.exists(output) and os.path.exists(source_path) and os.path.samefile(source_path, output):
        raise ValueError(
            f"Expected output to be another folder than the source, received '{output}' for both."
        )
    sources.check_outside(source_path, output)
    require("tensorflow", "Writing shards")
    if os.path.isfile(output):
        raise PrepareError(f"Expected a folder to write to, received the file '{output}'. Pass another path.")
    names = sources.list_splits(source_path, labels) if split is None else [split]
    # All are opened before one is written, so that trouble with the last one shows at once.
    opened = {name: sources.open_source(source_path, name, labels=labels) for name in names or (None,)}
    folder = sources.canonical_split(os.path.basename(os.path.abspath(source_path)), is_whole=True)
    written = {asked: sources.canonical_split(asked or "") or asked or folder or "train" for asked in opened}
    if len(set(written.values())) < len(written):  # "train1" and "train2"
        written = {asked: str(asked) for asked in opened}
    opened = _numbered_alike(opened, written, output)
    for asked, source in opened.items():
        say("\n".join(described(source, written[asked])))
    os.makedirs(output, exist_ok=True)
    images, num_shards, num_bytes, num_kept = {}, {}, 0, 0
    with open_to_lock(os.path.join(output, "prepare.lock")) as lock:
        if not try_lock(lock):
            raise PrepareError(f"Another process prepares '{output}'. Wait for it, or pass another folder.")
        for asked, source in opened.items():
            name = written[asked]
            plan = _plan(name, output, source, shards, int(shuffle_seed))
            num_kept += _write_split(plan, workers)
            images[name], num_shards[name] = len(source), len(plan.ends)
            num_bytes += int(plan.sizes.sum())
    return Summary(output, images, num_shards, num_bytes, num_kept, time.monotonic() - begin)


def _numbered_alike(
    opened: dict[str | None, Source], written: dict[str | None, str], output: str
) -> dict[str | None, Source]:
    """Gives folders the classes of the split to train on, which an earlier call may have written."""
    trained = next((source.classes for asked, source in opened.items() if written[asked] == "train"), None)
    if trained is None and is_prepared(output):
        trained = read_manifest(output)["splits"].get("train", {}).get("classes")
    if trained is None:
        trained = max((source.classes for source in opened.values()), key=len)
    return {
        asked: with_classes(source, trained) if source.kind == "folder" else source
        for asked, source in opened.items()
    }


def verify(output: str | os.PathLike[str], workers: int | None = None) -> list[str]:
    """Compares a prepared folder with its manifest; returns the names of missing and differing files.

    Raises SourceError where the folder has no manifest, or a damaged one.
    """
    output = os.fspath(output)
    if not os.path.exists(os.path.join(output, MANIFEST)):
        raise SourceError(f"Expected {MANIFEST} in '{output}', found none. Run prepare to its end.")
    entries = read_manifest(output)["splits"].values()
    records = [record for entry in entries for record in (*entry["shards"], entry["index"])]
    intact = _intact(f"Verifying {output}", output, records, workers or os.cpu_count())
    return [record["name"] for record, is_intact in zip(records, intact, strict=True) if not is_intact]


def _intact(title: str, folder: str, records: list[dict], workers: int | None) -> list[bool]:
    """Returns whether each file has the SHA-256 of its record."""
    intact, done = [], 0
    with (
        Progress(title, sum(record["size"] for record in records), "MB") as progress,
        concurrent.futures.ThreadPoolExecutor(workers) as pool,
    ):
        results = pool.map(lambda record: _is_intact(folder, record), records)
        for record, is_intact in zip(records, results, strict=True):
            intact.append(is_intact)
            done += record["size"]
            progress.show(done)
    return intact


def _plan(split: str, folder: str, source: Source, num_shards: int | None, seed: int) -> _Plan:
    lengths = source.lengths
    if source.kind == "folder":
        lengths = np.array([os.path.getsize(file) for file in source.files], np.int64)
    count = len(source)
    fingerprint = hashlib.sha256(json.dumps(source.classes).encode("utf-8"))
    fingerprint.update(np.stack([lengths, source.labels]).astype("<i8").tobytes())
    head_sizes = np.empty(count, np.int64)
    with Progress(f"Planning {split}", count) as progress:
        for number, length in enumerate(lengths.tolist()):
            fingerprint.update(source.name(number).encode("utf-8", "surrogateescape") + b"\n")
            head_sizes[number] = len(_head(source, number, length))
            progress.show(number + 1)
    if num_shards is None:
        num_shards = max(1, round(int(lengths.sum()) / SHARD_BYTES))
    if num_shards > count:
        raise ValueError(
            f"Expected at most one shard for each of the {count} images, received shards={num_shards}."
        )
    # RandomState, because its stream is the same in every version of NumPy.
    order = np.random.RandomState(seed).permutation(count)
    ends = np.cumsum([len(part) for part in np.array_split(order, num_shards)])
    record_ends = np.cumsum((HEADER_BYTES + head_sizes + lengths + FOOTER_BYTES)[order])
    shard_starts = np.concatenate([[0], record_ends[ends[:-1] - 1]])
    of_shard = np.repeat(np.arange(num_shards), np.diff(ends, prepend=0))
    return _Plan(
        split=split,
        folder=folder,
        source=source,
        settings={
            "source": fingerprint.hexdigest(),
            "num_examples": count,
            "num_shards": num_shards,
            "shuffle_seed": seed,
        },
        lengths=lengths,
        order=order,
        ends=ends,
        offsets=record_ends - FOOTER_BYTES - lengths[order] - shard_starts[of_shard],
        sizes=record_ends[ends - 1] - shard_starts,
    )


def _write_split(plan: _Plan, workers: int) -> int:
    """Writes what is missing of a split; returns the number of shards that were there."""
    journal = os.path.join(plan.folder, f"{plan.split}-journal.jsonl")
    manifest: dict = {"format": "keras_convnext", "version": INDEX_VERSION, "splits": {}}
    if os.path.exists(os.path.join(plan.folder, MANIFEST)):
        manifest = read_manifest(plan.folder)
    lines = _journal_lines(journal)
    has_journal = lines or (os.path.exists(journal) and not os.path.getsize(journal))
    if plan.split not in manifest["splits"] and not has_journal:
        _refuse_foreign_files(plan)
    kept = _finished_shards(plan, lines, manifest["splits"].get(plan.split), workers)
    _remove_leftovers(plan)
    missing = [shard for shard in range(len(plan.ends)) if shard not in kept]
    _check_space(plan, missing)
    begun = [plan.settings, *kept.values()]
    _write_text(journal, "".join(json.dumps(line) + "\n" for line in begun))
    records = kept | _write_shards(plan, missing, journal, workers)
    index = f"{plan.split}-index.npz"
    with _writing(plan.folder):
        write_index(os.path.join(plan.folder, index), _written_source(plan))
    manifest["splits"][plan.split] = {
        "settings": plan.settings,
        "classes": plan.source.classes,
        "shards": [records[shard] for shard in range(len(plan.ends))],
        "index": _describe(plan.folder, index),
    }
    _write_text(os.path.join(plan.folder, MANIFEST), json.dumps(manifest, indent=1) + "\n")
    os.remove(journal)
    return len(kept)


def _head(source: Source, number: int, length: int) -> bytes:
    """Returns the Example of an image of `length` bytes up to the image."""
    label = int(source.labels[number])
    return example_head(
        length,
        {
            "image/class/label": label,
            "image/class/synset": source.classes[label].encode("utf-8", "surrogateescape"),
            "image/filename": source.name(number).encode("utf-8", "surrogateescape"),
        },
    )


def _finished_shards(plan: _Plan, lines: list[dict], entry: dict | None, workers: int) -> dict[int, dict]:
    """Returns the records of the shards that an earlier run wrote, and whose bytes are still the same."""
    if not lines and entry is not None:
        lines = [entry["settings"], *entry["shards"]]
    # Without the settings, the first line, it is not known what the records are of.
    settings, *records = lines if lines and "sha256" not in lines[0] else [{}]
    other = [name for name in settings if settings[name] != plan.settings.get(name)]
    if other:
        expected, received = (
            [f"{name}={of.get(name)}" for name in other] for of in (settings, plan.settings)
        )
        raise PrepareError(
            f"'{plan.folder}' holds the split {plan.split} with {', '.join(expected)}: expected the same, "
            f"received {', '.join(received)} (source is a hash of names, sizes, labels and classes). Pass "
            "what was passed then, or another folder."
        )
    numbers = {plan.name(shard): shard for shard in range(len(plan.ends))}
    states = map(os.stat, plan.source.files if records else ())
    changes = np.array([max(state.st_mtime_ns, state.st_ctime_ns) for state in states], np.int64)
    records = [one for one in records if {key: type(one.get(key)) for key in _RECORD} == _RECORD]
    records = [record for record in records if record["name"] in numbers]
    intact = _intact(f"Checking {plan.split}", plan.folder, records, workers)
    return {
        numbers[record["name"]]: record
        for record, is_intact in zip(records, intact, strict=True)
        if is_intact and _is_newer(plan, numbers[record["name"]], changes)
    }


def _is_newer(plan: _Plan, shard: int, changes: np.ndarray) -> bool:
    """Tells whether a shard was written after the last change of its images; some keep their size."""
    last = changes[plan.source.file_numbers[plan.examples(shard)]].max()
    return bool(last <= os.stat(os.path.join(plan.folder, plan.name(shard))).st_mtime_ns)


def _journal_lines(journal: str) -> list[dict]:
    """Returns the settings and records in a journal, without what a kill or a power cut left."""
    lines: list[dict] = []
    for line in read_bytes(journal).splitlines() if os.path.exists(journal) else ():
        with contextlib.suppress(ValueError, TypeError, RecursionError):
            found = dict(json.loads(line))
            lines += [found] if "shuffle_seed" in found or "sha256" in found else []
    return lines


def _refuse_foreign_files(plan: _Plan) -> None:
    """Refuses to begin a split where files of its names lie already."""
    for name in (
        f"{plan.split}-journal.jsonl",
        f"{plan.split}-index.npz",
        *map(plan.name, range(len(plan.ends))),
    ):
        if os.path.lexists(os.path.join(plan.folder, name)):
            raise PrepareError(
                f"Expected no {name} in '{plan.folder}': prepare did not write it, so it is not replaced. "
                "Move it, or pass another folder."
            )


def _remove_leftovers(plan: _Plan) -> None:
    """Removes what a killed run was writing."""
    for name in os.listdir(plan.folder):
        if re.fullmatch(rf"\.?({re.escape(plan.split)}-.*|{MANIFEST})\.([0-9a-f]{{16}}){{1,2}}\.tmp", name):
            os.remove(os.path.join(plan.folder, name))


def _check_space(plan: _Plan, missing: list[int]) -> None:
    needed, free = int(plan.sizes[missing].sum()), shutil.disk_usage(plan.folder).free
    if needed > free:
        raise PrepareError(
            f"Expected {needed} bytes free in '{plan.folder}' for the split {plan.split}, received {free}. "
            "Free some, or pass a folder on another disk."
        )


def _write_shards(plan: _Plan, shards: list[int], journal: str, workers: int) -> dict[int, dict]:
    """Writes shards in threads, and a line of the journal for each; returns their records."""
    if not shards:
        return {}
    stop, lock = threading.Event(), threading.Lock()
    num_bytes = int(plan.lengths[np.concatenate([plan.examples(s) for s in shards])].sum())
    progress = Progress(f"Writing {plan.split}", num_bytes, "MB")
    done = [0, 0]  # bytes, images

    def count(num_bytes: int) -> None:
        if stop.is_set():
            raise _StoppedError
        with lock:
            done[0] += num_bytes
            done[1] += 1
            progress.show(done[0], lambda: f"{done[1]} images, {progress.text()}")

    def write(shard: int) -> dict:
        record = _write_shard(plan, shard, count)
        with lock, _writing(plan.folder), open(journal, "a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")
            file.flush()
            os.fsync(file.fileno())
        return record

    with progress, concurrent.futures.ThreadPoolExecutor(workers) as pool:
        futures = {pool.submit(write, shard): shard for shard in shards}
        try:
            for future in concurrent.futures.as_completed(futures):
                future.result()
        except BaseException:
            stop.set()
            pool.shutdown(cancel_futures=True)
            raise
    return {shard: future.result() for future, shard in futures.items()}


class _StoppedError(Exception):
    """Another thread failed."""


def _write_shard(plan: _Plan, shard: int, count: Callable[[int], None]) -> dict:
    """Writes one shard in one step; returns its record for journal and manifest."""
    import tensorflow as tf  # for its checksums, which take too long in Python

    path = os.path.join(plan.folder, plan.name(shard))
    temporary = _temporary_name(path)
    try:
        with tf.io.TFRecordWriter(os.fsencode(temporary)) as writer:
            for number in plan.examples(shard):
                image, length = plan.source.read(number), int(plan.lengths[number])
                if len(image) != length:
                    raise SourceError(
                        f"Expected {length} bytes in '{plan.source.name(number)}' of '{plan.source.path}', "
                        f"received {len(image)}: it changed while it was read. Run prepare again."
                    )
                writer.write(_head(plan.source, number, length) + image)
                count(length)
        with _writing(plan.folder):
            with open(temporary, "rb") as file:
                os.fsync(file.fileno())
            record = _describe(plan.folder, os.path.basename(temporary))
            if record["size"] != plan.sizes[shard]:
                raise OSError(errno.EIO, f"{record['size']} of {plan.sizes[shard]} bytes arrived")
            os.replace(temporary, path)
            sync_folder(pathlib.Path(plan.folder))
    except tf.errors.ResourceExhaustedError as error:
        raise _write_error(OSError(errno.ENOSPC, error.message), plan.folder) from error
    except tf.errors.OpError as error:
        raise _write_error(OSError(errno.EIO, error.message), plan.folder) from error
    finally:
        if os.path.exists(temporary):
            os.remove(temporary)
    return record | {"name": plan.name(shard), "num_examples": len(plan.examples(shard))}


def _temporary_name(path: str) -> str:
    return f"{path}.{secrets.token_hex(8)}.tmp"


def _written_source(plan: _Plan) -> Source:
    """Returns where the images of a written split lie."""
    names = [plan.source.name(number).encode("utf-8", "surrogateescape") for number in plan.order.tolist()]
    return Source(
        path=plan.folder,
        kind="prepared",
        files=[os.path.join(plan.folder, plan.name(shard)) for shard in range(len(plan.ends))],
        file_numbers=np.repeat(np.arange(len(plan.ends), dtype=np.int32), np.diff(plan.ends, prepend=0)),
        offsets=plan.offsets,
        lengths=plan.lengths[plan.order],
        labels=plan.source.labels[plan.order],
        classes=plan.source.classes,
        name_text=np.frombuffer(b"".join(names), np.uint8),
        name_ends=np.cumsum([len(name) for name in names], dtype=np.int64),
    )


def _describe(folder: str, name: str) -> dict:
    path = os.path.join(folder, name)
    with open(path, "rb") as file:
        return {
            "name": name,
            "size": os.path.getsize(path),
            "sha256": hashlib.file_digest(file, "sha256").hexdigest(),
        }


def _is_intact(folder: str, record: dict) -> bool:
    path = os.path.join(folder, record["name"])
    if not os.path.isfile(path) or os.path.getsize(path) != record["size"]:
        return False
    return _describe(folder, record["name"])["sha256"] == record["sha256"]


def _write_text(path: str, text: str) -> None:
    with _writing(os.path.dirname(path)):
        replace_file(path, text.encode())


@contextlib.contextmanager
def _writing(folder: str) -> Iterator[None]:
    """Says in our words that a folder cannot be written."""
    try:
        yield
    except OSError as error:
        raise _write_error(error, folder) from error


def _write_error(error: OSError, folder: str) -> PrepareError:
    kept = "run prepare again: what is finished is kept."
    return PrepareError(
        disk_error_text(
            error, folder, f"Free some and {kept}", f"Check the disk and the permissions, then {kept}"
        )
    )
