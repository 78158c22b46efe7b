"""The training loop: schedule, parameter groups, resuming, and the teachers that it accepts."""

from __future__ import annotations

import json
import logging
import re
import sys
import types
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from timm.scheduler import CosineLRScheduler

from deit_fast.cache import CacheMismatch, ReadAhead
from deit_fast.config import CodecConfig, OptimConfig, RunConfig
from deit_fast.errors import InputError
from deit_fast.evaluation import evaluation_text
from deit_fast.kernels.distillation_loss import TopK
from deit_fast.models import create_student
from deit_fast.models.convnet import small_convnet
from deit_fast.models.fuse import unfuse
from deit_fast.models.student import build_model
from deit_fast.precomputation import estimate as precompute_estimate
from deit_fast.precomputation import precompute
from deit_fast.runtime.distributed import ProcessGroup
from deit_fast.runtime.files import read_json
from deit_fast.runtime.metrics import MetricsFile, read_metrics
from deit_fast.runtime.speed import StepClock, StepMeter, model_costs, training_flops
from deit_fast.training import remarks, run
from deit_fast.training.checkpoints import list_checkpoints, load_newest, save_checkpoint
from deit_fast.training.loop import train
from deit_fast.training.optim import create_optimizer, learning_rate
from deit_fast.training.step import _agreement
from deit_fast.training.teacher import RunTeacher
from deit_fast.views.steps import RunSteps
from helpers.runs import comparable_rows, run_config, weights_equal


def test_the_log_line_shows_the_row_of_metrics(world, tmp_path, caplog):
    config = run_config(world, tmp_path, max_steps=4, log_every=2)
    with caplog.at_level(logging.INFO, "deit_fast"):
        result = train(config)
    lines = [r.message for r in caplog.records if r.message.startswith("step ")]
    assert [line.split()[1] for line in lines] == ["2/4", "4/4"]
    row = next(row for row in read_metrics(tmp_path / "metrics.jsonl") if row["kind"] == "train")
    assert f"loss {row['loss']:.4f} (base {row['base_loss']:.4f}, distillation" in lines[0]
    assert f"{row['step_ms']:.0f} ms" in lines[0] and "MFU n/a" in lines[0]
    assert row["images_per_s"] == pytest.approx(32e3 / row["step_ms"])
    assert row["seconds_left"] == pytest.approx(2e-3 * row["step_ms"])
    assert lines[1].endswith("0:00:00 left")
    (epoch,) = [r.message for r in caplog.records if r.message.startswith("epoch ")]
    assert epoch == f"epoch 1  {evaluation_text(result)}"
    assert "distillation " in epoch and "average " in epoch and "top-5 " in epoch
    *_, row = read_metrics(tmp_path / "metrics.jsonl")
    assert row["kind"] == "eval" and row["top5"] == result["top5"]
    names = ("model.safetensors", "ema.safetensors", "best.safetensors")
    paths = ", ".join(str(tmp_path / name) for name in names)
    assert caplog.messages[-1] == f"finished; the weights are {paths}"
    assert read_json(tmp_path / "result.json")["weights_path"] == str(tmp_path / names[0])


def test_rows_come_at_the_steps_that_were_asked_for(world, tmp_path):
    """Every fifth step and the last; epochs of six steps, a resume and accumulation change none."""
    config = run_config(world, tmp_path, log_every=5, accumulate=2, save_steps=4, epochs=2)
    train(config.replace(max_steps=7))
    train(config)
    rows = read_metrics(tmp_path / "metrics.jsonl")
    assert [row["step"] for row in rows if row["kind"] == "train"] == [5, 7, 10, 12]
    assert [row["step"] for row in rows if row["kind"] == "eval"] == [6, 7, 12]


def test_agreement_is_the_share_of_views_with_the_teachers_class(world, tmp_path):
    heads = [torch.tensor(rows, dtype=torch.float32) for rows in
             ([[5, 0, 1], [0, 3, 1], [0, 1, 2]], [[0, 4, 0], [0, 1, 0], [0, 9, 0]])]  # fmt: skip
    dense = torch.tensor([[0.0, 2.0, 1.0], [0.0, 2.0, 1.0], [1.0, 2.0, 0.0]])
    best = TopK(torch.tensor([[2, 1]] * 3), torch.tensor([[-3.0, -0.1]] * 3), torch.zeros(3))
    for teacher in (dense, best, torch.tensor([1, 1, 1])):
        shares = [_agreement(part, teacher).item() for part in ([heads[0]], [heads[1]], heads)]
        assert shares == pytest.approx([1 / 3, 1, 2 / 3])
    train(run_config(world, tmp_path / "soft", max_steps=2, loss={"kind": "soft"}))
    train(run_config(world, tmp_path / "none", max_steps=2, loss={"kind": "none"}, teacher=None))
    soft, none = (read_metrics(tmp_path / kind / "metrics.jsonl") for kind in ("soft", "none"))
    shares = [32 * row["agreement"] for row in soft if row["kind"] == "train"]
    assert len(shares) == 2 and all(share == pytest.approx(round(share)) for share in shares)
    assert not any("agreement" in row for row in none)


