"""Augmentation: pixels equal to Pillow's, draws distributed as timm's and torchvision's."""

import dataclasses
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import tensorflow as tf
import torch
import torchvision.transforms.functional as tv_functional
from PIL import Image, ImageEnhance, ImageOps
from scipy import stats
from timm.data import auto_augment as timm_augment
from timm.data import mixup as timm_mixup
from timm.data import random_erasing as timm_erasing
from torchvision.transforms import AutoAugment, TrivialAugmentWide
from torchvision.transforms import autoaugment as tv_augment

from keras_convnext.data.augment import erase_and_mix, policies

pytestmark = pytest.mark.once

FILL = (124, 116, 104)
FILTERS = {
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
}


def make_images():
    rng = np.random.default_rng(0)
    folder = Path(__file__).parents[1] / "images"
    photographs = [
        np.asarray(Image.open(folder / name).convert("RGB"))
        for name in ("chelsea.png", "coffee.jpg", "rocket.jpg")
    ]
    noise = rng.integers(0, 256, (60, 44, 3), dtype=np.uint8)
    one_level = np.full((20, 30, 3), 77, np.uint8)
    two_levels = np.where(rng.random((30, 20, 1)) < 0.4, 90, 91).astype(np.uint8).repeat(3, 2)
    spike = np.zeros((40, 40, 3), np.uint8)
    spike[3, 5] = (255, 1, 0)
    return {
        "square": photographs[0][:224, 100:324],
        "tall": photographs[1][40:240, 200:297],
        "wide": photographs[2][100:161, 150:350],
        "dark": photographs[0][::4, ::4] // 5,
        "gray": photographs[0][::3, ::3, 1:2].repeat(3, 2),
        "noise": noise,
        "one level": one_level,
        "two levels": two_levels,
        "spike": spike,
        "black": np.zeros((16, 16, 3), np.uint8),
        "white": np.full((16, 16, 3), 255, np.uint8),
        "1 x 1": noise[:1, :1],
        "1 x 5": noise[:1, :5],
        "5 x 1": noise[:5, :1],
        "2 x 3": noise[:2, :3],
        "3 x 2": noise[:3, :2],
    }


IMAGES = make_images()
FACTORS = [(factor,) for factor in (0.0, 0.1, 0.55, 0.999, 1.0, 1.001, 1.37, 1.9, 3.0)]


def black(image):
    return image.point([0] * 768)


def posterize_as_before_pillow_13(image, bits, strict=ImageOps.posterize):
    return strict(image, bits) if bits else black(image)


# operation: (its arguments, Pillow's function of the same arguments)
PIXELWISE = {
    "autocontrast": ([()], ImageOps.autocontrast),
    "equalize": ([()], ImageOps.equalize),
    "invert": ([()], ImageOps.invert),
    "posterize": ([(bits,) for bits in range(9)], posterize_as_before_pillow_13),
    "solarize": ([(level,) for level in (0, 1, 26, 128, 255, 256)], ImageOps.solarize),
    "solarize_add": ([(add,) for add in (0, 1, 43, 110, 128)], timm_augment.solarize_add),
    "color": (FACTORS, lambda image, factor: ImageEnhance.Color(image).enhance(factor)),
    "contrast": (FACTORS, lambda image, factor: ImageEnhance.Contrast(image).enhance(factor)),
    "brightness": (FACTORS, lambda image, factor: ImageEnhance.Brightness(image).enhance(factor)),
    "sharpness": (FACTORS, lambda image, factor: ImageEnhance.Sharpness(image).enhance(factor)),
}
SLOPES = (0.0, 0.27, -0.27, 0.3, -0.3, 0.1234567, -0.5, 1 / 3, 0.99)
PIXELS = (0.0, 3.0, -3.0, 0.5, -0.5, 0.3, -12.6, 90.72, -90.72, 1e-9, 1000.0)
ANGLES = (0.0, 27.0, -27.0, 13.7, -29.999, 30.0, 45.0, 90.0, -90.0, 180.0, 135.0, -121.5, 1e-6)
GEOMETRIC = {
    "shear_x": (SLOPES, lambda slope: (1, slope, 0, 0, 1, 0)),
    "shear_y": (SLOPES, lambda slope: (1, 0, 0, slope, 1, 0)),
    "translate_x": (PIXELS, lambda pixels: (1, 0, pixels, 0, 1, 0)),
    "translate_y": (PIXELS, lambda pixels: (1, 0, 0, 0, 1, pixels)),
    "rotate": (ANGLES, None),
}


