"""Codecs of features: stated error bounds, golden bytes, refusals, independence of the batch."""

from __future__ import annotations

import typing

import numpy as np
import pytest
import torch

from deit_fast import _C
from deit_fast.cache import FEATURE_CODECS, CacheError, feature_codec
from deit_fast.cache.feature_codecs import feature_codec_from_manifest
from deit_fast.config import FeatureConfig
from deit_fast.errors import InputError, RowError
from helpers.like_cuda import CudaDivision

SCALED = ("fp8", "int8", "int8-standard")
FLOATS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
ROWS, TOKENS, WIDTH = 12, 5, 37


def make_features(seed=0, rows=ROWS, tokens=TOKENS, width=WIDTH) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, tokens, width, generator=generator)


def round_trip(name: str, features: torch.Tensor) -> torch.Tensor:
    codec = feature_codec(name, *features.shape[1:])
    records = codec.encode(features)
    assert records.shape == (len(features), codec.record_bytes) and records.dtype == torch.uint8
    return codec.decode(records, 1.0)


def awkward_features() -> torch.Tensor:
    """Tokens of very different sizes, massive channels, zeros, values around the least normal."""
    x = make_features(1, 60) * torch.logspace(-46, 37, 60)[:, None, None]
    x[3, 1] = 0
    x[4, 2, :] = -0.0
    x[10:20, :, 7] = x[10:20].abs().amax(2) * 1000  # one massive channel
    x[20:30, 2] *= 10  # an artefact token
    x[40, 0, 5] = torch.finfo(torch.float32).max
    x[40, 1, 5] = -torch.finfo(torch.float32).max
    x[41, 0, 1:] = 0  # one value alone
    x[42] = 1e-45  # the least subnormal
    return x


def test_every_codec_is_a_setting_and_has_a_test_of_its_error():
    settings = typing.get_args(typing.get_type_hints(FeatureConfig)["codec"])
    assert set(FEATURE_CODECS) == set(settings) == {*SCALED, *FLOATS}


@pytest.mark.parametrize(
    ("name", "size"),
    [("fp32", 4 * 185), ("fp16", 370), ("bf16", 370), *[(name, 5 * 41) for name in SCALED]],
)
def test_bytes_of_a_record(name, size):
    codec = feature_codec(name, TOKENS, WIDTH)
    assert codec.record_bytes == size
    assert codec.name == name
    assert codec.manifest() == {"name": name, "tokens": TOKENS, "width": WIDTH}
    assert feature_codec_from_manifest(codec.manifest(), "here") == codec


@pytest.mark.parametrize("name", SCALED)
def test_scaled_codecs_stay_within_their_bound(name):
    features = awkward_features()
    x = features.double()
    error = (round_trip(name, features).double() - x).abs()
    amax = x.abs().amax(2, keepdim=True)
    if name == "fp8":
        scale = (amax / 448).clamp(min=2.0**-126) * (1 + 2**-23)
        bound = x.abs() / 16 + scale / 1024 + 2.0**-149
    else:
        bound = (amax / 127).clamp(min=2.0**-126) / 2 + amax * 2.0**-22
    assert (error <= bound).all(), float((error / bound).max())
    plain = make_features(2, 300)
    error = (round_trip(name, plain).double() - plain).abs()
    # the bounds are not idle
    if name == "fp8":
        assert (error > 0.8 * plain.abs() / 16).float().mean() > 0.01
    else:
        assert (error > 0.9 * plain.abs().amax(2, keepdim=True) / 254).float().mean() > 0.05


def test_a_massive_channel_costs_the_others_nothing_in_fp8_and_much_in_int8():
    x = make_features(3, 100, 4, 384)
    massive = x.clone()
    massive[:, :, 11] = 800
    rest = torch.arange(384) != 11

    def loss(name, values):
        found = round_trip(name, values)[..., rest]
        return float((found - values[..., rest]).norm() / values[..., rest].norm())

    assert loss("fp8", massive) < 1.05 * loss("fp8", x) < 0.03
    assert loss("int8", massive) > 20 * loss("int8", x)


@pytest.mark.parametrize("name", SCALED)
def test_a_token_of_zeros_has_scale_zero(name):
    codec = feature_codec(name, 2, 3)
    records = codec.encode(torch.tensor([[[0.0, 0.0, 0.0], [1.0, 0.5, -1.0]]]))
    assert records[0, :7].tolist() == [0] * 7
    assert codec.decode(records, 1.0)[0, 0].tolist() == [0.0, 0.0, 0.0]
    assert codec.decode(records, 1.0)[0, 1, 0] == pytest.approx(1, rel=1e-6)


