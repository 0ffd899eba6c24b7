"""Computes in float32 on processors that have no arithmetic for bfloat16.

Before AVX-512 the libraries round partial sums to 8 bits, in the gradients above all, and take 2 to 20 times
as long as in float32. So matrix products and convolutions are computed in float32 there.
"""

import logging

import keras

from keras_convnext import _environment
from keras_convnext.layers.chunking import is_eager_on_cpu

_logger = logging.getLogger("keras_convnext")


def rounded_once(function, x, *others):
    """Returns `function(x, *others)`; where the processor lacks bfloat16, computed in float32 and rounded.

    The function takes tensors of one dtype and gives one of that dtype; its gradients too are rounded once.
    Elsewhere, on a GPU or TPU among others, it is given the tensors as they are; `x` decides.
    """
    if not is_widened(x):
        return function(x, *others)
    wide = function(*(keras.ops.cast(value, "float32") for value in (x, *others)))
    return keras.ops.cast(wide, "bfloat16")


def is_widened(x):
    """Whether `rounded_once` computes with `x` in float32."""
    backend = keras.backend.backend()
    return (
        backend in ("tensorflow", "torch")  # XLA widens by itself
        and "bfloat16" in str(x.dtype)
        and _computes_here(x)
        and not _environment.has_bfloat16(backend)
    )


def _computes_here(x):
    """Whether the processor of this machine will compute with `x`."""
    if keras.backend.backend() == "torch":
        return is_eager_on_cpu(x)  # graphs keep the plain operators: they may run elsewhere
    import tensorflow as tf

    device = getattr(x, "device", "")
    if not device:  # in a graph: TensorFlow places it later, on an accelerator if there is one
        return {found.device_type for found in tf.config.list_logical_devices()} == {"CPU"}
    return "CPU" in device.upper()


def warn_where_slow() -> None:
    """Says that the dtype policy is "bfloat16" or "mixed_bfloat16" where JAX has no accelerator."""
    if keras.backend.backend() == "jax" and keras.config.dtype_policy().compute_dtype == "bfloat16":
        import jax

        if jax.default_backend() == "cpu":
            _logger.warning(
                "JAX takes longer in bfloat16 than in float32 on a CPU. Use float32 or another backend there."
            )
