.DEFAULT_GOAL := help
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# uv does not read pip's settings: hand pip's own find-links on, so that a local build of torch is used where there is one.
FIND_LINKS = $(shell $(BIN)/python -m pip config get global.find-links 2>/dev/null || echo "$$PIP_FIND_LINKS")

# Runs and tests start many processes: each imports torch and friends, which takes twice as long without their bytecode.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: help setup train sweep ablation tensorboard test test-slow check format docs clean constraints prereleases audit chaos docs-site

help:  ## Show this list
	@awk -F':.*## ' '/^[a-z-]+:.*## / {printf "  make %-12s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: $(VENV)/.installed  ## Make the environment in .venv

$(VENV)/.installed: pyproject.toml constraints.txt
	@echo "Making the environment in $(VENV) (downloads PyTorch and friends the first time)"
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet uv
	UV_FIND_LINKS="$(FIND_LINKS)" $(BIN)/uv pip install --quiet --python $(BIN)/python -c constraints.txt -e '.[dev]'
	@touch $@

train: setup  ## Prepare the embedded corpus and train the default model (a few minutes on 2 CPU cores)
	$(BIN)/python train.py

sweep: setup  ## Compare two norms over three seeds, and write a report (6 short runs, a few minutes on 2 CPU cores)
	$(BIN)/python train.py experiment=ablation_norm hydra.launcher.n_jobs=auto

ablation: sweep  ## The same, and open its report in the browser
	$(BIN)/python -m webbrowser "file://$$(ls -td $(CURDIR)/logs/sweeps/ablation_norm/*/ | head -1)report.html"

tensorboard: setup  ## Show all runs and sweeps of logs/ in the browser, until Ctrl-C
	$(BIN)/tensorboard --logdir logs

test: setup  ## Run the tests (no network, no GPU)
	$(BIN)/python -m pytest -n auto --maxprocesses 8

test-slow: setup  ## Run the tests that take minutes, too
	$(BIN)/python -m pytest -n auto --maxprocesses 8 -m 'not gpu'

chaos: setup  ## Inject faults into real runs, and renew the table of docs/reliability.md (about an hour)
	$(BIN)/python benchmarks/chaos.py

check: setup  ## Formatting, lint, types, imports between the rings
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-cache

format: setup  ## Format the code and mend what ruff can
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

# What the targets above leave besides results: caches of the tests and checks, and bytecode of the code that is ours.
CACHES = find .pytest_cache .mypy_cache .ruff_cache .hypothesis __pycache__ src tests benchmarks \
	\( -path '.*_cache' -o -path .hypothesis -o -name __pycache__ \) -prune

clean:  ## Delete the caches of tests, checks and Python; lists them first (never logs, data or .venv)
	@$(CACHES) 2>/dev/null | sed 's/^/deletes /' | grep . || echo "nothing to delete"
	@$(CACHES) -exec rm -rf {} + 2>/dev/null || true

constraints: setup  ## Pin what is installed in constraints.txt, with hashes (torch without: its builds differ)
	$(BIN)/uv pip freeze --exclude-editable --python $(BIN)/python > $(VENV)/frozen.txt
	grep -v '^torch==' $(VENV)/frozen.txt | $(BIN)/uv pip compile - --quiet --universal --no-deps --generate-hashes \
		--no-header --no-annotate > constraints.txt
	grep '^torch==' $(VENV)/frozen.txt | sed 's/+.*//' >> constraints.txt

NEWEST = hydra-core omegaconf lightning pytorch-lightning
prereleases: setup  ## Put the newest versions of Hydra and Lightning into .venv, pre-releases too (back: rm -r .venv)
	$(BIN)/uv pip install --python $(BIN)/python --prerelease allow $(foreach name,$(NEWEST),-P $(name) $(name))

audit: setup  ## Look for known holes in what is installed (asks pypi.org), and in the workflows
	$(BIN)/uv pip freeze --exclude-editable --python $(BIN)/python | sed 's/+.*//' > $(VENV)/frozen.txt
	$(BIN)/uv tool run zizmor@1.32.0 --offline .github
	$(BIN)/uv tool run pip-audit@2.10.1 --disable-pip --no-deps -r $(VENV)/frozen.txt

docs: setup  ## Renew docs/options.md from conf/
	$(BIN)/python -m thunderhead.docs

# Pages, and the files that they link.
PAGES = '*.md' docs LICENSE CITATION.cff tests/outside 'tests/*.py' 'benchmarks/*.py' 'benchmarks/*.png' 'benchmarks/*.csv' examples \
	src/thunderhead/env_file.py
RINGS = core options parallel training corpus lab release
docs-site: setup  ## Build the docs as a site in site/html, with search; a dead link fails (installs mkdocs-material)
	rm -rf site && mkdir -p site/pages
	git ls-files -z -- $(PAGES) | xargs -0 tar -cf - | tar -xf - -C site/pages
	grep -v badge.svg README.md > site/pages/README.md
	mkdir site/pages/docs/api
	for ring in $(RINGS); do \
		printf '# %s\n\n::: thunderhead.%s\n' "$$ring" "$$ring" > site/pages/docs/api/$$ring.md; \
	done
	NO_MKDOCS_2_WARNING=1 $(BIN)/uv tool run --from mkdocs==1.6.1 --with mkdocs-material==9.8.2 \
		--with 'mkdocstrings[python]==1.0.8' mkdocs build --strict
	@echo "site/html/index.html"
