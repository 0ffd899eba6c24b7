"""Layers that eager PyTorch calls without Keras's checks, 4 of 77 ms for an image of Tiny."""

import keras

from keras_convnext.layers.chunking import is_eager_on_cpu


class Direct(keras.layers.Layer):
    """A layer of one map (..., C) whose `call` does all that Keras's `__call__` would.

    Keras's `__call__` runs on other devices and backends; where anything but float32 is asked for; where the
    map is none that the layer was built for; where a hook waits; and where a graph is traced. `map_weight` is
    a variable with the channels of the map on its only axis or the last but one, None to be never called so.
    """

    differs_in_training = False

    @property
    def map_weight(self):
        return None

    def __call__(self, *args, **kwargs):
        in_training = self.differs_in_training and kwargs.get("training", True)
        if len(args) == 1 and {*kwargs} <= {"training"} and not in_training and self._needs_no_check(args[0]):
            return self.call(args[0])
        return super().__call__(*args, **kwargs)

    def _needs_no_check(self, x):
        if keras.backend.backend() != "torch" or not self.built:
            return False
        import torch

        weight = self.map_weight
        if type(x) is not torch.Tensor or x.dtype is not torch.float32 or weight is None:
            return False
        is_hooked = self._forward_hooks or self._forward_pre_hooks or self._backward_hooks
        return (
            len(weight.shape) in (1, x.ndim)
            and x.shape[-1] == weight.shape[-2:][0]
            and self.compute_dtype == self.variable_dtype == "float32"
            and weight.value.dtype is torch.float32  # not within a layer of 16 bits
            and not (is_hooked or self._backward_pre_hooks or torch.nn.modules.module._has_any_global_hook())
            and self.activity_regularizer is None
            and not self._remat_mode
            and getattr(x, "_keras_mask", None) is None
            and is_eager_on_cpu(x)
        )
