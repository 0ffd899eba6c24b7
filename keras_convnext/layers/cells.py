"""Where the seen cells of a masked image are kept while a network computes with them alone.

Both layouts have three functions. `cut` takes the seen cells out of a map of the whole image (N, H, W, C),
`paste` puts them back, with zeros at masked cells, and `hide` makes sums over what `cut` gives count the seen
cells alone. `visible` is bool (N, rows, columns), True = seen; a map has `side` x `side` positions in each.
"""

import keras
from keras import ops

from keras_convnext.layers.casting import cast


class Masked:
    """Maps of the whole image; `hide` sets masked cells to zero."""

    def __init__(self, visible):
        self.visible = visible

    def hide(self, x):
        return ops.where(spread(self.visible, x.shape[1] // self.visible.shape[1]), x, 0)

    paste = hide

    def cut(self, x):
        return x


class Tall:
    """Maps of `kept` cells of each sample, one upon the other: (N, kept * side, side, C)."""

    def __init__(self, visible, kept):
        self.visible, self.kept = visible, kept
        self.rows, self.columns = visible.shape[1:]
        total = self.rows * self.columns
        flat = cast(ops.reshape(visible, (-1, total)), "int32")
        number = ops.arange(total, dtype="int32")
        self.cell_of = ops.argsort(number - total * flat, axis=-1)[:, :kept]  # (N, kept), ascending
        slot = ops.reshape(ops.cumsum(flat, axis=-1) - 1, (-1, self.rows, self.columns))
        self.slot_of = ops.clip(slot, 0, kept - 1)

    def hide(self, x):
        return x

    def cut(self, x):
        return _inverse_of_each_other(self._cut, self._paste, x)

    def paste(self, x):
        return _inverse_of_each_other(self._paste, self._cut, x)

    def _cut(self, x):
        """(N, rows * side, columns * side, C) to (N, kept * side, side, C)."""
        side, channels = x.shape[1] // self.rows, x.shape[3]
        step = ops.arange(side, dtype="int32")
        cell = cast(self.cell_of, "int32")[:, :, None]
        index = (cell // self.columns * side + step) * self.columns + cell % self.columns  # (N, kept, side)
        x = _rows(x, index, self.rows * side * self.columns, side * channels)
        return ops.reshape(x, (-1, self.kept * side, side, channels))

    def _paste(self, x):
        """(N, kept * side, side, C) to (N, rows * side, columns * side, C), zero at masked cells."""
        side, channels = x.shape[2:]
        step = ops.arange(side, dtype="int32")[:, None]
        index = cast(self.slot_of, "int32")[:, :, None, :] * side + step  # (N, rows, side, columns)
        x = _rows(x, index, self.kept * side, side * channels)
        x = ops.reshape(x, (-1, self.rows * side, self.columns * side, channels))
        return ops.where(spread(self.visible, side), x, 0)


def _inverse_of_each_other(function, inverse, x):
    """`function(x)`, whose gradient is the other way; by itself it would be a sum into places, far slower."""
    if keras.backend.backend() == "torch":  # whose own is fast
        return function(x)

    @ops.custom_gradient
    def differentiable(x):
        def gradient(*arguments, upstream=None):
            return inverse(arguments[-1] if upstream is None else upstream)

        return function(x), gradient

    return differentiable(x)


def _rows(x, index, count, length):
    """Takes rows of `length` numbers from each sample's `count`, by index (N, ...): (n, length)."""
    samples = ops.reshape(
        ops.arange(ops.shape(index)[0], dtype="int32"), (-1, *(1,) * (len(index.shape) - 1))
    )
    return ops.take(ops.reshape(x, (-1, length)), ops.reshape(index + samples * count, (-1,)), axis=0)


def spread(visible, side):
    """(N, rows, columns) of cells to (N, rows * side, columns * side, 1) of positions."""
    return ops.repeat(ops.repeat(visible, side, axis=1), side, axis=2)[..., None]
