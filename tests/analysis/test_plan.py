"""What `plan` says before a run is what a step takes: its memory, its exchanges, its operations."""

import collections
import dataclasses
import json
import os
import pathlib
import re
import subprocess
import sys

import keras
import numpy as np
import PIL.Image
import pytest

import keras_convnext
from keras_convnext import segmentation
from keras_convnext.analysis import memory
from keras_convnext.analysis.plan import describe, make_plan, ring_bytes, step_flops
from keras_convnext.architecture import Heads
from keras_convnext.layers import chunking
from keras_convnext.training.recipes.files import known_recipes, load_recipe
from keras_convnext.training.segmentation_loss import SegmentationLoss
from keras_convnext.variants import VARIANTS

ROOT = pathlib.Path(__file__).parents[2]
BACKEND = keras.backend.backend()

jax_only = pytest.mark.skipif(BACKEND != "jax", reason="reads the program of JAX")


def run_child(*words, **variables):
    child = subprocess.run(
        [sys.executable, "-W", "ignore", *words],
        cwd=ROOT, env=os.environ | variables, capture_output=True, text=True, timeout=500, check=False,
    )  # fmt: skip
    assert child.returncode == 0, child.stderr[-3000:]
    return child.stdout


# Memory.


@pytest.mark.slow
def test_the_estimate_is_within_15_percent_of_the_measured_peak():
    """Of sizes that are not in benchmarks/memory.md, where more are."""
    case = {"variant": "convnextv2_pico", "batch": 6, "size": 160, "precision": "float32"}
    words = json.dumps(case | {"rematerialize": False})
    found = run_child(
        "benchmarks/memory.py", "--child", words, KERAS_BACKEND=BACKEND, TF_CPU_ALLOCATOR_USE_BFC="1"
    )
    measured = json.loads(re.search("measured: (.*)", found)[1])["measured"]
    step = memory.Step(VARIANTS["convnextv2_pico"], 6, 160, backend=BACKEND)
    ratio = memory.estimate(step).total / measured
    assert 0.85 < ratio < 1.15
    for wrong in ({"batch": 3}, {"image_size": 224}):
        ratio = memory.estimate(dataclasses.replace(step, **wrong)).total / measured
        assert not 0.85 < ratio < 1.15


@pytest.mark.once
def test_what_pytorch_keeps_of_a_block_is_what_autograd_saves():
    code = """
import torch, keras
from keras_convnext.convnext import ConvNeXtBlock, ConvNeXtV2Block
for policy in ("float32", "mixed_bfloat16"):
    for block in (ConvNeXtBlock, ConvNeXtV2Block):
        layer = block(48, dtype=policy)
        layer.build((4, 14, 14, 48))
        x = torch.randn(4, 14, 14, 48, requires_grad=True)
        x = x if policy == "float32" else x.to(torch.bfloat16)
        weights = {weight.value.untyped_storage().data_ptr() for weight in layer.weights}
        saved = {}
        def note(tensor):
            storage = tensor.untyped_storage()
            saved[storage.data_ptr()] = storage.nbytes() if storage.data_ptr() not in weights else 0
            return tensor
        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            layer(x, training=True)
        print("saved", policy, sum(saved.values()))
"""
    saved = iter(re.findall(r"saved (\w+) (\d+)", run_child("-c", code, KERAS_BACKEND="torch")))
    for precision in ("float32", "mixed_bfloat16"):
        for name in ("convnext_femto", "convnextv2_femto"):
            step = memory.Step(VARIANTS[name], 4, 224, precision=precision, backend="torch")
            kept, _ = memory._maps_of_torch(step, 4, 14, 48, 7)
            found, measured = next(saved)
            assert found == precision
            np.testing.assert_allclose(kept, int(measured), rtol=0.01)


@pytest.mark.once
def test_weights_are_counted_as_in_the_tables():
    for variant in VARIANTS.values():
        assert memory.count_weights(memory.Step(variant, 1, 224)) == (variant.parameters,) * 2
        layers = memory.layers(memory.Step(variant, 1, 224))
        assert sum(layer.gradients for layer in layers) == 4 * variant.parameters
    tiny = VARIANTS["convnext_tiny"]
    head = 768 * 1000 + 1000
    assert memory.count_weights(memory.Step(tiny, 1, 224, trainable="head"))[1] == head
    blocks = 2 * 8 * 5 * (3 * 96 + 3 * 192 + 9 * 384 + 3 * 768)
    assert memory.count_weights(memory.Step(tiny, 1, 224, trainable="lora:8"))[1] == head + blocks


