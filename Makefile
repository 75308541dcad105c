# make demo [CT=path]   segment a chest CT: a synthetic one, or yours (file, folder, DICOM series)
# make test             the test suite
# make test-slow        the tests marked slow
# make label-server STUDIES=folder [BUNDLE=name] [DOMAIN=name] [UNCERTAINTY=true] [PORT=8000] [HOST=0.0.0.0]
#                       serve a bundle to 3D Slicer by MONAI Label
# make test-label       the tests of that, with a real server
# make check            lint, types, and the bundles against their source

PYTHON ?= python3
VENV := .venv
PY := $(VENV)/bin/python
BUNDLE ?= lung_ct_segmentation_resnet10
OUT ?= demo/result
CT ?=
WORKERS ?= 2
LABEL_VENV ?= .venv-label
LABEL_PY := $(LABEL_VENV)/bin/python
LABEL_APP := tools/monailabel_app
STUDIES ?=
DOMAIN ?=
UNCERTAINTY ?= false
HOST ?= 127.0.0.1
PORT ?= 8000

.PHONY: demo test test-slow test-label label-env label-server check venv clean

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

# The server's own environment, for it needs other versions than the project. Torch first, as above; the packages that are
# installed without their requirements ask for versions with which the server does not start.
label-env: $(LABEL_VENV)/.installed

LABEL_PIP := $(LABEL_PY) -m pip install --quiet --disable-pip-version-check
$(LABEL_VENV)/.installed: constraints.txt $(LABEL_APP)/requirements-monailabel.txt $(LABEL_APP)/torchvision_placeholder.py
	$(PYTHON) -m venv $(LABEL_VENV)
	grep -v '^pydicom==\|^jsonschema==\|^itk==' constraints.txt > $(LABEL_VENV)/constraints.txt
	$(LABEL_PIP) -c $(LABEL_VENV)/constraints.txt torch
	$(LABEL_PIP) -c $(LABEL_VENV)/constraints.txt -r $(LABEL_APP)/requirements-monailabel.txt
	$(LABEL_PIP) --no-deps monailabel==0.8.5 pydicom-seg==0.4.1
	$(LABEL_PY) $(LABEL_APP)/torchvision_placeholder.py
	touch $@

label-server: label-env
	@PYTHONPATH="$(CURDIR)" $(LABEL_PY) -m tools.label_server start --bundle "$(BUNDLE)" --studies "$(STUDIES)" \
	    --domain "$(DOMAIN)" --uncertainty "$(UNCERTAINTY)" --host "$(HOST)" --port "$(PORT)"

test-label: venv label-env
	MED3D_LABEL_PYTHON="$(abspath $(LABEL_PY))" $(PYTEST) --dist load --durations=0 tests/test_label_server.py

check: venv
	$(PY) -m ruff format --check med3d_nets tools tests
	$(PY) -m ruff check med3d_nets tools tests
	$(PY) -m mypy
	$(PY) -m tools.bundles make --check
	$(PY) -m tools.bundles check bundles/*

clean:
	rm -rf $(VENV) $(LABEL_VENV) demo build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache
