"""Files for other runtimes: what is written, that it is what the model is, and what is refused."""

import collections
import csv
import json
import os
import pathlib
import re
import subprocess
import tarfile
import zipfile

import keras
import numpy as np
import pytest
from layer_contract import relative_error
from PIL import Image
from test_deploy import pixels, randomized

import keras_convnext
from keras_convnext import export, load
from keras_convnext.data import calibration, preprocess
from keras_convnext.data.preprocessing import Preprocessing
from keras_convnext.exporting import deploy, metadata, report, runtimes, web_page, writers
from keras_convnext.exporting import export as export_module
from keras_convnext.exporting.export import FORMATS, ExportError, ExportResult
from keras_convnext.layers import normalization

pytestmark = pytest.mark.one_backend

BACKEND = keras.backend.backend()
IMAGES = pathlib.Path(__file__).parents[1] / "images"
NAMES = {
    "saved_model": "model",
    "litert": "m.tflite",
    "onnx": "m.onnx",
    "openvino": "m.xml",
    "torch": "m.pt2",
}

# benchmarks/exports.py writes all from every backend; what a child writes is the same from each.
HERE = {"tensorflow": tuple(FORMATS), "torch": ("litert", "onnx", "torch"), "jax": ("litert", "onnx")}

FIRST_TIER = {"tensorflow": "litert", "torch": "onnx"}.get(
    BACKEND
)  # one format; `make test-all` has the others

on_tensorflow = pytest.mark.skipif(BACKEND != "tensorflow", reason="one backend tells enough")


@pytest.fixture(scope="module")
def model():
    return small("test_convnext")


def small(name, **settings):
    """A small model with every weight random and logits of about 1."""
    settings = {"input_shape": (64, 64, 3), "classes": 7, "classifier_activation": None, **settings}
    model = load(name, weights=None, **settings)
    randomized(model)
    return model


@pytest.fixture(scope="module")
def images():
    return calibration.calibration_images(preprocessing=Preprocessing(64), count=5)


def predicted(model, images):
    return model.predict_on_batch(images.astype("float32"))


def left_in(folder):
    return sorted(path.name for path in folder.iterdir())


# Every format, from this backend.


@pytest.mark.every_backend
@pytest.mark.parametrize(
    "format",
    [pytest.param(name, marks=() if name == FIRST_TIER else pytest.mark.slow) for name in HERE[BACKEND]],
)
def test_file_equals_the_model(format, model, images, tmp_path):
    path = tmp_path / NAMES[format]
    result = export(model, path, calibration=images)
    assert (result.path, result.format, result.precision) == (path, format, "float32")
    assert result.num_images == 5 and result.relative_difference < 1e-4 and result.agreement == 1
    assert result.num_bytes > 4 * 0.9 * model.count_params()
    assert result.milliseconds > 0 and result.model_milliseconds > 0
    exported = runtimes.open_exported(path)
    expected = predicted(model, images)
    assert relative_error(exported(images), expected) < 1e-4
    assert relative_error(exported(images[::-1]), expected) > 1e-2
    free = 1 if format == "litert" else None
    assert exported.input_shape == (free, 64, 64, 3)
    with pytest.raises(ValueError, match=r"Expected images of 64 x 64 x 3 .* \(1, 32, 32, 3\)"):
        exported(np.zeros((1, 32, 32, 3), "uint8"))
    extra = {
        "onnx": ["m.onnx.metadata.json"],
        "openvino": ["m.bin", "m.xml.metadata.json"],
        "torch": ["m.pt2.metadata.json"],
    }
    assert left_in(tmp_path) == sorted([path.name, *extra.get(format, [])])
    with pytest.raises(FileExistsError, match="is there already"):
        export(model, path, calibration=images)


@pytest.mark.slow
@pytest.mark.parametrize("format", ["saved_model", "onnx", "openvino"])
@on_tensorflow
def test_sizes_stay_free_where_the_model_leaves_them_free(format, tmp_path):
    model = small("test_convnext2", input_shape=(None, None, 3))
    path = tmp_path / NAMES[format]
    export(model, path, calibration=np.zeros((1, 224, 224, 3), "uint8") + 9)
    exported = runtimes.open_exported(path)
    assert exported.input_shape == (None, None, None, 3)
    for shape in ((1, 64, 96, 3), (3, 96, 64, 3)):
        few = pixels(shape).astype("uint8")
        assert relative_error(exported(few), predicted(model, few)) < 1e-4


@pytest.mark.slow
@on_tensorflow
def test_sizes_can_be_chosen(tmp_path):
    model = small("test_convnext")  # not called before: a traced graph may forget the size
    export(model, tmp_path / "m.tflite", batch_size=2, image_size=(96, 64))
    exported = runtimes.open_exported(tmp_path / "m.tflite")
    assert exported.input_shape == (2, 96, 64, 3)
    few = pixels((3, 96, 64, 3)).astype("uint8")
    free = small("test_convnext", input_shape=(None, None, 3))
    free.set_weights(model.get_weights())
    assert relative_error(exported(few), predicted(free, few)) < 1e-4


@pytest.mark.slow
@on_tensorflow
def test_a_model_in_16_bits_is_written_in_float32(model, images, tmp_path):
    previous = keras.config.dtype_policy()
    keras.config.set_dtype_policy("mixed_bfloat16")
    try:
        mixed = small("test_convnext")
    finally:
        keras.config.set_dtype_policy(previous)
    mixed.set_weights(model.get_weights())
    result = export(mixed, tmp_path / "m.tflite", calibration=images)
    assert 1e-4 < result.relative_difference < 0.1  # the model's own rounding
    exported = runtimes.open_exported(tmp_path / "m.tflite")
    assert relative_error(exported(images), predicted(model, images)) < 1e-4
    assert relative_error(predicted(mixed, images), predicted(model, images)) > 1e-4


