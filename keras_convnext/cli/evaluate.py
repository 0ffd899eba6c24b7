"""`evaluate`, `knn` and `probe` score a model on a data set."""

import argparse
import contextlib
import os
from collections.abc import Callable
from typing import Any

from keras_convnext.cli import shared
from keras_convnext.weights import catalog

EVALUATE_EXAMPLES = """examples:
  keras-convnext evaluate convnext_tiny.fb_in1k --data imagenet/ILSVRC2012_img_val.tar
  keras-convnext evaluate convnext_tiny.fb_in22k_ft_in1k_384 --data imagenet/val --output report/
  keras-convnext evaluate convnext_tiny.fb_in1k --weights my_weights.safetensors --data imagenet/val
  keras-convnext evaluate my_leaves.keras --data leaves/ --split test --no-results
  keras-convnext evaluate convnext_tiny.fb_ade20k_512 --data ADEChallengeData2016 --split validation
  keras-convnext evaluate runs/camvid/final.safetensors --data camvid/ --split val --output report/
  keras-convnext evaluate convnext_tiny.fb_coco_mask_rcnn --data instances_val2017.json --images val2017/

The tag decides how images are resized and cropped. --data is a folder of class folders, ImageNet's tars, a
set of TensorFlow Datasets, TFRecord files or what `keras-convnext prepare` wrote. Data with some of the
classes of ImageNet, such as ImageNet-A and -R, is classified among these alone. A row with all that a score
depends on is added to results.csv. --output gets predictions, confusions and accuracies by class as CSV
files, and a picture of the worst classes.

A segmenter is evaluated on photos with label maps: mIoU, the share of pixels that are right, IoU by class.
--data is in a layout that `data.segmentation.sources.open_source` names, such as images/ and masks/. The
values that stand for no label are those of its training, unless --ignored names others. --mode slide is
how published scores were made, multi_scale their "ms" (six scales with flip); whole is the fastest, but JAX
compiles it for each new size of photo.

A detector is evaluated on a COCO-style JSON: average precision of its boxes and masks by pycocotools.
--output gets results.json, its detections as COCO's results files; no row is added to results.csv."""


def evaluate_options(option: Callable) -> None:
    option("model", "MODEL", "tag, architecture, weight file, .keras file or exported file")
    option("--data", "PATH", "folder or file with the images", required=True)
    option("--weights", "FILE", "weight file in place of the tag's own")
    option("--images", "DIR", "of a detector: folder of the photos; default that of the JSON")
    option("--split", "NAME", "default validation, where there are splits")
    option("--labels", "FILE", "'file,label' lines for a folder without classes")
    real = "ReaL accuracy too, from real.json unless the data has these labels"
    option("--real", "FILE", real, nargs="?", const=True)
    option("--batch-size", "N", "images, default 64", type=shared.positive)
    option("--limit", "N", "that many images only, spread evenly over the data", type=shared.positive)
    allowed = "damaged images allowed, default 0.01"
    option("--max-faults", "SHARE", allowed, type=shared.not_negative, default=0.01)
    modes = "of a segmenter: whole, slide or multi_scale; default slide for a tag, else whole"
    option("--mode", "MODE", modes)
    option("--ignored", "N,N", "values of label maps that stand for not labelled", type=shared.values)
    option("--output", "DIR", "folder for CSV files and pictures")
    option("--results", "FILE", "file to add a row to, default results.csv", default="results.csv")
    option("--no-results", None, "add no row")
    option("--image-size")
    option("--json")


# Options that one task has, by their names in `argparse`.
_OF_TASK = {
    "classification": ("real", "labels"),
    "segmentation": ("mode", "ignored"),
    "detection": ("images",),
}


