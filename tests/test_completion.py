"""Completion in a real bash: verbs, flags, recipe names, values."""

from __future__ import annotations

import shlex
import subprocess

import pytest

from deit_fast import cli
from deit_fast.recipes import RECIPES

COMPLETED = {
    "deit-fast tr": "train",
    "deit-fast cache ": "info verify export copy plan",
    "deit-fast cache ver": "verify",
    "deit-fast recipes show own": "own_images",
    "deit-fast completion ": "bash zsh fish",
    "deit-fast train --recip": "--recipe",
    "deit-fast train --recipe ": " ".join(RECIPES),
    "deit-fast train --recipe=deit_base_distilled_3": "deit_base_distilled_384",
    "deit-fast train --loss.kind ": "none soft hard",
    "deit-fast train --epochs 3 --loss.kind s": "soft",
    "deit-fast train --on_nonfinite ": "stop rollback",
    "deit-fast train --track ten": "tensorboard",
    "deit-fast train --no-res": "--no-resume",
    "deit-fast train --model.no": "--model.no-fused",
    "deit-fast precompute --dry": "--dry-run",
    "deit-fast evaluate runs/a --weights b": "best",
    "deit-fast cache export x --o": "--output",
    "deit-fast recipes show own_images own": "",  # its one name is there
    "deit-fast train --data.root ": "",  # left to the shell, which completes paths
    "deit-fast nonsense ": "",
}


def printed(capsys: pytest.CaptureFixture, shell: str) -> str:
    assert cli.main(["completion", shell]) == 0
    return capsys.readouterr().out


def test_bash_completes(capsys, tmp_path):
    script = tmp_path / "completion.bash"
    script.write_text(printed(capsys, "bash"))
    lines = [f"source {shlex.quote(str(script))}", "complete -p"]
    for command in COMPLETED:
        words = command.replace("=", " = ").split(" ")
        quoted = " ".join(map(shlex.quote, words))
        lines.append(
            f"COMP_WORDS=({quoted}); COMP_CWORD={len(words) - 1}; _deit_fast; "
            'echo "${COMPREPLY[*]}"'
        )
    done = subprocess.run(
        ["bash", "--norc", "-c", "\n".join(lines)], capture_output=True, text=True, cwd=tmp_path
    )
    assert done.returncode == 0 and done.stderr == "", done.stderr
    registered, *answers = done.stdout.splitlines()
    assert registered == "complete -o default -F _deit_fast deit-fast"  # and for no other command
    assert dict(zip(COMPLETED, answers, strict=True)) == COMPLETED


def test_every_verb_and_flag_is_in_every_script(capsys):
    for shell in ("bash", "zsh", "fish"):
        text = printed(capsys, shell)
        for verb in cli.VERBS:
            assert verb.split()[0] in text and verb.split()[-1] in text
        for flag in ("optim.min-lr", "teacher-classes", "late-fusion", "tensorboard"):
            assert flag in text, (shell, flag)


def test_the_zsh_script_is_that_of_bash_behind_its_emulation(capsys):
    bash, zsh = printed(capsys, "bash"), printed(capsys, "zsh")
    assert "bashcompinit" in zsh and bash.split("\n", 1)[1] in zsh
    assert zsh.index("bashcompinit") < zsh.index("complete -o default")
