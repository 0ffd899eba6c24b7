"""Estimates the memory of a training step on one device from the architecture.

shapes of the weights --> weights, average (EMA), slots, gradients
shapes of the maps    --> what the backward pass of each layer needs of its forward pass, by backend

The step is gone through layer by layer, forward and back: each layer adds what it keeps, and its backward
pass frees that, adds the gradients of its weights, and holds some maps of its own meanwhile. The largest sum
on the way is the estimate. Nothing here needs a Keras backend.

What is kept was read, for each backend, from the program itself: on PyTorch the tensors that autograd saves
(`torch.autograd.graph.saved_tensors_hooks`), on JAX the arrays that are alive at the peak of the program that
XLA compiled for a CPU (its buffer assignment), on TensorFlow the inputs and outputs that the gradient
functions of the layers' operators read. `benchmarks/memory.py` compares the sums with measured peaks. Not
counted: the framework, its libraries' workspaces, what its allocator holds back, the input pipeline.
"""

import dataclasses
import itertools
import math
from dataclasses import dataclass

from keras_convnext import architecture
from keras_convnext.architecture import STATISTICS, Heads, layers_of, model_layers_of
from keras_convnext.layers.chunking import samples_in_a_chunk_of_jax
from keras_convnext.variants import Variant

FLOAT32 = 4
SLOTS = 2  # AdamW's momentum and velocity


@dataclass(frozen=True)
class Step:
    """One micro-batch of a training step on one device.

    `variant` has LayerScale as it is trained, `batch` counts the images that go through the device at once,
    and `image_size` is in pixels. Precision, rematerialize and trainable are a recipe's; `clips` is by norm.
    `num_devices` divide the batch or the kernels, this one included; `model_devices` of them share the
    pointwise kernels, and with them the hidden maps. `heads` are those of a segmenter.
    """

    variant: Variant
    batch: int
    image_size: int
    classes: int = 1000
    precision: str = "float32"
    backend: str = "jax"
    device: str = "cpu"  # or "gpu" or "tpu"
    rematerialize: bool = False
    trainable: str = "all"
    has_average: bool = True  # of the weights (EMA)
    accumulates: bool = False
    clips: bool = False
    num_devices: int = 1
    model_devices: int = 1
    heads: Heads | None = None
    # Of pre-training, (width, depth); None for the others. The share `seen` of the cells goes through the
    # encoder, all through the decoder.
    decoder: tuple[int, int] | None = None
    seen: float = 1.0

    @property
    def item_size(self) -> int:
        """Bytes of a number in the compute dtype."""
        return FLOAT32 if self.precision == "float32" else 2

    @property
    def uses_xla(self) -> bool:
        """Whether the step is one program of XLA; Keras compiles TensorFlow's so on accelerators."""
        return self.backend == "jax" or (self.backend == "tensorflow" and self.device != "cpu")


@dataclass(frozen=True)
class Layer:
    """The bytes that one layer, of an official name, holds in a step.

    `kept` are maps from the forward pass until its backward pass; `working` are maps that the backward pass
    holds at once besides these; `gradients` are of its weights.
    """

    name: str
    kept: int
    working: int
    gradients: int


@dataclass(frozen=True)
class Memory:
    """The bytes of one device at the moment of the step at which they are most."""

    weights: int  # float32
    average: int  # of the weights (EMA)
    slots: int  # momentum and velocity
    accumulated: int  # gradients added up over the micro-batches
    inputs: int  # images and targets of a micro-batch
    gradients: int  # that are there at that moment; on TensorFlow with what their update holds
    activations: int  # kept for the backward pass at that moment
    working: int  # what the backward pass or the update of a layer holds besides these
    moment: str  # "forward", the name of a layer, or "update"

    @property
    def total(self) -> int:
        return sum(dataclasses.astuple(self)[:-1])


def count_weights(step: Step) -> tuple[int, int]:
    """Counts the weights of one device, all and those that are trained; LoRA's are in both."""
    total = trained = 0
    rank = int(step.trainable.partition(":")[2]) if step.trainable.startswith("lora:") else 0
    for layer in layers_in(step):
        count, added = _own_weights(step, layer), 0
        if layer.name.endswith(("pwconv1", "pwconv2")):
            added = rank * (layer.inputs + layer.outputs)  # A and B
        total += count + added
        is_head = layer.stage == "head" and layer.kind == "linear"
        trained += added + (count if step.trainable == "all" or is_head else 0)
    return total, trained


