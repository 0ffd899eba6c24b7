"""A training run of segmentation: what it learns and leaves, that it resumes, and how it is evaluated."""

import csv
import json
import os
import re
import signal
import threading

import keras
import numpy as np
import PIL.Image
import pytest
from made_masks import CLASSES, write

import keras_convnext
from keras_convnext import segmentation
from keras_convnext.cli import main
from keras_convnext.data.segmentation import sources
from keras_convnext.evaluation import features
from keras_convnext.evaluation import segmentation as evaluation
from keras_convnext.evaluation.linear_probe import LinearProbe
from keras_convnext.evaluation.results import read_results
from keras_convnext.evaluation.segmentation_scores import Scores, confusion_matrix
from keras_convnext.predictor import open_segmenter
from keras_convnext.training import failure, run_folder, trainer
from keras_convnext.training.derived import choose_recipe
from keras_convnext.training.layer_decay import layer_ids
from keras_convnext.training.recipes.files import load_recipe
from keras_convnext.training.tasks import segmentation as task
from keras_convnext.weights.resolve import resolve
from keras_convnext.weights.torch_files import read_state_dict

pytestmark = pytest.mark.one_backend

# All that has a state: drop path, dropout, batch statistics, accumulation, layer decay, clipping, EMA.
SMALL = {
    "architecture": "convnextv2_atto",
    "weights": "",
    "channels": 16,
    "crop_size": (64, 64),
    "base_size": (96, 72),
    "batch_size": 4,
    "accumulation_steps": 2,
    "steps": 4,
    "evaluations": 2,
    "warmup_steps": 1,
    "drop_path_rate": 0.2,
    "layer_decay": 0.9,
    "ema_decay": 0.8,
    "learning_rate": 3e-3,
    "eval_image_size": 72,
    "ignored_values": (255,),
    "checkpoint_minutes": 0.0,
}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = write(tmp_path_factory.mktemp("masks"), 8)
    write(folder, 5, split="val")
    (folder / "classes.txt").write_text("ground\nsquare\ndisc\n")
    return folder


def small(data, **changes):
    return load_recipe("camvid").replaced({"data": str(data)} | SMALL | changes)


@pytest.fixture(scope="module")
def trained(data, tmp_path_factory):
    folder = tmp_path_factory.mktemp("run") / "run"
    result = trainer.train(small(data), folder, progress=False)
    assert result.steps == 4
    return folder


def rows_of(folder):
    with open(folder / "log.csv", newline="") as file:
        return list(csv.DictReader(file))


def arrays_of(folder):
    return {name: np.array(a) for name, a in read_state_dict(max(folder.glob("checkpoints/step-*"))).items()}


def test_a_run_leaves_what_a_classifiers_does_and_pictures(trained):
    names = {path.name for path in trained.iterdir() if not path.name.startswith(".")}
    assert names == {
        "best.json", "best.weights.h5", "checkpoints", "curves.png", "environment.json", "final.safetensors",
        "final.weights.h5", "final_ema.weights.h5", "log.csv", "predictions", "recipe.toml", "result.json",
        "run.json", "tensorboard",
    }  # fmt: skip
    rows = rows_of(trained)
    assert [row["step"] for row in rows] == ["2", "4"]
    assert float(rows[-1]["loss"]) < float(rows[0]["loss"])
    parts = float(rows[0]["logits_loss"]) + 0.4 * float(rows[0]["auxiliary_loss"])
    assert float(rows[0]["loss"]) == pytest.approx(parts, rel=1e-4)
    best = max(float(row[name]) for row in rows for name in ("val_miou", "ema_val_miou"))
    assert json.loads((trained / "best.json").read_text())["value"] == best
    pictures = sorted(path.name for path in (trained / "predictions").iterdir())
    assert pictures == ["epoch-0001.png", "epoch-0002.png"]
    assert PIL.Image.open(trained / "predictions" / pictures[0]).size[0] > 500


def test_final_weights_open_with_labels_and_give_the_score_of_the_log(trained, data):
    source = resolve(trained / "final.safetensors")
    assert source.task == "segmentation" and source.labels.names == ("ground", "square", "disc")
    assert source.labels.ignored_values == (255,)
    assert source.preprocessing.image_size == 72 and source.preprocessing.interpolation == "bilinear"
    result = evaluation.evaluate(trained / "final.safetensors", data, split="val", progress=False)
    assert result.miou == pytest.approx(float(rows_of(trained)[-1]["ema_val_miou"]), abs=0.05)
    model = keras_convnext.load(trained / "final.safetensors")
    assert model.has_auxiliary and model.classes == CLASSES