def pillow_geometric(name, pixels, argument, interpolation, fill):
    image, resample = Image.fromarray(pixels), FILTERS[interpolation]
    if name == "rotate":
        return np.asarray(image.rotate(argument, resample, fillcolor=fill))
    matrix = GEOMETRIC[name][1](argument)
    return np.asarray(image.transform(image.size, Image.Transform.AFFINE, matrix, resample, fillcolor=fill))


@pytest.mark.parametrize("name", PIXELWISE)
def test_pixelwise_operations_equal_pillow(name):
    arguments, pillow = PIXELWISE[name]
    operation, changed = getattr(policies.pixels, name), False
    for title, pixels in IMAGES.items():
        for argument in arguments:
            ours = operation(tf.constant(pixels), *argument).numpy()
            assert ours.dtype == np.uint8
            np.testing.assert_array_equal(
                ours, pillow(Image.fromarray(pixels), *argument), f"{title} {argument}"
            )
            changed |= bool((ours != pixels).any())
    assert changed  # else the operation could be the identity


@pytest.mark.parametrize("interpolation", FILTERS)
@pytest.mark.parametrize("name", GEOMETRIC)
def test_geometric_operations_equal_pillow(name, interpolation):
    operation = getattr(policies.pixels, name)
    for title, pixels in IMAGES.items():
        for argument in GEOMETRIC[name][0]:
            ours = operation(
                tf.constant(pixels), tf.constant(argument, tf.float64), interpolation, FILL
            ).numpy()
            theirs = pillow_geometric(name, pixels, argument, interpolation, FILL)
            np.testing.assert_array_equal(ours, theirs, f"{title} {argument}")


@pytest.mark.parametrize("name", GEOMETRIC)
def test_geometric_operations_follow_their_argument_closely(name):
    """The negative control of the test above: rounding to float32 shows, and a turn by 1e-4 degrees."""
    pixels, differing = IMAGES["square"], 0
    for argument in (0.27, -0.3, 0.1234567):
        near = argument + 1e-4 if name == "rotate" else np.float64(np.float32(argument))
        operation = getattr(policies.pixels, name)
        ours = operation(tf.constant(pixels), tf.constant(near), "bilinear", FILL).numpy()
        differing += np.sum(ours != pillow_geometric(name, pixels, argument, "bilinear", FILL))
    assert differing > 0


def test_operations_take_images_whose_size_is_not_known_while_tracing():
    def apply(image, number, argument):
        return policies.apply_augment(image, {"operation": number[None], "argument": argument[None]})

    specification = (
        tf.TensorSpec([None, None, 3], tf.uint8),
        tf.TensorSpec([], tf.int32),
        tf.TensorSpec([], tf.float64),
    )
    traced = tf.function(apply, input_signature=specification)
    for pixels in (IMAGES["tall"], IMAGES["wide"]):
        for number, name in enumerate(policies.OPERATIONS):
            eager = apply(tf.constant(pixels), tf.constant(number), tf.constant(1.0, tf.float64))
            np.testing.assert_array_equal(traced(pixels, number, 1.0), eager, name)


# Policies


LEVELS = dict.fromkeys(
    (*policies.parse_policy("rand").levels, *policies.parse_policy("rand-inc1").levels, "posterize_original")
)
INCREASING = policies.parse_policy("rand-m9-mstd0.5-inc1")


def timm_name(level):
    """'translate_x' as timm spells it, 'TranslateXRel'."""
    name = "".join(part.capitalize() for part in level.split("_")).replace("Autocontrast", "AutoContrast")
    return name + "Rel" if name.startswith("Translate") else name


def plan_of(policy, uniforms, image_size):
    plan = policies.plan_augment(policy, tf.constant(uniforms, tf.float64), image_size)
    return {name: value.numpy() for name, value in plan.items()}


def apply_row(pixels, plan, row, *settings):
    return policies.apply_augment(
        tf.constant(pixels), {k: v[row] for k, v in plan.items()}, *settings
    ).numpy()


