"""The matrix products of the network, computed the fast way of each backend.

`pointwise` and `pointwise_after_grn` are for the two `keras.layers.Dense` of a block, which keep what Keras
gives them (weights, LoRA, quantisation); `PointwiseConv2D` takes their place in a model for inference only.
`PatchConv2D` is the stem and the layers between the stages.
"""

import functools

import keras

from keras_convnext import _environment
from keras_convnext.layers.bfloat16 import is_widened, rounded_once
from keras_convnext.layers.chunking import is_eager_on_cpu
from keras_convnext.layers.depthwise import device_kind, kernel_and_bias
from keras_convnext.layers.direct import Direct

TOO_SMALL = "Images must be at least 32x32: five halvings leave nothing of smaller ones"

_register = keras.saving.register_keras_serializable(package="keras_convnext")


def pointwise(layer, x, activation=None):
    """`activation(layer(x))`, with x (..., C) in the layer's compute dtype.

    `layer` is a built `keras.layers.Dense` without an activation of its own, or a `PointwiseConv2D`.
    """
    if _is_plain(layer) and _has_own_product(x):
        kernel, bias = _matrix_and_bias(layer, x.dtype)
        return _product(x, kernel, bias, activation)
    y = layer(x)
    return y if activation is None else _activate(activation, y)


def pointwise_after_grn(layer, x, grn):
    """`layer(grn(x))`, with x (N, H, W, C) in the layer's compute dtype.

    TensorFlow would pass over the map twice more to scale it. Where the kernel is smaller than the map of a
    sample, it scales the kernel for each sample instead: (x * scale + beta) @ kernel + bias is x @ (scale *
    kernel) + (beta @ kernel + bias). (On PyTorch, where the map comes in chunks, this gains nothing.)
    """
    known = all(isinstance(length, int) for length in x.shape[1:])
    smaller = known and layer.kernel.shape[-1] < x.shape[1] * x.shape[2]
    float32 = keras.backend.standardize_dtype(x.dtype) == "float32"
    if not (keras.backend.backend() == "tensorflow" and smaller and _is_plain(layer) and float32):
        return pointwise(layer, grn.call(x))
    import tensorflow as tf

    kernel, bias = _matrix_and_bias(layer, "float32")
    kernels = keras.ops.reshape(grn.scale(x), (-1, x.shape[3], 1)) * kernel  # (N, C, units)
    if grn.center:
        bias = keras.ops.matmul(keras.ops.convert_to_tensor(grn.beta), kernel) + bias
    rows = tf.reshape(x, (-1, x.shape[1] * x.shape[2], x.shape[3]))
    y = tf.nn.bias_add(tf.matmul(rows, kernels), bias)
    return tf.reshape(y, (-1, *x.shape[1:3], kernel.shape[-1]))


@_register
class PointwiseConv2D(keras.layers.Conv2D):
    """A 1x1 convolution with bias, (N, H, W, C) to (N, H, W, filters): a Dense layer, as `deploy` writes it.

    It computes the fast way of each backend; `for_litert` leaves it a convolution on TensorFlow, which the
    LiteRT converter maps to one operator without arithmetic on shapes.
    """

    def __init__(self, filters, for_litert=False, *, name=None, dtype=None, trainable=True):
        super().__init__(filters, 1, data_format="channels_last", name=name, dtype=dtype, trainable=trainable)
        self.for_litert = for_litert

    def call(self, x):
        if self.for_litert:
            return super().call(x)
        kernel, bias = _matrix_and_bias(self, self.compute_dtype)
        if _has_own_product(x):
            return _product(x, kernel, bias)
        return keras.ops.add(keras.ops.matmul(x, kernel), bias)

    def get_config(self):
        config = keras.layers.Layer.get_config(self)
        return {**config, "filters": self.filters, "for_litert": self.for_litert}


