# make demo [CT=path]   segment a chest CT: a synthetic one, or yours (file, folder, DICOM series)
# make test             the test suite
# make test-slow        the tests marked slow
# make check            lint, types, and the bundles against their source

PYTHON ?= python3
VENV := .venv
PY := $(VENV)/bin/python
BUNDLE ?= lung_ct_segmentation_resnet10
OUT ?= demo/result
CT ?=
WORKERS ?= 2

.PHONY: demo test test-slow check venv clean

venv: $(VENV)/.installed

# torch first and pinned, so that no other package brings another. On Linux its own wheel may be the CUDA build, which is
# large; where that is not wanted, install the CPU build of the same version into .venv before.
$(VENV)/.installed: constraints.txt setup.cfg
	$(PYTHON) -m venv $(VENV)
	$(PY) -m pip install --quiet --disable-pip-version-check -c constraints.txt torch
	$(PY) -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch $@

demo: venv
	@if [ -z "$(CT)" ]; then mkdir -p demo && $(PY) -m tools.phantom sample demo/chest_ct.nii.gz; fi
	$(PY) -m monai.bundle run \
	    --config_file bundles/$(BUNDLE)/configs/inference.json --logging_file bundles/$(BUNDLE)/configs/logging.conf \
	    --bundle_root bundles/$(BUNDLE) --dataset_dir "$(or $(CT),demo/chest_ct.nii.gz)" --output_dir "$(OUT)"
	@echo; echo "Mask, picture and volumes are in $(OUT):"; ls -1 "$(OUT)"

# Two files at a time, one thread each: these tests are many small things that two threads cannot share.
PYTEST := OMP_NUM_THREADS=1 $(PY) -m pytest -n $(WORKERS) --dist loadfile

test: venv
	$(PYTEST) -m "not slow"

test-slow: venv
	$(PYTEST) -m slow

check: venv
	$(PY) -m ruff format --check med3d_nets tools tests
	$(PY) -m ruff check med3d_nets tools tests
	$(PY) -m mypy
	$(PY) -m tools.bundles make --check
	$(PY) -m tools.bundles check bundles/*

clean:
	rm -rf $(VENV) demo build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache
