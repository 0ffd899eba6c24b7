"""The table of weight files, compared with timm, torchvision, Keras and the collected facts."""

import collections
import csv
import dataclasses
import hashlib
import importlib.util
import json
import math
import pathlib
import re
import subprocess
import sys

import pytest

from keras_convnext.data.preprocessing import IMAGENET_MEAN, IMAGENET_STD
from keras_convnext.weights.catalog import (
    ALIASES,
    CHECKPOINTS,
    IMAGENET,
    IMAGENET_NOTOP,
    find_checkpoint,
    list_weights,
    read_rows,
)
from keras_convnext.weights.published import Checkpoint

pytestmark = pytest.mark.once

ROWS = [row for row in CHECKPOINTS.values() if not row.packaged]  # the others: test_packaged.py
TIMM_TAGS = [row.tag for row in ROWS if row.layout == "timm"]
ROOT = pathlib.Path(__file__).parents[2]
TABLE = ROOT / "keras_convnext" / "weights" / "catalog.csv"
FACTS = ROOT.parent / "shared" / "facts"
CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
HALF = (0.5, 0.5, 0.5)


@pytest.fixture(scope="module")
def timm():
    """timm, imported when it is needed."""
    import timm

    return timm


def facts(name):
    if not (FACTS / name).exists():
        pytest.skip(f"{name} is not next to the repository")
    return json.loads((FACTS / name).read_text(encoding="utf-8"))


# The table against the literal rows that it was made of.


def digest(values):
    text = json.dumps(values, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def test_table_equals_the_rows_of_before_field_by_field():
    """Made at d4d607b, of the literal rows in Python there, without this table and its reader:
    digest([dataclasses.asdict(row) for row in catalog_rows.ROWS]) and digest([IMAGENET, IMAGENET_NOTOP]).

    Whoever adds or corrects a row changes the digest and says in the commit what it was.
    """
    rows = [dataclasses.asdict(row) for row in CHECKPOINTS.values()]
    assert len(rows) == 239
    for row in rows:
        del row["imagenet"]  # it was the two dicts
    assert digest(rows) == "9bbee515e0291aa5363ba4deef6ce76e53206c57fc25f1ba7bab280291202671"
    assert (
        digest([IMAGENET, IMAGENET_NOTOP])
        == "4c3762b9571312501d765ba67e2a1a25b1bcf9c65316bb778174a5f0c4853a26"
    )


def test_rows_are_read_with_their_types():
    imagenet = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}
    timm = Checkpoint(
        tag="convnext_base.fb_in1k",
        architecture="convnext_base",
        layout="timm",
        classes=1000,
        image_size=224,
        test_image_size=288,
        crop=0.875,
        test_crop=1.0,
        resize_mode="shorter_side",
        interpolation="bicubic",
        **imagenet,
        licence="apache-2.0",
        dataset="imagenet1k",
        top1=83.838,
        top5=96.746,
        test_top1=84.466,
        score_source="timm results-imagenet.csv, aa4b5850",
        hub_id="timm/convnext_base.fb_in1k",
        hub_filename="model.safetensors",
        url="https://dl.fbaipublicfiles.com/convnext/convnext_base_1k_224_ema.pth",
    )
    torchvision = Checkpoint(
        tag="convnext_tiny.torchvision_in1k",
        architecture="convnext_tiny",
        layout="torchvision",
        classes=1000,
        image_size=224,
        crop=224 / 236,
        resize_mode="shorter_side",
        resize_size=236,
        interpolation="bilinear",
        **imagenet,
        licence="bsd-3-clause",
        dataset="imagenet1k",
        top1=82.52,
        top5=96.146,
        score_source="torchvision/models/convnext.py",
        url="https://download.pytorch.org/models/convnext_tiny-983f1562.pth",
        sha256_prefix="983f1562",
    )
    gated = Checkpoint(
        tag="convnext_tiny.dinov3_hf",
        architecture="convnext_tiny",
        layout="dinov3_hf",
        classes=0,
        image_size=224,
        crop=1.0,
        resize_mode="squash",
        interpolation="bilinear",
        **imagenet,
        licence="dinov3-license",
        dataset="lvd1689m",
        hub_id="facebook/dinov3-convnext-tiny-pretrain-lvd1689m",
        hub_filename="model.safetensors",
        note="Accept the licence on the hub first; file name not verified.",
        gated=True,
    )
    for row in (timm, torchvision, gated):
        received = CHECKPOINTS[row.tag]
        assert received == row
        for field in dataclasses.fields(Checkpoint):
            assert type(getattr(received, field.name)) is type(getattr(row, field.name)), field.name


