"""Downloads against a real server on this machine which misbehaves on request."""

import contextlib
import dataclasses
import errno
import hashlib
import http.server
import io
import json
import os
import pathlib
import re
import socket
import subprocess
import sys
import threading
import time
import types
import urllib.request

import filelock
import pytest

from keras_convnext.weights import download, locate
from keras_convnext.weights.catalog import CHECKPOINTS

pytestmark = pytest.mark.once

ROOT = pathlib.Path(__file__).parents[2]
BODY = bytes(range(256)) * 1200  # 307,200 bytes, more than one chunk
OTHER_BODY = bytes(reversed(range(256))) * 1100
BODY_SHA256 = hashlib.sha256(BODY).hexdigest()
OTHER_SHA256 = hashlib.sha256(OTHER_BODY).hexdigest()
COMMIT = "0123456789abcdef0123456789abcdef01234567"
ROW = dataclasses.replace(
    CHECKPOINTS["convnext_tiny.torchvision_in1k"], tag="convnext_tiny", url=None, sha256_prefix=None
)

# With the entry module of the command: without it the package would load Keras in every child process.
CHILD = """
import json, sys
sys.path.insert(0, sys.argv[1])
import keras_convnext_main
from keras_convnext.weights import download
from keras_convnext.weights.published import Checkpoint
download.RETRY_WAIT_SECONDS = 0.01
if sys.argv[3] == "without_hub":
    sys.modules["huggingface_hub"] = None
try:
    path = download.fetch(Checkpoint(**json.loads(sys.argv[2])))
    print(json.dumps({"path": str(path)}))
except Exception as error:
    print(json.dumps({"error": type(error).__name__, "message": str(error)}))
"""


@dataclasses.dataclass
class Behaviour:
    """What the server does with the next requests, and what it has seen."""

    body: bytes = BODY
    etag: str | None = '"first"'
    status: int = 200
    error_code: str | None = None
    token: str | None = None
    commit: str = COMMIT
    cuts: list[int | None] = dataclasses.field(default_factory=list)
    always_cut: int | None = None
    honours_range: bool = True
    honours_if_range: bool = True
    content_length: str | None = None
    content_range: str | None = None
    headers: dict[str, str] = dataclasses.field(default_factory=dict)
    redirects: bool = False
    extra_length: int = 0
    piece_seconds: float = 0.0
    next_version: tuple[bytes, str] | None = None
    gate: threading.Event = dataclasses.field(default_factory=threading.Event)
    started: threading.Event = dataclasses.field(default_factory=threading.Event)
    requests: list[dict[str, str | None]] = dataclasses.field(default_factory=list)

    def gets(self):
        return [request for request in self.requests if request["method"] == "GET"]


class Handler(http.server.BaseHTTPRequestHandler):
    def log_message(self, *arguments):
        pass

    def do_HEAD(self):
        self.answer()

    def do_GET(self):
        self.answer()

    def answer(self):
        behaviour = self.server.behaviour
        behaviour.requests.append(
            {
                "method": self.command,
                "path": self.path,
                "range": self.headers["Range"],
                "if_range": self.headers["If-Range"],
            }
        )
        behaviour.started.set()
        behaviour.gate.wait(10)
        status, error_code = behaviour.status, behaviour.error_code
        if behaviour.redirects:
            self.send_response(302)
            self.send_header("Location", self.path)
            self.end_headers()
            return
        if behaviour.token and self.headers["Authorization"] != f"Bearer {behaviour.token}":
            status, error_code = 401, "GatedRepo"
        if status != 200:
            self.send_response(status)
            if error_code:
                self.send_header("X-Error-Code", error_code)
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        body, start = behaviour.body, 0
        if self.headers["Range"] and behaviour.honours_range:
            validator = self.headers["If-Range"]
            if validator in (None, behaviour.etag) or not behaviour.honours_if_range:
                start = int(re.fullmatch(r"bytes=(\d+)-", self.headers["Range"])[1])
        length = len(body) + behaviour.extra_length
        if start >= length:
            self.send_response(416)
            self.send_header("Content-Range", f"bytes */{length}")
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        self.send_response(206 if start else 200)
        if start:
            content_range = behaviour.content_range or f"bytes {start}-{length - 1}/{length}"
            self.send_header("Content-Range", content_range)
        self.send_header("Content-Length", behaviour.content_length or str(length - start))
        self.send_header("X-Repo-Commit", behaviour.commit)
        if behaviour.etag:
            self.send_header("ETag", behaviour.etag)
        for name, value in behaviour.headers.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "HEAD":
            return
        cut = behaviour.cuts.pop(0) if behaviour.cuts else behaviour.always_cut
        to_send = body[start:] if cut is None else body[start : start + cut]
        if cut is not None and behaviour.next_version:
            behaviour.body, behaviour.etag = behaviour.next_version
        with contextlib.suppress(ConnectionError):
            for position in range(0, len(to_send), 16384):
                self.wfile.write(to_send[position : position + 16384])
                time.sleep(behaviour.piece_seconds)


