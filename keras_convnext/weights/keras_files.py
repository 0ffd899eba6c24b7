"""Reads `.h5`, `.weights.h5` and `.keras` files: of this package, and of `keras.applications`."""

import collections
import contextlib
import itertools
import math
import os
import pathlib
import re
import warnings
import zipfile
from collections.abc import Iterator
from typing import IO, Any

import numpy as np

from keras_convnext._files import FileFormatError, open_regular, reading
from keras_convnext._messages import one_line, shortened
from keras_convnext.architecture import Heads, Layer, layers_of
from keras_convnext.variants import Variant

_MAX_CONFIG_BYTES = 1 << 24  # of the JSON in a `.keras` file
_MAX_INDEX_BYTES = 1 << 20  # of the list of members of a `.keras` file
_SMALL_BYTES = 1 << 26  # that any file may expand to
_MAX_EXPANSION = 10  # times the bytes of the file, compressed weights included
_MAX_OBJECTS = 10_000
_checked: set[tuple[str, int, int]] = set()  # path, bytes and time of change of files without fault
_REMEDY = "Is it whole? Copy or download it again."

# Layer of keras.applications -> canonical name; the part in front is the model's name, free to choose.
# Reference: keras/src/applications/convnext.py (Keras 3.15).
_LAYERS = (
    (r"_stem$", ("downsample_layers.0.0", "downsample_layers.0.1")),
    (r"_downsampling_block_(\d)$", ("downsample_layers.{next}.0", "downsample_layers.{next}.1")),
    (r"_stage_(\d)_block_(\d+)_depthwise_conv$", ("stages.{0}.{1}.dwconv",)),
    (r"_stage_(\d)_block_(\d+)_layernorm$", ("stages.{0}.{1}.norm",)),
    (r"_stage_(\d)_block_(\d+)_pointwise_conv_(\d)$", ("stages.{0}.{1}.pwconv{2}",)),
    (r"_stage_(\d)_block_(\d+)_layer_scale$", ("stages.{0}.{1}",)),
    (r"_head_layernorm$|^layer_normalization(?:_\d+)?$", ("norm",)),
    (r"_head_dense$", ("head",)),
)

# Kind of a layer (`architecture.Layer`) outside of blocks -> its class as Keras writes it.
_CLASSES = {
    "convolution": "patch_conv2d",
    "linear": "dense",
    "layer_norm": "layer_normalization",
    "rms_norm": "rms_normalization",
    "simple_norm": "simple_normalization",
}


def is_keras_applications(path: pathlib.Path) -> bool:
    """Whether a file holds a ConvNeXt of `keras.applications`; FileFormatError when it is damaged."""
    with _open(path) as file:  # checks it for those who let Keras read it
        if path.suffix == ".keras":
            return "_stage_0_block_0_depthwise_conv" in _member(path, "config.json")
        names = _legacy_layer_names(file)
        if names:
            return any(name.endswith("_stage_0_block_0_depthwise_conv") for name in names)
        return "layers/sequential/layers/conv2d/vars/0" in file and "layers/layer_scale" in file


def holds_model(path: pathlib.Path) -> bool:
    """Whether a file holds a whole model, as `model.save` writes it, `.h5` files too, not weights alone."""
    with _open(path) as file:  # checks it for those who let Keras read it
        return path.suffix == ".keras" or "model_config" in file.attrs


def read_stored_text(path: pathlib.Path, key: str) -> str | None:
    """The text under a key, an attribute of an `.h5` file or a member of a `.keras` file; None without it."""
    if path.suffix == ".keras":
        return _member(path, key) or None
    with _open(path) as file:
        text = file.attrs.get(key)
        return None if text is None else str(text)


def read_sizes(path: pathlib.Path) -> tuple[int, int]:
    """(classes, channels) of the model of this package that an `.h5` file is of; 0 for no classifier."""
    remedy = "Pass what model.save_weights() of one wrote, or the .keras file of a model around one."
    with _open(path, "weights of a model of this package", remedy) as file:
        layers = file["layers"]
        dense = [name for name in layers if re.fullmatch(r"dense(_\d)?", name)]  # pre_logits, then the head
        classes = layers[max(dense)]["vars/0"].shape[-1] if dense else 0
        return classes, layers["patch_conv2d/vars/0"].shape[2]


