#!/usr/bin/env bash
# Whole suites, docs/suites.md. LIBERO-Spatial: demonstrations of both bowls; one model of all tasks trained
# (a) on the task's own camera alone, PARA with three seeds, A and C, and (b) on the same demonstrations from two moved
# cameras each, then on 400 more of one camera each as well, all seen in one view; every column of each. LIBERO-Object
# and LIBERO-Goal: one PARA each, the task's own camera, the benchmark. Then one PARA of all thirty tasks. Every step
# resumes; an estimated twenty-four hours on two cores.
set -euo pipefail
cd "$(dirname "$0")/.."
source .venv/bin/activate

varied="--grasp planned --start_jitter 0.12 --layout_spread 0.06 --mistake_rate 0.4 --frame_stride 3 --render fast"
python collect_demos.py --task_suite libero_spatial --task_ids all --n_demos 40 --instruction_of other $varied \
  --out data/spatial_fixed
for name in object goal; do
  python collect_demos.py --task_suite libero_$name --task_ids all --n_demos 20 $varied --out data/$name
done
for seed in 1 2; do
  python collect_demos.py --replay data/spatial_fixed --setting cameras --seed $seed \
    --frame_stride 3 --render fast --out data/spatial_moved_$seed
done
python collect_demos.py --task_suite libero_spatial --task_ids all --n_demos 40 --instruction_of other $varied \
  --setting cameras --seed 3 --out data/spatial_moved_new

# train POLICY NAME STEPS VIEW DATASETS... [FLAGS...], into runs/POLICY_NAME
# A and C hear by FiLM too since 740bc68: this makes `..._spatial_film` of the pages
train() {
  local model=$1 out=runs/$1_$2 steps=$3 view=$4 trunk
  shift 4
  case $model in
    voxel_ar_rel) trunk="--turn_back" ;;
    *) trunk="--dilations 1,2,4,8,16 --rays" ;;
  esac
  [ -f $out/done ] && return
  if [ -f $out/state.safetensors ]; then
    python train.py --resume $out
  else
    python train.py --model_type $model --preset small --backbone efficientnet_lite0 --dataset "$@" \
      --canonical_view "$view" --frame_stride 3 --max_steps $steps --shift_aug 128 --fingers 3 \
      $trunk --margin 8 --n_rot_bins 64 --rotation_weight 0.3 --wandb off --out $out
  fi
  # one that was stopped ends here, and goes on next time
  grep -q "\"step\": $steps," $out/checkpoint.json
  touch $out/done
}
# waypoints far apart are stops saved; Goal's fingers hold bars that are wider than 4 cm
far="--waypoint_stride 8 --open_width 0.07"
train para spatial_fixed 10000 "" data/spatial_fixed
train para spatial 10000 "" data/spatial_fixed $far
for seed in 1 2; do
  train para spatial_$seed 10000 "" data/spatial_fixed $far --seed $seed
done
for policy in autoregressive voxel_ar_rel; do
  train $policy spatial 10000 "" data/spatial_fixed $far
done
train para spatial_moved 14000 fit data/spatial_moved_1 data/spatial_moved_2 $far
train para spatial_moved_more 10000 fit data/spatial_moved_1 data/spatial_moved_2 data/spatial_moved_new $far \
  --init_from runs/para_spatial_moved/checkpoint.safetensors
train para object 6000 "" data/object
train para goal 6000 "" data/goal $far
train para spatial_sentence 10000 "" data/spatial_fixed $far --text sentence
train para thirty 20000 "" data/spatial_fixed data/object data/goal $far
train para thirty_heights 20000 "" data/spatial_fixed data/object data/goal $far --heights support

# the bounds below have the same
bounds="--task_ids all --n_episodes 10 --teleport --waypoint_stride 8 --grasp planned --render fast --n_videos 0"
python eval.py --policy blind --task_suite libero_spatial $bounds --layout shifted \
  --out runs/suites/blind_spatial/shifted
make plus
for run in para_spatial_fixed para_spatial para_spatial_1 para_spatial_2 autoregressive_spatial voxel_ar_rel_spatial \
  para_spatial_moved para_spatial_moved_more; do
  out=runs/suites/$run
  flags="--ckpt runs/$run/checkpoint.safetensors --task_ids all --teleport"
  python eval.py $flags --out $out/benchmark
  python eval.py $flags --instruction_of other --n_episodes 5 --out $out/told_other
  python eval.py $flags --layout shifted --n_episodes 10 --out $out/shifted
  for kind in camera robot layout language; do
    python eval.py $flags --plus $kind --out $out/plus_$kind
  done
done
# bounds that need no training
for name in spatial object goal; do
  python eval.py --policy oracle --task_suite libero_$name $bounds --margin 4 --out runs/suites/oracle_$name/benchmark
  python eval.py --policy blind --task_suite libero_$name $bounds --out runs/suites/blind_$name/benchmark
done
# where the oracle of Spatial fails: cells of no size, and waypoints nearer to each other
oracle="--policy oracle --task_suite libero_spatial --task_ids 4,5,6,9 --n_episodes 10 --teleport --margin 4"
fast="--grasp planned --render fast --n_videos 0"
python eval.py $oracle $fast --waypoint_stride 8 --grid 4096 --n_height_bins 4096 \
  --out runs/suites/oracle_spatial/benchmark_no_cells
python eval.py $oracle $fast --waypoint_stride 5 --out runs/suites/oracle_spatial/benchmark_stride5
for name in object goal; do
  out=runs/suites/para_$name
  flags="--ckpt runs/para_$name/checkpoint.safetensors --task_ids all --teleport"
  python eval.py $flags --out $out/benchmark
  python eval.py $flags --layout shifted --n_episodes 10 --out $out/shifted
  for kind in robot layout; do
    python eval.py $flags --plus $kind --out $out/plus_$kind
  done
done
python eval.py --ckpt runs/para_spatial_sentence/checkpoint.safetensors --task_ids all --teleport --plus language \
  --out runs/suites/para_spatial_sentence/plus_language
# one model of all; the benchmarks of the one that failed on validation stay closed
for name in spatial object goal; do
  for run in thirty thirty_heights; do
    python eval.py --ckpt runs/para_$run/checkpoint.safetensors --task_suite libero_$name --task_ids all --teleport \
      --layout val --n_episodes 5 --out runs/suites/para_$run/val_$name
  done
  python eval.py --ckpt runs/para_thirty_heights/checkpoint.safetensors --task_suite libero_$name --task_ids all \
    --teleport --out runs/suites/para_thirty_heights/$name
done
