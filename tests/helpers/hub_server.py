"""The part of the Hugging Face Hub's API by which its library reads a data set, on the loopback.

There is no server of the Hub that a test could start: this one replies as the documents at
https://huggingface.co/docs/hub/api say, so it shows that the library is asked rightly, and not how
the service behaves.
"""

from __future__ import annotations

import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlsplit

import pytest
from huggingface_hub import constants

from deit_fast.storage import services

COMMIT = "1" * 40
_API = "/api/datasets/owner/shards"


class Hub(ThreadingHTTPServer):
    """A server with one data set, `owner/shards`, whose files are those of a folder.

    Attributes:
        folder: of the files.
        asked: methods and paths of all requests.
    """

    daemon_threads = True

    def __init__(self, folder: Path) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.folder = folder
        self.asked: list[str] = []


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    wbufsize = -1  # headers and content in one packet
    server: Hub

    def log_message(self, format: str, *args: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        self._answer()

    def do_POST(self) -> None:
        self._answer(self.rfile.read(int(self.headers["Content-Length"])))

    def _answer(self, body: bytes = b"") -> None:
        path = unquote(urlsplit(self.path).path)
        self.server.asked.append(f"{self.command} {path}")
        api = re.fullmatch(rf"{_API}(?:/(revision|tree|paths-info)/([^/]+)(.*))?", path)
        file = re.fullmatch(rf"/datasets/owner/shards/resolve/(?:{COMMIT}|main)/(.+)", path)
        if file and (self.server.folder / file[1]).is_file():
            self._send_file(self.server.folder / file[1])
        elif api and api[1] in (None, "revision"):
            self._send_json({"id": "owner/shards", "sha": COMMIT, "siblings": []})
        elif api and api[1] == "tree":
            below = self.server.folder / api[3].strip("/")
            is_deep = (
                "true" in parse_qs(urlsplit(self.path).query).get("recursive", [""])[0].lower()
            )
            paths = below.rglob("*") if is_deep else below.iterdir()
            self._send_json([self._about(path) for path in sorted(paths)])
        elif api:
            names = json.loads(body)["paths"]
            paths = [self.server.folder / name for name in names]
            self._send_json([self._about(path) for path in paths if path.exists()])
        else:
            self._send(404, b"", {"X-Error-Code": "EntryNotFound" if file else "RepoNotFound"})

    def _about(self, path: Path) -> dict[str, object]:
        name = str(path.relative_to(self.server.folder))
        if path.is_dir():
            return {"type": "directory", "path": name, "oid": "2" * 40, "size": 0}
        content = path.read_bytes()
        digest = hashlib.sha256(content).hexdigest()
        large = {"oid": digest, "size": len(content), "pointerSize": 134}
        return {
            "type": "file", "path": name, "oid": "3" * 40, "size": len(content), "lfs": large
        }  # fmt: skip

    def _send_json(self, value: object) -> None:
        self._send(200, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def _send_file(self, path: Path) -> None:
        content = path.read_bytes()
        headers = {"ETag": f'"{hashlib.sha256(content).hexdigest()}"', "X-Repo-Commit": COMMIT}
        match = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
        if match:
            first, last = int(match[1]), min(int(match[2]), len(content) - 1)
            headers["Content-Range"] = f"bytes {first}-{last}/{len(content)}"
            self._send(206, content[first : last + 1], headers)
        else:
            self._send(200, content, headers)

    def _send(self, status: int, content: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)


def use_hub(port: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let this process's client, which is opened anew, ask the hub of this port."""
    url = f"http://127.0.0.1:{port}"
    monkeypatch.setattr(constants, "ENDPOINT", url)
    template = f"{url}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(services, "_state", services._State())


@contextmanager
def hub_server(folder: Path) -> Iterator[Hub]:
    """A hub with the files of a folder, in a thread of this process."""
    hub = Hub(folder)
    thread = threading.Thread(target=hub.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        hub.shutdown()
        hub.server_close()
        thread.join()
