"""The notebooks run from top to bottom, as a newcomer runs them; each on one backend, which is enough."""

import ast
import csv
import importlib.util
import pathlib
import re
import struct
import sys

import keras
import nbclient
import nbformat
import numpy as np
import pytest
from PIL import Image

import keras_convnext
from keras_convnext import roadmap
from keras_convnext.data.preprocessing import Preprocessing

pytestmark = pytest.mark.slow

ROOT = pathlib.Path(__file__).parents[2]
CLASSIFY = ROOT / "notebooks" / "classify.ipynb"
EXPORT = ROOT / "notebooks" / "export.ipynb"
FEATURES = ROOT / "notebooks" / "features.ipynb"
FINE_TUNE = ROOT / "notebooks" / "fine_tune.ipynb"
PRETRAIN = ROOT / "notebooks" / "pretrain.ipynb"
SEGMENT = ROOT / "notebooks" / "segment.ipynb"
ROADMAP = ROOT / "notebooks" / "roadmap.ipynb"
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
FLOWERS = ROOT.parent / "shared" / "data" / "flowers5_thumbs" / "flowers"
SMALL = {"WEIGHTS": "", "EPOCHS": "1", "IMAGE_SIZE": "32"}  # random weights: there is no network

BY_NAME = pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda path: path.stem)
RUNS = pytest.mark.skipif(
    keras.backend.backend() != "torch", reason="notebooks run on PyTorch, which starts fastest"
)
RUNS_EXPORT = pytest.mark.skipif(
    keras.backend.backend() != "tensorflow", reason="TensorFlow writes LiteRT files in its own process"
)


def execute(notebook, folder, monkeypatch, **environment):
    """The executed notebook; raises nbclient.exceptions.CellExecutionError when a cell fails."""
    for name, value in {**SMALL, **environment, "IPYTHONDIR": str(folder / "ipython")}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("MPLBACKEND", raising=False)  # the kernel's own puts pictures in the notebook
    executed = nbformat.read(notebook, as_version=4)
    nbclient.NotebookClient(
        executed, timeout=600, kernel_name="python3", resources={"metadata": {"path": str(folder)}}
    ).execute()
    return executed


def outputs_of(notebook):
    """The printed text and the number of pictures."""
    outputs = [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]
    text = "".join(output.text for output in outputs if output.output_type == "stream")
    pictures = [output for output in outputs if "image/png" in output.get("data", {})]
    return text, len(pictures)


def check_fine_tune(executed, folder, photos, classes, size=32):
    text, num_pictures = outputs_of(executed)
    held_out = photos // 5
    assert (
        f"{photos - held_out} photos to train, {held_out} held out; pixels uint8, ({size}, {size}, 3)" in text
    )
    assert f"classes: {', '.join(classes)}" in text
    accuracy = re.search(rf"accuracy on {held_out} photos that it has never seen: ([0-9.]+)%\n", text)
    assert accuracy and 0 <= float(accuracy[1]) <= 100
    assert num_pictures == 4  # photos, curves, confusions, Grad-CAM
    assert (folder / "flowers.keras").stat().st_size > 1e6  # the last cell has loaded it and compared
    assert (folder / "flowers.txt").read_text().splitlines() == classes
    return float(accuracy[1])


def make_photos(path):
    """A folder for each of three classes, with 20 crops of one free photo in each."""
    names = ["chelsea", "coffee", "rocket"]
    for name in names:
        folder = path / name
        folder.mkdir(parents=True)
        with Image.open(next((ROOT / "tests" / "images").glob(f"{name}.*"))) as photo:
            width, height = photo.size
            for number in range(20):
                left, top = number % 5 * (width - 200) // 4, number // 5 * (height - 200) // 3
                photo.convert("RGB").crop((left, top, left + 200, top + 200)).save(folder / f"{number}.jpg")
    return names


@pytest.fixture(scope="module")
def stand_in(tmp_path_factory):
    """A file of random weights, that knows seven classes by name and finds the fourth in every photo."""
    keras.utils.set_random_seed(0)
    model = keras_convnext.load("convnextv2_atto", None, classes=7, input_shape=(64, 64, 3))
    head = model.get_layer("head")
    head.set_weights([head.get_weights()[0], np.array([0, 0, 0, 2, 0, 0, 1], "float32")])
    path = tmp_path_factory.mktemp("weights") / "stand_in.safetensors"
    path.with_suffix(".labels.txt").write_text("zero\none\ntwo\nthree, drei\nfour\nfive\nsix\n")
    return keras_convnext.save_weights(model, path, preprocessing=Preprocessing(64, crop_fraction=0.9))


