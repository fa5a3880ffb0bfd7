# `make demo` and `make test` are all that a fresh machine needs.
PYTHON ?= python3
VENV := .venv
TL4 := .venv-tl4
TL2 := .venv-tl2
NEWEST := .venv-newest
BOTH_CORES := -n auto --dist worksteal
export HF_HUB_OFFLINE ?= 1

.PHONY: install browser models demo real explore test test-tl2 test-tl4 test-newest lint bench figures clean

install: $(VENV)/.done

$(VENV)/.done: pyproject.toml constraints.txt
	$(call environment,$(VENV),constraints.txt)

# Triton, on whose interpreter the kernels of GPUs are tested; nothing but their tests needs it.
$(VENV)/.triton: $(VENV)/.done
	$(VENV)/bin/pip install -q -c constraints.txt -e ".[dev-gpu]"
	touch $(VENV)/.triton

# TransformerLens 4, which has TransformerBridge alone.
$(TL4)/.done: pyproject.toml constraints.txt
	mkdir -p $(TL4)
	sed 's/^transformer-lens==.*/transformer-lens==4.3.0/' constraints.txt > $(TL4)/constraints.txt
	$(call environment,$(TL4),$(TL4)/constraints.txt)

# TransformerLens 2, which has HookedTransformer alone, and needs older releases of much else.
$(TL2)/.done: pyproject.toml .ci/constraints-tl2.txt
	$(call environment,$(TL2),.ci/constraints-tl2.txt)

# What pip finds today, with no constraint but torch's.
$(NEWEST)/.done: pyproject.toml constraints.txt
	grep '^torch==' constraints.txt > $(VENV)/torch.txt
	$(call environment,$(NEWEST),$(VENV)/torch.txt)

define environment
	$(PYTHON) -m venv $(1)
	$(1)/bin/pip install -q -c $(2) torch
	$(1)/bin/pip install -q -c $(2) -e ".[dev]"
	touch $(1)/.done
endef

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

# The same on a model that the package does not carry: SmolLM2-135M-Instruct.
real: models
	$(VENV)/bin/tl-flash demo --model .models/SmolLM2-135M-Instruct --out demo-output/SmolLM2-135M-Instruct

# The live explorer of the embedded model, in a browser; Ctrl-C stops it.
explore: install
	$(VENV)/bin/tl-flash explore

test: $(VENV)/.triton test-tl2 test-tl4
	$(VENV)/bin/pytest $(BOTH_CORES)

# Only what touches TransformerLens differs between its versions.
TL_TESTS := models checkpoint gguf quantised surfaces clamp expert_clamps alone stepping activations prompts generation experiments \
	validation lens lens_check mean_field exact_lens mixed_lens published_lenses trained_lenses troubles dose_window find explain \
	explore demo cli
TL_FILES := $(addprefix tests/test_,$(addsuffix .py,$(TL_TESTS)))
test-tl2: $(TL2)/.done
	$(TL2)/bin/pytest $(BOTH_CORES) $(TL_FILES)

test-tl4: $(TL4)/.done
	$(TL4)/bin/pytest $(BOTH_CORES) $(TL_FILES)

# All tests on the newest releases, made anew each time, so that the next break is seen.
test-newest: install
	rm -rf $(NEWEST)
	$(MAKE) $(NEWEST)/.done
	$(NEWEST)/bin/pytest $(BOTH_CORES)

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
	rm -rf $(VENV) $(TL2) $(TL4) $(NEWEST) demo-output