# SavedModel


@pytest.mark.slow
@on_tensorflow
def test_signatures_take_bytes_floats_and_jpeg_files(model, tmp_path):
    import tensorflow as tf

    export(model, tmp_path / "saved", preprocessing=Preprocessing(64, crop_fraction=0.9), check=False)
    loaded = tf.saved_model.load(str(tmp_path / "saved"))
    assert set(loaded.signatures) == {"serving_default", "float", "jpeg"}
    specs = {
        name: next(iter(signature.structured_input_signature[1].values())).dtype
        for name, signature in loaded.signatures.items()
    }
    assert specs == {"serving_default": tf.uint8, "float": tf.float32, "jpeg": tf.string}
    files = [(IMAGES / name).read_bytes() for name in ("coffee.jpg", "rocket.jpg")]
    prepared = [
        preprocess.preprocess_image(preprocess.decode_image(file, ""), Preprocessing(64, crop_fraction=0.9))
        for file in files
    ]
    expected = predicted(model, np.stack(prepared))
    by_file = loaded.signatures["jpeg"](files=tf.constant(files))["outputs"]
    assert relative_error(by_file, expected) < 1e-4
    for images in (np.stack(prepared), np.stack(prepared).astype("float32")):
        assert relative_error(loaded.serve(images)["outputs"], expected) < 1e-4


# LiteRT


def operators(path):
    from ai_edge_litert.interpreter import Interpreter

    interpreter = Interpreter(str(path), experimental_op_resolver_type=plain_operators())
    interpreter.allocate_tensors()
    return [operator["op_name"] for operator in interpreter._get_ops_details()]


def plain_operators():
    from ai_edge_litert.interpreter import OpResolverType

    return OpResolverType.BUILTIN_WITHOUT_DEFAULT_DELEGATES


@pytest.mark.slow
@on_tensorflow
@pytest.mark.parametrize("name", ["convnext_atto", "convnextv2_atto"])
def test_litert_graph_has_no_shape_arithmetic_and_a_depthwise_convolution_a_block(name, tmp_path):
    model = small(name)
    export(model, tmp_path / "m.tflite")
    names = operators(tmp_path / "m.tflite")
    blocks = sum("stages" in layer.name for layer in model.layers)
    # Three for 7x7, each of a size that the fast kernels take; one on the last stage's maps of 2x2.
    assert names.count("DEPTHWISE_CONV_2D") == 3 * (blocks - 2) + 2
    assert names.count("GELU") == blocks
    assert names.count("CONV_2D") == 2 * blocks + 4
    assert not {"SHAPE", "GATHER", "PACK", "STRIDED_SLICE", "RESHAPE", "TRANSPOSE", "ERF"} & set(names)
    assert not any(name.startswith("Flex") for name in names)


@pytest.mark.slow
@on_tensorflow
@pytest.mark.parametrize("name", ["convnext_atto", "convnextv2_atto"])
def test_precisions_of_litert(name, tmp_path):
    model = small(name)
    sizes, differences = {}, {}
    for precision in FORMATS["litert"].precisions:
        path = tmp_path / f"{precision}.tflite"
        result = export(model, path, precision=precision)
        sizes[precision], differences[precision] = result.num_bytes, result.relative_difference
    assert sizes["float16"] < 0.53 * sizes["float32"]
    assert sizes["dynamic_int8"] < 0.3 * sizes["float32"]
    assert sizes["int8"] < 0.3 * sizes["float32"]
    assert differences["float32"] < 1e-4 < differences["float16"] < 1e-2
    assert differences["float16"] < differences["dynamic_int8"] < 0.1
    assert differences["float16"] < differences["int8"] < 0.1
    exported = runtimes.open_exported(tmp_path / "int8.tflite")
    assert exported.input_dtype == "uint8" and exported.output_shape == (1, 7)
    for precision in FORMATS["litert"].precisions:
        assert delegated(tmp_path / f"{precision}.tflite") == {"DELEGATE": 1}


def delegated(path):
    """What is left of the graph when the fast kernels for CPUs have taken theirs."""
    from ai_edge_litert.interpreter import Interpreter

    interpreter = Interpreter(str(path))
    interpreter.allocate_tensors()
    alone = len(operators(path))
    return collections.Counter(row["op_name"] for row in interpreter._get_ops_details()[alone:])


@pytest.mark.slow
@on_tensorflow
@pytest.mark.parametrize("side", [32, 96])
def test_maps_smaller_than_the_kernel_are_exported_in_every_precision(side, tmp_path):
    model = small("test_convnext", input_shape=(side, side, 3))
    for precision in FORMATS["litert"].precisions:
        result = export(model, tmp_path / f"{precision}.tflite", precision=precision)
        assert result.relative_difference < 0.15


@pytest.mark.slow
@on_tensorflow
def test_ranges_are_those_of_all_calibration_images(tmp_path):
    """One image with values ten times as large among many must not be cut off by an average."""
    from keras_convnext.exporting import litert_int8

    model = small("test_convnext")
    export(model, tmp_path / "m.tflite")
    content = (tmp_path / "m.tflite").read_bytes()
    random = np.random.default_rng(0)
    images = [random.uniform(100, 110, (1, 64, 64, 3)).astype("float32") for _ in range(8)]
    images.insert(3, random.uniform(0, 255, (1, 64, 64, 3)).astype("float32"))
    expected = runtimes.open_exported(tmp_path / "m.tflite")(images[3])

    def error(calibration):
        plan = litert_int8.PLANS["int8"]
        (tmp_path / "q.tflite").write_bytes(litert_int8.quantized(content, plan, calibration))
        return relative_error(runtimes.open_exported(tmp_path / "q.tflite")(images[3]), expected)

    assert error(images) < 0.05 < error(images[:3] + images[4:])


