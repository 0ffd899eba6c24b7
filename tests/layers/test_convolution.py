"""The convolution of heads against that of Keras."""

import keras
import numpy as np
import pytest
from layer_contract import as_numpy, gradients, relative_error

from keras_convnext.layers.convolution import Convolution2D, ConvolutionOfMaps
from keras_convnext.layers.resizing import resize

SETTINGS = (
    {"filters": 4, "kernel_size": 3, "padding": "same", "use_bias": False},
    {"filters": 4, "kernel_size": 1, "padding": "same"},
    {"filters": 4, "kernel_size": (3, 5), "padding": "same", "dilation_rate": (2, 1)},
    {"filters": 6, "kernel_size": 3, "padding": "same", "groups": 3},
    {"filters": 4, "kernel_size": 2, "padding": "same"},  # those that it leaves to Keras
    {"filters": 4, "kernel_size": 3, "strides": 2, "padding": "valid"},
)


@pytest.mark.one_backend
@pytest.mark.parametrize("settings", SETTINGS)
def test_values_and_gradients_are_those_of_keras(settings):
    layer, peer = Convolution2D(**settings), keras.layers.Conv2D(**settings)
    rng = np.random.default_rng(0)
    x = rng.normal(size=(2, 7, 10, 3)).astype("float32")
    upstream = rng.normal(size=layer.compute_output_shape(x.shape)).astype("float32")
    layer.build(x.shape)
    peer.build(x.shape)
    peer.set_weights([rng.normal(size=weight.shape) for weight in peer.weights])
    layer.set_weights(peer.get_weights())
    received, expected = gradients(layer, x, upstream), gradients(peer, x, upstream)
    for one, other in zip([*received[:2], *received[2]], [*expected[:2], *expected[2]], strict=True):
        assert relative_error(one, other) <= 1e-6
    assert relative_error(as_numpy(layer(x[..., ::-1])), expected[0]) > 0.1  # the control


@pytest.mark.parametrize("size", [(16, 12), (25, 19)])
def test_maps_are_convolved_as_if_joined(size):
    rng = np.random.default_rng(0)
    sizes = (size, (size[0] // 2, size[1] // 2), (size[0] // 4, size[1] // 4), (1, 1), (3, 2))
    maps = [rng.normal(size=(2, *each, 2 + number)).astype("float32") for number, each in enumerate(sizes)]
    layer = ConvolutionOfMaps(5, 3)
    layer.build([each.shape for each in maps])
    layer.set_weights([rng.normal(size=weight.shape) for weight in layer.weights])
    joined = [maps[0], *(as_numpy(resize(keras.ops.convert_to_tensor(each), size)) for each in maps[1:])]
    peer = keras.layers.Conv2D(5, 3, padding="same")
    x = np.concatenate(joined, axis=-1)
    peer.build(x.shape)
    peer.set_weights(layer.get_weights())
    assert relative_error(as_numpy(layer(maps)), as_numpy(peer(x))) <= 2e-6
    layer.splits = False
    assert relative_error(as_numpy(layer(maps)), as_numpy(peer(x))) <= 2e-6
    layer.splits = True
    assert (
        relative_error(as_numpy(layer([maps[0], *(each[:, ::-1] for each in maps[1:])])), as_numpy(peer(x)))
        > 0.1
    )
