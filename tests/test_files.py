"""Tests of the readers that take any file: what is special, long or damaged JSON is one sentence."""

import csv
import os
import socket
import zlib

import pytest

from keras_convnext import _files

pytestmark = pytest.mark.once


@pytest.fixture
def special(tmp_path):
    """Paths that have a name like files and are none."""
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "zero").symlink_to("/dev/zero")
    sock = socket.socket(socket.AF_UNIX)
    sock.bind(str(tmp_path / "socket"))
    yield [tmp_path / "fifo", tmp_path / "zero", tmp_path / "socket"]
    sock.close()


def test_special_files_are_not_opened(special, tmp_path):
    for path, kind in zip(special, ("named pipe", "device", "socket"), strict=True):
        for reader in (_files.open_regular, _files.read_bytes, _files.read_text, _files.read_json):
            with pytest.raises(OSError, match=f"Expected a file, received the {kind}: '{path}'"):
                reader(path)
    with pytest.raises(IsADirectoryError, match="received the folder"):
        _files.open_regular(tmp_path)
    with pytest.raises(FileNotFoundError):
        _files.read_bytes(tmp_path / "none")


def test_a_long_file_is_refused_before_it_is_read(tmp_path):
    with open(tmp_path / "long.json", "wb") as file:
        file.truncate(1 << 40)  # sparse
    with pytest.raises(_files.FileFormatError, match=r"at most 67\.1 MB in '.*long\.json', received 1099"):
        _files.read_json(tmp_path / "long.json")


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ("", "JSONDecodeError"),
        ("[1]", "expected an object, received \\[1\\]"),
        ('{"name": "a"}', "'splits' is missing"),
        ('{"name": 1, "splits": []}', "expected a text as 'name', received 1"),
        ('{"name": "a", "splits": {}}', "expected a list as 'splits', received {}"),
        ("[" * 100_000, "RecursionError"),
        ('{"a":' * 100_000, "RecursionError"),
        ("1" * 5000, "ValueError: Exceeds the limit"),
        (b"\xff\xfe\xfa", "codec can't decode"),
        ('{"name": "' + "x" * 100_000, "JSONDecodeError"),
        ('{"name": [' + "7," * 100_000 + '7], "splits": []}', "expected a text as 'name', received \\[7, 7"),
    ],
)
def test_json_that_is_something_else_is_one_sentence(content, reason, tmp_path):
    path = tmp_path / "info.json"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(_files.FileFormatError, match=reason) as error:
        _files.read_json(path, {"name": str, "splits": list})
    text = str(error.value)
    assert text.startswith(f"Expected JSON in '{path}'") and text.endswith("Write it again.")
    assert len(text) < 600 and "\n" not in text


@pytest.mark.parametrize(
    "problem",
    [KeyError("x"), AttributeError("x"), MemoryError(), RecursionError("x"), OverflowError("x"),
     IndexError(""),
     zlib.error("x"), csv.Error("x"), NotImplementedError("x"), RuntimeError("x"), OSError("x"),
     UnicodeDecodeError("utf-8", b"x", 0, 1, "x"), StopIteration("x"), AssertionError()],
)  # fmt: skip
def test_whatever_a_content_does_names_the_file(problem):
    class Error(ValueError):
        pass

    with pytest.raises(Error, match=r"^Expected a list in 'f', which is damaged or .*\. Go\.$"):  # noqa: SIM117
        with _files.reading("f", "a list", "Go.", Error):
            raise problem


@pytest.mark.parametrize("problem", [PermissionError(13, "x"), ImportError("x"), KeyboardInterrupt()])
def test_what_is_not_of_the_content_goes_through(problem):
    with pytest.raises(type(problem)), _files.reading("f", "a list", "Go."):
        raise problem
