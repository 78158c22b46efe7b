"""Installs this folder into the running Python, offline, and checks that it is what is imported.

    python -m bench.install [--device cuda]

On a GPU the CUDA code of the cache is compiled for that card alone. Where nvcc fails, the project
is installed without it, and says so: most benches do not need it.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys

from .record import ROOT

PIP = (sys.executable, "-m", "pip", "install", "--quiet", "--no-build-isolation", "--no-deps")
CHECK = "import deit_fast._C, deit_fast.kernels as k; print(deit_fast._C.__file__, k.__file__)"


def card_architecture() -> dict[str, str]:
    """The variable for setup.py that names the card's architecture; none for an unknown card."""
    import torch

    major, _ = torch.cuda.get_device_capability()
    known = {8: "80", 9: "90", 10: "100"}
    return {"DEIT_FAST_CUDA_ARCHITECTURES": known[major]} if major in known else {}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.install", description=__doc__)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    options = parser.parse_args()
    chosen = card_architecture() if options.device == "cuda" else {}
    install = [*PIP, "-e", str(ROOT)]
    if subprocess.run(install, cwd=ROOT, env=os.environ | chosen).returncode:
        print("the build failed: trying without the CUDA code of the cache", flush=True)
        subprocess.run(install, cwd=ROOT, env=os.environ | {"DEIT_FAST_CUDA": "0"}, check=True)
    done = subprocess.run(
        [sys.executable, "-c", CHECK], cwd=ROOT, capture_output=True, text=True, check=True
    )
    for path in done.stdout.split():
        print(path)
        if not path.startswith(str(ROOT)):
            raise SystemExit(f"{path} is imported, which does not lie in {ROOT}")


if __name__ == "__main__":
    main()
