"""Azure and the Hugging Face Hub, through fsspec's calls, which use threads."""

from __future__ import annotations

from concurrent.futures import Future
from pathlib import Path
from typing import Any

from deit_fast.storage.clients import (
    Body,
    Client,
    ReadOnlyClient,
    Stamp,
    in_thread,
    plain_tag,
    require_part,
)


class OtherClient(Client):
    """Azure. A read is followed by a stat where an ETag is asked for, and the library repeats
    requests by itself."""

    def __init__(self, scheme: str) -> None:
        import fsspec

        self._fs: Any = fsspec.filesystem(
            scheme, skip_instance_cache=True, use_listings_cache=False
        )

    def stat(self, url: str, seconds: float) -> Future[Stamp]:
        return in_thread(lambda: self._stat(url))

    def _stat(self, url: str) -> Stamp:
        return _stamp_of(self._fs.info(url), url)

    def page(
        self, url: str, prefix: str, token: Any, seconds: float
    ) -> Future[tuple[dict[str, Stamp], Any]]:
        return in_thread(lambda: self._page(url, prefix))

    def _page(self, url: str, prefix: str) -> tuple[dict[str, Stamp], Any]:
        root = self._fs._strip_protocol(url)
        self._fs.invalidate_cache()
        folder = f"{root}/{prefix}".rpartition("/")[0]  # prefix may end within a name
        found = self._fs.find(folder, detail=True)
        names = ((name.removeprefix(f"{root}/"), info) for name, info in found.items())
        return {n: _stamp_of(info, n) for n, info in names if n.startswith(prefix)}, None

    def get(self, url: str, start: int, stop: int, etag: str, seconds: float) -> Future[Body]:
        return in_thread(lambda: self._get(url, start, stop, etag))

    def _get(self, url: str, start: int, stop: int, etag: str) -> Body:
        content = self._read(url, start, stop)
        return Body(content, self._stat(url).etag if etag else "")

    def _read(self, url: str, start: int, stop: int) -> bytes:
        return self._fs.cat_file(url, start=start, end=stop)

    def put(self, url: str, content: bytes, create: bool, seconds: float) -> Future[None]:
        return in_thread(lambda: self._put(url, content, create))

    def _put(self, url: str, content: bytes, create: bool) -> None:
        self._fs.pipe_file(url, content, **({"mode": "create"} if create else {}))

    def put_file(self, url: str, path: Path, seconds: float) -> Future[None]:
        return in_thread(lambda: self._fs.put_file(str(path), url))

    def delete(self, url: str, seconds: float) -> Future[None]:
        return in_thread(lambda: self._fs.rm_file(url))


class HubClient(ReadOnlyClient, OtherClient):
    """The Hub, read only. A branch is looked up once in a process: its commit then
    is what is read."""

    def __init__(self) -> None:
        super().__init__("hf")
        self._pinned: dict[str, str] = {}

    def _pin(self, url: str) -> str:
        place = self._fs.resolve_path(url)
        repository = getattr(place, "repo_id", None)
        if repository is None:  # a bucket of the Hub has no commits
            return url
        name = f"{place.repo_type}/{repository}@{place.revision}"
        if name not in self._pinned:
            self._pinned[name] = self._fs._api.repo_info(
                repository, repo_type=place.repo_type, revision=place.revision
            ).sha
        kind = "" if place.repo_type == "model" else f"{place.repo_type}s/"
        return f"hf://{kind}{repository}@{self._pinned[name]}/{place.path_in_repo}"

    def _stat(self, url: str) -> Stamp:
        return _stamp_of(self._fs.info(self._pin(url)), url)

    def _page(self, url: str, prefix: str) -> tuple[dict[str, Stamp], Any]:
        return super()._page(self._pin(url).rstrip("/"), prefix)

    def get(self, url: str, start: int, stop: int, etag: str, seconds: float) -> Future[Body]:
        return in_thread(lambda: self._one_request(url, start, stop, etag, seconds))

    def _one_request(self, url: str, start: int, stop: int, etag: str, seconds: float) -> Body:
        """The library's own reads repeat requests. What a commit holds never changes."""
        from huggingface_hub import get_session
        from huggingface_hub.utils import hf_raise_for_status

        headers = {
            **self._fs._api._build_hf_headers(),
            "Range": f"bytes={start}-{stop - 1}", "Accept-Encoding": "identity",
        }  # fmt: skip
        reply = get_session().get(self._fs.url(self._pin(url)), headers=headers, timeout=seconds)
        hf_raise_for_status(reply)
        part, length = reply.headers.get("Content-Range", ""), len(reply.content)
        require_part((start, stop), part, reply.status_code, length)
        return Body(reply.content, etag)


def _stamp_of(info: dict[str, Any], url: str) -> Stamp:
    """From the description of a file, whose keys differ between services."""
    if info.get("type") != "file":
        raise FileNotFoundError(url)
    large = info.get("lfs") or {}
    digest = large.get("sha256") if isinstance(large, dict) else getattr(large, "sha256", "")
    tags = [digest, *(info.get(key) for key in ("blob_id", "xet_hash", "etag", "ETag"))]
    return Stamp(int(info["size"]), next((plain_tag(tag) for tag in tags if tag), ""))