def test_table_opens_in_a_spreadsheet():
    with open(TABLE, encoding="utf-8", newline="") as file:
        header, *rows = csv.reader(file)
    assert header == [field.name for field in dataclasses.fields(Checkpoint)]
    assert {len(row) for row in rows} == {len(header)}
    assert TABLE.read_bytes().isascii() and b"\r" not in TABLE.read_bytes()
    texts = {"sha256", "sha256_prefix", "tag", "note"}
    for row in rows:
        for name, cell in zip(header, row, strict=True):
            assert cell == cell.strip() and not cell.startswith(("=", "+", "-", "@"))  # a formula
            assert name not in texts or not re.fullmatch(r"\d+(e\d+)?", cell)  # a number


# The table against itself.


def test_each_source_has_its_number_of_rows():
    assert collections.Counter(row.layout for row in ROWS) == {
        "timm": 103,
        "official": 24 + 3 + 26,  # V1, V1 without EMA, V2
        "mmdet": 7,
        "mmdetection": 3,
        "mmseg": 6,
        "mmsegmentation": 6,
        "torchvision": 4,
        "keras_applications": 10,
        "dinov3_hf": 4,
        "dinov3": 4,
        "huggingface": 15 + 18 + 5,  # V1, V2, segmenters
    }
    assert len(list_weights(downloadable=True)) == len(CHECKPOINTS) - 2 - 4
    assert sum(row.downloadable for row in ROWS if row.layout == "timm") == 101


def test_no_two_rows_share_a_tag():
    assert len(read_rows(TABLE.read_text(encoding="utf-8").splitlines())) == len(CHECKPOINTS)
    assert not set(ALIASES) & set(CHECKPOINTS)
    assert not set(IMAGENET) & set(CHECKPOINTS)


def test_tag_is_architecture_and_pretrained_tag():
    for row in ROWS:
        architecture, pretrained = row.tag.split(".")
        assert architecture == row.architecture and pretrained, row.tag


def test_architectures_are_those_of_the_variants():
    variants = pytest.importorskip("keras_convnext.variants").VARIANTS
    assert set(IMAGENET) == set(variants)
    assert {row.architecture for row in ROWS} == set(variants)


def test_rows_hold_only_known_values():
    assert {row.resize_mode for row in ROWS} == {"shorter_side", "squash"}
    assert {row.interpolation for row in ROWS} == {"bicubic", "bilinear"}
    assert {(row.mean, row.std) for row in ROWS} == {
        (IMAGENET_MEAN, IMAGENET_STD),
        (CLIP_MEAN, CLIP_STD),
        (HALF, HALF),
    }
    assert {row.state_key for row in ROWS} == {None, "model", "state_dict"}
    assert {row.classes for row in ROWS} == {0, 80, 150, 640, 768, 1000, 1024, 11821, 21841}
    assert {row.image_size for row in ROWS} == {160, 224, 256, 320, 384, 512, 640, 800}
    for row in ROWS:
        assert 0.8 < row.crop <= 1.0
        assert row.resize_mode == "shorter_side" or row.crop == 1.0
        assert (row.test_image_size is None) == (row.test_crop is None)
        assert row.test_image_size is None or row.test_image_size > row.image_size


