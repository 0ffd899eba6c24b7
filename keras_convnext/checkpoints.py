# ruff: noqa: E501
"""Every published ConvNeXt weight file: where it is, how to read it, what it expects, how well it does.

`CHECKPOINTS` is one literal table with one row per file. The rows state every fact, nothing is
read out of a name; a tag is "<architecture>.<pretrained tag>", and the timm rows use timm's ids.

The figures are copied from the sources below; only those of the weights that ship with the package
(`_packaged`) were measured here. `score_source` of a row says where its scores come from.
- timm 1.0.31, timm/models/convnext.py (sizes, crops, mean/std, licences, addresses) and
  results/results-*.csv of huggingface/pytorch-image-models at commit aa4b5850 (scores)
- facebookresearch/ConvNeXt at commit 048efcea: README.md, object_detection/README.md,
  semantic_segmentation/README.md, datasets.py
- facebookresearch/ConvNeXt-V2 at commit 25538957: README.md
- torchvision/models/convnext.py
- keras/src/applications/convnext.py (SHA-256 sums) and keras-team/keras PR #16421 (scores)
- open-mmlab/mmpretrain at commit ee7f2e88: configs/convnext/README.md (one re-evaluation)
- facebookresearch/dinov3 at commit 6876159a: dinov3/hub/backbones.py
- huggingface/transformers: convert_convnext_to_pytorch.py, convert_convnextv2_to_pytorch.py
  (repository names), image_processing_dinov3_vit.py (resize of the DINOv3 rows)

Where two sources give the same weights different licences, each row keeps what its own publisher
states: timm marks the ConvNeXt V1 files of Meta apache-2.0, Meta's own repository says MIT.
The transformers rows carry the licence of the files they convert and the keras.applications rows
the licence of Keras: no source above states one for those files themselves.
"""

import difflib
import fnmatch
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
HALF = (0.5, 0.5, 0.5)

# Endings of the weight files that the package reads; those of PyTorch it writes too.
TORCH_SUFFIXES = (".safetensors", ".pth", ".pt", ".bin")
WEIGHT_SUFFIXES = (*TORCH_SUFFIXES, ".h5", ".keras")

NON_COMMERCIAL_LICENCES = ("cc-by-nc-4.0", "fair-noncommercial-research-license", "research-only")


@dataclass(frozen=True)
class Checkpoint:
    """One published weight file.

    Evaluation preprocessing of a row: resize as `resize_mode` says, cut the centre
    `image_size` x `image_size`, divide by 255, subtract `mean`, divide by `std`.

    Args:
        tag: "<architecture>.<pretrained tag>", unique. timm's model id for the timm rows.
        architecture: name of the architecture, a key of `variants.VARIANTS`.
        layout: names and shapes of the arrays inside the file. "timm", "official" (Meta V1 and V2;
            the encoder-only V2 files are dense already and lack the final norm and the head),
            "torchvision", "huggingface", "dinov3" (official names plus copies of the final norm),
            "dinov3_hf", "keras_applications", "mmdet" or "mmseg" (official names behind
            "backbone.", plus the task heads). A timm row means the file on the hub: an address at
            dl.fbaipublicfiles.com beside it is the file that timm converted, in the official layout.
        classes: width of the classifier; 0 when the file has none. CLIP towers: the width of the
            image projection, which timm stores as classifier.
        image_size: side in pixels of the square the scores `top1` and `top5` were taken at; for
            "mmdet" the shorter side of the test images, for "mmseg" the training crop.
        test_image_size: larger side that timm recommends for testing, or None.
        crop: fraction `image_size` / size after the resize.
        test_crop: the same at `test_image_size`, or None.
        resize_mode: "shorter_side" resizes the shorter side to int(floor(image_size / crop));
            "squash" resizes both sides to that number, which loses the aspect ratio.
        resize_size: pixels of the shorter side where the publisher states it (torchvision), else
            None and the formula holds.
        interpolation: "bicubic" or "bilinear", both antialiased as in Pillow.
        mean: per channel (RGB), for pixels in 0..1.
        std: per channel (RGB), for pixels in 0..1.
        licence: SPDX identifier where there is one, else the publisher's identifier.
        dataset: what the weights were trained on, in order, e.g. "imagenet22k->imagenet1k".
        top1: published ImageNet-1k top-1 accuracy in percent at `image_size`, or None. Packaged weights:
            of the held-out images of their own data set, as `score_source` says.
        top5: the same for top-5.
        test_top1: published top-1 accuracy in percent at `test_image_size`, or None.
        score_source: table the scores come from; "" when there is no score.
        hub_id: repository on the Hugging Face hub, or None.
        hub_filename: file in that repository, or None.
        url: direct address, or None.
        sha256: SHA-256 of the file at `url`, 64 hexadecimal digits, or None.
        sha256_prefix: first 8 hexadecimal digits of it where the file name carries them (for
            "dinov3": of the file that `note` names), or None.
        state_key: key of the dictionary in the file that holds the arrays ("model", "state_dict"),
            or None when they are at the top. A timm row means the file on the hub.
        note: what else a user must know.
        gated: the publisher asks for an agreement before the download.
        packaged: name of a file in the folder `weights` of this package, which then needs no download,
            or None.

    Example:
        row = find_checkpoint("convnext_tiny.fb_in1k")
        row.image_size, row.crop, row.top1          # (224, 0.875, 82.066)
        row.commercial_use                          # True
    """

    tag: str
    architecture: str
    layout: str
    classes: int
    image_size: int
    test_image_size: int | None
    crop: float
    test_crop: float | None
    resize_mode: str
    resize_size: int | None
    interpolation: str
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    licence: str
    dataset: str
    top1: float | None = None
    top5: float | None = None
    test_top1: float | None = None
    score_source: str = ""
    hub_id: str | None = None
    hub_filename: str | None = None
    url: str | None = None
    sha256: str | None = None
    sha256_prefix: str | None = None
    state_key: str | None = None
    note: str = ""
    gated: bool = False
    packaged: str | None = None

    @property
    def commercial_use(self) -> bool:
        """Whether the licence allows commercial use.

        Returns:
            False for cc-by-nc-4.0, fair-noncommercial-research-license and "research-only" (weights trained
            on photographs that are for research and education). True otherwise, which for
            dinov3-license still means its own conditions.

        Example:
            find_checkpoint("convnextv2_tiny.fcmae_ft_in1k").commercial_use  # False
        """
        return self.licence not in NON_COMMERCIAL_LICENCES

    @property
    def address(self) -> dict[str, Any]:
        """Where the file is: the arguments that the functions of `downloads` share."""
        return {
            "tag": self.tag,
            "hub_id": self.hub_id,
            "hub_filename": self.hub_filename,
            "url": self.url,
            "packaged": self.packaged,
        }

    @property
    def is_projection(self) -> bool:
        """Whether the last layer is the image projection of a CLIP tower, not a classifier."""
        return self.classes > 0 and self.dataset in ("laion2b", "laion_aesthetic")

    @property
    def downloadable(self) -> bool:
        """Whether the table knows a place to get the file from.

        Returns:
            True when `hub_id` or `url` is set, or the file ships with the package. A `gated` file needs an
            account there.

        Example:
            find_checkpoint("convnextv2_small.untrained").downloadable  # False
        """
        return any(place is not None for place in (self.hub_id, self.url, self.packaged))


_META = "https://dl.fbaipublicfiles.com/convnext/"
_META_V2 = "https://dl.fbaipublicfiles.com/convnext/convnextv2/"
_RSB = "https://github.com/rwightman/pytorch-image-models/releases/download/v0.1-rsb-weights/"
_TORCH = "https://download.pytorch.org/models/"
_KERAS = "https://storage.googleapis.com/tensorflow/keras-applications/convnext/"

_V1_README = "facebookresearch/ConvNeXt README.md"
_V2_README = "facebookresearch/ConvNeXt-V2 README.md"

_Scores = tuple[float | None, float | None]
_Channels = tuple[float, float, float]


def _timm(
    tag: str,
    dataset: str,
    classes: int,
    image_size: int,
    crop: float,
    *,
    resize_mode: str = "shorter_side",
    top: _Scores = (None, None),
    test: tuple[int | None, float | None, float | None] = (None, None, None),
    mean: _Channels = IMAGENET_MEAN,
    std: _Channels = IMAGENET_STD,
    licence: str = "apache-2.0",
    url: str | None = None,
    sha256_prefix: str | None = None,
    trained: bool = True,
    note: str = "",
) -> Checkpoint:
    """A row of timm's registry. `top`: (top-1, top-5). `test`: (image size, crop, top-1)."""
    return Checkpoint(
        tag=tag,
        architecture=tag.split(".")[0],
        layout="timm",
        classes=classes,
        image_size=image_size,
        test_image_size=test[0],
        crop=crop,
        test_crop=test[1],
        resize_mode=resize_mode,
        resize_size=None,
        interpolation="bicubic",
        mean=mean,
        std=std,
        licence=licence,
        dataset=dataset,
        top1=top[0],
        top5=top[1],
        test_top1=test[2],
        score_source="timm results-imagenet.csv, aa4b5850" if top[0] is not None else "",
        hub_id=f"timm/{tag}" if trained else None,
        # timm 1.0.31 asks for this name first and for pytorch_model.bin when it is missing
        hub_filename="model.safetensors" if trained else None,
        url=url,
        sha256_prefix=sha256_prefix,
        note=note,
    )


def _timm_clip(
    tag: str,
    dataset: str,
    classes: int,
    image_size: int,
    *,
    resize_mode: str = "shorter_side",
    top: _Scores = (None, None),
) -> Checkpoint:
    """A row of timm's registry that began as an OpenCLIP image tower: its mean/std, no crop."""
    return _timm(
        tag,
        dataset,
        classes,
        image_size,
        1.0,
        resize_mode=resize_mode,
        top=top,
        mean=CLIP_MEAN,
        std=CLIP_STD,
    )


