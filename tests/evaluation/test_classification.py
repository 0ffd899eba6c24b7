"""Scores: against a computation by hand, and what is written about them."""

import csv
import json
import os
import pathlib
import pickle
import re
import resource
import subprocess
import sys
import warnings

import keras
import numpy as np
import pytest
import timm
from PIL import Image

import keras_convnext
from keras_convnext import predictor
from keras_convnext.data import imagenet, sources
from keras_convnext.data.class_names import synset_ids
from keras_convnext.data.preprocess import preprocess_image, read_image
from keras_convnext.data.preprocessing import Preprocessing
from keras_convnext.data.sources import open_source
from keras_convnext.evaluation import classification, report, result_columns, results
from keras_convnext.evaluation.classification import evaluate, match_classes
from keras_convnext.evaluation.forward import best_classes, label_ranks
from keras_convnext.evaluation.results import COLUMNS, append_result, combine, read_results
from keras_convnext.weights.catalog import CHECKPOINTS
from keras_convnext.weights.resolve import resolve

pytestmark = pytest.mark.one_backend

IMAGES = pathlib.Path(__file__).parents[1] / "images"
PHOTOGRAPHS = sorted([*IMAGES.glob("*.jpg"), *IMAGES.glob("*.png")])
SIZE = 64
SYNSETS = synset_ids(1000)
PLANNED_RANKS = [0, 0, 1, 4, 5, 17, 999, 0, 3]
VALIDATION_NAMES = [f"ILSVRC2012_val_{number + 1:08d}.JPEG" for number in range(len(PLANNED_RANKS))]


@pytest.fixture(scope="module")
def model():
    """A small random classifier of 1000 classes, whose logits differ from image to image."""
    keras.utils.set_random_seed(0)
    model = keras_convnext.load(
        "test_convnext", weights=None, input_shape=(SIZE, SIZE, 3), classifier_activation=None
    )
    generator = np.random.default_rng(0)
    head = model.get_layer("head")
    head.set_weights([generator.normal(size=weight.shape).astype("float32") for weight in head.get_weights()])
    return model


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """JPEGs cut out of the photographs of the repository."""
    folder = tmp_path_factory.mktemp("pictures")
    for number in range(len(PLANNED_RANKS)):
        photograph = Image.open(PHOTOGRAPHS[number % 3]).convert("RGB")
        left = 20 * number
        photograph.crop((left, 10, left + 150, 130)).save(folder / f"{number}.jpg", quality=90)
    return sorted(folder.iterdir())


@pytest.fixture(scope="module")
def logits(model, pictures):
    """What the model says, by `preprocess_image` and `predict_on_batch`."""
    images = [preprocess_image(read_image(path), Preprocessing(SIZE)) for path in pictures]
    return np.asarray(model.predict_on_batch(np.stack(images)), "float64")


@pytest.fixture(scope="module")
def order(logits):
    """(N, 1000), the classes of each image, the most probable first."""
    order = np.argsort(-logits, axis=1)
    sorted_logits = np.take_along_axis(logits, order, axis=1)
    places = np.array(PLANNED_RANKS)[:, None] + np.arange(-1, 1)
    assert len(set(order[:, 0].tolist())) > 1  # or the images would not matter
    gaps = -np.diff(sorted_logits, axis=1)
    near = np.take_along_axis(gaps, places.clip(0, 998), axis=1)
    assert near.min() > 1e-4  # or rounding would decide
    return order


def make_tree(folder, pictures, classes):
    """A folder tree with picture i in the folder of class i."""
    for number, (path, name) in enumerate(zip(pictures, classes, strict=True)):
        (folder / name).mkdir(parents=True, exist_ok=True)
        (folder / name / f"{number}.jpg").write_bytes(path.read_bytes())
    return folder


@pytest.fixture(scope="module")
def tree(tmp_path_factory, pictures, order):
    """Pictures whose labels have the planned ranks among all 1000 classes."""
    wnids = [SYNSETS[order[number, rank]] for number, rank in enumerate(PLANNED_RANKS)]
    return make_tree(tmp_path_factory.mktemp("tree"), pictures, wnids)


@pytest.fixture
def source(tree):
    return open_source(tree, classes=SYNSETS)


@pytest.fixture(scope="module")
def result(model, tree):
    """9 images in batches of 4."""
    return evaluate(model, open_source(tree, classes=SYNSETS), batch_size=4)


def number_of(source, place):
    """The number that a picture has in its name."""
    return int(pathlib.Path(source.name(int(place))).stem)


# The arithmetic.


