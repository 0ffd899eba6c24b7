"""Cross-entropy of each pixel, for label maps in which some pixels have no label."""

import keras
from keras import ops

from keras_convnext._messages import unknown
from keras_convnext.data.segmentation.labels import IGNORED, MEANS


@keras.saving.register_keras_serializable(package="keras_convnext")
class SegmentationLoss(keras.losses.Loss):
    """Cross-entropy between label maps and logits; pixels labelled 255 (`IGNORED`) have the loss 0.

    `mean="all"` divides the sum by the number of all pixels, as mmsegmentation does by default and as the
    published learning rates were tuned; `mean="labelled"` by the number of those that have a label, as
    transformers does, so that the loss does not depend on how much of a batch is labelled. The two differ by
    the share of the labelled pixels. Where a batch is divided among processes or TensorFlow replicas,
    "labelled" is the mean of their means.

    `keras.metrics.MeanIoU(classes, ignore_class=255, sparse_y_pred=False)` goes with it; its counts are int32
    on JAX, 2.1e9 pixels at most, those of `evaluation.segmentation` are int64.

    Reference: mmsegmentation 1.2.2, cross_entropy_loss.py (avg_non_ignore=False); transformers,
    modeling_upernet.py.

    Args:
        mean: "all" or "labelled".
        name, dtype: as in Keras.

    Call arguments:
        y_true: int (N, H, W), class numbers, 255 for no label.
        y_pred: float (N, H, W, classes), logits.

    Returns:
        float32 scalar.

    Example:
        model.compile("adamw", loss={"logits": SegmentationLoss(), "auxiliary": SegmentationLoss()},
                      loss_weights={"logits": 1.0, "auxiliary": 0.4})
    """

    def __init__(self, mean="all", name="segmentation_loss", dtype=None):
        if mean not in MEANS:
            raise ValueError(unknown("mean", mean, MEANS))
        super().__init__(name=name, reduction="sum_over_batch_size", dtype=dtype)
        self.mean = mean

    def call(self, y_true, y_pred):
        labels = ops.cast(y_true, "int32")
        is_labelled = labels != IGNORED
        places = ops.expand_dims(ops.where(is_labelled, labels, 0), -1)
        own = ops.squeeze(ops.take_along_axis(y_pred, places, axis=-1), -1)
        losses = ops.where(is_labelled, ops.logsumexp(y_pred, axis=-1) - own, 0.0)  # (N, H, W)
        if self.mean == "all":
            return losses
        count = ops.sum(ops.cast(is_labelled, losses.dtype))
        return losses * (ops.cast(ops.size(labels), losses.dtype) / ops.maximum(count, 1.0))

    def get_config(self):
        return {"mean": self.mean, "name": self.name, "dtype": self.dtype}
