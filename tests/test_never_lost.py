"""After any interruption the same command resumes a run and gives the uninterrupted result.

Signals and NaN come from a teacher that fails at a chosen batch (`helpers.unruly_teacher`).
Several processes are started by torchrun, over gloo.
"""

from __future__ import annotations

import json
import logging
import multiprocessing
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from deit_fast import cli
from deit_fast.config import RunConfig
from deit_fast.config_file import to_dict
from deit_fast.evaluation import evaluate
from deit_fast.models.weights import load_weights
from deit_fast.precomputation import precompute
from deit_fast.runtime import locks, signals
from deit_fast.runtime.metrics import read_metrics
from deit_fast.runtime.signals import EXIT_STATUS, SIGNALS, Preempted, Signals
from deit_fast.runtime.weights_header import WEIGHTS_FILES, read_digest, read_texts
from deit_fast.training import checkpoints, loop, run, state
from deit_fast.training.checkpoints import (
    CheckpointWriter,
    list_checkpoints,
    save_checkpoint,
)
from deit_fast.training.loop import train
from helpers.processes import redirect, start_forked
from helpers.runs import (
    STEPS,
    AtStep,
    assert_close_runs,
    comparable_rows,
    in_a_child,
    last_state,
    main,
    torchrun,
    train_rows,
    unruly,
    weights_equal,
)

HERE = Path(__file__).parent


@pytest.fixture(scope="module")
def whole(world, tmp_path_factory) -> Path:
    """The uninterrupted run."""
    output = tmp_path_factory.mktemp("whole")
    train(unruly(world, output))
    return output


def equal(left: object, right: object) -> bool:
    if isinstance(left, torch.Tensor):
        return torch.equal(left, right)
    if isinstance(left, dict):
        return left.keys() == right.keys() and all(equal(left[k], right[k]) for k in left)
    if isinstance(left, list):
        return len(left) == len(right) and all(map(equal, left, right))
    return left == right


def assert_arrived(run: Path, undisturbed: Path) -> None:
    """Weights, moving average, optimiser, counts and rows of metrics equal the other run's."""
    assert weights_equal(run, undisturbed, WEIGHTS_FILES.values())
    mine, theirs = last_state(run), last_state(undisturbed)
    for key in ("model", "ema", "optimizer", "step", "evaluated_step", "best_top1", "best",
                "skipped"):  # fmt: skip
        assert equal(mine[key], theirs[key]), key
    assert comparable_rows(run) == comparable_rows(undisturbed)


# ---------------------------------------------------------------------------------------------
# One process
# ---------------------------------------------------------------------------------------------


def test_a_row_interrupted_twice_is_complete(world, tmp_path, monkeypatch):
    config = unruly(world, tmp_path / "whole", log_every=4, epochs=1)
    train(config)
    parts = config.replace(output=str(tmp_path / "parts"))
    for at in (3, 2):
        monkeypatch.setenv("UNRULY", f"SIGKILL:{at}")
        assert in_a_child(parts) == -signal.SIGKILL
    monkeypatch.delenv("UNRULY")
    train(parts)
    whole_row = train_rows(comparable_rows(tmp_path / "whole"))[-1]
    assert whole_row["step"] == 6
    assert train_rows(comparable_rows(tmp_path / "parts"))[-1] == whole_row


@pytest.mark.usefixtures("heeds_ctrl_c")
def test_a_signal_at_any_step_saves_and_the_run_is_resumed(
    world, whole, tmp_path, monkeypatch
):  # fmt: skip
    config = unruly(world, tmp_path, save_steps=None)
    before = {number: signal.getsignal(number) for number in SIGNALS}
    stops = []
    # Batches after each start; the first step of a start included.
    for name, at in (("SIGUSR1", 0), ("SIGTERM", 1), ("SIGINT", 1), ("SIGUSR1", 1), ("SIGINT", 0)):
        monkeypatch.setenv("UNRULY", f"{name}:{at}")
        with pytest.raises(Preempted, match="Ctrl-C: " if name == "SIGINT" else name) as caught:
            train(config)
        assert caught.value.status == (130 if name == "SIGINT" else EXIT_STATUS)
        stops.append(last_state(tmp_path)["step"] if "saved step" in str(caught.value) else None)
    at_first = "at the first step of a start there is nothing to save"
    assert stops == [None, 2, 4, 6, None], at_first
    assert {number: signal.getsignal(number) for number in SIGNALS} == before
    monkeypatch.delenv("UNRULY")
    train(config)
    assert_arrived(tmp_path, whole)


