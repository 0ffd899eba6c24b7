"""`python -m benchmarks.speed`: processes that take turns, peers that really run, tables, files, messages."""

import csv
import json
import math
import os
import signal
import subprocess
import sys
import time

import keras
import psutil
import pytest

from benchmarks.speed import __main__ as program
from benchmarks.speed import (
    alternating_runs,
    candidates,
    cases,
    full_run,
    implementations,
    machine_rates,
    output,
    report,
    worker,
)
from benchmarks.speed.alternating_runs import Measurement, measure, measure_entries, ratio
from benchmarks.speed.implementations import Case
from keras_convnext import _environment

pytestmark = pytest.mark.slow

BACKEND = keras.backend.backend()
SMALL = Case("test_convnext", batch=2, image_size=64)


@pytest.fixture
def run(capsys):
    """Runs the program and returns (exit code, stdout, stderr)."""

    def run(*words):
        capsys.readouterr()
        code = program.main([str(word) for word in words])
        return code, *capsys.readouterr()

    return run


@pytest.fixture
def refused(run):
    """Runs the program, which must fail with code 2 and print one error alone, and returns the error."""

    def refused(*words):
        code, out, err = run(*words)
        assert (code, out) == (2, "")
        assert err.startswith("python -m benchmarks.speed: error: ")
        return err

    return refused


def measurement(implementation, seconds, case=SMALL, problem=""):
    return Measurement(implementation, case, tuple(seconds), 2.0, 3 * 2**20, {"keras": "3"}, "cpu", problem)


# Turns.


def test_implementations_take_turns_and_each_gives_one_time_a_round():
    shown = []
    ours, timm = measure(
        SMALL, [BACKEND, "timm"], rounds=2, seconds=0.05, on_progress=lambda *a: shown.append(a)
    )
    for found in (ours, timm):
        assert found.problem == ""
        assert len(found.seconds) == 2
        assert all(0 < seconds < 60 for seconds in found.seconds)
        assert found.first > max(found.seconds)
        assert found.device == "cpu"
    assert [what for what, _, _ in shown] == [
        f"starting {BACKEND}", "starting timm", BACKEND, "timm", "timm", BACKEND, "done",
    ]  # fmt: skip
    assert shown[-1][1:] == (6, 6)
    assert ours.versions["keras"] == keras.__version__
    assert "keras" not in timm.versions
    assert ours.peak_bytes > timm.peak_bytes > 50 * 2**20
    assert ratio(ours, timm) > 0


def test_training_runs_on_both_sides():
    case = Case("test_convnext", "training", batch=2, image_size=64)
    ours, timm = measure(case, [BACKEND, "timm"], rounds=1, seconds=0.05)
    assert (ours.problem, timm.problem) == ("", "")


@pytest.mark.parametrize("dtype", ["bfloat16", "int8"])
def test_our_model_runs_in_other_dtypes(dtype):
    (ours,) = measure(Case("test_convnext", batch=1, image_size=64, dtype=dtype), [BACKEND], 1, 0.05)
    assert ours.problem == ""


@pytest.mark.once
def test_what_a_framework_prints_does_not_reach_the_answers(monkeypatch):
    chatter = "import os; print('to stdout', flush=True); os.write(1, b'to file 1'); os.system('echo shell');"
    loud = f"""import keras_convnext_main
from benchmarks.speed import implementations, worker
def prepare(*arguments):
    {chatter}
    return lambda: print('step')
implementations.prepare = prepare
raise SystemExit(worker.main())"""
    monkeypatch.setattr(worker, "COMMAND", loud)
    (found,) = measure(SMALL, ["timm"], rounds=2, seconds=0.01)
    assert found.problem == ""
    assert len(found.seconds) == 2


@pytest.mark.once
def test_a_worker_that_is_killed_in_its_turn_is_a_row_and_the_others_go_on(monkeypatch):
    deadly = worker.COMMAND.replace(
        "raise",
        "import os, signal, sys; step = lambda: step.__dict__.update(n=step.__dict__.get('n', 0) + 1) or "
        "(step.n > 2 and os.kill(os.getpid(), signal.SIGKILL)); "
        "worker.implementations.prepare = lambda name, *_: step if name == 'timm' else (lambda: None); raise",
    )
    monkeypatch.setattr(worker, "COMMAND", deadly)
    dead, other = measure(SMALL, ["timm", "torch"], rounds=2, seconds=0.01)
    assert dead.problem == "was killed by SIGKILL: usually the system, when memory ran out"
    assert dead.seconds == ()
    assert math.isnan(dead.median)
    assert len(other.seconds) == 2
    assert math.isnan(ratio(other, dead))


