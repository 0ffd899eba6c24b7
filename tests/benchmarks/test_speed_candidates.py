"""`python -m benchmarks.speed depthwise`: candidates are compared before they are timed; the table."""

import csv
import dataclasses
import os
import time

import keras
import numpy as np
import pytest

from benchmarks.speed import __main__ as program
from benchmarks.speed import candidates, depthwise, pointwise
from benchmarks.speed.candidates import Candidate, Row
from keras_convnext import _environment

pytestmark = pytest.mark.slow

BACKEND = os.environ.get("KERAS_BACKEND", "tensorflow")
SHAPE = (3, 5, 4, 8)


def candidate_named(name):
    return next(found for found in depthwise.candidates_of(BACKEND, "cpu") if found.name == name)


def measure(found, dtype="float32", operation=depthwise, shape=SHAPE):
    return candidates.measure_shape(operation, BACKEND, "cpu", found, shape, dtype, rounds=2, seconds=0.004)


def chosen_modes(rows):
    return sorted(" ".join(row.chosen for row in rows).split())


def test_every_candidate_is_right_and_the_one_in_use_is_among_them():
    all_of_them = [
        found for found in depthwise.candidates_of(BACKEND, "cpu") if found.compiler != "torch.compile"
    ]
    rows = measure(all_of_them)
    assert [row.candidate for row in rows] == [found.name for found in all_of_them]
    assert chosen_modes(rows) == ["both", "forward"]
    without_gradient = {"oneDNN, called directly"}
    if BACKEND == "tensorflow" and not _environment.tensorflow_has_onednn():
        without_gradient = {"grouped Conv2D"}
    for row in rows:
        assert row.note == "" and row.difference < 1e-5 and row.forward > 0
        assert (row.both is None) == (row.candidate in without_gradient)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("widths", [(8, 32), (32, 8)])
def test_every_product_is_right_and_the_one_in_use_is_among_them(widths, dtype):
    found = [each for each in pointwise.candidates_of(BACKEND, "cpu") if each.compiler != "torch.compile"]
    rows = measure(found, dtype, pointwise, (3, 5, 4, *widths))
    assert [row.note for row in rows] == [""] * len(found) and chosen_modes(rows) == ["both", "forward"]
    assert max(row.difference for row in rows) < (1e-5 if dtype == "float32" else 2e-2)


def test_a_product_without_its_activation_is_not_timed():
    first = pointwise.candidates_of(BACKEND, "cpu")[0]
    without = Candidate("without", lambda x, kernel, bias, _: first.function(x, kernel, bias, "none"))
    (row,) = measure([without], operation=pointwise, shape=(3, 5, 4, 8, 32))
    assert row.note == "differs too much: not timed"


@pytest.mark.parametrize("onednn", [True, False])
def test_grouped_convolution_has_a_gradient_where_tensorflow_has_onednn(monkeypatch, onednn):
    if BACKEND != "tensorflow":
        pytest.skip("a candidate of TensorFlow")
    monkeypatch.setattr(depthwise, "tensorflow_has_onednn", lambda: onednn)
    found = {each.name: each.has_gradient for each in depthwise.candidates_of("tensorflow", "cpu")}
    assert found.pop("grouped Conv2D") == onednn
    assert all(found.values())
    for each in depthwise.candidates_of("tensorflow", "gpu"):
        assert each.has_gradient


def test_the_candidate_in_use_is_right_in_bfloat16():
    chosen = depthwise.candidates_of(BACKEND, "cpu")[:2]
    rows = [row for row in measure(chosen, "bfloat16") if row.chosen]
    assert rows[0].note == "" and 1e-6 < rows[0].difference < 0.02


def test_what_differs_or_fails_is_marked_and_not_timed():
    library = candidate_named("library")

    def turned(x, kernel, bias, dilation):
        return library.function(x, keras.ops.flip(kernel, 0), bias, dilation)

    def fails(x, kernel, bias, dilation):
        raise NotImplementedError("not on this device")

    def cut(x, kernel, bias, dilation):
        return library.function(x, kernel, bias, dilation)[:, 1:]

    rows = measure([Candidate("turned", turned), Candidate("fails", fails), library])
    assert [row.note for row in rows] == [
        "differs too much: not timed",
        "cannot run: not on this device",
        "",
    ]
    assert [row.forward is None for row in rows] == [True, True, False]
    (row,) = measure([dataclasses.replace(Candidate("cut", cut), has_gradient=False)])
    assert row.note.startswith("cannot run") and row.forward is None


@pytest.mark.once
def test_nan_is_not_taken_for_equal():
    value = np.ones((1, 2, 2, 1))
    assert np.isnan(candidates._difference([np.full_like(value, np.nan)], [value], "NHWC"))


