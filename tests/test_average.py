"""The moving average of the weights: how old it is, in which dtype, and what a run makes of it."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from timm.utils import ModelEma, ModelEmaV3
from torch import nn

from deit_fast.config import MOST_INITIAL_SHARE, OptimConfig, RunConfig
from deit_fast.config_file import from_earlier, load_config, to_dict
from deit_fast.errors import InputError
from deit_fast.evaluation import evaluate, evaluate_models
from deit_fast.models import load_weights
from deit_fast.recipes import RECIPES
from deit_fast.training.checkpoints import list_checkpoints, load_newest, save_checkpoint
from deit_fast.training.loop import train
from deit_fast.training.optim import Average, create_average
from helpers.runs import last_state, run_config, unruly

# Training images of the data sets of the recipes that state an age.
IMAGES = {
    "deit_small_distilled": 1_281_167, "deit_base_distilled_384": 1_281_167,
    "deit_base_distilled_1000ep": 1_281_167, "deit3_base": 1_281_167,
    "imagenet_100_small": 127_000, "cifar_32": 50_000,
}  # fmt: skip


def mean_age(ema: ModelEmaV3, steps: int) -> float:
    """Mean age of the weights in an average after ``steps`` steps, in steps."""
    age = 0.0
    for step in range(steps):
        age = (age + 1) * ema.get_decay(step)  # the newest weights enter at age 0
    return age


def mean_age_of_constant_decay(decay: float, steps: int) -> float:
    """Sum over k of k times the share (1 - d) d^k; the rest is the weights after the first step."""
    return decay * (1 - decay ** (steps - 1)) / (1 - decay)


@pytest.mark.parametrize("name", IMAGES)
def test_the_age_of_a_recipes_average_is_that_of_its_decay(name: str) -> None:
    config = RECIPES[name]()
    steps = config.epochs * (IMAGES[name] // config.batch_size)
    ema = create_average(nn.Linear(1, 1), config.optim)
    share = mean_age(ema, steps) / steps
    assert share == pytest.approx(
        mean_age_of_constant_decay(config.optim.ema_decay, steps) / steps, rel=1e-6
    )
    assert ema.get_decay(steps) == config.optim.ema_decay
    text = " ".join((RECIPES[name].__doc__ or "").split())
    stated = re.search(r"mean age of ([\d.]+) % of the run", text)
    if stated is None:  # those that have DeiT's own
        assert name == "deit_small_distilled" and f"{100 * share:.1f}" == "6.7"
    else:
        assert f"{100 * share:.1f}" == stated[1]


def test_a_warm_up_never_reaches_deits_decay() -> None:
    ema = create_average(nn.Linear(1, 1), OptimConfig(ema_warmup=True))
    steps = 300 * (1_281_167 // 1024)
    assert ema.get_decay(steps) == pytest.approx(0.999808, abs=1e-6)
    assert mean_age(ema, steps) / steps == pytest.approx(0.0138, abs=1e-4)


def test_no_decay_is_no_average() -> None:
    assert create_average(nn.Linear(1, 1), OptimConfig(ema_decay=0.0)) is None


@pytest.mark.parametrize("warms_up", [False, True])
def test_the_average_is_that_of_timms_trainer(warms_up: bool) -> None:
    """Which counts from 1; with warm-up this package counts from 0, as its earlier versions did."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 7), nn.BatchNorm1d(7))
    mine = create_average(model, OptimConfig(ema_decay=0.9, ema_warmup=warms_up))
    timms = ModelEmaV3(model, decay=0.9, use_warmup=warms_up)
    average = Average(mine, model)
    for step in range(8):
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter))
        model(torch.randn(4, 5))
        average.update(step)
        timms.update(model, step=step if warms_up else step + 1)
        theirs = timms.module.state_dict()
        for key, value in mine.module.state_dict().items():
            assert torch.equal(value, theirs[key]), (key, step)


