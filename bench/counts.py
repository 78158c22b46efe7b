"""Counts the launches in the code that Inductor generates, from its text, without running it.

The bytes of a call are those of all distinct tensors that it reads and writes, each once, as
Inductor counts them for its own kernels (kernel_num_gb). An unknown call is counted under "other",
by name.
"""

from __future__ import annotations

import ast
import math
import re
from collections import Counter
from collections.abc import Iterator
from typing import Any, NamedTuple, TypeVar

# Calls in Inductor's code that launch nothing.
SILENT = {
    *("assert_size_stride", "assert_alignment", "empty_strided_cuda", "reinterpret_tensor"),
    *("get_raw_stream", "torch.cuda._DeviceGuard", "torch.cuda.set_device", "args.clear"),
}
# Our operators that contain a matrix product of two arguments, with the positions of these. The
# product is counted as a product, and the remaining bytes as those of the operator.
INSIDE = {"bias_gelu_linear_backward": (0, 1)}
PRODUCTS = ("mm", "mm_dtype", "addmm", "bmm", "baddbmm", "bmm_dtype")


Key = TypeVar("Key")
Calls = Counter[tuple[str, int]]
"""(name, bytes of one call) to calls."""


class Counts(NamedTuple):
    """Launches of a forward or a backward; the difference of two Counts is again a Counts."""

    kernels: Calls  # Inductor's: (name, bytes) to launches
    gemms: Counter[tuple[str, tuple[int, ...]]]  # (call, (m, n, k)) to calls; a batch comes first
    operators: Calls  # ours: (name, bytes) to calls
    other: Calls  # (name, bytes) to calls

    @classmethod
    def empty(cls) -> Counts:
        return cls(*(Counter() for _ in cls._fields))

    def plus(self, other: Counts, factor: int = 1) -> Counts:
        """self + factor * other; what cancels is left out."""

        def sums(mine: Counter[Key], others: Counter[Key]) -> Counter[Key]:
            keys = mine.keys() | others.keys()
            found = {key: mine[key] + factor * others[key] for key in keys}
            return Counter({key: count for key, count in found.items() if count})

        return Counts(
            sums(self.kernels, other.kernels),
            sums(self.gemms, other.gemms),
            sums(self.operators, other.operators),
            sums(self.other, other.other),
        )

    @property
    def figures(self) -> dict[str, int]:
        """The sums that the golden table limits."""
        return {
            "Triton launches of Inductor": self.kernels.total(),
            "bytes of Inductor's kernels": weigh(self.kernels),
            "GEMM calls": self.gemms.total(),
            "GEMM FLOPs": sum(2 * math.prod(s) * calls for (_, s), calls in self.gemms.items()),
            "calls of our operators": self.operators.total(),
            "bytes of our operators": weigh(self.operators),
            "other calls": self.other.total(),
            "bytes of other calls": weigh(self.other),
        }

    @property
    def bytes_without_attention(self) -> int:
        """Bytes of Inductor's kernels and of our operators but attention's."""
        mine = Counter({k: n for k, n in self.operators.items() if "attention" not in k[0]})
        return weigh(self.kernels) + weigh(mine)


def weigh(calls: Calls) -> int:
    return sum(size * count for (_, size), count in calls.items())


# ---------------------------------------------------------------------------------------------
# Counting
# ---------------------------------------------------------------------------------------------


def bytes_of(value: Any) -> Iterator[tuple[Any, int]]:
    """Each tensor in a value: (key, bytes). A broadcast dimension counts once.

    Equal views of one storage have the same key.
    """
    import torch

    if isinstance(value, torch.Tensor):
        sizes = zip(value.shape, value.stride(), strict=True)
        elements = math.prod(size for size, stride in sizes if stride != 0)
        key = value.untyped_storage()._cdata, value.storage_offset(), value.shape
        yield key, elements * value.dtype.itemsize
    elif isinstance(value, (tuple, list)):
        for item in value:
            yield from bytes_of(item)


def operator_bytes(graph: Any) -> dict[str, list[int]]:
    """Bytes of each call of an operator in a graph, by the name that Inductor's code gives it."""
    import torch

    found: dict[str, list[int]] = {}
    for node in graph.graph.nodes:
        if node.op != "call_function" or not isinstance(node.target, torch._ops.OpOverload):
            continue
        values = [argument.meta.get("val") for argument in node.all_input_nodes]
        tensors = dict(
            pair for value in (*values, node.meta.get("val")) for pair in bytes_of(value)
        )
        found.setdefault(f"torch.ops.{node.target}", []).append(sum(tensors.values()))
    return found


def kernel_bytes(module: ast.Module) -> dict[str, int]:
    """Bytes of each Triton kernel that Inductor generated, by name."""
    found = {}
    for node in module.body:
        if not isinstance(node, ast.Assign) or not isinstance(node.value, ast.Call):
            continue
        if ast.unparse(node.value.func) != "async_compile.triton":
            continue
        name, source = (ast.literal_eval(argument) for argument in node.value.args[:2])
        size = re.search(r"'kernel_num_gb': ([\d.e+-]+)", source)
        if size is None:
            raise RuntimeError(f"Inductor's code has no kernel_num_gb for {name}")
        found[name] = round(float(size[1]) * 1e9)
    return found


def body_of(module: ast.Module) -> list[ast.stmt]:
    """The statements of the function that launches everything."""
    for node in module.body:
        if isinstance(node, ast.FunctionDef) and node.name.startswith("partition_"):
            raise RuntimeError("Inductor split its code into partitions, which are not counted")
    (runner,) = (n for n in module.body if isinstance(n, ast.ClassDef) and n.name == "Runner")
    (call,) = (n for n in runner.body if isinstance(n, ast.FunctionDef) and n.name == "call")
    statements: list[ast.stmt] = []
    for statement in call.body:
        statements += statement.body if isinstance(statement, ast.With) else [statement]
    return statements


class _Shapes:
    """Shapes of the names in Inductor's code, read as its statements go by."""

    def __init__(self) -> None:
        self.known: dict[str, tuple[int, ...]] = {}

    def read(self, statement: ast.stmt) -> None:
        if isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Call):
            call = statement.value
            if ast.unparse(call.func) == "assert_size_stride":
                self.known[ast.unparse(call.args[0])] = ast.literal_eval(call.args[1])
        elif isinstance(statement, ast.Assign):
            shape = self.of(statement.value)
            if shape is not None:
                self.known[ast.unparse(statement.targets[0])] = shape

    def of(self, value: ast.expr) -> tuple[int, ...] | None:
        """None: the shape is unknown."""
        if isinstance(value, ast.Name):
            return self.known.get(value.id)
        if not isinstance(value, ast.Call):
            return None
        name = ast.unparse(value.func)
        places = {"reinterpret_tensor": 1, "empty_strided_cuda": 0}
        if name not in places:
            return None
        shape: tuple[int, ...] = ast.literal_eval(value.args[places[name]])
        return shape


def products(name: str, call: ast.Call, shapes: _Shapes) -> list[tuple[int, ...]] | None:
    """(m, n, k) of each matrix product that a call makes, a batch first; None: not a product.

    A convolution is a product of its patches: m output positions, n output channels, k inputs of
    each; its backward holds one for each of the gradients of input and weight that it makes.
    """
    called = name.split(".")[-1] if name.startswith("extern_kernels.") else name
    arguments = [shapes.of(argument) for argument in call.args]
    if called in PRODUCTS:
        a, b = arguments[-2:] if "add" in called else arguments[:2]
        if a is None or b is None:
            raise RuntimeError(f"unknown shapes in {ast.unparse(call)}")
        return [(*a[:-1], b[-1], a[-1])]
    if called == "convolution":
        images, weight = arguments[:2]
        options = {word.arg: word.value for word in call.keywords}
        stride = ast.literal_eval(options["stride"])
        padding = ast.literal_eval(options["padding"])
        if images is None or weight is None:
            raise RuntimeError(f"unknown shapes in {ast.unparse(call)}")
        places = [
            (size + 2 * pad - kernel) // step + 1
            for size, pad, kernel, step in zip(images[2:], padding, weight[2:], stride, strict=True)
        ]
        return [(images[0] * math.prod(places), weight[0], math.prod(weight[1:]))]
    if called == "torch.ops.aten.convolution_backward.default":
        gradient, _, weight = arguments[:3]
        if gradient is None or weight is None:
            raise RuntimeError(f"unknown shapes in {ast.unparse(call)}")
        positions, inputs = gradient[0] * math.prod(gradient[2:]), math.prod(weight[1:])
        of_input, of_weight, _ = ast.literal_eval(call.args[-1])
        made = [(positions, inputs, weight[0])] if of_input else []
        return [*made, *([(weight[0], inputs, positions)] if of_weight else [])]
    return None


