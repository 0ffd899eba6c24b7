"""RandAugment, AutoAugment, TrivialAugment and colour jitter: which operations an image gets, how strong."""

import csv
import dataclasses
import functools
import importlib.resources
import math
import re
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import tensorflow as tf

from keras_convnext._messages import near_names
from keras_convnext.data.augment import pixels
from keras_convnext.data.train_transform import POLICIES

Plan = dict[str, tf.Tensor]  # decisions for many examples: tensors with a common first axis

# What the numbers in a plan stand for. All but the first are what timm's RandAugment draws from, in the order
# of its _RAND_TRANSFORMS.
OPERATIONS = (
    *("identity", "autocontrast", "equalize", "invert", "rotate", "posterize", "solarize", "solarize_add"),
    *("color", "contrast", "brightness", "sharpness"),
    *("shear_x", "shear_y", "translate_x", "translate_y"),
)
_RAND_LEVELS = OPERATIONS[1:]
# timm's _RAND_INCREASING_TRANSFORMS, for "inc1".
_CHANGED = ("posterize", "solarize", "color", "contrast", "brightness", "sharpness")
_RAND_INCREASING_LEVELS = tuple(f"{name}_increasing" if name in _CHANGED else name for name in _RAND_LEVELS)

# The keys of torchvision's TrivialAugmentWide._augmentation_space.
_TRIVIAL_OPERATIONS = tuple(name for name in OPERATIONS if name not in ("invert", "solarize_add"))
# Number of bins and largest magnitudes in torchvision's _augmentation_space of TrivialAugmentWide and of
# AutoAugment; for posterize the number of bits that are dropped.
_TRIVIAL_SPACE = 31, {"shear": 0.99, "translate": 32.0, "rotate": 135.0, "factor": 0.99, "bits": 6.0}
_AUTO_SPACE = 10, {"shear": 0.3, "rotate": 30.0, "factor": 0.9, "bits": 4.0}

SubPolicies = tuple[tuple[tuple[str, float, int], ...], ...]  # (level, probability, magnitude)


@dataclasses.dataclass(frozen=True)
class RandAugment:
    """timm's RandAugment: operations drawn uniformly with replacement, each carried out with a probability.

    A level is an operation, with "_increasing" or "_original" after it where timm has several meanings of its
    magnitude.
    Reference: Cubuk et al., arXiv 1909.13719; timm 1.0.31, timm/data/auto_augment.py, `RandAugment`.
    """

    levels: tuple[str, ...] = _RAND_LEVELS
    num_operations: int = 2  # for one image
    magnitude: float = 10.0  # mean, 0 to 10
    magnitude_std: float = 0.0  # of the normal magnitude; inf draws it uniformly from 0 to `magnitude`
    magnitude_max: float = 10.0
    probability: float = 0.5  # of carrying a drawn operation out


@dataclasses.dataclass(frozen=True)
class AutoAugment:
    """AutoAugment: one of 25 sub-policies of two operations, each with its probability and magnitude."""

    sub_policies: SubPolicies  # levels as in `RandAugment`
    magnitude_std: float = 0.0
    torchvision: bool = False  # whether magnitudes are torchvision's ten bins, not timm's 0 to 10
    num_operations: int = 2
    magnitude_max: float = 10.0


@dataclasses.dataclass(frozen=True)
class TrivialAugment:
    """torchvision's `TrivialAugmentWide`: one of 14 operations with one of 31 magnitudes.

    Its own defaults are nearest neighbours and a black fill; the recipe says the interpolation here.
    Reference: Mueller and Hutter, arXiv 2103.10158; torchvision 0.28.0, transforms/autoaugment.py.
    """

    num_operations: int = 1


Policy = RandAugment | AutoAugment | TrivialAugment

_SETTINGS: dict[str, tuple[str, ...]] = {"rand": ("m", "n", "p", "mstd", "mmax", "inc")}
_SETTINGS |= dict.fromkeys(("original", "originalr", "v0", "v0r"), ("mstd",))

# What a plan needs for each operation: which one, whether, how strong, which sign.
UNIFORMS_PER_OPERATION = 4


