"""Descriptions, indices, TFRecords and tars that say something else: one sentence with the file, and soon."""

import io
import json
import os
import struct
import tarfile
import time
import zipfile

import numpy as np
import pytest

from keras_convnext.data import index, records, tfrecords
from keras_convnext.data.index import SourceError
from keras_convnext.data.sources import list_splits, open_source
from keras_convnext.data.tfrecords import RecordError, example_head

pytestmark = pytest.mark.once

INFO = {"name": "set", "splits": [{"name": "train", "shardLengths": ["2"]}]}
FEATURES = {
    "featuresDict": {
        "features": {
            "image": {"pythonClassName": "tfds.Image"},
            "label": {"pythonClassName": "tfds.ClassLabel", "classLabel": {"numClasses": "3"}},
        }
    }
}


def record(body):
    length = struct.pack("<Q", len(body))
    return length + struct.pack("<I", tfrecords._masked_checksum(length)) + body + bytes(4)


def example(label, **more):
    image = b"\xff\xd8 image"
    head = example_head(len(image), {"label": label} | more)
    return record((head + image).replace(b"image/encoded", b"image/encoded"))


@pytest.fixture
def tfds_set(tmp_path):
    """A data set as TensorFlow Datasets writes it, of two examples."""
    (tmp_path / "dataset_info.json").write_text(json.dumps(INFO))
    (tmp_path / "features.json").write_text(json.dumps(FEATURES).replace('"image"', '"image/encoded"'))
    (tmp_path / "set-train.tfrecord-00000-of-00001").write_bytes(example(0) + example(2))
    return tmp_path


def damages(right, without=()):
    """JSON texts that are something else: of another kind, without a key, too deep, with odd values."""
    yield from ("", "null", "[]", "1", '"a"', "{}", "[" * 100_000, '{"a":' * 100_000, "\ud800", "1" * 5000)
    for name in right:
        rest = {key: value for key, value in right.items() if key != name}
        yield json.dumps(rest)
        for value in (None, 0, "a", [], [None], [[]], {}, {"a": 1}, [{}], [{"name": "train"}], 10**30):
            yield json.dumps(rest | {name: value})


@pytest.mark.parametrize("name", ["dataset_info.json", "features.json"])
def test_a_description_of_something_else_is_named(name, tfds_set):
    assert open_source(tfds_set).labels.tolist() == [0, 2]  # the control
    right = json.loads((tfds_set / name).read_text())
    inner = json.dumps(right)
    texts = [
        *damages(right),
        *(inner.replace('"2"', text) for text in ('"-1"', '"a"', "[]", '"1e9"', "null")),
    ]
    texts += [inner.replace('"3"', text) for text in ('"-1"', '"a"', "[]", f'"{10**12}"', "null")]
    for text in texts:
        (tfds_set / name).write_bytes(text.encode("utf-8", "surrogatepass"))
        for reader in (open_source, list_splits):
            try:
                reader(tfds_set, "train") if reader is open_source else reader(tfds_set)
            except SourceError as error:
                assert str(tfds_set) in str(error) and len(str(error)) < 800, text[:100]


def test_a_description_leads_to_no_other_folder(tfds_set):
    info = json.loads(json.dumps(INFO))
    info["splits"][0]["filepathTemplate"] = "../{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_X_OF_Y}"
    (tfds_set / "dataset_info.json").write_text(json.dumps(info))
    with pytest.raises(SourceError, match=r"expected the name of a file in the folder, received '\.\./set"):
        open_source(tfds_set)


@pytest.fixture
def prepared(tmp_path):
    """A folder as `prepare` writes it, of two examples."""
    shard = "train-00000-of-00001.tfrecord"
    (tmp_path / shard).write_bytes(example(0) + example(1))
    source = open_source(tmp_path / shard)
    index.write_index(str(tmp_path / "train-index.npz"), source)
    files = [
        {"name": name, "size": (tmp_path / name).stat().st_size, "sha256": "0" * 64}
        for name in (shard, "train-index.npz")
    ]
    entry = {"settings": {}, "classes": source.classes, "shards": files[:1], "index": files[1]}
    manifest = {"format": "keras_convnext", "version": 1, "splits": {"train": entry}}
    (tmp_path / "manifest.json").write_text(json.dumps(manifest))
    return tmp_path


