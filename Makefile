# `make demo` and `make test` are all that is needed; both set up .venv first. `make help` lists the rest.
PYTHON ?= python3
PY := .venv/bin/python
MIN_PYTHON := $(shell sed -n 's/^min_python *= *//p' settings.ini)
NEXT_SDK := runpod==2.0.0rc2 cloudpickle pathspec  # RunPod's SDK to come, with what it needs besides
QUEUE_TESTS := $(patsubst %,tests/test_%.py,queue start failures load chaos)
export PYTHONUTF8 := 1
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.PHONY: help venv demo test test-slow test-all lint lock lock-test hub aot soak in-step image-test embedded notebooks hooks docs system-deps clean

help:  ## this list
	@grep -E '^[a-z-]+:.*##' Makefile | sed -E 's/:.*## /\t/' | expand -t 14

venv: .venv/ready  ## set up .venv and nothing else

.venv/ready: settings.ini setup.py pyproject.toml
	@$(PYTHON) -c 'import sys; need = tuple(map(int, "$(MIN_PYTHON)".split("."))); sys.exit(0 if sys.version_info >= need else "sdworker needs Python $(MIN_PYTHON) or newer; $(PYTHON) is " + sys.version.split()[0] + ". Name another: make PYTHON=python3.12 ...")'
	@echo "setting up .venv: a gigabyte or more to fetch, some minutes"
	$(PYTHON) -m venv .venv
	$(PY) -m pip install --quiet --editable '.[notebooks,docs,dev]'
	@touch .venv/ready

demo: venv  ## start the worker, send it six requests, leave pictures in out/demo
	$(PY) -m sdworker.lab.demo out/demo

test: venv lint  ## the notebooks and tests that a change needs (about a quarter of an hour on two cores)
	OMP_NUM_THREADS=1 $(PY) -m pytest -n 2 -m 'not slow and not image'

test-slow: venv aot  ## the others: compilers, families in detail, quality gates, the site
	OMP_NUM_THREADS=1 $(PY) -m pytest -n 2 -m 'slow and not image'
	$(PY) -m pip install --quiet --upgrade --target out/next-sdk --no-deps $(NEXT_SDK)
	PYTHONPATH=out/next-sdk $(PY) -c 'import runpod; assert runpod.__version__.startswith("2."), runpod.__file__'
	PYTHONPATH=out/next-sdk OMP_NUM_THREADS=1 $(PY) -m pytest -n 2 $(QUEUE_TESTS)

test-all: test test-slow  ## every notebook and every test but the image's

aot: venv  ## compile the embedded model for the slow tests, twice (four minutes, once; needs g++)
	@why=$$($(PY) -c "from sdworker.aot.export import missing_toolchain; print(missing_toolchain())") && if [ -z "$$why" ]; then \
		for bits in off int8; do SDWORKER_MODEL=embedded SDWORKER_DEVICE=cpu SDWORKER_AOT_DIR=out/aot \
			SDWORKER_QUANTIZE=$$bits $(PY) -m sdworker.cli.main bake --aot || exit 1; done; \
	else echo "what needs an AOT package is skipped: $$why"; fi

lint: venv  ## ruff over notebooks, tests and scripts
	$(PY) -m ruff check .

lock: venv  ## lock what the image installs, after a change of settings.ini (needs uv)
	$(PY) docs/lock.py

lock-test: venv  ## install exactly that lock, some 5 GB, and see that the worker draws with it (a quarter of an hour)
	$(PY) docs/lock_test.py

hub: venv  ## renew hub.json and .runpod/tests.json, after a change of the settings
	$(PY) -m sdworker.operate.hub

soak: venv  ## two workers, mixed jobs and faults for half an hour; renews results/soak.json
	$(PY) -m sdworker.lab.soak

embedded: venv  ## retrain the embedded model from nothing (about 75 minutes on two cores)
	$(PY) -m sdworker.embedded.training
	$(PY) -m sdworker.lab.quality results/adherence.json --sheet nbs/images/drawn.png

notebooks: venv  ## run every notebook, keep its outputs, clean it, export the package, renew README.md
	$(PY) docs/notebooks.py

hooks: venv  ## git merges notebooks cell by cell and refuses unclean ones; Jupyter (~/.jupyter) saves them clean
	.venv/bin/nbdev-install-hooks
	printf '#!/bin/sh\nexec make --no-print-directory in-step\n' > "$$(git rev-parse --git-path hooks)/pre-commit"
	chmod +x "$$(git rev-parse --git-path hooks)/pre-commit"

in-step: venv  ## are the notebooks clean, and the package what they export?
	$(PY) -m pytest -q tests/test_in_step.py -k "clean or export"

docs: venv  ## build the site into _docs
	$(PY) docs/build.py

image-test: venv  ## build the image with buildah and draw in it, as root (a quarter of an hour, later half of it)
	$(PY) -m pytest -m image -rs --timeout=3000 --durations=5 tests/test_image.py

system-deps:  ## Debian packages, as root
	apt-get update -qq
	apt-get install -y -qq --no-install-recommends git g++ python3 python3-venv buildah debootstrap iproute2

clean:  ## remove everything that is made
	rm -rf .venv _docs _proc out build dist *.egg-info
