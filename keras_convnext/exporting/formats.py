"""The formats of exported files: what they look like, what writes them and what runs them."""

import dataclasses

DEFAULT_SIZE = 224  # pixels, where a size must be fixed and the model has none


@dataclasses.dataclass(frozen=True)
class Format:
    """One format; packages go by the names to import."""

    suffix: str  # of the file; "" for a folder
    backend: str  # Keras's backend that the converter works with
    converters: tuple[str, ...]  # packages that write it
    runtime: str  # package that runs it
    precisions: tuple[str, ...] = ("float32",)  # of weights or arithmetic, the default first
    quantizers: tuple[str, ...] = ()  # packages that 8 bits need in addition
    batch_size: int | None = None  # number of images when none is asked for; None for any
    free_size: bool = True  # whether the image size can stay free


FORMATS = {
    "saved_model": Format("", "tensorflow", ("tensorflow",), "tensorflow"),
    "litert": Format(
        ".tflite",
        "tensorflow",
        ("tensorflow",),
        "ai_edge_litert",
        ("float32", "float16", "dynamic_int8", "int8"),
        quantizers=("ai_edge_litert", "ai_edge_quantizer"),
        batch_size=1,
        free_size=False,
    ),
    "onnx": Format(".onnx", "torch", ("torch", "onnx", "onnxscript"), "onnxruntime"),
    "openvino": Format(".xml", "openvino", ("openvino",), "openvino", ("float32", "float16")),
    "torch": Format(".pt2", "torch", ("torch",), "torch"),
}
