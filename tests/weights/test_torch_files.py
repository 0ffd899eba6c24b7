"""Weight files: what is read equals what PyTorch and the safetensors library read, and no more."""

import argparse
import copyreg
import io
import json
import mmap
import os
import pickle
import pickletools
import resource
import struct
import subprocess
import sys
import tarfile
import types
import zipfile
from collections import OrderedDict, defaultdict, deque
from pathlib import Path, PurePosixPath, PureWindowsPath

import ml_dtypes
import numpy as np
import pytest
import safetensors
import safetensors.numpy
import safetensors.torch
import torch

from keras_convnext.weights import safetensors_files, torch_files, torch_pickles
from keras_convnext.weights.arrays import FileFormatError, UnsafeFileError, release_pages
from keras_convnext.weights.safetensors_files import read_safetensors_metadata, write_safetensors
from keras_convnext.weights.torch_files import read_state_dict, write_torch

pytestmark = pytest.mark.once

DTYPES = {
    "float64": "float64",
    "float32": "float32",
    "float16": "float16",
    "bfloat16": ml_dtypes.bfloat16,
    "float8_e4m3fn": ml_dtypes.float8_e4m3fn,
    "float8_e4m3fnuz": ml_dtypes.float8_e4m3fnuz,
    "float8_e5m2": ml_dtypes.float8_e5m2,
    "float8_e5m2fnuz": ml_dtypes.float8_e5m2fnuz,
    "float8_e8m0fnu": ml_dtypes.float8_e8m0fnu,
    "complex64": "complex64",
    "complex128": "complex128",
    "int64": "int64",
    "int32": "int32",
    "int16": "int16",
    "int8": "int8",
    "uint64": "uint64",
    "uint32": "uint32",
    "uint16": "uint16",
    "uint8": "uint8",
    "bool": "bool",
}
SAFETENSORS_DTYPES = [name for name in DTYPES if name != "complex128"]


def random_array(rng, dtype_name, shape):
    """Random bits, so that NaN payloads and infinities occur; random truth values for bool."""
    dtype = np.dtype(DTYPES[dtype_name])
    if dtype_name == "bool":
        return rng.integers(0, 2, shape).astype(bool)
    count = int(np.prod(shape))
    return np.frombuffer(rng.bytes(count * dtype.itemsize), dtype).reshape(shape)


def torch_bytes(tensor):
    tensor = tensor.detach().contiguous().reshape(-1)
    if tensor.is_complex():
        tensor = torch.view_as_real(tensor).reshape(-1)
    return tensor.view(torch.uint8).numpy().tobytes()


def as_tensor(array, dtype_name):
    storage = torch.frombuffer(bytearray(array.tobytes()), dtype=torch.uint8)
    return storage.view(getattr(torch, dtype_name)).reshape(array.shape)


def assert_same(array, tensor):
    assert array.shape == tuple(tensor.shape)
    assert array.dtype == np.dtype(DTYPES[str(tensor.dtype).removeprefix("torch.")])
    assert array.tobytes() == torch_bytes(tensor)


def assert_bits_equal(left, right):
    assert left.shape == right.shape
    assert left.dtype == right.dtype.newbyteorder("=")
    assert left.tobytes() == right.astype(right.dtype.newbyteorder("=")).tobytes()


def write_archive(path, program, members=(), compression=zipfile.ZIP_STORED):
    """A .pth archive of a pickle and its other members."""
    with zipfile.ZipFile(path, "w", compression) as archive:
        archive.writestr("archive/data.pkl", program)
        archive.writestr("archive/byteorder", b"little")
        for name, content in members:
            archive.writestr(f"archive/{name}", content)


def tensor_program(storage_size=4, offset=0, size=(4,), stride=(1,), storage="FloatStorage"):
    """The pickle of {"weight": tensor}, with any description of the tensor."""

    def pushed(value):
        return pickle.dumps(value, 2)[2:-1]

    return (
        b"\x80\x02}X\x06\0\0\0weightctorch._utils\n_rebuild_tensor_v2\n("
        b"(X\x07\0\0\0storagectorch\n" + storage.encode() + b"\nX\x01\0\0\0"
        b"0X\x03\0\0\0cpu" + pushed(storage_size) + b"tQ" + pushed(offset) + pushed(size)
    ) + (pushed(stride) + b"\x89ccollections\nOrderedDict\n)RtRs.")


def write_raw_safetensors(path, header, data=b""):
    encoded = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(encoded)) + encoded + data)


def entry(dtype="F32", shape=(2,), offsets=(0, 8)):
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


def reaches_mmap(array):
    base = array
    while base is not None and not isinstance(base, mmap.mmap):
        base = base.obj if isinstance(base, memoryview) else getattr(base, "base", None)
    return isinstance(base, mmap.mmap)


# Reading .pth files of torch.save


@pytest.mark.parametrize("dtype_name", DTYPES)
@pytest.mark.parametrize("shape", [(), (5,), (2, 3, 4)])
def test_pth_of_torch_reads_bit_exact(tmp_path, dtype_name, shape):
    array = random_array(np.random.default_rng(0), dtype_name, shape)
    tensor = as_tensor(array, dtype_name)
    torch.save({"weight": tensor}, tmp_path / "a.pth")
    read = read_state_dict(tmp_path / "a.pth")
    assert list(read) == ["weight"]
    assert_same(read["weight"], tensor)


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_every_pickle_protocol_of_torch_save_is_read(tmp_path, protocol):
    model = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 2), torch.nn.BatchNorm2d(4))
    torch.save({"model": model.state_dict()}, tmp_path / "a.pth", pickle_protocol=protocol)
    read = read_state_dict(tmp_path / "a.pth")
    assert list(read) == list(model.state_dict())
    for name, tensor in model.state_dict().items():
        assert_same(read[name], tensor)


def test_order_of_the_file_is_kept(tmp_path):
    names = ["z", "a", "m", "b"]
    torch.save({name: torch.zeros(1) for name in names}, tmp_path / "a.pth")
    assert list(read_state_dict(tmp_path / "a.pth")) == names


def test_kind_is_told_from_content_and_not_from_the_name(tmp_path):
    torch.save({"weight": torch.ones(2)}, tmp_path / "a.safetensors")
    safetensors.torch.save_file({"weight": torch.ones(3)}, tmp_path / "b.pth")
    assert read_state_dict(tmp_path / "a.safetensors")["weight"].shape == (2,)
    assert read_state_dict(str(tmp_path / "b.pth"))["weight"].shape == (3,)


def test_safetensors_whose_length_looks_like_a_pickle_is_read(tmp_path):
    header = json.dumps({"weight": entry()}).encode().ljust(640)
    write_raw_safetensors(tmp_path / "a.safetensors", header, np.float32([1, 2]).tobytes())
    assert (tmp_path / "a.safetensors").read_bytes()[:2] == b"\x80\x02"
    np.testing.assert_array_equal(read_state_dict(tmp_path / "a.safetensors")["weight"], [1, 2])


@pytest.mark.parametrize(
    ("keys", "expected"),
    [
        (["model", "model_ema"], "model_ema"),
        (["state_dict", "state_dict_ema"], "state_dict_ema"),
        (["module", "model", "state_dict", "ema"], "ema"),
        (["module", "model", "state_dict"], "state_dict"),
        (["module", "model"], "model"),
        (["module"], "module"),
        (["ema", "model_ema", "state_dict_ema"], "state_dict_ema"),
    ],
)
def test_state_dict_is_found_under_the_first_key_of_the_order(tmp_path, keys, expected):
    content = {key: {"weight": torch.full((2,), float(i))} for i, key in enumerate(keys)}
    torch.save(content, tmp_path / "a.pth")
    read = read_state_dict(tmp_path / "a.pth")
    np.testing.assert_array_equal(read["weight"], [keys.index(expected)] * 2)


def test_keys_without_tensors_are_passed_over(tmp_path):
    content = {"model": "convnext_tiny", "ema": {"decay": 0.9}, "state_dict": {"a": torch.ones(1)}}
    torch.save(content, tmp_path / "a.pth")
    assert list(read_state_dict(tmp_path / "a.pth")) == ["a"]


def test_nested_state_dict_is_found(tmp_path):
    torch.save({"ema": {"module": {"a": torch.ones(1)}, "updates": 3}}, tmp_path / "a.pth")
    assert list(read_state_dict(tmp_path / "a.pth")) == ["a"]


def test_data_parallel_prefix_is_removed(tmp_path):
    model = torch.nn.DataParallel(torch.nn.Linear(2, 3))
    torch.save({"model": model.state_dict()}, tmp_path / "a.pth")
    assert list(read_state_dict(tmp_path / "a.pth")) == ["weight", "bias"]


def test_prefix_of_only_some_names_is_kept(tmp_path):
    torch.save({"module.a": torch.ones(1), "b": torch.ones(1)}, tmp_path / "a.pth")
    assert list(read_state_dict(tmp_path / "a.pth")) == ["module.a", "b"]


def test_parameters_read_as_their_values(tmp_path):
    layer = torch.nn.Linear(2, 3)
    layer.bias.note = "an attribute makes torch save the parameter's state"
    torch.save(dict(layer.named_parameters()), tmp_path / "a.pth")
    assert b"_rebuild_parameter_with_state" in (tmp_path / "a.pth").read_bytes()
    read = read_state_dict(tmp_path / "a.pth")
    assert_same(read["weight"], layer.weight)
    assert_same(read["bias"], layer.bias)


