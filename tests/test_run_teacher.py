"""The teacher of a run: stored logits attached to batches, and the network itself."""

from __future__ import annotations

from functools import partial

import numpy as np
import pytest
import timm
import torch
from torch._dynamo.testing import CompileCounter

from deit_fast.config import LossConfig, RunConfig
from deit_fast.data.batch import ViewBatch, map_teacher, teacher_tensors
from deit_fast.data.open import DeviceLoader
from deit_fast.models import Teacher
from deit_fast.models.weights import digest_weights
from deit_fast.precomputation import precompute
from deit_fast.training.loop import train
from deit_fast.training.teacher import RunTeacher
from deit_fast.views.order import EpochOrder, TrainBatches
from helpers.caches import equal, make_manifest, reading_threads, write_cache
from helpers.runs import unruly

CPU = torch.device("cpu")
TAU = 3.0
NONE = torch.zeros(0)


def batch_of(ids) -> ViewBatch:
    samples, views = (torch.from_numpy(np.array(part)) for part in ids[:2])
    rows = torch.zeros(len(samples))
    return ViewBatch(NONE, torch.zeros(len(samples), 22), samples, views, rows, rows, rows)


@pytest.fixture(params=["topk", "sampled", "dense-int8", "hard"])
def cached(request, tmp_path):
    codec = {"temperatures": (1.0, TAU)} if request.param in ("topk", "sampled") else {}
    cache = write_cache(tmp_path, make_manifest(request.param, **codec), (0, 1))
    order = TrainBatches(EpochOrder(5, cache.manifest["num_samples"], 2, 1), 8, 2, 0, 1)
    return cache, order


def expected(cache, ids):
    return cache.gather(*map(np.asarray, ids[:2]), tau=TAU)


def teacher_of(cache) -> RunTeacher:
    return RunTeacher(RunConfig(loss=LossConfig(kind="soft", tau=TAU)), CPU, caches=[cache])


def test_batches_get_the_logits_of_their_views_from_any_step_on(cached):
    cache, order = cached
    teacher = teacher_of(cache)
    for start in (0, 4, 2):  # a run that is rolled back starts again at an earlier step
        attach = teacher.attach(order, start)
        assert reading_threads() == 0  # the loader's processes are forked between the two
        for step in range(start, start + 3):
            batch = attach(batch_of(order[step]))
            assert equal(batch.teacher, expected(cache, order[step]))
        assert start or reading_threads() > 0  # the second pass finds all blocks verified
    teacher.close()
    assert reading_threads() == 0


def test_parts_of_a_batch_get_their_rows_of_the_logits(cached):
    cache, order = cached
    teacher = teacher_of(cache)
    batch = teacher.attach(order, 1)(batch_of(order[1]))
    teacher.close()
    parts = [batch.part(start, start + 2) for start in range(0, len(batch), 2)]
    tensors = zip(*(teacher_tensors(part.teacher) for part in parts), strict=True)
    whole = teacher_tensors(expected(cache, order[1]))
    assert all(torch.equal(torch.cat(a), b) for a, b in zip(tensors, whole, strict=True))


def test_a_run_without_a_cache_attaches_nothing():
    assert RunTeacher(RunConfig(), CPU).attach([], 0) is None


@pytest.mark.gpu
def test_logits_reach_the_gpu_with_their_batch(cached):
    """Records are decoded on the stream that copies, while the consumer computes on another."""
    cache, order = cached
    device = torch.device("cuda")
    teacher = RunTeacher(RunConfig(loss=LossConfig(kind="soft", tau=TAU)), device, caches=[cache])
    batches = [batch_of(order[step]) for step in range(len(order))]
    loader = DeviceLoader(batches, device, teacher.attach(order, 0))
    for step, batch in enumerate(loader):
        torch.randn(512, 512, device=device) @ torch.randn(512, 512, device=device)
        assert all(tensor.is_cuda for tensor in teacher_tensors(batch.teacher))
        found = map_teacher(batch.teacher, torch.Tensor.cpu)
        assert equal(found, expected(cache, order[step]))
    teacher.close()


# ---------------------------------------------------------------------------------------------
# The network itself
# ---------------------------------------------------------------------------------------------


def small_teacher() -> Teacher:
    torch.manual_seed(0)
    return Teacher(timm.create_model("resnet10t", num_classes=7), "timm:resnet10t")


def test_channels_innermost_are_the_same_teacher():
    """The digest does not depend on the memory format; the logits differ by rounding alone."""
    teacher, images = small_teacher(), torch.randn(4, 3, 64, 64)
    digest, logits = digest_weights(teacher.model), teacher(images)
    teacher.memory_format = torch.channels_last  # as `to_device` does for CUDA
    teacher.to(memory_format=torch.channels_last)
    seen = []
    teacher.model.register_forward_pre_hook(lambda _, args: seen.append(args[0].stride()))
    torch.testing.assert_close(teacher(images), logits, rtol=1e-5, atol=1e-5)
    assert digest_weights(teacher.model) == digest
    assert seen == [(3 * 64 * 64, 1, 3 * 64, 3)]


def test_a_compiled_teacher_is_compiled_once_and_keeps_its_name():
    teacher, images = small_teacher(), torch.randn(4, 3, 64, 64)
    digest, logits = teacher.fingerprint(), teacher(images)
    torch._dynamo.reset()
    counter = CompileCounter()
    teacher.to_device(CPU)
    teacher(images)
    assert counter.frame_count == 0
    teacher.model.compile(backend=counter)
    for _ in range(3):
        assert torch.equal(teacher(images), logits)
    assert counter.frame_count == 1
    assert teacher.fingerprint() == digest


def test_precompute_and_training_compile_the_teacher_where_asked(world, tmp_path, monkeypatch):
    compiled = []
    monkeypatch.setattr(
        torch.nn.Module, "compile", lambda module, **options: compiled.append(type(module).__name__)
    )
    # The student's blocks are only traced: no C++ is compiled for them.
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))
    config = unruly(world, tmp_path / "run", cache=str(tmp_path / "cache"), max_steps=2)
    precompute(config.replace(compile="model"))
    train(config.replace(cache=None, compile="blocks"))
    train(config.replace(output=str(tmp_path / "plain"), cache=None))
    assert compiled == ["Unruly", "Unruly"]


@pytest.mark.gpu
def test_the_online_teacher_runs_beside_the_student_on_cuda():
    """Many batches in a row, each read right after `join`: none may see another one's memory."""
    device = torch.device("cuda")
    teacher = small_teacher().to_device(device)
    online = RunTeacher(RunConfig(), device, network=teacher)
    batches = [torch.randn(64, 3, 64, 64, device=device) for _ in range(50)]
    alone = [teacher(images) for images in batches]
    torch.cuda.synchronize()
    beside = []
    for images in batches:
        (logits,), _ = online.forward(images.clone())
        torch.randn(512, 512, device=device) @ torch.randn(512, 512, device=device)
        online.join()
        beside.append(logits.clone())
        del logits
    assert all(torch.equal(a, b) for a, b in zip(alone, beside, strict=True))
