"""Engines of TensorFlow: replicas and processes end where one device ends; what does not fit is refused."""

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
from test_distribution import (
    BACKEND,
    CHANGES,
    ROOT,
    STEPS,
    STOP,
    difference,
    halfway,
    noted,
    run_child,
    train,
)

from keras_convnext.distribution import choose, tensorflow_engine, watchdog
from keras_convnext.layers import residual
from keras_convnext.training import optimizer, trainer
from keras_convnext.training.schedule import WarmupCosine
from keras_convnext.weights.torch_files import read_state_dict

if BACKEND == "tensorflow":
    import tensorflow as tf
    from tensorflow.core.framework import types_pb2


pytestmark = pytest.mark.skipif(BACKEND != "tensorflow", reason="engines of TensorFlow")
TOLERANCE = 1e-5  # of the largest of each array; 1.4e-6 where this was written


# In the child processes.


def on_one_device(folder):
    folder = pathlib.Path(folder)
    train(folder / "none", distribution__engine="none")


def on_four_devices(folder):
    folder = pathlib.Path(folder)
    train(folder / "mirrored")  # "auto"
    train(halfway(folder / "none", "one_then_four"), distribution__engine="mirrored")
    tensorflow_engine._part = residual._whole_batch  # negative control: each replica draws for itself
    train(folder / "own_draws", distribution__engine="mirrored")


def on_two_devices(folder):
    folder = pathlib.Path(folder)
    train(halfway(folder / "mirrored", "four_then_two"), distribution__engine="mirrored")


def on_one_device_again(folder):
    folder = pathlib.Path(folder)
    train(halfway(folder / "mirrored", "four_then_one"), distribution__engine="none")


def in_a_process(folder):
    train(pathlib.Path(folder) / "workers")  # "auto"


def in_a_process_that_dies(folder):
    """Process 1 is killed behind the checkpoint of `train`."""
    end_batch = trainer.Run.end_batch

    def end(run, in_fit, means):
        end_batch(run, in_fit, means)
        if run.counts.done == STOP + 6 and run.engine.group.rank == 1:
            os.kill(os.getpid(), signal.SIGKILL)

    trainer.Run.end_batch = end
    train(pathlib.Path(folder) / "killed")


def in_a_process_again(folder):
    train(pathlib.Path(folder) / "killed")
    group = choose.choose("auto").group  # a second training of the same processes
    assert group.gathered(group.rank) == [0, 1]
    group.close()


def overflow(folder):
    """What is left of float16 when rows of the third of four devices overflow in the third batch."""
    report = {}
    for name, check in (("ours", tensorflow_engine._everywhere), ("keras", lambda check: check)):
        tensorflow_engine._everywhere = check
        images = np.random.default_rng(0).uniform(0, 1, (4, 8, 32, 32, 3)).astype("float32")
        images[2, 5] = np.inf
        keras.config.set_dtype_policy("mixed_float16")
        with (engine := choose.choose("mirrored")).scope():
            model = small_model()
            engine.prepare(model)
            batches = tf.data.Dataset.from_tensor_slices((images, np.tile(TARGETS, (4, 1, 1))))
            model.fit(engine.for_fit(batches.repeat()), steps_per_epoch=4, shuffle=False, verbose=0)
            report[name] = {
                "steps": int(engine.read(optimizer.inner_optimizer(model.optimizer).iterations)),
                "finite": all(np.isfinite(engine.read(v)).all() for v in model.trainable_variables),
            }
    (pathlib.Path(folder) / "overflow.json").write_text(json.dumps(report))


TARGETS = np.eye(10, dtype="float32")[np.arange(8)]


def small_model(**changes):
    from keras_convnext.convnext import ConvNeXtBlock, ConvNeXtV2Block

    x = inputs = keras.Input((32, 32, 3))
    x = keras.layers.Conv2D(16, 4, strides=4)(x)
    x = ConvNeXtBlock(16, drop_path_rate=0.2, seed=1, name="stages_0_0")(x)
    x = ConvNeXtV2Block(16, drop_path_rate=0.2, seed=2, name="stages_1_0")(x)
    x = keras.layers.GlobalAveragePooling2D(data_format="channels_last")(x)
    model = keras.Model(inputs, keras.layers.Dense(10, dtype="float32")(x))
    schedule = WarmupCosine(1e-3, 100, 2)
    model.compile(
        optimizer.AdamW(
            schedule, layer_decay=0.9, global_clipnorm=1.0, use_ema=True, overwrite_after_fit=False, **changes
        ),
        keras.losses.CategoricalCrossentropy(from_logits=True),
        metrics=[keras.metrics.CategoricalAccuracy(name="accuracy")],
    )
    model.optimizer.build(model.trainable_variables)
    return model


