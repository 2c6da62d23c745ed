PYTHON ?= python3
TORCH ?= torch==2.13.0
PARAMETERS ?=
OUT_DIR ?= runs/ablation
NB ?=
CHOICES ?=

BIN := .venv/bin
PY := $(BIN)/python

# Nothing from outside the virtual environment may choose the packages, the kernel or how figures are drawn:
# a kernel on JUPYTER_PATH wins over the environment's own, and MPLBACKEND replaces the inline figures.
unexport PYTHONPATH PYTHONHOME JUPYTER_PATH MPLBACKEND
export JUPYTER_PREFER_ENV_PATH := 1
# The profiler's own log would be stored with the figures.
export KINETO_LOG_LEVEL := 99
# A thread that waits for others sleeps. By default it spins, and beside a busy process all wait for each other.
export OMP_WAIT_POLICY ?= passive

.PHONY: ablation test test-long notebooks book keep ship clean help

ablation: .venv/.installed ## run chapter 05 and show its table; PARAMETERS="-p seeds 0,1,2"
	rm -f $(OUT_DIR)/table.txt
	$(PY) -m papermill nbs/05_ablation.ipynb out.ipynb $(PARAMETERS) -p out_dir $(OUT_DIR)
	@cat $(OUT_DIR)/table.txt

# Side by side, a process for each core.
test: .venv/.installed ## run every chapter at its smallest size, and every test
	TQDM_DISABLE=1 $(PY) -m pytest -n logical --maxprocesses 8 --dist worksteal

# The same faults and properties as in `make test`, but hundreds of kills, damaged files and wrong inputs, and thousands of examples.
# It prints how many of each.
test-long: .venv/.installed ## the tests of faults and properties, with many more cases
	HCLM_TESTS=long TQDM_DISABLE=1 $(PY) -m pytest -n logical --maxprocesses 8 --dist worksteal tests/faults tests/test_properties.py

notebooks: .venv/.installed ## execute all chapters in place and rebuild the README, or some: NB="nbs/04b_run2.ipynb"
	$(BIN)/nbdev-export
	TQDM_DISABLE=1 $(PY) tools/book.py execute $(NB)
	$(BIN)/nbdev-clean
	$(PY) tools/book.py readme

book: .venv/.installed ## make pages to read and search in a browser, from the stored outputs: _book/index.html
	$(PY) tools/pages.py

keep: .venv/.installed ## copy the record of a run to results/: RUN=runs/NAME
	$(if $(RUN),,$(error say which run: make keep RUN=runs/NAME))
	$(PY) -c "from hclm_repro.experiment import keep; print(keep('$(RUN)'))"

ship: .venv/.installed ## put the model of a run into the package, at half its size: RUN=runs/NAME CHOICES="copy_growth=0.5"
	$(if $(RUN),,$(error say which run: make ship RUN=runs/NAME))
	$(PY) -c "from hclm_repro.sharing import ship; print(ship('$(RUN)', $(CHOICES)))"

clean: ## remove the virtual environment and everything else that was made
	rm -rf .venv build dist _proc _book out.ipynb .pytest_cache .hypothesis *.egg-info
	find nbs hclm_repro tests tools -name __pycache__ -prune -exec rm -rf {} +

help: ## show this list
	@sed -n 's/^\([a-z-]*\):.* ## /\1\t/p' Makefile | expand -t 12

# torch first and by itself, so that its version and its index can be chosen:
# make TORCH="torch --index-url https://..."
.venv/.installed: settings.ini setup.py pyproject.toml
	$(PYTHON) -m venv .venv
	$(PY) -m pip install --quiet $(TORCH)
	$(PY) -m pip install --quiet --editable '.[dev]'
	touch $@
