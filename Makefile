# GNU Make 3.81 and bash 3.2 suffice. `make` alone prints the help.
PYTHON  ?= python3
VENV    ?= .venv
PROFILE ?= cpu
JOBS    ?=
NB      ?=
ARGS    ?=
SHELL   := /bin/bash
# What a caller sets is text, which neither make nor a shell runs: recipes read it from the environment, as "$$PROFILE".
override PYTHON  := $(value PYTHON)
override VENV    := $(value VENV)
override PROFILE := $(value PROFILE)
override JOBS    := $(value JOBS)
override NB      := $(value NB)
override ARGS    := $(value ARGS)
export PROFILE JOBS NB ARGS
# Two are part of targets and commands.
UNSAFE  := ' " ` $$ ; & | < > ( ) { } [ ] * ? ! ~ \# \\ %
ifneq ($(words $(VENV)) $(words $(PYTHON)) $(strip $(foreach c,$(UNSAFE),$(findstring $(c),$(VENV)$(PYTHON)))),1 1 )
$(error VENV is $(VENV) and PYTHON is $(PYTHON): allowed is one path for each, without spaces, quotes and special characters)
endif
PY      := $(VENV)/bin/python
READY   := $(VENV)/ready
CHOICE   = $${NB:+--notebook="$$NB"} $${JOBS:+--jobs="$$JOBS"}
PYTEST  := $(PY) -c 'import os, pytest, shlex, sys; sys.exit(pytest.main(sys.argv[1:] + shlex.split(os.environ["ARGS"])))'
# TORCH=cpu takes CPU-only wheels, TORCH=gpu the ordinary ones; the choice is remembered in $(VENV)/torch.
CHOSEN  := $(shell cat $(VENV)/torch 2>/dev/null)
TORCH   ?= $(CHOSEN)
override TORCH := $(value TORCH)
ifneq ($(TORCH),$$(CHOSEN))
ifeq ($(filter cpu gpu,$(TORCH)),)
ifneq ($(TORCH),)
$(error TORCH is $(TORCH): allowed are cpu and gpu)
endif
endif
else
override TORCH := $(CHOSEN)
endif
UV_PIN  := $(shell sed -n 's/^uv==\([0-9.]*\).*/\1/p' requirements.lock)
UV      := $(VENV)/bin/uv pip
COMPILE := $(UV) compile -q --python $(PY) --universal --generate-hashes --no-header --no-annotate \
           --python-version 3.11 --extra lab --extra dev --extra export

# A user's settings of uv and pip (Colab sets UV_SYSTEM_PYTHON) must not lead the set-up to another Python than $(VENV), nor
# to other packages: what stays says where packages come from and how they are reached.
REACHED := %INDEX %INDEX_URL %FIND_LINKS %HOST %CERT %CERTS %PROXY %CACHE_DIR %TIMEOUT %RETRIES %OFFLINE %KEYRING_PROVIDER \
           %NATIVE_TLS %CONFIG_FILE UV_INDEX_% UV_CONCURRENT_% UV_LINK_MODE
unexport $(filter-out $(REACHED),$(filter PIP_% UV_%,$(.VARIABLES)))
# Nor other Pythons' packages into this one, nor its settings to what runs.
unexport PYTHONPATH PYTHONHOME PYTHONSTARTUP PYTHONOPTIMIZE PYTHONWARNINGS PYTHONINSPECT MPLBACKEND
export TOKENIZERS_PARALLELISM := false
# Seconds to compile one file to bytecode: 60 are too few on a machine that is busy.
export UV_COMPILE_BYTECODE_TIMEOUT := 600
# Profiles of embedded data never ask a hub; photos, imagenet and public may.
ifeq ($(filter photos imagenet public,$(PROFILE)),)
export HF_HUB_OFFLINE := 1
export HF_DATASETS_OFFLINE := 1
endif

ifneq ($(TORCH),$(CHOSEN))
$(READY): FORCE
endif

.PHONY: FORCE help setup reproduce test check browser lab site refresh lint lock audit clean
.DEFAULT_GOAL := help

help:  ## show this help
	@echo "usage: make TARGET [PROFILE=smoke|cpu|study|photos|imagenet|public] [NB=31] [JOBS=2] [TORCH=cpu] [ARGS=...]"
	@awk -F ':.*## ' '/^[a-z]+:.*## /{printf "  %-10s %s\n", $$1, $$2}' Makefile

