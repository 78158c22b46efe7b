"""fuse() on a timm model: same parameters, and outputs that are checked to be equal.

On a GPU the kernels run. On a CPU plain PyTorch replaces them; there, too, the last block computes
only the tokens that the heads read.

    python examples/fuse_timm.py
    python examples/fuse_timm.py --model vit_small_patch16_224 --size 224 --batch 64
"""

from __future__ import annotations

import argparse
import copy

import timm
import torch

from deit_fast import fuse, unfuse


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="deit_tiny_distilled_patch16_224")
    parser.add_argument("--size", type=int, default=64)
    parser.add_argument("--batch", type=int, default=4)
    args = parser.parse_args()
    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"

    model = timm.create_model(args.model, img_size=args.size, num_classes=10).to(device)
    fused = fuse(copy.deepcopy(model))  # fuse changes its argument in place
    images = torch.randn(args.batch, 3, args.size, args.size, device=device)

    outputs, gradients = [], []
    for candidate in (model, fused):
        logits = candidate.train()(images)
        logits.square().mean().backward()
        outputs.append(logits.detach())
        gradients.append(candidate.patch_embed.proj.weight.grad)
    torch.testing.assert_close(outputs[1], outputs[0], rtol=1e-3, atol=1e-4)
    scale = gradients[0].abs().max().item()
    torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-3, atol=1e-3 * scale)

    fused.load_state_dict(model.state_dict())  # state dicts are interchangeable
    unfuse(fused)
    assert type(fused.blocks[0]) is type(model.blocks[0])
    difference = (outputs[1] - outputs[0]).abs().max().item()
    print(f"{args.model} on {device}: largest difference of the logits {difference:.1e}")


if __name__ == "__main__":
    main()