def _official(
    tag: str,
    dataset: str,
    classes: int,
    image_size: int,
    url: str,
    top1: float | None = None,
    *,
    licence: str = "mit",
    top5: float | None = None,
    score_source: str = _V1_README,
    note: str = "",
) -> Checkpoint:
    """A classification file of Meta. Its datasets.py squashes from 384 px on and crops below."""
    squash = image_size >= 384
    return Checkpoint(
        tag=tag,
        architecture=tag.split(".")[0],
        layout="official",
        classes=classes,
        image_size=image_size,
        test_image_size=None,
        crop=1.0 if squash else 224 / 256,
        test_crop=None,
        resize_mode="squash" if squash else "shorter_side",
        resize_size=None,
        interpolation="bicubic",
        mean=IMAGENET_MEAN,
        std=IMAGENET_STD,
        licence=licence,
        dataset=dataset,
        top1=top1,
        top5=top5,
        score_source=score_source if top1 is not None else "",
        url=url,
        state_key="model",
        note=note,
    )


def _official_v2(
    tag: str,
    dataset: str,
    classes: int,
    image_size: int,
    url: str,
    top1: float | None = None,
    *,
    note: str = "",
) -> Checkpoint:
    """A classification or FCMAE file of Meta's ConvNeXt V2: the same pipeline, another licence."""
    return _official(
        tag,
        dataset,
        classes,
        image_size,
        url,
        top1,
        licence="cc-by-nc-4.0",
        score_source=_V2_README,
        note=note,
    )


def _dense_task(tag: str, layout: str, dataset: str, image_size: int, url: str, note: str) -> Checkpoint:
    """A detector (mmdet) or segmenter (mmseg) of Meta; `note` carries its published score."""
    return Checkpoint(
        tag=tag,
        architecture=tag.split(".")[0],
        layout=layout,
        classes=0,
        image_size=image_size,
        test_image_size=None,
        crop=1.0,
        test_crop=None,
        resize_mode="shorter_side",
        resize_size=None,
        interpolation="bilinear",
        mean=IMAGENET_MEAN,
        std=IMAGENET_STD,
        licence="mit",
        dataset=dataset,
        url=url,
        state_key="state_dict",
        note=note,
    )


def _torchvision(tag: str, resize_size: int, file: str, sha256_prefix: str, top: _Scores) -> Checkpoint:
    """A file of torchvision, trained by torchvision. `top`: (top-1, top-5)."""
    return Checkpoint(
        tag=tag,
        architecture=tag.split(".")[0],
        layout="torchvision",
        classes=1000,
        image_size=224,
        test_image_size=None,
        crop=224 / resize_size,
        test_crop=None,
        resize_mode="shorter_side",
        resize_size=resize_size,
        interpolation="bilinear",  # the default of its ImageClassification preset, not bicubic
        mean=IMAGENET_MEAN,
        std=IMAGENET_STD,
        licence="bsd-3-clause",
        dataset="imagenet1k",
        top1=top[0],
        top5=top[1],
        score_source="torchvision/models/convnext.py",
        url=_TORCH + file,
        sha256_prefix=sha256_prefix,
    )


def _keras_applications(
    tag: str, dataset: str, classes: int, file: str, sha256: str, top1: float | None = None
) -> Checkpoint:
    """A file of keras.applications: Meta's weights, converted by Sayak Paul."""
    return Checkpoint(
        tag=tag,
        architecture=tag.split(".")[0],
        layout="keras_applications",
        classes=classes,
        image_size=224,
        test_image_size=None,
        crop=224 / 256,
        test_crop=None,
        resize_mode="shorter_side",
        resize_size=None,
        interpolation="bicubic",
        mean=IMAGENET_MEAN,
        std=IMAGENET_STD,
        licence="apache-2.0",
        dataset=dataset,
        top1=top1,
        # lower than Meta's figure for the same weights: its evaluation squashed to 256 x 256
        score_source="keras-team/keras PR #16421, measured in Keras" if top1 is not None else "",
        url=_KERAS + file,
        sha256=sha256,
    )


def _packaged(
    tag: str, dataset: str, classes: int, image_size: int, sha256: str, top1: float, top5: float, note: str
) -> Checkpoint:
    """Weights trained here that ship with the package; `benchmarks/ship_weights.py` prints the call."""
    return Checkpoint(
        tag=tag,
        architecture=tag.split(".")[0],
        layout="timm",
        classes=classes,
        image_size=image_size,
        test_image_size=None,
        crop=1.0,
        test_crop=None,
        resize_mode="shorter_side",
        resize_size=None,
        interpolation="bicubic",
        mean=IMAGENET_MEAN,
        std=IMAGENET_STD,
        licence="research-only",
        dataset=dataset,
        top1=top1,
        top5=top5,
        score_source=f"measured here on {dataset}: benchmarks/runs/{tag}.json",
        sha256=sha256,
        packaged=f"{tag}.safetensors",
        note=note,
    )


def _dinov3(
    tag: str, layout: str, note: str, hub_id: str | None = None, sha256_prefix: str | None = None
) -> Checkpoint:
    """A DINOv3 encoder of Meta, behind an agreement. Preprocessing of its Hugging Face processor."""
    return Checkpoint(
        tag=tag,
        architecture=tag.split(".")[0],
        layout=layout,
        classes=0,
        image_size=224,
        test_image_size=None,
        crop=1.0,
        test_crop=None,
        resize_mode="squash",
        resize_size=None,
        interpolation="bilinear",
        mean=IMAGENET_MEAN,
        std=IMAGENET_STD,
        licence="dinov3-license",
        dataset="lvd1689m",
        hub_id=hub_id,
        hub_filename=None if hub_id is None else "model.safetensors",
        sha256_prefix=sha256_prefix,
        note=note,
        gated=True,
    )


def _huggingface(
    tag: str,
    dataset: str,
    classes: int,
    image_size: int,
    hub_id: str,
    top1: float | None = None,
    *,
    licence: str = "mit",
    score_source: str = _V1_README,
) -> Checkpoint:
    """A transformers conversion of one of Meta's files: its licence, pipeline and score."""
    squash = image_size >= 384
    return Checkpoint(
        tag=tag,
        architecture=tag.split(".")[0],
        layout="huggingface",
        classes=classes,
        image_size=image_size,
        test_image_size=None,
        crop=1.0 if squash else 224 / 256,
        test_crop=None,
        resize_mode="squash" if squash else "shorter_side",
        resize_size=None,
        interpolation="bicubic",
        mean=IMAGENET_MEAN,
        std=IMAGENET_STD,
        licence=licence,
        dataset=dataset,
        top1=top1,
        score_source=f"{score_source}, for the same weights" if top1 is not None else "",
        hub_id=hub_id,
        hub_filename="model.safetensors",
        note="Repository name from the conversion script's rule; name and file not verified.",
    )


def _huggingface_v2(tag: str, dataset: str, image_size: int, hub_id: str, top1: float) -> Checkpoint:
    """A transformers conversion of one of Meta's ConvNeXt V2 files; all have 1000 classes."""
    return _huggingface(
        tag,
        dataset,
        1000,
        image_size,
        hub_id,
        top1,
        licence="cc-by-nc-4.0",
        score_source=_V2_README,
    )


# fmt: off
_ROWS: tuple[Checkpoint, ...] = (
    # timm 1.0.31. (tag, dataset, classes, image size, crop), (top-1, top-5), test (size, crop, top-1).
    # test is what timm recommends, not always better: convnext_tiny.fb_in22k_ft_in1k loses 4 points there.
    _timm("convnext_atto.d2_in1k", "imagenet1k", 1000, 224, 0.875, top=(75.672, 92.914), test=(288, 0.95, 77.016),
        url=_RSB + "convnext_atto_d2-01bb0f51.pth", sha256_prefix="01bb0f51"),
    _timm("convnext_atto_ols.a2_in1k", "imagenet1k", 1000, 224, 0.875, top=(75.902, 92.842), test=(288, 0.95, 77.22),
        url=_RSB + "convnext_atto_ols_a2-78d1c8f3.pth", sha256_prefix="78d1c8f3"),
    _timm("convnext_atto_rms.untrained", "none", 1000, 224, 0.875, test=(256, 0.95, None), trained=False,
        note="Architecture only, no file was published."),
    _timm("convnext_base.fb_in22k_ft_in1k", "imagenet22k->imagenet1k", 1000, 224, 0.875, top=(85.814, 97.856),
        test=(288, 1.0, 86.302), url=_META + "convnext_base_22k_1k_224.pth"),
    _timm("convnext_base.fb_in1k", "imagenet1k", 1000, 224, 0.875, top=(83.838, 96.746), test=(288, 1.0, 84.466),
        url=_META + "convnext_base_1k_224_ema.pth"),
    _timm("convnext_base.fb_in22k_ft_in1k_384", "imagenet22k->imagenet1k", 1000, 384, 1.0, resize_mode="squash",
        top=(86.826, 98.244), url=_META + "convnext_base_22k_1k_384.pth"),
    _timm("convnext_base.fb_in22k", "imagenet22k", 21841, 224, 0.875, url=_META + "convnext_base_22k_224.pth"),
    _timm_clip("convnext_base.clip_laion2b_augreg_ft_in12k_in1k", "laion2b->imagenet12k->imagenet1k", 1000, 256,
        top=(86.378, 97.976)),
    _timm_clip("convnext_base.clip_laion2b_augreg_ft_in12k_in1k_384", "laion2b->imagenet12k->imagenet1k", 1000, 384,
        resize_mode="squash", top=(87.144, 98.228)),
    _timm_clip("convnext_base.clip_laion2b_augreg_ft_in1k", "laion2b->imagenet1k", 1000, 256, top=(86.184, 97.674)),
    _timm_clip("convnext_base.clip_laiona_augreg_ft_in1k_384", "laion_aesthetic->imagenet1k", 1000, 384,
        top=(86.49, 97.96)),
    _timm_clip("convnext_base.clip_laion2b_augreg_ft_in12k", "laion2b->imagenet12k", 11821, 256),
    _timm_clip("convnext_base.clip_laion2b", "laion2b", 640, 256),
    _timm_clip("convnext_base.clip_laion2b_augreg", "laion2b", 640, 256),
    _timm_clip("convnext_base.clip_laiona", "laion_aesthetic", 640, 256),
    _timm_clip("convnext_base.clip_laiona_320", "laion_aesthetic", 640, 320),
    _timm_clip("convnext_base.clip_laiona_augreg_320", "laion_aesthetic", 640, 320),
    _timm("convnext_base.dinov3_lvd1689m", "lvd1689m", 0, 224, 1.0, licence="dinov3-license"),
    _timm("convnext_base.eupe_lvd1689m", "lvd1689m", 0, 256, 1.0, licence="fair-noncommercial-research-license"),
    _timm("convnext_femto.d1_in1k", "imagenet1k", 1000, 224, 0.875, top=(77.498, 93.678), test=(288, 0.95, 78.712),
        url=_RSB + "convnext_femto_d1-d71d5b4c.pth", sha256_prefix="d71d5b4c"),
    _timm("convnext_femto_ols.d1_in1k", "imagenet1k", 1000, 224, 0.875, top=(77.852, 93.826),
        test=(288, 0.95, 78.916), url=_RSB + "convnext_femto_ols_d1-246bf2ed.pth", sha256_prefix="246bf2ed"),
    _timm("convnext_large.fb_in22k_ft_in1k", "imagenet22k->imagenet1k", 1000, 224, 0.875, top=(86.612, 98.036),
        test=(288, 1.0, 87.012), url=_META + "convnext_large_22k_1k_224.pth"),
    _timm("convnext_large.fb_in1k", "imagenet1k", 1000, 224, 0.875, top=(84.304, 96.892), test=(288, 1.0, 84.862),
        url=_META + "convnext_large_1k_224_ema.pth"),
    _timm("convnext_large.fb_in22k_ft_in1k_384", "imagenet22k->imagenet1k", 1000, 384, 1.0, resize_mode="squash",
        top=(87.456, 98.38), url=_META + "convnext_large_22k_1k_384.pth"),
    _timm("convnext_large.fb_in22k", "imagenet22k", 21841, 224, 0.875, url=_META + "convnext_large_22k_224.pth"),
    _timm("convnext_large.dinov3_lvd1689m", "lvd1689m", 0, 224, 1.0, licence="dinov3-license"),
    _timm_clip("convnext_large_mlp.clip_laion2b_soup_ft_in12k_in1k_320", "laion2b->imagenet12k->imagenet1k", 1000,
        320, top=(87.97, 98.474)),
    _timm_clip("convnext_large_mlp.clip_laion2b_soup_ft_in12k_in1k_384", "laion2b->imagenet12k->imagenet1k", 1000,
        384, resize_mode="squash", top=(88.334, 98.574)),
    _timm_clip("convnext_large_mlp.clip_laion2b_augreg_ft_in1k", "laion2b->imagenet1k", 1000, 256,
        top=(87.344, 98.222)),
    _timm_clip("convnext_large_mlp.clip_laion2b_augreg_ft_in1k_384", "laion2b->imagenet1k", 1000, 384,
        resize_mode="squash", top=(87.89, 98.448)),
    _timm_clip("convnext_large_mlp.clip_laion2b_soup_ft_in12k_320", "laion2b->imagenet12k", 11821, 320),
    _timm_clip("convnext_large_mlp.clip_laion2b_augreg_ft_in12k_384", "laion2b->imagenet12k", 11821, 384,
        resize_mode="squash"),
    _timm_clip("convnext_large_mlp.clip_laion2b_soup_ft_in12k_384", "laion2b->imagenet12k", 11821, 384,
        resize_mode="squash"),
    _timm_clip("convnext_large_mlp.clip_laion2b_augreg", "laion2b", 768, 256),
    _timm_clip("convnext_large_mlp.clip_laion2b_ft_320", "laion2b", 768, 320),
    _timm_clip("convnext_large_mlp.clip_laion2b_ft_soup_320", "laion2b", 768, 320),
    _timm("convnext_nano.in12k_ft_in1k", "imagenet12k->imagenet1k", 1000, 224, 0.95, top=(82.306, 96.338),
        test=(288, 1.0, 82.882)),
    _timm("convnext_nano.d1h_in1k", "imagenet1k", 1000, 224, 0.95, top=(80.762, 95.332), test=(288, 1.0, 81.474),
        url=_RSB + "convnext_nano_d1h-7eb4bdea.pth", sha256_prefix="7eb4bdea"),
    _timm("convnext_nano.r384_in12k_ft_in1k", "imagenet12k->imagenet1k", 1000, 384, 1.0, top=(83.334, 96.624)),
    _timm("convnext_nano.in12k", "imagenet12k", 11821, 224, 0.95),
    _timm("convnext_nano.r384_in12k", "imagenet12k", 11821, 384, 1.0),
    _timm("convnext_nano.r384_ad_in12k", "imagenet12k", 11821, 384, 1.0),
    _timm("convnext_nano_ols.d1h_in1k", "imagenet1k", 1000, 224, 0.95, top=(80.906, 95.254), test=(288, 1.0, 81.612),
        url=_RSB + "convnext_nano_ols_d1h-ae424a9a.pth", sha256_prefix="ae424a9a"),
    _timm("convnext_pico.d1_in1k", "imagenet1k", 1000, 224, 0.875, top=(79.516, 94.554), test=(288, 0.95, 80.426),
        url=_RSB + "convnext_pico_d1-10ad7f0d.pth", sha256_prefix="10ad7f0d"),
    _timm("convnext_pico_ols.d1_in1k", "imagenet1k", 1000, 224, 0.95, top=(79.542, 94.706), test=(288, 1.0, 80.458),
        url=_RSB + "convnext_pico_ols_d1-611f0ca7.pth", sha256_prefix="611f0ca7"),
    _timm("convnext_small.in12k_ft_in1k", "imagenet12k->imagenet1k", 1000, 224, 0.95, top=(85.164, 97.502),
        test=(288, 1.0, 85.324)),
    _timm("convnext_small.in12k_ft_in1k_384", "imagenet12k->imagenet1k", 1000, 384, 1.0, resize_mode="squash",
        top=(86.186, 97.92)),
    _timm("convnext_small.in12k", "imagenet12k", 11821, 224, 0.95),
    _timm("convnext_small.fb_in22k_ft_in1k", "imagenet22k->imagenet1k", 1000, 224, 0.875, top=(84.582, 97.414),
        test=(288, 1.0, 85.276), url=_META + "convnext_small_22k_1k_224.pth"),
    _timm("convnext_small.fb_in1k", "imagenet1k", 1000, 224, 0.875, top=(83.144, 96.432), test=(288, 1.0, 83.704),
        url=_META + "convnext_small_1k_224_ema.pth"),
    _timm("convnext_small.fb_in22k_ft_in1k_384", "imagenet22k->imagenet1k", 1000, 384, 1.0, resize_mode="squash",
        top=(85.752, 97.878), url=_META + "convnext_small_22k_1k_384.pth"),
    _timm("convnext_small.fb_in22k", "imagenet22k", 21841, 224, 0.875, url=_META + "convnext_small_22k_224.pth"),
    _timm("convnext_small.dinov3_lvd1689m", "lvd1689m", 0, 224, 1.0, licence="dinov3-license"),
    _timm("convnext_small.eupe_lvd1689m", "lvd1689m", 0, 256, 1.0, licence="fair-noncommercial-research-license"),
    _timm("convnext_tiny.in12k_ft_in1k", "imagenet12k->imagenet1k", 1000, 224, 0.95, top=(84.192, 97.132),
        test=(288, 1.0, 84.448)),
    _timm("convnext_tiny.in12k_ft_in1k_384", "imagenet12k->imagenet1k", 1000, 384, 1.0, resize_mode="squash",
        top=(85.154, 97.634)),
    _timm("convnext_tiny.in12k", "imagenet12k", 11821, 224, 0.95),
    _timm("convnext_tiny.fb_in22k_ft_in1k", "imagenet22k->imagenet1k", 1000, 224, 0.875, top=(82.9, 96.616),
        test=(288, 1.0, 78.95), url=_META + "convnext_tiny_22k_1k_224.pth"),
    _timm("convnext_tiny.fb_in1k", "imagenet1k", 1000, 224, 0.875, top=(82.066, 95.854), test=(288, 1.0, 82.694),
        url=_META + "convnext_tiny_1k_224_ema.pth"),
    _timm("convnext_tiny.fb_in22k_ft_in1k_384", "imagenet22k->imagenet1k", 1000, 384, 1.0, resize_mode="squash",
        top=(84.098, 97.138), url=_META + "convnext_tiny_22k_1k_384.pth"),
    _timm("convnext_tiny.fb_in22k", "imagenet22k", 21841, 224, 0.875, url=_META + "convnext_tiny_22k_224.pth"),
    _timm("convnext_tiny.dinov3_lvd1689m", "lvd1689m", 0, 224, 1.0, licence="dinov3-license"),
    _timm("convnext_tiny.eupe_lvd1689m", "lvd1689m", 0, 256, 1.0, licence="fair-noncommercial-research-license"),
    _timm("convnext_tiny_hnf.a2h_in1k", "imagenet1k", 1000, 224, 0.95, top=(82.23, 95.86), test=(288, 1.0, 82.608),
        url=_RSB + "convnext_tiny_hnf_a2h-ab7e9df2.pth", sha256_prefix="ab7e9df2"),
    _timm("convnext_xlarge.fb_in22k_ft_in1k", "imagenet22k->imagenet1k", 1000, 224, 0.875, top=(86.97, 98.204),
        test=(288, 1.0, 87.378), url=_META + "convnext_xlarge_22k_1k_224_ema.pth"),
    _timm("convnext_xlarge.fb_in22k_ft_in1k_384", "imagenet22k->imagenet1k", 1000, 384, 1.0, resize_mode="squash",
        top=(87.764, 98.552), url=_META + "convnext_xlarge_22k_1k_384_ema.pth"),
    _timm("convnext_xlarge.fb_in22k", "imagenet22k", 21841, 224, 0.875, url=_META + "convnext_xlarge_22k_224.pth"),
    _timm_clip("convnext_xxlarge.clip_laion2b_soup_ft_in1k", "laion2b->imagenet1k", 1000, 256, top=(88.622, 98.718)),
    _timm_clip("convnext_xxlarge.clip_laion2b_soup_ft_in12k", "laion2b->imagenet12k", 11821, 256),
    _timm_clip("convnext_xxlarge.clip_laion2b_soup", "laion2b", 1024, 256),
    _timm_clip("convnext_xxlarge.clip_laion2b_rewind", "laion2b", 1024, 256),
    _timm("convnext_zepto_rms.ra4_e3600_r224_in1k", "imagenet1k", 1000, 224, 0.875, top=(72.82, 91.106), mean=HALF,
        std=HALF),
    _timm("convnext_zepto_rms_ols.ra4_e3600_r224_in1k", "imagenet1k", 1000, 224, 0.9, top=(73.234, 91.27), mean=HALF,
        std=HALF),
    _timm("convnextv2_atto.fcmae_ft_in1k", "fcmae imagenet1k->imagenet1k", 1000, 224, 0.875, top=(76.644, 93.042),
        test=(288, 0.95, 77.794), licence="cc-by-nc-4.0", url=_META_V2 + "im1k/convnextv2_atto_1k_224_ema.pt"),
    _timm("convnextv2_atto.fcmae", "fcmae imagenet1k", 0, 224, 0.875, licence="cc-by-nc-4.0",
        url=_META_V2 + "pt_only/convnextv2_atto_1k_224_fcmae.pt"),
    _timm("convnextv2_base.fcmae_ft_in22k_in1k", "fcmae imagenet1k->imagenet22k->imagenet1k", 1000, 224, 0.875,
        top=(86.752, 98.02), test=(288, 1.0, 86.994), licence="cc-by-nc-4.0",
        url=_META_V2 + "im22k/convnextv2_base_22k_224_ema.pt"),
    _timm("convnextv2_base.fcmae_ft_in22k_in1k_384", "fcmae imagenet1k->imagenet22k->imagenet1k", 1000, 384, 1.0,
        resize_mode="squash", top=(87.638, 98.416), licence="cc-by-nc-4.0",
        url=_META_V2 + "im22k/convnextv2_base_22k_384_ema.pt"),
    _timm("convnextv2_base.fcmae_ft_in1k", "fcmae imagenet1k->imagenet1k", 1000, 224, 0.875, top=(84.89, 97.088),
        test=(288, 1.0, 85.49), licence="cc-by-nc-4.0", url=_META_V2 + "im1k/convnextv2_base_1k_224_ema.pt"),
    _timm("convnextv2_base.fcmae", "fcmae imagenet1k", 0, 224, 0.875, licence="cc-by-nc-4.0",
        url=_META_V2 + "pt_only/convnextv2_base_1k_224_fcmae.pt"),
    _timm("convnextv2_femto.fcmae_ft_in1k", "fcmae imagenet1k->imagenet1k", 1000, 224, 0.875, top=(78.476, 93.984),
        test=(288, 0.95, 79.342), licence="cc-by-nc-4.0", url=_META_V2 + "im1k/convnextv2_femto_1k_224_ema.pt"),
    _timm("convnextv2_femto.fcmae", "fcmae imagenet1k", 0, 224, 0.875, licence="cc-by-nc-4.0",
        url=_META_V2 + "pt_only/convnextv2_femto_1k_224_fcmae.pt"),
    _timm("convnextv2_huge.fcmae_ft_in22k_in1k_384", "fcmae imagenet1k->imagenet22k->imagenet1k", 1000, 384, 1.0,
        resize_mode="squash", top=(88.666, 98.734), licence="cc-by-nc-4.0",
        url=_META_V2 + "im22k/convnextv2_huge_22k_384_ema.pt"),
    _timm("convnextv2_huge.fcmae_ft_in22k_in1k_512", "fcmae imagenet1k->imagenet22k->imagenet1k", 1000, 512, 1.0,
        resize_mode="squash", top=(88.86, 98.74), licence="cc-by-nc-4.0",
        url=_META_V2 + "im22k/convnextv2_huge_22k_512_ema.pt"),
    _timm("convnextv2_huge.fcmae_ft_in1k", "fcmae imagenet1k->imagenet1k", 1000, 224, 0.875, top=(86.26, 97.752),
        test=(288, 1.0, 86.618), licence="cc-by-nc-4.0", url=_META_V2 + "im1k/convnextv2_huge_1k_224_ema.pt"),
    _timm("convnextv2_huge.fcmae", "fcmae imagenet1k", 0, 224, 0.875, licence="cc-by-nc-4.0",
        url=_META_V2 + "pt_only/convnextv2_huge_1k_224_fcmae.pt"),
    _timm("convnextv2_large.fcmae_ft_in22k_in1k", "fcmae imagenet1k->imagenet22k->imagenet1k", 1000, 224, 0.875,
        top=(87.266, 98.24), test=(288, 1.0, 87.494), licence="cc-by-nc-4.0",
        url=_META_V2 + "im22k/convnextv2_large_22k_224_ema.pt"),
    _timm("convnextv2_large.fcmae_ft_in22k_in1k_384", "fcmae imagenet1k->imagenet22k->imagenet1k", 1000, 384, 1.0,
        resize_mode="squash", top=(88.18, 98.52), licence="cc-by-nc-4.0",
        url=_META_V2 + "im22k/convnextv2_large_22k_384_ema.pt"),
    _timm("convnextv2_large.fcmae_ft_in1k", "fcmae imagenet1k->imagenet1k", 1000, 224, 0.875, top=(85.762, 97.574),
        test=(288, 1.0, 86.132), licence="cc-by-nc-4.0", url=_META_V2 + "im1k/convnextv2_large_1k_224_ema.pt"),
    _timm("convnextv2_large.fcmae", "fcmae imagenet1k", 0, 224, 0.875, licence="cc-by-nc-4.0",
        url=_META_V2 + "pt_only/convnextv2_large_1k_224_fcmae.pt"),
    _timm("convnextv2_nano.fcmae_ft_in22k_in1k", "fcmae imagenet1k->imagenet22k->imagenet1k", 1000, 224, 0.875,
        top=(82.038, 96.174), test=(288, 1.0, 82.666), licence="cc-by-nc-4.0",
        url=_META_V2 + "im22k/convnextv2_nano_22k_224_ema.pt"),
    _timm("convnextv2_nano.fcmae_ft_in22k_in1k_384", "fcmae imagenet1k->imagenet22k->imagenet1k", 1000, 384, 1.0,
        resize_mode="squash", top=(83.366, 96.74), licence="cc-by-nc-4.0",
        url=_META_V2 + "im22k/convnextv2_nano_22k_384_ema.pt"),
    _timm("convnextv2_nano.fcmae_ft_in1k", "fcmae imagenet1k->imagenet1k", 1000, 224, 0.875, top=(81.856, 95.74),
        test=(288, 1.0, 82.49), licence="cc-by-nc-4.0", url=_META_V2 + "im1k/convnextv2_nano_1k_224_ema.pt"),
    _timm("convnextv2_nano.fcmae", "fcmae imagenet1k", 0, 224, 0.875, licence="cc-by-nc-4.0",
        url=_META_V2 + "pt_only/convnextv2_nano_1k_224_fcmae.pt"),
    _timm("convnextv2_pico.fcmae_ft_in1k", "fcmae imagenet1k->imagenet1k", 1000, 224, 0.875, top=(80.304, 95.082),
        test=(288, 0.95, 81.062), licence="cc-by-nc-4.0", url=_META_V2 + "im1k/convnextv2_pico_1k_224_ema.pt"),
    _timm("convnextv2_pico.fcmae", "fcmae imagenet1k", 0, 224, 0.875, licence="cc-by-nc-4.0",
        url=_META_V2 + "pt_only/convnextv2_pico_1k_224_fcmae.pt"),
    _timm("convnextv2_small.untrained", "none", 1000, 224, 0.875, trained=False,
        note="Architecture only, no file was published."),
    _timm("convnextv2_tiny.fcmae_ft_in22k_in1k", "fcmae imagenet1k->imagenet22k->imagenet1k", 1000, 224, 0.875,
        top=(83.904, 96.964), test=(288, 1.0, 84.428), licence="cc-by-nc-4.0",
        url=_META_V2 + "im22k/convnextv2_tiny_22k_224_ema.pt"),
    _timm("convnextv2_tiny.fcmae_ft_in22k_in1k_384", "fcmae imagenet1k->imagenet22k->imagenet1k", 1000, 384, 1.0,
        resize_mode="squash", top=(85.098, 97.632), licence="cc-by-nc-4.0",
        url=_META_V2 + "im22k/convnextv2_tiny_22k_384_ema.pt"),
    _timm("convnextv2_tiny.fcmae_ft_in1k", "fcmae imagenet1k->imagenet1k", 1000, 224, 0.875, top=(82.948, 96.286),
        test=(288, 1.0, 83.478), licence="cc-by-nc-4.0", url=_META_V2 + "im1k/convnextv2_tiny_1k_224_ema.pt"),
    _timm("convnextv2_tiny.fcmae", "fcmae imagenet1k", 0, 224, 0.875, licence="cc-by-nc-4.0",
        url=_META_V2 + "pt_only/convnextv2_tiny_1k_224_fcmae.pt"),
    _timm("test_convnext.r160_in1k", "imagenet1k", 1000, 160, 0.95, top=(47.774, 74.166), mean=HALF, std=HALF),
    _timm("test_convnext2.r160_in1k", "imagenet1k", 1000, 160, 0.95, top=(53.52, 78.558), mean=HALF, std=HALF),
    _timm("test_convnext3.r160_in1k", "imagenet1k", 1000, 160, 0.95, top=(53.302, 78.326), mean=HALF, std=HALF),

    # Meta, ConvNeXt V1: (tag, dataset, classes, image size, address, top-1).
    _official("convnext_tiny.official_in1k", "imagenet1k", 1000, 224, _META + "convnext_tiny_1k_224_ema.pth",
        82.1),
    _official("convnext_small.official_in1k", "imagenet1k", 1000, 224, _META + "convnext_small_1k_224_ema.pth",
        83.1),
    _official("convnext_base.official_in1k", "imagenet1k", 1000, 224, _META + "convnext_base_1k_224_ema.pth",
        83.8),
    _official("convnext_base.official_in1k_384", "imagenet1k", 1000, 384, _META + "convnext_base_1k_384.pth",
        85.1),
    _official("convnext_large.official_in1k", "imagenet1k", 1000, 224, _META + "convnext_large_1k_224_ema.pth",
        84.3),
    _official("convnext_large.official_in1k_384", "imagenet1k", 1000, 384, _META + "convnext_large_1k_384.pth",
        85.5),
    _official("convnext_tiny.official_in22k", "imagenet22k", 21841, 224, _META + "convnext_tiny_22k_224.pth"),
    _official("convnext_tiny.official_in22k_ft_in1k", "imagenet22k->imagenet1k", 1000, 224,
        _META + "convnext_tiny_22k_1k_224.pth", 82.9),
    _official("convnext_tiny.official_in22k_ft_in1k_384", "imagenet22k->imagenet1k", 1000, 384,
        _META + "convnext_tiny_22k_1k_384.pth", 84.1),
    _official("convnext_small.official_in22k", "imagenet22k", 21841, 224, _META + "convnext_small_22k_224.pth"),
    _official("convnext_small.official_in22k_ft_in1k", "imagenet22k->imagenet1k", 1000, 224,
        _META + "convnext_small_22k_1k_224.pth", 84.6),
    _official("convnext_small.official_in22k_ft_in1k_384", "imagenet22k->imagenet1k", 1000, 384,
        _META + "convnext_small_22k_1k_384.pth", 85.8),
    _official("convnext_base.official_in22k", "imagenet22k", 21841, 224, _META + "convnext_base_22k_224.pth"),
    _official("convnext_base.official_in22k_ft_in1k", "imagenet22k->imagenet1k", 1000, 224,
        _META + "convnext_base_22k_1k_224.pth", 85.8),
    _official("convnext_base.official_in22k_ft_in1k_384", "imagenet22k->imagenet1k", 1000, 384,
        _META + "convnext_base_22k_1k_384.pth", 86.8),
    _official("convnext_large.official_in22k", "imagenet22k", 21841, 224, _META + "convnext_large_22k_224.pth"),
    _official("convnext_large.official_in22k_ft_in1k", "imagenet22k->imagenet1k", 1000, 224,
        _META + "convnext_large_22k_1k_224.pth", 86.6),
    _official("convnext_large.official_in22k_ft_in1k_384", "imagenet22k->imagenet1k", 1000, 384,
        _META + "convnext_large_22k_1k_384.pth", 87.5),
    _official("convnext_xlarge.official_in22k", "imagenet22k", 21841, 224, _META + "convnext_xlarge_22k_224.pth"),
    _official("convnext_xlarge.official_in22k_ft_in1k", "imagenet22k->imagenet1k", 1000, 224,
        _META + "convnext_xlarge_22k_1k_224_ema.pth", 87.0),
    _official("convnext_xlarge.official_in22k_ft_in1k_384", "imagenet22k->imagenet1k", 1000, 384,
        _META + "convnext_xlarge_22k_1k_384_ema.pth", 87.8),
    _official("convnext_isotropic_small.official_in1k", "imagenet1k", 1000, 224,
        _META + "convnext_iso_small_1k_224_ema.pth", 78.7, note="The paper's Table 2 says 79.7."),
    _official("convnext_isotropic_base.official_in1k", "imagenet1k", 1000, 224,
        _META + "convnext_iso_base_1k_224_ema.pth", 82.0),
    _official("convnext_isotropic_large.official_in1k", "imagenet1k", 1000, 224,
        _META + "convnext_iso_large_1k_224_ema.pth", 82.6),

    # Meta, ConvNeXt V1 without the weight average (EMA): what its detectors and segmenters start from.
    _official("convnext_tiny.official_in1k_raw", "imagenet1k", 1000, 224, _META + "convnext_tiny_1k_224.pth"),
    _official("convnext_small.official_in1k_raw", "imagenet1k", 1000, 224, _META + "convnext_small_1k_224.pth"),
    _official("convnext_base.official_in1k_raw", "imagenet1k", 1000, 224, _META + "convnext_base_1k_224.pth",
        83.71, top5=96.6, score_source="mmpretrain configs/convnext/README.md, a re-evaluation"),

    # Meta, ConvNeXt V1, COCO. Tested with the shorter side at 800 px and the longer at most 1333 px.
    _dense_task("convnext_tiny.official_coco_mask_rcnn", "mmdet", "imagenet1k->coco", 800,
        _META + "coco/mask_rcnn_convnext_tiny_1k_3x.pth", "Mask R-CNN 3x: box AP 46.2, mask AP 41.7."),
    _dense_task("convnext_tiny.official_coco_cascade_mask_rcnn", "mmdet", "imagenet1k->coco", 800,
        _META + "coco/cascade_mask_rcnn_convnext_tiny_1k_3x.pth",
        "Cascade Mask R-CNN 3x: box AP 50.4, mask AP 43.7."),
    _dense_task("convnext_small.official_coco_cascade_mask_rcnn", "mmdet", "imagenet1k->coco", 800,
        _META + "coco/cascade_mask_rcnn_convnext_small_1k_3x.pth",
        "Cascade Mask R-CNN 3x: box AP 51.9, mask AP 45.0."),
    _dense_task("convnext_base.official_coco_cascade_mask_rcnn", "mmdet", "imagenet1k->coco", 800,
        _META + "coco/cascade_mask_rcnn_convnext_base_1k_3x.pth",
        "Cascade Mask R-CNN 3x: box AP 52.7, mask AP 45.6."),
    _dense_task("convnext_base.official_coco_cascade_mask_rcnn_in22k", "mmdet", "imagenet22k->coco", 800,
        _META + "coco/cascade_mask_rcnn_convnext_base_22k_3x.pth",
        "Cascade Mask R-CNN 3x: box AP 54.0, mask AP 46.9."),
    _dense_task("convnext_large.official_coco_cascade_mask_rcnn_in22k", "mmdet", "imagenet22k->coco", 800,
        _META + "coco/cascade_mask_rcnn_convnext_large_22k_3x.pth",
        "Cascade Mask R-CNN 3x: box AP 54.8, mask AP 47.6."),
    _dense_task("convnext_xlarge.official_coco_cascade_mask_rcnn_in22k", "mmdet", "imagenet22k->coco", 800,
        _META + "coco/cascade_mask_rcnn_convnext_xlarge_22k_3x.pth",
        "Cascade Mask R-CNN 3x: box AP 55.2, mask AP 47.7."),

    # Meta, ConvNeXt V1, ADE20K, UPerNet 160k iterations; mIoU single scale and multi-scale with flip.
    _dense_task("convnext_tiny.official_ade20k_upernet", "mmseg", "imagenet1k->ade20k", 512,
        _META + "ade20k/upernet_convnext_tiny_1k_512x512.pth",
        "UPerNet: mIoU 46.0 single scale, 46.7 multi-scale."),
    _dense_task("convnext_small.official_ade20k_upernet", "mmseg", "imagenet1k->ade20k", 512,
        _META + "ade20k/upernet_convnext_small_1k_512x512.pth",
        "UPerNet: mIoU 48.7 single scale, 49.6 multi-scale."),
    _dense_task("convnext_base.official_ade20k_upernet", "mmseg", "imagenet1k->ade20k", 512,
        _META + "ade20k/upernet_convnext_base_1k_512x512.pth",
        "UPerNet: mIoU 49.1 single scale, 49.9 multi-scale."),
    _dense_task("convnext_base.official_ade20k_upernet_in22k", "mmseg", "imagenet22k->ade20k", 640,
        _META + "ade20k/upernet_convnext_base_22k_640x640.pth",
        "UPerNet: mIoU 52.6 single scale, 53.1 multi-scale."),
    _dense_task("convnext_large.official_ade20k_upernet_in22k", "mmseg", "imagenet22k->ade20k", 640,
        _META + "ade20k/upernet_convnext_large_22k_640x640.pth",
        "UPerNet: mIoU 53.2 single scale, 53.7 multi-scale."),
    _dense_task("convnext_xlarge.official_ade20k_upernet_in22k", "mmseg", "imagenet22k->ade20k", 640,
        _META + "ade20k/upernet_convnext_xlarge_22k_640x640.pth",
        "UPerNet: mIoU 53.6 single scale, 54.0 multi-scale."),

    # Meta, ConvNeXt V2: (tag, dataset, classes, image size, address, top-1). The "22k" files have 1000 classes.
    _official_v2("convnextv2_atto.official_fcmae", "fcmae imagenet1k", 0, 224,
        _META_V2 + "pt_only/convnextv2_atto_1k_224_fcmae.pt", note="Encoder only."),
    _official_v2("convnextv2_femto.official_fcmae", "fcmae imagenet1k", 0, 224,
        _META_V2 + "pt_only/convnextv2_femto_1k_224_fcmae.pt", note="Encoder only."),
    _official_v2("convnextv2_pico.official_fcmae", "fcmae imagenet1k", 0, 224,
        _META_V2 + "pt_only/convnextv2_pico_1k_224_fcmae.pt", note="Encoder only."),
    _official_v2("convnextv2_nano.official_fcmae", "fcmae imagenet1k", 0, 224,
        _META_V2 + "pt_only/convnextv2_nano_1k_224_fcmae.pt", note="Encoder only."),
    _official_v2("convnextv2_tiny.official_fcmae", "fcmae imagenet1k", 0, 224,
        _META_V2 + "pt_only/convnextv2_tiny_1k_224_fcmae.pt", note="Encoder only."),
    _official_v2("convnextv2_base.official_fcmae", "fcmae imagenet1k", 0, 224,
        _META_V2 + "pt_only/convnextv2_base_1k_224_fcmae.pt", note="Encoder only."),
    _official_v2("convnextv2_large.official_fcmae", "fcmae imagenet1k", 0, 224,
        _META_V2 + "pt_only/convnextv2_large_1k_224_fcmae.pt", note="Encoder only."),
    _official_v2("convnextv2_huge.official_fcmae", "fcmae imagenet1k", 0, 224,
        _META_V2 + "pt_only/convnextv2_huge_1k_224_fcmae.pt", note="Encoder only."),
    _official_v2("convnextv2_atto.official_fcmae_ft_in1k", "fcmae imagenet1k->imagenet1k", 1000, 224,
        _META_V2 + "im1k/convnextv2_atto_1k_224_ema.pt", 76.7),
    _official_v2("convnextv2_femto.official_fcmae_ft_in1k", "fcmae imagenet1k->imagenet1k", 1000, 224,
        _META_V2 + "im1k/convnextv2_femto_1k_224_ema.pt", 78.5),
    _official_v2("convnextv2_pico.official_fcmae_ft_in1k", "fcmae imagenet1k->imagenet1k", 1000, 224,
        _META_V2 + "im1k/convnextv2_pico_1k_224_ema.pt", 80.3),
    _official_v2("convnextv2_nano.official_fcmae_ft_in1k", "fcmae imagenet1k->imagenet1k", 1000, 224,
        _META_V2 + "im1k/convnextv2_nano_1k_224_ema.pt", 81.9),
    _official_v2("convnextv2_tiny.official_fcmae_ft_in1k", "fcmae imagenet1k->imagenet1k", 1000, 224,
        _META_V2 + "im1k/convnextv2_tiny_1k_224_ema.pt", 83.0),
    _official_v2("convnextv2_base.official_fcmae_ft_in1k", "fcmae imagenet1k->imagenet1k", 1000, 224,
        _META_V2 + "im1k/convnextv2_base_1k_224_ema.pt", 84.9),
    _official_v2("convnextv2_large.official_fcmae_ft_in1k", "fcmae imagenet1k->imagenet1k", 1000, 224,
        _META_V2 + "im1k/convnextv2_large_1k_224_ema.pt", 85.8),
    _official_v2("convnextv2_huge.official_fcmae_ft_in1k", "fcmae imagenet1k->imagenet1k", 1000, 224,
        _META_V2 + "im1k/convnextv2_huge_1k_224_ema.pt", 86.3),
    _official_v2("convnextv2_nano.official_fcmae_ft_in22k_in1k", "fcmae imagenet1k->imagenet22k->imagenet1k",
        1000, 224, _META_V2 + "im22k/convnextv2_nano_22k_224_ema.pt", 82.1),
    _official_v2("convnextv2_nano.official_fcmae_ft_in22k_in1k_384", "fcmae imagenet1k->imagenet22k->imagenet1k",
        1000, 384, _META_V2 + "im22k/convnextv2_nano_22k_384_ema.pt", 83.4),
    _official_v2("convnextv2_tiny.official_fcmae_ft_in22k_in1k", "fcmae imagenet1k->imagenet22k->imagenet1k",
        1000, 224, _META_V2 + "im22k/convnextv2_tiny_22k_224_ema.pt", 83.9),
    _official_v2("convnextv2_tiny.official_fcmae_ft_in22k_in1k_384", "fcmae imagenet1k->imagenet22k->imagenet1k",
        1000, 384, _META_V2 + "im22k/convnextv2_tiny_22k_384_ema.pt", 85.1),
    _official_v2("convnextv2_base.official_fcmae_ft_in22k_in1k", "fcmae imagenet1k->imagenet22k->imagenet1k",
        1000, 224, _META_V2 + "im22k/convnextv2_base_22k_224_ema.pt", 86.8),
    _official_v2("convnextv2_base.official_fcmae_ft_in22k_in1k_384", "fcmae imagenet1k->imagenet22k->imagenet1k",
        1000, 384, _META_V2 + "im22k/convnextv2_base_22k_384_ema.pt", 87.7),
    _official_v2("convnextv2_large.official_fcmae_ft_in22k_in1k", "fcmae imagenet1k->imagenet22k->imagenet1k",
        1000, 224, _META_V2 + "im22k/convnextv2_large_22k_224_ema.pt", 87.3),
    _official_v2("convnextv2_large.official_fcmae_ft_in22k_in1k_384", "fcmae imagenet1k->imagenet22k->imagenet1k",
        1000, 384, _META_V2 + "im22k/convnextv2_large_22k_384_ema.pt", 88.2),
    _official_v2("convnextv2_huge.official_fcmae_ft_in22k_in1k_384", "fcmae imagenet1k->imagenet22k->imagenet1k",
        1000, 384, _META_V2 + "im22k/convnextv2_huge_22k_384_ema.pt", 88.7),
    _official_v2("convnextv2_huge.official_fcmae_ft_in22k_in1k_512", "fcmae imagenet1k->imagenet22k->imagenet1k",
        1000, 512, _META_V2 + "im22k/convnextv2_huge_22k_512_ema.pt", 88.9),

    # torchvision: (tag, resize, file, first digits of its SHA-256, (top-1, top-5)). Not Meta's weights.
    _torchvision("convnext_tiny.torchvision_in1k", 236, "convnext_tiny-983f1562.pth", "983f1562", (82.52, 96.146)),
    _torchvision("convnext_small.torchvision_in1k", 230, "convnext_small-0c510722.pth", "0c510722", (83.616, 96.65)),
    _torchvision("convnext_base.torchvision_in1k", 232, "convnext_base-6075fbad.pth", "6075fbad", (84.062, 96.87)),
    _torchvision("convnext_large.torchvision_in1k", 232, "convnext_large-ea097f82.pth", "ea097f82", (84.414, 96.976)),

    # keras.applications: (tag, dataset, classes, file, SHA-256, top-1).
    _keras_applications("convnext_tiny.keras_applications", "imagenet1k", 1000, "convnext_tiny.h5",
        "8ae6e78ce2933352b1ef4008e6dd2f17bc40771563877d156bc6426c7cf503ff", 81.312),
    _keras_applications("convnext_tiny.keras_applications_notop", "imagenet1k", 0, "convnext_tiny_notop.h5",
        "d547c096cabd03329d7be5562c5e14798aa39ed24b474157cef5e85ab9e49ef1"),
    _keras_applications("convnext_small.keras_applications", "imagenet1k", 1000, "convnext_small.h5",
        "ce1277d8f1ee5a0ef0e171469089c18f5233860ceaf9b168049cb9263fd7483c", 82.392),
    _keras_applications("convnext_small.keras_applications_notop", "imagenet1k", 0, "convnext_small_notop.h5",
        "6fc8009faa2f00c1c1dfce59feea9b0745eb260a7dd11bee65c8e20843da6eab"),
    _keras_applications("convnext_base.keras_applications", "imagenet22k->imagenet1k", 1000, "convnext_base.h5",
        "52cbb006d3dadd03f6e095a8ca1aca47aecdd75acb4bc74bce1f5c695d0086e6", 85.364),
    _keras_applications("convnext_base.keras_applications_notop", "imagenet22k->imagenet1k", 0,
        "convnext_base_notop.h5", "40a20c5548a5e9202f69735ecc06c990e6b7c9d2de39f0361e27baeb24cb7c45"),
    _keras_applications("convnext_large.keras_applications", "imagenet22k->imagenet1k", 1000, "convnext_large.h5",
        "070c5ed9ed289581e477741d3b34beffa920db8cf590899d6d2c67fba2a198a6", 86.36),
    _keras_applications("convnext_large.keras_applications_notop", "imagenet22k->imagenet1k", 0,
        "convnext_large_notop.h5", "96f02b6f0753d4f543261bc9d09bed650f24dd6bc02ddde3066135b63d23a1cd"),
    _keras_applications("convnext_xlarge.keras_applications", "imagenet22k->imagenet1k", 1000,
        "convnext_xlarge.h5", "c1f5ccab661354fc3a79a10fa99af82f0fbf10ec65cb894a3ae0815f17a889ee", 86.732),
    _keras_applications("convnext_xlarge.keras_applications_notop", "imagenet22k->imagenet1k", 0,
        "convnext_xlarge_notop.h5", "de3f8a54174130e0cecdc71583354753d557fcf1f4487331558e2a16ba0cfe05"),

    # Meta, DINOv3: the transformers repositories, then the files behind the signed link of the request form.
    _dinov3("convnext_tiny.dinov3_hf", "dinov3_hf",
        "Accept the licence on the hub first; file name not verified.",
        hub_id="facebook/dinov3-convnext-tiny-pretrain-lvd1689m"),
    _dinov3("convnext_small.dinov3_hf", "dinov3_hf",
        "Accept the licence on the hub first; file name not verified.",
        hub_id="facebook/dinov3-convnext-small-pretrain-lvd1689m"),
    _dinov3("convnext_base.dinov3_hf", "dinov3_hf",
        "Accept the licence on the hub first; file name not verified.",
        hub_id="facebook/dinov3-convnext-base-pretrain-lvd1689m"),
    _dinov3("convnext_large.dinov3_hf", "dinov3_hf",
        "Accept the licence on the hub first; file name not verified.",
        hub_id="facebook/dinov3-convnext-large-pretrain-lvd1689m"),
    _dinov3("convnext_tiny.official_dinov3_lvd1689m", "dinov3",
        "Get dinov3_convnext_tiny_pretrain_lvd1689m-21b726bb.pth from Meta and pass its path.",
        sha256_prefix="21b726bb"),
    _dinov3("convnext_small.official_dinov3_lvd1689m", "dinov3",
        "Get dinov3_convnext_small_pretrain_lvd1689m-296db49d.pth from Meta and pass its path.",
        sha256_prefix="296db49d"),
    _dinov3("convnext_base.official_dinov3_lvd1689m", "dinov3",
        "Get dinov3_convnext_base_pretrain_lvd1689m-801f2ba9.pth from Meta and pass its path.",
        sha256_prefix="801f2ba9"),
    _dinov3("convnext_large.official_dinov3_lvd1689m", "dinov3",
        "Get dinov3_convnext_large_pretrain_lvd1689m-61fa432d.pth from Meta and pass its path.",
        sha256_prefix="61fa432d"),

    # transformers, ConvNeXt V1: (tag, dataset, classes, image size, repository, top-1 of the same weights).
    _huggingface("convnext_tiny.huggingface_in1k", "imagenet1k", 1000, 224, "facebook/convnext-tiny-224", 82.1),
    _huggingface("convnext_small.huggingface_in1k", "imagenet1k", 1000, 224, "facebook/convnext-small-224", 83.1),
    _huggingface("convnext_base.huggingface_in1k", "imagenet1k", 1000, 224, "facebook/convnext-base-224", 83.8),
    _huggingface("convnext_base.huggingface_in1k_384", "imagenet1k", 1000, 384, "facebook/convnext-base-384",
        85.1),
    _huggingface("convnext_large.huggingface_in1k", "imagenet1k", 1000, 224, "facebook/convnext-large-224", 84.3),
    _huggingface("convnext_large.huggingface_in1k_384", "imagenet1k", 1000, 384, "facebook/convnext-large-384",
        85.5),
    _huggingface("convnext_base.huggingface_in22k", "imagenet22k", 21841, 224, "facebook/convnext-base-224-22k"),
    _huggingface("convnext_large.huggingface_in22k", "imagenet22k", 21841, 224,
        "facebook/convnext-large-224-22k"),
    _huggingface("convnext_xlarge.huggingface_in22k", "imagenet22k", 21841, 224,
        "facebook/convnext-xlarge-224-22k"),
    _huggingface("convnext_base.huggingface_in22k_ft_in1k", "imagenet22k->imagenet1k", 1000, 224,
        "facebook/convnext-base-224-22k-1k", 85.8),
    _huggingface("convnext_base.huggingface_in22k_ft_in1k_384", "imagenet22k->imagenet1k", 1000, 384,
        "facebook/convnext-base-384-22k-1k", 86.8),
    _huggingface("convnext_large.huggingface_in22k_ft_in1k", "imagenet22k->imagenet1k", 1000, 224,
        "facebook/convnext-large-224-22k-1k", 86.6),
    _huggingface("convnext_large.huggingface_in22k_ft_in1k_384", "imagenet22k->imagenet1k", 1000, 384,
        "facebook/convnext-large-384-22k-1k", 87.5),
    _huggingface("convnext_xlarge.huggingface_in22k_ft_in1k", "imagenet22k->imagenet1k", 1000, 224,
        "facebook/convnext-xlarge-224-22k-1k", 87.0),
    _huggingface("convnext_xlarge.huggingface_in22k_ft_in1k_384", "imagenet22k->imagenet1k", 1000, 384,
        "facebook/convnext-xlarge-384-22k-1k", 87.8),

    # transformers, ConvNeXt V2: (tag, dataset, image size, repository, top-1 of the same weights).
    _huggingface_v2("convnextv2_atto.huggingface_fcmae_ft_in1k", "fcmae imagenet1k->imagenet1k", 224,
        "facebook/convnextv2-atto-1k-224", 76.7),
    _huggingface_v2("convnextv2_femto.huggingface_fcmae_ft_in1k", "fcmae imagenet1k->imagenet1k", 224,
        "facebook/convnextv2-femto-1k-224", 78.5),
    _huggingface_v2("convnextv2_pico.huggingface_fcmae_ft_in1k", "fcmae imagenet1k->imagenet1k", 224,
        "facebook/convnextv2-pico-1k-224", 80.3),
    _huggingface_v2("convnextv2_nano.huggingface_fcmae_ft_in1k", "fcmae imagenet1k->imagenet1k", 224,
        "facebook/convnextv2-nano-1k-224", 81.9),
    _huggingface_v2("convnextv2_tiny.huggingface_fcmae_ft_in1k", "fcmae imagenet1k->imagenet1k", 224,
        "facebook/convnextv2-tiny-1k-224", 83.0),
    _huggingface_v2("convnextv2_base.huggingface_fcmae_ft_in1k", "fcmae imagenet1k->imagenet1k", 224,
        "facebook/convnextv2-base-1k-224", 84.9),
    _huggingface_v2("convnextv2_large.huggingface_fcmae_ft_in1k", "fcmae imagenet1k->imagenet1k", 224,
        "facebook/convnextv2-large-1k-224", 85.8),
    _huggingface_v2("convnextv2_huge.huggingface_fcmae_ft_in1k", "fcmae imagenet1k->imagenet1k", 224,
        "facebook/convnextv2-huge-1k-224", 86.3),
    _huggingface_v2("convnextv2_nano.huggingface_fcmae_ft_in22k_in1k",
        "fcmae imagenet1k->imagenet22k->imagenet1k", 224, "facebook/convnextv2-nano-22k-224", 82.1),
    _huggingface_v2("convnextv2_nano.huggingface_fcmae_ft_in22k_in1k_384",
        "fcmae imagenet1k->imagenet22k->imagenet1k", 384, "facebook/convnextv2-nano-22k-384", 83.4),
    _huggingface_v2("convnextv2_tiny.huggingface_fcmae_ft_in22k_in1k",
        "fcmae imagenet1k->imagenet22k->imagenet1k", 224, "facebook/convnextv2-tiny-22k-224", 83.9),
    _huggingface_v2("convnextv2_tiny.huggingface_fcmae_ft_in22k_in1k_384",
        "fcmae imagenet1k->imagenet22k->imagenet1k", 384, "facebook/convnextv2-tiny-22k-384", 85.1),
    _huggingface_v2("convnextv2_base.huggingface_fcmae_ft_in22k_in1k",
        "fcmae imagenet1k->imagenet22k->imagenet1k", 224, "facebook/convnextv2-base-22k-224", 86.8),
    _huggingface_v2("convnextv2_base.huggingface_fcmae_ft_in22k_in1k_384",
        "fcmae imagenet1k->imagenet22k->imagenet1k", 384, "facebook/convnextv2-base-22k-384", 87.7),
    _huggingface_v2("convnextv2_large.huggingface_fcmae_ft_in22k_in1k",
        "fcmae imagenet1k->imagenet22k->imagenet1k", 224, "facebook/convnextv2-large-22k-224", 87.3),
    _huggingface_v2("convnextv2_large.huggingface_fcmae_ft_in22k_in1k_384",
        "fcmae imagenet1k->imagenet22k->imagenet1k", 384, "facebook/convnextv2-large-22k-384", 88.2),
    _huggingface_v2("convnextv2_huge.huggingface_fcmae_ft_in22k_in1k_384",
        "fcmae imagenet1k->imagenet22k->imagenet1k", 384, "facebook/convnextv2-huge-22k-384", 88.7),
    _huggingface_v2("convnextv2_huge.huggingface_fcmae_ft_in22k_in1k_512",
        "fcmae imagenet1k->imagenet22k->imagenet1k", 512, "facebook/convnextv2-huge-22k-512", 88.9),

    # Trained here, part of the package: (tag, data set, classes, image size, SHA-256, top-1, top-5, note).
    _packaged("convnextv2_atto.tiny_imagenet200", "tiny_imagenet200", 200, 64, "6e1f0a6afda563a53567d00b969b7abb84c377800cdd4b424ca119fc5c19906d", 40.22, 65.95, "trained here, 3,451,600 weights; for research"),
)
# fmt: on

