"""kill -9 before each change of a run's folder: the run that goes on from there ends with the same bits.

A child trains and notes the folder before each change. SIGKILL loses nothing that a process has handed to the
system, so what is there before a change is what a kill leaves. The run goes on from each of these folders.
Another run is really killed, once before each kind of change, and started again each time.
"""

import csv
import ctypes
import hashlib
import json
import os
import pathlib
import re
import shutil
import signal
import subprocess
import sys
import traceback

import pytest

pytestmark = [pytest.mark.slow, pytest.mark.every_backend]

ROOT = pathlib.Path(__file__).parents[2]
_OPENED_TO_WRITE = os.O_WRONLY | os.O_RDWR | os.O_CREAT
_WEIGHTS = (
    "final.safetensors", "final.weights.h5", "final_ema.weights.h5", "best.weights.h5", "best.json",
    "final.labels.txt",
)  # fmt: skip
# Times; and on TensorFlow, where Keras makes the metrics in the first step only, the means of an epoch that
# was interrupted, which differ in the last digits.
_NOT_COMPARED = {"images_per_second"}
if os.environ.get("KERAS_BACKEND") == "tensorflow":
    _NOT_COMPARED |= {"loss", "accuracy"}


def train(data, folder):
    from keras_convnext.training import trainer
    from keras_convnext.training.recipes.files import load_recipe
    from keras_convnext.training.tasks import classification
    from tests.training.test_trainer import SMALL

    # A picture takes longer than an epoch here.
    classification.Classification.draw = lambda _, rows, folder: folder.write_bytes("curves.png", b"drawn")
    recipe = load_recipe("smoke").replaced({"data": str(data)} | SMALL | {"epochs": 2})
    trainer.train(recipe, folder, progress=False)


def train_and_tell(data, folder, before):
    """Trains, and calls `before(kind)` before each change of the folder; for the rest of this process."""
    from keras_convnext.training import logs

    inside = f"{folder}{os.sep}"

    def tell(what, path):
        path = os.fspath(path) if isinstance(path, str | os.PathLike) else ""
        if path.startswith(inside):
            name = re.sub(r"[0-9a-f]{16}|[\d.]*\d\.\S*\.\d+$|\d{8}", "#", path.removeprefix(inside))
            before(f"{what} {name}")

    def hook(event, arguments):
        if event == "open" and arguments[2] & _OPENED_TO_WRITE:
            tell("open", arguments[0])
        elif event in ("os.rename", "os.remove", "os.mkdir", "os.truncate"):
            tell(event, arguments[1 if event == "os.rename" else 0])

    sync, append = os.fsync, logs.TensorBoardLog._append

    def told_sync(descriptor):
        tell("sync", os.readlink(f"/proc/self/fd/{descriptor}"))
        sync(descriptor)

    def told_append(self, **fields):
        tell("append", self.path)
        append(self, **fields)

    os.fsync, logs.TensorBoardLog._append = told_sync, told_append
    sys.addaudithook(hook)
    train(data, folder)


def link_or_copy(source, target):
    """A link where a file is only ever replaced, or else a copy."""
    name = os.path.basename(source)
    (shutil.copy if name.startswith((".", "events")) else os.link)(source, target)


def state(folder):
    """What the next start finds: the contents, without what a killed process was writing and times."""
    found = {}
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if not path.is_file() or path.name.startswith(".") or name.startswith("tensorboard"):
            continue
        if name == "log.csv":
            found[name] = log(folder)
        elif name == "result.json":
            found[name] = result(folder)
        elif name == "environment.json":
            found[name] = "times"
        elif name != "curves.png":  # it shows the speed
            found[name] = hashlib.sha256(path.read_bytes()).hexdigest()
    return found


def log(folder):
    with open(folder / "log.csv", newline="") as file:
        return [
            {column: value for column, value in row.items() if column not in _NOT_COMPARED}
            for row in csv.DictReader(file)
        ]


def result(folder):
    scores = json.loads((folder / "result.json").read_text())
    return {name: value for name, value in scores.items() if name not in _NOT_COMPARED}


def in_child(function, *arguments):
    """Runs a function in a fork of this process and returns how that ended: 0, or the signal, negative."""
    child = os.fork()
    if not child:
        try:
            if sys.platform == "linux":
                ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG: it ends with its parent
            function(*arguments)
            os._exit(0)
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(1)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def note_states(data, folder, notes):
    """Trains; notes/<number> is the folder before a change, of all that have the same state the first."""
    kinds, last = [], None

    def note(kind):
        nonlocal last
        kinds.append(kind)
        if folder.exists() and (now := state(folder)) != last:
            last = now
            shutil.copytree(folder, notes / str(len(kinds)), copy_function=link_or_copy)

    train_and_tell(data, folder, note)
    (notes / "kinds.json").write_text(json.dumps(kinds))


