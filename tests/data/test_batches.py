"""Batches for evaluation and training: which examples, which pixels, and what happens to damaged files."""

import io
import os
import pathlib
import random

import keras
import numpy as np
import psutil
import pytest
import tensorflow as tf
from PIL import Image

from keras_convnext import _terminal
from keras_convnext.data import eval_image, preprocess, sources
from keras_convnext.data import jpeg as jpeg_graph
from keras_convnext.data.batches import eval_batches, steps_per_epoch, train_batches
from keras_convnext.data.faults import DataError, Faults
from keras_convnext.data.preprocessing import Preprocessing
from keras_convnext.data.stream import Part
from keras_convnext.data.train_transform import Augmentation

pytestmark = pytest.mark.once

IMAGES = pathlib.Path(__file__).parents[1] / "images"
PLAIN = Augmentation(policy="none", erase=0, mixup=0, cutmix=0, label_smoothing=0)
NO_MIX = {"mixup": 0, "cutmix": 0}


def jpeg(seed: int, height: int = 40, width: int = 50) -> bytes:
    """A picture of its own for each seed: smooth, so that crops of it stay alike."""
    generator = np.random.default_rng(seed)
    image = Image.fromarray(generator.integers(0, 256, (4, 5, 3), np.uint8)).resize((width, height))
    file = io.BytesIO()
    image.save(file, "JPEG", quality=95)
    return file.getvalue()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """37 images in three classes; number 30 is cut in half and number 31 is no image."""
    root = tmp_path_factory.mktemp("data")
    for number in range(37):
        path = root / "abc"[number // 13] / f"{number:02}.jpg"
        path.parent.mkdir(exist_ok=True)
        content = jpeg(number)
        path.write_bytes({30: content[: len(content) // 2], 31: b"hello"}.get(number, content))
    return root


@pytest.fixture(scope="module")
def source(folder):
    return sources.open_source(folder)


@pytest.fixture(scope="module")
def sound(tmp_path_factory, folder):
    """The 26 images of the first two classes, all of them sound."""
    root = tmp_path_factory.mktemp("sound")
    for name in "ab":
        (root / name).symlink_to(folder / name)
    return sources.open_source(root)


def evaluated(source, **options):
    """Returns (number, label, mask, image) of all rows."""
    preprocessing = Preprocessing(options.pop("image_size", 32))
    options = {"batch_size": 8, "faults": Faults(source, 1.0), **options}
    rows = []
    for batch in eval_batches(source, preprocessing, **options):
        batch = {name: values.numpy() for name, values in batch.items()}
        rows += zip(batch["numbers"], batch["labels"], batch["mask"], batch["images"], strict=True)
    return rows


def trained(source, count, **options):
    """Returns the images and targets of the first `count` batches."""
    options = {"image_size": 32, "batch_size": 8, "workers": 2} | options
    made = list(train_batches(source, **options).take(count))
    return [np.stack(values) for values in zip(*made, strict=True)]


def test_evaluation_gives_every_example_once_with_the_pixels_of_eval_image(source):
    rows = evaluated(source)
    assert len(rows) == 40  # five batches of 8
    assert [number for number, *_ in rows] == [*range(37), -1, -1, -1]
    assert [label for _, label, *_ in rows[:37]] == [*[0] * 13, *[1] * 13, *[2] * 11]
    assert [number for number, _, mask, _ in rows if not mask] == [30, 31, -1, -1, -1]
    for number, _, mask, image in rows:
        expected = eval_image(source.read(number), 32) if mask else np.zeros((32, 32, 3))
        np.testing.assert_array_equal(image, expected)


@pytest.mark.parametrize("workers", [1, 5])
def test_evaluation_does_not_depend_on_the_number_of_workers(source, workers):
    for one, other in zip(
        evaluated(source, batch_size=6), evaluated(source, batch_size=6, workers=workers), strict=True
    ):
        assert one[:3] == other[:3]
        np.testing.assert_array_equal(one[3], other[3])


SLOW = pytest.mark.slow


@pytest.mark.parametrize(
    ("num_hosts", "batch_size"), [(3, 1), *(pytest.param(8, size, marks=SLOW) for size in (1, 3, 8, 64))]
)
def test_hosts_together_evaluate_every_example_once(source, num_hosts, batch_size):
    hosts = [
        evaluated(source, host=host, num_hosts=num_hosts, batch_size=batch_size) for host in range(num_hosts)
    ]
    assert (
        len({len(rows) for rows in hosts}) == 1
    )  # the same number of batches, or hosts would wait for each other
    numbers = [number for rows in hosts for number, *_ in rows if number >= 0]
    assert numbers == list(range(37))
    images = [image for rows in hosts for number, _, _, image in rows if number >= 0]
    np.testing.assert_array_equal(images, [image for _, _, _, image in evaluated(source)[:37]])


def test_damaged_images_are_counted_and_named(source):
    faults = Faults(source, 1.0)
    evaluated(source, faults=faults)
    evaluated(source, faults=faults)  # again: not counted twice
    assert list(faults.report()) == ["c/30.jpg", "c/31.jpg"]
    assert "truncated" in faults.report()["c/30.jpg"] and "'hello'" in faults.report()["c/31.jpg"]


def test_more_damaged_images_than_allowed_are_an_error(source):
    with pytest.raises(DataError, match=r"^Expected at most 0\.03 of the 37 .* 2 could not .* c/30\.jpg"):
        evaluated(source, faults=Faults(source, 0.03))
    with pytest.raises(DataError, match=r"^Expected at most 0\.01 of the 37"):
        for _ in train_batches(source, batch_size=8, image_size=32, augmentation=PLAIN):
            pass
    evaluated(source, faults=Faults(source, 2 / 37))
    with pytest.raises(tf.errors.OpError, match=r"at most 0\.01 of the 37 images"):
        list(train_batches(source, batch_size=8, image_size=32, augmentation=PLAIN).take(5))
    faults = Faults(source, 0.0)
    faults.check()
    faults.add(3, "spilt coffee")
    with pytest.raises(
        DataError, match=r"1 could not be decoded so far.*First of them: a/03\.jpg: spilt coffee"
    ):
        faults.check()


def test_a_file_that_vanishes_is_a_fault_not_a_hang(tmp_path):
    for number in range(4):
        (tmp_path / "a").mkdir(exist_ok=True)
        (tmp_path / "a" / f"{number}.jpg").write_bytes(jpeg(number))
    source = sources.open_source(tmp_path)
    (tmp_path / "a" / "2.jpg").unlink()
    faults = Faults(source, 1.0)
    assert [mask for _, _, mask, _ in evaluated(source, faults=faults)[:4]] == [True, True, False, True]
    assert "No such file" in faults.report()["a/2.jpg"]


def test_fuzzed_images_are_decoded_or_reported(tmp_path):
    """1,000 mutations of real JPEGs: cut, overwritten in header or data, shortened, lengthened."""
    (tmp_path / "a").mkdir()
    generator = random.Random(0)
    originals = [(IMAGES / name).read_bytes() for name in ("coffee.jpg", "rocket.jpg")] + [
        jpeg(1),
        jpeg(2, 200, 150),
    ]
    for number in range(1000):
        content = bytearray(originals[number % 4])
        place = generator.randrange(len(content))
        kind = number // 4 % 5
        if kind == 0:
            del content[place:]
        elif kind in (1, 2):
            for _ in range(generator.randrange(1, 20)):
                content[generator.randrange(len(content) if kind == 1 else 600)] = generator.randrange(256)
        elif kind == 3:
            del content[place : place + generator.randrange(1, 2000)]
        else:
            content[place:place] = generator.randbytes(generator.randrange(1, 300))
        (tmp_path / "a" / f"{number:04}.jpg").write_bytes(content)
    source = sources.open_source(tmp_path)
    faults = Faults(source, 1.0)
    rows = evaluated(source, faults=faults, image_size=64, batch_size=50)
    masks = np.array([mask for _, _, mask, _ in rows])
    assert len(masks) == 1000 and 400 < masks.sum() < 1000
    assert {source.name(number) for number in np.flatnonzero(~masks)} == set(faults.report())


def test_what_takes_the_machine_elsewhere_is_a_fault(tmp_path, monkeypatch):
    """After the listing: a pipe would hang, a device fill the memory, EPS start a program."""
    (tmp_path / "a").mkdir()
    for number in range(8):
        (tmp_path / "a" / f"{number}.jpg").write_bytes(jpeg(number))
    source = sources.open_source(tmp_path)
    odd = [tmp_path / "a" / f"{number}.jpg" for number in range(5)]
    for path in odd:
        path.unlink()
    os.mkfifo(odd[0])
    odd[1].symlink_to("/dev/zero")
    odd[2].write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 32 32\n%%EndComments\n")
    Image.new("RGB", (4, 4)).save(odd[3], "PNG")
    monkeypatch.setattr("PIL.PngImagePlugin.PngImageFile.load", raise_memory_error)
    file = io.BytesIO()
    Image.new("L", (64, 64), 77).save(file, "JPEG", progressive=True)
    content, scan = file.getvalue()[:-2], file.getvalue().rindex(b"\xff\xda")
    odd[4].write_bytes(content + content[scan:] * 1000 + b"\xff\xd9")
    faults = Faults(source, 1.0)
    assert [mask for _, _, mask, _ in evaluated(source, faults=faults)] == [False] * 5 + [True] * 3
    said = ["the named pipe", "the device", "is not one", "MemoryError", "ten scans"]
    assert all(words in text for words, text in zip(said, faults.report().values(), strict=True))
    faults = Faults(source, 1.0)
    trained(source, 1, batch_size=8, faults=faults, augmentation=PLAIN)
    assert len(faults) == 5


def raise_memory_error(*_):
    raise MemoryError


def test_large_images_take_other_ways_to_the_same_pixels(sound, monkeypatch):
    plain = [image for *_, image in evaluated(sound)]
    options = {"seed": 3, "dtype": "uint8", "augmentation": PLAIN}
    images, _ = trained(sound, 3, **options)
    monkeypatch.setattr(jpeg_graph, "_LARGE_WINDOWS", 0)
    np.testing.assert_array_equal(plain, [image for *_, image in evaluated(sound)])
    np.testing.assert_array_equal(images, trained(sound, 3, **options)[0])
    monkeypatch.setattr(preprocess, "LARGE", 1700)  # of 2000 pixels, resized to 1620
    np.testing.assert_array_equal(plain, [image for *_, image in evaluated(sound)])
    reduced, _ = trained(sound, 3, **options)  # by 2
    difference = np.abs(reduced.astype(int) - images).mean()
    assert 0 < difference < 10


def test_a_turned_photo_is_told_once_where_tensorflow_decodes_it(tmp_path, monkeypatch, capfd):
    turned, upright = Image.Exif(), Image.open(io.BytesIO(jpeg(1)))
    turned[0x0112] = 8
    (tmp_path / "a").mkdir()
    for number in range(4):
        upright.save(tmp_path / "a" / f"{number}.jpg", exif=turned)
    source = sources.open_source(tmp_path)
    monkeypatch.delenv("KERAS_CONVNEXT_QUIET", raising=False)
    monkeypatch.setattr(_terminal, "_said", set())
    evaluated(source)
    assert capfd.readouterr().err.count("jpg' is stored turned or mirrored (EXIF orientation 8)") == 1


def test_training_starts_anywhere_and_does_not_depend_on_workers(sound):
    options = {"seed": 5, "num_classes": 7}
    images, targets = trained(sound, 6, **options, workers=1)
    assert images.shape == (6, 8, 32, 32, 3) and targets.shape == (6, 8, 7)
    np.testing.assert_allclose(targets.sum(-1), 1, atol=1e-6)
    later = trained(sound, 2, **options, workers=5, part=Part(start_batch=4))
    np.testing.assert_array_equal(later[0], images[4:])
    np.testing.assert_array_equal(later[1], targets[4:])
    one, other = (trained(sound, 1, augmentation=PLAIN, seed=seed)[0] for seed in (5, 6))
    assert (one != other).any()


def test_the_iterator_can_be_saved_in_the_middle_of_an_epoch(sound, tmp_path):
    """TensorFlow's own checkpoint of an iterator, next to `start_batch`."""
    made = train_batches(sound, batch_size=8, image_size=32, workers=2)
    iterator = iter(made)
    for _ in range(4):
        next(iterator)
    path = tf.train.Checkpoint(iterator=iterator).save(str(tmp_path / "state"))
    expected = next(iterator)
    restored = iter(made)
    tf.train.Checkpoint(iterator=restored).restore(path)
    for one, other in zip(next(restored), expected, strict=True):
        np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize("num_hosts", [2, pytest.param(4, marks=SLOW)])
def test_hosts_together_make_the_batches_of_one(sound, num_hosts):
    options = {"num_classes": 3, "mix_group": 2, "augmentation": Augmentation(policy="none")}
    alone = trained(sound, 4, **options)
    parts = [Part(host=host, num_hosts=num_hosts) for host in range(num_hosts)]
    shares = [trained(sound, 4, **options, part=part) for part in parts]
    for place, expected in enumerate(alone):
        np.testing.assert_array_equal(np.concatenate([share[place] for share in shares], axis=1), expected)


def numbers_of(source, count, interpolation="bicubic", repeats=1):
    """Returns which example is at each place of the first batches, recognised by its pixels."""
    squashed = {"crop_mode": "squash", "interpolation": interpolation}
    known = [eval_image(source.read(n), 32, 1.0, **squashed) for n in range(len(source))]
    whole = {"crop_scale": (1, 1), "crop_ratio": (1.25, 1.25), "flip": 0}
    whole = PLAIN.replaced(whole | {"interpolation": interpolation, "repeats": repeats})
    images, _ = trained(source, count, augmentation=whole)
    differences = np.abs(images.reshape(-1, 1, 32, 32, 3) - np.array(known)).max((2, 3, 4))
    nearest, second = np.sort(differences)[:, :2].T
    assert nearest.max() <= 1 and second.min() > 10
    return differences.argmin(-1)


def test_every_epoch_is_another_permutation_without_the_remainder(sound):
    steps = steps_per_epoch(sound, 8)
    assert steps == 3  # 26 examples
    numbers = numbers_of(sound, 4 * steps).reshape(4, steps * 8)
    assert all(len(set(epoch)) == 24 for epoch in numbers)
    assert len({tuple(epoch) for epoch in numbers}) == 4
    assert set(numbers.ravel()) == set(range(26))


def test_images_to_train_on_are_resized_by_the_filter_that_is_asked_for(sound):
    numbers = numbers_of(sound, 1)
    np.testing.assert_array_equal(numbers_of(sound, 1, interpolation="bilinear"), numbers)


def test_labels_stay_with_their_images(sound):
    numbers = numbers_of(sound, 3)
    _, targets = trained(sound, 3, augmentation=PLAIN)
    np.testing.assert_array_equal(targets.argmax(-1).ravel(), sound.labels[numbers])


def test_repeated_augmentation_repeats_examples_but_not_their_pixels(sound):
    numbers = numbers_of(sound, 3, repeats=4)
    np.testing.assert_array_equal(numbers.reshape(-1, 4), numbers[::4, None].repeat(4, axis=1))
    assert len(set(numbers)) == 6
    images, _ = trained(sound, 1, augmentation=PLAIN.replaced({"repeats": 4}))
    assert (images[0, 0] != images[0, 1]).any()


def test_a_damaged_image_is_replaced_by_a_neighbour_in_training(source):
    faults = Faults(source, 1.0)
    images, targets = trained(source, 9, faults=faults, augmentation=PLAIN)
    assert set(faults.report()) == {"c/30.jpg", "c/31.jpg"}
    assert images.std((2, 3, 4)).min() > 1  # nothing is blank
    assert (targets.sum((0, 1)) > 0).all()


def test_uint8_is_float32_rounded_and_clipped(sound):
    plain = Augmentation(mixup=0, cutmix=0)
    exact, small = (trained(sound, 3, dtype=dtype, augmentation=plain)[0] for dtype in ("float32", "uint8"))
    assert exact.dtype == np.float32 and small.dtype == np.uint8
    np.testing.assert_array_equal(np.clip(np.round(exact), 0, 255), small)


def test_the_stream_has_no_end(sound):
    assert train_batches(sound, batch_size=8, image_size=32).cardinality() == tf.data.INFINITE_CARDINALITY


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"batch_size": 0}, "Expected batch_size to be a positive integer, received 0"),
        ({"batch_size": 27}, "Expected at least one batch of 27 images, but .* has 26"),
        ({"part": Part(num_hosts=3)}, "Expected batch_size to be a multiple of num_hosts, received 8 and 3"),
        ({"part": Part(host=2, num_hosts=2)}, "Expected host from 0 to 1, .* received 2"),
        ({"augmentation": Augmentation(policy="rand-m9-mstf0.5")}, "Unknown setting 'mstf0.5'"),
        ({"dtype": "float16"}, "Unknown dtype 'float16'. Known: float32, uint8"),
        ({"num_classes": 1}, "Expected num_classes of at least 2, .* received 1"),
        (
            {"mix_group": 3},
            "Expected mix_group to divide the 8 rows of a batch and to be even, received 3",
        ),
        ({"seed": -1}, "Expected seed to be an integer from 0 up, received -1"),
    ],
    ids=lambda value: str(value)[:20] if isinstance(value, dict) else "",
)
def test_wrong_arguments_are_named(sound, change, message):
    with pytest.raises(ValueError, match=message):
        train_batches(sound, **{"batch_size": 8, "image_size": 32, **change})


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (
            {"interpolation": "lanczos"},
            'interpolation: expected one of bicubic, bilinear, received "lanczos"',
        ),
        ({"erase": 1.5}, r"erase: expected a number in \[0, 1\], received 1.5"),
        ({"crop_scale": (0.5, 0.2)}, r"crop_scale: expected \[smallest, largest\].* received \[0.5, 0.2\]"),
        ({"erase": 2, "flips": 0.5}, r"2 problems:\n  .*\n  flips: unknown key, did you mean 'flip'\?"),
    ],
    ids=lambda value: str(value)[:20] if isinstance(value, dict) else "",
)
def test_wrong_augmentations_are_named(change, problem):
    with pytest.raises(ValueError, match=problem):
        Augmentation(**change)


def test_tensorflow_leaves_the_gpu_to_another_backend(sound, monkeypatch):
    calls = []
    monkeypatch.setattr(tf.config, "set_visible_devices", lambda *arguments: calls.append(arguments))
    for backend, expected in (("tensorflow", []), ("jax", [([], "GPU")])):
        monkeypatch.setattr(keras.config, "backend", lambda backend=backend: backend)
        eval_batches(sound, Preprocessing(32))
        assert calls == expected


def test_a_batch_that_no_memory_holds_is_refused(sound):
    """`knn --set batch_size=2147483647` filled its only batch up for minutes."""
    message = "batch_size of at most 65,536, as the last batch is filled up, received 65,537"
    with pytest.raises(ValueError, match=message):
        eval_batches(sound, Preprocessing(32), batch_size=65_537)


def test_faults_refuse_a_share_beyond_one(sound):
    with pytest.raises(ValueError, match=r"Expected max_share in \[0, 1\], received 2"):
        Faults(sound, 2)


@pytest.mark.slow
def test_memory_stays_flat_over_three_epochs(sound):
    process = psutil.Process()
    made = train_batches(sound, batch_size=8, image_size=128, workers=2)
    iterator, resident = iter(made), []
    for _ in range(4):  # the first fills pools and caches
        for _ in range(20 * steps_per_epoch(sound, 8)):
            next(iterator)
        resident.append(process.memory_info().rss / 2**20)
    print("resident MiB after each twenty epochs:", [round(value) for value in resident])
    assert resident[-1] - resident[0] < 64  # 480 batches of 1.5 MB, had they been kept


