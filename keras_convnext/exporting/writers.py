"""Writes a model in one format, on the backend that the format's converter needs.

Runs in the process of the caller where that has the right backend, else in a child: `main` reads what to do
from a JSON file, loads the model that the caller saved, and writes.
"""

import dataclasses
import json
import os
import pathlib
import sys
from typing import Any

import numpy as np

from keras_convnext.data.preprocessing import Preprocessing


@dataclasses.dataclass(frozen=True)
class Request:
    """What to write."""

    format: str  # a name of `export.FORMATS`
    precision: str  # one of the format's
    path: str  # the file, or the folder of a SavedModel
    batch_size: int | None  # None for any
    image_size: tuple[int, int] | None  # (height, width) in pixels, None for any
    calibration: str | None  # for int8 the path of a `.npy` file, uint8 (n, H, W, C)
    preprocessing: Preprocessing  # for the signature that takes JPEG files


def write(model: Any, request: Request) -> None:
    """Writes a Keras model as the request says; Keras must run on the backend of the format."""
    writer = {
        "saved_model": _write_saved_model,
        "litert": _write_litert,
        "onnx": _write_onnx,
        "openvino": _write_openvino,
        "torch": _write_torch,
    }[request.format]
    writer(model, request)


def main() -> int:
    """Loads the model next to the request, whose path is the first argument, and writes it."""
    _, request_path = sys.argv
    folder = pathlib.Path(request_path).parent
    values = json.loads(pathlib.Path(request_path).read_text())
    size = values["image_size"]
    converted = {
        "image_size": None if size is None else tuple(size),
        "preprocessing": Preprocessing(**values["preprocessing"]),
    }
    request = Request(**values | converted)
    import keras

    # Our own process saved it a moment ago, so that a Lambda layer in it is as safe as the model is there.
    model = keras.saving.load_model(folder / "model.keras", compile=False, safe_mode=False)
    write(model, request)
    return 0


def _write_saved_model(model, request):
    import tensorflow as tf

    from keras_convnext.exporting.deploy import deploy_for_file

    deployed = deploy_for_file(model, batch_size=request.batch_size, image_size=request.image_size)
    module = _tracked(deployed)
    shape = deployed.input.shape

    @tf.function
    def serve(images):
        return {"outputs": deployed(tf.cast(images, tf.float32), training=False)}

    module.serve = serve  # takes both types
    signatures = {
        name: serve.get_concrete_function(tf.TensorSpec(shape, dtype, name="images"))
        for name, dtype in (("serving_default", tf.uint8), ("float", tf.float32))
    }
    if None not in shape[1:3] and shape[3] in (1, 3):
        signatures["jpeg"] = _jpeg_signature(serve, shape, request)
    tf.saved_model.save(module, request.path, signatures=signatures)


def _tracked(deployed):
    """An object that TensorFlow finds the weights of a model in; in the model itself it does not find all."""
    import tensorflow as tf

    module = tf.Module()
    module.weights = [variable.value for variable in deployed.weights]
    return module


def _jpeg_signature(serve, shape, request):
    """A function of the bytes of JPEG files, prepared as the evaluation prepares them."""
    import tensorflow as tf

    from keras_convnext.data import jpeg

    size = (shape[1], shape[2])
    preprocessing = request.preprocessing.at(size)

    def prepare(content):
        return tf.ensure_shape(jpeg.center_crop(content, preprocessing), (*size, 3))

    @tf.function
    def serve_jpeg(files):
        batch = tf.map_fn(prepare, files, fn_output_signature=tf.uint8)
        return serve(tf.image.rgb_to_grayscale(batch) if shape[3] == 1 else batch)

    return serve_jpeg.get_concrete_function(tf.TensorSpec(shape[:1], tf.string, name="files"))


