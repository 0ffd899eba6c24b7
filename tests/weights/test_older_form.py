"""Files in the form before PyTorch 1.6, as OpenMMLab publishes: each layout of the catalog loads by a tag."""

import dataclasses

import keras
import numpy as np
import peers
import pytest
import torch

import keras_convnext
from keras_convnext.variants import VARIANTS
from keras_convnext.weights import layouts
from keras_convnext.weights.catalog import CHECKPOINTS

pytestmark = pytest.mark.one_backend

# The smallest architecture of each kind of file that PyTorch writes, and the ending of its file.
FILES = {
    "convnext_tiny.official_in1k": ".pth",
    "convnextv2_atto.official_fcmae_ft_in1k": ".pt",
    "convnextv2_atto.official_fcmae": ".pt",
    "convnext_isotropic_small.official_in1k": ".pth",
    "convnext_atto.d2_in1k": ".pth",
    "convnext_atto_ols.a2_in1k": ".pth",
    "convnextv2_atto.fcmae_ft_in1k": ".pt",
    "convnext_tiny.torchvision_in1k": ".pth",
    "convnextv2_atto.huggingface_fcmae_ft_in1k": ".bin",
    "convnext_tiny.official_dinov3_lvd1689m": ".pth",
    "convnext_tiny.dinov3_hf": ".bin",
    "convnext_tiny.fb_coco_mask_rcnn": ".pth",
    "convnext_tiny.fb_coco_cascade_mask_rcnn": ".pth",
    "convnext_tiny.mmdet_coco_mask_rcnn": ".pth",
    "convnext_tiny.fb_ade20k_512": ".pth",
    "convnext_tiny.mmseg_ade20k_512": ".pth",
}
HEADS = {
    "mmdet": (
        "neck.lateral_convs.0.conv.weight",
        "rpn_head.rpn_cls.bias",
        "roi_head.bbox_head.fc_cls.weight",
    ),
    "mmdetection": ("neck.fpn_convs.3.conv.bias",),
    "mmseg": ("decode_head.conv_seg.weight", "decode_head.bottleneck.bn.num_batches_tracked"),
    "mmsegmentation": ("decode_head.conv_seg.weight",),
}


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """The folder of files placed by hand."""
    monkeypatch.setenv("KERAS_CONVNEXT_WEIGHTS_DIR", str(tmp_path))
    monkeypatch.setenv("KERAS_CONVNEXT_OFFLINE", "1")
    return tmp_path


@pytest.fixture
def one_block_a_stage(monkeypatch):
    for tag in FILES:
        name = CHECKPOINTS[tag].architecture
        depths = (1,) * len(VARIANTS[name].depths)
        monkeypatch.setitem(VARIANTS, name, dataclasses.replace(VARIANTS[name], depths=depths))


def random_weights(row):
    """{canonical name: array} of all that a published file has of the network."""
    classes = 0 if row.layout in HEADS else row.classes
    shapes = layouts.weight_shapes(VARIANTS[row.architecture], classes, pyramid_norms=row.layout in HEADS)
    if row.tag.endswith(".official_fcmae"):
        shapes = {name: shape for name, shape in shapes.items() if not name.startswith("norm.")}
    rng = np.random.default_rng(0)
    return {name: rng.normal(size=shape).astype("float32") for name, shape in shapes.items()}


def write_file(row, weights, path):
    """Writes weights as their publisher lays them out, with what else is in such files, in the older form."""
    layout = {"dinov3": "official", "mmdet": "official", "mmseg": "official"}.get(row.layout, row.layout)
    prefix = "backbone." if row.layout in HEADS else ""
    state = {
        prefix + layouts.rename(name, layout): torch.from_numpy(array) for name, array in weights.items()
    }
    for name, tensor in state.items():
        if tensor.ndim == 4:
            state[name] = tensor.to(memory_format=torch.channels_last)
    state |= {name: torch.arange(3) for name in HEADS.get(row.layout, ())}
    if row.layout == "dinov3":  # one tensor under two names
        state |= {f"norms.3.{leaf}": state[f"norm.{leaf}"] for leaf in ("weight", "bias")}
    content = state
    if row.state_key is not None:
        content = {
            "meta": {
                "mmcv_version": "1.3.17",
                "time": "Sun Jan  9 00:00:00 2022",
                "config": "model = dict(type='MaskRCNN')\n",
                "env_info": "sys.platform: linux\nGPU 0: Tesla V100-SXM2-32GB",
                "seed": None,
                "CLASSES": ("person", "bicycle"),
                "PALETTE": [[120, 120, 120]],
                "hook_msgs": {"best_score": np.float64(46.2), "last": np.int64(160000)},
            },
            row.state_key: state,
            "optimizer": torch.optim.AdamW([torch.nn.Parameter(torch.ones(3))]).state_dict(),
        }
    torch.save(content, path, _use_new_zipfile_serialization=False)


