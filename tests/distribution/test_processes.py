"""Several processes of one run: what they share, how they end, and that JAX trains on them as on one.

In the first tier are the group alone and what needs no other process; the runs of several processes are slow.
"""

import json
import multiprocessing
import os
import pathlib
import re
import shutil
import signal
import socket
import subprocess
import sys
import time

import keras
import numpy as np
import pytest
from test_distribution import CHANGES, difference, exchange_halves, noted

import keras_convnext
from keras_convnext.distribution import choose, watchdog

ROOT = pathlib.Path(__file__).parents[2]
BACKEND = keras.backend.backend()
FORK = multiprocessing.get_context("fork")

# A short run that still is random everywhere: 10 steps of two micro-batches, and a validation.
SHORT = CHANGES | {"batch_size": 128}
STEPS = 10


# The group alone, without a backend.


def in_group(size, function, *arguments):
    """Runs a function in so many processes, with their group; returns what they gave and their exit codes."""
    told = [FORK.Queue() for _ in range(size)]
    results = FORK.Queue()

    def child(number):
        def tell(text):
            if number == 0:
                for other in told[1:]:
                    other.put(text)
                return text
            return told[number].get(timeout=30)

        group = watchdog.join(number, size, tell)
        results.put((number, function(group, *arguments)))
        results.close()
        results.join_thread()
        group.close()

    children = [FORK.Process(target=child, args=(number,)) for number in range(size)]
    for process in children:
        process.start()
    for process in children:
        process.join(60)
    codes = [process.exitcode for process in children]
    gathered = []
    while not results.empty():
        gathered.append(results.get())
    return [value for _, value in sorted(gathered)], codes


def words_and_arrays(group):
    arrays = group.gathered_arrays(np.full((group.rank, 2), group.rank, "float32"))
    given = {"a": np.arange(6, dtype="int64").reshape(2, 3), "b": np.float32(2.5)} if group.is_writer else {}
    shared = group.shared_arrays({name: np.asarray(value) for name, value in given.items()})
    return (
        group.gathered({"process": group.rank}),
        [array.tolist() for array in arrays],
        {name: (array.tolist(), array.dtype.name) for name, array in shared.items()},
    )


@pytest.mark.once
def test_processes_share_words_and_arrays():
    results, codes = in_group(3, words_and_arrays)
    assert codes == [0, 0, 0] and len(results) == 3
    for words, arrays, shared in results:
        assert words == [{"process": number} for number in range(3)]
        assert arrays == [[], [[1, 1]], [[2, 2], [2, 2]]]
        assert shared == {"a": ([[0, 1, 2], [3, 4, 5]], "int64"), "b": (2.5, "float32")}


@pytest.mark.once
def test_one_process_is_a_group_of_its_own():
    group = watchdog.alone()
    assert (len(group), group.rank, group.is_writer) == (1, 0, True)
    assert group.gathered([1]) == [[1]]
    array = np.ones(2)
    assert group.gathered_arrays(array)[0] is not array and group.shared_arrays({"a": array})["a"] is array


def end_one(group, which, how):
    group.set_advice(lambda: "Start again.")
    group.gathered(None)
    if group.rank == which:
        if how == "raise":
            group.close("ValueError: no such image")
            os._exit(1)
        os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(50)  # as in a sum over devices that never ends


@pytest.mark.once
@pytest.mark.parametrize(
    ("which", "how", "message"),
    [
        (1, "kill", r"process 1 \(.*\) of 3 has ended\. Start again\."),
        pytest.param(0, "kill", r"process 0 \(.*\) of 3 has ended\. Start again\.", marks=pytest.mark.slow),
        pytest.param(
            2,
            "raise",
            r"process 2 \(.*\) of 3 stopped: ValueError: no such image\. Start again\.",
            marks=pytest.mark.slow,
        ),
    ],
)
def test_the_others_end_when_one_is_lost(which, how, message, capfd):
    begin = time.monotonic()
    results, codes = in_group(3, end_one, which, how)
    assert time.monotonic() - begin < 20  # seconds, not the minutes of a backend; 0.5 where this was written
    assert results == []
    assert codes[which] == (1 if how == "raise" else -signal.SIGKILL)
    assert [code for number, code in enumerate(codes) if number != which] == [watchdog.EXIT_CODE] * 2
    assert len(re.findall(message, capfd.readouterr().err)) == 2


