"""A tag is enough: what follows from weights in place of the recipe's, and epochs that fit the data."""

import os
import pathlib
import re
import shlex
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

import keras_convnext
from keras_convnext.analysis.plan import make_plan
from keras_convnext.cli import main
from keras_convnext.training.derived import choose_recipe
from keras_convnext.training.recipes.files import load_recipe
from keras_convnext.weights.catalog import default_checkpoint

pytestmark = pytest.mark.one_backend

ROOT = pathlib.Path(__file__).parents[2]
ATTO = "convnextv2_atto.tiny_imagenet200"  # comes with the package: 64 pixels, GRN


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """40 photos in two classes, of which fine_tune holds out 8."""
    folder = tmp_path_factory.mktemp("photos")
    generator = np.random.default_rng(0)
    for name in ("light", "dark"):
        (folder / name).mkdir()
        for number in range(20):
            levels = generator.integers(0, 100, (70, 80, 3), np.uint8) + (150 if name == "light" else 0)
            Image.fromarray(levels.astype("uint8")).save(folder / name / f"{number}.png")
    return folder


def derived(overrides, data="", recipe="fine_tune", **options):
    recipe, lines = choose_recipe(recipe, overrides={"data": str(data), **overrides}, **options)
    return recipe.by_short_key(), lines


@pytest.mark.once
def test_architecture_sizes_preparation_and_layer_scale_follow_from_a_tag():
    values, lines = derived({"weights": ATTO})
    expected = {
        "architecture": "convnextv2_atto", "layer_scale_init_value": 0.0, "image_size": 64,
        "eval_image_size": 64, "eval_crop": 1.0,
    }  # fmt: skip
    before = load_recipe("fine_tune").by_short_key()
    assert {key: value for key, value in values.items() if value != before[key]} == expected | {
        "weights": ATTO, "title": f"{before['title']}, with weights {ATTO}",
    }  # fmt: skip
    assert [line.split(" = ")[0] for line in lines] == list(expected)
    assert lines[0] == 'architecture = "convnextv2_atto": of the weights'
    assert lines[2] == "image_size = 64: of the weights"


@pytest.mark.once
@pytest.mark.parametrize(
    ("weights", "expected"),
    [
        (
            "convnext_base.fb_in22k_ft_in1k_384",
            {"image_size": 384, "eval_resize_mode": "squash", "eval_crop": 1.0},
        ),
        ("convnext_tiny.torchvision_in1k", {"eval_resize_size": 236, "eval_interpolation": "bilinear"}),
        ("convnext_isotropic_small.official_in1k", {"layer_decay": 1.0, "layer_scale_init_value": 1e-6}),
        ("convnextv2_tiny.fcmae", {"image_size": 224, "layer_scale_init_value": 0.0}),
    ],
)
def test_what_follows_is_that_of_the_weights(weights, expected):
    values, _ = derived({"weights": weights})
    assert {key: values[key] for key in expected} == expected


@pytest.mark.once
def test_the_sizes_of_detectors_do_not_follow():
    tag = next(tag for tag in keras_convnext.list_weights("convnext_tiny") if "mmdet" in tag or "coco" in tag)
    values, lines = derived({"weights": tag})
    assert (values["image_size"], values["eval_crop"]) == (224, 0.875) and lines == []


@pytest.mark.once
def test_a_key_that_is_set_wins():
    changes = {"image_size": "96", "eval_crop": "0.9", "layer_decay": "0.7", "epochs": "3"}
    values, lines = derived({"weights": ATTO, **changes})
    assert (values["image_size"], values["eval_crop"], values["epochs"]) == (96, 0.9, 3)
    assert "eval_image_size = 96: that of training" in lines
    assert not [line for line in lines if line.startswith(("image_size", "eval_crop", "epochs"))]
    values, _ = derived({"weights": "convnext_tiny.torchvision_in1k", "eval_image_size": "256"})
    assert (values["eval_image_size"], values["eval_resize_size"]) == (256, 0)  # 236 is for 224


@pytest.mark.once
def test_nothing_is_derived_with_the_weights_of_the_recipe(photos):
    own = load_recipe("fine_tune")
    for overrides in ({}, {"weights": own.model.weights}, {"weights": ""}):
        if overrides.get("weights") == "":
            overrides["head_init_scale"] = "1"
        chosen, lines = choose_recipe("fine_tune", photos, overrides)
        assert lines == [] and chosen.optimizer.epochs == own.optimizer.epochs


@pytest.mark.once
def test_a_recipe_for_another_size_than_its_weights_keeps_it():
    """224 to 384 pixels is what the recipe is about."""
    recipe = "imagenet22k_ft_1k_384_convnext_tiny"
    values, lines = derived({"weights": "convnext_tiny.in12k"}, recipe=recipe)
    assert (values["image_size"], values["eval_resize_mode"]) == (384, "squash") and lines == []


