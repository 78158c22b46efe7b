"""Lock files: one owner, whatever the file says, whatever is in its place, and after a kill."""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import signal
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from deit_fast import _C
from deit_fast.cache import build_manifest
from deit_fast.cache.format import view_path, view_specs
from deit_fast.cache.locks import BlockLocks
from deit_fast.config import CodecConfig
from deit_fast.errors import InputError
from deit_fast.runtime import locks
from deit_fast.runtime.files import (
    open_atomically,
    remove_orphans,
    temporary_path,
    write_atomically,
)
from deit_fast.runtime.locks import Lock, acquire, owned_folder


@pytest.fixture(autouse=True)
def short_retry(monkeypatch):
    monkeypatch.setattr(locks, "RETRY_SECONDS", 0.05)


@pytest.fixture
def path(tmp_path) -> Path:
    return tmp_path / ".lock"


@contextmanager
def process_that_holds(path: Path) -> Iterator[int]:
    """The pid of a forked process with the lock."""
    ready, told = os.pipe()
    pid = os.fork()
    if pid == 0:
        acquire(path, "it")
        os.write(told, b"x")
        time.sleep(60)
        os._exit(0)
    os.read(ready, 1)
    try:
        yield pid
    finally:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        os.close(ready)
        os.close(told)


def test_a_second_owner_is_refused_and_the_first_one_named(path):
    lock = acquire(path, "the run")
    text = path.read_bytes()
    with pytest.raises(InputError) as error:
        acquire(path, "the run")
    who = f"pid {os.getpid()} on host {socket.gethostname()}"
    expected = f"{path}: the run is being written by {who}; wait for it or end it"
    assert str(error.value) == expected and path.read_bytes() == text
    lock.release()
    assert not path.exists()
    acquire(path, "the run").release()


def test_a_lock_is_held_whatever_its_text_says_and_no_process_is_asked(path, monkeypatch):
    """Of a dead process, of another host, or of this process itself, as in two containers with the
    same host name and pid; /proc and kill(2) are never used."""
    monkeypatch.setattr(os, "kill", None)
    monkeypatch.setattr(os, "readlink", None)
    mine = {"host": socket.gethostname(), "pid": os.getpid(), "rank": 0, "world_size": 1}
    texts = [mine, mine | {"pid": 2**22 + 1}, mine | {"host": "elsewhere"}, mine | {"pid": 1}, {}]
    holder = acquire(path, "it")
    for values in texts:
        path.write_text(json.dumps(values))
        with pytest.raises(InputError, match="it is being written by"):
            acquire(path, "it")
    holder.release()
    for values in texts:
        path.write_text(json.dumps(values))  # left behind by a kill: not locked
        acquire(path, "it").release()


def test_a_zombie_holds_no_lock(path):
    with process_that_holds(path) as pid:
        with pytest.raises(InputError, match=f"pid {pid} on host"):
            acquire(path, "it")
        os.kill(pid, signal.SIGKILL)
        os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)  # it has ended and is not reaped
        assert Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
        acquire(path, "it").release()


def test_a_forked_process_does_not_keep_the_lock_of_its_parent(path):
    """A loader's process lives for some seconds after its parent was killed."""
    lock = acquire(path, "it")
    child = multiprocessing.get_context("fork").Process(target=time.sleep, args=(30,))
    child.start()
    os.close(lock._descriptor)  # as the system does when it kills the parent
    locks._open.discard(lock)
    monitor = time.monotonic() + 30  # the child closes it when it begins to run
    while time.monotonic() < monitor:
        try:
            acquire(path, "it").release()
            break
        except InputError:
            continue
    assert not path.exists()
    child.kill()
    child.join()


def test_a_child_neither_deletes_nor_holds_its_parents_lock(path):
    lock = acquire(path, "it")
    pid = os.fork()
    if pid == 0:
        lock.release()
        os._exit(int(lock.is_held()))
    assert os.waitpid(pid, 0)[1] == 0
    assert lock.is_held() and path.exists()
    lock.release()


KINDS = {
    "link": lambda path: path.symlink_to(path.with_name("target")),
    "dangling link": lambda path: path.symlink_to("absent"),
    "link to itself": lambda path: path.symlink_to(path.name),
    "FIFO": os.mkfifo,
    "folder": os.mkdir,
    "socket": lambda path: socket.socket(socket.AF_UNIX).bind(str(path)),
    "device": lambda path: os.mknod(path, 0o666 | 0o20000, os.makedev(1, 3)),
}


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_no_regular_file_is_refused_at_once(tmp_path, kind):
    (tmp_path / "target").write_text("keep")
    for name in (".lock", ".lock-view-00000-block-0000000"):
        try:
            KINDS[kind](tmp_path / name)
        except PermissionError:
            pytest.skip("needs the right to make a device")
        with pytest.raises(InputError, match=f"{name} is not a regular file, so it cannot be a"):
            acquire(tmp_path / name, "it")
    with pytest.raises(InputError, match="is not a regular file"):
        BlockLocks(tmp_path).remove_dead()
    with pytest.raises(InputError, match="is not a regular file"):
        BlockLocks(tmp_path).acquire(0, 0)
    assert (tmp_path / "target").read_text() == "keep"
    assert sorted(tmp_path.iterdir()) == sorted(
        tmp_path / name for name in (".lock", ".lock-view-00000-block-0000000", "target")
    )


