"""Quantises a LiteRT file to 8 bits, in the plan that measuring chose (`benchmarks/litert_plans.py`).

The products (pointwise, stem and downsampling convolutions, Dense), which hold nearly all weights and work,
compute in int8, with one scale for each output channel. The weights of depthwise convolutions are stored in
int8 and computed with in float. Norms, GELU, GRN and sums stay in float: in int8 they have no fast kernel, so
that a graph all in int8 is slower than the float one. Logits stay in float too: an image whose logits are
larger than those of the calibration images must not be cut off.
"""

from collections.abc import Iterable, Mapping

import numpy as np

# Kind of operation -> how it computes: "static" (int8, the ranges of the activations fixed by calibration),
# "dynamic" (int8, the range of each input found as it runs) or "stored" (float, weights kept in int8).
PLANS = {
    "int8": {"CONV_2D": "static", "FULLY_CONNECTED": "dynamic", "DEPTHWISE_CONV_2D": "stored"},
    "dynamic_int8": {"CONV_2D": "dynamic", "FULLY_CONNECTED": "dynamic", "DEPTHWISE_CONV_2D": "stored"},
}


def quantized(content: bytes, plan: Mapping[str, str], images: Iterable[np.ndarray] = ()) -> bytes:
    """Quantises the content of a float32 LiteRT file with one signature and one input, to about a quarter.

    `plan` is one of `PLANS`, or another of that form; the calibration images, (1, H, W, C) each as the file
    takes them, are for what is static.
    """
    from ai_edge_quantizer import qtyping, quantizer, recipe_manager

    weights = qtyping.TensorQuantizationConfig(num_bits=8, granularity=qtyping.QuantGranularity.CHANNELWISE)
    activations = qtyping.TensorQuantizationConfig(num_bits=8, symmetric=False)
    precision = qtyping.ComputePrecision
    ways = {
        "static": {"activation_tensor_config": activations, "compute_precision": precision.INTEGER},
        "dynamic": {"compute_precision": precision.INTEGER},
        "stored": {"compute_precision": precision.FLOAT, "explicit_dequantize": True},
    }
    recipe = recipe_manager.RecipeManager()
    for operation, way in plan.items():
        config = qtyping.OpQuantizationConfig(weight_tensor_config=weights, **ways[way])
        recipe.add_quantization_config(
            regex=".*", operation_name=qtyping.TFLOperationName(operation), op_config=config
        )
    converter = quantizer.Quantizer(bytearray(content), recipe.get_quantization_recipe())
    ranges = _ranges(converter, content, images) if "static" in plan.values() else None
    return compact(bytes(converter.quantize(ranges).quantized_model))


def _ranges(converter, content, images):
    """The smallest and the largest value of each tensor over all images.

    The quantiser's own ranges are averages over the images, which cut off what is rare and large.
    """
    from ai_edge_litert.interpreter import Interpreter

    ((signature, names),) = Interpreter(model_content=content).get_signature_list().items()
    (name,) = names["inputs"]
    found = [converter.calibrate({signature: [{name: image}]}) for image in images]
    widest = found[0]
    for ranges in found[1:]:
        for tensor, row in widest.items():
            for key, extreme in (("min", np.minimum), ("max", np.maximum)):
                if key in row:
                    row[key] = extreme(row[key], ranges[tensor][key])
    return widest


def compact(content: bytes) -> bytes:
    """Writes equal arrays of a LiteRT file once: the zeros, 8 bytes a channel, of every symmetric scale."""
    import flatbuffers
    from ai_edge_litert import schema_py_generated as schema

    class Sharing(flatbuffers.Builder):
        def __init__(self):
            super().__init__(len(content))
            self.written: dict[tuple[str, bytes], int] = {}

        def StartVector(self, size, count, alignment):
            # Weights, which are bytes here, begin where the kernels may read them 16 bytes at a time.
            return super().StartVector(size, count, 16 if size == 1 else alignment)

        def CreateNumpyVector(self, x):
            key = (x.dtype.str, x.tobytes())
            if key not in self.written:
                self.written[key] = super().CreateNumpyVector(x)
            return self.written[key]

    model = schema.ModelT.InitFromPackedBuf(content, 0)
    for buffer in model.buffers:
        if buffer.size:  # its data follows the tables
            buffer.data = np.frombuffer(content, "uint8", buffer.size, buffer.offset)
            buffer.offset = buffer.size = 0
    builder = Sharing()
    builder.Finish(model.Pack(builder), b"TFL3")
    return bytes(builder.Output())