@pytest.mark.parametrize("level", LEVELS)
def test_every_level_equals_timms_operation(level, monkeypatch):
    monkeypatch.setattr(ImageOps, "posterize", posterize_as_before_pillow_13)
    hparams = {"img_mean": FILL, "interpolation": Image.Resampling.BICUBIC}
    for magnitude in (0, 0.3, 2.5, 4, 5, 7, 9.37, 10):
        policy = policies.RandAugment((level,), 1, magnitude, probability=1.0)
        for sign in (0.2, 0.7):
            monkeypatch.setattr(timm_augment.random, "random", lambda sign=sign: sign)
            for title in ("wide", "noise"):
                pixels = IMAGES[title]
                ours = apply_row(
                    pixels, plan_of(policy, [[0, 0, 0.5, sign]], pixels.shape[:2]), 0, "bicubic", FILL
                )
                op = timm_augment.AugmentOp(timm_name(level), 1.0, magnitude, hparams)
                np.testing.assert_array_equal(
                    ours, op(Image.fromarray(pixels)), f"{title} {magnitude} {sign}"
                )


@pytest.mark.parametrize("name", ["original", "originalr", "v0", "v0r"])
def test_sub_policies_are_timms(name):
    theirs = [
        [(op.name, op.prob, op.magnitude) for op in sub_policy]
        for sub_policy in timm_augment.auto_augment_policy(name, {"img_mean": FILL})
    ]
    sub_policies = policies.parse_policy(name).sub_policies
    assert [
        [(timm_name(level), *rest) for level, *rest in sub_policy] for sub_policy in sub_policies
    ] == theirs


@pytest.mark.parametrize(
    "text", ["rand", "rand-m7-n3-mstd1-p0.25", "rand-m9-mstd0.5-inc1", "rand-mstd101-mmax12"]
)
def test_rand_augment_reads_settings_as_timm(text):
    theirs, ours = timm_augment.rand_augment_transform(text, {"img_mean": FILL}), policies.parse_policy(text)
    op = theirs.ops[0]
    assert [timm_name(level) for level in ours.levels] == [op.name for op in theirs.ops]
    assert (ours.num_operations, ours.probability, ours.magnitude) == (
        theirs.num_layers,
        op.prob,
        op.magnitude,
    )
    assert (ours.magnitude_std, ours.magnitude_max) == (op.magnitude_std, op.magnitude_max or 10)


def timm_draws(transform, count):
    """What `count` calls of a timm transform do: operations and arguments, and how many in each call."""
    drawn, numbers = [], []
    operations = {timm_name(level): policies._operation(level) for level in LEVELS}

    def recorder(name):
        def operation(image, argument=0.0, **_):
            drawn.append((operations[name], argument))
            return image

        return operation

    ops = transform.ops if hasattr(transform, "ops") else [op for part in transform.policy for op in part]
    for op in ops:
        op.aug_fn = recorder(op.name)
    for _ in range(count):
        before = len(drawn)
        transform(Image.new("RGB", (1, 1)))
        numbers.append(len(drawn) - before)
    return drawn, numbers


def our_draws(policy, count, signs=True):
    uniforms = np.random.default_rng(1).random(
        (count, policy.num_operations, policies.UNIFORMS_PER_OPERATION)
    )
    uniforms[..., 3] *= signs
    plan = plan_of(policy, uniforms.reshape(count, -1), (1, 1))  # translations as fractions, as timm's
    used = plan["operation"] > 0
    names = np.array(policies.OPERATIONS)[plan["operation"][used]]
    return list(zip(names, plan["argument"][used], strict=True)), used.sum(1)


def p_value(first, second):
    """Of two samples of draws coming from one distribution: chi-square over operations, arguments, counts."""
    edges = {}
    for name in {name for name, _ in first[0]}:
        arguments = [argument for other, argument in first[0] if other == name]
        edges[name] = np.unique(np.quantile(arguments, np.linspace(0.1, 0.9, 9)))

    def cells(drawn, numbers):
        yield from (f"{name} {np.digitize(argument, edges.get(name, [0.0]))}" for name, argument in drawn)
        yield from (f"{number} operations" for number in numbers)

    counts = [
        dict(zip(*np.unique(list(cells(*draws)), return_counts=True), strict=True))
        for draws in (first, second)
    ]
    table = np.array([[count.get(cell, 0) for cell in {**counts[0], **counts[1]}] for count in counts])
    return stats.chi2_contingency(table[:, table.sum(0) >= 10]).pvalue