@pytest.mark.once
def test_an_error_in_a_worker_is_its_row_and_a_crash_shows_its_last_words(monkeypatch):
    original = worker.COMMAND

    def problem(code):
        monkeypatch.setattr(worker, "COMMAND", original.replace("raise", f"{code}; raise"))
        (found,) = measure(SMALL, ["timm"], rounds=1, seconds=0.01)
        return found.problem

    error = (
        "worker.implementations.prepare = lambda *_: (_ for _ in ()).throw(TypeError('\\x1b[1mno\\nsecond'))"
    )
    assert problem(error) == "TypeError: no"
    crash = "import sys; print('out of oil', file=sys.stderr); sys.exit(7)"
    assert problem(crash) == "ended with exit code 7: out of oil"


@pytest.mark.once
def test_a_silent_worker_is_ended_with_what_it_started():
    code = "import subprocess; subprocess.run(['sleep', '60'])"
    silent = alternating_runs.Worker(["-c", code], {})
    while not (children := psutil.Process(silent.process.pid).children()):
        time.sleep(0.05)
    with pytest.raises(alternating_runs.WorkerError, match="gave no answer within 0 s"):
        silent.ask(limit=0.1, run=1)
    assert silent.process.poll() == -signal.SIGKILL
    time.sleep(0.1)
    assert all(not one.is_running() or one.status() == psutil.STATUS_ZOMBIE for one in children)


@pytest.mark.once
def test_ctrl_c_ends_the_workers_and_the_command_with_130(run, monkeypatch):
    started = []
    begin = alternating_runs.Worker.__init__

    def noted(self, *arguments):
        begin(self, *arguments)
        started.append(self)

    def interrupt(what, done, total):
        if started:
            raise KeyboardInterrupt

    monkeypatch.setattr(alternating_runs.Worker, "__init__", noted)
    monkeypatch.setattr(cases.Progress, "show", lambda self, *a: interrupt(*a))
    code, _, _ = run("test_convnext", "--backends", "torch", "--image-size", 64, "--rounds", 1)
    assert code == 130
    assert [one.process.poll() for one in started] == [-signal.SIGKILL]


@pytest.mark.once
def test_a_ratio_is_the_median_over_the_rounds_of_pairs():
    ours, peer = measurement("torch", [1.0, 2.0, 4.0]), measurement("timm", [2.0, 2.0, 2.0])
    assert ratio(ours, peer) == 1.0  # of 2, 1 and 0.5
    assert ratio(peer, ours) == 1.0
    # Not the ratio of the medians, which is 1 here: the machine was slower in the last two rounds.
    ours, peer = measurement("torch", [1.0, 3.0, 6.0]), measurement("timm", [1.5, 3.0, 9.0])
    assert ratio(ours, peer) == 1.5


# Implementations.


@pytest.mark.once
def test_every_peer_runs():
    case = Case("convnext_tiny", batch=1, image_size=64)
    names = ["torchvision", "keras.applications:torch", "onnxruntime", "openvino-timm", "litert", "openvino"]
    found = measure(case, names, rounds=1, seconds=0.01)
    assert {one.implementation: one.problem for one in found} == dict.fromkeys(names, "")
    versions = {one.implementation: one.versions for one in found}
    assert {"torchvision", "torch"} <= set(versions["torchvision"])
    assert "ai_edge_litert" in versions["litert"]
    assert "onnxruntime" in versions["onnxruntime"]


@pytest.mark.once
@pytest.mark.parametrize(
    ("name", "case", "reason"),
    [
        ("timm", Case("convnext_isotropic_small"), "timm has no convnext_isotropic_small"),
        ("torchvision", Case("convnext_atto"), "torchvision has no convnext_atto"),
        ("keras.applications:jax", Case("convnextv2_tiny"), "keras.applications has no convnextv2_tiny"),
        ("litert", Case("convnext_tiny", "training"), "does not train"),
        ("onnxruntime", Case("convnext_tiny", dtype="bfloat16"), "no inference in bfloat16"),
        ("timm", Case("convnext_tiny", dtype="int8"), "no inference in int8"),
        ("torch", Case("convnext_tiny", "training", dtype="int8"), "no training in int8"),
        ("timm", Case("convnext_tiny", "training", rematerialize=True), "does not rematerialise"),
    ],
)
def test_what_a_implementation_does_not_offer_is_said_without_starting_it(name, case, reason, monkeypatch):
    monkeypatch.setattr(alternating_runs, "Worker", None)
    (found,) = measure(case, [name], rounds=1)
    assert found.problem == reason