@pytest.mark.once
def test_a_weight_file_is_as_good_as_a_tag(tmp_path):
    model = keras_convnext.load("test_convnext2", None, classes=3, input_shape=(64, 64, 3))
    path = tmp_path / "mine.safetensors"
    row = default_checkpoint("test_convnext2")
    prepared = keras_convnext.Preprocessing(48, crop_fraction=0.9, mean=row.mean, std=row.std)
    keras_convnext.save_weights(model, path, "timm", preprocessing=prepared)
    values, _ = derived({"weights": str(path)})
    assert (values["architecture"], values["image_size"], values["eval_crop"]) == ("test_convnext2", 48, 0.9)
    with pytest.raises(ValueError, match=r"weights: No such weight file: .* Near names"):
        choose_recipe("fine_tune", ROOT, {"weights": str(tmp_path / "mime.safetensors")}, tmp_path / "run")


@pytest.mark.once
def test_a_short_tag_is_that_of_the_architecture_that_is_set():
    values, _ = derived({"architecture": "convnextv2_atto", "weights": "tiny_imagenet200"})
    assert (values["image_size"], values["layer_scale_init_value"]) == (64, 0.0)
    values, _ = derived({"architecture": "convnextv2_huge", "weights": "imagenet"})
    names = ("image_size", "eval_image_size", "eval_crop", "eval_resize_mode")
    assert [values[name] for name in names] == [384, 384, 1.0, "squash"]
    with pytest.raises(ValueError, match="weights: expected a tag"):
        derived({"architecture": "convnextv2_huge", "weights": "tiny_imagenet200"})


@pytest.mark.once
@pytest.mark.parametrize("command", ["plan", "train"])
def test_weight_files_that_cannot_be_used_are_refused(command, refused, photos, tmp_path):
    bare = tmp_path / "final.weights.h5"
    keras_convnext.load("test_convnext2", None).save_weights(bare)
    words = ["--devices", "1xcpu"] if command == "plan" else ["--out", tmp_path / "run"]
    for path, message in (
        (tmp_path / "final.weights.h6", r"weights: No such weight file: .* Near names"),
        (tmp_path, "weights: Expected a weight file. Received a folder"),
        (bare, r"weights: Expected weights that say what they are of.* Take the \.safetensors file"),
    ):
        changes = ["--set", f"weights={path}", "--set", "architecture=test_convnext2"]
        for extra in ([], changes[2:]):
            error = refused(command, "fine_tune", "--data", photos, *words, *changes[:2], *extra)
            assert re.search(message, error) and "Pass that as model" not in error


@pytest.mark.once
def test_a_keras_file_is_read_by_the_command(photos, tmp_path):
    """In a process of its own: the classes of the package are not registered there when it starts."""
    model = keras_convnext.load("convnextv2_atto", None, classes=3, input_shape=(48, 48, 3))
    path = tmp_path / "m.keras"
    model.save(path)
    words = ["plan", "fine_tune", "--devices", "1xcpu", "--data", str(photos), "--set", f"weights={path}"]
    ended = subprocess.run(
        [sys.executable, "-m", "keras_convnext_main", *words],
        capture_output=True, text=True, env=os.environ | {"PYTHONPATH": str(ROOT)}, cwd=tmp_path,
    )  # fmt: skip
    assert 'architecture = "convnextv2_atto": of the weights' in ended.stdout, ended.stderr


@pytest.mark.once
def test_warmup_fits_the_epochs_that_are_set_or_follow(photos):
    values, lines = derived({"weights": ATTO, "epochs": "1"}, photos)
    assert (values["epochs"], values["warmup_epochs"]) == (1, 0.1)
    assert "warmup_epochs = 0.1: the same part of the run" in lines
    values, _ = derived({"weights": ATTO, "warmup_epochs": "25"}, photos)
    assert (values["epochs"], values["warmup_epochs"]) == (300, 25)
    with pytest.raises(ValueError, match=r"1 problem:\n.*at most epochs 1, received 2\.0"):
        derived({"weights": ATTO, "epochs": "1", "warmup_epochs": "2"}, photos)


@pytest.mark.once
@pytest.mark.parametrize(
    ("images", "epochs", "warmup"),
    [(1, 300, 30.0), (100, 300, 30.0), (300, 200, 20.0), (1000, 60, 6.0), (3000, 20, 2.0), (12_000, 10, 1.0),
     (100_000, 5, 0.5), (1_000_000, 5, 0.5)],
)  # fmt: skip
def test_epochs_fit_the_number_of_images(images, epochs, warmup, monkeypatch):
    """As many steps for few images, fewer epochs for many, within bounds; the warmup is the same part."""
    monkeypatch.setattr("keras_convnext.training.derived.training_images", lambda data, seed: range(images))
    values, lines = derived({"weights": ATTO}, "photos")
    assert (values["epochs"], values["warmup_epochs"]) == (epochs, warmup)
    if images == 300:
        assert "epochs = 200: for 300 images; 20 are for about 3,000 images" in lines
        assert "warmup_epochs = 20.0: the same part of the run" in lines


