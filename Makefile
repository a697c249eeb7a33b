# Two commands are the whole set-up: `make demo` and `make test`. Each makes .venv if need be.
PYTHON ?= python3
BIN := .venv/bin

# OpenMP threads that wait should sleep, not spin: the service's processes share the cores.
export OMP_WAIT_POLICY ?= PASSIVE

.PHONY: demo test lint types unit format docs compose-check constraints clean help

help:
	@echo "make demo     quantize a real network through the real service (sets up .venv first)"
	@echo "make test     set up, lint, check types and imports, run all tests"
	@echo "make format   format and fix what can be fixed"
	@echo "make docs     build the documentation's site into docs/_build/html"
	@echo "make compose-check   build the images, run docker-compose.yml's profile cpu and try it (Docker or Podman)"

demo: .venv/worker
	$(BIN)/python examples/fashion_mnist/demo.py

test: lint types unit

lint: .venv/dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports

types: .venv/dev
	$(BIN)/mypy

# A file's tests share servers, so they stay together.
unit: .venv/dev
	$(BIN)/pytest --numprocesses logical --maxprocesses 4 --dist loadfile

format: .venv/dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# OPTIONS="--debian debian:13-slim" builds the servers instead of pulling them.
compose-check: .venv/dev
	$(BIN)/python benchmarks/compose_check.py $(OPTIONS)

docs: .venv/dev
	$(BIN)/python -m sphinx -W --keep-going -q docs docs/_build/html

# torch's version is given, not searched for: each release is paired with one of torchvision.
constraints: .venv/dev
	printf 'torch==2.13.0\ntorchvision==0.28.0\n' | $(BIN)/uv pip compile --universal --python-version 3.11 \
	  --all-extras --no-annotate --no-header -c - pyproject.toml -o constraints.txt

.venv/bin/python:
	$(PYTHON) -m venv .venv

.venv/worker: .venv/bin/python pyproject.toml constraints.txt
	@echo "Installing the service and its worker (PyTorch included) into .venv ..."
	$(BIN)/python -m pip install --disable-pip-version-check --progress-bar off -c constraints.txt -e '.[worker]'
	@touch $@

.venv/dev: .venv/bin/python pyproject.toml constraints.txt
	@echo "Installing the service and the development tools (PyTorch included) into .venv ..."
	$(BIN)/python -m pip install --disable-pip-version-check --progress-bar off -c constraints.txt -e '.[dev]'
	@touch .venv/worker $@

clean:
	rm -rf .venv out data build dist *.egg-info
