"""Statistics and normalisers of features: what they promise, stored and read again."""

from __future__ import annotations

import dataclasses
import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from deit_fast.errors import CacheError, InputError, RowError
from deit_fast.features.hadamard import hadamard, has_hadamard
from deit_fast.features.normalise import NORMALISERS, Normaliser
from deit_fast.features.statistics import FILE, FeatureStatistics, StatisticsFit
from deit_fast.runtime.tensor_files import save_tensors

WIDTH = 12


def draw(views: int = 500, tokens: int = 5, width: int = WIDTH, seed: int = 0) -> Tensor:
    """Features whose channels differ in mean and scale and are correlated."""
    generator = torch.Generator().manual_seed(seed)
    axes = torch.randn(width, width, generator=generator, dtype=torch.float64)
    x = torch.randn(views, tokens, width, generator=generator, dtype=torch.float64)
    return (x @ axes * torch.logspace(-1, 1, width) + torch.linspace(-3, 8, width)).double()


def fit(x: Tensor, **options) -> FeatureStatistics:
    measured = StatisticsFit(x.shape[2])
    measured.add(x)
    return measured.result(**options)


@pytest.fixture(scope="module")
def drawn() -> Tensor:
    return draw()


@pytest.fixture(scope="module")
def statistics(drawn: Tensor) -> FeatureStatistics:
    return fit(drawn)


# ---------------------------------------------------------------------------------------------
# Hadamard matrices
# ---------------------------------------------------------------------------------------------

WIDTHS = (192, 384, 448, 576, 640, 768, 896, 1024, 1152, 1280, 1408, 1536, 1664, 2048, 3024, 3072,
          4096)  # fmt: skip


@pytest.mark.parametrize("order", [1, 2, 4, 12, 20, 28, 36, 60, 192, 384, 576, 768, 1152])
def test_hadamard_rows_are_orthogonal_signs(order: int) -> None:
    """28, 36 and 60 are of Paley II, I and I; the others show doubling of each."""
    matrix = hadamard(order).astype(np.float64)  # exact: all sums are below 2^53
    assert set(np.unique(matrix)) <= {-1.0, 1.0}
    assert (matrix @ matrix.T == order * np.eye(order)).all()


def test_widths_of_usual_teachers_have_a_hadamard_matrix() -> None:
    assert all(map(has_hadamard, WIDTHS))
    lacking = [order for order in range(4, 200, 4) if not has_hadamard(order)]
    assert lacking == [52, 92, 100, 116, 156, 172, 184, 188]
    assert not any(map(has_hadamard, (0, 3, 6, 10, 50, 386)))
    with pytest.raises(ValueError, match="order 92"):
        hadamard(92)


# ---------------------------------------------------------------------------------------------
# What is measured
# ---------------------------------------------------------------------------------------------


def test_mean_and_deviation_are_those_of_all_tokens(drawn: Tensor, statistics) -> None:
    tokens = drawn.flatten(0, 1).numpy()
    np.testing.assert_allclose(statistics.mean, tokens.mean(0), rtol=1e-12)
    np.testing.assert_allclose(statistics.std, tokens.std(0, ddof=1), rtol=1e-12)
    np.testing.assert_allclose(statistics.phi**2, tokens.var(0, ddof=1).mean(), rtol=1e-12)
    assert statistics.count == len(tokens) and statistics.dead == 0


def test_large_means_cancel_no_variance() -> None:
    """A sum of squares minus the square of the sum would be all rounding here, in float32."""
    x = draw(width=4) / 100
    shifted = fit(x + 1e4)
    torch.testing.assert_close(shifted.std, fit(x).std, rtol=1e-8, atol=0)
    assert fit((x + 1e4).float()).std.isfinite().all()


@settings(max_examples=20, deadline=None)
@given(st.lists(st.integers(0, 499), max_size=4))
def test_no_bit_depends_on_how_views_are_split_into_batches(drawn, statistics, cuts) -> None:
    measured = StatisticsFit(WIDTH)
    edges = [0, *sorted(cuts), len(drawn)]
    for start, stop in itertools.pairwise(edges):
        measured.add(drawn[start:stop])
    assert measured.result().sha256 == statistics.sha256


