"""The layers, one by one: the contract, then their arithmetic against NumPy in float64."""

import functools
import inspect
import math

import keras
import layer_contract as contract
import numpy as np
import pytest
from layer_contract import BACKEND, as_numpy, forward, gradients, randomize, relative_error

from keras_convnext import (
    ConvNeXtBlock,
    ConvNeXtV2Block,
    DepthwiseConv2D,
    GlobalResponseNormalization,
    LayerNormalization,
    LayerScale,
    RMSNormalization,
    SimpleNormalization,
    StochasticDepth,
)
from keras_convnext.layers.depthwise import depthwise_in_frames
from keras_convnext.layers.initializers import RandomNormal
from keras_convnext.layers.residual import divided_batch

TOLERANCE = 2e-6  # measured: see the controls, which must be ten times beyond it
SHAPE = (2, 5, 6, 4)

_BLOCK_WEIGHTS = {
    "dwconv/kernel": (3, 3, 4, 1),
    "dwconv/bias": (4,),
    "norm/gamma": (4,),
    "norm/beta": (4,),
    "pwconv1/kernel": (4, 16),
    "pwconv1/bias": (16,),
    "pwconv2/kernel": (16, 4),
    "pwconv2/bias": (4,),
}
LAYERS = {
    "LayerNormalization": (
        functools.partial(LayerNormalization, epsilon=1e-5),
        {"gamma": (4,), "beta": (4,)},
    ),
    "RMSNormalization": (functools.partial(RMSNormalization, epsilon=1e-5), {"gamma": (4,)}),
    "SimpleNormalization": (functools.partial(SimpleNormalization, epsilon=1e-5), {"gamma": (4,)}),
    "GlobalResponseNormalization": (
        functools.partial(GlobalResponseNormalization, epsilon=1e-5),
        {"gamma": (4,), "beta": (4,)},
    ),
    "LayerScale": (functools.partial(LayerScale, init_value=0.1), {"gamma": (4,)}),
    "StochasticDepth": (functools.partial(StochasticDepth, rate=0.25, seed=3), {}),
    "DepthwiseConv2D": (
        functools.partial(DepthwiseConv2D, kernel_size=3, dilation_rate=2),
        {"kernel": (3, 3, 4, 1), "bias": (4,)},
    ),
    "ConvNeXtBlock": (
        functools.partial(ConvNeXtBlock, dim=4, kernel_size=3, drop_path_rate=0.1, seed=3),
        _BLOCK_WEIGHTS | {"layer_scale/gamma": (4,)},
    ),
    "ConvNeXtV2Block": (
        functools.partial(ConvNeXtV2Block, dim=4, kernel_size=3, drop_path_rate=0.1, seed=3),
        _BLOCK_WEIGHTS | {"grn/gamma": (16,), "grn/beta": (16,)},
    ),
}


@pytest.fixture(params=LAYERS)
def kind(request):
    return request.param


def test_weights_have_the_listed_names_and_shapes(kind):
    make, weights = LAYERS[kind]
    contract.check_weights(make, SHAPE, weights)


def test_output_has_the_announced_shape_and_dtype(kind):
    contract.check_output_spec(LAYERS[kind][0], SHAPE)


def test_config_round_trip_gives_the_same_output(kind):
    contract.check_config(LAYERS[kind][0], SHAPE)


def test_config_holds_every_argument_of_the_paper(kind):
    make, _ = LAYERS[kind]
    config = make().get_config()
    for name, value in make.keywords.items():
        received = config[name]
        assert received == value or received == (value, value), name


def test_saved_model_loads_without_custom_objects(kind):
    contract.check_saving(LAYERS[kind][0], SHAPE)


def test_what_is_frozen_stays_frozen_in_copies_and_files(kind):
    contract.check_freezing(LAYERS[kind][0], SHAPE)


def test_training_step_moves_every_weight(kind):
    contract.check_training(LAYERS[kind][0], SHAPE)


def test_gradients_are_finite(kind):
    contract.check_gradients(LAYERS[kind][0], SHAPE)


