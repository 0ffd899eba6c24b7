"""The page that classifies pictures: headless Chromium opens it from the disk, drops files and reads it."""

import base64
import dataclasses
import hashlib
import io
import json
import pathlib
import shutil
import tarfile
import time

import keras
import numpy as np
import pytest
from PIL import Image, PngImagePlugin
from test_deploy import randomized

import keras_convnext
from keras_convnext import export, load
from keras_convnext.data import preprocess
from keras_convnext.data.preprocessing import Preprocessing
from keras_convnext.exporting import runtimes, web_page
from keras_convnext.weights import locate

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
# As root it has no sandbox, and without a graphics card WebGL is computed.
CHROMIUM_ARGUMENTS = ["--no-sandbox", "--enable-unsafe-swiftshader"]
IMAGES = pathlib.Path(__file__).parents[1] / "images"
PACKAGED = pathlib.Path(keras_convnext.__file__).parent / "data/photos"
PHOTOS = [
    *(PACKAGED / name for name in ("cat.jpg", "coffee.jpg", "rocket.jpg")),
    *(IMAGES / name for name in ("chelsea.png", "coffee.jpg", "rocket.jpg")),
]
LABELS = ["<b>bold</b>", "tea & 'coffee'", "</script>", "Füße", "猫", "f", "g", "h", "i", "j"]
SIZE = 64
TOLERANCE = 1e-4  # of a probability; 2e-7 where this was written, and a crop of another size gives over 0.01
SECONDS = 120  # for a page to open, on a machine that does other things

pytestmark = [pytest.mark.slow, pytest.mark.once]
needs_chromium = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium: apt-get install chromium")


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """A small classifier of fixed random weights as an ONNX file, which gives logits."""
    path = tmp_path_factory.mktemp("exported") / "small.onnx"
    model = load(
        "test_convnext", weights=None, input_shape=(SIZE, SIZE, 3), classes=10, classifier_activation=None
    )
    randomized(model)
    # Random weights find all photographs alike; what they have in common is taken off, the rest made larger.
    pixels = np.stack([prepared(photo) for photo in PHOTOS]).astype("float32")
    kernel, bias = model.layers[-1].get_weights()
    logits = keras.ops.convert_to_numpy(model(pixels, training=False))
    model.layers[-1].set_weights([6 * kernel, bias - 6 * (logits - bias).mean(axis=0)])
    export(model, path, labels=LABELS, licence="apache-2.0", preprocessing=Preprocessing(SIZE), check=False)
    return path


@pytest.fixture(scope="module")
def runtime():
    """The folder of ONNX Runtime Web, fetched by npm when it is not in the cache."""
    folder = locate.cache_folder() / f"onnxruntime-web-{web_page.RUNTIME_VERSION}"
    if web_page._wrong_file(web_page._read_folder(folder)) is not None:
        if shutil.which("npm") is None:
            pytest.skip("no npm, and no ONNX Runtime Web in the cache")
        try:
            web_page._fetch(folder)
        except OSError as error:
            pytest.skip(f"npm could not fetch ONNX Runtime Web: {error}")
    return folder


@pytest.fixture(scope="module")
def html(exported, runtime):
    return web_page.write_page(exported, exported.with_suffix(".html"), runtime)


@pytest.fixture(scope="module")
def chromium():
    api = pytest.importorskip("playwright.sync_api")
    with api.sync_playwright() as playwright:
        opened = playwright.chromium.launch(executable_path=CHROMIUM, args=CHROMIUM_ARGUMENTS)
        yield opened
        opened.close()