@pytest.mark.every_backend
def test_scores_equal_a_computation_by_hand(result, order):
    pictures = [number_of(result.source, place) for place in result.numbers]
    assert sorted(pictures) == list(range(9))  # each once, the padding of the last batch not at all
    assert result.numbers.tolist() == list(range(9))
    assert result.ranks.tolist() == [PLANNED_RANKS[number] for number in pictures]
    assert result.predictions.tolist() == order[pictures, :5].tolist()
    assert result.top1 == pytest.approx(100 * 3 / 9)
    assert result.top5 == pytest.approx(100 * 6 / 9)
    assert (result.num_skipped, result.faults, result.real, result.real_accuracy) == (0, {}, None, None)


def test_wrong_labels_and_pixels_change_the_scores(model, source, result, pictures, order):
    """Negative controls: what the comparison above must see."""
    shifted = label_ranks_of(order, np.roll(result.labels, 1), result)
    assert shifted != result.ranks.tolist()
    other = evaluate(model, source, batch_size=4, preprocessing=Preprocessing(SIZE, crop_fraction=0.5))
    assert other.ranks.tolist() != result.ranks.tolist()
    assert other.settings["crop"] == "0.5" and result.settings["crop"] == "0.875"


def label_ranks_of(order, labels, result):
    pictures = [number_of(result.source, place) for place in result.numbers]
    pairs = zip(pictures, labels, strict=True)
    return [order[number].tolist().index(label) for number, label in pairs]


@pytest.mark.once
def test_ties_go_to_the_smaller_class_number():
    outputs = np.array([[1, 3, 3, 3, -np.inf, -np.inf]], "float32").repeat(6, axis=0)
    assert label_ranks(outputs, np.arange(6)).tolist() == [3, 0, 1, 2, 4, 5]
    assert best_classes(outputs, 5)[0].tolist() == [1, 2, 3, 0, 4]
    assert best_classes(outputs[:, :3], 5)[0].tolist() == [1, 2, 0]
    generator = np.random.default_rng(0)
    outputs = generator.integers(0, 30, (50, 100)).astype("float32")
    best = best_classes(outputs, 5)
    assert (np.argsort(-outputs, axis=1, kind="stable")[:, :5] == best).all()
    for place in range(5):
        assert (label_ranks(outputs, best[:, place]) == place).all()


def test_data_with_some_classes_is_classified_among_these(model, pictures, logits, tmp_path):
    wnids = [SYNSETS[number] for number in (7, 100, 999)]
    make_tree(tmp_path, pictures, [wnids[number % 3] for number in range(9)])
    result = evaluate(model, tmp_path, batch_size=4)
    expected = np.argsort(-logits[:, [7, 100, 999]], axis=1)
    for place, predicted in zip(result.numbers, result.predictions, strict=True):
        assert predicted.tolist() == expected[number_of(result.source, place)].tolist()
    assert result.settings["outputs"] == "3 of 1000, by WordNet id"
    among_all = evaluate(model, open_source(tmp_path, classes=SYNSETS), batch_size=4)
    assert among_all.top1 == 0 < result.top1  # the negative control
    assert among_all.settings["outputs"] == "all 1000"


@pytest.mark.once
def test_classes_find_their_outputs():
    assert match_classes(SYNSETS, 1000) == (None, "all 1000")
    assert match_classes([str(number) for number in range(1000)], 1000) == (None, "all 1000")
    for width, lacking in ((21841, 1), (11821, 7)):
        columns, text = match_classes(SYNSETS, width)
        found = [synset_ids(width)[column] if column >= 0 else None for column in columns]
        assert found.count(None) == lacking
        assert all(name in (None, wnid) for name, wnid in zip(found, SYNSETS, strict=True))
        assert text.startswith(f"{1000 - lacking} of {width}, by WordNet id; none for n")
        assert "n04399382" in text and len(re.findall(r"n\d{8}", text)) == lacking
        assert (match_classes([str(number) for number in range(1000)], width)[0] == columns).all()
    assert match_classes(SYNSETS[:9], 21841)[1] == "9 of 21841, by WordNet id"
    columns, _ = match_classes(["n02123045", "n01440764"], 1000)
    assert columns.tolist() == [281, 0]
    assert match_classes(["ash", "beech"], 2) == (None, "all 2, in the order of the data's classes")
    for classes in (
        ["ash", "beech", "oak", "yew"],
        ["n02123045", "oak"],
        [str(number) for number in range(10)],
    ):
        with pytest.raises(ValueError, match=f"the 1000 classes of the model.*received {len(classes)}: "):
            match_classes(classes, 1000)
    with pytest.raises(ValueError, match=r"received 4: ash, beech, oak, \.\.\.\. Pass a model"):
        match_classes(["ash", "beech", "oak", "yew"], 3)


