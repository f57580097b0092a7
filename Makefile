# make quickstart   set up, train and evaluate the small example, draw its predictions
# make test         set up, run the test suite
# make bench        set up, measure CARAFE against other upsamplers (a quarter of an hour)
# make compare      set up, train the small example with five upsamplers (half an hour)
# make gpu-check    set up, check everything on this machine's GPU, write one report
# make lint         set up, check style and types: ruff, mypy, clang-format
# make format       set up, bring every file into the project's style
# make dist         set up, build a source archive and, from it, a wheel: dist/
# make clean        remove what was built here
#
# GPU_CHECK=options        for dev/gpu_check.py, e.g. '--quick' or '--mmcv mmcv-2.2.0.tar.gz'
# PYTHON=python3.12        the interpreter that makes the virtual environment
# VENV=path                the environment to use; default: the activated one, else .venv
# DETECTRON2=requirement   the Detectron2 to install, e.g.
#                          'git+https://github.com/facebookresearch/detectron2';
#                          default: the one that is installed, else 0.6 from the package index

PYTHON ?= python3
VENV ?= $(or $(VIRTUAL_ENV),$(CONDA_PREFIX),.venv)
DETECTRON2 ?=
CONFIG := configs/shapes_mask_rcnn_R18_FPN_carafe.yaml
OUTPUT := output/shapes_mask_rcnn_R18_FPN_carafe
# Metric, middle and half width: at least 40 box AP and 35 mask AP, or something is broken.
EXPECTED := [['bbox', 'AP', 60.0, 20.0], ['segm', 'AP', 55.0, 20.0]]

PY := $(VENV)/bin/python
PIP := $(PY) -m pip
# What was done for this checkout in this environment; removed together with the environment.
STAMPS := $(VENV)/.carafe_d2$(subst /,_,$(CURDIR))
SOURCES := $(shell find csrc -type f) setup.py pyproject.toml
CPP = $(shell find csrc docs tests -name '*.cpp' -o -name '*.cu' -o -name '*.cuh' -o -name '*.h' \
	-o -name '*.inl')

.PHONY: quickstart test bench compare gpu-check lint format dist environment clean
.DELETE_ON_ERROR:

quickstart: environment
	@echo "== Dataset"
	@$(PY) -m carafe_d2.data.shapes
	@echo "== Training and evaluation"
	@$(PY) train_net.py --resume --config-file $(CONFIG) OUTPUT_DIR $(OUTPUT) \
		TEST.EXPECTED_RESULTS "$(EXPECTED)"
	@echo "== Pictures"
	@$(PY) tools/visualize.py --config-file $(CONFIG) --output $(OUTPUT)/predictions.png \
		MODEL.WEIGHTS $(OUTPUT)/model_final.pth
	@echo
	@echo "Done. The tables above are box and mask AP on shapes_val."
	@echo "  predictions beside ground truth   $(OUTPUT)/predictions.png"
	@echo "  weights, log, metrics             $(OUTPUT)/{model_final.pth,log.txt,metrics.json}"
	@echo "  dataset                           $${DETECTRON2_DATASETS:-datasets}/shapes"
	@echo "Look closer: $(VENV)/bin/tensorboard --logdir $(OUTPUT), tools/predict.py, tools/show_kernels.py"
	@echo "Next, the published model on COCO (expected in $${DETECTRON2_DATASETS:-datasets}/coco):"
	@echo "  $(PY) train_net.py --config-file configs/mask_rcnn_R50_FPN_carafe_1x.yaml"

test: environment
	$(PY) -m pytest --numprocesses auto --dist loadfile --no-loadscope-reorder

bench: environment
	$(PY) -m carafe_d2.benchmark

compare: environment
	@$(PY) -m carafe_d2.data.shapes
	@$(PY) dev/compare.py

gpu-check: environment
	$(PY) dev/gpu_check.py $(GPU_CHECK)

lint: environment
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy
	$(VENV)/bin/clang-format --dry-run --Werror $(CPP)

format: environment
	$(PY) -m ruff check --fix .
	$(PY) -m ruff format .
	$(VENV)/bin/clang-format -i $(CPP)

dist: environment
	$(PY) -m build --no-isolation

environment: $(STAMPS)/extension
	@$(PY) dev/install_detectron2.py $(DETECTRON2)

$(PY):
	@echo "== Virtual environment $(VENV)"
	@$(PYTHON) -c 'import sys; sys.exit(None if sys.version_info >= (3, 10) else "error: Python " \
		"3.10 or newer is needed, and this is " + sys.version.split()[0] + "; name one by PYTHON=")'
	@$(PYTHON) -m venv $(VENV)

# Whoever has torch and torchvision, which belong together, or some build of OpenCV keeps them.
$(STAMPS)/torch: | $(PY)
	@echo "== PyTorch and OpenCV in $(VENV)"
	@$(PY) -c 'import torch, torchvision; print("PyTorch", torch.__version__, "is installed")' \
		2>/dev/null || $(PIP) install torch torchvision
	@$(PY) -c 'import cv2; print("OpenCV", cv2.__version__, "is installed")' \
		2>/dev/null || $(PIP) install opencv-python-headless
	@mkdir -p $(@D) && touch $@

# Ultralytics is for the tests, and without its requirements: opencv-python would write over the
# OpenCV that is there.
$(STAMPS)/extension: $(STAMPS)/torch $(SOURCES)
	@echo "== carafe_d2 and its compiled operator"
	@$(PIP) install --quiet 'setuptools>=77'
	@$(PY) setup.py --quiet build_ext --inplace
	@$(PIP) install --quiet --no-build-isolation --editable '.[train,test,lint]'
	@$(PIP) install --quiet --no-deps ultralytics
	@touch $@

clean:
	rm -rf build dist carafe_d2/_C.so $(STAMPS)
