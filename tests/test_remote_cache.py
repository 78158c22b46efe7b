"""A cache in object storage: the same bytes from everywhere, and the same losses as from a disk."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import numpy as np
import pytest

import deit_fast
from deit_fast.cache import LogitCache
from deit_fast.cache.copying import copy
from deit_fast.cache.remote import Listing, block_name
from deit_fast.cli import main
from deit_fast.config import CodecConfig, RunConfig
from deit_fast.errors import CacheError, CacheMismatch, InputError
from deit_fast.precomputation import estimate, precompute
from deit_fast.storage import services
from deit_fast.storage.failures import StorageError
from deit_fast.storage.objects import Objects
from deit_fast.units import TRIES_FOLDER, Units
from helpers import small_blocks
from helpers.digits import write_few_digits
from helpers.fault_proxy import fault_proxy
from helpers.feature_runs import config_of, numbers
from helpers.processes import start_forked
from helpers.servers import KEY, SECRET, Server, be_quick, use
from helpers.small_blocks import BLOCK
from helpers.units import command, contents

LOGITS = {"targets": ("logits",), "codec": {"name": "topk", "k": 4}}
TOTAL = 6  # units of the logits alone: 70 images in blocks of 36, 3 views


@pytest.fixture(autouse=True)
def blocks_are_small(monkeypatch, tmp_path):
    monkeypatch.setattr(CodecConfig, "block_records", BLOCK)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "user"))
    be_quick(monkeypatch)


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("remote")
    write_few_digits(root / "data", train=7, val=3)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(CodecConfig, "block_records", BLOCK)
        precompute(settings(root, str(root / "cache")))
        precompute(settings(root, str(root / "logits"), **LOGITS))
    return root


def settings(root: Path, cache: str, **changes) -> RunConfig:
    return config_of(root, cache=cache, data={"workers": 0}, num_views=3).replace(**changes)


@pytest.fixture
def url(each_server: Server, monkeypatch) -> str:
    use(each_server.port, monkeypatch)
    return f"s3://{each_server.new_bucket()}/teachers/cache"


@pytest.fixture
def logits_at(root, url) -> str:
    Units(settings(root, url, **LOGITS)).compute(range(TOTAL))
    return url


def test_units_publish_the_caches_of_one_process(root, url, tmp_path):
    worker = Units(settings(root, url))
    assert worker.total == 3
    for number in (2, 0, 2, 1):
        found = worker.compute([number])
    assert found["cache"] == url
    assert main(["cache", "copy", url, str(tmp_path / "copy")]) == 0
    assert contents(tmp_path / "copy") == contents(root / "cache")
    again = deit_fast.precompute(settings(root, url)).details  # another process, all views
    assert (again["images"], again["kept"]) == (0, again["kept"])
    assert again["kept"] == found["kept"] * 3 or again["blocks"] == 0


def test_views_that_the_run_does_not_need_are_computed_too(root, url):
    """As in a folder."""
    found = deit_fast.precompute(settings(root, url, **LOGITS), views=range(4, 5)).details
    assert (found["blocks"], found["images"]) == (2, 70)
    assert sorted(Listing.of(Objects(url)).blocks) == [4]


def test_a_unit_asks_for_its_own_blocks_alone(root, logits_at, each_server, monkeypatch):
    """So that its cost does not grow with the view."""
    with fault_proxy(each_server.port) as proxy:
        use(proxy.port, monkeypatch)
        worker = Units(settings(root, logits_at, **LOGITS))
        proxy.heads.clear()
        assert worker.compute([3])["kept"] == 1
        asked = [head.split(b" HTTP")[0].decode() for head in proxy.heads]
    lists = [line for line in asked if "list-type" in line]
    assert all(f"{TRIES_FOLDER}%2F" in line for line in lists) and len(lists) <= 2
    assert len([line for line in asked if "view-" in line]) == 2  # the block, a whole view file
    assert len(asked) <= 4


def test_a_copy_to_a_url_with_another_cache_changes_neither(root, url, tmp_path):
    Units(settings(root, url, **LOGITS, teacher_batch=7)).compute([0])
    shutil.copytree(root / "logits", tmp_path / "cache")
    there = {name: Objects(url).read(name) for name in Objects(url).list()}
    with pytest.raises(CacheMismatch, match=r"teacher.batch is 7"):
        copy(str(tmp_path / "cache"), url, lambda count: None)
    assert contents(tmp_path / "cache") == contents(root / "logits")
    assert {name: Objects(url).read(name) for name in Objects(url).list()} == there


def test_service_that_replaces_what_is_to_be_created_is_refused(root, moto_server, monkeypatch):
    use(moto_server.port, monkeypatch)
    url = f"s3://{moto_server.new_bucket()}/cache"
    with fault_proxy(moto_server.port) as proxy:
        use(proxy.port, monkeypatch)
        proxy.start("always", method="PUT")
        with pytest.raises(StorageError, match=r"manifest.json: was replaced by .* If-None-Match"):
            Units(settings(root, url, **LOGITS)).compute([0])
        assert [*Objects(url).list()] == ["manifest.json"]


def test_a_folder_copied_to_a_url_and_back_is_the_same(root, url, tmp_path, capsys):
    assert main(["cache", "copy", str(root / "cache"), url]) == 0
    assert main(["cache", "copy", str(root / "cache"), url]) == 0  # nothing to do
    assert main(["cache", "copy", url, str(tmp_path / "copy")]) == 0
    assert contents(tmp_path / "copy") == contents(root / "cache")
    assert main(["cache", "info", url]) == 0
    assert "3 of 3 complete" in capsys.readouterr().out
    assert main(["cache", "verify", url]) == 0
    assert main(["cache", "copy", url, f"{url}/copy"]) == 2
    assert "are both URLs" in capsys.readouterr().err


def test_a_view_file_that_is_not_complete_is_completed_by_blocks(root, url, tmp_path, capsys):
    """Files of a cache in a folder, whose pass had not ended, as a service's tools copy them."""
    Units(settings(root, str(tmp_path / "part"), **LOGITS)).compute([0, 3])
    for name, content in contents(tmp_path / "part").items():
        Objects(url).put(name, content)
    assert main(["cache", "info", url]) == 0
    assert "0 of 2 complete blocks 2 of 4 published" in " ".join(capsys.readouterr().out.split())
    with pytest.raises(CacheError, match=r"view 1 block 0 is not published yet"):
        LogitCache.open(url).gather_records(np.arange(3), 1)
    found = Units(settings(root, url, **LOGITS)).compute(range(TOTAL))
    assert (found["blocks"], found["kept"]) == (4, 2)
    assert main(["cache", "verify", url]) == 0
    copy(url, str(tmp_path / "copy"), lambda count: None)
    assert contents(tmp_path / "copy") == contents(root / "logits")
    cache, local = LogitCache.open(url), LogitCache.open(root / "logits")
    for view in range(3):
        ids = np.arange(70)
        assert cache.gather_records(ids, view).equal(local.gather_records(ids, view))


