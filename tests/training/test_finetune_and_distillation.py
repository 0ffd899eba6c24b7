"""Distillation, the scale of a new head, frozen backbones and LoRA."""

import pathlib

import keras
import numpy as np
import pytest

import keras_convnext
from keras_convnext.training import finetune
from keras_convnext.training.distillation import Distillation, with_teacher
from keras_convnext.training.optimizer import AdamW
from keras_convnext.training.recipe_files import load_recipe
from keras_convnext.training.tasks import classification

RECIPES = pathlib.Path(__file__).parents[2] / "recipes"


def tiny(name="student", classes=10):
    return keras_convnext.load(
        "test_convnext",
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
    blocks = sum((1, 2, 4, 2))
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
        {"architecture": "test_convnext", "trainable": "lora:2", "data": str(RECIPES / "digits")}
    )
    model, has_new_head = classification.build_model(recipe, 10)
    assert has_new_head
    for v in model.trainable_variables:
        v.assign(np.random.default_rng(2).normal(size=v.shape).astype("float32") * 0.1)
    keras_convnext.save_weights(model, tmp_path / "x.safetensors", "timm")
    plain = keras_convnext.load(
        "test_convnext", tmp_path / "x.safetensors", input_shape=(32, 32, 3), classifier_activation=None
    )
    assert not any("lora" in v.path for v in plain.weights)
    expected = keras.ops.convert_to_numpy(model(images()))
    np.testing.assert_allclose(keras.ops.convert_to_numpy(plain(images())), expected, rtol=1e-3, atol=1e-3)
    bare = type(model)(model.inputs, model.outputs)
    bare.save_weights(tmp_path / "x.weights.h5")
    other = tiny()
    other.load_weights(tmp_path / "x.weights.h5")
    np.testing.assert_allclose(keras.ops.convert_to_numpy(other(images())), expected, rtol=1e-3, atol=1e-3)
