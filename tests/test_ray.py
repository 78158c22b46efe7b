"""Units of work on a Ray cluster of this machine, which loses actors and gains a node."""

from __future__ import annotations

import os
import random
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from deit_fast.cli import main
from deit_fast.config import RunConfig
from deit_fast.errors import InputError
from deit_fast.integrations import ray as ours
from deit_fast.precomputation import precompute
from deit_fast.storage.objects import Objects
from deit_fast.units import TRIES_FOLDER, Units
from helpers import small_blocks
from helpers.digits import write_few_digits
from helpers.feature_runs import config_of
from helpers.processes import run_script, start_forked
from helpers.servers import SECRET, Server, use
from helpers.units import command, contents

VIEWS = 12  # a unit each
NICENESS = "RAY_worker_niceness", "0"  # Ray's 15 starves its workers beside other tests

sweep = pytest.mark.skipif("DEIT_FAST_SWEEP" not in os.environ, reason="minutes")


@pytest.fixture(scope="module")
def cluster(tmp_path_factory, moto_server: Server) -> Iterator[object]:
    pytest.importorskip("ray")
    with pytest.MonkeyPatch.context() as patch, ours.restored_handler():
        use(moto_server.port, patch)
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("home")))
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        patch.setenv("RAY_AUTH_MODE", "disabled")
        patch.setenv(*NICENESS)
        patch.setenv("FRAGILE", "slow:300")
        patch.setenv(
            "PYTHONPATH", os.pathsep.join(["tests", ".", os.environ.get("PYTHONPATH", "")])
        )
        import ray
        from ray.cluster_utils import Cluster

        head = {"num_cpus": 2, "include_dashboard": False, "object_store_memory": 200 << 20}
        found = Cluster(initialize_head=True, head_node_args=head)
        ray.init(address=found.address, log_to_driver=False)
        yield found
        ray.shutdown()
        found.shutdown()


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("ray")
    write_few_digits(root / "data", train=7, val=3)
    precompute(settings(root, root / "whole"))
    return root


def settings(root: Path, cache: Path, **changes) -> RunConfig:
    base = config_of(
        root, cache=str(cache), targets=("logits",), teacher="helpers.fragile_teacher:fragile"
    )
    return base.replace(num_views=VIEWS, epochs=VIEWS, max_steps=None).replace(**changes)


