"""Every layout of a data set is indexed to the bytes and labels that its own reader gives."""

import ast
import csv
import dataclasses
import gzip
import importlib.util
import inspect
import io
import json
import os
import re
import shutil
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from keras_convnext import _terminal
from keras_convnext.data import array_records, sources
from keras_convnext.data import imagenet as imagenet_module
from keras_convnext.data import index as index_module
from keras_convnext.data.calibration import calibration_images
from keras_convnext.data.class_names import synset_ids
from keras_convnext.data.imagenet import _scan_train_tar, read_real_labels
from keras_convnext.data.index import SourceError, described
from keras_convnext.data.preprocess import find_images
from keras_convnext.data.preprocessing import Preprocessing
from keras_convnext.data.sources import hold_out, list_splits, open_source, take
from keras_convnext.data.tfrecords import RecordError

pytestmark = pytest.mark.once

SAMPLES = Path(__file__).resolve().parents[3] / "shared/data/imagenet_samples"
SYNSETS = ["n02123045", "n01440764", "n01443537"]  # not sorted, as in the published tar


@pytest.fixture(autouse=True)
def index_cache(tmp_path, monkeypatch):
    folder = tmp_path / "index_cache"
    monkeypatch.setenv("KERAS_CONVNEXT_INDEX_CACHE", str(folder))
    return folder