@pytest.mark.once
def test_expected_result_by_hand():
    x = np.zeros((1, 9, 9, 1), "float32")
    x[0, 4, 4, 0] = 1
    kernel = np.arange(49, dtype="float32").reshape(7, 7, 1, 1)
    gradient = np.zeros_like(x)
    gradient[0, 4, 4, 0] = 2
    y, x_gradient, kernel_gradient = depthwise.expected(x, kernel, np.ones(1), gradient, 1)
    assert np.array_equal(y[0, 1:8, 1:8, 0], kernel[::-1, ::-1, 0, 0] + 1)  # a correlation turns the kernel
    assert y[0, 0, 0, 0] == 1
    assert np.array_equal(x_gradient[0, 1:8, 1:8, 0], 2 * kernel[..., 0, 0])
    assert kernel_gradient[3, 3, 0, 0] == 2 and kernel_gradient.sum() == 2


@pytest.mark.once
def test_turns_go_back_and_forth_and_share_the_seconds():
    order = []

    def step(name):
        order.append(name)
        time.sleep(0.003)

    times = candidates.time_in_turns({"a": lambda: step("a"), "b": lambda: step("b")}, 2, 0.002)
    assert order == ["a", "b", "b", "a"]
    assert all(0.003 <= value < 1 for value in times.values())


@pytest.mark.once
def test_stage_shapes():
    assert depthwise.shapes(8) == [
        (8, 56, 56, 96),
        (8, 28, 28, 192),
        (8, 14, 14, 384),
        (8, 7, 7, 768),
    ]
    with pytest.raises(ValueError, match=r"32 pixels or more.*Received: 31"):
        depthwise.shapes(1, 31)


@pytest.mark.once
def test_wrong_words_and_a_process_that_dies():
    with pytest.raises(ValueError, match=r"Unknown backend 'numpy'\. Known: tensorflow, jax, torch"):
        candidates.table("depthwise", "numpy", [SHAPE])
    with pytest.raises(ValueError, match=r"Unknown dtype 'int8' of the candidates\. Known: float32"):
        candidates.table("depthwise", "jax", [SHAPE], "int8")
    (row,) = candidates.table("depthwise", "torch", [SHAPE], kernels="nowhere.py")
    assert row.candidate == "(the process)" and "nowhere.py" in row.note


@pytest.mark.once
def test_table_says_what_is_used_and_what_is_missing():
    rows = [
        Row("jax", "cpu", "float32", (1, 2, 2, 3), "one", "forward both", 1.0, 20.0, 1e-7),
        Row("jax", "cpu", "float32", (1, 4, 4, 3), "one", "both", 2.0, 130.0, 2e-7),
        Row("jax", "cpu", "float32", (1, 2, 2, 3), "two", "", 3.0, None, 1e-7),
        Row("jax", "cpu", "float32", (1, 4, 4, 3), "two", "forward", note="cannot run: no"),
    ]
    table = candidates.as_table("depthwise", rows)
    assert table.rows == [
        ("one", "1 * / 20 *", "2 / 130 *", "3 / 150", "2e-07", ""),
        ("two", "3 / -", "- * / -", "- / -", "1e-07", "cannot run: no"),
    ]
    assert "1x4x4x3" in table.markdown()


def test_command_prints_and_writes(capsys, tmp_path):
    if BACKEND != "jax":
        pytest.skip("the command runs one process for each backend; one is enough")
    words = ["depthwise", "--backends", "jax", "--batch", "1", "--image-size", "32", "--rounds", "1"]
    code = program.main([*words, "--seconds", "0.01", "--output", str(tmp_path / "speed")])
    out, err = capsys.readouterr()
    assert code == 0, err
    assert "Depthwise convolution, jax on cpu, float32" in out and "* is what the package uses there." in out
    rows = list(csv.DictReader((tmp_path / "speed" / "depthwise.csv").open()))
    assert {row["shape"] for row in rows} == {"1x8x8x96", "1x4x4x192", "1x2x2x384", "1x1x1x768"}
    lines = (tmp_path / "speed" / "depthwise.md").read_text().splitlines()
    assert [line.split(" | ")[0] for line in lines if " * / " in line] == ["| shifted products"]


def test_command_prints_json(capsys):
    if BACKEND != "torch":
        pytest.skip("as above")
    assert program.main(["depthwise", "--backends", "torch", "--dtype", "int8", "--json"]) == 2
    out, err = capsys.readouterr()
    assert out == "" and "Unknown dtype 'int8' of the candidates" in err
