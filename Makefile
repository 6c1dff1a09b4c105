# Every target sets itself up from a plain python3: `make demo`, `make test`.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
DEMO_READY := $(VENV)/.ready-demo
DOCS_READY := $(VENV)/.ready-docs
WORKERS ?= 2

# The reference implementations that parity tests run live; wheels of this version are CPU builds on 3.11 alone.
PARITY := $(shell $(PYTHON) -c 'import sys; print(",parity" if sys.version_info[:2] == (3, 11) else "")')

# What tests and lint need.
EXTRAS ?= test,lint,notebooks,serve$(PARITY)

# Test files whose verdict rounding cannot move: they hold names, messages, files, shapes and pages against each other.
# `make rounding` runs all others under another rounding too, a new file among them: they hold statistics, or compare
# long computations.
EXACT := 64_bits annotations architecture assets checkpoint checkpoint_contract cli comparison_plots comparison_stored \
	compilation copying data demo display docs docstrings documents experiment files guide_refusals hyper journey kept \
	kernels_lowering kernels_tpu keys labels loading loading_refusals notebooks packaging parity peft plots \
	plots_uncertainty prior_refusals progress references reprs scale sites tables tangent_kinds tangent_refusals \
	tangent_stored text
TESTS := $(sort $(wildcard tests/*/test_*.py))
files = $(foreach name,$(1),$(filter %/test_$(name).py,$(TESTS)))

# What other packages change from version to version: ArviZ's trees and summaries of a fit (diagnostics), IPython and rich
# (display), JAX's choice of a kernel and its lowering (kernels_api, kernels_lowering), BlackJAX (mcmc), the builder of the
# wheel (packaging), matplotlib (plots).
VERSIONED := diagnostics display kernels_api kernels_lowering mcmc packaging plots

.PHONY: demo test whole fast seconds rounding versions elsewhere smoke slow thorough lint audit tpu device docs notebooks benchmarks oldest newest clean

# The demonstration needs the library and nothing that tests need; where those have been set up, that will do.
demo: $(if $(wildcard $(READY)),$(READY),$(DEMO_READY))
	$(BIN)/bnlora demo

# Workers are as many as cores: LAPACK's own threads would only wait for each other (a quarter of the time of some files).
test whole fast seconds rounding versions elsewhere slow thorough oldest newest: export OPENBLAS_NUM_THREADS ?= 1

# A file stays with one worker, for its tests share programs and fits. `tests/conftest.py` starts the slowest first.
PYTEST := -m pytest -n $(WORKERS) --dist loadscope --no-loadscope-reorder --durations=25

# All fast tests, and the slow ones of a third of the files: which third, the commit decides (tests/builders/turns.py).
test: export BNLORA_PART ?= commit
test: $(READY)
	$(BIN)/python $(PYTEST)

# All of them.
whole: $(READY)
	$(BIN)/python $(PYTEST)

# The same, and writes the seconds of each file into tests/seconds.json: workers end together only while it is about right.
seconds: $(READY)
	BNLORA_SECONDS=1 $(BIN)/python $(PYTEST)

fast: $(READY)
	$(BIN)/python $(PYTEST) -m "not slow"

# Under another rounding: no fused multiply-add, shorter vectors, one thread for each product. A verdict that moves rests
# on luck. Processors other than x86 do not know the first flag.
ROUNDING := $(if $(filter x86_64,$(shell uname -m)),--xla_cpu_max_isa=SSE4_2) --xla_cpu_multi_thread_eigen=false

rounding: $(READY)
	XLA_FLAGS="$(ROUNDING)" $(BIN)/python $(PYTEST) -m "not slow" $(filter-out $(call files,$(EXACT)),$(TESTS))

# What may differ from one version of Python, JAX or ArviZ to the next.
versions: $(READY)
	$(BIN)/python $(PYTEST) -m "not slow" $(call files,$(VERSIONED))

# Both at once, on what varies with versions and on the statistics that every result rests on: joint densities and their
# Jacobians (density), the bound against the evidence (elbo), and the Cholesky factors of the prior (gp).
# `make rounding`, which `make slow` runs, has all files; where this fails, `make rounding` and `make versions` say which of
# the two it was.
STATISTICS := density elbo gp
# Chains, pages of diagnostics, pictures, wheels and the lowering of kernels take longest: with another Python they run in
# `make newest` (BNLORA_MATRIX=1 of .ci/run).
ELSEWHERE := $(filter-out diagnostics kernels_lowering mcmc packaging plots,$(VERSIONED))
elsewhere: $(READY)
	XLA_FLAGS="$(ROUNDING)" $(BIN)/python $(PYTEST) -m "not slow" $(sort $(call files,$(STATISTICS) $(ELSEWHERE)))

# The main path alone, which `.ci/run` takes on a second Python.
smoke: $(DEMO_READY)
	$(BIN)/python tests/smoke.py

# What need not run for every change: all that `make test` takes in turns or on a sample, every fast test under another
# rounding, and every notebook in full. Budget: three hours on two cores. tests/slow.md has date, seconds and verdict.
slow: $(READY)
	$(BIN)/python tests/slow.py whole thorough rounding notebooks

# All members and pairs of which `make test` takes a sample.
thorough: $(READY)
	$(BIN)/python -m pip install --quiet --editable ".[ray,fuzz]"
	BNLORA_EVERY=1 $(BIN)/python $(PYTEST) -m thorough
	BNLORA_EVERY=1 $(BIN)/python $(PYTEST) $(call files,checkpoint_contract kernels)

# The TPU's own compiler, which needs no TPU: 640 MB of a package that nothing else here uses.
tpu: $(READY)
	$(BIN)/python -m pip install --quiet --editable ".[tpu]"
	$(BIN)/python -m pytest -n $(WORKERS) $(call files,kernels_tpu)

# What a new device should show once, in under eight minutes: kernels against the reference, and speed. One log.
device: $(READY)
	mkdir -p build
	$(BIN)/python -m benchmarks device 2>&1 | tee build/device.log

# Every notebook in full, through a Jupyter kernel, into build/notebooks.
notebooks: $(READY)
	$(BIN)/python notebooks/run.py execute

# The tables of the documents out of benchmarks/results. Those that come from stored predictions and chains are computed
# anew; the others are measured by their own command: `python -m benchmarks NAME --store`.
benchmarks: $(READY)
	$(BIN)/python -m benchmarks seeds report --store
	$(BIN)/python -m benchmarks references --store
	$(BIN)/python -m benchmarks tables

# The lowest versions that pyproject.toml admits, of what it names itself. Old releases of one package warn of
# newer ones of another, so warnings of what is deprecated are no errors here.
oldest:
	$(PYTHON) -m venv --clear .venv-oldest
	.venv-oldest/bin/python -m pip install --quiet --upgrade pip uv
	.venv-oldest/bin/uv pip install --quiet --python .venv-oldest --resolution lowest-direct --editable ".[test,notebooks]"
	.venv-oldest/bin/python $(PYTEST) -m "not slow" -W ignore::DeprecationWarning

newest:
	$(PYTHON) -m venv --clear .venv-newest
	.venv-newest/bin/python -m pip install --quiet --upgrade pip
	.venv-newest/bin/python -m pip install --quiet --upgrade --upgrade-strategy eager --editable ".[test,notebooks]"
	.venv-newest/bin/python $(PYTEST) -m "not slow"

# What an installation consists of (build/sbom.json, CycloneDX), and which of it has known vulnerabilities. The tools have an
# environment of their own. PyPI's service knows the vulnerabilities; of other indexes pip-audit says that it cannot tell.
audit:
	mkdir -p build
	$(PYTHON) -m venv --clear .venv-installed
	.venv-installed/bin/python -m pip install --quiet .
	$(PYTHON) -m venv --clear .venv-audit
	.venv-audit/bin/python -m pip install --quiet cyclonedx-bom pip-audit
	.venv-audit/bin/cyclonedx-py environment --pyproject pyproject.toml --output-format JSON -o build/sbom.json .venv-installed
	.venv-audit/bin/pip-audit --path $$(.venv-installed/bin/python -c "import sysconfig; print(sysconfig.get_path('purelib'))")

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# The documentation site in build/site, its pictures drawn anew where the library changed, checked link by link and, where
# there is a Chromium, page by page in it.
docs: $(DOCS_READY) build/gallery/pictures.json
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet
	$(BIN)/python docs/check_site.py build/site

build/gallery/pictures.json: docs/gallery.py $(shell find -L bnlora -name "*.py") | $(DOCS_READY)
	$(BIN)/python docs/gallery.py build/gallery

$(DOCS_READY): pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --editable ".[docs]"
	touch $@

$(DEMO_READY): pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --editable .
	touch $@

$(READY): pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --editable ".[$(EXTRAS)]"
	touch $@

clean:
	rm -rf $(VENV) .venv-oldest .venv-newest .venv-installed .venv-audit build dist *.egg-info .pytest_cache .ruff_cache .mypy_cache
