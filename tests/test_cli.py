"""The command line: its output, its start-up time and its errors."""

from __future__ import annotations

import errno
import json
import logging
import os
import re
import resource
import subprocess
import sys
from pathlib import Path

import pytest

from deit_fast import cli
from deit_fast.config import RunConfig
from deit_fast.config_file import from_dict, load_config, to_dict
from deit_fast.errors import InputError
from deit_fast.recipes import RECIPES

ROOT = Path(__file__).parent.parent
EARLIER = {
    "cache_on_device": False, "memory_snapshot": False, "save_minutes": None,
    "compress_gradients": False, "view": {"mix_prob": 1.0, "randaugment_magnitude": 9.0},
    "data": {"train": "train", "val": "val"}, "codec": {"block_records": 4096},
    "model": {"patch_size": None, "embed_dim": None, "depth": None, "num_heads": None},
    "optim": {"lr_batch": 512, "betas": [0.9, 0.999]},
}  # fmt: skip
PREFIX = "deit-fast: error: "
ALL_HELP = [[], ["--help"], ["-h"], ["--version"], ["cache", "--help"], ["recipes", "--help"]] + [
    [*verb.split(), "--help"] for verb in cli.VERBS
]


def start(*args: str, **keywords) -> subprocess.Popen:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), **keywords.pop("env", {})}
    return subprocess.Popen(
        [sys.executable, "-m", "deit_fast", *args], env=environment, text=True, **keywords
    )


def refusal(capsys: pytest.CaptureFixture, *args: str) -> str:
    """The one line that a wrong command prints."""
    assert cli.main(list(args)) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith(PREFIX) and err.endswith("\n") and err.count("\n") == 1, err
    return err.removeprefix(PREFIX).rstrip("\n")


# -------------------------------------------------------------------------------- help and settings


def test_help_and_print_config_import_neither_torch_nor_numpy() -> None:
    commands = [
        *ALL_HELP,
        ["train", "--print-config"],
        ["precompute", "--recipe", "digits_student", "--views", "0:3", "--print-config"],
        ["recipes", "list"],
        ["recipes", "show", "deit_small_distilled"],
        ["train", "--optim.lr", "x"],
    ]
    script = f"""
import sys
class Guard:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("torch", "numpy", "triton", "timm", "PIL"):
            raise AssertionError("imported " + name)
sys.meta_path.insert(0, Guard())
from deit_fast.cli import main
main(["--help"])
assert "importlib.metadata" not in sys.modules  # a quarter of the time of --help
for command in {commands!r}:
    try:
        main(command)
    except SystemExit as stop:
        assert stop.code == 0, command
"""
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("args", [["--help"], ["train", "--help"], ["train", "--print-config"]])
def test_help_and_print_config_take_under_two_seconds(args: list[str]) -> None:
    """In processor time: what other processes do on the machine does not count."""
    seconds = []
    for _ in range(3):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        process = start(*args, stdout=subprocess.DEVNULL)
        assert process.wait() == 0
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        seconds.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
    assert min(seconds) < 2


def test_overview_names_every_verb_with_its_purpose(capsys: pytest.CaptureFixture) -> None:
    assert cli.main([]) == 0
    out = capsys.readouterr().out
    for verb, function in cli.VERBS.items():
        assert f"  {verb} " in out
        assert function.__doc__.splitlines()[0] in out


def test_verb_help_shows_flags_their_meaning_and_the_recipes_defaults(
    capsys: pytest.CaptureFixture,
) -> None:
    with pytest.raises(SystemExit) as stop:
        cli.main(["train", "--recipe", "digits_student", "--epochs", "7", "--help-all"])
    assert stop.value.code == 0
    out = " ".join(capsys.readouterr().out.split())
    assert "--optim.lr" in out and "--print-config" in out
    assert f"(default: {RECIPES['digits_student']().output})" in out


def test_version(capsys: pytest.CaptureFixture) -> None:
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out.startswith("deit-fast ")


# ---------------------------------------------------------------------------------------- settings


