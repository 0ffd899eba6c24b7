"""Recipes: every published one literally as published, every mistake in a file named, and round trips."""

import hashlib
import importlib
import json
import os
import pathlib
import re
import time
import tomllib

import pydantic
import pytest

from keras_convnext._settings import toml_value
from keras_convnext.data import train_transform
from keras_convnext.training.advice import warnings_for
from keras_convnext.training.recipes.classification import Distribution, Recipe
from keras_convnext.training.recipes.files import identity, known_recipes, load_recipe
from keras_convnext.training.recipes.segmentation import SegmentationRecipe
from keras_convnext.weights.catalog import find_checkpoint

pytestmark = pytest.mark.once

PRETRAINED_SIZES = ("atto", "femto", "pico", "nano", "tiny", "base", "large", "huge")
FOLDER = pathlib.Path(__file__).parents[3] / "recipes"
OF_MASKS = {"fine_tune_segmentation", "camvid"}
OTHER_TASKS = {*OF_MASKS, "pretrain"}
OURS = {"fine_tune", "tiny_imagenet", "tiny_imagenet_64", "smoke", *OTHER_TASKS}
PRETRAINED = {f"pretrain_fcmae_convnextv2_{size}" for size in PRETRAINED_SIZES}
OF_FEATURES = {"knn", "linear_probe"}

# fmt: off
# facebookresearch/ConvNeXt at 048efce, semantic_segmentation/configs/convnext, and BEiT's base files.
SEGMENTATION_COLUMNS = ("architecture", "weights", "learning_rate", "drop_path_rate", "crop_size",
                        "base_size", "precision", "eval_image_size")
_ADE20K = "ade20k_upernet_convnext_"
_512, _640 = ((512, 512), (2048, 512)), ((640, 640), (2560, 640))
SEGMENTATION = {
    f"{_ADE20K}tiny":
        ("convnext_tiny", "convnext_tiny.fb_in1k", 1e-4, 0.4, *_512, "mixed_float16", 512),
    f"{_ADE20K}small":
        ("convnext_small", "convnext_small.fb_in1k", 1e-4, 0.3, *_512, "mixed_float16", 512),
    f"{_ADE20K}base":
        ("convnext_base", "convnext_base.fb_in1k", 1e-4, 0.4, *_512, "mixed_float16", 512),
    f"{_ADE20K}base_640":
        ("convnext_base", "convnext_base.fb_in22k", 1e-4, 0.4, *_640, "mixed_float16", 640),
    f"{_ADE20K}large":
        ("convnext_large", "convnext_large.fb_in22k", 1e-4, 0.4, *_640, "float32", 640),
    f"{_ADE20K}xlarge":
        ("convnext_xlarge", "convnext_xlarge.fb_in22k", 8e-5, 0.4, *_640, "float32", 640),
}
# What all six share, by short key.
OF_ADE20K = {
    "steps": 160_000, "batch_size": 16, "warmup_steps": 1500, "weight_decay": 0.05,
    "beta_1": 0.9, "beta_2": 0.999, "min_learning_rate": 0.0, "clip_norm": 0.0, "layer_decay": 0.9,
    "layer_decay_groups": "stage_wise",
    "ema_decay": 0.0, "channels": 512, "auxiliary_weight": 0.4, "loss_mean": "all", "ignored_values": (0,),
    "scale": (0.5, 2.0), "max_class_share": 0.75, "flip": 0.5, "photometric": 0.5, "eval_mode": "slide",
}
# Liu et al. 2022, tables 5 and 6 and A.1; Woo et al. 2023, tables 9 to 13; the commands of both TRAINING.md;
# pytorch/vision pull request 5197. The learning rate is absolute: in V2's tables it is per 256 images.
COLUMNS = ("epochs", "batch_size", "learning_rate", "weight_decay", "warmup_epochs", "drop_path_rate",
           "layer_decay", "layer_decay_groups", "mixup", "cutmix", "label_smoothing", "ema_decay",
           "head_init_scale", "layer_scale_init_value", "image_size")
