"""The manifest: what a cache holds and what it was made from; one JSON file beside the views.

Everything but "info" is compared. Its canonical form is hashed into every view file's header, so a
view that strays into another cache, or a manifest edited afterwards, is refused.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import cache, partial
from pathlib import Path
from typing import Any

from deit_fast import _C
from deit_fast.cache.codec_base import Codec, id_bytes
from deit_fast.cache.codecs import codec_from_config, codec_from_manifest
from deit_fast.cache.feature_codecs import FeatureCodec, feature_codec, feature_codec_from_manifest
from deit_fast.cache.record_order import record_order
from deit_fast.config import CodecConfig, ViewConfig
from deit_fast.errors import CacheError, CacheMismatch, InputError
from deit_fast.runtime.files import create_atomically, read_json, sealed_json

log = logging.getLogger("deit_fast")

FORMAT = 3
_READ_FORMATS = (2, 3)
VIEW_LIMIT = 2**31  # view ids are below it
FILE_NAME = "manifest.json"
_COMPARED = ("format", "codec", "record_bytes", "block_records", "num_samples", "fingerprint")
_OF_SOME_VIEWS = {"view.size_schedule"}  # in the fingerprint of those views alone that have it
_LIMITS = {"num_samples": 2**40, "block_records": 2**31, "record_bytes": 2**24}
UNIT_RECORDS = 4096  # records that `precompute` works on together; blocks of features divide it
_FEATURE_BLOCK_BYTES = 1 << 22
_MAX_FILE_BYTES = 1 << 24


def build_manifest(
    config: CodecConfig,
    *,
    num_classes: int,
    num_samples: int,
    tau: float,
    fingerprint: Mapping[str, Any],
    block_records: int | None = None,
    order: str | None = None,
) -> dict[str, Any]:
    """The manifest of a new cache of logits.

    Args:
        config: codec and block size.
        num_classes: width of the teacher's logits.
        num_samples: samples of the data set, which is records per view.
        tau: temperature that `topk` records where ``config.temperatures`` names none.
        fingerprint: dotted key -> JSON value; everything that decides the views and the logits.
        block_records: records of a block; None: as in ``config``.
        order: of a view's records: None: by sample id; "pairs": as training first visits them.

    Raises:
        InputError: a codec setting that does not fit, a value that is not JSON.
    """
    codec = codec_from_config(config, num_classes, tau)
    size = config.block_records if block_records is None else block_records
    return _new_manifest(codec, num_samples, size, fingerprint, order)


def build_feature_manifest(
    codec: str,
    *,
    tokens: int,
    width: int,
    num_samples: int,
    fingerprint: Mapping[str, Any],
    order: str | None = "pairs",
    block_records: int | None = None,
) -> dict[str, Any]:
    """The manifest of a new cache of features [num_samples, tokens, width].

    Args:
        codec: its name in ``feature_codecs.FEATURE_CODECS``.
        tokens, width: of a view, as they are stored.
        num_samples, fingerprint, order: as for ``build_manifest``. "pairs" needs `view.seed` and
            `view.repeats` in the fingerprint.
        block_records: records of a block; None: ``feature_block_records``.

    Raises:
        InputError: a codec or size that does not fit, a value that is not JSON.
    """
    chosen = feature_codec(codec, tokens, width)
    size = feature_block_records(chosen.record_bytes) if block_records is None else block_records
    return _new_manifest(chosen, num_samples, size, fingerprint, order)


def feature_block_records(record_bytes: int) -> int:
    """The largest power of two, at most 4096, whose records take at most 4 MiB; at least 1."""
    most = max(1, min(UNIT_RECORDS, _FEATURE_BLOCK_BYTES // record_bytes))
    return 1 << (most.bit_length() - 1)


def _new_manifest(
    codec: Codec,
    num_samples: int,
    block_records: int,
    fingerprint: Mapping[str, Any],
    order: str | None,
) -> dict[str, Any]:
    manifest = {
        "format": FORMAT,
        "codec": codec.manifest(),
        "record_bytes": codec.record_bytes,
        "block_records": block_records,
        "num_samples": num_samples,
        "fingerprint": dict(fingerprint),
        "info": {},
    } | ({} if order is None else {"order": order})
    return check_manifest(manifest, "manifest")


def codec_of(manifest: Mapping[str, Any], where: str = "manifest") -> Codec:
    """The codec of a cache of logits or features.

    Raises:
        CacheError: the manifest's "codec" describes none; the message starts with ``where``.
    """
    values = manifest["codec"]
    if "tokens" in values or "width" in values:
        return feature_codec_from_manifest(values, where)
    return codec_from_manifest(values, where)


def holds_features(manifest: Mapping[str, Any]) -> bool:
    """Whether it is a cache of features, not of logits."""
    return isinstance(codec_of(manifest), FeatureCodec)


def check_manifest(manifest: Any, where: str) -> dict[str, Any]:
    """The manifest in plain JSON types; ``where`` starts the message of what is wrong with it.

    Raises:
        CacheError: a field is missing, unknown, of the wrong type or out of its range.
    """
    try:
        plain = json.loads(json.dumps(manifest, allow_nan=False))
    except (TypeError, ValueError, RecursionError) as error:
        raise CacheError(f"{where}: not plain JSON: {error}") from None
    if not isinstance(plain, dict):
        raise CacheError(f"{where}: must be a JSON object")
    if plain.get("format") not in _READ_FORMATS or type(plain["format"]) is not int:
        raise CacheError(
            f"{where}: format is {plain.get('format')!r}, this version reads "
            f"{' and '.join(map(str, _READ_FORMATS))}"
        )
    wrong = (set(plain) - {"info", "order"}) ^ set(_COMPARED)
    if wrong:
        raise CacheError(f"{where}: fields missing or unknown: {', '.join(sorted(wrong))}")
    for name, limit in _LIMITS.items():
        value = plain[name]
        if type(value) is not int or not 1 <= value <= limit:
            raise CacheError(f"{where}: {name} must lie in [1, {limit}], not {value!r}")
    for name in ("codec", "fingerprint", "info"):
        if not isinstance(plain.get(name, {}), dict):
            raise CacheError(f"{where}: {name} must be a JSON object, not {plain[name]!r}")
    record_order(plain, where)
    record_bytes = codec_of(plain, where).record_bytes
    if plain["record_bytes"] != record_bytes:
        raise CacheError(
            f"{where}: record_bytes is {plain['record_bytes']}, the codec has {record_bytes}"
        )
    return plain


def manifest_sha256(manifest: Mapping[str, Any]) -> bytes:
    """Of the compared part as sorted, compact, ASCII JSON; view headers and pixel files hold it."""
    compared = {name: value for name, value in manifest.items() if name != "info"}
    text = json.dumps(compared, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).digest()


def unproved(manifest: Mapping[str, Any]) -> str:
    """What a cache of an older format cannot show; empty for the newest."""
    if manifest["format"] == FORMAT:
        return ""
    return (
        f"format {manifest['format']} cannot show whether a block stands in its place; "
        f"format {FORMAT} of a new cache can"
    )


@cache
def _warn(folder: Path, text: str) -> None:
    log.warning("cache %s: %s", folder, text)


def say_unproved(folder: Path, manifest: Mapping[str, Any]) -> None:
    """Log once for each folder what its older format cannot show."""
    if text := unproved(manifest):
        _warn(folder, text)


def view_specs(manifest: Mapping[str, Any]) -> Callable[..., _C.ViewSpec]:
    """By ``view_id``: sizes of the file, expected header, and position of class ids in a record."""
    codec = codec_of(manifest)
    return partial(
        _C.ViewSpec,
        num_records=manifest["num_samples"],
        record_bytes=manifest["record_bytes"],
        block_records=manifest["block_records"],
        ids_per_record=codec.ids_per_record,
        id_bytes=id_bytes(codec.id_limit),
        id_limit=codec.id_limit,
        manifest_sha256=manifest_sha256(manifest),
        version=manifest["format"],
    )


def fields(manifest: Mapping[str, Any]) -> dict[str, Any]:
    """Compared fields by dotted name: `num_samples`, `codec.k`, and the fingerprint's own keys."""
    flat: dict[str, Any] = {}
    for name, value in manifest.items():
        if name == "codec" and isinstance(value, Mapping):
            flat.update({f"codec.{key}": item for key, item in value.items()})
        elif name == "fingerprint" and isinstance(value, Mapping):
            flat.update(value)
        elif name != "info":
            flat[name] = value
    return flat