@pytest.mark.slow
@on_tensorflow
def test_compact_writes_equal_arrays_once_and_changes_no_result(tmp_path):
    from ai_edge_litert import schema_py_generated as schema

    from keras_convnext.exporting import litert_int8

    model = small("convnext_atto")
    export(model, tmp_path / "m.tflite", precision="int8")
    content = (tmp_path / "m.tflite").read_bytes()
    table = schema.ModelT.InitFromPackedBuf(content, 0)
    plain = flatbuffers_of(table)
    again = litert_int8.compact(plain)
    assert len(again) < 0.97 * len(plain)
    (tmp_path / "plain.tflite").write_bytes(plain)
    (tmp_path / "again.tflite").write_bytes(again)
    images = calibration.calibration_images(preprocessing=Preprocessing(64), count=2)
    results = [runtimes.open_exported(tmp_path / name)(images) for name in ("plain.tflite", "again.tflite")]
    np.testing.assert_array_equal(*results)


def flatbuffers_of(table):
    import flatbuffers

    builder = flatbuffers.Builder()
    builder.Finish(table.Pack(builder), b"TFL3")
    return bytes(builder.Output())


@pytest.mark.slow
@on_tensorflow
def test_a_fixed_batch_is_calibrated_with_as_many_images(tmp_path):
    model = small("test_convnext")
    result = export(model, tmp_path / "m.tflite", precision="int8", batch_size=3)
    assert result.relative_difference < 0.15
    assert runtimes.open_exported(tmp_path / "m.tflite").input_shape == (3, 64, 64, 3)


@pytest.mark.slow
@on_tensorflow
def test_metadata_is_inside_the_litert_file(model, tmp_path):
    labels = [f"leaf {number}" for number in range(7)]
    path = tmp_path / "m.tflite"
    export(model, path, labels=labels, licence="cc0-1.0", preprocessing=Preprocessing(48, crop_fraction=1.0))
    with zipfile.ZipFile(path) as archive:
        metadata = json.loads(archive.read("metadata.json"))
        assert archive.read("labels.txt").decode().splitlines() == labels
    assert metadata["labels"] == labels and metadata["licence"] == "cc0-1.0"
    assert metadata["input"] == {
        "order": "N, H, W, C",
        "colours": "RGB",
        "range": [0, 255],
        "dtype": "float32",
        "image_size": [64, 64],
        "batch_size": 1,
        "preprocessing": {
            "image_size": 64,
            "crop_fraction": 1.0,
            "interpolation": "bicubic",
            "crop_mode": "center",
            "resize_size": None,
        },
    }
    assert metadata["output"] == {"classes": 7, "activation": "linear"}
    with pytest.raises(ValueError, match=r"Expected 7 labels.* 2"):
        export(model, path, labels=["a", "b"], replace=True)


# Calibration


@pytest.mark.once
def test_default_images_are_the_same_each_time_and_differ():
    first, second = (
        calibration.calibration_images(preprocessing=Preprocessing((48, 64)), count=6) for _ in range(2)
    )
    np.testing.assert_array_equal(first, second)
    assert first.shape == (6, 48, 64, 3) and first.dtype == np.uint8
    assert all(np.abs(first[0].astype(int) - other).mean() > 5 for other in first[1:])
    assert calibration.calibration_images(
        preprocessing=Preprocessing((48, 64)), count=2, channels=1
    ).shape == (2, 48, 64, 1)


@pytest.mark.once
def test_folder_and_file_of_images():
    images = calibration.calibration_images(IMAGES, preprocessing=Preprocessing(32), count=9)
    files = sorted(path for path in IMAGES.iterdir() if path.suffix != ".md")
    expected = [preprocess.preprocess_image(preprocess.read_image(file), Preprocessing(32)) for file in files]
    np.testing.assert_array_equal(images, np.stack(expected))
    one = calibration.calibration_images(IMAGES / "coffee.jpg", preprocessing=Preprocessing(32))
    np.testing.assert_array_equal(one[0], expected[1])


@pytest.mark.once
def test_class_folders_are_read_at_any_depth(tmp_path):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        for number in range(3):
            image = Image.new("RGB", (40, 40), (number * 40, 0, 200 if name == "b" else 0))
            image.save(tmp_path / name / f"{number}.png")
    images = calibration.calibration_images(tmp_path, preprocessing=Preprocessing(8), count=4)
    assert [tuple(image[0, 0]) for image in images] == [(0, 0, 0), (80, 0, 0), (0, 0, 200), (80, 0, 200)]


@pytest.mark.once
def test_bad_sources_of_images_are_refused(tmp_path):
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "torn.jpg").write_bytes((IMAGES / "coffee.jpg").read_bytes()[:3000])
    with pytest.raises(ValueError, match=r"torn\.jpg.* is truncated or corrupt"):
        calibration.calibration_images(tmp_path / "images", preprocessing=Preprocessing(32))
    with pytest.raises(ValueError, match="nowhere"):
        calibration.calibration_images(tmp_path / "nowhere", preprocessing=Preprocessing(32))
    with pytest.raises(ValueError, match="count of calibration images from 1 up, received 0"):
        calibration.calibration_images(preprocessing=Preprocessing(32), count=0)


