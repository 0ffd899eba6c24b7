"""Reads and writes .pth and .safetensors files as NumPy arrays, without PyTorch or pickle.

A .pth file is a zip archive: `data.pkl` describes the tensors, and each storage is one uncompressed
member. A pickle is a program, and an unpickler runs it. This module never does: `pickletools` only
cuts the program into its opcodes, and `_PickleReader` interprets the few that describe tensors.
A name in the pickle is looked up in a literal table and is never imported.

Arrays that are read are views of the memory-mapped file: nothing is copied, and a tensor's pages
are read from the disk when they are first used.
"""

import json
import math
import mmap
import os
import pickletools
import struct
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import ml_dtypes
import numpy as np

from keras_convnext.files import replacing_file

# PyTorch's name of each dtype that NumPy or ml_dtypes has. "<": both formats are little-endian.
_TORCH_DTYPES: dict[str, np.dtype] = {
    "float64": np.dtype("<f8"),
    "float32": np.dtype("<f4"),
    "float16": np.dtype("<f2"),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
    "float8_e4m3fn": np.dtype(ml_dtypes.float8_e4m3fn),
    "float8_e4m3fnuz": np.dtype(ml_dtypes.float8_e4m3fnuz),
    "float8_e5m2": np.dtype(ml_dtypes.float8_e5m2),
    "float8_e5m2fnuz": np.dtype(ml_dtypes.float8_e5m2fnuz),
    "float8_e8m0fnu": np.dtype(ml_dtypes.float8_e8m0fnu),
    "complex64": np.dtype("<c8"),
    "complex128": np.dtype("<c16"),
    "int64": np.dtype("<i8"),
    "int32": np.dtype("<i4"),
    "int16": np.dtype("<i2"),
    "int8": np.dtype("i1"),
    "uint64": np.dtype("<u8"),
    "uint32": np.dtype("<u4"),
    "uint16": np.dtype("<u2"),
    "uint8": np.dtype("u1"),
    "bool": np.dtype("?"),
}

# The other dtypes have no storage class of their own: their tensors name `UntypedStorage`.
_TORCH_STORAGES: dict[str, str] = {
    "float64": "DoubleStorage",
    "float32": "FloatStorage",
    "float16": "HalfStorage",
    "bfloat16": "BFloat16Storage",
    "complex64": "ComplexFloatStorage",
    "complex128": "ComplexDoubleStorage",
    "int64": "LongStorage",
    "int32": "IntStorage",
    "int16": "ShortStorage",
    "int8": "CharStorage",
    "uint8": "ByteStorage",
    "bool": "BoolStorage",
}

_SAFETENSORS_DTYPES: dict[str, np.dtype] = {
    "F64": _TORCH_DTYPES["float64"],
    "F32": _TORCH_DTYPES["float32"],
    "F16": _TORCH_DTYPES["float16"],
    "BF16": _TORCH_DTYPES["bfloat16"],
    "F8_E4M3": _TORCH_DTYPES["float8_e4m3fn"],
    "F8_E4M3FNUZ": _TORCH_DTYPES["float8_e4m3fnuz"],
    "F8_E5M2": _TORCH_DTYPES["float8_e5m2"],
    "F8_E5M2FNUZ": _TORCH_DTYPES["float8_e5m2fnuz"],
    "F8_E8M0": _TORCH_DTYPES["float8_e8m0fnu"],
    "C64": _TORCH_DTYPES["complex64"],
    "I64": _TORCH_DTYPES["int64"],
    "I32": _TORCH_DTYPES["int32"],
    "I16": _TORCH_DTYPES["int16"],
    "I8": _TORCH_DTYPES["int8"],
    "U64": _TORCH_DTYPES["uint64"],
    "U32": _TORCH_DTYPES["uint32"],
    "U16": _TORCH_DTYPES["uint16"],
    "U8": _TORCH_DTYPES["uint8"],
    "BOOL": _TORCH_DTYPES["bool"],
}

_EMA_KEYS = ("state_dict_ema", "ema_state_dict", "model_ema", "ema")
_RAW_KEYS = ("state_dict", "model", "module")

