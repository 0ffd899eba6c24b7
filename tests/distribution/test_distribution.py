"""Training divided among devices ends where one device ends, and is divided in fact."""

import collections
import json
import os
import pathlib
import re
import shutil
import subprocess
import sys

import keras
import numpy as np
import pytest

from benchmarks import collectives
from keras_convnext.cli import main
from keras_convnext.distribution import choose
from keras_convnext.training.recipes.classification import ENGINES
from keras_convnext.training.recipes.files import load_recipe
from keras_convnext.weights.torch_files import read_state_dict

ROOT = pathlib.Path(__file__).parents[2]
BACKEND = keras.backend.backend()
STEPS = 21  # 1347 // 64 in one epoch
STOP = 21  # micro-batches of 42: in the midst of a step

# All that is random or sums over the batch.
CHANGES = {
    "architecture": "test_convnext2",
    "batch_size": 64,
    "accumulation_steps": 2,
    "epochs": 1,
    "drop_path_rate": 0.2,
    "mixup": 0.8,
    "cutmix": 1.0,
    "erase": 0.25,
    "layer_decay": 0.9,
    "clip_norm": 1.0,
    "ema_decay": 0.8,
    "keep_checkpoints": 99,
}

jax_only = pytest.mark.skipif(BACKEND != "jax", reason="an engine of JAX")
# Eight devices on two cores take two to four minutes, and on a loaded machine stalled once for longer.
on_simulated_devices = pytest.mark.slow


# In the child processes.


def train(folder, **changes):
    """Trains and leaves losses.json beside the run: of each micro-batch, and where the variables are."""
    from keras_convnext.evaluation import forward
    from keras_convnext.training import trainer

    noted = {"losses": [], "counts": [], "layouts": {}}
    end_batch, finish, validate = trainer.Run.end_batch, trainer.Run.finish, forward.validate

    def noting_end_batch(run, in_fit, means):
        noted["losses"].append(means["loss"])
        end_batch(run, in_fit, means)
        if run.counts.done == STOP:
            run.save()

    def noting_finish(run):
        variables = [*run.built.model.variables, *run.built.model.optimizer.variables]
        if BACKEND == "jax":
            specs = {v.path: getattr(v.value.sharding, "spec", ()) for v in variables}
            noted["layouts"] = {path: [str(axis) for axis in spec] for path, spec in specs.items()}
        return finish(run)

    def noting_validate(*arguments):
        scores = validate(*arguments)
        noted["counts"].append(scores["n"])
        return scores

    trainer.Run.end_batch, trainer.Run.finish = noting_end_batch, noting_finish
    forward.validate = noting_validate
    try:
        changes = {key.replace("__", "."): value for key, value in changes.items()}
        trainer.train(load_recipe("smoke").replaced(CHANGES | changes), folder, progress=False)
    finally:
        trainer.Run.end_batch, trainer.Run.finish = end_batch, finish
        forward.validate = validate
    (pathlib.Path(folder).parent / f"{pathlib.Path(folder).name}.json").write_text(json.dumps(noted))


def halfway(folder, name):
    """A copy of a run as it was after half of its steps."""
    copy = folder.parent / name
    shutil.copytree(folder, copy)
    for path in (copy / "checkpoints").glob("step-*"):
        if int(path.name[5:13]) > STOP // 2:
            path.unlink()
    for path in [*copy.glob("final*"), copy / "result.json", *copy.glob("best*")]:
        path.unlink()
    return copy


def exchange_halves(folder):
    """What a wrong layout would do to one kernel: the halves of two devices change places."""
    from keras_convnext.training.run_folder import open_run

    with open_run(
        folder, json.loads((folder / "run.json").read_text())["identity"], checkpoint_bytes=0
    ) as run:
        arrays, state = run.latest()
        name = next(name for name in arrays if name.endswith("stages_2_0/pwconv1/kernel"))
        arrays[name] = np.concatenate(np.split(arrays[name], 2, axis=1)[::-1], axis=1)
        run.save(arrays, state)


def on_eight_devices(folder):
    folder = pathlib.Path(folder)
    for engine in ("none", "data_parallel", "model_parallel"):
        train(folder / engine, distribution__engine=engine)
    train(halfway(folder / "none", "one_then_eight"), distribution__engine="model_parallel")
    report = {engine: one_step_of_v2(engine) for engine in ("none", "data_parallel", "model_parallel")}
    (folder / "v2.json").write_text(json.dumps(report))