PUBLISHED = {
    "imagenet1k_convnext_tiny":
        (300, 4096, 4e-3, 0.05, 20, 0.1, 1, "group", 0.8, 1, 0.1, 0.9999, 1, 1e-6, 224),
    "imagenet1k_convnext_small":
        (300, 4096, 4e-3, 0.05, 20, 0.4, 1, "group", 0.8, 1, 0.1, 0.9999, 1, 1e-6, 224),
    "imagenet1k_convnext_base":
        (300, 4096, 4e-3, 0.05, 20, 0.5, 1, "group", 0.8, 1, 0.1, 0.9999, 1, 1e-6, 224),
    "imagenet1k_convnext_large":
        (300, 4096, 4e-3, 0.05, 20, 0.5, 1, "group", 0.8, 1, 0.1, 0.9999, 1, 1e-6, 224),
    "imagenet1k_isotropic_small":
        (300, 4096, 4e-3, 0.05, 50, 0.1, 1, "group", 0.8, 1, 0.1, 0.9999, 1, 0, 224),
    "imagenet1k_isotropic_base":
        (300, 4096, 4e-3, 0.05, 50, 0.2, 1, "group", 0.8, 1, 0.1, 0.9999, 1, 0, 224),
    "imagenet1k_isotropic_large":
        (300, 4096, 4e-3, 0.05, 50, 0.5, 1, "group", 0.8, 1, 0.1, 0.9999, 1, 1e-6, 224),
    "imagenet22k_convnext_tiny":
        (90, 4096, 4e-3, 0.05, 5, 0.0, 1, "group", 0.8, 1, 0.1, 0, 1, 1e-6, 224),
    "imagenet22k_convnext_small":
        (90, 4096, 4e-3, 0.05, 5, 0.0, 1, "group", 0.8, 1, 0.1, 0, 1, 1e-6, 224),
    "imagenet22k_convnext_base":
        (90, 4096, 4e-3, 0.05, 5, 0.1, 1, "group", 0.8, 1, 0.1, 0, 1, 1e-6, 224),
    "imagenet22k_convnext_large":
        (90, 4096, 4e-3, 0.05, 5, 0.1, 1, "group", 0.8, 1, 0.1, 0, 1, 1e-6, 224),
    "imagenet22k_convnext_xlarge":
        (90, 4096, 4e-3, 0.05, 5, 0.2, 1, "group", 0.8, 1, 0.1, 0, 1, 1e-6, 224),
    "imagenet1k_ft_384_convnext_base":
        (30, 512, 5e-5, 1e-8, 0, 0.8, 0.7, "group", 0, 0, 0.1, 0, 1e-3, 1e-6, 384),
    "imagenet1k_ft_384_convnext_large":
        (30, 512, 5e-5, 1e-8, 0, 0.95, 0.7, "group", 0, 0, 0.1, 0, 1e-3, 1e-6, 384),
    "imagenet22k_ft_1k_224_convnext_tiny":
        (30, 512, 5e-5, 1e-8, 0, 0.0, 0.8, "group", 0, 0, 0.1, 0, 1e-3, 1e-6, 224),
    "imagenet22k_ft_1k_224_convnext_small":
        (30, 512, 5e-5, 1e-8, 0, 0.1, 0.8, "group", 0, 0, 0.1, 0, 1e-3, 1e-6, 224),
    "imagenet22k_ft_1k_224_convnext_base":
        (30, 512, 5e-5, 1e-8, 0, 0.2, 0.8, "group", 0, 0, 0.1, 0, 1e-3, 1e-6, 224),
    "imagenet22k_ft_1k_224_convnext_large":
        (30, 512, 5e-5, 1e-8, 0, 0.3, 0.8, "group", 0, 0, 0.1, 0, 1e-3, 1e-6, 224),
    "imagenet22k_ft_1k_224_convnext_xlarge":
        (30, 512, 5e-5, 1e-8, 0, 0.4, 0.8, "group", 0, 0, 0.1, 0.9999, 1e-3, 1e-6, 224),
    "imagenet22k_ft_1k_384_convnext_tiny":
        (30, 512, 5e-5, 1e-8, 0, 0.0, 0.8, "group", 0, 0, 0.1, 0, 1e-3, 1e-6, 384),
    "imagenet22k_ft_1k_384_convnext_small":
        (30, 512, 5e-5, 1e-8, 0, 0.1, 0.8, "group", 0, 0, 0.1, 0, 1e-3, 1e-6, 384),
    "imagenet22k_ft_1k_384_convnext_base":
        (30, 512, 5e-5, 1e-8, 0, 0.2, 0.8, "group", 0, 0, 0.1, 0, 1e-3, 1e-6, 384),
    "imagenet22k_ft_1k_384_convnext_large":
        (30, 512, 5e-5, 1e-8, 0, 0.3, 0.8, "group", 0, 0, 0.1, 0, 1e-3, 1e-6, 384),
    "imagenet22k_ft_1k_384_convnext_xlarge":
        (30, 512, 5e-5, 1e-8, 0, 0.4, 0.8, "group", 0, 0, 0.1, 0.9999, 1e-3, 1e-6, 384),
    "imagenet1k_torchvision_tiny":
        (600, 1024, 1e-3, 0.05, 5, 0.1, 1, "group", 0.2, 1, 0.1, 0.999966, 1, 1e-6, 176),
    "imagenet1k_torchvision_small":
        (600, 1024, 1e-3, 0.05, 5, 0.4, 1, "group", 0.2, 1, 0.1, 0.999966, 1, 1e-6, 176),
    "imagenet1k_torchvision_base":
        (600, 1024, 1e-3, 0.05, 5, 0.5, 1, "group", 0.2, 1, 0.1, 0.999966, 1, 1e-6, 176),
    "imagenet1k_torchvision_large":
        (600, 1024, 1e-3, 0.05, 5, 0.5, 1, "group", 0.2, 1, 0.1, 0.999966, 1, 1e-6, 176),
    "imagenet1k_fcmae_ft_convnextv2_atto":
        (600, 1024, 8e-4, 0.3, 0, 0.1, 0.9, "single", 0, 0, 0.2, 0.9999, 1e-3, 0, 224),
    "imagenet1k_fcmae_ft_convnextv2_femto":
        (600, 1024, 8e-4, 0.05, 0, 0.0, 0.9, "single", 0.3, 0.3, 0.2, 0.9999, 1e-3, 0, 224),
    "imagenet1k_fcmae_ft_convnextv2_pico":
        (600, 1024, 8e-4, 0.3, 0, 0.0, 0.9, "single", 0.3, 0.3, 0.2, 0.9999, 1e-3, 0, 224),
    "imagenet1k_fcmae_ft_convnextv2_nano":
        (600, 1024, 8e-4, 0.3, 0, 0.1, 0.9, "single", 0.5, 0.5, 0.2, 0.9999, 1e-3, 0, 224),
    "imagenet1k_fcmae_ft_convnextv2_tiny":
        (300, 1024, 3.2e-3, 0.05, 40, 0.2, 0.9, "single", 0.8, 1, 0.1, 0.9999, 1e-3, 0, 224),
    "imagenet1k_fcmae_ft_convnextv2_base":
        (100, 1024, 2.5e-3, 0.05, 20, 0.1, 0.6, "group", 0.8, 1, 0.1, 0.9999, 1e-3, 0, 224),
    "imagenet1k_fcmae_ft_convnextv2_large":
        (100, 1024, 2.5e-3, 0.05, 20, 0.2, 0.6, "group", 0.8, 1, 0.1, 0.9999, 1e-3, 0, 224),
    "imagenet1k_fcmae_ft_convnextv2_huge":
        (50, 1024, 5e-3, 0.05, 10, 0.3, 0.75, "single", 0.8, 1, 0.1, 0.9999, 1e-3, 0, 224),
    "imagenet22k_fcmae_ft_convnextv2_nano":
        (90, 4096, 4e-3, 0.05, 5, 0.0, 0.9, "single", 0.8, 1, 0.1, 0, 1e-3, 0, 224),
    "imagenet22k_fcmae_ft_convnextv2_tiny":
        (90, 4096, 4e-3, 0.05, 5, 0.0, 0.9, "single", 0.8, 1, 0.1, 0, 1e-3, 0, 224),
    "imagenet22k_fcmae_ft_convnextv2_base":
        (90, 4096, 4e-3, 0.05, 5, 0.1, 0.8, "group", 0.8, 1, 0.1, 0, 1e-3, 0, 224),
    "imagenet22k_fcmae_ft_convnextv2_large":
        (90, 4096, 4e-3, 0.05, 5, 0.1, 0.8, "group", 0.8, 1, 0.1, 0, 1e-3, 0, 224),
    "imagenet22k_fcmae_ft_convnextv2_huge":
        (90, 4096, 4e-3, 0.05, 5, 0.3, 0.8, "single", 0.8, 1, 0.1, 0, 1e-3, 0, 224),
    "imagenet22k_ft_1k_224_convnextv2_nano":
        (90, 512, 5e-5, 1e-8, 0, 0.1, 0.9, "single", 0, 0, 0.1, 0.9999, 1e-3, 0, 224),
    "imagenet22k_ft_1k_384_convnextv2_nano":
        (90, 512, 5e-5, 1e-8, 0, 0.1, 0.9, "single", 0, 0, 0.1, 0.9999, 1e-3, 0, 384),
    "imagenet22k_ft_1k_224_convnextv2_tiny":
        (90, 512, 5e-5, 1e-8, 0, 0.1, 0.9, "single", 0, 0, 0.1, 0.9999, 1e-3, 0, 224),
    "imagenet22k_ft_1k_384_convnextv2_tiny":
        (90, 512, 5e-5, 1e-8, 0, 0.1, 0.9, "single", 0, 0, 0.1, 0.9999, 1e-3, 0, 384),
    "imagenet22k_ft_1k_224_convnextv2_base":
        (30, 512, 5e-5, 1e-8, 0, 0.2, 0.8, "group", 0, 0, 0.1, 0.9999, 1e-3, 0, 224),
    "imagenet22k_ft_1k_384_convnextv2_base":
        (30, 512, 5e-5, 1e-8, 0, 0.2, 0.8, "group", 0, 0, 0.1, 0.9999, 1e-3, 0, 384),
    "imagenet22k_ft_1k_224_convnextv2_large":
        (30, 512, 5e-5, 1e-8, 0, 0.3, 0.8, "group", 0, 0, 0.1, 0.9999, 1e-3, 0, 224),
    "imagenet22k_ft_1k_384_convnextv2_large":
        (30, 512, 5e-5, 1e-8, 0, 0.3, 0.8, "group", 0, 0, 0.1, 0.9999, 1e-3, 0, 384),
    "imagenet22k_ft_1k_384_convnextv2_huge":
        (30, 512, 5e-5, 1e-8, 0, 0.5, 0.85, "single", 0, 0, 0.1, 0, 1e-3, 0, 384),
    "imagenet22k_ft_1k_512_convnextv2_huge":
        (30, 512, 5e-5, 1e-8, 0, 0.5, 0.85, "single", 0, 0, 0.1, 0, 1e-3, 0, 512),
}
# fmt: on