def test_a_checkpoint_between_two_reports_holds_the_training_time(world, tmp_path):
    train(run_config(world, tmp_path, epochs=1, log_every=100, save_steps=4))
    newest_two = list_checkpoints(tmp_path / "checkpoints")
    states = [torch.load(path, weights_only=True) for path in newest_two]
    assert [state["step"] for state in states] == [4, 6]
    assert 0 < states[0]["train_seconds"] < states[1]["train_seconds"]


def test_time_inside_a_pause_is_not_training_time(monkeypatch):
    times = iter([0.0, 2.0, 5.0, 9.0, 10.0]).__next__
    monkeypatch.setattr("deit_fast.runtime.speed.time", SimpleNamespace(perf_counter=times))
    clock, meter = StepClock(), StepMeter(ProcessGroup(), torch.device("cpu"))
    laps = [clock.lap()]  # at 2 s
    with clock.paused():  # from 5 s to 9 s
        pass
    laps.append(clock.lap())  # at 10 s
    assert [lap.seconds for lap in laps] == [2.0, 4.0]
    for lap in laps:
        meter.count(8)
        meter.add(lap)
    speed = meter.read(40, {})
    assert speed["step_ms"] == 3000 and speed["seconds_left"] == 15


def test_a_run_that_fails_at_its_start_closes_what_it_opened(world, tmp_path, monkeypatch):
    closed = []
    for opened in (RunTeacher, MetricsFile):
        monkeypatch.setattr(opened, "close", lambda it, *_: closed.append(type(it).__name__))

    def fail(*_: object) -> None:
        raise RuntimeError("no step")

    monkeypatch.setattr(run, "log_compile", fail)
    with pytest.raises(RuntimeError, match="no step"):
        train(run_config(world, tmp_path))
    assert closed == ["MetricsFile", "RunTeacher"]


class ReadsAValue(torch.nn.Module):
    """A student whose forward depends on values, which the meta device does not have."""

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.body, self.num_classes = torch.nn.Linear(3, num_classes), num_classes

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        means = images.mean((2, 3))
        return self.body(means / max(1.0, float(means.abs().max())))


@pytest.mark.parametrize("countable", [True, False], ids=["counted", "not-counted"])
def test_a_gpu_of_known_speed_adds_the_utilisation(world, tmp_path, monkeypatch, countable):
    """A model whose operations cannot be counted is trained all the same."""
    monkeypatch.setattr(run, "peak_flops", lambda device: 989e12)
    config = run_config(world, tmp_path, max_steps=8)
    if not countable:
        monkeypatch.setitem(sys.modules, "own_students", types.ModuleType("own_students"))
        monkeypatch.setattr(sys.modules["own_students"], "make", ReadsAValue, raising=False)
        config = config.replace(model={"name": "own_students:make", "args": (), "drop_path": 0.0})
    assert train(config)["steps"] == 8
    rows = [row for row in read_metrics(tmp_path / "metrics.jsonl") if row["kind"] == "train"]
    assert any("images_per_s" in row for row in rows)
    assert [row for row in rows if "images_per_s" in row and ("mfu" in row) != countable] == []
    if countable:
        *_, row = rows
        side = config.view.image_size
        count = training_flops(unfuse(build_model(config, 10)), side)
        assert row["mfu"] == pytest.approx(row["images_per_s"] * count / 989e12, rel=0.01)


def test_training_flops_agree_with_the_published_table():
    """DeiT-S: 4.6 GFLOPs an image, multiply-adds (DeiT, table 5 with timm's count); times 2 x 3."""
    model = create_student("deit_small_distilled_patch16_224", 1000, fused=False)
    assert training_flops(model, 224) == pytest.approx(6 * 4.6e9, rel=0.02)
    assert training_flops(create_student("resnet18", 10), 224) == pytest.approx(
        6 * 1.81e9, rel=0.02
    )


