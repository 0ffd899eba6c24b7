"""Runs a model over batches, and ranks the labels among its outputs."""

import itertools
import time
import weakref
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import keras
import numpy as np

from keras_convnext import _environment, predictor
from keras_convnext._terminal import Progress
from keras_convnext.data.faults import Faults
from keras_convnext.data.index import Source
from keras_convnext.data.preprocessing import Preprocessing
from keras_convnext.distribution import choose
from keras_convnext.evaluation.results import percentage
from keras_convnext.exporting import runtimes
from keras_convnext.weights import arrays

_jax_steps: weakref.WeakKeyDictionary = weakref.WeakKeyDictionary()


def import_batches() -> Any:
    """Returns the module `data.batches`, or says that it needs TensorFlow."""
    _environment.require("tensorflow", "Reading images, on every Keras backend,")
    from keras_convnext.data import batches

    return batches


def outputs_of(
    model: Any,
    source: Source,
    preprocessing: Preprocessing,
    *,
    title: str,
    batch_size: int,
    faults: Faults,
    progress: bool,
    share: tuple[int, int] = (0, 1),
    columns: np.ndarray | None = None,
) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Yields places in the source, labels and outputs of the images that can be decoded, batch by batch.

    `columns` int (K,) choose among the outputs, `share` is (this host, hosts), `title` that of the progress.
    ValueError: outputs are infinite or NaN; DataError: more images are damaged than `faults` allows.
    """
    host, num_hosts = share
    dataset = import_batches().eval_batches(
        source, preprocessing, batch_size=batch_size, host=host, num_hosts=num_hosts, faults=faults
    )
    count = 0
    with Progress(title, -(-len(source) // num_hosts), is_wanted=progress) as shown:
        for index, (batch, outputs) in enumerate(with_outputs(model, dataset.as_numpy_iterator())):
            mask = batch["mask"]
            numbers, outputs = batch["numbers"][mask], outputs[mask]
            if columns is not None:
                outputs = outputs[:, columns]
            bad = arrays.not_finite(outputs)
            if bad.any():
                raise ValueError(
                    f"Expected numbers from the model, received infinite ones or NaN for {bad.sum()} of the "
                    f"{len(bad)} images of batch {index}, the first of them "
                    f"'{source.name(int(numbers[bad][0]))}'. Check the weights; with a float16 policy try "
                    "bfloat16 or float32."
                )
            yield numbers, batch["labels"][mask], outputs
            count += len(numbers)
            shown.show(count)


def scored(
    parts: Iterable[tuple[np.ndarray, np.ndarray, np.ndarray]], columns: np.ndarray | None
) -> dict[str, Any]:
    """Returns what `Result` has of every image of `outputs_of`, and the time it took.

    The output of a class whose column is -1, which the model lacks, comes after all others.
    """
    rows = []
    begin = time.perf_counter()
    for numbers, labels, outputs in parts:
        if columns is not None:
            outputs = np.where(columns < 0, np.float32("-inf"), outputs)
        rows.append((numbers, labels, label_ranks(outputs, labels), best_classes(outputs, 5)))
        if len(rows) == 1:
            first_end = time.perf_counter()
    end = time.perf_counter()
    numbers, labels, ranks, predictions = map(np.concatenate, zip(*rows, strict=True))
    # The first batch is left out of the speed, as the model is compiled in it.
    count, seconds = len(numbers) - len(rows[0][0]), end - first_end
    if not count:
        count, seconds = len(numbers), end - begin
    return {
        "numbers": numbers,
        "labels": labels,
        "ranks": ranks,
        "predictions": predictions,
        "seconds": end - begin,
        "images_per_second": count / max(seconds, 1e-9),
    }


def validate(
    model: Any,
    dataset: Any,
    after_batch: Callable[[], None] = lambda: None,
    gathered: Callable[[np.ndarray], list[np.ndarray]] = lambda array: [array],
) -> dict[str, float]:
    """Scores a classifier on batches that are made anew at each call, as training does after each epoch.

    The model gives logits (N, K), class i of the data being output i; `dataset` is what
    `batches.eval_batches` returns. `after_batch` may raise to end the evaluation; `gathered` takes an array
    of this process's images to those of all processes. Returns "loss", the mean cross-entropy of the labels
    without smoothing, "top1" and "top5" in percent, and "n", the images; NaN for NaN, and without images.
    """
    losses, ranks = [np.zeros(0)], [np.zeros(0, np.int32)]
    for batch, outputs in with_outputs(model, dataset.as_numpy_iterator()):
        after_batch()
        logits, labels = outputs[batch["mask"]].astype(np.float64), batch["labels"][batch["mask"]]
        largest = logits.max(axis=1, keepdims=True)
        own = np.take_along_axis(logits, labels[:, None], axis=1)
        losses.append((np.log(np.exp(logits - largest).sum(axis=1, keepdims=True)) + largest - own)[:, 0])
        ranks.append(np.where(np.isnan(logits).any(axis=1), logits.shape[1], label_ranks(logits, labels)))
    loss, rank = (np.concatenate(gathered(np.concatenate(parts))) for parts in (losses, ranks))
    mean = float(loss.mean()) if len(loss) else float("nan")
    return {"loss": mean, "top1": percentage(rank < 1), "top5": percentage(rank < 5), "n": len(rank)}


def with_outputs(model: Any, batches: Iterator[dict]) -> Iterator[tuple[dict, np.ndarray]]:
    """Yields each batch with its outputs; the next is on the device already while these are worked on."""
    forward = forward_function(model)

    def begin(batch: dict) -> Any:
        return forward(choose.divided(predictor.for_channels(batch["images"], model)))

    for batch in itertools.islice(batches, 1):  # waited for, as the model is compiled in it
        yield batch, choose.rows(begin(batch))
    begun = ((batch, begin(batch)) for batch in batches)
    end: tuple[dict, Any] = ({}, None)
    for (batch, outputs), _ in itertools.pairwise(itertools.chain(begun, [end])):  # the next has begun
        yield batch, choose.rows(outputs)


def forward_function(model) -> Callable[[np.ndarray], Any]:
    """Returns the function from images to outputs that does not wait for an accelerator to finish."""
    if isinstance(model, runtimes.ExportedModel):
        return model
    backend = keras.backend.backend()
    if backend == "torch":
        import torch

        def forward(images):
            with torch.inference_mode():
                return model(images, training=False)

        return forward
    if backend == "jax":
        state = [[v.value for v in vs] for vs in (model.trainable_variables, model.non_trainable_variables)]
        step = _jax_step(model)
        return lambda images: step(state, images)
    if backend == "tensorflow":
        from keras_convnext.distribution import tensorflow_engine

        if (of_replicas := tensorflow_engine.forward(model)) is not None:
            return of_replicas
        model.make_predict_function()
        return lambda images: model.predict_function([(images,)])
    return model.predict_on_batch


def _jax_step(model: Any) -> Callable[[Any, np.ndarray], Any]:
    """Returns the compiled function from weights and images to outputs; the same one for the same model."""
    import jax

    from keras_convnext.distribution import jax_engine

    if model not in _jax_steps:
        reference: Any = weakref.ref(model)  # the table must not keep the model

        def step(state, images):
            return reference().stateless_call(*state, images, training=False)[0]

        _jax_steps[model] = jax.jit(step, out_shardings=jax_engine.by_rows())
    return _jax_steps[model]


def label_ranks(outputs: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Counts the classes in front of the label: a larger output, or an equal one and a smaller number.

    Takes outputs float32 (N, K) without NaN and labels int (N,); returns int32 (N,), 0 where it is first.
    """
    own = np.take_along_axis(outputs, labels[:, None], axis=1)
    before = (outputs > own) | ((outputs == own) & (np.arange(outputs.shape[1]) < labels[:, None]))
    return before.sum(axis=1, dtype=np.int32)


def best_classes(outputs: np.ndarray, count: int) -> np.ndarray:
    """int32 (N, min(count, K)): the classes with the largest outputs, in the order of `label_ranks`."""
    return np.argsort(-outputs, axis=1, kind="stable")[:, :count].astype(np.int32)