# What the papers vary with the size of the model; micro-batches follow the memory of their GPUs.
_ALWAYS = {"title", "architecture", "accumulation_steps"}
FAMILIES = {
    "imagenet1k_convnext_": _ALWAYS | {"drop_path_rate"},
    "imagenet1k_isotropic_": _ALWAYS | {"drop_path_rate", "layer_scale_init_value"},
    "imagenet22k_convnext_": _ALWAYS | {"drop_path_rate"},
    "imagenet1k_ft_384_convnext_": _ALWAYS | {"drop_path_rate", "weights"},
    "imagenet22k_ft_1k_224_convnext_": _ALWAYS | {"drop_path_rate", "weights", "ema_decay"},
    "imagenet22k_ft_1k_384_convnext_": _ALWAYS | {"drop_path_rate", "weights", "ema_decay"},
    "imagenet1k_torchvision_": _ALWAYS | {"drop_path_rate", "eval_resize_size", "eval_crop"},
    "imagenet22k_fcmae_ft_convnextv2_": _ALWAYS
    | {"drop_path_rate", "weights", "layer_decay", "layer_decay_groups"},
}


@pytest.fixture(scope="module")
def published():
    return {name: load_recipe(name) for name in PUBLISHED}


@pytest.fixture(scope="module")
def smoke():
    return load_recipe("smoke")


@pytest.fixture
def write(tmp_path, smoke):
    """Writes smoke.toml as a flat file, with lines replaced, removed (None) or added; returns the path."""

    def write_file(name="mine.toml", **changes):
        values = smoke.by_short_key()
        values["data"] = values.pop("source")
        lines = {key: toml_value(value) for key, value in values.items()}
        lines |= {"engine": None, "model_devices": None} | changes
        path = tmp_path / name
        path.write_text("".join(f"{key} = {text}\n" for key, text in lines.items() if text is not None))
        return path

    return write_file


# The published recipes.


def test_the_folder_holds_the_published_runs_and_ours_and_nothing_else():
    assert set(known_recipes()) == {*PUBLISHED, *SEGMENTATION, *PRETRAINED, *OURS, *OF_FEATURES}
    assert known_recipes() == sorted(path.stem for path in FOLDER.glob("*.toml"))


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_values_are_the_published_ones(published, name):
    found = {column: published[name].by_short_key()[column] for column in COLUMNS}
    assert found == dict(zip(COLUMNS, PUBLISHED[name], strict=True))


@pytest.mark.parametrize("name", SEGMENTATION)
def test_published_segmentation_is_as_published(name):
    recipe = load_recipe(name)
    values = recipe.by_short_key()
    assert tuple(values[column] for column in SEGMENTATION_COLUMNS) == SEGMENTATION[name]
    assert {key: values[key] for key in OF_ADE20K} == OF_ADE20K
    assert values["warmup_learning_rate"] == pytest.approx(1e-6 * values["learning_rate"])
    assert find_checkpoint(values["weights"]).architecture == values["architecture"]


def test_a_recipe_of_segmentation_is_read_by_its_task(tmp_path):
    recipe = load_recipe("camvid", {"steps": "300", "ignored_values": "11,255", "crop_size": "64, 96"})
    assert isinstance(recipe, SegmentationRecipe) and recipe.optimizer.steps == 300
    assert recipe.data.ignored_values == (11, 255) and recipe.model.crop_size == (64, 96)
    path = tmp_path / "mine.toml"
    path.write_text(recipe.to_toml())
    assert load_recipe(path) == recipe
    assert identity(recipe)["steps"] == 300 and identity(recipe)["crop_size"] == [64, 96]
    path.write_text(recipe.to_toml().replace('"segmentation"', '"detection"'))
    with pytest.raises(
        ValueError,
        match=r"Expected task to be one of classification, segmentation, pretraining, received 'det",
    ):
        load_recipe(path)
    path.write_text('task = "classification"\n' + load_recipe("smoke").to_toml().replace("task = ", "# "))
    assert load_recipe(path).task == "classification"


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"evaluations": 7}, "evaluations: expected a divisor of steps 1500, received 7"),
        ({"warmup_steps": 2000}, "warmup_steps: expected at most steps 1500, received 2000"),
        ({"architecture": "convnext_isotropic_small"}, "architecture: expected one of"),
        ({"ignored_values": (11, 11)}, "ignored_values: expected different values from 0 to 65535"),
        ({"layer_scale_init_value": 1.0}, "layer_scale_init_value: expected 0 for convnextv2_atto"),
        ({"loss_mean": "labeled"}, "loss_mean: expected one of all, labelled (did you mean 'labelled'?)"),
        ({"channels": 1}, "channels: expected an integer of at least 2"),
        ({"weights": "convnextv2_atto.none"}, "weights: expected a tag"),
    ],
)
def test_a_mistake_in_segmentation_is_named(changes, expected):
    with pytest.raises(ValueError, match=re.escape(expected)):
        load_recipe("camvid").replaced(changes)


def test_the_table_above_would_notice_another_value(published):
    changed = published["imagenet1k_fcmae_ft_convnextv2_base"].replaced({"learning_rate": 2.5e-2})
    expected = PUBLISHED["imagenet1k_fcmae_ft_convnextv2_base"]
    assert tuple(changed.by_short_key()[column] for column in COLUMNS) != expected


def test_what_the_papers_share_is_the_same_everywhere(published):
    for name, recipe in published.items():
        optimizer, augmentation, evaluation = recipe.optimizer, recipe.augmentation, recipe.evaluation
        assert (optimizer.beta_1, optimizer.beta_2, optimizer.epsilon) == (0.9, 0.999, 1e-8), name
        assert optimizer.clip_norm == augmentation.color_jitter == 0, name
        assert (augmentation.mix_probability, augmentation.switch_probability) == (1, 0.5), name
        assert augmentation.flip == 0.5 and augmentation.crop_scale == (0.08, 1.0), name
        assert augmentation.crop_ratio == (3 / 4, 4 / 3), name
        assert recipe.model.trainable == "all" and not recipe.distillation.teacher, name
        mixed = augmentation.policy, augmentation.erase, augmentation.repeats
        rate = optimizer.schedule_unit, optimizer.min_learning_rate
        filters = {augmentation.interpolation, evaluation.eval_interpolation}
        if "torchvision" in name:
            assert (mixed, rate) == (("ta_wide", 0.1, 4), ("epoch", 0)) and filters == {"bilinear"}, name
        else:
            assert (mixed, rate) == (("rand-m9-mstd0.5-inc1", 0.25, 1), ("step", 1e-6)), name
            assert filters == {"bicubic"}, name


