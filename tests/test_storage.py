"""Objects by URL, on real servers, through a proxy that breaks replies: right bytes or one line."""

from __future__ import annotations

import hashlib
import logging
import os
import pickle
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from deit_fast.errors import InputError
from deit_fast.runtime.files import crc32c
from deit_fast.storage import services
from deit_fast.storage.etags import vouches
from deit_fast.storage.failures import (
    ObjectChanged,
    ObjectDamaged,
    ObjectExists,
    ObjectMissing,
    StorageError,
)
from deit_fast.storage.objects import Objects, Part, Patience
from deit_fast.storage.s3 import S3Client
from deit_fast.storage.urls import is_url, join, require_plain, shown, without_secrets
from helpers.fault_proxy import FAULTS, Proxy, fault_proxy
from helpers.processes import forked
from helpers.servers import HAS_NGINX, KEY, SECRET, Server, client, free_port, nginx, use

QUICK = Patience(tries=5, request_seconds=5, seconds=60, pause=0.01)
ONCE = Patience(tries=1, request_seconds=5, seconds=60, pause=0.01)


def random_bytes(length: int, seed: int = 0) -> bytes:
    return np.random.default_rng(seed).bytes(length)


@pytest.fixture
def bucket(each_server: Server, monkeypatch: pytest.MonkeyPatch) -> Objects:
    use(each_server.port, monkeypatch)
    return Objects(f"s3://{each_server.new_bucket()}/folder", QUICK)


@pytest.fixture
def proxy(bucket: Objects, each_server: Server, monkeypatch: pytest.MonkeyPatch) -> Iterator[Proxy]:
    with fault_proxy(each_server.port) as proxy:
        use(proxy.port, monkeypatch)
        yield proxy


# ---------------------------------------------------------------------------------------------
# URLs
# ---------------------------------------------------------------------------------------------


def test_url_is_told_from_path():
    assert is_url("s3://bucket/x") and is_url("HTTPS://host") and is_url("hf://datasets/a/b")
    assert not is_url("/data/images") and not is_url("images") and not is_url("timm:resnet")


@pytest.mark.parametrize("url", ["memory://x", "ftp://host/x", "s4://bucket", "file:///data"])
def test_unknown_scheme_is_refused(url):
    with pytest.raises(InputError, match=r"is not read.*known are s3, gs"):
        is_url(url)


@pytest.mark.parametrize(
    ("text", "url"),
    [("s3:/bucket/x", "s3://bucket/x"), ("gs:bucket/x", "gs://bucket/x"),
     ("HTTPS:/u:p@host/x?y", "HTTPS://host/x")],
)  # fmt: skip
def test_missing_slash_is_named(text, url):
    with pytest.raises(
        InputError, match=rf"needs two slashes, {re.escape(url)}; write \./"
    ) as error:
        is_url(text)
    assert "u:p" not in str(error.value)
    for path in ("./s3:/bucket", "s3/bucket", "runs/s3:x", "C:/data"):
        assert not is_url(path)


@pytest.mark.parametrize("url", ["s3://bucket/../x", "s3://bucket/a//b", "s3://bucket/./x"])
def test_url_has_no_empty_or_dotted_part(url):
    with pytest.raises(InputError, match=r"a part of the URL is empty, \. or \.\.$"):
        Objects(url)


def test_client_that_cannot_be_opened_is_one_line(monkeypatch):
    def fail() -> None:
        raise ValueError("no account\nsee https://u:p@host/doc")

    monkeypatch.setattr(services, "_state", services._State())
    monkeypatch.setitem(services._CLIENTS, "s3", fail)
    with pytest.raises(InputError, match=r"^s3:// cannot be used: ValueError: no acc") as error:
        Objects("s3://bucket/x").stat("y")
    assert "\n" not in str(error.value) and "u:p" not in str(error.value)