@pytest.mark.once
@pytest.mark.parametrize("letter", ["a", "r"])
def test_imagenet_a_and_r_of_tensorflow_datasets_are_classified_among_their_200_classes(letter, source):
    """TensorFlow Datasets lists all 1000 classes; timm's lists say which 200 have images."""
    path = pathlib.Path(timm.__file__).parent / "data" / "_info" / f"imagenet_{letter}_synsets.txt"
    if not path.exists():
        pytest.skip("this timm has no list")
    wnids = path.read_text().split()
    labels = np.array([SYNSETS.index(name) for name in [*wnids, wnids[3]]], np.int32)
    listed = with_labels(source, labels)
    used = classification._without_unused_classes(listed)
    assert used.classes == wnids and used.labels.tolist() == [*range(200), 3]
    assert match_classes(used.classes, 1000)[1] == f"200 of 1000, by WordNet id (ImageNet-{letter.upper()})"
    sample = with_labels(source, labels[:150])
    assert classification._without_unused_classes(sample) is sample


def with_labels(source, labels):
    return classification.dataclasses.replace(source, labels=labels)


def test_real_accuracy_counts_images_with_labels_only(model, pictures, order, tmp_path):
    folder = tmp_path / "val"
    folder.mkdir()
    for name, path in zip(VALIDATION_NAMES, pictures, strict=True):
        (folder / name).write_bytes(path.read_bytes())
    first, second = order[:, 0].tolist(), order[:, 1].tolist()
    lists = [[first[0]], [second[1]], [], [second[3], first[3]], *([] for _ in range(5))]
    (tmp_path / "real.json").write_text(json.dumps(lists))
    result = evaluate(model, folder, batch_size=4, real_labels=tmp_path / "real.json")
    assert result.real.tolist() == [1, 0, -1, 1, -1, -1, -1, -1, -1]
    assert result.real_accuracy == pytest.approx(100 * 2 / 3)
    assert results.result_row(result)["real"] == "66.6667"
    part = evaluate(model, folder, batch_size=4, real_labels=tmp_path / "real.json", limit=3)
    assert part.real.tolist() == [1, 1, -1]  # images 0, 3 and 6
    (tmp_path / "real.json").write_text(json.dumps(lists[1:] + lists[:1]))
    other = evaluate(model, folder, batch_size=4, real_labels=tmp_path / "real.json")
    assert other.real.tolist() != result.real.tolist()  # the negative control
    with pytest.raises(ValueError, match=r"ReaL labels of .* in a file, received path=None"):
        evaluate(model, folder, real_labels=True)


@pytest.mark.once
def test_real_labels_need_all_classes(model, tree, tmp_path):
    (tmp_path / "real.json").write_text("[]")
    with pytest.raises(ValueError, match=r"ImageNet's 1000 classes for ReaL labels, received \d classes"):
        evaluate(model, tree, real_labels=tmp_path / "real.json")


def test_images_of_a_class_that_the_model_lacks_count_as_wrong(pictures, tmp_path):
    """timm's 12k subset lacks seven of the 1000 classes."""
    lacking = [name for name in SYNSETS if name not in synset_ids(11821)]
    keras.utils.set_random_seed(0)
    model = keras_convnext.load("test_convnext", None, input_shape=(SIZE, SIZE, 3), classes=11821)
    make_tree(tmp_path, pictures[:2], [lacking[0], SYNSETS[0]])
    result = evaluate(model, open_source(tmp_path, classes=SYNSETS))
    is_lacking = np.array([SYNSETS[label] in lacking for label in result.labels])
    assert is_lacking.sum() == 1 and (result.ranks[is_lacking] == 993).all()
    assert (result.ranks[~is_lacking] < 993).all()
    assert not {SYNSETS[number] for number in result.predictions.ravel()} & set(lacking)


def test_limited_examples_lie_at_equal_distances(model, source, result):
    part = evaluate(model, source, batch_size=4, limit=4)
    chosen = [0, 2, 4, 6]
    assert [part.source.name(number) for number in range(4)] == [source.name(number) for number in chosen]
    assert part.ranks.tolist() == result.ranks[chosen].tolist()
    assert evaluate(model, source, batch_size=4, limit=100).ranks.tolist() == result.ranks.tolist()


# Damaged images.


def damaged_tree(folder, pictures, damaged):
    make_tree(folder, pictures, [SYNSETS[number] for number in range(9)])
    for number in damaged:
        path = folder / SYNSETS[number] / f"{number}.jpg"
        path.write_bytes(path.read_bytes()[:300])
    return folder


