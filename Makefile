# Everything runs in .venv, made on first use. Other interpreter: make PYTHON=python3.12 test

PYTHON ?= python3
ARGS ?=
SAGAS ?= 20000
SEED ?= 0
JOBS ?= 2
VENV := .venv
BIN := $(VENV)/bin
# The constraints hold for what builds the package too; pip reads one name or the other, by its version.
PIP := PIP_CONSTRAINT=constraints.txt PIP_BUILD_CONSTRAINT=constraints.txt \
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt

.DEFAULT_GOAL := help
.PHONY: help demo test test-kafka lint format proto bench chaos simulate fuzz

help:
	@echo "make demo     run three orders against three sample services; stays up until Ctrl-C"
	@echo "              (ARGS=--once: exit when they have ended)"
	@echo "make test     run all tests (ARGS=tests/saga: some; JOBS=1: not two at a time)"
	@echo "make test-kafka BOOTSTRAP=host:port"
	@echo "              run the tests of the events against a real broker (they make topics there)"
	@echo "make lint     ruff and mypy"
	@echo "make format   lay out the code"
	@echo "make proto    generate the Python of the .proto files"
	@echo "make bench    measure, and print a table (ARGS=--safety: several workers, events, recovery;"
	@echo "              ARGS=--doors: access control, TLS, masking, tracing)"
	@echo "make simulate SAGAS=20000 SEED=0"
	@echo "              run that many sagas amid simulated crashes, lost replies and lost leases (docs/simulation.md)"
	@echo "make fuzz CASES=10000"
	@echo "              that many REST requests by the document, on SQLite and on Postgres, as many random gRPC calls"
	@echo "              and frames, and ten times as many damaged workflow definitions"
	@echo "              (ARGS='--hostile 10000': also that many hostile requests of each kind)"
	@echo "make chaos    workers, Postgres and broker in trouble under load for MINUTES=1; check that nothing is lost"

demo: $(VENV)/.runtime
	@$(BIN)/python -m demo $(ARGS)

test: $(VENV)/.dev
	$(BIN)/python -m pytest -q -n $(JOBS) --dist loadfile $(ARGS)

test-kafka: $(VENV)/.dev
	SAGA_TEST_KAFKA=$(BOOTSTRAP) $(BIN)/python -m pytest -q tests/kafka $(ARGS)

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(VENV)/.dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

proto: $(VENV)/.dev
	$(BIN)/python -m server.protogen
	$(BIN)/python -m grpc_tools.protoc --proto_path=. --plugin=protoc-gen-grpclib_python=$(BIN)/protoc-gen-grpclib_python \
		--python_out=. --pyi_out=. --grpclib_python_out=. demo/proto/orders.proto

bench: $(VENV)/.dev
	$(BIN)/python -m bench $(ARGS)

MINUTES ?= 1
CASES ?= 10000

simulate: $(VENV)/.dev
	$(BIN)/python -m tests.simulation --sagas $(SAGAS) --seed $(SEED) $(ARGS)

fuzz: $(VENV)/.dev
	PYTHONPATH=.:proto $(BIN)/python -m tests.fuzz --cases $(CASES) $(ARGS)

chaos: $(VENV)/.dev
	PYTHONPATH=.:proto $(BIN)/python -m tests.faults.chaos --minutes $(MINUTES) $(ARGS)

# The stamps say what is installed; a change of pyproject.toml or of a pinned version installs again.

$(VENV)/.made:
	@$(PYTHON) -c 'import sys; sys.exit(None if (3, 11) <= sys.version_info < (3, 14) \
		else f"saga runs on Python 3.11 to 3.13, this is {sys.version.split()[0]}: make PYTHON=python3.12 ...")'
	@echo "Making $(VENV) ..."
	@$(PYTHON) -m venv $(VENV)
	@touch $@

$(VENV)/.runtime: pyproject.toml constraints.txt | $(VENV)/.made
	@echo "Installing what the product needs into $(VENV) ..."
	@$(PIP) -e .
	@touch $@

$(VENV)/.dev: pyproject.toml constraints.txt | $(VENV)/.made
	@echo "Installing what the product and its tests need into $(VENV) ..."
	@$(PIP) -e '.[dev]'
	@touch $(VENV)/.runtime $@
