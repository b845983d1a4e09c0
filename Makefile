# Every target sets up what it needs, on a machine with Python 3.11, pip, make and gcc.
# In an environment of your own: make INSTALLED= BIN=/path/to/bin TARGET

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DELETE_ON_ERROR:
.DEFAULT_GOAL := help

PYTHON ?= $(shell command -v python3.11 || command -v python3)
BIN ?= .venv/bin
INSTALLED ?= .venv/installed

.PHONY: help
help: ## list the targets
	@sed -n 's/^\([a-z-]*\):.*## /\1\t/p' $(MAKEFILE_LIST) | expand -t 14

# `venv` alone needs Debian's python3-venv; `pip --python` installs into an environment from outside of it.
$(INSTALLED): pyproject.toml
	@echo "Installing into .venv (a minute or two the first time)"
	test -x .venv/bin/python || $(PYTHON) -m venv --without-pip .venv
	$(PYTHON) -m pip --python .venv/bin/python install --quiet pip
	PYTHONWARNINGS='ignore:Editable installation' .venv/bin/python -m pip install --quiet --editable '.[dev]'
	touch $@

.PHONY: demo
demo: $(INSTALLED) ## split SmolLM2 over 4, then 8 PEs, and let it answer a question
	scripts/demo.sh $(BIN)

.PHONY: demo-cluster
demo-cluster: $(INSTALLED) ## two stages over three hosts on this machine (network namespaces for root, else Ray nodes), which are lost one after the other
	$(BIN)/python -m tests.support.runtime.ray_scenario 2>/dev/null | tail -n 1 | $(BIN)/python -m json.tool

# Tests start many interpreters: without compiled files each of them would compile this project again.
PYTEST := PYTHONDONTWRITEBYTECODE= $(BIN)/pytest --numprocesses auto --dist worksteal

.PHONY: test
test: $(INSTALLED) ## the fast tests: every mechanism on a few models, in two minutes
	$(PYTEST) -m "not real_model and not slow and not browser and not release"

.PHONY: test-all
test-all: $(INSTALLED) ## the tests: every model of the zoo, the real one, long campaigns, and the page in chromium
	$(PYTEST) -m "not release"

.PHONY: test-release
test-release: $(INSTALLED) ## what a release tests beyond: more rows of slow families
	$(PYTEST) -m release

.PHONY: test-kernels
test-kernels: $(INSTALLED) ## the tests that depend on onnxruntime's kernels, on those for AVX2 and SSE, by qemu (FILES=)
	scripts/test-kernels.sh $(BIN) $(FILES)

.PHONY: test-wheel
test-wheel: $(INSTALLED) ## build sdist and wheel, and test the wheel outside the checkout
	scripts/test-wheel.sh $(BIN)

.PHONY: test-versions
test-versions: test-wheel ## that wheel on every Python from 3.11 to 3.14 that is here, with the newest and lowest dependencies
	scripts/test-versions.sh $(BIN)

.PHONY: wheels
wheels: test-wheel ## that wheel and all that it needs, for a machine without a network, in build/wheels
	rm -rf build/wheels
	$(BIN)/python -m pip wheel --quiet --wheel-dir build/wheels "$$(echo build/dist/*.whl)[example,serve]" pip

.PHONY: quickstart
quickstart: wheels ## docs/quickstart.md, command by command, in an empty folder
	scripts/quickstart.sh $(BIN)

INTO ?= build/pictures

.PHONY: pictures
pictures: $(INSTALLED) ## the pictures in README.md and docs/ (INTO=docs), and the page in all widths, in build/pictures
	$(BIN)/python -m benchmarks.pictures $(INTO)

.PHONY: lint
lint: $(INSTALLED) ## ruff: rules and format
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