# The names a state dict is made of, each handled by `_PickleReader`.
_TENSOR_GLOBALS = frozenset(
    {
        "collections.OrderedDict",
        "torch._utils._rebuild_tensor_v2",
        "torch._utils._rebuild_tensor_v3",
        "torch._utils._rebuild_parameter",
        "torch._utils._rebuild_parameter_with_state",
        "torch.Size",
        "torch.storage.UntypedStorage",
        *(f"torch.{name}" for name in _TORCH_STORAGES.values()),
        *(f"torch.{name}" for name in _TORCH_DTYPES),
    }
)

# What training scripts leave beside it (arguments, scores, schedules): nothing of it is kept.
_IGNORED_GLOBALS = frozenset(
    {
        "__builtin__.set",
        "_codecs.encode",
        "argparse.Namespace",
        "builtins.set",
        "collections.Counter",
        "collections.defaultdict",
        "numpy._core.multiarray._reconstruct",
        "numpy._core.multiarray.scalar",
        "numpy.core.multiarray._reconstruct",
        "numpy.core.multiarray.scalar",
        "numpy.dtype",
        "numpy.ndarray",
        "torch.device",
    }
)

# A training checkpoint of the largest model has a pickle below 1 MB: the weights are not in it.
_MAX_PICKLE_BYTES = 16 * 2**20

# The limit of the safetensors library, which refuses to read a longer header.
_MAX_HEADER_BYTES = 100_000_000

# The alignment torch.save gives to storages.
_STORAGE_ALIGNMENT = 64

_AGAIN = "The file is damaged or incomplete: download or save it again."


class FileFormatError(ValueError):
    """A weight file is truncated, damaged or of a kind that cannot be read."""


class UnsafeFileError(ValueError):
    """A .pth file asks for code that a state dict does not need; none of it was executed."""


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
        path: str or path, a file written by `torch.save` in PyTorch 1.6 or later, or a
            .safetensors file.
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
    data = _map_file(path)
    start = bytes(data[:64])
    if _looks_like_safetensors(start):
        return _safetensors_arrays(path, data)
    if start.startswith((b"PK\x03\x04", b"PK\x05\x06")):
        return _torch_arrays(path, data, prefer_ema)
    raise _unknown_content(path, start)


def read_safetensors_metadata(path: str | os.PathLike[str]) -> dict[str, str]:
    """Reads the free-form metadata in the header of a .safetensors file.

    The whole header is validated, as in `read_state_dict`.

    Args:
        path: str or path, a .safetensors file.

    Returns:
        dict of str to str, in the order of the file; empty when the file has none.

    Raises:
        FileNotFoundError: there is no such file.
        IsADirectoryError: the path is a directory.
        FileFormatError: the file is not a valid .safetensors file; the message tells why.
    """
    path = Path(path)
    data = _map_file(path)
    start = bytes(data[:64])
    if not _looks_like_safetensors(start):
        raise _unknown_content(path, start, "a .safetensors file")
    return _safetensors_header(path, data)[1]