def actors() -> list[int]:
    """Processes of this user in which a unit may be computed."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            if b"MapWorker" in path.read_bytes():
                found.append(int(path.parent.name))
        except OSError:
            continue
    return found


@pytest.mark.slow
@pytest.mark.dist
def test_actors_that_are_killed_and_a_node_that_joins_make_one_cache(cluster, root, tmp_path):
    config = settings(root, tmp_path / "cache")
    choice, killed, done = random.Random(0), [], threading.Event()

    def kill() -> None:
        while len(killed) < 4 and not done.wait(1.0):
            if found := actors():
                killed.append(choice.choice(found))
                os.kill(killed[-1], signal.SIGKILL)

    node = cluster.add_node(num_cpus=1)
    killer = threading.Thread(target=kill)
    killer.start()
    try:
        found = ours.precompute(config, workers=3, num_gpus=0, price_per_hour=2.0)
    finally:
        done.set()
        killer.join()
        cluster.remove_node(node)
    assert killed
    assert contents(tmp_path / "cache") == contents(root / "whole")
    assert (found["units"], found["quarantined"]) == (VIEWS, [])
    assert found["cost"] == pytest.approx(2 * found["worker_hours"], abs=1e-3)
    again = ours.precompute(config, workers=2, num_gpus=0)
    assert (again["computed"], again["kept"], again["images"]) == (0, VIEWS, 0)


@pytest.mark.slow
@pytest.mark.dist
@pytest.mark.parametrize(
    "where",
    [
        "folder",
        pytest.param("bucket", marks=sweep),
    ],
)
def test_a_fleet_of_every_kind_that_is_killed_at_random_makes_one_cache(
    cluster, root, tmp_path, moto_server, where
):
    """Ray's actors, tasks of an array and ranks of torchrun work on the same units at once; 20 of
    them are killed, and 5 tasks run twice."""
    cache = tmp_path / "cache"
    url = f"s3://{moto_server.new_bucket()}/cache"
    config = settings(root, cache, output=str(tmp_path / "run"))
    if where == "bucket":
        config = config.replace(cache=url)
    choice, killed, done = random.Random(1), [], threading.Event()
    tasks: list[Any] = []

    def start(number: int) -> None:
        first = choice.randrange(VIEWS - 3)
        words = command(config, f"{first}:{first + 4}")
        ranks = {"RANK": str(number % 2), "WORLD_SIZE": "2"} if number % 3 == 0 else {}
        for _ in range(2 if number < 5 else 1):
            tasks.append(start_forked(small_blocks.run_usual, words, FRAGILE="slow:300", **ranks))

    def chaos() -> None:
        for number in range(100):
            start(number)
            if done.wait(0.5) and len(killed) >= 20:
                return
            alive = [task.pid for task in tasks if task.is_alive()] + actors()
            for _ in range(2):
                if len(killed) < 20:
                    killed.append(choice.choice(alive))
                    with suppress(ProcessLookupError):
                        os.kill(killed[-1], signal.SIGKILL)

    thread = threading.Thread(target=chaos)
    thread.start()
    try:
        ours.precompute(config, workers=2, num_gpus=0)
    finally:
        done.set()
        thread.join()
    for task in tasks:
        task.join(120)
    assert len(killed) == 20
    # Machines that die as often as units end may bring a sound unit into quarantine.
    shutil.rmtree(cache / TRIES_FOLDER, ignore_errors=True)
    if where == "bucket":
        for name in Objects(url).list(f"{TRIES_FOLDER}/"):
            Objects(url).delete(name)
    assert Units(config).compute(range(VIEWS))["quarantined"] == []
    if where == "bucket":
        assert main(["cache", "copy", url, str(cache)]) == 0
    assert contents(cache) == contents(root / "whole")


def with_broken_image(root: Path, folder: Path, on_error: str) -> tuple[RunConfig, Path]:
    """The settings of a data set of which one image cannot be read."""
    shutil.copytree(root / "data", folder / "data")
    image = sorted((folder / "data" / "train").rglob("*.png"))[40]
    image.write_bytes(b"?" * image.stat().st_size)
    data = {"root": str(folder / "data"), "on_error": on_error, "workers": 0}
    return settings(root, folder / "cache", data=data), image


@pytest.mark.slow
@pytest.mark.dist
def test_a_unit_with_a_broken_image_is_reported_and_the_others_are_made(cluster, root, tmp_path):
    config, image = with_broken_image(root, tmp_path, "fail")
    # Mixed views of other images need this one too, so that every unit of this small set fails.
    found = ours.precompute(config, blocks=range(2, 4), workers=2, num_gpus=0)
    assert [row["unit"] for row in found["quarantined"]] == [2, 3]
    assert all(image.name in row["why"] for row in found["quarantined"])
    assert (tmp_path / "cache" / TRIES_FOLDER).is_dir()
    assert Units(config).total == VIEWS


@pytest.mark.slow
@pytest.mark.dist
def test_a_substituted_image_is_counted_once_and_named(cluster, root, tmp_path, caplog):
    config, image = with_broken_image(root, tmp_path, "substitute")
    found = ours.precompute(config, blocks=range(2, 4), workers=2, num_gpus=0)
    assert (found["quarantined"], found["substituted"]) == ([], [str(image)])
    assert f"1 unreadable images were substituted, the first is {image}: the cache" in caplog.text


@pytest.mark.slow
@pytest.mark.dist
@sweep
def test_failures_of_the_machine_end_in_one_line(cluster, root, tmp_path):
    (tmp_path / "cache").write_text("no folder")
    with pytest.raises((InputError, OSError)) as caught:
        ours.precompute(settings(root, tmp_path / "cache"), blocks=range(1), workers=1, num_gpus=0)
    assert "cache" in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.slow
@pytest.mark.dist
def test_no_secret_is_in_the_logs_of_the_cluster(cluster):
    import ray

    folder = Path(ray._private.worker._global_node.get_session_dir_path())
    texts = [path.read_bytes() for path in folder.rglob("*.log") if path.is_file()]
    assert texts and not any(SECRET.encode() in text for text in texts)


@pytest.mark.slow
@pytest.mark.dist
def test_the_example_runs_on_the_cluster_of_ray_address(cluster, tmp_path):
    script = Path("examples/precompute_ray.py")
    variables = {"RAY_ADDRESS": cluster.address, "FRAGILE": "none:0"}
    words = [str(tmp_path), "--gpus", "0", "--price", "1000"]
    done = run_script(script, *words, **variables)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "Connecting to existing Ray cluster" in done.stderr
    assert "6 units computed, 0 were there\n864 images" in done.stdout
    hours, cost = re.findall(r"\d+\.\d+", done.stdout.splitlines()[-1])
    assert float(cost) == pytest.approx(1000 * float(hours), abs=0.06) and float(hours) > 0


def test_wrong_arguments_are_one_line(root, tmp_path, capsys):
    with pytest.raises(InputError, match=r"cache: the path cache is relative"):
        ours.precompute(settings(root, Path("cache")), workers=1)
    with pytest.raises(InputError, match=r"workers must be at least 1, not 0"):
        ours.precompute(settings(root, tmp_path), workers=0)
    for words, text in ((["--workers"], "needs a number"), (["--workers", "x"], "not 'x'")):
        with pytest.raises(InputError, match=text):
            ours.command(words)


def test_without_ray_the_error_names_the_extra(root, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(InputError, match=r"pip install 'deit-fast\[ray\]'"):
        ours.precompute(settings(root, tmp_path), workers=1)


def row_of(unit: int, error: str = "", worker: str = "one", images: int = 10) -> dict[str, Any]:
    images = 0 if error else images
    row = {"unit": unit, "images": images, "bytes": images, "quarantined": [], "error": error}
    return row | {"substituted": [], "is_input": False, "worker": worker, "lifetime": 36.0}


class Passes:
    """Plays Ray: the rows of each pass, and which units were asked for."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *passes: list[dict]) -> None:
        self.asked: list[list[int]] = []
        self._passes = list(passes)

        @contextmanager
        def no_cluster(*_: object) -> Iterator[None]:
            yield

        def remote(**_: object) -> object:
            return lambda function: SimpleNamespace(remote=lambda config: 4)

        fake = SimpleNamespace(
            remote=remote, get=lambda value: value, exceptions=SimpleNamespace(RayError=KeyError)
        )
        monkeypatch.setattr(ours, "_ray", lambda: fake)
        monkeypatch.setattr(ours, "_cluster", no_cluster)
        monkeypatch.setattr(ours, "_pass", self._pass)

    def _pass(self, ray: object, config: object, units: list[int], *_: object) -> list[dict]:
        self.asked.append(units)
        return self._passes.pop(0)


