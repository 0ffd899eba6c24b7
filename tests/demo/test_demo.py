"""`make demo`: its photos, its steps on a small model, its page, and what it refuses."""

import collections
import csv
import dataclasses
import hashlib
import html.parser
import json
import os
import pathlib
import re
import shlex
import subprocess
import sys

import keras
import numpy as np
import pytest
from PIL import Image

import keras_convnext
from demo import report
from demo import run as demo
from keras_convnext.cli import main
from keras_convnext.data import class_names
from keras_convnext.exporting.export import ExportError

pytestmark = pytest.mark.slow

ROOT = pathlib.Path(__file__).parents[2]
FLOWERS = ROOT / "recipes" / "flowers"
KINDS = ["daisy", "dandelion", "roses", "sunflowers", "tulips"]


# The photos.


@pytest.fixture
def run_demo(capsys, monkeypatch, tmp_path):
    """Runs the demo in a folder of its own and returns (exit code, stdout, stderr)."""
    monkeypatch.chdir(tmp_path)

    def run_demo(*words):
        capsys.readouterr()
        code = demo.main([str(word) for word in words])
        return code, *capsys.readouterr()

    return run_demo


@pytest.fixture
def refused(run_demo):
    """Runs a demo that must fail with code 2, print nothing but one error, and returns the error."""

    def refused(*words):
        code, out, err = run_demo(*words)
        assert (code, out) == (2, "")
        assert err.startswith("error: ") and "Traceback" not in err
        return err

    return refused


@pytest.fixture(scope="module")
def flowers():
    return demo.read_photos(None, 1000, 0)


@pytest.mark.once
def test_flowers_are_sixty_a_kind_of_one_size_each_with_a_credit():
    files = sorted(FLOWERS.rglob("*.jpg"))
    names = [path.relative_to(FLOWERS).as_posix() for path in files]
    assert collections.Counter(name.split("/")[0] for name in names) == dict.fromkeys(KINDS, 60)
    for path in files:
        with Image.open(path) as image:
            image.load()
            assert (image.format, image.mode, image.size) == ("JPEG", "RGB", (96, 96)), path
    assert len({hashlib.sha256(path.read_bytes()).digest() for path in files}) == 300
    assert sum(path.stat().st_size for path in files) < 1.3e6
    with open(FLOWERS / "CREDITS.csv", newline="", encoding="utf-8") as file:
        credits = list(csv.DictReader(file))
    assert [row["file"] for row in credits] == names
    accounts = {kind: [] for kind in KINDS}
    for row in credits:
        kind, number = row["file"].removesuffix(".jpg").split("/")
        address = re.fullmatch(r"https://www\.flickr\.com/photos/([^/]+)/(\d+)/?", row["address"])
        assert row["photographer"].strip() and address is not None and address[2] == number, row
        accounts[kind].append(address[1].lower())
    assert max(of_kind.count(account) for of_kind in accounts.values() for account in of_kind) <= 6


@pytest.mark.once
def test_every_fifth_flower_by_name_is_held_out_and_none_is_learned(flowers):
    assert flowers.classes == KINDS and flowers.images.shape == (300, 96, 96, 3)
    assert not set(flowers.training) & set(flowers.held_out)
    assert sorted([*flowers.training, *flowers.held_out]) == list(range(300))
    digests = [hashlib.sha256(image.tobytes()).digest() for image in flowers.images]
    assert not {digests[place] for place in flowers.training} & {digests[place] for place in flowers.held_out}
    assert np.bincount(flowers.labels[flowers.held_out]).tolist() == [12] * 5
    assert np.bincount(flowers.labels[flowers.training]).tolist() == [48] * 5
    for kind in KINDS:
        of_kind = sorted(name for name in flowers.names if name.startswith(f"{kind}/"))
        held_out = {flowers.names[place] for place in flowers.held_out}
        assert [name in held_out for name in of_kind] == [place % 5 == 0 for place in range(60)]
    assert set(flowers.names) == set(flowers.credits)


def write_photos(folder, colours, number, size=(90, 70)):
    """One folder for each name in `colours`, `number` noisy JPEGs of its colour in each."""
    generator = np.random.default_rng(0)
    for name, colour in colours.items():
        (folder / name).mkdir(parents=True)
        for place in range(number):
            noise = generator.integers(-30, 31, (size[1], size[0], 3))
            pixels = np.clip(np.array(colour) + noise, 0, 255).astype("uint8")
            Image.fromarray(pixels).save(folder / name / f"{place}.jpg")


