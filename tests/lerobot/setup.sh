#!/usr/bin/env bash
# LeRobot beside this repository: an environment of its own, for LeRobot asks for Python 3.12.
#
#     bash tests/lerobot/setup.sh DIR [PYTHON]
#
# DIR: the new environment. PYTHON: of version 3.12 or later, else the one that uv finds.
# LEROBOT_ENV=DIR then runs the tests that need it. About 2 GB, because the libraries of a GPU, which
# are another 4 GB and which nothing here needs, are taken from this repository's own environment.
set -euo pipefail

here=$(cd "$(dirname "$0")" && pwd)
env=$1
python=${2:-3.12}
ours=${OURS:-$here/../../.venv/bin/python}

uv=$(command -v uv || true)
if [ -z "$uv" ]; then
    "$ours" -m venv "$env.uv"
    "$env.uv/bin/pip" install -q "$(grep '^uv==' "$here/requirements.txt")"
    uv=$env.uv/bin/uv
fi
[ -x "$env/bin/python" ] || "$uv" venv -q --python "$python" "$env"
grep -v '^uv==' "$here/requirements.txt" |
    "$uv" pip install -q --python "$env/bin/python" --overrides "$here/overrides.txt" -r -

# torch asks for the libraries of a GPU even where it computes on the CPU
site=$("$env/bin/python" -c "import sysconfig; print(sysconfig.get_path('purelib'))")
theirs=$("$ours" -c "import sysconfig; print(sysconfig.get_path('purelib'))")
[ -e "$site/nvidia" ] || ln -s "$(realpath "$theirs")/nvidia" "$site/nvidia"

"$env/bin/python" -c "import lerobot, torch; print('lerobot', lerobot.__version__, 'torch', torch.__version__)"
