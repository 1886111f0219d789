# make run    install, then run the bundled example through FastKV and through a full cache
# make test   install with the test extra, then run the tests
# make fuzz   the fuzz tests with EXAMPLES random examples; what they find is written to .fuzz
# make lint   ruff (lint and format) and mypy

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
EXAMPLE := examples/archive
EXAMPLES ?= 100000
PACKAGE := -m fastkv -m fastkv.cli -m fastkv.cli_flags -m fastkv.__main__ -m fastkv.errors -m fastkv.storage -p fastkv.cache \
	-p fastkv.console -p fastkv.engine -p fastkv.eval -p fastkv.kernels -p fastkv.models -p fastkv.report

.PHONY: run test fuzz lint clean

run: $(VENV)/run.stamp
	@echo "== FastKV, 10 % of the KV cache kept" >&2
	$(BIN)/fastkv-run --model $(EXAMPLE)/model --prompt $(EXAMPLE)/prompt.txt
	@echo "== full cache" >&2
	$(BIN)/fastkv-run --model $(EXAMPLE)/model --prompt $(EXAMPLE)/prompt.txt --policy full

# The files that take longest come first (tests/conftest.py). Compiled code is kept: tests start many processes.
test: $(VENV)/test.stamp
	PYTHONDONTWRITEBYTECODE= $(BIN)/python -m pytest --numprocesses auto --maxprocesses 4 --dist loadfile --no-loadscope-reorder

fuzz: $(VENV)/test.stamp
	rm -rf .fuzz
	FASTKV_FUZZ_EXAMPLES=$(EXAMPLES) FASTKV_FUZZ_FOLDER=.fuzz \
		$(BIN)/python -m pytest tests/fuzz --numprocesses 2 --dist worksteal -p no:cacheprovider

lint: $(VENV)/test.stamp
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	@# mypy finds the package through a link named fastkv to this folder
	@mkdir -p .checked && ln -sfn .. .checked/fastkv
	MYPYPATH=.checked $(BIN)/mypy $(PACKAGE)

$(VENV)/run.stamp: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet -c constraints.txt -e .
	@touch $@

$(VENV)/test.stamp: $(VENV)/run.stamp
	$(BIN)/python -m pip install --quiet -c constraints.txt -e ".[test]"
	@touch $@

clean:
	rm -rf $(VENV) .checked .pytest_cache .ruff_cache .mypy_cache .fuzz *.egg-info