CHECKPOINTS: dict[str, Checkpoint] = {row.tag: row for row in _ROWS}


# timm 1.0.31, register_model_deprecations in timm/models/convnext.py.
ALIASES: dict[str, str] = {
    "convnext_tiny_in22ft1k": "convnext_tiny.fb_in22k_ft_in1k",
    "convnext_small_in22ft1k": "convnext_small.fb_in22k_ft_in1k",
    "convnext_base_in22ft1k": "convnext_base.fb_in22k_ft_in1k",
    "convnext_large_in22ft1k": "convnext_large.fb_in22k_ft_in1k",
    "convnext_xlarge_in22ft1k": "convnext_xlarge.fb_in22k_ft_in1k",
    "convnext_tiny_384_in22ft1k": "convnext_tiny.fb_in22k_ft_in1k_384",
    "convnext_small_384_in22ft1k": "convnext_small.fb_in22k_ft_in1k_384",
    "convnext_base_384_in22ft1k": "convnext_base.fb_in22k_ft_in1k_384",
    "convnext_large_384_in22ft1k": "convnext_large.fb_in22k_ft_in1k_384",
    "convnext_xlarge_384_in22ft1k": "convnext_xlarge.fb_in22k_ft_in1k_384",
    "convnext_tiny_in22k": "convnext_tiny.fb_in22k",
    "convnext_small_in22k": "convnext_small.fb_in22k",
    "convnext_base_in22k": "convnext_base.fb_in22k",
    "convnext_large_in22k": "convnext_large.fb_in22k",
    "convnext_xlarge_in22k": "convnext_xlarge.fb_in22k",
}

