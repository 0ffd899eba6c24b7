"""The road from ResNet-50 to ConvNeXt: its costs, its two ends, and the steps between them.

Numbers of the whole road are counted without Keras; that the count is of the models is tested on models.
"""

import functools
import itertools

import keras
import numpy as np
import pytest
import torch
import torchvision
from peers import randomise
from torch.nn import functional as F

import keras_convnext
from keras_convnext import predictor, roadmap
from keras_convnext.roadmap import MISFITS, STEPS, build, connect, cost
from keras_convnext.variants import VARIANTS
from keras_convnext.weights import assign
from keras_convnext.weights.resolve import resolve

# From ResNet-50, at 1000 classes: the first is torchvision's, the last ConvNeXt-T's; the others were counted
# from the paper's words by another program than this one.
WEIGHTS = (
    25_557_032, 25_557_032, 28_628_520, 28_622_184, 15_722_664, 33_761_032, 25_851_496, 25_625_512,
    25_720_744, 25_863_592, 26_054_056, 26_292_136, 25_863_592, 25_863_592, 25_797_352, 25_837_864,
    28_589_128,
)  # fmt: skip
# Of "atto" at 64 pixels and 200 classes, by the same other program: millions of multiply-adds.
ATTO = (46.0, 46.0, 49.2, 45.5, 25.6, 55.7, 47.2, 38.4, 39.1, 40.2, 41.6, 43.4, *[40.2] * 4, 44.7)

SIZE = (64, 64, 3)
TOLERANCE = 2e-5  # of the largest output


# Costs.


@pytest.mark.once
@pytest.mark.parametrize("regime", ["tiny", "base"])
def test_multiply_adds_are_the_printed_ones_but_for_the_two_that_are_named(regime):
    wrong = {
        (regime, row.name)
        for row in STEPS
        if round(cost(row.name, regime).multiply_adds / 1e9, 2) != row.published(regime)[1]
    }
    assert wrong == {misfit for misfit in MISFITS if misfit[0] == regime}


@pytest.mark.once
def test_the_two_misfits_are_what_the_next_step_has_and_what_nothing_has():
    computed = [round(cost(step).multiply_adds / 1e9, 2) for step in range(len(STEPS))]
    assert STEPS[15].gflops == computed[16] and STEPS[16].gflops not in computed


@pytest.mark.once
def test_weights_are_those_of_the_two_ends_and_of_the_other_count():
    assert tuple(cost(step).weights for step in range(len(STEPS))) == WEIGHTS
    for regime, end in roadmap.REGIMES.items():
        assert cost(16, regime).weights == VARIANTS[end].parameters
    assert [round(cost(step, "atto", 200, 64).multiply_adds / 1e6, 1) for step in range(17)] == [*ATTO]


@pytest.mark.once
def test_the_other_end_of_the_large_road_is_torchvisions_resnet_of_200_layers():
    with torch.device("meta"):
        peer = torchvision.models.ResNet(torchvision.models.resnet.Bottleneck, [3, 24, 36, 3])
    assert cost("ResNet", "base").weights == sum(parameter.numel() for parameter in peer.parameters())


@pytest.mark.once
@pytest.mark.parametrize("wrong", ["4 x the input's width", "stride in the first 1x1"])
def test_another_reading_of_the_paper_does_not_fit(wrong, monkeypatch):
    """The two mistakes that are made most: facts that tell the readings apart."""

    def other(make, x, name, design, width, stride):
        narrow = min(width, make.channels(x))
        y = make.conv(x, "", None, design.kernel_size, stride, depthwise=True)
        return roadmap._add(make, x, make.conv(make.conv(y, "", 4 * narrow), "", width), name, design, stride)

    def early(make, x, name, design, width, stride):
        y = make.conv(make.conv(x, "", width, stride=stride), "", width, 3)
        return roadmap._add(make, x, make.conv(y, "", 4 * width), name, design, stride)

    block, function, step, expected = {
        "4 x the input's width": ("moved up", other, 7, 3.80),
        "stride in the first 1x1": ("bottleneck", early, 0, 3.86),
    }[wrong]
    monkeypatch.setitem(roadmap.BLOCKS, block, function)
    assert round(cost(step).multiply_adds / 1e9, 2) == expected != STEPS[step].gflops