@pytest.mark.parametrize("decay", [0.99996, 0.9])
def test_the_average_is_deits_but_for_the_first_step(decay: float) -> None:
    """DeiT's main.py uses timm's first class, whose average begins at the initial weights w_0, this
    one at those after the first step: after n steps they differ by d^n (w_1 - w_0)."""
    model = nn.Sequential(nn.Linear(5, 7), nn.LayerNorm(7)).double()
    initial = {key: value.clone() for key, value in model.state_dict().items()}
    deits = ModelEma(model, decay=decay)
    average = Average(mine := create_average(model, OptimConfig(ema_decay=decay)), model)
    for step in range(20):
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter))
        if step == 0:
            first = {key: value.clone() for key, value in model.state_dict().items()}
            late = ModelEma(model, decay=decay)
        average.update(step)
        deits.update(model)
        late.update(model)
        for key, value in mine.module.state_dict().items():
            torch.testing.assert_close(value, late.ema.state_dict()[key], rtol=1e-13, atol=1e-15)
            rest = decay ** (step + 1) * (first[key] - initial[key])
            expected = deits.ema.state_dict()[key] + rest
            torch.testing.assert_close(value, expected, rtol=1e-13, atol=1e-14)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_half_precision_average_is_kept_in_float32(dtype: torch.dtype) -> None:
    """In bfloat16 a share of 4e-5 of a change of 1 is below half a unit in the last place."""
    model = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2)).to(dtype)
    average = Average(ema := create_average(model, OptimConfig()), model)
    expected = {key: value.double() for key, value in model.state_dict().items()}
    for step in range(200):
        with torch.no_grad():
            model[0].weight.fill_(1.0 + step % 2)
        average.update(step)
        weight = 1.0 if step == 0 else 1 - 0.99996
        for key, value in model.state_dict().items():
            expected[key] = torch.lerp(expected[key], value.double(), weight)
    saved = ema.module.state_dict()
    assert saved["0.weight"].dtype == saved["1.running_mean"].dtype == torch.float32
    assert saved["1.num_batches_tracked"].dtype == torch.int64
    for key in ("0.weight", "0.bias", "1.running_var"):
        torch.testing.assert_close(saved[key].double(), expected[key], rtol=1e-5, atol=0)
    assert saved["0.weight"].min() > 1.0
    assert model[0].weight.dtype == dtype


@pytest.mark.parametrize("decay", [0.99996, 0.5])
@pytest.mark.parametrize("warms_up", [False, True])
def test_the_share_of_the_initial_weights_is_that_in_the_average(
    decay: float, warms_up: bool
) -> None:
    """Weights of 1 at first, then of 0: the average is the share of the first."""
    config = OptimConfig(ema_decay=decay, ema_warmup=warms_up)
    model = nn.Linear(1, 1, bias=False).double()
    average = Average(ema := create_average(model, config), model)
    for step in range(40):
        nn.init.constant_(model.weight, float(step < 1 + warms_up))
        average.update(step)
        share = ema.module.weight.item()
        assert config.initial_share(step + 1) == pytest.approx(share, rel=1e-12), step
    assert config.initial_share(10**6) < 1e-10


def test_the_stated_number_of_steps_of_the_default_decay() -> None:
    default = OptimConfig()
    assert default.initial_share(57_564) > MOST_INITIAL_SHARE >= default.initial_share(57_565)


# ---------------------------------------------------------------------------------------------
# Whole runs
# ---------------------------------------------------------------------------------------------


@pytest.fixture
def weights_of_steps(monkeypatch: pytest.MonkeyPatch) -> dict[int, dict[str, torch.Tensor]]:
    """The model's weights after each step, in float64, as the average sees them."""
    seen: dict[int, dict[str, torch.Tensor]] = {}
    update, init = Average.update, Average.__init__

    def noted_init(self: Any, ema: Any, model: nn.Module) -> None:
        init(self, ema, model)
        self.model = model

    def noted_update(self: Any, step: int) -> None:
        update(self, step)
        seen[step] = {key: value.double() for key, value in self.model.state_dict().items()}

    monkeypatch.setattr(Average, "__init__", noted_init)
    monkeypatch.setattr(Average, "update", noted_update)
    return seen


@pytest.mark.parametrize("how", ["accumulate", "resume", "rollback"])
def test_the_average_of_a_run_is_that_of_its_steps(
    world: Path, tmp_path: Path, weights_of_steps, monkeypatch, how: str
) -> None:
    config = unruly(world, tmp_path, optim={"ema_decay": 0.7}, save_steps=3, epochs=1)
    if how == "accumulate":
        config = config.replace(accumulate=2)
    if how == "resume":
        train(config.replace(max_steps=3))
    if how == "rollback":
        monkeypatch.setenv("UNRULY", "nan:4")
        config = config.replace(on_nonfinite="rollback")
    skipped = train(config)["skipped_steps"]
    assert skipped == ([4] if how == "rollback" else [])
    trained = [step for step in range(6) if step not in skipped]
    expected = weights_of_steps[0]
    for step in trained[1:]:
        for key, value in weights_of_steps[step].items():
            expected[key] = 0.7 * expected[key] + 0.3 * value
    saved = load_file(tmp_path / "ema.safetensors")
    for key, value in saved.items():
        torch.testing.assert_close(value.double(), expected[key], rtol=1e-5, atol=1e-7)


class HalfPrecision(nn.Module):
    """A student in bfloat16 that casts its images by name, and not to its weights' dtype."""

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(3 * 16 * 16)
        self.layer = nn.Linear(3 * 16 * 16, num_classes)
        self.to(torch.bfloat16)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.layer(self.norm(images.flatten(1).bfloat16()))


