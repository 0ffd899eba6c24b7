"""The command `keras-convnext`: parses its arguments, calls one function, prints what that returns.

Exit codes: 0; 1 when some images could not be read; 2 when nothing could be done, with a line that says why;
3 when training stopped at a loss that is not finite; 70 for a bug in here; 130 after Ctrl-C and 143 after
SIGTERM (training has then written a checkpoint); 141 when the reader of a pipe has gone.

Keras and its backend are imported by the commands that need a model, so that the others answer at once.
"""

import argparse
import contextlib
import dataclasses
import importlib
import io
import itertools
import json
import logging
import math
import os
import pathlib
import sys
import traceback
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from keras_convnext import (
    __version__,
    _environment,
    checkpoints,
    downloads,
    quiet,
    state_dicts,
    torch_files,
)
from keras_convnext.checkpoints import WEIGHT_SUFFIXES, Checkpoint
from keras_convnext.data import class_names, preprocess
from keras_convnext.descriptions import ImageDescription
from keras_convnext.variants import VARIANTS, Variant

DEFAULT_MODEL = "convnext_tiny.keras_applications"  # as ConvNeXtTiny(weights="imagenet")
PROGRESS_FROM_IMAGES = 20
MAX_FAULTS_SHOWN = 20
LICENCE_WIDTH = 15  # of the table; one identifier is longer than all others and is cut

