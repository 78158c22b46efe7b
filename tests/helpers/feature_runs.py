"""Short runs that learn features of `helpers.feature_teacher`, and the caches that they read."""

from __future__ import annotations

from pathlib import Path

from deit_fast.config import RunConfig
from deit_fast.precomputation import precompute
from deit_fast.training.loop import train
from helpers.digits import write_few_digits
from helpers.runs import comparable_rows, run_config

ROWS = "helpers.feature_teacher:rows"
OTHER = "helpers.feature_teacher:other_rows"
LOSSES = {"losses": ("mse",)}


def config_of(root: Path, **changes) -> RunConfig:
    """Four steps of mixed and repeated views, features in float32."""
    base = run_config(root, root / "run").replace(
        teacher=ROWS, teacher_floor=0.0, max_steps=4, eval_every=50, save_every=50,
        targets=("logits", "cls", "patches"), cache=str(root / "cache"),
        loss={"kind": "soft"}, codec={"name": "dense-fp32"}, features={"codec": "fp32"},
        view={"mean": (0.5,) * 3, "std": (0.5,) * 3},
    )  # fmt: skip
    return base.replace(**changes)


def make_caches(root: Path) -> Path:
    """Images, and the caches of two teachers in float32 and of one in other codecs."""
    write_few_digits(root / "data", train=9, val=3)
    precompute(config_of(root))
    precompute(config_of(root, teacher=OTHER, targets=("cls",), cache=str(root / "other")))
    precompute(config_of(root, targets=("patches",), cache=str(root / "fp8"),
                         features={"codec": "fp8"}))  # fmt: skip
    return root


def numbers(run: Path) -> list[dict]:
    return [row for row in comparable_rows(run) if row["kind"] == "train"]


def trained(config: RunConfig, output: Path) -> list[dict]:
    train(config.replace(output=str(output)))
    return numbers(output)
