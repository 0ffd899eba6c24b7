"""The table of published weight files, `catalog.csv`, and the names that find its rows.

The table has one row for each file and one column for each field of `Checkpoint`; an empty cell leaves the
field at its default. A tag is "<architecture>.<pretrained tag>", and the timm rows use timm's ids.

The figures are copied from these sources; only those of the weights that ship with the package were
measured here. `score_source` of a row says where its scores come from.
- timm 1.0.31, timm/models/convnext.py (sizes, crops, mean/std, licences, addresses) and
  results/results-*.csv of huggingface/pytorch-image-models at commit aa4b5850 (scores). The test size is
  what timm recommends, not always better: convnext_tiny.fb_in22k_ft_in1k loses 4 points there. timm asks
  for model.safetensors first and for pytorch_model.bin when it is missing.
- facebookresearch/ConvNeXt at commit 048efcea: README.md, object_detection/README.md (COCO: shorter side
  800 px, longer at most 1333 px; AP is of val2017), semantic_segmentation/README.md (ADE20K: UPerNet, 160k
  iterations, flip with multi-scale), datasets.py (squashes from 384 px on and crops below). "raw" files are
  those without the weight average (EMA), from which its detectors and segmenters start.
- facebookresearch/ConvNeXt-V2 at commit 25538957: README.md. Its "22k" files have 1000 classes.
- torchvision/models/convnext.py: trained by torchvision; its preset resizes bilinearly.
- keras/src/applications/convnext.py (SHA-256 sums) and keras-team/keras PR #16421 (scores, lower than
  Meta's for the same weights, which Sayak Paul converted: its evaluation squashed to 256 x 256)
- mmdetection 3.3.0, configs/convnext/metafile.yml.
- mmsegmentation 1.2.2, configs/convnext/metafile.yaml; Hugging Face's segmenters are conversions of its files
  (transformers, convert_convnext_upernet_to_pytorch.py).
- open-mmlab/mmpretrain at commit ee7f2e88: configs/convnext/README.md (one re-evaluation)
- facebookresearch/dinov3 at commit 6876159a: dinov3/hub/backbones.py
- huggingface/transformers: convert_convnext_to_pytorch.py, convert_convnextv2_to_pytorch.py
  (repository names; scores are those of the files they convert), image_processing_dinov3_vit.py (resize)
- benchmarks/ship_weights.py prints the row of weights that were trained here.

Where two sources give the same weights different licences, each row keeps what its own publisher states:
timm marks the ConvNeXt V1 files of Meta apache-2.0, Meta's own repository says MIT. The transformers rows
carry the licence of the files they convert and the keras.applications rows the licence of Keras: no source
above states one for those files themselves.
"""

import csv
import fnmatch
import importlib.resources
from collections.abc import Callable, Iterable
from typing import Any

from keras_convnext._messages import near_names, unknown
from keras_convnext.weights.published import Checkpoint

_FROM_TEXT: dict[str, Callable[[str], Any]] = {
    **dict.fromkeys(("classes", "image_size", "test_image_size", "resize_size"), int),
    **dict.fromkeys(
        ("crop", "test_crop", "top1", "top5", "test_top1", "miou", "miou_multi_scale", "box_ap", "mask_ap"),
        float,
    ),
    **dict.fromkeys(("mean", "std"), lambda cell: tuple(map(float, cell.split()))),
    **dict.fromkeys(("imagenet", "gated", "cascade"), {"yes": True, "no": False}.__getitem__),
}


def read_rows(lines: Iterable[str]) -> list[Checkpoint]:
    """Reads a table with the columns of `catalog.csv`."""
    return [
        Checkpoint(**{name: _FROM_TEXT.get(name, str)(cell) for name, cell in cells.items() if cell})
        for cells in csv.DictReader(lines)
    ]


_TABLE = importlib.resources.files("keras_convnext.weights") / "catalog.csv"
_LINES = _TABLE.read_text(encoding="utf-8").splitlines()
CHECKPOINTS: dict[str, Checkpoint] = {row.tag: row for row in read_rows(_LINES)}

# The tag that weights="imagenet" means, or None. The five of keras.applications keep its files, so that a
# change of import changes nothing; the others take timm's default tag, isotropic ones Meta's file.
IMAGENET: dict[str, str | None] = {row.architecture: None for row in CHECKPOINTS.values()} | {
    row.architecture: row.tag for row in CHECKPOINTS.values() if row.imagenet and row.classes
}

# The same for include_top=False in keras.applications; other architectures drop the head instead.
IMAGENET_NOTOP: dict[str, str] = {
    row.architecture: row.tag for row in CHECKPOINTS.values() if row.imagenet and not row.classes
}

# Names that timm has deprecated: 1.0.31, register_model_deprecations in timm/models/convnext.py.
ALIASES: dict[str, str] = {
    f"convnext_{size}_{old}": f"convnext_{size}.{new}"
    for old, new in (
        ("in22ft1k", "fb_in22k_ft_in1k"),
        ("384_in22ft1k", "fb_in22k_ft_in1k_384"),
        ("in22k", "fb_in22k"),
    )
    for size in ("tiny", "small", "base", "large", "xlarge")
}


