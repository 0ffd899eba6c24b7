"""Mask R-CNN in plain PyTorch, as mmdetection computes it, and mmdetection itself where it is at hand.

`detect` here is written from the papers and mmdetection's settings with lists of any length, a greedy NMS and
onnxruntime's RoiAlign; it shares nothing with the package but the names of weights. `MmdetDetector` is
mmdetection 3.3.0's own model: test_detection.py compares both with ours.
"""

import functools
import math
import os
import sys
import types

import numpy as np
import onnxruntime
import peers
import torch
from onnx import TensorProto, helper
from torch.nn import functional as F

from keras_convnext.architecture import DetectorHeads
from keras_convnext.variants import VARIANTS
from keras_convnext.weights import layouts

STRIDES = (4, 8, 16, 32, 64)
STDS = ((0.1, 0.1, 0.2, 0.2), (0.05, 0.05, 0.1, 0.1), (0.033, 0.033, 0.067, 0.067))
# A folder with mmdet==3.3.0, mmengine==0.10.7, mmcv-lite==2.1.0, addict, yapf, opencv-python-headless,
# shapely, terminaltables, prettytable, scipy and termcolor: `pip install --no-deps --target FOLDER ...`.
MMDET = os.environ.get("KERAS_CONVNEXT_MMDET")


def random_state(architecture, heads: DetectorHeads, seed=0):
    """{name in Facebook's files: tensor}, random, with scores and boxes that lie far from each other."""
    variant = VARIANTS[architecture]
    body = peers.randomise(peers.OfficialConvNeXt(variant), seed).state_dict()
    state = {
        f"backbone.{name}": value for name, value in body.items() if not name.startswith(("norm.", "head."))
    }
    generator = torch.Generator().manual_seed(seed)
    for level, dim in enumerate(variant.dims):
        for leaf, start in (("weight", 1.0), ("bias", 0.0)):
            noise = torch.randn(dim, generator=generator)
            state[f"backbone.norm{level}.{leaf}"] = start + 0.1 * noise
    for name, shape in layouts.head_shapes(variant, heads).items():
        noise = torch.randn(shape, generator=generator)
        if name.endswith("num_batches_tracked"):
            value = torch.tensor(7)
        elif name.endswith("running_var"):
            value = 0.8 + 0.4 * torch.rand(shape, generator=generator)
        elif len(shape) > 1:
            fan_in = shape[0] if "upsample" in name else math.prod(shape[1:])
            value = noise * math.sqrt(2 / fan_in)
        else:
            value = 0.1 * noise + (name.endswith("bn.weight"))
        scale = {"rpn_reg": 0.1, "fc_reg": 0.1, "fc_cls": 0.4, "rpn_cls": 0.3, "conv_logits": 0.2}
        state[name] = value * scale.get(name.split(".")[-2], 1.0) if value.ndim else value
    return state


def maps_of(state, architecture, images):
    """The four normalised maps (N, C, h, w) of images (N, H, W, 3)."""
    variant = VARIANTS[architecture]
    body = peers.OfficialConvNeXt(variant).eval()
    own = {
        name.removeprefix("backbone."): value for name, value in state.items() if name.startswith("backbone.")
    }
    body.load_state_dict({name: value for name, value in own.items() if "norm" not in name[:4]}, strict=False)
    x = torch.from_numpy(images).permute(0, 3, 1, 2)
    return [
        F.layer_norm(y.permute(0, 2, 3, 1), y.shape[1:2], own[f"norm{i}.weight"], own[f"norm{i}.bias"], 1e-6)
        .permute(0, 3, 1, 2)
        .contiguous()
        for i, y in enumerate(body.maps(x))
    ]


# In plain PyTorch.


@functools.cache
def _session(size, scale, samples):
    values = [
        helper.make_tensor_value_info(name, kind, None) for name, kind in zip("xrb", (1, 1, 7), strict=True)
    ]
    node = helper.make_node(
        "RoiAlign",
        ["x", "r", "b"],
        ["y"],
        output_height=size,
        output_width=size,
        sampling_ratio=samples,
        spatial_scale=scale,
        coordinate_transformation_mode="half_pixel",
    )
    graph = helper.make_graph(
        [node], "g", values, [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)]
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 16)], ir_version=8)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    return onnxruntime.InferenceSession(model.SerializeToString(), options)


def roi_align(x, boxes, size, scale, samples=0):
    """Of one image (1, C, h, w) and boxes (R, 4): (R, C, size, size), by onnxruntime."""
    inputs = {"x": x.numpy(), "r": boxes.numpy(), "b": np.zeros(len(boxes), "int64")}
    return torch.from_numpy(_session(size, float(scale), samples).run(None, inputs)[0])


