"""Runs the pickles in which `torch.save` describes tensors, without PyTorch and without a chance for others.

A pickle is a program. `_check_program` looks at each opcode before any is run; then a `pickle.Unpickler` runs
them that reaches nothing but `_NAMES`: objects of this module, on which a file can set nothing. No name is
imported. The bytes of the tensors lie elsewhere: a pickle names storages, and who reads the file fills them.
"""

import io
import math
import pickle
import pickletools
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from keras_convnext.weights import arrays

_FUNCTIONS = (
    "collections.OrderedDict",
    "torch.Size",
    "torch._utils._rebuild_parameter",
    "torch._utils._rebuild_parameter_with_state",
    "torch._utils._rebuild_tensor_v2",
    "torch._utils._rebuild_tensor_v3",
)

# Training scripts store these next to the state dict: arguments, scores, schedules, the log of mmengine.
_TYPES = "bool bytearray complex dict float frozenset int list set slice str tuple"
_PATHS = "PosixPath PurePosixPath PureWindowsPath WindowsPath"
_IGNORED = {
    "__builtin__": f"{_TYPES} getattr long unicode xrange",
    "builtins": f"{_TYPES} range",
    "_codecs": "encode",
    "argparse": "Namespace",
    "collections": "Counter defaultdict deque",
    "mmengine.logging.history_buffer": "HistoryBuffer",
    "numpy": "dtype ndarray",
    "numpy.core.multiarray": "_reconstruct scalar",
    "numpy._core.multiarray": "_reconstruct scalar",
    "numpy.core.numeric": "_frombuffer",
    "numpy._core.numeric": "_frombuffer",
    "pathlib": _PATHS,
    "pathlib._local": _PATHS,  # Python 3.13
    "torch": "device",
    "torch.serialization": "_get_layout",
    "types": "SimpleNamespace",
}

# All that torch.save writes. Extension codes are not among them: an unpickler takes their objects from a
# cache, without asking for the name.
_OPCODES = frozenset(
    "PROTO FRAME STOP MARK NONE NEWTRUE NEWFALSE BININT BININT1 BININT2 LONG1 LONG4 BINFLOAT "  # noqa: SIM905
    "BINUNICODE SHORT_BINUNICODE BINBYTES SHORT_BINBYTES BYTEARRAY8 EMPTY_TUPLE TUPLE TUPLE1 TUPLE2 "
    "TUPLE3 EMPTY_LIST APPEND APPENDS EMPTY_DICT SETITEM SETITEMS EMPTY_SET ADDITEMS FROZENSET "
    "BINPUT LONG_BINPUT MEMOIZE BINGET LONG_BINGET GLOBAL STACK_GLOBAL BINPERSID REDUCE NEWOBJ BUILD".split()
)

# Which of the items that an opcode takes from the stack an unpickler hashes.
_HASHED = {
    "SETITEM": slice(1, 2),
    "SETITEMS": slice(1, None, 2),
    "ADDITEMS": slice(1, None),
    "FROZENSET": slice(None),
}

# A training checkpoint of the largest model has some 30,000. One can take 232 bytes of memory (an empty set).
_MAX_OPCODES = 2**20

# Who writes a file can choose numbers and tuples that meet in a table of hashes, which takes the square of
# their count. Texts and bytes are hashed at random, all else by identity. Class names have 21,843 numbers.
_MAX_NUMBERS = 2**15
_TUPLE_NUMBERS = 8  # tuples take longer to compare

# Characters of keys, and items of tuples that are keys or arguments: they are read again at each use.
_MAX_ITEMS = 2**24


class _Entry(NamedTuple):
    """What `_check_program` knows of an entry of the stack."""

    length: int = 0  # characters of a text, items of a tuple and characters of those
    numbers: float = 0  # as a key, how many of `_MAX_NUMBERS` it takes


_OTHER, _NUMBER, _NO_KEY = _Entry(), _Entry(0, 1), _Entry(0, math.inf)


class _Fixed:
    """Base of what a pickle may name or make: it has slots alone and takes no state."""

    __slots__ = ()

    def __setstate__(self, state: object) -> None:
        raise ValueError(f"it sets a state of a {type(self).__name__}")


@dataclass(slots=True, eq=False)
class Storage(_Fixed):
    """A storage that a pickle names: `size` items of `dtype`, or bytes where each tensor has its own dtype.

    The reader of the file fills in `content`. A view has a `root` instead, and begins at its item `begin`.
    """

    dtype: np.dtype | None
    size: int
    content: memoryview | None = None
    root: "Storage | None" = None
    begin: int = 0

    @property
    def nbytes(self) -> int:
        return self.size * (1 if self.dtype is None else self.dtype.itemsize)


