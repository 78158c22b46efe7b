"""Shards by URL: the samples, runs and caches of the same shards on the local disk."""

from __future__ import annotations

import logging
import os
import shutil
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from deit_fast.cli import main
from deit_fast.config import DataConfig, RunConfig
from deit_fast.data import open_source
from deit_fast.data import remote_tar as remote_tar_module
from deit_fast.data.sample_copy import SampleCopy
from deit_fast.data.sources import Source, UnreadableImage
from deit_fast.data.tar_shards import TarShards
from deit_fast.errors import InputError
from deit_fast.precomputation import precompute
from deit_fast.storage import etags
from deit_fast.storage.failures import ObjectChanged, ObjectMissing
from deit_fast.storage.objects import Objects, Patience
from deit_fast.storage.s3 import S3Client
from deit_fast.tools.pack import pack
from deit_fast.training.loop import train
from helpers.fault_proxy import Proxy, fault_proxy
from helpers.hub_server import COMMIT, Hub, hub_server, use_hub
from helpers.runs import comparable_rows, run_config, weights_equal
from helpers.servers import (
    HAS_NGINX,
    KEY,
    SECRET,
    Server,
    be_quick,
    client,
    nginx,
    upload,
    use,
)  # fmt: skip
from helpers.tars import tar_of, write_tars

FORMS = ("tar", "packed")


@pytest.fixture(autouse=True)
def own_cache_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "deit-fast"


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """More tries than faults, without their pauses."""
    be_quick(monkeypatch, tries=12)


