"""What goes in comes out within its codec's bound, whoever wrote it and in whatever order."""

from __future__ import annotations

import hashlib
import json
import math
import multiprocessing
import struct
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch

from deit_fast import _C
from deit_fast.cache import (
    CODECS,
    CacheError,
    CacheMismatch,
    LogitCache,
    LogitCacheWriter,
    info,
    verify,
)
from deit_fast.errors import InputError
from deit_fast.kernels import TopK
from deit_fast.runtime.files import open_atomically
from helpers.caches import (
    CLASSES,
    SAMPLES,
    codec_of,
    edit_manifest,
    file_bytes,
    make_logits,
    make_manifest,
    pending_blocks,
    true_log_probs,
    write_cache,
)

# ---------------------------------------------------------------------------------------------
# Codecs
# ---------------------------------------------------------------------------------------------


def test_record_sizes():
    assert codec_of(classes=1000).record_bytes == 72  # k=16, one temperature
    assert codec_of(classes=65536, k=10).record_bytes == 48
    assert codec_of(classes=65537, k=10, temperatures=(1.0, 2.0)).record_bytes == 76
    assert codec_of("sampled", 1000, k=6, draws=8).record_bytes == 48
    assert codec_of("sampled", 1000, k=0, draws=23).record_bytes == 48
    assert codec_of("sampled", 65537, k=1, draws=2, temperatures=(1.0, 2.0)).record_bytes == 38
    assert codec_of("hard", 65536).record_bytes == 2
    assert codec_of("hard", 65537).record_bytes == 4
    assert codec_of("dense-bf16", 1000).record_bytes == 2000
    assert codec_of("dense-fp32", 1000).record_bytes == 4000


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize(
    ("name", "relative", "absolute"),
    [
        ("dense-fp16", 2**-11, 2**-25),
        ("dense-bf16", 2**-8, 0.0),
        ("dense-fp32", 2**-24, 0.0),
    ],
)
def test_dense_stays_within_its_bound(name, relative, absolute, dtype):
    logits = (make_logits(1) * torch.logspace(-8, 3, SAMPLES)[:, None]).to(dtype)
    codec = codec_of(name)
    decoded = codec.decode(codec.encode(logits), 1.0)
    assert str(decoded.dtype) == {"dense-fp16": "torch.float16", "dense-bf16": "torch.bfloat16",
                                  "dense-fp32": "torch.float32"}[name]  # fmt: skip
    error = (decoded.double() - logits.double()).abs()
    assert (error <= relative * logits.double().abs() + absolute).all()
    if name == "dense-fp32" and dtype != torch.float64:
        assert error.max() == 0


@pytest.mark.parametrize("tau", [0.5, 1.0, 3.0, 20.0])
@pytest.mark.parametrize("scale", [0.01, 1.0, 100.0, 1e4])
@pytest.mark.parametrize("k", [1, 5, CLASSES - 1, CLASSES])
def test_topk_stays_within_its_bound(k, scale, tau):
    logits = make_logits(2) * scale
    codec = codec_of(k=k, temperatures=(1.0, tau))
    decoded = codec.decode(codec.encode(logits), tau)
    exact = true_log_probs(logits, tau)
    ids = decoded.ids.long()
    assert isinstance(decoded, TopK)
    assert torch.equal(ids, exact.argsort(1, descending=True)[:, :k])

    largest = true_log_probs(logits).gather(1, ids).abs().amax(1, keepdim=True).clamp(max=65504.0)
    inside = exact.gather(1, ids)
    stored = inside.abs() * tau < 60000  # beyond float16 the docstring promises a clamp only
    error = (decoded.log_probs.double() - inside).abs()
    assert (error <= largest / (1024 * tau) + 1e-5 + (~stored) * 1e9).all()
    assert torch.isfinite(decoded.log_probs).all()

    if k == CLASSES:
        assert (decoded.log_tail == -math.inf).all()
        mass = decoded.log_probs.double().exp().sum(1)
    else:
        tail = exact.scatter(1, ids, -math.inf).logsumexp(1)
        bound = 1e-6 * tail.abs().clamp(min=1)
        assert ((decoded.log_tail.double() - tail).abs() <= bound).all()
        mass = decoded.log_probs.double().exp().sum(1) + decoded.log_tail.double().exp()
    assert (mass - 1).abs().max() < 2e-6


