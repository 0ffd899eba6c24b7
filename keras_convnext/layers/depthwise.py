"""The depthwise convolution of the blocks: one layer, one weight layout, a fast path for each backend.

Why it is not plain `keras.layers.DepthwiseConv2D`: XLA on a CPU runs a depthwise convolution tens of times
slower than the hardware allows. On JAX, where everything goes through XLA, it is written as a sum of shifted
products there, which XLA fuses into one pass. (On TensorFlow without an accelerator Keras leaves XLA out, and
TensorFlow's own kernel is fast.) On PyTorch the map stays channels-last, and no copy is made.
"""

import functools

import keras

from keras_convnext.layers.bfloat16 import rounded_once
from keras_convnext.layers.casting import cast
from keras_convnext.layers.initializers import RandomNormal


@keras.saving.register_keras_serializable(package="keras_convnext")
class DepthwiseConv2D(keras.layers.DepthwiseConv2D):
    """Convolves each channel of a map (N, H, W, C) with its own square kernel, at stride 1.

    The result has the same shape, in the compute dtype. Weights: `kernel` (K, K, C, 1) and `bias` (C,), as in
    `keras.layers.DepthwiseConv2D`, whose result it equals. Zeros pad the border, (K - 1) * dilation / 2 on
    each side, as in the official code.

    Args:
        kernel_size: int, odd side K of the kernel; ValueError for an even one, which has no centre.
        dilation_rate: int, distance between the kernel's taps. Default 1.
        use_bias: bool, whether to have `bias`. Default True; the convolutions of ResNets have none.
    """

    def __init__(self, kernel_size, dilation_rate=1, use_bias=True, *, name=None, dtype=None, trainable=True):
        if not isinstance(kernel_size, int) or kernel_size % 2 == 0:
            raise ValueError(
                "DepthwiseConv2D needs one odd number, the side of its square kernel. Received: "
                f"kernel_size={kernel_size}"
            )
        super().__init__(
            kernel_size,
            dilation_rate=dilation_rate,
            padding="same",
            data_format="channels_last",
            use_bias=use_bias,
            depthwise_initializer=RandomNormal(stddev=0.02),
            name=name,
            dtype=dtype,
            trainable=trainable,
        )

    def call(self, x):
        backend = keras.backend.backend()
        if backend not in PATHS:
            return super().call(x)
        path = PATHS[backend][chosen_path(backend, device_kind(x))]
        if self.use_bias:
            kernel, bias = kernel_and_bias(self, self.compute_dtype)
        else:
            kernel = cast(self.kernel, self.compute_dtype)
            bias = keras.ops.zeros(kernel.shape[2:3], kernel.dtype)
        return path(x, kernel, bias, self.dilation_rate[0])

    def get_config(self):
        config = keras.layers.Layer.get_config(self)
        config |= {"kernel_size": self.kernel_size[0], "dilation_rate": self.dilation_rate[0]}
        return config if self.use_bias else {**config, "use_bias": False}


def kernel_and_bias(layer, dtype):
    return [cast(value, dtype) for value in (layer.kernel, layer.bias)]


def depthwise_in_frames(layer, x):
    """What a built `DepthwiseConv2D` computes, as a sum of convolutions with at most 25 taps, for LiteRT.

    Its kernels for CPUs (XNNPACK) take up to 25 taps in one pass over the map; a kernel of 49 runs 4 to 13
    times slower than this sum (`benchmarks/litert_plans.py`). So the inner 5x5 of the kernel is one
    convolution, and around it each frame two: its first and last row as a dilated kernel of two rows, the
    rest of its first and last column as one of two columns. All are centred, so nothing is cut or padded. A
    part that would see nothing but padding, on a map smaller than the kernel, is left out.
    """
    dilation = layer.dilation_rate[0]
    kernel, bias = kernel_and_bias(layer, layer.compute_dtype)

    def convolve(part, row_step, column_step):
        return _convolution(x, part, (row_step * dilation, column_step * dilation))

    radius = layer.kernel_size[0] // 2
    core = min(radius, 2)
    height, width = x.shape[1:3]
    inner = slice(radius - core, radius + core + 1)
    y = convolve(kernel[inner, inner], 1, 1) + bias
    for frame in range(core + 1, radius + 1):
        first, side = radius - frame, 2 * frame
        span = slice(first, first + side + 1)
        between = slice(first + 1, first + side)
        if height is None or frame * dilation < height:
            y = y + convolve(kernel[first : first + side + 1 : side, span], side, 1)
        if width is None or frame * dilation < width:
            y = y + convolve(kernel[between, first : first + side + 1 : side], 1, side)
    return y


