"""Training by two PyTorch processes ends where one ends, and survives the loss of one."""

import contextlib
import json
import os
import pathlib
import re
import signal
import socket
import subprocess
import sys
import time

import keras
import numpy as np
import pytest
from test_distribution import CHANGES, STEPS, STOP, difference, halfway, noted, train

from keras_convnext.cli import main
from keras_convnext.distribution import choose
from keras_convnext.layers import residual
from keras_convnext.training.optimizer import AdamW, inner_optimizer

ROOT = pathlib.Path(__file__).parents[2]

pytestmark = pytest.mark.skipif(keras.backend.backend() != "torch", reason="an engine of PyTorch")

IMAGES, CLASSES, BATCH = 48, 4, 12


# In the child processes.


def fit(dtype="float32", outlier=0.0, is_prepared=True, optimizer=None):
    """Trains a small model by Keras's own `fit`, each process with its rows of each batch.

    Args:
        outlier: in place of the last pixel of the last image, which is in the last process's rows.
    """
    values = np.random.default_rng(0)
    images = values.normal(0, 1, (IMAGES, 4, 4, 8)).astype("float32")
    images[-1, -1, -1, -1] += outlier
    labels = np.eye(CLASSES, dtype="float32")[values.integers(0, CLASSES, IMAGES)]
    keras.utils.set_random_seed(0)
    keras.config.set_dtype_policy(dtype)
    engine = choose.choose()
    with engine.scope():
        inputs = x = keras.Input((4, 4, 8))
        for number in range(3):
            branch = keras.layers.Dense(8, activation="gelu", name=f"branch_{number}")(x)
            x = x + residual.StochasticDepth(0.5, seed=number)(branch)
        x = keras.layers.GlobalAveragePooling2D(data_format="channels_last")(x)
        model = keras.Model(inputs, keras.layers.Dense(CLASSES, dtype="float32")(x))
        model.get_layer("branch_0").trainable = False
        model.compile(
            optimizer
            or AdamW(
                0.01, global_clipnorm=0.1, gradient_accumulation_steps=2, use_ema=True, ema_momentum=0.5
            ),
            keras.losses.CategoricalCrossentropy(from_logits=True),
            metrics=["accuracy"],
        )
        model.optimizer.build(model.trainable_variables)
        if is_prepared:
            engine.prepare(model)
        count = len(engine.group)
        rows = np.arange(IMAGES).reshape(-1, count, BATCH // count)[:, engine.group.rank].ravel()
        history = model.fit(images[rows], labels[rows], BATCH // count, 2, shuffle=False, verbose=0).history
    keras.config.set_dtype_policy("float32")
    engine.group.close()
    return {
        "engine": engine.name,
        "described": engine.describe(BATCH),
        "history": history,
        "weights": [keras.ops.convert_to_numpy(variable).ravel().tolist() for variable in model.weights],
        "made": int(inner_optimizer(model.optimizer)._iterations),
    }


FITS = {
    "plain": {},
    "overflow": {"dtype": "mixed_float16", "outlier": 6e4},
    "unprepared": {"is_prepared": False},
}


def report_fits(path):
    import torch

    threads = torch.get_num_threads()
    with pytest.raises(ValueError) as caught:
        choose.choose("none")
    report = {name: fit(**arguments) for name, arguments in FITS.items()}
    report["sgd"] = fit(optimizer="sgd")
    report["refusal"] = str(caught.value)
    report["threads"] = [threads, torch.get_num_threads()]
    pathlib.Path(path).write_text(json.dumps(report))


def train_by_two(folder):
    """Runs of both processes; the folders of process 1 stay without files, but for what the tests note."""
    folder, process = pathlib.Path(folder), int(os.environ["RANK"])
    own = folder if process == 0 else folder / "other"
    train(own / "two")
    train(folder / "one_then_two" if process == 0 else own / "one_then_two")
    # Negative control: each process draws its drop path for itself.
    residual.divided_batch = lambda part: contextlib.nullcontext()
    train(own / "undivided")


def command_with_signal(folder, at, name):
    """The command, of which process 1 gets a signal after so many micro-batches."""
    from keras_convnext.training import trainer

    end_batch = trainer.Run.end_batch

    def ending_batch(run, *arguments):
        if run.counts.done == at and os.environ["RANK"] == "1":
            os.kill(os.getpid(), getattr(signal, name))
        end_batch(run, *arguments)

    trainer.Run.end_batch = ending_batch
    sys.exit(main.main(words(folder)))


def words(folder, **changes):
    settings = [f"--set={key}={value}" for key, value in (CHANGES | changes).items()]
    return ["train", "recipes/smoke.toml", "--out", str(folder), "--distribute", "ddp", *settings]


# Of the parent.


def environment(**others):
    path = os.pathsep.join(
        [str(ROOT), str(ROOT / "tests" / "distribution"), os.environ.get("PYTHONPATH", "")]
    )
    kept = {name: value for name, value in os.environ.items() if name != "KERAS_CONVNEXT_QUIET"}
    return kept | {"PYTHONPATH": path} | {name: str(value) for name, value in others.items()}


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def by_two(*commands, **others):
    """Runs a command in two processes, or one in each; returns (code, stderr, time of the end) of each."""
    place = {"WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port(), **others}
    children = [
        subprocess.Popen(
            [sys.executable, *command],
            cwd=ROOT,
            env=environment(RANK=number, LOCAL_RANK=number, **place),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        for number, command in enumerate(commands if len(commands) == 2 else 2 * commands)
    ]
    ends = []
    try:
        deadline = time.monotonic() + 500
        while None in (codes := [child.poll() for child in children]) and time.monotonic() < deadline:
            ends += [time.monotonic()] * (2 - codes.count(None) - len(ends))
            time.sleep(0.1)
        ends += [time.monotonic()] * (2 - len(ends))
        assert None not in codes
    finally:
        for child in children:
            child.kill()
    texts = [child.communicate()[1] for child in children]
    return codes, texts, ends[1] - ends[0]


def call(function, *arguments):
    values = ", ".join(map(repr, arguments))
    return ["-c", f"from test_torch_engines import {function} as f; f({values})"]


@pytest.fixture(scope="module")
def fits(tmp_path_factory):
    folder = tmp_path_factory.mktemp("fits")
    paths = [folder / f"{number}.json" for number in (0, 1)]
    codes, texts, _ = by_two(*(call("report_fits", str(path)) for path in paths))
    assert codes == [0, 0], texts
    return [json.loads(path.read_text()) for path in paths]


def largest_difference(weights, others):
    return max(np.abs(np.subtract(a, b)).max() for a, b in zip(weights, others, strict=True))


@pytest.mark.slow
@pytest.mark.parametrize(("name", "optimizer"), [("plain", None), ("sgd", "sgd")])
def test_fit_of_two_processes_is_that_of_one(fits, name, optimizer):
    """Drop path, accumulation, clipping and EMA are on, one layer is frozen; then Keras's own optimizer."""
    expected = fit(optimizer=optimizer)
    assert (expected["engine"], fits[0][name]["engine"]) == ("none", "ddp")
    for report in fits:
        np.testing.assert_allclose(report[name]["history"]["loss"], expected["history"]["loss"], rtol=1e-6)
        assert report[name]["history"]["accuracy"] == pytest.approx(expected["history"]["accuracy"])
        assert largest_difference(report[name]["weights"], expected["weights"]) < 1e-6
    assert fits[0][name]["weights"] == fits[1][name]["weights"]
    assert (
        fits[0][name]["described"]
        == "2 devices (cpu) of 2 processes: engine ddp, 6 of 12 images to each device"
    )


@pytest.mark.slow
def test_processes_that_average_nothing_part(fits):
    weights = [report["unprepared"]["weights"] for report in fits]
    assert largest_difference(*weights) > 1e-3
    assert fits[0]["unprepared"]["history"] != fits[1]["unprepared"]["history"]


@pytest.mark.slow
def test_an_overflow_in_one_process_skips_the_step_in_both(fits):
    expected = fit(**FITS["overflow"])["made"]
    assert expected < fit("mixed_float16")["made"]  # some are skipped
    assert [report["overflow"]["made"] for report in fits] == [expected, expected]
    assert fits[0]["overflow"]["weights"] == fits[1]["overflow"]["weights"]


@pytest.mark.slow
def test_several_processes_need_an_engine(fits):
    for report in fits:
        assert report["refusal"].startswith("Expected an engine for 2 processes, ddp, received 'none'")


@pytest.mark.slow
def test_processes_of_a_machine_share_its_cores(fits):
    for before, after in (report["threads"] for report in fits):
        assert after == max(1, before // 2)


@pytest.mark.slow
def test_another_recipe_in_one_process_is_told_to_both(tmp_path):
    commands = [
        ["-m", "keras_convnext", *words(tmp_path / "run")],
        ["-m", "keras_convnext", *words(tmp_path / "other", learning_rate=0.5, clip_norm=0.25)],
    ]
    codes, texts, _ = by_two(*commands)
    assert codes == [2, 2], texts
    for text in texts:
        assert re.search(
            r"error: Expected the same run in all 2 processes, but process 1 \(.*\) has "
            r"recipe\.learning_rate 0\.5, not 0\.002; recipe\.clip_norm 0\.25, not 1\.0\. Give all the same "
            r"command, code and data\.",
            text,
        )
        assert "Traceback" not in text
    assert not any((tmp_path / name).exists() for name in ("run", "other"))


# Whole runs.


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Runs of one process and of two; and a run of two with a signal, a loss and a restart by torchrun."""
    folder = tmp_path_factory.mktemp("runs")
    (folder / "other").mkdir()
    train(folder / "one")
    halfway(folder / "one", "one_then_two")
    codes, texts, _ = by_two(call("train_by_two", str(folder)))
    assert codes == [0, 0], texts
    train(halfway(folder / "two", "two_then_one"))
    return folder


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "expected"), [("two", "one"), ("one_then_two", "one"), ("two_then_one", "two")]
)
def test_two_processes_make_the_losses_and_weights_of_one(runs, name, expected):
    """Drop path, mixing, erasing, accumulation, clipping, layer decay and EMA are on."""
    assert difference(runs / name, runs / expected) < 1e-5
    losses = noted(runs, name)["losses"]
    assert len(losses) == 2 * STEPS - (STOP if "then" in name else 0)
    if name == "two":
        np.testing.assert_allclose(losses, noted(runs, "one")["losses"], rtol=1e-6)
        assert losses == noted(runs / "other", "two")["losses"]


@pytest.mark.slow
def test_processes_that_drop_paths_for_themselves_would_be_noticed(runs):
    assert difference(runs / "undivided", runs / "one") > 1e-3


@pytest.mark.slow
def test_every_image_is_evaluated_once_and_one_process_writes(runs):
    assert noted(runs, "two")["counts"] == noted(runs / "other", "two")["counts"] == [450, 450]
    scores, expected = (json.loads((runs / name / "result.json").read_text()) for name in ("two", "one"))
    for name in ("val_top1", "val_top5", "ema_val_top1"):
        assert scores[name] == expected[name]
    assert scores["val_loss"] == pytest.approx(expected["val_loss"], rel=1e-5)
    left = [sorted(path.name for path in (runs / name).rglob("*.*")) for name in ("two", "one")]
    assert [re.sub(r"tfevents.*", "", str(names)) for names in left] == 2 * [
        re.sub(r"tfevents.*", "", str(left[1]))
    ]
    assert not [path for path in (runs / "other").iterdir() if path.is_dir()]


@pytest.mark.slow
def test_a_run_survives_a_signal_and_a_loss_and_ends_as_one_without(runs):
    folder = runs / "interrupted"
    codes, texts, _ = by_two(call("command_with_signal", str(folder), 9, "SIGTERM"))
    assert codes == [128 + signal.SIGTERM] * 2, texts
    (step,) = {re.search(r"SIGTERM received: stopped after step (\d+) of 21", text)[1] for text in texts}
    assert [path.name for path in (folder / "checkpoints").glob("*.safetensors")] == [
        f"step-{int(step):08d}.safetensors"
    ]

    codes, texts, seconds = by_two(call("command_with_signal", str(folder), 30, "SIGKILL"))
    assert codes == [75, -signal.SIGKILL], texts
    assert seconds < 60
    assert re.search(
        r"process 1 \(.*\) of 2 has ended\. This process ends too\. The same command on all machines resumes "
        rf"from the checkpoint of step {step} in ",
        texts[0],
    )

    launcher = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--nproc-per-node=2",
        f"--master-port={free_port()}",
    ]
    command = [*launcher, "-m", "keras_convnext", *words(folder)]
    child = subprocess.run(command, cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=500)
    assert child.returncode == 0, child.stderr[-3000:]
    assert "2 devices (cpu) of 2 processes: engine ddp, 16 of 32 images to each device" in child.stderr
    assert f"resumes after step {step} of 21" in child.stderr
    assert difference(folder, runs / "two") < 1e-6


# Mistakes.


def place(monkeypatch, **names):
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    for name, value in names.items():
        monkeypatch.setenv(name, value)


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (
            {"WORLD_SIZE": "2", "RANK": "1"},
            "Expected RANK, MASTER_ADDR, MASTER_PORT beside WORLD_SIZE=2, received no MASTER_ADDR and no "
            "MASTER_PORT. Start the processes with torchrun, which sets them.",
        ),
        (
            {"WORLD_SIZE": "2", "RANK": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"},
            "Expected RANK, the number of this process, from 0 to 1 as WORLD_SIZE=2, received 2.",
        ),
        ({"WORLD_SIZE": "two"}, "Expected an integer in WORLD_SIZE, received 'two'."),
    ],
)
def test_an_incomplete_environment_is_refused(names, message, monkeypatch):
    place(monkeypatch, **names)
    with pytest.raises(ValueError, match=re.escape(message)):
        choose.choose()


def test_a_process_without_a_gpu_of_its_own_is_refused(monkeypatch):
    import torch

    place(monkeypatch, WORLD_SIZE="4", RANK="3", LOCAL_RANK="3", MASTER_ADDR="127.0.0.1", MASTER_PORT="1")
    monkeypatch.delenv("KERAS_TORCH_DEVICE", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(
        ValueError,
        match=r"received LOCAL_RANK=3 on one that has 2\. Start 2 there: torchrun --nproc-per-node 2\.",
    ):
        choose.choose()


@pytest.mark.parametrize("number", ["0", "1"])
def test_processes_that_do_not_meet_end(number, monkeypatch):
    from keras_convnext.distribution import watchdog

    port = free_port()
    place(monkeypatch, WORLD_SIZE="2", RANK=number, MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    monkeypatch.setattr(watchdog, "JOIN_SECONDS", 2.0)
    with pytest.raises(
        ConnectionError,
        match=rf"Expected 2 processes to meet at 127\.0\.0\.1:{port} \(MASTER_ADDR:MASTER_PORT\)",
    ) as caught:
        choose.choose()
    assert "See what the others print" in str(caught.value)


def test_one_process_may_ask_for_ddp(monkeypatch):
    place(monkeypatch)
    engine = choose.choose("ddp")
    assert (engine.name, engine.num_parts, len(engine.group)) == ("ddp", 1, 1)
    model = keras.Sequential([keras.Input((2,)), keras.layers.Dense(1)])
    model.compile("sgd", "mse")
    with engine.scope():
        engine.prepare(model)
        model.fit(np.ones((4, 2)), np.ones((4, 1)), verbose=0)
