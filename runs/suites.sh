#!/usr/bin/env bash
# LIBERO-Spatial by one model, docs/suites.md: demonstrations of both bowls from moved cameras, PARA, and every
# column. Every step resumes; some three hours on two cores.
set -euo pipefail
cd "$(dirname "$0")/.."
source .venv/bin/activate

python collect_demos.py --task_suite libero_spatial --task_ids all --n_demos 40 --instruction_of other \
  --grasp planned --setting cameras --start_jitter 0.12 --layout_spread 0.06 --mistake_rate 0.4 \
  --frame_stride 3 --render fast --out data/spatial_cameras
out=runs/para_spatial
if [ -f $out/state.safetensors ]; then
  [ -f $out/done ] || python train.py --resume $out
else
  python train.py --model_type para --preset small --backbone efficientnet_lite0 --dataset data/spatial_cameras \
    --frame_stride 3 --max_steps 10000 --shift_aug 128 --fingers 3 --dilations 1,2,4,8,16 --rays --margin 8 \
    --n_rot_bins 64 --rotation_weight 0.3 --wandb off --out $out
fi
touch $out/done

flags="--ckpt runs/para_spatial/checkpoint.safetensors --task_ids all --teleport"
python eval.py $flags --out runs/suites/benchmark
python eval.py $flags --instruction_of other --n_episodes 5 --out runs/suites/told_other
python eval.py $flags --layout shifted --n_episodes 10 --out runs/suites/shifted
make plus
python eval.py $flags --plus camera --out runs/suites/plus_camera
python eval.py $flags --plus robot --out runs/suites/plus_robot
python eval.py $flags --plus layout --out runs/suites/plus_layout
python eval.py $flags --plus language --out runs/suites/plus_language
