"""Frozen features: k-NN and linear probe against scikit-learn, PyTorch and slow loops, and what is kept."""

import dataclasses
import json
import math
import os
import pathlib

import keras
import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.numpy import save_file
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression
from sklearn.neighbors import KNeighborsClassifier

import keras_convnext
from keras_convnext.data import index, sources
from keras_convnext.data.index import SourceError
from keras_convnext.data.preprocess import preprocess_image, read_image
from keras_convnext.data.preprocessing import Preprocessing
from keras_convnext.data.sources import open_source
from keras_convnext.evaluation import features, forward
from keras_convnext.evaluation import linear_probe as linear_probe_module
from keras_convnext.evaluation.features import (
    Features,
    extract_features,
)
from keras_convnext.evaluation.linear_probe import (
    LinearProbe,
    fit_linear,
    linear_probe,
    linear_ranks,
)
from keras_convnext.evaluation.nearest_neighbours import (
    NearestNeighbours,
    count_votes,
    find_neighbours,
    nearest_neighbours,
    neighbour_ranks,
)
from keras_convnext.predictor import open_predictor, without_classifier
from keras_convnext.weights import assign

pytestmark = pytest.mark.one_backend

IMAGES = pathlib.Path(__file__).parents[1] / "images"
SIZE = 32
TEMPERATURE = 0.07


def random_features(count, seed, num_classes=6, width=12):
    """Overlapping clouds, one a class; (float32 (count, width), int32 (count,))."""
    generator = np.random.default_rng(seed)
    labels = generator.integers(0, num_classes, count).astype(np.int32)
    centres = np.random.default_rng(99).normal(size=(num_classes, width))
    noise = generator.normal(size=(count, width))
    # Lengths differ by far, so that it shows whether they are taken out.
    lengths = np.exp(generator.normal(size=(count, 1)))
    return (lengths * (centres[labels] + noise)).astype(np.float32), labels


@pytest.fixture(scope="module")
def clouds():
    """Training features and labels, and features and labels to classify."""
    return *random_features(150, 0), *random_features(40, 1)


# Nearest neighbours


def slow_votes(train, train_labels, query, number, temperature, num_classes=6):
    """The votes for one image, by loops over Python numbers."""

    def cosine(a, b):
        product = sum(float(x) * float(y) for x, y in zip(a, b, strict=True))
        return product / math.sqrt(sum(float(x) ** 2 for x in a)) / math.sqrt(sum(float(y) ** 2 for y in b))

    pairs = [(cosine(query, row), int(label)) for row, label in zip(train, train_labels, strict=True)]
    votes = [0.0] * num_classes
    for similarity, label in sorted(pairs, reverse=True)[:number]:
        votes[label] += math.exp(similarity / temperature)
    return votes


def slow_rank(votes, label):
    if not votes[label]:
        return len(votes)
    return sum(
        vote > votes[label] or (vote == votes[label] and number < label) for number, vote in enumerate(votes)
    )


@pytest.mark.every_backend
def test_ranks_equal_those_of_slow_loops(clouds):
    train, train_labels, queries, labels = clouds
    found = neighbour_ranks(train, train_labels, queries, labels, 6, (1, 5, 20), TEMPERATURE)
    for number in (1, 5, 20):
        votes = [slow_votes(train, train_labels, query, number, TEMPERATURE) for query in queries]
        expected = [slow_rank(vote, label) for vote, label in zip(votes, labels, strict=True)]
        assert found[number].tolist() == expected
    assert len({tuple(ranks.tolist()) for ranks in found.values()}) == 3  # the numbers matter


def votes_of_sklearn(clouds, number, temperature=TEMPERATURE, metric="cosine"):
    """Share of each class in the votes, (Q, classes)."""
    train, train_labels, queries, _ = clouds
    classifier = KNeighborsClassifier(
        number,
        metric=metric,
        algorithm="brute",
        weights="uniform" if temperature is None else lambda distances: np.exp((1 - distances) / temperature),
    )
    return classifier.fit(train.astype(np.float64), train_labels).predict_proba(queries.astype(np.float64))


def shares(clouds, number):
    train, train_labels, queries, _ = clouds
    similarities, rows = find_neighbours(train, queries, number)
    votes = count_votes(similarities, train_labels[rows], 6, TEMPERATURE)
    return votes / votes.sum(axis=1, keepdims=True)


@pytest.mark.parametrize("number", [1, 7, 50])
def test_votes_equal_those_of_scikit_learn(clouds, number):
    expected = votes_of_sklearn(clouds, number)
    found = shares(clouds, number)
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-7)  # features are normalised in float32
    np.testing.assert_array_equal(found.argmax(axis=1), expected.argmax(axis=1))


