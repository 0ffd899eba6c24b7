"""Reads and writes TFRecord files of tf.train.Example without TensorFlow.

A TFRecord file is a sequence of records: length (uint64, little-endian), masked CRC-32C of those eight bytes,
the record, masked CRC-32C of the record. Reference: tensorflow/core/lib/io/record_writer.h and, for the
protocol buffers, tensorflow/core/example/example.proto and feature.proto (field numbers below).
"""

import functools
import itertools
import mmap
import struct
from collections.abc import Iterator

MAX_VALUES = 100_000  # of a feature; an image has one or a few, and what is beyond these is not read
HEADER_BYTES = 12  # before a record: length and its checksum
FOOTER_BYTES = 4  # after it: its checksum

# A file that is read in bytes, or a record of it.
Buffer = bytes | mmap.mmap
Range = tuple[int, int]  # first byte and number of bytes, in the buffer
Features = dict[str, list[Range] | list[int]]  # of a record, by name


class RecordError(ValueError):
    """A TFRecord file, or an Example in it, is damaged: which, where and what to do."""


@functools.cache
def _shifted(value: int) -> int:
    for _ in range(8):
        value = value >> 1 ^ (0x82F63B78 if value & 1 else 0)  # Castagnoli, bit-reversed
    return value


def _masked_checksum(data: bytes) -> int:
    """The CRC-32C of a record's header, rotated and shifted as TFRecord stores it."""
    value = 0xFFFFFFFF
    for byte in data:
        value = _shifted((value ^ byte) & 0xFF) ^ value >> 8
    value ^= 0xFFFFFFFF
    return ((value >> 15 | value << 17) + 0xA282EAD8) & 0xFFFFFFFF


def find_records(buffer: Buffer, path: str) -> Iterator[Range]:
    """Finds (first byte, number of bytes) of each record of a TFRecord file, without header and footer.

    The checksum of each header is compared, that of the records is not: that would read the whole file.
    Raises RecordError when the file is compressed, is no TFRecord file, is damaged or ends within a record.
    """
    if buffer[:2] == b"\x1f\x8b":
        raise RecordError(
            f"Expected uncompressed TFRecords, but '{path}' is compressed with GZIP. Write it again without "
            "compression: images gain nothing from it."
        )
    start, size = 0, len(buffer)
    while start < size:
        header = buffer[start : start + HEADER_BYTES].ljust(HEADER_BYTES, b"\0")
        length, checksum = struct.unpack("<QI", header)
        is_whole = start + HEADER_BYTES <= size
        if is_whole and _masked_checksum(header[:8]) != checksum:
            what = "is not a TFRecord file" if start == 0 else f"is damaged at byte {start}"
            raise RecordError(
                f"Expected the header of a TFRecord with its checksum, but '{path}' {what}. Copy or write it "
                "again."
            )
        end = start + HEADER_BYTES + length + FOOTER_BYTES
        if end > size:  # that of a header that is cut is beyond it too
            raise RecordError(
                f"Expected whole records, but '{path}' ends at byte {size}, within the record that begins at "
                f"byte {start}. It was not written or copied to its end: do that again."
            )
        yield start + HEADER_BYTES, length
        start = end


def parse_example(buffer: Buffer, start: int, length: int, path: str) -> Features:
    """Finds the features of a serialised tf.train.Example, by name, without copying them.

    Values are (first byte, number of bytes) in `buffer` for bytes, int for int64; features of floats are left
    out. Raises RecordError when the bytes are not an Example.
    """
    features: Features = {}
    try:
        for all_features in _ranges(buffer, (start, length), 1):  # Example.features
            for entry in _ranges(buffer, all_features, 1):  # Features.feature, a map
                # Where key and value of the map entry lie.
                parts = {number: at for number, at in _fields(buffer, entry) if isinstance(at, tuple)}
                (name_start, name_length), value = parts.get(1, (0, 0)), parts.get(2, (0, 0))
                name = buffer[name_start : name_start + name_length].decode("utf-8")
                for kind, values in _fields(buffer, value):
                    if kind == 1 and isinstance(values, tuple):  # Feature.bytes_list
                        features[name] = list(itertools.islice(_ranges(buffer, values, 1), MAX_VALUES))
                    elif kind == 3 and isinstance(values, tuple):  # Feature.int64_list
                        features[name] = _integers(buffer, values)
    except (IndexError, ValueError) as error:
        raise RecordError(
            f"Expected a tf.train.Example in the record at byte {start} of '{path}', received something else "
            f"({error}). Write the file again with image and label features."
        ) from error
    return features


