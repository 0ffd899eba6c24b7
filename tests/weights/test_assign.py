"""Every weight of a model has a place in a ConvNeXt, by graph and not by name, or is named in an error."""

import dataclasses
import zipfile

import keras
import numpy as np
import pytest
import timm
import torch

import keras_convnext
from keras_convnext import models
from keras_convnext.variants import VARIANTS
from keras_convnext.weights import assign, resolve, torch_files

pytestmark = pytest.mark.one_backend
layers = keras.layers

IMAGES = np.random.default_rng(0).integers(0, 256, (2, 32, 32, 3)).astype("float32")


def body(pooling=None, **arguments):
    return keras_convnext.TestConvNeXt2(
        weights=None, include_top=False, pooling=pooling, **({"input_shape": (32, 32, 3)} | arguments)
    )


def nested(around, pooling=None, **arguments):
    image = keras.Input((32, 32, 3))
    return keras.Model(image, around(body(pooling, **arguments)(image)))


def flat(around, pooling=None, **arguments):
    model = body(pooling, **arguments)
    return keras.Model(model.input, around(model.output))


def sequential(around, pooling=None, **arguments):
    image = keras.Input((32, 32, 3))
    model = body(pooling, **arguments)
    features = keras.Input(model.output_shape[1:])
    return keras.Sequential([image, layers.RandomFlip(), model, keras.Model(features, around(features))])


def refused_in_a_file(model, named, folder):
    """Neither `save_weights` nor `load` takes a model for its weights alone."""
    with pytest.raises(ValueError, match=named):
        keras_convnext.save_weights(model, folder / "x.safetensors")
    model.save(folder / "m.keras")
    with pytest.raises(ValueError, match=rf"m.keras: .*{named}"):
        keras_convnext.load(folder / "m.keras")


WRAPPERS = pytest.mark.parametrize("wrapped", [nested, flat, sequential])


@WRAPPERS
@pytest.mark.parametrize("name", ["predictions", "head", "norm", "convnext_head"])
def test_a_classifier_in_another_order_of_norm_and_mean_is_refused(wrapped, name, tmp_path):
    """However it is called: norm, then mean, is not what the file's readers compute."""
    model = wrapped(lambda x: layers.Dense(3, name=name)(layers.GlobalAveragePooling2D()(x)))
    with pytest.raises(
        ValueError, match=rf"one: '{name}' .Dense.*pooling='avg', then Dense.*pass "
    ) as raised:
        keras_convnext.save_weights(model, tmp_path / "x.safetensors", "timm")
    assert not (tmp_path / "x.safetensors").exists()
    alone = str(raised.value).rpartition("alone pass ")[2][:-1]
    saved = keras_convnext.state_dict(eval(alone, {"keras": keras, "model": model}))  # the way on is one
    assert "head.weight" not in saved and "norm.weight" in saved


@WRAPPERS
@pytest.mark.parametrize("name", ["predictions", "head", "norm"])
def test_a_classifier_on_the_norm_of_the_averaged_map_is_timms(wrapped, name, tmp_path):
    model = wrapped(lambda x: layers.Dense(3, name=name)(layers.Dropout(0.5)(x)), "avg")
    path = keras_convnext.save_weights(model, tmp_path / "x.safetensors", "timm")
    peer = timm.create_model("test_convnext2", num_classes=3).eval()
    peer.load_state_dict(
        {key: torch.from_numpy(array.copy()) for key, array in torch_files.read_state_dict(path).items()}
    )
    mean, std = (np.array(values) for values in assign.around(model).normaliser)
    with torch.no_grad():
        expected = peer(torch.from_numpy((IMAGES / 255 - mean) / std).float().permute(0, 3, 1, 2))
    np.testing.assert_allclose(model.predict_on_batch(IMAGES), expected, atol=1e-4)


