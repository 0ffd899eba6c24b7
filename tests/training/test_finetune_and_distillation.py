"""Distillation, the scale of a new head, frozen backbones and stages, and LoRA."""

import pathlib
import re

import keras
import numpy as np
import pytest

import keras_convnext
from keras_convnext.training import finetune
from keras_convnext.training.distillation import Distillation, with_teacher
from keras_convnext.training.optimizer import AdamW
from keras_convnext.training.recipes.files import load_recipe
from keras_convnext.training.tasks import classification

RECIPES = pathlib.Path(__file__).parents[2] / "recipes"


def tiny(name="student", classes=10):
    return keras_convnext.load(
        "test_convnext2",
        weights=None,
        classes=classes,
        input_shape=(32, 32, 3),
        layer_scale_init_value=0.1,
        classifier_activation=None,
        name=name,
    )


def images(count=4):
    return np.random.default_rng(0).uniform(0, 255, (count, 32, 32, 3)).astype("float32")


def values(model):
    return {v.path: keras.ops.convert_to_numpy(v).copy() for v in model.weights}


def softmax(x):
    exponentials = np.exp(x - x.max(-1, keepdims=True))
    return exponentials / exponentials.sum(-1, keepdims=True)


@pytest.mark.parametrize(("weight", "temperature"), [(0.5, 1.0), (0.3, 4.0)])
def test_distillation_adds_the_formula_of_hinton(weight, temperature):
    student, teacher = np.random.default_rng(1).normal(size=(2, 6, 5)).astype("float32") * 3
    layer = Distillation(weight, temperature)
    np.testing.assert_array_equal(
        keras.ops.convert_to_numpy(layer([student, teacher], training=True)), student
    )
    p, q = softmax(teacher / temperature), softmax(student / temperature)
    expected = weight * temperature**2 * (p * np.log(p / q)).sum(-1).mean()
    (added,) = layer.losses
    np.testing.assert_allclose(float(added), expected, rtol=1e-5)
    swapped = weight * temperature**2 * (q * np.log(q / p)).sum(-1).mean()
    assert abs(float(added) - swapped) > 1e-3  # the control: the other direction of KL


def test_distillation_adds_nothing_outside_training_or_for_equal_logits():
    logits = np.random.default_rng(1).normal(size=(6, 5)).astype("float32")
    layer = Distillation(0.5, 2.0)
    layer([logits, 2 * logits], training=False)
    assert not layer.losses
    layer([logits, logits], training=True)
    np.testing.assert_allclose(float(layer.losses[0]), 0, atol=1e-6)


@pytest.mark.one_backend
def test_the_teacher_pulls_the_student_and_stays_as_it_is():
    student, teacher = tiny(), tiny("teacher")
    finetune.scale_head(teacher, 20.0)  # so that there is something to learn
    model = with_teacher(student, teacher, 1.0, 1.0)
    before, x = values(teacher), images()
    target = keras.ops.convert_to_numpy(teacher(x))

    def distance():
        p, q = softmax(target), softmax(keras.ops.convert_to_numpy(student(x)))
        return (p * np.log(p / q)).sum(-1).mean()

    first = distance()
    model.compile(AdamW(3e-3), keras.losses.CategoricalCrossentropy(from_logits=True), loss_weights=[0.0])
    assert [v.path for v in model.trainable_variables] == [v.path for v in student.trainable_variables]
    for _ in range(12):
        loss = model.train_on_batch(x, np.eye(10, dtype="float32")[:4])
    assert distance() < 0.5 * first
    assert np.isfinite(loss)
    for path, value in values(teacher).items():
        np.testing.assert_array_equal(value, before[path])


def test_a_teacher_of_other_classes_is_refused():
    with pytest.raises(ValueError, match="student's 10 classes, received one of 7"):
        with_teacher(tiny(), tiny("teacher", classes=7), 0.5, 1.0)


def test_head_scale_multiplies_kernel_and_bias_of_the_head_alone():
    model = tiny()
    model.get_layer("head").bias.assign(np.arange(10.0))
    before = values(model)
    finetune.scale_head(model, 0.001)
    for path, value in values(model).items():
        factor = np.float32(0.001 if path.startswith("student_head/") else 1)
        np.testing.assert_allclose(value, before[path] * factor, rtol=1e-6)


