"""The public constructors, one for each architecture, and `load`.

From a call to a model: check the arguments, find the weight file, lay out the layers without allocating
anything, read the file, give every weight its value.
"""

import dataclasses
import functools
import os
from collections.abc import Sequence

import keras
import numpy as np

from keras_convnext import _messages, convnext
from keras_convnext.variants import VARIANTS, Variant
from keras_convnext.weights import catalog, keras_files, layouts, preprocessing_metadata
from keras_convnext.weights.assign import filled, placed_values
from keras_convnext.weights.resolve import (
    existing_file,
    find_file,
    find_published,
    inspect_state,
    is_path,
    read_file,
    read_for_model,
    starts_new_head,
)

IMAGENET_CLASSES = 1000  # the default of the constructors


@keras.saving.register_keras_serializable(package="keras_convnext")
class ConvNeXt(keras.Model):
    """A functional Keras model that also knows its feature pyramid.

    Made by the constructors (`ConvNeXtTiny(...)`) and `load`; everything that holds for a functional
    `keras.Model` holds for it.
    """

    @property
    def pyramid_outputs(self) -> dict:
        """The stage outputs, as Keras tensors by level: {"P2": (N, H / 4, W / 4, C), ..., "P5": ...}.

        Level n has stride 2^n with the default output stride; with `output_stride` 16 or 8 the last levels
        keep that stride. Isotropic models have one level, "P4". The maps are those after the last block of
        each stage, before any norm; with `pyramid_norms=True` each is followed by a layer norm of its own.

        Example:
            >>> model = ConvNeXtAtto(include_top=False, weights=None, input_shape=(64, 64, 3))
            >>> features = keras.Model(model.input, model.pyramid_outputs)
            >>> tuple(features(np.zeros((1, 64, 64, 3)))["P5"].shape)
            (1, 2, 2, 320)
        """
        names = [layer.name for layer in self.layers]
        if "norm0" in names:
            return {f"P{stage + 2}": self.get_layer(f"norm{stage}").output for stage in range(4)}
        last = {}
        for name in names:
            kind, *numbers = name.split("_")
            if kind == "stages":
                last[f"P{int(numbers[0]) + 2}"] = self.get_layer(name).output
            elif kind == "blocks":
                last["P4"] = self.get_layer(name).output
        return last