@RUNS
def test_classify_goes_from_photos_to_names(stand_in, tmp_path, monkeypatch):
    executed = execute(CLASSIFY, tmp_path, monkeypatch, WEIGHTS=str(stand_in))
    text, num_pictures = outputs_of(executed)
    assert "convnextv2_atto: 3,389,647 weights, 7 classes\nPreprocessing(image_size=64, " in text
    assert "crop_fraction=0.9," in text
    assert "one batch: uint8 (3, 64, 64, 3), " in text
    for name in ("cat", "coffee", "rocket"):
        assert re.search(rf"^{name}\.jpg: three [0-9.]+%, \w+ [0-9.]+%, ", text, re.M)
    assert re.search(r"^mine\.safetensors: 13\.6 MB, the same answers$", text, re.M)
    for size in (64, 80, 96, 128):
        assert re.search(rf"^ +{size} pixels: three \d+%, three \d+%, three \d+%$", text, re.M)
    assert len(re.findall(r"^cat\.jpg: three [0-9.]+%", text, re.M)) == 2  # once by plain Keras
    assert num_pictures == 3  # photos, what the model sees, bars
    assert (tmp_path / "mine.safetensors").stat().st_size > 1e7


@RUNS
def test_features_go_from_maps_to_neighbours(stand_in, tmp_path, monkeypatch):
    names = make_photos(tmp_path / "photos")
    changes = {"WEIGHTS": str(stand_in), "FOLDER": str(tmp_path / "photos"), "IMAGE_SIZE": "96"}
    executed = execute(FEATURES, tmp_path, monkeypatch, **changes)
    text, num_pictures = outputs_of(executed)
    for level, side, channels in (("P2", 24, 40), ("P3", 12, 80), ("P4", 6, 160), ("P5", 3, 320)):
        assert f"{level} (3, {side}, {side}, {channels})\n" in text
    assert f"48 photos to compare with, 12 to classify, {len(names)} classes\n" in text
    scores = dict(re.findall(r"^ *(\d+) neighbours: ([0-9.]+) %$", text, re.M))
    assert list(scores) == ["1", "5", "20"]
    by_hand = re.search(r"^nearest neighbour of the right class: ([0-9.]+)% of 12 photos$", text, re.M)
    assert float(scores["1"]) == float(by_hand[1]) > 60  # colours tell these apart; a third by chance
    assert "  by chance: 33.3 %\n" in text
    assert num_pictures == 3  # maps, Grad-CAM, neighbours


@RUNS
def test_fine_tune_learns_crops_of_free_photos(tmp_path, monkeypatch):
    names = make_photos(tmp_path / "photos")
    executed = execute(FINE_TUNE, tmp_path, monkeypatch, FLOWERS=str(tmp_path / "photos"), EPOCHS="8")
    assert check_fine_tune(executed, tmp_path, 60, names) > 60  # of 12; one in three by chance


@RUNS
@pytest.mark.skipif(not FLOWERS.is_dir(), reason="the photos of flowers are not here")
def test_fine_tune_learns_flowers_as_it_stands_but_from_random_weights(tmp_path, monkeypatch):
    names = ["daisy", "dandelion", "rose", "sunflower", "tulip"]
    executed = execute(FINE_TUNE, tmp_path, monkeypatch, FLOWERS=str(FLOWERS), EPOCHS="5", IMAGE_SIZE="128")
    assert check_fine_tune(executed, tmp_path, 600, names, size=128) > 28  # of 120; 20 by chance


@RUNS
def test_segment_goes_from_masks_to_a_file_for_phones(tmp_path, monkeypatch):
    weights = "convnextv2_atto.tiny_imagenet200"  # in the package
    settings = {"WEIGHTS": weights, "IMAGE_SIZE": "96", "CHANNELS": "32", "STEPS": "100"}
    executed = execute(SEGMENT, tmp_path, monkeypatch, **settings)
    text, num_pictures = outputs_of(executed)
    assert "train: 240 images with label maps of 4 classes in 'shapes'" in text
    assert "held out: 24 images" in text
    learned = float(re.search(r"^mIoU on 24 photos that it has never seen: ([0-9.]+) %$", text, re.M)[1])
    assert learned > 35  # all background: 20
    assert float(re.search(r"the same class for ([0-9.]+)% of the pixels", text)[1]) > 99.9
    on_phone = float(re.search(r"^mIoU of the 8-bit file, [0-9.]+ MB: ([0-9.]+) %$", text, re.M)[1])
    assert on_phone > learned - 8  # squeezed photos, in 8 bits
    assert num_pictures == 4  # masks, loss, predictions, on the phone
    sizes = [(tmp_path / f"mine_{name}.tflite").stat().st_size for name in ("float32", "int8")]
    assert sizes[1] < 0.4 * sizes[0]


