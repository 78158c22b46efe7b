"""The programs of examples/ run unchanged, and print what their text promises."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from deit_fast.arguments import PrecomputeArguments, read_settings
from helpers.processes import run_script

ROOT = Path(__file__).parent.parent
EXAMPLES = ROOT / "examples"


def run(name: str, *args: str) -> str:
    done = run_script(EXAMPLES / name, *args, CUDA_VISIBLE_DEVICES="")
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.mark.parametrize("kind", ["none", "soft", "hard"])
def test_drop_in_loss_teaches_the_student(kind):
    out = run("drop_in_loss.py", "--kind", kind)
    losses = [float(value) for value in re.findall(r"loss (\S+)", out)]
    assert losses[-1] < losses[0]
    student = float(re.search(r"student (\S+)%", out).group(1))
    assert student > 60, out  # chance is 25


@pytest.mark.parametrize("model", ["deit_tiny_distilled_patch16_224", "vit_tiny_patch16_224"])
def test_fuse_timm_finds_no_difference(model):
    out = run("fuse_timm.py", "--model", model, "--size", "32", "--batch", "2")
    assert float(out.split()[-1]) < 1e-4


def test_read_cache_reads_what_it_made_and_any_other(tmp_path):
    import torch

    from deit_fast import LogitCacheWriter
    from deit_fast.cache import build_manifest
    from deit_fast.config import CodecConfig

    out = run("read_cache.py", "--make", str(tmp_path / "made"))
    assert "100 samples, 3 views, 40 bytes per view" in out and "teacher.spec = random" in out
    assert float(out.split()[-1]) > 1

    logits = torch.randn(6, 9)
    for name in ("hard", "dense-fp16"):
        manifest = build_manifest(
            CodecConfig(name=name), num_classes=9, num_samples=6, tau=1.0, fingerprint={}
        )
        with LogitCacheWriter(tmp_path / name, manifest) as writer:
            writer.write(torch.arange(6), 5, logits)
        out = run("read_cache.py", str(tmp_path / name))
        for sample, label in enumerate(logits.argmax(1)[:4].tolist()):
            assert f"sample {sample}, view 5: class {label}" in out


def test_timm_train_is_the_same_with_and_without_fuse():
    out = run("timm_train.py", "--steps", "3", "--batch", "4")
    losses = [line.split()[3::2] for line in out.splitlines() if line.startswith("step")]
    assert len(losses) == 3 and len({pair[0] for pair in losses}) == 3, "it does not train"
    assert float(out.split()[-1]) < 1e-4


def test_kernels_alone_agree_with_pytorch():
    out = run("kernels_alone.py", "--batch", "2", "--tokens", "17")
    found = re.findall(r"^(\w+) +largest difference (\S+)", out, re.M)
    names = ["attention_qkvpacked", "add_layer_norm", "bias_gelu", "distillation_loss"]
    assert [name for name, _ in found] == names
    assert all(float(difference) < 1e-5 for _, difference in found), out


def test_own_data_is_learned(tmp_path):
    out = run("own_data.py", str(tmp_path))
    assert float(re.search(r"90 held-out images, top-1 (\S+) %", out).group(1)) > 70  # chance: 33
    assert sorted(path.name for path in (tmp_path / "images").iterdir()) == ["train", "val"]


def test_custom_teacher_teaches_through_the_cache_alone(tmp_path):
    out = run("custom_teacher.py", str(tmp_path))
    assert float(re.search(r"teacher top-1 (\S+) %", out).group(1)) > 80
    assert float(re.search(r"student top-1 (\S+) %", out).group(1)) > 60  # chance: 33
    assert "2880 rows of logits cached, 20 views of each image" in out  # 144 images
    assert "logits (4, 10) and patches (4, 16, 32) from one pass" in out
    log = (tmp_path / "student" / "metrics.jsonl").read_text().splitlines()
    losses = [row["distill_loss"] for row in map(json.loads, log) if row["kind"] == "train"]
    assert 0 < losses[-1] < 0.8 * losses[0], losses


def test_slurm_script_is_bash():
    subprocess.run(["bash", "-n", EXAMPLES / "slurm.sh"], check=True, timeout=500)


SRUN = """#!/bin/bash
# One node's srun: SIGUSR1 to the task's processes as soon as the run has logged three steps.
while [[ $1 == --* ]]; do shift; done
"$@" &
task=$!
while kill -0 $task 2>/dev/null && [ "$(cat "$OUTPUT/metrics.jsonl" 2>/dev/null | wc -l)" -lt 3 ]
do sleep 0.1; done
kill -USR1 $task 2>/dev/null
wait $task
"""
SCONTROL = """#!/bin/bash
echo "$@" >> "$CALLS"
[ "$1" = show ] && echo 127.0.0.1
exit 0
"""


@pytest.mark.dist
@pytest.mark.slow
@pytest.mark.skipif(os.name != "posix" or not shutil.which("bash"), reason="needs bash")
@pytest.mark.parametrize("recipe", ["digits_student", "no_such_recipe"])
def test_slurm_script_requeues_after_status_75_alone(recipe, tmp_path):
    """With Slurm's two commands played by scripts, the rest real: torchrun, two ranks, a signal."""
    tools, output, calls = tmp_path / "bin", tmp_path / "run", tmp_path / "calls"
    tools.mkdir()
    python = f'#!/bin/bash\nexec "{sys.executable}" "$@"\n'
    launcher = f'#!/bin/bash\nexec "{sys.executable}" -m torch.distributed.run "$@"\n'
    for name, text in (("srun", SRUN), ("scontrol", SCONTROL), ("python", python),
                       ("torchrun", launcher)):  # fmt: skip
        (tools / name).write_text(text)
        (tools / name).chmod(0o755)
    slurm = {"JOB_ID": "7", "JOB_NODELIST": "n1", "NNODES": "1", "GPUS_ON_NODE": "2"}
    done = subprocess.run(
        ["bash", EXAMPLES / "slurm.sh", "--recipe", recipe, "--data.source", "synthetic",
         "--data.workers", "0", "--loss.kind", "none", "--log-every", "1", "--device", "cpu",
         "--batch-size", "32", "--output", str(output)],
        cwd=tmp_path,
        env=os.environ
        | {f"SLURM_{name}": value for name, value in slurm.items()}
        | {"PATH": f"{tools}:{os.environ['PATH']}", "PYTHONPATH": str(ROOT), "CALLS": str(calls),
           "OUTPUT": str(output), "MASTER_PORT": str(20000 + os.getpid() % 10000)},
        capture_output=True, text=True, timeout=500,
    )  # fmt: skip
    asked = calls.read_text().splitlines()
    if recipe == "no_such_recipe":
        assert done.returncode == 1 and "requeue 7" not in asked, done.stderr[-3000:]
        return
    assert done.returncode == 0 and "requeue 7" in asked, done.stderr[-3000:]
    assert "is requeued" in done.stdout
    assert list((output / "checkpoints").iterdir()), "nothing was saved"
    assert not list(tmp_path.glob("*status-75")), "the marker would requeue the next failure too"


