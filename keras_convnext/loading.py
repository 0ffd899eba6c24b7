"""`load`: opens a model of any task by a name or a file."""

import dataclasses
import os

import keras

from keras_convnext import models, segmentation
from keras_convnext.detection import rcnn
from keras_convnext.model_options import ModelOptions
from keras_convnext.weights.resolve import ResolvedWeights, resolve


def load(
    architecture_or_tag: str | os.PathLike,
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
    """Builds a model by the name of its architecture, of a published weight file, or of a file of one's own.

    Weights of a segmenter give that, `segmentation.UPerNet`, pixels to logits of each, and those of a
    detector a `detection.MaskRCNN`, unless include_top=False or pyramid_norms=True asks for the body.

    Args:
        architecture_or_tag: "convnext_tiny" or "convnext_tiny.in12k_ft_in1k_384"; see `list_weights`. A tag
            also sets the image size, the number of classes and the pixel normaliser. Or the path of a file
            that says what it is of.
        weights: "default" for the file of the tag (for an architecture: "imagenet"); None for random
            weights; another tag; or a path, then the first argument says what the file is. A file that says
            how its images are prepared (`save_weights`) sets image size and normaliser, unless a tag does;
            else a `.keras` file those of its model. By itself one without normaliser stays without.
        include_top: None for True, unless the weights have no classifier.
        classes: None for as many as the weights have, else 1000. With another number than the weights of a
            segmenter or detector have, its last layers start fresh.
        classifier_activation: "default" for "softmax", and for None where the last layer is the image
            projection of a CLIP tower.
        name: of the Keras model, default the architecture's.

    All other arguments are those of the constructors, for example `keras_convnext.ConvNeXtTiny`.

    Returns:
        A `keras.Model`, (N, H, W, 3) pixels in 0..255 to (N, classes) probabilities; of a segmenter to
        (N, H, W, classes) logits; of a detector to a dictionary of boxes, scores, classes, masks and count.

    Raises:
        ValueError: for an unknown name (near ones are listed) and as the constructors do.

    Example:
        >>> model = load("test_convnext2", weights=None, classes=10, input_shape=(64, 64, 3))
        >>> model.output_shape
        (None, 10)
    """
    options = ModelOptions.of(locals())
    task = "features" if include_top is False else None
    return open_model(resolve(architecture_or_tag, weights, task), options)


def open_model(source: ResolvedWeights, options: ModelOptions) -> keras.Model:
    """Builds the model that resolved weights are of, by their task."""
    if source.heads is None:
        return models.build(source, options)
    if options.include_top is False or options.pyramid_norms:
        return models.build(source, dataclasses.replace(options, include_top=False))
    build = segmentation.build if source.task == "segmentation" else rcnn.build
    return build(source, options)