def test_costs_of_a_model_are_its_parameters_and_the_forward_of_an_image():
    """DeiT-S with two heads: 22.4 million parameters (timm's table); resnet18: 11.7 million."""
    found = model_costs(create_student("deit_small_distilled_patch16_224", 1000, fused=False), 224)
    assert found["parameters"] == pytest.approx(22.4e6, rel=0.005)
    assert found["forward_flops"] == pytest.approx(2 * 4.6e9, rel=0.02)
    counted = torch.nn.Linear(2, 3)  # it takes no images
    assert model_costs(counted, 224) == {"parameters": 9}


def test_learning_rate_equals_timms_cosine_schedule():
    config = RunConfig(batch_size=512, optim=OptimConfig(lr=2e-3, min_lr=1e-5, warmup_epochs=2))
    parameter = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([parameter], lr=2e-3)
    scheduler = CosineLRScheduler(
        optimizer, t_initial=100, lr_min=1e-5, warmup_t=20, warmup_lr_init=1e-6, t_in_epochs=False
    )
    for step in range(100):
        scheduler.step_update(step)
        ours = learning_rate(step, config, RunSteps(5120, ((0, 512),), 10))
        assert ours == pytest.approx(optimizer.param_groups[0]["lr"], rel=1e-12), step


def test_tokens_position_biases_and_norms_do_not_decay():
    model = create_student("deit_tiny_distilled_patch16_224", 3, img_size=32, depth=1)
    groups = create_optimizer(model, OptimConfig(weight_decay=0.05)).param_groups
    names = {id(p): name for name, p in model.named_parameters()}
    free = {names[id(p)] for g in groups if g["weight_decay"] == 0 for p in g["params"]}
    decayed = {names[id(p)] for g in groups if g["weight_decay"] == 0.05 for p in g["params"]}
    assert {"cls_token", "dist_token", "pos_embed", "norm.weight", "head.bias"} <= free
    assert decayed == {name for name in names.values() if name.endswith("weight")
                       and "norm" not in name}  # fmt: skip


def test_interrupted_run_equals_uninterrupted(world, tmp_path):
    """Stopped inside an epoch, then at its end: weights, moving average and rows are the same."""
    whole = run_config(world, tmp_path / "whole")
    train(whole)
    parts = run_config(world, tmp_path / "parts")
    train(parts.replace(max_steps=4))
    train(parts.replace(max_steps=8))
    train(parts)
    assert weights_equal(tmp_path / "whole", tmp_path / "parts")
    rows = [r for r in comparable_rows(tmp_path / "whole") if r["kind"] == "train"]
    assert rows == [r for r in comparable_rows(tmp_path / "parts") if r["kind"] == "train"]
    assert len(rows) == 12
    # The same command once more finds the run finished and changes nothing.
    again = train(parts)
    assert again["steps"] == 12
    assert weights_equal(tmp_path / "whole", tmp_path / "parts")


def test_cached_dense_teacher_equals_online_exactly(world, tmp_path):
    for kind in ("soft", "hard"):
        online = run_config(world, tmp_path / f"online-{kind}", loss={"kind": kind})
        cache = str(tmp_path / "cache")
        cached = online.replace(
            output=str(tmp_path / f"cached-{kind}"), cache=cache, codec={"name": "dense-fp32"}
        )
        precompute(cached)
        train(online)
        train(cached.replace(teacher=None))
        assert comparable_rows(tmp_path / f"online-{kind}") == comparable_rows(
            tmp_path / f"cached-{kind}"
        )
        assert weights_equal(tmp_path / f"online-{kind}", tmp_path / f"cached-{kind}")


@pytest.mark.parametrize(
    ("codec", "bound"),
    # Full top-k keeps every class: fp16 log-probabilities bound the loss; k=4 adds the bucket.
    [
        ({"name": "dense-fp16"}, 1e-3),
        ({"name": "dense-bf16"}, 1e-2),
        ({"name": "topk", "k": 10}, 2e-3),
        ({"name": "dense-int8"}, 2e-2),
        ({"name": "dense-fp8"}, 5e-2),
    ],
)
def test_other_codecs_stay_within_their_bound(world, tmp_path, codec, bound):
    online = run_config(world, tmp_path / "online", loss={"kind": "soft"}, max_steps=1)
    cached = online.replace(
        output=str(tmp_path / "cached"), cache=str(tmp_path / "cache"), codec=codec
    )
    precompute(cached)
    train(online)
    train(cached)
    first, second = (comparable_rows(tmp_path / name)[0] for name in ("online", "cached"))
    assert first["base_loss"] == second["base_loss"]
    assert second["distill_loss"] == pytest.approx(first["distill_loss"], rel=bound)
    assert second["grad_norm"] == pytest.approx(first["grad_norm"], rel=bound)


