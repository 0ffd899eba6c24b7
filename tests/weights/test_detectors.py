"""Files of detectors: both layouts are read by their keys and written for their project, with categories."""

import dataclasses
import json

import detectors
import numpy as np
import peers
import pytest
import segmenters
import torch

import keras_convnext
from keras_convnext import detection
from keras_convnext.architecture import DetectorHeads
from keras_convnext.data.detection.categories import Categories, coco
from keras_convnext.variants import VARIANTS
from keras_convnext.weights import labels_metadata, layouts
from keras_convnext.weights.catalog import CHECKPOINTS
from keras_convnext.weights.layouts import StateDictError
from keras_convnext.weights.resolve import resolve

pytestmark = pytest.mark.one_backend

V1, V2 = "convnext_atto", "convnextv2_atto"
MASK, CASCADE = (DetectorHeads(3, 16, 32, True, cascade) for cascade in (False, True))
BOXES = dataclasses.replace(MASK, masks=False)
THREE = Categories(("cat", "dog", "bird"), (3, 7, 90))


@pytest.fixture(autouse=True, scope="module")
def reduced_table():
    with pytest.MonkeyPatch.context() as patch:
        segmenters.one_block_a_stage(patch, V1, V2)
        yield


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """Files in Facebook's names with every value random, by architecture and heads."""
    folder = tmp_path_factory.mktemp("published")
    return {
        (name, heads): peers.save(
            detectors.random_state(name, heads), folder / f"{name}{heads.masks}{heads.cascade}.safetensors"
        )
        for name, heads in ((V1, MASK), (V1, BOXES), (V2, CASCADE))
    }


def same(state, other):
    assert set(state) == set(other)
    for name, array in state.items():
        np.testing.assert_array_equal(array, other[name], err_msg=name)


@pytest.mark.parametrize(("name", "heads"), [(V1, MASK), (V1, BOXES), (V2, CASCADE)])
def test_a_file_gives_the_detector_that_it_is_of(name, heads, published):
    source = resolve(published[name, heads])
    assert (source.task, source.heads, source.variant.name) == ("detection", heads, name)
    model = keras_convnext.load(published[name, heads])
    assert isinstance(model, detection.Detector)
    assert (model.classes, model.has_masks, model.is_cascade) == (3, heads.masks, heads.cascade)
    expected = detectors.random_state(name, heads)
    received = keras_convnext.state_dict(model)
    for key, value in expected.items():
        if not key.endswith("num_batches_tracked"):
            np.testing.assert_array_equal(received[key], value.reshape(received[key].shape), err_msg=key)
    assert set(received) == set(expected)


@pytest.mark.parametrize(
    ("layout", "ending"),
    [
        ("official", ".pth"),
        ("mmdetection", ".safetensors"),
        pytest.param("official", ".keras", marks=pytest.mark.slow),
    ],
)
def test_files_of_a_model_are_read_back_bit_for_bit(layout, ending, published, tmp_path):
    model = keras_convnext.load(published[V2, CASCADE])
    path = tmp_path / f"x{ending}"
    if ending == ".keras":
        model.save(path)
    else:
        keras_convnext.save_weights(model, path, layout)
    again = keras_convnext.load(path)
    assert type(again) is type(model)
    same(keras_convnext.state_dict(model), keras_convnext.state_dict(again))


@pytest.mark.parametrize("layout", ["official", "mmdetection"])
def test_conversion_there_and_back_keeps_every_bit_and_count(layout, published, tmp_path):
    there = keras_convnext.convert(published[V2, CASCADE], tmp_path / "there.pth", layout)
    content = torch.load(there, weights_only=True)
    assert set(content) == {"state_dict"}
    names = set(content["state_dict"])
    assert ("backbone.stages.0.0.depthwise_conv.weight" in names) == (layout == "mmdetection")
    assert "roi_head.bbox_head.2.shared_convs.3.bn.running_var" in names
    back = keras_convnext.convert(there, tmp_path / "back.safetensors")
    before, after = (resolve(path).state for path in (published[V2, CASCADE], back))
    same(before, after)
    assert after["roi_head.bbox_head.0.shared_convs.0.bn.num_batches_tracked"] == 7


def test_the_body_alone_is_given_when_asked_for(published):
    body = keras_convnext.load(published[V1, MASK], include_top=False, pyramid_norms=True)
    assert list(body.output) == ["P2", "P3", "P4", "P5"]
    with pytest.raises(ValueError, match="is of a detector and has no classifier"):
        resolve(published[V1, MASK], task="classification")
    with pytest.raises(ValueError, match=r"weights of a segmenter\. .* is for detection"):
        resolve(published[V1, MASK], task="segmentation")
    with pytest.raises(ValueError, match=r"weights of a detector\. .*detection\.MaskRCNN makes one"):
        resolve(V1, weights=None, task="detection")


def test_another_number_of_classes_starts_the_last_layers_fresh(published):
    model = keras_convnext.load(published[V1, MASK], classes=5)
    state, old = keras_convnext.state_dict(model), detectors.random_state(V1, MASK)
    assert model.classes == 5
    fresh = {name for name, array in state.items() if not np.array_equal(array, old[name])}
    layers = {name.rpartition(".")[0] for name in fresh}
    assert layers == set(DetectorHeads(5, 16, 32).last)
    with pytest.raises(ValueError, match=r"have 3 classes. Received: classes=5, new_head=False"):
        keras_convnext.load(published[V1, MASK], classes=5, new_head=False)