COLOURS = {"red": (200, 40, 40), "green": (40, 200, 40), "blue": (40, 40, 200)}


@pytest.mark.once
def test_limit_draws_the_same_number_of_each_class_by_seed(tmp_path):
    write_photos(tmp_path, COLOURS, 12)
    first, again, other = (demo.read_photos(tmp_path, 20, seed) for seed in (0, 0, 1))
    assert np.bincount(first.labels).tolist() == [6, 6, 6]
    assert first.names == again.names != other.names
    assert first.title == tmp_path.name and first.credits == {}


@pytest.mark.once
def test_data_with_splits_keeps_them(tmp_path):
    write_photos(tmp_path / "train", COLOURS, 4)
    write_photos(tmp_path / "val", COLOURS, 2)
    photos = demo.read_photos(tmp_path, 1000, 0)
    assert (len(photos.training), len(photos.held_out)) == (12, 6)
    assert photos.labels[photos.held_out].tolist() == [0, 0, 1, 1, 2, 2]


@pytest.mark.once
def test_unreadable_photos_are_counted_and_the_first_five_named(tmp_path, capsys):
    write_photos(tmp_path, COLOURS, 4)
    for number in range(7):
        (tmp_path / "red" / f"broken{number}.jpg").write_bytes(b"no picture")
    photos = demo.read_photos(tmp_path, 1000, 0)
    assert len(photos.images) == 12
    error = capsys.readouterr().err
    assert error.count("'red/broken") == 5 and "left out: 2 more photos" in error


@pytest.mark.once
@pytest.mark.parametrize(
    ("prepare", "message"),
    [
        (lambda folder: None, "photos"),
        (lambda folder: folder.mkdir(), "photos"),
        (
            lambda folder: write_photos(folder, {"cats": (9, 9, 9)}, 3),
            "Expected a folder for each of several classes in '.*photos', found .'cats'.",
        ),
        (
            lambda folder: [write_photos(folder, {name: (9, 9, 9)}, n) for name, n in (("a", 4), ("b", 1))],
            "Expected two photos or more of each class.* Received: 1 of 'b' in '.*photos', with --limit",
        ),
    ],
)
def test_unusable_data_is_named_in_one_line(refused, tmp_path, prepare, message):
    prepare(tmp_path / "photos")
    error = refused("--data", tmp_path / "photos", "--weights", "absent.safetensors")
    assert re.search(message, error) and error.count("\n") == 1


def test_batches_shift_and_mirror_without_changing_labels():
    images = np.zeros((8, 20, 20, 3), "uint8")
    images[:, 10, 4] = np.arange(1, 9)[:, None]  # one dot, as bright as the label
    columns = set()
    generator = demo.batches(images, np.arange(1, 9), 4, seed=0)
    for _ in range(50):
        pixels, labels = next(generator)
        assert pixels.shape == images[:4].shape and pixels.dtype == np.uint8
        assert pixels.max(axis=(1, 2, 3)).tolist() == labels.tolist()
        columns.update(np.nonzero(pixels)[2].tolist())
    assert columns == {2, 3, 4, 5, 6, 13, 14, 15, 16, 17}


def test_functions_are_timed_in_turns_and_the_median_counts():
    order = []
    taken = demo.time_in_turns([lambda: order.append("a"), lambda: order.append("b")], 3)
    assert "".join(order) == "aabb" * 3 and len(taken) == 2 and min(taken) >= 0


def test_right_classes_are_classes_of_imagenet():
    """Else a name with a slip would never be right."""
    first_words = [name.split(",")[0] for name in class_names.class_names(1000)]
    for names in demo.RIGHT_NAMES.values():
        assert all(name in first_words for name in names)
    assert "espresson" not in first_words
    tiny = {name.split(",")[0] for name in class_names.class_names("tiny_imagenet200")}
    assert all(tiny & set(names) for names in demo.RIGHT_NAMES.values())


