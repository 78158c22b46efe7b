"""S3, and services that speak its protocol, through s3fs."""

from __future__ import annotations

import base64
import hashlib
from concurrent.futures import Future
from typing import Any

from deit_fast.storage.clients import (
    CONNECT_SECONDS,
    CONNECTIONS,
    Body,
    Client,
    Stamp,
    plain_tag,
    require_part,
    submit,
)


class S3Client(Client):
    """s3fs. The library finds credentials, region and endpoint (AWS_ENDPOINT_URL) itself."""

    def __init__(self) -> None:
        import s3fs

        config = {
            "retries": {"max_attempts": 0}, "max_pool_connections": CONNECTIONS,
            "connect_timeout": CONNECT_SECONDS,
        }  # fmt: skip
        self._fs = s3fs.S3FileSystem(
            skip_instance_cache=True, use_listings_cache=False, config_kwargs=config
        )
        self._fs.retries = 1

    def stat(self, url: str, seconds: float) -> Future[Stamp]:
        return submit(self._stat(url), seconds)

    async def _stat(self, url: str) -> Stamp:
        said = await self._fs._call_s3("head_object", **_bucket_and_key(url))
        return Stamp(int(said["ContentLength"]), plain_tag(said.get("ETag")))

    def page(
        self, url: str, prefix: str, token: Any, seconds: float
    ) -> Future[tuple[dict[str, Stamp], Any]]:
        return submit(self._page(url, prefix, token), seconds)

    async def _page(self, url: str, prefix: str, token: Any) -> tuple[dict[str, Stamp], Any]:
        where = _bucket_and_key(url)
        folder = f"{where['Key']}/" if where["Key"] else ""
        more = {"ContinuationToken": token} if token else {}
        said = await self._fs._call_s3(
            "list_objects_v2", Bucket=where["Bucket"], Prefix=folder + prefix, **more
        )
        found = {
            item["Key"].removeprefix(folder): Stamp(int(item["Size"]), plain_tag(item.get("ETag")))
            for item in said.get("Contents", ())
        }
        token = said.get("NextContinuationToken")
        if said.get("IsTruncated") and not token:
            raise ValueError("the server's list ends without its end")
        return found, token if said.get("IsTruncated") else None

    def get(self, url: str, start: int, stop: int, etag: str, seconds: float) -> Future[Body]:
        return submit(self._get(url, start, stop, etag), seconds)

    async def _get(self, url: str, start: int, stop: int, etag: str) -> Body:
        match = {"IfMatch": f'"{etag}"'} if etag else {}
        where = _bucket_and_key(url)
        said = await self._fs._call_s3(
            "get_object", **where, Range=f"bytes={start}-{stop - 1}", **match
        )
        body = said["Body"]
        try:
            status = said["ResponseMetadata"]["HTTPStatusCode"]
            require_part(
                (start, stop), said.get("ContentRange") or "", status, said["ContentLength"]
            )
            return Body(await body.read(), plain_tag(said.get("ETag")))
        finally:
            body.close()

    def put(self, url: str, content: bytes, create: bool, seconds: float) -> Future[None]:
        return submit(self._put(url, content, create), seconds)

    async def _put(self, url: str, content: bytes, create: bool) -> None:
        absent = {"IfNoneMatch": "*"} if create else {}
        await self._fs._call_s3(
            "put_object", **_bucket_and_key(url), Body=content, ContentMD5=_md5(content), **absent
        )

    def delete(self, url: str, seconds: float) -> Future[None]:
        return submit(self._fs._call_s3("delete_object", **_bucket_and_key(url)), seconds)

    # A large file in parts. Nothing is visible before `end_parts`.

    def begin_parts(self, url: str, seconds: float) -> Future[dict[str, Any]]:
        where = _bucket_and_key(url)
        return submit(self._fs._call_s3("create_multipart_upload", **where), seconds)

    def put_part(
        self, url: str, upload: str, number: int, content: bytes, seconds: float
    ) -> Future[dict[str, Any]]:
        call = self._fs._call_s3(
            "upload_part", **_bucket_and_key(url), UploadId=upload, PartNumber=number,
            Body=content, ContentMD5=_md5(content),
        )  # fmt: skip
        return submit(call, seconds)

    def end_parts(self, url: str, upload: str, etags: list[str], seconds: float) -> Future:
        parts = [{"PartNumber": n, "ETag": etag} for n, etag in enumerate(etags, 1)]
        call = self._fs._call_s3(
            "complete_multipart_upload", **_bucket_and_key(url), UploadId=upload,
            MultipartUpload={"Parts": parts},
        )  # fmt: skip
        return submit(call, seconds)

    def drop_parts(self, url: str, upload: str, seconds: float) -> Future:
        call = self._fs._call_s3("abort_multipart_upload", **_bucket_and_key(url), UploadId=upload)
        return submit(call, seconds)


def _md5(content: bytes) -> str:
    """What the service compares with the bytes that reach it; it protects from no attacker."""
    return base64.b64encode(hashlib.md5(content, usedforsecurity=False).digest()).decode()


def _bucket_and_key(url: str) -> dict[str, str]:
    bucket, _, key = url.partition("://")[2].partition("/")
    return {"Bucket": bucket, "Key": key}
