"""A run that is copied to object storage resumes on another machine as on its own."""

from __future__ import annotations

import os
import shutil
import signal
from pathlib import Path

import pytest

import deit_fast
from deit_fast.cli import main
from deit_fast.config import RunConfig
from deit_fast.errors import InputError
from deit_fast.runtime.signals import Preempted
from deit_fast.storage import services
from deit_fast.storage.failures import StorageError
from deit_fast.storage.objects import Objects
from deit_fast.training.mirror import Mirror
from helpers.digits import write_few_digits
from helpers.fault_proxy import fault_proxy
from helpers.feature_runs import numbers
from helpers.runs import AtStep, run_config
from helpers.servers import KEY, SECRET, Server, be_quick, use

STEPS = 6


@pytest.fixture(autouse=True)
def another_home(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "user"))
    be_quick(monkeypatch)


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("mirror")
    write_few_digits(root / "data", train=9, val=3)
    deit_fast.train(settings(root, root / "whole"))
    return root


def settings(root: Path, output: Path | str, **changes) -> RunConfig:
    config = run_config(root, output).replace(
        epochs=9, max_steps=STEPS, save_steps=2, eval_every=50, save_every=50, teacher=None,
        loss={"kind": "none"}, data={"workers": 0},
    )  # fmt: skip
    return config.replace(**changes)


@pytest.fixture
def url(each_server: Server, monkeypatch) -> str:
    use(each_server.port, monkeypatch)
    return f"s3://{each_server.new_bucket()}/runs/one"


def steps_at(url: str) -> list[int]:
    return sorted(Mirror(url, Path())._entries())


def test_another_machine_resumes_from_the_url(root, url, tmp_path):
    deit_fast.train(settings(root, tmp_path / "first", mirror=url, max_steps=4))
    assert steps_at(url) == [2, 4]
    deit_fast.train(settings(root, tmp_path / "second", mirror=url))
    assert numbers(tmp_path / "second") == numbers(root / "whole")
    assert steps_at(url) == [4, 6]  # as many as on the disk
    names = Objects(url).list()
    assert len([name for name in names if name.endswith(".pt")]) == 2
    for name in ("result.json", "model.safetensors", "metrics.jsonl", "config.json"):
        assert Objects(url).read(name) == (tmp_path / "second" / name).read_bytes()


def test_an_output_at_a_url_is_all_that_changes(root, url, tmp_path):
    found = deit_fast.train(settings(root, url, max_steps=4))
    assert found.path.is_relative_to(tmp_path / "user")
    shutil.rmtree(tmp_path / "user")
    found = deit_fast.train(settings(root, url))
    assert numbers(found.path) == numbers(root / "whole")


def test_the_newer_of_disk_and_url_counts(root, url, tmp_path):
    deit_fast.train(settings(root, tmp_path / "run", mirror=url, max_steps=2))
    deit_fast.train(settings(root, tmp_path / "run", max_steps=4))  # not copied
    deit_fast.train(settings(root, tmp_path / "other", mirror=url, max_steps=2))
    assert steps_at(url) == [2]
    deit_fast.train(settings(root, tmp_path / "run", mirror=url))
    assert steps_at(url) == [4, 6]
    assert numbers(tmp_path / "run") == numbers(root / "whole")


def test_a_newer_checkpoint_of_the_disk_joins_those_at_the_url(root, url, tmp_path):
    """Which of them stay is known only when the run has its data."""
    deit_fast.train(settings(root, tmp_path / "run", mirror=url, max_steps=4))
    deit_fast.train(settings(root, tmp_path / "run", max_steps=5))  # not copied
    assert steps_at(url) == [2, 4]
    deit_fast.train(settings(root, tmp_path / "run", mirror=url))
    assert steps_at(url) == [5, 6]
    assert numbers(tmp_path / "run") == numbers(root / "whole")


def test_a_checkpoint_that_is_not_whole_is_passed_over(root, url, tmp_path, caplog):
    deit_fast.train(settings(root, tmp_path / "run", mirror=url))
    objects = Objects(url)
    (newest,) = objects.list("checkpoints/step-000000006-")
    content = objects.read(newest)
    objects.put(newest, content[:-100])
    deit_fast.train(settings(root, tmp_path / "second", mirror=url))
    assert "its checkpoint is not whole" in caplog.text
    assert numbers(tmp_path / "second") == numbers(root / "whole")
    entry = Mirror(url, tmp_path)._entry(6)  # copied again
    assert entry is not None
    content = objects.read(entry.file)
    objects.put(entry.file, content[:50] + b"\0" + content[51:])
    with pytest.raises(InputError, match=r"is damaged: delete it to resume from the checkpoint"):
        deit_fast.train(settings(root, tmp_path / "third", mirror=url))


