"""Reads and writes .pth files as NumPy arrays, without PyTorch; reads .safetensors files too.

Two forms of .pth are read. Since PyTorch 1.6 it is a zip archive: `data.pkl` describes the tensors, and each
storage is one uncompressed member. Before, and in all files of OpenMMLab, it is five pickles and then the
storages, one after another. `torch_pickles` says how pickles are run without harm.

Arrays that are read are views of the memory-mapped file: nothing is copied, and a tensor's pages
are read from the disk when they are first used.
"""

import io
import math
import os
import struct
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import BinaryIO

import numpy as np

from keras_convnext._files import replacing_file
from keras_convnext.weights.arrays import (
    TORCH_DTYPES,
    damaged_file,
    little_endian_bytes,
    looks_like_safetensors,
    map_file,
    names_of_dtypes,
    unknown_content,
)
from keras_convnext.weights.safetensors_files import safetensors_arrays
from keras_convnext.weights.torch_pickles import TORCH_STORAGES, Tensor, unpickle

_EMA_KEYS = ("state_dict_ema", "ema_state_dict", "model_ema", "ema")
_RAW_KEYS = ("state_dict", "model", "module")

# A training checkpoint of the largest model has pickles below 1 MB: the weights are not in them.
_MAX_PICKLE_BYTES = 16 * 2**20

# The number that the older form begins with, as the pickle protocols from 2 on write it.
_LEGACY_MAGIC = b"\x8a\x0al\xfc\x9cF\xf9 j\xa8P\x19."

# The alignment torch.save gives to storages.
_STORAGE_ALIGNMENT = 64


def read_state_dict(path: str | os.PathLike[str], prefer_ema: bool = True) -> dict[str, np.ndarray]:
    """Reads the weights in a .pth or .safetensors file.

    The kind of file is told from its content. In a PyTorch file, the state dict is the file's
    dictionary itself or what it has under `state_dict_ema`, `model_ema`, `ema`, `state_dict`,
    `model` or `module`: the first of these, in this order, that holds tensors. Such dictionaries
    may be nested. Anything else in the file (optimizer, epoch, arguments) is ignored, and so are
    entries of the state dict that are not tensors. If every name starts with `module.`, as
    `DataParallel` leaves it, this prefix is removed.

    Arrays are read-only views of the memory-mapped file, so the file must not be changed in place
    while they are in use (the writers of this module replace a file, which is safe). Tensors that
    share a storage share memory, and a transposed tensor is a transposed view. Checksums in the
    file are not verified, since that would read all of it.

    Args:
        path: str or path, a file of `torch.save` of any PyTorch since 0.1.10, or a .safetensors file.
        prefer_ema: bool, whether averaged weights come before raw ones when the file has both.
            If False, the order is `state_dict`, `model`, `module`, then the three EMA keys.

    Returns:
        dict of name to array, in the order of the file. bfloat16 and float8 arrays have the dtypes
        of `ml_dtypes`.

    Raises:
        FileNotFoundError: there is no such file.
        IsADirectoryError: the path is a directory.
        FileFormatError: the file is truncated, damaged, holds no state dict, or is of another
            kind; the message tells which.
        UnsafeFileError: the file's pickle asks for a name that is not needed to describe tensors;
            the message gives the name. Nothing in the file was executed.

    Example:
        >>> write_torch("tiny.pth", {"head.bias": np.zeros(3, "float32")}, key="model")
        >>> read_state_dict("tiny.pth")["head.bias"].shape
        (3,)
    """
    path = Path(path)
    data = map_file(path)
    start = bytes(data[:64])
    if looks_like_safetensors(start):
        return safetensors_arrays(path, data)
    if start.startswith((b"PK\x03\x04", b"PK\x05\x06")):
        content = _zip_content(path, data)
    elif start[:1] == b"\x80" and _LEGACY_MAGIC in start:
        content = _legacy_content(path, data)
    elif data[257:262] == b"ustar":
        raise damaged_file(
            path,
            "it is a tar archive, as PyTorch wrote before version 0.1.10",
            "If you trust the file, re-save it in PyTorch: "
            "torch.save(torch.load(path, map_location='cpu', weights_only=False), path).",
        )
    else:
        raise unknown_content(path, start)
    keys = (*_EMA_KEYS, *_RAW_KEYS) if prefer_ema else (*_RAW_KEYS, *_EMA_KEYS)
    tensors = _find_tensors(content, keys)
    if tensors is None:
        received = type(content).__name__
        if isinstance(content, dict):
            received = f"dict with the keys {[key[:50] for key in content if isinstance(key, str)][:10]}"
        raise damaged_file(
            path,
            f"expected a dictionary of tensors, at the top or under one of {', '.join(keys)}; "
            f"received a {received}",
            "Save the state dict: torch.save(model.state_dict(), path).",
        )
    prefix = "module." if all(name.startswith("module.") for name in tensors) else ""
    arrays = {}
    for name, tensor in tensors.items():
        try:
            arrays[name.removeprefix(prefix)] = tensor.array()
        except ValueError as error:
            raise damaged_file(path, f"the tensor {name!r} is malformed: {error}") from error
    return arrays