@pytest.mark.parametrize(
    ("around", "pooling", "name"),
    [
        (lambda x: layers.Dense(3, name="head")(x), "max", "'head'"),
        (lambda x: layers.Dense(3)(layers.Dense(8, "relu", name="hidden")(x)), "avg", "'hidden' .*'dense"),
        (
            lambda x: layers.Dense(3, name="head")(layers.BatchNormalization(name="bn")(x)),
            "avg",
            "'bn' .*'head'",
        ),
        (lambda x: layers.Dense(3, name="head")(layers.ReLU()(x)), "avg", "'head'"),
        (lambda x: layers.Dense(3, name="head")(layers.Flatten()(x)), None, "'head'"),
        (lambda x: layers.Conv2D(3, 1, name="norm")(x), None, "'norm' .Conv2D"),
    ],
    ids=["max", "hidden", "batch norm", "relu", "flatten", "convolution"],
)
def test_what_a_convnext_does_not_have_is_named(around, pooling, name):
    with pytest.raises(ValueError, match=rf"layers without one: {name}"):
        keras_convnext.state_dict(nested(around, pooling))


@pytest.mark.parametrize(
    ("front", "behind", "named"),
    [
        (layers.Rescaling(0.5, name="lost"), None, r"'lost' .Rescaling"),
        (layers.Resizing(32, 32, name="lost"), None, r"'lost' .Resizing"),
        (layers.ZeroPadding2D(1, name="lost"), None, r"'lost' .ZeroPadding2D"),
        (lambda x: x / 255, None, r"\(TrueDivide\)|\(Divide\)"),
        (layers.RandomCrop(32, 32, name="lost"), None, r"'lost' .RandomCrop"),
        (layers.RandomFlip(), layers.ReLU(name="lost"), r"'lost' .ReLU"),
        (layers.Normalization(mean=1.0, variance=4.0, name="lost"), None, r"'lost' .Normalization"),
    ],
    ids=["rescaling", "resizing", "padding", "operation", "crop", "relu", "normalization"],
)
def test_what_has_no_weights_and_would_be_lost_is_named(front, behind, named, tmp_path):
    image = keras.Input((32, 32, 3))
    x = front(image)
    x = layers.Dense(3)(body("avg", input_shape=tuple(x.shape[1:]))(x))
    model = keras.Model(image, behind(x) if behind else x)
    assert "head.weight" in keras_convnext.state_dict(model)  # the weights alone can be had
    refused_in_a_file(model, rf"between its image and its result: .*({named})", tmp_path)


@pytest.mark.parametrize(
    ("activation", "behind", "expected"),
    [
        (None, None, keras.activations.linear),
        (None, layers.Activation("linear"), keras.activations.linear),
        (None, layers.Softmax(), keras.activations.softmax),
        ("softmax", layers.Dropout(0.1), keras.activations.softmax),
        ("sigmoid", None, keras.activations.sigmoid),
        (None, layers.Activation("sigmoid"), keras.activations.sigmoid),
        ("softmax", layers.Softmax(name="lost"), None),
        (None, layers.Softmax(axis=0, name="lost"), None),
        (None, keras.ops.softmax, keras.activations.softmax),
        (None, layers.Concatenate(name="lost"), None),
    ],
)
def test_a_classifier_keeps_its_activation(activation, behind, expected, tmp_path, caplog):
    image = keras.Input((32, 32, 3))
    x = layers.Dense(3, activation)(body("avg")(image))
    if isinstance(behind, layers.Concatenate):
        x = behind([image[:, 0, 0], x])  # which it reads second
    elif behind:
        x = behind(x)
    model = keras.Model(image, x)
    model.save(tmp_path / "m.keras")
    if expected is None:
        with pytest.raises(ValueError, match="'lost'"):
            keras_convnext.convert(tmp_path / "m.keras", tmp_path / "copy.keras")
        return
    keras_convnext.convert(tmp_path / "m.keras", tmp_path / "copy.keras")
    copy = keras.saving.load_model(tmp_path / "copy.keras")
    for other in (keras_convnext.load(tmp_path / "m.keras"), copy):
        np.testing.assert_allclose(other.predict_on_batch(IMAGES), model.predict_on_batch(IMAGES), atol=1e-5)
        assert other.get_layer("head").activation is expected
    fresh = keras_convnext.load(tmp_path / "m.keras", new_head=True, classes=4)
    assert fresh.get_layer("head").activation is keras.activations.softmax
    assert not caplog.records
    keras_convnext.convert(tmp_path / "m.keras", tmp_path / "x.safetensors", "timm")
    keras_convnext.save_weights(model, tmp_path / "x.pth", "timm")
    said = [record.getMessage() for record in caplog.records]
    assert len(said) == (2 if expected is keras.activations.sigmoid else 0), said
    assert all("load it with classifier_activation='sigmoid'" in line for line in said)