# What is refused, and that nothing is left behind


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"path": "m.tflit"}, ValueError, r"suffix tells the format: \.tflite .* 'm\.tflit'"),
        ({"format": "lite_rt"}, ValueError, r"Unknown format 'lite_rt'. Did you mean 'litert'"),
        ({"format": "onnx"}, ValueError, r"ends in \.onnx .* received 'm\.tflite'"),
        ({"precision": "int4"}, ValueError, r"float32, float16, dynamic_int8, int8. Received: 'int4'"),
        ({"path": "none/m.tflite"}, FileNotFoundError, "There is no folder 'none'"),
        ({"image_size": 0}, ValueError, "image_size=0"),
        ({"check": float("nan")}, ValueError, "check to be a bool or a number from 0 up. Received: nan"),
        ({"check": -0.1}, ValueError, "check to be .* Received: -0.1"),
        ({"calibration": np.zeros((2, 32, 32, 3))}, ValueError, r"\(n, 64, 64, 3\).*\(2, 32, 32, 3\)"),
        ({"calibration": "nowhere"}, ValueError, "nowhere"),
    ],
)
def test_bad_arguments_are_refused(model, arguments, error, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(error, match=message):
        export(model, **{"path": "m.tflite", **arguments})
    assert left_in(tmp_path) == []


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: keras.Sequential([keras.layers.Dense(2)]), ValueError, "Expected a built model"),
        (lambda: keras.layers.Dense(2), TypeError, "received Dense"),
        (lambda: keras.Sequential([keras.Input((4,)), keras.layers.Dense(2)]), ValueError, "N, H, W, C"),
        (
            lambda: small("test_convnext", include_top=False, pyramid_norms=True),
            ValueError,
            "Expected a model with one output",
        ),
    ],
)
def test_models_that_cannot_be_exported_are_refused(make, error, message, tmp_path):
    with pytest.raises(error, match=message):
        export(make(), tmp_path / "m.tflite")
    assert left_in(tmp_path) == []


@pytest.mark.parametrize(
    ("settings", "module", "package"),
    [
        ({"format": "onnx"}, "onnxscript", "onnxscript"),
        ({"format": "litert", "precision": "int8"}, "ai_edge_quantizer", "ai-edge-quantizer"),
    ],
)
def test_missing_converter_is_named(settings, module, package, model, tmp_path, monkeypatch):
    import importlib.util

    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == module else found(name))
    said = rf"'{settings['format']}' needs {package}, which is not installed\. Run pip install {package}\."
    with pytest.raises(ImportError, match=said):
        export(model, tmp_path / NAMES[settings["format"]], **settings)
    assert left_in(tmp_path) == []


@on_tensorflow
def test_a_file_that_its_runtime_refuses_is_an_export_error(model, tmp_path, monkeypatch):
    def refuse(self):
        raise RuntimeError("failed to create XNNPACK runtime")

    monkeypatch.setattr("ai_edge_litert.interpreter.Interpreter.allocate_tensors", refuse)
    with pytest.raises(ExportError, match=r"litert file does not run: .*failed to create XNNPACK.*not kept"):
        export(model, tmp_path / "m.tflite")
    assert left_in(tmp_path) == []


@pytest.mark.skipif(BACKEND == "jax", reason="a child would write it there")
def test_a_file_that_differs_is_not_kept(model, images, tmp_path):
    format = {"tensorflow": "m.tflite", "torch": "m.onnx"}[BACKEND]
    (tmp_path / format).write_text("old")
    with pytest.raises(FileExistsError, match="is there already"):
        export(model, tmp_path / format, calibration=images)
    with pytest.raises(ExportError, match=r"differs from the model by .* is allowed. It was not kept"):
        export(model, tmp_path / format, calibration=images, check=0.0, replace=True)
    assert left_in(tmp_path) == [format]
    assert (tmp_path / format).read_text() == "old"


# What the file is compared with


def tiny(*layers, policy="float32"):
    """Logits of 16 x 16 pixels behind an adapted normaliser that cannot be folded."""
    previous = keras.config.dtype_policy()
    keras.config.set_dtype_policy(policy)
    try:
        norm = keras.layers.Normalization()
        norm.adapt(np.random.default_rng(1).uniform(60, 200, (8, 16, 16, 3)).astype("float32"))
        body = [keras.layers.Conv2D(8, 3, padding="same"), keras.layers.GlobalMaxPooling2D()]
        head = keras.layers.Dense(4, dtype="float32")
        model = keras.Sequential([keras.Input((16, 16, 3)), norm, *layers, *body, head], name="tiny")
    finally:
        keras.config.set_dtype_policy(previous)
    return model


def forgets(monkeypatch):
    """Copies without what their layers keep beside weights: the fault that a check must see."""
    monkeypatch.setattr(deploy, "_carry_over", lambda layer, copy: None)


@pytest.mark.skipif(BACKEND != "torch", reason="one backend tells enough")
@pytest.mark.parametrize("policy", ["float32", "mixed_bfloat16"])
def test_a_file_is_compared_with_the_model_that_was_passed(policy, tmp_path, monkeypatch):
    model = tiny(policy=policy)
    images = pixels((6, 16, 16, 3))
    result = export(model, tmp_path / "m.onnx", calibration=images)
    received = runtimes.open_exported(tmp_path / "m.onnx")(np.rint(images).astype("uint8"))
    expected = np.concatenate([model.predict_on_batch(np.rint(images))])
    assert result.max_difference == pytest.approx(np.abs(received - expected.astype("float64")).max())
    assert (result.relative_difference < 1e-4) == (policy == "float32")
    assert (result.num_images, result.images) == (6, "images of calibration=")
    forgets(monkeypatch)
    said = r"file differs from the model by" if policy == "float32" else r"tiny .* form differs from it by"
    with pytest.raises(ExportError, match=rf"{said} .* Does a layer of your own keep"):
        export(model, tmp_path / "other.onnx", calibration=images)
    assert left_in(tmp_path) == ["m.onnx", "m.onnx.metadata.json"]


