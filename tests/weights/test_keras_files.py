"""What readers of `.h5` and `.keras` refuse: what lies in other files, says too much, loops or is damaged.

A program too, as 600 damaged `.keras` and 1,200 damaged `.h5` are read in processes of their own, for what
hangs, crashes or takes all memory: `python test_keras_files.py FOLDER`, for one kind with BASE FIRST LAST.
"""

import contextlib
import io
import os
import pathlib
import random
import signal
import subprocess
import sys
import zipfile

import h5py
import numpy as np
import pytest

from keras_convnext._files import FileFormatError
from keras_convnext.weights import keras_files, preprocessing_metadata, resolve

SECONDS = 10
MEMORY = 1 << 30
# name of a whole file -> how many damaged copies of it are read
COUNTS = {
    "theirs.h5": 400,
    "theirs.weights.h5": 400,
    "ours.weights.h5": 400,
    "ours.keras": 400,
    "theirs.keras": 200,
}


def damaged(content: bytes, seed: int) -> bytes:
    """A copy of a file with one to eight faults, as disks, downloads and attackers make them."""
    dice = random.Random(seed)
    data = bytearray(content)
    marks = (b"TREE", b"SNOD", b"HEAP", b"GCOL", b"OHDR", b"PK\1\2", b"PK\3\4", b"PK\5\6", b"vars")
    places = [at for mark in marks for at in _all(content, mark)]
    for _ in range(dice.choice((1, 1, 1, 2, 4, 8))):
        # Most of a file is weights, in which no fault shows: three of four hit what describes them.
        at = dice.randrange(len(data))
        if dice.random() < 0.75:
            at = min(len(data) - 1, max(0, dice.choice((0, *places)) + dice.randrange(-16, 160)))
        kind = dice.randrange(7)
        if kind == 0:
            data[at] ^= 1 << dice.randrange(8)
        elif kind == 1:
            data[at] = dice.randrange(256)
        elif kind == 2:  # an address, a size or a count
            number = dice.choice((0, 1, 2**64 - 1, 2**63, 2**32, len(data), dice.choice((0, *places)), at))
            data[at : at + 8] = number.to_bytes(8, "little")
        elif kind == 3:
            data[at : at + dice.choice((4, 64, 4096))] = bytes(dice.choice((4, 64, 4096)))
        elif kind == 4 and len(data) > 64:
            del data[at:]
        elif kind == 5:  # a piece of the file at another place
            other, size = dice.randrange(len(data)), dice.choice((8, 32, 512))
            data[at : at + size] = data[other : other + size]
        else:
            number = dice.choice((0, 1, 0xFFFF, 0x8000, 0x7FFF, 96, 512))
            data[at : at + 2] = number.to_bytes(2, "little")
        data = data or bytearray(1)
    return bytes(data)


def _all(content, mark):
    at = content.find(mark)
    while at >= 0:
        yield at
        at = content.find(mark, at + 1)


def whole_files(folder: pathlib.Path) -> None:
    """Writes the files that are damaged."""
    import keras
    from keras.src.applications import convnext as applications

    import keras_convnext

    theirs = applications.ConvNeXt(
        [1, 1, 1, 1], [8, 16, 24, 32], input_shape=(32, 32, 3), weights=None, classes=4, name="convnext_tiny"
    )
    ours = keras_convnext.load("test_convnext", None, classes=4, input_shape=(32, 32, 3))
    for model, name in ((theirs, "theirs"), (ours, "ours")):
        model.save_weights(folder / f"{name}.weights.h5")
        model.save(folder / f"{name}.keras")
    theirs.save(folder / "theirs.h5")
    preprocessing_metadata.add_preprocessing(folder / "ours.keras", keras_convnext.Preprocessing(32))
    keras.backend.clear_session()


def read_some(folder: pathlib.Path, base: str, first: int, last: int) -> None:
    """Reads damaged copies by the command, those of our weights into a model too; prints what came out."""
    import resource

    import keras_convnext
    from keras_convnext.cli import main

    content = (folder / base).read_bytes()
    if base.endswith(".keras"):  # faults within the members too, with right checksums
        with zipfile.ZipFile(folder / base) as archive:
            members = {name: archive.read(name) for name in archive.namelist()}
    model = keras_convnext.load("test_convnext", None, classes=4, input_shape=(32, 32, 3))
    path = folder / f"damaged{first}-{base}"
    main.main(["info", str(folder / base)])
    start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for number in range(first, last):
        print(f"\nbegin {number}", flush=True)
        if base.endswith(".keras") and number % 2:
            chosen = sorted(members)[number // 2 % len(members)]
            with zipfile.ZipFile(path, "w") as archive:
                for name, member in members.items():
                    archive.writestr(name, damaged(member, number) if name == chosen else member)
        else:
            path.write_bytes(damaged(content, number))
        signal.alarm(SECONDS)
        out, err = io.StringIO(), io.StringIO()
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            code = main.main(["info", str(path)])
        text = err.getvalue()
        if base == "ours.weights.h5":
            try:
                keras_files.load_weights(model, path)
            except ValueError as error:
                text = f"error: {error}"
        signal.alarm(0)
        grown = 1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - start)
        fits = code in (0, 2) and len(text) < 1500 and (code == 0 or path.name in text) and grown < MEMORY
        print(
            f"end {number} {'well' if fits else 'ILL'} code {code}, {grown >> 20} MB: {text[:1500]!r}",
            flush=True,
        )


def faults(folder: pathlib.Path, base: str, first: int, last: int) -> list[str]:
    """What did not end in a result or a sentence."""
    found = []
    while first < last:
        command = [sys.executable, __file__, str(folder), base, str(first), str(last)]
        done = subprocess.run(command, capture_output=True, text=True, errors="replace")
        lines = done.stdout.splitlines()
        found += [line for line in lines if line.startswith("end") and " ILL " in line]
        begun = [int(line.split()[1]) for line in lines if line.startswith("begin")]
        if not begun:
            raise RuntimeError(done.stderr)
        if done.returncode:
            found.append(f"{base} {begun[-1]}: exit code {done.returncode} {done.stderr[-300:]}")
        first = begun[-1] + 1
    return found


# Cheap ones, of files written here


def small(path, **changed):
    """Writes a ConvNeXt of `keras.applications` in the form of Keras 2, with other content for some names."""
    layers = {"x_stem": ["x_stem/k", "x_stem/b", "x_stem/g", "x_stem/c"]}
    layers |= {
        "x_stage_0_block_0_depthwise_conv": [
            "x_stage_0_block_0_depthwise_conv/k",
            "x_stage_0_block_0_depthwise_conv/b",
        ]
    }
    with h5py.File(path, "w") as file:
        file.attrs["layer_names"] = list(layers)
        for layer, names in layers.items():
            group = file.create_group(layer)
            group.attrs["weight_names"] = names
            for name in names:
                shape = (7, 7, 1, 8) if name.endswith("k") else (8,)
                make = changed.get(name.replace("/", "_"))
                if make is None:
                    group[name] = np.ones(shape, "float32")
                else:
                    make(group, name)
    return path


def refuses(path, message):
    for reader in (
        keras_files.is_keras_applications,
        keras_files.read_keras_applications,
        keras_files.read_sizes,
    ):
        with pytest.raises(FileFormatError, match=message) as error:
            reader(path)
        assert path.name in str(error.value) and len(str(error.value)) < 600
    with pytest.raises(FileFormatError, match=message):
        preprocessing_metadata.read_preprocessing(path)


PLACES = {
    "external storage": lambda group, name: group.create_dataset(
        name, (8,), "f4", external=[("/etc/passwd", 0, 32)]
    ),
    "no end": lambda group, name: group.create_dataset(name, (8,), "f4", external=[("/dev/zero", 0, 32)]),
    "external link": lambda group, name: group.__setitem__(name, h5py.ExternalLink("other.h5", "/a")),
    "soft link": lambda group, name: group.__setitem__(name, h5py.SoftLink("/x_stem")),
    "soft link without target": lambda group, name: group.__setitem__(name, h5py.SoftLink("/none")),
    "hard link to itself": lambda group, name: group.__setitem__(name, group),
    "texts": lambda group, name: group.create_dataset(name, data=["a"] * 8, dtype=h5py.string_dtype()),
    "lists": lambda group, name: group.create_dataset(name, (8,), h5py.vlen_dtype("f4")),
    "references": lambda group, name: group.create_dataset(name, data=[group.ref] * 8, dtype=h5py.ref_dtype),
    "nothing": lambda group, name: group.create_dataset(name, data=h5py.Empty("f4")),
    "a type": lambda group, name: group.__setitem__(name, np.dtype("f4")),
    "virtual": lambda group, name: group.create_virtual_dataset(name, _virtual()),
    "4 TB": lambda group, name: group.create_dataset(name, (1 << 40,), "f4", chunks=(1 << 20,)),
    "a large chunk": lambda group, name: group.create_dataset(
        name, (8,), "f4", chunks=(1 << 28,), maxshape=(None,)
    ),
}


def _virtual():
    layout = h5py.VirtualLayout((8,), "f4")
    layout[:] = h5py.VirtualSource("other.h5", "a", (8,))
    return layout


@pytest.mark.once
@pytest.mark.parametrize("place", PLACES)
def test_values_that_are_not_in_the_file_are_refused(place, tmp_path):
    assert len(keras_files.read_keras_applications(small(tmp_path / "whole.h5"))) == 6  # the control
    path = small(tmp_path / "leak.h5", x_stem_b=PLACES[place])
    if place == "a type":  # what nobody reads may stand there
        with pytest.raises(FileFormatError, match=r"leak\.h5"):
            keras_files.read_keras_applications(path)
        return
    refuses(path, "other file|another place|says that it holds|more than|hold each other|no numbers")
    with zipfile.ZipFile(tmp_path / "leak.keras", "w") as archive:
        archive.write(path, "model.weights.h5")
        archive.writestr("config.json", "{}")
    with pytest.raises(FileFormatError, match=r"leak\.keras"):
        keras_files.is_keras_applications(tmp_path / "leak.keras")