def test_topk_tail_of_a_sure_and_of_a_clueless_teacher():
    sure = torch.full((1, 1000), -40.0)
    sure[0, 3] = 40.0  # the mass outside is 1 - 1 in float32, and in float64 too
    codec = codec_of(classes=1000, k=1)
    tail = codec.decode(codec.encode(sure), 1.0).log_tail.item()
    assert tail == pytest.approx(math.log(999) - 80, rel=1e-6)

    flat = codec_of(classes=60000, k=1)
    decoded = flat.decode(flat.encode(torch.zeros(1, 60000)), 1.0)
    assert decoded.log_probs.item() == pytest.approx(-math.log(60000), abs=1e-4)
    assert decoded.log_tail.item() == pytest.approx(math.log1p(-1 / 60000), rel=1e-5)


def test_ties_go_to_the_lowest_ids():
    generator = torch.Generator().manual_seed(0)
    logits = torch.randint(-2, 3, (200, CLASSES), generator=generator).bfloat16()
    minus = torch.rand(logits.shape, generator=generator) < 0.5
    logits[(logits == 0) & minus] = -0.0  # ties with 0.0
    stable = torch.sort(logits.float(), dim=1, descending=True, stable=True).indices
    codec = codec_of(k=9)
    assert torch.equal(codec.decode(codec.encode(logits), 1.0).ids.long(), stable[:, :9])
    labels = codec_of("hard")
    assert torch.equal(labels.decode(labels.encode(logits), 1.0), stable[:, 0])


@pytest.mark.parametrize("classes", [65536, 65537, 70000])
def test_many_classes(classes):
    logits = torch.zeros(3, classes)
    logits[0, classes - 1] = 9.0
    logits[1, 40000] = 9.0  # an int16 would make -25536 of it
    logits[2, 0] = 9.0
    best = torch.tensor([classes - 1, 40000, 0])
    hard, topk = codec_of("hard", classes), codec_of(classes=classes, k=3)  # odd k: 6k bytes of ids
    assert torch.equal(hard.decode(hard.encode(logits), 1.0), best)
    decoded = topk.decode(topk.encode(logits), 1.0)
    assert torch.equal(decoded.ids[:, 0].long(), best)
    assert decoded.ids[2].tolist() == [0, 1, 2]


def test_temperatures_are_recorded_or_refused():
    codec = codec_of(k=4, temperatures=(4.0, 1.0, 4.0, 2.5))
    assert codec.temperatures == (1.0, 2.5, 4.0)
    raw = codec.encode(make_logits(0))
    tails = [codec.decode(raw, tau).log_tail for tau in (1.0, 2.5, 4.0)]
    assert (tails[0] < tails[1]).all()
    assert (tails[1] < tails[2]).all()
    with pytest.raises(CacheError, match=r"temperature 3; recorded: 1, 2\.5, 4"):
        codec.decode(raw, 3.0)


def test_a_row_does_not_depend_on_its_batch():
    logits = make_logits(3, 64, 1000)
    codec = codec_of(classes=1000, temperatures=(1.0, 2.0))
    together = codec.encode(logits)
    apart = torch.cat([codec.encode(logits[i : i + 1]) for i in range(64)])
    assert torch.equal(together, apart)


@pytest.mark.parametrize("name", CODECS)
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_logit_that_is_not_finite_names_its_sample(tmp_path, name, value):
    logits = make_logits(0)
    logits[4, 2] = value
    with (
        LogitCacheWriter(tmp_path, make_manifest(name)) as writer,
        pytest.raises(CacheError, match=rf"view 3 sample 40: teacher logit {value:g} is not"),
    ):
        writer.write(torch.arange(SAMPLES).flip(0), 3, logits)


