"""Processes that need not import torch again: forked from a server that conftest.py prepares.

A fork of the test's own process could not run a backward pass once torch has started its threads.
"""

from __future__ import annotations

import multiprocessing
import os
import runpy
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from subprocess import CompletedProcess

import torch


def forked(target: Callable[..., object], *arguments: object) -> int:
    """Exit status of a process that calls the target; negative: the signal that killed it."""
    child = start_forked(target, *arguments)
    child.join()
    assert child.exitcode is not None
    return child.exitcode


def start_forked(
    target: Callable[..., object], *arguments: object, **variables: str
) -> multiprocessing.process.BaseProcess:
    """A process that calls the target, in this environment with the variables.

    It has as many threads as this process: the order of sums depends on it.
    """
    context = multiprocessing.get_context("forkserver")
    given = (target, arguments, os.environ | variables, torch.get_num_threads())
    child = context.Process(target=_call, args=given)
    child.start()
    return child


def _call(
    target: Callable[..., object], arguments: tuple, environment: dict[str, str], threads: int
) -> None:
    torch.set_num_threads(threads)
    os.environ.clear()
    os.environ.update(environment)
    target(*arguments)


def run_script(script: Path, *arguments: str, **variables: str) -> CompletedProcess[str]:
    """`VARIABLES python SCRIPT ARGUMENTS`."""
    with tempfile.TemporaryDirectory() as folder:
        outputs = [f"{folder}/out", f"{folder}/err"]
        status = forked(_run_script, str(script), arguments, variables, outputs)
        out, err = (Path(path).read_text() for path in outputs)
    return CompletedProcess([str(script), *arguments], status, out, err)


def _run_script(
    script: str, arguments: tuple[str, ...], variables: dict[str, str], outputs: list[str]
) -> None:
    os.environ |= variables
    for number, path in enumerate(outputs, 1):
        redirect(number, path)
    sys.argv = [script, *arguments]
    sys.path.insert(0, str(Path(script).parent))
    runpy.run_path(script, run_name="__main__")


def redirect(number: int, path: str) -> None:
    """Let this file descriptor, 1 or 2, write to a new file."""
    os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
