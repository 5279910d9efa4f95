#!/usr/bin/env bash
# The recipe without one of its parts, for PARA and C, on validation; every step resumes.
# Half of the demonstrations and of the steps: some 6 core hours.
set -euo pipefail
cd "$(dirname "$0")/.."
source .venv/bin/activate

rows=$(python -c "from study.matrix import WITHOUT; print(*WITHOUT)")
# shellcheck disable=SC2086  # rows are several words
python run_matrix.py --out runs/leave_one_out --columns val_verdict --train_steps 2000 --n_demos 96 \
  --n_episodes 24 --collect_flags "--render fast" --rows para_recipe c_recipe $rows