@pytest.mark.usefixtures("heeds_ctrl_c")
def test_a_second_ctrl_c_ends_at_once_but_not_one_that_torchrun_passes_on(monkeypatch, caplog):
    monkeypatch.setattr(signals, "RELAY_SECONDS", 3600)
    caplog.set_level(logging.INFO, "deit_fast")
    with Signals() as received:
        for _ in range(3):
            os.kill(os.getpid(), signal.SIGINT)
        assert received.received == "Ctrl-C"
        assert caplog.messages == ["Ctrl-C: saving after this step; Ctrl-C again stops at once"]
        monkeypatch.setattr(signals, "RELAY_SECONDS", 0)
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)


def test_a_process_that_ignores_ctrl_c_goes_on_ignoring_it(monkeypatch):
    """As a job that a script starts in the background does."""
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with Signals() as received:
            os.kill(os.getpid(), signal.SIGINT)
            assert received.received is None
    finally:
        signal.signal(signal.SIGINT, before)


def test_an_evaluation_interrupted_by_a_signal_is_made_up(
    world, whole, tmp_path, monkeypatch
):  # fmt: skip
    from deit_fast.training import run

    forward_heads, calls = run.forward_heads, []

    def interrupted(*arguments):
        calls.append(1)
        if len(calls) == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return forward_heads(*arguments)

    config = unruly(world, tmp_path, save_steps=None)
    with monkeypatch.context() as patch:
        patch.setattr(run, "forward_heads", interrupted)
        with pytest.raises(Preempted, match="saved step 6"):
            train(config)
    assert last_state(tmp_path)["evaluated_step"] == 0
    train(config)
    assert_arrived(tmp_path, whole)


def test_kill_at_twenty_random_steps(world, tmp_path, monkeypatch):
    """With mixing, repeats and a moving average."""
    draw = random.Random(7)
    config = unruly(world, tmp_path / "killed", epochs=5, num_views=6)
    kills = 0
    for _ in range(60):
        monkeypatch.setenv("UNRULY", f"SIGKILL:{draw.randrange(0, 3)}")
        if kills == 20:
            monkeypatch.delenv("UNRULY")
        status = in_a_child(config)
        if status == 0:
            break
        assert status == -signal.SIGKILL
        kills += 1
    assert status == 0 and kills == 20
    monkeypatch.delenv("UNRULY", raising=False)
    train(config.replace(output=str(tmp_path / "whole")))
    assert_arrived(tmp_path / "killed", tmp_path / "whole")


def test_a_killed_cached_run_is_resumed(world, tmp_path):
    config = unruly(world, tmp_path / "whole", cache=str(tmp_path / "cache"))
    precompute(config)
    config = config.replace(teacher=None)
    train(config)
    parts = config.replace(output=str(tmp_path / "parts"))
    for steps in (1, 5, 6, 7):
        assert in_a_child(parts.replace(max_steps=steps)) == 0
    train(parts)
    assert weights_equal(tmp_path / "whole", tmp_path / "parts")


def test_nan_never_reaches_the_weights(world, whole, tmp_path, monkeypatch):
    monkeypatch.setenv("UNRULY", "nan:7")
    with pytest.raises(FloatingPointError) as caught:
        train(unruly(world, tmp_path))
    message = str(caught.value)
    assert "step 8: the loss of rank 0 is not finite" in message
    assert "parameters are not finite: cls_token" in message and "\n" not in message
    state = last_state(tmp_path)
    assert state["step"] == 7
    assert all(value.isfinite().all() for value in state["model"].values())
    monkeypatch.delenv("UNRULY")
    train(unruly(world, tmp_path))
    assert_arrived(tmp_path, whole)


