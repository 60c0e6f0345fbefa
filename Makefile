# The words everybody uses, here and in CI. `make serve` and `make test` need Python 3.10+ and nothing else.
PYTHON ?= python3
VENV ?= .venv
PORT ?= 6010
BIN := $(VENV)/bin
DEMO := run/demo
BENCH = $(BIN)/metaseq-api-bench
RUNS := run/bench
WORKERS := 2
HARNESS ?= ../shared/peers
WORK ?= run/peers
PUBLISHED ?= run/peers-fp16
PARTS := 0 1

.PHONY: help serve test browser haproxy test-slurm test-fresh test-clients lint types bench bench-rivals gpu-check package demo page-png clean
help:
	@echo "make serve       reshard the embedded demo checkpoint and serve it on port $(PORT)"
	@echo "make test        the whole test suite"
	@echo "make browser     Debian's Chromium, for the page's tests (root); without one they are skipped"
	@echo "make haproxy     Debian's HAProxy, for the tests of what stands before replicas (root); without it they are skipped"
	@echo "make test-slurm  on a throw-away SLURM of fake nodes (root, Debian)"
	@echo "make test-fresh  the README's commands in a fresh clone with a fresh environment"
	@echo "make test-clients  with clients that are large to install (EleutherAI's lm-eval) or old (openai 0.28)"
	@echo "make lint types  ruff and mypy"
	@echo "make bench       every figure of docs/performance.md, beside Hugging Face, cp and plain reads, into that page"
	@echo "make bench-rivals  the same work by OpenVINO, vLLM, CTranslate2 and Hugging Face, by the harness in HARNESS;"
	@echo "                 models lie in WORK, and once more in PUBLISHED, saved in fp16"
	@echo "make gpu-check   on a GPU: parity with Hugging Face, then a table of speeds; needs no install"
	@echo "make package     a wheel in dist/"
	@echo "make demo        train the demo checkpoint again"
	@echo "make page-png    docs/page.png, the page as it looks now"

$(BIN)/.serve: setup.cfg pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -q --disable-pip-version-check -c constraints.txt -e .
	@touch $@

$(BIN)/.test: $(BIN)/.serve
	$(BIN)/pip install -q --disable-pip-version-check -c constraints.txt -e '.[test]'
	@touch $@

$(BIN)/.clients: $(BIN)/.test
	$(BIN)/pip install -q --disable-pip-version-check -c constraints.txt -e '.[test,clients]'
	$(PYTHON) -m venv $(VENV)/openai-0.28  # cannot stand beside today's; without it its test is skipped and says why
	$(VENV)/openai-0.28/bin/pip install -q --disable-pip-version-check 'openai==0.28.1' || rm -r $(VENV)/openai-0.28
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
	$(BIN)/pytest -m "not slurm and not fresh and not clients" -n $(WORKERS) --dist loadfile --no-loadscope-reorder

browser:
	tests/support/browser.sh

haproxy:
	bash tests/support/slurm_cluster.sh install-haproxy

test-slurm: $(BIN)/.test
	$(BIN)/pytest -m slurm -n $(WORKERS) --dist loadfile --no-loadscope-reorder

test-fresh: $(BIN)/.test
	$(BIN)/pytest -m fresh

test-clients: $(BIN)/.clients
	$(BIN)/pytest -m clients

lint: $(BIN)/.test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(BIN)/.test
	$(BIN)/mypy

