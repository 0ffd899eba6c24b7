"""The road from ResNet-50 to ConvNeXt-T: each step of the paper as a model, and what it costs.

A row of `STEPS` says what it changes, nothing else. `design` adds up the rows, `network` is the forward pass of
every design, and two readers go through it: `cost` counts, without Keras, and `build` makes a model. The last
step is the model of `keras_convnext.ConvNeXtTiny` itself.

Reference: Liu et al. 2022, "A ConvNet for the 2020s" (arXiv:2201.03545), section 2, figure 2; accuracy and
GFLOPs are those of appendix C, tables 10 and 11. The first step is He et al. 2016 (arXiv:1512.03385), table 1,
with the stride in the 3x3 convolution, as torchvision has it (0.28, models/resnet.py, "v1.5").

The paper leaves open, and here it is so: the norm and the activation behind the stem stay until a step removes
activations; the projections keep their norm until they go; LayerScale comes with the last step, drop path is
the caller's. Maps are channels-last, (N, H, W, C).
"""

import collections
import dataclasses
from typing import Any, NamedTuple

from keras_convnext import _messages
from keras_convnext.data.preprocessing import IMAGENET_MEAN, IMAGENET_STD, is_positive_integer
from keras_convnext.weights.torchvision_resnet import load_torchvision

__all__ = ["MISFITS", "REGIMES", "STEPS", "build", "connect", "cost", "design", "find", "load_torchvision"]

REGIMES = {"tiny": "convnext_tiny", "base": "convnext_base", "atto": "convnext_atto"}  # regime -> its end


@dataclasses.dataclass(frozen=True)
class Design:
    """An architecture of the road, as plain values: `STEPS` names those that change."""

    recipe: str  # "2015" (He et al., 90 epochs) or "2022" (Liu et al., appendix A.1, 300 epochs)
    depths: tuple[int, ...]  # blocks of each stage
    width: int  # channels inside a bottleneck of the first stage; of the map itself in the other blocks
    stem: str  # "convolution and pooling" (7x7, stride 2, then 3x3 maximum) or "patchify" (4x4, stride 4)
    block: str  # a name of `BLOCKS`
    depthwise: bool  # whether the 3x3 convolution has a kernel for each channel by itself
    kernel_size: int  # of that convolution
    activation: str  # "relu" or "gelu"
    activations: str  # "all", or "one": between the two 1x1 convolutions
    norm: str  # "batch_norm" (convolutions have no bias then) or "layer_norm"
    norms: str  # "all" of a block, or "one": before the first 1x1 convolution
    downsampling: str  # "in block", by its strides, or "separate", by layers between the stages


Of = collections.namedtuple("Of", "tiny base atto")  # a value by regime, see `build`


class Step(NamedTuple):
    """One row: what a step changes in the `Design` before it, and what the paper reports of the result."""

    name: str
    changes: dict[str, Any]  # field of `Design` -> value, or `Of` values
    top1: float  # ImageNet-1k, 224 pixels, %, from ResNet-50; the mean of three seeds but for the first
    top1_std: float | None
    gflops: float  # as printed: 10**9 multiply-adds of an image
    top1_base: float  # the same from ResNet-200; one run
    gflops_base: float
    why: str
    kept: bool = True  # whether the road goes on from here

    def published(self, regime: str) -> tuple[float | None, float | None]:
        """Top-1 and GFLOPs as printed; None for a regime that the paper has not."""
        both = {"tiny": (self.top1, self.gflops), "base": (self.top1_base, self.gflops_base)}
        return both.get(regime, (None, None))


START = {
    "recipe": "2015", "depths": Of((3, 4, 6, 3), (3, 24, 36, 3), (2, 3, 4, 2)), "width": Of(64, 64, 27),
    "stem": "convolution and pooling", "block": "bottleneck", "depthwise": False, "kernel_size": 3,
    "activation": "relu", "activations": "all", "norm": "batch_norm", "norms": "all", "downsampling": "in block",
}  # fmt: skip