def load(
    architecture_or_tag: str,
    /,
    weights: str | os.PathLike | None = "default",
    *,
    include_top: bool | None = None,
    include_preprocessing: bool = True,
    input_tensor=None,
    input_shape: tuple | None = None,
    pooling: str | None = None,
    classes: int | None = None,
    classifier_activation="default",
    name: str | None = None,
    drop_path_rate: float = 0.0,
    layer_scale_init_value: float | None = None,
    output_stride: int = 32,
    pyramid_norms: bool = False,
    rematerialize: bool = False,
    seed: int | None = None,
    new_head: bool | None = None,
) -> keras.Model:
    """Builds a model by the name of its architecture or of a published weight file.

    Args:
        architecture_or_tag: "convnext_tiny" or "convnext_tiny.in12k_ft_in1k_384"; see `list_weights`. A tag
            also sets the image size, the number of classes and the pixel normaliser.
        weights: "default" for the file of the tag (for an architecture: "imagenet"); None for random
            weights; another tag; or a path, then the first argument says what the file is. A file that says
            how its images are prepared (`save_weights`) sets image size and normaliser, unless a tag does.
        include_top: None for True, unless the weights have no classifier.
        classes: None for as many as the weights have, else 1000.
        classifier_activation: "default" for "softmax", and for None where the last layer is the image
            projection of a CLIP tower.
        name: of the Keras model, default the architecture's.

    All other arguments are those of the constructors, for example `keras_convnext.ConvNeXtTiny`.

    Returns:
        A `keras.Model`, (N, H, W, 3) pixels in 0..255 to (N, classes) probabilities.

    Raises:
        ValueError: for an unknown name (near ones are listed) and as the constructors do.

    Example:
        >>> model = load("test_convnext2", weights=None, classes=10, input_shape=(64, 64, 3))
        >>> model.output_shape
        (None, 10)
    """
    if architecture_or_tag in VARIANTS:
        variant, described_by = VARIANTS[architecture_or_tag], None
    elif "." in str(architecture_or_tag) or architecture_or_tag in catalog.ALIASES:
        described_by = catalog.find_checkpoint(architecture_or_tag)
        variant = VARIANTS[described_by.architecture]
    else:
        raise ValueError(_messages.unknown("architecture", architecture_or_tag, VARIANTS))
    if weights == "default":
        weights = "imagenet" if described_by is None else described_by.tag
    published, state = described_by, None  # what the weights are, by the catalog; what is in their file
    if weights is not None and not is_path(weights):
        published = find_published(variant, weights, include_top is not False)
        described_by = described_by or published
    # outputs of the classifier; whether they are CLIP's projection
    available, projects = (published.classes, published.is_projection) if published else (1000, False)
    if is_path(weights) and not keras_files.is_bare(path := existing_file(weights)):
        state = read_file(path)
        contents = inspect_state(state, path)
        available, projects = contents.classes, projects or contents.layout == "open_clip"
    if classifier_activation == "default":
        classifier_activation = None if projects and classes in (None, available) else "softmax"
    if include_top is None:
        include_top = available > 0 or classes is not None
    classes = classes or available or 1000
    return _build(
        variant,
        include_top,
        include_preprocessing,
        weights,
        input_tensor,
        input_shape,
        pooling,
        classes,
        classifier_activation,
        name or variant.name,
        drop_path_rate=drop_path_rate,
        layer_scale_init_value=layer_scale_init_value,
        output_stride=output_stride,
        pyramid_norms=pyramid_norms,
        rematerialize=rematerialize,
        seed=seed,
        new_head=new_head,
        described_by=described_by,
        state=state,
    )


def _build(
    variant: Variant,
    include_top,
    include_preprocessing,
    weights,
    input_tensor,
    input_shape,
    pooling,
    classes,
    classifier_activation,
    name,
    *,
    drop_path_rate,
    layer_scale_init_value,
    output_stride,
    pyramid_norms,
    rematerialize,
    seed,
    new_head,
    described_by=None,
    state=None,
):
    """The body of every constructor; arguments as there.

    `described_by` is the published weights whose image size and normaliser hold when `weights` is a path or
    None, in place of what the file says; `state` is what the file holds, when it was read already.
    """
    variant = _with_layer_scale(variant, layer_scale_init_value)
    _check_arguments(variant, include_top, pooling, classes, drop_path_rate, output_stride, pyramid_norms)
    published = path = images = None
    if weights is not None:
        if is_path(weights):
            path = existing_file(weights)
            images = None if described_by else preprocessing_metadata.read_images(path)
        else:
            published = find_published(variant, weights, include_top)
            if published.packaged and classes == IMAGENET_CLASSES:
                classes = published.classes
        new_head = starts_new_head(published, weights, include_top, classes, new_head)
    if published is not None:
        path = find_file(published)
    prepared = published or described_by or images or catalog.default_checkpoint(variant.name)
    shape = _checked_input_shape(input_shape, input_tensor, include_top, prepared.image_size)

    def assemble():
        return _assemble(
            variant,
            include_top=include_top,
            normaliser=(prepared.mean, prepared.std) if include_preprocessing else None,
            input_tensor=input_tensor,
            input_shape=shape,
            pooling=pooling,
            classes=classes,
            classifier_activation=classifier_activation,
            name=name,
            drop_path_rate=drop_path_rate,
            output_stride=output_stride,
            pyramid_norms=pyramid_norms,
            rematerialize=rematerialize,
            seed=seed,
        )

    if path is None:
        return assemble()
    if keras_files.is_bare(path):
        if new_head:
            raise ValueError(
                f"{path} does not say what its weights belong to, so a new classifier cannot take the "
                "place of its own. Use the .keras file of the model, or save_weights(model, 'x.safetensors')."
            )
        model = assemble()
        keras_files.load_weights(model, path)
        return model

    if state is None:
        state = read_file(path)
    values = read_for_model(state, variant, path, include_top, classes, shape[-1], pyramid_norms, new_head)
    return filled(assemble, lambda model: placed_values(model, values))


