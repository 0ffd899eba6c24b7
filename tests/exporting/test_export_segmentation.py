"""Segmentation models as files: deployed, written, compared pixel by pixel, and what an app is told."""

import json

import keras
import numpy as np
import pytest
from layer_contract import relative_error
from test_deploy import randomized

from keras_convnext import deploy, export, load, save_weights, segmentation
from keras_convnext.data import calibration
from keras_convnext.data.preprocessing import Preprocessing
from keras_convnext.data.segmentation.labels import Labels
from keras_convnext.exporting import runtimes

pytestmark = pytest.mark.one_backend

BACKEND = keras.backend.backend()
NAMES = {
    "saved_model": "model",
    "litert": "m.tflite",
    "onnx": "m.onnx",
    "openvino": "m.xml",
    "torch": "m.pt2",
}
FORMATS = {"tensorflow": ("saved_model", "litert", "openvino"), "torch": ("onnx", "torch")}.get(BACKEND, ())
LABELS = Labels(("sky", "road", "a <b>tree</b>"), ((0, 0, 250), (90, 90, 90), (0, 200, 0)))
SIZE = (96, 64)


@pytest.fixture(scope="module")
def model():
    body = load("test_convnext2", None, include_top=False, pyramid_norms=True)
    model = segmentation.UPerNet(body, classes=3, channels=16)
    randomized(model)
    generator = np.random.default_rng(1)
    for layer in model.layers:
        if isinstance(layer, keras.layers.BatchNormalization):
            shape = layer.moving_variance.shape
            layer.moving_variance.assign(generator.uniform(0.5, 2, shape))
    return model


@pytest.fixture(scope="module")
def images():
    return calibration.calibration_images(preprocessing=Preprocessing(SIZE), count=3)


def outputs(model, images):
    return keras.ops.convert_to_numpy(model(images.astype("float32"), training=False))


def test_deployed_segmenter_has_no_batch_norms_and_no_auxiliary_head(model, images):
    deployed = deploy(model)
    kinds = {type(layer) for layer in deployed.layers}
    assert not any(issubclass(kind, keras.layers.BatchNormalization | keras.layers.Dropout) for kind in kinds)
    assert segmentation.KeepAuxiliary not in kinds
    assert not any("auxiliary" in layer.name for layer in deployed.layers)
    assert any("auxiliary" in layer.name for layer in model.layers)
    assert isinstance(deployed, segmentation.Segmenter) and deployed.classes == 3
    expected = outputs(model, images)
    assert relative_error(outputs(deployed, images), expected) < 1e-5
    odd = images[:, :77, :53]  # maps that do not divide each other
    assert relative_error(outputs(deployed, odd), outputs(model, odd)) < 1e-5
    assert deploy(model, image_size=SIZE).output_shape == (None, *SIZE, 3)


@pytest.mark.parametrize("weight", ["moving_mean", "moving_variance", "gamma", "beta"])
def test_a_fold_that_forgets_part_of_a_batch_norm_is_seen(model, images, weight):
    """The negative control: each weight of one norm moves the outputs by far more than the tolerance."""
    changed = keras.models.clone_model(model)
    changed.set_weights(model.get_weights())
    norm = changed.get_layer("decode_head_bottleneck_bn")
    variable = getattr(norm, weight)
    variable.assign(1.1 * keras.ops.convert_to_numpy(variable) + 0.05)
    difference = relative_error(outputs(deploy(changed), images), outputs(model, images))
    assert difference > 1e-4


def test_batch_norms_elsewhere_stay(images):
    """Where something else reads the convolution, or does something in between, nothing is folded."""
    x = inputs = keras.Input((*SIZE, 3))
    y = keras.layers.Conv2D(4, 3, padding="same")(x)
    x = keras.layers.Add()([keras.layers.BatchNormalization()(y), y])
    x = keras.layers.Conv2D(4, 3, activation="relu")(x)
    x = keras.layers.BatchNormalization(scale=False)(x)
    x = keras.layers.Conv2D(5, 3, strides=2, use_bias=False)(x)
    x = keras.layers.BatchNormalization(center=False)(x)
    model = keras.Model(inputs, x)
    randomized(model)
    for layer in model.layers:
        if isinstance(layer, keras.layers.BatchNormalization):
            layer.moving_variance.assign(np.linspace(0.5, 2, layer.moving_variance.shape[0]))
    deployed = deploy(model)
    norms = [layer for layer in deployed.layers if isinstance(layer, keras.layers.BatchNormalization)]
    assert len(norms) == 2
    assert relative_error(outputs(deployed, images), outputs(model, images)) < 1e-5