def _write_litert(model, request):
    import tensorflow as tf

    from keras_convnext.exporting.deploy import deploy_for_file
    from keras_convnext.exporting.litert_int8 import PLANS, quantized

    sizes = {"batch_size": request.batch_size, "image_size": request.image_size}
    deployed = deploy_for_file(model, **sizes, litert=True)
    input_dtype = tf.uint8 if request.precision == "int8" else tf.float32

    @tf.function(input_signature=[tf.TensorSpec(deployed.input.shape, input_dtype, name="images")])
    def serve(images):
        return deployed(tf.cast(images, tf.float32), training=False)

    functions = [serve.get_concrete_function()]
    converter = tf.lite.TFLiteConverter.from_concrete_functions(functions, _tracked(deployed))
    if request.precision == "float16":
        converter.optimizations = [tf.lite.Optimize.DEFAULT]
        converter.target_spec.supported_types = [tf.float16]
    content = converter.convert()
    if "int8" in request.precision:
        images = _calibration_batches(request, deployed.input.shape[0]) if request.calibration else ()
        content = quantized(content, PLANS[request.precision], images)
    pathlib.Path(request.path).write_bytes(content)


def _calibration_batches(request, batch_size):
    """The calibration images, as many at a time as the file takes; some twice where the last are too few."""
    images = np.load(request.calibration)
    step = batch_size or 1
    order = np.arange(-(-len(images) // step) * step) % len(images)
    return [images[order[start : start + step]] for start in range(0, len(order), step)]


def _torch_program(model, request):
    """A module of the deployed model, images to try it on, and which of their sizes are free."""
    import torch

    from keras_convnext.exporting.deploy import as_program, deploy_for_file

    deployed = deploy_for_file(model, batch_size=request.batch_size, image_size=request.image_size)
    names = ("batch", "height", "width")
    free = {
        axis: torch.export.Dim(name, min=1 if axis == 0 else 32)
        for axis, name in enumerate(names)
        if deployed.input.shape[axis] is None
    }
    # Sizes of 1 would be taken for fixed ones.
    shape = [own or other for own, other in zip(deployed.input.shape[:3], (2, 96, 128), strict=True)]
    return as_program(deployed), torch.zeros(*shape, deployed.input.shape[3]), (free,)


def _write_onnx(model, request):
    import torch

    program, images, dynamic_shapes = _torch_program(model, request)
    with torch.no_grad():
        exported = torch.onnx.export(
            program,
            (images,),
            dynamo=True,
            dynamic_shapes=dynamic_shapes,
            input_names=["images"],
            output_names=["outputs"],
            verbose=False,
        )
    # A file of protobuf holds 2 GB; weights beyond that go to a second file.
    exported.save(request.path, external_data=4 * model.count_params() > 1.9e9)


def _write_torch(model, request):
    import torch

    program, images, dynamic_shapes = _torch_program(model, request)
    with torch.no_grad():
        exported = torch.export.export(program, (images,), dynamic_shapes=dynamic_shapes, strict=False)
    torch.export.save(exported, request.path)


def _write_openvino(model, request):
    import openvino

    from keras_convnext.exporting.deploy import deploy_for_file

    # Keras traces a free size with images of one pixel, which the first layers take for nothing.
    traced_size = request.image_size or (224, 224)
    deployed = deploy_for_file(model, batch_size=request.batch_size, image_size=traced_size)
    deployed.export(request.path, format="openvino", verbose=False)
    if request.precision == "float32" and request.image_size is not None:
        return
    graph = openvino.Core().read_model(request.path)
    if request.image_size is None:
        graph.reshape([request.batch_size or -1, -1, -1, deployed.input.shape[3]])
    folder, name = os.path.split(request.path)
    changed = os.path.join(folder, f"changed-{name}")
    openvino.save_model(graph, changed, compress_to_fp16=request.precision == "float16")
    del graph  # it reads weights from the file that is replaced
    for suffix in (".xml", ".bin"):
        os.replace(changed[:-4] + suffix, request.path[:-4] + suffix)
