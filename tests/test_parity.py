"""Logits and all stage outputs against independent code, every weight random: each architecture and layout.

Deep architectures are compared at reduced depth here, and some at full size in test_full_size.py. A Keras
model of each is compiled once for the whole file; a case loads its file with the package's own `load`, and
lends its weights to the compiled model. Every architecture is compared on every backend, with timm or, where
timm has none, with the official code. Other layouts of it are compared on PyTorch, where nothing is compiled,
and on all three in the second tier: a layout changes names and shapes in NumPy, not arithmetic.
"""

import dataclasses
import functools

import keras
import numpy as np
import peers
import pytest
import timm
import torch
import transformers
from torchvision.models import convnext as torchvision_convnext

import keras_convnext
from keras_convnext import convnext
from keras_convnext.layers import normalization
from keras_convnext.variants import VARIANTS
from keras_convnext.weights import assign

TOLERANCE = 2e-5
CLASSES = 11
SIZE = (64, 64)
WIDEST = ("xlarge", "xxlarge", "huge")


def in_tiers(names, on_every_backend, widest=WIDEST):
    """Parameters: first tier on PyTorch, for some on the others too; second for the widest, of gigabytes."""

    def marks(name):
        if name.endswith(widest) and "isotropic" not in name:
            return pytest.mark.slow
        return () if on_every_backend(name) else pytest.mark.one_backend

    return [pytest.param(name, marks=marks(name)) for name in names]


def every(*names):
    """Parameters of a test of layouts: on every backend where no other test has the name."""
    return in_tiers(names, lambda name: "isotropic" in name, (*WIDEST, "large"))  # `test_timm` has its width


PATCH = ("tiny", "small", "base", "large")
V2 = ("atto", "femto", "pico", "nano", "tiny", "base", "large", "huge")
OFFICIAL = (
    *(f"convnext_{size}" for size in (*PATCH, "xlarge")),
    *(f"convnextv2_{size}" for size in V2),
    *(f"convnext_isotropic_{size}" for size in ("small", "base", "large")),
)


@pytest.fixture(autouse=True, scope="module")
def reduced_table():
    """The table of architectures with reduced depths, for `load` and everything behind it."""
    with pytest.MonkeyPatch.context() as patch:
        for name, variant in list(VARIANTS.items()):
            row = dataclasses.replace(variant, depths=peers.reduced_depths(name))
            patch.setitem(VARIANTS, name, row)
        yield


# PyTorch compiles nothing, so there is nothing to keep there but gigabytes of weights.
@functools.lru_cache(maxsize=1 if keras.backend.backend() == "torch" else None)
def compiled(name, with_head=True):
    """A function (weights, images) -> dict of arrays; compiled once an architecture."""
    model = keras_convnext.load(
        name,
        weights=None,
        include_top=with_head,
        classes=CLASSES,
        classifier_activation=None,
        include_preprocessing=False,
        input_shape=(*SIZE, 3),
    )
    outputs = {**model.pyramid_outputs, "output": model.output}
    features = keras.Model(model.input, outputs)

    def run(weights, images):
        model.set_weights(weights)
        return features.predict(images, batch_size=len(images), verbose=0)

    return run


def ours(name, path, **arguments):
    """Stage outputs and logits (or normalised features) of the model that `load` makes of a file."""
    model = keras_convnext.load(
        name, weights=path, include_preprocessing=False, input_shape=(*SIZE, 3), **arguments
    )
    with_head = arguments.get("include_top") is not False
    return compiled(name, with_head)(model.get_weights(), peers.images(SIZE))


def check(result, maps, output):
    """Every map (channels-first, from torch) and the output, each within the tolerance."""
    errors = {}
    levels = ["P4"] if len(maps) == 1 else ["P2", "P3", "P4", "P5"]
    for level, expected in zip(levels, maps, strict=True):
        errors[level] = peers.relative_error(result[level], expected.permute(0, 2, 3, 1).numpy())
    if output is not None:
        errors["output"] = peers.relative_error(result["output"], output.numpy())
    assert max(errors.values()) <= TOLERANCE, errors


