# make            the virtual environment in .venv, with nybble and its C++ extension (made again when a source changes)
# make compare    the main job on the model that ships: a table, and a page in out/compare
# make test       the fast tests; `make test-all` adds the slow ones
# make check      ruff and mypy
# make interop    other people's readers open what nybble writes (the first time builds llama-cpp-python: 2 to 10 minutes)
# make fuzz       a million broken model files through the readers (a quarter of an hour)
# make sanitize   the kernels and the engine under AddressSanitizer, UndefinedBehaviorSanitizer and ThreadSanitizer
# make bench      the benchmarks in bench/
# make wheel      the wheel in dist/, proved in a fresh environment without a compiler
# make clean      removes everything made here
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INTEROP := .interop
NATIVE := CMakeLists.txt pyproject.toml src/nybble/version.py tools/with_compiler.sh \
  $(wildcard src/nybble/kernels/*.cpp src/nybble/kernels/*.hpp src/nybble/engine/*.cpp src/nybble/engine/*.hpp)
PIP := $(BIN)/python -m pip --disable-pip-version-check

.DEFAULT_GOAL := setup
.PHONY: setup compare test test-all interop fuzz torture check format sanitize bench wheel clean

setup: $(VENV)/.installed

$(VENV)/.created:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || \
	  { echo "nybble: requirements.lock needs Python 3.11 or later, not '$(PYTHON)'; try make PYTHON=python3.11" >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || \
	  { echo "nybble: '$(PYTHON)' has no venv module; install it (Debian, Ubuntu: apt install python3-venv)" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)
	@touch $@

$(VENV)/.packages: requirements.lock $(VENV)/.created
	@echo 'installing the packages of requirements.lock (torch is the large one); a few minutes the first time'
	@$(PIP) install --quiet -r requirements.lock
	@touch $@

# No build isolation: it would download the build tools (and ask for torch) a second time.
$(VENV)/.installed: $(NATIVE) $(VENV)/.packages
	@echo 'building the C++ extension; one to three minutes'
	@sh tools/with_compiler.sh $(VENV) $(PIP) install --quiet --no-build-isolation --no-deps --editable .
	@touch $@

compare: setup
	$(BIN)/nybble compare --variants default,int4:g64+gptq,int3:g64+best:tune=0 --force -o out/compare

test: setup
	$(BIN)/python -m pytest -n 2 --dist loadfile -m "not slow" --durations 25 --durations-min 3

test-all: setup
	$(BIN)/python -m pytest -n 2 --dist loadfile

# Beside tests/interop those tests of formats and containers that skip where another project's library is missing.
interop: setup
	@sh tools/interop.sh environment $(VENV) $(INTEROP)
	NYBBLE_INTEROP=1 $(INTEROP)/bin/python -m pytest -n 2 --dist loadfile tests/interop \
	  $$(grep -lE 'importorskip|ggml_library' tests/formats/test_*.py tests/containers/test_*.py) --durations 10 --durations-min 3

# COUNT=100000 SEED=7 for another run.
fuzz: setup
	$(BIN)/python tests/hostile/fuzz.py --count $(or $(COUNT),1000000) --seed $(or $(SEED),1)

# Jobs killed and hindered at every call that changes the disk (a slice is part of `make test`); hours.
torture: setup
	$(BIN)/python tests/torture/torture.py --jobs $(or $(JOBS),rtn,gguf,folder,convert,gptq,awq,guided,tune,train) --every $(or $(EVERY),1) \
	  --random $(or $(COUNT),300) --seed $(or $(SEED),0)

check: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: setup
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

sanitize:
	sh tools/sanitize.sh

bench: setup
	@set -e; for script in bench/*.py; do echo "== $$script"; $(BIN)/python "$$script"; done

wheel: setup
	rm -rf dist
	sh tools/with_compiler.sh $(VENV) $(PIP) wheel --quiet --no-build-isolation --no-deps --wheel-dir dist .
	sh tools/prove_wheel.sh $(PYTHON) dist/*.whl

clean:
	rm -rf $(VENV) $(INTEROP) .wheel-venv build dist out .mypy_cache .pytest_cache .ruff_cache .hypothesis
	rm -f src/nybble/kernels/_native*.so
