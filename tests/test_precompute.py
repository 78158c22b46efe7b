"""The cache's bytes depend on teacher, recipe and data alone, not on who wrote them."""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from multiprocessing.process import BaseProcess
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from deit_fast.cache import CacheMismatch, LogitCache, LogitCacheWriter
from deit_fast.cache.record_order import RecordOrder
from deit_fast.config import CodecConfig, RunConfig
from deit_fast.data.ingest import ingest_batch
from deit_fast.data.open import open_loader
from deit_fast.errors import InputError
from deit_fast.models import load_teacher
from deit_fast.models.convnet import small_convnet
from deit_fast.precomputation import estimate, precompute
from deit_fast.precompute_job import Job, TeacherCalls
from deit_fast.recipes import digits_student
from deit_fast.runtime.progress import Progress, duration
from helpers import small_blocks
from helpers.digits import write_few_digits
from helpers.processes import start_forked
from helpers.small_blocks import BLOCK

SPEC = "deit_fast.models.convnet:small_convnet"


@pytest.fixture(autouse=True, scope="module")
def blocks_are_small():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(CodecConfig, "block_records", BLOCK)
        yield


@pytest.fixture(scope="module")
def config(tmp_path_factory) -> RunConfig:
    root = tmp_path_factory.mktemp("precompute")
    write_few_digits(root / "data")
    torch.manual_seed(3)
    save_file(small_convnet(10).state_dict(), root / "teacher.safetensors")
    return digits_student().replace(
        epochs=6,
        num_views=6,
        teacher=f"{SPEC}@{root}/teacher.safetensors",
        teacher_batch=32,
        cache=str(root / "cache"),
        data={"root": str(root / "data"), "workers": 0},
    )


@pytest.fixture(scope="module")
def reference(config) -> dict[str, bytes]:
    result = precompute(config)
    assert (result["views"], result["blocks"], result["kept"]) == (6, 36, 0)  # 210 samples
    return contents(config.cache)


def contents(folder: str | Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(Path(folder).iterdir())}


def command(config: RunConfig, cache: Path) -> list[str]:
    """The same job as a person would type it."""
    return [
        "precompute", "--recipe", "digits_student", "--epochs", "6", "--num-views", "6",
        "--teacher", str(config.teacher), "--teacher-batch", "32", "--cache", str(cache),
        "--data.root", str(config.data.root), "--data.workers", "0",
    ]  # fmt: skip


def start(config: RunConfig, cache: Path, **variables: str) -> BaseProcess:
    return start_forked(small_blocks.run, command(config, cache), **variables)


def status(process: BaseProcess) -> int | None:
    process.join(120)
    return process.exitcode


def check_logits(config: RunConfig, device: str) -> None:
    """Each batch gets the logits of its own images, and the teacher has the next batch by then."""
    job = Job(config.replace(device=device))
    calls = TeacherCalls([(0, 0), (1, 2), (1, 0)], 36, RecordOrder(job.source.num_samples), 20)
    given: list[int] = []
    job.teacher.model.register_forward_pre_hook(lambda _, args: given.append(len(args[0])))
    loader = open_loader(config.data, job.source, job.plan, calls, device=job.device)
    for index, (batch, outputs) in enumerate(job.run(loader)):
        assert len(given) == min(index + 2, len(calls))
        kept = outputs.logits.cpu()  # as the writer does, which waits
        samples, views = calls[index]
        assert batch.sample_ids.tolist() == samples.tolist()
        assert batch.view_ids.tolist() == views.tolist()
        again = job.teacher(ingest_batch(batch, config.view, torch.float32)).cpu()
        given.pop()
        assert torch.equal(kept, again)
    assert index + 1 == len(calls) == len(given) == 6


@pytest.mark.parametrize("first", ["none", "model"])
def test_a_compiled_teacher_does_not_resume_the_cache_of_a_plain_one(config, tmp_path, first):
    plans = [config.replace(cache=str(tmp_path), num_views=3, compile=kind)
             for kind in (first, "blocks" if first == "none" else "none")]  # fmt: skip
    with LogitCacheWriter(tmp_path, Job(plans[0]).open_caches()[0].manifest):
        pass
    with pytest.raises(CacheMismatch, match=r"teacher\.compiled"):
        precompute(plans[1])


