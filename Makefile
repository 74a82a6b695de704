# `make train` and `make test` do all the set-up from a bare clone: a Python >= 3.11 and a package registry are enough.
.PHONY: train photographs test faults reproduce accelerator lint docs setup clean

# The newest working Python with a file in constraints/, otherwise any from 3.11 on. A pyenv shim may fail; the versions
# that pyenv has installed work.
PYTHON ?= $(shell for v in 3.13 3.12 3.11 3; do \
  for c in python$$v $$(ls -d "$${PYENV_ROOT:-$$HOME/.pyenv}"/versions/$$v.*/bin/python 2>/dev/null | sort -rV); do \
    "$$c" -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && command -v "$$c" && exit; \
  done; done)

train: .venv/installed
	.venv/bin/python -m cnn_jax.main --config=configs/mnist.py $(ARGS)

# Fine-tunes a network with ImageNet weights for the classes of a folder: make photographs DIR=FOLDER
photographs: .venv/installed
	@test -n "$(DIR)" || { echo 'error: which folder? make photographs DIR=FOLDER, with one folder of photographs per class' >&2; exit 2; }
	.venv/bin/python -m cnn_jax.main --config=configs/photographs.py --config.data.dir="$(DIR)" $(ARGS)

# From Python 3.12 on, coverage is measured by sys.monitoring, which costs little; tracing adds a quarter to the time.
test: .venv/installed
	COVERAGE_CORE=$$(.venv/bin/python -c 'import sys; print("sysmon" if sys.version_info >= (3, 12) else "ctrace")') \
	.venv/bin/python -m pytest -n auto --dist loadfile --cov --cov-report=term $(ARGS)

# The fault matrix: every promise of docs/faults.md, tested by real injection, and the other slow tests. Coverage-guided
# fuzzing if atheris installs.
faults: export FAULTS_KILLS ?= 50
faults: export FAULTS_PAIRS ?= 20
faults: export FAULTS_MUTATIONS ?= 200
faults: .venv/installed
	.venv/bin/python -c 'import atheris' 2>/dev/null || .venv/bin/python -m pip install --disable-pip-version-check --quiet --editable '.[fuzz]' || true
	.venv/bin/python -m pytest -n auto --dist worksteal -m 'faults or not faults' tests/faults $(ARGS)
	.venv/bin/python -m pytest -n auto --dist worksteal -m faults --ignore=tests/faults tests $(ARGS)

# Trains a published result again from several seeds: PASS, or the difference. Slower ones: make reproduce RESULT=mnist
reproduce: .venv/installed
	.venv/bin/python -m experiments.reproduce $(or $(RESULT),digits) $(ARGS)

# What a GPU or TPU computes and how fast: make accelerator ARGS=--minutes=4. A CPU runs reduced sizes.
accelerator: .venv/installed
	.venv/bin/python -m benchmarks.accelerator $(ARGS)

lint: .venv/installed
	.venv/bin/ruff format --check .
	.venv/bin/ruff check .
	.venv/bin/mypy

# The reference of all public functions, as HTML pages in build/docs.
docs: .venv/installed
	.venv/bin/pdoc --docformat google --output-directory build/docs cnn_jax

setup: .venv/installed

# Installed again if one of these files has changed.
.venv/installed: pyproject.toml $(wildcard constraints/*.txt)
	@test -n "$(PYTHON)" || { echo 'error: found no Python >= 3.11 that runs; install one, or name it: make PYTHON=/path/to/python' >&2; exit 2; }
	@echo "Setting up .venv with $$($(PYTHON) --version); this takes a minute or two."
	@$(PYTHON) -m venv --clear .venv
	@pins=constraints/$$(.venv/bin/python -c 'import sys; print("python%d.%d.txt" % sys.version_info[:2])'); \
	test -f $$pins || pins=constraints/python3.13.txt; \
	.venv/bin/python -m pip install --disable-pip-version-check --quiet --constraint $$pins --editable '.[dev]'
	@touch $@

clean:
	rm -rf .venv
