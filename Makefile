# Set-up and checks. `make help` lists the targets.
#
# Every target that needs packages makes .venv by itself (with uv when it is on
# the PATH, else with Python's venv and pip) and installs again only after
# setup.cfg or pyproject.toml changed. A set-up that was interrupted is resumed.

# Variables to override, as in `make demo DEMO_ARGS='--seed 1'`:
PYTHON ?=
DEMO_ARGS ?=
PYTEST_ARGS ?= -n 2 --dist loadfile --no-loadscope-reorder
# Exact versions; CONSTRAINTS= takes the newest that setup.cfg allows.
CONSTRAINTS ?= constraints.txt
# Where parity takes torch from: the registry's Linux wheels bring CUDA.
TORCH_INDEX ?= https://download.pytorch.org/whl/cpu

VENV := .venv
BIN := $(VENV)/bin
SUPPORTED := import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))

.DEFAULT_GOAL := help
.PHONY: help demo test test-slow parity lint format docs lock clean

help:
	@echo 'make demo     set up, then train and compare everything on the built-in world'
	@echo 'make test     set up, then lint, types and the test suite'
	@echo 'make test-slow  the tests that take minutes: real jobs of several processes'
	@echo 'make parity   set up torch and transformers, then compare with them'
	@echo 'make lint     only ruff and mypy'
	@echo 'make format   rewrite the source the way ruff wants it'
	@echo 'make docs     API pages in build/docs'
	@echo 'make lock     renew constraints.txt, the versions that these install'
	@echo 'make clean    remove caches and builds (keeps $(VENV) and runs)'
	@echo 'Variables: PYTHON=python3.12 DEMO_ARGS=... PYTEST_ARGS=... TORCH_INDEX=...' \
	  'CONSTRAINTS=...'

demo: $(VENV)/.installed-run
	$(BIN)/clp demo $(DEMO_ARGS)

test: lint
	$(BIN)/python -m pytest $(PYTEST_ARGS)

test-slow: $(VENV)/.installed-test
	$(BIN)/python -m pytest -m slow $(PYTEST_ARGS)

lint: $(VENV)/.installed-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(VENV)/.installed-test
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

parity: $(VENV)/.installed-test $(VENV)/.installed-parity
	$(BIN)/python -m pytest -m parity $(PYTEST_ARGS)

docs: $(VENV)/.installed-docs
	$(BIN)/python docs/render.py build/docs

# In an environment of its own, so that nothing that was added by hand is kept.
lock:
	rm -rf build/lock
	$(MAKE) VENV=build/lock CONSTRAINTS= build/lock/.installed-test
	{ sed -n '/^#/p' constraints.txt; build/lock/bin/python -m pip list \
	  --format=freeze --exclude clp_jax --exclude pip --exclude setuptools \
	  --exclude wheel; } > build/constraints.txt
	mv build/constraints.txt constraints.txt

clean:
	rm -rf build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache
	rm -rf .hypothesis .cache
	find . -name __pycache__ -not -path './$(VENV)/*' -prune -exec rm -rf {} +

# Stamps. Each is touched last, so that it stands for a finished installation.
$(VENV)/.installed-run: setup.cfg pyproject.toml $(CONSTRAINTS)
	@$(environment)
	@$(call install,$(exact) -e '.[serve]')
	@touch $@

# transformers 4 takes older versions of these two than all else here.
$(VENV)/.installed-parity: setup.cfg pyproject.toml $(CONSTRAINTS)
	@$(environment)
	@$(call install,--index-url $(TORCH_INDEX) torch)
	@sed -E '/^(huggingface_hub|tokenizers)==/d' \
	  $(or $(CONSTRAINTS),/dev/null) > $(VENV)/parity.txt
	@$(call install,--constraint $(VENV)/parity.txt -e '.[parity]')
	@touch $@

$(VENV)/.installed-%: setup.cfg pyproject.toml $(CONSTRAINTS)
	@$(environment)
	@$(call install,$(exact) -e '.[$*]')
	@touch $@ $(VENV)/.installed-run

# Makes .venv where there is none, or one without its installer. An existing one
# of another Python is the user's: say so rather than replace it.
define environment
set -eu; supported() { "$$1" -c '$(SUPPORTED)' 2>/dev/null; }; \
if [ -x $(BIN)/python ] && ! supported $(BIN)/python; then \
  echo "$(VENV) holds $$($(BIN)/python --version 2>&1 || echo 'a broken Python'); clp_jax needs" \
    "3.11 to 3.13. Remove $(VENV) and run make again." >&2; exit 1; \
fi; \
if [ -x $(BIN)/python ] && { command -v uv || $(BIN)/python -m pip --version; } \
  >/dev/null 2>&1; then exit 0; fi; \
python=; \
for candidate in $(if $(PYTHON),"$(PYTHON)",python3 python3.13 python3.12 python3.11 python); do \
  if supported "$$candidate"; then python=$$candidate; break; fi; \
done; \
if [ -z "$$python" ]; then \
  echo "clp_jax needs Python 3.11 to 3.13;" \
    "$(if $(PYTHON),PYTHON=$(PYTHON) is not one,none is on the PATH)." \
    "Name one with make PYTHON=/path/to/python3.12 ..." >&2; exit 1; \
fi; \
echo "Making $(VENV) with $$python, $$("$$python" --version)"; \
if command -v uv >/dev/null; then uv venv --quiet --allow-existing --python "$$python" $(VENV); \
else "$$python" -m venv $(VENV); fi
endef

exact = $(if $(CONSTRAINTS),--constraint $(CONSTRAINTS))

# $(1): what to install, as arguments of pip. uv compiles only when it is told to,
# and the first command would take 10 s longer.
define install
set -eu; echo 'Installing $(subst ','\'',$(1))'; \
if command -v uv >/dev/null; then uv pip install --quiet --compile-bytecode --python $(BIN)/python $(1); \
else $(BIN)/python -m pip install --quiet --disable-pip-version-check $(1); fi
endef