@pytest.fixture
def server():
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as running:
        running.behaviour = Behaviour()
        running.behaviour.gate.set()
        running.address = f"http://127.0.0.1:{running.server_port}"
        running.url = f"{running.address}/convnext/tiny_1k.pth"
        thread = threading.Thread(target=running.serve_forever, args=(0.02,), daemon=True)
        thread.start()
        yield running
        running.behaviour.gate.set()
        running.shutdown()
        thread.join()


@pytest.fixture(autouse=True)
def environment(tmp_path, monkeypatch):
    for name in list(os.environ):
        if name.startswith(("KERAS_", "HF_")) and name != "KERAS_BACKEND":
            monkeypatch.delenv(name)
    monkeypatch.setenv("KERAS_CONVNEXT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setattr(download, "RETRY_WAIT_SECONDS", 0.001)


def row(server=None, **changes):
    """What the catalog says of a file at the server's address, or of one without an address."""
    return dataclasses.replace(ROW, **{"url": None if server is None else server.url} | changes)


def start_child(published, mode="with_hub"):
    words = [str(ROOT), json.dumps(dataclasses.asdict(published)), mode]
    command = [sys.executable, "-c", CHILD, *words]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def run_child(published, mode="with_hub"):
    output, errors = start_child(published, mode).communicate(timeout=30)
    return json.loads(output), errors


def cached_file(tmp_path):
    return tmp_path / "cache" / "tiny_1k.pth"


def names_in_cache(tmp_path):
    folder = tmp_path / "cache"
    return sorted(path.name for path in folder.iterdir()) if folder.exists() else []


def test_download_places_file_and_record_and_leaves_no_part(server, tmp_path, capfd):
    path = download.fetch(row(server))
    assert path == cached_file(tmp_path)
    assert path.read_bytes() == BODY
    assert names_in_cache(tmp_path) == ["tiny_1k.pth", "tiny_1k.pth.lock", "tiny_1k.pth.sha256"]
    record = path.with_name("tiny_1k.pth.sha256")
    assert record.read_text() == f"{BODY_SHA256}  tiny_1k.pth\n"
    output = capfd.readouterr()
    assert output.out == ""
    assert output.err == f"Downloading {server.url} (307.2 kB)\n"


def test_second_call_uses_the_cache_without_a_request(server):
    assert download.fetch(row(server)) == download.fetch(row(server))
    assert len(server.behaviour.requests) == 1


def test_file_in_the_cache_is_verified_without_a_request(server, tmp_path):
    cached_file(tmp_path).parent.mkdir()
    cached_file(tmp_path).write_bytes(BODY)
    assert download.fetch(row(server, sha256=BODY_SHA256)) == cached_file(tmp_path)
    assert server.behaviour.requests == []
    with pytest.raises(download.ChecksumError, match=f"{OTHER_SHA256}, received {BODY_SHA256}"):
        download.fetch(row(server, sha256=OTHER_SHA256))


def test_quiet_prints_nothing(server, monkeypatch, capfd):
    monkeypatch.setenv("KERAS_CONVNEXT_QUIET", "1")
    download.fetch(row(server))
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("quiet", ["", "1"])
def test_terminal_shows_a_bar_unless_quiet(server, monkeypatch, quiet):
    monkeypatch.setenv("KERAS_CONVNEXT_QUIET", quiet)
    server.behaviour.body = bytes(3_000_000)
    terminal = io.StringIO()
    terminal.isatty = lambda: True
    monkeypatch.setattr(sys, "stderr", terminal)
    download.fetch(row(server))
    if quiet:
        assert terminal.getvalue() == ""
    else:
        shown = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", terminal.getvalue())
        assert re.search(r"[━╸╺]{20} Downloading, [0-3]/3 MB", shown)


def test_cut_connection_is_resumed_with_a_range_request(server):
    server.behaviour.cuts = [100_000]
    path = download.fetch(row(server, sha256=BODY_SHA256))
    assert path.read_bytes() == BODY
    first, second = server.behaviour.gets()
    assert first["range"] is None
    assert second["range"] == "bytes=100000-"
    assert second["if_range"] == '"first"'


def test_connection_that_is_always_cut_gives_up_and_next_call_resumes(server, tmp_path):
    server.behaviour.always_cut = 1000
    with pytest.raises(download.WeightsNotFoundError) as failure:
        download.fetch(row(server))
    assert str(failure.value) == (
        f"{server.url} ended early: expected 307200 bytes, received 6000. Gave up after 5 retries; "
        "6000 bytes are kept and the next call resumes there. A copy from elsewhere is used when "
        "it is named 'tiny_1k.pth' and lies in the folder that KERAS_CONVNEXT_WEIGHTS_DIR names."
    )
    assert len(server.behaviour.gets()) == download.RETRIES + 1
    assert not cached_file(tmp_path).exists()
    server.behaviour.always_cut = None
    assert download.fetch(row(server)).read_bytes() == BODY
    assert server.behaviour.gets()[-1]["range"] == "bytes=6000-"


def test_a_length_that_is_no_number_is_an_unknown_length(server):
    server.behaviour.content_length = "many"
    assert download.fetch(row(server)).read_bytes() == BODY


def test_a_cut_without_a_length_is_not_taken_for_the_end(server, tmp_path):
    server.behaviour.content_length = "many"
    server.behaviour.cuts = [100_000]
    assert download.fetch(row(server)).read_bytes() == BODY
    assert [request["range"] for request in server.behaviour.gets()] == [None, "bytes=100000-"]
    cached_file(tmp_path).unlink()
    server.behaviour.cuts, server.behaviour.honours_range = [100_000], False
    with pytest.raises(download.WeightsNotFoundError, match="does not say how long it is, so whether all"):
        download.fetch(row(server))
    assert not cached_file(tmp_path).exists()
    # A published hash tells it too.
    server.behaviour.cuts = [100_000] * 9  # also where a cut arrives as a reset, after which it asks again
    with pytest.raises((download.ChecksumError, download.UnreachableError)):
        download.fetch(row(server, sha256=BODY_SHA256))
    server.behaviour.cuts = []
    assert download.fetch(row(server, sha256=BODY_SHA256)).read_bytes() == BODY


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"headers": {"Content-Encoding": "gzip"}},
            "answered with the length 307200 in the encoding gzip: expected a file",
        ),
        ({"content_length": "0"}, "answered with the length 0 in the encoding identity: expected a file"),
        ({"redirects": True}, r"answered 302 \(The HTTP server returned a redirect error .* Found\)"),
    ],
)
def test_an_answer_that_is_not_the_file_is_named(changes, message, server, tmp_path):
    server.behaviour = dataclasses.replace(server.behaviour, **changes)
    with pytest.raises(download.WeightsNotFoundError, match=message) as raised:
        download.fetch(row(server))
    assert "\n" not in str(raised.value)
    assert not cached_file(tmp_path).exists()


