#!/usr/bin/env bash
# Success against demonstrations a task, docs/suites.md: PARA and ACT on LIBERO-Spatial, 1, 2, 5, 10 and 20 of each
# task, plain and as runs/suites.sh varies them. Each training holds out one more of each task. ACT has four times as
# many samples, as it learns slower. Every step resumes; an estimated five hours on two cores.
set -euo pipefail
cd "$(dirname "$0")/.."
source .venv/bin/activate
collect="--task_suite libero_spatial --task_ids all --n_demos 21 --grasp planned --frame_stride 3 --render fast"

python collect_demos.py $collect --out data/spatial_plain
python collect_demos.py $collect --start_jitter 0.12 --layout_spread 0.06 --mistake_rate 0.4 --out data/spatial_varied

for model in para act; do
  for data in plain varied; do
    case $model-$data in
      para-varied) flags="--max_steps 3000 --margin 8 --shift_aug 128 --fingers 3 --dilations 1,2,4,8,16 --rays" ;;
      act-varied) flags="--max_steps 6000 --shift_aug 128" ;;
      para-plain) flags="--max_steps 3000" ;;
      act-plain) flags="--max_steps 6000" ;;
    esac
    for n in 1 2 5 10 20; do
      share=$(python -c "print(1 / ($n + 1))") # one of each task is held out
      out=runs/demo_curve/$model-$data-$n
      if [ ! -f $out/done ]; then
        if [ -f $out/state.safetensors ]; then
          python train.py --resume $out
        else
          python train.py --model_type $model --preset small --backbone efficientnet_lite0 \
            --dataset data/spatial_$data --n_demos $((n + 1)) --val_fraction $share \
            --frame_stride 3 --waypoint_stride 8 --open_width 0.07 \
            --n_rot_bins 64 --rotation_weight 0.3 $flags --wandb off --out $out
        fi
        # one that was stopped ends here, and goes on next time
        grep -Eq '"step": (3000|6000),|"finished": true' $out/checkpoint.json
        touch $out/done
      fi
      python eval.py --ckpt $out/checkpoint.safetensors --task_ids all --teleport --n_episodes 5 --out $out/benchmark
      python eval.py --ckpt $out/checkpoint.safetensors --task_ids all --teleport --n_episodes 5 \
        --layout shifted --out $out/shifted
    done
  done
done
python -m study.demo_curve runs/demo_curve --out results/demo_curve.json