@pytest.fixture(scope="module")
def shards(world: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The digits as tar shards and as packed ones. Tests only read them."""
    root = tmp_path_factory.mktemp("shards")
    write_tars(world / "data", root / "tar", per_shard=60)
    pack(DataConfig(root=str(world / "data"), workers=0), str(root / "packed"), shard_samples=60)
    return {form: root / form for form in FORMS}


@pytest.fixture
def bucket(moto_server: Server, monkeypatch: pytest.MonkeyPatch) -> str:
    use(moto_server.port, monkeypatch)
    return moto_server.new_bucket()


@pytest.fixture
def proxy(bucket: str, moto_server: Server, monkeypatch: pytest.MonkeyPatch) -> Iterator[Proxy]:
    with fault_proxy(moto_server.port) as proxy:
        use(proxy.port, monkeypatch)
        yield proxy


def uploaded(server: Server, bucket: str, shards: dict[str, Path], form: str) -> str:
    upload(server.port, shards[form], bucket, f"{form}/")
    return f"s3://{bucket}/{form}"


def opened(root: str, form: str, split: str = "train", **changes: Any) -> Source:
    return open_source(DataConfig(root=root, source=form, **changes), split, 8)


def reads_of_shards(proxy: Proxy) -> list[bytes]:
    first = [head.split(b"\r\n")[0] for head in proxy.heads]
    return [line for line in first if line.startswith(b"GET") and b".tar" in line]


def assert_same(remote: Source, local: Source) -> None:
    assert remote.fingerprint() == local.fingerprint()
    assert remote.classes == local.classes and np.array_equal(remote.labels, local.labels)
    ids = [*range(local.num_samples)][::-1]
    remote.fetch(ids[:50])
    for index in ids:
        assert np.array_equal(np.asarray(remote.load(index)), np.asarray(local.load(index)))


# ---------------------------------------------------------------------------------------------
# The same samples
# ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("copy_gb", [0, 1.0])
def test_samples_are_those_of_the_local_shards(moto_server, bucket, shards, form, copy_gb):
    root = uploaded(moto_server, bucket, shards, form)
    for split in ("train", "val"):
        remote = opened(root, form, split, local_copy_gb=copy_gb)
        local = opened(str(shards[form]), form, split)
        assert_same(remote, local)
        path = remote.paths[0].removeprefix(root)
        assert path == local.paths[0].removeprefix(str(shards[form]))


@pytest.fixture
def hub(shards: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    with hub_server(shards["tar"].parent) as hub:
        use_hub(hub.server_port, monkeypatch)
        yield hub


@pytest.mark.parametrize("form", FORMS)
def test_samples_of_the_hub_are_those_of_the_local_shards(hub, shards, form):
    remote = opened(f"hf://datasets/owner/shards/{form}", form, local_copy_gb=0)
    assert_same(remote, opened(str(shards[form]), form))
    files = [line for line in hub.asked if "/resolve/" in line]
    assert files and all(f"/resolve/{COMMIT}/" in line for line in files)  # a branch may move


@pytest.mark.parametrize("fault", ["cut", "short", "flip"])
def test_faults_of_the_hub_change_no_byte(hub, shards, fault, monkeypatch):
    (name,) = Objects("hf://datasets/owner/shards/packed/val").list("shard-00000.bin")
    with fault_proxy(hub.server_port) as proxy:
        use_hub(proxy.port, monkeypatch)
        objects = Objects("hf://datasets/owner/shards/packed/val")
        content = (shards["packed"] / "val" / name).read_bytes()
        stamp = objects.stat(name)
        proxy.start(fault, times=3)
        read = objects.read(name, 100, 5000, stamp=stamp, check=content[100:5000].__eq__)
        assert read == content[100:5000] and proxy.hits == 3


def test_hub_is_read_only_and_says_what_is_missing(hub):
    with pytest.raises(InputError, match=r"hf://datasets/owner/shards/x cannot be written: .* rea"):
        Objects("hf://datasets/owner/shards").put("x", b"")
    with pytest.raises(ObjectMissing, match=r"hf://datasets/owner/other: does not exist"):
        Objects("hf://datasets/owner/other").list()


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("fault", ["503", "cut", "short", "flip"])
def test_faults_change_no_sample(moto_server, bucket, shards, proxy, form, fault):
    root = uploaded(moto_server, bucket, shards, form)
    proxy.start(fault, share=0.2)
    assert_same(opened(root, form), opened(str(shards[form]), form))
    assert proxy.hits > 0


def test_source_of_another_kind_needs_a_mounted_folder(bucket, capsys):
    for source in ("folder", "hf"):
        words = ["--data.root", f"s3://{bucket}/x", "--data.source", source]
        assert main(["train", "--recipe", "deit_tiny", *words]) == 2
        assert "is a URL, where data.source must be tar or packed, not" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("root", "words"),
    [
        ("s3://no-such-bucket-at-all/x", "at-all/x/train: there is no such bucket"),
        ("s3://KEY:secret@bucket/x", "a user, a query or a # in a URL is not read"),
        ("ftp://host/x", "ftp:// is not read"),
    ],
)  # fmt: skip
def test_wrong_url_is_one_line(bucket, capsys, tmp_path, root, words):
    arguments = ["--data.root", root, "--data.source", "tar", "--output", str(tmp_path / "run")]
    assert main(["train", "--recipe", "deit_tiny", *arguments]) == 2
    text = capsys.readouterr().err
    assert words in text and text.count("\n") == 1 and "secret" not in text


# ---------------------------------------------------------------------------------------------
# The index of tar shards
# ---------------------------------------------------------------------------------------------


def test_index_is_published_beside_the_shards(moto_server, bucket, shards, proxy, own_cache_folder):
    root = uploaded(moto_server, bucket, shards, "tar")
    opened(root, "tar")
    names = [name for name in Objects(f"{root}/train").list() if "index" in name]
    assert len(names) == 1 and names[0].startswith(".deit-fast-index-")
    assert reads_of_shards(proxy)
    proxy.heads.clear()
    shutil.rmtree(own_cache_folder)  # another machine
    assert_same(opened(root, "tar", local_copy_gb=0), opened(str(shards["tar"]), "tar"))
    assert len(reads_of_shards(proxy)) < 250  # of samples; no shard is read


def test_index_of_a_bucket_that_cannot_be_written_is_kept_here(
    moto_server, bucket, shards, proxy, monkeypatch
):
    async def refuse(*_: object) -> None:
        raise PermissionError("AccessDenied")

    root = uploaded(moto_server, bucket, shards, "tar")
    monkeypatch.setattr(S3Client, "_put", refuse)
    opened(root, "tar")
    proxy.heads.clear()
    opened(root, "tar")
    assert not reads_of_shards(proxy)


@pytest.mark.parametrize("damage", ["bit", "cut", "text"])
def test_damaged_index_is_made_again(moto_server, bucket, shards, own_cache_folder, damage):
    root = uploaded(moto_server, bucket, shards, "tar")
    opened(root, "tar")
    objects = Objects(f"{root}/train")
    name = next(name for name in objects.list() if "index" in name)
    content = bytearray(objects.read(name))
    content[len(content) // 3] ^= 4
    objects.put(name, {"bit": bytes(content), "cut": bytes(content[:-99]), "text": b"x"}[damage])
    shutil.rmtree(own_cache_folder)
    assert_same(opened(root, "tar"), opened(str(shards["tar"]), "tar"))
    shutil.rmtree(own_cache_folder)
    assert_same(opened(root, "tar"), opened(str(shards["tar"]), "tar"))  # it was replaced


def test_other_shards_have_another_index(moto_server, bucket, shards, tmp_path):
    root = uploaded(moto_server, bucket, shards, "tar")
    opened(root, "tar")
    names = sorted(path.name for path in (shards["tar"] / "train").glob("*.tar"))
    content = (shards["tar"] / "train" / names[0]).read_bytes()
    Objects(f"{root}/train").put(names[1], content)  # of the same size or not
    source = opened(root, "tar")
    first, second = (np.flatnonzero(source._shard == number)[0] for number in (0, 1))
    assert source.read(int(first)) == source.read(int(second))


@pytest.mark.parametrize("fault", ["flip", "short"])
def test_parts_are_read_twice_where_no_digest_vouches(
    moto_server, bucket, shards, proxy, monkeypatch, fault
):
    """As after an upload in parts of a size that nobody knows."""
    monkeypatch.setattr(etags, "_PART_BYTES", [])
    monkeypatch.setattr(remote_tar_module, "_READ_BYTES", 20_000)
    s3 = client(moto_server.port)
    for path in sorted((shards["tar"] / "train").glob("*.tar")):
        where = {"Bucket": bucket, "Key": f"tar/train/{path.name}"}
        upload_id = s3.create_multipart_upload(**where)["UploadId"]
        part = s3.upload_part(**where, UploadId=upload_id, PartNumber=1, Body=path.read_bytes())
        parts = {"Parts": [{"PartNumber": 1, "ETag": part["ETag"]}]}
        s3.complete_multipart_upload(**where, UploadId=upload_id, MultipartUpload=parts)
    s3.put_object(Bucket=bucket, Key="tar/classes.txt",
                  Body=(shards["tar"] / "classes.txt").read_bytes())  # fmt: skip
    proxy.start(fault, share=0.1)
    source = opened(f"s3://{bucket}/tar", "tar")
    assert proxy.hits > 0
    proxy.stop()
    assert_same(source, opened(str(shards["tar"]), "tar"))


def test_damaged_shard_is_refused_as_on_a_disk(moto_server, bucket):
    upload_of = client(moto_server.port).put_object
    content = tar_of([("a.jpg", b"x"), ("a.cls", b"0")])
    upload_of(Bucket=bucket, Key="tar/train/a.tar", Body=content[:600])
    with pytest.raises(InputError, match=r"s3://\S+/tar/train/a\.tar is not a complete, plain ta"):
        TarShards(f"s3://{bucket}/tar", "train")


# ---------------------------------------------------------------------------------------------
# Other content
# ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", FORMS)
def test_replaced_shard_is_one_line(moto_server, bucket, shards, form):
    root = uploaded(moto_server, bucket, shards, form)
    source = opened(root, form, local_copy_gb=0)
    objects = Objects(f"{root}/train")
    name = next(name for name in objects.list() if name.endswith((".tar", ".bin")))
    objects.put(name, bytes(len(objects.read(name))))
    source.fetch([0, 1])  # leaves the error to the read
    with pytest.raises(ObjectChanged, match=rf"{name}: was changed while it was in use: start the"):
        source.load(0)


def test_bytes_that_are_wrong_at_every_read(moto_server, bucket, shards, monkeypatch):
    monkeypatch.setattr(Objects.__init__, "__defaults__", (Patience(2, 20, 100, 0.001),))
    root = uploaded(moto_server, bucket, shards, "tar")
    source = opened(root, "tar", local_copy_gb=0)
    source._remote._extents.crc32c[3] ^= 1
    with pytest.raises(UnreadableImage, match=r"its checksum is wrong at every try"):
        source.read(3)
    source.fetch([2, 3, 4])
    assert source.read(4)


# ---------------------------------------------------------------------------------------------
# The local copy
# ---------------------------------------------------------------------------------------------


def copied(folder: Path) -> int:
    return sum(path.read_bytes().count(1) for path in folder.glob("objects/*/*/present"))


@pytest.mark.parametrize("form", FORMS)
def test_sample_is_fetched_once(moto_server, bucket, shards, proxy, own_cache_folder, form):
    root = uploaded(moto_server, bucket, shards, form)
    source = opened(root, form)
    source.fetch(range(100))
    assert source.read(100) if form == "tar" else source._content(100)
    assert copied(own_cache_folder) == 101
    again, count = opened(root, form), len(proxy.heads)
    again.fetch(range(101))
    local = opened(str(shards[form]), form)
    for index in range(101):
        assert np.array_equal(np.asarray(again.load(index)), np.asarray(local.load(index)))
    assert len(proxy.heads) == count


def test_damaged_copy_is_fetched_again(moto_server, bucket, shards, own_cache_folder):
    root = uploaded(moto_server, bucket, shards, "tar")
    opened(root, "tar").fetch(range(210))
    for path in own_cache_folder.glob("objects/*/*/content"):
        path.write_bytes(np.random.default_rng(0).bytes(path.stat().st_size))
    assert_same(opened(root, "tar"), opened(str(shards["tar"]), "tar"))
    for path in own_cache_folder.glob("objects/*/*/content"):
        path.write_bytes(b"")
    assert_same(opened(root, "tar"), opened(str(shards["tar"]), "tar"))


def test_copy_is_bounded(tmp_path):
    copy = SampleCopy("s3://a/b", "train", "0" * 16, limit=1 << 20)
    content = np.random.default_rng(0).bytes(16384)
    for sample in range(100):
        copy.add(sample, sample * 16384, content)
    kept = [sample for sample in range(100) if copy.read(sample, sample * 16384, 16384)]
    assert kept == [*range(len(kept))] and 32 <= len(kept) <= 64
    assert copy.read(0, 0, 16384) == content


def test_copies_of_others_make_room_the_oldest_first(own_cache_folder):
    content, limit = bytes(range(256)) * 64, 10 * 16384
    names = ["s3://a", "s3://b", "s3://c"]
    for age, root in enumerate(names):
        copy = SampleCopy(root, "train", "0" * 16, limit)
        for sample in range(3):
            copy.add(sample, sample * 16384, content)
        os.utime(copy.folder / "present", (1000 + age, 1000 + age))
        if root == "s3://b":
            used = copy  # by this process: the oldest of those that are not is deleted
            os.utime(copy.folder / "present", (1, 1))
        else:
            del copy
    old = SampleCopy("s3://new", "train", "1" * 16, limit)  # of shards that were replaced
    old.add(0, 0, content)
    old_folder = old.folder
    del old
    new = SampleCopy("s3://new", "train", "2" * 16, limit)
    for sample in range(3):
        new.add(sample, sample * 16384, content)
    assert old_folder.exists() and used.read(2, 2 * 16384, 16384) == content
    assert new.read(2, 2 * 16384, 16384) == content
    assert SampleCopy("s3://a", "train", "0" * 16, limit).read(0, 0, 16384) is None
    os.utime(old_folder / "present", (2, 2))
    for sample in range(3, 5):
        new.add(sample, sample * 16384, content)
    assert not old_folder.exists()


def test_copy_of_one_split_is_not_deleted_for_the_other(own_cache_folder):
    limit = 4 * 16384
    val = SampleCopy("s3://a", "val", "0" * 16, limit)
    val.add(0, 0, bytes(range(256)) * 64)
    del val
    train_copy = SampleCopy("s3://a", "train", "1" * 16, limit)
    for sample in range(8):
        train_copy.add(sample, sample * 16384, bytes(range(256)) * 64)
    assert SampleCopy("s3://a", "val", "0" * 16, limit).read(0, 0, 16384)


def test_folder_that_cannot_be_written_keeps_nothing(monkeypatch, tmp_path, caplog):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    copy = SampleCopy("s3://a", "val", "0" * 16, 1 << 20)
    copy.add(0, 0, b"content")
    assert copy.read(0, 0, 7) is None
    assert caplog.text.count("samples are not kept on this machine") == 1


def test_threads_share_a_source(moto_server, bucket, shards):
    root = uploaded(moto_server, bucket, shards, "tar")
    source, local = opened(root, "tar"), opened(str(shards["tar"]), "tar")
    failures: list[BaseException] = []

    def read(first: int) -> None:
        try:
            for index in range(first, 210, 4):
                assert source.read(index) == local.read(index)
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=read, args=[number]) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures


# ---------------------------------------------------------------------------------------------
# A web server
# ---------------------------------------------------------------------------------------------

needs_nginx = pytest.mark.skipif(not HAS_NGINX, reason="nginx is not installed")


@needs_nginx
@pytest.mark.parametrize("form", FORMS)
def test_shards_on_a_web_server(shards, tmp_path, form, monkeypatch):
    site = tmp_path / "site"
    shutil.copytree(shards[form], site)
    with nginx(tmp_path, site) as port:
        use(port, monkeypatch)
        root = f"http://127.0.0.1:{port}"
        if form == "tar":
            with pytest.raises(InputError, match=r"train/shards\.txt does not exist: a web server"):
                opened(root, form)
            for split in ("train", "val"):
                names = sorted(path.name for path in (site / split).glob("*.tar"))
                (site / split / "shards.txt").write_text("\n".join(names) + "\n")
        for split in ("train", "val"):
            assert_same(opened(root, form, split), opened(str(shards[form]), form, split))
        (site / "val" / ("manifest.json" if form == "packed" else "shards.txt")).write_text("../x")
        with pytest.raises(InputError, match=r"val/(manifest|shards)\.\S+ is|'\.\./x' is no name"):
            opened(root, form, "val")


@needs_nginx
def test_replaced_file_with_the_old_etag_is_refused(shards, tmp_path, monkeypatch):
    """nginx makes it of the time in seconds and the size."""
    monkeypatch.setattr(Objects.__init__, "__defaults__", (Patience(2, 20, 100, 0.001),))
    site = tmp_path / "site"
    shutil.copytree(shards["packed"], site)
    path = site / "train" / "shard-00000.bin"
    with nginx(tmp_path, site) as port:
        use(port, monkeypatch)
        source = opened(f"http://127.0.0.1:{port}", "packed", local_copy_gb=0)
        status = path.stat()
        path.write_bytes(bytes(status.st_size))
        os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
        with pytest.raises(InputError, match=r"its bytes are not those that were indexed: shard-0"):
            source.load(0)


# ---------------------------------------------------------------------------------------------
# Runs and caches
# ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def local_results(
    world: Path, shards: dict[str, Path], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Path]:
    """A run and a cache of each form, from the local disk."""
    folder = tmp_path_factory.mktemp("local")
    for form in FORMS:
        data = {"root": str(shards[form]), "source": form, "workers": 0}
        train(config_of(world, folder / form, data))
        precompute(precompute_config(world, folder / f"{form}-cache", data))
    return {form: folder / form for form in FORMS}


def config_of(world: Path, output: Path, data: dict[str, Any]) -> RunConfig:
    return run_config(world, output, data=data, max_steps=3)


def precompute_config(world: Path, cache: Path, data: dict[str, Any]) -> RunConfig:
    return run_config(world, cache.parent, data=data).replace(cache=str(cache))


def cache_files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.glob("view-*")}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(("workers", "fault"), [(0, ""), (2, ""), (0, "cut"), (2, "flip")])
def test_run_and_cache_are_those_of_the_local_disk(
    world, moto_server, bucket, shards, proxy, local_results, tmp_path, form, workers, fault
):
    root = uploaded(moto_server, bucket, shards, form)
    data = {"root": root, "source": form, "workers": workers}
    if fault:
        proxy.start(fault, share=0.2)
    train(config_of(world, tmp_path / "run", data))
    precompute(precompute_config(world, tmp_path / "cache", data))
    assert not fault or proxy.hits > 0
    local = local_results[form]
    assert weights_equal(tmp_path / "run", local)
    assert comparable_rows(tmp_path / "run") == comparable_rows(local)
    views = cache_files(local.with_name(f"{form}-cache"))
    assert views and cache_files(tmp_path / "cache") == views


@pytest.mark.dali
def test_dali_reads_jpeg_files_from_a_bucket(world, moto_server, bucket, tmp_path):
    for path in sorted((world / "data").rglob("*.png")):
        target = tmp_path / "data" / path.relative_to(world / "data").with_suffix(".jpg")
        target.parent.mkdir(parents=True, exist_ok=True)
        with Image.open(path) as image:
            image.convert("RGB").resize((40, 32)).save(target, quality=95)
    write_tars(tmp_path / "data", tmp_path / "tars", per_shard=60)
    upload(moto_server.port, tmp_path / "tars", bucket, "jpeg/")
    runs = []
    for root in (str(tmp_path / "tars"), f"s3://{bucket}/jpeg"):
        data = {"root": root, "source": "tar", "loader": "dali-cpu", "workers": 1}
        runs.append(tmp_path / f"run-{len(runs)}")
        train(config_of(world, runs[-1], data))
    assert weights_equal(*runs)
    assert comparable_rows(runs[0]) == comparable_rows(runs[1])


def test_cache_of_the_local_shards_serves_the_remote_ones(
    world, moto_server, bucket, shards, local_results, tmp_path
):
    root = uploaded(moto_server, bucket, shards, "tar")
    cache = str(local_results["tar"].with_name("tar-cache"))
    data = {"root": root, "source": "tar", "workers": 0}
    config = config_of(world, tmp_path / "run", data).replace(cache=cache, teacher=None)
    train(config)


def test_secrets_stay_out_of_run_cache_and_log(
    world, moto_server, bucket, shards, proxy, tmp_path, caplog
):
    root = uploaded(moto_server, bucket, shards, "tar")
    proxy.start("503", share=0.3)
    with caplog.at_level(logging.DEBUG, "deit_fast"):
        train(config_of(world, tmp_path / "run", {"root": root, "source": "tar", "workers": 0}))
    texts = [path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()]
    names = Objects(f"{root}/train").list()
    texts += [Objects(f"{root}/train").read(name) for name in names if "index" in name]
    assert "again" in caplog.text and any(root.encode() in text for text in texts)
    for secret in (KEY, SECRET, "Signature"):
        assert secret not in caplog.text and not any(secret.encode() in text for text in texts)
