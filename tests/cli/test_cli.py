"""The command line: what it prints, what it refuses and how it ends."""

import dataclasses
import json
import os
import pathlib
import re
import shutil
import subprocess
import sys

import keras
import numpy as np
import pytest
import timm
import torch
from peers import randomise
from PIL import Image
from safetensors.torch import load_file, save_file

import keras_convnext
from keras_convnext.cli import main, shared
from keras_convnext.cli import predict as predict_module
from keras_convnext.cli.predict import Classifier
from keras_convnext.data.preprocess import preprocess_image, read_image
from keras_convnext.data.preprocessing import Preprocessing
from keras_convnext.predictor import Predictor
from keras_convnext.variants import VARIANTS
from keras_convnext.weights import catalog, layouts, safetensors_files
from keras_convnext.weights.catalog import CHECKPOINTS, IMAGENET, list_weights

IMAGES = pathlib.Path(__file__).parents[1] / "images"
PHOTOGRAPHS = sorted([*IMAGES.glob("*.jpg"), *IMAGES.glob("*.png")])
TAG = "test_convnext2.r160_in1k"


pytestmark = [pytest.mark.one_backend, pytest.mark.usefixtures("weights_folder")]


def weights(folder):
    return folder / f"{TAG}.safetensors"


def altered(folder, path, change):
    """A copy of the weights of `TAG` with a change made to its dictionary."""
    state = load_file(weights(folder))
    change(state)
    save_file(state, path)
    return path


# list


@pytest.mark.once
@pytest.mark.parametrize(
    ("words", "conditions"),
    [
        ([], {}),
        (["convnextv2_*"], {"architecture": "convnextv2_*"}),
        (["convnext_tiny", "--classes", "21841"], {"architecture": "convnext_tiny", "classes": 21841}),
        (["--classes", "0"], {"classes": 0}),
        (["--image-size", "384"], {"image_size": 384}),
        (["--licence", "mit"], {"licence": "mit"}),
        (["--commercial"], {"commercial_use": True}),
        (["--downloadable", "--commercial"], {"downloadable": True, "commercial_use": True}),
        (["--task", "segmentation"], {"task": "segmentation"}),
        (["convnextv2_*", "--commercial", "--downloadable"],
         {"architecture": "convnextv2_*", "commercial_use": True, "downloadable": True}),
    ],
)  # fmt: skip
def test_list_prints_the_tags_that_list_weights_returns(run, words, conditions):
    expected = list_weights(**conditions)
    code, out, err = run("list", *words)
    lines = out.splitlines()
    assert (code, err) == (0, "")
    assert [line.split()[0] for line in lines[1:-2]] == expected
    assert lines[-1].startswith(f"{len(expected)} of {len(CHECKPOINTS)} weight files.")
    code, out, _ = run("list", *words, "--json")
    assert [row["tag"] for row in json.loads(out)] == expected


@pytest.mark.once
def test_list_is_aligned_and_fits_in_120_characters(run):
    _, out, _ = run("list")
    title, *rows = out.splitlines()[:-2]
    assert max(map(len, [title, *rows])) <= 120
    start = title.index("licence")
    assert all(row[start - 2 : start] == "  " and row[start] != " " for row in rows)
    assert re.search(
        r"^convnext_tiny\.torchvision_in1k +1000  224 @ 0\.949  82\.52  bsd-3-clause +torch", out, re.M
    )
    assert re.search(r"^convnext_tiny\.dinov3_hf +-  224 @ 1 +-  dinov3-license +dinov3_hf$", out, re.M)


@pytest.mark.once
def test_list_and_info_show_task_and_miou_of_segmenters(run):
    _, out, _ = run("list")
    assert re.search(r"^convnext_tiny\.fb_ade20k_512 +150/px  512 @ 1 +46\.00  mit +mmseg$", out, re.M)
    assert "of segmenters (classes/px) mIoU" in out.splitlines()[-1]
    _, out, _ = run("list", "--task", "segmentation")
    assert re.search(
        r"^convnext_tiny\.mmseg_ade20k_512 +150/px  512 +46\.11 / 46\.62  apache-2\.0 ", out, re.M
    )
    out = run("info", "convnext_tiny.fb_ade20k_512")[1]
    for pattern in (
        "task +segmentation$",
        "parameters +60,242,636$",
        "classes +150$",
        "mIoU +46.0 / 46.7 %, one scale / several: semantic_segmentation/README.md$",
        "resize +shorter side to 512, longer to 2048 at most",
    ):
        assert re.search(pattern, out, re.M), pattern
    facts = json.loads(run("info", "convnext_xlarge.fb_ade20k_640", "--json")[1])
    assert (facts["task"], facts["parameters"], facts["miou"]) == ("segmentation", 391_140_396, 53.6)