@keras.saving.register_keras_serializable("tests")
class Doubled(keras.Model):
    def call(self, x, training=None, mask=None):
        return 2 * super().call(x, training, mask)


@keras.saving.register_keras_serializable("tests")
class Halving(layers.Dropout):
    def call(self, x, training=False):
        return x / 2


def _twice(x):
    layer = layers.Dense(128)
    return layer(layer(x))


@pytest.mark.parametrize(
    ("behind", "named"),
    [
        (lambda x: [layers.Dense(3)(x), x], "2 outputs"),
        (lambda x: {"a": layers.Dense(3)(x), "b": x}, "2 outputs"),
        (_twice, r"'dense\w*' .Dense"),
        (lambda x: layers.Dense(3)(Halving(0.1, name="lost")(x)), "'lost' .Halving"),
    ],
    ids=["list", "dictionary", "twice", "subclass of dropout"],
)
def test_a_model_that_is_more_than_one_convnext_is_named(behind, named, tmp_path):
    image = keras.Input((32, 32, 3))
    model = keras.Model(image, behind(body("avg")(image)))
    refused_in_a_file(model, named, tmp_path)


def test_a_subclass_with_a_graph_is_named(tmp_path):
    inner = body("avg")
    Doubled(inner.input, inner.output, name="doubled").save(tmp_path / "m.keras")
    with pytest.raises(ValueError, match=r"'doubled' .Doubled"):
        keras_convnext.load(tmp_path / "m.keras")


def test_settings_of_layers_are_kept_or_named(tmp_path):
    path = tmp_path / "m.keras"
    dilated = body(output_stride=8)
    dilated.save(path)
    with pytest.raises(ValueError, match=r"m.keras: .*strides of downsample_layers_2_1.*output_stride=8"):
        keras_convnext.load(path)
    same = keras_convnext.load(path, output_stride=8)
    np.testing.assert_array_equal(same.predict_on_batch(IMAGES), dilated.predict_on_batch(IMAGES))

    def changed(layer):
        config = layer.get_config()
        return type(layer).from_config(config | ({"epsilon": 0.5} if layer.name == "convnext_norm" else {}))

    model = keras.models.clone_model(body("avg"), clone_function=changed)
    model.save(path)
    for target in ("copy.keras", "copy.weights.h5", "copy.safetensors", "copy.pth"):
        with pytest.raises(ValueError, match=r"m.keras: .*epsilon of norm: 0.5, not 1e-05"):
            keras_convnext.convert(path, tmp_path / target, layout="timm")
    with pytest.raises(ValueError, match=r"epsilon of norm: 0.5, not 1e-05. A .keras file keeps them"):
        keras_convnext.save_weights(model, tmp_path / "copy.safetensors", layout="timm")
    keras_convnext.save_weights(dilated, tmp_path / "copy.safetensors", layout="timm")  # as timm's own