@pytest.mark.once
def test_a_package_that_is_missing_is_named(monkeypatch):
    found = implementations.importlib.util.find_spec
    monkeypatch.setattr(
        implementations.importlib.util,
        "find_spec",
        lambda name: None if name == "ai_edge_litert" else found(name),
    )
    with pytest.raises(implementations.NotOfferedError, match=r"^not installed: ai-edge-litert$"):
        implementations.check_offered("litert", SMALL)


@pytest.mark.once
def test_an_unknown_implementation_is_refused():
    with pytest.raises(
        ValueError, match=r"Unknown implementation 'timm-compiled'\. Did you mean 'timm-compile'"
    ):
        measure_entries([("timm-compiled", SMALL)])


@pytest.mark.once
def test_threads_limit_a_worker():
    code = (
        "import keras_convnext_main\n"
        "from benchmarks.speed import implementations\n"
        "implementations.limit_threads(1)\n"
        "import json, torch; print(json.dumps({'cores': implementations.available_cores(), "
        "'torch': torch.get_num_threads()}))"
    )
    one = alternating_runs.Worker(["-c", code], implementations.environment("timm", 1))
    try:
        assert one.ask() == {"cores": 1, "torch": 1}
    finally:
        one.stop()


# Tables and files.


def group():
    return [
        measurement("torch", [0.020, 0.022, 0.024]),
        measurement("jax", [], problem="TypeError: no"),
        measurement("timm", [0.022, 0.022, 0.022]),
        measurement("keras.applications:torch", [0.044, 0.044, 0.048]),
        measurement("keras.applications:jax", [0.4, 0.4, 0.4]),
    ]


@pytest.mark.once
def test_the_table_of_a_case_has_times_an_image_and_ratios_to_each_peer():
    table = report.case_table(group())
    assert table.titles[6:] == ("x timm", "x keras.applications")
    assert table.rows[0] == (
        "ours, PyTorch", "11.00", "90.91", "10.00..12.00", "3", "2.0", "1.00", "2.00",
    )  # fmt: skip
    assert [row[0] for row in table.rows] == [
        "ours, PyTorch", "timm, eager", "keras.applications, PyTorch", "keras.applications, JAX",
    ]  # fmt: skip
    assert table.rows[1][6:] == ("", "")
    assert table.notes == ("ours, JAX: TypeError: no",)
    assert "ours, JAX: TypeError: no" in table.text()
    assert "| ours, PyTorch | 11.00 |" in table.markdown()


