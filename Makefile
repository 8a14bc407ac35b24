# `make help` lists what there is. Everything sets itself up on first use; nothing needs root or Docker.
SHELL := /bin/bash
.DEFAULT_GOAL := help
PY := .venv/bin/python
ARGS ?=
COVERAGE ?=
KILLS ?= 1000

.PHONY: help
help: ## this list
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | awk -F'\t' '{printf "  make %-10s %s\n", $$1, $$2}'

.PHONY: setup
setup: ## install the pinned packages into .venv (the others do it by themselves)
	@scripts/setup

.PHONY: demo
demo: setup ## start everything and take real flight data through the whole chain
	@$(PY) -m scripts.demo $(ARGS)

.PHONY: test
test: setup ## every test, on real servers; parts with ARGS="-m unit"; with COVERAGE=1 what `make coverage` asks, too
	@$(if $(COVERAGE),scripts/coverage --all,$(PY) -m pytest) $(ARGS)

.PHONY: check
check: setup ## what CI runs first: format, lint, types, import rules, contracts, generated files
	@scripts/check

.PHONY: chaos
chaos: setup ## the crash test at length: make chaos KILLS=1000; outages of 60 s
	@HEADRACE_CHAOS_KILLS=$(KILLS) HEADRACE_OUTAGE_SECONDS=60 $(PY) -m pytest --timeout=36000 -s tests/chaos tests/e2e -m "chaos or outage" $(ARGS)

.PHONY: bench
bench: setup ## measure and print figures; written to tests/bench/results/latest.json
	@$(PY) -m tests.bench.run $(ARGS)

.PHONY: coverage
coverage: setup ## branch coverage of the domains and of eventing
	@scripts/coverage

.PHONY: lock
lock: setup ## resolve the versions anew after a change in a pyproject.toml
	@scripts/lock && scripts/setup

.PHONY: protos
protos: setup ## generate libs/contracts from proto/
	@scripts/gen_protos

.PHONY: clean
clean: ## stop the local stack, and that of a kept demo, and remove what it stored (downloads in .cache stay)
	@if [ -x .venv/bin/headrace ]; then .venv/bin/headrace down --state-dir .headrace && .venv/bin/headrace down --state-dir .headrace/demo; fi
	@rm -rf .headrace