def layers_in(step: Step) -> list[architecture.Layer]:
    """Lists the layers with weights of what is trained."""
    if step.decoder is None:
        return model_layers_of(step.variant, step.image_size, step.classes, step.heads)
    body = layers_of(step.variant, step.image_size, 0)[:-1]  # without the final norm
    return body + architecture.decoder_layers_of(step.variant, *step.decoder, step.image_size)


def estimate(step: Step) -> Memory:
    """Estimates the memory of a step, by part, at its peak.

    Weights, slots, averages, gradients and accumulated gradients are float32 in every precision. The update
    holds another set of gradients where these are clipped or averaged. Where neither is done and XLA compiles
    the step for one device, each weight is updated as soon as its gradient is there. TensorFlow's executor
    begins with updates during the backward pass. Of the three arrays that an update makes, the new slots and
    weight, half are taken to be there besides the old ones: sets = 1 + 3 / 2.
    """
    total, trained = count_weights(step)
    targets = step.classes  # numbers an image; of a segmenter the label map, once for each head
    if step.heads is not None:
        targets = step.image_size**2 * (1 + step.heads.auxiliary)
    parts = {
        "weights": FLOAT32 * total,
        "average": FLOAT32 * trained * step.has_average,
        "slots": FLOAT32 * SLOTS * trained,
        "accumulated": FLOAT32 * trained * step.accumulates,
        "inputs": FLOAT32 * step.batch * (3 * step.image_size**2 + targets),
    }
    found = layers(step)
    kept = sum(layer.kept for layer in found)
    gradients = 0
    moments = [("forward", kept, 0, 0)]
    updates_at_once = step.uses_xla and not (step.clips or step.accumulates or step.num_devices > 1)
    sets = 2.5 if step.backend == "tensorflow" and not step.uses_xla else 1
    for layer in reversed(found):
        gradients += int(sets * layer.gradients)
        moments.append((layer.name, kept, gradients, layer.working))
        kept -= layer.kept
        if updates_at_once:
            gradients = 0
    copies = FLOAT32 * trained if step.clips or step.accumulates else 0
    moments.append(("update", 0, gradients, copies))
    moment, activations, gradients, working = max(moments, key=lambda row: sum(row[1:]))
    return Memory(**parts, gradients=gradients, activations=activations, working=working, moment=moment)


def layers(step: Step) -> list[Layer]:
    """Lists what the stem, each downsampling, each block and the head hold, from the stem to the loss."""
    found = []
    whole = step
    for part, group in itertools.groupby(layers_in(step), key=lambda layer: layer.part):
        inside = list(group)
        is_decoder = inside[0].stage == "decoder"
        step = whole
        if not is_decoder and whole.seen < 1:  # as parts of an image
            step = dataclasses.replace(whole, batch=whole.batch * whole.seen)  # type: ignore[arg-type]
        is_head = part == "head" and step.heads is None
        if step.trainable == "head" and not is_head:
            found.append(Layer(part, 0, 0, 0))  # no gradient goes through it
            continue
        if is_head:
            kept = working = FLOAT32 * step.batch * (3 * step.classes + 4 * inside[0].inputs)
        elif part == "decoder":
            kept, working = _ends_of_decoder(step, inside)
        elif inside[0].stage == "stem":
            kept, working = _stem(step, inside)
        elif part.startswith("downsample_layers"):
            kept, working = _downsampling(step, inside[0])
        elif inside[0].stage.endswith("head"):
            kept, working = _segmentation_head(step, inside)
        else:
            kept, working = _block(step, inside[0])
            if step is not whole:  # what the depthwise convolution is given: zeros at masked cells
                kept += step.item_size * (whole.batch - step.batch) * inside[0].side ** 2 * inside[0].outputs
        trained = sum(_own_weights(step, layer) for layer in inside) * (step.trainable == "all" or is_head)
        found.append(Layer(part, int(kept), int(working), FLOAT32 * trained))
    return found


def _own_weights(step: Step, layer: architecture.Layer) -> int:
    """Counts a layer's weights on one device; some share, see `distribution.jax_engine.POINTWISE_LAYOUT`."""
    shared = (".pwconv1.weight", ".pwconv1.bias", ".grn.gamma", ".grn.beta", ".pwconv2.weight")
    return sum(
        math.prod(shape) // (step.model_devices if name.endswith(shared) else 1)
        for name, shape in layer.weights.items()
        if not name.endswith(STATISTICS)
    )