bench: $(BIN)/.test  # a quarter of an hour or two on two cores, with 24 GB of memory and 33 GB of disk for run/
	$(BENCH) latency --shape opt-125m --dtype fp32 --against hf --json $(RUNS)/latency-125m-fp32.json
	$(BENCH) latency --shape opt-125m --dtype bf16 --against hf --json $(RUNS)/latency-125m-bf16.json
	$(BENCH) latency --shape opt-1.3b --dtype bf16 --against hf --new-tokens 64 --json $(RUNS)/latency-1.3b-bf16.json
	$(BENCH) throughput --shape opt-125m --dtype fp32 --against hf --json $(RUNS)/throughput-125m-fp32.json
	$(BENCH) throughput --shape opt-125m --dtype bf16 --against hf --json $(RUNS)/throughput-125m-bf16.json
	$(BENCH) throughput --shape opt-125m --dtype bf16 --against hf --temperature 1 --top-p 0.9 --json $(RUNS)/sampled-125m-bf16.json
	$(BENCH) latency --shape opt-125m --dtype fp32 --ranks 2 --json $(RUNS)/ranks-125m-fp32.json
	$(BENCH) latency --shape opt-125m --dtype bf16 --ranks 2 --json $(RUNS)/ranks-125m-bf16.json
	$(BENCH) throughput --shape opt-125m --dtype bf16 --ranks 2 --json $(RUNS)/ranks-many-125m-bf16.json
	$(BENCH) serve --shape opt-125m --dtype bf16 --concurrency 1 4 16 --plot docs/performance.svg --json $(RUNS)/serve-125m-bf16.json
	$(BENCH) serve --shape opt-125m --dtype bf16 --rate 0.5 1 2 --json $(RUNS)/rate-125m-bf16.json
	$(BENCH) startup --json $(RUNS)/startup-demo.json
	$(BENCH) startup --shape opt-1.3b --dtype bf16 --json $(RUNS)/startup-1.3b-bf16.json
	$(BENCH) http --json $(RUNS)/http-demo.json
	$(BENCH) http --threads 1 --json $(RUNS)/http-demo-one-thread.json
	$(BENCH) reshard --shape opt-1.3b --shards 8 --folder run/bench-reshard --json $(RUNS)/reshard-1.3b.json
	$(BENCH) load --shape opt-1.3b --folder run/bench-load --json $(RUNS)/load-1.3b.json
	$(BENCH) page $(RUNS) docs/performance.md

RIVALS = $(BENCH) rivals --harness $(HARNESS) --work $(WORK)
bench-rivals: $(BIN)/.test  # forty minutes on two cores; the harness's own set-up comes first, and takes 12 GB
# OPT-1.3B's rivals in fp32 one by one: together they do not fit into 24 GB
	$(RIVALS) --shape opt-125m --dtype bf16 --rivals ov vllm hf --serving vllm --json $(RUNS)/rivals-125m-bf16.json
	$(RIVALS) --shape opt-125m --dtype fp32 --rivals ov vllm ct2 hf --serving vllm --rounds 2 --json $(RUNS)/rivals-125m-fp32.json
	$(BENCH) rivals --harness $(HARNESS) --work $(PUBLISHED) --shape opt-125m --dtype fp32 --rivals ov vllm ct2 hf --serving vllm --rounds 2 --json $(RUNS)/rivals-published-125m-fp32.json
	$(RIVALS) --shape opt-1.3b --dtype bf16 --rivals ov vllm --rounds 2 --json $(RUNS)/rivals-1.3b-bf16.json
	$(RIVALS) --shape opt-1.3b --dtype fp32 --rivals ov --rounds 2 --json $(RUNS)/rivals-1.3b-fp32-ov.json
	$(RIVALS) --shape opt-1.3b --dtype fp32 --rivals vllm --rounds 2 --json $(RUNS)/rivals-1.3b-fp32-vllm.json
	$(BENCH) page $(RUNS) docs/performance.md

gpu-check:
	PYTHONPATH=. $(PYTHON) -m metaseq_api.bench.gpu_check

package: $(BIN)/.test
	rm -rf build dist
	$(BIN)/python -m build --wheel

demo: $(BIN)/.test
	$(BIN)/python -m metaseq_api.scripts.make_demo_checkpoint --output metaseq_api/demo

page-png: $(BIN)/.test
	PYTHONPATH=tests $(BIN)/python tests/support/page_png.py docs/page.png

clean:
	rm -rf $(VENV) run build dist *.egg-info