def test_messages_show_neither_user_nor_query():
    assert shown("https://u:secret@host:80/a/b?X-Amz-Signature=secret#secret") == (
        "https://host:80/a/b"
    )
    assert shown("abfs://container@account.net/x") == "abfs://container@account.net/x"
    text = "Cannot connect, url='https://u:secret@h/x?sig=secret', again"
    assert without_secrets(text) == "Cannot connect, url='https://h/x', again"


@pytest.mark.parametrize(
    "url", ["s3://KEY:secret@bucket/x", "https://host/x?sig=secret", "s3://", "s3://a/b#secret"]
)
def test_credentials_in_url_are_refused(url):
    with pytest.raises(InputError) as caught:
        require_plain(url)
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize("name", ["", "../x", "a//b", "/x", "a/./b", "a\nb"])
def test_name_stays_below_the_url(name):
    with pytest.raises(InputError, match=r"no name of an object"):
        join("s3://bucket/folder", name)


def test_name_is_quoted_for_a_web_server_alone():
    assert join("https://host/a", "b c?#.tar") == "https://host/a/b%20c%3F%23.tar"
    assert join("s3://bucket/a", "b c?#.tar") == "s3://bucket/a/b c?#.tar"


def test_missing_package_is_named(monkeypatch):
    monkeypatch.setattr(services, "_state", services._State())
    monkeypatch.setitem(sys.modules, "s3fs", None)
    with pytest.raises(InputError, match=r"s3:// needs the package s3fs: pip install 'deit-fast"):
        Objects("s3://bucket").stat("x")


# ---------------------------------------------------------------------------------------------
# Reading and writing
# ---------------------------------------------------------------------------------------------


def test_round_trip(bucket):
    content = random_bytes(300_000)
    stamp = bucket.put("a/b c+ä.bin", content)
    assert stamp == bucket.stat("a/b c+ä.bin") and stamp.size == len(content) and stamp.etag
    assert bucket.read("a/b c+ä.bin") == content
    assert bucket.read("a/b c+ä.bin", 10, 20, stamp=stamp) == content[10:20]
    assert bucket.read("a/b c+ä.bin", 299_990, stamp=stamp) == content[-10:]
    assert bucket.put("empty", b"").size == 0 and bucket.read("empty") == b""
    assert bucket.list() == {"a/b c+ä.bin": stamp, "empty": bucket.stat("empty")}
    assert [*bucket.list("a/b")] == ["a/b c+ä.bin"] and bucket.list("b") == {}
    bucket.delete("empty")
    bucket.delete("empty")
    with pytest.raises(ObjectMissing):
        bucket.stat("empty")


def test_list_has_all_pages(bucket, each_server):
    s3, name = client(each_server.port), bucket.url.split("/")[2]
    for number in range(1003):
        s3.put_object(Bucket=name, Key=f"folder/{number:04d}", Body=b"")
    assert [*bucket.list()] == [f"{number:04d}" for number in range(1003)]


def test_missing_object_and_bucket_end_at_once(bucket, proxy):
    for objects in (bucket, Objects("s3://no-such-bucket-here/x", QUICK)):
        proxy.heads.clear()
        for read in (objects.stat, objects.read, lambda name, o=objects: o.read(name, 0, 4)):
            with pytest.raises(FileNotFoundError, match=r"/nothing: (does not exist|there is no)"):
                read("nothing")
        assert len(proxy.heads) == 3


def test_file_is_sent_in_parts(bucket, tmp_path, monkeypatch):
    monkeypatch.setattr("deit_fast.storage.objects._PART_BYTES", 5 << 20)
    path = tmp_path / "file"
    path.write_bytes(random_bytes(11 << 20))
    stamp = bucket.put("file", path)
    assert stamp.size == 11 << 20 and stamp.etag.endswith("-3")
    assert bucket.read("file") == path.read_bytes()