@pytest.mark.parametrize("name", ["lamb", "muon", "nadamuon"])
def test_nan_never_reaches_the_weights_of_others(world, tmp_path, monkeypatch, name):
    """LAMB and Muon have no found_inf, so the host reads the result. They resume bit for bit."""
    monkeypatch.setenv("UNRULY", "nan:7")
    optim = {"name": name, "layer_decay": 0.8, "clip_grad": 1.0, "ema_decay": 0.9}
    made = []
    create = run.create_state
    monkeypatch.setattr(run, "create_state", lambda *given: made.append(create(*given)) or made[-1])
    with pytest.raises(FloatingPointError, match="step 8: the loss of rank 0 is not finite"):
        train(unruly(world, tmp_path / "nan", optim=optim))
    saved = last_state(tmp_path / "nan")
    assert saved["step"] == 7 and equal(dict(made[0].model.state_dict()), dict(saved["model"]))
    monkeypatch.delenv("UNRULY")
    train(unruly(world, tmp_path / "nan", optim=optim))
    train(unruly(world, tmp_path / "whole", optim=optim))
    assert_arrived(tmp_path / "nan", tmp_path / "whole")


def test_nan_of_a_teacher_is_found_in_hard_distillation(world, tmp_path, monkeypatch):
    """The argmax of ten NaN is some class, so the loss alone would be finite."""
    monkeypatch.setenv("UNRULY", "nan:3")
    with pytest.raises(FloatingPointError, match="step 4: the loss of rank 0 is not finite"):
        train(unruly(world, tmp_path, loss={"kind": "hard"}))
    assert last_state(tmp_path)["step"] == 3


@pytest.mark.slow
@pytest.mark.parametrize("what", ["model", "blocks"])
def test_a_compiled_run_equals_the_run(world, tmp_path, what):
    torch._dynamo.reset()
    train(unruly(world, tmp_path, compile=what, max_steps=3, model={"drop_path": 0.0}))
    plain = tmp_path / "plain"
    train(unruly(world, plain, max_steps=3, model={"drop_path": 0.0}))
    assert_close_runs(tmp_path, plain)


@pytest.mark.parametrize("name", ["adamw", "nadamuon"])
def test_rollback_leaves_the_step_out(world, tmp_path, monkeypatch, name):
    monkeypatch.setenv("UNRULY", "nan:7")
    clean = unruly(world, tmp_path / "clean", save_steps=3, optim={"name": name})
    config = clean.replace(output=str(tmp_path / "rolled"), on_nonfinite="rollback")
    result = train(config)
    assert result["skipped_steps"] == [7] and result["steps"] == STEPS
    trained = 32 * (STEPS - 1)  # samples
    assert result["images_per_s"] == pytest.approx(trained / result["train_seconds"], rel=0.02)
    rows = train_rows(read_metrics(tmp_path / "rolled/metrics.jsonl"))
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5, 6, 7, 9, 10, 11, 12]
    monkeypatch.delenv("UNRULY")
    # The same as a run that left the step out from the start.
    train(clean.replace(max_steps=6))
    path = list_checkpoints(tmp_path / "clean/checkpoints")[-1]
    state = torch.load(path, weights_only=True)
    save_checkpoint(path.parent, state["step"], state | {"skipped": [7]})
    train(clean)
    assert weights_equal(tmp_path / "rolled", tmp_path / "clean", WEIGHTS_FILES.values())


