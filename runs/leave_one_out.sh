#!/usr/bin/env bash
# The recipe without one of its parts, for PARA and C, on validation; every step resumes.
# Half of the demonstrations and of the steps: some 6 core hours.
set -euo pipefail
cd "$(dirname "$0")/.."
source .venv/bin/activate

python run_matrix.py --out runs/leave_one_out --export results/leave_one_out --columns val_verdict --train_steps 2000 --n_demos 96 \
  --n_episodes 24 --collect_flags "--render fast" --rows para_recipe \
  para_recipe_without_mistakes para_recipe_without_hand para_recipe_without_turns \
  para_recipe_without_starts para_recipe_without_shifts para_recipe_without_fingers \
  para_recipe_without_dilations para_recipe_without_rays \
  c_recipe c_recipe_without_mistakes c_recipe_without_hand c_recipe_without_turns \
  c_recipe_without_starts c_recipe_without_shifts c_recipe_without_fingers \
  c_recipe_without_dilations c_recipe_without_turn_back
