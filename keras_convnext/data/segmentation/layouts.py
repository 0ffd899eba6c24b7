"""Folders of photographs with a label map for each: which layout lies at a path, and its pairs."""

import collections
import dataclasses
import glob
import os

from keras_convnext._files import StrPath
from keras_convnext.data.index import SourceError, first_few, images_below, list_folder
from keras_convnext.data.segmentation import coco

_MAPS = ("masks", "labels", "annotations")


@dataclasses.dataclass(frozen=True)
class Layout:
    """Where images and maps lie below a folder; "SPLIT" stands for the name of a split."""

    images: str
    maps: str

    def __str__(self) -> str:
        return f"{self.images} + {self.maps}"


LAYOUTS = (
    *(Layout("SPLIT/images", f"SPLIT/{name}") for name in _MAPS),
    *(Layout("images/SPLIT", f"{name}/SPLIT") for name in _MAPS),  # ADE20K: annotations
    Layout("img_dir/SPLIT", "ann_dir/SPLIT"),  # mmsegmentation
    Layout("SPLIT", "SPLITannot"),  # CamVid
    *(Layout("images", name) for name in _MAPS),
)
COCO = Layout("images", "COCO-style JSON")

Places = dict[str | None, tuple[str, str]]  # of a split: the folder of its images; that of maps, or the JSON


def find(path: StrPath) -> dict[Layout, Places]:
    """Returns every layout that fits what lies at a path, with the places of each split."""
    path = os.fspath(path)
    if os.path.isfile(path):
        return {COCO: {None: ("", path)}} if coco.is_annotations(path) else {}
    if not os.path.isdir(path):
        return {}
    found = {layout: places for layout in LAYOUTS if (places := _places(path, layout))}
    annotations = coco.find_annotations(path)
    return found | ({COCO: {split: ("", file) for split, file in annotations.items()}} if annotations else {})


def find_one(path: StrPath) -> tuple[Layout, Places]:
    """Returns the layout at a path; SourceError where there is none, or where several fit."""
    found = find(path)
    if len(found) == 1:
        return next(iter(found.items()))
    if found:
        first, second = list(found)[:2]
        raise SourceError(
            f"Expected one layout of images and label maps in '{path}', received two: "
            f"'{first}' and '{second}'. Move one of them to another folder."
        )
    known = "; ".join(map(str, LAYOUTS))
    raise SourceError(
        f"Expected images and their label maps, PNG files, at '{path}' in one of these layouts: {known}; or "
        f"a COCO-style JSON beside its images. {_found(os.fspath(path))}"
    )


def _found(path: str) -> str:
    """Says what lies at a path of no known layout, and what to do."""
    if not os.path.isdir(path):
        return f"Received a file, '{os.path.basename(path)}'. Pass the folder of the data."
    if is_cityscapes(path):
        return (
            "Received the folders of Cityscapes, with cities inside and several maps for a photo. Link each "
            "leftImg8bit/SPLIT/CITY/NAME_leftImg8bit.png as img_dir/SPLIT/NAME.png of another folder, its "
            "gtFine/SPLIT/CITY/NAME_gtFine_labelTrainIds.png, in which 255 is not labelled, as "
            "ann_dir/SPLIT/NAME.png, and pass that folder."
        )
    counts = collections.Counter(os.path.dirname(file) for file in images_below(path)[0])
    if not counts:
        return "Received no images. Check the path."
    words = [f"{os.path.relpath(folder, path)} ({count})" for folder, count in sorted(counts.items())]
    return f"Received images in {first_few(words)}. Rename or link these folders as in one of the layouts."


def is_cityscapes(path: str) -> bool:
    """Tells whether a folder has those of Cityscapes, which are of no layout."""
    return all(os.path.isdir(os.path.join(path, name)) for name in ("leftImg8bit", "gtFine"))


