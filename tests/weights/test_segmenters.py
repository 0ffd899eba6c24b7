"""Files of segmenters: each layout is read by its keys and written for its project, with labels."""

import dataclasses
import json

import numpy as np
import peers
import pytest
import segmenters
import torch
import transformers
from safetensors.torch import load_file

import keras_convnext
from keras_convnext.data.segmentation.ade20k import ade20k
from keras_convnext.data.segmentation.labels import Labels
from keras_convnext.variants import VARIANTS
from keras_convnext.weights import labels_metadata, layouts
from keras_convnext.weights.layouts import StateDictError
from keras_convnext.weights.resolve import resolve

pytestmark = pytest.mark.one_backend

V1, V2 = "convnext_atto", "convnextv2_atto"
LAYOUTS = ("official", "mmsegmentation", "huggingface")
LABELS = Labels(tuple(f"class {n}" for n in range(11)), tuple((n, 2 * n, 255 - n) for n in range(11)), (0, 7))


@pytest.fixture(autouse=True, scope="module")
def reduced_table():
    with pytest.MonkeyPatch.context() as patch:
        segmenters.one_block_a_stage(patch, V1, V2, "convnext_tiny", "convnext_small", "convnext_base")
        yield


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """{architecture: file of transformers with every value random}."""
    folder = tmp_path_factory.mktemp("published")
    return {
        name: peers.save(segmenters.transformers_model(name).state_dict(), folder / f"{name}.safetensors")
        for name in (V1, V2)
    }


@pytest.fixture(scope="module")
def model(published):
    return keras_convnext.load(published[V1])


def same(state, other):
    assert list(state) == list(other)
    for name, array in state.items():
        np.testing.assert_array_equal(array, other[name], err_msg=name)


# There and back.


