# `make demo` and `make test` do everything, set-up included; nothing but Python is needed.
PYTHON ?= python3
VENV ?= .venv

.PHONY: demo test lint clean

demo: $(VENV)/.installed
	$(VENV)/bin/vl2 demo

test: $(VENV)/.installed
	$(VENV)/bin/ruff check
	OMP_NUM_THREADS=1 $(VENV)/bin/python -m pytest --numprocesses auto --dist loadfile --no-loadscope-reorder

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