def levels(boxes):
    areas = (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])
    return torch.floor(torch.log2(areas.sqrt() / 56 + 1e-6)).clamp(0, 3).long()


def regions(maps, boxes, size, samples=0):
    result = torch.zeros(len(boxes), maps[0].shape[1], size, size)
    for level, x in enumerate(maps[:4]):
        chosen = levels(boxes) == level
        if chosen.any():
            result[chosen] = roi_align(x, boxes[chosen], size, 1 / STRIDES[level], samples)
    return result


def greedy(boxes, threshold):
    """Indices that greedy NMS keeps of boxes (K, 4) in the order of their scores."""
    boxes = np.asarray(boxes)
    areas = (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])
    alive, kept = np.ones(len(boxes), bool), []
    for i in range(len(boxes)):
        if not alive[i]:
            continue
        kept.append(i)
        low, high = np.maximum(boxes[i, :2], boxes[i + 1 :, :2]), np.minimum(boxes[i, 2:], boxes[i + 1 :, 2:])
        common = np.maximum(high - low, 0).prod(1)
        with np.errstate(all="ignore"):
            alive[i + 1 :] &= ~(common / (areas[i] + areas[i + 1 :] - common) > threshold)
    return np.array(kept, int)


def decoded(boxes, deltas, stds, size):
    d = deltas * torch.tensor(stds)
    sides = boxes[:, 2:] - boxes[:, :2]
    centres = (boxes[:, :2] + boxes[:, 2:]) / 2 + sides * d[:, :2]
    sides = sides * d[:, 2:].clamp(math.log(0.016), -math.log(0.016)).exp()
    moved = torch.cat([centres - sides / 2, centres + sides / 2], 1)
    return torch.minimum(moved.clamp(min=0), torch.tensor([size[1], size[0]] * 2, dtype=torch.float32))


def anchors(height, width, stride, shift=0.0, rounded=False):
    found = []
    for y in range(height):
        for x in range(width):
            for ratio in (0.5, 1.0, 2.0):
                w, h = 8 * stride / math.sqrt(ratio), 8 * stride * math.sqrt(ratio)
                if rounded:
                    w, h = round(w), round(h)
                cx, cy = (x + shift) * stride, (y + shift) * stride
                found.append([cx - w / 2, cy - h / 2, cx + w / 2, cy + h / 2])
    return torch.tensor(found, dtype=torch.float32)


def _conv(state, name, x, padding=0):
    return F.conv2d(x, state[f"{name}.weight"], state.get(f"{name}.bias"), padding=padding)


def _pyramid(state, maps):
    lateral = [_conv(state, f"neck.lateral_convs.{i}.conv", x) for i, x in enumerate(maps)]
    for i in (3, 2, 1):
        lateral[i - 1] = lateral[i - 1] + F.interpolate(
            lateral[i], size=lateral[i - 1].shape[2:], mode="nearest"
        )
    found = [_conv(state, f"neck.fpn_convs.{i}.conv", x, 1) for i, x in enumerate(lateral)]
    return [*found, F.max_pool2d(found[-1], 1, 2)]


def _proposals(state, pyramid, size, count):
    boxes, scores = [], []
    for x, stride in zip(pyramid, STRIDES, strict=True):
        h = F.relu(_conv(state, "rpn_head.rpn_conv", x, 1))
        logits = _conv(state, "rpn_head.rpn_cls", h)[0].permute(1, 2, 0).reshape(-1)
        deltas = _conv(state, "rpn_head.rpn_reg", h)[0].permute(1, 2, 0).reshape(-1, 4)
        score, order = logits.sigmoid().sort(descending=True, stable=True)
        order = order[:1000]
        moved = decoded(anchors(*x.shape[2:], stride)[order], deltas[order], (1.0,) * 4, size)
        there = ((moved[:, 2] > moved[:, 0]) & (moved[:, 3] > moved[:, 1])).nonzero()[:, 0]
        kept = there[greedy(moved[there], 0.7)]
        boxes.append(moved[kept])
        scores.append(score[:1000][kept])
    order = torch.cat(scores).sort(descending=True, stable=True)[1][:count]
    return torch.cat(boxes)[order]


def _box_head(state, place, x, cascade):
    for i in range(4 if cascade else 0):
        x = _conv(state, f"{place}.shared_convs.{i}.conv", x, 1)
        values = [
            state[f"{place}.shared_convs.{i}.bn.{leaf}"]
            for leaf in ("running_mean", "running_var", "weight", "bias")
        ]
        x = F.relu(F.batch_norm(x, *values))
    x = x.flatten(1)
    for i in range(1 if cascade else 2):
        x = F.relu(
            F.linear(x, state[f"{place}.shared_fcs.{i}.weight"], state[f"{place}.shared_fcs.{i}.bias"])
        )
    return [
        F.linear(x, state[f"{place}.{name}.weight"], state[f"{place}.{name}.bias"])
        for name in ("fc_cls", "fc_reg")
    ]


