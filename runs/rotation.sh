#!/usr/bin/env bash
# One rotation axis against three Euler angles: docs/rotation.md.
set -euo pipefail
cd "$(dirname "$0")/.."
source .venv/bin/activate

python collect_demos.py --grasp rim --layout_spread 0.05 --n_demos 82 --out data/rim.hdf5
python precompute_rotation_pca.py --dataset data/rim.hdf5
python -m study.compare_rotation --dataset data/rim.hdf5 --seeds 3 --max_steps 1600 \
  --backbone efficientnet_lite0 --runs runs/rotation --out results/rotation
for head in new v7; do
  python eval.py --ckpt runs/rotation/${head}_0/checkpoint.safetensors --teleport --max_steps 600 \
    --layout shifted --n_episodes 50 --out runs/rim/$head
done