def test_a_logit_beyond_fp16_is_refused(tmp_path):
    logits = make_logits(0)
    logits[7, 0] = 70000.0
    with (
        LogitCacheWriter(tmp_path, make_manifest("dense-fp16")) as writer,
        pytest.raises(CacheError, match="view 0 sample 7: teacher logit 70000 does not fit fp16"),
    ):
        writer.write(torch.arange(SAMPLES), 0, logits)


@pytest.mark.parametrize("k", [0, CLASSES + 1])
def test_k_beyond_the_classes_is_refused(k):
    with pytest.raises(InputError, match=r"codec\.k must"):
        codec_of(k=k)


# ---------------------------------------------------------------------------------------------
# Checksum
# ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("function", [_C.crc32c, _C.crc32c_table, _C.crc32c_hardware])
def test_crc32c_known_values(function):
    if function is _C.crc32c_hardware and not _C.crc32c_has_hardware():
        pytest.skip("this CPU has no CRC32C instruction")
    assert function(b"") == 0
    assert function(b"123456789") == 0xE3069283
    assert function(bytes(32)) == 0x8A9136AA  # this and the next three: RFC 3720, B.4
    assert function(b"\xff" * 32) == 0x62A8AB43
    assert function(bytes(range(32))) == 0x46DD794E
    assert function(bytes(range(31, -1, -1))) == 0x113FDB5C
    assert function(b"6789", function(b"12345")) == 0xE3069283


def test_crc32c_paths_agree():
    data = np.random.default_rng(0).bytes(300)
    for start in range(9):
        for stop in range(start, 300, 7):
            part = data[start:stop]
            assert _C.crc32c(part) == _C.crc32c_table(part) == slow_crc32c(part)
            if _C.crc32c_has_hardware():
                assert _C.crc32c_hardware(part) == slow_crc32c(part)


# ---------------------------------------------------------------------------------------------
# A second reader, written from docs/cache-format.md alone
# ---------------------------------------------------------------------------------------------


def slow_crc32c(data: bytes) -> int:
    crc = 0xFFFFFFFF
    for byte in data:
        crc ^= byte
        for _ in range(8):
            crc = (crc >> 1) ^ (0x82F63B78 if crc & 1 else 0)
    return crc ^ 0xFFFFFFFF


def slow_records(folder: Path, view: int) -> tuple[dict, list[bytes]]:
    """The manifest and every record of a view."""
    manifest = json.loads((folder / "manifest.json").read_text())
    raw = (folder / f"view-{view:05d}.dlc").read_bytes()
    fields = struct.unpack_from("<8sIIQIIQQ32s", raw)
    count, size, per_block = (manifest[k] for k in ("num_samples", "record_bytes", "block_records"))
    blocks = math.ceil(count / per_block)
    data = math.ceil((4096 + 8 * blocks) / 4096) * 4096
    hashed = {key: value for key, value in manifest.items() if key not in ("info", "crc32c")}
    text = json.dumps(hashed, sort_keys=True, separators=(",", ":"))
    digest = hashlib.sha256(text.encode()).digest()
    version = manifest["format"]
    assert fields == (b"DFLOGIT1", version, 4096, count, size, per_block, view, data, digest)
    assert raw[80:4092] == bytes(4012)
    assert raw[4092:4096] == struct.pack("<I", slow_crc32c(raw[:4092]))
    assert raw[4096 + 8 * blocks : data] == bytes(data - 4096 - 8 * blocks)
    assert len(raw) == data + count * size
    for block in range(blocks):
        start, stop = block * per_block, min(count, (block + 1) * per_block)
        crc, state = struct.unpack_from("<II", raw, 4096 + 8 * block)
        assert state == 0x454E4F44
        place = digest + struct.pack("<QQ", view, block) if version == 3 else b""
        assert crc == slow_crc32c(place + raw[data + start * size : data + stop * size])
    return manifest, [raw[data + i * size : data + (i + 1) * size] for i in range(count)]


