"""Every writer of the package, and what it does with what is there: nothing of a user's is lost."""

import os
import pathlib

import numpy as np
import pytest
from PIL import Image

from keras_convnext import _files
from keras_convnext.cli import main
from keras_convnext.conversion import convert
from keras_convnext.data import index, prepare
from keras_convnext.evaluation import features
from keras_convnext.evaluation import report as evaluation_report
from keras_convnext.exporting import export, web_page
from keras_convnext.exporting import report as export_report
from keras_convnext.training import curves, logs, run_folder
from keras_convnext.weights.safetensors_files import write_safetensors
from keras_convnext.weights.torch_files import write_torch

pytestmark = pytest.mark.once

ARRAYS = {"weight": np.zeros(3, "float32")}
FOUND = features.Features(np.zeros((1, 2), "float32"), np.zeros(1, int), np.zeros(1, int), {})
RESULT = export.ExportResult(
    pathlib.Path("x.onnx"), "onnx", "float32", 1, milliseconds=1.0, model_milliseconds=1.0
)


def safetensors(folder):
    write_safetensors(folder / "x.safetensors", ARRAYS)


def save_checkpoint(folder):
    with run_folder.open_run(folder, {}, checkpoint_bytes=0) as run:
        run.save(ARRAYS, {"step": 1})


def write_index(folder):
    index.write_index(folder / "index.npz", index.scanned("", "tar", [], []))


def draw_curves(folder):
    curves.draw_curves([{"epoch": 1, "step": 1, "loss": 1.0}], folder / "curves.png", {}, "x")


# Writers of one file that is theirs by its name, of a folder where it lies: (function of the folder, name).
OF_A_FILE = {
    "safetensors": (safetensors, "x.safetensors"),
    "torch": (lambda folder: write_torch(folder / "x.pth", ARRAYS), "x.pth"),
    "log": (lambda folder: logs.CsvLog(folder / "log.csv").write({"epoch": 1}), "log.csv"),
    "curves": (draw_curves, "curves.png"),
    "index": (write_index, "index.npz"),
    "faults": (lambda folder: evaluation_report.write_faults(folder, {"a": "b"}), "faults.csv"),
    "report": (lambda folder: export_report.write_report([RESULT], folder, "x"), "table.md"),
    "report's picture": (lambda folder: export_report.write_report([RESULT], folder, "x"), "exports.png"),
    "checkpoint": (save_checkpoint, "checkpoints/step-00000001.safetensors"),
    "run": (save_checkpoint, "run.json"),
    "lock of a run": (save_checkpoint, ".lock"),
}


def obstacles(path):
    """Makes in turn what is never replaced at a path, and yields it: (kind, whether it is as it was)."""
    kept = path.parent / "thesis.txt"
    kept.write_text("the only copy")
    path.mkdir()
    (path / "photo.jpg").write_text("the only copy")
    yield "a folder", lambda: (path / "photo.jpg").read_text() == "the only copy"
    (path / "photo.jpg").unlink()
    path.rmdir()
    for target in (kept, path.parent / "nowhere", "/dev/full", path.parent):
        path.symlink_to(target)
        yield f"a link to {target}", lambda: path.is_symlink() and kept.read_text() == "the only copy"
        path.unlink()
    os.mkfifo(path)
    yield "a pipe", path.is_fifo
    path.unlink()


@pytest.mark.parametrize("name", OF_A_FILE)
def test_no_writer_replaces_a_folder_a_link_or_a_special_file(name, tmp_path):
    write, file = OF_A_FILE[name]
    write(tmp_path)  # the control
    write(tmp_path)  # what it wrote itself is replaced
    path = tmp_path / file
    content = path.read_bytes()
    path.unlink()
    if name == "log":  # it is read first
        return
    for kind, is_kept in obstacles(path):
        if name == "run" and kind != "a folder":
            continue  # a link is read, and a pipe is no run
        with pytest.raises(OSError, match=path.name.removeprefix("step-").removesuffix(".json")):
            write(tmp_path)
        assert is_kept(), kind
        temporary = [one for one in tmp_path.rglob("*") if ".tmp" in one.name]
        assert temporary == [], kind
    assert content


FOREIGN = {
    "predictions.csv": evaluation_report.check_output,
    "worst_classes.png": evaluation_report.check_output,
    "faults.csv": lambda folder: evaluation_report.write_faults(folder, {"a": "b"}),
    "exports.csv": lambda folder: export_report.write_report([RESULT], folder, "x"),
    "table.md": lambda folder: _files.prepare_folder(folder, export_report.MARKS),
    "exports.png": lambda folder: _files.prepare_folder(folder, export_report.MARKS),
    ".lock": save_checkpoint,
    "run.json": save_checkpoint,
    "prepare.lock": lambda folder: prepare_into(folder),
    "train-00000-of-00001.tfrecord": lambda folder: prepare_into(folder),
    "manifest.json": lambda folder: prepare_into(folder),
}


def prepare_into(folder):
    for name in ("a", "b"):
        photos = folder.parent / f"{folder.name} photos" / "all" / name
        photos.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8)).save(photos / "1.png")
    prepare.prepare(photos.parent, folder, workers=1)


@pytest.mark.parametrize("name", FOREIGN)
def test_a_file_of_another_program_stays_as_it_was(name, tmp_path):
    thesis = b"the only copy of a thesis, or of a photograph\n"
    (tmp_path / name).write_bytes(thesis)
    if name == "prepare.lock":  # is only locked
        FOREIGN[name](tmp_path)
    else:
        with pytest.raises((OSError, ValueError), match=name.removeprefix(".")):
            FOREIGN[name](tmp_path)
    assert (tmp_path / name).read_bytes() == thesis


