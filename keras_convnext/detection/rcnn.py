"""Mask R-CNN and Cascade Mask R-CNN on any ConvNeXt: objects of an image with boxes, classes and masks.

He et al. 2017, "Mask R-CNN" (arXiv:1703.06870); Cai and Vasconcelos 2018, "Cascade R-CNN" (arXiv:1712.00726),
as the ConvNeXt paper uses them (section 4.1); facebookresearch/ConvNeXt at 048efce, object_detection/;
mmdetection 3.3.0, mmdet/models/roi_heads/standard_roi_head.py and cascade_roi_head.py.
"""

import functools

import keras
from keras import layers, ops

from keras_convnext import models
from keras_convnext.architecture import BOX_BINS, MASK_BINS
from keras_convnext.convnext import layer_name
from keras_convnext.data.preprocessing import is_positive_integer
from keras_convnext.detection import boxes as box
from keras_convnext.detection import regions
from keras_convnext.detection.heads import BoxHead, FeaturePyramid, MaskHead, ProposalHead
from keras_convnext.model_options import ModelOptions
from keras_convnext.weights.resolve import ResolvedWeights

_register = keras.saving.register_keras_serializable(package="keras_convnext")

# Units of the deltas of each stage; a detector that is no cascade has the first.
DEVIATIONS = ((0.1, 0.1, 0.2, 0.2), (0.05, 0.05, 0.1, 0.1), (0.033, 0.033, 0.067, 0.067))


@_register
class Detector(keras.Model):
    """A functional Keras model, (N, H, W, 3) pixels to what is on them, made by `MaskRCNN`."""

    @property
    def classes(self) -> int:
        return next(layer.classes for layer in self.layers if isinstance(layer, BoxHead))

    @property
    def has_masks(self) -> bool:
        return any(isinstance(layer, MaskHead) for layer in self.layers)

    @property
    def is_cascade(self) -> bool:
        return sum(isinstance(layer, BoxHead) for layer in self.layers) > 1


class _Exact(layers.Layer):
    """A layer without weights that computes in float32, and leaves its inputs as they are."""

    def __init__(self, **kwargs):
        super().__init__(**{**kwargs, "dtype": "float32", "autocast": False})

    def get_config(self):
        config = super().get_config()
        return {name: value for name, value in config.items() if name != "dtype"}


@_register
class ImageSizes(_Exact):
    """Height and width in pixels of each image: (N, H, W, C) to (N, 2). `with_sizes` puts an input here."""

    def call(self, inputs):
        batch, height, width = ops.shape(inputs)[:3]
        size = ops.stack([ops.cast(side, "float32") for side in (height, width)])
        return ops.broadcast_to(size[None], (batch, 2))

    def compute_output_spec(self, inputs):
        return keras.KerasTensor((inputs.shape[0], 2), "float32")


@_register
class Proposals(_Exact):
    """`regions.proposals` of what a `ProposalHead` predicts: (boxes (N, count, 4), scores (N, count))."""

    def __init__(self, count=1000, **kwargs):
        super().__init__(**kwargs)
        self.count = count

    def call(self, predictions, sizes):
        return regions.proposals(**_as_float32(predictions), sizes=sizes, count=self.count)

    def compute_output_spec(self, predictions, sizes):
        shape = (sizes.shape[0], self.count)
        return keras.KerasTensor((*shape, 4), "float32"), keras.KerasTensor(shape, "float32")

    def get_config(self):
        return {**super().get_config(), "count": self.count}


@_register
class RegionAlign(_Exact):
    """`regions.roi_align` of the regions of all images in one list: (N, R, 4) to (N R, size, size, C)."""

    def __init__(self, size, samples=0, **kwargs):
        super().__init__(**kwargs)
        self.size, self.samples = size, samples

    def call(self, maps, boxes):
        found = regions.roi_align(maps, boxes, self.size, self.samples)
        return ops.reshape(found, (-1, *found.shape[2:]))

    def compute_output_spec(self, maps, boxes):
        return keras.KerasTensor((None, self.size, self.size, maps[0].shape[-1]), maps[0].dtype)

    def get_config(self):
        return {**super().get_config(), "size": self.size, "samples": self.samples}


@_register
class Refine(_Exact):
    """Regions (N, R, 4) moved by the deltas of their best class, for the next stage of a cascade."""

    def __init__(self, deviations, **kwargs):
        super().__init__(**kwargs)
        self.deviations = deviations

    def call(self, predictions, boxes, sizes):
        logits, deltas = _as_float32(predictions)
        classes = logits.shape[-1] - 1
        labels = ops.argmax(logits[:, :classes], axis=-1)  # (N R,)
        deltas = ops.reshape(deltas, (-1, classes, 4))
        deltas = ops.take_along_axis(deltas, labels[:, None, None], axis=1)
        moved = box.decode(boxes, ops.reshape(deltas, (-1, *boxes.shape[1:])), self.deviations)
        return box.clip(moved, sizes)

    def compute_output_spec(self, predictions, boxes, sizes):
        return keras.KerasTensor(boxes.shape, "float32")

    def get_config(self):
        return {**super().get_config(), "deviations": self.deviations}


