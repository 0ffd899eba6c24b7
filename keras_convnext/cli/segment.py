"""`segment` says of every pixel of a photo what it belongs to."""

import argparse
import collections
import json
import os
import pathlib
import sys
from collections.abc import Callable, Sequence
from typing import Any

from keras_convnext import _files
from keras_convnext._terminal import Progress
from keras_convnext.cli import shared
from keras_convnext.data import class_names, preprocess

SEGMENT_EXAMPLES = """examples:
  keras-convnext segment street.jpg --model convnext_tiny.fb_ade20k_512 -o out/
  keras-convnext segment photos/ --model runs/streets/final.safetensors -o out/ --json
  keras-convnext segment street.jpg --model my_streets.keras --mode multi_scale

Photos may have any size. They are resized so that the shorter side is that of the weights' training crops;
with --mode auto a longer side is covered by windows of that crop, as the published scores are measured. -o
gets for every photo its label map as a PNG with a palette (photo.labels.png, whose pixels are the numbers of
classes), the map over the photo with a legend (photo.overlay.png), and segment.json with all shares."""

_MARK = b'"written_by": "keras_convnext segment"'  # of a segment.json that may be replaced
_SHOWN = 10  # classes of a photo on a terminal


def segment_options(option: Callable) -> None:
    option("images", "IMAGE_OR_FOLDER", "folders are searched for images", nargs="+")
    option("--model", "TAG", "tag, weight file or .keras file of a segmentation model", required=True)
    option("-o, --output", "DIR", "folder for label maps, overlays and segment.json")
    modes = ("auto", "whole", "slide", "multi_scale")
    option("--mode", "MODE", f"{', '.join(modes)}; default %(default)s", default="auto", choices=modes)
    for name in ("--image-size", "--quiet", "--json"):
        option(name)


def segment_command(options: argparse.Namespace) -> int:
    """Segments photos; those that cannot be read are reported and left out."""
    errors: list[str] = []
    photos: list[tuple[pathlib.Path, pathlib.Path]] = []  # path, and path below the folder that was named
    for name in options.images:
        try:
            found = preprocess.find_images(name)
            parent = pathlib.Path(name) if os.path.isdir(name) else pathlib.Path(name).parent
            photos += [(path, path.relative_to(parent)) for path in found]
        except preprocess.ImageError as error:
            shared.note(errors, error)
    if not photos:
        return 2
    targets = _targets(options.output, photos)
    segmenter: Any = None
    results: list[dict] = []
    progress = Progress("segment", len(photos), is_wanted=not options.quiet)
    with progress:
        for (path, _), target in zip(photos, targets, strict=True):
            try:
                image = preprocess.read_image(path)
                segmenter = segmenter or _open(options)
                result = _segmented(segmenter, path, image, target, options.mode)
                results.append(result)
                if not options.json:
                    _show(result)
            except preprocess.ImageError as error:
                shared.note(errors, error)
            progress.show(len(results) + len(errors))
    if results and options.output is not None:
        written = {"written_by": "keras_convnext segment", "model": options.model, "images": results}
        _files.replace_file(_json_file(options.output), json.dumps(written, indent=1).encode(), _MARK)
    if options.json and results:
        shared.print_json(results)
    if not errors:
        return 0
    return 1 if results else 2


def _json_file(output: str) -> pathlib.Path:
    return pathlib.Path(output) / "segment.json"


def _open(options: argparse.Namespace):
    shared.import_quietly("keras_convnext.predictor")
    from keras_convnext import predictor

    return predictor.open_segmenter(options.model, image_size=options.image_size)


def _targets(
    output: str | None, photos: Sequence[tuple[pathlib.Path, pathlib.Path]]
) -> list[pathlib.Path | None]:
    """Where the files of each photo go, without their endings; refuses now what another program wrote."""
    if output is None:
        return [None] * len(photos)
    stems = collections.Counter(below.with_suffix("") for _, below in photos)
    names = [below.with_suffix("") if stems[below.with_suffix("")] == 1 else below for _, below in photos]
    if len(set(names)) < len(names):
        (name, _), *_ = collections.Counter(names).most_common(1)
        raise ValueError(
            f"Expected photos of different names, received several '{name}', which would be written to one "
            "file. Pass the folder that holds them all, or one at a time."
        )
    folder = pathlib.Path(output)
    _files.prepare_folder(folder, {_json_file(output).name: _MARK})
    for name in names:
        target = folder / name
        target.parent.mkdir(parents=True, exist_ok=True)
        for file in _pictures_of(target):
            _files.check_target(file, mark=_files.PNG_MARK)
    return [folder / name for name in names]


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