@pytest.mark.slow
@pytest.mark.every_backend
@pytest.mark.parametrize("format", FORMATS)
def test_file_equals_the_model(format, model, images, tmp_path):
    path = tmp_path / NAMES[format]
    result = export(
        model, path, calibration=images, labels=LABELS, preprocessing=Preprocessing(SIZE), licence="mit"
    )
    assert result.num_images == 3 and result.relative_difference < 1e-4 and result.agreement > 0.999
    exported = runtimes.open_exported(path)
    expected = outputs(model, images)
    assert relative_error(exported(images), expected) < 1e-4
    assert relative_error(exported(images[::-1]), expected) > 1e-2
    is_free = format in ("saved_model", "onnx", "torch")
    assert exported.input_shape[1:3] == ((None, None) if is_free else SIZE)
    if is_free:
        for odd in (np.tile(images, (1, 2, 2, 1))[:, :155, :77], images[:1, :77]):
            assert relative_error(exported(odd), outputs(model, odd)) < 1e-4
    about = exported.metadata
    assert about["labels"] == list(LABELS.names) and about["licence"] == "mit"
    assert about["output"] == {
        "classes": 3,
        "activation": "linear",
        "order": "N, H, W, classes",
        "task": "segmentation",
        "palette": [list(colour) for colour in LABELS.palette],
    }
    assert about["input"]["image_size"] == (None if is_free else list(SIZE))
    assert about["input"]["preprocessing"]["crop_mode"] == "squash"


@pytest.mark.slow
@pytest.mark.every_backend
@pytest.mark.skipif(BACKEND != "tensorflow", reason="one backend tells enough")
@pytest.mark.parametrize("precision", ["float16", "dynamic_int8", "int8"])
def test_litert_in_fewer_bits_has_builtin_operators_only(precision, model, images, tmp_path):
    path = tmp_path / "m.tflite"
    result = export(model, path, precision=precision, calibration=images, preprocessing=Preprocessing(SIZE))
    assert result.num_bytes < 0.65 * 4 * model.count_params()
    assert result.agreement > {"float16": 0.999}.get(precision, 0.9)  # weights are random: near ties
    assert operators(path).isdisjoint({"CUSTOM"}) and not any("Flex" in name for name in operators(path))


def operators(path):
    from ai_edge_litert.interpreter import Interpreter

    interpreter = Interpreter(str(path))
    interpreter.allocate_tensors()
    return {row["op_name"] for row in interpreter._get_ops_details()}


def test_a_damaged_palette_is_told(model, images, tmp_path):
    path = tmp_path / "m.onnx"
    path.write_bytes(b"")
    about = {
        "input": {"image_size": [64, 64]},
        "output": {"classes": 3, "task": "segmentation", "palette": [[0, 0, 0], [1, 1, 256], [2, 2, 2]]},
    }
    runtimes.metadata_file(path).write_text(json.dumps(about))
    with pytest.raises(ValueError, match=r"expected 3 colours \[R, G, B\] of 0 to 255 as 'palette'"):
        runtimes.read_metadata(path)
    about["output"]["palette"][1][2] = 255
    runtimes.metadata_file(path).write_text(json.dumps(about))
    assert runtimes.read_metadata(path) == about


def test_labels_of_another_number_are_refused(model, tmp_path):
    with pytest.raises(ValueError, match=r"Expected 3 labels, one a class\. Received: 2"):
        export(model, tmp_path / "m.onnx", labels=Labels(LABELS.names[:2], LABELS.palette[:2]))


@pytest.mark.slow
@pytest.mark.skipif(BACKEND != "torch", reason="one backend tells enough")
def test_the_command_exports_a_file_of_a_segmenter_with_its_labels(run, tmp_path):
    body = load("convnext_atto", None, include_top=False, pyramid_norms=True)
    model = segmentation.UPerNet(body, classes=3, channels=16)
    save_weights(model, tmp_path / "m.safetensors", preprocessing=Preprocessing(SIZE), labels=LABELS)
    code, out, err = run("export", "m.safetensors", "m.onnx")
    assert (code, err) == (0, "") and "m.onnx" in out
    exported = runtimes.open_exported(tmp_path / "m.onnx")
    assert exported.input_shape == (None, None, None, 3)
    assert exported.metadata["labels"] == list(LABELS.names)
    assert exported.metadata["output"]["palette"][1] == [90, 90, 90]
    (tmp_path / "labels.txt").write_text("a\nb\nc\n")
    words = (
        "export",
        "m.safetensors",
        "n.onnx",
        "--labels",
        "labels.txt",
        "--image-size",
        "64",
        "--no-check",
    )
    assert run(*words)[0] == 0
    exported = runtimes.open_exported(tmp_path / "n.onnx")
    assert exported.input_shape == (None, 64, 64, 3) and exported.metadata["labels"] == ["a", "b", "c"]
