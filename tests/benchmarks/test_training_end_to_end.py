"""Training end to end beside timm: what is counted of a turn, ratios and tables, and one run of all kinds."""

import csv
import json
import math

import numpy as np
import pytest
from PIL import Image
from programs import load

from benchmarks.speed import implementations, training_loops

program = load("training_end_to_end")


def speeds(kind="fit", **rates):
    return [program.Speed(kind, name, values, (0.25,) * len(values), 9.0) for name, values in rates.items()]


@pytest.mark.once
def test_the_ratio_is_taken_round_by_round():
    ours, peer = speeds(jax=(100.0, 50.0, 80.0), timm=(200.0, 25.0, 80.0))
    assert program.ratio(ours, peer) == 1.0  # the median of 0.5, 2.0 and 1.0
    assert math.isnan(program.ratio(ours, program.Speed("fit", "timm", problem="not installed: timm")))
    assert math.isnan(program.ratio(ours, None))


@pytest.mark.once
def test_the_table_has_the_bar_and_says_what_could_not_run():
    found = speeds(torch=(120.0,), jax=(99.0,), timm=(100.0,))
    table = program.as_table([*found, program.Speed("fit", "tensorflow", problem="ended by SIGKILL")])
    cells = {row[0]: row[1:] for row in table.rows}
    assert cells["ours, PyTorch"] == ("120.0", "120.0..120.0", "25%", "9.0", "1.20", "met")
    assert cells["ours, JAX"][-2:] == ("0.99", "MISSED")
    assert cells["timm, eager"][-2:] == ("", "")
    assert table.notes == ("ours, TensorFlow: ended by SIGKILL",)
    row = program.as_row(found[0], math.nan)
    assert (row["median_rates"], row["rates"], row["times_timm"]) == (120.0, "[120.0]", None)


@pytest.mark.once
def test_the_cost_of_batches_is_what_fit_loses_against_its_step():
    fits, steps = speeds(torch=(75.0,), timm=(40.0,)), speeds("step", torch=(100.0,), timm=(100.0,))
    assert program.cost_of_batches(fits, steps) == (
        "Reading and augmenting take, of the time of fit: ours, PyTorch 25%; timm, eager 60%."
    )


@pytest.mark.once
def test_a_user_of_fit_gets_no_variable_from_the_benchmark(monkeypatch):
    """What makes a backend fast comes from the package's import in that process, not from a program."""
    for name in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY", "TF_ENABLE_ONEDNN_OPTS"):
        monkeypatch.delenv(name, raising=False)
    settings = implementations.library_settings()
    assert settings and not settings.keys() & program.variables_of("torch").keys()


@pytest.mark.once
def test_a_turn_counts_neither_its_first_steps_nor_the_ends_of_epochs(monkeypatch):
    now, answers = [0.0], []
    monkeypatch.setattr(training_loops.time, "perf_counter", lambda: now[0])
    turns = iter([json.dumps({"seconds": 10.0})] * 2)
    clock = training_loops.Clock(16, lambda **facts: answers.append(facts), turns)

    def step(waits, computes, is_first=False):
        now[0] += waits
        clock.note_batch()
        now[0] += computes
        clock.end_step(is_first)

    for _ in range(training_loops.FIRST_STEPS):
        step(0.0, 50.0)
    assert answers == [{"ready": True}]
    for _ in range(training_loops.READY_STEPS):
        step(0.0, 0.1)
    for number in range(12):
        step(90.0, 9.0, is_first=True) if number == 3 else step(0.25, 0.75)
    expected = {"images": 160, "seconds": 10.0, "waited": 2.5, "sees_waiting": True}
    assert answers[1:] == [pytest.approx(expected)]


@pytest.mark.once
@pytest.mark.slow
def test_all_kinds_train_beside_timm(tmp_path, capsys):
    draw = np.random.default_rng(0)
    for name in ("left", "right"):
        (tmp_path / "photos" / name).mkdir(parents=True)
        for number in range(80):
            blocks = Image.fromarray(draw.integers(0, 256, (8, 9, 3), "uint8")).resize((110, 100))
            blocks.save(tmp_path / "photos" / name / f"{number}.jpg")
    words = ["--rounds", "1", "--seconds", "0.1", "--backends", "torch", "--output", str(tmp_path / "out")]
    assert program.main([str(tmp_path / "photos"), *words]) == 0
    rows = list(csv.DictReader((tmp_path / "out" / "training_end_to_end.csv").open()))
    assert [(row["kind"], row["implementation"]) for row in rows] == [
        (kind, name) for kind in program.KINDS for name in ("torch", "timm")
    ]
    assert all(not row["problem"] and float(row["median_rates"]) > 0 for row in rows)
    out = capsys.readouterr().out
    assert "Reading and augmenting take" in out and "images/s" in out and "cores: " in out
    with pytest.raises(SystemExit):
        program.main([str(tmp_path / "photos" / "none")])
    assert "error: " in capsys.readouterr().err