@pytest.mark.once
def test_csv_markdown_and_plot_are_written(tmp_path):
    other = [measurement(one.implementation, one.seconds, Case("test_convnext", batch=1)) for one in group()]
    where = _environment.machine() | {"threads": "all"}
    tables = [report.case_table(group())]
    report.write(tmp_path / "new", ["a heading"], where, [group(), other], tables)
    with open(tmp_path / "new" / "bench.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 10
    ours, failed = rows[0], rows[1]
    assert (ours["implementation"], ours["batch"], ours["ms_per_image"]) == ("torch", "2", "11")
    assert (ours["times_timm"], ours["times_keras.applications"], ours["times_litert"]) == ("1", "2", "")
    assert (ours["seconds"], ours["versions"]) == ("0.020000 0.022000 0.024000", "keras==3")
    assert (failed["ms_per_image"], failed["problem"]) == ("", "TypeError: no")
    assert ours["cpu"] == where["cpu"]
    text = (tmp_path / "new" / "table.md").read_text()
    assert text.startswith("- a heading\n\n### test_convnext, inference, batch 2, 64 pixels, float32\n")
    from PIL import Image

    with Image.open(tmp_path / "new" / "bench.png") as picture:
        pixels = picture.convert("RGB")
        assert pixels.width > 800
        colours = {colour for _, colour in pixels.getcolors(1 << 24)}
    assert {(0x1F, 0x77, 0xB4), (0xB5, 0xB5, 0xB5)} <= colours  # ours and the peers
    assert sorted(path.name for path in (tmp_path / "new").iterdir()) == [
        "bench.csv",
        "bench.png",
        "table.md",
    ]


@pytest.mark.once
def test_the_summary_says_met_missed_and_not_measured():
    case = Case("convnext_tiny", batch=8, image_size=64)
    seen = [
        measurement("torch", [0.10], case),
        measurement("jax", [0.25], case),
        measurement("tensorflow", [], case, "ended with exit code 1"),
        measurement("timm", [0.20], case),
        measurement("timm-compile", [0.20], case),
        measurement("keras.applications:jax", [1.0], case),
    ]
    v2 = [
        measurement("jax", [0.10], Case("convnext_tiny", batch=8)),
        measurement("jax", [0.12], Case("convnextv2_tiny", batch=8)),
    ]
    staged = full_run.stages.Stages(case, None, (), {})
    rows = full_run.summary_table(64, [seen, v2], staged).rows
    found = {row[0]: row[1:] for row in rows}
    title = f"{case.title}: "
    assert found[f"{title}ours, PyTorch, x timm"] == (">= 1", "2.00", "met")
    assert found[f"{title}ours, JAX, x timm"] == (">= 1", "0.80", "MISSED")
    assert found[f"{title}ours, TensorFlow, x timm"] == (">= 1", "-", "not measured")
    assert found[f"{title}best of ours (PyTorch), x timm-compile"] == (">= 1", "2.00", "met")
    other = f"{Case('convnextv2_tiny', batch=1, image_size=64).title}: "
    assert found[f"{other}ours, each backend, x timm"] == (">= 1", "-", "not measured")
    assert found[f"{other}best of ours, x timm-compile"] == (">= 1", "-", "not measured")
    assert found[f"{title}ours, JAX, x keras.applications"] == (">= 1", "4.00", "met")
    cost = "time of convnextv2_tiny relative to convnext_tiny, inference, batch 8: ours, JAX"
    assert found[cost] == ("<= 1.15", "1.20", "MISSED")


# The command.


@pytest.mark.once
def test_the_command_prints_a_table_and_writes_files(run, tmp_path):
    words = ["--backends", "torch", "--batch", "1", "--image-size", "64", "--rounds", 2, "--seconds", 0.02]
    code, out, _ = run("test_convnext", *words, "--output", tmp_path / "speed")
    assert code == 0
    assert out.startswith("test_convnext, inference, batch 1, 64 pixels, float32\n")
    assert "ours, PyTorch" in out
    assert "x timm" in out
    assert "rounds: 2" in out
    assert (tmp_path / "speed" / "bench.png").exists()
    code, out, _ = run("test_convnext", *words, "--json", "--against", "litert")
    ours, litert = json.loads(out)["cases"][0]
    assert ours["ratios"] == {"litert": pytest.approx(litert["seconds"][0] / ours["seconds"][0], rel=5)}
    assert litert["problem"] == ""


@pytest.mark.once
@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["convnext_tinny"], "Unknown architecture 'convnext_tinny'. Did you mean 'convnext_tiny'"),
        (["growht"], "Unknown architecture 'growht'. Did you mean 'growth'?"),
        (["--against", "timm,tim"], "Unknown peer 'tim'. Did you mean 'timm'?"),
        (["--mode", "train"], "Unknown mode 'train'. Did you mean 'training'? Known: inference, training"),
        (["--dtype", "bf16"], "Unknown dtype 'bf16'."),
        (["--backends", "pytorch"], "Unknown backend 'pytorch'. Did you mean 'torch'?"),
        (["--batch", "8,0"], "Expected --batch to be whole numbers from 1 up, received '0'."),
        (["--image-size", "large"], "Expected --image-size to be whole numbers from 1 up, received 'large'."),
        (["--seconds", "nan"], "Expected --seconds to be a positive number, received nan."),
        (
            ["all", "stages"],
            "Expected one of all, depthwise, pointwise, growth, stages, startup; received all stages.",
        ),
        (
            ["all", "--dtype", "int8"],
            "Expected nothing but the word all, whose cases are fixed; received --dtype",
        ),
    ],
)
def test_wrong_words_are_refused_with_what_was_expected(refused, words, message):
    assert message in refused(*words)


@pytest.mark.once
def test_a_folder_that_cannot_be_written_is_refused_before_anything_is_measured(
    refused, monkeypatch, tmp_path
):
    monkeypatch.setattr(cases, "measure_entries", None)
    (tmp_path / "file").touch()
    assert "file" in refused("test_convnext", "--backends", "torch", "--output", tmp_path / "file")
    monkeypatch.setattr(
        report.tempfile, "TemporaryFile", lambda dir: os.open(f"{dir}/no/folder", os.O_RDONLY)
    )
    message = refused("test_convnext", "--backends", "torch", "--output", tmp_path)
    assert f"Expected a folder that can be written, received {tmp_path}: No such file" in message


@pytest.mark.once
def test_peers_of_a_run():
    assert cases.entrants(["jax", "torch"], ["timm", "keras.applications", "openvino"]) == [
        "jax", "torch", "timm", "keras.applications:jax", "keras.applications:torch", "openvino-timm",
    ]  # fmt: skip