def _assemble(
    variant,
    *,
    include_top,
    normaliser,
    input_tensor,
    input_shape,
    pooling,
    classes,
    classifier_activation,
    name,
    drop_path_rate,
    output_stride,
    pyramid_norms,
    rematerialize,
    seed,
):
    """Connects the layers, in the order of the forward pass."""
    if input_tensor is None:
        inputs = x = keras.Input(shape=input_shape, name="image")
    else:
        sources, x = keras.utils.get_source_inputs(input_tensor), input_tensor
        inputs = sources[0] if len(sources) == 1 else sources
    if normaliser is not None:
        mean, std = (for_channels(values, input_shape[-1]) for values in normaliser)
        x = keras.layers.Normalization(
            mean=[255 * value for value in mean],
            variance=[(255 * value) ** 2 for value in std],
            dtype="float32",  # a mean of 123.675 would be rounded in 16 bits
            name="normalization",
        )(x)

    settings = {
        "norm": variant.norm,
        "epsilon": variant.epsilon,
        "activation": variant.activation,
        "rematerialize": rematerialize,
    }
    if variant.version == 1:
        block = functools.partial(
            convnext.ConvNeXtBlock,
            layer_scale_init_value=variant.layer_scale_init_value,
            **settings,
        )
    else:
        block = functools.partial(convnext.ConvNeXtV2Block, **settings)
    stages = convnext.body(x, variant, block, output_stride, drop_path_rate, seed)

    if pyramid_norms:
        outputs = {
            f"P{stage + 2}": convnext.LayerNormalization(name=f"norm{stage}")(x)
            for stage, x in enumerate(stages)
        }
    else:
        dtype = _head_dtype()
        outputs = convnext.final_norm(stages[-1], variant, "avg" if include_top else pooling, dtype)
        if include_top:
            outputs = convnext.classifier(outputs, variant, classes, classifier_activation, dtype)
    return ConvNeXt(inputs, outputs, name=name)


_DOCSTRING = """{title}, as a Keras model.

{parameters:,} weights at 1000 classes; depths {depths}, dims {dims}.
Arguments up to `name` are those of `keras.applications`, in its order and with its defaults.
Reference: {reference}

Args:
    include_top: bool, whether to end in the classifier.
    include_preprocessing: bool, whether the model itself normalises its input. Then it takes pixels in 0..255
        (uint8 or float), and mean and standard deviation are those that the weights were trained with.
    weights: None for random weights; "imagenet" for {imagenet}; a tag (`list_weights("{name}")`), long
        or short; or the path of a file: .safetensors, .pth, .pt, .bin, .h5, .weights.h5 or .keras, of this
        or any project whose layout `convert` knows. The normaliser is then the one that the file names, else
        that of "imagenet".
    input_tensor: Keras tensor to use as the image, default a new `keras.Input`. To join two models on one
        image, call them on it instead: layer names are the official ones in each.
    input_shape: (height, width, channels), each side None or at least 32. Default: the weights' training size
        with the top, (None, None, 3) without. For other than 3 channels the stem is adapted: summed for one,
        else R, G, B repeated.
    pooling: None, "avg" or "max": without the top, whether to pool the last map, and how.
    classes: int, outputs of the classifier. Must be those of the weights when these are "imagenet" or a file;
        a tag with another number (not the default) keeps its body and gets a new, random classifier. Weights
        that ship with the package bring their own number in place of the default.
    classifier_activation: of the classifier; None for logits.
    name: of the model; has no other meaning.
    drop_path_rate: float in [0, 1), probability of dropping the last block for a sample in training; earlier
        blocks less, linearly from 0.
    layer_scale_init_value: float, start of LayerScale; 0 for none; default None, as published. V1 only.
    output_stride: 8, 16 or 32; below 32 the last stages dilate instead of halving the map.
    pyramid_norms: bool. With True the model returns {{"P2": ..., "P5": ...}}, the stage maps with a layer
        norm each, as published detection and segmentation weights have; needs include_top=False.
    rematerialize: bool, recompute each block in the backward pass: less memory, more time.
    seed: int or None, of the drop path.
    new_head: bool or None: True to start a new classifier on any weights, False never to; None as under
        `classes`.

Returns:
    A `keras.Model`, (N, H, W, C) pixels to (N, classes) probabilities; without the top, to features
    (N, C) or (N, H / 32, W / 32, C), layer-normalised as in `keras.applications`. Its `pyramid_outputs` are
    the stage maps.

Raises:
    ValueError: for arguments that do not fit each other or the weights; unknown tags come with near names.
    FileNotFoundError: for a path that is not there.

Example:
    >>> model = {constructor}(weights=None, input_shape=(64, 64, 3), classes=10)
    >>> model.output_shape
    (None, 10)
"""


