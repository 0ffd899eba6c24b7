"""Times of LiteRT on a CPU: depthwise kernels of each size, and plans of quantisation.

Prints three kinds of table, times taken in turns, the shortest of each:
1. a depthwise convolution with kernels of 3 x 3 to 9 x 9, and 7 x 7 as `depthwise_in_frames` writes it;
2. where the time goes in the blocks of a model: each kind of operation alone, times the number of blocks;
3. whole models: depthwise convolutions whole or in frames, and int8 in several plans, with the difference
   from the float file on photos (random weights) and the number of parts that the fast kernels (XNNPACK)
   take, 1 meaning all in one.

    python benchmarks/litert_plans.py --output benchmarks/exports/litert_plans.md
"""

import argparse
import functools
import os
import pathlib
import time

os.environ["KERAS_BACKEND"] = "tensorflow"

import keras
import numpy as np
import tensorflow as tf
from ai_edge_litert.interpreter import Interpreter, OpResolverType

from keras_convnext import _environment, convnext, load
from keras_convnext._terminal import silenced
from keras_convnext.architecture import layers_of
from keras_convnext.data.calibration import calibration_images
from keras_convnext.data.preprocessing import Preprocessing
from keras_convnext.exporting import deploy
from keras_convnext.exporting.litert_int8 import PLANS, quantized
from keras_convnext.layers.depthwise import DepthwiseConv2D, depthwise_in_frames
from keras_convnext.layers.normalization import LayerNormalization
from keras_convnext.variants import VARIANTS

MAPS = ((56, 96), (28, 192), (14, 384), (7, 768))  # side, channels of ConvNeXt-T at 224 pixels
MODELS = ("convnext_atto", "convnextv2_atto", "convnext_tiny")
OTHER_PLANS = {
    "int8, logits too": PLANS["int8"] | {"FULLY_CONNECTED": "static"},
    "int8, depthwise too": PLANS["int8"] | {"DEPTHWISE_CONV_2D": "static"},
    "dynamic int8, depthwise float": {"CONV_2D": "dynamic", "FULLY_CONNECTED": "dynamic"},
}


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=pathlib.Path, help="file for the tables")
    parser.add_argument("--rounds", type=int, default=40, help="turns, default 40")
    parser.add_argument("--quick", action="store_true", help="a tiny model alone, to try the program")
    options = parser.parse_args()
    models = ("test_convnext",) if options.quick else MODELS
    facts = ", ".join(f"{name}: {value}" for name, value in _environment.machine().items())
    lines = [f"- {facts}; {_environment.available_cores()} threads, {options.rounds} rounds", ""]
    lines += depthwise_table(options.rounds)
    for name in models if options.quick else ("convnext_tiny", "convnext_atto"):
        lines += ["", *operation_table(name, options.rounds)]
    for name in models:
        lines += ["", *plan_table(name, options.rounds)]
    text = "\n".join(lines) + "\n"
    print(text)
    if options.output:
        options.output.write_text(text)


def depthwise_table(rounds):
    kinds = [*(f"{side} x {side}" for side in (3, 5, 7, 9)), "7 x 7 in frames"]
    runs = {}
    for side, channels in MAPS:
        for kind in kinds:
            layer = DepthwiseConv2D(int(kind[0]))
            layer.build((1, side, side, channels))
            compute = depthwise_in_frames if "frames" in kind else whole
            content = converted(functools.partial(compute, layer), (1, side, side, channels))
            interpreter = opened(content)
            runs[side, kind] = interpreter.invoke
    best = fastest(runs, rounds)
    header = ["ms for a map", *(f"{side} x {side} x {channels}" for side, channels in MAPS)]
    rows = [[kind, *(f"{1e3 * best[side, kind]:.3f}" for side, _ in MAPS)] for kind in kinds]
    return table(header, rows)


def operation_table(name, rounds):
    """ms of the blocks of each stage, by kind of operation."""
    variant = VARIANTS[name]
    random = np.random.default_rng(0)
    runs = {}
    firsts = [layer for layer in layers_of(variant) if layer.name.endswith(".0.dwconv")]
    for stage, first in enumerate(firsts):
        side, dim = first.side, first.outputs
        depthwise = DepthwiseConv2D(7)
        depthwise.build((1, side, side, dim))
        narrow, wide = (1, side, side, dim), (1, side, side, 4 * dim)
        kernels = [
            tf.constant(random.normal(size=shape).astype("float32"))
            for shape in ((1, 1, dim, 4 * dim), (1, 1, 4 * dim, dim))
        ]

        products = converted(products_of(*kernels), narrow)
        images = [random.normal(size=narrow).astype("float32") for _ in range(2)]
        with silenced(stdout=True):
            contents = {
                "depthwise, whole": converted(functools.partial(whole, depthwise), narrow),
                "depthwise, in frames": converted(functools.partial(depthwise_in_frames, depthwise), narrow),
                "norm": converted(LayerNormalization(1e-6, affine=False).call, narrow),
                "both products, float32": products,
                "both products, dynamic int8": quantized(products, {"CONV_2D": "dynamic"}),
                "both products, int8": quantized(products, {"CONV_2D": "static"}, images),
                "GELU": converted(lambda x: keras.ops.gelu(x, approximate=False), wide),
                "sum": converted(lambda x: x + 2.0 * x, narrow),
            }
        for kind, content in contents.items():
            runs[kind, stage] = opened(content).invoke
    best = fastest(runs, rounds)
    kinds = list(dict.fromkeys(kind for kind, _ in runs))
    rows = []
    for kind in kinds:
        times = [1e3 * best[kind, stage] * depth for stage, depth in enumerate(variant.depths)]
        rows.append([kind, *(f"{value:.2f}" for value in [*times, sum(times)])])
    return table([f"{name}, ms of all blocks", "stage 1", "stage 2", "stage 3", "stage 4", "together"], rows)


