"""The codec `sampled`: its draws, that the gradient has no bias, and what refuses it."""

from __future__ import annotations

import hashlib
import math

import numpy as np
import pytest
import torch

from deit_fast.cache import CacheError, LogitCache, LogitCacheWriter
from deit_fast.cache.codecs import codec_from_manifest, keys_of
from deit_fast.cache.sampled import ViewKeys, draw_errors
from deit_fast.cache.sparse_codecs import SampledCodec
from deit_fast.cache.verify import compare_logits
from deit_fast.errors import InputError
from deit_fast.views.rng import Purpose, key, philox
from helpers.caches import SAMPLES, codec_of, file_bytes, make_logits, make_manifest
from helpers.distillation import soft_distillation

SEED, REPEATS = 11, 400
SHAPES = [(0, 22), (6, 8), (3, 14)]  # k, draws


def keys(count: int, view: int = 0) -> ViewKeys:
    return ViewKeys(SEED, np.arange(count), np.full(count, view))


def sampled(classes=1000, k=6, draws=8, temperatures=(1.0,)) -> SampledCodec:
    codec = codec_of("sampled", classes, k=k, draws=draws, temperatures=temperatures)
    assert isinstance(codec, SampledCodec)
    return codec


def gradient(student: torch.Tensor, teacher, tau: float) -> torch.Tensor:
    """Of each row's KL, [n, C]."""
    student = student.clone().requires_grad_()
    soft_distillation(student, teacher, tau=tau, reduction="batchmean").backward()
    return student.grad.double() * len(student)


def stored_ids(raw: torch.Tensor, codec: SampledCodec) -> np.ndarray:
    letter = "<u2" if codec.num_classes <= 65536 else "<u4"
    ids = raw.numpy()[:, : codec.ids_per_record * np.dtype(letter).itemsize]
    return np.ascontiguousarray(ids).view(letter).astype(np.int64)


@pytest.fixture(scope="module")
def flat():
    """A teacher's row of high entropy, and a student's."""
    draw = torch.Generator().manual_seed(5)
    teacher = 2 * torch.randn(1, 1000, generator=draw)
    log_probs = torch.log_softmax(teacher.double(), 1)
    assert -(log_probs.exp() * log_probs).sum() > 2
    return teacher, teacher + torch.randn(1, 1000, generator=draw)