def _norm(step: Step, positions: int, dim: int) -> int:
    """Returns the bytes that a norm keeps, in float32 whatever the precision, without its result.

    PyTorch's fused layer norm keeps its input, a mean and a deviation a position; the others are written out
    and keep an operand a product. XLA on a CPU also keeps the products of broadcast factors as maps.
    """
    if step.backend == "torch" and step.variant.norm == "layer_norm":
        return FLOAT32 * positions * (dim + 2)
    operands = {"layer_norm": 2, "rms_norm": 2, "simple_norm": 3}[step.variant.norm]
    return FLOAT32 * positions * dim * (operands + (step.uses_xla and step.device == "cpu"))


def _ends_of_decoder(step: Step, inside: list[architecture.Layer]) -> tuple[int, int]:
    """Returns the bytes of projection, mask token or prediction; that of pixels has target and loss too."""
    first, positions = inside[0], step.batch * inside[0].side ** 2
    kept, made = (step.item_size * positions * channels for channels in (first.inputs, first.outputs))
    if first.name != "pred":
        return kept, made
    pixels = FLOAT32 * positions * first.outputs
    return kept + 3 * pixels, 2 * pixels


def _stem(step: Step, inside: list[architecture.Layer]) -> tuple[int, int]:
    """Returns the bytes that are kept, and those that the backward pass holds besides; so do the next two."""
    first, last = inside[0], inside[-1]
    pixels = step.item_size * step.batch * first.inputs * first.side_in**2  # as patches or as a map
    if last is first:
        return pixels, 2 * pixels
    maps = 2 if step.variant.stem == "overlap_act" else 1
    between = sum(layer.inputs * layer.side_in**2 for layer in inside[1:-1])
    positions = step.batch * last.side**2
    outputs = FLOAT32 * positions * last.outputs
    kept = pixels + maps * step.item_size * step.batch * between + _norm(step, positions, last.outputs)
    if step.uses_xla and step.device == "cpu":
        kept += outputs + (FLOAT32 - step.item_size) * pixels // step.item_size
    return kept, 2 * outputs


def _downsampling(step: Step, norm: architecture.Layer) -> tuple[int, int]:
    positions = step.batch * norm.side**2
    kept = _norm(step, positions, norm.inputs) + step.item_size * positions * norm.inputs
    if step.uses_xla and step.device == "cpu":  # float32 throughout, and one map more than in a block
        kept += (2 * FLOAT32 - step.item_size) * positions * norm.inputs
    return kept, 2 * FLOAT32 * positions * norm.inputs


def _segmentation_head(step: Step, inside: list[architecture.Layer]) -> tuple[int, int]:
    """Counts the pyramid's norms; or a convolution with batch norm and ReLU; or logits and their loss.

    The convolution keeps its input, its batch norm that in float32, the ReLU its result. Of logits at the
    size of the image a loss keeps themselves, and but for PyTorch their exponentials.
    """
    first, batch = inside[0], step.batch
    positions = batch * first.side**2
    if first.stage == "head":
        kept = sum(_norm(step, batch * norm.side**2, norm.outputs) for norm in inside)
        return kept, 2 * FLOAT32 * positions * first.outputs
    kept = step.item_size * positions * first.inputs
    if len(inside) == 1:
        logits = FLOAT32 * batch * first.outputs * step.image_size**2
        return kept + logits * (1 if step.backend == "torch" else 2), 2 * logits
    kept += (FLOAT32 + step.item_size) * positions * first.outputs
    return kept, step.item_size * positions * (first.inputs + first.outputs)