def _constructor(constructor_name: str, architecture: str):
    """The public function that builds one architecture."""
    variant = VARIANTS[architecture]

    def constructor(
        include_top=True,
        include_preprocessing=True,
        weights="imagenet",
        input_tensor=None,
        input_shape=None,
        pooling=None,
        classes=1000,
        classifier_activation="softmax",
        name=architecture,
        *,
        drop_path_rate=0.0,
        layer_scale_init_value=None,
        output_stride=32,
        pyramid_norms=False,
        rematerialize=False,
        seed=None,
        new_head=None,
    ):
        return _build(
            variant,
            include_top,
            include_preprocessing,
            weights,
            input_tensor,
            input_shape,
            pooling,
            classes,
            classifier_activation,
            name,
            drop_path_rate=drop_path_rate,
            layer_scale_init_value=layer_scale_init_value,
            output_stride=output_stride,
            pyramid_norms=pyramid_norms,
            rematerialize=rematerialize,
            seed=seed,
            new_head=new_head,
        )

    imagenet = catalog.IMAGENET[architecture]
    constructor.__name__ = constructor.__qualname__ = constructor_name
    constructor.__doc__ = _DOCSTRING.format(
        title=constructor_name,
        parameters=variant.parameters,
        depths=variant.depths,
        dims=variant.dims,
        reference="Woo et al. 2023, arXiv:2301.00808"
        if variant.version == 2
        else "Liu et al. 2022, arXiv:2201.03545",
        imagenet=f'the tag "{imagenet}"' if imagenet else "nothing: no ImageNet file was published",
        name=architecture,
        constructor=constructor_name,
    )
    return constructor


