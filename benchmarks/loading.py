"""Time and peak memory of loading a .pth file: this checkout, one of before, timm; in turns, medians.

python benchmarks/loading.py --before ../keras_convnext_before

Each turn is a new process: it imports, reads the file once for the page cache, then builds the model with the
weights of the file. The ratios are of the same round.
"""

import argparse
import json
import os
import pathlib
import statistics
import subprocess
import sys
import tempfile

ROOT = pathlib.Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

_FRAME = """\
import json, sys, time
path, architecture = sys.argv[1:]
{imports}
spans = []
for _ in range(2):
    begin = time.perf_counter()
    arrays = {read}
    spans.append(time.perf_counter() - begin)
    del arrays
begin = time.perf_counter()
model = {load}
spans.append(time.perf_counter() - begin)
with open("/proc/self/status") as file:
    peak = [int(line.split()[1]) / 1024 for line in file if line.startswith("VmHWM:")][0]
print(json.dumps({{"read": spans[1], "load": spans[2], "peak": peak}}))
"""
_OURS = {
    "imports": "import keras_convnext\nfrom keras_convnext.weights.torch_files import read_state_dict",
    "read": "read_state_dict(path)",
    "load": "keras_convnext.load(architecture, weights=path)",
}
_TIMM = {
    "imports": "import torch\n{declare}import timm",
    "read": "torch.load(path, weights_only=True, mmap=True)",
    "load": "timm.create_model(architecture)\nmodel.load_state_dict(torch.load(path, weights_only=True))",
}


def main(arguments=None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--architecture", default="convnext_tiny")
    parser.add_argument("--before", type=pathlib.Path, help="another checkout of this repository")
    parser.add_argument("--rounds", type=int, default=9)
    options = parser.parse_args(arguments)
    from benchmarks.speed.startup import _DECLARE, _lacks_operators
    from keras_convnext._environment import machine
    from keras_convnext._terminal import table_lines

    timm = _TIMM | {"imports": _TIMM["imports"].format(declare=_DECLARE if _lacks_operators() else "")}
    names = {"this checkout": (_OURS, ROOT), "timm": (timm, ROOT)}
    if options.before:
        names["before"] = (_OURS, options.before.resolve())
    found: dict[str, list[dict]] = {name: [] for name in names}
    with tempfile.TemporaryDirectory() as folder:
        path = pathlib.Path(folder) / f"{options.architecture}.pth"
        _run(
            "import sys, keras_convnext\nkeras_convnext.save_weights(keras_convnext.load(sys.argv[2], None), "
            "sys.argv[1], 'timm')\nprint('null')",
            ROOT,
            path,
            options.architecture,
        )
        size = path.stat().st_size
        for number in range(options.rounds):
            for name in list(names) if number % 2 else reversed(names):
                pieces, checkout = names[name]
                found[name].append(_run(_FRAME.format(**pieces), checkout, path, options.architecture))
    rows = []
    for name, turns in found.items():
        ratios = [
            statistics.median(
                ours[key] / turn[key] for ours, turn in zip(found["this checkout"], turns, strict=True)
            )
            for key in ("read", "load", "peak")
        ]
        read, load, peak = (
            statistics.median(turn[key] for turn in turns) for key in ("read", "load", "peak")
        )
        numbers = (f"{1000 * read:.1f}", f"{load:.2f}", f"{peak:.0f}", *(f"{ratio:.2f}" for ratio in ratios))
        rows.append((name, *numbers))
    titles = ("", "read, ms", "load, s", "peak, MiB", "ours / its read", "load", "peak")
    print(f"{options.architecture}, {size / 1e6:.0f} MB, {os.environ.get('KERAS_BACKEND', 'tensorflow')}")
    print("\n".join(table_lines(titles, "<" + 6 * ">", rows)))
    facts = machine()
    print(f"{facts['cpu']}, cores: {facts['cores']}, load before {facts['load']}, rounds: {options.rounds}")
    return 0


def _run(code: str, checkout: pathlib.Path, *words: object) -> dict:
    command = [sys.executable, "-P", "-W", "ignore", "-c", code, *map(str, words)]
    done = subprocess.run(
        command, capture_output=True, text=True, env=os.environ | {"PYTHONPATH": str(checkout)}, cwd="/"
    )
    if done.returncode:
        raise RuntimeError(f"Expected an answer of {checkout}, received: {done.stderr[-500:]}")
    return json.loads(done.stdout.splitlines()[-1])


if __name__ == "__main__":
    sys.exit(main())
