"""The directory of a zip file whose members are stored as they are: what torch writes, and nothing a zip file could be besides.

Format: PKWARE's APPNOTE.TXT, sections 4.3 and 4.5. A reader that takes any zip file takes its tricks too: members deflated a
thousandfold, two directories, names that differ between directory and member, members that lie over each other. Here each
member is uncompressed and not encrypted, stands once under a plain name, says the same in both places, and shares no byte with
another; so all of them together are no longer than the file, and reading one is taking bytes [start, end) of it.
"""

from __future__ import annotations

import re
import struct
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

from nybble.errors import FileFormatError, shown

MOST_MEMBERS = 400_000
MOST_NAME = 255
NAME = re.compile(r"[A-Za-z0-9._ +@=-]+(/[A-Za-z0-9._ +@=-]+){1,3}")

_END, _END_64, _LOCATOR = struct.Struct("<4s4H2LH"), struct.Struct("<4sQ2H2L4Q"), struct.Struct("<4sLQL")
_CENTRAL, _LOCAL = struct.Struct("<4s6H3L5H2L"), struct.Struct("<4s5H3L2H")
_ENCRYPTED = 1 << 0 | 1 << 5 | 1 << 6 | 1 << 13  # or patched, or its header masked
_SIZES_BEHIND = 1 << 3
_UTF8 = 1 << 11
_MAX_16, _MAX_32 = 0xFFFF, 0xFFFFFFFF


@dataclass(frozen=True, slots=True)
class Member:
    """One member: bytes [start, end) of the file, and their CRC-32 as the directory has it."""

    start: int
    end: int
    crc: int


def members(data: memoryview, path: Path) -> dict[str, Member]:
    """Name -> member of a whole file, in order of the directory. Raises FileFormatError, naming `path`, for any other zip."""
    try:
        count, start, end = _directory(data)
        found: dict[str, Member] = {}
        ranges = [(start, len(data), "the directory")]
        at = start
        for _ in range(count):
            name, header, member, at = _member(data, at, end, start)
            if name in found:
                raise ValueError(f"member {shown(name)} stands twice")
            found[name] = member
            ranges.append((header, member.end, name))
        if at != end:
            raise ValueError(f"its directory of {count} members ends at byte {at}, not {end}")
    except (ValueError, struct.error) as error:
        raise FileFormatError(f"{path} is not a zip file as torch writes it: {error}") from error
    ranges.sort()
    for (_, before, one), (after, _, other) in pairwise(ranges):
        if after < before:
            raise FileFormatError(f"{path} is not a zip file as torch writes it: {shown(one)} lies over {shown(other)}")
    return found


def _directory(data: memoryview) -> tuple[int, int, int]:
    """(members, first byte, end) of the central directory."""
    end = len(data) - _END.size
    if end < 0 or bytes(data[:4]) != b"PK\3\4":
        raise ValueError("it does not begin with a member (legacy files of before torch 1.6 do not)")
    signature, disk, first_disk, here, count, size, start, comment = _END.unpack_from(data, end)
    if signature != b"PK\5\6" or comment:
        raise ValueError("it does not end with a directory (cut short, or followed by something)")
    if disk or first_disk or here != count:
        raise ValueError("it is one part of several")
    locator = end - _LOCATOR.size
    if locator >= 0 and bytes(data[locator : locator + 4]) == b"PK\6\7":
        _, disk, position, disks = _LOCATOR.unpack_from(data, locator)
        if disk or disks != 1 or position != locator - _END_64.size:
            raise ValueError("its 64-bit directory is not where it should be")
        signature, length, _, _, disk, first_disk, here_64, count_64, size_64, start_64 = _END_64.unpack_from(data, position)
        if signature != b"PK\6\6" or length != _END_64.size - 12 or disk or first_disk or here_64 != count_64:
            raise ValueError("its 64-bit directory is broken")
        for short, long, most in ((count, count_64, _MAX_16), (size, size_64, _MAX_32), (start, start_64, _MAX_32)):
            if short not in (long, most):
                raise ValueError("its two directories say different things")
        count, size, start, end = count_64, size_64, start_64, position
    if start + size != end:
        raise ValueError(f"its directory of {size} bytes at {start} does not end at {end}")
    if count > MOST_MEMBERS:
        raise ValueError(f"it has {count} members (limit {MOST_MEMBERS})")
    return count, start, end


