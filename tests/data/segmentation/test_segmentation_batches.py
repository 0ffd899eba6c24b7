"""Training batches of photographs and maps: the arithmetic of OpenCV, and that both move together."""

import io
import itertools
import os
import sys
import types

import numpy as np
import pytest
import tensorflow as tf
from PIL import Image

from keras_convnext import _files
from keras_convnext.cli import main
from keras_convnext.data.faults import DataError, Faults
from keras_convnext.data.segmentation import augment, batches
from keras_convnext.data.segmentation.label_maps import LabelMapError, encode
from keras_convnext.data.segmentation.sources import open_source
from keras_convnext.data.segmentation.train_transform import SegmentationAugmentation
from keras_convnext.data.stream import Part

pytestmark = pytest.mark.once

PLAIN = SegmentationAugmentation(base_size=(40, 32), photometric=0)


# An independent form in NumPy, by loops over pixels, of what cv2.resize and mmsegmentation do.


def resized(image, size):
    """cv2.resize(INTER_LINEAR) of uint8: weights of 11 bits, columns first, four bits dropped, then rows."""
    source = np.asarray(image, np.int64)
    height, width = source.shape[:2]

    def neighbours(count, length, is_column):
        for place in range(count):
            at = np.float32((place + 0.5) * (1 / (count / length)) - 0.5)
            low = int(np.floor(at))
            part = np.float32(at - np.float32(low))
            if is_column and (low < 0 or low >= length - 1):
                part = np.float32(0)
            weights = [int(np.rint(np.float32(one) * 2048)) for one in (np.float32(1) - part, part)]
            yield [min(max(one, 0), length - 1) for one in (low, low + 1)], weights

    columns = np.stack(
        [source[:, a] * u + source[:, b] * v for (a, b), (u, v) in neighbours(size[1], width, True)], 1
    )
    columns >>= 4
    rows = [
        ((columns[a] * u) >> 16) + ((columns[b] * v) >> 16)
        for (a, b), (u, v) in neighbours(size[0], height, False)
    ]
    return ((np.stack(rows) + 2) >> 2).astype(np.uint8)


def nearest(label_map, size):
    height, width = label_map.shape
    rows = [min(int(np.floor(place * (1 / (size[0] / height)))), height - 1) for place in range(size[0])]
    columns = [min(int(np.floor(place * (1 / (size[1] / width)))), width - 1) for place in range(size[1])]
    return label_map[np.ix_(rows, columns)]


def changed(levels, factor=1.0, offset=0.0):
    return np.clip(levels.astype(np.float32) * np.float32(factor) + np.float32(offset), 0, 255).astype(
        np.uint8
    )


def hsv(pixel):
    red, green, blue = (int(level) for level in pixel)
    value = max(red, green, blue)
    spread = value - min(red, green, blue)
    saturation = (spread * int(np.rint((255 << 12) / value)) + 2048) >> 12 if value else 0
    if value == red:
        hue = green - blue
    elif value == green:
        hue = blue - red + 2 * spread
    else:
        hue = red - green + 4 * spread
    hue = (hue * int(np.rint((180 << 12) / (6 * spread))) + 2048) >> 12 if spread else 0
    return hue + 180 * (hue < 0), saturation, value


def rgb(hue, saturation, value):
    """In float64, so a level may differ by one from OpenCV's float32 at a whole number."""
    sector, part = divmod(hue / 30, 1)
    level, share = value, saturation / 255
    low, falling, rising = level * (1 - share), level * (1 - share * part), level * (1 - share * (1 - part))
    return np.array([
        (level, rising, low), (falling, level, low), (low, level, rising), (low, falling, level),
        (rising, low, level), (level, low, falling),
    ][int(sector)])  # fmt: skip


def image_of(seed, size=(23, 31)):
    return np.random.default_rng(seed).integers(0, 256, (*size, 3), np.uint8)


def map_of(seed, size=(23, 31), classes=5):
    return np.random.default_rng(seed).integers(0, classes, size).astype(np.uint8)