def counted(model):
    """Multiply-adds and trained weights of a built model, from its layers."""
    total = 0
    for layer in model._flatten_layers():
        if isinstance(layer, keras.layers.Dense):
            positions = 1 if len(layer.input.shape) == 2 else np.prod(layer.input.shape[1:-1])
            total += positions * np.prod(layer.kernel.shape)
        elif hasattr(layer, "kernel_size"):
            total += np.prod(layer.output.shape[1:3]) * np.prod(layer.kernel.shape)
    return int(total), sum(int(np.prod(variable.shape)) for variable in model.trainable_variables)


@functools.cache
def road(step):
    """A step of the small road at 64 pixels, from the road's own blocks, logits of five classes."""
    return connect(step, "atto", 5, SIZE, None)


KINDS = (0, 4, 6, 7, 15, 16)  # steps with all that a reader of designs must know


@pytest.mark.one_backend
@pytest.mark.parametrize(
    "step", [pytest.param(step, marks=() if step in KINDS else pytest.mark.slow) for step in range(17)]
)
def test_the_count_is_of_the_models(step):
    assert counted(road(step)) == cost(step, "atto", classes=5, image_size=64)


# Steps.


@pytest.mark.once
def test_each_step_changes_what_its_row_says_and_nothing_else():
    assert len(STEPS) == 17 and len({row.name for row in STEPS}) == 17
    fields = roadmap.Design.__dataclass_fields__.keys()
    assert STEPS[0].changes.keys() == fields
    for regime, number in itertools.product(roadmap.REGIMES, range(1, 17)):
        changed = roadmap.changes(number, regime)
        assert changed and changed.keys() <= STEPS[number].changes.keys(), (regime, number)
    assert roadmap.changes("stage ratio") == {"depths": (3, 3, 9, 3)}
    assert roadmap.changes("stage ratio", "base") == {"depths": (3, 3, 27, 3), "width": 84}
    assert roadmap.design("ReLU to GELU").kernel_size == 7  # 9 and 11 were not kept
    assert roadmap.design(11).kernel_size == 11


@pytest.mark.once
def test_steps_are_found_by_place_and_name_and_others_are_refused():
    assert (
        [roadmap.find(row.name) for row in STEPS] == [*range(17)] == [roadmap.find(str(n)) for n in range(17)]
    )
    assert roadmap.find(np.int64(3)) == roadmap.find(np.uint8(3)) == 3
    with pytest.raises(ValueError, match=r"Unknown step 'kernel size 8'\. Did you mean 'kernel size \d'"):
        build("kernel size 8")
    with pytest.raises(ValueError, match=r"Unknown step 'relu TO gelu'\. Did you mean 'ReLU to GELU'"):
        build("relu TO gelu")
    for wrong in (-1, 17, "17", 10**9, True, np.True_, 1.0, None, [3], "0 to 16"):
        message = r"Unknown step \S[^?]* Known: ResNet, enhanced recipe, .*, or a place from 0 to 16"
        with pytest.raises(ValueError, match=message):
            build(wrong)
    with pytest.raises(ValueError, match=r"Unknown regime \['tiny'\]"):
        build(3, ["tiny"])
    for step in (3, 16):
        with pytest.raises(ValueError, match=r"Unknown regime 'tine'\. Did you mean 'tiny'"):
            build(step, "tine")
        with pytest.raises(ValueError, match=r"at least|32 and more"):
            build(step, input_shape=(16, 16, 3))
        with pytest.raises(ValueError, match="classes must be"):
            build(step, classes=0)
        with pytest.raises(ValueError, match="A softmax over one class"):
            build(step, classes=1)
        for seed in ("a", 1.5, True, 2**40):
            with pytest.raises(ValueError, match=f"seed must be None or a whole .*seed={seed!r}"):
                build(step, seed=seed)


