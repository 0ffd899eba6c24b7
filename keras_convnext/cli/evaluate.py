"""`evaluate`, `knn`, `probe`: scores."""

import argparse

from keras_convnext.cli.shared import (
    MAX_FAULTS_SHOWN,
    complain,
    import_quietly,
    print_json,
    print_lines,
    recipe_overrides,
    score_lines,
)


def evaluate_command(options: argparse.Namespace) -> int:
    """Prints the accuracy of a classifier; images that cannot be decoded are reported and left out."""
    import_quietly("keras_convnext.evaluation.classification", "tensorflow")
    from keras_convnext.evaluation.classification import evaluate
    from keras_convnext.evaluation.results import result_row

    result = evaluate(
        options.model,
        options.data,
        weights=options.weights,
        split=options.split,
        labels=options.labels,
        real_labels=options.real,
        image_size=options.image_size,
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