def test_v1_warms_up_to_the_peak_and_v2_and_torchvision_to_the_step_before_it(published):
    for name, recipe in published.items():
        chosen = recipe.optimizer
        if chosen.warmup_epochs:
            assert chosen.warmup_includes_peak == ("convnextv2" not in name and "torchvision" not in name)
            assert chosen.warmup_learning_rate == (1e-5 if "torchvision" in name else 0), name


def test_from_384_pixels_on_evaluation_squashes_without_crop(published):
    for name, recipe in published.items():
        chosen = recipe.evaluation
        found = chosen.eval_image_size, chosen.eval_resize_mode, chosen.eval_crop
        if recipe.model.image_size >= 384:
            assert found == (recipe.model.image_size, "squash", 1.0), name
        elif "torchvision" not in name:
            assert found == (224, "shorter_side", 0.875), name


def test_torchvisions_evaluation_is_that_of_its_weights(published):
    for size in ("tiny", "small", "base", "large"):
        chosen = published[f"imagenet1k_torchvision_{size}"].evaluation
        row = find_checkpoint(f"convnext_{size}.torchvision_in1k")
        assert (chosen.eval_image_size, chosen.eval_resize_size) == (row.image_size, row.resize_size)
        assert chosen.eval_crop == pytest.approx(row.crop, abs=1e-4)


def test_torchvisions_ema_every_step_is_its_own_every_32_steps(published):
    every_32 = 1 - (1 - 0.99998) * 1024 * 32 / 600
    assert published["imagenet1k_torchvision_tiny"].optimizer.ema_decay == pytest.approx(
        every_32 ** (1 / 32), abs=1e-6
    )


@pytest.mark.parametrize("prefix", FAMILIES)
def test_sizes_of_one_run_differ_only_in_what_the_paper_says(published, prefix):
    family = [recipe for name, recipe in published.items() if name.startswith(prefix)]
    assert len(family) >= 2
    varied = {
        key for key in family[0].by_short_key() if len({recipe.by_short_key()[key] for recipe in family}) > 1
    }
    assert varied <= FAMILIES[prefix]
    assert {"title", "architecture", "drop_path_rate"} <= varied


def test_224_and_384_differ_only_in_size_and_evaluation(published):
    allowed = {"title", "image_size", "accumulation_steps"}
    allowed |= {"eval_image_size", "eval_crop", "eval_resize_mode"}
    for name in PUBLISHED:
        other = name.replace("_224_", "_384_")
        if other != name:
            before, after = published[name].by_short_key(), published[other].by_short_key()
            varied = {key for key in before if before[key] != after[key]}
            assert varied <= allowed and "image_size" in varied, name


def test_micro_batches_are_the_images_of_one_gpu(published):
    for name, images in {
        "imagenet1k_convnext_tiny": 128,
        "imagenet1k_convnext_large": 64,
        "imagenet22k_convnext_base": 32,
        "imagenet22k_ft_1k_384_convnext_xlarge": 8,
        "imagenet1k_fcmae_ft_convnextv2_base": 32,
        "imagenet1k_torchvision_tiny": 64,
    }.items():
        assert published[name].optimizer.batch_size // published[name].optimizer.accumulation_steps == images


def test_weights_are_tags_of_the_architecture_or_made_by_another_recipe(published):
    for name, recipe in {**published, "fine_tune": load_recipe("fine_tune")}.items():
        weights = recipe.model.weights
        if weights.endswith(".safetensors"):  # ImageNet-22k weights of V2, which were not published
            maker = load_recipe(weights.removesuffix(".safetensors"))
            assert maker.model.architecture == recipe.model.architecture
            assert "--set weights=FILE" in (FOLDER / f"{name}.toml").read_text()
        elif weights:
            row = find_checkpoint(weights)
            assert row.architecture == recipe.model.architecture and row.downloadable
    starts = {
        name: published[f"imagenet1k_ft_384_convnext_{name}"].model.weights for name in ("base", "large")
    }
    # A.2: the last weights, but for L the EMA
    assert starts == {"base": "convnext_base.official_in1k_raw", "large": "convnext_large.fb_in1k"}


@pytest.mark.parametrize("name", sorted({*PUBLISHED, *PRETRAINED, *OURS, *OF_FEATURES}))
def test_header_says_where_from_how_good_on_what_and_how(name):
    text = (FOLDER / f"{name}.toml").read_text()
    header = text.split("\n\n", 1)[0]
    command = {"knn": "knn", "linear_probe": "probe"}.get(name, "train")
    assert f"# command:   keras-convnext {command} {name} " in header
    assert "# hardware:  " in header
    assert name == "smoke" or "# published: " in header
    assert name in OURS or "# source:    " in header
    lines = [line for line in text.splitlines() if not line.startswith("# command:")]
    assert max(map(len, lines)) <= 110


def test_recipes_from_non_commercial_weights_say_so(published):
    said = 0
    for name, recipe in published.items():
        weights = recipe.model.weights
        tag = weights if weights and not weights.endswith(".safetensors") else None
        is_free = find_checkpoint(tag).commercial_use if tag else "convnextv2" not in name
        assert ("cc-by-nc-4.0" in (FOLDER / f"{name}.toml").read_text()) == (not is_free), name
        said += not is_free
    assert said == 23


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("imagenet1k_fcmae_ft_convnextv2_base", ("6.25e-3", "6.25e-4", "TRAINING.md", "Table 11")),
        ("imagenet1k_fcmae_ft_convnextv2_large", ("6.25e-3", "6.25e-4", "TRAINING.md", "Table 11")),
        ("imagenet1k_fcmae_ft_convnextv2_huge", ("1.25e-3", "1.25e-4", "Table 11")),
        ("imagenet1k_isotropic_small", ("78.7", "79.7", "README.md", "table 2")),
        ("imagenet1k_convnext_tiny", ("0.02", "0.2;", "models/convnext.py", "Table 5")),
        ("imagenet22k_ft_1k_224_convnext_tiny", ("main.py", "layer decay")),
    ],
)
def test_conflicts_between_paper_and_code_cite_both(name, values):
    header = (FOLDER / f"{name}.toml").read_text().split("\n\n", 1)[0]
    assert all(value in header for value in values)


def test_smoke_brings_its_data(smoke):
    assert smoke.model.weights == "" and smoke.data.source == str(FOLDER / "digits")
    assert pathlib.Path(smoke.data.source).is_dir()


@pytest.mark.parametrize(
    ("name", "module", "cls"),
    [("knn", "nearest_neighbours", "NearestNeighbours"), ("linear_probe", "linear_probe", "LinearProbe")],
)
def test_recipes_of_features_have_all_their_keys_and_the_defaults(name, module, cls):
    settings = getattr(importlib.import_module(f"keras_convnext.evaluation.{module}"), cls)
    read = settings.read(FOLDER / f"{name}.toml", {"data": "photos", "seed": "3"})
    assert read == settings(model="convnext_tiny.dinov3_lvd1689m", data="photos", seed=3)
    find_checkpoint(read.model)
    with pytest.raises(ValueError, match=r"evaluates frozen features. Pass it to `keras-convnext"):
        load_recipe(name)


# Reading.


def test_a_recipe_written_and_read_again_is_equal(published, smoke, tmp_path):
    for recipe in [*published.values(), smoke]:
        path = tmp_path / "recipe.toml"
        path.write_text(recipe.to_toml(), encoding="utf-8")
        assert load_recipe(path) == recipe