def test_batch_statistics_are_trained_saved_and_no_average_of_them(trained, data):
    arrays = arrays_of(trained)
    name = next(name for name in arrays if "fpn_bottleneck_bn" in name and "moving_mean" in name)
    assert np.abs(arrays[name]).max() > 0  # 0 at the start
    final = read_state_dict(trained / "final.safetensors")
    stored = np.array(final["decode_head.fpn_bottleneck.bn.running_mean"])
    np.testing.assert_array_equal(stored, arrays[name])  # the weights of the file are averages, these not


@pytest.mark.slow
def test_a_stopped_run_resumes_to_the_same_bits(trained, data, tmp_path, monkeypatch):
    save, often = run_folder.RunFolder.save, small(data, checkpoint_minutes=1e-9)  # after every step

    def interrupted_save(self, arrays, state):
        if state["step"] == 3:
            signal.raise_signal(signal.SIGTERM)
        return save(self, arrays, state)

    with monkeypatch.context() as patch:
        patch.setattr(run_folder.RunFolder, "save", interrupted_save)
        with pytest.raises(failure.Interrupted, match=r"stopped after step [34] of 4"):
            trainer.train(often, tmp_path / "run", progress=False)
    trainer.train(often, tmp_path / "run", progress=False)
    expected, received = arrays_of(trained), arrays_of(tmp_path / "run")
    assert expected.keys() == received.keys()
    for name, array in expected.items():
        np.testing.assert_array_equal(array, received[name], err_msg=name, strict=True)
    for column in ("loss", "val_miou", "ema_val_miou"):
        assert [row[column] for row in rows_of(trained)] == [row[column] for row in rows_of(tmp_path / "run")]


@pytest.mark.slow
def test_it_learns_shapes(data, tmp_path):
    changes = {"steps": 150, "evaluations": 1, "drop_path_rate": 0.0, "layer_decay": 1.0, "ema_decay": 0.0}
    model = {"architecture": "test_convnext2", "layer_scale_init_value": 1.0}
    recipe = small(data, **changes, **model, accumulation_steps=1, checkpoint_minutes=0.0)
    scores = trainer.train(recipe, tmp_path / "run", progress=False).scores
    assert scores["val_miou"] > 50  # 33 at most where all is taken for ground
    # Facebook's layout has no place for this architecture.
    source = resolve(tmp_path / "run" / "final.keras")
    assert source.labels.names[0] == "ground" and source.preprocessing.image_size == 72
    result = evaluation.evaluate(source, data, split="val", progress=False)
    assert result.miou == pytest.approx(scores["val_miou"], abs=0.05)


@pytest.mark.parametrize("groups", ["stage_wise", "layer_wise"])
def test_layer_decay_finds_the_stages_and_leaves_the_heads(data, groups):
    recipe = small(data, architecture="test_convnext", layer_scale_init_value=1.0)
    source = task.Segmentation(recipe).source
    model = segmentation.with_auxiliary(task.build_model(recipe, CLASSES, source))
    paths = [variable.path for variable in model.trainable_variables]
    ids, last = layer_ids(paths, groups)
    found = dict(zip(paths, ids, strict=True))
    for path, number in found.items():
        if "decode_head" in path or "auxiliary_head" in path:
            assert number == last, path
        elif "stages_" in path and groups == "stage_wise":
            assert number == 1 + int(path.partition("stages_")[2][0]), path
        elif "downsample_layers_" in path and groups == "stage_wise":
            assert number == 0, path
        elif "stages_" not in path and "downsample_layers_" not in path:
            assert number == last, path  # the norms of the pyramid
    assert {0, 1, 2, 3, 4, last} <= set(ids) or groups == "layer_wise"