def read_heads(path: pathlib.Path) -> Heads | None:
    """The heads of the segmenter of this package that an `.h5` file is of; None where it is of no segmenter.

    Of its convolutions only those that give logits have a bias, first the main head's.
    """
    with _open(path) as file:
        layers = file.get("layers", {})
        if "batch_normalization" not in layers or "resize_like" not in layers:
            return None
        names = (name for name in layers if re.fullmatch(r"convolution2d(_\d+)?", name))
        ordered = sorted(names, key=lambda name: int(name[14:] or 0))
        shapes = [layers[name]["vars/0"].shape for name in ordered if "1" in layers[name]["vars"]]
        return Heads(shapes[0][3], shapes[0][2], "keep_auxiliary" in layers) if shapes else None


def read_keras_applications(path: pathlib.Path) -> dict[str, np.ndarray]:
    """The canonical state dict of a `keras.applications` ConvNeXt.

    From a published `convnext_*.h5`, or what `model.save("x.h5")`, `model.save_weights("x.weights.h5")` and
    `model.save("x.keras")` write.
    """
    state: dict[str, np.ndarray] = {}
    remedy = "If it is part of a larger model, save it by itself."
    with _open(path, "a plain ConvNeXt of keras.applications", remedy) as file:
        for name, arrays in _legacy_layers(file) if _legacy_layer_names(file) else _current_layers(file):
            for key, array in _canonical(name, arrays):
                if key in state:
                    raise ValueError(f"two layers for {key}; the second is {name!r}")
                if array.dtype.kind not in "fiu":
                    raise ValueError(f"{key} is of the type {array.dtype}")
                state[key] = array
    return state


def read_body_and_head(
    body: pathlib.Path, head: pathlib.Path | None, variant: Variant
) -> dict[str, np.ndarray]:
    """The canonical state dict of a preset folder: the body's file, and that of norm and classifier.

    Keras numbers layers by class, in the order in which they were made.
    """
    state: dict[str, np.ndarray] = {}
    classes = 0
    if head is not None:
        with _open(head) as file:
            classes = max(
                group["vars/0"].shape[-1] for name, group in file["layers"].items() if "dense" in name
            )
    wanted = layers_of(variant, classes=classes)
    for path, layers in (
        (body, [layer for layer in wanted if layer.stage != "head"]),
        (head, [layer for layer in wanted if layer.stage == "head"]),
    ):
        if path is None:
            continue
        counts: collections.Counter[str] = collections.Counter()
        with _open(path, f"a {variant.name!r} of a preset folder") as file:
            for layer in layers:
                arrays = file[f"layers/{_group(layer, variant, counts)}/vars"]
                for index, name in enumerate(layer.weights):
                    state[name] = _in_torch_shape(arrays[str(index)][()], layer.groups > 1)
    return state


def _group(layer: Layer, variant: Variant, counts: collections.Counter[str]) -> str:
    """The group of a layer: its class and number, in a block that of the block."""
    in_block = layer.name.startswith(("stages.", "blocks."))
    kind = f"conv_ne_xt{'_v2' * (variant.version == 2)}_block" if in_block else _CLASSES[layer.kind]
    if not in_block or layer.name.endswith(".dwconv"):  # the first of a block
        counts[kind] += 1
    number = counts[kind] - 1
    group = f"{kind}_{number}" if number else kind
    return f"{group}/{layer.name.rpartition('.')[2]}" if in_block else group


def _in_torch_shape(array: np.ndarray, is_depthwise: bool) -> np.ndarray:
    if array.ndim == 4:  # (H, W, I, O) -> (O, I, H, W), depthwise (H, W, C, 1) -> (C, 1, H, W)
        return array.transpose(2, 3, 0, 1) if is_depthwise else array.transpose(3, 2, 0, 1)
    return array.T


def load_weights(model, path: pathlib.Path) -> None:
    """Loads weights that a model of this package wrote; ValueError when they are of another model."""
    with _open(path):
        pass
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what Keras warns of, it then raises
            model.load_weights(path)
    except Exception as error:  # Keras and h5py raise of many classes
        raise ValueError(
            f"{path} does not fit {model.name!r}: {shortened(one_line(error), 400)} "
            "Build the model with the arguments it was saved with."
        ) from error