@pytest.mark.once
def test_list_architectures_prints_every_variant_with_its_size(run):
    _, out, _ = run("list", "--architectures")
    rows = out.splitlines()[1:-2]
    assert [row.split()[0] for row in rows] == list(VARIANTS)
    for row, variant in zip(rows, VARIANTS.values(), strict=True):
        assert f"{variant.parameters:,}" in row and ", ".join(map(str, variant.dims)) in row
    _, out, _ = run("list", "convnextv2_*", "--architectures", "--json")
    assert [row["name"] for row in json.loads(out)] == [
        name for name in VARIANTS if name.startswith("convnextv2_")
    ]


@pytest.mark.once
def test_unknown_names_come_with_near_ones(refused):
    assert "Did you mean 'convnext_tiny'" in refused("list", "convnext_tinny")
    assert "Unknown licence 'apache2'. Did you mean 'apache-2.0'" in refused("list", "--licence", "apache2")
    assert "Unknown task 'segment'. Did you mean 'segmentation'" in refused("list", "--task", "segment")
    assert "Did you mean 'convnext_tiny'" in refused("info", "convnext_tinny")
    assert "'convnext_tiny.fb_in1k'" in refused("info", "convnext_tiny.fb_in1")
    assert "'convnext_tiny.fb_in1k'" in refused("predict", PHOTOGRAPHS[0], "--model", "convnext_tiny.fb_in1")
    assert "Did you mean 'convnext_pico'" in refused("predict", PHOTOGRAPHS[0], "--model", "convnext_picko")
    assert "'convnext_tiny.fb_in1k'" in refused("convert", "convnext_tiny.fb_in1", "never.pth")


# info


@pytest.mark.once
def test_info_of_an_architecture(run):
    code, out, err = run("info", "convnext_isotropic_large")
    assert (code, err) == (0, "")
    for text in ("305,942,504", "36", "1024", "Liu et al. 2022", "convnext_isotropic_large.official_in1k"):
        assert text in out
    _, out, _ = run("info", "convnextv2_small")
    assert "no ImageNet file was published" in out
    facts = json.loads(run("info", "convnext_tiny", "--json")[1])
    assert facts["parameters"] == 28_589_128
    assert facts["imagenet"] == shared.DEFAULT_MODEL == IMAGENET["convnext_tiny"]
    assert facts["weights"] == list_weights("convnext_tiny")


@pytest.mark.once
def test_info_of_a_tag_says_all_the_table_says(run):
    code, out, err = run("info", "convnextv2_tiny.fcmae_ft_in22k_in1k_384")
    assert (code, err) == (0, "")
    for text in (
        "convnextv2_tiny,",
        "28,635,496",
        "3, 3, 9, 3",
        "cc-by-nc-4.0: NOT for commercial use",
        "both sides to 384, bicubic",
        "0.485, 0.456, 0.406",
        "85.098 % at 384, as published: timm results-imagenet.csv",
        "timm/convnextv2_tiny.fcmae_ft_in22k_in1k_384, model.safetensors",
    ):
        assert text in out
    assert re.search("on this machine +no$", out, re.M)
    assert (
        "shorter side to 236, bilinear, then the central 224 x 224"
        in run("info", "convnext_tiny.torchvision_in1k")[1]
    )
    assert "640 features of the CLIP projection" in run("info", "convnext_base.clip_laion2b")[1]
    assert "Accept the licence" in run("info", "convnext_tiny.dinov3_hf")[1]
    assert run("info", "convnext_tiny_in22k")[1].startswith("convnext_tiny.fb_in22k\n")  # timm's old name


@pytest.mark.once
def test_info_knows_the_file_that_is_here_already(run, weights_folder):
    facts = json.loads(run("info", TAG, "--json")[1])
    assert facts["local_file"] == str(weights(weights_folder))
    assert facts["parameters"] == 477_800
    assert facts["commercial_use"] is True
    cached = pathlib.Path(os.environ["KERAS_CONVNEXT_CACHE"]) / "convnext_tiny.h5"
    cached.touch()
    out = run("info", "convnext_tiny.keras_applications")[1]
    cached.unlink()
    assert re.search(f"on this machine +{re.escape(str(cached))}$", out, re.M)


@pytest.mark.once
def test_info_of_a_file_says_what_it_holds(run, peer, weights_folder):
    code, out, err = run("info", weights(weights_folder))
    assert (code, err) == (0, "")
    for pattern in (
        "architecture +test_convnext2, ConvNeXt V1",
        "layout +timm$",
        f"arrays +{len(peer.state_dict())}$",
        "parameters +477,800$",
        "dtype +float32$",
        "classes +1000$",
        "channels +3$",
        "metadata 'format' +pt$",
    ):
        assert re.search(pattern, out, re.M), pattern
    facts = json.loads(run("info", weights(weights_folder), "--json")[1])
    assert (facts["classes"], facts["metadata"]) == (1000, {"format": "pt"})


# predict