def parse_policy(text: str) -> Policy | None:
    """Read the name of a published augmentation; None for "none", and for "keras", see `keras_layers`.

    - "rand-m9-mstd0.5-inc1", timm's RandAugment. m: magnitude (10), n: operations for one image (2), p:
      probability of each (0.5), mstd: standard deviation of the magnitude (0; above 100 it is uniform),
      mmax: largest magnitude (10), inc: 1 for operations that all grow with the magnitude (0).
    - "original" and "v0", timm's AutoAugment; "originalr" and "v0r" posterize more, not less, with the
      magnitude. "-mstd0.5" may follow.
    - "imagenet": torchvision's AutoAugment, whose magnitudes differ from timm's.
    - "ta_wide": torchvision's TrivialAugmentWide.

    Raises ValueError when the name or one of its settings is unknown; tells the known ones.
    """
    name, *sections = text.split("-")
    if name not in POLICIES:
        near = near_names(name, POLICIES, 1)
        raise ValueError(f"Unknown augmentation {text!r}.{near} Known: {', '.join(POLICIES[1:])}, none.")
    known = _SETTINGS.get(name, ())
    settings = {}
    for section in sections:
        match = re.fullmatch(r"([a-z]+)(\d+(?:\.\d+)?)", section)
        if match is None or match[1] not in known:
            allowed = f"Known: {', '.join(known)}, each followed by a number." if known else "It takes none."
            raise ValueError(f"Unknown setting {section!r} of augmentation {text!r}. {allowed}")
        settings[match[1]] = float(match[2])
    if not (settings.get("n", 2.0) in range(101) and settings.get("p", 0.5) <= 1):
        raise ValueError(f"Expected a whole n up to 100 and p up to 1, received augmentation {text!r}.")
    std = settings.get("mstd", 0.0)
    if name == "rand":
        return RandAugment(
            levels=_RAND_INCREASING_LEVELS if settings.get("inc") else _RAND_LEVELS,
            num_operations=int(settings.get("n", 2)),
            magnitude=settings.get("m", 10.0),
            magnitude_std=math.inf if std > 100 else std,
            magnitude_max=settings.get("mmax", 10.0),
            probability=settings.get("p", 0.5),
        )
    if name == "ta_wide":
        return TrivialAugment()
    if name in ("none", "keras"):
        return None
    sub_policies = _sub_policies("v0" if name.startswith("v0") else "original")
    if name.endswith("r"):
        sub_policies = tuple(tuple(map(_increase_posterize, sub_policy)) for sub_policy in sub_policies)
    return AutoAugment(sub_policies, std, torchvision=name == "imagenet")


def plan_augment(policy: Policy, uniforms: tf.Tensor, image_size: tuple[int, int]) -> Plan:
    """Decide the operations of many examples.

    `uniforms` are float32 or float64 (N, UNIFORMS_PER_OPERATION * policy.num_operations), in [0, 1), for each
    operation in turn: which one (in AutoAugment the first column chooses the sub-policy), whether, how
    strong, and the sign, negative from 0.5 on. `image_size`, (height, width) in pixels, scales timm's
    translations.

    Returns "operation", int32 (N, num_operations), positions in `OPERATIONS`, and "argument", float64 of the
    same shape, what the operation is given: a factor, a threshold, bits, pixels, degrees.
    """
    uniforms = tf.cast(uniforms, tf.float64)
    uniforms = tf.reshape(uniforms, [-1, policy.num_operations, UNIFORMS_PER_OPERATION])
    choice, applied, strength, sign = tf.unstack(uniforms, axis=2)  # (N, num_operations) each
    negative = tf.cast(sign >= 0.5, tf.int32)
    column = tf.zeros_like(negative)
    if isinstance(policy, RandAugment):
        rows: Any = [[(level, policy.probability, policy.magnitude)] for level in policy.levels]
    elif isinstance(policy, TrivialAugment):
        bins = range(_TRIVIAL_SPACE[0])
        rows = [[(name, 1.0, bin_) for bin_ in bins] for name in _TRIVIAL_OPERATIONS]
        column = number_below(strength, len(bins))
    else:
        rows = policy.sub_policies
        column += tf.range(policy.num_operations)
        choice = tf.repeat(choice[:, :1], policy.num_operations, 1)
    place = tf.stack([number_below(choice, len(rows)), column], 2)
    levels, probabilities, magnitudes = np.moveaxis(np.array(rows, object), 2, 0)  # (rows, columns) each
    probability = tf.gather_nd(probabilities.astype(np.float64), place)
    operation = tf.gather_nd(np.stack([_numbers(row) for row in levels]), place)
    operation = tf.where(applied < probability, operation, 0)
    if isinstance(policy, TrivialAugment) or (isinstance(policy, AutoAugment) and policy.torchvision):
        space = _TRIVIAL_SPACE if isinstance(policy, TrivialAugment) else _AUTO_SPACE
        table = [[_torchvision_arguments(level, bin_, *space) for level, _, bin_ in row] for row in rows]
        argument = tf.gather_nd(np.array(table, np.float64), tf.concat([place, negative[..., None]], 2))
        return {"operation": operation, "argument": argument}

    magnitude = tf.gather_nd(magnitudes.astype(np.float64), place)
    if math.isinf(policy.magnitude_std):
        magnitude *= strength
    elif policy.magnitude_std > 0:
        magnitude += policy.magnitude_std * tf.math.ndtri(strength)
    magnitude = tf.clip_by_value(magnitude, 0.0, policy.magnitude_max)
    arguments = _timm_arguments(magnitude, 1.0 - 2.0 * tf.cast(negative, tf.float64), image_size)
    names = list(arguments)
    column = tf.gather_nd(np.array([[names.index(level) for level in row] for row in levels]), place)
    return {
        "operation": operation,
        "argument": tf.gather(tf.stack(list(arguments.values()), 2), column, batch_dims=2),
    }