def test_a_frozen_backbone_leaves_only_the_head_to_learn():
    model = tiny()
    finetune.choose_trainable(model, "head")
    assert [v.path for v in model.trainable_variables] == ["student_head/kernel", "student_head/bias"]


def test_lora_learns_its_updates_and_the_head_and_starts_as_the_model_was():
    model, x = tiny(), images()
    before, frozen = keras.ops.convert_to_numpy(model(x)), values(model)
    finetune.choose_trainable(model, "lora:2")
    np.testing.assert_allclose(keras.ops.convert_to_numpy(model(x)), before, atol=1e-6)
    names = {v.path.rsplit("/", 1)[-1] for v in model.trainable_variables}
    assert names == {"lora_kernel_a", "lora_kernel_b", "kernel", "bias"}
    blocks = sum((1, 1, 1, 1))
    assert len(model.trainable_variables) == 4 * blocks + 2
    model.compile(AdamW(1e-2), keras.losses.CategoricalCrossentropy(from_logits=True))
    for _ in range(2):
        model.train_on_batch(x, np.eye(10, dtype="float32")[:4])
    after = values(model)
    for path, value in frozen.items():
        assert np.array_equal(after[path], value) == (not path.startswith("student_head/")), path
    assert np.abs(keras.ops.convert_to_numpy(model(x)) - before).max() > 1e-3


def test_saved_lora_weights_are_those_of_a_plain_model(tmp_path):
    recipe = load_recipe("smoke").replaced(
        {"architecture": "test_convnext2", "trainable": "lora:2", "data": str(RECIPES / "digits")}
    )
    model, has_new_head = classification.build_model(recipe, 10)
    assert has_new_head
    for v in model.trainable_variables:
        v.assign(np.random.default_rng(2).normal(size=v.shape).astype("float32") * 0.1)
    keras_convnext.save_weights(model, tmp_path / "x.safetensors", "timm")
    plain = keras_convnext.load(
        "test_convnext2", tmp_path / "x.safetensors", input_shape=(32, 32, 3), classifier_activation=None
    )
    assert not any("lora" in v.path for v in plain.weights)
    expected = keras.ops.convert_to_numpy(model(images()))
    np.testing.assert_allclose(keras.ops.convert_to_numpy(plain(images())), expected, rtol=1e-3, atol=1e-3)
    bare = type(model)(model.inputs, model.outputs)
    bare.save_weights(tmp_path / "x.weights.h5")
    other = tiny()
    other.load_weights(tmp_path / "x.weights.h5")
    np.testing.assert_allclose(keras.ops.convert_to_numpy(other(images())), expected, rtol=1e-3, atol=1e-3)


# Frozen stages.


def body(name="test_convnext2", **settings):
    settings = {"include_top": False, "pooling": "avg", "input_shape": (32, 32, 3)} | settings
    return keras_convnext.load(name, weights=None, **settings)


def classes_of(x):
    return keras.layers.Dense(3, activation="softmax", name="classes")(x)


def nested(model):
    image = keras.Input((32, 32, 3))
    return keras.Model(image, classes_of(model(image)))


WRAPPERS = {
    "alone": lambda model: model,
    "flat": lambda model: keras.Model(model.input, classes_of(model.output)),
    "nested": nested,
    "sequential": lambda model: keras.Sequential(
        [keras.Input((32, 32, 3)), keras.layers.RandomFlip(), model, keras.layers.Dense(3, name="classes")]
    ),
    "twice": lambda model: nested(keras.Sequential([model])),
    "deployed": lambda model: keras_convnext.deploy(nested(model)),
}


def stages_that_learn(model):
    """Numbers of the stages of which a weight learns, and the other layers; parts of blocks do not count."""
    found = set()
    for weight in model.trainable_weights:
        place = re.search(r"(?:stages|downsample_layers)_(\d)|blocks|stem", weight.path)
        found.add(int(place[1] or 0) if place else weight.path.split("/")[-2])
    return found


