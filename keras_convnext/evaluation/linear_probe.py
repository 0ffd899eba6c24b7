"""Trains a linear classifier on the features of a frozen model, and measures its accuracy."""

import functools
import math
import os
from collections.abc import Sequence
from typing import Annotated, Any

import numpy as np
from keras import ops
from pydantic import Field, Strict

from keras_convnext._settings import BelowOne, Count, InsideOne, NotNegative, Positive, key
from keras_convnext.data import sources
from keras_convnext.data.index import Source
from keras_convnext.evaluation import forward
from keras_convnext.evaluation.features import (
    TRAIN_BLOCK,
    FeatureResult,
    FeatureSettings,
    Score,
    evaluate_features,
    full_precision,
)
from keras_convnext.evaluation.results import percentage


class LinearProbe(FeatureSettings):
    """The settings of a linear probe, as plain values: those of `FeatureSettings` and six more.

    Reference: facebookresearch/dinov2 at 05c66df, dinov2/eval/linear.py: SGD with momentum 0.9, no weight
    decay, a cosine to 0, kernels drawn with a deviation of 0.01, the best of many rates (given there per 256
    images of a batch). Three things are different here: features are those of the undistorted images (there:
    of random crops, computed anew each epoch); the rate is chosen on a part of the training images (there: on
    the images that the score is of); a run has as many epochs of the data as are asked for.
    """

    learning_rates: Annotated[tuple[Positive, ...], Strict(False), Field(min_length=1)] = key(
        "peak rates that are tried, at this `probe_batch_size`; the default is DINOv2's 13",
        (1e-5, 2e-5, 5e-5, 1e-4, 2e-4, 5e-4, 1e-3, 2e-3, 5e-3, 1e-2, 2e-2, 5e-2, 0.1),
    )
    selection_fraction: InsideOne = key(
        "share of the training images, by class and seed, that the rate is chosen on; then the classifier is "
        "trained on all of them with that rate",
        0.1,
    )
    epochs: Count = key("passes over the training features; default that of facebookresearch/dino", 100)
    probe_batch_size: Count = key("features of one step; all where there are fewer", 256)
    momentum: BelowOne = key("of SGD", 0.9)
    weight_decay: NotNegative = key("L2 penalty of the kernel", 0.0)


def linear_probe(
    settings: LinearProbe,
    *,
    model: Any = None,
    data: tuple[Source, Source] | None = None,
    cache: str | os.PathLike[str] | None = None,
    max_faults: float = 0.01,
    progress: bool = True,
) -> FeatureResult:
    """Trains a linear classifier on frozen features and measures its accuracy.

    A part of the training images is held out; one classifier a learning rate is trained on the rest. The rate
    with the best top-1 accuracy on the part held out, the smaller of equals, is taken to train the final
    classifier, whose `top1`, `top5`, `kernel` and `bias` the result has, on all training images; `scores` are
    those of the classifiers before. The images that the scores are of choose nothing. Arguments and errors:
    `features.evaluate_features`, and a ValueError where all rates lead to NaN.

    Example:
        result = linear_probe(LinearProbe(model="convnext_tiny.fb_in1k", data="flowers", epochs=20))
        result.top1, result.chosen
    """
    return evaluate_features(settings, _classify, model, data, cache, max_faults, progress)


def _classify(settings, train, test, source):
    is_held_out = sources.held_out_mask(source, settings.selection_fraction, settings.seed)[train.numbers]
    fit = functools.partial(
        fit_linear,
        num_classes=len(source.classes),
        epochs=settings.epochs,
        batch_size=settings.probe_batch_size,
        momentum=settings.momentum,
        weight_decay=settings.weight_decay,
        seed=settings.seed,
    )
    kernels, biases = fit(
        train.features[~is_held_out], train.labels[~is_held_out], learning_rates=settings.learning_rates
    )
    is_finite = np.isfinite(kernels).all(axis=(1, 2)) & np.isfinite(biases).all(axis=1)
    if not is_finite.any():
        rates = ", ".join(f"{rate:g}" for rate in settings.learning_rates)
        raise ValueError(
            f"Expected a useful learning rate, but all of {rates} lead to NaN or infinity. Pass smaller ones."
        )
    scores = []
    for rate, kernel, bias in zip(settings.learning_rates, kernels, biases, strict=True):
        held_out = linear_ranks(kernel, bias, train.features[is_held_out], train.labels[is_held_out])
        tested = linear_ranks(kernel, bias, test.features, test.labels)
        scores.append(Score(rate, percentage(tested < 1), percentage(tested < 5), percentage(held_out < 1)))
    # A rate that diverged may still be right by chance.
    candidates = [score for score, finite in zip(scores, is_finite, strict=True) if finite]
    chosen = max(candidates, key=lambda score: (score.selection_top1, -score.setting)).setting
    (kernel,), (bias,) = fit(train.features, train.labels, learning_rates=[chosen])
    final = linear_ranks(kernel, bias, test.features, test.labels)
    return {
        "scores": tuple(scores),
        "top1": percentage(final < 1),
        "top5": percentage(final < 5),
        "chosen": chosen,
        "kernel": kernel,
        "bias": bias,
    }