def test_mean_and_std_are_the_published_constants():
    assert (IMAGENET_MEAN, IMAGENET_STD) == ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    assert sum(row.mean == CLIP_MEAN for row in ROWS) == 14 + 10  # fine-tuned, towers


def test_licences_and_which_forbid_commercial_use():
    assert collections.Counter(row.licence for row in ROWS) == {
        "apache-2.0": 70 + 10 + 6 + 3,  # timm, keras.applications, mmsegmentation, mmdetection
        "cc-by-nc-4.0": 26 + 26 + 18,  # timm, Meta, transformers
        "mit": 24 + 3 + 7 + 6 + 15 + 5,
        "bsd-3-clause": 4,
        "dinov3-license": 4 + 4 + 4,
        "fair-noncommercial-research-license": 3,
    }
    assert {row.licence for row in ROWS if not row.commercial_use} == {
        "cc-by-nc-4.0",
        "fair-noncommercial-research-license",
    }
    trained_v2 = [row for row in ROWS if row.architecture.startswith("convnextv2")]
    assert [row.tag for row in trained_v2 if row.commercial_use] == ["convnextv2_small.untrained"]


def test_scores_are_percentages_with_a_source():
    for row in ROWS:
        for score in (
            row.top1,
            row.top5,
            row.test_top1,
            row.miou,
            row.miou_multi_scale,
            row.box_ap,
            row.mask_ap,
        ):
            assert score is None or 40 < score < 100, row.tag
        scores = (row.top1, row.miou, row.box_ap)
        assert any(score is not None for score in scores) == bool(row.score_source), row.tag
        assert (row.box_ap is not None) == (row.mask_ap is not None) == (row.task == "detection")
        assert (row.miou is not None) == (row.miou_multi_scale is not None) == (row.task == "segmentation")
        assert row.miou is None or row.miou < row.miou_multi_scale < row.miou + 1
        assert row.top5 is None or row.top5 > row.top1
        assert row.top1 is None or row.classes == 1000, row.tag
    unscored = [row.tag for row in ROWS if row.classes == 1000 and row.top1 is None]
    assert unscored == [
        "convnext_atto_rms.untrained",
        "convnextv2_small.untrained",
        "convnext_tiny.official_in1k_raw",
        "convnext_small.official_in1k_raw",
    ]


def test_larger_test_size_helps_every_tag_but_one():
    worse = [row.tag for row in ROWS if row.test_top1 is not None and row.test_top1 < row.top1]
    assert worse == ["convnext_tiny.fb_in22k_ft_in1k"]


def test_addresses_are_complete():
    hosts = {
        "timm": ("https://dl.fbaipublicfiles.com/convnext/", "https://github.com/rwightman/"),
        "official": ("https://dl.fbaipublicfiles.com/convnext/",),
        "mmdet": ("https://dl.fbaipublicfiles.com/convnext/coco/",),
        "mmdetection": ("https://download.openmmlab.com/mmdetection/v2.0/convnext/",),
        "mmseg": ("https://dl.fbaipublicfiles.com/convnext/ade20k/",),
        "mmsegmentation": ("https://download.openmmlab.com/mmsegmentation/v0.5/convnext/",),
        "torchvision": ("https://download.pytorch.org/models/",),
        "keras_applications": ("https://storage.googleapis.com/tensorflow/keras-applications/convnext/",),
    }
    for row in ROWS:
        assert row.url is None or row.url.startswith(hosts[row.layout]), row.tag
        assert (row.hub_id is None) == (row.hub_filename is None)
        assert row.downloadable or row.note, row.tag
    alone = ("official", "mmdet", "mmdetection", "mmseg", "mmsegmentation", "torchvision")
    for layout in (*alone, "keras_applications"):
        rows = [row for row in ROWS if row.layout == layout]
        assert all(row.url and row.hub_id is None for row in rows)
        assert len({row.url for row in rows}) == len(rows)
    hub_ids = [row.hub_id for row in ROWS if row.hub_id]
    assert len(set(hub_ids)) == len(hub_ids) == 101 + 4 + 38