@dataclass(slots=True, eq=False)
class Tensor(_Fixed):
    """A tensor as the pickle describes it. Offset, size and stride count items, and are not checked yet."""

    storage: Storage
    dtype: np.dtype | None
    offset: object
    size: object
    stride: object
    lazy: bool

    def array(self) -> np.ndarray:
        """The tensor as a view of the content of its storage; ValueError where they do not fit."""
        offset, size, stride, dtype = self.offset, self.size, self.stride, self.dtype
        if self.lazy:
            raise ValueError("lazy flags (conjugate or negative); save tensor.resolve_conj().resolve_neg()")
        if not (
            dtype is not None
            and isinstance(size, tuple)
            and isinstance(stride, tuple)
            and isinstance(offset, int)
            and arrays.is_sizes((offset, *size, *stride))
            and len(size) == len(stride)
        ):
            raise ValueError("expected a dtype, and an offset, size and stride of integers >= 0")
        if 0 in size:
            return np.empty(size, dtype)
        last = offset + sum((n - 1) * step for n, step in zip(size, stride, strict=True))
        available = self.storage.nbytes // dtype.itemsize
        if last >= available:
            raise ValueError(  # NumPy's message would count bytes
                f"size {size}, stride {stride} and offset {offset} needs {last + 1} items, its storage has "
                f"{available}"
            )
        content = (self.storage.root or self.storage).content
        begin, *steps = (items * dtype.itemsize for items in (self.storage.begin + offset, *stride))
        return np.ndarray(size, dtype, content, begin, steps)


@dataclass(slots=True, eq=False)
class _Name(_Fixed):
    """A name that a pickle may ask for."""

    name: str

    def __call__(self, *arguments: object) -> object:
        match self.name, arguments:
            case "collections.OrderedDict", ():
                return _Dictionary()
            case "torch.Size", (size,) if arrays.is_sizes(size):
                return _Ignored()  # a tensor has its size as a tuple
            case "torch._utils._rebuild_parameter", (Tensor() as tensor, _, _):
                return tensor
            case "torch._utils._rebuild_parameter_with_state", (Tensor() as tensor, _, _, _):
                return tensor
            case "torch._utils._rebuild_tensor_v2", (Storage() as storage, offset, size, stride, _, _, *lazy):
                return Tensor(storage, storage.dtype, offset, size, stride, any(lazy))
            case (
                "torch._utils._rebuild_tensor_v3",
                (Storage() as storage, offset, size, stride, _, _, _Name(name), *lazy),
            ):
                dtype = arrays.TORCH_DTYPES.get(name.removeprefix("torch."))
                return Tensor(storage, dtype, offset, size, stride, any(lazy))
        raise ValueError(f"it calls {self.name!r} with {len(arguments)} arguments that do not fit")


class _Dictionary(dict):
    """An `OrderedDict`, without the attributes that PyTorch gives to those of its modules."""

    __slots__ = ()

    def __setstate__(self, state: object) -> None:
        pass


class _Ignored:
    """Any object that is not kept. Takes all arguments, items and state, and keeps none of them."""

    __slots__ = ()

    def __new__(cls, *arguments: object) -> "_Ignored":
        return super().__new__(cls)

    @staticmethod
    def append(*items: object) -> None:
        pass

    extend = add = __setitem__ = __setstate__ = append  # static: states of the class itself are dropped too


_STORAGE_DTYPES: dict[str, np.dtype | None] = {
    "torch.storage.UntypedStorage": None,
    **{f"torch.{storage}": arrays.TORCH_DTYPES[dtype] for dtype, storage in arrays.TORCH_STORAGES.items()},
}

# All that a pickle can reach.
_NAMES: dict[str, _Name | type[_Ignored]] = {
    **{name: _Name(name) for name in (*_FUNCTIONS, *_STORAGE_DTYPES)},
    **{f"torch.{name}": _Name(f"torch.{name}") for name in arrays.TORCH_DTYPES},
    **{f"{module}.{name}": _Ignored for module, names in _IGNORED.items() for name in names.split()},
}


def _known(module: str, name: str) -> _Name | type[_Ignored]:
    found = None if "." in name else _NAMES.get(f"{module}.{name}")
    if found is None:
        raise arrays.UnsafeFileError(
            f"asks for the global '{module}.{name}', which a state dict does not need and which could run "
            "code"
        )
    return found


class _TensorUnpickler(pickle.Unpickler):
    """Runs a pickle whose opcodes were checked. Imports nothing."""

    def __init__(self, stream: io.BytesIO):
        super().__init__(stream)
        self.storages: dict[str, Storage] = {}

    def find_class(self, module: str, name: str) -> "_Name | type[_Ignored]":
        return _known(module, name)

    def persistent_load(self, identifier: object) -> Storage:
        match identifier:
            case ("storage", _Name(kind), str() as key, _, int() as size, *view) if (
                kind in _STORAGE_DTYPES and len(key) < 256 and arrays.is_size(size)
            ):
                storage = self.storages.setdefault(key, Storage(_STORAGE_DTYPES[kind], size))
            case _:
                raise ValueError("expected ('storage', type, key, location, size) as a storage")
        if storage.dtype is not _STORAGE_DTYPES[kind] or storage.size != size:
            raise ValueError(f"it describes the storage {key!r} in two ways")
        match view:
            case [] | [None]:
                return storage
            case [(str(), int() as begin, int() as length)] if begin >= 0 <= length <= size - begin:
                return Storage(storage.dtype, length, root=storage, begin=begin)
        raise ValueError(f"it has a view that is not within the storage {key!r}")