def test_a_damaged_image_is_left_out_and_named(model, pictures, tmp_path):
    whole = evaluate(model, damaged_tree(tmp_path / "whole", pictures, []), batch_size=4)
    folder = damaged_tree(tmp_path / "data", pictures, [5])
    result = evaluate(model, folder, batch_size=4, max_faults=0.2, output=tmp_path / "output")
    assert result.numbers.tolist() == [0, 1, 2, 3, 4, 6, 7, 8]
    assert result.ranks.tolist() == np.delete(whole.ranks, 5).tolist()
    name = f"{SYNSETS[5]}/5.jpg"
    assert list(result.faults) == [name] and name in result.faults[name] and result.num_skipped == 1
    assert results.result_row(result)["n"] == "8" and results.result_row(result)["skipped"] == "1"
    assert read_csv(tmp_path / "output" / "faults.csv")[0] == {"name": name, "reason": result.faults[name]}


def test_too_many_damaged_images_are_an_error(model, pictures, tmp_path):
    folder = damaged_tree(tmp_path / "data", pictures, [0, 5])
    with pytest.raises(ValueError, match=r"Expected at most 0.01 of the 9 images") as error:
        evaluate(model, folder, batch_size=4, output=tmp_path / "output")
    assert type(error.value).__name__ == "DataError"
    assert len(read_csv(tmp_path / "output" / "faults.csv")) >= 1
    everything = damaged_tree(tmp_path / "all", pictures, range(9))
    with pytest.raises(ValueError, match=r"none of 9 can\. First, 'n01440764/0\.jpg': "):
        evaluate(model, everything, batch_size=4, max_faults=1.0)


# Several hosts.


@pytest.mark.slow
def test_eight_hosts_evaluate_each_image_once(model, source, result):
    parts = [evaluate(model, source, batch_size=4, share=(host, 8)) for host in range(8)]
    assert sum(len(part.numbers) for part in parts) == 9
    assert len(parts[7].numbers) == 0 and np.isnan(parts[7].top1)
    parts = [pickle.loads(pickle.dumps(part)) for part in reversed(parts)]
    whole = combine(parts)
    for name in ("numbers", "labels", "ranks", "predictions"):
        assert getattr(whole, name).tolist() == getattr(result, name).tolist()
    assert (whole.top1, whole.top5) == (result.top1, result.top5)
    assert whole.seconds == max(part.seconds for part in parts)
    filled = next(part for part in parts if len(part.numbers))
    with pytest.raises(ValueError, match="the 9 images of the data, received"):
        combine([part for part in parts if part is not filled])
    with pytest.raises(ValueError, match=r"each image in one result, received .* in two, such as 'n"):
        combine([*parts, filled])
    with pytest.raises(ValueError, match="several hosts"):
        append_result("never.csv", filled)
    other = classification.dataclasses.replace(filled, settings=filled.settings | {"crop": "1"})
    with pytest.raises(ValueError, match=r"different ones of crop: 0.875, 1"):
        combine([*parts, other])


@pytest.mark.once
def test_one_of_several_hosts_writes_no_files(tree):
    with pytest.raises(ValueError, match=r"one of 8 hosts.*Call combine, then append_result"):
        evaluate("never", tree, share=(0, 8), results="never.csv")
    with pytest.raises(ValueError, match="received none"):
        combine([])


# The table of results.


