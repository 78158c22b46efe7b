"""Image folders with readable, unusual and broken files, and digests of their views."""

from __future__ import annotations

import colorsys
import hashlib
import io
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw

from deit_fast.config import ViewConfig
from deit_fast.data import ImageFolder, ingest_batch

SIZE = 32
SEED = 11
RECIPE = ViewConfig(seed=SEED, image_size=SIZE, repeats=2)


def picture(seed: int, width: int, height: int) -> Image.Image:
    """Smooth colours with some noise, as JPEG likes them."""
    rng = np.random.default_rng(seed)
    coarse = Image.fromarray(rng.integers(0, 256, (5, 7, 3), np.uint8))
    smooth = np.asarray(coarse.resize((width, height), Image.Resampling.BILINEAR), np.int64)
    noisy = smooth + rng.integers(-9, 10, smooth.shape)
    return Image.fromarray(noisy.clip(0, 255).astype(np.uint8))


def write_split(folder: Path, classes: int, per_class: int, seed: int = 0) -> None:
    rng = np.random.default_rng(seed)
    for label in range(classes):
        (folder / f"class{label}").mkdir(parents=True)
        for number in range(per_class):
            width, height = (int(side) for side in rng.integers(20, 90, 2))
            image = picture(seed + 100 * label + number, width, height)
            image.save(folder / f"class{label}" / f"{number:03d}.jpg", quality=90)


def write_photographs(folder: Path, classes: int, each: int, seed: int = 0) -> None:
    """JPEGs of shapes on a plain ground, ``folder/class_N/``; the class is the colour."""
    rng = np.random.default_rng(seed)
    for label in range(classes):
        (folder / f"class_{label}").mkdir(parents=True)
        for number in range(each):
            width, height = (int(side) for side in rng.integers(90, 140, 2))
            ground = tuple(int(value) for value in rng.integers(150, 230, 3))
            image = Image.new("RGB", (width, height), ground)
            draw = ImageDraw.Draw(image)
            for _ in range(6):
                hue = (label + 0.15 * rng.uniform(-1, 1)) / classes % 1
                colour = tuple(int(255 * part) for part in colorsys.hsv_to_rgb(hue, 0.9, 0.8))
                x, y, radius = rng.uniform(0, width), rng.uniform(0, height), rng.uniform(15, 35)
                draw.ellipse((x - radius, y - radius, x + radius, y + radius), fill=colour)
            image.save(folder / f"class_{label}" / f"{number:03d}.jpg", quality=88)


def digests(batches, recipe=RECIPE) -> dict[tuple[int, int], str]:
    """Digest of each finished view, by its key; a key met twice must give the same bytes."""
    found: dict[tuple[int, int], str] = {}
    for batch in batches:
        images = ingest_batch(batch, recipe, torch.float32)
        labels = torch.stack([batch.labels, batch.partner_labels], dim=1)
        for sample, view, image, label, lam in zip(
            batch.sample_ids.tolist(),
            batch.view_ids.tolist(),
            images,
            labels,
            batch.lam,
            strict=True,
        ):
            text = image.numpy().tobytes() + label.numpy().tobytes() + lam.numpy().tobytes()
            digest = hashlib.sha256(text).hexdigest()
            assert found.setdefault((sample, view), digest) == digest
    return found


def broken_files() -> dict[str, bytes]:
    import io

    def encoded(kind: str) -> bytes:
        buffer = io.BytesIO()
        picture(5, 64, 48).save(buffer, kind)
        return buffer.getvalue()

    jpeg, png = encoded("JPEG"), encoded("PNG")
    bomb = b"P6 60000 60000 255\n" + bytes(100)
    return {
        "empty.jpg": b"",
        "text.jpg": b"this is no image\n" * 20,
        "truncated.jpg": jpeg[: len(jpeg) // 2],
        "header.jpg": jpeg[:30],
        "truncated.png": png[: len(png) // 2],
        "flipped.png": png[:60] + bytes(byte ^ 255 for byte in png[60:90]) + png[90:],
        "chunk.png": png[:8] + b"\xff\xff\xff\xff" + png[12:],
        "truncated.webp": encoded("WEBP")[:60],
        "truncated.tif": encoded("TIFF")[:50],
        "bomb.ppm": bomb,
        "short.bmp": encoded("BMP")[:20],
    }


def encode(image: Image.Image, kind: str, **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def odd_files() -> dict[str, bytes]:
    """Readable, but neither RGB nor 8 bits nor one frame nor upright."""
    base = picture(3, 40, 30)
    frames = [picture(n, 40, 30) for n in range(3)]
    grey16 = Image.fromarray(np.arange(1200, dtype=np.uint16).reshape(30, 40) * 50)
    rotated = Image.Exif()
    rotated[0x0112] = 6
    palette = base.convert("P")
    return {
        "cmyk.jpg": encode(base.convert("CMYK"), "JPEG"),
        "exif.jpg": encode(base, "JPEG", exif=rotated),
        "grey.jpg": encode(base.convert("L"), "JPEG"),
        "grey16.png": encode(grey16, "PNG"),
        "palette.png": encode(palette, "PNG", transparency=3),
        "png-inside.jpg": encode(base, "PNG"),
        "progressive.jpg": encode(base, "JPEG", progressive=True),
        "frames.webp": encode(
            frames[0], "WEBP", save_all=True, append_images=frames[1:], lossless=True
        ),
        "rgba.png": encode(base.convert("RGBA"), "PNG"),
    }


def folder_of(tmp_path: Path, files: dict[str, bytes]) -> ImageFolder:
    folder = tmp_path / "train" / "class0"
    folder.mkdir(parents=True)
    for name, content in files.items():
        (folder / name).write_bytes(content)
    return ImageFolder(str(tmp_path), "train")
