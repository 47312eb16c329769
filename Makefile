# Every target sets up what it needs: `make demo` and `make test` work in a fresh clone.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV := .venv
BIN := $(VENV)/bin
# Off-screen OpenGL for MuJoCo, and what OpenCV links against.
SYSTEM_PACKAGES := libosmesa6 libglfw3 libgl1 libglib2.0-0
# What drives the page in its test.
BROWSER_PACKAGES := chromium
# What has to hold with every version that pyproject.toml allows: the library, without its simulator.
CORE_TESTS := $(addprefix tests/,functional anchors gradients tuners models data \
	training/test_aegis_trainer.py)
NOT_CORE := not slow and not browser and not simulator
NEWEST_PYTHON ?= python3.12

# Two busy-waiting OpenMP runtimes on shared cores slow each other down by an order of magnitude.
export OMP_WAIT_POLICY := PASSIVE
export MUJOCO_GL ?= osmesa
export PYOPENGL_PLATFORM ?= osmesa
export TOKENIZERS_PARALLELISM := false

.DEFAULT_GOAL := help
.PHONY: help setup system lock demo test test-slow fuzz test-lowest test-newest-python test-browser browser space lint audit format bench precision pretrain demo-checkpoints record clean

help:  ## list the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | awk -F':.*## ' '{printf "  make %-19s %s\n", $$1, $$2}'

setup: system $(VENV)/.installed  ## build .venv from the lock file

system:
	@.ci/system-packages $(SYSTEM_PACKAGES)

$(VENV)/.installed: pyproject.toml requirements.lock
	@$(PYTHON) -c 'import ensurepip, sys; sys.exit(sys.version_info < (3, 11))' || { \
		echo "error: make setup needs Python 3.11 or newer with venv and pip; found $$($(PYTHON) --version)." \
			"On Debian: apt-get install python3-venv, or choose one: make setup PYTHON=python3.11" >&2; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	test -x $(BIN)/uv || $(BIN)/python -m pip install --quiet uv
	$(BIN)/uv pip sync --quiet --compile-bytecode --require-hashes --python $(BIN)/python requirements.lock
	$(BIN)/uv pip install --quiet --python $(BIN)/python --no-deps --no-build-isolation --editable .
	touch $@

lock: $(VENV)/.installed  ## resolve the dependencies anew
	$(BIN)/uv pip compile --quiet --universal --python-version 3.11 --all-extras --generate-hashes \
		--no-header --no-annotate --no-emit-index-url --output-file requirements.lock pyproject.toml
	$(BIN)/uv pip compile --quiet --universal --python-version 3.11 --resolution lowest-direct \
		--extra demo --extra serve --extra space --extra dev \
		--no-header --no-annotate --no-emit-index-url --output-file requirements-lowest.lock pyproject.toml

demo: setup  ## fine-tune the embedded model naively and with AEGIS, and compare (minutes on a CPU)
	$(BIN)/hf-aegis demo --output_dir outputs/demo

test: setup lint  ## lint, type-check and run the test suite
	$(BIN)/python -m pytest -m "not slow and not browser" -n 2 -q

test-slow: setup  ## the checks that take minutes
	$(BIN)/python -m pytest -m slow -q

fuzz: setup  ## 10,000 damaged inputs for each reader, and what became of them (minutes)
	$(BIN)/python -m pytest tests/fuzz -m slow -q -s

# Old versions of packages warn of newer ones that they use; torch 2.9 compiles with setuptools, but does not ask for it.
test-lowest: setup  ## the library's tests with the lowest versions that pyproject.toml allows (minutes, 8 GB)
	test -x $(VENV)-lowest/bin/python || $(BIN)/uv venv --quiet --python $(PYTHON) $(VENV)-lowest
	$(BIN)/uv pip sync --quiet --python $(VENV)-lowest/bin/python requirements-lowest.lock
	$(BIN)/uv pip install --quiet --python $(VENV)-lowest/bin/python setuptools
	$(BIN)/uv pip install --quiet --python $(VENV)-lowest/bin/python --no-deps --no-build-isolation --editable .
	$(VENV)-lowest/bin/python -m pytest $(CORE_TESTS) -m "$(NOT_CORE)" -n 2 -q \
		-W "ignore::pyparsing.warnings.PyparsingDeprecationWarning"

test-newest-python: setup  ## the same with the locked versions, on NEWEST_PYTHON (minutes, 8 GB)
	test -x $(VENV)-newest/bin/python || $(BIN)/uv venv --quiet --python $(NEWEST_PYTHON) $(VENV)-newest
	$(BIN)/uv pip sync --quiet --require-hashes --python $(VENV)-newest/bin/python requirements.lock
	$(BIN)/uv pip install --quiet --python $(VENV)-newest/bin/python --no-deps --no-build-isolation --editable .
	$(VENV)-newest/bin/python -m pytest $(CORE_TESTS) -m "$(NOT_CORE)" -n 2 -q

test-browser: setup browser  ## the page in a browser; leaves screenshots in outputs/browser
	BROWSER_REQUIRED=1 $(BIN)/python -m pytest -m browser -q -s

browser:
	@command -v chromium >/dev/null || .ci/system-packages $(BROWSER_PACKAGES)

space: setup  ## the page that compares answers and actions, on this machine
	$(BIN)/hf-aegis space

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

audit: setup  ## licences and known vulnerabilities of what is locked; exit code 3 of .ci/audit.py: not known
	$(BIN)/python .ci/audit.py

format: setup  ## rewrite the code in the house's style
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: setup  ## steps, experts, sampling, anchors, data loading (resumable, a page in tests/benchmarks/results)
	$(BIN)/python tests/benchmarks/training_step.py
	$(BIN)/python tests/benchmarks/gse_step.py
	$(BIN)/python tests/benchmarks/sampling.py
	$(BIN)/python tests/benchmarks/anchor_collection.py
	$(BIN)/python tests/benchmarks/data_loading.py

precision: setup  ## rounding errors against float64 (a page in tests/benchmarks/results)
	$(BIN)/python tests/benchmarks/precision.py

pretrain: setup  ## train the embedded vision-language model from scratch (resumable)
	$(BIN)/python recipes/easy_vqa_pretrain.py --config recipes/easy_vqa_pretrain.yaml

demo-checkpoints: demo  ## put the demo's policies into the package
	$(BIN)/python recipes/demo_checkpoints.py --demo outputs/demo --output_dir hf_aegis/assets/demo

record: setup  ## record the demonstrations that ship with the demo (resumable)
	$(BIN)/hf-aegis data record-libero --config recipes/libero_demo_record.yaml \
		--combined_file hf_aegis/assets/libero_demonstrations.hdf5

clean:
	rm -rf $(VENV) $(VENV)-lowest $(VENV)-newest outputs .pytest_cache .mypy_cache .ruff_cache
