"""What a torch checkpoint's pickle says, read without running it.

A pickle is a program for a small stack machine, and two of its instructions import and call whatever the file names. This one
has no such instructions: a name is one of NAMES or the file is refused, and calling one of them makes a plain value of ours.
Nothing is imported, no object of another library is made, and every instruction that torch.save does not write in protocol 2
is refused. The instructions are those of CPython's pickletools.

    collections.OrderedDict            a dictionary
    torch FloatStorage ...             the type of a storage
    (persistent id of a storage)       Storage: type, key of its member, elements
    torch._utils._rebuild_tensor_v2    Tensor: a storage, the first element, shape, strides
    torch._utils._rebuild_parameter    the tensor in it
"""

from __future__ import annotations

import math
import re
import struct
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from nybble.errors import shown

MOST_BYTES = 4 << 20
"""Of data.pkl: about 120 for each tensor. The slowest instructions take a second for so many."""
MOST_DIMENSIONS = 32

STORAGES = {
    "DoubleStorage": "F64",
    "FloatStorage": "F32",
    "HalfStorage": "F16",
    "BFloat16Storage": "BF16",
    "LongStorage": "I64",
    "IntStorage": "I32",
    "ShortStorage": "I16",
    "CharStorage": "I8",
    "ByteStorage": "U8",
    "BoolStorage": "BOOL",
    "ComplexFloatStorage": "C64",
}
"""Class of torch -> dtype tag of safetensors."""

ORDERED, TENSOR, PARAMETER = "collections.OrderedDict", "torch._utils._rebuild_tensor_v2", "torch._utils._rebuild_parameter"
NAMES = {ORDERED, TENSOR, PARAMETER, *(f"torch.{name}" for name in STORAGES)}

_KEY = re.compile(r"[0-9]{1,9}")
_MARK = object()


@dataclass(frozen=True, slots=True, eq=False)
class Name:
    """One of NAMES."""

    name: str


@dataclass(frozen=True, slots=True, eq=False)
class Storage:
    """A run of numbers in a member of the file."""

    dtype: str
    key: str
    elements: int


@dataclass(frozen=True, slots=True, eq=False)
class Tensor:
    """A view of a storage; offset and strides in elements."""

    storage: Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


class _Ordered(dict[str, Any]):
    """What an OrderedDict becomes: unlike a plain dictionary it may be given attributes, which are dropped."""


def read_pickle(data: bytes) -> dict[str, Tensor]:
    """Name -> tensor of a state dictionary. Raises ValueError, saying at which byte, for a pickle that is anything else."""
    if len(data) > MOST_BYTES:
        raise ValueError(f"it has {len(data)} bytes (limit {MOST_BYTES})")
    machine = _Machine(data)
    try:
        value = machine.run()
    except (IndexError, KeyError, TypeError, struct.error, UnicodeDecodeError, OverflowError) as error:
        # of an empty stack, a memo that was never set, a value of the wrong kind, an instruction cut short
        raise ValueError(f"instruction before byte {machine.at} cannot be carried out ({type(error).__name__})") from error
    if not isinstance(value, dict):
        raise ValueError(f"it holds a {type(value).__name__.lstrip('_')}, not a dictionary of tensors")
    for name, tensor in value.items():
        if not isinstance(tensor, Tensor):
            raise ValueError(f"{shown(name)} is a {type(tensor).__name__.lstrip('_')}, not a tensor")
    return value