def test_failed_parts_leave_nothing(bucket, proxy, each_server, tmp_path, monkeypatch):
    monkeypatch.setattr("deit_fast.storage.objects._PART_BYTES", 5 << 20)
    path = tmp_path / "file"
    path.write_bytes(bytes(6 << 20))
    proxy.start("503", method="PUT")
    with pytest.raises(StorageError, match=r"folder/file: cannot be written, in 5 tries: .*503"):
        bucket.put("file", path)
    proxy.stop()
    assert bucket.list() == {}
    name = bucket.url.split("/")[2]
    assert "Uploads" not in client(each_server.port).list_multipart_uploads(Bucket=name)


def test_near_ranges_share_a_request(bucket, proxy):
    content = random_bytes(1_000_000)
    stamp = bucket.put("x", content)
    ranges = [(900_000, 900_010), (5, 5), (0, 100), (50, 60_000), (100_000, 200_000)]
    proxy.heads.clear()
    assert bucket.read_many("x", ranges, stamp=stamp) == [content[a:b] for a, b in ranges]
    asked = [head.lower().split(b"range: ")[1].split(b"\r")[0] for head in proxy.heads]
    assert sorted(asked) == [b"bytes=0-199999", b"bytes=900000-900009"]


def test_merged_request_is_bounded(bucket, proxy, monkeypatch):
    monkeypatch.setattr("deit_fast.storage.objects.MOST_BYTES", 1000)
    content = random_bytes(4000)
    bucket.put("x", content)
    ranges = [(start, start + 400) for start in range(0, 4000, 400)]
    proxy.heads.clear()
    assert b"".join(bucket.read_many("x", ranges)) == content
    assert len(proxy.heads) == 5


def test_one_bad_part_does_not_spoil_the_others(bucket):
    content = random_bytes(3000)
    bucket.put("x", content)
    parts = [Part("x", 0, 1000), Part("x", 1000, 2000, check=lambda _: False), Part("y", 0, 5)]
    good, damaged, missing = bucket.try_parts(parts)
    assert good == content[:1000]
    assert isinstance(damaged, ObjectDamaged) and isinstance(missing, ObjectMissing)
    with pytest.raises(ObjectDamaged, match=r"bytes 1000 to 1999 .* checksum of the bytes is wron"):
        bucket.read_parts(parts)


@pytest.mark.parametrize("is_digest", [True, False])
def test_small_object_is_read_until_something_vouches(bucket, proxy, monkeypatch, is_digest):
    content = random_bytes(1000)
    bucket.put("x", content)
    get = S3Client._get
    if not is_digest:
        monkeypatch.setattr("deit_fast.storage.objects.vouches", lambda *_: False)

    async def flip(self, *arguments):
        body = await get(self, *arguments)
        return body._replace(content=bytes(500) + body.content[500:]) if flips.pop() else body

    flips = [0, 0, 1]
    monkeypatch.setattr(S3Client, "_get", flip)
    assert bucket.read_whole("x") == content
    assert len(flips) == (1 if is_digest else 0)


def test_digests_that_vouch():
    content = np.random.default_rng(0).bytes(11 << 20)
    halves = [hashlib.md5(content[i : i + (8 << 20)]).digest() for i in (0, 8 << 20)]
    git = hashlib.sha1(b"blob %d\0" % len(content) + content)
    right = [
        hashlib.md5(content).hexdigest(), hashlib.sha256(content).hexdigest(), git.hexdigest(),
        hashlib.md5(b"".join(halves)).hexdigest() + "-2",
    ]  # fmt: skip

    def are_vouched(etags: list[str]) -> set[bool]:
        return {vouches(etag, len(content), lambda a, n: content[a : a + n]) for etag in etags}

    assert are_vouched(right) == {True}
    assert are_vouched([("1" if e[0] == "0" else "0") + e[1:] for e in right]) == {False}
    assert are_vouched(["", "67a-2b", right[3][:-1] + "3"]) == {False}


