"""FCMAE, pre-training without labels: a ConvNeXt V2 sees some cells of an image and predicts the others.

Woo et al. 2023, "ConvNeXt V2: Co-designing and Scaling ConvNets with Masked Autoencoders" (arXiv:2301.00808),
section 3.1; facebookresearch/ConvNeXt-V2 at 2553895, models/fcmae.py and convnextv2_sparse.py.

The official code convolves sparse maps, on CUDA alone. Here the layers of an ordinary model compute the same
in one of two dense forms. Windows of the stem and of the layers between stages never reach over a cell, so
neighbours are read in two places only, the depthwise convolution and the sums of GRN:

"masked": maps as large as the image's; what these two read is zero at masked cells.
"tall": the seen cells of a sample stand one upon the other in a narrow image, (N, cells * side, side, C). The
    pointwise layers, nine tenths of the work, compute these alone, and GRN sums them alone; the depthwise
    convolution is given the cells at their places, with zeros between.

V1 has no GRN, and collapses under such masks; SparK, which pre-trains it, is not in this package.
"""

import keras
import numpy as np
from keras import ops

from keras_convnext import models
from keras_convnext.convnext import INITIALIZER, ConvNeXtV2Block
from keras_convnext.data.preprocessing import is_positive_integer
from keras_convnext.distribution.engine import replicas
from keras_convnext.layers.casting import cast, float32_or_wider
from keras_convnext.layers.cells import Masked, Tall, spread
from keras_convnext.layers.initializers import RandomNormal
from keras_convnext.layers.normalization import LayerNormalization
from keras_convnext.layers.pointwise import PatchConv2D, pointwise, pointwise_after_grn

FORMS = ("masked", "tall")


def kept_cells(cells: tuple[int, int], mask_ratio: float) -> int:
    """How many of (rows, columns) cells are seen: `int(L * (1 - mask_ratio))`, as in models/fcmae.py.

    ValueError where that leaves none, or all.
    """
    total = cells[0] * cells[1]
    kept = int(total * (1 - mask_ratio))
    if not 0 < kept < total:
        raise ValueError(
            f"Expected a mask_ratio that leaves between 1 and {total - 1} of {cells[0]} x {cells[1]} cells. "
            f"Received: mask_ratio={mask_ratio}, which leaves {kept}. Take another ratio, or larger images."
        )
    return kept


def draw_masks(rng: np.random.Generator, samples: int, cells: tuple[int, int], mask_ratio: float):
    """Draws which cells are seen: bool (samples, rows, columns), `kept_cells` of them True in each sample."""
    kept = kept_cells(cells, mask_ratio)
    ranks = rng.random((samples, cells[0] * cells[1])).argsort(axis=1).argsort(axis=1)
    return (ranks < kept).reshape(samples, *cells)