def stop_one(group):
    group.gathered(None)
    if group.rank == 1:
        os.kill(os.getpid(), signal.SIGSTOP)
    time.sleep(50)


@pytest.mark.slow
@pytest.mark.once
def test_a_silent_process_is_lost(monkeypatch, capfd):
    """Its machine has no power, or the network is cut: no connection closes."""
    monkeypatch.setattr(watchdog, "PULSE_SECONDS", 0.5)
    monkeypatch.setattr(watchdog, "SILENCE_SECONDS", 3.0)
    told, results = FORK.Queue(), FORK.Queue()

    def child(number):
        group = watchdog.join(number, 2, lambda text: told.put(text) or text if number == 0 else told.get())
        results.put(os.getpid() if number else 0)
        stop_one(group)

    children = [FORK.Process(target=child, args=(number,)) for number in range(2)]
    for process in children:
        process.start()
    children[0].join(30)
    children[1].kill()
    assert children[0].exitcode == watchdog.EXIT_CODE
    assert "has been silent for 3 s" in capfd.readouterr().err


@pytest.mark.once
def test_silent_strangers_hold_up_nobody(monkeypatch):
    """A port scanner, or a health check that keeps its line open."""
    strangers, called = [], watchdog._accepted

    def with_strangers(listener, *arguments):
        for words in (b"", b"", b"GET / HTTP/1.0\r\n\r\n", b"\xff" * 8):
            strangers.append(socket.create_connection(("127.0.0.1", listener.address[1])))
            strangers[-1].sendall(words)
        return called(listener, *arguments)

    monkeypatch.setattr(watchdog, "_accepted", with_strangers)
    begin = time.monotonic()
    assert in_group(2, lambda group: group.gathered(group.rank)) == ([[0, 1], [0, 1]], [0, 0])
    assert time.monotonic() - begin < 10


@pytest.mark.once
def test_a_process_that_does_not_come_is_named(monkeypatch):
    monkeypatch.setattr(watchdog, "JOIN_SECONDS", 1.0)
    with pytest.raises(ConnectionError, match=r"Expected 2 other processes .* within 1 s, but 1, 2 did not"):
        watchdog.join(0, 3, lambda text: text)
    free = json.dumps({"hosts": ["127.0.0.1"], "port": free_port(), "key": "00" * 16})
    with pytest.raises(ConnectionError, match=r"Expected process 0 at port \d+ of 127\.0\.0\.1, but it"):
        watchdog.join(1, 3, lambda text: free)


# Runs of several processes.


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def environments(size):
    """Of the processes of a JAX run on the loopback."""
    address = f"127.0.0.1:{free_port()}"
    inherited = {name: value for name, value in os.environ.items() if name != "KERAS_CONVNEXT_QUIET"}
    for number in range(size):
        yield inherited | {
            "KERAS_DISTRIBUTION_JOB_ADDRESSES": address,
            "KERAS_DISTRIBUTION_NUM_PROCESSES": str(size),
            "KERAS_DISTRIBUTION_PROCESS_ID": str(number),
        }


def begin_all(commands, size):
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "cwd": ROOT}
    return [
        subprocess.Popen([sys.executable, *command], env=environment, **pipes)
        for command, environment in zip(commands, environments(size), strict=True)
    ]


def end_all(children, codes):
    texts = []
    for child in children:
        try:
            texts.append(child.communicate(timeout=400)[1])
        finally:
            child.kill()
    assert [child.returncode for child in children] == codes, "\n".join(text[-2000:] for text in texts)
    return texts


