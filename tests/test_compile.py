"""torch.compile in a run: what `auto` means, how often a model is compiled, and its results.

`CompileCounter` replaces Inductor: it counts the graphs and runs their operations unchanged.
"""

from __future__ import annotations

import copy
import json
import logging
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import timm
import torch
from torch import nn
from torch._dynamo.testing import CompileCounter

from deit_fast import cli
from deit_fast.config import RunConfig
from deit_fast.errors import InputError
from deit_fast.models import Teacher, fuse, unfuse
from deit_fast.models.convnet import small_convnet
from deit_fast.models.fuse import set_batch_part
from deit_fast.precomputation import precompute
from deit_fast.precompute_job import Job
from deit_fast.recipes import RECIPES
from deit_fast.runtime.distributed import ProcessGroup
from deit_fast.training.compiling import CompileCount, compile_blocks, log_compile, resolve_compile
from deit_fast.training.loop import train
from deit_fast.training.step import TrainStep, parallel
from deit_fast.training.teacher import open_teacher
from helpers.fused import KERNELS, assert_same, build, run
from helpers.runs import TWO_BLOCKS, comparable_rows, run_config, weights_equal

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
IMAGES = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(3))
PARTS = 12


@pytest.fixture
def counter(monkeypatch) -> Iterator[CompileCounter]:
    """Every call of torch.compile counts its graphs here."""
    torch._dynamo.reset()
    counter, compile_ = CompileCounter(), torch.compile

    def compile_with_counter(target, *, mode=None, **options):
        return compile_(target, **({"backend": counter} | options))

    monkeypatch.setattr(torch, "compile", compile_with_counter)
    yield counter
    torch._dynamo.reset()


def student(depth: int = 2, drop_path: float = 0.1, fused: bool = True) -> nn.Module:
    model = build("distilled", depth=depth, drop_path_rate=drop_path).cpu().train()
    return fuse(model, kernels=KERNELS) if fused else model


def backward(forward: Callable) -> None:
    sum(output.sum() for output in forward(IMAGES)).backward()


# ---------------------------------------------------------------------------------------------
# What `auto` means
# ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("model", ["transformer", "convnet"])
@pytest.mark.parametrize("asked", ["auto", "none", "blocks", "model"])
@pytest.mark.parametrize("device", [CPU, CUDA])
def test_the_setting_is_resolved_for_each_device_and_model(device, asked, model):
    config = RunConfig(compile=asked)
    module = student() if model == "transformer" else small_convnet(10)
    has_blocks = model == "transformer"
    auto = "blocks" if device == CUDA and has_blocks else "none"
    assert resolve_compile(config, device, module) == (auto if asked == "auto" else asked)
    assert RunConfig().compile == "auto"


def test_auto_is_none_on_gpus_without_triton(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for capability, expected in (((6, 1), "none"), ((7, 0), "blocks"), ((9, 0), "blocks")):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _, c=capability: c)
        assert resolve_compile(RunConfig(), CUDA) == expected
        assert resolve_compile(RunConfig(compile="model"), CUDA) == "model"


@pytest.mark.parametrize(
    ("asked", "device", "model", "line"),
    [
        ("auto", CUDA, student, "compile=auto means compile=blocks: the first steps are slow"),
        ("auto", CPU, student, "compile=auto means compile=none: the device is cpu"),
        ("auto", CUDA, small_convnet, "compile=none: Sequential has no .blocks; --compile model"),
        ("model", CPU, student, "compile=model: the first steps are slow"),
        ("none", CUDA, student, ""),
    ],
)
def test_the_log_names_what_is_compiled(caplog, asked, device, model, line):
    with caplog.at_level(logging.INFO, "deit_fast"):
        log_compile(RunConfig(compile=asked), device, model(10))
    assert len(caplog.records) == bool(line)
    assert line in caplog.text


def test_auto_stays_auto_in_the_saved_configuration(capsys):
    """So a config file from one machine is also right on another."""
    assert cli.main(["train", "--recipe", "deit_small", "--print-config"]) == 0
    assert json.loads(capsys.readouterr().out)["compile"] == "auto"
    assert {name for name, recipe in RECIPES.items() if recipe().compile != "auto"} == {
        "digits_teacher", "digits_student",
    }  # fmt: skip


def test_cuda_graphs_need_one_part():
    with pytest.raises(InputError, match="cuda_graphs with accumulate=2: each part needs"):
        RunConfig(cuda_graphs=True, accumulate=2)
    for asked in ("auto", "none", "blocks", "model"):
        assert RunConfig(cuda_graphs=True, compile=asked).cuda_graphs


# ---------------------------------------------------------------------------------------------
# How often a model is compiled
# ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("mode", "expected"), [("model", 1), ("blocks", 3)])
def test_parts_of_a_batch_and_ranks_share_a_compilation(counter, mode, expected):
    """The offset of a part is an input of the compiled code: 12 parts stand for ranks as well."""
    model = student()
    forward = parallel(RunConfig(compile=mode), model, CPU, ProcessGroup())
    made = []
    for part in range(PARTS):
        assert set_batch_part(model, part * len(IMAGES), PARTS * len(IMAGES))
        backward(forward)
        made.append(counter.frame_count)
    assert made == [expected] * PARTS