def test_a_body_without_end_and_a_slow_one_are_given_up(server, tmp_path, monkeypatch):
    server.behaviour.content_length = "many"
    monkeypatch.setattr(download, "MAX_BYTES", 100_000)
    with pytest.raises(download.UnreachableError, match="sent more than 100000 bytes"):
        download.fetch(row(server))
    assert names_in_cache(tmp_path) == ["tiny_1k.pth.lock"]
    server.behaviour.content_length = None
    server.behaviour.piece_seconds = 0.01
    monkeypatch.setattr(download, "RETRIES", 1)
    monkeypatch.setattr(download, "SPEED_SECONDS", 0.02)
    monkeypatch.setattr(download, "LEAST_BYTES_A_SECOND", 10**9)
    with pytest.raises(download.UnreachableError, match="sends less than 1000000000 bytes/s"):
        download.fetch(row(server))


def test_a_status_line_that_comes_slowly_is_given_up(tmp_path, monkeypatch):
    """Each byte comes within the time-out of the socket."""
    monkeypatch.setattr(download, "TIMEOUT_SECONDS", 0.1)
    with socket.create_server(("127.0.0.1", 0)) as server:

        def drip():
            call, _ = server.accept()
            with contextlib.suppress(OSError), call:
                for letter in b"HTTP/1.0 200 OK" * 20:
                    call.send(bytes([letter]))
                    time.sleep(0.05)

        threading.Thread(target=drip, daemon=True).start()
        with pytest.raises(download.UnreachableError, match="cannot be reached: TimeoutError"):
            download.fetch(row(url=f"http://127.0.0.1:{server.getsockname()[1]}/tiny_1k.pth"))


def test_a_part_of_another_program_stays(server, tmp_path):
    """A browser names what it downloads so."""
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache" / "tiny_1k.pth.part").write_bytes(b"of a browser")
    assert download.fetch(row(server)).read_bytes() == BODY
    assert (tmp_path / "cache" / "tiny_1k.pth.part").read_bytes() == b"of a browser"
    assert len(names_in_cache(tmp_path)) == 4
    cached_file(tmp_path).unlink()
    (tmp_path / "cache" / "tiny_1k.pth").symlink_to(tmp_path / "nowhere")
    with pytest.raises(download.WeightsNotFoundError, match="a link to"):
        download.fetch(row(server))


def test_server_without_ranges_restarts_from_zero(server):
    server.behaviour.honours_range = False
    server.behaviour.cuts = [100_000]
    assert download.fetch(row(server)).read_bytes() == BODY
    assert server.behaviour.gets()[1]["range"] == "bytes=100000-"


def test_server_without_validators_is_never_resumed(server):
    server.behaviour.etag = None
    server.behaviour.cuts = [100_000]
    assert download.fetch(row(server)).read_bytes() == BODY
    assert [request["range"] for request in server.behaviour.gets()] == [None, None]


@pytest.mark.parametrize("honours_if_range", [True, False])
def test_file_that_changed_between_attempts_restarts(server, honours_if_range):
    server.behaviour.honours_if_range = honours_if_range
    server.behaviour.cuts = [100_000]
    server.behaviour.next_version = (OTHER_BODY, '"second"')
    path = download.fetch(row(server))
    assert path.read_bytes() == OTHER_BODY
    assert path.with_name("tiny_1k.pth.sha256").read_text().startswith(OTHER_SHA256)
    assert server.behaviour.gets()[1]["if_range"] == '"first"'


def test_wrong_content_range_restarts(server):
    server.behaviour.cuts = [100_000]
    server.behaviour.content_range = "bytes 5-307199/307200"
    assert download.fetch(row(server)).read_bytes() == BODY
    assert [request["range"] for request in server.behaviour.gets()] == [
        None,
        "bytes=100000-",
        None,
    ]


