"""Every codec within its bound, and the compiled encoder and decoder against plain float64."""

from __future__ import annotations

import math
import typing

import numpy as np
import pytest
import torch

from deit_fast import _C
from deit_fast.cache import CODECS, CacheError
from deit_fast.cache.codecs import codec_from_manifest
from deit_fast.config import CodecConfig
from deit_fast.errors import InputError
from helpers.caches import (
    CLASSES,
    codec_of,
    equal,
    make_logits,
    make_manifest,
    true_log_probs,
    write_cache,
)

EIGHT_BITS = ("dense-int8", "dense-fp8")
EXACT = ("dense-fp16", "dense-bf16", "dense-fp32")  # torch's own conversion: test_cache.py
SAMPLED = "sampled"  # test_sampled_codec.py


def test_every_codec_is_a_setting_and_has_a_test_of_its_error():
    settings = typing.get_args(typing.get_type_hints(CodecConfig)["name"])
    assert set(CODECS) == set(settings) == {"hard", "topk", SAMPLED, *EIGHT_BITS, *EXACT}


def reference_topk(logits: torch.Tensor, codec) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """ids, log-probabilities at T=1 and tails [n, temperatures], by sorting, in float64."""
    z = logits.float().double()
    ids = torch.sort(z + 0.0, dim=1, descending=True, stable=True).indices[:, : codec.k]
    log_probs = torch.log_softmax(z, 1).gather(1, ids)
    tails = [
        torch.log_softmax(z / tau, 1).scatter(1, ids, -math.inf).logsumexp(1)
        for tau in codec.temperatures
    ]
    return ids.numpy(), log_probs.numpy(), torch.stack(tails, 1).numpy()


def split_record(raw: torch.Tensor, codec) -> tuple[np.ndarray, ...]:
    """Fields of raw records, by numpy."""
    letter = "<u2" if codec.num_classes <= 65536 else "<u4"
    layout = [
        ("ids", letter, codec.k),
        ("log_probs", "<f2", codec.k),
        ("pairs", "<f4", (len(codec.temperatures), 2)),
    ]
    records = raw.cpu().numpy().view(np.dtype(layout))[:, 0]
    fields = {name: records[name] for name, *_ in layout}
    pairs = fields.pop("pairs")
    return fields["ids"], fields["log_probs"], pairs[:, :, 0], pairs[:, :, 1]


def check_topk(logits: torch.Tensor, codec) -> None:
    fields = split_record(codec.encode(logits), codec)
    ids, log_probs, tails = reference_topk(logits.cpu(), codec)
    assert np.array_equal(fields[0], ids)
    clamped = np.maximum(log_probs, -65504.0)
    # float16 of the exact value, but for values on the border between two of them
    half = clamped.astype(np.float32).astype(np.float16)
    step = np.spacing(np.minimum(np.abs(half), np.float16(60000))).astype(np.float64)
    assert (np.abs(fields[1].astype(np.float64) - clamped) <= 0.5001 * step).all()
    assert (fields[1] == half).mean() > 0.999
    # The normaliser gives the stored values, not the true ones, the mass that the ids have.
    for index, tau in enumerate(codec.temperatures):
        scaled = torch.from_numpy(fields[1].astype(np.float64)) / tau
        exact = torch.log_softmax(logits.cpu().float().double() / tau, 1)
        mass = exact.gather(1, torch.from_numpy(ids)).logsumexp(1)
        norm = (scaled.logsumexp(1) - mass).numpy()
        error = np.abs(fields[-1][:, index] - norm)
        assert (error <= 1e-7 * np.maximum(1, np.abs(norm))).all(), error.max()
    if codec.k == codec.num_classes:
        assert np.isneginf(fields[2]).all()
    else:
        error = np.abs(fields[2] - tails)
        assert (error <= 1e-7 * np.maximum(1, np.abs(tails))).all(), error.max()