def test_units_that_a_machine_or_ray_left_are_sent_again(tmp_path, monkeypatch):
    first = [row_of(0), row_of(1, "OSError: disk full", "two"), row_of(3)]  # none of unit 2
    played = Passes(monkeypatch, first, [row_of(1)], [row_of(2, images=0)])
    found = ours.precompute(
        RunConfig(cache=str(tmp_path)), workers=2, num_gpus=0.5, price_per_hour=3
    )
    assert played.asked == [[0, 1, 2, 3], [1, 2], [2]]
    assert (found["computed"], found["kept"], found["images"]) == (3, 1, 30)
    # Both workers cost 36 s, also the one that only failed.
    assert (found["worker_hours"], found["gpu_hours"], found["cost"]) == (0.02, 0.01, 0.06)


def test_substituted_images_of_all_workers_are_in_the_summary_and_the_log(
    tmp_path, monkeypatch, caplog, capsys
):
    rows = [row_of(unit) for unit in range(4)]
    rows[1]["substituted"], rows[3]["substituted"] = ["b.png", "c.png"], ["a.png", "b.png"]
    Passes(monkeypatch, rows)
    words = ["--cache", str(tmp_path), "--gpus-per-worker", "0"]
    assert re.search(r"^substituted +3$", ours.command(words), re.M)
    assert "3 unreadable images were substituted, the first is a.png: the cache" in caplog.text


@pytest.mark.parametrize(
    ("last", "text"),
    [
        ([], r"1 units are left, such as 2: Ray gave no row of it after 3 passes over 4"),
        ([row_of(2, "OSError: disk full")], r"such as 2: OSError: disk full after 3 passes"),
    ],
    ids=["lost", "failed"],
)
def test_units_that_stay_left_end_in_one_line(tmp_path, monkeypatch, last, text):
    first = [row_of(unit) for unit in (0, 1, 3)]
    Passes(monkeypatch, first, last, last)
    with pytest.raises(ChildProcessError, match=text):
        ours.precompute(RunConfig(cache=str(tmp_path)), workers=2)


def test_machines_that_only_fail_end_the_work_before_all_units_are_tried(tmp_path, monkeypatch):
    broken = [row_of(unit % 4, "OSError: disk full", "abc"[unit % 3]) for unit in range(90)]
    Passes(monkeypatch, [row_of(0), *broken])  # four workers in all
    with pytest.raises(ChildProcessError, match=r"the last 32 units failed, .*: disk full"):
        ours.precompute(RunConfig(cache=str(tmp_path)), workers=9)


