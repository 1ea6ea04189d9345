# make demo: draw a sheet of pictures.   make test | lint | bench | bench-check | clean.   Another interpreter: make PYTHON=python3.12 demo
PYTHON ?= python3
ARGS ?=
PIP = .venv/bin/python -m pip install -q -c constraints.txt
SHEET = sfumato-out/demo.png

export PIP_DISABLE_PIP_VERSION_CHECK = 1
unexport PIP_USER PIP_TARGET PIP_PREFIX PIP_ROOT PIP_DRY_RUN VIRTUAL_ENV PYTHONHOME

.PHONY: demo test test-all lint bench bench-check clean
.DELETE_ON_ERROR:

demo: .venv/.installed
	@.venv/bin/sfumato generate "a cat" "a red apple" "一只狐狸" "蓝色的鲸鱼" --style all --sheet $(SHEET) --seed 7 --force
	@echo "The pictures are in $(SHEET)"

test: .venv/.installed-dev
	@.venv/bin/python -m pytest -n 2 --dist loadfile -m "not slow" $(ARGS)

test-all: .venv/.installed-dev
	@.venv/bin/python -m pytest -n 2 --dist loadfile $(ARGS)

lint: .venv/.installed-dev
	@.venv/bin/ruff check . && .venv/bin/ruff format --check .

bench: .venv/.installed-dev
	@for script in bench/*.py; do [ -e "$$script" ] || continue; .venv/bin/python "$$script" --quick || exit 1; done

bench-check: .venv/.installed-dev
	@.venv/bin/python bench/check.py $(ARGS)

clean:
	@rm -rf .venv build dist *.egg-info .pytest_cache .ruff_cache .hypothesis
	@find sfumato tests bench scripts -name __pycache__ -type d -prune -exec rm -rf {} +

.venv/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || { \
		found=$$($(PYTHON) --version 2>/dev/null || echo "not installed"); \
		echo "sfumato needs Python 3.11 or newer, and $(PYTHON) is $$found; name another: make PYTHON=/path/to/python3.11" >&2; exit 1; }
	@$(PYTHON) -m venv .venv

.venv/.installed: pyproject.toml constraints.txt | .venv/bin/python
	@echo "Installing into .venv (once; a few minutes where torch must be downloaded)"
	@$(PIP) -e .
	@touch $@

.venv/.installed-dev: pyproject.toml constraints.txt | .venv/bin/python
	@echo "Installing into .venv with the tools for development (once; a few minutes where torch must be downloaded)"
	@$(PIP) -e '.[cpu,data,dev]'
	@$(PIP) --no-deps taming-transformers-rom1504  # a reference for tests; what it asks for would bring another torch
	@touch .venv/.installed $@
