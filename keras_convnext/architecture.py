"""The layers of an architecture as plain numbers: names, channels, kernels, sides of maps; without Keras.

`convnext` connects these layers; what names, counts or weighs them reads this list.
"""

import dataclasses
import math
from typing import ClassVar

from keras_convnext.variants import VARIANTS, Variant

STATISTICS = ("running_mean", "running_var", "num_batches_tracked")  # of a batch norm, as PyTorch calls them
LEAVES = {  # of a layer's weights -> PyTorch's
    "kernel": "weight",
    "gamma": "weight",
    "beta": "bias",
    "moving_mean": STATISTICS[0],
    "moving_variance": STATISTICS[1],
}
POOLED_SIZES = (1, 2, 3, 6)  # sides of the pyramid pooling module of UPerNet
BOX_BINS, MASK_BINS = 7, 14  # of a side of a region in front of the heads of a detector


@dataclasses.dataclass(frozen=True)
class Heads:
    """Those of UPerNet: what `segmentation.UPerNet` takes besides a backbone."""

    classes: int
    channels: int = 512
    auxiliary: bool = True
    task: ClassVar[str] = "segmentation"

    @property
    def auxiliary_channels(self) -> int:
        return self.channels // 2

    @property
    def last(self) -> tuple[str, ...]:
        """The layers whose shape depends on the number of classes."""
        return "decode_head.conv_seg", "auxiliary_head.conv_seg"


@dataclasses.dataclass(frozen=True)
class DetectorHeads:
    """Those of Mask R-CNN: what `detection.MaskRCNN` takes besides a backbone."""

    classes: int
    channels: int = 256
    hidden_channels: int = 1024
    masks: bool = True
    cascade: bool = False
    task: ClassVar[str] = "detection"

    def places(self, head: str) -> list[str]:
        """The official names of "bbox_head" or "mask_head": one, or one for each stage of a cascade."""
        stages = range(3) if self.cascade else [""]
        return [f"roi_head.{head}.{stage}".rstrip(".") for stage in stages]

    @property
    def last(self) -> tuple[str, ...]:
        """The layers whose shape depends on the number of classes."""
        boxes = [f"{place}.{name}" for place in self.places("bbox_head") for name in ("fc_cls", "fc_reg")]
        return (*boxes, *(f"{place}.conv_logits" for place in self.places("mask_head")))