# ---------------------------------------------------------------------------------------------
# Faults
# ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fault", FAULTS)
def test_faults_now_and_then_change_no_byte(bucket, proxy, fault):
    content = random_bytes(400_000)
    stamp = bucket.put("x", content)
    objects = replace(bucket, patience=replace(QUICK, tries=12, request_seconds=3))
    spans = [(start, start + 40_000) for start in range(0, 400_000, 40_000)]
    right = [crc32c(content[a:b]) for a, b in spans]
    if fault == "etag":  # as if the object had been replaced
        proxy.start(fault)
        with pytest.raises(ObjectChanged):
            objects.read("x", stamp=stamp)
        return
    for round_ in range(2 if fault == "hang" else 6):
        proxy.start(fault, share=0.2, times=2 if fault == "hang" else 1 << 30)
        if round_ == 0:
            proxy.start(fault, times=1)
        for (a, b), crc in zip(spans, right, strict=True):
            read = objects.read("x", a, b, stamp=stamp, check=lambda c, crc=crc: crc32c(c) == crc)
            assert read == content[a:b]
        assert proxy.hits > 0 or round_ > 0


@pytest.mark.parametrize(
    ("fault", "cause"),
    [
        ("503", r"SlowDown \(HTTP 503\)"), ("cut", r"\w+: "), ("reset", r"\w+: "),
        ("short", r"sent 500 bytes"), ("flip", r"checksum"),  # ours, or the library's
    ],
)  # fmt: skip
def test_lasting_fault_is_one_line(bucket, proxy, fault, cause):
    content = random_bytes(1000)
    bucket.put("x", content)
    proxy.start(fault)
    with pytest.raises(StorageError, match=cause) as caught:
        bucket.read("x", 0, 1000, check=lambda read: read == content)
    text = str(caught.value)
    assert text.startswith(f"{bucket.url}/x: bytes 0 to 999 cannot be read, in 5 tries: ")
    assert "\n" not in text and proxy.hits >= 5  # aiohttp asks again by itself after a reset
    assert caught.value.__context__ is None


def test_silent_server_is_left_at_the_deadline(bucket, proxy):
    bucket.put("x", b"1234")
    proxy.start("hang")
    objects = replace(bucket, patience=Patience(5, 0.3, 1.0, 0.01))
    with pytest.raises(StorageError, match=r"no reply within 0\.\d+ s"):
        objects.read("x", 0, 4)


def test_replaced_object_is_refused(bucket):
    stamp = bucket.put("x", b"first version")
    bucket.put("x", b"other version")
    for spans in ((0, 5), (0, None)):
        with pytest.raises(ObjectChanged, match=r"/x: was changed while it was in use: start th"):
            bucket.read("x", *spans, stamp=stamp)


def test_errors_of_any_class_count_as_failed_tries(bucket, monkeypatch):
    class PanicException(BaseException):
        pass

    bucket.put("x", b"right")
    errors = iter([TypeError("a 412 without a body"), PanicException("index out of range")])
    get = S3Client._get

    async def fail_first(self, *arguments):
        for error in errors:
            raise error
        return await get(self, *arguments)

    monkeypatch.setattr(S3Client, "_get", fail_first)
    assert bucket.read("x", 0, 5) == b"right"


def test_interruption_of_the_waiting_thread_passes(bucket, proxy, heeds_ctrl_c):
    bucket.put("x", b"1234")
    proxy.start("hang")
    threading.Timer(0.3, lambda: os.kill(os.getpid(), 2)).start()
    with pytest.raises(KeyboardInterrupt):
        bucket.read("x", 0, 4)


# ---------------------------------------------------------------------------------------------
# Publishing
# ---------------------------------------------------------------------------------------------


def test_object_is_created_once(bucket):
    assert bucket.create("x", b"one") is True
    assert bucket.create("x", b"one") is False
    with pytest.raises(ObjectExists, match=r"/x: is there with other content"):
        bucket.create("x", b"two")
    assert bucket.create("x", b"two", same=lambda there: there == b"one") is False
    assert bucket.read("x") == b"one"
    assert bucket.create("empty", b"") is True and bucket.create("empty", b"") is False


