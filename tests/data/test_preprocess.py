"""Reading, resizing and cropping images, bit for bit against timm and torchvision."""

import csv
import math
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from keras_convnext.data import preprocess
from keras_convnext.data.preprocess import ImageError, find_images, preprocess_image, read_image
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
    deep = Image.fromarray(np.linspace(0, 1000, 61 * 40).reshape(40, 61).astype(np.uint16))
    deep.save(folder / "deep.png")
    colour.save(folder / "rgb.jpg")
    colour.save(folder / "rotated.jpg", exif=rotated)
    colour.convert("L").save(folder / "grayscale.jpg")
    colour.convert("CMYK").save(folder / "cmyk.jpg")
    colour.convert("P").save(folder / "palette.png")
    colour.convert("1").save(folder / "bilevel.png")
    transparent.save(folder / "transparent.png")
    transparent.convert("LA").save(folder / "grayscale_alpha.png")
    return {
        "deep.png": "I;16",
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
    deep = read_image(tmp_path / "deep.png")
    clipped = np.linspace(0, 1000, 61 * 40).reshape(40, 61).astype(np.uint16).clip(0, 255)
    np.testing.assert_array_equal(deep[:, :, 0], clipped)


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
        "Pass a JPEG, a PNG or another file that Pillow reads."
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