def slow_decode(codec: dict, record: bytes, tau: float) -> tuple:
    """hard: (id,); topk: (ids, log-probabilities, log tail); sampled: (probabilities,);
    dense: (logits,)."""
    classes, k = codec["num_classes"], codec["k"]
    letter = "H" if classes <= 65536 else "I"
    if codec["name"] == "hard":
        return struct.unpack(f"<{letter}", record)
    if codec["name"] == "dense-bf16":
        words = struct.unpack(f"<{classes}H", record)
        return (tuple(struct.unpack("<f", struct.pack("<I", word << 16))[0] for word in words),)
    if codec["name"] in ("dense-int8", "dense-fp8"):
        start, step = struct.unpack_from("<2f", record)
        value = int if codec["name"] == "dense-int8" else slow_fp8
        return (tuple(start + value(code) * step for code in record[8:]),)
    if codec["name"] == "sampled":
        return slow_sampled(codec, record, tau)
    if codec["name"] != "topk":
        return (
            struct.unpack(f"<{classes}{'e' if codec['name'] == 'dense-fp16' else 'f'}", record),
        )
    temperatures = codec["temperatures"]
    values = struct.unpack(f"<{k}{letter}{k}e{2 * len(temperatures)}f", record)
    tail, norm = values[2 * k + 2 * temperatures.index(tau) :][:2]
    return values[:k], tuple(value / tau - norm for value in values[k : 2 * k]), tail


def slow_sampled(codec: dict, record: bytes, tau: float) -> tuple:
    classes, k, draws, temperatures = (
        codec[name] for name in ("num_classes", "k", "draws", "temperatures")
    )
    letter, count, index = (
        "H" if classes <= 65536 else "I",
        len(temperatures),
        codec["temperatures"].index(tau),
    )
    leading = max(k, 1)
    layout = f"<{leading + count * draws}{letter}" + (f"{k}e{2 * count}f" if k else "")
    values = struct.unpack(layout, record)
    probs = [0.0] * classes
    drawn = values[leading + index * draws :][:draws]
    tail = 0.0
    if k:
        halves = values[leading + count * draws :]
        tail, norm = halves[k + 2 * index :][:2]
        for id, half in zip(values[:k], halves[:k], strict=True):
            probs[id] = math.exp(half / tau - norm)
    for id in drawn:
        probs[id] += math.exp(tail) / draws
    return (probs,)


def slow_fp8(code: int) -> float:
    sign, exponent, mantissa = code >> 7, code >> 3 & 15, code & 7
    size = mantissa / 512 if exponent == 0 else (1 + mantissa / 8) * 2.0 ** (exponent - 7)
    return -size if sign else size


@pytest.mark.parametrize(("name", "classes"), [(name, CLASSES) for name in CODECS] + [
    ("hard", 70000), ("topk", 70000), ("sampled", 70000)])  # fmt: skip
def test_a_reader_written_from_the_format_page_agrees(tmp_path, name, classes):
    settings = {"k": 5, "temperatures": (1.0, 2.0)} if name in ("topk", "sampled") else {}
    manifest = make_manifest(name, classes=classes, samples=21, block=8, **settings)
    cache = write_cache(tmp_path, manifest, views=(0, 123456))
    for view in (0, 123456):
        values, records = slow_records(tmp_path, view)
        slow = [slow_decode(values["codec"], record, 2.0) for record in records]
        fast = cache.gather(torch.arange(21), view, tau=2.0)
        if name == "hard":
            assert fast.tolist() == [row[0] for row in slow]
        elif name == "topk":
            assert fast.ids.tolist() == [list(row[0]) for row in slow]
            assert np.allclose(fast.log_probs, [row[1] for row in slow], rtol=0, atol=2e-6)
            assert fast.log_tail.tolist() == [row[2] for row in slow]
        elif name == "sampled":
            made = torch.zeros(21, classes).scatter_(1, fast.ids.long(), fast.log_probs.exp())
            assert np.allclose(made, [row[0] for row in slow], rtol=0, atol=2e-6)
        elif name in ("dense-int8", "dense-fp8"):  # two roundings to float32
            assert np.allclose(fast, [row[0] for row in slow], rtol=0, atol=4e-6)
        else:
            assert fast.float().tolist() == [list(row[0]) for row in slow]


