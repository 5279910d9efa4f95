#!/usr/bin/env bash
# The verdict: every policy plain and with the recipe, every column, test sets touched once.
# Every step resumes; some 17 hours on two cores.
set -euo pipefail
cd "$(dirname "$0")/.."
source .venv/bin/activate

failed=0 # a step that fails ends neither the others nor the table
flags="--out runs/verdict --columns verdict pro_swap pro_object --train_steps 4000 --eval_flags=--trace"
# three seeds of what the claim is about; bounds need no training
python run_matrix.py $flags --collect_flags "--render fast" --seeds 0 1 2 \
  --rows blind oracle expert para_recipe a_recipe b_recipe c_recipe para a_pointer b c || failed=1
# one seed of the others; ACT is trained until it is done, see docs/act.md
python run_matrix.py $flags --collect_flags "--render fast" --rows a_mlp a_mlp_recipe d d_recipe act act_recipe \
  --row_flags act="--max_steps 10000" act_recipe="--max_steps 10000" || failed=1
python run_matrix.py --table --out runs/verdict --export results/verdict --readme docs/verdict.md
exit $failed
