#!/usr/bin/env bash
# What the table is read against: expert, oracle and blind replay, and a committed checkpoint.
set -euo pipefail
cd "$(dirname "$0")/.."
source .venv/bin/activate

python eval.py --policy expert --n_videos 0 --out runs/baselines/expert_benchmark
python eval.py --policy expert --task_suite libero_goal --task_id 4 --n_episodes 20 --n_videos 1 \
  --out runs/baselines/expert_goal_4
python collect_demos.py --survey libero_spatial --grasp side --n_demos 10

flags="--teleport --zero_rotation --max_steps 600"
python eval.py --policy oracle $flags --n_videos 0 --out runs/baselines/oracle_benchmark
python eval.py --policy blind $flags --n_videos 0 --out runs/baselines/blind_benchmark
python eval.py --policy blind $flags --layout shifted --n_episodes 50 --out runs/baselines/blind_shifted
for layout in benchmark shifted; do
  python eval.py --ckpt checkpoints/para_libero_spatial_0.safetensors $flags --layout $layout \
    --n_episodes 50 --out runs/baselines/para_$layout
done