@pytest.mark.parametrize("policy", ["float32", "mixed_bfloat16"])
def test_a_size_that_the_model_does_not_take_is_compared_at_its_own(policy, tmp_path, monkeypatch):
    forgets(monkeypatch)
    with pytest.raises(ExportError, match=r"tiny cannot be written: .* form differs from it by"):
        export(tiny(policy=policy), tmp_path / "m.onnx", image_size=(24, 32))
    assert left_in(tmp_path) == []


def test_a_model_that_is_not_finite_is_refused_before_it_is_written(tmp_path):
    model = tiny()
    kernel, bias = model.layers[-1].get_weights()
    model.layers[-1].set_weights([kernel, np.full_like(bias, np.nan)])
    with pytest.raises(
        ExportError, match=r"tiny gives numbers that are not finite for 2 of 2 images, as aft"
    ):
        export(model, tmp_path / "m.onnx", calibration=pixels((2, 16, 16, 3)))
    assert left_in(tmp_path) == []


DIVIDED = np.linspace(0, 1, 2 * 16 * 16 * 3, dtype="float32").reshape(2, 16, 16, 3)
ONE_DIVIDED = np.concatenate([255 * DIVIDED, DIVIDED])


@pytest.mark.parametrize(
    ("images", "said"),
    [
        (DIVIDED, "received float32 from 0 to 1. Pass them"),
        (2 * DIVIDED - 1, "received float32 from -1 to 1. Pass them"),
        (DIVIDED.astype("uint8"), "received uint8 from 0 to 1. Pass them"),
        (ONE_DIVIDED, "received float32 from 0 to 255, and up to 0.49.* in image 2"),
        (DIVIDED * 65535, "received float32 from 0 to 65535"),
        (DIVIDED > 0.5, "received bool from 0 to 1"),
        (np.where(DIVIDED > 0.9, np.nan, 200), "received float64 from nan to nan"),
    ],
)
def test_calibration_images_in_another_range_are_refused(images, said, tmp_path):
    for format in ("m.onnx", "m.tflite"):
        with pytest.raises(ValueError, match=rf"pixels in 0\.\.255, {said}"):
            export(tiny(), tmp_path / format, calibration=images)
    assert left_in(tmp_path) == []


def test_pixels_of_any_type_are_taken(tmp_path, monkeypatch):
    model, dark = tiny(), np.zeros((1, 16, 16, 3))
    for images in (255 * DIVIDED, np.concatenate([dark, dark + 1, dark + 200]).astype("uint8")):
        taken, _ = export_module._calibration_images(model, images, Preprocessing(16))
        np.testing.assert_array_equal(taken, np.rint(images))


def test_other_inputs_and_channels_are_refused_with_a_way_on(tmp_path):
    image, table = keras.Input((16, 16, 3)), keras.Input((2,))
    joined = keras.layers.Concatenate()([keras.layers.Flatten()(image), table])
    two = keras.Model([image, table], keras.layers.Dense(2)(joined), name="two")
    with pytest.raises(ValueError, match=r"one input of images.*two, inputs .*deploy\(model\)\.export\(path"):
        export(two, tmp_path / "m.onnx")
    four = keras.Sequential([keras.Input((16, 16, 4)), keras.layers.Flatten(), keras.layers.Dense(2)])
    with pytest.raises(
        ValueError, match=r"a model of 1 or 3 channels, received one of 4: pass images of your"
    ):
        export(four, tmp_path / "m.onnx")
    assert left_in(tmp_path) == []


@pytest.mark.parametrize(
    ("last", "name"),
    [
        ([keras.layers.Dense(3)], "linear"),
        ([keras.layers.Dense(3, activation="sigmoid")], "sigmoid"),
        ([keras.layers.Dense(3), keras.layers.Softmax()], "softmax"),
        ([keras.layers.Dense(3, activation=keras.layers.Softmax())], "softmax"),
        ([keras.layers.Dense(3), keras.layers.Activation("softmax")], "softmax"),
        ([keras.Sequential([keras.Input((3,)), keras.layers.Dense(3, activation="softmax")])], "softmax"),
        ([keras.layers.Dense(3), keras.layers.Lambda(lambda x: x)], "lambda"),
    ],
)
def test_the_activation_of_the_outputs_is_told(last, name):
    model = keras.Sequential([keras.Input((3,)), *last])
    assert metadata.activation(model) == name
    x = keras.Input((3,))
    assert metadata.activation(keras.Model(x, model(x))) == name
    assert metadata.activation(keras.Model(x, keras.ops.sigmoid(model(x)))) == "sigmoid"


@pytest.mark.skipif(BACKEND != "torch", reason="the exporter of PyTorch that traces sizes")
def test_keras_exports_our_layers_by_itself(tmp_path):
    norms = [normalization.LayerNormalization(), normalization.RMSNormalization()]
    model = keras.Sequential([keras.Input((4, 4, 3)), *norms, keras.layers.Flatten(), keras.layers.Dense(2)])
    few = pixels((2, 4, 4, 3))
    expected = predicted(model, few)
    model.export(tmp_path / "m.onnx", format="onnx", verbose=False)
    assert relative_error(runtimes.open_exported(tmp_path / "m.onnx")(few), expected) < 1e-4


# What files say, and outputs that are no numbers


