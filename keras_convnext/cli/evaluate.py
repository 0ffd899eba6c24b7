"""`evaluate`, `knn` and `probe` score a model on a data set."""

import argparse

from keras_convnext.cli.shared import (
    MAX_FAULTS_SHOWN,
    complain,
    import_quietly,
    positive_integer,
    print_json,
    print_lines,
    recipe_overrides,
    score_lines,
)

_EVALUATE_EXAMPLES = """examples:
  keras-convnext evaluate convnext_tiny.fb_in1k --data imagenet/ILSVRC2012_img_val.tar
  keras-convnext evaluate convnext_tiny.fb_in22k_ft_in1k_384 --data imagenet/val --output report/
  keras-convnext evaluate convnext_tiny.fb_in1k --weights my_weights.safetensors --data imagenet/val
  keras-convnext evaluate my_leaves.keras --data leaves/ --split test --no-results

The tag decides how images are resized and cropped. --data is a folder of class folders, ImageNet's tars, a
set of TensorFlow Datasets, TFRecord files or what `keras-convnext prepare` wrote. Data with some of the
classes of ImageNet, such as ImageNet-A and -R, is classified among these alone. A row with all that a score
depends on is added to results.csv. --output gets predictions, confusions and accuracies by class as CSV
files, and a picture of the worst classes."""


def evaluate_options(parser: argparse.ArgumentParser) -> None:
    """Adds the options and the examples of `evaluate`."""
    parser.set_defaults(run=evaluate_command)
    parser.epilog = _EVALUATE_EXAMPLES
    parser.add_argument(
        "model", metavar="MODEL", help="tag, architecture, weight file, .keras file or exported file"
    )
    parser.add_argument("--data", required=True, metavar="PATH", help="folder or file with the images")
    parser.add_argument("--weights", metavar="FILE", help="weight file in place of the tag's own")
    parser.add_argument("--split", metavar="NAME", help="default validation, where there are splits")
    parser.add_argument("--labels", metavar="FILE", help="'file,label' lines for a folder without classes")
    parser.add_argument(
        "--real",
        nargs="?",
        const=True,
        metavar="FILE",
        help="measure ReaL accuracy too; real.json, unless the data has these labels",
    )
    parser.add_argument(
        "--image-size", type=positive_integer, metavar="N", help="pixels, default the tag's own"
    )
    parser.add_argument("--batch-size", type=positive_integer, metavar="N", help="images, default 64")
    parser.add_argument(
        "--limit",
        type=positive_integer,
        metavar="N",
        help="that many images only, spread evenly over the data",
    )
    parser.add_argument(
        "--max-faults", type=float, default=0.01, metavar="SHARE", help="damaged images allowed, default 0.01"
    )
    parser.add_argument("--output", metavar="DIR", help="folder for CSV files and a picture")
    parser.add_argument(
        "--results", default="results.csv", metavar="FILE", help="file to add a row to, default results.csv"
    )
    parser.add_argument("--no-results", action="store_true", help="add no row")
    parser.add_argument("--json", action="store_true", help="print JSON")


def evaluate_command(options: argparse.Namespace) -> int:
    """Prints the accuracy of a classifier; images that cannot be decoded are reported and left out."""
    import_quietly("keras_convnext.evaluation.classification", "tensorflow")
    from keras_convnext.data.sources import open_source
    from keras_convnext.evaluation.classification import evaluate
    from keras_convnext.evaluation.results import result_row
    from keras_convnext.weights.resolve import resolve

    model, data = options.model, options.data
    if options.weights is not None:
        model = resolve(model, options.weights, "classification")
    if options.labels is not None:
        data = open_source(data, options.split, labels=options.labels)
    result = evaluate(
        model,
        data,
        split=options.split,
        real_labels=options.real,
        preprocessing=options.image_size,
        batch_size=options.batch_size,
        limit=options.limit,
        results=None if options.no_results else options.results,
        output=options.output,
        max_faults=options.max_faults,
    )
    reasons = list(result.faults.values())
    for reason in reasons[:MAX_FAULTS_SHOWN]:
        complain(f"error: {reason}")
    if len(reasons) > MAX_FAULTS_SHOWN:
        complain(f"error: {len(reasons) - MAX_FAULTS_SHOWN} more images; --output or --json names them all")
    row = result_row(result)
    if options.json:
        numbers = {
            "n": len(result.numbers),
            "skipped": result.num_skipped,
            "top1": result.top1,
            "top5": result.top5,
            "real": result.real_accuracy,
            "seconds": result.seconds,
            "images_per_second": result.images_per_second,
        }
        print_json(row | numbers | {"faults": result.faults})
    else:
        print_lines(f"{row['model']} on {row['data']}", score_lines(row, options))
    return 1 if result.num_skipped else 0


