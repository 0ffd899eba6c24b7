"""Classifies images by the k nearest neighbours of their features, which a frozen model gives."""

import os
from collections.abc import Sequence
from typing import Annotated, Any

import numpy as np
from keras import ops
from pydantic import Field, Strict

from keras_convnext._settings import Count, Positive, key
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

_SPARE_NEIGHBOURS = 16  # ranked exactly besides those wanted, as the first ranking is in float32
_EXACT_BLOCK = 16  # images whose candidates are ranked exactly at a time
_QUERY_BLOCK = 1024  # images compared at a time, so that a block of similarities takes 256 MB


class NearestNeighbours(FeatureSettings):
    """The settings of a k-NN evaluation, as plain values: those of `FeatureSettings` and two more.

    Reference: Wu et al. 2018, "Unsupervised Feature Learning via Non-Parametric Instance Discrimination"
    (arXiv:1805.01978), section 3.4; numbers and temperature: facebookresearch/dino at 04c0ad9, eval_knn.py.
    """

    neighbours: Annotated[tuple[Count, ...], Strict(False), Field(min_length=1)] = key(
        "numbers of neighbours that vote; the default is DINO's, whose best is usually 20", (10, 20, 100, 200)
    )
    temperature: Positive = key("of a neighbour's vote exp(similarity / temperature)", 0.07)


def nearest_neighbours(
    settings: NearestNeighbours,
    *,
    model: Any = None,
    data: tuple[Source, Source] | None = None,
    cache: str | os.PathLike[str] | None = None,
    max_faults: float = 0.01,
    progress: bool = True,
) -> FeatureResult:
    """Classifies images by the training images whose features are nearest.

    The nearest are those of largest cosine similarity; each votes for its class with the weight
    exp(similarity / temperature). An image counts for top-5 when fewer than 5 classes have more votes than
    its label, equal ones being ordered by their class number; a label without any vote never counts. (In
    eval_knn.py of facebookresearch/dino such a label may count for top-5 by the order of a sort.) Arguments
    and errors: `features.evaluate_features`, and a ValueError for more neighbours than training images.

    Example:
        result = nearest_neighbours(NearestNeighbours(model="convnext_tiny.fb_in1k", data="flowers"))
        result.top1, [(score.setting, score.top1) for score in result.scores]
    """
    return evaluate_features(settings, _classify, model, data, cache, max_faults, progress)


def _classify(settings, train, test, source):
    ranks = neighbour_ranks(
        train.features,
        train.labels,
        test.features,
        test.labels,
        len(source.classes),
        settings.neighbours,
        settings.temperature,
    )
    scores = tuple(
        Score(number, percentage(ranks[number] < 1), percentage(ranks[number] < 5))
        for number in settings.neighbours
    )
    headline = next((score for score in scores if score.setting == 20), scores[0])
    return {"scores": scores, "top1": headline.top1, "top5": headline.top5, "chosen": headline.setting}


def neighbour_ranks(
    train_features: np.ndarray,
    train_labels: np.ndarray,
    features: np.ndarray,
    labels: np.ndarray,
    num_classes: int,
    neighbours: Sequence[int],
    temperature: float,
) -> dict[int, np.ndarray]:
    """Ranks the labels of images among the classes that their nearest neighbours vote for.

    Takes features float (N, C) and labels int (N,) of the images that vote, then (Q, C) and (Q,) of those
    that are classified. Returns for each number of neighbours, 1 to N, int32 (Q,): classes with more votes
    than the label, or as many and a smaller number; `num_classes` where the label has no vote.
    """
    similarities, numbers = find_neighbours(train_features, features, max(neighbours))
    ranks = {number: np.empty(len(features), np.int32) for number in neighbours}
    for begin in range(0, len(features), _QUERY_BLOCK):
        rows = slice(begin, begin + _QUERY_BLOCK)
        for number, of_number in ranks.items():
            votes = count_votes(
                similarities[rows, :number], train_labels[numbers[rows, :number]], num_classes, temperature
            )
            own = np.take_along_axis(votes, labels[rows, None], axis=1)[:, 0]
            of_number[rows] = np.where(own > 0, forward.label_ranks(votes, labels[rows]), num_classes)
    return ranks