@pytest.mark.every_backend
def test_predict_equals_the_timm_pipeline(run, peer):
    code, out, err = run("predict", IMAGES, "--model", TAG, "--top", 1000, "--batch-size", 2, "--json")
    assert (code, err) == (0, "")
    results = json.loads(out)
    assert [result["file"] for result in results] == [str(path) for path in sorted(PHOTOGRAPHS)]
    transform = timm.data.create_transform(**timm.data.resolve_data_config({}, model=peer))
    classes = timm.data.ImageNetInfo()
    for result in results:
        image = transform(Image.open(result["file"]).convert("RGB"))
        with torch.no_grad():
            expected = peer(image[None]).softmax(-1)[0].numpy()
        assert expected.max() > 0.02  # the tolerance is small against what is compared
        predictions = result["predictions"]
        indices = [prediction["class_index"] for prediction in predictions]
        probabilities = np.array([prediction["probability"] for prediction in predictions])
        assert sorted(indices) == list(range(1000))
        assert (np.diff(probabilities) <= 0).all()
        np.testing.assert_allclose(probabilities, expected[indices], rtol=0, atol=1e-4)
        assert indices[0] == expected.argmax()
        for prediction in predictions[:50]:
            synset = classes.index_to_label_name(prediction["class_index"])
            assert prediction["synset"] == synset
            assert prediction["name"] == classes.label_name_to_description(synset, detailed=False)


def test_predict_reports_what_it_cannot_read_and_goes_on(run, weights_folder, tmp_path):
    text = tmp_path / "text.jpg"
    text.write_text("not an image")
    code, out, err = run(
        "predict", text, PHOTOGRAPHS[0], tmp_path / "missing", "--weights", weights(weights_folder),
        "--image-size", 64, "--top", 2,
    )  # fmt: skip
    assert code == 1
    lines = out.splitlines()
    assert lines[0] == str(PHOTOGRAPHS[0]) and len(lines) == 3
    assert all(re.fullmatch(r"  +\d+\.\d\d %  \S.*", line) for line in lines[1:])
    assert err.count("keras-convnext: error: ") == 2 and "Traceback" not in err
    assert f"'{text}' is not one" in err and "begins with the text 'not an image'" in err
    assert f"'{tmp_path / 'missing'}', but nothing is there" in err


@pytest.mark.once
def test_predict_shows_its_progress_to_a_terminal_only(run, monkeypatch, tmp_path):
    for number in range(21):
        Image.new("RGB", (2, 2)).save(tmp_path / f"{number:02}.png")
    classifier = Classifier(None, ["black"], [], False)
    monkeypatch.setattr(predict_module, "_load_classifier", lambda _: classifier)
    monkeypatch.setattr(Classifier, "prepared", lambda *_: np.zeros((2, 2, 3), "uint8"))
    monkeypatch.setattr(Classifier, "__call__", lambda _, images: np.ones((len(images), 1), "float32"))
    assert run("predict", tmp_path, "--json")[2] == ""
    monkeypatch.setattr("sys.stderr.isatty", lambda: True, raising=False)
    assert run("predict", tmp_path, "--json")[2] == ""  # KERAS_CONVNEXT_QUIET is set in tests
    monkeypatch.delenv("KERAS_CONVNEXT_QUIET")
    code, out, err = run("predict", tmp_path, "--json", "--batch-size", 10)
    assert (code, len(json.loads(out))) == (0, 21)
    assert "predict, 10/21 images" in err


class _Odd:
    """A model of 8 pixels that gives what it is told, and notes what it is given."""

    name, input_shape = "odd", (None, 8, 8, 3)

    def __init__(self, *outputs):
        self.outputs, self.given = outputs, []

    def predict_on_batch(self, images):
        self.given.append(images)
        return np.full((len(images), len(self.outputs)), self.outputs, "float32")


@pytest.mark.once
@pytest.mark.parametrize("gives_logits", [True, False])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_predict_prints_no_probability_that_is_not_finite(
    refused, monkeypatch, tmp_path, gives_logits, value
):
    Image.new("RGB", (9, 9)).save(tmp_path / "a.png")
    opened = Predictor(_Odd(0.5, value), Preprocessing(8), file=pathlib.Path("x.safetensors"))
    monkeypatch.setattr(
        predict_module, "_load_classifier", lambda _: Classifier(opened, ["a", "b"], [], gives_logits)
    )
    said = "Expected numbers from x.safetensors, received infinite ones or NaN for 1 of 1 images."
    assert said in refused("predict", tmp_path)


@pytest.mark.once
def test_predict_keeps_images_at_the_size_of_the_model_only(run, monkeypatch, tmp_path):
    """Eight photographs of 100 million pixels would take 2.4 GB."""
    for number in range(3):
        Image.new("RGB", (90, 60), (number, 0, 0)).save(tmp_path / f"{number}.png")
    (tmp_path / "3.png").write_bytes((tmp_path / "2.png").read_bytes()[:100])
    odd = _Odd(0.25, 0.75)
    opened = Predictor(odd, Preprocessing(8))
    monkeypatch.setattr(
        predict_module, "_load_classifier", lambda _: Classifier(opened, ["a", "b"], [], False)
    )
    code, out, err = run("predict", tmp_path, "--batch-size", 2)
    assert code == 1 and err.count("truncated or corrupt") == 1 and out.count("75.00 %  b") == 3
    assert [images.shape for images in odd.given] == [(2, 8, 8, 3), (1, 8, 8, 3)]
    assert [images[0, 0, 0, 0] for images in odd.given] == [0, 2]