def evaluate_command(options: argparse.Namespace) -> int:
    """Prints the scores of a model, by its task; images that cannot be decoded are reported and left out."""
    rooms = ("classification", "segmentation", "detection")
    shared.import_quietly(*(f"keras_convnext.evaluation.{room}" for room in rooms), "tensorflow")
    from keras_convnext.evaluation.results import result_row

    source = _resolved(options.model, options.weights)
    task = _task_of(options.model, source)
    for other, names in _OF_TASK.items():
        for name in names if other != task else ():
            if getattr(options, name) is not None:
                raise ValueError(f"Expected a model for {other} beside --{name}, received one for {task}.")
    if task == "detection":
        return _evaluate_detector(options, source)
    evaluate, facts_of = _EVALUATIONS[task]
    result, numbers = evaluate(options, source)
    shared.print_faults(list(result.faults.values()))
    row = result_row(result)
    if options.json:
        numbers |= {"n": len(result.numbers), "skipped": result.num_skipped}
        numbers |= {name: getattr(result, name) for name in ("seconds", "images_per_second")}
        shared.print_json(row | numbers | {"faults": result.faults})
    else:
        shared.print_facts(
            f"{row['model']} on {row['data']}",
            {
                **facts_of(row),
                "images": f"{row['n']} ({row['skipped']} skipped), split {row['split'] or 'none'}",
                "outputs": row["outputs"],
                "prepared": _preparation(row),
                "speed": f"{result.images_per_second:,.1f} images/s, {result.seconds:,.1f} s in all",
                "licence": shared.licence_text(row["licence"]),
                "row added to": None if options.no_results else options.results,
                "files in": options.output,
            }.items(),
        )
    return 1 if result.num_skipped else 0


def _resolved(model: str, weights: str | None) -> Any:
    """Returns what weights a name means; None where that cannot be told, as of a file that `export` wrote."""
    from keras_convnext.weights.resolve import resolve

    with contextlib.suppress(ValueError, OSError):
        found = resolve(model, "default" if weights is None else weights)
        return found if found.task else None  # reads the file
    return None


def _task_of(model: str, source: Any) -> str:
    """Returns the task of what was resolved, or of a file that `export` wrote."""
    from keras_convnext.exporting import runtimes

    if source is None and runtimes.is_exported(path := os.path.expanduser(model)):
        is_segmenter = runtimes.read_metadata(path).get("output", {}).get("task") == "segmentation"
        return "segmentation" if is_segmenter else "classification"
    return source.task if source is not None and source.heads is not None else "classification"


def _evaluate_classifier(options: argparse.Namespace, _source: Any) -> tuple[Any, dict[str, Any]]:
    from keras_convnext.data.sources import open_source
    from keras_convnext.evaluation.classification import evaluate
    from keras_convnext.weights.resolve import resolve

    model, data = options.model, options.data
    if options.weights is not None:
        model = resolve(model, options.weights, "classification")
    if options.labels is not None:
        data = open_source(data, options.split, labels=options.labels)
    result = evaluate(
        model, data, real_labels=options.real, preprocessing=options.image_size, **_common(options)
    )
    return result, {"top1": result.top1, "top5": result.top5, "real": result.real_accuracy}


def _evaluate_segmenter(options: argparse.Namespace, source: Any) -> tuple[Any, dict[str, Any]]:
    from keras_convnext.evaluation.segmentation import evaluate

    result = evaluate(
        source or options.model,
        options.data,
        mode=options.mode,
        ignored_values=options.ignored,
        image_size=options.image_size,
        **_common(options),
    )
    return result, result.report()


def _evaluate_detector(options: argparse.Namespace, source: Any) -> int:
    from keras_convnext.evaluation.detection import evaluate

    if options.split is not None or options.batch_size is not None:
        raise ValueError("Expected no --split nor --batch-size for a detector: --data is one JSON file.")
    result = evaluate(
        source,
        options.data,
        options.images,
        image_size=options.image_size,
        limit=options.limit,
        output=options.output,
        max_faults=options.max_faults,
    )
    shared.print_faults([f"{name}: {reason}" for name, reason in result.faults.items()])
    if options.json:
        shared.print_json({"model": options.model, **result.report(), "faults": result.faults})
        return 1 if result.faults else 0
    facts: dict[str, object] = {}
    for kind, scores in result.scores.items():
        means = {name.removeprefix("AP "): f"{value:.2f}" for name, value in scores.means.items()}
        facts[f"{kind} AP"] = f"{means.pop('AP')} %; " + ", ".join(map(" ".join, means.items()))
    facts |= {
        "images": f"{result.num_images - len(result.faults)} ({len(result.faults)} skipped)",
        "detections": f"{len(result.found):,}",
        "time": f"{result.seconds:,.1f} s",
        "licence": shared.licence_text("" if source.row is None else source.row.licence),
        "files in": options.output,
    }
    shared.print_facts(f"{options.model} on {options.data}", facts.items())
    return 1 if result.faults else 0


def _common(options: argparse.Namespace) -> dict[str, Any]:
    names = ("split", "batch_size", "limit", "output", "max_faults")
    results = None if options.no_results else options.results
    return {name: getattr(options, name) for name in names} | {"results": results}