@RUNS
def test_pretrain_goes_from_photos_without_labels_to_a_few_labels(tmp_path, monkeypatch):
    weights = "convnextv2_atto.tiny_imagenet200"  # in the package
    settings = {"WEIGHTS": weights, "IMAGE_SIZE": "96", "EPOCHS": "2", "TUNED_EPOCHS": "1"}
    text, num_pictures = outputs_of(execute(PRETRAIN, tmp_path, monkeypatch, **settings))
    assert "without labels: 150 images in 'photos/train', in 5 folders" in text
    losses = re.search(r"^loss ([0-9.]+), of new photos ([0-9.]+);", text, re.M)
    assert losses and max(map(float, losses.groups())) < 1.1
    probes = re.findall(r"^linear probe (before|after): ([0-9.]+) % of 150 photos$", text, re.M)
    assert [name for name, _ in probes] == ["before", "after"]
    assert all(20 < float(score) < 100 for _, score in probes)  # 20 by chance
    tuned = re.findall(r"^fine-tuned (before|after): ([0-9.]+) %, with 15 labels$", text, re.M)
    assert [name for name, _ in tuned] == ["before", "after"]
    assert num_pictures == 2  # curves, reconstructions


def tables_of(notebook):
    """The rows of each table, as lists of cells, without the line under the header."""
    outputs = [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]
    texts = [output.data["text/markdown"] for output in outputs if "text/markdown" in output.get("data", {})]
    return [
        [line.strip("| ").split(" | ") for line in text.splitlines() if not line.startswith("| ---")]
        for text in texts
    ]


@RUNS_EXPORT
def test_export_goes_from_a_model_to_an_app(tmp_path, monkeypatch):
    executed = execute(EXPORT, tmp_path, monkeypatch, IMAGE_SIZE="128", SERVER_FILES="atto.onnx")
    text, num_pictures = outputs_of(executed)
    assert "convnextv2_atto: 3,708,400 RANDOM weights; the names below are chance\n" in text
    assert "parameters: 3,708,400 -> 3,696,160\n" in text
    assert float(re.search(r"largest difference: (\S+) of the largest logit\n", text)[1]) < 1e-5
    assert num_pictures == 1  # of the files
    assert not re.search(r"INFO:|Traceback", text)

    phone, every, top = tables_of(executed)
    precisions = ["float32", "dynamic_int8", "int8"]
    files = [f"atto_{precision}.tflite" for precision in precisions]
    assert [row[:3] for row in every[1:]] == [
        *([file, "litert", precision] for file, precision in zip(files, precisions, strict=True)),
        ["atto.onnx", "onnx", "float32"],
    ]
    assert every[:4] == phone
    with open(tmp_path / "report" / "exports.csv", newline="") as file:
        assert [row["path"] for row in csv.DictReader(file)] == [*files, "atto.onnx"]

    assert top[0] == ["Keras model", *files] and len(top) == 6
    keras_model, float32, dynamic, _ = zip(*top[1:], strict=True)
    assert keras_model == float32
    assert len(set(keras_model) & set(dynamic)) >= 2  # of 5 among 1000, by chance none
    first_of_the_program = re.search(r"^ +([0-9.]+)%  (.+)$", text, re.MULTILINE)
    assert float32[0].startswith(first_of_the_program[2].split(",")[0])

    content = (tmp_path / files[0]).read_bytes()  # where the Kotlin of android.md looks for the labels
    (directory,) = struct.unpack_from("<i", content, len(content) - 6)
    (begin,) = struct.unpack_from("<i", content, directory + 42)
    assert content[begin : begin + 4] == b"PK\x03\x04"

    assert "Got 112 but expected 128 for dimension 1" in text
    assert "Got value of type UINT8 but expected type FLOAT32" in text
    assert "Expected images of 128 x 128 x 3 (height x width x channels), received" in text