SIZES = [(23, 31), (46, 62), (11, 15), (30, 17), (2, 90), (90, 2), (50, 41)]


def whole(size):
    return tf.constant([0, 0, *size], tf.int32)


@pytest.mark.parametrize("size", SIZES)
def test_resize_is_opencvs(size):
    image, label_map, before = image_of(0), map_of(0), (tf.constant(23), tf.constant(31))
    after = tuple(map(tf.constant, size))
    expected = resized(image, size)
    np.testing.assert_array_equal(augment.resize_image(image, before, after, whole(size)), expected)
    np.testing.assert_array_equal(
        augment.resize_map(tf.constant(label_map), before, after, whole(size)), nearest(label_map, size)
    )
    if os.environ.get("KERAS_CONVNEXT_MMSEG"):
        cv2 = mmseg_module("cv2")
        np.testing.assert_array_equal(expected, cv2.resize(image, size[::-1], interpolation=cv2.INTER_LINEAR))
        np.testing.assert_array_equal(
            nearest(label_map, size), cv2.resize(label_map, size[::-1], interpolation=cv2.INTER_NEAREST)
        )


def test_resize_differs_from_other_rules():
    """The control: with antialias, or with corners aligned, the pixels are others."""
    image, size = image_of(0, (40, 40)), (17, 23)
    ours = resized(image, size).astype(int)
    other = tf.image.resize(image, size, antialias=True).numpy()
    assert np.abs(ours - other).max() > 30
    half_pixel = tf.image.resize(image, size).numpy()
    assert np.abs(ours - half_pixel).max() < 1.5


def test_a_part_of_a_resized_image_is_that_part():
    image, label_map, before = image_of(1), tf.constant(map_of(1)), (tf.constant(23), tf.constant(31))
    size, box = (37, 52), (5, 11, 20, 30)
    after, part = tuple(map(tf.constant, size)), np.s_[5:25, 11:41]
    made = augment.resize_image(image, before, after, tf.constant(box))
    np.testing.assert_array_equal(made, resized(image, size)[part])
    made = augment.resize_map(label_map, before, after, tf.constant(box))
    np.testing.assert_array_equal(made, nearest(label_map.numpy(), size)[part])


@pytest.mark.parametrize(
    ("size", "ratio", "expected"),
    [  # by hand: min(floor(2048 r) / long, floor(512 r) / short), halves up
        ((512, 683), 1.0, (512, 683)),
        ((683, 512), 0.5, (342, 256)),
        ((100, 1000), 1.0, (205, 2048)),
        ((375, 500), 1.999, (1023, 1364)),
    ],
)
def test_the_resized_size_fits_the_box(size, ratio, expected):
    made = augment.resized_size(tuple(map(tf.constant, size)), (2048, 512), tf.constant(ratio, tf.float64))
    assert tuple(map(int, made)) == expected


def test_hue_saturation_and_value_are_opencvs():
    image = image_of(2, (40, 64))  # a multiple of 32, see `to_rgb`
    image[0, :3] = [[0, 0, 0], [7, 7, 7], [255, 0, 0]]
    channels = np.stack(augment.to_hsv(tf.constant(image)), -1)
    expected = np.apply_along_axis(hsv, -1, image)
    np.testing.assert_array_equal(channels, expected)
    back = augment.to_rgb(*(tf.constant(channels[..., place]) for place in range(3))).numpy()
    exact = np.array([[rgb(*pixel) for pixel in row] for row in expected])
    assert back.dtype == np.uint8
    assert np.abs(back - (exact - 0.5)).max() <= 0.5 + 1e-3  # cut off, not rounded
    is_between = np.abs(exact - np.rint(exact)) > 1e-3  # not at a whole number, where the last bit decides
    np.testing.assert_array_equal(back[is_between], np.floor(exact)[is_between])
    assert is_between.mean() > 0.5
    if os.environ.get("KERAS_CONVNEXT_MMSEG"):
        cv2 = mmseg_module("cv2")
        np.testing.assert_array_equal(cv2.cvtColor(image, cv2.COLOR_RGB2HSV), channels)
        np.testing.assert_array_equal(cv2.cvtColor(channels.astype(np.uint8), cv2.COLOR_HSV2RGB), back)


