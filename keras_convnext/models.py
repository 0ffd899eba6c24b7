"""The public constructors, one for each architecture: arguments, weight file, layers, values."""

import dataclasses
import functools
import warnings
from typing import Any

import keras

from keras_convnext import convnext
from keras_convnext._messages import listed
from keras_convnext.convnext import layer_name
from keras_convnext.data.preprocessing import Preprocessing
from keras_convnext.layers.bfloat16 import warn_where_slow
from keras_convnext.model_options import IMAGENET_CLASSES, ModelOptions
from keras_convnext.variants import VARIANTS, Variant
from keras_convnext.weights import catalog, keras_files
from keras_convnext.weights.assign import filled, other_settings, placed_values, places
from keras_convnext.weights.resolve import ResolvedWeights, resolve


class _Layers(list):
    """The layers of a model; warns where more are asked for, as programs for keras.applications do."""

    def __getitem__(self, key):
        if isinstance(key, slice) and any(abs(end or 0) > len(self) for end in (key.start, key.stop)):
            warnings.warn(
                f"Expected a place among {len(self)} layers. Received: {key}. A block is one layer, and in "
                "keras.applications seven: keras_convnext.freeze_stages(model, n) freezes by stage.",
                stacklevel=2,
            )
        return super().__getitem__(key)


@keras.saving.register_keras_serializable(package="keras_convnext")
class ConvNeXt(keras.Model):
    """A functional Keras model, made by the constructors and `load`, that also knows its feature pyramid."""

    @property
    def layers(self) -> list:
        return _Layers(super().layers)

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
        layers = places(self)[0]
        if "norm0" in layers:
            return {f"P{stage + 2}": layers[f"norm{stage}"].output for stage in range(4)}
        last = {}
        for name, layer in layers.items():
            kind, *numbers = name.split("_")
            if kind in ("stages", "blocks"):
                last["P4" if kind == "blocks" else f"P{int(numbers[0]) + 2}"] = layer.output
        return last

    def get_layer(self, name=None, index=None):
        """As of any Keras model; the official names, such as "head", find their layers too."""
        if name is not None and index is None:
            mine = {layer.name for layer in self.layers}
            wanted = (name, layer_name(name), layer_name(name, self.name))
            name = next((candidate for candidate in wanted if candidate in mine), name)
        return super().get_layer(name, index)


# The legacy `.h5` format writes the bare name of the outermost class.
keras.saving.get_custom_objects().setdefault("ConvNeXt", ConvNeXt)


def build(source: ResolvedWeights, options: ModelOptions) -> ConvNeXt:
    """Lays out the layers of a ConvNeXt, then gives them the weights: what `load` does with most names."""
    options = options.settled(source)
    variant = options.changed(source.variant)
    new_head = source.starts_new_head(options.include_top, options.classes, options.new_head)
    layout = functools.partial(assemble, variant, options, source.preprocessing)
    if source.is_random:
        return layout()
    if source.is_bare:
        if new_head:
            raise ValueError(
                f"{source.path} does not say what its weights belong to, so a new classifier cannot take the "
                "place of its own. Use the .keras file of the model, or save_weights(model, 'x.safetensors')."
            )
        channels = options.input_shape[-1]
        if channels != source.channels:
            raise ValueError(
                f"{source.path} holds weights for images of {source.channels} channels. Received: "
                f"input_shape={options.input_shape}. Use the .keras file of the model, or "
                "save_weights(model, 'x.safetensors'), whose stem is adapted."
            )
        model = layout()
        keras_files.load_weights(model, source.path)
        return model
    values = source.values(variant, options, new_head)
    model = filled(layout, lambda model: placed_values(model, values))
    if source.around is not None and not source.is_keras_applications:
        check_settings(source, model, options)
    return model