@pytest.mark.parametrize("arguments", [{"pooling": "avg"}, {"pooling": "max"}, {"pyramid_norms": True}])
def test_a_file_without_classifier_stays_the_model_it_is(arguments, tmp_path):
    model = body(**arguments)
    model.save(tmp_path / "m.keras")
    keras_convnext.convert(tmp_path / "m.keras", tmp_path / "copy.keras")
    expected = model.predict_on_batch(IMAGES)
    for other in (
        keras_convnext.load(tmp_path / "m.keras"),
        keras.saving.load_model(tmp_path / "copy.keras"),
    ):
        keras.tree.map_structure(np.testing.assert_array_equal, other.predict_on_batch(IMAGES), expected)
    plain = keras_convnext.load(tmp_path / "m.keras", include_top=False)
    assert plain.output_shape == (None, None, None, 128)


def test_a_subclass_is_named(tmp_path):
    @keras.saving.register_keras_serializable("tests")
    class Halved(keras.Model):
        def __init__(self, inner, **arguments):
            super().__init__(**arguments)
            self.inner = inner

        def get_config(self):
            return {**super().get_config(), "inner": keras.saving.serialize_keras_object(self.inner)}

        @classmethod
        def from_config(cls, config):
            return cls(keras.saving.deserialize_keras_object(config.pop("inner")), **config)

        def call(self, x):
            return self.inner(x / 2)

    model = Halved(body(), name="halved")
    model(IMAGES)
    assert keras_convnext.state_dict(model).keys() == keras_convnext.state_dict(model.inner).keys()
    refused_in_a_file(model, r"'halved' .Halved", tmp_path)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        (b"[null, 32, 32, 3]", b"[null, 1000000000000, 32, 3]", "image_size to be .*, at most 16,384"),
        (b"[null, 32, 32, 3]", b'[null, "a", 32, 3]', "opened as a Keras model"),
        (b'"mean": [7.0, 8.0, 9.0]', b'"mean": [1e308, 0, NaN]', "mean to be three numbers"),
        (b'"variance": [4.0, 4.0, 4.0]', b'"variance": [0, 4.0, -1]', "std to be three numbers"),
        (b'"mean": [7.0, 8.0, 9.0]', b'"mean": {}', "opened as a Keras model"),
    ],
)
def test_a_model_of_no_size_or_normaliser_is_refused(old, new, message, tmp_path):
    image = keras.Input((32, 32, 3))
    normalised = layers.Normalization(mean=[7.0, 8.0, 9.0], variance=[4.0, 4.0, 4.0])(image)
    body(include_preprocessing=False, input_tensor=normalised).save(tmp_path / "m.keras")
    assert resolve.resolve(tmp_path / "m.keras").preprocessing.mean[0] == round(7 / 255, 9)  # the control
    path = tmp_path / "changed.keras"
    with zipfile.ZipFile(tmp_path / "m.keras") as source, zipfile.ZipFile(path, "w") as target:
        for name in source.namelist():
            target.writestr(
                name, source.read(name).replace(old, new) if name == "config.json" else source.read(name)
            )
    with pytest.raises(ValueError, match=rf"changed.keras.*{message}"):
        _ = resolve.resolve(path).preprocessing


def test_layers_in_front_and_two_networks_are_named():
    image = keras.Input((32, 32, 1))
    rgb = layers.Conv2D(3, 1, name="stem")(image)
    model = keras_convnext.TestConvNeXt2(weights=None, include_top=False, input_tensor=rgb)
    with pytest.raises(ValueError, match=r"without one: 'stem' .Conv2D"):
        keras_convnext.state_dict(model)
    adapted = layers.Normalization(name="adapted")
    adapted.adapt(IMAGES)
    image = keras.Input((32, 32, 3))
    with pytest.raises(ValueError, match=r"without one: 'adapted' .Normalization"):
        keras_convnext.state_dict(keras.Model(image, body()(adapted(image))))
    two = keras.Model(image, layers.Concatenate()([body(name="a")(image), body(name="b")(image)]))
    with pytest.raises(ValueError, match=r"Expected one ConvNeXt .*_downsample_layers_0_0' and '"):
        keras_convnext.state_dict(two)
    image = keras.Input((2, 32, 32, 3))
    with pytest.raises(ValueError, match=r"Expected a model made by keras_convnext.*each"):
        keras_convnext.state_dict(keras.Model(image, layers.TimeDistributed(body(), name="each")(image)))


