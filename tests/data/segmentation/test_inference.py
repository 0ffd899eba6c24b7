"""Photos to label maps: sizes, windows, scales and resizing against forms written another way."""

import importlib.util

import numpy as np
import pytest
import torch

from keras_convnext.data.segmentation import inference

pytestmark = pytest.mark.once

CLASSES = 5
WEIGHTS = np.random.default_rng(0).normal(size=(3, CLASSES)).astype("float32")


def predict(images):
    """A model that looks at the position in its window too, as a network with padding does."""
    _, h, w, _ = images.shape
    places = np.sin(np.arange(h)[:, None] / 7.0 + np.arange(w) / 5.0)[..., None] * np.arange(CLASSES)
    return (images.astype("float32") / 255 @ WEIGHTS + places).astype("float32")


def photo(h, w, seed=1):
    return np.random.default_rng(seed).integers(0, 256, (h, w, 3), dtype=np.uint8)


def interpolated(array, size):
    tensor = torch.from_numpy(np.ascontiguousarray(array).astype("float32")).permute(2, 0, 1)[None]
    return torch.nn.functional.interpolate(tensor, size, mode="bilinear", align_corners=False)[0]


@pytest.mark.parametrize("size", [(7, 9), (40, 31), (3, 100), (1, 1)])
def test_resizing_is_pytorchs(size):
    array = np.random.default_rng(2).normal(size=(13, 17, CLASSES)).astype("float32")
    expected = interpolated(array, size).permute(1, 2, 0).numpy()
    np.testing.assert_allclose(inference.resized(array, size), expected, atol=2e-5)
    strips = [strip for _, strip in inference.strips(array, size)]
    np.testing.assert_array_equal(np.concatenate(strips), inference.resized(array, size))


def test_strips_are_small_and_give_the_same_map(monkeypatch):
    array = np.random.default_rng(3).normal(size=(30, 20, CLASSES)).astype("float32")
    whole = inference.label_map(array, (77, 55))
    monkeypatch.setattr(inference, "_STRIP_BYTES", 4 * 55 * CLASSES * 10)
    assert [len(strip) for _, strip in inference.strips(array, (77, 55))] == [10] * 7 + [7]
    np.testing.assert_array_equal(inference.label_map(array, (77, 55)), whole)
    assert (inference.label_map(array, (77, 55)) != whole[::-1]).any()


@pytest.mark.parametrize(
    ("size", "short", "expected"),
    [
        ((683, 512), 512, (683, 512)),
        ((360, 480), 512, (512, 683)),
        ((1000, 200), 512, (2048, 410)),  # the longer side reaches four times the short one first
        ((480, 640), 640, (640, 853)),
        ((1, 1000), 512, (32, 2048)),
        ((1, 1), 512, (512, 512)),
    ],
)
def test_the_size_of_a_test_is_mmcvs(size, short, expected):
    """`mmcv.rescale_size(size, (4 * short, short))`, but no side is below 32."""
    assert inference.prepared_size(size, short) == expected


@pytest.mark.parametrize(
    ("length", "crop", "stride", "expected"),
    [(512, 512, 341, [0]), (683, 512, 341, [0, 171]), (300, 512, 341, [0]), (853, 512, 341, [0, 341]),
     (854, 512, 341, [0, 341, 342]), (2048, 512, 341, [0, 341, 682, 1023, 1364, 1536])],
)  # fmt: skip
def test_windows_are_mmsegmentations(length, crop, stride, expected):
    assert inference.starts(length, crop, stride) == expected


def independent_window(image, crop, stride):
    """slide_inference as its description says: each pixel's mean, pixel by pixel of the windows over it."""
    h, w, _ = image.shape
    rows = [min(y, max(h - crop[0], 0)) for y in range(0, max(h - crop[0], 0) + stride[0], stride[0])]
    columns = [min(x, max(w - crop[1], 0)) for x in range(0, max(w - crop[1], 0) + stride[1], stride[1])]
    found = [[[] for _ in range(w)] for _ in range(h)]
    for y in dict.fromkeys(rows):
        for x in dict.fromkeys(columns):
            part = image[y : y + crop[0], x : x + crop[1]]
            out = predict(part[None])[0]
            for i in range(part.shape[0]):
                for j in range(part.shape[1]):
                    found[y + i][x + j].append(out[i, j])
    return np.array([[np.mean(cell, axis=0) for cell in row] for row in found])