@pytest.mark.once
def test_predict_goes_on_where_a_picture_would_take_the_machine(run, monkeypatch, tmp_path):
    Image.new("RGB", (1, 40_000), (9, 0, 0)).save(tmp_path / "long.png")
    (tmp_path / "eps.jpg").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n")
    os.mkfifo(tmp_path / "pipe.jpg")
    opened = Predictor(_Odd(0.25, 0.75), Preprocessing(64))
    monkeypatch.setattr(
        predict_module, "_load_classifier", lambda _: Classifier(opened, ["a", "b"], [], False)
    )
    resize, sizes = Image.Image.resize, []
    monkeypatch.setattr(
        Image.Image, "resize", lambda *given, **box: sizes.append(given[1]) or resize(*given, **box)
    )
    code, out, err = run("predict", *sorted(tmp_path.iterdir()))
    assert sizes == [(64, 64)]  # not 73 x 2,920,000
    assert code == 1 and out.splitlines()[0].endswith("long.png")
    assert "begins with the text '%!PS" in err and "pipe.jpg' failed: Expected a file" in err


@pytest.mark.once
def test_predict_without_a_readable_image_ends_with_2(refused, monkeypatch, tmp_path):
    monkeypatch.setattr(predict_module, "_load_classifier", None)  # no model is needed to say so
    text = tmp_path / "text.jpg"
    text.write_text("not an image")
    assert "begins with the text 'not an image'" in refused("predict", text)
    assert "nothing is there" in refused("predict", tmp_path / "missing")
    assert "truncated or corrupt" in refused("predict", _truncated(PHOTOGRAPHS[1], tmp_path))
    empty = tmp_path / "empty"
    empty.mkdir()
    assert "found none: it is empty" in refused("predict", empty)
    if os.geteuid() != 0:
        empty.chmod(0)
        assert "may not look into" in refused("predict", empty)


def _truncated(path, folder):
    copy = folder / f"truncated{path.suffix}"
    copy.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    return copy


@pytest.mark.once
def test_predict_refuses_weights_without_classes(refused, weights_folder, tmp_path):
    message = refused("predict", PHOTOGRAPHS[0], "--model", "convnext_tiny.dinov3_lvd1689m")
    assert "has no classifier" in message and "example convnext_tiny.keras_applications" in message
    message = refused("predict", PHOTOGRAPHS[0], "--model", "convnext_base.clip_laion2b")
    assert "640 features of CLIP" in message and "example convnext_base.keras_applications" in message

    def drop_head(state):
        del state["head.fc.weight"], state["head.fc.bias"]

    path = altered(weights_folder, tmp_path / "body.safetensors", drop_head)
    assert "body.safetensors has no classifier" in refused("predict", PHOTOGRAPHS[0], "--weights", path)


@pytest.mark.once
def test_predict_says_why_a_file_does_not_fit(refused, weights_folder, tmp_path):
    def predict(change):
        path = altered(weights_folder, tmp_path / "changed.safetensors", change)
        return refused("predict", PHOTOGRAPHS[0], "--weights", path, "--model", "test_convnext2")

    message = predict(lambda state: state.pop("head.norm.weight"))
    assert "Missing (1): head.norm.weight (128,)" in message and "changed.safetensors" in message
    message = predict(lambda state: state.update(surplus=torch.zeros(1)))
    assert "Left over (1): surplus" in message
    message = predict(lambda state: state.update({"head.norm.bias": torch.zeros(127)}))
    assert "Of another shape or type (1): head.norm.bias: expected (128,), received (127,)" in message
    assert "those of 'test_convnext2'" in refused(
        "predict", PHOTOGRAPHS[0], "--weights", weights(weights_folder), "--model", "test_convnext3"
    )


def test_predict_takes_the_names_and_classes_of_a_fine_tuned_file(run, refused, weights_folder, tmp_path):
    def four_classes(state):
        state["head.fc.weight"] = state["head.fc.weight"][:4].clone()
        state["head.fc.bias"] = state["head.fc.bias"][:4].clone()

    path = altered(weights_folder, tmp_path / "four.safetensors", four_classes)
    labels = tmp_path / "labels.txt"
    labels.write_text("ash\nbeech\ncedar\nd\u00f6rnbush\n", encoding="utf-8")
    words = ("predict", PHOTOGRAPHS[0], "--weights", path, "--image-size", 64, "--json")
    unnamed = json.loads(run(*words)[1])[0]["predictions"]
    named = json.loads(run(*words, "--labels", labels, "--top", 2)[1])[0]["predictions"]
    assert sorted(row["name"] for row in unnamed) == ["class 0", "class 1", "class 2", "class 3"]
    assert sum(row["probability"] for row in unnamed) == pytest.approx(1, abs=1e-5)
    names = labels.read_text(encoding="utf-8").split()
    assert [row["name"] for row in named] == [names[row["class_index"]] for row in unnamed[:2]]
    assert "synset" not in named[0]
    labels.write_text("ash\nbeech\n")
    assert "for each of the 4 classes. Received 2 names" in refused(*words, "--labels", labels)