def write_safetensors(
    path: str | os.PathLike[str],
    arrays: Mapping[str, np.ndarray],
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Writes arrays to a .safetensors file.

    The same arrays and metadata give the same bytes, whatever the order of the dictionaries: the
    arrays are stored by decreasing item size, then by name, so each is aligned to its item size.
    The file appears under its name only when it is complete; an earlier file is kept until then.

    Args:
        path: str or path, the file to write or to replace.
        arrays: dict of name to array, of any shape, memory order and byte order.
        metadata: dict of str to str kept in the header, or None for none.

    Raises:
        FileNotFoundError: the folder does not exist.
        IsADirectoryError: the path is a directory.
        TypeError: a name or metadata entry is not a str, or a value is not an array.
        ValueError: the format has no such dtype, or reserves such a name.
    """
    names = _dtype_names(arrays, _SAFETENSORS_DTYPES, ".safetensors")
    if "__metadata__" in arrays:
        raise ValueError(
            "The name '__metadata__' is reserved by the .safetensors format. Rename this array, "
            "or pass text through the `metadata` argument."
        )
    header: dict[str, object] = {}
    if metadata is not None:
        for key, value in metadata.items():
            if not isinstance(key, str) or not isinstance(value, str):
                raise TypeError(
                    f"Expected metadata of str to str, received {key!r}: {value!r}. Convert both to str."
                )
        header["__metadata__"] = dict(sorted(metadata.items()))
    order = sorted(arrays, key=lambda name: (-arrays[name].dtype.itemsize, name))
    offset = 0
    for name in order:
        end = offset + arrays[name].nbytes
        header[name] = {
            "dtype": names[name],
            "shape": list(arrays[name].shape),
            "data_offsets": [offset, end],
        }
        offset = end
    encoded = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode("utf-8")
    encoded += b" " * (-len(encoded) % 8)
    with replacing_file(path) as file:
        file.write(struct.pack("<Q", len(encoded)))
        file.write(encoded)
        for name in order:
            file.write(little_endian_bytes(arrays[name]))


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
    names = _dtype_names(arrays, _TORCH_DTYPES, ".pth")
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


def release_pages(array: np.ndarray) -> None:
    """Lets the system drop the memory of the file that an array is a view of, once its values are copied.

    Pages that are needed again are read again. Keeps the memory of loading a model near that of the model
    itself. Does nothing for arrays that are not memory-mapped, or where the system cannot do it.
    """
    owner: object = array
    while isinstance(owner, np.ndarray):
        owner = owner.base
    if isinstance(owner, memoryview):
        owner = owner.obj
    if isinstance(owner, mmap.mmap) and hasattr(mmap, "MADV_DONTNEED"):
        owner.madvise(mmap.MADV_DONTNEED)


def _damaged(path: Path, fact: str, remedy: str = _AGAIN) -> FileFormatError:
    return FileFormatError(f"Cannot read '{path}': {fact}. {remedy}")


def _map_file(path: Path) -> memoryview:
    """Maps a file read-only; the mapping lives as long as a view of it does."""
    if path.is_dir():
        raise IsADirectoryError(
            f"Expected a .pth or .safetensors file, received the directory '{path}'. Give the "
            "path of a file in it."
        )
    if not path.is_file():
        raise FileNotFoundError(f"There is no file '{path}'. Check the path.")
    with open(path, "rb") as file:
        if os.fstat(file.fileno()).st_size == 0:
            raise _damaged(path, "it is empty (0 bytes)")
        return memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))


def _looks_like_safetensors(start: bytes) -> bool:
    # A header length below 4 GiB, then its JSON. Checked before the other kinds, because the first
    # bytes of a length may read as anything: 640 reads as the start of a pickle.
    return start[4:9] == b"\0\0\0\0{"


def _unknown_content(
    path: Path, start: bytes, expected: str = "a .pth (zip) or .safetensors file"
) -> FileFormatError:
    """The error for a file that does not start as a known kind does."""
    if start.startswith(b"version https://git-lfs"):
        return _damaged(
            path,
            "it is a Git LFS pointer, a text that stands for the file",
            "Fetch the file itself with `git lfs pull`.",
        )
    if start.lstrip().lower().startswith((b"<!doctype", b"<html", b"<?xml")):
        return _damaged(
            path,
            "it is a web page, not weights",
            "The download met an error or login page: download it again from a direct link.",
        )
    if start.startswith(b"\x80") and start[1:2] in (b"\1", b"\2", b"\3", b"\4", b"\5"):
        return _damaged(
            path,
            "it is a bare pickle, as PyTorch wrote before version 1.6, and not a zip archive",
            "If you trust the file, re-save it in PyTorch 1.6 or later: "
            "torch.save(torch.load(path, map_location='cpu'), path).",
        )
    if path.suffix == ".safetensors":
        if len(start) < 8:
            return _damaged(path, f"expected at least 8 bytes (the header's length), received {len(start)}")
        return _damaged(
            path,
            f"expected 8 bytes of header length and then '{{', received {start[:9]!r}",
        )
    return _damaged(
        path,
        f"expected {expected}, received a file that starts with {start[:16]!r}",
        "Check that it is the file you meant and that its download was complete.",
    )


def _safetensors_header(
    path: Path, data: memoryview
) -> tuple[dict[str, tuple[np.dtype, tuple[int, ...], int]], dict[str, str]]:
    """Validates a .safetensors file.

    Returns:
        The (dtype, shape, position in the file) of each tensor by name, and the metadata.
    """
    header_bytes = int.from_bytes(data[:8], "little")
    if header_bytes > _MAX_HEADER_BYTES:
        raise _damaged(
            path,
            f"expected a header of at most {_MAX_HEADER_BYTES} bytes, its length says {header_bytes}",
        )
    if 8 + header_bytes > len(data):
        raise _damaged(
            path,
            f"expected at least {8 + header_bytes} bytes (8 and a header of {header_bytes}), "
            f"received {len(data)}",
        )
    try:
        header = json.loads(
            str(data[8 : 8 + header_bytes], "utf-8"), object_pairs_hook=_dict_without_duplicates
        )
    except (ValueError, RecursionError) as error:
        raise _damaged(path, f"its header is not valid JSON ({error})") from error
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise _damaged(path, "expected '__metadata__' to map str to str in its header")

    data_start = 8 + header_bytes
    entries: dict[str, tuple[np.dtype, tuple[int, ...], int]] = {}
    spans: list[tuple[int, int, str]] = []
    for name, entry in header.items():
        if not isinstance(entry, dict) or not {"dtype", "shape", "data_offsets"} <= entry.keys():
            raise _damaged(path, f"expected 'dtype', 'shape' and 'data_offsets' for tensor {name!r}")
        dtype_name, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
        if not isinstance(dtype_name, str) or dtype_name not in _SAFETENSORS_DTYPES:
            raise _damaged(
                path,
                f"tensor {name!r} has dtype {dtype_name!r}",
                f"Known: {', '.join(_SAFETENSORS_DTYPES)}.",
            )
        if not _is_sizes(shape):
            raise _damaged(
                path, f"expected at most 64 sizes >= 0 as the shape of {name!r}, received {shape!r}"
            )
        if not _is_sizes(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
            raise _damaged(path, f"expected [begin, end] as data_offsets of {name!r}, received {offsets}")
        dtype = _SAFETENSORS_DTYPES[dtype_name]
        begin, end = offsets
        expected_bytes = math.prod(shape) * dtype.itemsize
        if end - begin != expected_bytes:
            raise _damaged(
                path,
                f"expected {expected_bytes} bytes for {name!r} ({dtype_name}, shape {shape}), its "
                f"data_offsets {offsets} have {end - begin}",
            )
        entries[name] = (dtype, tuple(shape), data_start + begin)
        spans.append((begin, end, name))

    previous_end = 0
    for begin, end, name in sorted(spans):
        if begin < previous_end:
            raise _damaged(
                path,
                f"tensor {name!r} begins at byte {begin} of the data and overlaps another one, "
                f"which ends at {previous_end}",
            )
        if begin > previous_end:
            raise _damaged(
                path,
                f"no tensor covers bytes {previous_end} to {begin} of the data, before {name!r}",
            )
        previous_end = end
    if data_start + previous_end != len(data):
        raise _damaged(path, f"expected {data_start + previous_end} bytes in all, received {len(data)}")
    return entries, metadata


def _safetensors_arrays(path: Path, data: memoryview) -> dict[str, np.ndarray]:
    arrays = {}
    for name, (dtype, shape, position) in _safetensors_header(path, data)[0].items():
        try:
            arrays[name] = np.ndarray(shape, dtype, buffer=data, offset=position)
        except ValueError as error:
            # The sizes beside a zero can be of any magnitude, and NumPy multiplies them.
            raise _damaged(
                path, f"NumPy has no array of the shape {list(shape)} of {name!r} ({error})"
            ) from error
    return arrays


def _dict_without_duplicates(pairs: list[tuple[str, object]]) -> dict[str, object]:
    result = dict(pairs)
    if len(result) != len(pairs):
        seen: set[str] = set()
        for key, _ in pairs:
            if key in seen:
                raise ValueError(f"the key {key!r} occurs twice")
            seen.add(key)
    return result


def _is_size(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**63


def _is_sizes(value: object) -> bool:
    # 64 is the largest number of dimensions of a NumPy array.
    return isinstance(value, list | tuple) and len(value) <= 64 and all(_is_size(size) for size in value)


def _torch_arrays(path: Path, data: memoryview, prefer_ema: bool) -> dict[str, np.ndarray]:
    """Reads the state dict in a zip archive of `torch.save`."""
    members = _zip_members(path, data)
    relative_names = {name.partition("/")[2] for name in members}
    if "constants.pkl" in relative_names:
        raise _damaged(
            path,
            "it is a TorchScript archive, which holds code",
            "If you trust the file, save its weights alone in PyTorch: "
            "torch.save(torch.jit.load(path).state_dict(), new_path).",
        )
    roots = [name.partition("/")[0] for name in members if name.partition("/")[2] == "data.pkl"]
    if len(roots) != 1:
        raise _damaged(
            path,
            f"expected a zip archive of torch.save with one 'data.pkl', received one with "
            f"{len(roots)}; its first members are {sorted(members)[:5]}",
            "Check that it is the file you meant.",
        )
    root = roots[0]
    if f"{root}/byteorder" in members:
        byte_order = bytes(_member_bytes(path, data, members[f"{root}/byteorder"]))
        if byte_order.strip() != b"little":
            raise _damaged(
                path,
                f"expected the byte order b'little', received {byte_order[:16]!r}",
                "Re-save it with torch.save on a little-endian machine.",
            )
    program = _member_bytes(path, data, members[f"{root}/data.pkl"])
    if len(program) > _MAX_PICKLE_BYTES:
        raise _damaged(
            path,
            f"expected a data.pkl of at most {_MAX_PICKLE_BYTES} bytes, received {len(program)}",
            "Save the state dict alone: torch.save(model.state_dict(), path).",
        )
    storages = {
        name.removeprefix(f"{root}/data/"): info
        for name, info in members.items()
        if name.startswith(f"{root}/data/")
    }
    content = _PickleReader(path, data, storages).read(bytes(program))
    keys = (*_EMA_KEYS, *_RAW_KEYS) if prefer_ema else (*_RAW_KEYS, *_EMA_KEYS)
    arrays = _find_state_dict(content, keys)
    if arrays is None:
        received = type(content).__name__
        if isinstance(content, dict):
            received = f"a dictionary with the keys {list(content)[:10]}"
        raise _damaged(
            path,
            f"expected a dictionary of tensors, at the top or under one of {', '.join(keys)}; "
            f"received {received}",
            "Save the state dict: torch.save(model.state_dict(), path).",
        )
    if all(name.startswith("module.") for name in arrays):
        arrays = {name.removeprefix("module."): array for name, array in arrays.items()}
    return arrays


def _find_state_dict(content: object, keys: tuple[str, ...], depth: int = 3) -> dict[str, np.ndarray] | None:
    """The first dictionary of tensors under the keys, or the content itself; None if neither."""
    # A dictionary may hold itself, so the depth is bounded.
    if not isinstance(content, dict) or depth == 0:
        return None
    for key in keys:
        found = _find_state_dict(content.get(key), keys, depth - 1)
        if found is not None:
            return found
    arrays = {
        name: value
        for name, value in content.items()
        if isinstance(name, str) and isinstance(value, np.ndarray)
    }
    return arrays or None


def _zip_members(path: Path, data: memoryview) -> dict[str, zipfile.ZipInfo]:
    try:
        # A mapping has the methods of a file that ZipFile uses, but its declared type differs.
        with zipfile.ZipFile(data.obj) as archive:  # type: ignore[call-overload]
            infos = archive.infolist()
    except (zipfile.BadZipFile, NotImplementedError, ValueError, OverflowError, struct.error) as e:
        raise _damaged(path, f"it starts as a zip archive but has no valid index ({e})") from e
    members = {info.filename: info for info in infos}
    if len(members) != len(infos):
        raise _damaged(path, "its zip archive has two members of one name")
    return members


def _member_bytes(path: Path, data: memoryview, info: zipfile.ZipInfo) -> memoryview:
    """The bytes of an uncompressed member, without a copy."""
    if info.compress_type != zipfile.ZIP_STORED or info.flag_bits & 0x1:
        raise _damaged(
            path,
            f"expected uncompressed members, as torch.save writes them; {info.filename!r} is "
            "compressed or encrypted",
            "Re-save it with torch.save, or rebuild the archive with `zip -0`.",
        )
    # The local header, with lengths of its own for the name and the extra field (zip format 4.3.7).
    header_start = info.header_offset
    header = bytes(data[max(header_start, 0) : max(header_start, 0) + 30])
    if header_start < 0 or len(header) != 30 or header[:4] != b"PK\x03\x04":
        raise _damaged(path, f"expected a zip header for {info.filename!r} at byte {header_start}")
    name_bytes, extra_bytes = struct.unpack("<HH", header[26:30])
    begin = header_start + 30 + name_bytes + extra_bytes
    end = begin + info.file_size
    if info.compress_size != info.file_size or end > len(data):
        raise _damaged(
            path,
            f"expected {info.file_size} bytes of {info.filename!r} at byte {begin}, the file has "
            f"{len(data)} bytes",
        )
    return data[begin:end]


@dataclass(frozen=True)
class _Global:
    """A name that a pickle asks for; it stands for nothing but itself."""

    name: str


@dataclass(frozen=True)
class _Storage:
    """The bytes of a storage, and its dtype unless each tensor tells its own."""

    content: memoryview
    dtype: np.dtype | None


class _Ignored:
    """Stands for every object that is not kept."""


_IGNORED = _Ignored()


class _PickleReader:
    """Interprets the opcodes by which `torch.save` describes tensors.

    It has no means to import or to call what a file names: globals are text, and the functions
    among them are the branches of `_reduce`. The opcodes are those of pickle protocols 2 to 5 that
    such files use; any other one is refused, the extension codes among them.

    Args:
        path: path of the file, for messages.
        data: memoryview of the mapped file.
        storages: dict of storage key to zip member.
    """

    def __init__(self, path: Path, data: memoryview, storages: dict[str, zipfile.ZipInfo]):
        self.path = path
        self.data = data
        self.storages = storages
        self.stack: list[object] = []
        self.outer_stacks: list[list[object]] = []
        self.memo: dict[int, object] = {}

    def read(self, program: bytes) -> object:
        """The object a pickle describes: containers, texts, numbers, arrays and `_IGNORED`."""
        try:
            for opcode, argument, position in pickletools.genops(program):
                if opcode.name == "STOP":
                    return self.stack.pop()
                self._step(opcode.name, argument, position)
        except (FileFormatError, UnsafeFileError):
            raise
        except (ValueError, IndexError, KeyError, OverflowError) as error:
            raise _damaged(self.path, f"its pickle is malformed ({error})") from error
        raise _damaged(self.path, "its pickle has no end")

    def _step(self, opcode: str, argument: object, position: int | None) -> None:
        match opcode:
            case "PROTO" | "FRAME":
                pass
            case (
                "BININT" | "BININT1" | "BININT2" | "LONG1" | "BINFLOAT"
                | "BINUNICODE" | "SHORT_BINUNICODE" | "BINBYTES" | "SHORT_BINBYTES"
            ):  # fmt: skip
                self.stack.append(argument)
            case "NONE":
                self.stack.append(None)
            case "NEWTRUE":
                self.stack.append(True)
            case "NEWFALSE":
                self.stack.append(False)
            case "EMPTY_DICT":
                self.stack.append({})
            case "EMPTY_LIST":
                self.stack.append([])
            case "EMPTY_TUPLE":
                self.stack.append(())
            case "EMPTY_SET":
                self.stack.append(_IGNORED)
            case "MARK":
                self.outer_stacks.append(self.stack)
                self.stack = []
            case "POP":
                self.stack.pop()
            case "POP_MARK":
                self._pop_to_mark()
            case "TUPLE":
                items = self._pop_to_mark()
                self.stack.append(tuple(items))
            case "TUPLE1" | "TUPLE2" | "TUPLE3":
                self.stack.append(self._pop_tuple(int(opcode[-1])))
            case "FROZENSET":
                self._pop_to_mark()
                self.stack.append(_IGNORED)
            case "APPEND":
                item = self.stack.pop()
                self._append([item])
            case "APPENDS" | "ADDITEMS":
                self._append(self._pop_to_mark())
            case "SETITEM":
                self._set_items(list(self._pop_tuple(2)))
            case "SETITEMS":
                self._set_items(self._pop_to_mark())
            case "BINPUT" | "LONG_BINPUT" if isinstance(argument, int):
                self.memo[argument] = self.stack[-1]
            case "MEMOIZE":
                self.memo[len(self.memo)] = self.stack[-1]
            case "BINGET" | "LONG_BINGET" if isinstance(argument, int):
                self.stack.append(self.memo[argument])
            case "GLOBAL":
                self.stack.append(self._global(str(argument).replace(" ", ".", 1)))
            case "STACK_GLOBAL":
                match self._pop_tuple(2):
                    case (str() as module, str() as name):
                        self.stack.append(self._global(f"{module}.{name}"))
                    case _:
                        raise _damaged(self.path, "its pickle names a global that is not a text")
            case "BINPERSID":
                self.stack.append(self._storage(self.stack.pop()))
            case "REDUCE" | "NEWOBJ":
                function, arguments = self._pop_tuple(2)
                self.stack.append(self._reduce(function, arguments))
            case "BUILD":
                instance, _ = self._pop_tuple(2)
                if not isinstance(instance, _Ignored | dict):
                    raise _damaged(self.path, f"its pickle sets a state at byte {position}")
                self.stack.append(instance)
            case _:
                raise UnsafeFileError(
                    f"Refused to read '{self.path}': its pickle has the opcode {opcode} at byte "
                    f"{position}, which torch.save does not write for a state dict. Nothing in "
                    "it was executed. If you trust the file, load it in PyTorch and save its "
                    "weights as .safetensors."
                )

    def _pop_tuple(self, count: int) -> tuple[object, ...]:
        if len(self.stack) < count:
            raise _damaged(self.path, "its pickle is malformed (stack underflow)")
        items = tuple(self.stack[-count:])
        del self.stack[-count:]
        return items

    def _pop_to_mark(self) -> list[object]:
        items = self.stack
        self.stack = self.outer_stacks.pop()
        return items

    def _append(self, items: list[object]) -> None:
        target = self.stack[-1]
        if isinstance(target, list):
            target.extend(items)
        elif not isinstance(target, _Ignored):
            raise _damaged(self.path, f"its pickle appends to a {type(target).__name__}")

    def _set_items(self, items: list[object]) -> None:
        target = self.stack[-1]
        if len(items) % 2:
            raise _damaged(self.path, "its pickle has a dictionary key without a value")
        if isinstance(target, dict):
            # Other keys do not occur in a state dict, and hashing a deeply nested tuple would
            # overflow the C stack.
            for key, value in zip(items[::2], items[1::2], strict=True):
                if isinstance(key, str | int):
                    target[key] = value
        elif not isinstance(target, _Ignored):
            raise _damaged(self.path, f"its pickle sets items of a {type(target).__name__}")

    def _global(self, name: str) -> object:
        if name in _TENSOR_GLOBALS or name in _IGNORED_GLOBALS:
            return _Global(name)
        raise UnsafeFileError(
            f"Refused to read '{self.path}': its pickle asks for the global {name!r}, which a "
            "state dict does not need and which could run code. Nothing in it was executed. If "
            "you trust the file, load it in PyTorch and save its weights as .safetensors."
        )

    def _reduce(self, function: object, arguments: object) -> object:
        """What a call of a global by the pickle gives; no call is made."""
        if not isinstance(function, _Global) or not isinstance(arguments, tuple):
            raise _damaged(self.path, f"its pickle calls a {type(function).__name__}")
        if function.name in _IGNORED_GLOBALS:
            return _IGNORED
        match function.name.rpartition(".")[2], arguments:
            case "OrderedDict", ():
                return {}
            case "Size", (size,) if _is_sizes(size):
                return size
            case "_rebuild_parameter", (np.ndarray() as tensor, _, _):
                return tensor
            case "_rebuild_parameter_with_state", (np.ndarray() as tensor, _, _, _):
                return tensor
            case "_rebuild_tensor_v2", (_Storage() as storage, offset, size, stride, _, _, *rest):
                return self._tensor(storage, storage.dtype, offset, size, stride, rest)
            case (
                "_rebuild_tensor_v3",
                (_Storage() as storage, offset, size, stride, _, _, _Global() as dtype, *rest),
            ):
                dtype_name = dtype.name.removeprefix("torch.")
                return self._tensor(storage, _TORCH_DTYPES.get(dtype_name), offset, size, stride, rest)
        raise _damaged(
            self.path,
            f"its pickle calls {function.name!r} with {len(arguments)} arguments that do not fit",
        )

    def _storage(self, identifier: object) -> _Storage:
        match identifier:
            case ("storage", _Global(name), str() as key, _, int() as size) if _is_size(size):
                pass
            case _:
                raise _damaged(
                    self.path,
                    "expected ('storage', type, key, location, size) as a storage in its pickle",
                )
        dtype_names = [d for d, storage in _TORCH_STORAGES.items() if name == f"torch.{storage}"]
        dtype = _TORCH_DTYPES[dtype_names[0]] if dtype_names else None
        if dtype is None and name != "torch.storage.UntypedStorage":
            raise _damaged(self.path, f"expected a type of storage in its pickle, received {name}")
        if key not in self.storages:
            raise _damaged(self.path, f"its pickle names the storage {key!r}, which is missing")
        content = _member_bytes(self.path, self.data, self.storages[key])
        expected_bytes = size * (1 if dtype is None else dtype.itemsize)
        if len(content) < expected_bytes:
            raise _damaged(
                self.path,
                f"expected {expected_bytes} bytes in storage {key!r}, received {len(content)}",
            )
        return _Storage(content[:expected_bytes], dtype)

    def _tensor(
        self,
        storage: _Storage,
        dtype: np.dtype | None,
        offset: object,
        size: object,
        stride: object,
        rest: list[object],
    ) -> np.ndarray:
        """A view of a storage; offset and stride count items, as in PyTorch."""
        if any(rest):
            raise _damaged(
                self.path,
                "a tensor has lazy flags (conjugate or negative)",
                "Save it resolved: tensor.resolve_conj().resolve_neg().",
            )
        if dtype is None:
            raise _damaged(self.path, "a tensor has no known dtype")
        if not (
            isinstance(size, tuple)
            and isinstance(stride, tuple)
            and isinstance(offset, int)
            and _is_sizes((offset, *size, *stride))
            and len(size) == len(stride)
        ):
            raise _damaged(self.path, "a tensor's offset, size and stride are not integers >= 0")
        # Bounds are checked here and not left to NumPy, for a message in PyTorch's units.
        last = offset + sum((n - 1) * step for n, step in zip(size, stride, strict=True))
        available = len(storage.content) // dtype.itemsize
        if 0 not in size and last >= available:
            raise _damaged(
                self.path,
                f"a tensor of size {size}, stride {stride} and offset {offset} needs "
                f"{last + 1} items, its storage has {available}",
            )
        if 0 in size:
            return np.empty(size, dtype)
        strides = tuple(step * dtype.itemsize for step in stride)
        return np.ndarray(size, dtype, storage.content, offset * dtype.itemsize, strides)


def _dtype_names(
    arrays: Mapping[str, np.ndarray], dtypes: dict[str, np.dtype], suffix: str
) -> dict[str, str]:
    """The name in a format of each array's dtype."""
    known = {dtype: name for name, dtype in dtypes.items()}
    names = {}
    for name, array in arrays.items():
        if not isinstance(name, str):
            raise TypeError(f"Expected names of type str, received {name!r}. Convert it to str.")
        if not isinstance(array, np.ndarray):
            raise TypeError(
                f"Expected a NumPy array for {name!r}, received {type(array).__name__}. Convert it "
                "with np.asarray."
            )
        dtype = array.dtype.newbyteorder("<")
        if dtype not in known:
            raise ValueError(
                f"A {suffix} file cannot hold the dtype '{array.dtype}' of {name!r}. Convert it to "
                f"one of: {', '.join(str(dtype) for dtype in known)}."
            )
        names[name] = known[dtype]
    return names


def little_endian_bytes(array: np.ndarray) -> memoryview:
    """The bytes of an array in C order; a copy only if it is not stored so already."""
    array = np.asarray(array, dtype=array.dtype.newbyteorder("<"), order="C")
    return array.reshape(-1).view(np.uint8).data


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
        if dtype_name in _TORCH_STORAGES:
            function = b"ctorch._utils\n_rebuild_tensor_v2\n"
            storage_type = f"ctorch\n{_TORCH_STORAGES[dtype_name]}\n".encode()
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