def kill_at_new_kind(data, folder, noted):
    """Trains up to a change of a kind that is not in noted/kinds, notes kind and folder, and is killed."""
    done = set((noted / "kinds").read_text().splitlines())

    def kill(kind):
        if kind not in done and is_seen(kind):
            shutil.rmtree(noted / "folder", ignore_errors=True)
            if folder.exists():
                shutil.copytree(folder, noted / "folder", copy_function=link_or_copy)
            with open(noted / "kinds", "a") as file:
                file.write(f"{kind}\n")
            os.kill(os.getpid(), signal.SIGKILL)

    train_and_tell(data, folder, kill)


def is_seen(kind):
    """Whether the next start sees the change: not a temporary file, which is removed."""
    return not kind.startswith(("open", "sync"))


def train_whole(data, work):
    """Trains in work/whole without an interruption, and notes the states of the folder in work/notes."""
    import keras_convnext.training.trainer  # noqa: F401 - once for all children

    (work / "notes").mkdir()
    assert in_child(note_states, data, work / "whole", work / "notes") == 0


def kill_at_each_kind(data, work):
    """Trains in work/chain, killed before the first change of each kind and started again each time.

    Nothing computes in this process: a forked child lacks the threads of a backend.
    """
    import tensorflow  # noqa: F401 - once for all children

    import keras_convnext.data.batches
    import keras_convnext.training.trainer  # noqa: F401

    folder, noted = work / "chain", work / "noted"
    noted.mkdir(exist_ok=True)
    (noted / "kinds").touch()
    while (code := in_child(kill_at_new_kind, data, folder, noted)) == -signal.SIGKILL:
        if folder.exists():
            assert state(folder) == state(noted / "folder")  # a kill leaves what is there before it
    assert code == 0, code
    killed = (noted / "kinds").read_text().splitlines()
    kinds = json.loads((work / "notes" / "kinds.json").read_text())
    assert set(killed) >= set(filter(is_seen, kinds))
    assert not (problems := differences(folder, work / "whole")), "\n".join(problems)
    print(f"killed {len(killed)} times")


def go_on_from_each_state(data, work):
    """Trains on in each folder of work/notes, and compares what it ends with."""
    kinds = json.loads((work / "notes" / "kinds.json").read_text())
    numbers = sorted(int(path.name) for path in (work / "notes").iterdir() if path.is_dir())
    differing = []
    for number in numbers:
        folder = work / "notes" / str(number)
        train(data, folder)
        problems = differences(folder, work / "whole")
        differing += [f"before change {number}, {kinds[number - 1]}: {problem}" for problem in problems]
        shutil.rmtree(folder)
    assert not differing, "\n".join(differing)
    print(f"{len(numbers)} of {len(kinds)} states")


def checkpoint(path):
    """Arrays and state, without the metrics of an epoch that is over."""
    from keras_convnext.weights import safetensors_files, torch_files

    state = json.loads(safetensors_files.read_safetensors_metadata(path)["state"])
    state.pop("metrics", None)
    return state, {name: array.tobytes() for name, array in torch_files.read_state_dict(path).items()}


def differences(folder, whole):
    names = {
        path.relative_to(whole).as_posix() for path in whole.rglob("*") if "tensorboard" not in str(path)
    }
    found = {path.relative_to(folder).as_posix() for path in folder.rglob("*")}
    found = {name for name in found if "tensorboard" not in name}
    problems = [f"files {sorted(names ^ found)}"] if names != found else []
    problems += [name for name in _WEIGHTS if (folder / name).read_bytes() != (whole / name).read_bytes()]
    if log(folder) != log(whole):
        problems.append(f"log.csv {log(folder)} {log(whole)}")
    if result(folder) != result(whole):
        problems.append("result.json")
    last = max((whole / "checkpoints").iterdir()).name
    if checkpoint(folder / "checkpoints" / last) != checkpoint(whole / "checkpoints" / last):
        problems.append("last checkpoint")
    return problems


def run_here(function, data, work):
    """Runs a function of this module in a process of its own and returns the numbers that it prints."""
    code = (
        f"import pathlib; from tests.training.test_kills import {function}\n"
        f"{function}({str(data)!r}, pathlib.Path({str(work)!r}))"
    )
    ended = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr[-6000:]
    return [int(number) for number in re.findall(r"\d+", ended.stdout)]


@pytest.fixture(scope="module")
def work(few_digits, tmp_path_factory):
    folder = tmp_path_factory.mktemp("kills")
    run_here("train_whole", few_digits, folder)
    return folder


def test_a_run_killed_before_each_kind_of_change_ends_with_the_same_bits(work, few_digits):
    (kills,) = run_here("kill_at_each_kind", few_digits, work)
    assert kills > 15


def test_a_run_goes_on_from_each_state_of_its_folder_with_the_same_bits(work, few_digits):
    states, changes = run_here("go_on_from_each_state", few_digits, work)
    assert states > 30 and changes > 100
