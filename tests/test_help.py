"""Help in two levels: the common flags with examples, and all of them."""

from __future__ import annotations

import shlex

import pytest

from deit_fast import cli
from deit_fast.arguments import PrecomputeArguments, TrainArguments
from deit_fast.flags import COMMON, EXAMPLES, function_flags, settings_flags
from deit_fast.recipes import RECIPES

CLASSES = {"train": TrainArguments, "precompute": PrecomputeArguments}


def help_text(capsys: pytest.CaptureFixture, *args: str) -> str:
    with pytest.raises(SystemExit) as stop:
        cli.main([*args])
    assert stop.value.code == 0
    out, err = capsys.readouterr()
    assert err == ""
    return out


@pytest.mark.parametrize("verb", COMMON)
def test_short_help_has_the_common_flags_with_the_texts_of_their_fields(verb, capsys):
    out = help_text(capsys, verb, "--recipe", "digits_student", "--epochs", "7", "--help")
    words = " ".join(out.split())
    flags = {flag.key: flag for flag in settings_flags(CLASSES[verb])}
    assert 10 < len(COMMON[verb]) < 16
    for key in COMMON[verb]:
        assert f" {flags[key].name} " in words and " ".join(flags[key].text.split()) in words
    assert f"(default: {RECIPES['digits_student']().view.image_size})" in words
    assert f"`deit-fast {verb} --help-all` lists all {len(flags)} flags." in out
    assert "--optim.min-lr" not in out
    described = [line for line in out.partition("examples:")[0].splitlines() if "{" not in line]
    assert max(map(len, described)) <= 80


@pytest.mark.parametrize("verb", COMMON)
def test_all_help_has_every_flag(verb, capsys):
    out = help_text(capsys, verb, "--help-all")
    for flag in settings_flags(CLASSES[verb]):
        assert flag.text, f"{flag.name} has no docstring"
        assert flag.name in out, flag.name


@pytest.mark.parametrize(
    ("verb", "command"), [(verb, line) for verb, lines in EXAMPLES.items() for _, line in lines]
)
def test_an_example_of_the_short_help_is_right(verb, command, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run.yaml").write_text("epochs: 3\n")
    words = shlex.split(command)
    args = words[words.index(verb) :]
    assert cli.main([*args, "--print-config"]) == 0, capsys.readouterr().err


def test_flags_of_a_verb_are_those_of_its_function():
    positional, flags = function_flags(cli.evaluate)
    assert [item.key for item in positional] == ["run"]
    found = {flag.name: flag for flag in flags}
    assert found["--weights"].choices == ("last", "ema", "best")
    assert found["--late-fusion"].text.startswith("Also train classifiers on the sum and on the")
    for name, function in cli.VERBS.items():
        if name not in CLASSES:
            positional, flags = function_flags(function)
            assert all(flag.text for flag in (*positional, *flags)), name


def test_help_all_of_other_verbs_is_their_help(capsys):
    assert "--late-fusion" in help_text(capsys, "evaluate", "--help-all")
