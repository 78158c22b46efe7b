"""URLs of object storage: which are known, how names are joined to them, how messages show them."""

from __future__ import annotations

import re
from urllib.parse import quote

from deit_fast.errors import InputError, did_you_mean, printable

SCHEMES = ("s3", "gs", "gcs", "az", "abfs", "hf", "http", "https")
_FORM = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*)://", re.ASCII)
_ONE_SLASH = re.compile(rf"({'|'.join(SCHEMES)}):/?([^/].*)", re.ASCII | re.IGNORECASE | re.DOTALL)
_IN_TEXT = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://[^\s'\"<>]+", re.ASCII)


def is_url(text: object) -> bool:
    """Whether ``text`` is a URL, and no path.

    Raises:
        InputError: a URL whose scheme is not one of `SCHEMES`, or that lacks a slash; names it.
    """
    match = _FORM.match(str(text))
    if match is None:
        if cut := _ONE_SLASH.fullmatch(str(text)):
            url = shown(f"{cut[1]}://{cut[2]}")
            raise InputError(f"{cut[1]}: needs two slashes, {url}; write ./{cut[1]}: for a folder")
        return False
    scheme = match[1].lower()
    if scheme not in SCHEMES:
        near = did_you_mean(scheme, SCHEMES)
        raise InputError(
            f"{shown(str(text))}: {scheme}:// is not read{near}; known are {', '.join(SCHEMES)}; "
            f"for a mounted file system name the path"
        )
    return True


def require_plain(url: str) -> str:
    """The URL without slashes at its end.

    Raises:
        InputError: it is none, names no bucket or host, or holds credentials (a user, a query): a
            URL is written to the folder of a run, and a query is not one of its objects.
    """
    if not is_url(url):
        raise InputError(f"{shown(url)} is no URL")
    scheme, _, rest = url.partition("://")
    host = rest.partition("/")[0]
    is_container = scheme.lower() in ("az", "abfs") and ":" not in host
    if "?" in rest or "#" in rest or ("@" in host and not is_container):
        raise InputError(
            f"{shown(url)}: a user, a query or a # in a URL is not read, because URLs are written "
            f"to files and logs; give credentials by the environment, a profile or ~/.netrc"
        )
    if not host or not printable(url) == url:
        raise InputError(f"{shown(url)} names no bucket or host, or has control characters")
    if any(part in ("", ".", "..") for part in rest.rstrip("/").split("/")):
        raise InputError(f"{shown(url)}: a part of the URL is empty, . or ..")
    return f"{scheme.lower()}://{rest.rstrip('/')}"


def join(url: str, *names: str) -> str:
    """The URL of a name below ``url``; names may hold slashes, and of web pages are quoted.

    Raises:
        InputError: a name would lead out of the URL, is empty or has control characters.
    """
    parts = [url.rstrip("/")]
    for name in names:
        if any(part in ("", ".", "..") for part in name.split("/")) or printable(name) != name:
            raise InputError(f"{shown(url)}: {printable(name)!r} is no name of an object below it")
        parts.append(quote(name, "/~!$&'()*+,;=:@") if url.startswith("http") else name)
    return "/".join(parts)


def shown(url: str) -> str:
    """A URL for messages, logs and files: without user, password, query and fragment."""
    scheme, mark, rest = url.partition("://")
    if not mark:
        return printable(url)
    host, slash, path = re.split(r"[?#]", rest, maxsplit=1)[0].partition("/")
    is_container = scheme.lower() in ("az", "abfs") and ":" not in host
    host = host if is_container else host.rpartition("@")[2]
    return printable(f"{scheme}://{host}{slash}{path}")


def without_secrets(text: str) -> str:
    """Text of somebody else's error in which each URL is as `shown` gives it."""
    return _IN_TEXT.sub(lambda match: shown(match[0]), text)
