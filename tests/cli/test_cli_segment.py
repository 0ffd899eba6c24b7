"""`segment` and `open_segmenter`: photos of any size, what is written, what is refused."""

import json
import shutil

import keras
import numpy as np
import pytest
from PIL import Image

from keras_convnext import load, predictor, save_weights, segmentation
from keras_convnext.data import preprocess
from keras_convnext.data.calibration import PHOTOS
from keras_convnext.data.preprocessing import Preprocessing
from keras_convnext.data.segmentation import inference, pictures
from keras_convnext.data.segmentation.labels import Labels

pytestmark = pytest.mark.one_backend

LABELS = Labels(("sky", "road", "füße"), ((0, 0, 250), (90, 90, 90), (0, 200, 0)))


@pytest.fixture(scope="module")
def model():
    keras.utils.set_random_seed(0)
    body = load("convnext_atto", None, include_top=False, pyramid_norms=True)  # whose weights can be written
    model = segmentation.UPerNet(body, classes=3, channels=16)
    head = model.get_layer("decode_head_conv_seg")
    kernel = np.random.default_rng(0).normal(size=head.kernel.shape)
    head.set_weights([kernel, np.zeros(3)])
    return model


@pytest.fixture(scope="module")
def file(model, tmp_path_factory):
    path = tmp_path_factory.mktemp("weights") / "streets.safetensors"
    return save_weights(model, path, preprocessing=Preprocessing(64), labels=LABELS)


@pytest.fixture
def photos(tmp_path):
    """A folder with photos of several sizes: a/cat.jpg, a/tall.png, cat.png and text."""
    folder = tmp_path / "photos"
    (folder / "a").mkdir(parents=True)
    (folder / "broken.jpg").write_text("not a photo")
    data = preprocess.__file__.rpartition("/")[0]
    with Image.open(f"{data}/photos/{PHOTOS[0]}") as image:
        image.resize((150, 100)).save(folder / "a" / "cat.jpg")
        image.resize((40, 90)).save(folder / "a" / "tall.png")
        image.resize((33, 33)).convert("L").save(folder / "cat.png")
    return folder


def test_a_folder_gets_maps_overlays_and_shares(run, file, photos, tmp_path, model):
    words = ("segment", photos, "--model", file, "-o", "out")
    code, out, err = run(*words)
    assert code == 1 and "broken.jpg" in err and "not one or its header is damaged" in err
    written = json.loads((tmp_path / "out" / "segment.json").read_text())
    assert written["written_by"] == "keras_convnext segment" and len(written["images"]) == 3
    names = {str(path.relative_to(tmp_path / "out")) for path in (tmp_path / "out").rglob("*.png")}
    assert names == {
        f"{name}.{kind}.png" for name in ("a/cat", "a/tall", "cat") for kind in ("labels", "overlay")
    }
    opened = predictor.open_segmenter(file)
    assert opened.labels == LABELS and opened.preprocessing.image_size == 64
    for row in written["images"]:
        image = preprocess.read_image(row["file"])
        assert (row["height"], row["width"]) == image.shape[:2]
        expected = opened.segment(image)
        with Image.open(tmp_path / row["label_map"]) as label_map:
            np.testing.assert_array_equal(np.asarray(label_map), expected)
        assert row["classes"] == pictures.shares(expected, LABELS)
        assert sum(part["share"] for part in row["classes"]) == pytest.approx(1)
        with Image.open(tmp_path / row["overlay"]) as overlay:
            shown = np.asarray(overlay)[: image.shape[0], : image.shape[1]]
        np.testing.assert_array_equal(shown, pictures.overlay(image, expected, LABELS))
        assert f"{row['file']}\n" in out and f"{100 * row['classes'][0]['share']:6.2f} %  " in out
    maps = {name: (tmp_path / "out" / name).read_bytes() for name in names}
    assert run(*words)[0] == 1  # its own files are replaced, by the same
    assert maps == {name: (tmp_path / "out" / name).read_bytes() for name in names}
    code, out, _ = run(*words[:4], "--json")
    assert json.loads(out) == [
        {key: row[key] for key in ("file", "height", "width", "classes")} for row in written["images"]
    ]