@_register
class Detections(_Exact):
    """`regions.detections` of the predictions of all stages: the mean logits, the deltas of the last."""

    def __init__(self, deviations, count=100, least=0.05, **kwargs):
        super().__init__(**kwargs)
        self.deviations, self.count, self.least = deviations, count, least

    def call(self, predictions, boxes, scores, sizes):
        all_logits, all_deltas = zip(*_as_float32(predictions), strict=True)
        classes, count = all_logits[0].shape[-1] - 1, boxes.shape[1]
        logits = sum(all_logits[1:], start=all_logits[0]) / len(all_logits)
        logits = ops.reshape(logits, (-1, count, classes + 1))
        found = regions.detections(
            ops.softmax(logits)[..., :classes],
            ops.reshape(all_deltas[-1], (-1, count, classes, 4)),
            boxes,
            scores >= 0,
            sizes,
            self.deviations,
            self.count,
            least=self.least,
        )
        # What is not finite would else be taken for an image with nothing on it.
        is_sound = ops.isfinite(ops.sum(logits, axis=(1, 2)))[:, None]
        return found | {"scores": ops.where(is_sound, found["scores"], float("nan"))}

    def compute_output_spec(self, predictions, boxes, scores, sizes):
        batch, count = boxes.shape[0], self.count
        return {
            "boxes": keras.KerasTensor((batch, count, 4), "float32"),
            "scores": keras.KerasTensor((batch, count), "float32"),
            "classes": keras.KerasTensor((batch, count), "int32"),
            "count": keras.KerasTensor((batch,), "int32"),
        }

    def get_config(self):
        config = {"deviations": self.deviations, "count": self.count, "least": self.least}
        return {**super().get_config(), **config}


@_register
class ClassMasks(_Exact):
    """The mask of the class of each detection, (N, K, H, W) in 0..1: the mean over the stages' heads."""

    def call(self, logits, classes):
        labels = ops.reshape(ops.maximum(classes, 0), (-1, 1, 1, 1))
        chosen = [ops.take_along_axis(each, labels, axis=3)[..., 0] for each in _as_float32(logits)]
        masks = sum(map(ops.sigmoid, chosen[1:]), start=ops.sigmoid(chosen[0])) / len(chosen)
        masks = ops.reshape(masks, (-1, classes.shape[1], *masks.shape[1:]))
        return ops.where((classes >= 0)[..., None, None], masks, 0.0)

    def compute_output_spec(self, logits, classes):
        return keras.KerasTensor((*classes.shape, *logits[0].shape[1:3]), "float32")


