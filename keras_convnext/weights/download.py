"""Downloads one weight file: resumed after a cut, locked against other processes, compared with its hash."""

import contextlib
import email.message
import errno
import hashlib
import http.client
import json
import os
import pathlib
import re
import shutil
import sys
import time
import urllib.error
import urllib.parse
import urllib.request
import uuid
from collections.abc import Callable, Iterator
from typing import BinaryIO

from keras_convnext._environment import is_set
from keras_convnext._files import LOCKS_UNSUPPORTED, NO_SPACE, sync_folder, try_lock

RETRIES = 5
RETRY_WAIT_SECONDS = 0.5  # doubles with each retry, 15.5 s in all
TIMEOUT_SECONDS = 30.0  # to connect, and between two pieces of the body
LOCK_POLL_SECONDS = 0.1
CHUNK_BYTES = 1 << 18

_TRANSIENT_STATUS = (408, 429, 500, 502, 503, 504)


class WeightsNotFoundError(OSError):
    """A weight file is not on this machine and could not be brought here.

    The message names what was tried and how to place the file by hand. `errno` is set when the
    disk is the reason.
    """


class ChecksumError(ValueError):
    """The bytes of a weight file are not the expected ones."""


class UnreachableError(WeightsNotFoundError):
    """No server answered, or only with an error of its own: another address may work."""


class _InterruptedError(Exception):
    """A transfer that may succeed when tried again."""


def download(
    url: str,
    destination: str | os.PathLike[str],
    *,
    sha256: str | None = None,
    sha256_prefix: str | None = None,
) -> pathlib.Path:
    """Downloads one file so that it is either complete under its final name or not there.

    `keras.utils.get_file` of Keras 3.15.1 is not used because it writes straight to the final name,
    restarts from zero after a cut and is not safe when two processes ask for the same file.

    The bytes go to "<destination>.part". A cut connection is resumed with a Range request, up to
    `RETRIES` times in one call, and by the next call after that; "<destination>.part.json" holds
    the validator (ETag or Last-Modified) which tells whether the file on the server is still the
    same. "<destination>.lock" makes other processes wait and then use the same file; the operating
    system releases it when its owner dies. Without a published hash, the SHA-256 of the complete
    file is recorded in "<destination>.sha256" for `verify`.

    Args:
        url: http or https address.
        destination: path of the file; missing folders are created. An existing file is verified
            and returned without asking the network.
        sha256: expected SHA-256 in hexadecimal, default None: not published.
        sha256_prefix: expected first digits of the SHA-256, default None.

    Returns:
        pathlib.Path of the complete file.

    Raises:
        ValueError: when `url` is not http or https.
        ChecksumError: when the complete file has another hash; the file is removed.
        UnreachableError: when no server answered, or the retries are spent.
        WeightsNotFoundError: when the server refuses or the disk fails.
    """
    destination = pathlib.Path(destination)
    filename_of_url(url)
    try:
        destination.parent.mkdir(parents=True, exist_ok=True)
        with _locked(destination) as is_alone:
            if destination.is_file():
                return verify(destination, sha256, sha256_prefix)
            # Without locks, a name of its own keeps two processes from mixing their bytes.
            owner = "" if is_alone else f".{uuid.uuid4().hex}"
            part = destination.with_name(f"{destination.name}{owner}.part")
            _receive_with_retries(url, part, destination.name)
            digest = file_digest(part)
            if not matches_hash(digest, sha256, sha256_prefix):
                _discard(part)
                raise ChecksumError(
                    f"{url} is not the published file: expected SHA-256 "
                    f"{_expected_text(sha256, sha256_prefix)}, received {digest}. The download was "
                    "removed. Try again; if it fails again, the file on the server has changed."
                )
            if sha256 is None and sha256_prefix is None:
                # Before the file itself: a file never lies next to the record of another one.
                _write_record(_record_path(destination), digest, destination.name)
            os.replace(part, destination)
            _discard(part)
            sync_folder(destination.parent)
            return destination
    except WeightsNotFoundError:
        raise
    except OSError as error:
        raise disk_error(error, destination.parent, None, "KERAS_CONVNEXT_CACHE") from error