def environment_of(count=0, cluster=(), process=0):
    environment = os.environ | {"TF_CPP_MIN_LOG_LEVEL": "2", "TF_NUM_INTEROP_THREADS": "4"}
    if count:
        environment["KERAS_CONVNEXT_LOGICAL_DEVICES"] = str(count)
    if cluster:
        task = {"type": "worker", "index": process}
        environment["TF_CONFIG"] = json.dumps({"cluster": {"worker": list(cluster)}, "task": task})
    return environment


def words_of(function, folder):
    path = "import sys; sys.path.insert(0, 'tests/distribution')"
    return ["-c", f"{path}; from test_tensorflow_engines import {function} as f; f({str(folder)!r})"]


def run_here(function, folder, count=0):
    run_child(words_of(function, folder), environment_of(count))


def run_two(*words_of_each):
    """Runs two processes that find each other; returns (exit code, stderr, when it ended) of each."""
    with socket.create_server(("127.0.0.1", 0)) as first, socket.create_server(("127.0.0.1", 0)) as second:
        cluster = [f"127.0.0.1:{place.getsockname()[1]}" for place in (first, second)]
    children = [
        subprocess.Popen(
            [sys.executable, *words],
            cwd=ROOT,
            env=environment_of(cluster=cluster, process=number),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        for number, words in enumerate(words_of_each)
    ]
    ended, deadline = {}, time.monotonic() + 500
    try:
        while len(ended) < 2 and time.monotonic() < deadline:
            ended |= {
                number: time.monotonic()
                for number, child in enumerate(children)
                if number not in ended and child.poll() is not None
            }
            time.sleep(0.1)
        assert len(ended) == 2, "the processes did not end"
    finally:
        for child in children:
            child.kill()
    return [(child.returncode, child.stderr.read(), ended[number]) for number, child in enumerate(children)]


def run_two_here(function, folder):
    for code, err, _ in run_two(*2 * [words_of(function, folder)]):
        assert code == 0, err[-3000:]


# Replicas of one process.


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    run_here("on_one_device", folder)
    return folder


@pytest.fixture(scope="module")
def mirrored(runs):
    run_here("on_four_devices", runs, 4)
    run_here("on_two_devices", runs, 2)
    run_here("on_one_device_again", runs)
    return runs


@pytest.mark.slow
def test_four_devices_make_the_losses_and_weights_of_one(mirrored):
    """Drop path, mixing, erasing, accumulation, clipping and EMA are on."""
    losses, expected = (noted(mirrored, name)["losses"] for name in ("mirrored", "none"))
    assert len(losses) == len(expected) == 2 * STEPS
    np.testing.assert_allclose(losses, expected, rtol=1e-6)
    assert difference(mirrored / "mirrored", mirrored / "none") < TOLERANCE
    described = json.loads((mirrored / "mirrored" / "environment.json").read_text())["engine"]
    assert described == "4 devices (cpu): engine mirrored, 8 of 32 images to each device"


@pytest.mark.slow
def test_devices_that_draw_for_themselves_would_be_noticed(mirrored):
    assert difference(mirrored / "own_draws", mirrored / "none") > 1e-2


@pytest.mark.slow
def test_every_image_is_evaluated_once(mirrored):
    assert_scores(mirrored, "mirrored")


@pytest.mark.slow
@pytest.mark.parametrize("resumed", ["one_then_four", "four_then_two", "four_then_one"])
def test_a_checkpoint_goes_on_with_another_number_of_devices(mirrored, resumed):
    assert len(noted(mirrored, resumed)["losses"]) == 2 * STEPS - STOP
    assert difference(mirrored / resumed, mirrored / "none") < TOLERANCE


def assert_scores(runs, name):
    assert noted(runs, name)["counts"] == [450, 450]  # batches of 32 and two images; with the EMA again
    scores, expected = (json.loads((runs / run / "result.json").read_text()) for run in (name, "none"))
    for score in ("val_top1", "val_top5", "ema_val_top1"):
        assert scores[score] == expected[score]
    for score in ("loss", "accuracy", "val_loss", "ema_val_loss"):
        np.testing.assert_allclose(scores[score], expected[score], rtol=1e-5)


@pytest.mark.slow
def test_an_overflow_in_one_device_skips_the_batch_on_all(tmp_path):
    run_here("overflow", tmp_path, 4)
    report = json.loads((tmp_path / "overflow.json").read_text())
    assert report["ours"] == {"steps": 3, "finite": True}
    assert not report["keras"]["finite"]  # negative control: it asks the first device only


# Processes.


@pytest.fixture(scope="module")
def workers(runs):
    run_two_here("in_a_process", runs)
    return runs


@pytest.mark.slow
def test_two_processes_make_the_losses_weights_and_scores_of_one(workers):
    losses, expected = (noted(workers, name)["losses"] for name in ("workers", "none"))
    np.testing.assert_allclose(losses, expected, rtol=1e-6)
    assert difference(workers / "workers", workers / "none") < TOLERANCE
    assert_scores(workers, "workers")
    described = json.loads((workers / "workers" / "environment.json").read_text())["engine"]
    assert described == (
        "2 devices (cpu) of 2 processes: engine multi_worker_mirrored, 16 of 32 images to each device"
    )


@pytest.mark.slow
def test_two_processes_leave_the_files_of_one(workers):
    files = {
        name: {path.relative_to(workers / name).as_posix() for path in (workers / name).rglob("*.*")}
        for name in ("workers", "none")
    }
    own, others = ({file for file in files[name] if "events" not in file} for name in files)
    assert own == others
    newest = max((workers / "workers" / "checkpoints").glob("step-*"))
    assert all(np.isfinite(array).all() for array in read_state_dict(newest).values())


@pytest.mark.slow
def test_when_one_process_is_killed_the_other_ends_and_the_same_command_goes_on(workers):
    (_, err, ended), (killed, _, begin) = run_two(*2 * [words_of("in_a_process_that_dies", workers)])
    assert killed == -signal.SIGKILL
    assert ended - begin < 60
    assert re.search(r"process 1 \(.*\) of 2 has ended\. This process ends too\. The same command", err)
    assert "the checkpoint of step 10" in err
    run_two_here("in_a_process_again", workers)
    assert len(noted(workers, "killed")["losses"]) == 2 * STEPS - STOP
    assert difference(workers / "killed", workers / "workers") < 1e-6


@pytest.mark.slow
def test_processes_with_other_recipes_end_before_they_train(tmp_path):
    words = ["-m", "keras_convnext", "train", "smoke", "--out", str(tmp_path / "run")]
    words += [f"--set={key}={value}" for key, value in CHANGES.items()]
    for code, err, _ in run_two(words, [*words, "--set=learning_rate=1"]):
        assert code == 2
        assert re.search(r"process 1 \(.*\) has .*learning_rate 1\.0, not 0\.002", err)
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_the_command_line_takes_all_devices_and_no_accumulation(tmp_path, runs):
    words = ["-m", "keras_convnext", "train", "recipes/smoke.toml", "--set=architecture=test_convnext2"]
    words += ["--set=epochs=1", "--set=drop_path_rate=0.2", "--set=clip_norm=1.0"]
    one, four, two = (tmp_path / name for name in ("one", "four", "two"))
    run_child([*words, "--out", str(one)], environment_of())
    child = run_child([*words, "--out", str(four)], environment_of(4) | {"KERAS_CONVNEXT_QUIET": ""})
    assert "4 devices (cpu): engine mirrored, 16 of 64 images to each device" in child.stderr
    for code, err, _ in run_two(*2 * [[*words, "--out", str(two), "--distribute", "multi_worker_mirrored"]]):
        assert code == 0, err[-3000:]
    assert difference(four, one) < TOLERANCE
    assert difference(two, one) < TOLERANCE


# A TPU, as far as a machine without one goes.


class Extended:
    num_hosts = 1


class Cores:
    """What `tpu` asks a strategy for."""

    extended = Extended()
    num_replicas_in_sync = 8


def find_tpu(monkeypatch, make_resolver, make_strategy=None):
    """Puts something else in the place of TensorFlow's resolver and of the strategy."""
    monkeypatch.setattr(tf.distribute.cluster_resolver, "TPUClusterResolver", make_resolver)
    if make_strategy is not None:
        monkeypatch.setattr(tensorflow_engine, "_tpu_strategy", make_strategy)


def test_a_tpu_is_found_initialised_and_made_a_strategy(monkeypatch):
    called = []
    monkeypatch.setattr(tensorflow_engine, "_strategies", {})
    monkeypatch.setenv("TPU_NAME", "node-1")
    monkeypatch.setattr(tf.config, "experimental_connect_to_cluster", lambda r: called.append(("connect", r)))
    monkeypatch.setattr(tf.tpu.experimental, "initialize_tpu_system", lambda r: called.append(("start", r)))
    monkeypatch.setattr(tf.distribute, "TPUStrategy", lambda r: called.append(("strategy", r)) or Cores())
    find_tpu(monkeypatch, lambda name: f"resolver of {name}")
    engine = tensorflow_engine.tpu(watchdog.alone())
    assert called == [(word, "resolver of node-1") for word in ("connect", "start", "strategy")]
    assert (engine.name, engine.num_parts, engine.devices[7]) == ("tpu", 8, "tpu:7")
    assert engine.describe(64) == "8 devices (tpu): engine tpu, 8 of 64 images to each device"
    assert tensorflow_engine.automatic() == "tpu"


def test_the_engine_of_a_tpu_trains_with_whatever_strategy_it_has(monkeypatch):
    find_tpu(monkeypatch, lambda name: name, lambda resolver: tf.distribute.MirroredStrategy(["CPU:0"]))
    engine = tensorflow_engine.tpu(watchdog.alone())
    images = np.random.default_rng(0).uniform(0, 255, (8, 32, 32, 3)).astype("float32")
    with engine.scope():
        model = small_model()
        engine.prepare(model)
        batches = tf.data.Dataset.from_tensors((images, TARGETS)).repeat()
        history = model.fit(engine.for_fit(batches), steps_per_epoch=2, epochs=4, verbose=0).history
        assert history["loss"][-1] < history["loss"][0]
        outputs = choose.rows(tensorflow_engine.forward(model)(choose.divided(images)))
    np.testing.assert_allclose(outputs, model(images).numpy(), rtol=1e-5, atol=1e-6)


def test_a_tpu_of_several_hosts_is_refused(monkeypatch):
    monkeypatch.setattr(Extended, "num_hosts", 4)
    find_tpu(monkeypatch, lambda name: name, lambda resolver: Cores())
    with pytest.raises(ValueError, match=r"Expected a TPU of one host, received 'local' with 4\. .*=jax"):
        tensorflow_engine.tpu(watchdog.alone())


def test_no_tpu_is_told(monkeypatch):
    def none(name):
        raise tf.errors.NotFoundError(None, None, "TPUs not found in the cluster. Failed in initialization")

    message = (
        r"Expected a TPU named 'local', as engine 'tpu' needs, but TPUs not found in the cluster\. Run on a "
        "Cloud TPU machine, or set TPU_NAME"
    )
    find_tpu(monkeypatch, none)
    with pytest.raises(ValueError, match=message):
        tensorflow_engine.tpu(watchdog.alone())


@pytest.fixture(scope="module")
def step():
    """The training step of one replica: of the second of four parts, with all that a recipe can ask for."""
    engine = tensorflow_engine.TensorFlowEngine("tpu", ("tpu:0",), 1, tf.distribute.get_strategy())
    model = small_model(gradient_accumulation_steps=2)
    engine.prepare(model)

    def step(images, targets):
        with residual.divided_batch(lambda: (4, tf.constant(1))):
            return model.train_step((images, targets))

    return step


def operations(function, *arrays):
    """(kind, dtypes) of all operations of a function and of those that it calls."""
    graph = tf.function(function, autograph=False).get_concrete_function(*arrays).graph
    inner = graph._functions.values() if hasattr(graph, "_functions") else ()
    graphs = [graph, *(each.graph for each in inner if hasattr(each, "graph"))]
    return {
        (operation.type, tensor.dtype.base_dtype.name)
        for each in graphs
        for operation in each.get_operations()
        for tensor in (*operation.inputs, *operation.outputs)
    }


def types_of_a_tpu():
    """As TensorFlow's own header lists them."""
    header = pathlib.Path(tf.sysconfig.get_include()) / "tensorflow/core/tpu/tpu_defs.h"
    listed = header.read_text().partition("kTpuAllTypes")[2].partition("}}")[0]
    names = re.findall(r"DT_\w+", listed)
    return {"resource", *(tf.as_dtype(types_pb2.DataType.Value(name)).name for name in names)}


def hlo(function, *arrays):
    compiled = tf.function(function, autograph=False, jit_compile=True)
    return compiled.experimental_get_compiler_ir(*arrays)(stage="hlo")


IMAGES = np.zeros((8, 32, 32, 3), "float32")


def test_the_training_step_is_one_xla_program_without_calls_to_its_host(step):
    text = hlo(step, IMAGES, TARGETS)
    assert " convolution(" in text
    kinds = set(re.findall(r" = \S+ ([a-z][a-z-]*)\(", text))
    assert not kinds & {"custom-call", "infeed", "outfeed", "send", "recv"}
    # Negative control: what runs in Python, or on strings, cannot be compiled.
    for outside in (
        lambda x, y: tf.numpy_function(lambda x: x, [x], tf.float32),
        lambda x, y: tf.strings.length(tf.strings.as_string(x)),
    ):
        with pytest.raises((ValueError, tf.errors.OpError)):
            hlo(outside, IMAGES, TARGETS)


def test_the_types_of_the_training_step_are_those_of_a_tpu(step):
    found = operations(step, IMAGES, TARGETS)
    assert {"Conv2D", "StatelessRandomUniformV2"} <= {kind for kind, _ in found}
    assert {dtype for _, dtype in found} <= types_of_a_tpu()
    assert "string" in {name for _, name in operations(tf.strings.as_string, IMAGES)} - types_of_a_tpu()


# Choices and mistakes.


def test_tf_config_is_read(monkeypatch):
    cluster = {"chief": ["a:1"], "worker": ["b:1", "c:1"]}
    for kind, index, expected in (("chief", 0, 0), ("worker", 0, 1), ("worker", 1, 2)):
        config = {"cluster": cluster, "task": {"type": kind, "index": index}}
        monkeypatch.setenv("TF_CONFIG", json.dumps(config))
        assert tensorflow_engine._place() == (expected, ["a:1", "b:1", "c:1"])
    monkeypatch.setenv(
        "TF_CONFIG", '{"cluster": {"worker": ["a:1"]}, "task": {"type": "worker", "index": 0}}'
    )
    assert tensorflow_engine._place() is None
    monkeypatch.delenv("TF_CONFIG")
    assert tensorflow_engine._place() is None


TWO = '"cluster": {"worker": ["a:1", "b:1"]}'


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ("worker", r"Expected TF_CONFIG to be JSON such as .*, received 'worker': Expecting value"),
        ("[]", r"Expected TF_CONFIG to be JSON such as .*, received '\[\]'"),
        (f"{{{TWO}}}", r'as the task, received task None -1 of \{"worker": \["a:1", "b:1"\]\}'),
        (f'{{{TWO}, "task": {{"type": "worker", "index": 2}}}}', r"received task worker 2 of"),
        (
            f'{{{TWO[:-1]}, "ps": ["c:1"]}}, "task": {{"type": "ps", "index": 0}}}}',
            r'"ps": \["c:1"\]\}\. Give each',
        ),
    ],
)
def test_a_tf_config_that_cannot_be_used_is_refused(monkeypatch, config, message):
    monkeypatch.setenv("TF_CONFIG", config)
    with pytest.raises(ValueError, match=message):
        choose.choose("auto")