def test_complete_part_is_placed_without_its_bytes_again(server, tmp_path):
    server.behaviour.always_cut = 1000
    with pytest.raises(download.WeightsNotFoundError):
        download.fetch(row(server))
    (tmp_path / "cache" / "tiny_1k.pth.part").write_bytes(BODY)
    assert download.fetch(row(server, sha256=BODY_SHA256)).read_bytes() == BODY
    assert server.behaviour.gets()[-1]["range"] == "bytes=307200-"


def test_part_of_another_address_is_not_resumed(server, tmp_path):
    server.behaviour.always_cut = 1000
    with pytest.raises(download.WeightsNotFoundError):
        download.fetch(row(url=f"{server.address}/other/tiny_1k.pth"))
    server.behaviour.always_cut = None
    assert download.fetch(row(server)).read_bytes() == BODY
    assert server.behaviour.gets()[-1]["range"] is None


def test_length_larger_than_the_body_is_an_error(server, tmp_path):
    server.behaviour.extra_length = 10
    with pytest.raises(
        download.WeightsNotFoundError,
        match=r"ended early: expected 307210 bytes, received 307200\. Gave up after 5 retries",
    ):
        download.fetch(row(server))
    assert not cached_file(tmp_path).exists()


def test_two_processes_download_once_and_both_get_the_file(server, tmp_path):
    server.behaviour.gate.clear()
    first = start_child(row(server))
    assert server.behaviour.started.wait(10)
    second = start_child(row(server))
    assert second.stderr.readline() == ("Waiting for another process that downloads tiny_1k.pth\n")
    server.behaviour.gate.set()
    results = [json.loads(child.communicate(timeout=10)[0]) for child in (first, second)]
    assert results == [{"path": str(cached_file(tmp_path))}] * 2
    assert cached_file(tmp_path).read_bytes() == BODY
    assert len(server.behaviour.gets()) == 1


@pytest.mark.skipif(sys.platform == "win32", reason="SIGKILL")
def test_killed_process_leaves_no_file_and_next_call_resumes(server, tmp_path):
    server.behaviour.piece_seconds = 0.05
    child = start_child(row(server))
    part = tmp_path / "cache" / "tiny_1k.pth.part"
    deadline = time.monotonic() + 10
    while not (part.exists() and part.stat().st_size > 0) and time.monotonic() < deadline:
        time.sleep(0.01)
    child.kill()
    child.communicate()
    kept = part.stat().st_size
    assert 0 < kept < len(BODY)
    assert not cached_file(tmp_path).exists()
    server.behaviour.piece_seconds = 0.0
    assert download.fetch(row(server)).read_bytes() == BODY
    assert server.behaviour.gets()[-1]["range"] == f"bytes={kept}-"


def test_file_system_without_locks_uses_a_part_of_its_own(server, tmp_path, monkeypatch):
    def no_locks(self, timeout=None):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(filelock.FileLock, "acquire", no_locks)
    server.behaviour.always_cut = 1000
    with pytest.raises(download.WeightsNotFoundError):
        download.fetch(row(server))
    server.behaviour.always_cut = None
    assert download.fetch(row(server)).read_bytes() == BODY
    parts = [name for name in names_in_cache(tmp_path) if name.endswith(".part")]
    assert len(parts) == 1 and parts != ["tiny_1k.pth.part"]


def test_locks_that_do_not_exclude_are_noticed_by_the_size(server, tmp_path, monkeypatch):
    def another_process_writes_too(progress, received):
        if received == len(BODY):
            with open(tmp_path / "cache" / "tiny_1k.pth.part", "ab") as file:
                file.write(BODY)

    monkeypatch.setattr(download.Progress, "show", another_process_writes_too)
    with pytest.raises(
        download.WeightsNotFoundError,
        match=r"has 614400 bytes: expected 307200\. Another process writes to it",
    ):
        download.fetch(row(server))
    assert names_in_cache(tmp_path) == ["tiny_1k.pth.lock"]


@pytest.mark.parametrize(
    ("hashes", "expected"),
    [
        ({"sha256": OTHER_SHA256}, OTHER_SHA256),
        ({"sha256_prefix": OTHER_SHA256[:8]}, f"{OTHER_SHA256[:8]}..."),
    ],
)
def test_wrong_hash_names_both_and_leaves_nothing(server, tmp_path, hashes, expected):
    with pytest.raises(download.ChecksumError) as failure:
        download.fetch(row(server, **hashes))
    assert str(failure.value) == (
        f"{server.url} is not the published file: expected SHA-256 {expected}, received "
        f"{BODY_SHA256}. The download was removed. Try again; if it fails again, the file on the "
        "server has changed."
    )
    assert names_in_cache(tmp_path) == ["tiny_1k.pth.lock"]


