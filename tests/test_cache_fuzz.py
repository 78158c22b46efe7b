"""The C++ part of the cache under AddressSanitizer and UndefinedBehaviorSanitizer: a short run."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FLAGS = ["-fsanitize=address,undefined", "-x", "c++", "-", "-o", "/dev/null"]


@pytest.fixture(scope="module", autouse=True)
def sanitizers() -> None:
    compiler = os.environ.get("CXX", "g++")
    for tool in (compiler, "make"):
        if shutil.which(tool) is None:
            pytest.skip(f"no {tool} on PATH")
    done = subprocess.run([compiler, *FLAGS], input="int main() {}", capture_output=True, text=True)
    if done.returncode != 0:
        pytest.skip(f"{compiler} has no sanitizer libraries")


def make(*words: str) -> str:
    done = subprocess.run(["make", *words], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "warning" not in done.stderr, done.stderr
    return done.stdout


@pytest.mark.slow
def test_mutated_files_give_an_error_or_the_right_records():
    out = make("fuzz", "SECONDS=6")
    found = re.search(
        r"fuzz: (\d+) inputs of seed 1: (\d+) refused, (\d+) read in part, (\d+) read whole, "
        r"(\d+) encoded; no finding",
        out,
    )
    assert found is not None, out
    total, *kinds = map(int, found.groups())
    # Each path must be frequent: a fuzzer whose inputs are all refused at once tests nothing.
    assert total == sum(kinds) and min(kinds) > total / 50 and total > 500


@pytest.mark.slow
def test_every_operation_under_sanitizers():
    assert "decode of 9 codecs; no finding" in make("sanitize")
