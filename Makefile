# make train   a fresh machine: creates .venv, installs, generates data with a known answer, trains on it
# make test    lint, types, import contract, tests; what CI runs
# make test-deep   the property and stress tests of the embedding tables, forty times as long
# make test-long   what takes minutes, and so is no part of `make test`: clusters of many processes, retraining killed at every step, benchmarks
# make faults  a run whose processes hang, or are killed at random moments, a hundred times: an hour or so
# make proto   regenerates flowps/ps/wire/flowps_pb2.py from flowps.proto, and that of flowps/serving/wire
# make docs    builds the documentation in site/, and fails where a link or a reference leads nowhere
# make bench   measures the workloads and writes the README's table
# make retrain-demo ML100K=FOLDER   three weeks of retraining on MovieLens 100k, in a few minutes
# make quality ML1M=FOLDER   the built-in models beside the same in plain Keras, on MovieLens-style data: an hour or two

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
DATA := data/quickstart
FAULTS := tests/faults/long_faults.py tests/faults/long_hangs.py
LONG := $(filter-out $(FAULTS), $(sort $(shell find tests -name 'long_*.py')))

.PHONY: train test test-deep test-long faults lint proto proto-serving bench quality retrain-demo docs clean

train: $(VENV)/installed
	$(BIN)/python -m flowps.synthetic $(DATA)
	$(BIN)/python -m flowps.train examples/quickstart.toml

test: lint
	$(BIN)/python -m pytest -n 2 --dist loadfile

test-deep: $(VENV)/installed-test
	FLOWPS_DEEP=40 $(BIN)/python -m pytest --timeout 3600 tests/ps/test_table.py tests/ps/test_threads.py

test-long: $(VENV)/installed-test
	$(BIN)/python -m pytest -m long
	$(BIN)/python -m pytest $(LONG)

faults: $(VENV)/installed-test
	$(BIN)/python -m pytest --timeout 7200 -s $(FAULTS)

lint: $(VENV)/installed-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

proto: $(VENV)/installed-test proto-serving
	$(BIN)/python -m grpc_tools.protoc -I . --python_out=. --pyi_out=. flowps/ps/wire/flowps.proto

proto-serving: $(VENV)/installed-test
	$(BIN)/python -m grpc_tools.protoc -I . --python_out=. --pyi_out=. flowps/serving/wire/serving.proto

bench: $(VENV)/installed-test
	$(BIN)/python -m bench.all

quality: $(VENV)/installed-test
	$(BIN)/python -m bench.quality $(ML1M)
	$(BIN)/python -m bench.quality $(ML1M) --orders

retrain-demo: $(VENV)/installed
	$(BIN)/python -m workflows.demo $(ML100K)

docs: $(VENV)/installed-docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict
	@echo "site/index.html; with search: $(BIN)/python -m http.server -d site 8000"

$(VENV)/bin/python:
	$(PYTHON) -c 'import sys; sys.exit("flowps needs Python 3.11 or newer, found " + sys.version.split()[0]) if sys.version_info < (3, 11) else None'
	$(PYTHON) -m venv $(VENV)

$(VENV)/installed: pyproject.toml | $(VENV)/bin/python
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e .
	touch $@

$(VENV)/installed-test: pyproject.toml | $(VENV)/bin/python
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[test]'
	touch $@ $(VENV)/installed

$(VENV)/installed-docs: pyproject.toml | $(VENV)/bin/python
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[docs]'
	touch $@ $(VENV)/installed

clean:
	rm -rf $(VENV) build site *.egg-info
