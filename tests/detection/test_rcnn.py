"""Mask R-CNN and Cascade Mask R-CNN as a whole: against PyTorch and mmdetection, the graph, files, errors."""

import functools

import detectors
import keras
import numpy as np
import peers
import pytest
import segmenters
import torch

import keras_convnext
from keras_convnext import predictor
from keras_convnext.architecture import DetectorHeads, head_layers_of, layers_of
from keras_convnext.data.detection import inference
from keras_convnext.detection import Detector, MaskRCNN, heads, rcnn, regions, with_sizes
from keras_convnext.detection import boxes as box
from keras_convnext.variants import VARIANTS
from keras_convnext.weights import layouts

V1, V2 = "convnext_atto", "convnextv2_atto"
MASK, CASCADE = (DetectorHeads(11, 32, 64, True, cascade) for cascade in (False, True))
SIZES = ((128, 160), (96, 64))
LIMITS = {"boxes": 0.01, "scores": 1e-5, "masks": 1e-4}  # pixels, shares
CASES = [(V1, MASK, SIZES[0]), (V2, CASCADE, SIZES[1])]
MORE = [(V1, CASCADE, SIZES[0]), (V2, MASK, SIZES[1]), (V1, MASK, SIZES[1]), (V2, CASCADE, SIZES[0])]
BACKEND = keras.backend.backend()
# A model is compiled for ten seconds and more by JAX, for some by TensorFlow.
ALL = [
    pytest.param(*case, marks=[pytest.mark.slow] * (case in MORE or BACKEND != "torch"))
    for case in CASES + MORE
]


@pytest.fixture(autouse=True, scope="module")
def reduced_table():
    with pytest.MonkeyPatch.context() as patch:
        segmenters.one_block_a_stage(patch, V1, V2)
        yield


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """(state dict, its file) of an architecture with heads, each made once."""
    folder = tmp_path_factory.mktemp("detectors")

    @functools.cache
    def make(name, heads):
        state = detectors.random_state(name, heads)
        return state, peers.save(state, folder / f"{name}_{heads.cascade}.safetensors")

    return make


@pytest.fixture(scope="module")
def found(made):
    """What our model finds on two images, a list as `detectors.detect` returns."""

    @functools.cache
    def find(name, heads, size):
        model = keras_convnext.load(made(name, heads)[1], include_preprocessing=False)
        return as_lists(model.predict(peers.images(size), verbose=0))

    return find


def expected(made, name, heads, size, by=detectors.detect):
    state, _ = made(name, heads)
    with torch.no_grad():
        maps = detectors.maps_of(state, name, peers.images(size))
    return by(state, maps, size, heads)


def as_lists(outputs):
    return [
        {name: values[image][:count] for name, values in outputs.items() if name != "count"}
        for image, count in enumerate(outputs["count"])
    ]


def errors(received, expected):
    """The largest difference of each kind between detections, as sets: equal scores have no order."""
    largest = dict.fromkeys(LIMITS, 0.0)
    for ours, theirs in zip(received, expected, strict=True):
        if len(ours["scores"]) != len(theirs["scores"]):
            return dict.fromkeys(LIMITS, np.inf)
        distance = np.abs(ours["boxes"][:, None] - theirs["boxes"][None]).max(-1)
        distance += np.abs(ours["scores"][:, None] - theirs["scores"][None])
        distance += 1e4 * (ours["classes"][:, None] != theirs["classes"][None])
        place = distance.argmin(1)
        if sorted(place) != list(range(len(place))):
            return dict.fromkeys(LIMITS, np.inf)
        for name in LIMITS:
            difference = np.abs(ours[name] - theirs[name][place]).max()
            largest[name] = max(largest[name], float(difference))
    return largest


def fits(received, expected):
    return all(value <= LIMITS[name] for name, value in errors(received, expected).items())


@pytest.mark.parametrize(("name", "heads", "size"), ALL)
def test_detections_equal_those_of_plain_pytorch(name, heads, size, made, found):
    theirs = expected(made, name, heads, size)
    scores = np.concatenate([one["scores"] for one in theirs])
    assert scores.min() < 0.95 and np.ptp(scores) > 0.05  # far from each other
    assert all(50 < len(one["scores"]) <= 100 for one in theirs)
    assert fits(found(name, heads, size), theirs), errors(found(name, heads, size), theirs)