def test_the_best_weights_are_kept(world, tmp_path, monkeypatch, caplog):
    """The teacher's answers turn round after the second epoch: the accuracy falls."""
    monkeypatch.setenv("UNRULY", "drift:12")
    config = unruly(world, tmp_path / "run", save_steps=None, keep_every=1, epochs=4,
                    loss={"kind": "hard", "alpha": 0.9})  # fmt: skip
    train(config.replace(max_steps=20))
    result = train(config)  # after the best evaluation, resumed within an epoch
    run = Path(config.output)
    best = result["best_epoch"]
    assert best < 4 and result["best_metric"] == "top1"
    kept = torch.load(run / f"checkpoints/step-{6 * best:09d}.pt", weights_only=True)["model"]
    assert equal(load_weights(run / "best.safetensors"), kept)
    assert not equal(load_weights(run / "model.safetensors"), kept)
    assert evaluate(str(run), weights="best")["top1"] == result["best_top1"]
    assert result["weights"]["best.safetensors"] == read_digest(run / "best.safetensors")
    assert json.loads(read_texts(run / "best.safetensors")["best"]) == {
        "metric": "top1", "value": result["best_top1"], "epoch": best, "step": 6 * best,
    }  # fmt: skip
    # Checkpoints of earlier versions have no best weights: those of the file may be others.
    state = last_state(run)
    del state["best"], state["best_step"]
    save_checkpoint(run / "checkpoints", state["step"], state)
    assert "best.safetensors" not in train(config)["weights"]
    assert not (run / "best.safetensors").exists() and "best.safetensors is not" in caplog.text


def test_rollbacks_are_limited(world, tmp_path, monkeypatch):
    monkeypatch.setenv("UNRULY", "nan:7")
    monkeypatch.setattr(RunConfig, "max_rollbacks", 0)
    config = unruly(world, tmp_path, on_nonfinite="rollback")
    with pytest.raises(FloatingPointError, match="0 rollbacks did not help"):
        train(config)


def test_accumulated_parts_are_one_step(world, whole, tmp_path):
    train(unruly(world, tmp_path, accumulate=4))
    assert_close_runs(tmp_path, whole)


# ---------------------------------------------------------------------------------------------
# Failures around a run
# ---------------------------------------------------------------------------------------------


def ends_in_one_line(config: RunConfig, capsys) -> tuple[int, str]:
    """Status and error line of `deit-fast train`, which must fail."""
    path = Path(config.output).with_suffix(".json")
    path.write_text(json.dumps(to_dict(config)))
    capsys.readouterr()
    status = cli.main(["train", "--config", str(path)])
    err = capsys.readouterr().err
    lines = [line for line in err.splitlines() if line.startswith("deit-fast: error: ")]
    assert status != 0 and len(lines) == 1 and "Traceback" not in err, err
    return status, lines[0]


def assert_goes_on(config: RunConfig, undisturbed: Path, step: int) -> None:
    """The newest checkpoint is that of ``step``, and the same command finishes the run from it."""
    assert last_state(Path(config.output))["step"] == step
    assert not list((Path(config.output) / "checkpoints").glob(".tmp*"))
    train(config)
    assert_arrived(Path(config.output), undisturbed)


@pytest.fixture
def small_disk(whole, tmp_path):
    """A file system of two and a half checkpoints, and a function that enlarges it.

    The size is that before the first evaluation, from which on a checkpoint has the best weights.
    """
    checkpoint = list_checkpoints(whole / "checkpoints")[-1].stat().st_size
    checkpoint -= sum(value.nbytes for value in (last_state(whole)["best"] or {}).values())
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "tmpfs", str(disk), "-o"]
    command = [*mount, f"size={5 * checkpoint // 2}"]
    if os.geteuid() or subprocess.run(command, capture_output=True).returncode:
        pytest.skip("needs the right to mount a small file system")
    yield disk, lambda: subprocess.run([*mount, "remount,size=64m"], check=True)
    subprocess.run(["umount", "-l", str(disk)], check=True)


def test_disk_full_during_a_run(world, whole, small_disk, capsys):
    disk, make_room = small_disk
    config = unruly(world, disk / "run")
    status, line = ends_in_one_line(config.replace(output=str(disk / "run")), capsys)
    assert status == 2 and "no space left" in line and "step-000000003.pt" in line
    make_room()
    assert_goes_on(config, whole, step=2)