@pytest.mark.parametrize(
    ("wrapper", "stages"), [*(("alone", n) for n in range(5)), *((name, 2) for name in list(WRAPPERS)[1:])]
)
def test_frozen_stages_are_the_first_ones_in_any_model(wrapper, stages):
    inner = body()
    model = WRAPPERS[wrapper](inner)
    rest = stages_that_learn(model) - set(range(4))
    assert rest <= {"convnext_norm", "classes"}
    finetune.freeze_stages(model, stages)
    assert stages_that_learn(model) == {*range(stages, 4), *rest}
    frozen = [
        weight for weight in model.weights if not any(weight is each for each in model.trainable_weights)
    ]
    assert len({re.search(r"(\d)_\d", weight.path)[1] for weight in frozen}) == stages
    copy = keras.models.clone_model(model)
    assert stages_that_learn(copy) == {*range(stages, 4), *rest}


def freeze_all(model, inner):
    model.trainable = False


def freeze_the_body(model, inner):
    inner.trainable = False


def freeze_each_layer(model, inner):
    for layer in inner.layers:
        layer.trainable = False


def freeze_four_stages(model, inner):
    finetune.freeze_stages(model, 4)


@pytest.mark.parametrize("wrapper", ["flat", "nested", "sequential"])
@pytest.mark.parametrize("before", [freeze_all, freeze_the_body, freeze_each_layer, freeze_four_stages])
def test_stages_that_were_frozen_learn_again(before, wrapper, tmp_path):
    """Two-stage fine-tuning: the head alone, then the last stages; from a file too."""
    inner = body(pooling=None)
    model = WRAPPERS["flat"](keras.Model(inner.input, keras.layers.GlobalMaxPooling2D()(inner.output)))
    if wrapper != "flat":
        model = WRAPPERS[wrapper](inner := body())
    before(model, inner)
    model.save(tmp_path / "model.keras")
    for each in (model, keras.saving.load_model(tmp_path / "model.keras")):
        finetune.freeze_stages(each, 2)
        head = set() if before is freeze_all else {"classes"}
        assert stages_that_learn(each) == {2, 3, "convnext_norm"} | head


def test_parts_of_later_blocks_and_layers_of_the_user_stay_as_they_are():
    inner = body()
    model = WRAPPERS["nested"](inner)
    inner.get_layer("stages_3_0").dwconv.trainable = False
    inner.get_layer("stages_0_0").trainable = False
    inner.get_layer("stages_0_0").pwconv1.trainable = True  # Keras counts it among the weights that learn
    model.get_layer("classes").trainable = False
    finetune.freeze_stages(model, 1)
    paths = [weight.path for weight in model.trainable_weights]
    assert "stages_3_0/dwconv/kernel" not in paths and "stages_3_0/norm/gamma" in paths
    assert not any(path.startswith(("stages_0", "functional", "classes")) for path in paths)


def test_an_isotropic_model_has_one_stage():
    model = body("convnext_isotropic_small", include_top=True, classes=3)
    finetune.freeze_stages(model, 1)
    assert stages_that_learn(model) == {"convnext_norm", "convnext_head"}
    with pytest.raises(
        ValueError, match=r"from 0 to 1 stages of 'convnext_isotropic_small'.*Received: stages=2"
    ):
        finetune.freeze_stages(model, 2)


@pytest.mark.parametrize("stages", [-1, 5, True, "2", None, 1.5, 2.0])
def test_the_number_of_stages_is_checked(stages):
    with pytest.raises(
        ValueError, match=f"from 0 to 4 stages of 'test_convnext2'.*Received: stages={stages!r}"
    ):
        finetune.freeze_stages(body(), stages)


def test_a_model_without_a_convnext_of_this_package_is_refused():
    image = keras.Input((8, 8, 3))
    other = keras.Model(image, keras.layers.Conv2D(3, 1, name="stages_0_0")(image), name="other")
    with pytest.raises(ValueError, match=r"in 'other'. Received the layers input_layer.*, stages_0_0"):
        finetune.freeze_stages(other, 2)
    with pytest.raises(ValueError, match=r"Expected a Keras model .*Received: 'convnext_tiny'"):
        finetune.freeze_stages("convnext_tiny", 2)
