"""Accuracy on a small photo set, fine-tuned and from scratch, over several seeds; each seed its own split.

Runs `keras-convnext train fine_tune` for each seed and start, keeps what is finished, and prints a table with
the mean and the standard deviation of top-1 on the held-out fifth. A fine-tuned run starts from WEIGHTS, a
.safetensors file of `keras-convnext train` or a tag; one from scratch has the recipe's other values but those
that the warnings of `train` name (rate, decay from layer to layer, scale of the head).

    python benchmarks/flowers.py FOLDER WEIGHTS OUTPUT --architecture convnextv2_atto --image-size 64
"""

import argparse
import csv
import json
import os
import pathlib
import statistics
import subprocess
import sys

SCRATCH = {
    "weights": "",
    "learning_rate": 1e-3,  # at a batch of 64
    "layer_decay": 1.0,
    "head_init_scale": 1.0,
    "weight_decay": 0.05,
}


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", help="class folders of photos")
    parser.add_argument("weights", help="what fine-tuning starts from")
    parser.add_argument("output", type=pathlib.Path, help="folder for the runs")
    parser.add_argument("--architecture", default="convnextv2_atto")
    parser.add_argument("--image-size", type=int, default=64, help="pixels, default 64")
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--learning-rate", type=float, default=5e-4, help="of fine-tuning, default 5e-4")
    options = parser.parse_args(arguments)
    common = {
        "architecture": options.architecture,
        "image_size": options.image_size,
        "eval_image_size": options.image_size,
        "eval_crop": 1.0,
        "epochs": options.epochs,
        "layer_scale_init_value": 0.0 if "v2" in options.architecture else 1e-6,
        "warmup_epochs": 0.5,
        "ema_decay": 0.98,
        "checkpoint_minutes": 0,
    }
    starts = {
        "fine-tuned": {"weights": os.path.abspath(options.weights), "learning_rate": options.learning_rate},
        "from scratch": SCRATCH,
    }
    rows = []
    for seed in range(options.seeds):
        for name, changes in starts.items():
            run = options.output / f"{name.replace(' ', '_')}_{seed}"
            if not (run / "result.json").exists():
                values = common | changes | {"seed": seed}
                words = [f"--set={key}={value}" for key, value in values.items()]
                command = [
                    sys.executable,
                    "-m",
                    "keras_convnext",
                    "train",
                    "fine_tune",
                    "--data",
                    options.folder,
                ]
                subprocess.run([*command, "--out", str(run), *words], check=True)
            result = json.loads((run / "result.json").read_text())
            rows.append(
                {"start": name, "seed": seed} | {key: result[key] for key in ("val_top1", "ema_val_top1")}
            )
    with open(options.output / "flowers.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    print("| start | top-1 | top-1 of the EMA | runs |\n|---|--:|--:|--:|")
    for name in starts:
        chosen = [row for row in rows if row["start"] == name]
        cells = []
        for key in ("val_top1", "ema_val_top1"):
            values = [row[key] for row in chosen]
            cells.append(f"{statistics.mean(values):.1f} ± {statistics.stdev(values):.1f}")
        print(f"| {name} | {' | '.join(cells)} | {len(chosen)} |")
    return 0


if __name__ == "__main__":
    sys.exit(main())
