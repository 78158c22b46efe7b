"""A teacher's logits computed on Ray, and what they cost. With `--gpus 0` it runs on a CPU.

RAY_ADDRESS names a cluster. Without it, Ray starts on this machine and ends with the program. DIR
is a folder that all nodes see; a second call finds the cache there, and computes what it lacks. The
teacher has random weights, but in a file, because all workers must hold the same.

    python examples/precompute_ray.py DIR --workers 8 --price 2.5
"""

from __future__ import annotations

import argparse
from pathlib import Path

import safetensors.torch
from own_data import CLASSES, small_run, write_images

from deit_fast.integrations.ray import precompute
from deit_fast.models.convnet import small_convnet


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--gpus", type=float, default=1, help="of each worker")
    parser.add_argument("--price", type=float, default=0, help="of a worker for an hour")
    args = parser.parse_args()
    folder = args.folder.absolute()
    write_images(folder / "images")
    weights = folder / "teacher.safetensors"
    if not weights.exists():
        safetensors.torch.save_file(small_convnet(len(CLASSES)).state_dict(), weights)
    config = small_run(folder / "images", folder / "run").replace(
        cache=str(folder / "cache"),
        teacher=f"deit_fast.models.convnet:small_convnet@{weights}",
        teacher_floor=0.0,  # of its accuracy
        num_views=6,
        epochs=6,
        loss={"kind": "soft"},
    )
    found = precompute(config, workers=args.workers, num_gpus=args.gpus, price_per_hour=args.price)
    for failed in found["quarantined"]:
        print(f"unit {failed['unit']} is left out: {failed['why']}")
    print(f"{found['computed']} units computed, {found['kept']} were there")
    print(f"{found['images']} images, {found['images_per_s']:.0f} per second")
    print(f"{found['worker_hours']:.4f} hours of workers cost {found['cost']:.4f}")


if __name__ == "__main__":
    main()
