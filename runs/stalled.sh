#!/usr/bin/env bash
# Episodes that cannot succeed any more: how often the rule of --stop_stalled would have been wrong.
set -euo pipefail
cd "$(dirname "$0")/.."
source .venv/bin/activate

flags="--teleport --zero_rotation --max_steps 600 --n_videos 0 --trace"
python eval.py --policy blind --layout shifted --n_episodes 300 $flags --out runs/stalled/blind_shifted
python eval.py --policy blind --layout position --n_episodes 100 $flags --out runs/stalled/blind_position
for name in para autoregressive voxel_ar voxel_ar_rel; do
  python eval.py --ckpt checkpoints/${name}_libero_spatial_0.safetensors --layout position --n_episodes 100 $flags --out runs/stalled/${name}_position
done
python eval.py --ckpt checkpoints/para_libero_spatial_0.safetensors --layout viewpoint --n_episodes 64 $flags --out runs/stalled/para_viewpoint
python -m study.stalled runs/stalled/* --decisions 10 20 30 50 --out results/stalled.json
