"""Run folders: whatever happens to the process, the disk or a file, the newest whole checkpoint is found."""

import errno
import json
import logging
import os
import pathlib
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import tracemalloc

import ml_dtypes
import numpy as np
import pytest

from keras_convnext.training import run_folder
from keras_convnext.training.run_folder import RunFolderError, check_arrays, open_run
from keras_convnext.weights.arrays import FileFormatError
from keras_convnext.weights.safetensors_files import write_safetensors

pytestmark = pytest.mark.once

IDENTITY = {"recipe": {"learning_rate": 0.004, "seed": 0}, "data": "flowers"}

# Python that has the module without Keras, which would take most of the time of a child process.
_IMPORT = """
import io, json, os, random, signal, sys, time
import numpy as np
import keras_convnext_main  # as which the package starts without Keras
from keras_convnext.training import run_folder
arguments = sys.argv[1:]
if "keras" in sys.modules:
    sys.exit("run_folder.py has imported Keras")
"""

# Children save as fast as they can and tell each finished step; they are ended at random moments. What
# counts is how many rounds lost a step that was told, and how many ended in the middle of a save.
_KILL = (
    _IMPORT
    + """
path, how, rounds = arguments[0], arguments[1], int(arguments[2])
if how == "in place":
    class SlowFile(io.FileIO):
        def write(self, content):
            time.sleep(0.003)
            super().write(content)

    run_folder.write_safetensors.__globals__["replacing_file"] = lambda path: SlowFile(path, "wb")

def stop(number, frame):
    raise SystemExit(143)

def save_for_ever(told):
    if how == "SIGTERM":
        signal.signal(signal.SIGTERM, stop)
    run = run_folder.open_run(path, {"a": 1}, checkpoint_bytes=0)
    found = run.latest()
    step = found[1]["step"] if found else 0
    while True:
        step += 1
        arrays = {"w": np.full(400_000, step, "float32"), "step": np.array(step, "uint32")}
        run.save(arrays, {"step": step})
        os.write(told, step.to_bytes(4, "little"))

result = {"lost": 0, "torn": 0, "unequal": 0, "in the middle": 0, "left": 0, "steps": 0}
warnings = []
run_folder._logger.warning = lambda *arguments: warnings.append(arguments)
random.seed(0)
for _ in range(rounds):
    reader, writer = os.pipe()
    child = os.fork()
    if not child:
        os.close(reader)
        try:
            save_for_ever(writer)
        except SystemExit as error:
            os._exit(error.code)
        finally:
            os._exit(1)
    os.close(writer)
    told = os.read(reader, 4)
    time.sleep(random.uniform(0, 0.02))
    os.kill(child, signal.SIGTERM if how == "SIGTERM" else signal.SIGKILL)
    status = os.waitpid(child, 0)[1]
    if os.WIFEXITED(status) and os.WEXITSTATUS(status) == 1:
        sys.exit("the child failed")
    while more := os.read(reader, 4000):
        told = more[-4:]
    os.close(reader)
    last = int.from_bytes(told, "little")
    temporary = [name for name in os.listdir(os.path.join(path, "checkpoints")) if name.endswith(".tmp")]
    result["in the middle"] += bool(temporary)
    warnings.clear()
    with run_folder.open_run(path, {"a": 1}, checkpoint_bytes=0) as run:
        arrays, state = run.latest()
    step = state["step"]
    result["torn"] += bool(warnings)
    result["lost"] += step < last
    result["unequal"] += not (arrays["step"] == step and (arrays["w"] == step).all())
    result["left"] += any(name.endswith(".tmp") for name in os.listdir(os.path.join(path, "checkpoints")))
    result["steps"] = step
print(json.dumps(result))
"""
)


def open_here(path, **arguments):
    return open_run(path, IDENTITY, **{"checkpoint_bytes": 0} | arguments)


def arrays_of(step):
    return {"w": np.full((3, 4), step, "float32"), "rng": np.array([step, 2**32 - 1], "uint32")}