def _member(path: pathlib.Path, name: str) -> str:
    """The text of a member of a `.keras` file; "" where it is not there."""
    expected = "an archive written by model.save()"
    with reading(path, expected, _REMEDY), open_regular(path) as file, _archive(file) as archive:
        if name not in archive.namelist():
            return ""
        with archive.open(name) as member:
            return member.read(_MAX_CONFIG_BYTES).decode(errors="replace")


def _archive(file: IO[bytes]) -> zipfile.ZipFile:
    """Opens an archive whose index is short: `zipfile` makes an object of each of its entries."""
    file.seek(max(0, os.fstat(file.fileno()).st_size - (1 << 16) - 22))  # where the end record may begin
    end = file.read().rpartition(b"PK\5\6")[2]
    if int.from_bytes(end[8:12], "little") > _MAX_INDEX_BYTES:
        raise ValueError("its list of members is too long")
    return zipfile.ZipFile(file)


@contextlib.contextmanager
def _open(path: pathlib.Path, expected="readable weights in HDF5", remedy=_REMEDY) -> Iterator[Any]:
    """Checks and opens an `.h5` file, or that in a `.keras` file; tells what a block meets in it."""
    import h5py  # here and below: the command line's `list` waits for none

    with reading(path, expected, remedy), contextlib.ExitStack() as stack:
        source = stack.enter_context(open_regular(path))
        content: IO[bytes] = source
        status = os.fstat(source.fileno())
        size = status.st_size
        if path.suffix == ".keras":
            archive = stack.enter_context(_archive(source))
            member = archive.getinfo("model.weights.h5")
            _check_bytes(member.file_size, size)
            if archive.getinfo("config.json").file_size > _MAX_CONFIG_BYTES:
                raise ValueError(f"the JSON of its model has more than {_MAX_CONFIG_BYTES:,} bytes")
            size, content = member.file_size, stack.enter_context(archive.open(member))
        state = (str(path), size, status.st_mtime_ns)
        if state not in _checked:
            _check_heaps(content)
            content.seek(0)
        file = stack.enter_context(h5py.File(content if path.suffix == ".keras" else path, "r"))
        if state not in _checked:
            _check_objects(file, size)
            _checked.add(state)
        yield file


def _check_bytes(num_bytes: int, size: int) -> None:
    if num_bytes > max(_MAX_EXPANSION * size, _SMALL_BYTES):
        raise ValueError(f"it says that it holds {num_bytes} bytes, and has {size}")


def _check_heaps(source: IO[bytes]) -> None:
    """Follows the objects of each global heap, where texts lie: libhdf5 never ends at one of no length.

    Reference: HDF5 File Format Specification, III.E; H5HG__cache_heap_deserialize in HDF5 1.14.
    """
    start = source.read(15)
    sizes = start[13:15] if start[8:9] in (b"\0", b"\1") else start[9:11]
    if start[:8] != b"\x89HDF\r\n\x1a\n" or sizes != b"\x08\x08":
        raise ValueError(f"it is not an HDF5 file with numbers of 8 bytes: it starts with {start!r}")
    position, rest = 15, b""
    heaps: list[int] = []
    while chunk := source.read(1 << 24):
        text = rest + chunk
        heaps += [position - len(rest) + match.start() for match in re.finditer(b"GCOL\1", text)]
        position, rest = position + len(chunk), text[-4:]
        if len(heaps) > _MAX_OBJECTS:
            raise ValueError(f"it has more than {_MAX_OBJECTS} heaps")
    count = 0
    for heap in heaps:
        source.seek(heap)
        size = int.from_bytes(source.read(16)[8:], "little")
        if heap + size > position:
            continue  # libhdf5 refuses it
        content, at = source.read(size - 16) if size > 16 else b"", 0
        while at + 16 <= len(content):
            index, length = int.from_bytes(content[at : at + 2], "little"), content[at + 8 : at + 16]
            step = int.from_bytes(length, "little")
            step = 16 + (step + 7) // 8 * 8 if index else step
            count += 1
            if not 16 <= step <= len(content) - at or count > _MAX_OBJECTS:
                raise ValueError(f"the heap at byte {heap} has an object of {step} bytes at byte {at}")
            at += step


