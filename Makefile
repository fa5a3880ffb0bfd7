# `make demo` and `make test` are all that a fresh machine needs.
PYTHON ?= python3
VENV := .venv
TL4 := .venv-tl4
BOTH_CORES := -n auto --dist worksteal
export HF_HUB_OFFLINE ?= 1

.PHONY: install browser models demo test test-tl4 lint bench figures clean

install: $(VENV)/.done

$(VENV)/.done: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/pip install -q -c constraints.txt torch
	$(VENV)/bin/pip install -q -c constraints.txt -e ".[dev]"
	touch $@

# The same environment on TransformerLens 4, which has TransformerBridge alone.
$(TL4)/.done: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(TL4)
	sed 's/^transformer-lens==.*/transformer-lens==4.3.0/' constraints.txt > $(TL4)/constraints.txt
	$(TL4)/bin/pip install -q -c $(TL4)/constraints.txt torch
	$(TL4)/bin/pip install -q -c $(TL4)/constraints.txt -e ".[dev]"
	touch $@

# What the tests of figures and of the explorer draw with; without it they skip, and say so.
browser:
	@if command -v chromium >/dev/null && command -v chromedriver >/dev/null; then \
		echo "chromium and chromedriver are there"; \
	elif [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null; then \
		apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -qq -y --no-install-recommends chromium chromium-driver >/dev/null; \
	else \
		echo "no chromium: as root on Debian, apt-get install chromium chromium-driver" >&2; exit 1; \
	fi

# Two pretrained models for tests and benchmarks, some 2 GB in .models; without them their tests skip, and say so.
models: install
	$(VENV)/bin/python -m benchmarks.real_models

demo: install
	$(VENV)/bin/tl-flash demo

test: install test-tl4
	$(VENV)/bin/pytest $(BOTH_CORES)

# Only what touches TransformerLens differs between its versions.
TL4_TESTS := models checkpoint surfaces clamp alone activations prompts experiments validation lens
test-tl4: $(TL4)/.done
	$(TL4)/bin/pytest $(BOTH_CORES) $(addprefix tests/test_,$(addsuffix .py,$(TL4_TESTS)))

lint: install
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/pyright --pythonpath $(VENV)/bin/python
	$(VENV)/bin/lint-imports --no-cache

bench: install
	$(VENV)/bin/python -m benchmarks

# README's figures and the explorer's screenshots, into benchmarks/results.
figures: install
	$(VENV)/bin/python -m benchmarks.figures

clean:
	rm -rf $(VENV) $(TL4) demo-output