def test_the_teacher_works_on_the_next_batch_while_one_is_written(config):
    check_logits(config, "cpu")


@pytest.mark.gpu
def test_logits_on_a_gpu_belong_to_their_batches(config):
    check_logits(config, "cuda")


def test_calls_cover_each_view_once_and_never_cross_blocks():
    calls = TeacherCalls([(2, 0), (2, 2)], 100, RecordOrder(230), 32)
    ids = [call[0] for call in (calls[i] for i in range(len(calls)))]
    assert np.concatenate(ids).tolist() == [*range(100), *range(200, 230)]
    assert [len(x) for x in ids] == [32, 32, 32, 4, 30]
    assert all((calls[i][1] == 2).all() for i in range(len(calls)))


def test_second_call_keeps_every_block(config, reference):
    again = precompute(config)
    assert (again["blocks"], again["kept"], again["images"]) == (0, 36, 0)
    assert contents(config.cache) == reference


def test_stored_logits_are_the_teachers(config, reference):
    """Against the teacher run by hand on views made one by one."""
    from deit_fast.data.ingest import ingest_batch
    from deit_fast.data.loader import make_batch
    from deit_fast.data.open import open_source
    from deit_fast.views.plan import ViewPlan

    source = open_source(config.data, "train", 16)
    plan = ViewPlan(config.view, source.num_samples)
    teacher = load_teacher(
        config.teacher, num_classes=10, input_mean=config.view.mean, input_std=config.view.std
    )
    cache = LogitCache.open(config.cache)
    for sample, view in [(0, 0), (17, 5), (209, 3), (100, 1)]:
        batch = make_batch(source, plan, np.array([sample]), np.array([view]), on_error="fail")
        logits = teacher(ingest_batch(batch, config.view, torch.float32))
        stored = cache.gather(torch.tensor([sample]), torch.tensor([view]), tau=1.0)
        dense = torch.full((1, 10), float("nan")).scatter(
            1, stored.ids.long(), stored.log_probs.float()
        )
        torch.testing.assert_close(dense, logits.log_softmax(1), rtol=1e-3, atol=1e-3)


@pytest.mark.dist
@pytest.mark.parametrize("world", [2, 3])
def test_bytes_do_not_depend_on_process_count(config, reference, tmp_path, world):
    cache = tmp_path / "cache"
    processes = start_ranks(config, cache, world)
    assert [status(process) for process in processes] == [0] * world
    assert contents(cache) == reference


@pytest.mark.dist
def test_killed_at_any_moment_then_finished_gives_the_same_bytes(config, reference, tmp_path):
    """SIGKILL as soon as the first, the tenth, ... block is there; then the same command again."""
    cache = tmp_path / "cache"
    kills = 0
    for blocks_before_kill in (0, 5, 20):
        process = start(config, cache)
        while process.is_alive() and blocks_done(cache) < blocks_before_kill:
            time.sleep(0.002)
        if process.is_alive():
            process.kill()
            kills += 1
        process.join()
    assert kills >= 2
    assert status(start(config, cache)) == 0
    assert contents(cache) == reference


def blocks_done(cache: Path) -> int:
    """Blocks marked complete in the tables, read as docs/cache-format.md says."""
    done = 0
    for path in cache.glob("view-*.dlc"):
        table = np.frombuffer(path.read_bytes()[4096 : 4096 + 8 * 6], dtype="<u4").reshape(-1, 2)
        done += int((table[:, 1] != 0).sum())
    return done


def test_a_flipped_bit_is_found_and_redone(config, reference, tmp_path):
    import shutil

    cache = tmp_path / "cache"
    shutil.copytree(config.cache, cache)
    victim = cache / "view-00002.dlc"
    damaged = bytearray(victim.read_bytes())
    damaged[-5] ^= 0x10
    victim.write_bytes(damaged)
    with pytest.raises(InputError, match=r"view-00002\.dlc.*block 5"):
        LogitCache.open(cache).gather(torch.tensor([209]), torch.tensor([2]))
    again = precompute(config.replace(cache=str(cache)))
    assert again["blocks"] == 1
    assert contents(cache) == reference