def _check_objects(file, size: int) -> None:
    """Refuses what is not in the file itself, and more than a file of `size` bytes can hold."""
    import h5py

    groups, seen, num_bytes = [file["/"]], 0, 0
    while groups:
        group = groups.pop()
        for name in group:
            seen += 1
            if group.id.links.get_info(name.encode(errors="surrogateescape")).type != h5py.h5l.TYPE_HARD:
                raise ValueError(f"{shortened(name, 80)!r} is a link to another place")
            if seen > _MAX_OBJECTS:
                raise ValueError(f"it has more than {_MAX_OBJECTS} objects, or groups that hold each other")
            found = group[name]
            if isinstance(found, h5py.Group):
                groups.append(found)
            elif isinstance(found, h5py.Dataset):
                if found.external or found.is_virtual:
                    raise ValueError(f"the values of {shortened(name, 80)!r} lie in another file")
                if found.dtype.hasobject or found.shape is None:  # texts and lists name their bytes often
                    raise ValueError(f"{shortened(name, 80)!r} holds no numbers")
                items = max(math.prod(found.shape), math.prod(found.chunks or ()))
                num_bytes += items * found.dtype.itemsize
                _check_bytes(num_bytes, size)


def _texts(names) -> list[str]:
    return [name.decode() if isinstance(name, bytes) else str(name) for name in names]


def _legacy_layer_names(file) -> list[str]:
    return _texts(file.get("model_weights", file).attrs.get("layer_names", []))


def _legacy_layers(file):
    """(layer name, its arrays in Keras's order) of the format of Keras 2, which Keras 3 still writes."""
    for name in _legacy_layer_names(file):
        group = file.get("model_weights", file)[name]
        names = _texts(group.attrs["weight_names"])
        if names:
            yield name, [group[weight][()] for weight in names]


def _current_layers(file):
    """The same of Keras 3's format, whose layers are numbered by class, in the order they were made."""
    layers = file["layers"]

    def arrays(group):
        variables = group["vars"]
        return [variables[str(index)][()] for index in range(len(variables))]

    def numbered(kind):
        names = itertools.chain([kind], (f"{kind}_{index}" for index in itertools.count(1)))
        return (layers[name] for name in itertools.takewhile(layers.__contains__, names))

    dims = []
    for stage, group in enumerate(numbered("sequential")):
        inner = group["layers"]
        convolution, norm = arrays(inner["conv2d"]), arrays(inner["layer_normalization"])
        dims.append(len(convolution[1]))
        if stage == 0:
            yield "_stem", convolution + norm
        else:
            yield f"_downsampling_block_{stage - 1}", norm + convolution
    depthwise = [arrays(group) for group in numbered("conv2d")]
    norms, dense, scales = (
        map(arrays, numbered(kind)) for kind in ("layer_normalization", "dense", "layer_scale")
    )
    for stage, dim in enumerate(dims):
        for block, convolution in enumerate(pair for pair in depthwise if len(pair[1]) == dim):
            prefix = f"_stage_{stage}_block_{block}"
            yield f"{prefix}_depthwise_conv", convolution
            yield f"{prefix}_layernorm", next(norms)
            yield f"{prefix}_pointwise_conv_1", next(dense)
            yield f"{prefix}_pointwise_conv_2", next(dense)
            yield f"{prefix}_layer_scale", next(scales)
    yield "_head_layernorm", next(norms)
    yield from (("_head_dense", head) for head in itertools.islice(dense, 1))


def _canonical(layer, arrays):
    """(canonical name, array in PyTorch's shape) of each weight of one layer."""
    matches = ((re.search(pattern, layer), targets) for pattern, targets in _LAYERS)
    match, targets = next((pair for pair in matches if pair[0]), (None, ()))
    if match is None:
        raise FileFormatError(
            f"The layer {layer!r}, with weights of shape {[array.shape for array in arrays]}, is none of a "
            "ConvNeXt of keras.applications."
        )
    following = int(match[1]) + 1 if match.groups() else 0
    names = [target.format(*match.groups(), next=following) for target in targets]
    if len(arrays) == 1:
        yield f"{names[0]}.gamma", arrays[0]
        return
    for name, weight, bias in zip(names, arrays[::2], arrays[1::2], strict=True):
        if weight.ndim == 4:
            # (H, W, I, O) -> (O, I, H, W); the grouped (7, 7, 1, C) becomes (C, 1, 7, 7) by the same.
            weight = weight.transpose(3, 2, 0, 1)
        elif weight.ndim == 2:
            weight = weight.T
        yield f"{name}.weight", weight
        yield f"{name}.bias", bias
