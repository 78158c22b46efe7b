"""`deit-fast cache ...` and exports of caches that hold features."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from deit_fast import cache_verbs
from deit_fast.cache import (
    CacheError,
    LogitCache,
    LogitCacheWriter,
    build_manifest,
    feature_codec,
)
from deit_fast.cache.export import export
from deit_fast.cache.format import view_path
from deit_fast.cache.statistics import draw_features, draw_records
from deit_fast.cache.verify import compare_features
from deit_fast.config import CodecConfig
from deit_fast.errors import CheckFailed, InputError
from helpers.caches import (
    SAMPLES,
    equal,
    make_feature_manifest,
    make_features,
    make_manifest,
    write_cache,
    write_features,
)


@pytest.fixture
def several(tmp_path):
    """Logits, and two feature targets in folders of their own."""
    folder = tmp_path / "c"
    write_cache(folder, make_manifest(), (0, 1))
    write_features(folder / "cls", make_feature_manifest("fp16", tokens=1, width=8), (0,))
    write_features(folder / "patches", make_feature_manifest(), (0, 1))
    return folder


def test_info_of_features_shows_size_peaks_and_zeros(tmp_path):
    cache = write_features(tmp_path, make_feature_manifest("fp8", samples=300, block=64), (0, 3))
    text = cache_verbs.info(str(tmp_path))
    for line in (
        "fp8 (tokens 4, width 6)", "40 bytes, 64 records a block", "2 complete of 2",
        "pairs: as training first visits the views", "600 records, 2400 tokens",
    ):  # fmt: skip
        assert line in text, text
    found = draw_features(cache)
    x = torch.cat([cache.gather(np.arange(300), view) for view in (0, 3)]).double()
    peak = x.abs().amax(2) / x.square().mean(2).sqrt()
    assert found.rms == pytest.approx(float(x.square().mean().sqrt()))
    assert found.largest == float(x.abs().max())
    assert found.mean_peak == pytest.approx(float(peak.mean()))
    assert found.largest_peak == pytest.approx(float(peak.max()))
    assert f"rms {found.rms:.4g}, largest {found.largest:.4g}" in text
    assert f"{found.mean_peak:.1f} on average, {found.largest_peak:.1f} at most" in text


def test_zeros_are_counted_without_tokens_of_zeros(tmp_path):
    manifest = make_feature_manifest("int8", samples=20)
    features = make_features(0, 20)
    features[:, 0] = 0  # a token of zeros
    features[:, 1, 2] = 1e6  # takes all steps from its token
    with LogitCacheWriter(tmp_path, manifest) as writer:
        writer.write(np.arange(20), 0, features)
    found = draw_features(LogitCache.open(tmp_path))
    decoded = LogitCache.open(tmp_path).gather(np.arange(20), 0)[:, 1:]
    assert found.zeroed == pytest.approx(float((decoded == 0).double().mean()))
    assert 5 / 18 <= found.zeroed < 0.35
    assert found.largest == pytest.approx(1e6)


def test_a_draw_of_large_records_is_bounded(tmp_path, monkeypatch):
    manifest = make_feature_manifest("fp8", tokens=16, width=64, samples=400, block=8)
    cache = write_features(tmp_path, manifest)
    monkeypatch.setattr("deit_fast.cache.statistics._DRAWN_BYTES", 1 << 16)
    assert draw_features(cache).records == 7 * 2  # 7 blocks of 8704 bytes, 2 records of 4096 each


def test_records_of_ordered_logits_are_of_their_samples(tmp_path):
    manifest = build_manifest(
        CodecConfig(name="hard"), num_classes=20, num_samples=SAMPLES, tau=1.0,
        fingerprint={"view.seed": 7, "view.repeats": 3}, block_records=16, order="pairs",
    )  # fmt: skip
    cache = write_cache(tmp_path, manifest, (0, 4))
    drawn = draw_records(cache)
    assert len(drawn.samples) == 90
    assert np.array_equal(drawn.top1, cache.gather(drawn.samples, drawn.views).numpy())
    for view in (0, 4):
        assert sorted(drawn.samples[drawn.views == view].tolist()) == list(range(SAMPLES))


def test_info_lists_the_caches_in_a_folder(several):
    text = cache_verbs.info(str(several))
    assert "topk" in text and "Fingerprint" in text
    assert (
        f"{several}/cls: fp16 (tokens 1, width 8), 16 bytes a view, 1 of 1 views complete" in text
    )
    assert f"{several}/patches: fp8 (tokens 4, width 6), 40 bytes a view, 2 of 2 views" in text
    (several / "manifest.json").unlink()
    for path in several.glob("view-*"):
        path.unlink()
    (several / "cls/manifest.json").write_text("{}")
    text = cache_verbs.info(str(several))
    assert "topk" not in text and f"{several}/patches: fp8" in text
    assert f"{several}/cls/manifest.json: format is None" in text
    with pytest.raises(CacheError, match="name one of its folders, cls, patches"):
        LogitCache.open(several)
    with pytest.raises(CacheError, match="name one of its folders, cls, patches"):
        cache_verbs.export(str(several), output=str(several / "out.pt"))


def test_verify_checks_the_caches_in_a_folder(several):
    text = cache_verbs.verify(str(several))
    assert text.count("0 broken") == 3
    path = view_path(several / "patches", 1)
    raw = bytearray(path.read_bytes())
    raw[-1] ^= 1
    path.write_bytes(raw)
    with pytest.raises(CheckFailed, match=r"view-00001\.dlc block 2: .*view 1 block 2 is damaged"):
        cache_verbs.verify(str(several))
    (several / "manifest.json").unlink()
    with pytest.raises(CheckFailed) as caught:
        cache_verbs.verify(str(several))
    assert str(caught.value).count("broken") == 3  # two counts and the row; not the logits


def test_labels_of_features_are_refused(several):
    root = several / "images"
    (root / "train/a").mkdir(parents=True)
    with pytest.raises(InputError, match="holds features: leave it "):
        cache_verbs.info(str(several / "cls"), data_root=str(root))


@pytest.mark.parametrize("name", ["fp8", "bf16", "fp32"])
@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
def test_export_of_features_is_by_sample(tmp_path, name, suffix):
    cache = write_features(tmp_path / "c", make_feature_manifest(name), (1, 3))
    out = tmp_path / f"out{suffix}"
    assert export(tmp_path / "c", out)["records"] == 2 * SAMPLES
    if suffix == ".pt":
        found = torch.load(out, weights_only=True)
    else:
        from safetensors.torch import load_file

        found = load_file(out)
    assert found["features"].shape == (SAMPLES, 2, 4, 6)
    for index, view in enumerate((1, 3)):
        assert equal(found["features"][:, index], cache.gather(np.arange(SAMPLES), view))
    assert found["views"].tolist() == [1, 3]


def test_export_of_features_to_parquet(tmp_path):
    parquet = pytest.importorskip("pyarrow.parquet")
    cache = write_features(tmp_path / "c", make_feature_manifest(), (1, 3))
    export(tmp_path / "c", tmp_path / "out.parquet")
    table = parquet.read_table(tmp_path / "out.parquet")
    assert json.loads(table.schema.metadata[b"deit_fast.manifest"])["codec"]["tokens"] == 4
    samples, views = (np.array(table[name]) for name in ("sample", "view"))
    features = np.array(table["features"].to_pylist(), np.float32).reshape(-1, 4, 6)
    assert np.array_equal(features, cache.gather(samples, views.astype(np.int64)).numpy())
    assert len(samples) == 2 * SAMPLES


@pytest.mark.parametrize("name", ["fp8", "int8", "fp32"])
def test_comparison_allows_rounding_and_finds_other_features(name):
    codec = feature_codec(name, 4, 6)
    features = make_features(0)
    stored = codec.decode(codec.encode(features), 1.0)
    error, allowed = compare_features(stored, features * (1 + 1e-5), stored)
    assert (error <= allowed).all()
    other = stored.clone()
    other[7] = stored[8]
    error, allowed = compare_features(other, features, stored)
    assert (error > allowed).nonzero().flatten().tolist() == [7]
    zeros = torch.zeros(2, 4, 6)
    error, allowed = compare_features(zeros, zeros, zeros)
    assert (error <= allowed).all()
