"""Photographs with label maps: which layouts are found, what the numbers mean, and what is refused."""

import io
import json
import pathlib
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from keras_convnext._environment import available_cores
from keras_convnext.data.index import SourceError
from keras_convnext.data.preprocess import ImageError
from keras_convnext.data.segmentation import coco, label_maps, layouts
from keras_convnext.data.segmentation.label_maps import LabelMapError
from keras_convnext.data.segmentation.labels import Labels
from keras_convnext.data.segmentation.pictures import default_labels
from keras_convnext.data.segmentation.sources import (
    ahead,
    described,
    is_segmentation,
    list_splits,
    open_source,
    take,
)

pytestmark = pytest.mark.once

SHARED = pathlib.Path(__file__).resolve().parents[4] / "shared" / "data"


def picture(seed=0, size=(6, 8), mode="RGB", format="PNG"):
    bands = {"RGB": (3,), "RGBA": (4,), "L": ()}[mode]
    file = io.BytesIO()
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (*size, *bands), np.uint8)).save(
        file, format
    )
    return file.getvalue()


def png(values, palette=None):
    """A label map: gray, of 16 bits where the values have them, or with a palette."""
    values = np.asarray(values)
    image = Image.fromarray(values.astype(np.uint16 if values.dtype == np.uint16 else np.uint8))
    if palette is not None:
        image = Image.frombytes("P", image.size, image.tobytes())
        image.putpalette(palette)
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()


