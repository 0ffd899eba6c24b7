"""Reads and writes .pth files as NumPy arrays, without PyTorch; reads .safetensors files too.

Two forms of .pth are read. Since PyTorch 1.6 it is a zip archive: `data.pkl` describes the tensors, and each
storage is one uncompressed member. Before, and in all files of OpenMMLab, it is five pickles and then the
storages, one after another. `torch_pickles` says how pickles are run without harm.
"""

import io
import logging
import math
import mmap
import pickle
import pickletools
import re
import struct
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import BinaryIO

import numpy as np

from keras_convnext._files import StrPath, replacing_file
from keras_convnext.weights.arrays import (
    TORCH_DTYPES,
    TORCH_STORAGES,
    damaged,
    little_endian_bytes,
    looks_like_safetensors,
    map_file,
    names_of_dtypes,
    naming,
    unknown_content,
)
from keras_convnext.weights.safetensors_files import read_mapped
from keras_convnext.weights.torch_pickles import Tensor, unpickle

_logger = logging.getLogger("keras_convnext")

# Where training scripts keep the weights: the averaged ones first, when a file has both. Under other keys a
# network is told from an optimizer or a loss by its convolutions.
_AVERAGED = re.compile(r"(?:^|_)ema(?:_|$)", re.IGNORECASE)
_KEYS = ("state_dict_ema", "ema_state_dict", "model_ema", "ema", "state_dict", "model", "module")

# A training checkpoint of the largest model has pickles below 1 MB: the weights are not in them.
_MAX_PICKLE_BYTES = 16 * 2**20

# Some 40,000 members, 20 times those of a training checkpoint of the largest model; never more than 91,000.
_MAX_INDEX_BYTES = 4 * 2**20

# What the older form begins with: a number, as the pickle protocols from 2 on write it.
_LEGACY_MAGIC = b"\x8a\x0al\xfc\x9cF\xf9 j\xa8P\x19."

_DEPTH = 3  # of dictionaries in dictionaries

_RE_SAVE = "Re-save it with torch.save on a little-endian machine."
_SAVE_WEIGHTS = "Save the state dict alone: torch.save(model.state_dict(), path)."


def read_state_dict(path: StrPath) -> dict[str, np.ndarray]:
    """Reads the weights in a file of `torch.save`, of any PyTorch since 0.1.10, or in a .safetensors file.

    In a PyTorch file the state dict is the file's dictionary itself or what it has under one of `_KEYS`, the
    first that holds tensors, else under the only other key with a network, averaged weights first; such
    dictionaries may be nested. All else (optimizer, epoch, arguments) is ignored. If every name starts with
    `module.`, as `DataParallel` leaves it, this prefix is removed.

    Arrays come in the order of the file, bfloat16 and float8 in the dtypes of `ml_dtypes`, as read-only views
    of the memory-mapped file, which may be replaced meanwhile, but not changed in place. Tensors that share a
    storage share memory. Checksums in the file are not verified, since that would read all of it.

    Raises:
        OSError: no file is there.
        FileFormatError: it is truncated, damaged, without a state dict, or of another kind.
        UnsafeFileError: its pickle asks for what describes no tensors. Nothing in it was executed.
    """
    path = Path(path)
    with naming(path):
        data = map_file(path)
        if looks_like_safetensors(bytes(data[:64])):
            return read_mapped(data)[0]
        return _torch_arrays(data, path.suffix)


def read_meta(path: StrPath) -> dict:
    """What a PyTorch file has under "meta", where OpenMMLab's tell of classes and colours; {} without it."""
    path = Path(path)
    with naming(path):
        data = map_file(path)
        if looks_like_safetensors(bytes(data[:64])):
            return {}
        content = _content(data, path.suffix)
    meta = content.get("meta") if isinstance(content, dict) else None
    return meta if isinstance(meta, dict) else {}


def _content(data: memoryview, suffix: str) -> object:
    """What a PyTorch file of either form describes."""
    start = bytes(data[:64])
    if start.startswith((b"PK\x03\x04", b"PK\x05\x06")):
        return _zip_content(data)
    if start[:1] == b"\x80" and _LEGACY_MAGIC in start:
        return _legacy_content(data)
    if data[257:262] == b"ustar":
        raise damaged(
            "it is a tar archive, as PyTorch wrote before version 0.1.10",
            "If you trust the file, re-save it in PyTorch: "
            "torch.save(torch.load(path, map_location='cpu', weights_only=False), path).",
        )
    raise unknown_content(start, suffix, "a .pth or .safetensors file")