def write_torch(
    path: str | os.PathLike[str], arrays: Mapping[str, np.ndarray], key: str | None = None
) -> None:
    """Writes arrays to a .pth file that `torch.load(path, weights_only=True)` reads as tensors.

    The file holds one dictionary of name to tensor, or with `key` a dictionary of that. Each array
    has a storage of its own, in C order, aligned to 64 bytes so that `torch.load(mmap=True)` works.
    The same arrays in the same order give the same bytes. The file appears under its name only
    when it is complete; an earlier file is kept until then.

    Args:
        path: str or path, the file to write or to replace.
        arrays: dict of name to array, of any shape, memory order and byte order.
        key: str, the key of the outer dictionary, "model" in the official ConvNeXt files; None
            (default) for no outer dictionary.

    Raises:
        FileNotFoundError: the folder does not exist.
        IsADirectoryError: the path is a directory.
        TypeError: a name or `key` is not a str, or a value is not an array.
        ValueError: PyTorch has no such dtype.

    Example:
        >>> write_torch("tiny.pth", {"head.bias": np.zeros(3, "float32")}, key="model")
    """
    if key is not None and not isinstance(key, str):
        raise TypeError(f"Expected `key` to be a str or None, received {key!r}.")
    names = names_of_dtypes(arrays, TORCH_DTYPES, ".pth")
    with (
        replacing_file(path) as file,
        zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive,
    ):
        _write_member(file, archive, "archive/data.pkl", _state_dict_pickle(arrays, names, key))
        _write_member(file, archive, "archive/byteorder", b"little")
        for number, array in enumerate(arrays.values()):
            content = little_endian_bytes(array)
            _write_member(file, archive, f"archive/data/{number}", content)
        _write_member(file, archive, "archive/version", b"3\n")


def _find_tensors(content: object, keys: tuple[str, ...], depth: int = 3) -> dict[str, Tensor] | None:
    """The first dictionary of tensors under the keys, or the content itself; None if neither."""
    # A dictionary may hold itself, so the depth is bounded.
    if not isinstance(content, dict) or depth == 0:
        return None
    for key in keys:
        found = _find_tensors(content.get(key), keys, depth - 1)
        if found is not None:
            return found
    tensors = {
        name: value for name, value in content.items() if isinstance(name, str) and isinstance(value, Tensor)
    }
    return tensors or None


def _zip_content(path: Path, data: memoryview) -> object:
    """What a zip archive describes: `data.pkl` names storages, and each is the member `data/<key>`."""
    members = _zip_members(path, data)
    byte_order = bytes(members.get("byteorder", b"little"))
    if byte_order.strip() != b"little":
        raise damaged_file(
            path,
            f"expected the byte order b'little', received {byte_order[:16]!r}",
            "Re-save it with torch.save on a little-endian machine.",
        )
    if len(members["data.pkl"]) > _MAX_PICKLE_BYTES:
        raise damaged_file(
            path,
            f"expected a data.pkl of at most {_MAX_PICKLE_BYTES} bytes, received {len(members['data.pkl'])}",
            "Save the state dict alone: torch.save(model.state_dict(), path).",
        )
    content, storages = unpickle(path, io.BytesIO(members["data.pkl"]))
    for key, storage in storages.items():
        if f"data/{key}" not in members:
            raise damaged_file(path, f"its pickle names the storage {key!r}, which is missing")
        storage.content = members[f"data/{key}"]
        if len(storage.content) < storage.nbytes:
            raise damaged_file(
                path, f"expected {storage.nbytes} bytes in storage {key!r}, received {len(storage.content)}"
            )
    return content


