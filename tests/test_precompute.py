"""The cache's bytes depend on teacher, recipe and data alone, not on who wrote them."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from deit_fast.cache import CacheMismatch, LogitCache
from deit_fast.config import InputError, RunConfig
from deit_fast.models import load_teacher
from deit_fast.models.convnet import small_convnet
from deit_fast.precompute import TeacherCalls, precompute
from deit_fast.recipes import digits_student
from digits import write_few_digits

SPEC = "deit_fast.models.convnet:small_convnet"


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
        codec={"block_records": 36},
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
        sys.executable, "-m", "deit_fast", "precompute", "--recipe", "digits_student",
        "--epochs", "6", "--num-views", "6", "--teacher", str(config.teacher),
        "--teacher-batch", "32", "--cache", str(cache), "--data.root", str(config.data.root),
        "--data.workers", "0", "--codec.block-records", "36",
    ]  # fmt: skip


def test_calls_cover_each_view_once_and_never_cross_blocks():
    calls = TeacherCalls([(2, 0), (2, 2)], block_records=100, num_samples=230, batch=32)
    ids = [call[0] for call in (calls[i] for i in range(len(calls)))]
    assert np.concatenate(ids).tolist() == [*range(100), *range(200, 230)]
    assert [len(x) for x in ids] == [32, 32, 32, 4, 30]
    assert all((calls[i][1] == 2).all() for i in range(len(calls)))


def test_second_call_keeps_every_block(config, reference):
    again = precompute(config)
    assert (again["blocks"], again["kept"], again["images"]) == (0, 36, 0)
    assert contents(config.cache) == reference


def test_stored_answers_are_the_teachers(config, reference):
    """Against the teacher run by hand on views made one by one."""
    from deit_fast.data.ingest import ingest_batch
    from deit_fast.data.loader import make_batch
    from deit_fast.data.sources import open_source
    from deit_fast.views import ViewPlan

    source = open_source(config.data, "train", 16)
    plan = ViewPlan(config.view, config.seed, source.num_samples)
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
    processes = [
        subprocess.Popen(
            command(config, cache),
            env=os.environ | {"RANK": str(rank), "WORLD_SIZE": str(world), "LOCAL_RANK": str(rank)},
        )
        for rank in range(world)
    ]
    assert [process.wait(120) for process in processes] == [0] * world
    assert contents(cache) == reference


@pytest.mark.dist
def test_killed_at_any_moment_then_finished_gives_the_same_bytes(config, reference, tmp_path):
    """SIGKILL as soon as the first, the tenth, ... block is there; then the same command again."""
    cache = tmp_path / "cache"
    kills = 0
    for blocks_before_kill in (0, 5, 20):
        process = subprocess.Popen(command(config, cache))
        while process.poll() is None and blocks_done(cache) < blocks_before_kill:
            time.sleep(0.002)
        if process.poll() is None:
            process.send_signal(signal.SIGKILL)
            kills += 1
        process.wait()
    assert kills >= 2
    assert subprocess.run(command(config, cache), timeout=120).returncode == 0
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


def test_another_teacher_recipe_or_data_set_is_refused(config, reference):
    other = config.replace(seed=9, teacher_batch=16, view={"crop_scale": (0.3, 1.0)})
    with pytest.raises(CacheMismatch) as error:
        precompute(other)
    message = str(error.value)
    for name in ("view.seed", "teacher.batch", "view.crop_scale"):
        assert name in message
    assert "teacher.weights_sha256" not in message
    assert contents(config.cache) == reference


def test_missing_arguments_are_named(config):
    with pytest.raises(InputError, match="needs --teacher"):
        precompute(config.replace(teacher=None))
    with pytest.raises(InputError, match="needs --cache"):
        precompute(config.replace(cache=None))