def require_equal(
    folder: Path | str,
    manifest: Mapping[str, Any],
    expected: Mapping[str, Any],
    only: bool = True,
) -> None:
    """Compare a cache's manifest with the fields in ``expected``, which is nested or flat.

    Args:
        only: the cache may have other fields, but none of views that ``expected`` describes;
            False: it may not.

    Raises:
        CacheMismatch: names every differing field with both values and the remedy: the flags that
            give the cache's values, if these are all that differs.
    """
    found, plain = fields(manifest), json.loads(json.dumps(fields(expected)))
    names = plain.keys() | (_OF_SOME_VIEWS if "view.image_size" in plain else set())
    differing = [
        name
        for name in sorted(names if only else plain.keys() | found.keys())
        if (name in found) != (name in plain) or found.get(name) != plain.get(name)
    ]
    if differing:
        noun = "one field" if len(differing) == 1 else f"{len(differing)} fields"
        shown = [
            f"{name} is {_show(found, name)}, expected {_show(plain, name)}" for name in differing
        ]
        flags = [_flag(name, found.get(name)) for name in differing]
        remedy = "give the settings that it was made with, or name another cache"
        if None not in flags:
            remedy = f"this cache fits with {' '.join(map(str, flags))}"
        raise CacheMismatch(f"cache {folder} differs in {noun}: {'; '.join(shown)}; {remedy}")