def read_csv(path):
    with open(path, encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def test_a_row_says_all_that_a_score_depends_on(model, source, tmp_path):
    path = tmp_path / "results.csv"
    for _ in range(2):
        result = evaluate(model, source, batch_size=4, results=path)
    row, again = read_results(path)
    assert tuple(row) == COLUMNS
    optional = ("licence", "weights", "commit", "split", "accelerators", "resize_size", "real")
    optional += ("mode", "miou", "aacc", "macc")  # of segmentation
    assert all(row[name] for name in COLUMNS if name not in optional)
    assert row["top1"] == "33.3333" and row["top5"] == "66.6667" and row["n"] == "9" and row["skipped"] == "0"
    assert row["model"] == row["architecture"] == "test_convnext"
    assert row["backend"] == keras.backend.backend() and row["keras"] == keras.__version__
    assert (row["image_size"], row["crop"], row["resize_mode"]) == ("64", "0.875", "shorter_side")
    assert (row["interpolation"], row["dtype_policy"], row["batch_size"]) == ("bicubic", "float32", "4")
    assert (row["data_kind"], row["data"]) == ("folder", tmp_path_name(source))
    assert re.fullmatch("[0-9a-f]{64}", row["weights_sha256"])
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\+00:00", row["time"])
    assert float(row["seconds"]) > 0 and float(row["images_per_second"]) > 0
    assert "/" not in path.read_text()  # no paths of this machine
    same = ("weights_sha256", "data_sha256", "top1")
    assert [row[name] for name in same] == [again[name] for name in same]
    assert result.settings["data_sha256"] == row["data_sha256"]


def tmp_path_name(source):
    return pathlib.Path(source.path).name


@pytest.mark.once
def test_the_hash_of_the_weights_is_that_of_their_values(model):
    before, weights = result_columns.digest_of_arrays(model), model.get_weights()
    model.set_weights([weights[0] + np.float32(1e-3), *weights[1:]])
    changed = result_columns.digest_of_arrays(model)
    model.set_weights(weights)
    assert changed != before == result_columns.digest_of_arrays(model)


@pytest.mark.once
def test_the_fingerprint_knows_images_and_labels_but_not_the_container(tree, source, pictures, tmp_path):
    from keras_convnext.data.prepare import prepare

    prepare(tree, tmp_path / "prepared")
    fingerprint = results.fingerprint(source)
    assert results.fingerprint(open_source(tmp_path / "prepared")) == fingerprint
    assert results.fingerprint(with_labels(source, np.roll(source.labels, 1))) != fingerprint
    assert results.fingerprint(sources.take(source, np.arange(8))) != fingerprint


@pytest.mark.once
def test_the_fingerprint_of_imagenets_validation_images_is_known(source):
    pytest.importorskip("tensorflow_datasets")
    wnids = pathlib.Path(imagenet._published_validation_labels()).read_text().split()
    names = [f"ILSVRC2012_val_{number + 1:08d}.JPEG".encode() for number in range(50_000)]
    whole = classification.dataclasses.replace(
        source,
        labels=np.array([SYNSETS.index(wnid) for wnid in wnids], np.int32),
        name_text=np.frombuffer(b"".join(names), np.uint8),
        name_ends=np.cumsum([len(name) for name in names]),
    )
    assert results.fingerprint(whole) == results.IMAGENET_VALIDATION


@pytest.mark.once
def test_a_file_with_other_columns_is_left_as_it_is(result, model, tmp_path):
    path = tmp_path / "results.csv"
    path.write_text("model,top1,note\n")
    with pytest.raises(ValueError, match=r"missing time, architecture, .*; unknown note\. Pass another"):
        append_result(path, result)
    with pytest.raises(ValueError, match="unknown note"):
        evaluate(model, "never", results=path)  # before the data is looked for
    assert path.read_text() == "model,top1,note\n"
    path.write_text(",".join(COLUMNS) + "\n2026-11-22")
    with pytest.raises(ValueError, match=r"end in a complete line, received '2026-11-22'"):
        append_result(path, result)
    with pytest.raises(FileNotFoundError, match="folder of the results file"):
        evaluate(model, "never", results=tmp_path / "none" / "results.csv")


@pytest.mark.once
def test_a_results_file_of_another_kind_is_left_as_it_is(result, tmp_path):
    path = tmp_path / "results.csv"
    os.mkfifo(path)
    for use in (read_results, lambda path: append_result(path, result)):
        for place in (path, "/dev/full"):
            with pytest.raises(OSError, match=r"Expected a file, received the (named pipe|device)"):
                use(place)
    path.unlink()
    append_result(path, result)
    head = path.read_bytes()
    for content, message in (
        (head + b"\xff\n", "Expected text in UTF-8"),
        (head + b"x" * 140_000 + b"\n", "Error: field larger than field limit"),
        (b"x" * 140_000 + b"\n" + head, "Error: field larger than field limit"),
        (b"a," * 60_000 + b"\n", r"unknown a, a, .*\.\.\.\. Pass another file"),
        (b"\n", r"missing time, "),
    ):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=message) as error:
            read_results(path)
        assert "results.csv" in str(error.value) and len(str(error.value)) < 1800
        assert path.read_bytes() == content


@pytest.mark.once
def test_processes_that_write_at_once_write_whole_rows(result, tmp_path):
    (tmp_path / "result.pickle").write_bytes(pickle.dumps(result))
    code = (
        "import pickle; from keras_convnext.evaluation.results import append_result\n"
        "result = pickle.load(open('result.pickle', 'rb'))\n"
        "for _ in range(30): append_result('results.csv', result)"
    )
    environment = {**os.environ, "KERAS_BACKEND": "numpy"}  # the quickest to import
    command = [sys.executable, "-c", code]
    children = [subprocess.Popen(command, cwd=tmp_path, env=environment) for _ in range(2)]
    assert [child.wait(timeout=120) for child in children] == [0, 0]
    rows = read_results(tmp_path / "results.csv")
    assert len(rows) == 60 and all(tuple(row) == COLUMNS and row["n"] == "9" for row in rows)