@pytest.mark.once
@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"labels": ["a", "b"]}, r"expected 3 texts as 'labels', received \['a', 'b'\]"),
        ({"labels": 3}, "expected 3 texts as 'labels', received 3"),
        ({"labels": ["a", "b", float("nan")]}, "expected 3 texts as 'labels'"),
        ({"labels": {"0": "a"}}, "expected 3 texts as 'labels'"),
        ({"licence": 1}, "expected a text as 'licence', received 1"),
        ({"name": ["m"]}, "expected a text as 'name'"),
        ({"input": []}, r"expected an object as 'input', received \[\]"),
        ({"output": {"classes": 2.5}}, "expected a whole number above 0 as 'classes', received 2.5"),
        ({"output": {"classes": True}}, "expected a whole number above 0 as 'classes', received True"),
        ({"output": {"classes": 3, "activation": {}}}, "expected a text as 'activation'"),
        ({"input": {"image_size": 1000000}}, "image_size.*1000000"),
        ({"input": {"image_size": "64"}}, "image_size.*'64'"),
        ({"input": {"preprocessing": {"image_size": 64, "crop_fraction": 1e-6}}}, "crop_fraction"),
        ({"input": {"preprocessing": {"image_size": 64, "resize_size": 10**9}}}, "resize_size"),
        ({"input": {"preprocessing": [1]}}, "TypeError"),
    ],
)
def test_metadata_of_another_kind_is_told_in_a_sentence(change, said, tmp_path):
    metadata = {"name": "m", "input": {"image_size": [64, 64]}, "output": {"classes": 3}, "labels": None}
    assert written_metadata(tmp_path, json.dumps(metadata)) == metadata
    for name in ("m.onnx", "m.tflite"):
        with pytest.raises(ValueError, match=f"what `keras-convnext export` writes.*{said}") as caught:
            written_metadata(tmp_path, json.dumps(metadata | change), name)
        assert len(str(caught.value)) < 500 and "Export the model again." in str(caught.value)


@pytest.mark.once
@pytest.mark.parametrize("text", ["", "[]", "{}", "[" * 100_000, '{"input": 1e999', "\udce9", "null", "nan"])
def test_metadata_that_is_no_object_is_told_in_a_sentence(text, tmp_path):
    for name in ("m.onnx", "m.tflite"):
        with pytest.raises(ValueError, match="what `keras-convnext export` writes"):
            written_metadata(tmp_path, text, name)


def written_metadata(folder, text, name="m.onnx"):
    content = text.encode("utf-8", "surrogateescape")
    path = folder / name
    if name.endswith(".tflite"):
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
            archive.writestr("metadata.json", content)
    else:
        path.touch()
        runtimes.metadata_file(path).write_bytes(content)
    return runtimes.read_metadata(path)


@pytest.mark.once
def test_metadata_in_a_damaged_or_endless_archive_is_told_in_a_sentence(tmp_path):
    written_metadata(tmp_path, json.dumps({"input": {}, "output": {"classes": 3}}), "m.tflite")
    content = bytearray((tmp_path / "m.tflite").read_bytes())
    content[50] ^= 0xFF  # in the deflate stream
    (tmp_path / "m.tflite").write_bytes(content)
    with pytest.raises(ValueError, match=r"in '.*m\.tflite', which is damaged"):
        runtimes.read_metadata(tmp_path / "m.tflite")
    with zipfile.ZipFile(tmp_path / "large.tflite", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("metadata.json", bytes(70_000_000))
    with pytest.raises(ValueError, match="what `keras-convnext export` writes"):
        runtimes.read_metadata(tmp_path / "large.tflite")


@pytest.mark.once
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_a_runtime_gives_no_number_that_is_not_finite(value):
    def call(images):
        return np.where(np.arange(3) == 1, value, np.ones((len(images), 3))).astype("float32")

    exported = runtimes.ExportedModel((2, 8, 8, 3), "float32", (2, 3), call, {"name": "leaves"})
    with pytest.raises(ValueError, match="leaves gives numbers that are not finite, as after a training"):
        exported(np.zeros((3, 8, 8, 3), "uint8"))


@pytest.mark.once
def test_a_report_says_on_which_images_it_was_measured():
    def result(images, count=32):
        return ExportResult(pathlib.Path("m.onnx"), "onnx", "float32", 1, count, images)

    one = report.measured_on([result("crops of three photographs"), result("crops of three photographs")])
    assert one == "difference, same top-1: on 32 crops of three photographs"
    two = report.measured_on([result("images of 'leaves'", 5), result("images of calibration=", 2)])
    assert two == "difference, same top-1: on 5 images of 'leaves'; 2 images of calibration="


@pytest.mark.once
def test_a_page_is_made_of_pictures_that_a_tab_can_hold():
    def settings(**changes):
        source = {"image_size": 64, "colours": "RGB"} | changes
        about = {"input": source, "output": {"classes": 3, "activation": "linear"}}
        return web_page._page_settings(about, pathlib.Path("m.onnx"))

    assert (settings()["channels"], settings(colours="gray")["channels"]) == (3, 1)
    with pytest.raises(ValueError, match=r"RGB or gray pictures. 'm\.onnx' takes 4 channels"):
        settings(colours="4 channels")
    with pytest.raises(ValueError, match=r"at most 16,777,216 pixels.* takes 16,384 x 16,384"):
        settings(image_size=16384)


@pytest.mark.once
@pytest.mark.parametrize("kind", ["link", "ring", "negative", "large", "pipe"])
def test_an_archive_of_the_runtime_that_is_odd_is_told_in_a_sentence(kind, tmp_path):
    path = tmp_path / "runtime.tgz"
    if kind == "pipe":
        os.mkfifo(path)
    else:
        names = [f"package/dist/{name}" for name, _ in web_page.RUNTIME_FILES.values()]
        with tarfile.open(path, "w:gz") as archive:
            for name, other in zip(names, names[:1] * 2 if kind == "link" else names[::-1], strict=True):
                member = tarfile.TarInfo(name)
                if kind in ("link", "ring"):
                    member.type, member.linkname = tarfile.LNKTYPE, other
                else:
                    member.size = -512 if kind == "negative" else 10**12
                archive.addfile(member)
    said = {"link": None, "ring": None, "negative": "-512 bytes", "large": "1,000,000,000,000 bytes"}
    if said.get(kind, "") is None:
        assert web_page._read_archive(path) == dict.fromkeys(web_page.RUNTIME_FILES, b"")
    else:
        with pytest.raises((ValueError, OSError), match=said.get(kind, "named pipe")):
            web_page._read_archive(path)


def lies_in(folder):
    """{path in it: content} of all files of a folder."""
    files = (path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}


def saved_model(folder):
    """The files of a SavedModel as `export` leaves them, without their content."""
    for name in ("variables/variables.index", "variables/variables.data-00000-of-00001"):
        put(folder / name)
    put(folder / "fingerprint.pb")
    put(folder / "assets.extra" / "metadata.json")
    (folder / "assets").mkdir()
    (folder / "saved_model.pb").write_bytes(b"graph that reads words.txt")


def put(path):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("the only copy")


def refused_to_replace(model, path, **settings):
    """What `export` says, which leaves everything as it was, with and without `replace`."""
    before = lies_in(path.parent)
    for replace in (False, True):
        with pytest.raises(FileExistsError) as caught:
            export(model, path, replace=replace, check=False, **settings)
        assert lies_in(path.parent) == before
    return str(caught.value)


@pytest.mark.every_backend
@pytest.mark.parametrize("name", ["victim", "x.tflite", "x.onnx"])
def test_a_folder_of_other_files_is_never_replaced(name, model, tmp_path):
    for number in range(4):
        put(tmp_path / name / f"{number}" / "thesis.txt")
    said = refused_to_replace(model, tmp_path / name)
    assert "only one that holds a SavedModel and nothing else is replaced" in said
    assert "It holds 4 other files or folders: 0, 1, 2, .... Name another path" in said


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    [
        "thesis.txt",
        ".hidden",
        "model.tflite",
        "variables/thesis.txt",
        "variables/assets/words.txt",
        "assets/thesis.txt",
        "assets.extra/tf_serving_warmup_requests",
        "photos/thesis.txt",
    ],
)
def test_a_saved_model_with_a_file_of_someone_else_is_never_replaced(name, model, tmp_path):
    saved_model(tmp_path / "m")
    put(tmp_path / "m" / name)
    assert name in refused_to_replace(model, tmp_path / "m")