def test_training_checkpoint_reads_as_its_weights(tmp_path):
    model = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.LayerNorm(3))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    model(torch.ones(4, 2)).sum().backward()
    optimizer.step()
    schedule = torch.optim.lr_scheduler.MultiStepLR(optimizer, [3, 7])
    content = {
        "model": model.state_dict(),
        "optimizer": optimizer.state_dict(),
        "schedule": schedule.state_dict(),
        "epoch": 3,
        "args": argparse.Namespace(lr=0.1, size=(224, 224), name="tiny", device=torch.device("cpu")),
        "best": np.float32(81.5),
        "best64": np.float64(81.5),
        "history": np.arange(3.0),
        "seen": {1, 2},
        "dtype": torch.bfloat16,
        "shape": torch.ones(2, 3).size(),
        "large": 2**40,
    }
    torch.save(content, tmp_path / "a.pth")
    read = read_state_dict(tmp_path / "a.pth")
    assert list(read) == list(model.state_dict())
    for name, tensor in model.state_dict().items():
        assert_same(read[name], tensor)


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
@pytest.mark.parametrize("zipped", [True, False])
def test_common_python_objects_beside_the_weights_are_ignored(tmp_path, protocol, zipped):
    meta = [
        *(defaultdict(kind, {"a": kind()}) for kind in (list, int, dict, float, set, str, bool, tuple)),
        *(frozenset([1, (2, "a")]), 1 + 2j, range(3), slice(1, 2), deque([1]), bytearray(b"abc")),
        *(types.SimpleNamespace(a=1), torch.strided, 2**5000, -(2**3000)),
        *(Path("a/b"), PurePosixPath("a"), PureWindowsPath("c:/a"), {PurePosixPath("a"): 1}),
        *(np.arange(3.0), np.ones((2, 3), "int8").T, np.array(["a", "b"]), np.array([1, None]), np.int64(3)),
        {"random": np.random.get_state(), 1 + 2j: 1, range(2): 2},
    ]
    torch.save(
        {"model": {"a": torch.ones(2)}, "meta": meta},
        tmp_path / "a.pth",
        pickle_protocol=protocol,
        _use_new_zipfile_serialization=zipped,
    )
    assert {name: array.tolist() for name, array in read_state_dict(tmp_path / "a.pth").items()} == {
        "a": [1, 1]
    }


def test_numpy_1_names_of_scalars_are_read(tmp_path):
    torch.save({"model": {"a": torch.ones(1)}, "b": np.float32(2)}, tmp_path / "new.pth")
    with zipfile.ZipFile(tmp_path / "new.pth") as archive:
        program = archive.read("new/data.pkl")
        weights = archive.read("new/data/0")
    assert b"numpy._core.multiarray" in program
    program = program.replace(b"numpy._core.multiarray", b"numpy.core.multiarray")
    write_archive(tmp_path / "a.pth", program, [("data/0", weights)])
    assert list(read_state_dict(tmp_path / "a.pth")) == ["a"]


def test_transposed_sliced_and_expanded_tensors_are_views(tmp_path):
    base = torch.arange(24.0).reshape(4, 6)
    tensors = {
        "base": base,
        "transposed": base.T,
        "sliced": base[1:3, ::2],
        "expanded": base[0:1].expand(3, 6),
        "scalar": base[2, 3],
        "empty": base[4:],
        "channels_last": torch.rand(2, 3, 4, 5).to(memory_format=torch.channels_last),
    }
    torch.save(tensors, tmp_path / "a.pth")
    read = read_state_dict(tmp_path / "a.pth")
    for name, tensor in tensors.items():
        assert_same(read[name], tensor)
    assert read["transposed"].strides == (4, 24)
    assert read["channels_last"].strides == tuple(4 * s for s in tensors["channels_last"].stride())


def test_tensors_of_one_storage_share_memory(tmp_path):
    shared = torch.arange(6.0)
    torch.save({"a": shared, "b": shared[2:], "c": shared.clone()}, tmp_path / "a.pth")
    read = read_state_dict(tmp_path / "a.pth")
    assert np.shares_memory(read["a"], read["b"])
    assert not np.shares_memory(read["a"], read["c"])


@pytest.mark.parametrize("name", ["a.pth", "a.safetensors"])
def test_arrays_are_views_of_the_mapped_file(tmp_path, name):
    path = tmp_path / name
    tensors = {"weight": torch.full((1000,), 7.0)}
    if name == "a.pth":
        torch.save(tensors, path)
    else:
        safetensors.torch.save_file(tensors, path)
    weight = read_state_dict(path)["weight"]
    assert reaches_mmap(weight)
    assert not reaches_mmap(weight.copy())
    assert not weight.flags.writeable
    # A change in place shows through a view, and would not through a copy.
    position = path.read_bytes().index(np.full(1000, 7.0, "float32").tobytes())
    with open(path, "r+b") as file:
        file.seek(position)
        file.write(np.float32(9).tobytes())
    assert weight[0] == 9