@pytest.mark.parametrize(("drop_path", "blocks"), [(0.0, 3), (0.1, 4)])
def test_blocks_of_a_deep_model_share_compilations(counter, drop_path, blocks):
    """Graphs with drop rates: embedding, first, second, middle and last block.

    Neither parts of a batch nor ranks add one.
    """
    model = student(depth=12, drop_path=drop_path)
    compile_blocks(model)
    for offset in (0, 2, 6):
        assert set_batch_part(model, offset, 8)
        backward(model)
        assert counter.frame_count == blocks + 1


def test_a_block_called_alone_draws_before_it_runs(counter):
    """In a model whose own forward calls its fused blocks."""
    model = student(depth=6, drop_path=0.4)
    compile_blocks(model)
    tokens = torch.randn(2, 5, 48)
    for block in model.blocks:
        tokens = block(tokens)
    assert counter.frame_count == 2  # without and with drops


def test_timms_own_blocks_are_all_compiled(counter, caplog):
    """Each has a different drop rate, and torch's default limit is 8 compilations of a function."""
    model = student(depth=12, fused=False)
    with torch._dynamo.config.patch(recompile_limit=8), caplog.at_level(logging.WARNING):
        compile_blocks(model)
        for _ in range(2):
            backward(model)
    assert counter.frame_count == 12
    assert "recompile_limit" not in caplog.text


def test_a_second_batch_size_does_not_recompile_the_first(counter):
    """Shapes stay constants of the code, and a size that comes back is not compiled again.

    A teacher's logits of a batch then depend on no earlier batch, as the bytes of a cache must not.
    """
    model = student(drop_path=0.0)
    compile_blocks(model)
    network = timm.create_model("resnet10t", num_classes=10)
    teacher = Teacher(network, "timm:resnet10t").to_device(CPU, compiled=True)
    for forward, graphs in ((model, 3), (teacher, 1)):
        counter.clear()
        made = []
        for size in (2, 3, 4, 2, 3, 4):
            forward(torch.rand(size, 3, 32, 32))
            made.append(counter.frame_count)
        assert made == [graphs, 2 * graphs] + [3 * graphs] * 4


def compiled_run(
    world: Path, output: Path, counter: CompileCounter, monkeypatch, **changes
) -> tuple[RunConfig, list[int]]:  # fmt: skip
    """Train two epochs; returns the number of graphs after each step and at the end."""
    made: list[int] = []
    call = TrainStep.__call__

    def counting(self, *arguments):
        result = call(self, *arguments)
        made.append(counter.frame_count)
        return result

    monkeypatch.setattr(TrainStep, "__call__", counting)
    config = run_config(world, output, **changes)
    train(config)
    return config, [*made, counter.frame_count]


@pytest.mark.parametrize(("mode", "expected", "more"), [("blocks", 4, 4), ("model", 1, 1)])
def test_a_run_compiles_only_in_its_first_step_and_evaluation(
    world, tmp_path, counter, monkeypatch, caplog, mode, expected, more
):  # fmt: skip
    """Parts, evaluations of model and average with a smaller last batch, and training after that.

    The weights are those of the run that compiled nothing, to the last bit.
    """
    changes = {
        "accumulate": 2,
        "teacher": None,
        "loss": {"kind": "none"},
        "model": {"drop_path": 0.4, "args": (*TWO_BLOCKS, "depth=3")},
    }
    with caplog.at_level(logging.INFO, "deit_fast"):
        _, made = compiled_run(
            world, tmp_path / mode, counter, monkeypatch, compile=mode, **changes
        )
    assert made == [expected] * 6 + [expected + more] * 7
    assert f"compile={mode}: the first steps are slow" in caplog.text
    assert f"torch.compile made {expected} graphs in the first steps" in caplog.text
    assert f"torch.compile made {more} graphs in the first evaluation" in caplog.text
    assert "more graphs" not in caplog.text
    train(run_config(world, tmp_path / "plain", **changes))
    assert weights_equal(tmp_path / mode, tmp_path / "plain")
    assert comparable_rows(tmp_path / mode) == comparable_rows(tmp_path / "plain")


def test_late_compilations_are_a_warning(counter, caplog):
    model = student()
    compile_blocks(model)
    count = CompileCount()
    with caplog.at_level(logging.INFO, "deit_fast"):
        for step, size in ((1, 2), (2, 2), (3, 1)):
            with count.counting():
                model(IMAGES[:size])
            count.report(step)
    messages = [
        (record.levelname, record.getMessage().partition(",")[0]) for record in caplog.records
    ]
    assert messages == [
        ("INFO", "torch.compile made 3 graphs in the first steps"),
        ("WARNING", "torch.compile made 3 more graphs before step 3"),
    ]


