"""Servers of objects on the loopback, as processes.

moto and radosgw (Debian's radosgw, ceph-mon and ceph-osd) for S3, nginx for the web, Google's
storage-testbench (its repository, by pip) and Microsoft's azurite (by npm) for their services.
Tests that need any but moto are skipped where it is not installed.
"""

from __future__ import annotations

import base64
import json
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple
from urllib.request import Request, urlopen

import pytest

from deit_fast.storage import services
from deit_fast.storage.objects import Objects, Patience

HAS_RADOSGW = all(map(shutil.which, ("radosgw", "radosgw-admin", "ceph-mon", "ceph-osd", "ceph")))
HAS_NGINX = shutil.which("nginx") is not None
OTHERS = {  # by scheme: the server's command, and the client's package
    "gs": ("storage-testbench", "gcsfs"), "az": ("azurite-blob", "adlfs"),
}  # fmt: skip
KEY, SECRET = "PLANTEDACCESSKEY0001", "planted+secret/0002"
AZ_KEY = base64.b64encode(SECRET.encode()).decode()


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def variables(port: int) -> dict[str, str]:
    """The environment in which clients find a server of this port, and credentials for it."""
    return {
        "AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}", "AWS_ACCESS_KEY_ID": KEY,
        "AWS_SECRET_ACCESS_KEY": SECRET, "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_EC2_METADATA_DISABLED": "true",
    }  # fmt: skip


