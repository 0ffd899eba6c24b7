"""The loss of label maps against PyTorch's cross-entropy, as mmsegmentation and transformers reduce it."""

import importlib.util

import keras
import numpy as np
import pytest
import torch
from keras import ops

import keras_convnext  # noqa: F401 - registers what a file names
from keras_convnext.training.segmentation_loss import SegmentationLoss

CLASSES = 7
RNG = np.random.default_rng(0)
LOGITS = (4 * RNG.normal(size=(2, 9, 11, CLASSES))).astype("float32")
TRUTH = RNG.integers(0, CLASSES, (2, 9, 11)).astype("uint8")
TRUTH[RNG.random(TRUTH.shape) < 0.3] = 255


def pytorchs(mean, truth=TRUTH):
    """The two reductions, written with PyTorch's own function."""
    logits = torch.from_numpy(LOGITS).permute(0, 3, 1, 2)
    each = torch.nn.functional.cross_entropy(
        logits, torch.from_numpy(truth.astype("int64")), ignore_index=255, reduction="none"
    )
    return float(each.mean() if mean == "all" else each.sum() / (truth != 255).sum())


@pytest.mark.parametrize("mean", ["all", "labelled"])
@pytest.mark.parametrize("dtype", ["uint8", "int32"])
def test_the_loss_is_pytorchs(mean, dtype):
    ours = float(SegmentationLoss(mean)(ops.convert_to_tensor(TRUTH.astype(dtype)), LOGITS))
    assert ours == pytest.approx(pytorchs(mean), rel=1e-6)
    other = "labelled" if mean == "all" else "all"
    assert abs(ours - pytorchs(other)) > 0.1  # 30 % of the pixels have no label


def test_the_means_agree_where_all_is_labelled():
    truth = np.where(TRUTH == 255, 3, TRUTH)
    for mean in ("all", "labelled"):
        assert float(SegmentationLoss(mean)(truth, LOGITS)) == pytest.approx(pytorchs("all", truth), rel=1e-6)


def test_a_batch_without_labels_has_the_loss_0():
    for mean in ("all", "labelled"):
        assert float(SegmentationLoss(mean)(np.full_like(TRUTH, 255), LOGITS)) == 0


@pytest.mark.once
@pytest.mark.skipif(importlib.util.find_spec("mmseg") is None, reason="mmsegmentation is not installed")
def test_the_loss_is_mmsegmentations():
    from mmseg.models.losses import CrossEntropyLoss

    logits = torch.from_numpy(LOGITS).permute(0, 3, 1, 2)
    theirs = CrossEntropyLoss()(logits, torch.from_numpy(TRUTH.astype("int64")), ignore_index=255)
    assert float(SegmentationLoss("all")(TRUTH, LOGITS)) == pytest.approx(float(theirs), rel=1e-6)


@pytest.mark.once
def test_the_gradient_is_pytorchs():
    if keras.backend.backend() != "torch":
        pytest.skip("the gradient is taken by PyTorch")
    gradients = []
    for loss in (
        lambda x: SegmentationLoss("all")(TRUTH, x),
        lambda x: torch.nn.functional.cross_entropy(
            x.permute(0, 3, 1, 2), torch.from_numpy(TRUTH.astype("int64")), ignore_index=255, reduction="none"
        ).mean(),
    ):
        x = torch.tensor(LOGITS, requires_grad=True)
        loss(x).backward()
        gradients.append(x.grad.numpy())
    np.testing.assert_allclose(gradients[0], gradients[1], atol=1e-8)
    assert (gradients[0][TRUTH == 255] == 0).all()


def test_fit_takes_the_loss_and_mean_iou():
    image = keras.Input((8, 8, 3))
    outputs = {
        name: keras.layers.Conv2D(CLASSES, 1, name=name)(keras.layers.Rescaling(1 / 255)(image))
        for name in ("logits", "auxiliary")
    }
    model = keras.Model(image, outputs)
    model.compile(
        keras.optimizers.SGD(0.01),
        loss={"logits": SegmentationLoss(), "auxiliary": SegmentationLoss()},
        loss_weights={"logits": 1.0, "auxiliary": 0.4},
        metrics={"logits": keras.metrics.MeanIoU(CLASSES, ignore_class=255, sparse_y_pred=False)},
    )
    images = RNG.integers(0, 256, (4, 8, 8, 3)).astype("float32")
    maps = RNG.integers(0, CLASSES, (4, 8, 8)).astype("int32")
    maps[:, :3] = 255
    logs = model.fit(images, {"logits": maps, "auxiliary": maps}, batch_size=4, verbose=0).history
    first = logs["loss"][0]
    assert first == pytest.approx(logs["logits_loss"][0] + 0.4 * logs["auxiliary_loss"][0], rel=1e-5)
    assert 0 <= logs["logits_mean_io_u"][0] <= 1
    before = model.evaluate(images, {"logits": maps, "auxiliary": maps}, verbose=0, return_dict=True)
    predicted = np.argmax(ops.convert_to_numpy(model.predict(images, verbose=0)["logits"]), -1)
    from keras_convnext.evaluation.segmentation_scores import Scores, confusion_matrix

    ours = Scores.of(confusion_matrix(maps, predicted, CLASSES)).miou
    assert 100 * before["logits_mean_io_u"] == pytest.approx(ours, rel=1e-4)


@pytest.mark.once
def test_an_unknown_mean_is_named():
    with pytest.raises(ValueError, match=r"Unknown mean 'labeled'\. Did you mean 'labelled'\?"):
        SegmentationLoss("labeled")
    assert SegmentationLoss.from_config(SegmentationLoss("labelled").get_config()).mean == "labelled"
