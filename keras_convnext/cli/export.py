"""`export`, `page`: files for other runtimes."""

import argparse
import dataclasses
import pathlib
import sys

from keras_convnext.cli.predict import read_labels
from keras_convnext.cli.shared import complain, import_quietly, names_file, print_json, print_table
from keras_convnext.cli.weights import size_text
from keras_convnext.data import class_names


def export_command(options: argparse.Namespace) -> int:
    """Writes files for other runtimes, each checked against the model."""
    if options.report is not None and options.no_check:
        raise ValueError(
            "Expected one of --report and --no-check: a report is made of what the check measures."
        )
    options.weights = options.model if names_file(options.model) else None
    labels = read_labels(options)
    import_quietly("keras_convnext.exporting.export")
    from keras_convnext import _environment, predictor
    from keras_convnext.exporting import deploy, report
    from keras_convnext.exporting.export import FORMATS, export

    targets = _export_targets(options, FORMATS)
    opened = predictor.open_predictor(
        None if options.weights else options.model,
        options.weights,
        image_size=options.image_size,
        classes=len(labels) or None,
        classifier_activation=None if options.logits else "softmax",
    )
    if not labels and opened.class_list is not None:
        labels = class_names.class_names(opened.class_list)
    results = []
    for format, precision, path in targets:
        if sys.stderr.isatty():
            print(f"writing and checking {path} ...", file=sys.stderr, flush=True)
        result = export(
            opened.model,
            path,
            format,
            precision=precision,
            batch_size=options.batch_size,
            image_size=options.image_size,
            calibration=options.calibration,
            labels=labels or None,
            licence=None if opened.row is None else opened.row.licence,
            preparation=opened.preparation,
            tolerance=options.tolerance,
            check=not options.no_check,
            replace=options.force,
        )
        results.append(result)
    if options.json:
        print_json([dataclasses.asdict(result) | {"path": str(result.path)} for result in results])
    elif options.no_check:
        for result in results:
            print(f"{result.path}: {result.num_bytes / 1e6:.2f} MB, not checked")
    else:
        print_table(report.COLUMNS, "<<<>>>>>", report.rows(results))
    if options.report is not None:
        heading = f"{opened.model.name}, {_environment.cpu_name()}, {_environment.available_cores()} cores"
        folded = str(deploy.savings(opened.model, deploy.deploy(opened.model)))
        paths = report.write_report(results, options.report, heading, folded)
        complain(f"Written: {', '.join(map(str, paths))}")
    return 0


def _export_targets(options: argparse.Namespace, formats) -> list[tuple[str, str, pathlib.Path]]:
    """(format, precision, path) of each file that --format and --precision ask for."""
    from keras_convnext.exporting import runtimes

    output = pathlib.Path(options.output)
    if not any("," in words or words == "all" for words in (options.format or "", options.precision)):
        return [(options.format or runtimes.format_of(output), options.precision, output)]
    if options.format is None:
        raise ValueError("Expected --format NAMES beside several precisions; OUTPUT is then a folder.")
    wanted = list(formats) if options.format == "all" else options.format.split(",")
    stem = pathlib.Path(options.model).stem if names_file(options.model) else options.model
    targets = []
    for format in wanted:
        if format not in formats:
            raise ValueError(f"Unknown format {format!r}. Known: {', '.join(formats)}.")
        known = formats[format].precisions
        precisions = known if options.precision == "all" else options.precision.split(",")
        for precision in precisions:
            suffix = formats[format].suffix or "_saved_model"
            targets.append((format, precision, output / f"{stem}_{precision}{suffix}"))
    output.mkdir(parents=True, exist_ok=True)
    return targets


def page_command(options: argparse.Namespace) -> int:
    """Writes a page that classifies pictures in the browser."""
    from keras_convnext.exporting import web_page

    page = web_page.write_page(options.model, options.output, options.runtime, replace=options.force)
    print(f"{page}: {size_text(page)}; open it in a browser")
    return 0
