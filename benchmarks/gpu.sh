#!/usr/bin/env bash
# The GPU part: the tests that need one, then step times at frequencies 1, 10 and 100. A few minutes on an H100-class GPU.
# Nothing is installed: python must have this package and its test extra; peers are timed if they are importable.
# Dry run without a GPU:  DEVICE=cpu SETS=gpt-d128x8 FREQUENCIES=2 ROUNDS=1 OUT=/dev/null benchmarks/gpu.sh
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
PYTHON=${PYTHON:-python3}
DEVICE=${DEVICE:-cuda}
"$PYTHON" -m pytest -q -m gpu tests/gpu
"$PYTHON" -m benchmarks.step_time --device "$DEVICE" --sets "${SETS:-gpt2-124m,gpt-1.3b-quarter}" \
    --frequencies "${FREQUENCIES:-1,10,100}" --rounds "${ROUNDS:-3}" \
    --optimizers "${OPTIMIZERS:-soap,soap-staggered,adamw,muon}" --out "${OUT:-benchmarks/results/step_time_gpu.json}"
