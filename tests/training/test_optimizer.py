"""AdamW, its schedule and its averages: step by step against PyTorch, and as a plain Keras optimizer."""

import dataclasses
import functools
import json
import math
import subprocess
import sys

import keras
import numpy as np
import peers
import pytest
import timm
import torch
from keras import ops
from timm.loss import SoftTargetCrossEntropy
from timm.optim import param_groups_layer_decay
from timm.utils import ModelEmaV3

import keras_convnext
from keras_convnext.training.layer_decay import LAYER_DECAY_GROUPS, layer_ids, learning_rate_scales
from keras_convnext.training.optimizer import AdamW, ema_weights
from keras_convnext.training.schedule import WarmupCosine, WarmupLinear
from keras_convnext.variants import VARIANTS
from keras_convnext.weights import assign, layouts

STEPS, ACCUMULATION, MICRO_BATCH, CLASSES = 20, 2, 4, 11
PEAK, WARMUP, END, WEIGHT_DECAY, LAYER_DECAY, EMA_DECAY = 4e-3, 5, 1e-6, 0.3, 0.7, 0.9
CLIP = 6.0  # between the gradient norms of the run: some steps are clipped
LOSS_TOLERANCE = 1e-5  # relative; measured 4e-7, and 5e-4 for the mildest fault
WEIGHT_TOLERANCE = 2e-5  # of the largest weight of each tensor


# --- Layer numbers -----------------------------------------------------------------------------------------

# What the functions of the official repositories return, and timm's group_parameters: the stem, the three
# other downsamplings, the blocks of each stage, the rest. The sizes of the stages are those of the model.
TINY_GROUPS = ((1,) * 3, (2,) * 3, (3, 3, 3, 4, 4, 4, 5, 5, 5))
BASE_GROUPS = (
    (1,) * 3,
    (2,) * 3,
    (3, 3, 3, 4, 4, 4, 5, 5, 5, 6, 6, 6, 7, 7, 7, 8, 8, 8, 9, 9, 9, 10, 10, 10, 11, 11, 11),
)
ATTO_GROUPS = ((1,) * 2, (2,) * 2, (3, 3, 3, 4, 4, 4))
TINY_SINGLE = ((1, 2, 3), (4, 5, 6), (7, 8, 9, 10, 11, 12, 13, 14, 15), (16, 17, 18))
BASE_SINGLE = ((1, 2, 3), (4, 5, 6), tuple(range(7, 34)), (34, 35, 36))
ATTO_SINGLE = ((1, 2), (3, 4), (5, 6, 7, 8, 9, 10), (11, 12))
IDS = {
    ("convnext_tiny", "group"): (0, (2, 3, 12), (*TINY_GROUPS, (12,) * 3), 13),
    ("convnext_tiny", "single"): (1, (4, 7, 16), TINY_SINGLE, 19),
    ("convnext_tiny", "layer_wise"): (0, (2, 3, 6), (*TINY_GROUPS, (6,) * 3), 7),
    ("convnext_tiny", "stage_wise"): (0, (0, 0, 0), ((1,) * 3, (2,) * 3, (3,) * 9, (4,) * 3), 7),
    ("convnext_tiny", "timm"): (0, (4, 7, 16), TINY_SINGLE, 19),
    ("convnext_base", "group"): (0, (2, 3, 12), (*BASE_GROUPS, (12,) * 3), 13),
    ("convnext_base", "single"): (1, (4, 7, 34), BASE_SINGLE, 37),
    ("convnext_base", "layer_wise"): (0, (2, 3, 12), (*BASE_GROUPS, (12,) * 3), 13),
    ("convnext_base", "stage_wise"): (0, (0, 0, 0), ((1,) * 3, (2,) * 3, (3,) * 27, (4,) * 3), 13),
    ("convnext_base", "timm"): (0, (4, 7, 34), BASE_SINGLE, 37),
    ("convnextv2_atto", "group"): (0, (2, 3, 12), (*ATTO_GROUPS, (12,) * 2), 13),
    ("convnextv2_atto", "single"): (1, (3, 5, 11), ATTO_SINGLE, 13),
    ("convnextv2_atto", "layer_wise"): (0, (2, 3, 6), (*ATTO_GROUPS, (6,) * 2), 7),
    ("convnextv2_atto", "stage_wise"): (0, (0, 0, 0), ((1,) * 2, (2,) * 2, (3,) * 6, (4,) * 2), 7),
    ("convnextv2_atto", "timm"): (0, (3, 5, 11), ATTO_SINGLE, 13),
}


