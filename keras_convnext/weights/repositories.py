"""Folders of a model with a `config.json` beside its weights: of the Hugging Face Hub, or on this machine.

Three projects write such: timm ("architecture" in the JSON), transformers ("model_type"), and keras-hub for
this package ("registered_name", see `exporting.preset`). `load("hf://user/name")` and `load("folder/")` take
the weights, how their images are prepared, and the licence from there.
"""

import dataclasses
import functools
import os
import pathlib
import re
from typing import Any

from keras_convnext import _files
from keras_convnext._environment import is_set
from keras_convnext.data.preprocessing import Preprocessing
from keras_convnext.variants import VARIANTS, Variant
from keras_convnext.weights import catalog, download, keras_files, locate
from keras_convnext.weights.published import Checkpoint

SCHEME = "hf://"
PRESET_WEIGHTS, PRESET_HEAD = "model.weights.h5", "task.weights.h5"  # of a preset folder: body, head
WEIGHTS = ("model.safetensors", "pytorch_model.bin")  # of timm and transformers, looked for in this order
REGISTERED = "keras_convnext>ConvNeXtBackbone"
_MODEL_TYPES = ("convnext", "convnextv2", "dinov3_convnext", "upernet")
_CROP_SIDE = 384  # from which on transformers' ConvNextImageProcessor squashes and does not crop
_FILTERS = {2: "bilinear", 3: "bicubic"}  # Pillow's numbers


@dataclasses.dataclass(frozen=True)
class Repository:
    """What a folder says of its weights."""

    name: str  # "hf://user/name", or the path
    file: pathlib.Path
    architecture: Variant | None  # None where the weights tell
    preprocessing: Preprocessing | None  # of its images, None where it does not say
    licence: str  # of its card, "" without one
    is_preset: bool  # whether keras-hub's loader reads it too: body and head in two files


def is_repository(name: object) -> bool:
    """Whether a name means a repository on the Hub, or a folder that holds a `config.json`."""
    if isinstance(name, str) and name.startswith(SCHEME):
        return True
    return isinstance(name, str | os.PathLike) and os.path.isfile(os.path.join(name, "config.json"))


def row_of(name: str) -> Checkpoint | None:
    """The row of the catalog that a repository on the Hub is of; None for others."""
    hub_id = name.removeprefix(SCHEME)
    return next((row for row in catalog.CHECKPOINTS.values() if row.hub_id == hub_id), None)


def open_repository(name: str | os.PathLike) -> Repository:
    """Reads a repository; of one on the Hub it downloads what is not here.

    ValueError: it is of another architecture or project; WeightsNotFoundError: it cannot be reached.
    """
    name = os.fspath(name)
    is_remote = name.startswith(SCHEME)
    if is_remote and not re.fullmatch(r"[\w.-]+/[\w.-]+", name.removeprefix(SCHEME)):
        raise ValueError(
            f"Expected {SCHEME}user/name, a repository on the Hugging Face Hub, received {name!r}."
        )
    get = functools.partial(_from_hub if is_remote else _in_folder, name.removeprefix(SCHEME))
    config_path = get("config.json")
    if config_path is None:
        raise locate.WeightsNotFoundError(f"Expected a config.json in {name}, found none.{_offline_text()}")
    config = _files.read_json(config_path)
    is_preset = config.get("registered_name") == REGISTERED
    variant: Variant | None = None
    with _files.reading(config_path, "the configuration of a ConvNeXt", "Get it again."):
        if is_preset:
            variant, prepared = _of_preset(config, get)
        elif "architecture" in config:
            variant, prepared = _of_timm(config, name)
        else:
            prepared = _of_transformers(config, get, name)
    names = (PRESET_WEIGHTS,) if is_preset else WEIGHTS
    file = next(filter(None, map(get, names)), None)
    if file is None:
        raise locate.WeightsNotFoundError(
            f"Expected {' or '.join(names)} in {name}, found none.{_offline_text()}"
        )
    if is_preset:
        get(PRESET_HEAD)  # lies beside; a body has none
    licences = re.findall(r"^license(?:_name)?: *['\"]?([\w.-]+)", _header(get("README.md")), re.MULTILINE)
    licence = licences[-1] if licences else ""  # that of another name stands last
    return Repository(name, file, variant, prepared, licence, is_preset)


