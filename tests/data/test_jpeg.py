"""The graph's decoding, resizing and cropping against Pillow, torchvision and timm, pixel by pixel."""

import io
import pathlib
import random

import numpy as np
import pytest
import tensorflow as tf
from PIL import Image
from timm.data import create_transform
from timm.data.transforms import RandomResizedCropAndInterpolation

from keras_convnext.data import eval_image, preprocess
from keras_convnext.data import jpeg as jpeg_module
from keras_convnext.data.jpeg import crop_box, plan_crop, random_resized_crop, resize
from keras_convnext.data.preprocessing import Preprocessing

pytestmark = pytest.mark.once

IMAGES = pathlib.Path(__file__).parents[1] / "images"
SAMPLES = pathlib.Path(__file__).parents[3] / "shared/data/imagenet_samples/images"
RESAMPLING = {"bicubic": Image.Resampling.BICUBIC, "bilinear": Image.Resampling.BILINEAR}
# image size, crop fraction, interpolation, crop mode: those of published tags and two odd ones
SETTINGS = [
    (224, 0.875, "bicubic", "center"),
    (288, 1.0, "bicubic", "center"),
    (384, 1.0, "bicubic", "squash"),
    (224, 224 / 236, "bilinear", "center"),
    (225, 0.9, "bicubic", "center"),
    (97, 0.8, "bilinear", "squash"),
]


def jpeg(image: np.ndarray, mode: str = "RGB", **options) -> bytes:
    file = io.BytesIO()
    Image.fromarray(image).convert(mode).save(file, "JPEG", **options)
    return file.getvalue()


def noise(height: int, width: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)


def timm_pixels(file, image_size, crop_fraction, interpolation, crop_mode) -> np.ndarray:
    transform = create_transform(
        image_size,
        is_training=False,
        interpolation=interpolation,
        crop_pct=crop_fraction,
        crop_mode=crop_mode,
        mean=(0, 0, 0),
        std=(1, 1, 1),
    )
    tensor = transform(Image.open(file).convert("RGB"))
    return (tensor.numpy() * 255).round().astype(np.uint8).transpose(1, 2, 0)