def official_id(name, groups, depths):
    """The layer number of a weight by its official name, in words of our own (optim_factory.py of V1 and V2,
    mmcv_custom/layer_decay_optimizer_constructor.py)."""
    words = name.split(".")
    part, stage = words[0], int(words[1]) if words[1].isdigit() else None
    largest = 12 if groups == "group" or depths[2] > 9 else 6
    if part not in ("downsample_layers", "stages"):
        return sum(depths) + 1 if groups == "single" else largest + 1
    if groups == "single":
        return sum(depths[:stage]) + 1 + (int(words[2]) if part == "stages" else 0)
    if groups == "stage_wise":
        return stage + 1 if part == "stages" else 0
    if part == "downsample_layers":
        return [0, 2, 3, largest][stage]
    return [1, 2, 3 + int(words[2]) // 3, largest][stage]


def path_of(name):
    """The path of a weight of a Keras model by its official name."""
    *layer, last = name.split(".")
    if layer[0] in ("stages", "downsample_layers"):
        layer = ["_".join(layer[:3]), *layer[3:]]
    if last == "weight":
        last = "gamma" if layer[-1].startswith(("norm", "downsample_layers_0_1")) else "kernel"
    return "/".join([*layer, last])


@pytest.mark.once
@pytest.mark.parametrize(("architecture", "groups"), IDS)
def test_every_weight_has_the_layer_number_of_the_official_code(architecture, groups):
    variant = VARIANTS[architecture]
    names = list(layouts.weight_shapes(variant))
    stem, downsamplings, stages, rest = IDS[architecture, groups]
    expected = []
    for name in names:
        words = name.split(".")
        if words[0] == "downsample_layers":
            expected.append((stem, *downsamplings)[int(words[1])])
        elif words[0] == "stages":
            expected.append(stages[int(words[1])][int(words[2])])
        else:
            expected.append(rest)
    paths = [path_of(name) for name in names]
    assert layer_ids(paths, groups)[0] == expected
    assert layer_ids([f"{architecture}/{path}" for path in paths], groups)[0] == expected  # a nested model
    if groups != "timm":
        assert expected == [official_id(name, groups, variant.depths) for name in names]
        return
    with torch.device("meta"):
        peer = timm.create_model(architecture)
    numbers = timm.models.group_parameters(peer, peer.group_matcher(), reverse=True)
    renamed = [layouts.rename(name, "timm") for name in names]
    assert set(renamed) == set(numbers)
    assert expected == [numbers[name] for name in renamed]


@pytest.mark.once
def test_heads_and_pyramid_norms_train_at_the_full_rate_and_timm_puts_norm_pre_with_the_last_block():
    paths = ["downsample_layers_0_0/kernel", *(f"stages_{stage}_0/norm/beta" for stage in range(4))]
    paths += ["norm0/gamma", "norm_pre/gamma", "pre_logits/kernel", "my_head/kernel"]
    for groups in LAYER_DECAY_GROUPS:
        scales = learning_rate_scales(paths, groups, 0.5)
        assert scales[-4] == scales[-2] == scales[-1] == 1
        assert scales[-3] == (0.5 if groups == "timm" else 1)
        assert scales[0] == min(scales) < 0.1


@pytest.mark.once
def test_frozen_first_stages_leave_the_scales_of_the_others():
    names = layouts.weight_shapes(VARIANTS["convnext_tiny"])
    paths = [path_of(name) for name in names]
    later = [
        path
        for path in paths
        if not path.startswith(("downsample_layers_0", "downsample_layers_1", "stages_0", "stages_1"))
    ]
    for groups in LAYER_DECAY_GROUPS:
        scales = dict(zip(paths, learning_rate_scales(paths, groups, 0.8), strict=True))
        assert learning_rate_scales(later, groups, 0.8) == [scales[path] for path in later]


# --- Parity, step by step ----------------------------------------------------------------------------------


@dataclasses.dataclass
class Run:
    losses: list  # of each micro-batch
    weights: list  # after each optimizer step: {official name: array}
    averages: list


@functools.cache
def data():
    """Images and soft targets, as mixup and label smoothing make them: (micro-batches, N, ...)."""
    generator = np.random.default_rng(0)
    count = STEPS * ACCUMULATION
    images = generator.normal(size=(count, MICRO_BATCH, 32, 32, 3)).astype("float32")
    labels = np.eye(CLASSES)[generator.integers(CLASSES, size=(2, count, MICRO_BATCH))]
    share = generator.beta(0.8, 0.8, size=(count, 1, 1))
    targets = (share * labels[0] + (1 - share) * labels[1]) * 0.9 + 0.1 / CLASSES
    return images, targets.astype("float32")


def official_schedule():
    """V1's per-step schedule, in float64."""
    steps = np.arange(STEPS - WARMUP)
    cosine = END + 0.5 * (PEAK - END) * (1 + np.cos(math.pi * steps / len(steps)))
    return np.concatenate([np.linspace(0, PEAK, WARMUP), cosine])


def official_param_groups(model, groups, depths, *, decay_biases=False, last_id_error=0):
    """One group a parameter, of timm's form: lr_scale and weight_decay."""
    last = official_id("head.weight", groups, depths) + last_id_error
    result = []
    for name, parameter in model.named_parameters():
        decays = parameter.ndim > 1 and not name.endswith((".bias", ".gamma", ".beta"))
        decays = decays or (decay_biases and name.endswith(".bias"))
        scale = LAYER_DECAY ** (last - official_id(name, groups, depths))
        group = {"params": [parameter], "lr_scale": scale, "weight_decay": WEIGHT_DECAY if decays else 0.0}
        result.append(group)
    return result


def train_peer(model, param_groups, canonical=lambda state: state):
    """The loop of the official code: engine.py with update_freq 2, in PyTorch."""
    optimizer = torch.optim.AdamW(param_groups, lr=PEAK, betas=(0.9, 0.999), eps=1e-8)
    average = ModelEmaV3(model, decay=EMA_DECAY)
    criterion = SoftTargetCrossEntropy()
    run = Run([], [], [])

    def arrays(module):
        return canonical({name: value.numpy().copy() for name, value in module.state_dict().items()})

    clipped = []
    for number, (images, targets) in enumerate(zip(*data(), strict=True)):
        loss = criterion(model(torch.from_numpy(images).permute(0, 3, 1, 2)), torch.from_numpy(targets))
        run.losses.append(loss.item())
        (loss / ACCUMULATION).backward()
        if (number + 1) % ACCUMULATION:
            continue
        clipped.append(torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP).item() > CLIP)
        for group in optimizer.param_groups:
            group["lr"] = official_schedule()[number // ACCUMULATION] * group["lr_scale"]
        optimizer.step()
        optimizer.zero_grad()
        average.update(model)
        run.weights.append(arrays(model))
        run.averages.append(arrays(average.module))
    assert any(clipped) and not all(clipped)
    return run


def parity_optimizer(groups):
    return AdamW(
        WarmupCosine(PEAK, STEPS, WARMUP, end=END),
        WEIGHT_DECAY,
        layer_decay=LAYER_DECAY,
        layer_decay_groups=groups,
        global_clipnorm=CLIP,
        use_ema=True,
        ema_momentum=EMA_DECAY,
        gradient_accumulation_steps=ACCUMULATION,
    )


def differences(ours, theirs):
    """Largest relative loss difference, and largest difference of weights and averages over their size."""
    losses = max(abs(a / b - 1) for a, b in zip(ours.losses, theirs.losses, strict=True))

    def largest(mine, others):
        return max(
            peers.relative_error(state[name].reshape(expected.shape), expected)
            for state, other in zip(mine, others, strict=True)
            for name, expected in other.items()
        )

    return losses, largest(ours.weights, theirs.weights), largest(ours.averages, theirs.averages)


def check(ours, theirs):
    losses, weights, averages = differences(ours, theirs)
    assert losses <= LOSS_TOLERANCE
    assert weights <= WEIGHT_TOLERANCE
    assert averages <= WEIGHT_TOLERANCE


def check_differs(ours, theirs):
    losses, weights, averages = differences(ours, theirs)
    assert losses > LOSS_TOLERANCE
    assert weights > WEIGHT_TOLERANCE
    assert averages > WEIGHT_TOLERANCE


def record(run, model):
    run.weights.append(assign.state_dict(model))
    with ema_weights(model):
        run.averages.append(assign.state_dict(model))


def load(architecture, state, folder):
    return keras_convnext.load(
        architecture,
        weights=peers.save(state, folder / f"{architecture}.safetensors"),
        classes=CLASSES,
        classifier_activation=None,
        include_preprocessing=False,
        input_shape=(32, 32, 3),
    )


SMALL = dataclasses.replace(VARIANTS["convnext_atto"], depths=(1, 1, 4, 1), dims=(8, 16, 24, 32))


@functools.cache
def official_peer():
    """V1 in PyTorch, and its weights before training."""
    peer = peers.randomise(peers.OfficialConvNeXt(SMALL, classes=CLASSES))
    return peer, {name: value.clone() for name, value in peer.state_dict().items()}


@functools.cache
def reference(groups, **faults):
    peer, state = official_peer()
    peer.load_state_dict(state)
    return train_peer(peer, official_param_groups(peer, groups, SMALL.depths, **faults))


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """A Keras model of the peer's weights, these weights, and a function (optimizer, x, y) -> loss."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(VARIANTS, SMALL.name, SMALL)
        model = load(SMALL.name, official_peer()[1], tmp_path_factory.mktemp("peer"))
        loss = keras.losses.CategoricalCrossentropy(from_logits=True)
        yield model, model.get_weights(), step_function(model, loss)


def step_function(model, loss_function):
    """A training step on the active backend, its gradients compiled once for all optimizers."""
    variables = model.trainable_variables
    backend = keras.backend.backend()
    if backend == "torch":

        def step(optimizer, images, targets):
            loss = loss_function(targets, model(images, training=True))
            model.zero_grad()
            loss.backward()
            optimizer.apply([variable.value.grad for variable in variables], variables)
            return float(loss)

    elif backend == "tensorflow":
        import tensorflow as tf

        @tf.function
        def gradients(images, targets):
            with tf.GradientTape() as tape:
                loss = loss_function(targets, model(images, training=True))
            return loss, tape.gradient(loss, [variable.value for variable in variables])

        def step(optimizer, images, targets):
            loss, values = gradients(images, targets)
            optimizer.apply(values, variables)
            return float(loss)

    else:
        import jax

        def compute(values, fixed, images, targets):
            return loss_function(targets, model.stateless_call(values, fixed, images, training=True)[0])

        quickly = {"xla_backend_optimization_level": 0}  # compiled in two thirds of the time
        gradients = jax.jit(jax.value_and_grad(compute), compiler_options=quickly)
        first = parity_optimizer("group")
        first.build(variables)

        # Compiled once for all groupings: the scales are an argument, not constants.
        @functools.partial(jax.jit, compiler_options=quickly)
        def apply(scales, state, slopes, values):
            first._scales = scales
            return first.stateless_apply(state, slopes, values)

        def step(optimizer, images, targets):
            if not optimizer.built:
                optimizer.build(variables)
            values = [variable.value for variable in variables]
            fixed = [variable.value for variable in model.non_trainable_variables]
            loss, slopes = gradients(values, fixed, images, targets)
            state = [variable.value for variable in optimizer.variables]
            values, state = apply(optimizer._scales, state, slopes, values)
            for variable, value in zip((*variables, *optimizer.variables), (*values, *state), strict=True):
                variable.assign(value)
            return float(loss)

    return step


OTHERS = {"group": "single", "single": "layer_wise", "layer_wise": "stage_wise", "stage_wise": "group"}


@pytest.mark.parametrize(
    "groups",
    [
        "layer_wise",
        *(pytest.param(name, marks=pytest.mark.one_backend) for name in ("group", "single", "stage_wise")),
    ],
)
def test_every_step_equals_the_official_loop(small, groups):
    model, weights, step = small
    model.set_weights(weights)
    model.optimizer = parity_optimizer(groups)
    ours = Run([], [], [])
    for number, (images, targets) in enumerate(zip(*data(), strict=True)):
        ours.losses.append(step(model.optimizer, images, targets))
        if (number + 1) % ACCUMULATION == 0:
            record(ours, model)
    check(ours, reference(groups))
    wrong = [reference(OTHERS[groups])]
    if groups == "group":
        wrong += [reference(groups, decay_biases=True), reference(groups, last_id_error=1)]
    for run in wrong:
        check_differs(ours, run)


@pytest.mark.one_backend
def test_compile_and_train_equal_a_loop_of_timm(tmp_path, monkeypatch):
    variant = dataclasses.replace(VARIANTS["convnextv2_atto"], depths=(1, 1, 1, 1), dims=(8, 16, 24, 32))
    monkeypatch.setitem(VARIANTS, variant.name, variant)
    peer = timm.create_model(variant.name, depths=variant.depths, dims=variant.dims, num_classes=CLASSES)
    peers.randomise(peer)
    state = {name: value.clone() for name, value in peer.state_dict().items()}
    model = load(variant.name, state, tmp_path)
    loss = keras.losses.CategoricalCrossentropy(from_logits=True)
    # XLA would take TensorFlow a minute here; the tests below are compiled with it.
    model.compile(parity_optimizer("timm"), loss, jit_compile=keras.backend.backend() == "jax")
    ours = Run([], [], [])
    for number, (images, targets) in enumerate(zip(*data(), strict=True)):
        ours.losses.append(float(model.train_on_batch(images, targets)))
        if (number + 1) % ACCUMULATION == 0:
            record(ours, model)
    for states in (ours.weights, ours.averages):
        states[:] = [{layouts.rename(name, "timm"): state[name] for name in state} for state in states]

    groups = param_groups_layer_decay(peer, WEIGHT_DECAY, layer_decay=LAYER_DECAY)
    check(ours, train_peer(peer, groups))
    peer.load_state_dict(state)
    for group in groups:
        group["weight_decay"] = WEIGHT_DECAY
    check_differs(ours, train_peer(peer, groups))


# --- One step ----------------------------------------------------------------------------------------------


def variables_of(values, dtype="float32"):
    return [keras.Variable(value, dtype=dtype, name=name) for name, value in values.items()]


def arrays(variables):
    return [np.array(ops.convert_to_numpy(variable)) for variable in variables]


@pytest.mark.parametrize("whole", [True, False], ids=["all variables at once", "update_step"])
def test_gradients_of_1e_8_move_weights_as_in_torch(whole):
    generator = np.random.default_rng(0)
    values = {"kernel": generator.normal(size=(7, 5)).astype("float32"), "bias": np.ones(5, "float32")}
    gradients = [[generator.normal(size=v.shape) * 1e-8 for v in values.values()] for _ in range(5)]
    gradients = [[slope.astype("float32") for slope in slopes] for slopes in gradients]
    peer = [torch.nn.Parameter(torch.tensor(value)) for value in values.values()]
    groups = [{"params": peer[:1], "weight_decay": 0.1}, {"params": peer[1:], "weight_decay": 0.0}]
    reference = torch.optim.AdamW(groups, lr=1e-2, eps=1e-8)
    optimizer = AdamW(1e-2, 0.1)
    theirs = keras.optimizers.AdamW(1e-2, 0.1, epsilon=1e-8)
    theirs.exclude_from_weight_decay(var_names=["bias"])
    variables, others = variables_of(values), variables_of(values)
    optimizer.build(variables)
    for slopes in gradients:
        tensors = [ops.convert_to_tensor(slope) for slope in slopes]
        if whole:
            optimizer.apply(tensors, variables)
        else:
            for slope, variable in zip(tensors, variables, strict=True):
                optimizer.update_step(slope, variable, optimizer.learning_rate)
            optimizer._iterations.assign_add(1)
        theirs.apply(tensors, others)
        for parameter, slope in zip(peer, slopes, strict=True):
            parameter.grad = torch.from_numpy(slope)
        reference.step()
    expected = [parameter.detach().numpy() for parameter in peer]
    # of a weight near 1 after five steps of up to 1e-2
    for ours, correct in zip(arrays(variables), expected, strict=True):
        np.testing.assert_allclose(ours, correct, rtol=0, atol=3e-7)
    assert max(np.abs(a - b).max() for a, b in zip(arrays(others), expected, strict=True)) > 1e-3


def test_only_kernels_decay_and_exclusions_of_keras_still_hold():
    names = ("kernel", "lora_kernel_a", "my_kernel", "other", "bias", "gamma", "beta")
    shapes = dict.fromkeys(names, (1, 1, 1, 3)) | {"scale": (3,)}
    variables = variables_of({name: np.ones(shape, "float32") for name, shape in shapes.items()})
    optimizer = AdamW(0.5, 0.2, clipvalue=1.0)
    optimizer.exclude_from_weight_decay(var_list=[variables[3]], var_names=["my_"])
    optimizer.apply([ops.zeros(shape) for shape in shapes.values()], variables)
    left = {name: float(value.max()) for name, value in zip(shapes, arrays(variables), strict=True)}
    assert left == pytest.approx(dict.fromkeys(shapes, 1.0) | {"kernel": 0.9, "lora_kernel_a": 0.9})


def test_the_scale_multiplies_rate_and_decay():
    paths = ["stages_3_0", "head"]
    optimizer = AdamW(0.5, 0.2, layer_decay=0.5)
    model = keras.Sequential([keras.Input((1,)), *(keras.layers.Dense(1, name=name) for name in paths)])
    model.set_weights([np.ones(weight.shape) for weight in model.weights])
    optimizer.apply([ops.zeros(weight.shape) for weight in model.weights], model.trainable_variables)
    values = [value.item() for value in arrays(model.weights)]
    np.testing.assert_allclose(values, [0.95, 1, 0.9, 1], rtol=1e-6)


@pytest.mark.parametrize("largest", [0.1, 10.0])
def test_clipping_is_that_of_torch(largest):
    slopes = [np.full((2, 3), 0.3, "float32"), np.full(4, -0.5, "float32")]
    peer = [torch.nn.Parameter(torch.zeros(slope.shape)) for slope in slopes]
    for parameter, slope in zip(peer, slopes, strict=True):
        parameter.grad = torch.tensor(slope)
    torch.nn.utils.clip_grad_norm_(peer, largest)
    clipped = AdamW(global_clipnorm=largest)._clip_gradients(
        [ops.convert_to_tensor(slope) for slope in slopes]
    )
    for ours, parameter in zip(clipped, peer, strict=True):
        np.testing.assert_allclose(ops.convert_to_numpy(ours), parameter.grad.numpy(), rtol=1e-6)


@pytest.mark.skipif(keras.backend.backend() != "tensorflow", reason="only TensorFlow has sparse gradients")
def test_sparse_gradients_of_an_embedding_train():
    import tensorflow as tf

    table = keras.Variable(np.ones((4, 2), "float32"), name="embeddings")
    slopes = tf.IndexedSlices(tf.ones((1, 2)), tf.constant([2]), tf.constant([4, 2]))
    AdamW(0.1, 0.0, global_clipnorm=1.0).apply([slopes], [table])
    np.testing.assert_allclose(table.numpy(), [[1, 1], [1, 1], [0.9, 0.9], [1, 1]], rtol=1e-6)


# --- Averages, accumulation, saving, through Keras's own training ----------------------------------------


def tiny(optimizer):
    """Three dense layers with the names of a ConvNeXt's."""
    keras.utils.set_random_seed(0)
    names = ("downsample_layers_0_0", "stages_2_4", "head")
    model = keras.Sequential([keras.Input((6,)), *(keras.layers.Dense(4, name=name) for name in names)])
    model.compile(optimizer, "mse")
    return model


X = np.random.default_rng(0).normal(size=(10, 8, 6)).astype("float32")
Y = np.random.default_rng(1).normal(size=(10, 8, 4)).astype("float32")


def averages(model):
    with ema_weights(model):
        return model.get_weights()


def assert_equal(some, others):
    for one, other in zip(some, others, strict=True):
        np.testing.assert_array_equal(one, other)


def schedule():
    return WarmupCosine(0.1, 8, 2, start=0.02)


def complete_optimizer():
    return AdamW(
        schedule(),
        0.1,
        layer_decay=0.7,
        global_clipnorm=1.0,
        use_ema=True,
        ema_momentum=0.8,
        gradient_accumulation_steps=2,
        overwrite_after_fit=False,
    )


@pytest.fixture(scope="module")
def trained():
    """A model after three micro-batches, half through an accumulation, and its states on the way."""
    model = tiny(complete_optimizer())
    states = [(model.get_weights(), None, None)]
    for x, y in zip(X[:3], Y[:3], strict=True):
        model.train_on_batch(x, y)
        states.append((model.get_weights(), averages(model), float(model.optimizer.learning_rate)))
    return model, states


def test_averages_start_at_the_weights_and_follow_once_an_optimizer_step(trained):
    states = trained[1]
    start, first = states[0][0], states[2][0]
    assert_equal(states[1][0], start)
    assert_equal(states[1][1], start)
    assert all(np.abs(a - b).max() > 1e-5 for a, b in zip(start, first, strict=True))
    expected = [0.8 * a + 0.2 * b for a, b in zip(start, first, strict=True)]
    for average, correct in zip(states[2][1], expected, strict=True):
        np.testing.assert_allclose(average, correct, rtol=0, atol=1e-7)
    assert_equal(states[3][1], states[2][1])
    assert_equal(states[3][0], first)


def test_the_schedule_counts_optimizer_steps(trained):
    rates = [rate for _, _, rate in trained[1][1:]]
    assert rates == pytest.approx([0.02, 0.1, 0.1])


def test_a_saved_model_goes_on_as_if_it_had_not_been_saved(trained, tmp_path):
    model, _ = trained
    model.save(tmp_path / "model.keras")
    copy = keras.saving.load_model(tmp_path / "model.keras")
    assert copy.optimizer.get_config() == model.optimizer.get_config()
    assert_equal(copy.get_weights(), model.get_weights())
    assert_equal(averages(copy), averages(model))
    for x, y in zip(X[3:6], Y[3:6], strict=True):
        model.train_on_batch(x, y)
        copy.train_on_batch(x, y)
    assert_equal(copy.get_weights(), model.get_weights())
    assert_equal(averages(copy), averages(model))
    assert int(copy.optimizer.iterations) == 3


def test_ema_weights_gives_back_the_own_weights_also_after_an_error_and_within_fit():
    model = tiny(complete_optimizer())
    seen = []

    class Look(keras.callbacks.Callback):
        def on_train_batch_end(self, batch, logs=None):
            with ema_weights(self.model):
                inside = self.model.get_weights()
            seen.append((inside, self.model.get_weights()))

    x, y = X[:4].reshape(-1, 6), Y[:4].reshape(-1, 4)
    model.fit(x, y, batch_size=8, verbose=0, shuffle=False, callbacks=[Look()])
    inside, own = seen[-1]
    assert_equal(own, model.get_weights())  # fit did not put the averages into the model
    assert_equal(inside, averages(model))
    assert all(np.abs(a - b).max() > 1e-4 for a, b in zip(inside, own, strict=True))

    plain = tiny(complete_optimizer())
    plain.fit(x, y, batch_size=8, verbose=0, shuffle=False)
    assert_equal(plain.get_weights(), own)  # looking changes nothing

    with pytest.raises(KeyboardInterrupt), ema_weights(model):
        assert_equal(model.get_weights(), inside)
        model.evaluate(x, y, verbose=0)
        raise KeyboardInterrupt
    assert_equal(model.get_weights(), own)
    assert_equal(averages(model), inside)


def test_fit_ends_with_the_averages_in_the_model_as_in_keras():
    model = tiny(AdamW(0.1, use_ema=True, ema_momentum=0.5))
    model.fit(X[0], Y[0], batch_size=8, verbose=0)
    assert_equal(model.get_weights(), averages(model))


def test_a_model_compiled_by_xla_has_averages():
    model = tiny(AdamW(0.01, use_ema=True, ema_momentum=0.8, overwrite_after_fit=False))
    start = model.get_weights()
    model.jit_compile = keras.backend.backend() != "torch"
    model.fit(X[0], Y[0], batch_size=8, verbose=0)
    for average, old, new in zip(averages(model), start, model.get_weights(), strict=True):
        np.testing.assert_allclose(average, 0.8 * old + 0.2 * new, atol=1e-6)


def test_a_second_fit_goes_on_from_the_averages():
    """JAX gives the arrays of a step away: weights and averages must not be the same ones."""
    model = tiny(AdamW(0.01, use_ema=True, ema_momentum=0.8))
    for _ in range(2):
        model.fit(X[0], Y[0], epochs=2, verbose=0)
        assert_equal(model.get_weights(), averages(model))


def test_loss_scaling_skips_a_step_that_overflows_and_its_average():
    previous = keras.config.dtype_policy()
    keras.config.set_dtype_policy("mixed_float16")
    model = tiny(AdamW(1e-2, use_ema=True, ema_momentum=0.5, layer_decay=0.9))
    keras.config.set_dtype_policy(previous)
    assert isinstance(model.optimizer, keras.optimizers.LossScaleOptimizer)
    model.train_on_batch(X[0], Y[0])
    own, average = model.get_weights(), averages(model)
    assert_equal(own, model.get_weights())
    assert all(np.abs(a - b).max() > 1e-4 for a, b in zip(own, average, strict=True))
    scale = float(model.optimizer.dynamic_scale)
    model.train_on_batch(np.full((8, 6), 6e4, "float32"), Y[0])
    assert float(model.optimizer.dynamic_scale) == scale / 2
    assert_equal(own, model.get_weights())
    assert_equal(average, averages(model))
    assert int(model.optimizer.iterations) == 1
    model.train_on_batch(X[0], Y[0])
    assert int(model.optimizer.iterations) == 2


@pytest.mark.once
def test_configurations_come_back():
    optimizer = complete_optimizer()
    copy = keras.optimizers.deserialize(keras.optimizers.serialize(optimizer))
    assert type(copy) is AdamW
    assert copy.get_config() == optimizer.get_config()
    assert copy._learning_rate.get_config() == schedule().get_config()
    assert AdamW(gradient_accumulation_steps=1).gradient_accumulation_steps is None


# --- Schedule ----------------------------------------------------------------------------------------------


def rates(schedule, steps):
    return np.array([float(ops.convert_to_numpy(schedule(ops.convert_to_tensor(int(i))))) for i in steps])


def test_the_schedule_equals_v1_to_float32_over_a_whole_training():
    peak, total, warmup = 4e-3, 375_300, 25_020  # 300 epochs of 1251 steps, 20 of warmup
    steps = np.arange(total - warmup)
    cosine = 1e-6 + 0.5 * (peak - 1e-6) * (1 + np.cos(math.pi * steps / (total - warmup)))
    expected = np.append(np.concatenate([np.linspace(0, peak, warmup), cosine]), 1e-6)
    chosen = [0, 1, 2, warmup - 1, warmup, warmup + 1, 200_000, 374_000, total - 30, total - 1, total]
    ours = rates(WarmupCosine(peak, total, warmup), chosen)
    np.testing.assert_allclose(ours, expected[chosen], rtol=3e-7)
    np.testing.assert_allclose(rates(WarmupCosine(peak, total, warmup), [10 * total]), [1e-6], rtol=1e-7)
    naive = np.float32(
        1 + np.cos(np.float32(math.pi) * np.float32(374_000 - warmup) / np.float32(total - warmup))
    )
    naive = 1e-6 + 0.5 * (peak - 1e-6) * naive
    assert abs(naive / expected[374_000] - 1) > 3e-7  # what the squared sine is for


@pytest.mark.once
def test_the_schedule_equals_v2():
    peak, end, epochs, warmup, length = 8e-4, 1e-6, 6, 2, 5

    def official(step):
        epoch = step / length
        if epoch < warmup:
            return peak * epoch / warmup
        return end + (peak - end) * 0.5 * (1 + math.cos(math.pi * (epoch - warmup) / (epochs - warmup)))

    schedule = WarmupCosine(peak, epochs * length, warmup * length, end=end, warmup_includes_peak=False)
    expected = [official(step) for step in range(epochs * length)]
    np.testing.assert_allclose(rates(schedule, range(epochs * length)), expected, rtol=1e-6)


@pytest.mark.once
def test_the_schedule_equals_torchvision_one_rate_an_epoch():
    peak, epochs, warmup, length = 1e-3, 8, 3, 4
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=peak)
    parts = [
        torch.optim.lr_scheduler.LinearLR(optimizer, start_factor=0.01, total_iters=warmup),
        torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=epochs - warmup, eta_min=0.0),
    ]
    peer = torch.optim.lr_scheduler.SequentialLR(optimizer, parts, milestones=[warmup])
    expected = []
    for _ in range(epochs):
        expected += length * [optimizer.param_groups[0]["lr"]]
        optimizer.step()
        peer.step()
    schedule = WarmupCosine(
        peak,
        epochs * length,
        warmup * length,
        start=0.01 * peak,
        end=0.0,
        warmup_includes_peak=False,
        hold_steps=length,
    )
    np.testing.assert_allclose(rates(schedule, range(epochs * length)), expected, rtol=1e-6)
    assert len(set(expected)) == epochs


