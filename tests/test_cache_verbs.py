"""`deit-fast cache`: a cache against its teacher, what it is like, out of it and into it."""

from __future__ import annotations

import json
import re
import shutil
import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from deit_fast import cli
from deit_fast.cache import LogitCache, LogitCacheWriter, build_manifest
from deit_fast.cache.statistics import draw_records
from deit_fast.cache.verify import record_errors
from deit_fast.config import CodecConfig
from deit_fast.kernels import TopK
from deit_fast.models.convnet import small_convnet
from helpers.caches import block_checksum, write_view
from helpers.digits import write_few_digits

FACTORY = "deit_fast.models.convnet:small_convnet"


@pytest.fixture(autouse=True, scope="module")
def small_blocks():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(CodecConfig, "block_records", 25)
        yield


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    """Data, a teacher, and a cache of three views a codec."""
    root = tmp_path_factory.mktemp("verbs")
    write_few_digits(root / "data", train=6)
    torch.manual_seed(3)
    save_file(small_convnet(10).state_dict(), root / "teacher.safetensors")
    for codec in ("topk", "sampled", "hard", "dense-fp16"):
        assert cli.main(["precompute", *arguments(root), "--codec.name", codec,
                         "--cache", f"{root}/{codec}"]) == 0  # fmt: skip
    return root


def arguments(root: Path) -> list[str]:
    return [
        "--recipe", "digits_student", "--epochs", "3", "--num-views", "3", "--data.workers", "0",
        "--data.root", f"{root}/data", "--teacher", f"{FACTORY}@{root}/teacher.safetensors",
    ]  # fmt: skip


def run(capsys, *words: object) -> tuple[int, str, str]:
    capsys.readouterr()
    status = cli.main([str(word) for word in words])
    out, err = capsys.readouterr()
    return status, out, err


def verify_teacher(capsys, root: Path, cache: Path, *more: object) -> tuple[int, str, str]:
    teacher = f"{FACTORY}@{root}/teacher.safetensors"
    return run(capsys, "cache", "verify", cache, "--teacher", teacher,
               "--data-root", root / "data", "--device", "cpu", *more)  # fmt: skip


# ----------------------------------------------------------------------------------------- dry run


def test_dry_run_of_the_command(root, capsys, tmp_path):
    status, out, _ = run(capsys, "precompute", *arguments(root), "--cache", tmp_path / "x",
                         "--dry-run", "--views", "1:3")  # fmt: skip
    assert status == 0
    rows = dict(line.split(maxsplit=1) for line in out.splitlines())
    assert (
        rows["blocks"] == "6 to write, 0 there; all views are --blocks 0:9"
        and rows["images"] == "120"
    )
    assert re.match(r"batches of \d+ images through the whole job; ", rows["measured"])
    assert ", for a batch of 60: loading in one process " in rows["measured"]
    assert "img/s a process" in rows["time"]
    assert not (tmp_path / "x").exists()


# ---------------------------------------------------------------------------- against the teacher


@pytest.mark.parametrize("codec", ["topk", "sampled", "hard", "dense-fp16"])
def test_recomputed_records_equal_the_stored_ones(root, capsys, codec):
    status, out, _ = verify_teacher(
        capsys, root, root / codec, "--samples", 40, "--threshold", "1e-4"
    )
    assert status == 0
    assert "40 records recomputed, 0 differ" in out and "have the pixels" in out


@pytest.mark.parametrize("codec", ["topk", "hard", "dense-fp16"])
def test_one_wrong_record_is_found_and_named(root, capsys, tmp_path, codec):
    """View 1 written again, complete and with valid checksums, the logits of sample 17 negated."""
    cache = LogitCache.open(root / codec)
    stored = cache.gather(np.arange(60), 1)
    if isinstance(stored, TopK):
        logits = torch.zeros(60, 10).scatter(1, stored.ids.long(), stored.log_probs)
    elif stored.dim() == 1:
        logits = torch.nn.functional.one_hot(stored, 10).float()
    else:
        logits = stored.float()
    logits[17] = -logits[17]
    shutil.copytree(root / codec, tmp_path / "cache")
    (tmp_path / "cache/view-00001.dlc").unlink()
    with LogitCacheWriter(tmp_path / "cache", cache.manifest) as writer:
        writer.write(np.arange(60), 1, logits)
    status, out, _ = verify_teacher(capsys, root, tmp_path / "cache", "--samples", 180)
    assert status == 1
    assert "180 records recomputed, 1 differ" in out and "sample 17 view 1: " in out
    assert (
        verify_teacher(capsys, root, tmp_path / "cache", "--samples", 180, "--threshold", 99)[0]
        == 0
    )