@pytest.fixture(scope="module")
def timm_rand_augment_draws():
    timm_augment.random.seed(0)
    np.random.seed(0)
    return timm_draws(timm_augment.rand_augment_transform("rand-m9-mstd0.5-inc1", {"img_mean": FILL}), 10_000)


def test_rand_augment_draws_as_timm(timm_rand_augment_draws):
    assert p_value(timm_rand_augment_draws, our_draws(INCREASING, 10_000)) > 0.01


@pytest.mark.parametrize(
    "changes",
    [
        {"magnitude_std": 0.0},
        {"magnitude_std": 0.6},
        {"magnitude": 8.8},
        {"probability": 0.45},
        {"levels": (*INCREASING.levels, "rotate")},
        {"levels": policies.parse_policy("rand").levels},
        {"signs": False},
    ],
)
def test_other_draws_than_timms_are_told_apart(changes, timm_rand_augment_draws):
    """The negative controls of the test above."""
    signs = changes.pop("signs", True)
    other = our_draws(dataclasses.replace(INCREASING, **changes), 10_000, signs)
    assert p_value(timm_rand_augment_draws, other) < 1e-4


@pytest.mark.parametrize("text", ["original-mstd0.5", "v0", "original-mstd3"])
def test_auto_augment_draws_as_timm(text):
    timm_augment.random.seed(0)
    theirs = timm_draws(timm_augment.auto_augment_transform(text, {"img_mean": FILL}), 10_000)
    policy = policies.parse_policy(text)
    assert p_value(theirs, our_draws(policy, 10_000)) > 0.01
    changed = dataclasses.replace(policy, sub_policies=policy.sub_policies[3:])
    assert p_value(theirs, our_draws(changed, 10_000)) < 1e-4


def test_trivial_augment_equals_torchvision():
    pixels = IMAGES["noise"][:30, :25]
    space = TrivialAugmentWide()._augmentation_space(31)
    places = np.stack(np.meshgrid(np.arange(14), np.arange(31), (0, 1), indexing="ij"), -1).reshape(-1, 3)
    uniforms = np.insert((places + 0.5) / (14, 31, 2), 1, 0.0, axis=1)
    plan = plan_of(policies.TrivialAugment(), uniforms, pixels.shape[:2])
    seen = set()
    for row, (_, number, negative) in enumerate(places):
        name = policies.OPERATIONS[plan["operation"][row, 0]]
        [theirs] = [key for key in space if key.lower() == name.replace("_", "")]
        magnitudes, signed = space[theirs]
        magnitude = magnitudes[number].item() if magnitudes.ndim else 0.0
        magnitude *= -1 if signed and negative else 1
        mode = tv_functional.InterpolationMode.BILINEAR  # as in torchvision's own recipe
        expected = tv_augment._apply_op(Image.fromarray(pixels), theirs, magnitude, mode, None)
        ours = apply_row(pixels, plan, row, "bilinear", (0, 0, 0))
        np.testing.assert_array_equal(ours, expected, f"{name} {number} {negative}")
        seen.add(name)
    assert len(seen) == len(space)


def test_imagenet_policy_equals_torchvision(monkeypatch):
    bilinear = tv_functional.InterpolationMode.BILINEAR
    theirs, ours = AutoAugment(interpolation=bilinear), policies.parse_policy("imagenet")
    pixels = IMAGES["noise"]
    for number in range(len(theirs.policies)):
        for probability in (0.01, 0.5, 0.9):
            for signs in ((0, 1), (1, 0)):
                drawn = number, torch.full([2], probability), torch.tensor(signs)
                monkeypatch.setattr(AutoAugment, "get_params", staticmethod(lambda count, drawn=drawn: drawn))
                row = [[(number + 0.5) / 25, probability, 0, 0.2 + 0.5 * (sign == 0)] for sign in signs]
                plan = plan_of(ours, [np.ravel(row)], pixels.shape[:2])
                expected = theirs(Image.fromarray(pixels))
                np.testing.assert_array_equal(apply_row(pixels, plan, 0, "bilinear", (0, 0, 0)), expected)


