"""Base, V2 Base and XLarge at full size against timm: second tier."""

import keras
import peers
import pytest
import timm
import torch

import keras_convnext


@pytest.mark.slow
@pytest.mark.parametrize("name", ["convnext_base", "convnextv2_base", "convnext_xlarge"])
@torch.no_grad()
def test_full_size_logits_and_maps_equal_timm(name, tmp_path):
    peer = peers.randomise(timm.create_model(name))
    path = peers.save(peer.state_dict(), tmp_path / "timm.safetensors")
    model = keras_convnext.load(
        name, weights=path, classifier_activation=None, include_preprocessing=False, input_shape=(96, 96, 3)
    )
    assert model.count_params() == sum(parameter.numel() for parameter in peer.parameters())
    x = peers.images((96, 96), count=1)
    images = torch.from_numpy(x).permute(0, 3, 1, 2)
    features = keras.Model(model.input, {**model.pyramid_outputs, "logits": model.output})
    result = features.predict(x, verbose=0)
    maps = peer.forward_intermediates(images, intermediates_only=True, norm=False)
    errors = {
        level: peers.relative_error(result[level], expected.permute(0, 2, 3, 1))
        for level, expected in zip(["P2", "P3", "P4", "P5"], maps, strict=True)
    }
    errors["logits"] = peers.relative_error(result["logits"], peer(images))
    print(
        f"{keras.backend.backend()} {name}: "
        + ", ".join(f"{key} {value:.1e}" for key, value in errors.items())
    )
    assert max(errors.values()) <= 2e-5, errors
