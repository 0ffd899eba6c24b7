"""Prepared shards: the same images, whatever happens while they are written."""

import collections
import json
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import numpy as np
import pytest

from keras_convnext.data import prepare as prepare_module
from keras_convnext.data import shard_plan
from keras_convnext.data.index import MANIFEST, SourceError
from keras_convnext.data.prepare import PrepareError, _temporary_name, make_plan, prepare
from keras_convnext.data.records import verify
from keras_convnext.data.sources import open_source

pytestmark = pytest.mark.once

IMAGES = Path(__file__).parents[1] / "images"


@pytest.fixture(scope="module")
def tf():
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    return pytest.importorskip("tensorflow")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Class folders with 60 files: photographs, and bytes of many sizes, which prepare does not decode."""
    root = tmp_path_factory.mktemp("images")
    names = [f"{name}/{number}.JPEG" for name in ("cat", "dog", "ünder söme") for number in range(20)]
    photographs = sorted(IMAGES.iterdir())
    for number, name in enumerate(names):
        path = root / name
        path.parent.mkdir(exist_ok=True)
        content = np.random.default_rng(number).bytes(number**2 * 3 + number // 20)
        path.write_bytes(photographs[number].read_bytes() if number < len(photographs) else content)
    return root


@pytest.fixture(scope="module")
def prepared(tmp_path_factory, folder, tf):
    """The folder in 7 shards, written without interruption."""
    output = tmp_path_factory.mktemp("prepared") / "new" / "folder"
    summary = prepare(folder, output, shards=7)
    assert (summary.images, summary.shards, summary.num_kept) == ({"train": 60}, {"train": 7}, 0)
    assert summary.num_bytes == sum(path.stat().st_size for path in output.glob("*.tfrecord"))
    return output


@pytest.fixture
def copied(tmp_path, prepared):
    return shutil.copytree(prepared, tmp_path / "copied")


def contents(source):
    return {
        source.name(number): (source.read(number), source.classes[source.labels[number]])
        for number in range(len(source))
    }


def all_files(output):
    return {path.name: path.read_bytes() for path in Path(output).iterdir() if path.name != "prepare.lock"}


def records(tf, output, split="train"):
    """Reads the shards in order as TensorFlow does, which compares the checksums."""
    description = {
        "image/encoded": tf.io.FixedLenFeature([], tf.string),
        "image/class/label": tf.io.FixedLenFeature([], tf.int64),
        "image/class/synset": tf.io.FixedLenFeature([], tf.string),
        "image/filename": tf.io.FixedLenFeature([], tf.string),
    }
    files = sorted(map(str, Path(output).glob(f"{split}-*.tfrecord")))
    data = tf.data.TFRecordDataset(files).map(lambda record: tf.io.parse_single_example(record, description))
    return list(data.as_numpy_iterator())


def test_tensorflow_reads_the_same_images_labels_and_names(prepared, folder, tf):
    expected = contents(open_source(folder))
    classes = sorted(path.name for path in folder.iterdir())
    found = {}
    for record in records(tf, prepared):
        name = record["image/filename"].decode()
        found[name] = (record["image/encoded"], record["image/class/synset"].decode())
        assert classes[record["image/class/label"]] == found[name][1]
    assert found == expected
    assert len(expected) == 60


def test_damaged_byte_is_seen_by_the_reader_of_the_test(copied, tf):
    """The test above compares checksums: a flipped byte of an image does not pass."""
    path = copied / "train-00003-of-00007.tfrecord"
    content = bytearray(path.read_bytes())
    content[-10] ^= 1
    path.write_bytes(content)
    with pytest.raises(tf.errors.DataLossError):
        records(tf, copied)


def test_index_gives_the_same_images_in_the_order_of_the_records(prepared, folder, tf):
    source = open_source(prepared)
    assert (source.kind, len(source.files)) == ("prepared", 7)
    assert contents(source) == contents(open_source(folder))
    expected = [record["image/filename"].decode() for record in records(tf, prepared)]
    assert [source.name(number) for number in range(60)] == expected
    by_scan = open_source(prepared / "train-*.tfrecord")
    for name in ("file_numbers", "offsets", "lengths", "labels", "name_text", "name_ends"):
        np.testing.assert_array_equal(getattr(source, name), getattr(by_scan, name))


def test_every_shard_has_a_mix_of_the_classes(prepared):
    source = open_source(prepared)
    counts = collections.Counter(zip(source.file_numbers.tolist(), source.labels.tolist(), strict=True))
    assert len(counts) == 7 * 3
    assert set(np.bincount(source.file_numbers)) == {8, 9}
    unshuffled = np.repeat([0, 1, 2], 20)
    assert len(set(zip(source.file_numbers.tolist(), unshuffled.tolist(), strict=True))) < 7 * 3


def test_seed_decides_the_order_and_nothing_else(tmp_path, prepared, folder):
    prepare(folder, tmp_path / "same", shards=7, workers=1)
    prepare(folder, tmp_path / "other", shards=7, shuffle_seed=1)
    assert all_files(tmp_path / "same") == all_files(prepared)
    other, first = open_source(tmp_path / "other"), open_source(prepared)
    assert contents(other) == contents(first)
    assert [other.name(n) for n in range(60)] != [first.name(n) for n in range(60)]


def test_default_number_of_shards_follows_the_size(tmp_path, folder, monkeypatch):
    assert prepare(folder, tmp_path / "one").shards == {"train": 1}
    total = sum(path.stat().st_size for path in folder.rglob("*.JPEG"))
    monkeypatch.setattr(shard_plan, "SHARD_BYTES", total / 4)
    assert prepare(folder, tmp_path / "four").shards == {"train": 4}


def test_manifest_describes_every_file(prepared):
    entry = json.loads((prepared / MANIFEST).read_text())["splits"]["train"]
    assert entry["classes"] == ["cat", "dog", "ünder söme"]
    assert sum(shard["num_examples"] for shard in entry["shards"]) == 60
    names = {record["name"] for record in [*entry["shards"], entry["index"]]}
    assert names | {MANIFEST} == all_files(prepared).keys()
    assert verify(prepared) == []


def test_manifest_names_no_path_of_this_machine(prepared, folder):
    text = (prepared / MANIFEST).read_text()
    assert str(folder) not in text and str(prepared) not in text


def test_all_splits_of_imagenet_are_written(tmp_path, tf):
    (tmp_path / "tars").mkdir()
    for split, name in (("train", "n01440764_1.JPEG"), ("val", "ILSVRC2012_val_00000001.JPEG")):
        path = tmp_path / name
        path.write_bytes(f"image of {split}".encode())
        if split == "train":
            with tarfile.open(tmp_path / "n01440764.tar", "w") as archive:
                archive.add(path, name)
            path, name = tmp_path / "n01440764.tar", "n01440764.tar"
        with tarfile.open(tmp_path / "tars" / f"ILSVRC2012_img_{split}.tar", "w") as archive:
            archive.add(path, name)
    summary = prepare(tmp_path / "tars", tmp_path / "out")
    assert summary.images == {"train": 1, "validation": 1}
    for split in ("train", "val"):
        assert contents(open_source(tmp_path / "out", split)) == contents(
            open_source(tmp_path / "tars", split)
        )


def test_splits_can_be_written_one_by_one(tmp_path, folder):
    (tmp_path / "data").mkdir()
    for name in ("train", "val"):
        (tmp_path / "data" / name).symlink_to(folder)
    prepare(tmp_path / "data", tmp_path / "out", "val", shards=2)
    with pytest.raises(SourceError, match=r"No split 'train' .* Known: validation"):
        open_source(tmp_path / "out", "train")
    assert prepare(tmp_path / "data", tmp_path / "out", shards=2).num_kept == 2
    assert contents(open_source(tmp_path / "out", "train")) == contents(open_source(tmp_path / "out", "val"))
    assert verify(tmp_path / "out") == []


# Interrupted runs

KILLED_PROGRAM = """
import sys, time
from keras_convnext.data import prepare, sources
read = sources.Source.read
def slow_read(source, number):
    time.sleep(0.02)
    return read(source, number)