# The command.


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """A weight file with the 1000 classes of ImageNet, whose first answer is always "espresso"."""
    folder = tmp_path_factory.mktemp("weights")
    model = keras_convnext.load("test_convnext2", weights=None, input_shape=(64, 64, 3))
    kernel, bias = model.layers[-1].get_weights()
    bias[class_names.synset_ids(1000).index("n07920052")] = 20
    model.layers[-1].set_weights([kernel, bias])
    return keras_convnext.save_weights(model, folder / "small.safetensors", "timm")


@pytest.fixture
def small(weights, monkeypatch):
    """Words of a demo that takes seconds; the LiteRT converter, tested elsewhere, gives nothing."""
    monkeypatch.setattr(demo, "TIMED_CALLS", 2)
    return ("--weights", weights, "--limit", 15, "--epochs", 2, "--output", "out")


class Page(html.parser.HTMLParser):
    """What a page refers to, and its text."""

    def __init__(self, text):
        super().__init__()
        self.sources, self.text, self.tags = [], "", []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.sources += [value for name, value in attributes if name in ("src", "srcset", "data")]

    def handle_data(self, data):
        self.text += data


def test_a_second_training_with_the_same_step_begins_anew():
    photos = demo.read_photos(None, 15, 0)
    model = keras_convnext.load(
        "test_convnext2", weights=None, input_shape=(96, 96, 3), classes=5, classifier_activation=None
    )
    start = model.get_weights()
    demo.compile_model(model, photos, 2)
    demo.fit("first", model, start, photos, 2, seed=0)
    learned = model.get_weights()
    assert max(np.abs(a - b).max() for a, b in zip(start, learned, strict=True)) > 1e-4
    demo.fit("second", model, start, photos, 2, seed=0)
    for first, second in zip(learned, model.get_weights(), strict=True):
        np.testing.assert_allclose(second, first, rtol=0, atol=1e-6)


def test_a_demo_without_litert_ends_with_1_a_line_and_a_page_of_the_rest(run_demo, run, small, monkeypatch):
    def refuse(*arguments, **settings):
        raise ImportError("needs ai-edge-litert. Install it: pip install ai-edge-litert")

    monkeypatch.setattr(demo, "export", refuse)
    code, out, err = run_demo(*small)
    assert code == 1
    assert err == "".join(
        f"Left out, LiteRT {precision}: needs ai-edge-litert. Install it: pip install ai-edge-litert\n"
        for precision in ("float32", "int8")
    )
    lines = out.splitlines()
    page_file = pathlib.Path("out/report.html")
    assert lines[-2] == f"Look at {page_file}"
    found = json.loads(pathlib.Path("out/findings.json").read_text())
    parts = found["seconds"]
    assert list(parts) == ["start", "photographs", "trainings", "heat maps", "LiteRT"]
    assert 0 < sum(training["seconds"] for training in found["trainings"]) <= parts["trainings"]
    assert lines[-3] == f"Seconds: {report.seconds_text(parts)}"
    assert re.fullmatch(r"coffee\.jpg: espresso, 9\d\.\d%|coffee\.jpg: espresso, 100\.0%", lines[-1])
    assert "cat.jpg: not right" in out and "coffee.jpg: right" in out
    assert "10 photos of 5 kinds to learn, 5 held out; 2 epochs" in out
    assert {path.name for path in page_file.parent.iterdir()} == {
        demo.MARKER,
        "findings.json",
        "model.keras",
        "model.labels.txt",
        "report.html",
    }  # and no temporary file
    assert pathlib.Path("out/model.labels.txt").read_text().splitlines() == KINDS
    assert [len(each["held_out_accuracy"]) for each in found["trainings"]] == [2, 2]
    assert [photo["is_right"] for photo in found["photos"]] == [False, True, False]
    assert len(found["looks"]) == 5 and all(look["photographer"] for look in found["looks"])
    page = Page(page_file.read_text(encoding="utf-8"))
    assert all(source.startswith("data:image/jpeg;base64,") for source in page.sources)
    assert page.tags.count("img") == 2 * (3 + 5) and "script" not in page.tags and "{{" not in page.text
    size = pathlib.Path("out/model.keras").stat().st_size
    parameters = sum(weight.size for weight in keras.saving.load_model("out/model.keras").get_weights())
    assert 4 * parameters < size < 8 * parameters  # in float32, without the moments of the optimizer
    assert page.tags.count("polyline") == 4 and "table" not in page.tags
    assert "Install it: pip install ai-edge-litert" in page.text and "CC BY 2.0" in page.text
    assert lines[-3].removeprefix("Seconds: ") in page.text
    assert "python -m demo.run --output out --weights" in page.text and keras.__version__ in page.text

    code, out, _ = run("predict", FLOWERS / "roses" / f"{first_rose()}.jpg", "--weights", "out/model.keras")
    assert code == 0 and {line.split()[-1] for line in out.splitlines()[1:]} == set(KINDS)