class Tab:
    """A page in a tab, with no network.

    Attributes:
        requests, problems: addresses that it asked for; what it complained of.
        choosers: dialogues for a file that it opened.
    """

    def __init__(self, context, path):
        context.set_offline(True)
        self.tab = context.new_page()
        self.requests, self.problems, self.choosers = [], [], []
        # Before the page opens: a key pressed at once can come before the driver has this set up.
        self.tab.on("filechooser", lambda chooser: self.choosers.append(chooser))
        self.tab.on("request", lambda request: self.requests.append(request.url))
        self.tab.on("pageerror", lambda error: self.problems.append(str(error)))
        self.tab.on("console", lambda message: self.problems.append(message.text))
        self.tab.goto(path.as_uri())
        self.wait("Loading the model …")

    def wait(self, text):
        """Until the page says something else; its policy forbids what the driver waits with."""
        end = time.monotonic() + SECONDS
        while self.status() == text and time.monotonic() < end:
            time.sleep(0.02)
        assert self.status() != text
        return self.status()

    def status(self):
        return self.tab.locator("#status").text_content()

    def drop(self, content, name):
        """Drops a file; returns what the page says of it."""
        self.tab.evaluate(
            """([content, name]) => {
                const bytes = Uint8Array.from(atob(content), (character) => character.charCodeAt(0));
                const dataTransfer = new DataTransfer();
                dataTransfer.items.add(new File([bytes], name));
                const settings = { dataTransfer, bubbles: true, cancelable: true };
                document.getElementById("drop").dispatchEvent(new DragEvent("drop", settings));
            }""",
            [base64.b64encode(content).decode(), name],
        )
        return self.wait("Looking …")

    def classes(self):
        """(names, probabilities) in the order of the page."""
        items = self.tab.locator("#classes li")
        names = [item.locator(".name").text_content() for item in items.all()]
        return names, np.array([float(item.get_attribute("data-probability")) for item in items.all()])

    def pixels(self, content, **settings):
        """What the page would give to a model, uint8 (H, W, C)."""
        defaults = dataclasses.asdict(Preprocessing(SIZE))
        settings = {"channels": 3, "height": SIZE, "width": SIZE, **defaults, **settings}
        found = self.tab.evaluate(
            """async ([content, settings]) => {
                const bytes = Uint8Array.from(atob(content), (character) => character.charCodeAt(0));
                const { bitmap } = await decode(new Blob([bytes]), false);
                return [...prepare(bitmap, settings)];
            }""",
            [base64.b64encode(content).decode(), settings],
        )
        shape = (settings["height"], settings["width"], settings["channels"])
        return np.array(found).reshape(shape).astype("uint8")


@pytest.fixture(scope="module")
def tab(chromium, html):
    with chromium.new_context() as context:
        yield Tab(context, html)


@pytest.fixture
def context(chromium):
    with chromium.new_context(viewport={"width": 320, "height": 640}, color_scheme="dark") as context:
        yield context


def prepared(photo):
    return preprocess.preprocess_image(preprocess.read_image(photo), Preprocessing(SIZE))


def sidecar(path):
    return pathlib.Path(f"{path}.metadata.json")


def by_python(path, photo):
    """(names, probabilities) of the five best, by Python's own way from the file on."""
    logits = runtimes.open_exported(path)(prepared(photo)[None])[0].astype("float64")
    powers = np.exp(logits - logits.max())
    best = np.argsort(-powers)[:5]
    return [LABELS[index] for index in best], (powers / powers.sum())[best]


def png(image, **settings):
    file = io.BytesIO()
    image.save(file, "PNG", **settings)
    return file.getvalue()