@pytest.mark.parametrize(
    ("status", "requeued"), [(0, False), (75, True), (3, False), (1, False), ("term", True)]
)
def test_slurm_array_computes_its_units_and_requeues_after_status_75_alone(
    status, requeued, tmp_path
):
    """With `python` played by a script that ends with a status, or with 75 at SIGTERM."""
    tools, calls = tmp_path / "bin", tmp_path / "calls"
    tools.mkdir()
    body = f"exit {status}"
    if status == "term":
        body = "trap 'exit 75' TERM; kill -TERM $PPID; while true; do sleep 0.05; done"
    for name, text in (("python", f'echo "$@" >> "$CALLS"; {body}'), ("scontrol", SCONTROL)):
        (tools / name).write_text(f"#!/bin/bash\n{text}\n")
        (tools / name).chmod(0o755)
    slurm = {"ARRAY_TASK_ID": "3", "ARRAY_JOB_ID": "70", "JOB_ID": "73", "ARRAY_TASK_COUNT": "2"}
    done = subprocess.run(
        ["bash", EXAMPLES / "slurm_array.sh", "--cache", "CACHE"],
        env=os.environ
        | {f"SLURM_{name}": value for name, value in slurm.items()}
        | {"PATH": f"{tools}:{os.environ['PATH']}", "CALLS": str(calls), "UNITS": "100"},
        capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    asked = calls.read_text().splitlines()
    assert asked[0] == "-m deit_fast precompute --cache CACHE --blocks 300:400"
    assert ("requeue 70_3" in asked) == requeued, done.stderr
    assert done.returncode == (0 if requeued else status)


def test_kubernetes_units_fit_together():
    yaml = pytest.importorskip("yaml", reason="PyYAML is not installed")
    spec = yaml.safe_load((EXAMPLES / "kubernetes_units.yaml").read_text())["spec"]
    container = spec["template"]["spec"]["containers"][0]
    script = container["args"][0]
    assert spec["completionMode"] == "Indexed" and "JOB_COMPLETION_INDEX" in script
    assert script.count("631") == 2  # units a pod, at both ends of its range
    rules = {rule["action"]: rule for rule in spec["podFailurePolicy"]["rules"]}
    assert rules["Ignore"]["onPodConditions"] == [{"type": "DisruptionTarget"}]
    codes = rules["FailIndex"]["onExitCodes"]
    assert (codes["containerName"], codes["values"]) == (container["name"], [3])
    assert spec["template"]["spec"]["restartPolicy"] == "Never"
    text = script.partition("exec deit-fast ")[2].replace("$first:$((first + 631))", "0:631")
    words = shlex.split(text)
    found, config = read_settings(PrecomputeArguments, words[0], words[1:])
    assert (config.cache, found.blocks) == ("s3://BUCKET/regnety", "0:631")


def test_kubernetes_manifest_is_yaml_and_fits_together():
    yaml = pytest.importorskip("yaml", reason="PyYAML is not installed")
    service, job = yaml.safe_load_all((EXAMPLES / "kubernetes.yaml").read_text())
    assert (service["kind"], job["kind"]) == ("Service", "Job")
    spec = job["spec"]
    pod = spec["template"]["spec"]
    container = pod["containers"][0]
    options = dict(arg.split("=", 1) for arg in container["args"] if "=" in arg)
    assert int(options["--nnodes"]) == spec["completions"] == spec["parallelism"]
    assert int(options["--nproc-per-node"]) == container["resources"]["limits"]["nvidia.com/gpu"]
    assert service["spec"]["selector"] == {"job-name": job["metadata"]["name"]}
    host = options["--rdzv-endpoint"].split(":")[0]
    assert host == f"{job['metadata']['name']}-0.{service['metadata']['name']}"
    assert pod["subdomain"] == service["metadata"]["name"]
    # Kubernetes refuses a podFailurePolicy with another restart policy.
    assert pod["restartPolicy"] == "Never" and spec["podFailurePolicy"]
    seconds = {item["name"]: item["value"] for item in container["env"]}
    assert int(seconds["TORCH_ELASTIC_SHUTDOWN_TIMEOUT"]) < pod["terminationGracePeriodSeconds"]
    assert all(isinstance(value, str) for value in seconds.values())
    assert {mount["name"] for mount in container["volumeMounts"]} == {
        volume["name"] for volume in pod["volumes"]
    }
