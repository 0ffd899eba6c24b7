"""The depthwise convolution of the blocks: one layer, one weight layout, a fast path for each backend.

Why it is not plain `keras.layers.DepthwiseConv2D`: XLA on a CPU runs a depthwise convolution tens of times
slower than the hardware allows. On JAX, where everything goes through XLA, it is written as a sum of shifted
products there, which XLA fuses into one pass. (On TensorFlow without an accelerator Keras leaves XLA out.)
"""

import functools

import keras

from keras_convnext.layers import RandomNormal


@keras.saving.register_keras_serializable(package="keras_convnext")
class DepthwiseConv2D(keras.layers.DepthwiseConv2D):
    """Convolves each channel of a map with its own square kernel, stride 1, output as large as the input.

    Weights: `kernel` (K, K, C, 1) and `bias` (C,), as in `keras.layers.DepthwiseConv2D`, whose result it
    equals. Zeros pad the border, (K - 1) * dilation / 2 on each side, as in the official code.

    Args:
        kernel_size: int, odd side K of the kernel.
        dilation_rate: int, distance between the kernel's taps. Default 1.

    Call arguments:
        x: (N, H, W, C), float.

    Returns:
        Same shape, in the compute dtype.

    Raises:
        ValueError: for an even kernel, which has no centre.
    """

    def __init__(self, kernel_size, dilation_rate=1, *, name=None, dtype=None, trainable=True):
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
            depthwise_initializer=RandomNormal(stddev=0.02),
            name=name,
            dtype=dtype,
            trainable=trainable,
        )

    def call(self, x):
        if keras.backend.backend() == "jax":
            import jax

            if jax.default_backend() == "cpu":
                return _shifted_products(x, self.kernel[..., 0], self.dilation_rate[0]) + self.bias
        return super().call(x)

    def get_config(self):
        config = keras.layers.Layer.get_config(self)
        return {**config, "kernel_size": self.kernel_size[0], "dilation_rate": self.dilation_rate[0]}


@functools.cache
def _jax_shifted_products():
    """The convolution and its gradient as sums of shifted products, for JAX on a CPU."""
    import jax
    import jax.numpy as jnp

    def padded(x, kernel_size, dilation):
        margin = (kernel_size - 1) * dilation // 2
        return jnp.pad(x, ((0, 0), (margin, margin), (margin, margin), (0, 0)))

    def correlate(x, kernel, dilation):
        size, (height, width) = kernel.shape[0], x.shape[1:3]
        source = padded(x, size, dilation)
        total = jnp.zeros((), jnp.promote_types(x.dtype, jnp.float32))
        for row in range(size):  # unrolled: one fused pass over the map
            for column in range(size):
                top, left = row * dilation, column * dilation
                shifted = source[:, top : top + height, left : left + width]
                total = total + shifted * kernel[row, column]
        return total.astype(x.dtype)

    @functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
    def convolve(x, kernel, dilation):
        return correlate(x, kernel, dilation)

    def forward(x, kernel, dilation):
        return correlate(x, kernel, dilation), (x, kernel)

    def backward(dilation, residuals, gradient):
        x, kernel = residuals
        size, (height, width) = kernel.shape[0], x.shape[1:3]
        source = padded(x, size, dilation)
        dtype = jnp.promote_types(x.dtype, jnp.float32)

        def kernel_row(row):  # looped over: unrolled it takes four times as long to compile, and to run
            rows = jax.lax.dynamic_slice_in_dim(source, row * dilation, height, axis=1)
            products = [
                jnp.sum(rows[:, :, left : left + width].astype(dtype) * gradient, axis=(0, 1, 2))
                for left in range(0, size * dilation, dilation)
            ]
            return jnp.stack(products)

        kernel_gradient = jax.lax.map(kernel_row, jnp.arange(size))
        x_gradient = correlate(gradient, kernel[::-1, ::-1], dilation)
        return x_gradient, kernel_gradient.astype(kernel.dtype)

    convolve.defvjp(forward, backward)
    return jax.jit(convolve, static_argnums=2)


def _shifted_products(x, kernel, dilation):
    return _jax_shifted_products()(x, kernel, dilation)
