"""`segment` says of every pixel of a photo what it belongs to."""

import argparse
import functools
import pathlib
import sys
from collections.abc import Callable
from typing import Any

from keras_convnext.cli import photos, shared
from keras_convnext.data import class_names

SEGMENT_EXAMPLES = """examples:
  keras-convnext segment street.jpg --model convnext_tiny.fb_ade20k_512 -o out/
  keras-convnext segment photos/ --model runs/streets/final.safetensors -o out/ --json
  keras-convnext segment street.jpg --model my_streets.keras --mode multi_scale

Photos may have any size. They are resized so that the shorter side is that of the weights' training crops;
with --mode auto a longer side is covered by windows of that crop, as the published scores are measured. -o
gets for every photo its label map as a PNG with a palette (photo.labels.png, whose pixels are the numbers of
classes), the map over the photo with a legend (photo.overlay.png), and segment.json with all shares."""

_SHOWN = 10  # classes of a photo on a terminal


def segment_options(option: Callable) -> None:
    photos.photos_options(option)
    option("--model", "TAG", "tag, weight file or .keras file of a segmentation model", required=True)
    option("-o, --output", "DIR", "folder for label maps, overlays and segment.json")
    modes = ("auto", "whole", "slide", "multi_scale")
    option("--mode", "MODE", f"{', '.join(modes)}; default %(default)s", default="auto", choices=modes)
    for name in ("--image-size", "--quiet", "--json"):
        option(name)


def segment_command(options: argparse.Namespace) -> int:
    """Segments photos; those that cannot be read are reported and left out."""

    def open_model():
        shared.import_quietly("keras_convnext.predictor")
        from keras_convnext import predictor

        return predictor.open_segmenter(options.model, image_size=options.image_size)

    look = functools.partial(_segmented, mode=options.mode)
    return photos.each_photo(options, "segment", _pictures_of, open_model, look, _show)


def _pictures_of(target: pathlib.Path) -> tuple[pathlib.Path, pathlib.Path]:
    """The files of the label map and of the overlay."""
    return target.with_name(f"{target.name}.labels.png"), target.with_name(f"{target.name}.overlay.png")


def _segmented(segmenter, path, image, target, mode: str) -> dict[str, Any]:
    """Segments one photo, writes its pictures where there is a `target`, and says what is in it."""
    from keras_convnext.data.segmentation import pictures

    label_map = segmenter.segment(image, mode)
    found = pictures.shares(label_map, segmenter.labels)
    result: dict[str, Any] = {"file": str(path), "height": image.shape[0], "width": image.shape[1]}
    if target is not None:
        map_file, overlay_file = _pictures_of(target)
        pictures.save_png(pictures.as_palette_image(label_map, segmenter.labels), map_file)
        shown = pictures.overlay(image, label_map, segmenter.labels)
        pictures.save_png(pictures.with_legend(shown, found, segmenter.labels), overlay_file)
        result |= {"label_map": str(map_file), "overlay": str(overlay_file)}
    return result | {"classes": found}


def _show(result: dict[str, Any]) -> None:
    print(result["file"])
    for row in result["classes"][:_SHOWN]:
        (name,) = class_names.to_lines([row["name"]]).splitlines()
        print(f"  {100 * row['share']:6.2f} %  {name}")
    if len(result["classes"]) > _SHOWN:
        print(f"  and {len(result['classes']) - _SHOWN} more classes")
    sys.stdout.flush()
