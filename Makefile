# make run    both experiments with their defaults, from a bare machine to the figures under results/
# make test   the tests, about five minutes
# make bench  beside the peers, and the fault campaign; takes hours, in which nothing else should run
# make lint   style

PYTHON ?= python3

.PHONY: run test bench lint
.DELETE_ON_ERROR:

run: .venv/installed
	.venv/bin/python unstructured_pruning.py
	.venv/bin/python structured_pruning.py

test: .venv/installed-for-tests
	.venv/bin/python -m pytest -q

bench: .venv/installed-for-benchmarks
	.venv/bin/python -m benchmarks.epoch_cost
	.venv/bin/python -m benchmarks.throughput
	.venv/bin/python -m benchmarks.growth
	.venv/bin/python -m benchmarks.weights
	.venv/bin/python -m benchmarks.sparse_products
	.venv/bin/python -m benchmarks.held_out
	.venv/bin/python -m benchmarks.filters
	.venv/bin/python -m benchmarks.networks
	.venv/bin/python -m benchmarks.families
	.venv/bin/python -m benchmarks.fuzz
	.venv/bin/python -m benchmarks.faults

lint: .venv/installed-for-tests
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .

# The stamps are touched last: an installation that was interrupted is continued.
.venv/installed: requirements.txt
	$(PYTHON) -m venv .venv
	.venv/bin/python -m pip install --quiet -r requirements.txt
	touch $@

.venv/installed-for-benchmarks: .venv/installed-for-tests benchmarks/requirements.txt
	.venv/bin/python -m pip install --quiet -r benchmarks/requirements.txt
	touch $@

.venv/installed-for-tests: .venv/installed tests/requirements.txt
	.venv/bin/python -m pip install --quiet -r tests/requirements.txt
	touch $@