@WRAPPERS
def test_a_file_of_a_wrapper_is_converted_whole_or_refused(wrapped, tmp_path, run):
    model = wrapped(lambda x: layers.Dense(3, name="predictions")(layers.GlobalAveragePooling2D()(x)))
    for ending in ("m.keras", "m.h5") if wrapped is nested else ("m.keras",):
        file = tmp_path / ending
        model.save(file)
        with pytest.raises(
            ValueError, match=r"Left over .2.: predictions/kernel, predictions/bias.*new_head=True"
        ):
            keras_convnext.convert(file, tmp_path / "x.pth", "timm")
        with pytest.raises(
            ValueError, match=r"no classifier of a ConvNeXt. Beside the network it holds predict"
        ):
            keras_convnext.load(file)
        with pytest.raises(
            ValueError, match=r"include_top=True asks for one. Beside the network it holds predict"
        ):
            keras_convnext.load("test_convnext2", weights=file, classes=3)
        alone = keras_convnext.load(file, include_top=False)
        image = keras.Model(alone.input, alone.get_layer("norm").output)
        inner = model.get_layer("test_convnext2") if wrapped is not flat else None
        if inner is not None:
            np.testing.assert_allclose(
                image.predict_on_batch(IMAGES), inner.predict_on_batch(IMAGES), atol=1e-5
            )
        assert keras_convnext.load(file, classes=4, new_head=True).output_shape == (None, 4)
        code, out, _ = run("info", file)
        assert code == 0 and "predictions/kernel, predictions/bias" in out


def test_the_model_of_an_h5_file_opens_again(tmp_path):
    model = keras_convnext.TestConvNeXt2(weights=None, classes=3, input_shape=(32, 32, 3))
    file = tmp_path / "m.h5"
    model.save(file)
    loaded = keras.models.load_model(file, compile=False)
    assert isinstance(loaded, keras_convnext.models.ConvNeXt)
    expected = model.predict_on_batch(IMAGES)
    np.testing.assert_array_equal(loaded.predict_on_batch(IMAGES), expected)
    path = keras_convnext.convert(file, tmp_path / "m.safetensors", "timm")
    for source in (file, path):
        again = keras_convnext.load(source, input_shape=(32, 32, 3))
        np.testing.assert_allclose(again.predict_on_batch(IMAGES), expected, atol=1e-6)
    from keras_convnext import predictor

    assert predictor.open_predictor(file).model.input_shape == (None, 32, 32, 3)


# Names in a graph.


def test_flat_graphs_take_layers_and_operations_of_keras_and_of_users():
    one = body("avg")
    table = keras.Input((3,), name="image")
    named = [layers.Normalization(name="normalization")(table), layers.Dense(2, name="head")(table)]
    unit = one.output / keras.ops.norm(one.output, axis=-1, keepdims=True)
    pooled = layers.GlobalAveragePooling2D(name="avg_pool")(layers.Conv2D(2, 1, name="stem")(one.input))
    model = keras.Model([one.input, table], layers.Concatenate()([unit, pooled, *named]))
    if keras.backend.backend() != "jax":  # Keras 3.15's norm passes JAX 0.10 a list of axes, which it refuses
        assert model.predict_on_batch([IMAGES, np.ones((2, 3))]).shape[0] == 2