def find_checkpoint(name: str, architecture: str | None = None) -> Checkpoint:
    """Finds the row of `CHECKPOINTS` that a name means.

    Args:
        name: a full tag ("convnext_tiny.fb_in1k"), a name that timm has deprecated ("convnext_tiny_in22k"),
            or, with `architecture`, a pretrained tag ("fb_in1k") or "imagenet".
        architecture: architecture the weights are for, e.g. "convnext_tiny". None: any.

    Raises:
        ValueError: the name is unknown (tells near names and which architectures have the tag), belongs to
            another architecture, needs an `architecture`, or that is unknown or has no ImageNet file.

    Example:
        find_checkpoint("convnext_tiny.fb_in22k_ft_in1k_384").top1                   # 84.098
        find_checkpoint("fb_in22k_ft_in1k_384", architecture="convnext_tiny").tag
        find_checkpoint("imagenet", architecture="convnextv2_atto").tag  # "convnextv2_atto.fcmae_ft_in1k"
    """
    if architecture is not None and architecture not in IMAGENET:
        raise ValueError(unknown("architecture", architecture, IMAGENET))
    if name == "imagenet":
        if architecture is None:
            raise ValueError(
                "weights 'imagenet' mean another file for each architecture, received architecture None. "
                "Pass architecture='convnext_tiny' or a full tag such as 'convnext_tiny.fb_in1k'."
            )
        tag = IMAGENET[architecture]
        if tag is None:
            raise ValueError(
                f"No ImageNet weights have been published for architecture {architecture!r}. "
                f"{_weights_of(architecture)}"
            )
        return CHECKPOINTS[tag]
    full = ALIASES.get(name, name)
    if full not in CHECKPOINTS and architecture is not None:
        full = f"{architecture}.{name}"
    if full not in CHECKPOINTS:
        raise ValueError(_unknown_weights(name, architecture))
    row = CHECKPOINTS[full]
    if architecture is not None and row.architecture != architecture:
        raise ValueError(
            f"Weights {name!r} are for {row.architecture!r}, received architecture {architecture!r}. "
            f"{_weights_of(architecture)}"
        )
    return row


def list_weights(
    architecture: str | None = None,
    classes: int | None = None,
    image_size: int | None = None,
    licence: str | None = None,
    commercial_use: bool | None = None,
    downloadable: bool | None = None,
    task: str | None = None,
) -> list[str]:
    """Lists the tags that meet every condition that is not None, in the order of the catalog.

    Args:
        architecture: name or pattern with "*", e.g. "convnextv2_*".
        classes: width of the classifier, or classes of a segmenter or detector; 0 for none.
        image_size: side in pixels.
        licence: licence identifier, e.g. "apache-2.0".
        commercial_use: whether the licence allows commercial use.
        downloadable: whether the catalog knows where the file is.
        task: "classification", "features", "segmentation" or "detection".

    Raises:
        ValueError: no architecture matches, or no row has the licence or task; tells near names.

    Example:
        list_weights("convnext_tiny", classes=21841)
        # ["convnext_tiny.fb_in22k", "convnext_tiny.official_in22k"]
        list_weights("convnextv2_*", commercial_use=True, downloadable=True)   # []
    """
    if architecture is not None and not any(fnmatch.fnmatchcase(known, architecture) for known in IMAGENET):
        raise ValueError(unknown("architecture", architecture, IMAGENET))
    licences = sorted({row.licence for row in CHECKPOINTS.values()})
    if licence is not None and licence not in licences:
        raise ValueError(unknown("licence", licence, licences))
    tasks = sorted({row.task for row in CHECKPOINTS.values()})
    if task is not None and task not in tasks:
        raise ValueError(unknown("task", task, tasks))
    conditions = {"classes": classes, "image_size": image_size, "licence": licence, "task": task}
    conditions |= {"commercial_use": commercial_use, "downloadable": downloadable}
    return [
        row.tag
        for row in CHECKPOINTS.values()
        if fnmatch.fnmatchcase(row.architecture, architecture or "*")
        and all(value is None or getattr(row, name) == value for name, value in conditions.items())
    ]


def default_checkpoint(architecture: str) -> Checkpoint:
    """An architecture's ImageNet weights, or its first in the catalog: for the image size and preparation."""
    return CHECKPOINTS[IMAGENET[architecture] or list_weights(architecture)[0]]


def _weights_of(architecture: str) -> str:
    names = [
        row.tag.removeprefix(f"{architecture}.") + ("" if row.downloadable else " (no download)")
        for row in CHECKPOINTS.values()
        if row.architecture == architecture
    ]
    return f"Weights of {architecture}: {', '.join(names)}"


def _unknown_weights(name: str, architecture: str | None) -> str:
    owners = [row.architecture for row in CHECKPOINTS.values() if row.tag.endswith(f".{name}")]
    had = f"Architectures that have them: {', '.join(owners)}"
    if architecture is None:
        if name in IMAGENET:
            return f"Weights {name!r} name an architecture only. Add '.' and one of them. {_weights_of(name)}"
        if owners:
            return f"Weights {name!r} need an architecture, received None. {had}"
        near = near_names(name, [*CHECKPOINTS, *ALIASES])
        return f"Unknown weights {name!r}.{near} list_weights() lists all {len(CHECKPOINTS)}."
    if owners:
        return (
            f"Weights {name!r} do not exist for architecture {architecture!r}. {had}. "
            f"{_weights_of(architecture)}"
        )
    own = [row.tag.partition(".")[2] for row in CHECKPOINTS.values() if row.architecture == architecture]
    near = near_names(name, ["imagenet", *CHECKPOINTS, *ALIASES, *own])
    return f"Unknown weights {name!r} for architecture {architecture!r}.{near} {_weights_of(architecture)}"