def gray_png(values, bits):
    """A gray PNG of 1, 2 or 4 bits, which Pillow does not write."""

    def chunk(kind, content):
        return (
            struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))
        )

    height, width = np.shape(values)
    rows = b""
    for row in values:
        text = "".join(f"{value:0{bits}b}" for value in row).ljust(-(-width * bits // 8) * 8, "0")
        rows += b"\0" + int(text, 2).to_bytes(len(text) // 8, "big")
    header = struct.pack(">IIBBBBB", width, height, bits, 0, 0, 0, 0)
    parts = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + parts


def numbers(seed, classes=3, size=(6, 8)):
    """A map that has every class."""
    values = np.random.default_rng(seed).integers(0, classes, size)
    values.reshape(-1)[:classes] = range(classes)
    return values


def write(root, files):
    for name, content in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    return root


def pair(stem="a", seed=0, values=None, images="images", maps="masks"):
    values = numbers(seed) if values is None else values
    return {f"{images}/{stem}.png": picture(seed, np.shape(values)), f"{maps}/{stem}.png": png(values)}


PLACES = {
    "SPLIT/images + SPLIT/masks": ("{}/images", "{}/masks"),
    "SPLIT/images + SPLIT/labels": ("{}/images", "{}/labels"),
    "SPLIT/images + SPLIT/annotations": ("{}/images", "{}/annotations"),
    "images/SPLIT + annotations/SPLIT": ("images/{}", "annotations/{}"),
    "images/SPLIT + masks/SPLIT": ("images/{}", "masks/{}"),
    "img_dir/SPLIT + ann_dir/SPLIT": ("img_dir/{}", "ann_dir/{}"),
    "SPLIT + SPLITannot": ("{}", "{}annot"),
}


@pytest.mark.parametrize("layout", PLACES)
def test_each_layout_with_splits_is_found(tmp_path, layout):
    images, maps = PLACES[layout]
    for place, split in enumerate(("train", "val")):
        for number in range(2 + place):
            write(tmp_path, pair(f"{number}", number, None, images.format(split), maps.format(split)))
    assert list_splits(tmp_path) == ["train", "val"]
    assert is_segmentation(tmp_path)
    source = open_source(tmp_path, "validation")
    assert (len(source), source.layout) == (3, layout)
    assert source.classes == ["class 0", "class 1", "class 2"]
    assert source.name(1) == f"{images.format('val')}/1.png"
    for number in range(3):
        image, label_map = source.load(number)
        assert (image.dtype, image.shape, label_map.dtype) == (np.uint8, (6, 8, 3), np.uint8)
        np.testing.assert_array_equal(label_map, numbers(number))
        np.testing.assert_array_equal(image, np.asarray(Image.open(io.BytesIO(picture(number)))))
    with pytest.raises(SourceError, match=r"has several splits, and split is None. Pass one of: train, val"):
        open_source(tmp_path)


@pytest.mark.parametrize("maps", ["masks", "labels", "annotations"])
def test_a_folder_without_splits_is_found(tmp_path, maps):
    source = open_source(write(tmp_path, pair(maps=maps)))
    assert (len(source), source.layout, list_splits(tmp_path)) == (1, f"images + {maps}", [])


def test_two_layouts_at_once_are_named(tmp_path):
    write(tmp_path, pair() | pair(images="train", maps="trainannot"))
    with pytest.raises(SourceError, match=r"received two: 'SPLIT \+ SPLITannot' and 'images \+ masks'"):
        open_source(tmp_path, "train")


def test_no_pairs_at_all_are_an_error_that_lists_the_layouts(tmp_path):
    write(tmp_path, {"cats/a.png": picture()})
    with pytest.raises(
        SourceError,
        match=r"in one of these layouts: SPLIT/images \+ SPLIT/masks.*Received images in cats \(1\)",
    ):
        open_source(tmp_path)
    assert not is_segmentation(tmp_path)
    write(tmp_path, {"images/a.png": picture(), "masks/b.png": png(numbers(0))})
    with pytest.raises(SourceError, match=r"found no pair: 1 images \(a.png\) and 1 maps \(b.png\)"):
        open_source(tmp_path)
    with pytest.raises(SourceError, match="nothing is there"):
        open_source(tmp_path / "x")


def test_what_lies_at_a_path_of_no_layout_is_said(tmp_path):
    for name in ("images", "masks"):
        (tmp_path / "empty" / name).mkdir(parents=True)
    with pytest.raises(SourceError, match=r"Received no images\. Check the path"):
        open_source(tmp_path / "empty")
    write(tmp_path, {"voc/JPEGImages/a.jpg": picture(), "voc/SegmentationClass/a.png": png(numbers(0))})
    with pytest.raises(SourceError, match=r"images in JPEGImages \(1\), SegmentationClass \(1\)\. Rename"):
        open_source(tmp_path / "voc")
    with pytest.raises(SourceError, match=r"Received a file, 'a\.jpg'\. Pass the folder"):
        open_source(tmp_path / "voc/JPEGImages/a.jpg")


def test_cityscapes_own_folders_are_refused_with_what_to_do(tmp_path):
    name = "bonn_000001_000019"
    photo = {f"leftImg8bit/train/bonn/{name}_leftImg8bit.png": picture()}
    maps = {f"gtFine/train/bonn/{name}_gtFine_{kind}.png": png(numbers(0)) for kind in ("labelIds", "color")}
    write(tmp_path, photo | maps)
    for function in (open_source, is_segmentation, list_splits):
        with pytest.raises(SourceError, match=r"Cityscapes.*_gtFine_labelTrainIds\.png.*ann_dir/SPLIT/NAME"):
            function(tmp_path)


def test_a_folder_of_pairs_and_classes_has_two_readings(tmp_path):
    write(tmp_path, pair() | {"cats/a.png": picture()})
    with pytest.raises(SourceError, match=r"two readings fit: .*\(images \+ masks\), or folders of classes"):
        is_segmentation(tmp_path)


def test_an_image_without_a_map_is_refused_and_a_map_without_an_image_is_told(tmp_path):
    write(tmp_path, pair("a") | pair("b") | {"notes.txt": "x", "images/notes.txt": "x"})
    (tmp_path / "images/b.png").unlink()
    source = open_source(tmp_path)
    assert len(source) == 1
    assert described(source)[-1] == "  left out: 1 .txt, 1 maps without an image"
    write(tmp_path, {"images/c.png": picture(), "images/d.png": picture()})
    with pytest.raises(SourceError, match=r"for each of the 3 images .* 2 have none: c.png, d.png"):
        open_source(tmp_path)


def test_maps_may_have_one_common_ending(tmp_path):
    write(tmp_path, pair("a") | pair("b"))
    for stem in "ab":
        (tmp_path / f"masks/{stem}.png").rename(tmp_path / f"masks/{stem}_mask.png")
    assert len(open_source(tmp_path)) == 2
    (tmp_path / "masks/b_mask.png").rename(tmp_path / "masks/b_L.png")
    with pytest.raises(SourceError, match="found no pair"):
        open_source(tmp_path)


def test_two_images_of_one_name_are_refused(tmp_path):
    write(tmp_path, pair("a") | {"images/a.jpg": picture(format="JPEG")})
    with pytest.raises(SourceError, match=r"Expected one file for 'a' .* 'a.jpg' and 'a.png'"):
        open_source(tmp_path)


def test_jpeg_maps_are_refused(tmp_path):
    write(tmp_path, {"images/a.png": picture(), "masks/a.jpg": picture(format="JPEG")})
    with pytest.raises(SourceError, match=r"Expected label maps as PNG .* received a.jpg"):
        open_source(tmp_path)
    write(tmp_path, {"masks/a.png": picture(format="JPEG")})
    with pytest.raises(LabelMapError, match="received a JPEG"):
        open_source(tmp_path)


@pytest.mark.parametrize("bits", [1, 2, 4])
def test_maps_of_few_bits_give_their_numbers(bits):
    values = numbers(0, 2**bits, (5, 7))
    np.testing.assert_array_equal(label_maps.decode(gray_png(values, bits), "x"), values)


def test_16_bit_and_palette_maps_give_their_numbers():
    values = (numbers(0) * 300).astype(np.uint16)
    np.testing.assert_array_equal(label_maps.decode(png(values), "x"), values)
    palette = [10, 20, 30, 40, 50, 60, 70, 80, 90]
    np.testing.assert_array_equal(label_maps.decode(png(numbers(1), palette), "x"), numbers(1))


def test_the_palette_of_the_maps_gives_the_colours_of_the_classes(tmp_path):
    palette = [10, 20, 30, 40, 50, 60, 70, 80, 90]
    write(tmp_path, pair() | {"masks/a.png": png(numbers(0), palette)})
    assert open_source(tmp_path).labels.palette == ((10, 20, 30), (40, 50, 60), (70, 80, 90))
    colours = open_source(tmp_path, ignored_values=[0]).labels.palette
    assert colours == ((40, 50, 60), (70, 80, 90))


def test_made_colours_differ():
    assert len(set(default_labels(255).palette)) == 255


@pytest.mark.parametrize("name", ["classes.txt", "labels.txt"])
def test_names_come_from_a_file(tmp_path, name):
    write(tmp_path, pair() | {name: "sky\nroad\na tree\nfence\n\n"})
    source = open_source(tmp_path)
    assert source.classes == ["sky", "road", "a tree", "fence"]
    lines = described(source, "training")
    assert lines[0].startswith("training: 1 images with label maps of 4 classes in")
    assert "of all maps: sky" in lines[1]
    assert lines[2] == "  no pixels: 1 of these classes: fence"


def test_a_list_of_names_with_a_repeated_one_is_refused(tmp_path):
    write(tmp_path, pair() | {"classes.txt": "sky\nroad\nsky\n"})
    with pytest.raises(SourceError, match=r"a name of its own for each class .* received 'sky' again"):
        open_source(tmp_path)


def test_ignored_values_are_explicit_and_the_other_values_are_counted(tmp_path):
    values = np.array([[0, 1, 2, 5], [5, 4, 3, 0]])
    write(tmp_path, pair(values=values))
    source = open_source(tmp_path, ignored_values=[0, 3])
    assert source.classes == ["class 0", "class 1", "class 2", "class 3"]
    np.testing.assert_array_equal(source.load(0)[1], [[255, 0, 1, 3], [3, 2, 255, 255]])
    assert described(source)[-1] == "  ignored: 37.5% of all pixels (value 0, 3)"
    np.testing.assert_array_equal(open_source(tmp_path).load(0)[1], values)  # the control: nothing is guessed
    with pytest.raises(ValueError, match=r"Expected ignored_values of whole numbers .* received -1"):
        open_source(tmp_path, ignored_values=[-1])


def test_ade20k_needs_its_zero_ignored_in_so_many_words(tmp_path):
    table = "Idx\tRatio\tTrain\tVal\tName\n1\t0.5\t9\t9\twall\n2 \t0.5\t9\t9\tbuilding, edifice\n"
    write(tmp_path, pair() | {"objectInfo150.txt": table})
    with pytest.raises(SourceError, match=r"Expected ignored_values=\(0,\) .* received \(\)"):
        open_source(tmp_path)
    source = open_source(tmp_path, ignored_values=[0])
    assert source.classes == ["wall", "building"]
    labels = Labels(("wall", "edifice"), ((1, 2, 3), (4, 5, 6)), (0,))
    assert open_source(tmp_path, labels=labels).labels == labels  # of the names of a class one is enough
    with pytest.raises(SourceError, match="class 1 is 'building' there and 'sky' in labels"):
        open_source(tmp_path, labels=["wall", "sky"], ignored_values=[0])


def test_label_255_without_ignore_is_refused_with_what_takes_it(tmp_path):
    values = numbers(0)
    values[0, 0] = 255
    write(tmp_path, pair(values=values))
    with pytest.raises(LabelMapError, match=r"a.png', received 255; .* pass ignored_values=\(255,\)"):
        open_source(tmp_path)
    assert open_source(tmp_path, ignored_values=[255]).classes == ["class 0", "class 1", "class 2"]
    write(tmp_path, {"classes.txt": "a\nb\nc\n"})
    with pytest.raises(LabelMapError, match=r"received 255 in 2.08% .* pass ignored_values=\(255,\)"):
        open_source(tmp_path).load(0)
    write(tmp_path, pair(values=np.array([[0, 255]] * 2)))
    with pytest.raises(LabelMapError, match="black and white mask, write 1 for 255"):
        open_source(tmp_path).load(0)


def test_a_list_of_classes_that_is_too_short_is_refused(tmp_path):
    write(tmp_path, pair() | {"classes.txt": "a\nb\n"})
    with pytest.raises(
        LabelMapError, match=r"from 0 to 1 in '.*a.png'.*received 2 .*list of 2 classes is too short"
    ):
        described(open_source(tmp_path))
    message = r"If 2 means not labelled, pass ignored_values=\(2,\) .*\. If 0 does, .* ignored_values=\(0,\)"
    with pytest.raises(LabelMapError, match=message):
        open_source(tmp_path).load(0)


def test_more_than_255_classes_are_refused(tmp_path):
    write(tmp_path, pair(values=np.arange(300, dtype=np.uint16).reshape(2, 150)))
    with pytest.raises(LabelMapError, match=r"Expected values from 0 to 254 .* received 299"):
        open_source(tmp_path)
    with pytest.raises(SourceError, match="at most 255 classes"):
        open_source(tmp_path, labels=[f"{number}" for number in range(300)])


def test_a_map_of_another_size_is_refused_and_a_turned_photograph_named(tmp_path):
    write(tmp_path, pair() | {"masks/a.png": png(numbers(0, size=(6, 9)))})
    message = r"received 9 x 6 pixels in 'masks/a.png' for 8 x 6 in 'images/a.png'\. Export"
    for action in (described, lambda source: source.load(0)):
        with pytest.raises(LabelMapError, match=message):
            action(open_source(tmp_path))
    write(tmp_path, {"masks/a.png": png(numbers(0, size=(8, 6)))})
    with pytest.raises(LabelMapError, match="stored turned"):
        open_source(tmp_path).load(0)


@pytest.mark.parametrize("mode", ["RGB", "RGBA"])
def test_a_mask_of_colours_is_refused(tmp_path, mode):
    write(tmp_path, pair() | {"masks/a.png": picture(mode=mode)})
    with pytest.raises(
        LabelMapError, match=r"one number a pixel in 'masks/a.png', received .* colours R\+G\+B"
    ):
        open_source(tmp_path)


def test_an_image_of_one_pixel_is_refused(tmp_path):
    write(tmp_path, pair(values=np.array([[0]])))
    with pytest.raises(LabelMapError, match=r"at least 2 x 2 pixels, received 1 x 1 in 'images/a.png'"):
        described(open_source(tmp_path))


def test_an_image_with_alpha_is_taken_as_photographs_are(tmp_path):
    write(tmp_path, pair() | {"images/a.png": picture(mode="RGBA")})
    expected = np.asarray(Image.open(io.BytesIO(picture(mode="RGBA"))))[..., :3]
    np.testing.assert_array_equal(open_source(tmp_path).load(0)[0], expected)


@pytest.mark.parametrize(
    ("content", "what"), [(b"", "an empty file"), (b"hello, world", "begins with b'hello, w'")]
)
def test_what_is_no_png_is_said(content, what):
    with pytest.raises(LabelMapError, match=f"in 'a.png', received .*{what}. Export it again"):
        label_maps.decode(content, "a.png")


def test_damaged_files_are_named(tmp_path):
    write(tmp_path, pair("a") | pair("b"))
    source = open_source(tmp_path)
    write(tmp_path, {"images/a.png": b"x", "masks/b.png": png(numbers(0))[:60]})
    with pytest.raises(ImageError, match=r"images/a.png"):
        source.load(0)
    with pytest.raises(LabelMapError, match=r"masks/b.png"):
        source.load(1)


def test_labels_of_a_model_are_taken_and_unknown_values_refused(tmp_path):
    write(tmp_path, pair())
    labels = Labels(("x", "y"), ((1, 2, 3), (4, 5, 6)), (2,))
    source = open_source(tmp_path, labels=labels)
    assert source.labels == labels
    assert set(np.unique(source.load(0)[1]).tolist()) == {0, 1, 255}
    assert open_source(tmp_path, labels=labels, ignored_values=[0]).labels.ignored_values == (0,)
    write(tmp_path, {"classes.txt": "x\ny\nz\n"})
    with pytest.raises(SourceError, match=r"Expected the 3 classes of .*, received 2 in labels"):
        open_source(tmp_path, labels=labels)


def test_names_of_a_model_without_any_contradict_no_data(tmp_path):
    unnamed = default_labels(3)
    write(tmp_path, pair() | {"classes.txt": "sky\nroad\ntree\n"})
    assert open_source(tmp_path, labels=unnamed).classes == ["sky", "road", "tree"]
    assert open_source(tmp_path, labels=unnamed.names).classes == ["sky", "road", "tree"]
    with pytest.raises(SourceError, match=r"Expected the 3 classes of .*, received 4 in labels|class 0"):
        open_source(tmp_path, labels=default_labels(4))
    with pytest.raises(SourceError, match=r"class 0 is 'sky' there and 'class 1' in labels"):
        open_source(tmp_path, labels=["class 1", "class 0", "class 2"])
    write_annotations(tmp_path / "coco", annotations())
    assert open_source(tmp_path / "coco", labels=default_labels(2)).classes == ["tree", "car"]


def test_results_come_in_order_and_only_a_few_are_made_ahead():
    begun = []
    results = ahead(lambda number: begun.append(number) or number**2, range(1000))
    assert next(results) == 0 and len(begun) <= 2 * available_cores() + 2
    assert [0, *results] == [number**2 for number in range(1000)]


def test_take_keeps_images_and_maps_together(tmp_path):
    for number in range(4):
        write(tmp_path, pair(f"{number}", number))
    source = open_source(tmp_path)
    taken = take(source, [3, 1])
    assert [taken.name(number) for number in range(2)] == ["images/3.png", "images/1.png"]
    np.testing.assert_array_equal(taken.load(0)[1], numbers(3))
    assert taken.fingerprint != source.fingerprint
    assert take(source, [3, 2, 1, 0]).fingerprint == source.fingerprint


def square(left, top, right, bottom):
    return [[left, top, right, top, right, bottom, left, bottom]]


def annotations(**more):
    """Two images: a large square of class "car" (id 7) under a small one of "tree" (id 3), and none."""
    one = {"id": 1, "image_id": 5, "category_id": 3, "segmentation": square(2, 1, 4, 3)}
    other = {"id": 2, "image_id": 5, "category_id": 7, "segmentation": square(1, 0, 7, 5)}
    images = [{"id": number, "file_name": f"{number}.png", "height": 6, "width": 8} for number in (5, 6)]
    categories = [{"id": 7, "name": "car"}, {"id": 3, "name": "tree"}]
    return {"images": images, "annotations": [one, other], "categories": categories} | more


def write_annotations(root, content, name="instances.json"):
    files = {f"images/{number}.png": picture(number) for number in (5, 6)}
    return write(root, files | {name: json.dumps(content)})


def test_annotations_are_drawn_with_the_smaller_on_top(tmp_path):
    write_annotations(tmp_path, annotations())
    expected = np.full((6, 8), 255)
    expected[0:5, 1:7] = 1
    expected[1:3, 2:4] = 0
    for path in (tmp_path, tmp_path / "instances.json"):
        source = open_source(path)
        assert (len(source), source.classes) == (1, ["tree", "car"])  # in the order of the ids
        np.testing.assert_array_equal(source.load(0)[1], expected)
        assert "left out: 1 images without annotations" in described(source)[-1]
    assert is_segmentation(tmp_path)


def test_a_class_background_takes_what_no_annotation_covers(tmp_path):
    write_annotations(tmp_path, annotations())
    source = open_source(tmp_path, labels=["background", "car", "tree"])
    assert len(source) == 2  # an image of background alone is one
    label_map = source.load(0)[1]
    assert (label_map[5, 7], label_map[0, 1], label_map[1, 2]) == (0, 1, 2)
    write(tmp_path, {"classes.txt": "background\ncar\ntree\n"})
    np.testing.assert_array_equal(open_source(tmp_path).load(0)[1], label_map)
    with pytest.raises(SourceError, match=r"categories of .* among the 1 classes given .*; 1 are not: tree"):
        (tmp_path / "classes.txt").unlink()
        open_source(tmp_path, labels=["car"])


def test_run_lengths_are_of_columns_beginning_outside():
    size, counts = [3, 4], [2, 3, 1, 4, 2]
    expected = np.array([0, 0, 1, 1, 1, 0, 1, 1, 1, 1, 0, 0], bool).reshape(4, 3).T
    np.testing.assert_array_equal(coco.draw({"size": size, "counts": counts}, (3, 4)), expected)
    with pytest.raises(ValueError, match="run lengths of 11 pixels in an image of 12"):
        coco.draw({"size": size, "counts": [*counts[:-1], 1]}, (3, 4))


def packed(counts):
    """Run lengths as text, by another derivation: from the digits of the two's complement."""
    text = ""
    for place, count in enumerate(counts):
        value = count - counts[place - 2] if place > 2 else count
        digits = 1
        while not -(1 << (5 * digits - 1)) <= value < 1 << (5 * digits - 1):
            digits += 1
        for digit in range(digits):
            bits = value % (1 << 5 * digits) >> 5 * digit & 31
            text += chr(48 + bits + 32 * (digit < digits - 1))
    return text


def test_packed_run_lengths_are_read():
    assert coco.unpacked("04L5") == [0, 4, -4, 9]  # by hand: 28 is -4 of five bits, and 9 is 5 more than 4
    counts = np.random.default_rng(0).integers(0, 5000, 99).tolist()
    assert coco.unpacked(packed(counts)) == counts


def test_polygons_fill_the_pixels_whose_centres_they_hold():
    generator = np.random.default_rng(0)
    rows, columns = np.mgrid[:20, :30] + 0.5
    for _ in range(20):
        points = generator.uniform(-4, 34, (7, 2))
        inside = np.zeros((20, 30), bool)
        for (x0, y0), (x1, y1) in zip(points, np.roll(points, -1, 0), strict=True):  # rays to the left
            crosses = (y0 > rows) != (y1 > rows)
            inside ^= crosses & (columns > (x1 - x0) * (rows - y0) / (y1 - y0) + x0)
        np.testing.assert_array_equal(coco.filled(points, (20, 30)), inside)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"categories": []}, "Expected the category_id of each annotation .* received 3 in annotation 1"),
        ({"images": annotations()["images"][1:]}, "Expected the image_id of each annotation .* received 5"),
        (
            {"annotations": [{"id": 9, "image_id": 5, "category_id": 3, "bbox": [1, 2, 3, 4]}]},
            "9 has only a box",
        ),
        ({"images": [{"id": 5}]}, "'file_name' is missing"),
        ({"images": annotations()["images"][:1] * 2}, "an id of its own .* received 5 for 2 of them"),
        ({"annotations": []}, "Expected annotations of images .* received none for its 2 images"),
    ],
)
def test_annotations_that_do_not_fit_are_named(tmp_path, change, message):
    write_annotations(tmp_path, annotations(**change))
    with pytest.raises(SourceError, match=message):
        open_source(tmp_path)


