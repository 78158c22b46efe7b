"""What a run records of the process that made it."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
SAY = "from deit_fast.runtime.environment import describe_command\nprint(describe_command())\n"


def test_the_recorded_command_includes_its_launcher(tmp_path: Path) -> None:
    (tmp_path / "say.py").write_text(SAY)
    script = tmp_path / "bin" / "say"
    script.parent.mkdir()
    script.write_text(SAY)
    program, path = Path(sys.executable).name, os.pathsep.join(map(str, (ROOT, tmp_path)))
    torchrun = ["-m", "torch.distributed.run", "--nproc-per-node=1"]
    for words, expected in (
        (["-m", "say", "--a", "b c"], f"{program} -m say --a 'b c'"),
        ([str(script), "--a", "b c"], "say --a 'b c'"),
        ([*torchrun, "-m", "say", "--a"], f"{shlex.join([program, *torchrun])} -m say --a"),
    ):
        said = subprocess.check_output(
            [sys.executable, *words], env={**os.environ, "PYTHONPATH": path}, text=True
        )
        assert said == f"{expected}\n"