def resolved(capsys: pytest.CaptureFixture, *args: str) -> RunConfig:
    assert cli.main([*args, "--print-config"]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    return from_dict(RunConfig(), json.loads(out))


def test_recipe_then_config_file_then_flags(capsys: pytest.CaptureFixture, tmp_path: Path) -> None:
    file = tmp_path / "config.json"
    file.write_text('{"epochs": 7, "optim": {"clip_grad": 2.0}, "seed": 5}')
    recipe = RECIPES["digits_student"]()
    config = resolved(
        capsys, "train", "--recipe", "digits_student", "--config", str(file), "--seed", "9"
    )
    assert config == recipe.replace(epochs=7, seed=9, optim={"clip_grad": 2.0})


def test_a_config_file_may_name_the_recipe_that_it_changes(
    capsys: pytest.CaptureFixture, tmp_path: Path
) -> None:
    recipe = RECIPES["digits_student"]()
    file = tmp_path / "settings.yaml"
    file.write_text("recipe: digits_student\nepochs: 7\n")
    assert resolved(capsys, "train", "--config", str(file)) == recipe.replace(epochs=7)
    named = ("--recipe", "digits_student", "--config", str(file))
    assert resolved(capsys, "train", *named) == recipe.replace(epochs=7)
    assert cli.main(["train", "--recipe", "deit_small", "--config", str(file)]) == 2
    assert "changes settings of the recipe digits_student: name one" in capsys.readouterr().err
    file.write_text("recipe: digits_studnt\nepochs: 7\n")
    assert cli.main(["train", "--config", str(file)]) == 2
    assert "unknown recipe 'digits_studnt' (did you mean digits_stud" in capsys.readouterr().err
    whole = tmp_path / "config.json"  # as a run writes it: the name is only a name
    whole.write_text(json.dumps(to_dict(RunConfig(recipe="digits_student"))))
    assert resolved(capsys, "train", "--config", str(whole)) == RunConfig(recipe="digits_student")


@pytest.mark.parametrize(
    ("name", "text"),
    [
        (
            "run.yaml",
            "epochs: 7\noptim: {lr: 1e-3, clip_grad: 2}\ncodec:\n  k: null\n"
            "view:\n  augment: none\n  size_schedule: [[0, 32], [3, 224]]\nteacher: none\n",
        ),
        (
            "run.TOML",
            'epochs = 7\nteacher = "none"\n[optim]\nlr = 1e-3\nclip_grad = 2\n[codec]\nk = "none"\n'
            '[view]\naugment = "none"\nsize_schedule = [[0, 32], [3, 224]]\n',
        ),
    ],
)
def test_yaml_and_toml_are_config_files(capsys, tmp_path, name, text) -> None:
    """`none` of a choice stays a word; of a setting that takes None it is None."""
    (tmp_path / name).write_text(text)
    base = RunConfig(teacher="timm:x").replace(codec={"k": 3})
    expected = RunConfig(epochs=7).replace(
        optim={"lr": 1e-3, "clip_grad": 2.0},
        view={"augment": "none", "size_schedule": ((0, 32), (3, 224))},
    )
    assert load_config(str(tmp_path / name), base) == expected
    assert resolved(capsys, "train", "--config", str(tmp_path / name)) == expected


def test_another_teacher_does_not_get_the_settings_of_the_files(
    capsys: pytest.CaptureFixture, tmp_path: Path, caplog
) -> None:
    caplog.set_level(logging.INFO, "deit_fast")
    own = {"teacher_mean": (0.1, 0.2, 0.3), "teacher_std": (0.4, 0.5, 0.6),
           "teacher_classes": "lines.txt", "teacher_floor": 0.7}  # fmt: skip
    file = tmp_path / "config.json"
    run = RunConfig(teacher="timm:a", teacher_batch=9, **own)
    file.write_text(json.dumps(to_dict(run)))
    for verb in ("train", "precompute"):
        caplog.clear()
        config = resolved(capsys, verb, "--config", str(file), "--teacher=timm:b")
        assert config == RunConfig(teacher="timm:b", teacher_batch=9)
        assert caplog.messages == [
            "teacher_mean, teacher_std, teacher_classes, teacher_floor: not for teacher timm:b, "
            "but of timm:a: give their flags again if they hold for both"
        ]
    caplog.clear()
    words = ("train", "--config", str(file))
    config = resolved(capsys, *words, "--teacher", "timm:b", "--teacher-floor", "0.2")
    assert config == RunConfig(teacher="timm:b", teacher_batch=9, teacher_floor=0.2)
    assert caplog.messages[0].startswith("teacher_mean, teacher_std, teacher_classes: not for")
    caplog.clear()
    assert resolved(capsys, *words) == resolved(capsys, *words, "--teacher", "timm:a") == run
    file.write_text(json.dumps(own))  # of a user, for the teacher on the command line
    config = resolved(capsys, *words, "--teacher", "timm:b")
    assert config == RunConfig(teacher="timm:b", **own)
    assert caplog.messages == []


@pytest.mark.parametrize("name", RECIPES)
def test_print_config_is_a_config_file(
    name: str, capsys: pytest.CaptureFixture, tmp_path: Path
) -> None:
    config = resolved(capsys, "train", "--recipe", name)
    assert config == RECIPES[name]()
    file = tmp_path / "config.json"
    file.write_text(json.dumps(to_dict(config)))
    assert resolved(capsys, "precompute", f"--config={file}") == config


def test_both_spellings_equals_sign_lists_and_switches(capsys: pytest.CaptureFixture) -> None:
    args = "--data.on_error fail --view.crop-scale 0.1 0.5 --optim.min_lr=1e-6 --codec.k none"
    args += " --codec.temperatures 1 3 --no-resume --batch_size 32"
    config = resolved(capsys, "train", *args.split())
    assert config == RunConfig(batch_size=32, resume=False).replace(
        data={"on_error": "fail"},
        view={"crop_scale": (0.1, 0.5)},
        optim={"min_lr": 1e-6},
        codec={"temperatures": (1.0, 3.0)},
    )


@pytest.mark.parametrize("switch", ["--no-model.fused", "--model.no-fused", "--model.no_fused"])
def test_a_switch_of_a_group_turns_off(capsys: pytest.CaptureFixture, switch: str) -> None:
    config = resolved(capsys, "train", switch, "--model.pad_head", "--no-resume")
    assert config == RunConfig(resume=False).replace(model={"fused": False, "pad_head": True})


# ---------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("trian", "unknown verb 'trian' (did you mean train?); see `deit-fast --help`"),
        ("cache", "cache needs a verb: one of cache info, cache verify, cache export"),
        ("cache export x", "cache export needs --output (file to write; its suffix .parquet"),
        ("cache export x --output y --views 2", "--views needs A:B"),
        (
            "cache export x --output y.csv",
            "--output needs a name that ends in .parquet, .safetensors",
        ),
        ("cache verify x --teacher timm:y", "--teacher and --data-root go together"),
        (
            "cache verify x --samples 0",
            "--samples must be a whole number in [1, 2147483647], not 0",
        ),
        ("cache verfy x", "unknown verb 'cache verfy' (did you mean cache verify?)"),
        (
            "train --veiw.image-size 3",
            "unknown flag --veiw.image-size (did you mean --view.",
        ),
        ("train --batch_sizes 3", "unknown flag --batch_sizes (did you mean --batch-size?)"),
        ("train --lr 3", "unknown flag --lr (did you mean --optim.lr?)"),
        ("train --lr=3", "unknown flag --lr=3 (did you mean --optim.lr?)"),
        ("train --data x", "unknown flag --data (did you mean --data.root?)"),
        ("train --model x", "unknown flag --model (did you mean --model.name?)"),
        ("train --cache", "--cache needs 1 value(s), or none; see `deit-fast train --help`"),
        ("train --teacher-mean 1 2", "--teacher-mean needs 3 value(s), or none, not 1 2"),
        ("evaluate x --ema", "--ema is now --weights ema; see `deit-fast evaluate --help`"),
        ("train --no-resum", "unknown flag --no-resum (did you mean --resume?); see"),
        ("train -x", "unknown flag -x; see `deit-fast train --help`"),
        ("train optim.lr=3", "unexpected argument 'optim.lr=3'; see `deit-fast train --help`"),
        ("train --resume False", "unexpected argument 'False' after --resume"),
        ("train --resume=False", "unexpected argument 'False' after --resume"),
        ("train --optim.lr fast", "--optim.lr needs a number, not 'fast'"),
        ("train --epochs 1.5", "--epochs needs a whole number, not '1.5'"),
        ("train --epochs", "--epochs needs 1 value(s); see `deit-fast train --help`"),
        ("train --epochs --seed 1", "--epochs needs 1 value(s)"),
        ("train --device gpu", "--device needs one of 'auto', 'cpu', 'cuda', not 'gpu'"),
        ("train --codec.k some", "--codec.k needs a whole number, not 'some'; see `deit-fast"),
        ("train --view.crop_scale 0.1", "--view.crop-scale needs 2 value(s)"),
        (
            "train --codec.temperatures 1 x",
            "--codec.temperatures cannot be read from '1', 'x': it takes any number of values, "
            "each a number in [0.01, 1000], or none; see `deit-fast",
        ),
        (
            "train --batch-schedule 2 64 3",
            "--batch-schedule cannot be read from '2', '64', '3': it takes pairs of a whole number "
            "in [1, 1000000] and a whole number in [1, 2147483647]; see",
        ),
        (
            "train --view.size-schedule 0 -8 2 16",
            "view.size_schedule must be pairs of a whole number in [0, 1000000] and a whole number "
            "in [1, 8192], not 0 -8 2 16",
        ),
        (
            "train --track foo",
            "--track needs one of 'tensorboard', 'wandb', 'mlflow', 'trackio', not",
        ),
        (
            "train --save-minutes 5",
            "--save-minutes is no longer a setting: its value is always none; "
            "set save_steps; see `deit-fast train --help`",
        ),
        ("train --no-memory-snapshot", "--no-memory-snapshot is no longer a setting"),
        (
            "train --optim.betas 0.8 0.9",
            "--optim.betas is no longer a setting: its value is always",
        ),
        ("train --model.args depth", "model.args takes NAME=NUMBER, such as depth=6, not 'depth'"),
        ("train --model.args fused=1", "model.args fused=1: another setting decides fused"),
        ("train --epochs 0", "epochs must be a whole number in [1, 1000000], not 0"),
        ("train --view.repeats 0", "view.repeats must be a whole number in [1, 1000], not 0"),
        (
            "train --num-views 4 --view.repeats 3",
            "num_views must be a positive multiple of view.re",
        ),
        (
            "train --recipe digits_studnt",
            "unknown recipe 'digits_studnt' (did you mean digits_stud",
        ),
        ("train --recipe", "--recipe needs 1 value(s)"),
        ("train --config missing.json", "config file missing.json does not exist"),
        ("train --config tests", "tests is a folder"),
        (
            "precompute --views 3:2",
            "--views needs A:B, two whole numbers with A < B, at most 2^31, not '3:2'",
        ),
        (
            "precompute --views 3",
            "--views needs A:B, two whole numbers with A < B, at most 2^31, not '3'",
        ),
        ("train --views 0:2", "unknown flag --views"),
        ("evaluate", "evaluate needs RUN (folder of the run); see `deit-fast evaluate --help`"),
        ("evaluate --weights ema", "evaluate needs RUN"),
        ("export runs/x", "export needs --format (timm, onnx, torch, hf); see"),
        (
            "pack",
            "pack needs ROOT (folder of images, tar shards or Hugging Face files, with both",
        ),
        ("evaluate a b", "unexpected argument 'b'"),
        ("evaluate a --batch-size 0", "--batch-size must be a whole number in [1, 2147483647], "),
        ("report", "report needs the folder of a run; see `deit-fast report --help`"),
        ("report nowhere also --output x --title y", "run folder nowhere does not exist"),
        *(
            (
                f"{verb} s3://b/run {more}",
                "run s3://b/run is a URL, and here a folder is needed: copy",
            )
            for verb, more in [
                ("evaluate", ""),
                ("report", ""),
                ("analyze", ""),
                ("export", "--format timm"),
            ]
        ),
        ("recipes show deit_smal", "unknown recipe 'deit_smal' (did you mean deit_small?)"),
        ("demo --seeds 1 x", "--seeds cannot be read from '1', 'x'"),
        ("doctor --workers -", "--workers needs a whole number, not '-'"),
    ],
)
def test_wrong_input_is_one_line(
    command: str, message: str, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    assert refusal(capsys, *command.split()).startswith(message)


@pytest.mark.parametrize("command", ["train --codec.k none", "train --codec.k None"])
def test_none_is_a_value_of_optional_settings(command, capsys, tmp_path):
    file = tmp_path / "config.json"
    file.write_text('{"codec": {"k": 3}, "model": {"kernels": ["attention"]}}')
    config = resolved(capsys, *command.split(), "--config", str(file), "--model.kernels")
    assert config.codec.k is None and config.model.kernels == ()
    config = resolved(capsys, "train", "--config", str(file), "--model.kernels", "none")
    assert config.codec.k == 3 and config.model.kernels is None


def test_a_retired_setting_may_only_have_the_value_it_has_now(tmp_path):
    file = tmp_path / "config.json"
    file.write_text('{"optim": {"eps": 1e-8}, "view": {"crop_ratio": [0.75, 1.3333333333333333]}}')
    assert load_config(str(file), RunConfig()) == RunConfig()
    for content, message in (
        ('{"view": {"crop_ratio": [0.5, 2.0]}}', r"view\.crop_ratio, here 0\.5 2\.0, is no"),
        ('{"optim": {"lr_batch": 64}}', r"optim\.lr_batch, here 64, .* 512; scale optim\.lr"),
    ):
        file.write_text(content)
        with pytest.raises(InputError, match=message):
            load_config(str(file), RunConfig())


def test_a_config_file_of_an_earlier_version_is_read():
    """All settings that were retired, with their defaults of then."""
    assert from_dict(RunConfig(), EARLIER) == RunConfig()


def test_settings_of_an_earlier_run_are_converted(tmp_path):
    file = tmp_path / "config.json"
    model = {"patch_size": None, "embed_dim": 64, "depth": 4, "num_heads": 2}
    file.write_text(json.dumps({"model": model, "optim": {"lr": 4e-3, "lr_batch": 2048}}))
    config = load_config(str(file), RunConfig())
    assert config.model.args == ("embed_dim=64", "depth=4", "num_heads=2")
    assert config.optim.lr == 1e-3


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"model": {"depth": "six"}}, "model.depth, here 'six', is no longer a setting"),
        ({"model": {"depth": True}}, "model.depth, here True, is no longer a setting"),
        (
            {"optim": {"lr": True, "lr_batch": 1024}},
            "optim.lr must be a number in (0, 100], not True",
        ),
        (
            {"optim": {"lr": 1e-3, "lr_batch": 10**400}},
            "optim.lr_batch, here a number of 1329 bits",
        ),
        ({"optim": {"lr": 10**400}}, "optim.lr must be a number in (0, 100], not a number of"),
        ({"data": {"loader": "dali-triton", "dali_decoder": "both"}}, "data.dali_decoder, here"),
    ],
)
def test_damaged_settings_of_an_earlier_run_are_refused_by_name(tmp_path, values, words):
    file = tmp_path / "config.json"
    file.write_text(json.dumps(values))
    with pytest.raises(InputError, match=re.escape(words)):
        load_config(str(file), RunConfig())