def test_draws_of_another_view_are_found(root, capsys, tmp_path):
    """View 1 holds the records of view 0: their logits differ, and so do their draws. The verbs
    that show a cache take its records as they are."""
    cache = LogitCache.open(root / "sampled")
    shutil.copytree(root / "sampled", tmp_path / "cache")
    write_view(tmp_path / "cache", cache.manifest, 1,
               cache.gather_records(np.arange(60), 0).numpy().tobytes())  # fmt: skip
    status, out, _ = verify_teacher(capsys, root, tmp_path / "cache", "--samples", 180)
    assert status == 1 and "180 records recomputed" in out and " view 1: " in out
    status, out, _ = run(capsys, "cache", "info", root / "sampled", "--data-root", root / "data")
    assert status == 0 and "sampled (k 5, temperatures 1.0, num_classes 10, draws 5)" in out
    assert "agreement" in out and "entropy" not in out
    file = tmp_path / "made.safetensors"
    assert run(capsys, "cache", "export", root / "sampled", "--output", file)[0] == 0
    made = load_file(file)
    assert made["ids"].shape == (60, 3, 10)
    assert (made["log_probs"].double().exp().sum(2) - 1).abs().max() < 1e-6


def test_a_wrong_tail_alone_is_found(root, capsys, tmp_path):
    """Sample 17 of view 1 with half the mass outside its ids, all else as before."""
    config = json.loads((root / "topk/manifest.json").read_text())["codec"]
    assert config["k"] == 10  # of 10 classes: such a cache has no tail, so make one that has
    cache = tmp_path / "cache"
    assert cli.main(["precompute", *arguments(root), "--codec.k", "4", "--cache", str(cache)]) == 0
    assert verify_teacher(capsys, root, cache, "--samples", 180)[0] == 0
    file = cache / "view-00001.dlc"
    raw = bytearray(file.read_bytes())
    size, per_block, data = 4 * 4 + 8, 25, 8192
    offset = data + 17 * size + 16
    (tail,) = struct.unpack_from("<f", raw, offset)
    struct.pack_into("<f", raw, offset, tail - 0.7)
    block = bytes(raw[data : data + per_block * size])
    struct.pack_into("<I", raw, 4096, block_checksum(LogitCache.open(cache).manifest, 1, 0, block))
    file.write_bytes(raw)
    status, out, _ = verify_teacher(capsys, root, cache, "--samples", 180)
    assert status == 1
    assert "180 records recomputed, 1 differ" in out and "sample 17 view 1: 0.7" in out


def test_another_teacher_data_set_or_pixel_is_refused_first(root, capsys, tmp_path):
    torch.manual_seed(8)
    save_file(small_convnet(10).state_dict(), tmp_path / "other.safetensors")
    status, _, err = verify_teacher(
        capsys, root, root / "topk", "--teacher", f"{FACTORY}@{tmp_path}/other.safetensors"
    )
    assert (
        status == 2 and "teacher.weights_sha256" in err and "view." not in err.split("differs")[1]
    )
    shutil.copytree(root / "data", tmp_path / "data")
    next((tmp_path / "data/train/7").iterdir()).unlink()
    status, _, err = verify_teacher(capsys, root, root / "topk", "--data-root", tmp_path / "data")
    assert status == 2 and "dataset.sha256" in err


def test_error_of_each_form():
    exact = torch.log_softmax(torch.tensor([[3.0, 1.0, 0.0]]).double(), 1)
    moved = exact + torch.tensor([0.0, 0.25, 0.0])
    tail = exact[:, 2].float()
    form = TopK(torch.tensor([[0, 1]]), moved[:, :2].float(), tail, "drop")
    assert record_errors(form, exact, 1.0).item() == pytest.approx(0.25, abs=1e-6)
    form = TopK(torch.tensor([[0, 1]]), exact[:, :2].float(), tail - 0.75, "drop")
    assert record_errors(form, exact, 1.0).item() == pytest.approx(0.75, abs=1e-6)
    whole = TopK(torch.tensor([[0, 1, 2]]), moved.float(), torch.tensor([-torch.inf]), "drop")
    assert record_errors(whole, exact, 1.0).item() == pytest.approx(0.25, abs=1e-6)
    assert record_errors(torch.tensor([1]), exact, 1.0).item() == pytest.approx(2.0)
    assert record_errors(exact.float() + 5, exact, 1.0).item() < 1e-6


# -------------------------------------------------------------------------------------------- info


def test_info_shows_entropy_agreement_and_a_page(root, capsys, tmp_path):
    status, out, _ = run(capsys, "cache", "info", root / "topk", "--data-root", root / "data",
                         "--html", tmp_path / "page.html")  # fmt: skip
    assert status == 0
    cache = LogitCache.open(root / "topk")
    drawn = draw_records(cache)
    assert len(drawn.top1) == 180
    assert f"{drawn.entropy.mean():.3f} nats of 2.303 on average" in out
    assert out.count("#") > 40 and "% of top-1 classes are the label of larger weight" in out
    page = (tmp_path / "page.html").read_text()
    assert "<svg" in page and "teacher.weights_sha256" in page and "http" not in page
    status, out, _ = run(capsys, "cache", "info", root / "hard")
    assert status == 0 and "180 records" in out and "entropy" not in out.lower()


