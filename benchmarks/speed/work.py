"""The operations and bytes of each part of a model, counted from its architecture."""

import dataclasses

from keras_convnext.architecture import Layer, layers_of
from keras_convnext.variants import Variant

ITEM_SIZES = {"float32": 4, "bfloat16": 2, "float16": 2}


@dataclasses.dataclass(frozen=True)
class Part:
    """The work of one part of a model, for a whole batch.

    Attributes:
        stage: "stem", "stage 1" .. "stage 4" or "head".
        name: "stem", "downsampling", "depthwise", "pointwise" or "head"; the blocks of a stage are added up.
        multiply_adds: of convolutions and matrix products.
        weights: number of weights, read once.
        elements: numbers read from and written to maps at least; see `parts`.
    """

    stage: str
    name: str
    multiply_adds: int
    weights: int
    elements: int

    @property
    def flops(self) -> int:
        """Floating-point operations: two for each multiply-add."""
        return 2 * self.multiply_adds

    def num_bytes(self, dtype: str) -> int:
        """Bytes that must move, with maps and weights in `dtype`."""
        return (self.weights + self.elements) * ITEM_SIZES[dtype]


def parts(variant: Variant, image_size: int = 224, batch: int = 1, classes: int = 1000) -> list[Part]:
    """Counts the work of every part of a model.

    The maps that move at least, each once: a block reads its input for the depthwise convolution and writes
    the result, reads that for the MLP, reads its input again for the sum and writes the sum. The hidden map
    of the MLP, four times as wide, is not counted, nor is another pass for norms and activations: a fused
    program keeps these in registers and caches. (GRN of V2 needs sums over the whole hidden map first, so a
    program for V2 does not reach this with large maps.) Weights count once, those of norms,
    LayerScale and GRN too.

    Args:
        variant: one of `variants.VARIANTS`.
        image_size: side of the square images in pixels.
        batch: number of images.
        classes: outputs of the classifier.

    Returns:
        Parts in the order of the forward pass. With 1000 classes the sum of `weights` is
        `variant.parameters`.

    Example:
        >>> sum(part.multiply_adds for part in parts(VARIANTS["convnext_tiny"])) / 1e9
        4.455531264
    """
    found: dict[tuple[str, str], list[Layer]] = {}
    for layer in layers_of(variant, image_size, classes):
        found.setdefault((layer.stage, _part_name(layer)), []).append(layer)
    return [
        Part(
            stage,
            name,
            batch * sum(layer.multiply_adds for layer in layers),
            sum(layer.num_weights for layer in layers),
            batch * sum(_elements(layer) for layer in layers),
        )
        for (stage, name), layers in found.items()
    ]


def _part_name(layer: Layer) -> str:
    if layer.stage in ("stem", "head"):
        return layer.stage
    if layer.part.startswith("downsample_layers"):
        return "downsampling"
    return "depthwise" if layer.kind == "convolution" else "pointwise"


def _elements(layer: Layer) -> int:
    """Counts the numbers that a layer reads from maps and writes to them, as `parts` says, for one image."""
    read, written = layer.side_in**2 * layer.inputs, layer.side**2 * layer.outputs
    if layer.kind == "convolution":
        return read + written
    if layer.name.endswith("pwconv1") or layer.name in ("norm", "norm_pre"):
        return read
    if layer.name.endswith("pwconv2"):
        return 2 * written  # the block's input for the sum, and the sum
    return written if layer.name == "head" else 0
