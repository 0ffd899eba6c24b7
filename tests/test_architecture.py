"""The list of layers, which needs no Keras, is that of the models."""

import keras
import pytest

import keras_convnext
from keras_convnext.architecture import layers_of
from keras_convnext.variants import VARIANTS

# One of each stem, norm, head and version, at sides that do not divide.
ARCHITECTURES = (
    ("convnext_atto", 97), ("convnext_zepto_rms_ols", 95), ("convnext_atto_ols", 66),
    ("convnext_nano_ols", 93), ("convnext_tiny_hnf", 64), ("convnext_large_mlp", 70),
    ("convnextv2_atto", 63), ("convnext_isotropic_small", 50), ("test_convnext3", 99),
)  # fmt: skip


@pytest.mark.one_backend
@pytest.mark.parametrize(("name", "image_size"), ARCHITECTURES)
def test_channels_kernels_and_sides_are_those_of_the_model(name, image_size):
    with keras.StatelessScope():  # the weights are declared, not made
        model = keras_convnext.load(name, None, input_shape=(image_size, image_size, 3), classes=7)
    listed = layers_of(VARIANTS[name], image_size, classes=7)
    outside, blocks = [], []
    for layer in listed:
        whole = layer.name.replace(".", "_")
        if layer.part.startswith(("stages", "blocks")):
            block = model.get_layer(layer.part.replace(".", "_"))
            found = getattr(block, layer.name.rpartition(".")[2])
            *_, side, _, channels = block.output.shape
            assert layer.side_in == layer.side == side
            if layer.name.endswith("dwconv"):
                blocks.append(block.name)
                assert (layer.kernel, layer.groups) == (found.kernel_size[0], channels)
                assert layer.inputs == layer.outputs == channels
            elif layer.kind == "linear":
                assert (layer.inputs, layer.outputs) == tuple(found.kernel.shape)
        else:
            found = model.get_layer(whole)
            outside.append(found.name)
            assert (layer.inputs, layer.outputs) == (found.input.shape[-1], found.output.shape[-1])
            if layer.kind == "convolution":
                assert (layer.kernel, layer.side) == (found.kernel_size[0], found.output.shape[1])
    with_weights = [layer.name for layer in model.layers if layer.weights and layer.name != "normalization"]
    assert with_weights == sorted({*outside, *blocks}, key=with_weights.index)


@pytest.mark.one_backend
def test_norms_of_a_pyramid_stand_behind_the_stages():
    listed = layers_of(VARIANTS["test_convnext2"], 64, classes=0, pyramid_norms=True)
    assert [(layer.name, layer.outputs, layer.side) for layer in listed[-4:]] == [
        ("norm0", 32, 16), ("norm1", 64, 8), ("norm2", 96, 4), ("norm3", 128, 2),
    ]  # fmt: skip
    assert all(layer.part == "head" and layer.kind == "layer_norm" for layer in listed[-4:])