def MaskRCNN(
    backbone,
    classes,
    masks=True,
    cascade=False,
    image_size=None,
    channels=256,
    hidden_channels=1024,
    num_proposals=1000,
    num_detections=100,
    score_threshold=0.05,
    name=None,
):
    """Puts the heads of Mask R-CNN on a ConvNeXt.

    A feature pyramid; a head that proposes boxes on each of its maps; RoIAlign of the proposals and a head
    that says their class and moves their box, with `cascade` three times, each on the boxes of the one
    before; and a head that draws the mask of each detection. All counts are constants: what is found is
    padded.
    Reference: the papers above; facebookresearch/ConvNeXt object_detection/configs/_base_/models/
    mask_rcnn_convnext_fpn.py and cascade_mask_rcnn_convnext_fpn.py at 048efce.

    Args:
        backbone: ConvNeXt of either paper built with `include_top=False, pyramid_norms=True`; its layers
            become the model's. Or a name or file, opened with its weights as by `load`.
        classes: int, number of classes.
        masks: bool. False for boxes alone, as Faster R-CNN has.
        cascade: bool, whether to have three stages of boxes and masks.
        image_size: int or (height, width), for a model of this size alone. Default: that of the backbone,
            where it has one, else any; sides should be multiples of 32.
        channels: int, width of pyramid and heads. Default 256, as published.
        hidden_channels: int, width of the linear layers. Default 1024, as published.
        num_proposals: int, boxes of an image that are looked at. Default 1000, as published.
        num_detections: int, most objects of an image that are told. Default 100, as published.
        score_threshold: float in [0, 1), least score that is told. Default 0.05, as published.
        name: of the model. One of your own stands in front of the names of its heads' layers.

    Returns:
        A `Detector`: pixels as its backbone takes them, 0..255, (N, H, W, C), to a dictionary, with K for
        `num_detections`: "boxes" float32 (N, K, 4) of x0, y0, x1, y1 in pixels, the best first; "scores"
        float32 (N, K); "classes" int32 (N, K); "masks" float32 (N, K, 28, 28), how sure it is of each part of
        the box; "count" int32 (N,), how many of the K are detections. The others are zeros, of class -1.

    Raises:
        ValueError: for a backbone without the four normalised maps, or another value out of range.

    Example:
        >>> body = TestConvNeXt2(weights=None, include_top=False, pyramid_norms=True)
        >>> MaskRCNN(body, classes=3, channels=16, hidden_channels=32).output["masks"].shape
        (None, 100, 28, 28)
    """
    _check_arguments(
        classes=classes,
        channels=channels,
        hidden_channels=hidden_channels,
        num_proposals=num_proposals,
        num_detections=num_detections,
        score_threshold=score_threshold,
    )
    named = functools.partial(layer_name, model_name=name)
    image, maps = _image_and_maps(backbone, image_size, named)
    sizes = ImageSizes(name=named("image_sizes"))(image)
    pyramid = FeaturePyramid(channels, name=named("neck"))(maps)
    found = ProposalHead(name=named("rpn_head"))(pyramid)
    boxes, scores = Proposals(num_proposals, name=named("roi_head_proposals"))(found, sizes)

    stages = range(3 if cascade else 1)
    predictions: list = []  # logits and deltas of each stage
    places = [f"_{stage}" if cascade else "" for stage in stages]  # behind the names of the heads
    for stage, place in zip(stages, places, strict=True):
        if stage > 0:
            refine = Refine(DEVIATIONS[stage - 1], name=named(f"roi_head_refine_{stage}"))
            boxes = refine(predictions[-1], boxes, sizes)
        x = RegionAlign(BOX_BINS, name=named(f"roi_head_box_regions{place}"))(pyramid[:4], boxes)
        head = BoxHead(classes, hidden_channels, cascade, name=named(f"roi_head_bbox_head{place}"))
        predictions.append(head(x))
    detections = Detections(
        DEVIATIONS[stages[-1]], num_detections, score_threshold, name=named("roi_head_detections")
    )
    outputs = detections(predictions, boxes, scores, sizes)
    if masks:
        x = RegionAlign(MASK_BINS, name=named("roi_head_mask_regions"))(pyramid[:4], outputs["boxes"])
        logits = [MaskHead(classes, name=named(f"roi_head_mask_head{place}"))(x) for place in places]
        outputs["masks"] = ClassMasks(name=named("roi_head_masks"))(logits, outputs["classes"])
    return Detector(image, outputs, name=name or "mask_rcnn")


def with_sizes(model: keras.Model) -> keras.Model:
    """The model for padded images: [images, sizes] to the same, with `sizes` float32 (N, 2).

    Those are height and width without what is padded at the bottom and on the right: no box goes beyond. The
    layers are those of `model`.
    """
    sizes = next(layer for layer in model.layers if isinstance(layer, ImageSizes))
    return keras.Model([model.input, sizes.output], model.output, name=model.name)


def build(source: ResolvedWeights, options: ModelOptions) -> Detector:
    """Lays out the detector that weights are of, then gives them to it; `load` describes the options.

    With another number of classes than the weights have, or `new_head`, the layers of the classes start
    fresh. A `.keras` file keeps its numbers of proposals and detections and its least score.
    """
    kept = {}
    if source.is_model:
        layer = {type(layer): layer for layer in source.model.layers}
        kept = {
            "num_proposals": layer[Proposals].count,
            "num_detections": layer[Detections].count,
            "score_threshold": layer[Detections].least,
        }

    def attach(backbone, heads) -> Detector:
        return MaskRCNN(
            backbone,
            heads.classes,
            heads.masks,
            heads.cascade,
            channels=heads.channels,
            hidden_channels=heads.hidden_channels,
            name=options.name,
            **kept,
        )

    return models.build_with_heads(source, options, "detection", attach)


def _as_float32(values):
    """All tensors of a structure in float32."""
    return keras.tree.map_structure(lambda value: ops.cast(value, "float32"), values)


def _image_and_maps(backbone, image_size, named):
    """The image and the maps P2 .. P5 of a backbone, of an image size of its own where one is given."""
    backbone = models.with_pyramid(backbone)
    image, maps = backbone.input, backbone.output
    if image_size is not None:
        size = (image_size, image_size) if is_positive_integer(image_size) else tuple(image_size)
        own = image.shape[1:3]
        if any(side not in (None, wanted) for side, wanted in zip(own, size, strict=True)):
            raise ValueError(
                f"image_size must be that of the backbone, {own[0]} x {own[1]}. Received: "
                f"image_size={image_size!r}. Leave it out."
            )
        if own != size:
            image = keras.Input((*size, image.shape[-1]), name=named("image"))
            maps = backbone.call(image)  # connects the same layers again
    return image, [maps[f"P{level}"] for level in (2, 3, 4, 5)]


def _check_arguments(score_threshold, **counts) -> None:
    rules = {
        name: (value, is_positive_integer(value), "a whole number from 1 up")
        for name, value in counts.items()
    }
    is_share = 0 <= score_threshold < 1
    rules["score_threshold"] = (score_threshold, is_share, "in [0, 1), the least score that is told")
    models.check_rules(rules)