@pytest.mark.parametrize("policy", contract.POLICIES)
def test_output_under_a_16_bit_policy_is_finite_and_close(kind, policy):
    contract.check_policy(LAYERS[kind][0], SHAPE, policy)


# The second derivation: float64, loops where the layers have tensors.


def normalise(x, gamma, beta=0.0, epsilon=1e-6, centre=True, divisor=0, mean_square=False):
    variance = np.mean(x**2, -1, keepdims=True) if mean_square else np.var(x, -1, ddof=divisor, keepdims=True)
    top = x - np.mean(x, -1, keepdims=True) if centre else x
    return gamma * top / np.sqrt(variance + epsilon) + beta


NORMS = {
    "layer_norm": lambda x, weights, epsilon: normalise(x, *weights, epsilon=epsilon),
    "rms_norm": lambda x, weights, epsilon: normalise(
        x, *weights, epsilon=epsilon, centre=False, mean_square=True
    ),
    "simple_norm": lambda x, weights, epsilon: normalise(
        x, *weights, epsilon=epsilon, centre=False, divisor=1
    ),
}


def respond(x, gamma, beta, epsilon=1e-6, over=(1, 2), mean_over=3):
    norm = np.sqrt(np.sum(x**2, axis=over, keepdims=True))
    return gamma * (x * (norm / (norm.mean(axis=mean_over, keepdims=True) + epsilon))) + beta + x


def depthwise(x, kernel, bias, dilation=1):
    side = kernel.shape[0]
    margin = (side - 1) * dilation // 2
    padded = np.zeros((x.shape[0], x.shape[1] + 2 * margin, x.shape[2] + 2 * margin, x.shape[3]))
    padded[:, margin : margin + x.shape[1], margin : margin + x.shape[2]] = x
    y = np.zeros_like(x, "float64")
    for row in range(x.shape[1]):
        for column in range(x.shape[2]):
            window = padded[
                :, row : row + margin * 2 + 1 : dilation, column : column + margin * 2 + 1 : dilation
            ]
            y[:, row, column] = np.einsum("nhwc,hwc->nc", window, kernel[..., 0])
    return y + bias


ACTIVATIONS = {
    "gelu": lambda x: x * 0.5 * (1 + np.vectorize(math.erf)(x / math.sqrt(2))),
    "gelu_tanh": lambda x: x * 0.5 * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))),
    "silu": lambda x: x / (1 + np.exp(-x)),
}


def apply_block(
    x,
    weights,
    dilation=1,
    norm="layer_norm",
    epsilon=1e-6,
    activation="gelu",
    transpose_kernel=False,
    response=respond,
):
    """A block of either version, from its weights by name."""
    get = weights.get
    kernel = get("dwconv/kernel")
    if transpose_kernel:
        kernel = kernel.transpose(1, 0, 2, 3)
    y = depthwise(x, kernel, get("dwconv/bias"), dilation)
    y = NORMS[norm](
        y, [get(f"norm/{name}") for name in ("gamma", "beta") if f"norm/{name}" in weights], epsilon
    )
    y = ACTIVATIONS[activation](y @ get("pwconv1/kernel") + get("pwconv1/bias"))
    if "grn/gamma" in weights:
        y = response(y, get("grn/gamma"), get("grn/beta"))
    y = y @ get("pwconv2/kernel") + get("pwconv2/bias")
    return x + y * get("layer_scale/gamma", 1.0)


def weights_by_name(layer):
    return {
        weight.path.split(f"{layer.name}/", 1)[-1]: contract.as_numpy(weight.value).astype("float64")
        for weight in layer.weights
    }


def random_input(shape, scale=1.0, offset=0.0, seed=7):
    return (np.random.default_rng(seed).normal(size=shape) * scale + offset).astype("float32")


@functools.cache
def output_of(kind):
    """Input, float64 weights and output of a layer of the given class, all weights random."""
    layer = {
        "LayerNormalization": LayerNormalization,
        "RMSNormalization": RMSNormalization,
        "SimpleNormalization": SimpleNormalization,
        "GlobalResponseNormalization": GlobalResponseNormalization,
        "LayerScale": LayerScale,
    }[kind]()
    x = random_input((2, 5, 4, 12), offset=0.5)
    layer.build(x.shape)
    randomize(layer)
    return (
        x.astype("float64"),
        [weight.astype("float64") for weight in layer.get_weights()],
        forward(layer, x),
    )