def verify(
    path: str | os.PathLike[str], sha256: str | None = None, sha256_prefix: str | None = None
) -> pathlib.Path:
    """Checks that a weight file still has the expected bytes.

    Compares with the published hash if there is one. Else with the hash which the hub gave
    (the Hugging Face cache names large files by their SHA-256), else with the hash recorded at the
    first download or first use: next to a file as "<name>.sha256", and for the Hugging Face cache as
    "hub/<repository>/<commit>/<name>.sha256" in our cache folder, so that a new revision gets a
    record of its own. A missing record is written; where that is not permitted, nothing is.

    Args:
        path: existing file.
        sha256: published SHA-256 in hexadecimal, default None: not published.
        sha256_prefix: published first digits of the SHA-256, default None.

    Returns:
        `path` as pathlib.Path.

    Raises:
        ChecksumError: when the hashes differ; tells both and which file to delete.
    """
    path = pathlib.Path(path)
    if sha256 is not None or sha256_prefix is not None:
        check_published(path, sha256, sha256_prefix)
        return path
    digest = file_digest(path)
    hub_digest = _digest_from_hub(path)
    if hub_digest is not None:
        if digest != hub_digest:
            raise ChecksumError(
                f"{path} is damaged: expected SHA-256 {hub_digest} (given by the hub), received "
                f"{digest}. Delete {path.resolve()} and call again to download it anew."
            )
        return path
    record = _record_path(path)
    recorded = record.read_text(encoding="utf-8").split()[:1] if record.is_file() else []
    if not recorded:
        with contextlib.suppress(OSError):
            _write_record(record, digest, path.name)
    elif recorded[0] != digest:
        raise ChecksumError(
            f"{path} has changed since it came to this machine: expected SHA-256 {recorded[0]} "
            f"(recorded in {record}), received {digest}. Delete {path.resolve()} and {record}, "
            "and call again to download it anew."
        )
    return path


