"""Reads and writes .pth files as NumPy arrays, without PyTorch or pickle; reads .safetensors files too.

A .pth file is a zip archive: `data.pkl` describes the tensors, and each storage is one uncompressed
member. A pickle is a program, and an unpickler runs it. This module never does: `pickletools` only
cuts the program into its opcodes, and `_PickleReader` interprets the few that describe tensors.
A name in the pickle is looked up in a literal table and is never imported.

Arrays that are read are views of the memory-mapped file: nothing is copied, and a tensor's pages
are read from the disk when they are first used.
"""

import math
import os
import pickletools
import struct
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np

from keras_convnext._files import replacing_file
from keras_convnext.weights.arrays import (
    TORCH_DTYPES,
    FileFormatError,
    UnsafeFileError,
    damaged_file,
    is_size,
    is_sizes,
    little_endian_bytes,
    looks_like_safetensors,
    map_file,
    names_of_dtypes,
    unknown_content,
)
from keras_convnext.weights.safetensors_files import safetensors_arrays

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
        *(f"torch.{name}" for name in TORCH_DTYPES),
    }
)

# Training scripts store these next to it (arguments, scores, schedules): nothing of them is kept.
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
    data = map_file(path)
    start = bytes(data[:64])
    if looks_like_safetensors(start):
        return safetensors_arrays(path, data)
    if start.startswith((b"PK\x03\x04", b"PK\x05\x06")):
        return _torch_arrays(path, data, prefer_ema)
    raise unknown_content(path, start)


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