def test_a_folder_of_graphs_alone_or_of_links_is_never_replaced(model, tmp_path):
    (tmp_path / "empty").mkdir()
    assert "It holds 0 other files or folders. Name another" in refused_to_replace(model, tmp_path / "empty")
    saved_model(tmp_path / "m")
    put(tmp_path / "data" / "thesis.txt")
    (tmp_path / "m" / "assets").rmdir()
    (tmp_path / "m" / "assets").symlink_to(tmp_path / "data")
    assert "It holds 1 other files or folders: assets." in refused_to_replace(model, tmp_path / "m")


@pytest.mark.parametrize("name", ["link", "link.tflite", "link.onnx"])
def test_a_link_to_a_folder_is_never_replaced(name, model, tmp_path):
    saved_model(tmp_path / "m")
    (tmp_path / name).symlink_to("m")
    assert f"{name}' is there already: a link to 'm'" in refused_to_replace(model, tmp_path / name)
    assert (tmp_path / name).is_symlink()


def test_a_file_is_not_replaced_by_a_folder(model, tmp_path):
    put(tmp_path / "thesis")
    assert "a file, which a folder does not replace" in refused_to_replace(model, tmp_path / "thesis")


@pytest.mark.parametrize("name", ["m.onnx.metadata.json", "m.onnx.data"])
def test_a_file_beside_is_replaced_only_on_request(name, model, tmp_path):
    put(tmp_path / name)
    with pytest.raises(FileExistsError, match=rf"{name}' is there already. Pass replace=True"):
        export(model, tmp_path / "m.onnx", check=False)
    assert left_in(tmp_path) == [name]


@pytest.mark.once
def test_a_folder_in_which_someone_works_meanwhile_is_not_replaced(model, tmp_path, monkeypatch):
    path = tmp_path / "m"
    saved_model(path)

    def write_while_another_works(model, request, row, folder):
        saved_model(pathlib.Path(request.path))
        put(path / "thesis.txt")

    monkeypatch.setattr("keras_convnext.exporting.export._write", write_while_another_works)
    with pytest.raises(FileExistsError, match=r"It holds 1 other files or folders: thesis\.txt"):
        export(model, path, check=False, replace=True)
    assert (path / "thesis.txt").read_text() == "the only copy" and left_in(tmp_path) == ["m"]


