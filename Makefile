# make setup   the environment
# make demo    from nothing to a page with success rates
# make test    everything checked, style and imports first
# make lint    style, format and imports
# make docs    the site
# make plus    LIBERO-Plus's files, for eval.py --plus
# make lerobot both plugins inside LeRobot, in an environment of their own
PYTHON ?= python3.11
VENV := .venv
PY := $(VENV)/bin/python
STAMP := $(VENV)/.installed
DEMO ?= demo

.PHONY: setup demo test lint gpu bench docs plus lerobot clean-demo

setup: $(STAMP)
	@$(PY) -m sim.check_setup

$(STAMP): requirements.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info[:2] != (3, 11))' 2>/dev/null || \
		{ echo "error: Python 3.11 is needed and '$(PYTHON)' is not it; install it (sudo apt-get install -y python3.11 python3.11-venv) or name yours: make $(MAKECMDGOALS) PYTHON=/path/to/python3.11" >&2; exit 2; }
# its pip, which comes last: without the venv package a half-made environment would stay
	@test -x $(VENV)/bin/pip || $(PYTHON) -m venv $(VENV) || \
		{ echo "error: no venv module; install it: sudo apt-get install -y python3.11-venv" >&2; exit 2; }
# a disk that fills up half way leaves only pip's "No space left on device"
	@test -d $(VENV)/lib/python3.11/site-packages/torch || \
		$(PY) -c 'import shutil, sys; sys.exit(shutil.disk_usage(".").free < 12e9)' || \
		{ echo "error: less than 12 GB are free here (df -h .): the environment takes 9 GB, pip's downloads more; make room, or clone onto another disk" >&2; exit 2; }
	@echo "installing the pinned requirements (about 3 minutes, 9 GB)"
# bytecode on all cores, where pip takes one; some packages hold files that are no Python 3.11
	@$(PY) -m pip install --quiet --disable-pip-version-check --no-deps --no-compile --requirement requirements.txt
	@$(PY) -m compileall -q -j 0 $(VENV)/lib/python3.11/site-packages >/dev/null || true
	@touch $(STAMP)

demo: setup
	@PY=$(PY) ./demo.sh $(DEMO)

# .pre-commit-config.yaml has the same three
lint: setup
	@$(VENV)/bin/ruff check --quiet .
	@$(VENV)/bin/ruff format --check --quiet .
	@$(VENV)/bin/lint-imports --no-cache --no-logo

test: setup lint
	@$(PY) -m pytest tests -q -m 'not gpu' -n 2 --dist loadfile --no-loadscope-reorder --durations=15

# no setup: make gpu PY=python3 needs torch, timm, h5py, pytest and the backbone's package, no LIBERO
gpu:
	@$(PY) -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' || \
		{ echo "error: make gpu needs a GPU and torch sees none here; make test checks the rest" >&2; exit 2; }
	@timeout 540 sh -c '$(PY) -m pytest tests/gpu -q -m gpu && $(PY) -m study.bench_gpu'

bench: setup
	@$(PY) -m study.bench

docs: .venv-docs/.installed
	@NO_MKDOCS_2_WARNING=1 .venv-docs/bin/mkdocs build --strict --quiet && echo "site/index.html"

.venv-docs/.installed: requirements-docs.txt
	@test -x .venv-docs/bin/pip || $(PYTHON) -m venv .venv-docs
	@.venv-docs/bin/python -m pip install --quiet --disable-pip-version-check --no-deps --requirement requirements-docs.txt
	@touch $@

plus: setup
	@$(PY) -m pip install --quiet --disable-pip-version-check --no-deps --no-compile --requirement requirements-plus.txt

lerobot: setup .venv-lerobot/.installed
	@.venv-lerobot/bin/python -m pytest tests/plugins -q
	@$(PY) -m pytest tests/lerobot -q

.venv-lerobot/.installed: plugins/setup.sh plugins/requirements.txt plugins/requirements-cuda.txt | $(STAMP)
	@plugins/setup.sh .venv-lerobot
	@touch $@

clean-demo:
	rm -rf $(DEMO)
