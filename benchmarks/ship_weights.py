"""Makes a finished training run part of the package: a float16 weight file, its record, logs and recipes.

TAG is "<architecture>.<data set>". The weights are those of the last RUN's final.safetensors (the average,
where the recipe has one); runs before it are those it started from, in order. The file is evaluated on the
held-out images of the run, and so are the float32 weights; it is refused where rounding to float16 costs more
than 0.05 points. The program writes keras_convnext/weights/packaged/TAG.safetensors, benchmarks/runs/TAG.json
and, next to that, the log, curves and resolved recipe of each run. It prints the row for
keras_convnext/weights/catalog.csv.

    python benchmarks/ship_weights.py convnextv2_atto.tiny_imagenet200 runs/first runs/second
"""

import argparse
import csv
import dataclasses
import hashlib
import io
import json
import pathlib
import shutil
import sys
import tempfile
from typing import Any

import numpy as np

ROOT = pathlib.Path(__file__).resolve().parent.parent
MAX_LOSS = 0.05  # points of top-1
MAX_BYTES = 8_000_000
TERMS = "keras_convnext/weights/packaged/LICENSE-WEIGHTS.txt"
LICENCE = (
    "Weights trained on photographs of ImageNet, which are for non-commercial research and education; "
    "for research use."
)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("tag")
    parser.add_argument("runs", nargs="+", type=pathlib.Path, help="folders of `keras-convnext train`")
    parser.add_argument("--data", help="the prepared data, where it has moved since the run")
    parser.add_argument("--package", type=pathlib.Path, default=ROOT, help="repository to write to")
    options = parser.parse_args(arguments)
    try:
        record = ship(options.tag, options.runs, options.data, options.package)
    except (ValueError, OSError) as error:
        print(f"ship_weights: error: {error}", file=sys.stderr)
        return 1
    print(json.dumps(record, indent=1))
    print(row_text(record))
    return 0


def ship(
    tag: str, runs: list[pathlib.Path], data: str | None = None, package: pathlib.Path = ROOT
) -> dict[str, Any]:
    """Writes the weight file, the record and the logs; returns the record.

    Args:
        tag: "<architecture>.<data set>".
        runs: folders of finished runs; the weights are the last one's.
        data: the prepared data, default where the run had them.
        package: root of the repository that is written to.

    Raises:
        ValueError: the run is of another architecture, the file is too large, or float16 costs too much.
        FileNotFoundError: a run is not finished.
    """
    from keras_convnext import predictor
    from keras_convnext.evaluation.classification import evaluate
    from keras_convnext.training import logs
    from keras_convnext.training.recipes import files
    from keras_convnext.training.tasks import classification
    from keras_convnext.variants import VARIANTS
    from keras_convnext.weights import assign, layouts, preprocessing_metadata, safetensors_files

    for run in runs:
        if not (run / "final.safetensors").exists():
            raise FileNotFoundError(f"Expected a finished run, received {run} without final.safetensors.")
    run = runs[-1]
    settings = files.load_recipe(run / "recipe.toml", {"data": data} if data else None)
    architecture, _, dataset = tag.partition(".")
    if architecture != settings.model.architecture or not dataset:
        raise ValueError(f"Expected a tag '{settings.model.architecture}.<data set>', received {tag!r}.")
    _, validation = classification.open_data(settings)
    preprocessing = classification.Classification(settings).preprocessing

    def score(file: pathlib.Path) -> tuple[Any, Any]:
        opened = predictor.open_predictor(
            architecture, file, image_size=settings.evaluation.eval_image_size, classifier_activation=None
        )
        return opened, evaluate(opened.model, validation, preprocessing=preprocessing)

    opened, plain = score(run / "final.safetensors")
    state = assign.state_dict(opened.model)
    arrays = {name: np.asarray(value, "float16") for name, value in state.items()}
    broken = [name for name, value in arrays.items() if not np.isfinite(value).all()]
    if broken:
        raise ValueError(f"{', '.join(broken)} do not fit into float16.")
    environment = json.loads((run / "environment.json").read_text())
    metadata = {
        "format": "pt",
        "tag": tag,
        "dataset": dataset,
        "licence": LICENCE,
        "commit": environment["commit"],
        "record": f"benchmarks/runs/{tag}.json",
        preprocessing_metadata.KEY: preprocessing_metadata.to_json(preprocessing),
    }
    with tempfile.TemporaryDirectory() as folder:
        file = pathlib.Path(folder, f"{tag}.safetensors")
        layout = layouts.write(arrays, VARIANTS[architecture], "timm")
        safetensors_files.write_safetensors(file, layout, metadata)
        content = file.read_bytes()
        _, shipped = score(file)
    if len(content) > MAX_BYTES:
        raise ValueError(f"Expected a file of {MAX_BYTES:,} bytes at most, received {len(content):,}.")
    if plain.top1 - shipped.top1 > MAX_LOSS:
        raise ValueError(f"float16 takes top-1 from {plain.top1:.2f} to {shipped.top1:.2f} %.")

    target = package / "benchmarks" / "runs"
    names = [tag] if len(runs) == 1 else [f"{tag}_{number}" for number in range(1, len(runs) + 1)]
    parts = [
        copied(run, target, name, logs.read_csv(run / "log.csv"))
        for run, name in zip(runs, names, strict=True)
    ]
    record = {
        "tag": tag,
        "dataset": dataset,
        "classes": opened.model.output_shape[-1],
        "image_size": settings.evaluation.eval_image_size,
        "mean": list(preprocessing.mean),
        "std": list(preprocessing.std),
        "parameters": opened.model.count_params(),
        "bytes": len(content),
        "sha256": hashlib.sha256(content).hexdigest(),
        "held_out_images": len(shipped.numbers),
        "top1": round(shipped.top1, 2),
        "top5": round(shipped.top5, 2),
        "float32_top1": round(plain.top1, 2),
        "licence": LICENCE,
        "runs": parts,
    }
    weights = package / "keras_convnext" / "weights" / "packaged"
    weights.mkdir(parents=True, exist_ok=True)
    replace(weights / f"{tag}.safetensors", content)
    replace(target / f"{tag}.json", (json.dumps(record, indent=1) + "\n").encode())
    return record


