"""Calls of layers without Keras's checks: what they must still give, and where they must not happen."""

import keras
import numpy as np
import pytest

import keras_convnext
from keras_convnext.layers.direct import Direct

pytestmark = pytest.mark.skipif(keras.backend.backend() != "torch", reason="PyTorch alone calls directly")

IMAGES = np.random.default_rng(0).uniform(0, 255, (2, 64, 64, 3)).astype("float32")


@pytest.fixture
def model():
    return keras_convnext.TestConvNeXt2(weights=None, classes=3, input_shape=(64, 64, 3), seed=0)


@pytest.fixture
def direct_calls(monkeypatch):
    """Names of the layers that were called directly."""
    names = []
    needs_no_check = Direct._needs_no_check

    def noted(self, x):
        found = needs_no_check(self, x)
        if found:
            names.append(self.name)
        return found

    monkeypatch.setattr(Direct, "_needs_no_check", noted)
    return names


def outputs(model, **settings):
    import torch

    with torch.no_grad():
        return keras.ops.convert_to_numpy(model(torch.from_numpy(IMAGES), **settings))


def test_direct_calls_give_what_checked_ones_give(model, direct_calls, monkeypatch):
    direct = outputs(model, training=False)
    assert {"stages_0_0", "downsample_layers_1_0", "downsample_layers_1_1"} <= set(direct_calls)
    monkeypatch.setattr(Direct, "_needs_no_check", lambda self, x: False)
    np.testing.assert_array_equal(outputs(model, training=False), direct)


def test_training_is_checked(model, direct_calls):
    outputs(model, training=True)
    assert direct_calls and not [name for name in direct_calls if name.startswith("stages")]


def test_hooks_fire(model):
    calls = []
    model.get_layer("stages_0_0").register_forward_hook(lambda *arguments: calls.append(arguments))
    outputs(model, training=False)
    assert len(calls) == 1


def test_sixteen_bits_are_checked(direct_calls):
    keras.config.set_dtype_policy("mixed_bfloat16")
    try:
        model = keras_convnext.TestConvNeXt2(weights=None, classes=3, input_shape=(64, 64, 3))
    finally:
        keras.config.set_dtype_policy("float32")
    outputs(model, training=False)
    assert not [name for name in direct_calls if name.startswith(("stages", "downsample"))]


def test_a_float32_block_within_sixteen_bits_is_checked(model, direct_calls):
    import torch

    from keras_convnext.convnext import ConvNeXtV2Block

    class Around(keras.layers.Layer):
        def __init__(self, **kwargs):
            super().__init__(**kwargs)
            self.block = ConvNeXtV2Block(8, dtype="float32", name="inner")

        def call(self, x):
            return self.block(keras.ops.cast(x, "float32"), training=False)

    x = torch.rand(1, 8, 8, 8)
    around = Around(dtype="mixed_bfloat16")
    around(x)  # builds
    direct_calls.clear()
    around(x)
    assert not direct_calls


def test_wrong_maps_get_the_error_of_keras(model, direct_calls):
    import torch

    block = model.get_layer("stages_0_0")
    channels = block.config["dim"]
    for shape in ((1, 8, 8, channels + 1), (8, 8, channels)):
        with pytest.raises((RuntimeError, IndexError), match="Arguments received by"):
            block(torch.rand(shape), training=False)
    assert not direct_calls
