"""Photos in front of and behind a detector: sizes, padding, masks, pictures, and results as COCO has them."""

import numpy as np
import pytest
import torch

from keras_convnext.data.detection import inference, pictures
from keras_convnext.data.detection.categories import Categories, default_categories
from keras_convnext.data.detection.results import as_result
from keras_convnext.data.segmentation import coco

pytestmark = pytest.mark.once


@pytest.mark.parametrize(
    ("size", "expected"),
    [((480, 640), (800, 1067)), ((640, 480), (1067, 800)), ((300, 900), (444, 1333)), ((5, 2000), (3, 1333))],
)
def test_sizes_are_those_of_the_published_test_pipeline(size, expected):
    assert inference.prepared_size(size, 800) == expected
    scale = min(1333 / max(size), 800 / min(size))  # mmcv's rescale_size
    assert expected == tuple(int(side * scale + 0.5) for side in size)


def test_photos_are_padded_below_and_right_with_what_becomes_zero():
    image = np.random.default_rng(0).integers(0, 256, (60, 100, 3), "uint8")
    mean = (0.485, 0.456, 0.406)
    pixels, inner = inference.prepared(image, 60, mean)
    assert (pixels.shape, pixels.dtype, inner) == ((64, 128, 3), np.float32, (60, 100))
    np.testing.assert_array_equal(pixels[:60, :100], image)
    border = np.concatenate([pixels[60:].reshape(-1, 3), pixels[:, 100:].reshape(-1, 3)])
    np.testing.assert_allclose(border, np.broadcast_to(255 * np.array(mean), border.shape), rtol=1e-6)
    pixels, inner = inference.prepared(image, 800, mean, within=(96, 96))
    assert pixels.shape == (96, 96, 3) and inner == (58, 96)


def sampled(mask, box, size):
    """PyTorch's grid_sample at the centres of pixels."""
    x0, y0, x1, y1 = box
    y, x = (
        (torch.arange(side) + 0.5 - low) / (high - low) * 2 - 1
        for side, low, high in zip(size, (y0, x0), (y1, x1), strict=True)
    )
    grid = torch.stack(torch.meshgrid(y, x, indexing="ij")[::-1], -1).float()
    return torch.nn.functional.grid_sample(
        torch.from_numpy(mask)[None, None], grid[None], align_corners=False
    )[0, 0].numpy()


@pytest.mark.parametrize(
    "box", [(10.3, 5.2, 60.7, 44.4), (0, 0, 90, 50), (-20, -8, 30, 70), (40.2, 20.1, 41.9, 22.3)]
)
def test_masks_are_pasted_as_grid_sample_does(box):
    mask = np.random.default_rng(1).random((28, 28), "float32")
    received = inference.pasted(mask, np.array(box, "float32"), (50, 90))
    expected = sampled(mask, np.array(box, "float32").tolist(), (50, 90))
    np.testing.assert_allclose(received, expected, rtol=0, atol=2e-4)
    moved = sampled(mask, (np.array(box) + 0.5).tolist(), (50, 90))  # control: corners in place of centres
    assert np.abs(received - moved).max() > 0.01


def test_a_box_without_area_has_an_empty_mask():
    assert not inference.pasted(np.ones((28, 28), "float32"), np.array([5, 5, 5, 5]), (10, 10)).any()


def test_detections_are_scaled_to_the_photo_and_cut_at_its_borders():
    outputs = {
        "boxes": np.array([[10, 20, 60, 80], [80, 0, 100, 30], [1, 1, 2, 2]], "float32"),
        "scores": np.array([0.9, 0.4, 0], "float32"),
        "classes": np.array([1, 0, -1]),
        "masks": np.ones((3, 28, 28), "float32"),
        "count": 2,
    }
    first, second = inference.on_photo(outputs, (80, 90), (40, 180))
    np.testing.assert_allclose(first["box"], [20, 10, 120, 40])
    np.testing.assert_allclose(second["box"], [160, 0, 180, 15])
    assert (first["class_index"], first["score"]) == (1, pytest.approx(0.9))
    assert (
        first["mask"].shape == (40, 180)
        and first["mask"][10:40, 20:120].all()
        and first["mask"].sum() == 3000
    )


def test_results_have_width_and_height_ids_and_run_lengths():
    mask = np.zeros((6, 7), bool)
    mask[1:4, 2:5] = True
    found = {"box": np.array([2, 1, 5, 4.004], "float32"), "score": 0.123456, "category_id": 90, "mask": mask}
    result = as_result(found)
    assert result["bbox"] == [2, 1, 3, 3] and (result["category_id"], result["score"]) == (90, 0.12346)
    np.testing.assert_array_equal(coco.draw(result["segmentation"], (6, 7)), mask)
    del found["mask"]
    assert "segmentation" not in as_result(found)


@pytest.mark.parametrize("share", [0, 0.01, 0.5, 1])
def test_run_lengths_are_read_back(share):
    mask = np.random.default_rng(2).random((37, 53)) < share
    lengths = coco.run_lengths(mask)
    np.testing.assert_array_equal(coco.draw(lengths, mask.shape), mask)
    counts = coco.unpacked(lengths["counts"])
    assert sum(counts) == mask.size and min(counts[1:], default=1) > 0


def test_pictures_show_boxes_and_masks_in_the_colours_of_classes():
    image = np.full((100, 120, 3), 128, "uint8")
    mask = np.zeros((100, 120), bool)
    mask[40:80, 30:90] = True
    found = [{"class_index": 1, "name": "dog", "score": 0.8, "box": np.array([30, 40, 90, 80]), "mask": mask}]
    shown = np.asarray(pictures.drawn(image, found, 3))
    assert shown.shape == image.shape and (shown[:20] == 128).all() and (shown[90:] == 128).all()
    assert (shown[60, 60] != 128).any() and (shown[60, 30] != shown[60, 60]).any()
    np.testing.assert_array_equal(pictures.drawn(image, [], 3), image)


def test_categories_need_an_id_of_their_own_for_each_name():
    assert default_categories(2) == Categories(("class 0", "class 1"), (1, 2))
    for names, ids in ((("a",), (1, 2)), (("a", "b"), (1, 1)), ((), ()), (("a",), ("1",))):
        with pytest.raises(ValueError, match="Expected a name and an id of its own for each category"):
            Categories(names, ids)