# ---------------------------------------------------------------------------------------------
# Writing
# ---------------------------------------------------------------------------------------------


def write_share(path: str, manifest: dict, rank: int, world: int, seed: int) -> None:
    """Every world-th block of two views, samples shuffled, in batches of random size."""
    rng = np.random.default_rng(seed)
    with LogitCacheWriter(path, manifest) as writer:
        for view in (0, 1):
            logits = make_logits(view)
            mine = [b for b in range(writer.num_blocks) if (view + b) % world == rank]
            ids = np.concatenate([np.arange(*writer.block_range(b)) for b in mine] or [[]])
            ids = rng.permutation(ids.astype(np.int64))
            while len(ids):
                size = int(rng.integers(1, 9))
                writer.write(ids[:size], view, logits[ids[:size]])
                ids = ids[size:]


@pytest.mark.dist
def test_bytes_do_not_depend_on_world_size_or_order(tmp_path):
    manifest = make_manifest(k=6, block=4)
    context = multiprocessing.get_context("forkserver")
    results = []
    for world in (1, 2, 3, 4):
        path = tmp_path / str(world)
        workers = [
            context.Process(
                target=write_share, args=(str(path), manifest, r, world, 10 * world + r)
            )
            for r in range(world)
        ]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join(60)
        assert [worker.exitcode for worker in workers] == [0] * world
        results.append(file_bytes(path))
    assert results[0] == results[1] == results[2] == results[3]
    assert set(results[0]) == {"manifest.json", "view-00000.dlc", "view-00001.dlc"}
    cache = LogitCache.open(tmp_path / "3")
    assert cache.views == [0, 1]
    ids = torch.arange(SAMPLES)
    assert torch.equal(
        cache.gather(ids, 1).ids.long(), make_logits(1).argsort(1, descending=True)[:, :6]
    )


def test_pending_and_incomplete_blocks(tmp_path):
    manifest = make_manifest()
    logits = make_logits(0)
    with LogitCacheWriter(tmp_path, manifest) as writer:
        assert writer.num_blocks == 3
        assert [writer.block_range(b) for b in range(3)] == [(0, 16), (16, 32), (32, 45)]
        assert pending_blocks(writer, [0, 9]) == [(v, b) for v in (0, 9) for b in range(3)]
        writer.write(np.arange(20), 0, logits[:20])  # block 1 stays incomplete
        assert writer.is_done(0, 0)
        assert pending_blocks(writer, [0]) == [(0, 1), (0, 2)]
    with LogitCacheWriter(tmp_path, manifest) as writer:
        assert pending_blocks(writer, range(1)) == [(0, 1), (0, 2)]
        before = file_bytes(tmp_path)
        writer.write(np.arange(16), 0, -logits[:16])  # done before: skipped
        assert file_bytes(tmp_path) == before
        writer.write(np.arange(16, 45), 0, logits[16:])
    assert LogitCache.open(tmp_path).views == [0]
    decoded = LogitCache.open(tmp_path).gather(np.arange(45), 0)
    assert torch.equal(decoded.ids.long(), logits.argsort(1, descending=True)[:, :16])


def test_wrong_samples_are_refused_and_nothing_is_taken(tmp_path):
    logits = make_logits(0)
    with LogitCacheWriter(tmp_path, make_manifest()) as writer:
        for ids, why in [
            ([3, 45], r"sample id 45 is not in \[0, 45\)"),
            ([3, -1], "sample id -1 is not"),
            ([3, 4, 3], "view 0 sample 3 was written twice"),
            ([0.5, 1.5], "must be integers"),
        ]:
            with pytest.raises(InputError, match=why):
                writer.write(ids, 0, logits[: len(ids)])
        with pytest.raises(InputError, match="2 sample ids came with 3 rows"):
            writer.write([3, 4], 0, logits[:3])
        with pytest.raises(InputError, match=r"must be float \[n, 20\], not float32 \[2, 19\]"):
            writer.write([3, 4], 0, logits[:2, :19])
        with pytest.raises(InputError, match=r"must be float \[n, 20\], not int64"):
            writer.write([3, 4], 0, logits[:2].long())
        with pytest.raises(InputError, match="view id -1"):
            writer.write([3, 4], -1, logits[:2])
        writer.write([3, 4], 0, logits[:2])
        with pytest.raises(InputError, match="view 0 sample 4 was written twice"):
            writer.write([5, 4], 0, logits[:2])
        rest = [i for i in range(16) if i not in (3, 4)]
        writer.write(rest, 0, logits[rest])
        assert writer.is_done(0, 0)
        with pytest.raises(InputError, match="view 0 sample 4 was written twice"):
            writer.write([4], 0, logits[:1])
    with pytest.raises(InputError, match="is closed"):
        writer.write([20], 0, logits[:1])