_EPILOG = {
    "list": """examples:
  keras-convnext list
  keras-convnext list "convnextv2_*" --classes 1000 --image-size 384
  keras-convnext list convnext_tiny --commercial --downloadable
  keras-convnext list --architectures""",
    "info": """examples:
  keras-convnext info convnext_tiny
  keras-convnext info convnext_tiny.fb_in22k_ft_in1k_384
  keras-convnext info my_weights.safetensors --json""",
    "predict": """examples:
  keras-convnext predict cat.jpg
  keras-convnext predict photographs/ --model convnext_tiny.fb_in22k_ft_in1k_384 --top 3 --json
  keras-convnext predict cat.jpg --weights convnext_tiny_in1k.safetensors
  keras-convnext predict leaf.jpg --weights my_leaves.keras --labels leaves.txt

Without --model, a file given by --weights says itself which architecture it is, and how images are resized
where it was written by training; else they are as for that architecture's ImageNet weights. A .keras file
brings its own image size; it must take pixels in 0..255. Without --labels the names of the
classes are looked for beside the file: my_leaves.labels.txt.""",
    "convert": """examples:
  keras-convnext convert convnext_tiny_1k_224_ema.pth tiny.safetensors --layout timm
  keras-convnext convert convnext_tiny.fb_in1k tiny.pth
  keras-convnext convert tiny.safetensors tiny.keras""",
    "evaluate": """examples:
  keras-convnext evaluate convnext_tiny.fb_in1k --data imagenet/ILSVRC2012_img_val.tar
  keras-convnext evaluate convnext_tiny.fb_in22k_ft_in1k_384 --data imagenet/val --output report/
  keras-convnext evaluate convnext_tiny.fb_in1k --weights my_weights.safetensors --data imagenet/val
  keras-convnext evaluate my_leaves.keras --data leaves/ --split test --no-results

The tag decides how images are resized and cropped. --data is a folder of class folders, ImageNet's tars, a
set of TensorFlow Datasets, TFRecord files or what `keras-convnext prepare` wrote. Data with some of the
classes of ImageNet, such as ImageNet-A and -R, is classified among these alone. A row with all that a score
depends on is added to results.csv. --output gets predictions, confusions and accuracies by class as CSV
files, and a picture of the worst classes.""",
    "train": """examples:
  keras-convnext train recipes/smoke.toml --out runs/smoke
  keras-convnext train fine_tune --data flowers/ --out runs/flowers --set epochs=10
  keras-convnext train fine_tune --data flowers/ --out runs/head --set trainable=head
  keras-convnext train fine_tune --data flowers/ --out runs/flowers --distribute data_parallel
  keras-convnext train --list

RECIPE is a TOML file or the name of a published recipe. --data is a folder of class folders, ImageNet's tars,
a set of TensorFlow Datasets, TFRecord files or what `keras-convnext prepare` wrote. The same command goes on
where it was stopped, by Ctrl-C, by SIGTERM, by a kill or a reboot. DIR holds log.csv, curves.png,
tensorboard/, recipe.toml, checkpoints/, the best and the final weights: `keras-convnext predict --weights
DIR/final.safetensors photo.jpg` uses them. KERAS_BACKEND chooses tensorflow, jax or torch.""",
    "plan": """examples:
  keras-convnext plan imagenet1k_convnext_tiny --devices 64xh100 --set accumulation_steps=1
  keras-convnext plan imagenet22k_convnext_xlarge --devices 16xa100-40 --set precision=mixed_bfloat16
  keras-convnext plan recipes/smoke.toml --devices 8xcpu --engine model_parallel --json

Nothing is trained or built: all is counted from the architecture. DEVICES are a number and a name: h100,
h200, a100-40, a100-80, v100, l4, rtx4090, tpu-v3, tpu-v4, tpu-v5e, tpu-v5p, tpu-v6e, cpu. Memory is what a
step holds at its peak, without the framework and its libraries (measured on a CPU: benchmarks/memory.md).
Time is a rough bound from the makers' peak figures, of which --fraction is taken; it was not measured on any
of these devices. KERAS_BACKEND chooses whose program is counted.""",
    "knn": """examples:
  keras-convnext knn --model convnext_tiny.dinov3_lvd1689m --data flowers/
  keras-convnext knn --model convnextv2_tiny.fcmae --data imagenet/ --cache features/ --set neighbours=20

Cosine similarity, votes weighted by exp(similarity / 0.07), as DINO evaluates. Data without a split of its
own is divided by class.""",
    "probe": """examples:
  keras-convnext probe --model convnext_tiny.dinov3_lvd1689m --data flowers/
  keras-convnext probe --model convnextv2_tiny.fcmae --data imagenet/ --cache features/ --set epochs=20

SGD on features that are computed once, without augmentation. The learning rate is chosen on a part of the
training images, never on those that the score is of.""",
    "look": """examples:
  keras-convnext look flowers/ sheet.png
  keras-convnext look imagenet/ sheet.png --split train --policy ta_wide --seed 3""",
    "prepare": """examples:
  keras-convnext prepare imagenet/ prepared/
  keras-convnext prepare imagenet/ prepared/ --split validation --shards 64 --verify
  keras-convnext prepare flowers/ prepared/

Writes shuffled TFRecord files of about 150 MB, with the encoded images as they are, and an index. The same
command goes on after an interruption, and repairs damaged files.""",
    "export": """examples:
  keras-convnext export convnext_tiny.fb_in1k tiny.tflite --precision dynamic_int8
  keras-convnext export my_leaves.keras leaves.onnx
  keras-convnext export my_leaves.safetensors leaves.tflite --precision int8 --calibration leaves/
  keras-convnext export convnext_tiny.fb_in1k exported/ --format litert,onnx --precision all --report report/

MODEL is a tag, an architecture or a file. The file's suffix tells the format: .tflite (LiteRT), .onnx, .xml
(OpenVINO), .pt2 (PyTorch), none for a SavedModel. Several formats or precisions, or "all", go to a folder.
Every file takes pixels in 0..255 in the order N, H, W, C, and is run and compared with the model before it is
kept. --calibration is a folder of images or a data set; by default, crops of three photographs.""",
    "page": """examples:
  keras-convnext export convnext_atto.d2_in1k atto.onnx
  keras-convnext page atto.onnx atto.html
  keras-convnext page leaves.onnx leaves.html --runtime onnxruntime-web-1.30.0.tgz

MODEL is a .onnx file that `keras-convnext export` wrote, with its .metadata.json beside it. OUTPUT is one
file with the model and all it needs to run: open it with a double click, offline too, and drop a picture on
it, or put it on a server of static files. npm fetches ONNX Runtime Web at the first use; without npm, pass
--runtime what `npm pack` wrote on another machine.""",
    "bench": """examples:
  keras-convnext bench convnext_tiny --against timm,keras.applications --output speed/
  keras-convnext bench convnextv2_atto --mode training --batch 32 --backends jax
  keras-convnext bench convnext_tiny --dtype float32,bfloat16 --against timm-compile,openvino
  keras-convnext bench all --output speed/

Times this package on each backend and the peers that --against names: timm, timm-compile, torchvision,
keras.applications, onnxruntime, openvino, litert. Each has a process of its own, and they work in turns, so
that ratios hold on a machine whose speed changes. Lists are separated by commas.

WHAT is architectures, default convnext_tiny, or one of these words, and architectures: all (the standard run
and its bars), depthwise (candidates for the 7x7 convolution), growth (speed against batch, resolution and
variant), stages (fractions of what the machine can do), startup (from nothing to the first image).

A training step is forward, backward and AdamW. int8 quantises the pointwise layers. --output gets bench.csv,
table.md and bench.png.""",
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command.

    Args:
        arguments: words of the command line without the program; default those of this process.

    Returns:
        The exit code.

    Raises:
        SystemExit: by argparse, after --help, --version (0) and wrong usage (2).

    Example:
        >>> main(["list", "test_convnext2"])
    """
    words = sys.argv[1:] if arguments is None else list(arguments)
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")  # read by TensorFlow when it is imported
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # file names need not be valid UTF-8
    if words[:1] == ["demo"]:
        _complain("error: `keras-convnext demo` has left the command. Run `make demo` in a checkout.")
        return 2
    try:
        options = _parser().parse_args(words or ["--help"])
        code = options.run(options)
        sys.stdout.flush()
        return code
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        # What is left in the buffer would fail once more when Python exits.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except (ValueError, OSError, ImportError, TypeError) as error:
        _complain(f"error: {_message(error)}")
        return 2
    except Exception as error:
        _complain(
            f"internal error: {type(error).__name__}: {error} (set KERAS_CONVNEXT_DEBUG=1 for the traceback)"
        )
        return 70


def list_command(options: argparse.Namespace) -> int:
    """Prints the table of weight files, or of architectures, that meet the given conditions."""
    tags = checkpoints.list_weights(
        options.architecture,
        classes=options.classes,
        image_size=options.image_size,
        licence=options.licence,
        commercial_use=True if options.commercial else None,
        downloadable=True if options.downloadable else None,
    )
    rows = [checkpoints.CHECKPOINTS[tag] for tag in tags]
    if options.architectures:
        present = {row.architecture for row in rows}
        variants = [variant for variant in VARIANTS.values() if variant.name in present]
        if options.json:
            _print_json([_variant_facts(variant) for variant in variants])
            return 0
        _print_table(
            ("architecture", "paper", "depths", "dims", "parameters", "files"),
            "<<<<>>",
            [
                (
                    variant.name,
                    _paper(variant),
                    _joined(variant.depths),
                    _joined(variant.dims),
                    f"{variant.parameters:,}",
                    sum(row.architecture == variant.name for row in rows),
                )
                for variant in variants
            ],
        )
        _print_footer(f"{len(variants)} of {len(VARIANTS)} architectures", "NAME")
        return 0
    if options.json:
        _print_json([_checkpoint_facts(row) for row in rows])
        return 0
    _print_table(
        ("tag", "classes", "size @ crop", "top-1", "licence", "layout"),
        "<><><<",
        [
            (
                row.tag,
                row.classes or "-",
                f"{row.image_size} @ {row.crop:.3g}",
                "-" if row.top1 is None else f"{row.top1:.2f}",
                _shortened(row.licence, LICENCE_WIDTH),
                row.layout,
            )
            for row in rows
        ],
    )
    _print_footer(f"{len(rows)} of {len(checkpoints.CHECKPOINTS)} weight files", "TAG")
    return 0


def info_command(options: argparse.Namespace) -> int:
    """Prints all that the tables say of an architecture or a tag, or what a weight file holds."""
    name = options.name
    if name in VARIANTS:
        variant = VARIANTS[name]
        facts, lines = _variant_facts(variant), _variant_lines(variant)
    elif _names_file(name):
        facts = _file_facts(pathlib.Path(name))
        lines = _file_lines(facts)
    else:
        row = _find_row(name)
        local = downloads.find_local(**row.address)
        facts = {**_checkpoint_facts(row), "local_file": None if local is None else str(local)}
        lines = _checkpoint_lines(row, local)
        name = row.tag
    if options.json:
        _print_json(facts)
        return 0
    _print_lines(name, lines)
    return 0


def predict_command(options: argparse.Namespace) -> int:
    """Classifies images; those that cannot be read are reported and left out."""
    errors: list[str] = []
    paths = _image_paths(options.images, errors)
    classifier = None
    results: list[dict] = []
    shows_progress = (
        len(paths) > PROGRESS_FROM_IMAGES
        and sys.stderr.isatty()
        and (options.json or not sys.stdout.isatty())  # else the results themselves are the progress
    )
    for files, images in _read_batches(paths, options.batch_size, errors):
        if classifier is None:  # not before one image could be read: it may be a large download
            classifier = _load_classifier(options)
        probabilities = classifier(images)
        for file, values in zip(files, probabilities, strict=True):
            predictions = classifier.best(values, options.top)
            results.append({"file": str(file), "predictions": predictions})
            if not options.json:
                _print_predictions(file, predictions)
        sys.stdout.flush()
        if shows_progress:
            print(f"{len(results)} of {len(paths)} images", end="\r", file=sys.stderr, flush=True)
    if shows_progress:
        print(file=sys.stderr)
    if options.json and results:
        _print_json(results)
    if not errors:
        return 0
    return 1 if results else 2


def convert_command(options: argparse.Namespace) -> int:
    """Writes a weight file in the layout and format of another project."""
    target = pathlib.Path(options.target)
    if target.exists() and not options.force:
        raise FileExistsError(f"{target} is there already. Pass --force to replace it.")
    _import_quietly("keras_convnext.models")
    from keras_convnext import models
    from keras_convnext.convert import KERAS_SUFFIXES, convert

    row = None if _names_file(options.source) else _find_row(options.source)
    source = pathlib.Path(options.source) if row is None else models.find_file(row)
    described_by = options.architecture or (None if row is None else row.tag)
    convert(source, target, options.layout, described_by)
    found = _file_facts(source)
    written = "Keras" if target.name.endswith(KERAS_SUFFIXES) else options.layout
    print(
        f"{source}: {found['architecture']}, layout {found['layout']}, {_classes_text(found['classes'])}, "
        f"{found['parameters']:,} parameters -> {target}: {written}, {_size_text(target)}"
    )
    return 0


def evaluate_command(options: argparse.Namespace) -> int:
    """Prints the accuracy of a classifier; images that cannot be decoded are reported and left out."""
    _import_quietly("keras_convnext.evaluate", "tensorflow")
    from keras_convnext.evaluate import evaluate
    from keras_convnext.results import result_row

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
        _complain(f"error: {reason}")
    if len(reasons) > MAX_FAULTS_SHOWN:
        _complain(f"error: {len(reasons) - MAX_FAULTS_SHOWN} more images; --output or --json names them all")
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
        _print_json(row | numbers | {"faults": result.faults})
    else:
        _print_lines(f"{row['model']} on {row['data']}", _score_lines(row, options))
    return 1 if result.num_skipped else 0


def prepare_command(options: argparse.Namespace) -> int:
    """Copies a data set into shards, and says how many."""
    _import_quietly("tensorflow")
    from keras_convnext.data import prepare

    summary = prepare.prepare(
        options.source,
        options.output,
        options.split,
        labels=options.labels,
        shards=options.shards,
        workers=options.workers,
        shuffle_seed=options.seed,
    )
    damaged = prepare.verify(options.output, options.workers) if options.verify else []
    if damaged:
        raise OSError(f"Damaged in {options.output}: {', '.join(damaged)}. Run the same command again.")
    if options.json:
        _print_json(dataclasses.asdict(summary) | {"verified": options.verify})
        return 0
    lines: list[tuple[str, object]] = [
        (split, f"{images:,} images, shards: {summary.shards[split]:,}")
        for split, images in summary.images.items()
    ]
    lines.append(("size", f"{summary.num_bytes / 1e6:,.1f} MB, in {summary.seconds:,.1f} s"))
    if summary.num_kept:
        lines.append(("kept", f"shards: {summary.num_kept:,}"))
    if options.verify:
        lines.append(("verified", "every file has the SHA-256 of the manifest"))
    _print_lines(summary.output, lines)
    return 0


def train_command(options: argparse.Namespace) -> int:
    """Trains a model by a recipe, or goes on with an interrupted run."""
    from keras_convnext.training import recipe

    if options.list:
        print("\n".join(recipe.known_recipes()))
        return 0
    if options.recipe is None or options.out is None:
        raise ValueError("Expected RECIPE and --out DIR; keras-convnext train --list names the recipes.")
    # Else PyTorch's threads spin while they wait, and take the cores from those that make the batches.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    _import_quietly("keras_convnext.training.trainer", "tensorflow")
    from keras_convnext.training import trainer

    overrides = _overrides(options.set)
    if options.distribute is not None:
        overrides["distribution.engine"] = options.distribute
    try:
        result = trainer.train(
            options.recipe,
            options.out,
            data=options.data,
            overrides=overrides,
            workers=options.workers,
            progress=not options.quiet,
        )
    except trainer.Interrupted as stopped:
        _complain(str(stopped))
        return 128 + stopped.signal_number
    except trainer.NonFiniteError as error:
        _complain(f"error: {error}")
        return 3
    if result.process:
        return 0
    lines: list[tuple[str, object]] = [("steps", f"{result.steps:,}, {result.seconds:,.0f} s in this run")]
    for name, title in (("loss", "training loss"), ("val_loss", "validation loss")):
        if name in result.scores:
            lines.append((title, f"{result.scores[name]:.4f}"))
    for name, title in (("val_top1", "top-1"), ("ema_val_top1", "top-1 of the EMA")):
        if name in result.scores:
            lines.append((title, f"{result.scores[name]:.2f} %"))
    lines.append(("weights", result.weights))
    lines.append(("curves", result.folder / trainer.CURVES_FILE))
    _print_lines(f"{options.recipe}: {result.folder}", lines)
    return 0


def plan_command(options: argparse.Namespace) -> int:
    """Prints what a recipe takes on devices: memory, bytes between them, operations, time."""
    from keras_convnext.training import planning, recipe

    overrides = _overrides(options.set)
    if options.engine is not None:
        overrides["distribution.engine"] = options.engine
    if options.data is not None:
        overrides["data"] = os.path.abspath(os.path.expanduser(options.data))
    plan = planning.make_plan(
        recipe.load_recipe(options.recipe, overrides), options.devices, options.fraction
    )
    if options.json:
        facts = dataclasses.asdict(plan) | {
            "step_seconds": plan.step_seconds,
            "images_per_second": plan.images_per_second,
            "source": planning.DEVICES[plan.device].source,
        }
        facts["memory"]["total"] = plan.memory.total
        for fact, exchange in zip(facts["exchanges"], plan.exchanges, strict=True):
            fact["wire_bytes"] = exchange.wire_bytes
        _print_json(facts)
        return 0
    _print_lines(f"{options.recipe} on {options.devices}", planning.describe(plan, options.fraction))
    return 0


def _overrides(settings: Sequence[str]) -> dict[str, str]:
    """`--set key=value` words to a dict."""
    for setting in settings:
        if "=" not in setting:
            raise ValueError(f"Expected --set key=value, received {setting!r}.")
    return {key.strip(): value for key, _, value in (setting.partition("=") for setting in settings)}


def knn_command(options: argparse.Namespace) -> int:
    """Prints how well the nearest neighbours in a model's features classify images."""
    _import_quietly("keras_convnext.features", "tensorflow")
    from keras_convnext import features

    return _evaluate_features(options, features.NearestNeighbours, features.nearest_neighbours)


def probe_command(options: argparse.Namespace) -> int:
    """Prints how well a linear classifier on a model's features classifies images."""
    _import_quietly("keras_convnext.features", "tensorflow")
    from keras_convnext import features

    return _evaluate_features(options, features.LinearProbe, features.linear_probe)


def _evaluate_features(options: argparse.Namespace, settings_class, function) -> int:
    from keras_convnext.training.recipe import read_fields, recipe_path

    overrides = _overrides(options.set)
    for key in ("model", "data"):
        if getattr(options, key) is not None:
            overrides[key] = getattr(options, key)
    settings = read_fields(recipe_path(options.recipe), settings_class, overrides)
    if not settings.data:
        raise ValueError("Expected images: pass --data PATH, a folder of class folders for example.")
    result = function(settings, cache=options.cache, progress=not options.quiet)
    if options.json:
        _print_json(result.report())
        return 1 if result.faults else 0
    for reason in list(result.faults.values())[:MAX_FAULTS_SHOWN]:
        _complain(f"error: {reason}")
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
    _print_lines(f"{settings.model} on {settings.data}", lines)
    return 1 if result.faults else 0


def look_command(options: argparse.Namespace) -> int:
    """Draws what the training pipeline does to images of a data set."""
    _import_quietly("tensorflow")
    from keras_convnext.data import contact_sheet, sources

    source = sources.open_source(options.data, options.split)
    contact_sheet.draw(source, options.output, seed=options.seed, policy=options.policy)
    print(f"{options.output}: operations and a training batch of {options.data}, {len(source):,} images")
    return 0


def export_command(options: argparse.Namespace) -> int:
    """Writes files for other runtimes, each checked against the model."""
    if options.report is not None and options.no_check:
        raise ValueError(
            "Expected one of --report and --no-check: a report is made of what the check measures."
        )
    options.weights = options.model if _names_file(options.model) else None
    labels = _read_labels(options)
    _import_quietly("keras_convnext.export")
    from keras_convnext import classifiers, deployment, export_report, machine
    from keras_convnext.export import FORMATS, export

    targets = _export_targets(options, FORMATS)
    opened = classifiers.open_classifier(
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
        _print_json([dataclasses.asdict(result) | {"path": str(result.path)} for result in results])
    elif options.no_check:
        for result in results:
            print(f"{result.path}: {result.num_bytes / 1e6:.2f} MB, not checked")
    else:
        _print_table(export_report.COLUMNS, "<<<>>>>>", export_report.rows(results))
    if options.report is not None:
        heading = f"{opened.model.name}, {machine.cpu_name()}, {machine.available_cores()} cores"
        folded = str(deployment.savings(opened.model, deployment.deploy(opened.model)))
        paths = export_report.write_report(results, options.report, heading, folded)
        _complain(f"Written: {', '.join(map(str, paths))}")
    return 0


def _export_targets(options: argparse.Namespace, formats) -> list[tuple[str, str, pathlib.Path]]:
    """(format, precision, path) of each file that --format and --precision ask for."""
    from keras_convnext import runtimes

    output = pathlib.Path(options.output)
    if not any("," in words or words == "all" for words in (options.format or "", options.precision)):
        return [(options.format or runtimes.format_of(output), options.precision, output)]
    if options.format is None:
        raise ValueError("Expected --format NAMES beside several precisions; OUTPUT is then a folder.")
    wanted = list(formats) if options.format == "all" else options.format.split(",")
    stem = pathlib.Path(options.model).stem if _names_file(options.model) else options.model
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
    from keras_convnext import browser

    page = browser.write_page(options.model, options.output, options.runtime, replace=options.force)
    print(f"{page}: {_size_text(page)}; open it in a browser")
    return 0


def bench_command(options: argparse.Namespace) -> int:
    """Measures speed, of this package and of peers in the same run."""
    from keras_convnext.bench import compare

    return compare.dispatch(options)


def _score_lines(row: dict[str, str], options: argparse.Namespace) -> list[tuple[str, object]]:
    lines: list[tuple[str, object]] = [
        ("top-1", f"{float(row['top1']):.2f} %{_published_text(row)}"),
        ("top-5", f"{float(row['top5']):.2f} %"),
    ]
    if row["real"]:
        lines.append(("ReaL", f"{float(row['real']):.2f} %"))
    resize = row["resize_size"] or f"crop {row['crop']}"
    lines += [
        ("images", f"{row['n']} ({row['skipped']} skipped), split {row['split'] or 'none'}"),
        ("outputs", row["outputs"]),
        ("prepared", f"{row['resize_mode']}, {row['interpolation']}, {resize}, {row['image_size']} pixels"),
        ("speed", f"{float(row['images_per_second']):,.1f} images/s, {float(row['seconds']):,.1f} s in all"),
        ("licence", _licence_text(row["licence"])),
    ]
    if not options.no_results:
        lines.append(("row added to", options.results))
    if options.output is not None:
        lines.append(("files in", options.output))
    return lines


def _published_text(row: dict[str, str]) -> str:
    """What the publisher measured, where the model, the images and their size are the same."""
    from keras_convnext.results import IMAGENET_VALIDATION

    published = checkpoints.CHECKPOINTS.get(row["model"])
    if published is None or published.top1 is None or row["data_sha256"] != IMAGENET_VALIDATION:
        return ""
    return f", published {published.top1} %" if row["image_size"] == str(published.image_size) else ""


def _licence_text(licence: str) -> str:
    if licence in checkpoints.NON_COMMERCIAL_LICENCES:
        return f"{licence}: NOT for commercial use"
    return licence or "not known: weights of your own"


def _import_quietly(*modules: str) -> None:
    """Imports modules without the start-up lines of TensorFlow, which none of its settings silences.

    Those of this package import Keras, whose backend is chosen before.
    """
    if any(module.startswith("keras_convnext.") for module in modules):
        _environment.choose_backend()
    # Its advice on retracing is for whoever wrote the program.
    logging.getLogger("tensorflow").setLevel(logging.ERROR)
    with quiet.silenced():
        for module in modules:
            with contextlib.suppress(ImportError):  # said by what needs it
                importlib.import_module(module)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="keras-convnext",
        description="ConvNeXt V1, V2 and isotropic in Keras: which weights there are, what they see in an\n"
        "image, and how they get to other projects.",
        epilog="examples:\n  keras-convnext list convnext_tiny\n  keras-convnext predict cat.jpg\n\n"
        "KERAS_BACKEND chooses tensorflow, jax or torch, in place of keras.json or what is installed;\n"
        "KERAS_CONVNEXT_WEIGHTS_DIR names folders with files placed by hand; KERAS_CONVNEXT_OFFLINE=1\n"
        "forbids downloads.\n"
        "`keras-convnext COMMAND --help` says more.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"keras-convnext {__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)

    def command(name, run, summary):
        added = commands.add_parser(
            name,
            help=summary,
            description=f"{summary[0].upper()}{summary[1:]}.",
            epilog=_EPILOG[name],
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        added.set_defaults(run=run)
        return added

    listing = command("list", list_command, "list the published weight files, or the architectures")
    listing.add_argument(
        "architecture", nargs="?", metavar="ARCHITECTURE", help='name, or a pattern such as "convnextv2_*"'
    )
    listing.add_argument("--classes", type=int, metavar="N", help="width of the classifier, 0 for none")
    listing.add_argument("--image-size", type=int, metavar="N", help="side of the images in pixels")
    listing.add_argument("--licence", metavar="ID", help="licence identifier, such as apache-2.0")
    listing.add_argument("--commercial", action="store_true", help="only licences that allow commercial use")
    listing.add_argument("--downloadable", action="store_true", help="only files with a known address")
    listing.add_argument(
        "--architectures", action="store_true", help="the architectures of these files instead"
    )

    info = command("info", info_command, "describe an architecture, a published tag or a weight file")
    info.add_argument("name", metavar="NAME|FILE", help="architecture, tag, or path of a weight file")

    predict = command("predict", predict_command, "classify images")
    predict.add_argument(
        "images", nargs="+", metavar="IMAGE_OR_FOLDER", help="folders are searched for images"
    )
    predict.add_argument(
        "--model",
        metavar="TAG",
        help=f"tag or architecture, default {checkpoints.IMAGENET['convnext_tiny']} or what --weights holds",
    )
    predict.add_argument("--weights", metavar="FILE", help="weight file, or a .keras model, to use instead")
    predict.add_argument("--top", type=_positive, default=5, metavar="N", help="classes an image, default 5")
    predict.add_argument("--image-size", type=_positive, metavar="N", help="pixels, default the weights' own")
    predict.add_argument("--batch-size", type=_positive, default=8, metavar="N", help="images, default 8")
    predict.add_argument("--labels", metavar="FILE", help="text file with the name of a class in each line")

    conversion = command("convert", convert_command, "convert a weight file for another project")
    conversion.add_argument("source", metavar="SOURCE", help="weight file, or a tag to download")
    conversion.add_argument(
        "target", metavar="TARGET", help=".safetensors, .pth, .pt, .bin, .keras or .weights.h5"
    )
    conversion.add_argument(
        "--layout",
        default="official",
        metavar="NAME",
        help=f"names and shapes to write: {', '.join(state_dicts.WRITABLE_LAYOUTS)}; default official",
    )
    conversion.add_argument(
        "--architecture",
        metavar="NAME",
        help="refuse a source of another architecture; a tag also sets the normaliser of a .keras target",
    )
    conversion.add_argument("--force", action="store_true", help="replace an existing TARGET")

    evaluation = command("evaluate", evaluate_command, "measure top-1 and top-5 accuracy on a data set")
    evaluation.add_argument(
        "model", metavar="MODEL", help="tag, architecture, weight file, .keras file or exported file"
    )
    evaluation.add_argument("--data", required=True, metavar="PATH", help="folder or file with the images")
    evaluation.add_argument("--weights", metavar="FILE", help="weight file in place of the tag's own")
    evaluation.add_argument("--split", metavar="NAME", help="default validation, where there are splits")
    evaluation.add_argument(
        "--labels", metavar="FILE", help="'file,label' lines for a folder without classes"
    )
    evaluation.add_argument(
        "--real",
        nargs="?",
        const=True,
        metavar="FILE",
        help="measure ReaL accuracy too; real.json, unless the data has these labels",
    )
    evaluation.add_argument("--image-size", type=_positive, metavar="N", help="pixels, default the tag's own")
    evaluation.add_argument("--batch-size", type=_positive, metavar="N", help="images, default 64")
    evaluation.add_argument(
        "--limit", type=_positive, metavar="N", help="that many images only, spread evenly over the data"
    )
    evaluation.add_argument(
        "--max-faults", type=float, default=0.01, metavar="SHARE", help="damaged images allowed, default 0.01"
    )
    evaluation.add_argument("--output", metavar="DIR", help="folder for CSV files and a picture")
    evaluation.add_argument(
        "--results", default="results.csv", metavar="FILE", help="file to add a row to, default results.csv"
    )
    evaluation.add_argument("--no-results", action="store_true", help="add no row")

    preparation = command("prepare", prepare_command, "copy a data set into shuffled TFRecord shards")
    preparation.add_argument("source", metavar="SOURCE", help="what evaluate takes as --data")
    preparation.add_argument("output", metavar="OUTPUT", help="folder to write to")
    preparation.add_argument("--split", metavar="NAME", help="default all")
    preparation.add_argument(
        "--labels", metavar="FILE", help="'file,label' lines for a folder without classes"
    )
    preparation.add_argument(
        "--shards", type=_positive, metavar="N", help="files of a split, default by size"
    )
    preparation.add_argument(
        "--workers", type=_positive, metavar="N", help="threads, default one a processor"
    )
    preparation.add_argument("--seed", type=int, default=0, metavar="N", help="of the order, default 0")
    preparation.add_argument("--verify", action="store_true", help="read all back and compare")

    training = command("train", train_command, "train a model by a recipe; the same command resumes")
    training.add_argument("recipe", nargs="?", metavar="RECIPE", help="TOML file, or a published name")
    training.add_argument("--data", metavar="PATH", help="images, in place of the recipe's")
    training.add_argument("--out", metavar="DIR", help="folder of the run")
    training.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="another value of the recipe; repeatable",
    )
    training.add_argument(
        "--distribute",
        metavar="ENGINE",
        help="how a step is divided among devices; short for --set distribution.engine=ENGINE",
    )
    training.add_argument("--workers", type=_positive, metavar="N", help="threads that make the batches")
    training.add_argument("--quiet", action="store_true", help="show no progress")
    training.add_argument("--list", action="store_true", help="list the published recipes")

    planning = command("plan", plan_command, "say what a recipe takes on devices, before it is trained")
    planning.add_argument("recipe", metavar="RECIPE", help="TOML file, or a published name")
    planning.add_argument(
        "--devices", required=True, metavar="DEVICES", help="number and name, such as 64xh100; see below"
    )
    planning.add_argument(
        "--engine", metavar="ENGINE", help="short for --set distribution.engine=ENGINE; default the recipe's"
    )
    planning.add_argument("--data", metavar="PATH", help="images, in place of the recipe's")
    planning.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="another value of the recipe; repeatable",
    )
    planning.add_argument(
        "--fraction", type=float, default=0.4, metavar="X", help="of the peak figures, default 0.4"
    )

    for name, run, recipe, summary in (
        ("knn", knn_command, "knn", "classify by the nearest neighbours in a frozen model's features"),
        ("probe", probe_command, "linear_probe", "train a linear classifier on a frozen model's features"),
    ):
        features = command(name, run, summary)
        features.add_argument(
            "recipe",
            nargs="?",
            default=recipe,
            metavar="RECIPE",
            help=f"TOML file, default the published {recipe}",
        )
        features.add_argument("--model", metavar="MODEL", help="tag or weight file, in place of the recipe's")
        features.add_argument("--data", metavar="PATH", help="images, in place of the recipe's")
        features.add_argument(
            "--set", action="append", default=[], metavar="KEY=VALUE", help="another value of the recipe"
        )
        features.add_argument("--cache", metavar="DIR", help="folder that keeps the features for next time")
        features.add_argument("--quiet", action="store_true", help="show no progress")
        features.add_argument("--json", action="store_true", help="print JSON")

    look = command("look", look_command, "draw a contact sheet of augmentations and a training batch")
    look.add_argument("data", metavar="DATA", help="what evaluate takes as --data")
    look.add_argument("output", metavar="OUTPUT", help="the PNG to write")
    look.add_argument("--split", metavar="NAME", help="train, validation; needed where there are several")
    look.add_argument(
        "--policy",
        default="rand-m9-mstd0.5-inc1",
        metavar="NAME",
        help="RandAugment, AutoAugment or TrivialAugment, default rand-m9-mstd0.5-inc1",
    )
    look.add_argument("--seed", type=int, default=0, metavar="N", help="of the batch, default 0")

    exporting = command(
        "export", export_command, "write a model for LiteRT, ONNX, OpenVINO, TensorFlow or PyTorch"
    )
    exporting.add_argument("model", metavar="MODEL", help="tag, architecture, weight file or .keras file")
    exporting.add_argument("output", metavar="OUTPUT", help="the file, or a folder for several")
    exporting.add_argument(
        "--format",
        metavar="NAMES",
        help="saved_model, litert, onnx, openvino, torch, or all; default by suffix",
    )
    exporting.add_argument(
        "--precision",
        default="float32",
        metavar="NAMES",
        help="float32, float16, dynamic_int8, int8, or all; default float32",
    )
    exporting.add_argument(
        "--batch-size",
        type=_batch_size,
        default="default",
        metavar="N",
        help="images in a call, or any; default 1 for LiteRT, any for the others",
    )
    exporting.add_argument(
        "--image-size", type=_positive, metavar="N", help="pixels, default the weights' own"
    )
    exporting.add_argument(
        "--calibration", metavar="PATH", help="images for the check and for int8, default three photographs"
    )
    exporting.add_argument("--labels", metavar="FILE", help="text file with the name of a class in each line")
    exporting.add_argument("--logits", action="store_true", help="leave out the softmax")
    exporting.add_argument(
        "--tolerance",
        type=float,
        metavar="X",
        help="difference allowed, in times of the largest output; default by precision",
    )
    exporting.add_argument("--no-check", action="store_true", help="do not run what was written")
    exporting.add_argument("--report", metavar="DIR", help="folder for a table and a picture")
    exporting.add_argument("--force", action="store_true", help="replace what is at OUTPUT")

    page = command("page", page_command, "write a page that classifies pictures in the browser")
    page.add_argument("model", metavar="MODEL", help=".onnx file that export wrote")
    page.add_argument("output", metavar="OUTPUT", help="the .html file")
    page.add_argument(
        "--runtime", metavar="DIR", help="onnxruntime-web as a folder or a .tgz file; default by npm, once"
    )
    page.add_argument("--force", action="store_true", help="replace what is at OUTPUT")

    bench = command("bench", bench_command, "measure speed, against named peers in the same run")
    bench.add_argument("what", nargs="*", metavar="WHAT", help="architectures, or a word; see below")
    for name, listed, summary in (
        (
            "--backends",
            "NAMES",
            "tensorflow, jax, torch, openvino; default those installed, without openvino",
        ),
        ("--mode", "NAMES", "inference, training; default inference"),
        ("--batch", "NUMBERS", "images in a step, default 1,8"),
        ("--image-size", "NUMBERS", "pixels, default 224"),
        ("--dtype", "NAMES", "float32, bfloat16, float16, int8; default float32"),
        ("--against", "NAMES", "peers, default timm where it is installed"),
    ):
        bench.add_argument(name, metavar=listed, help=summary)
    bench.add_argument("--rounds", type=_positive, default=5, metavar="N", help="turns of each, default 5")
    bench.add_argument("--seconds", type=float, default=1.0, metavar="S", help="of a turn, default 1")
    bench.add_argument("--threads", type=_positive, metavar="N", help="cores of each, default all")
    bench.add_argument("--rematerialize", action="store_true", help="train ours with less memory")
    bench.add_argument("--output", metavar="DIR", help="folder for the tables and the plot")

    for printing in (listing, info, predict, evaluation, preparation, planning, exporting, bench):
        printing.add_argument("--json", action="store_true", help="print JSON")
    return parser


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number from 1 up, received {text!r}")
    return int(text)


def _batch_size(text: str) -> int | str | None:
    return {"any": None, "default": text}[text] if text in ("any", "default") else _positive(text)


def _names_file(name: str) -> bool:
    return name.endswith(WEIGHT_SUFFIXES) or os.sep in name or pathlib.Path(name).is_file()


def _find_row(name: str) -> Checkpoint:
    if "." not in name and name not in checkpoints.ALIASES:
        checkpoints.list_weights(name)  # an unknown architecture is an error that lists near ones
    return checkpoints.find_checkpoint(name)


# Facts, for --json, and lines, for a person.


def _variant_facts(variant: Variant) -> dict:
    return {
        **dataclasses.asdict(variant),
        "imagenet": checkpoints.IMAGENET[variant.name],
        "weights": checkpoints.list_weights(variant.name),
    }


def _variant_lines(variant: Variant) -> list[tuple[str, object]]:
    tags = checkpoints.list_weights(variant.name)
    lines: list[tuple[str, object]] = [
        ("paper", _reference(variant)),
        ("parameters", f"{variant.parameters:,} at 1000 classes"),
        ("depths", _joined(variant.depths)),
        ("dims", _joined(variant.dims)),
        ("kernel sizes", _joined(variant.kernel_sizes)),
        ("stem", variant.stem),
        ("norm", f"{variant.norm}, epsilon {variant.epsilon:g}"),
        ("activation", variant.activation),
        ("head", variant.head),
        ('"imagenet" is', checkpoints.IMAGENET[variant.name] or "nothing: no ImageNet file was published"),
    ]
    lines += [("weight files" if number == 0 else "", tag) for number, tag in enumerate(tags)]
    return lines


def _checkpoint_facts(row: Checkpoint) -> dict:
    return {
        **dataclasses.asdict(row),
        "parameters": _parameters(row),
        "commercial_use": row.commercial_use,
        "downloadable": row.downloadable,
    }


def _checkpoint_lines(row: Checkpoint, local: pathlib.Path | None) -> list[tuple[str, object]]:
    variant = VARIANTS[row.architecture]
    lines: list[tuple[str, object]] = [
        ("architecture", f"{row.architecture}, {_reference(variant)}"),
        ("parameters", f"{_parameters(row):,}"),
        ("depths", _joined(variant.depths)),
        ("dims", _joined(variant.dims)),
        ("classes", _outputs_text(row)),
        ("trained on", row.dataset),
        ("licence", _licence_text(row.licence)),
        ("image size", f"{row.image_size}, crop {row.crop:.4g}"),
        ("resize", _resize_text(row)),
        ("mean", f"{_joined(row.mean)} of pixels in 0..1"),
        ("std", _joined(row.std)),
    ]
    if row.test_image_size is not None:
        lines.append(("larger test size", f"{row.test_image_size}, crop {row.test_crop:.4g}"))
    for title, score, size in (
        ("top-1", row.top1, row.image_size),
        ("top-5", row.top5, row.image_size),
        ("top-1, larger", row.test_top1, row.test_image_size),
    ):
        if score is not None:
            lines.append((title, f"{score} % at {size}, as published: {row.score_source}"))
    lines.append(
        ("layout", row.layout if row.state_key is None else f"{row.layout}, under {row.state_key!r}")
    )
    if row.hub_id is not None:
        lines.append(("hub", f"{row.hub_id}, {row.hub_filename}{', after an agreement' * row.gated}"))
    if row.url is not None:
        lines.append(("address", row.url + " when the hub is out of reach" * (row.hub_id is not None)))
    if row.sha256 or row.sha256_prefix:
        lines.append(("SHA-256", row.sha256 or f"{row.sha256_prefix}..."))
    if not row.downloadable:
        lines.append(("address", "none"))
    lines.append(("on this machine", local or "no"))
    if row.note:
        lines.append(("note", row.note))
    return lines


def _file_facts(path: pathlib.Path) -> dict:
    _import_quietly("keras_convnext.models")
    from keras_convnext import descriptions, keras_files
    from keras_convnext.convert import read_state_dict

    state = read_state_dict(path)
    contents = state_dicts.inspect(state)
    variant = state_dicts.find_variant(state)
    layout, metadata = contents.layout, {}
    if path.suffix in (".h5", ".keras"):
        layout = "keras_applications" if keras_files.is_keras_applications(path) else "keras_convnext"
    elif path.suffix == ".safetensors":
        metadata = torch_files.read_safetensors_metadata(path)
    images = descriptions.read_images(path)
    return {
        "file": str(path),
        "bytes": path.stat().st_size,
        "layout": layout,
        "prefix": contents.prefix,
        "architecture": variant.name,
        "arrays": len(state),
        "parameters": sum(array.size for array in state.values()),
        "dtypes": sorted({str(array.dtype) for array in state.values()}),
        "classes": contents.classes,
        "channels": contents.channels,
        "final_norm": contents.final_norm,
        "pyramid_norms": contents.pyramid_norms,
        "images": None if images is None else dataclasses.asdict(images),
        "metadata": {key: value for key, value in metadata.items() if key != descriptions.KEY},
    }


def _file_lines(facts: dict) -> list[tuple[str, object]]:
    variant = VARIANTS[facts["architecture"]]
    prefix = f", behind {facts['prefix']!r}" if facts["prefix"] else ""
    lines: list[tuple[str, object]] = [
        ("architecture", f"{variant.name}, {_reference(variant)}"),
        ("layout", f"{facts['layout']}{prefix}"),
        ("arrays", facts["arrays"]),
        ("parameters", f"{facts['parameters']:,}"),
        ("dtype", ", ".join(facts["dtypes"])),
        ("classes", facts["classes"] or "none"),
        ("channels", facts["channels"]),
        ("final norm", "yes" if facts["final_norm"] else "no"),
        ("size", _size_text(pathlib.Path(facts["file"]))),
    ]
    if facts["pyramid_norms"]:
        lines.append(("pyramid norms", "yes"))
    if facts["images"] is not None:
        lines.append(("resize", _resize_text(ImageDescription(**facts["images"]))))
    return lines + [(f"metadata {key!r}", value) for key, value in facts["metadata"].items()]


def _parameters(row: Checkpoint) -> int:
    shapes = state_dicts.weight_shapes(VARIANTS[row.architecture], row.classes)
    return sum(math.prod(shape) for shape in shapes.values())


def _paper(variant: Variant) -> str:
    return "V1, isotropic" if variant.isotropic else f"V{variant.version}"


def _reference(variant: Variant) -> str:
    reference = "Woo et al. 2023" if variant.version == 2 else "Liu et al. 2022"
    return f"ConvNeXt {_paper(variant)} ({reference})"


def _resize_text(row: Checkpoint | ImageDescription) -> str:
    size = row.resize_size or math.floor(row.image_size / row.crop)
    how = "both sides" if row.resize_mode == "squash" else "shorter side"
    return f"{how} to {size}, {row.interpolation}, then the central {row.image_size} x {row.image_size}"


def _outputs_text(row: Checkpoint) -> str:
    if row.is_projection:
        return f"none, but {row.classes} features of the CLIP projection"
    return str(row.classes or "none")


def _classes_text(classes: int) -> str:
    return f"{classes} classes" if classes else "no classifier"


def _size_text(path: pathlib.Path) -> str:
    return f"{path.stat().st_size / 1e6:,.1f} MB"


def _joined(values) -> str:
    return ", ".join(str(value) for value in values)


def _shortened(text: str, width: int) -> str:
    return text if len(text) <= width else f"{text[: width - 3]}..."


# Images to predictions.


@dataclasses.dataclass(frozen=True)
class Classifier:
    """A model, how its images are prepared and what its classes are called.

    Attributes:
        model: `keras.Model`, (N, H, W, 3) pixels in 0..255 to (N, classes).
        preparation: arguments of `preprocess.preprocess_image`.
        names: a name for each class.
        synsets: a WordNet id for each class; empty when it is not an ImageNet classifier.
        gives_logits: whether a softmax is still to be taken.
    """

    model: Any
    preparation: dict
    names: list[str]
    synsets: list[str]
    gives_logits: bool

    def __call__(self, images: list[np.ndarray]) -> np.ndarray:
        """uint8 images (H, W, 3) of any size to probabilities (N, classes)."""
        batch = np.stack([preprocess.preprocess_image(image, **self.preparation) for image in images])
        from keras_convnext.classifiers import for_channels

        outputs = np.asarray(self.model.predict_on_batch(for_channels(batch, self.model)), dtype="float32")
        if self.gives_logits:
            outputs = np.exp(outputs - outputs.max(axis=-1, keepdims=True))
            outputs /= outputs.sum(axis=-1, keepdims=True)
        return outputs

    def best(self, probabilities: np.ndarray, count: int) -> list[dict]:
        """The `count` most probable classes, the best first."""
        predictions = []
        for index in np.argsort(-probabilities, kind="stable")[:count].tolist():
            synset = {"synset": self.synsets[index]} if self.synsets else {}
            predictions.append(
                {
                    "class_index": index,
                    **synset,
                    "name": self.names[index],
                    "probability": float(probabilities[index]),
                }
            )
        return predictions


def _load_classifier(options: argparse.Namespace) -> Classifier:
    labels = _read_labels(options)
    _import_quietly("keras_convnext.models")
    from keras_convnext import classifiers, keras_files, models

    name = options.model
    path = None if options.weights is None else models.existing_file(options.weights)
    if path is None or keras_files.is_bare(path):
        name = name or DEFAULT_MODEL
    opened = classifiers.open_classifier(
        name, path, image_size=options.image_size, classes=len(labels) or None
    )
    return _classifier(opened, labels)


def _classifier(opened, labels: list[str]) -> Classifier:
    import keras

    model, classes = opened.model, opened.model.output_shape[-1]
    names, synsets = labels, []
    if labels and len(labels) != classes:
        raise ValueError(f"Expected a name for each of the {classes} classes. Received {len(labels)} names.")
    if not labels and opened.class_list is not None:
        names = class_names.class_names(opened.class_list)
        synsets = class_names.synset_ids(opened.class_list)
    elif not labels:
        names = [f"class {index}" for index in range(classes)]
    activation = getattr(model.layers[-1], "activation", None)
    return Classifier(model, opened.preparation, names, synsets, activation is keras.activations.linear)


def _read_labels(options: argparse.Namespace) -> list[str]:
    path = options.labels
    if path is None and options.weights is not None:
        weights = pathlib.Path(options.weights)
        beside = (weights.with_suffix(".labels.txt"), weights.with_name(f"{weights.name}.labels.txt"))
        path = next((candidate for candidate in beside if candidate.exists()), None)
    if path is None:
        return []
    lines = pathlib.Path(path).read_text(encoding="utf-8").splitlines()
    return [line.strip() for line in lines if line.strip()]


def _image_paths(images: list[str], errors: list[str]) -> list[pathlib.Path]:
    paths: list[pathlib.Path] = []
    for image in images:
        try:
            paths += preprocess.find_images(image)
        except preprocess.ImageError as error:
            _note(errors, error)
    return paths


def _read_batches(
    paths: list[pathlib.Path], batch_size: int, errors: list[str]
) -> Iterator[tuple[list[pathlib.Path], list[np.ndarray]]]:
    """Files and their pixels, `batch_size` at a time; those that cannot be read are noted and left out."""

    def readable():
        for path in paths:
            try:
                yield path, preprocess.read_image(path)
            except preprocess.ImageError as error:
                _note(errors, error)

    images = readable()
    while batch := list(itertools.islice(images, batch_size)):
        yield [path for path, _ in batch], [image for _, image in batch]


def _note(errors: list[str], error: Exception) -> None:
    errors.append(str(error))
    _complain(f"error: {error}")


# What is printed.


def _print_predictions(file: pathlib.Path, predictions: list[dict]) -> None:
    print(file)
    for prediction in predictions:
        print(f"  {100 * prediction['probability']:6.2f} %  {prediction['name']}")


def _print_table(titles: Sequence[str], alignments: str, rows: list[tuple]) -> None:
    texts = [tuple(titles), *(tuple(str(value) for value in row) for row in rows)]
    widths = [max(len(row[column]) for row in texts) for column in range(len(titles))]
    for row in texts:
        cells = zip(row, alignments, widths, strict=True)
        print("  ".join(f"{text:{alignment}{width}}" for text, alignment, width in cells).rstrip())


def _print_lines(heading: str, lines: Sequence[tuple[str, object]]) -> None:
    print(heading)
    width = max(len(title) for title, _ in lines)
    for title, text in lines:
        print(f"  {title:<{width}}  {text}")


def _print_footer(count: str, name: str) -> None:
    print(f"\n{count}. `keras-convnext info {name}` says more.")


def _print_json(value) -> None:
    print(json.dumps(value, indent=2))


def _complain(text: str) -> None:
    if quiet.is_set("KERAS_CONVNEXT_DEBUG"):
        traceback.print_exc()
    print(f"keras-convnext: {text}", file=sys.stderr)


def _message(error: BaseException) -> str:
    if isinstance(error, OSError) and error.strerror and error.filename is not None:
        return f"{error.strerror}: {error.filename}"
    if isinstance(error, ModuleNotFoundError) and error.name in _environment.EXTRAS:
        remedy = _environment.install_command(error.name)
        return f"This command needs {error.name}, which is not installed. Run {remedy}."
    return str(error) or type(error).__name__