def _member(data: memoryview, at: int, end: int, directory: int) -> tuple[str, int, Member, int]:
    """Name, first byte, the member, and where the next entry of the directory begins."""
    if at + _CENTRAL.size > end:
        raise ValueError("its directory ends within an entry")
    (
        signature, _, _, flags, method, _, _, crc, packed, size, name_bytes, extra_bytes, comment_bytes, disk, _, _, header,
    ) = _CENTRAL.unpack_from(data, at)  # fmt: skip
    after = at + _CENTRAL.size + name_bytes + extra_bytes + comment_bytes
    if signature != b"PK\1\2" or after > end or comment_bytes:
        raise ValueError("an entry of its directory is broken")
    at += _CENTRAL.size
    encoded = bytes(data[at : at + min(name_bytes, MOST_NAME + 1)])
    name = encoded.decode("ascii", "backslashreplace")
    if name_bytes > MOST_NAME or not NAME.fullmatch(name) or any(part.strip(".") == "" for part in name.split("/")):
        raise ValueError(f"member name {shown(name)} is not one that torch writes")
    if method != 0:
        raise ValueError(f"member {shown(name)} is compressed; torch stores members as they are")
    if flags & ~(_SIZES_BEHIND | _UTF8):
        raise ValueError(f"member {shown(name)} is {'encrypted' if flags & _ENCRYPTED else f'flagged {flags:#x}'}")
    size, packed, header, disk = _extra(data[at + name_bytes : at + name_bytes + extra_bytes], size, packed, header, disk)
    if disk or packed != size:
        raise ValueError(f"member {shown(name)} of {size} bytes takes {packed}")
    return name, header, _local(data, header, directory, (encoded, name, flags, crc, size)), after


def _extra(extra: memoryview, size: int, packed: int, header: int, disk: int) -> tuple[int, int, int, int]:
    """The four numbers, taken from the 64-bit field where the short one is full."""
    at, values = 0, [size, packed, header, disk]
    wide = [i for i, most in enumerate((_MAX_32, _MAX_32, _MAX_32, _MAX_16)) if values[i] == most]
    seen = False
    while at + 4 <= len(extra):
        kind, length = struct.unpack_from("<HH", extra, at)
        field = extra[at + 4 : at + 4 + length]
        if len(field) != length:
            raise ValueError("an extra field of its directory is cut short")
        if kind == 1:
            if seen or len(field) != sum(4 if i == 3 else 8 for i in wide):
                raise ValueError("a 64-bit field of its directory is broken")
            seen, place = True, 0
            for i in wide:
                width = 4 if i == 3 else 8
                values[i] = int.from_bytes(field[place : place + width], "little")
                place += width
        at += 4 + length
    if at != len(extra) or (wide and not seen):
        raise ValueError("an extra field of its directory is broken")
    return values[0], values[1], values[2], values[3]


def _local(data: memoryview, header: int, directory: int, stated: tuple[bytes, str, int, int, int]) -> Member:
    """The member behind the header that stands before it, which must say what the directory says."""
    encoded, name, flags, crc, size = stated
    if header + _LOCAL.size > directory:
        raise ValueError(f"member {shown(name)} at byte {header} lies behind the members")
    signature, _, local_flags, method, _, _, local_crc, packed, local_size, name_bytes, extra_bytes = _LOCAL.unpack_from(
        data, header
    )
    at = header + _LOCAL.size
    if signature != b"PK\3\4" or bytes(data[at : at + name_bytes]) != encoded or local_flags != flags or method != 0:
        raise ValueError(f"member {shown(name)} is not what its directory says")
    if not flags & _SIZES_BEHIND and (local_crc != crc or packed not in (size, _MAX_32) or local_size not in (size, _MAX_32)):
        raise ValueError(f"member {shown(name)} is not of the size that its directory says")
    if flags & _SIZES_BEHIND and any(value not in (0, stated, _MAX_32) for value, stated in
                                     ((local_crc, crc), (packed, size), (local_size, size))):  # fmt: skip
        raise ValueError(f"member {shown(name)} is not of the size that its directory says")
    start = at + name_bytes + extra_bytes
    if start + size > directory:
        raise ValueError(f"member {shown(name)} of {size} bytes at {start} ends behind the members, at byte {directory}")
    return Member(start, start + size, crc)