@pytest.mark.parametrize("text", ['a "quote"', "back\\slash", "two\nlines\tand a tab", "\x7f\x01", "Grün 🌱"])
def test_every_text_survives_the_round_trip(smoke, tmp_path, text):
    path = tmp_path / "recipe.toml"
    path.write_text(smoke.replaced({"title": text}).to_toml(), encoding="utf-8", newline="")
    assert load_recipe(path).title == text


def test_numbers_survive_the_round_trip_exactly(smoke):
    rates = (0.1 + 0.2, 1e-300, 4e-3, 1.0)
    for rate in rates:
        written = smoke.replaced({"weight_decay": rate}).to_toml()
        assert tomllib.loads(written)["optimizer"]["weight_decay"] == rate


def test_data_is_relative_to_the_file_and_an_override_to_the_working_directory(write, tmp_path, monkeypatch):
    path = write(data='"photos"')
    working = tmp_path / "elsewhere"
    working.mkdir()
    monkeypatch.chdir(working)
    assert load_recipe(path).data.source == str(tmp_path / "photos")
    assert load_recipe(path, {"data": "photos"}).data.source == str(working / "photos")
    assert load_recipe(path, {"data": ""}).data.source == ""
    assert load_recipe(path, {"data": "/photos"}).data.source == "/photos"


def test_weights_beside_the_recipe_are_found_and_tags_stay_tags(write, tmp_path):
    (tmp_path / "mine.safetensors").touch()
    assert load_recipe(write(weights='"mine.safetensors"')).model.weights == str(
        tmp_path / "mine.safetensors"
    )
    assert load_recipe(write(weights='"d2_in1k"')).model.weights == "d2_in1k"


@pytest.mark.parametrize(
    ("key", "text", "value"),
    [
        ("epochs", "3", 3),
        ("learning_rate", "1e-4", 1e-4),
        ("learning_rate", " 1 ", 1.0),
        ("rematerialize", "true", True),
        ("rematerialize", "False", False),
        ("crop_scale", "0.08,1", (0.08, 1.0)),
        ("crop_scale", "[0.08, 1]", (0.08, 1.0)),
        ("policy", "rand-m9", "rand-m9"),
        ("title", "3", "3"),
        ("epochs", 3, 3),
        ("crop_scale", [0.1, 1], (0.1, 1.0)),
    ],
)
def test_overrides_are_read_by_the_type_of_their_key(key, text, value):
    found = load_recipe("smoke", {key: text}).by_short_key()[key]
    assert found == value and type(found) is type(value)


def test_an_integer_stands_for_a_number_and_becomes_one(write):
    value = load_recipe(write(weight_decay="0", warmup_epochs="1")).optimizer.weight_decay
    assert value == 0.0 and type(value) is float


def test_a_recipe_cannot_be_changed(smoke):
    with pytest.raises(pydantic.ValidationError, match="frozen"):
        smoke.optimizer.epochs = 3


@pytest.mark.parametrize(
    ("changes", "problems"),
    [
        ({"epochs": None}, ["epochs: missing, expected an integer"]),
        ({"epoch": "3"}, ["epoch: unknown key, did you mean 'epochs'?"]),
        ({"zzz": "3"}, ["zzz: unknown key, remove it"]),
        ({"epochs": "true"}, ["epochs: expected an integer of at least 1, received true"]),
        ({"epochs": "3.0"}, ["epochs: expected an integer of at least 1, received 3.0"]),
        ({"flip": "true"}, ["flip: expected a number in [0, 1], received true"]),
        ({"learning_rate": "nan"}, ["learning_rate: expected a number above 0, received nan"]),
        ({"learning_rate": "inf"}, ["learning_rate: expected a number above 0, received inf"]),
        ({"learning_rate": '"1e-3"'}, ['learning_rate: expected a number above 0, received "1e-3"']),
        ({"rematerialize": "1"}, ["rematerialize: expected true or false, received 1"]),
        ({"policy": "9"}, ["policy: expected text in quotes, received 9"]),
        ({"crop_scale": "[0.5]"}, ["crop_scale: expected a list of 2, each a number, received [0.5]"]),
        ({"crop_scale": "[true, 1]"}, ["crop_scale: expected a list of 2", "received [true, 1]"]),
        ({"crop_scale": "0.5"}, ["crop_scale: expected a list of 2, each a number, received 0.5"]),
        ({"crop_scale": "[0, 1]"}, ["crop_scale: expected [smallest, largest], above 0 and at most 1"]),
        ({"crop_scale": "[1, 0.5]"}, ["crop_scale: expected [smallest, largest]"]),
        ({"crop_ratio": "[0, 2]"}, ["crop_ratio: expected [smallest, largest], above 0, received [0, 2]"]),
        ({"epochs": "0"}, ["epochs: expected an integer of at least 1, received 0"]),
        ({"learning_rate": "0.0"}, ["learning_rate: expected a number above 0, received 0.0"]),
        ({"drop_path_rate": "1.0"}, ["drop_path_rate: expected a number in [0, 1), received 1.0"]),
        ({"layer_decay": "0.0"}, ["layer_decay: expected a number in (0, 1], received 0.0"]),
        ({"ema_decay": "1.0"}, ["ema_decay: expected a number in [0, 1), received 1.0"]),
        ({"image_size": "16"}, ["image_size: expected an integer of at least 32, received 16"]),
        ({"image_size": "16385"}, ["image_size: expected at most 16,384, received 16385"]),
        ({"eval_crop": "0.001"}, ["eval_crop: expected a number in [0.01, 1], received 0.001"]),
        ({"eval_resize_size": "99999"}, ["eval_resize_size: expected at most 16,384, received 99999"]),
        ({"precision": '"bfloat16"'}, ["precision: expected one of float32, mixed", "'mixed_bfloat16'"]),
        ({"architecture": '"convnext_ato"'}, ["did you mean 'convnext_atto'", 'received "convnext_ato"']),
        ({"policy": '"ran-m9"'}, ["policy: expected a name that begins with one of none, rand", "'rand'?"]),
        ({"trainable": '"lora"'}, ['trainable: expected "all", "head" or "lora:', 'received "lora"']),
        ({"trainable": '"lora:0"'}, ['received "lora:0"']),
        ({"trainable": '"lora:10000"'}, ["with a rank from 1 to 9999", 'received "lora:10000"']),
        ({"layer_decay_groups": '"layerwise"'}, ["'layer_wise'"]),
        ({"weights": '"d1_in1k"'}, ["weights: expected a tag, the", "Weights of convnext_atto: d2_in1k"]),
        (
            {"weights": '"convnext_base.fb_in1k"'},
            ["architecture: expected 'convnext_base', which weights 'convnext_base.fb_in1k' are of"],
        ),
        ({"teacher": '"nobody"', "distillation_weight": "0.5"}, ["teacher: expected a tag", "'nobody'"]),
        ({"teacher": '"convnext_base.fb_in1k"'}, ["distillation_weight: expected above 0 with a teacher"]),
        ({"distillation_weight": "0.5"}, ["distillation_weight: expected above 0 with a"]),
        ({"accumulation_steps": "3"}, ["accumulation_steps: expected a divisor of batch_size 64, r"]),
        ({"batch_size": "9", "mixup": "0.8"}, ["batch_size: expected an even number of images"]),
        ({"min_learning_rate": "1.0"}, ["min_learning_rate: expected at most learning_rate 0.002, r"]),
        ({"warmup_learning_rate": "1.0"}, ["warmup_learning_rate: expected at most learning_rate"]),
        ({"warmup_epochs": "99"}, ["warmup_epochs: expected at most epochs 8, received 99.0"]),
        ({"val_split": '"test"', "validation_fraction": "0.1"}, ["validation_fraction: expected 0 beside"]),
        ({"architecture": '"convnextv2_atto"'}, ["layer_scale_init_value: expected 0 for convnextv2_atto"]),
        (
            {"architecture": '"convnext_atto"', "layer_scale_init_value": "0.0"},
            ["layer_scale_init_value: expected above 0 for convnext_atto", "1e-06), received 0.0"],
        ),
        (
            {"epoch": "3", "flip": None, "seed": "true"},
            ["with 3 problems:", "epoch: unknown", "flip: missing", "seed: expected an integer"],
        ),
        ({"flip": "2", "seed": "-1", "erase": "-1"}, ["with 3 problems:", "flip:", "seed:", "erase:"]),
    ],
)  # fmt: skip
def test_problems_of_a_file_are_all_named(write, changes, problems):
    path = write(**changes)
    with pytest.raises(ValueError) as caught:
        load_recipe(path)
    assert str(path) in str(caught.value)
    for problem in problems:
        assert problem in str(caught.value)