@pytest.mark.parametrize("size", [(50, 70), (32, 65), (20, 90), (33, 32), (16, 16)])
@pytest.mark.parametrize("batch_size", [1, 4])
def test_the_sliding_window_is_the_mean_of_its_windows(size, batch_size):
    image = photo(*size)
    result = inference.sliding_window(predict, image, (32, 32), (21, 21), batch_size)
    np.testing.assert_allclose(result, independent_window(image, (32, 32), (21, 21)), atol=1e-5)
    if max(size) > 32:  # a window elsewhere is seen
        other = inference.sliding_window(predict, image, (32, 32), (20, 20), batch_size)
        whole = predict(image[None])[0]
        assert np.abs(result - whole).max() > 1e-2 or np.abs(result - other).max() > 1e-2


@pytest.mark.skipif(importlib.util.find_spec("mmseg") is None, reason="mmsegmentation is not installed")
@pytest.mark.parametrize("size", [(50, 70), (32, 65), (20, 90)])
def test_the_sliding_window_is_mmsegmentations(size):
    from types import SimpleNamespace

    from mmseg.models.segmentors import EncoderDecoder

    def encode_decode(images, metas):
        out = predict(images.permute(0, 2, 3, 1).numpy().astype("uint8"))
        return torch.from_numpy(out).permute(0, 3, 1, 2)

    config = SimpleNamespace(stride=(21, 21), crop_size=(32, 32))
    segmentor = SimpleNamespace(test_cfg=config, out_channels=CLASSES, encode_decode=encode_decode)
    image = photo(*size)
    theirs = EncoderDecoder.slide_inference(
        segmentor, torch.from_numpy(image).permute(2, 0, 1)[None].float(), [{"img_shape": size}]
    )
    ours = inference.sliding_window(predict, image, (32, 32), (21, 21))
    np.testing.assert_allclose(ours, theirs[0].permute(1, 2, 0).numpy(), atol=1e-5)


def test_many_scales_average_the_softmax_at_the_size_of_the_photo():
    image, short = photo(41, 60), 48
    total = torch.zeros(CLASSES, 41, 60)
    for ratio in (0.5, 0.75, 1.0, 1.25, 1.5, 1.75):
        pixels = inference.prepared(image, ratio * short)
        for view in (pixels, pixels[:, ::-1]):
            out = predict(view[None])[0]
            out = out if view is pixels else out[:, ::-1]
            total += torch.softmax(interpolated(out, (41, 60)), 0) / 12
    ours = inference.probabilities(predict, image, short)
    np.testing.assert_allclose(ours, total.permute(1, 2, 0).numpy(), atol=1e-5)
    single = torch.softmax(interpolated(predict(inference.prepared(image, short)[None])[0], (41, 60)), 0)
    assert np.abs(ours - single.permute(1, 2, 0).numpy()).max() > 1e-2
    expected = np.argmax(ours, -1)
    np.testing.assert_array_equal(inference.segment(predict, image, short, "multi_scale"), expected)


@pytest.mark.parametrize("mode", inference.MODES)
@pytest.mark.parametrize("size", [(1, 1), (40, 64), (200, 10)])
def test_a_label_map_has_the_size_of_the_photo(mode, size):
    result = inference.segment(predict, photo(*size), 36, mode, batch_size=2)
    assert result.shape == size and result.dtype == np.uint8


def test_an_unknown_mode_is_named():
    with pytest.raises(ValueError, match=r"Unknown mode 'slides'\. Did you mean 'slide'"):
        inference.segment(predict, photo(40, 40), 36, "slides")