def test_failures_between_units_that_succeed_do_not_end_the_work(tmp_path, monkeypatch):
    failed = [row_of(3, "OSError: slow disk")] * 7
    Passes(monkeypatch, [*failed, row_of(0), *failed, row_of(1), *failed, row_of(2), row_of(3)])
    assert ours.precompute(RunConfig(cache=str(tmp_path)), workers=1)["computed"] == 4


def test_wrong_settings_that_a_worker_finds_end_the_work_at_once(tmp_path, monkeypatch):
    played = Passes(monkeypatch, [row_of(0), row_of(1, "the cache differs") | {"is_input": True}])
    with pytest.raises(InputError, match=r"^the cache differs$"):
        ours.precompute(RunConfig(cache=str(tmp_path)), workers=1)
    assert len(played.asked) == 1


def test_a_handler_of_sigterm_that_ray_leaves_is_taken_away(tmp_path, monkeypatch):
    @contextmanager
    def handling(*_: object) -> Iterator[None]:
        signal.signal(signal.SIGTERM, lambda *_: None)
        yield

    before = signal.getsignal(signal.SIGTERM)
    for rows in ([row_of(unit) for unit in range(4)], [row_of(0) | {"is_input": True}]):
        Passes(monkeypatch, rows)
        monkeypatch.setattr(ours, "_cluster", handling)
        try:
            with suppress(InputError):
                ours.precompute(RunConfig(cache=str(tmp_path)), workers=1)
            assert signal.getsignal(signal.SIGTERM) is before
        finally:
            signal.signal(signal.SIGTERM, before)


def test_a_worker_pauses_longer_after_each_failure(monkeypatch):
    paused: list[float] = []
    monkeypatch.setattr(ours.time, "sleep", paused.append)
    outcomes = [
        OSError("disk"),
        MemoryError("large"),
        None,
        *[OSError("disk")] * 6,
        InputError("wrong"),
    ]

    def compute(numbers: list[int]) -> dict[str, Any]:
        if (error := outcomes.pop(0)) is not None:
            raise error
        return {"images": 1, "bytes": 1, "quarantined": [], "substituted": ["bad.png"]}

    monkeypatch.setattr("deit_fast.units.Units", lambda config: SimpleNamespace(compute=compute))
    worker = ours._Worker(RunConfig())
    rows = [worker({"unit": unit}) for unit in range(10)]
    assert [row["error"] for row in rows[:3]] == ["OSError: disk", "MemoryError: large", ""]
    assert [row["is_input"] for row in rows] == [False] * 9 + [True]
    assert [row["substituted"] for row in rows[:3]] == [[], [], ["bad.png"]]
    assert paused == [2, 4, 2, 4, 8, 16, 30, 30]


def test_a_worker_without_room_is_refused_where_no_node_can_join(caplog):
    there = SimpleNamespace(cluster_resources=lambda: {"CPU": 4.0})
    with pytest.raises(InputError, match=r"needs 1 GPUs and 2 CPU cores, and Ray finds 0 and 4 on"):
        ours._require_room(there, 1, 2, joins=False)
    ours._require_room(there, 0, 4, joins=False)
    assert not caplog.records
    ours._require_room(there, 0, 4.5, joins=True)
    assert "finds 0 and 4 in the cluster: the work waits until a node joins" in caplog.text


@pytest.mark.slow
@pytest.mark.dist
def test_the_command_on_a_cluster_of_its_own_stops_at_a_signal_and_resumes(root, tmp_path):
    pytest.importorskip("ray")
    config = settings(root, tmp_path / "cache", output=str(tmp_path / "run"))
    words = [*command(config, "0:99")[1:], "--workers", "2"]
    words += ["--gpus-per-worker", "0", "--price-per-hour", "2"]
    python = [sys.executable, "-m", "deit_fast.integrations.ray", *words]
    home = tmp_path / "home"
    home.mkdir()
    path = os.pathsep.join([str(Path("tests").resolve()), str(Path.cwd())])
    env = os.environ | {"PYTHONPATH": path, "HOME": str(home)} | dict([NICENESS])
    slow = env | {"FRAGILE": "slow:300"}
    with subprocess.Popen(python, env=slow, stderr=subprocess.PIPE, text=True) as process:
        while process.poll() is None and not list((tmp_path / "cache").glob("*.dlc")):
            time.sleep(0.05)
        process.send_signal(signal.SIGTERM)
        said = process.communicate(timeout=100)[1]
    assert process.returncode == 75, said
    assert "SIGTERM: published units stay" in said

    done = subprocess.run(python, env=env, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr[-3000:]
    assert contents(tmp_path / "cache") == contents(root / "whole")
    assert re.search(r"^cost +0\.\d+$", done.stdout, re.M), done.stdout
    assert not list(home.rglob("*token*"))
