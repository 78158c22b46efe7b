"""Pictures of an analysis: curves as SVG by matplotlib, attention as strips of PNG tiles."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL import Image
from torch import Tensor

from deit_fast.runtime.files import write_atomically

# Okabe and Ito's, which colour-blind readers tell apart; as in the report
COLOURS = ("#0072b2", "#d55e00", "#008a63", "#b5558f", "#444b53")
NAMES = {
    "class": "class head",
    "distillation": "distillation head",
    "sum_logits": "sum of logits",
    "teacher": "teacher",
}
TILE, GAP = 160, 8  # least side of a tile, and what lies between two, pixels


def draw(found: dict[str, Any], folder: Path) -> None:
    """Write the pictures that an analysis has figures for into ``folder``."""
    # paths instead of fonts, and a fixed salt: the same file on every machine
    with matplotlib.rc_context({"svg.hashsalt": "deit_fast", "font.size": 10}):
        if "tokens" in found:
            _write(_token_cosine(found["tokens"]), folder / "token-cosine.svg")
        _write(_calibration(found), folder / "calibration.svg")
        _write(_disagreement(found["disagreement"]), folder / "disagreement.svg")
        if "teacher" in found:
            _write(_temperatures(found["teacher"]), folder / "temperature.svg")


def _write(figure: Figure, path: Path) -> None:
    content = io.BytesIO()
    figure.savefig(content, format="svg", metadata={"Date": None}, bbox_inches="tight")
    write_atomically(path, content.getvalue())


def _axes(width: float = 6.0, height: float = 4.0) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(width, height))
    axes = figure.add_subplot()
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes


def _token_cosine(tokens: dict[str, Any]) -> Figure:
    figure, axes = _axes()
    layers = tokens["layers"]
    at = range(len(layers))
    mean = np.array([layer["mean"] for layer in layers])
    std = np.array([layer["std"] for layer in layers])
    axes.fill_between(at, mean - std, mean + std, color=COLOURS[0], alpha=0.2, linewidth=0)
    axes.plot(at, mean, color=COLOURS[0], marker="o", markersize=3)
    axes.set_xticks(list(at), [layer["name"] for layer in layers], rotation=45, ha="right")
    axes.set_ylabel("cosine of class and distillation token")
    axes.set_title("Mean over images, band: standard deviation", fontsize=10)
    axes.grid(axis="y", alpha=0.3)
    return figure


def _calibration(found: dict[str, Any]) -> Figure:
    figure, axes = _axes(5.0, 5.0)
    axes.plot([0, 1], [0, 1], color="#999999", linestyle="--", linewidth=1)
    curves = {name: value for name, value in found["calibration"].items() if name in NAMES}
    if "teacher" in found:
        curves["teacher"] = found["teacher"]["calibration"]
    for (name, curve), colour in zip(curves.items(), COLOURS, strict=False):
        points = [(row["confidence"], row["accuracy"]) for row in curve["bins"]]
        label = f"{NAMES[name]}, ECE {100 * curve['ece']:.1f} %"
        axes.plot(*zip(*points, strict=True), color=colour, marker="o", markersize=3, label=label)
    axes.set_xlabel("confidence")
    axes.set_ylabel("accuracy")
    axes.legend(frameon=False)
    return figure


def _disagreement(table: dict[str, Any]) -> Figure:
    names, shares = table["names"], np.array(table["shares"])
    side = 1.2 + 0.8 * len(names)
    figure, axes = _axes(side, side)
    axes.imshow(shares, cmap="Blues", vmin=0, vmax=max(2 * shares.max(), 1e-9))
    for row, column in np.ndindex(*shares.shape):
        axes.text(column, row, f"{shares[row, column]:.3f}", ha="center", va="center", fontsize=9)
    axes.set_xticks(range(len(names)), names, rotation=45, ha="right")
    axes.set_yticks(range(len(names)), names)
    axes.set_title("Share of different decisions", fontsize=10)
    return figure


def _temperatures(teacher: dict[str, Any]) -> Figure:
    figure, axes = _axes()
    rows = teacher["temperatures"]
    at = [row["temperature"] for row in rows]
    axes.plot(at, [row["uniform_share"] for row in rows], color=COLOURS[0], label="entropy / log C")
    for colour, k in zip(COLOURS[1:], rows[0]["mass"], strict=False):
        axes.plot(at, [row["mass"][k] for row in rows], color=colour, label=f"mass of top {k}")
    axes.set_xlabel("temperature")
    axes.set_ylim(0, 1.02)
    axes.legend(frameon=False)
    axes.grid(axis="y", alpha=0.3)
    return figure


# ---------------------------------------------------------------------------------------------
# Attention
# ---------------------------------------------------------------------------------------------


def remove_strips(folder: Path) -> None:
    """Those of an earlier analysis, which may have shown other images."""
    for path in folder.glob("attention-*.png"):
        path.unlink()


def draw_strip(
    folder: Path,
    index: int,
    image: Tensor,
    mean: Sequence[float],
    std: Sequence[float],
    maps: Tensor,
) -> str:
    """Image and maps side by side, without text: captions and backgrounds are the page's.

    Args:
        index: the image's id, which names the file.
        image: [3, S, S], normalised by ``mean`` and ``std``.
        maps: [n, h, w]; each is scaled to its own maximum.

    Returns:
        The file's name.
    """
    channels = image.float().cpu() * _column(std) + _column(mean)
    pixels = (channels.clamp(0, 1) * 255).round().byte().permute(1, 2, 0).numpy()
    side = -(-TILE // len(pixels)) * len(pixels)  # a multiple, so that pixels stay square
    tiles = [Image.fromarray(pixels).resize((side, side), Image.Resampling.NEAREST)]
    colours = matplotlib.colormaps["viridis"]
    for values in maps.float().cpu().numpy():
        coloured = colours(values / max(values.max(), 1e-30), bytes=True)[..., :3]
        tile = Image.fromarray(np.ascontiguousarray(coloured))
        tiles.append(tile.resize((side, side), Image.Resampling.NEAREST))
    strip = Image.new("RGBA", (len(tiles) * (side + GAP) - GAP, side))
    for place, tile in enumerate(tiles):
        strip.paste(tile, (place * (side + GAP), 0))
    content = io.BytesIO()
    strip.save(content, format="png", optimize=True)
    name = f"attention-{index}.png"
    write_atomically(folder / name, content.getvalue())
    return name


def _column(values: Sequence[float]) -> Tensor:
    return Tensor(list(values)).view(3, 1, 1)