def test_sixteen_tokens_of_a_view_are_read_and_all_positions_count() -> None:
    views, tokens = 196, 196
    x = torch.zeros(views, tokens, 4)
    x[..., 0] = torch.arange(tokens)
    x[..., 1:] = torch.arange(views)[:, None, None]
    measured = StatisticsFit(4)
    measured.add(x)
    result = measured.result()
    assert result.count == 16 * views
    assert result.mean.tolist() == pytest.approx([(tokens - 1) / 2] + 3 * [(views - 1) / 2])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_half_precision_features_are_measured_in_float64(drawn: Tensor, dtype) -> None:
    x = drawn.to(dtype)
    assert fit(x).sha256 == fit(x.double()).sha256


def test_dead_channels_are_counted_and_not_blown_up(drawn: Tensor) -> None:
    x = drawn.clone()
    x[..., 3] = 7.0
    x[..., 5] = 1e-5 * x[..., 5]
    statistics = fit(x)
    assert statistics.dead == 2
    z = Normaliser("standard", statistics)(x)
    assert z[..., 3].abs().max() < 1e-3 and z[..., 5].abs().max() < 1
    most_dead = x.clone()
    most_dead[..., 2:] = 0
    assert fit(most_dead).dead == WIDTH - 2


def test_signs_of_the_axes_are_fixed(statistics) -> None:
    axes = statistics.rotation.double().T @ torch.from_numpy(hadamard(WIDTH) / WIDTH**0.5)
    largest = axes.gather(0, axes.abs().argmax(0, keepdim=True))
    assert (largest > 0).all()


def test_a_rough_rotation_is_logged(caplog) -> None:
    fit(draw(views=4))
    assert "20 tokens for 12 channels: PHI-S is rough below 48 tokens" in caplog.text


@pytest.mark.parametrize(
    "x, options, message",
    [
        (torch.zeros(1, 1, 4), {}, "two tokens or more, not 1: raise features.fit_views"),
        (torch.ones(9, 2, 4), {}, "features of 9 views are all equal"),
        (draw(9), {"reduce": "pca"}, "features.reduce=pca needs features.dim"),
        (draw(9), {"reduce": "random", "dim": 13}, r"features.dim=13 must lie in \[1, 12\]"),
        (draw(1, 4), {"reduce": "pca", "dim": 4}, "more than 4 tokens, not 4"),
        (draw(9), {"reduce": "lda", "dim": 4}, "features.reduce must be one of none, pca, random"),
    ],
)
def test_what_cannot_be_measured_is_refused(x: Tensor, options: dict, message: str) -> None:
    with pytest.raises(InputError, match=message):
        fit(x, **options)


def test_bad_features_are_refused_by_view() -> None:
    measured = StatisticsFit(WIDTH)
    x = draw(views=3)
    x[2, 1, 0] = float("nan")
    with pytest.raises(RowError, match="row 2: its features are not finite"):
        measured.add(x)
    with pytest.raises(InputError, match=r"must be \[views, tokens, 12\], not \[3, 12\]"):
        measured.add(x[:, 0])


# ---------------------------------------------------------------------------------------------
# Normalisers
# ---------------------------------------------------------------------------------------------


def test_standard_gives_each_channel_mean_0_and_deviation_1(drawn, statistics) -> None:
    z = Normaliser("standard", statistics)(drawn).flatten(0, 1)
    torch.testing.assert_close(z.mean(0), torch.zeros(WIDTH), atol=1e-5, rtol=0)
    torch.testing.assert_close(z.std(0), torch.ones(WIDTH), atol=1e-5, rtol=0)


