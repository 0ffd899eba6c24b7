"""`detect` and `open_detector`: photos of any size, what is written, what is refused."""

import json

import detectors
import numpy as np
import peers
import pytest
import segmenters
from PIL import Image

from keras_convnext import load, predictor, save_weights
from keras_convnext.architecture import DetectorHeads
from keras_convnext.data import preprocess
from keras_convnext.data.calibration import PHOTOS
from keras_convnext.data.detection import inference, pictures
from keras_convnext.data.detection.categories import Categories
from keras_convnext.data.preprocessing import Preprocessing
from keras_convnext.data.segmentation import coco

pytestmark = pytest.mark.one_backend

CATEGORIES = Categories(("cat", "dog", "füße"), (3, 90, 7))


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    folder = tmp_path_factory.mktemp("weights")
    with pytest.MonkeyPatch.context() as patch:
        segmenters.one_block_a_stage(patch, "convnext_atto")
        state = detectors.random_state("convnext_atto", DetectorHeads(3, 16, 32))
        model = load(peers.save(state, folder / "x.safetensors"))
        path = folder / "animals.safetensors"
        yield save_weights(model, path, preprocessing=Preprocessing(64), labels=CATEGORIES)


@pytest.fixture
def photos(tmp_path):
    folder = tmp_path / "photos"
    (folder / "a").mkdir(parents=True)
    (folder / "broken.jpg").write_text("not a photo")
    data = preprocess.__file__.rpartition("/")[0]
    with Image.open(f"{data}/photos/{PHOTOS[0]}") as image:
        image.resize((150, 100)).save(folder / "a" / "cat.jpg")
        image.resize((33, 50)).convert("L").save(folder / "cat.png")
    return folder


def test_a_folder_gets_pictures_and_boxes_of_its_photos(run, file, photos, tmp_path):
    words = ("detect", photos, "--model", file, "-o", "out", "--score", "0.2")
    code, out, err = run(*words)
    assert code == 1 and "broken.jpg" in err
    written = json.loads((tmp_path / "out" / "detect.json").read_text())
    assert written["written_by"] == "keras_convnext detect" and len(written["images"]) == 2
    opened = predictor.open_detector(file)
    assert (opened.categories, opened.short_side) == (CATEGORIES, 64)
    for row in written["images"]:
        image = preprocess.read_image(row["file"])
        found = opened.detect(image, 0.2)
        assert found and len(found) == len(row["objects"])
        for one, told in zip(found, row["objects"], strict=True):
            assert (told["name"], told["category_id"]) == (one["name"], one["category_id"])
            assert CATEGORIES.ids[CATEGORIES.names.index(told["name"])] == told["category_id"]
            x, y, width, height = told["bbox"]
            np.testing.assert_allclose([x, y, x + width, y + height], one["box"], atol=0.02)
            assert x >= 0 and x + width <= image.shape[1] + 0.01 and told["score"] >= 0.2
            np.testing.assert_array_equal(coco.draw(told["segmentation"], image.shape[:2]), one["mask"])
        with Image.open(tmp_path / row["picture"]) as picture:
            np.testing.assert_array_equal(picture, pictures.drawn(image, found, 3))
        assert f"{row['file']}\n" in out
    assert f"{100 * row['objects'][0]['score']:6.2f} %  " in out
    code, out, _ = run(*words[:4], "--score", "0.2", "--json")
    assert [row["objects"] for row in json.loads(out)] == [row["objects"] for row in written["images"]]
    code, out, _ = run("detect", photos / "cat.png", "--model", file, "--score", "1")
    assert code == 0 and "nothing found" in out


def test_a_photo_is_seen_as_the_model_sees_its_pixels(file):
    """Nothing is lost on the way: the model's own boxes at the prepared size, scaled to the photo."""
    opened = predictor.open_detector(file, image_size=96)
    image = np.random.default_rng(0).integers(0, 256, (48, 80, 3), "uint8")
    pixels, inner = inference.prepared(image, 96, opened.mean)
    assert inner == (96, 160) == pixels.shape[:2]
    outputs = load(file).predict(pixels[None], verbose=0)
    found = opened.detect(image)
    assert len(found) == outputs["count"][0]
    for one, box in zip(found, outputs["boxes"][0], strict=False):
        np.testing.assert_allclose(one["box"], box / 2, atol=1e-3)


def test_a_model_of_one_size_takes_photos_of_any(file):
    opened = predictor.open_detector(load(file, input_shape=(64, 96, 3)))
    image = np.random.default_rng(0).integers(0, 256, (70, 50, 3), "uint8")
    found = opened.detect(image)
    assert found and max(one["box"][2] for one in found) <= 50 and found[0]["name"].startswith("class ")


def test_what_is_no_detector_is_refused(refused, file, photos, tmp_path):
    words = ("detect", photos / "cat.png", "--model", "convnextv2_atto.tiny_imagenet200")
    assert "Expected weights of a detector. Received convnextv2_atto.tiny_imagenet200" in refused(*words)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "detect.json").write_text("mine")
    words = ("detect", photos / "cat.png", "--model", "never.safetensors", "-o", "out")
    assert "keras_convnext did not write it" in refused(*words)


def test_other_commands_tell_that_a_detector_is_none_of_theirs(refused, file, photos):
    photo = photos / "cat.png"
    assert "is of a detector and has no classifier" in refused("predict", photo, "--weights", file)
    assert "a model of detection" in refused("segment", photo, "--model", file)
    assert "a detector" in refused("export", file, "x.onnx")
    words = ("evaluate", file, "--data", photos, "--mode", "whole")
    assert "a model for segmentation beside --mode, received one for detection" in refused(*words)


def test_list_and_info_show_detectors(run, file):
    code, out, _ = run("list", "--task", "detection")
    assert code == 0 and "AP, boxes / masks" in out and "46.2 / 41.7" in out and "10 of 239" in out
    _, out, _ = run("list", "convnext_tiny")
    assert "80/box" in out and "50.40" in out and "of detectors (classes/box) box AP" in out.splitlines()[-1]
    _, out, _ = run("info", "convnext_small.mmdet_coco_cascade_mask_rcnn")
    for part in ("detection", "107,565,138", "51.8 / 44.8 %, boxes / masks", "side to 800", "3d24f5a4..."):
        assert part in out
    _, out, _ = run("info", file, "--json")
    facts = json.loads(out)
    assert (facts["task"], facts["classes"], facts["labels"]) == ("detection", 3, list(CATEGORIES.names))