@pytest.mark.parametrize("hashes", [{"sha256": BODY_SHA256.upper()}, {"sha256_prefix": BODY_SHA256[:8]}])
def test_published_hash_detects_a_file_damaged_in_the_cache(server, tmp_path, hashes):
    path = download.fetch(row(server, **hashes))
    assert names_in_cache(tmp_path) == ["tiny_1k.pth", "tiny_1k.pth.lock"]
    path.write_bytes(OTHER_BODY)
    with pytest.raises(
        download.ChecksumError,
        match=rf"received {OTHER_SHA256}\. Delete {re.escape(str(path))} and call again",
    ):
        download.fetch(row(server, **hashes))


def test_recorded_hash_detects_a_file_damaged_in_the_cache(server, tmp_path):
    path = download.fetch(row(server))
    path.write_bytes(OTHER_BODY)
    record = path.with_name("tiny_1k.pth.sha256")
    with pytest.raises(download.ChecksumError) as failure:
        download.fetch(row(server))
    assert str(failure.value) == (
        f"{path} has changed since it came to this machine: expected SHA-256 {BODY_SHA256} "
        f"(recorded in {record}), received {OTHER_SHA256}. Delete {path} and {record}, and call "
        "again to download it anew."
    )
    path.unlink()
    record.unlink()
    assert download.fetch(row(server)).read_bytes() == BODY


def test_hash_of_a_file_without_a_record_is_recorded_at_first_use(server, tmp_path):
    path = cached_file(tmp_path)
    path.parent.mkdir()
    path.write_bytes(BODY)
    assert download.fetch(row(server)) == path
    assert (tmp_path / "cache" / "tiny_1k.pth.sha256").read_text().split() == [BODY_SHA256, "tiny_1k.pth"]
    path.write_bytes(OTHER_BODY)
    with pytest.raises(download.ChecksumError, match=f"{BODY_SHA256} .*received {OTHER_SHA256}"):
        download.fetch(row(server))


@pytest.mark.parametrize(
    ("status", "reason", "advice"),
    [
        (404, "Not Found", "The file was moved or removed: a newer keras-convnext may know"),
        (403, "Forbidden", "The server refuses access: see whether a browser or another network"),
        (501, "Not Implemented", "The server did not deliver the file: try again later."),
    ],
)
def test_refusal_names_url_status_and_advice(server, tmp_path, status, reason, advice):
    server.behaviour.status = status
    with pytest.raises(download.WeightsNotFoundError) as failure:
        download.fetch(row(server))
    message = str(failure.value)
    assert message.startswith(f"{server.url} answered {status} ({reason}). {advice}")
    assert "named 'tiny_1k.pth' and lies in the folder that KERAS_CONVNEXT_WEIGHTS_DIR" in message
    assert len(server.behaviour.gets()) == 1
    assert not cached_file(tmp_path).exists()


def test_server_error_is_retried_and_then_named(server):
    server.behaviour.status = 500
    with pytest.raises(
        download.WeightsNotFoundError,
        match=r"tiny_1k\.pth answered 500 \(Internal Server Error\)\. Gave up after 5 retries; 0 b",
    ):
        download.fetch(row(server))
    assert len(server.behaviour.gets()) == download.RETRIES + 1


def test_status_without_a_file_is_named(server):
    server.behaviour.status = 204
    with pytest.raises(download.UnreachableError, match=r"answered 204: expected 200\. Gave up"):
        download.fetch(row(server))


def test_redirect_from_https_to_http_is_refused(server, monkeypatch):
    real_urlopen = urllib.request.urlopen
    monkeypatch.setattr(urllib.request, "urlopen", lambda request, timeout: real_urlopen(server.url))
    url = "https://127.0.0.1/convnext/tiny_1k.pth"
    with pytest.raises(
        download.WeightsNotFoundError,
        match=rf"{url} redirects to {server.url}: expected an https address",
    ):
        download.fetch(row(url=url))


def test_server_that_stays_silent_is_a_timeout(server, monkeypatch):
    monkeypatch.setattr(download, "TIMEOUT_SECONDS", 0.1)
    server.behaviour.gate.clear()
    with pytest.raises(
        download.WeightsNotFoundError,
        match=r"tiny_1k\.pth cannot be reached: TimeoutError: timed out\. Check the network",
    ):
        download.fetch(row(server))


def test_address_without_a_server_is_named():
    url = "http://127.0.0.1:9/convnext/tiny_1k.pth"
    with pytest.raises(
        download.UnreachableError,
        match=rf"{url} cannot be reached: ConnectionRefusedError: .*HTTPS_PROXY",
    ) as failure:
        download.fetch(row(url=url))
    assert "Gave up after" not in str(failure.value)


def test_host_without_an_address_is_named(monkeypatch):
    url = "http://weights.invalid/convnext/tiny_1k.pth"
    monkeypatch.setenv("NO_PROXY", "weights.invalid")

    def no_such_host(*arguments, **keywords):
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", no_such_host)
    with pytest.raises(
        download.WeightsNotFoundError, match=rf"{url} cannot be reached: gaierror: .*not known"
    ):
        download.fetch(row(url=url))


def test_no_address_at_all_says_where_to_put_the_file():
    with pytest.raises(
        download.WeightsNotFoundError,
        match=r"'convnext_tiny' have no published address: expected a hub_id or a url, received "
        r"None for both\. Instead, get the file, save it as 'convnext_tiny\.safetensors'",
    ):
        download.fetch(row())


