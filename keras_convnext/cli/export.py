"""`export` and `page` write files for other runtimes."""

import argparse
import dataclasses
import pathlib
import sys
import tempfile
from collections.abc import Callable
from typing import Any

from keras_convnext import _terminal
from keras_convnext._files import prepare_folder
from keras_convnext._messages import size_text, unknown
from keras_convnext.cli import shared
from keras_convnext.cli.predict import read_labels
from keras_convnext.data import class_names
from keras_convnext.weights.repositories import SCHEME
from keras_convnext.weights.resolve import is_path

EXPORT_EXAMPLES = """examples:
  keras-convnext export convnext_tiny.fb_in1k tiny.tflite --precision dynamic_int8
  keras-convnext export my_leaves.keras leaves.onnx
  keras-convnext export my_leaves.safetensors leaves.tflite --precision int8 --calibration leaves/
  keras-convnext export convnext_tiny.fb_in1k exported/ --format litert,onnx --precision all --report report/

MODEL is a tag, an architecture or a file, of a classifier or a segmentation model. The suffix of OUTPUT tells
the format: .tflite (LiteRT), .onnx, .xml (OpenVINO), .pt2 (PyTorch), none for a SavedModel. Several
formats or precisions, or "all", go to a folder.
Every file takes pixels in 0..255 in the order N, H, W, C, and is run and compared with the model before it is
kept. --calibration is a folder of images or a data set; by default, crops of three photographs."""


def export_options(option: Callable) -> None:
    option("model", "MODEL", "tag, architecture, weight file or .keras file")
    option("output", "OUTPUT", "the file, or a folder for several")
    option("--format", "NAMES", "saved_model, litert, onnx, openvino, torch, or all; default by suffix")
    precisions = "float32, float16, dynamic_int8, int8, or all; default %(default)s"
    option("--precision", "NAMES", precisions, default="float32")
    sizes = "images in a call, or any; default 1 for LiteRT, any for the others"
    option("--batch-size", "N", sizes, type=shared.positive_batch_size, default="default")
    option("--calibration", "PATH", "images for the check and for int8, default three photographs")
    option("--logits", None, "leave out the softmax")
    differences = "difference allowed, of the largest output; default by precision"
    option("--tolerance", "X", differences, type=shared.not_negative)
    option("--no-check", None, "do not run what was written")
    option("--report", "DIR", "folder for a table and a picture")
    option("--force", None, "replace the file or SavedModel at OUTPUT")
    for name in ("--image-size", "--labels", "--json"):
        option(name)


def export_command(options: argparse.Namespace) -> int:
    for name in ("report", "tolerance"):
        if getattr(options, name) is not None and options.no_check:
            raise ValueError(f"Expected one of --{name} and --no-check: it needs what the check measures.")
    labels: Any = read_labels(options.labels, options.model)
    shared.import_quietly("keras_convnext.exporting.export")
    from keras_convnext import _environment, predictor
    from keras_convnext.exporting import deploy, report
    from keras_convnext.exporting.export import FORMATS, export
    from keras_convnext.weights.resolve import resolve

    targets = _export_targets(options, FORMATS)
    opened: Any
    source = resolve(options.model)
    if source.task == "detection":
        raise ValueError(
            f"Expected a classifier or a segmenter to export. Received {options.model}, a detector."
        )
    if source.task == "segmentation":
        opened = predictor.open_segmenter(source)
        labels = dataclasses.replace(opened.labels, names=tuple(labels)) if labels else opened.labels
    else:
        opened = predictor.open_predictor(
            source,
            image_size=options.image_size,
            classifier_activation=None if options.logits else "softmax",
        )
        if not labels and opened.class_list is not None:
            labels = class_names.class_names(opened.class_list)
    if options.report is not None:
        prepare_folder(options.report, report.MARKS)  # before minutes are spent on the exports
    results = []
    for format, precision, path in targets:
        if sys.stderr.isatty():
            _terminal.say(f"writing and checking {path} ...")
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
            preprocessing=opened.preprocessing,
            check=False if options.no_check else True if options.tolerance is None else options.tolerance,
            replace=options.force,
        )
        results.append(result)
    if options.json:
        shared.print_json([dataclasses.asdict(result) | {"path": str(result.path)} for result in results])
    elif options.no_check:
        for result in results:
            print(f"{result.path}: {size_text(result.num_bytes)}, not checked")
    else:
        shared.print_table(report.COLUMNS, report.ALIGNMENTS, report.rows(results))
        print(report.measured_on(results))
    if options.report is not None:
        heading = f"{opened.model.name}, {_environment.cpu_name()}, {_environment.available_cores()} cores"
        folded = deploy.savings(opened.model, deploy.deploy(opened.model))
        paths = report.write_report(results, options.report, heading, folded)
        shared.complain(f"Written: {', '.join(map(str, paths))}")
    return 0