def test_evaluate_measures_the_average_of_a_half_precision_student_as_training_did(
    world: Path, tmp_path: Path
) -> None:
    model = f"{__name__}:HalfPrecision"
    config = run_config(
        world, tmp_path, epochs=1, max_steps=3, teacher=None, loss={"kind": "none"},
        model={"name": model, "drop_path": 0.0, "args": ()}, optim={"ema_decay": 0.7},
    )  # fmt: skip
    losses: list[float] = []
    with pytest.MonkeyPatch.context() as patch:
        from deit_fast.training import loop

        def noted(*args: Any) -> list[dict[str, Any]]:
            found = evaluate_models(*args)
            losses.extend(each["loss"] for each in found)
            return found

        patch.setattr(loop, "evaluate_models", noted)
        result = train(config)
    assert load_file(tmp_path / "ema.safetensors")["layer.weight"].dtype == torch.float32
    found = evaluate(str(tmp_path), weights="ema", models=[model])
    assert found["top1"] == result["ema_top1"] and found["loss"] == losses[1] != losses[0]


def written_before_the_warm_up(folder: Path) -> None:
    """Make a run's newest checkpoint and config.json those of a version without the setting."""
    path, state = load_newest(folder / "checkpoints")
    saved = json.loads(state["config"])
    del saved["optim"]["ema_warmup"]
    save_checkpoint(path.parent, state["step"], state | {"config": json.dumps(saved)})
    (folder / "config.json").write_text(json.dumps(saved))


def test_a_run_of_an_earlier_version_goes_on_with_its_warm_up(
    world: Path, tmp_path: Path, caplog
) -> None:
    whole = run_config(world, tmp_path / "whole", optim={"ema_warmup": True}, epochs=1)
    train(whole)
    config = run_config(world, tmp_path / "old", epochs=1)
    train(config.replace(optim={"ema_warmup": True}, max_steps=2))
    written_before_the_warm_up(tmp_path / "old")
    assert load_config(str(tmp_path / "old/config.json"), RunConfig()).optim.ema_warmup
    for steps in (4, None):  # the command of before, twice
        caplog.clear()
        with caplog.at_level("INFO"):
            train(config.replace(max_steps=steps))
        assert "its moving average continues with optim.ema_warmup" in caplog.text
    old, new = (last_state(tmp_path / name)["ema"] for name in ("old", "whole"))
    assert all(torch.equal(old[key], new[key]) for key in new)
    assert json.loads((tmp_path / "old/config.json").read_text())["optim"]["ema_warmup"] is True


def test_a_run_does_not_begin_to_warm_up_its_average(world: Path, tmp_path: Path) -> None:
    config = run_config(world, tmp_path, max_steps=1)
    train(config)
    with pytest.raises(InputError, match=r"optim\.ema_warmup False there, True here"):
        train(config.replace(optim={"ema_warmup": True}))
    assert len(list_checkpoints(tmp_path / "checkpoints")) == 1


def test_only_files_of_runs_of_before_had_the_warm_up() -> None:
    def warms_up(optim: dict[str, Any]) -> bool | None:
        return from_earlier({"optim": optim})["optim"].get("ema_warmup")

    now = to_dict(OptimConfig())
    before = {key: value for key, value in now.items() if key != "ema_warmup"}
    assert warms_up(before) is True
    assert warms_up(before | {"ema_decay": 0.0}) is False
    assert warms_up(now) is False
    assert warms_up({"ema_decay": 0.9998}) is None, "a user's file has some of the settings"


@pytest.mark.parametrize(
    ("optim", "steps", "share"),
    [
        ({"ema_decay": 0.99996}, 6, "100.0"),
        ({"ema_decay": 0.7}, 7, "11.8"),
        ({"ema_decay": 0.7}, 8, None),  # 8.2 %
        ({"ema_decay": 0.99996, "ema_warmup": True}, 8, None),
        ({"ema_decay": 0.0}, 6, None),
    ],
    ids=["DeiTs", "just-too-short", "long-enough", "with-warm-up", "none"],
)  # fmt: skip
def test_an_average_of_mostly_initial_weights_is_named_where_it_is_made_and_read(
    world: Path, tmp_path: Path, caplog, optim: dict[str, Any], steps: int, share: str | None
) -> None:
    train(run_config(world, tmp_path, optim=optim, max_steps=steps))
    said = [line for line in caplog.messages if "the initial weights" in line]
    expected = [
        f"the moving average is {share} % the initial weights after {steps} steps: use "
        f"model.safetensors, or train with a smaller optim.ema_decay or with optim.ema_warmup"
    ]
    assert said == (expected if share else [])
    caplog.clear()
    checkpoint = list_checkpoints(tmp_path / "checkpoints")[-1]
    for name in (checkpoint, f"{checkpoint}#model", tmp_path / "ema.safetensors"):
        if optim["ema_decay"] or name == checkpoint:
            load_weights(name)
    assert caplog.messages == (
        [f"weights file {checkpoint}: its average is {share} % the initial weights of its run: "
         f"{checkpoint}#model is what was trained"] if share else []
    )  # fmt: skip


def test_a_checkpoint_of_another_program_has_no_such_share(tmp_path: Path, caplog) -> None:
    state = nn.Linear(2, 2).state_dict()
    torch.save({"ema": state, "model": state, "config": "a.yaml", "step": 3}, tmp_path / "w.pt")
    load_weights(tmp_path / "w.pt")
    assert not [record for record in caplog.records if record.levelname == "WARNING"]