def test_entropy_and_agreement_are_right(tmp_path):
    """Against the logits that were written, dense and top-k with a tail that is really even."""
    logits = torch.zeros(50, 12)
    logits[torch.arange(50), torch.arange(50) % 12] = torch.linspace(0, 9, 50)
    logs = torch.log_softmax(logits.double(), 1)
    exact = -(logs.exp() * logs).sum(1).numpy()
    for name, tolerance in [("dense-fp32", 1e-6), ("dense-bf16", 3e-2), ("topk", 2e-2)]:
        manifest = build_manifest(CodecConfig(name=name, k=None if name != "topk" else 3),
                                  num_classes=12, num_samples=50, tau=1.0,
                                  fingerprint={})  # fmt: skip
        with LogitCacheWriter(tmp_path / name, manifest) as writer:
            writer.write(np.arange(50), 0, logits)
        drawn = draw_records(LogitCache.open(tmp_path / name))
        np.testing.assert_allclose(drawn.entropy, exact[drawn.samples], atol=tolerance)
        assert (drawn.top1[1:] == drawn.samples[1:] % 12).all()


def test_agreement_counts_the_label_of_larger_weight(root, capsys):
    """A cache whose teacher says just that label agrees wholly; one turned by a class, not."""
    from deit_fast.config import DataConfig
    from deit_fast.tools.verify_against_teacher import leading_labels

    cache = LogitCache.open(root / "hard")
    data = DataConfig(root=str(root / "data"))
    labels = np.stack([leading_labels(cache, data, np.arange(60), np.full(60, v)) for v in (0, 1)])
    own = np.repeat(np.arange(10), 6)
    assert 0.3 < (labels == own).mean() < 1  # mixed views: some have the partner's
    for shift, text in [(0, "100.00 %"), (1, "0.00 %")]:
        folder = root / f"labels-{shift}"
        with LogitCacheWriter(folder, cache.manifest) as writer:
            for view in (0, 1):
                shifted = torch.from_numpy((labels[view] + shift) % 10)
                writer.write(np.arange(60), view, torch.nn.functional.one_hot(shifted, 10).float())
        _, out, _ = run(capsys, "cache", "info", folder, "--data-root", root / "data")
        assert f"agreement  {text}" in out


# ------------------------------------------------------------------------------------------ export


def test_parquet_holds_every_record(root, capsys, tmp_path):
    pq = pytest.importorskip("pyarrow.parquet")
    status, out, _ = run(capsys, "cache", "export", root / "topk", "--output",
                         tmp_path / "a.parquet", "--views", "1:3")  # fmt: skip
    assert status == 0 and "120" in out
    table = pq.read_table(tmp_path / "a.parquet")
    assert table["sample"].to_pylist() == [*range(60)] * 2
    assert table["view"].to_pylist() == [1] * 60 + [2] * 60
    stored = LogitCache.open(root / "topk").gather([*range(60)] * 2, np.repeat([1, 2], 60))
    for name in ("ids", "log_probs", "log_tail"):
        assert table[name].to_pylist() == getattr(stored, name).tolist()
    manifest = json.loads(table.schema.metadata[b"deit_fast.manifest"])
    assert manifest == LogitCache.open(root / "topk").manifest
    assert pq.ParquetFile(tmp_path / "a.parquet").num_row_groups == 6


@pytest.mark.parametrize("suffix", ["safetensors", "pt"])
@pytest.mark.parametrize(("codec", "name"), [("dense-fp16", "logits"), ("hard", "label")])
def test_tensors_are_samples_by_views(root, capsys, tmp_path, suffix, codec, name):
    out = tmp_path / f"a.{suffix}"
    assert run(capsys, "cache", "export", root / codec, "--output", out)[0] == 0
    tensors = load_file(out) if suffix == "safetensors" else torch.load(out, weights_only=True)
    cache = LogitCache.open(root / codec)
    assert tensors["views"].tolist() == [0, 1, 2] and tensors[name].shape[:2] == (60, 3)
    for view in range(3):
        assert torch.equal(tensors[name][:, view], cache.gather(np.arange(60), view))
    assert [path.name for path in tmp_path.iterdir()] == [out.name]


def test_export_of_a_missing_view_leaves_nothing(root, capsys, tmp_path):
    status, _, err = run(capsys, "cache", "export", root / "hard", "--output", tmp_path / "a.pt",
                         "--views", "1:5")  # fmt: skip
    assert status == 2 and "does not have view 3 complete" in err
    assert list(tmp_path.iterdir()) == []