@_register
class PatchConv2D(Direct, keras.layers.Conv2D):
    """A convolution; of patches side by side, where the kernel is as large as the stride, one product.

    Libraries treat such a kernel as any other: on a CPU they cost up to ten times the product of the patches
    with the kernel, and its gradient more. Arguments, weights and result are those of `keras.layers.Conv2D`;
    maps are channels-last.
    """

    @property
    def map_weight(self):
        return self._kernel if self.groups == 1 and not self.lora_enabled else None

    def call(self, x):
        self._check(x.shape)
        x = self._checked_in_graph(x)
        if not self.use_bias or self.activation is not keras.activations.linear:
            return super().call(x)
        kernel, bias = kernel_and_bias(self, self.compute_dtype)
        patches = self._patches(x)
        if patches is not None:
            return _product(patches, keras.ops.reshape(kernel, (-1, self.filters)), bias)
        if not is_widened(x):
            return super().call(x)
        return rounded_once(lambda x, kernel, bias: self.convolution_op(x, kernel) + bias, x, kernel, bias)

    def compute_output_shape(self, input_shape):
        self._check(input_shape)
        return super().compute_output_shape(input_shape)

    def _check(self, shape):
        """Refuses maps without a place for the kernel, of which nothing would be left."""
        size = self.kernel_size[0]
        sides = [side for side in shape[1:3] if isinstance(side, int)]
        if self.padding == "valid" and min(sides, default=size) < size:
            raise ValueError(f"{TOO_SMALL}. Received a map {shape[1:3]} at {self.name!r}, of kernel {size}.")

    def _checked_in_graph(self, x):
        """The same in a graph of TensorFlow, where sides may be free."""
        if keras.backend.backend() != "tensorflow" or self.padding != "valid" or None not in x.shape[1:3]:
            return x
        import tensorflow as tf

        check = tf.debugging.assert_greater_equal(tf.shape(x)[1:3], self.kernel_size, TOO_SMALL)
        with tf.control_dependencies([check]):
            return tf.identity(x)

    def _patches(self, x):
        """(N, H / K, W / K, K * K * C); None where the plain convolution is to be taken."""
        size = self.kernel_size[0]
        side_by_side = self.padding == "valid" and self.kernel_size == self.strides == (size, size)
        known = all(isinstance(side, int) for side in x.shape[1:])
        if not (side_by_side and self.groups == 1 and known and _is_on_cpu(x)):
            return None
        height, width, channels = x.shape[1] // size, x.shape[2] // size, x.shape[3]
        x = x[:, : height * size, : width * size]
        x = keras.ops.reshape(x, (-1, height, size, width, size, channels))
        x = keras.ops.transpose(x, (0, 1, 3, 2, 4, 5))  # (N, H / K, W / K, K, K, C)
        return keras.ops.reshape(x, (-1, height, width, size * size * channels))


def _is_plain(layer):
    if isinstance(layer, PointwiseConv2D):
        return not layer.for_litert
    return layer.quantization_mode is None and layer.use_bias


def _matrix_and_bias(layer, dtype):
    """(C, D) and (D,), from a Dense layer or a 1x1 convolution."""
    kernel, bias = kernel_and_bias(layer, dtype)
    return (keras.ops.reshape(kernel, kernel.shape[-2:]) if len(kernel.shape) == 4 else kernel), bias


def _is_on_cpu(x):
    """Whether this is JAX or eager PyTorch on a CPU."""
    backend = keras.backend.backend()
    return (backend == "jax" and device_kind(x) == "cpu") or (backend == "torch" and _is_own_of_torch(x))


def _has_own_product(x):
    """Whether `_product` knows a better way than Keras's for this tensor."""
    return keras.backend.backend() == "tensorflow" or _is_on_cpu(x)


def _product(x, kernel, bias, activation=None):
    """`activation(x @ kernel + bias)` with x (..., C) and kernel (C, D): (..., D)."""
    products = {"tensorflow": tensorflow_product, "jax": jax_product, "torch": _torch_product}
    product = products.get(keras.backend.backend(), plain_product)
    return rounded_once(functools.partial(product, activation=activation), x, kernel, bias)


def plain_product(x, kernel, bias, activation):
    return _activate(activation, x @ kernel + bias)


def _activate(activation, x):
    if activation is keras.activations.gelu and keras.backend.backend() == "jax":
        # By erf; JAX's own, by erfc, takes twice as long on a CPU and differs in the last digit.
        wide = keras.ops.cast(x, keras.backend.result_type(x.dtype, "float32"))
        return keras.ops.cast(0.5 * wide * (1.0 + keras.ops.erf(wide * 0.5**0.5)), x.dtype)
    return x if activation is None else activation(x)


def jax_product(x, kernel, bias, activation):
    """On two axes: with four, XLA takes twice as long for the gradients on a CPU."""
    y = plain_product(x.reshape(-1, x.shape[-1]), kernel, bias, activation)
    return y.reshape(*x.shape[:-1], kernel.shape[-1])