def device_kind(x) -> str:
    """Returns the kind of device that computes with `x`: "cpu", "gpu" or "tpu"."""
    if keras.backend.backend() == "jax":
        import jax

        return jax.default_backend()
    if keras.backend.backend() == "torch":
        return "gpu" if x.device.type == "cuda" else "cpu"
    return "gpu" if "GPU" in getattr(x, "device", "") else "cpu"


def chosen_path(backend: str, device: str) -> str:
    """Names the way in which `DepthwiseConv2D` computes on a backend and a kind of device.

    The choice is made whenever the layer is traced, so a saved model takes the right one wherever it is
    loaded. `python -m benchmarks.speed depthwise` prints what each one costs.
    """
    return "shifted products" if (backend, device) == ("jax", "cpu") else "library"


@functools.cache
def _jax_shifted_products():
    """The convolution and its gradients as sums of shifted products, for JAX on a CPU."""
    import jax
    import jax.numpy as jnp

    def shifted(x, size, dilation):
        """The padded map as each tap of the kernel sees it, row by row."""
        height, width = x.shape[1:3]
        margin = (size - 1) * dilation // 2
        source = jnp.pad(x, ((0, 0), (margin, margin), (margin, margin), (0, 0)))
        starts = range(0, size * dilation, dilation)
        return [source[:, top : top + height, left : left + width] for top in starts for left in starts]

    def correlate(x, kernel, bias, dilation):
        size, _, channels = kernel.shape
        total = bias.astype(jnp.promote_types(x.dtype, jnp.float32))
        taps = kernel.reshape(size * size, channels)
        for tap, values in enumerate(shifted(x, size, dilation)):  # unrolled: one fused pass over the map
            total = total + values * taps[tap]
        return total.astype(x.dtype)

    @functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
    def convolve(x, kernel, bias, dilation):
        return correlate(x, kernel, bias, dilation)

    def forward(x, kernel, bias, dilation):
        return correlate(x, kernel, bias, dilation), (x, kernel)

    def backward(dilation, residuals, gradient):
        x, kernel = residuals
        dtype = jnp.promote_types(x.dtype, jnp.float32)
        wide = gradient.astype(dtype)
        products = tuple(values.astype(dtype) * wide for values in shifted(x, kernel.shape[0], dilation))
        # One reduction of all the products reads the maps once; a reduction each takes three times as long.
        sums = jax.lax.reduce(
            products,
            (jnp.zeros((), dtype),) * len(products),
            lambda left, right: tuple(map(jnp.add, left, right)),
            dimensions=(1, 2),
        )
        # The samples by themselves: devices that share a batch then exchange one array, not one a tap.
        kernel_gradient = jnp.sum(jnp.stack(sums), axis=1).reshape(kernel.shape)
        bias_gradient = jnp.sum(wide, axis=(0, 1, 2))
        x_gradient = correlate(gradient, kernel[::-1, ::-1], jnp.zeros_like(bias_gradient), dilation)
        return x_gradient, kernel_gradient.astype(kernel.dtype), bias_gradient.astype(kernel.dtype)

    convolve.defvjp(forward, backward)
    return jax.jit(convolve, static_argnums=3)


def _shifted_products(x, kernel, bias, dilation):
    return _jax_shifted_products()(x, kernel[..., 0], bias, dilation)


def _convolution(x, kernel, rate):
    return keras.ops.depthwise_conv(
        x, kernel, strides=1, padding="same", data_format="channels_last", dilation_rate=rate
    )


def _jax_library(x, kernel, bias, dilation):
    return _convolution(x, kernel, dilation) + bias


def _tensorflow_library(x, kernel, bias, dilation):
    import tensorflow as tf

    def convolve(x, kernel, bias):
        y = tf.nn.depthwise_conv2d(x, kernel, [1, 1, 1, 1], "SAME", dilations=(dilation, dilation))
        return tf.nn.bias_add(y, bias)

    return rounded_once(convolve, x, kernel, bias)


def _torch_library(x, kernel, bias, dilation):
    import torch

    def convolve(x, kernel, bias):
        y = torch.nn.functional.conv2d(
            x.permute(0, 3, 1, 2),  # (N, C, H, W) by its shape, channels-last in memory
            kernel.permute(2, 3, 0, 1),
            bias,
            padding=(kernel.shape[0] - 1) * dilation // 2,
            dilation=dilation,
            groups=x.shape[-1],
        )
        return y.permute(0, 2, 3, 1)

    return rounded_once(convolve, x, kernel, bias)


# backend -> name -> function (x, kernel (K, K, C, 1), bias (C,), dilation) -> map
PATHS = {
    "tensorflow": {"library": _tensorflow_library},
    "jax": {"library": _jax_library, "shifted products": _shifted_products},
    "torch": {"library": _torch_library},
}