def test_object_that_is_deleted_while_it_is_compared_is_created(bucket, monkeypatch):
    """As a note of a try, which another machine removes."""
    bucket.create("x", b"theirs")
    read_whole = Objects.read_whole

    def delete_first(self: Objects, name: str) -> bytes:
        self.delete(name)
        return read_whole(self, name)

    monkeypatch.setattr(Objects, "read_whole", delete_first)
    assert bucket.create("x", b"ours") is True
    assert bucket.read("x") == b"ours"


def test_lost_reply_of_a_creation_is_success(bucket, proxy):
    proxy.start("lost", times=1, method="PUT")
    assert bucket.create("x", b"content") is False
    assert proxy.hits == 1
    proxy.stop()
    assert bucket.read("x") == b"content"


@pytest.mark.parametrize("fault", ["503", "reset", "lost"])
def test_writes_survive_faults(bucket, proxy, fault):
    for number in range(4):
        proxy.start(fault, times=2, method="PUT")
        bucket.create(f"made/{number}", random_bytes(1000, number))
        proxy.start(fault, times=2, method="PUT")
        bucket.put(f"put/{number}", random_bytes(1000, number))
        assert proxy.hits >= 2
    proxy.stop()
    for number in range(4):
        for folder in ("made", "put"):
            assert bucket.read(f"{folder}/{number}") == random_bytes(1000, number)


def test_race_of_four_writers_has_one_winner(bucket):
    for key in range(10):
        won: list[int] = []
        barrier = threading.Barrier(4)

        def write(number: int, key: int = key, won: list = won, barrier=barrier) -> None:
            barrier.wait()
            try:
                bucket.create(f"key-{key}", b"writer %d" % number)
                won.append(number)
            except ObjectExists:
                pass

        threads = [threading.Thread(target=write, args=[number]) for number in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(won) == 1 and bucket.read(f"key-{key}") == b"writer %d" % won[0]


# ---------------------------------------------------------------------------------------------
# Processes and secrets
# ---------------------------------------------------------------------------------------------


def _read_in_child(objects: Objects) -> None:
    assert objects.read("x") == b"content"


def test_processes_open_their_own_client(bucket):
    bucket.put("x", b"content")
    child = os.fork()
    if child == 0:
        status = 1
        try:
            _read_in_child(bucket)
            status = 0
        finally:
            os._exit(status)
    assert os.waitpid(child, 0)[1] == 0
    assert forked(_read_in_child, bucket) == 0  # by a pickle
    assert bucket.read("x") == b"content"


def test_secrets_reach_no_message_log_or_pickle(bucket, proxy, caplog):
    bucket.put("x", b"content")
    stamp = bucket.stat("x")
    seen = []
    with caplog.at_level(logging.DEBUG, "deit_fast"):
        for fault in ("503", "cut", "reset", "short"):
            proxy.start(fault)
            try:
                bucket.read("x", stamp=stamp)
            except StorageError as error:
                seen += [str(error), repr(error), pickle.dumps(error).decode("latin1")]
    assert len(seen) == 12 and "again" in caplog.text
    seen += [caplog.text, repr(bucket), pickle.dumps(bucket).decode("latin1")]
    for secret in (KEY, SECRET, "Signature"):
        assert not any(secret in text for text in seen)


def test_wrong_and_missing_credentials_end_at_once(radosgw_or_skip, monkeypatch, tmp_path):
    use(radosgw_or_skip.port, monkeypatch)
    objects = Objects(f"s3://{radosgw_or_skip.new_bucket()}", QUICK)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "another")
    with pytest.raises(StorageError, match=r"access is refused, .*403.*AWS_PROFILE"):
        objects.stat("x")
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setattr(services, "_state", services._State())
    with pytest.raises(StorageError, match=r"no credentials were found: give them as"):
        objects.stat("x")
    (tmp_path / ".aws").mkdir()
    (tmp_path / ".aws/credentials").write_text(
        f"[mine]\naws_access_key_id = {KEY}\naws_secret_access_key = {SECRET}\n"
    )
    monkeypatch.setenv("AWS_PROFILE", "mine")
    monkeypatch.setattr(services, "_state", services._State())
    assert objects.create("x", b"")


