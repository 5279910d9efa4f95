#!/usr/bin/env bash
# Make the environment in which LeRobot runs both plugins: plugins/setup.sh [FOLDER], .venv-lerobot by default.
# It needs Python 3.12 (name yours: PYTHON=/path/to/python3.12), and 3.5 GB beside the .venv of `make setup`, from
# which CUDA's libraries are taken; without one, or with CUDA_LIBRARIES=own, 6 GB.
set -euo pipefail
repository=$(cd "$(dirname "$0")/.." && pwd)
folder=${1:-$repository/.venv-lerobot}
python=${PYTHON:-python3.12}

if ! "$python" -c 'import sys; sys.exit(sys.version_info[:2] != (3, 12))' 2>/dev/null; then
    echo "error: LeRobot needs Python 3.12 and '$python' is not it; install it (sudo apt-get install -y python3.12" \
        "python3.12-venv, or uv python install 3.12) or name yours: PYTHON=/path/to/python3.12 $0" >&2
    exit 2
fi
test -x "$folder/bin/pip" || "$python" -m venv "$folder"
install() { "$folder/bin/python" -m pip install --quiet --disable-pip-version-check --no-deps --no-compile "$@"; }

echo "installing LeRobot and the simulator into $folder (a few minutes)"
install --requirement "$repository/plugins/requirements.txt"

# torch's wheel for Linux loads CUDA's libraries when it is imported, on a CPU too
ours=$repository/.venv/lib/python3.11/site-packages/nvidia
theirs=$folder/lib/python3.12/site-packages/nvidia
if [ "${CUDA_LIBRARIES:-shared}" = shared ] && [ -d "$ours/cu13" ] && [ ! -d "$theirs" ]; then
    ln -sfn "$(cd "$ours" && pwd -P)" "$theirs"
elif [ ! -e "$theirs" ]; then
    install --requirement "$repository/plugins/requirements-cuda.txt"
fi

# editable: a change of the repository is seen at once; the plugins import its modules
install --no-build-isolation --editable "$repository" \
    --editable "$repository/plugins/lerobot_policy_para" \
    --editable "$repository/plugins/lerobot_env_libero_calibrated"
"$folder/bin/python" -c 'import lerobot, torch, lerobot_policy_para, lerobot_env_libero_calibrated' ||
    { echo "error: $folder was made, but LeRobot or a plugin cannot be imported there; remove it and run this again" >&2; exit 2; }
echo "$folder/bin/lerobot-eval"
