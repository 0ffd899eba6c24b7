"""Finds the file of published weights: in the package, folders of the user, caches, then on the network.

Environment variables:
    KERAS_CONVNEXT_WEIGHTS_DIR: folder with files placed by hand; several separated by `os.pathsep`.
    KERAS_CONVNEXT_CACHE: cache folder, default "<keras home>/models/keras_convnext".
    KERAS_CONVNEXT_OFFLINE: 1 to never use the network; off as `_environment.is_set` says.
    KERAS_CONVNEXT_QUIET: 1 to print nothing; likewise.
    HF_HUB_OFFLINE, HF_ENDPOINT, HF_HOME: as in `huggingface_hub`, for files on the hub.
"""

import os
import pathlib

from keras_convnext._environment import is_set
from keras_convnext.weights.download import (
    UnreachableError,
    WeightsNotFoundError,
    cache_folder,
    check_published,
    disk_error,
    download,
    filename_of_url,
    one_line,
    verify,
)

PACKAGED_WEIGHTS = pathlib.Path(__file__).parent / "packaged"


def find_file(
    *,
    tag: str,
    hub_id: str | None,
    hub_filename: str | None,
    url: str | None,
    sha256: str | None,
    sha256_prefix: str | None,
    gated: bool = False,
    packaged: str | None = None,
) -> pathlib.Path:
    """Returns the path of a published weight file, downloading it when it is not here yet.

    Looks in this order: the package itself, the folders of `KERAS_CONVNEXT_WEIGHTS_DIR`, the cache folder,
    the Hugging Face cache, the hub, the plain address. A file found in a cache is used without asking
    the network. When the hub cannot be reached and there is a plain address, that is used.
    A file from a cache or the network is verified (see `verify`). A file from the weights folders
    is compared with the published hash only when it has the published name, because a converted
    file has another hash.

    Args:
        tag: name of the weights; "<tag>.safetensors", .pth, .pt, .bin, .h5, .weights.h5 and .keras
            are looked for in the weights folders, before the published names.
        hub_id: repository on the Hugging Face hub, "owner/name", or None.
        hub_filename: path of the file in that repository; needed with `hub_id`.
        url: plain http or https address of the file, or None.
        sha256: published SHA-256 in hexadecimal, or None; that of the file at `url` when there is
            one, else of the file on the hub.
        sha256_prefix: published first digits of the same hash, or None.
        gated: the hub asks to accept a licence first; used in messages. Default False.
        packaged: name of a file that ships in the folder `weights/packaged` of this package, or None.

    Returns:
        pathlib.Path of an existing file.

    Raises:
        ValueError: when `hub_id` comes without `hub_filename`, or `url` is not http or https.
        ImportError: when the file is only on the hub and `huggingface_hub` is not installed.
        ChecksumError: when the file is not the expected one; tells both hashes.
        UnreachableError: when no server answered or the transfer kept failing.
        WeightsNotFoundError: in every other case without a file (offline, no permission, not
            there, no disk space); tells what to do. Also the base of UnreachableError.
    """
    if hub_id is not None and hub_filename is None:
        raise ValueError(
            f"Weights {tag!r} name the hub repository {hub_id!r} without a file: expected "
            "hub_filename='model.safetensors' or the like, received None."
        )
    if packaged is not None:
        return verify(_in_package(tag, packaged), sha256, sha256_prefix)
    url_filename = None if url is None else filename_of_url(url)
    published_name = url_filename or (hub_filename and pathlib.PurePosixPath(hub_filename).name)

    def published_hashes(path: pathlib.Path) -> tuple[str | None, str | None]:
        return (sha256, sha256_prefix) if path.name == published_name else (None, None)

    local = _file_in_weights_folders(tag, hub_id, hub_filename, url_filename)
    if local is not None:
        check_published(local, *published_hashes(local))
        return local
    present = _file_in_caches(hub_id, hub_filename, url_filename)
    if present is not None:
        return verify(present, *published_hashes(present))
    cached = None if url_filename is None else cache_folder() / url_filename

    by_hand = _by_hand(tag, hub_id, hub_filename, url, gated)
    offline = _offline_variable(hub_id is not None)
    if offline is not None:
        folders = os.environ.get("KERAS_CONVNEXT_WEIGHTS_DIR") or "not set"
        raise WeightsNotFoundError(
            f"The weights {tag!r} are not on this machine, and {offline}={os.environ[offline]} "
            f"forbids downloading them. Looked in KERAS_CONVNEXT_WEIGHTS_DIR ({folders}) and in "
            f"the cache {cache_folder()}. Unset {offline}, or: {by_hand}"
        )
    if hub_id is None or hub_filename is None:
        if url is None or cached is None:
            raise WeightsNotFoundError(
                f"The weights {tag!r} have no published address: expected a hub_id or a url, "
                f"received None for both. Instead, {by_hand}"
            )
        return download(url, cached, sha256=sha256, sha256_prefix=sha256_prefix)
    try:
        from_hub = _download_from_hub(hub_id, hub_filename, gated, by_hand)
    except (ImportError, UnreachableError):
        if url is None or cached is None:
            raise
        return download(url, cached, sha256=sha256, sha256_prefix=sha256_prefix)
    return verify(from_hub, *published_hashes(from_hub))