def use(port: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let this process's clients, which are opened anew, ask the server of this port."""
    for name, value in variables(port).items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(services, "_state", services._State())


def be_quick(monkeypatch: pytest.MonkeyPatch, tries: int = 6) -> None:
    """Let objects of this process be asked again without a pause."""
    patience = Patience(tries=tries, request_seconds=5, seconds=60, pause=0.01)
    monkeypatch.setattr(Objects.__init__, "__defaults__", (patience,))


def client(port: int) -> Any:
    """boto3's client: tests look at a bucket with another library than the product's."""
    import boto3

    return boto3.client(
        "s3", endpoint_url=f"http://127.0.0.1:{port}", aws_access_key_id=KEY,
        aws_secret_access_key=SECRET, region_name="us-east-1",
    )  # fmt: skip


def upload(port: int, folder: Path, bucket: str, prefix: str = "") -> None:
    """All files below a folder but hidden ones, as objects of one part each."""
    s3 = client(port)
    for path in sorted(folder.rglob("*")):
        if path.is_file() and not path.name.startswith("."):
            name = f"{prefix}{path.relative_to(folder)}"
            s3.put_object(Bucket=bucket, Key=name, Body=path.read_bytes())


def _wait(is_up: Callable[[], bool], process: subprocess.Popen, log: Path) -> None:
    end = time.monotonic() + 120
    while not is_up():
        if process.poll() is not None or time.monotonic() > end:
            raise RuntimeError(f"{process.args} did not start: {log.read_text()[-2000:]}")
        time.sleep(0.05)


def _listens(port: int) -> bool:
    with socket.socket() as attempt:
        return attempt.connect_ex(("127.0.0.1", port)) == 0


@contextmanager
def _running(
    command: list[str], folder: Path, name: str
) -> Iterator[tuple[subprocess.Popen, Path]]:
    log = folder / f"{name}.log"
    with log.open("wb") as output:
        process = subprocess.Popen(command, stdout=output, stderr=output, stdin=subprocess.DEVNULL)
    try:
        yield process, log
    finally:
        process.terminate()
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


class Server(NamedTuple):
    """A server of S3.

    Attributes:
        name: moto or radosgw.
        port: on the loopback.
    """

    name: str
    port: int

    def new_bucket(self) -> str:
        """The name of a new bucket."""
        name = f"bucket-{uuid.uuid4().hex[:12]}"
        client(self.port).create_bucket(Bucket=name)
        return name


@contextmanager
def s3_server(name: str) -> Iterator[Server]:
    """A server without buckets, and with the credentials KEY and SECRET."""
    with (
        tempfile.TemporaryDirectory(prefix="s3-") as folder,
        {"moto": moto, "radosgw": radosgw}[name](Path(folder)) as port,
    ):
        yield Server(name, port)


@contextmanager
def moto(folder: Path) -> Iterator[int]:
    """The port of a server that has no bucket."""
    port = free_port()
    command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
    with _running(command, folder, "moto") as (process, log):
        _wait(lambda: _listens(port), process, log)
        yield port


@contextmanager
def radosgw(folder: Path) -> Iterator[int]:
    """The port of a gateway on a monitor and one object store in memory.

    Args:
        folder: new and of a short name: the path of a socket has 107 bytes at most.
    """
    monitor, monitor_v1, port = free_port(), free_port(), free_port()
    cluster, conf, ring = str(uuid.uuid4()), folder / "ceph.conf", folder / "keyring"
    for name in ("mon", "osd", "rgw", "run"):
        (folder / name).mkdir()
    # cephx with a keyring: without authentication the gateway never starts. tcp_nodelay: else each
    # small reply takes 45 ms.
    conf.write_text(f"""
[global]
fsid = {cluster}
keyring = {ring}
mon host = [v2:127.0.0.1:{monitor},v1:127.0.0.1:{monitor_v1}]
auth cluster required = cephx
auth service required = cephx
auth client required = cephx
run dir = {folder}/run
admin socket = {folder}/run/$name.asok
log file = {folder}/$name.ceph.log
osd objectstore = memstore
memstore device bytes = 2147483648
osd pool default size = 1
osd pool default min size = 1
osd pool default pg num = 1
osd pool default pgp num = 1
osd crush chooseleaf type = 0
mon data avail crit = 1
mon allow pool size one = true
mon allow pool delete = true
mon warn on pool no redundancy = false
public addr = 127.0.0.1
cluster addr = 127.0.0.1
[mon.a]
mon data = {folder}/mon
[osd.0]
osd data = {folder}/osd
[client.rgw.a]
rgw data = {folder}/rgw
rgw frontends = beast endpoint=127.0.0.1:{port} tcp_nodelay=1
rgw enable usage log = false
""")

    def call(*words: str) -> str:
        done = subprocess.run(words, capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, f"{words}: {done.stderr[-2000:]}"
        return done.stdout

    for entity, caps in {
        "mon.": ["mon", "allow *"],
        "client.admin": ["mon", "allow *", "osd", "allow *", "mgr", "allow *"],
        "client.rgw.a": ["mon", "allow rw", "osd", "allow rwx"],
        "osd.0": ["mon", "allow profile osd", "osd", "allow *"],
    }.items():
        each = zip(caps[::2], caps[1::2], strict=True)
        pairs = [word for cap in each for word in ("--cap", *cap)]
        create = [] if ring.exists() else ["--create-keyring"]
        call("ceph-authtool", str(ring), *create, "--gen-key", "-n", entity, *pairs)
    address = f"[v2:127.0.0.1:{monitor},v1:127.0.0.1:{monitor_v1}]"
    call("monmaptool", "--create", "--addv", "a", address, "--fsid", cluster, f"{folder}/monmap")
    common = ["-c", str(conf)]
    start = ["--monmap", f"{folder}/monmap", "--keyring", str(ring)]
    call("ceph-mon", *common, "--mkfs", "-i", "a", *start)
    with _running(["ceph-mon", *common, "-f", "-i", "a"], folder, "mon") as (process, log):
        _wait(lambda: _listens(monitor), process, log)
        identity = str(uuid.uuid4())
        call("ceph", *common, "osd", "new", identity, "0")
        call("ceph-osd", *common, "-i", "0", "--mkfs", "--osd-uuid", identity)
        with _running(["ceph-osd", *common, "-f", "-i", "0"], folder, "osd"):
            gateway = ["radosgw", *common, "-f", "-n", "client.rgw.a"]
            with _running(gateway, folder, "rgw") as (process, log):
                _wait(lambda: _listens(port), process, log)
                call(
                    "radosgw-admin", *common, "user", "create", "--uid", "tests",
                    "--display-name", "tests", "--access-key", KEY, "--secret-key", SECRET,
                )  # fmt: skip
                yield port


@contextmanager
def nginx(folder: Path, root: Path, ranges: bool = True) -> Iterator[int]:
    """The port of a web server of the files below ``root``; without ranges: of whole files only."""
    port = free_port()
    conf = folder / f"nginx-{port}.conf"
    conf.write_text(f"""
daemon off; master_process off; pid {folder}/nginx-{port}.pid; error_log stderr;
events {{ worker_connections 256; }}
http {{
  access_log off; client_body_temp_path {folder}; proxy_temp_path {folder};
  fastcgi_temp_path {folder}; uwsgi_temp_path {folder}; scgi_temp_path {folder};
  server {{ listen 127.0.0.1:{port}; root {root}; {"" if ranges else "max_ranges 0;"} }}
}}
""")
    with _running(["nginx", "-c", str(conf)], folder, f"nginx-{port}") as (process, log):
        _wait(lambda: _listens(port), process, log)
        yield port


# ---------------------------------------------------------------------------------------------
# Google's and Microsoft's
# ---------------------------------------------------------------------------------------------


def can_serve(scheme: str) -> bool:
    """Whether the server of a scheme and its client are installed."""
    command, package = OTHERS[scheme]
    return shutil.which(command) is not None and find_spec(package) is not None


def other_variables(scheme: str, port: int) -> dict[str, str]:
    """As `variables`."""
    if scheme == "gs":
        return {"STORAGE_EMULATOR_HOST": f"http://127.0.0.1:{port}"}
    parts = ["DefaultEndpointsProtocol=http", f"AccountName={KEY.lower()}", f"AccountKey={AZ_KEY}",
             f"BlobEndpoint=http://127.0.0.1:{port}/{KEY.lower()}"]  # fmt: skip
    return {"AZURE_STORAGE_CONNECTION_STRING": ";".join(parts)}


def use_other(scheme: str, port: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """As `use`."""
    for name, value in other_variables(scheme, port).items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(services, "_state", services._State())


def new_container(scheme: str, port: int) -> str:
    """The name of a new bucket."""
    name = f"bucket-{uuid.uuid4().hex[:12]}"
    if scheme == "gs":
        url = f"http://127.0.0.1:{port}/storage/v1/b?project=tests"
        about = json.dumps({"name": name}).encode()
        request = Request(url, about, {"Content-Type": "application/json"})
        urlopen(request, timeout=20).close()
        return name
    from azure.storage.blob import BlobServiceClient

    (connection,) = other_variables(scheme, port).values()
    BlobServiceClient.from_connection_string(connection).create_container(name)
    return name


@contextmanager
def other_server(scheme: str) -> Iterator[int]:
    """The port of a server that has no bucket."""
    port = free_port()
    command = {
        "gs": ["storage-testbench", "--port", str(port)],
        "az": ["azurite-blob", "--inMemoryPersistence", "--skipApiVersionCheck", "--silent",
               "--blobPort", str(port)],
    }[scheme]  # fmt: skip
    with (
        tempfile.TemporaryDirectory(prefix="objects-") as folder,
        pytest.MonkeyPatch.context() as patch,
    ):
        patch.setenv("AZURITE_ACCOUNTS", f"{KEY.lower()}:{AZ_KEY}")
        with _running(command, Path(folder), scheme) as (process, log):
            _wait(lambda: _listens(port), process, log)
            yield port