@pytest.mark.slow
@on_tensorflow
def test_a_saved_model_is_replaced_and_what_came_meanwhile_is_not(model, images, tmp_path, monkeypatch):
    path = tmp_path / "m"
    saved_model(path)
    put(path / "assets" / "words.txt")  # which the graph names
    export(model, path, calibration=images, replace=True)
    first = lies_in(path)
    assert "assets/words.txt" not in first
    export(model, path, calibration=images, replace=True)  # our own
    assert set(lies_in(path)) == set(first) and left_in(tmp_path) == ["m"]
    write = writers.write

    def write_while_another_works(*arguments):
        write(*arguments)
        put(path / "thesis.txt")

    monkeypatch.setattr(writers, "write", write_while_another_works)
    with pytest.raises(FileExistsError, match=r"It holds 1 other files or folders: thesis\.txt"):
        export(model, path, calibration=images, replace=True)
    assert set(lies_in(path)) == {*first, "thesis.txt"} and left_in(tmp_path) == ["m"]


@pytest.mark.slow
@on_tensorflow
def test_a_model_that_the_other_backend_cannot_load_is_refused(tmp_path):
    class Unknown(keras.layers.Layer):
        def call(self, x):
            return x

    inputs = keras.Input((64, 64, 3))
    model = keras.Model(inputs, small("test_convnext")(Unknown()(inputs)))
    with pytest.raises(ExportError, match=r"the process with Keras on torch failed: .*Unknown"):
        export(model, tmp_path / "m.onnx")
    assert left_in(tmp_path) == []


# The command


@pytest.mark.slow
@on_tensorflow
def test_command_writes_several_files_and_a_report(weights_folder, run, tmp_path):
    code, out, err = run(
        "export",
        weights_folder / "test_convnext2.r160_in1k.safetensors",
        "exported",
        "--format",
        "litert",
        "--precision",
        "float32,dynamic_int8",
        "--image-size",
        "64",
        "--tolerance",
        "0.9",
        "--report",
        "report",
    )
    assert (code, out.count("\n")) == (0, 4), err  # head, two files, what was compared
    files = left_in(tmp_path / "exported")
    assert files == [
        f"test_convnext2.r160_in1k_{precision}.tflite" for precision in ("dynamic_int8", "float32")
    ]
    assert left_in(tmp_path / "report") == ["exports.csv", "exports.png", "table.md"]
    with open(tmp_path / "report" / "exports.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["precision"] for row in rows] == ["float32", "dynamic_int8"]
    assert Image.open(tmp_path / "report" / "exports.png").width > 800
    assert "\nparameters: " in (tmp_path / "report" / "table.md").read_text()
    with zipfile.ZipFile(tmp_path / "exported" / files[0]) as archive:
        assert len(archive.read("labels.txt").decode().splitlines()) == 1000


def test_command_refuses_with_a_line(weights_folder, refused, tmp_path):
    weights = weights_folder / "test_convnext2.r160_in1k.safetensors"
    assert "suffix tells the format" in refused("export", weights, "m.tflit")
    assert "There is no folder" in refused("export", weights, "none/m.tflite")
    assert "nowhere" in refused("export", weights, "m.tflite", "--calibration", "nowhere")
    assert "Expected --format" in refused("export", weights, "exported", "--precision", "all")
    assert "--report and --no-check" in refused("export", weights, "m.onnx", "--no-check", "--report", "r")
    assert left_in(tmp_path) == []


@pytest.mark.once
def test_files_that_were_exported_before_keep_their_preprocessing():
    older = {
        "image_size": 64,
        "crop": 1.0,
        "resize_mode": "squash",
        "resize_size": None,
        "interpolation": "bilinear",
    }
    found = runtimes.stored_preprocessing({"input": {"image_size": 64, "preparation": older}})
    assert found == Preprocessing(64, crop_fraction=1.0, crop_mode="squash", interpolation="bilinear")
    assert runtimes.stored_preprocessing({"input": {"image_size": 64, "preparation": {}}}) is None
    assert runtimes.stored_preprocessing({}) is None


def test_a_child_imports_nothing_of_the_working_folder(tmp_path, monkeypatch):
    """Not with PYTHONPATH either, an empty part of which means the working folder."""
    for name in ("random", "keras", "keras_convnext"):
        (tmp_path / f"{name}.py").write_text("raise SystemExit('of the working folder')")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(("", "/nowhere", "")))
    found = []

    def run(command, env, **more):
        code = "import importlib.util, random; print(importlib.util.find_spec('keras_convnext').origin)"
        place = command.index("-c") + 1
        ended = real([*command[:place], code, *command[place + 1 :]], env=env, capture_output=True, text=True)
        found.append((ended.stdout, ended.stderr))
        raise OSError("enough")

    real = subprocess.run
    monkeypatch.setattr("subprocess.run", run)
    backend = "tensorflow" if BACKEND == "torch" else "torch"
    row = next(row for row in FORMATS.values() if row.backend == backend)
    request = writers.Request("x", "float32", str(tmp_path / "x"), None, None, None, Preprocessing(32))
    model = keras.Sequential([keras.Input((2,)), keras.layers.Dense(1)])
    with pytest.raises(OSError, match="enough"):
        export_module._write(model, request, row, tmp_path)
    assert found == [(f"{keras_convnext.__file__}\n", "")]


@pytest.mark.once
def test_every_child_process_leaves_the_working_folder_out():
    """Of the package, the demo and the benchmarks: -P, or a script, whose own folder comes first."""
    root = pathlib.Path(keras_convnext.__file__).parents[1]
    starts = []
    for path in (
        path for name in ("keras_convnext", "demo", "benchmarks") for path in (root / name).rglob("*.py")
    ):
        text = path.read_text(encoding="utf-8")
        starts += [
            (path.name, match[1])
            for match in re.finditer(r"\[\s*sys\.executable,\s*(?:\"-W\", \"ignore\",\s*)?([^,\s]+)", text)
        ]
    assert len(starts) >= 8
    assert {words for _, words in starts} <= {'"-P"', "__file__"}, starts