def test_an_orphan_of_a_killed_process_is_removed_and_a_file_being_written_stays(tmp_path):
    orphan = tmp_path / ".tmp-0123456789abcdef"
    orphan.touch()
    with open_atomically(tmp_path / "other") as file, LogitCacheWriter(tmp_path, make_manifest()):
        file.write(b"content")
        assert not orphan.exists()
        assert len(list(tmp_path.glob(".tmp-*"))) == 1
    assert (tmp_path / "other").read_bytes() == b"content"


# ---------------------------------------------------------------------------------------------
# Manifest
# ---------------------------------------------------------------------------------------------


def test_another_manifest_names_every_difference(tmp_path):
    write_cache(tmp_path, make_manifest())
    other = make_manifest(k=4, block=8, samples=46)
    other["fingerprint"] |= {"view.seed": 8, "view.new": [1]}
    del other["fingerprint"]["teacher.name"]
    with pytest.raises(CacheMismatch) as caught:
        LogitCacheWriter(tmp_path, other)
    text = str(caught.value)
    assert text.startswith(f"cache {tmp_path} differs in 7 fields: ")
    for part in (
        "codec.k is 16, expected 4",
        "block_records is 16, expected 8",
        "num_samples is 45, expected 46",
        "record_bytes is 72, expected 24",
        "view.seed is 7, expected 8",
        "view.new is absent, expected [1]",
        'teacher.name is "n\\u00e4ive", expected absent',
    ):
        assert part in text
    assert "view.mean" not in text and "this cache fits" not in text
    assert text.endswith("; give the settings that it was made with, or name another cache")
    assert "\n" not in text


@pytest.mark.parametrize(
    ("field", "value", "flags"),
    [
        ("view.flip_prob", 0.25, "--view.flip-prob 0.25"),
        ("view.crop_scale", [0.2, 1], "--view.crop-scale 0.2 1"),
        ("view.augment", "none", "--view.augment none"),
        ("view.augment", "no\nne", None),  # of a file that somebody else made
        ("teacher.batch", 64, "--teacher-batch 64"),
        ("view.size_schedule", [[0, 160], [5, 224]], None),
        ("view.repeats", 3, None),  # --num-views depends on it
        ("view.plan", 1, None),
        ("dataset.sha256", "ab", None),
    ],
)
def test_another_manifest_names_the_flags_that_fit(tmp_path, field, value, flags):
    manifest, other = make_manifest(), make_manifest()
    manifest["fingerprint"] |= {"view.seed": 7, field: value}
    other["fingerprint"] |= {"view.seed": 8, field: 999}
    write_cache(tmp_path, manifest)
    with pytest.raises(CacheMismatch) as caught:
        LogitCacheWriter(tmp_path, other)
    if flags is None:
        assert "this cache fits" not in str(caught.value)
        return
    named = str(caught.value).rpartition("; this cache fits with ")[2]
    assert {*named.split()} == {*flags.split(), "--view.seed", "7"}


def test_info_is_not_compared_and_numbers_by_value(tmp_path):
    write_cache(tmp_path, make_manifest())
    same = make_manifest() | {"info": {"date": "today"}}
    same["fingerprint"]["view.seed"] = 7.0
    with LogitCacheWriter(tmp_path, same) as writer:
        assert pending_blocks(writer, [0]) == []
    true = make_manifest()
    true["fingerprint"]["view.seed"] = True
    with pytest.raises(CacheMismatch, match=r"one field: view\.seed is 7, expected true"):
        LogitCacheWriter(tmp_path, true)


