#!/usr/bin/env bash
# Whether each task starts as it says, under the pinned MuJoCo: docs/premise.md.
set -euo pipefail
cd "$(dirname "$0")/.."
source .venv/bin/activate

python -m study.premise --workers 1