def test_every_key_of_the_heads_must_be_there_once(published, tmp_path):
    state = {name: torch.from_numpy(array) for name, array in resolve(published[V1, MASK]).state.items()}
    del state["neck.fpn_convs.3.conv.bias"]
    state["roi_head.more.weight"] = torch.zeros(1)
    state["roi_head.bbox_head.fc_reg.bias"] = torch.zeros(5)
    with pytest.raises(StateDictError) as error:
        keras_convnext.load(peers.save(state, tmp_path / "x.safetensors"))
    for part in (
        "Missing (1): neck.fpn_convs.3.conv.bias (16,)",
        "Left over (1): roi_head.more.weight",
        "roi_head.bbox_head.fc_reg.bias: expected (12,), received (5,)",
    ):
        assert part in str(error.value)


def test_layouts_that_have_no_detector_are_refused(published, tmp_path):
    model = keras_convnext.load(published[V1, MASK])
    for layout in ("timm", "huggingface", "mmsegmentation"):
        with pytest.raises(ValueError, match=f"{layout} has no Mask R-CNN, as official and mmdetection have"):
            keras_convnext.save_weights(model, tmp_path / "x.safetensors", layout)
    assert not layouts.is_writable(VARIANTS[V1], "mmdetection")
    with pytest.raises(ValueError, match=r"no pooling, nor a classifier_activation. Received: pooling='avg'"):
        keras_convnext.load(published[V1, MASK], pooling="avg")


# Categories.


def test_categories_are_kept_with_their_ids(published, tmp_path):
    model = keras_convnext.load(published[V1, MASK])
    path = keras_convnext.save_weights(model, tmp_path / "x.safetensors", labels=THREE)
    assert resolve(path).labels == THREE
    keras_convnext.convert(path, tmp_path / "x.keras")
    assert resolve(tmp_path / "x.keras").labels == THREE
    with pytest.raises(ValueError, match=r"a detector of as many classes as labels, 2\. Received: one of 3"):
        keras_convnext.save_weights(model, path, labels=Categories(("a", "b"), (1, 2)))


def test_categories_of_openmmlab_files_are_coco_s_or_counted(published, tmp_path):
    state = {name: torch.from_numpy(array) for name, array in resolve(published[V1, MASK]).state.items()}
    torch.save({"meta": {"CLASSES": THREE.names}, "state_dict": state}, tmp_path / "x.pth")
    assert resolve(tmp_path / "x.pth").labels == Categories(THREE.names, (1, 2, 3))
    torch.save({"meta": {"CLASSES": coco().names}, "state_dict": {}}, tmp_path / "coco.pth")
    assert labels_metadata.read_labels(tmp_path / "coco.pth", "detection") == coco()


def test_categories_of_a_tag_are_coco_s():
    assert resolve("convnext_tiny.fb_coco_mask_rcnn", weights=None).labels == coco()
    assert (len(coco().names), coco().ids[0], coco().ids[11], coco().ids[-1]) == (80, 1, 13, 90)
    assert [coco().names[place] for place in (0, 11, 79)] == ["person", "stop sign", "toothbrush"]


@pytest.mark.parametrize("text", ['{"ids": [1, 1], "names": ["a", "b"]}', '{"ids": ["1"], "names": ["a"]}'])
def test_damaged_categories_are_told(text):
    with pytest.raises(ValueError, match=r"x\.keras does not say which classes it has"):
        labels_metadata.from_json(text, "x.keras")
    assert json.loads(labels_metadata.to_json(THREE)) == {"ids": [3, 7, 90], "names": ["cat", "dog", "bird"]}


# By tag.


@pytest.mark.parametrize("tag", [row.tag for row in CHECKPOINTS.values() if row.task == "detection"])
def test_published_rows_name_their_heads(tag):
    row = CHECKPOINTS[tag]
    assert row.heads == DetectorHeads(80, cascade="cascade" in tag)
    assert row.layout == ("mmdetection" if row.url.startswith("https://download.openmmlab.com") else "mmdet")
    assert (row.box_ap > 46) and (41 < row.mask_ap < row.box_ap)
    assert (row.sha256_prefix is None) or row.sha256_prefix in row.url


@pytest.mark.slow
@pytest.mark.parametrize("name", ["fb_coco_mask_rcnn", "mmdet_coco_cascade_mask_rcnn"])
def test_a_file_of_the_older_form_gives_the_detector_by_its_tag(name, tmp_path, monkeypatch):
    tag = f"convnext_tiny.{name}"
    monkeypatch.setenv("KERAS_CONVNEXT_WEIGHTS_DIR", str(tmp_path))
    monkeypatch.setenv("KERAS_CONVNEXT_OFFLINE", "1")
    monkeypatch.setitem(
        VARIANTS, "convnext_tiny", dataclasses.replace(VARIANTS["convnext_tiny"], depths=(1, 1, 1, 1))
    )
    row = CHECKPOINTS[tag]
    state = detectors.random_state(row.architecture, row.heads)
    body, layout = "backbone.", {"mmdet": "official"}.get(row.layout, row.layout)
    file = {
        name if not name.startswith(body) else body + layouts.rename(name.removeprefix(body), layout): value
        for name, value in state.items()
    }
    content = {"meta": {"CLASSES": coco().names}, "state_dict": file}
    torch.save(content, tmp_path / f"{tag}.pth", _use_new_zipfile_serialization=False)
    model = keras_convnext.load(tag)
    received = keras_convnext.state_dict(model)
    for name, value in state.items():
        if not name.endswith("num_batches_tracked"):
            np.testing.assert_array_equal(received[name], value, err_msg=name)