@pytest.mark.once
@pytest.mark.parametrize(
    ("name", "value", "least"),
    [("image_size", 31, 32), ("image_size", 64.5, 32), ("image_size", "64", 32), ("classes", 0, 1)],
)
def test_costs_of_what_cannot_be_built_are_refused(name, value, least):
    with pytest.raises(ValueError, match=f"{name} must be a whole number from {least} up. .*={value!r}"):
        cost(3, **{name: value})


@pytest.mark.one_backend
@pytest.mark.parametrize("step", [3, 16])
def test_every_step_takes_what_the_last_takes(step):
    integers = build(np.int64(step), "atto", np.int64(5), (*np.int64((64, 32)), 3), seed=np.int64(7))
    assert integers.input_shape == (None, 64, 32, 3) and integers.output_shape == (None, 5)
    assert build(step, "atto", None, None).output_shape == (None, 1000)
    assert build(step, "atto", 5, None).input_shape == (None, 224, 224, 3)


def randomised(model, seed=0):
    """Gives every weight and statistic of a model a random value that keeps signals near 1."""
    generator = np.random.default_rng(seed)
    for layer in model._flatten_layers(include_self=False):
        if isinstance(layer, keras.layers.Normalization) or layer._layers:
            continue
        for variable in layer.weights:
            noise = generator.standard_normal(variable.shape, dtype="float32")
            if len(variable.shape) > 1:
                depthwise = variable.shape[-1] == 1 and len(variable.shape) == 4
                taps = np.prod(variable.shape[:2]) if depthwise else np.prod(variable.shape[:-1])
                value = noise / np.sqrt(taps)
            else:
                value = {"gamma": 1 + 0.2 * noise, "moving_variance": np.exp(0.3 * noise)}.get(
                    variable.name, 0.1 * noise
                )
            variable.assign(value)
    return model


@pytest.mark.slow
@pytest.mark.one_backend
def test_each_step_is_another_function():
    """No change of a row is without effect; the recipe alone changes no model."""
    images = np.random.default_rng(0).uniform(0, 255, (2, *SIZE)).astype("float32")
    outputs = [randomised(road(step)).predict_on_batch(images) for step in range(17)]
    assert all(np.isfinite(output).all() for output in outputs)
    for left, right in itertools.combinations(range(17), 2):
        is_same = np.array_equal(outputs[left], outputs[right])
        assert is_same == ((left, right) == (0, 1)), (left, right)


# The beginning.


@pytest.fixture(scope="module")
def resnet():
    """torchvision's ResNet-50 with every weight and statistic random, in float32, and the same in float64."""
    peer = randomise(torchvision.models.resnet50(num_classes=11), seed=3)
    generator = torch.Generator().manual_seed(4)
    for name, buffer in peer.named_buffers():
        if name.endswith("running_mean"):
            buffer.copy_(0.1 * torch.randn(buffer.shape, generator=generator))
        elif name.endswith("running_var"):
            buffer.copy_(torch.exp(0.3 * torch.randn(buffer.shape, generator=generator)))
    return peer