def read_preset(path: pathlib.Path, variant: Variant) -> dict:
    """The canonical state dict of a preset folder, by the path of its body."""
    head = path.with_name(PRESET_HEAD)
    return keras_files.read_body_and_head(path, head if head.is_file() else None, variant)


def _of_preset(config: dict[str, Any], get) -> tuple[Variant, Preprocessing | None]:
    body = config["config"]
    if body["architecture"] not in VARIANTS:
        raise ValueError(f"the architecture {body['architecture']!r} is not known")
    variant = VARIANTS[body["architecture"]]
    path = get("image_converter.json")
    if path is None:
        return variant, None
    values = _files.read_json(path)["config"]
    if values["image_size"] is None:
        return variant, None
    names = ("crop_fraction", "interpolation", "crop_mode", "resize_size")
    of_images = {name: values[name] for name in names}
    return variant, Preprocessing(
        tuple(values["image_size"]), mean=tuple(body["mean"]), std=tuple(body["std"]), **of_images
    )


def _of_timm(config: dict[str, Any], name: str) -> tuple[Variant | None, Preprocessing]:
    architecture = config["architecture"]
    if "convnext" not in architecture:
        raise _files.FileFormatError(f"Expected a ConvNeXt in {name}, received timm's {architecture!r}.")
    values = config.get("pretrained_cfg", config)
    prepared = Preprocessing(
        tuple(values["input_size"][1:]),
        values.get("crop_pct", 0.875),
        values.get("interpolation", "bicubic"),
        values.get("crop_mode") or "center",
        mean=tuple(values["mean"]),
        std=tuple(values["std"]),
    )
    return VARIANTS.get(architecture), prepared


def _of_transformers(config: dict[str, Any], get, name: str) -> Preprocessing | None:
    kind = config.get("model_type")
    body = config.get("backbone_config") or {}
    if kind not in _MODEL_TYPES or (kind == "upernet" and "convnext" not in body.get("model_type", "")):
        raise _files.FileFormatError(
            f"Expected a ConvNeXt of timm, transformers or keras_convnext in {name}, received a config.json "
            f"of model_type {kind!r}, registered_name {config.get('registered_name')!r}."
        )
    path = get("preprocessor_config.json")
    if path is None or kind == "upernet":  # a segmenter slides a window over photos
        return None
    values = _files.read_json(path)
    size = values["size"] if isinstance(values["size"], dict) else {"shortest_edge": values["size"]}
    side = size.get("shortest_edge")
    is_cropped = side is not None and side < _CROP_SIDE
    return Preprocessing(
        (size["height"], size["width"]) if side is None else side,
        values.get("crop_pct") or 0.875 if is_cropped else 1.0,
        _FILTERS[values.get("resample", 3)],
        "center" if is_cropped else "squash",
        mean=tuple(values["image_mean"]),
        std=tuple(values["image_std"]),
    )


def _header(card: pathlib.Path | None) -> str:
    """The lines of YAML at the top of a card."""
    text = "" if card is None else _files.read_text(card)
    return text.split("---", 2)[1] if text.startswith("---") else ""


def _offline_text() -> str:
    names = [name for name in ("KERAS_CONVNEXT_OFFLINE", "HF_HUB_OFFLINE") if is_set(name)]
    return f" {names[0]} forbids to download it." if names else ""


def _in_folder(folder: str, filename: str) -> pathlib.Path | None:
    path = pathlib.Path(folder, filename)
    return path if path.is_file() else None


def _from_hub(hub_id: str, filename: str) -> pathlib.Path | None:
    """A file of a repository, downloaded when it is not in the Hub's cache; None where there is no such."""
    wanted = dataclasses.replace(
        next(iter(catalog.CHECKPOINTS.values())),
        tag=SCHEME + hub_id,
        hub_id=hub_id,
        hub_filename=filename,
        url=None,
        sha256=None,
        sha256_prefix=None,
        packaged=None,
    )
    try:
        return download.fetch(wanted)
    except (download.NoSuchFileError, download.ForbiddenError):
        return None
    except (locate.WeightsNotFoundError, ImportError) as error:
        reason = str(error).partition(" Or: ")[0]  # what follows is of files of the catalog
        raise type(error)(f"{reason} Or download the repository to a folder, and pass that.") from error
