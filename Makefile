# make demo | make test | make space are all a fresh clone needs: Python >= 3.10, make and a package index.
PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin
# the lowest versions that pyproject.toml states, on the oldest Python it allows
PYTHON_LOWEST ?= python3.10

# what `make test` installs; the tests of what is left out are skipped
EXTRAS ?= test,space,transformers
# the folder that is pushed as a Space, and a run folder of one's own to show there beside the released weights
SPACE ?= output/space
RUN ?=
# minutes of `make gpu`
BUDGET ?= 25
# Worker processes of pytest: one a core. A file stays in one process, for its fixtures; files go out in their order,
# so that the small ones at the end fill the gaps.
WORKERS ?= logical
PYTEST = OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder --durations 10
# tests that compare results of models and operators with stored or independent ones
COMPUTING = $(addprefix tests/,test_closeness.py blocks ops/test_reference.py ops/test_api.py models/test_shipped_weights.py)

.PHONY: help demo test test-all test-plain-cpu conformance test-lowest lint gpu bundle space space-folder clean
.DELETE_ON_ERROR:

help:  ## this list
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 18

demo: $(VENV)/.demo  ## two photographs and a fine-tune, about 4 minutes on 2 CPU cores
	$(BIN)/python scripts/demo.py

test: $(VENV)/.test  ## ruff, and all tests but those marked slow
	$(BIN)/ruff check .
	$(PYTEST) -m 'not slow'

test-all: $(VENV)/.test  ## ruff and all tests
	$(BIN)/ruff check .
	$(PYTEST)

# The tests that compute, with the plainest kernels that torch has (no AVX in its own loops, no AVX-512 or AMX in oneDNN):
# results must not depend on the CPU. Both settings only take instructions away, so they run on any machine.
test-plain-cpu: $(VENV)/.test  ## tests that hold results to others, with the plainest kernels of torch
	ATEN_CPU_CAPABILITY=default ONEDNN_MAX_CPU_ISA=AVX2 $(PYTEST) -m 'not slow' $(COMPUTING)

# timm's own model tests over every name of this package; ARGS='--max-params 45e6' leaves out the large ones
conformance: $(VENV)/.test  ## timm's own model tests over every name of this package
	OMP_NUM_THREADS=1 $(BIN)/python tests/conformance.py $(ARGS)

test-lowest:  ## the tests on the lowest versions of the dependencies
	$(MAKE) VENV=.venv-lowest PYTHON=$(PYTHON_LOWEST) EXTRAS=test CONSTRAINT='-c tests/lowest.txt' .venv-lowest/.test
	$(subst $(BIN),.venv-lowest/bin,$(PYTEST))

lint: $(VENV)/.test  ## ruff and mypy
	$(BIN)/ruff check .
	$(BIN)/mypy

# any CUDA card; ARGS='--steps dynamic-7' picks steps, scripts/gpu_report.py --list shows them
gpu: $(VENV)/.test  ## check and time everything on a GPU in BUDGET=8, 25 or 60 minutes
	$(BIN)/python scripts/gpu_report.py --budget $(BUDGET) $(ARGS)

# for a machine without network; WEIGHTS=1 packs the weights, DATA='a.zip b.zip' these files
bundle: $(VENV)/.test  ## pack code, tests and wheels into output/bundle, with a run line
	$(BIN)/python scripts/bundle.py $(if $(WEIGHTS),--weights) $(if $(DATA),--data $(DATA)) $(ARGS)

# the page at localhost, from the very folder that is pushed
space: $(VENV)/.space space-folder  ## the demo app at localhost; RUN=FOLDER adds a model of your own
	$(BIN)/python $(SPACE)/app.py

space-folder:  ## the folder that is pushed as a Space
	rm -rf $(SPACE)
	mkdir -p $(SPACE)/models
	cp $(addprefix hub/space/,app.py answer.py interface.py upload.py style.css README.md requirements.txt) LICENSE $(SPACE)
	cp -r coatnet_zoo scripts/coatnet_train $(SPACE) && find $(SPACE) -name __pycache__ -prune -exec rm -r {} +
ifneq ($(RUN),)
	mkdir $(SPACE)/models/$(notdir $(RUN))
	cp $(RUN)/config.json $(RUN)/model.safetensors $(SPACE)/models/$(notdir $(RUN))
endif

$(BIN)/python:
	$(PYTHON) -c 'import sys; sys.exit(f"Python 3.10 or newer is needed, $(PYTHON) is {sys.version.split()[0]}; set PYTHON=..." if sys.version_info < (3, 10) else 0)'
	$(PYTHON) -m venv $(VENV)

$(VENV)/.demo: $(BIN)/python pyproject.toml
	$(BIN)/python -m pip install --disable-pip-version-check -q -e '.[demo]' $(CONSTRAINT)
	touch $@

$(VENV)/.space: $(BIN)/python pyproject.toml
	$(BIN)/python -m pip install --disable-pip-version-check -q -e '.[space]' $(CONSTRAINT)
	touch $@

$(VENV)/.test: $(BIN)/python pyproject.toml
	$(BIN)/python -m pip install --disable-pip-version-check -q -e '.[$(EXTRAS)]' $(CONSTRAINT)
	touch $@

clean:  ## remove environments, caches and output/
	rm -rf $(VENV) .venv-lowest .cache output