def _flag(field: str, value: Any) -> str | None:
    """The flags that give a compared field this value; None where no setting alone does."""
    section, _, name = field.partition(".")
    flag = "--teacher-batch" if field == "teacher.batch" else None
    names = {item.name for item in dataclasses.fields(ViewConfig)} - {"repeats"}  # see num_views
    if section == "view" and name in names:
        flag = f"--view.{name.replace('_', '-')}"
    values = value if isinstance(value, list) else [value]
    words = [
        str(v) for v in values if type(v) in (int, float) or (type(v) is str and v.isidentifier())
    ]
    return None if flag is None or len(words) < len(values) else " ".join([flag, *words])


def _show(values: Mapping[str, Any], name: str) -> str:
    return json.dumps(values[name], sort_keys=True) if name in values else "absent"


# ---------------------------------------------------------------------------------------------
# Files
# ---------------------------------------------------------------------------------------------


def nested_caches(folder: Path) -> list[Path]:
    """The caches in a folder's own folders, by name; `precompute` makes one for each target."""
    return sorted(path.parent for path in folder.glob(f"*/{FILE_NAME}"))


def view_path(folder: Path, view_id: int, suffix: str = ".dlc") -> Path:
    return folder / f"view-{view_id:05d}{suffix}"


def views_on_disk(folder: Path) -> list[int]:
    """Ids of the view files in a folder, complete or not, in order."""
    return view_files(folder, ".dlc")[0]


def view_files(folder: Path, suffix: str) -> tuple[list[int], list[str]]:
    """Of the files `view-*SUFFIX`: ids of views, in order, and the names that no view has."""
    ids, strays = [], []
    for path in sorted(folder.glob(f"view-*{suffix}")):
        digits = path.name.removeprefix("view-").removesuffix(suffix)
        view_id = int(digits) if digits.isdecimal() else VIEW_LIMIT
        if view_id < VIEW_LIMIT and view_path(folder, view_id, suffix) == path:
            ids.append(view_id)
        else:
            strays.append(path.name)
    return sorted(ids), strays


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of the cache in a folder.

    Raises:
        CacheError: there is none, or it is damaged.
    """
    path = folder / FILE_NAME
    try:
        values = read_json(path, _MAX_FILE_BYTES)
    except (FileNotFoundError, NotADirectoryError):
        from deit_fast.cache.foreign import open_foreign

        what = f"is not a cache: it has no {FILE_NAME}"
        if (foreign := open_foreign(folder)) is not None:
            what = f"holds files of {foreign.name}, which no run can use: {foreign.replay}"
        if not os.path.lexists(folder):
            what = "is no cache: it does not exist; check the path, or make it by `precompute`"
        elif nested := nested_caches(folder):
            names = ", ".join(path.name for path in nested)
            what = f"is not a cache itself, but holds caches: name one of its folders, {names}"
        raise CacheError(f"{folder} {what}") from None
    except InputError as error:
        raise CacheError(str(error)) from None
    return check_manifest(values, str(path))


def publish_manifest(folder: Path, manifest: Mapping[str, Any]) -> dict[str, Any]:
    """Write the manifest into the folder, or compare it with the one that is there.

    If several processes publish at once, one of them writes; all return what it wrote. A cache of
    an older format keeps it.

    Raises:
        CacheMismatch: the folder holds a cache made under other settings.
    """
    checked = check_manifest(manifest, "manifest")
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / FILE_NAME
    if not path.exists():
        create_atomically(path, sealed_json(checked))
    return matching_manifest(folder, checked)


def matching_manifest(folder: Path, manifest: Mapping[str, Any]) -> dict[str, Any]:
    """The manifest in the folder, which may be of an older format and else equals ``manifest``.

    Raises:
        CacheMismatch: names every differing field.
    """
    present = read_manifest(folder)
    require_equal(folder, present, {**manifest, "format": present["format"]}, only=False)
    return present


@contextmanager
def format_errors() -> Iterator[None]:
    """The extension's FormatError, which names file and block, as CacheError."""
    try:
        yield
    except _C.FormatError as error:
        raise CacheError(str(error)) from None