def command_of(folder, **changes):
    settings = [f"--set={key}={value}" for key, value in (SHORT | changes).items()]
    return ["-m", "keras_convnext", "train", "recipes/smoke.toml", "--out", str(folder), *settings]


def noting_of(folder, engine):
    code = (
        "from tests.distribution.test_distribution import train\n"
        f"train({str(folder)!r}, distribution__engine={engine!r}, batch_size={SHORT['batch_size']})"
    )
    return ["-c", code]


jax_only = pytest.mark.skipif(BACKEND != "jax", reason="its processes are tested beside its engines")


@pytest.fixture(scope="module")
def one(tmp_path_factory):
    """A run of one process."""
    folder = tmp_path_factory.mktemp("runs")
    subprocess.run([sys.executable, *noting_of(folder / "one", "none")], cwd=ROOT, check=True, timeout=400)
    return folder


@pytest.mark.slow
@jax_only
@pytest.mark.parametrize("size", [2, 4])
def test_processes_train_as_one_does(one, size):
    """Drop path, mixing, erasing, accumulation, layer decay, clipping and EMA are on."""
    name = f"of_{size}"
    end_all(begin_all([noting_of(one / name, "data_parallel")] * size, size), [0] * size)
    losses, expected = (noted(one, run)["losses"] for run in (name, "one"))
    assert len(losses) == 2 * STEPS
    np.testing.assert_allclose(losses, expected, rtol=1e-5)
    assert difference(one / name, one / "one") < 1e-5
    assert noted(one, name)["counts"] == [450, 450]
    scores, wanted = (json.loads((one / run / "result.json").read_text()) for run in (name, "one"))
    assert scores["val_top1"] == wanted["val_top1"] and scores["ema_val_top5"] == wanted["ema_val_top5"]


@pytest.mark.slow
@jax_only
def test_halves_of_a_kernel_in_the_wrong_places_would_be_noticed(one):
    shutil.copytree(one / "one", one / "wrong")
    exchange_halves(one / "wrong")
    assert difference(one / "wrong", one / "one") > 1e-2


