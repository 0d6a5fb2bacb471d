# make quickstart: environment, a corpus that every Python has, a small GPT, its curves, samples. No downloads of data.
# make test:       everything that CI runs, but the linters.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
INSTALLED_DEV := $(VENV)/.installed-dev
STDLIB = $(shell $(BIN)/python -c "import sysconfig; print(sysconfig.get_path('stdlib'))")

.PHONY: quickstart test lint format bench schema install

quickstart: $(INSTALLED)
	$(BIN)/python data_prep.py "$(STDLIB)/**/*.py" --exclude "*/site-packages/*" "*/test/*" "*/tests/*" "*/idlelib/*" \
		--output data/quickstart --tokenizer train:2048 --val-fraction 0.02
	$(BIN)/python pretrain.py configs/quickstart.yaml
	$(BIN)/python sample.py runs/quickstart --prompt "def get_" "class Test" "import os" --max-new-tokens 120 --temperature 0.6 --top-k 50
	@echo
	@echo "curves:  runs/quickstart/curves.png"
	@echo "record:  runs/quickstart/metrics.jsonl"
	@echo "next:    $(BIN)/python sample.py runs/quickstart --prompt 'def main():'   (sample what you like)"
	@echo "         $(BIN)/python pretrain.py configs/quickstart.yaml --train.steps 1000 --run-dir runs/longer"
	@echo "         $(BIN)/python -m pipeline.export runs/quickstart exported/quickstart   (a folder that transformers loads)"
	@echo "         $(BIN)/python data_prep.py YOUR_TEXT --output data/mine --tokenizer train:8192   (your own corpus)"

test: $(INSTALLED_DEV)
	$(BIN)/python -m pytest -n 2 --dist loadscope

lint: $(INSTALLED_DEV)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(INSTALLED_DEV)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(INSTALLED_DEV)
	$(BIN)/python -m benchmarks.train_step
	$(BIN)/python -m benchmarks.generate
	$(BIN)/python -m benchmarks.load
	$(BIN)/python -m benchmarks.checkpoint

schema: $(INSTALLED)
	$(BIN)/python -m pipeline.config > configs/schema.json

install: $(INSTALLED_DEV)

$(INSTALLED): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet -c constraints.txt -e .
	touch $@

$(INSTALLED_DEV): $(INSTALLED)
	$(BIN)/python -m pip install --quiet -c constraints.txt -e ".[dev]"
	touch $@
