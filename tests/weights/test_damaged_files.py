"""600 damaged `.keras` and 1,200 damaged `.h5` files: one sentence each, within 10 seconds and 1 GB.

A program too: `python test_damaged_files.py FOLDER BASE FIRST LAST` reads damaged copies of one file and prints a
line for each, so that what hangs, crashes or takes all memory is a process of its own.
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

import pytest

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
    places = [at for mark in (b"TREE", b"SNOD", b"HEAP", b"GCOL", b"OHDR", b"PK\1\2", b"PK\3\4", b"PK\5\6", b"vars")
              for at in _all(content, mark)]  # fmt: skip
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
    from keras_convnext.weights import preprocessing_metadata

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
    """Reads damaged copies by the command, and those of our weights into a model too; prints what came out."""
    import resource

    import keras_convnext
    from keras_convnext.cli import main
    from keras_convnext.weights import keras_files

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