sources.Source.read = slow_read
prepare.prepare(sys.argv[1], sys.argv[2], shards=7, workers=2)
"""


def test_killed_run_is_continued_to_the_same_bytes(tmp_path, folder, prepared):
    output = tmp_path / "killed"
    command = [sys.executable, "-c", KILLED_PROGRAM, str(folder), str(output)]
    process = subprocess.Popen(command, env=os.environ | {"KERAS_BACKEND": "numpy"})  # imports least
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and process.poll() is None:
        if len(list(output.glob("train-*.tfrecord"))) >= 2 and list(output.glob("*.tmp")):
            break
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    finished = {path.name: path.stat().st_ino for path in output.glob("train-*.tfrecord")}
    assert 2 <= len(finished) < 7
    assert list(output.glob("*.tmp"))  # it was in the middle of a shard
    assert not (output / MANIFEST).exists()
    summary = prepare(folder, output, shards=7)
    assert len(finished) - 2 <= summary.num_kept <= len(finished)  # two may lack their line of the journal
    assert summary.num_kept >= 1
    assert all_files(output) == all_files(prepared)
    kept = [name for name, inode in finished.items() if (output / name).stat().st_ino == inode]
    assert len(kept) >= summary.num_kept


def test_finished_folder_is_left_as_it_is(copied, folder):
    before = {path.name: path.stat().st_ino for path in copied.glob("*.tfrecord")}
    assert prepare(folder, copied, shards=7).num_kept == 7
    assert {path.name: path.stat().st_ino for path in copied.glob("*.tfrecord")} == before


def test_damaged_and_missing_files_are_found_and_written_again(copied, folder, prepared):
    flipped = copied / "train-00002-of-00007.tfrecord"
    content = bytearray(flipped.read_bytes())
    content[len(content) // 2] ^= 1
    flipped.write_bytes(content)
    os.remove(copied / "train-00004-of-00007.tfrecord")
    os.truncate(copied / "train-00006-of-00007.tfrecord", 100)
    (copied / "train-index.npz").write_bytes(b"")
    names = [f"train-{shard:05d}-of-00007.tfrecord" for shard in (2, 4, 6)]
    assert verify(copied) == [*names, "train-index.npz"]
    with pytest.raises(SourceError, match=r"train-00004-of-00007.tfrecord', received 0. Run prepare again"):
        open_source(copied)
    assert prepare(folder, copied, shards=7).num_kept == 4
    assert all_files(copied) == all_files(prepared)


@pytest.mark.parametrize("tear", ["in a line", "at a line", "after the settings", "at once"])
def test_torn_journal_loses_at_most_the_torn_shard(copied, folder, prepared, tear):
    entry = json.loads((copied / MANIFEST).read_text())["splits"]["train"]
    lines = [json.dumps(line) + "\n" for line in (entry["settings"], *entry["shards"][:3])]
    ends = {
        "in a line": [*lines[:-1], lines[-1][:20]],
        "at a line": lines,
        "after the settings": lines[:1],
        "at once": [],
    }
    os.remove(copied / MANIFEST)
    (copied / "train-journal.jsonl").write_text("".join(ends[tear]))
    expected = {"in a line": 2, "at a line": 3, "after the settings": 0, "at once": 0}[tear]
    assert prepare(folder, copied, shards=7).num_kept == expected
    assert all_files(copied) == all_files(prepared)


DAMAGED_LINES = {
    "zeros": bytes(512),
    "garbage": bytes(range(128, 256)),
    "a list": b"[1, 2]",
    "nested": b"[" * 100_000,
    "a record without its size": b'{"name": "train-00000-of-00007.tfrecord", "sha256": "0"}',
    "a record of another shard": b'{"name": "../x", "size": 1, "sha256": "0", "num_examples": 1}',
    "a size that is a text": b'{"name": "train-00000-of-00007.tfrecord", "size": "1", "sha256": "0"}',
}


@pytest.mark.parametrize("line", DAMAGED_LINES)
@pytest.mark.parametrize("place", [0, 1])
def test_a_damaged_line_of_the_journal_is_a_shard_to_be_written(place, line, copied, folder, prepared):
    """After a power cut, which leaves zeros."""
    entry = json.loads((copied / MANIFEST).read_text())["splits"]["train"]
    (copied / MANIFEST).unlink()
    lines = [json.dumps(one).encode() for one in (entry["settings"], *entry["shards"])]
    lines[place] = DAMAGED_LINES[line]
    (copied / "train-journal.jsonl").write_bytes(b"\n".join(lines) + b"\n")
    summary = prepare(folder, copied, shards=7)
    assert summary.num_kept == (6 if place else 0)
    for path in prepared.iterdir():
        if path.name != "prepare.lock":
            assert (copied / path.name).read_bytes() == path.read_bytes(), path.name


@pytest.mark.parametrize("name", ["train-00002-of-00007.tfrecord", "train-index.npz"])
def test_a_file_that_prepare_did_not_write_is_not_replaced(tmp_path, folder, tf, name):
    (tmp_path / name).write_bytes(b"the only copy")
    with pytest.raises(PrepareError, match=rf"Expected no {name} in .*: prepare did not write it.*another"):
        prepare(folder, tmp_path, shards=7)
    assert all_files(tmp_path) == {name: b"the only copy"}


def test_leftovers_of_a_killed_run_are_removed(copied, folder, prepared):
    for name in ("train-00002-of-00007.tfrecord", "train-index.npz", MANIFEST):
        (copied / f"{name}.{'0123abcd' * 4}.tmp").write_bytes(b"half")
        (copied / f".{name}.{'0123abcd' * 2}.tmp").write_bytes(b"half")
    (copied / "notes.tmp").write_bytes(b"of the user")
    prepare(folder, copied, shards=7)
    assert all_files(copied) == all_files(prepared) | {"notes.tmp": b"of the user"}


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"shuffle_seed": 1}, r"with shuffle_seed=0: expected the same, received shuffle_seed=1 "),
        ({"shards": 6}, r"with num_shards=7: expected the same, received num_shards=6 "),
        (
            {"source": "relabelled"},
            r"with source=[0-9a-f]{64}: expected the same, received source=[0-9a-f]{64} ",
        ),
        ({"source": "more"}, r"with source=.*, num_examples=60: expected .*, num_examples=61 "),
    ],
)
@pytest.mark.parametrize("is_finished", [True, False])
def test_folder_of_other_settings_is_refused(tmp_path, copied, folder, settings, message, is_finished):
    source = shutil.copytree(folder, tmp_path / "source")
    change = settings.get("source")
    if change == "relabelled":
        os.rename(source / "cat", source / "eel")
    elif change == "more":
        (source / "cat" / "more.jpg").write_bytes(b"image")
    if not is_finished:
        entry = json.loads((copied / MANIFEST).read_text())["splits"]["train"]
        os.remove(copied / MANIFEST)
        (copied / "train-journal.jsonl").write_text(json.dumps(entry["settings"]) + "\n")
    before = all_files(copied)
    arguments = {"shards": 7} | {name: value for name, value in settings.items() if name != "source"}
    with pytest.raises(PrepareError, match=message):
        prepare(source, copied, **arguments)
    assert all_files(copied) == before


# A full disk, and other trouble


def test_missing_space_is_told_before_anything_is_written(tmp_path, folder, prepared, monkeypatch):
    needed = sum(path.stat().st_size for path in prepared.glob("*.tfrecord"))
    free = needed - 1
    monkeypatch.setattr(
        prepare_module.shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(0, 0, free)
    )
    with pytest.raises(
        PrepareError, match=rf"Expected {needed} bytes free in .* received {free}\. Free some"
    ):
        prepare(folder, tmp_path / "out", shards=7)
    assert all_files(tmp_path / "out") == {}
    free = needed
    prepare(folder, tmp_path / "out", shards=7)
    assert all_files(tmp_path / "out") == all_files(prepared)


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full, which has no space")
def test_disk_that_fills_up_is_told_and_the_run_can_be_continued(tmp_path, folder, prepared, monkeypatch):
    real_name = _temporary_name

    def full_at_shard_3(path):
        temporary = real_name(path)
        if "00003-of" in path:
            os.symlink("/dev/full", temporary)
        return temporary

    monkeypatch.setattr(prepare_module, "_temporary_name", full_at_shard_3)
    with pytest.raises(
        PrepareError, match=r"No space at '.*out' \(.*: received .* Free some and run prepare again"
    ):
        prepare(folder, tmp_path / "out", shards=7, workers=1)
    names = all_files(tmp_path / "out").keys()
    assert not any(name.endswith(".tmp") for name in names) and MANIFEST not in names
    assert {f"train-{shard:05d}-of-00007.tfrecord" for shard in range(3)} < names
    monkeypatch.undo()
    # The worker may have begun the next shard before the first error was heard.
    assert prepare(folder, tmp_path / "out", shards=7).num_kept in (3, 4)
    assert all_files(tmp_path / "out") == all_files(prepared)


def test_disk_that_is_full_for_the_index_is_told(tmp_path, folder, prepared, monkeypatch):
    def full(*arguments):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(prepare_module, "write_index", full)
    with pytest.raises(PrepareError, match=r"No space at '.*out'"):
        prepare(folder, tmp_path / "out", shards=7)
    monkeypatch.undo()
    assert prepare(folder, tmp_path / "out", shards=7).num_kept == 7
    assert all_files(tmp_path / "out") == all_files(prepared)


def test_missing_tensorflow_is_named_with_the_command(tmp_path, folder, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"Writing shards needs tensorflow.*Run pip install tensorflow"):
        prepare(folder, tmp_path / "out")


def test_image_that_changes_meanwhile_is_named(tmp_path, folder, monkeypatch):
    source = shutil.copytree(folder, tmp_path / "source")
    plan = make_plan

    def plan_then_grow(*arguments):
        result = plan(*arguments)
        with open(source / "cat" / "7.JPEG", "ab") as file:
            file.write(b"more")
        return result

    monkeypatch.setattr(prepare_module, "make_plan", plan_then_grow)
    size = (source / "cat" / "7.JPEG").stat().st_size
    with pytest.raises(
        SourceError, match=rf"Expected {size} bytes in 'cat/7.JPEG' .* received {size + 4}: it changed"
    ):
        prepare(source, tmp_path / "out", shards=7)
    assert not list((tmp_path / "out").glob("*.tmp"))


def test_second_process_in_the_same_folder_is_refused(tmp_path, folder):
    (tmp_path / "out").mkdir()
    with open(tmp_path / "out" / "prepare.lock", "ab") as lock:
        assert prepare_module.try_lock(lock)
        with pytest.raises(PrepareError, match=r"Another process prepares '.*out'"):
            prepare(folder, tmp_path / "out")
    prepare(folder, tmp_path / "out")


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"shards": 0}, "Expected shards to be an integer from 1 to 99999, received 0"),
        ({"shards": 61}, "at most one shard for each of the 60 images, received shards=61"),
        ({"shards": True}, "Expected shards to be an integer from 1 to 99999, received True"),
        ({"workers": 1.5}, "Expected workers to be an integer from 1 to 1024, received 1.5"),
        ({"shuffle_seed": -1}, "Expected shuffle_seed to be an integer from 0 to 4294967295, received -1"),
        ({"shuffle_seed": None}, "Expected shuffle_seed .* received None"),
    ],
)
def test_wrong_numbers_are_refused_with_the_range(tmp_path, folder, arguments, message):
    with pytest.raises(ValueError, match=message):
        prepare(folder, tmp_path / "out", **arguments)


def test_source_is_no_place_for_the_output(tmp_path):
    (tmp_path / "cat").mkdir()
    (tmp_path / "cat" / "1.jpg").write_bytes(b"image")
    with pytest.raises(ValueError, match=r"another folder than the source, received '.*' for both"):
        prepare(tmp_path, tmp_path / "cat" / "..")
    assert os.listdir(tmp_path) == ["cat"]


def test_trouble_with_the_last_split_shows_before_the_first_is_written(tmp_path, folder):
    (tmp_path / "data" / "val" / "empty").mkdir(parents=True)
    (tmp_path / "data" / "train").symlink_to(folder)
    with pytest.raises(SourceError, match=r"found 1 folders and no image"):
        prepare(tmp_path / "data", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_names_that_are_no_text_are_kept(tmp_path, tf):
    name = os.fsdecode(b"caf\xe9")
    (tmp_path / "data" / name).mkdir(parents=True)
    (tmp_path / "data" / name / f"{name}.jpg").write_bytes(b"image")
    expected = contents(open_source(tmp_path / "data"))
    assert expected == {f"{name}/{name}.jpg": (b"image", name)}
    prepare(tmp_path / "data", tmp_path / "out")
    assert contents(open_source(tmp_path / "out")) == expected
    assert records(tf, tmp_path / "out")[0]["image/class/synset"] == b"caf\xe9"


def small_set(path, classes):
    for name in classes:
        (path / name).mkdir(parents=True)
        (path / name / "1.jpg").write_bytes(name.encode())


def test_a_split_without_a_class_keeps_the_numbers_of_the_others(tmp_path):
    small_set(tmp_path / "data" / "train", ["cat", "dog", "fox"])
    small_set(tmp_path / "data" / "val", ["dog", "fox"])
    prepare(tmp_path / "data", tmp_path / "both")
    prepare(tmp_path / "data", tmp_path / "one", "train")
    prepare(tmp_path / "data", tmp_path / "one", "val")
    for folder in ("both", "one"):
        source = open_source(tmp_path / folder, "validation")
        assert (source.classes, sorted(source.labels)) == (["cat", "dog", "fox"], [1, 2])
    small_set(tmp_path / "data" / "val" / "..", ["other"])
    (tmp_path / "data" / "other").rename(tmp_path / "data" / "val" / "wolf")
    with pytest.raises(SourceError, match="1 are not: wolf"):
        prepare(tmp_path / "data", tmp_path / "new")


def test_an_image_that_changed_at_equal_size_is_written_again(tmp_path):
    small_set(tmp_path / "data", ["cat", "dog"])
    prepare(tmp_path / "data", tmp_path / "out", shards=2)
    time.sleep(0.02)
    (tmp_path / "data" / "cat" / "1.jpg").write_bytes(b"CAT")
    assert prepare(tmp_path / "data", tmp_path / "out", shards=2).num_kept == 1
    source = open_source(tmp_path / "out", "train")
    assert sorted(source.read(number) for number in range(2)) == [b"CAT", b"dog"]
    assert prepare(tmp_path / "data", tmp_path / "out", shards=2).num_kept == 2


def test_a_journal_or_a_file_of_another_program_stays(tmp_path):
    small_set(tmp_path / "data", ["cat", "dog"])
    (tmp_path / "out").mkdir()
    for name, text in (("train-journal.jsonl", '{"day": 1}\n'), ("train-index.npz", "mine")):
        path = tmp_path / "out" / name
        path.write_text(text)
        with pytest.raises(PrepareError, match=f"Expected no {name}.*not replaced"):
            prepare(tmp_path / "data", tmp_path / "out")
        assert path.read_text() == text
        path.unlink()
    written_file = tmp_path / "notes.txt"
    written_file.write_text("mine")
    with pytest.raises(PrepareError, match="received the file"):
        prepare(tmp_path / "data", written_file)


def test_verify_needs_a_finished_folder(tmp_path):
    with pytest.raises(SourceError, match=r"Expected manifest.json in .* Run prepare to its end"):
        verify(tmp_path)


@pytest.mark.parametrize(
    "text, message",
    [
        (
            '{"format": "keras_convnext", "version": 99, "splits": {}}',
            r"has format 'keras_convnext', version 99",
        ),
        ('{"name": "some web app"}', r"has format None, version None"),
        ("{", r"Expected JSON in .*manifest.json"),
    ],
)
def test_manifest_of_something_else_is_refused(tmp_path, folder, text, message):
    (tmp_path / MANIFEST).write_text(text)
    for use in (verify, open_source, lambda path: prepare(folder, path)):
        with pytest.raises(SourceError, match=message):
            use(tmp_path)