@pytest.mark.once
def test_schedules_of_one_step_and_of_warmup_alone():
    assert rates(WarmupCosine(0.1, 1, end=0.0), [0, 1]) == pytest.approx([0.1, 0])
    assert rates(WarmupCosine(0.1, 2, 2, end=0.0), [0, 1, 2]) == pytest.approx([0, 0.1, 0])
    assert rates(WarmupCosine(0.1, 2, 1, start=0.05, end=0.0), [0, 1]) == pytest.approx([0.05, 0.1])


def test_the_straight_line_is_mmcvs_with_its_warmup():
    """mmcv 1.x: get_warmup_lr takes the line's rate of the iteration times 1 - k, as a recurrence has it."""
    peak, total, warmup, ratio = 1e-4, 160_000, 1500, 1e-6
    steps = [0, 1, 749, 1499, 1500, 1501, 80_000, 159_999, 160_000, 200_000]
    expected = []
    for step in steps:
        regular = peak * (1 - min(step, total) / total) ** 1.0  # PolyLrUpdaterHook, power 1, min_lr 0
        k = (1 - step / warmup) * (1 - ratio)
        expected.append(regular * (1 - k) if step < warmup else regular)
    found = rates(WarmupLinear(peak, total, warmup, start=peak * ratio), steps)
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-12)
    without = rates(WarmupLinear(peak, total), steps)
    assert without[1] == pytest.approx(peak, rel=1e-4) and found[1] < 0.01 * peak
    assert rates(WarmupLinear(0.1, 4, end=0.02), [0, 2, 4, 9]) == pytest.approx([0.1, 0.06, 0.02, 0.02])
    copy = WarmupLinear.from_config(WarmupLinear(peak, total, warmup).get_config())
    assert (copy.peak, copy.total_steps, copy.warmup_steps) == (peak, total, warmup)
    with pytest.raises(ValueError, match=r"WarmupLinear needs warmup_steps <= total_steps"):
        WarmupLinear(0.1, 4, 5)


