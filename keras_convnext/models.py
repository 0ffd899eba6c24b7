"""The public constructors, one for each architecture, and `load`.

From a call to a model: check the arguments, find the weight file, lay out the layers without allocating
anything, read the file, give every weight its value.
"""

import contextlib
import dataclasses
import difflib
import functools
import logging
import os
import pathlib
from collections.abc import Sequence

import keras
import numpy as np

from keras_convnext import (
    checkpoints,
    convnext,
    descriptions,
    downloads,
    keras_files,
    state_dicts,
    torch_files,
)
from keras_convnext.checkpoints import WEIGHT_SUFFIXES
from keras_convnext.variants import VARIANTS, Variant

_logger = logging.getLogger("keras_convnext")
IMAGENET_CLASSES = 1000  # the default of the constructors
_announced_licences: set[str] = set()


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
        keep that stride. Isotropic models have one level, "P4". The maps are those behind the last block of
        each stage, before any norm; with `pyramid_norms=True` each has its own layer norm behind it.

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
            how its images are prepared (`save_weights`) sets image size and normaliser, but not beside a tag.
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
        variant, checkpoint = VARIANTS[architecture_or_tag], None
    elif "." in str(architecture_or_tag) or architecture_or_tag in checkpoints.ALIASES:
        checkpoint = checkpoints.find_checkpoint(architecture_or_tag)
        variant = VARIANTS[checkpoint.architecture]
    else:
        raise ValueError(checkpoints.unknown("architecture", architecture_or_tag, VARIANTS))
    if weights == "default":
        weights = "imagenet" if checkpoint is None else checkpoint.tag
    row, state = checkpoint, None  # what the weights are, by the table; what is in their file
    if weights is not None and not _is_path(weights):
        row = _find_checkpoint(variant, weights, include_top is not False)
        checkpoint = checkpoint or row
    # outputs of the classifier; whether they are CLIP's projection
    available, projects = (row.classes, row.is_projection) if row else (1000, False)
    if _is_path(weights) and not keras_files.is_bare(path := existing_file(weights)):
        state = read_file(path)
        contents = _inspect(state, path)
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
        described_by=checkpoint,
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

    `described_by` is the checkpoint whose image size and normaliser hold when `weights` is a path or None, in
    place of what the file says; `state` what is in the file at that path, when it was read already.
    """
    variant = _with_layer_scale(variant, layer_scale_init_value)
    _check_arguments(variant, include_top, pooling, classes, drop_path_rate, output_stride, pyramid_norms)
    checkpoint = path = images = None
    if weights is not None:
        if _is_path(weights):
            path = existing_file(weights)
            images = None if described_by else descriptions.read_images(path)
        else:
            checkpoint = _find_checkpoint(variant, weights, include_top)
            if checkpoint.packaged and classes == IMAGENET_CLASSES:
                classes = checkpoint.classes
        new_head = _starts_new_head(checkpoint, weights, include_top, classes, new_head)
    if checkpoint is not None:
        path = find_file(checkpoint)
    row = checkpoint or described_by or images or checkpoints.default_checkpoint(variant.name)
    shape = _checked_input_shape(input_shape, input_tensor, include_top, row)

    def assemble():
        return _assemble(
            variant,
            include_top=include_top,
            normaliser=(row.mean, row.std) if include_preprocessing else None,
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
    values = _read_for_model(state, variant, path, include_top, classes, shape[-1], pyramid_norms, new_head)
    return filled(assemble, lambda model: _places(model, values))


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
    if variant.isotropic:
        stages = [convnext.isotropic_body(x, variant, block, drop_path_rate, seed)]
    else:
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
        (uint8 or float), and the mean and spread are those the weights were trained with.
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
        norm each, as detection and segmentation checkpoints have; needs include_top=False.
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

    imagenet = checkpoints.IMAGENET[architecture]
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


def state_dict(model: keras.Model) -> state_dicts.StateDict:
    """The weights of a model under the names and in the shapes of the official PyTorch code.

    Args:
        model: made by a constructor of this package, or loaded from a file of one.

    Returns:
        {canonical name: array}, in the order of the forward pass. Behind an `input_tensor` only the layers
        of this package are taken.

    Raises:
        ValueError: when the model is none of ours, or quantised. LoRA is merged.
    """
    state = {}
    adapted = {}  # path of a kernel -> layer whose LoRA is merged into it
    for layer in model._flatten_layers():
        if getattr(layer, "lora_enabled", False):
            adapted[layer._kernel.path] = layer
    for variable in model.weights:
        name = _canonical_name(variable.path)
        if name is None or "/lora_" in variable.path:
            continue
        if name.rsplit(".", 1)[-1] not in ("weight", "bias", "gamma", "beta") or "int" in variable.dtype:
            raise ValueError(
                f"{model.name!r} is quantised: {variable.path} has no counterpart in PyTorch's layouts. Take "
                "its weights before quantize()."
            )
        value = adapted[variable.path].kernel if variable.path in adapted else variable
        state[name] = _to_torch(keras.ops.convert_to_numpy(value), variable.path)
    if not state:
        raise ValueError(
            f"Expected a model made by keras_convnext. Received {model.name!r}, with layers "
            f"{', '.join(layer.name for layer in model.layers[:5])}, ..."
        )
    return state


def normaliser_of(model) -> tuple[list[float], list[float]] | None:
    """The mean and spread for each channel, for pixels in 0..1, of a model of this package; None without."""
    for layer in model._flatten_layers():
        if isinstance(layer, keras.layers.Normalization) and layer.name == "normalization":
            mean = np.ravel(layer.input_mean) / 255
            return mean.tolist(), (np.sqrt(np.ravel(layer.input_variance)) / 255).tolist()
    return None


def _canonical_name(path: str) -> str | None:
    """The official name of a variable: "stages_1_0/dwconv/kernel" -> "stages.1.0.dwconv.weight"."""
    layer, *inner, leaf = path.split("/")
    head, *numbers = layer.split("_")
    if layer.startswith("downsample_layers_"):
        layer = "downsample_layers." + ".".join(numbers[1:])
    elif head in ("stages", "blocks") and inner:
        layer = ".".join([head, *numbers])
    elif layer not in ("stem", "norm", "norm_pre", "pre_logits", "head", *_PYRAMID_NORMS):
        return None
    if inner == ["layer_scale"]:
        return f"{layer}.gamma"
    if inner != ["grn"]:
        leaf = {"kernel": "weight", "gamma": "weight", "beta": "bias"}.get(leaf, leaf)
    return ".".join([layer, *inner, leaf])


_PYRAMID_NORMS = ("norm0", "norm1", "norm2", "norm3")


def _to_keras(array, path):
    """PyTorch's axes to Keras's."""
    if path.endswith("dwconv/kernel"):
        return array.transpose(2, 3, 0, 1)  # (C, 1, H, W) -> (H, W, C, 1)
    if array.ndim == 4:
        return array.transpose(2, 3, 1, 0)  # (O, I, H, W) -> (H, W, I, O)
    return array.T if array.ndim == 2 else array


def _to_torch(array, path):
    """Keras's axes to PyTorch's."""
    if path.endswith("dwconv/kernel"):
        return array.transpose(2, 3, 0, 1)  # (H, W, C, 1) -> (C, 1, H, W)
    if array.ndim == 4:
        return array.transpose(3, 2, 0, 1)  # (H, W, I, O) -> (O, I, H, W)
    return array.T if array.ndim == 2 else array


def read_canonical(state, variant, path):
    """All that a file holds of an architecture, under canonical names; its own head and channels are kept."""
    contents = state_dicts.inspect(state)
    shapes = state_dicts.weight_shapes(variant, contents.classes, contents.channels, contents.pyramid_norms)
    headless = contents.classes == 0
    may_lack = ("norm.", "norm_pre.") if headless and not contents.final_norm else ()
    return _read(state, shapes, path, may_lack, may_hold=("pre_logits",) if headless else ())


def model_of(variant, canonical, images=None, classifier_activation="softmax"):
    """A model with the weights of a canonical state dict, as large as they say.

    `images` is the checkpoint or description whose image size and normaliser it gets; by default those of the
    architecture's checkpoint.
    """
    contents = state_dicts.inspect(canonical)
    row = images or checkpoints.default_checkpoint(variant.name)
    side = row.image_size if contents.classes else None

    def assemble():
        return _assemble(
            variant,
            include_top=contents.classes > 0,
            normaliser=(row.mean, row.std),
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

    return filled(assemble, lambda model: _places(model, canonical))


def read_file(path):
    """{name: array} of any weight file, in its own layout; models of this package in the canonical one.

    Raises:
        ValueError: for an `.h5` file of this package, which does not say what model it belongs to.
    """
    if keras_files.is_bare(path):
        raise ValueError(
            f"{path} does not say which model its weights belong to. Load it with "
            "keras_convnext.load(architecture, weights=path), or convert the .keras file instead."
        )
    if path.suffix not in (".h5", ".keras"):
        return torch_files.read_state_dict(path)
    if keras_files.is_keras_applications(path):
        return keras_files.read_keras_applications(path)
    return state_dict(keras.saving.load_model(path, compile=False))


def _read_for_model(state, variant, path, include_top, classes, channels, pyramid_norms, new_head):
    """The canonical weights of a file that a model wants, without the others."""
    contents = _inspect(state, path)
    if include_top and not new_head and contents.classes != classes:
        if contents.classes == 0:
            raise ValueError(
                f"{path} has no classifier, and include_top=True asks for one. Pass include_top=False for "
                "the features, or new_head=True to start a classifier of your own on them."
            )
        raise ValueError(_wrong_classes(path, contents.classes, classes))
    wanted_classes = classes if include_top else 0
    shapes = state_dicts.weight_shapes(variant, wanted_classes, channels, pyramid_norms)
    may_lack: tuple[str, ...] = ()
    may_hold: tuple[str, ...] = ()
    if include_top and new_head:
        shapes = {name: shape for name, shape in shapes.items() if not name.startswith("head.")}
        may_hold = ("head",)
    if not include_top:
        may_hold = ("head", "pre_logits")
    if contents.classes == 0:
        may_lack = ("pre_logits.",)
        if not contents.final_norm:
            may_lack += ("norm.", "norm_pre.")
    if pyramid_norms:
        may_hold += ("norm", "norm_pre")
        if not contents.any_pyramid_norm:
            may_lack += tuple(f"{norm}." for norm in _PYRAMID_NORMS)
    return _read(state, shapes, path, may_lack, may_hold)


@contextlib.contextmanager
def naming(path):
    """Puts the file in front of what is said about its contents."""
    try:
        yield
    except ValueError as error:
        raise type(error)(f"{path}: {error}") from None


def _inspect(state, path):
    with naming(path):
        return state_dicts.inspect(state)


def _read(state, shapes, path, may_lack, may_hold):
    with naming(path):
        values = state_dicts.read(state, shapes, may_lack, may_hold)
    lacking = sorted({name.rsplit(".", 1)[0] for name in shapes if name not in values})
    if lacking:
        _logger.info("%s has no %s; it starts fresh.", path, ", ".join(lacking))
    return values


def filled(assemble, values_of):
    """The model that `assemble` lays out, with every weight made from its value.

    Inside the scope variables are declared but not made: no random numbers are drawn and nothing is compiled.
    When it closes, each is made from its initializer, which by then returns the value.

    Args:
        assemble: function () -> model.
        values_of: function (model) -> pairs of a variable and its array.
    """
    with keras.StatelessScope():
        model = assemble()
        for variable, array in values_of(model):
            # Keras has no public setter for the initializer of a declared variable; a test guards this line.
            variable._initializer = functools.partial(_cast, array)
    if keras.backend.backend() == "torch":
        list(model.parameters())  # registers with torch what the scope could not
    return model


def _places(model, values):
    """Yields each variable of a model that has a value in the file, and the value."""
    remaining = dict(values)
    for variable in model.weights:
        name = _canonical_name(variable.path)
        if name in remaining:
            yield variable, _to_keras(remaining.pop(name), variable.path)
    if remaining:
        raise ValueError(f"Weights without a place in the model: {', '.join(remaining)}")


def _cast(array, shape, dtype):
    if tuple(array.shape) != tuple(shape):
        raise ValueError(f"Expected an array of shape {shape}. Received {array.shape}.")
    # Always a copy: a backend may keep the array itself, which must not hang on the file. (NumPy knows
    # "bfloat16" from ml_dtypes, which torch_files imports.)
    value = np.array(array, dtype=dtype, order="C", copy=True)
    torch_files.release_pages(array)
    if keras.backend.backend() == "jax":
        import jax

        return jax.device_put(value)  # jnp.asarray, Keras's way, compiles a program for each shape
    return value


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


def _checked_input_shape(input_shape, input_tensor, include_top, row):
    if input_tensor is not None:
        if not keras.utils.is_keras_tensor(input_tensor):
            raise ValueError(
                "input_tensor must be a Keras tensor, the output of keras.Input(...) or of a layer. "
                f"Received: {type(input_tensor).__name__}"
            )
        input_shape = tuple(input_tensor.shape[1:])
    elif input_shape is None:
        side = row.image_size if include_top else None
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
    """Mean or spread for any number of channels: the average for one, else R, G, B in turn."""
    if channels == 1:
        return [sum(values) / 3]
    return [values[channel % 3] for channel in range(channels)]


def _head_dtype():
    """float32 under 16-bit policies, where sums over a map and softmax lose digits; else the policy."""
    compute_dtype = keras.config.dtype_policy().compute_dtype
    return "float32" if compute_dtype in ("float16", "bfloat16") else None


def _is_path(weights):
    return isinstance(weights, os.PathLike) or (
        isinstance(weights, str)
        and (weights.endswith(WEIGHT_SUFFIXES) or os.sep in weights or weights.startswith(("~", ".")))
    )


def existing_file(weights):
    path = pathlib.Path(weights).expanduser()
    if path.is_dir():
        raise IsADirectoryError(f"Expected a weight file. Received a folder: {path}")
    if not path.exists():
        near = ""
        if path.parent.is_dir():
            names = [entry.name for entry in path.parent.iterdir()]
            found = difflib.get_close_matches(path.name, names, 3)
            near = f" Near names in that folder: {', '.join(found)}." if found else ""
        raise FileNotFoundError(f"No such weight file: {path}.{near}")
    if not path.name.endswith(WEIGHT_SUFFIXES):
        raise ValueError(f"Expected a weight file ending in {', '.join(WEIGHT_SUFFIXES)}. Received: {path}")
    return path


def _find_checkpoint(variant, weights, include_top):
    if not isinstance(weights, str):
        raise TypeError(
            "weights must be None, 'imagenet', a tag or a path. Received: "
            f"{type(weights).__name__} {weights!r}"
        )
    if weights == "imagenet" and not include_top and variant.name in checkpoints.IMAGENET_NOTOP:
        # The file without the top is smaller; one with it serves as well when it is here already.
        without, full = checkpoints.IMAGENET_NOTOP[variant.name], checkpoints.IMAGENET[variant.name]
        weights = full if _is_here(full) and not _is_here(without) else without
    return checkpoints.find_checkpoint(weights, architecture=variant.name)


def _is_here(tag):
    return downloads.find_local(**checkpoints.CHECKPOINTS[tag].address) is not None


def find_file(checkpoint):
    if not checkpoint.commercial_use and checkpoint.licence not in _announced_licences:
        _announced_licences.add(checkpoint.licence)
        _logger.warning(
            "The weights %s are licensed %s: not for commercial use.",
            checkpoint.tag,
            checkpoint.licence,
        )
    return downloads.find_file(
        **checkpoint.address,
        sha256=checkpoint.sha256,
        sha256_prefix=checkpoint.sha256_prefix,
        gated=checkpoint.gated,
    )


def _starts_new_head(checkpoint, weights, include_top, classes, new_head):
    """Whether the classifier starts fresh; an error where that would surprise. See the constructors."""
    if not include_top:
        return False
    if new_head is not None or checkpoint is None:
        if new_head is False and checkpoint is not None and checkpoint.classes != classes:
            raise ValueError(_wrong_classes(checkpoint.tag, checkpoint.classes, classes))
        return bool(new_head)
    if checkpoint.classes == classes:
        return False
    if checkpoint.classes != 0 and (weights == "imagenet" or classes == 1000):
        raise ValueError(_wrong_classes(checkpoint.tag, checkpoint.classes, classes))
    _logger.warning(
        "%s: a new classifier for %d classes, with random weights, on the body of these weights.",
        checkpoint.tag,
        classes,
    )
    return True


def _wrong_classes(weights, available, classes):
    return (
        f"The weights {str(weights)!r} have a classifier for {available} classes. "
        f"Received: classes={classes}. Pass classes={available} to use it, new_head=True to keep the "
        "body and start a new classifier, or include_top=False for the features alone."
    )