# fmt: off
STEPS = (
    Step("ResNet", START, 76.13, None, 4.09, 78.20, 15.01, "The network of 2015, as torchvision has it: where the road starts."),
    Step("enhanced recipe", {"recipe": "2022"}, 78.82, 0.07, 4.09, 81.14, 15.01, "Much of what Transformers gained is how they were trained: AdamW, 300 epochs, mixup, cutmix, RandAugment, random erasing."),
    Step("stage ratio", {"depths": Of((3, 3, 9, 3), (3, 3, 27, 3), (2, 2, 6, 2)), "width": Of(64, 84, 27)}, 79.36, 0.07, 4.53, 81.33, 14.52, "Swin-T has 1 : 1 : 3 : 1 blocks in its stages, larger ones 1 : 1 : 9 : 1; the third stage gets the most."),
    Step("patchify stem", {"stem": "patchify"}, 79.51, 0.18, 4.42, 81.59, 14.38, "A Transformer cuts the image into patches that do not overlap; one 4x4 convolution does that."),
    Step("depthwise conv", {"depthwise": True}, 78.28, 0.08, 2.35, 80.54, 7.23, "A kernel by channel mixes positions only, as the weighted sum of self-attention does, at half the cost of the network."),
    Step("increase width", {"width": Of(96, 128, 40)}, 80.50, 0.02, 5.27, 81.85, 16.76, "What the depthwise convolution saves is spent on channels, as many as Swin has."),
    Step("inverting dimensions", {"block": "inverted"}, 80.64, 0.03, 4.64, 82.64, 15.68, "The hidden layer of a Transformer's MLP is four times wider than its input; so is the middle of the block now."),
    Step("move up depthwise conv", {"block": "moved up"}, 79.92, 0.08, 4.07, 82.04, 14.63, "Self-attention comes before the MLP; the costly spatial layer then sees the narrow map."),
    Step("kernel size 5", {"kernel_size": 5}, 80.35, 0.08, 4.10, 82.32, 14.70, "Swin attends to windows of 7x7 and more; a larger kernel sees farther.", kept=False),
    Step("kernel size 7", {"kernel_size": 7}, 80.57, 0.14, 4.15, 82.30, 14.81, "The gain ends at 7x7, which stays."),
    Step("kernel size 9", {"kernel_size": 9}, 80.57, 0.06, 4.21, 82.27, 14.95, "Larger is no better.", kept=False),
    Step("kernel size 11", {"kernel_size": 11}, 80.47, 0.11, 4.29, 82.18, 15.13, "Larger is no better.", kept=False),
    Step("ReLU to GELU", {"activation": "gelu"}, 80.62, 0.14, 4.15, 82.19, 14.81, "Transformers use GELU. It changes nothing here, and stays."),
    Step("fewer activations", {"activations": "one"}, 81.27, 0.06, 4.15, 82.71, 14.81, "A Transformer block has one activation, in its MLP."),
    Step("fewer norms", {"norms": "one"}, 81.41, 0.09, 4.15, 83.17, 14.81, "A Transformer block has few norms too; one before the 1x1 convolutions is enough."),
    Step("BN to LN", {"norm": "layer_norm"}, 81.47, 0.09, 4.46, 83.35, 14.81, "In the changed network layer norm trains well, and does not depend on the batch."),
    Step("separate downsampling", {"downsampling": "separate"}, 81.97, 0.06, 4.49, 83.60, 15.35, "Swin halves the map between stages; with a norm at each change of resolution this trains, and it is ConvNeXt."),
)
# fmt: on

# (regime, name): what table 10 prints and no reading of the architecture gives. The first is what the next step
# has, as if the column were shifted by a row; both have their right place in the column from ResNet-200.
MISFITS = {("tiny", "BN to LN"), ("tiny", "separate downsampling")}


def find(step: int | str) -> int:
    """Gives the place of a step in `STEPS`, by its place or name; ValueError when there is none."""
    names = [row.name for row in STEPS]
    places = {text: number for number, name in enumerate(names) for text in (name, str(number))}
    if str(step) in places:  # an integer of NumPy too, and "7" of the command line
        return places[str(step)]
    raise ValueError(f"{_messages.unknown('step', step, names)}, or a place from 0 to 16")


def design(step: int | str, regime: str = "tiny") -> Design:
    """Adds up what the steps change, as far as a step; those that were not kept only where it is one."""
    if regime not in [*REGIMES]:
        raise ValueError(_messages.unknown("regime", regime, REGIMES))
    last, values = find(step), dict[str, Any]()
    for row in (*(row for row in STEPS[:last] if row.kept), STEPS[last]):
        values |= row.changes
    return Design(**{key: getattr(value, regime, value) for key, value in values.items()})