def test_another_teacher_view_or_data_set_is_refused(config, reference):
    other = config.replace(teacher_batch=16, view={"seed": 9, "crop_scale": (0.3, 1.0)})
    with pytest.raises(CacheMismatch) as error:
        precompute(other)
    message = str(error.value)
    for name in ("view.seed", "teacher.batch", "view.crop_scale"):
        assert name in message
    assert "teacher.weights_sha256" not in message
    assert contents(config.cache) == reference


def test_views_are_added_later(config, reference, tmp_path):
    later = config.replace(cache=str(tmp_path / "cache"))
    assert precompute(later, range(2))["blocks"] == 12
    assert set(LogitCache.open(later.cache).views) == {0, 1}
    added = precompute(later, range(1, 6))
    assert (added["blocks"], added["kept"]) == (24, 6)
    assert contents(later.cache) == reference


def test_a_killed_loader_process_is_one_line_and_the_job_resumes(config, reference, tmp_path):
    config = config.replace(cache=str(tmp_path / "cache"), data={"workers": 1})

    def kill_one() -> None:
        while not (children := multiprocessing.active_children()):
            time.sleep(0.001)
        os.kill(children[0].pid, signal.SIGKILL)

    killer = threading.Thread(target=kill_one)
    killer.start()
    with pytest.raises(ChildProcessError, match="a process that loads images died") as caught:
        precompute(config)
    killer.join()
    assert "\n" not in str(caught.value)
    precompute(config)
    assert contents(config.cache) == reference


@pytest.mark.dist
def test_three_processes_killed_then_two_finish(config, reference, tmp_path):
    cache = tmp_path / "cache"
    first = start_ranks(config, cache, 3)
    while blocks_done(cache) < 7:
        time.sleep(0.002)
    for process in first:
        process.kill()
        process.join()
    assert blocks_done(cache) < 36
    assert [status(process) for process in start_ranks(config, cache, 2)] == [0, 0]
    assert contents(cache) == reference


@pytest.mark.dist
def test_a_second_command_is_refused_and_the_first_continues(config, reference, tmp_path):
    cache = tmp_path / "cache"
    first = start(config, cache)
    # The lock has its owner's name a moment after it was made.
    while first.is_alive() and not any(p.read_bytes() for p in cache.glob(".lock-*")):
        time.sleep(0.001)
    os.kill(first.pid, signal.SIGSTOP)  # busy for as long as this test needs
    try:
        second = subprocess.run(
            [sys.executable, "-m", "helpers.small_blocks", *command(config, cache)],
            env=os.environ | {"PYTHONPATH": str(Path(__file__).parent)},
            capture_output=True,
            text=True,
            timeout=500,
        )
    finally:
        os.kill(first.pid, signal.SIGCONT)
    assert second.returncode == 2
    line = second.stderr.splitlines()[-1]
    assert f"is being written by pid {first.pid} on host" in line and ".lock-view-0000" in line
    assert status(first) == 0
    assert contents(cache) == reference


def start_ranks(config: RunConfig, cache: Path, world: int) -> list[BaseProcess]:
    return [
        start(config, cache, RANK=str(rank), WORLD_SIZE=str(world), LOCAL_RANK=str(rank))
        for rank in range(world)
    ]


def test_dry_run_estimates_and_writes_nothing(config, reference, tmp_path):
    planned = config.replace(cache=str(tmp_path / "a" / "cache"))
    found = estimate(planned)
    views = {name: data for name, data in reference.items() if name.endswith(".dlc")}
    assert found["bytes"] == sum(map(len, views.values()))
    assert (found["views"], found["blocks"], found["kept"], found["images"]) == (6, 36, 0, 1260)
    assert found["seconds"] > 0 and found["images_per_s"] > 0 and found["batch"] == 32
    assert list(tmp_path.iterdir()) == []
    precompute(planned, range(1, 3))
    before = contents(planned.cache)
    found = estimate(planned, range(4))
    assert (found["blocks"], found["kept"], found["images"]) == (12, 12, 420)
    assert found["bytes"] == 2 * len(views["view-00000.dlc"])
    assert contents(planned.cache) == before
    with pytest.raises(CacheMismatch, match=r"view\.seed"):
        estimate(planned.replace(view={"seed": 5}))