def distorted(image, row):
    """mmsegmentation's PhotoMetricDistortion with these draws; `to_rgb` is compared above."""

    def turned(image, change):
        channels = np.apply_along_axis(hsv, -1, image)
        channels = change(channels)
        return augment.to_rgb(*(tf.constant(channels[..., place], tf.int32) for place in range(3))).numpy()

    def saturated(channels):
        channels[..., 1] = changed(channels[..., 1].astype(np.uint8), row["saturation"])
        return channels

    def with_hue(channels):
        channels[..., 0] = (channels[..., 0] + row["hue"]) % 180
        return channels

    image = changed(image, offset=row["brightness"])
    if row["contrast_first"]:
        image = changed(image, row["contrast"])
    image = turned(image, saturated) if row["is_saturated"] else image
    image = turned(image, with_hue) if row["is_turned"] else image
    return image if row["contrast_first"] else changed(image, row["contrast"])


def test_photometric_distortion_is_mmsegmentations():
    generator = np.random.default_rng(0)
    plan = augment.plan_photometric(generator.random((24, 9)), 0.5)
    seen = set()
    for number in range(24):
        row = {name: values[number] for name, values in plan.items()}
        values = {name: value.numpy() for name, value in row.items()}
        image = image_of(number, (9, 11))
        np.testing.assert_array_equal(augment.distort(tf.constant(image), row), distorted(image, values))
        seen |= {name for name in ("is_saturated", "is_turned", "contrast_first") if values[name]}
    assert len(seen) == 3
    assert plan["hue"].numpy().min() < -6
    assert plan["hue"].numpy().max() > 6


def test_the_draws_of_the_distortion_have_the_published_ranges():
    uniforms = np.random.default_rng(0).random((20000, 9))
    plan = {name: values.numpy() for name, values in augment.plan_photometric(uniforms, 0.5).items()}
    for name, done, low, high in (
        ("brightness", plan["brightness"] != 0, -32, 32),
        ("contrast", plan["contrast"] != 1, 0.5, 1.5),
        ("saturation", plan["is_saturated"], 0.5, 1.5),
        ("hue", plan["is_turned"], -18, 17),
    ):
        assert abs(done.mean() - 0.5) < 0.02, name
        values = plan[name][done]
        spread = high - low
        assert low <= values.min() < low + 0.01 * spread
        assert high - 0.01 * spread < values.max() <= high
    assert abs(plan["contrast_first"].mean() - 0.5) < 0.02


def chosen_crop(label_map, size, crop_size, uniforms, max_share):
    """mmsegmentation's RandomCrop, with uniforms in place of its random integers."""
    big = nearest(label_map, size)
    sides = np.minimum(size, crop_size)
    for attempt in range(11):
        margins = np.array(size) - sides
        top, left = (
            int(u * (margin + 1)) for u, margin in zip(uniforms[2 * attempt :], margins, strict=False)
        )
        crop = big[top : top + sides[0], left : left + sides[1]]
        counts = np.bincount(crop[crop != 255], minlength=1)
        counts = counts[counts > 0]
        if attempt == 10 or max_share == 1 or (len(counts) > 1 and counts.max() / counts.sum() < max_share):
            return attempt, (top, left, *sides)


