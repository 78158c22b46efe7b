"""Caches of features, and records that stand in the order in which training visits them."""

from __future__ import annotations

import itertools
import json

import numpy as np
import pytest
import torch

from deit_fast import _C
from deit_fast.cache import (
    FEATURE_CODECS,
    CacheError,
    CacheMismatch,
    LogitCache,
    LogitCacheWriter,
    build_feature_manifest,
    feature_codec,
    info,
    record_order,
    verify,
)
from deit_fast.cache.format import feature_block_records, view_path
from deit_fast.cache.verify import pick_pixels, pixels_path, read_pixels, sampled_ids, write_pixels
from deit_fast.errors import InputError
from deit_fast.views.order import EpochOrder, TrainBatches, pairing, visiting_order
from deit_fast.views.rng import philox
from helpers.caches import (
    BLOCK,
    SAMPLES,
    edit_manifest,
    file_bytes,
    make_feature_manifest,
    make_features,
    make_logits,
    make_manifest,
    write_features,
    write_view,
)

ALL = np.arange(SAMPLES)


def stored(name: str, view: int) -> torch.Tensor:
    codec = feature_codec(name, 4, 6)
    return codec.decode(codec.encode(make_features(view)), 1.0)


# ---------------------------------------------------------------------------------------------
# Manifest
# ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("record_bytes", "records"),
    [(1, 4096), (388, 4096), (1024, 4096), (1025, 2048), (76_832, 32), (2**22, 1), (2**23, 1)],
)
def test_blocks_of_features_are_a_power_of_two_below_four_mebibytes(record_bytes, records):
    assert feature_block_records(record_bytes) == records
    assert records * record_bytes <= 2**22 or records == 1


def test_a_manifest_says_what_a_record_holds():
    fingerprint = {"view.seed": 1, "view.repeats": 3}
    manifest = build_feature_manifest(
        "fp8", tokens=196, width=384, num_samples=1_281_167, fingerprint=fingerprint
    )
    assert manifest["codec"] == {"name": "fp8", "tokens": 196, "width": 384}
    assert manifest["record_bytes"] == 196 * 388 and manifest["block_records"] == 32
    assert manifest["order"] == "pairs" and manifest["format"] == 3
    largest = build_feature_manifest(
        "fp32", tokens=1024, width=4096, num_samples=10, fingerprint=fingerprint
    )
    assert largest["record_bytes"] == 2**24 and largest["block_records"] == 1
    with pytest.raises(CacheError, match="record_bytes must lie in"):
        build_feature_manifest(
            "fp32", tokens=1024, width=4097, num_samples=10, fingerprint=fingerprint
        )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"order": "triples"}, "order must be 'pairs', not 'triples'"),
        ({"order": None}, "order must be 'pairs', not None"),
        ({"order": ["pairs"]}, "order must be 'pairs', not"),
        ({"fingerprint": {"view.seed": 7}}, "order 'pairs' needs view.repeats"),
        ({"fingerprint": {"view.repeats": 0, "view.seed": 7}}, "needs view.repeats .* not 0"),
        ({"fingerprint": {"view.repeats": 3, "view.seed": True}}, "needs view.seed .* not True"),
        ({"codec": {"name": "fp8", "tokens": 4}}, "codec of features needs name, tokens, width"),
        ({"codec": {"name": "topk", "tokens": 4, "width": 6}}, "codec.name must be one of fp8"),
        (
            {"codec": {"name": "fp8", "tokens": 5, "width": 6}},
            "record_bytes is 40, the codec has 50",
        ),
        ({"extra": 1}, "fields missing or unknown: extra"),
    ],
)
def test_a_manifest_from_the_disk_is_not_trusted(tmp_path, change, message):
    write_features(tmp_path, make_feature_manifest())
    edit_manifest(tmp_path, **change)
    with pytest.raises(CacheError, match=message):
        LogitCache.open(tmp_path)


def test_another_order_tokens_or_width_is_refused_by_name(tmp_path):
    cache = write_features(tmp_path, make_feature_manifest())
    for manifest, field in (
        (make_feature_manifest(order=None), 'order is "pairs", expected absent'),
        (make_feature_manifest(tokens=6, width=4 - 1), "codec.tokens is 4, expected 6"),
        (make_feature_manifest("int8"), 'codec.name is "fp8", expected "int8"'),
        (make_manifest(), "codec.tokens is 4, expected absent"),
    ):
        with pytest.raises(CacheMismatch, match=field):
            LogitCacheWriter(tmp_path, manifest)
    cache.require({"codec.tokens": 4, "order": "pairs", "target.name": "patches"})
    with pytest.raises(CacheMismatch, match=r'target\.name is "patches", expected "cls"'):
        cache.require({"target.name": "cls"})


def test_an_order_that_is_edited_afterwards_is_refused(tmp_path):
    write_features(tmp_path, make_feature_manifest())
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    del manifest["order"], manifest["crc32c"]
    (tmp_path / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(CacheError, match="was written under another manifest"):
        LogitCache.open(tmp_path).gather(ALL, 0)


# ---------------------------------------------------------------------------------------------
# Order
# ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("samples", "repeats"), [(45, 3), (44, 3), (45, 1), (1, 3), (2, 2)])
def test_positions_and_samples_are_inverse(samples, repeats):
    order = record_order(make_feature_manifest(samples=samples, repeats=repeats))
    for view in range(2 * repeats + 1):
        row = order.samples(view, 0, samples)
        assert sorted(row.tolist()) == list(range(samples))
        assert np.array_equal(row, visiting_order(7, samples, view // repeats, view // repeats))
        assert np.array_equal(order.positions(row, np.asarray(view)), np.arange(samples))
        assert np.array_equal(order.samples(view, 1, samples), row[1:])
    mixed = np.arange(samples * 3) % samples, np.repeat([0, repeats, 2 * repeats], samples)
    apart = [order.positions(s[None], np.asarray(v))[0] for s, v in zip(*mixed, strict=True)]
    assert order.positions(*mixed).tolist() == apart
    plain = record_order(make_feature_manifest(order=None))
    assert np.array_equal(plain.positions(ALL, np.asarray(3)), ALL)
    assert np.array_equal(plain.samples(3, 5, 9), np.arange(5, 9))


@pytest.mark.parametrize(("samples", "repeats", "views"), [(200, 3, 6), (201, 2, 4), (60, 1, 3)])
def test_the_first_pass_of_training_reads_every_file_from_front_to_back(samples, repeats, views):
    """Each step reads contiguous records, which begin where those of the last step ended."""
    order = record_order(make_feature_manifest(samples=samples, repeats=repeats))
    batches = TrainBatches(EpochOrder(7, samples, views, repeats), 12 * repeats, epochs=views)
    seen = {view: [] for view in range(views)}
    for step in range(len(batches)):
        ids, view_ids = batches[step]
        positions = order.positions(ids, view_ids.astype(np.int64))
        for view in np.unique(view_ids).tolist():
            found = np.sort(positions[view_ids == view])
            assert np.array_equal(found, np.arange(found[0], found[-1] + 1))  # contiguous
            seen[view].append((int(found[0]), int(found[-1])))
    for spans in seen.values():
        assert len(spans) > 2
        gaps = [start - end for (_, end), (start, _) in itertools.pairwise(spans)]
        assert all(1 <= gap <= 13 * repeats for gap in gaps)  # an epoch's last views fill no batch
        assert sum(gap == 1 for gap in gaps) > len(gaps) / 2


def test_the_order_is_that_of_the_format_page():
    """Computed after docs/cache-format.md alone."""

    def permuted(count: int, cycle: int, purpose: int) -> np.ndarray:
        low, high, *_ = philox(np.arange(count), cycle, 0, purpose, (7, 0))
        keys = [(int(b) << 32) + int(a) for a, b in zip(low, high, strict=True)]
        return np.array(sorted(range(count), key=keys.__getitem__))

    for samples, view in ((45, 0), (45, 7), (44, 4)):
        p, q = permuted(samples, view // 3, 4), permuted(-(-samples // 2), view // 3, 5)
        expected = [int(p[i]) for pair in q for i in (2 * pair, 2 * pair + 1) if i < samples]
        order = record_order(make_feature_manifest(samples=samples))
        assert order.samples(view, 0, samples).tolist() == expected


def test_members_of_a_pair_stand_side_by_side():
    partner = np.full(SAMPLES, -1)
    pairs = pairing(7, SAMPLES, 1)
    partner[pairs[0:-1:2]], partner[pairs[1::2]] = pairs[1::2], pairs[0:-1:2]
    row = record_order(make_feature_manifest()).samples(4, 0, SAMPLES)
    single = int(np.flatnonzero(partner[row] < 0)[0])
    row = np.delete(row, single)
    assert np.array_equal(partner[row[::2]], row[1::2])


# ---------------------------------------------------------------------------------------------
# Writer and reader
# ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("order", ["pairs", None])
@pytest.mark.parametrize("name", FEATURE_CODECS)
def test_features_come_back_as_the_codec_stored_them(tmp_path, name, order):
    cache = write_features(tmp_path, make_feature_manifest(name, order=order), (0, 1, 4))
    draw = np.random.default_rng(0)
    samples = draw.integers(0, SAMPLES, 70)
    views = draw.choice([0, 1, 4], 70)
    expected = torch.stack(
        [stored(name, v)[s] for s, v in zip(samples, views.tolist(), strict=True)]
    )
    assert torch.equal(cache.gather(samples, views), expected)
    assert torch.equal(cache.gather(ALL, 4), stored(name, 4))
    records = cache.gather_records(samples, views)
    assert torch.equal(cache.codec.decode(records, 1.0), expected)
    [array] = cache.gather_arrays(samples, views.astype(np.int64), 1.0)
    assert np.array_equal(array, expected.float().numpy() if name == "bf16" else expected.numpy())


def test_the_file_holds_records_in_the_order_of_pairs(tmp_path):
    """Against a file written after docs/cache-format.md, not by the writer."""
    manifest = make_feature_manifest("fp32")
    write_features(tmp_path / "ours", manifest, (3,))
    row = visiting_order(7, SAMPLES, 1, 1)
    (tmp_path / "plain").mkdir()
    (tmp_path / "plain/manifest.json").write_text(json.dumps(manifest))
    write_view(tmp_path / "plain", manifest, 3, make_features(3)[row.copy()].numpy().tobytes())
    found = view_path(tmp_path / "plain", 3).read_bytes()
    assert found == view_path(tmp_path / "ours", 3).read_bytes()


def test_bytes_do_not_depend_on_the_order_of_writing(tmp_path):
    manifest = make_feature_manifest()
    write_features(tmp_path / "whole", manifest, (0, 3))
    draw = np.random.default_rng(1)
    with LogitCacheWriter(tmp_path / "parts", manifest) as writer:
        for view in (3, 0):
            for ids in np.array_split(draw.permutation(SAMPLES), 7):
                writer.write(ids, view, make_features(view)[ids])
    assert file_bytes(tmp_path / "whole") == file_bytes(tmp_path / "parts")


def test_two_writers_take_blocks_in_the_files_order(tmp_path):
    manifest = make_feature_manifest()
    write_features(tmp_path / "whole", manifest, (0,))
    writers = [
        LogitCacheWriter(tmp_path / "two", manifest, rank=rank, world_size=2) for rank in (0, 1)
    ]
    assert writers[0].num_blocks == 3
    for block in (2, 0, 1):
        ids = writers[0].block_samples(0, block)
        assert len(ids) == (BLOCK if block < 2 else SAMPLES - 2 * BLOCK)
        writers[block % 2].write(ids, 0, make_features(0)[ids])
        assert writers[0].is_done(0, block)
    for writer in writers:
        writer.close()
    assert file_bytes(tmp_path / "whole") == file_bytes(tmp_path / "two")


def test_an_interrupted_writer_resumes_by_blocks(tmp_path):
    manifest = make_feature_manifest()
    write_features(tmp_path / "whole", manifest, (0,))
    with LogitCacheWriter(tmp_path / "c", manifest) as writer:
        ids = np.concatenate([writer.block_samples(0, 1), writer.block_samples(0, 0)[:5]])
        writer.write(ids, 0, make_features(0)[ids])
    with LogitCacheWriter(tmp_path / "c", manifest) as writer:
        assert [writer.is_done(0, block) for block in range(3)] == [False, True, False]
        writer.write(ALL, 0, make_features(0))
    assert file_bytes(tmp_path / "whole") == file_bytes(tmp_path / "c")


def test_errors_of_the_writer_name_samples_and_not_positions(tmp_path):
    manifest = make_feature_manifest()
    with LogitCacheWriter(tmp_path, manifest) as writer:
        first = writer.block_samples(0, 0)
        assert first[5] != 5
        features = make_features(0)
        features[first[5], 2, 3] = float("inf")
        message = (
            rf"view 0 sample {first[5]}: teacher feature inf of token 2, channel 3 is not finite"
        )
        with pytest.raises(CacheError, match=message):
            writer.write(ALL, 0, features)
        writer.write(first[5:7], 0, make_features(0)[first[5:7]])
        with pytest.raises(InputError, match=f"view 0 sample {first[6]} was written twice"):
            writer.write(first[6:9], 0, make_features(0)[first[6:9]])
        with pytest.raises(InputError, match="sample id 45 is not in"):
            writer.write(ALL + 1, 0, make_features(0))
        with pytest.raises(InputError, match=r"features must be float \[n, 4, 6\]"):
            writer.write(ALL, 0, make_logits(0))


def test_ids_out_of_range_are_refused(tmp_path):
    cache = write_features(tmp_path, make_feature_manifest())
    for samples, views, message in (
        ([45], 0, r"sample id 45 is not in \[0, 45\)"),
        ([-1], 0, r"sample id -1 is not in"),
        ([3], -1, r"view id -1 is not in"),
        ([1, 2], [0, 0, 0], r"of the same length"),
        ([1, 2], [0, 3, 0], r"of the same length"),
    ):
        with pytest.raises(InputError, match=message):
            cache.gather(samples, views)
        with pytest.raises(InputError, match=message):
            cache.unread_blocks(samples, views)
    with pytest.raises(CacheError, match="view 5 is not in the cache"):
        cache.gather([1], 5)
    assert cache.gather([], 0).shape == (0, 4, 6)


def test_unread_blocks_are_those_of_the_positions(tmp_path):
    cache = write_features(tmp_path, make_feature_manifest(), (0, 1))
    ids = cache.order.samples(0, BLOCK - 2, BLOCK + 2)
    found = cache.unread_blocks(np.repeat(ids, 2), np.tile([0, 1], 4))
    assert [block for _, block in found] == [0, 1, 0, 1]
    cache.gather(ids, 0)
    assert [block for _, block in cache.unread_blocks(ids, 0)] == []
    with cache.prefetch([(ids, 1)]) as ahead:
        assert ahead.wait() == 2


def test_a_damaged_block_is_found(tmp_path):
    cache = write_features(tmp_path, make_feature_manifest())
    with open(view_path(tmp_path, 0), "r+b") as file:
        file.seek(8192 + 20 * 40)
        byte = file.read(1)
        file.seek(-1, 1)
        file.write(bytes([byte[0] ^ 4]))
    report = verify(tmp_path)
    assert not report["ok"] and [row["block"] for row in report["broken"]] == [1]
    with pytest.raises(CacheError, match="view 0 block 1 is damaged"):
        cache.gather(cache.order.samples(0, 20, 21), 0)
    first = cache.order.samples(0, 0, BLOCK)
    assert torch.equal(cache.gather(first, 0), stored("fp8", 0)[first])


def test_a_block_of_another_place_is_refused(tmp_path):
    write_features(tmp_path, make_feature_manifest(), (0, 1))
    a, b = (bytearray(view_path(tmp_path, view).read_bytes()) for view in (0, 1))
    a[8192:], a[4096:4200] = b[8192:], b[4096:4200]
    view_path(tmp_path, 0).write_bytes(a)
    with pytest.raises(CacheError, match="is damaged or of another place"):
        LogitCache.open(tmp_path).gather(ALL, 0)


def test_records_larger_than_a_chunk_are_verified_whole(tmp_path):
    """Blocks of one record of 256 KiB: a changed last byte is found."""
    manifest = make_feature_manifest("fp16", tokens=64, width=2048, samples=3, block=1)
    cache = write_features(tmp_path, manifest)
    assert torch.equal(cache.gather([2, 0], 0), make_features(0, 3, 64, 2048)[[2, 0]].half())
    path = view_path(tmp_path, 0)
    raw = bytearray(path.read_bytes())
    raw[-1] ^= 1
    path.write_bytes(raw)
    last = LogitCache.open(tmp_path).order.samples(0, 2, 3)
    with pytest.raises(CacheError, match="view 0 block 2 is damaged"):
        LogitCache.open(tmp_path).gather(last, 0)


def test_info_tells_tokens_and_order(tmp_path):
    write_features(tmp_path, make_feature_manifest(), (0, 2))
    facts = info(tmp_path)
    assert facts["codec"] == {"name": "fp8", "tokens": 4, "width": 6}
    assert facts["order"] == "pairs" and facts["complete_views"] == [0, 2]
    assert facts["record_bytes"] == 40
    assert verify(tmp_path)["ok"]


# ---------------------------------------------------------------------------------------------
# Pixel digests
# ---------------------------------------------------------------------------------------------


def test_pixel_digests_are_of_samples_of_one_block(tmp_path):
    manifest = make_feature_manifest()
    cache = write_features(tmp_path, manifest, range(4))
    for view in range(4):
        ids = sampled_ids(manifest, view)
        assert np.array_equal(ids, np.unique(ids))
        blocks = cache.order.positions(ids, np.asarray(view)) // BLOCK
        assert set(blocks.tolist()) == {view % 3}
        assert len(ids) == (BLOCK if view % 3 < 2 else SAMPLES - 2 * BLOCK)
        write_pixels(tmp_path, manifest, view, {int(i): f"{i:032x}" for i in ids})
        assert read_pixels(tmp_path, manifest, view) == {int(i): f"{i:032x}" for i in ids}
    picked = pick_pixels(tmp_path, manifest, range(4), 8)
    assert len(picked) == 8
    assert all(digest == f"{sample:032x}" for _, sample, digest in picked)


@pytest.mark.parametrize("wrong", ["long", "twice", "beyond", "text"])
def test_damaged_pixel_digests_are_refused(tmp_path, wrong):
    manifest = make_feature_manifest()
    write_features(tmp_path, manifest)
    ids = sampled_ids(manifest, 0).tolist()
    samples = {
        "long": [*ids, SAMPLES - 1 if ids[-1] < SAMPLES - 1 else 0],
        "twice": [ids[0], *ids[:-1]],
        "beyond": [*ids[:-1], SAMPLES],
        "text": [*map(str, ids)],
    }[wrong]
    content = {
        "view": 0, "manifest_sha256": "", "samples": samples, "digests": ["0" * 32] * len(samples)
    }  # fmt: skip
    pixels_path(tmp_path, 0).write_text(json.dumps(content))
    with pytest.raises(CacheError, match="these are not the pixel digests of view 0"):
        read_pixels(tmp_path, manifest, 0)


def test_kinds_of_records_are_distinct():
    kinds = [feature_codec(name, 1, 1).kind for name in ("fp8", "int8", "fp16")]
    assert kinds == [_C.RecordKind.token_fp8, _C.RecordKind.token_int8, _C.RecordKind.copy]


# ---------------------------------------------------------------------------------------------
# Reading ahead
# ---------------------------------------------------------------------------------------------


def test_adjacent_records_of_verified_blocks_are_asked_for_together(tmp_path):
    cache = write_features(tmp_path, make_feature_manifest(), (0, 1))
    at = cache.order.samples(0, 0, SAMPLES)
    assert cache.will_need(at, 0) == 0  # nothing is verified yet
    cache.gather(at[:BLOCK], np.repeat([0, 1], BLOCK // 2))
    assert cache.will_need(at[[5, 3, 4, 9, 3]], 0) == 2
    assert cache.will_need(at[[3, 3, 4, 4]], [0, 1, 0, 1]) == 2
    assert cache.will_need(at[BLOCK:], 0) == 0  # a later block
    with pytest.raises(InputError, match="sample id 45 is not"):
        cache.will_need([45], 0)


def test_large_batches_are_read_less_far_ahead(tmp_path, monkeypatch):
    manifest = make_feature_manifest("fp32", tokens=16, width=64, samples=40, block=1)
    cache = write_features(tmp_path, manifest)
    order = cache.order.samples(0, 0, 40)
    batches = [(order[i : i + 4], 0) for i in range(0, 40, 4)]  # 16 KiB each
    monkeypatch.setattr("deit_fast.cache.reader._READ_AHEAD", 3 * 4 * 4096 + 1)
    with cache.prefetch(batches) as ahead:
        assert ahead.wait() == 16  # the batch and three after it, one block a record
    asked = []
    will_need = cache.will_need
    monkeypatch.setattr(cache, "will_need", lambda *ids: asked.append(will_need(*ids)))
    with cache.prefetch(batches) as ahead:  # again: those blocks are verified
        assert ahead.wait() == 0
        assert asked == [1] * 4  # one range of adjacent records for each batch
    monkeypatch.setattr("deit_fast.cache.reader._READ_AHEAD", 1)
    with cache.prefetch(batches, start=4) as ahead:
        assert ahead.wait() == 8  # never fewer than one batch ahead


def test_implementations_of_the_bench_do_the_same_work():
    from bench import bench_feature_cache as bench

    for case in (bench.open_case(100), bench.gather_case(4, 64), bench.stream_case(4, 16),
                 bench.decode_case(2)):  # fmt: skip
        for call in case.build().values():
            call()
    _, cache = bench.stored(64, 1)
    records = bench.mapped(cache)[cache.order.positions(np.arange(64), np.asarray(0))]
    assert torch.equal(bench.decode_with_torch(records, 1), cache.gather(np.arange(64), 0))