@pytest.mark.parametrize("zipped", [True, False])
def test_reading_imports_nothing_and_looks_up_no_name(tmp_path, zipped):
    content = {"model": {"a": torch.ones(2)}, "args": argparse.Namespace(a=np.float32(1))}
    torch.save(content, tmp_path / "a.pth", _use_new_zipfile_serialization=zipped)
    code = (
        "import sys\n"
        "import keras_convnext_main\n"  # with which the package imports nothing by itself
        "from keras_convnext.weights import torch_files\n"
        "def refuse(event, arguments):\n"
        "    if event in ('import', 'exec', 'compile', 'pickle.find_class'): raise SystemExit(event)\n"
        "sys.addaudithook(refuse)\n"
        f"print(torch_files.read_state_dict({str(tmp_path / 'a.pth')!r})['a'].tolist())\n"
        "print([name for name in ('torch', 'keras', 'safetensors') if name in sys.modules])\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stdout.splitlines() == ["[1.0, 1.0]", "[]"], done.stderr


# Reading the form before PyTorch 1.6


@pytest.mark.parametrize("protocol", [2, 4])
@pytest.mark.parametrize("dtype_name", DTYPES)
def test_older_form_reads_bit_exact(tmp_path, dtype_name, protocol):
    rng = np.random.default_rng(0)
    tensors = {
        f"{shape}": as_tensor(random_array(rng, dtype_name, shape), dtype_name)
        for shape in ((), (5,), (2, 3, 4))
    }
    tensors["empty"] = tensors["(5,)"][5:]
    torch.save(tensors, tmp_path / "a.pth", _use_new_zipfile_serialization=False, pickle_protocol=protocol)
    read = read_state_dict(tmp_path / "a.pth")
    assert list(read) == list(tensors)
    for name, tensor in tensors.items():
        assert_same(read[name], tensor)
        assert reaches_mmap(read[name]) or name == "empty"


def test_older_form_keeps_views_tied_tensors_and_memory_orders(tmp_path):
    base = torch.arange(24.0).reshape(4, 6)
    tensors = {
        "base": base,
        "tied": base,
        "transposed": base.T,
        "sliced": base[1:3, ::2],
        "expanded": base[0:1].expand(3, 6),
        "scalar": base[2, 3],
        "channels_last": torch.rand(2, 3, 4, 5).to(memory_format=torch.channels_last),
        "parameter": torch.nn.Parameter(torch.rand(3)),
        "bytes": torch.arange(3, dtype=torch.uint8),  # after it nothing is aligned
        "after": torch.rand(7, dtype=torch.float64),
    }
    torch.save({"state_dict": tensors}, tmp_path / "a.pth", _use_new_zipfile_serialization=False)
    read = read_state_dict(tmp_path / "a.pth")
    for name, tensor in tensors.items():
        assert_same(read[name], tensor)
    assert read["transposed"].strides == (4, 24)
    assert np.shares_memory(read["base"], read["tied"]) and np.shares_memory(read["base"], read["sliced"])
    assert not np.shares_memory(read["base"], read["parameter"])


class Storage:
    """A storage as `LegacyPickler` writes it."""

    def __init__(self, kind, key, size, *view):
        self.identifier = ("storage", kind, key, "cpu", size, *view)


def legacy_bytes(content, storages, *, keys=None, version=1001, machine=None, counts=None):
    """A file of the older form; storages as {key: array}, written in the order of `keys`."""

    class LegacyPickler(pickle.Pickler):
        def persistent_id(self, value):
            return value.identifier if isinstance(value, Storage) else None

    stream = io.BytesIO()
    for value in (0x1950A86A20F9469CFC6C, version, {"little_endian": True} if machine is None else machine):
        pickle.dump(value, stream, 2)
    LegacyPickler(stream, 2).dump(content)
    keys = list(storages) if keys is None else keys
    pickle.dump(keys, stream, 2)
    for key in keys:
        if isinstance(key, str) and key in storages:
            stream.write(struct.pack("<q", (counts or {}).get(key, storages[key].size)))
            stream.write(storages[key].tobytes())
    return stream.getvalue()


class Rebuilt:
    """A tensor of a storage, as PyTorch pickles it."""

    def __init__(self, storage, offset=0, size=(4,), stride=(1,)):
        self.arguments = (storage, offset, size, stride, False, OrderedDict())

    def __reduce__(self):
        return torch._utils._rebuild_tensor_v2, self.arguments


FOUR = np.arange(4, dtype="float32")


def four(*view, size=4, kind=torch.FloatStorage, key="0"):
    return Storage(kind, key, size, *(view or (None,)))


def test_older_form_has_views_of_storages_in_any_order(tmp_path):
    large = np.arange(10, dtype="float32")
    content = {
        "whole": Rebuilt(four(size=10, key="b"), size=(10,)),
        "view": Rebuilt(four(("v", 3, 5), size=10, key="b"), 1, (2, 2), (2, 1)),
        "view_alone": Rebuilt(four(("w", 2, 2), key="a"), size=(2,)),
    }
    for keys in (["b", "a"], ["a", "b"]):
        (tmp_path / "a.pth").write_bytes(legacy_bytes(content, {"b": large, "a": FOUR}, keys=keys))
        read = read_state_dict(tmp_path / "a.pth")
        expected = torch.load(tmp_path / "a.pth", weights_only=True)
        for name, tensor in expected.items():
            assert_same(read[name], tensor)
        assert read["view"].tolist() == [[4, 5], [6, 7]]
        assert np.shares_memory(read["view"], read["whole"])


@pytest.mark.parametrize(
    ("content", "options", "message"),
    [
        (Rebuilt(four()), {"counts": {"0": 5}}, "expected 4 items in storage '0', received 5"),
        (Rebuilt(four()), {"counts": {"0": -1}}, "expected 4 items in storage '0', received -1"),
        (Rebuilt(four(size=8)), {}, "expected 8 items in storage '0', received 4"),
        (Rebuilt(four()), {"keys": []}, "list of storages"),
        (Rebuilt(four()), {"keys": ["0", "0"]}, "list of storages"),
        (Rebuilt(four()), {"keys": ["0", "1"]}, "list of storages"),
        (Rebuilt(four()), {"keys": [["0"]]}, "list of storages"),
        (Rebuilt(four()), {"keys": ("0",)}, "list of storages"),
        (Rebuilt(four()), {"version": 1000}, "protocol 1001"),
        (Rebuilt(four()), {"machine": {"little_endian": False}}, "little-endian machine"),
        (Rebuilt(four()), {"machine": []}, "little-endian machine"),
        (Rebuilt(four(), offset=1), {}, "needs 5 items, its storage has 4"),
        (Rebuilt(four(), stride=(-1,), offset=3), {}, "integers >= 0"),
        (Rebuilt(four(), size=(5,), stride=(2**62,)), {}, "its storage has 4"),
        (Rebuilt(four(("v", 2, 2)), size=(3,)), {}, "needs 3 items, its storage has 2"),
        (Rebuilt(four(("v", 2, 3)), size=(2,)), {}, "view that is not within"),
        (Rebuilt(four(("v", -1, 2)), size=(2,)), {}, "view that is not within"),
        (Rebuilt(four(("v", 5, -1)), size=(0,)), {}, "view that is not within"),
        (Rebuilt(four(("v", 0))), {}, "view that is not within"),
        (Rebuilt(four(None, None)), {}, "view that is not within"),
        ([Rebuilt(four()), Rebuilt(four(size=3))], {}, "in two ways"),
        ([Rebuilt(four()), Rebuilt(four(kind=torch.IntStorage))], {}, "in two ways"),
    ],
)
def test_older_form_that_does_not_fit_is_refused(tmp_path, content, options, message):
    tensors = dict(enumerate(content)) if isinstance(content, list) else {"a": content}
    (tmp_path / "a.pth").write_bytes(legacy_bytes({"model": {"b": Rebuilt(four()), **tensors}}, {"0": FOUR}))
    (tmp_path / "a.pth").write_bytes(legacy_bytes({"model": tensors}, {"0": FOUR}, **options))
    with pytest.raises(FileFormatError) as error:
        read_state_dict(tmp_path / "a.pth")
    assert message in str(error.value)


def test_older_form_must_end_where_its_storages_do(tmp_path):
    torch.save({"a": torch.rand(100)}, tmp_path / "a.pth", _use_new_zipfile_serialization=False)
    whole = (tmp_path / "a.pth").read_bytes()
    for kept in range(0, len(whole), 7):
        (tmp_path / "a.pth").write_bytes(whole[:kept])
        with pytest.raises(FileFormatError):
            read_state_dict(tmp_path / "a.pth")
    for content in (whole[:-1], whole + b"\0"):
        (tmp_path / "a.pth").write_bytes(content)
        expected = f"expected {len(whole)} bytes in all, received {len(content)}"
        with pytest.raises(FileFormatError, match=expected):
            read_state_dict(tmp_path / "a.pth")


def test_attack_in_any_pickle_of_the_older_form_is_refused(tmp_path):
    marker = tmp_path / "marker"

    class Evil:
        def __reduce__(self):
            return os.system, (f"touch {marker}",)

    for content, options in (
        ({"args": Evil()}, {}),
        ({"a": Rebuilt(four())}, {"version": Evil()}),
        ({"a": Rebuilt(four())}, {"machine": {"little_endian": Evil()}}),
        ({"a": Rebuilt(four())}, {"keys": [Evil()]}),
    ):
        (tmp_path / "a.pth").write_bytes(legacy_bytes(content, {"0": FOUR}, **options))
        with pytest.raises(UnsafeFileError, match=r"the global 'posix\.system'"):
            read_state_dict(tmp_path / "a.pth")
        assert not marker.exists()


@pytest.mark.parametrize("zipped", [True, False])
def test_checkpoint_of_mmengine_reads_as_its_weights(tmp_path, zipped, monkeypatch):
    class HistoryBuffer:
        """Pickles as that of mmengine does: arrays, and its own functions."""

        def __init__(self):
            self._log_history, self._max_length = np.arange(3.0), 1_000_000

        def __getstate__(self):
            return {**vars(self), "statistics_methods": {"min": HistoryBuffer.minimum}}

        def minimum(self):
            """Is pickled by `getattr`."""

    module = types.ModuleType("mmengine.logging.history_buffer")
    module.HistoryBuffer = HistoryBuffer
    HistoryBuffer.__module__, HistoryBuffer.__qualname__ = module.__name__, "HistoryBuffer"
    HistoryBuffer.minimum.__module__ = module.__name__
    HistoryBuffer.minimum.__qualname__ = "HistoryBuffer.minimum"
    for name in ("mmengine", "mmengine.logging"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    monkeypatch.setitem(sys.modules, module.__name__, module)
    layer = torch.nn.Linear(2, 3)
    content = {
        "meta": {
            "cfg": "model = dict(type='MaskRCNN')\n",
            "dataset_meta": {"CLASSES": ("person",), "PALETTE": [(220, 20, 60)]},
            "seed": 0,
            "time": "20260101_000000",
            "hook_msgs": {"best_score": np.float64(0.4)},
        },
        "state_dict": layer.state_dict(),
        "message_hub": {
            "log_scalars": OrderedDict(loss=HistoryBuffer()),
            "runtime_info": OrderedDict(epoch=1, loss=torch.ones(1), iter=np.int64(3)),
            "resumed_keys": OrderedDict(loss=True),
        },
        "optimizer": torch.optim.AdamW(layer.parameters()).state_dict(),
    }
    torch.save(content, tmp_path / "a.pth", _use_new_zipfile_serialization=zipped)
    assert b"getattr" in (tmp_path / "a.pth").read_bytes()
    read = read_state_dict(tmp_path / "a.pth")
    assert list(read) == ["weight", "bias"]
    assert_same(read["weight"], layer.weight)


# Refusing what is not a state dict


def pushed_text(text):
    encoded = text.encode()
    return b"X" + struct.pack("<I", len(encoded)) + encoded


def call(module, name, *arguments):
    """The opcodes that call module.name with texts, or with opcodes given as bytes."""
    pushed = b"".join(a if isinstance(a, bytes) else pushed_text(a) for a in arguments)
    return f"c{module}\n{name}\n".encode() + b"(" + pushed + b"tR"


def attacks(marker, script):
    """Opcodes that create the file `marker`, with the name that must be refused."""
    touch = f"touch {marker}"
    python = f"open({str(marker)!r}, 'w').close()"
    os_module = b"cposixpath\nos\n"
    get_system = call("builtins", "getattr", os_module, "system")
    popen_arguments = b"(" + pushed_text("touch") + pushed_text(str(marker)) + b"l"
    return {
        "os": ("os.system", call("os", "system", touch)),
        "posix": ("posix.system", call("posix", "system", touch)),
        "eval": ("builtins.eval", call("builtins", "eval", f"open({str(marker)!r}, 'w')")),
        "exec": ("builtins.exec", call("builtins", "exec", python)),
        "python 2 name": ("__builtin__.eval", call("__builtin__", "eval", f"open('{marker}','w')")),
        "getattr": ("builtins.getattr", get_system + b"(" + pushed_text(touch) + b"tR"),
        "popen": ("subprocess.call", call("subprocess", "call", popen_arguments)),
        "runpy": ("runpy.run_path", call("runpy", "run_path", str(script))),
        "open": ("io.open", call("io", "open", str(marker), "w")),
        "torch": ("torch.serialization.os.system", call("torch.serialization", "os.system", touch)),
        "ordered dict": (
            "os.system",
            b"ccollections\nOrderedDict\n(((" + pushed_text("a") + call("os", "system", touch) + b"tltR",
        ),
        "state of a namespace": (
            "os.system",
            b"cargparse\nNamespace\n)\x81}" + pushed_text("a") + call("os", "system", touch) + b"sb",
        ),
        "new object": (
            "subprocess.Popen",
            b"csubprocess\nPopen\n(" + popen_arguments + b"t\x81",
        ),
        "stack global": (
            "os.system",
            pushed_text("os") + pushed_text("system") + b"\x93(" + pushed_text(touch) + b"tR",
        ),
        "instance": ("INST", b"(" + pushed_text(touch) + b"ios\nsystem\n"),
        "object": ("os.system", b"(cos\nsystem\n" + pushed_text(touch) + b"o"),
        "extension of 1 byte": ("EXT1", b"\x82\xf0(" + pushed_text(touch) + b"tR"),
        "extension of 2 bytes": ("EXT2", b"\x83\xf0\xf0(" + pushed_text(touch) + b"tR"),
        "extension of 4 bytes": ("EXT4", b"\x84\xf0\xf0\xf0\x70(" + pushed_text(touch) + b"tR"),
    }


def within(opcodes, place, protocol=4):
    start = b"\x80" + bytes([protocol])
    if place == "alone":
        return start + opcodes + b"."
    if place == "args":
        return start + b"}(" + pushed_text("args") + opcodes + b"u."
    return start + b"}(" + pushed_text("model") + b"}(" + pushed_text("a") + opcodes + b"uu."


@pytest.fixture
def extension():
    """An extension code of each length as a name for os.system, in the cache that unpicklers trust."""
    for code, name in EXTENSIONS.items():
        copyreg.add_extension("os", name, code)
        copyreg._extension_cache[code] = os.system
    yield
    for code, name in EXTENSIONS.items():
        copyreg.remove_extension("os", name, code)
        copyreg._extension_cache.pop(code, None)


EXTENSIONS = {0xF0: "system", 0xF0F0: "system_2", 0x70F0F0F0: "system_4"}


@pytest.mark.parametrize("place", ["alone", "args", "model"])
@pytest.mark.parametrize("attack", attacks("", ""))
def test_malicious_pickle_is_refused_and_does_nothing(tmp_path, extension, attack, place):
    marker, script = tmp_path / "marker", tmp_path / "script.py"
    script.write_text(f"open({str(marker)!r}, 'w').close()")
    name, opcodes = attacks(marker, script)[attack]
    # Unpicklers resolve dotted names from protocol 4 on, and Python 2 names up to protocol 2.
    program = within(opcodes, place, protocol=2 if attack == "python 2 name" else 4)
    if attack != "new object" and place == "alone":
        # The control: an unpickler does run it. (Popen itself would not wait for its child.)
        result = pickle.loads(program)
        if isinstance(result, io.IOBase):
            result.close()
        assert marker.exists()
        marker.unlink()
    write_archive(tmp_path / "evil.pth", program)
    with pytest.raises(UnsafeFileError, match="Refused to read") as error:
        read_state_dict(tmp_path / "evil.pth")
    assert name in str(error.value)
    assert "Nothing in it was executed" in str(error.value)
    assert not marker.exists()


def test_torch_load_inside_a_pickle_is_refused(tmp_path):
    write_archive(tmp_path / "a.pth", within(call("torch", "load", "b.pth"), "args"))
    with pytest.raises(UnsafeFileError, match=r"the global 'torch\.load'"):
        read_state_dict(tmp_path / "a.pth")


def test_object_saved_by_torch_save_with_a_reduce_is_refused(tmp_path):
    marker = tmp_path / "marker"

    class Evil:
        def __reduce__(self):
            return os.system, (f"touch {marker}",)

    torch.save({"model": {"a": torch.ones(1)}, "args": Evil()}, tmp_path / "a.pth")
    with pytest.raises(UnsafeFileError, match=r"the global 'posix\.system'"):
        read_state_dict(tmp_path / "a.pth")
    assert not marker.exists()
    torch.load(tmp_path / "a.pth", weights_only=False)
    assert marker.exists()


def test_state_of_a_placeholder_is_dropped(tmp_path):
    opcodes = b"cargparse\nNamespace\n)\x81}(" + pushed_text("__class__") + b"K\x01"
    opcodes += pushed_text("__setstate__") + b"K\x02ub"
    program = b"\x80\x02}(" + pushed_text("args") + opcodes
    program += pushed_text("model") + tensor_program()[2:-1] + b"u."
    before = state_of_the_module()
    write_archive(tmp_path / "a.pth", program, [("data/0", bytes(16))])
    assert list(read_state_dict(tmp_path / "a.pth")) == ["weight"]
    assert state_of_the_module() == before


def state_of_the_module():
    """All that a pickle could change in the module that runs it, down to the code of its functions."""
    found = {}

    def look(path, value, depth=0):
        if isinstance(value, types.FunctionType):
            names = ("__code__", "__defaults__", "__kwdefaults__", "__globals__", "__closure__")
            found[path] = (id(value), repr(vars(value)), *(id(getattr(value, name)) for name in names))
        elif isinstance(value, type) and depth < 2:
            found[path] = (id(value), value.__bases__, sorted(vars(value)))
            for name, attribute in vars(value).items():
                look(f"{path}.{name}", getattr(attribute, "__func__", attribute), depth + 1)
        elif isinstance(value, torch_pickles._Name):
            found[path] = (id(value), value.name)
        elif isinstance(value, dict):
            found[path] = (id(value), len(value))
            for name, item in value.items():
                if path != "__builtins__":
                    look(f"{path}[{name!r}]", item, depth + 1)
        else:
            found[path] = (id(value), str(value) if isinstance(value, frozenset | int | str | tuple) else "")

    for name, value in vars(torch_pickles).items():
        look(name, value)
    found["dtypes"] = {name: (id(dtype), dtype.str) for name, dtype in torch_files.TORCH_DTYPES.items()}
    return found


@pytest.mark.parametrize("name", torch_pickles._NAMES)
def test_no_operation_on_a_name_changes_anything(tmp_path, name):
    module, _, attribute = name.rpartition(".")
    pushed = f"c{module}\n{attribute}\n".encode()
    slots = ("name", "__call__", "__class__", "__code__", "__defaults__", "__dict__", "append", "extra")
    attributes = b"}(" + b"".join(pushed_text(slot) + b"K\x07" for slot in slots) + b"u"
    objects = [pushed, pushed + b")R", pushed + b")\x81", pushed + b"(" + pushed_text("os") + b"K\1}tR"]
    operations = [
        attributes + b"b",
        b"N" + attributes + b"\x86b",  # a state of slots
        b"}" + attributes + b"\x86b",
        b"K\1a",
        b"(K\1K\2e",
        pushed_text("name") + b"K\1s",
        b"(" + pushed_text("__call__") + b"K\1u",
        b"(K\1\x90",
        b")R",
        b")\x81",
        attributes + b"\x85R",
        b"Q",
    ]
    before = state_of_the_module()
    for made in objects:
        for operation in operations:
            write_archive(tmp_path / "a.pth", b"\x80\x02" + made + operation + b".")
            with pytest.raises(FileFormatError):
                read_state_dict(tmp_path / "a.pth")
    assert state_of_the_module() == before


@pytest.mark.parametrize(
    ("module", "name"),
    [
        ("torch", "_utils._rebuild_tensor_v2"),
        ("collections", "OrderedDict.__init__"),
        ("collections.OrderedDict", ""),
        ("", "collections.OrderedDict"),
        ("torch.Size", "__class__"),
        ("builtins", "set.__subclasses__"),
        ("keras_convnext.weights.torch_pickles", "_NAMES"),
        ("argparse", "_os.system"),
        ("argparse\x00", "Namespace"),
        ("torch ", "Size"),
        ("numpy", "dtype\n"),
        ("numpy.core.multiarray", "scalar.__globals__"),
    ],
)
def test_forged_names_are_refused(tmp_path, module, name):
    opcodes = pushed_text(module) + pushed_text(name) + b"\x93"
    write_archive(tmp_path / "a.pth", within(opcodes, "args"))
    with pytest.raises(UnsafeFileError, match="asks for the global"):
        read_state_dict(tmp_path / "a.pth")


@pytest.mark.parametrize(
    ("opcodes", "message"),
    [
        (b"ctorch\nfloat32\n}b", "sets a state"),
        (b"ccollections\nOrderedDict\n}b", "sets a state"),
        (b"ccollections\nOrderedDict\n(]tR", "with 1 arguments that do not fit"),
        (b"ctorch\nfloat32\n)R", "'torch.float32' with 0 arguments"),
        (b"K\x01)R", "not callable"),
        (b"ctorch\nSize\n((J\xff\xff\xff\xffttR", "'torch.Size'"),
        (b"ctorch._utils\n_rebuild_parameter\n(}\x89}tR", "'torch._utils._rebuild_parameter'"),
        (b"X\x01\0\0\0aQ", "'storage', type, key, location, size"),
        (b"(X\x06\0\0\0stored" + b"ctorch\nFloatStorage\nX\x01\0\0\0" + b"0NK\x04tQ", "'storage'"),
        (b"(X\x07\0\0\0storage" + b"ctorch\nfloat32\nX\x01\0\0\0" + b"0NK\x04tQ", "'storage', type"),
        (b"(X\x07\0\0\0storage" + b"ctorch\nFloatStorage\nX\x01\0\0\0" + b"9NK\x04tQ", "missing"),
        (b"K\x01K\x02a", "malformed"),
        (b"K\x01K\x02K\x03s", "malformed"),
        (b"}(K\x01u", "odd number"),
        (b"h\x07", "malformed"),
        (b"t", "malformed"),
        (b"\x87", "stack underflow"),
        (b"K\x01K\x02\x93", "requires str"),
        (b"\x8c\xff", "malformed"),
        (b"\xff", "malformed"),
    ],
)
def test_malformed_pickle_is_refused(tmp_path, opcodes, message):
    write_archive(tmp_path / "a.pth", b"\x80\x02" + opcodes + b".", [("data/0", bytes(16))])
    with pytest.raises(FileFormatError) as error:
        read_state_dict(tmp_path / "a.pth")
    assert message in str(error.value)


def test_pickle_without_end_is_refused(tmp_path):
    write_archive(tmp_path / "a.pth", b"\x80\x02}")
    with pytest.raises(FileFormatError, match=r"malformed|no end"):
        read_state_dict(tmp_path / "a.pth")


def test_persistent_id_as_text_is_refused(tmp_path):
    write_archive(tmp_path / "a.pth", b"\x80\x02Pstorage\n.")
    with pytest.raises(UnsafeFileError, match="the opcode PERSID at byte 2"):
        read_state_dict(tmp_path / "a.pth")


def test_hostile_nesting_and_cycles_are_read_in_bounded_depth(tmp_path):
    tuples = b"\x80\x02}(" + pushed_text("a") + b")" + b"\x85" * 100_000 + pushed_text("b") + b"Nu."
    lists = b"\x80\x02" + b"]" * 100_000 + b"a" * 99_999 + b"."
    marks = b"\x80\x02" + b"(" * 100_000 + b"t" * 100_000 + b"."
    dictionaries = b"\x80\x02" + (b"ccollections\nOrderedDict\n)R" + pushed_text("model")) * 10_000 + b"N"
    dictionaries += b"s" * 10_000 + b"."
    cyclic = b"\x80\x02}q\1(" + b"".join(pushed_text(key) + b"h\1" for key in ("model", "ema")) + b"u."
    doubled = b"\x80\x02)" + b"q\0h\0\x86" * 1000 + b"."
    for program in (tuples, lists, marks, dictionaries, cyclic, doubled):
        write_archive(tmp_path / "a.pth", program)
        with pytest.raises(FileFormatError, match="expected a dictionary of tensors"):
            read_state_dict(tmp_path / "a.pth")


@pytest.mark.parametrize("store", [b"Ns", b"(h\x01Nu", b"0"])
def test_nested_tuples_are_refused_as_keys(tmp_path, store):
    deep = b"}" + b")" + b"\x85" * 100_000
    wide = b"})" + b"q\0h\0\x86" * 100  # its hash takes 2^100 steps
    for key in (deep, wide):
        program = b"\x80\x02" + key + b"Ns."
        if store == b"(h\x01Nu":
            program = b"\x80\x02" + key[1:] + b"q\x01}(h\x01Nu."
        if store == b"0":
            program = b"\x80\x04" + key[1:] + b"q\x01\x8f(h\x01\x90."
        write_archive(tmp_path / "a.pth", program)
        with pytest.raises(FileFormatError, match="nested tuple as a key"):
            read_state_dict(tmp_path / "a.pth")


def test_flat_tuples_are_read_as_keys(tmp_path):
    torch.save({"model": {"a": torch.ones(1)}, "ranges": {(0, 1): 2, 3: 4, None: 5}}, tmp_path / "a.pth")
    assert list(read_state_dict(tmp_path / "a.pth")) == ["a"]


@pytest.mark.parametrize("index", [b"\x05\0\0\0", b"\0\0\0\x80", b"\xff\xff\xff\xff"])
def test_memo_index_beyond_the_program_is_refused(tmp_path, index):
    write_archive(tmp_path / "a.pth", b"\x80\x02}r" + index + b"j" + index + b".")
    with pytest.raises(FileFormatError, match="memo index"):
        read_state_dict(tmp_path / "a.pth")


def test_program_of_too_many_opcodes_is_refused(tmp_path, monkeypatch):
    torch.save({"a": torch.ones(1)}, tmp_path / "a.pth")
    assert list(read_state_dict(tmp_path / "a.pth")) == ["a"]
    monkeypatch.setattr(torch_pickles, "_MAX_OPCODES", 20)
    with pytest.raises(FileFormatError, match="more than 20 opcodes"):
        read_state_dict(tmp_path / "a.pth")


def test_attacks_on_memory_stay_below_one_gigabyte(tmp_path):
    million = 2**20
    bodies = {
        "sets": b"(" + b"\x8f" * 900_000 + b"l",
        "too many": b"(" + b"}" * 15 * million + b"t",
        "storages": b"(" + pushed_text("storage") + b"ctorch\nFloatStorage\n" + pushed_text("0") + b"NK\1tq\0"
        + b"h\0Q" * 400_000,
        "memo": b"}" + b"r\xff\xff\xff\x7f",
        "long text": b"X\xff\xff\xff\x7fabc",
        "long text of 8 bytes": b"\x8d" + b"\xff" * 7 + b"\x7fabc",
        "long bytes": b"B\xff\xff\xff\xffabc",
        "long bytes of 8 bytes": b"\x8e" + b"\xff" * 7 + b"\x7fabc",
        "long array of bytes": b"\x96" + b"\xff" * 7 + b"\x7fabc",
        "long number": b"\x8b\xff\xff\xff\x7fabc",
        "large number": b"\x8b" + struct.pack("<i", 15 * million) + b"\x7f" * 15 * million,
        "frame": b"\x95" + b"\xff" * 7 + b"\x7f}",
        "copies": b"}" + b"2" * 15 * million,
        "one text in many keys": b"X" + struct.pack("<I", 10 * million) + b"a" * 10 * million
        + b"q\0}(" + b"(" + b"h\0" * 300_000 + b"tNu",
        "zero sizes": tensor_program(size=(0, 2**40, 2**20), stride=(1, 1, 1))[2:-1],
        "expanded": tensor_program(size=(2**62,), stride=(0,))[2:-1],
    }  # fmt: skip
    for name, body in bodies.items():
        write_archive(tmp_path / f"{name}.pth", b"\x80\x04" + body + b".", [("data/0", bytes(16))])
    big = tmp_path / "storage.pth"
    torch.save({"a": torch.ones(1)}, big, _use_new_zipfile_serialization=False)
    big.write_bytes(big.read_bytes().replace(struct.pack("<q", 1), struct.pack("<q", 2**62)))
    code = (
        "import pathlib, resource, sys\n"
        "resource.setrlimit(resource.RLIMIT_AS, (2**30, 2**30))\n"
        "import keras_convnext_main\n"
        "from keras_convnext.weights import torch_files\n"
        "for path in sorted(pathlib.Path(sys.argv[1]).iterdir()):\n"
        "    try: arrays = torch_files.read_state_dict(path)\n"
        "    except ValueError as error: print(path.name, type(error).__name__, len(str(error)) < 2000)\n"
        "    else: print(path.name, [array.nbytes for array in arrays.values()])\n"
    )
    environment = {**os.environ, "OPENBLAS_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", code, tmp_path], capture_output=True, text=True, check=False, env=environment
    )
    lines = done.stdout.splitlines()
    assert len(lines) == len(bodies) + 1, done.stdout + done.stderr
    assert all(line.endswith(("FileFormatError True", "UnsafeFileError True", "[0]")) or "expanded" in line
               for line in lines), done.stdout  # fmt: skip
    assert len(os.listdir(tmp_path)) == len(bodies) + 1, "something was created"


def test_attacks_on_time_are_refused_in_linear_time(tmp_path):
    uses = 100_000
    long_tuple = b"(" + b"N" * 200_000 + b"tq\0"
    twins = [b"X" + struct.pack("<I", 2**22) + b"a" * 2**22 + memo for memo in (b"q\0", b"q\1")]
    storage = b"(" + pushed_text("storage") + b"ctorch\nFloatStorage\n%bNK\1tq%bQ"
    multiples = b"".join(b"\x8a\x0b" + (k * (2**61 - 1)).to_bytes(11, "little") for k in range(1, uses))
    bodies = {
        "tuple as a key": long_tuple + b"}(" + b"h\0N" * uses + b"u",
        "tuple in a set": long_tuple + b"\x8f(" + b"h\0" * uses + b"\x90",
        "tuple in a frozen set": long_tuple + b"(" + b"h\0" * uses + b"\x91",
        "arguments": long_tuple + b"(cargparse\nNamespace\nq\1" + b"h\1h\0R" * uses + b"l",
        "arguments of a new object": long_tuple + b"(cargparse\nNamespace\nq\1" + b"h\1h\0\x81" * uses + b"t",
        "numbers of one hash": b"\x8f(" + multiples + b"\x90",
        "numbers": b"\x8f(" + b"".join(b"J" + struct.pack("<i", k) for k in range(uses)) + b"\x90",
        "texts of one value": twins[0] + twins[1] + b"}(h\0N" + b"h\1N" * uses + b"u",
        "keys of storages": storage % (twins[0], b"\3") + storage % (twins[1], b"\4") + b"h\4Q" * uses,
    }
    for name, body in bodies.items():
        write_archive(tmp_path / f"{name}.pth", b"\x80\x04" + body + b".")
    code = (
        "import pathlib, resource, sys\n"
        "import keras_convnext_main\n"
        "from keras_convnext.weights import torch_files\n"
        "resource.setrlimit(resource.RLIMIT_CPU, (40, 40))\n"  # of the processor, whatever else it does
        "for path in map(pathlib.Path, sys.argv[1:]):\n"
        "    try: torch_files.read_state_dict(path)\n"
        "    except ValueError as error: print(path.stem, type(error).__name__, flush=True)\n"
    )
    paths = [tmp_path / f"{name}.pth" for name in bodies]
    done = subprocess.run([sys.executable, "-c", code, *paths], capture_output=True, text=True, check=False)
    assert done.stdout.splitlines() == [f"{name} FileFormatError" for name in bodies], done.stderr


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ([*range(2**15 + 1)], "more than 32768 numbers as keys"),
        ([float(k) for k in range(2**15 + 1)], "more than 32768 numbers as keys"),
        ([(k, 1) for k in range(3300)], "more than 32768 numbers as keys"),
        ([2**60], "a large number"),
        ([-(2**60)], "a large number"),
        ([(1, 2**60)], "a large number"),
    ],
)
def test_keys_that_could_meet_in_a_table_are_few_and_small(tmp_path, keys, message):
    torch.save({"a": torch.ones(1), "b": dict.fromkeys(keys)}, tmp_path / "a.pth")
    with pytest.raises(FileFormatError, match=message):
        read_state_dict(tmp_path / "a.pth")