class _Machine:
    """The stack, the memo, and a place in the program."""

    def __init__(self, data: bytes) -> None:
        self.data, self.at = data, 0
        self.stack: list[Any] = []
        self.memo: dict[int, Any] = {}

    def run(self) -> Any:
        """The value that the program leaves."""
        if self.data[:2] != b"\x80\x02":
            raise ValueError("it is not of pickle protocol 2, which torch.save writes")
        self.at = 2
        while True:
            code = self.data[self.at]
            self.at += 1
            if code == 0x2E:  # "."
                break
            instruction = _INSTRUCTIONS.get(code)
            if instruction is None:
                raise ValueError(f"instruction {code:#04x} at byte {self.at - 1} is none that torch.save writes")
            instruction(self)
        if self.at != len(self.data):
            raise ValueError(f"{len(self.data) - self.at} bytes follow its end")
        if len(self.stack) != 1:
            raise ValueError(f"it leaves {len(self.stack)} values, not one")
        return self.stack[0]

    def take(self, layout: str) -> Any:
        """A number of the program."""
        (value,) = struct.unpack_from(layout, self.data, self.at)
        self.at += struct.calcsize(layout)
        return value

    def text(self, length: int) -> str:
        """A text of the program."""
        if length > len(self.data) - self.at:
            raise ValueError(f"a text of {length} bytes at byte {self.at} is longer than the rest")
        self.at += length
        return self.data[self.at - length : self.at].decode("utf-8")

    def line(self) -> str:
        """The rest of a line of the program."""
        end = self.data.index(b"\n", self.at, self.at + 200)
        value = self.data[self.at : end].decode("ascii")
        self.at = end + 1
        return value

    def since_mark(self) -> list[Any]:
        """All values above the topmost mark, which is taken away with them."""
        for place in range(len(self.stack) - 1, -1, -1):
            if self.stack[place] is _MARK:
                values = self.stack[place + 1 :]
                del self.stack[place:]
                return values
        raise IndexError("no mark")

    def pop(self, kind: Any) -> Any:
        """The topmost value, which must be of a kind."""
        value = self.stack.pop()
        if type(value) is not kind:
            raise TypeError(type(value).__name__)
        return value

    def push(self, value: Any) -> None:
        self.stack.append(value)

    def tuple_of(self, count: int) -> None:
        """The topmost values become a tuple."""
        values = self.stack[len(self.stack) - count :]
        if len(values) != count or any(value is _MARK for value in values):
            raise IndexError("a tuple of too few values")
        del self.stack[len(self.stack) - count :]
        self.stack.append(tuple(values))

    def set_items(self, pairs: list[Any]) -> None:
        """Put keys and values into the dictionary on top."""
        target = self.stack[-1]
        if not isinstance(target, dict) or len(pairs) % 2:
            raise TypeError("no dictionary, or a key without a value")
        for key, value in zip(pairs[::2], pairs[1::2], strict=True):
            if type(key) is not str:  # a tuple could take a year to hash
                raise TypeError("a key that is no text")
            if key in target:
                raise ValueError(f"key {shown(key)} stands twice")
            target[key] = value

    def append(self, values: list[Any]) -> None:
        target = self.stack[-1]
        if type(target) is not list:
            raise TypeError("no list")
        target.extend(values)

    def put(self, key: int) -> None:
        if self.stack[-1] is _MARK:
            raise TypeError("a mark in the memo")
        self.memo[key] = self.stack[-1]

    def name(self) -> None:
        module, name = self.line(), self.line()
        if f"{module}.{name}" not in NAMES:
            raise ValueError(f"it names {shown(f'{module}.{name}')}, which is no part of a state dictionary; nothing was run")
        self.stack.append(Name(f"{module}.{name}"))

    def persistent(self) -> None:
        """A storage: ("storage", its class, key, device, elements)."""
        kind, cls, key, device, elements = self.pop(tuple)
        if kind != "storage" or type(cls) is not Name or not cls.name.startswith("torch.") or cls.name.startswith("torch._"):
            raise TypeError("no storage")
        if type(key) is not str or not _KEY.fullmatch(key) or type(device) is not str:
            raise ValueError("a storage without the number of its member")
        if type(elements) is not int or elements < 0:
            raise ValueError(f"storage {key} has a number of elements that is none")
        self.stack.append(Storage(STORAGES[cls.name.removeprefix("torch.")], key, elements))

    def call(self) -> None:
        arguments, function = self.pop(tuple), self.pop(Name)
        if function.name == ORDERED and not arguments:
            self.stack.append(_Ordered())
        elif function.name == TENSOR:
            self.stack.append(_tensor(*arguments))
        elif function.name == PARAMETER:
            tensor, _, hooks = arguments
            if type(tensor) is not Tensor or hooks:
                raise TypeError("no parameter")
            self.stack.append(tensor)
        else:
            raise ValueError(f"it calls {function.name} with {len(arguments)} arguments")

    def build(self) -> None:
        """Attributes of a dictionary: torch keeps the versions of modules there. They are dropped."""
        attributes = self.pop(dict)
        if type(self.stack[-1]) is not _Ordered or attributes.keys() != {"_metadata"}:
            raise ValueError("it gives attributes to something that has none in a state dictionary")