def save(run, *steps, **state):
    return [run.save(arrays_of(step), {"step": step} | state) for step in steps]


def files(folder):
    """All files but the lock and the description of the run."""
    names = {str(path.relative_to(folder)) for path in pathlib.Path(folder).rglob("*") if path.is_file()}
    return names - {".lock", "run.json"}


def run_python(code, *arguments):
    command = [sys.executable, "-c", code, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture
def run(tmp_path):
    with open_here(tmp_path / "run") as run:
        yield run


@pytest.fixture
def small_disk(tmp_path):
    """A disk of 4 MB of its own."""
    folder = tmp_path / "disk"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(folder)]
    if shutil.which("mount") is None or subprocess.run(command, capture_output=True, check=False).returncode:
        pytest.skip("no permission to mount a disk")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


# What a checkpoint holds.


def test_arrays_of_every_kind_come_back_bit_for_bit(run):
    bits = np.arange(2**16, dtype="uint16")
    arrays = {
        "all bfloat16": bits.view(ml_dtypes.bfloat16),
        "all float16": bits.view("float16"),
        "float32": np.array([np.nan, -0.0, np.inf, 1e-45], "float32"),
        "uint32": np.array([0, 2**32 - 1], "uint32"),
        "int64": np.array([-(2**63), 2**63 - 1]),
        "bool": np.array([True, False]),
        "no axis": np.array(7, "int32"),
        "no element": np.zeros((0, 3), "float32"),
        "transposed": np.arange(12, dtype="float32").reshape(3, 4).T,
        "names with spaces, ü and \n": np.ones(1, "uint8"),
    }
    run.save(arrays, {"step": 5})
    received, _ = run.latest()
    assert received.keys() == arrays.keys()
    for name, array in arrays.items():
        assert received[name].dtype == array.dtype, name
        assert received[name].shape == array.shape, name
        assert received[name].tobytes() == array.tobytes(), name


def test_state_comes_back(run):
    state = {
        "step": 3,
        "epoch": 1,
        "rate": 0.1 + 0.2,
        "best": None,
        "seeds": [2**64, -1],
        "name": "ü \udcff",
        "done": {"a": True},
    }
    run.save({}, state)
    assert run.latest() == ({}, state)


def test_arrays_that_were_read_do_not_change_with_the_file(run):
    (path,) = save(run, 1)
    arrays, _ = run.latest()
    with open(path, "r+b") as file:
        file.write(b"\xff" * path.stat().st_size)
    assert (arrays["w"] == 1).all()
    arrays["w"][:] = 2  # and they can be written


def test_saving_makes_no_second_copy_of_the_arrays(run):
    arrays = {f"w{number}": np.ones(2_000_000, "float32") for number in range(4)}  # 32 MB
    tracemalloc.start()
    run.save(arrays, {"step": 1})
    peak = tracemalloc.get_traced_memory()[1]
    copies = {name: array.copy() for name, array in arrays.items()}
    control = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert len(copies) == 4
    assert peak < 2_000_000
    assert control > 32_000_000


def test_a_run_without_checkpoints_has_no_latest(run):
    assert run.latest() is None
    assert run.steps() == []


# Ends of the process.


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.parametrize("how", ["SIGKILL", "SIGTERM"])
def test_a_process_that_is_ended_while_it_saves_loses_no_finished_step(tmp_path, how):
    result = json.loads(run_python(_KILL, tmp_path / "run", how, 50 if how == "SIGKILL" else 15))
    assert result["lost"] == result["torn"] == result["unequal"] == result["left"] == 0, result
    assert result["steps"] >= 10, result
    if how == "SIGKILL":
        assert result["in the middle"] >= 3, result
    else:
        assert result["in the middle"] == 0, "the handler's exception has to remove what was being written"


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_the_test_of_kills_sees_files_that_are_written_in_place(tmp_path):
    result = json.loads(run_python(_KILL, tmp_path / "run", "in place", 12))
    assert result["torn"] > 0, result