def product_inside(name: str, call: ast.Call, shapes: _Shapes) -> tuple[int, ...]:
    """(m, n, k) of the product in a call of an operator of ours."""
    a, b = (shapes.of(call.args[place]) for place in INSIDE[name])
    if a is None or b is None:
        raise RuntimeError(f"unknown shapes in {ast.unparse(call)}")
    return math.prod(a[:-1]), b[-1], a[-1]


def product_bytes(shape: tuple[int, ...]) -> int:
    """Bytes of both factors and the product, in bfloat16; a batch comes first."""
    *batch, m, n, k = shape
    return 2 * math.prod(batch) * (m * n + n * k + m * k)


def attention_shape(name: str, call: ast.Call, shapes: _Shapes) -> tuple[int, ...]:
    """(batch, heads, queries, keys, channels of a head) of PyTorch's own attention."""
    first = 1 if "backward" in name else 0  # behind the gradient of the output
    queries, keys = (shapes.of(argument) for argument in call.args[first : first + 2])
    if queries is None or keys is None:
        raise RuntimeError(f"unknown shapes in {ast.unparse(call)}")
    return (*queries[:3], *keys[2:])


def count_pass(graph: Any, code: str) -> Counts:
    """Launches of the code of a forward or a backward.

    Args:
        graph: that the code was written for; gives the bytes of operators.
        code: Inductor's output module.
    """
    module = ast.parse(code)
    kernels, operators = kernel_bytes(module), operator_bytes(graph)
    shapes, counts = _Shapes(), Counts.empty()
    for statement in body_of(module):
        for node in ast.walk(statement):
            if isinstance(node, ast.Call):
                _count_call(node, counts, kernels, operators, shapes)
        shapes.read(statement)
    return counts


def _count_call(
    call: ast.Call, counts: Counts, kernels: dict[str, int], operators: dict[str, list[int]],
    shapes: _Shapes,
) -> None:  # fmt: skip
    name = ast.unparse(call.func)
    if name in SILENT:
        return
    kernel = name.removesuffix(".run")
    if kernel in kernels:
        counts.kernels[re.sub(r"_\d+$", "", kernel), kernels[kernel]] += 1
        return
    made = products(name, call, shapes)
    if made is not None:
        short = name.removeprefix("extern_kernels.").removeprefix("torch.ops.aten.")
        for shape in made:
            counts.gemms[short.removesuffix(".default"), shape] += 1
        return
    if workspace := re.match(r"workspace_\d+\[.*\]\.view\((\d+), (\d+)\)\.(\w+)$", name):
        size = 4 * int(workspace[1]) * int(workspace[2])  # float32 rows of a split reduction
        counts.other[f"{workspace[3]} of a workspace", size] += 1
        return
    if re.match(r"workspace_\d+\[.*\]\.view$", name):
        return
    sizes = operators.get(name)
    size = sizes.pop(0) if sizes else 0
    short = name.removeprefix("torch.ops.").removesuffix(".default")
    if "scaled_dot_product" in short:
        short += f" {'x'.join(map(str, attention_shape(short, call, shapes)))}"
    if short.startswith("deit_fast."):
        if not size:
            raise RuntimeError(f"{short}: a call in the code that is not in its graph")
        short = short.removeprefix("deit_fast.")
        if short in INSIDE:
            shape = product_inside(short, call, shapes)
            counts.gemms[short, shape] += 1
            size -= product_bytes(shape)
        counts.operators[short, size] += 1
    else:
        counts.other[short, size] += 1