# float8 e4m3 (OCP 8-bit floating point, 2023): bias 7, no infinity, 0x7F and 0xFF are NaN.
def e4m3(code: int) -> float:
    exponent, mantissa = code >> 3 & 15, code & 7
    size = mantissa * 2.0**-9 if exponent == 0 else (1 + mantissa / 8) * 2.0 ** (exponent - 7)
    return (-size if code & 128 else size) if code & 127 != 127 else float("nan")


def test_all_bytes_of_e4m3_decode_to_their_values():
    """As by the format's definition, through csrc/ and by torch; at two scales and odd widths."""
    codes = torch.arange(256, dtype=torch.uint8)
    values = torch.tensor([e4m3(code) for code in range(256)])
    assert values.nan_to_num(0).unique().numel() == 253
    assert torch.equal(
        codes.view(torch.float8_e4m3fn).float().nan_to_num(9e9), values.nan_to_num(9e9)
    )
    for scale in (1.0, 0.3712):
        record = torch.cat([torch.tensor([scale]).view(torch.uint8), codes])[None]
        found = feature_codec("fp8", 1, 256).decode(record, 1.0)
        assert torch.equal(found[0, 0].nan_to_num(9e9), (values * scale).nan_to_num(9e9))
        rows = torch.cat(
            [torch.tensor([scale]).view(torch.uint8).repeat(256, 1), codes[:, None]], 1
        )
        found = feature_codec("fp8", 256, 1).decode(rows.reshape(1, -1), 1.0)
        assert torch.equal(found[0, :, 0].nan_to_num(9e9), (values * scale).nan_to_num(9e9))


def test_e4m3_rounds_to_nearest_even_at_every_border():
    """The scale is exactly 1, so codes are those of the values themselves."""
    finite = torch.tensor([e4m3(code) for code in range(127)], dtype=torch.float64)
    middle = (finite[1:] + finite[:-1]) / 2
    below = torch.nextafter(middle.float(), torch.tensor(0.0))
    above = torch.nextafter(middle.float(), torch.tensor(torch.inf))
    x = torch.cat([finite.float(), middle.float(), below, above])
    token = torch.cat([x, -x, torch.tensor([448.0])])[None, None]
    codes = feature_codec("fp8", 1, token.shape[2]).encode(token)[0, 4:].numpy()
    low = np.arange(126)
    even = low + low % 2
    expected = np.concatenate([np.arange(127), even, low, low + 1])
    assert np.array_equal(codes[: len(expected)], expected)
    assert np.array_equal(codes[len(expected) : -1], expected | 128)
    assert codes[-1] == 0x7E


def test_all_bytes_of_int8_decode_to_their_values():
    codes = torch.arange(256, dtype=torch.uint8)
    record = torch.cat([torch.tensor([0.25]).view(torch.uint8), codes])[None]
    found = feature_codec("int8", 1, 256).decode(record, 1.0)
    assert torch.equal(found[0, 0], codes.view(torch.int8).float() * 0.25)


@pytest.mark.parametrize(("name", "dtype"), FLOATS.items())
def test_floats_come_back_bit_for_bit(name, dtype):
    features = make_features(4).to(dtype)
    features[0, 0, :3] = torch.tensor([-0.0, 2.0**-24, 60000.0]).to(dtype)
    found = round_trip(name, features)
    assert found.dtype == dtype
    assert torch.equal(found.view(torch.uint8), features.view(torch.uint8))
    rough = make_features(5)
    error = (round_trip(name, rough).double() - rough).abs()
    step = {"fp32": 0.0, "bf16": 2.0**-8, "fp16": 2.0**-11}[name]
    assert (error <= step * rough.abs() + 2.0**-25).all()
    if name == "fp32":
        assert torch.equal(round_trip(name, awkward_features()), awkward_features())


@pytest.mark.parametrize("name", FEATURE_CODECS)
def test_a_record_does_not_depend_on_its_batch(name):
    features = make_features(6, 9, 3, 40)
    features[4, 1] *= 1e4
    codec = feature_codec(name, 3, 40)
    whole = codec.encode(features)
    apart = torch.cat([codec.encode(row[None]) for row in features])
    assert torch.equal(whole, apart)
    strided = torch.cat([features, features], 2)[..., ::2]
    assert torch.equal(codec.encode(strided), codec.encode(strided.contiguous()))
    channels_first = features.transpose(1, 2).contiguous().transpose(1, 2)
    assert torch.equal(codec.encode(channels_first), whole)