@pytest.mark.once
def test_a_contradiction_names_both_sides(tmp_path, capsys):
    changes = ["--set", f"weights={ATTO}", "--set", "architecture=convnext_tiny"]
    for command in (
        ["train", "fine_tune", "--out", str(tmp_path)],
        ["plan", "fine_tune", "--devices", "1xcpu"],
    ):
        assert main.main([*command, "--data", str(ROOT / "recipes" / "flowers"), *changes]) == 2
        error = capsys.readouterr().err
        assert (
            "with 1 problem:" in error and f"which weights '{ATTO}' are of, received 'convnext_tiny'" in error
        )


@pytest.mark.once
def test_all_problems_come_at_once_before_a_backend_is_loaded(tmp_path):
    words = ["train", "fine_tune", "--data", "nowhere", "--out", str(tmp_path / "run")]
    words += ["--set", "weights=convnext_tiny.fb_in23k", "--set", "epoch=3", "--set", "flip=2"]
    code = (
        "import sys, keras_convnext_main\n"
        f"code = __import__('keras_convnext.cli.main', fromlist=['main']).main({words!r})\n"
        "print(code, {'tensorflow', 'torch', 'jax'} & set(sys.modules))"
    )
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    ended = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=environment, cwd=tmp_path
    )
    for problem in (
        "4 problems",
        "data: ",
        "weights: expected a tag",
        "epoch: unknown key",
        "flip: expected",
    ):
        assert problem in ended.stderr, ended.stderr
    assert ended.stdout.split("\n")[-2] == "2 set()"
    assert not (tmp_path / "run").exists()


@pytest.mark.once
def test_plan_derives_what_train_does(photos, capsys):
    chosen, lines = choose_recipe("fine_tune", photos, {"weights": ATTO, "batch_size": "8"})
    command = ["plan", "fine_tune", "--devices", "1xcpu", "--data", str(photos)]
    assert main.main([*command, "--set", f"weights={ATTO}", "--set", "batch_size=8"]) == 0
    printed = capsys.readouterr().out
    assert all("derived" in printed and line in printed for line in lines)
    assert make_plan(chosen, "1xcpu").total_steps == 4 * chosen.optimizer.epochs == 4 * 300


@pytest.mark.once
def test_a_run_keeps_what_it_began_with(photos, tmp_path):
    """The rules may change between two versions, and a run of before derived nothing."""
    changes = {"weights": ATTO, "architecture": "convnextv2_atto", "layer_scale_init_value": 0}
    changes |= {"image_size": 64, "eval_image_size": 64, "data": str(photos)}
    begun = load_recipe("fine_tune", changes)
    (tmp_path / "recipe.toml").write_text(begun.to_toml())
    chosen, lines = choose_recipe("fine_tune", photos, {"weights": ATTO}, tmp_path)
    assert chosen.by_short_key() == begun.by_short_key()
    assert "image_size = 64: as the run began" in lines


@pytest.mark.once
def test_the_folder_of_a_run_with_other_weights_decides_nothing(photos, tmp_path):
    (tmp_path / "recipe.toml").write_text(load_recipe("smoke").to_toml())
    changes = {"weights": "convnextv2_base.fcmae_ft_in22k_in1k_384"}
    chosen, lines = choose_recipe("fine_tune", photos, changes, tmp_path)
    assert chosen.model.architecture == "convnextv2_base" and chosen.model.image_size == 384
    assert not [line for line in lines if "as the run began" in line]


@pytest.mark.once
def test_the_folder_of_a_user_that_is_not_there_is_a_plain_name(photos):
    chosen, _ = choose_recipe("smoke", photos, folder="~nobody_of_this_name/run")
    assert chosen.data.source == str(photos)


def test_a_tag_is_enough_and_the_last_line_is_the_next_command(photos, tmp_path, capsys, monkeypatch):
    monkeypatch.delenv("KERAS_CONVNEXT_QUIET", raising=False)
    words = ["--set", f"weights={ATTO}", "--set", "batch_size=8", "--set", "accumulation_steps=1"]
    words += ["--set", "epochs=1", "--set", "warmup_epochs=0"]
    folder = tmp_path / "a run"
    assert main.main(["train", "fine_tune", "--data", str(photos), "--out", str(folder), *words]) == 0
    printed = capsys.readouterr()
    assert "image_size = 64: of the weights" in printed.err
    found = [line for line in printed.err.splitlines() if line.startswith(("training: ", "validation: "))]
    assert found == [
        f"training: 32 images of 2 classes in '{photos}': dark (16), light (16)",
        f"validation: 8 images of 2 classes in '{photos}': dark (4), light (4)",
    ]
    command = printed.out.splitlines()[-1]
    assert command == f"keras-convnext predict PHOTO --weights '{folder / 'final.safetensors'}'"
    photo = next((photos / "light").iterdir())
    program, *words = [word.replace("PHOTO", str(photo)) for word in shlex.split(command)]
    assert program == "keras-convnext" and main.main(words) == 0
    assert {"light", "dark"} & set(capsys.readouterr().out.split())


def test_no_data_is_not_the_working_folder(tmp_path, monkeypatch):
    (tmp_path / "cat").mkdir()
    (tmp_path / "cat" / "0.png").touch()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match='data: expected the path of the images, received ""'):
        choose_recipe("smoke", "", folder=tmp_path / "run")