@pytest.mark.slow
def test_policy_of_keras_is_a_function_of_the_place_and_does_what_keras_does(sound):
    chosen = Augmentation(policy="keras", crop_scale=(1.0, 1.0), flip=0, erase=0, label_smoothing=0)
    options = {"batch_size": 4, "seed": 5}
    images, targets = trained(sound, 4, augmentation=chosen, **options)
    again = trained(sound, 2, augmentation=chosen, part=Part(start_batch=2), **options | {"workers": 1})
    np.testing.assert_array_equal(images[2:], again[0])
    np.testing.assert_array_equal(targets[2:], again[1])
    np.testing.assert_allclose(targets.sum(-1), 1, atol=1e-6)
    largest = targets.reshape(-1, 2, targets.shape[-1]).max(-1)
    assert (largest < 0.99).any()  # mixed
    assert (np.abs(largest[:, 0] - largest[:, 1]) > 0.01).any()  # each of a pair has its own lambda
    unmixed = trained(sound, 4, augmentation=chosen.replaced(NO_MIX), **options)[0]
    plain = trained(sound, 4, augmentation=chosen.replaced({"policy": "none", **NO_MIX}), **options)[0]
    assert np.abs(unmixed - plain).mean((2, 3, 4)).max() > 5
    assert len({round(float(value)) for value in np.abs(unmixed - plain).mean((2, 3, 4)).flat}) > 4
