"""Where a step gets its teacher's answer: streamed, resident, looked up, or from the network."""

from __future__ import annotations

import numpy as np
import pytest
import timm
import torch
from torch._dynamo.testing import CompileCounter

from deit_fast.data.loader import ViewBatch
from deit_fast.kernels import TopK
from deit_fast.models import Teacher
from deit_fast.models.weights import digest_weights
from deit_fast.precompute import precompute
from deit_fast.train.loop import train
from deit_fast.train.teacher import CachedTeacher, OnlineTeacher
from deit_fast.views.order import EpochOrder, TrainBatches
from helpers.caches import equal, make_manifest, reading_threads, write_cache
from helpers.runs import unruly, weights_equal

CPU = torch.device("cpu")
TAU = 3.0
NONE = torch.zeros(0)


def batch_of(ids) -> ViewBatch:
    samples, views = (torch.from_numpy(np.array(part)) for part in ids[:2])
    return ViewBatch(NONE, torch.zeros(len(samples), 22), samples, views, NONE, NONE, NONE)


@pytest.fixture(params=["topk", "dense-int8", "hard"])
def cached(request, tmp_path):
    codec = {"temperatures": (1.0, TAU)} if request.param == "topk" else {}
    cache = write_cache(tmp_path, make_manifest(request.param, **codec), (0, 1))
    order = TrainBatches(EpochOrder(5, cache.manifest["num_samples"], 2, 1), 8, 2, 0, 1)
    return cache, order


def expected(cache, ids):
    return cache.gather(*map(np.asarray, ids[:2]), tau=TAU, tail="drop")


def test_streamed_answers_are_those_of_the_batch_and_its_parts(cached):
    cache, order = cached
    teaching = CachedTeacher(cache, CPU, tau=TAU, tail="drop")
    teaching.follow(order)
    assert reading_threads() == 0  # the loader's processes are forked after this
    for step in (1, 2, 5):  # what a rollback leaves out is passed over
        teaching.at(step)
        batch, answer = batch_of(order[step]), expected(cache, order[step])
        if step == 2:
            parts = [teaching(batch.part(a, a + 2), NONE) for a in range(0, len(batch), 2)]
            if isinstance(answer, TopK):
                whole = TopK(*map(torch.cat, zip(*(p[:3] for p in parts), strict=True)), "drop")
                assert {part.tail for part in parts} == {"drop"}
            else:
                whole = torch.cat(parts)
        else:
            whole = teaching(batch, NONE)
        assert equal(whole, answer)
    assert reading_threads() > 0
    teaching.close()
    assert reading_threads() == 0


def test_it_goes_back_where_a_run_goes_back(cached):
    cache, order = cached
    teaching = CachedTeacher(cache, CPU, tau=TAU, tail="drop")
    for start in (0, 4, 2):
        teaching.follow(order)
        for step in (start + (start == 4), start + 2):  # at 4 its first step is left out
            teaching.at(step)
            assert equal(teaching(batch_of(order[step]), NONE), expected(cache, order[step]))
    teaching.close()


@pytest.mark.parametrize("which", ["samples", "views"])
def test_a_batch_out_of_order_never_gets_another_ones_answer(cached, which):
    cache, order = cached
    teaching = CachedTeacher(cache, CPU, tau=TAU, tail="drop")
    teaching.follow(order)
    teaching.at(0)
    ids = [np.array(part) for part in order[0][:2]]
    place = ("samples", "views").index(which)
    ids[place][-1] = 1 - ids[place][-1] if which == "views" else (ids[place][-1] + 1) % 8
    with pytest.raises(RuntimeError, match=f"does not hold the {which} of its place in the order"):
        teaching(batch_of(ids), NONE)
    teaching.close()


def test_without_an_order_answers_are_looked_up(cached):
    cache, order = cached
    teaching = CachedTeacher(cache, CPU, tau=TAU, tail="drop")
    for step in (3, 0):
        assert equal(teaching(batch_of(order[step]), NONE), expected(cache, order[step]))
    assert reading_threads() == 0


