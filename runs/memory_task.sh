#!/usr/bin/env bash
# A task that asks for memory: docs/memory_task.md.
set -euo pipefail
cd "$(dirname "$0")/.."
source .venv/bin/activate

python collect_demos.py --variant lift_once --n_demos 40 --out data/lift_once.hdf5
python eval.py --policy expert --variant lift_once --n_episodes 20
python train.py --model_type autoregressive --dataset data/lift_once.hdf5 --max_steps 1667 \
  --backbone efficientnet_lite0 --out runs/once_a
python train.py --model_type para --dataset data/lift_once.hdf5 --max_steps 750 \
  --backbone efficientnet_lite0 --out runs/once_para
for name in a para; do
  python eval.py --ckpt runs/once_$name/checkpoint.safetensors --teleport --zero_rotation \
    --max_steps 600 --n_episodes 10 --n_videos 2 --out results/lift_once_$name
done