def test_leftovers_of_a_killed_process_are_removed_and_nothing_else(tmp_path):
    folder = tmp_path / "run"
    with open_here(folder) as run:
        save(run, 1)
        run.write_text("dump/report.json", "{}")
    leftovers = [
        "checkpoints/.step-00000002.safetensors.0123456789abcdef.tmp",
        ".tmp-0123456789abcdef-final.weights.h5",
        "dump/.report.json.0123456789abcdef.tmp",
    ]
    others = ["notes.tmp", ".hidden", "tensorboard/.events.tmp"]
    (folder / "tensorboard").mkdir()
    for name in leftovers + others:
        (folder / name).write_bytes(b"half")
    open_here(folder).close()
    assert files(folder) == {"checkpoints/step-00000001.safetensors", "dump/report.json", *others}


# Damaged files.


def test_every_truncation_is_noticed(run):
    _, path = save(run, 1, 2)
    content = path.read_bytes()
    for length in range(len(content)):
        path.write_bytes(content[:length])
        with pytest.raises(FileFormatError):
            run.read(2)
    path.write_bytes(content + b"\0")
    with pytest.raises(FileFormatError):
        run.read(2)
    path.write_bytes(content)
    assert run.read(2)[1] == {"step": 2}


def count_unnoticed_flips(run, path, first):
    """Flips every bit from a byte on, one at a time."""
    content, unnoticed = path.read_bytes(), 0
    with open(path, "r+b", buffering=0) as file:
        for position in range(first, len(content)):
            for bit in range(8):
                os.pwrite(file.fileno(), bytes([content[position] ^ 1 << bit]), position)
                try:
                    run.read(2)
                    unnoticed += 1
                except FileFormatError:
                    pass
            os.pwrite(file.fileno(), content[position : position + 1], position)
    assert run.read(2)[1] == {"step": 2}
    return unnoticed


def test_every_flipped_bit_is_noticed(run, monkeypatch):
    _, path = save(run, 1, 2)
    assert count_unnoticed_flips(run, path, first=0) == 0
    monkeypatch.setattr(run_folder, "_checksum", lambda arrays, state: "00000000")
    save(run, 2)
    array_bytes = sum(array.nbytes for array in arrays_of(2).values())
    assert count_unnoticed_flips(run, path, path.stat().st_size - array_bytes) == 8 * array_bytes