def test_an_empty_file_is_no_loss(tmp_path):
    (tmp_path / "faults.csv").touch()
    evaluation_report.write_faults(tmp_path, {"a": "b"})
    assert (tmp_path / "faults.csv").read_text() == "name,reason\na,b\n"


def test_look_writes_over_no_other_picture(tmp_path, capsys):
    photo = tmp_path / "photos" / "a" / "1.png"
    photo.parent.mkdir(parents=True)
    Image.new("RGB", (8, 8)).save(photo)
    Image.new("RGB", (8, 8)).save(photo.with_name("2.png"))
    (tmp_path / "thesis.png").write_bytes(b"the only copy")
    for target, reason in (
        (photo, "keras_convnext did not write it"),
        (tmp_path / "thesis.png", "keras_convnext did not write it"),
        (photo.with_name("sheet.png"), "outside of the images"),
        (photo.parent, "received the directory"),
    ):
        before = {path: path.read_bytes() for path in tmp_path.rglob("*.png")}
        assert main.main(["look", str(photo.parents[1]), str(target)]) == 2
        assert reason in capsys.readouterr().err
        assert {path: path.read_bytes() for path in tmp_path.rglob("*.png")} == before


def test_force_replaces_files_and_nothing_else(tmp_path):
    write_safetensors(tmp_path / "x.safetensors", ARRAYS)
    (tmp_path / "x.onnx").write_bytes(b"model")
    for name in ("y.safetensors", "x.html"):
        path = tmp_path / name
        for _, is_kept in obstacles(path):
            with pytest.raises(OSError, match=f"'{path}'"):
                if name == "x.html":
                    web_page.write_page(tmp_path / "x.onnx", path, replace=True)
                else:
                    convert(tmp_path / "x.safetensors", path)
            assert is_kept()
            assert main.main(["convert", str(tmp_path / "x.safetensors"), str(path), "--force"]) == 2
            assert is_kept()
        path.write_bytes(b"page")
        with pytest.raises(FileExistsError, match=r"replace=True \(--force\)"):
            web_page.write_page(tmp_path / "x.onnx", tmp_path / "x.html") if name == "x.html" else (
                _files.check_target(path, replace=False)
            )


@pytest.mark.parametrize(
    ("name", "format", "beside"),
    [("x.tflite", "litert", None), ("x.onnx", "onnx", "x.onnx.data"), ("x.xml", "openvino", "x.bin")],
)
def test_export_replaces_what_it_wrote(name, format, beside, tmp_path):
    path = tmp_path / name
    for kind, is_kept in obstacles(path):
        with pytest.raises(OSError, match=name):
            export._check_target(path, format, replace=True)
        assert is_kept(), kind
    path.write_bytes(b"model")
    with pytest.raises(FileExistsError, match="--force"):
        export._check_target(path, format, replace=False)
    export._check_target(path, format, replace=True)
    if beside is not None:
        (tmp_path / beside).write_bytes(b"weights")
        export._check_target(path, format, replace=True)
        path.unlink()  # without the model the weights are another program's: PyTorch has .bin files too
        with pytest.raises(FileExistsError, match=f"{beside}' is there already, and is not of"):
            export._check_target(path, format, replace=True)


def test_convert_does_not_write_over_its_source(tmp_path):
    from keras_convnext import load, save_weights

    model = load("test_convnext", None, classes=2, input_shape=(32, 32, 3))
    source = save_weights(model, tmp_path / "x.safetensors", "timm")
    before = source.read_bytes()
    os.link(source, tmp_path / "y.safetensors")
    for target in (source, tmp_path / "y.safetensors"):
        with pytest.raises(ValueError, match="another target than the source"):
            convert(source, target, "timm")
    assert source.read_bytes() == before


@pytest.mark.parametrize("hidden", [False, True])
def test_an_output_among_class_folders_is_refused(hidden, tmp_path):
    for name in ("a", "b"):
        (tmp_path / "photos" / name).mkdir(parents=True)
        Image.new("RGB", (8, 8)).save(tmp_path / "photos" / name / "1.png")
    (tmp_path / "linked").symlink_to(tmp_path / "photos")
    output = tmp_path / "linked" / (".run" if hidden else "run")
    commands = (
        ["train", "smoke", "--data", tmp_path / "photos", "--out", output],
        ["prepare", tmp_path / "photos", output],
        ["evaluate", "x", "--data", tmp_path / "photos", "--output", output],
        ["knn", "--model", "x", "--data", tmp_path / "photos", "--cache", output],
    )
    from keras_convnext.data import sources

    if hidden:  # is no class
        sources.check_outside(tmp_path / "photos", output)
        return
    for words in commands:
        with pytest.MonkeyPatch.context() as patch:
            written = []
            patch.setattr("keras_convnext.cli.main.complain", written.append)
            assert main.main([str(word) for word in words]) == 2
        assert "outside of the images" in written[0], words
        assert not output.exists()
    # Beside split folders nothing is taken for a class.
    for split in ("train", "val"):
        (tmp_path / "set" / split / "a").mkdir(parents=True)
        Image.new("RGB", (8, 8)).save(tmp_path / "set" / split / "a" / "1.png")
    sources.check_outside(tmp_path / "set", tmp_path / "set" / "run")
    with pytest.raises(ValueError, match="outside of the images"):
        sources.check_outside(tmp_path / "set", tmp_path / "set" / "val" / "run")


def test_features_that_cannot_be_kept_are_told(tmp_path, capsys):
    (tmp_path / "features-1.npz").mkdir()
    features._write_cache(tmp_path / "features-1.npz", FOUND)
    assert "are not kept" in capsys.readouterr().err
