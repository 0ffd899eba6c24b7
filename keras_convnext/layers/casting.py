"""Tensors of a wanted dtype, without the cost of Keras's functions in eager PyTorch: 5 to 20 us at each call.

A block calls these some ten times; at batch 1 Keras's functions take a tenth of the time of a small model.
"""

import keras


def cast(x, dtype):
    """`keras.ops.cast(x, dtype)`, with x a tensor or a variable, and dtype a name or the backend's own."""
    if keras.backend.backend() == "torch":
        import torch

        value = x.value if isinstance(x, keras.Variable) else x
        wanted = getattr(torch, dtype) if isinstance(dtype, str) else dtype
        if isinstance(value, torch.Tensor) and value.dtype is wanted:
            return value
    return keras.ops.cast(x, dtype)


def float32_or_wider(x):
    """`x` in float32, or wider if it already is."""
    return cast(x, "float64" if "float64" in str(x.dtype) else "float32")
