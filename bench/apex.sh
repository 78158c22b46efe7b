#!/usr/bin/env bash
# Builds NVIDIA's apex from a folder with its source, outside of the project; then runs the test
# that compares its optimiser with torch's, and the LayerNorm bench with apex among the peers.
#
#     bash bench/apex.sh SOURCE OUT PYTHON
set -euo pipefail
source=$1 out=$2 python=$3
target=$(mktemp -d)
trap 'rm -rf "$target"' EXIT
export APEX_CPP_EXT=1 APEX_CUDA_EXT=1 MAX_JOBS=${MAX_JOBS:-$(nproc)}
export TORCH_CUDA_ARCH_LIST=${TORCH_CUDA_ARCH_LIST:-9.0}
"$python" -m pip install --quiet --no-build-isolation --no-deps --target "$target/site" "$source"
export PYTHONPATH=$target/site${PYTHONPATH:+:$PYTHONPATH}
"$python" -m pytest -q -m gpu -k apex --outcomes "$out/tests.jsonl" tests/test_optim.py
"$python" -m bench add_layer_norm --device cuda --seconds 30 --only ',384\] keep bfloat16 fwd' \
  --out "$out/results.json" --resume