def test_what_another_program_wrote_is_left_before_a_model_is_opened(refused, run, photos, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    for name in ("cat.overlay.png", "segment.json"):
        (out / name).write_text("mine")
        words = ("segment", photos / "cat.png", "--model", "never.safetensors", "-o", out)
        assert "keras_convnext did not write it" in refused(*words)
        assert (out / name).read_text() == "mine" and len([*out.iterdir()]) == 1
        (out / name).unlink()
    (tmp_path / "taken").write_text("mine")
    assert "received 'taken', which is a file" in refused(
        "segment", photos, "--model", "x.keras", "-o", "taken"
    )


def test_photos_of_one_name_are_kept_apart_or_refused(run, refused, file, photos, tmp_path):
    shutil.copy(photos / "a" / "cat.jpg", photos / "cat.jpg")
    (photos / "broken.jpg").unlink()
    assert run("segment", photos, "--model", file, "-o", "out")[0] == 0
    assert (tmp_path / "out" / "cat.jpg.labels.png").exists()
    assert (tmp_path / "out" / "cat.png.labels.png").exists()
    both = (photos / "cat.jpg", photos / "a" / "cat.jpg")
    assert "received several 'cat.jpg'" in refused("segment", *both, "--model", file, "-o", "other")


def test_a_classifier_and_a_missing_photo_are_refused(refused, file, photos):
    words = ("segment", photos / "cat.png", "--model", "convnextv2_atto.tiny_imagenet200")
    assert "Expected weights of a segmentation model, received convnextv2_atto.tin" in refused(*words)
    assert "nothing is there" in refused("segment", "missing.jpg", "--model", file)


def test_predict_tells_that_a_segmenter_is_none(refused, file, photos):
    assert "has no classifier" in refused("predict", photos / "cat.png", "--weights", file)


def image_of(height, width):
    return np.random.default_rng(1).integers(0, 256, (height, width, 3), "uint8")


def test_modes_are_those_of_inference_and_auto_that_of_evaluation(model):
    opened = predictor.open_segmenter(model, image_size=64)
    image, found = image_of(50, 120), {}
    for mode in inference.MODES:
        found[mode] = opened.segment(image, mode)
        expected = inference.segment(opened.logits, image, 64, mode)
        np.testing.assert_array_equal(found[mode], expected)
    assert found["whole"].shape == (50, 120) and (found["whole"] != found["slide"]).any()
    np.testing.assert_array_equal(opened.segment(image), found["whole"])
    published = predictor.SegmentationPredictor(model, opened.labels, opened.preprocessing, row=object())
    np.testing.assert_array_equal(published.segment(image), found["slide"])
    with pytest.raises(ValueError, match=r"Unknown mode 'wole'\. Did you mean 'whole'"):
        opened.segment(image, "wole")


@pytest.mark.every_backend
@pytest.mark.skipif(keras.backend.backend() == "jax", reason="each size is a program of its own on JAX")
def test_photos_of_several_sizes_in_succession_are_each_seen_whole(model):
    """After a second size TensorFlow's graph leaves the sizes free."""
    opened = predictor.open_segmenter(model, image_size=64)
    for size in ((50, 120), (64, 64), (90, 61), (33, 70)):
        image = image_of(*size)
        pixels = inference.prepared(image, 64)[None].astype("float32")
        logits = keras.ops.convert_to_numpy(model(pixels, training=False))[0]
        expected = inference.label_map(logits, size)
        assert (opened.segment(image, "whole") == expected).mean() > 0.999


def test_a_model_of_one_size_is_given_that_size_only(model):
    fixed = keras.models.clone_model(model, keras.Input((64, 96, 3)))
    fixed.set_weights(model.get_weights())
    opened = predictor.open_segmenter(fixed)
    seen = set()

    class Watched(predictor.SegmentationPredictor):
        def logits(self, batch):
            seen.add(batch.shape[1:3])
            return super().logits(batch)

    watched = Watched(fixed, opened.labels, opened.preprocessing)
    for size in ((50, 120), (300, 20), (64, 96)):
        assert watched.segment(image_of(*size)).shape == size
    assert watched.segment(image_of(9, 9), "whole").shape == (9, 9)
    assert seen == {(64, 96)}
    with pytest.raises(ValueError, match=r"any image size for several scales, received .* of 64 x 96"):
        opened.segment(image_of(9, 9), "multi_scale")
    with pytest.raises(ValueError, match=r"takes images of 64 x 96\. Received: image size 32"):
        predictor.open_segmenter(fixed, image_size=32)


def test_a_model_that_gives_no_maps_is_refused():
    model = load("test_convnext2", None, input_shape=(32, 32, 3), classes=3)
    with pytest.raises(ValueError, match=r"to logits .N, H, W, classes.\. Received test_convnext2"):
        predictor.open_segmenter(model)
