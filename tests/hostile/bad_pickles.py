"""Pickled checkpoints that run code, lie about their storages, or are zip files of another kind."""

from __future__ import annotations

import struct
import zipfile
from collections.abc import Callable, Mapping, Sequence
from io import BytesIO
from typing import Any

from catalogue import Case, of_bytes

ZEROS = {"0": bytes(16)}
END = b"."
VIEW = "torch._utils", "_rebuild_tensor_v2"


def name(module: str, attribute: str) -> bytes:
    """The instruction that imports something."""
    return f"c{module}\n{attribute}\n".encode()


def text(value: str) -> bytes:
    return b"X" + struct.pack("<I", len(value.encode())) + value.encode()


def whole(value: int) -> bytes:
    """A whole number: 4 bytes where it fits, 8 where not."""
    if -(1 << 31) <= value < 1 << 31:
        return b"J" + struct.pack("<i", value)
    return b"\x8a\x08" + struct.pack("<q", value)


def numbers(values: Sequence[int]) -> bytes:
    return b"(" + b"".join(map(whole, values)) + b"t"


def storage(key: Any = "0", elements: int = 4, dtype: str = "FloatStorage", module: str = "torch") -> bytes:
    """A persistent id."""
    identity = text(key) if isinstance(key, str) else whole(key)
    return b"(" + text("storage") + name(module, dtype) + identity + text("cpu") + whole(elements) + b"tQ"


def tensor(
    held: bytes | None = None, offset: int = 0, shape: Sequence[int] = (4,), strides: Sequence[int] = (1,), end: bytes = b""
) -> bytes:
    """A call that makes a tensor."""
    arguments = (held or storage()) + whole(offset) + numbers(shape) + numbers(strides) + b"\x89" + name(*ORDERED) + b")R"
    return name(*VIEW) + b"(" + arguments + end + b"tR"


ORDERED = "collections", "OrderedDict"


def state(*values: bytes, names: Sequence[str] = "abcdefgh") -> bytes:
    """A program that leaves a dictionary of values."""
    return b"\x80\x02}(" + b"".join(text(key) + value for key, value in zip(names, values, strict=False)) + b"u."


def archive(pickle: bytes, storages: Mapping[str, bytes] = ZEROS, prefix: str = "archive", **more: bytes) -> bytes:
    """A checkpoint as torch writes it."""
    return zipped({f"{prefix}/data.pkl": pickle, **{f"{prefix}/data/{key}": data for key, data in storages.items()},
                   f"{prefix}/version": b"3\n", **{f"{prefix}/{key}": data for key, data in more.items()}})  # fmt: skip


def zipped(members: Mapping[str, bytes], compression: int = zipfile.ZIP_STORED) -> bytes:
    """A zip file of these members."""
    out = BytesIO()
    with zipfile.ZipFile(out, "w", compression) as file:
        for key, data in members.items():
            file.writestr(zipfile.ZipInfo(key), data, compression)
    return out.getvalue()


def good() -> bytes:
    """A checkpoint that is read."""
    return archive(state(tensor()))


def directory(data: bytes) -> int:
    """Where its directory begins."""
    return int.from_bytes(data[-6:-2], "little")


def put(data: bytes, at: int, new: bytes) -> bytes:
    """A file with some bytes changed; counted from the end where negative."""
    at %= len(data)
    return data[:at] + new + data[at + len(new) :]


def in_directory(field: int, new: bytes, entry: int = 0) -> bytes:
    """A good file with a field of an entry of its directory changed."""
    data = good()
    at = directory(data)
    for _ in range(entry):
        sizes = struct.unpack_from("<3H", data, at + 28)
        at += 46 + sum(sizes)
    return put(data, at + field, new)


def call(module: str, attribute: str, argument: str = "touch canary") -> bytes:
    """A state whose tensor is what a function of the system gives."""
    return archive(state(name(module, attribute) + b"(" + text(argument) + b"tR"))


def same_place() -> bytes:
    """Two members of the directory that are the same bytes of the file."""
    data = archive(state(tensor()), {"0": bytes(16), "1": bytes(16)})
    at = directory(data)
    entries = []
    while data[at : at + 4] == b"PK\1\2":
        entries.append(at)
        at += 46 + sum(struct.unpack_from("<3H", data, at + 28))
    return put(data, entries[2] + 42, data[entries[1] + 42 : entries[1] + 46])