def test_require(tmp_path):
    cache = write_cache(tmp_path, make_manifest())
    cache.require({"view.seed": 7, "view.mean": (0.5, 1, 1e-05), "codec.k": 16})
    cache.require({"codec": {"name": "topk"}, "fingerprint": {"view.seed": 7}, "num_samples": 45})
    with pytest.raises(CacheMismatch) as caught:
        cache.require({"view.seed": 9, "view.mean": [0.5, 1, 1], "view.x": 1, "codec.k": 16})
    assert "3 fields" in str(caught.value)
    assert "view.x is absent, expected 1" in str(caught.value)


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"format": 1}, "format is 1, this version reads 2 and 3"),
        ({"format": 3.0}, r"format is 3\.0, this version reads"),
        ({"format": True}, "format is True, this version reads"),
        ({"format": [2]}, r"format is \[2\], this version reads"),
        ({"num_samples": 0}, "num_samples must lie in"),
        ({"num_samples": True}, "num_samples must lie in"),
        ({"block_records": 2**40}, "block_records must lie in"),
        ({"record_bytes": 67}, "record_bytes is 67, the codec has 72"),
        ({"codec": {"name": "zip"}}, "codec needs"),
        ({"codec": []}, "codec must be a JSON object"),
        ({"fingerprint": 3}, "fingerprint must be a JSON object"),
        ({"extra": 1}, "missing or unknown: extra"),
    ],
)
def test_a_manifest_with_a_wrong_field_is_refused(tmp_path, change, why):
    write_cache(tmp_path, make_manifest())
    file = edit_manifest(tmp_path, **change)
    with pytest.raises(CacheError, match=why) as caught:
        LogitCache.open(tmp_path)
    assert str(file) in str(caught.value)


@pytest.mark.parametrize("field", ["name", "k", "temperatures", "num_classes"])
@pytest.mark.parametrize("value", [None, -1, 0, "x", [], [-1.0], {}, 10**30, [True], 1.5])
def test_a_manifest_with_a_wrong_codec_is_refused(tmp_path, field, value):
    write_cache(tmp_path, make_manifest())
    codec = LogitCache.open(tmp_path).manifest["codec"]
    edit_manifest(tmp_path, codec=codec | {field: value})
    with pytest.raises(CacheError, match=r"manifest\.json"):
        LogitCache.open(tmp_path)


@pytest.mark.parametrize("text", ["", "{", "[]", "3", "\x00", "[" * 100_000, '{"format": NaN}'])
def test_a_manifest_that_is_not_one_is_refused(tmp_path, text):
    write_cache(tmp_path, make_manifest())
    (tmp_path / "manifest.json").write_text(text)
    with pytest.raises(CacheError, match=r"manifest\.json"):
        LogitCache.open(tmp_path)


def test_an_edited_fingerprint_is_refused_by_the_views(tmp_path):
    write_cache(tmp_path, make_manifest())
    fingerprint = LogitCache.open(tmp_path).manifest["fingerprint"]
    edit_manifest(tmp_path, fingerprint=fingerprint | {"view.seed": 8})
    with pytest.raises(CacheError, match=r"view-00000\.dlc: was written under another manifest"):
        LogitCache.open(tmp_path).gather([0], 0)


def test_no_cache_there(tmp_path):
    with pytest.raises(CacheError, match="it does not exist; check the path, or make it by `prec"):
        LogitCache.open(tmp_path / "nowhere")


# ---------------------------------------------------------------------------------------------
# Reading
# ---------------------------------------------------------------------------------------------