def find_neighbours(
    train_features: np.ndarray,
    features: np.ndarray,
    count: int,
    *,
    query_block: int = _QUERY_BLOCK,
    train_block: int = TRAIN_BLOCK,
) -> tuple[np.ndarray, np.ndarray]:
    """Finds the training images of largest cosine similarity, `count` for each of the features.

    Similarities of all pairs, (N, C) and (Q, C), are computed block by block on the backend's device, in
    float32. What comes near the first `count` is then compared in float64, so that neither blocks nor backend
    decide the order. Returns float64 (Q, count), similarities in [-1, 1], the largest first, and int64 (Q,
    count), rows of `train_features`; of equal similarities the smaller row comes first.
    """
    if not 1 <= count <= len(train_features):
        raise ValueError(
            f"Expected 1 to {len(train_features)} neighbours, the number of training images, received "
            f"{count}. Pass smaller numbers of neighbours."
        )
    train, queries = _normalised(train_features), _normalised(features)
    kept = min(count + _SPARE_NEIGHBOURS, len(train))
    best_values = np.empty((len(queries), 0), np.float32)
    best_rows = np.empty((len(queries), 0), np.int64)
    with full_precision():
        for begin in range(0, len(train), train_block):
            block = ops.transpose(ops.convert_to_tensor(train[begin : begin + train_block]))
            found = [
                ops.top_k(ops.matmul(ops.convert_to_tensor(queries[first : first + query_block]), block), k)
                for k in [min(kept, block.shape[1])]
                for first in range(0, len(queries), query_block)
            ]
            values = np.concatenate([ops.convert_to_numpy(values) for values, _ in found])
            rows = begin + np.concatenate([ops.convert_to_numpy(rows) for _, rows in found]).astype(np.int64)
            best_values = np.concatenate([best_values, values], axis=1)
            best_rows = np.concatenate([best_rows, rows], axis=1)
            order = np.argsort(-best_values, axis=1, kind="stable")[:, :kept]
            best_values = np.take_along_axis(best_values, order, axis=1)
            best_rows = np.take_along_axis(best_rows, order, axis=1)
    similarities = np.empty((len(queries), count))
    for begin in range(0, len(queries), _EXACT_BLOCK):
        part = slice(begin, begin + _EXACT_BLOCK)
        candidates = np.sort(best_rows[part], axis=1)  # equal similarities keep the order of the rows
        exact = np.einsum("qkc,qc->qk", train[candidates].astype(np.float64), queries[part])
        order = np.argsort(-exact, axis=1, kind="stable")
        best_rows[part] = np.take_along_axis(candidates, order, axis=1)
        similarities[part] = np.take_along_axis(exact, order, axis=1)[:, :count]
    return similarities, best_rows[:, :count]


def count_votes(
    similarities: np.ndarray, labels: np.ndarray, num_classes: int, temperature: float
) -> np.ndarray:
    """float64 (Q, num_classes): the sums of exp((similarity - largest similarity) / temperature) by class.

    Takes similarities float64 (Q, k) and the neighbours' classes int (Q, k). The largest similarity of an
    image only scales its votes, and keeps them from overflowing. 0 exactly where no neighbour has the class.
    """
    weights = np.exp((similarities - similarities.max(axis=1, keepdims=True)) / temperature)
    weights = np.maximum(weights, np.finfo(np.float64).tiny)  # a vote that underflows still is one
    votes = np.zeros((len(similarities), num_classes))
    np.add.at(votes, (np.arange(len(votes))[:, None], labels), weights)
    return votes


def _normalised(features: np.ndarray) -> np.ndarray:
    """Returns features of length 1, in float32; those of length 0 stay so."""
    features = np.asarray(features, np.float64)
    lengths = np.linalg.norm(features, axis=1, keepdims=True)
    if not np.isfinite(lengths).all():
        row = int(np.flatnonzero(~np.isfinite(lengths[:, 0]))[0])
        raise ValueError(f"Expected finite features, received NaN or infinity in row {row}. Check weights.")
    return (features / np.maximum(lengths, np.finfo(np.float64).tiny)).astype(np.float32)
