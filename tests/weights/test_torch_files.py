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
import zipfile
from collections import OrderedDict
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import safetensors
import safetensors.numpy
import safetensors.torch
import torch

from keras_convnext.weights import safetensors_files, torch_files
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
    ("keys", "prefer_ema", "expected"),
    [
        (["model", "model_ema"], True, "model_ema"),
        (["model", "model_ema"], False, "model"),
        (["state_dict", "state_dict_ema"], True, "state_dict_ema"),
        (["state_dict", "state_dict_ema"], False, "state_dict"),
        (["module", "model", "state_dict", "ema"], True, "ema"),
        (["module", "model", "state_dict", "ema"], False, "state_dict"),
        (["module", "model", "state_dict"], True, "state_dict"),
        (["module", "model"], True, "model"),
        (["module"], True, "module"),
        (["ema", "model_ema", "state_dict_ema"], False, "state_dict_ema"),
    ],
)
def test_state_dict_is_found_under_the_first_key_of_the_order(tmp_path, keys, prefer_ema, expected):
    content = {key: {"weight": torch.full((2,), float(i))} for i, key in enumerate(keys)}
    torch.save(content, tmp_path / "a.pth")
    read = read_state_dict(tmp_path / "a.pth", prefer_ema=prefer_ema)
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


def test_reading_imports_neither_torch_nor_an_unpickler(tmp_path):
    torch.save({"model": {"a": torch.ones(2)}}, tmp_path / "a.pth")
    code = (
        "import pickle, sys\n"
        "def refuse(*arguments, **options): raise SystemExit('an unpickler was made')\n"
        "pickle.Unpickler = pickle._Unpickler = pickle.loads = pickle.load = refuse\n"
        "import keras_convnext_main\n"  # with which the package imports nothing by itself
        "from keras_convnext.weights import torch_files\n"
        f"print(torch_files.read_state_dict({str(tmp_path / 'a.pth')!r})['a'].tolist())\n"
        "print([name for name in ('torch', 'keras', 'safetensors') if name in sys.modules])\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stdout.splitlines() == ["[1.0, 1.0]", "[]"], done.stderr


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
        "extension": ("EXT1", b"\x82\xf0(" + pushed_text(touch) + b"tR"),
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
    """The extension code 240 as a name for os.system, in the cache that unpicklers trust."""
    copyreg.add_extension("os", "system", 240)
    yield
    copyreg.remove_extension("os", "system", 240)
    copyreg._extension_cache.pop(240, None)


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
    write_archive(tmp_path / "a.pth", program, [("data/0", bytes(16))])
    assert list(read_state_dict(tmp_path / "a.pth")) == ["weight"]
    assert vars(torch_files._IGNORED) == {}
    assert not isinstance(torch_files._IGNORED, int)


@pytest.mark.parametrize(
    ("opcodes", "message"),
    [
        (b"ctorch\nfloat32\n}b", "sets a state"),
        (b"ccollections\nOrderedDict\n}b", "sets a state"),
        (b"ccollections\nOrderedDict\n(]tR", "with 1 arguments that do not fit"),
        (b"ctorch\nfloat32\n)R", "'torch.float32' with 0 arguments"),
        (b"K\x01)R", "calls a int"),
        (b"ctorch\nSize\n((J\xff\xff\xff\xffttR", "'torch.Size'"),
        (b"ctorch._utils\n_rebuild_parameter\n(}\x89}tR", "'torch._utils._rebuild_parameter'"),
        (b"X\x01\0\0\0aQ", "'storage', type, key, location, size"),
        (b"(X\x06\0\0\0stored" + b"ctorch\nFloatStorage\nX\x01\0\0\0" + b"0NK\x04tQ", "'storage'"),
        (
            b"(X\x07\0\0\0storage" + b"ctorch\nfloat32\nX\x01\0\0\0" + b"0NK\x04tQ",
            "type of storage",
        ),
        (b"(X\x07\0\0\0storage" + b"ctorch\nFloatStorage\nX\x01\0\0\0" + b"9NK\x04tQ", "missing"),
        (b"K\x01K\x02a", "appends to a int"),
        (b"K\x01K\x02K\x03s", "sets items of a int"),
        (b"}(K\x01u", "without a value"),
        (b"h\x07", "malformed"),
        (b"t", "malformed"),
        (b"\x87", "stack underflow"),
        (b"K\x01K\x02\x93", "not a text"),
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
    deep = b"\x80\x02}(" + pushed_text("a") + b")" + b"\x85" * 100_000 + pushed_text("b") + b"N"
    as_key = b"}" + b")" + b"\x85" * 100_000 + b"Ns"
    cyclic = b"}q\1(" + b"".join(pushed_text(key) + b"h\1" for key in ("model", "ema")) + b"u"
    for program in (deep + b"u.", b"\x80\x02" + as_key + b".", b"\x80\x02" + cyclic + b"."):
        write_archive(tmp_path / "a.pth", program)
        with pytest.raises(FileFormatError, match="expected a dictionary of tensors"):
            read_state_dict(tmp_path / "a.pth")


def test_memo_index_does_not_allocate(tmp_path):
    program = b"\x80\x02}r\xff\xff\xff\xff0j\xff\xff\xff\xff."
    write_archive(tmp_path / "a.pth", program)
    with pytest.raises(FileFormatError, match="expected a dictionary of tensors"):
        read_state_dict(tmp_path / "a.pth")


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
        ({"storage_size": -1}, "as a storage in its pickle"),
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


def test_legacy_pickle_is_refused_with_the_way_to_save_it_again(tmp_path):
    path = tmp_path / "a.pth"
    torch.save({"a": torch.ones(1)}, path, _use_new_zipfile_serialization=False)
    with pytest.raises(FileFormatError, match=r"before version 1\.6.*torch\.save\(torch\.load"):
        read_state_dict(path)
    torch.save(torch.load(path, map_location="cpu"), path)
    assert list(read_state_dict(path)) == ["a"]


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_torchscript_is_refused(tmp_path):
    torch.jit.save(torch.jit.script(torch.nn.Linear(2, 3)), tmp_path / "a.pt")
    with pytest.raises(FileFormatError, match="TorchScript archive"):
        read_state_dict(tmp_path / "a.pt")


def test_compressed_archive_is_refused(tmp_path):
    members = [("data/0", bytes(16))]
    write_archive(tmp_path / "a.pth", tensor_program(), members, zipfile.ZIP_DEFLATED)
    with pytest.raises(FileFormatError, match=r"uncompressed.*'archive/byteorder'.*zip -0"):
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
        (b"some notes on weights", r"expected a \.pth \(zip\).*b'some notes on we'"),
        (b"abc", "starts with b'abc'"),
    ],
)
def test_file_that_is_not_weights_is_refused(tmp_path, content, message):
    (tmp_path / "a.pth").write_bytes(content)
    with pytest.raises(FileFormatError, match=message):
        read_state_dict(tmp_path / "a.pth")


def test_missing_file_and_directory_are_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no file '.*gone\.pth'"):
        read_state_dict(tmp_path / "gone.pth")
    with pytest.raises(IsADirectoryError, match="received the directory"):
        read_state_dict(tmp_path)


@pytest.mark.parametrize(
    ("content", "received"),
    [
        ([torch.ones(1)], "received list"),
        (torch.ones(1), "received ndarray"),
        ({"epoch": 3, "weights": {"a": torch.ones(1)}}, r"the keys \['epoch', 'weights'\]"),
    ],
)
def test_file_without_a_state_dict_is_refused(tmp_path, content, received):
    torch.save(content, tmp_path / "a.pth")
    with pytest.raises(FileFormatError, match=f"{received}.*Save the state dict"):
        read_state_dict(tmp_path / "a.pth")


@pytest.mark.parametrize("name", ["a.pth", "a.safetensors"])
def test_damaged_bytes_give_arrays_or_our_errors_only(tmp_path, name):
    rng = np.random.default_rng(0)
    path = tmp_path / name
    tensors = {"a": torch.rand(3, 2), "b": torch.ones(4, dtype=torch.bfloat16)}
    if name == "a.pth":
        torch.save({"model": OrderedDict(tensors), "args": argparse.Namespace(a=1)}, path)
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


def test_reserved_name_and_wrong_metadata_are_refused(tmp_path):
    with pytest.raises(ValueError, match="'__metadata__' is reserved"):
        write_safetensors(tmp_path / "a", {"__metadata__": np.ones(1)})
    with pytest.raises(TypeError, match="metadata of str to str, received 'epochs': 300"):
        write_safetensors(tmp_path / "a", {}, {"epochs": 300})
    with pytest.raises(TypeError, match="`key` to be a str or None, received 3"):
        write_torch(tmp_path / "a", {}, key=3)
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