def apply_augment(
    image: tf.Tensor, plan: Plan, interpolation: str = "bicubic", fill: Sequence[int] = pixels.IMAGENET_FILL
) -> tf.Tensor:
    """Carry out the operations planned for one image, uint8 (H, W, 3): one row of `plan_augment`.

    The default fill is timm's, torchvision's is (0, 0, 0).
    """
    if tf.executing_eagerly():
        functions = _functions(interpolation, tuple(fill))
        for number, argument in zip(plan["operation"], plan["argument"], strict=True):
            image = functions[int(number)](image, argument)
        return image
    shape = image.shape
    branches = _graphs(interpolation, tuple(fill), tuple(shape))
    for number, argument in zip(tf.unstack(plan["operation"]), tf.unstack(plan["argument"]), strict=True):
        # tf.switch_case would merge all branches into this graph, and pass a dead value through each node
        # of those not taken: 80 us an image. This calls the chosen function.
        [image] = tf.raw_ops.StatelessCase(
            branch_index=number,
            input=[image, argument],
            Tout=[tf.uint8],
            branches=branches,
            output_shapes=[shape],
        )
        image.set_shape(shape)
    return image


NUM_JITTER_UNIFORMS = 8


def plan_jitter(uniforms: tf.Tensor, strength: float) -> Plan:
    """Decide the colour jitter of many examples: torchvision's ColorJitter, in random order, without hue.

    `uniforms` are float32 or float64 (N, NUM_JITTER_UNIFORMS), in [0, 1): four order the operations, then one
    for each chooses its factor, from max(0, 1 - strength) to 1 + strength, as timm's `color_jitter`. The
    fourth operation does nothing: it has the place of the hue. Returns what `plan_augment` does.
    """
    low = max(0.0, 1.0 - strength)
    uniforms = tf.cast(uniforms, tf.float64)
    factors = low + (1.0 + strength - low) * uniforms[:, 4:]
    order = tf.argsort(uniforms[:, :4], 1)
    return {
        "operation": tf.gather(_numbers(("brightness", "contrast", "color", "identity")), order),
        "argument": tf.gather(factors, order, batch_dims=1),
    }


def apply_jitter(image: tf.Tensor, plan: Plan) -> tf.Tensor:
    """Carry out the colour jitter planned for one image: uint8 (H, W, 3), and one row of `plan_jitter`."""
    return apply_augment(image, plan)


def _timm_arguments(
    magnitude: tf.Tensor, sign: tf.Tensor, image_size: tuple[int, int]
) -> dict[str, tf.Tensor]:
    """What a magnitude from 0 to 10 means for each level: LEVEL_TO_ARG of timm/data/auto_augment.py."""
    height, width = image_size
    level = magnitude / 10.0
    bits, threshold = tf.floor(level * 4.0), tf.minimum(tf.floor(level * 256.0), 256.0)
    arguments = {
        "rotate": sign * (level * 30.0),
        "posterize": bits,
        "posterize_increasing": 4.0 - bits,
        "posterize_original": bits + 4.0,
        "solarize": threshold,
        "solarize_increasing": 256.0 - threshold,
        "solarize_add": tf.minimum(tf.floor(level * 110.0), 128.0),
        "translate_x": sign * (level * 0.45) * width,
        "translate_y": sign * (level * 0.45) * height,
    }
    arguments |= dict.fromkeys(("autocontrast", "equalize", "invert"), tf.zeros_like(level))
    arguments |= dict.fromkeys(("shear_x", "shear_y"), sign * (level * 0.3))
    for name in ("color", "contrast", "brightness", "sharpness"):
        arguments[name] = level * 1.8 + 0.1
        arguments[f"{name}_increasing"] = tf.maximum(1.0 + sign * (level * 0.9), 0.1)
    return arguments


