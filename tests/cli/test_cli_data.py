"""`keras-convnext evaluate` and `prepare`."""

import csv
import io
import json
import pathlib
import re
import tarfile

import numpy as np
import pytest
import timm
import torch
from PIL import Image

from keras_convnext.cli import evaluate as evaluate_module
from keras_convnext.cli import main, shared
from keras_convnext.data.class_names import synset_ids
from keras_convnext.data.sources import open_source
from keras_convnext.evaluation.results import COLUMNS, IMAGENET_VALIDATION, read_results

IMAGES = pathlib.Path(__file__).parents[1] / "images"
PHOTOGRAPHS = sorted([*IMAGES.glob("*.jpg"), *IMAGES.glob("*.png")])
SAMPLES = pathlib.Path(__file__).parents[3] / "shared/data/imagenet_samples"
TAG = "test_convnext2.r160_in1k"
NUM_IMAGES = 5


pytestmark = [pytest.mark.one_backend, pytest.mark.usefixtures("weights_folder")]


def jpeg(number):
    photograph = Image.open(PHOTOGRAPHS[number % 3]).convert("RGB")
    file = io.BytesIO()
    photograph.crop((30 * number, 0, 30 * number + 250, 200)).save(file, "JPEG", quality=90)
    return file.getvalue()


@pytest.fixture(scope="module")
def tars(tmp_path_factory):
    """ImageNet's validation tar with the first images of it replaced by pictures of ours."""
    folder = tmp_path_factory.mktemp("tars")
    with tarfile.open(folder / "ILSVRC2012_img_val.tar", "w") as archive:
        for number in range(NUM_IMAGES):
            member = tarfile.TarInfo(f"ILSVRC2012_val_{number + 1:08d}.JPEG")
            content = jpeg(number)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return folder


@pytest.fixture(scope="module")
def leaves(tmp_path_factory):
    """Two folders of classes, one damaged image of five."""
    folder = tmp_path_factory.mktemp("leaves")
    for number, name in enumerate(["n01440764", "n01440764", "n01443537", "n01443537", "n01443537"]):
        (folder / name).mkdir(exist_ok=True)
        content = jpeg(number)
        (folder / name / f"{number}.jpg").write_bytes(content[: 200 if number == 3 else None])
    return folder


def test_tars_prepared_and_evaluated_score_as_the_timm_pipeline(run, peer, tars):
    pytest.importorskip("tensorflow_datasets")  # has the labels of the validation images
    code, out, err = run("prepare", tars, "prepared", "--shards", 2, "--verify")
    assert (code, err) == (0, "")
    assert re.search(r"validation +5 images, shards: 2", out) and "verified" in out
    code, out, err = run(
        "evaluate", TAG, "--data", "prepared", "--batch-size", 2, "--json", "--output", "report",
    )  # fmt: skip
    assert (code, err) == (0, "")
    facts = json.loads(out)

    transform = timm.data.create_transform(**timm.data.resolve_data_config({}, model=peer))
    images = [transform(Image.open(io.BytesIO(jpeg(number)))) for number in range(NUM_IMAGES)]
    with torch.no_grad():
        logits = peer(torch.stack(images)).numpy()
    order = np.argsort(-logits, axis=1)
    source = open_source(tars)
    with open("report/predictions.csv", newline="") as file:
        rows = {row["name"]: row for row in csv.DictReader(file)}
    wnids = synset_ids(1000)
    for number in range(NUM_IMAGES):
        row = rows[source.name(number)]
        assert row["label"] == wnids[source.labels[number]]
        assert row["predicted_1"] == wnids[order[number, 0]]
        rank = order[number].tolist().index(source.labels[number])
        assert abs(int(row["rank"]) - rank) <= 1  # two of 1000 logits may be as near as rounding
    assert len({row["predicted_1"] for row in rows.values()}) > 1
    assert facts["top1"] == 100 * np.mean([row["rank"] == "0" for row in rows.values()])
    assert (facts["n"], facts["skipped"], facts["faults"]) == (NUM_IMAGES, 0, {})
    assert (facts["image_size"], facts["crop"], facts["outputs"]) == ("160", "0.95", "all 1000")
    assert (facts["split"], facts["licence"], facts["weights"]) == (
        "validation",
        "apache-2.0",
        f"{TAG}.safetensors",
    )
    assert [row["model"] for row in read_results("results.csv")] == [TAG]


@pytest.mark.once
def test_the_summary_is_for_a_person(run, leaves, weights_folder):
    words = (
        "evaluate",
        "test_convnext2",
        "--weights",
        weights_folder / f"{TAG}.safetensors",
        "--data",
        leaves,
    )
    code, out, err = run(*words, "--image-size", 64, "--max-faults", 0.2, "--results", "scores.csv")
    assert code == 1  # one image could not be read
    assert err.count("keras-convnext: error: ") == 1 and "n01443537/3.jpg" in err and "Traceback" not in err
    for pattern in (
        r"^test_convnext2\.r160_in1k\.safetensors on leaves",
        r"top-1 +\d+\.\d\d %$",
        r"top-5 +100\.00 %$",
        r"images +4 \(1 skipped\), split none$",
        r"outputs +2 of 1000, by WordNet id$",
        r"prepared +shorter_side, bicubic, crop 0\.95, 64 pixels$",
        r"speed +[\d,.]+ images/s, [\d,.]+ s in all$",
        r"licence +not known: weights of your own$",
        r"row added to +scores\.csv$",
    ):
        assert re.search(pattern, out, re.M), pattern
    assert not pathlib.Path("results.csv").exists()
    (row,) = read_results("scores.csv")
    assert tuple(row) == COLUMNS and row["skipped"] == "1"
    assert run(*words, "--image-size", 64, "--max-faults", 0.2, "--no-results")[0] == 1
    assert sorted(path.name for path in pathlib.Path().iterdir()) == ["scores.csv"]