def test_cache_that_cannot_be_made_names_the_variable(server, tmp_path, monkeypatch):
    (tmp_path / "a_file").write_text("")
    folder = tmp_path / "a_file" / "cache"
    monkeypatch.setenv("KERAS_CONVNEXT_CACHE", str(folder))
    with pytest.raises(download.WeightsNotFoundError) as failure:
        download.fetch(row(server))
    assert str(failure.value) == (
        f"[Errno {errno.ENOTDIR}] '{folder}' cannot be written (Not a directory). "
        "Make it writable, or set KERAS_CONVNEXT_CACHE to a folder that is."
    )
    assert failure.value.errno == errno.ENOTDIR
    assert server.behaviour.requests == []


def test_read_only_cache_names_the_variable(server, tmp_path):
    folder = tmp_path / "cache"
    folder.mkdir(mode=0o500)
    if os.access(folder, os.W_OK):
        pytest.skip("this user can write everywhere")
    with pytest.raises(
        download.WeightsNotFoundError,
        match=rf"'{folder}' cannot be written \(Permission denied\)\. .*set KERAS_CONVNEXT_CACHE",
    ):
        download.fetch(row(server))


def test_full_disk_names_the_size_and_frees_the_part(server, tmp_path, monkeypatch):
    def no_space(progress, received):  # as the write in front of it
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(download.Progress, "show", no_space)
    with pytest.raises(download.WeightsNotFoundError) as failure:
        download.fetch(row(server))
    message = str(failure.value)
    assert message.startswith(
        f"[Errno {errno.ENOSPC}] No space at '{tmp_path / 'cache'}' (No space left on device): "
        "expected 307.2 kB free, received "
    )
    assert message.endswith("Free some, or set KERAS_CONVNEXT_CACHE to a folder on another disk.")
    assert names_in_cache(tmp_path) == ["tiny_1k.pth.lock"]


def test_file_larger_than_the_free_space_is_refused_before_it_is_fetched(server, tmp_path, monkeypatch):
    monkeypatch.setattr(download.shutil, "disk_usage", lambda folder: types.SimpleNamespace(free=2000))
    expected = (
        "expected 307.2 kB free, received 2.0 kB, 305.2 kB are missing. Free some, or set KERAS_CONVNEXT"
    )
    with pytest.raises(download.WeightsNotFoundError, match=expected):
        download.fetch(row(server))
    assert not (tmp_path / "cache" / "tiny_1k.pth.part").exists()


@pytest.mark.parametrize(
    "name",
    [
        "convnext_tiny.safetensors",
        "convnext_tiny.pth",
        "convnext_tiny.pt",
        "convnext_tiny.bin",
        "convnext_tiny.h5",
        "convnext_tiny.weights.h5",
        "convnext_tiny.keras",
        "tiny_1k.pth",
        "convnext/weights/model.safetensors",
    ],
)
def test_weights_folder_comes_first(server, tmp_path, monkeypatch, name):
    folders = [tmp_path / "empty", tmp_path / "placed"]
    path = folders[1] / name
    path.parent.mkdir(parents=True)
    folders[0].mkdir()
    path.write_bytes(BODY)
    monkeypatch.setenv("KERAS_CONVNEXT_WEIGHTS_DIR", os.pathsep.join(map(str, folders)))
    hub = {"hub_id": "owner/convnext", "hub_filename": "weights/model.safetensors"}
    assert download.fetch(row(server, **hub)) == path
    assert server.behaviour.requests == []


def test_names_of_the_tag_come_before_the_published_names(server, tmp_path, monkeypatch):
    monkeypatch.setenv("KERAS_CONVNEXT_WEIGHTS_DIR", str(tmp_path))
    for name in ("tiny_1k.pth", "convnext_tiny.h5", "convnext_tiny.safetensors"):
        (tmp_path / name).write_bytes(BODY)
        assert download.fetch(row(server)).name == name


def test_only_a_placed_file_with_the_published_name_is_compared(server, tmp_path, monkeypatch):
    monkeypatch.setenv("KERAS_CONVNEXT_WEIGHTS_DIR", str(tmp_path))
    published = tmp_path / "tiny_1k.pth"
    published.write_bytes(OTHER_BODY)
    with pytest.raises(
        download.ChecksumError,
        match=rf"tiny_1k\.pth is not .* expected SHA-256 {BODY_SHA256}, received {OTHER_SHA256}",
    ):
        download.fetch(row(server, sha256=BODY_SHA256))
    converted = tmp_path / "convnext_tiny.safetensors"
    converted.write_bytes(OTHER_BODY)
    assert download.fetch(row(server, sha256=BODY_SHA256)) == converted
    assert list(tmp_path.glob("*.sha256")) == []


def test_missing_weights_folder_is_named(server, tmp_path, monkeypatch):
    missing = tmp_path / "missing"
    monkeypatch.setenv("KERAS_CONVNEXT_WEIGHTS_DIR", str(missing))
    with pytest.raises(download.WeightsNotFoundError) as failure:
        download.fetch(row(server))
    assert str(failure.value) == (
        f"KERAS_CONVNEXT_WEIGHTS_DIR names '{missing}', which is not a folder: expected readable "
        f"folders separated by '{os.pathsep}', received '{missing}'. Create the folder, correct "
        "the variable or unset it."
    )
    assert server.behaviour.requests == []