def test_resident_answers_are_those_of_the_cache(cached):
    cache, order = cached
    resident = cache.to_device([0, 1], CPU)
    teaching = CachedTeacher(cache, CPU, tau=TAU, tail="drop", resident=resident)
    teaching.follow(order)
    for step in (0, 3):
        teaching.at(step)
        assert equal(teaching(batch_of(order[step]), NONE), expected(cache, order[step]))
    assert reading_threads() == 0


def test_a_resident_cache_trains_the_same_student(world, tmp_path):
    config = unruly(
        world, tmp_path / "streamed", cache=str(tmp_path / "cache"),
        codec={"name": "topk", "k": 3}, accumulate=2,
    )  # fmt: skip
    precompute(config)
    train(config)
    train(config.replace(output=str(tmp_path / "resident"), cache_on_device=True))
    assert weights_equal(tmp_path / "streamed", tmp_path / "resident")


# ---------------------------------------------------------------------------------------------
# The network itself
# ---------------------------------------------------------------------------------------------


def small_teacher() -> Teacher:
    torch.manual_seed(0)
    return Teacher(timm.create_model("resnet10t", num_classes=7), "timm:resnet10t")


def test_channels_innermost_are_the_same_teacher():
    """Its digest names the weights, in whatever order they lie; its answers move by rounding."""
    teacher, images = small_teacher(), torch.randn(4, 3, 64, 64)
    digest, answer = digest_weights(teacher.model), teacher(images)
    teacher.memory_format = torch.channels_last  # as `place` does for CUDA
    teacher.to(memory_format=torch.channels_last)
    seen = []
    teacher.model.register_forward_pre_hook(lambda _, args: seen.append(args[0].stride()))
    torch.testing.assert_close(teacher(images), answer, rtol=1e-5, atol=1e-5)
    assert digest_weights(teacher.model) == digest
    assert seen == [(3 * 64 * 64, 1, 3 * 64, 3)]


def test_a_compiled_teacher_is_compiled_once_and_keeps_its_name():
    teacher, images = small_teacher(), torch.randn(4, 3, 64, 64)
    digest, answer = teacher.fingerprint(), teacher(images)
    torch._dynamo.reset()
    counter = CompileCounter()
    teacher.place(CPU)
    teacher(images)
    assert counter.frame_count == 0
    teacher.model.compile(backend=counter)
    for _ in range(3):
        assert torch.equal(teacher(images), answer)
    assert counter.frame_count == 1
    assert teacher.fingerprint() == digest


def test_precompute_and_training_compile_the_teacher_where_asked(world, tmp_path, monkeypatch):
    compiled = []
    monkeypatch.setattr(
        torch.nn.Module, "compile", lambda module, **options: compiled.append(type(module).__name__)
    )
    config = unruly(world, tmp_path / "run", cache=str(tmp_path / "cache"), max_steps=2)
    precompute(config.replace(compile="model"))
    train(config.replace(cache=None, compile="blocks"))
    train(config.replace(output=str(tmp_path / "plain"), cache=None))
    assert compiled == ["Unruly", "Unruly"]


@pytest.mark.gpu
def test_the_online_teacher_answers_beside_the_student_on_cuda():
    """Many batches in a row, each read right after `join`: none may see another one's memory."""
    device = torch.device("cuda")
    teacher = small_teacher().place(device)
    teaching = OnlineTeacher(teacher, device)
    batches = [torch.randn(64, 3, 64, 64, device=device) for _ in range(50)]
    alone = [teacher(images) for images in batches]
    torch.cuda.synchronize()
    beside = []
    for images in batches:
        answer = teaching(None, images.clone())
        torch.randn(512, 512, device=device) @ torch.randn(512, 512, device=device)
        teaching.join()
        beside.append(answer.clone())
        del answer
    assert all(torch.equal(a, b) for a, b in zip(alone, beside, strict=True))
