"""keras-hub's classes: presets, tasks, the image converter, our models as encoders of its other models."""

import json
import pathlib
import subprocess
import sys

import keras
import numpy as np
import pytest

import keras_convnext
from keras_convnext.data import eval_image, preprocess
from keras_convnext.exporting.preset import NAMES, write_preset

keras_hub = pytest.importorskip("keras_hub", reason="keras-hub is not installed")

from keras_convnext import hub  # noqa: E402

ROOT = pathlib.Path(__file__).resolve().parents[1]
SHARED = ROOT.parent / "shared" / "data"
TAG = "convnextv2_atto.tiny_imagenet200"  # ships with the package
IMAGES = np.random.default_rng(0).integers(0, 256, (4, 64, 64, 3), dtype="uint8")


def needs(name):
    return pytest.mark.skipif(not (SHARED / name).is_dir(), reason=f"{SHARED / name} is not here")


@pytest.fixture(scope="module")
def preset(tmp_path_factory):
    folder = tmp_path_factory.mktemp("preset") / "atto"
    write_preset(TAG, folder)
    return str(folder)


@pytest.fixture(scope="module")
def expected():
    model = keras_convnext.load(TAG, classifier_activation=None)
    return np.asarray(model.predict(IMAGES, verbose=0))


def logits(classifier, images=IMAGES):
    return np.asarray(classifier.predict(images, verbose=0))


@pytest.mark.one_backend
def test_keras_hub_opens_the_preset_bit_for_bit_and_would_write_the_same_files(preset, expected, tmp_path):
    classifier = keras_hub.models.ImageClassifier.from_preset(preset)
    np.testing.assert_array_equal(logits(classifier), expected)
    fresh = keras_hub.models.ImageClassifier.from_preset(preset, num_classes=200)
    assert np.abs(logits(fresh) - expected).max() > 0.1  # a new head
    classifier.save_to_preset(str(tmp_path / "theirs"))
    for name in NAMES:
        if name.endswith(".json") and name != "metadata.json":
            ours, theirs = (
                json.loads(pathlib.Path(f, name).read_text()) for f in (preset, tmp_path / "theirs")
            )
            assert ours == theirs, name
    metadata = json.loads((tmp_path / "theirs" / "metadata.json").read_text())
    ours = json.loads(pathlib.Path(preset, "metadata.json").read_text())
    assert ours["parameter_count"] == metadata["parameter_count"] and ours["tasks"] == metadata["tasks"]
    model = keras_convnext.load(tmp_path / "theirs", classifier_activation=None)
    np.testing.assert_array_equal(np.asarray(model.predict(IMAGES, verbose=0)), expected)


@pytest.mark.slow
def test_a_fresh_process_gives_the_same_logits(preset, expected, tmp_path):
    np.save(tmp_path / "images.npy", IMAGES)
    program = f"""
import sys; sys.path[:0] = {sys.path!r}
import numpy as np, keras_hub, keras_convnext.hub
model = keras_hub.models.ImageClassifier.from_preset({preset!r})
np.save({str(tmp_path / "logits.npy")!r}, model.predict(np.load({str(tmp_path / "images.npy")!r}), verbose=0))
"""
    subprocess.run([sys.executable, "-c", program], check=True, timeout=400)
    np.testing.assert_array_equal(np.load(tmp_path / "logits.npy"), expected)


@pytest.mark.slow
def test_a_preset_of_another_number_of_classes_trains_by_fit(preset):
    keras.utils.set_random_seed(0)
    classifier = keras_hub.models.ImageClassifier.from_preset(preset, num_classes=5)
    classifier.compile(optimizer=keras.optimizers.Adam(1e-3), loss="auto", metrics="auto")
    labels = np.array([0, 4, 2, 1])
    before = [np.asarray(weight) for weight in classifier.backbone.trainable_weights]
    losses = classifier.fit(IMAGES, labels, batch_size=4, epochs=6, verbose=0).history["loss"]
    assert losses[-1] < losses[0] / 2
    after = classifier.backbone.trainable_weights
    assert all(np.any(np.asarray(a) != b) for a, b in zip(after, before, strict=True))


@pytest.mark.slow
@pytest.mark.one_backend
def test_lora_trains_the_pointwise_layers_only(preset):
    backbone = keras_hub.models.Backbone.from_preset(preset)
    backbone.enable_lora(2)
    names = {weight.path.rpartition("/")[0].rpartition("/")[2] for weight in backbone.trainable_weights}
    assert names == {"pwconv1", "pwconv2"}
    assert len([w for w in backbone.trainable_weights if "lora" in w.name]) == 2 * 2 * 12