def test_names_of_all_classes_are_read(tmp_path):
    names = {number: f"class {number}" for number in range(21_843)}
    other = {text: number for number, text in names.items()}
    torch.save({"a": torch.ones(1), "b": names, "c": other, "d": {2**60 - 1: 0.5}}, tmp_path / "a.pth")
    assert list(read_state_dict(tmp_path / "a.pth")) == ["a"]


def test_too_large_pickle_is_refused(tmp_path, monkeypatch):
    torch.save({"a": torch.ones(1)}, tmp_path / "a.pth")
    assert list(read_state_dict(tmp_path / "a.pth")) == ["a"]
    monkeypatch.setattr(torch_files, "_MAX_PICKLE_BYTES", 100)
    with pytest.raises(FileFormatError, match=r"data\.pkl of at most 100 bytes"):
        read_state_dict(tmp_path / "a.pth")


# Refusing damaged and foreign .pth files


@pytest.mark.parametrize(
    ("description", "message"),
    [
        ({"size": (5,)}, "needs 5 items, its storage has 4"),
        ({"offset": 1}, "needs 5 items, its storage has 4"),
        ({"stride": (2,)}, "needs 7 items, its storage has 4"),
        ({"size": (2, 2), "stride": (3, 1)}, "needs 5 items, its storage has 4"),
        ({"size": (), "stride": (), "offset": 4}, "needs 5 items, its storage has 4"),
        ({"stride": (2**62,)}, "its storage has 4"),
        ({"offset": -1}, "integers >= 0"),
        ({"stride": (-1,), "offset": 3}, "integers >= 0"),
        ({"size": (-4,)}, "integers >= 0"),
        ({"size": (True,)}, "integers >= 0"),
        ({"stride": (1, 1)}, "integers >= 0"),
        ({"size": [4]}, "integers >= 0"),
        ({"size": (2**70,), "stride": (0,)}, "integers >= 0"),
        ({"size": (1,) * 65, "stride": (1,) * 65}, "integers >= 0"),
        ({"size": (2**62,) * 3, "stride": (0,) * 3}, "malformed"),
        ({"size": (0, 2**62, 2**62), "stride": (1, 1, 1)}, "malformed"),
        ({"storage_size": 5}, "expected 20 bytes in storage '0', received 16"),
        ({"storage_size": -1}, "as a storage"),
        ({"storage": "DoubleStorage"}, "expected 32 bytes in storage '0', received 16"),
    ],
)
def test_tensor_outside_of_its_storage_is_refused(tmp_path, description, message):
    members = [("data/0", np.arange(4, dtype="float32").tobytes()), ("data/1", bytes(1000))]
    write_archive(tmp_path / "good.pth", tensor_program(), members)
    np.testing.assert_array_equal(read_state_dict(tmp_path / "good.pth")["weight"], range(4))
    write_archive(tmp_path / "a.pth", tensor_program(**description), members)
    with pytest.raises(FileFormatError) as error:
        read_state_dict(tmp_path / "a.pth")
    assert message in str(error.value)