setup: $(READY)  ## make .venv from requirements.lock: 5.7 GB; TORCH=cpu takes the CPU-only wheels, 2 GB

$(READY): requirements.lock pyproject.toml
	@$(PYTHON) -c 'import sys; v = sys.version_info; sys.exit(0 if v >= (3, 11) else "setup needs Python 3.11 or newer, but %s is %d.%d; name another one: make setup PYTHON=python3.11" % (sys.executable, v[0], v[1]))'
	@# made anew where it is another Python's, has no pip, or was not made to its end
	@test -f $(VENV)/made -o -f $(VENV)/torch && $(PY) -c 'import sys, pip; sys.exit(sys.version_info < (3, 11))' 2>/dev/null \
	  || { $(PYTHON) -m venv --clear $(VENV) && touch $(VENV)/made; }
	@$(PY) -m pip install -q --disable-pip-version-check "uv==$(UV_PIN)"
ifeq ($(TORCH),cpu)
	@awk '/^[a-z]/ {drop = /^(nvidia-|cuda-|triton=|torch=|torchvision=)/} !drop' requirements.lock > $(VENV)/cpu.lock
	$(UV) sync -q --python $(PY) --compile-bytecode --require-hashes $(VENV)/cpu.lock
	$(UV) install -q --python $(PY) --compile-bytecode --no-deps --torch-backend cpu \
	  $$(sed -n 's/^\(torch\(vision\)\{0,1\}==[^ ]*\).*/\1/p' requirements.lock)
else
	$(UV) sync -q --python $(PY) --compile-bytecode --require-hashes requirements.lock
endif
	$(UV) install -q --python $(PY) --no-deps --no-build-isolation -e .
	@$(PY) -m lab check
	@echo $(TORCH) > $(VENV)/torch
	@# as new as they are, where a clock or an archive has dated them in the future
	@touch $@; for file in $^; do [ "$$file" -nt $@ ] && touch -r "$$file" $@; done; true

reproduce: $(READY)  ## train what is missing and render the notebooks (PROFILE=cpu by default)
	@VITLIB_MAKE=$$PPID $(PY) -m lab reproduce --profile="$$PROFILE" $(CHOICE)

test: $(READY)  ## pytest and nbval, each with an empty temporary run store; ARGS= goes to pytest
	@$(PYTEST)

check: $(READY)  ## a subset under a minute: lint, imports, the project's rules, identities of the model
	@$(PY) -m ruff check . && $(PY) -m ruff format --check . && $(PYTEST) -m check tests

browser: $(READY)  ## the site and every notebook's "Run all" in headless Chromium, with axe-core from npm; ARGS= goes to pytest
	@$(PYTEST) -m release tests/test_browser.py

lab: $(READY)  ## JupyterLab on the page of all claims; ARGS= goes to it, e.g. ARGS=--no-browser
	@$(PY) -m tools.jupyterlab

site: $(READY)  ## the notebooks as a site of plain pages in outputs/site
	@$(PY) -m tools.pages

refresh: $(READY)  ## run the committed notebooks at smoke and keep their outputs; prints which numbers moved
	@$(PY) -m tools.refresh $(CHOICE)

lint: $(READY)  ## ruff over code and notebooks
	@$(PY) -m ruff check . && $(PY) -m ruff format --check .

lock: $(READY)  ## compile requirements.lock anew (universal, with hashes)
	$(COMPILE) pyproject.toml -o requirements.lock

audit: $(READY)  ## known vulnerabilities of what requirements.lock pins, where their database can be reached
	@{ echo '# /// script'; echo '# requires-python = ">=3.11"'; echo '# dependencies = ['; \
	  sed -n 's/^\([a-z0-9._-]*==[^\]*[^ \]\) *\\$$/#   "\1",/p' requirements.lock; echo '# ]'; echo '# ///'; } > $(VENV)/audit.py
	@$(VENV)/bin/uv audit --preview --script $(VENV)/audit.py 2> $(VENV)/audit.log || { code=$$?; \
	  [ $$code = 1 ] || echo "audit: the database of vulnerabilities cannot be read, so nothing is known ($$(grep -m1 -i 'error' $(VENV)/audit.log))" >&2; exit $$code; }

clean:  ## remove .venv, caches and rendered results; finished runs in outputs/runs stay
	rm -rf $(VENV) .pytest_cache .ruff_cache outputs/smoke outputs/cpu outputs/study outputs/photos outputs/imagenet outputs/public outputs/site
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
