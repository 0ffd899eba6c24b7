"""Brings published weights to this machine: from the Hugging Face Hub, else from a plain address.

`huggingface_hub` does all on the Hub: resuming, locks, hashes, its cache, tokens for gated files, and the
variables HF_HUB_OFFLINE, HF_ENDPOINT and HF_HOME. What it does not know, plain addresses, is done here.
"""

import concurrent.futures
import contextlib
import errno
import hashlib
import http.client
import json
import os
import pathlib
import re
import shutil
import threading
import time
import urllib.error
import urllib.request
import uuid
from collections.abc import Iterator
from typing import Any

from keras_convnext import _files
from keras_convnext._environment import is_set
from keras_convnext._messages import one_line, size_text
from keras_convnext._terminal import Progress, say
from keras_convnext.weights import locate
from keras_convnext.weights.locate import WeightsNotFoundError
from keras_convnext.weights.published import Checkpoint

RETRIES = 5
RETRY_WAIT_SECONDS = 0.5  # doubles with each retry, 15.5 s in all
TIMEOUT_SECONDS = 30.0  # to connect, and between two pieces of the body
CHUNK_BYTES = 1 << 18
MAX_BYTES = 1 << 34  # of a file whose length no server says
SPEED_SECONDS, LEAST_BYTES_A_SECOND = 60.0, 1000  # over which time a transfer must have been so fast

_TRANSIENT_STATUS = (408, 429, 500, 502, 503, 504)


class ChecksumError(ValueError):
    """The bytes of a weight file are not the expected ones; tells both hashes."""


class UnreachableError(WeightsNotFoundError):
    """No server answered, or only with an error of its own: another address may work."""


class ForbiddenError(WeightsNotFoundError):
    """The file is not here, and a variable forbids to get it."""


class NoSuchFileError(WeightsNotFoundError):
    """A repository on the Hub has no such file."""


class _InterruptedError(Exception):
    """A transfer that may succeed when tried again."""


def fetch(published: Checkpoint) -> pathlib.Path:
    """The path of a published weight file, which is downloaded when `locate.find_local` does not find it.

    It comes from the Hub, and from the plain address where the Hub or `huggingface_hub` is missing. A
    packaged file, one in our cache and one that has the name at its address are compared with the published
    SHA-256; without one, a file in our cache with what was recorded when it came.

    Raises an ImportError where the file is only on the Hub and `huggingface_hub` is not installed, a
    ChecksumError where it is not the expected one, a WeightsNotFoundError that tells what to do: offline, no
    permission, not there, no disk space.
    """
    cached = locate.cache_path(published)
    expected = published.sha256 or published.sha256_prefix or ""
    found = locate.find_local(published)
    if found is not None:
        if published.packaged is not None or (cached is not None and found.name == cached.name):
            _check(found, expected, is_recorded=found == cached)
        return found
    if is_set("KERAS_CONVNEXT_OFFLINE"):
        raise _forbidden("KERAS_CONVNEXT_OFFLINE", published)
    if published.hub_id is not None:
        try:
            return _from_hub(published)
        except (ImportError, UnreachableError):
            if published.url is None:
                raise
    if published.url is None or cached is None:
        raise WeightsNotFoundError(
            f"The weights {published.tag!r} have no published address: expected a hub_id or a url, "
            f"received None for both. Instead, {_by_hand(published)}"
        )
    return _from_address(published.url, cached, expected)


