#!/usr/bin/env bash
# A task that asks for memory: docs/memory_task.md. Every step resumes; some 7 core hours.
# `runs/memory_task.sh 0` makes seed 0 alone.
set -euo pipefail
cd "$(dirname "$0")/.."
source .venv/bin/activate

demos=data/lift_once.hdf5
if [ ! -f $demos ]; then
  python collect_demos.py --variant lift_once --n_demos 40 --render fast --out $demos
fi
python eval.py --policy expert --variant lift_once --n_episodes 50 --n_videos 0 \
  --out results/lift_once/expert

# name, policy, context: A, B and C trained on windows of 8 decisions, and on this one alone; each step
# has 8 samples, two of each of 4 windows or one of 8
rows="para:para:
a:autoregressive:
a_now:autoregressive:--context 1 --batch_size 8
b:voxel_ar:
b_now:voxel_ar:--context 1 --batch_size 8
c:voxel_ar_rel:
c_now:voxel_ar_rel:--context 1 --batch_size 8"

for seed in ${*:-0 1 2}; do
  while IFS=: read -r -u 3 name policy context; do
    out=runs/lift_once/$name-s$seed
    # shellcheck disable=SC2086  # context is several words
    if [ -f $out/state.safetensors ]; then
      [ -f $out/done ] || python train.py --resume $out
    else
      python train.py --model_type "$policy" $context --preset small --backbone efficientnet_lite0 \
        --dataset $demos --max_steps 2000 --seed $seed --wandb off --out $out
    fi
    grep -q '"step": 2000,' $out/checkpoint.json # one that was stopped ends here, and goes on next time
    touch $out/done
    python eval.py --ckpt $out/checkpoint.safetensors --teleport --zero_rotation --max_steps 600 \
      --n_episodes 50 --n_videos 1 --out results/lift_once/$name-s$seed
  done 3<<< "$rows"
done