def find_local(
    *, tag: str, hub_id: str | None, hub_filename: str | None, url: str | None, packaged: str | None = None
) -> pathlib.Path | None:
    """Returns where a weight file lies on this machine, or None; asks no network and verifies nothing.

    Looks in the package itself, the folders of `KERAS_CONVNEXT_WEIGHTS_DIR`, the cache folder and the
    Hugging Face cache, in this order. Arguments as in `find_file`.
    """
    if packaged is not None:
        return _in_package(tag, packaged)
    url_filename = None if url is None else filename_of_url(url)
    found = _file_in_weights_folders(tag, hub_id, hub_filename, url_filename)
    return found or _file_in_caches(hub_id, hub_filename, url_filename)


def _in_package(tag: str, name: str) -> pathlib.Path:
    """The path of a weight file that ships with the package."""
    path = PACKAGED_WEIGHTS / name
    if not path.is_file():
        raise WeightsNotFoundError(
            f"The weights {tag!r} ship with keras_convnext, and {path} is not there: the installation is "
            "incomplete. Install the package again."
        )
    return path


def _file_in_weights_folders(
    tag: str, hub_id: str | None, hub_filename: str | None, url_filename: str | None
) -> pathlib.Path | None:
    """Returns the first file in `KERAS_CONVNEXT_WEIGHTS_DIR` that can be these weights."""
    extensions = ("safetensors", "pth", "pt", "bin", "h5", "weights.h5", "keras")
    names = [f"{tag}.{extension}" for extension in extensions]
    if url_filename is not None:
        names.append(url_filename)
    if hub_id is not None and hub_filename is not None:
        names.append(f"{hub_id.rsplit('/', 1)[-1]}/{hub_filename}")
    configured = os.environ.get("KERAS_CONVNEXT_WEIGHTS_DIR", "")
    for name_of_folder in filter(None, configured.split(os.pathsep)):
        folder = pathlib.Path(name_of_folder).expanduser()
        if not folder.is_dir() or not os.access(folder, os.R_OK | os.X_OK):
            state = "cannot be read" if folder.exists() and folder.is_dir() else "is not a folder"
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


def _file_in_caches(
    hub_id: str | None, hub_filename: str | None, url_filename: str | None
) -> pathlib.Path | None:
    """Returns the file that an earlier download left in our cache or in that of Hugging Face."""
    if url_filename is not None and (cache_folder() / url_filename).is_file():
        return cache_folder() / url_filename
    if hub_id is not None and hub_filename is not None:
        return _file_in_hub_cache(hub_id, hub_filename)
    return None


def _file_in_hub_cache(hub_id: str, hub_filename: str) -> pathlib.Path | None:
    """Returns the file when the Hugging Face cache has it, without asking the network."""
    try:
        import huggingface_hub
    except ImportError:
        return None
    path = huggingface_hub.try_to_load_from_cache(hub_id, hub_filename)
    return pathlib.Path(path) if isinstance(path, str) else None