@pytest.mark.parametrize("k", [0, 2])
def test_a_sampled_cache_serves_hard_and_soft_runs(world, tmp_path, k):
    """Hard: the teacher's own classes, also where they were not drawn. Soft: whatever the tail."""
    online = run_config(world, tmp_path / "online", loss={"kind": "hard"}, max_steps=2)
    codec = {"name": "sampled", "k": k, "draws": 3}
    cached = online.replace(
        output=str(tmp_path / "cached"), cache=str(tmp_path / "cache"), codec=codec
    )
    assert precompute_estimate(cached)["images"] > 0
    precompute(cached)
    train(online)
    train(cached.replace(teacher=None))
    assert weights_equal(tmp_path / "online", tmp_path / "cached")
    soft = cached.replace(teacher=None, output=str(tmp_path / "soft"), loss={"kind": "soft"})
    first = train(soft)
    again = train(soft.replace(output=str(tmp_path / "again"), loss={"tail": "renorm"}))
    assert weights_equal(tmp_path / "soft", tmp_path / "again")
    assert first["teacher"]["codec"]["draws"] == again["teacher"]["codec"]["draws"] == 3


def test_training_reads_the_cache_ahead(world, tmp_path, monkeypatch):
    """The threads read every block that the run uses, then end."""
    seen = []
    close = ReadAhead.close
    monkeypatch.setattr(ReadAhead, "close", lambda self: seen.append(self.wait()) or close(self))
    monkeypatch.setattr(CodecConfig, "block_records", 70)
    config = run_config(world, tmp_path / "run", cache=str(tmp_path / "cache"))
    precompute(config)
    train(config)
    assert len(seen) == 1 and seen[0] >= 9  # 3 views of 3 blocks; one may be asked for twice


def test_training_learns(world, tmp_path):
    """A network with one head, labels only, no mixing: far above the 10 % of chance."""
    config = run_config(
        world,
        tmp_path / "run",
        epochs=10,
        teacher=None,
        num_views=None,
        eval_every=100,
        view={"mixup_alpha": 0.0, "cutmix_alpha": 0.0, "repeats": 1, "erase_prob": 0.0},
        loss={"kind": "none"},
        model={"name": "deit_fast.models.convnet:small_convnet", "args": ()},
        optim={"lr": 48e-3, "warmup_epochs": 1.0},
    )
    result = train(config)
    assert result["top1"] > 0.7
    assert "top1_distill" not in result
    assert set(result["per_class"]) == {str(digit) for digit in range(10)}
    assert result["teacher"] is None
    assert read_json(tmp_path / "run/result.json") == result


def test_a_checkpoint_of_an_earlier_version_is_resumed(world, tmp_path):
    """One without a checksum, with settings that are retired, without those that are newer."""
    config = run_config(world, tmp_path, max_steps=1)
    train(config)
    path = list_checkpoints(tmp_path / "checkpoints")[-1]
    state = torch.load(path, weights_only=True) | {"format": 1}
    saved = json.loads(state["config"]) | {"save_minutes": 5.0, "compress_gradients": False}
    del saved["track"]
    torch.save(state | {"config": json.dumps(saved)}, path)
    assert train(config.replace(max_steps=2))["steps"] == 2
    path = list_checkpoints(tmp_path / "checkpoints")[-1]
    changed = json.dumps(saved | {"compress_gradients": True})
    torch.save(state | {"step": 2, "config": changed}, path)
    with pytest.raises(InputError, match="compress_gradients True there, False here"):
        train(config.replace(max_steps=3))


def test_checkpoint_of_another_configuration_is_refused(world, tmp_path):
    config = run_config(world, tmp_path / "run", max_steps=1)
    train(config)
    with pytest.raises(InputError, match=r"loss\.alpha 0\.5 there, 0\.3 here; optim\.lr 0\.008"):
        train(config.replace(optim={"lr": 2e-3}, loss={"alpha": 0.3}))
    with pytest.raises(InputError, match="--no-resume"):
        train(config.replace(resume=False))