@pytest.mark.slow
@pytest.mark.one_backend
def test_dtype_reaches_the_layers_and_leaves_the_global_policy(preset):
    backbone = keras_hub.models.Backbone.from_preset(preset, dtype="mixed_bfloat16")
    assert keras.config.dtype_policy().name == "float32"
    assert backbone.get_layer("stages_0_0").pwconv1.compute_dtype == "bfloat16"
    classifier = hub.ConvNeXtImageClassifier(backbone, 5)
    assert classifier(IMAGES).dtype == keras.ops.convert_to_tensor(np.float32(1)).dtype


def photos():
    paths = sorted((SHARED / "coco128" / "images").iterdir())[:100]
    assert len(paths) == 100
    return paths


@pytest.mark.slow
@pytest.mark.one_backend
@needs("coco128")
@pytest.mark.parametrize("crop", [0.875, 0.95, 1.0])
def test_converter_equals_eval_image_on_photos(crop):
    converter = hub.ConvNeXtImageConverter((224, 224), crop_fraction=crop)
    base = keras_hub.layers.ImageConverter((224, 224), interpolation="bicubic", antialias=True)
    furthest = 0
    for path in photos():
        image, wanted = preprocess.read_image(path), eval_image(path, 224, crop_fraction=crop)
        np.testing.assert_array_equal(np.asarray(converter(image)), wanted)
        furthest = max(furthest, np.abs(np.asarray(base(image)) - wanted).max())
    assert furthest > 8  # keras-hub's own


@pytest.mark.slow
def test_converter_is_the_same_in_tf_data_eagerly_and_from_its_configuration():
    import tensorflow as tf

    converter = hub.ConvNeXtImageConverter((48, 64), crop_fraction=0.9, crop_mode="squash")
    copy = hub.ConvNeXtImageConverter.from_config(converter.get_config())
    images = np.random.default_rng(1).integers(0, 256, (3, 90, 70, 3), dtype="uint8")
    wanted = np.stack([preprocess.preprocess_image(image, converter.preprocessing) for image in images])
    np.testing.assert_array_equal(np.asarray(converter(images)), wanted)
    np.testing.assert_array_equal(np.asarray(copy(list(images))), wanted)
    np.testing.assert_array_equal(np.asarray(copy(images.astype("float32") + 0.2)), wanted)
    preprocessor = hub.ConvNeXtImageClassifierPreprocessor(converter)
    for data, shape in (
        (tf.data.Dataset.from_tensor_slices((images, [0, 1, 2])).batch(3), (3, 48, 64, 3)),
        (tf.data.Dataset.from_tensor_slices((images, [0, 1, 2])), (48, 64, 3)),
    ):
        mapped = data.map(preprocessor)
        assert mapped.element_spec[0].shape[-3:] == shape[-3:]
        got = np.concatenate([np.reshape(x, (-1, 48, 64, 3)) for x, _ in mapped.as_numpy_iterator()])
        np.testing.assert_array_equal(got, wanted)


def test_values_out_of_range_are_refused():
    for call, text in (
        (lambda: hub.ConvNeXtBackbone("convnext_tinny"), "'convnext_tiny'"),
        (lambda: hub.ConvNeXtImageConverter((64, 64), scale=1 / 255), "Expected scale=None"),
        (lambda: hub.ConvNeXtImageConverter((64, 64), crop_fraction=1.2), "crop_fraction from"),
        (lambda: hub.ConvNeXtImageConverter((64, 64))({"images": IMAGES}), "a dictionary of images"),
        (lambda: hub.ConvNeXtImageClassifier(keras.Sequential(), 5), "Expected a ConvNeXtBackbone"),
    ):
        with pytest.raises(ValueError, match=text):
            call()


@pytest.mark.slow
@needs("coco128")
def test_retinanet_with_our_encoder_learns_boxes_of_coco(preset, tmp_path):
    keras.utils.set_random_seed(0)
    images, boxes = coco_boxes(2)
    backbone = keras_hub.models.RetinaNetBackbone(
        image_encoder=keras_hub.models.Backbone.from_preset(preset),
        min_level=3,
        max_level=5,
        use_p5=False,
        image_shape=(128, 128, 3),
    )
    anchors = keras_hub.layers.AnchorGenerator(
        "xyxy", min_level=3, max_level=5, num_scales=1, aspect_ratios=[1.0], anchor_size=4.0
    )
    detector = keras_hub.models.RetinaNetObjectDetector(
        backbone, num_classes=91, bounding_box_format="xyxy", anchor_generator=anchors,
        pre_logits_num_conv_layers=1,
    )  # fmt: skip
    detector.compile(optimizer=keras.optimizers.Adam(1e-4), box_loss="auto", classification_loss="auto")
    losses = detector.fit(images, boxes, batch_size=2, epochs=20, verbose=0).history["loss"]
    assert len(losses) == 20 and np.mean(losses[-3:]) < 0.8 * np.mean(losses[:3]), losses
    if keras.backend.backend() == "torch":
        check_onnx(detector, images, tmp_path)