def test_a_manifest_of_something_else_is_named(prepared):
    assert open_source(prepared).labels.tolist() == [0, 1]  # the control
    right = json.loads((prepared / "manifest.json").read_text())
    entry = right["splits"]["train"]
    texts = [*damages(right)]
    texts += [
        json.dumps(right | {"splits": {"train": json.loads(text)}}) for text in list(damages(entry))[10:]
    ]
    for name in ("../x", "/etc/passwd", "", None, 5, "a/b", ".."):
        record_of = entry["index"] | {"name": name}
        texts.append(json.dumps(right | {"splits": {"train": entry | {"index": record_of}}}))
    for text in texts:
        (prepared / "manifest.json").write_bytes(text.encode("utf-8", "surrogatepass"))
        try:
            records.read_manifest(str(prepared))
            open_source(prepared)
        except SourceError as error:
            assert str(prepared) in str(error) and len(str(error)) < 800, text[:100]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"labels": np.array([0, 7], np.int32)}, "labels has numbers from 0 to 7"),
        ({"file_numbers": np.array([0, 1], np.int32)}, "file_numbers has numbers from 0 to 1"),
        ({"file_numbers": np.array([0, -1], np.int32)}, "file_numbers has numbers from -1"),
        ({"offsets": np.array([0, -5])}, "offsets has numbers from -5"),
        ({"lengths": np.array([0, -2])}, "lengths has numbers from -2"),
        ({"lengths": np.array([0.0, 2])}, r"lengths has the shape \(2,\) and the type float64"),
        ({"offsets": np.array([0])}, r"offsets has the shape \(1,\)"),
        ({"labels": np.array(0)}, "TypeError"),
        ({"name_ends": np.array([9, 3])}, "name_ends does not rise"),
        ({"name_ends": np.array([9, 10**9])}, "name_ends has numbers from 9 to 1000000000"),
        ({"classes": np.frombuffer(b"{}", np.uint8)}, "no list of names"),
        ({"classes": np.frombuffer(b"[1, 2]", np.uint8)}, "no list of names"),
        ({"classes": np.frombuffer(b"[" * 100_000, np.uint8)}, "RecursionError"),
        ({"stamp": np.frombuffer(b"\xff", np.uint8)}, "codec can't decode"),
        ({"labels": None}, "'labels is not a file in the archive' is missing"),
    ],
)
def test_an_index_out_of_range_is_refused(changes, message, prepared):
    path = prepared / "train-index.npz"
    with np.load(path) as content:
        arrays = {name: content[name] for name in content} | changes
    np.savez(path, **{name: array for name, array in arrays.items() if array is not None})
    files = [str(prepared / "train-00000-of-00001.tfrecord")]
    with pytest.raises(SourceError, match=message) as error:
        index.read_index(str(path), str(prepared), "prepared", files)
    assert "train-index.npz" in str(error.value)


def test_an_index_that_says_more_than_it_has_is_refused(prepared, tmp_path):
    path = prepared / "train-index.npz"
    arrays = {"labels": np.zeros(1 << 22, np.int32)}
    np.savez_compressed(path, **arrays)
    with pytest.raises(SourceError, match="its arrays are compressed, or longer than the file"):
        index.read_index(str(path), str(prepared), "prepared", [])
    content = io.BytesIO()
    np.lib.format.write_array_header_1_0(
        content, {"descr": "<i4", "fortran_order": False, "shape": (1 << 50,)}
    )
    with zipfile.ZipFile(path, "w") as archive:
        for name in (
            "labels",
            "offsets",
            "lengths",
            "file_numbers",
            "name_text",
            "name_ends",
            "stamp",
            "classes",
        ):
            archive.writestr(f"{name}.npy", content.getvalue())
    with pytest.raises(SourceError, match=r"train-index\.npz"):
        index.read_index(str(path), str(prepared), "prepared", [])
    path.unlink()
    os.mkfifo(path)
    with pytest.raises(OSError, match="named pipe"):
        index.read_index(str(path), str(prepared), "prepared", [])


@pytest.mark.parametrize(
    "body",
    [b"\xff" * 3_000_000, b"\x0a" + b"\xff" * 3_000_000, (b"\x0a" + b"\xff" * 9 + b"\x7f") * 1000,
     b"\x80" * 11, b"\x0a\x80\x80\x80\x80\x80\x80\x80\x80\x80\x80\x00"],
)  # fmt: skip
def test_an_integer_without_end_is_refused_at_once(body, tmp_path):
    path = tmp_path / "x.tfrecord"
    path.write_bytes(record(body))
    start = time.monotonic()
    with pytest.raises(
        RecordError, match=r"Expected a tf.train.Example in the record at byte 12 of '.*x\.tf"
    ):
        open_source(path)
    assert time.monotonic() - start < 2