def test_a_missing_bucket_and_a_service_that_is_read_only_end_before_the_teacher_is_loaded(
    root, each_server, monkeypatch, tmp_path
):
    use(each_server.port, monkeypatch)
    monkeypatch.setattr("deit_fast.units.Job", None)
    for url, words in [
        ("s3://no-such-bucket-here/x", r"^s3://no-such-bucket-here/x\S*: there is no such bucket"),
        ("http://127.0.0.1:9/x", r"^http://127.0.0.1:9/x cannot be written: http:// is read only"),
        ("hf://datasets/owner/name", r"^hf://datasets/owner/name cannot be written: hf:// is read"),
    ]:
        with pytest.raises((InputError, StorageError), match=words):
            Units(settings(root, url, **LOGITS))
    with pytest.raises(InputError, match=r"is read only"):
        copy(str(root / "logits"), "http://127.0.0.1:9/x", lambda count: None)


def test_a_cache_at_a_web_server_is_one_line_with_the_remedy(root, tmp_path, capsys):
    url = "http://127.0.0.1:9/cache"
    text = rf"^cache {url} cannot be listed: a web server .*; copy it to a folder or a bucket$"
    for action in (
        lambda: LogitCache.open(url),
        lambda: copy(url, str(tmp_path / "copy"), lambda count: None),
        lambda: deit_fast.train(
            settings(root, url, **LOGITS, teacher=None, output=str(tmp_path / "run"))
        ),
    ):
        with pytest.raises(InputError, match=text):
            action()
    for verb in ("info", "verify"):
        assert main(["cache", verb, url]) == 2
        assert "copy it to a folder or a bucket" in capsys.readouterr().err