def coco_boxes(count):
    """uint8 images (count, 128, 128, 3) and their boxes, padded with -1 as keras-hub's pipelines pad."""
    table = json.loads((SHARED / "coco128" / "instances.json").read_text())
    images, boxes, labels = [], np.full((count, 30, 4), -1.0, "float32"), np.full((count, 30), -1, "int32")
    for number, row in enumerate(table["images"][:count]):
        path = SHARED / "coco128" / "images" / row["file_name"]
        images.append(eval_image(path, 128, crop_mode="squash", crop_fraction=1.0))
        scale = np.array([128 / row["width"], 128 / row["height"]] * 2)
        found = [a for a in table["annotations"] if a["image_id"] == row["id"] and not a["iscrowd"]][:30]
        for place, a in enumerate(found):
            x, y, width, height = a["bbox"]
            boxes[number, place] = np.array([x, y, x + width, y + height]) * scale
            labels[number, place] = a["category_id"]
    return np.stack(images), {"boxes": boxes, "labels": labels}


@pytest.mark.slow
@needs("camvid11")
@pytest.mark.parametrize("output_stride", [32, 16])
def test_deeplab_with_our_encoder_learns_label_maps_of_camvid(preset, tmp_path, output_stride):
    import PIL.Image

    keras.utils.set_random_seed(0)
    names = sorted(path.stem for path in (SHARED / "camvid11" / "train" / "images").iterdir())[:2]
    folder = SHARED / "camvid11" / "train"
    images = np.stack([
        eval_image(folder / "images" / f"{name}.jpg", 128, crop_mode="squash", crop_fraction=1.0)
        for name in names
    ])  # fmt: skip
    maps = [PIL.Image.open(folder / "masks" / f"{name}.png").resize((128, 128), 0) for name in names]
    labels = np.stack([np.asarray(one) for one in maps]).astype("int32")
    encoder = keras_hub.models.Backbone.from_preset(preset, output_stride=output_stride)
    key = {32: "P5", 16: "P4"}[output_stride]
    assert list(encoder.pyramid_outputs)[-1] == key
    if output_stride == 16:  # keras-hub would take P5 for stride 32, and its maps would be twice too large
        with pytest.raises(KeyError, match="P5"):
            deeplab(encoder, "P5", 4)
    segmenter = keras_hub.models.DeepLabV3ImageSegmenter(
        backbone=deeplab(encoder, key, output_stride // 4), num_classes=12, preprocessor=None
    )
    assert segmenter.output_shape == (None, 128, 128, 12)
    segmenter.compile(
        optimizer=keras.optimizers.Adam(1e-3),
        loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        metrics=[],
    )
    losses = segmenter.fit(images, labels, batch_size=2, epochs=20, verbose=0).history["loss"]
    assert len(losses) == 20 and losses[-1] < 0.7 * losses[0], losses
    if keras.backend.backend() == "torch":
        result = keras_convnext.export(segmenter, tmp_path / "model.onnx", calibration=images)
        assert result.relative_difference < 1e-4


def deeplab(encoder, key, upsampling):
    return keras_hub.models.DeepLabV3Backbone(
        image_encoder=encoder,
        spatial_pyramid_pooling_key=key,
        low_level_feature_key="P2",
        upsampling_size=upsampling,
        dilation_rates=[6, 12, 18],
        image_shape=(128, 128, 3),
    )


def check_onnx(model, images, folder):
    """Exports a model to ONNX and compares the file's results with its own."""
    import onnxruntime

    path = folder / "model.onnx"
    signature = [keras.InputSpec(shape=images.shape, dtype="float32")]
    pixels = images.astype("float32")
    wanted = model(pixels)
    model.export(str(path), format="onnx", input_signature=signature, verbose=False)
    session = onnxruntime.InferenceSession(str(path))
    found = session.run(None, {session.get_inputs()[0].name: pixels})
    wanted = keras.tree.flatten(keras.tree.map_structure(keras.ops.convert_to_numpy, wanted))
    for values in wanted:
        nearest = min(np.abs(values - other).max() for other in found if other.shape == values.shape)
        assert nearest < 1e-3 * max(1, np.abs(values).max())


@pytest.mark.slow
@pytest.mark.one_backend
@needs("coco128")
def test_whole_models_of_this_package_are_encoders_too():
    body = keras_convnext.ConvNeXtV2Atto(include_top=False, weights=None)
    backbone = keras_hub.models.RetinaNetBackbone(body, 3, 7, False, image_shape=(128, 128, 3))
    copy = keras_hub.models.RetinaNetBackbone.from_config(backbone.get_config())
    copy.set_weights(backbone.get_weights())
    images = IMAGES.repeat(2, 1).repeat(2, 2)
    for level, values in backbone(images).items():
        np.testing.assert_array_equal(np.asarray(copy(images)[level].detach()), np.asarray(values.detach()))