DERIVATIONS = {
    "LayerNormalization": lambda x, w: normalise(x, *w),
    "RMSNormalization": lambda x, w: normalise(x, *w, centre=False, mean_square=True),
    "SimpleNormalization": lambda x, w: normalise(x, *w, centre=False, divisor=1),
    "GlobalResponseNormalization": lambda x, w: respond(x, *w),
    "LayerScale": lambda x, w: x * w[0],
}
WRONG_DERIVATIONS = {
    "LayerNormalization, epsilon 1e-3": lambda x, w: normalise(x, *w, epsilon=1e-3),
    "LayerNormalization, unbiased": lambda x, w: normalise(x, *w, divisor=1),
    "LayerNormalization, weights swapped": lambda x, w: normalise(x, *w[::-1]),
    "RMSNormalization, epsilon 1e-3": lambda x, w: normalise(
        x, *w, centre=False, mean_square=True, epsilon=1e-3
    ),
    "RMSNormalization, variance": lambda x, w: normalise(x, *w, centre=False),
    "SimpleNormalization, epsilon 1e-3": lambda x, w: normalise(x, *w, centre=False, divisor=1, epsilon=1e-3),
    "SimpleNormalization, biased": lambda x, w: normalise(x, *w, centre=False),
    "SimpleNormalization, centred": lambda x, w: normalise(x, *w, divisor=1),
    "GlobalResponseNormalization, epsilon 1e-3": lambda x, w: respond(x, *w, epsilon=1e-3),
    "GlobalResponseNormalization, norm over channels": lambda x, w: respond(x, *w, over=3, mean_over=(1, 2)),
    "GlobalResponseNormalization, norm over the batch too": lambda x, w: respond(x, *w, over=(0, 1, 2)),
    "LayerScale, not scaled": lambda x, w: x,
}


@pytest.mark.parametrize("kind", DERIVATIONS)
def test_output_equals_the_formula_in_float64(kind):
    x, weights, y = output_of(kind)
    assert relative_error(y, DERIVATIONS[kind](x, weights)) < TOLERANCE


@pytest.mark.parametrize("name", WRONG_DERIVATIONS)
def test_wrong_formula_is_ten_tolerances_away(name):
    x, weights, y = output_of(name.split(",")[0])
    assert relative_error(y, WRONG_DERIVATIONS[name](x, weights)) > 10 * TOLERANCE


@pytest.mark.parametrize(
    "layer",
    [LayerNormalization, RMSNormalization, SimpleNormalization, GlobalResponseNormalization],
)
def test_epsilon_defaults_to_1e_6(layer):
    assert layer().epsilon == 1e-6  # Keras's own layer norm: 1e-3


def test_layer_norm_keeps_the_digits_of_inputs_far_from_zero():
    x = random_input((4, 3, 3, 64), scale=0.1, offset=1000)
    expected = normalise(x.astype("float64"), 1.0)
    assert relative_error(forward(LayerNormalization(), x), expected) < 1e-3
    variance = np.mean(x * x, -1, keepdims=True) - np.mean(x, -1, keepdims=True) ** 2  # in float32
    one_pass = (x - np.mean(x, -1, keepdims=True)) / np.sqrt(np.maximum(variance, 0) + 1e-6)
    assert relative_error(one_pass, expected) > 1e-2


def test_grn_is_identity_at_init():
    x = random_input((2, 5, 6, 4))
    layer = GlobalResponseNormalization()
    np.testing.assert_array_equal(forward(layer, x), x)
    randomize(layer)
    assert relative_error(forward(layer, x), x) > 0.1


