"""What the machine does to a run, in one line that says what to do about it."""

from __future__ import annotations

import resource
import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def in_plain_words(device: torch.device, sizes: str) -> Iterator[None]:
    """Errors of torch's allocators and of a loader's dead process get a name and one line.

    Args:
        sizes: what the memory depends on, and which of it to change.

    Raises:
        MemoryError: too little memory, of a GPU or of the host.
        ChildProcessError: a process that loads images died.
    """
    try:
        yield
    except (RuntimeError, OSError, EOFError, MemoryError) as error:
        if _is_out_of_memory(error):
            raise MemoryError(
                f"out of memory on {device}: peak {peak_memory(device) / 2**30:.2f} GiB "
                f"({_reason(error)}); {sizes}"
            ) from error
        if _is_of_dead_worker(error):
            reason = _reason(_told_by_torch(error))
            raise ChildProcessError(
                f"a process that loads images died ({reason}); the system kills one where memory "
                f"runs out: see its log, and try fewer data.workers"
            ) from error
        raise


def _told_by_torch(error: Exception) -> Exception:
    """torch's account, with process and signal: its handler raises it wherever Python is when the
    system reports the death, which is after the process's sockets are closed."""
    if isinstance(error, RuntimeError):
        return error
    try:
        time.sleep(0.2)
    except RuntimeError as told:
        return told
    return error


def _reason(error: Exception) -> str:
    """The sentence that says what could not be allocated, or the first."""
    sentences = " ".join(str(error).split()).split(". ")
    chosen = next((text for text in sentences if "allocate" in text), sentences[0])
    return chosen[:160] or type(error).__name__


def _is_out_of_memory(error: Exception) -> bool:
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    words = ("CUDA error: out of memory", "can't allocate memory", "not enough memory")
    return isinstance(error, RuntimeError) and any(part in str(error) for part in words)


def peak_memory(device: torch.device) -> int:
    """Largest memory of this process so far, bytes: allocated on a GPU, resident on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _is_of_dead_worker(error: Exception) -> bool:
    """torch says so wherever the main process is just then, or the socket fails on which that
    process was to send its tensors; a file that is not there has a name, a socket has none."""
    if isinstance(error, RuntimeError):
        return "DataLoader worker" in str(error)
    is_of_socket = isinstance(error, FileNotFoundError) and error.filename is None
    return is_of_socket or isinstance(error, (ConnectionError, EOFError))
