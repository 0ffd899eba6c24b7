"""Adaptive pooling, resizing to a map, and batch normalisation, against PyTorch."""

import os
import pathlib
import subprocess
import sys

import keras
import layer_contract as contract
import numpy as np
import pytest
import torch
from layer_contract import as_numpy, forward, relative_error

from keras_convnext.layers.normalization import BatchNormalization
from keras_convnext.layers.resizing import AdaptiveAveragePooling2D, ResizeLike

MAPS = ((2, 2), (3, 2), (7, 11), (16, 20), (12, 6))


def random_map(size, channels=5, seed=0):
    return np.random.default_rng(seed).normal(size=(2, *size, channels)).astype("float32")


def of_torch(function, x, *arguments, **settings):
    y = function(torch.from_numpy(x).permute(0, 3, 1, 2), *arguments, **settings)
    return y.permute(0, 2, 3, 1).numpy()


def open_model(layer, *images):
    """The layer behind inputs of any height and width."""
    inputs = [keras.Input((None, None, image.shape[-1])) for image in images]
    return keras.Model(inputs, layer(inputs if len(inputs) > 1 else inputs[0]))


@pytest.mark.parametrize("size", MAPS)
@pytest.mark.parametrize("cells", [1, 2, 3, 6])
def test_pooling_equals_pytorch(cells, size):
    x = random_map(size)
    expected = of_torch(torch.nn.functional.adaptive_avg_pool2d, x, cells)
    layer = AdaptiveAveragePooling2D(cells)
    assert relative_error(forward(layer, x), expected) <= 1e-6
    assert tuple(layer.compute_output_shape(x.shape)) == expected.shape


@pytest.mark.parametrize("size", MAPS[1:3])
def test_pooling_of_unknown_sizes_equals_pytorch(size):
    x = random_map(size)
    expected = of_torch(torch.nn.functional.adaptive_avg_pool2d, x, 3)
    model = open_model(AdaptiveAveragePooling2D(3), x)
    assert model.output_shape == (None, 3, 3, 5)
    assert relative_error(model.predict(x, verbose=0), expected) <= 1e-6


@pytest.mark.parametrize("size", MAPS)
def test_resizing_equals_pytorch(size):
    x, like = random_map(size), random_map((9, 13), 3)
    expected = of_torch(
        torch.nn.functional.interpolate, x, size=(9, 13), mode="bilinear", align_corners=False
    )
    aligned = of_torch(torch.nn.functional.interpolate, x, size=(9, 13), mode="bilinear", align_corners=True)
    model = open_model(ResizeLike(), x, like)
    assert model.output_shape == (None, None, None, 5)
    received = model.predict([x, like], verbose=0)
    assert relative_error(received, expected) <= 1e-6 < relative_error(received, aligned)


def test_one_model_resizes_photos_of_several_sizes():
    """TensorFlow's second size is one that its graph does not know."""
    image = keras.Input((None, None, 3))
    small = keras.layers.AveragePooling2D(4)(image)
    model = keras.Model(image, ResizeLike()([small, image]))
    for size in ((16, 24), (20, 8), (32, 32)):
        images = np.random.default_rng(0).normal(size=(2, *size, 3)).astype("float32")
        pooled = torch.nn.functional.avg_pool2d(torch.from_numpy(images).permute(0, 3, 1, 2), 4)
        expected = torch.nn.functional.interpolate(pooled, size, mode="bilinear").permute(0, 2, 3, 1).numpy()
        np.testing.assert_allclose(model.predict_on_batch(images), expected, atol=1e-5)


def test_a_map_of_the_wanted_size_is_handed_on():
    x = random_map((7, 11))
    np.testing.assert_array_equal(as_numpy(ResizeLike()([x, x[..., :1]])), x)


@pytest.mark.parametrize("policy", ["bfloat16", "mixed_float16"])
def test_pooling_sums_in_float32(policy):
    x = np.full((1, 64, 64, 1), 1000.0, "float32")  # whose sum is beyond float16
    y = forward(AdaptiveAveragePooling2D(1, dtype=policy), x)
    assert relative_error(y, np.full((1, 1, 1, 1), 1000.0)) < 0.005