def tensorflow_product(x, kernel, bias, activation):
    """On two axes, where TensorFlow fuses product, bias and exact GELU; on four it does not."""
    import tensorflow as tf

    y = tf.nn.bias_add(tf.matmul(tf.reshape(x, (-1, x.shape[-1])), kernel), bias)
    y = _activate(activation, y)
    if all(isinstance(length, int) for length in x.shape[1:]):
        return tf.reshape(y, (-1, *x.shape[1:-1], kernel.shape[-1]))
    return tf.reshape(y, tf.concat([tf.shape(x)[:-1], [kernel.shape[-1]]], axis=0))


def _torch_product(x, kernel, bias, activation):
    taken = takes_onednn(kernel.shape[1], _has_gradient(x, kernel, bias))
    return (onednn_product if taken else linear_product)(x, kernel, bias, activation)


@functools.cache
def takes_onednn(units: int, with_gradients: bool) -> bool:
    """Whether PyTorch's product of oneDNN is faster on this processor than `linear`, which calls MKL.

    With AVX-512 it takes about 0.8 of the time of `linear`; limited to AVX2 1.2 to 1.3 times it, with GELU
    up to three times. On Intel's with AVX-512 `linear` takes about 0.9 of the time of oneDNN with gradients,
    and 0.5 to 0.6 without for the 3072 units of T: benchmarks/speed/results, by `python -m benchmarks.speed
    pointwise`.
    """
    import torch

    if not (hasattr(torch.ops.mkldnn, "_linear_pointwise") and _environment.has_bfloat16("torch")):
        return False
    suits_mkl = "Intel" in _environment.cpu_name() and (with_gradients or units >= 3072)
    return torch.backends.cpu.get_cpu_capability() == "AVX512" and not suits_mkl


def _has_gradient(x, kernel, bias):
    import torch

    return torch.is_grad_enabled() and (x.requires_grad or kernel.requires_grad or bias.requires_grad)


def linear_product(x, kernel, bias, activation):
    import torch

    return _activate(activation, torch.nn.functional.linear(x, kernel.t(), bias))


def onednn_product(x, kernel, bias, activation):
    """On a CPU; with exact GELU in the same pass, where no gradient is asked for."""
    if _has_gradient(x, kernel, bias):
        y = _differentiable_product().apply(x.reshape(-1, x.shape[-1]), kernel, bias)
        y = y.reshape(*x.shape[:-1], kernel.shape[-1])
    elif activation is keras.activations.gelu:
        return _onednn(x, kernel, bias, "gelu")
    else:
        y = _onednn(x, kernel, bias)
    return _activate(activation, y)


def _onednn(x, kernel, bias, activation="none"):
    import torch

    # It has no public name. `torch.compile` builds on it; tests compare it with `linear`.
    return torch.ops.mkldnn._linear_pointwise(x, kernel.t(), bias, activation, [], "none")


def _is_own_of_torch(x):
    import torch

    # Graphs keep the plain operators.
    return is_eager_on_cpu(x) and x.numel() > 0 and x.dtype in (torch.float32, torch.bfloat16)


@functools.cache
def _differentiable_product():
    """x @ kernel + bias by oneDNN, forward and, by itself, backward."""
    import torch

    class Product(torch.autograd.Function):
        @staticmethod
        @torch.compiler.disable  # the code around it may be compiled; the compiler cannot read this operator
        def forward(x, kernel, bias):
            return _onednn(x, kernel, bias)

        @staticmethod
        def setup_context(context, inputs, output):
            x, kernel, bias = inputs
            context.save_for_backward(x, kernel)
            context.has_bias = bias is not None

        @staticmethod
        def backward(context, gradient):
            x, kernel = context.saved_tensors
            needs_x, needs_kernel, _ = context.needs_input_grad
            x_gradient = kernel_gradient = None
            if needs_x:
                x_gradient = Product.apply(gradient, kernel.t(), None)
            if needs_kernel and x.shape[1] <= gradient.shape[1]:
                kernel_gradient = Product.apply(x.t(), gradient, None)
            elif needs_kernel:  # the narrower factor in front is up to four times as fast
                kernel_gradient = Product.apply(gradient.t(), x, None).t()
            return x_gradient, kernel_gradient, gradient.sum(0) if context.has_bias else None

    return Product
