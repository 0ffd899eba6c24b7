"""Errors, memory maps and dtypes that the readers and writers of all weight files share."""

import contextlib
import mmap
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from keras_convnext._files import FileFormatError, regular_size
from keras_convnext._messages import shortened

# PyTorch's name of each dtype that weights have, that of .safetensors, and PyTorch's class of its storages;
# newer dtypes have none, and their tensors name `UntypedStorage`. "<": both formats are little-endian.
_DTYPES: tuple[tuple[str, str | None, str | None, Any], ...] = (
    ("float64", "F64", "DoubleStorage", "<f8"),
    ("float32", "F32", "FloatStorage", "<f4"),
    ("float16", "F16", "HalfStorage", "<f2"),
    ("bfloat16", "BF16", "BFloat16Storage", ml_dtypes.bfloat16),
    ("float8_e4m3fn", "F8_E4M3", None, ml_dtypes.float8_e4m3fn),
    ("float8_e4m3fnuz", "F8_E4M3FNUZ", None, ml_dtypes.float8_e4m3fnuz),
    ("float8_e5m2", "F8_E5M2", None, ml_dtypes.float8_e5m2),
    ("float8_e5m2fnuz", "F8_E5M2FNUZ", None, ml_dtypes.float8_e5m2fnuz),
    ("float8_e8m0fnu", "F8_E8M0", None, ml_dtypes.float8_e8m0fnu),
    ("complex64", "C64", "ComplexFloatStorage", "<c8"),
    ("complex128", None, "ComplexDoubleStorage", "<c16"),
    ("int64", "I64", "LongStorage", "<i8"),
    ("int32", "I32", "IntStorage", "<i4"),
    ("int16", "I16", "ShortStorage", "<i2"),
    ("int8", "I8", "CharStorage", "i1"),
    ("uint64", "U64", None, "<u8"),
    ("uint32", "U32", None, "<u4"),
    ("uint16", "U16", None, "<u2"),
    ("uint8", "U8", "ByteStorage", "u1"),
    ("bool", "BOOL", "BoolStorage", "?"),
)
TORCH_DTYPES: dict[str, np.dtype] = {torch: np.dtype(dtype) for torch, _, _, dtype in _DTYPES}
TORCH_STORAGES: dict[str, str] = {torch: storage for torch, _, storage, _ in _DTYPES if storage}
SAFETENSORS_DTYPES: dict[str, np.dtype] = {name: np.dtype(dtype) for _, name, _, dtype in _DTYPES if name}


class UnsafeFileError(ValueError):
    """A .pth file asks for code that a state dict does not need; none of it was executed."""


def not_finite(outputs: np.ndarray) -> np.ndarray:
    """Tells which of N outputs, (N, ...), hold NaN or infinity: bool (N,)."""
    return ~np.isfinite(outputs).all(axis=tuple(range(1, outputs.ndim)))


def release_pages(array: np.ndarray) -> None:
    """Lets the system drop the pages of the mapped file behind an array, once its values are copied."""
    owner: object = array
    while isinstance(owner, np.ndarray):
        owner = owner.base
    if isinstance(owner, memoryview):
        owner = owner.obj
    if isinstance(owner, mmap.mmap) and hasattr(mmap, "MADV_DONTNEED"):
        owner.madvise(mmap.MADV_DONTNEED)


@contextlib.contextmanager
def naming(path: Path) -> Iterator[None]:
    """Puts the file in front of an error about its contents that does not name it."""
    try:
        yield
    except ValueError as error:
        if str(path) in str(error):
            raise
        raise type(error)(f"{path}: {error}") from error.__cause__


def damaged(
    fact: str, remedy: str = "The file is damaged or incomplete: download or save it again."
) -> FileFormatError:
    """The error for a file that cannot be read; `naming` says which."""
    return FileFormatError(f"{shortened(fact, 400)}. {remedy}")


def map_file(path: Path) -> memoryview:
    """Maps a file read-only; the mapping lives as long as a view of it does."""
    if regular_size(path) == 0:
        raise damaged("it is empty (0 bytes)")
    with open(path, "rb") as file:
        return memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))


def looks_like_safetensors(start: bytes) -> bool:
    """Whether the first bytes of a file, 9 or more, are those of a .safetensors file."""
    # A header length below 4 GiB, then its JSON. Checked before the other kinds, because the first
    # bytes of a length may read as anything: 640 reads as the start of a pickle.
    return start[4:9] == b"\0\0\0\0{"


def unknown_content(start: bytes, suffix: str, expected: str) -> FileFormatError:
    """The error for a file that does not start as a known kind does."""
    if start.startswith(b"version https://git-lfs"):
        fact = "it is a Git LFS pointer, a text that stands for the file"
        remedy = "Fetch the file itself with `git lfs pull`."
    elif start.lstrip().lower().startswith((b"<!doctype", b"<html", b"<?xml")):
        fact = "it is a web page, not weights"
        remedy = "The download met an error or login page: download it again from a direct link."
    elif start.startswith(b"\x80") and start[1:2] in (b"\1", b"\2", b"\3", b"\4", b"\5"):
        fact = "it is a bare pickle, not a file of torch.save"
        remedy = "If you trust the file, load it in Python and save its arrays as .safetensors."
    elif suffix == ".safetensors":
        if len(start) < 8:
            return damaged(f"expected at least 8 bytes (the header's length), received {len(start)}")
        return damaged(f"expected 8 bytes of header length and then '{{', received {start[:9]!r}")
    else:
        fact = f"expected {expected}, received a file that starts with {start[:16]!r}"
        remedy = "Check that it is the file you meant and that its download was complete."
    return damaged(fact, remedy)


def is_size(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**63


def is_sizes(value: object) -> bool:
    # 64 is the largest number of dimensions of a NumPy array.
    return isinstance(value, list | tuple) and len(value) <= 64 and all(is_size(size) for size in value)


def names_of_dtypes(
    arrays: Mapping[str, np.ndarray], dtypes: dict[str, np.dtype], suffix: str
) -> dict[str, str]:
    """The name in a format of each array's dtype."""
    known = {dtype: name for name, dtype in dtypes.items()}
    names = {}
    for name, array in arrays.items():
        if not isinstance(name, str):
            raise TypeError(f"Expected names of type str, received {name!r}. Convert it to str.")
        if not isinstance(array, np.ndarray):
            received = type(array).__name__
            raise TypeError(
                f"Expected a NumPy array for {name!r}, received {received}. Convert it with np.asarray."
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
