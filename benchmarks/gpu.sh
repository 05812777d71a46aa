#!/usr/bin/env bash
# The GPU part: the tests that need one, step times at frequencies 1, 10 and 100, where the time of a step goes, and what
# a refresh costs. Meant to take less than 8 minutes on an H100-class GPU; not run on one yet.
# Nothing is installed: python must have this package and its test and lab extras; peers are timed if it has them too.
# Dry run without a GPU:  DEVICE=cpu SETS=gpt-d128x8 FREQUENCIES=2 ROUNDS=1 STEPS=10 RESULTS=/tmp benchmarks/gpu.sh
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
PYTHON=${PYTHON:-python3}
DEVICE=${DEVICE:-cuda}
"$PYTHON" -m pytest -q -m gpu tests/gpu
RESULTS=${RESULTS:-benchmarks/results}
SETS=${SETS:-gpt2-124m,gpt-1.3b-quarter}
PEERS=$("$PYTHON" -c 'from importlib.util import find_spec as has
print("".join("," + name for name in ("heavyball", "pytorch-optimizer") if has(name.replace("-", "_"))))')
"$PYTHON" -m benchmarks.speed.step_time --device "$DEVICE" --sets "$SETS" --frequencies "${FREQUENCIES:-1,10,100}" \
    --rounds "${ROUNDS:-3}" --optimizers "${OPTIMIZERS:-soap,soap-staggered,adamw,muon$PEERS}" \
    --out "$RESULTS/step_time_gpu.json"
"$PYTHON" -m benchmarks.speed.step_profile --device "$DEVICE" --sets "$SETS" --out "$RESULTS/step_profile_gpu.json"
"$PYTHON" -m benchmarks.speed.refresh_cost --device "$DEVICE" --steps "${STEPS:-10,100,300}" --out "$RESULTS/refresh_cost_gpu.json"