@pytest.mark.parametrize(
    ("earlier", "decoder", "now", "warnings"),
    [
        ("pillow", "cpu", "pillow", 0),
        ("dali-triton", "cpu", "dali-cpu", 0),
        ("dali-triton", "gpu", "dali-gpu", 0),
        ("dali", "gpu", "dali-gpu", 1),
    ],
)
def test_a_loader_of_an_earlier_run_is_converted(tmp_path, caplog, earlier, decoder, now, warnings):
    file = tmp_path / "config.json"
    file.write_text(json.dumps({"data": {"loader": earlier, "dali_decoder": decoder}}))
    assert load_config(str(file), RunConfig()).data.loader == now
    assert len(caplog.messages) == warnings
    assert all("read as dali-gpu, whose pixels differ" in line for line in caplog.messages)


def test_a_retired_setting_without_influence_is_ignored_with_a_warning(tmp_path, caplog):
    file = tmp_path / "config.json"
    file.write_text('{"save_minutes": 5.0, "codec": {"block_records": 256}}')
    assert load_config(str(file), RunConfig()) == RunConfig()
    clock, block = caplog.messages
    assert "save_minutes, here 5.0, is no longer a setting" in clock and "save_steps" in clock
    assert "codec.block_records, here 256, is no longer a setting" in block