@dataclasses.dataclass(frozen=True)
class Layer:
    """A layer that has weights.

    `name` is the official code's: "downsample_layers.1.0", "stages.0.1.dwconv", "norm"; LayerScale, a bare
    parameter there, is "stages.0.1.layer_scale".
    """

    # "stem", "stage 1" .. "stage 4" or "head"; of a segmenter "decode_head" or "auxiliary_head", of a
    # detector "neck", "rpn_head" or "roi_head"
    stage: str
    name: str
    # "convolution", "linear", a norm of `Variant`, "response_norm" (GRN), "scale" (LayerScale), "batch_norm"
    kind: str
    inputs: int  # channels that it reads
    outputs: int  # channels that it writes
    side_in: int  # of the square map that it reads, in pixels
    side: int  # of the map that it writes; 1 in the head, which pools
    kernel: int = 1  # side of a convolution's kernel
    groups: int = 1  # of a convolution; as many as channels in the depthwise one
    has_bias: bool = True  # of a convolution

    @property
    def part(self) -> str:
        """What it belongs to: "stem" or "downsample_layers.0", "stages.0.1" or "blocks.1", "head"."""
        return self.name.rpartition(".")[0] or self.stage

    @property
    def weights(self) -> dict[str, tuple[int, ...]]:
        """Canonical name and PyTorch shape of each of its arrays."""
        channels: tuple[int, ...] = (self.outputs,)
        match self.kind:
            case "scale":
                return {f"{self.part}.gamma": channels}
            case "response_norm":
                return {f"{self.name}.gamma": channels, f"{self.name}.beta": channels}
            case "rms_norm" | "simple_norm":
                return {f"{self.name}.weight": channels}
            case "layer_norm":
                weight = channels
            case "batch_norm":
                leaves = ("weight", "bias", *STATISTICS[:2])
                return {f"{self.name}.{leaf}": channels for leaf in leaves} | {
                    f"{self.name}.{STATISTICS[2]}": ()
                }
            case "linear":
                weight = (self.outputs, self.inputs)
            case _:
                weight = (self.outputs, self.inputs // self.groups, self.kernel, self.kernel)
        return {f"{self.name}.weight": weight} | ({f"{self.name}.bias": channels} if self.has_bias else {})

    @property
    def num_weights(self) -> int:
        """Of those that training changes by gradients: without the statistics of a batch norm."""
        return sum(math.prod(shape) for name, shape in self.weights.items() if not name.endswith(STATISTICS))

    @property
    def multiply_adds(self) -> int:
        """Of convolutions and matrix products, for one image."""
        if self.kind not in ("convolution", "linear"):
            return 0
        return self.side**2 * math.prod(self.weights[f"{self.name}.weight"])


def layers_of(
    variant: Variant,
    image_size: int = 224,
    classes: int = 1000,
    channels: int = 3,
    pyramid_norms: bool = False,
) -> list[Layer]:
    """Lists the layers with weights, in the order of the forward pass, for square images of a side in pixels.

    With 0 `classes` there is no classifier, nor a hidden layer in front of it. `pyramid_norms`: the per-level
    norms `norm0` .. `norm3` replace the final norm.
    """
    found: list[Layer] = []

    def add(stage, name, kind, outputs, kernel=1, stride=1, groups=1):
        inputs, before = (found[-1].outputs, found[-1].side) if found else (channels, image_size)
        # 3x3 kernels of stride 2 have a pixel of padding on each side, patches none.
        side = before if stride == 1 else (before + kernel - stride) // stride
        side = 1 if stage == "head" else side
        found.append(Layer(stage, name, kind, inputs, outputs, before, side, kernel, groups))

    dims = variant.dims
    if variant.isotropic:
        add("stem", "stem", "convolution", dims[0], 16, 16)
    else:
        last = {"patch": 0, "overlap_act": 2}.get(variant.stem, 1)  # place of the last convolution
        if last == 0:
            add("stem", "downsample_layers.0.0", "convolution", dims[0], 4, 4)
        else:
            add("stem", "downsample_layers.0.0", "convolution", variant.stem_dim, 3, 2)
            add("stem", f"downsample_layers.0.{last}", "convolution", dims[0], 3, 2)
        add("stem", f"downsample_layers.0.{last + 1}", variant.norm, dims[0])
    ends = []  # last layer of each stage
    for number, (depth, dim) in enumerate(zip(variant.depths, dims, strict=True)):
        stage = f"stage {number + 1}"
        if number > 0:
            add(stage, f"downsample_layers.{number}.0", variant.norm, dims[number - 1])
            add(stage, f"downsample_layers.{number}.1", "convolution", dim, 2, 2)
        for index in range(depth):
            block = f"blocks.{index}" if variant.isotropic else f"stages.{number}.{index}"
            add(stage, f"{block}.dwconv", "convolution", dim, variant.kernel_sizes[number], groups=dim)
            add(stage, f"{block}.norm", variant.norm, dim)
            add(stage, f"{block}.pwconv1", "linear", 4 * dim)
            if variant.version == 2:
                add(stage, f"{block}.grn", "response_norm", 4 * dim)
            add(stage, f"{block}.pwconv2", "linear", dim)
            if variant.layer_scale_init_value is not None:
                add(stage, f"{block}.layer_scale", "scale", dim)
        ends.append(found[-1])
    if pyramid_norms:
        found += [
            Layer("head", f"norm{level}", "layer_norm", end.outputs, end.outputs, end.side, end.side)
            for level, end in enumerate(ends)
        ]
    else:
        add("head", "norm_pre" if variant.head == "norm_first" else "norm", variant.norm, dims[-1])
    if classes:
        if variant.head == "mlp":
            add("head", "pre_logits", "linear", dims[-1])
        add("head", "head", "linear", classes)
    return found


def head_layers_of(variant: Variant, heads: Heads | DetectorHeads, image_size: int = 512) -> list[Layer]:
    """Lists the layers with weights of heads, for square images; the body's are `layers_of`'s.

    `layers_of(variant, image_size, 0, pyramid_norms=True)` has those in front. Names are mmsegmentation's and
    mmdetection's.
    """
    if isinstance(heads, DetectorHeads):
        return _detector_layers_of(variant, heads, image_size)
    maps = layers_of(variant, image_size, 0, pyramid_norms=True)[-4:]
    sides, width = [level.side for level in maps], heads.channels
    found: list[Layer] = []

    def add(place, inputs, outputs, side, kernel):
        head = place.partition(".")[0]
        convolution = Layer(
            head, f"{place}.conv", "convolution", inputs, outputs, side, side, kernel, has_bias=False
        )
        found.extend([convolution, Layer(head, f"{place}.bn", "batch_norm", outputs, outputs, side, side)])

    def add_logits(head, inputs, side):
        found.append(Layer(head, f"{head}.conv_seg", "convolution", inputs, heads.classes, side, side, 1))

    for number, cells in enumerate(POOLED_SIZES):
        add(f"decode_head.psp_modules.{number}.1", maps[3].outputs, width, cells, 1)
    pooled = maps[3].outputs + len(POOLED_SIZES) * width
    add("decode_head.bottleneck", pooled, width, sides[3], 3)
    for level in (2, 1, 0):
        add(f"decode_head.lateral_convs.{level}", maps[level].outputs, width, sides[level], 1)
        add(f"decode_head.fpn_convs.{level}", width, width, sides[level], 3)
    add("decode_head.fpn_bottleneck", 4 * width, width, sides[0], 3)
    add_logits("decode_head", width, sides[0])
    if heads.auxiliary:
        add("auxiliary_head.convs.0", maps[2].outputs, heads.auxiliary_channels, sides[2], 3)
        add_logits("auxiliary_head", heads.auxiliary_channels, sides[2])
    return found


def model_layers_of(variant: Variant, image_size: int, classes: int, heads: Heads | None) -> list[Layer]:
    """Lists the layers with weights of a classifier, or of a segmenter where there are `heads`."""
    if heads is None:
        return layers_of(variant, image_size, classes)
    body = layers_of(variant, image_size, 0, pyramid_norms=True)
    return body + head_layers_of(variant, heads, image_size)


def decoder_layers_of(variant: Variant, width: int, depth: int, image_size: int = 224) -> list[Layer]:
    """Lists the layers with weights of `fcmae`'s decoder, for square images; 3 channels of 32 x 32 a cell."""
    inputs, side = variant.dims[-1], image_size // 32
    found: list[Layer] = []

    def add(name, kind, outputs, kernel=1, groups=1):
        before = found[-1].outputs if found else inputs
        found.append(Layer("decoder", name, kind, before, outputs, side, side, kernel, groups))

    add("proj", "linear", width)
    add("mask_token", "scale", width)
    for index in range(depth):
        add(f"decoder.{index}.dwconv", "convolution", width, 7, width)
        add(f"decoder.{index}.norm", "layer_norm", width)
        add(f"decoder.{index}.pwconv1", "linear", 4 * width)
        add(f"decoder.{index}.grn", "response_norm", 4 * width)
        add(f"decoder.{index}.pwconv2", "linear", width)
    add("pred", "linear", 3 * 32**2)
    return found


def _detector_layers_of(variant: Variant, heads: DetectorHeads, image_size: int) -> list[Layer]:
    """Those of Mask R-CNN: of the regions once, though each image has as many as are proposed."""
    maps, width, hidden = (
        layers_of(variant, image_size, 0, pyramid_norms=True)[-4:],
        heads.channels,
        heads.hidden_channels,
    )
    found: list[Layer] = []

    def add(name, inputs, outputs, side, kernel=1, kind="convolution", has_bias=True):
        stage = name.partition(".")[0]
        found.append(Layer(stage, name, kind, inputs, outputs, side, side, kernel, has_bias=has_bias))

    for level, map_ in enumerate(maps):
        add(f"neck.lateral_convs.{level}.conv", map_.outputs, width, map_.side)
    for level, map_ in enumerate(maps):
        add(f"neck.fpn_convs.{level}.conv", width, width, map_.side, 3)
    add("rpn_head.rpn_conv", width, width, maps[0].side, 3)
    for name, outputs in (("rpn_cls", 3), ("rpn_reg", 12)):
        add(f"rpn_head.{name}", width, outputs, maps[0].side)
    for place in heads.places("bbox_head"):
        for number in range(4 if heads.cascade else 0):
            add(f"{place}.shared_convs.{number}.conv", width, width, BOX_BINS, 3, has_bias=False)
            add(f"{place}.shared_convs.{number}.bn", width, width, BOX_BINS, kind="batch_norm")
        add(f"{place}.shared_fcs.0", BOX_BINS**2 * width, hidden, 1, kind="linear")
        if not heads.cascade:
            add(f"{place}.shared_fcs.1", hidden, hidden, 1, kind="linear")
        add(f"{place}.fc_cls", hidden, heads.classes + 1, 1, kind="linear")
        add(f"{place}.fc_reg", hidden, 4 * heads.classes, 1, kind="linear")
    for place in heads.places("mask_head") if heads.masks else ():
        for number in range(4):
            add(f"{place}.convs.{number}.conv", width, width, MASK_BINS, 3)
        add(f"{place}.upsample", width, width, MASK_BINS, 2)
        add(f"{place}.conv_logits", width, heads.classes, 2 * MASK_BINS)
    return found


def _places(*kinds: Heads | DetectorHeads) -> dict[str, str]:
    variant = next(iter(VARIANTS.values()))
    names = (layer.name for heads in kinds for layer in head_layers_of(variant, heads))
    return {name.replace(".", "_"): name for name in names}


# {its name with "_" for ".": a layer of the heads}, the same for every architecture.
HEAD_PLACES = _places(Heads(classes=1))
DETECTOR_PLACES = _places(DetectorHeads(classes=1), DetectorHeads(classes=1, cascade=True))