def torch_images():
    return torch.from_numpy(peers.images(SIZE)).permute(0, 3, 1, 2)


@functools.lru_cache(maxsize=1)
def timm_model(name, classes=CLASSES):
    depths = VARIANTS[name].depths
    return peers.randomise(timm.create_model(name, num_classes=classes, depths=depths))


@functools.lru_cache(maxsize=1)
def official_model(name):
    return peers.randomise(peers.OfficialConvNeXt(VARIANTS[name], classes=CLASSES))


TIMM = [name for name in VARIANTS if "isotropic" not in name]


# What another one has at another width is in the first tier on PyTorch alone.
SAME_BUT_WIDER = ("femto", "pico", "nano", "small", "base", "large", "atto_rms", "atto_ols", "nano_ols")


@pytest.mark.parametrize("name", in_tiers(TIMM, lambda name: name.partition("_")[2] not in SAME_BUT_WIDER))
@torch.no_grad()
def test_timm(name, tmp_path):
    peer = timm_model(name)
    result = ours(
        name,
        peers.save(peer.state_dict(), tmp_path / "timm.safetensors"),
        classes=CLASSES,
        classifier_activation=None,
    )
    maps = peer.forward_intermediates(torch_images(), intermediates_only=True, norm=False)
    check(result, maps, peer(torch_images()))


@pytest.mark.parametrize("name", every(*OFFICIAL))
@torch.no_grad()
def test_official(name, tmp_path):
    peer = official_model(name)
    torch.save({"model": peer.state_dict()}, tmp_path / "official.pth")
    result = ours(name, tmp_path / "official.pth", classes=CLASSES, classifier_activation=None)
    check(result, peer.maps(torch_images()), peer(torch_images()))


@pytest.mark.parametrize("size", every(*PATCH))
@torch.no_grad()
def test_torchvision(size, tmp_path):
    name = f"convnext_{size}"
    variant = VARIANTS[name]
    ends = (*variant.dims[1:], None)
    settings = [
        torchvision_convnext.CNBlockConfig(dim, end, depth)
        for dim, end, depth in zip(variant.dims, ends, variant.depths, strict=True)
    ]
    peer = peers.randomise(torchvision_convnext.ConvNeXt(settings, num_classes=CLASSES))
    path = peers.save(peer.state_dict(), tmp_path / "torchvision.safetensors")
    result = ours(name, path, classes=CLASSES, classifier_activation=None)
    maps, x = [], torch_images()
    for index, part in enumerate(peer.features):
        x = part(x)
        if index % 2:
            maps.append(x)
    check(result, maps, peer(torch_images()))


def huggingface_model(name):
    variant = VARIANTS[name]
    settings = {
        "hidden_sizes": list(variant.dims),
        "depths": list(variant.depths),
        "num_labels": CLASSES,
        "layer_norm_eps": 1e-6,
    }
    if variant.version == 2:
        return transformers.ConvNextV2ForImageClassification(transformers.ConvNextV2Config(**settings))
    return transformers.ConvNextForImageClassification(transformers.ConvNextConfig(**settings))


@pytest.mark.parametrize("name", every(*(name for name in OFFICIAL if "isotropic" not in name)))
@torch.no_grad()
def test_huggingface(name, tmp_path):
    peer = peers.randomise(huggingface_model(name))
    path = peers.save(peer.state_dict(), tmp_path / "model.safetensors")
    result = ours(name, path, classes=CLASSES, classifier_activation=None)
    output = peer(torch_images(), output_hidden_states=True)
    check(result, output.hidden_states[1:], output.logits)