def _tensor(storage: Any, offset: Any, shape: Any, strides: Any, gradient: Any, hooks: Any, *more: Any) -> Tensor:
    """A view that stays inside its storage and does not repeat it."""
    if type(storage) is not Storage or type(shape) is not tuple or type(strides) is not tuple or hooks or any(more):
        raise TypeError("no tensor")
    if not all(type(n) is int and 0 <= n < 1 << 48 for n in (offset, *shape, *strides)):
        raise ValueError("a tensor with an offset, shape or stride that is negative, immense or no number")
    if len(shape) != len(strides) or len(shape) > MOST_DIMENSIONS:
        raise ValueError(f"a tensor of {len(shape)} dimensions and {len(strides)} strides (limit {MOST_DIMENSIONS})")
    elements = math.prod(shape)
    last = offset + sum((n - 1) * stride for n, stride in zip(shape, strides, strict=True))
    if elements > storage.elements or (elements and last >= storage.elements):
        raise ValueError(f"a tensor reaches element {last} of storage {storage.key}, which has {storage.elements}")
    return Tensor(storage, offset, shape, strides)


def _whole(machine: _Machine) -> None:
    """A whole number of up to 8 bytes, length first."""
    length = machine.take("<B")
    if length > 8 or length > len(machine.data) - machine.at:
        raise ValueError(f"a whole number of {length} bytes at byte {machine.at}")
    machine.at += length
    machine.push(int.from_bytes(machine.data[machine.at - length : machine.at], "little", signed=True))


_INSTRUCTIONS: dict[int, Callable[[_Machine], None]] = {
    ord("("): lambda m: m.push(_MARK),
    ord(")"): lambda m: m.push(()),
    ord("]"): lambda m: m.push([]),
    ord("}"): lambda m: m.push({}),
    ord("N"): lambda m: m.push(None),
    0x88: lambda m: m.push(True),
    0x89: lambda m: m.push(False),
    ord("K"): lambda m: m.push(m.take("<B")),
    ord("M"): lambda m: m.push(m.take("<H")),
    ord("J"): lambda m: m.push(m.take("<i")),
    ord("G"): lambda m: m.push(m.take(">d")),
    0x8A: _whole,
    ord("X"): lambda m: m.push(m.text(m.take("<I"))),
    ord("t"): lambda m: m.push(tuple(m.since_mark())),
    0x85: lambda m: m.tuple_of(1),
    0x86: lambda m: m.tuple_of(2),
    0x87: lambda m: m.tuple_of(3),
    ord("q"): lambda m: m.put(m.take("<B")),
    ord("r"): lambda m: m.put(m.take("<I")),
    ord("h"): lambda m: m.push(m.memo[m.take("<B")]),
    ord("j"): lambda m: m.push(m.memo[m.take("<I")]),
    ord("s"): lambda m: m.set_items([m.stack.pop(-2), m.stack.pop()]),
    ord("u"): lambda m: m.set_items(m.since_mark()),
    ord("a"): lambda m: m.append([m.stack.pop()]),
    ord("e"): lambda m: m.append(m.since_mark()),
    ord("c"): lambda m: m.name(),
    ord("Q"): lambda m: m.persistent(),
    ord("R"): lambda m: m.call(),
    ord("b"): lambda m: m.build(),
}
