"""Pictures of an analysis: charts as SVG, attention maps as strips of PNG tiles."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from torch import Tensor

from deit_fast.errors import InputError
from deit_fast.runtime.files import write_atomically
from deit_fast.tools.charts import COLOURS, TEXT_COLOUR, new_axes

NAMES = {
    "class": "class head",
    "distillation": "distillation head",
    "sum_logits": "sum of logits",
    "teacher": "teacher",
}
TILE, GAP = 160, 8  # least side of a tile, and distance of two tiles, pixels


def require_matplotlib() -> None:
    """Raise InputError where matplotlib is missing: before minutes of measuring."""
    try:
        import matplotlib.figure  # noqa: F401
    except ImportError:
        raise InputError("analyze draws with matplotlib: pip install matplotlib") from None


def draw(found: dict[str, Any], folder: Path) -> None:
    """Write the charts for which an analysis has values into ``folder``."""
    import matplotlib

    drawn = {"calibration": _calibration(found), "disagreement": _disagreement(found)}
    if "tokens" in found:
        drawn["token-cosine"] = _token_cosine(found["tokens"]["layers"])
    if "teacher" in found:
        drawn["temperature"] = _temperatures(found["teacher"]["temperatures"])
    for name, figure in drawn.items():
        content = io.BytesIO()
        # glyphs as paths and a fixed salt: the same file on every machine
        with matplotlib.rc_context({"svg.hashsalt": "deit_fast"}):
            figure.savefig(content, format="svg", metadata={"Date": None}, bbox_inches="tight")
        write_atomically(folder / f"{name}.svg", content.getvalue())


def _token_cosine(layers: list[dict[str, Any]]) -> Any:
    figure, axes = new_axes()
    x = range(len(layers))
    mean, std = (np.array([layer[key] for layer in layers]) for key in ("mean", "std"))
    axes.fill_between(x, mean - std, mean + std, color=COLOURS[0], alpha=0.2, linewidth=0)
    axes.plot(x, mean, color=COLOURS[0], marker="o", markersize=3)
    axes.set_xticks(list(x), [layer["name"] for layer in layers], rotation=45, ha="right")
    axes.set_ylabel("cosine of class and distillation token")
    axes.set_title("Mean over images; band: standard deviation", fontsize=10)
    axes.grid(axis="y", alpha=0.3)
    return figure


def _calibration(found: dict[str, Any]) -> Any:
    figure, axes = new_axes(5.0, 5.0)
    axes.plot([0, 1], [0, 1], color=TEXT_COLOUR, linestyle="--", linewidth=1)
    curves = {name: curve for name, curve in found["calibration"].items() if name in NAMES}
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


def _disagreement(found: dict[str, Any]) -> Any:
    names, shares = found["disagreement"]["names"], np.array(found["disagreement"]["shares"])
    figure, axes = new_axes(*[1.2 + 0.8 * len(names)] * 2)
    axes.imshow(shares, cmap="Blues", vmin=0, vmax=max(2 * shares.max(), 1e-9))
    for row, column in np.ndindex(*shares.shape):
        axes.text(column, row, f"{shares[row, column]:.3f}", ha="center", va="center", fontsize=9)
    axes.set_xticks(range(len(names)), names, rotation=45, ha="right")
    axes.set_yticks(range(len(names)), names)
    axes.set_title("Share of different decisions", fontsize=10)
    return figure


def _temperatures(rows: list[dict[str, Any]]) -> Any:
    figure, axes = new_axes()
    curves = {"entropy / log C": [row["uniform_share"] for row in rows]}
    curves |= {f"mass of top {k}": [row["mass"][k] for row in rows] for k in rows[0]["mass"]}
    for (name, values), colour in zip(curves.items(), COLOURS, strict=False):
        axes.plot([row["temperature"] for row in rows], values, color=colour, label=name)
    axes.set_xlabel("temperature")
    axes.set_ylim(0, 1.02)
    axes.legend(frameon=False)
    axes.grid(axis="y", alpha=0.3)
    return figure


def remove_strips(folder: Path) -> None:
    """Remove the strips of an earlier analysis, which may have shown other images."""
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
    """Write an image and its maps side by side; without text, which the page adds.

    Args:
        index: id of the image, part of the file's name.
        image: [3, S, S], normalised by ``mean`` and ``std``.
        maps: [n, h, w]; each is scaled to its own maximum.

    Returns:
        The file's name.
    """
    import matplotlib

    scale, shift = (np.array(values, np.float32)[:, None, None] for values in (std, mean))
    channels = (image.float().cpu().numpy() * scale + shift).clip(0, 1)
    tiles = [(channels * 255).round().astype(np.uint8).transpose(1, 2, 0)]
    colours = matplotlib.colormaps["viridis"]
    for values in maps.float().cpu().numpy():
        tiles.append(colours(values / max(values.max(), 1e-30), bytes=True)[..., :3])
    side = -(-TILE // len(tiles[0])) * len(tiles[0])  # a multiple, so that pixels stay square
    strip = Image.new("RGBA", (len(tiles) * (side + GAP) - GAP, side))
    for number, pixels in enumerate(tiles):
        tile = Image.fromarray(np.ascontiguousarray(pixels))
        strip.paste(tile.resize((side, side), Image.Resampling.NEAREST), (number * (side + GAP), 0))
    content = io.BytesIO()
    strip.save(content, format="png", optimize=True)
    name = f"attention-{index}.png"
    write_atomically(folder / name, content.getvalue())
    return name
