"""On a GPU: pip install --no-deps keras==3.15.1 optree namex; PYTHONPATH=. python benchmarks/gpu.py

That is all where PyTorch, JAX with CUDA, timm, ml_dtypes, h5py, rich, absl-py and Pillow are installed;
TensorFlow is not needed, and Triton comes with PyTorch. Measures this package on PyTorch and JAX, in turns
with timm, eager and compiled: bfloat16, inference and training, and candidates for the depthwise
convolution, with kernels in Triton and Pallas. Writes gpu.md and gpu.csv after every case; gpu.json next
to them holds what was measured, so that the same command resumes where it was stopped. All of it takes
about an hour, most of which is compilation.
"""

import argparse
import csv
import dataclasses
import io
import itertools
import json
import os
import pathlib
import subprocess
import sys
from collections.abc import Sequence

os.environ.setdefault("KERAS_BACKEND", "torch")  # of this process; the default of Keras needs TensorFlow

from benchmarks.speed import candidates, depthwise, report
from benchmarks.speed.alternating_runs import Case, Measurement, measure
from benchmarks.speed.cases import Progress
from keras_convnext._environment import machine
from keras_convnext._files import replacing_file

FOLDER = pathlib.Path(__file__).parent
KERNELS = {"torch": FOLDER / "depthwise_triton.py", "jax": FOLDER / "depthwise_pallas.py"}
PEERS = ("timm", "timm-compile")
CASE, CANDIDATES = "case", "depthwise"  # kinds of entries in gpu.json

