# The words everybody uses, here and in CI. `make serve` and `make test` need Python 3.10+ and nothing else.
PYTHON ?= python3
VENV ?= .venv
PORT ?= 6010
BIN := $(VENV)/bin
DEMO := run/demo
PARTS := 0 1

.PHONY: help serve test test-slurm test-fresh lint types bench gpu-check package demo clean
help:
	@echo "make serve       reshard the embedded demo checkpoint and serve it on port $(PORT)"
	@echo "make test        the whole test suite"
	@echo "make test-slurm  on a throw-away SLURM of fake nodes (root, Debian)"
	@echo "make test-fresh  the README's commands in a fresh clone with a fresh environment"
	@echo "make lint types  ruff and mypy"
	@echo "make bench       speed beside Hugging Face on the same weights, beside cp, beside plain reads"
	@echo "make gpu-check   on a GPU: parity with Hugging Face, then a table of speeds; needs no install"
	@echo "make package     a wheel in dist/"
	@echo "make demo        train the demo checkpoint again"

$(BIN)/.serve: setup.cfg pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -q --disable-pip-version-check -c constraints.txt -e .
	@touch $@

$(BIN)/.test: $(BIN)/.serve
	$(BIN)/pip install -q --disable-pip-version-check -c constraints.txt -e '.[test]'
	@touch $@

$(DEMO)/.done: $(BIN)/.serve metaseq_api/demo/checkpoint_last-model_part-0-shard0.pt
	for j in $(PARTS); do \
	  $(BIN)/python -m metaseq_api.scripts.reshard_fsdp \
	    --input "metaseq_api/demo/checkpoint_last-model_part-$$j-shard*.pt" \
	    --output "$(DEMO)/reshard-model_part-$$j.pt" \
	    --num-output-shards 1 --skip-optimizer-state True --unflatten-weights True || exit 1; \
	done
	cp metaseq_api/demo/vocab.json metaseq_api/demo/merges.txt $(DEMO)/
	@touch $@

serve: $(DEMO)/.done
	exec $(BIN)/metaseq-api-local $(DEMO) --port $(PORT)

test: $(BIN)/.test
	$(BIN)/pytest -m "not slurm and not fresh"

test-slurm: $(BIN)/.test
	$(BIN)/pytest -m slurm

test-fresh: $(BIN)/.test
	$(BIN)/pytest -m fresh

lint: $(BIN)/.test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(BIN)/.test
	$(BIN)/mypy

bench: $(BIN)/.test
	$(BIN)/metaseq-api-bench engine --shape opt-125m --dtype fp32 --against hf
	$(BIN)/metaseq-api-bench engine --shape opt-125m --dtype bf16 --against hf
	$(BIN)/metaseq-api-bench reshard --shape opt-1.3b --shards 8 --folder run/bench
	$(BIN)/metaseq-api-bench load --shape opt-1.3b --folder run/bench-load

gpu-check:
	PYTHONPATH=. $(PYTHON) -m metaseq_api.bench.gpu_check

package: $(BIN)/.test
	rm -rf build dist
	$(BIN)/python -m build --wheel

demo: $(BIN)/.test
	$(BIN)/python -m metaseq_api.scripts.make_demo_checkpoint --output metaseq_api/demo

clean:
	rm -rf $(VENV) run build dist *.egg-info