def test_bare_pickle_and_tar_form_are_refused_by_name(tmp_path):
    (tmp_path / "a.pth").write_bytes(pickle.dumps({"a": np.ones(3)}))
    with pytest.raises(FileFormatError, match=r"bare pickle, not a file of torch\.save.*\.safetensors"):
        read_state_dict(tmp_path / "a.pth")
    with tarfile.open(tmp_path / "a.pth", "w") as archive:  # as of version 0.1.9
        for name in ("sys_info", "pickle", "tensors", "storages"):
            archive.addfile(tarfile.TarInfo(name))
    with pytest.raises(FileFormatError, match=r"tar archive, as PyTorch wrote before version 0\.1\.10"):
        read_state_dict(tmp_path / "a.pth")


def test_index_of_too_many_members_is_refused_before_it_is_parsed(tmp_path, monkeypatch):
    write_archive(tmp_path / "a.pth", tensor_program(), [("data/0", bytes(16))])
    content = (tmp_path / "a.pth").read_bytes()
    begin, end = content.index(b"PK\1\2"), content.rindex(b"PK\5\6")
    index = content[begin:end] + (b"PK\1\2" + bytes(42)) * 100_000
    monkeypatch.setattr(zipfile, "ZipInfo", None)  # of which it makes one for each member
    record = struct.pack("<4s4H2LH", b"PK\5\6", 0, 0, 1, 1, len(index), begin, 0)
    large = struct.pack("<4sQ2H2L4Q", b"PK\6\6", 44, 45, 45, 0, 0, 1, 1, len(index), begin)
    large += struct.pack("<4sLQL", b"PK\6\7", 0, begin + len(index), 1)
    large += struct.pack("<4s4H2LH", b"PK\5\6", 0, 0, 1, 1, 2**32 - 1, 2**32 - 1, 0)
    for tail in (record, large):
        (tmp_path / "a.pth").write_bytes(content[:begin] + index + tail)
        with pytest.raises(FileFormatError, match=f"4194304 bytes of index, received {len(index)}"):
            read_state_dict(tmp_path / "a.pth")


