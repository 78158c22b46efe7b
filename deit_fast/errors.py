"""Errors that a user can cause. The command line prints each as one line with exit status 2."""

from __future__ import annotations

import time
import unicodedata
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


class InputError(ValueError):
    """An input is wrong; the message names it, its value and the remedy."""


class CacheError(InputError):
    """The cache lacks what was requested, or its bytes do not follow its format."""


class CacheMismatch(CacheError):
    """The cache was made under other settings; the message names each field that differs."""


class RowError(CacheError):
    """One row of a batch cannot be stored or read; the caller knows which sample it is."""

    def __init__(self, row: int, reason: str) -> None:
        super().__init__(f"row {row}: {reason}")
        self.row, self.reason = row, reason


class SampleError(CacheError):
    """What the teacher gives of one view of a sample cannot be stored."""

    def __init__(self, view: int, sample: int, reason: str) -> None:
        super().__init__(f"view {view} sample {sample}: {reason}")
        self.sample = sample


class Quarantined(Exception):
    """Units of work are in quarantine: the text goes to stdout, and the exit status is 3."""


class CheckFailed(Exception):
    """A check found a problem: its text goes to stdout, and the exit status is 1."""


def first_line(error: BaseException, limit: int = 200, with_type: bool = False) -> str:
    """The first line of an exception's text, cut to ``limit``; its type where it has no text.

    ``with_type``: `RuntimeError: text` instead of `text`.
    """
    name = type(error).__name__
    text = next(iter(str(error).strip().splitlines()), "")[:limit]
    return f"{name}: {text}" if with_type and text else text or name


def printable(value: object) -> str:
    """Text for a terminal: control characters, escape sequences and lone surrogates are escaped."""
    return "".join(map(_printable_char, str(value)))


def _printable_char(char: str) -> str:
    if char.isprintable() or unicodedata.category(char) == "Zs":  # spaces of all widths
        return char
    return char.encode("unicode_escape").decode()


def did_you_mean(name: str, valid: Iterable[str], prefix: str = "") -> str:
    """End of a message about an unknown name: ` (did you mean X?)`, or nothing.

    X is the only valid name whose last dotted part is ``name``, the `name` of a group ``name``, or
    else the most similar one.

    Args:
        name: what was given, without the prefix.
        valid: all names that would have been right.
        prefix: written before X, such as `--`.
    """
    import difflib  # slow to import

    valid = list(valid)
    same_leaf = [item for item in valid if item.rpartition(".")[2] == name]
    if f"{name}.name" in valid:
        same_leaf = [f"{name}.name"]
    near = same_leaf if len(same_leaf) == 1 else difflib.get_close_matches(name, valid, 1, 0.5)
    return f" (did you mean {prefix}{near[0]}?)" if near else ""


# ---------------------------------------------------------------------------------------------
# Failures of the machine
# ---------------------------------------------------------------------------------------------


@contextmanager
def translate_errors(device: torch.device, remedy: str) -> Iterator[None]:
    """Turn errors of torch's allocators and of a dead loader process into one line with a remedy.

    Args:
        device: whose peak memory the message states.
        remedy: what the memory depends on, and which setting to change.

    Raises:
        MemoryError: the memory of a GPU or of the host ran out.
        ChildProcessError: a process that loads images died.
    """
    try:
        yield
    except (RuntimeError, OSError, EOFError, MemoryError) as error:
        if is_out_of_memory(error):
            raise MemoryError(
                f"out of memory on {device}: peak {_peak_memory(device) / 2**30:.2f} GiB "
                f"({_relevant_sentence(error)}); {remedy}"
            ) from error
        if _is_dead_worker(error):
            reason = _relevant_sentence(error)
            raise ChildProcessError(
                f"a process that loads images died ({reason}); the system kills one where memory "
                f"runs out: see its log, and try fewer data.workers"
            ) from error
        raise


def is_out_of_memory(error: Exception) -> bool:
    """Whether an allocator of torch or Python raised it."""
    import torch

    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    texts = ("CUDA error: out of memory", "can't allocate memory", "not enough memory")
    return isinstance(error, RuntimeError) and any(text in str(error) for text in texts)


def _peak_memory(device: torch.device) -> int:
    """Largest memory of this process so far, bytes: allocated on a GPU, resident on a CPU."""
    import resource

    import torch

    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _is_dead_worker(error: Exception) -> bool:
    """Whether a loader process died.

    torch's signal handler raises a RuntimeError wherever the main process is at that moment.
    Without it the socket fails over which the process was to send its tensors. An error of a file
    has a file name, one of a socket has none.
    """
    if isinstance(error, RuntimeError):
        return "DataLoader worker" in str(error)
    if isinstance(error, OSError) and error.filename is not None:
        return False
    return isinstance(error, (FileNotFoundError, ConnectionError, EOFError))


def report_of_dead_worker(error: Exception) -> Exception:
    """torch's own error, which names process and signal, or ``error``, if there is none.

    The system reports a death after it has closed the process's sockets, so torch's handler may
    raise it shortly after the socket failed. Call this at once: the handler interrupts whatever
    runs then, also the code that handles errors.
    """
    if not _is_dead_worker(error) or isinstance(error, RuntimeError):
        return error
    try:
        time.sleep(0.2)
    except RuntimeError as report:
        return report
    return error


def _relevant_sentence(error: Exception) -> str:
    """The sentence that says what could not be allocated, or the first one."""
    sentences = " ".join(str(error).split()).split(". ")
    chosen = next((text for text in sentences if "allocate" in text), sentences[0])
    return chosen[:160] or type(error).__name__