@pytest.mark.parametrize("size", every(*PATCH))
@torch.no_grad()
def test_dinov3_huggingface(size, tmp_path):
    name = f"convnext_{size}"
    variant = VARIANTS[name]
    config = transformers.DINOv3ConvNextConfig(hidden_sizes=list(variant.dims), depths=list(variant.depths))
    peer = peers.randomise(transformers.DINOv3ConvNextModel(config))
    path = peers.save(peer.state_dict(), tmp_path / "model.safetensors")
    result = ours(name, path, include_top=False, pooling="avg")
    output = peer(torch_images(), output_hidden_states=True)
    maps = output.hidden_states[1:]
    assert peers.relative_error(result["P5"], maps[-1].permute(0, 2, 3, 1).numpy()) <= TOLERANCE
    pooled = compiled_pooled(name, path)
    assert peers.relative_error(pooled, output.pooler_output.numpy()) <= TOLERANCE


def compiled_pooled(name, path):
    model = keras_convnext.load(
        name,
        weights=path,
        include_top=False,
        pooling="avg",
        include_preprocessing=False,
        input_shape=(*SIZE, 3),
    )
    return keras.ops.convert_to_numpy(model.predict(peers.images(SIZE), verbose=0))


@pytest.mark.parametrize("size", every(*PATCH))
@torch.no_grad()
def test_dinov3_official_with_its_alias_of_the_norm(size, tmp_path):
    name = f"convnext_{size}"
    peer = official_model(name)
    state = {key: value for key, value in peer.state_dict().items() if not key.startswith("head.")}
    state |= {f"norms.3.{leaf}": state[f"norm.{leaf}"].clone() for leaf in ("weight", "bias")}
    result = ours(name, peers.save(state, tmp_path / "dinov3.safetensors"), include_top=False)
    maps = peer.maps(torch_images())
    normalised = peer.norm(maps[-1].permute(0, 2, 3, 1))
    check(result, maps, normalised)


def sparse_fcmae(state):
    """The state dict that the sparse pre-training code saves: the inverse of its `remap_checkpoint_keys`."""
    sparse = {
        "mask_token": torch.zeros(1, 512, 1, 1),
        "decoder.0.pwconv1.weight": torch.zeros(4, 4),
        "proj.weight": torch.zeros(4, 4, 1, 1),
        "pred.bias": torch.zeros(3),
    }
    for key, value in state.items():
        if key.startswith(("norm.", "head.")):
            continue
        name = f"encoder.{key}"
        stem = key.startswith("downsample_layers.0.")
        if ".dwconv." in key or (key.startswith("downsample_layers.") and key[20] == "1" and not stem):
            if key.endswith("weight"):
                name = name.replace("weight", "kernel")
                taps = value.transpose(3, 2).flatten(2)  # (O, I, W * H)
                value = taps[:, 0].T if ".dwconv." in key else taps.permute(2, 1, 0)
            else:
                value = value[None]
        elif "pwconv" in key:
            name = name.replace("pwconv1.", "pwconv1.linear.").replace("pwconv2.", "pwconv2.linear.")
        elif not stem and (".norm." in key or key.startswith("downsample_layers.")):
            name = name.rsplit(".", 1)[0] + ".ln." + key.rsplit(".", 1)[1]
        elif ".grn." in key:
            value = value[0, 0]
        sparse[name] = value
    return sparse


@pytest.mark.parametrize("layout", ["dense", "sparse"])
@pytest.mark.parametrize("size", every(*V2))
@torch.no_grad()
def test_fcmae_encoder(size, layout, tmp_path):
    name = f"convnextv2_{size}"
    peer = official_model(name)
    state = peer.state_dict()
    if layout == "dense":
        state = {key: value for key, value in state.items() if not key.startswith(("norm.", "head."))}
    else:
        state = sparse_fcmae(state)
    result = ours(name, peers.save(state, tmp_path / "fcmae.safetensors"), include_top=False)
    check(result, peer.maps(torch_images()), None)