@pytest.fixture
def radosgw_or_skip(request: pytest.FixtureRequest) -> Server:
    from helpers.servers import HAS_RADOSGW

    if not HAS_RADOSGW:
        pytest.skip("radosgw is not installed")
    return request.getfixturevalue("radosgw_server")


# ---------------------------------------------------------------------------------------------
# The web
# ---------------------------------------------------------------------------------------------

needs_nginx = pytest.mark.skipif(not HAS_NGINX, reason="nginx is not installed")


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(services, "_state", services._State())
    folder = tmp_path / "site"
    folder.mkdir()
    return folder


@needs_nginx
def test_web_server_is_read(site, tmp_path):
    content = random_bytes(100_000)
    (site / "a b#.bin").write_bytes(content)
    with nginx(tmp_path, site) as port:
        objects = Objects(f"http://127.0.0.1:{port}", QUICK)
        stamp = objects.stat("a b#.bin")
        assert stamp.size == 100_000 and stamp.etag
        assert objects.read("a b#.bin") == content
        assert objects.read("a b#.bin", 7, 1000, stamp=stamp) == content[7:1000]
        with pytest.raises(ObjectMissing):
            objects.stat("nothing")
        with pytest.raises(StorageError, match=r"bytes 0 to 199999 cannot be read, in 5 tries"):
            objects.read("a b#.bin", 0, 200_000)
        (site / "a b#.bin").write_bytes(content[:-1])
        with pytest.raises(ObjectChanged):
            objects.read("a b#.bin", 7, 1000, stamp=stamp)
        for write in (lambda: objects.put("y", b""), lambda: objects.create("y", b"")):
            with pytest.raises(InputError, match=r"http:// is read only"):
                write()
        with pytest.raises(InputError, match=r"cannot be listed"):
            objects.list()


@needs_nginx
@pytest.mark.parametrize("fault", ["503", "cut", "reset", "short", "flip"])
def test_faults_of_a_web_server_change_no_byte(site, tmp_path, fault):
    content = random_bytes(100_000)
    (site / "x").write_bytes(content)
    with nginx(tmp_path, site) as server, fault_proxy(server) as proxy:
        objects = Objects(f"http://127.0.0.1:{proxy.port}", QUICK)
        proxy.start(fault, times=3)
        assert objects.read("x", 5, 90_000, check=lambda c: c == content[5:90_000])
        assert proxy.hits == 3


@needs_nginx
def test_server_without_ranges_is_refused(site, tmp_path):
    (site / "x").write_bytes(bytes(100_000))
    with nginx(tmp_path, site, ranges=False) as port:
        objects = Objects(f"http://127.0.0.1:{port}", QUICK)
        with pytest.raises(StorageError, match=r"the server ignores ranges and sends whole files"):
            objects.read("x", 0, 1000)
        assert objects.read("x") == bytes(100_000)  # the whole file is what was asked for


def test_nobody_listens(monkeypatch):
    monkeypatch.setattr(services, "_state", services._State())
    objects = Objects(f"http://127.0.0.1:{free_port()}", replace(QUICK, tries=2))
    with pytest.raises(StorageError, match=r"x: cannot be looked up, in 2 tries: Client") as caught:
        objects.stat("x")
    assert "\n" not in str(caught.value)


def test_storage_imports_no_client():
    code = "import sys, deit_fast.storage.objects as _; print([*sys.modules])"
    names = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout
    assert not {"fsspec", "s3fs", "aiohttp", "torch"} & {*eval(names)}