def test_grn_gradient_of_a_zero_channel_is_finite():
    import torch

    x = random_input((2, 4, 4, 3))
    x[..., 1] = 0
    upstream = random_input(x.shape, seed=8)
    layer = GlobalResponseNormalization()
    layer.build(x.shape)
    randomize(layer)
    _, dx, dweights = gradients(layer, x, upstream)
    assert np.all(np.isfinite(dx)) and all(np.all(np.isfinite(gradient)) for gradient in dweights)
    # Where the channel is 0 the response is 0: what is left of the derivative is 1.
    np.testing.assert_allclose(dx[..., 1], upstream[..., 1], rtol=1e-6)
    assert dweights[0][1] == 0  # gamma

    plain = torch.tensor(x, requires_grad=True)
    norm = plain.square().sum((1, 2), keepdim=True).sqrt()
    response = norm / (norm.mean(-1, keepdim=True) + 1e-6)
    (plain * response * torch.tensor(upstream)).sum().backward()
    assert torch.isnan(plain.grad[..., 1]).all()  # the control: the plain formula


def test_grn_in_float16_does_not_overflow_at_a_root_mean_square_of_5():
    x = np.full((1, 56, 56, 3), 5, "float16") * np.array([1, -1, 0.5], "float16")
    assert np.isinf(np.sum(x[..., 0] ** 2, dtype="float16"))  # the control
    layer = GlobalResponseNormalization(dtype="float16")
    layer.build(x.shape)
    layer.set_weights([np.ones(3), np.zeros(3)])
    expected = respond(x.astype("float64"), np.ones(3), np.zeros(3))
    assert relative_error(forward(layer, x), expected) < 1e-3


def test_layer_scale_of_1e_6_keeps_three_digits_in_mixed_float16():
    x = random_input((2, 3, 3, 4), scale=100, offset=2000).astype("float16")
    y = forward(LayerScale(1e-6, dtype="mixed_float16"), x)
    expected = x.astype("float64") * 1e-6
    assert np.max(np.abs(y / expected - 1)) < 1e-3
    in_float16 = (x * np.float16(1e-6)).astype("float64")
    assert np.max(np.abs(in_float16 / expected - 1)) > 1e-2


CONVOLUTIONS = [
    (kernel_size, dilation, (7, 10) if dilation == 2 else (6, 9))
    for kernel_size in (3, 5, 7)
    for dilation in (1, 2, 4)
]


@functools.cache
def convolved(kernel_size, dilation, size):
    """Layer, input, gradient from above, and (output, gradients) of a depthwise convolution."""
    layer = DepthwiseConv2D(kernel_size, dilation)
    x, upstream = random_input((2, 2, *size, 3))
    layer.build(x.shape)
    randomize(layer)
    return layer, x, upstream, gradients(layer, x, upstream)


@pytest.mark.parametrize(("kernel_size", "dilation", "size"), CONVOLUTIONS)
def test_depthwise_convolution_equals_the_sum_over_windows(kernel_size, dilation, size):
    layer, x, _, (y, *_) = convolved(kernel_size, dilation, size)
    kernel, bias = (weight.astype("float64") for weight in layer.get_weights())
    assert relative_error(y, depthwise(x, kernel, bias, dilation)) < TOLERANCE
    transposed = depthwise(x, kernel.transpose(1, 0, 2, 3), bias, dilation)
    flipped = depthwise(x, kernel[::-1, ::-1], bias, dilation)
    assert min(relative_error(y, wrong) for wrong in (transposed, flipped)) > 10 * TOLERANCE


@pytest.mark.parametrize("kernel_size", [1, 3, 5, 7, 9, 11])
@pytest.mark.parametrize("dilation", [1, 2])
@pytest.mark.parametrize("size", [(13, 17), (2, 9), (1, 1)])
def test_depthwise_convolution_in_frames_equals_the_sum_over_windows(kernel_size, dilation, size):
    layer = DepthwiseConv2D(kernel_size, dilation)
    x = random_input((2, *size, 3))
    layer.build(x.shape)
    randomize(layer)
    y = keras.ops.convert_to_numpy(depthwise_in_frames(layer, keras.ops.convert_to_tensor(x)))
    kernel, bias = (weight.astype("float64") for weight in layer.get_weights())
    assert relative_error(y, depthwise(x, kernel, bias, dilation)) < TOLERANCE
    if kernel_size > 5 and size == (13, 17):
        for corner in ((0, 0), (0, -1), (-1, 0), (-1, -1)):
            wrong = kernel.copy()
            wrong[corner] = 0
            assert relative_error(y, depthwise(x, wrong, bias, dilation)) > 10 * TOLERANCE