@pytest.mark.parametrize(
    "wrong", [{"temperature": 0.1}, {"temperature": None}, {"metric": "euclidean"}], ids=str
)
def test_control_other_weights_and_unnormalised_features_give_other_votes(clouds, wrong):
    assert np.abs(shares(clouds, 50) - votes_of_sklearn(clouds, 50, **wrong)).max() > 0.01


@pytest.mark.parametrize(("query_block", "train_block"), [(7, 13), (40, 1), (1, 150), (3, 149)])
def test_neighbours_do_not_depend_on_the_blocks(clouds, query_block, train_block):
    train, _, queries, _ = clouds
    train = np.concatenate([train, train[:30], train[::2]])  # equal similarities, in several blocks
    expected = find_neighbours(train, queries, 25)
    found = find_neighbours(train, queries, 25, query_block=query_block, train_block=train_block)
    np.testing.assert_array_equal(found[0], expected[0])
    np.testing.assert_array_equal(found[1], expected[1])
    assert (np.diff(expected[0], axis=1) == 0).any()  # there were equal ones among them


def test_of_equal_similarities_the_first_images_are_taken(clouds):
    train, _, queries, _ = clouds
    similarities, rows = find_neighbours(np.concatenate([train, train]), queries, 10)
    np.testing.assert_array_equal(rows[:, 1::2], rows[:, ::2] + len(train))
    np.testing.assert_array_equal(rows[:, ::2], find_neighbours(train, queries, 5)[1])
    np.testing.assert_array_equal(similarities[:, ::2], similarities[:, 1::2])


def test_a_label_without_votes_never_counts():
    train = np.eye(3, dtype=np.float32)
    found = neighbour_ranks(train, np.array([4, 4, 5]), train[:2], np.array([0, 4]), 6, (2,), TEMPERATURE)
    assert found[2].tolist() == [6, 0]  # class 0 has no vote; by its number alone it would be in the top 5


def test_equal_votes_go_to_the_smaller_class():
    train = np.array([[1, 0], [1, 0]], np.float32)
    ranks = neighbour_ranks(train, np.array([3, 1]), train, np.array([3, 1]), 4, (2,), TEMPERATURE)
    assert ranks[2].tolist() == [1, 0]


def test_votes_of_a_tiny_temperature_neither_overflow_nor_vanish(clouds):
    train, train_labels, queries, labels = clouds
    ranks = neighbour_ranks(train, train_labels, queries, labels, 6, (1, 20), 1e-6)
    nearest = train_labels[find_neighbours(train, queries, 1)[1][:, 0]]
    np.testing.assert_array_equal(ranks[20] == 0, nearest == labels)
    votes = count_votes(np.array([[1.0, -1.0]]), np.array([[0, 1]]), 3, 1e-6)
    assert votes[0, 1] > 0 == votes[0, 2]


def test_an_image_without_any_signal_is_similar_to_none():
    similarities, rows = find_neighbours(np.eye(3, dtype=np.float32), np.zeros((1, 3), np.float32), 2)
    assert (similarities.tolist(), rows.tolist()) == ([[0, 0]], [[0, 1]])


@pytest.mark.once
@pytest.mark.parametrize("count", [0, 4])
def test_more_neighbours_than_images_are_refused(count):
    with pytest.raises(ValueError, match=rf"1 to 3 neighbours, .* received {count}\. Pass smaller"):
        find_neighbours(np.eye(3), np.eye(3), count)


@pytest.mark.once
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_features_that_are_no_numbers_are_refused(value):
    bad = np.eye(3)
    bad[1, 0] = value
    with pytest.raises(ValueError, match="received NaN or infinity in row 1"):
        find_neighbours(np.eye(3), bad, 1)


# Linear probe

RATES = (0.02, 0.2)


