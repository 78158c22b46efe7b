"""Named tensors in safetensors files that carry a checksum of all their bytes.

The checksum is a text in `__metadata__`, so other programs read the files as any safetensors file.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from deit_fast.errors import InputError, printable
from deit_fast.runtime.files import (
    SEAL_KEY,
    SEAL_ZEROS,
    create_atomically,
    has_seal,
    is_intact,
    open_atomically,
    open_regular,
    parse_object,
    seal,
)


def save_tensors(
    path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str], is_new: bool = False
) -> None:
    """Write named tensors and texts about them, atomically and with a checksum.

    The same tensors and texts give the same bytes.

    Args:
        is_new: write only if there is no file; of several processes, one writes.

    Raises:
        OSError: names ``path``, where the old file stays.
    """
    from safetensors.torch import save

    named = {name: value.contiguous() for name, value in tensors.items()}
    content = _in_order(save(named, {**metadata, SEAL_KEY: SEAL_ZEROS}))
    parts = seal(content, _header_end(content))
    if is_new:
        create_atomically(path, b"".join(parts))
        return
    with open_atomically(path) as file:
        file.writelines(parts)


def read_tensors(path: Path, noun: str) -> dict[str, Tensor]:
    """The tensors of a safetensors file, on the CPU.

    Args:
        noun: what a message calls the file.

    Raises:
        InputError: the file is no safetensors file, or its checksum differs.
        OSError: names the path.
    """
    return parse_tensors(_content_of(path), path, noun)


def parse_tensors(content: bytes, where: Path | str, noun: str) -> dict[str, Tensor]:
    """As ``read_tensors`` of a file with this content; messages name it by ``where``."""
    from safetensors import SafetensorError
    from safetensors.torch import load

    _parse_header(content, where, noun)
    try:
        return load(content)
    except SafetensorError as error:
        raise _not_safetensors(where, noun, error) from None


def read_header(path: Path, noun: str) -> tuple[bytes, dict[str, str]]:
    """Content and texts of a safetensors file, checked by its checksum if it has one.

    Raises:
        As ``read_tensors``.
    """
    content = _content_of(path)
    return content, _parse_header(content, path, noun)


def _content_of(path: Path) -> bytes:
    with open_regular(path) as file:
        return file.read()


def _parse_header(content: bytes, where: Path | str, noun: str) -> dict[str, str]:
    end = _header_end(content)
    try:
        metadata = parse_object(content[8:end], "its header").get("__metadata__")
    except InputError as error:
        raise _not_safetensors(where, noun, error) from None
    metadata = metadata if isinstance(metadata, dict) else {}
    if has_seal(metadata) and not is_intact(content, end):
        raise InputError(f"{noun} {printable(where)} is damaged: its checksum differs")
    return {key: value for key, value in metadata.items() if key != SEAL_KEY}


def digest_tensors(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 over names, dtypes, shapes and bytes."""
    digest = hashlib.sha256()
    for name, value in sorted(tensors.items()):
        array = value.detach().cpu().contiguous()
        digest.update(f"{name} {array.dtype} {tuple(array.shape)}\n".encode())
        digest.update(array.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _in_order(content: bytes) -> bytes:
    """With the texts in the order of their keys: `safetensors` writes them in any order."""
    end = _header_end(content)
    header = json.loads(content[8:end])
    header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)  # the tensors stay aligned
    return b"".join((len(text).to_bytes(8, "little"), text, memoryview(content)[end:]))


def _header_end(content: bytes) -> int:
    """The header follows its length: uint64, little endian."""
    return 8 + int.from_bytes(content[:8], "little")


def _not_safetensors(where: Path | str, noun: str, why: Exception) -> InputError:
    return InputError(f"{noun} {printable(where)} is not a safetensors file: {why}")
