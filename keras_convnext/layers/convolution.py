"""A convolution that leaves channels-last maps as they lie in memory."""

import keras


@keras.saving.register_keras_serializable(package="keras_convnext")
class Convolution2D(keras.layers.Conv2D):
    """`keras.layers.Conv2D`, without the two copies of each map that Keras makes on PyTorch.

    Keras turns a channels-last map into a channels-first one and back in front of the library's kernel, which
    takes it as it is. Arguments, weights and result are those of `keras.layers.Conv2D`.
    """

    def convolution_op(self, inputs, kernel):
        is_plain = self.padding == "same" and self.strides == (1, 1) and self.data_format == "channels_last"
        is_odd = all(size % 2 for size in self.kernel_size)  # as much in front as behind
        if keras.backend.backend() != "torch" or not (is_plain and is_odd):
            return super().convolution_op(inputs, kernel)
        import torch

        kernel = keras.ops.convert_to_tensor(kernel)
        padding = [
            rate * (size // 2) for rate, size in zip(self.dilation_rate, self.kernel_size, strict=True)
        ]
        y = torch.nn.functional.conv2d(
            inputs.permute(0, 3, 1, 2),
            kernel.permute(3, 2, 0, 1),
            padding=padding,
            dilation=self.dilation_rate,
            groups=self.groups,
        )
        return y.permute(0, 2, 3, 1)
