"""Accuracy of the models of training runs and of their LiteRT files: the cost of quantisation.

Every image of a run's validation set is classified, from the same pixels; a LiteRT file is calibrated on
training images.

    python benchmarks/quantized_accuracy.py RUN [RUN ...] --output benchmarks/exports/accuracy.md
"""

import argparse
import json
import pathlib
import tempfile

import numpy as np

PRECISIONS = ("float32", "float16", "dynamic_int8", "int8")


def main():
    from keras_convnext._terminal import markdown_table

    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "runs", nargs="+", type=pathlib.Path, help="folders that `keras-convnext train` wrote"
    )
    parser.add_argument("--output", type=pathlib.Path, help="file for the table")
    parser.add_argument("--images", type=int, default=64, help="training images for calibration, default 64")
    options = parser.parse_args()
    rows = [row for run in options.runs for row in measured(run, options.images)]
    columns = ("model", "data", "images", "file", "MB", "top-1", "top-5", "same top-1 as the model", "change")
    lines = markdown_table(columns, "<<><>>>>>", rows)
    text = "\n".join(["", facts(), "", *lines, ""]).lstrip()
    print(text)
    if options.output:
        options.output.write_text(text)


def facts():
    from keras_convnext import _environment

    return "- " + ", ".join(f"{name}: {value}" for name, value in _environment.machine().items())


def measured(run, num_images):
    """A row for the model and one for each precision."""
    from keras_convnext.evaluation.classification import evaluate
    from keras_convnext.exporting.export import export
    from keras_convnext.predictor import open_predictor
    from keras_convnext.training.recipes import files
    from keras_convnext.training.tasks import classification

    settings = files.load_recipe(run / "recipe.toml")
    training, validation = classification.open_data(settings)
    opened = open_predictor(
        settings.model.architecture,
        run / "final.safetensors",
        image_size=settings.evaluation.eval_image_size,
        classifier_activation=None,
    )
    prepared = settings.evaluation.preprocessing
    pixels = calibration_pixels(training, prepared, num_images)

    def score(model):
        return evaluate(model, validation, preprocessing=prepared, progress=False)

    name, data = settings.model.architecture, pathlib.Path(settings.data.source).name
    plain = score(opened.model)
    size = 4 * opened.model.count_params() / 1e6
    rows = [[name, data, f"{len(plain.numbers):,}", "Keras", f"{size:.2f}", *scores(plain), "", ""]]
    with tempfile.TemporaryDirectory() as folder:
        for precision in PRECISIONS:
            path = pathlib.Path(folder, f"{precision}.tflite")
            written = export(
                opened.model, path, precision=precision, calibration=pixels, preprocessing=prepared
            )
            found = score(path)
            same = np.mean(found.predictions[:, 0] == plain.predictions[:, 0])
            change = f"{found.top1 - plain.top1:+.2f}"
            cells = [precision, f"{written.num_bytes / 1e6:.2f}", *scores(found), f"{same:.2%}", change]
            rows.append([name, data, f"{len(found.numbers):,}", *cells])
            print(json.dumps(rows[-1]), flush=True)
    return rows


def scores(result):
    return f"{result.top1:.2f}", f"{result.top5:.2f}"


def calibration_pixels(source, preprocessing, count):
    """uint8 (count, H, W, 3), evenly drawn from the training images."""
    from keras_convnext.data import batches, sources

    chosen = sources.take(source, np.arange(count) * len(source) // count)
    batch = next(batches.eval_batches(chosen, preprocessing, batch_size=count).as_numpy_iterator())
    return batch["images"]


if __name__ == "__main__":
    main()
