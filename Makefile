PYTHON ?= python3.11

.PHONY: demo test lint

demo: .venv/installed
	.venv/bin/python -m benchmark.demo

# a process a core, of one thread each
test: .venv/installed-dev
	OMP_NUM_THREADS=1 .venv/bin/python -m pytest -q -n auto --maxprocesses 8 --dist worksteal

lint: .venv/installed-dev
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/python .ci/words

.venv/installed: requirements.txt
	$(PYTHON) -m venv .venv
	.venv/bin/python -m pip install -r requirements.txt
	touch $@

.venv/installed-dev: requirements-dev.txt .venv/installed
	.venv/bin/python -m pip install -r requirements-dev.txt
	touch $@
