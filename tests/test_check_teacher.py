"""A cache checked against its teacher while a run trains from it."""

from __future__ import annotations

import logging

import pytest
import torch

from deit_fast.cache import CacheMismatch, codec_from_config
from deit_fast.cache.verify import compare_logits
from deit_fast.config import CodecConfig
from deit_fast.errors import CacheError, InputError
from deit_fast.precomputation import precompute
from deit_fast.training.loop import train
from helpers.runs import comparable_rows, last_state, train_rows, unruly, weights_equal


@pytest.mark.parametrize(
    ("codec", "bound"),
    [
        ({"name": "dense-fp32"}, 2e-6),
        ({"name": "topk", "k": 3}, 2e-3),
        ({"name": "sampled", "k": 2, "draws": 4}, 2e-3),
        ({"name": "hard"}, 1e-6),
    ],
)
def test_the_right_teacher_agrees_and_changes_nothing(world, tmp_path, codec, bound):
    kind = {"kind": "hard" if codec["name"] == "hard" else "soft"}
    config = unruly(
        world, tmp_path / "checked", cache=str(tmp_path / "cache"), codec=codec, loss=kind,
        accumulate=2, check_teacher_every=4,
    )  # fmt: skip
    precompute(config)
    train(config)
    rows = train_rows(comparable_rows(tmp_path / "checked"))
    found = {row["step"]: row.pop("teacher_difference") for row in rows
             if "teacher_difference" in row}  # fmt: skip
    assert list(found) == [1, 5, 9]
    assert all(0 <= value <= bound for value in found.values()), found
    assert max(found.values()) > 0 or codec["name"] != "topk"  # whose records are fp16
    plain = config.replace(
        output=str(tmp_path / "plain"), teacher=None, check_teacher_every=None
    )  # fmt: skip
    train(plain)
    assert weights_equal(tmp_path / "checked", tmp_path / "plain")
    assert rows == train_rows(comparable_rows(tmp_path / "plain"))


@pytest.mark.parametrize("codec", ["dense-fp32", "topk", "sampled", "hard", "dense-int8"])
def test_a_teacher_that_changed_since_ends_the_run(world, tmp_path, monkeypatch, codec):
    """Its weights are the cache's when the run starts, so its fingerprint is; then they move."""
    kind = {"kind": "hard" if codec == "hard" else "soft"}
    config = unruly(
        world, tmp_path / "run", cache=str(tmp_path / "cache"), codec={"name": codec}, loss=kind,
        check_teacher_every=3,
    )  # fmt: skip
    precompute(config)
    monkeypatch.setenv("UNRULY", "drift:2")  # its third call, at the seventh step
    with pytest.raises(CacheError) as caught:
        train(config)
    text = str(caught.value)
    assert "at step 7 the teacher's logits of view" in text and "check_teacher_every=3" in text
    assert str(tmp_path / "cache") in text and "\n" not in text
    assert last_state(tmp_path / "run")["step"] == 6
    monkeypatch.delenv("UNRULY")
    train(config)


def test_a_teacher_of_other_weights_is_refused_at_the_start(world, tmp_path):
    import torch
    from safetensors.torch import load_file, save_file

    config = unruly(world, tmp_path / "run", cache=str(tmp_path / "cache"), check_teacher_every=3)
    precompute(config)
    weights = load_file(world / "teacher.safetensors")
    name = next(name for name in weights if name.endswith("weight"))
    weights[name] = torch.nextafter(weights[name], weights[name] + 1)
    save_file(weights, tmp_path / "other.safetensors")
    teacher = f"helpers.unruly_teacher:convnet@{tmp_path}/other.safetensors"
    with pytest.raises(CacheMismatch, match=r"teacher\.weights_sha256"):
        train(config.replace(teacher=teacher))


def test_replaced_images_are_no_reason_to_end(world, tmp_path, caplog):
    """Unreadable only since the precompute: the teacher saw another image there."""
    import shutil

    shutil.copytree(world / "data", tmp_path / "data")
    config = unruly(
        world, tmp_path / "run", cache=str(tmp_path / "cache"), check_teacher_every=1,
        data={"root": str(tmp_path / "data")}, codec={"name": "dense-fp32"},
    )  # fmt: skip
    precompute(config)
    victim = sorted((tmp_path / "data/train/3").iterdir())[0]
    victim.write_bytes(b"\0" * victim.stat().st_size)
    with caplog.at_level(logging.WARNING, "deit_fast"):
        result = train(config)
    assert result["substituted"] == [str(victim)]
    checked = [
        r for r in train_rows(comparable_rows(tmp_path / "run")) if "teacher_difference" in r
    ]
    assert 0 < len(checked) < 12


def test_the_check_needs_both(world, tmp_path):
    config = unruly(world, tmp_path / "run", check_teacher_every=2)
    with pytest.raises(InputError, match=r"check_teacher_every=2 .* give --cache and --teacher"):
        train(config)
    with pytest.raises(InputError, match=r"check_teacher_every must be a whole number .*, not 0"):
        unruly(world, tmp_path / "run", check_teacher_every=0)


def test_logits_that_a_teacher_gave_in_bfloat16_may_differ_by_its_rounding():
    """A cache that a GPU wrote, compared with the teacher in float32."""
    logits = 4 * torch.randn(64, 100, generator=torch.Generator().manual_seed(0))
    codec = codec_from_config(CodecConfig(name="dense-fp32"), 100, 1.0)
    stored = codec.decode(codec.encode(logits.bfloat16()), 1.0)
    for wrote_bf16 in (False, True):
        error, allowed = compare_logits(
            stored, logits, codec=codec, tau=1.0, wrote_bf16=wrote_bf16
        )  # fmt: skip
        assert bool((error <= allowed).all()) == wrote_bf16
    error, allowed = compare_logits(stored, logits.flip(1), codec=codec, tau=1.0, wrote_bf16=True)
    assert (error > allowed).all()