def test_file_size_limit_during_a_run(world, whole, tmp_path, capsys):
    """Like a quota; needs no privileges."""
    config = unruly(world, tmp_path / "run")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    with AtStep(5, lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))):
        try:
            status, line = ends_in_one_line(config, capsys)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert status == 2 and "File too large" in line and ".pt" in line
    step = last_state(tmp_path / "run")["step"]
    assert step in (3, 4), "that of step 4 may still be on its thread"
    assert_goes_on(config, whole, step)


def test_newest_checkpoint_truncated(world, whole, tmp_path, caplog):
    config = unruly(world, tmp_path / "run")
    train(config.replace(max_steps=7))
    newest = list_checkpoints(tmp_path / "run/checkpoints")[-1]
    os.truncate(newest, newest.stat().st_size // 2)
    leftover = newest.with_name(f".tmp-1-{newest.name}")  # of a process killed while it wrote
    leftover.write_bytes(b"half")
    rows = (tmp_path / "run/metrics.jsonl").read_text().splitlines(keepends=True)
    kept = [row for row in rows if '"eval"' not in row or '"step": 7' not in row]
    (tmp_path / "run/metrics.jsonl").write_text("".join(kept))  # of the end at max_steps
    train(config)
    assert not leftover.exists()
    assert f"{newest.name} is broken" in caplog.text and "trying the one before" in caplog.text
    assert_arrived(tmp_path / "run", whole)


def test_loader_process_killed(world, whole, tmp_path, capsys):
    def kill_one() -> None:
        os.kill(multiprocessing.active_children()[0].pid, signal.SIGKILL)

    config = unruly(world, tmp_path / "run", data={"workers": 1})
    with AtStep(4, kill_one):
        status, line = ends_in_one_line(config, capsys)
    assert status == 2
    assert "a process that loads images died" in line
    assert "killed by signal: Killed" in line or "exited unexpectedly" in line
    step = last_state(tmp_path / "run")["step"]
    assert 3 <= step <= 6
    assert_goes_on(config, whole, step)
    assert multiprocessing.active_children() == []


def test_an_interrupted_wait_is_waited_for_again(tmp_path, monkeypatch):
    """torch's handler raises in whatever line the main thread is when a loader process dies."""
    may_write = threading.Event()

    def interrupt(*_: object) -> None:
        raise RuntimeError("DataLoader worker (pid 7) is killed")

    def slow(*_: object) -> Path:
        may_write.wait(60)
        (tmp_path / "written").touch()
        return tmp_path

    monkeypatch.setattr("deit_fast.training.checkpoints.save_checkpoint", slow)
    writer = CheckpointWriter(tmp_path, lambda: None)
    writer.save(1, {})
    before = signal.signal(signal.SIGALRM, interrupt)
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.02)
        with pytest.raises(RuntimeError, match="is killed"):
            writer.wait()
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    assert not (tmp_path / "written").exists()
    threading.Timer(0.1, may_write.set).start()
    writer.wait()
    assert (tmp_path / "written").exists()


def test_data_removed_during_a_run(world, whole, tmp_path, capsys):
    shutil.copytree(world / "data", tmp_path / "data")
    config = unruly(world, tmp_path / "run", data={"root": str(tmp_path / "data")})
    with AtStep(4, lambda: (tmp_path / "data").rename(tmp_path / "away")):
        status, line = ends_in_one_line(config, capsys)
    assert status == 2 and "No such file or directory" in line
    assert str(tmp_path / "data") in line
    (tmp_path / "away").rename(tmp_path / "data")
    assert_goes_on(config, whole, step=4)


def test_cache_removed_during_a_run(world, tmp_path, capsys):
    """Views in use stay readable. Those of the second cycle, from step 37 on, are gone: they are
    read 16 steps ahead, and up to two steps more for logits that are being gathered."""
    cache = tmp_path / "cache"
    config = unruly(world, tmp_path / "run", cache=str(cache), epochs=4, num_views=6,
                    batch_size=16)  # fmt: skip
    precompute(config)
    config = config.replace(teacher=None)
    train(config.replace(output=str(tmp_path / "whole")))
    with AtStep(1, lambda: cache.rename(tmp_path / "away")):
        status, line = ends_in_one_line(config, capsys)
    assert status == 2 and str(cache) in line and "is not in the cache" in line
    (tmp_path / "away").rename(cache)
    step = last_state(tmp_path / "run")["step"]
    assert 1 <= step <= 36, "found when it is read ahead, or when it is needed"
    assert_goes_on(config, tmp_path / "whole", step)


