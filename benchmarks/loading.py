"""Time and memory of loading a weight file into ConvNeXt-T, against timm doing the same.

Writes one timm safetensors file with random weights (109 MB), then loads it in fresh processes, ours and
timm's in turn: build the model and fill it, frameworks already imported. Prints the median time of each, the
ratio, and the peak resident memory: what the load adds to the imports, and the whole process.

    python benchmarks/loading.py --repeats 5
"""

import argparse
import json
import os
import pathlib
import platform
import statistics
import subprocess
import sys
import tempfile

TORCHVISION_OPERATORS = """
import torch
library = torch.library.Library("torchvision", "DEF")
for name in ("nms", "qnms"):
    library.define(name + "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
"""

MEASURE = """
import json, resource, time
def resident():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
before = resident()
start = time.perf_counter()
{load}
seconds = time.perf_counter() - start
print(json.dumps({"seconds": seconds, "added": resident() - before, "peak": resident()}))
"""

TIMM = (
    TORCHVISION_OPERATORS
    + """
import timm
from safetensors.torch import load_file
"""
    + MEASURE.replace(
        "{load}",
        """
model = timm.create_model("convnext_tiny")
model.load_state_dict(load_file({path!r}), strict=True)
model.eval()
""",
    )
)

OURS = """
import keras, numpy, keras_convnext
keras.ops.convert_to_numpy(keras.ops.ones((2, 2)) + 1)  # wakes the framework up
""" + MEASURE.replace(
    "{load}",
    """
model = keras_convnext.load("convnext_tiny", weights={path!r})
""",
)


def child(code: str, backend: str | None) -> dict:
    environment = {**os.environ, "TF_CPP_MIN_LOG_LEVEL": "3"}
    if backend:
        environment["KERAS_BACKEND"] = backend
    output = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code],
        capture_output=True,
        text=True,
        env=environment,
        check=False,
    )
    if output.returncode:
        sys.exit(f"The measurement failed:\n{output.stderr}")
    return json.loads(output.stdout.strip().splitlines()[-1])


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--repeats", type=int, default=5, help="processes of each kind (default 5)")
    parser.add_argument("--backends", nargs="+", default=["torch", "tensorflow", "jax"])
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        path = str(pathlib.Path(folder) / "convnext_tiny.safetensors")
        write = TORCHVISION_OPERATORS + (
            "import timm\nfrom safetensors.torch import save_file\n"
            f"save_file(timm.create_model('convnext_tiny').state_dict(), {path!r})\nprint('{{}}')"
        )
        child(write, None)
        codes = {"timm": (TIMM.replace("{path!r}", repr(path)), None)}
        for backend in arguments.backends:
            codes[backend] = (OURS.replace("{path!r}", repr(path)), backend)
        runs: dict[str, list[dict]] = {name: [] for name in codes}
        for _ in range(arguments.repeats):
            for name, (code, backend) in codes.items():
                runs[name].append(child(code, backend))
    print(
        f"ConvNeXt-T, 109 MB safetensors, {platform.machine()}, {os.cpu_count()} cores, n={arguments.repeats}"
    )
    print(f"{'':26}{'seconds':>9}{'/ timm':>8}{'added MB':>10}{'/ timm':>8}{'peak MB':>9}{'/ timm':>8}")
    reference = None
    for name, rows in runs.items():
        seconds, added, peak = (
            statistics.median(row[key] for row in rows) for key in ("seconds", "added", "peak")
        )
        reference = reference or (seconds, added, peak)
        label = name if name == "timm" else f"keras_convnext {name}"
        print(
            f"{label:26}{seconds:9.3f}{seconds / reference[0]:8.2f}{added:10.0f}{added / reference[1]:8.2f}"
            f"{peak:9.0f}{peak / reference[2]:8.2f}"
        )


if __name__ == "__main__":
    main()
