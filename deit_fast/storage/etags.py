"""ETags that are digests of the content: they vouch for bytes that have no checksum of ours."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable

_PIECE = 1 << 20
# What clients cut large objects into: an ETag of S3 says how many parts, and not of which size.
_PART_BYTES = [
    *(size << 20 for size in (5, 8, 10, 15, 16, 20, 25, 32, 50, 64, 100, 128, 256, 512, 1024)),
    *(size * 10**6 for size in (5, 8, 10, 16, 50, 100)),
]  # fmt: skip


def vouches(etag: str, size: int, read: Callable[[int, int], bytes | memoryview]) -> bool:
    """Whether an ETag is a digest, and that of this content.

    It is the MD5, or the MD5 of the parts' MD5 and their number, in S3; the SHA-256, or the SHA-1
    as git makes it, on the Hub. One that is none (an encrypted object's, a web server's) says
    nothing about the content.

    Args:
        size: bytes.
        read: called with a position and a number of bytes; returns fewer only at the end.
    """

    def digest(kind: str, start: int, length: int, before: bytes = b"") -> bytes:
        value = hashlib.new(kind, before, usedforsecurity=False)
        end = start + length
        while start < end and (piece := read(start, min(_PIECE, end - start))):
            value.update(piece)
            start += len(piece)
        return value.digest()

    if re.fullmatch("[0-9a-f]{32}", etag):
        return digest("md5", 0, size).hex() == etag
    if re.fullmatch("[0-9a-f]{64}", etag):
        return digest("sha256", 0, size).hex() == etag
    if re.fullmatch("[0-9a-f]{40}", etag):
        return digest("sha1", 0, size, b"blob %d\0" % size).hex() == etag
    match = re.fullmatch("([0-9a-f]{32})-([0-9]{1,5})", etag)
    for part in _PART_BYTES if match else ():
        if match and -(-size // part) == int(match[2]):
            digests = (digest("md5", start, part) for start in range(0, size, part))
            whole = hashlib.md5(b"".join(digests), usedforsecurity=False)
            if whole.hexdigest() == match[1]:
                return True
    return False