# The tree as it is installed, in links: see [tool.mypy] in pyproject.toml.
.PHONY: typecheck
typecheck: $(INSTALLED) ## mypy, strict
	rm -rf build/typecheck
	mkdir -p build/typecheck/furiosa_llm
	ln -s ../../benchmarks ../../fixtures ../../tests build/typecheck
	ln -s ../../../builder ../../../runtime build/typecheck/furiosa_llm
	for entry in furiosa_llm/*; do ln -s "../../../$$entry" build/typecheck/furiosa_llm; done
	$(BIN)/mypy

.PHONY: bench
bench: $(INSTALLED) ## the benchmarks, each figure beside its bar
	$(BIN)/python -m benchmarks

.PHONY: simulate
simulate: $(INSTALLED) ## predictions of simulate against published measurements, beside their bars (WRITE="--write --plot docs/parity.png": fit and draw)
	$(BIN)/python -m benchmarks.simulate $(WRITE)

.PHONY: simulate-here
simulate-here: $(INSTALLED) ## this machine measured, predicted and benchmarked in turns, beside the bar: 8 minutes, nothing else running
	$(BIN)/python -m benchmarks.simulate.here $(HERE)

PLANS ?= 3000

.PHONY: fuzz
fuzz: $(INSTALLED) ## random feasible plans over the zoo, checked against the unsplit models (PLANS=3000)
	$(BIN)/python -m tests.campaigns.fuzz_plans --plans $(PLANS)

SECONDS ?= 600

.PHONY: fuzz-loader
fuzz-loader: $(INSTALLED) ## damaged models: refused by name, or built and compared with the unsplit ones (SECONDS=600)
	$(BIN)/python -m tests.campaigns.fuzz_loader --seconds $(SECONDS)

.PHONY: fuzz-exports
fuzz-exports: COUNT = 2000
fuzz-exports: $(INSTALLED) ## decoders with their interfaces and graphs rewritten at random: equal, proved, at the same price (COUNT=2000)
	$(BIN)/python -m tests.campaigns.fuzz_exports --count $(COUNT)

.PHONY: fuzz-artifact
fuzz-artifact: $(INSTALLED) ## damaged artifacts: refused by name, or the same as before (SECONDS=600)
	$(BIN)/python -m tests.campaigns.fuzz_artifact --seconds $(SECONDS)

.PHONY: fuzz-verify
fuzz-verify: $(INSTALLED) ## semantic changes of programs: which check of `verify` finds them, and that one does
	$(BIN)/python -m tests.campaigns.fuzz_verify

NODES ?= 4000

.PHONY: fuzz-growth
fuzz-growth: $(INSTALLED) ## odd graphs of two sizes: no build grows faster than the power 1.1 (NODES=4000)
	$(BIN)/python -m tests.campaigns.fuzz_growth --nodes $(NODES)

TRACES ?= 10000

.PHONY: fuzz-scheduler
fuzz-scheduler: $(INSTALLED) ## random traces of the scheduler against a simulated KV store (TRACES=10000)
	$(BIN)/python -m tests.campaigns.fuzz_scheduler --traces $(TRACES)

REQUESTS ?= 2000

.PHONY: soak
soak: $(INSTALLED) ## random requests and aborts with little memory: each answered once, nothing leaks (REQUESTS=2000)
	$(BIN)/python -m tests.campaigns.soak --requests $(REQUESTS)

.PHONY: same-tokens
same-tokens: $(INSTALLED) ## SmolLM2's tokens in every combination of sizes, chunks, caches, preemptions and processes
	$(BIN)/python -m tests.campaigns.same_tokens --all

KILLS ?= 50

.PHONY: kill-campaign
kill-campaign: $(INSTALLED) ## builds and reshards killed at random moments: whole or not there (KILLS=50)
	$(BIN)/python -m tests.campaigns.kill_campaign --kills $(KILLS)
	$(BIN)/python -m tests.campaigns.kill_campaign --kills $(KILLS) --command reshard

.PHONY: bench-artifact
bench-artifact: $(INSTALLED) ## what artifacts of 2, 8 and 16 GB cost to write and to check; takes 50 GB of disk
	$(BIN)/python -m benchmarks.artifact

.PHONY: mlperf
mlperf: $(INSTALLED) ## MLPerf runs until LoadGen calls them VALID, and what the harness costs: a quarter of an hour
	$(BIN)/python -m benchmarks.mlperf

ROUNDS ?= 5

.PHONY: bench-cluster
bench-cluster: $(INSTALLED) ## stages on servers beside stages in one process: a hop, a step, what crosses, what is copied
	$(BIN)/python -m benchmarks.cluster

.PHONY: bench-head
bench-head: $(INSTALLED) ## what a cluster's head spends on a batch, a stage and a row, and what that says of 16, 64 and 256 hosts
	$(BIN)/python -m benchmarks.head

.PHONY: bench-steady
bench-steady: $(INSTALLED) ## a decode step of SmolLM2, part by part, beside its bars (STEADY=--write: into docs/steady-state.md)
	$(BIN)/python -m benchmarks.steady $(STEADY)

.PHONY: bench-growth
bench-growth: $(INSTALLED) ## exponents of processor time in layers, sizes, PEs, threads, beside their bars (GROWTH=--write: table and plot in docs/)
	$(BIN)/python -m benchmarks.growth $(GROWTH)

.PHONY: bench-threads
bench-threads: $(INSTALLED) ## a decode step on one and two cores, spinning or not, alone and beside a busy process (THREADS=--write: into docs/threads.md)
	$(BIN)/python -m benchmarks.threads $(THREADS)

.PHONY: bench-peers
bench-peers: $(INSTALLED) ## this project beside other engines, on three models in turns; installs them first (ROUNDS=5)
	$(BIN)/python -m benchmarks.peers.install
	$(BIN)/python -m benchmarks.peers --rounds $(ROUNDS)

ONLY ?=

.PHONY: exporters
exporters: $(INSTALLED) ## what exporters' models of 49 architectures become, in docs/exporters.md: an hour or two (ONLY=genai)
	$(BIN)/python -m benchmarks.exporters.install
	$(BIN)/python -m benchmarks.exporters $(addprefix --only ,$(ONLY))

.PHONY: mutants
mutants: $(INSTALLED) ## seeded faults, one after the other in copies of the tree: which suite catches which
	$(BIN)/python -m tests.seeded_faults

ENDS ?= 200

.PHONY: process-ends
process-ends: $(INSTALLED) ## ends of processes at random moments of a generation: no abort, no hang, nothing left (ENDS=200)
	$(BIN)/python -m tests.campaigns.process_ends --ends $(ENDS)

MOMENTS ?= 100

.PHONY: harmed-files
harmed-files: $(INSTALLED) ## files of an artifact cut short, replaced and deleted while it serves: the same tokens (MOMENTS=100)
	$(BIN)/python -m tests.campaigns.harmed_files --moments $(MOMENTS)

.PHONY: hostile-programs
hostile-programs: $(INSTALLED) ## programs that never end or take all memory: each ends with an error, soon and small
	$(BIN)/python -m tests.campaigns.hostile_programs

.PHONY: clients
clients: $(INSTALLED) ## clients of the server, each in an environment of its own, against a model that says what they want
	$(BIN)/python -m tests.clients

COUNT ?= 1000

FAULTS ?= 30

.PHONY: cluster-campaign
cluster-campaign: SECONDS = 600
cluster-campaign: $(INSTALLED) ## hosts and stages lost at random under load: every request answered once, nothing left (FAULTS=30 SECONDS=600)
	$(BIN)/python -m tests.campaigns.cluster_campaign --faults $(FAULTS) --seconds $(SECONDS)

.PHONY: server-campaign
server-campaign: $(INSTALLED) ## hostile clients beside honest ones, against the real server (COUNT=1000 of each kind)
	$(BIN)/python -m tests.campaigns.server_campaign --count $(COUNT)

.PHONY: server-hostile
server-hostile: $(INSTALLED) ## single requests that take all they can, beside /health: 100 ms, no server error
	$(BIN)/python -m tests.campaigns.server_hostile

LOCUST ?= build/locust/bin/locust
STREAMS ?= 64

$(LOCUST):
	$(PYTHON) -m venv --without-pip build/locust
	$(PYTHON) -m pip --python build/locust/bin/python install --quiet 'locust>=2.47'

.PHONY: server-load
server-load: SECONDS = 180
server-load: $(INSTALLED) $(LOCUST) ## streams of SmolLM2, each compared with the offline answer (STREAMS=64 SECONDS=180)
	$(BIN)/python -m tests.campaigns.server_load --locust $(LOCUST) --streams $(STREAMS) --seconds $(SECONDS)

.PHONY: fuzz-server
fuzz-server: $(INSTALLED) ## requests from the server's OpenAPI document: no server error, no answer against it (SECONDS=600)
	$(BIN)/python -m tests.campaigns.fuzz_server --seconds $(SECONDS)

# lm-eval in an environment of its own: it brings much along that nothing else here needs.
LM_EVAL := build/lm-eval/venv

$(LM_EVAL)/installed:
	$(PYTHON) -m venv --without-pip $(LM_EVAL)
	$(PYTHON) -m pip --python $(LM_EVAL)/bin/python install --quiet pip
	$(LM_EVAL)/bin/python -m pip install --quiet 'lm_eval[api]>=0.4.13' 'onnxruntime>=1.32' 'tokenizers>=0.23' 'click>=8.5'
	touch $@

.PHONY: lm-eval
lm-eval: $(INSTALLED) $(LM_EVAL)/installed ## lm-eval's log likelihoods over HTTP beside those of the unsplit model
	paths=$$($(BIN)/python -c 'from benchmarks.artifacts import artifact as a; b = a("genai-fp32", 4); print(b.folder, b.model)'); \
	HF_HOME=build/lm-eval/cache $(LM_EVAL)/bin/python -m benchmarks.lm_eval_served $$paths --furiosa-llm $(BIN)/furiosa-llm

.PHONY: release
release: lint typecheck test-all test-release test-versions quickstart pictures mutants fuzz fuzz-loader fuzz-exports fuzz-artifact fuzz-scheduler fuzz-server soak same-tokens kill-campaign process-ends harmed-files hostile-programs clients server-campaign server-hostile server-load cluster-campaign lm-eval bench bench-steady bench-artifact bench-cluster bench-head bench-peers simulate mlperf ## the campaigns, then files, notes and pictures in dist/, and a tag, from a clean tree
	test -z "$$(git status --porcelain)" || { echo "release: commit or remove: $$(git status --short)" >&2; exit 1; }
	version=$$($(BIN)/python -c 'import furiosa_llm; print(furiosa_llm.__version__)'); \
	grep -q "^## .*$$version" CHANGELOG.md || { echo "release: CHANGELOG.md has no entry for $$version" >&2; exit 1; }; \
	rm -rf dist && cp -r build/dist dist; \
	sed -n "/^## .*$$version/,/^## /{/^## /d;p}" CHANGELOG.md >dist/NOTES.md; \
	cp -r build/pictures dist; \
	(cd dist && sha256sum *.whl *.tar.gz >SHA256SUMS && cat SHA256SUMS); \
	git tag --annotate --file dist/NOTES.md "v$$version"; \
	echo "Next: git push origin v$$version, and upload dist/*.whl and dist/*.tar.gz; the notes are in dist/NOTES.md"

.PHONY: clean
clean: ## remove what the other targets made, except .venv and the downloaded model
	rm -rf build dist *.egg-info .hypothesis .mypy_cache .pytest_cache .ruff_cache
	find benchmarks builder fixtures furiosa_llm runtime tests -name __pycache__ -prune -exec rm -rf {} +