def test_batch_norm_has_the_constants_of_pytorch():
    layer = BatchNormalization()
    assert (layer.epsilon, layer.momentum) == (1e-5, 0.9)
    layer.build((None, None, None, 5))
    contract.randomize(layer)
    weights = [np.abs(value) for value in layer.get_weights()]
    layer.set_weights(weights)
    gamma, beta, mean, variance = map(torch.from_numpy, weights)
    x = random_map((7, 11))
    expected = of_torch(torch.nn.functional.batch_norm, x, mean, variance, gamma, beta)
    assert relative_error(forward(layer, x), expected) <= 2e-6


def test_batch_norm_normalises_and_moves_as_pytorch_does():
    layer = BatchNormalization()
    x = random_map((7, 11))
    received = as_numpy(layer(keras.ops.convert_to_tensor(x), training=True))
    mean, variance = torch.zeros(5), torch.ones(5)
    expected = of_torch(torch.nn.functional.batch_norm, x, mean, variance, training=True)
    assert relative_error(received, expected) <= 1e-5
    count = 2 * 7 * 11
    biased = 0.9 + (variance.numpy() - 0.9) * (count - 1) / count
    np.testing.assert_allclose(as_numpy(layer.moving_mean.value), mean.numpy(), atol=1e-6)
    np.testing.assert_allclose(as_numpy(layer.moving_variance.value), biased, atol=1e-5)


@pytest.mark.parametrize("synchronized", [True, False])
def test_batch_norm_of_another_backend_is_loaded(synchronized):
    config = {**BatchNormalization(name="bn").get_config(), "synchronized": synchronized}
    layer = BatchNormalization.from_config(config)
    assert layer.synchronized == (keras.backend.backend() == "tensorflow")


def test_pooling_is_saved_and_loaded():
    contract.check_saving(lambda **settings: AdaptiveAveragePooling2D(3, **settings), (2, 8, 10, 5))


PART = """
import sys

import numpy as np
import torch
import torch.distributed as dist

rank, world_size, folder = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
if world_size > 1:
    dist.init_process_group("gloo", f"file://{folder}/store", rank=rank, world_size=world_size)
from keras_convnext.layers.normalization import BatchNormalization

x, upstream = (torch.from_numpy(whole)[rank::world_size] for whole in np.load(f"{folder}/in.npy"))
x.requires_grad_()
layer = BatchNormalization()
y = layer(x, training=True)
(dx,) = torch.autograd.grad((y * upstream).sum(), x)
variance = layer.moving_variance.value.detach().numpy()
np.savez(f"{folder}/{rank}_of_{world_size}.npz", y=y.detach().numpy(), dx=dx.numpy(), variance=variance)
"""


@pytest.mark.slow
@pytest.mark.skipif(keras.backend.backend() != "torch", reason="the processes are PyTorch's")
def test_batch_norm_of_two_processes_is_that_of_one(tmp_path):
    np.save(tmp_path / "in.npy", np.random.default_rng(0).normal(size=(2, 4, 3, 5, 6)).astype("float32"))
    places = [(0, 1), (0, 2), (1, 2)]
    environment = os.environ | {"PYTHONPATH": str(pathlib.Path(__file__).parents[2])}
    children = [
        subprocess.Popen([sys.executable, "-c", PART, *map(str, place), tmp_path], env=environment)
        for place in places
    ]
    assert [child.wait(timeout=200) for child in children] == [0, 0, 0]
    one, first, second = (np.load(tmp_path / f"{rank}_of_{size}.npz") for rank, size in places)
    for name in ("y", "dx"):
        np.testing.assert_allclose(first[name], one[name][0::2], atol=2e-6)
        np.testing.assert_allclose(second[name], one[name][1::2], atol=2e-6)
    np.testing.assert_allclose(first["variance"], one["variance"], atol=1e-6)
    np.testing.assert_array_equal(first["variance"], second["variance"])