@pytest.mark.slow
@pytest.mark.skipif(not detectors.MMDET, reason="KERAS_CONVNEXT_MMDET names no folder with mmdet 3.3.0")
@pytest.mark.parametrize(("name", "heads", "size"), CASES + MORE)
def test_detections_equal_those_of_mmdetection(name, heads, size, made, found):
    theirs = expected(made, name, heads, size, detectors.mmdet_detect)
    ours = found(name, heads, size)
    for one, other in zip(ours, theirs, strict=True):
        masks = zip(one["masks"], one["boxes"], strict=True)
        one["pasted"] = np.stack([inference.pasted(mask, box, size) for mask, box in masks])
        other["masks"] = other["pasted"] / np.float32(255)  # rounded to 256 steps there
    limits = {**LIMITS, "masks": 1.01 / 255 + LIMITS["masks"]}
    received = [{**one, "masks": one["pasted"]} for one in ours]
    largest = errors(received, theirs)
    assert all(largest[kind] <= limit for kind, limit in limits.items()), largest


# Controls: what other detectors do differently is seen.

CONTROL = (V1, MASK, SIZES[1])


@pytest.mark.one_backend
@pytest.mark.parametrize(
    "kind",
    [
        "aligned=False",
        pytest.param("rounded anchors", marks=pytest.mark.slow),
        pytest.param("anchors on the middle of cells", marks=pytest.mark.slow),
    ],
)
def test_control_other_arithmetic_fails(kind, made, monkeypatch):
    plain, align = box.anchors, regions.roi_align

    def anchors(height, width, stride):
        found = plain(height, width, stride)
        return keras.ops.round(found) if kind == "rounded anchors" else found + stride / 2

    if kind == "aligned=False":
        monkeypatch.setattr(regions, "roi_align", lambda maps, boxes, *rest: align(maps, boxes + 2.0, *rest))
    else:
        monkeypatch.setattr(box, "anchors", anchors)
    model = keras_convnext.load(made(V1, MASK)[1], include_preprocessing=False)
    received = as_lists(model.predict(peers.images(CONTROL[2]), verbose=0))
    assert not fits(received, expected(made, *CONTROL))


@pytest.mark.one_backend
@pytest.mark.slow
@pytest.mark.parametrize("layer", ["fc_cls", "shared_fcs.0"])
def test_control_background_first_or_channels_last_fail(layer, made, tmp_path):
    state, name = dict(made(V1, MASK)[0]), f"roi_head.bbox_head.{layer}.weight"
    if layer == "fc_cls":
        state[name] = state[name].roll(1, 0)
    else:
        state[name] = state[name].reshape(64, 32, 49).transpose(1, 2).reshape(64, -1).contiguous()
    model = keras_convnext.load(peers.save(state, tmp_path / "x.safetensors"), include_preprocessing=False)
    received = as_lists(model.predict(peers.images(CONTROL[2]), verbose=0))
    assert not fits(received, expected(made, *CONTROL))


# The graph.


@pytest.fixture(scope="module")
def body():
    return keras_convnext.TestConvNeXt2(weights=None, include_top=False, pyramid_norms=True)


def small(body, **changes):
    settings = {"channels": 16, "hidden_channels": 32, "num_proposals": 50, "num_detections": 20}
    return MaskRCNN(body, 5, **{**settings, "score_threshold": 0.01, **changes})


PIXELS = 255 * np.random.default_rng(0).random((2, 64, 96, 3), "float32")


@pytest.mark.one_backend
@pytest.mark.parametrize("cascade", [False, True])
def test_outputs_have_fixed_sizes_and_padding_is_zeros(cascade, body):
    model = small(body, cascade=cascade)
    assert (model.classes, model.has_masks, model.is_cascade) == (5, True, cascade)
    outputs = model.predict(PIXELS, verbose=0)
    shapes = {"boxes": (2, 20, 4), "scores": (2, 20), "classes": (2, 20), "masks": (2, 20, 28, 28)}
    assert {name: value.shape for name, value in outputs.items()} == {**shapes, "count": (2,)}
    assert (outputs["count"] > 0).all() and outputs["classes"].max() < 5
    none = small(body, score_threshold=0.99).predict(PIXELS, verbose=0)
    assert (none["count"] == 0).all() and (none["classes"] == -1).all()
    assert not any(none[name].any() for name in ("boxes", "scores", "masks"))