@pytest.mark.once
def test_a_row_for_which_there_is_no_space_is_taken_back(result, tmp_path):
    path = tmp_path / "results.csv"
    append_result(path, result)
    before = path.read_bytes()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) + 50, limits[1]))
    try:
        with pytest.raises(OSError, match="cannot take another row"):
            append_result(path, result)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert path.read_bytes() == before
    append_result(path, result)
    assert len(read_results(path)) == 2


# The files for a person.


@pytest.mark.once
def test_reports_say_what_was_predicted(result, order, tmp_path):
    report.write_reports(tmp_path, result)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "classes.csv", "confusions.csv", "faults.csv", "predictions.csv", "worst_classes.png",
    ]  # fmt: skip
    rows = read_csv(tmp_path / "predictions.csv")
    assert [row["name"] for row in rows] == [result.source.name(number) for number in range(9)]
    for row in rows:
        number = int(pathlib.Path(row["name"]).stem)
        assert row["label"] == row["name"].split("/")[0]
        assert int(row["rank"]) == PLANNED_RANKS[number]
        assert [row[f"predicted_{place + 1}"] for place in range(5)] == [
            SYNSETS[index] for index in order[number, :5]
        ]
    pairs = read_csv(tmp_path / "confusions.csv")
    assert sum(int(row["count"]) for row in pairs) == 9
    right = sum(int(row["count"]) for row in pairs if row["label"] == row["predicted"])
    assert right == PLANNED_RANKS.count(0)
    for row in read_csv(tmp_path / "classes.csv"):
        ranks = np.array([int(other["rank"]) for other in rows if other["label"] == row["class"]])
        assert int(row["n"]) == len(ranks)
        assert float(row["top1"]) == pytest.approx(100 * np.mean(ranks == 0), abs=1e-3)
        assert float(row["top5"]) == pytest.approx(100 * np.mean(ranks < 5), abs=1e-3)
        assert bool(row["most_often_taken_for"]) == (ranks > 0).any()
        assert (
            row["name"]
            == timm.data.ImageNetInfo().label_name_to_description(row["class"], False).split(",")[0]
        )


@pytest.mark.once
def test_confusions_are_by_class_and_the_most_frequent_first(result):
    labels, predicted = np.array([1, 0, 1, 1, 1]), np.array([[0], [0], [2], [2], [1]])
    changed = classification.dataclasses.replace(result, labels=labels, predictions=predicted)
    assert report.confusions(changed) == [(0, 0, 1), (1, 2, 2), (1, 0, 1), (1, 1, 1)]