def example_head(image_bytes: int, features: dict[str, bytes | int]) -> bytes:
    """Serialises all of an Example but its image, which comes last: `head + image` is the Example.

    So the size of an Example and the place of the image in it, the feature "image/encoded", follow from the
    size of the image alone. Integers must not be negative.
    """
    others = b""
    for name, value in features.items():
        kind, content = (1, value) if isinstance(value, bytes) else (3, _varint(value))
        feature = _field(kind, _field(1, content))
        others += _field(1, _field(1, name.encode()) + _field(2, feature))
    entry = image_entry(image_bytes)
    return _tag(1, len(others) + len(entry) + image_bytes) + others + entry  # Example.features


def image_entry(image_bytes: int) -> bytes:
    """Serialises what stands in an Example between the other features and the image."""
    head = b""
    # From the inside out: BytesList.value, Feature.bytes_list, the map entry and Features.feature, each with
    # what stands before it in the enclosing message.
    for number, before in ((1, b""), (1, b""), (2, _field(1, b"image/encoded")), (1, b"")):
        head = before + _tag(number, len(head) + image_bytes) + head
    return head


def _fields(buffer: Buffer, within: Range) -> Iterator[tuple[int, Range | int]]:
    """Yields the number of each field of a message and its value, a range or an integer."""
    start, length = within
    end = start + length
    while start < end:
        key, start = _read_varint(buffer, start)
        value: Range | int = 0
        wire_type = key & 7
        if wire_type == 2:
            size, start = _read_varint(buffer, start)
            value = (start, size)
            start += size
        elif wire_type == 0:
            value, start = _read_varint(buffer, start)
        elif wire_type in (1, 5):
            start += 8 if wire_type == 1 else 4
        else:
            raise ValueError(f"wire type {wire_type} at byte {start}")
        if start > end:
            raise ValueError(f"a field ends after its message, at byte {start}")
        yield key >> 3, value


def _ranges(buffer: Buffer, within: Range, number: int) -> Iterator[Range]:
    for found, value in _fields(buffer, within):
        if found == number and isinstance(value, tuple):
            yield value


def _integers(buffer: Buffer, within: Range) -> list[int]:
    """Returns the values of an Int64List, single ones and packed ones."""
    values: list[int] = []
    for number, value in _fields(buffer, within):
        if number == 1 and isinstance(value, int):
            values.append(value)
        elif number == 1 and isinstance(value, tuple):  # packed
            start, end = value[0], value[0] + value[1]
            while start < end and len(values) < MAX_VALUES:
                item, start = _read_varint(buffer, start)
                values.append(item)
    return [value - (1 << 64) if value >> 63 else value for value in values]


def _read_varint(buffer: Buffer, start: int) -> tuple[int, int]:
    """Returns the integer and the place of the byte after it."""
    value = 0
    for shift in range(0, 70, 7):  # 64 bits have 10 bytes of 7
        byte = buffer[start]
        start += 1
        value |= (byte & 127) << shift
        if byte < 128:
            return value, start
    raise ValueError(f"an integer of more than 10 bytes before byte {start}")


def _varint(value: int) -> bytes:
    parts = bytearray()
    while value > 127:
        parts.append(value & 127 | 128)
        value >>= 7
    parts.append(value)
    return bytes(parts)


def _tag(number: int, length: int) -> bytes:
    return bytes([number << 3 | 2]) + _varint(length)


def _field(number: int, content: bytes) -> bytes:
    return _tag(number, len(content)) + content
