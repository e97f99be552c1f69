# Everything is installed into .venv and a cache folder (HOTWEIGHTS_CACHE, default ~/.cache/hotweights), nothing into the
# system but the Debian packages that the first run names.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
CHECK_PYTHON := $(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
  || { echo "Hotweights needs Python >= 3.11; name one: make PYTHON=python3.12 …" >&2; exit 1; }
CONTROL_PLANE := etcd kube-apiserver kube-controller-manager kube-scheduler kubectl helm

.DEFAULT_GOAL := help
.PHONY: help tour demo test mutants e2e e2e-way-back chaos agent-kills soak zoo releases gpu gpu-bundle check format generate cluster-up cluster-down clean
.DELETE_ON_ERROR:

help: ## Show the verbs
	@awk -F ':.*## ' '/^[a-z0-9-]+:.*## /{printf "  make %-14s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

# It runs before anything is installed, and installs .venv and vLLM side by side.
tour: ## A real vLLM on this host from v0 to v1 and back under traffic, without root, Go or Kubernetes (3 minutes; ARGS=--keep)
	@$(CHECK_PYTHON)
	@PYTHONPATH=hack $(if $(wildcard $(READY)),$(BIN)/python,$(PYTHON)) -m e2e.tour $(ARGS)

demo: $(READY) ## From kubectl apply to new weights in running vLLM pods, on a real cluster (or the one KUBECONFIG names)
	$(BIN)/python -m e2e.demo

test: $(READY) ## All tests that need no vLLM: unit, simulated rollouts, and against a real API server
	@$(BIN)/python -m localcluster preflight --tests
	@$(BIN)/python -m localcluster binaries $(CONTROL_PLANE) > /dev/null
	$(BIN)/pytest -n 2 tests -m 'not vllm'

mutants: $(READY) ## What the operator's tests would let pass: each line of a list made wrong in turn (half an hour)
	$(BIN)/python -m tests.operator.mutants

e2e: $(READY) ## All tests with real vLLM engines, alone and in pods of a real cluster
	@$(BIN)/python -m localcluster preflight
	@$(BIN)/python -m localcluster binaries > /dev/null
	@$(BIN)/python -m localvllm ensure > /dev/null
	$(BIN)/pytest -n 2 e2e/engine e2e/tour tests/seeds/test_vllm_integration.py
	$(BIN)/pytest e2e/cluster

e2e-way-back: $(READY) ## The way back from every bad version under every failure policy, on a real cluster (about an hour)
	@$(BIN)/python -m localcluster preflight
	@$(BIN)/python -m localcluster binaries > /dev/null
	@$(BIN)/python -m localvllm ensure > /dev/null
	HOTWEIGHTS_WAY_BACK=all $(BIN)/pytest e2e/cluster/test_way_back.py

chaos: $(READY) ## Twenty rounds of a change and a fault each on a real cluster, under a witness (half an hour; ARGS="--seed N")
	@$(BIN)/python -m localcluster preflight
	@$(BIN)/python -m localcluster binaries > /dev/null
	@$(BIN)/python -m localvllm ensure > /dev/null
	$(BIN)/python -m e2e.chaos --rounds 20 --json build/chaos.json $(ARGS)

BUNDLE ?= build/gpu

agent-kills: $(READY) ## Agents killed twenty times under load, with no more memory than they ask for (a quarter of an hour)
	@$(BIN)/python -m localcluster preflight
	@$(BIN)/python -m localcluster binaries > /dev/null
	@$(BIN)/python -m localvllm ensure > /dev/null
	$(BIN)/python -m e2e.agent_kills --json build/agent-kills.json $(ARGS)

soak: $(READY) ## Two hundred swaps in one vLLM under load: nobody notices, and nothing grows (ten minutes; ARGS="--swaps N")
	@$(BIN)/python -m localvllm ensure > /dev/null
	$(BIN)/python -m e2e.soak --json build/soak.json $(ARGS)

zoo: $(READY) ## Tiny models of thirty architectures switched hot, and compared with cold loads (an hour; ARGS="--only NAME …")
	@$(BIN)/python -m localvllm ensure > /dev/null
	$(BIN)/python -m e2e.zoo --json build/zoo.json $(ARGS)

releases: $(READY) ## A short list of tests with each vLLM release, and their table in docs/vllm.md (an hour; ARGS="--only 0.26.0 …")
	$(BIN)/python -m e2e.releases $(ARGS)

gpu: ## All that needs an NVIDIA GPU, in under 8 minutes; on a machine without a network too, from a bundle
	$(PYTHON) hack/gpu/run.py $(if $(wildcard $(BUNDLE)/*.tar.xz),--bundle $(BUNDLE)) $(ARGS)

gpu-bundle: $(READY) ## What such a machine lacks, in one folder (45 MiB): carry it there, then make gpu
	$(BIN)/python -m gpu pack $(BUNDLE)

check: $(READY) ## Format, lint, types, import contracts, generated files
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/python -m hotweights_crds --check

format: $(READY) ## Format the code and mend what the linter can mend
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

generate: $(READY) ## Write the generated files: the CRDs and the chart's copies of them
	$(BIN)/python -m hotweights_crds

cluster-up: $(READY) ## Start a real Kubernetes cluster with two nodes on this machine
	$(BIN)/python -m localcluster up --nodes 2

cluster-down: ## Stop that cluster and remove what it left
	@if [ -x $(BIN)/python ]; then $(BIN)/python -m localcluster down; fi

clean: cluster-down ## Remove the virtual environment and everything built in the tree (the cache folder stays)
	rm -rf $(VENV) build .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache

# The environment is complete or absent: an interrupted run starts it again.
$(READY): pyproject.toml
	@$(CHECK_PYTHON)
	@$(PYTHON) -c 'import ensurepip' 2>/dev/null || if [ "$$(id -u)" = 0 ]; \
	  then echo "installing the Debian package python3-venv"; apt-get update -q && apt-get install -y -q python3-venv; \
	  else echo "error: $(PYTHON) cannot make virtual environments: have root install python3-venv, or name another: make PYTHON=…" >&2; exit 1; fi
	@echo "setting up $(VENV)"
	@rm -f $(READY)
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@$(BIN)/python -m pip install --quiet 'uv==0.13.9'
	@$(BIN)/uv pip install --quiet --python $(BIN)/python --editable '.[test]'
	@touch $(READY)