def _from_hub(published: Checkpoint) -> pathlib.Path:
    """Downloads into the Hugging Face cache and says in our words what went wrong."""
    file = f"{published.hub_filename} of {published.hub_id}"
    by_hand = _by_hand(published)
    try:
        import huggingface_hub
        from huggingface_hub import constants, errors
    except ImportError as error:
        raise ImportError(
            f"The file {file} is on the Hugging Face hub, which needs the "
            f"package huggingface_hub: pip install huggingface_hub. Or: {by_hand}"
        ) from error
    if constants.HF_HUB_OFFLINE:
        raise _forbidden("HF_HUB_OFFLINE", published)
    try:
        return pathlib.Path(huggingface_hub.hf_hub_download(published.hub_id, published.hub_filename))
    except errors.LocalEntryNotFoundError as error:  # no answer; a FileNotFoundError, so first
        raise UnreachableError(
            f"The Hugging Face hub cannot be reached for {file}: {one_line(error.__cause__ or error)}. "
            f"Check the network, the proxy and HF_ENDPOINT. Or: {by_hand}"
        ) from error
    except errors.HfHubHTTPError as error:
        status = error.response.status_code
        answer = f"The Hugging Face hub answered {status}"
        is_gated = isinstance(error, errors.GatedRepoError)
        if is_gated or status in (401, 403):
            page = f"{_hub_endpoint()}/{published.hub_id}"
            advice = f"{page} does not exist or is private; if it is yours, run `hf auth login`."
            if is_gated or published.gated:
                advice = f"Accept the licence on {page}, then run `hf auth login`."
            raise WeightsNotFoundError(f"{answer} (no access) for {file}. {advice} Or: {by_hand}") from error
        if status == 404:
            missing = (
                NoSuchFileError if isinstance(error, errors.EntryNotFoundError) else WeightsNotFoundError
            )
            raise missing(
                f"{answer} (not found) for {file}: the repository or the file was moved or removed. "
                f"A newer keras-convnext may know the new place. Or: {by_hand}"
            ) from error
        raise UnreachableError(f"{answer} for {file}. Try again later. Or: {by_hand}") from error
    except Exception as error:  # its HTTP client and hf_xet have error classes of their own
        if isinstance(error, OSError) and error.errno is not None:
            raise _disk_error(error, pathlib.Path(constants.HF_HUB_CACHE), "HF_HOME") from error
        raise UnreachableError(
            f"The Hugging Face hub did not deliver {file}: {one_line(error)}. Try again. Or: {by_hand}"
        ) from error


def _from_address(url: str, target: pathlib.Path, expected: str) -> pathlib.Path:
    """Downloads one file so that it is either complete under its final name or not there.

    The bytes go to "<target>.part"; a cut connection is resumed with a Range request, in this call and by
    the next one, where the validator in "<target>.part.json" (ETag or Last-Modified) still holds.
    "<target>.lock" makes other processes wait and then use the same file. Without an `expected` SHA-256, or
    first digits of it, that of the complete file is recorded in "<target>.sha256".
    """
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with _locked(target) as is_alone:
            if target.is_file():
                _check(target, expected, is_recorded=True)
                return target
            _files.check_target(target)
            # Without locks, a name of its own keeps two processes from mixing their bytes. Browsers name what
            # they download so too: such a part has no state.
            part = _beside(target, ".part")
            if not is_alone or (os.path.lexists(part) and not _beside(part, ".json").exists()):
                part = _beside(target, f".{uuid.uuid4().hex}.part")
            _receive_with_retries(url, part, is_hashed=bool(expected))
            advice = "Try again; if it fails again, the file on the server has changed."
            try:
                digest = _digest(part, expected, url, f"The download was removed. {advice}")
            except ChecksumError:
                _discard(part)
                raise
            if not expected:  # before the file itself: a file never lies next to the record of another one
                _record(target, digest)
            os.replace(part, target)
            _discard(part)
            _files.sync_folder(target.parent)
            return target
    except WeightsNotFoundError:
        raise
    except OSError as error:
        raise _disk_error(error, target.parent) from error


@contextlib.contextmanager
def _locked(target: pathlib.Path) -> Iterator[bool]:
    """Holds "<target>.lock"; gives False where the file system has no locks."""
    import filelock  # 0.04 s, for downloads only

    _files.check_target(f"{target}.lock")
    lock = filelock.FileLock(f"{target}.lock")
    try:
        try:
            lock.acquire(timeout=0)
        except filelock.Timeout:
            say(f"Waiting for another process that downloads {target.name}")
            lock.acquire()
    except OSError as error:
        if error.errno not in _files.LOCKS_UNSUPPORTED:
            raise
    try:
        yield lock.is_locked
    finally:
        lock.release()