def contents_at(url: str) -> dict[str, bytes]:
    objects = Objects(url)
    return {name: objects.read(name) for name in objects.list()}


def test_a_url_has_one_run(root, url, tmp_path):
    """Another one is refused before it writes: other settings, a folder that has a run, a run that
    is to begin anew."""
    deit_fast.train(settings(root, tmp_path / "first", mirror=url, max_steps=2))
    deit_fast.train(settings(root, tmp_path / "own", max_steps=4))
    before = contents_at(url)
    for folder, changes, words in (
        ("other", {"seed": 3}, r"has a run with other settings: give this one another URL"),
        ("anew", {"resume": False}, r"has another run, and \S+ is not its folder: choose another"),
        ("own", {}, r"has another run, and \S+own is not its folder: choose another URL"),
    ):
        with pytest.raises(InputError, match=words):
            deit_fast.train(settings(root, tmp_path / folder, mirror=url, **changes))
    assert contents_at(url) == before
    # Before the first checkpoint too: the run that came first owns the URL.
    for name in before:
        if name.startswith("checkpoints/"):
            Objects(url).delete(name)
    with pytest.raises(InputError, match=r"has a run with other settings"):
        deit_fast.train(settings(root, tmp_path / "late", mirror=url, seed=3))
    deit_fast.train(settings(root, tmp_path / "again", mirror=url))
    assert numbers(tmp_path / "again") == numbers(root / "whole")


def test_two_processes_of_one_run_destroy_nothing(root, url, tmp_path):
    """As when a scheduler starts a run again whose old process still lives."""
    deit_fast.train(settings(root, tmp_path / "first", mirror=url, max_steps=4))
    mirrors = [Mirror(url, tmp_path / name) for name in ("first", "second")]
    digest = Mirror(url, tmp_path)._owner()["settings"]
    for mirror in mirrors:
        mirror.claim(digest, resume=True)
    mirrors[1].fetch()
    path = tmp_path / "first" / "checkpoints" / "step-000000004.pt"
    mirrors[0].objects.put("checkpoints/step-000000006-00000000.pt", path)  # not named yet
    mirrors[1]._rotate(4)
    assert "checkpoints/step-000000006-00000000.pt" in mirrors[0].objects.list()
    mirrors[1].submit(4, tmp_path / "second" / "checkpoints" / path.name)
    assert mirrors[1].wait().startswith("copied to")
    assert steps_at(url) == [2, 4] and mirrors[0]._entry(4) is not None


def test_rows_of_the_url_replace_older_ones(root, url, tmp_path):
    deit_fast.train(settings(root, tmp_path / "first", mirror=url, max_steps=2))
    deit_fast.train(settings(root, tmp_path / "second", mirror=url))
    deit_fast.train(settings(root, tmp_path / "first", mirror=url))  # its machine is back
    assert numbers(tmp_path / "first") == numbers(root / "whole")
    assert Objects(url).read("metrics.jsonl") == (tmp_path / "second/metrics.jsonl").read_bytes()


def test_without_any_whole_checkpoint_the_user_decides(root, url, tmp_path, caplog):
    deit_fast.train(settings(root, tmp_path / "run", mirror=url, max_steps=4))
    objects = Objects(url)
    names = [f"checkpoints/step-00000000{step}.json" for step in (2, 4)]
    two, four = (objects.read(name) for name in names)
    objects.put(names[1], two)  # of another step
    assert Mirror(url, tmp_path)._entry(4) is None
    objects.put(names[1], four[:-20])
    objects.put(names[0], two.replace(b'"step": 2', b'"step": 3'))  # another checksum
    with pytest.raises(
        InputError, match=r"no checkpoint at \S+ is whole: delete \S+/checkpoints t"
    ):
        deit_fast.train(settings(root, tmp_path / "second", mirror=url))
    deit_fast.train(settings(root, tmp_path / "run", mirror=url))  # repairs what it has
    assert steps_at(url) == [4, 6] and Mirror(url, tmp_path)._entry(4) is not None
    assert "another run" not in caplog.text