def test_trivial_augment_draws_evenly():
    plan = plan_of(policies.TrivialAugment(), np.random.default_rng(0).random((14_000, 4)), (1, 1))
    numbers, counts = np.unique(plan["operation"], return_counts=True)
    assert len(numbers) == 14 and stats.chisquare(counts).pvalue > 0.01
    degrees = plan["argument"][plan["operation"] == policies.OPERATIONS.index("rotate")]
    bins, counts = np.unique(degrees, return_counts=True)
    assert len(bins) == 61 and abs(degrees).max() == 135
    assert stats.chisquare(np.delete(counts, 30)).pvalue > 0.01  # 0 degrees stands for both signs


def test_plans_are_carried_out_alike_in_a_data_set_and_eagerly():
    pixels = IMAGES["square"]
    for text in ("rand-m9-mstd0.5-inc1", "ta_wide"):
        policy = policies.parse_policy(text)
        uniforms = np.random.default_rng(2).random(
            (40, policies.UNIFORMS_PER_OPERATION * policy.num_operations)
        )
        plan = plan_of(policy, uniforms, pixels.shape[:2])
        rows = tf.data.Dataset.from_tensor_slices(plan)
        images = rows.map(lambda row: policies.apply_augment(tf.constant(pixels), row, "bilinear", FILL))
        assert images.element_spec.shape == pixels.shape
        for row, image in enumerate(images.as_numpy_iterator()):
            np.testing.assert_array_equal(image, apply_row(pixels, plan, row, "bilinear", FILL))
        assert len({image.tobytes() for image in images.as_numpy_iterator()}) > 20


def test_a_row_of_a_plan_depends_on_its_uniforms_alone():
    uniforms = np.random.default_rng(3).random((64, 8))
    whole, part = plan_of(INCREASING, uniforms, (224, 160)), plan_of(INCREASING, uniforms[40:50], (224, 160))
    for name in whole:
        np.testing.assert_array_equal(whole[name][40:50], part[name])


def test_parse_policy_names_what_is_near():
    assert policies.parse_policy("none") is None
    with pytest.raises(
        ValueError, match=r"Unknown augmentation 'orignal'. Did you mean 'original'\? Known: rand, "
    ):
        policies.parse_policy("orignal")
    with pytest.raises(
        ValueError, match=r"Unknown setting 'w3' of augmentation 'rand-w3'. Known: m, n, p, mstd"
    ):
        policies.parse_policy("rand-w3")
    for name in ("rand-n101", "rand-n1.5", "rand-n" + "9" * 400, "rand-p2"):
        with pytest.raises(
            ValueError, match=f"a whole n up to 100 and p up to 1, received augmentation '{name}'"
        ):
            policies.parse_policy(name)
    with pytest.raises(ValueError, match=r"Unknown setting 'mx' of augmentation 'rand-mx'"):
        policies.parse_policy("rand-mx")
    with pytest.raises(
        ValueError, match=r"Unknown setting 'm9' of augmentation 'ta_wide-m9'. It takes none."
    ):
        policies.parse_policy("ta_wide-m9")


# Colour jitter


def test_jitter_equals_torchvision():
    strength, pixels = 0.4, IMAGES["wide"]
    uniforms = np.random.default_rng(4).random((24, policies.NUM_JITTER_UNIFORMS))
    plan = {name: value.numpy() for name, value in policies.plan_jitter(uniforms, strength).items()}
    functions = [
        tv_functional.adjust_brightness,
        tv_functional.adjust_contrast,
        tv_functional.adjust_saturation,
        lambda image, factor: image,  # the place of the hue
    ]
    for row, values in enumerate(uniforms):
        expected = Image.fromarray(pixels)
        for number in np.argsort(values[:4]):
            factor = 1 + strength * (2 * values[4 + number] - 1)
            expected = functions[number](expected, factor)
        ours = policies.apply_jitter(tf.constant(pixels), {name: value[row] for name, value in plan.items()})
        np.testing.assert_array_equal(ours, expected)
    assert len({tuple(row) for row in plan["operation"]}) > 10  # of 24 orders