def test_weights_of_a_segmenter_are_trained_further_on_other_classes(trained, data, tmp_path):
    weights = str(trained / "final.safetensors")
    source = task.Segmentation(small(data, weights=weights)).source
    same = task.build_model(small(data, weights=weights), CLASSES, source)
    kernel = next(layer for layer in same.layers if layer.name == "decode_head_conv_seg").kernel
    stored = np.array(read_state_dict(weights)["decode_head.conv_seg.weight"])
    np.testing.assert_array_equal(keras.ops.convert_to_numpy(kernel)[0, 0].T, stored[:, :, 0, 0])
    other = task.build_model(small(data, weights=weights), 7, source)
    assert other.classes == 7
    with pytest.raises(
        ValueError, match=r"Expected channels = 16, the width of the weights' heads, received 32"
    ):
        task.build_model(small(data, weights=weights, channels=32), CLASSES, source)
    alone = task.build_model(small(data, weights=weights, auxiliary_weight=0.0), CLASSES, source)
    assert not alone.has_auxiliary


def test_heads_of_other_weights_bring_their_width_along(trained, data, tmp_path):
    weights = {"weights": str(trained / "final.safetensors")}
    recipe, derived = choose_recipe("fine_tune_segmentation", data, weights, tmp_path / "run")
    assert recipe.model.channels == 16 and recipe.loss.auxiliary_weight == 0.4
    assert any(line.startswith("channels = 16: of the weights") for line in derived)
    own, _ = choose_recipe("fine_tune_segmentation", data, weights | {"channels": 32}, tmp_path / "run")
    assert own.model.channels == 32
    alone = segmentation.without_auxiliary(keras_convnext.load(trained / "final.safetensors"))
    keras_convnext.save_weights(alone, tmp_path / "alone.safetensors")
    weights = {"weights": str(tmp_path / "alone.safetensors")}
    assert (
        choose_recipe("fine_tune_segmentation", data, weights, tmp_path / "run")[0].loss.auxiliary_weight == 0
    )


def test_weights_alone_open_beside_their_architecture(trained, tmp_path):
    expected = keras_convnext.load(trained / "final.safetensors")
    received = keras_convnext.load("convnextv2_atto", trained / "final_ema.weights.h5")
    assert received.has_auxiliary and received.classes == CLASSES
    for ours, theirs in zip(received.weights, expected.weights, strict=True):
        np.testing.assert_array_equal(*map(keras.ops.convert_to_numpy, (ours, theirs)), err_msg=ours.path)
    segmentation.without_auxiliary(expected).save_weights(tmp_path / "alone.weights.h5")
    assert not keras_convnext.load("convnextv2_atto", tmp_path / "alone.weights.h5").has_auxiliary
    with pytest.raises(ValueError, match=r"does not say which architecture it holds"):
        keras_convnext.load(trained / "final_ema.weights.h5")
    with pytest.raises(ValueError, match=r"new last layers cannot take the place"):
        keras_convnext.load("convnextv2_atto", trained / "final_ema.weights.h5", classes=7)
    with pytest.raises(ValueError, match=r"does not fit"):
        keras_convnext.load("convnextv2_femto", trained / "final_ema.weights.h5")


def test_classes_without_names_are_told_before_the_first_step(tmp_path):
    write(tmp_path, 8)
    made = task.Segmentation(small(tmp_path))
    assert any("write classes.txt in" in line for line in made.build_model(made.open_data()).warnings)
    (tmp_path / "classes.txt").write_text("ground\nsquare\ndisc\n")
    made = task.Segmentation(small(tmp_path))
    assert not any("classes.txt" in line for line in made.build_model(made.open_data()).warnings)


def test_photos_are_held_out_where_there_is_no_other_split(tmp_path):
    write(tmp_path, 10)
    recipe = small(tmp_path / "train", validation_fraction=0.3)
    training, validation = task.open_data(recipe)
    names = [{source.name(number) for number in range(len(source))} for source in (training, validation)]
    assert [len(each) for each in names] == [7, 3] and not names[0] & names[1]
    again = task.open_data(recipe)[1]
    assert names[1] == {again.name(number) for number in range(3)}


def test_photos_with_label_maps_are_no_classes_to_a_classifier(data, tmp_path):
    for folder in (data, data / "train"):
        with pytest.raises(ValueError, match=r"data: Expected folders of classes .* fine_tune_segmentation"):
            choose_recipe("fine_tune", folder, folder=tmp_path / "run")
    settings = LinearProbe(data=str(data / "train"))
    with pytest.raises(ValueError, match="received photographs with label maps"):
        features._open_parts(settings)


def test_one_photo_cannot_be_held_out_and_trained_on(tmp_path):
    write(tmp_path, 1)
    with pytest.raises(ValueError, match=r"received 1 in .* Set validation_fraction=0 to train on all"):
        task.open_data(small(tmp_path / "train", validation_fraction=0.3))