GADGETS = (
    "os.system", "posix.system", "nt.system", "os.popen", "os.execv", "subprocess.Popen", "subprocess.check_output",
    "builtins.eval", "builtins.exec", "builtins.compile", "builtins.__import__", "builtins.getattr", "builtins.open",
    "__builtin__.eval",
    "importlib.import_module", "runpy.run_path", "runpy._run_code", "pty.spawn", "code.InteractiveInterpreter",
    "timeit.timeit", "pdb.run", "bdb.Bdb", "cProfile.run", "doctest.debug_script", "trace.Trace", "pydoc.pipepager",
    "pickle.loads", "marshal.loads", "types.CodeType", "types.FunctionType", "ctypes.CDLL", "socket.socket", "webbrowser.open",
    "shutil.rmtree", "operator.attrgetter", "operator.methodcaller", "functools.partial", "logging.config.listen", "pip.main",
    "asyncio.create_subprocess_shell", "urllib.request.urlopen", "multiprocessing.Process", "torch.load", "torch.hub.load",
    "torch.storage._load_from_bytes", "torch.jit.load", "torch.utils.cpp_extension.load", "torch._utils._rebuild_sparse_tensor",
    "torch._tensor._rebuild_from_type_v2", "torch.serialization.load", "torch.nn.modules.linear.Linear", "torch.ops.load_library",
    "numpy.load", "numpy.core.multiarray._reconstruct", "numpy.testing._private.utils.runstring", "transformers.AutoModel",
)  # fmt: skip
"""What scanners of pickles list, and what they were shown to miss."""

UNKNOWN = "is none that torch.save writes"
CANNOT = "cannot be carried out"
ZIP = "is not a zip file as torch writes it"

