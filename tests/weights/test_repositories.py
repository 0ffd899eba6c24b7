"""Repositories with a config.json: folders here, and those of a Hugging Face endpoint on this machine."""

import base64
import http.server
import json
import os
import pathlib
import subprocess
import sys
import threading

import peers
import pytest
import timm
import transformers

from keras_convnext import _files
from keras_convnext.weights import repositories
from keras_convnext.weights.resolve import meaning, resolve

pytestmark = pytest.mark.once

ROOT = pathlib.Path(__file__).parents[2]
COMMIT = "0123456789abcdef0123456789abcdef01234567"
TIMM = {
    "input_size": [3, 160, 160], "crop_pct": 0.95, "crop_mode": "center", "interpolation": "bicubic",
    "mean": [0.5, 0.4, 0.3], "std": [0.2, 0.3, 0.4],
}  # fmt: skip


def save_timm(folder):
    from safetensors.torch import save_file

    folder.mkdir(parents=True)
    model = peers.randomise(timm.create_model("test_convnext2", num_classes=7), seed=1)
    save_file(model.state_dict(), folder / "model.safetensors")
    config = {"architecture": "test_convnext2", "num_classes": 7, "pretrained_cfg": TIMM}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "README.md").write_text("---\ntags:\n- timm\nlicense: cc-by-nc-4.0\n---\n# of timm\n")
    return model


def save_transformers(folder):
    config = transformers.ConvNextV2Config(depths=[2, 2, 6, 2], hidden_sizes=[40, 80, 160, 320], num_labels=5)
    peers.randomise(transformers.ConvNextV2ForImageClassification(config), seed=2).save_pretrained(folder)
    values = {"crop_pct": 0.9, "size": {"shortest_edge": 224}, "resample": 2, "image_mean": [0.1, 0.2, 0.3],
              "image_std": [0.5, 0.6, 0.7]}  # fmt: skip
    (folder / "preprocessor_config.json").write_text(json.dumps(values))


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Folders as timm and transformers upload them."""
    folder = tmp_path_factory.mktemp("hub")
    save_timm(folder / "me" / "timm")
    save_transformers(folder / "me" / "transformers")
    return folder / "me"


def test_timms_folder_says_architecture_classes_images_and_licence(folders):
    found = resolve(folders / "timm")
    assert (found.variant.name, found.classes) == ("test_convnext2", 7)
    prepared = found.preprocessing
    assert (prepared.image_size, prepared.crop_fraction, prepared.mean) == (160, 0.95, (0.5, 0.4, 0.3))
    assert found.repository.licence == "cc-by-nc-4.0"
    assert found.canonical()["head.weight"].shape == (7, 128)


def test_transformers_folder_says_them_too(folders):
    found = resolve(folders / "transformers")
    assert (found.variant.name, found.classes) == ("convnextv2_atto", 5)
    prepared = found.preprocessing
    assert (prepared.scale_size, prepared.interpolation, prepared.std) == (
        (248, 248),
        "bilinear",
        (0.5, 0.6, 0.7),
    )


@pytest.mark.parametrize(("side", "expected"), [(224, ("center", 0.9)), (384, ("squash", 1.0))])
def test_images_of_384_pixels_are_squashed_as_transformers_does(folders, tmp_path, side, expected):
    values = json.loads((folders / "transformers" / "preprocessor_config.json").read_text())
    values["size"]["shortest_edge"] = side
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(values))
    for name in ("config.json", "model.safetensors"):
        (tmp_path / name).write_bytes((folders / "transformers" / name).read_bytes())
    prepared = repositories.open_repository(tmp_path).preprocessing
    assert (prepared.crop_mode, prepared.crop_fraction) == expected


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"architecture": "resnet50"}, "Expected a ConvNeXt in .*, received timm's 'resnet50'"),
        ({"model_type": "vit"}, "of timm, transformers or keras_convnext.* model_type 'vit'"),
        ({"architecture": "convnext_tiny"}, "config.json.*input_size"),
        ({"registered_name": "keras_hub>ResNetBackbone"}, "registered_name 'keras_hub>ResNetBackbone'"),
        ([], "Expected JSON"),
    ],
)
def test_other_projects_and_damaged_files_are_named(tmp_path, config, message):
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "model.safetensors").write_bytes(b"")
    with pytest.raises((ValueError, _files.FileFormatError), match=message):
        repositories.open_repository(tmp_path)


def test_a_repository_of_the_catalog_is_its_row():
    assert meaning("hf://timm/convnext_tiny.fb_in1k").tag == "convnext_tiny.fb_in1k"
    assert meaning("hf://me/other") == "hf://me/other"
    with pytest.raises(ValueError, match=r"Expected hf://user/name.*'hf://other'"):
        resolve("hf://other")


class Handler(http.server.BaseHTTPRequestHandler):
    """Serves a folder as the Hub does, and takes commits into it."""

    def log_message(self, *arguments):
        pass

    def answer(self, status, content=b"", **headers):
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def do_GET(self):
        self.server.requests.append(f"{self.command} {self.path}")
        if self.path.startswith("/api/"):
            return self.answer(200, json.dumps({"id": "me/atto", "sha": COMMIT}).encode())
        user, name, _, _, file = self.path.strip("/").split("/", 4)
        path = self.server.folder / user / name / file
        if not path.is_file():
            missing = "EntryNotFound" if path.parent.is_dir() else "RepoNotFound"
            return self.answer(404, X_Error_Code=missing, X_Repo_Commit=COMMIT)
        content = path.read_bytes()
        self.answer(200, content, ETag=f'"{hash(content) & 0xFFFFFF:x}"', X_Repo_Commit=COMMIT)

    def do_HEAD(self):
        self.do_GET()

    def do_POST(self):
        self.server.requests.append(f"POST {self.path}")
        body = self.rfile.read(int(self.headers["Content-Length"]))
        if self.headers["Authorization"] != "Bearer hf_mine":
            return self.answer(401)
        result, here = {}, f"http://{self.headers['Host']}"
        if self.path == "/api/repos/create":
            repository = json.loads(body)
            result = {"url": f"{here}/{repository['organization']}/{repository['name']}"}
        elif "/preupload/" in self.path:
            files = json.loads(body)["files"]
            result = {
                "files": [
                    {"path": one["path"], "uploadMode": "regular", "shouldIgnore": False} for one in files
                ]
            }
        elif "/commit/" in self.path:
            folder = self.server.folder.joinpath(*self.path.split("/")[3:5])
            folder.mkdir(parents=True)
            for line in map(json.loads, body.splitlines()):
                if line["key"] == "file":
                    content = base64.b64decode(line["value"]["content"])
                    (folder / line["value"]["path"]).write_bytes(content)
            url = "/".join([here, *self.path.split("/")[3:5], "commit", COMMIT])
            result = {"commitUrl": url, "commitOid": COMMIT, "hookOutput": ""}
        self.answer(200, json.dumps(result).encode(), Content_Type="application/json")


@pytest.fixture
def hub(folders, tmp_path, monkeypatch):
    """An endpoint with the folders, for children: HF_ENDPOINT is read at import."""
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.folder, server.requests = folders.parent, []
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "huggingface"))
    monkeypatch.setenv("HF_TOKEN", "hf_mine")
    monkeypatch.setenv("KERAS_BACKEND", "torch")
    for name in ("XET", "TELEMETRY", "PROGRESS_BARS"):
        monkeypatch.setenv(f"HF_HUB_DISABLE_{name}", "1")
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    yield server
    server.shutdown()
    server.server_close()


def run_child(program, folder):
    environment = os.environ | {"PYTHONPATH": f"{ROOT}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"}
    return subprocess.run(
        [sys.executable, "-c", program],
        env=environment,
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=400,
    )


# Without Keras.
RESOLVE = """
import sys, keras_convnext_main
from keras_convnext.weights.resolve import resolve
for name in ("hf://me/timm", "hf://me/transformers"):
    found = resolve(name)
    print(found.variant.name, found.classes, found.preprocessing.crop_fraction, len(found.canonical()))
