"""Pictures of label maps: palette PNGs, overlays, legends and shares, by hand."""

import numpy as np
import pytest
from PIL import Image

from keras_convnext._files import PNG_MARK
from keras_convnext.data.segmentation import pictures
from keras_convnext.data.segmentation.labels import IGNORED, Labels

pytestmark = pytest.mark.once

LABELS = Labels(("sky", "road", "tree"), ((0, 0, 250), (90, 91, 92), (0, 200, 0)))
MAP = np.array([[0, 0, 2], [2, 2, IGNORED]], "uint8")


def test_a_palette_png_has_the_numbers_as_pixels_and_the_colours_as_palette(tmp_path):
    path = tmp_path / "map.png"
    pictures.save_png(pictures.as_palette_image(MAP, LABELS), path)
    assert PNG_MARK in path.read_bytes()[:4096]
    with Image.open(path) as image:
        assert image.mode == "P"
        np.testing.assert_array_equal(np.asarray(image), MAP)
        colours = np.asarray(image.convert("RGB"))
    np.testing.assert_array_equal(colours[0], [[0, 0, 250], [0, 0, 250], [0, 200, 0]])
    np.testing.assert_array_equal(colours[1, 2], [0, 0, 0])


def test_what_another_program_wrote_is_not_replaced(tmp_path):
    path = tmp_path / "map.png"
    Image.fromarray(MAP).save(path)
    before = path.read_bytes()
    with pytest.raises(FileExistsError, match="keras_convnext did not write it"):
        pictures.save_png(pictures.as_palette_image(MAP, LABELS), path)
    assert path.read_bytes() == before and [*tmp_path.iterdir()] == [path]


def test_an_overlay_is_half_the_photo_and_all_of_it_where_ignored():
    image = np.full((2, 3, 3), 100, "uint8")
    found = pictures.overlay(image, MAP, LABELS)
    np.testing.assert_array_equal(found[0, 0], [50, 50, 175])
    np.testing.assert_array_equal(found[0, 2], [50, 150, 50])
    np.testing.assert_array_equal(found[1, 2], [100, 100, 100])
    np.testing.assert_array_equal(pictures.overlay(image, MAP, LABELS, opacity=1)[1, 0], [0, 200, 0])


def test_shares_are_of_the_labelled_pixels_and_of_classes_that_occur():
    assert pictures.shares(MAP, LABELS) == [
        {"class_index": 2, "name": "tree", "share": 3 / 5},
        {"class_index": 0, "name": "sky", "share": 2 / 5},
    ]
    assert pictures.shares(np.full((2, 2), IGNORED, "uint8"), LABELS) == []


def test_a_legend_stands_beside_the_picture_in_the_colours_of_the_classes():
    picture = np.full((100, 40, 3), 7, "uint8")
    sheet = np.asarray(pictures.with_legend(picture, pictures.shares(MAP, LABELS), LABELS))
    np.testing.assert_array_equal(sheet[:100, :40], picture)
    beside = sheet[:, 40:].reshape(-1, 3)
    colours = {tuple(colour) for colour in beside.tolist()}
    assert {(0, 200, 0), (0, 0, 250), (255, 255, 255)} <= colours and (90, 91, 92) not in colours
    many = Labels(tuple(map(str, range(30))), pictures.default_labels(30).palette)
    numbers = np.arange(30, dtype="uint8").reshape(5, 6)
    sheet = pictures.with_legend(picture[:5, :6], pictures.shares(numbers, many), many)
    assert sheet.height < 30 * 22  # the last ten share a line


def test_default_labels_have_a_colour_of_its_own_for_each_class():
    labels = pictures.default_labels(150)
    assert labels.names[:2] == ("class 0", "class 1") and len(set(labels.palette)) == 150
