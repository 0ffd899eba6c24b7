"""Inference on the two backends that cannot train: NumPy and OpenVINO, against timm."""

import os
import subprocess
import sys

import numpy as np
import pytest

pytestmark = pytest.mark.once

TOLERANCE = 2e-5
ARCHITECTURES = ("convnext_atto", "convnextv2_atto")
LEVELS = ("P2", "P3", "P4", "P5")

# predict() would let OpenVINO choose bfloat16 on processors that have it: the model is called directly.
SCRIPT = """
import sys
import keras
import numpy as np
import keras_convnext

folder, *architectures = sys.argv[1:]
images = np.load(f"{folder}/images.npy")
for architecture in architectures:
    model = keras_convnext.load(
        architecture,
        f"{folder}/{architecture}.safetensors",
        include_preprocessing=False,
        input_shape=(64, 64, 3),
        classes=10,
        classifier_activation=None,
    )
    outputs = {"logits": model.output, **model.pyramid_outputs}
    results = keras.Model(model.input, outputs)(images, training=False)
    results = {name: keras.ops.convert_to_numpy(value) for name, value in results.items()}
    np.savez(f"{folder}/{architecture}.npz", **results)
print(keras.backend.backend())
"""


@pytest.fixture(scope="module")
def expected(tmp_path_factory):
    """Folder with the images and weight files, and what timm makes of them: {architecture: {name: array}}."""
    import safetensors.torch
    import timm
    import torch

    folder = tmp_path_factory.mktemp("weights")
    images = np.random.default_rng(2).normal(size=(2, 64, 64, 3)).astype("float32")
    np.save(folder / "images.npy", images)
    batch = torch.tensor(images.transpose(0, 3, 1, 2).copy())
    results = {}
    for architecture in ARCHITECTURES:
        generator = torch.Generator().manual_seed(5)
        model = timm.create_model(architecture, num_classes=10).eval()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.normal_(0, 0.1, generator=generator)
            stages = model.forward_intermediates(batch, intermediates_only=True)
            result = dict(zip(LEVELS, (stage.permute(0, 2, 3, 1).numpy() for stage in stages), strict=True))
            result["logits"] = model(batch).numpy()
        safetensors.torch.save_file(model.state_dict(), folder / f"{architecture}.safetensors")
        results[architecture] = result
    return folder, results


@pytest.fixture(scope="module", params=["numpy", "openvino"])
def received(request, expected):
    """{architecture: {name: array}} from a new process on the backend."""
    folder, _ = expected
    process = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(folder), *ARCHITECTURES],
        env={**os.environ, "KERAS_BACKEND": request.param},
        capture_output=True,
        text=True,
        check=False,
    )
    assert process.returncode == 0, process.stderr[-3000:]
    assert process.stdout.split()[-1] == request.param
    results = {}
    for architecture in ARCHITECTURES:
        with np.load(folder / f"{architecture}.npz") as arrays:
            results[architecture] = dict(arrays)
    return results


def relative_error(actual, wanted):
    assert actual.shape == wanted.shape and np.all(np.isfinite(actual))
    return float(np.max(np.abs(actual - wanted)) / np.max(np.abs(wanted)))


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_logits_and_stage_outputs_equal_those_of_timm(architecture, received, expected):
    wanted = expected[1][architecture]
    for name in (*LEVELS, "logits"):
        assert relative_error(received[architecture][name], wanted[name]) < TOLERANCE, name


def test_the_other_architecture_is_ten_tolerances_away(received, expected):
    for name in (*LEVELS, "logits"):
        other = received["convnext_atto"][name], expected[1]["convnextv2_atto"][name]
        assert relative_error(*other) > 10 * TOLERANCE, name