# The tag that weights="imagenet" means. The five of keras.applications keep its files, so that a
# change of import changes nothing; the others take timm's default tag, isotropic ones Meta's file.
IMAGENET: dict[str, str | None] = {
    "convnext_atto": "convnext_atto.d2_in1k",
    "convnext_atto_ols": "convnext_atto_ols.a2_in1k",
    "convnext_atto_rms": None,
    "convnext_base": "convnext_base.keras_applications",
    "convnext_femto": "convnext_femto.d1_in1k",
    "convnext_femto_ols": "convnext_femto_ols.d1_in1k",
    "convnext_large": "convnext_large.keras_applications",
    "convnext_large_mlp": "convnext_large_mlp.clip_laion2b_soup_ft_in12k_in1k_320",
    "convnext_nano": "convnext_nano.in12k_ft_in1k",
    "convnext_nano_ols": "convnext_nano_ols.d1h_in1k",
    "convnext_pico": "convnext_pico.d1_in1k",
    "convnext_pico_ols": "convnext_pico_ols.d1_in1k",
    "convnext_small": "convnext_small.keras_applications",
    "convnext_tiny": "convnext_tiny.keras_applications",
    "convnext_tiny_hnf": "convnext_tiny_hnf.a2h_in1k",
    "convnext_xlarge": "convnext_xlarge.keras_applications",
    "convnext_xxlarge": "convnext_xxlarge.clip_laion2b_soup_ft_in1k",
    "convnext_zepto_rms": "convnext_zepto_rms.ra4_e3600_r224_in1k",
    "convnext_zepto_rms_ols": "convnext_zepto_rms_ols.ra4_e3600_r224_in1k",
    "convnextv2_atto": "convnextv2_atto.fcmae_ft_in1k",
    "convnextv2_base": "convnextv2_base.fcmae_ft_in22k_in1k",
    "convnextv2_femto": "convnextv2_femto.fcmae_ft_in1k",
    "convnextv2_huge": "convnextv2_huge.fcmae_ft_in22k_in1k_384",
    "convnextv2_large": "convnextv2_large.fcmae_ft_in22k_in1k",
    "convnextv2_nano": "convnextv2_nano.fcmae_ft_in22k_in1k",
    "convnextv2_pico": "convnextv2_pico.fcmae_ft_in1k",
    "convnextv2_small": None,
    "convnextv2_tiny": "convnextv2_tiny.fcmae_ft_in22k_in1k",
    "test_convnext": "test_convnext.r160_in1k",
    "test_convnext2": "test_convnext2.r160_in1k",
    "test_convnext3": "test_convnext3.r160_in1k",
    "convnext_isotropic_small": "convnext_isotropic_small.official_in1k",
    "convnext_isotropic_base": "convnext_isotropic_base.official_in1k",
    "convnext_isotropic_large": "convnext_isotropic_large.official_in1k",
}

