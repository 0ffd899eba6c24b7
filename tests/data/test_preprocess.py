"""Reading, resizing and cropping images, bit for bit against timm and torchvision."""

import contextlib
import csv
import io
import math
import os
import random
import socket
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, features

from keras_convnext import _terminal
from keras_convnext.data import preprocess
from keras_convnext.data.preprocess import (
    ImageError,
    decode_image,
    find_images,
    preprocess_image,
    read_image,
    tell_orientation,
)
from keras_convnext.data.preprocessing import CROP_MODES, INTERPOLATIONS, Preprocessing

pytestmark = pytest.mark.once

IMAGES = Path(__file__).parents[1] / "images"
SHARED = Path(__file__).resolve().parents[3] / "shared" / "data"
PHOTOGRAPH_FOLDERS = {
    "tests": IMAGES,
    "reference_outputs": SHARED / "reference_outputs" / "images",
    "imagenet_samples": SHARED / "imagenet_samples" / "images",
}

# image_size, crop_fraction, crop_mode, interpolation
TIMM_SETTINGS = [
    (224, 0.875, "center", "bicubic"),
    (224, 0.95, "center", "bicubic"),
    (288, 1.0, "center", "bicubic"),
    (160, 0.95, "center", "bicubic"),
    (224, 0.875, "center", "bilinear"),
    (384, 1.0, "squash", "bicubic"),
    (224, 0.9, "squash", "bilinear"),
    ((192, 256), 0.9, "center", "bicubic"),
    ((256, 161), 1.0, "center", "bilinear"),
    ((160, 224), 0.875, "squash", "bicubic"),
]
# image_size, resize_size: torchvision's ConvNeXt tiny, small, base and large; then two that pad
TORCHVISION_SETTINGS = [(224, 236), (224, 230), (224, 232), (224, 200), (225, 200)]

# (height, width): square, tall, wide, odd, smaller than every target, one pixel wide
SIZES = [
    (224, 224),
    (256, 256),
    (257, 255),
    (375, 500),
    (500, 375),
    (333, 501),
    (900, 211),
    (211, 900),
    (97, 61),
    (61, 97),
    (7, 1),
    (1, 1),
]


def prepare(image, **fields):
    return preprocess_image(image, Preprocessing(**fields))


def timm_preprocess(image, image_size, crop_fraction, crop_mode, interpolation):
    """Run timm's evaluation transform up to its conversion to a tensor."""
    from timm.data import create_transform

    transform = create_transform(
        image_size,
        is_training=False,
        crop_pct=crop_fraction,
        crop_mode=crop_mode,
        interpolation=interpolation,
    )
    names = [type(step).__name__ for step in transform.transforms]
    assert names[-2:] == ["MaybeToTensor", "Normalize"]
    result = Image.fromarray(image)
    for step in transform.transforms[:-2]:
        result = step(result)
    return np.asarray(result)


def torchvision_preprocess(image, image_size, resize_size):
    """Run torchvision's preset with a normalisation that changes nothing, and scale back."""
    from torchvision.transforms._presets import ImageClassification

    preset = ImageClassification(
        crop_size=image_size, resize_size=resize_size, mean=(0.0,) * 3, std=(1.0,) * 3
    )
    pixels = preset(Image.fromarray(image)).numpy().transpose(1, 2, 0) * 255
    result = np.rint(pixels).astype(np.uint8)
    np.testing.assert_allclose(result, pixels, atol=1e-4)  # the scaling lost nothing
    return result


def noise(height, width):
    return np.random.default_rng([height, width]).integers(0, 256, (height, width, 3), dtype=np.uint8)