def difference(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return np.abs(a.astype(int) - b.astype(int))


@pytest.mark.parametrize("setting", SETTINGS, ids=str)
def test_eval_image_equals_timm_on_imagenet_samples(setting):
    if not SAMPLES.is_dir():
        pytest.skip("the ImageNet samples are not next to this repository")
    files = sorted(SAMPLES.iterdir())
    assert len(files) == 100
    differences = np.stack(
        [difference(eval_image(file, *setting), timm_pixels(file, *setting)) for file in files]
    )
    print(f"{setting}: max {differences.max()}, mean {differences.mean()} over {len(files)} images")
    assert differences.max() == 0


@pytest.mark.parametrize("setting", SETTINGS, ids=str)
@pytest.mark.parametrize("file", ["coffee.jpg", "rocket.jpg", "chelsea.png"])
def test_eval_image_equals_timm_on_our_images(file, setting):
    np.testing.assert_array_equal(eval_image(IMAGES / file, *setting), timm_pixels(IMAGES / file, *setting))


@pytest.mark.parametrize(
    "content",
    [
        jpeg(noise(90, 131), "L"),
        jpeg(noise(131, 90), "CMYK"),
        jpeg(noise(131, 90), subsampling=0),
        jpeg(noise(90, 131), subsampling=1),
        jpeg(noise(200, 131), progressive=True),
        jpeg(noise(90, 131), exif=b"Exif\0\0MM\0*\0\0\0\x08\0\x01\x01\x12\0\x03\0\0\0\x01\0\x06\0\0\0\0\0\0"),
        jpeg(noise(1, 1)),
        jpeg(noise(1, 300)),
        jpeg(noise(300, 2)),
        jpeg(noise(700, 40)),
    ],
    ids=["grayscale", "cmyk", "444", "422", "progressive", "exif", "1x1", "1x300", "300x2", "tall"],
)
def test_eval_image_equals_timm_on_other_kinds_of_jpeg(content):
    for setting in SETTINGS:
        np.testing.assert_array_equal(
            eval_image(content, *setting), timm_pixels(io.BytesIO(content), *setting), str(setting)
        )


def test_eval_image_takes_a_png_named_jpeg(tmp_path):
    path = tmp_path / "n02105855_2933.JPEG"  # such a file is in ImageNet's training set
    path.write_bytes((IMAGES / "chelsea.png").read_bytes())
    np.testing.assert_array_equal(eval_image(path, 224), eval_image(IMAGES / "chelsea.png", 224))


def test_eval_image_takes_a_scale_size_below_the_crop():
    expected = preprocess.preprocess_image(
        preprocess.read_image(IMAGES / "coffee.jpg"), Preprocessing(224, resize_size=160)
    )
    np.testing.assert_array_equal(eval_image(IMAGES / "coffee.jpg", 224, resize_size=160), expected)
    assert not expected[:20].any()  # padded


def test_eval_image_says_what_is_wrong(tmp_path):
    with pytest.raises(
        preprocess.ImageError, match=r"Expected an image file at '.*none\.jpg', but nothing is"
    ):
        eval_image(tmp_path / "none.jpg", 224)
    with pytest.raises(preprocess.ImageError, match=r"'5 bytes' is not one .* begins with the text 'hello'"):
        eval_image(b"hello", 224)
    content = (IMAGES / "coffee.jpg").read_bytes()
    with pytest.raises(preprocess.ImageError, match="truncated or corrupt"):
        eval_image(content[: len(content) // 2], 224)
    with pytest.raises(ValueError, match=r"Unknown interpolation 'lanczos'\. Known: bicubic, bilinear"):
        eval_image(content, 224, interpolation="lanczos")
    with pytest.raises(ValueError, match=r"Unknown crop_mode 'border'\. Known: center, squash"):
        eval_image(content, 224, crop_mode="border")


def test_a_header_of_too_many_pixels_is_refused_before_anything_is_allocated():
    content = bytearray(jpeg(noise(16, 16)))
    at = content.index(b"\xff\xc0") + 5
    content[at : at + 4] = b"\xff\xfa\xff\xfa"  # 65,530 x 65,530
    with pytest.raises(preprocess.ImageError, match="decompression bomb"):
        eval_image(bytes(content), 224)


@pytest.fixture(scope="module")
def resized():
    return tf.function(resize, reduce_retracing=True)


@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
def test_resize_equals_pillow_on_noise_of_any_size(interpolation, resized):
    """Noise is the hardest picture: every rounding shows. Sizes go up, down and both ways."""
    generator = np.random.default_rng(7)
    for _ in range(60):
        height, width = (int(size) for size in generator.integers(1, 420, 2))
        image = noise(height, width, seed=height)
        expected = Image.fromarray(image).resize((112, 96), RESAMPLING[interpolation])
        received = resized(image, False, image_size=(96, 112), interpolation=interpolation, dtype=tf.float64)
        np.testing.assert_array_equal(received, expected, f"{height} x {width}")


def test_resize_flips_after_resizing(resized):
    image = noise(70, 90)
    plain, flipped = (
        resized(image, flip, image_size=(50, 51), interpolation="bicubic").numpy() for flip in (False, True)
    )
    np.testing.assert_array_equal(flipped, plain[:, ::-1])


def test_the_order_of_the_passes_is_seen(monkeypatch):
    """Negative control: with columns always first, an image that Pillow 13 resizes by rows first differs."""
    image = noise(400, 230)
    expected = Image.fromarray(image).resize((224, 224), Image.Resampling.BICUBIC)
    monkeypatch.setattr(jpeg_module, "_PILLOW_CHOOSES_ORDER", not jpeg_module._PILLOW_CHOOSES_ORDER)
    received = resize(image, False, image_size=(224, 224), interpolation="bicubic", dtype=tf.float64)
    assert difference(received.numpy(), np.asarray(expected)).max() > 0


@pytest.mark.parametrize(
    "naive",
    [
        lambda x: tf.image.resize(x, (224, 224), "bicubic", antialias=True),
        lambda x: tf.image.resize(x, (224, 224), "bicubic"),
    ],
    ids=["one rounding", "no antialiasing"],
)
def test_tensorflows_own_resizing_differs(naive):
    image = preprocess.read_image(IMAGES / "coffee.jpg")
    expected = np.asarray(Image.fromarray(image).resize((224, 224), Image.Resampling.BICUBIC))
    received = tf.cast(tf.clip_by_value(tf.round(naive(image)), 0, 255), tf.uint8).numpy()
    assert difference(received, expected).max() > 0


def test_tensorflows_default_decoding_differs():
    content = (IMAGES / "coffee.jpg").read_bytes()
    image = np.asarray(Image.open(io.BytesIO(content)).convert("RGB"))
    assert difference(tf.io.decode_jpeg(content, channels=3).numpy(), image).max() > 0


@pytest.mark.parametrize("flip", [False, True])
@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
def test_random_resized_crop_equals_pillow_but_for_roundings(flip, interpolation):
    content = (IMAGES / "rocket.jpg").read_bytes()
    image = Image.open(io.BytesIO(content)).convert("RGB")
    crops = plan_crop(np.random.default_rng(3).random((8, 22)))
    for crop in crops:
        top, left, height, width = (int(v) for v in crop_box((image.height, image.width), crop))
        box = image.crop((left, top, left + width, top + height)).resize(
            (224, 224), RESAMPLING[interpolation]
        )
        expected = np.asarray(box)[:, ::-1] if flip else np.asarray(box)
        received = random_resized_crop(
            content, crop, flip, image_size=(224, 224), interpolation=interpolation
        )
        levels = difference(received.numpy(), expected)
        assert levels.max() <= 1 and (levels > 0).mean() < 5e-3
        shifted = difference(np.roll(expected, 1, axis=1), expected)  # control: one pixel to the side
        assert shifted.max() > 1


@pytest.mark.parametrize(
    "size", [(375, 500), (500, 20), (20, 500), (1, 1), (2000, 3)], ids=lambda size: "{}x{}".format(*size)
)
def test_boxes_lie_in_the_image_and_are_distributed_as_in_timm(size):
    image = Image.new("RGB", (size[1], size[0]))
    random.seed(0)
    draw = RandomResizedCropAndInterpolation.get_params
    peer = np.array([draw(image, (0.08, 1.0), (3 / 4, 4 / 3)) for _ in range(2000)])
    uniforms = np.random.default_rng(0).random((2000, 22))

    @tf.function
    def boxes(crops):
        return tf.map_fn(lambda crop: tf.stack(crop_box(size, crop)), crops, tf.int32)

    ours = boxes(plan_crop(uniforms)).numpy()
    assert (ours[:, :2] >= 0).all() and (ours[:, 2:] >= 1).all() and (ours[:, :2] + ours[:, 2:] <= size).all()
    if min(size) < 20:
        return  # timm's boxes may have no pixel then
    assert largest_distance(ours, peer) < 0.06  # 0.0617 is the 0.1 % point of Kolmogorov-Smirnov at n = 2,000
    if size == (375, 500):
        other = boxes(plan_crop(uniforms, scale=(0.2, 1.0))).numpy()
        assert largest_distance(other, peer) > 0.06


def largest_distance(a: np.ndarray, b: np.ndarray) -> float:
    """Return the largest Kolmogorov-Smirnov distance between the columns of two samples."""
    distances = []
    for x, y in zip(a.T, b.T, strict=True):
        points = np.union1d(x, y)
        below = [np.searchsorted(np.sort(v), points, side="right") / len(v) for v in (x, y)]
        distances.append(np.abs(below[0] - below[1]).max())
    return max(distances)