def _torch_arrays(path: Path, data: memoryview, prefer_ema: bool) -> dict[str, np.ndarray]:
    """Reads the state dict in a zip archive of `torch.save`."""
    members = _zip_members(path, data)
    relative_names = {name.partition("/")[2] for name in members}
    if "constants.pkl" in relative_names:
        raise damaged_file(
            path,
            "it is a TorchScript archive, which holds code",
            "If you trust the file, save its weights alone in PyTorch: "
            "torch.save(torch.jit.load(path).state_dict(), new_path).",
        )
    roots = [name.partition("/")[0] for name in members if name.partition("/")[2] == "data.pkl"]
    if len(roots) != 1:
        raise damaged_file(
            path,
            f"expected a zip archive of torch.save with one 'data.pkl', received one with "
            f"{len(roots)}; its first members are {sorted(members)[:5]}",
            "Check that it is the file you meant.",
        )
    root = roots[0]
    if f"{root}/byteorder" in members:
        byte_order = bytes(_member_bytes(path, data, members[f"{root}/byteorder"]))
        if byte_order.strip() != b"little":
            raise damaged_file(
                path,
                f"expected the byte order b'little', received {byte_order[:16]!r}",
                "Re-save it with torch.save on a little-endian machine.",
            )
    program = _member_bytes(path, data, members[f"{root}/data.pkl"])
    if len(program) > _MAX_PICKLE_BYTES:
        raise damaged_file(
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
        raise damaged_file(
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
        raise damaged_file(path, f"it starts as a zip archive but has no valid index ({e})") from e
    members = {info.filename: info for info in infos}
    if len(members) != len(infos):
        raise damaged_file(path, "its zip archive has two members of one name")
    return members


def _member_bytes(path: Path, data: memoryview, info: zipfile.ZipInfo) -> memoryview:
    """The bytes of an uncompressed member, without a copy."""
    if info.compress_type != zipfile.ZIP_STORED or info.flag_bits & 0x1:
        raise damaged_file(
            path,
            f"expected uncompressed members, as torch.save writes them; {info.filename!r} is "
            "compressed or encrypted",
            "Re-save it with torch.save, or rebuild the archive with `zip -0`.",
        )
    # The local header, with lengths of its own for the name and the extra field (zip format 4.3.7).
    header_start = info.header_offset
    header = bytes(data[max(header_start, 0) : max(header_start, 0) + 30])
    if header_start < 0 or len(header) != 30 or header[:4] != b"PK\x03\x04":
        raise damaged_file(path, f"expected a zip header for {info.filename!r} at byte {header_start}")
    name_bytes, extra_bytes = struct.unpack("<HH", header[26:30])
    begin = header_start + 30 + name_bytes + extra_bytes
    end = begin + info.file_size
    if info.compress_size != info.file_size or end > len(data):
        raise damaged_file(
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
            raise damaged_file(self.path, f"its pickle is malformed ({error})") from error
        raise damaged_file(self.path, "its pickle has no end")

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
                        raise damaged_file(self.path, "its pickle names a global that is not a text")
            case "BINPERSID":
                self.stack.append(self._storage(self.stack.pop()))
            case "REDUCE" | "NEWOBJ":
                function, arguments = self._pop_tuple(2)
                self.stack.append(self._reduce(function, arguments))
            case "BUILD":
                instance, _ = self._pop_tuple(2)
                if not isinstance(instance, _Ignored | dict):
                    raise damaged_file(self.path, f"its pickle sets a state at byte {position}")
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
            raise damaged_file(self.path, "its pickle is malformed (stack underflow)")
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
            raise damaged_file(self.path, f"its pickle appends to a {type(target).__name__}")

    def _set_items(self, items: list[object]) -> None:
        target = self.stack[-1]
        if len(items) % 2:
            raise damaged_file(self.path, "its pickle has a dictionary key without a value")
        if isinstance(target, dict):
            # Other keys do not occur in a state dict, and hashing a deeply nested tuple would
            # overflow the C stack.
            for key, value in zip(items[::2], items[1::2], strict=True):
                if isinstance(key, str | int):
                    target[key] = value
        elif not isinstance(target, _Ignored):
            raise damaged_file(self.path, f"its pickle sets items of a {type(target).__name__}")

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
            raise damaged_file(self.path, f"its pickle calls a {type(function).__name__}")
        if function.name in _IGNORED_GLOBALS:
            return _IGNORED
        match function.name.rpartition(".")[2], arguments:
            case "OrderedDict", ():
                return {}
            case "Size", (size,) if is_sizes(size):
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
                return self._tensor(storage, TORCH_DTYPES.get(dtype_name), offset, size, stride, rest)
        raise damaged_file(
            self.path,
            f"its pickle calls {function.name!r} with {len(arguments)} arguments that do not fit",
        )

    def _storage(self, identifier: object) -> _Storage:
        match identifier:
            case ("storage", _Global(name), str() as key, _, int() as size) if is_size(size):
                pass
            case _:
                raise damaged_file(
                    self.path,
                    "expected ('storage', type, key, location, size) as a storage in its pickle",
                )
        dtype_names = [d for d, storage in _TORCH_STORAGES.items() if name == f"torch.{storage}"]
        dtype = TORCH_DTYPES[dtype_names[0]] if dtype_names else None
        if dtype is None and name != "torch.storage.UntypedStorage":
            raise damaged_file(self.path, f"expected a type of storage in its pickle, received {name}")
        if key not in self.storages:
            raise damaged_file(self.path, f"its pickle names the storage {key!r}, which is missing")
        content = _member_bytes(self.path, self.data, self.storages[key])
        expected_bytes = size * (1 if dtype is None else dtype.itemsize)
        if len(content) < expected_bytes:
            raise damaged_file(
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
            raise damaged_file(
                self.path,
                "a tensor has lazy flags (conjugate or negative)",
                "Save it resolved: tensor.resolve_conj().resolve_neg().",
            )
        if dtype is None:
            raise damaged_file(self.path, "a tensor has no known dtype")
        if not (
            isinstance(size, tuple)
            and isinstance(stride, tuple)
            and isinstance(offset, int)
            and is_sizes((offset, *size, *stride))
            and len(size) == len(stride)
        ):
            raise damaged_file(self.path, "a tensor's offset, size and stride are not integers >= 0")
        # Bounds are checked here and not left to NumPy, for a message in PyTorch's units.
        last = offset + sum((n - 1) * step for n, step in zip(size, stride, strict=True))
        available = len(storage.content) // dtype.itemsize
        if 0 not in size and last >= available:
            raise damaged_file(
                self.path,
                f"a tensor of size {size}, stride {stride} and offset {offset} needs "
                f"{last + 1} items, its storage has {available}",
            )
        if 0 in size:
            return np.empty(size, dtype)
        strides = tuple(step * dtype.itemsize for step in stride)
        return np.ndarray(size, dtype, storage.content, offset * dtype.itemsize, strides)


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