# The same for include_top=False in keras.applications; other architectures drop the head instead.
IMAGENET_NOTOP: dict[str, str] = {
    "convnext_tiny": "convnext_tiny.keras_applications_notop",
    "convnext_small": "convnext_small.keras_applications_notop",
    "convnext_base": "convnext_base.keras_applications_notop",
    "convnext_large": "convnext_large.keras_applications_notop",
    "convnext_xlarge": "convnext_xlarge.keras_applications_notop",
}


def find_checkpoint(name: str, architecture: str | None = None) -> Checkpoint:
    """Finds the row that a weight name means.

    Args:
        name: a full tag ("convnext_tiny.fb_in1k"), a name that timm has deprecated
            ("convnext_tiny_in22k"), or, with `architecture`, a pretrained tag ("fb_in1k") or
            "imagenet".
        architecture: architecture the weights are for, e.g. "convnext_tiny". None: any.

    Returns:
        The row of `CHECKPOINTS`.

    Raises:
        ValueError: the name is unknown (tells near names and which architectures have the tag),
            belongs to another architecture, needs an `architecture`, or the architecture is
            unknown or has no ImageNet file.

    Example:
        find_checkpoint("convnext_tiny.fb_in22k_ft_in1k_384").top1                   # 84.098
        find_checkpoint("fb_in22k_ft_in1k_384", architecture="convnext_tiny").tag
        find_checkpoint("imagenet", architecture="convnextv2_atto").tag              # "convnextv2_atto.fcmae_ft_in1k"
    """
    if architecture is not None and architecture not in IMAGENET:
        raise ValueError(unknown("architecture", architecture, IMAGENET))
    if name == "imagenet":
        return _imagenet(architecture)
    full = ALIASES.get(name, name)
    if full not in CHECKPOINTS and architecture is not None:
        full = f"{architecture}.{name}"
    if full not in CHECKPOINTS:
        raise ValueError(_unknown_weights(name, architecture))
    row = CHECKPOINTS[full]
    if architecture is not None and row.architecture != architecture:
        raise ValueError(
            f"Weights {name!r} are for {row.architecture!r}, received architecture "
            f"{architecture!r}. Weights of {architecture}: {_of_architecture(architecture)}"
        )
    return row