@pytest.mark.parametrize(("kernel_size", "dilation", "size"), CONVOLUTIONS)
def test_depthwise_gradients_equal_those_of_torch(kernel_size, dilation, size):
    import torch

    layer, x, upstream, (_, dx, (dkernel, dbias)) = convolved(kernel_size, dilation, size)
    kernel, bias = layer.get_weights()
    inputs = [
        torch.tensor(array, requires_grad=True)
        for array in (x.transpose(0, 3, 1, 2).copy(), kernel.transpose(2, 3, 0, 1).copy(), bias)
    ]
    margin = (kernel_size - 1) * dilation // 2
    y = torch.nn.functional.conv2d(*inputs, padding=margin, dilation=dilation, groups=x.shape[-1])
    y.backward(torch.tensor(upstream.transpose(0, 3, 1, 2).copy()))
    expected_dx = inputs[0].grad.numpy().transpose(0, 2, 3, 1)
    expected_dkernel = inputs[1].grad.numpy().transpose(2, 3, 0, 1)
    assert relative_error(dx, expected_dx) < TOLERANCE
    assert relative_error(dkernel, expected_dkernel) < TOLERANCE
    assert relative_error(dbias, inputs[2].grad.numpy()) < TOLERANCE
    assert relative_error(dkernel[::-1, ::-1], expected_dkernel) > 10 * TOLERANCE
    assert relative_error(dx, upstream) > 10 * TOLERANCE


def test_depthwise_layer_equals_that_of_keras():
    layer, x, upstream, (y, dx, dweights) = convolved(5, 2, (7, 10))
    plain = keras.layers.DepthwiseConv2D(
        5, padding="same", dilation_rate=2, use_bias=True, data_format="channels_last"
    )
    plain.build(x.shape)
    assert [weight.path.split("/")[-1] for weight in plain.weights] == ["kernel", "bias"]
    assert relative_error(gradients(plain, x, upstream)[0], y) > 10 * TOLERANCE  # other weights
    plain.set_weights(layer.get_weights())
    plain_y, plain_dx, plain_dweights = gradients(plain, x, upstream)
    assert relative_error(y, plain_y) < TOLERANCE
    assert relative_error(dx, plain_dx) < TOLERANCE
    for gradient, expected in zip(dweights, plain_dweights, strict=True):
        assert relative_error(gradient, expected) < TOLERANCE


def test_depthwise_layer_without_bias_is_that_with_a_bias_of_zero():
    layer, x, upstream, _ = convolved(5, 1, (7, 10))
    bare, zero = DepthwiseConv2D(5, use_bias=False), DepthwiseConv2D(5)
    for each in (bare, zero):
        each.build(x.shape)
    kernel, bias = layer.get_weights()
    bare.set_weights([kernel])
    zero.set_weights([kernel, np.zeros_like(bias)])
    y, dx, (dkernel,) = gradients(bare, x, upstream)
    assert relative_error(y, gradients(layer, x, upstream)[0]) > 10 * TOLERANCE
    expected_y, expected_dx, (expected_dkernel, _) = gradients(zero, x, upstream)
    pairs = ((y, expected_y), (dx, expected_dx), (dkernel, expected_dkernel))
    assert all(relative_error(found, expected) < TOLERANCE for found, expected in pairs)
    copy = DepthwiseConv2D.from_config(bare.get_config())
    copy.build(x.shape)
    assert len(copy.weights) == 1 and "use_bias" not in layer.get_config()


@pytest.mark.skipif(BACKEND != "jax", reason="the path is for JAX on a CPU")
def test_jax_on_a_cpu_takes_the_shifted_products(monkeypatch):
    from keras_convnext.layers.depthwise import PATHS

    calls = []
    original = PATHS["jax"]["shifted products"]
    monkeypatch.setitem(PATHS["jax"], "shifted products", lambda *args: calls.append(1) or original(*args))
    forward(DepthwiseConv2D(3), random_input((1, 4, 4, 2)))
    assert calls


