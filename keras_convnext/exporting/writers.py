"""Writes a model in one format: in the caller's process where that has the backend of the format, else in a
child, whose `main` reads what to do from a JSON file.
"""

import dataclasses
import json
import pathlib
import sys
from typing import Any

import keras
import numpy as np

from keras_convnext.data.preprocessing import Preprocessing
from keras_convnext.exporting import deploy, litert_int8
from keras_convnext.exporting.formats import DEFAULT_SIZE


@dataclasses.dataclass(frozen=True)
class Request:
    """What to write."""

    format: str  # a name of `FORMATS`
    precision: str  # one of the format's
    path: str  # the file, or the folder of a SavedModel
    batch_size: int | None  # None for any
    image_size: tuple[int, int] | None  # (height, width) in pixels, None for any
    calibration: str | None  # for int8 the path of a `.npy` file, uint8 (n, H, W, C)
    preprocessing: Preprocessing  # for the signature that takes JPEG files


def write(model: Any, request: Request) -> None:
    """Writes a Keras model as the request says; Keras must run on the backend of the format."""
    size: Any = request.image_size
    if request.format == "openvino" and size is None:
        size = DEFAULT_SIZE  # Keras traces a free size with one pixel, which the stem takes for nothing
    deployed = deploy.deploy_for_file(
        model, batch_size=request.batch_size, image_size=size, litert=request.format == "litert"
    )
    writer = {
        "saved_model": _write_saved_model,
        "litert": _write_litert,
        "onnx": _write_onnx,
        "openvino": _write_openvino,
        "torch": _write_torch,
    }[request.format]
    writer(deployed, request)


def main() -> None:
    """Loads the model next to the request, whose path is the first argument, and writes it."""
    path = pathlib.Path(sys.argv[1])
    values = json.loads(path.read_text())
    values["preprocessing"] = Preprocessing(**values["preprocessing"])
    # Our own process saved it a moment ago, so that a Lambda layer in it is as safe as the model is there.
    model = keras.saving.load_model(path.with_name("model.keras"), compile=False, safe_mode=False)
    write(model, Request(**values))


def _write_saved_model(deployed, request):
    import tensorflow as tf

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

    def prepare(content):
        return tf.ensure_shape(jpeg.center_crop(content, request.preprocessing), (*shape[1:3], 3))

    @tf.function
    def serve_jpeg(files):
        batch = tf.map_fn(prepare, files, fn_output_signature=tf.uint8)
        return serve(tf.image.rgb_to_grayscale(batch) if shape[3] == 1 else batch)

    return serve_jpeg.get_concrete_function(tf.TensorSpec(shape[:1], tf.string, name="files"))


def _write_litert(deployed, request):
    import tensorflow as tf

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
        images: Any = ()
        if request.calibration:  # as many at a time as the file takes; some twice where the last are too few
            images, step = np.load(request.calibration), deployed.input.shape[0] or 1
            images[0, 0, 0], images[0, 0, 1] = 0, 255  # so that the pixels' range is 0 to 255
            images = np.resize(images, (-(-len(images) // step), step, *images.shape[1:]))
        content = litert_int8.quantized(content, litert_int8.PLANS[request.precision], images)
    pathlib.Path(request.path).write_bytes(content)


def _torch_program(deployed):
    """A module of the model, images to try it on, and which of their sizes are free."""
    import torch

    names = ("batch", "height", "width")
    # PyTorch takes a free side for one above 1: where maps are resized, so must that of the last stage be.
    least = 64 if len(deployed.output_shape) == 4 else 32
    free = {
        axis: torch.export.Dim(name, min=1 if axis == 0 else least)
        for axis, name in enumerate(names)
        if deployed.input.shape[axis] is None
    }
    # Sizes of 1 would be taken for fixed ones.
    shape = [own or other for own, other in zip(deployed.input.shape[:3], (2, 96, 128), strict=True)]
    return deploy.as_program(deployed), torch.zeros(*shape, deployed.input.shape[3]), (free,)


def _write_onnx(deployed, request):
    import torch

    program, images, dynamic_shapes = _torch_program(deployed)
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
    exported.save(request.path, external_data=4 * deployed.count_params() > 1.9e9)


def _write_torch(deployed, request):
    import torch

    program, images, dynamic_shapes = _torch_program(deployed)
    with torch.no_grad():
        exported = torch.export.export(program, (images,), dynamic_shapes=dynamic_shapes, strict=False)
    torch.export.save(exported, request.path)


def _write_openvino(deployed, request):
    import openvino

    deployed.export(request.path, format="openvino", verbose=False)
    if request.precision == "float32" and request.image_size is not None:
        return
    graph = openvino.Core().read_model(request.path)
    if request.image_size is None:
        graph.reshape([request.batch_size or -1, -1, -1, deployed.input.shape[3]])
    path = pathlib.Path(request.path)
    changed = path.with_name(f"changed-{path.name}")
    openvino.save_model(graph, changed, compress_to_fp16=request.precision == "float16")
    del graph  # it reads weights from the file that is replaced
    for suffix in (".xml", ".bin"):
        changed.with_suffix(suffix).replace(path.with_suffix(suffix))
