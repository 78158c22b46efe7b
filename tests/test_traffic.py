"""What a compiled block makes an H100 do: no change adds launches, bytes or products unseen.

Inductor's code is that of one release of torch, so compiling happens in an environment of its own:
`make test` makes it.
"""

from __future__ import annotations

import copy
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from bench import counts, traffic
from bench.counts import Counts

ROOT = Path(__file__).parent.parent
PYTHON = ROOT / ".venv" / f"torch-{traffic.TORCH}" / "bin" / "python"

# Of a block of DeiT-S at batch 256: GB that Inductor's kernels and ours but attention move, Triton
# launches of Inductor in both directions.
BOUNDS = {"timm": (2.60, 30), "fused": (1.89, 8), "fused-bf16": (1.50, 8)}
BOUNDS |= {"fused-bf16-mlp": (1.20, 8)}


def python() -> str:
    """The Python whose packages the golden table was made with."""
    if traffic.refusal() is None:
        return sys.executable
    if not PYTHON.exists():
        pytest.skip(f"{traffic.refusal()}; {PYTHON.relative_to(ROOT)} is missing")
    return str(PYTHON)


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    dropped = ("PYTHONPATH", "TRITON_INTERPRET", "TRITON_CACHE_DIR")
    environment = {name: value for name, value in os.environ.items() if name not in dropped}
    return subprocess.run(
        [python(), *arguments], cwd=ROOT, env=environment, capture_output=True, text=True
    )


@pytest.mark.slow
@pytest.mark.timeout(1800)  # a changed model is compiled: all of them take minutes
def test_nothing_moves_more_than_the_golden_table_says() -> None:
    """The graph of every model is compared; where it is the golden one, Inductor's code is too.

    The test below compiles a model in full, which shows that its counts are still read alike.
    """
    done = run("-m", "bench", "traffic", "--check", "--changed")
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_counts_of_a_compiled_model_are_the_golden_ones_and_a_kernel_less_is_noticed() -> None:
    """The same check on a model without bias_gelu fails by name and amount."""
    script = """
import importlib
import bench.inductor  # finds the kernels in a checkout
from bench.__main__ import main
fuse = importlib.import_module("deit_fast.models.fuse")
arguments = ["traffic", "--check", "--model", "deit_tiny", "--impl", "fused"]
main(arguments)
print("compiled in full")
fuse.DEFAULT_KERNELS["sm_90"] = ("attention", "add_layer_norm")
main([*arguments, "--changed"])
"""
    done = run("-c", script)
    assert done.returncode == 1 and "compiled in full" in done.stdout, done.stderr
    lines = [line for line in done.stderr.splitlines() if "in the golden table" in line]
    assert any("deit_tiny fused block backward: bytes of Inductor's kernels" in x for x in lines)
    assert any("Triton launches of Inductor" in line for line in lines), done.stderr


@pytest.mark.parametrize("implementation", BOUNDS)
def test_bounds_hold_in_the_golden_table(implementation: str) -> None:
    block = traffic.read()["deit_small"][implementation]["block"]
    most_gb, most_launches = BOUNDS[implementation]
    size = sum(half.bytes_without_attention for half in block.values())
    assert size / 1e9 <= most_gb, f"{size / 1e9:.3f} GB"
    assert sum(half.kernels.total() for half in block.values()) <= most_launches


def test_golden_table_is_complete() -> None:
    table = traffic.read()
    assert list(table) == list(traffic.MODELS)
    for by_implementation in table.values():
        assert list(by_implementation) == list(traffic.IMPLEMENTATIONS)
    widths = {"deit_tiny": 192, "deit_small": 384, "deit_base": 768}
    for model, width in widths.items():
        rows = traffic.BATCH * traffic.TOKENS
        for parts in table[model].values():
            flops = [half.figures["GEMM FLOPs"] for half in parts["block"].values()]
            forward = 2 * rows * 12 * width**2
            assert flops == pytest.approx([forward, 2 * forward], rel=1e-4)


def test_what_is_written_is_read_back(tmp_path: Path) -> None:
    table = traffic.read()
    file = tmp_path / "traffic.json"
    file.write_text(traffic.as_json(table))
    assert traffic.read(file) == table
    assert file.read_text() == traffic.GOLDEN.read_text()