def test_an_edited_manifest_is_named_as_in_a_folder(logits_at):
    objects = Objects(logits_at)
    content = objects.read("manifest.json")
    objects.put("manifest.json", content.replace(b'"block_records": 36', b'"block_records": 35'))
    with pytest.raises(CacheError, match=r"manifest.json is damaged or was edited: its checksum d"):
        LogitCache.open(logits_at)


def test_a_cache_folder_that_cannot_be_written_names_its_variable(root, logits_at, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", "/dev/null/x")
    for action in (
        lambda: Units(settings(root, logits_at, **LOGITS)), lambda: LogitCache.open(logits_at),
    ):  # fmt: skip
        with pytest.raises(InputError, match=r"^XDG_CACHE_HOME /dev/null/x/.* cannot be written"):
            action()


@pytest.mark.parametrize("form", ["blocks", "files"])
def test_a_run_from_a_url_has_the_losses_of_a_local_one(root, url, tmp_path, form):
    if form == "blocks":
        Units(settings(root, url)).compute(range(3))
    else:  # as the tools of a service copy a folder
        for name, content in contents(root / "cache").items():
            Objects(url).put(name, content)

    def run(cache: str, name: str, **changes) -> list[dict]:
        config = settings(root, cache, teacher=None, output=str(tmp_path / name),
                          more_caches=(f"{cache}/patches",), **changes)  # fmt: skip
        deit_fast.train(config)
        return numbers(tmp_path / name)

    local = run(str(root / "cache"), "local")
    assert run(url, "remote") == local
    assert len(run(url, "again", max_steps=2)) < len(local)
    shutil.rmtree(tmp_path / "user")  # another machine resumes
    assert run(url, "again") == local


@pytest.mark.parametrize("fault", ["503", "cut", "reset", "short", "flip"])
def test_faults_of_the_network_change_no_byte(root, url, moto_server, each_server, monkeypatch,
                                              fault):  # fmt: skip
    with fault_proxy(each_server.port) as proxy:
        use(proxy.port, monkeypatch)
        proxy.start(fault, share=0.2, method="PUT" if fault in ("503", "reset") else "GET")
        Units(settings(root, url, **LOGITS)).compute(range(TOTAL))
        proxy.start(fault, share=0.25)
        remote, local = LogitCache.open(url), LogitCache.open(root / "logits")
        samples = np.arange(70)
        for view in range(3):
            records = remote.gather_records(samples, view)
            assert records.equal(local.gather_records(samples, view))
        assert proxy.hits


def test_a_dry_run_counts_what_is_published(root, url, monkeypatch):
    config = settings(root, url, **LOGITS)
    assert (estimate(config)["blocks"], estimate(config)["kept"]) == (TOTAL, 0)
    assert not Objects(url).list()
    Units(config).compute([0, 3])
    found = estimate(config)
    assert (found["blocks"], found["kept"], found["units"]) == (TOTAL - 2, 2, TOTAL)
    with pytest.raises(CacheMismatch, match=rf"^cache {url} "):
        estimate(config.replace(teacher_batch=7))


def test_a_damaged_object_is_one_line_and_never_read(root, logits_at, capsys, tmp_path):
    objects = Objects(logits_at)
    good = objects.read(block_name(1, 0))
    objects.put(block_name(1, 0), good[:40] + b"\0" + good[41:])
    cache = LogitCache.open(logits_at)
    remedy = (
        r"view-00001/0000000\.block is damaged: delete it; then `precompute` makes a block anew"
    )
    with pytest.raises(CacheError, match=remedy):
        cache.gather_records(np.arange(3), 1)
    cache.gather_records(np.arange(3), 2)  # the others are
    objects.put(block_name(2, 1), b"cut off")
    with pytest.raises(CacheError, match=remedy.replace("1/0000000", "2/0000001")):
        LogitCache.open(logits_at).gather_records(np.arange(60), 2)
    assert main(["cache", "verify", logits_at]) == 1
    text = capsys.readouterr().out
    assert "4 complete, 0 pending, 2 broken" in text
    assert len(re.findall(remedy, text)) == 1 and text.count("is damaged: delete it") == 2
    with pytest.raises(CacheError, match=remedy):
        copy(logits_at, str(tmp_path / "copy"), lambda count: None)
    config = settings(root, logits_at, **LOGITS)
    with pytest.raises(CacheError, match=remedy.replace("1/0000000", "2/0000001")):
        Units(config).compute(range(TOTAL))
    objects.delete(block_name(1, 0))
    with pytest.raises(CacheError, match=remedy.replace("1/0000000", "2/0000001")):
        copy(logits_at, str(tmp_path / "other"), lambda count: None)
    objects.delete(block_name(2, 1))
    Units(settings(root, logits_at, **LOGITS)).compute(range(TOTAL))
    assert objects.read(block_name(1, 0)) == good


STATISTICS, PIXELS = "cls/statistics.safetensors", "view-00001.pixels.json"


def flipped(content: bytes) -> bytes:
    """With one bit changed."""
    at = len(content) // 2
    return content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :]


