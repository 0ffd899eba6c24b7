"""Finds published weights on this machine: in the package, folders of the user, caches.

Environment variables:
    KERAS_CONVNEXT_WEIGHTS_DIR: folder with files placed by hand; several separated by `os.pathsep`.
    KERAS_CONVNEXT_CACHE: folder of plain downloads, default "<keras home>/models/keras_convnext".
    HF_HOME, HF_HUB_CACHE: as in `huggingface_hub`, whose cache has the files of the Hub.
"""

import os
import pathlib
import urllib.parse

from keras_convnext.weights.published import Checkpoint

PACKAGED_WEIGHTS = pathlib.Path(__file__).parent / "packaged"


class WeightsNotFoundError(OSError):
    """A weight file is not on this machine and could not be brought here.

    The message names what was tried and how to place the file by hand. `errno` is set when the
    disk is the reason.
    """


def find_local(published: Checkpoint) -> pathlib.Path | None:
    """Returns where a weight file lies on this machine, or None; asks no network and compares no hash.

    Looks in the package itself, the folders of `KERAS_CONVNEXT_WEIGHTS_DIR`, the cache folder and the
    Hugging Face cache, in this order. A weights folder may have it as "<tag>.safetensors", .pth, .pt, .bin,
    .h5, .weights.h5 or .keras, or under its published name.

    Raises:
        WeightsNotFoundError: the package lacks its file, a weights folder is none, or a file in it is a
            Git LFS pointer.
    """
    if published.packaged is not None:
        return _in_package(published.tag, published.packaged)
    placed = _in_weights_folders(published)
    if placed is not None:
        return placed
    cached = cache_path(published)
    if cached is not None and cached.is_file():
        return cached
    return None if published.hub_id is None else _in_hub_cache(published)


def cache_path(published: Checkpoint) -> pathlib.Path | None:
    """Returns where the file at the plain address is kept, None without an address."""
    return None if published.url is None else cache_folder() / filename_of_url(published.url)


def cache_folder() -> pathlib.Path:
    """Returns the folder which keeps plain downloads; it need not exist.

    `KERAS_CONVNEXT_CACHE`, else "models/keras_convnext" in the Keras home, which is found as
    `keras.config` does it: `KERAS_HOME`, else ".keras" in the home folder, or in "/tmp" when that
    cannot be written.
    """
    configured = os.environ.get("KERAS_CONVNEXT_CACHE")
    if configured:
        return pathlib.Path(configured).expanduser()
    if "KERAS_HOME" in os.environ:
        keras_home = pathlib.Path(os.environ["KERAS_HOME"]).expanduser()
    else:
        home = os.path.expanduser("~")
        keras_home = pathlib.Path(home if os.access(home, os.W_OK) else "/tmp") / ".keras"
    return keras_home / "models" / "keras_convnext"


def filename_of_url(url: str) -> str:
    return pathlib.PurePosixPath(urllib.parse.urlsplit(url).path).name


def _in_package(tag: str, name: str) -> pathlib.Path:
    path = PACKAGED_WEIGHTS / name
    if not path.is_file():
        raise WeightsNotFoundError(
            f"The weights {tag!r} ship with keras_convnext, and {path} is not there: the installation is "
            "incomplete. Install the package again."
        )
    return path


def _in_weights_folders(published: Checkpoint) -> pathlib.Path | None:
    """Returns the first file in `KERAS_CONVNEXT_WEIGHTS_DIR` that can be these weights."""
    extensions = ("safetensors", "pth", "pt", "bin", "h5", "weights.h5", "keras")
    names = [f"{published.tag}.{extension}" for extension in extensions]
    if published.url is not None:
        names.append(filename_of_url(published.url))
    if published.hub_id is not None:
        names.append(f"{published.hub_id.rsplit('/', 1)[-1]}/{published.hub_filename}")
    configured = os.environ.get("KERAS_CONVNEXT_WEIGHTS_DIR", "")
    for name_of_folder in filter(None, configured.split(os.pathsep)):
        folder = pathlib.Path(name_of_folder).expanduser()
        if not folder.is_dir() or not os.access(folder, os.R_OK | os.X_OK):
            state = "cannot be read" if folder.is_dir() else "is not a folder"
            raise WeightsNotFoundError(
                f"KERAS_CONVNEXT_WEIGHTS_DIR names {str(folder)!r}, which {state}: expected "
                f"readable folders separated by {os.pathsep!r}, received {configured!r}. Create "
                "the folder, correct the variable or unset it."
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


def _in_hub_cache(published: Checkpoint) -> pathlib.Path | None:
    try:
        import huggingface_hub
    except ImportError:
        return None
    path = huggingface_hub.try_to_load_from_cache(published.hub_id, published.hub_filename)
    return pathlib.Path(path) if isinstance(path, str) else None