def _mask_head(state, place, x):
    for i in range(4):
        x = F.relu(_conv(state, f"{place}.convs.{i}.conv", x, 1))
    x = F.relu(
        F.conv_transpose2d(x, state[f"{place}.upsample.weight"], state[f"{place}.upsample.bias"], stride=2)
    )
    return _conv(state, f"{place}.conv_logits", x).sigmoid()


@torch.no_grad()
def detect(state, maps, size, heads: DetectorHeads, count=1000):
    """What is on each image: [{"boxes", "scores", "classes", "masks"}], of its maps and (height, width)."""
    found = []
    stages = range(3) if heads.cascade else [None]
    places = ["" if stage is None else f".{stage}" for stage in stages]
    for image in range(len(maps[0])):
        pyramid = _pyramid(state, [x[image : image + 1] for x in maps])
        boxes, all_logits = _proposals(state, pyramid, size, count), []
        for number, place in enumerate(places):
            x = regions(pyramid, boxes, 7)
            logits, deltas = _box_head(state, f"roi_head.bbox_head{place}", x, heads.cascade)
            all_logits.append(logits)
            deltas = deltas.reshape(len(boxes), heads.classes, 4)
            if number < len(places) - 1:
                best = logits[:, :-1].argmax(1)
                boxes = decoded(boxes, deltas[torch.arange(len(boxes)), best], STDS[number], size)
        probabilities = (sum(all_logits) / len(all_logits)).softmax(1)[:, :-1]
        box, score, label = [], [], []
        for one in range(heads.classes):
            passing = (probabilities[:, one] > 0.05).nonzero()[:, 0]
            passing = passing[probabilities[passing, one].sort(descending=True, stable=True)[1]]
            moved = decoded(boxes[passing], deltas[passing, one], STDS[len(places) - 1], size)
            kept = greedy(moved, 0.5)
            box.append(moved[kept])
            score.append(probabilities[passing[kept], one])
            label.append(torch.full((len(kept),), one))
        score, order = torch.cat(score).sort(descending=True, stable=True)
        order = order[:100]
        box, label = torch.cat(box)[order], torch.cat(label)[order]
        result = {"boxes": box, "scores": score[:100], "classes": label}
        if heads.masks:
            x = regions(pyramid, box, 14)
            masks = [_mask_head(state, f"roi_head.mask_head{place}", x) for place in places]
            result["masks"] = (sum(masks) / len(masks))[torch.arange(len(box)), label]
        found.append({name: value.numpy() for name, value in result.items()})
    return found


# mmdetection's.


def _stub():
    """Makes mmdet importable beside mmcv-lite: `mmcv.ops` with RoIAlign and NMS of this file."""
    sys.path.append(MMDET)
    import mmcv

    class Missing(torch.nn.Module):
        def __init__(self, *_, **__):
            raise NotImplementedError(type(self).__name__)

    class Stub(types.ModuleType):
        def __getattr__(self, name):
            if name.startswith("__"):
                raise AttributeError(name)
            return type(name, (Missing,), {})

    class RoIAlign(torch.nn.Module):
        def __init__(self, output_size, spatial_scale=1.0, sampling_ratio=0, **_):
            super().__init__()
            self.output_size = (output_size, output_size)
            self.scale, self.samples = spatial_scale, sampling_ratio

        def forward(self, x, rois):
            result = x.new_zeros(len(rois), x.shape[1], *self.output_size)
            for image in range(len(x)):
                chosen = rois[:, 0] == image
                if chosen.any():
                    result[chosen] = roi_align(
                        x[image : image + 1], rois[chosen, 1:], self.output_size[0], self.scale, self.samples
                    )
            return result

    def batched_nms(boxes, scores, groups, settings, class_agnostic=False):
        order = scores.sort(descending=True, stable=True)[1]
        kept = []
        for group in groups.unique():
            own = order[groups[order] == group]
            kept.append(own[greedy(boxes[own], settings["iou_threshold"])])
        kept = torch.cat(kept) if kept else order[:0]
        kept = kept[scores[kept].sort(descending=True, stable=True)[1]]
        if settings.get("max_num", -1) > 0:
            kept = kept[: settings["max_num"]]
        return torch.cat([boxes[kept], scores[kept, None]], 1), kept

    names = "nms roi_align merge_cells carafe modulated_deform_conv deform_conv multi_scale_deform_attn"
    for name in ("mmcv.ops", *(f"mmcv.ops.{part}" for part in f"{names} point_sample focal_loss".split())):
        sys.modules[name] = Stub(name)
        sys.modules[name].__path__ = []
    mmcv.ops = sys.modules["mmcv.ops"]
    mmcv.ops.RoIAlign, mmcv.ops.batched_nms = RoIAlign, batched_nms
    sys.modules["mmcv.ops.nms"].batched_nms = batched_nms


