"""Reads and writes .safetensors files as NumPy arrays, without the safetensors library."""

import json
import math
import struct
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from keras_convnext._files import StrPath, replacing_file
from keras_convnext.weights.arrays import (
    SAFETENSORS_DTYPES,
    damaged,
    is_sizes,
    little_endian_bytes,
    looks_like_safetensors,
    map_file,
    names_of_dtypes,
    naming,
    unknown_content,
)

# The limit of the safetensors library, which refuses to read a longer header.
_MAX_HEADER_BYTES = 100_000_000


def read_safetensors_metadata(path: StrPath) -> dict[str, str]:
    """Reads the free-form metadata in the header of a .safetensors file; {} when it has none.

    The whole header is checked: a FileFormatError when it is not valid, an OSError when no file is there.
    """
    path = Path(path)
    with naming(path):
        data = map_file(path)
        start = bytes(data[:64])
        if not looks_like_safetensors(start):
            raise unknown_content(start, path.suffix, "a .safetensors file")
        return read_mapped(data)[1]


def write_safetensors(
    path: StrPath, arrays: Mapping[str, np.ndarray], metadata: Mapping[str, str] | None = None
) -> None:
    """Writes arrays to a .safetensors file, which appears whole or not at all.

    The same arrays and metadata give the same bytes, whatever the order of the dictionaries: the arrays are
    stored by decreasing item size, then by name, so each is aligned to its item size.

    Raises an OSError when the file cannot be written there, a TypeError when a name is not a str or a value
    not an array, a ValueError when the format has no such dtype.
    """
    names = names_of_dtypes(arrays, SAFETENSORS_DTYPES, ".safetensors")
    header: dict[str, object] = {} if metadata is None else {"__metadata__": dict(sorted(metadata.items()))}
    order = sorted(arrays, key=lambda name: (-arrays[name].dtype.itemsize, name))
    offset = 0
    for name in order:
        array, begin = arrays[name], offset
        offset += array.nbytes
        header[name] = {"dtype": names[name], "shape": list(array.shape), "data_offsets": [begin, offset]}
    encoded = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode("utf-8")
    encoded += b" " * (-len(encoded) % 8)
    with replacing_file(path) as file:
        file.write(struct.pack("<Q", len(encoded)) + encoded)
        for name in order:
            file.write(little_endian_bytes(arrays[name]))


def read_mapped(data: memoryview) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """Checks a mapped file; gives its arrays, views as of `read_state_dict`, and its metadata."""
    header_bytes = int.from_bytes(data[:8], "little")
    data_start = 8 + header_bytes
    if header_bytes > _MAX_HEADER_BYTES:
        raise damaged(
            f"expected a header of at most {_MAX_HEADER_BYTES} bytes, its length says {header_bytes}"
        )
    if data_start > len(data):
        raise damaged(
            f"expected at least {data_start} bytes (8 and a header of {header_bytes}), received {len(data)}"
        )
    try:
        header = json.loads(str(data[8:data_start], "utf-8"), object_pairs_hook=_dict_without_duplicates)
    except (ValueError, RecursionError) as error:
        raise damaged(f"its header is not valid JSON ({error})") from error
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise damaged("expected '__metadata__' to map str to str in its header")

    for name, entry in header.items():
        if not isinstance(entry, dict) or not {"dtype", "shape", "data_offsets"} <= entry.keys():
            raise damaged(f"expected 'dtype', 'shape' and 'data_offsets' for tensor {name!r}")
        dtype_name, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
        if not isinstance(dtype_name, str) or dtype_name not in SAFETENSORS_DTYPES:
            known = f"Known: {', '.join(SAFETENSORS_DTYPES)}."
            raise damaged(f"tensor {name!r} has dtype {dtype_name!r}", known)
        if not is_sizes(shape):
            raise damaged(f"expected at most 64 sizes >= 0 as the shape of {name!r}, received {shape!r}")
        if not is_sizes(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
            raise damaged(f"expected [begin, end] as data_offsets of {name!r}, received {offsets}")
        expected = math.prod(shape) * SAFETENSORS_DTYPES[dtype_name].itemsize
        received = offsets[1] - offsets[0]
        if received != expected:
            raise damaged(
                f"expected {expected} bytes for {name!r} ({dtype_name}, shape {shape}), its data_offsets "
                f"{offsets} have {received}"
            )

    previous_end = 0
    for begin, end, name in sorted((*entry["data_offsets"], name) for name, entry in header.items()):
        if begin < previous_end:
            raise damaged(
                f"tensor {name!r} begins at byte {begin} of the data and overlaps another one, "
                f"which ends at {previous_end}"
            )
        if begin > previous_end:
            raise damaged(f"no tensor covers bytes {previous_end} to {begin} of the data, before {name!r}")
        previous_end = end
    if data_start + previous_end != len(data):
        raise damaged(f"expected {data_start + previous_end} bytes in all, received {len(data)}")
    arrays = {}
    for name, entry in header.items():
        shape, dtype = entry["shape"], SAFETENSORS_DTYPES[entry["dtype"]]
        try:
            arrays[name] = np.ndarray(shape, dtype, data, data_start + entry["data_offsets"][0])
        except ValueError as error:
            # The sizes next to a zero can be of any magnitude, and NumPy multiplies them.
            raise damaged(f"NumPy has no array of the shape {shape} of {name!r} ({error})") from error
    return arrays, metadata


def _dict_without_duplicates(pairs: list[tuple[str, object]]) -> dict[str, object]:
    result: dict[str, object] = {}
    for key, value in pairs:
        if key in result:
            raise ValueError(f"the key {key!r} occurs twice")
        result[key] = value
    return result
