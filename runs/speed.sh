#!/usr/bin/env bash
# Seconds and memory on this machine: docs/speed.md.
set -euo pipefail
cd "$(dirname "$0")/.."
source .venv/bin/activate

python -m study.bench features
python -m study.bench train
python -m study.bench attention --rounds 3 --out results/bench_attention.json
python -m study.bench voxel --rounds 3 --out results/bench_voxel.json
python -m study.bench eval --ckpt checkpoints/para_libero_spatial_0.safetensors --episodes 5
python -m study.bench rollout --layout shifted --episodes 4 --out results/bench_rollout.json
