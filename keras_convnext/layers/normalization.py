"""The norms of the family and global response normalisation, each safe in 16-bit precision.

All of them work on the last axis of channels-last maps (N, H, W, C), or (N, C) after pooling. Weights stay
in float32 arithmetic under mixed policies (`autocast=False`), statistics are taken in float32, and the result
has the shape of the input and the layer's compute dtype.
"""

import keras
from keras import ops

from keras_convnext.layers.casting import cast, float32_or_wider

_register = keras.saving.register_keras_serializable(package="keras_convnext")


class SameShape(keras.layers.Layer):
    """A layer of the shape of its input."""

    def add_channel_weight(self, input_shape, initializer, name):
        return self.add_weight(shape=(input_shape[-1],), initializer=initializer, autocast=False, name=name)

    def compute_output_shape(self, input_shape):
        return input_shape


class _Norm(SameShape):
    """What the norms share: an epsilon, and where they are `affine` a gain for each channel."""

    def __init__(self, epsilon=1e-6, affine=True, **kwargs):
        super().__init__(**kwargs)
        self.epsilon = epsilon
        self.affine = affine
        self.gamma = self.beta = None

    def build(self, input_shape):
        if self.affine:
            self.gamma = self.add_channel_weight(input_shape, "ones", "gamma")

    def divided(self, x, square):
        """`gamma * x / sqrt(square + epsilon)`, in the compute dtype."""
        y = x * ops.rsqrt(square + self.epsilon)
        return cast(y * float32_or_wider(self.gamma) if self.affine else y, self.compute_dtype)

    def get_config(self):
        return {**super().get_config(), "epsilon": self.epsilon, "affine": self.affine}


@_register
class LayerNormalization(_Norm):
    """Layer normalisation over the channels of each position.

    `y = gamma * (x - mean(x)) / sqrt(var(x) + epsilon) + beta`, mean and biased variance over the last axis
    of x (..., C), of any float dtype. Differs from `keras.layers.LayerNormalization` in two points: epsilon
    has the value of the official code (Keras: 1e-3), and the mean is subtracted before scaling, which keeps
    the digits of inputs whose mean is much larger than their standard deviation.
    Reference: Ba et al. 2016 (arXiv:1607.06450), equation 3; facebookresearch/ConvNeXt models/convnext.py,
    class LayerNorm.

    Args:
        epsilon: float, added to the variance. Default 1e-6, the official code's.
        affine: bool, whether to have gamma and beta. Default True; `deploy` folds them into what follows.

    Example:
        >>> import numpy as np
        >>> y = keras.ops.convert_to_numpy(LayerNormalization()(np.array([[1.0, 3.0]])))
        >>> [round(float(value), 3) for value in y[0]]
        [-1.0, 1.0]
    """

    def build(self, input_shape):
        super().build(input_shape)
        if self.affine:
            self.beta = self.add_channel_weight(input_shape, "zeros", "beta")

    def call(self, x):
        x = float32_or_wider(x)
        gamma, beta = (None if one is None else float32_or_wider(one) for one in (self.gamma, self.beta))
        if keras.backend.backend() == "torch":  # one fused kernel, which subtracts first
            import torch

            channels = [int(x.shape[-1])]  # Keras's ONNX export traces sizes as tensors
            y = torch.nn.functional.layer_norm(x, channels, gamma, beta, self.epsilon)
            return cast(y, self.compute_dtype)
        if keras.backend.backend() == "openvino":
            from openvino import opset13

            # Its own operator; what OpenVINO makes of the formula below costs a tenth of the whole model.
            normalised = opset13.mvn(x.output, [-1], True, self.epsilon, "INSIDE_SQRT")
            y = type(x)(normalised.output(0))
            y = y * gamma if self.affine else y
        else:
            x = x - ops.mean(x, axis=(-1,), keepdims=True)
            factor = ops.rsqrt(ops.mean(ops.square(x), axis=(-1,), keepdims=True) + self.epsilon)
            y = x * (factor * gamma if self.affine else factor)
        return cast(y + beta if self.affine else y, self.compute_dtype)