@pytest.mark.parametrize("ending", [".safetensors", ".pth", ".keras"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_files_of_a_model_are_read_back_bit_for_bit(layout, ending, model, tmp_path):
    path = tmp_path / f"x{ending}"
    if ending == ".keras":
        model.save(path)
    else:
        keras_convnext.save_weights(model, path, layout)
    again = keras_convnext.load(path)
    assert type(again) is type(model)
    same(keras_convnext.state_dict(model), keras_convnext.state_dict(again))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", [V1, V2])
def test_conversion_there_and_back_keeps_every_bit_and_count(name, layout, published, tmp_path):
    there = keras_convnext.convert(published[name], tmp_path / "there.pth", layout)
    back = keras_convnext.convert(there, tmp_path / "back.safetensors", "huggingface")
    before, after = load_file(published[name]), load_file(back)
    assert before.keys() == after.keys()
    for key, value in before.items():
        assert torch.equal(value, after[key]) and value.dtype == after[key].dtype, key
    assert before["decode_head.bottleneck.batch_norm.num_batches_tracked"] == 160_000


@pytest.mark.parametrize("name", [V1, V2])
def test_transformers_loads_our_files_strictly_and_agrees(name, published, tmp_path):
    model = keras_convnext.load(published[name], include_preprocessing=False)
    path = keras_convnext.save_weights(model, tmp_path / "model.safetensors", layout="huggingface")
    config = segmenters.transformers_config(VARIANTS[name])
    theirs = transformers.UperNetForSemanticSegmentation(config).eval()
    theirs.load_state_dict(load_file(path), strict=True)
    images = peers.images()
    expected = segmenters.transformers_logits(theirs, images)["logits"]
    assert peers.relative_error(model.predict(images, verbose=0), expected) <= 2e-5


def test_names_are_those_of_facebook_and_mmsegmentation(model, tmp_path):
    facebook = keras_convnext.state_dict(model)
    for name in (
        "backbone.downsample_layers.0.0.weight",
        "backbone.stages.2.0.dwconv.bias",
        "backbone.stages.2.0.gamma",
        "backbone.norm3.weight",
        "decode_head.psp_modules.3.1.bn.running_var",
        "auxiliary_head.convs.0.bn.num_batches_tracked",
    ):
        assert name in facebook
    path = keras_convnext.save_weights(model, tmp_path / "x.pth", layout="mmsegmentation")
    file = torch.load(path, weights_only=True)["state_dict"]
    assert set(file) == {
        name.replace("dwconv", "depthwise_conv").replace("pwconv", "pointwise_conv") for name in facebook
    }
    assert file["decode_head.bottleneck.bn.num_batches_tracked"].dtype == torch.int64


# What does not fit.


def changed(published, tmp_path, change):
    state = load_file(published[V1])
    change(state)
    return peers.save(state, tmp_path / "changed.safetensors")


def test_every_key_of_the_heads_must_be_there_once(published, tmp_path):
    def change(state):
        del state["decode_head.fpn_convs.1.batch_norm.running_mean"]
        state["decode_head.more.weight"] = torch.zeros(1)
        state["decode_head.classifier.bias"] = torch.zeros(3)

    with pytest.raises(StateDictError) as error:
        keras_convnext.load(changed(published, tmp_path, change))
    for part in (
        "Missing (1): decode_head.fpn_convs.1.batch_norm.running_mean (16,)",
        "Left over (1): decode_head.more.weight",
        "decode_head.classifier.bias: expected (11,), received (3,)",
    ):
        assert part in str(error.value)


def test_counts_of_steps_may_be_missing(published, tmp_path, model):
    def change(state):
        for name in [name for name in state if name.endswith("num_batches_tracked")]:
            del state[name]

    again = keras_convnext.load(changed(published, tmp_path, change))
    same(keras_convnext.state_dict(model), keras_convnext.state_dict(again))


def test_numbers_that_a_file_does_not_have_are_refused(published):
    state = dict(load_file(published[V1]))
    arrays = {name: value.numpy() for name, value in state.items()}
    arrays["decode_head.fpn_bottleneck.conv.weight"] = np.broadcast_to(
        np.float32(0), (100_000, 400_000, 3, 3)
    )
    with pytest.raises(StateDictError, match="that repeats a few"):
        layouts.inspect(arrays)


def test_layouts_without_upernet_are_refused(model, tmp_path):
    for layout in ("timm", "torchvision"):
        with pytest.raises(ValueError, match=f"{layout} has no UPerNet, as official, mmsegmentation"):
            keras_convnext.save_weights(model, tmp_path / "x.pth", layout=layout)
    body = keras_convnext.load(V1, None, include_top=False)
    with pytest.raises(ValueError, match="mmsegmentation's layout is of segmenters, and this is none"):
        keras_convnext.save_weights(body, tmp_path / "x.pth", layout="mmsegmentation")
    assert not list(tmp_path.iterdir())


def test_arguments_of_classifiers_are_refused(published):
    with pytest.raises(ValueError, match=r"no pooling, nor a classifier_activation. Received: pooling='avg'"):
        keras_convnext.load(published[V1], pooling="avg")
    with pytest.raises(ValueError, match="classifier_activation='softmax'"):
        keras_convnext.load(published[V1], classifier_activation="softmax")
    with pytest.raises(ValueError, match=r"have 11 classes. Received: classes=4, new_head=False"):
        keras_convnext.load(published[V1], classes=4, new_head=False)
    with pytest.raises(ValueError, match="is of a segmenter and has no classifier"):
        resolve(published[V1], task="classification")
    with pytest.raises(ValueError, match=r"Received convnext_tiny.fb_in1k, which is for classification"):
        resolve("convnext_tiny.fb_in1k", task="segmentation")


# What is made of them.


def test_body_of_a_segmenter_is_had_as_before(published, model):
    state = keras_convnext.state_dict(model)
    maps = keras_convnext.load(published[V1], include_top=False, pyramid_norms=True)
    assert list(maps.output) == ["P2", "P3", "P4", "P5"]
    for name, array in keras_convnext.state_dict(maps).items():
        np.testing.assert_array_equal(array, state[f"backbone.{name}"])
    body = keras_convnext.load(V1, published[V1], include_top=False)
    assert body.output_shape == (None, None, None, 320)


def test_other_classes_start_fresh_and_the_rest_is_kept(published, model):
    other = keras_convnext.load(published[V1], classes=4, drop_path_rate=0.1)
    before, after = keras_convnext.state_dict(model), keras_convnext.state_dict(other)
    assert other.classes == 4
    for name, array in after.items():
        if "conv_seg" in name:
            assert array.shape[0] == 4
        else:
            np.testing.assert_array_equal(array, before[name], err_msg=name)


# Labels.


def test_labels_are_stored_and_read(model, published, tmp_path):
    path = keras_convnext.save_weights(model, tmp_path / "x.safetensors", labels=LABELS)
    found = resolve(path)
    assert (found.task, found.heads.classes, found.labels) == ("segmentation", 11, LABELS)
    keras_convnext.convert(path, tmp_path / "y.keras")
    assert resolve(tmp_path / "y.keras").labels == LABELS
    again = keras_convnext.convert(tmp_path / "y.keras", tmp_path / "z.safetensors", "huggingface")
    assert resolve(again).labels == LABELS
    assert resolve(published[V1]).labels is None


def test_labels_that_do_not_fit_are_refused(model, tmp_path):
    with pytest.raises(ValueError, match=r"as many classes as labels, 150. Received: one of 11"):
        keras_convnext.save_weights(model, tmp_path / "x.safetensors", labels=ade20k())
    with pytest.raises(ValueError, match="which has a place for labels"):
        keras_convnext.save_weights(model, tmp_path / "x.pth", labels=LABELS)
    text = json.loads(labels_metadata.to_json(LABELS))
    for change in ({"names": "abc"}, {"palette": [[1, 2]]}, {"palette": [[1, 2, 256]] * 11}, {"names": None}):
        with pytest.raises(ValueError, match=r"x.safetensors does not say which classes it has"):
            labels_metadata.from_json(json.dumps(text | change), "x.safetensors")


def test_ade20k_has_150_classes_of_different_names_and_colours():
    labels = ade20k()
    assert len(labels.names) == len(labels.palette) == 150
    assert (labels.names[0], labels.palette[0]) == ("wall", (120, 120, 120))
    assert (labels.names[149], labels.palette[149]) == ("flag", (92, 0, 255))
    assert list(labels.values) == list(range(1, 151))


# Files as they are published.


def write_published(tag, path, meta, classes=150):
    """Random weights in the layout of a tag, in the older form of PyTorch's files, heads of 16 channels."""
    row = keras_convnext.find_checkpoint(tag)
    variant = VARIANTS[row.architecture]
    shapes = layouts.weight_shapes(variant, 0, pyramid_norms=True)
    shapes |= layouts.head_shapes(variant, dataclasses.replace(HEADS, classes=classes))
    rng = np.random.default_rng(0)
    canonical = {
        name: rng.normal(size=shape).astype("float32") if shape else np.array(160_000)
        for name, shape in shapes.items()
    }
    layout = {"mmseg": "official"}.get(row.layout, row.layout)
    whole = layouts.with_body_prefix(canonical)
    state = {name: torch.tensor(array) for name, array in layouts.write(whole, variant, layout).items()}
    content = state if row.state_key is None else {"meta": meta, row.state_key: state}
    if path.suffix == ".safetensors":
        peers.save(state, path)
    else:
        torch.save(content, path, _use_new_zipfile_serialization=False)
    return whole


HEADS = layouts.Heads(150, 16)


@pytest.mark.parametrize(
    ("tag", "ending"),
    [
        ("convnext_tiny.fb_ade20k_512", ".pth"),
        ("convnext_tiny.mmseg_ade20k_512", ".pth"),
        ("convnext_tiny.huggingface_ade20k_512", ".safetensors"),
        ("convnext_tiny.huggingface_ade20k_512", ".bin"),
    ],
)
def test_published_files_load_by_tag(tag, ending, tmp_path, monkeypatch):
    monkeypatch.setenv("KERAS_CONVNEXT_WEIGHTS_DIR", str(tmp_path))
    monkeypatch.setenv("KERAS_CONVNEXT_OFFLINE", "1")
    whole = write_published(tag, tmp_path / f"{tag}{ending}", {"CLASSES": ("wall",), "seed": None})
    model = keras_convnext.load(tag)
    assert (model.output_shape, model.classes) == ((None, None, None, 150), 150)
    received = keras_convnext.state_dict(model)
    assert set(received) == set(whole)
    for name, array in received.items():
        if not name.endswith("num_batches_tracked"):
            np.testing.assert_array_equal(array, whole[name], err_msg=name)
    body = keras_convnext.load(tag, include_top=False)
    assert body.output_shape == (None, None, None, 768)
    found = resolve(tag)
    assert (found.task, found.labels) == ("segmentation", ade20k())


def test_openmmlab_files_say_their_classes(tmp_path):
    tag = "convnext_tiny.mmseg_ade20k_512"
    meta = {"CLASSES": tuple(LABELS.names), "PALETTE": [list(colour) for colour in LABELS.palette]}
    write_published(tag, tmp_path / "a.pth", meta, classes=11)
    assert resolve(tmp_path / "a.pth").labels == dataclasses.replace(LABELS, ignored_values=())
    names = [f"{name} " if name == "bed" else name for name in ade20k().names]  # as their file has it
    meta = {"dataset_meta": {"classes": names, "palette": [list(colour) for colour in ade20k().palette]}}
    write_published(tag, tmp_path / "b.pth", meta)
    assert resolve(tmp_path / "b.pth").labels == ade20k()
    write_published(tag, tmp_path / "c.pth", {"CLASSES": ("wall", 3), "PALETTE": None})
    assert resolve(tmp_path / "c.pth").labels is None


def test_tag_without_weights_is_random(monkeypatch):
    monkeypatch.setattr("keras_convnext.weights.resolve.Heads", lambda classes: layouts.Heads(classes, 8))
    model = keras_convnext.load("convnext_tiny.fb_ade20k_512", weights=None)
    assert (model.classes, model.output_shape) == (150, (None, None, None, 150))