def _check(path: pathlib.Path, expected: str, is_recorded: bool) -> None:
    """Compares a file with its published hash, else with the one recorded when it came; records a first."""
    if not expected and not is_recorded:
        return
    digest = _digest(path, expected, str(path), f"Delete {path} and call again to download it anew.")
    if expected:
        return
    record = _beside(path, ".sha256")
    recorded = record.read_text(encoding="utf-8").split()[:1] if record.is_file() else []
    if not recorded:
        with contextlib.suppress(OSError):  # the folder may be read-only
            _record(path, digest)
    elif recorded[0] != digest:
        raise ChecksumError(
            f"{path} has changed since it came to this machine: expected SHA-256 {recorded[0]} (recorded in "
            f"{record}), received {digest}. Delete {path} and {record}, and call again to download it anew."
        )


def _record(path: pathlib.Path, digest: str) -> None:
    """Records a hash in the format of `sha256sum --check`."""
    _files.replace_file(_beside(path, ".sha256"), f"{digest}  {path.name}\n".encode())


def _beside(path: pathlib.Path, ending: str) -> pathlib.Path:
    return path.with_name(path.name + ending)


def _receive_with_retries(url: str, part: pathlib.Path, *, is_hashed: bool) -> None:
    """Completes `part`, resuming after each cut; unless `is_hashed` its length or end must be told."""
    for attempt in range(RETRIES + 1):
        if attempt > 0:
            time.sleep(RETRY_WAIT_SECONDS * 2 ** (attempt - 1))
        try:
            return _receive(url, part, is_first=attempt == 0, is_hashed=is_hashed)
        except (UnreachableError, _InterruptedError) as error:
            if attempt == 0 and isinstance(error, UnreachableError):  # a network that is not there stays so
                raise
            failure: Exception = error
    kept = part.stat().st_size if part.exists() else 0
    raise UnreachableError(
        f"{failure} Gave up after {RETRIES} retries; {kept} bytes are kept and the next call "
        f"resumes there. {_use_own_copy(url)}"
    ) from failure


def _receive(url: str, part: pathlib.Path, *, is_first: bool, is_hashed: bool) -> None:
    """Makes one request for what `part` lacks and appends the answer to it."""
    state_path = _beside(part, ".json")
    validator = _read_validator(state_path, url)
    start = part.stat().st_size if validator and part.exists() else 0
    headers = {"User-Agent": "keras-convnext", "Accept-Encoding": "identity"}
    if start > 0:
        headers |= {"Range": f"bytes={start}-", "If-Range": validator}
    try:
        response = _opened(urllib.request.Request(url, headers=headers))
    except urllib.error.HTTPError as error:
        with error:
            if error.code == 416 and error.headers.get("Content-Range") == f"bytes */{start}":
                return  # every byte had arrived when the earlier call ended
            raise _refusal(error, url, part) from error
    except (OSError, http.client.HTTPException) as error:
        raise UnreachableError(
            f"{url} cannot be reached: {one_line(error)}. Check the network and the proxy (HTTPS_PROXY). "
            f"{_use_own_copy(url)}"
        ) from error
    with response:
        if url.startswith("https:") and not response.url.startswith("https:"):
            raise WeightsNotFoundError(
                f"{url} redirects to {response.url}: expected an https address. {_use_own_copy(url)}"
            )
        # What If-Range accepts: a strong ETag, else Last-Modified.
        tag = response.headers.get("ETag") or "W/"
        answered = response.headers.get("Last-Modified") if tag.startswith("W/") else tag
        encoding = response.headers.get("Content-Encoding", "identity")
        length = response.headers.get("Content-Length", "")
        if response.status in (200, 206) and (encoding != "identity" or length == "0"):
            raise _InterruptedError(
                f"{url} answered with the length {length or 'unknown'} in the encoding {encoding}: expected "
                "a file as it is."
            )
        if response.status == 206 and start > 0:
            content_range = response.headers.get("Content-Range", "")
            match = re.fullmatch(rf"bytes {start}-(\d+)/(\d+)", content_range)
            if not match or int(match[1]) + 1 != int(match[2]) or answered not in (None, validator):
                _discard(part)
                raise _InterruptedError(
                    f"{url} answered with Content-Range {content_range!r}: expected one from byte {start} of "
                    "the same file."
                )
            total: int | None = int(match[2])
        elif response.status == 200:
            total = int(length) if length.isdecimal() else None
            is_ended = total is not None or getattr(response, "chunked", False) or is_hashed
            if start > 0 and not is_ended:
                raise WeightsNotFoundError(
                    f"{url} does not say how long it is, so whether all of it came is not known. "
                    f"{_use_own_copy(url)}"
                )
            start = 0
            _discard(part)
            _files.replace_file(state_path, json.dumps({"url": url, "validator": answered}).encode())
        else:
            raise _InterruptedError(f"{url} answered {response.status}: expected 200.")
        if is_first:
            say(f"Downloading {url} ({'unknown size' if total is None else size_text(total)})")
        received = _append(response, part, start, total, url)
        if total is None and not is_ended:
            raise _InterruptedError(f"{url} does not say how long it is.")
    if total is not None and received < total:
        raise _InterruptedError(f"{url} ended early: expected {total} bytes, received {received}.")
    if total is not None and received > total:
        _discard(part)
        raise WeightsNotFoundError(
            f"{part} has {received} bytes: expected {total}. Another process writes to it, so locks do not "
            f"work in {part.parent}. Set KERAS_CONVNEXT_CACHE to a folder on a local disk."
        )


