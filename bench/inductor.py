"""The code that TorchInductor would run on an H100, generated on a machine without a GPU.

Inductor queries PyTorch and Triton for properties of the device. ``believe_in_h100`` replaces these
queries by constants. ``compile_for_h100`` ends each compilation as soon as the code exists as text:
Triton compiles nothing and nothing runs. Both use private names of torch 2.11 with triton 3.6, the
versions of the GPU machines.

The model is traced on fake CPU tensors, because autograd has no threads for a missing device, and
each graph is then moved to fake CUDA tensors. Two differences from a trace on a GPU are known.
PyTorch's own attention has the name of its CPU form; its arguments, results and layouts
are those of Flash attention. Autocast's lists for CPU and CUDA differ in operations that a vision
transformer runs in float32 on both.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple, NoReturn

import torch
from torch import Tensor, fx, nn
from torch.utils._pytree import tree_leaves

import deit_fast

if find_spec("deit_fast.kernels") is None:
    # An environment without an installed project, which puts the folder kernels/ into the package.
    deit_fast.__path__.append(str(Path(__file__).parent.parent))

H100 = {
    "multi_processor_count": 132, "major": 9, "minor": 0, "warp_size": 32,
    "regs_per_multiprocessor": 65536, "max_threads_per_multi_processor": 2048,
    "max_threads_per_block": 1024,
}  # fmt: skip
MEMORY = {
    "name": "NVIDIA H100", "total_memory": 80 << 30, "L2_cache_size": 50 << 20, "gcnArchName": "",
    "shared_memory_per_block": 49152, "shared_memory_per_block_optin": 232448,
    "shared_memory_per_multiprocessor": 233472,
}  # fmt: skip


class Compiled(NamedTuple):
    """The forward or the backward of a compiled model."""

    graph: fx.GraphModule  # on fake CUDA tensors: node.meta["val"]
    code: str  # of Inductor's output module


Surroundings = Callable[[nn.Module], AbstractContextManager[Any]]


class _CodeIsWritten(BaseException):
    """Ends a compilation; not an Exception, which Inductor would wrap."""

    def __init__(self, code: str) -> None:
        self.code = code


class _GraphsAreCompiled(BaseException):
    """Ends the call of a compiled model."""


def believe_in_h100() -> None:
    """Make PyTorch and Triton in this process report an H100. This cannot be undone."""
    import torch._functorch.config as functorch
    import torch._inductor.config as inductor
    import torch._inductor.scheduler as scheduler
    import torch.utils._triton as has
    from torch._dynamo.device_interface import CudaInterface
    from torch._inductor.graph import GraphLowering
    from torch._inductor.runtime.hints import DeviceProperties
    from triton.backends.compiler import GPUTarget
    from triton.runtime import driver

    inductor.benchmark_kernel = True  # writes each kernel's bytes into its code
    inductor.fallback_random = True
    inductor.shape_padding = False  # decides by timing
    inductor.fx_graph_cache = False
    inductor.compile_threads = 1
    functorch.enable_autograd_cache = False
    functorch.force_non_lazy_backward_lowering = True

    properties = SimpleNamespace(**H100, **MEMORY)
    fields = {name: value for name, value in H100.items() if name != "minor"}
    described = DeviceProperties(type="cuda", index=0, cc=90, **fields)
    target = GPUTarget("cuda", 90, 32)
    device = torch.device("cuda", 0)
    driver.set_active(
        SimpleNamespace(
            get_current_device=lambda: 0,
            get_current_stream=lambda _=0: 0,
            get_current_target=lambda: target,
            get_active_torch_device=lambda: device,
        )
    )

    def end_with_code(graph: Any) -> NoReturn:
        code, _ = graph.codegen()
        raise _CodeIsWritten(code.value)

    yes = staticmethod(lambda *_, **__: True)
    for owner, name, value in (
        (torch.cuda, "get_device_properties", lambda *_: properties),
        (torch.cuda, "get_device_capability", lambda *_: (9, 0)),
        (CudaInterface, "get_device_properties", staticmethod(lambda *_: properties)),
        (CudaInterface.Worker, "get_device_properties", staticmethod(lambda *_: properties)),
        (CudaInterface, "get_compute_capability", staticmethod(lambda *_: 90)),
        (CudaInterface, "is_available", yes),
        (CudaInterface, "is_bf16_supported", yes),
        (DeviceProperties, "create", classmethod(lambda *_: described)),
        (has, "has_triton", yes),
        (has, "has_triton_package", yes),
        (has, "triton_hash_with_backend", lambda: "none"),
        (scheduler, "has_triton", yes),
        (GraphLowering, "compile_to_module", end_with_code),
    ):
        setattr(owner, name, value)
    _choose_kernels()


def _choose_kernels() -> None:
    """Make our own code choose the kernels for every tensor."""
    import deit_fast.kernels
    import deit_fast.models.fuse  # noqa: F401

    for name, module in sys.modules.items():
        if name.startswith("deit_fast.") and hasattr(module, "on_gpu"):
            vars(module)["on_gpu"] = lambda _: True


def compile_for_h100(
    model: nn.Module, inputs: Sequence[Tensor], surroundings: Surroundings = nullcontext
) -> tuple[Compiled, Compiled]:
    """Forward and backward of a model under bfloat16 autocast.

    Parameters and buffers become fake ones, in place: the model cannot compute afterwards.

    Args:
        model: in the mode (training) in which it is to be compiled.
        inputs: fake or meta tensors are enough; only shapes and dtypes count.
        surroundings: makes what the forward runs in, of the model with its fake parameters.

    Raises:
        RuntimeError: the model was compiled in more or fewer than these two graphs.
    """
    from torch._functorch.partitioners import min_cut_rematerialization_partition
    from torch._inductor.fx_passes.joint_graph import joint_graph_passes

    graphs: list[Compiled] = []

    def compile_half(graph: fx.GraphModule, example: Sequence[Any]) -> Any:
        graphs.append(_compile(graph, example, is_backward=len(graphs) == 1))

        def end(*_: Any) -> NoReturn:
            raise _GraphsAreCompiled

        end._boxed_call = True  # type: ignore[attr-defined]
        return end

    def partition(graph: fx.GraphModule, *arguments: Any, **options: Any) -> Any:
        joint_graph_passes(graph)
        options.setdefault("compiler", "inductor")
        return min_cut_rematerialization_partition(graph, *arguments, **options)

    _trace(model, inputs, surroundings, compile_half, partition)
    if len(graphs) != 2:
        raise RuntimeError(f"compiled in {len(graphs)} graphs, not in a forward and a backward")
    return graphs[0], graphs[1]


def joint_graph(
    model: nn.Module, inputs: Sequence[Tensor], surroundings: Surroundings = nullcontext
) -> str:
    """What ``compile_for_h100`` would give Inductor, as text: the graph of forward and backward.

    A line for each node with its operator, arguments, shape, strides and dtype, and one for the
    schema of each of our operators. The arguments are those of ``compile_for_h100``.
    """
    from torch._ops import OpOverload

    lines: list[str] = []

    def end_with_text(graph: fx.GraphModule, *_: Any, num_fwd_outputs: int, **__: Any) -> NoReturn:
        lines.append(f"outputs of the forward: {num_fwd_outputs}")
        for part in graph.modules():
            for node in part.graph.nodes if isinstance(part, fx.GraphModule) else ():
                values = tree_leaves(node.meta.get("val"))
                lines.append(f"{node.format_node()} {[*map(_described, values)]}")
                if isinstance(node.target, OpOverload) and node.target.namespace == "deit_fast":
                    lines.append(f"{node.target._schema} {sorted(map(str, node.target.tags))}")
        raise _GraphsAreCompiled

    _trace(model, inputs, surroundings, lambda graph, _: graph, end_with_text)
    return "\n".join(lines)


def _described(value: Any) -> str:
    if not isinstance(value, Tensor):
        return str(value)
    return f"{tuple(value.shape)} {value.stride()} {value.dtype}"


def _trace(
    model: nn.Module,
    inputs: Sequence[Tensor],
    surroundings: Surroundings,
    compile_half: Callable[..., Any],
    partition: Callable[..., Any],
) -> None:
    """Trace a model on fake tensors and hand its graph to ``partition``, then to ``compile_half``.

    One of the two ends the call by ``_GraphsAreCompiled``.
    """
    from torch._dynamo.backends.common import aot_autograd
    from torch._inductor.decomposition import select_decomp_table
    from torch._subclasses.fake_tensor import FakeTensorMode

    backend = aot_autograd(
        fw_compiler=compile_half,
        bw_compiler=compile_half,
        decompositions=select_decomp_table(),
        partition_fn=partition,
    )
    torch._dynamo.reset()
    with FakeTensorMode(allow_non_fake_inputs=True):
        _make_fake(model)
        faked = [torch.empty(x.shape, dtype=x.dtype) for x in inputs]
        try:
            with torch.autocast("cpu", torch.bfloat16), surroundings(model):
                torch.compile(model, backend=backend, fullgraph=True)(*faked)
        except _GraphsAreCompiled:
            pass


def _make_fake(model: nn.Module) -> None:
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                fake = torch.empty(parameter.shape, dtype=parameter.dtype)
                module._parameters[name] = nn.Parameter(fake, parameter.requires_grad)
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = torch.empty(buffer.shape, dtype=buffer.dtype)


def _compile(graph: fx.GraphModule, example: Sequence[Any], is_backward: bool) -> Compiled:
    """Move a graph to CUDA and let Inductor write its code."""
    from torch._guards import TracingContext, tracing
    from torch._inductor.compile_fx import compile_fx_inner
    from torch._inductor.utils import BoxedBool
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.fx.passes.fake_tensor_prop import FakeTensorProp

    mode = FakeTensorMode(allow_non_fake_inputs=True)
    for node in graph.graph.nodes:
        if "device" in node.kwargs:
            node.kwargs = {**node.kwargs, "device": torch.device("cuda:0")}
    with mode:
        inputs = [
            torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device="cuda")
            if isinstance(x, Tensor)
            else x
            for x in example
        ]
    FakeTensorProp(graph, mode).propagate_dont_convert_inputs(*inputs)
    try:
        with tracing(TracingContext(mode)):
            compile_fx_inner(graph, inputs, cudagraphs=BoxedBool(False), is_backward=is_backward)
    except _CodeIsWritten as written:
        return Compiled(graph, written.code)
    raise RuntimeError("Inductor ended without code")