@_register
class RMSNormalization(_Norm):
    """Root-mean-square normalisation over the channels of each position, without a bias.

    `y = gamma * x / sqrt(mean(x^2) + epsilon)`.
    Reference: Zhang and Sennrich 2019 (arXiv:1910.07467), equation 4; used by timm's `convnext_atto_rms`.

    Arguments, input and result are those of `LayerNormalization`; epsilon is timm's.
    """

    def call(self, x):
        x = float32_or_wider(x)
        return self.divided(x, ops.mean(ops.square(x), axis=-1, keepdims=True))


@_register
class SimpleNormalization(_Norm):
    """Division by the standard deviation over the channels of each position, without centring or bias.

    `y = gamma * x / sqrt(var(x) + epsilon)` with the unbiased variance (divisor C - 1); the mean is not
    subtracted from `x` itself.
    Reference: timm 1.0.31 layers/norm.py, class SimpleNorm; used by `convnext_zepto_rms` and
    `convnext_zepto_rms_ols`.

    Arguments, input and result are those of `LayerNormalization`; epsilon is timm's. ValueError for one
    channel, which has no unbiased variance.
    """

    def build(self, input_shape):
        if input_shape[-1] == 1:
            raise ValueError(
                f"SimpleNormalization needs at least 2 channels. Received: input shape {tuple(input_shape)}"
            )
        super().build(input_shape)

    def call(self, x):
        x = float32_or_wider(x)
        centred = x - ops.mean(x, axis=-1, keepdims=True)
        variance = ops.sum(ops.square(centred), axis=-1, keepdims=True) / (x.shape[-1] - 1)
        return self.divided(x, variance)


@_register
class GlobalResponseNormalization(SameShape):
    """Global response normalisation (GRN), the layer that ConvNeXt V2 adds.

    `g_c = ||x_c||_2` over height and width, `n_c = g_c / (mean_c(g) + 1e-6)`, `y = gamma * (x * n) + beta +
    x`, each sample of x (N, H, W, C) by itself, of any float dtype. At the start gamma and beta are 0 and the
    layer is the identity. The norm is summed in float32 (in float16 it overflows at a root mean square of 4.6
    on a 56x56 map), and its gradient is 0, not NaN, for a channel that is 0 everywhere.
    Reference: Woo et al. 2023 (arXiv:2301.00808), section 3.1, equations 1-3 and algorithm 1;
    facebookresearch/ConvNeXt-V2 models/utils.py, class GRN (no epsilon under the root).

    Args:
        epsilon: float, added to the mean norm. Default 1e-6, the official code's.
        center: bool, whether to have beta. Default True; `deploy` folds it into what follows.

    Example:
        >>> import numpy as np
        >>> x = np.ones((1, 2, 2, 3), "float32")
        >>> bool(np.all(keras.ops.convert_to_numpy(GlobalResponseNormalization()(x)) == x))
        True
    """

    def __init__(self, epsilon=1e-6, center=True, **kwargs):
        super().__init__(**kwargs)
        self.epsilon = epsilon
        self.center = center
        self.sums_by_product = True  # on TensorFlow; LiteRT's converter wants plain sums
        self.beta = None

    def build(self, input_shape):
        self.gamma = self.add_channel_weight(input_shape, "zeros", "gamma")
        if self.center:
            self.beta = self.add_channel_weight(input_shape, "zeros", "beta")

    def scale(self, x):
        """`1 + gamma * n` in float32, (N, 1, 1, C): what each channel of each sample is multiplied by."""
        x, gamma = float32_or_wider(x), float32_or_wider(self.gamma)
        if keras.backend.backend() == "torch":  # the same; Keras's functions cost 20 us each in eager mode
            import torch

            norm = torch.sqrt(torch.sum(x * x, dim=(1, 2), keepdim=True).clamp_min(1e-36))
            return torch.addcmul(
                torch.ones_like(gamma), gamma, norm / (norm.mean(-1, keepdim=True) + self.epsilon)
            )
        height, width, channels = x.shape[1:]
        known = isinstance(height, int) and isinstance(width, int)
        if keras.backend.backend() == "tensorflow" and known and self.sums_by_product:
            # As a product, which takes two thirds of the time of TensorFlow's reduction over two axes.
            squares = ops.reshape(ops.square(x), (-1, height * width, channels))
            square_sum = ops.expand_dims(ops.matmul(ops.ones((1, height * width), x.dtype), squares), 1)
        else:
            square_sum = ops.sum(ops.square(x), axis=(1, 2), keepdims=True)
        norm = ops.sqrt(ops.maximum(square_sum, 1e-36))  # not of 0, where the slope is infinite
        response = norm / (ops.mean(norm, axis=-1, keepdims=True) + self.epsilon)
        return 1.0 + gamma * response

    def call(self, x):
        scale = self.scale(x)
        x = float32_or_wider(x)
        if not self.center:
            return cast(x * scale, self.compute_dtype)
        beta = float32_or_wider(self.beta)
        if keras.backend.backend() == "torch":
            import torch

            y = torch.addcmul(beta, x, scale)  # one pass over the widest map of the block
        else:
            y = x * scale + beta
        return cast(y, self.compute_dtype)

    def get_config(self):
        return {**super().get_config(), "epsilon": self.epsilon, "center": self.center}


