# make demo: install into .venv and run the quick start.   make test: the whole test suite.
# make docs: build the documentation site into docs/_build/html.   make package: build and try a wheel.
PYTHON ?= python3
BIN := .venv/bin
INSTALLED := .venv/installed
export TF_CPP_MIN_LOG_LEVEL ?= 3

.PHONY: demo test lint docs package bench bench-gpu clean

demo: $(INSTALLED)
	$(BIN)/python examples/quickstart.py

test: $(INSTALLED)
	@# In parts, since TensorFlow keeps memory of all that it compiles until the process ends.
	failed=0; for part in a-d e-l m-r s-z; do \
		$(BIN)/python -m pytest -n 2 --dist loadfile tests/test_[$$part]*.py || failed=1; \
	done; exit $$failed

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

docs: $(INSTALLED)
	rm -rf docs/_build docs/api/generated
	$(BIN)/python -m sphinx -W --keep-going -q docs docs/_build/html
	@echo "docs/_build/html/index.html"

# Build both distributions without warnings, and try the wheel where there is nothing else.
package: $(INSTALLED)
	rm -rf build dist
	env -u PYTHONDONTWRITEBYTECODE $(BIN)/python -m build > build.log 2>&1 || { cat build.log; false; }
	@! grep -iE "warning|deprecat" build.log
	@rm build.log
	$(BIN)/twine check --strict dist/*
	sh .ci/try-wheel $(BIN)/python dist/*.whl

bench: $(INSTALLED)
	$(BIN)/python -m benchmarks

# On a machine with an NVIDIA GPU: the step, and with CIFAR10=cifar10.npz the study of large networks.
LARGE = --plan benchmarks/study/accelerator.yaml --data cifar10=$(CIFAR10)
bench-gpu: $(INSTALLED)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e ".[gpu]"
	$(BIN)/python -m benchmarks gpu
ifdef CIFAR10
	$(BIN)/python -m benchmarks.study run $(LARGE)
	$(BIN)/python -m benchmarks.study report $(LARGE) --write
else
	@echo "The study of large networks is not run: give its data, make bench-gpu CIFAR10=cifar10.npz"
endif

clean:
	rm -rf .venv outputs build dist *.egg-info docs/_build docs/api/generated

$(INSTALLED): pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed: make PYTHON=python3.11")'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e ".[docs,examples,test]"
	touch $@