def test_predict_takes_probabilities_alone(run, refused, caplog, tmp_path):
    body = keras_convnext.load(TAG, include_top=False, pooling="avg", input_shape=(64, 64, 3))
    body.save(tmp_path / "body.keras")
    message = refused("predict", PHOTOGRAPHS[0], "--model", tmp_path / "body.keras")
    assert "Expected probabilities from" in message and "no classifier, or one without softmax" in message
    bare = keras_convnext.load(TAG, include_preprocessing=False, input_shape=(64, 64, 3))
    bare.save(tmp_path / "bare.keras")
    code, *_ = run("predict", PHOTOGRAPHS[0], "--model", tmp_path / "bare.keras")
    assert code == 0 and "bare.keras has no normaliser" in caplog.text
    one = keras.Sequential([body, keras.layers.Dense(1)])  # a softmax would make it 100 %
    one.save(tmp_path / "one.keras")
    message = refused("predict", PHOTOGRAPHS[0], "--model", tmp_path / "one.keras")
    assert "received one number without an activation" in message
    four = keras_convnext.load("test_convnext", None, classes=3, input_shape=(32, 32, 4))
    four.save(tmp_path / "four.keras")
    message = refused("predict", PHOTOGRAPHS[0], "--model", tmp_path / "four.keras")
    assert "Expected a model of 3 channels, or 1" in message and "with 4" in message


def test_predict_opens_a_fine_tuned_keras_model(run, refused, monkeypatch, tmp_path):
    model = keras_convnext.load(TAG, classes=3, input_shape=(64, 64, 3), classifier_activation=None)
    kernel, bias = model.get_layer("head").get_weights()
    kernel = np.random.default_rng(0).normal(size=kernel.shape).astype("float32") / 4
    model.get_layer("head").set_weights([kernel, bias])
    path = tmp_path / "tuned.keras"
    model.save(path)
    (tmp_path / "tuned.keras.labels.txt").write_text("ash\nbeech\ncedar\n")
    image = preprocess_image(read_image(PHOTOGRAPHS[0]), Preprocessing(64))
    logits = np.asarray(model.predict_on_batch(image[None]), "float64")[0]
    expected = np.exp(logits) / np.exp(logits).sum()
    assert np.ptp(expected) > 0.05

    code, out, err = run("predict", PHOTOGRAPHS[0], "--weights", path, "--json")
    assert (code, err) == (0, "")
    predictions = json.loads(out)[0]["predictions"]
    assert [row["name"] for row in predictions] == [
        ["ash", "beech", "cedar"][index] for index in np.argsort(-expected)
    ]
    np.testing.assert_allclose(
        [row["probability"] for row in predictions], np.sort(expected)[::-1], atol=1e-4
    )

    assert run("predict", PHOTOGRAPHS[0], "--model", path, "--json")[1] == out
    monkeypatch.setenv("HOME", str(tmp_path))
    assert run("predict", PHOTOGRAPHS[0], "--weights=~/tuned.keras", "--json")[1] == out
    labels = tmp_path / "labels.txt"
    labels.write_bytes("Föhre".encode("latin-1"))
    message = refused("predict", PHOTOGRAPHS[0], "--weights", path, "--labels", labels)
    assert f"Expected text in UTF-8 in '{labels}'" in message
    model.save_weights(tmp_path / "tuned.weights.h5")
    bare = ("predict", PHOTOGRAPHS[0], "--weights", tmp_path / "tuned.weights.h5", "--image-size", 64)
    found = json.loads(run(*bare, "--model", TAG, "--json")[1])[0]["predictions"]
    assert sorted(row["name"] for row in found) == ["class 0", "class 1", "class 2"]

    message = refused("predict", PHOTOGRAPHS[0], "--weights", path, "--image-size", 96)
    assert "takes images of 64 x 64. Received: image size 96" in message
    facts = json.loads(run("info", path, "--json")[1])
    assert (facts["architecture"], facts["layout"], facts["classes"]) == (
        "test_convnext2",
        "keras_convnext",
        3,
    )
    path.write_bytes(path.read_bytes()[:1000])
    for words in (("predict", PHOTOGRAPHS[0], "--weights"), ("info",)):
        assert f"Expected readable weights in HDF5 in '{path}'" in refused(*words, path)