@_register
class BatchNormalization(keras.layers.BatchNormalization):
    """Batch normalisation with PyTorch's constants, over the whole batch on several devices too.

    Keras's own has epsilon 1e-3 and momentum 0.99. On TensorFlow replicas share their sums
    (`synchronized`, which Keras has there alone), on JAX one program sees the whole batch, and processes of
    PyTorch, whose parts are equal, average here. A saved model may be loaded on another backend. The moving
    variance is, as Keras's, that of the batch: PyTorch's is larger by n / (n - 1) for n values of a channel.
    Reference: Ioffe and Szegedy 2015 (arXiv:1502.03167), algorithms 1 and 2; `torch.nn.BatchNorm2d`.

    Args:
        momentum: float, share that the moving averages keep at each step. Default 0.9, PyTorch's 0.1.
        epsilon: float, added to the variance. Default 1e-5, PyTorch's.
        synchronized: chosen by the backend; what a saved model says of it is left out.

    Other arguments are Keras's.
    """

    def __init__(self, momentum=0.9, epsilon=1e-5, synchronized=None, **kwargs):
        synchronized = keras.backend.backend() == "tensorflow"
        super().__init__(momentum=momentum, epsilon=epsilon, synchronized=synchronized, **kwargs)

    def call(self, inputs, training=None, mask=None):
        is_plain = mask is None and self.scale and self.center and not self.renorm
        if keras.backend.backend() != "torch" or (training and self.trainable) or not is_plain:
            return super().call(inputs, training=training, mask=mask)
        import torch  # one kernel, where Keras passes over the map three times

        x = float32_or_wider(inputs)
        weights = (self.moving_mean, self.moving_variance, self.gamma, self.beta)
        values = (cast(weight, x.dtype) for weight in weights)
        y = torch.nn.functional.batch_norm(x.movedim(self.axis, 1), *values, eps=self.epsilon)
        return cast(y.movedim(1, self.axis), self.compute_dtype)

    def _moments(self, inputs, mask):
        mean, variance = super()._moments(inputs, mask)
        world_size = _torch_processes()
        if world_size == 1:
            return mean, variance
        import torch
        from torch.distributed.nn import functional  # whose sums have gradients

        sums = functional.all_reduce(torch.stack([mean, variance + mean**2]))
        mean, square = sums / world_size
        return mean, square - mean**2


def _torch_processes() -> int:
    """How many processes of PyTorch train together; 1 on another backend."""
    if keras.backend.backend() != "torch":
        return 1
    import torch.distributed as dist

    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1
