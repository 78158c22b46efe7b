"""Small files in the layouts of RayGen, FKD and TinyViT, written as their writers do."""

from __future__ import annotations

import gzip
import io
import json
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import torch

CONFIG = {  # of RayGen's example; the order of augmentations is that of the writer, not this one
    "normalize": {"mean": [0.5, 0.5, 0.5], "std": [0.2, 0.2, 0.2]},
    "rand_augment": {"enable": True, "p": 1.0},
    "random_resized_crop": {"interpolation": "bicubic", "size": 224},
    "random_horizontal_flip": {"enable": False},
    "to_tensor": {"enable": True},
}


def raygen_sample(
    key: str, seed: int, *, views: int = 2, texts: int = 3, width: int = 8, bf16: bool = False,
    as_text: bool = False,
) -> dict[str, bytes]:  # fmt: skip
    """The members of a sample by name. ``as_text``: parameters as in the published DataCompDR."""
    draw = np.random.default_rng(seed)
    counts = {"image_emb": views, "text_emb": 1, "syn_text_emb": texts}
    arrays = {n: draw.standard_normal((count, width), np.float32) for n, count in counts.items()}
    parameters: Any = [[[3, 4, 50 + view, 60], None if view % 3 == 2 else [[1, -0.09], [13, 0.0]]]
                       for view in range(views)]  # fmt: skip
    parameters = json.dumps(parameters) if as_text else parameters
    fields = {"json": json.dumps({"uid": key}).encode(), "jpg": b"no image that is read",
              "paug.json": json.dumps({"param_aug": parameters}).encode(),
              "syn.json": json.dumps({"syn_text": ["a"] * texts}).encode()}  # fmt: skip
    fields |= {"pth.gz": tensors_file(arrays)} if bf16 else {"npz": npz_file(arrays)}
    return {f"{key}.{name}": fields[name] for name in sorted(fields)}


def npz_file(arrays: dict[str, np.ndarray]) -> bytes:
    content = io.BytesIO()
    np.savez_compressed(content, **arrays)
    return content.getvalue()


def tensors_file(arrays: dict[str, np.ndarray]) -> bytes:
    content = io.BytesIO()
    torch.save({n: torch.from_numpy(a).to(torch.bfloat16) for n, a in arrays.items()}, content)
    return gzip.compress(content.getvalue())


def write_raygen(folder: Path, shards: list[list[dict[str, bytes]]], config: bool = True) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for number, samples in enumerate(shards):
        with tarfile.open(folder / f"{number:08}.tar", "w") as archive:
            for name, content in (item for sample in samples for item in sample.items()):
                member = tarfile.TarInfo(name)
                member.size = len(content)
                archive.addfile(member, io.BytesIO(content))
    if config:
        (folder / "config.json").write_text(json.dumps(CONFIG) + "\n")


def fkd_arrays(k: int, views: int, kind: str = "top", seed: int = 0) -> list[np.ndarray]:
    """coords, flip and label; ``kind``: top, hard or smoothing."""
    draw = np.random.default_rng(seed)
    ids = np.stack([draw.choice(1000, k, replace=False) for _ in range(views)])
    probs = -np.sort(-draw.dirichlet(np.full(1000, 0.1), views), axis=1)[:, :k]
    top = np.stack([ids, probs], 1).astype(np.float32)
    label = {"top": top, "hard": ids[:, 0], "smoothing": top[:, :, 0]}[kind]
    # as cut from a batch of images: no contiguous array
    coords = np.stack([draw.random((views, 4), np.float32)] * 2, 1)[:, 0]
    return [coords, draw.random(views) < 0.5, label]


def write_fkd(folder: Path, name: str, k: int, views: int, arrays: Any = None) -> Path:
    path = folder / f"{name}.tar"
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(fkd_arrays(k, views) if arrays is None else arrays, path)
    return path


def write_tinyvit(folder: Path, k: int, epoch: int, ranks: list[dict[str, tuple]]) -> None:
    """As TinyViT's writer: text keys; int32 seed, int16 ids, float16 probabilities."""
    path = folder / f"logits_top{k}_epoch{epoch}"
    path.mkdir(parents=True)
    for rank, rows in enumerate(ranks):
        (path / f"rank{rank}-keys.txt").write_text("".join(f"{key}\n" for key in rows))
        (path / f"rank{rank}-values.bin").write_bytes(
            b"".join(
                np.int32(7).tobytes()
                + np.array(ids, np.int64).astype(np.int16).tobytes()  # wraps above 32,767
                + np.array(probs, np.float16).tobytes()
                for ids, probs in rows.values()
            )
        )


def tinyvit_rows(names: list[str], k: int, classes: int, seed: int) -> dict[str, tuple]:
    draw = np.random.default_rng(seed)
    rows = {}
    for name in names:
        probs = np.sort(draw.dirichlet(np.full(classes, 0.1)))[::-1][:k]
        rows[name] = (draw.choice(classes, k, replace=False), probs)
    return rows
