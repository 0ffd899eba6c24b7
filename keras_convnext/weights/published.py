"""`Checkpoint`: what the catalog says of one published weight file."""

from dataclasses import asdict, dataclass, replace

from keras_convnext.architecture import DetectorHeads, Heads
from keras_convnext.data.preprocessing import Preprocessing

# Endings of the weight files that the package reads; the first ones of PyTorch it writes too.
TORCH_SUFFIXES = (".safetensors", ".pth", ".pt", ".bin")
KERAS_SUFFIXES = (".h5", ".hdf5", ".keras")
WEIGHT_SUFFIXES = (*TORCH_SUFFIXES, ".pth.tar", ".ckpt", *KERAS_SUFFIXES)

NON_COMMERCIAL_LICENCES = ("cc-by-nc-4.0", "fair-noncommercial-research-license", "research-only")


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """One published weight file, a row of `catalog.csv`; lacking values are None.

    Images are prepared for evaluation so: resize as `resize_mode` says, cut the centre `image_size` x
    `image_size`, divide by 255, subtract `mean`, divide by `std`.

    Example:
        row = find_checkpoint("convnext_tiny.fb_in1k")
        row.image_size, row.crop, row.top1          # (224, 0.875, 82.066)
        row.commercial_use                          # True
    """

    tag: str  # "<architecture>.<pretrained tag>", unique; timm's model id for the timm rows
    architecture: str  # a key of `variants.VARIANTS`
    # weights="imagenet" means this file: for the whole model, or where `classes` is 0 for include_top=False.
    imagenet: bool = False
    # Names and shapes of the arrays inside the file: "timm", "official" (Meta V1 and V2; the encoder-only V2
    # files are dense already and lack the final norm and the head), "torchvision", "huggingface", "dinov3"
    # (official names plus copies of the final norm), "dinov3_hf", "keras_applications", "mmdet", "mmseg"
    # (official names after "backbone.", plus the task heads), or "mmdetection" and "mmsegmentation"
    # (mmpretrain's there). A timm row means the file on the Hub: an address at dl.fbaipublicfiles.com in it
    # is the file that timm converted, in the official layout.
    layout: str
    task: str = ""  # "segmentation", "detection"; left out "classification", or "features" without classes
    classes: int  # of classifier, segmenter or detector, 0 for none; of CLIP towers width of the projection
    cascade: bool = False  # of a detector: Cascade Mask R-CNN, else Mask R-CNN
    # Side in pixels of the square the scores `top1` and `top5` were taken at; of detectors the shorter side
    # of the test images, of segmenters the training crop.
    image_size: int
    test_image_size: int | None = None  # larger side that timm recommends for testing
    crop: float  # fraction `image_size` / size after the resize
    test_crop: float | None = None  # the same at `test_image_size`
    # "shorter_side" resizes that to int(floor(image_size / crop)), "squash" both: it loses the aspect ratio.
    resize_mode: str
    resize_size: int | None = None  # of the shorter side, where the publisher states it instead (torchvision)
    interpolation: str  # "bicubic" or "bilinear", both antialiased as in Pillow
    mean: tuple[float, float, float]  # RGB, for pixels in 0..1; `std` too
    std: tuple[float, float, float]
    licence: str  # SPDX identifier where there is one, else the publisher's
    dataset: str  # what the weights were trained on, in order: "imagenet22k->imagenet1k"
    # Published ImageNet-1k accuracy in percent at `image_size`. Packaged weights: of the held-out images of
    # their own data set, as `score_source` says.
    top1: float | None = None
    top5: float | None = None
    test_top1: float | None = None  # top-1 at `test_image_size`
    # Of segmenters the published mean intersection over union of the validation images in percent: at one
    # scale, with a sliding window of the training crop, and averaged over scales and flips.
    miou: float | None = None
    miou_multi_scale: float | None = None
    # Of detectors the published average precision of the validation images in percent, of boxes and masks.
    box_ap: float | None = None
    mask_ap: float | None = None
    score_source: str = ""  # table the scores come from
    hub_id: str | None = None  # repository on the Hugging Face Hub
    hub_filename: str | None = None  # file in it
    url: str | None = None  # direct address
    sha256: str | None = None  # of the file at `url`, or of the packaged file: 64 hexadecimal digits
    # The first 8 digits where the file name carries them; for "dinov3" of the file that `note` names.
    sha256_prefix: str | None = None
    state_key: str | None = None  # of the dictionary in the file that holds the arrays, as "state_dict"
    note: str = ""  # what else a user must know
    gated: bool = False  # the publisher asks for an agreement before the download
    packaged: str | None = None  # file in the folder `weights/packaged` of this package: needs no download

    def __post_init__(self) -> None:
        if not self.task:
            object.__setattr__(self, "task", "classification" if self.classes else "features")

    @property
    def commercial_use(self) -> bool:
        """Whether the licence allows commercial use; True for dinov3-license means its own conditions."""
        return self.licence not in NON_COMMERCIAL_LICENCES

    @property
    def heads(self) -> Heads | DetectorHeads | None:
        """Those of a segmenter or detector."""
        if self.task == "detection":
            return DetectorHeads(self.classes, cascade=self.cascade)
        return Heads(self.classes) if self.task == "segmentation" else None

    @property
    def preprocessing(self) -> Preprocessing:
        """How images were prepared for the published scores."""
        return Preprocessing.from_stored(**asdict(self))

    def preprocessing_at(self, image_size: int | tuple[int, int] | None) -> Preprocessing:
        """The same at another size; at `test_image_size` with the crop that timm recommends there."""
        preprocessing = self.preprocessing.at(image_size)
        if preprocessing.image_size == self.test_image_size != self.image_size and self.test_crop is not None:
            return replace(preprocessing, crop_fraction=self.test_crop)
        return preprocessing

    @property
    def is_projection(self) -> bool:
        """Whether the last layer is the image projection of a CLIP tower, not a classifier."""
        return self.classes > 0 and self.dataset in ("laion2b", "laion_aesthetic")

    @property
    def downloadable(self) -> bool:
        """Whether there is a place to get the file from; a `gated` one needs an account there."""
        return any(place is not None for place in (self.hub_id, self.url, self.packaged))