@functools.cache
def mmdet_modules():
    _stub()
    from mmdet.registry import MODELS
    from mmdet.utils import register_all_modules

    register_all_modules(init_default_scope=True)
    return MODELS


@torch.no_grad()
def mmdet_detect(state, maps, size, heads: DetectorHeads, count=1000):
    """The same as `detect` by mmdetection's FPN, RPNHead and RoI heads, with "pasted" masks in 0..255."""
    build = mmdet_modules().build
    from mmdet.structures import DetDataSample
    from mmengine.config import ConfigDict

    width, classes = heads.channels, heads.classes

    def coder(stds):
        return {"type": "DeltaXYWHBBoxCoder", "target_means": [0.0] * 4, "target_stds": list(stds)}

    def extractor(size):
        align = {"type": "RoIAlign", "output_size": size, "sampling_ratio": 0}
        return {
            "type": "SingleRoIExtractor",
            "roi_layer": align,
            "out_channels": width,
            "featmap_strides": [4, 8, 16, 32],
        }

    generator = {
        "type": "AnchorGenerator",
        "scales": [8],
        "ratios": [0.5, 1.0, 2.0],
        "strides": list(STRIDES),
    }
    nms = {"type": "nms", "iou_threshold": 0.7}
    test = ConfigDict(nms_pre=1000, max_per_img=count, nms=nms, min_bbox_size=0)
    neck = build(
        {"type": "FPN", "in_channels": [x.shape[1] for x in maps], "out_channels": width, "num_outs": 5}
    )
    rpn = build(
        {
            "type": "RPNHead",
            "in_channels": width,
            "feat_channels": width,
            "anchor_generator": generator,
            "bbox_coder": coder([1.0] * 4),
            "test_cfg": test,
        }
    )
    common = {
        "in_channels": width,
        "fc_out_channels": heads.hidden_channels,
        "roi_feat_size": 7,
        "num_classes": classes,
        "reg_class_agnostic": False,
    }
    mask = {
        "type": "FCNMaskHead",
        "num_convs": 4,
        "in_channels": width,
        "conv_out_channels": width,
        "num_classes": classes,
    }
    kind = "StandardRoIHead"
    box = {"type": "Shared2FCBBoxHead", **common, "bbox_coder": coder(STDS[0])}
    more = {}
    if heads.cascade:
        kind, more = "CascadeRoIHead", {"num_stages": 3, "stage_loss_weights": [1, 0.5, 0.25]}
        convolutions = {"num_shared_convs": 4, "num_shared_fcs": 1, "conv_out_channels": width}
        box = [
            {
                "type": "ConvFCBBoxHead",
                **common,
                **convolutions,
                "norm_cfg": {"type": "BN"},
                "bbox_coder": coder(stds),
            }
            for stds in STDS
        ]
    test = ConfigDict(
        score_thr=0.05, nms={"type": "nms", "iou_threshold": 0.5}, max_per_img=100, mask_thr_binary=-1
    )
    roi = build(
        {
            "type": kind,
            **more,
            "bbox_roi_extractor": extractor(7),
            "bbox_head": box,
            "mask_roi_extractor": extractor(14),
            "mask_head": mask,
            "test_cfg": test,
        }
    )
    for name, module in (("neck", neck), ("rpn_head", rpn), ("roi_head", roi)):
        own = {
            key.removeprefix(f"{name}."): value for key, value in state.items() if key.startswith(f"{name}.")
        }
        module.load_state_dict(own, strict=True)
        module.eval()
    facts = {
        "img_shape": size,
        "pad_shape": size,
        "batch_input_shape": size,
        "ori_shape": size,
        "scale_factor": (1.0, 1.0),
    }
    samples = [DetDataSample(metainfo=facts) for _ in maps[0]]
    pyramid = neck(maps)
    proposals = rpn.predict(pyramid, samples, rescale=False)
    results = roi.predict(pyramid, proposals, samples, rescale=True)
    return [
        {
            "boxes": one.bboxes.numpy(),
            "scores": one.scores.numpy(),
            "classes": one.labels.numpy(),
            "pasted": one.masks.numpy(),
        }
        for one in results
    ]