BLOCKS = {
    "v1": (ConvNeXtBlock, {}),
    "v1, rms_norm, gelu_tanh, dilated": (
        ConvNeXtBlock,
        {"kernel_size": 5, "dilation_rate": 2, "norm": "rms_norm", "activation": "gelu_tanh"},
    ),
    "v1, simple_norm, silu, no scale": (
        ConvNeXtBlock,
        {"kernel_size": 3, "norm": "simple_norm", "activation": "silu", "epsilon": 1e-5}
        | {"layer_scale_init_value": None},
    ),
    "v2": (ConvNeXtV2Block, {}),
    "v2, gelu_tanh, dilated": (
        ConvNeXtV2Block,
        {"kernel_size": 3, "dilation_rate": 4, "activation": "gelu_tanh", "epsilon": 1e-5},
    ),
}


@functools.cache
def block_output(name):
    make, settings = BLOCKS[name]
    block = make(6, **settings)
    x = random_input((2, 6, 7, 6))
    block.build(x.shape)
    randomize(block)
    arguments = {key: value for key, value in settings.items() if key in ("norm", "activation", "epsilon")}
    arguments["dilation"] = settings.get("dilation_rate", 1)
    return x.astype("float64"), weights_by_name(block), arguments, forward(block, x)


@pytest.mark.parametrize("name", BLOCKS)
def test_block_equals_its_formula_in_float64(name):
    x, weights, arguments, y = block_output(name)
    assert relative_error(y, apply_block(x, weights, **arguments)) < TOLERANCE


@pytest.mark.parametrize("name", BLOCKS)
def test_block_with_one_detail_wrong_is_ten_tolerances_away(name):
    x, weights, arguments, y = block_output(name)
    other = {"gelu": "gelu_tanh", "gelu_tanh": "gelu", "silu": "gelu"}[arguments.get("activation", "gelu")]
    wrong = {
        "epsilon": {"epsilon": 1e-3},
        "activation": {"activation": other},
        "kernel": {"transpose_kernel": True},
        "dilation": {"dilation": arguments["dilation"] + 1},
    }
    if "grn/gamma" in weights:
        wrong["grn axes"] = {"response": functools.partial(respond, over=3, mean_over=(1, 2))}
    for detail, change in wrong.items():
        error = relative_error(y, apply_block(x, weights, **{**arguments, **change}))
        assert error > 10 * TOLERANCE, detail


def test_unknown_norm_or_activation_is_refused():
    with pytest.raises(
        ValueError, match=r"Unknown norm 'batch_norm'\. Did you mean 'layer_norm'.*\? Known: "
    ):
        ConvNeXtBlock(4, norm="batch_norm")
    with pytest.raises(ValueError, match=r"Unknown activation 'relu'\. Did you mean 'gelu'\? Known: "):
        ConvNeXtV2Block(4, activation="relu")


ORDERS = {
    ConvNeXtBlock: ["dwconv", "norm", "pwconv1", "pwconv2", "layer_scale", "drop_path"],
    ConvNeXtV2Block: ["dwconv", "norm", "pwconv1", "grn", "pwconv2", "drop_path"],
}


@pytest.mark.parametrize("make", ORDERS)
def test_weights_and_seeds_of_a_block_keep_their_order(make):
    """Optimizers, runs in progress and `set_weights` go by it."""
    block = make(4, drop_path_rate=0.1)
    block.build((None, 5, 6, 4))
    assert list(dict.fromkeys(weight.path.split("/")[-2] for weight in block.weights)) == ORDERS[make][:-1]
    assert [layer.name for layer in block._layers] == ORDERS[make]
    assert "seed_generator" in block.variables[-1].path


