"""Programs for keras.applications, written here, that run with another import: what they freeze and train."""

import inspect

import keras
import numpy as np
import pytest
from layer_contract import as_numpy

import keras_convnext
from keras_convnext import ConvNeXtTiny, decode_predictions, preprocess_input

pytestmark = pytest.mark.one_backend

LAYERS = keras.layers
IMAGES = np.random.default_rng(0).integers(0, 256, (4, 32, 32, 3)).astype("float32")
LABELS = np.array([0, 1, 2, 1])


@pytest.fixture(autouse=True)
def small(monkeypatch):
    """`ConvNeXtTiny` has its layers, and is as narrow as the models for tests."""
    import dataclasses

    from keras_convnext.variants import VARIANTS

    narrow = dataclasses.replace(VARIANTS["convnext_tiny"], dims=(8, 16, 24, 32), kernel_sizes=(3,) * 4)
    resolve = keras_convnext.models.resolve
    monkeypatch.setattr(keras_convnext.models, "resolve", lambda variant, *rest: resolve(narrow, *rest))


def changed(model, **settings):
    """First parts of the paths of the weights that one step changes."""
    before = model.get_weights()
    model.compile(keras.optimizers.SGD(0.1), "sparse_categorical_crossentropy", **settings)
    model.fit(IMAGES, LABELS, batch_size=4, verbose=0)
    pairs = zip(before, model.weights, strict=True)
    return {weight.path for old, weight in pairs if not np.array_equal(old, as_numpy(weight.value))}


def stage_of(paths):
    return {path.split("stages_")[1][0] for path in paths if "stages_" in path}


def test_a_frozen_base_with_a_head_and_then_all_of_it(tmp_path):
    base = ConvNeXtTiny(include_top=False, weights=None, input_shape=(32, 32, 3))
    base.trainable = False
    inputs = keras.Input((32, 32, 3))
    x = LAYERS.RandomFlip("horizontal")(inputs)
    x = base(preprocess_input(x), training=False)
    x = LAYERS.GlobalAveragePooling2D()(x)
    model = keras.Model(inputs, LAYERS.Dense(3, activation="softmax")(LAYERS.Dropout(0.2)(x)))
    assert {path.split("/")[-2] for path in changed(model)} == {model.layers[-1].name}
    model.save(tmp_path / "head.keras")
    model = keras.models.load_model(tmp_path / "head.keras")
    assert len(model.trainable_weights) == 2
    model.get_layer(base.name).trainable = True
    assert stage_of(changed(model)) == set("0123")


def test_names_of_a_picture():
    model = ConvNeXtTiny(weights=None, input_shape=(32, 32, 3))
    x = preprocess_input(np.expand_dims(IMAGES[0], axis=0))
    preds = model.predict(x, verbose=0)
    rows = decode_predictions(preds, top=3)[0]
    assert [(len(row), row[0][0], row[2]) for row in rows] == [
        (3, "n", pytest.approx(value)) for value in np.sort(preds[0])[:-4:-1]
    ]


def test_all_but_the_last_layers_of_a_pooled_base():
    """Counted from the end in blocks: the last one, the norm and the pooling are three."""
    base = ConvNeXtTiny(include_top=False, weights=None, pooling="avg", input_shape=(32, 32, 3))
    for layer in base.layers[:-3]:
        layer.trainable = False
    model = keras.Sequential([base, LAYERS.Dense(3, activation="softmax")])
    paths = changed(model)
    assert {path.split("/")[-3] for path in paths if "stages_" in path} == {"stages_3_2"}
    assert any(path.endswith("norm/gamma") for path in paths if "stages_" not in path)


def test_the_first_hundred_layers_are_all_and_the_program_is_told_so():
    """Nothing of the base would learn: a block is one layer. The same is meant by three stages."""
    base = ConvNeXtTiny(include_top=False, weights=None, input_shape=(32, 32, 3))
    with pytest.warns(
        UserWarning, match=r"among 29 layers. Received: slice\(None, 100, None\).*freeze_stages"
    ) as told:
        for layer in base.layers[:100]:
            layer.trainable = False
    assert told[0].filename == __file__
    x = LAYERS.GlobalAveragePooling2D()(base.output)
    model = keras.Model(base.input, LAYERS.Dense(3, activation="softmax")(x))
    assert stage_of(changed(model)) == set()
    keras_convnext.freeze_stages(model, 3)
    assert stage_of(changed(model)) == set("3")


def test_a_stage_by_its_name_there_is_not_found_and_the_names_here_are_listed():
    base = ConvNeXtTiny(include_top=False, weights=None, input_shape=(32, 32, 3))
    with pytest.raises(ValueError, match=r"No such layer: convnext_tiny_stage_3_block_2.*'stages_3_2'"):
        base.get_layer("convnext_tiny_stage_3_block_2_depthwise_conv")
    base.trainable = False
    for layer in base.layers:
        layer.trainable = layer.name.startswith("stages_3")  # "convnext_tiny_stage_3" there
    inputs = keras.Input((32, 32, 3))
    x = LAYERS.GlobalMaxPooling2D()(base(inputs))
    assert stage_of(changed(keras.Model(inputs, LAYERS.Dense(3, activation="softmax")(x)))) == set("3")


@pytest.mark.parametrize("part", [slice(None, 20), slice(-10, None), slice(2, -2), 3, -1])
def test_places_that_are_there_are_taken_without_a_word(part, recwarn):
    base = ConvNeXtTiny(include_top=False, weights=None, input_shape=(32, 32, 3))
    assert base.layers[part] == list(base.layers)[part] and len(base.layers) == 29
    assert not recwarn.list


def test_the_functions_take_the_arguments_of_keras_applications():
    theirs, ours = keras.applications.convnext, keras_convnext
    for name in ("preprocess_input", "decode_predictions"):
        expected = inspect.signature(getattr(theirs, name)).parameters
        received = inspect.signature(getattr(ours, name)).parameters
        assert list(received)[: len(expected)] == list(expected)
        assert [received[key].default for key in expected] == [each.default for each in expected.values()]
    assert preprocess_input(IMAGES) is IMAGES
    with pytest.raises(ValueError, match=r"channels last. Received: data_format='channels_first'"):
        preprocess_input(IMAGES, "channels_first")


@pytest.mark.slow
def test_the_table_of_the_readme_counts_what_learns(monkeypatch):
    monkeypatch.undo()
    base = ConvNeXtTiny(include_top=False, weights=None)

    def millions(choose):
        for layer in base.layers:
            layer.trainable = True
        choose(base.layers)
        return f"{sum(np.prod(weight.shape) for weight in base.trainable_weights) / 1e6:.1f}"

    def freeze(part):
        return lambda layers: [setattr(layer, "trainable", False) for layer in layers[part]]

    found = [millions(freeze(slice(20))), millions(freeze(slice(-10))), millions(freeze(slice(-2)))]
    assert found == ["19.1", "20.3", "4.8"]
    stages = [millions(lambda _, n=n: keras_convnext.freeze_stages(base, n)) for n in (1, 2, 3)]
    assert stages == ["27.6", "26.6", "15.5"]
    fourth = [
        weight for layer in base.layers if layer.name.startswith("stages_3") for weight in layer.weights
    ]
    assert round(sum(np.prod(weight.shape) for weight in fourth) / 1e6, 1) == 14.3