@pytest.mark.parametrize("name", every("convnext_base", "convnext_large_mlp", "convnext_xxlarge"))
@torch.no_grad()
def test_open_clip_image_tower(name, tmp_path):
    peer = timm_model(name)
    with_mlp = VARIANTS[name].head == "mlp"
    tower = {"logit_scale": torch.ones(()), "transformer.resblocks.0.ln_1.weight": torch.ones(4)}
    for key, value in peer.state_dict().items():
        if key == "head.fc.weight":
            tower["visual.head.mlp.fc2.weight" if with_mlp else "visual.head.proj.weight"] = value
        elif key.startswith("head.pre_logits.fc."):
            tower[key.replace("head.pre_logits.fc.", "visual.head.mlp.fc1.")] = value
        elif key != "head.fc.bias":
            tower["visual.trunk." + key] = value
    path = peers.save(tower, tmp_path / "open_clip.safetensors")
    result = ours(name, path, classes=CLASSES, classifier_activation=None)
    maps = peer.forward_intermediates(torch_images(), intermediates_only=True, norm=False)
    check(result, maps, peer(torch_images()) - peer.head.fc.bias)


@pytest.mark.parametrize("prefix", every("", "backbone."))
@torch.no_grad()
def test_detection_backbone_with_per_level_norms(prefix, tmp_path):
    name = "convnext_tiny"
    peer = official_model(name)
    state = {key: value for key, value in peer.state_dict().items() if not key.startswith(("norm.", "head."))}
    norms = [
        peers.randomise(torch.nn.LayerNorm(dim, eps=1e-6), seed)
        for seed, dim in enumerate(VARIANTS[name].dims)
    ]
    for level, norm in enumerate(norms):
        state |= {f"norm{level}.{leaf}": value for leaf, value in norm.state_dict().items()}
    state = {prefix + key: value for key, value in state.items()}
    state |= {"roi_head.bbox_head.fc.weight": torch.zeros(2, 2), "decode_head.conv.bias": torch.zeros(2)}
    path = peers.save(state, tmp_path / "detector.safetensors")
    model = keras_convnext.load(
        name,
        weights=path,
        include_top=False,
        pyramid_norms=True,
        include_preprocessing=False,
        input_shape=(*SIZE, 3),
    )
    result = model.predict(peers.images(SIZE), verbose=0)
    for level, (x, norm) in enumerate(zip(peer.maps(torch_images()), norms, strict=True)):
        expected = norm(x.permute(0, 2, 3, 1)).numpy()
        assert peers.relative_error(result[f"P{level + 2}"], expected) <= TOLERANCE


@pytest.mark.parametrize("kind", every("save .h5", "save_weights .weights.h5", "save .keras", "without top"))
def test_keras_applications(kind, tmp_path):
    name = "convnext_tiny"
    peer, top = keras_applications_model("tiny", kind != "without top")
    if kind == "save_weights .weights.h5":
        path = tmp_path / "x.weights.h5"
        peer.save_weights(path)
    else:
        path = tmp_path / ("x.keras" if kind == "save .keras" else "x.h5")
        peer.save(path)
    pixels = 255 * np.random.default_rng(0).random((2, *SIZE, 3)).astype("float32")
    model = keras_convnext.load(name, weights=path, input_shape=(*SIZE, 3), classes=1000, include_top=top)
    expected = peer.predict(pixels, verbose=0)
    actual = model.predict(pixels, verbose=0)
    assert np.abs(actual - expected).max() <= 1e-5
    assert peers.relative_error(actual, expected) <= TOLERANCE


@functools.lru_cache(maxsize=1)
def keras_applications_model(size, include_top=True):
    from keras.src.applications import convnext as applications

    variant = VARIANTS[f"convnext_{size}"]
    model = applications.ConvNeXt(
        list(variant.depths),
        list(variant.dims),
        input_shape=(*SIZE, 3),
        include_top=include_top,
        name=f"convnext_{size}",
    )
    generator = np.random.default_rng(0)
    values = []
    for weight in model.weights:
        noise = generator.normal(size=weight.shape).astype("float32")
        if noise.ndim > 1:
            fan_in = np.prod(weight.shape[:-1])
            values.append(noise / np.sqrt(fan_in))
        elif weight.path.endswith(("bias", "beta")):
            values.append(0.1 * noise)
        else:
            values.append(1 + 0.2 * noise)
    model.set_weights(values)
    return model, include_top