def first_rose():
    return sorted(path.stem for path in (FLOWERS / "roses").iterdir())[0]


@pytest.fixture
def litert(monkeypatch):
    """In place of converter and runtime: float32 answers as the model, int8 always the first class."""
    written, calibrations = {}, []

    class Exported:
        input_dtype = "float32"

        def __init__(self, path):
            self.model, self.precision = written[path]

        def __call__(self, images):
            outputs = np.array(self.model.predict_on_batch(images.astype("float32")))
            return outputs if self.precision == "float32" else np.eye(5)[np.zeros(len(images), int)]

        call = __call__

    def write(model, path, format, *, precision, calibration, labels, **settings):
        assert (format, labels) == ("litert", KINDS) and not path.exists()
        path.write_bytes(bytes(400 if precision == "float32" else 100))
        written[path] = model, precision
        calibrations.append(calibration)

    monkeypatch.setattr(demo, "export", write)
    monkeypatch.setattr(demo.runtimes, "open_exported", Exported)
    return calibrations


def test_files_are_measured_on_held_out_photos_and_calibrated_on_others(run_demo, small, litert):
    code, _, _ = run_demo(*small)
    assert code == 0
    model, float32, int8 = json.loads(pathlib.Path("out/findings.json").read_text())["runners"]
    assert [model["title"], float32["title"], int8["title"]] == ["Keras", "LiteRT float32", "LiteRT int8"]
    assert (float32["num_bytes"], int8["num_bytes"]) == (400, 100)
    assert float32["accuracy"] == model["accuracy"] and float32["agreement"] == 1
    assert int8["accuracy"] == 0.2  # of five kinds with one photo each
    photos = demo.read_photos(None, 15, 0)
    learned, held_out = (
        {photos.images[place].tobytes() for place in places} for places in (photos.training, photos.held_out)
    )
    for calibration in litert:
        assert {image.tobytes() for image in calibration} == learned != held_out
    page = Page(pathlib.Path("out/report.html").read_text(encoding="utf-8"))
    assert "median of 2 calls" in page.text
    assert "table" in page.tags and "The 8-bit file is 4.0 times smaller" in page.text


def test_a_file_that_differs_too_much_is_a_problem_of_one_line_and_the_other_is_measured(
    run_demo, small, litert, monkeypatch
):
    write = demo.export

    def refuse(model, path, format, *, precision, **settings):
        if precision == "int8":
            raise ExportError("The litert file differs from the model by 0.5")
        write(model, path, format, precision=precision, **settings)

    monkeypatch.setattr(demo, "export", refuse)
    stale = pathlib.Path("out/model_int8.tflite")
    stale.parent.mkdir()
    (stale.parent / demo.MARKER).touch()
    stale.write_bytes(b"of an earlier model")
    code, _, err = run_demo(*small)
    assert code == 1 and err == "Left out, LiteRT int8: The litert file differs from the model by 0.5\n"
    runners = json.loads(pathlib.Path("out/findings.json").read_text())["runners"]
    assert [each["title"] for each in runners] == ["Keras", "LiteRT float32"]
    page = Page(pathlib.Path("out/report.html").read_text(encoding="utf-8"))
    assert "LiteRT float32" in page.text and "The 8-bit file" not in page.text
    assert not stale.exists()


@pytest.mark.once
def test_unknown_weights_a_whole_model_and_wrong_numbers_are_refused(refused, capsys):
    assert "No such weight file" in refused("--weights", "absent.safetensors")
    error = refused("--weights", "model.keras")
    assert "keras-convnext convert model.keras weights.safetensors" in error
    with pytest.raises(SystemExit) as ended:
        demo.main(["--epochs", "0"])
    assert ended.value.code == 2
    assert "expected a whole number from 1 up, received '0'" in capsys.readouterr().err