def test_two_named_bodies_fit_into_one_graph():
    one, other = body("avg", name="left.1"), body("avg", name="right")
    joined = layers.Dense(2)(layers.Concatenate()([one.output, other.output]))
    model = keras.Model([one.input, other.input], joined)
    assert model.predict_on_batch([IMAGES, IMAGES]).shape == (2, 2)
    names = {layer.name for layer in model.layers}
    assert {"left_1_image", "right_image", "left_1_stages_0_0", "right_norm"} <= names
    assert set(keras_convnext.state_dict(one)) == set(keras_convnext.state_dict(body("avg")))


@pytest.mark.parametrize("name", ["test_convnext2", "mine", "stages_0_0", "head"])
def test_official_names_find_their_layers_whatever_the_model_is_called(name):
    model = keras_convnext.TestConvNeXt2(weights=None, classes=3, input_shape=(32, 32, 3), name=name)
    assert model.get_layer("head").kernel.shape == (128, 3)
    assert model.get_layer("norm").gamma.shape == (128,)
    assert model.get_layer("normalization").mean is not None and model.get_layer("image")
    assert model.get_layer(index=-1) is model.get_layer("head")
    with pytest.raises(ValueError, match=r"No such layer: none"):
        model.get_layer("none")
    assert list(model.pyramid_outputs) == ["P2", "P3", "P4", "P5"]


def test_files_with_the_names_of_before_load(tmp_path, monkeypatch):
    """`.keras` files state the names of their layers; `.weights.h5` files have none."""
    monkeypatch.setattr(models, "layer_name", lambda official, model_name=None: official)
    old = keras_convnext.TestConvNeXt2(weights=None, classes=3, input_shape=(32, 32, 3))
    monkeypatch.undo()
    assert {"image", "normalization", "norm", "head"} <= {layer.name for layer in old.layers}
    for ending in ("old.keras", "old.weights.h5", "old.h5"):
        old.save_weights(tmp_path / ending) if "weights" in ending else old.save(tmp_path / ending)
        new = keras_convnext.load(
            "test_convnext2", weights=tmp_path / ending, input_shape=(32, 32, 3), classes=3
        )
        np.testing.assert_array_equal(new.predict_on_batch(IMAGES), old.predict_on_batch(IMAGES))
    loaded = keras.models.load_model(tmp_path / "old.keras")
    assert loaded.get_layer("head").kernel.shape == (128, 3) and assign.around(loaded).normaliser is not None
    expected = keras_convnext.state_dict(new)
    for name, array in keras_convnext.state_dict(loaded).items():
        np.testing.assert_array_equal(array, expected[name])


def test_a_normaliser_is_the_one_that_the_stem_reads():
    image = keras.Input((32, 32, 3))
    adapted = layers.Normalization(name="normalization")
    adapted.adapt(IMAGES)
    bare = nested(lambda x: x)
    assert assign.around(bare).normaliser == assign.around(body()).normaliser
    plain = body(include_preprocessing=False)
    assert assign.around(keras.Model(image, plain(adapted(image)))).normaliser is None
    table = keras.Input((3,))
    other = layers.Normalization(name="normalization", mean=7.0, variance=1.0)(table)
    model = keras.Model([plain.input, table], [plain.output, other])
    assert assign.around(model).normaliser is None


def test_places_of_an_mlp_head_and_of_a_norm_in_front(monkeypatch):
    for name, expected in (
        ("convnext_large_mlp", ["norm", "pre_logits", "head"]),
        ("convnext_tiny_hnf", ["norm_pre", "head"]),
    ):
        shallow = dataclasses.replace(VARIANTS[name], depths=(1, 1, 1, 1))
        monkeypatch.setitem(VARIANTS, name, shallow)
        with keras.StatelessScope():
            model = keras_convnext.load(name, None, classes=3, input_shape=(32, 32, 3))
        assert [*assign.places(model)[0]][-len(expected) :] == expected


def test_without_a_bias_the_classifier_has_zeros():
    state = keras_convnext.state_dict(nested(lambda x: layers.Dense(3, use_bias=False)(x), "avg"))
    assert not state["head.bias"].any() and state["head.bias"].shape == (3,)