def products_of(first, second):
    return lambda x: tf.nn.conv2d(tf.nn.conv2d(x, first, 1, "VALID"), second, 1, "VALID")


def plan_table(name, rounds):
    model = load(name, weights=None, input_shape=(224, 224, 3), classifier_activation=None)
    random = np.random.default_rng(0)
    for variable in model.trainable_variables:
        deviation = 0.5 if "gamma" in variable.path else 0.02
        value = random.normal(size=variable.shape) * deviation + ("gamma" in variable.path)
        variable.assign(value.astype("float32"))
    images = [image[None] for image in calibration_images(preprocessing=Preprocessing(224))]
    files = {}
    with silenced(stdout=True):
        frames = convnext.depthwise_in_frames
        try:
            convnext.depthwise_in_frames = whole
            files["float32, depthwise whole"] = converted_deployed(model)
        finally:
            convnext.depthwise_in_frames = frames
        content = files["float32"] = converted_deployed(model)
        files["dynamic int8"] = quantized(content, PLANS["dynamic_int8"])
        files["int8"] = quantized(content, PLANS["int8"], images)
        for plan, operations in OTHER_PLANS.items():
            files[plan] = quantized(content, operations, images)
        files["int8, all operations"] = converted_deployed(model, images)
    interpreters = {plan: opened(content) for plan, content in files.items()}
    expected = outputs(interpreters["float32"], images)
    best = fastest({plan: interpreter.invoke for plan, interpreter in interpreters.items()}, rounds)
    rows = []
    for plan, interpreter in interpreters.items():
        found = outputs(interpreter, images)
        rows.append(
            [
                plan,
                f"{len(files[plan]) / 1e6:.2f}",
                f"{len(files[plan]) / len(content):.3f}",
                f"{1e3 * best[plan]:.2f}",
                f"{best['float32'] / best[plan]:.2f}",
                f"{np.abs(found - expected).max() / np.abs(expected).max():.1e}",
                str(parts(files[plan])),
            ]
        )
    header = [name, "MB", "of float32", "ms", "x float32", "difference", "parts"]
    return table(header, rows)


def whole(layer, x):
    kernel, bias = (keras.ops.convert_to_tensor(value) for value in (layer.kernel, layer.bias))
    return keras.ops.depthwise_conv(x, kernel, padding="same") + bias


def converted(function, shape, dtype=tf.float32, images=None, tracked=None):
    concrete = tf.function(function, input_signature=[tf.TensorSpec(shape, dtype, name="images")])
    converter = tf.lite.TFLiteConverter.from_concrete_functions(
        [concrete.get_concrete_function()], tracked or tf.Module()
    )
    if images is not None:
        converter.optimizations = [tf.lite.Optimize.DEFAULT]
        converter.representative_dataset = lambda: ([image.astype("float32")] for image in images)
    with silenced(stdout=True):
        return converter.convert()


def converted_deployed(model, images=None):
    deployed = deploy.deploy_for_file(model, batch_size=1, litert=True)
    dtype = tf.float32 if images is not None else tf.uint8
    tracked = tf.Module()
    tracked.weights = [variable.value for variable in deployed.weights]
    return converted(
        lambda x: deployed(tf.cast(x, tf.float32), training=False),
        deployed.input.shape,
        dtype,
        images,
        tracked,
    )


def opened(content):
    interpreter = Interpreter(model_content=content, num_threads=_environment.available_cores())
    interpreter.allocate_tensors()
    return interpreter


def parts(content):
    """Counts the stretches of the graph that the fast kernels take; a gap between two goes to slow ones."""
    plain = Interpreter(
        model_content=content,
        experimental_op_resolver_type=OpResolverType.BUILTIN_WITHOUT_DEFAULT_DELEGATES,
    )
    alone = len(plain._get_ops_details())
    return sum(row["op_name"] == "DELEGATE" for row in opened(content)._get_ops_details()[alone:])


def outputs(interpreter, images):
    (source,), (target,) = interpreter.get_input_details(), interpreter.get_output_details()
    results = []
    for image in images:
        interpreter.set_tensor(source["index"], image.astype(source["dtype"]))
        interpreter.invoke()
        results.append(interpreter.get_tensor(target["index"]))
    return np.concatenate(results)


def fastest(runs, rounds):
    best = dict.fromkeys(runs, float("inf"))
    for _ in range(rounds):
        for key, run in runs.items():
            run()
            begin = time.perf_counter()
            run()
            best[key] = min(best[key], time.perf_counter() - begin)
    return best


def table(header, rows):
    from keras_convnext._terminal import markdown_table

    return markdown_table(header, "<" + ">" * (len(header) - 1), rows)


if __name__ == "__main__":
    main()