def test_every_key_is_missed_when_it_is_missing(write, smoke):
    optional = {"task", "epochs_for_images", "engine", "model_devices"}
    for key in smoke.by_short_key().keys() - {"source", *optional} | {"data"}:
        name = "source" if key == "data" else key
        with pytest.raises(ValueError, match=rf"with 1 problem:\n  {name}: missing"):
            load_recipe(write(**{key: None}))


def test_every_number_has_a_range(smoke):
    numbers = {key: value for key, value in smoke.by_short_key().items() if type(value) in (int, float)}
    assert len(numbers) == 38
    for name, value in numbers.items():
        with pytest.raises(ValueError, match=f"{name}: expected (a number|an integer) "):
            smoke.replaced({name: type(value)(-1)})


@pytest.mark.parametrize("value", [2**31, 2**40])
def test_every_integer_has_a_largest_value(smoke, value):
    """Seeds overflowed in TensorFlow and step counts in a division, which ended with exit code 70."""
    integers = [key for key, found in smoke.by_short_key().items() if type(found) is int]
    assert len(integers) == 11
    for name in integers:
        with pytest.raises(ValueError, match=f"{name}: expected at most [0-9,]+, received"):
            smoke.replaced({name: value})


def test_every_key_is_described():
    assert all(field.description for field in Recipe.fields().values())


def test_problems_of_an_override_say_that_it_was_one():
    with pytest.raises(ValueError, match=r"epoch: unknown key, did you mean 'epochs'\? \(it was given as an"):
        load_recipe("smoke", {"epoch": "3"})
    with pytest.raises(ValueError, match='epochs: expected an integer of at least 1, received "many"'):
        load_recipe("smoke", {"epochs": "many"})
    with pytest.raises(ValueError, match='rematerialize: expected true or false, received "yes"'):
        load_recipe("smoke", {"rematerialize": "yes"})
    with pytest.raises(ValueError, match=r'crop_scale: expected a list of 2, .* received \["a", 1.0\]'):
        load_recipe("smoke", {"crop_scale": "a,1"})


def test_a_recipe_made_in_python_is_checked_like_a_file(smoke):
    with pytest.raises(ValueError, match=r"received one with 1 problem:\n  epochs: expected an integer"):
        smoke.replaced({"epochs": "3"})
    with pytest.raises(ValueError, match="epochs: expected an integer of at least 1, received 0"):
        smoke.replaced({"epochs": 0})


def test_keys_stand_in_their_tables_or_all_at_the_top(write, smoke, tmp_path):
    """As the runs of before have them, whose folders hold flat recipes."""
    flat = load_recipe(write())
    assert flat == smoke
    run = load_recipe(FOLDER.parent / "benchmarks" / "runs" / "convnextv2_atto.tiny_imagenet200_1.toml")
    assert (run.optimizer.epochs, run.data.train_split) == (14, "train")
    path = tmp_path / "tables.toml"
    text = smoke.to_toml()
    for wrong, problem in (
        (
            text.replace("epochs = 8", "epoch = 8"),
            "optimizer.epoch: unknown key, did you mean 'optimizer.epochs'?",
        ),
        (
            text.replace("[run]\n", "[run]\nflip = 1.0\n"),
            "run.flip: unknown key, did you mean 'augmentation.flip'?",
        ),
        (text + "[optimiser]\nepochs = 3\n", "optimiser: unknown table, did you mean [optimizer]?"),
        (f"epochs = 3\n{text}", "epochs: given twice, remove one of them"),
    ):
        path.write_text(wrong)
        with pytest.raises(ValueError, match=re.escape(problem)):
            load_recipe(path)


@pytest.mark.parametrize("key", ["epochs", "optimizer.epochs"])
def test_a_key_is_changed_by_its_short_or_its_full_name(smoke, key):
    assert (
        load_recipe("smoke", {key: "3"})
        == smoke.replaced({key: 3})
        == smoke.replaced({"optimizer": {"epochs": 3}})
    )


def test_short_keys_are_unique(smoke):
    assert len(smoke.by_short_key()) == len(smoke.values()) == 60
    assert all(
        Recipe.full_key(key) == full for key, full in zip(smoke.by_short_key(), smoke.values(), strict=True)
    )


def test_the_recipes_have_the_values_that_they_had_before_they_had_tables():
    """The digest was made of the flat files of commit d4d607b."""
    found = {}
    for path in sorted(FOLDER.glob("*.toml")):
        values = {}
        for key, value in tomllib.loads(path.read_text()).items():
            values |= value if isinstance(value, dict) else {key: value}
        if path.stem in {*SEGMENTATION, *PRETRAINED, *OTHER_TASKS}:
            continue  # recipes of later
        if path.stem not in OF_FEATURES:
            values["data"] = values.pop("source")
            values.pop("epochs_for_images", None)  # a key of later
        found[path.stem] = values
    digest = hashlib.sha256(json.dumps(found, sort_keys=True).encode()).hexdigest()
    assert len(found) == 57
    assert digest == "2e0aba3b312e8ace39a67561277d0febddc18573cb5a4aef287b1c431a65c60f"


# The table of devices.


def test_a_recipe_without_the_table_leaves_the_engine_to_the_devices(smoke):
    assert smoke.distribution == Distribution()


def test_the_table_is_read_written_and_set_from_the_command_line(write, tmp_path):
    path = write()
    path.write_text(path.read_text() + '[distribution]\nengine = "model_parallel"\n')
    assert load_recipe(path).distribution == Distribution(engine="model_parallel")
    set_ = load_recipe(path, {"distribution.engine": "data_parallel", "distribution.model_devices": "4"})
    assert set_.distribution == Distribution(engine="data_parallel", model_devices=4)
    written = tmp_path / "written.toml"
    written.write_text(set_.to_toml())
    assert written.read_text().endswith('\n[distribution]\nengine = "data_parallel"\nmodel_devices = 4\n')
    assert load_recipe(written) == set_