@pytest.fixture
def features_at(root, url) -> str:
    copy(str(root / "cache"), url, lambda count: None)
    return url


def test_verify_of_a_url_checks_statistics_and_pixel_digests_as_in_a_folder(
    root, features_at, capsys, tmp_path
):
    local, objects = tmp_path / "local", Objects(features_at)
    shutil.copytree(root / "cache", local)
    for name in (STATISTICS, PIXELS):
        content = flipped(objects.read(name))
        (local / name).write_bytes(content)
        objects.put(name, content)
    for path in (local, local / "cls"):
        assert main(["cache", "verify", str(path)]) == 1
    capsys.readouterr()
    assert main(["cache", "verify", features_at]) == 1
    text = capsys.readouterr().out
    for name in (STATISTICS, PIXELS):
        row = rf"broken +{Path(name).name}: \S* ?{features_at}/{name} is damaged.*; .*`cache copy`"
        assert len(re.findall(row, text)) == 1, text
    assert text.count(" 1 broken") == 2
    objects.put(PIXELS, (root / "cache" / PIXELS).read_bytes()[:90])  # cut off
    objects.delete(STATISTICS)
    assert main(["cache", "verify", features_at]) == 1
    text = capsys.readouterr().out
    assert f"{features_at}/{STATISTICS} is missing" in text and text.count(" 1 broken") == 2
    copy(f"{features_at}/patches", str(tmp_path / "patches"), lambda count: None)
    objects.delete(PIXELS)
    copy(str(root / "cache"), features_at, lambda count: None)  # the remedy
    assert main(["cache", "verify", features_at]) == 0


def test_damaged_statistics_at_a_url_are_not_copied_and_repaired_ones_are(
    root, features_at, tmp_path
):
    objects = Objects(features_at)
    good = objects.read(STATISTICS)
    objects.put(STATISTICS, flipped(good))
    text = rf"{features_at}/{STATISTICS} is damaged: .*; delete it; then `cache copy` puts it there"
    for action in (
        lambda: LogitCache.open(f"{features_at}/cls"),
        lambda: copy(features_at, str(tmp_path / "copy"), lambda count: None),
        lambda: Units(settings(root, features_at)),
    ):
        with pytest.raises(CacheError, match=text):
            action()
    assert not [*tmp_path.rglob(Path(STATISTICS).name)]
    objects.put(STATISTICS, good)
    stored = LogitCache.open(f"{features_at}/cls").path
    assert (stored / Path(STATISTICS).name).read_bytes() == good
    assert Units(settings(root, features_at)).compute(range(3))["blocks"] == 0


def test_damaged_pixel_digests_at_a_url_are_one_line(features_at, tmp_path):
    objects = Objects(features_at)
    objects.put(PIXELS, flipped(objects.read(PIXELS)))
    with pytest.raises(CacheError, match=rf"{features_at}/{PIXELS} is damaged: delete it; then `c"):
        LogitCache.open(features_at)
    assert not [*tmp_path.rglob(PIXELS)]


def test_damaged_copies_of_statistics_and_pixel_digests_are_fetched_again(
    root, features_at, caplog
):
    for url, name in ((features_at, PIXELS), (f"{features_at}/cls", Path(STATISTICS).name)):
        path = LogitCache.open(url).path / name
        good = path.read_bytes()
        for content in (flipped(good), good[:50], b""):
            path.write_bytes(content)
            LogitCache.open(url)
            assert path.read_bytes() == good
    assert "statistics.safetensors is damaged; it is fetched again" in caplog.text


def test_a_block_of_another_place_is_refused(logits_at):
    objects = Objects(logits_at)
    objects.put(block_name(0, 0), objects.read(block_name(2, 0)))
    with pytest.raises(CacheError, match="is damaged: delete it"):
        LogitCache.open(logits_at).gather_records(np.arange(3), 0)