def list_weights(
    architecture: str | None = None,
    classes: int | None = None,
    image_size: int | None = None,
    licence: str | None = None,
    commercial_use: bool | None = None,
    downloadable: bool | None = None,
) -> list[str]:
    """Lists the tags that meet every given condition.

    Args:
        architecture: name or pattern with "*", e.g. "convnextv2_*". Default None: all.
        classes: width of the classifier, 0 for none. Default None: all.
        image_size: side in pixels. Default None: all.
        licence: licence identifier, e.g. "apache-2.0". Default None: all.
        commercial_use: whether the licence allows commercial use. Default None: both.
        downloadable: whether the table knows where the file is. Default None: both.

    Returns:
        The tags in the order of `CHECKPOINTS`; empty when no row meets all conditions.

    Raises:
        ValueError: no architecture matches, or no row has the licence; tells near names.

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
    return [
        row.tag
        for row in CHECKPOINTS.values()
        if (architecture is None or fnmatch.fnmatchcase(row.architecture, architecture))
        and (classes is None or row.classes == classes)
        and (image_size is None or row.image_size == image_size)
        and (licence is None or row.licence == licence)
        and (commercial_use is None or row.commercial_use == commercial_use)
        and (downloadable is None or row.downloadable == downloadable)
    ]


def default_checkpoint(architecture: str) -> Checkpoint:
    """The row whose image size and preparation of images hold for an architecture with any weights.

    That of its ImageNet file, or the first where none was published.
    """
    return CHECKPOINTS[IMAGENET[architecture] or list_weights(architecture)[0]]


def _imagenet(architecture: str | None) -> Checkpoint:
    if architecture is None:
        raise ValueError(
            "weights 'imagenet' mean another file for each architecture, received "
            "architecture None. Pass architecture='convnext_tiny' or a full tag such as "
            "'convnext_tiny.fb_in1k'."
        )
    tag = IMAGENET[architecture]
    if tag is None:
        raise ValueError(
            f"No ImageNet weights have been published for architecture {architecture!r}. "
            f"Weights of {architecture}: {_of_architecture(architecture)}"
        )
    return CHECKPOINTS[tag]


def _of_architecture(architecture: str) -> str:
    rows = [row for row in CHECKPOINTS.values() if row.architecture == architecture]
    names = [row.tag.removeprefix(f"{architecture}.") for row in rows]
    return ", ".join(
        name if row.downloadable else f"{name} (no download)" for name, row in zip(names, rows, strict=True)
    )


def _unknown_weights(name: str, architecture: str | None) -> str:
    owners = [row.architecture for row in CHECKPOINTS.values() if row.tag.endswith(f".{name}")]
    if architecture is None and name in IMAGENET:
        return (
            f"Weights {name!r} name an architecture only. Add '.' and one of the weights of "
            f"{name}: {_of_architecture(name)}"
        )
    if architecture is None and owners:
        return (
            f"Weights {name!r} need an architecture, received None. "
            f"Architectures that have them: {', '.join(owners)}"
        )
    if architecture is None:
        near = _near(name, [*CHECKPOINTS, *ALIASES])
        return f"Unknown weights {name!r}.{near} list_weights() lists all {len(CHECKPOINTS)}."
    known = f"Weights of {architecture}: {_of_architecture(architecture)}"
    if owners:
        return (
            f"Weights {name!r} do not exist for architecture {architecture!r}. "
            f"Architectures that have them: {', '.join(owners)}. {known}"
        )
    prefix = f"{architecture}."
    candidates = ["imagenet", *CHECKPOINTS, *ALIASES]
    candidates += [tag.removeprefix(prefix) for tag in CHECKPOINTS if tag.startswith(prefix)]
    near = _near(name, candidates)
    return f"Unknown weights {name!r} for architecture {architecture!r}.{near} {known}"


def unknown(kind: str, name: str, known: Iterable[str]) -> str:
    """The message for a name that is not among the known ones: near names first, then all."""
    return f"Unknown {kind} {name!r}.{_near(str(name), known)} Known: {', '.join(known)}"


def _near(name: str, known: Iterable[str]) -> str:
    matches = difflib.get_close_matches(name, known, n=3)
    return f" Did you mean {' or '.join(repr(match) for match in matches)}?" if matches else ""