# ---------------------------------------------------------------------------------------------
# The gradient
# ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tau", [1.0, 4.0])
@pytest.mark.parametrize(("k", "draws"), SHAPES)
def test_the_mean_gradient_over_views_is_that_of_all_logits(flat, k, draws, tau):
    teacher, student = (row.expand(REPEATS, -1) for row in flat)
    dense = gradient(student[:1], teacher[:1], tau)
    codec = sampled(k=k, draws=draws, temperatures=(1.0, 4.0))
    views = np.arange(REPEATS)
    form = codec.decode(codec.encode(teacher, ViewKeys(SEED, views % 40, views // 40)), tau)
    error = gradient(student, form, tau) - dense
    bound = error.square().sum(1).mean().sqrt() / math.sqrt(REPEATS)
    assert error.mean(0).norm() <= 1.2 * bound
    # The same test fails for a top-k teacher that leaves the tail out.
    topk = codec_of(classes=1000, k=10, temperatures=(1.0, 4.0))
    cut = topk.decode(topk.encode(teacher[:1]), tau)._replace(tail="renorm")
    assert (gradient(student[:1], cut, tau) - dense).norm() > 10 * bound


@pytest.mark.parametrize("classes", [30, 70000])
def test_the_gradient_of_a_record_is_that_of_its_weights(classes):
    """With repeated draws: the loss must not count a class twice, nor lose one."""
    student = torch.randn(40, classes, generator=torch.Generator().manual_seed(1))
    teacher = torch.randn(40, classes) * 4
    codec = sampled(classes, k=3, draws=20)
    raw = codec.encode(teacher, keys(40))
    ids = stored_ids(raw, codec)
    assert (np.diff(ids[:, 3:], axis=1) == 0).any(1).sum() > 5
    exact = torch.log_softmax(teacher.double(), 1)
    weights = exact.gather(1, torch.from_numpy(ids[:, :3])).exp()
    weights = torch.cat([weights, ((1 - weights.sum(1)) / 20)[:, None].expand(-1, 20)], 1)
    target = torch.zeros(40, classes, dtype=torch.float64)
    target.scatter_add_(1, torch.from_numpy(ids), weights)
    expected = torch.softmax(student.double(), 1) - target
    found = gradient(student, codec.decode(raw, 1.0), 1.0)
    torch.testing.assert_close(found, expected, rtol=0, atol=4e-3)  # float16 log-probabilities


@pytest.mark.parametrize(("k", "draws"), [(0, 20), (1, 1), (0, 1), (19, 1), (6, 8)])
def test_a_form_has_distinct_ids_and_mass_one(k, draws):
    logits = make_logits(3)
    codec = sampled(20, k, draws, temperatures=(1.0, 3.0))
    raw = codec.encode(logits, keys(SAMPLES))
    assert raw.shape == (SAMPLES, codec.record_bytes)
    assert codec.record_bytes == 2 * (max(k, 1) + 2 * draws) + (2 * k + 16 if k else 0)
    for tau in codec.temperatures:
        form = codec.decode(raw, tau)
        assert form.tail == "drop" and form.ids.dtype == torch.int32
        assert all(len(set(row)) == k + draws for row in form.ids.tolist())
        assert ((form.ids >= 0) & (form.ids < 20)).all()
        assert (form.log_probs.double().exp().sum(1) - 1).abs().max() < 2e-6
        if k:
            topk = codec_of(k=k, temperatures=(1.0, 3.0))
            head = topk.decode(topk.encode(logits), tau)
            assert torch.equal(form.ids[:, :k], head.ids)
            assert torch.equal(form.log_probs[:, :k], head.log_probs)
            assert torch.equal(form.log_tail, head.log_tail)
    assert torch.equal(codec.decisions(raw), logits.argmax(1))


# ---------------------------------------------------------------------------------------------
# The draws
# ---------------------------------------------------------------------------------------------


def test_draws_have_the_probabilities_of_the_tail():
    """Chi-square of 200,000 draws of one row, and of pairs of neighbours, which are independent."""
    draw = torch.Generator().manual_seed(2)
    logits = torch.randn(1, 40, generator=draw) * 1.5
    codec = sampled(40, k=3, draws=20)
    raw = codec.encode(logits.expand(10000, -1), keys(10000, 7))
    ids = stored_ids(raw, codec)
    head, tail = ids[0, :3], ids[:, 3:]
    chances = torch.softmax(logits[0].double(), 0).numpy()
    chances[head] = 0
    chances /= chances.sum()
    counts = np.bincount(tail.ravel(), minlength=40)
    assert (counts[head] == 0).all()
    inside = chances > 0
    expected = chances[inside] * tail.size
    statistic = ((counts[inside] - expected) ** 2 / expected).sum()
    freedom = inside.sum() - 1
    assert abs(statistic - freedom) < 4 * math.sqrt(2 * freedom)
    # Independent within a record: the number of equal pairs, which ids stored in order keep.
    pairs = np.mean([(row[:, None] == row).sum() - 20 for row in tail]) / (20 * 19)
    assert pairs == pytest.approx((chances**2).sum(), rel=0.02)


@pytest.mark.parametrize("tau", [1.0, 5.0])
def test_draws_invert_the_distribution_at_words_of_philox(tau):
    logits = make_logits(8, 200, 300)
    codec = sampled(300, k=4, draws=6, temperatures=(1.0, 5.0))
    views, samples = np.arange(200) % 3, np.arange(200) * 7
    ids = stored_ids(codec.encode(logits, ViewKeys(SEED, samples, views)), codec)
    first = 4 + 6 * codec.temperatures.index(tau)
    probs = torch.softmax(logits.double() / tau, 1).numpy()
    np.put_along_axis(probs, ids[:, :4], 0, 1)
    sums = np.cumsum(probs / probs.sum(1, keepdims=True), 1)
    for row in range(200):
        words = [philox(samples[row], views[row], slot, Purpose.TAIL, key(SEED)) for slot in (0, 1)]
        uniform = np.sort(np.ravel(words)[:6]) / 2**32
        for word, id in zip(uniform, ids[row, first : first + 6], strict=True):
            low = sums[row, id - 1] if id else 0
            assert low - 1e-9 <= word <= sums[row, id] + 1e-9


def test_bytes_depend_on_the_view_alone():
    logits, codec = make_logits(3, 64, 1000), sampled(temperatures=(1.0, 2.0))
    together = codec.encode(logits, keys(64))
    order = np.random.default_rng(0).permutation(64)
    shuffled = codec.encode(logits[order], ViewKeys(SEED, order, np.zeros(64, int)))
    assert torch.equal(shuffled, together[order])
    apart = [codec.encode(logits[i : i + 1], ViewKeys(SEED, np.array([i]), np.array([0])))
             for i in range(64)]  # fmt: skip
    assert torch.equal(torch.cat(apart), together)
    for dtype in (torch.bfloat16, torch.float16, torch.float64):
        narrow = logits.to(dtype)
        expected = codec.encode(narrow.float(), keys(64))
        assert torch.equal(codec.encode(narrow, keys(64)), expected)
    for other in (keys(64, 1), ViewKeys(SEED + 1, *keys(64)[1:]),
                  ViewKeys(SEED, np.arange(64) + 1, np.zeros(64, int))):  # fmt: skip
        assert not torch.equal(codec.encode(logits, other), together)
    # The draws of a temperature do not depend on which others are recorded.
    alone = sampled(temperatures=(2.0,))
    a = codec.decode(together, 2.0)
    b = alone.decode(alone.encode(logits, keys(64)), 2.0)
    assert torch.equal(a.ids, b.ids)


def test_bytes_are_those_of_the_first_version():
    """Of fixed logits: a cache that is resumed must go on as it began."""
    logits = ((torch.arange(3 * 500) * 7919) % 1009).float().view(3, 500) / 64
    found = []
    for k, draws in ((4, 9), (0, 9)):
        codec = sampled(500, k, draws, temperatures=(1.0, 4.0))
        raw = codec.encode(
            logits, ViewKeys(2**63 + 5, np.array([0, 5, 2**31]), np.array([9, 0, 3]))
        )
        found.append(hashlib.sha256(raw.numpy().tobytes()).hexdigest()[:16])
    assert found == ["1147a6e245c2fac2", "fe3e334ad39108a5"]


def test_many_classes_and_extreme_rows():
    classes = 2**18
    logits = torch.zeros(4, classes)
    logits[1] = torch.linspace(-3e38, 3e38, classes, dtype=torch.float64)
    logits[2] = -torch.arange(classes).float()
    logits[3, classes - 1] = 80.0
    codec = sampled(classes, k=2, draws=50)
    ids = stored_ids(codec.encode(logits, keys(4)), codec)
    assert (ids < classes).all() and (ids >= 0).all()
    assert len(set(ids[0, 2:].tolist())) > 40 and ids[0, 2:].max() > 65536
    assert (ids[1, 2:] == classes - 3).all()  # all others have no probability
    assert ids[2, 2:].max() < 20
    assert ids[3, 0] == classes - 1


@pytest.mark.parametrize("k", [0, 4])
def test_files_do_not_depend_on_who_writes_what_when(tmp_path, k):
    manifest = make_manifest("sampled", k=k, draws=5)
    draw = np.random.default_rng(1)
    with LogitCacheWriter(tmp_path / "a", manifest) as writer:
        for view in (0, 1):
            writer.write(np.arange(SAMPLES), view, make_logits(view))
    for first in (0, 1):  # two writers, a view each
        with LogitCacheWriter(tmp_path / "b", manifest) as writer:
            for part in np.array_split(draw.permutation(SAMPLES), 7):
                writer.write(part, 1 - first, make_logits(1 - first)[part])
    assert file_bytes(tmp_path / "a") == file_bytes(tmp_path / "b")
    cache = LogitCache.open(tmp_path / "a")
    stored = cache.gather_records(np.arange(SAMPLES), 1)
    expected = ViewKeys(7, np.arange(SAMPLES), np.ones(SAMPLES, int))
    assert torch.equal(stored, cache.codec.encode(make_logits(1), expected))


# ---------------------------------------------------------------------------------------------
# Comparing with the teacher
# ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("k", "draws"), SHAPES)
def test_a_record_is_checked_against_logits_computed_again(k, draws):
    codec = sampled(k=k, draws=draws, temperatures=(1.0, 3.0))
    logits = make_logits(1, 64, 1000) / 2
    stored = codec.decode(codec.encode(logits, keys(64)), 3.0)

    def excess(again: torch.Tensor, of: ViewKeys) -> torch.Tensor:
        error, allowed = compare_logits(stored, again, codec=codec, tau=3.0, keys=of)
        return error - allowed

    noise = torch.randn(logits.shape, generator=torch.Generator().manual_seed(9))
    assert (excess(logits, keys(64)) < -9e-4).all()  # the threshold is for arithmetic alone
    assert (excess(logits + 5e-4 * noise.clamp(-2, 2), keys(64)) <= 0).all()
    assert (excess(logits.flip(1), keys(64)) > 0).all()
    assert (excess(logits, ViewKeys(SEED + 1, *keys(64)[1:])) > 0).all()
    assert (excess(logits + 0.3 * noise, keys(64)) > 0).float().mean() > 0.9
    with pytest.raises(InputError, match="needs to know which views"):
        compare_logits(stored, logits, codec=codec, tau=3.0)


def test_the_error_of_draws_is_at_most_that_of_the_log_probabilities():
    codec = sampled(300, k=2, draws=30)
    logits = make_logits(1, 100, 300)
    form = codec.decode(codec.encode(logits, keys(100)), 1.0)
    words = keys(100).words(30)
    exact = torch.log_softmax(logits.double(), 1)
    assert draw_errors(form, 2, exact, words).max() < 1e-8
    largest = 0.0
    for size in (1e-3, 0.1, 1.0):
        noise = size * torch.randn(logits.shape, generator=torch.Generator().manual_seed(9)).sign()
        moved = torch.log_softmax((logits + noise).double(), 1)
        error, true = draw_errors(form, 2, moved, words), (moved - exact).abs().amax(1)
        assert (error <= true + 1e-8).all()
        largest = max(largest, float((error / true).max()))
    assert largest > 0.3  # the bound is not idle


# ---------------------------------------------------------------------------------------------
# Refusals
# ---------------------------------------------------------------------------------------------


def test_what_does_not_fit_is_refused():
    assert (sampled(20, None, None).k, sampled(20, None, None).draws) == (8, 8)
    small = codec_of("sampled", 3)
    assert (small.k, small.draws) == (1, 2)
    for k, draws in ((15, 6), (0, 21), (20, 1)):
        with pytest.raises(InputError, match=rf"codec\.k={k} and codec\.draws={draws}: sampled"):
            sampled(20, k, draws)
    with pytest.raises(InputError, match="sampled takes at most 262144 classes"):
        sampled(2**18 + 1)
    with pytest.raises(CacheError, match="no tail mass at temperature 2; recorded: 1"):
        sampled().layout(2.0)
    with pytest.raises(InputError, match="needs to know which views the logits are of"):
        sampled(20).encode(make_logits(0))


def test_a_manifest_is_refused_where_it_is_not_of_this_codec():
    values = sampled().manifest()
    assert codec_from_manifest(values, "here") == sampled()
    bad = [{"draws": "8"}, {"draws": 0}, {"draws": 2000}, {"draws": True}, {"k": -1}, {"k": None},
           {"temperatures": []}, {"true_class": True}, {"name": "topk"}]  # fmt: skip
    for changes in bad:
        with pytest.raises(CacheError, match=r"^here: "):
            codec_from_manifest(values | changes, "here")
    del values["draws"]
    with pytest.raises(CacheError, match=r"here: codec\.draws must be an integer"):
        codec_from_manifest(values, "here")


@pytest.mark.parametrize("seed", [None, -1, 2**64, "0", 1.0])
def test_the_seed_of_the_views_is_needed(tmp_path, seed):
    manifest = make_manifest("sampled")
    fingerprint = {**manifest["fingerprint"], "view.seed": seed}
    if seed is None:
        del fingerprint["view.seed"]
    with (
        LogitCacheWriter(tmp_path, manifest | {"fingerprint": fingerprint}) as writer,
        pytest.raises(InputError, match=r"sampled needs the seed of the views: view\.seed in"),
    ):
        writer.write(np.arange(SAMPLES), 0, make_logits(0))
    assert keys_of(codec_of(), {}, np.arange(2), np.arange(2)) is None