def test_unreadable_weights_folder_is_named(tmp_path, monkeypatch):
    monkeypatch.setenv("KERAS_CONVNEXT_WEIGHTS_DIR", str(tmp_path))
    monkeypatch.setattr(locate.os, "access", lambda path, mode: False)
    with pytest.raises(download.WeightsNotFoundError, match=f"'{tmp_path}', which cannot be read"):
        download.fetch(row())


def test_git_lfs_pointer_is_not_taken_for_weights(server, tmp_path, monkeypatch):
    monkeypatch.setenv("KERAS_CONVNEXT_WEIGHTS_DIR", str(tmp_path))
    pointer = tmp_path / "convnext_tiny.safetensors"
    pointer.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n")
    with pytest.raises(
        download.WeightsNotFoundError,
        match=r"convnext_tiny\.safetensors is a Git LFS pointer of 63 bytes: .*git lfs pull",
    ):
        download.fetch(row(server))


@pytest.mark.parametrize("value", ["1", "true", "YES"])
def test_offline_switch_says_how_to_place_the_file(server, tmp_path, monkeypatch, value):
    monkeypatch.setenv("KERAS_CONVNEXT_OFFLINE", value)
    with pytest.raises(download.WeightsNotFoundError) as failure:
        download.fetch(row(server))
    assert str(failure.value) == (
        f"The weights 'convnext_tiny' are not on this machine, and KERAS_CONVNEXT_OFFLINE={value} "
        "forbids downloading them. Looked in KERAS_CONVNEXT_WEIGHTS_DIR (not set) and in the cache "
        f"{tmp_path / 'cache'}. Unset KERAS_CONVNEXT_OFFLINE, or: get {server.url} with a browser, "
        "save it as 'tiny_1k.pth' in a folder, and set KERAS_CONVNEXT_WEIGHTS_DIR to that folder."
    )
    assert server.behaviour.requests == []


def test_offline_switch_still_uses_the_cache(server, monkeypatch):
    path = download.fetch(row(server))
    monkeypatch.setenv("KERAS_CONVNEXT_OFFLINE", "1")
    assert download.fetch(row(server)) == path


