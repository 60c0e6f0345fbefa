"""Reads the pickle inside a checkpoint as plain data: nothing that it names is imported, and nothing in it is called.

A class or function named in the pickle becomes a `Global` (two strings), an object made by one becomes a `Stub` that
remembers what it was given, and a tensor becomes a `StoredTensor`: where its numbers lie, not the numbers. So the
machine below has no callable on its stack at any time, whatever the file says.

Does not know files, or what metaseq keeps in them. Source of the opcodes: the standard library's pickletools.
"""

from __future__ import annotations

import io
import pickle
import struct
from collections import OrderedDict
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from itertools import chain
from typing import IO, Any, ClassVar

import torch

MAX_DIMS = 16
MAX_SIZE = 2**40
MAX_DEPTH = 100
MAX_BITS = 1024
MAX_COPIES = 1 << 20
"""So many items may be there by references to others; a few bytes could make more of them than any memory holds."""
MAX_PICKLE = 1 << 26
"""Units: bytes. What trainers leave is below one megabyte, or some more with a list of documents."""

STORAGES = {
    "DoubleStorage": torch.float64,
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
    "UntypedStorage": torch.uint8,
}
DTYPES = {str(d).removeprefix("torch."): d for d in STORAGES.values()}

BROKEN = (
    pickle.UnpicklingError,
    AssertionError,
    AttributeError,
    EOFError,
    IndexError,
    KeyError,
    OverflowError,
    RecursionError,
    TypeError,
    ValueError,
    struct.error,
)
"""What a damaged pickle makes the machine raise."""


@dataclass(frozen=True, slots=True)
class Global:
    """The name of a class or function; nothing more is known of it."""

    module: str
    name: str

    def __str__(self) -> str:
        return f"{self.module}.{self.name}"


@dataclass(slots=True, eq=False)
class Stub:
    """What the pickle says of an object of a foreign class."""

    type: Global
    args: tuple[Any, ...] = ()
    state: Any = None
    items: dict[Any, Any] = field(default_factory=dict)
    values: list[Any] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Storage:
    """A run of numbers kept in a record of its own, or those of a record from `start` on."""

    key: str
    dtype: torch.dtype
    numel: int
    start: int = 0


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """A tensor that was not read yet. Units: offset and stride in elements."""

    key: str
    dtype: torch.dtype
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]

    @property
    def numel(self) -> int:
        n = 1
        for size in self.shape:
            n *= size
        return n

    @property
    def in_order(self) -> bool:
        """Whether its numbers follow one another in the storage."""
        step = 1
        for size, stride in zip(reversed(self.shape), reversed(self.stride), strict=True):
            if size != 1 and stride != step:
                return False
            step *= size
        return True

    @property
    def end(self) -> int:
        """One past the last element of the storage that it touches."""
        if self.numel == 0:
            return self.offset
        return self.offset + sum((size - 1) * step for size, step in zip(self.shape, self.stride, strict=True)) + 1


def _sizes(value: Any) -> tuple[int, ...]:
    if not isinstance(value, (tuple, list)) or not all(type(n) is int and 0 <= n < MAX_SIZE for n in value):
        raise ValueError("a tensor's sizes are not whole numbers")
    return tuple(value)


def _tensor(storage: Any, offset: Any, shape: Any, stride: Any, dtype: torch.dtype | None = None) -> StoredTensor:
    if not isinstance(storage, Storage) or type(offset) is not int or offset < 0:
        raise ValueError("a tensor without a storage")
    dtype = dtype or storage.dtype
    numel = storage.numel * storage.dtype.itemsize // dtype.itemsize
    out = StoredTensor(storage.key, dtype, offset, _sizes(shape), _sizes(stride))
    if len(out.shape) != len(out.stride) or len(out.shape) > MAX_DIMS or out.end > numel or out.numel > numel:
        raise ValueError("a tensor reaches past its storage")
    if not storage.start:
        return out
    if dtype != storage.dtype:
        raise ValueError("a tensor of another type than the storage that it shares")
    return replace(out, offset=offset + storage.start)


def _parameter(data: Any, *_: Any) -> StoredTensor:
    if not isinstance(data, StoredTensor):
        raise ValueError("a parameter without a tensor")
    return data


def _tensor_v3(storage: Any, offset: Any, shape: Any, stride: Any, grad: Any, hooks: Any, dtype: Any, *_: Any) -> Any:
    if not isinstance(dtype, torch.dtype):
        raise ValueError("a tensor of unknown type")
    return _tensor(storage, offset, shape, stride, dtype)


def _ordered(pairs: Any = ()) -> OrderedDict[Any, Any]:
    return OrderedDict((_key(key), value) for key, value in pairs)


def _bytes(text: Any, encoding: Any) -> bytes:
    if encoding != "latin1" or not isinstance(text, str):
        raise ValueError("bytes in an unknown encoding")
    return text.encode("latin1")


def _typed(function: Any, _type: Any, args: Any, *_: Any) -> Any:
    return _make(function, args)