BYTES: dict[str, tuple[Callable[[], bytes], str]] = {
    f"calls {gadget}": ((lambda gadget=gadget: call(*gadget.rsplit(".", 1))), f"it names '{gadget}'.*nothing was run")
    for gadget in GADGETS
} | {
    "a name behind dots": (lambda: call("torch._utils", "os.system"), "it names"),
    "a module behind dots": (lambda: call("collections.OrderedDict.os", "system"), "it names"),
    "a name in capitals": (lambda: call("Torch", "FloatStorage"), "it names"),
    "a name that is not ASCII": (lambda: archive(state(b"ct\xc3\xb6rch\nsystem\n)R")), CANNOT),
    "a name without an end": (lambda: archive(b"\x80\x02c" + b"a" * 10_000), "is not read"),
    "imported from the stack": (lambda: archive(state(text("os") + text("system") + b"\x93(" + text("true") + b"tR")), UNKNOWN),
    "an instance by INST": (lambda: archive(state(b"(" + text("true") + b"ios\nsystem\n")), UNKNOWN),
    "an instance by OBJ": (lambda: archive(state(b"(" + name(*ORDERED) + b"o")), UNKNOWN),
    "an instance by NEWOBJ": (lambda: archive(state(name(*ORDERED) + b")\x81")), UNKNOWN),
    "an instance by NEWOBJ_EX": (lambda: archive(state(name(*ORDERED) + b")}\x92")), UNKNOWN),
    "a registered extension": (lambda: archive(state(b"\x82\x01)R")), UNKNOWN),
    "a text of protocol 0": (lambda: archive(state(b"S'a'\n")), UNKNOWN),
    "a number of protocol 0": (lambda: archive(state(b"I1\n")), UNKNOWN),
    "a persistent id of protocol 0": (lambda: archive(state(b"P0\n")), UNKNOWN),
    "a frame of protocol 4": (lambda: archive(b"\x80\x02\x95" + bytes(8) + b"}."), UNKNOWN),
    "something popped": (lambda: archive(b"\x80\x02}00."), UNKNOWN),
    "something doubled": (lambda: archive(b"\x80\x02}2s."), UNKNOWN),
    "protocol 0": (lambda: archive(b"(dp0\n."), "not of pickle protocol 2"),
    "protocol 4": (lambda: archive(b"\x80\x04}."), "not of pickle protocol 2"),
    "protocol 5": (lambda: archive(b"\x80\x05}."), "not of pickle protocol 2"),
    "protocol 255": (lambda: archive(b"\x80\xff}."), "not of pickle protocol 2"),
    "protocol 2 and then 4": (lambda: archive(b"\x80\x02\x80\x04}."), UNKNOWN),
    "nothing": (lambda: archive(b""), "not of pickle protocol 2"),
    "no end": (lambda: archive(b"\x80\x02}"), CANNOT),
    "something behind the end": (lambda: archive(state(tensor()) + state(tensor())), "bytes follow its end"),
    "nothing left": (lambda: archive(b"\x80\x02."), "leaves 0 values"),
    "two values left": (lambda: archive(b"\x80\x02}}."), "leaves 2 values"),
    "a mark left": (lambda: archive(b"\x80\x02(."), "not a dictionary of tensors"),
    "no mark": (lambda: archive(b"\x80\x02}u."), CANNOT),
    "a mark in a tuple": (lambda: archive(b"\x80\x02(\x85."), CANNOT),
    "a mark remembered": (lambda: archive(b"\x80\x02(q\0h\0."), CANNOT),
    "remembers what was never there": (lambda: archive(b"\x80\x02h\x07."), CANNOT),
    "a key without a value": (lambda: archive(b"\x80\x02}(" + text("a") + b"u."), CANNOT),
    "a key that is a tuple of tuples, 2^40 in all": (lambda: archive(b"\x80\x02})" + b"q\0h\0\x86" * 40 + b"Ns."), CANNOT),
    "a key twice": (lambda: archive(state(tensor(), tensor(), names="aa")), "key 'a' stands twice"),
    "100,000 tuples in each other": (lambda: archive(b"\x80\x02)" + b"\x85" * 100_000 + b"."), "not a dictionary of tensors"),
    "a dictionary that holds itself": (lambda: archive(b"\x80\x02}q\0" + text("a") + b"h\0s."), "'a' is a dict, not a tensor"),
    "a text longer than the file": (lambda: archive(b"\x80\x02X\xff\xff\xff\xffabc."), "longer than the rest"),
    "a text that is not UTF-8": (lambda: archive(b"\x80\x02X\1\0\0\0\xff."), CANNOT),
    "a number of 255 bytes": (lambda: archive(b"\x80\x02\x8a\xff" + b"\1" * 255 + b"."), "a whole number of 255 bytes"),
    "calls a text": (lambda: archive(state(text("os.system") + b"(tR")), CANNOT),
    "calls a type of storage": (
        lambda: archive(state(name("torch", "FloatStorage") + b"(" + whole(1 << 40) + b"tR")),
        "it calls",
    ),
    "calls OrderedDict with something": (lambda: archive(state(name(*ORDERED) + b"(]tR")), "it calls"),
    "attributes for a tensor": (lambda: archive(state(tensor() + b"}" + text("__setstate__") + b"Nsb")), "gives attributes"),
    "attributes for a plain dictionary": (lambda: archive(state(b"}}" + text("_metadata") + b"Nsb")), "gives attributes"),
    "other attributes for a dictionary": (
        lambda: archive(state(name(*ORDERED) + b")R}" + text("__class__") + b"Nsb")),
        "gives attributes",
    ),
    "a hook on a tensor": (
        lambda: archive(
            state(
                name(*VIEW)
                + b"("
                + storage()
                + whole(0)
                + numbers([4])
                + numbers([1])
                + b"\x89"
                + b"}"
                + text("a")
                + name("os", "system")
                + b"stR"
            )
        ),
        "it names 'os.system'",
    ),
    "a hook that is a dictionary": (
        lambda: archive(
            state(name(*VIEW) + b"(" + storage() + whole(0) + numbers([4]) + numbers([1]) + b"\x89}" + text("a") + b"Ns" + b"tR")
        ),
        CANNOT,
    ),
    "a tensor of too few parts": (lambda: archive(state(name(*VIEW) + b"(" + storage() + b"tR")), CANNOT),
    "a tensor that is a number": (lambda: archive(state(whole(3))), "is a int, not a tensor"),
    "a list of tensors": (lambda: archive(b"\x80\x02](" + tensor() + b"e."), "holds a list"),
    "a storage of no type": (lambda: archive(state(tensor(storage(dtype="UntypedStorage")))), "it names 'torch.UntypedStorage'"),
    "a storage that is a function": (
        lambda: archive(state(tensor(storage(dtype="_rebuild_parameter", module="torch._utils")))),
        CANNOT,
    ),
    "a storage behind a path": (lambda: archive(state(tensor(storage("../../data.pkl")))), "without the number of its member"),
    "a storage with a number for a name": (lambda: archive(state(tensor(storage(0)))), "without the number of its member"),
    "a storage of fewer than no elements": (lambda: archive(state(tensor(storage(elements=-4)))), "number of elements"),
    "a persistent id that is a text": (lambda: archive(state(text("storage") + b"Q")), CANNOT),
    "a storage that is not there": (lambda: archive(state(tensor(storage("7")))), "the file has none"),
    "a storage longer than its member": (lambda: archive(state(tensor(storage(elements=5), shape=(5,)))), "needs 20 bytes"),
    "a storage shorter than its member": (lambda: archive(state(tensor(storage(elements=3), shape=(3,)))), "needs 12 bytes"),
    "a storage of another type than its member": (
        lambda: archive(state(tensor(storage(dtype="DoubleStorage")))),
        "needs 32 bytes",
    ),
    "a tensor longer than its storage": (
        lambda: archive(state(tensor(shape=(5,)))),
        "reaches element 4 of storage 0, which has 4",
    ),
    "a tensor that begins behind its storage": (lambda: archive(state(tensor(offset=4, shape=(1,)))), "reaches element 4"),
    "a tensor that begins before its storage": (lambda: archive(state(tensor(offset=-1))), "negative, immense or no number"),
    "a tensor with a stride beyond its storage": (
        lambda: archive(state(tensor(shape=(2, 2), strides=(3, 1)))),
        "reaches element 4",
    ),
    "a tensor with a negative stride": (lambda: archive(state(tensor(strides=(-1,)))), "negative, immense or no number"),
    "a tensor with a stride that wraps around": (
        lambda: archive(state(tensor(shape=(2, 2), strides=(1 << 62, 1)))),
        "negative, immense or no number",
    ),
    "a tensor of 2^62 elements in 4": (
        lambda: archive(state(tensor(shape=(1 << 31, 1 << 31), strides=(0, 0)))),
        "reaches element 0",
    ),
    "a tensor of negative size": (lambda: archive(state(tensor(shape=(-2, -2), strides=(1, 1)))), "negative"),
    "a tensor of 40 dimensions": (lambda: archive(state(tensor(shape=(1,) * 40, strides=(1,) * 40))), "of 40 dimensions"),
    "a tensor of more strides than dimensions": (lambda: archive(state(tensor(strides=(1, 1)))), "1 dimensions and 2 strides"),
    "a thousand tensors of one storage": (
        lambda: archive(
            state(*[tensor(storage(elements=1 << 16), shape=(1 << 16,))] * 1000, names=[f"{i:03}" for i in range(1000)]),
            {"0": bytes(1 << 18)},
        ),
        r"holds tensors of 262144000 bytes \(limit 4 times\)",
    ),
    "empty": (lambda: b"", "is empty"),
    "a line of text": (lambda: b"version https://git-lfs.github.com/spec/v1\n", ZIP),
    "a pickle without a zip file": (lambda: state(tensor()), ZIP),
    "compressed": (lambda: zipped({"a/data.pkl": state(), "a/version": b"3"}, zipfile.ZIP_DEFLATED), "is compressed"),
    "compressed a thousandfold": (
        lambda: zipped({"a/data.pkl": state(), "a/data/0": bytes(50_000_000)}, zipfile.ZIP_DEFLATED),
        "is compressed",
    ),
    "compressed with LZMA": (lambda: zipped({"a/data.pkl": state()}, zipfile.ZIP_LZMA), "is compressed"),
    "says that it is not compressed": (
        lambda: put(x := zipped({"a/data.pkl": state(tensor())}, zipfile.ZIP_DEFLATED), directory(x) + 10, b"\0\0"),
        "takes|is not what its directory says",
    ),
    "encrypted": (lambda: in_directory(8, b"\1\0"), "is encrypted"),
    "patched": (lambda: in_directory(8, b"\x20\0"), "is encrypted"),
    "with a masked header": (lambda: in_directory(8, b"\0\x20"), "is encrypted"),
    "with an unknown flag": (lambda: in_directory(8, b"\2\0"), "is flagged"),
    "other flags in the directory": (lambda: in_directory(8, b"\0\x08"), "is not what its directory says"),
    "a member in the folder above": (lambda: zipped({"a/data.pkl": state(), "a/../../x": b""}), "member name .* is not one"),
    "a member at the root": (lambda: zipped({"/etc/passwd": b"", "a/data.pkl": state()}), "member name .* is not one"),
    "a member backwards": (lambda: zipped({"a/data.pkl": state(), "a\\..\\x": b""}), "member name .* is not one"),
    "a member with a NUL": (lambda: zipped({"a/data.pkl": state(), "a/dbta.pkl": b""}).replace(b"dbta", b"d\0ta"), "member name"),
    "a member of another kind": (lambda: zipped({"a/data.pkl": state(), "a/code/model.py": b""}), "it holds 'code/model.py'"),
    "two folders": (lambda: zipped({"a/data.pkl": state(), "b/data.pkl": state()}), "have 2 first names"),
    "no data.pkl": (lambda: zipped({"a/version": b"3"}), "has no data.pkl"),
    "data.pkl twice": (lambda: _twice(), "'a/data.pkl' stands twice"),
    "another name in the directory": (lambda: in_directory(46, b"brchive/data.pkl"), "is not what its directory says"),
    "members over each other": (same_place, "is not what its directory says|lies over"),
    "a member that claims the file": (
        lambda: in_directory(20, struct.pack("<II", 500, 500)),
        "size that its directory says|over",
    ),
    "a member of 4 GiB": (lambda: in_directory(20, b"\xff" * 8), "an extra field of its directory is broken"),
    "a member behind the file": (lambda: in_directory(42, b"\xff\xff\xff\x7f"), "lies behind the members"),
    "a member on another disk": (lambda: in_directory(34, b"\1\0"), "takes|is not"),
    "another checksum": (lambda: in_directory(16, b"\0\0\0\0"), "size that its directory says|checksum"),
    "a flipped bit in a storage": (lambda: archive(state(tensor())).replace(bytes(16), b"\1" + bytes(15), 1), "another checksum"),
    "a directory of 65,535 members": (lambda: put(good(), -14, b"\xff\xff\xff\xff"), "ends within an entry"),
    "a directory of too few members": (lambda: put(good(), -14, b"\1\0\1\0"), "its directory of 1 members ends"),
    "a directory elsewhere": (lambda: put(good(), -6, b"\0\0\0\0"), "does not end at"),
    "one part of several": (lambda: put(good(), -18, b"\1\0"), "one part of several"),
    "a comment that hides something": (lambda: put(good(), -2, b"\3\0") + b"abc", "does not end with a directory"),
    "something before it": (lambda: b"#!/bin/sh\n" + good(), "does not begin with a member"),
    "something behind it": (lambda: good() + b"\0", "does not end with a directory"),
    "cut short": (lambda: good()[:-1], "does not end with a directory"),
    "half of it": (lambda: good()[: len(good()) // 2], "does not end with a directory"),
    "two files one behind the other": (lambda: good() + good(), "does not end at"),
    "of big-endian numbers": (lambda: archive(state(tensor()), byteorder=b"big"), "is not little-endian"),
    "of version 99": (lambda: zipped({"a/data.pkl": state(), "a/version": b"99\n"}), "of a version"),
    "a tensor's name that leaves the folder": (lambda: archive(state(b"}", names=["../x"])), "is a dict, not a tensor"),
}


def _twice() -> bytes:
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # zipfile's own, about what this is for
        out = BytesIO()
        with zipfile.ZipFile(out, "w") as file:
            file.writestr("a/data.pkl", state())
            file.writestr("a/data.pkl", state(tensor()))
    return out.getvalue()


CASES: dict[str, Case] = {title: Case("pickle", of_bytes(make), match) for title, (make, match) in BYTES.items()}