ConvNeXtZeptoRms = _constructor("ConvNeXtZeptoRms", "convnext_zepto_rms")
ConvNeXtZeptoRmsOls = _constructor("ConvNeXtZeptoRmsOls", "convnext_zepto_rms_ols")
ConvNeXtAtto = _constructor("ConvNeXtAtto", "convnext_atto")
ConvNeXtAttoOls = _constructor("ConvNeXtAttoOls", "convnext_atto_ols")
ConvNeXtAttoRms = _constructor("ConvNeXtAttoRms", "convnext_atto_rms")
ConvNeXtFemto = _constructor("ConvNeXtFemto", "convnext_femto")
ConvNeXtFemtoOls = _constructor("ConvNeXtFemtoOls", "convnext_femto_ols")
ConvNeXtPico = _constructor("ConvNeXtPico", "convnext_pico")
ConvNeXtPicoOls = _constructor("ConvNeXtPicoOls", "convnext_pico_ols")
ConvNeXtNano = _constructor("ConvNeXtNano", "convnext_nano")
ConvNeXtNanoOls = _constructor("ConvNeXtNanoOls", "convnext_nano_ols")
ConvNeXtTiny = _constructor("ConvNeXtTiny", "convnext_tiny")
ConvNeXtTinyHnf = _constructor("ConvNeXtTinyHnf", "convnext_tiny_hnf")
ConvNeXtSmall = _constructor("ConvNeXtSmall", "convnext_small")
ConvNeXtBase = _constructor("ConvNeXtBase", "convnext_base")
ConvNeXtLarge = _constructor("ConvNeXtLarge", "convnext_large")
ConvNeXtLargeMlp = _constructor("ConvNeXtLargeMlp", "convnext_large_mlp")
ConvNeXtXLarge = _constructor("ConvNeXtXLarge", "convnext_xlarge")
ConvNeXtXXLarge = _constructor("ConvNeXtXXLarge", "convnext_xxlarge")
ConvNeXtV2Atto = _constructor("ConvNeXtV2Atto", "convnextv2_atto")
ConvNeXtV2Femto = _constructor("ConvNeXtV2Femto", "convnextv2_femto")
ConvNeXtV2Pico = _constructor("ConvNeXtV2Pico", "convnextv2_pico")
ConvNeXtV2Nano = _constructor("ConvNeXtV2Nano", "convnextv2_nano")
ConvNeXtV2Tiny = _constructor("ConvNeXtV2Tiny", "convnextv2_tiny")
ConvNeXtV2Small = _constructor("ConvNeXtV2Small", "convnextv2_small")
ConvNeXtV2Base = _constructor("ConvNeXtV2Base", "convnextv2_base")
ConvNeXtV2Large = _constructor("ConvNeXtV2Large", "convnextv2_large")
ConvNeXtV2Huge = _constructor("ConvNeXtV2Huge", "convnextv2_huge")
ConvNeXtIsotropicSmall = _constructor("ConvNeXtIsotropicSmall", "convnext_isotropic_small")
ConvNeXtIsotropicBase = _constructor("ConvNeXtIsotropicBase", "convnext_isotropic_base")
ConvNeXtIsotropicLarge = _constructor("ConvNeXtIsotropicLarge", "convnext_isotropic_large")
TestConvNeXt = _constructor("TestConvNeXt", "test_convnext")
TestConvNeXt2 = _constructor("TestConvNeXt2", "test_convnext2")
TestConvNeXt3 = _constructor("TestConvNeXt3", "test_convnext3")


def normaliser_of(model) -> tuple[list[float], list[float]] | None:
    """(mean, standard deviation) by channel, for pixels in 0..1, of a model; None without a normaliser."""
    for layer in model._flatten_layers():
        if isinstance(layer, keras.layers.Normalization) and layer.name == "normalization":
            mean = np.ravel(layer.input_mean) / 255
            return mean.tolist(), (np.sqrt(np.ravel(layer.input_variance)) / 255).tolist()
    return None


def model_of(variant, canonical, images=None, classifier_activation="softmax"):
    """A model with the weights of a canonical state dict, whose classes and channels it gets.

    `images` gives the image size and the normaliser: published weights or an `ImageDescription`; by default
    the architecture's published weights.
    """
    contents = layouts.inspect(canonical)
    prepared = images or catalog.default_checkpoint(variant.name)
    side = prepared.image_size if contents.classes else None

    def assemble():
        return _assemble(
            variant,
            include_top=contents.classes > 0,
            normaliser=(prepared.mean, prepared.std),
            input_tensor=None,
            input_shape=(side, side, contents.channels),
            pooling=None,
            classes=contents.classes,
            classifier_activation=classifier_activation,
            name=variant.name,
            drop_path_rate=0.0,
            output_stride=32,
            pyramid_norms=contents.pyramid_norms,
            rematerialize=False,
            seed=None,
        )

    return filled(assemble, lambda model: placed_values(model, canonical))