@pytest.mark.once
def test_a_busy_machine_is_said():
    facts = {"load": "1.2", "cores": "2"}
    assert output.busy_warning(facts).startswith("the machine is busy: load 1.2 on 2 cores")
    assert output.busy_warning(facts | {"load": "1.0"}) == ""


@pytest.mark.once
def test_the_standard_run_prints_its_cases_and_bars_and_writes_them(run, monkeypatch, tmp_path):
    """With times that are made up: its real run takes half an hour."""

    def fake(entries, rounds, seconds, threads, on_progress):
        return [
            measurement(name, [0.1 if implementations.is_ours(name) else 0.2] * rounds, case)
            for name, case in entries
        ]

    time_of, rates = full_run.stages.StageTime, None
    staged = full_run.stages.Stages(
        SMALL, rates, (time_of("torch", "stage 1", 1.0, None, 0.6, 0.5, 0.1, 1, 1),), {}
    )
    monkeypatch.setattr(cases, "measure_entries", fake)
    monkeypatch.setattr(full_run.machine_rates, "measure_rates", lambda *a, **b: rates)
    monkeypatch.setattr(full_run.stages, "table", lambda *a, **b: staged)
    monkeypatch.setattr(full_run.stages, "as_table", lambda found: report.Table("Stages", ("part",), "<", []))
    words = ["--backends", "torch", "--rounds", 2, "--output", tmp_path / "speed"]
    code, out, _ = run("all", *words)
    assert code == 0
    for case in (
        "convnext_tiny, inference, batch 1, 224 pixels, float32",
        "convnextv2_tiny, inference, batch 8, 224 pixels, float32",
        "convnext_tiny, training, batch 8, 224 pixels, float32",
        "convnextv2_atto, training, batch 32, 96 pixels, float32",
        "convnext_tiny, inference, batch 8, 224 pixels, bfloat16",
    ):
        assert out.count(f"\n{case}\n") + out.startswith(case) == 1
    verdicts = {
        line.split("  ")[1]: line.split()[-3:]
        for line in out.splitlines()
        if line.startswith("  ") and "=" in line and ": " in line
    }
    assert verdicts["convnext_tiny, training, batch 8, 224 pixels, float32: ours, PyTorch, x timm"] == [
        "1", "2.00", "met",
    ]  # fmt: skip
    assert verdicts["part of the floor, batch 8, stage 1: ours, PyTorch"] == ["0.7", "0.60", "MISSED"]
    assert (tmp_path / "speed" / "bench.png").exists()
    assert "What is claimed, and what was seen" in (tmp_path / "speed" / "table.md").read_text()
    code, out, _ = run("all", *words[:4], "--json")
    facts = json.loads(out)
    assert len(facts["cases"]) == 10
    assert facts["stages"][0]["fraction"] == 0.6


@pytest.mark.once
def test_the_processes_of_peers_start_without_keras_from_any_folder(monkeypatch, tmp_path):
    """All that the code of each kind of worker imports, but nothing of what it does then."""
    monkeypatch.delenv("PYTHONPATH", raising=False)
    environment = os.environ | implementations.environment("torch", None)
    codes = (worker.COMMAND, candidates.COMMAND, machine_rates._COMMAND)
    imports = [code.rpartition("; ")[0] for code in codes]
    for first, found in ((imports, "False\n"), (["import keras_convnext", *imports], "True\n")):
        program = "; ".join([*first, "import sys; print('keras' in sys.modules)"])
        command = [sys.executable, "-c", program]
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
        assert (done.returncode, done.stdout) == (0, found), done.stderr


@pytest.mark.once
def test_the_program_runs_in_a_folder_of_its_own_as_a_module(tmp_path):
    words = ["test_convnext", "--backends", "torch", "--against", "", "--image-size", "32", "--batch", "1"]
    command = [
        sys.executable,
        "-m",
        "benchmarks.speed",
        *words,
        "--rounds",
        "1",
        "--seconds",
        "0.01",
        "--json",
    ]
    environment = os.environ | {"PYTHONPATH": str(implementations.ROOT)}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    ((ours,),) = json.loads(done.stdout)["cases"]
    assert (ours["implementation"], ours["problem"]) == ("torch", "")


@pytest.mark.once
def test_help_lists_every_word(capsys):
    with pytest.raises(SystemExit) as ended:
        program.main(["--help"])
    assert ended.value.code == 0
    out = capsys.readouterr().out
    assert all(word in out for word in (*cases.WORDS, *implementations.AGAINST, *implementations.DTYPES))
