"""Errors of object storage: what a failed request means, and whether another try may help.

Each library has exceptions of its own. Their class, the HTTP status and the service's code
distinguish them. URLs in their texts are shown without secrets.
"""

from __future__ import annotations

import errno
from collections.abc import Iterator
from contextlib import suppress

from deit_fast.errors import first_line, printable
from deit_fast.storage.clients import Changed, Refused
from deit_fast.storage.urls import without_secrets

_PERMANENT = {301, 401, 403, 404, 405, 410, 412, 416, 501}
# Codes of status 400 that may pass; without a code it is a library's name for a broken reply.
_MAY_PASS = {
    "",
    "400",
    "RequestTimeout",
    "BadDigest",
    "IncompleteBody",
    "XAmzContentSHA256Mismatch",
}
_NO_CREDENTIALS = {
    "NoCredentialsError", "PartialCredentialsError", "ProfileNotFound", "DefaultCredentialsError",
    "LocalTokenNotFoundError",
}  # fmt: skip
_REMEDY = (
    ": give them as the service's own tools expect them, for S3 as AWS_PROFILE or "
    "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY (FSSPEC_S3_ANON=true for a public bucket)"
)


class StorageError(OSError):
    """An object cannot be read or written. One line: the URL without secrets, and the cause.

    Args:
        number: of `errno`.
        why: the cause, and what was asked for.
        url: as `shown` gives it.
    """

    def __init__(self, number: int, why: str, url: str) -> None:
        super().__init__(number, why, url)

    def __str__(self) -> str:
        return f"{self.filename}: {self.strerror}"


class ObjectMissing(StorageError, FileNotFoundError):
    """There is no object of this name."""


class ObjectChanged(StorageError):
    """The object was replaced since its stamp was taken."""


class ObjectExists(StorageError, FileExistsError):
    """An object of this name is there, and has other content."""


class ObjectDamaged(StorageError):
    """The bytes that the service sends have a wrong checksum, at every try."""


class WrongBytes(Exception):
    """The caller's check says that the bytes are not right."""

    def __str__(self) -> str:
        return "the checksum of the bytes is wrong"


def permanent_error(url: str, what: str, error: BaseException) -> StorageError | None:
    """The error to raise where another try cannot help; None where it may.

    Args:
        url: as `shown` gives it.
        what: was asked for: "cannot ..." or "bytes ...".
        error: of a client.
    """
    status = _status(error)
    names = {kind.__name__ for one in _chain(error) for kind in type(one).__mro__}
    if isinstance(error, Changed) or (status == 412 and what.startswith("bytes")):
        why = "was changed while it was in use: start the command again"
        return ObjectChanged(errno.ESTALE, why, url)
    if isinstance(error, FileExistsError) or status == 412:
        return ObjectExists(errno.EEXIST, "exists", url)
    if isinstance(error, FileNotFoundError) or status == 404:
        is_bucket = _code(error) == "NoSuchBucket"
        why = "there is no such bucket" if is_bucket else "does not exist"
        return ObjectMissing(errno.ENOENT, why, url)
    if names & _NO_CREDENTIALS:
        return StorageError(errno.EACCES, f"{what}: no credentials were found{_REMEDY}", url)
    if isinstance(error, PermissionError) or status in (401, 403):
        why = f"{what}: access is refused, {cause(error)}{_REMEDY}"
        return StorageError(errno.EACCES, why, url)
    if isinstance(error, Refused):
        return StorageError(errno.ENOTSUP, f"{what}: {error}", url)
    is_refused = status == 400 and _code(error) not in _MAY_PASS
    if status in _PERMANENT or is_refused:
        return StorageError(errno.EIO, f"{what}: {cause(error)}", url)
    return None


def _chain(error: BaseException) -> Iterator[BaseException]:
    one: BaseException | None = error
    for _ in range(5):
        if one is None:
            return
        yield one
        one = one.__cause__


def _status(error: BaseException) -> int | None:
    """The HTTP status in the error of a library, or in what it was made from."""
    for one in _chain(error):
        response = getattr(one, "response", None)
        if isinstance(response, dict):
            found = response.get("ResponseMetadata", {}).get("HTTPStatusCode")
        else:
            found = getattr(response, "status_code", None) or getattr(one, "status", None)
        with suppress(TypeError, ValueError):
            return int(found)  # type: ignore[arg-type]
    return None


def _code(error: BaseException) -> str:
    """S3's name of the error, or ''."""
    for one in _chain(error):
        response = getattr(one, "response", None)
        if isinstance(response, dict):
            return str(response.get("Error", {}).get("Code", ""))
    return ""


def cause(error: BaseException, seconds: float | None = None) -> str:
    """What went wrong, in words that hold no secret: texts of libraries may hold signed URLs."""
    status, code = _status(error), _code(error)
    if status is not None:
        return printable(
            f"{code} (HTTP {status})" if code and code != str(status) else f"HTTP {status}"
        )
    if isinstance(error, WrongBytes):
        return str(error)
    if type(error).__name__ in ("TimeoutError", "FSTimeoutError") and not str(error):
        return "no reply in time" if seconds is None else f"no reply within {seconds:.3g} s"
    return printable(without_secrets(first_line(error, 300, with_type=True)))
