# make demo | test | lint | sanitize | bench | zoo -- each sets up what it needs in .venv
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed-$(shell cat pyproject.toml constraints.txt | cksum | cut -d' ' -f1)

.PHONY: demo test lint sanitize bench zoo train clean

# timm and open_clip without torchvision, whose default wheel is built for CUDA: see tests/zoo/without_torchvision.py.
$(STAMP): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt "torch" "numpy"
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable ".[dev]"
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps "timm>=1.0" "open_clip_torch>=3.0"
	touch $@

demo: $(STAMP) ## prune a trained vision-language model at 63 %, export it, measure it
	$(BIN)/mfcompile prune examples/emoji_xvlm/model.py --sparsity 0.63 --output-dir out/emoji_xvlm --overwrite
	$(BIN)/mfcompile bench out/emoji_xvlm --variants dense,packed,decoded,runtime --tokens 1,8,32 --threads 1 --output-dir out/emoji_xvlm-speed --overwrite

test: $(STAMP) ## the whole test suite
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder -q $(PYTEST_ARGS)

lint: $(STAMP) ## style and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

sanitize: $(STAMP) ## the C++ kernels under AddressSanitizer and UndefinedBehaviorSanitizer
	$(BIN)/python tests/unit/runtime/sanitize.py

bench: $(STAMP) ## every figure of the README and the docs, measured here
	$(BIN)/python benchmarks/run.py

zoo: $(STAMP) ## every multimodal architecture of transformers: docs/zoo.md (ZOO="CLIP*" for some, ZOO=--failed for those that failed)
	OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks.zoo.run $(ZOO)

train: $(STAMP) ## train the example model again (under an hour on two cores)
	cd examples && ../$(BIN)/python -m emoji_xvlm.train

clean:
	rm -rf $(VENV) build dist out *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