def test_a_file_system_without_locks_is_used_with_a_warning(path, monkeypatch, caplog):
    def flock(descriptor: int, operation: int) -> None:
        raise OSError(locks.errno.ENOLCK, "No locks available")

    monkeypatch.setattr(locks.fcntl, "flock", flock)
    with caplog.at_level("WARNING", "deit_fast"):
        acquire(path, "it").release()
        acquire(path, "it").release()
    assert caplog.text.count("no locks here") == 1
    assert not path.exists()


@pytest.mark.parametrize("harm", ["deleted", "replaced", "folder moved", "folder replaced"])
def test_an_owner_notices_that_its_lock_is_gone(tmp_path, harm):
    folder, away = tmp_path / "folder", tmp_path / "away"
    with owned_folder(folder, ".lock", "the run") as lock:
        lock.require_held()
        if harm.startswith("folder"):
            folder.rename(away)
        else:
            (folder / ".lock").unlink()
        if harm.endswith("replaced"):
            folder.mkdir(exist_ok=True)
            (folder / ".lock").write_text("another's")
        with pytest.raises(InputError, match=r"\.lock was moved, deleted or replaced while"):
            lock.require_held()
    if harm.endswith("replaced"):
        assert (folder / ".lock").read_text() == "another's"
    if harm == "folder moved":
        assert not folder.exists()
    if harm.startswith("folder"):
        with owned_folder(away, ".lock", "the run"):
            pass


def test_a_folder_is_created_and_deleted_again_only_if_new_and_empty(tmp_path):
    for name, made_before, filled in (("a", 0, 0), ("b", 1, 0), ("c", 0, 1)):
        folder = tmp_path / name
        if made_before:
            folder.mkdir()
        with owned_folder(folder, ".lock", "it"):
            if filled:
                (folder / "file").touch()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["b", "c"]
    assert list((tmp_path / "b").iterdir()) == []


def own_and_leave(folder: Path) -> None:
    for _ in range(200):
        with owned_folder(folder, ".lock", "it"):
            pass


def test_a_new_folder_that_one_deletes_while_another_wants_it(tmp_path, monkeypatch):
    """Each start of a job whose input is wrong creates the folder and deletes it again."""
    monkeypatch.setattr(locks, "RETRY_SECONDS", 60)
    context = multiprocessing.get_context("fork")
    jobs = [context.Process(target=own_and_leave, args=(tmp_path / "run",)) for _ in range(2)]
    for job in jobs:
        job.start()
    for job in jobs:
        job.join()
    assert [job.exitcode for job in jobs] == [0, 0]
    assert not list(tmp_path.glob("run/*"))


def take_and_die(folder: Path, seed: int) -> int:
    """Lock one of two files again and again, and die with a lock. While a lock is held, a file with
    this process's id must stay as it is: exit status 1 if another process wrote it."""
    draw = random.Random(seed)
    for _ in range(draw.randrange(1, 40)):
        path = folder / f".lock-{draw.randrange(2)}"
        try:
            lock = Lock(path, "it", locks.Owner("host", 1))
        except BlockingIOError:
            continue
        holder = folder / f"holder{path.name}"
        holder.write_text(str(seed))
        time.sleep(draw.choice([0, 0, 0.0005]))
        if holder.read_text() != str(seed):
            return 1
        if draw.random() < 0.1:
            os.kill(os.getpid(), signal.SIGKILL)
        lock.release()
    return 0


def test_sweep_of_owners_that_die(tmp_path):
    """OWNERS processes, four at a time."""
    running, ends = set(), []
    for seed in range(int(os.environ.get("OWNERS", "60"))):
        pid = os.fork()
        if pid == 0:
            os._exit(take_and_die(tmp_path, seed))
        running.add(pid)
        if len(running) == 4:
            pid, status = os.wait()
            running.remove(pid)
            ends.append(os.waitstatus_to_exitcode(status))
    ends += [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in running]
    assert set(ends) == {0, -signal.SIGKILL}, "two owners at once"
    print(f"{len(ends)} owners, {ends.count(-signal.SIGKILL)} killed with a lock")


def start_cleaner(folder: Path) -> int:
    pid = os.fork()
    while pid == 0:
        remove_orphans(folder)
    return pid


def test_a_clean_up_leaves_the_files_that_others_are_writing(tmp_path):
    """Two processes delete orphans all the time, while this one creates files and views."""
    specs = view_specs(build_manifest(
        CodecConfig(name="topk", k=2), num_classes=5, num_samples=9, tau=1.0, fingerprint={}
    ))  # fmt: skip
    cleaners = [start_cleaner(tmp_path) for _ in range(2)]
    try:
        with open_atomically(tmp_path / "slow") as file:
            for number in range(60):
                write_atomically(tmp_path / f"file-{number}", b"content")
                view = view_path(tmp_path, number)
                _C.ViewWriter(str(view), str(temporary_path(view)), specs(view_id=number))
            file.write(b"content")
    finally:
        for pid in cleaners:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
    assert (tmp_path / "slow").read_bytes() == b"content"
    assert len(list(tmp_path.glob("file-*"))) == len(list(tmp_path.glob("view-*.dlc"))) == 60
    (tmp_path / ".tmp-orphan").touch()
    remove_orphans(tmp_path)
    assert not list(tmp_path.glob(".tmp-*"))