MAKERS: dict[str, Callable[..., Any]] = {
    "torch._utils._rebuild_tensor": _tensor,
    "torch._utils._rebuild_tensor_v2": lambda storage, offset, shape, stride, *_: _tensor(
        storage, offset, shape, stride
    ),
    "torch._utils._rebuild_tensor_v3": _tensor_v3,
    "torch._utils._rebuild_parameter": _parameter,
    "torch._utils._rebuild_parameter_with_state": _parameter,
    "torch._tensor._rebuild_from_type_v2": _typed,
    "torch.Size": lambda sizes: torch.Size(_sizes(sizes)),
    "collections.OrderedDict": _ordered,
    "_codecs.encode": _bytes,
    "copyreg._reconstructor": lambda kind, *_: _make(kind, ()),
    "copy_reg._reconstructor": lambda kind, *_: _make(kind, ()),
}
"""Ours, every one; looked up by the name in the file and never handed to it."""


def _make(kind: Any, args: Any) -> Any:
    """What calling `kind` would have been."""
    if isinstance(kind, Stub) and isinstance(args, tuple):  # a class found by getattr: a nested one
        return Stub(kind.type, args)
    if not isinstance(kind, Global) or not isinstance(args, tuple):
        raise ValueError("a call of something that is not a name")
    maker = MAKERS.get(str(kind))
    return Stub(kind, args) if maker is None else maker(*args)


_SCALARS = (str, int, float, bytes, type(None))


def _key(key: Any) -> Any:
    """A dict's key whose hash costs nothing: a nest of tuples could take for ever."""
    if isinstance(key, _SCALARS) or (isinstance(key, tuple) and all(isinstance(k, _SCALARS) for k in key)):
        return key
    return str(key.type) if isinstance(key, Stub) else str(type(key))


_KEPT = """PROTO FRAME STOP MARK POP POP_MARK DUP NONE NEWTRUE NEWFALSE INT BININT BININT1 BININT2 LONG LONG1 LONG4
FLOAT BINFLOAT STRING BINSTRING SHORT_BINSTRING BINBYTES SHORT_BINBYTES BINBYTES8 UNICODE BINUNICODE SHORT_BINUNICODE
BINUNICODE8 EMPTY_TUPLE TUPLE TUPLE1 TUPLE2 TUPLE3 EMPTY_LIST LIST EMPTY_DICT EMPTY_SET GET BINGET LONG_BINGET PUT
BINPUT LONG_BINPUT MEMOIZE GLOBAL STACK_GLOBAL BINPERSID"""
"""Opcodes taken from the standard library's machine: they push numbers, texts and containers. What makes, changes or
calls an object is written anew below; extensions and out-of-band buffers do not exist here."""

_Base: Any = pickle._Unpickler  # the one in Python: its memo is a dict, not an array


class Machine(_Base):  # type: ignore[misc]
    dispatch: ClassVar[dict[int, Any]] = {
        getattr(pickle, op)[0]: _Base.dispatch[getattr(pickle, op)[0]] for op in _KEPT.split()
    }

    def __init__(self, file: Any) -> None:
        super().__init__(file)
        self.storages: dict[str, Storage] = {}

    def load(self) -> Any:
        return _checked(super().load())

    def find_class(self, module: str, name: str) -> Any:
        if module == "torch" and name in DTYPES:
            return DTYPES[name]
        return Global(module, name)

    def persistent_load(self, pid: Any) -> Storage:
        if not isinstance(pid, tuple) or len(pid) < 5 or pid[0] != "storage":
            raise ValueError("an unknown reference")
        kind, key, numel = pid[1], pid[2], pid[4]
        known = isinstance(kind, Global) and kind.name in STORAGES
        if not (known and type(key) is str and key.isprintable() and type(numel) is int):
            raise ValueError("an unknown kind of storage")
        whole = Storage(key, STORAGES[kind.name], numel)
        if not 0 <= numel < MAX_SIZE or self.storages.setdefault(key, whole) != whole:
            raise ValueError("a storage of two kinds")
        view = pid[5] if len(pid) > 5 else None
        if view is None:
            return whole
        _, start, length = view  # as torch before 0.4 shared storages
        if not (type(start) is type(length) is int and 0 <= start <= numel - length <= numel):
            raise ValueError("a view reaches past its storage")
        return replace(whole, numel=length, start=start)

    def load_reduce(self) -> None:
        args = self.stack.pop()
        self.stack[-1] = _make(self.stack[-1], args)

    def load_newobj_ex(self) -> None:
        kwargs = self.stack.pop()
        self.load_reduce()
        if kwargs and isinstance(self.stack[-1], Stub):
            self.stack[-1].items["kwargs"] = kwargs

    def load_inst(self) -> None:
        module, name = (self.readline()[:-1].decode("ascii") for _ in range(2))
        args = self.pop_mark()
        self.append(_make(self.find_class(module, name), tuple(args)))

    def load_obj(self) -> None:
        kind, *args = self.pop_mark()
        self.append(_make(kind, tuple(args)))

    def load_build(self) -> None:
        state = self.stack.pop()
        target = self.stack[-1]
        if isinstance(target, Stub):
            target.state = state
        elif not isinstance(target, (OrderedDict, StoredTensor)):  # attributes of those say nothing about the weights
            raise ValueError("state for something that has none")

    def _extend(self, values: list[Any]) -> None:
        target = self.stack[-1]
        if isinstance(target, Stub):
            target.values.extend(values)
        elif type(target) is list:
            target.extend(values)
        else:
            raise ValueError("items for something that is not a list")

    def load_append(self) -> None:
        self._extend([self.stack.pop()])

    def load_appends(self) -> None:
        self._extend(self.pop_mark())

    def _set(self, pairs: list[Any]) -> None:
        target = self.stack[-1]
        into = target.items if isinstance(target, Stub) else target
        if not isinstance(into, dict):
            raise ValueError("entries for something that is not a dict")
        for key, value in zip(pairs[::2], pairs[1::2], strict=True):
            into[_key(key)] = value

    def load_setitem(self) -> None:
        value = self.stack.pop()
        self._set([self.stack.pop(), value])

    def load_setitems(self) -> None:
        self._set(self.pop_mark())

    def load_dict(self) -> None:
        pairs = self.pop_mark()
        self.append({})
        self._set(pairs)

    def load_additems(self) -> None:
        items = self.pop_mark()
        if type(self.stack[-1]) is not set:
            raise ValueError("members for something that is not a set")
        self.stack[-1].update(map(_key, items))

    def load_frozenset(self) -> None:
        self.append(frozenset(map(_key, self.pop_mark())))

    dispatch.update(
        {
            pickle.REDUCE[0]: load_reduce,
            pickle.NEWOBJ[0]: load_reduce,
            pickle.NEWOBJ_EX[0]: load_newobj_ex,
            pickle.INST[0]: load_inst,
            pickle.OBJ[0]: load_obj,
            pickle.BUILD[0]: load_build,
            pickle.APPEND[0]: load_append,
            pickle.APPENDS[0]: load_appends,
            pickle.SETITEM[0]: load_setitem,
            pickle.SETITEMS[0]: load_setitems,
            pickle.DICT[0]: load_dict,
            pickle.ADDITEMS[0]: load_additems,
            pickle.FROZENSET[0]: load_frozenset,
        }
    )


