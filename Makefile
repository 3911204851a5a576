# Two commands for a newcomer: `make demo` and `make test`. Both set everything up by themselves.
VENV := .venv
PY := $(VENV)/bin/python
STAMP := $(VENV)/.installed
PYTHON ?= python3.11

.PHONY: demo test audit fuzz test-slow test-deployment test-containers check format clean help

help: ## What can be made
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/'

# torch first and pinned: an unpinned torch or torchvision would bring gigabytes of CUDA along.
$(STAMP): pyproject.toml
	@command -v $(PYTHON) >/dev/null || { echo "error: $(PYTHON) is not installed"; echo "what to do: install Python 3.11, or say which: make PYTHON=/path/to/python3.11"; exit 1; }
	test -x $(PY) || $(PYTHON) -m venv $(VENV)
	$(PY) -m pip install --quiet --disable-pip-version-check "torch==2.13.0" $(TORCH_INDEX)
	$(PY) -m pip install --quiet --disable-pip-version-check "torch==2.13.0" -e ".[dev]"
	touch $(STAMP)

demo: $(STAMP) ## Ten hospitals train one classifier under differential privacy, on this machine
	$(PY) -m deploy.demo

# One thread each; four processes, since some tests wait for processes of their own.
test: $(STAMP) ## The tests (about a quarter of an hour on two cores)
	OMP_NUM_THREADS=1 $(PY) -m pytest -m "not slow" -n 4 --dist loadfile --no-loadscope-reorder --durations 25

audit: $(STAMP) ## Search for weights with which one picture counts for more than its clipping norm (minutes)
	OMP_NUM_THREADS=1 $(PY) -m benchmarks.audit.search --seconds $(or $(SECONDS),300)

fuzz: $(STAMP) ## A minute of broken input for every parser (SECONDS=60 SEED=... TARGETS="...")
	OMP_NUM_THREADS=1 $(PY) -m tests.fuzz --seconds $(or $(SECONDS),60) $(if $(SEED),--seed $(SEED)) $(TARGETS)

test-slow: $(STAMP) ## The long ones: real images for minutes
	$(PY) -m pytest -m "slow and not deployment and not containers" --timeout 3600

test-deployment: $(STAMP) ## Server and hospitals in processes of their own, over TLS, killed with -9
	$(PY) -m pytest tests/deployment -m deployment

test-containers: $(STAMP) ## The same in containers (as root; needs docker.io, docker-compose, debootstrap)
	tests/containers/engine.sh start
	tests/containers/engine.sh image
	$(PY) -m pytest tests/containers -m containers

check: $(STAMP) ## ruff and strict mypy
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy

format: $(STAMP) ## Let ruff put the code in order
	$(VENV)/bin/ruff check --fix .
	$(VENV)/bin/ruff format .

clean: ## Remove the virtual environment and caches
	rm -rf $(VENV) .mypy_cache .ruff_cache .pytest_cache .hypothesis build *.egg-info