def _zip_members(path: Path, data: memoryview) -> dict[str, memoryview]:
    """The bytes of each member of a zip archive of `torch.save`, by its name in the archive's folder."""
    try:
        # A mapping has the methods of a file that ZipFile uses, but its declared type differs.
        with zipfile.ZipFile(data.obj) as archive:  # type: ignore[call-overload]
            infos = archive.infolist()
    except (zipfile.BadZipFile, NotImplementedError, ValueError, OverflowError, struct.error) as e:
        raise damaged_file(path, f"it starts as a zip archive but has no valid index ({e})") from e
    names = {info.filename: info.filename.partition("/")[::2] for info in infos}  # (folder, name in it)
    if len(names) != len(infos):
        raise damaged_file(path, "its zip archive has two members of one name")
    if "constants.pkl" in (name for _, name in names.values()):
        raise damaged_file(
            path,
            "it is a TorchScript archive, which holds code",
            "If you trust the file, save its weights alone in PyTorch: "
            "torch.save(torch.jit.load(path).state_dict(), new_path).",
        )
    roots = [folder for folder, name in names.values() if name == "data.pkl"]
    if len(roots) != 1:
        raise damaged_file(
            path,
            f"expected a zip archive of torch.save with one 'data.pkl', received one with "
            f"{len(roots)}; its first members are {sorted(names)[:5]}",
            "Check that it is the file you meant.",
        )
    members, end = {}, 0
    for info in sorted(infos, key=lambda info: info.header_offset):
        if info.header_offset < end:
            raise damaged_file(path, f"the member {info.filename!r} overlaps another one")
        begin, end = _member_span(path, data, info)
        folder, name = names[info.filename]
        if folder == roots[0]:
            members[name] = data[begin:end]
    return members


def _member_span(path: Path, data: memoryview, info: zipfile.ZipInfo) -> tuple[int, int]:
    """The first byte of an uncompressed member, and the first behind it."""
    if info.compress_type != zipfile.ZIP_STORED or info.flag_bits & 0x1:
        raise damaged_file(
            path,
            f"expected uncompressed members, as torch.save writes them; {info.filename!r} is "
            "compressed or encrypted",
            "Re-save it with torch.save, or rebuild the archive with `zip -0`.",
        )
    # The local header, with lengths of its own for the name and the extra field (zip format 4.3.7).
    header = bytes(data[info.header_offset : info.header_offset + 30])
    if len(header) != 30 or header[:4] != b"PK\x03\x04":
        raise damaged_file(path, f"expected a zip header for {info.filename!r} at byte {info.header_offset}")
    begin = info.header_offset + 30 + sum(struct.unpack("<HH", header[26:30]))
    end = begin + info.file_size
    if info.compress_size != info.file_size or end > len(data):
        raise damaged_file(
            path,
            f"expected {info.file_size} bytes of {info.filename!r} at byte {begin}, the file has "
            f"{len(data)} bytes",
        )
    return begin, end


