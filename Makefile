# make demo | test | check | bench | campaign | gpu-check | train-sample; everything is installed into .venv on first use.
PYTHON ?= python3
VENV := .venv
RUN := $(VENV)/bin/python
SAMPLE_DATA ?= sample_widerface/

.PHONY: demo test check bench campaign gpu-check train-sample clean

demo: $(VENV)/runtime-installed
	$(RUN) inference.py --save_img
	@echo "the drawings are in inference_results/result_images"

# A process on each core and one more; each test file runs in one of them.
test: $(VENV)/dev-installed
	OMP_NUM_THREADS=1 $(RUN) -m pytest -n auto --dist=loadfile --no-loadscope-reorder

check: $(VENV)/dev-installed
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	$(RUN) -m mypy .

# Speed of detection on the images in BENCH_IMAGES, of evaluation, and of training on BENCH_DATA, a dataset as described
# in data/README.md.
BENCH_IMAGES ?= data/sample_widerface/images
BENCH_FLAGS ?=
BENCH_DATA ?= data/sample_widerface
bench: $(VENV)/dev-installed
	$(RUN) -m benchmarks.speed --images=$(BENCH_IMAGES) $(BENCH_FLAGS)
	$(RUN) -m benchmarks.host --images=$(BENCH_IMAGES)
	$(RUN) -m benchmarks.evaluator --largest=1e6
	$(RUN) -m benchmarks.training --dataset=$(BENCH_DATA) --steps=6

# Damaged files, kills, full disks, odd names and long runs: hours. CAMPAIGN="--only=images --seed=2 --count=100" is less.
CAMPAIGN ?=
campaign: $(VENV)/dev-installed
	$(RUN) -m campaigns $(CAMPAIGN)

# On a machine with a CUDA device: its tests, agreement with the CPU, speed and memory.
gpu-check: $(VENV)/dev-installed
	$(RUN) -m pytest -k cuda
	$(RUN) -m benchmarks.gpu

# A short training run on SAMPLE_DATA, a dataset as described in data/README.md.
train-sample: $(VENV)/runtime-installed
	$(RUN) train.py --experiment_name=sample --dataset=$(SAMPLE_DATA) --im_size=320 --epochs=20 --batch_size=8 \
		--pretrained_detector=experiments/mobilenet0.25_anc2_casT_fpn3/ckpt/mobilenet0.25_ckpt-best.pth \
		--learning_rate=1e-4 --freeze_bn

clean:
	rm -rf $(VENV) inference_results

$(VENV)/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 12))' || { \
		echo "error: Python 3.10, 3.11 or 3.12 is needed; choose one with make PYTHON=python3.11 $(MAKECMDGOALS)"; exit 1; }
	$(PYTHON) -m venv $(VENV)

$(VENV)/runtime-installed: requirements.txt requirements-inference.txt | $(VENV)/bin/python
	$(RUN) -m pip install --quiet --requirement requirements.txt
	@touch $@

$(VENV)/dev-installed: requirements-dev.txt $(VENV)/runtime-installed
	$(RUN) -m pip install --quiet --requirement requirements-dev.txt
	@touch $@