def test_labels_of_records_are_bounded(tmp_path):
    path = tmp_path / "x.tfrecord"
    path.write_bytes(example(0) + example(2_000_000_000))
    with pytest.raises(SourceError, match=r"Expected labels from 0 to 999999 in .*, received 2000000000"):
        open_source(path)


def test_a_synset_that_is_no_utf8_is_a_name(tmp_path):
    path = tmp_path / "x.tfrecord"
    more = {"image/class/label": 0, "image/class/synset": b"caf\xe9"}
    path.write_bytes(example(0, **more))
    assert open_source(path).classes == ["caf\udce9"]


# Tars


def tar(*members):
    """Bytes of members (name, content, size in the header, type, pax attributes)."""
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w", format=tarfile.PAX_FORMAT) as archive:
        for name, content, pax in members:
            member = tarfile.TarInfo(name)
            member.size, member.pax_headers = len(content), pax
            archive.addfile(member, io.BytesIO(content))
    return file.getvalue()


def with_size(content, size, at=0):
    """A tar whose header at a byte says another size, in base 256, with the right sum."""
    header = bytearray(content[at : at + 512])
    header[124:136] = (256**12 + size if size < 0 else size + 0x80 * 256**11).to_bytes(13, "big")[1:]
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    return content[:at] + bytes(header) + content[at + 512 :]


NAME = "ILSVRC2012_val_00000001.JPEG"


@pytest.mark.parametrize("size", [-512, -1, -1024, -513, -(2**62), 2**62])
def test_sizes_of_a_tar_that_lead_back_or_beyond_are_refused(size, tmp_path):
    path = tmp_path / "ILSVRC2012_img_val.tar"
    path.write_bytes(with_size(tar((NAME, b"image", {})), size))
    with pytest.raises(SourceError, match=r"ILSVRC2012_img_val\.tar"):
        open_source(path, "val")


@pytest.mark.parametrize("attribute", ["size"])
@pytest.mark.parametrize("size", ["-512", "-1024", "-1536", "-99999999", "9" * 400, "x"])
def test_sizes_in_the_attributes_of_a_tar_are_refused(attribute, size, tmp_path):
    path = tmp_path / "ILSVRC2012_img_val.tar"
    path.write_bytes(tar((NAME, b"image", {attribute: size})))
    with pytest.raises(SourceError, match=r"ILSVRC2012_img_val\.tar"):
        open_source(path, "val")


@pytest.mark.parametrize(
    "attributes",
    [
        {"GNU.sparse.map": "0,5", "GNU.sparse.size": "5000"},
        {"GNU.sparse.major": "1", "GNU.sparse.minor": "0", "GNU.sparse.realsize": "9"},
        {"GNU.sparse.map": "a,b"},
        {"path": "x" * 100_000},
    ],
)
def test_files_with_holes_and_long_attributes_are_refused(attributes, tmp_path):
    path = tmp_path / "ILSVRC2012_img_val.tar"
    path.write_bytes(tar((NAME, b"1\n0\n5\n" + bytes(600), attributes)))
    with pytest.raises(SourceError, match=r"ILSVRC2012_img_val\.tar"):
        open_source(path, "val")


def test_a_sparse_member_of_the_old_form_is_refused(tmp_path):
    content = bytearray(tar((NAME, b"image" * 100, {})))
    content[156:157] = tarfile.GNUTYPE_SPARSE
    content[257:265] = tarfile.GNU_MAGIC
    content[148:156] = b" " * 8
    content[148:156] = b"%06o\0 " % sum(content[:512])
    path = tmp_path / "ILSVRC2012_img_val.tar"
    path.write_bytes(content)
    with pytest.raises(SourceError, match=r"received 'ILSVRC2012_val_00000001\.JPEG' with holes"):
        open_source(path, "val")


def test_a_hundred_thousand_headers_of_a_name_end(tmp_path):
    header = tar((NAME, b"", {"comment": "a"}))[:1024]
    path = tmp_path / "ILSVRC2012_img_val.tar"
    path.write_bytes(header * 3000)
    with pytest.raises(SourceError, match=r"ILSVRC2012_img_val\.tar"):
        open_source(path, "val")