def _append(
    response: http.client.HTTPResponse, part: pathlib.Path, start: int, total: int | None, url: str
) -> int:
    """Writes the body of an answer from byte `start` on; returns the bytes in the file."""
    if total is not None and total - start > shutil.disk_usage(part.parent).free:
        no_space = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        raise _disk_error(no_space, part.parent, needed=total - start)
    received, then, limit = start, time.monotonic(), MAX_BYTES if total is None else total
    before = received
    try:
        with open(part, "ab") as file, Progress("Downloading", total, "MB") as progress:
            while True:
                try:
                    chunk = response.read1(CHUNK_BYTES)  # read() would hold back a slow piece
                except (OSError, http.client.HTTPException) as error:
                    raise _InterruptedError(
                        f"{url} was cut: expected {total} bytes, received {received} ({one_line(error)})."
                    ) from error
                if not chunk:
                    break
                file.write(chunk)
                received += len(chunk)
                progress.show(received)
                if received > limit:
                    _discard(part)
                    raise _InterruptedError(f"{url} sent more than {limit} bytes, which it announced.")
                if time.monotonic() - then > SPEED_SECONDS:
                    if received - before < SPEED_SECONDS * LEAST_BYTES_A_SECOND:
                        raise _InterruptedError(f"{url} sends less than {LEAST_BYTES_A_SECOND} bytes/s.")
                    then, before = time.monotonic(), received
            file.flush()
            os.fsync(file.fileno())
            return os.fstat(file.fileno()).st_size
    except OSError as error:
        if error.errno in _files.NO_SPACE:
            _discard(part)  # what was written is what fills the disk
        raise _disk_error(error, part.parent, needed=total) from error


def _opened(request: urllib.request.Request) -> Any:
    """Returns the answer to a request; its first lines may come more slowly than a socket's time-out sees."""
    answer: concurrent.futures.Future[Any] = concurrent.futures.Future()

    def ask() -> None:
        try:
            answer.set_result(urllib.request.urlopen(request, timeout=TIMEOUT_SECONDS))
        except Exception as error:
            answer.set_exception(error)

    threading.Thread(target=ask, daemon=True).start()
    return answer.result(4 * TIMEOUT_SECONDS)  # TimeoutError


