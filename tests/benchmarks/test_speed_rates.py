"""The work of a model by arithmetic, the rates of the machine, and the runs that compare times with these."""

import argparse
import csv
import json
import math
import os

import keras
import numpy as np
import pytest
import torch
from PIL import Image

from benchmarks.speed import alternating_runs, growth, implementations, machine_rates, stages, startup, work
from benchmarks.speed.implementations import Case
from keras_convnext.analysis.plan import multiply_adds
from keras_convnext.variants import VARIANTS

pytestmark = pytest.mark.slow

# Multiply-adds in 1e9, as published for a side in pixels: Liu et al. 2022, tables 1 and 9 and section 3.3,
# and the tables of facebookresearch/ConvNeXt; Woo et al. 2023 and the tables of facebookresearch/ConvNeXt-V2
# (at 224; those at 384 and 512 are up to 0.3 % above what PyTorch counts); torchvision's weight tables.
PUBLISHED = (
    ("convnext_tiny", 224, "4.5"),
    ("convnext_tiny", 224, "4.456"),
    ("convnext_small", 224, "8.684"),
    ("convnext_base", 224, "15.355"),
    ("convnext_large", 224, "34.361"),
    ("convnext_xlarge", 224, "60.9"),
    ("convnext_tiny", 384, "13.1"),
    ("convnext_small", 384, "25.5"),
    ("convnext_large", 384, "101.0"),
    ("convnext_xlarge", 384, "179.0"),
    ("convnext_isotropic_small", 224, "4.3"),
    ("convnext_isotropic_base", 224, "16.9"),
    ("convnext_isotropic_large", 224, "59.7"),
    ("convnextv2_atto", 224, "0.55"),
    ("convnextv2_femto", 224, "0.78"),
    ("convnextv2_pico", 224, "1.37"),
    ("convnextv2_nano", 224, "2.45"),
    ("convnextv2_base", 384, "45.2"),
    ("convnextv2_large", 224, "34.4"),
    ("convnextv2_huge", 224, "115"),
)
RATES = machine_rates.Rates(
    "float32",
    (machine_rates.Rate("quick", "cpu", 2e9, (2, 3, 4)), machine_rates.Rate("slow", "cpu", 1e9, (2, 3, 4))),
    (machine_rates.Rate("copy", "cpu", 1e9),),
    {},
)


@pytest.mark.once
@pytest.mark.parametrize(("name", "image_size", "published"), PUBLISHED)
def test_multiply_adds_are_those_published(name, image_size, published):
    digits = len(published.partition(".")[2])
    counted = multiply_adds(VARIANTS[name], image_size) / 1e9
    # Published numbers are rounded, a few of them down.
    assert abs(counted - float(published)) < 1.01 * 10**-digits, counted


@pytest.mark.once
@pytest.mark.parametrize("name", VARIANTS)
def test_weights_of_the_parts_are_those_of_the_architecture(name):
    assert sum(part.weights for part in work.parts(VARIANTS[name])) == VARIANTS[name].parameters


@pytest.mark.once
@pytest.mark.parametrize(
    ("name", "image_size", "batch"),
    [
        ("convnext_tiny", 224, 1),
        ("convnext_tiny", 97, 2),
        ("convnext_tiny_hnf", 64, 1),
        ("convnext_atto_ols", 225, 1),
        ("convnext_atto_ols", 93, 3),
        ("convnext_zepto_rms_ols", 95, 1),
        ("convnext_nano_ols", 66, 2),
        ("convnext_large_mlp", 64, 1),
        ("convnext_xxlarge", 70, 1),
        ("convnextv2_atto", 223, 1),
        ("convnextv2_huge", 96, 1),
        ("test_convnext3", 99, 2),
    ],
)
def test_multiply_adds_are_those_that_pytorch_counts_in_timms_model(name, image_size, batch):
    import timm
    from torch.utils.flop_counter import FlopCounterMode

    with torch.device("meta"):
        model = timm.create_model(name).eval()
        images = torch.zeros(batch, 3, image_size, image_size)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(images)
    assert 2 * multiply_adds(VARIANTS[name], image_size, batch) == counter.get_total_flops()