@settings(max_examples=15, deadline=None)
@given(st.sampled_from([1, 2, 4, 12, 20, 28, 36, 64, 96]), st.integers(0, 2**32 - 1))
def test_phi_s_gives_unit_variance_and_keeps_distances(width: int, seed: int) -> None:
    x = draw(views=2 * width + 8, width=width, seed=seed)
    statistics = fit(x)
    z = Normaliser("phi_s", statistics)(x).double()
    rows = z.flatten(0, 1)
    torch.testing.assert_close(rows.mean(0), torch.zeros(width).double(), atol=1e-4, rtol=0)
    torch.testing.assert_close(rows.var(0), torch.ones(width).double(), atol=1e-4, rtol=0)
    apart = torch.pdist(x[:, 0].contiguous()) / statistics.phi
    torch.testing.assert_close(torch.pdist(z[:, 0].contiguous()), apart, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("kind", ["none", "standard", "phi_s"])
def test_restore_is_the_inverse(kind: str, drawn: Tensor, statistics) -> None:
    normaliser = Normaliser(kind, statistics)
    back = normaliser.restore(normaliser(drawn)).double()
    assert (back - drawn).norm() <= 1e-6 * drawn.norm()


def test_layer_norm_is_of_each_token_and_has_no_inverse(drawn: Tensor) -> None:
    z = Normaliser("layer_norm", None)(drawn)
    mean, deviation = drawn.mean(-1, keepdim=True), drawn.std(-1, correction=0, keepdim=True)
    torch.testing.assert_close(z.double(), (drawn - mean) / deviation, atol=1e-4, rtol=1e-4)
    with pytest.raises(InputError, match="layer_norm has no inverse"):
        Normaliser("layer_norm", None).restore(z)


@pytest.mark.parametrize("kind", NORMALISERS)
def test_normalisers_compute_in_float32_under_autocast(kind: str, drawn, statistics) -> None:
    normaliser = Normaliser(kind, statistics)
    with torch.autocast("cpu", torch.bfloat16):
        z = normaliser(drawn.half())
    assert z.dtype == torch.float32 and not normaliser.state_dict()
    torch.testing.assert_close(z, normaliser(drawn.half().float()), atol=0, rtol=0)


def test_normalisers_that_cannot_be_are_refused(statistics) -> None:
    with pytest.raises(InputError, match="needs the statistics of a feature cache: choose layer_n"):
        Normaliser("standard", None)(torch.zeros(1, 1, WIDTH))
    with pytest.raises(InputError, match=r"must be one of none, .* not 'whiten'"):
        Normaliser("whiten", statistics)
    odd = fit(draw(width=10))
    assert odd.rotation is None
    with pytest.raises(InputError, match="matrix is known for 10 channels: choose standard"):
        Normaliser("phi_s", odd)


# ---------------------------------------------------------------------------------------------
# Fewer channels
# ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("reduce", ["none", "pca", "random"])
def test_statistics_are_those_of_the_reduced_features(reduce: str, drawn: Tensor) -> None:
    statistics = fit(drawn, reduce=reduce, dim=None if reduce == "none" else 4)
    small = statistics.reduce(drawn)
    assert small.dtype == torch.float32 and small.shape[2] == statistics.width
    tokens = small.flatten(0, 1).double()
    torch.testing.assert_close(tokens.mean(0), statistics.mean, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(tokens.std(0), statistics.std, atol=0, rtol=1e-5)
    z = Normaliser("phi_s", statistics)(small).flatten(0, 1)
    torch.testing.assert_close(z.var(0), torch.ones(statistics.width), atol=1e-4, rtol=0)


def test_pca_keeps_the_most_variance(drawn: Tensor) -> None:
    tokens = drawn.flatten(0, 1)
    kept = fit(drawn, reduce="pca", dim=3).std.square().sum()
    singular = torch.linalg.svdvals(tokens - tokens.mean(0)).square() / (len(tokens) - 1)
    torch.testing.assert_close(kept, singular[:3].sum(), rtol=1e-6, atol=0)


def test_random_axes_are_orthonormal_and_follow_the_seed(drawn: Tensor) -> None:
    one, same, other = (fit(drawn, reduce="random", dim=4, seed=seed) for seed in (5, 5, 6))
    matrix = one.reduce_matrix.double()
    torch.testing.assert_close(matrix.T @ matrix, torch.eye(4).double(), atol=1e-6, rtol=0)
    assert one.reduce_mean is None
    assert one.sha256 == same.sha256 != other.sha256


def test_reduction_hardly_depends_on_the_batch(drawn: Tensor) -> None:
    statistics = fit(drawn, reduce="pca", dim=4)
    whole = statistics.reduce(drawn.float())
    parts = torch.cat([statistics.reduce(part) for part in drawn.float().split(7)])
    assert (whole == parts).all()


# ---------------------------------------------------------------------------------------------
# Stored and read again
# ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("reduce", ["none", "pca", "random"])
def test_saved_statistics_are_read_bit_for_bit(reduce: str, drawn: Tensor, tmp_path) -> None:
    saved = fit(drawn, reduce=reduce, dim=None if reduce == "none" else 4)
    saved.save(tmp_path / FILE)
    read = FeatureStatistics.load(tmp_path / FILE, saved.width, saved.sha256)
    for field in dataclasses.fields(saved):
        a, b = getattr(saved, field.name), getattr(read, field.name)
        assert torch.equal(a, b) if isinstance(a, Tensor) else a == b, field.name
    assert read.sha256 == saved.sha256


def test_no_hadamard_matrix_is_stored_as_no_rotation(tmp_path) -> None:
    saved = fit(draw(width=10))
    saved.save(tmp_path / FILE)
    assert FeatureStatistics.load(tmp_path / FILE, 10).rotation is None


def changed(statistics: FeatureStatistics, name: str, value: Tensor | None) -> dict[str, Tensor]:
    tensors = statistics._tensors() | {name: value}
    return {key: tensor for key, tensor in tensors.items() if tensor is not None}


@pytest.mark.parametrize(
    "name, value, message",
    [
        ("std", None, "std is not there"),
        ("extra", torch.zeros(1), "unknown tensor extra"),
        ("mean", torch.zeros(13).double(), r"mean is torch.float64 \[13\], not .* \[12\]"),
        ("mean", torch.zeros(12), r"mean is torch.float32"),
        ("mean", torch.full((12,), float("nan")).double(), "mean is not finite"),
        ("std", torch.zeros(12).double(), "std or phi is not positive"),
        ("phi", torch.zeros(1).double(), "std or phi is not positive"),
        ("count", torch.tensor([1]), "std or phi is not positive"),
        ("rotation", torch.ones(12, 12), "the columns of rotation are not orthonormal"),
        ("reduce_mean", torch.zeros(12).double(), "reduce_mean is there without reduce_matrix"),
    ],
)
def test_tensors_that_are_no_statistics_are_refused(name, value, message, statistics, tmp_path):
    save_tensors(tmp_path / FILE, changed(statistics, name, value), {})
    with pytest.raises(CacheError, match=message):
        FeatureStatistics.load(tmp_path / FILE, WIDTH)


def test_damaged_missing_and_foreign_files_are_refused(statistics, tmp_path) -> None:
    path = tmp_path / FILE
    with pytest.raises(CacheError, match=f"{FILE} are missing: write this cache again"):
        FeatureStatistics.load(path, WIDTH)
    statistics.save(path)
    content = bytearray(path.read_bytes())
    content[-5] ^= 1
    path.write_bytes(content)
    with pytest.raises(CacheError, match="is damaged: its checksum differs"):
        FeatureStatistics.load(path, WIDTH)
    path.write_bytes(content[:40])
    with pytest.raises(CacheError, match="is not a safetensors file"):
        FeatureStatistics.load(path, WIDTH)
    statistics.save(path)
    with pytest.raises(CacheError, match=r"mean is torch.float64 \[12\], not .* \[16\]"):
        FeatureStatistics.load(path, 16)
    with pytest.raises(CacheError, match="are not those that the cache was written with"):
        FeatureStatistics.load(path, WIDTH, "0" * 64)


def test_of_several_writers_the_first_file_stays(statistics, tmp_path) -> None:
    path = tmp_path / FILE
    statistics.create(path)
    content = path.read_bytes()
    other = dataclasses.replace(statistics, mean=statistics.mean + 1)
    other.create(path)
    assert path.read_bytes() == content and [*tmp_path.iterdir()] == [path]
    assert FeatureStatistics.load(path, WIDTH, statistics.sha256).sha256 == statistics.sha256