# --- Errors ------------------------------------------------------------------------------------------------


@pytest.mark.once
@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: WarmupCosine(-1.0, 5), ValueError, "needs peak >= 0, and finite. Received: peak=-1.0"),
        (lambda: WarmupCosine("high", 5), TypeError, "needs a number for peak. Received: peak='high'"),
        (
            lambda: WarmupCosine(0.1, 5.0),
            TypeError,
            "needs an integer for total_steps. Received: total_steps=5.0",
        ),
        (lambda: WarmupCosine(0.1, 0), ValueError, "needs total_steps >= 1. Received: total_steps=0"),
        (lambda: WarmupCosine(0.1, 5, hold_steps=0), ValueError, "hold_steps >= 1. Received: hold_steps=0"),
        (lambda: WarmupCosine(0.1, 5, 6), ValueError, "Received: warmup_steps=6, total_steps=5"),
        (
            lambda: AdamW(weight_decay=-0.1),
            ValueError,
            "weight_decay >= 0, and finite. Received: weight_decay=-0.1",
        ),
        (lambda: AdamW(weight_decay=None), TypeError, "Received: weight_decay=None"),
        (lambda: AdamW(beta_1=1.0), ValueError, r"beta_1 in \[0, 1\). Received: beta_1=1.0"),
        (lambda: AdamW(epsilon=math.nan), ValueError, "Received: epsilon=nan"),
        (lambda: AdamW(layer_decay=0.0), ValueError, r"layer_decay in \(0, 1\].* Received: layer_decay=0.0"),
        (lambda: AdamW(layer_decay=1.1), ValueError, "Received: layer_decay=1.1"),
        (lambda: AdamW(layer_decay_groups="layerwise"), ValueError, "'layerwise'. Did you mean 'layer_wise'"),
        (
            lambda: layer_ids(["blocks_0/norm/gamma", "head/bias"], "group"),
            ValueError,
            "Set layer_decay=1.0.*blocks_0",
        ),
        (
            lambda: layer_ids(["stages_0_0/x", "stages_2_0/x", "stages_3_0/x"], "single"),
            ValueError,
            "stages_1_",
        ),
        (
            lambda: layer_ids(["stages_3_0/x"], "stage_wise"),
            ValueError,
            "stages_2_.*'group', which counts none",
        ),
    ],
)
def test_wrong_arguments_are_named(call, error, message):
    with pytest.raises(error, match=message):
        call()