def _torch_arrays(data: memoryview, suffix: str) -> dict[str, np.ndarray]:
    """The arrays in the content of a PyTorch file."""
    content = _content(data, suffix)
    tensors = _find_tensors(content)
    if tensors is None:
        received = type(content).__name__
        if isinstance(content, dict):
            received = f"dict with the keys {[key[:50] for key in content if isinstance(key, str)][:10]}"
        raise damaged(
            f"expected a dictionary of tensors, at the top or under a key such as {', '.join(_KEYS)}; "
            f"received a {received}",
            _SAVE_WEIGHTS,
        )
    prefix = "module." if all(name.startswith("module.") for name in tensors) else ""
    arrays = {}
    for name, tensor in tensors.items():
        try:
            arrays[name.removeprefix(prefix)] = tensor.array()
        except ValueError as error:
            raise damaged(f"the tensor {name!r} is malformed: {error}") from error
    return arrays


def write_torch(path: StrPath, arrays: Mapping[str, np.ndarray], key: str | None = None) -> None:
    """Writes arrays to a .pth file that `torch.load(path, weights_only=True)` reads as tensors.

    The file holds one dictionary of name to tensor, or with `key` a dictionary of that ("model" in the
    official ConvNeXt files). Each array has a storage of its own, in C order, aligned to 64 bytes so that
    `torch.load(mmap=True)` works. The same arrays in the same order give the same bytes. The file appears
    whole or not at all. The errors are those of `write_safetensors`.
    """
    names = names_of_dtypes(arrays, TORCH_DTYPES, ".pth")
    with replacing_file(path) as file, zipfile.ZipFile(file, "w") as archive:
        _write_member(file, archive, "archive/data.pkl", _state_dict_pickle(arrays, names, key))
        _write_member(file, archive, "archive/byteorder", b"little")
        for number, array in enumerate(arrays.values()):
            _write_member(file, archive, f"archive/data/{number}", little_endian_bytes(array))
        _write_member(file, archive, "archive/version", b"3\n")


def is_weight_file(path: Path) -> bool:
    """Whether a file of any ending starts as a .safetensors file or one of `torch.save` does."""
    with open(path, "rb") as file:
        start = file.read(512)  # a zip archive begins with a name of its own choice
    zipped = start.startswith(b"PK\x03\x04") and b"/data.pkl" in start
    return looks_like_safetensors(start) or zipped or (start[:1] == b"\x80" and _LEGACY_MAGIC in start)


def _find_tensors(content: object, depth: int = _DEPTH, seen: dict | None = None) -> dict[str, Tensor] | None:
    """The averaged network of a file, the first under `_KEYS`, the content itself, or a network."""
    if not isinstance(content, dict) or depth == 0:  # a dictionary may hold itself, many times
        return None
    seen = {} if seen is None else seen
    items = {name: value for name, value in content.items() if isinstance(name, str)}
    found = {}
    for name, value in items.items():
        place = id(value), depth
        if place not in seen:
            seen[place] = _find_tensors(value, depth - 1, seen)
        found[name] = seen[place]
    networks = [name for name, tensors in found.items() if _is_network(tensors)]
    averaged = [name for name in networks if _AVERAGED.search(name)]
    for name in _KEYS[:4] if len(averaged) > 1 else (*averaged, *_KEYS):
        if found.get(name) is not None:
            others = [other for other in networks if other != name and found[other] != found[name]]
            if others and depth == _DEPTH:
                _logger.warning(
                    "Of several networks in the file that under %r is taken, not %s.", name, others
                )
            return found[name]
    tensors = {name: value for name, value in items.items() if isinstance(value, Tensor)}
    if _is_network(tensors):
        return tensors
    chosen = averaged or networks
    if len(chosen) > 1:
        raise damaged(f"expected one network, received one under each of {', '.join(chosen)}", _SAVE_WEIGHTS)
    return found[chosen[0]] if chosen else tensors or None