@pytest.mark.parametrize("size", every(*PATCH[1:], "xlarge"))
def test_keras_applications_wide(size, tmp_path):
    peer, _ = keras_applications_model(size)
    peer.save(tmp_path / "x.h5")
    name = f"convnext_{size}"
    model = keras_convnext.load(name, weights=tmp_path / "x.h5", input_shape=(*SIZE, 3))
    pixels = 255 * np.random.default_rng(0).random((1, *SIZE, 3)).astype("float32")
    assert np.abs(model.predict(pixels, verbose=0) - peer.predict(pixels, verbose=0)).max() <= 1e-5


# Negative controls: each of these slips must be seen by the very comparison above.


def control_error(name, tmp_path):
    """The largest error over maps and logits, from a model built afresh."""
    peer = timm_model(name)
    path = peers.save(peer.state_dict(), tmp_path / "timm.safetensors")
    model = keras_convnext.load(
        name,
        weights=path,
        classes=CLASSES,
        classifier_activation=None,
        include_preprocessing=False,
        input_shape=(*SIZE, 3),
    )
    features = keras.Model(model.input, {**model.pyramid_outputs, "output": model.output})
    result = features.predict(peers.images(SIZE), verbose=0)
    maps = peer.forward_intermediates(torch_images(), intermediates_only=True, norm=False)
    errors = [
        peers.relative_error(result[level], expected.permute(0, 2, 3, 1).numpy())
        for level, expected in zip(["P2", "P3", "P4", "P5"], maps, strict=True)
    ]
    return max(*errors, peers.relative_error(result["output"], peer(torch_images()).numpy()))


@pytest.mark.one_backend
@torch.no_grad()
def test_control_without_a_slip_passes(tmp_path):
    assert control_error("convnextv2_atto", tmp_path) <= TOLERANCE


@pytest.mark.one_backend
@torch.no_grad()
def test_control_epsilon_1e_3_fails(tmp_path, monkeypatch):
    row = dataclasses.replace(VARIANTS["convnext_atto"], epsilon=1e-3)
    monkeypatch.setitem(VARIANTS, "convnext_atto", row)
    assert control_error("convnext_atto", tmp_path) > 5 * TOLERANCE


@pytest.mark.one_backend
@torch.no_grad()
def test_control_tanh_gelu_fails(tmp_path, monkeypatch):
    monkeypatch.setitem(convnext.ACTIVATIONS, "gelu", convnext.gelu_tanh)
    assert control_error("convnext_atto", tmp_path) > 5 * TOLERANCE


@pytest.mark.one_backend
@torch.no_grad()
def test_control_swapped_grn_axes_fails(tmp_path, monkeypatch):
    def call(self, x):
        norm = keras.ops.sqrt(keras.ops.sum(keras.ops.square(x), axis=-1, keepdims=True))
        response = norm / (keras.ops.mean(norm, axis=(1, 2), keepdims=True) + self.epsilon)
        return x * (1 + self.gamma * response) + self.beta

    monkeypatch.setattr(normalization.GlobalResponseNormalization, "call", call)
    assert control_error("convnextv2_atto", tmp_path) > 5 * TOLERANCE


@pytest.mark.one_backend
@torch.no_grad()
def test_control_swapped_grn_weights_fails(tmp_path, monkeypatch):
    original = assign._canonical_name

    def swapped(path):
        name = original(path)
        if name and ".grn." in name:
            return name.replace("gamma", "x").replace("beta", "gamma").replace("x", "beta")
        return name

    monkeypatch.setattr(assign, "_canonical_name", swapped)
    assert control_error("convnextv2_atto", tmp_path) > 5 * TOLERANCE


@pytest.mark.one_backend
@torch.no_grad()
def test_control_transposed_depthwise_kernel_fails(tmp_path, monkeypatch):
    original = assign._to_keras

    def transposed(array, path):
        array = original(array, path)
        return array.swapaxes(0, 1) if path.endswith("dwconv/kernel") else array

    monkeypatch.setattr(assign, "_to_keras", transposed)
    assert control_error("convnext_atto", tmp_path) > 5 * TOLERANCE