def build_with_heads(source: ResolvedWeights, options: ModelOptions, task: str, attach):
    """Lays out a body with the heads of a task, then gives both the weights.

    `attach(backbone, heads)` makes the model. With another number of classes than the weights have, or
    `new_head`, the layers of the classes start fresh.
    """
    has_contents = not (source.is_random or source.is_bare)
    heads = (source.contents.heads if has_contents else None) or source.heads
    if heads is None or heads.task != task:
        raise ValueError(f"Expected weights for {task}, received those of a model of {source.task}.")
    if options.pooling is not None or options.classifier_activation not in ("default", None):
        raise ValueError(
            f"A model for {task} has no classifier of whole images: it takes no pooling, nor a "
            f"classifier_activation. Received: pooling={options.pooling!r}, "
            f"classifier_activation={options.classifier_activation!r}"
        )
    if source.around is not None and source.around.activation is not keras.activations.linear:
        name = getattr(source.around.activation, "__name__", source.around.activation)
        raise ValueError(
            f"{source.path}: Expected a segmenter that ends in logits. Received one with the activation "
            f"{name!r}. keras.saving.load_model opens the file as it is."
        )
    shape = options.input_shape
    if shape is None and source.around is not None:
        shape = (*source.around.sides, source.channels)
    classes = int(options.classes or heads.classes)
    new_head = classes != heads.classes or bool(options.new_head)
    if new_head and options.new_head is False:
        raise ValueError(
            f"The weights have {heads.classes} classes. Received: classes={classes}, new_head=False. Pass "
            f"classes={heads.classes} for their own, or leave new_head out to start new ones."
        )
    unset: dict[str, Any] = dict.fromkeys(("classes", "classifier_activation", "name", "new_head"))
    body = dataclasses.replace(
        options, include_top=False, pyramid_norms=True, input_shape=shape, **unset
    ).settled(source)
    variant, heads = body.changed(source.variant), dataclasses.replace(heads, classes=classes)

    def layout():
        return attach(assemble(variant, body, source.preprocessing), heads)

    if source.is_random:
        return layout()
    if source.is_bare:
        if new_head:
            raise ValueError(
                f"{source.path} does not say what its weights belong to, so new last layers cannot take "
                "the place of its own. Use the .keras file of the model, or "
                "save_weights(model, 'x.safetensors')."
            )
        model = layout()
        keras_files.load_weights(model, source.path)
        return model
    values = source.values_with_heads(variant, body, heads, new_head)
    model = filled(layout, lambda model: placed_values(model, values))
    if source.around is not None:
        check_settings(source, model, body)
    return model


def check_settings(source: ResolvedWeights, model: keras.Model, options: ModelOptions) -> None:
    """Refuses a `.keras` model of which some layers compute something else than those of `model` do."""
    of_stride, others = ("dilation_rate", "strides"), ("activation", "epsilon", "kernel_size", "norm")
    settings = (*of_stride, *others) if options.output_stride == 32 else others  # another one was asked for
    wanted = {
        place: {name: value for name, value in layer.get_config().items() if name in settings}
        for place, layer in places(model)[0].items()
        if place != "head"  # whose activation is `Around.activation`
    }
    if found := other_settings(source.model, wanted):
        are_of_stride = all(line.startswith(of_stride) for line in found)
        stride = " load(..., output_stride=8 or 16) has them." if are_of_stride else ""
        raise ValueError(
            f"{source.path}: Expected layers as the architecture has them. Received {listed(found, 3)}."
            f"{stride} keras.saving.load_model opens the file as it is."
        )


def assemble(variant: Variant, options: ModelOptions, preprocessing: Preprocessing) -> ConvNeXt:
    """Connects the layers, in the order of the forward pass; settled options."""
    warn_where_slow()
    own_name = None if options.name == variant.name else options.name
    named = functools.partial(layer_name, model_name=own_name)
    if options.input_tensor is None:
        inputs = x = keras.Input(shape=options.input_shape, name=named("image"))
    else:
        sources, x = keras.utils.get_source_inputs(options.input_tensor), options.input_tensor
        inputs = sources[0] if len(sources) == 1 else sources
    if options.include_preprocessing:
        channels = options.input_shape[-1]
        mean, std = (for_channels(values, channels) for values in (preprocessing.mean, preprocessing.std))
        x = keras.layers.Normalization(
            mean=[255 * value for value in mean],
            variance=[(255 * value) ** 2 for value in std],
            dtype="float32",  # a mean of 123.675 would be rounded in 16 bits
            name=named("normalization"),
        )(x)

    settings = {} if variant.version == 2 else {"layer_scale_init_value": variant.layer_scale_init_value}
    block = functools.partial(
        convnext.ConvNeXtV2Block if variant.version == 2 else convnext.ConvNeXtBlock,
        norm=variant.norm,
        epsilon=variant.epsilon,
        activation=variant.activation,
        rematerialize=options.rematerialize,
        **settings,
    )
    stages = convnext.body(
        x, variant, block, options.output_stride, options.drop_path_rate, options.seed, named
    )

    if options.pyramid_norms:
        outputs = {
            f"P{stage + 2}": convnext.LayerNormalization(name=named(f"norm{stage}"))(x)
            for stage, x in enumerate(stages)
        }
    else:
        # Sums over a map and softmax lose digits in 16 bits.
        is_16_bit = keras.config.dtype_policy().compute_dtype in ("float16", "bfloat16")
        dtype = "float32" if is_16_bit else None
        pooling = "avg" if options.include_top else options.pooling
        outputs = convnext.final_norm(stages[-1], variant, pooling, dtype, named)
        if options.include_top:
            outputs = convnext.classifier(
                outputs, variant, options.classes, options.classifier_activation, dtype, named
            )
    return ConvNeXt(inputs, outputs, name=options.name)