DAMAGES = {
    "empty": lambda content: b"",
    "half": lambda content: content[: len(content) // 2],
    "zeros": lambda content: bytes(len(content)),
    "text": lambda content: b"not a checkpoint at all, but a text\n" * 100,
    "zip": lambda content: b"PK\x03\x04" + content,
    "end is zero": lambda content: content[:-8] + bytes(8),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_checkpoint_is_named_skipped_and_kept_until_there_is_a_newer_one(tmp_path, caplog, damage):
    with open_here(tmp_path / "run", keep=1) as run:
        paths = save(run, 10, 20, best_step=10)
    content = DAMAGES[damage](paths[1].read_bytes())
    paths[1].write_bytes(content)
    with open_here(tmp_path / "run", keep=1) as run:
        with caplog.at_level(logging.WARNING, "keras_convnext"):
            arrays, state = run.latest()
        assert state["step"] == 10
        assert (arrays["w"] == 10).all()
        assert len(caplog.messages) == 1
        assert "step 20" in caplog.messages[0]
        assert str(paths[1]) in caplog.messages[0]
        assert paths[1].read_bytes() == content
        save(run, 15, best_step=10)
        assert run.steps() == [10, 15]
        assert run.latest()[1]["step"] == 15


def test_intact_checkpoints_give_no_warning(run, caplog):
    save(run, 1, 2)
    assert run.latest()[1] == {"step": 2}
    assert caplog.messages == []


def test_a_whole_file_that_is_no_checkpoint_is_damaged_too(run):
    _, path = save(run, 1, 2)
    write_safetensors(path, arrays_of(2), {"format": "pt"})
    with pytest.raises(FileFormatError, match=r"Expected a state, a CRC-32 .* received the format 'pt'"):
        run.read(2)
    assert run.latest()[1] == {"step": 1}


def test_a_run_never_begins_again_silently_when_all_checkpoints_are_damaged(run):
    for path in save(run, 1, 2):
        path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(RunFolderError, match=r"all 2 are damaged: step 2 \(.*, step 1 \(.*remove them"):
        run.latest()
    assert run.steps() == [1, 2]


# What is kept.


@pytest.mark.parametrize("keep", [1, 2, 3])
def test_newest_checkpoints_are_kept(tmp_path, keep):
    with open_here(tmp_path / "run", keep=keep) as run:
        for step in range(1, 8):
            save(run, step)
            assert run.steps() == list(range(max(1, step - keep + 1), step + 1))


def test_steps_of_more_than_eight_digits_are_the_newer_ones(run):
    save(run, 99_999_998, 99_999_999, 100_000_000)
    assert run.steps() == [99_999_999, 100_000_000]
    assert run.latest()[1] == {"step": 100_000_000}


def test_best_checkpoint_is_kept_until_there_is_a_better_one(tmp_path):
    with open_here(tmp_path / "run") as run:
        save(run, 1, 2, 3, best_step=1)
        assert run.steps() == [1, 2, 3]
        save(run, 4, best_step=4)
        assert run.steps() == [3, 4]
    with open_here(tmp_path / "run") as run:
        save(run, 5, 6, 7, best_step=4)
        assert run.steps() == [4, 6, 7]
        assert run.read(4)[1]["step"] == 4


def test_a_checkpoint_that_cannot_be_removed_stops_nothing(run, monkeypatch, caplog):
    def refuse(path, missing_ok=False):
        raise PermissionError(errno.EACCES, "it is open elsewhere", str(path))

    save(run, 1, 2)
    monkeypatch.setattr(pathlib.Path, "unlink", refuse)
    save(run, 3)
    assert "step 1 stays" in caplog.text
    monkeypatch.undo()
    save(run, 4)
    assert run.steps() == [3, 4]


# Folders that are refused.


def test_folder_of_another_recipe_is_refused_with_the_changed_keys(tmp_path):
    open_here(tmp_path / "run").close()
    other = {"recipe": {"learning_rate": 0.001, "seed": 0, "ema_decay": 0.9999}}
    with pytest.raises(RunFolderError) as caught:
        open_run(tmp_path / "run", other, checkpoint_bytes=0)
    text = str(caught.value)
    assert "holds another run" in text
    assert "3 changed" in text
    assert "recipe.learning_rate: 0.004 -> 0.001" in text
    assert "recipe.ema_decay: absent -> 0.9999" in text
    assert "data: 'flowers' -> absent" in text
    assert "seed" not in text
    open_here(tmp_path / "run").close()  # the refused one changed nothing


def test_identity_is_compared_as_json_gives_it(tmp_path):
    open_run(tmp_path / "run", {"crop_scale": (0.08, 1.0)}, checkpoint_bytes=0).close()
    open_run(tmp_path / "run", {"crop_scale": [0.08, 1.0]}, checkpoint_bytes=0).close()


def test_long_lists_of_changes_are_cut(tmp_path):
    open_run(tmp_path / "run", {f"key{n}": "x" * 500 for n in range(50)}, checkpoint_bytes=0).close()
    with pytest.raises(RunFolderError, match=r"50 changed.* and 30 more") as caught:
        open_run(tmp_path / "run", {}, checkpoint_bytes=0)
    assert len(str(caught.value)) < 4000


@pytest.mark.parametrize("text", ["", "{", "[]", '{"format": "other", "identity": {}}', '{"identity": {}}'])
def test_unreadable_description_of_the_run_is_refused(tmp_path, text):
    open_here(tmp_path / "run").close()
    (tmp_path / "run" / "run.json").write_text(text)
    with pytest.raises(RunFolderError, match=r"run.json' cannot be read as the description of a run"):
        open_here(tmp_path / "run")
    assert (tmp_path / "run" / "run.json").read_text() == text


def test_a_description_of_the_run_that_is_no_text_is_told_by_its_error(tmp_path):
    open_here(tmp_path / "run").close()
    (tmp_path / "run" / "run.json").write_bytes(b"\xff")
    with pytest.raises(RunFolderError, match=r"\(UnicodeDecodeError: 'utf-8' codec"):
        open_here(tmp_path / "run")


def test_folder_of_something_else_is_refused_and_left_as_it_is(tmp_path):
    (tmp_path / "photo.jpg").write_bytes(b"photo")
    (tmp_path / "thesis").mkdir()
    with pytest.raises(
        RunFolderError, match=r"Expected an empty folder .* received one with photo.jpg, thesis"
    ):
        open_here(tmp_path)
    assert sorted(os.listdir(tmp_path)) == ["photo.jpg", "thesis"]


def test_folder_with_hidden_files_only_is_taken(tmp_path):
    (tmp_path / ".DS_Store").write_bytes(b"")
    with open_here(tmp_path) as run:
        assert save(run, 1)[0].exists()


@pytest.mark.parametrize("below", ["", "run"])
def test_file_in_place_of_the_folder_is_refused(tmp_path, below):
    (tmp_path / "file").write_bytes(b"content")
    with pytest.raises(RunFolderError, match=r"Expected a folder .* a part of it is a file"):
        open_here(tmp_path / "file" / below)
    assert (tmp_path / "file").read_bytes() == b"content"


def test_read_only_disk_is_refused(small_disk):
    open_here(small_disk / "old").close()
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    for name in ("old", "new"):
        with pytest.raises(
            RunFolderError, match=r"cannot be written \(Read-only file system\).*another folder"
        ):
            open_here(small_disk / name)


@pytest.mark.parametrize("name", ["old", "new"])
def test_folder_without_permission_is_refused(tmp_path, monkeypatch, name):
    (tmp_path / "old").mkdir()
    if os.geteuid():
        os.chmod(tmp_path / "old", 0o555)
        os.chmod(tmp_path, 0o555)
    else:  # to whom the system refuses nothing

        def refuse(path, *arguments, **options):
            raise PermissionError(errno.EACCES, "Permission denied", str(path))

        monkeypatch.setattr(pathlib.Path, "open", refuse)
        if name == "new":
            monkeypatch.setattr(pathlib.Path, "mkdir", refuse)
    try:
        with pytest.raises(RunFolderError, match=rf"{name}' cannot be written \(Permission denied\)"):
            open_here(tmp_path / name)
    finally:
        os.chmod(tmp_path, 0o755)
        os.chmod(tmp_path / "old", 0o755)


# Two processes.


def test_second_process_is_refused_until_the_first_is_killed(tmp_path):
    code = _IMPORT + (
        "run = run_folder.open_run(arguments[0], json.loads(arguments[1]), checkpoint_bytes=0)\n"
        "print('open', flush=True)\n"
        "time.sleep(100)\n"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "run"), json.dumps(IDENTITY)]
    child = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        assert child.stdout.readline() == "open\n"
        with pytest.raises(RunFolderError, match=rf"Another process trains in .*process {child.pid} on "):
            open_here(tmp_path / "run")
    finally:
        child.send_signal(signal.SIGKILL)
        child.wait()
    with open_here(tmp_path / "run") as run:
        save(run, 1)


def test_the_same_process_is_refused_until_it_closes(tmp_path):
    first = open_here(tmp_path / "run")
    with pytest.raises(RunFolderError, match=f"process {os.getpid()} on"):
        open_here(tmp_path / "run")
    first.close()
    first.close()
    open_here(tmp_path / "run").close()


def test_a_folder_that_was_refused_is_not_locked(tmp_path):
    open_here(tmp_path / "run").close()
    with pytest.raises(RunFolderError, match="another run") as caught:
        open_run(tmp_path / "run", {}, checkpoint_bytes=0)
    open_here(tmp_path / "run").close()
    assert caught.value.__traceback__ is not None  # its frames are alive, so nothing was closed by chance


def test_disk_without_locks_has_a_lock_on_this_machine(tmp_path, monkeypatch):
    real = run_folder.try_lock

    def only_elsewhere(file):
        if pathlib.Path(file.name).name == ".lock":
            raise OSError(errno.ENOLCK, "No locks available")
        return real(file)

    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    monkeypatch.setattr(run_folder, "try_lock", only_elsewhere)
    with open_here(tmp_path / "run"):
        with pytest.raises(RunFolderError, match=f"Another process trains in .*process {os.getpid()} on"):
            open_here(tmp_path / "run")
        open_here(tmp_path / "other").close()
    open_here(tmp_path / "run").close()


def test_other_trouble_with_the_lock_is_told(tmp_path, monkeypatch):
    def fail(file):
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(run_folder, "try_lock", fail)
    with pytest.raises(RunFolderError, match=r"cannot be written \(Input/output error\)"):
        open_here(tmp_path / "run")


# Full disks.


def test_too_small_disk_is_refused_before_training(small_disk):
    with pytest.raises(
        RunFolderError,
        match=r"Expected 4.8 MB free .* 4 checkpoints of 1.2 MB, received .* MB: .* are missing",
    ):
        open_here(small_disk / "run", checkpoint_bytes=1_200_000)
    open_here(small_disk / "run", checkpoint_bytes=900_000).close()


def test_weights_beside_the_checkpoints_need_space_too(tmp_path):
    with pytest.raises(RunFolderError, match=r"Expected 1000000.0 GB free .* 4 checkpoints of 0 bytes and w"):
        open_here(tmp_path / "run", weights_bytes=10**15)


def test_checkpoints_that_are_there_count_as_space(tmp_path, monkeypatch):
    with open_here(tmp_path / "run") as run:
        size = sum(path.stat().st_size for path in save(run, 1, 2))
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
    open_here(tmp_path / "run", checkpoint_bytes=(1000 + size) // 4).close()
    with pytest.raises(RunFolderError, match=r"received 1.0 kB: 4 bytes are missing"):
        open_here(tmp_path / "run", checkpoint_bytes=(1000 + size) // 4 + 1)


def test_full_disk_leaves_the_earlier_checkpoints_and_tells_what_is_missing(small_disk):
    with open_here(small_disk / "run") as run:
        save(run, 1, 2)
        run.write_text("log.csv", "before")
        (small_disk / "filler").write_bytes(bytes(2_500_000))
        before = files(run.path)
        large = {"w": np.ones(500_000, "float32")}
        with pytest.raises(
            RunFolderError,
            match=r"No space at .*: expected 2.0 MB free, received 1\.\d MB, .* kB are missing",
        ):
            run.save(large, {"step": 3})
        with pytest.raises(RunFolderError, match="No space"):
            run.write_text("log.csv", "x" * 3_000_000)
        with pytest.raises(RunFolderError, match="No space"):
            run.write_with("final.bin", lambda path: path.write_bytes(bytes(3_000_000)))
        assert files(run.path) == before
        assert (run.path / "log.csv").read_text() == "before"
        assert run.latest()[1] == {"step": 2}
        (small_disk / "filler").unlink()
        run.save(large, {"step": 3})
        assert run.latest()[1] == {"step": 3}


def test_disk_without_a_byte_left_is_refused_before_training(small_disk):
    with (
        open(small_disk / "filler", "wb", buffering=0) as filler,
        pytest.raises(OSError, match="No space left"),
    ):
        while True:
            filler.write(bytes(1 << 12))
    with pytest.raises(RunFolderError, match="No space"):
        open_here(small_disk / "run")


def test_write_that_the_system_cuts_short_leaves_the_earlier_checkpoints(run):
    """For machines where no disk can be mounted: a limit on the size of a file instead."""
    save(run, 1)
    before = files(run.path)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (500_000, limits[1]))
    try:
        with pytest.raises(RunFolderError, match=r"cannot be written \(File too large\)"):
            run.save({"w": np.ones(500_000, "float32")}, {"step": 2})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert files(run.path) == before
    assert run.latest()[1] == {"step": 1}


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_disk_that_notices_late_that_it_is_full_leaves_the_earlier_checkpoints(run, monkeypatch, number):
    def fail(descriptor):
        raise OSError(number, os.strerror(number))

    save(run, 1)
    before = files(run.path)
    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(
        RunFolderError, match=r"No space at .*: expected 56 bytes free, received .*start the same"
    ):
        save(run, 2)
    assert files(run.path) == before
    assert run.latest()[1] == {"step": 1}


# Other files.


def test_files_are_written_under_their_names(run):
    assert run.write_text("recipe.toml", "ü\n") == run.path / "recipe.toml"
    assert (run.path / "recipe.toml").read_bytes() == "ü\n".encode()
    run.write_bytes("dump/batch.npz", b"\0\1")
    assert (run.path / "dump" / "batch.npz").read_bytes() == b"\0\1"
    given = []

    def function(path):
        given.append(path)
        path.write_bytes(b"weights")

    assert run.write_with("weights/final.weights.h5", function).read_bytes() == b"weights"
    assert given[0].name.endswith("final.weights.h5")
    assert given[0].name != "final.weights.h5"
    assert files(run.path) == {"recipe.toml", "dump/batch.npz", "weights/final.weights.h5"}


@pytest.mark.parametrize(
    ("error", "raised"), [(OSError(errno.EIO, "no"), RunFolderError), (RuntimeError("no"), RuntimeError)]
)
def test_a_function_that_fails_leaves_the_earlier_file(run, error, raised):
    def function(path):
        path.write_bytes(b"half")
        raise error

    run.write_bytes("final.weights.h5", b"whole")
    with pytest.raises(raised, match="no"):
        run.write_with("final.weights.h5", function)
    assert (run.path / "final.weights.h5").read_bytes() == b"whole"
    assert files(run.path) == {"final.weights.h5"}


def test_a_function_that_writes_nothing_is_told(run):
    with pytest.raises(RunFolderError, match="No such file"):
        run.write_with("final.weights.h5", lambda path: None)


# Checkpoints of another model.


EXPECTED = {
    "stem/kernel": ((4, 4, 3, 96), "float32"),
    "head/bias": ((10,), "bfloat16"),
    "seed": ((2,), "uint32"),
}


def matching():
    return {name: np.zeros(shape, np.dtype(dtype)) for name, (shape, dtype) in EXPECTED.items()}


def test_arrays_of_the_same_model_are_accepted_in_any_order():
    check_arrays(dict(reversed(matching().items())), EXPECTED, "step 1")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"seed": None}, "1 missing: seed"),
        ({"extra": np.zeros(1)}, "1 unexpected: extra"),
        ({"head/bias": None, "heads/bias": np.zeros(10)}, "1 missing: head/bias. 1 unexpected: heads/bias"),
        (
            {"stem/kernel": np.zeros((4, 4, 3, 40), "float32")},
            r"1 different: stem/kernel expected float32\[4, 4, 3, 96\], received float32\[4, 4, 3, 40\]",
        ),
        ({"head/bias": np.zeros(10, "float32")}, r"expected bfloat16\[10\], received float32\[10\]"),
    ],
)
def test_arrays_of_another_model_are_refused_with_their_names(changes, message):
    arrays = {name: array for name, array in (matching() | changes).items() if array is not None}
    with pytest.raises(ValueError, match=f"^step 7 is a checkpoint of another architecture.*{message}"):
        check_arrays(arrays, EXPECTED, "step 7")


def test_long_lists_of_names_are_cut():
    expected = {f"layer{number}": ((1,), "float32") for number in range(300)}
    with pytest.raises(ValueError, match=r"Expected 300 arrays, received 0. 300 missing: .* and 280 more"):
        check_arrays({}, expected, "step 7")