def test_jitter_of_one_strength_is_timms_and_leaves_the_hue():
    uniforms = np.random.default_rng(5).random((10_000, policies.NUM_JITTER_UNIFORMS))
    plan = policies.plan_jitter(uniforms, 0.4)
    operation, argument = plan["operation"].numpy(), plan["argument"].numpy()
    for name in ("brightness", "contrast", "color"):
        factors = argument[operation == policies.OPERATIONS.index(name)]
        assert len(factors) == 10_000
        assert stats.kstest(factors, stats.uniform(0.6, 0.8).cdf).pvalue > 0.01
    places = (operation == 0).sum(0)
    assert places.sum() == 10_000 and stats.chisquare(places).pvalue > 0.01


# Random erasing


MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
SIZE = (96, 64)


def timm_boxes(count, **settings):
    """Boxes of timm's RandomErasing, (top, left, height, width), 0 where nothing is erased."""
    erasing = timm_erasing.RandomErasing(mode="pixel", device="cpu", **settings)
    boxes = np.zeros((count, 4), int)
    with mock.patch.object(timm_erasing, "_get_pixels", lambda *_, **__: 1.0):
        for box in boxes:
            erased = erasing(torch.zeros(1, *SIZE))[0].numpy().nonzero()
            if len(erased[0]):
                top, left = erased[0][0], erased[1][0]
                box[:] = top, left, erased[0][-1] + 1 - top, erased[1].max() + 1 - left
    return boxes


def our_boxes(count, *settings):
    uniforms = np.random.default_rng(6).random((count, erase_and_mix.NUM_ERASE_UNIFORMS))
    return erase_and_mix.plan_erase(tf.constant(uniforms), *settings).numpy()


def p_value_of_boxes(first, second):
    whether = [[np.sum(boxes[:, 2] > 0), np.sum(boxes[:, 2] == 0)] for boxes in (first, second)]
    first, second = (boxes[boxes[:, 2] > 0] for boxes in (first, second))
    tests = [stats.ks_2samp(first[:, column], second[:, column]).pvalue for column in range(4)]
    return min(*tests, stats.chi2_contingency(whether).pvalue)


def test_erased_boxes_are_distributed_as_timms():
    timm_erasing.random.seed(0)
    theirs = timm_boxes(4000, probability=0.6)
    assert p_value_of_boxes(theirs, our_boxes(4000, 0.6, SIZE)) > 0.01
    for settings in (
        (0.5, SIZE),
        (0.6, SIZE, (0.02, 0.4)),
        (0.6, SIZE, (0.02, 1 / 3), (0.6, 1.6)),
        (0.6, SIZE[::-1]),
    ):
        assert p_value_of_boxes(theirs, our_boxes(4000, *settings)) < 1e-3


def test_boxes_that_do_not_fit_are_tried_again():
    theirs, ours = (
        timm_boxes(2000, probability=1.0, min_area=0.8, max_area=1.5),
        our_boxes(2000, 1.0, SIZE, (0.8, 1.5)),
    )
    assert 0.02 < np.mean(ours[:, 2] == 0) < 0.9  # ten attempts fail now and then
    assert p_value_of_boxes(theirs, ours) > 0.01
    assert (ours[:, 2] < SIZE[0]).all() and (ours[:, 3] < SIZE[1]).all()
    assert (ours[:, :2] + ours[:, 2:] <= SIZE).all() and (ours >= 0).all()


@pytest.mark.parametrize("dtype", [np.uint8, np.float32])
def test_erase_paints_the_box_alone(dtype):
    pixels = IMAGES["square"].astype(dtype)
    top, left, height, width = box = (20, 31, 150, 170)

    def erase(image, seed, box=box):
        return erase_and_mix.apply_erase(image, tf.constant(box), seed, MEAN, STD)

    erased = erase(tf.constant(pixels), (7, tf.constant(11, tf.int64))).numpy()
    inside = np.zeros(pixels.shape[:2], bool)
    inside[top : top + height, left : left + width] = True
    np.testing.assert_array_equal(erased[~inside], pixels[~inside])
    patch = erased[inside]
    if dtype == np.float32:
        noise = (patch / 255 - MEAN) / STD
        assert stats.kstest(noise.ravel(), "norm").pvalue > 0.01
        assert abs(np.corrcoef(noise.T)[np.triu_indices(3, 1)]).max() < 0.03
        assert patch.min() < 0 and patch.max() > 255  # as timm, which does not clip
        rounded = erase(tf.constant(IMAGES["square"]), (7, 11)).numpy()[inside]
        np.testing.assert_array_equal(rounded, np.clip(np.rint(patch), 0, 255))
    traced = tf.function(erase)
    np.testing.assert_array_equal(traced(pixels, tf.constant([7, 11])), erased)
    np.testing.assert_array_equal(erase(tf.constant(pixels), (7, 11), (0, 0, 0, 0)), pixels)
    assert (traced(pixels, tf.constant([7, 12])).numpy()[inside] != patch).any()