def one_step_of_v2(engine):
    """Of a model with GRN, whose mean is over the divided axis, by the compiled step itself."""
    from keras_convnext.convnext import ConvNeXtV2Block

    images = np.random.default_rng(0).normal(0, 1, (16, 8, 8, 32)).astype("float32")
    targets = np.eye(10, dtype="float32")[np.arange(16) % 10]
    with choose.choose(engine).scope():
        x = inputs = keras.Input((8, 8, 32))
        for number in range(2):
            x = ConvNeXtV2Block(32, name=f"stages_2_{number}")(x)
        x = keras.layers.GlobalAveragePooling2D(data_format="channels_last")(x)
        model = keras.Model(inputs, keras.layers.Dense(10)(x))
        values = np.random.default_rng(1)
        for variable in model.trainable_variables:  # GRN too, which begins as the identity
            variable.assign(values.normal(0, 0.1, variable.shape))
        model.compile(keras.optimizers.SGD(0.1), keras.losses.CategoricalCrossentropy(from_logits=True))
        model.optimizer.build(model.trainable_variables)
        step = collectives.compiled_step(model, images, targets)
        logs, state = step(*collectives.step_arguments(model, images, targets))
        return {
            "loss": float(logs["loss"]),
            "norms": [float(np.linalg.norm(array)) for array in state[0]],
            "layouts": {v.path: str(v.value.sharding) for v in model.trainable_variables},
            "collectives": [vars(found) for found in collectives.collectives(step.as_text())],
            "num_bytes": sum(4 * int(np.prod(v.shape)) for v in model.trainable_variables),
        }


def on_two_devices(folder):
    folder = pathlib.Path(folder)
    train(halfway(folder / "data_parallel", "eight_then_two"), distribution__engine="data_parallel")
    train(halfway(folder / "model_parallel", "eight_then_one"), distribution__engine="none")
    wrong = halfway(folder / "model_parallel", "wrong")
    exchange_halves(wrong)
    train(wrong, distribution__engine="none")