# ---------------------------------------------------------------------------------------------
# The run's folder has one owner
# ---------------------------------------------------------------------------------------------


def content(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


def start_quietly(config: RunConfig, folder: Path, patience: float) -> SimpleNamespace:
    """`deit-fast train`: its process, and the file of its output."""
    path = folder / "config.json"
    path.write_text(json.dumps(to_dict(config)))
    output = Path(tempfile.mkstemp(dir=folder)[1])
    process = start_forked(_train_quietly, str(path), str(output), patience)
    return SimpleNamespace(process=process, output=output)


def _train_quietly(path: str, output: str, patience: float) -> None:
    redirect(2, output)
    os.dup2(2, 1)
    locks.RETRY_SECONDS = patience
    sys.exit(cli.main(["train", "--config", path]))


def test_a_second_start_is_refused_and_changes_nothing(world, whole, tmp_path, capsys):
    config = unruly(world, tmp_path / "run")
    lines, folders = [], []

    def start_again() -> None:
        folders.append(content(tmp_path / "run"))
        lines.append(ends_in_one_line(config, capsys))
        folders.append(content(tmp_path / "run"))

    with AtStep(5, start_again):
        train(config)
    (status, line), (before, after) = lines[0], folders
    assert status == 2 and f"{tmp_path}/run/.lock-run: the run is being written by pid" in line
    assert f"pid {os.getpid()} on host" in line
    written = {name for name in before.keys() | after.keys() if before.get(name) != after.get(name)}
    assert all("checkpoints/" in name for name in written), "by the first start, on its thread"
    assert_arrived(tmp_path / "run", whole)
    assert not list((tmp_path / "run").glob(".lock*"))


def test_files_with_other_names_are_no_checkpoints(tmp_path):
    for name in ("step-000000002.pt", "step-000000010.pt", "step-1000000000.pt"):
        (tmp_path / name).touch()
    foreign = ("step-backup.pt", "step-000000011.pt.bak", "step-.pt", "step-11.pt", "xstep-9.pt",
               "step-000000012 (copy).pt", ".tmp-0-step-000000013.pt")  # fmt: skip
    for name in foreign:
        (tmp_path / name).touch()
    steps = [int(path.stem.split("-")[1]) for path in list_checkpoints(tmp_path)]
    assert steps == [2, 10, 10**9]


@pytest.mark.parametrize("is_replaced", [False, True], ids=["moved", "replaced"])
def test_a_folder_moved_during_a_run_stops_it(world, whole, tmp_path, capsys, is_replaced):
    run, away = tmp_path / "run", tmp_path / "away"

    def move() -> None:
        run.rename(away)
        if is_replaced:
            run.mkdir()

    with AtStep(5, move):
        status, line = ends_in_one_line(unruly(world, run), capsys)
    assert status == 2 and f"{run}/.lock-run was moved, deleted or replaced" in line
    assert run.exists() == is_replaced and not list(run.rglob("*"))
    step = last_state(away)["step"]
    assert 3 <= step <= 5, "a checkpoint that is being written then is lost"
    assert_goes_on(unruly(world, away), whole, step)


@pytest.mark.parametrize("kind", ["dangling link", "FIFO", "folder"])
def test_what_stands_in_place_of_the_lock_is_refused(world, tmp_path, capsys, kind):
    run = tmp_path / "run"
    run.mkdir()
    lock = run / ".lock-run"
    {"dangling link": lambda: lock.symlink_to("absent"), "FIFO": lambda: os.mkfifo(lock),
     "folder": lock.mkdir}[kind]()  # fmt: skip
    status, line = ends_in_one_line(unruly(world, run), capsys)
    assert status == 2 and ".lock-run is not a regular file" in line
    assert list(run.iterdir()) == [lock]


def test_two_starts_at_once_and_kills(world, whole, tmp_path):
    """Two or three starts of one command at a time, at random offsets; one is killed at a random
    moment. Until a start ends with status 0. KILLS=N: as many kills at least."""
    draw, kills = random.Random(11), int(os.environ.get("KILLS", "1"))
    runs = refused = killed = 0
    while killed < kills:
        config, finished = unruly(world, tmp_path / f"run-{runs}"), False
        runs += 1
        while not finished:
            starts = [
                start_quietly(config, tmp_path, draw.choice([0.0, 1.0]))
                for _ in range(draw.choice([2, 2, 3]))
            ]
            lock = Path(config.output) / ".lock-run"
            while not lock.exists() and all(start.process.is_alive() for start in starts):
                time.sleep(0.005)
            time.sleep(draw.uniform(0, 0.8))
            draw.choice(starts).process.kill()
            for start in starts:
                start.process.join()
            ends = [(start.process.exitcode, start.output.read_text()) for start in starts]
            for status, text in ends:
                assert status in (0, -signal.SIGKILL) or (
                    status == 2 and text.count("deit-fast: error") == 1
                    and "the run is being written by" in text
                ), text  # fmt: skip
            refused += sum(status == 2 for status, _ in ends)
            killed += sum(status == -signal.SIGKILL for status, _ in ends)
            finished = any(status == 0 for status, _ in ends)
        assert_arrived(Path(config.output), whole)
        assert content(Path(config.output)).keys() == content(whole).keys()
    print(f"{runs} runs, {killed} kills, {refused} starts refused")


# ---------------------------------------------------------------------------------------------
# Two processes
# ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def whole_of_two(world, tmp_path_factory) -> Path:
    output = tmp_path_factory.mktemp("two") / "whole"
    status, stderr = torchrun(unruly(world, output))
    assert status == 0, stderr[-3000:]
    return output


@pytest.mark.dist
def test_two_processes_equal_one(whole, whole_of_two):
    assert_close_runs(whole_of_two, whole)
    result = json.loads((whole_of_two / "result.json").read_text())
    alone = json.loads((whole / "result.json").read_text())
    assert result["processes"] == 2 and result["samples"] == alone["samples"]


@pytest.mark.dist
@pytest.mark.parametrize("optimizer", ["adamw", "nadamuon"])
def test_two_processes_without_a_teacher(world, tmp_path, optimizer):
    """The distillation head then has no gradient, which DDP must allow."""
    config = unruly(world, tmp_path / "two", loss={"kind": "none"}, teacher=None, epochs=1,
                    optim={"name": optimizer, "clip_grad": 1.0})  # fmt: skip
    status, stderr = torchrun(config.replace(accumulate=2))
    assert status == 0, stderr[-3000:]
    train(config.replace(output=str(tmp_path / "one")))
    assert_close_runs(tmp_path / "two", tmp_path / "one")


@pytest.mark.dist
def test_a_signal_to_one_rank_stops_both_and_they_resume(world, whole_of_two, tmp_path):
    config = unruly(world, tmp_path / "run", save_steps=None)
    status, stderr = torchrun(config, UNRULY="SIGTERM:3:1")
    assert status != 0 and f"exitcode  : {EXIT_STATUS}" in stderr, stderr[-3000:]
    assert "saved step" in stderr
    assert 4 <= last_state(tmp_path / "run")["step"] <= 7
    assert torchrun(config)[0] == 0
    assert_arrived(tmp_path / "run", whole_of_two)


@pytest.mark.dist
def test_nan_in_one_rank_stops_both(world, tmp_path):
    status, stderr = torchrun(unruly(world, tmp_path / "run"), UNRULY="nan:5:1")
    assert status != 0
    assert "step 6: the loss of rank 1 is not finite" in stderr
    state = last_state(tmp_path / "run")
    assert state["step"] == 5
    assert all(value.isfinite().all() for value in state["model"].values())


@pytest.mark.dist
def test_torchrun_restarts_after_a_killed_rank(world, whole_of_two, tmp_path):
    """Killed at its fifth batch; the restart begins after it and is not killed."""
    config = unruly(world, tmp_path / "run")
    status, stderr = torchrun(config, restarts=3, UNRULY="SIGKILL:4:1")
    assert status == 0, stderr[-3000:]
    assert_arrived(tmp_path / "run", whole_of_two)


def _start_that_differs(*arguments: str) -> None:
    """Rank 1 gets the words of SECOND too. BROKEN: it can read no checkpoint. A rank that comes as
    far as the data leaves the file OPENED."""

    def opened(*_: object) -> None:
        Path(os.environ["OPENED"]).touch()
        raise AssertionError("the data was opened")

    loop.RunData = opened
    second = os.environ["RANK"] == "1"
    if second and "BROKEN" in os.environ:
        state.list_checkpoints = checkpoints.open_regular = None
    main(*arguments, *(os.environ["SECOND"].split() if second else ()))


@pytest.fixture(scope="module")
def two_disks(world, tmp_path_factory) -> Path:
    """Two runs of one command up to step 3."""
    root = tmp_path_factory.mktemp("disks")
    for name in ("first", "second"):
        train(unruly(world, root / name, max_steps=3))
    return root


STARTS = {  # disk of rank 0, words of rank 1, the line
    "only-the-first-has-one": (
        "first", "--output DISKS/empty",
        "the ranks differ in their checkpoint (step-000000003.pt in rank 0, none in rank 1): "
        "DISKS/",
    ),
    "only-the-second-has-one": (
        "empty", "--output DISKS/first",
        "the ranks differ in their checkpoint (none in rank 0, step-000000003.pt in rank 1): ",
    ),
    "both-have-their-own": (
        "first", "--output DISKS/second", "the ranks differ in their bytes of that checkpoint (",
    ),
    "no-resume": (
        "empty", "--output DISKS/first --no-resume",
        "rank 1 failed: --no-resume, but DISKS/first/checkpoints has checkpoints",
    ),
    "no-branch": (
        "empty", "--resume-from DISKS/gone.pt", "rank 1 failed: checkpoint DISKS/gone.pt cannot",
    ),
    "broken": ("first", "", "rank 1 failed: all 2 checkpoints in DISKS/first/checkpoints are"),
    "not-writable": ("file", "--output DISKS/first", "rank 0 failed: --output"),
}  # fmt: skip


@pytest.mark.dist
@pytest.mark.parametrize("name", STARTS)
def test_ranks_that_do_not_start_from_the_same_checkpoint_all_end(world, two_disks, tmp_path, name):
    """Before any of them opens the data, which may take minutes."""
    disk, words, line = STARTS[name]
    shutil.copytree(two_disks, tmp_path / "disks")
    (tmp_path / "disks/empty").mkdir()
    (tmp_path / "disks/file").touch()
    before = [content(path) for path in sorted((tmp_path / "disks").iterdir())]
    config = unruly(world, tmp_path / "disks" / disk)
    environment = {"OPENED": str(tmp_path / "opened"),
                   "SECOND": words.replace("DISKS", str(tmp_path / "disks"))}  # fmt: skip
    if name == "broken":
        environment["BROKEN"] = "1"
    status, stderr = torchrun(config, call=_start_that_differs, **environment)
    errors = [text for text in stderr.splitlines() if "deit-fast: error" in text]
    # torchrun ends the other rank as soon as the first has ended, maybe before it says the same.
    # A rank that fails says so itself, the others name it.
    line = line.replace("DISKS", str(tmp_path / "disks"))
    own = line.partition(" failed: ")[2] or line
    assert status != 0 and any(own in text for text in errors), stderr
    assert "Traceback (most recent call last):\n  File" not in stderr
    assert not (tmp_path / "opened").exists()
    folders = sorted(path for path in (tmp_path / "disks").iterdir() if path.suffix == "")
    assert [content(path) for path in folders] == before