@pytest.mark.once
def test_no_error_is_longer_than_a_screen(refused, tmp_path):
    """What a file holds comes back shortened: shapes, keys, tables of 100 kB and more."""
    shape = f'{{"a": {{"dtype": "F32", "shape": [{"1," * 300_000}1], "data_offsets": [0, 4]}}}}'
    keys = "{" + ", ".join(f'"{"k" * 60_000}{n}": 1' for n in range(2)) + "}"
    for text in (shape, keys):
        path = tmp_path / "x.safetensors"
        path.write_bytes(len(text).to_bytes(8, "little") + text.encode())
        assert len(refused("info", path)) < 2000
    (tmp_path / "x.toml").write_text("k" * 60_000 + " = 1\n")
    assert len(refused("train", tmp_path / "x.toml", "--out", tmp_path / "run")) < 2000
    for words in (
        ["info", "a" * 100_000],
        ["info", "a." + "b" * 100_000],
        ["plan", "smoke", "--devices", "z" * 99_999],
    ):
        assert len(refused(*words)) < 2000


# convert


@pytest.fixture(scope="module")
def atto(tmp_path_factory):
    """timm's convnext_atto with 10 classes, random."""
    path = tmp_path_factory.mktemp("atto") / "atto.safetensors"
    save_file(randomise(timm.create_model("convnext_atto", num_classes=10)).state_dict(), path)
    return path


@pytest.mark.once
def test_convert_to_official_and_back_is_exact(run, refused, atto, tmp_path):
    official, back = tmp_path / "official.pth", tmp_path / "back.safetensors"
    code, out, err = run("convert", atto, official)
    assert (code, err) == (0, "")
    assert re.fullmatch(
        r"\S+atto\.safetensors: convnext_atto, layout timm, 10 classes, 3,377,730 parameters -> "
        r"\S+official\.pth: official, 13\.6 MB\n",
        out,
    )
    state = torch.load(official, weights_only=True)["model"]
    assert state["stages.0.0.pwconv1.weight"].shape == (160, 40)
    assert run("convert", official, back, "--layout", "timm")[0] == 0
    before, after = load_file(atto), load_file(back)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)

    content = back.read_bytes()
    assert f"'{back}' is there already. Pass replace=True (--force)" in refused(
        "convert", official, back, "--layout", "official"
    )
    assert back.read_bytes() == content
    assert run("convert", official, back, "--layout", "official", "--force")[0] == 0
    assert load_file(back).keys() == state.keys()


def test_convert_of_a_tag_to_a_keras_model_keeps_its_image_size_and_normaliser(
    run, monkeypatch, weights_folder, tmp_path
):
    tag = "test_convnext2.half"
    half = (0.5, 0.5, 0.5)
    row = dataclasses.replace(CHECKPOINTS[TAG], tag=tag, image_size=64, mean=half, std=half)
    monkeypatch.setitem(CHECKPOINTS, tag, row)
    shutil.copy(weights(weights_folder), weights_folder / f"{tag}.safetensors")
    target = tmp_path / "tag.keras"
    code, out, _ = run("convert", tag, target)
    assert code == 0 and "1000 classes" in out and "tag.keras: Keras" in out
    model = keras.saving.load_model(target)
    assert model.input_shape == (None, 64, 64, 3)
    mean = keras.ops.convert_to_numpy(model.get_layer("normalization").mean)
    np.testing.assert_allclose(mean.ravel(), 127.5)


@pytest.mark.once
def test_convert_refuses_what_it_cannot_write(refused, atto, tmp_path):
    target = tmp_path / "target.pth"
    assert "Unknown layout to write 'tim'. Did you mean 'timm'" in refused(
        "convert", atto, target, "--layout", "tim"
    )
    assert "must end in .safetensors" in refused("convert", atto, tmp_path / "target.onnx")
    assert "There is no folder" in refused("convert", atto, tmp_path / "none" / "target.pth")
    assert "holds a 'convnext_atto'" in refused("convert", atto, target, "--architecture", "convnext_pico")
    assert "Did you mean 'convnext_atto'" in refused(
        "convert", atto, target, "--architecture", "convnext_ato"
    )
    assert "Near names in that folder: atto.safetensors" in refused(
        "convert", atto.with_name("ato.safetensors"), target
    )
    isotropic = tmp_path / "isotropic.safetensors"
    shapes = layouts.weight_shapes(VARIANTS["convnext_isotropic_small"])
    safetensors_files.write_safetensors(
        isotropic, {name: np.zeros(shape, "float16") for name, shape in shapes.items()}
    )
    assert "timm has no isotropic ConvNeXt" in refused("convert", isotropic, target, "--layout", "timm")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["isotropic.safetensors"]


