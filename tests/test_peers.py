"""The reference written for these tests is itself compared: with timm, and with the official code if at hand.

Set OFFICIAL_CONVNEXT and OFFICIAL_CONVNEXT_V2 to checkouts of facebookresearch/ConvNeXt (048efce) and
facebookresearch/ConvNeXt-V2 (2553895) for the latter; their code is not part of this repository.
"""

import dataclasses
import importlib
import os
import pathlib
import sys
import types

import peers
import pytest
import timm
import torch
from timm.models.convnext import checkpoint_filter_fn

from keras_convnext.variants import VARIANTS

pytestmark = pytest.mark.once


def small(name):
    variant = VARIANTS[name]
    return dataclasses.replace(variant, depths=(2,) if variant.isotropic else (1, 1, 1, 1))


@pytest.mark.parametrize("name", ["convnext_tiny", "convnextv2_tiny"])
@torch.no_grad()
def test_reference_equals_timm(name):
    variant = small(name)
    reference = peers.randomise(peers.OfficialConvNeXt(variant))
    peer = timm.create_model(name, depths=variant.depths).eval()
    peer.load_state_dict(checkpoint_filter_fn(reference.state_dict(), peer), strict=True)
    x = torch.randn(2, 3, 64, 64)
    assert peers.relative_error(reference(x), peer(x)) <= 5e-6


@pytest.mark.parametrize(
    "size, parameters", [("small", 22_308_712), ("base", 87_083_752), ("large", 305_942_504)]
)
def test_isotropic_parameter_counts_are_the_official_ones(size, parameters):
    variant = VARIANTS[f"convnext_isotropic_{size}"]
    with torch.device("meta"):
        reference = peers.OfficialConvNeXt(variant)
    assert sum(parameter.numel() for parameter in reference.parameters()) == parameters == variant.parameters


def official_module(variable, name, monkeypatch):
    """A module of an official checkout, under a package name of its own and kept out of timm's registry."""
    if variable not in os.environ:
        pytest.skip(f"{variable} is not set: no official checkout to compare with")
    package = types.ModuleType(variable.lower())
    package.__path__ = [str(pathlib.Path(os.environ[variable]) / "models")]
    sys.modules[package.__name__] = package
    monkeypatch.setattr("timm.models.registry.register_model", lambda function: function)
    return importlib.import_module(f"{package.__name__}.{name}")


@pytest.mark.parametrize("name", ["convnext_tiny", "convnext_isotropic_base", "convnext_isotropic_large"])
@torch.no_grad()
def test_reference_equals_the_official_v1_code(name, monkeypatch):
    variant = small(name)
    scale = variant.layer_scale_init_value or 0
    if variant.isotropic:
        module = official_module("OFFICIAL_CONVNEXT", "convnext_isotropic", monkeypatch)
        official = module.ConvNeXtIsotropic(
            depth=2, dim=variant.dims[0], layer_scale_init_value=scale, num_classes=1000
        )
    else:
        module = official_module("OFFICIAL_CONVNEXT", "convnext", monkeypatch)
        official = module.ConvNeXt(depths=variant.depths, dims=variant.dims)
    reference = peers.randomise(peers.OfficialConvNeXt(variant))
    official.load_state_dict(reference.state_dict(), strict=True)
    x = torch.randn(2, 3, 64, 64)
    assert peers.relative_error(reference(x), official.eval()(x)) <= 5e-6


@torch.no_grad()
def test_reference_equals_the_official_v2_code(monkeypatch):
    # The official utils.py imports the sparse engine for its sparse twins; the dense model needs none of it.
    engine = types.ModuleType("MinkowskiEngine")
    engine.SparseTensor = object
    monkeypatch.setitem(sys.modules, "MinkowskiEngine", engine)
    variant = small("convnextv2_tiny")
    module = official_module("OFFICIAL_CONVNEXT_V2", "convnextv2", monkeypatch)
    official = module.ConvNeXtV2(depths=variant.depths, dims=variant.dims)
    reference = peers.randomise(peers.OfficialConvNeXt(variant))
    official.load_state_dict(reference.state_dict(), strict=True)
    x = torch.randn(2, 3, 64, 64)
    assert peers.relative_error(reference(x), official.eval()(x)) <= 5e-6


def test_sparse_layout_is_the_inverse_of_the_official_remapping():
    """`sparse_fcmae` of test_parity against the official `remap_checkpoint_keys`."""
    if "OFFICIAL_CONVNEXT_V2" not in os.environ:
        pytest.skip("OFFICIAL_CONVNEXT_V2 is not set: no official checkout to compare with")
    import ast
    import collections
    import math

    from test_parity import sparse_fcmae

    source = (pathlib.Path(os.environ["OFFICIAL_CONVNEXT_V2"]) / "utils.py").read_text()
    function = next(
        node for node in ast.parse(source).body if getattr(node, "name", "") == "remap_checkpoint_keys"
    )
    scope = {"OrderedDict": collections.OrderedDict, "math": math}
    exec(compile(ast.Module([function], []), "utils.py", "exec"), scope)
    state = peers.randomise(peers.OfficialConvNeXt(small("convnextv2_atto"))).state_dict()
    dense = scope["remap_checkpoint_keys"](sparse_fcmae(state))
    for key, value in state.items():
        if not key.startswith(("norm.", "head.")):
            assert torch.equal(dense[key].reshape(value.shape), value), key