# Mixup and CutMix


def mix_plan(lam, *boxes):
    boxes = boxes or [(0, 0, 0, 0)] * len(lam)
    return {"lam": tf.constant(lam, tf.float64), "box": tf.constant(boxes)}


def timm_mix(images, labels, lam, box, smoothing, kind=timm_mixup.Mixup):
    """timm's mixing with lambda and, for CutMix, the box given."""
    mixup = kind(label_smoothing=smoothing, num_classes=10)
    top, left, height, width = box
    mixup._params_per_batch = lambda: (lam, height > 0)
    images = torch.tensor(images.transpose(0, 3, 1, 2).copy())
    corners = top, top + height, left, left + width
    with mock.patch.object(timm_mixup, "rand_bbox", lambda *_, **__: corners):
        if kind is timm_mixup.Mixup:
            mixed, targets = mixup(images, torch.tensor(labels))
        else:
            mixed, targets = mixup(list(zip(images, labels, strict=True)))
    return mixed.numpy().transpose(0, 2, 3, 1), targets.numpy()


BATCH = np.random.default_rng(7).integers(0, 256, (8, 12, 20, 3), dtype=np.uint8)
LABELS = np.array([3, 1, 4, 1, 5, 9, 2, 6])
NO_BOX = (0, 0, 0, 0)
BOX = (2, 5, 7, 9)
BOX_LAM = 1 - 7 * 9 / (12 * 20)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize(
    ("lam", "box"), [(0.3, NO_BOX), (0.8123456789, NO_BOX), (0.0, NO_BOX), (1.0, NO_BOX), (BOX_LAM, BOX)]
)
def test_mix_equals_timm(lam, box, smoothing):
    images = BATCH.astype(np.float32) * np.float32(1.01)
    expected, expected_targets = timm_mix(images, LABELS, lam, box, smoothing)
    for function in (erase_and_mix.mix, tf.function(erase_and_mix.mix)):
        mixed, targets = function(
            tf.constant(images), tf.constant(LABELS), mix_plan([lam], box), 10, smoothing
        )
        np.testing.assert_array_equal(mixed, expected)
        np.testing.assert_array_equal(targets, expected_targets)
    _, other = erase_and_mix.mix(images, LABELS, mix_plan([lam], box), 10, smoothing + 1e-6)
    assert (other.numpy() != expected_targets).any()


@pytest.mark.parametrize(("lam", "box"), [(0.3, NO_BOX), (0.8123456789, NO_BOX), (BOX_LAM, BOX)])
def test_mix_of_uint8_equals_timms_collation(lam, box):
    expected, expected_targets = timm_mix(BATCH, LABELS, lam, box, 0.1, timm_mixup.FastCollateMixup)
    mixed, targets = erase_and_mix.mix(tf.constant(BATCH), LABELS, mix_plan([lam], box), 10, 0.1)
    assert mixed.dtype == tf.uint8
    np.testing.assert_array_equal(mixed, expected)
    np.testing.assert_array_equal(targets, expected_targets)


def test_groups_mix_by_themselves():
    plan = mix_plan([0.3, BOX_LAM, 1.0, 0.6], NO_BOX, BOX, NO_BOX, NO_BOX)
    images, targets = erase_and_mix.mix(tf.constant(BATCH), tf.constant(LABELS), plan, 10, 0.1)
    for group in range(4):
        part = slice(2 * group, 2 * group + 2)
        alone = {name: value[group : group + 1] for name, value in plan.items()}
        expected = erase_and_mix.mix(tf.constant(BATCH[part]), tf.constant(LABELS[part]), alone, 10, 0.1)
        np.testing.assert_array_equal(images[part], expected[0])
        np.testing.assert_array_equal(targets[part], expected[1])