def test_replaced_changes_keys_of_the_table_one_by_one(smoke):
    changed = smoke.replaced({"epochs": 3, "distribution.model_devices": 4})
    assert changed == smoke.replaced({"epochs": 3, "distribution": Distribution(model_devices=4)})
    assert smoke.replaced({"distribution": Distribution(engine="none")}).distribution.engine == "none"
    with pytest.raises(
        ValueError, match=r"distribution\.engin: unknown key, did you mean 'distribution\.engine'"
    ):
        smoke.replaced({"distribution.engin": "none"})


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (
            "[distribution]\nengine = 'data_paralel'",
            "(did you mean 'data_parallel' or 'model_parallel'?), received \"data_paralel\"",
        ),
        (
            "[distribution]\nengine = 'horovod'",
            "expected one of auto (any backend), none (any backend), data_",
        ),
        ("[distribution]\ndevices = 8", "distribution.devices: unknown key, did you mean 'distribution."),
        (
            "[distribution]\nmodel_devices = 2.0",
            "model_devices: expected an integer of at least 1, received 2.0",
        ),
        ("distribution = 'none'", "distribution: unknown key"),
        ("[optimizer]\nname = 'adamw'", "optimizer.name: unknown key, remove it"),
    ],
)
def test_mistakes_in_the_table_are_named(write, lines, message):
    path = write()
    path.write_text(path.read_text() + lines)
    with pytest.raises(ValueError, match=re.escape(message)):
        load_recipe(path)


def test_identity_does_not_depend_on_the_devices(smoke):
    assert identity(smoke.replaced({"distribution.engine": "data_parallel"})) == identity(smoke)


def test_a_broken_file_is_named_with_its_line(tmp_path):
    path = tmp_path / "broken.toml"
    path.write_text('title = "a"\nepochs = = 3\n')
    with pytest.raises(ValueError, match=rf"'{re.escape(str(path))}' is not one: .* line 2"):
        load_recipe(path)
    path.write_bytes(b'title = "\xff"\n')
    with pytest.raises(ValueError, match=r"byte 9 of '.*broken.toml' is not. Save it as UTF-8"):
        load_recipe(path)


def test_what_is_not_a_recipe_is_told_with_near_names(tmp_path):
    with pytest.raises(ValueError, match=r"Unknown recipe 'smok'. Did you mean 'smoke'.*received 'smok'"):
        load_recipe("smok")
    with pytest.raises(ValueError, match=r"Unknown recipe 'fine_tun'. Did you mean 'fine_tune'"):
        load_recipe("recipes/fine_tun.toml")
    with pytest.raises(ValueError, match="Expected a recipe, received the folder"):
        load_recipe(tmp_path)
    with pytest.raises(ValueError, match=r"Expected a readable recipe at '.*nothing\.toml': No such file"):
        Recipe.read(tmp_path / "nothing.toml")