def changes(step: int | str, regime: str = "tiny") -> dict[str, Any]:
    """Gives the fields of `Design` that a step changes in a regime, with their new values."""
    before = [number for number in range(find(step)) if STEPS[number].kept]
    old = vars(design(before[-1], regime)) if before else {}
    return {key: value for key, value in vars(design(step, regime)).items() if old.get(key) != value}


# The forward pass. `make` is a reader, `Counter` or `_KerasLayers`; layers are named as torchvision's.


def network(make, x, design: Design, classes: int):
    """The whole network: (N, H, W, 3) normalised pixels to (N, classes)."""
    separate = design.downsampling == "separate"
    if design.stem == "patchify":
        x = _conv_norm(make, x, "stem_", design, design.width, kernel=4, stride=4)
    else:
        x = _conv_norm(make, x, "", design, design.width, kernel=7, stride=2)
        x = make.max_pool(x)
    for stage, depth in enumerate(design.depths):
        width = design.width * 2**stage
        if separate and stage > 0:
            x = make.conv(make.norm(x, f"down{stage}_0"), f"down{stage}_1", width, kernel=2, stride=2)
        for index in range(depth):
            stride = 2 if index == 0 and stage > 0 and not separate else 1
            x = BLOCKS[design.block](make, x, f"layer{stage + 1}_{index}_", design, width, stride)
    x = make.average_pool(x)
    if separate:
        x = make.norm(x, "ln")
    return make.linear(x, "fc", classes)


def bottleneck(make, x, name, design, width, stride):
    """Narrow, convolve, widen: 1x1, 3x3 and 1x1, the map four times wider than the middle (steps 0 to 5)."""
    y = _conv_norm(make, x, name, design, width)
    y = _conv_norm(make, y, name, design, width, design.kernel_size, stride, design.depthwise, number=2)
    y = make.norm(make.conv(y, f"{name}conv3", 4 * width), f"{name}bn3")
    return _add(make, x, y, name, design, stride)


def inverted(make, x, name, design, width, stride):
    """Widen, convolve, narrow: the middle four times wider than the map (step 6)."""
    y = _conv_norm(make, x, name, design, 4 * width)
    y = _conv_norm(make, y, name, design, 4 * width, design.kernel_size, stride, depthwise=True, number=2)
    y = make.norm(make.conv(y, f"{name}conv3", width), f"{name}bn3")
    return _add(make, x, y, name, design, stride)


def moved_up(make, x, name, design, width, stride):
    """Convolve the narrow map, then widen and narrow: in the end the block of ConvNeXt (steps 7 to 16)."""
    y = make.conv(x, f"{name}conv1", None, design.kernel_size, stride, depthwise=True)
    y = make.norm(y, f"{name}bn1")
    if design.activations == "all":
        y = make.activation(y)
    y = make.conv(y, f"{name}conv2", 4 * width)
    if design.norms == "all":
        y = make.norm(y, f"{name}bn2")
    y = make.activation(y)
    y = make.conv(y, f"{name}conv3", width)
    if design.norms == "all":
        y = make.norm(y, f"{name}bn3")
    if design.downsampling == "separate":
        y = make.scale(y, f"{name}scale")
    return _add(make, x, y, name, design, stride)


BLOCKS = {"bottleneck": bottleneck, "inverted": inverted, "moved up": moved_up}


def _conv_norm(make, x, name, design, filters, kernel=1, stride=1, depthwise=False, number=1):
    """A convolution, its norm, and its activation as long as there are all."""
    x = make.conv(x, f"{name}conv{number}", filters, kernel, stride, depthwise)
    x = make.norm(x, f"{name}bn{number}")
    return make.activation(x) if design.activations == "all" else x


def _add(make, x, y, name, design, stride):
    """`x + y`, with x projected where its shape is another, and the activation as long as there are all."""
    if stride != 1 or make.channels(x) != make.channels(y):
        x = make.norm(make.conv(x, f"{name}downsample_0", make.channels(y), 1, stride), f"{name}downsample_1")
    x = make.add(x, y, name)
    return make.activation(x) if design.activations == "all" else x


class Cost(NamedTuple):
    """What one image of a model takes, and its size."""

    multiply_adds: int  # of the convolutions and the classifier
    weights: int  # that are trained, so without the statistics of batch norms