@pytest.mark.parametrize("name", FEATURE_CODECS)
def test_other_dtypes_are_encoded_from_their_float32(name):
    codec = feature_codec(name, TOKENS, WIDTH)
    for dtype in (torch.bfloat16, torch.float16, torch.float64):
        features = make_features(7).to(dtype)
        assert torch.equal(codec.encode(features), codec.encode(features.float()))


@pytest.mark.parametrize("name", FEATURE_CODECS)
@pytest.mark.parametrize("value", [float("inf"), -float("inf"), float("nan")])
def test_a_value_that_is_not_finite_is_refused_with_its_row(name, value):
    """float8 e4m3 would store an infinity as 448 in silence."""
    features = make_features(8)
    features[7, 3, 11] = value
    features[9, 0, 0] = value
    reason = f"teacher feature {value:g} of token 3, channel 11 is not finite"
    with pytest.raises(RowError, match=f"^row 7: {reason}$") as caught:
        feature_codec(name, TOKENS, WIDTH).encode(features)
    assert caught.value.row == 7


def test_values_beyond_a_dtype():
    features = make_features(9)
    features[2, 1, 4] = 65520.0
    with pytest.raises(
        RowError, match="row 2: teacher feature 65520 of token 1, channel 4 does not"
    ):
        feature_codec("fp16", TOKENS, WIDTH).encode(features)
    for name in ("fp8", "int8", "bf16", "fp32"):
        assert float(round_trip(name, features)[2, 1, 4]) == pytest.approx(65520, rel=2**-8)
    features[2, 1, 4] = torch.finfo(torch.float32).max
    with pytest.raises(RowError, match=r"does not fit bf16"):
        feature_codec("bf16", TOKENS, WIDTH).encode(features)
    wide = features.double()
    wide[2, 1, 4] = 1e39
    for name in FEATURE_CODECS:
        with pytest.raises(RowError, match=r"teacher feature 1e\+39 .* does not fit float32"):
            feature_codec(name, TOKENS, WIDTH).encode(wide)


def test_the_largest_values_do_not_overflow_when_decoded():
    top = np.float32(3.4028235e38)
    for _ in range(8):
        token = torch.tensor([[[float(top), -float(top), 1.0]]])
        for name in SCALED:
            assert round_trip(name, token).isfinite().all(), (name, top)
        top = np.nextafter(top, np.float32(0))


def test_wrong_shapes_are_named():
    codec = feature_codec("fp8", TOKENS, WIDTH)
    for wrong in (make_features()[:, 0], make_features(tokens=4), make_features().int()):
        with pytest.raises(InputError, match=rf"features must be float \[n, {TOKENS}, {WIDTH}\]"):
            codec.encode(wrong)
    for values in (("fp9", 1, 1), ("fp8", 0, 1), ("fp8", 1, 2**24 + 1), ("fp8", True, 1)):
        with pytest.raises(InputError, match=r"^codec\.(name|tokens|width) must"):
            feature_codec(*values)


@pytest.mark.parametrize(
    "change",
    [{"name": "fp9"}, {"name": ["fp8"]}, {"tokens": 0}, {"tokens": "1"}, {"tokens": True},
     {"width": -3}, {"width": 2.0}, {"k": None}],
)  # fmt: skip
def test_a_manifest_that_describes_no_codec_is_refused(change):
    values = feature_codec("fp8", 2, 3).manifest() | change
    with pytest.raises(CacheError, match=r"^here: codec"):
        feature_codec_from_manifest(values, "here")


def test_the_extension_refuses_a_layout_that_would_read_beyond_a_record():
    with pytest.raises(ValueError, match="a scale of 4 bytes and a byte per channel"):
        _C.RecordLayout(_C.RecordKind.token_fp8, record_bytes=20, num_classes=17, tokens=2)


@pytest.mark.parametrize("name", FEATURE_CODECS)
def test_the_division_of_a_gpu_gives_the_same_bytes(name):
    features = make_features(10, 33)
    codec = feature_codec(name, TOKENS, WIDTH)
    with CudaDivision():
        assert not torch.equal(features / 127, features / features.new_full((), 127))
        records = codec.encode(features)
    assert torch.equal(records, codec.encode(features))


@pytest.mark.gpu
@pytest.mark.parametrize("name", FEATURE_CODECS)
@pytest.mark.parametrize(("tokens", "width"), [(1, 384), (196, 384), (5, 37), (3, 1)])
def test_cuda_gives_the_same_bytes_and_values(name, tokens, width):
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    features = make_features(10, 33, tokens, width)
    codec = feature_codec(name, tokens, width)
    records = codec.encode(features)
    assert torch.equal(codec.encode(features.cuda()).cpu(), records)
    assert torch.equal(codec.decode(records.cuda(), 1.0).cpu(), codec.decode(records, 1.0))