def test_each_figure_that_rises_has_one_line() -> None:
    golden = traffic.read()
    assert traffic.added(golden, golden) == []
    got = copy.deepcopy(golden)
    block = got["deit_small"]["fused"]["block"]
    block["backward"].kernels["triton_red_fused_sum", 39_000_000] += 1
    block["forward"].gemms["mm", (50688, 384, 384)] += 1
    block["forward"].other["aten.sort", 0] += 1
    lines = traffic.added(got, golden)
    assert len(lines) == 5
    assert all(line.startswith("deit_small fused block ") for line in lines)
    (moved,) = (line for line in lines if "bytes of Inductor's kernels" in line)
    assert moved.endswith("39.00 MB more")
    assert sum("other calls: " in line for line in lines) == 1
    # The other way round is no fault: the table may hold more than a change needs.
    assert traffic.added(golden, got) == []
    del got["deit_tiny"]
    assert "not in the golden table" in traffic.added(golden, got)[0]


CODE = '''
triton_poi_fused_add_0 = async_compile.triton('triton_poi_fused_add_0', """
inductor_meta={'kernel_name': 'triton_poi_fused_add_0', 'kernel_num_gb': 0.0025}
""", device_str='cuda')

class Runner:
    def call(self, args):
        a, b, images, weight = args
        assert_size_stride(a, (64, 8), (8, 1))
        assert_size_stride(images, (2, 3, 32, 32), (3072, 1024, 32, 1))
        assert_size_stride(weight, (5, 3, 16, 16), (768, 256, 16, 1))
        with torch.cuda._DeviceGuard(0):
            buf0 = empty_strided_cuda((64, 16), (16, 1), torch.bfloat16)
            extern_kernels.mm(a, reinterpret_tensor(b, (8, 16), (1, 8), 0), out=buf0)
            buf1 = buf0; del buf0  # reuse
            triton_poi_fused_add_0.run(buf1, 1024, stream=stream0)
            triton_poi_fused_add_0.run(buf1, 1024, stream=stream0)
            buf2 = extern_kernels.bmm(reinterpret_tensor(buf1, (4, 16, 16), (256, 16, 1), 0), \
reinterpret_tensor(buf1, (4, 16, 2), (256, 16, 1), 0), out=buf1)
            buf3 = extern_kernels.convolution(images, weight, stride=(16, 16), padding=(0, 0))
            assert_size_stride(buf3, (2, 5, 2, 2), (20, 4, 2, 1))
            torch.ops.aten.convolution_backward.default(buf3, images, weight, [5], [16, 16], \
[False, True, False])
            buf4 = (workspace_0[0 * 7:7].view(7, 1) .sum(dim=0))
            mystery.launch(buf1)
'''


def test_code_is_counted_by_what_it_calls() -> None:
    import torch

    graph = torch.fx.symbolic_trace(torch.nn.Identity())
    found = counts.count_pass(graph, CODE)
    assert found.kernels == Counter({("triton_poi_fused_add", 2_500_000): 2})
    assert found.gemms == {
        ("mm", (64, 16, 8)): 1,
        ("bmm", (4, 16, 2, 16)): 1,
        ("convolution", (8, 5, 768)): 1,
        ("convolution_backward", (5, 768, 8)): 1,
    }
    assert found.other == {("sum of a workspace", 28): 1, ("mystery.launch", 0): 1}
    assert found.plus(found, -1) == Counts.empty()


def test_operators_weigh_their_distinct_tensors() -> None:
    """An argument that is given twice counts once, a broadcast dimension too; three views of one
    tensor are three reads."""
    import torch
    from torch.fx.passes.fake_tensor_prop import FakeTensorProp

    def operator(x: torch.Tensor) -> torch.Tensor:
        return torch.ops.aten.add.Tensor(x, x)

    x = torch.empty(8, 16)
    for value, elements in (
        (x, 128),
        ((x, x), 128),
        (x[:1].expand(8, 16), 16),
        ([x[:4], x[4:]], 128),
        (None, 0),
    ):
        assert sum(dict(counts.bytes_of(value)).values()) == 4 * elements
    graph = torch.fx.symbolic_trace(operator)
    FakeTensorProp(graph).propagate(x)
    assert counts.operator_bytes(graph) == {"torch.ops.aten.add.Tensor": [2 * 4 * 128]}


def test_another_release_is_refused_with_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(traffic, "TORCH", "0.1")
    with pytest.raises(SystemExit, match=r"needs torch 0\.1, timm .* environment has torch "):
        traffic.main(["traffic"])
    monkeypatch.undo()
    if traffic.refusal() is None:
        with pytest.raises(SystemExit):
            traffic.main(["traffic", "--write", "--model", "deit_tiny"])