def cost(step: int | str, regime: str = "tiny", classes: int = 1000, image_size: int = 224) -> Cost:
    """Counts the multiply-adds of a square image and the weights of a step, without building it."""
    for name, value, least in (("classes", classes, 1), ("image_size", image_size, 32)):
        if not is_positive_integer(value) or value < least:
            raise ValueError(f"{name} must be a whole number from {least} up. Received: {name}={value!r}")
    counter = Counter(chosen := design(step, regime))
    network(counter, (int(image_size), 3), chosen, int(classes))
    return Cost(counter.multiply_adds, counter.weights)


class Counter:
    """Reads a network as numbers; a map is (side, channels). A drawing of a block may note more."""

    def __init__(self, design):
        self.bias = design.norm == "layer_norm"
        self.multiply_adds = self.weights = 0

    def conv(self, x, name, filters, kernel=1, stride=1, depthwise=False):
        side, channels = x
        filters = filters or channels
        side = (side + 2 * _margin(kernel, stride) - kernel) // stride + 1
        taps = kernel**2 * filters * (1 if depthwise else channels)
        self.multiply_adds += side**2 * taps
        self.weights += taps + self.bias * filters
        return side, filters

    def norm(self, x, name):
        self.weights += 2 * x[1]
        return x

    def scale(self, x, name):
        self.weights += x[1]
        return x

    def activation(self, x):
        return x

    def linear(self, x, name, classes):
        self.multiply_adds += x[1] * classes
        self.weights += (x[1] + 1) * classes

    def add(self, x, y, name):
        return y

    def max_pool(self, x):
        return (x[0] + 1) // 2, x[1]

    def average_pool(self, x):
        return 1, x[1]

    def channels(self, x):
        return x[1]


def _margin(kernel, stride):
    """Pixels of padding on each side, as in PyTorch's networks: none of patches that stand side by side."""
    return 0 if kernel == stride else (kernel - 1) // 2


class _KerasLayers:
    """Reads a network as a Keras graph."""

    def __init__(self, design, drop_path_rate, seed):
        import keras

        from keras_convnext import convnext
        from keras_convnext.layers import depthwise, initializers, normalization, pointwise, residual

        self.layers, self.design, self.seed = keras.layers, design, seed
        self.rates = convnext.drop_path_rates(drop_path_rate, sum(design.depths))
        self.bias, self.block = design.norm == "layer_norm", 0
        self.depthwise, self.patches = depthwise.DepthwiseConv2D, pointwise.PatchConv2D
        self.layer_norm, self.residual = normalization.LayerNormalization, residual
        self.initializer, self.random_normal = convnext.INITIALIZER, initializers.RandomNormal
        in_16_bits = keras.config.dtype_policy().compute_dtype in ("float16", "bfloat16")
        self.head_dtype = "float32" if in_16_bits else None  # sums over a map lose digits in 16 bits

    def conv(self, x, name, filters, kernel=1, stride=1, depthwise=False):
        margin = _margin(kernel, stride)
        if depthwise and stride == 1:
            return self.depthwise(kernel, use_bias=self.bias, name=name)(x)
        settings = {"strides": stride, "use_bias": self.bias, "data_format": "channels_last", "name": name}
        if stride == 1:
            settings["padding"] = "same"
        elif margin:  # on both sides; "same" would pad an even-sized map only after its last pixel
            x = self.layers.ZeroPadding2D(margin, data_format="channels_last")(x)
        if depthwise:
            return self.layers.DepthwiseConv2D(kernel, depthwise_initializer=self.initializer, **settings)(x)
        # Of ResNets torchvision's, He et al. 2015 (arXiv:1502.01852) by the outputs.
        start = self.initializer if self.bias else self.random_normal((2 / (kernel**2 * filters)) ** 0.5)
        kind = self.patches if kernel == stride > 1 else self.layers.Conv2D
        return kind(filters, kernel, kernel_initializer=start, **settings)(x)

    def norm(self, x, name):
        if self.design.norm == "layer_norm":
            return self.layer_norm(1e-6, name=name)(x)
        # PyTorch's values; its momentum of 0.1 is Keras's 0.9.
        return self.layers.BatchNormalization(momentum=0.9, epsilon=1e-5, name=name)(x)

    def scale(self, x, name):
        return self.residual.LayerScale(name=name)(x)

    def linear(self, x, name, classes):
        return self.layers.Dense(classes, None, True, self.initializer, dtype=self.head_dtype, name=name)(x)

    def activation(self, x):
        return self.layers.Activation(self.design.activation)(x)

    def add(self, x, y, name):
        rate, seed = self.rates[self.block], None if self.seed is None else self.seed + self.block
        self.block += 1
        return self.layers.Add()([x, self.residual.StochasticDepth(rate, seed, name=f"{name}drop")(y)])

    def max_pool(self, x):  # of an activation, from 0 up, so zeros pad as well as PyTorch's lowest number
        x = self.layers.ZeroPadding2D(1, data_format="channels_last")(x)
        return self.layers.MaxPooling2D(3, 2, data_format="channels_last")(x)

    def average_pool(self, x):
        return self.layers.GlobalAveragePooling2D("channels_last", dtype=self.head_dtype)(x)

    def channels(self, x):
        return x.shape[-1]


