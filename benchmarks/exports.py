"""Every format and precision, written from every backend, checked, as one table.

    python benchmarks/exports.py OUTPUT                            # all 63, about half an hour
    python benchmarks/exports.py OUTPUT --models convnext_atto --backends torch
    python benchmarks/exports.py OUTPUT --weights convnext_atto=atto.safetensors

Each backend runs in a process of its own; files are thrown away once they are measured. Without --weights
every weight is random, of a size that keeps signals near 1: differences are then those of an untrained model,
and the agreement of top-1 says little for int8.
"""

import argparse
import csv
import dataclasses
import json
import os
import pathlib
import subprocess
import sys
import tempfile
import types
import zlib

MODELS = ("convnext_atto", "convnext_tiny", "convnextv2_atto")
BACKENDS = ("tensorflow", "jax", "torch")
KINDS = (
    ("saved_model", "float32"),
    ("litert", "float32"),
    ("litert", "float16"),
    ("litert", "dynamic_int8"),
    ("litert", "int8"),
    ("onnx", "float32"),
    ("openvino", "float32"),
)


def parse():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("output", help="folder for exports.csv and table.md")
    parser.add_argument("--models", default=",".join(MODELS), help="architectures")
    parser.add_argument("--backends", default=",".join(BACKENDS))
    parser.add_argument("--formats", default=",".join(dict.fromkeys(format for format, _ in KINDS)))
    parser.add_argument(
        "--weights", action="append", default=[], metavar="MODEL=FILE", help="trained weights; repeatable"
    )
    parser.add_argument("--calibration", help="images, default crops of three photographs")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    return parser.parse_args()


def randomise(model):
    import numpy as np

    for weight in model.weights:
        generator = np.random.default_rng(zlib.crc32(weight.path.encode()))
        shape = tuple(weight.shape)
        noise = generator.normal(size=shape)
        if "kernel" in weight.name and len(shape) > 1:
            inputs = shape[0] * shape[1] if "dwconv" in weight.path else np.prod(shape[:-1])
            weight.assign(noise / inputs**0.5)
        else:
            weight.assign(0.1 * noise + ("gamma" in weight.name))


def export_all(options):
    """In a process of one backend: one line of JSON for each file."""
    import keras_convnext
    from keras_convnext.exporting.export import FORMATS

    weights = dict(pair.split("=", 1) for pair in options.weights)
    for name in options.models.split(","):
        model = keras_convnext.load(
            name,
            weights=weights.get(name),
            input_shape=(224, 224, 3),
            classifier_activation=None,
        )
        if name not in weights:
            randomise(model)
        for format, precision in (kind for kind in KINDS if kind[0] in options.formats.split(",")):
            row = {"model": name, "backend": options.child, "format": format, "precision": precision}
            with tempfile.TemporaryDirectory() as folder:
                path = pathlib.Path(folder, "model" + FORMATS[format].suffix)
                try:
                    result = keras_convnext.export(
                        model, path, format, precision=precision, calibration=options.calibration
                    )
                    row |= dataclasses.asdict(result) | {"path": path.name, "problem": ""}
                except Exception as error:
                    row["problem"] = f"{type(error).__name__}: {error}"
            print("ROW " + json.dumps(row), flush=True)


def main():
    options = parse()
    if options.child:
        export_all(options)
        return 0
    rows = []
    for backend in options.backends.split(","):
        command = [sys.executable, __file__, *sys.argv[1:], "--child", backend]
        environment = os.environ | {"KERAS_BACKEND": backend, "TF_CPP_MIN_LOG_LEVEL": "3"}
        with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) as process:
            for line in process.stdout:
                if line.startswith("ROW "):
                    rows.append(json.loads(line[4:]))
                    print(as_line(rows[-1]), flush=True)
    write(rows, pathlib.Path(options.output))
    failed = [row for row in rows if row["problem"]]
    print(f"{len(rows) - len(failed)} files of {len(rows)}")
    return 1 if failed else 0


def columns():
    from keras_convnext.exporting import report

    return ("model", "from", *report.COLUMNS[1:])


def cells(row):
    from keras_convnext.exporting import report

    first = [row["model"], row["backend"]]
    if row["problem"]:
        return [*first, row["format"], row["precision"], row["problem"], "", "", "", ""]
    result = types.SimpleNamespace(**row | {"path": pathlib.Path(row["path"])})
    return [*first, *report.rows([result])[0][1:]]


def as_line(row):
    return "  ".join(f"{cell:<12}" for cell in cells(row))


def write(rows, folder):
    from keras_convnext import _environment, _terminal

    folder.mkdir(parents=True, exist_ok=True)
    fields = list(dict.fromkeys(name for row in rows for name in row))
    with open(folder / "exports.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, fields)
        writer.writeheader()
        writer.writerows(rows)
    facts = ", ".join(f"{name}: {value}" for name, value in _environment.machine().items())
    table = _terminal.markdown_table(columns(), "<<<<>>>>>", [cells(row) for row in rows])
    lines = [f"- {facts}", "", *table]
    (folder / "table.md").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    raise SystemExit(main())