def test_nothing_of_a_killed_process_stays(root, url, tmp_path):
    stale = tmp_path / "run" / "checkpoints" / ".mirror-step-000000001.pt"
    stale.parent.mkdir(parents=True)
    stale.write_bytes(b"")
    deit_fast.train(settings(root, tmp_path / "run", mirror=url, max_steps=2))
    assert not list(stale.parent.glob(".mirror-*"))


def test_a_file_system_without_links_will_do(root, url, tmp_path, monkeypatch):
    def refuse(source, target):
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr("deit_fast.training.mirror.os.link", refuse)
    deit_fast.train(settings(root, tmp_path / "run", mirror=url))
    assert steps_at(url)[-1] == 6 and len(list((tmp_path / "run/checkpoints").glob("*.pt"))) == 2


def test_any_failure_of_the_thread_ends_the_wait(root, url, tmp_path):
    deit_fast.train(settings(root, tmp_path / "run", mirror=url, max_steps=2))
    (tmp_path / "run" / "samples.png").unlink(missing_ok=True)
    (tmp_path / "run" / "samples.png").mkdir()
    mirror = Mirror(url, tmp_path / "run")
    mirror.submit(2, tmp_path / "run" / "checkpoints" / "step-000000002.pt")
    with pytest.raises(InputError, match=r"samples.png"):
        mirror.wait()


def test_a_signal_waits_for_the_copy_and_says_so(root, url, tmp_path):
    with (
        AtStep(3, lambda: os.kill(os.getpid(), signal.SIGTERM)),
        pytest.raises(Preempted, match=rf"saved step \d in .*, copied to {url}; the same"),
    ):
        deit_fast.train(settings(root, tmp_path / "run", mirror=url))
    assert steps_at(url)[-1] in (3, 4)


@pytest.mark.parametrize("fault", ["503", "reset", "cut", "flip"])
def test_faults_of_the_network_lose_no_step(root, url, each_server, monkeypatch, tmp_path, fault):
    with fault_proxy(each_server.port) as proxy:
        use(proxy.port, monkeypatch)
        proxy.start(fault, share=0.2, method="PUT" if fault in ("503", "reset") else "GET")
        deit_fast.train(settings(root, tmp_path / "first", mirror=url, max_steps=4))
        deit_fast.train(settings(root, tmp_path / "second", mirror=url))
    assert numbers(tmp_path / "second") == numbers(root / "whole")


def test_without_the_service_the_run_is_finished_on_the_disk(root, url, monkeypatch, tmp_path):
    be_quick(monkeypatch, tries=1)
    config = settings(root, tmp_path / "run", mirror=url)

    def cut() -> None:
        monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:1")
        monkeypatch.setattr(services, "_state", services._State())

    unsaved = rf"cannot be .*; the run is finished in {tmp_path / 'run'}; the same command copies"
    with AtStep(3, cut), pytest.raises(StorageError, match=unsaved):
        deit_fast.train(config)
    assert numbers(tmp_path / "run") == numbers(root / "whole")
    assert (tmp_path / "run" / "result.json").exists()


def test_wrong_urls_are_one_line(root, tmp_path, capsys):
    for mirror, text in (
        ("s3://KEY:SECRET@bucket/run", "credentials"),
        ("ftp://host/run", "is not read"),
        ("folder", "is no URL"),
    ):
        with pytest.raises(InputError, match=text):
            deit_fast.train(settings(root, tmp_path / "run", mirror=mirror))
    with pytest.raises(InputError, match=r"is its own mirror: leave mirror=s3://b/c out"):
        deit_fast.train(settings(root, "s3://a/b", mirror="s3://b/c"))
    assert main(["train", "--output", "s4://a/b"]) == 2
    assert "s4:// is not read" in capsys.readouterr().err


def test_no_secret_is_written(root, url, tmp_path, caplog):
    deit_fast.train(settings(root, tmp_path / "run", mirror=url, max_steps=2))
    written = b"".join(p.read_bytes() for p in (tmp_path / "run").rglob("*") if p.is_file())
    objects = Objects(url)
    written += b"".join(objects.read(name) for name in objects.list()) + caplog.text.encode()
    assert KEY.encode() not in written and SECRET.encode() not in written