def photograph_paths(folder_name):
    folder = PHOTOGRAPH_FOLDERS[folder_name]
    if not folder.is_dir():
        pytest.skip(f"{folder_name} is not next to this checkout")
    if folder_name != "imagenet_samples":
        return find_images(folder)
    with open(folder.parent / "labels.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    grayscale = [row["file"] for row in rows if row["mode"] == "L"]
    colour = [row["file"] for row in rows if row["mode"] == "RGB"]
    assert len(grayscale) == 4
    return [folder / name for name in grayscale + colour[:: len(colour) // 8][:8]]


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("settings", TIMM_SETTINGS, ids=str)
def test_preprocess_image_equals_timm_on_noise(settings, size):
    image_size, crop_fraction, crop_mode, interpolation = settings
    result = prepare(
        noise(*size),
        image_size=image_size,
        crop_fraction=crop_fraction,
        crop_mode=crop_mode,
        interpolation=interpolation,
    )
    expected = timm_preprocess(noise(*size), *settings)
    assert result.dtype == np.uint8
    assert result.shape[:2] == (image_size if isinstance(image_size, tuple) else (image_size,) * 2)
    np.testing.assert_array_equal(result, expected)


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("settings", TORCHVISION_SETTINGS, ids=str)
def test_preprocess_image_equals_torchvision_on_noise(settings, size):
    image_size, resize_size = settings
    result = prepare(noise(*size), image_size=image_size, resize_size=resize_size, interpolation="bilinear")
    np.testing.assert_array_equal(result, torchvision_preprocess(noise(*size), *settings))


@pytest.mark.parametrize("folder_name", PHOTOGRAPH_FOLDERS)
def test_preprocess_image_equals_timm_and_torchvision_on_photographs(folder_name):
    for path in photograph_paths(folder_name):
        image = read_image(path)
        for settings in TIMM_SETTINGS[:7]:
            image_size, crop_fraction, crop_mode, interpolation = settings
            result = prepare(
                image,
                image_size=image_size,
                crop_fraction=crop_fraction,
                crop_mode=crop_mode,
                interpolation=interpolation,
            )
            expected = timm_preprocess(image, *settings)
            np.testing.assert_array_equal(result, expected, err_msg=f"{path.name} {settings}")
        for settings in TORCHVISION_SETTINGS:
            image_size, resize_size = settings
            result = prepare(image, image_size=image_size, resize_size=resize_size, interpolation="bilinear")
            expected = torchvision_preprocess(image, *settings)
            np.testing.assert_array_equal(result, expected, err_msg=f"{path.name} {settings}")


def test_defaults_are_timm_defaults_with_bicubic():
    image = read_image(IMAGES / "rocket.jpg")
    expected = timm_preprocess(image, 224, None, "center", "bicubic")
    np.testing.assert_array_equal(prepare(image, image_size=224), expected)


def test_resize_size_overrides_crop():
    image = noise(300, 400)
    results = [prepare(image, image_size=224, crop_fraction=crop, resize_size=236) for crop in (0.5, 1.0)]
    np.testing.assert_array_equal(*results)


def test_padding_is_black_and_its_odd_pixel_is_last():
    image = np.full((300, 300, 3), 255, np.uint8)
    result = prepare(image, image_size=7, resize_size=4)
    expected = np.pad(np.full((4, 4, 3), 255), [(1, 2), (1, 2), (0, 0)])
    np.testing.assert_array_equal(result, expected)


def test_preprocess_image_returns_a_writable_copy():
    image = noise(224, 224)
    result = prepare(image, image_size=224, crop_fraction=1.0)
    result[:] = 0
    np.testing.assert_array_equal(image, noise(224, 224))


def test_preprocess_image_accepts_strided_views():
    image = noise(300, 400)[::-1, ::2]
    expected = prepare(np.ascontiguousarray(image), image_size=64)
    np.testing.assert_array_equal(prepare(image, image_size=64), expected)


def naive_preprocess(
    image,
    resample=Image.Resampling.BICUBIC,
    rounded_long_side=int,
    rounded_offset=round,
    rounded_scale=math.floor,
):
    """224 / 0.95 written as a straight line, with the choices that implementations differ in."""
    height, width = image.shape[:2]
    short, scale = min(height, width), rounded_scale(224 / 0.95)
    height, width = (rounded_long_side(scale * side / short) for side in (height, width))
    if resample == "no_antialias":
        tensor = torch.from_numpy(image.transpose(2, 0, 1)[None].astype(np.float32))
        resized = torch.nn.functional.interpolate(
            tensor, size=(height, width), mode="bicubic", antialias=False
        )
        resized = resized.round().clamp(0, 255)[0].numpy().transpose(1, 2, 0).astype(np.uint8)
    else:
        resized = np.asarray(Image.fromarray(image).resize((width, height), resample))
    top, left = rounded_offset((height - 224) / 2), rounded_offset((width - 224) / 2)
    return resized[top : top + 224, left : left + 224]


# 500 x 375 becomes 313 x 235 (313.3): an offset of 44.5, rounded to the even 44, and one of 5.5,
# rounded to the even 6, so that rounding down and rounding half up both differ from it.
# 500 x 393 becomes 298 x 235 (298.98).
@pytest.mark.parametrize(
    ("size", "change"),
    [
        ((500, 375), {"resample": Image.Resampling.BILINEAR}),
        ((500, 375), {"resample": Image.Resampling.NEAREST}),
        ((500, 375), {"resample": Image.Resampling.LANCZOS}),
        ((500, 375), {"resample": "no_antialias"}),
        ((500, 375), {"rounded_offset": math.floor}),
        ((500, 375), {"rounded_offset": lambda offset: math.floor(offset + 0.5)}),
        ((500, 393), {"rounded_long_side": round}),
        ((500, 375), {"rounded_scale": round}),
    ],
    ids=[
        "bilinear",
        "nearest",
        "lanczos",
        "no_antialias",
        "offset_rounded_down",
        "offset_rounded_half_up",
        "long_side_rounded",
        "scale_rounded",
    ],
)
@pytest.mark.parametrize("content", ["noise", "photograph"])
def test_one_wrong_choice_changes_pixels(content, size, change):
    image = noise(*size)
    if content == "photograph":
        photograph = Image.open(IMAGES / "chelsea.png")
        image = np.asarray(photograph.resize(size[::-1]))
    result = prepare(image, image_size=224, crop_fraction=0.95)
    np.testing.assert_array_equal(result, naive_preprocess(image))
    wrong = naive_preprocess(image, **change)
    difference = np.abs(result.astype(int) - wrong.astype(int))
    assert wrong.shape == result.shape
    # Right is equal, so any difference separates; the closest, Lanczos, has 35 % and 7.
    assert np.mean(difference > 0) > 0.25
    assert difference.max() > 4


def save_image_variants(folder):
    """Save one image for each kind of file that is not plain RGB; return their names."""
    colour = Image.open(IMAGES / "chelsea.png").resize((61, 40))
    gradient = np.linspace(0, 255, 61 * 40).reshape(40, 61).astype(np.uint8)
    transparent = colour.copy()
    transparent.putalpha(Image.fromarray(gradient))
    rotated = Image.Exif()
    rotated[0x0112] = 6  # the orientation tag: turn by 90 degrees to view
    colour.save(folder / "rgb.jpg")
    colour.save(folder / "rotated.jpg", exif=rotated)
    colour.convert("L").save(folder / "grayscale.jpg")
    colour.convert("CMYK").save(folder / "cmyk.jpg")
    colour.convert("P").save(folder / "palette.png")
    colour.convert("1").save(folder / "bilevel.png")
    transparent.save(folder / "transparent.png")
    transparent.convert("LA").save(folder / "grayscale_alpha.png")
    return {
        "rgb.jpg": "RGB",
        "rotated.jpg": "RGB",
        "grayscale.jpg": "L",
        "cmyk.jpg": "CMYK",
        "palette.png": "P",
        "bilevel.png": "1",
        "transparent.png": "RGBA",
        "grayscale_alpha.png": "LA",
    }


def test_read_image_equals_timm_dataset_for_every_kind_of_file(tmp_path):
    from timm.data import ImageDataset

    (tmp_path / "class_0").mkdir()
    modes = save_image_variants(tmp_path / "class_0")
    dataset = ImageDataset(str(tmp_path))
    assert len(dataset) == len(modes)
    for index in range(len(dataset)):
        name = dataset.filename(index, basename=True)
        path = tmp_path / "class_0" / name
        with Image.open(path) as image:
            assert image.mode == modes[name]
        result = read_image(path)
        assert (result.dtype, result.shape) == (np.uint8, (40, 61, 3)), name
        np.testing.assert_array_equal(result, np.asarray(dataset[index][0]), err_msg=name)


def test_read_image_treats_unusual_files_as_documented(tmp_path):
    save_image_variants(tmp_path)
    original = np.asarray(Image.open(IMAGES / "chelsea.png").resize((61, 40)))

    np.testing.assert_array_equal(read_image(tmp_path / "transparent.png"), original)
    np.testing.assert_array_equal(read_image(tmp_path / "rotated.jpg"), read_image(tmp_path / "rgb.jpg"))
    gray = read_image(tmp_path / "grayscale.jpg")
    np.testing.assert_array_equal(gray, np.repeat(gray[:, :, :1], 3, axis=2))


def test_read_image_takes_the_first_frame_of_an_animation(tmp_path):
    frames = [Image.new("RGB", (5, 4), colour) for colour in ("red", "blue")]
    frames[0].save(tmp_path / "moving.gif", save_all=True, append_images=frames[1:])
    assert read_image(tmp_path / "moving.gif")[0, 0].tolist() == [255, 0, 0]


def test_read_image_returns_a_writable_array():
    assert read_image(str(IMAGES / "rocket.jpg")).flags.writeable


def image_error(function, *arguments):
    with pytest.raises(ImageError) as caught:
        function(*arguments)
    return str(caught.value)


def test_read_image_reports_a_missing_file(tmp_path):
    assert image_error(read_image, tmp_path / "cat.jpg") == (
        f"Expected an image file at '{tmp_path / 'cat.jpg'}', but nothing is there. Check the path."
    )


def test_read_image_reports_a_folder(tmp_path):
    assert image_error(read_image, tmp_path) == (
        f"Expected an image file, received the folder '{tmp_path}'. List the images in it with find_images."
    )


def test_read_image_reports_missing_permission(tmp_path, monkeypatch):
    path = tmp_path / "cat.jpg"
    path.write_bytes(b"")

    def refuse(self):
        raise PermissionError(13, "Permission denied", str(self))

    monkeypatch.setattr(Path, "read_bytes", refuse)  # root may read what chmod forbids
    assert image_error(read_image, path) == (
        f"Expected a readable image file, but this user may not read '{path}'. "
        "Change its permissions or those of its folder."
    )


def test_read_image_reports_a_failing_disk(tmp_path, monkeypatch):
    path = tmp_path / "cat.jpg"
    path.write_bytes(b"")

    def fail(self):
        raise OSError(5, "Input/output error", str(self))

    monkeypatch.setattr(Path, "read_bytes", fail)
    assert image_error(read_image, path) == (
        f"Expected a readable image file, but reading '{path}' failed: Input/output error. "
        "Check the path and the disk."
    )


@pytest.mark.parametrize(
    ("content", "description"),
    [
        (b"", "the file is empty"),
        (b"hello, I am a note\n", r"it begins with the text 'hello, I am a note\n'"),
        ("é".encode() * 30, f"it begins with the text '{'é' * 20}'"),
        (("a" + "é" * 30).encode(), f"it begins with the text 'a{'é' * 19}'"),
        (b"\x00\x01\x02" * 9, "it begins with the bytes 00 01 02 00 01 02 00 01 02 00 01 02"),
        (b"\xff\xd8\xff\xe0", "it begins with the bytes ff d8 ff e0"),
    ],
    ids=["empty", "text", "accents", "cut_accent", "binary", "jpeg_cut_in_its_header"],
)
def test_read_image_shows_the_start_of_a_file_that_is_not_an_image(tmp_path, content, description):
    path = tmp_path / "cat.jpg"
    path.write_bytes(content)
    assert image_error(read_image, path) == (
        f"Expected an image, but '{path}' is not one or its header is damaged: {description}. "
        "Pass a JPEG, PNG, WebP, BMP, GIF or TIFF file."
    )


@pytest.mark.parametrize("name", ["rocket.jpg", "chelsea.png"])
def test_read_image_reports_a_truncated_file(tmp_path, name):
    path = tmp_path / name
    path.write_bytes((IMAGES / name).read_bytes()[:50_000])
    message = image_error(read_image, path)
    assert message.startswith(f"Expected a complete image, but '{path}' is truncated or corrupt: ")
    assert "truncated" in message.partition("corrupt: ")[2]
    assert message.endswith(". Download or export it again.")


def test_read_image_reports_a_corrupt_file(tmp_path):
    path = tmp_path / "cat.png"
    content = bytearray((IMAGES / "chelsea.png").read_bytes())
    start = content.index(b"IDAT") + 4
    content[start : start + 4] = b"\xff\xff\xff\xff"
    path.write_bytes(content)
    message = image_error(read_image, path)
    assert message.startswith(f"Expected a complete image, but '{path}' is truncated or corrupt: ")


def test_read_image_reports_a_decompression_bomb(monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    path = IMAGES / "chelsea.png"
    message = image_error(read_image, path)
    assert message.startswith(
        f"Expected an image of at most 2000 pixels, but '{path}' declares more and may be a "
        "decompression bomb. Reduce it, or raise PIL.Image.MAX_IMAGE_PIXELS if it is trusted. "
        "Pillow says: Image size (135300 pixels) exceeds limit"
    )


def encoded(image, format_name, **options):
    content = io.BytesIO()
    image.save(content, format_name, **options)
    return content.getvalue()


@pytest.fixture
def notes(monkeypatch, capsys):
    """Returns a function that gives what was told on stderr since its last call, as at the start of a run."""
    monkeypatch.delenv("KERAS_CONVNEXT_QUIET", raising=False)

    def notes():
        _terminal._said.clear()
        return capsys.readouterr().err

    notes()
    yield notes
    _terminal._said.clear()


RAMP = np.linspace(0, 1, 64 * 64).reshape(64, 64)


@pytest.mark.parametrize(
    ("values", "format_name", "told"),
    [
        ((RAMP * 65535).astype(np.uint16), "PNG", "16-bit numbers, here from 0 to 65535"),
        ((RAMP * 65535).astype(np.uint16), "TIFF", "scaled from 0 to 65535 to 0 to 255"),
        ((RAMP * 65535).astype(">u2"), "TIFF", "scaled from 0 to 65535"),
        ((RAMP * (2**31 - 1)).astype(np.int32), "TIFF", "32-bit numbers, here from 0 to 2.14748e+09"),
        (RAMP.astype(np.float32), "TIFF", "floating-point numbers, here from 0 to 1: they are scaled"),
    ],
    ids=["uint16_png", "uint16_tiff", "big_endian", "int32", "float"],
)
def test_grayscale_of_other_types_is_scaled_by_their_range_and_told_once(notes, values, format_name, told):
    content = encoded(Image.fromarray(values), format_name)
    result = decode_image(content, "scan.tif")
    np.testing.assert_allclose(result[:, :, 0], RAMP * 255, atol=1)
    assert (result == result[:, :, :1]).all()
    decode_image(content, "other.tif")
    text = notes()
    assert text.startswith("note: 'scan.tif' has ") and told in text and text.count("\n") == 1


def unsigned_tiff(values, bits, photometric=1):
    """A TIFF of one strip of little-endian whole numbers without sign."""
    height, width = values.shape
    data = values.tobytes()
    entries = [(256, width), (257, height), (258, bits), (259, 1), (262, photometric), (273, 8), (277, 1)]
    entries += [(278, height), (279, len(data)), (339, 1)]
    ifd = struct.pack("<H", len(entries)) + b"".join(struct.pack("<HHII", tag, 4, 1, v) for tag, v in entries)
    return b"II*\0" + struct.pack("<I", 8 + len(data)) + data + ifd + b"\0\0\0\0"


def test_numbers_without_sign_and_white_that_is_zero_are_read_as_they_are_meant():
    values = np.arange(256, dtype=np.uint32).reshape(16, 16)
    full = decode_image(unsigned_tiff(values << 24, 32), "a.tif")
    np.testing.assert_array_equal(full[:, :, 0], values)
    inverted = decode_image(unsigned_tiff((values << 8).astype("<u2"), 16, photometric=0), "a.tif")
    np.testing.assert_array_equal(inverted[:, :, 0], 255 - values)


@pytest.mark.parametrize(
    ("values", "received"),
    [
        ((RAMP * 65535).astype(np.int32), "0 to 65535"),  # 16 bits in 32: scaled it would be black
        ((RAMP * 255).astype(np.uint16), "0 to 255"),
        ((RAMP * 255).astype(np.float32), "0 to 255"),
        (RAMP.astype(np.float32) - 0.5, "-0.5 to 0.5"),
        (np.where(RAMP > 0.5, np.nan, RAMP).astype(np.float32), "nan to nan"),
        (np.where(RAMP > 0.5, np.inf, RAMP).astype(np.float32), "0 to inf"),
        (-(RAMP * 2000).astype(np.int32), "-2000 to 0"),
    ],
    ids=["int32_of_16_bits", "uint16_of_8_bits", "float_255", "negative", "nan", "inf", "hounsfield"],
)
def test_numbers_whose_scale_is_not_known_are_an_error(values, received):
    message = image_error(decode_image, encoded(Image.fromarray(values), "TIFF"), "scan.tif")
    assert f"in 'scan.tif', the range of its type, received {received}: its scale is not known" in message


def colours_of_16_bits(values):
    """A PNG of uint16 (H, W, 3), which Pillow reads and does not write."""
    height, width, _ = values.shape
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)
    parts = (
        (b"IHDR", struct.pack(">IIBBBBB", width, height, 16, 2, 0, 0, 0)),
        (b"IDAT", zlib.compress(rows)),
        (b"IEND", b""),
    )
    chunks = (
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        for kind, data in parts
    )
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks)


def test_colours_of_16_bits_are_scaled_and_told_and_small_ones_are_an_error(notes):
    values = np.arange(48, dtype=np.uint16).reshape(4, 4, 3) * 1300
    np.testing.assert_array_equal(decode_image(colours_of_16_bits(values), "a.png"), values >> 8)
    assert "'a.png' has 16-bit colours: they are scaled from 0 to 65535" in notes()
    message = image_error(decode_image, colours_of_16_bits(values // 300), "b.png")
    assert "from 0 to 65535 in 'b.png', received none above 255" in message


def test_a_black_image_of_another_type_is_black():
    assert not decode_image(encoded(Image.fromarray(np.zeros((4, 4), np.uint16)), "PNG"), "a.png").any()


def test_transparency_and_orientation_are_told_once_and_only_when_met(notes):
    red, turned = Image.new("RGB", (8, 4), "red"), Image.Exif()
    turned[0x0112] = 6
    upright = Image.Exif()
    upright[0x0112] = 1
    for content in (
        encoded(red, "JPEG"),
        encoded(red, "JPEG", exif=upright),
        encoded(red.convert("RGBA"), "PNG"),  # opaque
        encoded(red, "TIFF", exif=turned),  # Pillow turns it
    ):
        decode_image(content, "plain")
    assert notes() == ""
    for format_name in ("JPEG", "PNG", "WEBP"):
        for name in ("first", "second"):
            decode_image(encoded(red, format_name, exif=turned), name)
        text = notes()
        assert text.startswith("note: 'first' is stored turned or mirrored (EXIF orientation 6)")
        assert text.count("\n") == 1
    for image, options in (
        (Image.new("RGBA", (8, 4), (255, 0, 0, 100)), {}),
        (Image.new("LA", (8, 4), (255, 0)), {}),
        (red.convert("P"), {"transparency": 0}),
        (red, {"transparency": (255, 0, 0)}),
    ):
        decode_image(encoded(image, "PNG", **options), "first")
        assert notes().startswith("note: 'first' has transparent pixels. The alpha channel is dropped")


@pytest.mark.parametrize(
    "exif", [b"", b"II", b"Exif\0\0", b"Exif\0\0MM\0*\xff\xff\xff\xff", b"II*\0" + b"\xff" * 99]
)
def test_damaged_exif_data_is_no_damage_to_the_image(notes, exif):
    tell_orientation(exif, lambda: "a.jpg")
    assert notes() == ""


def test_only_a_closed_list_of_formats_is_opened(monkeypatch):
    """EPS makes Pillow start a program: `gs`."""
    started = []
    monkeypatch.setattr("subprocess.check_call", started.append)
    red = Image.new("RGB", (32, 32), "red")
    for format_name in ("EPS", "PPM", "ICO", "TGA", "PCX", "DDS", *(["AVIF"] * features.check("avif"))):
        content = encoded(red, format_name)
        with Image.open(io.BytesIO(content)) as image:  # Pillow would
            assert image.size == (32, 32)
        assert "is not one or its header" in image_error(decode_image, content, "cat.jpg")
    assert not started
    for format_name in ("JPEG", "MPO", "PNG", "WEBP", "BMP", "GIF", "TIFF"):
        assert decode_image(encoded(red, format_name), "cat.jpg").shape == (32, 32, 3)


@pytest.mark.parametrize("kind", [RuntimeError, MemoryError, ZeroDivisionError, AttributeError, Exception])
def test_whatever_a_decoder_raises_is_a_damaged_image(monkeypatch, kind):
    def fail(*_):
        raise kind("frame 0")

    content = encoded(Image.new("RGB", (4, 4)), "PNG")
    monkeypatch.setattr("PIL.PngImagePlugin.PngImageFile.load", fail)
    message = image_error(decode_image, content, "cat.png")
    assert f"'cat.png' is truncated or corrupt: {kind.__name__}: frame 0. Download" in message


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs named pipes")
def test_only_regular_files_of_bounded_size_are_read(tmp_path):
    os.mkfifo(tmp_path / "pipe.jpg")
    (tmp_path / "zero.jpg").symlink_to("/dev/zero")
    with socket.socket(socket.AF_UNIX) as listener, contextlib.chdir(tmp_path):
        listener.bind("socket.jpg")
    with open(tmp_path / "huge.jpg", "wb") as file:
        file.truncate(1 << 40)
    for name, said in (
        ("pipe", "pipe"),
        ("zero", "device"),
        ("socket", "socket"),
        ("huge", "takes 1099.5 GB"),
    ):
        assert said in image_error(read_image, tmp_path / f"{name}.jpg")


LONG = [(1, 900), (900, 1), (2, 601), (333, 7), (40, 60)]


@pytest.mark.parametrize("size", LONG, ids=str)
@pytest.mark.parametrize("settings", TIMM_SETTINGS[:1] + TIMM_SETTINGS[4:8], ids=str)
def test_the_part_that_is_cut_out_alone_is_within_a_level(monkeypatch, settings, size):
    names = ("image_size", "crop_fraction", "crop_mode", "interpolation")
    fields = dict(zip(names, settings, strict=True))
    whole = prepare(noise(*size), **fields)
    padded = prepare(noise(*size), image_size=225, resize_size=200)
    monkeypatch.setattr(preprocess, "LARGE", 0)
    for part, of in (
        (prepare(noise(*size), **fields), whole),
        (prepare(noise(*size), image_size=225, resize_size=200), padded),
    ):
        assert part.shape == of.shape and np.abs(part.astype(int) - of).mean() < 0.6
        assert np.abs(part[::-1, ::-1].astype(int) - of).mean() > 0.6


@pytest.mark.parametrize("size", [(1, 40_000), (65_500, 1), (2, 1_000_001)], ids=str)
def test_a_long_picture_is_not_resized_as_a_whole(monkeypatch, size):
    resize, sizes = Image.Image.resize, []

    def noted(image, size, *arguments, **options):
        sizes.append(size)
        return resize(image, size, *arguments, **options)

    monkeypatch.setattr(Image.Image, "resize", noted)
    image = Image.new("RGB", size, (9, 200, 30))
    assert (preprocess.prepared(image, Preprocessing(224)) == (9, 200, 30)).all()
    preprocess.prepared(Image.new("RGB", (300, 200)), Preprocessing(224))
    assert sizes == [(224, 224), (384, 256)]


@pytest.mark.parametrize(
    ("format_name", "mode", "options", "a_pixel"),
    [
        ("PNG", "RGB", {}, 4),
        ("JPEG", "RGB", {}, 4),
        ("PNG", "RGBA", {}, 9),
        ("PNG", "L", {}, 6),
        ("JPEG", "RGB", {"progressive": True}, 10),
        ("JPEG", "CMYK", {}, 9),
        ("WEBP", "RGB", {}, 18),
        ("TIFF", "L", {}, 12),
    ],
)
def test_the_memory_of_an_image_is_estimated_before_it_is_decoded(
    monkeypatch, format_name, mode, options, a_pixel
):
    content, asked = encoded(Image.new(mode, (100, 100)), format_name, **options), []
    monkeypatch.setattr(preprocess, "check_bytes", lambda *words: asked.append(words))
    decode_image(content, "a")
    what = f"'a' of 100 x 100 pixels ({format_name}, {mode})"
    assert asked == [(len(content) + 10_000 * a_pixel + 1600, what, ImageError)]


def test_an_image_that_takes_too_much_memory_is_refused(monkeypatch):
    content = encoded(Image.new("RGB", (1000, 1000)), "WEBP")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1 << 20)  # of which Pillow opens twice as many
    assert image_error(decode_image, content, "a") == (
        "Expected an image that takes at most 6.3 MB of memory, but 'a' of 1000 x 1000 pixels (WEBP, RGB) "
        "takes 18.0 MB. Reduce it, or raise PIL.Image.MAX_IMAGE_PIXELS if it is trusted."
    )
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)
    assert decode_image(content, "a.jpg").shape == (1000, 1000, 3)


def test_a_jpeg_of_thousands_of_scans_is_refused():
    """65 bytes are one more pass over all pixels: a megabyte takes minutes."""
    content = encoded(Image.new("L", (64, 64), 77), "JPEG", progressive=True)
    start = content.rindex(b"\xff\xda")
    many = content[:-2] + content[start:-2] * 1000 + content[-2:]
    assert decode_image(content, "a.jpg").shape == (64, 64, 3)
    assert "Expected some ten scans in 'a.jpg', received 10" in image_error(decode_image, many, "a.jpg")
    large = encoded(Image.new("L", (8000, 8000), 77), "JPEG", progressive=True)
    assert decode_image(large, "a.jpg").shape == (8000, 8000, 3)
    many = large[:-2] + large[large.rindex(b"\xff\xda") : -2] * 30 + bytes(10**6) + large[-2:]
    assert "Expected some ten scans" in image_error(decode_image, many, "a.jpg")
    one = encoded(Image.new("RGB", (64, 64), 77), "JPEG")
    film = one + b"\xff\xda" * 1000  # a camera's film behind its photo is not looked at
    assert decode_image(film, "a.jpg").shape == (64, 64, 3)


def test_fuzzed_pngs_with_right_checksums_are_decoded_or_reported():
    """1,000 of all modes, so that the decoder is reached: its chunks, and what is in its stream."""
    generator, decoded = random.Random(0), 0
    colour = Image.open(IMAGES / "chelsea.png").resize((40, 30))
    modes = [colour.convert(mode) for mode in ("RGB", "L", "P", "1", "RGBA", "LA")]
    modes.append(Image.fromarray((RAMP * 65535).astype(np.uint16)))
    originals = [encoded(image, "PNG") for image in modes]
    for number in range(1000):
        chunks, content = [], originals[number % len(originals)]
        place = 8
        while place < len(content):
            size = struct.unpack(">I", content[place : place + 4])[0]
            chunks.append((content[place + 4 : place + 8], bytearray(content[place + 8 : place + 8 + size])))
            place += size + 12
        kind = number // len(originals) % 4
        data = chunks[generator.randrange(len(chunks) - 1)][1]
        if kind == 0:  # any byte of a chunk
            data[generator.randrange(len(data))] = generator.randrange(256)
        elif kind == 1:  # what is compressed: filters and pixels, cut or lengthened
            pixels = bytearray(zlib.decompress(chunks[-2][1]))
            for _ in range(generator.randrange(1, 20)):
                pixels[generator.randrange(len(pixels))] = generator.randrange(256)
            del pixels[generator.randrange(len(pixels)) :]
            chunks[-2][1][:] = zlib.compress(pixels * generator.randrange(1, 3))
        elif kind == 2:  # size, depth, colours, interlacing
            header = chunks[0][1]
            header[generator.choice((2, 3, 6, 7, 8, 9, 12))] = generator.choice(
                (0, 1, 2, 3, 4, 6, 8, 16, 255)
            )
        else:  # chunks in another order, twice, of another name
            other = bytes(generator.choice((b"PLTE", b"tRNS", b"eXIf", b"iCCP", b"acTL", b"fdAT", b"zTXt")))
            chunks.insert(generator.randrange(len(chunks)), (other, bytearray(generator.randbytes(40))))
        made = content[:8] + b"".join(
            struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
            for name, data in chunks
        )
        with contextlib.suppress(ImageError):
            pixels = decode_image(made, "fuzz.png", preprocess.reduced)
            assert pixels.dtype == np.uint8 and pixels.shape[2] == 3
            decoded += 1
    assert 200 < decoded < 900


def test_image_error_is_a_value_error():
    assert issubclass(ImageError, ValueError)


def value_error(**changes):
    arguments = {"image": noise(20, 30), "image_size": 16} | changes
    with pytest.raises(ValueError) as caught:
        prepare(arguments.pop("image"), **arguments)
    return str(caught.value)


@pytest.mark.parametrize(
    ("image", "received"),
    [
        (noise(20, 30).astype(np.float32), "float32 (20, 30, 3)"),
        (noise(20, 30)[:, :, 0], "uint8 (20, 30)"),
        (noise(20, 30).transpose(2, 0, 1), "uint8 (3, 20, 30)"),
        (noise(20, 30)[None], "uint8 (1, 20, 30, 3)"),
        (np.zeros((20, 30, 4), np.uint8), "uint8 (20, 30, 4)"),
        (np.zeros((0, 30, 3), np.uint8), "uint8 (0, 30, 3)"),
        (Image.new("RGB", (30, 20)), "an object of type Image"),
        ("cat.jpg", "an object of type str"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_preprocess_image_rejects_what_is_not_a_uint8_rgb_array(image, received):
    assert value_error(image=image) == (
        "Expected an image as a uint8 array of shape (H, W, 3), RGB, 0 to 255, received "
        f"{received}. Read files with read_image; convert other images to 8-bit RGB first."
    )


@pytest.mark.parametrize(
    "image_size", [0, -224, 224.0, True, "224", None, (224,), (224, 0), (1, 2, 3)], ids=repr
)
def test_preprocess_image_rejects_bad_image_sizes(image_size):
    assert value_error(image_size=image_size) == (
        "Expected image_size to be a positive integer or (height, width), at most 16,384, received "
        f"{image_size!r}. Pass a number of pixels, such as 224 or (224, 320)."
    )


@pytest.mark.parametrize("crop", [0, -0.5, 1.0001, 87.5, math.nan, True, "0.9", None], ids=repr)
def test_preprocess_image_rejects_crops_outside_zero_to_one(crop):
    assert value_error(crop_fraction=crop) == (
        f"Expected crop_fraction from 0.01 to 1, received {crop!r}. Pass the fraction of the resized image "
        "that is kept, such as 0.875."
    )


@pytest.mark.parametrize("resize_size", [0, -1, 236.0, True, (236, 236)], ids=repr)
def test_preprocess_image_rejects_bad_resize_sizes(resize_size):
    assert value_error(resize_size=resize_size) == (
        "Expected resize_size to be a positive integer, at most 16,384, or None, received "
        f"{resize_size!r}. Pass a "
        "number of pixels, such as 236."
    )


def test_preprocess_image_names_the_known_crop_modes_and_interpolations():
    assert value_error(crop_mode="border") == "Unknown crop_mode 'border'. Known: center, squash."
    assert value_error(interpolation="nearest") == (
        "Unknown interpolation 'nearest'. Known: bicubic, bilinear."
    )


def test_preprocess_image_accepts_numpy_numbers():
    arguments = {"image_size": np.int64(16), "crop_fraction": np.float32(0.5), "resize_size": np.int32(20)}
    assert prepare(noise(20, 30), **arguments).shape == (16, 16, 3)


def touch(path):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.touch()
    return path


def test_find_images_sorts_a_folder_and_keeps_the_order_of_paths(tmp_path):
    names = ["b/2.PNG", "b/1.JPEG", "a/x/3.jpg", "c.webp", "d.bmp", "e.gif", "f.tif", "g.TIFF"]
    names += ["h.jpeg"]
    for name in [*names, "readme.txt", "b/labels.csv", "jpg", "b/.jpg"]:
        touch(tmp_path / "folder" / name)
    strange = touch(tmp_path / "strange.name")
    folder = tmp_path / "folder"
    assert find_images([str(strange), folder]) == [
        strange,
        *(folder / name for name in sorted(names)),
    ]
    assert find_images(folder) == find_images([str(folder)])
    assert find_images(str(strange)) == [strange]
    assert find_images(path for path in [strange, strange]) == [strange, strange]
    assert find_images([]) == []


def test_find_images_finds_the_photographs_of_the_tests():
    names = [path.name for path in find_images(IMAGES)]
    assert names == ["chelsea.png", "coffee.jpg", "rocket.jpg"]


def test_find_images_reports_a_missing_path(tmp_path):
    present = touch(tmp_path / "cat.jpg")
    for path in (tmp_path / "dog.jpg", present / "inside.jpg"):
        assert image_error(find_images, [present, path]) == (
            f"Expected an image file or a folder at '{path}', but nothing is there. Check the path."
        )


def test_find_images_reports_a_folder_without_images(tmp_path):
    touch(tmp_path / "a" / "notes.txt")
    touch(tmp_path / "labels.csv")
    assert image_error(find_images, [tmp_path]) == (
        f"Expected images in the folder '{tmp_path}', found none: 1 .csv, 1 .txt. "
        "Known suffixes: .jpg, .jpeg, .jpe, .jfif, .mpo, .png, .apng, .webp, .bmp, .gif, .tif, .tiff."
    )


def test_find_images_reports_a_subfolder_it_may_not_list(tmp_path, monkeypatch):
    touch(tmp_path / "a" / "cat.jpg")
    closed = touch(tmp_path / "closed" / "dog.jpg").parent
    list_folder = os.scandir

    def refuse(path):  # root may list what chmod forbids
        if Path(path) == closed:
            raise PermissionError(13, "Permission denied", str(path))
        return list_folder(path)

    monkeypatch.setattr(os, "scandir", refuse)
    assert image_error(find_images, [tmp_path]) == (
        f"Expected a readable file or folder, but this user may not look into '{closed}'. "
        "Change its permissions or leave it out."
    )


def test_documented_names_match_the_tables():
    assert tuple(preprocess.INTERPOLATIONS) == INTERPOLATIONS
    for name in (*INTERPOLATIONS, *CROP_MODES):
        assert f'"{name}"' in Preprocessing.__doc__