def test_what_cannot_be_trained_is_said(data, tmp_path):
    with pytest.raises(ValueError, match=r"at least one batch of 64 images.* has 8\. Choose a smaller"):
        trainer.train(small(data, batch_size=64), tmp_path / "run", progress=False)
    with pytest.raises(ValueError, match=r"value"):  # 255 is a value of no class
        trainer.train(small(data, ignored_values=()), tmp_path / "other", progress=False)
    assert not (tmp_path / "run" / "checkpoints").exists()


# Evaluation.


def body(*size):
    return keras_convnext.load(
        "test_convnext2", weights=None, include_top=False, pyramid_norms=True, input_shape=(*size, 3)
    )


@pytest.fixture(scope="module")
def model():
    keras.utils.set_random_seed(3)
    made = segmentation.UPerNet(body(None, None), CLASSES, channels=16)
    rng = np.random.default_rng(0)
    for variable in made.weights:
        if "moving_variance" not in variable.path:
            variable.assign(np.asarray(variable) + rng.normal(0, 0.1, variable.shape))
    return made


@pytest.mark.parametrize("mode", ["whole", "slide", "multi_scale"])
def test_evaluation_counts_what_the_model_finds(model, data, mode):
    source = sources.take(sources.open_source(data, "val", ignored_values=(255,)), [0, 2, 3])
    result = evaluation.evaluate(model, source, mode=mode, image_size=64, batch_size=2, progress=False)
    assert len(result.numbers) == 3 and result.counts.dtype == np.int64
    counts = np.zeros((CLASSES, CLASSES), np.int64)
    predict = evaluation.Predict(model, 1)
    for number in range(3):
        image, truth = source.load(number)
        found = evaluation.inference.segment(predict, image, 64, mode)
        counts += confusion_matrix(truth, found, CLASSES)
    assert np.abs(result.counts - counts).sum() <= 0.001 * counts.sum()  # batches round otherwise
    assert result.counts.sum() == counts.sum() == sum(result.pixels)
    np.testing.assert_array_equal(result.found.sum(0), np.diag(result.counts))
    assert result.miou == pytest.approx(Scores.of(counts).miou, abs=0.1)


def test_photos_of_other_sizes_are_batched_apart(model, tmp_path):
    write(tmp_path, 3, size=(60, 80))
    write(tmp_path / "b", 3, size=(80, 60))
    for path in sorted((tmp_path / "b").rglob("*.png")):
        target = tmp_path / "train" / path.parent.name / f"z{path.name}"
        os.replace(path, target)
    source = sources.open_source(tmp_path, "train", ignored_values=(255,))
    seen = []
    predict = evaluation.Predict(model, 2)
    forward = predict._forward
    predict._forward = lambda images: seen.append(images.shape) or forward(images)
    parts = evaluation.outputs_of(
        predict, source, np.arange(6), 64, "whole", 2, evaluation.Faults(source, 0.0)
    )
    assert [outputs.shape for *_, outputs in parts] == [(64, 85, 3)] * 3 + [(85, 64, 3)] * 3
    # The second batch of a size is filled up, as the first was whole: no other shape is compiled.
    assert seen == [(2, 64, 85, 3)] * 2 + [(2, 85, 64, 3)] * 2


def test_the_command_prints_miou_and_writes_rows_tables_and_pictures(trained, data, tmp_path, capsys):
    results, report = tmp_path / "results.csv", tmp_path / "report"
    arguments = ["evaluate", str(trained / "final.safetensors"), "--data", str(data), "--split", "val"]
    assert main.main([*arguments, "--results", str(results), "--output", str(report)]) == 0
    out = capsys.readouterr().out
    row = read_results(results)[0]
    assert re.search(rf"^  mIoU +{float(row['miou']):.2f} %$", out, re.MULTILINE)
    assert row["top1"] == "" and row["mode"] == "whole" and row["n"] == "5" and row["crop"] == ""
    names = {path.name for path in report.iterdir()}
    assert names == {
        "classes.csv", "confusion_matrix.png", "confusions.csv", "faults.csv", "images.csv",
        "worst_classes.png",
    }  # fmt: skip
    with open(report / "classes.csv", newline="") as file:
        classes = list(csv.DictReader(file))
    ious = [float(each["iou"]) for each in classes if each["iou"]]
    assert np.mean(ious) == pytest.approx(float(row["miou"]), abs=1e-3)
    assert [each["name"] for each in classes] == ["ground", "square", "disc"]


