"""The reuse curve: accuracy against the views of each image, at equal steps."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import fmean, stdev
from typing import TYPE_CHECKING, Any

from bench.fashion.protocol import DIGITS_IMAGES, REUSE_IMAGES
from bench.plot import TEXT

if TYPE_CHECKING:
    from matplotlib.figure import Figure

KINDS = {"hard": ("#6f7fb3", "o"), "soft": ("#2f8f4e", "s"), "feature": ("#b3603f", "^")}
PANELS = {
    # title: (arm of a kind at a number of views, numbers of views)
    f"Fashion-MNIST, {REUSE_IMAGES:,} images, 48 epochs": (
        lambda kind, views: f"{kind}, {views} views", (1, 3, 12, 48),
    ),
    f"digits, {DIGITS_IMAGES} images, 70 epochs": (
        lambda kind, views: f"digits: {kind}" + (f", {views} views" if views < 70 else ""),
        (1, 3, 10, 70),
    ),
}  # fmt: skip


def reuse_chart(found: Mapping[str, Sequence[Mapping[str, Any]]]) -> Figure:
    """Mean top-1 of the seeds with their standard deviation; ``found``: results by arm."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.4), layout="constrained")
    figure.patch.set_alpha(0)
    for axes, (title, (name, numbers)) in zip(
        figure.subplots(1, len(PANELS)), PANELS.items(), strict=True
    ):
        axes.patch.set_alpha(0)
        for shift, (kind, (colour, marker)) in enumerate(KINDS.items()):
            seeds = [
                [100 * row["top1"] for row in found[name(kind, views)]] for views in numbers
            ]  # fmt: skip
            axes.errorbar(
                [views * 1.04 ** (shift - 1) for views in numbers], list(map(fmean, seeds)),
                list(map(stdev, seeds)), label=kind, color=colour, marker=marker, markersize=5,
                linewidth=1.5, capsize=3,
            )  # fmt: skip
        axes.set_xscale("log")
        axes.set_xticks(numbers, [str(views) for views in numbers])
        axes.minorticks_off()
        axes.set_xlabel("views of each image", color=TEXT, fontsize=8)
        axes.set_ylabel("top-1, %", color=TEXT, fontsize=8)
        axes.tick_params(colors=TEXT, labelsize=8)
        axes.set_title(title, fontsize=9, color=TEXT, loc="left")
        for side, spine in axes.spines.items():
            spine.set_visible(side in ("left", "bottom"))
            spine.set_color(TEXT)
        axes.legend(frameon=False, labelcolor=TEXT, fontsize=8)
    return figure