class Malicious:
    """Creates a file when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


@pytest.mark.once
def test_files_that_are_not_what_they_seem_are_refused(refused, weights_folder, tmp_path):
    evidence, target = tmp_path / "evidence", tmp_path / "target.safetensors"
    malicious = tmp_path / "malicious.pth"
    torch.save({"stem.0.weight": Malicious(evidence)}, malicious)
    for words in (
        ("info", malicious),
        ("convert", malicious, target),
        ("predict", PHOTOGRAPHS[0], "--weights", malicious),
    ):
        message = refused(*words)
        assert (
            "Refused to read" in message and "io.open" in message and "Nothing in it was executed" in message
        )
    assert not evidence.exists() and not target.exists()

    truncated = _truncated(weights(weights_folder), tmp_path)
    for words in (("info", truncated), ("convert", truncated, target)):
        assert "damaged or incomplete" in refused(*words)
    missing = altered(weights_folder, tmp_path / "missing.pth", lambda state: state.pop("stem.0.bias"))
    assert "No architecture fits" in refused("info", missing)
    assert not target.exists()
    assert "Received a folder" in refused("info", tmp_path)


# How it ends.


@pytest.mark.once
def test_wrong_usage_ends_with_2_and_help_with_0(capsys):
    for words, code, text in (
        (["--version"], 0, f"keras-convnext {keras_convnext.__version__}"),
        ([], 0, "commands:"),
        (["predict", "--help"], 0, "keras-convnext predict cat.jpg"),
        (["convert", "--help"], 0, "--layout timm"),
        (["list", "--help"], 0, "--architectures"),
        (["info", "--help"], 0, "my_weights.safetensors"),
        (["trian"], 2, "invalid choice: 'trian'"),
        (["predict"], 2, "IMAGE_OR_FOLDER"),
        (["predict", "x.jpg", "--top", "0"], 2, "expected a whole number from 1 up, received '0'"),
        (["predict", "x.jpg", "--batch-size", "9" * 30], 2, "from 1 up, below 10**9, received '999"),
    ):
        with pytest.raises(SystemExit) as ended:
            main.main(words)
        out, err = capsys.readouterr()
        assert ended.value.code == code
        assert text in (err if code else out)


@pytest.mark.once
def test_commands_that_left_say_where_they_went(refused):
    message = "keras-convnext: error: `keras-convnext {}` has left the command. Run {} in a checkout.\n"
    bench = "`make bench`, or `python -m benchmarks.speed`,"
    assert refused("bench", "all", "--output", "speed") == message.format("bench", bench)
    assert refused("demo") == message.format("demo", "`make demo`")


@pytest.mark.once
def test_every_command_has_a_summary_options_and_examples(capsys):
    with pytest.raises(SystemExit):
        main.main(["--help"])
    overview = " ".join(capsys.readouterr().out.split())
    for name, (_, summary) in main.COMMANDS.items():
        assert f"{name} {summary}" in overview
        with pytest.raises(SystemExit) as ended:
            main.main([name, "--help"])
        out = capsys.readouterr().out
        assert ended.value.code == 0 and f"\n  keras-convnext {name} " in out.partition("examples:")[2]
        assert f"{summary[0].upper()}{summary[1:]}." in " ".join(out.split())


@pytest.mark.once
def test_an_interruption_and_a_bug_have_codes_of_their_own(run, monkeypatch):
    def fail_with(error):
        def fail(*_, **__):
            raise error

        monkeypatch.setattr(catalog, "list_weights", fail)
        return run("list")

    assert fail_with(KeyboardInterrupt()) == (130, "", "")
    code, out, err = fail_with(KeyError("lost"))
    assert (code, out) == (70, "")
    assert err == (
        "keras-convnext: internal error: KeyError: 'lost' (set KERAS_CONVNEXT_DEBUG=1 for the traceback)\n"
    )
    assert fail_with(PermissionError(13, "Permission denied", "x.pth"))[2] == (
        "keras-convnext: error: Permission denied: x.pth\n"
    )
    monkeypatch.setenv("KERAS_CONVNEXT_DEBUG", "1")
    assert "Traceback" in fail_with(ValueError("wrong"))[2]


@pytest.mark.once
def test_errors_do_not_steer_the_terminal(refused):
    message = refused("list", "a\x1b[31m\x07\udce9\u65e5")
    assert message[:-1].isprintable()
    assert "a\\x1b[31m\\x07\\udce9\u65e5" in message


@pytest.mark.once
def test_the_folder_of_an_unknown_user_is_one_that_is_not_there(run, refused, monkeypatch):
    """It ended with exit code 70: "Could not determine home directory"."""
    monkeypatch.setenv("KERAS_CONVNEXT_CACHE", "~nobody-of-this-name/cache")
    assert run("info", "convnext_tiny.fb_in1k")[0] == 0
    monkeypatch.setenv("KERAS_CONVNEXT_WEIGHTS_DIR", "~nobody-of-this-name/weights")
    message = refused("info", "convnext_tiny.fb_in1k")
    assert "KERAS_CONVNEXT_WEIGHTS_DIR names '~nobody-of-this-name/weights', which is not a folder" in message


@pytest.mark.once
def test_a_working_folder_that_was_removed_is_said(refused, monkeypatch):
    def removed(*_):
        raise FileNotFoundError(2, "No such file or directory")

    monkeypatch.setattr(os, "getcwd", removed)
    message = refused("train", "smoke", "--out", "run", "--data", "photos")
    assert message == "keras-convnext: error: The working folder is no longer there. Change to another one.\n"


@pytest.mark.once
def test_offline_weights_that_are_not_here_are_an_error_that_says_where_to_put_them(refused):
    message = refused("predict", PHOTOGRAPHS[0])
    assert "'convnext_tiny.keras_applications' are not on this machine" in message
    assert "KERAS_CONVNEXT_WEIGHTS_DIR" in message


@pytest.mark.once
def test_a_licence_that_forbids_commercial_use_is_announced_once(weights_folder, tmp_path):
    tag = "convnextv2_atto.fcmae_ft_in1k"
    shapes = layouts.weight_shapes(VARIANTS["convnextv2_atto"])
    arrays = {name: np.zeros(shape, "float16") for name, shape in shapes.items()}
    safetensors_files.write_safetensors(weights_folder / f"{tag}.safetensors", arrays)
    ended = subprocess.run(
        [sys.executable, "-m", "keras_convnext", "convert", tag, tmp_path / "out.pth"],
        capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert ended.returncode == 0, ended.stderr
    assert len(ended.stdout.splitlines()) == 1
    assert ended.stderr.count(f"The weights {tag} are licensed cc-by-nc-4.0: not for commercial use.") == 1
    assert "Traceback" not in ended.stderr


@pytest.mark.once
def test_weights_that_are_no_file_are_an_error_in_words(refused):
    assert "Received a folder: ." in refused("predict", PHOTOGRAPHS[0], "--weights", ".")
    assert "a value of 'weights', received ''" in refused("predict", PHOTOGRAPHS[0], "--weights", "")


@pytest.mark.once
@pytest.mark.parametrize(
    "words",
    [
        ["train", "smoke", "--out", ""],
        ["train", "smoke", "--out", "run", "--data", ""],
        ["predict", ""],
        ["predict", "photo.jpg", ""],
        ["prepare", "photos", ""],
        ["evaluate", "model.keras", "--data", "photos", "--output", ""],
    ],
)
def test_a_variable_that_is_not_set_is_not_the_working_folder(refused, words):
    assert "received ''. Is a variable of the shell not set?" in refused(*words)


@pytest.mark.once
def test_a_key_has_one_value(refused):
    plan = ("plan", "smoke", "--devices", "8xcpu")
    assert "one value of 'epochs', received '1' and '2'" in refused(
        *plan, "--set", "epochs=1", "--set", "epochs=2"
    )
    assert "one value of 'data', received 'b' and 'a'" in refused(*plan, "--data", "a", "--set", "data=b")
    words = ("--engine", "none", "--set", "distribution.engine=auto")
    assert "engine: given twice, remove one of them" in refused(*plan, *words)
    words = ("--model", "convnext_tiny", "--set", "model=convnext_base", "--data", "photos")
    assert "one value of 'model', received 'convnext_base' and 'convnext_tiny'" in refused("knn", *words)


@pytest.mark.once
@pytest.mark.parametrize(
    "words",
    [
        ["export", "model.keras", "x.onnx", "--tolerance", "nan"],
        ["evaluate", "model.keras", "--data", "photos", "--max-faults", "-1"],
    ],
)
def test_a_limit_that_nothing_exceeds_is_refused(capsys, words):
    with pytest.raises(SystemExit) as ended:
        main.main(words)
    assert ended.value.code == 2
    assert f"expected a number from 0 up, received '{words[-1]}'" in capsys.readouterr().err


@pytest.mark.once
def test_a_closed_output_is_no_error(monkeypatch):
    monkeypatch.setattr(sys, "stdout", None)  # as in `keras-convnext list >&-`
    assert main.main(["list"]) == 0


@pytest.mark.once
@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs a device that is full")
@pytest.mark.parametrize("words", [["list"], ["--help"], ["train", "--help"]])
def test_output_that_cannot_be_written_is_an_error(capsys, monkeypatch, words):
    """Help ended with an exception of Python's end, and an error on a full disk with its exit code 120."""
    with open("/dev/full", "w") as full, monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", full)
        assert main.main(words) == 2
    assert capsys.readouterr().err == "keras-convnext: error: No space left on device\n"
    with open("/dev/full", "w") as full, monkeypatch.context() as patch:
        patch.setattr(sys, "stderr", full)
        assert main.main(["list", "nothing"]) == 2


@pytest.mark.once
def test_a_closed_stream_is_not_the_next_file():
    """The first file opened would be number 2, on which libraries print."""
    code = (
        "import os, sys, keras_convnext_main; from keras_convnext.cli import main\n"
        "code = main.main(['list', 'nothing'])\n"
        "sys.exit(10 * code + os.open('/dev/null', os.O_RDONLY))"
    )
    command = ["sh", "-c", 'exec "$0" -c "$1" <&- >&- 2>&-', sys.executable, code]
    assert subprocess.run(command, timeout=60).returncode >= 23


@pytest.mark.once
def test_a_reader_that_leaves_is_not_an_error_message(capsys, monkeypatch):
    reading, writing = os.pipe()
    os.close(reading)
    with os.fdopen(writing, "w") as stdout:  # as in `keras-convnext list | head -1`
        monkeypatch.setattr(sys, "stdout", stdout)
        assert main.main(["list"]) == 141
    assert capsys.readouterr().err == ""