_KNN_EXAMPLES = """examples:
  keras-convnext knn --model convnext_tiny.dinov3_lvd1689m --data flowers/
  keras-convnext knn --model convnextv2_tiny.fcmae --data imagenet/ --cache features/ --set neighbours=20

Cosine similarity, votes weighted by exp(similarity / 0.07), as DINO evaluates. Data without a split of its
own is divided by class."""

_PROBE_EXAMPLES = """examples:
  keras-convnext probe --model convnext_tiny.dinov3_lvd1689m --data flowers/
  keras-convnext probe --model convnextv2_tiny.fcmae --data imagenet/ --cache features/ --set epochs=20

SGD on features that are computed once, without augmentation. The learning rate is chosen on a part of the
training images, never on those that the score is of."""


def knn_options(parser: argparse.ArgumentParser) -> None:
    """Adds the options and the examples of `knn`."""
    parser.set_defaults(run=knn_command)
    parser.epilog = _KNN_EXAMPLES
    _add_feature_options(parser, "knn")


def probe_options(parser: argparse.ArgumentParser) -> None:
    """Adds the options and the examples of `probe`."""
    parser.set_defaults(run=probe_command)
    parser.epilog = _PROBE_EXAMPLES
    _add_feature_options(parser, "linear_probe")


def _add_feature_options(parser: argparse.ArgumentParser, recipe: str) -> None:
    parser.add_argument(
        "recipe",
        nargs="?",
        default=recipe,
        metavar="RECIPE",
        help=f"TOML file, default the published {recipe}",
    )
    parser.add_argument("--model", metavar="MODEL", help="tag or weight file, in place of the recipe's")
    parser.add_argument("--data", metavar="PATH", help="images, in place of the recipe's")
    parser.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="another value of the recipe"
    )
    parser.add_argument("--cache", metavar="DIR", help="folder that keeps the features for next time")
    parser.add_argument("--quiet", action="store_true", help="show no progress")
    parser.add_argument("--json", action="store_true", help="print JSON")


def knn_command(options: argparse.Namespace) -> int:
    """Prints how well the nearest neighbours in a model's features classify images."""
    import_quietly("keras_convnext.evaluation.features", "tensorflow")
    from keras_convnext.evaluation.nearest_neighbours import NearestNeighbours, nearest_neighbours

    return _evaluate_features(options, NearestNeighbours, nearest_neighbours)


def probe_command(options: argparse.Namespace) -> int:
    """Prints how well a linear classifier on a model's features classifies images."""
    import_quietly("keras_convnext.evaluation.features", "tensorflow")
    from keras_convnext.evaluation.linear_probe import LinearProbe, linear_probe

    return _evaluate_features(options, LinearProbe, linear_probe)


def _evaluate_features(options: argparse.Namespace, settings_class, function) -> int:
    from keras_convnext.training.recipe_files import read_fields, recipe_path

    overrides = recipe_overrides(options.set)
    for key in ("model", "data"):
        if getattr(options, key) is not None:
            overrides[key] = getattr(options, key)
    settings = read_fields(recipe_path(options.recipe), settings_class, overrides)
    if not settings.data:
        raise ValueError("Expected images: pass --data PATH, a folder of class folders for example.")
    result = function(settings, cache=options.cache, progress=not options.quiet)
    if options.json:
        print_json(result.report())
        return 1 if result.faults else 0
    for reason in list(result.faults.values())[:MAX_FAULTS_SHOWN]:
        complain(f"error: {reason}")
    lines: list[tuple[str, object]] = [
        ("top-1", f"{result.top1:.2f} %"),
        ("top-5", f"{result.top5:.2f} %"),
        ("chosen", f"{result.chosen:g}"),
        ("images", f"{result.n:,}, by the features of {result.num_train:,}"),
        ("time", f"{result.seconds:,.1f} s"),
    ]
    lines += [
        (f"  {score.setting:g}", f"{score.top1:6.2f} % top-1, {score.top5:6.2f} % top-5")
        for score in result.scores
    ]
    if result.advice:
        lines.append(("advice", result.advice))
    print_lines(f"{settings.model} on {settings.data}", lines)
    return 1 if result.faults else 0