def fit_with_torch(inputs, labels, *, momentum=0.9, weight_decay=0.0, cosine=True, epochs=4, size=32, seed=3):
    """PyTorch's own layer, loss, optimizer and schedule, from the same start and in the same order."""
    start = np.random.default_rng([seed, 0]).normal(0, 0.01, (inputs.shape[1], 6))
    found = []
    for rate in RATES:
        layer = torch.nn.Linear(inputs.shape[1], 6)
        with torch.no_grad():
            layer.weight.copy_(torch.from_numpy(start.T.astype(np.float32)))
            layer.bias.zero_()
        groups = [{"params": [layer.weight], "weight_decay": weight_decay}, {"params": [layer.bias]}]
        optimizer = torch.optim.SGD(groups, lr=rate, momentum=momentum)
        steps = epochs * (len(inputs) // size)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps if cosine else 10**9)
        for epoch in range(epochs):
            order = np.random.default_rng([seed, 1, epoch]).permutation(len(inputs))
            for rows in order[: len(order) // size * size].reshape(-1, size):
                logits = layer(torch.from_numpy(inputs[rows]))
                loss = torch.nn.functional.cross_entropy(logits, torch.from_numpy(labels[rows]).long())
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                schedule.step()
        found.append((layer.weight.detach().numpy().T, layer.bias.detach().numpy()))
    return [np.stack(values) for values in zip(*found, strict=True)]


@pytest.fixture(scope="module")
def fitted(clouds):
    return fit_linear(*clouds[:2], 6, learning_rates=RATES, epochs=4, batch_size=32, seed=3)


def test_training_equals_pytorchs(clouds, fitted):
    kernels, biases = fit_with_torch(*clouds[:2])
    np.testing.assert_allclose(fitted[0], kernels, atol=2e-5)
    np.testing.assert_allclose(fitted[1], biases, atol=2e-5)


@pytest.mark.parametrize("wrong", [{"momentum": 0.8}, {"cosine": False}, {"seed": 4}], ids=str)
def test_control_other_training_ends_elsewhere(clouds, fitted, wrong):
    kernels, _ = fit_with_torch(*clouds[:2], **wrong)
    assert all(np.abs(fitted[0] - kernels).max(axis=(1, 2)) > 1e-3)


def test_weight_decay_is_pytorchs_and_leaves_the_bias(clouds, fitted):
    found = fit_linear(
        *clouds[:2], 6, learning_rates=RATES, epochs=4, batch_size=32, seed=3, weight_decay=0.1
    )
    kernels, biases = fit_with_torch(*clouds[:2], weight_decay=0.1)
    np.testing.assert_allclose(found[0], kernels, atol=2e-5)
    np.testing.assert_allclose(found[1], biases, atol=2e-5)
    assert np.abs(found[0] - fitted[0]).max() > 1e-3


def test_a_rate_does_not_depend_on_the_others(clouds, fitted):
    alone = fit_linear(*clouds[:2], 6, learning_rates=RATES[1:], epochs=4, batch_size=32, seed=3)
    np.testing.assert_allclose(alone[0][0], fitted[0][1], atol=1e-5)
    with_nan = fit_linear(*clouds[:2], 6, learning_rates=(3e38, RATES[1]), epochs=4, batch_size=32, seed=3)
    assert not np.isfinite(with_nan[0][0]).all()
    np.testing.assert_allclose(with_nan[0][1], fitted[0][1], atol=1e-5)


def test_few_features_are_one_batch(clouds):
    inputs, labels = clouds[0][:10], clouds[1][:10]
    large, exact = (
        fit_linear(inputs, labels, 6, learning_rates=[0.1], epochs=3, batch_size=size)[0]
        for size in (256, 10)
    )
    np.testing.assert_array_equal(large, exact)


def test_the_probe_is_as_good_as_logistic_regression_on_digits():
    images, labels = load_digits(return_X_y=True)
    order = np.random.default_rng(0).permutation(len(labels))
    images, labels = (images[order] / 16).astype(np.float32), labels[order]
    train, test = slice(0, 1200), slice(1200, None)
    reference = LogisticRegression(max_iter=1000, C=10).fit(images[train], labels[train])
    expected = 100 * reference.score(images[test], labels[test])
    kernels, biases = fit_linear(
        images[train], labels[train], 10, learning_rates=(1e-4, 1.0), epochs=15, batch_size=128
    )
    slow, fast = (
        100 * np.mean(linear_ranks(kernel, bias, images[test], labels[test]) < 1)
        for kernel, bias in zip(kernels, biases, strict=True)
    )
    assert abs(fast - expected) <= 1
    assert slow < expected - 1  # a rate that is too small does not get there


@pytest.mark.once
def test_logits_that_are_no_numbers_are_never_right():
    kernel, bias = np.eye(2, dtype=np.float32), np.zeros(2, np.float32)
    assert linear_ranks(kernel, bias, np.eye(2, dtype=np.float32), np.array([0, 0])).tolist() == [0, 1]
    kernel[0, 0] = np.nan
    assert linear_ranks(kernel, bias, np.eye(2, dtype=np.float32), np.array([0, 0])).tolist() == [2, 2]


# Both, on features that are given


def source_of(counts):
    """A source without files."""
    labels = [(label, number) for label, count in enumerate(counts) for number in range(count)]
    images = [(0, 0, 1, label, f"{label}/{number}.jpg") for label, number in labels]
    classes = [str(label) for label in range(len(counts))]
    return dataclasses.replace(index.scanned("data", "tar", [], images), classes=classes)


class Given:
    """Stands for a model with outputs (N, 12)."""

    output_shape = (None, 12)
    input_shape = (None, SIZE, SIZE, 3)
    name = "given"
    dtype_policy = keras.dtype_policies.get("float32")
    weights = ()


@pytest.fixture
def given(monkeypatch):
    """Two sources whose features are clouds; function to give others to the images that are classified."""
    train, test = source_of([20] * 6), source_of([5] * 6)
    centres = np.random.default_rng(99).normal(size=(6, 12))

    def cloud(source, seed):
        noise = np.random.default_rng(seed).normal(size=(len(source), 12))
        values = (centres[source.labels] + 0.5 * noise).astype(np.float32)
        return Features(values, source.labels, np.arange(len(source)), {})

    of_source = {id(train): cloud(train, 0), id(test): cloud(test, 1)}
    monkeypatch.setattr(features, "extract_features", lambda model, source, *_, **__: of_source[id(source)])

    def replace_test(values):
        of_source[id(test)] = dataclasses.replace(of_source[id(test)], features=values)

    return (train, test), of_source[id(test)].features, replace_test


PROBE = LinearProbe(learning_rates=(1e-6, 0.1), epochs=20, selection_fraction=0.2)


def test_the_rate_is_chosen_on_a_part_of_the_training_images(given):
    data, values, replace_test = given
    result = linear_probe(PROBE, model=Given(), data=data)
    assert result.chosen == 0.1
    assert result.scores[1].selection_top1 > result.scores[0].selection_top1 + 20
    assert result.top1 > 80
    # Images on which the better rate is the worse one do not change the choice.
    replace_test(-values)
    other = linear_probe(PROBE, model=Given(), data=data)
    assert other.scores[0].top1 >= other.scores[1].top1
    assert other.chosen == 0.1
    assert other.top1 < 20


def test_of_equally_good_rates_the_smaller_is_chosen(given):
    result = linear_probe(PROBE.replaced({"learning_rates": (0.10001, 0.1)}), model=Given(), data=given[0])
    assert result.scores[0].selection_top1 == result.scores[1].selection_top1
    assert result.chosen == 0.1


def test_the_final_classifier_is_trained_on_all_training_images(given):
    data, values, _ = given
    train = features.extract_features(None, data[0])
    result = linear_probe(PROBE, model=Given(), data=data)
    kernels, biases = fit_linear(train.features, train.labels, 6, learning_rates=[0.1], epochs=20)
    np.testing.assert_array_equal(result.kernel, kernels[0])
    np.testing.assert_array_equal(result.bias, biases[0])
    assert result.top1 == 100 * np.mean(linear_ranks(kernels[0], biases[0], values, data[1].labels) < 1)
    is_held_out = sources.held_out_mask(data[0], 0.2, 0)
    part, _ = fit_linear(
        train.features[~is_held_out], train.labels[~is_held_out], 6, learning_rates=[0.1], epochs=20
    )
    assert np.abs(part[0] - result.kernel).max() > 1e-3


def test_rates_that_all_lead_to_nan_are_refused(given):
    settings = LinearProbe(learning_rates=(2e38, 3e38), epochs=5)
    with pytest.raises(ValueError, match=r"all of 2e\+38, 3e\+38 lead to NaN or infinity\. Pass smaller"):
        linear_probe(settings, model=Given(), data=given[0])


@pytest.mark.parametrize(
    ("rates", "advice"),
    [
        ((1e-6, 0.1), "0.1, is at the edge of those tried: try larger"),
        ((0.1, 1e30), "0.1, is at the edge of those tried: try smaller"),
        ((1e-6, 0.1, 1e30), ""),
    ],
)
def test_a_best_rate_at_the_edge_is_told(given, rates, advice):
    result = linear_probe(PROBE.replaced({"learning_rates": rates}), model=Given(), data=given[0])
    assert advice in result.advice and bool(advice) == bool(result.advice)


def test_accuracies_of_several_numbers_of_neighbours_are_reported(given):
    data, values, _ = given
    train = features.extract_features(None, data[0])
    result = nearest_neighbours(NearestNeighbours(neighbours=(3, 20, 100)), model=Given(), data=data)
    ranks = neighbour_ranks(train.features, train.labels, values, data[1].labels, 6, (3, 20, 100), 0.07)
    for score, number in zip(result.scores, (3, 20, 100), strict=True):
        assert score.setting == number
        assert score.top1 == 100 * np.mean(ranks[number] < 1)
        assert score.top5 == 100 * np.mean(ranks[number] < 5)
    assert (result.chosen, result.top1, result.top5) == (20, result.scores[1].top1, result.scores[1].top5)
    assert (result.num_train, result.n, result.advice) == (120, 30, "")
    report = json.loads(json.dumps(result.report()))
    assert report["scores"][0] == {
        "neighbours": 3,
        "top1": result.scores[0].top1,
        "top5": result.scores[0].top5,
    }
    assert report["settings"]["neighbours"] == [3, 20, 100]
    assert (report["neighbours"], report["n"], report["model"]) == (20, 30, "given")


def test_images_left_out_are_counted_and_their_neighbours_keep_their_part(given, monkeypatch):
    data, _, _ = given
    whole = features.extract_features(None, data[0])
    kept = np.delete(np.arange(120), [0, 7])
    damaged = Features(whole.features[kept], whole.labels[kept], kept, {"0/0.jpg": "cut", "0/7.jpg": "cut"})
    test = features.extract_features(None, data[1])
    parts = {id(data[0]): damaged, id(data[1]): test}
    monkeypatch.setattr(features, "extract_features", lambda model, source, *_, **__: parts[id(source)])
    fits = []
    fit = linear_probe_module.fit_linear
    monkeypatch.setattr(
        linear_probe_module,
        "fit_linear",
        lambda *args, **settings: fits.append(args) or fit(*args, **settings),
    )
    result = linear_probe(PROBE, model=Given(), data=data)
    is_held_out = sources.held_out_mask(data[0], 0.2, 0)[kept]
    np.testing.assert_array_equal(fits[0][0], damaged.features[~is_held_out])
    np.testing.assert_array_equal(fits[0][1], damaged.labels[~is_held_out])
    assert (result.num_train, result.n) == (118, 30)
    report = result.report()
    assert (report["skipped"], list(report["faults"])) == (2, ["0/0.jpg", "0/7.jpg"])
    assert report["scores"][1]["selection_top1"] == result.scores[1].selection_top1


def test_sources_of_different_classes_are_refused(given):
    data = (given[0][0], source_of([5] * 5))
    with pytest.raises(ValueError, match="same classes in both sources, received 6 and 5"):
        nearest_neighbours(NearestNeighbours(), model=Given(), data=data)


# From images


@pytest.fixture(scope="module")
def model():
    """A small random model with a classifier."""
    keras.utils.set_random_seed(0)
    model = keras_convnext.load(
        "test_convnext2", weights=None, input_shape=(SIZE, SIZE, 3), classes=3, layer_scale_init_value=1.0
    )
    kernel = model.get_layer("head").weights[0]
    kernel.assign(10 * keras.ops.convert_to_numpy(kernel))  # so that the classes depend on the image
    return model


@pytest.fixture(scope="module")
def backbone(model):
    return without_classifier(model)


def write_crops(folder, count):
    """Class folders of crops, one class for each photograph of the repository."""
    generator = np.random.default_rng(0)
    for photograph in sorted([*IMAGES.glob("*.jpg"), *IMAGES.glob("*.png")]):
        picture = Image.open(photograph).convert("RGB")
        (folder / photograph.stem).mkdir(parents=True)
        for number in range(count):
            left, top = (int(generator.integers(0, side - 120)) for side in picture.size)
            crop = picture.crop((left, top, left + 120, top + 120))
            crop.resize((48, 48)).save(folder / photograph.stem / f"{number}.png")
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_crops(tmp_path_factory.mktemp("crops"), 12)


NEIGHBOURS = NearestNeighbours(image_size=SIZE, neighbours=(1, 5), validation_fraction=0.25, batch_size=8)


@pytest.mark.every_backend
def test_features_are_those_in_front_of_the_classifier(model, backbone, folder):
    source = open_source(folder)
    found = extract_features(backbone, source, Preprocessing(SIZE), batch_size=8)
    assert found.features.shape == (36, 128) and found.features.dtype == np.float32
    assert found.labels.tolist() == source.labels.tolist()
    assert (found.numbers.tolist(), found.faults) == (list(range(36)), {})
    images = [preprocess_image(read_image(path), Preprocessing(SIZE)) for path in source.files]
    expected = model.predict_on_batch(np.stack(images))
    kernel, bias = (keras.ops.convert_to_numpy(weight) for weight in model.get_layer("head").weights)
    exponentials = np.exp(found.features @ kernel + bias)
    np.testing.assert_allclose(
        exponentials / exponentials.sum(axis=1, keepdims=True), expected, rtol=1e-3, atol=1e-5
    )
    assert np.ptp(expected, axis=0).min() > 0.2  # or the images would not matter


def test_class_folders_are_divided_and_classified_better_than_by_chance(
    backbone, folder, tmp_path, count_runs
):
    result = nearest_neighbours(
        NEIGHBOURS.replaced({"data": str(folder)}), model=backbone, cache=tmp_path / "new" / "cache"
    )
    assert (result.n, result.num_train) == (9, 27)
    assert result.top1 > 60  # of three classes
    assert result.environment["split"] == "0.25 of all, seed 0"
    settings = LinearProbe(
        data=str(folder), image_size=SIZE, validation_fraction=0.25, epochs=20, batch_size=8
    )
    probe = linear_probe(settings, model=backbone, cache=tmp_path / "new" / "cache")
    assert (probe.n, probe.num_train, probe.kernel.shape) == (9, 27, (128, 3))
    assert probe.top1 > 60
    assert len(count_runs) == 2  # the probe takes what k-NN kept


@pytest.mark.once
def test_another_seed_classifies_other_images(folder):
    parts = [features._open_parts(NEIGHBOURS.replaced({"data": str(folder), "seed": s})) for s in (0, 1)]
    names = [{test.name(number) for number in range(len(test))} for _, test, _ in parts]
    assert names[0] != names[1] and len(names[0]) == len(names[1]) == 9


@pytest.mark.once
@pytest.mark.parametrize("name", ["val", "test"])
def test_a_split_of_the_data_is_classified(folder, tmp_path, name):
    (tmp_path / "train").symlink_to(folder)
    (tmp_path / name / "rocket").mkdir(parents=True)
    (tmp_path / name / "rocket" / "0.png").write_bytes((folder / "rocket" / "0.png").read_bytes())
    train, test, split = features._open_parts(NearestNeighbours(data=str(tmp_path)))
    assert (len(train), len(test), split) == (36, 1, "validation")
    assert train.classes == test.classes and test.labels.tolist() == [2]
    train, test, split = features._open_parts(
        NearestNeighbours(data=str(tmp_path), train_split="train", val_split="train")
    )
    assert (len(test), split) == (36, "train")


@pytest.fixture
def count_runs(monkeypatch):
    """How often a model was run over a source."""
    runs = []
    run = forward.with_outputs
    monkeypatch.setattr(forward, "with_outputs", lambda *args: runs.append(args) or run(*args))
    return runs


@pytest.fixture
def few(folder):
    return sources.take(open_source(folder), range(0, 36, 5))


PREPROCESSING = Preprocessing(SIZE)


def open_backbone(*arguments, **settings):
    return open_predictor(*arguments, **settings, task="features")


def test_kept_features_are_not_computed_again(backbone, few, tmp_path, count_runs):
    cache = tmp_path / "cache"
    first = extract_features(backbone, few, PREPROCESSING, batch_size=8, cache=cache)
    again = extract_features(backbone, few, PREPROCESSING, batch_size=8, cache=cache)
    assert len(count_runs) == 1
    np.testing.assert_array_equal(first.features, again.features)
    np.testing.assert_array_equal(first.labels, again.labels)
    np.testing.assert_array_equal(first.numbers, again.numbers)
    # One that is the default is the same one.
    extract_features(backbone, few, Preprocessing(SIZE, 0.875), batch_size=8, cache=cache)
    assert len(count_runs) == 1 == len(os.listdir(cache))
    # Another one is not, and without a folder nothing is kept.
    extract_features(backbone, few, Preprocessing(SIZE, 0.9), batch_size=8, cache=cache)
    assert len(count_runs) == 2 == len(os.listdir(cache))
    extract_features(backbone, few, PREPROCESSING, batch_size=8)
    assert len(count_runs) == 3


def test_kept_features_of_anything_else_are_not_taken(backbone, few, monkeypatch):
    keys = [features._cache_key(backbone, few, PREPROCESSING)]
    assert keys[0] == features._cache_key(backbone, few, PREPROCESSING)
    for name, value in {"crop_fraction": 0.9, "image_size": 64, "interpolation": "bilinear"}.items():
        keys.append(features._cache_key(backbone, few, dataclasses.replace(PREPROCESSING, **{name: value})))
    backwards = sources.take(few, range(len(few))[::-1])
    keys.append(features._cache_key(backbone, backwards, PREPROCESSING))
    other_classes = dataclasses.replace(few, classes=["a", "b", "c"])
    keys.append(features._cache_key(backbone, other_classes, PREPROCESSING))
    other_activation = keras.Sequential([backbone, keras.layers.Activation("relu")])
    keys.append(features._cache_key(other_activation, few, PREPROCESSING))
    weight = backbone.get_layer("convnext_norm").weights[1]
    before = keras.ops.convert_to_numpy(weight).copy()
    weight.assign(before + 1)
    keys.append(features._cache_key(backbone, few, PREPROCESSING))
    weight.assign(before)
    with monkeypatch.context() as patch:
        patch.setattr(keras.backend, "backend", lambda: "another")
        keys.append(features._cache_key(backbone, few, PREPROCESSING))
    path = few.files[few.file_numbers[0]]
    state = os.stat(path)
    os.utime(path, ns=(state.st_atime_ns, state.st_mtime_ns + 1000))
    keys.append(features._cache_key(backbone, few, PREPROCESSING))
    assert len(set(keys)) == len(keys) == 10


def test_a_damaged_file_of_features_is_made_again(backbone, few, tmp_path, count_runs):
    first = extract_features(backbone, few, PREPROCESSING, batch_size=8, cache=tmp_path)
    (path,) = tmp_path.iterdir()
    content = path.read_bytes()
    for runs, damaged in enumerate((content[:-200], b"", b"features"), 2):
        path.write_bytes(damaged)
        again = extract_features(backbone, few, PREPROCESSING, batch_size=8, cache=tmp_path)
        assert len(count_runs) == runs
        np.testing.assert_array_equal(first.features, again.features)
        assert path.read_bytes() == content  # in its place again, without a temporary file beside it
        assert len(list(tmp_path.iterdir())) == 1


def test_features_for_which_there_is_no_space_are_still_returned(
    backbone, few, tmp_path, monkeypatch, capsys
):
    def full(file, **_):
        file.write(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(np, "savez", full)
    found = extract_features(backbone, few, PREPROCESSING, batch_size=8, cache=tmp_path)
    assert len(found.labels) == len(few)
    assert "not kept" in (message := capsys.readouterr().err) and "No space left" in message
    assert os.listdir(tmp_path) == []


def test_a_damaged_image_is_left_out_and_named(backbone, tmp_path):
    write_crops(tmp_path / "data", 2)
    (tmp_path / "data" / "coffee" / "1.png").write_bytes(b"no image")
    source = open_source(tmp_path / "data")
    options = {"batch_size": 8, "cache": tmp_path / "cache"}
    for _ in range(2):  # computed, then kept
        found = extract_features(backbone, source, PREPROCESSING, **options, max_faults=0.5)
        assert found.numbers.tolist() == [0, 1, 2, 4, 5]
        assert found.labels.tolist() == source.labels[found.numbers].tolist()
        assert list(found.faults) == ["coffee/1.png"]
    with pytest.raises(ValueError, match="1 could not be decoded so far"):
        extract_features(backbone, source, PREPROCESSING, **options)


# Models


@pytest.mark.once
def test_weights_without_a_final_norm_give_the_normalised_mean_map(model, tmp_path):
    state = {name: np.asarray(value) for name, value in assign.state_dict(model).items()}
    headless = {name: value for name, value in state.items() if not name.startswith(("norm.", "head."))}
    save_file(headless, tmp_path / "body.safetensors")
    opened = open_backbone("test_convnext2", tmp_path / "body.safetensors", image_size=SIZE)
    images = np.random.default_rng(0).integers(0, 256, (3, SIZE, SIZE, 3)).astype(np.uint8)
    last_map = keras.Model(opened.model.input, opened.model.pyramid_outputs["P5"])(images)
    means = keras.ops.convert_to_numpy(last_map).mean(axis=(1, 2))
    centred = means - means.mean(axis=1, keepdims=True)
    expected = centred / np.sqrt((centred**2).mean(axis=1, keepdims=True) + 1e-5)
    found = keras.ops.convert_to_numpy(opened.model(images))
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)
    assert np.abs(found - means).max() > 0.1  # the mean map itself is something else
    assert opened.file == tmp_path / "body.safetensors" and opened.row is None
    # The file itself says which architecture it is.
    assert open_backbone(tmp_path / "body.safetensors", image_size=SIZE).model.name == "test_convnext2"


@pytest.mark.once
def test_files_of_a_classifier_give_its_features(model, backbone, tmp_path):
    images = np.random.default_rng(0).integers(0, 256, (2, SIZE, SIZE, 3)).astype(np.uint8)
    expected = keras.ops.convert_to_numpy(backbone(images))
    model.save(tmp_path / "model.keras")
    model.save_weights(tmp_path / "model.weights.h5")
    whole = open_backbone(tmp_path / "model.keras")
    assert whole.preprocessing == Preprocessing(SIZE)
    bare = open_backbone("test_convnext2", tmp_path / "model.weights.h5", image_size=SIZE)
    for opened in (whole, bare):
        found = keras.ops.convert_to_numpy(opened.model(images))
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)
    with pytest.raises(ValueError, match=r"does not say which architecture it holds\. Pass that as model"):
        open_backbone(tmp_path / "model.weights.h5")


@pytest.mark.once
def test_models_of_others_are_taken_as_they_are():
    other = keras.Sequential(
        [keras.Input((8, 8, 3)), keras.layers.Flatten(), keras.layers.Dense(2, name="head")]
    )
    assert without_classifier(other) is other


@pytest.mark.once
@pytest.mark.parametrize("nested", [False, True])
def test_features_of_a_model_around_a_body_are_those_in_front_of_its_probabilities(nested, backbone):
    image = keras.Input((SIZE, SIZE, 3)) if nested else backbone.input
    features = keras.layers.Dropout(0.5)(backbone(image) if nested else backbone.output)
    model = keras.Model(image, keras.layers.Dense(3, activation="softmax")(features))
    images = np.random.default_rng(0).integers(0, 256, (2, SIZE, SIZE, 3)).astype(np.uint8)
    found = open_backbone(model).model.predict_on_batch(images)
    np.testing.assert_allclose(found, keras.ops.convert_to_numpy(backbone(images)), rtol=1e-4, atol=1e-4)


@pytest.mark.once
@pytest.mark.parametrize("task", ["features", "classification"])
def test_a_model_of_several_inputs_is_refused(task, backbone):
    inputs = [keras.Input((SIZE, SIZE, 3)), keras.Input((4,))]
    x = keras.layers.Concatenate()([backbone(inputs[0]), inputs[1]])
    model = keras.Model(inputs, keras.layers.Dense(3, activation="softmax")(x), name="two")
    with pytest.raises(ValueError, match=r"of one input \(N, H, W, C\). Received two, with inputs \["):
        open_predictor(model, task=task)


@pytest.mark.once
def test_a_model_that_ends_in_maps_is_refused(folder):
    maps = keras_convnext.load("test_convnext2", weights=None, include_top=False)
    with pytest.raises(ValueError, match=r"ends in features \(N, C\), received outputs .*pooling='avg'"):
        nearest_neighbours(NEIGHBOURS.replaced({"data": str(folder)}), model=maps)


@pytest.mark.once
def test_what_is_missing_or_said_twice_is_refused(folder):
    with pytest.raises(ValueError, match="Expected data, received data=''"):
        nearest_neighbours(NearestNeighbours(model="convnext_tiny"))
    with pytest.raises(ValueError, match="Expected a model, received model=''"):
        nearest_neighbours(NearestNeighbours(data=str(folder)))
    with pytest.raises(ValueError, match="beside a Keras model, received model='convnext_tiny'"):
        nearest_neighbours(NearestNeighbours(model="convnext_tiny", data=str(folder)), model=Given())
    with pytest.raises(ValueError, match="Did you mean 'convnext_tiny'"):
        nearest_neighbours(NearestNeighbours(model="convnext_tinny", data=str(folder)))
    with pytest.raises(SourceError, match="nothing is there"):
        linear_probe(LinearProbe(model="convnext_tiny", data=str(folder / "nowhere")))


@pytest.mark.once
@pytest.mark.parametrize(
    ("settings", "values", "message"),
    [
        (
            NearestNeighbours,
            {"neighbours": ()},
            r"neighbours: expected a list, each an integer of at least 1, received \[\]",
        ),
        (NearestNeighbours, {"neighbours": (20, 0)}, r"integer of at least 1, received \[20, 0\]"),
        (NearestNeighbours, {"temperature": 0.0}, "temperature: expected a number above 0, received 0.0"),
        (NearestNeighbours, {"validation_fraction": 1.0}, r"expected a number in \(0, 1\), received 1.0"),
        (NearestNeighbours, {"crop": 1.1}, r"crop: expected a number in \[0, 1\], received 1.1"),
        (
            NearestNeighbours,
            {"batch_size": True},
            "batch_size: expected an integer of at least 1, received true",
        ),
        (NearestNeighbours, {"image_size": -1}, "image_size: expected an integer of at least 0, received -1"),
        (
            NearestNeighbours,
            {"resize_mode": "squish"},
            'expected one of shorter_side, squash, "" .*squash.*"squish"',
        ),
        (NearestNeighbours, {"interpolation": "cubic"}, r"did you mean 'bicubic'\?\), received \"cubic\""),
        (
            LinearProbe,
            {"learning_rates": ()},
            r"a list, each a number above 0, received \[\]",
        ),
        (LinearProbe, {"learning_rates": (0.1, -1.0)}, r"a number above 0, received \[0.1, -1.0\]"),
        (LinearProbe, {"selection_fraction": 0}, r"selection_fraction: .* number in \(0, 1\), received 0"),
        (LinearProbe, {"epochs": 0, "seed": -1}, "2 problems:\n(.|\n)*epochs: .* at least 1, received 0"),
        (
            LinearProbe,
            {"probe_batch_size": 2.5},
            "probe_batch_size: expected an integer of at least 1, received 2.5",
        ),
        (LinearProbe, {"momentum": 1.0}, r"momentum: expected a number in \[0, 1\), received 1.0"),
        (
            LinearProbe,
            {"weight_decay": float("nan")},
            "weight_decay: expected a number of at least 0, received nan",
        ),
    ],
)
def test_settings_out_of_range_are_refused(settings, values, message):
    with pytest.raises(ValueError, match=message):
        settings(**values)


@pytest.mark.once
def test_a_crop_takes_the_place_of_a_published_resize_size():
    published = Preprocessing(224, 0.95, resize_size=236)
    changed = features._changed_preprocessing(published, NearestNeighbours(crop=0.5))
    assert changed == Preprocessing(224, 0.5)
    assert features._changed_preprocessing(published, NearestNeighbours()) == published