def test_checksums_are_hexadecimal_and_in_the_file_name():
    for row in ROWS:
        assert row.sha256 is None or re.fullmatch("[0-9a-f]{64}", row.sha256)
        if row.sha256_prefix is not None:
            assert re.fullmatch("[0-9a-f]{8}", row.sha256_prefix)
            assert f"-{row.sha256_prefix}.pth" in (row.url or row.note)
    assert {row.layout for row in ROWS if row.sha256} == {"keras_applications"}
    with_prefix = collections.Counter(row.layout for row in ROWS if row.sha256_prefix)
    assert with_prefix == {"timm": 9, "torchvision": 4, "dinov3": 4, "mmdetection": 3, "mmsegmentation": 6}


def test_only_the_files_of_meta_dinov3_are_gated():
    gated = [row for row in ROWS if row.gated]
    assert {row.layout for row in gated} == {"dinov3", "dinov3_hf"}
    assert len(gated) == 8
    assert {row.dataset for row in gated} == {"lvd1689m"}


def test_dataset_ends_with_what_the_head_was_trained_on():
    last = {150: "ade20k", 1000: "imagenet1k", 11821: "imagenet12k", 21841: "imagenet22k"}
    for row in ROWS:
        if row.classes in last and row.dataset != "none":
            assert row.dataset.split("->")[-1] == last[row.classes], row.tag
        if row.classes in (640, 768, 1024):
            assert row.dataset in ("laion2b", "laion_aesthetic"), row.tag
    assert [row.tag for row in ROWS if row.dataset == "none"] == [
        "convnext_atto_rms.untrained",
        "convnextv2_small.untrained",
    ]


