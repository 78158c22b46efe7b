"""Google Cloud Storage and Azure: what `Objects` promises, on the servers that Google and Microsoft
make for tests; skipped where these are not installed. S3 and the web: test_storage.py."""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from typing import NamedTuple

import numpy as np
import pytest

from deit_fast.cli import main
from deit_fast.config import CodecConfig
from deit_fast.precomputation import precompute
from deit_fast.runtime.files import crc32c
from deit_fast.storage.failures import ObjectChanged, ObjectExists, ObjectMissing, StorageError
from deit_fast.storage.objects import Objects, Patience
from deit_fast.units import Units
from helpers.digits import write_few_digits
from helpers.fault_proxy import FAULTS, Proxy, fault_proxy
from helpers.feature_runs import config_of
from helpers.servers import (
    AZ_KEY,
    OTHERS,
    be_quick,
    can_serve,
    new_container,
    other_server,
    use_other,
)
from helpers.small_blocks import BLOCK
from helpers.units import contents

QUICK = Patience(tries=5, request_seconds=5, seconds=60, pause=0.01)


class Service(NamedTuple):
    scheme: str
    port: int


@pytest.fixture(
    scope="module",
    params=[
        pytest.param(
            scheme,
            marks=pytest.mark.skipif(
                not can_serve(scheme), reason=f"{' or '.join(needs)} is not installed"
            ),
        )
        for scheme, needs in OTHERS.items()
    ],
)
def service(request: pytest.FixtureRequest) -> Iterator[Service]:
    with other_server(request.param) as port:
        yield Service(request.param, port)


@pytest.fixture
def bucket(service: Service, monkeypatch: pytest.MonkeyPatch) -> Objects:
    use_other(*service, monkeypatch)
    return Objects(f"{service.scheme}://{new_container(*service)}/folder", QUICK)


@pytest.fixture
def proxy(bucket: Objects, service: Service, monkeypatch: pytest.MonkeyPatch) -> Iterator[Proxy]:
    with fault_proxy(service.port) as proxy:
        use_other(service.scheme, proxy.port, monkeypatch)
        yield proxy


def has_crc(expected: int, content: bytes) -> bool:
    return crc32c(content) == expected


def random_bytes(length: int) -> bytes:
    return np.random.default_rng(0).bytes(length)


def test_round_trip(bucket):
    content, name = random_bytes(300_000), "a/b c+ä%.bin"
    stamp = bucket.put(name, content)
    assert stamp == bucket.stat(name) and stamp.size == len(content) and stamp.etag
    assert bucket.read(name) == bucket.read_whole(name) == content
    assert bucket.read(name, 10, 20, stamp=stamp) == content[10:20]
    assert bucket.put("empty", b"").size == 0 and bucket.read("empty") == b""
    assert bucket.list() == {name: stamp, "empty": bucket.stat("empty")}
    assert [*bucket.list("a/b")] == [name] and bucket.list("b") == {}
    bucket.delete("empty")
    bucket.delete("empty")
    with pytest.raises(ObjectMissing, match=r"folder/empty: does not exist"):
        bucket.stat("empty")


def test_list_has_all_pages(bucket, service):
    names = [f"{number:04d}" for number in range(1003)]
    threads = [
        threading.Thread(target=lambda part=names[first::8]: [bucket.put(n, b"") for n in part])
        for first in range(8)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [*bucket.list()] == names


def test_large_file_is_sent_piece_by_piece(bucket, tmp_path, monkeypatch):
    monkeypatch.setattr("deit_fast.storage.objects._PART_BYTES", 5 << 20)
    path = tmp_path / "file"
    path.write_bytes(random_bytes(11 << 20))
    assert bucket.put("file", path).size == 11 << 20
    assert bucket.read("file") == path.read_bytes()


def test_object_is_created_once(bucket):
    assert bucket.create("x", b"one") is True
    assert bucket.create("x", b"one") is False
    with pytest.raises(ObjectExists, match=r"/x: is there with other content"):
        bucket.create("x", b"two")
    bucket.require_creation("x", b"three")
    assert bucket.read("x") == b"one"


def test_race_of_four_writers_has_one_winner(bucket):
    created = []

    def write(number: int) -> None:
        created.extend(
            name for name in map(str, range(20))
            if bucket.create(name, b"%d" % number, same=lambda there: True)
        )  # fmt: skip

    threads = [threading.Thread(target=write, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(created) == sorted(map(str, range(20)))


def test_replaced_object_is_refused(bucket):
    stamp = bucket.put("x", b"first version")
    bucket.put("x", b"other version")
    with pytest.raises(ObjectChanged, match=r"/x: was changed while it was in use: start the"):
        bucket.read("x", 0, 5, stamp=stamp)


@pytest.mark.parametrize("fault", [fault for fault in FAULTS if fault not in ("hang", "etag")])
def test_faults_now_and_then_change_no_byte(bucket, proxy, fault):
    content = random_bytes(400_000)
    stamp = bucket.put("x", content)
    objects = replace(bucket, patience=replace(QUICK, tries=12))
    proxy.start(fault, share=0.2)
    for start in range(0, 400_000, 20_000):
        expected = content[start : start + 20_000]
        check = partial(has_crc, crc32c(expected))
        assert objects.read("x", start, start + 20_000, stamp=stamp, check=check) == expected
    assert proxy.hits > 0


def test_lasting_fault_is_one_line_without_secrets(bucket, proxy, caplog):
    bucket.put("x", b"content")
    proxy.start("503")  # Azure's library asks again by itself, for longer than a try may last
    caplog.set_level(logging.DEBUG)
    with pytest.raises(StorageError, match=r"503|no reply") as caught:
        bucket.read("x", 0, 4)
    text = str(caught.value)
    assert text.startswith(f"{bucket.url}/x: bytes 0 to 3 cannot be read, in 5 tries: ")
    assert "\n" not in text and AZ_KEY not in text + caplog.text


@pytest.mark.parametrize("fault", ["503", "reset", "lost"])
def test_writes_survive_faults(bucket, proxy, fault, service):
    method = {"gs": "POST", "az": "PUT"}[service.scheme]
    proxy.start(fault, times=2, method=method)
    bucket.create("x", b"content", same=lambda there: there == b"content")
    proxy.start(fault, times=2, method=method)
    bucket.put("y", b"other")
    assert proxy.hits == 2
    assert (bucket.read("x"), bucket.read("y")) == (b"content", b"other")


def test_a_cache_is_that_of_one_process(bucket, service, tmp_path, monkeypatch):
    monkeypatch.setattr(CodecConfig, "block_records", BLOCK)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "user"))
    be_quick(monkeypatch)
    write_few_digits(tmp_path / "data", train=7, val=3)
    config = config_of(tmp_path, cache=str(tmp_path / "cache"), data={"workers": 0}, num_views=3)
    config = config.replace(targets=("logits",), codec={"name": "topk", "k": 4})
    precompute(config)
    url = f"{bucket.url}/cache"
    Units(config.replace(cache=url)).compute(range(6))
    assert main(["cache", "verify", url]) == 0
    assert main(["cache", "copy", url, str(tmp_path / "copy")]) == 0
    assert contents(tmp_path / "copy") == contents(tmp_path / "cache")