def environment_of(folder, count):
    """Of a process with so many devices. They are threads, which wait for each other on few cores."""
    flags = f"--xla_force_host_platform_device_count={count}"
    return os.environ | {
        "XLA_FLAGS": f"{flags} --xla_cpu_collective_call_terminate_timeout_seconds=300",
        "JAX_COMPILATION_CACHE_DIR": str(folder / "compiled"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "1",
    }


def run_child(words, environment):
    child = subprocess.run(
        [sys.executable, *words], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=500
    )
    assert child.returncode == 0, child.stderr[-3000:]
    return child


def run_here(function, folder, environment):
    code = f"from tests.distribution.test_distribution import {function} as f; f({str(folder)!r})"
    run_child(["-c", code], environment)


# What they left.


def weights_of(folder):
    arrays = read_state_dict(max((folder / "checkpoints").glob("step-*")))
    floats = {name: array for name, array in arrays.items() if np.issubdtype(array.dtype, np.floating)}
    return {name: np.array(array, "float64") for name, array in floats.items()}


def difference(folder, other):
    """The largest difference of two runs' weights and averages, relative to the largest of its array."""
    arrays, others = weights_of(folder), weights_of(other)
    assert arrays.keys() == others.keys()
    return max(
        np.abs(arrays[name] - others[name]).max() / max(np.abs(others[name]).max(), 1e-12)
        for name in arrays
        if name.startswith("model/") or "average" in name
    )


def noted(folder, name):
    return json.loads((folder / f"{name}.json").read_text())


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    run_here("on_eight_devices", folder, environment_of(folder, 8))
    run_here("on_two_devices", folder, environment_of(folder, 2))
    return folder


@on_simulated_devices
@jax_only
@pytest.mark.parametrize("engine", ["data_parallel", "model_parallel"])
def test_eight_devices_make_the_losses_and_weights_of_one(runs, engine):
    """Drop path, mixing, erasing, accumulation, clipping and EMA are on."""
    # Means since the epoch began, in float32 as Keras keeps them; differences of these lose digits.
    losses, expected = (noted(runs, name)["losses"] for name in (engine, "none"))
    assert len(losses) == len(expected) == 2 * STEPS
    np.testing.assert_allclose(losses, expected, rtol=1e-6)
    assert difference(runs / engine, runs / "none") < 1e-5  # 1e-6 where this was written


@on_simulated_devices
@jax_only
@pytest.mark.parametrize("engine", ["data_parallel", "model_parallel"])
def test_every_image_is_evaluated_once_and_the_scores_are_those_of_one_device(runs, engine):
    assert noted(runs, engine)["counts"] == [450, 450]  # 14 batches of 32 and two images; with the EMA again
    scores, expected = (json.loads((runs / name / "result.json").read_text()) for name in (engine, "none"))
    for name in ("val_top1", "val_top5", "ema_val_top1"):
        assert scores[name] == expected[name]
    np.testing.assert_allclose(scores["val_loss"], expected["val_loss"], rtol=1e-5)


@on_simulated_devices
@jax_only
@pytest.mark.parametrize(
    ("resumed", "engine"),
    [
        ("one_then_eight", "none"),
        ("eight_then_two", "data_parallel"),
        ("eight_then_one", "model_parallel"),
    ],
)
def test_a_checkpoint_goes_on_with_another_number_of_devices(runs, resumed, engine):
    assert len(noted(runs, resumed)["losses"]) == 2 * STEPS - STOP
    assert difference(runs / resumed, runs / engine) < 1e-5


@on_simulated_devices
@jax_only
def test_halves_of_a_kernel_in_the_wrong_places_would_be_noticed(runs):
    assert difference(runs / "wrong", runs / "none") > 1e-2


@on_simulated_devices
@jax_only
def test_kernels_slots_and_averages_are_divided(runs):
    layouts = noted(runs, "model_parallel")["layouts"]
    expected = {
        "pwconv1/kernel": ["None", "model"],
        "pwconv1/bias": ["model"],
        "pwconv2/kernel": ["model", "None"],
        "pwconv2/bias": ["None"],
        "dwconv/kernel": ["None"] * 4,
    }
    for suffix, layout in expected.items():
        weight = f"stages_2_0/{suffix}"
        slot = f"adamw/{weight.replace('/', '_')}"
        of_weight = [weight, *(f"{slot}_{kind}" for kind in ("momentum", "velocity", "average"))]
        assert [layouts[path] for path in of_weight] == [layout] * 4
    assert {tuple(layout) for layout in noted(runs, "data_parallel")["layouts"].values()} <= {
        ("None",) * axes for axes in range(5)
    }


@on_simulated_devices
@jax_only
@pytest.mark.parametrize("engine", ["data_parallel", "model_parallel"])
def test_a_step_of_v2_is_the_same_where_grn_is_divided(runs, engine):
    report = noted(runs, "v2")
    np.testing.assert_allclose(report[engine]["loss"], report["none"]["loss"], rtol=1e-5)
    np.testing.assert_allclose(report[engine]["norms"], report["none"]["norms"], rtol=1e-5)
    assert ("'model'" in report[engine]["layouts"]["stages_2_0/grn/gamma"]) == (engine == "model_parallel")


@on_simulated_devices
@jax_only
def test_data_parallel_exchanges_the_gradients_once(runs):
    (only,) = noted(runs, "v2")["data_parallel"]["collectives"]
    assert (only["kind"], only["num_devices"]) == ("all-reduce", 8)
    assert 0 <= only["num_bytes"] - noted(runs, "v2")["data_parallel"]["num_bytes"] <= 16  # with the loss


@on_simulated_devices
@jax_only
def test_model_parallel_exchanges_the_maps_of_each_block_and_its_share_of_the_gradients(runs):
    """In each of two blocks a map, another one on the way back, and the means of GRN."""
    report = noted(runs, "v2")["model_parallel"]
    assert {entry["kind"] for entry in report["collectives"]} == {"all-reduce"}
    by_group = collections.Counter()
    for entry in report["collectives"]:
        by_group[entry["num_devices"]] += entry["num_bytes"]
    images, height, width, channels = 4, 8, 8, 32  # four of 16 images to each two devices
    maps = 2 * 2 * 4 * images * height * width * channels
    assert maps <= by_group[2] <= maps + 2 * 64
    assert report["num_bytes"] / 2 < by_group[4] < 0.6 * report["num_bytes"]


@on_simulated_devices
@jax_only
def test_the_command_line_goes_on_with_eight_devices_to_the_end(runs):
    folder = halfway(runs / "none", "command")
    settings = [f"--set={key}={value}" for key, value in CHANGES.items()]
    settings.append("--set=distribution.engine=data_parallel")
    environment = environment_of(runs, 8)
    environment.pop("KERAS_CONVNEXT_QUIET", None)
    command = ["-m", "keras_convnext", "train", "recipes/smoke.toml", "--out", str(folder), *settings]
    child = run_child(command, environment)
    assert "8 devices (cpu): engine data_parallel, 4 of 32 images to each device" in child.stderr
    assert difference(folder, runs / "none") < 1e-5
    assert load_recipe(folder / "recipe.toml").distribution.engine == "data_parallel"
    described = json.loads((folder / "environment.json").read_text())["engine"]
    assert described.startswith("8 devices (cpu): engine data_parallel")


# Choices and mistakes.


@pytest.mark.once
def test_the_recipes_know_the_engines():
    own = {engine: backend for backend, engines in choose.ENGINES.items() for engine in engines}
    assert {"auto": "any backend", "none": "any backend", **own} == ENGINES


def test_one_device_needs_no_engine():
    engine = choose.choose("none")
    assert (engine.name, engine.num_parts, engine.strategy) == ("none", 1, None)
    assert engine.filled(13) == 13
    engine.check_batch(13)
    assert re.fullmatch(r"1 device \(\w+\): engine none", engine.describe(13))


@pytest.mark.parametrize(
    "name", [name for name, backend in ENGINES.items() if backend not in (BACKEND, "any backend")]
)
def test_an_engine_of_another_backend_is_refused(name, tmp_path, capsys):
    owner = ENGINES[name]
    own = ", ".join(("auto", "none", *choose.ENGINES.get(BACKEND, ())))
    message = (
        f"Expected an engine of the {BACKEND} backend, {own}, received {name!r}, which is an engine of "
        f"{owner}. Choose one of these, or set KERAS_BACKEND={owner}."
    )
    with pytest.raises(ValueError, match=re.escape(message)):
        choose.choose(name)
    assert main.main(["train", "smoke", "--out", str(tmp_path / "run"), "--distribute", name]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


@pytest.mark.once
def test_an_unknown_engine_has_near_names():
    with pytest.raises(ValueError, match=r"received 'non'\. Did you mean 'none'\?"):
        choose.choose("non")


@pytest.mark.once
@pytest.mark.parametrize(
    ("batch_size", "accumulation_steps", "nearest"),
    [(100, 1, "96 and 104"), (100, 2, "96 and 112"), (4, 1, "8"), (40, 4, "32 and 64")],
)
def test_a_batch_that_cannot_be_divided_names_the_nearest(batch_size, accumulation_steps, nearest):
    engine = choose.Engine("data_parallel", ("cpu:0",) * 8, 8)
    with pytest.raises(
        ValueError,
        match=rf"8 equal parts.* on 8 devices, received {batch_size}\. The nearest are {nearest}\. ",
    ):
        engine.check_batch(batch_size, accumulation_steps)
    engine.check_batch(int(nearest.split()[-1]), accumulation_steps)
    assert engine.filled(batch_size) % 8 == 0 and 0 <= engine.filled(batch_size) - batch_size < 8


@jax_only
def test_model_devices_must_divide_the_devices():
    with pytest.raises(
        ValueError, match=r"model_devices to divide the 1 devices, received 2\. Choose one of 1\."
    ):
        choose.choose("model_parallel", model_devices=2)


@pytest.mark.once
def test_collectives_are_read_from_the_text_of_a_program():
    program = """
      %a = (f32[96]{0}, bf16[2,3]{1,0}) all-reduce(%x, %y), replica_groups={{0,1},{2,3}}, to_apply=%add
      %b = f32[8,4]{1,0} all-gather(%x), replica_groups=[2,4]<=[8], dimensions={0}
      %c = (f32[2]{0}, f32[8]{0}) all-gather-start(%x), replica_groups={}, dimensions={0}
      %d = f32[8]{0} all-gather-done(%c)
      %e = pred[] all-reduce(%x), replica_groups=mesh['a'=4,'b'=2] {'a'}, to_apply=%and
      %f = f32[8]{0} add(%x, %x), metadata={op_name="all-reduce(x)"}
    """
    assert collectives.collectives(program) == [
        collectives.Collective("all-reduce", 96 * 4 + 12, 2),
        collectives.Collective("all-gather", 128, 4),
        collectives.Collective("all-gather", 32, 0),
        collectives.Collective("all-reduce", 1, 4),
    ]
