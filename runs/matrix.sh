#!/usr/bin/env bash
# Policies x settings: the table of docs/first_matrix.md. Every step resumes; hours on two cores.
set -euo pipefail
cd "$(dirname "$0")/.."
source .venv/bin/activate

python run_matrix.py
python run_matrix.py --rows para b c --columns viewpoint --seeds 1
python run_matrix.py --rows para_turned a_turned c_turned --columns position --n_demos 96
python run_matrix.py --rows para_mirror b_mirror --columns position
python run_matrix.py --rows blind b c --columns pro_swap pro_object --seeds 1
python run_matrix.py --table --export results/matrix --readme docs/first_matrix.md
