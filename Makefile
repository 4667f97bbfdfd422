# make demo   install, train a steerable summariser on two CPU cores, and draw its Pareto front
# make test   install, then run the tests that tell whether the installation is right, a process for each core: every op, back-end
#             and mode once (ARGS="tests/engine" for some of them)
# make check  everything that make test leaves out: the tests marked `check`, and the targets below (ARGS="tests/engine" for some
#             of the marked tests alone)
# make pretend   the tests that need a GPU, on one that is pretended (tests/pretend_gpu.py); minutes, as kernels are interpreted
# make avx2   the numeric tests of the kernels and the engine as on a processor that has AVX2 and nothing newer
# make aarch64   cross-compile the C++ kernels for aarch64 and run their tests there, emulated by qemu (tools/aarch64.py). Needs Debian
#             and a cross compiler; ARGS="-k matmul" for some of the tests
# make peers  install TRL, PEFT, verl and others as well, then run the tests that compare with them (tests/peers)
# make vllm   install vLLM's CPU build and this package into .venv-vllm (3.5 GB), and run tests/in_vllm there
# make lowest   the engine's and the kernels' main tests with the lowest versions that pyproject.toml allows, in .venv-lowest
#             (constraints-lowest.txt; on x86-64 Linux, PyPI's torch of that age comes with 4 GB of CUDA)
# make newest   the same with the newest versions that there are, in .venv-newest (constraints-newest.txt)
# make lint   the rules that need no test: ruff, its format, which room imports which (import-linter), types (mypy)
# make docs   install mkdocs, build the documentation into site/
#
# PYTHON=...  another interpreter. Given by hand, it brings its own torch (for a GPU); otherwise the pinned CPU build is used.

PYTHON ?= python3
VENV ?= .venv
OWN_TORCH := $(if $(filter command line,$(origin PYTHON)),--own-torch)

# `--dist worksteal`: a process that is done takes tests from the other, so that no long file is left to one of them.
pytest = OMP_NUM_THREADS=$${OMP_NUM_THREADS:-1} $(1)/bin/python -m pytest -n auto --dist worksteal
PYTEST := $(call pytest,$(VENV))
# What the pretended GPU runs in `make check`: `make pretend` alone takes every test of a GPU.
PRETENDED := tests/test_pretend_gpu.py tests/kernels/test_gpu_kernels.py tests/engine/test_gpu_engine.py
# AVX2 for this project's C++, for torch's own kernels and for the library of its matrix products.
AVX2 := CLP_KERNELS_ISA=avx2 ATEN_CPU_CAPABILITY=avx2 ONEDNN_MAX_CPU_ISA=AVX2
NUMERIC := $(addprefix tests/kernels/test_,matmul.py multi_lora.py linear_logprob.py linear_logprob_directions.py logits_logprob.py \
  sampling.py interpolation.py interpolated_linear.py prefix_attention.py decoder.py) \
  $(addprefix tests/engine/,rollouts/test_native_decoding.py rollouts/test_rollout.py objectives/test_estimators.py policy/test_steerable.py)

# What other versions of the libraries may change: everything of the engine, and of the kernels what torch and Triton run.
VERSIONED := tests/engine tests/tasks $(filter tests/kernels/%,$(NUMERIC)) tests/kernels/test_composition.py tests/kernels/test_aot.py
# Old libraries call what others have deprecated since; how many operations a step has is counted with the pinned ones.
OF_lowest := -W default::DeprecationWarning -W default::FutureWarning --ignore tests/engine/training/test_step_work.py

.PHONY: demo test check pretend avx2 aarch64 lowest newest peers vllm docs install lint clean

install:
	@command -v $(PYTHON) >/dev/null || { echo "clp-engine: $(PYTHON) was not found; Python 3.10 or newer is needed" >&2; exit 1; }
	@$(PYTHON) tools/environment.py --venv $(VENV) $(OWN_TORCH)

demo: install
	$(VENV)/bin/clp-engine demo $(ARGS)

test: install
	$(PYTEST) -m "not check" $(ARGS)

check: install
	$(PYTEST) -m check $(ARGS)
ifndef ARGS
	$(MAKE) pretend ARGS="$(PRETENDED)"
	$(MAKE) avx2
	$(MAKE) aarch64 ARGS=--or-skip
	$(MAKE) lowest
	$(MAKE) newest
	$(MAKE) peers
	$(MAKE) vllm
endif

pretend: install
	CLP_PRETEND_GPU=1 $(PYTEST) -m gpu $(or $(ARGS),tests)

avx2: install
	$(AVX2) $(PYTEST) -m "not check" -k "not triton" $(or $(ARGS),$(NUMERIC))

aarch64: install
	$(VENV)/bin/python tools/aarch64.py $(ARGS)

lowest newest:
	@$(PYTHON) tools/environment.py --venv $(VENV)-$@ --constraints constraints-$@.txt
	$(call pytest,$(VENV)-$@) -m "not check" $(OF_$@) $(or $(ARGS),$(VERSIONED))

peers: install
	@$(PYTHON) tools/environment.py --venv $(VENV) $(OWN_TORCH) --peers
	CLP_PEERS=required $(PYTEST) --dist loadfile tests/peers $(ARGS)

# One process, as each test loads an engine of gigabytes; what vLLM's own code calls may be deprecated.
vllm:
	@$(PYTHON) tools/environment.py --venv $(VENV)-vllm --vllm
	OMP_NUM_THREADS=$${OMP_NUM_THREADS:-1} $(VENV)-vllm/bin/python -m pytest -W default::DeprecationWarning \
	  -W default::FutureWarning $(or $(ARGS),tests/in_vllm)

docs: install
	$(VENV)/bin/python -m pip install --quiet -e .[docs] && $(VENV)/bin/python -m mkdocs build --strict

lint: install
	@$(VENV)/bin/python -m pip install --quiet --constraint constraints.txt ruff mypy import-linter
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/lint-imports --no-cache
	$(VENV)/bin/mypy

clean:
	rm -rf $(VENV) $(VENV)-lowest $(VENV)-newest $(VENV)-vllm build runs .pytest_cache