def _torchvision_arguments(
    level: str, number: float, num_bins: int, ranges: dict[str, float]
) -> tuple[float, float]:
    """What torchvision gives Pillow for one of its magnitudes, and for its negative.

    Reference: torchvision 0.28.0, transforms/autoaugment.py, `_augmentation_space` and `_apply_op`.
    """
    name, number = _operation(level), int(number)
    magnitudes = {kind: _linspace(0.0, largest, num_bins)[number] for kind, largest in ranges.items()}
    if name in ("shear_x", "shear_y"):
        # torchvision goes through degrees, and through another formula for each axis.
        angle = math.radians(math.degrees(math.atan(magnitudes["shear"])))
        shear = math.tan(angle) if name == "shear_x" else math.sin(angle) / math.cos(angle)
        return shear, -shear
    if name in ("translate_x", "translate_y"):
        distance = float(int(magnitudes["translate"]))
        return -distance, distance
    if name == "rotate":
        return magnitudes["rotate"], -magnitudes["rotate"]
    if name in ("brightness", "color", "contrast", "sharpness"):
        return 1.0 + magnitudes["factor"], 1.0 - magnitudes["factor"]
    argument = 0.0
    if name == "posterize":
        argument = 8.0 - round(float(np.float32(number / ((num_bins - 1) / ranges["bits"]))))
    elif name == "solarize":
        argument = math.ceil(_linspace(255.0, 0.0, num_bins)[number])
    return argument, argument


def _linspace(start: float, stop: float, num: int) -> list[float]:
    """The values of torch.linspace: float32, counted from the nearer end."""
    step = float((np.float32(stop) - np.float32(start)) / np.float32(num - 1))
    stop = float(np.float32(stop))
    values = [start + step * i if i < num // 2 else stop - step * (num - 1 - i) for i in range(num)]
    return [float(np.float32(value)) for value in values]


def _sub_policies(name: str) -> SubPolicies:
    """AutoAugment's sub-policies for ImageNet, from `auto_augment.csv`.

    "original": Cubuk et al., arXiv 1805.09501, table 9, as timm's auto_augment_policy_original has them;
    "v0": timm's auto_augment_policy_v0, which comes from the EfficientNet code for TPU.
    """
    with (importlib.resources.files(__package__) / "auto_augment.csv").open(encoding="utf-8") as file:
        rows = [row for policy, *row in csv.reader(file) if policy == name]
    return tuple(tuple((row[i], float(row[i + 1]), int(row[i + 2])) for i in (0, 3)) for row in rows)


def _increase_posterize(entry: tuple[str, float, int]) -> tuple[str, float, int]:
    level, probability, magnitude = entry
    return "posterize_increasing" if level.startswith("posterize") else level, probability, magnitude


def _operation(level: str) -> str:
    return level.removesuffix("_increasing").removesuffix("_original")


def _numbers(levels: Sequence[str]) -> np.ndarray:
    return np.array([OPERATIONS.index(_operation(level)) for level in levels], np.int32)


def number_below(uniform: tf.Tensor, count: int | tf.Tensor) -> tf.Tensor:
    """Turn a number in [0, 1) into a whole number from 0 to count - 1, int32."""
    return tf.cast(tf.floor(uniform * tf.cast(count, tf.float64)), tf.int32)


def _functions(
    interpolation: str, fill: tuple[int, ...]
) -> list[Callable[[tf.Tensor, tf.Tensor], tf.Tensor]]:
    """The functions of (image, argument) that `OPERATIONS` names, in its order."""

    def plain(operation: Callable) -> Callable:
        return lambda image, argument: operation(image)

    def geometric(operation: Callable) -> Callable:
        return lambda image, argument: operation(image, argument, interpolation, fill)

    return [
        *map(plain, (tf.identity, pixels.autocontrast, pixels.equalize, pixels.invert)),
        *(geometric(pixels.rotate), pixels.posterize, pixels.solarize, pixels.solarize_add),
        *(pixels.color, pixels.contrast, pixels.brightness, pixels.sharpness),
        *map(geometric, (pixels.shear_x, pixels.shear_y, pixels.translate_x, pixels.translate_y)),
    ]


@functools.lru_cache(maxsize=8)
def _graphs(interpolation: str, fill: tuple[int, ...], shape: tuple[int | None, ...]) -> list[Any]:
    """The same, traced once for all graphs in which images of a shape are augmented."""
    specification = tf.TensorSpec(shape, tf.uint8), tf.TensorSpec([], tf.float64)
    with tf.init_scope():
        return [
            tf.function(function, autograph=False).get_concrete_function(*specification)
            for function in _functions(interpolation, fill)
        ]