def test_a_file_in_the_working_directory_hides_no_published_name(write, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write("smoke")
    assert load_recipe("smoke").data.source == str(FOLDER / "digits")
    assert load_recipe("./smoke").title == load_recipe("smoke").title


def test_names_of_the_data_pipeline_are_the_pipelines():
    policies = importlib.import_module("keras_convnext.data.augment.policies")
    assert set(train_transform.POLICIES) == set(policies.POLICIES)
    for name in {*PUBLISHED, *OURS} - OTHER_TASKS:
        policies.parse_policy(load_recipe(name).augmentation.policy)


# Identity.


def test_identity_is_all_that_decides_the_result(smoke):
    free = {"title", "reference", "epochs_for_images", "checkpoint_minutes", "keep_checkpoints"}
    free |= {"task", "engine", "model_devices"}
    assert set(identity(smoke)) == smoke.by_short_key().keys() - free
    same = smoke.replaced({"title": "x", "reference": "y", "checkpoint_minutes": 1.0, "keep_checkpoints": 9})
    assert identity(same) == identity(smoke)
    assert identity(smoke.replaced({"seed": 1})) != identity(smoke)


def test_a_run_that_was_begun_with_a_flat_recipe_has_the_same_identity():
    """Else its folder would be refused. The file was written before recipes had tables."""
    path = FOLDER.parent / "benchmarks" / "runs" / "convnextv2_atto.tiny_imagenet200_2.toml"
    before = tomllib.loads(path.read_text())
    for key in ("title", "reference", "data", "checkpoint_minutes", "keep_checkpoints", "distribution"):
        del before[key]
    now = identity(load_recipe(path))
    del now["source"]  # `run_identity` has a digest of the data in its place
    assert json.dumps(now, sort_keys=True) == json.dumps(before, sort_keys=True)


def test_identity_is_equal_after_json(smoke):
    assert json.loads(json.dumps(identity(smoke))) == identity(smoke)


# Warnings.


def _warned(recipe, **changes):
    """The keys that warnings begin with, for a recipe of supervised weights unless told otherwise."""
    options = {"has_weights": True, "trained_size": 224} | {
        key: changes.pop(key) for key in tuple(changes) if Recipe.full_key(key) is None
    }
    return [text.split()[0] for text in warnings_for(recipe.replaced(changes), **options)]


def test_no_published_recipe_is_warned_of_with_its_own_weights(published, smoke):
    ours = {name: load_recipe(name) for name in OURS - OTHER_TASKS}
    images = {"fine_tune": 3670 * 8 // 10, "smoke": 1437}
    images |= {"tiny_imagenet": 100_000, "tiny_imagenet_64": 100_000}
    for name, recipe in {**published, **ours}.items():
        count = images.get(name, 14_197_122 if name.startswith("imagenet22k_c") else 1_281_167)
        steps = count // recipe.optimizer.batch_size * recipe.optimizer.epochs
        messages = warnings_for(
            recipe,
            has_weights=bool(recipe.model.weights),
            is_self_supervised=recipe.model.weights.endswith(".fcmae"),
            trained_size={"tiny_imagenet_64": 48}.get(name, 224) if recipe.model.weights else None,
            has_new_head=name != "tiny_imagenet_64",
            num_steps=steps,
        )
        if name == "tiny_imagenet_64":  # goes on with a training from scratch, at a rate for that
            assert [text.split()[0] for text in messages] == ["learning_rate"]
        else:
            assert messages == [], name


def test_rates_of_training_from_scratch_are_warned_of_with_weights(published):
    scratch = published["imagenet1k_convnext_tiny"]
    assert "learning_rate" in _warned(scratch)
    fine = load_recipe("fine_tune")
    assert _warned(fine) == []
    for rate, batch_size in ((4e-3, 4096), (1e-3, 32), (2e-4, 64)):
        assert _warned(fine, learning_rate=rate, batch_size=batch_size) == ["learning_rate"]
    assert _warned(fine, learning_rate=1e-3, trainable="head") == []  # a frozen backbone cannot be destroyed
    assert _warned(fine, learning_rate=1e-3, trainable="lora:8") == []


def test_the_papers_rate_for_v2_base_is_warned_of_and_the_codes_is_not(published):
    recipe = published["imagenet1k_fcmae_ft_convnextv2_base"]
    assert _warned(recipe, is_self_supervised=True) == []
    assert _warned(recipe, is_self_supervised=True, learning_rate=2.5e-2) == ["learning_rate"]
    assert _warned(recipe) == ["learning_rate"]  # right after FCMAE, wrong after training with labels


def test_values_of_fine_tuning_are_warned_of_from_scratch(published):
    fine = published["imagenet22k_ft_1k_224_convnext_base"]
    scratch = published["imagenet1k_convnext_base"]
    none = {"has_weights": False, "trained_size": None}
    assert _warned(fine, weights="", **none) == [
        "learning_rate", "weight_decay", "layer_decay", "head_init_scale",
    ]  # fmt: skip
    assert _warned(scratch, **none) == []
    assert _warned(scratch, learning_rate=5e-5, **none) == ["learning_rate"]
    assert _warned(scratch, learning_rate=2e-2, **none) == ["learning_rate"]
    assert _warned(scratch, weight_decay=1e-8, **none) == ["weight_decay"]
    assert _warned(scratch, layer_decay=0.8, **none) == ["layer_decay"]
    assert _warned(scratch, head_init_scale=0.001, **none) == ["head_init_scale"]
    assert _warned(scratch, trainable="head", **none) == ["trainable"]


def test_decay_and_head_of_training_from_scratch_are_warned_of_with_weights():
    fine = load_recipe("fine_tune")
    assert _warned(fine, weight_decay=0.3) == ["weight_decay"]
    assert _warned(fine, weight_decay=0.3, is_self_supervised=True) == []
    assert _warned(fine, head_init_scale=1.0) == ["head_init_scale"]
    assert _warned(fine, head_init_scale=1.0, has_new_head=False) == []


def test_sizes_far_from_the_weights_and_from_training_are_warned_of():
    fine = load_recipe("fine_tune")
    for size, keys in (
        (64, ["image_size"]),
        (112, ["image_size"]),
        (160, []),
        (384, []),
        (640, ["image_size"]),
    ):
        assert _warned(fine, image_size=size, eval_image_size=size) == keys, size
    assert _warned(fine, image_size=64, eval_image_size=64, trained_size=None) == []
    for size, keys in ((224, []), (256, []), (288, ["eval_image_size"]), (160, ["eval_image_size"])):
        assert _warned(fine, eval_image_size=size) == keys, size


def test_warmup_drop_path_and_ema_out_of_proportion_are_warned_of(published):
    fine, large = load_recipe("fine_tune"), published["imagenet22k_ft_1k_224_convnext_base"]
    assert _warned(fine, warmup_epochs=6.0) == ["warmup_epochs"]
    assert _warned(fine, drop_path_rate=0.5) == ["drop_path_rate"]
    assert _warned(large, drop_path_rate=0.5) == []
    assert _warned(fine, ema_decay=0.9999, num_steps=1000) == ["ema_decay"]
    assert _warned(fine, ema_decay=0.9999) == _warned(fine, num_steps=1000) == []
    assert _warned(fine, ema_decay=0.0, num_steps=1) == []


def test_a_warning_tells_the_value_the_published_one_its_source_and_the_remedy():
    fine = load_recipe("fine_tune").replaced({"learning_rate": 4e-3})
    (message,) = warnings_for(fine, has_weights=True)
    assert "learning_rate 0.004 at batch_size 64" in message
    assert "5e-5 with batches of 512 (Liu et al. 2022, table 6)" in message
    assert "Set learning_rate to 5e-5, and for few images at most to 0.0001." in message
    following = fine.replaced({"learning_rate": 1e-4})
    assert warnings_for(following, has_weights=True) == []


def test_the_remedies_are_free_of_warnings(published):
    """What a message says to set is not warned of itself."""
    small = load_recipe("fine_tune").replaced(
        {"warmup_epochs": 20.0, "drop_path_rate": 0.9, "ema_decay": 0.9999}
    )
    small = small.replaced({"image_size": 640, "eval_image_size": 100})
    texts = " ".join(warnings_for(small, has_weights=True, trained_size=224, num_steps=900))
    ema = float(re.search(r"ema_decay to at most ([\d.]+),", texts)[1])
    warmup = float(re.search(r"warmup_epochs to at most ([\d.]+?)\.(?: |$)", texts)[1])
    size = int(re.search(r" image_size between 113 and (\d+),", texts)[1])
    low, high = map(int, re.search(r"eval_image_size between (\d+) and (\d+)\.", texts).groups())
    assert (low, high) == (576, 819)
    better = small.replaced({"ema_decay": ema, "warmup_epochs": warmup, "drop_path_rate": 0.2})
    better = better.replaced({"image_size": size, "eval_image_size": size})
    assert warnings_for(better, has_weights=True, trained_size=224, num_steps=900) == []


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (
            {"learning_rate": "1" + "0" * 400},
            "learning_rate: expected at most 9,007,199,254,740,992, received 1000",
        ),
        (
            {"learning_rate": "0x" + "f" * 9000},
            "learning_rate: expected at most 9,007,199,254,740,992, received a value",
        ),
        ({"epochs": "-" + "9" * 30}, "epochs: expected at most 9,007,199,254,740,992, received -999"),
        (
            {"crop_scale": "[0.1, 1" + "0" * 400 + "]"},
            "crop_scale: expected at most 9,007,199,254,740,992, received [0.1, 1",
        ),
        ({"crop_scale": "[" * 300 + "]" * 300}, "crop_scale: expected a list of 2"),
        ({"crop_scale": "[" * 500 + "]" * 500}, "xpected a"),
        ({"title": "[" * 20_000}, "is not one"),
        ({"learning_rate": "9" * 5000}, "is not one: Exceeds the limit"),
        ({"architecture": '"' + "x" * 20_000 + '"'}, "architecture: expected"),
        ({"x" * 30_000: "1"}, "x...: unknown key"),
        ({".".join("a" * 20_000): "1"}, "is not one: a line has more than 200 dots"),
        ({"title": '"' + "x" * 100_000 + '"'}, "Expected at most 65.5 kB in"),
    ],
)
def test_numbers_texts_and_depths_beyond_use_are_one_short_sentence(write, changes, words):
    with pytest.raises(ValueError) as caught:
        load_recipe(write(**changes))
    assert words in str(caught.value) and "mine.toml" in str(caught.value)
    assert len(str(caught.value)) < 2500


def test_unknown_keys_without_number_are_answered_soon(write):
    path = write()
    path.write_text(path.read_text() + "\n[more]\n" + "\n".join(f"k{n} = 1" for n in range(6000)))
    start = time.monotonic()
    with pytest.raises(ValueError, match="unknown"):
        load_recipe(path)
    path.write_text(
        "\n".join(f"batch_sizf{n} = 1" for n in range(3000)) + "\n" + write(name="b.toml").read_text()
    )
    with pytest.raises(ValueError, match=r"with 3000 problems[^~]*and 2980 more"):
        load_recipe(path)
    assert time.monotonic() - start < 5


def test_a_recipe_is_a_file(tmp_path):
    os.mkfifo(tmp_path / "pipe.toml")
    (tmp_path / "zero.toml").symlink_to("/dev/zero")
    for name in ("pipe.toml", "zero.toml"):
        with pytest.raises(ValueError, match="Expected"):
            load_recipe(tmp_path / name)