@pytest.mark.once
def test_parts_of_a_small_model_are_as_by_hand():
    """test_convnext2 at 64 pixels, 2 images: widths 32 to 128, sides 16 to 2, a block of each."""
    by_name = {(part.stage, part.name): part for part in work.parts(VARIANTS["test_convnext2"], 64, 2)}
    stem = by_name["stem", "stem"]
    assert stem.multiply_adds == 2 * 16 * 16 * 48 * 32
    assert stem.elements == 2 * (64 * 64 * 3 + 16 * 16 * 32)
    assert stem.weights == 48 * 32 + 32 + 2 * 32
    depthwise = by_name["stage 2", "depthwise"]
    assert depthwise.multiply_adds == 2 * 8 * 8 * 49 * 64
    assert depthwise.elements == 2 * 8 * 8 * 64 * 2
    pointwise = by_name["stage 2", "pointwise"]
    assert pointwise.multiply_adds == 2 * 8 * 8 * 64 * 256 * 2
    assert pointwise.elements == 2 * 8 * 8 * 64 * 3
    assert pointwise.flops == 2 * pointwise.multiply_adds
    downsampling = by_name["stage 4", "downsampling"]
    assert downsampling.multiply_adds == 2 * 2 * 2 * 4 * 96 * 128
    assert downsampling.elements == 2 * (4 * 4 * 96 + 2 * 2 * 128)
    head = by_name["head", "head"]
    assert (head.multiply_adds, head.elements) == (2 * 128 * 1000, 2 * (2 * 2 * 128 + 1000))
    assert head.num_bytes("float32") == 4 * (head.weights + head.elements) == 2 * head.num_bytes("bfloat16")


@pytest.mark.once
def test_work_grows_with_the_batch_and_weights_do_not():
    one, eight = (work.parts(VARIANTS["convnextv2_nano"], 160, batch) for batch in (1, 8))
    for small, large in zip(one, eight, strict=True):
        assert large.multiply_adds == 8 * small.multiply_adds
        assert large.elements == 8 * small.elements
        assert large.weights == small.weights


@pytest.mark.once
def test_floor_is_products_and_copies_one_after_the_other():
    part = work.Part("head", "head", multiply_adds=2 * 10**9, weights=10**8, elements=15 * 10**7)
    assert RATES.floor([part]) == pytest.approx(4e9 / 2e9 + 1e9 / 1e9)
    with pytest.raises(ValueError, match=r"Expected a rate measured on the gpu, received those of \['cpu'\]"):
        RATES.floor([part], "gpu")


@pytest.mark.once
def test_rates_are_measured_by_every_way(monkeypatch):
    monkeypatch.setattr(machine_rates, "COPIED_BYTES", 2**22)
    monkeypatch.setattr(machine_rates, "MATRIX_SHAPES", ((72, 32, 64), (32, 64, 32)))
    for library, num_ways in (("numpy", 1), ("torch", 2), ("jax", 1)):
        found = machine_rates.library_rates(library, "float32", 0.001)
        assert len(found["products"]) == 2 * num_ways
        assert all(1e6 < row["per_second"] < 1e15 for row in found["products"] + found["copies"])
    assert machine_rates.library_rates("numpy", "bfloat16", 0.001)["products"] == []


@pytest.mark.once
def test_best_rate_comes_first_and_failures_are_told(monkeypatch):
    def call(module, function, library, dtype, seconds, threads=None):
        if library != "jax":
            raise alternating_runs.WorkerError(f"{library} is broken")
        product = {"way": "jax dot", "device": "cpu", "shape": [1, 2, 3]}
        copy = {"way": "jax copy", "device": "cpu", "per_second": 4.0, "shape": []}
        rates = [product | {"per_second": 1.0}, product | {"per_second": 3.0}]
        return {"products": rates, "copies": [copy]}

    monkeypatch.setattr(machine_rates, "call_in_process", call)
    rates = machine_rates.measure_rates("float32")
    assert rates.matmul_rate() == machine_rates.Rate("jax dot", "cpu", 3.0, (1, 2, 3))
    assert rates.copy_bandwidth().per_second == 4.0
    assert rates.not_measured["torch"] == "torch is broken"
    monkeypatch.setattr(machine_rates, "LIBRARIES", ("torch", "numpy"))
    with pytest.raises(OSError, match=r"No library could be measured for float32. torch: torch is broken"):
        machine_rates.measure_rates("float32")
    with pytest.raises(
        ValueError, match="Expected a dtype among float32, bfloat16, float16, received 'int8'"
    ):
        machine_rates.measure_rates("int8")


@pytest.mark.once
def test_call_in_process_survives_what_frameworks_print():
    assert machine_rates.call_in_process("os", "getpid") != os.getpid()
    assert machine_rates.call_in_process("builtins", "print", "chatter") is None
    assert machine_rates.call_in_process("os", "getenv", "KERAS_BACKEND", backend="jax") == "jax"
    if hasattr(os, "sched_getaffinity"):
        limited = machine_rates.call_in_process("keras_convnext._environment", "available_cores", threads=1)
        assert limited == 1
    with pytest.raises(alternating_runs.WorkerError, match="could not convert string to float: 'x'"):
        machine_rates.call_in_process("builtins", "float", "x")