def _is_network(tensors: dict[str, Tensor] | None) -> bool:
    return any(isinstance(one.size, tuple) and len(one.size) == 4 for one in (tensors or {}).values())


def _zip_content(data: memoryview) -> object:
    """What a zip archive describes: `data.pkl` names storages, and each is the member `data/<key>`."""
    members = _zip_members(data)
    byte_order, program = bytes(members.get("byteorder", b"little")), members["data.pkl"]
    if byte_order.strip() != b"little":
        raise damaged(f"expected the byte order b'little', received {byte_order[:16]!r}", _RE_SAVE)
    if len(program) > _MAX_PICKLE_BYTES:
        raise damaged(
            f"expected a data.pkl of at most {_MAX_PICKLE_BYTES} bytes, received {len(program)}",
            _SAVE_WEIGHTS,
        )
    content, storages = unpickle(io.BytesIO(program))
    for key, storage in storages.items():
        if f"data/{key}" not in members:
            raise damaged(f"its pickle names the storage {key!r}, which is missing")
        storage.content = members[f"data/{key}"]
        received = len(storage.content)
        if received < storage.nbytes:
            raise damaged(f"expected {storage.nbytes} bytes in storage {key!r}, received {received}")
    return content


class _ZipFile:
    """A mapped zip archive for `zipfile`, which reads the end of it and then the whole index at once."""

    def __init__(self, mapping: mmap.mmap):
        self.seek, self.tell, self._mapping = mapping.seek, mapping.tell, mapping

    def read(self, size: int | None = None) -> bytes:
        if size is not None and size > _MAX_INDEX_BYTES:
            raise ValueError(f"expected at most {_MAX_INDEX_BYTES} bytes of index, received {size}")
        return self._mapping.read(size)


def _zip_members(data: memoryview) -> dict[str, memoryview]:
    """The bytes of each member of a zip archive of `torch.save`, by its name in the archive's folder."""
    try:
        # It has the methods of a file that ZipFile uses, not all that its declared type has.
        with zipfile.ZipFile(_ZipFile(data.obj)) as archive:  # type: ignore[call-overload, arg-type]
            infos = archive.infolist()
    except (zipfile.BadZipFile, NotImplementedError, ValueError, OverflowError, struct.error) as e:
        raise damaged(f"it starts as a zip archive but has no valid index ({e})") from e
    names = {info.filename: info.filename.partition("/")[::2] for info in infos}  # (folder, name in it)
    if len(names) != len(infos):
        raise damaged("its zip archive has two members of one name")
    if any(name == "constants.pkl" for _, name in names.values()):
        raise damaged(
            "it is a TorchScript archive, which holds code",
            "If you trust the file, save its weights alone in PyTorch: "
            "torch.save(torch.jit.load(path).state_dict(), new_path).",
        )
    roots = [folder for folder, name in names.values() if name == "data.pkl"]
    if len(roots) != 1:
        raise damaged(
            f"expected a zip archive of torch.save with one 'data.pkl', received one with {len(roots)}; "
            f"its first members are {sorted(names)[:5]}",
            "Check that it is the file you meant.",
        )
    members, end = {}, 0
    for info in sorted(infos, key=lambda info: info.header_offset):
        if info.header_offset < end:
            raise damaged(f"the member {info.filename!r} overlaps another one")
        if info.compress_type != zipfile.ZIP_STORED or info.flag_bits & 0x1:
            raise damaged(
                f"expected uncompressed members, as torch.save writes them; {info.filename!r} is compressed "
                "or encrypted",
                "Re-save it with torch.save, or rebuild the archive with `zip -0`.",
            )
        # The local header, with lengths of its own for the name and the extra field (zip format 4.3.7).
        header = bytes(data[info.header_offset : info.header_offset + 30])
        if len(header) != 30 or header[:4] != b"PK\x03\x04":
            raise damaged(f"expected a zip header for {info.filename!r} at byte {info.header_offset}")
        begin = info.header_offset + 30 + sum(struct.unpack("<HH", header[26:30]))
        end = begin + info.file_size
        if info.compress_size != info.file_size or end > len(data):
            raise damaged(
                f"expected {info.file_size} bytes of {info.filename!r} at byte {begin} of {len(data)}"
            )
        folder, name = names[info.filename]
        if folder == roots[0]:
            members[name] = data[begin:end]
    return members