def _block(step: Step, depthwise: architecture.Layer) -> tuple[int, int]:
    """Counts its input or all of its maps, whichever its backward pass needs."""
    side, dim, kernel = depthwise.side, depthwise.outputs, depthwise.kernel
    positions = step.batch * side**2
    plain = _maps_of_torch if step.backend == "torch" else _maps_of_tensorflow
    maps = _maps_of_xla if step.uses_xla else plain
    whole, working = maps(step, step.batch, side, dim, kernel)
    x = step.item_size * positions * dim
    samples = step.batch
    if step.backend == "jax" and step.device == "cpu" and step.num_devices == 1 and step.decoder is None:
        samples = samples_in_a_chunk_of_jax(step.batch, side**2)
    if samples < step.batch:
        # A loop over chunks: its input, and its result, which XLA allots before the backward pass begins.
        kept, inner = maps(step, samples, side, dim, kernel)
        return FLOAT32 * positions * dim + x, kept + inner
    # XLA on a CPU drops the barriers of `jax.checkpoint`, and merges what is to be computed again.
    if step.rematerialize and not (step.uses_xla and step.device == "cpu"):
        return x, whole - x + working
    return whole, working


def _maps_of_torch(step: Step, batch: int, side: int, dim: int, kernel: int) -> tuple[int, int]:
    """Counts what autograd saves, the same on a CPU and a GPU.

    Inputs of the convolution, the norm, both products and GELU; of LayerScale in float32; of GRN, whose sums
    and product are in float32, its input (a copy for each of the two in 16 bits). In 16 bits the kernels too.
    """
    size, positions = step.item_size, batch * side**2
    narrow, wide = positions * dim, positions * 4 * dim // step.model_devices
    kept = size * 2 * narrow + _norm(step, positions, dim) + size * 2 * wide
    working = size * (2 * narrow + wide)
    if step.variant.version == 2:
        kept += FLOAT32 * wide * (1 if size == FLOAT32 else 2)
        working += 2 * FLOAT32 * wide
    if step.variant.layer_scale_init_value is not None:
        kept += FLOAT32 * narrow
    if size < FLOAT32:
        kept += size * (kernel**2 * dim + 8 * dim**2 // step.model_devices)
    return kept, working


def _maps_of_tensorflow(step: Step, batch: int, side: int, dim: int, kernel: int) -> tuple[int, int]:
    """Counts what the gradient functions of TensorFlow's operators read, without XLA.

    Inputs of the convolution and both products; the centred map and the factor of the norm; the three
    operands of GELU by erf, which is written out; the input of LayerScale. GRN before a smaller kernel keeps
    a scaled kernel a sample; else its result. The gradients of the kernels and of LayerScale are computed
    when the layers before are already computing theirs, so a gradient map waits for each: of the
    convolution, the second product and LayerScale.
    """
    size, positions = step.item_size, batch * side**2
    narrow, wide = positions * dim, positions * 4 * dim
    kept = size * 4 * narrow + _norm(step, positions, dim) + size * 4 * wide
    working = size * (2 * narrow + 2 * wide)
    if step.variant.version == 2:
        if size == FLOAT32 and dim < side**2:
            kept += FLOAT32 * batch * 4 * dim * dim
        else:
            kept += size * wide + (FLOAT32 * wide if size < FLOAT32 else 0)
    if step.variant.layer_scale_init_value is not None:
        kept += 2 * FLOAT32 * narrow
    if size < FLOAT32:
        kept += size * (kernel**2 * dim + 8 * dim**2)
    return kept, working


def _maps_of_xla(step: Step, batch: int, side: int, dim: int, kernel: int) -> tuple[int, int]:
    """Counts what is alive at the peak of the program that XLA compiles.

    The block's input, the convolution's, the norm's and the products' results, GELU's input, its erf and its
    result; of GRN its result; of LayerScale its input. On a CPU the convolution keeps its padded input, and
    in 16 bits most maps and the kernels are float32, as XLA computes with them. For accelerators the same
    list without these was not checked against one.
    """
    positions, padded = batch * side**2, batch * (side + kernel - 1) ** 2
    narrow, wide = positions * dim, positions * 4 * dim // step.model_devices
    size = step.item_size
    on_cpu = step.device == "cpu"
    inner = FLOAT32 if on_cpu else size
    kept = size * narrow + _norm(step, positions, dim) + inner * narrow  # convolution, norm, its result
    kept += (size + FLOAT32 + inner) * wide
    if on_cpu:
        kept += FLOAT32 * padded * dim
        if size < FLOAT32:
            kept += FLOAT32 * (kernel**2 * dim + 8 * dim**2 // step.model_devices) - size * narrow
    if step.variant.version == 2:
        kept += inner * wide
    if step.variant.layer_scale_init_value is not None:
        kept += FLOAT32 * narrow
    working = FLOAT32 * (2 * narrow + wide * step.variant.version)
    return kept, working