@pytest.mark.one_backend
def test_a_model_for_boxes_alone_has_no_mask_head(body):
    model = small(body, masks=False)
    assert not model.has_masks and "masks" not in model.output
    assert not [name for name in keras_convnext.state_dict(model) if "mask_head" in name]


@pytest.mark.slow
def test_a_model_of_one_size_gives_what_one_of_any_size_does(body):
    free = small(body)
    fixed = small(body, image_size=(64, 96))
    assert fixed.input_shape == (None, 64, 96, 3)
    fixed.set_weights(free.get_weights())
    expected = free.predict(PIXELS, verbose=0)
    for name, value in fixed.predict(PIXELS, verbose=0).items():
        np.testing.assert_allclose(value, expected[name], rtol=1e-4, atol=1e-4)
    free.predict(PIXELS[:, :, :64], verbose=0)  # TensorFlow's third size has free sides
    smaller = free.predict(PIXELS[:, :32, :64], verbose=0)
    assert smaller["boxes"][..., 3].max() <= 32 and (smaller["count"] > 0).all()


@pytest.mark.one_backend
def test_no_box_goes_beyond_the_size_that_is_passed(body):
    model = with_sizes(small(body))
    sizes = np.array([[50, 60], [64, 96]], "float32")
    boxes = model.predict([PIXELS, sizes], verbose=0)["boxes"]
    assert (boxes.max(1) <= [[60, 50, 60, 50], [96, 64, 96, 64]]).all()
    assert boxes[1, :, 2].max() > 60


@pytest.mark.one_backend
def test_numbers_that_are_not_finite_are_told(body):
    model = small(body)
    kernel = model.get_layer("neck").weights[0]
    kernel.assign(np.full(kernel.shape, np.nan))
    with pytest.raises(ValueError, match="infinite ones or NaN"):
        predictor.open_detector(model, image_size=64).detect(PIXELS[0].astype("uint8"))


@pytest.mark.one_backend
def test_boxes_stay_in_float32_under_16_bit_policies():
    before = keras.config.dtype_policy()
    keras.config.set_dtype_policy("mixed_bfloat16")
    try:
        body = keras_convnext.TestConvNeXt2(weights=None, include_top=False, pyramid_norms=True)
        model = small(body, cascade=True)
        outputs = model(PIXELS)
    finally:
        keras.config.set_dtype_policy(before)
    kinds = {name: keras.backend.standardize_dtype(value.dtype) for name, value in outputs.items()}
    floats = dict.fromkeys(("boxes", "scores", "masks"), "float32")
    assert kinds == {**floats, "classes": "int32", "count": "int32"}
    assert model.get_layer("neck").compute_dtype == "bfloat16"
    assert model.get_layer("roi_head_proposals").compute_dtype == "float32"


@pytest.mark.one_backend
def test_description_names_every_weight_of_the_model(body):
    for masks, cascade in ((True, False), (False, True), (True, True)):
        model = small(body, masks=masks, cascade=cascade)
        kind = DetectorHeads(5, 16, 32, masks, cascade)
        layers = layers_of(VARIANTS["test_convnext2"], 512, 0, pyramid_norms=True)
        layers += head_layers_of(VARIANTS["test_convnext2"], kind)
        described = {name: shape for layer in layers for name, shape in layer.weights.items()}
        state = keras_convnext.state_dict(model)
        assert {name.removeprefix("backbone."): value.shape for name, value in state.items()} == described
        trained = sum(int(np.prod(weight.shape)) for weight in model.trainable_weights)
        assert trained == sum(layer.num_weights for layer in layers)


@pytest.mark.slow
@pytest.mark.one_backend
def test_keras_file_keeps_the_model_and_its_numbers(body, tmp_path):
    model = small(body, cascade=True)
    model.save(tmp_path / "x.keras")
    expected = model.predict(PIXELS, verbose=0)
    for again in (keras.saving.load_model(tmp_path / "x.keras"), keras_convnext.load(tmp_path / "x.keras")):
        assert isinstance(again, Detector)
        for name, value in again.predict(PIXELS, verbose=0).items():
            np.testing.assert_array_equal(value, expected[name], err_msg=name)