def with_pyramid(backbone) -> keras.Model:
    """A backbone that gives P2 .. P5, opened where it is a name."""
    if not isinstance(backbone, keras.Model):
        options = ModelOptions(include_top=False, pyramid_norms=True)
        backbone = build(resolve(backbone, task="features"), options)
    output = backbone.output if isinstance(backbone.output, dict) else {}
    if sorted(output) != ["P2", "P3", "P4", "P5"]:
        raise ValueError(
            "Expected a backbone that returns the four normalised stage maps, built with include_top=False, "
            f"pyramid_norms=True. Received: {backbone.name!r} with outputs {backbone.output_shape}"
        )
    return backbone


def check_rules(rules: dict[str, tuple]) -> None:
    """Refuses an argument that is not right: of each its value, whether it is right, and what is expected."""
    for name, (value, is_right, expected) in rules.items():
        if not is_right:
            raise ValueError(f"{name} must be {expected}. Received: {name}={value!r}")


_DOCSTRING = """{constructor}, as a Keras model.

{variant.parameters:,} weights at 1000 classes; depths {variant.depths}, dims {variant.dims}.
Arguments up to `name` are those of `keras.applications`, in its order and with its defaults.
Reference: {reference}

Args:
    include_top: bool, whether to end in the classifier.
    include_preprocessing: bool, whether the model itself normalises its input. Then it takes pixels in 0..255
        (uint8 or float), and mean and standard deviation are those that the weights were trained with.
    weights: None for random weights; "imagenet" for {imagenet}; a tag
        (`list_weights("{variant.name}")`), long or short; or the path of a file: .safetensors, .pth, .pt,
        .bin, .h5, .weights.h5 or .keras, of this or any project whose layout `convert` knows. The normaliser
        is then the one that the file names or a .keras model has, else that of "imagenet".
    input_tensor: Keras tensor to use as the image, default a new `keras.Input`. To join two models on one
        image, give them names, or call them on it.
    input_shape: (height, width, channels), each side None or at least 32. Default: the weights' training size
        with the top, (None, None, 3) without, or as many channels as a file has. For other than 3 channels
        the stem is adapted: a gray picture gives what its three equal channels give, a fourth channel starts
        at zero, others repeat R, G, B.
    pooling: None, "avg" or "max": without the top, whether to pool the last map, and how.
    classes: int, outputs of the classifier. Must be those of the weights when these are "imagenet" or a file
        with a classifier; another number (not the default) with a tag, or an encoder of FCMAE, keeps the
        body and gets a new, random classifier. Weights that ship with the package bring their own number in
        place of the default.
    classifier_activation: of the classifier; None for logits.
    name: of the model. One of your own stands in front of the names of its layers, so that two models fit
        into one graph.
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
        options = ModelOptions.of(locals())
        source = resolve(variant, weights, "features" if include_top is False else None)
        is_packaged = source.published is not None and source.published.packaged
        if is_packaged and classes == IMAGENET_CLASSES and new_head is None:
            options = dataclasses.replace(options, classes=None)  # 1000 is the default: those of the weights
        return build(source, options)

    imagenet = catalog.IMAGENET[architecture]
    constructor.__name__ = constructor.__qualname__ = constructor_name
    papers = {1: "Liu et al. 2022, arXiv:2201.03545", 2: "Woo et al. 2023, arXiv:2301.00808"}
    constructor.__doc__ = _DOCSTRING.format(
        constructor=constructor_name,
        variant=variant,
        reference=papers[variant.version],
        imagenet=f'the tag "{imagenet}"' if imagenet else "nothing: no ImageNet file was published",
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


def for_channels(values, channels):
    """Mean or standard deviation for any number of channels: the average for one, else R, G, B in turn."""
    if channels == 1:
        return [sum(values) / 3]
    return [values[channel % 3] for channel in range(channels)]