def used_folders(layout: Layout, places: Places, path: StrPath) -> set[str]:
    """Returns the names of the folders directly below a path that belong to its layout."""
    inside = [os.path.relpath(place, path) for pair in places.values() for place in pair if place]
    return {place.split(os.sep)[0] for place in inside}


def pairs(images: str, maps: str) -> tuple[list[tuple[str, str]], collections.Counter[str]]:
    """Returns the paths of each image and its map, sorted, and what is left out, by reason.

    Files pair by their names without suffix. Where the names of no map and image are equal, those of all maps
    may have one ending more, as "0001_mask.png". Maps without an image are left out; an image without a map
    is an error, as a part of the images would give another score.
    """
    folders, photos, left_out = list_folder(images)
    inner, found, others = list_folder(maps)
    left_out += others
    left_out["folders beside the images or maps"] = len(folders) + len(inner)
    pngs = [name for name in found if name.lower().endswith(".png")]
    if found and not pngs:
        raise SourceError(
            f"Expected label maps as PNG in '{maps}', received {first_few(found)}. Formats for photographs "
            "change the numbers: export the maps as PNG."
        )
    left_out["maps that are no PNG"] = len(found) - len(pngs)
    by_stem, map_by_stem = _by_stem(images, photos), _by_stem(maps, pngs)
    if not by_stem.keys() & map_by_stem.keys():
        map_by_stem = _without_ending(by_stem, map_by_stem)
    common = sorted(by_stem.keys() & map_by_stem.keys())
    if not common:
        raise SourceError(
            f"Expected for each image in '{images}' a PNG of the same name in '{maps}', found no pair: "
            f"{len(photos)} images ({first_few(photos)}) and {len(pngs)} maps ({first_few(pngs)}). Name the "
            "maps as the images."
        )
    alone = [by_stem[stem] for stem in sorted(by_stem.keys() - map_by_stem.keys())]
    if alone:
        raise SourceError(
            f"Expected a PNG in '{maps}' for each of the {len(photos)} images in '{images}', {len(alone)} "
            f"have none: {first_few(alone)}. Add the maps, or move these images away."
        )
    left_out["maps without an image"] = len(map_by_stem.keys() - by_stem.keys())
    found_pairs = [
        (os.path.join(images, by_stem[stem]), os.path.join(maps, map_by_stem[stem])) for stem in common
    ]
    return found_pairs, +left_out  # without zeros


def _places(path: str, layout: Layout) -> Places:
    """Returns the folders of a layout for each split that has files in both."""
    pattern = os.path.join(glob.escape(path), layout.images.replace("SPLIT", "*"))
    found: Places = {}
    for images in (
        sorted(glob.glob(pattern)) if "SPLIT" in layout.images else [os.path.join(path, layout.images)]
    ):
        inside = os.path.relpath(images, path).split(os.sep)
        split = inside[layout.images.split("/").index("SPLIT")] if "SPLIT" in layout.images else None
        maps = os.path.join(path, layout.maps.replace("SPLIT", split or ""))
        if os.path.isdir(images) and os.path.isdir(maps) and list_folder(maps)[1] and list_folder(images)[1]:
            found[split] = (images, maps)
    return found


def _by_stem(folder: str, names: list[str]) -> dict[str, str]:
    found: dict[str, str] = {}
    for name in names:
        stem = os.path.splitext(name)[0]
        if stem in found:
            raise SourceError(
                f"Expected one file for '{stem}' in '{folder}', received '{found[stem]}' and '{name}'. "
                "Remove one of them."
            )
        found[stem] = name
    return found


def _without_ending(images: dict[str, str], maps: dict[str, str]) -> dict[str, str]:
    """Returns the maps by names without the ending that all have beyond an image's name, as "_mask"."""
    first = min(maps, default="")
    for cut in range(len(first) - 1, 0, -1):
        ending = first[cut:]
        if first[:cut] in images and all(stem.endswith(ending) for stem in maps):
            return {stem.removesuffix(ending): name for stem, name in maps.items()}
    return maps