def test_crops_with_too_much_of_one_class_are_drawn_again():
    generator = np.random.default_rng(3)
    attempts = []
    choose = tf.function(augment.choose_crop, reduce_retracing=True)
    for seed in range(40):
        label_map = np.kron(map_of(seed, (4, 5), 3), np.ones((8, 8), np.uint8))
        label_map[label_map == 2] = 255 if seed % 2 else 2
        size, uniforms = (40 + seed, 50 + seed), generator.random(22)
        after, before = tuple(map(tf.constant, size)), tuple(map(tf.constant, label_map.shape))
        made = choose(tf.constant(label_map), before, after, (16, 200), tf.constant(uniforms), 0.75)
        attempt, expected = chosen_crop(label_map, size, (16, 200), uniforms, 0.75)
        assert tuple(made.numpy()) == expected
        attempts.append(attempt)
        first = choose(tf.constant(label_map), before, after, (16, 200), tf.constant(uniforms), 1.0)
        assert tuple(first.numpy()) == chosen_crop(label_map, size, (16, 200), uniforms, 1)[1]
    assert attempts.count(0) < 40  # some were drawn again


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Twelve images whose map can be read off: red is 40 times the class; number 9 is no image."""
    root = tmp_path_factory.mktemp("pairs")
    for place in ("images", "masks"):
        (root / place).mkdir()
    for number in range(12):
        label_map = np.kron(map_of(number, (5, 6)), np.ones((8, 8), np.uint8))
        image = np.stack([label_map * 40, label_map * 0, np.full_like(label_map, number)], -1).astype(
            np.uint8
        )
        file = io.BytesIO()
        Image.fromarray(image).save(file, "PNG")
        (root / f"images/{number:02}.png").write_bytes(b"hello" if number == 9 else file.getvalue())
        label_map[0, 0] = 255
        (root / f"masks/{number:02}.png").write_bytes(encode(label_map))
    return root


@pytest.fixture(scope="module")
def source(folder):
    return open_source(folder, ignored_values=[255])


def made(source, count, **options):
    options = {
        "batch_size": 4,
        "crop_size": (24, 28),
        "augmentation": PLAIN,
        "faults": Faults(source, 1.0),
    } | options
    found = list(itertools.islice(batches.train_batches(source, **options), count))
    return [np.stack(values) for values in zip(*found, strict=True)]


@pytest.fixture(scope="module")
def plain(source):
    return made(source, 6)


def test_image_and_map_move_together_at_the_pixel(plain):
    images, maps = plain
    assert images.shape == (6, 4, 24, 28, 3)
    assert images.dtype == np.float32
    assert maps.dtype == np.int32
    padded = np.all(np.abs(images - 255 * np.array([0.485, 0.456, 0.406])) < 1e-3, -1)
    assert (maps[padded] == 255).all()
    classes = images[..., 0] / 40
    # Nearest takes the pixel at or before and bilinear is centred: edges of classes differ by up to a pixel.
    is_flat = np.abs(classes - np.rint(classes)) < 1e-3
    fits = (classes == maps)[~padded & is_flat & (maps != 255)]
    assert fits.mean() > 0.8
    assert padded.any()
    flipped = (classes == maps[..., ::-1])[~padded & is_flat & (maps != 255)]
    assert flipped.mean() < 0.45  # the control: had one of the two been flipped alone


def test_without_a_resize_every_pixel_fits(source):
    still = SegmentationAugmentation(base_size=(48, 40), scale=(1.0, 1.0), photometric=0)
    images, maps = made(source, 6, augmentation=still, crop_size=(40, 44))
    labelled = maps != 255
    assert labelled.mean() > 0.9
    np.testing.assert_array_equal(np.rint(images[..., 0] / 40)[labelled], maps[labelled])


def test_the_flip_is_drawn_for_half_of_the_examples(source):
    still = {"base_size": (48, 40), "scale": (1.0, 1.0), "photometric": 0, "max_class_share": 1}
    straight, drawn = (
        made(source, 12, augmentation=SegmentationAugmentation(flip=flip, **still), crop_size=(40, 48))
        for flip in (0, 0.5)
    )
    is_same, is_mirrored = (
        [np.all(one == other, tuple(range(2, one.ndim))) for one, other in zip(drawn, views, strict=True)]
        for views in (straight, [values[:, :, :, ::-1] for values in straight])
    )
    for place in range(2):  # the image and its map
        assert (is_same[place] ^ is_mirrored[place]).all()
    np.testing.assert_array_equal(is_same[0], is_same[1])
    assert 0.25 < is_same[0].mean() < 0.75


def test_a_batch_is_a_function_of_its_number_alone(source, plain):
    options = {"augmentation": SegmentationAugmentation(base_size=(40, 32))}
    everything = made(source, 6, workers=1, **options)
    resumed = made(source, 3, part=Part(start_batch=3), workers=3, **options)
    for one, other in zip(everything, resumed, strict=True):
        np.testing.assert_array_equal(one[3:], other)
    images = everything[0][:3].reshape(-1, 24, 28, 3)
    assert len({round(float(image[0, 0, 2])) for image in images}) > 3  # different examples
    second = made(source, 6, part=Part(host=1, num_hosts=2))
    for one, other in zip(plain, second, strict=True):
        np.testing.assert_array_equal(one[:, 2:], other)
    assert not np.array_equal(made(source, 6, seed=1)[1], plain[1])


def test_8_bit_batches_are_rounded(source, plain):
    images, maps = made(source, 3, dtype="uint8")
    np.testing.assert_array_equal(maps, plain[1][:3])
    assert images.dtype == np.uint8
    assert np.abs(images - plain[0][:3]).max() <= 0.5
    with pytest.raises(ValueError, match="Unknown dtype 'float16'"):
        made(source, 1, dtype="float16")


def test_damaged_images_are_replaced_counted_and_too_many_refused(source):
    faults = Faults(source, 0.1)
    made(source, 3, faults=faults)
    assert list(faults.report()) == ["images/09.png"]
    with pytest.raises(DataError, match=r"images/09.png"):
        made(source, 3, faults=Faults(source, 0.01))


def test_a_map_with_an_unknown_value_stops_the_stream(folder, source):
    strict = open_source(folder, labels=list("abcde"))
    with pytest.raises(LabelMapError, match=r"received 255 .* pass ignored_values=\(255,\)"):
        made(strict, 3)


def test_too_few_examples_for_a_batch_are_an_error(source):
    with pytest.raises(ValueError, match="at least one batch of 13 images"):
        made(source, 1, batch_size=13)


def test_look_draws_a_batch_with_its_maps(folder, tmp_path, capsys):
    (folder / "images/09.png").write_bytes((folder / "images/08.png").read_bytes())
    output = tmp_path / "sheet.png"
    assert main.main(["look", str(folder), str(output), "--ignored", "255"]) == 0
    told = capsys.readouterr()
    assert "12 images with label maps" in told.out
    assert Image.open(output).size[0] > 8 * 192
    _files.check_target(output, mark=_files.PNG_MARK)
    (folder / "images/09.png").write_bytes(b"hello")


def mmseg_module(name):
    """Imports from the folder that KERAS_CONVNEXT_MMSEG names, see `test_..._of_mmsegmentation_itself`."""
    import importlib

    folder = os.environ["KERAS_CONVNEXT_MMSEG"]
    if folder not in sys.path:
        sys.path.append(folder)
    return importlib.import_module(name)


class Drawn:
    """Stands for NumPy's random module in mmsegmentation: gives what was drawn for us, in its order."""

    def __init__(self, monkeypatch):
        self.values = []
        for name in ("randint", "uniform", "random_sample", "choice"):
            monkeypatch.setattr(np.random, name, self.next)

    def next(self, *arguments, **options):
        return self.values.pop(0)


