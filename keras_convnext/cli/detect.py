"""`detect` finds the objects on photos."""

import argparse
import functools
import pathlib
import sys
from collections.abc import Callable
from typing import Any

from keras_convnext.cli import photos, shared
from keras_convnext.data import class_names

DETECT_EXAMPLES = """examples:
  keras-convnext detect street.jpg --model convnext_tiny.fb_coco_mask_rcnn -o out/
  keras-convnext detect photos/ --model my_weights.safetensors -o out/ --score 0.3 --json

Photos may have any size. They are resized so that the shorter side is that of the published scores or of
the training. -o gets for every photo a picture with boxes, masks and names (photo.detections.png), and
detect.json with all of them in pixels of the photo: "bbox" is x, y, width, height, "segmentation" are run
lengths, and "category_id" is the id of the training's annotations, as in COCO's results files."""

_SHOWN = 20  # objects of a photo on a terminal


def detect_options(option: Callable) -> None:
    photos.photos_options(option)
    option("--model", "TAG", "tag, weight file or .keras file of a detector", required=True)
    option("-o, --output", "DIR", "folder for pictures and detect.json")
    least = "least score in 0..1 that is told, default %(default)s"
    option("--score", "SCORE", least, type=shared.not_negative, default=0.5)
    for name in ("--image-size", "--quiet", "--json"):
        option(name)


def detect_command(options: argparse.Namespace) -> int:
    """Finds objects on photos; those that cannot be read are reported and left out."""

    def open_model():
        shared.import_quietly("keras_convnext.predictor")
        from keras_convnext import predictor

        return predictor.open_detector(options.model, image_size=options.image_size)

    look = functools.partial(_detected, score=options.score)
    return photos.each_photo(options, "detect", _pictures_of, open_model, look, _show)


def _pictures_of(target: pathlib.Path) -> tuple[pathlib.Path]:
    return (target.with_name(f"{target.name}.detections.png"),)


def _detected(detector, path, image, target, score: float) -> dict[str, Any]:
    """Finds the objects of one photo, draws them where there is a `target`, and says what they are."""
    from keras_convnext.data.detection import pictures
    from keras_convnext.data.detection.results import as_result
    from keras_convnext.data.segmentation.pictures import save_png

    found = detector.detect(image, score)
    result: dict[str, Any] = {"file": str(path), "height": image.shape[0], "width": image.shape[1]}
    if target is not None:
        (file,) = _pictures_of(target)
        save_png(pictures.drawn(image, found, len(detector.categories.names)), file)
        result["picture"] = str(file)
    return result | {"objects": [as_result(one) | {"name": one["name"]} for one in found]}


def _show(result: dict[str, Any]) -> None:
    print(result["file"])
    for one in result["objects"][:_SHOWN]:
        (name,) = class_names.to_lines([one["name"]]).splitlines()
        x, y, width, height = one["bbox"]
        print(
            f"  {100 * one['score']:6.2f} %  {name}  at {x:.0f}, {y:.0f}, {width:.0f} x {height:.0f} pixels"
        )
    if len(result["objects"]) > _SHOWN:
        print(f"  and {len(result['objects']) - _SHOWN} more")
    if not result["objects"]:
        print("  nothing found")
    sys.stdout.flush()
