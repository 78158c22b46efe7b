"""Units of work on a Ray cluster of this machine, which loses actors and gains a node."""

from __future__ import annotations

import os
import random
import shutil
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
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
from helpers.processes import start_forked
from helpers.servers import SECRET, Server, use
from helpers.units import command, contents

VIEWS = 12  # a unit each

pytestmark = [pytest.mark.slow, pytest.mark.dist]


@pytest.fixture(scope="module")
def cluster(tmp_path_factory, moto_server: Server) -> Iterator[object]:
    pytest.importorskip("ray")
    with pytest.MonkeyPatch.context() as patch:
        use(moto_server.port, patch)
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("home")))
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        patch.setenv("RAY_AUTH_MODE", "disabled")
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


@pytest.mark.parametrize(
    "where",
    [
        "folder",
        pytest.param(
            "bucket",
            marks=pytest.mark.skipif("DEIT_FAST_SWEEP" not in os.environ, reason="minutes"),
        ),
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


def test_a_unit_with_a_broken_image_is_reported_and_the_others_are_made(cluster, root, tmp_path):
    shutil.copytree(root / "data", tmp_path / "data")
    image = sorted((tmp_path / "data" / "train").rglob("*.png"))[40]
    image.write_bytes(b"?" * image.stat().st_size)
    data = {"root": str(tmp_path / "data"), "on_error": "fail", "workers": 0}
    config = settings(root, tmp_path / "cache", data=data)
    # Mixed views of other images need this one too, so that every unit of this small set fails.
    found = ours.precompute(config, blocks=range(2, 4), workers=2, num_gpus=0)
    assert [row["unit"] for row in found["quarantined"]] == [2, 3]
    assert all(image.name in row["why"] for row in found["quarantined"])
    assert (tmp_path / "cache" / TRIES_FOLDER).is_dir()
    assert Units(config).total == VIEWS


def test_failures_of_the_machine_end_in_one_line(cluster, root, tmp_path):
    (tmp_path / "cache").write_text("no folder")
    with pytest.raises((InputError, OSError)) as caught:
        ours.precompute(settings(root, tmp_path / "cache"), workers=1, num_gpus=0)
    assert "cache" in str(caught.value) and "\n" not in str(caught.value)


def test_no_secret_is_in_the_logs_of_the_cluster(cluster):
    import ray

    folder = Path(ray._private.worker._global_node.get_session_dir_path())
    texts = [path.read_bytes() for path in folder.rglob("*.log") if path.is_file()]
    assert texts and not any(SECRET.encode() in text for text in texts)


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