@pytest.mark.once
def test_parts_add_up_and_rematerialising_saves_where_the_backend_keeps_to_it():
    step = memory.Step(VARIANTS["convnext_tiny"], 16, 224, backend="torch")
    found = memory.estimate(step)
    assert found.total == sum(value for value in vars(found).values() if isinstance(value, int))
    for backend, device, saves in (
        ("torch", "cpu", True), ("tensorflow", "cpu", True), ("jax", "gpu", True), ("jax", "cpu", False),
    ):  # fmt: skip
        plain = dataclasses.replace(step, backend=backend, device=device)
        total = memory.estimate(plain).total
        less = memory.estimate(dataclasses.replace(plain, rematerialize=True)).total
        assert (less < 0.75 * total) if saves else (less == total)


@pytest.mark.once
def test_chunks_of_jax_on_a_cpu_are_those_of_the_package(monkeypatch):
    step = memory.Step(VARIANTS["convnext_tiny"], 16, 224, backend="jax")
    in_chunks = memory.estimate(step).activations
    monkeypatch.setattr(chunking, "POSITIONS", 10**6)
    assert memory.estimate(step).activations > 2 * in_chunks


# Exchanges.


def exchanges_of_compiled_steps():
    """In a child process of eight devices: bytes by group of each program."""
    from benchmarks import collectives
    from keras_convnext.distribution import choose
    from keras_convnext.training import run_state
    from keras_convnext.training.tasks import classification

    found = {}
    for engine, architecture in (
        ("data_parallel", "test_convnext2"),
        ("model_parallel", "convnextv2_atto"),
    ):
        recipe = recipe_for(architecture, engine)
        with choose.choose(engine).scope():
            student, _ = classification.build_model(recipe, 10)
            model = classification.compile_model(recipe, student, run_state.Plan(16, 1, 9, 9, 0))
            images, targets = np.zeros((16, 64, 64, 3), "float32"), np.zeros((16, 10), "float32")
            step = collectives.compiled_step(model, images, targets)
        groups = collections.Counter()
        for entry in collectives.collectives(step.as_text()):
            groups[entry.num_devices] += entry.num_bytes
        found[f"{engine} {architecture}"] = groups
    print("exchanges", json.dumps(found))


def recipe_for(architecture, engine):
    changes = {
        "architecture": architecture, "batch_size": 16, "image_size": 64, "eval_image_size": 64,
        "distribution.engine": engine, "drop_path_rate": 0.1,
        "layer_scale_init_value": VARIANTS[architecture].layer_scale_init_value or 0.0,
    }  # fmt: skip
    return load_recipe("smoke", changes)


@pytest.mark.slow
@jax_only
def test_exchanges_are_those_of_the_compiled_step():
    out = run_child(
        "-c",
        "from tests.analysis.test_plan import exchanges_of_compiled_steps as f; f()",
        XLA_FLAGS="--xla_force_host_platform_device_count=8",
    )
    compiled = json.loads(re.search("exchanges (.*)", out)[1])
    assert len(compiled) == 2
    for name, groups in compiled.items():
        planned = collections.Counter()
        plan = make_plan(recipe_for(*name.split()[::-1]), "8xcpu")
        for exchange in plan.exchanges:
            planned[str(exchange.num_devices)] += exchange.num_bytes
        assert planned.keys() == groups.keys()
        for devices, num_bytes in groups.items():
            assert 0 <= num_bytes - planned[devices] <= 16  # loss and metrics
    # The plan of the other engine would be noticed.
    other = make_plan(recipe_for("convnextv2_atto", "data_parallel"), "4xcpu").exchanges[0]
    assert other.num_bytes > 1.5 * compiled["model_parallel convnextv2_atto"]["4"]


@pytest.mark.once
@pytest.mark.parametrize("devices", [2, 5, 8])
def test_ring_bytes_are_those_of_a_ring(devices):
    """Reduce-scatter and all-gather, part by part; every device has the sum at the end."""
    arrays = np.random.default_rng(0).integers(0, 100, (devices, devices, 8))  # device, part, numbers
    expected, sent = arrays.sum(0), 0
    for phase in (0, 1):
        for turn in range(devices - 1):
            messages = [arrays[d, (d + phase - turn) % devices].copy() for d in range(devices)]
            for d, message in enumerate(messages):
                part, target = (d + phase - turn) % devices, (d + 1) % devices
                arrays[target, part] = message if phase else arrays[target, part] + message
            sent += messages[0].size
    np.testing.assert_array_equal(arrays, np.broadcast_to(expected, arrays.shape))
    assert ring_bytes(arrays[0].size, devices) == sent


# Plans.