def _checked(tree: Any) -> Any:
    """Raises: ValueError for nests too deep or too wide to go through, and for numbers too long to be written down."""
    known: dict[int, tuple[int, int]] = {}
    num_items = 0

    def measure(node: Any, depth: int) -> tuple[int, int]:
        """Levels below, and how many items there are if each were written out."""
        nonlocal num_items
        if isinstance(node, int) and node.bit_length() > MAX_BITS:
            raise ValueError(f"a number of {node.bit_length()} bits")
        if not isinstance(node, (dict, list, tuple, set, frozenset, Stub)):
            return 0, 1
        if id(node) not in known:
            if depth >= MAX_DEPTH:
                raise ValueError(f"it nests deeper than {MAX_DEPTH} levels")
            known[id(node)] = 0, 0  # what contains itself is cut here
            items: Iterable[Any] = () if isinstance(node, Stub) else node
            if isinstance(node, dict):
                items = chain(node, node.values())
            elif isinstance(node, Stub):
                items = (node.args, node.state, node.items, node.values)
            below = [measure(item, depth + 1) for item in items]
            num_items += len(below)
            known[id(node)] = 1 + max((h for h, _ in below), default=0), 1 + sum(n for _, n in below)
        height, size = known[id(node)]
        if depth + height > MAX_DEPTH:
            raise ValueError(f"it nests deeper than {MAX_DEPTH} levels")
        return height, size

    _, size = measure(tree, 0)
    if size > MAX_COPIES and size > 10 * num_items:
        raise ValueError("it refers to the same items again and again")
    return tree


class _Bounded:
    """A file of which a pickle may read so much and no more, whatever lengths it states."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file, self._left = file, MAX_PICKLE

    def read(self, size: int) -> bytes:
        if not 0 <= size <= self._left:
            raise EOFError(f"it states a length of {size} bytes")
        self._left -= size
        return self._file.read(size)

    def readline(self) -> bytes:
        line = self._file.readline(self._left)
        self._left -= len(line)
        return line


def read_stream(file: IO[bytes]) -> tuple[Any, dict[str, Storage]]:
    """Read the pickle that begins where the file stands, and list the storages it refers to by their keys.

    Raises: ValueError where it is damaged.
    """
    return run(Machine(_Bounded(file)))


def read_pickle(data: bytes) -> Any:
    """Turn a pickle into dicts, lists, numbers, texts, Stubs and StoredTensors.

    Raises: ValueError where it is damaged.
    """
    return run(Machine(io.BytesIO(data)))[0]


def run(machine: Machine) -> tuple[Any, dict[str, Storage]]:
    """Let a machine read its pickle: what it says, and its storages by their keys. Raises: ValueError."""
    try:
        return machine.load(), machine.storages
    except BROKEN as error:
        raise ValueError(f"its pickle is damaged ({type(error).__name__}: {ascii(str(error))[1:-1][:200]})") from None
