"""Makes this folder importable in the running Python, offline, and checks that it is imported.

    python -m bench.install [--device cuda]

pip installs the folder where Python's packages can be written. Elsewhere, as in a read-only
container, the extension is built inside the folder, which PYTHONPATH must then name.

On a GPU the CUDA code of the cache is compiled for that card alone. Where nvcc fails, the project
is built without it, and says so: most benches do not need it.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import sysconfig

from .record import ROOT

PIP = (sys.executable, "-m", "pip", "install", "--quiet", "--no-build-isolation", "--no-deps")
WITH_PIP = (*PIP, "-e", str(ROOT))
IN_PLACE = (sys.executable, "setup.py", "--quiet", "build_ext", "--inplace")
WITHOUT_CUDA = {"DEIT_FAST_CUDA": "0"}
CHECK = "import deit_fast._C, deit_fast.kernels as k; print(deit_fast._C.__file__, k.__file__)"


def card_architecture() -> dict[str, str]:
    """The variable for setup.py that names the card's architecture; none for an unknown card."""
    import torch

    major, _ = torch.cuda.get_device_capability()
    known = {8: "80", 9: "90", 10: "100"}
    return {"DEIT_FAST_CUDA_ARCHITECTURES": known[major]} if major in known else {}


def can_write_packages() -> bool:
    return os.access(sysconfig.get_path("purelib"), os.W_OK)


def attempts(chosen: dict[str, str]) -> list[tuple[tuple[str, ...], dict[str, str]]]:
    """Commands with their variables, the best first."""
    in_place = (IN_PLACE, WITHOUT_CUDA)
    if can_write_packages():
        return [(WITH_PIP, chosen), (WITH_PIP, WITHOUT_CUDA), in_place]
    print("Python's packages cannot be written: building in the project's folder", flush=True)
    return [(IN_PLACE, chosen), in_place]


def link_kernels() -> bool:
    """The package deit_fast.kernels lies beside deit_fast; pip's installation knows that.

    Returns False, with a line that says so, where the folder cannot be written.
    """
    link = ROOT / "deit_fast" / "kernels"
    try:
        if not link.exists():
            link.symlink_to("../kernels")
    except OSError as error:
        print(f"{link} cannot be made: {error.strerror}", flush=True)
        return False
    return True


def build(chosen: dict[str, str]) -> None:
    """
    Args:
        chosen: variables of setup.py.

    Raises:
        SystemExit: no attempt succeeds; the log has the messages of the compilers.
    """
    for command, variables in attempts(chosen):
        if command == IN_PLACE and not link_kernels():
            continue
        if subprocess.run(command, cwd=ROOT, env=os.environ | variables).returncode == 0:
            return
        print(f"failed: {' '.join(command)}", flush=True)
    raise SystemExit("the project cannot be built here; the messages above say why")


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.install", description=__doc__)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    options = parser.parse_args()
    build(card_architecture() if options.device == "cuda" else {})
    done = subprocess.run(
        [sys.executable, "-c", CHECK], cwd=ROOT, capture_output=True, text=True, check=True
    )
    for path in done.stdout.split():
        print(path)
        if not path.startswith(str(ROOT)):
            raise SystemExit(f"{path} is imported, which does not lie in {ROOT}")


if __name__ == "__main__":
    main()
