#!/usr/bin/env bash
# Waypoints against a recorded path: docs/openloop.md. The matrix trains its policies.
set -euo pipefail
cd "$(dirname "$0")/.."
source .venv/bin/activate

python collect_demos.py --push_rate 0 --frame_stride 1 --n_demos 8 --seed 7 --out data/libero_spatial_0_calm.hdf5
python -m study.openloop --dataset data/libero_spatial_0_calm.hdf5 --whole \
  --out results/openloop_spatial_0 \
  --ckpt runs/matrix/runs/a_pointer-in_dist-s0/checkpoint.safetensors \
  runs/matrix/runs/para-in_dist-s0/checkpoint.safetensors \
  checkpoints/voxel_ar_libero_spatial_0.safetensors \
  checkpoints/voxel_ar_rel_libero_spatial_0.safetensors
