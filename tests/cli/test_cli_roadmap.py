"""`keras-convnext roadmap`: the table, and training that says what is noise."""

import csv
import json
import pathlib
import shutil
import warnings

import keras
import numpy as np
import pytest

from keras_convnext import predictor, roadmap

FLOWERS = pathlib.Path(__file__).parents[2] / "recipes" / "flowers"
PHOTO = pathlib.Path(__file__).parents[1] / "images" / "chelsea.png"


@pytest.mark.once
def test_the_table_has_a_row_for_each_step_and_names_what_does_not_fit(run):
    code, out, err = run("roadmap")
    assert (code, err) == (0, "")
    title, *lines = out.splitlines()
    assert title.split() == ["step", "top-1,", "%", "printed", "G", "G", "weights", "changes"]
    for number, (row, line) in enumerate(zip(roadmap.STEPS, lines, strict=False)):
        cost = roadmap.cost(number)
        assert line.split()[0] == str(number) and f"{cost.weights:,}" in line and f"{row.top1:.2f}" in line
        assert f"{cost.multiply_adds / 1e9:.3f}" in line
        assert ("*" in line) == (number in (15, 16)) and (f"({row.name})" in line) != row.kept
    assert max(map(len, lines[:17])) <= 110
    assert (
        "8  (kernel size 5)" in out and "block: moved up" in out and "4.46 is what the next step has" in out
    )
    code, out, _ = run("roadmap", "--regime", "base")
    assert code == 0 and "*" not in out and "depths: 3, 3, 27, 3; width: 84" in out
    assert "nothing is published" in run("roadmap", "--regime", "atto")[1]


@pytest.mark.once
def test_json_has_both_what_is_printed_and_what_is_counted(run):
    rows = json.loads(run("roadmap", "--json")[1])
    assert [row["name"] for row in rows] == [row.name for row in roadmap.STEPS]
    assert rows[0]["weights"] == 25_557_032 and rows[0]["changes"]["stem"] == "convolution and pooling"
    assert rows[7]["changes"] == {"block": "moved up"} and rows[7]["top1_std"] == 0.08
    assert [row["step"] for row in rows if not row["gflops_fit"]] == [15, 16]
    own = json.loads(run("roadmap", "--json", "--regime", "atto")[1])
    assert {(row["top1"], row["gflops"], row["gflops_fit"]) for row in own} == {(None, None, None)}
    assert [row["step"] for row in rows if not row["kept"]] == [8, 10, 11]


@pytest.mark.once
def test_what_cannot_be_done_is_refused(refused, tmp_path):
    assert "Unknown regime 'bse'. Did you mean 'base'" in refused("roadmap", "--regime", "bse")
    for words in (["--steps", "1", "7"], ["--seeds", "3"], ["--set", "epochs=3"], ["--out", "x"]):
        assert "Expected --train PATH beside" in refused("roadmap", *words)
    assert "Expected --out DIR" in refused("roadmap", "--train", FLOWERS)


@pytest.mark.one_backend
@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--steps", "0", "7"], "Expected steps from 1 to 16: step 0 is the model of step 1"),
        (["--steps", "kernel size 8"], "Unknown step 'kernel size 8'. Did you mean 'kernel size"),
        (["--steps", "1", "--set", "ema_decay=0.9"], "ema_decay = 0.0, received 0.9"),
        (["--steps", "1", "--set", "accumulation_steps=2"], "accumulation_steps = 1, received 2"),
        (
            ["--set", "seed=5"],
            "Expected the number of seeds, which are 0, 1, ... for every step, received seed=",
        ),
        (["--set", "run.seed=5"], "Pass seeds=3 (--seeds 3) alone."),
        (["--set", "architecture=convnext_tiny"], "architecture = 'convnext_atto', received 'convnext_tiny'"),
        (["--set", "optimizer.epochs=0"], "epochs: "),
        (["--train", "nothing"], "but nothing is there"),
        (["--train", PHOTO.parent], "Expected one folder a class"),
    ],
)
def test_what_training_refuses_leaves_nothing(refused, tmp_path, words, message):
    assert message in refused("roadmap", "--train", FLOWERS, "--out", tmp_path / "out", *words)
    assert not (tmp_path / "out").exists()


@pytest.mark.one_backend
def test_training_refuses_data_without_images_to_evaluate_on_and_a_file(refused, tmp_path):
    for name in ("daisy", "rose"):
        (tmp_path / "photos" / name).mkdir(parents=True)
        shutil.copy(PHOTO, tmp_path / "photos" / name / "1.png")
    words = ["roadmap", "--train", tmp_path / "photos", "--set", "validation_fraction=0"]
    assert "Expected images to evaluate on" in refused(*words, "--out", tmp_path / "out")
    assert not (tmp_path / "out").exists()
    (tmp_path / "file").touch()
    message = refused("roadmap", "--train", FLOWERS, "--out", tmp_path / "file")
    assert "Expected a folder for the runs, received the file" in message


@pytest.mark.slow
@pytest.mark.one_backend
def test_steps_are_trained_alike_and_the_command_resumes(run, tmp_path):
    sizes = ("image_size=32", "eval_image_size=32", "batch_size=16", "epochs=1")
    words = ["roadmap", "--train", FLOWERS, "--out", tmp_path / "out", "--steps", "16", "enhanced recipe"]
    words += ["--seeds", "2", "--quiet", *(word for size in sizes for word in ("--set", size))]
    code, out, _ = run(*words)
    assert code == 0
    with open(tmp_path / "out" / "road.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(row["step"], row["seed"]) for row in rows] == [("1", "0"), ("16", "0"), ("1", "1"), ("16", "1")]
    assert len({row["updates"] for row in rows}) == 1
    assert out.count("noise of ") == 1 and "enhanced recipe -> separate downsampling: " in out
    assert (tmp_path / "out" / "road.png").read_bytes().startswith(b"\x89PNG")
    scores = {row["step"] + row["seed"]: float(row["top1"]) for row in rows}
    final = tmp_path / "out" / "01-seed1" / "final.keras"
    model = keras.models.load_model(final)
    assert model.name == "road_1_atto" and model.output_shape == (None, 5)
    assert final.with_name("final.labels.txt").read_text().split()[0] == "daisy"
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)  # of Keras: images are no list
        opened = predictor.open_predictor(final)
        opened.model.predict_on_batch(np.zeros((1, 32, 32, 3), "float32"))
    assert opened.preprocessing.crop_fraction == 1.0  # as in the scores

    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*.h5")}
    code, out, _ = run(*words, "--json")  # of runs that have ended
    result = json.loads(out[out.index("{") :])
    assert code == 0 and result["steps"][0]["top1"] == [scores["10"], scores["11"]]
    assert before == {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*.h5")}
    code, _, err = run(*words[:5], "--steps", "2", "--set", "epochs=1", "--set", "batch_size=100000")
    assert code == 2 and "Choose a smaller batch_size" in err
