"""The page of a segmentation model: headless Chromium drops photographs on it and reads the shares."""

import json

import keras
import numpy as np
import pytest
from test_deploy import randomized
from test_web_page import PHOTOS, Tab, chromium, needs_chromium, runtime, sidecar  # noqa: F401

from keras_convnext import export, load, segmentation
from keras_convnext.data import preprocess
from keras_convnext.data.preprocessing import Preprocessing
from keras_convnext.data.segmentation import inference, pictures
from keras_convnext.data.segmentation.labels import Labels
from keras_convnext.exporting import runtimes, web_page

pytestmark = [pytest.mark.slow, pytest.mark.once]

LABELS = Labels(("<b>sky</b>", "road", "Füße"), ((0, 0, 250), (90, 90, 90), (0, 200, 0)))
SIDE = 64
TOLERANCE = 2e-3  # of a share: some pixels are ties, and JPEG decoders differ by a level


@pytest.fixture(scope="module")
def model():
    body = load("test_convnext", None, include_top=False, pyramid_norms=True)
    model = segmentation.UPerNet(body, classes=3, channels=16)
    randomized(model)
    for layer in model.layers:
        if isinstance(layer, keras.layers.BatchNormalization):
            layer.moving_variance.assign(np.ones(layer.moving_variance.shape))
    # So that each class has a share of the photographs, what they have in common is taken off.
    pixels = np.concatenate([resized(preprocess.read_image(photo), (SIDE, SIDE)) for photo in PHOTOS])
    logits = keras.ops.convert_to_numpy(model(pixels.astype("float32"), training=False))
    head = model.get_layer("decode_head_conv_seg")
    kernel, bias = head.get_weights()
    head.set_weights([kernel, bias - logits.mean(axis=(0, 1, 2))])
    return model


@pytest.fixture(scope="module", params=["any size", "one size"])
def exported(request, model, tmp_path_factory):
    path = tmp_path_factory.mktemp("exported") / "small.onnx"
    size = None if request.param == "any size" else (SIDE, 96)
    export(model, path, labels=LABELS, preprocessing=Preprocessing(SIDE), image_size=size, check=False)
    return path


@pytest.fixture(scope="module")
def tab(exported, runtime, chromium):  # noqa: F811
    page = web_page.write_page(exported, exported.with_suffix(".html"), runtime)
    with chromium.new_context() as context:
        yield Tab(context, page)


def resized(image, size):
    return np.rint(inference.resized(image, size)).astype("uint8")[None]


def by_python(path, photo):
    """{class: share} of the label map of a photo by the file, without the page."""
    image = preprocess.read_image(photo)
    opened = runtimes.open_exported(path)
    size = opened.input_shape[1:3]
    pixels = inference.prepared(image, SIDE)[None] if None in size else resized(image, size)
    found = pictures.shares(opened(pixels)[0].argmax(-1).astype("uint8"), LABELS)
    return {row["class_index"]: row["share"] for row in found}


def shares(tab):
    items = tab.tab.locator("#classes li").all()
    return {int(item.get_attribute("data-index")): float(item.get_attribute("data-share")) for item in items}


@needs_chromium
def test_a_dropped_photograph_gets_the_shares_that_python_finds(tab, exported):
    for photo in PHOTOS:
        said = tab.drop(photo.read_bytes(), photo.name)
        expected, found = by_python(exported, photo), shares(tab)
        for index in range(3):
            assert found.get(index, 0) == pytest.approx(expected.get(index, 0), abs=TOLERANCE)
        first = max(found, key=found.get)
        assert said.startswith(f"{LABELS.names[first]}, {100 * found[first]:.1f} % of the picture. The model")
    others = by_python(exported, PHOTOS[0])
    assert max(abs(found.get(index, 0) - others.get(index, 0)) for index in range(3)) > 5 * TOLERANCE
    assert tab.problems == []
    assert tab.tab.locator("#classes").get_attribute("aria-label") == "Classes by their share of the picture"
    assert tab.tab.locator("#hint").text_content().startswith("The colours are those of the classes.")


@needs_chromium
def test_the_preview_has_the_colours_of_the_map(tab, exported):
    """Where the map has a class, half the pixel's colour is that of the class."""
    photo = PHOTOS[0]
    tab.drop(photo.read_bytes(), photo.name)
    image = preprocess.read_image(photo)
    data = tab.tab.evaluate(
        """() => {
            const canvas = document.getElementById("preview");
            const pixels = canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height).data;
            return [canvas.width, canvas.height, [...pixels]];
        }"""
    )
    width, height, pixels = data
    shown = np.array(pixels).reshape(height, width, 4)[..., :3]
    opened = runtimes.open_exported(exported)
    size = opened.input_shape[1:3]
    taken = inference.prepared(image, SIDE)[None] if None in size else resized(image, size)
    label_map = opened(taken)[0].argmax(-1)
    rows = ((np.arange(height) + 0.5) * label_map.shape[0] / height).astype(int)
    columns = ((np.arange(width) + 0.5) * label_map.shape[1] / width).astype(int)
    enlarged = label_map[rows][:, columns].astype("uint8")
    preview = resized(image, (height, width))[0]
    expected = pictures.overlay(preview, enlarged, LABELS)
    difference = np.abs(shown.astype(int) - expected).max(axis=-1)
    assert (difference < 24).mean() > 0.95  # the browser enlarges and reduces photos in its own way
    other = pictures.overlay(preview, (enlarged + 1) % 3, LABELS)
    assert (np.abs(shown.astype(int) - other).max(axis=-1) < 24).mean() < 0.5


def test_a_page_says_how_pictures_are_resized_and_the_colours(exported):
    metadata = json.loads(sidecar(exported).read_text())
    settings = web_page._page_settings(metadata, exported)
    is_free = metadata["input"]["image_size"] is None
    assert (settings["height"], settings["width"]) == ((None, None) if is_free else (SIDE, 96))
    assert settings["short_side"] == SIDE and settings["palette"] == list(map(list, LABELS.palette))
    metadata["output"]["palette"] = None
    assert web_page._page_settings(metadata, exported)["palette"] == pictures.default_labels(3).palette
