#!/usr/bin/env bash
# The main job in a quarter of an hour on two cores: demonstrations from LIBERO's simulator, a PARA policy trained on them,
# closed-loop evaluation on both layouts beside the blind replay, and a page to look at. Every step resumes.
# Usage: demo.sh [FOLDER]    PY=python interpreter
set -euo pipefail
cd "$(dirname "$0")"
out=${1:-demo}
py=${PY:-.venv/bin/python}
flags="--teleport --zero_rotation --max_steps 300 --n_videos 1"

[ -f "$out/demos.hdf5" ] || "$py" collect_demos.py --n_demos "${DEMO_DEMOS:-12}" --out "$out/demos.hdf5"
if [ -f "$out/run/state.safetensors" ]; then
  "$py" train.py --resume "$out/run"
else
  "$py" train.py --model_type para --dataset "$out/demos.hdf5" --out "$out/run" --backbone efficientnet_lite0 \
    --max_steps "${DEMO_STEPS:-750}" --wandb off
fi
# Ctrl-C ends a training in order, and what is half trained is not evaluated
if ! grep -q "\"step\": ${DEMO_STEPS:-750}," "$out/run/checkpoint.json"; then
  echo "the training was stopped; the same command goes on with it" >&2
  exit 130
fi
for layout in benchmark shifted; do
  "$py" eval.py --ckpt "$out/run/checkpoint.safetensors" $flags --layout $layout --n_episodes "${DEMO_EPISODES:-8}" --out "$out/para_$layout"
  "$py" eval.py --policy blind $flags --layout $layout --n_episodes "${DEMO_EPISODES:-8}" --out "$out/blind_$layout"
done
"$py" -m figures.report --run "$out/run" --evals "$out"/para_benchmark "$out"/para_shifted "$out"/blind_benchmark "$out"/blind_shifted \
  --out "$out/report.html"