def test_a_damaged_local_copy_is_fetched_again(root, logits_at, tmp_path, caplog):
    local = LogitCache.open(root / "logits").gather_records(np.arange(70), 0)
    LogitCache.open(logits_at).gather_records(np.arange(70), 0)
    (path,) = (tmp_path / "user").rglob("view-00000.dlc")
    with path.open("r+b") as file:
        file.seek(-30, 2)
        file.write(b"\xff" * 8)
    assert LogitCache.open(logits_at).gather_records(np.arange(70), 0).equal(local)
    assert "1 blocks of view 0 are damaged; they are fetched again" in caplog.text


def test_local_copies_stay_below_their_bound(root, logits_at, tmp_path):
    def taken() -> int:
        files = (tmp_path / "user").rglob("view-*.dlc")
        return sum(file.stat().st_blocks * 512 for file in files)

    local = LogitCache.open(root / "logits")
    LogitCache.open(logits_at).gather_records(np.arange(70), 0)
    bound = taken() * 3 - 1  # two views, and one on the way
    cache = LogitCache.open(logits_at, bound)
    for view in (1, 2, 0, 2, 1, 0, 1):
        expected = local.gather_records(np.arange(70), view)
        assert cache.gather_records(np.arange(70), view).equal(expected)
        assert bound / 5 <= taken() <= bound
    small = settings(root, logits_at, **LOGITS, teacher=None, output=str(tmp_path / "run"),
                     data={"workers": 0, "local_copy_gb": 1e-6})  # fmt: skip
    with pytest.raises(CacheError, match=r"data\.local_copy_gb=1e-06 allows less: raise it"):
        deit_fast.train(small)


def test_another_cache_at_the_url_is_refused_with_its_fields(root, logits_at, capsys, tmp_path):
    other = settings(root, logits_at, **LOGITS, teacher_batch=7)
    with pytest.raises(CacheMismatch, match=rf"^cache {logits_at} .*teacher\.batch is .*, exp"):
        Units(other)
    with pytest.raises(CacheError, match="is no cache: it has no manifest"):
        LogitCache.open(f"{logits_at}/nothing")


@pytest.mark.dist
def test_machines_of_a_fleet_make_one_cache(root, url, tmp_path):
    """Three processes with folders of their own; two share units, one of them is killed."""
    config = settings(root, url, **LOGITS, output=str(tmp_path / "run"))
    first = [
        start_forked(small_blocks.run, command(config, blocks),
                     XDG_CACHE_HOME=str(tmp_path / f"machine-{blocks[0]}"))
        for blocks in ("0:5", "2:6", "1:4")
    ]  # fmt: skip
    first[1].join(1.0)
    first[1].kill()
    for process in first:
        process.join(120)
    assert [first[0].exitcode, first[2].exitcode] == [0, 0]
    Units(config).compute(range(TOTAL))
    assert main(["cache", "copy", url, str(tmp_path / "copy")]) == 0
    assert contents(tmp_path / "copy") == contents(root / "logits")
    assert not Objects(url).list(f"{TRIES_FOLDER}/")


def test_a_unit_that_fails_is_in_quarantine_for_all_machines(root, url, monkeypatch, tmp_path):
    config = settings(root, url, **LOGITS, teacher="helpers.fragile_teacher:fragile")
    monkeypatch.setenv("FRAGILE", "always:0")
    assert len(Units(config).compute([4])["quarantined"]) == 1
    monkeypatch.delenv("FRAGILE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "another"))
    found = Units(config).compute(range(TOTAL))["quarantined"]
    assert [(row["unit"], row["why"]) for row in found] == [
        (4, "ValueError: a teacher that failed")
    ]
    assert len(Listing.of(Objects(url)).blocks[2]) == 1


def test_no_secret_is_written_or_said(root, logits_at, tmp_path, monkeypatch, caplog, capsys):
    output = tmp_path / "run"
    deit_fast.train(settings(root, logits_at, **LOGITS, teacher=None, output=str(output)))
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:1")
    monkeypatch.setattr(services, "_state", services._State())
    assert main(["cache", "info", logits_at]) == 2
    said = caplog.text + "".join(capsys.readouterr())
    for folder in (tmp_path / "user", output):
        for path in folder.rglob("*"):
            if path.is_file():
                said += path.read_bytes().decode("latin1")
    assert KEY not in said and SECRET not in said
