"""Prepared shards of photographs with label maps: what is in them, what opens them, and what is refused."""

import json
import shutil

import numpy as np
import pytest
from PIL import Image

from keras_convnext.cli import main
from keras_convnext.data import records, sources
from keras_convnext.data.index import SourceError
from keras_convnext.data.prepare import prepare
from keras_convnext.data.segmentation import batches
from keras_convnext.data.segmentation.label_maps import LabelMapError, encode
from keras_convnext.data.segmentation.sources import is_segmentation, list_splits, open_source
from keras_convnext.data.segmentation.train_transform import SegmentationAugmentation

pytestmark = pytest.mark.once


@pytest.fixture
def folder(tmp_path):
    """Two splits, of nine and four pairs; 0 is not labelled, and the second split lacks the last class."""
    root = tmp_path / "pairs"
    for split, count, classes in (("train", 9, 4), ("val", 4, 3)):
        for place in ("images", "masks"):
            (root / split / place).mkdir(parents=True)
        for number in range(count):
            generator = np.random.default_rng(number)
            pixels = generator.integers(0, 256, (20 + number, 24, 3), np.uint8)
            Image.fromarray(pixels).save(root / split / "images" / f"{number}.jpg")
            values = generator.integers(0, classes, (20 + number, 24)).astype(np.uint8)
            (root / split / "masks" / f"{number}.png").write_bytes(encode(values))
    return root


def by_name(source):
    return {source.name(number): number for number in range(len(source))}


def test_prepared_pairs_are_those_of_the_folder(folder, tmp_path):
    summary = prepare(folder, tmp_path / "out", ignored_values=[0], shards=2)
    assert summary.images == {"train": 9, "validation": 4}
    assert is_segmentation(tmp_path / "out")
    assert list_splits(tmp_path / "out") == ["train", "validation"]
    for split in ("train", "validation"):
        plain, made = open_source(folder, split, ignored_values=[0]), open_source(tmp_path / "out", split)
        assert made.classes == ["class 0", "class 1", "class 2"]  # those of the training split
        assert made.labels.ignored_values == (0,)
        numbers = by_name(plain)
        assert by_name(made).keys() == numbers.keys()
        assert list(by_name(made)) != list(numbers)  # shuffled
        for name, number in by_name(made).items():
            assert made.read(number) == plain.read(numbers[name])
            for one, other in zip(made.load(number), plain.load(numbers[name]), strict=True):
                np.testing.assert_array_equal(one, other)
    assert (
        open_source(tmp_path / "out", "train").fingerprint
        == open_source(folder, "train", ignored_values=[0]).fingerprint
    )
    assert records.verify(tmp_path / "out") == []
    shutil.copy(tmp_path / "out/train-index.npz", tmp_path / "out/train-maps.npz")
    assert records.verify(tmp_path / "out") == ["train-maps.npz"]


def test_the_records_are_examples_that_tensorflow_reads(folder, tmp_path):
    import tensorflow as tf

    prepare(folder, tmp_path / "out", "val", ignored_values=[0])
    source = open_source(tmp_path / "out")
    found = 0
    for record in tf.data.TFRecordDataset(str(tmp_path / "out/validation-00000-of-00001.tfrecord")):
        features = tf.train.Example.FromString(record.numpy()).features.feature
        values = {name: feature.bytes_list.value[0] for name, feature in features.items()}
        assert values.keys() == {"image/encoded", "image/filename", "image/segmentation/class/encoded"}
        number = by_name(source)[values["image/filename"].decode()]
        assert source.read(number) == (values["image/encoded"], values["image/segmentation/class/encoded"])
        found += 1
    assert found == 4


