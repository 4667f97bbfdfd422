# make demo   install, train a steerable summariser on two CPU cores, and draw its Pareto front
# make test   install, then run the tests, a process for each core (ARGS="-n 0 tests/engine" for some of them in one)
# make pretend   the tests that need a GPU, on one that is pretended (tests/pretend_gpu.py); minutes, as kernels are interpreted
# make docs   install mkdocs, build the documentation into site/
# make peers  install TRL, PEFT, verl and others as well, then run the tests that compare with them (tests/peers)
#
# PYTHON=...  another interpreter. Given by hand, it brings its own torch (for a GPU); otherwise the pinned CPU build is used.

PYTHON ?= python3
VENV ?= .venv
OWN_TORCH := $(if $(filter command line,$(origin PYTHON)),--own-torch)

PYTEST := OMP_NUM_THREADS=$${OMP_NUM_THREADS:-1} $(VENV)/bin/python -m pytest -n auto --dist loadfile

.PHONY: demo test pretend peers docs install lint clean

install:
	@command -v $(PYTHON) >/dev/null || { echo "clp-engine: $(PYTHON) was not found; Python 3.10 or newer is needed" >&2; exit 1; }
	@$(PYTHON) tools/environment.py --venv $(VENV) $(OWN_TORCH)

demo: install
	$(VENV)/bin/clp-engine demo $(ARGS)

test: install
	$(PYTEST) $(ARGS)

pretend: install
	CLP_PRETEND_GPU=1 $(PYTEST) -m gpu $(or $(ARGS),tests)

peers: install
	@$(PYTHON) tools/environment.py --venv $(VENV) $(OWN_TORCH) --peers
	CLP_PEERS=required $(PYTEST) tests/peers $(ARGS)

docs: install
	$(VENV)/bin/python -m pip install --quiet -e .[docs] && $(VENV)/bin/python -m mkdocs build --strict

lint: install
	$(VENV)/bin/python -m pip install --quiet ruff && $(VENV)/bin/ruff check .

clean:
	rm -rf $(VENV) build runs .pytest_cache