def test_without_a_plan_targets_are_smoothed_labels():
    images, targets = erase_and_mix.mix(tf.constant(BATCH), tf.constant(LABELS), None, 10, 0.1)
    np.testing.assert_array_equal(images, BATCH)
    expected = timm_mixup.one_hot(torch.tensor(LABELS), 10, 0.91, 0.01)
    np.testing.assert_array_equal(targets, expected)


def timm_mix_draws(count, *settings):
    """lambda, whether CutMix, and the box of `count` batches of timm's Mixup, images of SIZE."""
    mixup = timm_mixup.Mixup(*settings[:2], prob=settings[2], switch_prob=settings[3])
    draws = np.zeros((count, 6))
    for draw in draws:
        lam, use_cutmix = mixup._params_per_batch()
        box = (0, 0, 0, 0)
        if use_cutmix:
            box, lam = timm_mixup.cutmix_bbox_and_lam((3, *SIZE), lam)
        draw[:] = lam, use_cutmix, *box
    return draws


def our_mix_draws(count, *settings, seed=(8, 0)):
    plan = erase_and_mix.plan_mix(seed, count, SIZE, *settings)
    lam, (top, left, height, width) = plan["lam"].numpy(), plan["box"].numpy().T
    return np.stack([lam, height > 0, top, top + height, left, left + width], 1)


def p_value_of_mixes(first, second):
    tests = [
        stats.chi2_contingency(
            [[draws[:, 1].sum(), len(draws) - draws[:, 1].sum()] for draws in (first, second)]
        ).pvalue
    ]
    for use_cutmix in (0, 1):
        parts = [draws[(draws[:, 1] == use_cutmix) & (draws[:, 0] < 1)] for draws in (first, second)]
        tests += [
            stats.ks_2samp(parts[0][:, column], parts[1][:, column]).pvalue for column in (0, 2, 3, 4, 5)
        ]
        tests.append(
            stats.chi2_contingency(
                [
                    [len(part), len(draws) - len(part)]
                    for part, draws in zip(parts, (first, second), strict=True)
                ]
            ).pvalue
        )
    return min(tests)


def test_mixing_is_distributed_as_timms():
    np.random.seed(0)
    theirs = timm_mix_draws(10_000, 0.8, 1.0, 0.9, 0.5)
    theirs = theirs[(theirs[:, 1] == 0) | (theirs[:, 0] < 1)]  # timm counts a box of no pixels as CutMix
    assert p_value_of_mixes(theirs, our_mix_draws(len(theirs), 0.8, 1.0, 0.9, 0.5)) > 0.005
    for settings in ((0.6, 1.0, 0.9, 0.5), (0.8, 0.5, 0.9, 0.5), (0.8, 1.0, 0.95, 0.5), (0.8, 1.0, 0.9, 0.6)):
        assert p_value_of_mixes(theirs, our_mix_draws(len(theirs), *settings)) < 1e-4


@pytest.mark.parametrize("alpha", [0.2, 0.8, 1.0, 4.0])
def test_lambda_is_beta_distributed(alpha):
    lam = erase_and_mix.plan_mix((1, 2), 20_000, SIZE, alpha, 0.0)["lam"].numpy()
    assert np.isfinite(lam).all() and stats.kstest(lam, stats.beta(alpha, alpha).cdf).pvalue > 0.01
    assert stats.kstest(lam, stats.beta(1.2 * alpha, 1.2 * alpha).cdf).pvalue < 1e-4


def test_cutmix_alone_and_mixup_alone():
    cutmix, mixup = our_mix_draws(2000, 0.0, 1.0), our_mix_draws(2000, 0.8, 0.0)
    assert np.mean(cutmix[:, 1]) > 0.98 and not mixup[:, 1].any()
    area = (cutmix[:, 3] - cutmix[:, 2]) * (cutmix[:, 5] - cutmix[:, 4])
    np.testing.assert_array_equal(cutmix[:, 0], 1 - area / (SIZE[0] * SIZE[1]))
    assert (cutmix[:, 2:] >= 0).all() and cutmix[:, 3].max() == SIZE[0] and cutmix[:, 5].max() == SIZE[1]


def test_mix_plans_depend_on_their_seed_alone():
    first, again, other = (our_mix_draws(50, 0.8, 1.0, seed=seed) for seed in ((1, 2), (1, 2), (1, 3)))
    np.testing.assert_array_equal(first, again)
    assert (first[:, 0] != other[:, 0]).all()