@pytest.mark.once
def test_the_app_of_the_export_notebook_imports_no_keras():
    (program,) = (
        cell.source
        for cell in nbformat.read(EXPORT, as_version=4).cells
        if cell.source.startswith("%%writefile")
    )
    nodes = ast.walk(ast.parse(program.partition("\n")[2]))
    names = [
        name.split(".")[0]
        for node in nodes
        if isinstance(node, ast.Import | ast.ImportFrom)
        for name in (
            [node.module] if isinstance(node, ast.ImportFrom) else [each.name for each in node.names]
        )
    ]
    assert set(names) - sys.stdlib_module_names == {"PIL", "ai_edge_litert", "numpy"}


@RUNS
def test_roadmap_draws_the_figure_the_blocks_and_the_times(tmp_path, monkeypatch):
    columns = ("backend", "step", "name", "layers", "milliseconds", "backend_version", "batch", "image_size")
    rows = [
        ("jax", 0, "ResNet", "plain", 12.5, "0.1", 8, 64),
        ("torch", 0, "ResNet", "plain", 9, "2.0", 8, 64),
    ]
    lines = [(*columns, "cpu", "cores"), *((*row, "a CPU", 2) for row in rows)]
    (tmp_path / "times.csv").write_text("\n".join(",".join(map(str, line)) for line in lines))
    executed = execute(ROADMAP, tmp_path, monkeypatch, TIMES=str(tmp_path / "times.csv"))
    text, num_pictures = outputs_of(executed)
    assert num_pictures == 3  # figure 2, blocks, times
    assert " 0  ResNet                 76.13 %  4.089 G  25,557,032 weights\n" in text
    assert "tiny, BN to LN: printed 4.46, counted 4.146\ntiny, separate downsampling: printed 4.49" in text
    assert "base, " not in text
    assert "8 images of 64 pixels a call; a CPU, 2 cores\n" in text
    fits = re.findall(r"([\d,]+) weights, ([\d,]+) counted, loss ([\d.]+) to ([\d.]+)\n", text)
    assert len(fits) == 3 and all(
        own == counted and float(last) < float(first) for own, counted, first, last in fits
    )


@pytest.mark.once
def test_roadmap_is_what_its_program_makes():
    program = importlib.util.spec_from_file_location("make_roadmap", ROOT / "tools" / "make_roadmap.py")
    module = importlib.util.module_from_spec(program)
    program.loader.exec_module(module)
    assert module.notebook() == ROADMAP.read_text(), "run: python tools/make_roadmap.py"
    text = "".join(cell for kind, cell in module.cells() if kind == "markdown")
    for number, row in enumerate(roadmap.STEPS):
        assert f"### {number}. {row.name}" in text and row.why in text
    assert "- block = 'inverted'\n+ block = 'moved up'\n" in text


@RUNS
def test_a_failing_cell_fails_the_test(tmp_path, monkeypatch):
    broken = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell("raise ValueError('on purpose')")])
    nbformat.write(broken, tmp_path / "broken.ipynb")
    with pytest.raises(nbclient.exceptions.CellExecutionError, match="on purpose"):
        execute(tmp_path / "broken.ipynb", tmp_path, monkeypatch)


@pytest.mark.once
def test_every_notebook_is_run_by_a_test():
    assert [CLASSIFY, EXPORT, FEATURES, FINE_TUNE, PRETRAIN, ROADMAP, SEGMENT] == NOTEBOOKS


@pytest.mark.once
@BY_NAME
def test_notebooks_are_kept_without_outputs(notebook):
    """Photos in outputs have licences of their own, and differences of outputs hide those of code."""
    kept = nbformat.read(notebook, as_version=4)
    nbformat.validate(kept)
    code = [cell for cell in kept.cells if cell.cell_type == "code"]
    assert code and all(not cell.outputs and cell.execution_count is None for cell in code)


@pytest.mark.once
@BY_NAME
def test_notebooks_import_the_package_before_keras(notebook):
    """Its import sets variables that the backends read when they are imported."""
    code = "".join(cell.source + "\n" for cell in nbformat.read(notebook, as_version=4).cells)
    lines = re.findall(r"^(?:import|from) ((?:keras|keras_convnext)\b)", code, re.M)
    assert lines.index("keras_convnext") < lines.index("keras")