def test_hub_offline_switch_applies_to_hub_files_only(server, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("KERAS_CONVNEXT_WEIGHTS_DIR", str(tmp_path))
    hub = {"hub_id": "owner/convnext-nowhere", "hub_filename": "model.safetensors", "gated": True}
    monkeypatch.setenv("HF_HOME", str(tmp_path / "huggingface"))
    result, _ = run_child(row(**hub))
    assert (result["error"], result["message"]) == (
        "ForbiddenError",
        "The weights 'convnext_tiny' are not on this machine, and HF_HUB_OFFLINE=1 forbids "
        f"downloading them. Looked in KERAS_CONVNEXT_WEIGHTS_DIR ({tmp_path}) and in the cache "
        f"{tmp_path / 'cache'}. Unset HF_HUB_OFFLINE, or: get https://huggingface.co/owner/"
        "convnext-nowhere/resolve/main/model.safetensors with a browser (after accepting its "
        "licence there), save it as 'convnext_tiny.safetensors' in a folder, and set "
        "KERAS_CONVNEXT_WEIGHTS_DIR to that folder.",
    )
    assert run_child(row(server, **hub))[0]["error"] == "ForbiddenError"
    assert server.behaviour.requests == []
    assert download.fetch(row(server)).read_bytes() == BODY


def test_cache_folder_follows_the_keras_home(tmp_path, monkeypatch):
    assert locate.cache_folder() == tmp_path / "cache"
    monkeypatch.delenv("KERAS_CONVNEXT_CACHE")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    assert locate.cache_folder() == tmp_path / ".keras" / "models" / "keras_convnext"
    monkeypatch.setenv("KERAS_HOME", str(tmp_path / "home"))
    assert locate.cache_folder() == tmp_path / "home" / "models" / "keras_convnext"


HUB = {"hub_id": "owner/convnext", "hub_filename": "model.safetensors"}


@pytest.fixture
def hub(server, tmp_path, monkeypatch):
    """The server as a Hugging Face endpoint, for children: HF_ENDPOINT is read at import."""
    server.behaviour.etag = f'"{BODY_SHA256}"'
    monkeypatch.setenv("HF_ENDPOINT", server.address)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "huggingface"))
    monkeypatch.setenv("HF_HUB_DISABLE_XET", "1")
    monkeypatch.setenv("HF_HUB_DISABLE_TELEMETRY", "1")
    monkeypatch.setenv("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    return server


def test_hub_file_is_downloaded_once_and_used_offline(hub, tmp_path, monkeypatch):
    result, _ = run_child(row(**HUB))
    path = pathlib.Path(result["path"])
    assert path.read_bytes() == BODY
    assert path.is_relative_to(tmp_path / "huggingface")
    assert [(request["method"], request["path"]) for request in hub.behaviour.requests] == [
        ("HEAD", "/owner/convnext/resolve/main/model.safetensors"),
        ("GET", "/owner/convnext/resolve/main/model.safetensors"),
    ]
    monkeypatch.setenv("KERAS_CONVNEXT_OFFLINE", "1")
    assert run_child(row(**HUB))[0] == {"path": str(path)}
    assert len(hub.behaviour.requests) == 2
    assert names_in_cache(tmp_path) == []


def test_hub_download_that_is_cut_resumes(hub):
    hub.behaviour.body = BODY * 40  # more than one chunk of the library
    hub.behaviour.cuts = [11_000_000]
    result, _ = run_child(row(**HUB))
    assert pathlib.Path(result["path"]).read_bytes() == BODY * 40
    first, second = hub.behaviour.gets()
    assert first["range"] is None and second["range"].startswith("bytes=10")


def test_gated_hub_file_comes_with_the_token_of_its_user(hub, monkeypatch):
    hub.behaviour.token = "hf_abc"
    result, _ = run_child(row(**HUB))
    assert "answered 401 (no access)" in result["message"] and "Accept the licence" in result["message"]
    monkeypatch.setenv("HF_TOKEN", "hf_abc")
    result, _ = run_child(row(**HUB))
    assert pathlib.Path(result["path"]).read_bytes() == BODY


@pytest.mark.parametrize(
    ("status", "error_code", "gated", "expected"),
    [
        (
            404,
            "EntryNotFound",
            False,
            "answered 404 (not found) for model.safetensors of owner/convnext: the repository or "
            "the file was moved or removed. A newer keras-convnext may know the new place. Or: get",
        ),
        (
            403,
            "GatedRepo",
            False,
            "answered 403 (no access) for model.safetensors of owner/convnext. Accept the licence "
            "on {address}/owner/convnext, then run `hf auth login`. Or: get",
        ),
        (
            401,
            None,
            True,
            "answered 401 (no access) for model.safetensors of owner/convnext. Accept the licence "
            "on {address}/owner/convnext, then run `hf auth login`. Or: get",
        ),
        (
            401,
            None,
            False,
            "answered 401 (no access) for model.safetensors of owner/convnext. "
            "{address}/owner/convnext does not exist or is private; if it is yours, run",
        ),
    ],
)
def test_hub_refusal_names_file_status_and_advice(hub, status, error_code, gated, expected):
    hub.behaviour.status = status
    hub.behaviour.error_code = error_code
    result, _ = run_child(row(**HUB, gated=gated))
    assert result["error"] == ("NoSuchFileError" if error_code == "EntryNotFound" else "WeightsNotFoundError")
    assert expected.format(address=hub.address) in result["message"]


def test_hub_file_without_the_package_names_the_extra(hub):
    result, _ = run_child(row(**HUB), "without_hub")
    assert result["error"] == "ImportError"
    assert result["message"].startswith(
        "The file model.safetensors of owner/convnext is on the Hugging Face hub, which needs the "
        "package huggingface_hub: pip install huggingface_hub. Or: get "
        f"{hub.address}/owner/convnext/resolve/main/model.safetensors with a browser, save it as "
        "'convnext_tiny.safetensors'"
    )


def test_hub_file_without_the_package_comes_from_the_plain_address(hub, tmp_path):
    result, _ = run_child(row(hub, **HUB), "without_hub")
    assert result == {"path": str(cached_file(tmp_path))}
    assert cached_file(tmp_path).read_bytes() == BODY


@pytest.fixture
def failing_hub(monkeypatch):
    """`huggingface_hub` in this process with a download that raises what `error` holds."""
    import huggingface_hub
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)  # read at its import
    holder = types.SimpleNamespace(error=None)

    def hf_hub_download(repo_id, filename):
        raise holder.error

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", hf_hub_download)
    monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache", lambda repo_id, filename: None)
    return holder


def no_answer():
    from huggingface_hub.errors import LocalEntryNotFoundError

    error = LocalEntryNotFoundError("Please check your connection")
    error.__cause__ = ConnectionError("no route to host")
    return error


def test_hub_without_a_connection_says_so(failing_hub):
    failing_hub.error = no_answer()
    with pytest.raises(
        download.WeightsNotFoundError,
        match=r"^The Hugging Face hub cannot be reached for model\.safetensors of owner/convnext: "
        r"ConnectionError: no route to host\. Check the network, the proxy and HF_ENDPOINT",
    ):
        download.fetch(row(**HUB))


def test_hub_without_a_connection_falls_back_to_the_plain_address(failing_hub, server, tmp_path):
    failing_hub.error = no_answer()
    path = download.fetch(row(server, **HUB, sha256=BODY_SHA256))
    assert path == cached_file(tmp_path)
    assert path.read_bytes() == BODY


def test_hub_transfer_that_fails_is_named(failing_hub):
    failing_hub.error = RuntimeError("data processing error")
    with pytest.raises(
        download.WeightsNotFoundError,
        match=r"hub did not deliver model\.safetensors of owner/convnext: RuntimeError: data proc",
    ):
        download.fetch(row(**HUB))


def test_hub_cache_on_a_full_disk_names_its_variable(failing_hub):
    failing_hub.error = OSError(errno.ENOSPC, "No space left on device")
    with pytest.raises(
        download.WeightsNotFoundError, match=r"No space at .*Free some, or set HF_HOME to a folder on another"
    ):
        download.fetch(row(**HUB))