@pytest.mark.slow
@jax_only
def test_pairs_of_devices_in_two_processes_divide_kernels_and_write_whole_ones(one, monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", "--xla_force_host_platform_device_count=2")
    folder = one / "pairs"
    end_all(begin_all([command_of(folder, **{"distribution.engine": "model_parallel"})] * 2, 2), [0, 0])
    assert difference(folder, one / "one") < 1e-5
    model = keras_convnext.load("test_convnext2", folder / "final.safetensors")
    expected = keras_convnext.load("test_convnext2", one / "one" / "final.safetensors")
    for array, wanted in zip(model.get_weights(), expected.get_weights(), strict=True):
        np.testing.assert_allclose(array, wanted, atol=1e-5 * max(np.abs(wanted).max(), 1e-6))


@pytest.mark.slow
@jax_only
@pytest.mark.parametrize("which", [0, 1])
def test_a_killed_process_ends_the_other_and_the_same_command_goes_on(one, which):
    folder = one / f"killed_{which}"
    commands = [command_of(folder, checkpoint_minutes=0.01)] * 2
    children = begin_all(commands, 2)
    checkpoints = folder / "checkpoints"
    while not list(checkpoints.glob("step-*.safetensors")):
        assert all(child.poll() is None for child in children), end_all(children, [0, 0])
        time.sleep(0.05)
    begin = time.monotonic()
    children[which].kill()
    codes = [watchdog.EXIT_CODE] * 2
    codes[which] = -signal.SIGKILL
    texts = end_all(children, codes)
    assert time.monotonic() - begin < 60
    message = rf"process {which} \(.*, {children[which].pid}\) of 2 has ended\. This process ends too\."
    assert re.search(message, texts[1 - which]) and "Traceback" not in texts[1 - which]
    assert not (folder / "result.json").exists()
    texts = end_all(begin_all(commands, 2), [0, 0])
    assert "resumes after step" in texts[0]
    assert difference(folder, one / "one") < 1e-5


@pytest.mark.slow
@jax_only
def test_a_signal_to_one_process_stops_both_after_the_same_step(one):
    folder = one / "signalled"
    commands = [command_of(folder, checkpoint_minutes=0.01)] * 2
    children = begin_all(commands, 2)
    while not list((folder / "checkpoints").glob("step-*.safetensors")):
        assert all(child.poll() is None for child in children), end_all(children, [0, 0])
        time.sleep(0.05)
    children[1].terminate()
    texts = end_all(children, [128 + signal.SIGTERM] * 2)
    (step,) = {re.search(r"SIGTERM received: stopped after step (\d+) of", text)[1] for text in texts}
    assert max(int(path.name[5:13]) for path in (folder / "checkpoints").glob("step-*")) == int(step)


@pytest.mark.slow
@jax_only
def test_processes_with_other_recipes_are_refused_at_the_start(tmp_path):
    commands = [command_of(tmp_path / "run"), command_of(tmp_path / "run", learning_rate=0.1)]
    for text in end_all(begin_all(commands, 2), [2, 2]):
        assert re.search(
            r"Expected the same run in all 2 processes, but process 1 \(.*\) has recipe\.learning_rate 0\.1, "
            r"not 0\.002\. Give all the same command, code and data\.",
            text,
        )
    assert not (tmp_path / "run").exists()


@jax_only
def test_what_a_process_lacks_is_named(monkeypatch):
    monkeypatch.setenv("KERAS_DISTRIBUTION_NUM_PROCESSES", "2")
    with pytest.raises(ValueError, match=r"KERAS_DISTRIBUTION_JOB_ADDRESSES \(host:port of process 0\) and"):
        choose.choose("data_parallel")


@jax_only
@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({}, None),
        ({"SLURM_STEP_NUM_TASKS": "1"}, None),
        ({"SLURM_STEP_NUM_TASKS": "8", "SLURM_STEP_TASKS_PER_NODE": "4(x2)", "SLURM_GPUS_ON_NODE": "4"}, {}),
        (
            {"SLURM_STEP_NUM_TASKS": "2", "SLURM_STEP_TASKS_PER_NODE": "1(x2)", "SLURM_GPUS_ON_NODE": "4"},
            {"local_device_ids": [0, 1, 2, 3]},
        ),
        ({"KERAS_CONVNEXT_PROCESSES": "auto"}, {}),
        (
            {
                "KERAS_DISTRIBUTION_JOB_ADDRESSES": "a:1,b:2",
                "KERAS_DISTRIBUTION_NUM_PROCESSES": "2",
                "KERAS_DISTRIBUTION_PROCESS_ID": "1",
            },
            {"coordinator_address": "a:1", "num_processes": 2, "process_id": 1},
        ),
    ],
)
def test_processes_are_found_in_the_environment(environment, expected, monkeypatch):
    from keras_convnext.distribution import jax_engine

    for name in [name for name in os.environ if name.startswith(("SLURM_", "KERAS_DISTRIBUTION_", "OMPI_"))]:
        monkeypatch.delenv(name)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert jax_engine._settings() == expected


class Told(watchdog.Group):
    """A group whose other processes have said their values already."""

    def __init__(self, *others):
        super().__init__(0, [f"process {number}" for number in range(len(others) + 1)], {}, None)
        self.others = others

    def gathered(self, value):
        return [value, *self.others]


@pytest.mark.once
def test_processes_that_differ_are_told_from_each_other():
    facts = {"code": "a", "recipe": {"epochs": 3, "seed": 0}}
    choose.check_agreement(Told({"code": "a", "recipe.epochs": 3, "recipe.seed": 0}), facts)
    others = {"code": "b", "recipe.epochs": 3, "recipe.seed": 0}, {"code": "a", "recipe.epochs": 4}
    with pytest.raises(
        ValueError,
        match=r"process 1 has code 'b', not 'a'\. process 2 has recipe\.epochs 4, not 3; recipe\.seed None",
    ):
        choose.check_agreement(Told(*others), facts)