def test_nothing_is_said_to_be_left_out_where_nothing_is(tmp_path):
    both = [one | {"image_id": number} for number in (5, 6) for one in annotations()["annotations"]]
    write_annotations(tmp_path, annotations(annotations=both))
    assert not any("left out" in line for line in described(open_source(tmp_path)))


def test_missing_images_of_annotations_are_named(tmp_path):
    write_annotations(tmp_path, annotations())
    (tmp_path / "images/5.png").unlink()
    with pytest.raises(SourceError, match=r"missing: 5.png"):
        open_source(tmp_path)


def test_annotation_files_of_splits_are_found(tmp_path):
    for split in ("train2017", "val2017"):
        write(tmp_path, {f"{split}/{number}.png": picture(number) for number in (5, 6)})
        write(tmp_path, {f"annotations/instances_{split}.json": json.dumps(annotations())})
    write(tmp_path, {"annotations/captions_train2017.json": '{"images": [], "annotations": []}'})
    assert list_splits(tmp_path) == ["train2017", "val2017"]
    assert open_source(tmp_path, "validation").name(0) == "val2017/5.png"
    write(tmp_path, {"annotations/stuff_val2017.json": json.dumps(annotations())})
    with pytest.raises(SourceError, match=r"one COCO-style JSON for each split .*stuff_val2017.json"):
        open_source(tmp_path, "validation")