@pytest.mark.once
def test_the_published_score_is_named_where_it_is_comparable():
    row = {"model": "convnext_tiny.fb_in1k", "data_sha256": IMAGENET_VALIDATION, "image_size": "224"}
    assert evaluate_module._published_text(row) == ", published 82.066 %"
    for change in ({"image_size": "288"}, {"data_sha256": "0" * 64}, {"model": "my.keras"}):
        assert evaluate_module._published_text(row | change) == ""


@pytest.mark.once
def test_evaluate_says_what_is_wrong(refused, leaves, tmp_path):
    assert "Expected at most 0.01 of the 5 images" in refused("evaluate", TAG, "--data", leaves)
    assert not pathlib.Path("results.csv").exists()
    assert "nothing is there" in refused("evaluate", TAG, "--data", tmp_path / "missing")
    assert "Did you mean 'convnext_tiny'" in refused("evaluate", "convnext_tinny", "--data", leaves)
    assert "has no classifier" in refused("evaluate", "convnext_tiny.dinov3_hf", "--data", leaves)
    assert "No such weight file" in refused("evaluate", "missing.safetensors", "--data", leaves)
    assert "max_share in [0, 1], received 3.0" in refused(
        "evaluate", TAG, "--data", leaves, "--max-faults", 3
    )
    assert "is not divided into splits" in refused("evaluate", TAG, "--data", leaves, "--split", "test")
    for name in ("ash", "beech", "oak"):
        (tmp_path / "trees" / name).mkdir(parents=True)
        (tmp_path / "trees" / name / "0.jpg").write_bytes(jpeg(0))
    message = refused("evaluate", TAG, "--data", tmp_path / "trees")
    assert "the 1000 classes of the model" in message and "received 3: ash, beech, oak. Pass" in message
    (tmp_path / "old.csv").write_text("model,top1\n")
    message = refused("evaluate", TAG, "--data", leaves, "--results", tmp_path / "old.csv")
    assert "Expected the columns of this version" in message


@pytest.mark.once
def test_many_damaged_images_are_not_all_printed(run, monkeypatch, tmp_path):
    for number in range(30):
        folder = tmp_path / "data" / synset_ids(1000)[number % 2]
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{number:02}.jpg").write_bytes(jpeg(0)[: None if number < 4 else 100])
    code, _, err = run("evaluate", TAG, "--data", tmp_path / "data", "--max-faults", 1, "--batch-size", 4)
    assert code == 1
    assert len(err.splitlines()) == shared.MAX_FAULTS_SHOWN + 1
    assert err.endswith("error: 6 more images; --output or --json names them all\n")


@pytest.mark.once
def test_prepare_keeps_what_is_there_and_says_what_is_wrong(run, refused, leaves, tmp_path):
    code, out, err = run("prepare", leaves, "out", "--json", "--seed", 3)
    facts = json.loads(out)
    assert (code, err, facts["images"], facts["shards"]) == (0, "", {"train": 5}, {"train": 1})
    assert (facts["num_kept"], facts["verified"]) == (0, False)
    code, out, _ = run("prepare", leaves, "out", "--seed", 3, "--workers", 1)
    assert code == 0 and re.search(r"kept +shards: 1", out)
    assert "shuffle_seed=4" in refused("prepare", leaves, "out", "--seed", 4)
    assert "nothing is there" in refused("prepare", tmp_path / "missing", "other")
    assert "one shard for each of the 5 images" in refused("prepare", leaves, "other", "--shards", 6)


@pytest.mark.once
def test_prepare_reports_damage_that_verify_finds(refused, leaves, monkeypatch):
    from keras_convnext.data import records

    monkeypatch.setattr(records, "verify", lambda *_: ["train-00000-of-00001.tfrecord"])
    message = refused("prepare", leaves, "out", "--verify")
    assert "Damaged in out: train-00000-of-00001.tfrecord. Run the same command again" in message


@pytest.mark.once
def test_help_shows_examples(capsys):
    for command, text in (("evaluate", "--data imagenet/val"), ("prepare", "--shards 64 --verify")):
        with pytest.raises(SystemExit) as ended:
            main.main([command, "--help"])
        assert ended.value.code == 0 and text in capsys.readouterr().out
    for words, text in (
        (["evaluate", "x"], "--data"),
        (["evaluate", "x", "--data", "y", "--limit", "0"], "expected a whole number from 1 up, received '0'"),
        (["prepare", "x"], "OUTPUT"),
    ):
        with pytest.raises(SystemExit) as ended:
            main.main(words)
        assert ended.value.code == 2 and text in capsys.readouterr().err


@pytest.mark.once
def test_real_photographs_keep_their_labels_from_folder_to_report(run, tmp_path):
    if not SAMPLES.exists():
        pytest.skip("the ImageNet samples are not beside the repository")
    with open(SAMPLES / "labels.csv", newline="") as file:
        rows = list(csv.DictReader(file))[::10]
    for row in rows:
        folder = tmp_path / "data" / "val" / row["wnid"]
        folder.mkdir(parents=True)
        (folder / row["file"]).symlink_to(SAMPLES / "images" / row["file"])
    code, _, _ = run("evaluate", TAG, "--data", tmp_path / "data", "--output", "report", "--batch-size", 4)
    assert code == 0
    with open("report/predictions.csv", newline="") as file:
        labels = {pathlib.Path(row["name"]).name: row["label"] for row in csv.DictReader(file)}
    assert labels == {row["file"]: row["wnid"] for row in rows}
