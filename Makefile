# Two commands do everything on a fresh machine: `make demo` and `make test`.  Both set up .venv first.
# Needs: Python >= 3.11, make; with a C++ compiler pydensecrf2 is built too, which the CRF is compared with.
# Disk: about 6.5 GB for .venv with the registry's CUDA build of torch, about 2 GB with a CPU-only build, 0.1 GB for the demo.
#   CPU only:  make demo TORCH_INDEX=https://download.pytorch.org/whl/cpu
PYTHON ?= python3
VENV ?= .venv
TORCH_INDEX ?=
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
READY := $(VENV)/.ready
TORCH_PAIR := $(shell sed -n 's/^\(torch\|torchvision\)==/\1==/p' constraints.txt)

export DO_NOT_TRACK := 1
export PREFECT_SERVER_ANALYTICS_ENABLED := false

.PHONY: help setup demo test test-all check docs format clean

help:
	@echo "make demo      the whole road on generated images, about 4 minutes on 2 cores"
	@echo "make test      every test that is not slow;  make test-all adds the slow ones"
	@echo "make check     ruff, pyright, import-linter, the documentation;  make format rewrites the layout"
	@echo "make docs      the documentation as a site in build/site; a warning is an error"
	@echo "make clean     removes .venv, .prefect and the demo's artifacts"

setup: $(READY)

$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "wsss needs Python >= 3.11, found $$($(PYTHON) --version); set PYTHON=/path/to/python3.11"; exit 2; }
	@echo "setting up $(VENV): a few minutes the first time, most of it the download of torch"
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
ifneq ($(TORCH_INDEX),)
	$(PIP) install -q --index-url $(TORCH_INDEX) $(TORCH_PAIR)
endif
	$(PIP) install -q -c constraints.txt -e '.[dev]'
	@$(PIP) install -q -c constraints.txt -e '.[crf]' 2> $(VENV)/pydensecrf2.log || \
		echo "pydensecrf2 did not build here (see $(VENV)/pydensecrf2.log): nothing needs it but the tests and the benchmark that compare our CRF with it"
	@touch $@

demo: $(READY)
	$(BIN)/wsss run configs/demo.yaml --engine prefect

test: $(READY)
	$(BIN)/python -m pytest -m 'not slow and not gpu'

test-all: test
	$(BIN)/python -m pytest -m 'slow and not gpu'

check: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright
	$(BIN)/lint-imports
	$(MAKE) docs

docs: $(READY)
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict --quiet

format: $(READY)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) .prefect artifacts/prepare_data artifacts/train_classifier artifacts/make_attention artifacts/make_masks \
		artifacts/train_segmenter artifacts/evaluate artifacts/reports artifacts/runs