def awkward_rows(classes: int) -> torch.Tensor:
    """Rows that a selection by sampling stumbles over, and sums that lose digits."""
    generator = torch.Generator().manual_seed(classes)
    rows = [torch.randn(classes, generator=generator) * scale for scale in (1e-3, 1, 30, 1e4, 1e37)]
    rows += [torch.arange(classes).float(), -torch.arange(classes).float(), torch.zeros(classes)]
    sure = torch.full((classes,), -40.0)
    sure[classes // 2] = 40.0
    striped = torch.randn(classes, generator=generator)
    striped[::128] += 50  # all that is large, in the share of one thread of 128
    tied = torch.randint(-2, 3, (classes,), generator=generator).float()
    tied[tied == 0] *= torch.where(torch.rand(int((tied == 0).sum())) < 0.5, -1.0, 1.0)
    return torch.stack([*rows, sure, striped, tied])


@pytest.mark.parametrize("classes", [2, 5, 128, 129, 1000, 65536, 65537, 262144])
@pytest.mark.parametrize("k", [1, 16, 64])
def test_topk_bytes_against_a_sort_in_float64(classes, k):
    codec = codec_of(classes=classes, k=min(k, classes), temperatures=(1.0, 4.0))
    check_topk(awkward_rows(classes), codec)


@pytest.mark.parametrize("k", [127, 128, 300, 1000])
def test_topk_of_a_large_k(k):
    """More than a block's threads: selection by bisection."""
    check_topk(awkward_rows(1000), codec_of(classes=1000, k=k, temperatures=(2.0,)))


def test_topk_where_one_thread_holds_all_that_is_large():
    """More candidates than there is room for: the bisection that follows must find the same."""
    logits = torch.randn(3, 131072, generator=torch.Generator().manual_seed(0))
    for thread in range(17):
        logits[:, thread::128] += 100  # 17 * 1024 candidates
    check_topk(logits, codec_of(classes=131072, temperatures=(1.0,)))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_topk_of_other_dtypes_is_that_of_their_float32(dtype):
    logits = make_logits(1, 64, 1000).to(dtype)
    codec = codec_of(classes=1000, temperatures=(1.0, 3.0))
    assert torch.equal(codec.encode(logits), codec.encode(logits.float()))
    strided = torch.cat([logits, logits], 1)[:, ::2]
    assert torch.equal(codec.encode(strided), codec.encode(strided.contiguous()))


def test_topk_refuses_more_classes_than_its_sums_hold():
    with pytest.raises(InputError, match="at most 262144 classes, not 262145"):
        codec_of(classes=262145, k=2)


@pytest.mark.parametrize("tau", [0.3, 1.0, 2.0, 7.0])
@pytest.mark.parametrize(("classes", "k"), [(1000, 16), (1000, 7), (1000, 40), (70000, 16)])
def test_decoding_against_the_formula_of_the_format_page(classes, k, tau):
    codec = codec_of(classes=classes, k=k, temperatures=(1.0, tau))
    raw = codec.encode(make_logits(3, 333, classes) * 2)
    ids, stored, tails, norms = split_record(raw, codec)
    decoded = codec.decode(raw, tau)
    scaled = stored.astype(np.float64) / tau
    tail = tails[:, codec.temperatures.index(tau)].astype(np.float64)
    norm = np.log(np.exp(scaled).sum(1)) - np.log(-np.expm1(tail))
    assert np.allclose(norms[:, codec.temperatures.index(tau)], norm, rtol=2e-7, atol=2e-6)
    assert np.array_equal(decoded.ids.numpy(), ids)
    assert np.array_equal(decoded.log_tail.numpy(), tail.astype(np.float32))
    error = np.abs(decoded.log_probs.numpy() - (scaled - norm[:, None]))
    assert error.max() < 3e-6 * max(1, np.abs(scaled).max() / 8)


@pytest.mark.parametrize("margin", [1e-3, 1.0, 20.0, 60.0, 300.0])
def test_ids_and_tail_have_mass_one_at_every_size_of_tail(margin):
    """From a tail that is all to one that is nothing; the part inside is exact, not 1 - tail."""
    logits = torch.zeros(1, 60000, dtype=torch.float64)
    logits[0, :16] = torch.linspace(0.5, 0.0, 16) + margin
    codec = codec_of(classes=60000, k=16)
    decoded = codec.decode(codec.encode(logits), 1.0)
    exact = torch.log_softmax(logits.float().double(), 1)
    inside = decoded.log_probs.double().logsumexp(1).item()
    assert inside == pytest.approx(exact[0, :16].logsumexp(0).item(), rel=1e-6, abs=1e-6)
    mass = decoded.log_probs.double().exp().sum() + decoded.log_tail.double().exp().sum()
    assert abs(mass.item() - 1) < 1e-6


def test_a_hostile_record_decodes_alike_everywhere():
    """k = 16 takes another path than k = 17 on CPUs with F16C: every float16, same bits."""
    every = torch.arange(65536, dtype=torch.int32).to(torch.int16).view(torch.uint8).reshape(-1, 32)
    pair = torch.tensor([-0.5, 3.25]).view(torch.uint8).repeat(len(every), 1)
    wide = torch.cat([every, torch.zeros(len(every), 2, dtype=torch.uint8)], 1)
    narrow = codec_of(classes=1000, k=16, temperatures=(3.0,))
    other = codec_of(classes=1000, k=17, temperatures=(3.0,))
    ids = torch.zeros(len(every), 34, dtype=torch.uint8)
    a = narrow.decode(torch.cat([ids[:, :32], every, pair], 1), 3.0).log_probs
    b = other.decode(torch.cat([ids, wide, pair], 1), 3.0).log_probs[:, :16]
    finite = every.view(torch.float16).isfinite()
    assert torch.equal(a[finite], b[finite])
    expected = every.view(torch.float16).float() * (1 / torch.tensor(3.0)) - 3.25
    assert torch.equal(a[finite], expected[finite])


# ---------------------------------------------------------------------------------------------
# dense-int8, dense-fp8
# ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("classes", [1, 3, 20, 1000])
@pytest.mark.parametrize("name", EIGHT_BITS)
def test_eight_bits_stay_within_their_bound(name, classes, dtype):
    logits = make_logits(1, 60, classes) * torch.logspace(-42, 37, 60)[:, None]
    logits[::7] += 1000  # far from zero
    logits[3] = 5.0  # no range at all
    logits = logits.to(dtype)
    codec = codec_of(name, classes)
    raw = codec.encode(logits)
    assert raw.shape == (60, classes + 8)
    decoded = codec.decode(raw, 1.0)
    assert decoded.dtype == torch.float32
    z = logits.double()
    top, low = z.amax(1, keepdim=True), z.amin(1, keepdim=True)
    if name == "dense-int8":
        bound = (top - low) / 510
    else:
        bound = torch.maximum((top - z) / 16, (top - low) / 448 / 1024)
    rounding = 2**-22 * z.abs().amax(1, keepdim=True) + 2**-141
    error = (decoded.double() - z).abs()
    assert (error <= bound + rounding).all()
    if classes == 1000 and dtype == torch.float32:  # the bound is not idle
        assert (error > 0.8 * bound).any(1).sum() > 30


@pytest.mark.parametrize("tau", [1.0, 3.0])
def test_kl_of_int8_stays_below_the_stated_one(tau):
    logits = make_logits(2, 200, 1000)
    codec = codec_of("dense-int8", 1000)
    decoded = codec.decode(codec.encode(logits), 1.0)
    exact, rough = true_log_probs(logits, tau), true_log_probs(decoded, tau)
    kl = (exact.exp() * (exact - rough)).sum(1)
    reach = (logits.amax(1) - logits.amin(1)).double()
    assert (kl <= reach**2 / (2 * 255**2 * tau**2) + 1e-7).all()


def test_a_row_of_eight_bits_does_not_depend_on_its_batch():
    logits = make_logits(3, 40, 1000)
    for name in (*EIGHT_BITS, "hard"):
        codec = codec_of(name, 1000)
        apart = torch.cat([codec.encode(row[None]) for row in logits])
        assert torch.equal(codec.encode(logits), apart)


# ---------------------------------------------------------------------------------------------
# Caches of earlier versions
# ---------------------------------------------------------------------------------------------


def test_records_that_end_with_the_true_class_are_still_read(tmp_path):
    plain = make_manifest()
    manifest = plain | {"codec": plain["codec"] | {"true_class": True}, "record_bytes": 76}
    old = codec_from_manifest(manifest["codec"], "here")
    logits, new = make_logits(0), codec_of()
    assert old.record_bytes == new.record_bytes + 4
    assert equal(old.decode(old.encode(logits), 1.0), new.decode(new.encode(logits), 1.0))
    assert equal(write_cache(tmp_path, manifest).gather(np.arange(45), 0),
                 new.decode(new.encode(logits), 1.0))  # fmt: skip
    for values in ({"true_class": False}, {"true_class": 1}, {"name": "hard", "k": None}):
        with pytest.raises(CacheError, match=r"^here: "):
            codec_from_manifest(manifest["codec"] | values, "here")


# ---------------------------------------------------------------------------------------------
# CUDA
# ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["dense-int8", "dense-fp8"])
def test_the_order_of_zeros_of_both_signs_does_not_matter(name):
    """A GPU reduces in another order than a CPU, and amin of -0 and +0 is either."""
    rows = torch.stack([torch.full((CLASSES,), value) for value in (1.0, -1.0, 0.0)])
    rows[:, :9] = 0.0
    forms = [rows.clone() for _ in range(10)]
    for at, form in enumerate(forms[1:]):
        form[:, at] = -0.0
    first, *others = (codec_of(name).encode(form) for form in forms)
    assert all(torch.equal(first[:, :8], other[:, :8]) for other in others)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("classes", [5, 1000, 21841, 65537, 262144])
def test_cuda_encodes_the_same_bytes(classes, dtype):
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    assert _C.with_cuda
    logits = awkward_rows(classes).clamp(-6e4, 6e4).to(dtype)
    for k in (1, 16, 64):
        codec = codec_of(classes=classes, k=min(k, classes), temperatures=(1.0, 2.5))
        assert torch.equal(codec.encode(logits.cuda()).cpu(), codec.encode(logits))
    for name in ("hard", "dense-int8", "dense-fp8"):
        codec = codec_of(name, classes)
        assert torch.equal(codec.encode(logits.cuda()).cpu(), codec.encode(logits))
    logits[2, classes // 2] = math.nan
    with pytest.raises(CacheError, match=r"row 2: teacher logit nan is not finite"):
        codec_of(classes=classes, k=2).encode(logits.cuda())


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["hard", "topk", "dense-fp16", "dense-int8", "dense-fp8"])
@pytest.mark.parametrize(("classes", "k"), [(1000, 16), (1000, 40), (1001, 7), (70000, 33)])
def test_cuda_decodes_the_same_values(name, classes, k):
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    codec = codec_of(
        name, classes, **({"k": k, "temperatures": (1.0, 3.0)} if name == "topk" else {})
    )
    raw = codec.encode(make_logits(1, 77, classes))
    expected, got = codec.decode(raw, 3.0), codec.decode(raw.cuda(), 3.0)
    if name != "topk":
        assert torch.equal(got.cpu(), expected)
        return
    assert torch.equal(got.ids.cpu(), expected.ids)
    assert torch.equal(got.log_probs.cpu(), expected.log_probs)
    assert torch.equal(got.log_tail.cpu(), expected.log_tail)