def copied(run: pathlib.Path, target: pathlib.Path, name: str, rows: list[dict]) -> dict[str, Any]:
    """Copies what documents a run and returns its part of the record; no path of a machine goes along."""
    from keras_convnext.training.recipes import files

    settings = files.load_recipe(run / "recipe.toml")
    weights = pathlib.Path(settings.model.weights).name
    settings = settings.replaced({"data": "", "weights": f"FOLDER/{weights}" if weights else ""})
    replace(target / f"{name}.toml", settings.to_toml().encode())
    for source, ending in (("log.csv", "csv"), ("curves.png", "png")):
        shutil.copyfile(run / source, target / f"{name}.{ending}")
    environment = json.loads((run / "environment.json").read_text())
    images = environment["training_images"]
    kept = ("commit", "keras", "backend", "backend_version", "cpu", "cores", "accelerators", "engine", "time")
    hours = sum(images / row["images_per_second"] for row in rows if row.get("images_per_second")) / 3600
    last = rows[-1]
    return {
        "name": name,
        "epochs": settings.optimizer.epochs,
        "image_size": settings.model.image_size,
        "seed": settings.run.seed,
        "training_images": images,
        "hours": round(hours, 2),
        "final": {key: round(last[key], 4) for key in last if "top" in key or "loss" in key},
        "environment": {key: environment[key] for key in kept},
    }


def replace(path: pathlib.Path, content: bytes) -> None:
    from keras_convnext._files import replacing_file

    with replacing_file(path) as file:
        file.write(content)


def row_text(record: dict[str, Any]) -> str:
    """The row for the table of weight files."""
    from keras_convnext.weights.published import Checkpoint

    tag = record["tag"]
    cells = {
        name: record[name] for name in ("tag", "dataset", "classes", "image_size", "sha256", "top1", "top5")
    }
    cells |= {
        "architecture": tag.partition(".")[0],
        "layout": "timm",
        "crop": 1.0,
        "resize_mode": "shorter_side",
        "interpolation": "bicubic",
        "mean": " ".join(map(str, record["mean"])),
        "std": " ".join(map(str, record["std"])),
        "licence": "research-only",
        "score_source": f"measured here on {record['dataset']}: benchmarks/runs/{tag}.json",
        "note": f"trained here, {record['parameters']:,} weights; for research, terms in {TERMS}",
        "packaged": f"{tag}.safetensors",
    }
    text = io.StringIO()
    columns = [field.name for field in dataclasses.fields(Checkpoint)]
    csv.DictWriter(text, columns, lineterminator="").writerow(cells)
    return text.getvalue()


if __name__ == "__main__":
    raise SystemExit(main())