@pytest.mark.once
def test_operations_are_three_or_four_times_those_of_the_forward_pass():
    variant = VARIANTS["convnext_tiny"]
    assert step_flops(variant, 224, 2) == 2 * 6 * 4_455_531_264  # 4.5 G (Liu et al. 2022, table 1)
    assert step_flops(variant, 224, 2, rematerialize=True) == 2 * 8 * 4_455_531_264
    assert step_flops(variant, 224, 1, classes=10) == 6 * (4_455_531_264 - 990 * 768)


OTHERS = ("pretrain", "knn", "linear_probe", "camvid", "fine_tune_segmentation")
CLASSIFIERS = [name for name in known_recipes() if name not in OTHERS and not name.startswith("ade20k")]


@pytest.mark.once
@pytest.mark.parametrize("name", CLASSIFIERS)
def test_every_published_recipe_has_a_plan(name):
    plan = make_plan(load_recipe(name, {} if name == "smoke" else {"data": ""}), "8xh100")
    assert plan.fits and plan.batch_size == load_recipe(name).optimizer.batch_size
    assert plan.images_per_device * plan.num_devices * plan.accumulation_steps == plan.batch_size
    if name.startswith("imagenet1k") or "_ft_1k_" in name:
        assert (plan.images, plan.classes) == (1_281_167, 1000)
    elif name.startswith("pretrain_fcmae"):
        assert (plan.images, plan.classes) == (1_281_167, 0)
    elif name.startswith("imagenet22k"):
        assert (plan.images, plan.classes) == (14_197_122, 21_841)


@pytest.mark.once
@pytest.mark.parametrize("name", [name for name in known_recipes() if name.startswith("ade20k")])
def test_published_recipes_of_segmenters_have_a_plan(name):
    plan = make_plan(load_recipe(name), "8xa100-80")
    assert plan.fits and (plan.images, plan.classes, plan.total_steps) == (20_210, 150, 160_000)
    body = step_flops(VARIANTS[load_recipe(name).model.architecture], 512, plan.batch_size, 0)
    assert plan.flops > 2 * body  # UPerNet's heads have most of the operations
    assert "160,000 in all" in dict(describe(plan))["steps"]


@pytest.mark.once
def test_recipes_of_segmenters_have_a_plan_without_and_with_data(tmp_path):
    plan = make_plan(load_recipe("fine_tune_segmentation"), "1xrtx4090")
    assert (plan.images, plan.classes, plan.total_steps) == (None, 150, 4000)
    assert dict(describe(plan))["steps"] == "4,000 in all; 150 classes assumed"
    for name, values in (
        ("images", (np.zeros((8, 8, 3), np.uint8))),
        ("masks", np.eye(8, dtype=np.uint8) * 2),
    ):
        (tmp_path / name).mkdir()
        for number in range(10):
            PIL.Image.fromarray(values).save(tmp_path / name / f"{number}.png")
    changes = {"data": str(tmp_path), "ignored_values": (255,), "batch_size": 4}
    plan = make_plan(load_recipe("fine_tune_segmentation", changes), "1xcpu")
    assert (plan.images, plan.classes) == (8, 3)  # two of ten photos are held out


@pytest.mark.once
def test_operations_of_upernet_are_the_published_ones():
    heads = Heads(150, auxiliary=False)
    giga = step_flops(VARIANTS["convnext_tiny"], 512, 1, 150, heads=heads) / 6e9
    assert giga == pytest.approx(235, rel=0.01)  # 939 G at 2048 x 512 (Liu et al. 2022, table 4): 4 squares


