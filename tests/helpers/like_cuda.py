"""What CUDA makes of code that runs on a CPU here: its arithmetic, its copies."""

from __future__ import annotations

import torch
from torch.utils._python_dispatch import TorchDispatchMode


class CudaDivision(TorchDispatchMode):
    """Divides by a Python number as torch does on CUDA: by the number's rounded reciprocal."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function._schema.name in ("aten::div", "aten::div_") and len(args) == 2:
            x, number = args
            if not isinstance(number, torch.Tensor) and x.is_floating_point():
                inverse = torch.tensor(1.0 / number, dtype=x.dtype)
                return x.mul_(inverse) if function._schema.name == "aten::div_" else x * inverse
        return function(*args, **(kwargs or {}))


class WaitingCopies(TorchDispatchMode):
    """Counts copies to a GPU, of fake tensors too, and notes those for which the host waits until
    all work that is queued there has ended."""

    def __init__(self) -> None:
        super().__init__()
        self.pinned: set[int] = set()
        self.count, self.waiting = 0, []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name, kwargs = function._schema.name, kwargs or {}
        if name == "aten::_pin_memory":  # needs a driver
            copy = args[0].clone()
            self.pinned.add(id(copy))
            self.kept = copy  # its id stays its own
            return copy
        result = function(*args, **kwargs)
        source = args[1] if name == "aten::copy_" else args[0] if args else None
        if name in ("aten::_to_copy", "aten::copy_") and result.is_cuda and not source.is_cuda:
            self.count += 1
            if not (kwargs.get("non_blocking") and id(source) in self.pinned):
                self.waiting.append(name)
        return result