def test_a_setting_missing_in_an_older_checkpoint_counts_as_its_default(world, tmp_path):
    config = run_config(world, tmp_path / "run", max_steps=1)
    train(config)
    path, state = load_newest(tmp_path / "run/checkpoints")
    saved = json.loads(state["config"])
    del saved["model"]["residual"], saved["cuda_graphs"]
    save_checkpoint(path.parent, state["step"], state | {"config": json.dumps(saved)})
    train(config)
    with pytest.raises(InputError, match=r"model\.residual 'float32' there, 'bfloat16' here"):
        train(config.replace(model={"residual": "bfloat16"}))


def test_a_broken_newest_checkpoint_falls_back_with_a_warning(tmp_path, caplog):
    for step in (1, 2, 3):
        save_checkpoint(tmp_path, step, {"step": step, "model": {"w": torch.full((3,), step)}})
    assert [path.name for path in list_checkpoints(tmp_path)] == [
        "step-000000002.pt",
        "step-000000003.pt",
    ]
    newest = tmp_path / "step-000000003.pt"
    newest.write_bytes(newest.read_bytes()[:-200])
    with caplog.at_level(logging.WARNING):
        path, state = load_newest(tmp_path)
    assert state["step"] == 2 and path.name == "step-000000002.pt"
    assert "step-000000003.pt is broken" in caplog.text
    path.write_bytes(b"")
    with pytest.raises(InputError, match="all 2 checkpoints"):
        load_newest(tmp_path)


def test_not_finite_loss_stops_and_keeps_the_checkpoints(world, tmp_path):
    config = run_config(world, tmp_path / "run", max_steps=1)
    train(config)
    kept = list_checkpoints(tmp_path / "run/checkpoints")
    saved = torch.load(kept[-1], weights_only=True)
    saved["model"]["head.weight"][0, 0] = float("nan")
    save_checkpoint(kept[-1].parent, saved["step"], saved)
    with pytest.raises(FloatingPointError, match="step 2: the loss of rank 0 is not finite"):
        train(config.replace(max_steps=5))
    assert list_checkpoints(tmp_path / "run/checkpoints") == kept


def test_unreadable_images_are_counted_in_the_result(world, tmp_path):
    import shutil

    data = tmp_path / "data"
    shutil.copytree(world / "data", data)
    victim = sorted((data / "train/3").iterdir())[0]
    victim.write_text("this is no image")
    config = run_config(world, tmp_path / "run", data={"root": str(data)})
    result = train(config)
    assert [Path(path).name for path in result["substituted"]] == [victim.name]
    with pytest.raises(InputError, match=victim.name):
        train(config.replace(output=str(tmp_path / "strict"), data={"on_error": "fail"}))


def test_wrong_teachers_and_caches_are_named(world, tmp_path):
    config = run_config(world, tmp_path / "run")
    with pytest.raises(InputError, match="needs --teacher SPEC or --cache DIR"):
        train(config.replace(teacher=None))
    from safetensors.torch import save_file

    save_file(small_convnet(7).state_dict(), tmp_path / "seven.safetensors")
    seven = f"test_train:seven_classes@{tmp_path}/seven.safetensors"
    with pytest.raises(InputError, match="has 7 classes, the data set has 10"):
        train(config.replace(teacher=seven))
    cache = str(tmp_path / "cache")
    precompute(config.replace(cache=cache), range(1))
    with pytest.raises(InputError, match=r"lacks 2 of the run's 3 views.*: precompute them$"):
        train(config.replace(cache=cache))
    with pytest.raises(CacheMismatch) as error:
        train(config.replace(cache=cache, view={"seed": 1, "erase_prob": 0.0}))
    assert "view.seed" in str(error.value) and "view.erase_prob" in str(error.value)
    assert "\n" not in str(error.value)


def seven_classes():
    return small_convnet(7)


def test_a_slow_first_step_is_said(world, tmp_path, caplog, monkeypatch):
    caplog.set_level(logging.INFO, "deit_fast")
    config = run_config(world, tmp_path / "run", loss={"kind": "none"}).replace(max_steps=2)
    train(config)
    assert "the first step took" not in caplog.text
    monkeypatch.setattr(remarks, "SLOW_STEP", 0.0)
    train(config.replace(output=str(tmp_path / "slow")))
    assert (
        len(re.findall(r"the first step took .*; a line comes every \d+ steps", caplog.text)) == 1
    )