def _legacy_content(data: memoryview) -> object:
    """What a file of the older form describes.

    Five pickles: a magic number, a protocol version, facts about the machine, the content, the keys of the
    storages. Then the storages in the order of the keys, each behind its number of items in 8 bytes.
    """
    stream = io.BytesIO(data[:_MAX_PICKLE_BYTES])
    unpickle(stream)  # the magic number, which is known to be there
    version, _ = unpickle(stream)
    machine, _ = unpickle(stream)
    content, storages = unpickle(stream)
    keys, _ = unpickle(stream)
    if version != 1001 or not isinstance(machine, dict) or machine.get("little_endian") is not True:
        raise damaged("expected the protocol 1001 of torch.save on a little-endian machine", _RE_SAVE)
    if (
        not isinstance(keys, list)
        or not all(isinstance(key, str) and key in storages for key in keys)
        or not len(set(keys)) == len(keys) == len(storages)
    ):
        raise damaged("its list of storages is not that of the storages its tensors name")
    position = stream.tell()
    for key in keys:
        storage = storages[key]
        begin = position + 8
        received = int.from_bytes(data[position:begin], "little", signed=True)
        if received != storage.size:
            raise damaged(f"expected {storage.size} items in storage {key!r}, received {received}")
        position = begin + storage.nbytes
        storage.content = data[begin:position]
    if position != len(data):
        raise damaged(f"expected {position} bytes in all, received {len(data)}")
    return content


def _write_member(file: BinaryIO, archive: zipfile.ZipFile, name: str, content: bytes | memoryview) -> None:
    """Adds an uncompressed, aligned member to a zip archive."""
    info = zipfile.ZipInfo(name)
    info.file_size = len(content)
    # Stated here because zipfile would otherwise decide by itself, and the field moves the data.
    large = len(content) > zipfile.ZIP64_LIMIT // 2
    unpadded = file.tell() + 30 + len(name) + (20 if large else 0) + 4
    padding = -unpadded % 64  # as torch.save aligns
    # An extra field needs an identifier and a length; "FB" is the one torch.save pads with.
    info.extra = b"FB" + struct.pack("<H", padding) + b"Z" * padding
    with archive.open(info, "w", force_zip64=large) as member:
        member.write(content)


def _state_dict_pickle(
    arrays: Mapping[str, np.ndarray], dtype_names: dict[str, str], key: str | None
) -> bytes:
    """The pickle (protocol 2) by which PyTorch rebuilds the tensors."""
    program = bytearray()
    for number, (name, array) in enumerate(arrays.items()):
        dtype_name = dtype_names[name]
        # Strides of C order, in items; PyTorch has none of zero for an empty tensor either.
        stride = tuple(
            math.prod(max(size, 1) for size in array.shape[axis + 1 :]) for axis in range(array.ndim)
        )
        version, storage, items, dtype = "2", f"\n{TORCH_STORAGES.get(dtype_name)}", array.size, ""
        if dtype_name not in TORCH_STORAGES:
            version, storage, items, dtype = "3", ".storage\nUntypedStorage", array.nbytes, dtype_name
        program += _pickled(name) + f"ctorch._utils\n_rebuild_tensor_v{version}\n(".encode()
        program += b"(" + _pickled("storage") + f"ctorch{storage}\n".encode()
        program += _pickled(str(number)) + _pickled("cpu") + _pickled(items) + b"tQ"
        program += _pickled(0) + _pickled(array.shape) + _pickled(stride)
        program += b"\x89ccollections\nOrderedDict\n)R"
        program += f"ctorch\n{dtype}\n".encode() * bool(dtype) + b"tR"
    tensors = b"}(" + bytes(program) + b"u"
    return b"\x80\x02" + (tensors if key is None else b"}" + _pickled(key) + tensors + b"s") + b"."


def _pickled(value: str | int | tuple[int, ...]) -> bytes:
    """The opcodes that push a value, without those that begin and end its pickle."""
    return pickletools.optimize(pickle.dumps(value, 2))[2:-1]