def test_signatures_of_blocks_and_norms_name_their_arguments():
    shared = ["dim", "kernel_size", "dilation_rate", "norm", "epsilon", "activation"]
    others = ["drop_path_rate", "rematerialize", "seed", "pointwise_dtype", "kwargs"]
    assert list(inspect.signature(ConvNeXtBlock).parameters) == [*shared, "layer_scale_init_value", *others]
    assert list(inspect.signature(ConvNeXtV2Block).parameters) == [*shared, *others]
    for norm in (LayerNormalization, RMSNormalization, SimpleNormalization):
        assert list(inspect.signature(norm).parameters) == ["epsilon", "affine", "kwargs"]


@pytest.mark.parametrize("make", [ConvNeXtBlock, ConvNeXtV2Block])
def test_rematerialised_block_has_the_same_output_and_gradients(make):
    x, upstream = random_input((2, 2, 5, 6, 4))
    plain, rematerialised = make(4, kernel_size=3), make(4, kernel_size=3, rematerialize=True)
    for block in (plain, rematerialised):
        block.build(x.shape)
        randomize(block)
    y, dx, dweights = gradients(plain, x, upstream)
    other_y, other_dx, other_dweights = gradients(rematerialised, x, upstream)
    assert relative_error(other_y, y) < TOLERANCE
    assert relative_error(other_dx, dx) < TOLERANCE
    assert len(other_dweights) == len(plain.weights)
    for weight, gradient, expected in zip(plain.weights, other_dweights, dweights, strict=True):
        assert relative_error(gradient, expected) < 10 * TOLERANCE, weight.path
    randomize(rematerialised, seed=1)
    assert relative_error(gradients(rematerialised, x, upstream)[1], dx) > 100 * TOLERANCE


@pytest.mark.parametrize("make", [ConvNeXtBlock, ConvNeXtV2Block])
def test_rematerialised_block_trains_with_drop_path(make):
    contract.check_training(
        functools.partial(make, 4, kernel_size=3, rematerialize=True, drop_path_rate=0.1, seed=3), SHAPE
    )


@functools.cache
def drawn(rate, seed):
    """What one call in training makes of ones: (samples, rows, channels)."""
    ones = np.ones((4096, 2, 1, 3), "float32")
    return forward(StochasticDepth(rate, seed=seed), ones, training=True)


@pytest.mark.parametrize("rate", [0.25, 0.8])
def test_stochastic_depth_drops_whole_samples_and_scales_the_others(rate):
    y = drawn(rate, 1)
    assert np.all(y == y[:, :1, :, :1])
    np.testing.assert_allclose(np.unique(y), [0, 1 / (1 - rate)], rtol=1e-6)


@pytest.mark.parametrize("rate", [0.25, 0.8])
def test_stochastic_depth_keeps_the_expected_value(rate):
    y = drawn(rate, 1)[:, 0, 0, 0]
    deviation = math.sqrt(rate / (1 - rate) / len(y))  # of the mean of n draws
    assert abs(y.mean() - 1) < 4.5 * deviation
    assert abs(y.mean() * (1 - rate) - 1) > 4.5 * deviation  # the control: without the factor


def test_stochastic_depth_draws_each_sample_by_itself():
    kept = (drawn(0.25, 1)[:, 0, 0, 0] > 0).astype("float64")
    counts = kept.reshape(-1, 8).sum(1)  # of batches of eight
    # Binomial variance 8 * 0.75 * 0.25 = 1.5; draws shared by a batch would give 12, fixed counts 0.
    assert 1.1 < counts.var() < 1.9
    correlation = np.corrcoef(kept[:-1], kept[1:])[0, 1]
    assert abs(correlation) < 4.5 / math.sqrt(len(kept))


def test_stochastic_depth_repeats_with_the_seed():
    np.testing.assert_array_equal(
        forward(StochasticDepth(0.25, seed=1), np.ones((4096, 2, 1, 3), "float32"), training=True),
        drawn(0.25, 1),
    )
    assert np.any(drawn(0.25, 2) != drawn(0.25, 1))


def test_stochastic_depth_without_a_seed_follows_the_global_one():
    x = np.ones((256, 1), "float32")

    def draw(seed):
        keras.utils.set_random_seed(seed)
        return forward(StochasticDepth(0.5), x, training=True)

    np.testing.assert_array_equal(draw(5), draw(5))
    assert np.any(draw(5) != draw(6))