def test_module_needs_the_standard_library_only():
    code = (
        "import sys\n"
        "before = set(sys.modules)\n"
        "import keras_convnext_main\n"  # with which the package imports nothing by itself
        "import keras_convnext.weights.catalog\n"
        "print(*{name.partition('.')[0] for name in set(sys.modules) - before})\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    ours = {"keras_convnext", "keras_convnext_main"}
    assert ours <= set(done.stdout.split()) <= sys.stdlib_module_names | ours


# The table against its sources.


@pytest.mark.parametrize("tag", TIMM_TAGS)
def test_timm_row_equals_the_registry_of_timm(tag, timm):
    row, published = CHECKPOINTS[tag], timm.models.get_pretrained_cfg(tag, allow_unregistered=False)
    assert row.tag == f"{published.architecture}.{published.tag}"
    assert row.architecture == published.architecture
    assert row.hub_id == published.hf_hub_id
    assert row.url == (published.url or None)
    assert published.hf_hub_filename is None  # so timm asks for model.safetensors first
    assert row.classes == published.num_classes
    assert (3, row.image_size, row.image_size) == published.input_size
    test_size = published.test_input_size
    assert row.test_image_size == (None if test_size is None else test_size[1])
    assert row.crop == published.crop_pct
    assert row.test_crop == published.test_crop_pct
    assert row.resize_mode == {"center": "shorter_side", "squash": "squash"}[published.crop_mode]
    assert row.resize_size is None
    assert row.interpolation == published.interpolation
    assert (row.mean, row.std) == (published.mean, published.std)
    assert row.licence == published.license


def test_timm_rows_are_all_tags_of_timm(timm):
    listed = timm.list_models(module="convnext", include_tags=True)
    assert len(listed) == len(TIMM_TAGS) == 103
    assert set(listed) == set(TIMM_TAGS)


def test_aliases_are_the_deprecations_of_timm(timm):
    deprecated = timm.models._registry.get_deprecated_models("convnext")
    assert deprecated == ALIASES
    assert set(ALIASES.values()) <= set(CHECKPOINTS)


def test_torchvision_rows_equal_its_weight_enums(timm):
    from torchvision import models

    for name in ("Tiny", "Small", "Base", "Large"):
        published = getattr(models, f"ConvNeXt_{name}_Weights").IMAGENET1K_V1
        row = CHECKPOINTS[f"convnext_{name.lower()}.torchvision_in1k"]
        scores = published.meta["_metrics"]["ImageNet-1K"]
        preset = published.transforms()
        assert row.url == published.url
        assert (row.top1, row.top5) == (scores["acc@1"], scores["acc@5"])
        assert [row.resize_size] == preset.resize_size
        assert [row.image_size] == preset.crop_size
        assert row.interpolation == preset.interpolation.value
        assert (list(row.mean), list(row.std)) == (preset.mean, preset.std)
        assert math.isclose(row.crop, row.image_size / row.resize_size)


def test_keras_rows_equal_the_source_of_keras():
    # read as text: importing keras would start a backend
    origin = importlib.util.find_spec("keras").submodule_search_locations[0]
    source = (pathlib.Path(origin) / "src/applications/convnext.py").read_text(encoding="utf-8")
    hashes = re.findall(r'"(convnext_\w+)": \(\s*"(\w{64})",\s*"(\w{64})",', source)
    base = re.search(r'BASE_WEIGHTS_PATH = \(\s*"(.*)"', source)[1]
    assert len(hashes) == 5
    for architecture, with_top, without_top in hashes:
        top = CHECKPOINTS[f"{architecture}.keras_applications"]
        notop = CHECKPOINTS[f"{architecture}.keras_applications_notop"]
        assert (top.sha256, notop.sha256) == (with_top, without_top)
        assert (top.url, notop.url) == (
            f"{base}{architecture}.h5",
            f"{base}{architecture}_notop.h5",
        )
        assert (top.classes, notop.classes) == (1000, 0)


def test_timm_scores_equal_the_collected_facts():
    for fact in facts("timm_tags.json")["tags"]:
        row, scores = CHECKPOINTS[fact["tag"]], (fact["timm_results"] or {}).get("imagenet", {})
        score = scores.get(str(row.image_size), {})
        assert (row.top1, row.top5) == (score.get("top1"), score.get("top5")), row.tag
        assert row.test_top1 == scores.get(str(row.test_image_size), {}).get("top1"), row.tag


@pytest.mark.parametrize("section, count", [("fb_v1", 24), ("fb_v2", 26), ("fb_v1_extra_non_ema", 3)])
def test_official_rows_equal_the_collected_facts(section, count):
    by_url = {row.url: row for row in ROWS if row.layout == "official"}
    rows = [(by_url[fact["url"]], fact) for fact in facts("official_checkpoints.json")[section]]
    assert len(rows) == count
    version = "convnextv2" if section == "fb_v2" else "convnext"
    for row, fact in rows:
        assert row.architecture == f"{version}_{fact['variant']}"
        assert row.image_size == fact.get("resolution", 224)
        assert row.classes == fact.get("num_classes", 1000)
        assert (row.note == "Encoder only.") == (fact.get("num_classes") == 0)
        assert row.state_key == fact.get("checkpoint_key", "model")
        assert row.licence == ("cc-by-nc-4.0" if section == "fb_v2" else "mit")
        assert row.resize_mode == ("squash" if row.image_size >= 384 else "shorter_side")
        assert math.floor(row.image_size / row.crop) == {224: 256, 384: 384, 512: 512}[row.image_size]
        if section != "fb_v1_extra_non_ema":
            assert row.top1 == fact["top1"]


def test_dense_task_rows_equal_the_collected_facts():
    by_url = {row.url: row for row in ROWS if row.layout in ("mmdet", "mmseg")}
    collected = facts("official_checkpoints.json")
    for fact in collected["fb_v1_coco"]:
        row = by_url.pop(fact["url"])
        assert row.architecture == f"convnext_{fact['variant']}"
        assert (row.task, row.classes, row.cascade) == ("detection", 80, "Cascade" in fact["method"])
        assert (row.box_ap, row.mask_ap) == (fact["box_mAP"], fact["mask_mAP"])
        assert row.tag.endswith("_in22k") == row.dataset.startswith("imagenet22k")
        assert row.dataset.startswith("imagenet22k") == (fact["pretrain"] == "ImageNet-22K")
    for fact in collected["fb_v1_ade20k"]:
        row = by_url.pop(fact["url"])
        assert row.architecture == f"convnext_{fact['variant']}"
        assert fact["crop"] == f"{row.image_size}x{row.image_size}"
        assert (row.miou, row.miou_multi_scale) == (fact["mIoU_ss"], fact["mIoU_ms_flip"])
        assert (row.task, row.classes) == ("segmentation", 150)
        assert row.tag == f"{row.architecture}.fb_ade20k_{row.image_size}"
        assert row.dataset.startswith("imagenet22k") == (fact["pretrain"] == "ImageNet-22K")
    assert not by_url


def test_other_rows_equal_the_collected_facts():
    collected = facts("official_checkpoints.json")
    for fact in collected["keras_applications"]["files"]:
        row = next(row for row in ROWS if row.url == fact["url"])
        assert (row.sha256, row.classes) == (fact["hash"], 1000 if fact["include_top"] else 0)
        assert row.dataset == fact["dataset"].replace("->1k", "->imagenet1k")
        if fact["include_top"]:
            variant = row.architecture.removeprefix("convnext_")
            assert row.top1 == collected["keras_applications"]["author_measured_top1"][variant][1]
    for fact in collected["dinov3"]["files"]:
        hub = CHECKPOINTS[f"convnext_{fact['variant']}.dinov3_hf"]
        original = CHECKPOINTS[f"convnext_{fact['variant']}.official_dinov3_lvd1689m"]
        assert hub.hub_id == fact["hf_hub_id"]
        assert original.sha256_prefix == fact["sha256_prefix"]
        assert fact["file"] in original.note
    hub_ids = {row.hub_id for row in ROWS if row.layout == "huggingface" and row.task != "segmentation"}
    assert hub_ids == {*collected["hf_hub_ids"]["v1"], *collected["hf_hub_ids"]["v2"]}


def test_huggingface_rows_score_as_the_file_they_convert():
    for row in ROWS:
        if row.layout == "huggingface" and row.task == "segmentation":
            converted = CHECKPOINTS[row.tag.replace(".huggingface_", ".mmseg_")]
            for field in ("classes", "image_size", "dataset", "miou", "miou_multi_scale"):
                assert getattr(row, field) == getattr(converted, field), row.tag
            assert row.hub_id == f"openmmlab/upernet-{row.architecture.replace('_', '-')}"
        elif row.layout == "huggingface":
            official = CHECKPOINTS[row.tag.replace(".huggingface_", ".official_")]
            for field in ("classes", "image_size", "crop", "resize_mode", "licence", "dataset"):
                assert getattr(row, field) == getattr(official, field), row.tag
            assert row.top1 == official.top1
            architecture, version = row.architecture.split("_")
            assert row.hub_id.startswith(f"facebook/{architecture}-{version}-")
            assert str(row.image_size) in row.hub_id.split("-")


# weights="imagenet".


def test_imagenet_means_one_1000_class_file_for_each_architecture():
    assert len(IMAGENET) == 34
    assert [name for name, tag in IMAGENET.items() if tag is None] == [
        "convnext_atto_rms",
        "convnextv2_small",
    ]
    for architecture, tag in IMAGENET.items():
        if tag is not None:
            row = CHECKPOINTS[tag]
            assert row.architecture == architecture
            assert row.classes == 1000 and row.downloadable


def test_imagenet_keeps_the_files_of_keras_applications():
    five = [f"convnext_{size}" for size in ("tiny", "small", "base", "large", "xlarge")]
    assert [a for a, tag in IMAGENET.items() if tag and tag.endswith(".keras_applications")] == [
        name for name in IMAGENET if name in five
    ]
    assert {name: f"{name}.keras_applications_notop" for name in five} == IMAGENET_NOTOP
    assert set(IMAGENET_NOTOP.values()) <= set(CHECKPOINTS)


def test_imagenet_is_the_default_tag_of_timm_elsewhere(timm):
    for architecture, tag in IMAGENET.items():
        if architecture not in IMAGENET_NOTOP and "isotropic" not in architecture:
            default = timm.models.get_pretrained_cfg(architecture)
            assert tag == (f"{architecture}.{default.tag}" if default.has_weights else None)


# find_checkpoint and list_weights.


@pytest.mark.parametrize(
    "name, architecture, tag",
    [
        ("convnext_tiny.fb_in1k", None, "convnext_tiny.fb_in1k"),
        ("convnext_tiny.fb_in1k", "convnext_tiny", "convnext_tiny.fb_in1k"),
        ("fb_in22k_ft_in1k_384", "convnext_tiny", "convnext_tiny.fb_in22k_ft_in1k_384"),
        ("convnext_tiny_in22k", None, "convnext_tiny.fb_in22k"),
        ("convnext_tiny_in22k", "convnext_tiny", "convnext_tiny.fb_in22k"),
        ("imagenet", "convnext_tiny", "convnext_tiny.keras_applications"),
        ("imagenet", "convnextv2_atto", "convnextv2_atto.fcmae_ft_in1k"),
        ("untrained", "convnextv2_small", "convnextv2_small.untrained"),
    ],
)
def test_find_checkpoint_finds(name, architecture, tag):
    assert find_checkpoint(name, architecture) is CHECKPOINTS[tag]


@pytest.mark.parametrize(
    "name, architecture, message",
    [
        (
            "convnext_tiny.fb_in1",
            None,
            "Unknown weights 'convnext_tiny.fb_in1'. Did you mean 'convnext_tiny.fb_in1k' or "
            "'convnext_tiny.fb_in22k' or 'convnext_tiny.in12k'? "
            f"list_weights() lists all {len(CHECKPOINTS)}.",
        ),
        ("qqqq", None, f"Unknown weights 'qqqq'. list_weights() lists all {len(CHECKPOINTS)}."),
        (
            "convnextv2_pico",
            None,
            "Weights 'convnextv2_pico' name an architecture only. Add '.' and one of them. "
            "Weights of convnextv2_pico: fcmae_ft_in1k, fcmae, official_fcmae, official_fcmae_ft_in1k, "
            "huggingface_fcmae_ft_in1k",
        ),
        (
            "fb_in1k",
            None,
            "Weights 'fb_in1k' need an architecture, received None. Architectures that have "
            "them: convnext_base, convnext_large, convnext_small, convnext_tiny",
        ),
        (
            "fcmae_ft_in1",
            "convnextv2_pico",
            "Unknown weights 'fcmae_ft_in1' for architecture 'convnextv2_pico'. Did you mean "
            "'fcmae_ft_in1k' or ",
        ),
        (
            "d2_in1k",
            "convnext_pico_ols",
            "Weights 'd2_in1k' do not exist for architecture 'convnext_pico_ols'. Architectures "
            "that have them: convnext_atto. Weights of convnext_pico_ols: d1_in1k",
        ),
        (
            "convnext_pico.d1_in1k",
            "convnext_pico_ols",
            "Weights 'convnext_pico.d1_in1k' are for 'convnext_pico', received architecture "
            "'convnext_pico_ols'. Weights of convnext_pico_ols: d1_in1k",
        ),
        (
            "imagenet",
            None,
            "weights 'imagenet' mean another file for each architecture, received architecture "
            "None. Pass architecture='convnext_tiny' or a full tag",
        ),
        (
            "imagenet",
            "convnextv2_small",
            "No ImageNet weights have been published for architecture 'convnextv2_small'. "
            "Weights of convnextv2_small: untrained (no download)",
        ),
        (
            "imagenet",
            "convnext_tinny",
            "Unknown architecture 'convnext_tinny'. Did you mean 'convnext_tiny' or ",
        ),
    ],
)
def test_find_checkpoint_refuses_and_helps(name, architecture, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        find_checkpoint(name, architecture)


def test_unknown_architecture_error_lists_all_34():
    with pytest.raises(ValueError, match="Known: convnext_atto, ") as error:
        find_checkpoint("fb_in1k", "convnext_tinny")
    known = str(error.value).split("Known: ")[1].split(", ")
    assert known == list(IMAGENET)


def test_list_weights_without_conditions_lists_the_table_in_order():
    assert list_weights() == list(CHECKPOINTS)


def test_list_weights_meets_every_condition():
    assert list_weights("convnext_tiny", classes=21841) == [
        "convnext_tiny.fb_in22k",
        "convnext_tiny.official_in22k",
    ]
    assert list_weights("convnextv2_*", commercial_use=True, downloadable=True) == []
    assert list_weights("convnextv2_*", commercial_use=True) == ["convnextv2_small.untrained"]
    assert list_weights("test_*") == [
        "test_convnext.r160_in1k",
        "test_convnext2.r160_in1k",
        "test_convnext3.r160_in1k",
    ]
    assert list_weights(image_size=512, classes=1000) == [
        "convnextv2_huge.fcmae_ft_in22k_in1k_512",
        "convnextv2_huge.official_fcmae_ft_in22k_in1k_512",
        "convnextv2_huge.huggingface_fcmae_ft_in22k_in1k_512",
    ]
    assert list_weights(licence="bsd-3-clause") == [
        f"convnext_{size}.torchvision_in1k" for size in ("tiny", "small", "base", "large")
    ]
    assert list_weights(downloadable=False) == [
        "convnext_atto_rms.untrained",
        "convnextv2_small.untrained",
        *(f"convnext_{size}.official_dinov3_lvd1689m" for size in ("tiny", "small", "base", "large")),
    ]
    assert list_weights(classes=3) == []
    assert list_weights("convnext_tiny", task="segmentation") == [
        f"convnext_tiny.{source}_ade20k_512" for source in ("fb", "mmseg", "huggingface")
    ]
    assert len(list_weights(task="segmentation")) == 17
    assert list_weights(task="features") == list_weights(classes=0)


@pytest.mark.parametrize("architecture", ["convnext_tinny", "convnex_*"])
def test_list_weights_refuses_an_unknown_architecture(architecture):
    with pytest.raises(ValueError, match=re.escape(f"Unknown architecture '{architecture}'.")):
        list_weights(architecture)


def test_list_weights_refuses_an_unknown_licence():
    message = (
        "Unknown licence 'apache2'. Did you mean 'apache-2.0'? Known: apache-2.0, bsd-3-clause, "
        "cc-by-nc-4.0, dinov3-license, fair-noncommercial-research-license, mit"
    )
    with pytest.raises(ValueError, match=re.escape(message)):
        list_weights(licence="apache2")


def test_list_weights_refuses_an_unknown_task():
    message = (
        "Unknown task 'segment'. Did you mean 'segmentation'? Known: classification, detection, features, "
        "segmentation"
    )
    with pytest.raises(ValueError, match=re.escape(message)):
        list_weights(task="segment")


def test_docstring_examples_say_the_truth():
    assert find_checkpoint("convnext_tiny.fb_in1k").top1 == 82.066
    assert find_checkpoint("convnext_tiny.fb_in22k_ft_in1k_384").top1 == 84.098
    assert find_checkpoint("convnext_tiny.fb_in1k").commercial_use
    assert not find_checkpoint("convnextv2_tiny.fcmae_ft_in1k").commercial_use
    assert not find_checkpoint("convnextv2_small.untrained").downloadable