def _with_layer_scale(variant, value):
    if value is None:
        return variant
    if variant.version == 2:
        raise ValueError(
            f"{variant.name!r} is a ConvNeXt V2, whose blocks have no LayerScale (GRN replaced it). "
            f"Received: layer_scale_init_value={value}. Leave it out."
        )
    if not isinstance(value, (int, float, np.floating)) or value < 0:
        raise ValueError(
            "layer_scale_init_value must be above 0, or 0 for no LayerScale. Received: "
            f"layer_scale_init_value={value!r}"
        )
    return dataclasses.replace(variant, layer_scale_init_value=value if value > 0 else None)


def _check_arguments(variant, include_top, pooling, classes, drop_path_rate, output_stride, pyramid_norms):
    if pooling not in (None, "avg", "max"):
        raise ValueError(f"pooling must be None, 'avg' or 'max'. Received: pooling={pooling!r}")
    if include_top and not _is_count(classes):
        raise ValueError(f"classes must be a whole number from 1 up. Received: classes={classes!r}")
    if not isinstance(drop_path_rate, (int, float, np.floating)) or not 0 <= drop_path_rate < 1:
        raise ValueError(
            "drop_path_rate must be in [0, 1), the share of samples whose last block is dropped. Received: "
            f"drop_path_rate={drop_path_rate}"
        )
    if output_stride not in (8, 16, 32):
        raise ValueError(f"output_stride must be 8, 16 or 32. Received: output_stride={output_stride}")
    if variant.isotropic and output_stride != 32:
        raise ValueError(
            f"{variant.name!r} has stride 16 throughout and takes no output_stride. Received: "
            f"output_stride={output_stride}"
        )
    if pyramid_norms and (include_top or pooling or variant.isotropic):
        raise ValueError(
            "pyramid_norms=True returns the four normalised stage maps: it needs include_top=False, "
            "pooling=None and a model that has stages. Received: "
            f"include_top={include_top}, pooling={pooling!r}, architecture {variant.name!r}"
        )


def _checked_input_shape(input_shape, input_tensor, include_top, image_size):
    if input_tensor is not None:
        if not keras.utils.is_keras_tensor(input_tensor):
            raise ValueError(
                "input_tensor must be a Keras tensor, the output of keras.Input(...) or of a layer. "
                f"Received: {type(input_tensor).__name__}"
            )
        input_shape = tuple(input_tensor.shape[1:])
    elif input_shape is None:
        side = image_size if include_top else None
        input_shape = (side, side, 3)
    wanted = "(height, width, channels), each side None or 32 and more, at least one channel"
    if not isinstance(input_shape, Sequence) or len(input_shape) != 3:
        raise ValueError(f"input_shape must be {wanted}. Received: input_shape={input_shape}")
    height, width, channels = input_shape
    if not _is_count(channels):
        raise ValueError(
            f"The number of channels must be a whole number from 1 up, in input_shape {wanted}. Received: "
            f"input_shape={input_shape}"
        )
    if any(side is not None and not _is_count(side) for side in (height, width)):
        raise ValueError(f"input_shape must be {wanted}. Received: input_shape={input_shape}")
    if any(side is not None and side < 32 for side in (height, width)):
        raise ValueError(
            "Images must be at least 32x32: five halvings leave nothing of smaller ones. Received: "
            f"input_shape={input_shape}"
        )
    return tuple(input_shape)


def _is_count(value):
    """Whether a value is a whole number from 1 up, of Python or NumPy; True and False are not."""
    return isinstance(value, (int, np.integer)) and not isinstance(value, bool) and value >= 1


def for_channels(values, channels):
    """Mean or standard deviation for any number of channels: the average for one, else R, G, B in turn."""
    if channels == 1:
        return [sum(values) / 3]
    return [values[channel % 3] for channel in range(channels)]


def _head_dtype():
    """float32 under 16-bit policies, where sums over a map and softmax lose digits; else the policy."""
    compute_dtype = keras.config.dtype_policy().compute_dtype
    return "float32" if compute_dtype in ("float16", "bfloat16") else None
