"""benchmarks/gpu.py and its kernels on a CPU: the program runs through, and the kernels are right there."""

import csv
import json
import os
import subprocess
import sys

import numpy as np
import pytest
from programs import BENCHMARKS, load

pytestmark = pytest.mark.slow

SHAPES = [  # (N, H, W, C), kernel size, dilation
    ((2, 7, 7, 40), 7, 1),
    ((1, 9, 20, 24), 7, 1),
    ((2, 6, 5, 8), 3, 2),
    ((1, 11, 7, 16), 5, 3),
]


def arrays(shape, size):
    draw = np.random.default_rng(0)
    shapes = (shape, (size, size, shape[3], 1), (shape[3],), shape)
    return [draw.standard_normal(each, "float32") for each in shapes]


def expected(x, kernel, bias, gradient, dilation):
    """Result and gradients by PyTorch's float64 convolution."""
    import torch

    tensors = [torch.from_numpy(array).double().requires_grad_() for array in (x, kernel, bias)]
    y = torch.nn.functional.conv2d(
        tensors[0].permute(0, 3, 1, 2),
        tensors[1].permute(2, 3, 0, 1),
        tensors[2],
        padding=(kernel.shape[0] - 1) * dilation // 2,
        dilation=dilation,
        groups=x.shape[3],
    ).permute(0, 2, 3, 1)
    gradients = torch.autograd.grad(y, tensors, torch.from_numpy(gradient).double())
    return [value.detach().numpy() for value in (y, *gradients)]


def assert_close(results, wanted):
    for result, value in zip(results, wanted, strict=True):
        assert np.max(np.abs(result - value)) < 1e-5 * np.max(np.abs(value))


@pytest.mark.once
@pytest.mark.parametrize(("shape", "size", "dilation"), SHAPES)
def test_pallas_kernels_equal_the_convolution(shape, size, dilation):
    import jax

    pallas = load("depthwise_pallas")
    x, kernel, bias, gradient = arrays(shape, size)
    y, back = jax.vjp(lambda *inputs: pallas.depthwise(*inputs, dilation, 16), x, kernel, bias)
    results = [np.asarray(result) for result in (y, *back(gradient))]
    wanted = expected(x, kernel, bias, gradient, dilation)
    assert_close(results, wanted)
    with pytest.raises(AssertionError):  # the kernel's gradient, turned by 180 degrees
        assert_close([*results[:2], results[2][::-1, ::-1], results[3]], wanted)


@pytest.mark.once
@pytest.mark.parametrize(("shape", "size", "dilation"), SHAPES)
def test_triton_kernels_equal_the_convolution(shape, size, dilation, monkeypatch):
    import torch

    monkeypatch.setenv("TRITON_INTERPRET", "1")  # before Triton is imported
    pytest.importorskip("triton", reason="Triton comes with the CUDA build of PyTorch only")
    inputs = arrays(shape, size)
    x, kernel, bias, gradient = map(torch.from_numpy, inputs)
    watched = [array.requires_grad_() for array in (x, kernel, bias)]
    y = load("depthwise_triton").depthwise(*watched, dilation, 16)
    results = (y, *torch.autograd.grad(y, watched, gradient))
    assert_close([result.detach().numpy() for result in results], expected(*inputs, dilation))


@pytest.fixture(scope="module")
def script(tmp_path_factory):
    """Runs the program on a CPU and returns (exit code, stdout, stderr, folder)."""
    folder = tmp_path_factory.mktemp("speed")

    def script(*words):
        command = [sys.executable, BENCHMARKS / "gpu.py", *words, "--output", folder]
        environment = os.environ | {"PYTHONPATH": str(BENCHMARKS.parent), "CUDA_VISIBLE_DEVICES": ""}
        done = subprocess.run(command, capture_output=True, text=True, env=environment)
        return done.returncode, done.stdout, done.stderr, folder

    return script


@pytest.mark.once
def test_script_runs_through_on_a_cpu_and_goes_on_where_it_stopped(script):
    words = ("--device", "cpu", "--quick", "--backends", "jax", "--against", "timm", "--modes", "inference")
    code, out, err, folder = script(*words)
    assert code == 0, err
    assert "timm, eager" in out and "Depthwise convolution, jax on cpu, bfloat16" in out
    page = (folder / "gpu.md").read_text()
    assert "x timm" in page and "shifted products *" in page
    rows = list(csv.DictReader((folder / "gpu.csv").open()))
    assert [row["implementation"] for row in rows] == ["jax", "timm"]
    assert [float(row["ms_per_image"]) > 0 for row in rows] == [True, True]
    assert float(rows[0]["times_timm"]) > 0 and rows[1]["times_timm"] == ""
    candidates = list(csv.DictReader((folder / "gpu_depthwise.csv").open()))
    assert {row["shape"] for row in candidates} == {"2x2x2x768"}

    code, out, err, _ = script(*words)  # all of it is there
    assert (code, out) == (0, "")
    assert "measured before" in err

    stored = json.loads((folder / "gpu.json").read_text())
    (folder / "gpu.json").write_text(json.dumps(stored | {"device": "another"}))
    code, out, err, _ = script(*words)
    assert (code, out) == (1, "")
    assert "was measured on 'another', and this is 'cpu'" in err


@pytest.mark.once
def test_script_says_when_there_is_no_gpu(script):
    code, out, err, _ = script()
    assert (code, out) == (2, "")
    assert "expected a GPU that PyTorch sees, found none" in err


@pytest.mark.once
def test_first_line_says_how_to_run(script):
    code, out, _, _ = script("--help")
    assert code == 0
    assert "PYTHONPATH=. python benchmarks/gpu.py" in out