@pytest.mark.once
def test_layer_decay_refuses_a_model_without_stages():
    model = keras.Sequential([keras.Input((2,)), keras.layers.Dense(1, name="head")])
    with pytest.raises(ValueError, match=r"four stages of a ConvNeXt.*Set layer_decay=1\.0.*head/kernel'"):
        AdamW(layer_decay=0.9).build(model.trainable_variables)


@pytest.mark.once
def test_ema_weights_names_what_is_missing():
    model = keras.Sequential([keras.Input((2,)), keras.layers.Dense(1)])
    with (
        pytest.raises(ValueError, match=r"AdamW\(..., use_ema=True\). Received: optimizer=None"),
        ema_weights(model),
    ):
        pass
    model.compile(AdamW(), "mse")
    with pytest.raises(ValueError, match="use_ema=True"), ema_weights(model):
        pass
    model.compile(AdamW(use_ema=True), "mse")
    with pytest.raises(ValueError, match=r"has no moving averages yet\. Train first"), ema_weights(model):
        pass


@pytest.mark.once
def test_a_saved_optimizer_is_found_by_the_import_of_the_package_alone():
    saved = keras.saving.serialize_keras_object(AdamW(WarmupCosine(1e-3, total_steps=9), layer_decay=0.9))
    code = "import json, sys, keras, keras_convnext\n"
    code += "found = keras.saving.deserialize_keras_object(json.loads(sys.argv[1]))\n"
    code += "print(type(found).__name__, found.layer_decay, type(found._learning_rate).__name__)"
    child = subprocess.run(
        [sys.executable, "-c", code, json.dumps(saved)], capture_output=True, text=True, check=False
    )
    assert child.stdout.splitlines()[-1:] == ["AdamW 0.9 WarmupCosine"], child.stderr