@pytest.mark.skipif(
    not os.environ.get("KERAS_CONVNEXT_MMSEG"),
    reason="needs KERAS_CONVNEXT_MMSEG, a folder with mmsegmentation 1.2.2, mmcv-lite 2.1.0 and OpenCV",
)
def test_the_pipeline_equals_that_of_mmsegmentation_itself(monkeypatch):
    """The folder: pip install --target FOLDER --no-deps mmsegmentation==1.2.2 mmcv-lite==2.1.0
    mmengine==0.10.7 opencv-python-headless addict yapf termcolor ftfy prettytable wcwidth platformdirs."""
    mmseg_module("mmcv")
    monkeypatch.setitem(
        sys.modules, "mmcv.ops", types.SimpleNamespace(point_sample=None)
    )  # compiled, not used
    transforms = mmseg_module("mmseg.datasets.transforms.transforms")
    processing = mmseg_module("mmcv.transforms.processing")
    augmentation = SegmentationAugmentation(base_size=(64, 40))
    crop_size, generator = (40, 64), np.random.default_rng(5)
    transform = augment.SegmentationTransform(augmentation, crop_size, (123.675, 116.28, 103.53), "float32")
    drawn, compared = Drawn(monkeypatch), 0
    for seed in range(60):
        image, label_map = (
            image_of(seed, (30, 44)),
            np.kron(map_of(seed, (3, 4), 4), np.ones((10, 11), np.uint8)),
        )
        uniforms = {"ratio": generator.random(), "crops": generator.random(22), "flip": generator.random()}
        photometric = generator.random(9)
        row = {
            "ratio": tf.constant(uniforms["ratio"] * 1.5 + 0.5, tf.float64),
            "crops": tf.constant(uniforms["crops"]),
            "flip": tf.constant(uniforms["flip"] < 0.5),
        }
        plan = augment.plan_photometric(photometric[None], 0.5)
        row |= {name: values[0] for name, values in plan.items()}
        ours = transform.make(tf.constant(image), tf.constant(label_map), row)
        results = {
            "img": image[..., ::-1].copy(), "gt_seg_map": label_map, "seg_fields": ["gt_seg_map"],
            "img_shape": image.shape[:2],
        }  # fmt: skip
        # Resize
        drawn.values = [uniforms["ratio"]]
        resize = processing.RandomResize((64, 40), (0.5, 2.0), keep_ratio=True)
        results = resize(results)
        # Crop
        margins = np.maximum(np.array(results["img"].shape[:2]) - crop_size, 0)
        drawn.values = [int(u * (margins[place % 2] + 1)) for place, u in enumerate(uniforms["crops"])]
        results = transforms.RandomCrop(crop_size, cat_max_ratio=0.75)(results)
        # Flip
        if uniforms["flip"] < 0.5:
            for key in ("img", "gt_seg_map"):
                results[key] = results[key][:, ::-1].copy()
        # Photometric distortion, in the order in which it draws
        row = {name: value.numpy() for name, value in row.items()}
        done = photometric[:4] < 0.5
        contrast = [int(done[1]), *([float(row["contrast"])] if done[1] else [])]
        first = bool(row["contrast_first"])
        drawn.values = [
            int(done[0]), *([float(row["brightness"])] if done[0] else []),
            int(first), *(contrast if first else []),
            int(done[2]), *([float(row["saturation"])] if done[2] else []),
            int(done[3]), *([int(row["hue"])] if done[3] else []),
            *([] if first else contrast),
        ]  # fmt: skip
        results = transforms.PhotoMetricDistortion()(results)
        assert not drawn.values
        height, width = results["img"].shape[:2]
        # OpenCV rounds colours beyond the last 32 columns, its vectors of 8 bits, and cuts the others off.
        whole, expected = width // 32 * 32, results["img"][..., ::-1]
        np.testing.assert_allclose(ours[0].numpy()[:height, :whole], expected[:, :whole], atol=1e-4)
        rest = np.abs(ours[0].numpy()[:height, whole:width] - expected[:, whole:])
        assert rest.sum() <= rest.size
        compared += whole
        np.testing.assert_array_equal(ours[1].numpy()[:height, :width], results["gt_seg_map"])
        assert (ours[1].numpy()[height:] == 255).all()
        assert (ours[1].numpy()[:, width:] == 255).all()
    assert compared > 60 * 24  # most of the columns