def noise(*shape, seed=0):
    """Random pixels with soft and hard edges."""
    small = np.random.default_rng(seed).integers(0, 256, (shape[0] // 3 + 1, shape[1] // 3 + 1, *shape[2:]))
    return np.kron(small, np.ones((3, 3) + (1,) * len(shape[2:])))[: shape[0], : shape[1]].astype("uint8")


# The page.


@needs_chromium
def test_a_dropped_photograph_gets_the_classes_that_python_finds(tab, exported):
    first = set()
    for photo in PHOTOS:
        said = tab.drop(photo.read_bytes(), photo.name)
        names, probabilities = tab.classes()
        expected_names, expected = by_python(exported, photo)
        assert names == expected_names
        np.testing.assert_allclose(probabilities, expected, rtol=0, atol=TOLERANCE)
        assert said.startswith(f"{names[0]}, {100 * expected[0]:.1f} %. The model took ")
        assert said.endswith(" ms.")
        first.add(names[0])
    assert len(first) >= 3
    assert tab.problems == []


@needs_chromium
def test_another_preprocessing_gives_other_probabilities(context, exported, runtime, tmp_path):
    copy = shutil.copy(exported, tmp_path)
    metadata = json.loads(sidecar(exported).read_text())
    metadata["input"]["preprocessing"]["crop_fraction"] = 0.5
    sidecar(copy).write_text(json.dumps(metadata))
    other = Tab(context, web_page.write_page(copy, tmp_path / "other.html", runtime))
    for photo in PHOTOS[:3]:
        other.drop(photo.read_bytes(), photo.name)
        expected_names, expected = by_python(exported, photo)
        names, probabilities = other.classes()
        assert names != expected_names or np.abs(probabilities - expected).max() > 100 * TOLERANCE


@needs_chromium
def test_no_request_leaves_the_page(context, html):
    own = Tab(context, html)
    own.drop(PHOTOS[0].read_bytes(), "cat.jpg")
    assert own.classes()[0]
    assert [address for address in own.requests if not address.startswith(("blob:", "data:"))] == [
        html.as_uri()
    ]
    blocked = own.tab.evaluate("fetch('https://example.org').then(() => 'came', () => 'blocked')")
    assert blocked == "blocked" and any("Content Security Policy" in text for text in own.problems)


@needs_chromium
def test_what_is_not_a_picture_is_said_in_a_sentence(tab):
    for content in (b"a shopping list", b"", PHOTOS[0].read_bytes()[:3]):
        said = tab.drop(content, "list.txt")
        assert said == ("“list.txt” is not a picture that this browser reads. Try a JPEG or a PNG file.")
        assert tab.classes()[0] == []
    tab.tab.evaluate(
        """() => {
            const dataTransfer = new DataTransfer();
            dataTransfer.setData("text/plain", "words");
            dispatchEvent(new DragEvent("drop", { dataTransfer, cancelable: true }));
        }"""
    )
    assert tab.wait("Looking …") == "Expected a picture file; what came is text or an address."
    tab.drop(PHOTOS[0].read_bytes(), "cat.jpg")
    assert len(tab.classes()[0]) == 5


@needs_chromium
def test_a_picture_can_be_chosen_by_keyboard_and_pasted(context, html, exported):
    own = Tab(context, html)
    own.tab.keyboard.press("Tab")
    assert own.tab.evaluate("document.activeElement.id") == "file"
    own.tab.keyboard.press("Enter")
    end = time.monotonic() + SECONDS
    while not own.choosers and time.monotonic() < end:
        own.tab.wait_for_timeout(20)
    own.choosers[0].set_files(PHOTOS[2])
    own.wait("Ready.")
    own.wait("Looking …")
    assert own.classes()[0] == by_python(exported, PHOTOS[2])[0]
    assert own.tab.evaluate("document.documentElement.scrollWidth") == 320
    own.tab.evaluate(
        """(content) => {
            const bytes = Uint8Array.from(atob(content), (character) => character.charCodeAt(0));
            const clipboardData = new DataTransfer();
            clipboardData.items.add(new File([bytes], "pasted.png"));
            dispatchEvent(new ClipboardEvent("paste", { clipboardData }));
        }""",
        base64.b64encode(PHOTOS[3].read_bytes()).decode(),
    )
    own.wait("Looking …")
    assert own.classes()[0] == by_python(exported, PHOTOS[3])[0]


@needs_chromium
@pytest.mark.parametrize("name", ["m.jpg", "m.png"])
def test_a_picture_stored_sideways_stays_so_until_it_is_turned(name, tab, exported, tmp_path):
    photo = Image.open(PHOTOS[2])
    sideways, plain, upright = tmp_path / name, tmp_path / "plain.png", tmp_path / "upright.png"
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned: what is shown is this, turned to the right
    photo.save(sideways, exif=exif)
    Image.open(sideways).convert("RGB").save(plain)
    Image.open(sideways).convert("RGB").transpose(Image.Transpose.ROTATE_270).save(upright)
    tab.drop(sideways.read_bytes(), name)
    stored = tab.classes()
    np.testing.assert_allclose(stored[1], by_python(exported, plain)[1], rtol=0, atol=TOLERANCE)
    assert stored[0] == by_python(exported, sideways)[0]
    button = tab.tab.locator("#turn")
    assert button.text_content() == "Turn it as the camera was held"
    button.click()
    tab.wait("Looking …")
    names, probabilities = tab.classes()
    assert names == by_python(exported, upright)[0]
    np.testing.assert_allclose(probabilities, by_python(exported, upright)[1], rtol=0, atol=0.02)
    assert np.abs(probabilities - stored[1]).max() > 0.02
    assert button.text_content() == "Look at it as it is stored"
    photo.save(tmp_path / "m.webp", exif=exif, lossless=True)
    for other in (plain, tmp_path / "m.webp"):
        tab.drop(other.read_bytes(), other.name)
        assert tab.classes()[0] == by_python(exported, other)[0]
        assert not button.is_visible()


@needs_chromium
def test_probabilities_are_shown_as_they_are(context, exported, runtime, tmp_path):
    copy = shutil.copy(exported, tmp_path)
    metadata = json.loads(sidecar(exported).read_text())
    metadata["output"]["activation"] = "softmax"
    metadata["labels"] = metadata["licence"] = None
    sidecar(copy).write_text(json.dumps(metadata))
    other = Tab(context, web_page.write_page(copy, tmp_path / "other.html", runtime))
    other.drop(PHOTOS[0].read_bytes(), "cat.jpg")
    outputs = runtimes.open_exported(exported)(prepared(PHOTOS[0])[None])[0]
    names, values = other.classes()
    assert names == [f"class {index}" for index in np.argsort(-outputs)[:5]]
    np.testing.assert_allclose(values, np.sort(outputs)[::-1][:5], rtol=1e-4)
    assert "Licence of its weights: not stated." in other.tab.locator("footer").text_content()


@needs_chromium
def test_a_model_in_pieces_opens_in_a_browser_that_cannot_decode_base64(
    context, exported, runtime, tmp_path, monkeypatch
):
    monkeypatch.setattr(web_page, "_CHUNK_BYTES", 300_000)
    page = web_page.write_page(exported, tmp_path / "page.html", runtime)
    assert page.read_text().count('data-part="model"') == 4
    context.add_init_script("delete Uint8Array.fromBase64")
    other = Tab(context, page)
    other.drop(PHOTOS[0].read_bytes(), "cat.jpg")
    names, probabilities = other.classes()
    assert names == by_python(exported, PHOTOS[0])[0]
    np.testing.assert_allclose(probabilities, by_python(exported, PHOTOS[0])[1], rtol=0, atol=TOLERANCE)


@needs_chromium
def test_a_damaged_model_is_said_in_a_sentence(context, exported, runtime, tmp_path):
    copy = pathlib.Path(shutil.copy(exported, tmp_path))
    shutil.copy(sidecar(exported), tmp_path)
    copy.write_bytes(copy.read_bytes()[:5000])
    other = Tab(context, web_page.write_page(copy, tmp_path / "page.html", runtime))
    assert other.status().startswith("The model could not be run: ")
    metadata = json.loads(sidecar(exported).read_text())
    metadata["output"]["classes"], metadata["labels"] = 11, None
    shutil.copy(exported, tmp_path)
    sidecar(copy).write_text(json.dumps(metadata))
    other = Tab(context, web_page.write_page(copy, tmp_path / "page.html", runtime, replace=True))
    assert other.status() == "Expected a classifier of 11 classes; the model gives 10 numbers."


@needs_chromium
@pytest.mark.parametrize("activation", [None, "sigmoid"])
def test_numbers_that_are_not_finite_are_no_classes(activation, context, runtime, tmp_path):
    model = load(
        "test_convnext", weights=None, input_shape=(32, 32, 3), classes=3, classifier_activation=activation
    )
    kernel, _ = model.layers[-1].get_weights()
    model.layers[-1].set_weights([kernel, np.array([0, np.nan, 0])])
    export(model, tmp_path / "m.onnx", check=False)
    opened = Tab(context, web_page.write_page(tmp_path / "m.onnx", tmp_path / "m.html", runtime))
    opened.drop(PHOTOS[0].read_bytes(), "cat.jpg")
    assert "numbers that are not finite, as after a training that diverged" in opened.status()
    assert opened.classes()[0] == []


@needs_chromium
def test_the_footer_names_licences_and_the_title_is_text(tab):
    footer = tab.tab.locator("footer").text_content()
    assert "Model: test_convnext, 1.0 MB. Licence of its weights: apache-2.0." in footer
    assert f"ONNX Runtime Web {web_page.RUNTIME_VERSION}, MIT licence, copyright Microsoft" in footer
    assert "Permission is hereby granted, free of charge" in footer
    assert tab.tab.title() == "test_convnext"


# Its pixels.


def gamma(value):
    """The chunk of a PNG file that says how its pixels relate to light, which Pillow leaves alone."""
    info = PngImagePlugin.PngInfo()
    info.add(b"gAMA", round(100000 * value).to_bytes(4, "big"))
    return {"pnginfo": info}


def palette(transparency):
    image = Image.fromarray(noise(120, 90, 3)).quantize(20)
    return png(image, transparency=transparency)


FILES = {
    "photograph": lambda: PHOTOS[3].read_bytes(),
    "tall": lambda: png(Image.fromarray(noise(400, 90, 3))),
    "wide": lambda: png(Image.fromarray(noise(100, 777, 3))),
    "large": lambda: png(Image.fromarray(noise(2300, 2100, 3))),
    "small": lambda: png(Image.fromarray(noise(20, 31, 3))),
    "one pixel": lambda: png(Image.fromarray(noise(1, 1, 3))),
    "transparent": lambda: png(Image.fromarray(noise(120, 150, 4))),
    "gray": lambda: png(Image.fromarray(noise(120, 150))),
    "gray and transparent": lambda: png(Image.fromarray(noise(120, 150, 2), "LA")),
    "palette": lambda: palette(None),
    "palette and transparent": lambda: palette(3),
    "one bit": lambda: png(Image.fromarray(noise(120, 150)).convert("1")),
    "gamma": lambda: png(Image.fromarray(noise(120, 150, 3)), **gamma(1.0)),
}


@needs_chromium
@pytest.mark.parametrize("name", FILES)
def test_pixels_equal_those_of_python(name, tab):
    content = FILES[name]()
    expected = preprocess.preprocess_image(preprocess.decode_image(content, name), Preprocessing(SIZE))
    assert difference(tab.pixels(content), expected) == 0


@needs_chromium
@pytest.mark.parametrize(
    "settings",
    [
        {"interpolation": "bilinear"},
        {"crop_mode": "squash"},
        {"resize_size": 70},
        {"resize_size": 41},  # smaller than the crop: black around it
        {"crop_fraction": 1.0},
        {"height": 64, "width": 90, "crop_fraction": 0.9},
        {"height": 91, "width": 64, "crop_fraction": 0.9},
    ],
)
def test_every_preprocessing_equals_that_of_python(settings, tab):
    content = PHOTOS[3].read_bytes()
    image = preprocess.decode_image(content, "")
    image_size = (settings.get("height", SIZE), settings.get("width", SIZE))
    arguments = {name: value for name, value in settings.items() if name not in ("height", "width")}
    expected = preprocess.preprocess_image(image, Preprocessing(image_size, **arguments))
    assert difference(tab.pixels(content, **settings), expected) == 0
    plain = preprocess.preprocess_image(image, Preprocessing(image_size, crop_fraction=0.6))
    assert difference(tab.pixels(content, **settings), plain) > 1


@needs_chromium
def test_a_model_of_one_channel_gets_gray(tab):
    content = PHOTOS[3].read_bytes()
    expected = Image.fromarray(prepared(PHOTOS[3])).convert("L")
    assert difference(tab.pixels(content, channels=1)[..., 0], np.asarray(expected)) == 0


@needs_chromium
def test_pixels_of_a_jpeg_are_those_of_python_within_a_level(tab):
    for photo in PHOTOS:
        if photo.suffix == ".jpg":
            assert difference(tab.pixels(photo.read_bytes()), prepared(photo)) <= 1


def difference(received, expected):
    assert received.shape == expected.shape
    return np.abs(received.astype(int) - expected).max()


# The runtime.


def test_runtime_can_be_a_folder_or_an_archive(exported, runtime, html, tmp_path):
    dist = tmp_path / "node_modules/onnxruntime-web/dist"
    dist.mkdir(parents=True)
    for file, _ in web_page.RUNTIME_FILES.values():
        shutil.copy(runtime / file, dist)
    with tarfile.open(tmp_path / "package.tgz", "w:gz", compresslevel=1) as archive:
        archive.add(dist, "package/dist")
    for source in (tmp_path, dist.parent, dist, tmp_path / "package.tgz"):
        page = web_page.write_page(exported, tmp_path / "page.html", source, replace=True)
        assert page.read_bytes() == html.read_bytes()


def test_another_runtime_is_refused(exported, runtime, tmp_path):
    page = tmp_path / "page.html"
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"'.*empty', which lacks ort\.wasm\.bundle\.min\.mjs\. .* npm pack"):
        web_page.write_page(exported, page, tmp_path / "empty")
    altered = shutil.copytree(runtime, tmp_path / "altered")
    with open(altered / "ort-wasm-simd-threaded.wasm", "ab") as file:
        file.write(b"0")
    with pytest.raises(ValueError, match=r"onnxruntime-web@1\.30\.0 .* which has another ort-wasm-simd-thr"):
        web_page.write_page(exported, page, altered)
    with pytest.raises(
        FileNotFoundError, match=r"There is no '.*nowhere': expected onnxruntime-web@1\.30\.0"
    ):
        web_page.write_page(exported, page, tmp_path / "nowhere")
    (tmp_path / "broken.tgz").write_bytes(b"no archive")
    with pytest.raises(ValueError, match=r"a \.tgz file in '.*broken\.tgz', which is damaged"):
        web_page.write_page(exported, page, tmp_path / "broken.tgz")
    with tarfile.open(tmp_path / "other.tgz", "w:gz") as archive:
        archive.add(PHOTOS[0], "package/cat.jpg")
    with pytest.raises(ValueError, match=r"'.*other\.tgz', which lacks ort\.wasm\.bundle\.min\.mjs"):
        web_page.write_page(exported, page, tmp_path / "other.tgz")
    assert not page.exists()


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """An empty cache folder."""
    monkeypatch.setenv("KERAS_CONVNEXT_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("KERAS_CONVNEXT_OFFLINE", raising=False)
    return tmp_path / "cache"


@pytest.fixture
def npm(tmp_path, monkeypatch):
    """Puts a program in npm's place: `npm(lines)` writes it."""

    def write(lines):
        folder = tmp_path / "bin"
        folder.mkdir(exist_ok=True)
        (folder / "npm").write_text(f"#!/bin/sh\n{lines}\n")
        (folder / "npm").chmod(0o755)
        monkeypatch.setenv("PATH", f"{folder}:/usr/bin:/bin")

    return write


def test_without_npm_the_message_names_the_other_way(exported, cache, tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(FileNotFoundError, match=r"npm was not found.*Install npm.*\(--runtime\)"):
        web_page.write_page(exported, tmp_path / "page.html")
    monkeypatch.setenv("KERAS_CONVNEXT_OFFLINE", "1")
    with pytest.raises(FileNotFoundError, match=r"KERAS_CONVNEXT_OFFLINE forbids.*\(--runtime\)"):
        web_page.write_page(exported, tmp_path / "page.html")
    assert not cache.exists() and not (tmp_path / "page.html").exists()


def test_what_npm_gives_is_compared_with_what_was_published(exported, cache, npm, tmp_path):
    npm("echo other > onnxruntime-web-1.30.0.tgz")
    with pytest.raises(ValueError, match=r"expected sha512-q0y\+.*==, received sha512-.*not kept"):
        web_page.write_page(exported, tmp_path / "page.html")
    npm("echo npm error code ENOTFOUND >&2; exit 1")
    with pytest.raises(
        OSError, match=r"could not fetch onnxruntime-web@1\.30\.0: npm error code ENOTFOUND Or"
    ):
        web_page.write_page(exported, tmp_path / "page.html")
    assert [path for path in cache.rglob("*") if path.is_file()] == []


def test_npm_that_hangs_is_given_up(exported, cache, npm, tmp_path, monkeypatch):
    monkeypatch.setattr(web_page, "NPM_SECONDS", 0.2)
    npm("exec sleep 60")
    with pytest.raises(TimeoutError, match=r"npm did not fetch onnxruntime-web@1\.30\.0 in 0 s\."):
        web_page.write_page(exported, tmp_path / "page.html")


def test_a_fetched_runtime_is_kept_and_a_damaged_one_fetched_again(
    exported, runtime, html, cache, npm, tmp_path, monkeypatch, capsys
):
    monkeypatch.delenv("KERAS_CONVNEXT_QUIET", raising=False)
    archive = tmp_path / "kept.tgz"
    with tarfile.open(archive, "w:gz", compresslevel=1) as written:
        written.add(runtime, "package/dist")
    digest = hashlib.sha512(archive.read_bytes()).digest()
    monkeypatch.setattr(web_page, "RUNTIME_INTEGRITY", f"sha512-{base64.b64encode(digest).decode()}")
    npm(f"cp {archive} . && echo x >> {tmp_path}/calls")
    for expected_calls, said in ((1, "Fetching onnxruntime-web@1.30.0 with npm"), (1, ""), (2, "Fetching")):
        page = web_page.write_page(exported, tmp_path / "page.html", replace=True)
        assert page.read_bytes() == html.read_bytes()
        assert (tmp_path / "calls").read_text().count("x") == expected_calls
        err = capsys.readouterr().err
        assert err.startswith(said) and bool(err) == bool(said)
        if (expected_calls, said) == (1, ""):
            kept = next(cache.rglob("*.wasm"))
            kept.write_bytes(kept.read_bytes()[:1000])
    assert sorted(path.name for path in cache.rglob("*") if path.is_file()) == sorted(
        file for file, _ in web_page.RUNTIME_FILES.values()
    )


# What is refused, before anything is written.


def altered_copy(exported, folder, change):
    """The model with another metadata file: `change` gets the dict."""
    copy = pathlib.Path(shutil.copy(exported, folder))
    metadata = json.loads(sidecar(exported).read_text())
    change(metadata)
    sidecar(copy).write_text(json.dumps(metadata))
    return copy


def test_only_models_that_a_page_can_show_are_taken(exported, tmp_path, monkeypatch):
    page = tmp_path / "page.html"

    def refused(model, message, error=ValueError):
        with pytest.raises(error, match=message):
            web_page.write_page(model, page)
        assert not page.exists()

    refused(
        tmp_path / "m.tflite", r"Expected a \.onnx file, as `keras-convnext export MODEL m\.onnx`.*m\.tflite'"
    )
    refused(tmp_path / "m.onnx", r"no file '.*m\.onnx'\. Write it first: keras-conv", FileNotFoundError)
    alone = tmp_path / "alone.onnx"
    shutil.copy(exported, alone)
    refused(alone, r"'.*alone\.onnx\.metadata\.json' beside the model.*export the model", FileNotFoundError)
    for text in ("{", "[]", "{}", '{"input": null}'):
        sidecar(alone).write_text(text)
        refused(alone, r"what `keras-convnext export` writes in '.*alone\.onnx\.metadata\.json', which")
    changes = (
        (lambda metadata: metadata["input"].update(batch_size=4), "takes 4: export it with --batch-size any"),
        (lambda metadata: metadata["output"].update(activation="relu"), "linear, softmax, sigmoid.*'relu'"),
        (
            lambda metadata: metadata["input"]["preprocessing"].update(interpolation="lanczos"),
            r"Unknown interpolation 'lanczos'\. Known: bicubic, bilinear",
        ),
    )
    for change, message in changes:
        refused(altered_copy(exported, tmp_path, change), message)
    monkeypatch.setattr(web_page, "MAX_MODEL_BYTES", 500_000)
    refused(exported, r"at most 0 MB.*small\.onnx' of 1 MB\. Export a smaller model")


def test_output_is_not_replaced_unasked(exported, tmp_path):
    page = tmp_path / "page.html"
    page.write_text("mine")
    with pytest.raises(
        FileExistsError, match=r"page\.html' is there already\. Pass replace=True \(--force\)"
    ):
        web_page.write_page(exported, page)
    with pytest.raises(ValueError, match=r"ends in \.html\. Received: '.*small\.onnx'"):
        web_page.write_page(exported, exported, replace=True)
    with pytest.raises(FileNotFoundError, match=r"There is no folder '.*nowhere'\. Create it first\."):
        web_page.write_page(exported, tmp_path / "nowhere/page.html")
    assert page.read_text() == "mine" and sorted(tmp_path.iterdir()) == [page]


def test_free_sizes_are_those_of_the_preprocessing(exported, tmp_path):
    def settings(**changes):
        metadata = json.loads(sidecar(exported).read_text())
        metadata["input"] |= changes
        return web_page._page_settings(metadata, exported)

    def size(**changes):
        found = settings(**changes)
        return found["height"], found["width"]

    assert size() == (64, 64)
    assert size(image_size=[96, 64]) == (96, 64)
    assert size(image_size=None, preprocessing={"image_size": 288}) == (288, 288)
    assert size(image_size=None, preprocessing={}) == size(image_size=None, preprocessing=None) == (224, 224)
    found = settings(preprocessing={"image_size": 64, "crop_fraction": 0.5})
    assert (found["crop_fraction"], found["crop_mode"], found["resize_size"]) == (0.5, "center", None)
    assert (settings()["channels"], settings(colours="gray")["channels"]) == (3, 1)


# The command.


def test_command_writes_the_page(exported, runtime, html, run, refused, tmp_path):
    code, out, err = run("page", exported, "page.html", "--runtime", runtime)
    assert (code, err) == (0, "")
    assert out == f"page.html: {html.stat().st_size / 1e6:.1f} MB; open it in a browser\n"
    assert (tmp_path / "page.html").read_bytes() == html.read_bytes()
    assert "is there already" in refused("page", exported, "page.html", "--runtime", runtime)
    assert run("page", exported, "page.html", "--runtime", runtime, "--force")[0] == 0
    assert "Expected a .onnx file" in refused("page", "model.pt2", "other.html")