def _export_targets(options: argparse.Namespace, formats) -> list[tuple[str, str, pathlib.Path]]:
    """(format, precision, path) of each file that --format and --precision ask for."""
    from keras_convnext.exporting import runtimes

    output = pathlib.Path(options.output)
    if not any("," in words or words == "all" for words in (options.format or "", options.precision)):
        return [(options.format or runtimes.format_of(output), options.precision, output)]
    if options.format is None:
        raise ValueError("Expected --format NAMES with several precisions; OUTPUT is then a folder.")
    wanted = list(formats) if options.format == "all" else options.format.split(",")
    stem = pathlib.Path(options.model).stem if is_path(options.model) else options.model
    targets = []
    for format in wanted:
        if format not in formats:
            raise ValueError(f"{unknown('format', format, formats)}.")
        known = formats[format].precisions
        precisions = known if options.precision == "all" else options.precision.split(",")
        suffix = formats[format].suffix or "_saved_model"
        targets += [(format, each, output / f"{stem}_{each}{suffix}") for each in precisions]
    output.mkdir(parents=True, exist_ok=True)
    return targets


PRESET_EXAMPLES = """examples:
  keras-convnext preset convnext_tiny.fb_in1k presets/convnext_tiny
  keras-convnext preset my_leaves.safetensors leaves/
  keras-convnext preset my_leaves.safetensors hf://user/leaves --dry-run
  keras-convnext preset my_leaves.safetensors hf://user/leaves

keras_hub.models.ImageClassifier.from_preset opens it after `import keras_convnext.hub`, keras_convnext.load
without keras-hub. hf://user/name uploads it, as the user of `hf auth login` or HF_TOKEN."""


def preset_options(option: Callable) -> None:
    option("model", "MODEL", "tag, architecture or weight file, with or without a classifier")
    option("output", "DIR", "the folder to write, or hf://user/name")
    option("--dry-run", None, "make it, say what would be uploaded, send nothing")
    option("--force", None, "replace a preset at DIR that this command wrote")


def preset_command(options: argparse.Namespace) -> int:
    is_remote = options.output.startswith(SCHEME)
    if options.dry_run and not is_remote:
        raise ValueError(f"Expected {SCHEME}user/name beside --dry-run, received {options.output!r}.")
    shared.import_quietly("keras_convnext.exporting.preset")
    from keras_convnext.exporting.preset import push, write_preset

    with tempfile.TemporaryDirectory() as temporary:
        folder = temporary if is_remote else options.output
        files = [
            (path.name, path.stat().st_size)
            for path in write_preset(options.model, folder, replace=options.force)
        ]
        if is_remote:
            push(folder, options.output, dry_run=options.dry_run)
    shared.print_table(("file", "size"), "<>", [(name, size_text(size)) for name, size in files])
    done = "not sent" if options.dry_run else "uploaded" if is_remote else "written"
    print(f"\n{options.output}: {len(files)} files, {done}")
    return 0


PAGE_EXAMPLES = """examples:
  keras-convnext export convnext_atto.d2_in1k atto.onnx
  keras-convnext page atto.onnx atto.html
  keras-convnext page leaves.onnx leaves.html --runtime onnxruntime-web-1.30.0.tgz

MODEL is a .onnx file that `keras-convnext export` wrote, with its .metadata.json next to it. OUTPUT is one
file with the model and all it needs to run: open it with a double click, offline too, and drop a picture on
it, or put it on a server of static files. npm fetches ONNX Runtime Web at the first use; without npm, pass
--runtime what `npm pack` wrote on another machine."""


def page_options(option: Callable) -> None:
    option("model", "MODEL", ".onnx file that export wrote")
    option("output", "OUTPUT", "the .html file")
    option("--runtime", "DIR", "onnxruntime-web as a folder or a .tgz file; default by npm, once")
    option("--force", None, "replace the file at OUTPUT")


def page_command(options: argparse.Namespace) -> int:
    from keras_convnext.exporting import web_page

    page = web_page.write_page(options.model, options.output, options.runtime, replace=options.force)
    print(f"{page}: {size_text(page.stat().st_size)}; open it in a browser")
    return 0