def build(
    step: int | str,
    regime: str = "tiny",
    classes: int = 1000,
    input_shape: tuple = (224, 224, 3),
    *,
    classifier_activation="softmax",
    drop_path_rate: float = 0.0,
    seed: int | None = None,
):
    """Builds the model of a step with random weights, (N, H, W, 3) pixels in 0..255 to (N, classes).

    As the models of this package, it normalises pixels itself, with the mean and deviation of ImageNet. The
    last step is the model of this package where the road ends, which its weights fit.

    Args:
        step: from 0 to 16, or the name of a row of `STEPS`.
        regime: "tiny" from ResNet-50 to ConvNeXt-T, "base" from ResNet-200 to ConvNeXt-B; "atto", of our
            own for small machines, from a ResNet that is as much narrower to timm's ConvNeXt-Atto.
        input_shape: (height, width, channels); a side is 32 and more, or None for any.
        classifier_activation: None for logits.
        drop_path_rate: of the last block; 0 at the first (0.1 in the paper's "tiny", 0.5 in "base"). Its
            random numbers come from `seed`.

    Raises:
        ValueError: there is no such step or regime (near names are listed), or a value is out of range.

    Example:
        >>> build("kernel size 7", classes=10, input_shape=(64, 64, 3)).output_shape
        (None, 10)
    """
    if design(step, regime).downsampling != "separate":
        return connect(step, regime, classes, input_shape, classifier_activation, drop_path_rate, seed)
    from keras_convnext import models

    return models.build(*_end(regime, classes, input_shape, classifier_activation, drop_path_rate, seed))


def connect(step, regime, classes, input_shape, classifier_activation, drop_path_rate=0.0, seed=None):
    """Builds any step from the blocks above, the last too: what a fair comparison of times takes."""
    import keras

    from keras_convnext import models

    chosen, number = design(step, regime), find(step)
    _, options = _end(regime, classes, input_shape, classifier_activation, drop_path_rate, seed)
    x = images = keras.Input(options.input_shape, name="image")
    mean, std = (models.for_channels(each, x.shape[-1]) for each in (IMAGENET_MEAN, IMAGENET_STD))
    mean, variance = [255 * value for value in mean], [(255 * value) ** 2 for value in std]
    # In float32: a mean of 123.675 would be rounded in 16 bits.
    x = keras.layers.Normalization(-1, mean, variance, dtype="float32", name="normalization")(x)
    reader = _KerasLayers(chosen, options.drop_path_rate, options.seed)
    x, activation = network(reader, x, chosen, options.classes), options.classifier_activation
    if activation is not None:
        x = keras.layers.Activation(activation, dtype=reader.head_dtype, name="predictions")(x)
    return keras.Model(images, x, name=f"road_{number}_{regime}")


def _end(regime, classes, input_shape, classifier_activation, drop_path_rate, seed):
    """The end of the road as `models.build` takes it; any step has its options, checked alike."""
    from keras_convnext import model_options
    from keras_convnext.weights.resolve import resolve

    values: dict = {"classes": classes, "input_shape": input_shape, "drop_path_rate": drop_path_rate}
    options = model_options.ModelOptions(**values, classifier_activation=classifier_activation, seed=seed)
    return (source := resolve(REGIMES[regime], None)), options.settled(source)
