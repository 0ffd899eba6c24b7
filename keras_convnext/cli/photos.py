"""What the commands share that look at photos one by one and write pictures of them into a folder."""

import argparse
import collections
import json
import os
import pathlib
from collections.abc import Callable, Sequence
from typing import Any

from keras_convnext import _files
from keras_convnext._terminal import Progress
from keras_convnext.cli import shared
from keras_convnext.data import preprocess

Photo = tuple[pathlib.Path, pathlib.Path]  # its path, and that below the folder that was named


def photos_options(option: Callable) -> None:
    option("images", "IMAGE_OR_FOLDER", "folders are searched for images", nargs="+")


def each_photo(
    options: argparse.Namespace,
    command: str,
    pictures_of: Callable[[pathlib.Path], Sequence[pathlib.Path]],
    open_model: Callable[[], Any],
    look: Callable[[Any, pathlib.Path, Any, pathlib.Path | None], dict[str, Any]],
    show: Callable[[dict[str, Any]], None],
) -> int:
    """Looks at the photos that a command names, writes what is found, and returns the exit code.

    Photos that cannot be read are reported and left out. `pictures_of(target)` are the files of a photo in
    the folder `options.output`; `look(model, path, image, target)` writes them and says what is found; that
    is printed by `show`, or as JSON, and written to a file that is named after the command.
    """
    errors: list[str] = []
    photos = _photos(options.images, errors)
    if not photos:
        return 2
    mark = f'"written_by": "keras_convnext {command}"'.encode()  # of a file that may be replaced
    targets = _targets(options.output, photos, command, mark, pictures_of)
    model: Any = None
    results: list[dict] = []
    progress = Progress(command, len(photos), is_wanted=not options.quiet)
    with progress:
        for (path, _), target in zip(photos, targets, strict=True):
            try:
                image = preprocess.read_image(path)
                model = model or open_model()
                result = look(model, path, image, target)
                results.append(result)
                if not options.json:
                    show(result)
            except preprocess.ImageError as error:
                shared.note(errors, error)
            progress.show(len(results) + len(errors))
    if results and options.output is not None:
        written = {"written_by": f"keras_convnext {command}", "model": options.model, "images": results}
        _files.replace_file(_json_file(options.output, command), json.dumps(written, indent=1).encode(), mark)
    if options.json and results:
        shared.print_json(results)
    if not errors:
        return 0
    return 1 if results else 2


def _photos(names: Sequence[str], errors: list[str]) -> list[Photo]:
    photos: list[Photo] = []
    for name in names:
        try:
            found = preprocess.find_images(name)
            parent = pathlib.Path(name) if os.path.isdir(name) else pathlib.Path(name).parent
            photos += [(path, path.relative_to(parent)) for path in found]
        except preprocess.ImageError as error:
            shared.note(errors, error)
    return photos


def _json_file(output: str, command: str) -> pathlib.Path:
    return pathlib.Path(output) / f"{command}.json"


def _targets(
    output: str | None, photos: Sequence[Photo], command: str, mark: bytes, pictures_of: Callable
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
    _files.prepare_folder(folder, {_json_file(output, command).name: mark})
    for name in names:
        target = folder / name
        target.parent.mkdir(parents=True, exist_ok=True)
        for file in pictures_of(target):
            _files.check_target(file, mark=_files.PNG_MARK)
    return [folder / name for name in names]
