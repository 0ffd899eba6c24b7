"""Finds published weights on this machine: in the package, folders of the user, caches."""

import os
import pathlib
import urllib.parse

from keras_convnext._environment import keras_home
from keras_convnext.weights.published import TORCH_SUFFIXES, Checkpoint

PACKAGED_WEIGHTS = pathlib.Path(__file__).parent / "packaged"


class WeightsNotFoundError(OSError):
    """A weight file is not here and could not be brought here; `errno` is set when the disk is the reason."""


def find_local(published: Checkpoint) -> pathlib.Path | None:
    """Where a weight file lies on this machine, or None; asks no network and compares no hash.

    Looks in the package itself, the folders that `KERAS_CONVNEXT_WEIGHTS_DIR` names (separated by
    `os.pathsep`), the cache folder and that of `huggingface_hub`, in this order. A
    WeightsNotFoundError when the package lacks its file, a weights folder is none, or a file in it is a Git
    LFS pointer.
    """
    if published.packaged is not None:
        path = PACKAGED_WEIGHTS / published.packaged
        if not path.is_file():
            raise WeightsNotFoundError(
                f"The weights {published.tag!r} ship with keras_convnext, and {path} is not there: the "
                "installation is incomplete. Install the package again."
            )
        return path
    placed = _in_weights_folders(published)
    if placed is not None:
        return placed
    cached = cache_path(published)
    if cached is not None and cached.is_file():
        return cached
    if published.hub_id is None:
        return None
    try:
        import huggingface_hub
    except ImportError:
        return None
    in_hub_cache = huggingface_hub.try_to_load_from_cache(published.hub_id, published.hub_filename)
    return pathlib.Path(in_hub_cache) if isinstance(in_hub_cache, str) else None


def cache_path(published: Checkpoint) -> pathlib.Path | None:
    """Where the file at the plain address is kept, None without an address."""
    return None if published.url is None else cache_folder() / filename_of_url(published.url)


def cache_folder() -> pathlib.Path:
    """The folder of plain downloads, which need not exist: KERAS_CONVNEXT_CACHE, else in the Keras home."""
    configured = os.environ.get("KERAS_CONVNEXT_CACHE")
    if configured:
        return pathlib.Path(os.path.expanduser(configured))  # Path.expanduser raises for an unknown user
    return pathlib.Path(keras_home(), "models", "keras_convnext")


def filename_of_url(url: str) -> str:
    return pathlib.PurePosixPath(urllib.parse.urlsplit(url).path).name


def _in_weights_folders(published: Checkpoint) -> pathlib.Path | None:
    """The first file in `KERAS_CONVNEXT_WEIGHTS_DIR` with the tag's name or a published one."""
    names = [published.tag + suffix for suffix in (*TORCH_SUFFIXES, ".h5", ".weights.h5", ".keras")]
    if published.url is not None:
        names.append(filename_of_url(published.url))
    if published.hub_id is not None:
        names.append(f"{published.hub_id.rsplit('/', 1)[-1]}/{published.hub_filename}")
    configured = os.environ.get("KERAS_CONVNEXT_WEIGHTS_DIR", "")
    for name_of_folder in filter(None, configured.split(os.pathsep)):
        folder = pathlib.Path(os.path.expanduser(name_of_folder))
        if not folder.is_dir() or not os.access(folder, os.R_OK | os.X_OK):
            state = "cannot be read" if folder.is_dir() else "is not a folder"
            raise WeightsNotFoundError(
                f"KERAS_CONVNEXT_WEIGHTS_DIR names {str(folder)!r}, which {state}: expected readable folders "
                f"separated by {os.pathsep!r}, received {configured!r}. Create the folder, correct the "
                "variable or unset it."
            )
        for name in names:
            path = folder / name
            if path.is_file():
                _check_is_not_pointer(path)
                return path
    return None


def _check_is_not_pointer(path: pathlib.Path) -> None:
    """Refuses the text file which git leaves in place of a large file it did not fetch."""
    with open(path, "rb") as file:
        if file.read(40).startswith(b"version https://git-lfs.github.com/spec"):
            raise WeightsNotFoundError(
                f"{path} is a Git LFS pointer of {path.stat().st_size} bytes: expected the weights "
                "themselves. Run `git lfs pull` in that repository, or delete the file."
            )