def test_archive_of_many_members_is_read(tmp_path):
    write_torch(tmp_path / "a.pth", {f"{n}": np.ones(1, "int8") for n in range(10_000)})
    assert len(read_state_dict(tmp_path / "a.pth")) == 10_000


def test_zip_members_that_overlap_are_refused(tmp_path):
    write_archive(tmp_path / "a.pth", tensor_program(), [("data/0", bytes(16)), ("data/1", bytes(16))])
    content = bytearray((tmp_path / "a.pth").read_bytes())
    # In the index of the archive (46 bytes, then the name): where the last member lies, from the one before.
    second = content.rindex(b"archive/data/1") - 46
    first = content.rindex(b"archive/data/0") - 46
    offset = struct.unpack_from("<I", content, first + 42)[0]
    for begin in (offset, offset + 8):
        struct.pack_into("<I", content, second + 42, begin)
        (tmp_path / "a.pth").write_bytes(content)
        with pytest.raises(FileFormatError, match=r"'archive/data/1' overlaps another one|a zip header for"):
            read_state_dict(tmp_path / "a.pth")


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_torchscript_is_refused(tmp_path):
    torch.jit.save(torch.jit.script(torch.nn.Linear(2, 3)), tmp_path / "a.pt")
    with pytest.raises(FileFormatError, match="TorchScript archive"):
        read_state_dict(tmp_path / "a.pt")


def test_compressed_archive_is_refused(tmp_path):
    members = [("data/0", bytes(16))]
    write_archive(tmp_path / "a.pth", tensor_program(), members, zipfile.ZIP_DEFLATED)
    with pytest.raises(FileFormatError, match=r"uncompressed.*'archive/data\.pkl'.*zip -0"):
        read_state_dict(tmp_path / "a.pth")


def test_zip_archive_of_something_else_is_refused(tmp_path):
    with zipfile.ZipFile(tmp_path / "a.pth", "w") as archive:
        archive.writestr("photo.jpg", b"")
    with pytest.raises(FileFormatError, match=r"one with 0; its first members are \['photo\.jpg'\]"):
        read_state_dict(tmp_path / "a.pth")


@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_zip_archive_with_a_repeated_member_is_refused(tmp_path):
    members = [("data/0", bytes(16)), ("data/0", bytes(16))]
    write_archive(tmp_path / "a.pth", tensor_program(), members)
    with pytest.raises(FileFormatError, match="two members of one name"):
        read_state_dict(tmp_path / "a.pth")


def test_big_endian_file_is_refused(tmp_path):
    write_archive(tmp_path / "a.pth", tensor_program(), [("data/0", bytes(16))])
    content = (tmp_path / "a.pth").read_bytes()
    (tmp_path / "a.pth").write_bytes(content.replace(b"little", b"big   "))
    with pytest.raises(FileFormatError, match="byte order b'little', received b'big   '"):
        read_state_dict(tmp_path / "a.pth")


def test_lazily_conjugated_tensor_is_refused(tmp_path):
    torch.save({"a": torch.ones(2, dtype=torch.complex64).conj()}, tmp_path / "a.pth")
    with pytest.raises(FileFormatError, match="lazy flags"):
        read_state_dict(tmp_path / "a.pth")


@pytest.mark.parametrize("kept", [0.1, 0.5, 0.9, 0.999])
def test_truncated_pth_is_refused(tmp_path, kept):
    torch.save({"a": torch.rand(1000)}, tmp_path / "a.pth")
    content = (tmp_path / "a.pth").read_bytes()
    (tmp_path / "a.pth").write_bytes(content[: int(len(content) * kept)])
    with pytest.raises(FileFormatError, match=r"no valid index.*download or save it again"):
        read_state_dict(tmp_path / "a.pth")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", r"it is empty \(0 bytes\)"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "Git LFS pointer.*git lfs"),
        (b"<!DOCTYPE html><html>Not found</html>", "web page"),
        (b"\n<html><head>", "web page"),
        (b"some notes on weights", r"expected a \.pth or .*b'some notes on we'"),
        (b"abc", "starts with b'abc'"),
    ],
)
def test_file_that_is_not_weights_is_refused(tmp_path, content, message):
    (tmp_path / "a.pth").write_bytes(content)
    with pytest.raises(FileFormatError, match=message):
        read_state_dict(tmp_path / "a.pth")


def test_missing_file_and_directory_are_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"gone\.pth"):
        read_state_dict(tmp_path / "gone.pth")
    with pytest.raises(IsADirectoryError):
        read_state_dict(tmp_path)


@pytest.mark.parametrize(
    ("content", "received"),
    [
        ([torch.ones(1)], "received a list"),
        (torch.ones(1), "received a Tensor"),
        ({"epoch": 3, "weights": {"a": torch.ones(1)}}, r"the keys \['epoch', 'weights'\]"),
    ],
)
def test_file_without_a_state_dict_is_refused(tmp_path, content, received):
    torch.save(content, tmp_path / "a.pth")
    with pytest.raises(FileFormatError, match=f"{received}.*Save the state dict"):
        read_state_dict(tmp_path / "a.pth")


@pytest.mark.parametrize("name", ["a.pth", "a.safetensors", "legacy.pth"])
def test_damaged_bytes_give_arrays_or_our_errors_only(tmp_path, name):
    rng = np.random.default_rng(0)
    path = tmp_path / name
    tensors = {"a": torch.rand(3, 2), "b": torch.ones(4, dtype=torch.bfloat16)}
    if name != "a.safetensors":
        content = {"model": OrderedDict(tensors), "args": argparse.Namespace(a=1)}
        torch.save(content, path, _use_new_zipfile_serialization=name == "a.pth")
    else:
        safetensors.torch.save_file(tensors, path)
    content = path.read_bytes()
    refused = 0
    for _ in range(600):
        damaged = bytearray(content)
        for position in rng.integers(0, len(content), rng.integers(1, 6)):
            damaged[position] = rng.integers(256)
        path.write_bytes(damaged)
        try:
            for array in read_state_dict(path).values():
                array.tobytes()
        except (FileFormatError, UnsafeFileError):
            refused += 1
    assert 50 < refused < 600


