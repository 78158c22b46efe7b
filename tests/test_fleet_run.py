"""Images, cache and run in object storage: the losses of the local run, also after a machine is
lost."""

from __future__ import annotations

import json
import shutil
import signal
from pathlib import Path

import pytest

import deit_fast
from deit_fast.config import RunConfig
from deit_fast.config_file import to_dict
from deit_fast.units import Units
from helpers import fleet
from helpers.processes import start_forked
from helpers.runs import run_config
from helpers.servers import KEY, SECRET, Server, upload, use
from helpers.tars import write_tars


def settings(world: Path, root: str, cache: str, output: str) -> RunConfig:
    return run_config(world, output).replace(
        cache=cache, data={"root": root, "source": "tar", "workers": 1}, save_steps=2,
        loss={"kind": "soft"},
    )  # fmt: skip


def train_rows(content: str) -> list[dict]:
    rows = [json.loads(line) for line in content.splitlines()]
    kept = ("step", "loss", "distill_loss", "grad_norm", "top1", "ema_top1")
    return [{k: row[k] for k in kept if k in row} for row in rows if row["kind"] != "start"]


@pytest.mark.slow
@pytest.mark.dist
def test_a_run_in_a_bucket_that_loses_its_machine_is_the_local_run(
    world, moto_server: Server, monkeypatch, tmp_path
):
    use(moto_server.port, monkeypatch)
    bucket = moto_server.new_bucket()
    write_tars(world / "data", tmp_path / "tars", per_shard=60)
    upload(moto_server.port, tmp_path / "tars", bucket, "images/")
    images, cache, run = (f"s3://{bucket}/{name}" for name in ("images", "cache", "runs/one"))

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    local = settings(world, str(tmp_path / "tars"), str(tmp_path / "cache"), tmp_path / "run")
    deit_fast.precompute(local)
    deit_fast.train(local)
    expected = train_rows((tmp_path / "run" / "metrics.jsonl").read_text())

    assert len(expected) >= 8

    remote = settings(world, images, cache, run)
    worker = Units(remote)
    worker.compute(range(worker.total))
    file = fleet.write_settings(tmp_path / "settings.json", to_dict(remote))
    first = start_forked(fleet.train_until_lost, file, 5, run,
                         XDG_CACHE_HOME=str(tmp_path / "machine-1"))  # fmt: skip
    first.join(200)
    assert first.exitcode == -signal.SIGKILL
    shutil.rmtree(tmp_path / "machine-1")
    second = start_forked(fleet.train, file, XDG_CACHE_HOME=str(tmp_path / "machine-2"))
    second.join(200)
    assert second.exitcode == 0

    (metrics,) = (tmp_path / "machine-2").rglob("runs/*/metrics.jsonl")
    assert train_rows(metrics.read_text()) == expected
    written = [path for path in (tmp_path / "machine-2").rglob("*") if path.is_file()]
    for secret in (KEY.encode(), SECRET.encode()):
        assert not any(secret in path.read_bytes() for path in written)