def test_photos_are_read_ahead_of_the_model(model, data, monkeypatch):
    source = sources.open_source(data, "val", ignored_values=(255,))
    threads, load = set(), type(source).load
    noted = lambda self, number: threads.add(threading.get_ident()) or load(self, number)  # noqa: E731
    monkeypatch.setattr(type(source), "load", noted)
    result = evaluation.evaluate(model, source, mode="whole", image_size=64, progress=False)
    assert len(result.numbers) == 5 and threads and threading.get_ident() not in threads


def test_classes_without_names_are_evaluated_by_number(trained, model, data, tmp_path):
    result = evaluation.evaluate(
        model, data, split="val", ignored_values=(255,), image_size=64, progress=False
    )
    assert result.source.classes == ["ground", "square", "disc"]
    write(tmp_path, 2)
    result = evaluation.evaluate(trained / "final.safetensors", tmp_path, split="train", progress=False)
    assert result.source.classes == ["ground", "square", "disc"]


@pytest.mark.slow
def test_an_exported_segmenter_is_evaluated(trained, data, tmp_path, capsys):
    exported = tmp_path / "masks.onnx"
    assert main.main(["export", str(trained / "final.safetensors"), str(exported)]) == 0
    words = ["--data", str(data), "--split", "val", "--ignored", "255", "--no-results", "--json"]
    scores = []
    for name in (trained / "final.safetensors", exported):
        capsys.readouterr()
        assert main.main(["evaluate", str(name), *words]) == 0
        scores.append(json.loads(capsys.readouterr().out)["miou"])
    assert float(scores[0]) == pytest.approx(float(scores[1]), abs=0.05)


def test_the_split_that_is_evaluated_by_default_is_named(model, data, tmp_path):
    arguments = {"ignored_values": (255,), "image_size": 64, "limit": 2, "progress": False}
    assert evaluation.evaluate(model, data, **arguments).settings["split"] == "val"
    for split in ("Testing", "train", "valid"):
        write(tmp_path, 2, split=split)
        names = {"Testing": "Testing", "train": "Testing", "valid": "valid"}
        assert evaluation.default_split(tmp_path) == names[split]


def test_a_damaged_photo_is_left_out_and_named(model, tmp_path):
    write(tmp_path, 4)
    (tmp_path / "train/images/002.png").write_bytes(b"nothing")
    arguments = {"ignored_values": (255,), "image_size": 64, "progress": True}
    result = evaluation.evaluate(model, tmp_path, max_faults=0.5, **arguments)
    assert result.num_skipped == 1 and list(result.faults) == ["train/images/002.png"]
    with pytest.raises(ValueError, match=r"Expected at most 0.01 of the 4 images"):
        evaluation.evaluate(model, tmp_path, **arguments)


def test_a_model_of_one_image_size_is_evaluated_by_windows(data):
    square = segmentation.UPerNet(body(64, 64), CLASSES, channels=16)
    arguments = {"split": "val", "ignored_values": (255,), "progress": False}
    assert evaluation.evaluate(square, data, **arguments).settings["mode"] == "slide"
    with pytest.raises(ValueError, match=r"Received one of 64 x 64 pixels and mode 'whole'"):
        evaluation.evaluate(square, data, mode="whole", **arguments)


def test_more_classes_than_a_label_map_holds_are_refused():
    with pytest.raises(ValueError, match=r"at most 255 classes.* with 256"):
        open_segmenter(segmentation.UPerNet(body(None, None), 256, channels=2))


def test_other_classes_are_refused_by_name(trained, model, data, tmp_path):
    write(tmp_path, 2)
    (tmp_path / "classes.txt").write_text("ground\nsquare\ntriangle\n")
    with pytest.raises(ValueError, match="disc"):
        evaluation.evaluate(trained / "final.safetensors", tmp_path, split="train", progress=False)
    (tmp_path / "classes.txt").write_text("ground\nsquare\ndisc\nstar\n")
    with pytest.raises(ValueError, match=r"Expected data with the 3 classes of the model, received 4 in"):
        evaluation.evaluate(model, tmp_path, split="train", ignored_values=(255,), progress=False)