# Reading .safetensors files


@pytest.mark.parametrize("dtype_name", SAFETENSORS_DTYPES)
@pytest.mark.parametrize("shape", [(), (5,), (2, 0, 3), (2, 3, 4)])
def test_file_of_the_safetensors_library_reads_bit_exact(tmp_path, dtype_name, shape):
    array = random_array(np.random.default_rng(1), dtype_name, shape)
    path = tmp_path / "a.safetensors"
    if dtype_name.endswith("fnuz"):
        code = {"float8_e4m3fnuz": "F8_E4M3FNUZ", "float8_e5m2fnuz": "F8_E5M2FNUZ"}[dtype_name]
        header = {"weight": entry(code, shape, (0, array.nbytes))}
        write_raw_safetensors(path, header, array.tobytes())
    else:
        tensor = torch.empty(shape, dtype=getattr(torch, dtype_name))
        if array.size:
            tensor = as_tensor(array, dtype_name)
        safetensors.torch.save_file({"weight": tensor}, path)
    assert_bits_equal(read_state_dict(path)["weight"], array)


def test_metadata_of_the_safetensors_library_is_read(tmp_path):
    path = tmp_path / "a.safetensors"
    safetensors.torch.save_file({"a": torch.ones(1)}, path, {"format": "pt", "note": "é"})
    assert read_safetensors_metadata(path) == {"format": "pt", "note": "é"}
    safetensors.torch.save_file({"a": torch.ones(1)}, path)
    assert read_safetensors_metadata(path) == {}


def test_metadata_of_a_pth_file_is_refused(tmp_path):
    torch.save({"a": torch.ones(1)}, tmp_path / "a.pth")
    with pytest.raises(FileFormatError, match=r"expected a \.safetensors file"):
        read_safetensors_metadata(tmp_path / "a.pth")


def test_unpadded_safetensors_header_is_read(tmp_path):
    header = b'{"weight":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}'
    assert len(header) % 4
    data = np.float32([1.5, -2]).tobytes()
    write_raw_safetensors(tmp_path / "a.safetensors", header, data)
    np.testing.assert_array_equal(read_state_dict(tmp_path / "a.safetensors")["weight"], [1.5, -2])


@pytest.mark.parametrize(
    ("header", "data_bytes", "message"),
    [
        ({"a": entry()}, 7, "in all, received"),
        ({"a": entry()}, 9, "in all, received"),
        ({"a": entry(shape=[3])}, 8, "expected 12 bytes for 'a' (F32, shape [3])"),
        ({"a": entry("F64")}, 8, "expected 16 bytes for 'a' (F64, shape [2])"),
        (
            {"a": entry(), "b": entry(offsets=[4, 12])},
            12,
            "'b' begins at byte 4 of the data and ov",
        ),
        ({"a": entry(), "b": entry()}, 8, "overlaps another one"),
        ({"a": entry(), "b": entry(offsets=[12, 20])}, 20, "no tensor covers bytes 8 to 12"),
        ({"a": entry(offsets=[8, 0])}, 8, "expected [begin, end]"),
        ({"a": entry(offsets=[0, 8, 8])}, 8, "expected [begin, end]"),
        ({"a": entry(offsets=[-8, 0])}, 8, "expected [begin, end]"),
        ({"a": entry(offsets="08")}, 8, "expected [begin, end]"),
        ({"a": entry(shape=[-2])}, 8, "expected at most 64 sizes >= 0"),
        ({"a": entry(shape=[2.0])}, 8, "expected at most 64 sizes >= 0"),
        ({"a": entry(shape=[True, 2])}, 8, "expected at most 64 sizes >= 0"),
        ({"a": entry(shape=[1] * 65)}, 4, "expected at most 64 sizes >= 0"),
        ({"a": entry(shape=[10**400])}, 4, "expected at most 64 sizes >= 0"),
        ({"a": entry(shape=[0, 2**62, 2**62], offsets=[0, 0])}, 0, "NumPy has no array of the sha"),
        ({"a": entry("F4")}, 8, "dtype 'F4'. Known: F64, F32"),
        ({"a": entry(["F32"])}, 8, "dtype ['F32']"),
        ({"a": {"dtype": "F32", "shape": [2]}}, 8, "expected 'dtype', 'shape' and 'data_offsets'"),
        ({"a": 3}, 8, "expected 'dtype', 'shape' and 'data_offsets'"),
        ({"__metadata__": {"a": 1}}, 0, "expected '__metadata__' to map str to str"),
        (b'{"a": }', 0, "not valid JSON"),
        (b'{"a": "\xff"}', 0, "not valid JSON"),
        (b'{"a": 1, "a": 1}', 0, "the key 'a' occurs twice"),
        (b'{"a": {"dtype": "F32", "dtype": "F32"}}', 0, "the key 'dtype' occurs twice"),
        (b'{"a":' + b"[" * 100_000, 0, "not valid JSON"),
    ],
)
def test_invalid_safetensors_is_refused(tmp_path, header, data_bytes, message):
    path = tmp_path / "a.safetensors"
    write_raw_safetensors(path, header, bytes(data_bytes))
    for read in (read_state_dict, read_safetensors_metadata):
        if "NumPy" in message and read is read_safetensors_metadata:
            continue
        with pytest.raises(FileFormatError) as error:
            read(path)
        assert message in str(error.value)
        assert str(path) in str(error.value)


def test_truncated_safetensors_tells_expected_and_received_bytes(tmp_path):
    path = tmp_path / "a.safetensors"
    safetensors.torch.save_file({"a": torch.ones(100)}, path)
    content = path.read_bytes()
    path.write_bytes(content[:-1])
    whole, kept = len(content), len(content) - 1
    with pytest.raises(FileFormatError, match=f"expected {whole} bytes in all, received {kept}"):
        read_state_dict(path)
    path.write_bytes(content[:20])
    header_end = whole - 400
    with pytest.raises(FileFormatError, match=f"at least {header_end} bytes .*, received 20"):
        read_state_dict(path)
    path.write_bytes(content[:5])
    with pytest.raises(FileFormatError, match=r"at least 8 bytes .*, received 5"):
        read_state_dict(path)


@pytest.mark.parametrize(
    ("length", "message"),
    [(100_000_001, "at most 100000000 bytes"), (2**63, "8 bytes of header length")],
)
def test_impossible_safetensors_header_length_is_refused(tmp_path, length, message):
    path = tmp_path / "a.safetensors"
    path.write_bytes(struct.pack("<Q", length) + b"{}      ")
    with pytest.raises(FileFormatError, match=message):
        read_state_dict(path)


# Writing


@pytest.mark.parametrize("dtype_name", SAFETENSORS_DTYPES)
@pytest.mark.parametrize("shape", [(), (0,), (5,), (2, 3, 4)])
def test_safetensors_round_trip_is_bit_exact(tmp_path, dtype_name, shape):
    array = random_array(np.random.default_rng(2), dtype_name, shape)
    write_safetensors(tmp_path / "a.safetensors", {"weight": array})
    assert_bits_equal(read_state_dict(tmp_path / "a.safetensors")["weight"], array)
    if not dtype_name.endswith("fnuz"):
        tensor = safetensors.torch.load_file(tmp_path / "a.safetensors")["weight"]
        assert_same(array, tensor)


@pytest.mark.parametrize("dtype_name", DTYPES)
@pytest.mark.parametrize("shape", [(), (0,), (2, 0, 3), (5,), (2, 3, 4)])
@pytest.mark.parametrize("key", [None, "model"])
def test_written_pth_is_read_by_torch_bit_exact(tmp_path, dtype_name, shape, key):
    array = random_array(np.random.default_rng(3), dtype_name, shape)
    path = tmp_path / "a.pth"
    write_torch(path, {"weight": array}, key=key)
    assert_bits_equal(read_state_dict(path)["weight"], array)
    for memory_mapped in (False, True):
        loaded = torch.load(path, weights_only=True, mmap=memory_mapped)
        loaded = loaded if key is None else loaded[key]
        assert list(loaded) == ["weight"]
        assert_same(array, loaded["weight"])
        assert loaded["weight"].is_contiguous()


def test_bfloat16_nan_payloads_survive_both_formats(tmp_path):
    bits = np.array([0x7F81, 0x7FC1, 0xFFAB, 0xFFFF, 0x7F80, 0x8000], "uint16")
    arrays = {"weight": bits.view(ml_dtypes.bfloat16)}
    assert np.isnan(arrays["weight"].astype("float32")).sum() == 4
    write_torch(tmp_path / "a.pth", arrays)
    write_safetensors(tmp_path / "a.safetensors", arrays)
    for name in ("a.pth", "a.safetensors"):
        read = read_state_dict(tmp_path / name)["weight"]
        np.testing.assert_array_equal(read.view("uint16"), bits)


@pytest.mark.parametrize("name", ["a.pth", "a.safetensors"])
def test_other_memory_and_byte_orders_are_written_as_their_values(tmp_path, name):
    base = np.arange(24, dtype="float32").reshape(4, 6)
    arrays = {
        "transposed": base.T,
        "sliced": base[::2, 1::3],
        "reversed": base[::-1],
        "fortran": np.asfortranarray(base),
        "big_endian": base.astype(">f4"),
        "big_endian_int": base.astype(">i8"),
        "broadcast": np.broadcast_to(base[0], (3, 6)),
    }
    path = tmp_path / name
    (write_torch if name == "a.pth" else write_safetensors)(path, arrays)
    read = read_state_dict(path)
    library = torch.load(path) if name == "a.pth" else safetensors.torch.load_file(path)
    for key, array in arrays.items():
        np.testing.assert_array_equal(read[key], array)
        np.testing.assert_array_equal(library[key].numpy(), array)
        assert library[key].dtype == (torch.int64 if "int" in key else torch.float32)