def fit_linear(
    features: np.ndarray,
    labels: np.ndarray,
    num_classes: int,
    *,
    learning_rates: Sequence[float],
    epochs: int,
    batch_size: int = 256,
    momentum: float = 0.9,
    weight_decay: float = 0.0,
    seed: int = 0,
) -> tuple[np.ndarray, np.ndarray]:
    """Trains one linear classifier a learning rate, all on the same batches from the same start.

    SGD with momentum on the cross-entropy of softmax(features @ kernel + bias), as PyTorch's: velocity <-
    momentum * velocity + gradient, weights <- weights - rate * velocity, where the rate goes from its peak to
    0 along a cosine over all steps. The classifiers are the columns of one matrix, whose gradient is
    features^T (softmax - target) / batch size. What is left over of an epoch is dropped; each has its own
    order. The weight decay is an L2 penalty of the kernels, which start normal with a deviation of 0.01.

    Takes float32 (N, C) and int (N,) from 0 up; returns kernels float32 (R, C, K) and biases float32 (R, K)
    of R rates and K classes, not finite where a rate is too large.
    """
    if not len(features):
        raise ValueError("Expected features to train on, received none.")
    width, num_rates = features.shape[1], len(learning_rates)
    size = min(batch_size, len(features))
    steps_per_epoch = len(features) // size
    total = epochs * steps_per_epoch
    start = np.random.default_rng([seed, 0]).normal(0, 0.01, (width, 1, num_classes))
    start = np.broadcast_to(start, (width, num_rates, num_classes)).reshape(width, -1)
    kernel = ops.convert_to_tensor(start.astype(np.float32))  # (C, R * K)
    bias = ops.zeros((num_rates * num_classes,), "float32")
    kernel_velocity, bias_velocity = ops.zeros_like(kernel), ops.zeros_like(bias)
    rates = np.repeat(np.asarray(learning_rates, np.float32), num_classes)
    one_hot = np.eye(num_classes, dtype=np.float32)
    step = 0
    with full_precision():
        for epoch in range(epochs):
            order = np.random.default_rng([seed, 1, epoch]).permutation(len(features))
            for first in range(0, steps_per_epoch * size, size):
                rows = order[first : first + size]
                x = ops.convert_to_tensor(features[rows])
                target = ops.convert_to_tensor(one_hot[labels[rows]][:, None])  # (B, 1, K)
                logits = ops.reshape(ops.matmul(x, kernel) + bias, (size, num_rates, num_classes))
                error = ops.reshape((ops.softmax(logits, axis=-1) - target) / size, (size, -1))
                gradient = ops.matmul(ops.transpose(x), error)
                if weight_decay:
                    gradient = gradient + weight_decay * kernel
                kernel_velocity = momentum * kernel_velocity + gradient
                bias_velocity = momentum * bias_velocity + ops.sum(error, axis=0)
                rate = ops.convert_to_tensor(rates * np.float32(0.5 * (1 + math.cos(math.pi * step / total))))
                kernel = kernel - rate * kernel_velocity
                bias = bias - rate * bias_velocity
                step += 1
    kernels = ops.convert_to_numpy(kernel).reshape(width, num_rates, num_classes).transpose(1, 0, 2)
    return np.ascontiguousarray(kernels), ops.convert_to_numpy(bias).reshape(num_rates, num_classes)


def linear_ranks(
    kernel: np.ndarray, bias: np.ndarray, features: np.ndarray, labels: np.ndarray
) -> np.ndarray:
    """int32 (N,): `forward.label_ranks` of the logits features @ kernel + bias; K where they are not finite.

    The kernel is float32 (C, K), the bias (K,), the features (N, C), the labels int (N,).
    """
    ranks = np.full(len(labels), len(bias), np.int32)
    if not (np.isfinite(kernel).all() and np.isfinite(bias).all()):
        return ranks
    for begin in range(0, len(labels), TRAIN_BLOCK):
        rows = slice(begin, begin + TRAIN_BLOCK)
        ranks[rows] = forward.label_ranks(features[rows] @ kernel + bias, labels[rows])
    return ranks
