"""Which client serves a URL, and what it needs installed.

Each process opens its own clients: a forked one must not touch the connections of its parent.
"""

from __future__ import annotations

import importlib
import os
import threading
from collections.abc import Callable
from functools import partial

from deit_fast.errors import InputError, first_line, printable
from deit_fast.storage.clients import Client
from deit_fast.storage.gcs import GcsClient
from deit_fast.storage.other import HubClient, OtherClient
from deit_fast.storage.s3 import S3Client
from deit_fast.storage.urls import without_secrets
from deit_fast.storage.web import WebClient

_EXTRAS = {  # the package that must be there, and what installs it
    "s3": ("s3fs", "'deit-fast[s3]'"),
    "gs": ("gcsfs", "'deit-fast[gcs]'"),
    "gcs": ("gcsfs", "'deit-fast[gcs]'"),
    "az": ("adlfs", "adlfs"),
    "abfs": ("adlfs", "adlfs"),
    "hf": ("huggingface_hub", "huggingface_hub"),
    "http": ("aiohttp", "'deit-fast[http]'"),
    "https": ("aiohttp", "'deit-fast[http]'"),
}
_CLIENTS: dict[str, Callable[[], Client]] = {
    "s3": S3Client, "gs": GcsClient, "gcs": GcsClient, "az": partial(OtherClient, "az"),
    "abfs": partial(OtherClient, "abfs"), "hf": HubClient, "http": WebClient, "https": WebClient,
}  # fmt: skip


def client_of(url: str) -> Client:
    """This process's client for a URL's service.

    Raises:
        InputError: the package that it needs is not installed; names what installs it.
    """
    return _state.client(url.partition("://")[0])


class _State:
    """The clients of a process, by scheme."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._clients: dict[str, Client] = {}

    def client(self, scheme: str) -> Client:
        with self._lock:
            if scheme not in self._clients:
                package, install = _EXTRAS[scheme]
                try:
                    importlib.import_module(package)
                except ImportError:
                    raise InputError(
                        f"{scheme}:// needs the package {package}: pip install {install}"
                    ) from None
                self._clients[scheme] = _open(scheme)
            return self._clients[scheme]


def _open(scheme: str) -> Client:
    try:
        return _CLIENTS[scheme]()
    except Exception as error:
        why = printable(without_secrets(first_line(error, 300, with_type=True)))
        raise InputError(
            f"{scheme}:// cannot be used: {why}; give account and credentials as the service's own "
            f"tools expect them"
        ) from None


_state = _State()
_inherited: list[_State] = []  # of the parents: kept, because closing a client closes its sockets


def _begin_child() -> None:
    global _state
    _inherited.append(_state)
    _state = _State()


os.register_at_fork(after_in_child=_begin_child)