@pytest.mark.skipif(BACKEND != "torch", reason="counts what autograd keeps")
@pytest.mark.parametrize("classes", [3, 60])
def test_memory_of_the_heads_is_what_autograd_keeps(classes):
    import torch

    heads = Heads(classes, 32)
    step = memory.Step(VARIANTS["test_convnext2"], 2, 128, classes, backend="torch", heads=heads)
    parts = memory.layers(step)
    expected = sum(part.kept for part in parts if part.name.startswith(("decode_head", "auxiliary_head")))
    body = keras_convnext.load(
        "test_convnext2", weights=None, include_top=False, pyramid_norms=True, input_shape=(128, 128, 3)
    )
    model = segmentation.with_auxiliary(segmentation.UPerNet(body, classes, 32))
    images = torch.rand(2, 128, 128, 3) * 255
    maps = body(images, training=True)
    heads_alone = keras.Model(
        [body.output[f"P{level}"] for level in (2, 3, 4, 5)] + [body.input], model.output
    )
    kept = {}

    def note(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    owned = {weight.value.data_ptr() for weight in model.weights}
    inputs = [maps[f"P{level}"].detach().requires_grad_() for level in (2, 3, 4, 5)] + [images]
    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        outputs = heads_alone(inputs, training=True)
        labels = torch.zeros(2, 128, 128, dtype=torch.int32)
        loss = sum(SegmentationLoss()(labels, outputs[name]) for name in outputs)
        found = sum(size for place, size in kept.items() if place not in owned)
    assert loss.requires_grad
    assert expected == pytest.approx(found, rel=0.3)


@pytest.mark.once
def test_accumulation_fills_what_memory_does_not_hold():
    recipe = load_recipe("imagenet1k_convnext_base", {"accumulation_steps": "1"})
    plan = make_plan(recipe, "2xv100")
    assert plan.fits and plan.accumulation_steps == plan.smallest_accumulation_steps > 1
    assert plan.images_per_device * 2 * plan.accumulation_steps == 4096
    ample = make_plan(recipe, "128xh200")
    assert ample.accumulation_steps == 1 and ample.images_per_device == 32
    assert "does not fit: --set accumulation_steps=" in dict(describe(plan))[""]
    never = make_plan(load_recipe("imagenet22k_convnext_xlarge", {"image_size": "2048"}), "1xl4")
    assert not never.fits and "MORE than 90% of it" in dict(describe(never))["memory"]


@pytest.mark.once
def test_a_huge_batch_is_answered_at_once():
    plan = make_plan(load_recipe("smoke", {"batch_size": str(2**31 - 1)}), "1xcpu")
    assert plan.fits and plan.images_per_device * plan.accumulation_steps == 2**31 - 1


@pytest.mark.once
def test_fewer_images_than_a_batch_are_told():
    few = dict(describe(make_plan(load_recipe("smoke", {"batch_size": 2048}), "1xcpu")))
    assert "`train` refuses fewer images than a batch of 2048" in few[""]
    assert "" not in dict(describe(make_plan(load_recipe("smoke"), "1xcpu")))


@pytest.mark.once
@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--devices", "8xh10"], r"such as 64xh100, received '8xh10'\. Did you mean 'h100'"),
        (["--devices", "v5e"], r"received 'v5e'\. Did you mean 'tpu-v5e'"),
        (["--devices", "0xh100"], r"at least one device, such as 8xh100, received '0xh100'"),
        (["--devices", "7xh100"], r"7 equal parts.*received 64\. The nearest are 63 and 70\."),
        (["--devices", "8xh100", "--engine", "none"], r"one device for engine 'none', received 8\."),
        (["--devices", "6xh100", "--engine", "model_parallel", "--set", "distribution.model_devices=4"],
         r"to divide the 6 devices, received 4\. Choose one of 1, 2, 3, 6\."),
        (["--devices", "h100", "--engine", "data_paralel"], r"did you mean 'data_parallel'"),
        (["--devices", "8xcpu", "--set", "batch_size=999999999999999999999999999999"],
         r"batch_size: expected at most 9,007,\S+, received 9999999"),
        (["--devices", "8xcpu", "--set", "batch_size=9007199254740992"], r"size: expected at most 2,147"),
        (["--devices", f"{10**20}xh100", "--engine", "model_parallel"], r"such as 64xh100, received '10000"),
        (["--devices", "9" * 5000 + "xh100"], r"devices such as 64xh100, received '9999.*\.\.\."),
        (["--devices", "999999999xcpu", "--set", "batch_size=7"], r"into 999999999 equal parts"),
        (["--devices", "cpu", "--set", "epochs=" + "9" * 400], r"epochs: expected at most 9,007,\S+, r"),
        (["--devices", "h100", "--fraction", "0"], r"fraction above 0 and at most 1.*received 0\.0"),
    ],
)  # fmt: skip
def test_mistakes_are_named(refused, words, message):
    assert re.search(message, refused("plan", "smoke", *words))


@pytest.mark.once
def test_the_command_answers_without_a_backend(run):
    words = ["plan", "imagenet1k_convnext_tiny", "--devices", "64xh100", "--set", "accumulation_steps=1"]
    words += ["--engine", "data_parallel"]  # without it, the engine of KERAS_BACKEND
    code, out, _ = run(*words)
    assert code == 0
    for text in (
        "64 x h100, engine data_parallel", "64 images through a device at once", "312 an epoch of 1,281,167",
        "gradients: 114.4 MB among 64 devices, once a step; 225.1 MB sent by each",
    ):  # fmt: skip
        assert text in out
    code, out, _ = run(*words, "--json")
    facts = json.loads(out)
    assert (code, facts["images_per_device"], facts["steps_per_epoch"]) == (0, 64, 312)
    assert facts["exchanges"][0]["wire_bytes"] == 2 * 63 * 28_589_128 * 4 // 64
    script = f"import sys, keras_convnext_main; sys.argv = ['keras-convnext', *{words}]\n"
    script += "keras_convnext_main.main(); print('keras' in sys.modules)"
    assert run_child("-c", script).splitlines()[-1] == "False"
