# `make demo` and `make test` do everything, set-up included; nothing but Python is needed.
PYTHON ?= python3
VENV ?= .venv

.PHONY: demo test test-thorough test-page test-engines nano nano-shipped lint clean

demo: $(VENV)/.installed
	$(VENV)/bin/vl2 demo

test: $(VENV)/.installed
	$(VENV)/bin/ruff check
	OMP_NUM_THREADS=1 $(VENV)/bin/python -m pytest --numprocesses auto --dist loadfile --no-loadscope-reorder \
		--durations 25 --durations-min 5

# The operators' C++ under sanitizers and, where Debian's cross compiler and qemu are, on an emulated Arm processor.
test-thorough: $(VENV)/.installed
	OMP_NUM_THREADS=1 $(VENV)/bin/python -m pytest --numprocesses auto --dist load -m thorough tests/plugins

# The web page in Debian's chromium, which the package manager installs; too large for the suite.
test-page: $(VENV)/.installed
	$(VENV)/bin/python -m pip install --quiet 'playwright>=1.50'
	OMP_NUM_THREADS=1 $(VENV)/bin/python -m pytest tests/runtime/serve/test_page.py

# Kernels compiled by nvcc for every architecture and engines built by TensorRT-RTX, no GPU needed; half a gigabyte.
test-engines: $(VENV)/.installed
	$(VENV)/bin/python -m pip install --quiet --editable '.[engine]' \
		nvidia-cuda-nvcc==13.0.88 nvidia-cuda-crt nvidia-nvvm nvidia-cuda-runtime
	$(VENV)/bin/python -m vl2.plugins.cuda.pack
	OMP_NUM_THREADS=1 $(VENV)/bin/python -m pytest tests/plugins/tensorrt tests/plugins/cuda/test_pack.py

# vl2-nano from nothing in two hours on two cores, 57 % of its held-out questions. Goes on where it was interrupted.
nano: $(VENV)/.installed
	$(VENV)/bin/python -m vl2.nano.train --out runs/nano --tower-steps 1482 --decoder-steps 2332 --easy-steps 100 \
		--joint-rate 5e-4 --steps 4400 --decay-steps 2600

# As it ships, 71 %: two longer runs, one upon the other, about 4 hours on one core.
nano-shipped: $(VENV)/.installed
	$(VENV)/bin/python -m vl2.nano.train --out runs/first
	$(VENV)/bin/python -m vl2.nano.train --out runs/second --start runs/first --seed 1 \
		--tower-steps 900 --easy-steps 0 --steps 4000 --decay-steps 1700

# torch is named first and exactly, so that no other package chooses its build.
$(VENV)/.installed: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install --quiet torch==2.13.0
	$(VENV)/bin/python -m pip install --quiet --editable '.[export,test]'
	touch $@

lint: $(VENV)/.installed
	$(VENV)/bin/ruff check

clean:
	rm -rf $(VENV) build dist *.egg-info vl2-nano.bundle
