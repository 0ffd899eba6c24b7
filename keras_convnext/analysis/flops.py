"""Counts the operations and bytes of each part of a model from its architecture."""

import dataclasses

import numpy as np

from keras_convnext.variants import Variant

ITEM_SIZES = {"float32": 4, "bfloat16": 2, "float16": 2}
CLASSES = 1000


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


def parts(variant: Variant, image_size: int = 224, batch: int = 1) -> list[Part]:
    """Counts the work of every part of a model with its 1000-class head.

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

    Returns:
        Parts in the order of the forward pass. The sum of `weights` is `variant.parameters`.

    Example:
        >>> sum(part.multiply_adds for part in parts(VARIANTS["convnext_tiny"])) / 1e9
        4.455531264
    """
    norm_weights = (2 if variant.norm == "layer_norm" else 1) * np.array(variant.dims)
    side, found = _stem(variant, image_size, batch, int(norm_weights[0]))
    counted = [found]
    for stage, (depth, dim, kernel) in enumerate(
        zip(variant.depths, variant.dims, variant.kernel_sizes, strict=True)
    ):
        name = f"stage {stage + 1}"
        if stage > 0:
            before, larger = variant.dims[stage - 1], side
            side //= 2  # 2x2, stride 2, without padding
            counted.append(
                Part(
                    name,
                    "downsampling",
                    batch * side**2 * 4 * before * dim,
                    int(norm_weights[stage - 1]) + 4 * before * dim + dim,
                    batch * (larger**2 * before + side**2 * dim),
                )
            )
        positions = batch * side**2
        scales = dim if variant.layer_scale_init_value is not None else 0
        response = 8 * dim if variant.version == 2 else 0  # gamma and beta of GRN, 4 * dim each
        counted += [
            Part(
                name,
                "depthwise",
                depth * positions * kernel**2 * dim,
                depth * (kernel**2 * dim + dim),
                depth * positions * 2 * dim,
            ),
            Part(
                name,
                "pointwise",
                depth * positions * 8 * dim**2,
                depth * (int(norm_weights[stage]) + 8 * dim**2 + 5 * dim + scales + response),
                depth * positions * 3 * dim,
            ),
        ]
    last = variant.dims[-1]
    hidden = last if variant.head == "mlp" else 0
    counted.append(
        Part(
            "head",
            "head",
            batch * last * (hidden + CLASSES),
            int(norm_weights[-1]) + hidden * (last + 1) + CLASSES * (last + 1),
            batch * (side**2 * last + CLASSES),
        )
    )
    return counted


def multiply_adds(variant: Variant, image_size: int = 224, batch: int = 1) -> int:
    """Counts the multiply-adds of a model, 4.46e9 for ConvNeXt-T at 224 pixels."""
    return sum(part.multiply_adds for part in parts(variant, image_size, batch))


def _stem(variant: Variant, image_size: int, batch: int, norm_weights: int) -> tuple[int, Part]:
    """Returns the side of the first map and the work up to it."""
    dim, pixels = variant.dims[0], 3 * image_size**2
    if variant.stem in ("patch", "isotropic"):
        patch = 4 if variant.stem == "patch" else 16
        side, taps = image_size // patch, 3 * patch**2
        norm = norm_weights if variant.stem == "patch" else 0
        part = Part(
            "stem",
            "stem",
            batch * side**2 * taps * dim,
            taps * dim + dim + norm,
            batch * (pixels + side**2 * dim),
        )
        return side, part
    middle = (image_size + 1) // 2  # 3x3, stride 2, a pixel of padding on each side
    side, width = (middle + 1) // 2, variant.stem_dim
    part = Part(
        "stem",
        "stem",
        batch * 9 * (middle**2 * 3 * width + side**2 * width * dim),
        27 * width + width + 9 * width * dim + dim + norm_weights,
        batch * (pixels + 2 * middle**2 * width + side**2 * dim),
    )
    return side, part