@pytest.fixture
def options(tmp_path):
    return argparse.Namespace(
        architectures=["test_convnext2"],
        backends=[keras.backend.backend()],
        mode=["inference"],
        batch=[2],
        image_size=[64],
        dtype=["float32"],
        against=["timm"],
        rounds=1,
        seconds=0.01,
        threads=None,
        output=str(tmp_path / "speed"),
        json=False,
    )


def rows_of(path):
    with open(path, encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


@pytest.mark.parametrize("name", ["test_convnext2", "convnext_isotropic_small"])
def test_stages_one_behind_the_other_are_the_whole_model(name, monkeypatch):
    variant = VARIANTS[name]
    case = Case(name, batch=1, image_size=64)
    if variant.isotropic and keras.backend.backend() == "jax":
        pytest.skip("compiles for long; the other backends show it")
    model = implementations.our_model(case)
    images = x = implementations.pixels(case)
    for part in stages.stage_models(model, variant).values():
        x = part.predict_on_batch(x)
    np.testing.assert_allclose(x, model.predict_on_batch(images), rtol=1e-4, atol=1e-7)


def test_stages_are_timed_and_written(monkeypatch, options, capsys, tmp_path):
    def here(module, function, *arguments, backend=None, threads=None):
        assert (module, backend) == ("benchmarks.speed.stages", keras.backend.backend())
        return json.loads(json.dumps(getattr(stages, function)(*arguments)))

    monkeypatch.setattr(machine_rates, "call_in_process", here)
    monkeypatch.setattr(machine_rates, "measure_rates", lambda dtype, threads=None: RATES)
    assert stages.run(options) == 0
    printed = capsys.readouterr().out
    assert "Stages of test_convnext2, inference, batch 2, 64 pixels, float32" in printed
    assert "matmul rate: 2 GFLOP/s (quick, 2 x 3 x 4); copy bandwidth: 1.0 GB/s (copy" in printed
    rows = rows_of(tmp_path / "speed" / "stages.csv")
    names = ["stem", "stage 1", "stage 2", "stage 3", "stage 4", "head"]
    assert [row["stage"] for row in rows] == [*names, "whole model"]
    for row in rows:
        assert float(row["seconds"]) > 0
        assert bool(row["depthwise_seconds"]) == row["stage"].startswith("stage")
        floor, seconds = float(row["floor_seconds"]), float(row["seconds"])
        assert float(row["fraction"]) == pytest.approx(floor / seconds, rel=1e-4)
    for column in ("gflop", "megabytes", "floor_seconds"):
        *single, whole = [float(row[column]) for row in rows]
        assert sum(single) == pytest.approx(whole, rel=1e-4)
    assert (tmp_path / "speed" / "stages.md").read_text().count("\n| ") == 2 + len(rows)


@pytest.mark.once
@pytest.mark.parametrize(("mode", "dtype"), [("training", "float32"), ("inference", "int8")])
def test_stages_refuse_what_has_no_floor(options, mode, dtype):
    options.mode, options.dtype = [mode], [dtype]
    with pytest.raises(ValueError, match=f"Expected inference in float32.*received {mode} in {dtype}"):
        stages.run(options)


@pytest.mark.once
def test_a_backend_that_dies_is_a_line_of_the_table(monkeypatch):
    def dead(*arguments, **settings):
        raise alternating_runs.WorkerError("was killed by SIGKILL")

    monkeypatch.setattr(machine_rates, "call_in_process", dead)
    found = stages.table(Case("test_convnext2", batch=1, image_size=64), ["torch"], RATES)
    assert found.rows == ()
    assert "ours, PyTorch: was killed by SIGKILL" in stages.as_table(found).text()


def measured(name, case, seconds, problem=""):
    return alternating_runs.Measurement(name, case, () if problem else (seconds,), 1.0, 1, {}, "cpu", problem)


@pytest.mark.once
def test_series_change_one_thing_each():
    series = growth.series_cases(
        ["convnext_base", "convnext_tiny", "convnext_atto"], [8, 1], [160, 224], mode="training"
    )
    middle = Case("convnext_tiny", "training", 8, 224)
    for cases in series.values():
        assert middle in cases
    assert [case.batch for case in series["batch"]] == [1, 8]
    assert [case.image_size for case in series["image size"]] == [160, 224]
    assert [case.model for case in series["variant"]] == ["convnext_atto", "convnext_tiny", "convnext_base"]


@pytest.mark.once
def test_what_grows_faster_than_its_work_is_marked(monkeypatch, options, capsys, tmp_path):
    """Times of a machine that does 1 TFLOP/s, half of that at 128 pixels, with 10 ms more for each batch."""

    def measure(case, names, rounds, seconds, threads):
        work_of_step = 2e-12 * multiply_adds(VARIANTS[case.model], case.image_size, case.batch)
        slower = 2 if case.image_size == 128 else 1
        return [
            measured(names[0], case, slower * work_of_step + 0.01),
            measured(names[1], case, 1.0, "was killed by SIGKILL: usually the system, when memory ran out"),
        ]

    monkeypatch.setattr(growth, "measure", measure)
    options.batch, options.image_size, options.architectures = [1, 512], [64, 96, 128], ["convnext_tiny"]
    assert growth.run(options) == 0
    printed = capsys.readouterr().out
    assert "Growth with batch" in printed
    rows = rows_of(tmp_path / "speed" / "growth.csv")
    ours = [row for row in rows if row["implementation"] == options.backends[0]]
    marks = {(row["series"], row["batch"], row["image_size"]): row["mark"] for row in ours}
    assert marks["batch", "1", "64"] == growth.SLOWER
    assert marks["batch", "512", "64"] == ""
    peers = [row for row in rows if row["implementation"] == "timm"]
    assert all("SIGKILL" in row["problem"] and row["ms_per_image"] == "" for row in peers)
    # Killed at every size: halved until one image is left.
    assert {row["batch"] for row in peers if row["series"] == "image size"} == {"1"}
    assert {row["batch"] for row in peers if row["series"] == "batch"} == {"1", "512"}
    with Image.open(tmp_path / "speed" / "growth.png") as picture:
        assert picture.size[0] > 1000


@pytest.mark.once
def test_twice_the_time_for_the_same_work_is_marked_and_less_is_not():
    cases = [Case("convnext_tiny", batch=8, image_size=size) for size in (224, 256, 288)]
    points = [
        growth._point(
            "image size",
            measured("jax", case, factor * multiply_adds(VARIANTS[case.model], case.image_size)),
        )
        for case, factor in zip(cases, (1.0, 1.4, 2.0), strict=True)
    ]
    assert [point.mark for point in growth._marked(points)] == ["", "", growth.FASTER]
    flat = [growth._point("image size", measured("jax", cases[0], 1.0, "died"))]
    assert growth._marked(flat)[0].mark == ""
    assert math.isnan(flat[0].seconds)


@pytest.mark.once
def test_growth_takes_one_mode(options):
    options.mode = ["inference", "training"]
    with pytest.raises(ValueError, match="Expected one mode for the growth, received inference,training"):
        growth.run(options)


@pytest.mark.once
def test_start_up_says_which_bar_is_met():
    found = [
        startup.Start("timm", "convnext_tiny", (4.0, 2.0, 2.0), 0.1, 1.5, 0.3, 0.1, 2**29),
        startup.Start("torch", "convnext_tiny", (3.8, 1.9, 2.2), 0.1, 1.5, 0.3, 0.1, 2**29),
        startup.Start("jax", "convnext_tiny", (6.0, 3.0, 2.0), 0.1, 1.5, 0.3, 0.1, 2**29),
        startup.Start("tensorflow", "convnext_tiny", problem="not installed: tensorflow"),
    ]
    assert startup.ratio(found[1], found[0]) == pytest.approx(0.95)
    table = startup.as_table(found)
    assert [row[-3:] for row in table.rows] == [
        ("", "", ""),
        ("0.95", "<= 1", "met"),
        ("1.50", "<= 1.3", "MISSED"),
    ]
    assert table.notes == ("ours, TensorFlow: not installed: tensorflow",)


@pytest.mark.once
@pytest.mark.parametrize("name", ["timm", "jax"])
@pytest.mark.parametrize("threads", [None, 1])
def test_start_up_programs_are_python(name, threads):
    values = {
        "path": "a folder/o'brien.safetensors",
        "model": "convnext_tiny",
        "size": 64,
        "threads": threads,
        "alone": threads is None,
    }
    code = startup.program(name, values | {"declare": startup._DECLARE})
    compile(code, name, "exec")
    assert ("'sklearn'" in code) == values["alone"]
    assert repr(values["path"]) in code
    assert ("sched_setaffinity" in code) == (threads is not None and hasattr(os, "sched_setaffinity"))


@pytest.mark.once
def test_start_up_is_measured_from_outside(options, capsys, tmp_path):
    assert startup.run(options) == 0
    assert "seconds from a new process to the first image" in capsys.readouterr().out
    rows = rows_of(tmp_path / "speed" / "startup.csv")
    backend = keras.backend.backend()
    assert [(row["implementation"], row["alone"]) for row in rows] == [
        ("timm", "False"), (backend, "False"), ("timm", "True"), (backend, "True"),
    ]  # fmt: skip
    for row in rows:
        assert row["problem"] == ""
        split = [float(row[name]) for name in ("interpreter", "imports", "build", "first")]
        assert min(split) > 0
        assert sum(split) == pytest.approx(float(row["total"]), rel=1e-3)
        assert int(row["peak_bytes"]) > 2**26
    assert float(rows[0]["times_timm"]) == float(rows[2]["times_timm"]) == 1.0