def assert_loads(row, weights):
    model = keras_convnext.load(row.tag, pyramid_norms=row.layout in HEADS)
    state = keras_convnext.state_dict(model)
    fresh = {"norm.weight", "norm.bias"} if row.tag.endswith(".official_fcmae") else set()
    assert set(state) == set(weights) | fresh
    for name, array in weights.items():
        np.testing.assert_array_equal(state[name], array, err_msg=name)


def test_every_layout_of_the_catalog_has_a_file_here():
    of_pytorch = {row.layout for row in CHECKPOINTS.values()} - {"keras_applications"}
    assert {CHECKPOINTS[tag].layout for tag in FILES} == of_pytorch


@pytest.mark.parametrize("tag", FILES)
def test_file_loads_by_its_tag(tag, folder, one_block_a_stage):
    row = CHECKPOINTS[tag]
    weights = random_weights(row)
    write_file(row, weights, folder / f"{tag}{FILES[tag]}")
    assert_loads(row, weights)


@pytest.mark.parametrize("tag", ["convnext_tiny.fb_coco_mask_rcnn", "convnext_tiny.fb_ade20k_512"])
def test_control_exchanged_weights_fail(tag, folder, one_block_a_stage):
    row = CHECKPOINTS[tag]
    weights = random_weights(row)
    first, second = "stages.0.0.norm.weight", "stages.0.0.norm.bias"
    exchanged = {**weights, first: weights[second], second: weights[first]}
    write_file(row, exchanged, folder / f"{tag}.pth")
    with pytest.raises(AssertionError, match=r"stages\.0\.0\.norm"):
        assert_loads(row, weights)


@pytest.mark.slow
@pytest.mark.parametrize("tag", ["convnext_tiny.fb_coco_mask_rcnn", "convnext_tiny.fb_ade20k_512"])
def test_file_of_full_size_loads_by_its_tag(tag, folder):
    row = CHECKPOINTS[tag]
    weights = random_weights(row)
    write_file(row, weights, folder / f"{tag}.pth")
    assert_loads(row, weights)


@pytest.mark.parametrize("layout", ["official", "mmpretrain"])
@torch.no_grad()
def test_maps_of_an_openmmlab_backbone_equal_the_official_code(layout, folder, one_block_a_stage):
    name = "convnext_atto"
    peer = peers.randomise(peers.OfficialConvNeXt(VARIANTS[name]))
    state = {
        f"backbone.{layouts.rename(key, layout)}": value
        for key, value in peer.state_dict().items()
        if not key.startswith("head.")
    }
    torch.save({"meta": {}, "state_dict": state}, folder / "a.pth", _use_new_zipfile_serialization=False)
    x = peers.images()
    expected = peer.maps(torch.from_numpy(x).permute(0, 3, 1, 2))

    def errors():
        model = keras_convnext.load(
            name, folder / "a.pth", include_top=False, include_preprocessing=False, input_shape=(64, 64, 3)
        )
        maps = keras.Model(model.input, model.pyramid_outputs).predict(x, verbose=0)
        return [
            peers.relative_error(maps[f"P{level}"], map_.permute(0, 2, 3, 1))
            for level, map_ in enumerate(expected, start=2)
        ]

    assert max(errors()) <= 2e-5
    for key in state:
        if key.endswith("stages.0.0.norm.weight"):
            state[key] = state[key].flip(0)
    torch.save({"meta": {}, "state_dict": state}, folder / "a.pth", _use_new_zipfile_serialization=False)
    assert min(errors()) > 1e-3  # the control: what one wrong vector does
