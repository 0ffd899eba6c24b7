"""From a JPEG file to logits, against timm's pipeline: decode, resize, crop, normalise, network."""

import csv
import pathlib

import numpy as np
import peers
import PIL.Image
import pytest
import timm
import torch
import torchvision

import keras_convnext
from keras_convnext.data.preprocess import preprocess_image, read_image
from keras_convnext.weights import catalog

pytestmark = pytest.mark.one_backend

HERE = pathlib.Path(__file__).parent
SHARED = HERE.parents[1] / "shared" / "data" / "imagenet_samples"
PHOTOGRAPHS = sorted((HERE / "images").glob("*.*g"))
TOLERANCE = 1e-3
# Mean and spread of ImageNet, 0.5 and CLIP; centre crop and squash; both sizes of the published crops.
TAGS = (
    "convnext_atto.d2_in1k",
    "test_convnext3.r160_in1k",
    "convnext_zepto_rms_ols.ra4_e3600_r224_in1k",
    "convnextv2_nano.fcmae_ft_in22k_in1k_384",
)


def imagenet_samples():
    """Some of the ImageNet photographs, two of them grayscale."""
    if not SHARED.is_dir():
        return []
    with open(SHARED / "labels.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    gray = [row for row in rows if row["mode"] != "RGB"][:2]
    color = [row for row in rows if row["mode"] == "RGB"][:3]
    return [SHARED / "images" / pathlib.Path(row["file"]).name for row in gray + color]


@pytest.fixture(scope="module", params=[pytest.param(TAGS[0], marks=pytest.mark.every_backend), *TAGS[1:]])
def pair(request, tmp_path_factory):
    """(checkpoint, timm model, timm transform, our model), with the same random weights."""
    tag = request.param
    peer = peers.randomise(timm.create_model(tag, pretrained=False))
    config = timm.data.resolve_model_data_config(peer)
    transform = timm.data.create_transform(**config, is_training=False)
    path = peers.save(peer.state_dict(), tmp_path_factory.mktemp("weights") / "timm.safetensors")
    model = keras_convnext.load(tag, weights=path, classifier_activation=None)
    return catalog.find_checkpoint(tag), peer, transform, model


def logits_of_timm(peer, transform, path):
    with torch.no_grad():
        return peer(transform(PIL.Image.open(path).convert("RGB"))[None]).numpy()


def our_pixels(checkpoint, path):
    return preprocess_image(read_image(path), checkpoint.preprocessing)[None]


@pytest.mark.skipif(not SHARED.is_dir(), reason="../shared/data/imagenet_samples is not here")
def test_imagenet_photographs_give_timms_logits(pair):
    checkpoint, peer, transform, model = pair
    few = imagenet_samples()[1:3] if checkpoint.image_size > 300 else imagenet_samples()
    for path in few:
        actual = model.predict(our_pixels(checkpoint, path), verbose=0)
        assert peers.relative_error(actual, logits_of_timm(peer, transform, path)) <= TOLERANCE, path.name


def test_photographs_of_the_repository_give_timms_logits(pair):
    checkpoint, peer, transform, model = pair
    assert len(PHOTOGRAPHS) == 3
    for path in PHOTOGRAPHS:
        actual = model.predict(our_pixels(checkpoint, path), verbose=0)
        assert peers.relative_error(actual, logits_of_timm(peer, transform, path)) <= TOLERANCE, path.name


def test_control_naive_resizing_fails(pair):
    """Bilinear without antialias, what a plain resize does: the comparison above must see it."""
    checkpoint, peer, transform, model = pair
    path = PHOTOGRAPHS[0]
    side = checkpoint.image_size
    image = torch.from_numpy(read_image(path)).permute(2, 0, 1)
    naive = torchvision.transforms.functional.resize(image, [side, side], antialias=False)
    actual = model.predict(naive.permute(1, 2, 0).numpy()[None], verbose=0)
    assert peers.relative_error(actual, logits_of_timm(peer, transform, path)) > 5 * TOLERANCE


def test_control_spread_taken_for_variance_fails(pair):
    """The slip of a published port: dividing by the root of the standard deviation."""
    checkpoint, peer, transform, model = pair
    path = PHOTOGRAPHS[0]
    pixels = our_pixels(checkpoint, path).astype("float32")
    mean, std = 255 * np.array(checkpoint.mean), np.array(checkpoint.std)
    wrong = (pixels - mean) / np.sqrt(std) * std + mean  # what the model's own normaliser then turns into it
    actual = model.predict(wrong, verbose=0)
    assert peers.relative_error(actual, logits_of_timm(peer, transform, path)) > 5 * TOLERANCE