def test_unknown_config_keys_name_the_nearest(tmp_path: Path) -> None:
    for content, near in [
        ('{"veiw": {}}', "'veiw' (did you mean view?)"),
        ('{"view": {"imge_size": 1}}', "'view.imge_size' (did you mean view.image_size?)"),
        ('{"lr": 1}', "'lr' (did you mean optim.lr?)"),
        ('{"zzzzzz": 1}', "'zzzzzz'"),
    ]:
        file = tmp_path / "c.json"
        file.write_text(content)
        with pytest.raises(InputError) as error:
            load_config(str(file), RunConfig())
        assert str(error.value) == f"config file {file}: unknown setting {near}"


def test_an_error_of_another_rank_names_the_rank() -> None:
    process = start(
        "train", "--epochs", "x", stderr=subprocess.PIPE, env={"RANK": "3", "WORLD_SIZE": "4"}
    )
    assert process.communicate()[1] == (
        "deit-fast: error: rank 3: --epochs needs a whole number, not 'x'; "
        "see `deit-fast train --help`\n"
    )
    assert process.returncode == 2


def test_only_the_first_rank_prints(
    capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert cli.main(["recipes", "list"]) == 0
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (InputError("two\nlines"), "two lines"),
        (FileNotFoundError(errno.ENOENT, "No such file or directory", "a.bin"), "a.bin: No such"),
        (
            OSError(errno.ENOSPC, "No space left on device", "b.bin"),
            "b.bin: no space left to write",
        ),
        (OSError("odd"), "odd"),
        (BrokenPipeError(errno.EPIPE, "Broken pipe"), "Broken pipe"),
    ],
)
def test_errors_of_a_verb_are_one_line(
    error: Exception,
    message: str,
    capsys: pytest.CaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def fail(args: list[str]) -> str:
        raise error

    monkeypatch.setitem(cli.VERBS, "train", fail)
    assert refusal(capsys, "train").startswith(message)


def test_interrupt_is_one_line_and_130(
    capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(args: list[str]) -> str:
        raise KeyboardInterrupt

    monkeypatch.setitem(cli.VERBS, "train", interrupt)
    assert cli.main(["train"]) == 130
    assert capsys.readouterr().err == "deit-fast: interrupted\n"
    monkeypatch.setitem(cli.VERBS, "pack", interrupt)
    monkeypatch.setattr(cli, "_READ_THEIR_ARGUMENTS", {"pack"})
    assert cli.main(["pack"]) == 130
    kept = "; complete shards are kept, the same command writes the others"
    assert capsys.readouterr().err == f"deit-fast: interrupted{kept}\n"


def test_a_bug_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    def bug(args: list[str]) -> str:
        raise KeyError("bug")

    monkeypatch.setitem(cli.VERBS, "train", bug)
    with pytest.raises(KeyError):
        cli.main(["train"])


# ------------------------------------------------------------------------------------------ output


@pytest.mark.parametrize("args", [["recipes", "list"], ["train", "--help"]])
def test_a_closed_pipe_is_no_error(args: list[str]) -> None:
    read, write = os.pipe()
    os.close(read)
    process = start(*args, stdout=write, stderr=subprocess.PIPE)
    os.close(write)
    assert process.communicate()[1] == ""
    assert process.returncode == 0


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full here")
def test_a_full_disk_is_named() -> None:
    with open("/dev/full", "w") as full:
        process = start("recipes", "list", stdout=full, stderr=subprocess.PIPE)
        assert process.communicate()[1].startswith(f"{PREFIX}no space left to write")
    assert process.returncode == 2


def test_recipes_list_and_show(capsys: pytest.CaptureFixture) -> None:
    assert cli.main(["recipes", "list"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == list(RECIPES)
    assert cli.main(["recipes", "show", "digits_student"]) == 0
    out = capsys.readouterr().out
    assert RECIPES["digits_student"].__doc__.splitlines()[0] in out
    assert "view.image_size" in out
    assert "optim.layer_decay" not in out  # as in the defaults


@pytest.mark.parametrize("name", RECIPES)
def test_recipe_is_documented_and_its_model_fits_its_views(name: str) -> None:
    import torch

    from deit_fast.models.student import build_model

    config = RECIPES[name]()
    assert config.recipe == name
    text = " ".join((RECIPES[name].__doc__ or "").split())
    assert "Command: " in text and "Time" in text and "ccuracy" in text
    assert f"--recipe {name}" in text or name.startswith("digits_"), "another recipe's command"
    size = config.view.image_size
    with torch.device("meta"):
        outputs = build_model(config, 10)(torch.zeros(2, 3, size, size))
    heads = outputs if isinstance(outputs, tuple) else (outputs,)
    assert [tuple(head.shape) for head in heads] == [(2, 10)] * len(heads)
    assert len(heads) == (2 if "distilled" in config.model.name else 1)


def test_fine_tuning_at_384_has_the_published_schedule() -> None:
    """DeiT's command: 2 nodes of 8 GPUs with 32 images, lr = min_lr = 5e-6, weight decay 1e-8."""
    from deit_fast.training.optim import learning_rate
    from deit_fast.views.steps import RunSteps

    config = RECIPES["deit_base_distilled_384"]()
    assert config.batch_size == 2 * 8 * 32 and config.optim.weight_decay == 1e-8
    assert config.epochs == 30
    steps = RunSteps(5120, ((0, 512),), 30)
    rates = [learning_rate(step, config, steps) for step in range(300)]
    assert rates[0] == 1e-6 and rates[25] == pytest.approx(3e-6)
    assert rates[50:] == pytest.approx([5e-6] * 250)


def test_summary_shows_percent_counts_and_no_tables() -> None:
    text = cli.summary(
        {
            "run": "r",
            "top1": 0.9312,
            "images_per_s": 1234.5,
            "substituted": ["a", "b"],
            "per_class": {},
        }
    )
    assert text.splitlines() == [
        "run           r",
        "top1          93.12 %",
        "images per s  1234",
        "substituted   2",
    ]


def test_cache_info_and_verify(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    import torch

    from deit_fast.cache import LogitCacheWriter, build_manifest
    from deit_fast.config import CodecConfig

    folder = tmp_path / "cache"
    manifest = build_manifest(
        CodecConfig(name="topk", k=3), num_classes=10, num_samples=16, tau=1.0,
        fingerprint={"teacher.spec": "timm:x"}, block_records=8,
    )  # fmt: skip
    with LogitCacheWriter(folder, manifest) as writer:
        for view in (0, 1):
            writer.write(torch.arange(16).numpy(), view, torch.randn(16, 10))
    assert cli.main(["cache", "info", str(folder)]) == 0
    out = capsys.readouterr().out
    assert "topk (k 3, temperatures 1.0, num_classes 10)" in out
    assert "2 complete of 2" in out and "teacher.spec  timm:x" in out and "damaged" not in out
    assert re.search(r"size +\d+\.\d KiB", out)
    assert cli.main(["cache", "verify", str(folder)]) == 0
    assert "4: 4 complete, 0 pending, 0 broken" in capsys.readouterr().out

    file = max(path for path in folder.rglob("*") if path.is_file() and path.suffix != ".json")
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    assert cli.main(["cache", "verify", str(folder)]) == 1
    assert f"broken  {file.name} block 1: " in capsys.readouterr().out
    assert refusal(capsys, "cache", "info", str(tmp_path / "gone"))


def test_texts_of_files_reach_the_terminal_escaped(
    capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Colours of a verb's own text stay on a terminal."""
    evil = "\x1b]0;title\x07 \x9b \ud800\u202f5"
    monkeypatch.setitem(cli.VERBS, "doctor", lambda: f"\x1b[1mbold\x1b[0m\n{evil}")
    escaped = r"\x1b]0;title\x07 \x9b \ud800" + "\u202f5"
    assert cli.main(["doctor"]) == 0
    assert capsys.readouterr().out == r"\x1b[1mbold\x1b[0m" + f"\n{escaped}\n"
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    assert cli._for_terminal(f"\x1b[1mbold\x1b[0m{evil}") == f"\x1b[1mbold\x1b[0m{escaped}"
    record = logging.LogRecord("deit_fast", logging.WARNING, "", 0, f"a\n{evil}", (), None)
    assert cli._LogFormat().format(record) == f"warning: a\n{escaped}"
    assert cli.main(["report", f"no{evil}"]) == 2
    assert capsys.readouterr().err.strip().endswith("does not exist")


@pytest.mark.parametrize("closed", [">&-", "2>&-", "<&- >&- 2>&-"])
def test_closed_streams_are_no_error(closed):
    command = f"{sys.executable} -m deit_fast recipes list {closed}"
    done = subprocess.run(["sh", "-c", command], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and done.stderr == ""