def jpeg(number):
    """A small JPEG that differs from all others."""
    pixels = np.random.default_rng(number).integers(0, 256, (8, 8 + number % 5, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "JPEG", quality=95)
    return file.getvalue()


def write(path, content=b"image"):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return path


def write_tar(path, files, format=tarfile.GNU_FORMAT):
    with tarfile.open(path, "w", format=format) as archive:
        for name, content in files:
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return path


def tar_bytes(files, **options):
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w", **options) as archive:
        for name, content in files:
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return file.getvalue()


def write_train_tar(folder, images_per_class=3):
    """Writes ILSVRC2012_img_train.tar as it is published; returns name to bytes."""
    images = {
        f"{synset}/{synset}_{number}.JPEG": jpeg(100 * position + number)
        for position, synset in enumerate(SYNSETS)
        for number in range(images_per_class)
    }
    tars = [
        (
            f"{synset}.tar",
            tar_bytes([(name[10:], image) for name, image in images.items() if name[:9] == synset]),
        )
        for synset in SYNSETS
    ]
    folder.mkdir(exist_ok=True)
    write_tar(folder / "ILSVRC2012_img_train.tar", tars)
    return images


def write_validation_tar(folder, numbers):
    """Writes ILSVRC2012_img_val.tar with the members in the given order; returns name to bytes."""
    images = {f"ILSVRC2012_val_{number:08d}.JPEG": jpeg(number) for number in numbers}
    folder.mkdir(exist_ok=True)
    write_tar(folder / "ILSVRC2012_img_val.tar", list(images.items()))
    return images


def published_labels():
    package = Path(importlib.util.find_spec("tensorflow_datasets").origin).parent
    return (package / "datasets/imagenet2012/validation_labels.txt").read_text().split()


def contents(source):
    """Name to (encoded image, class name) of all examples."""
    found = {
        source.name(number): (source.read(number), source.classes[source.labels[number]])
        for number in range(len(source))
    }
    assert len(found) == len(source)
    return found


def class_folders(path, classes=("cat", "dog"), images_per_class=2):
    for position, name in enumerate(classes):
        for number in range(images_per_class):
            write(path / name / f"{number}.jpg", jpeg(10 * position + number))
    return path


# Class folders


def test_class_folders_give_every_image_its_folder_as_class(tmp_path):
    expected = {}
    for name in ["b/1.jpg", "b/deep/er/2.PNG", "a c/x.JPEG", "ü/3.webp"]:
        expected[name] = (write(tmp_path / name, name.encode()).read_bytes(), name.split("/")[0])
    for stray in ["b/notes.txt", "b/.hidden.jpg", ".git/4.jpg", "b/.cache/5.jpg", "README.jpg", "a c/6"]:
        write(tmp_path / stray)
    source = open_source(tmp_path)
    assert source.kind == "folder"
    assert source.classes == ["a c", "b", "ü"]
    assert contents(source) == expected
    assert source.labels.dtype == source.file_numbers.dtype == np.int32
    assert source.offsets.dtype == source.lengths.dtype == np.int64
    assert set(source.lengths) == {-1} and set(source.offsets) == {0}
    assert list_splits(tmp_path) == []


def test_links_to_class_folders_are_followed(tmp_path):
    write(tmp_path / "elsewhere" / "1.jpg", b"linked")
    write(tmp_path / "data" / "cat" / "2.jpg", b"here")
    (tmp_path / "data" / "dog").symlink_to(tmp_path / "elsewhere")
    assert contents(open_source(tmp_path / "data")) == {
        "cat/2.jpg": (b"here", "cat"),
        "dog/1.jpg": (b"linked", "dog"),
    }


def test_one_folder_under_two_names_is_not_of_two_classes(tmp_path):
    write(tmp_path / "cat" / "1.jpg")
    (tmp_path / "dog").symlink_to("cat")
    with pytest.raises(SourceError, match="found none in 1: dog"):
        open_source(tmp_path)


@pytest.mark.parametrize(
    "folders, classes, labels",
    [
        ([str(n) for n in range(11)], [str(n) for n in range(11)], [0, 1, 10, *range(2, 10)]),  # ImageNetV2
        (["00", "01", "02"], ["00", "01", "02"], [0, 1, 2]),
        (["10", "100", "20", "2000", "5"], ["10", "100", "20", "2000", "5"], [0, 1, 2, 3, 4]),  # banknotes
        (["1", "10", "2"], ["1", "10", "2"], [0, 1, 2]),
        (["01", "03"], ["01", "03"], [0, 1]),
        (["0", "10", "x"], ["0", "10", "x"], [0, 1, 2]),
        (["-1", "0", "1"], ["-1", "0", "1"], [0, 1, 2]),
        (["1.5", "10", "9"], ["1.5", "10", "9"], [0, 1, 2]),
        (["20240101001", "9"], ["20240101001", "9"], [0, 1]),
    ],
)
def test_numbers_of_folders_are_labels_where_they_are_0_to_n_else_names(tmp_path, folders, classes, labels):
    class_folders(tmp_path, folders, images_per_class=1)
    source = open_source(tmp_path)
    assert source.classes == classes
    assert source.labels.tolist() == labels
    are_told = len(folders) in (2, 3, 5) and folders[0] in ("10", "1", "01")
    assert ("numbers are names" in "".join(described(source))) == are_told


@pytest.mark.parametrize(
    "folders, asked, found",
    [
        (["train", "val"], "train", "train"),
        (["train", "val"], "validation", "val"),
        (["train", "validation"], "val", "validation"),
        (["training", "valid", "test", "meta"], "validation", "valid"),
        (["training", "valid", "test", "meta"], "train", "training"),
        (["train", "test"], "validation", "test"),
        (["train"], None, "train"),
        (["Training", "Testing"], "train", "Training"),
        (["Training", "Testing"], "validation", "Testing"),
        (["TEST", "TRAIN"], "test", "TEST"),
        (["test_set", "training_set"], "train", "training_set"),
        (["eval", "train"], "val", "eval"),
        (["dev", "test", "train"], "validation", "dev"),
        (["train", "validate"], "validation", "validate"),
        (["images_test", "images_train"], "train", "images_train"),
        (["TestSet", "leaves", "trainset"], "train", "trainset"),
        (["flowers-train", "flowers-val"], "train", "flowers-train"),
        (["train2017", "val2017"], "validation", "val2017"),
        (["01 Train images", "02 Test images"], "test", "02 Test images"),
        (["masks_train", "masks_val", "train", "val"], "train", "train"),
        (["amazon", "webcam"], "amazon", "amazon"),  # a folder that the caller names
    ],
)
def test_split_is_found_under_its_usual_names(tmp_path, folders, asked, found):
    for number, folder in enumerate(folders):
        write(tmp_path / folder / "cat" / f"{folder}.jpg", jpeg(number))
    source = open_source(tmp_path, asked)
    assert [source.name(0), source.classes] == [f"cat/{found}.jpg", ["cat"]]


def test_folder_of_a_split_agrees_with_the_split(tmp_path):
    class_folders(tmp_path / "val")
    assert len(open_source(tmp_path / "val", "validation")) == 4
    with pytest.raises(SourceError, match=r"is not divided into splits.*received split='train'"):
        open_source(tmp_path / "val", "train")


def test_class_named_train_is_a_class(tmp_path):
    class_folders(tmp_path, ["bus", "car", "train"])
    assert open_source(tmp_path).classes == ["bus", "car", "train"]


@pytest.mark.parametrize("folders", [["bus", "test_tube"], ["contest", "train"], ["positive_test", "test"]])
def test_classes_with_a_word_of_splits_in_their_names_are_classes(tmp_path, folders):
    class_folders(tmp_path, folders)
    assert open_source(tmp_path).classes == folders and list_splits(tmp_path) == []


@pytest.mark.parametrize(
    "outer, inner",
    [
        (["entrenamiento", "prueba"], ["glioma", "none"]),
        (["part1", "part2"], ["glioma", "none", "pituitary"]),
        (["amazon", "dslr", "webcam"], ["bike", "mug"]),
        (["cat", "dog"], ["test", "train"]),
        (["cat", "dog"], ["images", "masks"]),
    ],
)
def test_folders_that_may_be_splits_or_classes_are_refused_with_both_readings(tmp_path, outer, inner):
    for name in outer:
        class_folders(tmp_path / name, inner)
    write(tmp_path / outer[0] / "only here" / "1.jpg")
    message = (
        rf"two readings fit: all {len(outer)} folders \({', '.join(outer)}\) hold the sub-folders "
        rf"{', '.join(inner)}, and hardly an image.*name the folders train.*train_split.*move their images"
    )
    with pytest.raises(SourceError, match=message):
        open_source(tmp_path)
    assert open_source(tmp_path, classes=outer).classes == outer
    assert open_source(tmp_path, outer[1]).classes == inner
    write(tmp_path / outer[1] / "own.jpg")
    if len(inner) * len(outer) >= 9:  # one stray image says nothing
        with pytest.raises(SourceError, match="two readings"):
            open_source(tmp_path)
    for number in range(8):  # then there is one reading
        write(tmp_path / outer[1] / f"{number}.jpg")
    assert open_source(tmp_path).classes == outer


def test_one_common_name_is_enough_for_two_readings_unless_it_is_one_of_many(tmp_path):
    class_folders(tmp_path, ["old/cat", "old/dog", "new/cat", "new/bird"])
    with pytest.raises(SourceError, match=r"two readings fit.*sub-folders cat,"):
        open_source(tmp_path)
    class_folders(tmp_path, [f"{name}/{name}{number}" for name in ("old", "new") for number in range(3)])
    assert open_source(tmp_path).classes == ["new", "old"]


def test_one_folder_around_all_is_named(tmp_path):
    class_folders(tmp_path / "x" / "flowers", ["rose", "tulip"])
    for path in (tmp_path, tmp_path / "x"):
        with pytest.raises(SourceError, match=r"received the one folder .*rose, tulip. Pass '.*/x/flowers'"):
            open_source(path)
    assert open_source(tmp_path / "x" / "flowers").classes == ["rose", "tulip"]
    class_folders(tmp_path, ["one/images/deeper"])
    assert open_source(tmp_path / "one").classes == ["images"]


def test_records_beside_class_folders_are_two_sets(tmp_path):
    class_folders(tmp_path, ["cat", "dog"])
    write(tmp_path / "train.tfrecord")
    with pytest.raises(SourceError, match="TFRecord files and folders of images: cat, dog"):
        open_source(tmp_path)


def test_records_of_two_splits_in_names_without_a_mark_are_not_one(tmp_path):
    for name in ("mytrain.tfrecord", "mytest.tfrecord"):
        write(tmp_path / name)
    with pytest.raises(SourceError, match="names with test and train"):
        open_source(tmp_path)


def test_a_manifest_of_another_program_beside_class_folders_is_no_prepared_set(tmp_path):
    class_folders(tmp_path, ["cat", "dog"])
    for text in ('{"name": "web app"}', "[1]", "no JSON"):
        (tmp_path / "manifest.json").write_text(text)
        assert open_source(tmp_path).classes == ["cat", "dog"]


def test_a_flat_test_folder_is_left_out_and_opened_by_name_only(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(_terminal, "_said", set())
    monkeypatch.delenv("KERAS_CONVNEXT_QUIET", raising=False)
    class_folders(tmp_path / "train", ["cat", "dog"])
    write(tmp_path / "test" / "1.jpg")
    assert list_splits(tmp_path) == ["train"] and list_splits(tmp_path, labels="x.csv") == ["test", "train"]
    assert "left out 'test', 1 images without class folders" in capsys.readouterr().err
    with pytest.raises(SourceError, match="one folder a class"):
        open_source(tmp_path, "test")


def test_one_label_file_may_name_the_images_of_all_splits(tmp_path):
    for split, numbers in (("train", "123"), ("val", "12")):
        for number in numbers:
            write(tmp_path / split / f"{number}.jpg")
    labels = tmp_path / "labels.csv"
    labels.write_text("train/1.jpg,a\ntrain/2.jpg,b\ntrain/3.jpg,c\nval/1.jpg,b\nval/2.jpg,b\n")
    train, val = (open_source(tmp_path, split, labels=labels) for split in ("train", "val"))
    assert [train.classes[label] for label in train.labels] == ["a", "b", "c"]
    assert [val.classes[label] for label in val.labels] == ["b", "b"]
    labels.write_text("1,a\n2,b\n3,c\n")  # names that are in both: those of the split
    assert open_source(tmp_path, "train", labels=labels).classes == ["a", "b", "c"]


def test_two_columns_that_name_images_need_a_header(tmp_path):
    for number in (1, 2):
        write(tmp_path / "images" / f"{number}.jpg")
    labels = tmp_path / "labels.csv"
    labels.write_text("1,2\n2,1\n")
    with pytest.raises(SourceError, match="two that name as many images"):
        open_source(tmp_path / "images", labels=labels)
    labels.write_text("label,file\n1,2\n2,1\n")
    assert open_source(tmp_path / "images", labels=labels).labels.tolist() == [1, 0]


def test_boxes_of_imagenets_competition_are_no_part_of_the_label(tmp_path):
    for number in (1, 2):
        write(tmp_path / "images" / f"x_{number}.JPEG")
    labels = tmp_path / "LOC_val_solution.csv"
    labels.write_text("ImageId,PredictionString\nx_1,n2 1 2 3 4 \nx_2,n1 5 6 7 8 n1 1 1 2 2 \n")
    source = open_source(tmp_path / "images", labels=labels)
    assert (source.classes, source.labels.tolist()) == (["n1", "n2"], [1, 0])


def test_one_sub_folder_of_the_same_name_in_each_class_is_no_class(tmp_path):
    class_folders(tmp_path, ["n01/images", "n02/images"])  # Tiny ImageNet
    assert open_source(tmp_path).classes == ["n01", "n02"]


@pytest.mark.parametrize(
    "folders, split, message",
    [
        (
            ["trainA", "testA", "trainB", "testB"],
            None,
            r"received 2 that are divided into splits: testA, trainA;",
        ),
        (
            ["fold1_train", "fold2_train", "fold1_test"],
            "train",
            r"2 splits that 'train' could be.*fold2_train",
        ),
        (
            ["train", "val", "eval"],
            "validation",
            r"2 splits that 'validation' could be. Pass one of: eval, val",
        ),
    ],
)
def test_names_that_could_be_several_splits_are_refused(tmp_path, folders, split, message):
    for folder in folders:
        class_folders(tmp_path / folder)
    with pytest.raises(SourceError, match=message):
        open_source(tmp_path, split)


# What a folder holds


def odd_folder(path):
    """Six images as in `images_of_odd_folder`, and what lies beside images on real disks."""
    for number, name in enumerate(
        ["kiwi/0.jpg", "kiwi/deep/1.JPE", "kiwi/2.jfif", "plum/3.png", "plum/4.Webp"]
    ):
        write(path / name, jpeg(number))
    strays = [".hidden.jpg", "kiwi/._0.jpg", ".thumbs/0.jpg", "kiwi/.ipynb_checkpoints/0-checkpoint.jpg"]
    strays += ["__MACOSX/kiwi/0.jpg", "plum/@eaDir/3.jpg/SYNOPHOTO_THUMB_M.jpg", "plum/5.avif", "plum/6.txt"]
    for name in [*strays, "kiwi/none"]:
        write(path / name)
    os.mkfifo(path / "plum" / "7.jpg")
    (path / "plum" / "8.jpg").symlink_to("/dev/zero")
    (path / "plum" / "9.jpg").symlink_to("nowhere")
    (path / "plum" / "10.jpg").symlink_to("10.jpg")
    (path / "plum" / "again").symlink_to(path / "plum")
    (path / "ring").symlink_to("ring")
    (path / "plum" / "up").symlink_to(path)
    return {"kiwi/0.jpg", "kiwi/2.jfif", "kiwi/deep/1.JPE", "plum/3.png", "plum/4.Webp"}


def test_a_folder_has_the_same_images_for_training_prediction_and_calibration(tmp_path, monkeypatch, capsys):
    expected = odd_folder(tmp_path)
    source = open_source(tmp_path)
    assert set(contents(source)) == expected and source.classes == ["kiwi", "plum"]
    monkeypatch.delenv("KERAS_CONVNEXT_QUIET")
    assert {path.relative_to(tmp_path).as_posix() for path in find_images(tmp_path)} == expected
    left_out = (
        "4 hidden, 4 no regular file, 2 link to a folder that is listed already, 2 without suffix, "
        "1 .avif, 1 .txt, 1 @eaDir, 1 __MACOSX"
    )
    assert capsys.readouterr().err == f"{tmp_path}: left out {left_out}\n"
    assert described(source)[-1] == f"  left out: {left_out}"
    images = calibration_images(tmp_path, preprocessing=Preprocessing(8), count=9)
    assert len(images) == len(expected)


def test_what_was_found_is_said_in_a_few_short_lines(tmp_path):
    class_folders(tmp_path / "train", ["cat", "dog\nsaid \x1b[31m"], images_per_class=3)
    class_folders(tmp_path / "val", [f"{number:03}" for number in range(40)], images_per_class=1)
    write(tmp_path / "docs" / "1.txt")
    write(tmp_path / "train" / "overview.jpg")
    write(tmp_path / "train" / "cat" / "labels.csv")
    assert described(open_source(tmp_path, "train"), "training") == [
        f"training: 6 images of 2 classes in '{tmp_path / 'train'}': cat (3), 'dog\\nsaid \\x1b[31m' (3)",
        "  left out: 1 .csv, 1 folders and images beside the splits, 1 images beside the class folders",
    ]
    assert described(open_source(tmp_path, "val"))[0].endswith(
        "': 000 (1), 001 (1), 002 (1), 003 (1), 004 (1), ...; 1 to 1 a class"
    )


@pytest.mark.parametrize("name", ["photos", "photos.tfrecord", "x-00000-of-00001"])
def test_a_pipe_in_place_of_data_is_not_opened(tmp_path, name):
    os.mkfifo(tmp_path / name)
    with pytest.raises(OSError, match="named pipe"):
        open_source(tmp_path / name)
    if name != "photos":
        with pytest.raises(SourceError, match="no image"):
            open_source(tmp_path)


def test_a_tar_that_is_a_pipe_is_not_opened(tmp_path):
    os.mkfifo(tmp_path / "ILSVRC2012_img_val.tar")
    with pytest.raises(OSError, match="named pipe"):
        open_source(tmp_path)


@pytest.mark.parametrize(
    "split, message",
    [
        (None, r"has several splits, and split is None\. Pass one of: train, val"),
        ("vaidation", r"No split 'vaidation' in .*Did you mean 'validation'\? Known: train, val"),
        ("test", r"No split 'test' in '.*'\. Known: train, val"),
    ],
)
def test_unknown_split_is_refused_with_the_known_ones(tmp_path, split, message):
    class_folders(tmp_path / "train")
    class_folders(tmp_path / "val")
    with pytest.raises(SourceError, match=message):
        open_source(tmp_path, split)


@pytest.mark.parametrize(
    "files, message",
    [
        ([], "found 0 folders and no image. Known suffixes: .jpg"),
        (["cat/readme.txt"], "found 1 folders and no image"),
        (["cat/1.jpg", "dog/.keep", "eel/x.txt"], "found none in 2: dog, eel. Remove the folders"),
        (["1.jpg", "2.jpg"], r"received 2 images without folders, such as '1.jpg'.*'file,label' lines"),
        (["1/a.jpg", "01/a.jpg"], "Two classes of .* stand for one number: 01, 1. Rename one"),
        (["data.zip"], "found 0 folders and no image, but 1 .zip"),
        (
            ["cat/1.avif", "cat/2.heic"],
            "no image, but 1 .avif, 1 .heic. Known suffixes: .jpg, .jpeg, .jpe, .jfif",
        ),
    ],
)
def test_unusable_folder_is_refused_with_what_is_wrong(tmp_path, files, message):
    for name in files:
        write(tmp_path / name)
    with pytest.raises(SourceError, match=message):
        open_source(tmp_path)


@pytest.mark.parametrize(
    "path, message",
    [
        ("nowhere", "but nothing is there. Check the path"),
        ("gs://bucket/data", "Copy or mount it: only local paths are read"),
        ("nothing-*.tfrecord", "but nothing is there"),
    ],
)
def test_missing_path_is_named(tmp_path, path, message):
    with pytest.raises(SourceError, match=message):
        open_source(path if "://" in path else tmp_path / path)


def test_file_that_shrank_is_noticed_when_it_is_read(tmp_path):
    write_validation_tar(tmp_path, [1, 2])
    source = open_source(tmp_path)
    os.truncate(tmp_path / "ILSVRC2012_img_val.tar", source.offsets[1] + 7)
    assert source.read(0) == jpeg(1)
    with pytest.raises(
        SourceError, match=rf"Expected {len(jpeg(2))} bytes of 'ILSVRC2012_val_00000002.JPEG'.*received 7"
    ):
        source.read(1)


# ImageNet's tars


def test_training_tar_is_indexed_without_unpacking(tmp_path):
    images = write_train_tar(tmp_path)
    source = open_source(tmp_path, "train")
    assert (source.kind, source.classes) == ("tar", sorted(SYNSETS))
    assert contents(source) == {name: (image, name[:9]) for name, image in images.items()}
    assert contents(open_source(tmp_path / "ILSVRC2012_img_train.tar")) == contents(source)


@pytest.mark.parametrize("format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_tars_of_other_programs_are_read(tmp_path, format):
    files = [
        ("./", b""),
        ("./._ILSVRC2012_val_00000002.JPEG", b"AppleDouble"),
        ("./" + "long/" * 19 + "ILSVRC2012_val_00000002.JPEG", jpeg(2)),
        ("./ILSVRC2012_val_00000001.JPEG", jpeg(1)),
    ]
    path = tmp_path / "ILSVRC2012_img_val.tar"
    with tarfile.open(path, "w", format=format) as archive:
        for name, content in files:
            member = tarfile.TarInfo(name.rstrip("/"))
            member.size, member.mtime = len(content), 1.5 if format == tarfile.PAX_FORMAT else 1
            member.type = tarfile.DIRTYPE if name.endswith("/") else tarfile.REGTYPE
            archive.addfile(member, io.BytesIO(content))
    labels = published_labels()
    assert contents(open_source(path)) == {
        f"ILSVRC2012_val_{number:08d}.JPEG": (jpeg(number), labels[number - 1]) for number in (1, 2)
    }


def test_validation_labels_go_by_the_number_not_by_the_order(tmp_path):
    numbers = [50_000, 3, 1, 31_415, 2]
    images = write_validation_tar(tmp_path, numbers)
    source = open_source(tmp_path, "val")
    labels = published_labels()
    expected = [labels[number - 1] for number in numbers]
    assert [source.classes[label] for label in source.labels] == expected
    assert expected != labels[:5]  # what the order in the tar would give
    assert source.classes == synset_ids(1000)
    assert contents(source).keys() == images.keys()


def test_unpacked_validation_images_have_the_labels_of_the_tar(tmp_path):
    for name, image in write_validation_tar(tmp_path, [7, 3, 5]).items():
        write(tmp_path / "val" / name, image)
    assert contents(open_source(tmp_path / "val")) == contents(open_source(tmp_path))


def test_tar_of_a_split_that_is_not_there_is_named(tmp_path):
    write_validation_tar(tmp_path, [1])
    with pytest.raises(
        SourceError, match=r"No split 'train'.*Known: validation. Put ILSVRC2012_img_train.tar there"
    ):
        open_source(tmp_path, "train")


def test_missing_tensorflow_datasets_is_named_with_the_command(tmp_path, monkeypatch):
    write_validation_tar(tmp_path, [1])
    monkeypatch.setattr(imagenet_module.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(SourceError, match=r"Run pip install tensorflow-datasets .*, or pass labels"):
        open_source(tmp_path)


def test_image_number_without_a_label_is_named(tmp_path):
    write_validation_tar(tmp_path, [1, 50_001])
    with pytest.raises(
        SourceError, match=r"numbers from 1 to 50000, .*received 'ILSVRC2012_val_00050001.JPEG'"
    ):
        open_source(tmp_path)


@pytest.mark.parametrize(
    "cut",
    ["in the last class", "before the zeros", "in a header", "in the first class", "zeros in the middle"],
)
def test_truncated_tar_is_never_taken_for_a_whole_one(tmp_path, cut):
    write_train_tar(tmp_path)
    path = tmp_path / "ILSVRC2012_img_train.tar"
    with tarfile.open(path) as archive:
        members = archive.getmembers()
    end = members[-1].offset_data + members[-1].size
    size = {
        "in the last class": end - 700,
        "before the zeros": end,
        "in a header": members[1].offset + 100,
        "in the first class": members[0].offset_data + 600,
    }
    if cut in size:
        os.truncate(path, size[cut])
    else:
        content = bytearray(path.read_bytes())
        content[members[1].offset : members[1].offset + 200] = b"x" * 200
        path.write_bytes(content)
    with pytest.raises(
        SourceError, match=r"truncated.*MD5 sum of the published file is 1d675b47d978889d74fa0da5fadfb00e"
    ):
        open_source(path)


@pytest.mark.parametrize("size", range(0, 4096, 512))
def test_class_tar_that_is_cut_inside_is_refused(tmp_path, size):
    whole = tar_bytes(
        [("n01440764_1.JPEG", b"x" * 700), ("n01440764_2.JPEG", b"y" * 400)], format=tarfile.USTAR_FORMAT
    )
    path = write_tar(tmp_path / "train.tar", [("n01440764.tar", whole[:size]), ("n01443537.tar", whole)])
    if size >= 512 + 1024 + 512 + 512 + 512:  # one block of zeros is enough
        path = write_tar(tmp_path / "train.tar", [("n01440764.tar", whole[:size])])
        assert len(open_source(path)) == 2
        return
    with pytest.raises(SourceError, match=r"truncated|Expected a tar archive at byte|found none"):
        open_source(path)


@pytest.mark.parametrize(
    "files, message",
    [
        (
            [("n01440764.tar", tar_bytes([("n01443537_1.JPEG", b"x")]))],
            "Expected images named 'n01440764_...' in n01440764.tar .*received 'n01443537_1.JPEG'",
        ),
        ([("n01440764.tar", tar_bytes([]))], "Expected images in n01440764.tar .*found none"),
        (
            [("n01440764.tar", tar_bytes([("n01440764_1.JPEG", b"x")])), ("cat.tar", b"")],
            "Expected one tar a class .* received cat.tar",
        ),
        ([("cats/1.jpg", b"x")], "begins with 'cats/1.jpg'. Unpack other archives"),
        ([], "is an empty archive"),
        (
            [("ILSVRC2012_val_00000001.JPEG", b"x"), ("1.jpg", b"y")],
            "Expected an image named .* received '1.jpg'",
        ),
    ],
)
def test_tar_of_something_else_is_refused(tmp_path, files, message):
    path = write_tar(tmp_path / "some.tar", files)
    with pytest.raises(SourceError, match=message):
        open_source(path)


def test_link_in_a_tar_is_not_passed_over(tmp_path):
    (tmp_path / "ILSVRC2012_val_00000001.JPEG").write_bytes(jpeg(1))
    os.link(tmp_path / "ILSVRC2012_val_00000001.JPEG", tmp_path / "ILSVRC2012_val_00000002.JPEG")
    with tarfile.open(tmp_path / "some.tar", "w") as archive:
        for number in (1, 2):
            archive.add(
                tmp_path / f"ILSVRC2012_val_0000000{number}.JPEG", f"ILSVRC2012_val_0000000{number}.JPEG"
            )
    with pytest.raises(SourceError, match=r"received the link 'ILSVRC2012_val_00000002.JPEG'"):
        open_source(tmp_path / "some.tar")


def test_empty_tars_are_refused(tmp_path):
    for name in ("train", "val"):
        write_tar(tmp_path / f"ILSVRC2012_img_{name}.tar", [])
        with pytest.raises(SourceError, match=r"empty archive"):
            open_source(tmp_path, name)


def test_file_that_is_no_tar_is_refused(tmp_path):
    write_validation_tar(tmp_path, [1])
    content = (tmp_path / "ILSVRC2012_img_val.tar").read_bytes()
    path = write(tmp_path / "val.tar.gz", gzip.compress(content))
    with pytest.raises(SourceError, match=r"is compressed with GZIP. Run gunzip"):
        open_source(path)
    with pytest.raises(SourceError, match=r"Expected a tar archive at byte 0 in .*notes.txt"):
        open_source(write(tmp_path / "notes.txt", b"hello " * 500))


# Label files


@pytest.mark.parametrize(
    "lines, classes, labels",
    [
        ("file,label\na.jpg,dog\nsub/b.jpg,cat\n", ["cat", "dog"], [1, 0]),
        ("a.jpg dog\nsub/b.jpg cat\n", ["cat", "dog"], [1, 0]),
        ("b.jpg\tcat\t0\t5\na.jpg\tdog\t1\t1\n", ["cat", "dog"], [1, 0]),  # Tiny ImageNet's validation list
        ("./a.jpg,1\nsub/b.jpg,0\n", ["0", "1"], [1, 0]),
        ("./a.jpg,1000\nsub/b.jpg,5\n", ["1000", "5"], [0, 1]),  # with gaps: names
        ("a.jpg,dog\na.jpg,dog\nb.jpg,cat\n", ["cat", "dog"], [1, 0]),
        ("file,width,label\na.jpg,64,dog\nb.jpg,65,cat\n", ["cat", "dog"], [1, 0]),
        ("a.jpg,64,dog\nb.jpg,65,cat\n", ["cat", "dog"], [1, 0]),
        ("id,breed,score\na,dog,0.5\nb,cat,1e-3\n", ["cat", "dog"], [1, 0]),  # without suffix
        (",label,file\n0,dog,a.jpg\n1,cat,b.jpg\n", ["cat", "dog"], [1, 0]),
        ('"a.jpg", "dog"\r\n"b.jpg", "cat, domestic"\r\n', ["cat, domestic", "dog"], [1, 0]),
        ("a.jpg;dog\nb.jpg;cat", ["cat", "dog"], [1, 0]),
        ("# made by hand\na.jpg,dog\n\n# more\nb.jpg,cat\n", ["cat", "dog"], [1, 0]),
        ("/mnt/x/a.jpg,dog\n/mnt/x/sub/b.jpg,cat\n", ["cat", "dog"], [1, 0]),
        ("data\\a.jpg,dog\ndata\\sub\\b.jpg,cat\n", ["cat", "dog"], [1, 0]),
    ],
)
def test_label_file_gives_a_flat_folder_its_classes(tmp_path, lines, classes, labels):
    write(tmp_path / "data" / "a.jpg")
    write(tmp_path / "data" / "sub" / "b.jpg")
    source = open_source(tmp_path / "data", labels=write(tmp_path / "labels.txt", lines.encode()))
    assert source.classes == classes
    assert source.labels.tolist() == labels


@pytest.mark.parametrize(
    "lines, message",
    [
        ("a.jpg,cat\n", r"has none for 1: b.jpg"),
        ("a.jpg,cat\nb.jpg,dog\nc.jpg,dog\n", r"labels for 1 files that are not there: c.jpg"),
        ("a.jpg,cat\nb.jpg\n", r"Expected 2 fields in line 2 of .*as in its first, received 1: 'b.jpg'"),
        ("a.jpg,cat\nb.jpg,dog, old\n", r"Expected 2 fields in line 2 of .*received 3.*in quotes"),
        (
            "a.jpg,cat\nb.jpg,dog\na.jpg,dog\n",
            r"one label for 'a.jpg', received 'cat' before and 'dog' in line 3 of",
        ),
        ("a.jpg,cat\nb.jpg,\n", r"Expected a label for 'b.jpg', received '' in line 2 of .*labels.txt'"),
        ("a.jpg,cat\nb.jpg,NaN\n", r"a label for 'b.jpg', received 'NaN' in line 2"),
        ("file,cat,dog\na.jpg,1,0\nb.jpg,0,1\n", r"one column of labels .*received file, cat, dog, of which"),
        (
            "a.jpg,cat,dog\nb.jpg,dog,eel\n",
            r"one column of labels .*received 3 columns.*name its column 'label'",
        ),
        ("x/a.jpg,cat\nb,dog\n", r"has none for 1: c/a.jpg. It has x/a.jpg, which are not there"),
        ("c/a.jpg,cat\nb,dog\n", r"one image for 'b', found b.jpg, b.png in line 2"),
        ('a.jpg,"cat\nb.jpg,dog\n', r"in line 1 of .*labels.txt': unexpected end of data"),
        ("a.jpg," + "x" * 200_000, r"in line 1 of .*labels.txt': field larger than field limit"),
        ("a.jpg,cat\nb.jpg,dog\n".encode("utf-16"), r"Expected text in UTF-8 in .*labels.txt'"),
        ("a.jpg,cat\nb.jpg,dog\n".encode("utf-16-le"), r"in UTF-8 in .*labels.txt', received zero bytes"),
        ("a.jpg,caf\xe9\nb.jpg,dog\n".encode("latin-1"), r"Expected text in UTF-8 in .*labels.txt'"),
        (b"\x89PNG\r\n\x1a\n", r"Expected text in UTF-8 in .*labels.txt'"),
        ("cat\ndog\n", r"received one word a line"),
        ("a.jpg,1\nb.jpg,01\n", r"Two classes of .*labels.txt' stand for one number: 01, 1"),
        ("\n", r"is empty"),
        ("# a\n# b\n", r"is empty"),
    ],
)
def test_label_file_that_does_not_fit_is_refused(tmp_path, lines, message):
    is_deep = isinstance(lines, str) and "/a.jpg" in lines
    for name in ["c/a.jpg", "b.jpg", *["b.png"] * ("c/a" in lines)] if is_deep else ["a.jpg", "b.jpg"]:
        write(tmp_path / "data" / name)
    content = lines if isinstance(lines, bytes) else lines.encode()
    with pytest.raises(SourceError, match=message):
        open_source(tmp_path / "data", labels=write(tmp_path / "labels.txt", content))


def test_label_of_a_name_that_two_folders_have_is_refused(tmp_path):
    for name in ["a/0.jpg", "b/0.jpg"]:
        write(tmp_path / "data" / name)
    labels = write(tmp_path / "labels.csv", b"0.jpg,cat\n")
    with pytest.raises(SourceError, match=r"path of one image for '0.jpg', found a/0.jpg, b/0.jpg in line 1"):
        open_source(tmp_path / "data", labels=labels)
    labels.write_text("a/0.jpg,cat\nb/0.jpg,dog\n")
    assert open_source(tmp_path / "data", labels=labels).labels.tolist() == [0, 1]


def test_label_file_replaces_the_published_validation_labels(tmp_path):
    write_validation_tar(tmp_path, [2, 1, 3])
    path = write(tmp_path / "labels.txt", b"n02123045\nn01440764\nn01443537\n")
    source = open_source(tmp_path, labels=path)
    assert [source.classes[label] for label in source.labels] == ["n01440764", "n02123045", "n01443537"]
    assert len(source.classes) == 1000
    path.write_text("281\n0\n1\n")
    assert open_source(tmp_path, labels=path).labels.tolist() == source.labels.tolist() == [0, 281, 1]


@pytest.mark.parametrize(
    "lines, message",
    [
        ("n02123045\nn01440764\n", "Expected a line for each of 3 images in .*received 2 lines"),
        ("490\n361\n1000\n", "from 0 to 999 .*received 1000. The numbers of ImageNet's development kit"),
    ],
)
def test_validation_label_file_that_does_not_fit_is_refused(tmp_path, lines, message):
    write_validation_tar(tmp_path, [2, 1, 3])
    with pytest.raises(SourceError, match=message):
        open_source(tmp_path, labels=write(tmp_path / "labels.txt", lines.encode()))


def test_label_file_for_labelled_data_is_refused(tmp_path):
    write_train_tar(tmp_path)
    with pytest.raises(SourceError, match=r"whose class tars are the labels, received 'labels.txt'"):
        open_source(tmp_path, "train", labels="labels.txt")


def test_label_file_of_the_sample_images_is_read():
    if not SAMPLES.is_dir():
        pytest.skip("the sample images are not next to this checkout")
    source = open_source(SAMPLES / "images", labels=SAMPLES / "labels.csv")
    with open(SAMPLES / "labels.csv", newline="") as file:
        expected = {row["file"]: row["wnid"] for row in csv.DictReader(file)}
    assert {name: label for name, (_, label) in contents(source).items()} == expected


# TensorFlow Datasets


@pytest.fixture(scope="module")
def tfds():
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    return pytest.importorskip("tensorflow_datasets")


@pytest.fixture(scope="module")
def imagenet(tmp_path_factory, tfds):
    """Tars as published, the folder that TFDS made of them, and what its own reader gives."""
    folder = tmp_path_factory.mktemp("imagenet")
    write_train_tar(folder / "manual")
    write_validation_tar(folder / "manual", [3, 1, 2, 5, 4])  # TFDS gives the n-th name the n-th label
    builder = tfds.builder("imagenet2012", data_dir=folder / "data")
    builder.download_and_prepare(
        download_config=tfds.download.DownloadConfig(manual_dir=str(folder / "manual"))
    )
    return folder, {split: read_by_tfds(tfds, builder, split) for split in ("train", "validation")}


def read_by_tfds(tfds, builder, split, label="label"):
    decoders = {"image": tfds.decode.SkipDecoding()}
    names = builder.info.features[label].names
    return {
        example["file_name"].decode(): (example["image"], names[example[label]])
        for example in tfds.as_numpy(builder.as_dataset(split=split, decoders=decoders))
    }


@pytest.mark.parametrize("split", ["train", "validation"])
def test_tars_have_the_bytes_and_labels_that_tfds_reads_from_them(imagenet, split):
    folder, expected = imagenet
    found = contents(open_source(folder / "manual", split))
    assert {name.rpartition("/")[2]: value for name, value in found.items()} == expected[split]
    assert len(expected[split]) == {"train": 9, "validation": 5}[split]


@pytest.mark.parametrize("split", ["train", "val"])
@pytest.mark.parametrize("path", ["data", "data/imagenet2012", "data/imagenet2012/5.1.0"])
def test_prepared_set_has_the_bytes_and_labels_that_tfds_reads(imagenet, split, path):
    folder, expected = imagenet
    source = open_source(folder / path, split)
    assert contents(source) == expected["train" if split == "train" else "validation"]
    assert (source.kind, source.classes) == ("tfds", synset_ids(1000))
    assert all(path.endswith(".tfrecord-00000-of-00001") for path in source.files)
    assert list_splits(folder / path) == ["train", "validation"]


def make_set(tfds, data_dir, set_name, features, split, examples, version="1.0.0", file_format="tfrecord"):
    """Writes examples as a prepared set, through TFDS's own writer."""

    class Builder(tfds.core.GeneratorBasedBuilder, skip_registration=True):
        name = set_name
        VERSION = tfds.core.Version(version)

        def _info(self):
            return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

        def _split_generators(self, manager):
            return {split: self._generate_examples()}

        def _generate_examples(self):
            yield from enumerate(examples)

    builder = Builder(data_dir=data_dir, file_format=file_format)
    builder.download_and_prepare()
    return Path(builder.data_dir)


def imagenet_features(tfds, **others):
    return {
        "image": tfds.features.Image(encoding_format="jpeg"),
        "label": tfds.features.ClassLabel(names=synset_ids(1000)),
        "file_name": tfds.features.Text(),
    } | others


def imagenet_examples(labels):
    return [
        {"image": io.BytesIO(jpeg(number)), "label": label, "file_name": f"{number}.jpg"}
        for number, label in enumerate(labels)
    ]


def test_set_with_a_test_split_only_serves_as_validation(tmp_path, tfds):
    make_set(tfds, tmp_path, "imagenet_v2", imagenet_features(tfds), "test", imagenet_examples([9, 0, 999]))
    expected = {f"{n}.jpg": (jpeg(n), synset_ids(1000)[label]) for n, label in enumerate([9, 0, 999])}
    assert contents(open_source(tmp_path, "validation")) == contents(open_source(tmp_path)) == expected


def test_newest_version_is_taken_and_two_sets_are_refused(tmp_path, tfds):
    features = imagenet_features(tfds)
    for version, count in [("2.0.0", 1), ("10.0.0", 2), ("9.0.0", 3)]:
        make_set(tfds, tmp_path, "one", features, "test", imagenet_examples([0] * count), version)
    assert len(open_source(tmp_path)) == 2
    make_set(tfds, tmp_path, "two", features, "test", imagenet_examples([0]))
    with pytest.raises(SourceError, match=r"holds 2 prepared sets: pass the folder of one: .*/one, .*/two"):
        open_source(tmp_path)
    assert len(open_source(tmp_path / "two")) == 1


def test_real_labels_are_read_from_the_prepared_set(tmp_path, tfds):
    class_label = tfds.features.ClassLabel(names=synset_ids(1000))
    features = {
        "image": tfds.features.Image(encoding_format="jpeg"),
        "original_label": class_label,
        "real_label": tfds.features.Sequence(class_label),
        "file_name": tfds.features.Text(),
    }
    lists = [[], [5], [1, 999, 300], [0]]
    examples = [
        {
            "image": io.BytesIO(jpeg(n)),
            "original_label": n + 20,
            "real_label": real,
            "file_name": f"ILSVRC2012_val_{n + 1:08d}.JPEG",
        }
        for n, real in enumerate(lists)
    ]
    make_set(tfds, tmp_path, "imagenet2012_real", features, "validation", examples)
    source = open_source(tmp_path)
    numbers = [int(source.name(n)[15:23]) - 1 for n in range(len(source))]
    assert numbers != sorted(numbers)  # TFDS shuffles, so the order is put to the test
    assert source.labels.tolist() == [number + 20 for number in numbers]
    assert read_real_labels(source) == [tuple(lists[number]) for number in numbers]


@pytest.fixture
def prepared_set(tmp_path, imagenet):
    shutil.copytree(imagenet[0] / "data/imagenet2012/5.1.0", tmp_path / "5.1.0")
    return tmp_path / "5.1.0"


def test_missing_shard_is_named(prepared_set):
    os.remove(prepared_set / "imagenet2012-train.tfrecord-00000-of-00001")
    with pytest.raises(SourceError, match=r"missing: imagenet2012-train.tfrecord-00000-of-00001"):
        open_source(prepared_set, "train")
    assert len(open_source(prepared_set, "val")) == 5


def test_shard_with_too_few_records_is_refused(prepared_set):
    shutil.copy(
        prepared_set / "imagenet2012-validation.tfrecord-00000-of-00001",
        prepared_set / "imagenet2012-train.tfrecord-00000-of-00001",
    )
    with pytest.raises(SourceError, match=r"Expected 9 records in .*-train.*, received 5"):
        open_source(prepared_set, "train")


def test_damaged_description_is_named(prepared_set):
    (prepared_set / "dataset_info.json").write_text("{")
    with pytest.raises(SourceError, match=r"Expected JSON in .*dataset_info.json"):
        open_source(prepared_set, "train")


def test_array_record_set_has_the_bytes_labels_and_names_of_the_tfrecords(tmp_path, tfds):
    features, made = imagenet_features(tfds), {}
    for file_format in ("tfrecord", "array_record"):
        folder = tmp_path / file_format
        examples = imagenet_examples([0, 999, 7, 3, 3])
        make_set(tfds, folder, "one", features, "test", examples, file_format=file_format)
        source = open_source(folder)
        images = [source.read(number) for number in range(5)]
        made[file_format] = images, [source.name(number) for number in range(5)], source.labels.tolist()
        assert source.kind == {"tfrecord": "tfds"}.get(file_format, file_format)
    assert made["array_record"] == made["tfrecord"]
    assert len(set(made["tfrecord"][0])) > 1
    (file,) = source.files
    content = Path(file).read_bytes()
    Path(file).write_bytes(content[: len(content) // 2])
    array_records._opened.cache_clear()
    with pytest.raises(ValueError, match=r"Expected array_records in"):
        open_source(tmp_path / "array_record")


def test_a_set_is_found_by_its_name_where_tensorflow_datasets_prepares_it(tmp_path, tfds, monkeypatch):
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path))
    for version, count in (("1.0.0", 1), ("2.0.0", 2)):
        examples = imagenet_examples([0] * count)
        make_set(tfds, tmp_path, "one_set", imagenet_features(tfds), "test", examples, version)
    assert len(open_source("tfds:one_set")) == 2
    assert len(open_source("tfds:one_set:1.0.0", "test")) == 1
    assert list_splits("tfds:one_set") == ["test"]
    with pytest.raises(SourceError, match=r"none. Did you mean 'one_set'\?.* Run `tfds build one_sat`"):
        open_source("tfds:one_sat")


def test_split_without_labels_is_refused(tmp_path, tfds):
    make_set(tfds, tmp_path, "one", imagenet_features(tfds), "test", imagenet_examples([-1, -1]))
    with pytest.raises(SourceError, match=r"received -1: the split has none"):
        open_source(tmp_path)


def test_set_without_a_class_label_is_refused(tmp_path, tfds):
    features = {"image": tfds.features.Image(), "text": tfds.features.Text()}
    examples = [{"image": io.BytesIO(jpeg(0)), "text": "a"}]
    make_set(tfds, tmp_path, "captions", features, "train", examples)
    with pytest.raises(SourceError, match=r"received image \(Image\), text \(Text\)"):
        open_source(tmp_path)


# Plain TFRecords


@pytest.fixture(scope="module")
def tf():
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    return pytest.importorskip("tensorflow")


def write_records(tf, path, examples, options=None):
    """Writes Examples through TensorFlow's own classes."""
    with tf.io.TFRecordWriter(str(path), options) as writer:
        for example in examples:
            features = {}
            for name, value in example.items():
                values = value if isinstance(value, list) else [value]
                if isinstance(values[0], bytes):
                    features[name] = tf.train.Feature(bytes_list=tf.train.BytesList(value=values))
                elif isinstance(values[0], int):
                    features[name] = tf.train.Feature(int64_list=tf.train.Int64List(value=values))
                else:
                    features[name] = tf.train.Feature(float_list=tf.train.FloatList(value=values))
            message = tf.train.Example(features=tf.train.Features(feature=features))
            writer.write(message.SerializeToString())
    return path


def test_records_of_build_imagenet_data_take_the_class_of_the_synset(tmp_path, tf):
    """The layout of TensorFlow's build_imagenet_data.py, whose labels count from 1."""
    examples = [
        {
            "image/encoded": jpeg(n),
            "image/class/label": n + 1,
            "image/class/synset": synset.encode(),
            "image/class/text": b"a fish",
            "image/filename": f"{synset}_{n}.JPEG".encode(),
            "image/height": 8,
            "image/object/bbox/xmin": [0.25, 0.5],
        }
        for n, synset in enumerate([*SYNSETS, SYNSETS[0]])
    ]
    write_records(tf, tmp_path / "train-00000-of-00002", examples[:3])
    write_records(tf, tmp_path / "train-00001-of-00002", examples[3:])
    write_records(tf, tmp_path / "validation-00000-of-00001", examples[:1])
    source = open_source(tmp_path, "train")
    assert (source.kind, source.classes) == ("tfrecord", sorted(SYNSETS))
    assert contents(source) == {
        example["image/filename"].decode(): (example["image/encoded"], example["image/class/synset"].decode())
        for example in examples
    }
    assert list_splits(tmp_path) == ["train", "validation"]
    assert len(open_source(tmp_path, "val")) == 1
    assert len(open_source(tmp_path / "train-*")) == 4
    assert len(open_source(tmp_path / "train-00001-of-00002")) == 1


@pytest.mark.parametrize(
    "labels, first_label, expected, num_classes",
    [
        ([0, 5, 2], None, [0, 5, 2], 6),
        ([1, 1000], None, [0, 999], 1000),
        ([1, 37], 1, [0, 36], 37),
        ([1, 37], 0, [1, 37], 38),
        ([2, 37], None, [2, 37], 38),
        ([1, 1000], 0, [1, 1000], 1001),
    ],
)
def test_integer_labels_begin_where_they_say(tmp_path, tf, labels, first_label, expected, num_classes):
    examples = [{"image": jpeg(n), "label": label} for n, label in enumerate(labels)]
    source = open_source(write_records(tf, tmp_path / "x.tfrecord", examples), first_label=first_label)
    assert source.labels.tolist() == expected
    assert len(source.classes) == num_classes
    assert [source.read(n) for n in range(len(labels))] == [jpeg(n) for n in range(len(labels))]
    assert source.name(0).startswith("x.tfrecord@")
    assert (source.classes == synset_ids(1000)) == (num_classes == 1000)


@pytest.mark.parametrize(
    "examples, first_label, message",
    [
        (
            [{"image": b"x", "label": 1}, {"image": b"x", "label": 37}],
            None,
            "run from 1 to 37: expected first_label=1",
        ),
        ([{"image": b"x", "label": 0}], 1, "whose labels begin at 0, received 1"),
        ([{"image": b"x", "label": -1}], None, "received -1"),
        ([{"image": b"x", "label": 0}], 2, "received 2"),
        ([{"image": b"x", "label": 2**32}], None, "labels from 0 to 2147483647 in .*received 4294967296"),
        (
            [{"picture": b"x", "label": 0}],
            None,
            "Expected the feature 'image' in every record of .*received label, picture",
        ),
        (
            [{"image": b"x", "label": [0, 1]}],
            None,
            "Expected one value, an integer, for 'label' .*received 2",
        ),
        ([{"image": b"x", "label": b"cat"}], None, "Expected one value, an integer, for 'label'"),
        ([], None, "found no record in its files"),
        (
            [{"image": b"x", "label": 0, "image/class/synset": b"n"}, {"image": b"x", "label": 0}],
            None,
            "'image/class/synset' in every record .*, or in none",
        ),
        (
            [{"image": b"x", "label": 0}, {"image": b"x", "label": 0, "image/class/synset": b"n"}],
            None,
            "'image/class/synset' in every record .*, or in none",
        ),
    ],
)
def test_records_that_are_no_labelled_images_are_refused(tmp_path, tf, examples, first_label, message):
    path = write_records(tf, tmp_path / "x.tfrecord", examples)
    with pytest.raises(SourceError, match=message):
        open_source(path, first_label=first_label)


def test_missing_record_file_is_noticed(tmp_path, tf):
    write_records(tf, tmp_path / "train-00000-of-00003", [{"image": b"x", "label": 0}])
    with pytest.raises(
        SourceError, match=r"Expected all of the 00003 TFRecord files of split 'train' .* received 1"
    ):
        open_source(tmp_path)


def test_split_is_found_in_the_names_of_record_files(tmp_path, tf):
    names = [
        "imagenet2012-train.tfrecord-00000-of-00001",
        "val_0.tfrecord",
        "val_1.tfrecord",
        "minival-00000-of-00001",
    ]
    for label, name in enumerate(names):
        write_records(tf, tmp_path / name, [{"image": b"x", "label": label}])
    assert set(list_splits(tmp_path)) == {"train", "val", "minival"}
    assert open_source(tmp_path, "train").labels.tolist() == [0]
    assert open_source(tmp_path, "minival").labels.tolist() == [3]
    with pytest.raises(SourceError, match=r"run from 1 to 2"):
        open_source(tmp_path, "validation")
    write_records(tf, tmp_path / "x.tfrecord", [{"image": b"x", "label": 0}])
    with pytest.raises(SourceError, match=r"received none in 'x.tfrecord'. Pass a pattern"):
        open_source(tmp_path, "train")


def test_first_label_is_for_plain_records(tmp_path):
    class_folders(tmp_path)
    with pytest.raises(SourceError, match=r"says what its labels mean, received first_label=1"):
        open_source(tmp_path, first_label=1)


def test_folder_of_hugging_face_is_not_taken_for_tfds(tmp_path):
    class_folders(tmp_path)
    (tmp_path / "dataset_info.json").write_text("{}")
    assert open_source(tmp_path).kind == "folder"


def test_compressed_records_are_refused(tmp_path, tf):
    options = tf.io.TFRecordOptions(compression_type="GZIP")
    path = write_records(tf, tmp_path / "x.tfrecord", [{"image": b"x", "label": 0}], options)
    with pytest.raises(RecordError, match=r"is compressed with GZIP"):
        open_source(path)


def test_damaged_records_are_refused(tmp_path, tf):
    path = write_records(tf, tmp_path / "x.tfrecord", [{"image": jpeg(n), "label": 0} for n in range(3)])
    content = path.read_bytes()
    second = open_source(path).offsets[1]
    for size in (len(content) - 1, len(content) - 5, second, 8):
        path.write_bytes(content[:size])
        with pytest.raises(RecordError, match=rf"ends at byte {size}, within the record that begins at byte"):
            open_source(path)
    path.write_bytes(content[:1] + b"\x01" + content[2:])
    with pytest.raises(RecordError, match=r"is not a TFRecord file"):
        open_source(path)
    header = 16 + int.from_bytes(content[:8], "little")  # of the second record
    path.write_bytes(content[:header] + b"\xff" + content[header + 1 :])
    with pytest.raises(RecordError, match=rf"is damaged at byte {header}"):
        open_source(path)


def test_records_of_other_messages_are_refused(tmp_path, tf):
    with tf.io.TFRecordWriter(str(tmp_path / "x.tfrecord")) as writer:
        writer.write(b"hello world")
    with pytest.raises(RecordError, match=r"Expected a tf.train.Example in the record at byte 12"):
        open_source(tmp_path)


# ReaL labels from a file


def test_real_json_goes_by_the_number_of_the_image(tmp_path):
    write_validation_tar(tmp_path, [3, 1, 2])
    path = write(tmp_path / "real.json", json.dumps([[1], [], [7, 8]]).encode())
    assert read_real_labels(open_source(tmp_path), path) == [(7, 8), (1,), ()]


@pytest.mark.parametrize(
    "content, message",
    [
        ([[1], []], "each of the 3 images of .*received 2 in "),
        ({"a": 1}, "Expected a list of lists"),
        ([1, 2, 3], "Expected a list of lists"),
    ],
)
def test_real_json_that_does_not_fit_is_refused(tmp_path, content, message):
    write_validation_tar(tmp_path, [3, 1, 2])
    path = write(tmp_path / "real.json", json.dumps(content).encode())
    with pytest.raises(SourceError, match=message):
        read_real_labels(open_source(tmp_path), path)


def test_real_labels_of_other_images_are_refused(tmp_path):
    source = open_source(class_folders(tmp_path / "data"))
    path = write(tmp_path / "real.json", json.dumps([[1]] * 4).encode())
    with pytest.raises(
        SourceError, match=r"Expected an image named ILSVRC2012_val_00000001.JPEG .*received 'cat/0.jpg'"
    ):
        read_real_labels(source, path)
    with pytest.raises(SourceError, match=r"received path=None. Pass real.json"):
        read_real_labels(source)


# Classes


def test_classes_of_another_split_give_their_numbers(tmp_path):
    class_folders(tmp_path, ["dog", "eel"], images_per_class=1)
    source = open_source(tmp_path, classes=["cat", "eel", "dog"])
    assert source.classes == ["cat", "eel", "dog"]
    assert {source.name(n): int(source.labels[n]) for n in range(2)} == {"dog/0.jpg": 2, "eel/0.jpg": 1}


def test_numbers_for_names_count_in_the_given_classes(tmp_path):
    class_folders(tmp_path, ["0", "2"], images_per_class=1)
    source = open_source(tmp_path, classes=["cat", "dog", "eel"])
    assert (source.classes, source.labels.tolist()) == (["cat", "dog", "eel"], [0, 2])
    with pytest.raises(SourceError, match=r"among the 2 given, such as cat, dog; 2 are not: 0, 2"):
        open_source(tmp_path, classes=["cat", "dog"])
    with pytest.raises(SourceError, match=r"1 are not: 0"):  # numbers as names: 0 is not the first
        open_source(tmp_path, classes=["1", "2", "3"])


def test_class_outside_the_given_ones_is_named(tmp_path):
    class_folders(tmp_path, ["cat", "dgo"])
    with pytest.raises(SourceError, match=r"1 are not: dgo\. Did you mean 'dog'\?"):
        open_source(tmp_path, classes=["cat", "dog"])


# A part of the examples


def numbered_source(counts, rng=None):
    """A source without files: class "a" has counts[0] images, and so on; in random order with an rng."""
    examples = [(label, number) for label, count in enumerate(counts) for number in range(count)]
    order = range(len(examples)) if rng is None else rng.permutation(len(examples))
    examples = [examples[place] for place in order]
    images = [(0, 0, 1, label, f"{'abcdefgh'[label]}/{number}.jpg") for label, number in examples]
    source = index_module.scanned("data", "tar", [], images)
    return dataclasses.replace(source, classes=list("abcdefgh"[: len(counts)]))


def names_of(source):
    return [source.name(number) for number in range(len(source))]


@pytest.mark.parametrize("layout", ["folder", "tar"])
def test_taken_examples_keep_their_bytes_names_and_labels(tmp_path, layout):
    if layout == "folder":
        source = open_source(class_folders(tmp_path, ["cat", "dog", "eel"]))
    else:
        write_train_tar(tmp_path / "tar")
        source = open_source(tmp_path / "tar")
    chosen = [4, 0, 3]
    taken = take(source, chosen)
    assert names_of(taken) == [source.name(number) for number in chosen]
    assert [taken.read(n) for n in range(3)] == [source.read(number) for number in chosen]
    assert taken.labels.tolist() == source.labels[chosen].tolist()
    assert (taken.classes, taken.path, taken.kind) == (source.classes, source.path, source.kind)
    assert names_of(take(taken, [2, 1])) == [source.name(3), source.name(0)]
    assert len(take(source, [])) == 0


def test_hold_out_takes_the_share_of_every_class():
    source = numbered_source([100, 30, 5, 3, 2, 1])
    train, held_out = hold_out(source, 0.1, seed=0)
    assert np.bincount(held_out.labels, minlength=6).tolist() == [10, 3, 1, 1, 1, 0]
    assert np.bincount(train.labels, minlength=6).tolist() == [90, 27, 4, 2, 1, 1]
    assert sorted(names_of(train) + names_of(held_out)) == sorted(names_of(source))
    assert train.classes == held_out.classes == source.classes
    train, held_out = hold_out(source, 0.9, seed=0)
    assert np.bincount(train.labels, minlength=6).tolist() == [10, 3, 1, 1, 1, 1]


def test_hold_out_goes_by_seed_class_and_name_alone():
    source = numbered_source([50, 50])
    held_out = set(names_of(hold_out(source, 0.2, seed=3)[1]))
    shuffled = numbered_source([50, 50], np.random.default_rng(0))
    assert names_of(shuffled) != names_of(source)  # else the next line would show nothing
    assert set(names_of(hold_out(shuffled, 0.2, seed=3)[1])) == held_out
    # Another class next to them changes nothing.
    assert held_out <= set(names_of(hold_out(numbered_source([50, 50, 9]), 0.2, seed=3)[1]))
    # What must matter does.
    assert set(names_of(hold_out(source, 0.2, seed=4)[1])) != held_out
    # Images of the same names in two classes, as in tars and records without folders.
    names = [f"{number}.jpg".encode() for _ in "ab" for number in range(50)]
    alike = dataclasses.replace(
        source, name_text=np.frombuffer(b"".join(names), np.uint8), name_ends=np.cumsum(list(map(len, names)))
    )
    found = hold_out(alike, 0.2, seed=3)[1]
    first, second = ({found.name(n) for n in np.flatnonzero(found.labels == label)} for label in (0, 1))
    assert len(first) == len(second) == 10 and first != second


def test_hold_out_keeps_the_order_and_draws_from_all_of_it():
    source = numbered_source([1000])
    train, held_out = hold_out(source, 0.3, seed=0)
    numbers = [[int(name[2:-4]) for name in names_of(part)] for part in (train, held_out)]
    assert all(part == sorted(part) for part in numbers)
    # The mean of 300 of 0 to 999 is 499.5 with a standard error of 14; the first 300 have 149.5.
    assert abs(np.mean(numbers[1]) - 499.5) < 56


def test_a_larger_share_holds_out_the_same_images_and_more():
    source = numbered_source([40, 20])
    small, large = (set(names_of(hold_out(source, share, seed=1)[1])) for share in (0.1, 0.5))
    assert small < large


@pytest.mark.parametrize("fraction", [0, 1, -0.1, 1.5, float("nan"), "0.1", None, True])
def test_share_outside_0_and_1_is_refused(fraction):
    with pytest.raises(ValueError, match=rf"between 0 and 1, both excluded, received {fraction!r}\."):
        hold_out(numbered_source([4]), fraction, seed=0)


def test_data_without_two_images_of_a_class_cannot_be_divided():
    with pytest.raises(SourceError, match=r"with two images or more in 'data', .* received 3 images of 3"):
        hold_out(numbered_source([1, 1, 1]), 0.5, seed=0)


# The kept index


@pytest.fixture
def count_scans(monkeypatch):
    """Keeps the index of small files as well, and counts how often a tar is scanned."""
    monkeypatch.setattr(index_module, "CACHED_BYTES", 0)
    scan, calls = _scan_train_tar, []

    def counted(path):
        calls.append(path)
        return scan(path)

    monkeypatch.setattr(imagenet_module, "_scan_train_tar", counted)
    return calls


def test_kept_index_is_used_until_the_file_changes(tmp_path, count_scans):
    images = write_train_tar(tmp_path)
    first = contents(open_source(tmp_path))
    source = open_source(tmp_path)
    assert contents(source) == first
    assert (source.kind, len(count_scans)) == ("tar", 1)
    path = tmp_path / "ILSVRC2012_img_train.tar"
    os.utime(path, ns=(1, 1))
    open_source(tmp_path)
    assert len(count_scans) == 2
    write_train_tar(tmp_path, images_per_class=9)
    os.utime(path, ns=(1, 1))
    assert len(open_source(tmp_path)) == 3 * len(images)


def test_small_files_leave_no_index(tmp_path, index_cache):
    write_train_tar(tmp_path)
    open_source(tmp_path)
    assert not index_cache.exists()


@pytest.mark.parametrize("damage", ["cut", "flip", "empty", "text"])
def test_damaged_index_is_made_again(tmp_path, index_cache, count_scans, damage):
    write_train_tar(tmp_path)
    expected = contents(open_source(tmp_path))
    (index,) = index_cache.iterdir()
    content = bytearray(index.read_bytes())
    middle = content.find(b"n01440764/")
    content[middle] ^= 1
    index.write_bytes({"cut": content[:-100], "flip": content, "empty": b"", "text": b"index"}[damage])
    assert contents(open_source(tmp_path)) == expected
    assert contents(open_source(tmp_path)) == expected
    assert len(count_scans) == 2
    assert list(index_cache.iterdir()) == [index]


def test_index_that_cannot_be_kept_is_not_needed(tmp_path, index_cache, count_scans, capsys):
    write_train_tar(tmp_path)
    index_cache.write_bytes(b"a file where the folder should be")
    for _ in range(2):
        assert len(open_source(tmp_path)) == 9
    assert "is not kept, and will be made again" in capsys.readouterr().err
    assert len(count_scans) == 2


# Progress and imports


def test_progress_is_shown_to_a_terminal_only(tmp_path, monkeypatch, capsys):
    write_train_tar(tmp_path)
    monkeypatch.delenv("KERAS_CONVNEXT_QUIET", raising=False)
    monkeypatch.setenv("COLUMNS", "100")
    for is_watched in (False, True):
        monkeypatch.setattr(sys.stderr, "isatty", lambda: is_watched)  # noqa: B023
        open_source(tmp_path)
        shown = re.search(r"Indexing \S+, 1 images, 0/\S+ MB", capsys.readouterr().err)
        assert (shown is not None) == is_watched


def test_module_needs_numpy_and_the_standard_library_only():
    tree = ast.parse(inspect.getsource(sources))
    names = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    names |= {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    roots = {name.split(".")[0] for name in names}
    assert roots <= sys.stdlib_module_names | {"numpy", "keras_convnext"}
    assert "numpy" in roots