def test_a_second_run_keeps_the_shards_and_a_changed_map_writes_its_shard_again(folder, tmp_path):
    arguments = {"split": "train", "ignored_values": [0], "shards": 3}
    prepare(folder, tmp_path / "out", **arguments)
    content = {path.name: path.read_bytes() for path in (tmp_path / "out").glob("*.tfrecord")}
    assert prepare(folder, tmp_path / "out", **arguments).num_kept == 3
    changed = folder / "train/masks/3.png"
    changed.write_bytes(changed.read_bytes())  # of another time
    assert prepare(folder, tmp_path / "out", **arguments).num_kept == 2
    assert {path.name: path.read_bytes() for path in (tmp_path / "out").glob("*.tfrecord")} == content
    with pytest.raises(SourceError, match="source="):
        prepare(folder, tmp_path / "out", **arguments | {"ignored_values": [1]})


def test_a_map_that_does_not_fit_is_named_and_nothing_is_finished(folder, tmp_path):
    (folder / "val/masks/2.png").write_bytes(encode(np.full((22, 24), 9, np.uint8)))
    with pytest.raises(LabelMapError, match=r"val/masks/2.png', .* received 9"):
        prepare(folder, tmp_path / "out", ignored_values=[0])
    assert not (tmp_path / "out").exists()


def test_annotations_are_prepared_as_maps(tmp_path):
    (tmp_path / "set/images").mkdir(parents=True)
    images, annotations = [], []
    for number in range(3):
        pixels = np.random.default_rng(number).integers(0, 256, (20, 30, 3), np.uint8)
        Image.fromarray(pixels).save(tmp_path / f"set/images/{number}.jpg")
        images.append({"id": number, "file_name": f"{number}.jpg", "height": 20, "width": 30})
        polygon = [2, 3, 20, 3 + number, 11, 17]
        annotations.append({"id": number, "image_id": number, "category_id": 4, "segmentation": [polygon]})
    content = {"images": images, "annotations": annotations, "categories": [{"id": 4, "name": "kite"}]}
    (tmp_path / "set/all.json").write_text(json.dumps(content))
    prepare(tmp_path / "set", tmp_path / "out")
    plain, made = open_source(tmp_path / "set"), open_source(tmp_path / "out")
    assert made.classes == ["kite"]
    for name, number in by_name(made).items():
        np.testing.assert_array_equal(made.load(number)[1], plain.load(by_name(plain)[name])[1])


def test_prepared_pairs_train_and_are_no_classification_set(folder, tmp_path):
    prepare(folder, tmp_path / "out", "train", ignored_values=[0])
    source = open_source(tmp_path / "out")
    still = SegmentationAugmentation(base_size=(32, 32), photometric=0)
    images, maps = next(iter(batches.train_batches(source, batch_size=3, crop_size=16, augmentation=still)))
    assert (images.shape, maps.shape) == ((3, 16, 16, 3), (3, 16, 16))
    with pytest.raises(SourceError, match="was prepared with label maps"):
        sources.open_source(tmp_path / "out")
    with pytest.raises(SourceError, match=r"Expected ignored_values=\(0,\), with which"):
        open_source(tmp_path / "out", ignored_values=[1])


def test_the_command_prepares_pairs(folder, tmp_path, capsys):
    arguments = ["prepare", str(folder), str(tmp_path / "out"), "--ignored", "0", "--verify", "--json"]
    assert main.main(arguments) == 0
    assert json.loads(capsys.readouterr().out)["images"] == {"train": 9, "validation": 4}
    with pytest.raises(SystemExit):
        main.main(["prepare", str(folder), str(tmp_path / "out"), "--ignored", "x"])
    assert "expected whole numbers with commas, such as 0,255, received 'x'" in capsys.readouterr().err
    assert main.main(["prepare", str(folder), str(tmp_path / "new"), "--labels", "x.csv"]) == 2
    assert (
        "has label maps, received 'x.csv'. Name the classes in a file classes.txt" in capsys.readouterr().err
    )


def test_ignored_values_are_for_label_maps(tmp_path):
    (tmp_path / "set/cats").mkdir(parents=True)
    with pytest.raises(ValueError, match="which has no label maps, received"):
        prepare(tmp_path / "set", tmp_path / "out", ignored_values=[255])
