"""A run resumes only from what it was made of: settings, data and teacher, each changed singly.

SWEEP=all changes each harmless setting in a training of its own; without it they share one.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from deit_fast.config import Fact, RunConfig
from deit_fast.config_file import by_dotted_key, dotted_keys, from_dict, to_dict
from deit_fast.errors import InputError
from deit_fast.evaluation import evaluate
from deit_fast.models.convnet import small_convnet
from deit_fast.models.weights import read_identity
from deit_fast.precomputation import precompute
from deit_fast.runtime.files import read_json
from deit_fast.tools.analysis.runs import analyze
from deit_fast.training.checkpoints import save_checkpoint
from deit_fast.training.identity import in_short
from deit_fast.training.loop import train
from helpers.digits import write_few_digits
from helpers.runs import last_state, run_config, weights_equal

TEACHER = "deit_fast.models.convnet:small_convnet@"
ONE_BLOCK = ("patch_size=8", "embed_dim=16", "depth=1", "num_heads=1")


def write_teacher(path: Path, seed: int) -> None:
    torch.manual_seed(seed)
    save_file(small_convnet(10).state_dict(), path)


def config_of(root: Path, output: Path) -> RunConfig:
    """Two steps of twelve small images, without evaluation in between."""
    return run_config(
        root, output, max_steps=2, batch_size=12, log_every=50, eval_every=50,
        model={"weights": str(root / "start.safetensors"), "args": ONE_BLOCK},
    )  # fmt: skip


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    """Data, teacher and initial weights; a run of one step made of them, and a finished one."""
    root = tmp_path_factory.mktemp("made")
    write_few_digits(root / "data", train=5, val=3)
    for path in (root / "data").rglob("*.png"):
        Image.open(path).save(path.with_suffix(".bmp"))  # files of one size
        path.unlink()
    write_teacher(root / "teacher.safetensors", 5)
    config = config_of(root, root / "whole")
    train(config.replace(output=str(root / "plain"), max_steps=1, model={"weights": None}))
    shutil.copy(root / "plain/model.safetensors", root / "start.safetensors")
    train(config.replace(output=str(root / "base"), max_steps=1))
    train(config)
    return root


class Copy:
    """A copy of the run, which resumes with the content that is in the folder of the copy."""

    def __init__(self, made: Path, root: Path) -> None:
        self.made, self.root, self.run = made, root, root / "run"
        shutil.copytree(made / "base", self.run)

    def own(self, name: str) -> Path:
        """A copy of the data, or of weights, that may be changed."""
        copy = shutil.copytree if name == "data" else shutil.copy
        if not (self.root / name).exists():
            copy(self.made / name, self.root / name)
        return self.root / name

    @property
    def config(self) -> RunConfig:
        def found(name: str) -> str:
            return str((self.root if (self.root / name).exists() else self.made) / name)

        return config_of(self.made, self.run).replace(
            teacher=TEACHER + found("teacher.safetensors"),
            data={"root": found("data")},
            model={"weights": found("start.safetensors")},
        )


@pytest.fixture
def copied(made, tmp_path) -> Copy:
    return Copy(made, tmp_path)


# ---------------------------------------------------------------------------------------------
# Content
# ---------------------------------------------------------------------------------------------


def invert(folder: Path) -> None:
    for path in folder.iterdir():
        size = path.stat().st_size
        Image.fromarray(255 - np.asarray(Image.open(path))).save(path)
        assert path.stat().st_size == size


def other_teacher(copied: Copy) -> None:
    write_teacher(copied.own("teacher.safetensors"), 6)


def other_start(copied: Copy) -> None:
    path = copied.own("start.safetensors")
    save_file({key: value + 0.01 for key, value in load_file(path).items()}, path)


def inverted_class(copied: Copy) -> None:
    invert(copied.own("data") / "train/3")


def inverted_held_out_class(copied: Copy) -> None:
    invert(copied.own("data") / "val/3")


def fewer_samples(copied: Copy) -> None:
    next((copied.own("data") / "train/3").iterdir()).unlink()


def more_samples(copied: Copy) -> None:
    path = next((copied.own("data") / "train/3").iterdir())
    shutil.copy(path, path.with_name("more.bmp"))


def fewer_held_out_samples(copied: Copy) -> None:
    next((copied.own("data") / "val/3").iterdir()).unlink()


def renamed_class(copied: Copy) -> None:
    for split in ("train", "val"):
        (copied.own("data") / split / "3").rename(copied.root / "data" / split / "three")


def exchanged_classes(copied: Copy) -> None:
    for split in ("train", "val"):
        folder = copied.own("data") / split
        (folder / "3").rename(folder / "x")
        (folder / "4").rename(folder / "3")
        (folder / "x").rename(folder / "4")


CHANGES: list[tuple[Callable[[Copy], None], str]] = [
    (other_teacher, "teacher.weights"),
    (other_start, "model.weights"),
    (inverted_class, "data.pixels"),
    (inverted_held_out_class, "val.pixels"),
    (fewer_samples, "data.images"),
    (more_samples, "data.images"),
    (fewer_held_out_samples, "val.images"),
    (renamed_class, "data.images data.classes val.images"),
    (exchanged_classes, "data.images val.images"),
]


@pytest.mark.parametrize(("change", "names"), CHANGES)
def test_changed_content_is_refused_by_name_or_accepted(copied, change, names, caplog):
    change(copied)
    before = last_state(copied.run)
    with pytest.raises(InputError) as caught:
        train(copied.config)
    message = str(caught.value)
    assert message.endswith(f"--accept-change {names}") and "\n" not in message
    assert before["identity"] == last_state(copied.run)["identity"]
    first, *others = names.split()
    if others:
        with pytest.raises(InputError, match=f"--accept-change {' '.join(others)}$"):
            train(copied.config.replace(accept_change=(first,)))

    assert train(copied.config.replace(accept_change=tuple(names.split())))["steps"] == 2
    assert "accepted that the run goes on with" in caplog.text
    after = last_state(copied.run)
    changed = json.loads(before["identity"]), json.loads(after["identity"])
    assert set(names.split()) <= {key for key in changed[0] if changed[0][key] != changed[1][key]}
    assert read_json(copied.run / "config.json")["accept_change"] == []
    assert train(copied.config)["steps"] == 2, "the run now belongs to the new content"


def test_a_finished_run_belongs_to_what_was_accepted(copied):
    train(copied.config)
    inverted_class(copied)
    train(copied.config.replace(accept_change=("data.pixels",)))
    assert train(copied.config)["steps"] == 2


def test_data_of_fewer_steps_than_were_trained_is_refused(copied):
    train(copied.config.replace(max_steps=4))
    for folder in (copied.own("data") / "train").iterdir():
        for path in sorted(folder.iterdir())[2:]:
            path.unlink()
    with pytest.raises(
        InputError, match=r"is of step 4, but with 20 training images the run has only \d steps"
    ):
        train(copied.config.replace(max_steps=None, accept_change=("data.images",)))


def test_unreadable_held_out_images_are_said(made, copied, caplog):
    (path := next((copied.own("data") / "val/3").iterdir())).write_bytes(b"no image")
    evaluate(str(made / "whole"), data_root=str(copied.own("data")))
    analyze([made / "whole"], data_root=str(copied.own("data")), maps=0)
    assert caplog.text.count(f"1 unreadable images were substituted, the first is {path}") == 2


def test_another_model_of_the_teacher_is_refused(copied):
    spec = copied.config.teacher.replace(TEACHER, "helpers.unruly_teacher:convnet@")
    with pytest.raises(
        InputError, match=r"teacher\.model .*unruly.* --accept-change teacher\.model"
    ):
        train(copied.config.replace(teacher=spec))


def test_moved_content_resumes_silently_and_equally(copied, caplog):
    for name in ("data", "teacher.safetensors", "start.safetensors"):
        copied.own(name)
    caplog.set_level(logging.WARNING)
    train(copied.config)
    assert weights_equal(copied.run, copied.made / "whole")
    said = [line for line in caplog.messages if not line.startswith("the moving average is")]
    assert said == []


def test_another_number_of_classes_cannot_be_accepted(copied):
    for split in ("train", "val"):
        shutil.rmtree(copied.own("data") / split / "3")
    config = copied.config.replace(loss={"kind": "none"}, model={"weights": None})
    run = config.replace(
        output=str(copied.root / "other"), data={"root": str(copied.made / "data")}
    )
    train(run.replace(max_steps=1))
    accepted = tuple(get_args(Fact))
    with pytest.raises(InputError, match="has 10 classes, the data has 9"):
        train(config.replace(output=run.output, accept_change=accepted))


def test_a_teacher_and_its_caches(copied):
    """The same teacher, online or cached, goes on; another cache does not."""
    caches = [str(copied.root / name) for name in ("dense", "topk")]
    for cache, codec in zip(caches, ("dense-fp32", "topk"), strict=True):
        precompute(copied.config.replace(cache=cache, codec={"name": codec}))
    online = copied.config
    cached = [online.replace(teacher=None, cache=cache) for cache in caches]
    train(cached[0])  # the first step was online
    assert weights_equal(copied.run, copied.made / "whole")
    with pytest.raises(InputError, match=r"\(cache\.manifest .* --accept-change cache\.manifest$"):
        train(cached[1].replace(max_steps=3))
    train(cached[1].replace(max_steps=3, accept_change=("cache.manifest",)))
    shutil.move(caches[1], copied.root / "moved")
    train(cached[1].replace(max_steps=4, cache=str(copied.root / "moved")))
    train(online.replace(max_steps=5))
    other_teacher(copied)
    with pytest.raises(InputError, match=r"\(teacher\.weights .* --accept-change teacher\.weights"):
        train(copied.config.replace(max_steps=6))


# ---------------------------------------------------------------------------------------------
# Checkpoints and weights
# ---------------------------------------------------------------------------------------------


def rewrite(run: Path, change: Callable[[dict], Any]) -> None:
    state = last_state(run)
    change(state)
    save_checkpoint(run / "checkpoints", state["step"], state)


def test_a_format_of_another_version_is_refused(copied):
    rewrite(copied.run, lambda state: state.update(format=99))
    with pytest.raises(InputError, match="has format 99, this version reads 1 and 2"):
        train(copied.config.replace(accept_change=tuple(get_args(Fact))))


def test_an_older_checkpoint_resumes_with_one_line(copied, caplog):
    rewrite(copied.run, lambda state: (state.pop("identity"), state.update(format=1)))
    other_teacher(copied)
    caplog.set_level(logging.INFO)
    train(copied.config)
    lines = [r.getMessage() for r in caplog.records if "earlier version" in r.getMessage()]
    assert len(lines) == 1 and "data and teacher are still the same is not known" in lines[0]
    assert "identity" in last_state(copied.run)


def test_weights_say_what_the_run_was_made_of(made):
    facts = json.loads(last_state(made / "whole")["identity"])
    assert set(facts) == set(get_args(Fact)) - {"cache.manifest"}
    assert facts["data.classes"] == [str(digit) for digit in range(10)]
    for name in ("model.safetensors", "ema.safetensors"):
        assert read_identity(made / "whole" / name) == facts


def test_ranks_compare_what_they_are_made_of(made):
    facts = read_identity(made / "whole/model.safetensors")
    other = {**facts, "val.pixels": {}}
    differing = in_short(facts).items() - in_short(other).items()
    assert [name for name, _ in differing] == ["val.pixels"]


def test_an_image_that_was_unreadable_once_is_not_another_image(copied):
    data = copied.own("data")
    victim = sorted((data / "train/0").iterdir())[0]
    content = victim.read_bytes()
    victim.write_bytes(b"\0" * len(content))
    train(copied.config)
    victim.write_bytes(content)
    train(copied.config.replace(max_steps=3))


# ---------------------------------------------------------------------------------------------
# Evaluation and analysis
# ---------------------------------------------------------------------------------------------


def test_labels_follow_the_runs_class_names_in_other_data(made, copied, caplog):
    data, run = copied.own("data"), str(made / "whole")
    shutil.rmtree(data / "train")
    (data / "val/0").rename(data / "val/zero")
    with pytest.raises(InputError, match="has class 'zero', which the run lacks"):
        evaluate(run, data_root=str(data))
    with pytest.raises(InputError, match="has class 'zero', which the run lacks"):
        analyze([Path(run)], data_root=str(data))
    own = evaluate(run)
    assert not caplog.records
    shutil.rmtree(data / "val/zero")  # the labels of the others would move by one
    part = evaluate(run, data_root=str(data))
    assert part["per_class"] == {key: own["per_class"][key] for key in "123456789"}
    (analysed,) = analyze([Path(run)], data_root=str(data), maps=0)
    assert analysed["accuracy"]["mean_logits"] == pytest.approx(part["top1"])
    text = caplog.text
    assert "has no image of 1 of the 10 classes of" in text and "the first is '0'" in text
    assert "are other images than those held out in" in text


def test_held_out_images_with_other_pixels_are_said(made, copied, caplog):
    invert(copied.own("data") / "val/3")
    evaluate(str(made / "whole"), data_root=str(copied.own("data")))
    assert "are other images than those held out in" in caplog.text


def test_an_older_run_says_what_it_does_not_know(made, copied, caplog):
    run, data = copied.root / "old", copied.own("data")
    shutil.copytree(made / "whole", run)
    path = run / "model.safetensors"
    save_file(load_file(path), path)  # without what the run was made of
    shutil.rmtree(data / "train")
    (data / "val/0").rename(data / "val/zero")
    with pytest.raises(InputError, match="has class 'zero', which the run lacks"):
        evaluate(str(run), data_root=str(data))  # result.json has the names
    (run / "result.json").unlink()
    evaluate(str(run), data_root=str(data))
    lines = [r.getMessage() for r in caplog.records]
    assert lines == [f"{run} does not record its classes: labels are taken as their order here"]


# ---------------------------------------------------------------------------------------------
# Settings
# ---------------------------------------------------------------------------------------------

# The values of settings that do not decide a result; all others are refused. Those that are given
# with the content are above.
HARMLESS: dict[str, Any] = {
    "recipe": "other", "log_every": 1, "eval_every": 1, "save_every": 3, "save_steps": 1,
    "on_nonfinite": "rollback", "teacher_batch": 7, "teacher_floor": 0.01, "device": "cpu",
    "data.workers": 1, "profile_steps": 1, "track": ["tensorboard"], "compile": "none",
    "keep_every": 1, "data.verify": "sizes", "data.local_copy_gb": 1.0,
}  # fmt: skip
ROUNDING = {"accumulate": 2}
GIVEN = {"output", "mirror", "resume", "max_steps", "accept_change", "teacher",
         "teacher_classes", "cache", "more_caches", "data.root", "model.weights"}  # fmt: skip
# Refused before the checkpoint is read: they need other settings, a GPU, or other initial weights.
EARLIER = {
    "optim.schedule",
    "optim.decay_epochs",
    "resume_from",
    "check_teacher_every",
    "cuda_graphs",
    "compat",
    "model.name",
    "model.args",
    "model.head",
    "model.wide",
    "teacher_mean",
    "teacher_std",
    "teacher_size",
    "targets",
    "data.image_column",
    "data.label_column",
}
OTHER: dict[str, Any] = {
    "model.name": "deit_tiny_patch16_224", "model.kernels": ["attention"], "view.image_size": 24,
    "model.args": ["patch_size=8", "embed_dim=32", "depth=1", "num_heads=1"],
    "view.crop_scale": [0.1, 1.0], "view.mean": [0.1, 0.2, 0.3], "view.std": [0.1, 0.2, 0.3],
    "codec.temperatures": [2.0], "num_views": 6, "optim.clip_grad": 1.0, "codec.k": 3,
    "codec.draws": 3,
    "optim.layer_decay": 0.5, "view.augment": "three_augment", "view.repeats": 1,
    "loss.kind": "soft", "loss.base": "bce", "view.crop": "simple", "data.on_error": "fail",
    "model.stochastic_depth": "subset", "model.residual": "bfloat16", "loss.tail": "drop",
    "loss.reduction": "numel", "optim.name": "lamb", "optim.impl": "torch",
    "codec.name": "hard", "data.loader": "dali-cpu", "data.source": "synthetic", "compat": "deit",
    "check_teacher_every": 1, "optim.schedule": "wsd", "optim.decay_epochs": 1.0,
    "resume_from": "other.pt", "view.size_schedule": [[0, 16]], "batch_schedule": [[1, 4]],
    "teacher_mean": [0.1, 0.2, 0.3], "teacher_std": [0.1, 0.2, 0.3], "targets": ["cls"],
    "teacher_size": 48,
    "features.block": 1, "features.grid": 2, "features.codec": "int8", "features.reduce": "pca",
    "features.dim": 8, "features.weights": [2.0], "features.losses": ["mse"],
    "features.normalise": ["standard"], "features.projectors": ["mlp"], "features.token": "mean",
    "model.head": "lift", "model.wide": 64, "features.student_block": 1, "features.drop": "random",
    "loss.teachers": [1.0], "data.image_column": "x", "data.label_column": "x",
}  # fmt: skip


def other_value(key: str, value: Any) -> Any:
    if key in OTHER:
        return OTHER[key]
    if isinstance(value, bool):
        return not value
    return value + 1 if isinstance(value, int) else value / 2 or 0.25


def changed(config: RunConfig, key: str, value: Any) -> RunConfig:
    group, _, name = key.rpartition(".")
    return from_dict(config, {group: {name: value}} if group else {name: value})


def test_each_setting_is_harmless_or_refused_by_name(copied):
    config = copied.config
    values = by_dotted_key(json.loads(json.dumps(to_dict(config))))
    rest = [key for key in dotted_keys() if key not in {*HARMLESS, *ROUNDING, *GIVEN}]
    assert len(rest) > 40
    for key in rest:
        message = ""
        try:
            train(changed(config, key, other_value(key, values[key])))
        except InputError as error:
            message = str(error)
        assert message and "\n" not in message, key
        assert key in EARLIER or f"of another configuration ({key} " in message, (key, message)
    assert last_state(copied.run)["step"] == 1


def test_harmless_settings_change_no_result(copied, tmp_path):
    groups = [HARMLESS]
    if os.environ.get("SWEEP") == "all":
        groups = [{key: value} for key, value in HARMLESS.items()]
    for number, group in enumerate(groups):
        (tmp_path / str(number)).mkdir()
        each = Copy(copied.made, tmp_path / str(number))
        config = each.config
        for key, value in group.items():
            config = changed(config, key, value)
        train(config)
        assert weights_equal(each.run, copied.made / "whole"), group


def test_accumulated_parts_change_a_result_by_rounding(copied):
    train(changed(copied.config, "accumulate", ROUNDING["accumulate"]))
    mine, theirs = (load_file(run / "model.safetensors") for run in
                    (copied.run, copied.made / "whole"))  # fmt: skip
    for name, value in theirs.items():
        assert torch.allclose(mine[name], value, atol=1e-5), name
