"""The CUDA part of the cache without a GPU: its kernels, compiled for the CPU, under sanitizers.

`tests/native/emulator` runs the threads of a block in an order drawn from a seed. Kernels with one
defect each test that it and the sanitizers report such defects.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
BUILDS = ROOT / "build" / "emulated"

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def output(tmp_path_factory) -> str:
    """What `make emulate` prints for one round of all cases."""
    compiler = os.environ.get("CXX", "g++")
    for tool in (compiler, "make"):
        if shutil.which(tool) is None:
            pytest.skip(f"no {tool} on PATH")
    program = tmp_path_factory.mktemp("probe") / "probe"
    for sanitizer in ("address,undefined", "thread"):
        flags = [f"-fsanitize={sanitizer}", "-x", "c++", "-", "-o", program]
        built = subprocess.run([compiler, *flags], input=b"int main() {}", capture_output=True)
        if built.returncode != 0 or subprocess.run([program], capture_output=True).returncode != 0:
            pytest.skip(f"no program of {compiler} -fsanitize={sanitizer} runs here")
    words = ["make", "emulate", "SECONDS=0"]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "warning" not in done.stderr.lower(), done.stderr
    return done.stdout


def test_kernels_give_the_bytes_of_the_host(output):
    found = re.findall(
        r"emulate: 1 rounds, (\d+) launches: (\d+) records encoded, (\d+) decoded, (\d+) refused; "
        r"no finding",
        output,
    )
    assert len(found) == 2, output  # the second is ThreadSanitizer's, with a third of the encoding
    least = [(120, 200, 20000, 30), (40, 80, 2500, 12)]
    for counts, limits in zip(found, least, strict=True):
        assert all(int(count) >= limit for count, limit in zip(counts, limits, strict=True)), counts


@pytest.mark.parametrize(
    ("defect", "build", "report"),
    [
        ("no_barrier", "thread", "ThreadSanitizer: data race"),
        ("shuffle_for_barrier", "thread", "ThreadSanitizer: data race"),
        ("blocks_at_odds", "thread", "ThreadSanitizer: data race"),
        ("divergent_barrier", "thread", "40 of 64 threads wait"),
        ("divergent_barrier", "address", "40 of 64 threads wait"),
        ("two_barriers", "address", "threads wait at barriers of line"),
        ("half_a_warp", "address", "16 of 64 threads wait"),
        ("beyond_shared", "address", "global-buffer-overflow|insufficient space"),
        ("beyond_dynamic", "address", "AddressSanitizer: heap-buffer-overflow"),
        ("beyond_global", "address", "AddressSanitizer: heap-buffer-overflow"),
        ("misaligned", "address", "misaligned address"),
    ],
)
def test_a_defect_does_not_get_through(output, defect, build, report):
    done = subprocess.run([BUILDS / build, "defect", defect], capture_output=True, text=True)
    assert done.returncode != 0, done.stdout
    assert re.search(report, done.stderr), done.stderr