@pytest.mark.one_backend
@pytest.mark.parametrize(
    "layer",
    [
        heads.FeaturePyramid(8),
        heads.ProposalHead(),
        heads.BoxHead(3, 8, True),
        heads.MaskHead(3),
        rcnn.Proposals(7),
        rcnn.RegionAlign(7, 2),
        rcnn.Refine((0.1,) * 4),
        rcnn.Detections((0.1,) * 4, 5, 0.2),
    ],
)
def test_layers_are_made_again_from_their_configuration(layer):
    again = type(layer).from_config(layer.get_config())
    assert again.get_config() == layer.get_config()


@pytest.mark.one_backend
def test_wrong_arguments_are_refused(body):
    for changes, message in (
        ({"channels": 0}, "channels must be a whole number from 1 up. Received: channels=0"),
        ({"num_proposals": 1.5}, r"num_proposals must be a whole number .* Received: num_proposals=1\.5"),
        ({"score_threshold": 1}, r"score_threshold must be in \[0, 1\), .* Received: score_threshold=1"),
    ):
        with pytest.raises(ValueError, match=message):
            small(body, **changes)
    fixed = keras_convnext.TestConvNeXt2(
        weights=None, include_top=False, pyramid_norms=True, input_shape=(64, 64, 3)
    )
    with pytest.raises(ValueError, match=r"that of the backbone, 64 x 64. Received: image_size=96"):
        small(fixed, image_size=96)
    plain = keras_convnext.TestConvNeXt2(weights=None, include_top=False)
    with pytest.raises(ValueError, match=r"pyramid_norms=True. Received: 'test_convnext2'"):
        MaskRCNN(plain, 5)


# Keys and totals.


@pytest.mark.once
@pytest.mark.parametrize(
    ("name", "cascade", "parameters"),
    [
        ("tiny", False, 48_095_376),
        ("tiny", True, 85_930_578),
        ("small", True, 107_565_138),
        ("base", True, 145_800_242),
        ("large", True, 254_710_770),
        ("xlarge", True, 406_875_058),
    ],
)
def test_parameters_are_the_published_totals(name, cascade, parameters):
    variant = keras_convnext.variants.VARIANTS[f"convnext_{name}"]
    kind = DetectorHeads(80, cascade=cascade)
    layers = layers_of(variant, 512, 0, pyramid_norms=True) + head_layers_of(variant, kind)
    assert sum(layer.num_weights for layer in layers) == parameters


@pytest.mark.once
def test_keys_and_shapes_of_the_heads_are_the_published_ones():
    dims = (96, 192, 384, 768)
    expected = {}

    def add(name, *shape, bias=True):
        expected[f"{name}.weight"] = shape
        if bias:
            expected[f"{name}.bias"] = (shape[1] if "upsample" in name else shape[0],)

    for level, dim in enumerate(dims):
        add(f"neck.lateral_convs.{level}.conv", 256, dim, 1, 1)
        add(f"neck.fpn_convs.{level}.conv", 256, 256, 3, 3)
    add("rpn_head.rpn_conv", 256, 256, 3, 3)
    add("rpn_head.rpn_cls", 3, 256, 1, 1)
    add("rpn_head.rpn_reg", 12, 256, 1, 1)
    common = dict(expected)
    for cascade, count in ((False, 42), (True, 148)):
        expected = dict(common)
        for stage in ("", ".0", ".1", ".2")[cascade : 4 if cascade else 1]:
            box_head, mask_head = f"roi_head.bbox_head{stage}", f"roi_head.mask_head{stage}"
            for number in range(4 if cascade else 0):
                add(f"{box_head}.shared_convs.{number}.conv", 256, 256, 3, 3, bias=False)
                leaves = ("weight", "bias", "running_mean", "running_var")
                expected |= {f"{box_head}.shared_convs.{number}.bn.{leaf}": (256,) for leaf in leaves}
                expected[f"{box_head}.shared_convs.{number}.bn.num_batches_tracked"] = ()
            add(f"{box_head}.shared_fcs.0", 1024, 12544)
            if not cascade:
                add(f"{box_head}.shared_fcs.1", 1024, 1024)
            add(f"{box_head}.fc_cls", 81, 1024)
            add(f"{box_head}.fc_reg", 320, 1024)
            for number in range(4):
                add(f"{mask_head}.convs.{number}.conv", 256, 256, 3, 3)
            add(f"{mask_head}.upsample", 256, 256, 2, 2)
            add(f"{mask_head}.conv_logits", 80, 256, 1, 1)
        kind = DetectorHeads(80, cascade=cascade)
        assert layouts.head_shapes(VARIANTS["convnext_tiny"], kind) == expected
        assert len(expected) == count