@pytest.mark.once
def test_a_heap_that_never_ends_is_refused(tmp_path):
    path = small(tmp_path / "loop.h5")
    content = path.read_bytes()
    heap = content.index(b"GCOL\1")
    first = int.from_bytes(content[heap + 24 : heap + 32], "little")
    assert first  # the length of the first text
    for length in (2**64 - 16, 2**64 - 32, 2**63, 1 << 20):
        path.write_bytes(content[: heap + 24] + length.to_bytes(8, "little") + content[heap + 32 :])
        refuses(path, "the heap at byte .* has an object of")
    path.write_bytes(content[:13] + b"\x04" + content[14:])  # numbers of 4 bytes
    refuses(path, "not an HDF5 file with numbers of 8 bytes")


@pytest.mark.once
def test_members_of_an_archive_are_bounded(tmp_path):
    weights = small(tmp_path / "w.h5")
    deep = '{"a":' * 100_000
    for number, (config, h5, kind, message) in enumerate(
        (
            (b" " * (1 << 25), None, zipfile.ZIP_DEFLATED, "JSON of its model has more than 16,777,216"),
            (b"{}", bytes((1 << 26) + 1), zipfile.ZIP_DEFLATED, "says that it holds 67108865 bytes"),
            (deep.encode(), None, zipfile.ZIP_STORED, "RecursionError"),
            (b"\xff", None, zipfile.ZIP_STORED, "opened as a Keras model: UnicodeDecodeError"),
            (b"[1", None, zipfile.ZIP_STORED, "opened as a Keras model: JSONDecodeError"),
        )
    ):  # fmt: skip
        path = tmp_path / f"bounded{number}.keras"
        with zipfile.ZipFile(path, "w", kind) as archive:
            archive.writestr("config.json", config)
            archive.writestr("model.weights.h5", h5 or weights.read_bytes())
        with pytest.raises(ValueError, match=message) as error:
            _ = resolve.resolve(path).preprocessing
        assert path.name in str(error.value) and len(str(error.value)) < 600


@pytest.mark.once
def test_an_archive_of_many_members_is_refused(tmp_path):
    path = tmp_path / "many.keras"
    with zipfile.ZipFile(path, "w") as archive:
        for number in range(6):
            archive.writestr(zipfile.ZipInfo(f"{'m' * 60_000}{number}"), b"")
    keras_files.read_stored_text(path, "none")  # the control
    with zipfile.ZipFile(path, "a") as archive:
        for number in range(12):
            archive.writestr(zipfile.ZipInfo(f"{'n' * 60_000}{number}"), b"")
    with pytest.raises(FileFormatError, match="list of members is too long"):
        keras_files.read_stored_text(path, "none")


@pytest.mark.once
def test_a_damaged_archive_is_one_sentence(tmp_path):
    path = tmp_path / "x.keras"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("config.json", "{}" * 500)
        archive.write(small(tmp_path / "w.h5"), "model.weights.h5")
    content = path.read_bytes()
    start = content.rindex(b"PK\1\2")  # of the weights, in the index
    end = content.rindex(b"PK\5\6")
    for change in (
        (start + 10, b"\x63\0"), (start + 8, b"\1\0"), (start + 16, b"1234"),
        (start + 42, b"\xff\xff\xff\x7f"),
        (end + 12, b"\xff\xff\xff\x7f"), (60, b"\xff" * 20), (end + 16, b"\xff\xff\xff\xfe"),
    ):  # fmt: skip
        at, bytes_there = change
        path.write_bytes(content[:at] + bytes_there + content[at + len(bytes_there) :])
        with pytest.raises(FileFormatError, match=r"x\.keras") as error:
            keras_files.holds_model(path)
        assert len(str(error.value)) < 600


@pytest.mark.once
@pytest.mark.parametrize("ending", [".h5", ".weights.h5", ".keras", ".safetensors", ".pth"])
def test_a_pipe_is_no_weight_file(ending, tmp_path):
    path = tmp_path / f"pipe{ending}"
    os.mkfifo(path)
    with pytest.raises(OSError, match="Expected a file, received the named pipe"):
        _ = resolve.resolve(path).stored
    with pytest.raises(OSError, match="Expected a file, received the named pipe"):
        _ = resolve.resolve(path).is_keras_applications or resolve.resolve(path).state


# The fuzzed ones


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("damaged")
    whole_files(folder)
    return folder


@pytest.mark.slow
@pytest.mark.one_backend
@pytest.mark.parametrize("base", COUNTS)
def test_damaged_files_end_in_a_sentence(base, folder):
    assert faults(folder, base, 0, COUNTS[base]) == []


if __name__ == "__main__":
    os.environ.setdefault("KERAS_CONVNEXT_QUIET", "1")
    if len(sys.argv) == 2:  # all
        whole_files(pathlib.Path(sys.argv[1]))
        for name, count in COUNTS.items():
            print(name, *faults(pathlib.Path(sys.argv[1]), name, 0, count), sep="\n  ", flush=True)
    else:
        read_some(pathlib.Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]), int(sys.argv[4]))
