"""Recipes of pre-training: the released values, and what does not go together is named."""

import pytest

from keras_convnext.analysis.plan import make_plan
from keras_convnext.training.recipes.files import load_recipe
from keras_convnext.training.recipes.pretraining import PretrainingRecipe

pytestmark = pytest.mark.once

SIZES = ("atto", "femto", "pico", "nano", "tiny", "base", "large", "huge")
# facebookresearch/ConvNeXt-V2 at 2553895, main_pretrain.py and TRAINING.md; Woo et al. 2023, table 8.
RELEASED = {
    "weights": "", "drop_path_rate": 0.0, "image_size": 224, "mask_ratio": 0.6, "decoder_width": 512,
    "decoder_depth": 1, "norm_pix_loss": True, "precision": "float32", "epochs": 800, "batch_size": 4096,
    "min_learning_rate": 0.0, "warmup_epochs": 40.0, "warmup_learning_rate": 0.0, "weight_decay": 0.05,
    "beta_1": 0.9, "beta_2": 0.95, "epsilon": 1e-8, "clip_norm": 0.0, "layer_decay": 1.0, "ema_decay": 0.0,
    "crop_scale": (0.2, 1.0), "crop_ratio": (3 / 4, 4 / 3), "interpolation": "bicubic", "flip": 0.5,
}  # fmt: skip


@pytest.mark.parametrize("size", SIZES)
def test_released_values_are_the_released_ones(size):
    recipe = load_recipe(f"pretrain_fcmae_convnextv2_{size}")
    values = recipe.by_short_key()
    assert {key: values[key] for key in RELEASED} == RELEASED
    assert values["architecture"] == f"convnextv2_{size}"
    assert values["learning_rate"] == pytest.approx(1.5e-4 * 4096 / 256)
    changed = recipe.augmentation.whole
    assert (changed.policy, changed.erase, changed.mixup, changed.cutmix) == ("none", 0, 0, 0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"architecture": "convnext_tiny"}, r"architecture: expected a ConvNeXt V2.*V1 and isotropic"),
        (
            {"image_size": 100},
            r"image_size: expected a multiple of the 32 pixels of a cell, as 96, received 100",
        ),
        (
            {"mask_ratio": 0.99},
            r"mask_ratio: expected to leave 1 to 48 of 49 cells of image_size 224.*leaves 0",
        ),
        ({"mask_ratio": 0.0}, r"mask_ratio: .*received 0\.0, which leaves 49"),
        (
            {"image_size": 32},
            r"mask_ratio: expected to leave 1 to 1 of 1 cells of image_size 32.*larger images",
        ),
        ({"eval_image_size": 240}, r"eval_image_size: expected a multiple"),
        ({"warmup_epochs": 900.0}, r"warmup_epochs: expected at most epochs 80"),
        ({"mixup": 0.8}, "mixup"),
        ({"weights": "convnextv2_tiny.fcmae"}, r"architecture: expected 'convnextv2_tiny'"),
    ],
)
def test_what_does_not_fit_has_its_own_message(change, message):
    with pytest.raises(ValueError, match=message):
        load_recipe("pretrain", change)


def test_a_recipe_with_labels_is_no_recipe_of_pretraining(tmp_path):
    path = tmp_path / "labelled.toml"
    path.write_text(load_recipe("smoke").to_toml().replace('task = "classification"', 'task = "pretraining"'))
    with pytest.raises(ValueError, match=r"of pretraining, as its task says, .* one of classification in"):
        load_recipe(path)


def test_the_plan_counts_seen_cells_in_the_encoder_and_all_in_the_decoder():
    name, whole = "pretrain_fcmae_convnextv2_base", {"accumulation_steps": 1}
    plan = make_plan(load_recipe(name, whole), "64xh100")
    assert plan.fits and (plan.images, plan.classes) == (1_281_167, 0)
    # facts of the architecture at 224: 15.35 GMAC dense, of which 19 of 49 cells are seen; decoder 0.2 GMAC
    dense = make_plan(load_recipe(name, whole | {"mask_ratio": 0.01}), "64xh100")
    assert 2.3 < dense.flops / plan.flops < 48 / 19
    assert plan.flops == pytest.approx(6 * 4096 * (15.35e9 * 19 / 49 + 0.2e9), rel=0.05)
    assert plan.memory.activations + plan.memory.working < dense.memory.activations + dense.memory.working


def test_the_class_is_public():
    from keras_convnext import training

    assert training.PretrainingRecipe is PretrainingRecipe