def _download_from_hub(hub_id: str, hub_filename: str, gated: bool, by_hand: str) -> pathlib.Path:
    """Downloads into the Hugging Face cache and says in our words what went wrong."""
    try:
        import huggingface_hub
        from huggingface_hub import errors
    except ImportError as error:
        raise ImportError(
            f"The file {hub_filename} of {hub_id} is on the Hugging Face hub, which needs the "
            f"package huggingface_hub: pip install keras-convnext[hub]. Or: {by_hand}"
        ) from error
    file = f"{hub_filename} of {hub_id}"
    try:
        return pathlib.Path(huggingface_hub.hf_hub_download(hub_id, hub_filename))
    except errors.LocalEntryNotFoundError as error:  # no answer; a FileNotFoundError, so first
        cause = error.__cause__ or error
        raise UnreachableError(
            f"The Hugging Face hub cannot be reached for {file}: {one_line(cause)}. Check the "
            f"network, the proxy, HF_ENDPOINT and HF_HUB_OFFLINE. Or: {by_hand}"
        ) from error
    except errors.HfHubHTTPError as error:
        status = error.response.status_code
        if isinstance(error, errors.GatedRepoError) or status in (401, 403):
            page = f"{_hub_endpoint()}/{hub_id}"
            if gated or isinstance(error, errors.GatedRepoError):
                advice = f"Accept the licence on {page}, then run `hf auth login`."
            else:
                advice = f"{page} does not exist or is private; if it is yours, run `hf auth login`."
            raise WeightsNotFoundError(
                f"The Hugging Face hub answered {status} (no access) for {file}. {advice} Or: {by_hand}"
            ) from error
        if status == 404:
            raise WeightsNotFoundError(
                f"The Hugging Face hub answered 404 (not found) for {file}: the repository or the "
                "file was moved or removed. A newer keras-convnext may know the new place. "
                f"Or: {by_hand}"
            ) from error
        raise UnreachableError(
            f"The Hugging Face hub answered {status} for {file}. Try again later. Or: {by_hand}"
        ) from error
    except Exception as error:  # its HTTP client and hf_xet have error classes of their own
        if isinstance(error, OSError) and error.errno is not None:
            folder = pathlib.Path(huggingface_hub.constants.HF_HUB_CACHE)
            raise disk_error(error, folder, None, "HF_HOME") from error
        raise UnreachableError(
            f"The Hugging Face hub did not deliver {file}: {one_line(error)}. Try again. Or: {by_hand}"
        ) from error


def _offline_variable(needs_hub: bool) -> str | None:
    """Returns the environment variable that forbids the download, if any."""
    if is_set("KERAS_CONVNEXT_OFFLINE"):
        return "KERAS_CONVNEXT_OFFLINE"
    values = ("1", "ON", "YES", "TRUE")  # those that huggingface_hub takes for true
    hub_is_offline = os.environ.get("HF_HUB_OFFLINE", "").upper() in values
    return "HF_HUB_OFFLINE" if needs_hub and hub_is_offline else None


def _hub_endpoint() -> str:
    return os.environ.get("HF_ENDPOINT", "https://huggingface.co").rstrip("/")


def _by_hand(tag: str, hub_id: str | None, hub_filename: str | None, url: str | None, gated: bool) -> str:
    """Says which address to open in a browser and under which name to keep the file."""
    address, name = url, f"{tag}.safetensors"
    licence = ""
    if url is not None:
        name = filename_of_url(url)
    elif hub_id is not None and hub_filename is not None:
        address = f"{_hub_endpoint()}/{hub_id}/resolve/main/{hub_filename}"
        name = f"{tag}{pathlib.PurePosixPath(hub_filename).suffix}"
        licence = " (after accepting its licence there)" if gated else ""
    get = "get the file" if address is None else f"get {address} with a browser{licence}"
    return f"{get}, save it as {name!r} in a folder, and set KERAS_CONVNEXT_WEIGHTS_DIR to that folder."
