"""The depthwise convolution of the blocks: one layer, one weight layout, a fast path for each backend.

Why it is not plain `keras.layers.DepthwiseConv2D`: XLA on a CPU runs depthwise convolutions some fifty times
slower than the hardware allows, and Keras compiles with XLA by default. On TensorFlow the layer asks Keras to
leave XLA out when there is no accelerator; on JAX, where there is only XLA, it is written as a sum of shifted
products, which XLA fuses.
"""

import functools

import keras


def _accelerator_present():
    return bool(keras.distribution.list_devices("gpu") or keras.distribution.list_devices("tpu"))


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
    """

    def __init__(self, kernel_size, dilation_rate=1, **kwargs):
        kwargs.setdefault("depthwise_initializer", keras.initializers.RandomNormal(stddev=0.02))
        kwargs.update(padding="same", data_format="channels_last")
        super().__init__(kernel_size, dilation_rate=dilation_rate, **kwargs)
        if keras.backend.backend() == "tensorflow" and not _accelerator_present():
            self.supports_jit = False  # a wish to Keras's trainer: compile without XLA

    def call(self, x):
        if keras.backend.backend() == "jax":
            import jax

            if jax.default_backend() == "cpu":
                y = _shifted_products(x, self.kernel[..., 0], self.dilation_rate[0])
                return y + self.bias
        return super().call(x)


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
    return convolve


def _shifted_products(x, kernel, dilation):
    return _jax_shifted_products()(x, kernel, dilation)