assert "keras" not in sys.modules
try:
    resolve("hf://me/nothing")
except OSError as error:
    print(error)
"""


def test_repositories_of_the_hub_are_downloaded_once_and_used_offline(hub, tmp_path, monkeypatch):
    done = run_child(RESOLVE, tmp_path)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[0] == f"test_convnext2 7 0.95 {len(resolve(hub.folder / 'me' / 'timm').canonical())}"
    assert lines[1].startswith("convnextv2_atto 5 0.9 ")
    assert "answered 404 (not found) for config.json of me/nothing" in lines[2]
    assert lines[2].endswith("Or download the repository to a folder, and pass that.")
    assert "hf://me/timm are licensed cc-by-nc-4.0: not for commercial use" in done.stderr
    assert "GET /me/timm/resolve/main/model.safetensors" in hub.requests
    assert "GET /me/timm/resolve/main/pytorch_model.bin" not in hub.requests
    hub.requests.clear()
    monkeypatch.setenv("KERAS_CONVNEXT_OFFLINE", "1")
    again = run_child(RESOLVE, tmp_path)
    assert again.stdout.splitlines()[:2] == lines[:2]
    assert "KERAS_CONVNEXT_OFFLINE forbids to download it" in again.stdout
    assert hub.requests == []


PUSH = """
import numpy as np, keras_convnext
from keras_convnext.cli.main import main
tag = "convnextv2_atto.tiny_imagenet200"
assert main(["preset", tag, "hf://me/dry", "--dry-run"]) == 0
assert main(["preset", tag, "hf://me/atto"]) == 0
images = np.random.default_rng(0).integers(0, 256, (2, 64, 64, 3), dtype="uint8")
ours, theirs = (keras_convnext.load(name).predict(images, verbose=0) for name in (tag, "hf://me/atto"))
np.testing.assert_array_equal(ours, theirs)
print("equal")
"""


def test_a_preset_is_pushed_and_loaded_from_there_and_a_dry_run_sends_nothing(hub, tmp_path, monkeypatch):
    done = run_child(PUSH, tmp_path)
    assert done.returncode == 0, done.stderr
    assert "hf://me/dry: 8 files, not sent" in done.stdout
    assert "hf://me/atto: 8 files, uploaded\nequal" in done.stdout
    assert not [request for request in hub.requests if "dry" in request]
    assert len(list((hub.folder / "me" / "atto").iterdir())) == 8
    monkeypatch.setenv("HF_TOKEN", "hf_of_another")
    refused = run_child(
        "from keras_convnext.cli.main import main\n"
        "raise SystemExit(main(['preset', 'convnextv2_atto.tiny_imagenet200', 'hf://me/mine']))",
        tmp_path,
    )
    assert refused.returncode == 2 and "did not take hf://me/mine: " in refused.stderr
    assert "hf auth login" in refused.stderr and "Traceback" not in refused.stderr