def cache_folder() -> pathlib.Path:
    """Returns the folder which keeps downloaded files; it need not exist.

    `KERAS_CONVNEXT_CACHE`, else "models/keras_convnext" in the Keras home: `KERAS_HOME`, else
    ".keras" in the home folder, else in "/tmp" when the home folder cannot be written, as in
    `keras.config`.

    Returns:
        pathlib.Path.
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


def check_published(path: pathlib.Path, sha256: str | None, sha256_prefix: str | None) -> None:
    """Compares a file with its published hash; without one there is nothing to compare."""
    if sha256 is None and sha256_prefix is None:
        return
    digest = file_digest(path)
    if not matches_hash(digest, sha256, sha256_prefix):
        raise ChecksumError(
            f"{path} is not the published file: expected SHA-256 "
            f"{_expected_text(sha256, sha256_prefix)}, received {digest}. Delete "
            f"{path.resolve()} and call again to download it anew."
        )


def _receive_with_retries(url: str, part: pathlib.Path, name: str) -> None:
    """Completes `part`, resuming after each cut until `RETRIES` are spent."""
    for attempt in range(RETRIES + 1):
        if attempt > 0:
            time.sleep(RETRY_WAIT_SECONDS * 2 ** (attempt - 1))
        try:
            _receive(url, part, name, is_first=attempt == 0)
            return
        except UnreachableError as error:
            if attempt == 0:  # a network that was never there does not come back in seconds
                raise
            failure: Exception = error
        except _InterruptedError as error:
            failure = error
    kept = part.stat().st_size if part.exists() else 0
    raise UnreachableError(
        f"{failure} Gave up after {RETRIES} retries; {kept} bytes are kept and the next call "
        f"resumes there. {_use_own_copy(name)}"
    ) from failure


def _receive(url: str, part: pathlib.Path, name: str, *, is_first: bool) -> None:
    """Makes one request for what `part` lacks and appends the answer to it."""
    state_path = part.with_name(f"{part.name}.json")
    validator = _read_validator(state_path, url)
    start = part.stat().st_size if validator is not None and part.exists() else 0
    headers = {"User-Agent": "keras-convnext", "Accept-Encoding": "identity"}
    if start > 0 and validator is not None:
        headers |= {"Range": f"bytes={start}-", "If-Range": validator}
    request = urllib.request.Request(url, headers=headers)
    try:
        response = urllib.request.urlopen(request, timeout=TIMEOUT_SECONDS)
    except urllib.error.HTTPError as error:
        with error:
            if error.code == 416 and start > 0:
                if error.headers.get("Content-Range") == f"bytes */{start}":
                    return  # every byte had arrived when the earlier call ended
                _discard(part)
                raise _InterruptedError(f"{url} has no bytes after {start}.") from error
            message = f"{url} answered {error.code} ({error.reason})."
            if error.code in _TRANSIENT_STATUS:
                raise _InterruptedError(message) from error
            raise WeightsNotFoundError(
                f"{message} {_status_advice(error.code)} {_use_own_copy(name)}"
            ) from error
    except (OSError, http.client.HTTPException) as error:
        raise UnreachableError(
            f"{url} cannot be reached: {one_line(error)}. Check the network and the proxy "
            f"(HTTPS_PROXY). {_use_own_copy(name)}"
        ) from error
    with response:
        if url.startswith("https:") and not response.url.startswith("https:"):
            raise WeightsNotFoundError(
                f"{url} redirects to {response.url}: expected an https address. {_use_own_copy(name)}"
            )
        answered = _validator(response.headers)
        if response.status == 206 and start > 0:
            total = _total_of_range(response.headers, start)
            if total is None or answered not in (None, validator):
                _discard(part)
                raise _InterruptedError(
                    f"{url} answered with Content-Range "
                    f"{response.headers.get('Content-Range')!r}: expected one from byte {start} of "
                    "the same file."
                )
        elif response.status == 200:
            start = 0
            _discard(part)
            length = response.headers.get("Content-Length")
            total = int(length) if length is not None else None
            _write_text(state_path, json.dumps({"url": url, "validator": answered}))
        else:
            raise _InterruptedError(f"{url} answered {response.status}: expected 200.")
        if is_first:
            _say(f"Downloading {url} ({_size_text(total)})")
        received = _append(response, part, start, total, url)
    if total is not None and received < total:
        raise _InterruptedError(f"{url} ended early: expected {total} bytes, received {received}.")
    if total is not None and received > total:
        _discard(part)
        raise WeightsNotFoundError(
            f"{part} has {received} bytes: expected {total}. Another process writes to it, so "
            f"locks do not work in {part.parent}. Set KERAS_CONVNEXT_CACHE to a folder on a local "
            "disk."
        )


def _append(
    response: http.client.HTTPResponse, part: pathlib.Path, start: int, total: int | None, url: str
) -> int:
    """Writes the body of an answer from byte `start` on; returns the bytes in the file."""
    if total is not None:
        free = shutil.disk_usage(part.parent).free
        if total - start > free:
            no_space = OSError(errno.ENOSPC, f"{_size_text(free)} are free")
            raise disk_error(no_space, part.parent, total - start, "KERAS_CONVNEXT_CACHE")
    received = start
    show = _progress(total)
    try:
        with open(part, "ab") as file:
            while True:
                try:
                    chunk = response.read1(CHUNK_BYTES)  # read() would hold back a slow piece
                except (OSError, http.client.HTTPException) as error:
                    raise _InterruptedError(
                        f"{url} was cut: expected {total} bytes, received {received} ({one_line(error)})."
                    ) from error
                if not chunk:
                    break
                _write(file, chunk)
                received += len(chunk)
                show(received)
            file.flush()
            os.fsync(file.fileno())
            return os.fstat(file.fileno()).st_size
    except OSError as error:
        if error.errno in NO_SPACE:
            _discard(part)  # what was written is what fills the disk
        raise disk_error(error, part.parent, total, "KERAS_CONVNEXT_CACHE") from error


def _write(file: BinaryIO, chunk: bytes) -> None:
    file.write(chunk)


@contextlib.contextmanager
def _locked(destination: pathlib.Path) -> Iterator[bool]:
    """Holds "<destination>.lock"; gives False where the file system has no locks.

    The lock file stays: removing it would let a process lock a file that others no longer see.
    """
    with open(destination.with_name(f"{destination.name}.lock"), "ab") as file:
        is_alone = True
        is_waiting = False
        try:
            while not try_lock(file):
                if not is_waiting:
                    _say(f"Waiting for another process that downloads {destination.name}")
                is_waiting = True
                time.sleep(LOCK_POLL_SECONDS)
        except OSError as error:
            if error.errno not in LOCKS_UNSUPPORTED:
                raise
            is_alone = False
        yield is_alone


def filename_of_url(url: str) -> str:
    """Returns the last part of an http or https address."""
    parts = urllib.parse.urlsplit(url)
    name = pathlib.PurePosixPath(parts.path).name
    if parts.scheme not in ("http", "https") or not parts.netloc or not name:
        raise ValueError(
            "The address of a weight file must be http or https and end in a file name, as in "
            f"'https://host/folder/file.pth'. Received: url={url!r}"
        )
    return name


def _validator(headers: email.message.Message) -> str | None:
    """Returns what If-Range accepts from an answer: a strong ETag, else Last-Modified."""
    entity_tag = headers.get("ETag")
    if entity_tag and not entity_tag.startswith("W/"):
        return entity_tag
    return headers.get("Last-Modified")


def _read_validator(state_path: pathlib.Path, url: str) -> str | None:
    """Returns the validator stored with a part of the same address, if any."""
    try:
        state = json.loads(state_path.read_text(encoding="utf-8"))
        return state["validator"] if state["url"] == url else None
    except (FileNotFoundError, ValueError, KeyError, TypeError):
        return None


def _total_of_range(headers: email.message.Message, start: int) -> int | None:
    """Returns the size of the whole file when an answer continues at `start`, else None."""
    match = re.fullmatch(r"bytes (\d+)-(\d+)/(\d+)", headers.get("Content-Range") or "")
    if match is None:
        return None
    first, last, total = map(int, match.groups())
    return total if first == start and last == total - 1 else None


def _discard(part: pathlib.Path) -> None:
    """Removes a part and what is stored with it."""
    part.unlink(missing_ok=True)
    part.with_name(f"{part.name}.json").unlink(missing_ok=True)


def file_digest(path: pathlib.Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def matches_hash(digest: str, sha256: str | None, sha256_prefix: str | None) -> bool:
    return (sha256 is None or digest == sha256.lower()) and (
        sha256_prefix is None or digest.startswith(sha256_prefix.lower())
    )


def _expected_text(sha256: str | None, sha256_prefix: str | None) -> str:
    return sha256 if sha256 is not None else f"{sha256_prefix}..."


def _hub_snapshot(path: pathlib.Path) -> tuple[str, str, str] | None:
    """Returns repository, commit and file of a path in a Hugging Face cache, else None."""
    match = re.search(r"/models--([^/]+)/snapshots/([^/]+)/(.+)$", path.absolute().as_posix())
    if match is None:
        return None
    return match[1].replace("--", "/", 1), match[2], match[3]


def _digest_from_hub(path: pathlib.Path) -> str | None:
    """Returns the SHA-256 which a Hugging Face cache uses as the name of a large file.

    Only the first link counts: `huggingface_hub` 2 can link further, to a file named by its Xet
    hash, which has as many digits.
    """
    if _hub_snapshot(path) is None or not path.is_symlink():
        return None
    blob = pathlib.Path(os.readlink(path)).name
    return blob if re.fullmatch("[0-9a-f]{64}", blob) else None


def _record_path(path: pathlib.Path) -> pathlib.Path:
    """Returns where the hash of a file without a published one is kept."""
    snapshot = _hub_snapshot(path)
    if snapshot is None:
        return path.with_name(f"{path.name}.sha256")
    repository, commit, filename = snapshot
    return cache_folder() / "hub" / repository / commit / f"{filename}.sha256"


def _write_record(record: pathlib.Path, digest: str, name: str) -> None:
    """Writes a record in the format of `sha256sum --check`."""
    record.parent.mkdir(parents=True, exist_ok=True)
    _write_text(record, f"{digest}  {name}\n")


def _write_text(path: pathlib.Path, text: str) -> None:
    """Replaces a small file at once, so that no process reads half of it."""
    temporary = path.with_name(f"{path.name}.{uuid.uuid4().hex}")
    try:
        temporary.write_text(text, encoding="utf-8")
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _use_own_copy(name: str) -> str:
    return (
        f"A copy from elsewhere is used when it is named {name!r} and lies in the folder that "
        "KERAS_CONVNEXT_WEIGHTS_DIR names."
    )


def _status_advice(status: int) -> str:
    if status in (401, 403, 407, 451):
        return "The server refuses access: see whether a browser or another network gets the file."
    if status in (404, 410):
        return "The file was moved or removed: a newer keras-convnext may know the new address."
    return "The server did not deliver the file: try again later."


def disk_error(
    error: OSError, folder: pathlib.Path, needed: int | None, variable: str
) -> WeightsNotFoundError:
    """Returns the error for a file that could not be written, which tells how to write it elsewhere."""
    reason = error.strerror or str(error)
    if error.errno in NO_SPACE:
        size = "The file" if needed is None else f"{_size_text(needed)} more"
        message = (
            f"No space in {folder} ({reason}): {size} must fit there. Free some, or set {variable} "
            "to a folder on another disk."
        )
    else:
        message = (
            f"The cache folder {folder} cannot be written ({reason}). Make it writable, or set "
            f"{variable} to a folder that is."
        )
    return WeightsNotFoundError(error.errno, message)


def one_line(error: BaseException) -> str:
    reason = getattr(error, "reason", None) or error
    return " ".join(f"{type(reason).__name__}: {reason}".split())


def _size_text(size: int | None) -> str:
    if size is None:
        return "unknown size"
    if size < 1000:
        return f"{size} bytes"
    if size < 1_000_000:
        return f"{size / 1000:.0f} kB"
    return f"{size / 1_000_000:.0f} MB"


def _say(line: str) -> None:
    if not is_set("KERAS_CONVNEXT_QUIET"):
        print(line, file=sys.stderr, flush=True)


def _progress(total: int | None) -> Callable[[int], None]:
    """Returns a function that shows the bytes received: the Keras bar on a terminal or in a notebook."""
    is_watched = sys.stdout.isatty() or "ipykernel" in sys.modules
    if is_set("KERAS_CONVNEXT_QUIET") or not is_watched:
        return lambda received: None
    import keras

    return keras.utils.Progbar(total, unit_name="byte").update