def _accuracies(row: dict[str, str]) -> dict[str, str | None]:
    return {
        "top-1": f"{float(row['top1']):.2f} %{_published_text(row)}",
        "top-5": f"{float(row['top5']):.2f} %",
        "ReaL": f"{float(row['real']):.2f} %" if row["real"] else None,
    }


def _pixel_scores(row: dict[str, str]) -> dict[str, str | None]:
    return {
        "mIoU": f"{float(row['miou']):.2f} %",
        "aAcc": f"{float(row['aacc']):.2f} % of the pixels",
        "mAcc": f"{float(row['macc']):.2f} %, mean over the classes",
        "mode": row["mode"],
    }


def _preparation(row: dict[str, str]) -> str:
    resize = row["resize_size"] or (f"crop {row['crop']}" if row["crop"] else "no crop")
    return f"{row['resize_mode']}, {row['interpolation']}, {resize}, {row['image_size']} pixels"


_EVALUATIONS: dict[str, tuple[Callable, Callable]] = {
    "classification": (_evaluate_classifier, _accuracies),
    "segmentation": (_evaluate_segmenter, _pixel_scores),
}


def _published_text(row: dict[str, str]) -> str:
    """Returns the published top-1 where the model, the images and their size are the same, else ""."""
    from keras_convnext.evaluation.results import IMAGENET_VALIDATION

    published = catalog.CHECKPOINTS.get(row["model"])
    if published is None or published.top1 is None or row["data_sha256"] != IMAGENET_VALIDATION:
        return ""
    return f", published {published.top1} %" if row["image_size"] == str(published.image_size) else ""


KNN_EXAMPLES = """examples:
  keras-convnext knn --model convnext_tiny.dinov3_lvd1689m --data flowers/
  keras-convnext knn --model convnextv2_tiny.fcmae --data imagenet/ --cache features/ --set neighbours=20

Cosine similarity, votes weighted by exp(similarity / 0.07), as DINO evaluates. Data without a split of its
own is divided by class."""

PROBE_EXAMPLES = """examples:
  keras-convnext probe --model convnext_tiny.dinov3_lvd1689m --data flowers/
  keras-convnext probe --model convnextv2_tiny.fcmae --data imagenet/ --cache features/ --set epochs=20

SGD on features that are computed once, without augmentation. The learning rate is chosen on a part of the
training images, never on those that the score is of."""


def knn_options(option: Callable, recipe: str = "knn") -> None:
    option("recipe", "RECIPE", f"TOML file, default the published {recipe}", nargs="?", default=recipe)
    option("--model", "MODEL", "tag or weight file, in place of the recipe's")
    option("--cache", "DIR", "folder that keeps the features for next time")
    for name in ("--data", "--set", "--quiet", "--json"):
        option(name)


def probe_options(option: Callable) -> None:
    knn_options(option, "linear_probe")


def knn_command(options: argparse.Namespace) -> int:
    shared.import_quietly("keras_convnext.evaluation.features", "tensorflow")
    from keras_convnext.evaluation.nearest_neighbours import NearestNeighbours, nearest_neighbours

    return _evaluate_features(options, NearestNeighbours, nearest_neighbours)


def probe_command(options: argparse.Namespace) -> int:
    shared.import_quietly("keras_convnext.evaluation.features", "tensorflow")
    from keras_convnext.evaluation.linear_probe import LinearProbe, linear_probe

    return _evaluate_features(options, LinearProbe, linear_probe)


def _evaluate_features(options: argparse.Namespace, settings_class, function) -> int:
    from keras_convnext.training.recipes.files import recipe_path

    overrides = shared.recipe_overrides(options.set, model=options.model, data=options.data)
    settings = settings_class.read(recipe_path(options.recipe), overrides)
    if not settings.data:
        raise ValueError("Expected images: pass --data PATH, a folder of class folders for example.")
    result = function(settings, cache=options.cache, progress=not options.quiet)
    if options.json:
        shared.print_json(result.report())
        return 1 if result.faults else 0
    shared.print_faults(list(result.faults.values()))
    facts: dict[str, object] = {
        "top-1": f"{result.top1:.2f} %",
        "top-5": f"{result.top5:.2f} %",
        "chosen": f"{result.chosen:g}",
        "images": f"{result.n:,}, by the features of {result.num_train:,}",
        "time": f"{result.seconds:,.1f} s",
    }
    for score in result.scores:
        facts[f"  {score.setting:g}"] = f"{score.top1:6.2f} % top-1, {score.top5:6.2f} % top-5"
    facts["advice"] = result.advice or None
    shared.print_facts(f"{settings.model} on {settings.data}", facts.items())
    return 1 if result.faults else 0