def test_stochastic_depth_draws_anew_in_every_call():
    layer = StochasticDepth(0.5, seed=1)
    x = np.ones((256, 1), "float32")
    first, second = (contract.as_numpy(layer(x, training=True)) for _ in range(2))
    assert np.any(first != second)


def test_parts_of_a_batch_drop_what_the_whole_batch_drops():
    def draws(rows):
        layer = StochasticDepth(0.5, seed=1)
        return [contract.as_numpy(layer(rows, training=True)) for _ in range(2)]

    x = np.ones((8, 2, 1, 3), "float32")
    expected, parts = draws(x), []
    for number in range(4):
        with divided_batch(lambda number=number: (4, number)):
            parts.append(draws(x[2 * number : 2 * number + 2]))
    for call in range(2):
        np.testing.assert_array_equal(np.concatenate([part[call] for part in parts]), expected[call])
    # Negative control: parts that draw for themselves.
    assert not np.array_equal(np.concatenate(4 * [draws(x[:2])[0]]), expected[0])


def test_a_part_of_a_batch_may_be_numbered_by_a_tensor():
    x = np.ones((8, 3), "float32")
    expected = forward(StochasticDepth(0.5, seed=1), x, training=True)
    with divided_batch(lambda: (4, keras.ops.convert_to_tensor(2))):
        part = forward(StochasticDepth(0.5, seed=1), x[4:6], training=True)
    np.testing.assert_array_equal(part, expected[4:6])
    np.testing.assert_array_equal(forward(StochasticDepth(0.5, seed=1), x, training=True), expected)


def test_stochastic_depth_is_identity_outside_training():
    x = random_input((16, 2, 2, 3))
    layer = StochasticDepth(0.5, seed=1)
    np.testing.assert_array_equal(forward(layer, x, training=False), x)
    np.testing.assert_array_equal(forward(layer, x), x)
    assert np.any(forward(layer, x, training=True) != x)


def test_stochastic_depth_of_rate_zero_has_no_seed_and_is_identity_in_training():
    layer = StochasticDepth(0.0)
    x = random_input((16, 2, 2, 3))
    np.testing.assert_array_equal(forward(layer, x, training=True), x)
    assert layer.variables == []
    assert len(StochasticDepth(0.1).variables) == 1


@pytest.mark.parametrize("rate", [-0.1, 1, 1.5, float("nan")])
def test_stochastic_depth_refuses_a_rate_outside_0_to_1(rate):
    with pytest.raises(ValueError, match=rf"a rate in \[0, 1\).*Received: rate={rate}$"):
        StochasticDepth(rate)


@pytest.mark.parametrize("kernel_size", [4, (3, 5), 0])
def test_depthwise_kernel_without_a_centre_is_refused(kernel_size):
    with pytest.raises(ValueError, match="one odd number, the side of its square kernel"):
        DepthwiseConv2D(kernel_size)


def test_depthwise_takes_no_settings_that_its_paths_do_not_know():
    with pytest.raises(TypeError, match="strides"):
        DepthwiseConv2D(3, strides=2)


def test_simple_norm_of_one_channel_is_refused():
    with pytest.raises(ValueError, match=r"at least 2 channels\. Received: input shape \(None, 1\)"):
        SimpleNormalization().build((None, 1))


def test_initialiser_has_the_standard_deviation_it_says_follows_the_global_seed_and_is_new_at_each_call():
    initialiser = RandomNormal()
    keras.utils.set_random_seed(3)
    first, second = (as_numpy(initialiser((200, 300))) for _ in range(2))
    keras.utils.set_random_seed(3)
    again = as_numpy(initialiser((200, 300)))
    assert np.array_equal(first, again) and not np.array_equal(first, second)
    assert abs(first.std() - 0.02) < 2e-4 and abs(first.mean()) < 5e-4
    assert np.abs(first).max() > 0.06  # not cut at two standard deviations
    fixed = RandomNormal(0.5, seed=1)
    assert np.array_equal(as_numpy(fixed((4,))), as_numpy(fixed.clone()((4,))))