def logits_of(peer, images):
    """What a torchvision model makes of pixels in 0..255, channels-last."""
    mean, std = (np.array(each, "float32") for each in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    with torch.no_grad():
        return peer(torch.from_numpy(((images / 255 - mean) / std).transpose(0, 3, 1, 2))).numpy()


def test_step_0_is_torchvisions_resnet_50(resnet):
    model = build(0, classes=11, input_shape=(96, 64, 3), classifier_activation=None)
    roadmap.load_torchvision(model, resnet.state_dict())
    images = np.random.default_rng(5).uniform(0, 255, (2, 96, 64, 3)).astype("float32")
    expected = logits_of(resnet, images)
    scale = np.abs(expected).max()
    found = model.predict_on_batch(images)
    np.testing.assert_allclose(found, expected, rtol=0, atol=TOLERANCE * scale)
    # One statistic of one norm, changed by a hundredth, is more than the tolerance.
    statistic = model.get_layer("layer2_1_bn2").moving_variance
    statistic.assign(keras.ops.convert_to_numpy(statistic) * 1.01)
    assert np.abs(model.predict_on_batch(images) - expected).max() > 5 * TOLERANCE * scale


@pytest.mark.one_backend
def test_wrong_state_dicts_are_refused_and_change_nothing(resnet):
    model = build(0, classes=10, input_shape=SIZE)
    before = model.get_weights()
    state = resnet.state_dict()
    with pytest.raises(ValueError, match=r"fc.weight of shape \(10, 2048\), received \(11, 2048\)"):
        roadmap.load_torchvision(model, state)
    for wrong in ("resnet50.pth", resnet, None):
        with pytest.raises(ValueError, match=f"Expected a state dict.*Received: {type(wrong).__name__}"):
            roadmap.load_torchvision(model, wrong)
    with pytest.raises(ValueError, match=r"Expected numbers in fc.bias"):  # the last that is assigned
        roadmap.load_torchvision(model, {**state, "fc.weight": np.ones((10, 2048)), "fc.bias": ["a"] * 10})
    with pytest.raises(
        ValueError, match=r"such as conv1\.weight\. Received \d+, such as module\.conv1\.weight"
    ):
        roadmap.load_torchvision(model, {f"module.{name}": value for name, value in state.items()})
    del state["layer3.2.bn1.running_mean"]
    with pytest.raises(ValueError, match=r"on one side only: layer3.2.bn1.running_mean\."):
        roadmap.load_torchvision(model, state)
    for other in (road(4), build(16, "atto", 5, SIZE)):
        with pytest.raises(ValueError, match=r"Expected the ResNet of step 0 or 1 .*Received: '\w+'"):
            roadmap.load_torchvision(other, state)
    for old, new in zip(before, model.get_weights(), strict=True):
        np.testing.assert_array_equal(old, new)


@pytest.mark.one_backend
def test_parameters_and_half_precision_are_read(resnet):
    model = build(0, classes=11, input_shape=SIZE)
    state = resnet.state_dict()
    parameters = {name: torch.nn.Parameter(state[name]) for name, _ in resnet.named_parameters()}
    roadmap.load_torchvision(model, {**state, **parameters})
    kernel = model.get_layer("fc").kernel
    np.testing.assert_array_equal(keras.ops.convert_to_numpy(kernel), state["fc.weight"].T)
    roadmap.load_torchvision(model, {name: value.bfloat16() for name, value in state.items()})
    np.testing.assert_allclose(keras.ops.convert_to_numpy(kernel), state["fc.weight"].T, rtol=2**-8)


@pytest.mark.one_backend
def test_the_resnet_of_keras_applications_is_another_network():
    """It strides in the first 1x1 convolution, as the paper of 2015, which costs less: 3.86 and not 4.09."""
    other = keras.applications.ResNet50(weights=None, input_shape=(224, 224, 3))
    assert other.get_layer("conv3_block1_1_conv").strides == (2, 2)
    assert other.get_layer("conv3_block1_2_conv").strides == (1, 1)
    multiply_adds, weights = counted(other)
    assert round(multiply_adds / 1e9, 2) == 3.86
    assert weights > cost(0).weights  # its convolutions have biases
    ours = build(0)
    assert ours.get_layer("layer2_0_conv1").strides == (1, 1)
    assert ours.get_layer("layer2_0_conv2").strides == (2, 2)
    assert counted(ours) == cost(0)


# In between.


class TorchReader:
    """Reads a network as PyTorch's functions in float64, channels-first, with a Keras model's weights."""

    def __init__(self, model, design, wrong_padding=False):
        self.model, self.design, self.wrong_padding = model, design, wrong_padding

    def weight(self, name, leaf):
        value = getattr(self.model.get_layer(name), leaf)
        return (
            None if value is None else torch.from_numpy(keras.ops.convert_to_numpy(value).astype("float64"))
        )

    def conv(self, x, name, filters, kernel=1, stride=1, depthwise=False):
        order, groups = ((2, 3, 0, 1), x.shape[1]) if depthwise else ((3, 2, 0, 1), 1)
        weight, padding = self.weight(name, "kernel").permute(order), 0 if kernel == stride else kernel // 2
        if self.wrong_padding and stride == 2 and padding:  # as TensorFlow's "same" on an even side
            x = F.pad(x, (padding - 1, padding, padding - 1, padding))
            padding = 0
        return F.conv2d(x, weight, self.weight(name, "bias"), stride, padding, groups=groups)

    def norm(self, x, name):
        gamma, beta = self.weight(name, "gamma"), self.weight(name, "beta")
        if self.design.norm == "layer_norm":
            return F.layer_norm(x.movedim(1, -1), gamma.shape, gamma, beta, 1e-6).movedim(-1, 1)
        mean, variance = self.weight(name, "moving_mean"), self.weight(name, "moving_variance")
        return F.batch_norm(x, mean, variance, gamma, beta, eps=1e-5)

    def activation(self, x):
        return {"relu": F.relu, "gelu": F.gelu}[self.design.activation](x)

    def scale(self, x, name):
        return x * self.weight(name, "gamma")[:, None, None]

    def add(self, x, y, name):
        return x + y

    def max_pool(self, x):
        return F.max_pool2d(x, 3, 2, 1)

    def average_pool(self, x):
        return x.mean((2, 3))

    def linear(self, x, name, classes):
        return F.linear(x, self.weight(name, "kernel").T, self.weight(name, "bias"))

    def channels(self, x):
        return x.shape[1]


@pytest.mark.parametrize(
    "step", [pytest.param(step, marks=() if step in (6, 9) else pytest.mark.slow) for step in range(2, 16)]
)
def test_steps_in_between_compute_what_pytorchs_functions_do(step):
    """Every weight and statistic random. The order of layers is the road's own: `cost` is what tests it."""
    model = randomised(connect(step, "atto", 5, (96, 64, 3), None), seed=step)
    images = np.random.default_rng(step).uniform(0, 255, (2, 96, 64, 3)).astype("float32")
    mean, std = np.array((0.485, 0.456, 0.406)), np.array((0.229, 0.224, 0.225))
    pixels = torch.from_numpy(((images / 255 - mean) / std).transpose(0, 3, 1, 2))
    design = roadmap.design(step, "atto")
    expected, shifted = (
        roadmap.network(TorchReader(model, design, is_wrong), pixels, design, 5).numpy()
        for is_wrong in (0, 1)
    )
    found, scale = model.predict_on_batch(images), np.abs(expected).max()
    np.testing.assert_allclose(found, expected, rtol=0, atol=TOLERANCE * scale)
    assert np.abs(found - shifted).max() > 5 * TOLERANCE * scale  # padding on one side is another network


# The end.


@pytest.mark.one_backend
@pytest.mark.parametrize(
    ("regime", "name"),
    [("atto", "ConvNeXtAtto"), pytest.param("tiny", "ConvNeXtTiny", marks=pytest.mark.slow)],
)
def test_step_16_is_convnext_both_ways(regime, name):
    ends = [
        build(16, regime, 7, SIZE),
        getattr(keras_convnext, name)(weights=None, classes=7, input_shape=SIZE),
    ]
    images = np.random.default_rng(6).uniform(0, 255, (2, *SIZE)).astype("float32")
    for one, other in (ends, ends[::-1]):
        state = keras_convnext.state_dict(randomised(one, seed=7))
        for variable, value in assign.placed_values(other, state):
            variable.assign(value)
        copied = keras_convnext.state_dict(other)
        assert copied.keys() == state.keys()
        assert all(np.array_equal(copied[key], value) for key, value in state.items())
        np.testing.assert_array_equal(other.predict_on_batch(images), one.predict_on_batch(images))
        randomised(other, seed=8)
        assert not np.array_equal(other.predict_on_batch(images), one.predict_on_batch(images))


@pytest.mark.one_backend
def test_the_blocks_of_the_road_end_in_convnext():
    """The third block, with all that the rows have changed, computes what ConvNeXt's own code does."""
    end = randomised(build(16, "atto", 5, SIZE, classifier_activation=None), seed=9)
    own = connect(16, "atto", 5, SIZE, None)
    pairs = zip(end.trainable_variables, own.trainable_variables, strict=True)
    for theirs, ours in pairs:
        ours.assign(np.reshape(keras.ops.convert_to_numpy(theirs), ours.shape))
    images = np.random.default_rng(10).uniform(0, 255, (2, *SIZE)).astype("float32")
    expected = end.predict_on_batch(images)
    scale = np.abs(expected).max()
    np.testing.assert_allclose(own.predict_on_batch(images), expected, rtol=0, atol=TOLERANCE * scale)
    gamma = own.get_layer("layer3_2_scale").gamma
    gamma.assign(keras.ops.convert_to_numpy(gamma) * 1.01)
    assert np.abs(own.predict_on_batch(images) - expected).max() > 5 * TOLERANCE * scale


# Training and files.


@pytest.mark.slow
@pytest.mark.parametrize("step", range(17))
def test_each_step_learns_by_fit(step):
    """Two shades are told apart in a few epochs."""
    keras.utils.set_random_seed(step)
    model = build(step, "atto", 2, (32, 32, 3), drop_path_rate=0.1, seed=0)
    generator = np.random.default_rng(step)
    labels = generator.integers(0, 2, 64)
    images = generator.uniform(0, 120, (64, 32, 32, 3)) + 135.0 * labels[:, None, None, None]
    model.compile(keras.optimizers.AdamW(1e-3), "sparse_categorical_crossentropy")
    before = model.evaluate(images, labels, verbose=0)
    history = model.fit(images, labels, batch_size=16, epochs=6, verbose=0).history["loss"]
    assert np.isfinite(history).all() and min(history) < 0.3 * before
    if roadmap.design(step).norm == "batch_norm":  # the statistics were taken
        assert np.abs(keras.ops.convert_to_numpy(model.get_layer("layer1_0_bn1").moving_mean)).max() > 0


@pytest.mark.slow
@pytest.mark.skipif(keras.backend.backend() == "jax", reason="other backends write these files")
@pytest.mark.parametrize("step", range(17))
def test_each_step_is_exported(step, tmp_path):
    """`export` compares the file with the model in its own runtime; each backend writes its own format."""
    suffix = {"torch": "onnx", "tensorflow": "tflite"}[keras.backend.backend()]
    model = randomised(build(step, "atto", 5, SIZE), seed=step)
    result = keras_convnext.export(model, tmp_path / f"step.{suffix}")
    assert result.relative_difference < 1e-4 and result.num_images > 1


@pytest.mark.slow
@pytest.mark.parametrize("step", range(17))
def test_each_step_is_saved_whole(step, tmp_path):
    model = randomised(build(step, "atto", 5, SIZE), seed=step)
    model.save(tmp_path / "step.keras")
    images = np.random.default_rng(0).uniform(0, 255, (2, *SIZE)).astype("float32")
    copy = keras.models.load_model(tmp_path / "step.keras")
    np.testing.assert_array_equal(copy.predict_on_batch(images), model.predict_on_batch(images))


@pytest.mark.one_backend
def test_a_saved_step_is_opened_as_any_classifier(tmp_path):
    """`export` and `segment` ask for the task of a file, which was asked of a ConvNeXt's weights alone."""
    images = np.random.default_rng(0).uniform(0, 255, (2, *SIZE)).astype("float32")
    for step, is_other in ((15, True), (16, False)):
        model = build(step, "atto", 5, SIZE)
        model.save(tmp_path / "step.keras")
        source = resolve(tmp_path / "step.keras")
        assert (source.is_other_network, source.task, source.heads) == (is_other, "classification", None)
        opened = predictor.open_predictor(source).model
        np.testing.assert_array_equal(opened.predict_on_batch(images), model.predict_on_batch(images))