# JAX takes three quarters of the memory at its start, which the other processes of the run would lack.
SHARED_MEMORY = {"XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
NO_GPU = {"CUDA_VISIBLE_DEVICES": "", "JAX_PLATFORMS": "cpu"}

_DEVICE_NAME = """
import torch
print(torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu")
"""


@dataclasses.dataclass(frozen=True)
class Plan:
    """The cases to measure: the product of the lists, every case by all implementations."""

    architectures: Sequence[str]
    modes: Sequence[str]
    batches: Sequence[int]
    backends: Sequence[str]
    image_size: int
    dtype: str
    rounds: int
    seconds: float

    def cases(self) -> list[Case]:
        """The cases of the models, small batches first."""
        return [
            Case(model, mode, batch, self.image_size, self.dtype)
            for batch, mode, model in itertools.product(self.batches, self.modes, self.architectures)
        ]


def main(arguments: Sequence[str] | None = None) -> int:
    options = _parser().parse_args(arguments)
    plan = Plan(
        options.architectures
        or (["test_convnext"] if options.quick else ["convnext_tiny", "convnextv2_tiny"]),
        options.modes,
        options.batch or ([2] if options.quick else [64, 256]),
        options.backends,
        64 if options.quick else 224,
        options.dtype,
        2 if options.quick else options.rounds,
        0.05 if options.quick else options.seconds,
    )
    os.environ.update(SHARED_MEMORY if options.device == "gpu" else SHARED_MEMORY | NO_GPU)
    device = _device_name()
    if options.device == "gpu" and device == "cpu":
        print(
            "gpu.py: expected a GPU that PyTorch sees, found none. Install a CUDA build of torch, or try the "
            "program with --device cpu --quick.",
            file=sys.stderr,
        )
        return 2
    options.output.mkdir(parents=True, exist_ok=True)
    entries = _read(options.output, device)
    for number, case in enumerate(plan.cases()):
        key = {"kind": CASE} | dataclasses.asdict(case)
        implementations = [*plan.backends, *options.against]
        if any(entry["key"] == key for entry in entries):
            print(f"{case.title}: measured before", file=sys.stderr)
            continue
        progress = Progress(f"case {number + 1} of {len(plan.cases())}")
        found = measure(case, implementations, plan.rounds, plan.seconds, on_progress=progress.show)
        print(f"{report.case_table(found).text()}\n", flush=True)
        entries.append({"key": key, "found": [dataclasses.asdict(measured) for measured in found]})
        _write(options.output, device, plan, entries)
    for backend, batch in itertools.product(plan.backends, plan.batches):
        key = {"kind": CANDIDATES, "backend": backend, "batch": batch, "dtype": plan.dtype}
        if any(entry["key"] == key for entry in entries):
            continue
        shapes = depthwise.shapes(batch, plan.image_size)[-1 if options.quick else 0 :]
        rows = candidates.table(
            "depthwise",
            backend,
            shapes,
            plan.dtype,
            rounds=plan.rounds,
            seconds=plan.seconds,
            kernels=KERNELS[backend] if options.device == "gpu" else None,
        )
        print(f"{candidates.as_table('depthwise', rows).text()}\n", flush=True)
        entries.append({"key": key, "found": [dataclasses.asdict(row) for row in rows]})
        _write(options.output, device, plan, entries)
    print(f"Written: {options.output / 'gpu.md'}, {options.output / 'gpu.csv'}", file=sys.stderr)
    return 0


def _parser() -> argparse.ArgumentParser:
    def names(text):
        return text.split(",")

    def numbers(text):
        return [int(word) for word in text.split(",")]

    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", choices=("gpu", "cpu"), default="gpu", help="default gpu")
    parser.add_argument("--quick", action="store_true", help="a tiny model and 2 rounds, to try the program")
    parser.add_argument(
        "--architectures", type=names, metavar="NAMES", help="default convnext_tiny,convnextv2_tiny"
    )
    parser.add_argument("--modes", type=names, metavar="NAMES", default=["inference", "training"])
    parser.add_argument("--batch", type=numbers, metavar="NUMBERS", help="default 64,256")
    parser.add_argument("--backends", type=names, metavar="NAMES", default=["torch", "jax"])
    parser.add_argument("--dtype", default="bfloat16", help="default bfloat16")
    parser.add_argument("--rounds", type=int, default=5, metavar="N", help="turns of each, default 5")
    parser.add_argument("--seconds", type=float, default=1.0, metavar="S", help="of a turn, default 1")
    parser.add_argument(
        "--against", type=names, metavar="NAMES", default=PEERS, help="default timm,timm-compile"
    )
    parser.add_argument(
        "--output",
        type=pathlib.Path,
        default=FOLDER / "speed" / "results",
        metavar="DIR",
        help="default benchmarks/speed/results",
    )
    return parser


def _device_name() -> str:
    """The GPU's name, or "cpu"; asked for by a process of its own, which leaves no memory taken."""
    command = [sys.executable, "-P", "-c", _DEVICE_NAME]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


def _read(folder: pathlib.Path, device: str) -> list[dict]:
    """Returns the entries that an earlier run measured on the same device."""
    path = folder / "gpu.json"
    if not path.exists():
        return []
    stored = json.loads(path.read_text())
    if stored["device"] != device:
        raise SystemExit(
            f"gpu.py: {path} was measured on {stored['device']!r}, and this is {device!r}. Choose another "
            "--output."
        )
    return stored["entries"]


def _write(folder: pathlib.Path, device: str, plan: Plan, entries: list[dict]) -> None:
    """Writes gpu.json and, made from it, gpu.md and gpu.csv."""
    groups = [list(map(_measurement, entry["found"])) for entry in entries if entry["key"]["kind"] == CASE]
    tables = [
        [candidates.Row(**row | {"shape": tuple(row["shape"])}) for row in entry["found"]]
        for entry in entries
        if entry["key"]["kind"] == CANDIDATES
    ]
    where = machine()
    versions: dict[str, str] = {}
    for measured in itertools.chain.from_iterable(groups):
        versions |= measured.versions
    lines = [
        f"# {device}",
        "",
        f"keras-convnext {where['keras_convnext']} at {where['commit'] or '?'}, Python {where['python']}, "
        + ", ".join(f"{name} {version}" for name, version in sorted(versions.items()))
        + f"; {where['cpu']}, {where['cores']} cores; {where['time']}. Each case in turns, one process at a "
        f"time, {plan.rounds} rounds of about {plan.seconds:g} s; medians. peak MiB is device memory, first "
        "s is from the start of the process to the first result, compilation included. x PEER: times as fast "
        "as the peer, median over the rounds. `python benchmarks/gpu.py`",
        "",
    ]
    lines += [f"{report.case_table(group).markdown()}\n" for group in groups]
    lines += [f"{candidates.as_table('depthwise', rows).markdown()}\n" for rows in tables]
    with replacing_file(folder / "gpu.json") as file:
        file.write(json.dumps({"device": device, "entries": entries}, indent=1).encode())
    with replacing_file(folder / "gpu.md") as file:
        file.write("\n".join(lines).encode())
    with replacing_file(folder / "gpu.csv") as file:
        file.write(_csv_text(groups).encode())
    if tables:
        candidates.write_csv(folder / "gpu_depthwise.csv", list(itertools.chain.from_iterable(tables)))


def _measurement(facts: dict) -> Measurement:
    fields = facts | {"case": Case(**facts["case"]), "seconds": tuple(facts["seconds"])}
    return Measurement(**fields)


def _csv_text(groups: Sequence[Sequence[Measurement]]) -> str:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    cases = [field.name for field in dataclasses.fields(Case)]
    titles = ["implementation", *cases, "ms_per_image", *(f"times_{peer}" for peer in PEERS)]
    titles += ["seconds", "first_seconds", "peak_bytes", "device", "versions", "problem"]
    writer.writerow(titles)
    for group in groups:
        for measured in group:
            ratios = report.ratios_of(measured, group)
            writer.writerow(
                [
                    measured.implementation,
                    *dataclasses.astuple(measured.case),
                    f"{report.milliseconds(measured):.5g}" if measured.seconds else "",
                    *(f"{ratios[peer]:.3f}" if peer in ratios else "" for peer in PEERS),
                    " ".join(f"{seconds:.6f}" for seconds in measured.seconds),
                    f"{measured.first:.2f}" if measured.seconds else "",
                    measured.peak_bytes,
                    measured.device,
                    " ".join(f"{name}=={version}" for name, version in measured.versions.items()),
                    measured.problem,
                ]
            )
    return text.getvalue()


if __name__ == "__main__":
    raise SystemExit(main())