def test_random_state_dicts_survive_both_formats(tmp_path):
    rng = np.random.default_rng(4)
    for case in range(25):
        arrays = {}
        for number in range(rng.integers(1, 12)):
            dtype_name = rng.choice(SAFETENSORS_DTYPES)
            shape = tuple(int(n) for n in rng.integers(0, 6, rng.integers(0, 5)))
            arrays[f"stages.{rng.integers(100)}.é.{number}"] = random_array(rng, dtype_name, shape)
        write_torch(tmp_path / "a.pth", arrays, key="model" if case % 2 else None)
        write_safetensors(tmp_path / "a.safetensors", arrays)
        from_pth = read_state_dict(tmp_path / "a.pth")
        from_safetensors = read_state_dict(tmp_path / "a.safetensors")
        loaded = torch.load(tmp_path / "a.pth", weights_only=True)
        loaded = loaded["model"] if case % 2 else loaded
        assert list(from_pth) == list(arrays) == list(loaded)
        assert from_safetensors.keys() == arrays.keys()
        for name, array in arrays.items():
            assert_bits_equal(from_pth[name], array)
            assert_bits_equal(from_safetensors[name], array)
            assert_same(from_pth[name], loaded[name])
        # Reading what torch saves of these tensors closes the circle.
        torch.save(loaded, tmp_path / "b.pth")
        again = read_state_dict(tmp_path / "b.pth")
        for name, array in arrays.items():
            assert_bits_equal(again[name], array)


def test_safetensors_bytes_do_not_depend_on_the_order_of_the_dict(tmp_path):
    arrays = {"b": np.ones(3, "float32"), "a": np.ones(5, "int8"), "c": np.ones(2, "float64")}
    metadata = {"y": "1", "x": "2"}
    write_safetensors(tmp_path / "1", arrays, metadata)
    write_safetensors(
        tmp_path / "2",
        dict(reversed(arrays.items())),
        dict(reversed(metadata.items())),
    )
    assert (tmp_path / "1").read_bytes() == (tmp_path / "2").read_bytes()
    assert list(read_state_dict(tmp_path / "1")) == ["c", "b", "a"]
    assert read_safetensors_metadata(tmp_path / "1") == metadata


def test_safetensors_bytes_equal_those_of_the_library(tmp_path):
    arrays = {
        "b": np.arange(3, dtype="float32"),
        "a": np.arange(4, dtype="float32"),
        "é": np.float16([1]),
        "m": np.arange(2, dtype="float64"),
        "f": np.array([True, False, True]),
    }
    write_safetensors(tmp_path / "ours", arrays, {"format": "pt"})
    safetensors.numpy.save_file(arrays, tmp_path / "theirs", {"format": "pt"})
    assert (tmp_path / "ours").read_bytes() == (tmp_path / "theirs").read_bytes()


def test_safetensors_data_is_aligned(tmp_path):
    arrays = {f"{n}{dtype}": np.ones(n, dtype) for n in (1, 3) for dtype in ("i1", "f2", "f4", "f8")}
    for extra in range(8):
        write_safetensors(tmp_path / "a.safetensors", arrays, {"note": "x" * extra})
        assert int.from_bytes((tmp_path / "a.safetensors").read_bytes()[:8], "little") % 8 == 0
        for array in read_state_dict(tmp_path / "a.safetensors").values():
            assert array.ctypes.data % array.dtype.itemsize == 0


def test_pth_bytes_are_deterministic_and_storages_are_aligned(tmp_path):
    arrays = {f"{n}": np.ones(n, "int8") for n in range(70)}
    write_torch(tmp_path / "1.pth", arrays)
    write_torch(tmp_path / "2.pth", arrays)
    assert (tmp_path / "1.pth").read_bytes() == (tmp_path / "2.pth").read_bytes()
    for name, array in read_state_dict(tmp_path / "1.pth").items():
        assert name == "0" or array.ctypes.data % 64 == 0


@pytest.mark.parametrize("limit", [100, 10_000])
def test_pth_with_large_members_is_aligned_and_read_by_torch(tmp_path, monkeypatch, limit):
    # The zip64 form of members beyond 1 GiB, on small ones.
    monkeypatch.setattr(zipfile, "ZIP64_LIMIT", limit)
    arrays = {"a": np.arange(2000, dtype="float32"), "b": np.arange(7, dtype="float32")}
    write_torch(tmp_path / "a.pth", arrays)
    read = read_state_dict(tmp_path / "a.pth")
    loaded = torch.load(tmp_path / "a.pth", weights_only=True, mmap=True)
    for name, array in arrays.items():
        assert_bits_equal(read[name], array)
        assert_same(array, loaded[name])
        assert read[name].ctypes.data % 64 == 0


def test_written_pickle_is_of_protocol_2(tmp_path):
    write_torch(tmp_path / "a.pth", {"a": np.ones(2, "float32"), "b": np.ones(2, "uint16")}, "model")
    with zipfile.ZipFile(tmp_path / "a.pth") as archive:
        assert archive.testzip() is None
        opcodes = list(pickletools.genops(archive.read("archive/data.pkl")))
    assert max(opcode.proto for opcode, _, _ in opcodes) == 2


def test_large_sizes_are_pickled_as_numbers():
    for value in (0, 255, 65536, 2**31 - 1, 2**31, 2**40, 2**63 - 1):
        assert pickle.loads(b"\x80\x02" + torch_files._pickled(value) + b".") == value


@pytest.mark.parametrize("write", [write_torch, write_safetensors])
@pytest.mark.parametrize(
    ("arrays", "error", "message"),
    [
        ({"a": np.array([None])}, ValueError, "dtype 'object' of 'a'"),
        ({"a": np.array(["text"])}, ValueError, "dtype '<U4' of 'a'"),
        ({"a": np.zeros(2, "datetime64[s]")}, ValueError, r"dtype 'datetime64\[s\]' of 'a'"),
        ({"a": np.zeros(2, ml_dtypes.int4)}, ValueError, "dtype 'int4' of 'a'"),
        ({"a": np.zeros(2, [("x", "f4")])}, ValueError, "cannot hold the dtype"),
        ({"a": [1.0]}, TypeError, "Expected a NumPy array for 'a', received list"),
        ({1: np.ones(1)}, TypeError, "Expected names of type str, received 1"),
    ],
)
@pytest.mark.parametrize("exists", [False, True])
def test_failed_write_leaves_the_folder_as_it_was(tmp_path, write, arrays, error, message, exists):
    if exists:
        (tmp_path / "a").write_bytes(b"earlier")
    with pytest.raises(error, match=message):
        write(tmp_path / "a", {"good": np.ones(3), **arrays})
    assert os.listdir(tmp_path) == (["a"] if exists else [])
    assert not exists or (tmp_path / "a").read_bytes() == b"earlier"


@pytest.mark.parametrize("write", [write_torch, write_safetensors])
@pytest.mark.parametrize("step", ["fsync", "replace", "interrupted"])
def test_write_that_fails_midway_leaves_the_earlier_file(tmp_path, monkeypatch, write, step):
    write(tmp_path / "a", {"weight": np.zeros(3)})
    earlier = (tmp_path / "a").read_bytes()
    seen = []

    def fail(*arguments):
        seen.extend(os.listdir(tmp_path))
        raise KeyboardInterrupt if step == "interrupted" else OSError("No space left on device")

    if step == "interrupted":
        monkeypatch.setattr(sys.modules[write.__module__], "little_endian_bytes", fail)
    else:
        monkeypatch.setattr(os, step, fail)
    with pytest.raises((OSError, KeyboardInterrupt)):
        write(tmp_path / "a", {"weight": np.ones(3)})
    assert len(seen) == 2, "the temporary file lies in the same folder"
    assert os.listdir(tmp_path) == ["a"]
    assert (tmp_path / "a").read_bytes() == earlier


@pytest.mark.parametrize("write", [write_torch, write_safetensors])
def test_file_can_be_replaced_by_arrays_read_from_it(tmp_path, write):
    write(tmp_path / "a", {"weight": np.arange(3.0)})
    read = read_state_dict(tmp_path / "a")
    write(tmp_path / "a", {**read, "other": np.ones(1)})
    np.testing.assert_array_equal(read["weight"], [0, 1, 2])
    np.testing.assert_array_equal(read_state_dict(tmp_path / "a")["weight"], [0, 1, 2])


@pytest.mark.parametrize("write", [write_torch, write_safetensors])
def test_write_to_a_directory_or_without_one_is_refused(tmp_path, write):
    with pytest.raises(IsADirectoryError, match="Add a file name"):
        write(tmp_path, {"a": np.ones(1)})
    with pytest.raises(FileNotFoundError, match="Create it first"):
        write(tmp_path / "gone" / "a", {"a": np.ones(1)})


def test_dtype_that_safetensors_lacks_is_refused(tmp_path):
    with pytest.raises(ValueError, match="complex128"):
        write_safetensors(tmp_path / "a", {"a": np.ones(1, "complex128")})
    assert os.listdir(tmp_path) == []


@pytest.mark.skipif(not hasattr(mmap, "MADV_DONTNEED"), reason="this system cannot release pages")
def test_released_pages_leave_memory_and_are_read_again(tmp_path):
    def resident_megabytes():
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        return pages * resource.getpagesize() / 2**20

    path = tmp_path / "large.safetensors"
    values = np.arange(16 * 2**20, dtype="float32")  # 64 MB
    safetensors_files.write_safetensors(path, {"x": values})
    array = torch_files.read_state_dict(path)["x"]
    total = float(array.sum(dtype="float64"))
    before = resident_megabytes()
    release_pages(array.reshape(2, -1).T)
    assert resident_megabytes() < before - 32
    assert float(array.sum(dtype="float64")) == total
    release_pages(values)  # not memory-mapped: nothing happens