def unpickle(stream: io.BytesIO) -> tuple[object, dict[str, Storage]]:
    """Runs the pickle at the position of a stream, and leaves the stream after it.

    Gives what the pickle describes (containers, texts, numbers and `Tensor`s) and the storages by their keys.

    Raises:
        FileFormatError: the pickle is malformed, or would take too much memory or time.
        UnsafeFileError: it has a name or an opcode that describes no tensors.
    """
    begin = stream.tell()
    try:
        _check_program(stream)
        end = stream.tell()
        stream.seek(begin)
        unpickler = _TensorUnpickler(stream)
        content = unpickler.load()
    except arrays.UnsafeFileError as error:
        raise arrays.UnsafeFileError(
            f"Refused to read it: its pickle {error}. Nothing in it was executed. If you trust the "
            "file, load it in PyTorch and save its weights as .safetensors."
        ) from None
    except (pickle.UnpicklingError, EOFError, ValueError, TypeError, AttributeError, LookupError) as error:
        raise arrays.damaged(f"its pickle is malformed ({error})") from error
    stream.seek(end)
    return content, unpickler.storages


def _check_program(stream: io.BytesIO) -> None:
    """Refuses opcodes that describe no tensors, and programs that exhaust memory, time or the C stack.

    An unpickler hashes the keys of dictionaries and the items of sets, and compares those of equal hashes.
    For a nested tuple this takes C stack by its depth, and time by the number of paths through it. A tuple
    of arguments is copied at each call. So each entry of the stack is followed.
    """
    stack: list[_Entry] = []
    outer_stacks: list[list[_Entry]] = []
    memo: dict[object, _Entry] = {}
    numbers: float = 0
    used = 0
    for count, (opcode, argument, position) in enumerate(pickletools.genops(stream)):
        name, before = opcode.name, opcode.stack_before
        if name not in _OPCODES:
            raise arrays.UnsafeFileError(
                f"has the opcode {name} at byte {position}, which torch.save does not write"
            )
        if name == "GLOBAL":  # the unpickler asks again, and for names that the stack holds too
            _known(*str(argument).split(" ", 1))
        if count == _MAX_OPCODES:
            raise ValueError(f"it has more than {_MAX_OPCODES} opcodes")
        if name in ("BINPUT", "LONG_BINPUT", "MEMOIZE"):
            index = argument if isinstance(argument, int) else len(memo)
            if index > count:  # an unpickler makes room for all indices below
                raise ValueError(f"it has the memo index {index} at byte {position}")
            memo[index] = stack[-1]
        elif name in ("BINGET", "LONG_BINGET"):
            stack.append(memo[argument])
        elif name == "MARK":
            outer_stacks.append(stack)
            stack = []
        elif not before:
            if opcode.stack_after:
                stack.append(_value(name, argument))
        else:
            items: list[_Entry] = []
            if pickletools.markobject in before:
                items, stack = stack, outer_stacks.pop()
                before = before[: before.index(pickletools.markobject)]
            first = len(stack) - len(before)
            if first < 0:
                raise ValueError(f"stack underflow at byte {position}")
            items = stack[first:] + items
            del stack[first:]
            for key in items[_HASHED[name]] if name in _HASHED else ():
                numbers += key.numbers
                used += key.length
            if numbers == math.inf:
                raise ValueError(
                    f"it has a large number, a set or a nested tuple as a key at byte {position}"
                )
            if numbers > _MAX_NUMBERS:
                raise ValueError(f"it has more than {_MAX_NUMBERS} numbers as keys")
            if name in ("REDUCE", "NEWOBJ"):
                used += items[-1].length
            if used > _MAX_ITEMS:
                raise ValueError(f"its keys and arguments have more than {_MAX_ITEMS} characters and items")
            if opcode.stack_after:
                stack.append(_made(name, items))


def _value(name: str, argument: object) -> _Entry:
    """What an opcode pushes that takes nothing from the stack."""
    match argument:
        case float():
            return _NUMBER
        case int():
            return _NUMBER if abs(argument) < 2**60 else _NO_KEY
        case str() | bytes() if name != "GLOBAL":
            return _Entry(len(argument))
    return _OTHER


def _made(name: str, items: list[_Entry]) -> _Entry:
    """What an opcode makes of items of the stack."""
    if name.startswith("TUPLE"):
        simple = [item.length for item in items if item.numbers <= 1]
        flat = len(simple) == len(items)
        return _Entry(len(items) + sum(simple), _TUPLE_NUMBERS + len(items) if flat else math.inf)
    return _NO_KEY if name == "FROZENSET" else _OTHER