def _refusal(error: urllib.error.HTTPError, url: str, part: pathlib.Path) -> Exception:
    """The error for a status that brings no bytes."""
    if error.code == 416:
        _discard(part)
        return _InterruptedError(f"{url} has no bytes after those received.")
    answer = f"{url} answered {error.code} ({' '.join(str(error.reason).split())})."
    if error.code in _TRANSIENT_STATUS:
        return _InterruptedError(answer)
    advice = "The server did not deliver the file: try again later."
    if error.code in (401, 403, 407, 451):
        advice = "The server refuses access: see whether a browser or another network gets the file."
    elif error.code in (404, 410):
        advice = "The file was moved or removed: a newer keras-convnext may know the new address."
    return WeightsNotFoundError(f"{answer} {advice} {_use_own_copy(url)}")


def _read_validator(state_path: pathlib.Path, url: str) -> str:
    """The validator stored with a part of the same address, "" for none."""
    try:
        state = json.loads(state_path.read_text(encoding="utf-8"))
        return state["validator"] or "" if state["url"] == url else ""
    except (FileNotFoundError, ValueError, KeyError, TypeError):
        return ""


def _discard(part: pathlib.Path) -> None:
    """Removes a part and what is stored with it."""
    part.unlink(missing_ok=True)
    _beside(part, ".json").unlink(missing_ok=True)


def _digest(path: pathlib.Path, expected: str, name: str, advice: str) -> str:
    """The SHA-256 of a file, an error with its name and advice unless it begins as `expected`."""
    with open(path, "rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if digest.startswith(expected.lower()):
        return digest
    shown = expected if len(expected) == 64 else f"{expected}..."
    raise ChecksumError(
        f"{name} is not the published file: expected SHA-256 {shown}, received {digest}. {advice}"
    )


def _forbidden(variable: str, published: Checkpoint) -> ForbiddenError:
    """The error for a file that is not here while a variable forbids to get it."""
    folders = os.environ.get("KERAS_CONVNEXT_WEIGHTS_DIR") or "not set"
    setting = f"{variable}={os.environ.get(variable, 1)}"
    return ForbiddenError(
        f"The weights {published.tag!r} are not on this machine, and {setting} forbids downloading them. "
        f"Looked in KERAS_CONVNEXT_WEIGHTS_DIR ({folders}) and in the cache {locate.cache_folder()}. "
        f"Unset {variable}, or: {_by_hand(published)}"
    )


def _by_hand(published: Checkpoint) -> str:
    """Says which address to open in a browser and under which name to keep the file."""
    get, name = "get the file", f"{published.tag}.safetensors"
    if published.url is not None:
        get, name = f"get {published.url} with a browser", locate.filename_of_url(published.url)
    elif published.hub_id is not None and published.hub_filename is not None:
        address = f"{_hub_endpoint()}/{published.hub_id}/resolve/main/{published.hub_filename}"
        get = f"get {address} with a browser{' (after accepting its licence there)' * published.gated}"
        name = f"{published.tag}{pathlib.PurePosixPath(published.hub_filename).suffix}"
    return f"{get}, save it as {name!r} in a folder, and set KERAS_CONVNEXT_WEIGHTS_DIR to that folder."


def _hub_endpoint() -> str:
    return os.environ.get("HF_ENDPOINT", "https://huggingface.co").rstrip("/")


def _use_own_copy(url: str) -> str:
    return (
        f"A copy from elsewhere is used when it is named {locate.filename_of_url(url)!r} and lies in the "
        "folder that KERAS_CONVNEXT_WEIGHTS_DIR names."
    )


def _disk_error(
    error: OSError, folder: pathlib.Path, variable: str = "KERAS_CONVNEXT_CACHE", needed: int | None = None
) -> WeightsNotFoundError:
    if_full = f"Free some, or set {variable} to a folder on another disk."
    if_refused = f"Make it writable, or set {variable} to a folder that is."
    text = _files.disk_error_text(error, folder, if_full, if_refused, needed)
    return WeightsNotFoundError(error.errno, text)