def patchify(images, cell: int):
    """(N, H, W, C) to (N, H / cell * W / cell, cell * cell * C): cells row by row, and their pixels too."""
    height, width, channels = images.shape[1:]
    x = ops.reshape(images, (-1, height // cell, cell, width // cell, cell, channels))
    x = ops.transpose(x, (0, 1, 3, 2, 4, 5))  # (N, rows, columns, cell, cell, C)
    return ops.reshape(x, (-1, (height // cell) * (width // cell), cell * cell * channels))


def unpatchify(patches, cells: tuple[int, int], cell: int):
    """The inverse of `patchify`: (N, rows * columns, cell * cell * C) to (N, H, W, C)."""
    rows, columns = cells
    channels = patches.shape[-1] // cell**2
    x = ops.reshape(patches, (-1, rows, columns, cell, cell, channels))
    x = ops.transpose(x, (0, 1, 3, 2, 4, 5))  # (N, rows, cell, columns, cell, C)
    return ops.reshape(x, (-1, rows * cell, columns * cell, channels))


@keras.saving.register_keras_serializable(package="keras_convnext")
class MaskedAutoencoder(keras.Model):
    """Predicts the masked cells of images from the others: the encoder, a small decoder and their loss.

    Encoder: the body of a ConvNeXt V2, its own layers, over the seen cells. Decoder: a 1x1 projection, the
    mask token at masked cells, V2 blocks over all cells, a 1x1 prediction of pixels. Loss: mean squared error
    over masked cells against the normalised pixels, each cell standardised by its own mean and unbiased
    variance. All kernels start from a normal distribution of 0.02 and biases at 0. (The official code means
    to, and draws some with a standard deviation of 1.)
    Reference: Woo et al. 2023, section 3.1; models/fcmae.py at 2553895.

    Args:
        body: ConvNeXt V2 of this package, with or without its classifier; its layers are trained in place.
        mask_ratio: float in (0, 1), share of masked cells. Default 0.6, the best in figure 8.
        decoder_width: int, channels of the decoder. Default 512; 128 costs small bodies much less and scored
            0.2 points below it (table 1c).
        decoder_depth: int, blocks of the decoder. Default 1 (table 1c).
        encoder: "masked", "tall", or None: "tall", the faster one (a step of Tiny in 0.57 of the time of
            "masked" on PyTorch, 0.51 on TensorFlow: benchmarks/runs/fcmae/speed.md), but "masked" for given
            masks in a compiled graph, which cannot count their cells. Both give the same to rounding.
        norm_pix_loss: bool, whether each cell of the target is standardised. Default True.
        cell: int, side of a cell in pixels, a multiple of the body's total stride. Default None, that stride:
            32, so images of 64 pixels have 4 cells and should be enlarged to 128.
        seed: int or None, of the masks that the model draws itself.

    Call arguments:
        inputs: images (N, H, W, C), pixels as the body takes them, 0..255, sides multiples of `cell`; or the
            pair (images, visible) with visible bool (N, H / cell, W / cell), True = seen. In a compiled graph
            "tall" takes masks of `kept_cells(...)` seen cells, as `draw_masks` gives; another number makes
            the features and the loss NaN.

    Returns:
        {"features": (N, H / stride, W / stride, C), the encoder's last map, zero where not visible;
        "prediction": (N, rows * columns, cell * cell * C), float32 or wider}; and "visible" where the model
        drew it.

    `fit(images)` draws masks anew in each step; `fit((images, visible))` takes those given. Afterwards
    `save_weights(autoencoder, "x.safetensors", layout="fcmae")` writes the encoder, for
    `load(..., weights="x.safetensors", classes=n)`.

    Raises:
        ValueError: for a body that is no ConvNeXt V2, settings out of range, images that cells do not divide.

    Example:
        >>> body = ConvNeXtV2Atto(weights=None, include_top=False)
        >>> autoencoder = MaskedAutoencoder(body, decoder_width=128)
        >>> autoencoder.compile(keras.optimizers.AdamW(1.5e-4))
        >>> history = autoencoder.fit(np.zeros((2, 64, 96, 3)), verbose=0)
    """

    def __init__(
        self,
        body,
        mask_ratio=0.6,
        decoder_width=512,
        decoder_depth=1,
        encoder=None,
        norm_pix_loss=True,
        cell=None,
        seed=None,
        **kwargs,
    ):
        super().__init__(autocast=False, **kwargs)
        self.body = _encoder_of(body)
        self.stride = int(
            np.prod([layer.strides[0] for layer in self._chain if isinstance(layer, PatchConv2D)])
        )
        self.cell = self.stride if cell is None else cell
        self.mask_ratio, self.encoder, self.norm_pix_loss, self.seed = (
            mask_ratio,
            encoder,
            norm_pix_loss,
            seed,
        )
        self.decoder_width, self.decoder_depth = decoder_width, decoder_depth
        self._check_settings()
        self.channels = self.body.input_shape[-1]
        self.seed_generator = keras.random.SeedGenerator(seed)

        dense = {"kernel_initializer": INITIALIZER, "dtype": self.dtype_policy}
        self.projection = keras.layers.Dense(decoder_width, name="proj", **dense)
        self.decoder = [
            ConvNeXtV2Block(decoder_width, dtype=self.dtype_policy, name=f"decoder_{number}")
            for number in range(decoder_depth)
        ]
        self.pred = keras.layers.Dense(self.stride**2 * self.channels, name="pred", **dense)
        self.mask_token = self.add_weight(
            shape=(decoder_width,), initializer=RandomNormal(0.02), name="mask_token"
        )
        self.projection.build((None, None, None, self.body.output_shape[-1]))
        for layer in (*self.decoder, self.pred):
            layer.build((None, None, None, decoder_width))
        self.built = True

    def call(self, inputs, training=None):
        given = isinstance(inputs, (list, tuple))
        images, visible = inputs if given else (inputs, None)
        images = float32_or_wider(ops.convert_to_tensor(images))
        cells = self._cells(images)
        visible = self._checked(visible, cells) if given else self._drawn(images, cells)
        features = self._encode(images, visible, given, training)
        outputs = {"features": features, "prediction": self._decode(features, visible, training)}
        return outputs if given else {**outputs, "visible": visible}

    def compute_loss(self, x=None, y=None, y_pred=None, sample_weight=None, training=True):
        """The mean over the masked cells of the batch, of a replica its share; in float32 or wider."""
        images, visible = x if isinstance(x, (list, tuple)) else (x, y_pred["visible"])
        errors, masked = self.errors(images, visible, y_pred["prediction"])
        return ops.sum(errors) / (ops.sum(masked) * replicas())

    def errors(self, images, visible, prediction):
        """Each cell's mean squared error, 0 where it is seen; and 1 where it is masked: both (N, L)."""
        errors = ops.mean(ops.square(prediction - self.targets(images)), axis=-1)
        masked = cast(ops.logical_not(cast(visible, "bool")), errors.dtype)
        masked = ops.reshape(masked, (-1, errors.shape[-1]))
        return errors * masked, masked

    def targets(self, images):
        """What is to be predicted for images (N, H, W, C), as `patchify` orders it; float32 or wider."""
        patches = patchify(self._normalised(float32_or_wider(ops.convert_to_tensor(images))), self.cell)
        if not self.norm_pix_loss:
            return patches
        mean, deviation = _statistics(patches)
        return (patches - mean) / deviation

    def reconstruction(self, images, visible, prediction):
        """Pictures (N, H, W, C), float in 0..255: the images where they were seen, else the prediction.

        With `norm_pix_loss` a prediction has neither brightness nor contrast: each cell is given those of the
        image.
        """
        images = float32_or_wider(ops.convert_to_tensor(images))
        rows, columns = self._cells(images)
        prediction = float32_or_wider(ops.convert_to_tensor(prediction))
        if self.norm_pix_loss:
            mean, deviation = _statistics(patchify(self._normalised(images), self.cell))
            prediction = prediction * deviation + mean
        pixels = unpatchify(prediction, (rows, columns), self.cell)
        normaliser = self._normaliser
        if normaliser is not None:
            mean, variance = (cast(value, pixels.dtype) for value in (normaliser.mean, normaliser.variance))
            pixels = ops.clip(pixels * ops.sqrt(variance) + mean, 0, 255)
        return ops.where(spread(cast(visible, "bool"), self.cell), images, pixels)

    def get_config(self):
        settings = (
            "mask_ratio",
            "decoder_width",
            "decoder_depth",
            "encoder",
            "norm_pix_loss",
            "cell",
            "seed",
        )
        return {
            "name": self.name,
            "trainable": self.trainable,
            "dtype": keras.dtype_policies.serialize(self.dtype_policy),
            "body": keras.saving.serialize_keras_object(self.body),
            **{name: getattr(self, name) for name in settings},
        }

    @classmethod
    def from_config(cls, config, custom_objects=None):
        body = keras.saving.deserialize_keras_object(config["body"], custom_objects=custom_objects)
        return cls(**{**config, "body": body})

    @property
    def _chain(self):
        """The encoder's layers, in the order of the forward pass."""
        return [layer for layer in self.body.layers if not isinstance(layer, keras.layers.InputLayer)]

    @property
    def _normaliser(self):
        first = self._chain[0]
        return first if isinstance(first, keras.layers.Normalization) else None

    def _normalised(self, images):
        return images if self._normaliser is None else self._normaliser(images)

    def _check_settings(self):
        rules = {
            "mask_ratio": (0 < self.mask_ratio < 1, "in (0, 1), the share of masked cells"),
            "decoder_width": (is_positive_integer(self.decoder_width), "a whole number from 1 up"),
            "decoder_depth": (is_positive_integer(self.decoder_depth), "a whole number from 1 up"),
            "encoder": (self.encoder in (None, *FORMS), '"masked", "tall" or None for the faster one'),
            "cell": (
                is_positive_integer(self.cell) and self.cell % self.stride == 0,
                f"a multiple of {self.stride}, the total stride of {self.body.name!r}",
            ),
        }
        for name, (is_right, expected) in rules.items():
            if not is_right:
                raise ValueError(f"{name} must be {expected}. Received: {name}={getattr(self, name)!r}")

    def _cells(self, images):
        sides = tuple(images.shape[1:3])
        if len(images.shape) != 4 or not all(isinstance(side, int) for side in sides):
            raise ValueError(f"Expected images (N, H, W, C) of known sides. Received shape {images.shape}.")
        if sides[0] % self.cell or sides[1] % self.cell:
            nearest = tuple(max(1, round(side / self.cell)) * self.cell for side in sides)
            raise ValueError(
                f"Expected images whose sides are multiples of the cell, {self.cell} pixels. Received: "
                f"{sides[0]} x {sides[1]}. Resize them, to {nearest[0]} x {nearest[1]} for example."
            )
        return sides[0] // self.cell, sides[1] // self.cell

    def _drawn(self, images, cells):
        kept, total = kept_cells(cells, self.mask_ratio), cells[0] * cells[1]
        noise = keras.random.uniform((ops.shape(images)[0], total), dtype="float32", seed=self.seed_generator)
        ranks = ops.argsort(ops.argsort(noise, axis=-1), axis=-1)
        return ops.reshape(ranks < kept, (-1, *cells))

    def _checked(self, visible, cells):
        visible = cast(ops.convert_to_tensor(visible), "bool")
        if tuple(visible.shape[1:]) != cells:
            raise ValueError(
                f"Expected visible as (N, {cells[0]}, {cells[1]}), a place for each cell of {self.cell} "
                f"pixels of the images. Received shape {tuple(visible.shape)}."
            )
        return visible

    def _encode(self, images, visible, given, training):
        """The last map, zero at masked cells."""
        cells = tuple(visible.shape[1:])
        known = _known_count(visible) if given else None
        form = self.encoder or ("masked" if given and known is None else "tall")
        kept = kept_cells(cells, self.mask_ratio) if known is None else known
        layout = Masked(visible) if form == "masked" or kept == 0 else Tall(visible, kept)
        x = layout.cut(self._normalised(images))
        for layer in self._chain:
            if isinstance(layer, ConvNeXtV2Block):
                x = _block(layer, x, layout, training)
            elif layer is not self._normaliser:
                x = layer(x)
        x = layout.paste(x)
        if form == "tall" and given and known is None:
            count = ops.sum(cast(visible, "int32"), axis=(1, 2))
            x = ops.where(ops.reshape(count == kept, (-1, 1, 1, 1)), x, float("nan"))
        return x

    def _decode(self, features, visible, training):
        x = self.projection(features)
        seen = spread(visible, features.shape[1] // visible.shape[1])
        x = ops.where(seen, x, cast(self.mask_token, x.dtype))
        for block in self.decoder:
            x = block(x, training=training)
        x = float32_or_wider(self.pred(x))  # (N, H / stride, W / stride, stride * stride * C)
        rows, columns = x.shape[1:3]
        x = ops.reshape(x, (-1, rows * columns, x.shape[3]))
        return (
            x
            if self.cell == self.stride
            else patchify(unpatchify(x, (rows, columns), self.stride), self.cell)
        )


def _block(block, x, layout, training):
    """What a `ConvNeXtV2Block` computes where only the seen cells exist."""

    def branch(x):
        y = layout.cut(block.dwconv.call(layout.paste(x)))
        y = block.norm.call(y)
        y = pointwise(block.pwconv1, y, block.activation)
        return pointwise_after_grn(block.pwconv2, layout.hide(y), block.grn)

    if training and block.config["rematerialize"]:
        branch = keras.remat(branch)
    return x + block.drop_path(branch(x), training=training)


def _statistics(patches):
    """Mean and standard deviation of each patch, (N, L, 1), of the unbiased variance + 1e-6."""
    mean = ops.mean(patches, axis=-1, keepdims=True)
    square_sum = ops.sum(ops.square(patches - mean), axis=-1, keepdims=True)
    return mean, ops.sqrt(square_sum / (patches.shape[-1] - 1) + 1e-6)


def _known_count(visible):
    """How many cells each sample sees, 0 where that differs; None in a graph, whose masks come later."""
    backend = keras.backend.backend()
    if backend == "jax":
        import jax

        is_known = not isinstance(visible, jax.core.Tracer)
    elif backend == "tensorflow":
        is_known = hasattr(visible, "numpy")
    else:
        import torch

        is_known = visible.device.type != "meta" and not torch.compiler.is_compiling()
    if not is_known:
        return None
    counts = ops.convert_to_numpy(visible).sum(axis=(1, 2))
    return int(counts[0]) if (counts == counts[0]).all() else 0


def _encoder_of(body):
    """The body alone, up to its last block, of the same layers."""
    received = f"Received: {getattr(body, 'name', body)!r}"
    if not isinstance(body, models.ConvNeXt):
        raise ValueError(
            "Expected a ConvNeXt V2 of this package, as keras_convnext.ConvNeXtV2Atto(weights=None, "
            f"include_top=False) builds it. {received}"
        )
    blocks = [
        layer for layer in body.layers if layer.name.rpartition("stages_")[1] or "blocks_" in layer.name
    ]
    if not blocks or not all(isinstance(block, ConvNeXtV2Block) for block in blocks):
        raise ValueError(
            "FCMAE needs the blocks of ConvNeXt V2, whose response normalisation keeps features apart. "
            f"{received}, a ConvNeXt V1 or a deployed model. Take one of ConvNeXtV2Atto .. ConvNeXtV2Huge; "
            "SparK, which pre-trains V1, is not in this package."
        )
    encoder = models.ConvNeXt(body.input, blocks[-1].output, name=body.name)
    for layer in encoder.layers:
        known = (keras.layers.InputLayer, keras.layers.Normalization, LayerNormalization, ConvNeXtV2Block)
        is_patches = isinstance(layer, PatchConv2D) and layer.kernel_size == layer.strides
        if not (isinstance(layer, known) or is_patches):
            raise ValueError(
                "Expected a body of the architecture's own layers at output stride 32, whose windows never "
                f"reach over a cell. {received} with the layer {layer.name!r}."
            )
    return encoder