def test_gather_equals_numpy_on_the_file(tmp_path):
    views = (0, 2, 7)
    manifest = make_manifest("dense-fp32")
    cache = write_cache(tmp_path, manifest, views)
    values = SAMPLES * CLASSES
    files = {
        view: np.fromfile(tmp_path / f"view-{view:05d}.dlc", "<f4")[-values:].reshape(SAMPLES, -1)
        for view in views
    }
    rng = np.random.default_rng(0)
    for size in (0, 1, 7, 300):
        samples = rng.integers(0, SAMPLES, size)
        which = rng.choice(views, size)
        expected = [files[v][s] for s, v in zip(samples, which, strict=True)]
        got = cache.gather(torch.from_numpy(samples), torch.from_numpy(which).int())
        assert got.shape == (size, CLASSES)
        assert np.array_equal(got.numpy(), np.array(expected).reshape(size, CLASSES))
    assert torch.equal(cache.gather([5, 5], 2), make_logits(2)[[5, 5]])


def test_what_is_not_there_is_an_error(tmp_path):
    cache = write_cache(tmp_path, make_manifest())
    with LogitCacheWriter(tmp_path, make_manifest()) as writer:
        writer.write(np.arange(16), 1, make_logits(1)[:16])
    assert cache.views == [0]
    with pytest.raises(CacheError, match=r"view 5 is not in the cache: .*view-00005\.dlc"):
        cache.gather([0, 1], [0, 5])
    with pytest.raises(CacheError, match=r"view-00001\.dlc: view 1 is incomplete: block 1"):
        cache.gather([0], 1)  # block 0 is there; the view is not
    for samples, views, why in [
        ([45], 0, r"sample id 45 is not in \[0, 45\)"),
        ([-1], 0, "sample id -1"),
        ([0], -1, "view id -1"),
        ([0, 1], [0], r"must be \[n\]"),
        ([0.5], 0, "must be integers"),
    ]:
        with pytest.raises(InputError, match=why):
            cache.gather(samples, views)


def test_a_view_that_was_incomplete_can_be_read_once_it_is_complete(tmp_path):
    cache = write_cache(tmp_path, make_manifest())
    with LogitCacheWriter(tmp_path, make_manifest()) as writer:
        writer.write(np.arange(16), 1, make_logits(1)[:16])
        with pytest.raises(CacheError, match="incomplete"):
            cache.gather([0], 1)
        writer.write(np.arange(16, 45), 1, make_logits(1)[16:])
    assert cache.gather([44], 1).ids[0, 0] == make_logits(1)[44].argmax()


def test_threads_gather_at_once(tmp_path):
    views = (0, 1, 2)
    cache = write_cache(tmp_path, make_manifest("dense-fp32", samples=400, block=7), views)
    expected = torch.stack([make_logits(view, 400) for view in views])
    wrong: list[int] = []
    barrier = threading.Barrier(8)

    def work(seed: int) -> None:
        rng = np.random.default_rng(seed)
        barrier.wait()  # all at the first touch of every block
        for _ in range(40):
            samples, which = rng.integers(0, 400, 100), rng.integers(0, 3, 100)
            if not torch.equal(cache.gather(samples, which), expected[which, samples]):
                wrong.append(seed)

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(work, range(8)))
    assert wrong == []


def test_info_and_verify(tmp_path):
    write_cache(tmp_path, make_manifest(), (0, 2))
    with LogitCacheWriter(tmp_path, make_manifest()) as writer:
        writer.write(np.arange(16), 1, make_logits(1)[:16])
    facts = info(tmp_path)
    assert facts["complete_views"] == [0, 2]
    assert facts["codec"]["name"] == "topk"
    assert facts["fingerprint"]["view.seed"] == 7
    assert facts["bytes"] == 3 * (8192 + 45 * 72)
    assert facts["views"][1] == {
        "view": 1, "file": "view-00001.dlc", "blocks": 3, "complete": 1, "pending": 2, "broken": 0,
    }  # fmt: skip
    seen = []
    report = verify(tmp_path, lambda done, total: seen.append((done, total)))
    assert report["ok"]
    assert (report["blocks"], report["complete"], report["pending"]) == (9, 7, 2)
    assert seen == [(i + 1, 9) for i in range(9)]
    json.dumps([facts, report])  # plain data