def test_progress_logs_its_pace_now_and_then(monkeypatch, caplog):
    now = [0.0]
    monkeypatch.setattr("deit_fast.runtime.progress.time.perf_counter", lambda: now[0])
    progress, before = Progress("precompute", 1000, unit="image"), 0
    with caplog.at_level("INFO", "deit_fast"):
        for now[0], done in [(0.5, 100), (2, 120), (3, 130), (40, 140), (41, 180), (42, 200)]:
            progress.advance(done - before)
            before = done
    assert [record.getMessage() for record in caplog.records] == [
        "precompute: 120 of 1000 images (12 %), 60 images/s, 15 s left",
        "precompute: 140 of 1000 images (14 %), 3.5 images/s, 4 min 6 s left",
        "precompute: 200 of 1000 images (20 %), 4.8 images/s, 2 min 48 s left",
    ]
    caplog.clear()
    now[0] = 0.0
    progress, now[0] = Progress("precompute", 1000, done=800, unit="image"), 10.0
    with caplog.at_level("INFO", "deit_fast"):
        progress.advance(100)
    assert caplog.messages == [  # the rate is this process's
        "precompute: 900 of 1000 images (90 %), 10 images/s, 10 s left"
    ]
    assert duration(3 * 3600 + 12 * 60 + 5) == "3 h 12 min"


# ------------------------------------------------------------------------------------------ pixels


def teach(config: RunConfig):
    """What `train` does before its first step."""
    from deit_fast.data.open import open_source
    from deit_fast.training.teacher import open_teacher

    return open_teacher(config, open_source(config.data, "train", 16), torch.device("cpu"))


def test_train_refuses_an_image_of_other_pixels_and_the_same_size(config, reference, tmp_path):
    import shutil

    from PIL import Image

    from deit_fast.cache.verify import pick_pixels
    from deit_fast.data.open import open_source

    shutil.copytree(config.data.root, tmp_path / "data")
    copied = config.replace(data={"root": str(tmp_path / "data")})
    teach(copied)
    cache = LogitCache.open(config.cache)
    checked = pick_pixels(cache.path, cache.manifest, range(6), 32)
    assert len(checked) >= 32 and {view for view, _, _ in checked} == set(range(6))
    _, sample, _ = checked[7]
    path = Path(open_source(copied.data, "train", 16).paths[sample])
    size = path.stat().st_size
    Image.new("L", (8, 8), 77).save(path)
    path.write_bytes(path.read_bytes().ljust(size, b"\0"))  # bytes after the end do not count
    assert path.stat().st_size == size
    with pytest.raises(InputError, match="saw other pixels of sample") as error:
        teach(copied)
    assert path.name in str(error.value)


@pytest.mark.parametrize("damage", ["gone", "edited", "other view", "other manifest", "not JSON"])
def test_digests_that_cannot_be_trusted_are_refused(config, reference, tmp_path, damage):
    import json
    import shutil

    shutil.copytree(config.cache, tmp_path / "cache")
    copied = config.replace(cache=str(tmp_path / "cache"))
    path = tmp_path / "cache/view-00002.pixels.json"
    content = json.loads(path.read_text())
    del content["crc32c"]  # as somebody who knows the format
    if damage == "gone":
        path.unlink()
    elif damage == "edited":
        content["digests"] = ["0" * 32] * len(content["digests"])
        path.write_text(json.dumps(content))
    elif damage == "other view":
        shutil.copy(tmp_path / "cache/view-00003.pixels.json", path)
    elif damage == "other manifest":
        path.write_text(json.dumps(content | {"manifest_sha256": "0" * 64}))
    else:
        path.write_text("[" * 100_000)
    message = "saw other pixels of sample" if damage == "edited" else r"view-00002\.pixels\.json"
    with pytest.raises(InputError, match=message):
        teach(copied)


def test_missing_arguments_are_named(config):
    with pytest.raises(InputError, match="needs --teacher"):
        precompute(config.replace(teacher=None))
    with pytest.raises(InputError, match="needs --cache"):
        precompute(config.replace(cache=None))
