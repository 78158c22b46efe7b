"""The members of a tar archive: all of them, or the archive is refused.

Python's tarfile takes the first header that it cannot read for the end of the archive, skips what
it does not know, and follows sizes that lead backwards. Here every header's checksum must be right,
the members must follow one another without a gap, and after the last one come the two blocks of
zeros that end an archive, and nothing else. Names and sizes may be those of ustar, GNU or pax.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from typing import BinaryIO, NamedTuple

from deit_fast.errors import InputError

_BLOCK = 512
_MAX_EXTENSION_BYTES = 1 << 20  # of a long name or a pax header
_MAX_PADDING = 1 << 20  # zeros at the end; tar pads to 10 KiB if --blocking-factor is not given

_KINDS = {
    **dict.fromkeys([b"0", b"\0", b"7"], "file"), **dict.fromkeys([b"1", b"2"], "link"),
    **dict.fromkeys([b"3", b"4", b"6"], "device"), **dict.fromkeys([b"5", b"D", b"V"], "folder"),
}  # fmt: skip
_LONG_NAME, _LONG_LINK, _PAX, _PAX_GLOBAL = b"L", b"K", (b"x", b"X"), b"g"
_WITHOUT_CONTENT = (b"1", b"2", b"3", b"4", b"5", b"6")  # whatever their size says
_PAX_RECORD = re.compile(rb"([1-9][0-9]{0,6}) ([^=\n]+)=")


class Member(NamedTuple):
    """A member of an archive.

    Attributes:
        name: as stored.
        kind: file, link (hard or symbolic), folder or device.
        offset: of its content in the archive, bytes.
        size: of its content, bytes.
    """

    name: bytes
    kind: str
    offset: int
    size: int


class _Damaged(Exception):
    """A header that does not follow the format; says what is wrong."""


def members(file: BinaryIO, path: str) -> Iterator[Member]:
    """All members in the order of the archive; no content is read.

    Args:
        file: the archive, opened; its position does not matter.
        path: for messages.

    Raises:
        InputError: the archive is damaged, incomplete or has a sparse or unknown member; names the
            archive, the position in bytes and the remedy.
    """
    position = 0
    try:
        while any(header := _read(file, position, _BLOCK)):
            member, position = _member(file, header, position)
            yield member
        _require_end(file, position)
    except _Damaged as error:
        raise InputError(f"{path} is not a complete, plain tar archive: {error}") from None


def read_content(file: BinaryIO, member: Member) -> bytes:
    return os.pread(file.fileno(), member.size, member.offset)


def _member(file: BinaryIO, header: bytes, position: int) -> tuple[Member, int]:
    """The next member and the position after it; its header may follow others that extend it."""
    name, size = None, None
    while True:
        own_size = _checked_size(header, position)
        kind, start = header[156:157], position + _BLOCK
        if kind not in (_LONG_NAME, _LONG_LINK, _PAX_GLOBAL, *_PAX):
            break
        if own_size > _MAX_EXTENSION_BYTES:
            raise _Damaged(f"the header at byte {position} has {own_size} bytes of extensions")
        content = _read(file, start, own_size)
        if kind == _LONG_NAME:
            name = content.partition(b"\0")[0]
        elif kind != _LONG_LINK:
            records = _pax_records(content, position)
            if kind == _PAX_GLOBAL and not records.keys().isdisjoint((b"path", b"size")):
                raise _Damaged(f"a global header at byte {position} sets names or sizes")
            name = records.get(b"path", name)
            size = _decimal(records[b"size"], position) if b"size" in records else size
        position = _next(start, own_size)
        header = _read(file, position, _BLOCK)
        if not any(header):
            raise _Damaged(f"a block of zeros at byte {position}, where a member is expected")

    name = _name(header) if name is None else name
    size = own_size if size is None else size
    if kind not in _KINDS:
        raise _Damaged(
            f"{os.fsdecode(name)!r} is of type {kind!r}: sparse files, parts of files "
            f"and vendors' types are not read; write the archive with plain `tar -cf`"
        )
    is_old_folder = kind == b"\0" and name.endswith(b"/")
    kind_name = "folder" if is_old_folder else _KINDS[kind]
    size = 0 if kind in _WITHOUT_CONTENT else size
    end = _next(start, size)
    if end > os.fstat(file.fileno()).st_size:
        raise _Damaged(f"it ends within {os.fsdecode(name)!r}; copy it again")
    return Member(name, kind_name, start, size), end


def _next(start: int, size: int) -> int:
    """Where the block after some content begins."""
    return start + -(-size // _BLOCK) * _BLOCK


def _read(file: BinaryIO, position: int, size: int) -> bytes:
    content = os.pread(file.fileno(), size, position)
    if len(content) < size:
        raise _Damaged(
            f"it ends at byte {position + len(content)} without the two blocks of zeros that end "
            f"an archive; copy it again, or write it again"
        )
    return content


def _require_end(file: BinaryIO, position: int) -> None:
    """Two blocks of zeros, zeros as padding, and nothing else."""
    end = os.fstat(file.fileno()).st_size
    _read(file, position, 2 * _BLOCK)
    for start in range(position, end, _MAX_PADDING):
        content = os.pread(file.fileno(), _MAX_PADDING, start)
        if content.count(0) < len(content):
            raise _Damaged(
                f"data follows the zeros at byte {position}: a part is lost, or archives were "
                f"joined by `cat`; join them with `tar -A`, or keep each in its own file"
            )
    if end - position > _MAX_PADDING:
        raise _Damaged(f"{end - position} zeros follow byte {position}; copy it again")


# ---------------------------------------------------------------------------------------------
# Fields of a header
# ---------------------------------------------------------------------------------------------


def _checked_size(header: bytes, position: int) -> int:
    """The size of a header whose checksum is right."""
    stored = _number(header[148:156])
    if stored is None or stored != sum(header) - sum(header[148:156]) + 8 * ord(" "):
        what = "damaged" if position else "none: is it compressed?"
        raise _Damaged(f"the header at byte {position} is {what}")
    size = _number(header[124:136])
    if size is None:
        raise _Damaged(f"the header at byte {position} has a size that is no number of bytes")
    return size


def _number(field: bytes) -> int | None:
    """Octal digits, or 0x80 and the number in big-endian order; None for anything else."""
    if field[0] == 0x80:
        return int.from_bytes(field[1:], "big")
    digits = field.strip(b" \0")
    return int(digits or b"0", 8) if not digits.strip(b"01234567") else None


def _decimal(digits: bytes, position: int) -> int:
    if not digits.isdigit() or len(digits) > 20:
        raise _Damaged(f"the header at byte {position} has size {digits[:40]!r}")
    return int(digits)


def _name(header: bytes) -> bytes:
    name = header[:100].partition(b"\0")[0]
    prefix = header[345:500].partition(b"\0")[0]
    return prefix + b"/" + name if prefix and header[257:263] == b"ustar\0" else name


def _pax_records(content: bytes, position: int) -> dict[bytes, bytes]:
    """The records `LENGTH KEY=VALUE\\n` of a pax header."""
    records: dict[bytes, bytes] = {}
    start = 0
    while start < len(content):
        match = _PAX_RECORD.match(content, start)
        end = start + int(match[1]) if match else 0
        if not match or not match.end() < end <= len(content) or content[end - 1] != ord("\n"):
            raise _Damaged(f"the pax header at byte {position} is damaged")
        if match[2].startswith(b"GNU.sparse."):
            raise _Damaged(
                f"the pax header at byte {position} is of a sparse file, which is not read; write "
                f"the archive without `tar --sparse`"
            )
        records[match[2]] = content[match.end() : end - 1]
        start = end
    if b"\0" in records.get(b"path", b""):
        raise _Damaged(f"the pax header at byte {position} has a zero byte in its path")
    return records