def _legacy_content(path: Path, data: memoryview) -> object:
    """What a file of the older form describes.

    Five pickles: a magic number, a protocol version, facts about the machine, the content, the keys of the
    storages. Then the storages in the order of the keys, each behind its number of items in 8 bytes.
    """
    stream = io.BytesIO(data[:_MAX_PICKLE_BYTES])
    unpickle(path, stream)  # the magic number, which is known to be there
    version, _ = unpickle(path, stream)
    machine, _ = unpickle(path, stream)
    content, storages = unpickle(path, stream)
    keys, _ = unpickle(path, stream)
    if version != 1001 or not isinstance(machine, dict) or machine.get("little_endian") is not True:
        raise damaged_file(
            path,
            "expected the protocol 1001 of torch.save on a little-endian machine",
            "Re-save it with torch.save on a little-endian machine.",
        )
    if (
        not isinstance(keys, list)
        or not all(isinstance(key, str) and key in storages for key in keys)
        or not len(set(keys)) == len(keys) == len(storages)
    ):
        raise damaged_file(path, "its list of storages is not that of the storages its tensors name")
    position = stream.tell()
    for key in keys:
        storage = storages[key]
        received = int.from_bytes(data[position : position + 8], "little", signed=True)
        if received != storage.size:
            raise damaged_file(path, f"expected {storage.size} items in storage {key!r}, received {received}")
        storage.content = data[position + 8 : position + 8 + storage.nbytes]
        position += 8 + storage.nbytes
    if position != len(data):
        raise damaged_file(path, f"expected {position} bytes in all, received {len(data)}")
    return content


def _write_member(file: BinaryIO, archive: zipfile.ZipFile, name: str, content: bytes | memoryview) -> None:
    """Adds an uncompressed, aligned member to a zip archive."""
    info = zipfile.ZipInfo(name)
    info.file_size = len(content)
    # Stated here because zipfile would otherwise decide by itself, and the field moves the data.
    large = len(content) > zipfile.ZIP64_LIMIT // 2
    unpadded = file.tell() + 30 + len(name) + (20 if large else 0) + 4
    padding = -unpadded % _STORAGE_ALIGNMENT
    # An extra field needs an identifier and a length; "FB" is the one torch.save pads with.
    info.extra = b"FB" + struct.pack("<H", padding) + b"Z" * padding
    with archive.open(info, "w", force_zip64=large) as member:
        member.write(content)


def _state_dict_pickle(
    arrays: Mapping[str, np.ndarray], dtype_names: dict[str, str], key: str | None
) -> bytes:
    """The pickle (protocol 2) by which PyTorch rebuilds the tensors."""
    program = bytearray(b"\x80\x02}")
    if key is not None:
        program += _pickled(key) + b"}"
    program += b"("
    for number, (name, array) in enumerate(arrays.items()):
        dtype_name = dtype_names[name]
        # Strides of C order, in items; PyTorch has none of zero for an empty tensor either.
        stride = tuple(
            math.prod(max(size, 1) for size in array.shape[axis + 1 :]) for axis in range(array.ndim)
        )
        if dtype_name in TORCH_STORAGES:
            function = b"ctorch._utils\n_rebuild_tensor_v2\n"
            storage_type = f"ctorch\n{TORCH_STORAGES[dtype_name]}\n".encode()
            storage_size, dtype = array.size, b""
        else:
            function = b"ctorch._utils\n_rebuild_tensor_v3\n"
            storage_type = b"ctorch.storage\nUntypedStorage\n"
            storage_size, dtype = array.nbytes, f"ctorch\n{dtype_name}\n".encode()
        program += _pickled(name)
        program += function + b"("
        program += b"(" + _pickled("storage") + storage_type + _pickled(str(number))
        program += _pickled("cpu") + _pickled(storage_size) + b"tQ"
        program += _pickled(0) + _pickled(array.shape) + _pickled(stride)
        program += b"\x89ccollections\nOrderedDict\n)R" + dtype + b"tR"
    program += b"u"
    if key is not None:
        program += b"s"
    return bytes(program + b".")


def _pickled(value: str | int | tuple[int, ...]) -> bytes:
    """The opcodes that push a text, a number >= 0 or a tuple of numbers."""
    if isinstance(value, tuple):
        return b"(" + b"".join(_pickled(item) for item in value) + b"t"
    if isinstance(value, str):
        encoded = value.encode("utf-8")
        return b"X" + struct.pack("<I", len(encoded)) + encoded
    if value < 2**31:
        return b"J" + struct.pack("<i", value)
    return b"\x8a\x08" + struct.pack("<q", value)