@pytest.mark.parametrize(
    ("process", "message"),
    [
        (0, r"Expected 1 more processes of TF_CONFIG within 1 s, but 1 did not come\."),
        (
            1,
            r"Expected process 0 of TF_CONFIG at 127\.0\.0\.1:\d+ within 1 s, but it does not answer",
        ),
    ],
)
def test_a_process_that_does_not_come_is_told(monkeypatch, process, message):
    with socket.create_server(("127.0.0.1", 0)) as place:
        address = f"127.0.0.1:{place.getsockname()[1]}"
    monkeypatch.setattr(watchdog, "JOIN_SECONDS", 1.0)
    monkeypatch.setenv(
        "TF_CONFIG", environment_of(cluster=[address, "127.0.0.1:9"], process=process)["TF_CONFIG"]
    )
    with pytest.raises(ConnectionError, match=message):
        choose.choose("auto")


def test_many_processes_need_tf_config():
    with pytest.raises(ValueError, match=r"'multi_worker_mirrored' needs, but TF_CONFIG names none: set it"):
        choose.choose("multi_worker_mirrored")


def test_mirrored_is_of_one_process():
    group = watchdog.Group(0, ["process 0", "process 1"], {}, None)
    with pytest.raises(ValueError, match=r"TF_CONFIG names 2, .* Choose 'multi_worker_mirrored'\."):
        tensorflow_engine.mirrored(group)


@pytest.mark.parametrize("text", ["four", "0", "-1"])
def test_a_number_of_logical_devices_is_a_number(monkeypatch, text):
    monkeypatch.setenv(tensorflow_engine.LOGICAL_DEVICES, text)
    with pytest.raises(ValueError, match=rf"_LOGICAL_DEVICES to be a number .*received '{text}'\."):
        choose.choose("auto")


def test_logical_devices_come_first(monkeypatch):
    tf.config.list_logical_devices()  # begins
    monkeypatch.setenv(tensorflow_engine.LOGICAL_DEVICES, "3")
    with pytest.raises(ValueError, match=r"_DEVICES=3 before TensorFlow computes anything, but .* first\."):
        choose.choose("auto")