@pytest.mark.once
def test_a_folder_that_no_demo_wrote_is_left_alone(refused):
    pathlib.Path("out").mkdir()
    pathlib.Path("out/report.html").write_text("mine")
    error = refused("--output", "out")
    assert (
        "Expected an empty folder, or one that an earlier demo wrote, received 'out' with report.html"
        in error
    )
    assert os.listdir("out") == ["report.html"] and pathlib.Path("out/report.html").read_text() == "mine"


def test_a_backend_that_cannot_train_is_refused(refused, monkeypatch):
    monkeypatch.setattr(keras.backend, "backend", lambda: "openvino")
    message = "Expected a backend that trains: tensorflow, jax, torch. Received: KERAS_BACKEND=openvino"
    assert message in refused()


@pytest.mark.once
def test_published_weights_without_a_network_are_one_line(refused, weights_folder):
    error = refused("--weights", "imagenet")
    assert "convnextv2_atto.fcmae_ft_in1k" in error and "KERAS_CONVNEXT_OFFLINE" in error


@pytest.mark.once
@pytest.mark.parametrize("words", [["demo"], ["demo", "--epochs", "3"], ["demo", "--help"]])
def test_the_command_says_where_the_demo_is(words, capsys):
    assert main.main(words) == 2
    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 1) and "Run `make demo` in a checkout" in err


@pytest.mark.once
def test_make_demo_passes_every_setting_on():
    words = ["DATA=a b", "WEIGHTS=imagenet", "EPOCHS=3", "SEED=1", "LIMIT=20"]
    done = subprocess.run(
        ["make", "--dry-run", "--no-print-directory", "--old-file=setup", "demo", *words],
        capture_output=True,
        text=True,
        cwd=ROOT,
    )
    assert done.returncode == 0, done.stderr
    command = shlex.split(done.stdout.replace("\\\n", " ").splitlines()[-1])
    assert command[1:4] == ["-m", "demo.run", "--output"]
    options = vars(demo._parser().parse_args(command[3:]))
    assert options == {
        "output": pathlib.Path("out/demo"),
        "data": pathlib.Path("a b"),
        "weights": "imagenet",
        "epochs": 3,
        "seed": 1,
        "limit": 20,
    }
    assert set(options) == {field.name for field in dataclasses.fields(demo.Settings)}


def test_seconds_of_all_parts_are_summed():
    assert report.seconds_text({"start": 1.4, "LiteRT": 30.4}) == "start 1, LiteRT 30, in all 32"


@pytest.mark.once
def test_names_from_outside_are_escaped_on_the_page(tmp_path):
    pixels = np.zeros((8, 8, 3), "uint8")
    photo = demo.ClassifiedPhoto("<b>.jpg", pixels, pixels, [("</h3><script>", 0.5)], ["a & b"], False)
    training = demo.Training("pretrained", 1e-3, [0.1, 0.2], [0.3, 0.4], 1.0)
    found = demo.Findings("w", [photo], ["<i>"], 4, 2, "<u>", [training, training], [photo])
    text = report.write_page(found, tmp_path / "page.html", "demo '<x>'").read_text()
    page = Page(text)
    assert not {"script", "i", "u", "x"} & set(page.tags) and "<b>.jpg" in page.text
    assert "demo '<x>'" in page.text and "a & b" in page.text


def test_the_whole_command_with_litert(tmp_path, weights):
    """In a process of its own, as it is started."""
    environment = {**os.environ, "KERAS_BACKEND": keras.backend.backend()}
    command = [sys.executable, "-m", "demo.run", "--weights", str(weights)]
    done = subprocess.run(
        [*command, "--epochs", "3", "--limit", "100", "--output", str(tmp_path / "out")],
        env=environment,
        capture_output=True,
        text=True,
        cwd=ROOT,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-2] == f"Look at {tmp_path / 'out' / 'report.html'}"
    assert "oneDNN" not in done.stderr  # nor another start-up line of TensorFlow
    runners = json.loads((tmp_path / "out" / "findings.json").read_text())["runners"]
    assert runners[1]["agreement"] == 1
    assert runners[1]["num_bytes"] > 2 * runners[2]["num_bytes"]
    assert (tmp_path / "out" / "model_int8.tflite").stat().st_size == runners[2]["num_bytes"]