# ---------------------------------------------------------------------------------------------
# Results
# ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["none", "blocks", "model"])
def test_parts_draw_as_the_whole_batch(counter, mode):
    """Also with timm's model, which draws inside its blocks."""
    model = student(depth=3, drop_path=0.6)
    images = torch.rand(6, 3, 32, 32)
    plain = unfuse(copy.deepcopy(model))
    torch.manual_seed(5)
    whole = plain(images)
    torch.manual_seed(6)
    assert not torch.allclose(plain(images)[0], whole[0], rtol=1e-2)
    forward = parallel(RunConfig(compile=mode), model, CPU, ProcessGroup())
    for first in (0, 2, 4):
        set_batch_part(model, first, 6)
        torch.manual_seed(5)
        part = forward(images[first : first + 2])
        for got, expected in zip(part, whole, strict=True):
            torch.testing.assert_close(got, expected[first : first + 2], rtol=1e-5, atol=1e-5)


def test_a_copy_of_a_compiled_model_uses_its_own_weights(counter):
    model = student(drop_path=0.0)
    compile_blocks(model)
    twin = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in twin.blocks.parameters():
            parameter.mul_(1.5)
    assert not torch.equal(twin(IMAGES)[0], model(IMAGES)[0])
    assert_same(run(twin, IMAGES), run(copy.deepcopy(twin), IMAGES), rtol=0)
    plain = unfuse(twin)
    assert not any({"run", "run_last"} & set(vars(block)) for block in plain.blocks)
    assert all(not vars(block).keys() & {"run", "run_last"} for block in unfuse(model).blocks)


# ---------------------------------------------------------------------------------------------
# Teachers, caches and resumed runs
# ---------------------------------------------------------------------------------------------


@pytest.fixture
def on_cuda(monkeypatch):
    """`auto` decides as with a GPU while everything runs on the CPU."""
    for module in ("run", "step", "teacher"):
        name = f"deit_fast.training.{module}.resolve_compile"
        monkeypatch.setattr(
            name, lambda config, _, student=None: resolve_compile(config, CUDA, student)
        )


def is_compiled(module: nn.Module) -> bool:
    return module._compiled_call_impl is not None


def test_which_teachers_are_compiled(world, tmp_path, on_cuda):
    """With `auto` only the online one, whose logits are not stored."""
    from deit_fast.data.open import open_source

    config = run_config(world, tmp_path / "run", compile="auto", max_steps=2)
    cached = config.replace(cache=str(tmp_path / "cache"), check_teacher_every=2)
    precompute(cached.replace(check_teacher_every=None))
    source = open_source(config.data, "train", config.view.image_size)
    for asked, online, other in (
        ("auto", True, False), ("none", False, False), ("blocks", True, True),
        ("model", True, True),
    ):  # fmt: skip
        teacher = open_teacher(config.replace(compile=asked), source, CPU)
        assert teacher.is_online
        assert is_compiled(teacher.network.model) is online, asked
        checked = open_teacher(cached.replace(compile=asked), source, CPU)
        assert not checked.is_online
        assert is_compiled(checked.network.model) is other, asked
        job = Job(cached.replace(compile=asked))
        assert is_compiled(job.teacher.model) is other, asked
        assert ("teacher.compiled" in job.fingerprint) is other, asked


@pytest.mark.parametrize(("before", "after"), [("none", "auto"), ("auto", "none")])
def test_auto_resumes_a_cache_begun_without_compilation(world, tmp_path, before, after):
    """As all caches written before `auto` became the default."""
    config = run_config(world, tmp_path / "run", cache=str(tmp_path / "cache"), compile=before)
    assert precompute(config, range(1))["views"] == 1
    again = precompute(config.replace(compile=after))
    assert again["kept"] > 0 and again["blocks"] > 0


@pytest.mark.parametrize("asked", ["auto", "none", "blocks", "model"])
def test_a_compiled_teachers_cache_trains_any_run(world, tmp_path, counter, asked):
    config = run_config(
        world, tmp_path / "run", cache=str(tmp_path / "cache"), compile="model", max_steps=1
    )
    precompute(config)
    result = train(config.replace(compile=asked))
    assert result["teacher"]["teacher.compiled"] is True


@pytest.mark.parametrize(("before", "after"), [("none", "blocks"), ("blocks", "auto")])
def test_a_run_resumes_with_another_setting(world, tmp_path, counter, before, after):
    """Numbers may differ by rounding; here they do not."""
    config = run_config(world, tmp_path / "parts", teacher=None, loss={"kind": "none"})
    train(config.replace(compile=before, max_steps=4))
    assert train(config.replace(compile=after))["steps"] == 12
    assert counter.frame_count > 0
    train(config.replace(output=str(tmp_path / "whole")))
    assert weights_equal(tmp_path / "parts", tmp_path / "whole")