@pytest.mark.once
def test_the_picture_shows_the_wrong_images(result, tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        report.write_reports(tmp_path, result)
    picture = np.asarray(Image.open(tmp_path / "worst_classes.png").convert("RGB"))
    wrong = len({result.labels[place] for place in np.flatnonzero(result.ranks)})
    assert picture.shape[1] == 1100 and picture.shape[0] == round(100 * (1.5 * wrong + 0.4))
    coloured = np.ptp(picture, axis=2) > 20  # text is gray
    assert coloured.mean() > 0.03
    right = classification.dataclasses.replace(result, ranks=np.zeros(9, np.int32))
    report.write_reports(tmp_path, right)
    picture = np.asarray(Image.open(tmp_path / "worst_classes.png").convert("RGB"))
    assert (np.ptp(picture, axis=2) <= 20).all() and picture.min() < 100  # text only


@pytest.mark.once
def test_a_report_that_fails_leaves_the_old_one(result, monkeypatch, tmp_path):
    report.write_faults(tmp_path, {"a.jpg": "old"})
    before = (tmp_path / "faults.csv").read_bytes()
    monkeypatch.setattr(report.os, "replace", lambda *_: (_ for _ in ()).throw(OSError("full")))
    with pytest.raises(OSError, match="full"):
        report.write_faults(tmp_path, {"b.jpg": "new"})
    assert [path.name for path in tmp_path.iterdir()] == ["faults.csv"]
    assert (tmp_path / "faults.csv").read_bytes() == before


@pytest.mark.once
def test_missing_packages_are_named_before_the_work_begins(model, tree, monkeypatch, tmp_path):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(
        ImportError, match=r"needs matplotlib, which is not installed. Run pip install matplotlib"
    ):
        evaluate(model, tree, output=tmp_path)
    monkeypatch.setitem(sys.modules, "tensorflow", None)
    with pytest.raises(
        ImportError, match=r"needs tensorflow, which is not installed. Run pip install tensorf"
    ):
        evaluate(model, tree)


# Which model, prepared how.


@pytest.mark.once
def test_a_tag_decides_how_images_are_prepared():
    def of(tag, size=None):
        prepared = CHECKPOINTS[tag].preprocessing_at(size)
        crop, mode = prepared.crop_fraction, prepared.crop_mode
        return prepared.image_size, crop, mode, prepared.resize_size, prepared.interpolation

    assert of("convnext_tiny.fb_in1k") == (224, 0.875, "center", None, "bicubic")
    assert of("convnext_tiny.fb_in1k", 288) == (288, 1.0, "center", None, "bicubic")
    assert of("convnext_tiny.fb_in1k", 256) == (256, 0.875, "center", None, "bicubic")
    assert of("convnext_tiny.fb_in22k_ft_in1k_384") == (384, 1.0, "squash", None, "bicubic")
    size, _, *rest = of("convnext_tiny.torchvision_in1k")
    assert (size, rest) == (224, ["center", 236, "bilinear"])
    assert of("convnext_tiny.torchvision_in1k", 256)[3] is None


@pytest.mark.slow
@pytest.mark.skipif(keras.backend.backend() == "jax", reason="a child would write the file there")
def test_an_exported_file_scores_as_the_model_does(model, source, result, tmp_path):
    path = tmp_path / "model.onnx" if keras.backend.backend() == "torch" else tmp_path / "model"
    keras_convnext.export(model, path, preprocessing=Preprocessing(SIZE), licence="cc0-1.0")
    exported = evaluate(str(path), source, batch_size=4)
    assert exported.ranks.tolist() == result.ranks.tolist()
    assert exported.settings["licence"] == "cc0-1.0" and exported.settings["dtype_policy"] == "float32"
    assert exported.settings["architecture"] == model.name and len(exported.settings["weights_sha256"]) == 64
    other = Preprocessing(SIZE, crop_fraction=1.0, crop_mode="squash")
    squashed = evaluate(str(path), source, batch_size=4, preprocessing=other)
    assert squashed.ranks.tolist() != result.ranks.tolist()


def test_a_keras_file_and_a_weight_file_score_as_the_model_does(model, source, result, tmp_path):
    model.save(tmp_path / "model.keras")
    keras_convnext.save_weights(model, tmp_path / "weights.safetensors", layout="timm")
    whole = evaluate(str(tmp_path / "model.keras"), source, batch_size=4)
    assert whole.ranks.tolist() == result.ranks.tolist()
    assert whole.settings["model"] == whole.settings["weights"] == "model.keras"
    squashed = evaluate(
        tmp_path / "weights.safetensors",
        source,
        batch_size=4,
        preprocessing=Preprocessing(SIZE),
    )
    assert squashed.ranks.tolist() == result.ranks.tolist()
    assert squashed.settings["architecture"] == "test_convnext"
    assert squashed.settings["licence"] == ""  # nobody knows that of a file


def test_names_beside_a_model_say_which_output_a_class_folder_is(
    model, pictures, order, result, tmp_path, capsys
):
    model.save(tmp_path / "m.keras")
    names = [f"name {number}" for number in reversed(range(1000))]
    folders = [names[order[number, rank]] for number, rank in enumerate(PLANNED_RANKS)]
    tree = make_tree(tmp_path / "tree", pictures, folders)
    with pytest.raises(ValueError, match="Expected data with the 1000 classes"):
        evaluate(tmp_path / "m.keras", tree)
    labels = tmp_path / "m.labels.txt"
    labels.write_text("\n".join(names))
    assert sorted(evaluate(tmp_path / "m.keras", tree).ranks) == sorted(result.ranks)
    labels.write_text("\n".join([*names[:-1], "another"]).replace(folders[0], "none"))
    with pytest.raises(ValueError, match=f"are not: {folders[0]}"):
        evaluate(tmp_path / "m.keras", tree)
    labels.write_text("one\ntwo\n")
    with pytest.raises(
        ValueError, match=r"Expected 1000 names in '.*m.labels.txt', one an output, received 2"
    ):
        evaluate(tmp_path / "m.keras", tree)


@pytest.mark.once
def test_a_model_of_any_size_takes_that_of_the_tag(model, tmp_path):
    image = keras.Input((None, None, 3))
    outputs = keras.layers.Dense(1000)(keras.layers.GlobalAveragePooling2D()(image))
    free = keras.Model(image, outputs)
    tag = "convnext_tiny.fb_in22k_ft_in1k_384"
    free.save(tmp_path / "free.keras")

    def sizes(*arguments):
        return classification._open_model(*arguments).preprocessing.image_size

    assert sizes(free, None) == 224
    assert sizes(free, 96) == 96
    assert sizes(free, tag) == 384
    assert sizes(resolve(tag, tmp_path / "free.keras"), None) == 384
    assert sizes(model, tag) == SIZE
    assert classification._open_model(model, tag).preprocessing.crop_mode == "squash"


@pytest.mark.once
def test_an_exported_file_is_found_in_the_home_folder(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    with pytest.raises((ValueError, OSError), match=re.escape(str(tmp_path / "x.onnx"))):
        classification._open_model("~/x.onnx", None)


@pytest.mark.once
def test_numbered_classes_of_imagenet_get_its_names(model, pictures, tmp_path):
    """ImageNetV2's layout; empty class folders would be refused, so each has a picture."""
    for number in range(1000):
        (tmp_path / str(number)).mkdir()
        (tmp_path / str(number) / "0.jpg").hardlink_to(pictures[number % 9])
    result = evaluate(model, tmp_path, batch_size=4, limit=4)
    assert result.source.classes == SYNSETS
    names = [result.source.name(number) for number in range(4)]
    assert result.labels.tolist() == [int(name.split("/")[0]) for name in names]
    assert result.settings["outputs"] == "all 1000"


@pytest.mark.once
def test_what_cannot_be_evaluated_is_refused(model, tree, tmp_path):
    with pytest.raises(ValueError, match=r"'convnext_tiny\.dinov3_hf' has no classifier"):
        evaluate("convnext_tiny.dinov3_hf", tree)
    with pytest.raises(ValueError, match=r"640 features of CLIP, not classes. Use weights that have one"):
        evaluate("convnext_base.clip_laion2b", tree)
    with pytest.raises(ValueError, match="Did you mean 'convnext_tiny'"):
        evaluate("convnext_tinny", tree)
    with pytest.raises(ValueError, match=r"Unknown weights 'x\.y'"):
        evaluate("x.y", tree)
    with pytest.raises(ValueError, match=r"or an image size, received the file 'x\.safetensors'"):
        evaluate(model, tree, preprocessing="x.safetensors")
    with pytest.raises(ValueError, match="weights=None beside a Keras model"):
        predictor.open_predictor(model, "x.safetensors")
    with pytest.raises(ValueError, match=r"test_convnext takes images of 64 x 64.*image size 96"):
        evaluate(model, tree, preprocessing=96)
    with pytest.raises(ValueError, match="test_convnext takes images of 64 x 64"):
        evaluate(model, tree, preprocessing=Preprocessing(96))
    body = keras.Model(model.input, model.layers[3].output, name="body")
    with pytest.raises(ValueError, match=r"ends in \(N, classes\). Received body, with outputs \(None, 16"):
        evaluate(body, tree)
    for name, value in (("batch_size", 0), ("batch_size", 2.5), ("limit", -1), ("limit", True)):
        with pytest.raises(ValueError, match=f"{name} to be a positive integer or None, received {value}"):
            evaluate(model, tree, **{name: value})
    model.save_weights(tmp_path / "bare.weights.h5")
    with pytest.raises(ValueError, match="does not say which architecture"):
        evaluate(tmp_path / "bare.weights.h5", tree)


def test_outputs_that_are_no_numbers_are_an_error(model, source):
    head = model.get_layer("head")
    kernel, bias = head.get_weights()
    try:
        head.set_weights([kernel, np.full_like(bias, np.nan)])
        with pytest.raises(ValueError, match=r"NaN for 4 of the 4 images of batch 0, the first of them 'n"):
            evaluate(model, source, batch_size=4)
    finally:
        head.set_weights([kernel, bias])


@pytest.mark.once
def test_a_model_of_one_channel_sees_gray():
    class Gray:
        input_shape = (None, 4, 4, 1)

    image = np.random.default_rng(0).integers(0, 256, (2, 4, 4, 3), dtype=np.uint8)
    gray = predictor.for_channels(image, Gray)
    assert gray.shape == (2, 4, 4, 1)
    assert (gray[1, ..., 0] == np.asarray(Image.fromarray(image[1]).convert("L"))).all()
    Gray.input_shape = (None, 4, 4, 3)
    assert predictor.for_channels(image, Gray) is image


@pytest.mark.once
def test_progress_is_shown_to_a_terminal_only(model, source, monkeypatch, capsys):
    evaluate(model, source, batch_size=4)
    assert capsys.readouterr().err == ""
    monkeypatch.setattr("sys.stderr.isatty", lambda: True, raising=False)
    evaluate(model, source, batch_size=4)
    assert capsys.readouterr().err == ""  # KERAS_CONVNEXT_QUIET is set in tests
    monkeypatch.delenv("KERAS_CONVNEXT_QUIET")
    evaluate(model, source, batch_size=4, progress=False)
    assert capsys.readouterr().err == ""
    evaluate(model, source, batch_size=4)
    shown = capsys.readouterr().err
    assert "evaluation, 4/9 images" in shown and shown.startswith("data: 9 images of ")