def test_every_layout_is_described_by_its_folders():
    assert len({str(layout) for layout in layouts.LAYOUTS}) == len(layouts.LAYOUTS)


@pytest.mark.skipif(not (SHARED / "camvid11").exists(), reason="camvid11 is not here")
def test_camvid_is_read_as_its_page_says():
    folder = SHARED / "camvid11"
    train, val = (open_source(folder, split, ignored_values=[11]) for split in ("train", "validation"))
    assert (len(train), len(val), len(train.classes)) == (367, 101, 11)
    image, label_map = val.load(100)
    assert (image.shape, label_map.shape) == ((360, 480, 3), (360, 480))
    assert set(np.unique(label_map).tolist()) <= {*range(11), 255}
    lines = described(take(train, range(20)))
    assert "(value 11)" in lines[-1]


@pytest.mark.skipif(not (SHARED / "coco128").exists(), reason="coco128 is not here")
def test_coco128_is_drawn():
    source = open_source(SHARED / "coco128")
    assert len(source.classes) == 80
    document = json.loads((SHARED / "coco128" / "instances.json").read_text())
    areas = {one["id"]: one["area"] for one in document["annotations"] if not one["iscrowd"]}
    sizes = {one["id"]: (one["height"], one["width"]) for one in document["images"]}
    for one in document["annotations"][:150]:  # COCO's area is that of its own drawing
        if one["id"] in areas and areas[one["id"]] > 2000:
            drawn = coco.draw(one["segmentation"], sizes[one["image_id"]]).sum()
            assert abs(drawn / areas[one["id"]] - 1) < 0.02
    label_map = take(source, [0]).load(0)[1]
    assert set(np.unique(label_map).tolist()) <= {*range(80), 255}
